"""The annotations are true: the tests pass with every annotated shape and type checked at every call."""

import inspect
import pathlib
import subprocess
import sys

import pytest

import fq_transforms as fqt

TESTS = pathlib.Path(__file__).parent
# What differs from another format, in one number, which no annotation sees.
ALIKE = "_COMPRESSED_TENSORS _TORCHAO _KIMI _OCP NVFP4_MODELOPT NVFP4_TRANSFORMER_ENGINE"
ALIKE += " MXFP6 MXFP8 FP8_PER_CHANNEL INT4_BLOCK128"


def test_a_checker_looks_on(pytestconfig):
    """Named bug: a fixture's file imported the package before the hook was there, and nothing was checked."""
    if not pytestconfig.getoption("--shape-checks"):
        pytest.skip("without --shape-checks")
    functions = (fqt.merge, fqt.select, fqt.transform, fqt.Transform.fakequant)
    assert all(inspect.unwrap(function) is not function for function in functions)


@pytest.mark.slow
def test_annotated_shapes_and_types_hold(pytestconfig):
    """Other tests under jaxtyping and beartype, in a process of their own: torch.compile cannot trace checks."""
    if pytestconfig.getoption("--shape-checks"):
        pytest.skip("these are the tests that it would run")
    names = ["test_annotations.py", "test_state.py", "test_select.py", "test_transform.py"]
    names += ["ops/quantize/test_reference.py", "ops/quantize/test_autograd.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--shape-checks", "-m", "not gpu", "-p", "no:cacheprovider"]
    command += ["-k", " and ".join(f"not {name}" for name in ALIKE.split())]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in names)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
