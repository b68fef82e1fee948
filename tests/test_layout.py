"""The architecture, read from the source: imports run downward between packages, and each engine has one importer.

A new operation is a folder in ops/, a new engine a file in its package. Neither needs a line here.
"""

import ast
import pkgutil
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import fq_transforms as fqt

PACKAGE = Path(fqt.__file__).parent
NAME = PACKAGE.name

# Packages and top-level modules, lowest first. One imports from its own line or from lines above it.
LAYERS = [
    "parse tables formats methods rounding rules spec presets",  # numbers, statics, rules: nothing computes
    "ops",  # on plain tensors
    "distributed partition dtensor checks in_use masters select state",  # shards, ranks, what the public door checks
    "fakequant pullback pack activations calibrate gptq sequential sync report",  # one verb each
    "transform",
    "training checkpoint export search",
    "__init__",
    "integrations",
    "bench cli",
    "__main__",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

# What any module may import. Everything else is an engine.
FOUNDATION = {"torch", "jaxtyping", "numpy", "tqdm"}
# Kernels are written in Triton, one file for each operation.
TRITON_FILES = {"kernel", "device", "private"}
OPERATION_FILES = {"__init__", "reference", "kernel", "launch", "autograd"}
MOST_PUBLIC_NAMES = 38
MOST_LINES = 25


def without_type_checking(tree):
    """The tree without `if TYPE_CHECKING:`, which is never run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


MODULES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): without_type_checking(
        ast.parse(path.read_text())
    )
    for path in PACKAGE.rglob("*.py")
}


def imported(tree):
    """Names of imported modules, those inside functions too; `from package import module` counts as package.module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in full)


IMPORTS = {module: set(imported(tree)) for module, tree in MODULES.items()}


def top(module):
    """The package or top-level module that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_package_has_its_layer():
    """A new package or top-level module is given a place in LAYERS before anything else; none is left behind."""
    assert {top(module) for module in MODULES} <= LEVEL.keys()
    assert LEVEL.keys() <= {top(module) for module in MODULES}


def test_imports_run_downward():
    """A module imports only from its own layer or from those below."""
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        if name.split(".")[0] == NAME and LEVEL[top(name)] > LEVEL[top(module)]
    ]
    assert not wrong


def test_rooms_of_exports():
    """A room imports from itself and from those below, never from a door; a new room is given its place here."""
    rooms = ["files", "names", "layouts", "streaming"]
    room = {module: (*module.split("."), "")[2] for module in MODULES if top(module) == "export"}
    assert {room[module] for module in room if module.count(".") > 2} == set(rooms)
    level = {module: rooms.index(name) if name in rooms else len(rooms) for module, name in room.items()}
    wrong = [f"{m} imports {n}" for m in level for n in IMPORTS[m] & level.keys() if level[n] > level[m]]
    assert not wrong


def circles(graph):
    """Strongly connected components of more than one node, and nodes that point at themselves (Tarjan 1972)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1 or node in graph[node]:
                found.append(sorted(part))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_no_import_circle():
    """Between any two modules, imports inside functions included."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]
    assert circles({module: names & MODULES.keys() for module, names in IMPORTS.items()}) == []


def test_one_importer_an_engine():
    """A package has one file for each engine that it speaks to; Triton is for kernels. The benchmark speaks to all."""
    importers = defaultdict(lambda: defaultdict(set))
    for module, names in IMPORTS.items():
        for engine in {name.split(".")[0] for name in names} - FOUNDATION - {NAME} - sys.stdlib_module_names:
            importers[engine][top(module)].add(module)
    assert {"triton", "optree", "megatron", "safetensors"} <= importers.keys()
    for engine, packages in importers.items():
        packages.pop("bench", None)
        if engine == "triton":
            assert packages.keys() == {"ops"}
            assert {module.rpartition(".")[2] for module in packages.pop("ops")} <= TRITON_FILES
        assert all(len(modules) == 1 for modules in packages.values()), (engine, dict(packages))


def test_one_file_knows_dtensor():
    """`dtensor.py` alone imports torch.distributed.tensor; the benchmark makes DTensors as a user does."""
    importers = {m for m, names in IMPORTS.items() if any(n.startswith("torch.distributed.tensor") for n in names)}
    assert {module for module in importers if top(module) != "bench"} == {f"{NAME}.dtensor"}


def test_an_operation_is_a_folder_of_the_same_files():
    """What a folder has no use for it lacks, but for the reference, which is the definition."""
    folders = defaultdict(set)
    for path in PACKAGE.glob("ops/*/*.py"):
        folders[path.parent.name].add(path.stem)
    for operation, files in folders.items():
        assert {"reference"} <= files <= OPERATION_FILES, operation


def documented():
    """(module, name or None, docstring) of modules, classes and functions."""
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield module, getattr(node, "name", None), text


def test_names_in_docstrings_are_there():
    """What a docstring refers to by its whole name, or as a page, can be found there after a file has moved too."""
    for module, _, text in documented():
        for name in re.findall(rf"`({NAME}(?:\.\w+)+)", text):
            assert pkgutil.resolve_name(name), module  # raises AttributeError where there is nothing
        for page in re.findall(r"\bdocs/([\w-]+)", text):
            assert (PACKAGE.parent / "docs" / f"{page}.md").exists(), (module, page)


def test_docstrings_are_short():
    """Of classes and functions. A longer why is a page of the docs; empty lines are not counted."""
    lengths = {
        f"{module}: {name}": sum(bool(line.strip()) for line in text.splitlines())
        for module, name, text in documented()
        if name
    }
    assert {where: length for where, length in lengths.items() if length > MOST_LINES} == {}


def test_no_two_classes_have_one_name():
    """A search for the name of a class finds what it means; private ones belong to their file."""
    classes = [node for tree in MODULES.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    counts = Counter(node.name for node in classes if not node.name.startswith("_"))
    assert [name for name, count in counts.items() if count > 1] == []


def by_kind(name):
    """Constants, classes, functions; numbers in names by their size."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("module", ["", ".checkpoint", ".export", ".integrations", ".state", ".methods"])
def test_public_names_exist_and_are_sorted(module):
    """`__all__` is what a module offers, in order; the package offers about thirty names."""
    offered = pkgutil.resolve_name(f"{NAME}{module}")
    names = getattr(offered, "__all__", [])
    assert all(hasattr(offered, name) for name in names)
    assert names == sorted(set(names), key=by_kind)
    assert len(names) <= MOST_PUBLIC_NAMES


def test_the_package_shows_its_public_names_only():
    """What a notebook completes; names of modules inside are still found."""
    assert dir(fqt) == sorted(fqt.__all__)
    assert fqt.parse.nearest("a", ["b"]) == ["b"]
