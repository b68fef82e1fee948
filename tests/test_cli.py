"""The command line: options are the function's, an error is one message, exit codes are those of docs/command-line."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms import cli, export, presets
from fq_transforms.export.streaming import job as jobs
from fq_transforms.methods import MAX, FourOverSix, Mse
from tests.export.models import EXPERTS, build, read

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
EXPERT_RULES = {"*.experts.*": fqt.NVFP4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model on a disk, in several shards, with a file of another kind."""
    path = tmp_path_factory.mktemp("models") / "src"
    build(**SMALL)[0].save_pretrained(path, max_shard_size="60KB")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def given(source, tmp_path_factory):
    """What options name: rules, a trained state, calibrated inputs, and a folder in codes."""
    path = tmp_path_factory.mktemp("given")
    rules = [fqt.Rule("*.experts.*", fqt.INT4_BLOCK32), fqt.Rule("*.down_proj.*")]
    (path / "rules.yaml").write_text(fqt.rules.to_yaml(rules[:1]))
    (path / "rules.json").write_text(fqt.rules.to_json(rules[:1]))
    params = read(source)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.FP8}))
    state = {key: {"amax": torch.full_like(leaf["amax"], 0.01)} for key, leaf in fq.calibrate(params).items()}
    fqt.checkpoint.save_file(path / "state.safetensors", fq, state)
    spec = fqt.select(params, presets.FP8_EXPERTS_ONLY_CFG)
    inputs = {
        one.key: {"amax": torch.full((1,), 3.0), "tokens": torch.ones(EXPERTS, dtype=torch.float64)}
        for one in spec.inputs
    }
    weights = fqt.transform(fqt.Spec(spec.groups)).calibrate(params)
    fqt.checkpoint.save_file(path / "inputs.safetensors", fqt.transform(spec), weights | inputs)
    export.folder(source, path / "fp8", {"*.experts.*": fqt.FP8}, jobs=1)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def contents(path):
    """Every file, byte by byte."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


CASES = [
    (["--preset", "NVFP4_EXPERTS_ONLY"], {"rules": EXPERT_RULES}),
    (["--preset", "NVFP4_EXPERTS_ONLY_CFG", "--reader", "vllm"], {"rules": EXPERT_RULES, "reader": "vllm"}),
    (["--preset", "FP8_DEFAULT"], {"rules": presets.weights_only(presets.FP8_DEFAULT_CFG)}),
    (
        ["--preset", "FP8_EXPERTS_ONLY", "--inputs", "inputs.safetensors"],
        {"rules": presets.FP8_EXPERTS_ONLY_CFG, "inputs": "inputs.safetensors"},
    ),
    (["--rules", "rules.yaml"], {"rules": {"*.experts.*": fqt.INT4_BLOCK32}}),
    (["--rules", "rules.json", "--jobs", "1"], {"rules": {"*.experts.*": fqt.INT4_BLOCK32}}),
    (["--state", "state.safetensors", "--device", "cpu"], {"state": "state.safetensors"}),
    (["--preset", "NVFP4_EXPERTS_ONLY", "--layout", "modelopt"], {"rules": EXPERT_RULES, "layout": "modelopt"}),
    (["--preset", "NVFP4_EXPERTS_ONLY", "--target", "plain"], {"rules": EXPERT_RULES, "layout": "plain"}),
    (
        ["--preset", "NVFP4_EXPERTS_ONLY", "--method", "four-over-six"],
        {"rules": {"*.experts.*": fqt.NVFP4_STATIC}, "method": FourOverSix()},
    ),
    (
        ["--rules", "rules.yaml", "--max-shard-size", "50KB", "--resume"],
        {"rules": {"*.experts.*": fqt.INT4_BLOCK32}, "max_shard_size": "50KB"},
    ),
]


@pytest.mark.parametrize(("options", "arguments"), CASES, ids=[" ".join(options) for options, _ in CASES])
def test_the_folder_is_that_of_the_function(options, arguments, source, given, tmp_path, monkeypatch, capsys):
    """Byte for byte, and the table that is printed is that of its Conversion."""
    monkeypatch.chdir(given)
    assert run("quantize", source, tmp_path / "cli", *options) == 0
    wanted = export.folder(source, tmp_path / "function", **arguments)
    assert contents(tmp_path / "cli") == contents(tmp_path / "function")
    assert capsys.readouterr().out == f"{wanted}\n"


def test_a_folder_in_codes_becomes_plain_without_rules(given, tmp_path):
    """As the function makes it."""
    assert run("quantize", given / "fp8", tmp_path / "cli", "--layout", "plain") == 0
    export.folder(given / "fp8", tmp_path / "function", layout="plain")
    assert contents(tmp_path / "cli") == contents(tmp_path / "function")


# Of each parameter what a user says, and what reaches the function.
OPTIONS = {
    "rules": (["--preset", "MXFP8_DEFAULT"], presets.weights_only(presets.MXFP8_DEFAULT_CFG)),
    "layout": (["--target", "modelopt"], "modelopt"),
    "reader": (["--reader", "vllm"], "vllm"),
    "method": (["--method", "mse"], Mse()),
    "state": (["--state", "s"], "s"),
    "inputs": (["--inputs", "i"], "i"),
    "experts": (["--experts", "a", "--experts", "b"], ["a", "b"]),
    "transposed": (
        ["--transposed", "a", "--transposed", "b=false", "--transposed", "c=true"],
        {"a": True, "b": False, "c": True},
    ),
    "device": (["--device", "cuda:1"], "cuda:1"),
    "max_shard_size": (["--max-shard-size", "7MB"], "7MB"),
    "jobs": (["--jobs", "3"], 3),
    "resume": (["--resume"], True),
    "dry_run": (["--dry-run"], True),
}


@pytest.mark.parametrize(("command", "function"), [("quantize", "folder"), ("report", "report")])
def test_each_parameter_has_an_option(command, function, monkeypatch):
    """And without an option each has the function's own default."""
    called = {}
    parameters = inspect.signature(getattr(export, function)).parameters
    defaults = {name: one.default for name, one in parameters.items() if name not in ("src", "dst")}
    assert defaults.keys() <= OPTIONS.keys()

    def record(*paths, **arguments):
        called.clear()
        called.update(arguments, paths=paths)
        return type("Table", (), {"spec": "spec"})()

    monkeypatch.setattr(export, function, record)
    paths = ["a", "b"][: 2 if function == "folder" else 1]
    assert run(command, *paths, "--state", "s") == 0
    assert called.pop("paths") == tuple(paths)
    found = {name: tuple(v) if name in ("experts", "transposed") else v for name, v in called.items()}
    assert found == defaults | {"state": "s"}
    for name in defaults:
        options, wanted = OPTIONS[name]
        rules = [] if name in ("rules", "state") else ["--preset", "NVFP4_EXPERTS_ONLY"]
        assert run(command, *paths, *rules, *options) == 0
        assert called[name] == wanted, name


