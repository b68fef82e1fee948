# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""Triton kernels of percentiles: `fq_transforms.ops.percentile.reference.percentile_reference`, bit for bit.

Nothing is sorted. The bits of magnitudes order as the magnitudes do, with NaN above infinity, so that the n-th of them
is found from its highest bit down, by counting; integer counts are the same in any order. Weights enter as fp32, which
holds bf16 and fp16 exactly, with LOW bits at the end that are never set and need no step. The neighbour above is the
same number again, or the least of those above it.

`percentile_kernel` is for granules that one program works on. It reads the weights once and keeps them in registers if
they fit, else once a bit. `percentile_digit_kernel` is for whole experts, which many programs share: a launch counts
the values of one digit of eight bits among weights that have the digits already known. A digit is known only when all
programs have counted, so there is a launch per digit, and a small one that interpolates.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import address, bits_of, float_of

__all__ = ["percentile_digit_kernel", "percentile_kernel"]

# Above the bits of every magnitude, or equal to those of a NaN.
MOST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _between(one, other, fraction):
    """`torch.lerp` in float64 of two magnitudes, given by their bits, rounded to fp32."""
    one = float_of(one).to(tl.float64)
    other = float_of(other).to(tl.float64)
    is_near = fraction < 0.5
    found = tl.fma(tl.where(is_near, fraction, fraction - 1), other - one, tl.where(is_near, one, other))
    return found.to(tl.float32)


