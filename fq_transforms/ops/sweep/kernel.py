# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel that sweeps over amax: `fq_transforms.ops.sweep.reference.sweep_reference`, bit for bit.

A program reads TILE chunks of CHUNK weights once, keeps them in registers, and tries one amax after the other. Chunks
are loaded as pieces of 16 bytes, the first of every chunk first, so that all pieces of a chunk come to one thread (see
`fq_transforms.ops.pack.kernel`): squared errors are then added by pairs without an exchange between threads.

Where a chunk is a whole granule, the program keeps the best so far and stores its amax. Where a granule has many
chunks, their errors are added as integers in memory, [E, granules, COUNT], from which `pick` takes the least. Then a
program's chunks are all of one granule, so that it adds one number a candidate; only matrices stored [in, out] have
chunks of several granules side by side, and add one number each.

With second moments H a program takes TILE rows of one block of columns, so that all its threads read the same numbers
of H, a row of it at a time. Each number of d in turn meets its row of H: a sum of the others' zero bits takes it out,
which costs nothing where a thread holds a chunk whose numbers are known by register.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import (
    SMALLEST_DIVISOR,
    TINY_AMAX,
    address,
    bits_of,
    effective_scale,
    expert_scale,
    float_of,
    over_int_scale,
    power_of_two,
    qmax_over,
    quotient,
    reciprocal,
    round_integer,
    round_magnitude,
    two_level_scale,
)

__all__ = ["sweep_kernel"]


@triton.jit
def _each(chunk):
    """A chunk's number [TILE], shaped to meet its weights [PIECES, TILE, PIECE]; a granule's own stays a scalar."""
    return chunk[None, :, None] if len(chunk.shape) == 1 else chunk


@triton.jit
def _by_pairs(error, PIECES: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr):
    """Sum of each chunk [TILE] of errors [PIECES, TILE, PIECE]: neighbours, then neighbouring sums."""
    for level in tl.static_range(PIECE.bit_length() - 1):
        one, other = tl.split(error.reshape(PIECES, TILE, PIECE >> (level + 1), 2))
        error = one + other
    error = error.reshape(PIECES, TILE).permute(1, 0)
    for level in tl.static_range(PIECES.bit_length() - 1):
        one, other = tl.split(error.reshape(TILE, PIECES >> (level + 1), 2))
        error = one + other
    return error.reshape(TILE)


