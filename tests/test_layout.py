"""The architecture, read from the imports: they run downward only, and each engine has one importer."""

import ast
import pathlib
import pkgutil
import re

import pytest

import fq_transforms

PACKAGE = pathlib.Path(fq_transforms.__file__).parent

# Lowest first. A module imports from lines above its own.
LAYERS = [
    ["formats", "known", "rounding"],
    ["methods"],
    ["sharding", "training.slots"],
    ["spec"],
    ["weights"],
    ["select"],
    ["ops.shards"],
    ["presets", "state"],
    ["ops.reference"],
    ["ops.lsq_reference", "ops.packing", "ops.percentile", "ops.reporting", "ops.stochastic_reference", "ops.sweep"],
    ["ops.matrices"],
    ["ops.plans"],
    ["ops.kernels"],
    [
        "ops.lsq_kernel",
        "ops.pack_kernel",
        "ops.percentile_kernel",
        "ops.report_kernel",
        "ops.stochastic_kernel",
        "ops.sweep_kernel",
    ],
    ["ops.calls"],
    ["ops.relaunch"],
    ["ops.launch"],
    ["ops.lsq_launch", "ops.percentile_launch", "ops.stochastic_launch", "ops.sweep_launch"],
    ["ops.autograd", "ops.search"],
    ["choose", "inputs.products", "ops.lsq", "ops.stochastic"],
    ["inputs.observe"],
    ["inputs.mean_squares", "inputs.quantize"],
    ["calibrate", "fakequant", "inputs.sync", "inputs.unseen", "pack", "report_plot", "sync", "training.lend"],
    ["inputs.apply", "report", "training.main_grad"],
    ["training.layerwise", "transform"],
    ["training.kept"],
    ["training.value_and_grad"],
    ["interleave"],
    ["checkpoint.contents", "checkpoint.torch_dist", "checkpoint.trees", "checkpoint.modelopt_names"],
    ["checkpoint.staging"],
    ["checkpoint.described", "checkpoint.megatron_shards", "checkpoint.storage"],
    ["checkpoint.megatron_format"],
    ["checkpoint.dcp", "checkpoint.file", "checkpoint.megatron", "checkpoint.modelopt"],
    ["checkpoint.__init__"],
    ["export.names", "export.files"],
    ["export.ties"],
    ["export.plan"],
    ["export.compressed", "export.modelopt"],
    ["export.__init__"],
    ["__init__", "inputs.__init__", "ops.__init__", "training.__init__"],
    ["integrations.__init__", "integrations.te"],
    ["integrations.megatron"],
    ["bench.timing", "bench.cases", "bench.report", "bench.peers", "bench.models"],
    ["bench.full_size", "bench.mse", "bench.packing", "bench.step", "bench.sweep"],
    ["bench.__init__", "bench.__main__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
ONLY_IMPORTER = {
    "triton": {
        "bench.__main__",
        "ops.kernels",
        "ops.lsq_kernel",
        "ops.pack_kernel",
        "ops.percentile_kernel",
        "ops.report_kernel",
        "ops.stochastic_kernel",
        "ops.sweep_kernel",
    },
    "optree": {"state"},
    "modelopt": {"bench.peers"},
    "megatron": {"checkpoint.megatron", "integrations.megatron", "bench.models"},
    "transformer_engine": {"integrations.te", "bench.models"},
    "safetensors": {"checkpoint.file", "export.files"},
    "compressed_tensors": {"export.compressed"},
}

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
}


def imports(tree):
    """Names of imported modules, those inside functions too; `from package import x` counts as package.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_layer():
    """A new file is given a place in LAYERS before anything else."""
    assert MODULES.keys() == LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    """A module imports only from layers below its own."""
    for name in imports(MODULES[module]):
        if name.startswith("fq_transforms."):
            inside = name.removeprefix("fq_transforms.")
            packages = {m: m.removesuffix(".__init__") for m in LEVEL}
            fits = [m for m, name in packages.items() if inside == name or inside.startswith(f"{name}.")]
            target = max(fits, key=lambda m: len(packages[m]), default="__init__")
            assert LEVEL[target] < LEVEL[module], f"{module} imports {name}"


@pytest.mark.parametrize(("engine", "importer"), ONLY_IMPORTER.items())
def test_one_importer_an_engine(engine, importer):
    """Only one module knows each engine; the benchmark asks Triton for its version."""
    found = {module for module, tree in MODULES.items() if any(n.split(".")[0] == engine for n in imports(tree))}
    assert found == importer


@pytest.mark.parametrize("module", MODULES)
def test_names_in_docstrings_are_there(module):
    """What a docstring refers to by its whole name can be found under it, after a file has moved too."""
    nodes = [node for node in ast.walk(MODULES[module]) if isinstance(node, DOCUMENTED)]
    texts = [text for node in nodes if (text := ast.get_docstring(node))]
    for name in re.findall(r"`(fq_transforms(?:\.\w+)+)", "\n".join(texts)):
        assert pkgutil.resolve_name(name)  # raises AttributeError where there is nothing


def test_public_names_exist_and_are_sorted():
    """`__all__` is what the package offers, in order."""
    assert all(hasattr(fq_transforms, name) for name in fq_transforms.__all__)
    assert len(set(fq_transforms.__all__)) == len(fq_transforms.__all__)