@triton.jit
def _magnitudes(weight, k, row, column, exists, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits of the k-th weights of granules [TILE], in memory's order; MOST where there is none: [TILE, CHUNK].

    Rows and columns of granules are int64, and so are offsets.
    """
    if ROWS == 1:
        i = k * 0
        j = k
    else:
        i = k // COLUMNS
        j = k % COLUMNS
    y = row[:, None] * ROWS + i[None, :]
    x = column[:, None] * COLUMNS + j[None, :]
    mask = exists[:, None] & (y < height) & (x < width)
    if ROWS != 0:
        mask = mask & (i < ROWS)[None, :]
    if COLUMNS != 0:
        mask = mask & (j < COLUMNS)[None, :]
    found = tl.load(weight + y * width + x, mask=mask, other=0.0)
    return tl.where(mask, bits_of(tl.abs(found.to(tl.float32))), MOST)


@triton.jit
def percentile_kernel(
    weight_base,
    weight_table,
    weight_stride,
    positions_ptr,
    fractions_ptr,
    amax_ptr,
    height,
    width,
    rows,
    columns,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The percentile of TILE granules, CHUNK weights of each at a time: all of them, if they are HELD.

    All is as stored: a matrix is height x width, a granule ROWS x COLUMNS, 0 for the whole extent, of which there are
    rows x columns. Positions and fractions, [2, 2, 2] and [2, 2], are those of inner and last rows and columns.
    """
    granule = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = granule // columns
    column = granule % columns
    exists = row < rows
    weight = address(weight_base, weight_table, weight_stride, ALIGNED)
    k = tl.arange(0, CHUNK)
    size = (height if ROWS == 0 else ROWS) * (width if COLUMNS == 0 else COLUMNS)

    case = (row == rows - 1).to(tl.int32) * 2 + (column == columns - 1).to(tl.int32)
    first = tl.load(positions_ptr + case)
    second = tl.load(positions_ptr + 4 + case)

    if HELD:
        held = _magnitudes(weight, k, row, column, exists, height, width, ROWS, COLUMNS)
    one = tl.zeros([TILE], dtype=tl.int32)
    for step in range(31 - LOW):  # a bit is set where no more than `first` are below the number with it
        tried = one | (1 << (30 - step))
        if HELD:
            below = tl.sum((held < tried[:, None]).to(tl.int32), axis=1)
        else:
            below = tl.zeros([TILE], dtype=tl.int32)
            for start in range(0, size, CHUNK):
                some = _magnitudes(weight, start + k, row, column, exists, height, width, ROWS, COLUMNS)
                below += tl.sum((some < tried[:, None]).to(tl.int32), axis=1)
        one = tl.where(below <= first, tried, one)

    if HELD:
        upto = tl.sum((held <= one[:, None]).to(tl.int32), axis=1)
        above = tl.min(tl.where(held > one[:, None], held, MOST), axis=1)
    else:
        upto = tl.zeros([TILE], dtype=tl.int32)
        above = tl.full([TILE], MOST, dtype=tl.int32)
        for start in range(0, size, CHUNK):
            some = _magnitudes(weight, start + k, row, column, exists, height, width, ROWS, COLUMNS)
            upto += tl.sum((some <= one[:, None]).to(tl.int32), axis=1)
            above = tl.minimum(above, tl.min(tl.where(some > one[:, None], some, MOST), axis=1))
    other = tl.where(second < upto, one, above)

    place = column * rows + row if TRANSPOSED else granule
    at = amax_ptr + tl.program_id(1).to(tl.int64) * rows * columns + place
    tl.store(at, _between(one, other, tl.load(fractions_ptr + case)), mask=exists)


@triton.jit
def percentile_digit_kernel(
    weight_base,
    weight_table,
    weight_stride,
    positions_ptr,
    fractions_ptr,
    histogram_ptr,
    above_ptr,
    amax_ptr,
    size,
    DIGIT: tl.constexpr,
    DIGITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Counts of a digit, [experts, DIGITS, 2**WIDTH], with the last one's the least weight above; then the percentile.

    Launched for DIGIT = 0 to DIGITS, 0 the highest; for DIGITS itself one program an expert reads no weights.
    """
    BINS: tl.constexpr = 1 << WIDTH
    SHIFT: tl.constexpr = 32 - WIDTH * (DIGIT + 1)
    expert = tl.program_id(1).to(tl.int64)
    bin = tl.arange(0, BINS)
    histogram = histogram_ptr + expert * (DIGITS * BINS) + bin

    rank = tl.load(positions_ptr)  # among the weights that have the digits known
    prefix = 0
    for known in tl.static_range(DIGIT):
        counts = tl.load(histogram + known * BINS)
        digit = tl.sum((tl.cumsum(counts, axis=0) <= rank).to(tl.int32))
        rank -= tl.sum(tl.where(bin < digit, counts, 0))
        parent = prefix
        prefix = (parent << WIDTH) | digit

    if DIGIT == DIGITS:
        END: tl.constexpr = 32 - WIDTH * DIGITS
        one = prefix << END
        is_again = rank + 1 < tl.sum(tl.where(bin == digit, counts, 0))
        next = tl.min(tl.where((bin > digit) & (counts > 0), bin, BINS))
        above = tl.where(next < BINS, ((parent << WIDTH) | next) << END, tl.load(above_ptr + expert))
        is_last = tl.load(positions_ptr) == tl.load(positions_ptr + 4)
        other = tl.where(is_again | is_last, one, above)
        tl.store(amax_ptr + expert, _between(one, other, tl.load(fractions_ptr)))
    else:
        weight = address(weight_base, weight_table, weight_stride, ALIGNED)
        found = tl.zeros([BINS], dtype=tl.int32)
        least = tl.full([TILE], MOST, dtype=tl.int32)
        for step in range(STEPS):
            k = (tl.program_id(0).to(tl.int64) * STEPS + step) * TILE + tl.arange(0, TILE)
            exists = k < size
            bits = bits_of(tl.abs(tl.load(weight + k, mask=exists, other=0.0).to(tl.float32)))
            is_counted = exists
            if DIGIT > 0:
                is_counted = exists & ((bits >> (SHIFT + WIDTH)) == prefix)
            found += tl.histogram((bits >> SHIFT) & (BINS - 1), BINS, mask=is_counted)
            if DIGIT == DIGITS - 1:
                is_above = exists & ((bits >> (SHIFT + WIDTH)) > prefix)
                least = tl.minimum(least, tl.where(is_above, bits, MOST))
        tl.atomic_add(histogram + DIGIT * BINS, found.to(tl.int64), mask=found > 0, sem="relaxed")
        if DIGIT == DIGITS - 1:
            tl.atomic_min(above_ptr + expert, tl.min(least), sem="relaxed")
