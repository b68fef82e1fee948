"""The benchmark of several ranks, small, on CPUs: its laws hold, or it ends with an error; what its page says."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench.scale import fsdp, launch, megatron
from fq_transforms.bench.scale.folder import check_same_files
from fq_transforms.bench.scale.page import page
from fq_transforms.bench.scale.steps import check_equal
from tests.cases import assert_names
from tests.checkpoint.test_megatron import allow_writers
from tests.full import FULL
from tests.integrations.test_megatron_attach import megatrons_optimizers_on_a_cpu

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SMALL = {"device": "cpu", "layers": 2, "experts": 8, "top": 2, "hidden": 64, "ffn": 32, "tokens": 32, "steps": 2}
SIZE = 8 if FULL else 2


def a_job(rank, size, module, job, options, broken=False):
    """What rank 0 of torchrun would give; Megatron without a GPU. Broken: the lens leaves plain bf16 weights."""
    given = argparse.Namespace(**SMALL, **options)
    write = fqt.Transform.fakequant
    if broken:
        fqt.Transform.fakequant = lambda fq, masters, state, *, out=None, **how: (
            write(fq, masters, state, **how) if out is None else fqt.cast(masters, out=out)
        )
    try:
        if module == "fsdp":
            return getattr(fsdp, job)(given)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.moe import moe_utils

        parallel_state.destroy_model_parallel()
        CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()
        moe_utils.te_general_gemm = None
        allow_writers()
        with megatrons_optimizers_on_a_cpu():
            return getattr(megatron, job)(given)
    finally:
        fqt.Transform.fakequant = write


# By tensor parallelism.
LAYOUTS = {
    "megatron": {1: f"EP={SIZE}", 2: f"TP=2 x EP={SIZE // 2}"},
    "fsdp": {1: "FSDP2=2 x EP=4" if FULL else "FSDP2=1 x EP=2"},
}
FEWER = [SIZE >> shift for shift in range(1, SIZE.bit_length())]


@pytest.mark.dist
@pytest.mark.parametrize("part", LAYOUTS)
def test_training_holds_its_laws(ranks, tmp_path, part):
    """Weights and amax are one GPU's, checked by the part itself; every fewer number of ranks loads the state."""
    saved = []
    for tensor, layout in LAYOUTS[part].items():
        folder = tmp_path / str(tensor)
        folder.mkdir()
        saved.append(str(folder))
        row, *others = ranks(a_job, part, "train", {"saved": saved[-1], "tensor": tensor}, size=SIZE)
        assert row["layout"] == layout
        assert all(other["lens"] == row["lens"] for other in others)  # each has the time of the slowest
        assert len(row["lens"]["ratios"]) == len(row["again"]["ratios"]) == SMALL["steps"]
        whole = torch.load(folder / "whole.pt")
        assert len(whole) == 2 * SMALL["layers"]
        assert all(len(leaves["amax"].unique()) > SMALL["experts"] / 2 for leaves in whole.values())
        assert f"| {part} | {layout} | " in page({"date": "today"}, [row | {"loaded": ["EP=1"]}])
    for size in FEWER:
        (found,) = set(ranks(a_job, part, "load", {"saved": saved, "tensor": 1}, size=size))
        assert found == (f"EP={size}" if part == "megatron" else f"FSDP2={size // 4 + 1} x EP={min(size, 2)}")
    for folder in saved:  # one amax of one expert is another
        whole = torch.load(f"{folder}/whole.pt")
        list(whole.values())[-1]["amax"][-1] *= 2
        torch.save(whole, f"{folder}/whole.pt")
        with pytest.raises(SystemExit, match=f"amax of .*, loaded from {Path(folder).name}: found 1 of 8"):
            ranks(a_job, part, "load", {"saved": [folder], "tensor": 1}, size=1)


@pytest.mark.dist
@pytest.mark.parametrize("part", LAYOUTS)
def test_weights_that_are_not_fake_end_it(ranks, tmp_path, part):
    """As if the optimizer's own cast came after the lens."""
    with pytest.raises(SystemExit, match="fake weights of .*: found .* wanted none"):
        ranks(a_job, part, "train", {"saved": str(tmp_path), "tensor": 1}, True, size=2)


@pytest.mark.dist
def test_the_script_writes_a_page(tmp_path):
    """By torchrun, as a user calls it; with nothing of this machine's paths."""
    sizes = [f"--{name}={SMALL[name]}" for name in ("experts", "top", "hidden", "ffn", "tokens", "steps")]
    parts = ["fsdp", "folder"] if FULL else ["folder"]  # what trains is above
    command = [sys.executable, "-m", "fq_transforms.bench", "scale", "--parts", *parts, "--device", "cpu"]
    command += [*sizes, "--layers=1", f"--ranks={SIZE}", "--gb=0.02", f"--out={tmp_path}", f"--where={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (made,) = tmp_path.glob("*-scale.json")
    assert sorted(tmp_path.iterdir()) == [made, made.with_suffix(".md")]
    found, text = json.loads(made.read_text()), made.with_suffix(".md").read_text()
    assert done.stdout.strip() == text.strip()
    assert str(tmp_path) not in text + made.read_text()
    assert {"date", "gpu", "torch", "commit"} <= found["environment"].keys()
    folders = [row for row in found["rows"] if row["part"] == "folder"]
    assert [len(row["loaded"]) for row in found["rows"] if row["part"] == "fsdp"] == [len(FEWER)] * (len(parts) - 1)
    assert [row["ranks"] for row in folders] == [*FEWER[::-1], SIZE]
    assert all(row["files"] > 3 for row in folders)
    assert_names(text, *(["bf16 again"] if FULL else []), "| 2 | ", "commit")


@pytest.mark.dist
def test_a_job_that_fails_ends_the_script(tmp_path, capfd):
    """Whatever the ranks raise."""
    with pytest.raises(SystemExit, match=r"fsdp\.load on 1 ranks: found an error"):
        launch._torchrun("fsdp.load", 1, argparse.Namespace(**SMALL), saved=[str(tmp_path / "nothing")])
    assert "FileNotFoundError" in capfd.readouterr().err


def test_other_bytes_are_named():
    with pytest.raises(SystemExit, match="folder on 4 ranks: found other bytes in b, c, wanted those of one rank"):
        check_same_files({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, 4)


def test_bits_are_compared():
    """Zeros of two signs are not the same; NaN is the same as itself."""
    x = torch.tensor([0.0, torch.nan])
    check_equal(x, x.clone(), "x")
    with pytest.raises(SystemExit, match="x: found 1 of 2"):
        check_equal(torch.tensor([-0.0, torch.nan]), x, "x")
    with pytest.raises(SystemExit, match="found torch.bfloat16"):
        check_equal(x.bfloat16(), x, "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ranks=3"], "--ranks: found 3, wanted a power of 2"),
        (["--ranks=2", "--parts", "megatron"], "--parts: found megatron with --device cpu"),
        (["--ranks=8", "--experts=12"], "--experts: found 12, wanted a multiple of 8"),
        (["--ranks=2", "--hidden=96"], "--hidden: found 96, wanted a multiple of 64"),
        (["--ranks=2", "--tokens=3"], "--tokens: found 3, to 6 experts each"),
        (["--ranks=2", "--tokens=1536"], "whole sequences of 1024"),
    ],
)
def test_options_are_checked(given, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        launch.main(["--device=cpu", "--parts", "fsdp", f"--out={tmp_path}", *given], "none")
    assert not list(tmp_path.iterdir())
