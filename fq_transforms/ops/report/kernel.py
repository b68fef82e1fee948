# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""What quantization does, measured in one pass: `fq_transforms.ops.report.reference.report_reference`.

A program forms the fake-quantized weights of its tile in registers, as the forward kernel does, and stores two sums,
three counts and a maximum; nothing of the size of the weights is written. Partial results have a place each, so there
are no atomics, and a run is repeated bit for bit. Counts and maxima equal the reference's; sums are those of its terms.

NOTE fp64: it holds the square of every fp32 number exactly, so neither tiny nor huge weights lose theirs.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import (
    address,
    bits_of,
    chunks,
    each,
    effective_scale,
    fake_quantized,
    fake_quantized_two_level,
    fp32_scale,
    granule_amax,
    lift_of,
    load_expert_scale,
    mx_exponent,
    over_int_scale,
    power_of_two,
    two_level_scale,
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
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Partial results of a tile: fp64 sums [2, experts, programs], int32 counts and bits of a maximum [4, ., .]."""
    base, offsets, mask, exists, granule, _row, _column = chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    x = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)
    block_amax = granule_amax(a, amax_ptr, granule, exists, DYNAMIC, ROWS, COLUMNS)
    # fp32 scales of larger granules, of which a chunk sees a part, are counted from the state.
    IS_GRANULE: tl.constexpr = ROWS == 1 and COLUMNS == CHUNK

    # Scales that are formed twice here are one to the compiler.
    if SCALE == "e4m3":
        g = load_expert_scale(amax_ptr, global_amax_ptr, QMAX, DYNAMIC, DIVIDES)
        lift = lift_of(g, DIVIDES)
        y, s = fake_quantized_two_level(
            x, block_amax, g, lift, None, QMAX, MIN_EXPONENT, MANTISSA, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES
        )
        clipped = _count(a > each(tl.where(s > 0, s * HIGHEST, float("inf"))))
        _, s8 = two_level_scale(block_amax, g, lift, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES)
        is_replaced = effective_scale(s8, g, DIVIDES) < UNIT_SCALE_BELOW
        is_small = (s8 < SMALLEST_NORMAL) | (s8 <= MIN_SCALE) | is_replaced
        underflow = _count(exists & (block_amax > 0) & is_small)
    else:
        y = fake_quantized(
            x,
            block_amax,
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
        if SCALE == "e8m0":
            e = mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
            end = tl.where(block_amax >= 0, HIGHEST, float("inf"))
            clipped = _count(a * power_of_two(-e)[:, None] > end[:, None])
            underflow = _count(exists & (block_amax > 0) & (e == -127))
        else:
            s, is_tiny = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
            if ELEMENT == "int":
                v = over_int_scale(x, each(s), True, DIVIDES)
                end = tl.where(is_tiny, float("inf"), block_amax)
                clipped = _count(((v < LOWEST) | (v > HIGHEST)) & (a > each(end)))
            else:
                clipped = _count(a * each(s) > HIGHEST)
            underflow = _count(exists & (block_amax > 0) & is_tiny) if IS_GRANULE else 0

    signal = x.to(tl.float64)
    noise = tl.where(mask, x - y, 0.0).to(tl.float64)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + place, tl.sum(signal * signal))
    tl.store(sums_ptr + programs + place, tl.sum(noise * noise))
    tl.store(counts_ptr + place, clipped)
    tl.store(counts_ptr + programs + place, _count((x != 0) & (y == 0)))
    tl.store(counts_ptr + 2 * programs + place, underflow)
    tl.store(counts_ptr + 3 * programs + place, tl.max(bits_of(a)))
