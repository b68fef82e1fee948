# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""What the kernels share: bits, rounding, quotients, the chain from amax to scale, and where a program's weights are.

A program works on one expert, on TILE chunks of CHUNK weights; the weights of a chunk lie along `in` and share one
scale, so scales are computed once per chunk. Formats enter as constexpr numbers only (`launch.constants_of`).

NOTE magic rounding: for 0 <= a < 2**k, (a + M) - M with M = 2**23 * spacing rounds a to a multiple of the spacing, ties
to even, in two additions. It needs fp contraction off, or a preceding product is fused into the first of them.

NOTE exact quotients: an approximate quotient, corrected once by its fma residual, is the correctly rounded one but for
rare cases. That it is so for every integer quotient, and on the right side of every rounding boundary of E4M3 and E2M1,
is shown exhaustively over all fp32 significands by tests/ops/test_device.py.

NOTE signs: rounding is done on magnitudes; the sign bit of the weight is put back at the end, on zeros too.
"""

import triton
import triton.language as tl

# Below ModelOpt's threshold a granule counts as zero; the reference has the same number.
TINY_AMAX = tl.constexpr(2.0**-24)

# Stands in for a divisor of zero, under which every dividend is zero too.
SMALLEST_DIVISOR = tl.constexpr(2.0**-120)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bits_of(x):
    """The bits of fp32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The fp32 of some bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def min_or_nan(x, y):
    """The smaller one, NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, y):
    """The larger one, NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(a, AXIS: tl.constexpr):
    """Maximum of magnitudes along an axis, NaN if there is one."""
    if INTERPRETED:  # which would call max_or_nan once per element
        return float_of(tl.max(bits_of(a), axis=AXIS))
    else:
        return tl.reduce(a, AXIS, max_or_nan)


@triton.jit
def with_sign_of(magnitude, x):
    """The magnitude, with the sign bit of x."""
    return float_of(bits_of(magnitude) | (bits_of(x) & -2147483648))


