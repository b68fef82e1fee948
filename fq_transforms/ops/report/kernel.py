# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel that measures what quantization does: `fq_transforms.ops.report.reference.report_reference`, in one pass.

A program forms the fake-quantized weights of its tile in registers, as the forward kernel does, and stores two sums,
three counts and a maximum; nothing of the size of the weights is written. Partial results have a place each, so there
are no atomics, and a run is repeated bit for bit. Counts and maxima equal the reference's; sums are those of its terms.

NOTE fp64: it holds the square of every fp32 number exactly, so neither tiny nor huge weights lose theirs.
"""

import triton
import triton.language as tl

from fq_transforms.ops.quantize.kernel import (
    TINY_AMAX,
    _address,
    _bits,
    _chunks,
    _each,
    _granule_amax,
    _min,
    _mx_exponent,
    _power_of_two,
    _quotient,
    _reciprocal,
    _round_integer,
    _round_magnitude,
    _scale,
    _two_level,
    _two_level_scale,
    _valid,
    _with_sign_of,
)

__all__ = ["report_kernel"]

# The smallest normal E4M3.
SMALLEST_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def _count(which):
    return tl.sum(which.to(tl.int32))


@triton.jit
def report_kernel(
    weight_base,
    weight_table,
    weight_stride,
    amax_ptr,
    global_amax_ptr,
    sums_ptr,
    counts_ptr,
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
    EXPONENT_ROUNDING: tl.constexpr,
    MAX_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Partial results of a tile: fp64 sums [2, experts, programs], int32 counts and bits of a maximum [4, ., .]."""
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    x = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)
    block_amax = _granule_amax(a, amax_ptr, granule, exists, DYNAMIC, ROWS, COLUMNS)
    # fp32 scales of larger granules, of which a chunk sees a part, are counted from the state.
    IS_GRANULE: tl.constexpr = ROWS == 1 and COLUMNS == CHUNK

    if SCALE == "e8m0":
        e = _mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
        scale = tl.where(block_amax >= 0, _power_of_two(e), float("nan"))
        v = a * _power_of_two(-e)[:, None]
        y = _with_sign_of(_round_magnitude(_min(v, QMAX), MIN_EXPONENT, MANTISSA) * scale[:, None], x)
        end = tl.where(block_amax >= 0, HIGHEST, float("inf"))
        clipped = _count(v > end[:, None])
        underflow = _count(exists & (block_amax > 0) & (e == -127))
    elif SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        lift = tl.where(g < 2.0**-62, 2.0**64, 1.0)
        q, s = _two_level(x, block_amax, g, lift, QMAX, MIN_EXPONENT, MANTISSA, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC)
        y = _with_sign_of(q * _each(s), x)
        clipped = _count(a > _each(tl.where(s > 0, s * HIGHEST, float("inf"))))
        _, s8 = _two_level_scale(block_amax, g, lift, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC)
        is_small = (s8 < SMALLEST_NORMAL) | (s8 <= MIN_SCALE) | (s8 * g < UNIT_SCALE_BELOW)
        underflow = _count(exists & (block_amax > 0) & is_small)
    elif ELEMENT == "int":
        zero = block_amax < TINY_AMAX
        s = _scale(QMAX, tl.where(zero, 1.0, block_amax))
        v = x * _each(s)
        half = _quotient(_round_integer(v, LOW, HIGH), _each(s + s), _each(_reciprocal(s + s)))
        y = _with_sign_of(half * _each(tl.where(zero, 0.0, 2.0)), x)
        end = tl.where(zero, float("inf"), block_amax)
        clipped = _count(((v < LOWEST) | (v > HIGHEST)) & (a > _each(end)))
        underflow = _count(exists & (block_amax > 0) & zero) if IS_GRANULE else 0
    else:
        s = _scale(QMAX, tl.where(block_amax <= TINY_AMAX, 1.0, block_amax))
        v = a * _each(s)
        q = _round_magnitude(_min(v, QMAX), MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * _each(tl.div_rn(1.0, s)), x)
        clipped = _count(v > HIGHEST)
        underflow = _count(exists & (block_amax > 0) & (block_amax <= TINY_AMAX)) if IS_GRANULE else 0

    signal = x.to(tl.float64)
    noise = tl.where(mask, x - y, 0.0).to(tl.float64)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + place, tl.sum(signal * signal))
    tl.store(sums_ptr + programs + place, tl.sum(noise * noise))
    tl.store(counts_ptr + place, clipped)
    tl.store(counts_ptr + programs + place, _count((x != 0) & (y == 0)))
    tl.store(counts_ptr + 2 * programs + place, underflow)
    tl.store(counts_ptr + 3 * programs + place, tl.max(_bits(a)))