def test_a_method_takes_dynamic_formats_as_static_ones(monkeypatch):
    """Of presets all that it can; other formats, and all under max, stay as they are."""
    called = {}
    monkeypatch.setattr(export, "folder", lambda *_, **arguments: called.update(arguments))
    formats = {}
    for method in ("max", "mse", "four-over-six"):
        for name in cli.PRESETS:
            assert run("quantize", "a", "b", "--preset", name, "--method", method) == 0
            formats[method, name] = {rule.weights.name for rule in fqt.rules.as_rules(called["rules"]) if rule.weights}
    for name in cli.PRESETS:
        assert formats["mse", name] == formats["four-over-six", name]
        wanted = {"NVFP4": "NVFP4_STATIC"}
        assert formats["mse", name] == {wanted.get(one, one) for one in formats["max", name]}
    assert formats["max", "NVFP4_DEFAULT"] == {"NVFP4"}


def test_every_preset_has_its_name():
    """With and without the ending."""
    names = {name for name in vars(presets) if name.endswith("_CFG")}
    assert {f"{name}_CFG" for name in cli.PRESETS} == names
    assert all(cli._preset(name) == cli._preset(name.removesuffix("_CFG")) for name in names)


REFUSED = {
    "no command": ([], ["COMMAND"]),
    "unknown command": (["quantise", "src", "dst"], ["quantise", "quantize"]),
    "unknown option": (["inspect", "src", "--jsn"], ["--jsn"]),
    "abbreviated option": (["inspect", "src", "--js"], ["--js"]),
    "no DST": (["quantize", "src", "--preset", "FP8_DEFAULT"], ["DST"]),
    "nothing to quantize": (["quantize", "src", "dst"], ["--preset", "--rules", "--state", "--layout plain"]),
    "two sources of rules": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--state", "x"], ["not allowed"]),
    "unknown preset": (["quantize", "src", "dst", "--preset", "NVFP4_EXPERT_ONLY"], ["NVFP4_EXPERTS_ONLY"]),
    "unknown layout": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--layout", "modlopt"], ["'modelopt'"]),
    "unknown reader": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--reader", "vlm"], ["'vllm'"]),
    "unknown method": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--method", "mean"], ["mse"]),
    "unknown device": (["report", "src", "--preset", "FP8_DEFAULT", "--device", "gpu"], ["'gpu'", "cpu"]),
    "jobs": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--jobs", "0"], ["jobs", "0"]),
    "jobs of text": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--jobs", "all"], ["--jobs", "all"]),
    "size": (["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--max-shard-size", "5 GBs"], ["5 GBs"]),
    "size beyond all numbers": (
        ["quantize", "src", "dst", "--preset", "FP8_DEFAULT", "--max-shard-size", "9" * 400],
        ["max_shard_size", "wanted a number of bytes"],
    ),
    "orientation": (["report", "src", "--preset", "FP8_DEFAULT", "--transposed", "a=no"], ["a=no", "false"]),
    "pattern of nothing": (["report", "src", "--preset", "FP8_DEFAULT", "--transposed", "*.gaet"], ["*.gaet"]),
    "method without amax": (["report", "src", "--preset", "MXFP4_EXPERTS_ONLY", "--method", "mse"], ["MXFP4"]),
    "method and state": (["report", "src", "--state", "state.safetensors", "--method", "mse"], ["method", "state"]),
    "experts and state": (["report", "src", "--state", "state.safetensors", "--experts", "x"], ["experts", "state"]),
    "inputs of nothing": (["report", "src", "--rules", "rules.json", "--inputs", "inputs.safetensors"], ["inputs"]),
    "inputs of plain weights": (
        ["report", "src", "--preset", "FP8_EXPERTS_ONLY", "--inputs", "inputs.safetensors", "--layout", "plain"],
        ["leave out inputs= (--inputs)", "fqt.presets.weights_only(rules)"],
    ),
    "rules of nothing": (["quantize", "src", "dst", "--rules", "none.json"], ["none.json", "no rules"]),
    "no file": (["quantize", "src", "dst", "--rules", "absent.yaml"], ["absent.yaml", "No such file"]),
    "rules of another kind": (["quantize", "src", "dst", "--rules", "rules.txt"], ["rules.txt", ".yaml"]),
    "rules that are none": (["quantize", "src", "dst", "--rules", "bad.yaml"], ["bad.yaml", "NVFP4"]),
    "rules of bytes": (["quantize", "src", "dst", "--rules", "bytes.json"], ["bytes.json"]),
    "no SRC": (["quantize", "absent", "dst", "--preset", "FP8_DEFAULT"], ["absent", "found nothing"]),
    "no folder of a model": (["inspect", "."], ["model.safetensors"]),
    "one folder to compare": (["compare", "src", "absent"], ["absent"]),
    "DST is taken, dry": (["quantize", "src", "taken", "--preset", "FP8_DEFAULT", "--dry-run"], ["taken", "file"]),
    "DST is taken": (["quantize", "src", "taken", "--preset", "FP8_DEFAULT"], ["taken", "file"]),
    "no place for a page": (["report", "src", "--preset", "FP8_DEFAULT", "--html", "no/a.html"], ["--html", "no"]),
    "a folder for a plot": (["report", "src", "--preset", "FP8_DEFAULT", "--png", "taken"], ["--png", "taken"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_message(case, source, given, tmp_path, monkeypatch, capsys):
    """On standard error, of exit code 2, without a traceback; nothing is on standard output, and nothing is written."""
    for name in ("rules.json", "state.safetensors", "inputs.safetensors"):
        shutil.copy(given / name, tmp_path)
    os.symlink(source, tmp_path / "src")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "rules.txt").write_text("[]")
    (tmp_path / "bad.yaml").write_text("- {pattern: '*', weights: NVFP}")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    arguments, words = REFUSED[case]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("fqt: error: "), err.count("\n")) == ("", True, 1), err
    assert all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("no such group"), "no such group"),
        (ImportError("needs tqdm"), "needs tqdm"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (OSError("odd"), "odd"),
    ],
)
def test_errors_read_as_text(error, said, monkeypatch, capsys):
    """Not as Python shows them: a KeyError in quotes, an OSError with its number."""

    def fail(_):
        raise error

    monkeypatch.setattr(export, "inspect", fail)
    assert run("inspect", "a") == 2
    assert capsys.readouterr().err == f"fqt: error: {said}\n"


