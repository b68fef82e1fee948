# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""Fake quantization of the N separate weights of a group, and its gradients, in one launch each.

Every kernel equals `fq_transforms.ops.quantize.reference` bit for bit, sums of the learned scales' gradients apart.

NOTE random words: one call to Philox serves four neighbours along `in`. Where a chunk may begin between its four, as
with an odd `in` or a shard that begins at an odd column, each weight makes its own call and takes its word of it.

NOTE sums: the backward of learned scales adds up what each amax is owed: a sum for each chunk, which is that of a whole
granule where granules are chunks, and a sum for each program where an amax is an expert's. The launcher adds those,
which are few, in an order that is fixed by their number. No atomics.

NOTE exact quotients: an error q - v shows each bit of v, so the backward of learned scales divides v = x / s exactly,
unlike the forward kernel.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import (
    address,
    chunks,
    each,
    effective_scale,
    fake_quantized,
    fake_quantized_two_level,
    fp32_scale,
    granule_amax,
    is_tiny_scale,
    largest,
    lift_of,
    load_expert_scale,
    min_or_nan,
    over_int_scale,
    round_integer,
    round_magnitude,
    two_level_scale,
    unrounded_scale,
    valid,
)

__all__ = ["clip_backward_kernel", "fake_quantize_kernel", "lsq_backward_kernel"]