@triton.jit
def _form(
    d,
    moments,
    doubt,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Bound of d^T H d of each chunk [TILE], in the order of the reference; rows of H are at `moments`."""
    GROUPS: tl.constexpr = CHUNK // GROUP
    bits = bits_of(d).reshape(GROUPS, GROUP // PIECE, TILE, PIECE)
    group = tl.arange(0, GROUPS)[:, None, None, None]
    place = (tl.arange(0, GROUP // PIECE) * PIECE)[:, None, None] + tl.arange(0, PIECE)[None, None, :]
    p = d * doubt
    for g in range(GROUPS):
        own = tl.sum(tl.where(group == g, bits, 0), axis=0)
        for j in tl.static_range(GROUP):
            one = float_of(tl.sum(tl.sum(tl.where(place == j, own, 0), axis=2), axis=0))
            row = tl.load(moments + (g * GROUP + j) * CHUNK).reshape(PIECES, TILE, PIECE)
            p += row * _each(one)
    return _by_pairs(d * p, PIECES, TILE, PIECE)


@triton.jit
def sweep_kernel(
    weight_base,
    weight_table,
    weight_stride,
    amax_ptr,
    global_amax_ptr,
    importance_ptr,
    ratios_ptr,
    result_ptr,
    out_features,
    in_features,
    rows,
    columns,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    DIVIDES: tl.constexpr,
    QMAX: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    LOCAL: tl.constexpr,
    DOUBT: tl.constexpr,
    UNDERFLOW: tl.constexpr,
    SHIFT: tl.constexpr,
    KEPT: tl.constexpr,
    WINDOW: tl.constexpr,
    BELOW: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The amax of each granule that is one chunk; of larger ones the error of each candidate, SHIFT bits of it."""
    PIECES: tl.constexpr = CHUNK // PIECE
    IS_BLOCK: tl.constexpr = ROWS == 1 and COLUMNS == CHUNK
    IS_EXPERT: tl.constexpr = ROWS == 0 and COLUMNS == 0
    expert = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, TILE)
    piece_c = tl.arange(0, PIECES * TILE) % TILE
    first = tl.arange(0, PIECES * TILE) // TILE * PIECE
    if TRANSPOSED or LOCAL:  # CHUNK inputs of TILE neighbouring outputs
        tiles = tl.cdiv(out_features, TILE)
        row = (tl.program_id(0) % tiles) * TILE + c
        piece_row = (tl.program_id(0) % tiles) * TILE + piece_c
        column = (tl.program_id(0) // tiles) * CHUNK
        exists = row < out_features
        piece_exists = piece_row < out_features
        granule = row * 0 if ROWS == 0 else (row // ROWS) * columns
        if COLUMNS != 0:
            granule += column // COLUMNS
        input = column + first
        if TRANSPOSED:  # memory is [in, out]
            offsets = (input[:, None] + tl.arange(0, PIECE)[None, :]).to(tl.int64) * out_features + piece_row[:, None]
        else:
            offsets = piece_row.to(tl.int64)[:, None] * in_features + (input[:, None] + tl.arange(0, PIECE)[None, :])
    elif IS_BLOCK:  # chunks, which are blocks, follow each other in memory
        granule = tl.program_id(0) * TILE + c
        exists = granule < rows * columns
        piece_exists = tl.program_id(0) * TILE + piece_c < rows * columns
        input = (tl.program_id(0) * TILE + piece_c) % columns * CHUNK + first
        offsets = tl.program_id(0).to(tl.int64) * (TILE * CHUNK) + (piece_c * CHUNK + first)[:, None]
        offsets += tl.arange(0, PIECE)[None, :]
    else:  # TILE chunks of one granule, in the order of its rows
        height = out_features if ROWS == 0 else ROWS
        width = (in_features if COLUMNS == 0 else COLUMNS) // CHUNK
        parts = tl.cdiv(height * width, TILE)
        granule = tl.program_id(0) // parts
        chunk = (tl.program_id(0) % parts) * TILE + piece_c
        piece_row = (granule // columns) * height + chunk // width
        input = (granule % columns) * width * CHUNK + chunk % width * CHUNK + first
        exists = True
        piece_exists = (chunk < height * width) & (piece_row < out_features) & (input < in_features)
        offsets = piece_row.to(tl.int64)[:, None] * in_features + (input[:, None] + tl.arange(0, PIECE)[None, :])
    granule = expert * rows * columns + granule

    mask = piece_exists[:, None] & (tl.arange(0, PIECE) >= 0)[None, :]
    weight = address(weight_base, weight_table, weight_stride, ALIGNED)
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32).reshape(PIECES, TILE, PIECE)
    if LOCAL:
        moments = importance_ptr + (expert * columns + column // CHUNK) * (CHUNK * CHUNK)
        moments += first[:, None] + tl.arange(0, PIECE)[None, :]
        doubt = tl.zeros([PIECES * TILE, PIECE], dtype=tl.float32)
        for j in range(CHUNK):
            doubt += tl.abs(tl.load(moments + j * CHUNK))
        doubt = (doubt * DOUBT).reshape(PIECES, TILE, PIECE)
    elif importance_ptr is not None:
        at = importance_ptr + expert * in_features + input[:, None] + tl.arange(0, PIECE)[None, :]
        importance = tl.load(at, mask=mask, other=0.0).reshape(PIECES, TILE, PIECE)

    if IS_EXPERT:
        amax = tl.load(amax_ptr + expert)
    elif IS_BLOCK or TRANSPOSED:
        amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
    else:
        amax = tl.load(amax_ptr + granule)

    # See NOTE units of the reference.
    widest = tl.load(global_amax_ptr + expert) if SCALE == "e4m3" else amax
    is_swept = (widest > TINY_AMAX) & (widest < float("inf"))
    unit = power_of_two(tl.where(is_swept, 127 - (bits_of(widest) >> 23), 0))
    x = x * _each(unit)
    a = tl.abs(x)
    if SCALE == "e4m3":
        g = expert_scale(widest * unit, QMAX, DIVIDES)
        s8 = two_level_scale(amax * unit, g, 1.0, QMAX, MIN_SCALE, 0.0, False, DIVIDES)[1]
        lowest = tl.zeros([TILE], dtype=tl.int32) + 1
        if KIND == "window":
            lowest = tl.minimum(tl.maximum((bits_of(s8 * 2.0**-120) >> 20) - BELOW, 1), SCALES + 1 - WINDOW)

    if IS_BLOCK:
        best = tl.zeros([TILE], dtype=tl.float32) + tl.where(is_swept, float("inf"), -1.0)
        kept = amax if KIND == "ratios" else amax * 0.0  # a scale of 0 stands for the amax itself
        chosen = kept
    for k in range(COUNT):  # 0 is max itself
        if KIND == "ratios":
            tried = amax * tl.load(ratios_ptr + k)
        else:
            tried = tl.where(k == 0, s8, _max_of(float_of((lowest + (k - 1)) << 20) * 2.0**120, MIN_SCALE))

        if SCALE == "e4m3":
            if KIND == "ratios":
                s = two_level_scale(tried * unit, g, 1.0, QMAX, MIN_SCALE, 0.0, False, DIVIDES)[0]
            else:
                s = effective_scale(tried, g, DIVIDES)
            divisor = tl.maximum(s, SMALLEST_DIVISOR)
            q = quotient(tl.minimum(a, _each(QMAX * s)), _each(divisor), _each(reciprocal(divisor)))
            error = a - round_magnitude(q, MIN_EXPONENT, MANTISSA) * _each(s)
        elif ELEMENT == "int":
            s = qmax_over(QMAX, tried * unit) if DIVIDES else tl.div_rn(tried * unit, QMAX)
            q = round_integer(over_int_scale(x, _each(s), False, DIVIDES), LOW, HIGH)
            y = quotient(q, _each(s), _each(reciprocal(s))) if DIVIDES else q * _each(s)
            error = x - y
        else:
            s = qmax_over(QMAX, tried * unit)
            q = round_magnitude(tl.minimum(a * _each(s), QMAX), MIN_EXPONENT, MANTISSA)
            error = a - q * _each(tl.div_rn(1.0, s))
        if LOCAL:
            if ELEMENT != "int":
                error = float_of(bits_of(error) ^ (bits_of(x) & -2147483648))
            sign = tl.where(k == 0, -1.0, 1.0)
            error = _form(error, moments, doubt * sign, min(16, CHUNK), CHUNK, PIECES, TILE, PIECE)
        else:
            error = error * error
            if importance_ptr is not None:
                error = error * importance
            error = _by_pairs(error, PIECES, TILE, PIECE)

        if IS_BLOCK:
            is_better = error < best
            if KIND == "ratios":
                is_better = is_better & (tried < float("inf"))
                if SCALE != "e4m3":
                    is_better = is_better & (tried > TINY_AMAX)
            first_error = error - UNDERFLOW if LOCAL else error * KEPT
            best = tl.where(is_better, tl.where(k == 0, first_error, error), best)
            chosen = tl.where(is_better, tl.where(k == 0, kept, tried), chosen)
        else:
            total = (error * 2.0**SHIFT).to(tl.int64)
            if IS_EXPERT:
                tl.atomic_add(result_ptr + expert * COUNT + k, tl.sum(total), sem="relaxed")
            elif TRANSPOSED:
                tl.atomic_add(result_ptr + granule * COUNT + k, total, mask=exists, sem="relaxed")
            else:
                tl.atomic_add(result_ptr + granule * COUNT + k, tl.sum(total), sem="relaxed")

    if IS_BLOCK:
        if KIND != "ratios":
            found = widest * tl.div_rn(chosen, tl.full([TILE], 448.0, tl.float32))
            chosen = tl.where(chosen > 0, found, amax)
        tl.store(result_ptr + granule, chosen, mask=exists)


@triton.jit
def _max_of(x, LEAST: tl.constexpr):
    return tl.maximum(x, LEAST)
