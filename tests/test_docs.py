"""Every block of every page runs, in order, in one namespace for each page; or it is said where it is tested.

A page may have a comment `<!-- before` ... `-->` with Python that its readers do not see: names that it takes as given.
Recipes have none, since a reader has nothing but the page. A block that cannot run in one process on a CPU has the
comment `<!-- tested by tests/file.py::name -->` above it, and the test must exist.
"""

import importlib.util
import os
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch

from fq_transforms.cli import DIFFERENT, main
from tests.export.models import write

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"<!-- tested by (?P<test>\S+) -->\n+ *```python\n.*?\n *```$|<!-- before\n(?P<before>.*?)-->"
    r"|^(?P<indent> *)```python\n(?P<shown>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
MODEL = {
    f"model.layers.0.mlp.experts.{expert}.{role}_proj.weight": torch.randn(128, 128).bfloat16()
    for expert in range(2)
    for role in ("gate", "up", "down")
} | {"lm_head.weight": torch.randn(128, 128).bfloat16()}

WITH_COMMANDS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# How other commands than `fqt` begin: the file that runs them, and what is in it.
RUN_BY = {
    "python -m vllm": (".ci/engines", "fqt quantize Qwen3/,/^```$/p' README.md"),
    "curl": (".ci/engines", "fqt quantize Qwen3/,/^```$/p' README.md"),
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[examples]'": (
        "tests/test_examples.py",
        "01_quickstart.py",
    ),
    "python3 -m venv": (".ci/run", "/<!-- the test command -->/"),
    ".venv/bin/python -m pytest": (".ci/run", "/<!-- the test command -->/"),
    ".venv/bin/pip install -q -e '.[test,docs]'": (".ci/run", "mkdocs build"),
    ".venv/bin/pip install": (".ci/wheel", 'pip" install'),
    ".venv/bin/python -c": (".ci/wheel", "smoke.py"),
    "pip install build": (".ci/wheel", "-m build"),
    ".venv/bin/torchrun --nproc-per-node=2 examples/03": ("tests/test_examples.py", '"03_megatron_moe.py"'),
    ".venv/bin/torchrun --nproc-per-node=4 examples/04": ("tests/test_examples.py", '"04_checkpoint_reshard"'),
}


def blocks_of(page):
    """What runs, with the line of the page where it begins, so that errors name it; and the tests of what does not."""
    text = page.read_text()
    code, tests = [], []
    for match in BLOCK.finditer(text):
        if match["test"]:
            tests.append(match["test"])
            continue
        part = "shown" if match["before"] is None else "before"
        lines = text.count("\n", 0, match.start(part))
        indent = match["indent"] or ""
        code.append("\n" * lines + re.sub(f"^{indent}", "", match[part], flags=re.MULTILINE))
    assert len(code) + len(tests) - text.count("<!-- before") == len(re.findall(r"^ *```python", text, re.MULTILINE))
    return code, tests


def path_of(page):
    return page.relative_to(ROOT).as_posix()


def page_name(page):
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun gives the only rank of a run, for pages that make a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:::(transformers|accelerate|peft|torch)[.]")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)[0]], ids=page_name)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, one_rank):
    """A block that raises, or a name that no block has made, fails here."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model", MODEL, {"config.json": CONFIG})  # what pages about folders begin with
    names = {"__name__": page.stem}
    for code in blocks_of(page)[0]:
        exec(compile(code, os.fspath(page.relative_to(ROOT)), "exec"), names)


@pytest.mark.filterwarnings("ignore:inputs readers of this layout quantize")
@pytest.mark.parametrize("page", [p for p in WITH_COMMANDS if COMMANDS.search(p.read_text())], ids=path_of)
def test_every_command_of_a_page_runs(page, tmp_path, monkeypatch, capfd):
    """`fqt` here, in order, on a small folder of the name that the page gives; others where `RUN_BY` says."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen3-30B-A3B", "DeepSeek-R1"):
        write(tmp_path / name, MODEL, {"config.json": CONFIG})
    for line in "".join(COMMANDS.findall(page.read_text())).splitlines():
        command = line.partition(" #")[0].strip()
        program, _, arguments = command.partition(" -m fq_transforms ")  # of several ranks one
        if not arguments:
            program, _, arguments = command.partition("fqt ")
        if program in ("", ".venv/bin/") or program.startswith("torchrun"):
            code = main(shlex.split(arguments))
            assert code == (DIFFERENT if arguments.startswith("compare") else 0), (command, capfd.readouterr().err)
            continue
        path, content = next((RUN_BY[begin] for begin in RUN_BY if command.startswith(begin)), (None, None))
        assert path is not None, command
        assert content in (ROOT / path).read_text(), command


def test_what_does_not_run_is_tested_where_the_page_says():
    """A comment that names no test is a block that nobody runs."""
    for page in PAGES:
        for test in blocks_of(page)[1]:
            path, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{page}: {test}"


def test_pages_of_data_are_as_the_data_is():
    """Formats, pictures of their values, and figures of the benchmark: `python docs/made.py` writes them anew."""
    found = importlib.util.spec_from_file_location("made", ROOT / "docs/made.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    for name, content in made.made().items():
        assert (ROOT / "docs" / name).read_text() == content, name


def test_recipes_need_nothing_but_their_page():
    """Set-up that readers do not see is for pages that explain, not for those that are followed."""
    for page in (ROOT / "docs/recipes").glob("*.md"):
        assert "<!-- before" not in page.read_text(), page