@triton.jit
def _uniform(seed, row, column, expert, group, CHUNK: tl.constexpr, TILE: tl.constexpr, QUADS: tl.constexpr):
    """For each weight of chunks that begin at these rows and columns, a number in (0, 1], a multiple of 2**-24."""
    row = row[:, None]
    if QUADS:
        quad = (column // 4)[:, None] + tl.arange(0, CHUNK // 4)[None, :]
        a, b, c, d = tl.philox(seed, quad, row + quad * 0, expert + quad * 0, group + quad * 0)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [TILE, CHUNK])
    else:
        place = column[:, None] + tl.arange(0, CHUNK)[None, :]
        a, b, c, d = tl.philox(seed, place // 4, row + place * 0, expert + place * 0, group + place * 0)
        word = place % 4
        words = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return ((words >> 8).to(tl.int32) + 1).to(tl.float32) * (2.0**-24)


@triton.jit(do_not_specialize=["group", "first_expert", "first_row", "first_column", "experts", "copies"])
def fake_quantize_kernel(
    weight_base,
    weight_table,
    weight_stride,
    out_base,
    out_table,
    out_stride,
    amax_ptr,
    global_amax_ptr,
    seed_ptr,
    out_features,
    in_features,
    rows,
    columns,
    group,
    first_expert,
    first_row,
    first_column,
    experts,
    copies,
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
    STOCHASTIC: tl.constexpr,
    SEEDS: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`fake_quantize_reference`, or if STOCHASTIC `stochastic_reference`, a tile at a time.

    The seed and the numbers from `group` to `copies` are None unless STOCHASTIC; SEEDS if each expert has its own seed.
    """
    base, offsets, mask, exists, granule, row, column = chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    u = None
    if STOCHASTIC:
        place = tl.program_id(1)
        seed = tl.load(seed_ptr + place) if SEEDS else tl.load(seed_ptr)
        expert = first_expert + (place // (experts * copies)) * experts + place % experts
        u = _uniform(seed, first_row + row, first_column + column, expert, group, CHUNK, TILE, QUADS)

    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    out = address(out_base, out_table, out_stride, ALIGNED) + base + offsets
    x = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    block_amax = granule_amax(tl.abs(x), amax_ptr, granule, exists, DYNAMIC, ROWS, COLUMNS)

    if SCALE == "e4m3":
        g = load_expert_scale(amax_ptr, global_amax_ptr, QMAX, DYNAMIC, DIVIDES)
        lift = 1.0
        if STOCHASTIC:  # lifts scales only, not each weight
            lift = lift_of(g, DIVIDES)
        elif is_tiny_scale(
            g, DIVIDES
        ):  # leaves at once: joined with the usual case, it would cost each weight an instruction
            y, _s = fake_quantized_two_level(
                x,
                block_amax,
                g,
                2.0**64,
                u,
                QMAX,
                MIN_EXPONENT,
                MANTISSA,
                MIN_SCALE,
                UNIT_SCALE_BELOW,
                DYNAMIC,
                DIVIDES,
            )
            tl.store(out, y.to(out_base.dtype.element_ty), mask=mask)
            return
        y, _s = fake_quantized_two_level(
            x, block_amax, g, lift, u, QMAX, MIN_EXPONENT, MANTISSA, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES
        )
    else:
        y = fake_quantized(
            x,
            block_amax,
            u,
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
    tl.store(out, y.to(out_base.dtype.element_ty), mask=mask)


@triton.jit
def clip_backward_kernel(
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
    out_features,
    in_features,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`clip_backward_reference`, a tile at a time."""
    base, offsets, mask, exists, granule, _row, _column = chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + base
    grad = address(grad_base, grad_table, grad_stride, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=mask, other=0.0)
    amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
    kept = tl.where(tl.abs(x) <= amax[:, None], g, 0.0)
    out = address(out_base, out_table, out_stride, ALIGNED) + base
    tl.store(out + offsets, kept.to(out_base.dtype.element_ty), mask=mask)


@triton.jit
def _float_error(a, x, QMAX: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Error of a float element of magnitude a, in steps, with the sign of x; the largest value beyond it."""
    q = round_magnitude(min_or_nan(a, QMAX), MIN_EXPONENT, MANTISSA)
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
    DIVIDES: tl.constexpr,
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
    base, offsets, mask, exists, granule, row, column = chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + base
    grad = address(grad_base, grad_table, grad_stride, ALIGNED) + base
    out = address(out_base, out_table, out_stride, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    cotangent = tl.load(grad + offsets, mask=mask, other=0.0)
    a = tl.abs(x)

    if DYNAMIC:
        kept = cotangent
        block_amax = valid(largest(a, 1))
    else:
        amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
        kept = tl.where(a <= amax[:, None], cotangent, 0.0)
        block_amax = valid(amax)
    tl.store(out + offsets, kept.to(out_base.dtype.element_ty), mask=mask)

    if SCALE == "e4m3":
        g = load_expert_scale(amax_ptr, global_amax_ptr, QMAX, DYNAMIC, DIVIDES)
        s, s8 = two_level_scale(block_amax, g, lift_of(g, DIVIDES), QMAX, MIN_SCALE, 0.0, DYNAMIC, DIVIDES)
        u = unrounded_scale(block_amax, g, QMAX, DIVIDES)
        constant = (s == 0) | (effective_scale(s8, g, DIVIDES) < UNIT_SCALE_BELOW)
        free = (u >= MIN_SCALE) & (u <= 448.0)
        r = tl.where(constant, 0.0, tl.where(free, s8 - u, s8))
        v = tl.div_rn(a, tl.broadcast_to(tl.where(s == 0, 1.0, s)[:, None], [TILE, CHUNK]))
        e = _float_error(v, x, QMAX, MIN_EXPONENT, MANTISSA)
        free = free & (constant == 0)
    elif ELEMENT == "int":
        s, constant = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        v = over_int_scale(x, each(s), True, DIVIDES)
        q = round_integer(v, LOW, HIGH)
        e = tl.where((v > LOW) & (v < HIGH), q - v, q)
    else:
        s, constant = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        e = _float_error(a * each(s), x, QMAX, MIN_EXPONENT, MANTISSA)
    sums = tl.sum(cotangent.to(tl.float32) * tl.where(constant[:, None], 0.0, e), axis=1)

    if chunk_sum_ptr is not None:
        chunks_per_row = tl.cdiv(in_features, CHUNK)
        chunk = tl.program_id(0) * TILE + tl.arange(0, TILE)
        if TRANSPOSED:
            chunk = row * chunks_per_row + column // CHUNK
        place = tl.program_id(1).to(tl.int64) * out_features * chunks_per_row + chunk
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