def test_a_fault_of_ours_is_no_difference(monkeypatch, capsys):
    """It has its traceback, and a code that scripts cannot take for that of compare."""
    monkeypatch.setattr(export, "compare", lambda a, b: 1 // 0)
    assert run("compare", "a", "b") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    """It prints the spec and the table that the run itself prints, and makes no file beside DST either."""
    options = ["quantize", source, tmp_path / "dst", "--preset", "NVFP4_EXPERTS_ONLY"]
    before = contents(source)
    assert run(*options, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    dry = capsys.readouterr()
    assert run(*options) == 0
    table = capsys.readouterr().out
    assert dry.out.endswith(table)
    assert dry.out.startswith("quantized ")
    assert "excluded by *lm_head*" in dry.out
    assert contents(source) == before
    assert sum(len(file) for file in contents(tmp_path / "dst").values()) > 0


def test_warnings_are_lines(monkeypatch, capsys):
    """One line each, however it was written, with where it comes from left out."""

    def warn(_):
        warnings.warn("several\n  lines", stacklevel=1)
        return "table"

    monkeypatch.setattr(export, "inspect", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown = warnings.showwarning
        assert run("inspect", "a") == 0
        assert warnings.showwarning is shown
    assert tuple(capsys.readouterr()) == ("table\n", "fqt: warning: several lines\n")


@pytest.mark.parametrize("number", [0, 2, 5])
def test_interrupted_it_says_how_to_go_on(number, source, tmp_path, monkeypatch, capsys):
    """Ctrl-C between two pieces: exit code 130, no DST, and --resume makes the bytes of one run."""
    job = jobs.Job
    monkeypatch.setattr(jobs, "PIECE_BYTES", 1)
    options = ["--preset", "NVFP4_EXPERTS_ONLY", "--jobs", "1"]
    convert, count = job.convert, iter(range(1000))

    def interrupted(self, piece, writer):
        if next(count) == number:
            signal.raise_signal(signal.SIGINT)
        convert(self, piece, writer)

    def in_main_thread(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "convert", interrupted)
    previous = signal.signal(signal.SIGINT, in_main_thread)
    try:
        assert run("quantize", source, tmp_path / "dst", *options) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err.endswith("fqt: interrupted; the same command with --resume goes on\n")
    assert not (tmp_path / "dst").exists()
    monkeypatch.setattr(job, "convert", convert)
    assert run("quantize", source, tmp_path / "dst", *options, "--resume") == 0
    assert run("quantize", source, tmp_path / "whole", *options) == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def test_what_has_nothing_to_resume_does_not_say_so(monkeypatch, capsys):
    """compare, and a dry run."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for function in ("compare", "folder"):
        monkeypatch.setattr(export, function, interrupt)
    for arguments in (["compare", "a", "b"], ["quantize", "a", "b", "--layout", "plain", "--dry-run"]):
        assert run(*arguments) == 130
        assert capsys.readouterr().err == "fqt: interrupted\n"


def test_the_first_rank_prints(source, monkeypatch, capsys):
    """Others print nothing, but their errors, with their number."""
    wanted = str(export.inspect(source))
    for rank, out in (("0", f"{wanted}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run("inspect", source) == 0
        assert capsys.readouterr().out == out
        assert run("inspect", "absent") == 2
        assert capsys.readouterr().err.startswith(f"fqt: rank {rank}: error: ")


def test_compare_is_like_diff(source, given, capsys):
    """0 for no difference, 1 for some, and the table of the function."""
    assert run("compare", source, source) == 0
    assert run("compare", source, given / "fp8") == 1
    found = [str(export.compare(source, b)) for b in (source, given / "fp8")]
    assert capsys.readouterr().out == "\n".join([*found, ""])


def test_inspect_is_for_programs_too(given, capsys):
    """The same numbers as JSON."""
    assert run("inspect", given / "fp8") == 0
    found = export.inspect(given / "fp8")
    assert capsys.readouterr().out == f"{found}\n"
    assert run("inspect", given / "fp8", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))


def test_report_writes_its_page_and_its_plot(source, tmp_path, capsys):
    """The table is the function's; the page has it, the plot is a PNG whatever its name."""
    page, plot = tmp_path / "a.html", tmp_path / "a.plot"
    assert run("report", source, "--preset", "FP8_EXPERTS_ONLY", "--html", page, "--png", plot) == 0
    found = export.report(source, presets.weights_only(presets.FP8_EXPERTS_ONLY_CFG), method=MAX)
    assert capsys.readouterr().out == f"{found}\n"
    assert found._repr_html_() in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def program(*arguments):
    """Both ways to call it: as the console script's entry point does, and as a module."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == {"fqt": "fq_transforms.cli:main"}
    module, name = script["fqt"].split(":")
    code = f"import sys; from {module} import {name}; sys.exit({name}())"
    commands = [[sys.executable, *how, *map(str, arguments)] for how in (["-c", code], ["-m", "fq_transforms"])]
    return [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]


@pytest.mark.dist
def test_both_names_are_one_program(source):
    """The same output, and the exit code is that of `main`."""
    found = [
        (*process.communicate(timeout=100), process.returncode) for process in program("compare", source, "absent")
    ]
    assert found[0] == found[1]
    assert found[0][::2] == ("", 2)
    assert found[0][1].startswith("fqt: error: ")


@pytest.mark.dist
def test_a_reader_that_has_read_enough_is_no_error(source):
    """`fqt inspect SRC | head -0`: no traceback, and no message."""
    command = [sys.executable, "-m", "fq_transforms", "inspect", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(100)) == ("", 141)


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    """Every command of docs/command-line.md, in order, on small models of the names that it uses."""
    monkeypatch.chdir(tmp_path)
    build(**SMALL)[0].save_pretrained("Qwen3-30B-A3B")
    build("deepseek_v3", num_hidden_layers=2)[0].save_pretrained("DeepSeek-R1")
    text = (ROOT / "docs" / "command-line.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        command = re.sub(r"^torchrun .* -m fq_transforms", "fqt", line)
        name, *arguments = shlex.split(command)
        assert name == "fqt"
        assert run(*arguments) == (1 if arguments[0] == "compare" else 0), capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        "Qwen3-30B-A3B",
        "DeepSeek-R1",
        "out",
        "R1-NVFP4",
        "loss.html",
    }
    options = {word for line in text.splitlines() for word in re.findall(r"(?<!-)--[a-z][a-z-]*", line)} - {
        "--nproc-per-node"
    }
    for command in ("quantize", "inspect", "report", "compare"):
        assert run(command, "--help") == 0
    told = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options == told - {"--help"}
