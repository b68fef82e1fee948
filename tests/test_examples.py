"""Examples run as their first lines say."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fq_transforms as fqt
from tests.full import FULL

EXAMPLES = Path(__file__).parents[1] / "examples"


def said(script, *options, ranks=None, gpus=False):
    """The lines that an example prints, alone or under torchrun; it sees GPUs only if asked to."""
    launcher = [] if ranks is None else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command = [sys.executable, *launcher, EXAMPLES / script, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


SCRIPTS = sorted(path.name for path in EXAMPLES.glob("0*.py"))


@pytest.mark.filterwarnings("ignore")  # of libraries that they import
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
            assert name in {"print", "save", "rmtree", "set_num_threads", "destroy_process_group"}, cell
        else:
            assert not isinstance(last, ast.Expr) or isinstance(last.value, ast.Constant), cell


def test_quickstart_has_every_format_and_the_same_logits_after_loading(tmp_path):
    """The script itself compares the logits; every format has its row of losses, and the worst was fine-tuned.

    That is its own format of two bits. It costs many times what the others do, and QAT brings back most of it.
    """
    lines = said("01_quickstart.py", "--small", "--out", tmp_path)
    stored = next(line for line in lines if line.startswith("nvfp4_state.safetensors"))
    assert stored.endswith("the same logits after loading")
    assert {path.name for path in tmp_path.iterdir()} == {"nvfp4_state.safetensors", "quickstart.png"}
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
    lines = said("02_qat_step.py", "--small")
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
def test_checkpoint_reshard_gives_the_same_logits_at_every_expert_parallelism(tmp_path):
    """The script itself compares them; it is run with four processes, and has to say so for 4, 2 and 1."""
    found = [
        line
        for line in said("04_checkpoint_reshard.py", "--out", tmp_path, ranks=4)
        if line.startswith("saved at EP=4")
    ]
    wanted = [f"saved at EP=4, loaded at EP={ep}: {8 // ep} of 8 amax on rank 0, the same logits" for ep in (4, 2, 1)]
    assert found == wanted


def test_export_is_read_back_by_the_real_libraries(tmp_path):
    """The script itself compares logits and weights, and asserts that they are equal."""
    lines = said("05_export.py", "--out", tmp_path)
    assert any(line.startswith("refused: state 'model.layers.0.self_attn.q_proj.weight'") for line in lines)
    assert lines[-5].endswith("the same logits")
    assert lines[-4].endswith("the same weights")


def test_calibration_compares_every_method_in_every_format(tmp_path):
    """The script itself asserts that no expert is worse off under mse; the table says so again of all together.

    GPTQ leaves less than half of the outputs' error on held-out text, and as little as ModelOpt's on the same Hessians.
    """
    lines = said("06_calibration.py", "--small", "--out", tmp_path)
    table = lines[lines.index(next(line for line in lines if line.startswith("bf16"))) + 1 :]
    plain, weighted, outputs = {}, {}, {}
    for line in table:
        if line[:16].strip() in fqt.formats.FORMATS:
            row = line[:16].strip(), line[16:38].strip()
            plain[row], weighted[row], outputs[row] = map(float, line[38:].split()[:3])
            assert "nan" not in line
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


def test_sensitivity_chooses_a_spec_under_its_budget(tmp_path):
    """Every choice keeps the budget, a quarter of the way from four bits to eight; the last lines say what it found."""
    lines = said("07_sensitivity.py", "--small", "--out", tmp_path)
    assert lines[0].startswith("Four bits for one expert of 4: the loss on 8 held-out sequences changes by")
    rows = lines[lines.index(next(line for line in lines if "held-out loss" in line)) + 1 :]
    size = {row[:22].strip(): int(row[22:32].replace(",", "")) for row in rows[: rows.index("")]}
    ends = [size.pop(f"{bits} bits for all") for bits in (4, 8)]
    ways = [f"by expert, {way}" for way in ("loss", "jvp", "hessian", "report")]
    assert list(size) == [*ways, "by role, jvp", "by layer, jvp"]
    assert all(ends[0] <= each <= ends[0] + (ends[1] - ends[0]) // 4 for each in size.values())
    assert size["by expert, report"] > ends[0]  # the error of weights only falls
    assert any(line.startswith("unit ") and line.endswith("in INT8") for line in lines)
    assert lines[-2].startswith("Of the four, ")
    assert lines[-1].startswith("At 5.0")


def test_distillation_brings_the_student_back_to_its_teacher(tmp_path):
    """The script itself asserts that the teacher's logits are the same bits while the student's weights are in place.

    A teacher in either form takes back most of the divergence from it (0.7 when this was written) and lowers the loss
    that quantization has raised; labels alone move the student further away.
    """
    lines = said("08_distill.py", "--small", "--out", tmp_path, "--formats", "MXFP4")
    increase, divergence = {}, {}
    for line in lines:
        if line.startswith("MXFP4 "):
            way, figures = line[14:34].strip(), line[34:].replace("±", "").split()
            increase[way] = float(figures[1])
            divergence[way] = float(figures[-3 if "%" in line else -2])
    assert list(increase) == ["PTQ after the steps", "QAT", "PTQ", "QAD", "QAD, 16 logits"]
    for way in ("QAD", "QAD, 16 logits"):
        assert divergence[way] < 0.7 * divergence["PTQ"] < divergence["QAT"]
        assert increase[way] < increase["PTQ"]
    weights, tokens = 164_672, 40 * 16 * 32
    assert f"teacher, a frozen copy: {4 * weights:,} bytes, whatever it is asked" in lines
    cached = f"{tokens * 50:,} bytes for {tokens:,} tokens, {17 * 2 + 16} for each"
    assert f"teacher, 16 cached logits: {cached}" in lines
