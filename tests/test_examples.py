"""Examples run as the notebooks that the site shows; the quickstart, Megatron's and, under FULL, all as scripts."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fq_transforms as fqt
from tests.full import FULL

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def said(script, *options, ranks=None, gpus=False):
    """The lines that an example prints, alone or under torchrun; it sees GPUs only if asked to."""
    launcher = [] if ranks is None else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command = [sys.executable, *launcher, EXAMPLES / script, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def columns(line):
    """The entries of a line of a table."""
    return re.split("  +", line.strip())


def shown(name):
    """The lines that an example prints and shows as a notebook, at its small size.

    The site's build, which makes notebooks that are not current, finds those that tests have made.
    """
    for peer in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(peer)
    script = ROOT / "docs" / "notebooks.py"
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = importlib.util.spec_from_file_location("notebooks", script)
    notebooks = importlib.util.module_from_spec(found)
    found.loader.exec_module(notebooks)
    return notebooks.lines(name)


SCRIPTS = sorted(path.name for path in EXAMPLES.glob("0*.py"))


@pytest.mark.filterwarnings("ignore")  # of libraries that they import
@pytest.mark.skipif(not FULL, reason="notebooks show it; all with FULL=1")
@pytest.mark.parametrize("script", [one for one in SCRIPTS if one[:2] in {"02", "04", "05", "06", "07", "08"}])
def test_an_example_is_a_script_too(script, tmp_path):
    """What a notebook shows as HTML and pictures is printed, and written into `--out`."""
    lines = said(script, "--small", "--out", tmp_path)
    assert lines[-1]
    assert not any("<table" in line or "<Figure" in line for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_does_and_runs_nothing(script, tmp_path, monkeypatch, capsys):
    """Options that all have, and no folder, no progress bar, no table. In this process, which has PyTorch already."""
    monkeypatch.setattr(sys, "argv", [script, "--help", "--out", str(tmp_path / "none")])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: {script}")
    assert {"--small", "--out"} <= {line.split()[0] for line in lines if line.startswith("  --")}
    assert not (tmp_path / "none").exists()
    options = lines.index("options:")
    assert all(line.startswith("  ") for line in lines[options + 1 :])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_cell_of_a_notebook_ends_in_a_stray_value(script):
    """Such as the generator that `torch.manual_seed` returns, which a notebook would print."""
    for cell in (EXAMPLES / script).read_text().split("# %%")[1:]:
        last = (ast.parse(cell.partition("\n")[2]).body or [None])[-1]
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
            name = ast.unparse(last.value.func).rpartition(".")[2]
            assert name in {"print", "show", "save", "rmtree", "set_num_threads", "destroy_process_group"}, cell
        else:
            assert not isinstance(last, ast.Expr) or isinstance(last.value, ast.Constant), cell


def test_quickstart_has_every_format_and_the_same_logits_after_loading(tmp_path):
    """The script itself compares the logits; every format has its row of losses, and the worst was fine-tuned.

    That is its own format of two bits. It costs many times what the others do, and QAT brings back most of it.
    """
    lines = said("01_quickstart.py", "--small", "--out", tmp_path)
    stored = next(line for line in lines if line.startswith("nvfp4_state.safetensors"))
    assert stored.endswith("the same logits after loading")
    assert {path.name for path in tmp_path.iterdir()} == {"nvfp4_state.safetensors", "report.png", "quickstart.png"}
    formats = {name for name in fqt.__all__ if isinstance(getattr(fqt, name), fqt.Format)} | {"INT2"}
    rows = {line.split()[0]: line for line in lines if line and line.split()[0] in formats}
    assert rows.keys() == formats
    assert not any("nan" in row for row in rows.values())
    costs = {name: [float(cost) for cost in re.findall(r" ([+-][\d.]+) ", row)] for name, row in rows.items()}
    assert [name for name, cost in costs.items() if len(cost) > 2] == ["INT2"]
    ptq, _, later, qat = costs.pop("INT2")
    assert ptq > 3 * max(cost[0] for cost in costs.values())
    assert qat < later / 2
    share = int(re.search(r"bring back (\d+)%", lines[-2])[1])
    assert share == pytest.approx(100 * (1 - qat / later), abs=2)  # of numbers that were rounded for the table
    assert lines[-1].endswith("s of CPU time.")


def test_qat_step_gives_equal_gradients_and_learns():
    """The script itself compares the gradients of its four ways, and asserts that the loss went down."""
    lines = shown("02_qat_step")
    ways = [line.split()[0] for line in lines if "gradients equal: True" in line]
    assert ways == ["plain", "once", "layerwise", "lens"]
    assert "loss" in lines[-1]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("gpus", [False, pytest.param(True, marks=pytest.mark.gpu2)], ids=["cpu", "gpus"])
def test_megatron_moe_is_restored_and_goes_on(gpus, tmp_path):
    """TP=2 and EP=2, then its checkpoints on one rank. The script compares states and logits, format by format.

    All four with FULL=1; by default the two of `--small`: tests/checkpoint/test_megatron.py has the others' leaves.
    """
    formats = ("FP8", "NVFP4", "INT8_PER_CHANNEL", "INT4_BLOCK32")[: 4 if FULL else 2]
    options = ["--folder", tmp_path, *(() if FULL else ["--small"])]
    lines = said("03_megatron_moe.py", *options, ranks=2, gpus=gpus)
    wanted = [f"{f}: restored at TP=2, EP=2 into a model on meta, the same state and logits" for f in formats]
    assert [line for line in lines if "restored at" in line] == wanted
    assert "restored half way" in lines[-1]
    wanted = [f"{f}: 16 experts at EP=1, the amax of each is 0.9 of its own weights'" for f in formats]
    assert said("03_megatron_moe.py", *options, "--load", ranks=1, gpus=gpus) == wanted


@pytest.mark.dist
def test_checkpoint_reshard_gives_the_same_logits_at_every_expert_parallelism():
    """The script itself compares them; it is run with four processes, and has to say so for 4, 2 and 1."""
    found = [line for line in shown("04_checkpoint_reshard") if line.startswith("saved at EP=4")]
    wanted = [f"saved at EP=4, loaded at EP={ep}: {8 // ep} of 8 amax on rank 0, the same logits" for ep in (4, 2, 1)]
    assert found == wanted


def test_export_is_read_back_by_the_real_libraries():
    """The script itself compares logits and weights, and asserts that they are equal."""
    lines = shown("05_export")
    assert any(line.startswith("refused: state 'model.layers.0.self_attn.q_proj.weight'") for line in lines)
    assert lines[-5].endswith("the same logits")
    assert lines[-4].endswith("the same weights")


def test_calibration_compares_every_method_in_every_format():
    """The script itself asserts that no expert is worse off under mse; the table says so again of all together.

    GPTQ leaves less than half of the outputs' error on held-out text, and as little as ModelOpt's on the same Hessians.
    """
    lines = shown("06_calibration")
    plain, weighted, outputs = {}, {}, {}
    for format, *entries in map(columns, lines):
        if format in fqt.formats.FORMATS:
            row = format, entries[0]
            plain[row], weighted[row], outputs[row] = map(float, entries[1:4])
            assert not any("nan" in entry for entry in entries)
    gptq = {"GPTQ", "GPTQ, activation", "GPTQ of ModelOpt"}
    methods = {"max", "percentile 99.99", "percentile 99.9", "percentile 99", "mse", "mse, weighted"}
    assert plain.keys() == (
        {(format, method) for format in ("INT4_BLOCK32", "NVFP4_STATIC", "FP8", "INT8") for method in methods | gptq}
        | {(format, "mse, local Hessian") for format in ("INT4_BLOCK32", "NVFP4_STATIC")}
        | {("NVFP4_STATIC", "four over six, 256"), ("NVFP4_STATIC", "four over six, 448"), ("NVFP4", "max")}
        | {("MXFP4", method) for method in {"max", *gptq}}
    )
    for format in ("INT4_BLOCK32", "NVFP4_STATIC"):
        assert plain[format, "mse"] < 0.9
        assert weighted[format, "mse, weighted"] < weighted[format, "mse"]
    for format in ("INT4_BLOCK32", "NVFP4_STATIC", "MXFP4"):
        assert outputs[format, "GPTQ"] < min(0.5, 1.02 * outputs[format, "GPTQ of ModelOpt"])
    assert any(line.startswith("mse: an error no larger than max's for all 12 experts' matrices") for line in lines)


def test_sensitivity_chooses_a_spec_under_its_budget():
    """Every choice keeps the budget, a quarter of the way from four bits to eight; the last lines say what it found."""
    lines = shown("07_sensitivity")
    assert lines[0].startswith("Four bits for one expert of 8: the loss on 512 held-out sequences changes by")
    rows = [columns(line) for line in lines]
    rows = rows[rows.index(["choice", "bytes", "bits", "increase"]) + 1 :]
    size = {row[0]: int(row[1].replace(",", "")) for row in rows if len(row) == 4}
    ends = [size.pop(f"{bits} bits for all") for bits in (4, 8)]
    ways = [f"by expert, {way}" for way in ("loss", "jvp", "hessian", "report")]
    assert list(size) == [*ways, "by role, jvp", "by layer, jvp"]
    assert all(ends[0] <= each <= ends[0] + (ends[1] - ends[0]) // 4 for each in size.values())
    assert size["by expert, report"] > ends[0]  # the error of weights only falls
    assert any(line.startswith("Mixture(6 units, ") for line in lines)
    assert lines[-2].startswith("Of the four, ")
    assert lines[-1].startswith("At 5.0")


def test_distillation_brings_the_student_back_to_its_teacher():
    """The script itself asserts that the teacher's logits are the same bits while the student's weights are in place.

    A teacher in either form takes back most of the divergence from it (0.7 when this was written) and lowers the loss
    that quantization has raised; labels alone move the student further away.
    """
    lines = shown("08_distill")
    increase, divergence = {}, {}
    for row in map(columns, lines):
        if row[0] == "MXFP4":
            increase[row[1]], divergence[row[1]] = (float(row[column].partition(" ")[0]) for column in (3, 5))
    assert list(increase) == ["PTQ after the steps", "QAT", "PTQ", "QAD", "QAD, 16 logits"]
    for way in ("QAD", "QAD, 16 logits"):
        assert divergence[way] < 0.7 * divergence["PTQ"] < divergence["QAT"]
        assert increase[way] < increase["PTQ"]
    weights, tokens = 164_672, 40 * 16 * 32
    assert f"teacher, a frozen copy: {4 * weights:,} bytes, whatever it is asked" in lines
    cached = f"{tokens * 50:,} bytes for {tokens:,} tokens, {17 * 2 + 16} for each"
    assert f"teacher, 16 cached logits: {cached}" in lines
