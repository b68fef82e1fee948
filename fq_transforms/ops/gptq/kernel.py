# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel of GPTQ's inner loop: `fq_transforms.ops.gptq.reference.gptq_block_reference`, bit for bit.

A program takes TILE rows of one expert, and keeps their WIDTH columns in registers: first as targets, and column by
column, once each is rounded, as errors. Rows do not depend on each other, so nothing is shared but the factor, which
all rows of an expert read from caches.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import (
    address,
    fake_quantized,
    fake_quantized_two_level,
    lift_of,
    load_expert_scale,
    valid,
)

__all__ = ["gptq_block_kernel"]


@triton.jit
def gptq_block_kernel(
    weight_base,
    weight_table,
    weight_stride,
    target_ptr,
    errors_ptr,
    factor_ptr,
    amax_ptr,
    global_amax_ptr,
    columns_ptr,
    out_features,
    in_features,
    rows,
    columns,
    first,
    width,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    DIVIDES: tl.constexpr,
    QMAX: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    EXPONENT_ROUNDING: tl.constexpr,
    MAX_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Errors of the columns first to first + width of each expert's weight, into [E, out, in]."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, WIDTH)
    exists = row < out_features
    mask = exists[:, None] & (k < width)[None, :]
    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + row.to(tl.int64) * in_features + first
    factor = factor_ptr + expert * in_features * in_features + first
    t = tl.load(target_ptr + (expert * out_features + row[:, None]) * width + k[None, :], mask=mask, other=0.0)
    granule = expert * rows * columns + (row * 0 if ROWS == 0 else (row // ROWS) * columns)
    if SCALE == "e4m3":
        g = load_expert_scale(amax_ptr, global_amax_ptr, QMAX, False, DIVIDES)

    for j in range(width):
        x = tl.sum(tl.where(k[None, :] == j, t, 0.0), axis=1)[:, None] + 0.0  # no zero is negative, of one column too
        at = granule
        if COLUMNS != 0:
            at += tl.load(columns_ptr + expert * in_features + first + j) // COLUMNS
        amax = valid(tl.load(amax_ptr + at, mask=exists, other=0.0))
        if SCALE == "e4m3":
            q, _s = fake_quantized_two_level(
                x,
                amax,
                g,
                lift_of(g, DIVIDES),
                None,
                QMAX,
                MIN_EXPONENT,
                MANTISSA,
                MIN_SCALE,
                UNIT_SCALE_BELOW,
                False,
                DIVIDES,
            )
        else:
            q = fake_quantized(
                x,
                amax,
                None,
                ELEMENT,
                SCALE,
                QMAX,
                LOW,
                HIGH,
                MIN_EXPONENT,
                MANTISSA,
                EXPONENT_ROUNDING,
                MAX_BITS,
                DIVIDES,
            )
        e = tl.load(weight + j, mask=exists, other=0.0)[:, None] - q
        f = tl.load(factor + (first + j) * in_features + k, mask=(k > j) & (k < width), other=0.0)[None, :]
        t = tl.where(k[None, :] == j, e, tl.where(k[None, :] > j, t + e * f, t))

    errors = errors_ptr + (expert * out_features + row[:, None]) * in_features + first + k[None, :]
    tl.store(errors, t, mask=mask)
