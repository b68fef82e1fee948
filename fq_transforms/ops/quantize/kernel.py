# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""Triton kernels over the N separate weights of a group, in one launch each.

Every kernel equals `fq_transforms.ops.quantize.reference` bit for bit. A program works on one expert, on TILE chunks of CHUNK
weights; the weights of a chunk lie along `in` and share one scale, so scales are computed once a chunk. Formats enter
as constexpr numbers only. `fq_transforms.ops.launch` has the launchers.

NOTE magic rounding: for 0 <= a < 2**k, (a + M) - M with M = 2**23 * spacing rounds a to a multiple of the spacing, ties
to even, in two additions. It needs fp contraction off, or a preceding product is fused into the first of them.

NOTE exact quotients: an approximate quotient, corrected once by its fma residual, is the correctly rounded one but for
rare cases. That it is so for every integer quotient, and on the right side of every rounding boundary of E4M3 and E2M1,
is shown exhaustively over all fp32 significands by tests/ops/test_device.py.

NOTE signs: rounding is done on magnitudes; the sign bit of the weight is put back at the end, on zeros too.

NOTE integer maxima: the bits of non-negative floats order as the floats do, with NaN above infinity. So amax is an
integer maximum: NaN is kept, atomics are exact, and the order of the programs does not matter.
"""

import triton
import triton.language as tl

__all__ = ["clip_backward_kernel", "expert_amax_kernel", "fake_quantize_kernel", "run_compiled"]

# Below ModelOpt's threshold a granule counts as zero; the reference has the same number.
TINY_AMAX = tl.constexpr(2.0**-24)

# Stands in for a divisor of zero, under which every dividend is zero too.
SMALLEST_DIVISOR = tl.constexpr(2.0**-120)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _min(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(a, AXIS: tl.constexpr):
    """Maximum of magnitudes along an axis, NaN if there is one."""
    if INTERPRETED:  # which would call _max once an element
        return _float(tl.max(_bits(a), axis=AXIS))
    else:
        return tl.reduce(a, AXIS, _max)


@triton.jit
def _with_sign_of(magnitude, x):
    return _float(_bits(magnitude) | (_bits(x) & -2147483648))


@triton.jit
def _round_magnitude(a, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Nearest value of a small float to a, 0 <= a <= its largest value and half a step, ties to even."""
    power = tl.maximum(_float(_bits(a) & 0x7F800000), 2.0**MIN_EXPONENT)
    return tl.fma(power, -(2.0 ** (23 - MANTISSA)), tl.fma(power, 2.0 ** (23 - MANTISSA), a))


