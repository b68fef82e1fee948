"""The launcher of casts to fp32: one launch for all matrices of a group."""

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from fq_transforms.ops.cast.kernel import cast_kernel
from fq_transforms.ops.launch import Plan, launch, matrices_of

__all__ = ["cast_triton"]

# Numbers that a program casts, and its warps: the quickest on an H200, of 1024 to 8192 and 1 to 8, by little.
TILE, WARPS = 1024, 4


def cast_triton(out: Tensor, grads: Sequence[Tensor]) -> None:
    """Write `cast_reference` of bf16 or fp16 matrices into memory from `results_for`, in one launch."""
    inputs = matrices_of(grads)
    plan = cast_plan(inputs.matrix[0] * inputs.matrix[1])
    launch(plan, (inputs, matrices_of([out], inputs.matrix)), ())


@cache
def cast_plan(size: int) -> Plan:
    """Of `cast_kernel`."""
    return Plan(cast_kernel, -(-size // TILE), (size,), {"TILE": TILE}, WARPS)
