"""What every test stands on: Triton's interpreter without a GPU, and memory full of NaN."""

import os
from pathlib import Path

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

import pytest

from tests.books import books  # noqa: F401 (a fixture)
from tests.ranks import ranks  # noqa: F401 (a fixture)

torch.set_num_threads(1)  # the tensors are tiny, and threads that wait for each other are slower than one

collect_ignore = ["engines"]  # run by `.ci/engines`, in the environments of the engines

NEEDS = {None: 0, "gpu": 1, "gpu2": 2}  # GPUs, by marker
PACKAGE = Path(__file__).parent.parent / "fq_transforms"
# Of operations not the kernels and launchers: Triton reads the source of its functions, PyTorch their signatures.
CHECKED = ["calibrate", "checks", "fakequant", "pack", "rounding", "select", "spec", "state", "sync", "transform"]
CHECKED += [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted(PACKAGE.glob("ops/*/*.py"))
    if not path.stem.endswith(("kernel", "launch", "__init__"))
]


def pytest_addoption(parser):
    parser.addoption("--shape-checks", action="store_true", help="check annotated shapes and types at every call")


def pytest_configure(config):
    if config.getoption("--shape-checks"):
        from jaxtyping import install_import_hook

        install_import_hook([f"fq_transforms.{module}" for module in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """torch.empty comes filled with NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Without GPUs, each test that needs them is skipped once, not in every case: they are a fifth of all."""
    gpus = torch.cuda.device_count()
    kept, left_out, skipped = [], [], set()
    for item in items:
        wanted = max(number for marker, number in NEEDS.items() if marker is None or item.get_closest_marker(marker))
        if wanted <= gpus:
            kept.append(item)
            continue
        item.add_marker(pytest.mark.skip(reason=f"needs {wanted} CUDA GPU(s), found {gpus}"))
        test = item.nodeid.partition("[")[0]
        (left_out if test in skipped else kept).append(item)
        skipped.add(test)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
