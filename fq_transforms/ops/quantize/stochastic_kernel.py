# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The Triton kernel of stochastic rounding: `fq_transforms.ops.quantize.stochastic_reference`, bit for bit.

It is the forward kernel of `ops.kernels`, whose functions it calls, but for the rounding. There, a quotient need only
be on the right side of the boundaries between values; here each bit of it may decide, so elements are divided exactly.

NOTE random words: one call to Philox serves four neighbours along `in`. Where a chunk may begin between its four, as
with an odd `in` or a shard that begins at an odd column, each weight makes its own call and takes its word of it.
"""

import triton
import triton.language as tl

from fq_transforms.ops.quantize.kernel import (
    TINY_AMAX,
    _address,
    _bits,
    _chunks,
    _each,
    _float,
    _granule_amax,
    _min,
    _mx_exponent,
    _power_of_two,
    _quotient,
    _reciprocal,
    _scale,
    _two_level_scale,
    _valid,
    _with_sign_of,
)

__all__ = ["stochastic_kernel"]

# The reference has the same number.
ON_GRID = tl.constexpr(2.0**-22)


@triton.jit
def _round_steps(t, u):
    """0 <= t < 2**22 to an integer beside it, or that which it is."""
    nearest = (t + 8388608.0) - 8388608.0  # 2**23
    lower = tl.floor(t)
    chosen = tl.where(t - lower >= u, lower + 1.0, lower)
    return tl.where(tl.abs(t - nearest) <= t * ON_GRID, nearest, chosen)


@triton.jit
def _round_float(a, u, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """A value of a small float beside a, 0 <= a <= its largest value."""
    power = tl.maximum(_float(_bits(a) & 0x7F800000), 2.0**MIN_EXPONENT)
    inverse = _float(0x7F000000 - _bits(power))
    return _round_steps(a * (inverse * 2.0**MANTISSA), u) * (power * 2.0**-MANTISSA)


@triton.jit
def _uniform(
    seed,
    row,
    column,
    expert,
    group,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    QUADS: tl.constexpr,
):
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
def stochastic_kernel(
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
    QMAX: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    EXPONENT_ROUNDING: tl.constexpr,
    MAX_BITS: tl.constexpr,
    SEEDS: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`stochastic_reference`, a tile at a time; SEEDS if each expert has its own seed."""
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    # Where the chunks begin, as `_chunks` has it.
    block, c = tl.program_id(0), tl.arange(0, TILE)
    if TRANSPOSED:
        tiles = tl.cdiv(out_features, TILE)
        row = (block % tiles) * TILE + c
        column = (block // tiles) * CHUNK + c * 0
    else:
        chunks_a_row = in_features // CHUNK
        row = (block * TILE + c) // chunks_a_row
        column = (block * TILE + c - row * chunks_a_row) * CHUNK
    place = tl.program_id(1)
    seed = tl.load(seed_ptr + place) if SEEDS else tl.load(seed_ptr)
    expert = first_expert + (place // (experts * copies)) * experts + place % experts
    u = _uniform(seed, first_row + row, first_column + column, expert, group, CHUNK, TILE, QUADS)

    weight = _address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    out = _address(out_base, out_table, out_stride, ALIGNED) + base + offsets
    x = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)
    block_amax = _granule_amax(a, amax_ptr, granule, exists, DYNAMIC, ROWS, COLUMNS)

    if SCALE == "e8m0":
        e = _mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
        scale = tl.where(block_amax >= 0, _power_of_two(e), float("nan"))
        q = _round_float(_min(a * _power_of_two(-e)[:, None], QMAX), u, MIN_EXPONENT, MANTISSA)
        y = q * scale[:, None]
    elif SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        lift = tl.where(g < 2.0**-62, 2.0**64, 1.0)
        s, _s8 = _two_level_scale(block_amax, g, lift, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC)
        v = _min(tl.div_rn(a, tl.broadcast_to(tl.where(s == 0, 1.0, s)[:, None], [TILE, CHUNK])), QMAX)
        y = _round_float(v, u, MIN_EXPONENT, MANTISSA) * s[:, None]
    elif ELEMENT == "int":
        zero = block_amax < TINY_AMAX
        s = _scale(QMAX, tl.where(zero, 1.0, block_amax))
        v = x * _each(s)
        t = tl.where(v < 0, _min(-v, -LOW), _min(v, HIGH))
        half = _quotient(_round_steps(t, u), _each(s + s), _each(_reciprocal(s + s)))
        y = half * _each(tl.where(zero, 0.0, 2.0))
    else:
        s = _scale(QMAX, tl.where(block_amax <= TINY_AMAX, 1.0, block_amax))
        q = _round_float(_min(a * _each(s), QMAX), u, MIN_EXPONENT, MANTISSA)
        y = q * _each(tl.div_rn(1.0, s))

    tl.store(out, _with_sign_of(y, x).to(out_base.dtype.element_ty), mask=mask)
