# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel of sums of products of inputs: `fq_transforms.ops.hessian.reference.add_products_reference`.

One launch for all experts, whatever number of tokens each has: a program makes one SIDE x SIDE tile on or above the
diagonal of one expert's sum, and stores it below the diagonal too. Its tokens are read where they lie, by their
numbers; products of bf16 and of fp16 are exact, on tensor cores, and those of fp32 are not rounded to less either.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import INTERPRETED

__all__ = ["add_products_kernel"]


@triton.jit
def add_products_kernel(
    x_ptr, order_ptr, starts_ptr, sums_ptr, in_features, tiles, SIDE: tl.constexpr, TOKENS: tl.constexpr
):
    """Add to the sums [E, in, in] of each expert."""
    expert = tl.program_id(1).to(tl.int64)
    first = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    if first == end:
        return
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if column < row:  # it is stored with its mirror image
        return
    i = row * SIDE + tl.arange(0, SIDE)
    j = column * SIDE + tl.arange(0, SIDE)
    t = tl.arange(0, TOKENS)

    total = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for at in range(first, end, TOKENS):
        token = tl.load(order_ptr + at + t, mask=at + t < end, other=0)
        exists = (at + t < end)[:, None]
        line = x_ptr + token[:, None] * in_features
        a = tl.load(line + i[None, :], mask=exists & (i < in_features)[None, :], other=0.0)
        b = tl.load(line + j[None, :], mask=exists & (j < in_features)[None, :], other=0.0)
        if INTERPRETED:  # whose products of bf16 are not numpy's
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")

    sums = sums_ptr + expert * in_features * in_features
    mask = (i < in_features)[:, None] & (j < in_features)[None, :]
    above = sums + i[:, None].to(tl.int64) * in_features + j[None, :]
    total += tl.load(above, mask=mask, other=0.0)
    tl.store(above, total, mask=mask)
    if row != column:
        below = sums + j[None, :].to(tl.int64) * in_features + i[:, None]
        tl.store(below, total, mask=mask)
