"""The examples as notebooks with their outputs: what the site shows, and what tests/test_examples.py reads.

`python docs/notebooks.py 06_calibration` executes one at its small size, in a kernel of its own, into build/notebooks.
It is executed again only after a change of the example, of the package or of a library in `LIBRARIES`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES, OUT = ROOT / "examples", ROOT / "build" / "notebooks"
LIBRARIES = (
    *("torch", "triton", "numpy", "optree", "safetensors", "matplotlib", "transformers"),
    *("nvidia-modelopt", "compressed-tensors", "megatron-core"),
)
SECONDS = 300  # for a cell, on a busy machine
# Examples of several ranks: how many torchrun starts, and if one cell after the other can be one of them.
RANKS = {"03_megatron_moe": (2, False), "04_checkpoint_reshard": (4, True)}
EXECUTED = "*This page was executed by the site's build, with `--small`, on a CPU.*"
SHOWN = (
    "*Ranks are processes that `torchrun` starts, so its cells are not executed here; what it prints is at the end.*"
)


def path_of(name: str) -> Path:
    """Where the notebook of an example is kept."""
    return OUT / f"{name}.ipynb"


def is_current(name: str) -> bool:
    """True if the notebook was made of what lies here now."""
    path = path_of(name)
    return path.exists() and f'"made_of": "{_made_of(name)}"' in path.read_text()


def _made_of(name: str) -> str:
    """A hash of all that an example runs."""
    sources = [Path(__file__), EXAMPLES / f"{name}.py", EXAMPLES / "tiny_moe.py"]
    sources += sorted((ROOT / "fq_transforms").rglob("*.py"))
    found = hashlib.sha256(" ".join([sys.version, *map(_version, LIBRARIES)]).encode())
    for source in sources:
        found.update(source.read_bytes())
    return found.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def make(name: str) -> None:
    """Execute an example and write its notebook, unless that is current.

    Raises:
        CellExecutionError: A cell raised.
        CalledProcessError: Its ranks failed.
        ValueError: An output has a path of this machine.
    """
    if is_current(name):
        return
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbformat.v4 import new_markdown_cell

    os.environ.pop("TRITON_INTERPRET", None)  # of tests: it is for kernels, and examples run without
    made_of = _made_of(name)
    ranks, in_cells = RANKS.get(name, (1, True))
    book = jupytext.read(EXAMPLES / f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "EXAMPLE_OPTIONS": f"--small --out {folder}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }
        if in_cells:
            NotebookClient(
                book, kernel_name="python3", timeout=SECONDS, resources={"metadata": {"path": EXAMPLES}}
            ).execute()
        if ranks > 1:
            book.cells += _of_ranks(name, ranks, folder)
        book.cells.insert(1, new_markdown_cell(EXECUTED if in_cells else SHOWN))
        _tidy(book)
        places = [place for place in map(Path, (folder, ROOT, Path.home(), sys.prefix)) if len(place.parts) > 2]
        strange = [str(place) for place in places if str(place) in nbformat.writes(book)]
    if strange:
        raise ValueError(f"{name}: found {strange} in what it shows, wanted no path of this machine")
    book.metadata["made_of"] = made_of
    OUT.mkdir(parents=True, exist_ok=True)
    beside = path_of(name).with_suffix(".part")
    nbformat.write(book, beside)
    beside.replace(path_of(name))


def _of_ranks(name: str, ranks: int, folder: str) -> list[Any]:
    """Cells with what an example prints under torchrun."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command += [str(EXAMPLES / f"{name}.py"), "--small", "--out", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True)
    said = new_output("stream", name="stdout", text=done.stdout)
    called = f"!torchrun --nproc-per-node={ranks} examples/{name}.py --small"
    return [new_markdown_cell(f"## With {ranks} ranks"), new_code_cell(called, outputs=[said])]


def _tidy(book: Any) -> None:
    """Leave what cells print and show: no standard error, no time of execution, no number."""
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            kept = []
            for output in cell.outputs:
                if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
                    kept[-1].text += output.text  # printed in pieces
                elif output.get("name") != "stderr":
                    kept.append(output)
            cell.outputs = kept


def lines(name: str) -> list[str]:
    """What an example prints and shows as text, after `make`."""
    found = []
    for cell in json.loads(path_of(name).read_text())["cells"]:
        for output in cell.get("outputs", []):
            found += "".join(output.get("text") or output["data"]["text/plain"]).splitlines()
    return found


if __name__ == "__main__":
    make(sys.argv[1])