@triton.jit
def _round_integer(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """rint(v) within LOW..HIGH; loses the sign of zero."""
    v = _min(_max(v, LOW), HIGH)
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: right for both signs


@triton.jit
def _power_of_two(e):
    """2.0**e for -127 <= e <= 127, exactly."""
    return _float(tl.where(e == -127, 1 << 22, (e + 127) << 23))


@triton.jit
def _reciprocal(x):
    """1 / x within two units in the last place, for 2**-126 <= abs(x) <= 2**126."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _quotient(a, b, reciprocal):
    """The quotient a / b, rounded as a division is; see NOTE exact quotients."""
    q = a * reciprocal
    return tl.fma(tl.fma(q, -b, a), reciprocal, q)


@triton.jit
def _scale(QMAX: tl.constexpr, amax):
    """QMAX / amax, correctly rounded, for amax >= 2**-24; a quarter of both keeps the reciprocal normal."""
    quarter = amax * 0.25
    return _quotient(QMAX * 0.25, quarter, _reciprocal(quarter))


@triton.jit
def _each(granule):
    """A chunk's number, shaped to meet its weights; one number for the whole expert stays a scalar."""
    return granule[:, None] if len(granule.shape) == 1 else granule


@triton.jit
def _two_level_scale(
    block_amax,
    g,
    LIFT,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """Scale of a block under an expert's scale g, and the E4M3 scale that it is made of.

    Dividends are saturated first, so no quotient overflows; with LIFT = 2**64 for a tiny g, none underflows either.
    """
    d = QMAX * g
    lifted = _max(d * LIFT, SMALLEST_DIVISOR)
    s8 = _max(_quotient(_min(block_amax, 448.0 * d) * LIFT, lifted, _reciprocal(lifted)), MIN_SCALE)
    s8 = _round_magnitude(s8, -6, 3)
    s = s8 * g
    if UNIT_SCALE_BELOW != 0:
        s = tl.where(s < UNIT_SCALE_BELOW, 1.0, s)
    if not DYNAMIC or UNIT_SCALE_BELOW != 0:
        s = tl.where(block_amax == 0, g * 0.0, tl.where(g == 0, block_amax * 0.0, s))
    return s, s8


@triton.jit
def _two_level(
    x,
    block_amax,
    g,
    LIFT,
    QMAX: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """Magnitudes of the elements, and their scale."""
    s, _s8 = _two_level_scale(block_amax, g, LIFT, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC)
    lifted = _max(s * LIFT, SMALLEST_DIVISOR)
    dividend = _min(tl.abs(x), _each(QMAX * s)) * LIFT
    v = _quotient(dividend, _each(lifted), _each(_reciprocal(lifted)))
    return _round_magnitude(v, MIN_EXPONENT, MANTISSA), s


@triton.jit
def _valid(amax):
    return tl.where(amax >= 0, tl.where(amax < float("inf"), amax, float("nan")), float("nan"))


@triton.jit
def _chunks(
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
    """This program's [TILE, CHUNK] weights: base (int64), offsets, which exist; and the chunks' own places.

    A granule is ROWS x COLUMNS weights, 0 for the whole extent; there are rows x columns of them in a weight.
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
        chunks_a_row = in_features // CHUNK
        chunk = block * TILE + c
        base = block.to(tl.int64) * (TILE * CHUNK)
        row = chunk // chunks_a_row
        column = (chunk - row * chunks_a_row) * CHUNK
        offsets = c[:, None] * CHUNK + j[None, :]
        exists = chunk < out_features * chunks_a_row
        mask = exists[:, None] & (j >= 0)[None, :]
    if ROWS == 1 and COLUMNS == CHUNK and not TRANSPOSED:
        granule = chunk
    else:
        granule = row * 0 if ROWS == 0 else (row // ROWS) * columns
        if COLUMNS != 0:
            granule += column // COLUMNS
    return base, offsets, mask, exists, tl.program_id(1).to(tl.int64) * rows * columns + granule


@triton.jit
def _address(base, table, stride, ALIGNED: tl.constexpr):
    """Where this program's expert begins: `stride` elements after its neighbour, or where the table says."""
    if table is None:
        return base + tl.program_id(1).to(tl.int64) * stride
    else:
        pointer = tl.load(table + tl.program_id(1)).to(base.dtype)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer


@triton.jit
def _granule_amax(a, amax_ptr, granule, exists, DYNAMIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The amax of each chunk's granule, NaN if it is none; one number where it is the whole expert."""
    if DYNAMIC:
        block_amax = _largest(a, 1)
        return tl.fma(block_amax, 0.0, block_amax)  # infinity to NaN
    elif ROWS != 0 or COLUMNS != 0:
        return _valid(tl.load(amax_ptr + granule, mask=exists, other=0.0))
    else:
        return _valid(tl.load(amax_ptr + tl.program_id(1)))


@triton.jit
def _mx_exponent(block_amax, ROUNDING: tl.constexpr, MAX_BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """Exponent of a block's scale, from the bits of its amax, within what E8M0 holds."""
    bits = _bits(block_amax)
    if ROUNDING == "up":
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > (MAX_BITS & 0x7FFFFF)).to(tl.int32)
    elif ROUNDING == "floor":
        exponent = bits >> 23
    else:
        exponent = (bits + (1 << (22 - MANTISSA))) >> 23
    return tl.minimum(tl.maximum(exponent - (MAX_BITS >> 23), -127), 127)


@triton.jit
def fake_quantize_kernel(
    weight_base,
    weight_table,
    weight_stride,
    out_base,
    out_table,
    out_stride,
    amax_ptr,
    global_amax_ptr,
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
    ALIGNED: tl.constexpr,
):
    """`fake_quantize_reference`, a tile at a time."""
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    out = _address(out_base, out_table, out_stride, ALIGNED) + base + offsets
    x = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)

    block_amax = _granule_amax(a, amax_ptr, granule, exists, DYNAMIC, ROWS, COLUMNS)

    if SCALE == "e8m0":
        e = _mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
        scale = tl.where(block_amax >= 0, _power_of_two(e), float("nan"))
        q = _round_magnitude(_min(a * _power_of_two(-e)[:, None], QMAX), MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * scale[:, None], x)
    elif SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        if g < 2.0**-62:  # leaves at once: joined with the usual case, it would cost each weight an instruction
            q, s = _two_level(
                x, block_amax, g, 2.0**64, QMAX, MIN_EXPONENT, MANTISSA, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC
            )
            tl.store(out, _with_sign_of(q * _each(s), x).to(out_base.dtype.element_ty), mask=mask)
            return
        q, s = _two_level(x, block_amax, g, 1.0, QMAX, MIN_EXPONENT, MANTISSA, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC)
        y = _with_sign_of(q * _each(s), x)
    elif ELEMENT == "int":
        zero = block_amax < TINY_AMAX
        s = _scale(QMAX, tl.where(zero, 1.0, block_amax))
        q = _round_integer(x * _each(s), LOW, HIGH)
        half = _quotient(q, _each(s + s), _each(_reciprocal(s + s)))  # q / s may overflow where its half does not
        y = _with_sign_of(half * _each(tl.where(zero, 0.0, 2.0)), x)
    else:
        s = _scale(QMAX, tl.where(block_amax <= TINY_AMAX, 1.0, block_amax))
        q = _round_magnitude(_min(a * _each(s), QMAX), MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * _each(tl.div_rn(1.0, s)), x)

    tl.store(out, y.to(out_base.dtype.element_ty), mask=mask)


@triton.jit
def _raise_to(maximum, bits):
    """Maximum = max(maximum, bits), by an atomic only where it may change something: one address takes them in turn."""
    tl.atomic_max(maximum, bits, mask=bits > tl.load(maximum), sem="relaxed")


@triton.jit
def expert_amax_kernel(
    weight_base,
    weight_table,
    weight_stride,
    amax_ptr,
    global_amax_ptr,
    out_features,
    in_features,
    rows,
    columns,
    SWEEP: tl.constexpr,
    GLOBAL: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program sweeps tiles, STEPS of them along memory, or along rows, or down a square block."""
    weight = _address(weight_base, weight_table, weight_stride, ALIGNED)
    expert = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, TILE)
    j = tl.arange(0, CHUNK)
    largest = tl.zeros([TILE, CHUNK], dtype=tl.int32)
    if SWEEP == "rows":  # TILE whole rows
        row = tl.program_id(0) * TILE + c
        start = weight + row.to(tl.int64)[:, None] * in_features + j[None, :]
        for column in range(0, in_features, CHUNK):
            mask = (row < out_features)[:, None] & (column + j < in_features)[None, :]
            x = tl.load(start + column, mask=mask, other=0.0)
            largest = tl.maximum(largest, _bits(tl.abs(x.to(tl.float32))))
        tl.store(amax_ptr + expert * out_features + row, tl.max(largest, axis=1), mask=row < out_features)
    elif SWEEP == "square":  # one block of ROWS x COLUMNS, COLUMNS == CHUNK
        block_row = tl.program_id(0) // columns
        column = (tl.program_id(0) % columns) * COLUMNS + j
        for step in tl.static_range(ROWS // TILE):
            row = block_row * ROWS + step * TILE + c
            mask = (row < out_features)[:, None] & (column < in_features)[None, :]
            x = tl.load(weight + row.to(tl.int64)[:, None] * in_features + column[None, :], mask=mask, other=0.0)
            largest = tl.maximum(largest, _bits(tl.abs(x.to(tl.float32))))
        tl.store(amax_ptr + expert * rows * columns + tl.program_id(0), tl.max(largest))
    elif SWEEP == "scatter":  # matrices stored [in, out], where several programs share a granule
        base, offsets, mask, exists, granule = _chunks(
            out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
        )
        x = tl.load(weight + base + offsets, mask=mask, other=0.0)
        chunk_amax = tl.max(_bits(tl.abs(x.to(tl.float32))), axis=1)
        tl.atomic_max(amax_ptr + granule, chunk_amax, mask=exists, sem="relaxed")
        if GLOBAL:
            _raise_to(global_amax_ptr + expert, tl.max(chunk_amax))
    else:  # along memory: one granule an "expert", or the "blocks" of one chunk each
        chunks = out_features * (in_features // CHUNK)
        largest_chunk = tl.zeros([TILE], dtype=tl.int32)
        for step in tl.static_range(STEPS):
            first = (step * tl.num_programs(0) + tl.program_id(0)) * TILE
            chunk = first + c
            x = tl.load(
                weight + first.to(tl.int64) * CHUNK + c[:, None] * CHUNK + j[None, :],
                mask=(chunk < chunks)[:, None] & (j >= 0)[None, :],
                other=0.0,
            )
            bits = _bits(tl.abs(x.to(tl.float32)))
            if SWEEP == "expert":
                largest = tl.maximum(largest, bits)
            else:
                chunk_amax = tl.max(bits, axis=1)
                tl.store(amax_ptr + expert * chunks + chunk, chunk_amax, mask=chunk < chunks)
                if GLOBAL:
                    largest_chunk = tl.maximum(largest_chunk, chunk_amax)
        if SWEEP == "expert":
            _raise_to(amax_ptr + expert, tl.max(largest))
        elif GLOBAL:
            _raise_to(global_amax_ptr + expert, tl.max(largest_chunk))


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
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_base, weight_table, weight_stride, ALIGNED) + base
    grad = _address(grad_base, grad_table, grad_stride, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=mask, other=0.0)
    amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
    kept = tl.where(tl.abs(x) <= amax[:, None], g, 0.0)
    out = _address(out_base, out_table, out_stride, ALIGNED) + base
    tl.store(out + offsets, kept.to(out_base.dtype.element_ty), mask=mask)


def run_compiled(compiled, grid, stream, arguments):
    """Launch a compiled kernel: `compiled[grid]`, but that profilers' hooks cost nothing where there are none.

    Asking them took 6 of the 67 us that a whole call to `fakequant` took on the host (32 experts).
    """
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    if any(getattr(hook, "calls", True) for hook in hooks):
        compiled[grid](*arguments, stream=stream)
    else:
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
