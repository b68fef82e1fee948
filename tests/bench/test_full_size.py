"""The packed stage of the full-size benchmark, at a size for two cores: the same functions, smaller weights."""

from functools import partial

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

import fq_transforms as fqt
from fq_transforms.bench import full_size
from tests.cases import assert_names, experts, name_of


def tiny():
    params = {
        f"decoder.layers.{layer}.mlp.experts.{role}.weight{i}": weight
        for layer in range(2)
        for role, shape in (("linear_fc1", (48, 64)), ("linear_fc2", (64, 48)))
        for i, weight in enumerate(experts(8, shape, torch.bfloat16, seed=layer))
    }
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
    return fq, params, fq.calibrate(params)


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_round_trip(monkeypatch):
    """Saved by four processes, loaded by two: equal bytes, each stage timed, and a page with them.

    These are forked from the server of `tests.ranks`; the test below starts one as the benchmark does.
    """
    processes = partial(full_size.start_processes, start_method="forkserver")
    monkeypatch.setattr(full_size, "start_processes", processes)
    fq, params, state = tiny()
    row, stages = {"format": "NVFP4"}, []

    def timed(stage, call):
        stages.append(stage)
        row[stage] = 0.5
        return call()

    full_size._packed_round_trip(row, timed, fq, params, state)
    assert [stage.removeprefix("packed: ") for stage in stages] == [
        "pack",
        "copy for other processes",
        "save at EP=4 by 4 processes",
        "load at EP=2 by 2 processes, and compare",
    ]
    assert all(row[f"{stage}, without their start"] > 0 for stage in stages[2:4])
    assert row["bf16, GB"] == 2 * 2 * 8 * 48 * 64 * 2 / 1e9
    page = full_size.page({"date": "today"}, [row, {"format": "FP8", "select": 1}])
    assert_names(
        page,
        "| packed on disk / bf16 | ",
        "| packed: load at EP=2 by 2 processes, and compare | 0.500 |  |",
        "| select |  | 1 |",
    )


@pytest.mark.dist
def test_a_process_finds_another_byte(tmp_path, capfd):
    """What a process loads is compared with what was packed: if one byte of that is changed, the whole run fails."""
    fq, params, state = tiny()
    packed = fq.pack(params, state)
    checkpoint, source = tmp_path / "packed", tmp_path / "source"
    fqt.checkpoint.save(checkpoint, fq, packed)
    leaves = fqt.state.flatten(packed)
    full_size._share(leaves, source)
    list(full_size._mapped(leaves, source).values())[-1].view(torch.uint8)[-1] ^= 1
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        full_size.in_processes(full_size._load_rank, 1, source, checkpoint, fq)
    assert f"{list(leaves)[-1]} of packed experts of a rank is not what it should be" in capfd.readouterr().err


def test_another_byte_is_found():
    """Bytes are compared: one that differs, a leaf of another dtype, or a missing leaf ends the benchmark."""
    fq, params, state = tiny()
    packed = fq.pack(params, state)
    full_size._same(packed, packed, "itself")
    key = next(iter(packed))
    codes = packed[key]["codes"].clone()
    codes[7, 3, 5] ^= 1
    for other in (codes, packed[key]["codes"].view(torch.int8)):
        with pytest.raises(SystemExit, match="codes of it"):
            full_size._same(packed | {key: packed[key] | {"codes": other}}, packed, "it")
    with pytest.raises(SystemExit, match="leaves of it"):
        full_size._same({key: packed[key]}, packed, "it")


@pytest.mark.parametrize("format", full_size.FORMATS, ids=name_of)
def test_the_check_of_a_report_finds_one_count_that_is_off(format):
    """It compares the last expert of a group as well."""
    _, params, _ = tiny()
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state = fq.calibrate(params)
    found = fq.report(params, state)
    full_size._check_report(fq, params, state, found)
    group = fq.spec.groups[-1]
    found.groups[group.key].zeroed[-1] += 1
    with pytest.raises(SystemExit, match=f"zeroed of {group.names[-1]} is not"):
        full_size._check_report(fq, params, state, found)
