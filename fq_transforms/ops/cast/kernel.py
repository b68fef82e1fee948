# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel of casts: `fq_transforms.ops.cast.reference.cast_reference`, one launch for matrices anywhere."""

import triton
import triton.language as tl

from fq_transforms.ops.device import address

__all__ = ["cast_kernel"]


@triton.jit
def cast_kernel(
    grad_base,
    grad_table,
    grad_stride,
    out_base,
    out_table,
    out_stride,
    size,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A tile of one matrix of `size` numbers, to fp32."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = at < size
    x = tl.load(address(grad_base, grad_table, grad_stride, ALIGNED) + at, mask=exists, other=0.0)
    tl.store(address(out_base, out_table, out_stride, ALIGNED) + at, x.to(tl.float32), mask=exists)
