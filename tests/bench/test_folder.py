"""The benchmark of folders: its source loads, its ways run; and memory, which grows neither with models nor threads."""

import argparse
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock
from time import sleep

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench import folder
from fq_transforms.export.files.shards import ShardWriter
from fq_transforms.export.streaming import run
from tests.cases import assert_names


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "source"
    folder.make_source(path, 10**7, layers=2, hidden=128, inner=256)
    return path


def test_transformers_loads_the_source(source):
    """Every tensor of the source is one of the model that its config names, and none is missing."""
    transformers = pytest.importorskip("transformers")
    _, found = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_size_is_what_was_asked(tmp_path):
    size = folder.make_source(tmp_path / "source", 3 * 10**7, layers=2, hidden=128, inner=256)
    assert abs(size / 3e7 - 1) < 0.05
    files = list((tmp_path / "source").glob("*.safetensors"))
    assert len(files) >= 3
    assert 0 <= sum(file.stat().st_size for file in files) - size < 10**6


def test_ways_are_measured(source, tmp_path):
    """A copy has the bytes of the source; ours loads, with experts in codes; memory is that of the process."""
    arguments = {"src": str(source), "jobs": 2, "device": "cpu", "format": "NVFP4", "shard": 10**9}
    copied = folder.run(folder.COPY + folder.SYNC, arguments | {"dst": str(tmp_path / "copy")})
    assert copied["written"] == sum(file.stat().st_size for file in source.iterdir())
    ours = folder.run(folder.OURS, arguments | {"dst": str(tmp_path / "ours")})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert 0 < ours["written"] < copied["written"]
    assert ours["seconds"] > 0
    assert ours["cpu"] > 0
    assert 5e7 < ours["peak"] < 2e9


def test_both_is_a_read_while_a_third_as_many_bytes_are_written(source, tmp_path, monkeypatch):
    """Whatever the number and the sizes of the source's files."""
    clock, timed = folder._seconds, []

    def seconds(call):
        spent = clock(call)
        timed.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        return spent

    monkeypatch.setattr(folder, "_seconds", seconds)
    rates = folder.rates(source, tmp_path, "cpu")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    read, written, both = timed
    assert read == 0
    assert written > 0
    assert 0 <= size // 3 - both < 4
    assert set(rates) == {"read", "write", "both"}
    assert all(rate > 0 for rate in rates.values())
    assert not list(tmp_path.iterdir())


def most_alive(source, made, monkeypatch):
    """The most bytes of tensors that are alive while a folder is quantized, looked at whenever a 20th is written."""
    found, write, numbers = [], ShardWriter.write, count()

    def looked(self, name, tensor, first=0):
        if next(numbers) % 20 == 0:
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and not one.is_meta]
            found.append(sum(one.nbytes for one in tensors))
        write(self, name, tensor, first)

    gc.collect()
    gc.freeze()  # what was there before is not looked through: of all libraries, it is many times what is made here
    monkeypatch.setattr(ShardWriter, "write", looked)
    try:
        fqt.export.folder(source, made, {"*.experts.*": fqt.NVFP4}, device="cpu", jobs=1)
    finally:
        gc.unfreeze()
        monkeypatch.undo()
    return max(found)


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """With five times the experts as much is alive: a few experts of one layer."""
    sizes = {"small": 8 * 10**6, "large": 2 * 10**7}
    for name, size in sizes.items():
        folder.make_source(tmp_path / name, size, layers=2, hidden=256, inner=256)
    small, large = (most_alive(tmp_path / name, tmp_path / f"{name}-1", monkeypatch) for name in sizes)
    expert = 2 * 3 * 256**2
    assert small <= large <= 4 * expert


def test_threads_wait_for_memory(monkeypatch):
    """Whatever pieces are given, those that are held together fit; one that never fits is held by itself."""
    monkeypatch.setattr(run, "HELD_BYTES", 100)
    memory, lock, held, most = run._Memory(), Lock(), [0], [0]

    def hold(size):
        with memory.of(size):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
                assert held[0] <= 100 or held[0] == size
            sleep(0.0005)
            with lock:
                held[0] -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hold, [30, 60, 45, 101, 10, 100, 1, 99] * 10))
    assert most[0] > 60
    with pytest.raises(KeyError), memory.of(100):
        raise KeyError
    with memory.of(100):
        pass


def test_a_way_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit) as error:
        folder.run("raise ValueError('no such thing')", {"dst": str(tmp_path)})
    assert_names(str(error.value), "no such thing", str(tmp_path))


def test_rates_and_page(source, tmp_path):
    rates = folder.rates(source, tmp_path, "cpu")
    assert rates.keys() == {"read", "write", "both"}
    assert not list(tmp_path.iterdir())
    row = {"seconds": 2.0, "peak": 10**9, "cpu": 3.0, "written": 5 * 10**8}
    rows = [
        {"way": "cp", "format": "copy", "runs": [row | {"seconds": 1.0}]},
        {"way": "NVFP4, 2 jobs", "format": "NVFP4", "runs": [row]},
        {"way": "NVFP4, model_free_ptq", "format": "NVFP4", "scheme": "NVFP4A16", "runs": [row | {"seconds": 4.0}]},
    ]
    facts = {"bytes": 10**9, "rates": {"read": 1e9, "write": 1e9, "both": 0.8e9}}
    page = folder.page({"date": "2026-11-29"}, facts, rows)
    assert_names(page, "| NVFP4, 2 jobs | 0.500 ± nan | 0.50 ± nan | 2.00 ± nan | 0.50 (read) | 0.62 | 1.00 | 3.0 |")


def test_options_name_the_ways():
    options = argparse.Namespace(formats=["NVFP4", "FP8"], jobs=[1, 8], device="cpu", peer="python", peer_jobs=[2])
    found = list(folder.ways(options))
    wanted = ["cp", "NVFP4, 1 jobs", "NVFP4, 8 jobs", "NVFP4, model_free_ptq, 2 workers", "FP8, 1 jobs", "FP8, 8 jobs"]
    assert found == wanted
