# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel of learned scales: `fq_transforms.ops.quantize.lsq_reference`, its terms bit for bit.

It reads cotangents and weights once, writes the gradients of the weights, and adds up what each amax is owed: a sum for
each chunk, which is that of a whole granule where granules are chunks, and a sum for each program where an amax is an
expert's. The launcher adds those, which are few, in an order that is fixed by their number. No atomics.

NOTE exact quotients: an error q - v shows each bit of v, so v = x / s is divided exactly, unlike in the forward kernel.
"""

import triton
import triton.language as tl

from fq_transforms.ops.quantize.kernel import (
    TINY_AMAX,
    _address,
    _chunks,
    _each,
    _largest,
    _min,
    _round_integer,
    _round_magnitude,
    _scale,
    _two_level_scale,
    _valid,
)

__all__ = ["lsq_backward_kernel"]


@triton.jit
def _float_error(a, x, QMAX: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Error of a float element of magnitude a, in steps, with the sign of x; the largest value beyond it."""
    q = _round_magnitude(_min(a, QMAX), MIN_EXPONENT, MANTISSA)
    e = tl.where(a < QMAX, q - a, q)
    return tl.where(x < 0, -e, e)


@triton.jit
def lsq_backward_kernel(
    grad_base,
    grad_table,
    grad_stride,
    weight_base,
    weight_table,
    weight_stride,
    out_base,
    out_table,
    out_stride,
    amax_ptr,
    global_amax_ptr,
    chunk_sum_ptr,
    program_sum_ptr,
    out_features,
    in_features,
    rows,
    columns,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    QMAX: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    COMPLETE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`lsq_backward_reference`, a tile at a time; COMPLETE if a chunk is a granule, whose sum is divided here."""
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_base, weight_table, weight_stride, ALIGNED) + base
    grad = _address(grad_base, grad_table, grad_stride, ALIGNED) + base
    out = _address(out_base, out_table, out_stride, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    cotangent = tl.load(grad + offsets, mask=mask, other=0.0)
    a = tl.abs(x)

    if DYNAMIC:
        kept = cotangent
        block_amax = _valid(_largest(a, 1))
    else:
        amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
        kept = tl.where(a <= amax[:, None], cotangent, 0.0)
        block_amax = _valid(amax)
    tl.store(out + offsets, kept.to(out_base.dtype.element_ty), mask=mask)

    if SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        lift = tl.where(g < 2.0**-62, 2.0**64, 1.0)
        s, s8 = _two_level_scale(block_amax, g, lift, QMAX, MIN_SCALE, 0.0, DYNAMIC)
        u = tl.div_rn(block_amax, tl.full([TILE], QMAX, tl.float32) * g)
        constant = (s == 0) | (s8 * g < UNIT_SCALE_BELOW)
        free = (u >= MIN_SCALE) & (u <= 448.0)
        r = tl.where(constant, 0.0, tl.where(free, s8 - u, s8))
        v = tl.div_rn(a, tl.broadcast_to(tl.where(s == 0, 1.0, s)[:, None], [TILE, CHUNK]))
        e = _float_error(v, x, QMAX, MIN_EXPONENT, MANTISSA)
        free = free & (constant == 0)
    elif ELEMENT == "int":
        constant = block_amax < TINY_AMAX
        v = x * _each(_scale(QMAX, tl.where(constant, 1.0, block_amax)))
        q = _round_integer(v, LOW, HIGH)
        e = tl.where((v > LOW) & (v < HIGH), q - v, q)
    else:
        constant = block_amax <= TINY_AMAX
        s = _scale(QMAX, tl.where(constant, 1.0, block_amax))
        e = _float_error(a * _each(s), x, QMAX, MIN_EXPONENT, MANTISSA)
    sums = tl.sum(cotangent.to(tl.float32) * tl.where(constant[:, None], 0.0, e), axis=1)

    if chunk_sum_ptr is not None:
        chunks = tl.cdiv(in_features, CHUNK)
        c = tl.arange(0, TILE)
        if TRANSPOSED:
            tiles = tl.cdiv(out_features, TILE)
            chunk = ((tl.program_id(0) % tiles) * TILE + c) * chunks + tl.program_id(0) // tiles
        else:
            chunk = tl.program_id(0) * TILE + c
        place = tl.program_id(1).to(tl.int64) * out_features * chunks + chunk
        total = sums
        if COMPLETE:
            total = tl.div_rn(sums, tl.full([TILE], QMAX, tl.float32))
        if SCALE == "e4m3":
            total = tl.where(free, total, sums * 0.0)
        tl.store(chunk_sum_ptr + place, total, mask=exists)
    if program_sum_ptr is not None:
        if SCALE == "e4m3":
            sums = sums * r
        total = tl.sum(tl.where(exists, sums, 0.0))
        tl.store(program_sum_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), total)