@triton.jit
def round_magnitude(a, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Nearest value of a small float to a, 0 <= a <= its largest value and half a step, ties to even."""
    power = tl.maximum(float_of(bits_of(a) & 0x7F800000), 2.0**MIN_EXPONENT)
    return tl.fma(power, -(2.0 ** (23 - MANTISSA)), tl.fma(power, 2.0 ** (23 - MANTISSA), a))


@triton.jit
def round_integer(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """rint(v) within LOW..HIGH; loses the sign of zero."""
    v = min_or_nan(max_or_nan(v, LOW), HIGH)
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: right for both signs


@triton.jit
def power_of_two(e):
    """2.0**e for -127 <= e <= 127, exactly."""
    return float_of(tl.where(e == -127, 1 << 22, (e + 127) << 23))


@triton.jit
def reciprocal(x):
    """1 / x within two units in the last place, for 2**-126 <= abs(x) <= 2**126."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def quotient(a, b, approximate):
    """The quotient a / b, rounded as a division is, from an approximate 1 / b; see NOTE exact quotients."""
    q = a * approximate
    return tl.fma(tl.fma(q, -b, a), approximate, q)


@triton.jit
def each(granule):
    """A chunk's number, shaped to meet its weights; one number for the whole expert stays a scalar."""
    return granule[:, None] if len(granule.shape) == 1 else granule


# From amax to scale. A scale is what the reference's formulas call s.


@triton.jit
def valid(amax):
    """The amax, NaN where it is none."""
    return tl.where(amax >= 0, tl.where(amax < float("inf"), amax, float("nan")), float("nan"))


@triton.jit
def granule_amax(a, amax_ptr, granule, exists, DYNAMIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The amax of each chunk's granule, NaN if it is none; one number where it is the whole expert."""
    if DYNAMIC:
        block_amax = largest(a, 1)
        return tl.fma(block_amax, 0.0, block_amax)  # infinity to NaN
    elif ROWS != 0 or COLUMNS != 0:
        return valid(tl.load(amax_ptr + granule, mask=exists, other=0.0))
    else:
        return valid(tl.load(amax_ptr + tl.program_id(1)))


@triton.jit
def qmax_over(QMAX: tl.constexpr, amax):
    """QMAX / amax, correctly rounded, for amax >= 2**-24; a quarter of both keeps the reciprocal normal."""
    quarter = amax * 0.25
    return quotient(QMAX * 0.25, quarter, reciprocal(quarter))


@triton.jit
def fp32_scale(block_amax, ELEMENT: tl.constexpr, QMAX: tl.constexpr, DIVIDES: tl.constexpr):
    """Scale of a granule, that of amax = 1 where its own is too small; and where that is."""
    is_tiny = block_amax < TINY_AMAX if ELEMENT == "int" else block_amax <= TINY_AMAX
    amax = tl.where(is_tiny, 1.0, block_amax)
    if ELEMENT == "int" and not DIVIDES:
        return tl.div_rn(amax, QMAX), is_tiny
    else:
        return qmax_over(QMAX, amax), is_tiny


@triton.jit
def over_int_scale(x, s, EXACT: tl.constexpr, DIVIDES: tl.constexpr):
    """Weights in steps of an integer's scale, beyond 256 only that they are, unless EXACT: see NOTE exact quotients."""
    if DIVIDES:
        return x * s
    elif EXACT:
        return tl.div_rn(x, tl.broadcast_to(s, x.shape))
    else:
        end = min_or_nan(256.0 * s, 3.4028234663852886e38)
        once = reciprocal(s)
        once = tl.fma(tl.fma(once, -s, 1.0), once, once)  # without, 92.5 steps of one scale in 2**23 become 92
        return quotient(min_or_nan(max_or_nan(x, -end), end), s, once)


@triton.jit
def mx_exponent(block_amax, ROUNDING: tl.constexpr, MAX_BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """Exponent of a block's scale, from the bits of its amax, within what E8M0 holds."""
    bits = bits_of(block_amax)
    if ROUNDING == "up":
        above = MAX_BITS & 0x7FFFFF
        if MAX_BITS >> 23 == 127:  # as in the reference; a larger max has the smallest exponent for all subnormals
            above = tl.where(bits < 0x800000, (MAX_BITS & 0x7FFFFF | 0x800000) >> 1, MAX_BITS & 0x7FFFFF)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > above).to(tl.int32)
    elif ROUNDING == "floor":
        exponent = bits >> 23
    else:
        exponent = (bits + (1 << (22 - MANTISSA))) >> 23
    return tl.minimum(tl.maximum(exponent - (MAX_BITS >> 23), -127), 127)


@triton.jit
def expert_scale(amax, QMAX: tl.constexpr, DIVIDES: tl.constexpr):
    """An expert's scale g, of two levels the upper one; infinite where that of amax = 0 divides."""
    if DIVIDES:
        return tl.where(amax == 0, float("inf"), tl.div_rn(1.0, tl.where(amax == 0, 1.0, amax)) * (QMAX * 448.0))
    else:
        return tl.div_rn(amax, QMAX * 448.0)


@triton.jit
def load_expert_scale(amax_ptr, global_amax_ptr, QMAX: tl.constexpr, DYNAMIC: tl.constexpr, DIVIDES: tl.constexpr):
    """The scale of this program's expert."""
    expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
    return expert_scale(valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX, DIVIDES)


@triton.jit
def is_tiny_scale(g, DIVIDES: tl.constexpr):
    """Whether an expert's scales are so small that quotients by them need a LIFT."""
    return g > 2.0**62 if DIVIDES else g < 2.0**-62


@triton.jit
def lift_of(g, DIVIDES: tl.constexpr):
    """What keeps the quotients of a tiny scale from underflow: LIFT of the functions below."""
    return tl.where(is_tiny_scale(g, DIVIDES), 2.0**64, 1.0)


@triton.jit
def effective_scale(s8, g, DIVIDES: tl.constexpr):
    """The scale of blocks that codes are multiplied with."""
    return tl.div_rn(s8, tl.broadcast_to(g, s8.shape)) if DIVIDES else s8 * g


@triton.jit
def unrounded_scale(block_amax, g, QMAX: tl.constexpr, DIVIDES: tl.constexpr):
    """What E4M3 rounds and clamps to the scale of a block, exactly."""
    if DIVIDES:
        return tl.div_rn(block_amax, QMAX) * g
    else:
        return tl.div_rn(block_amax, tl.broadcast_to(QMAX * g, block_amax.shape))


@triton.jit
def two_level_scale(
    block_amax,
    g,
    LIFT,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    DYNAMIC: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """Scale of a block under an expert's scale g, and the E4M3 scale that it is made of.

    Dividends are saturated first, so no quotient overflows; with LIFT = 2**64 for a tiny g, none underflows either.
    """
    if DIVIDES:
        s8 = min_or_nan(unrounded_scale(block_amax, g, QMAX, DIVIDES), 448.0)
    else:
        d = QMAX * g
        lifted = max_or_nan(d * LIFT, SMALLEST_DIVISOR)
        s8 = quotient(min_or_nan(block_amax, 448.0 * d) * LIFT, lifted, reciprocal(lifted))
    s8 = round_magnitude(max_or_nan(s8, MIN_SCALE), -6, 3)
    if DIVIDES:  # an infinite g is that of a zero, and has no product with one
        s8 = tl.where(g == float("inf"), block_amax * 0.0, s8)
    s = effective_scale(s8, g, DIVIDES)
    if UNIT_SCALE_BELOW != 0:
        s = tl.where(s < UNIT_SCALE_BELOW, 1.0, s)
    if DIVIDES:
        s = tl.where(block_amax == 0, s * 0.0, tl.where(g == float("inf"), s * 0.0, s))
    elif not DYNAMIC or UNIT_SCALE_BELOW != 0:
        s = tl.where(block_amax == 0, g * 0.0, tl.where(g == 0, block_amax * 0.0, s))
    return s, s8


@triton.jit
def fake_quantized(
    x,
    block_amax,
    u,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    QMAX: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    EXPONENT_ROUNDING: tl.constexpr,
    MAX_BITS: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """Fake-quantized weights of chunks under one level of scales, in fp32: the nearest if u is None, else at random."""
    a = tl.abs(x)
    if SCALE == "e8m0":
        e = mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
        scale = tl.where(block_amax >= 0, power_of_two(e), float("nan"))
        q = round_element(min_or_nan(a * power_of_two(-e)[:, None], QMAX), u, MIN_EXPONENT, MANTISSA)
        y = q * scale[:, None]
    elif ELEMENT == "int":
        s, is_tiny = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        v = over_int_scale(x, each(s), u is not None, DIVIDES)
        if u is None:
            q = round_integer(v, LOW, HIGH)
        else:
            q = round_steps(tl.where(v < 0, min_or_nan(-v, -LOW), min_or_nan(v, HIGH)), u)
        if DIVIDES:
            half = quotient(q, each(s + s), each(reciprocal(s + s)))  # q / s may overflow where its half does not
            y = half * each(tl.where(is_tiny, 0.0, 2.0))
        else:
            y = q * each(tl.where(is_tiny, 0.0, s))
    else:
        s, _is_tiny = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        q = round_element(min_or_nan(a * each(s), QMAX), u, MIN_EXPONENT, MANTISSA)
        y = q * each(tl.div_rn(1.0, s))
    return with_sign_of(y, x)


@triton.jit
def fake_quantized_two_level(
    x,
    block_amax,
    g,
    LIFT,
    u,
    QMAX: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    DYNAMIC: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """`fake_quantized` under two levels of scales; and the scale of each block.

    A quotient that is rounded to the nearest need only be on the right side of the boundaries between values; at random
    each of its bits may decide, so there elements are divided exactly.
    """
    s, _s8 = two_level_scale(block_amax, g, LIFT, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES)
    a = tl.abs(x)
    if u is None:
        lifted = max_or_nan(s * LIFT, SMALLEST_DIVISOR)
        v = quotient(min_or_nan(a, each(QMAX * s)) * LIFT, each(lifted), each(reciprocal(lifted)))
    else:
        v = min_or_nan(tl.div_rn(a, tl.broadcast_to(tl.where(s == 0, 1.0, s)[:, None], a.shape)), QMAX)
    return with_sign_of(round_element(v, u, MIN_EXPONENT, MANTISSA) * each(s), x), s


# Rounding at random.

# How far fp32 carries a value of a format through its own scale; the reference has the same number.
ON_GRID = tl.constexpr(2.0**-22)


@triton.jit
def round_steps(t, u):
    """0 <= t < 2**22 to an integer beside it, or that which it is."""
    nearest = (t + 8388608.0) - 8388608.0  # 2**23
    lower = tl.floor(t)
    chosen = tl.where(t - lower >= u, lower + 1.0, lower)
    return tl.where(tl.abs(t - nearest) <= t * ON_GRID, nearest, chosen)


@triton.jit
def round_element(a, u, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """A value of a small float beside a, 0 <= a <= its largest value: the nearest if u is None, else at random."""
    if u is None:
        return round_magnitude(a, MIN_EXPONENT, MANTISSA)
    else:
        power = tl.maximum(float_of(bits_of(a) & 0x7F800000), 2.0**MIN_EXPONENT)
        inverse = float_of(0x7F000000 - bits_of(power))
        return round_steps(a * (inverse * 2.0**MANTISSA), u) * (power * 2.0**-MANTISSA)


# Where a program's weights are.


@triton.jit
def address(base, table, stride, ALIGNED: tl.constexpr):
    """Where this program's expert begins: `stride` elements after its neighbour, or where the table says."""
    if table is None:
        return base + tl.program_id(1).to(tl.int64) * stride
    else:
        pointer = tl.load(table + tl.program_id(1)).to(base.dtype)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer


@triton.jit
def chunks(
    out_features,
    in_features,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """This program's [TILE, CHUNK] weights: base (int64), offsets, which exist.

    And of the chunks [TILE]: which exist, their granules (int64), and the row and column at which they begin. A granule
    is ROWS x COLUMNS weights, 0 for the whole extent; there are rows x columns of them in a weight.
    """
    block = tl.program_id(0)
    c = tl.arange(0, TILE)
    j = tl.arange(0, CHUNK)
    if TRANSPOSED:  # memory is [in, out]: a program takes CHUNK inputs of TILE neighbouring outputs
        tiles = tl.cdiv(out_features, TILE)
        first = (block % tiles) * TILE
        column = (block // tiles) * CHUNK
        base = column.to(tl.int64) * out_features + first
        row = first + c
        column = column + c * 0
        offsets = j[None, :] * out_features + c[:, None]
        exists = row < out_features
        mask = exists[:, None] & ((column[:, None] + j[None, :]) < in_features)
    else:
        chunks_per_row = in_features // CHUNK
        chunk = block * TILE + c
        base = block.to(tl.int64) * (TILE * CHUNK)
        row = chunk // chunks_per_row
        column = (chunk - row * chunks_per_row) * CHUNK
        offsets = c[:, None] * CHUNK + j[None, :]
        exists = chunk < out_features * chunks_per_row
        mask = exists[:, None] & (j >= 0)[None, :]
    if ROWS == 1 and COLUMNS == CHUNK and not TRANSPOSED:
        granule = chunk
    else:
        granule = row * 0 if ROWS == 0 else (row // ROWS) * columns
        if COLUMNS != 0:
            granule += column // COLUMNS
    return base, offsets, mask, exists, tl.program_id(1).to(tl.int64) * rows * columns + granule, row, column
