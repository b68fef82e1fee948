# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""Packing: `fq_transforms.ops.pack.reference.pack_reference`, bit for bit.

Packing writes less than the forward kernel does, so instructions bound it before memory does. A thread therefore keeps
all that belongs together: a strand of BLOCKS chunks of CHUNK weights along `in`, whose scales, codes and words never
leave its registers. A piece is what a thread loads at once. Pieces are loaded as rows, the first of every strand first:
Triton gives a row to a thread, and when each has one, the next rows to the same threads. So with as many strands as
threads a strand lies in one. Then tiles are [BLOCKS, PIECES, TILE, PIECE], a strand to each of TILE.

NOTE rounding to a code: t = a + power * 2**(23 - MANTISSA) ends in the integer a / spacing, rounded, with the exponent
of a above it. The code is that integer and the exponent's steps, bits(t) + (bits(t) >> (23 - MANTISSA)), up to a number
that is the same for all; OFFSET, added to t in units of its last place, makes it a multiple of 2**BITS.

NOTE three binades: E2M1 and E2M3 have only three, in each of which the code is linear in the magnitude; from one to
the next it grows more slowly, so the code is the smallest of the three lines, each rounded. Logic has half the
throughput of arithmetic on the chip: three sums and two minima beat the five operations of the NOTE above.

NOTE words: codes come as the low bits of a sum with a magic number, whose other bits are always the same. So words are
sums of such sums, and the magic numbers are taken off once a word.

NOTE three parts: E2M1's codes are 0 .. 4 for magnitudes 0 .. 2, then 4 .. 6 for 2 .. 4 and 6, 7 for 4 and 6, linear in
each. So a code is 4 sat(v/2) + 2 sat(v/2 - 1) + sat(v/2 - 2), rounded, where sat, between 0 and 1, is a modifier of an
instruction. Each part begins at an even number, so ties go to the even code, and what is larger saturates by itself. It
takes no logic, where three lines and the larger magnitudes take three minima.

NOTE quotient in two steps: with 1 / b = high + low, v = fma(a, high, a * low) is on the same side of every tie of E2M1
as the rounded quotient a / b, and is the tie where that is. It hangs on low's last bit: of the series rest + rest**2,
rest = 1 - b * high, the first term is too little for b = 2 - 2**-23, the second may be lost in rounding, and twice the
second is right. tests/ops/test_device.py shows so for all fp32 significands and all errors of a reciprocal. Where v / 2
overflows, a * low may be infinite with either sign, which the magnitude of v does not show.

NOTE signs of a word: a byte permutation takes two weights' signs, spread over a byte each. Eight weights give a word of
the even ones' signs and one of the odd ones', which are in the low and the high half of each byte of codes.

NOTE no code: where the scale of a granule is NaN its codes are bits without a meaning, which stay within the granule. A
NaN under a static scale becomes NaN in FP8, else the largest value or the lowest integer.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import (
    INTERPRETED,
    SMALLEST_DIVISOR,
    address,
    bits_of,
    expert_scale,
    float_of,
    fp32_scale,
    granule_amax,
    largest,
    mx_exponent,
    over_int_scale,
    power_of_two,
    reciprocal,
    two_level_scale,
    valid,
)

__all__ = ["pack_kernel", "pack_scale_kernel"]

# 1.5 * 2**23: added to a small number of either sign, it leaves the rounded integer in the low bits.
MAGIC = tl.constexpr(12582912)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def pack_scale_kernel(
    amax_ptr, scale_ptr, count, KIND: tl.constexpr, DIVIDES: tl.constexpr, QMAX: tl.constexpr, TILE: tl.constexpr
):
    """`pack_scales`, one number per amax: for integers, for floats, or the global one of two levels."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    amax = tl.abs(valid(tl.load(amax_ptr + i, mask=i < count, other=1.0)))  # abs: -0.0 is a zero
    if KIND == "global":
        scale = expert_scale(amax, QMAX, DIVIDES)
    elif KIND == "int":
        s, is_tiny = fp32_scale(amax, "int", QMAX, DIVIDES)
        scale = tl.where(is_tiny, 0.0, s)
    else:
        s, _is_tiny = fp32_scale(amax, "float", QMAX, DIVIDES)
        scale = tl.div_rn(1.0, s)
    tl.store(scale_ptr + i, scale, mask=i < count)


@triton.jit
def _each(granule):
    """A block's number [TILE, BLOCKS], shaped to meet its weights; one number for the whole expert stays a scalar."""
    return granule.permute(1, 0)[:, None, :, None] if len(granule.shape) == 2 else granule


@triton.jit
def _strands(
    out_features,
    in_features,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Where this program's weights are, and what they belong to.

    Of the pieces [BLOCKS * PIECES * TILE, PIECE]: base (int64), offsets, which weights exist, and where their codes
    are, in weights. Of the strands [TILE]: which exist, and where the first code is. Of the blocks [TILE, BLOCKS]: the
    granule, and which begin it.
    """
    STRAND: tl.constexpr = BLOCKS * CHUNK
    block = tl.program_id(0)
    c = tl.arange(0, TILE)
    r = tl.arange(0, STRAND // PIECE * TILE)
    piece_c = (r % TILE)[:, None]
    j = (r // TILE * PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
    if TRANSPOSED:  # memory is [in, out]: a program takes CHUNK inputs of TILE neighbouring outputs
        tiles = tl.cdiv(out_features, TILE)
        first = (block % tiles) * TILE
        start = (block // tiles) * CHUNK
        base = start.to(tl.int64) * out_features + first
        row = first + c
        column = start + c * 0
        offsets = j * out_features + piece_c
        codes = piece_c.to(tl.int64) * in_features + j
        origin = first.to(tl.int64) * in_features + start
        exists = row < out_features
        mask = (first + piece_c < out_features) & (start + j < in_features)
        place = origin + c.to(tl.int64) * in_features
    else:
        strand = block * TILE + c
        strands = out_features * (in_features // CHUNK) // BLOCKS
        base = block.to(tl.int64) * (TILE * STRAND)
        offsets = piece_c * STRAND + j
        codes = offsets
        origin = base
        exists = strand < strands
        mask = (block * TILE + piece_c < strands) & (j >= 0)
        place = base + c * STRAND
        chunks_a_row = in_features // CHUNK
        row = strand // chunks_a_row
        column = (strand - row * chunks_a_row) * CHUNK
    if ROWS == 1 and COLUMNS == CHUNK and not TRANSPOSED:  # blocks follow each other in memory, as the strands do
        granule = strand[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        begins = exists[:, None]
    else:
        granule = row * 0 if ROWS == 0 else (row // ROWS) * columns
        begins = exists
        if COLUMNS != 0:
            granule += column // COLUMNS
            begins = exists & (column % COLUMNS == 0)
        granule = granule[:, None]
        begins = begins[:, None]
    # Written so that a strand's scales are seen to be aligned.
    granule = tl.program_id(1).to(tl.int64) * (rows * columns // BLOCKS * BLOCKS) + granule
    return base, offsets, mask, origin + codes, exists, place, granule, begins


@triton.jit
def _widened(x, PAIRS: tl.constexpr):
    """As fp32. Where a thread has PAIRS of bf16, fp32's high half, each pair takes two instructions and not three.

    Under MX scales it costs more than it saves: magnitudes and signs, which are free in other instructions else, become
    logic of their own (H200: MXFP6 fell from 0.95 of the floor to 0.78).
    """
    if PAIRS and x.dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _block_amax(a):
    """Maximum of the magnitudes of each block [TILE, BLOCKS]; NaN if one is NaN or infinite."""
    block_amax = largest(largest(a, 3), 1).permute(1, 0)
    return tl.fma(block_amax, 0.0, block_amax)


@triton.jit
def _magnitude_codes(a, BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Codes of the nearest values to magnitudes a, ties to even, in the low bits of MAGIC_BITS."""
    if MIN_EXPONENT == 1:  # values are evenly spaced; the OFFSET below may be odd, which would move ties
        return bits_of(tl.fma(a, 2.0 ** (MANTISSA - 1), MAGIC))
    elif MIN_EXPONENT == 0 and BITS == MANTISSA + 3:  # see NOTE three binades
        t = tl.fma(a, 2.0**MANTISSA, MAGIC)
        t = tl.minimum(t, tl.fma(a, 2.0 ** (MANTISSA - 1), MAGIC + 2.0**MANTISSA))
        t = tl.minimum(t, tl.fma(a, 2.0 ** (MANTISSA - 2), MAGIC + 2.0 ** (MANTISSA + 1)))
        return bits_of(t)
    else:  # see NOTE rounding to a code
        OFFSET: tl.constexpr = (-((MIN_EXPONENT + 150 - MANTISSA) << MANTISSA)) % (1 << BITS)
        power = tl.maximum(float_of(bits_of(a) & 0x7F800000), 2.0**MIN_EXPONENT)
        t = bits_of(tl.fma(power, 2.0 ** (23 - MANTISSA) + OFFSET * 2.0**-MANTISSA, a))
        return ((t + (t >> (23 - MANTISSA))) & ((1 << (BITS - 1)) - 1)) | MAGIC_BITS


@triton.jit
def _sign_bit(x, BITS: tl.constexpr):
    """The sign of x, as the highest of BITS."""
    return (bits_of(x) >> (32 - BITS)) & (1 << (BITS - 1))


@triton.jit
def _byte_codes(y, QMAX: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Codes of eight bits, y saturated and rounded to nearest even: by the hardware where it has the element."""
    if MANTISSA == 3 and QMAX == 448.0 and not INTERPRETED:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif MANTISSA == 2 and QMAX == 57344.0 and not INTERPRETED:
        return y.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif MIN_EXPONENT == 1 and MANTISSA == 7:  # E0M7, in two's complement
        return bits_of(tl.fma(tl.minimum(tl.maximum(y, -QMAX), QMAX), 64.0, MAGIC)).to(tl.uint8)
    else:  # the interpreter rounds subnormals wrongly
        codes = _magnitude_codes(tl.minimum(tl.abs(y), QMAX), 8, MIN_EXPONENT, MANTISSA) | _sign_bit(y, 8)
        return tl.where(tl.abs(y) >= 0, codes, 127).to(tl.uint8)


@triton.jit
def _join(codes, BITS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT codes along the last axis to one number, the first the lowest; see NOTE words."""
    MAGICS: tl.constexpr = MAGIC_BITS * ((2 ** (BITS * COUNT) - 1) // (2**BITS - 1)) % 2**32
    words = tl.sum(codes << (BITS * tl.arange(0, COUNT)), axis=len(codes.shape) - 1)
    return words - (MAGICS - 2**32 if MAGICS >= 2**31 else MAGICS)


@triton.jit
def _bytes(a, b, SELECTOR: tl.constexpr):
    """A word of four bytes, by SELECTOR's nibbles, the lowest first: 0..3 are a's, 4..7 b's, 8 more for their signs."""
    if INTERPRETED:
        word = a * 0
        for i in tl.static_range(4):
            PICK: tl.constexpr = SELECTOR >> (4 * i) & 15
            byte = (b if PICK & 4 else a) << (24 - 8 * (PICK & 3)) >> (31 if PICK & 8 else 24)
            word |= (byte & 0xFF) << (8 * i)
        return word
    else:
        return tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, $2, {SELECTOR};", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _halves(x):
    """The even numbers along the last axis, and the odd ones."""
    return tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2))


@triton.jit
def _sign_bytes(x):
    """The signs of four numbers along the last axis, a byte each, in a word."""
    even, odd = _halves(bits_of(x))
    first, second = _halves(_bytes(even, odd, 0xFBFB))
    return _bytes(first, second, 0x5410).reshape(x.shape[0], x.shape[1], x.shape[2])


@triton.jit
def _signs(x, COUNT: tl.constexpr):
    """The signs of COUNT numbers along the last axis, each the highest of its four bits, in a word."""
    if COUNT == 8:  # see NOTE signs of a word
        even, odd = _halves(x)
        return (_sign_bytes(even) & 0x08080808) | (_sign_bytes(odd) & -0x7F7F7F80)
    else:
        return tl.sum(_sign_bit(x, 4) << (4 * tl.arange(0, COUNT)), axis=len(x.shape) - 1)


@triton.jit
def _store_words(
    codes_ptr,
    codes,
    x,
    place,
    exists,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Codes of less than a byte [BLOCKS, PIECES, TILE, PIECE], a strand to consecutive words of memory.

    With SIGNED they are those of magnitudes, and get the signs of x. PIECES are those of a strand. Rows of codes have
    no padding, and a strand is a power of two of weights within one, so its words are aligned.
    """
    if BITS == 4:
        words = _join(codes, 4, PIECE)
        if SIGNED:
            words |= _signs(x, PIECE)
        words = words.permute(2, 0, 1).reshape(TILE, PIECES)
        word_type: tl.constexpr = tl.int32 if PIECE == 8 else tl.int16 if PIECE == 4 else tl.int8
        at = codes_ptr.to(tl.pointer_type(word_type), bitcast=True) + (place // PIECE)[:, None]
        tl.store(at + tl.arange(0, PIECES)[None, :], words.to(word_type), mask=exists[:, None])
    else:
        QUADS: tl.constexpr = PIECES * PIECE // 4
        codes |= _sign_bit(x, 6)  # no integer has six
        quads = _join(codes.reshape(codes.shape[0], codes.shape[1], TILE, PIECE // 4, 4), 6, 4)
        quads = quads.permute(2, 0, 1, 3).reshape(TILE, QUADS)
        if QUADS == 8:  # 32 codes: four times 48 bits to three words of 64
            low, high = tl.split(quads.reshape(TILE, 4, 2))
            even, odd = tl.split((low.to(tl.int64) | high.to(tl.int64) << 24).reshape(TILE, 2, 2))
            a, c = tl.split(even)
            b, d = tl.split(odd)
            at = codes_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + place // 32 * 3
            tl.store(at, a | b << 48, mask=exists)
            tl.store(at + 1, b >> 16 | c << 32, mask=exists)
            tl.store(at + 2, c >> 32 | d << 16, mask=exists)
        else:
            at = codes_ptr + (place // 4 * 3)[:, None] + 3 * tl.arange(0, QUADS)[None, :]
            for byte in tl.static_range(3):
                tl.store(at + byte, (quads >> (8 * byte)).to(tl.uint8), mask=exists[:, None])


@triton.jit
def _saturated(x):
    """X between 0 and 1, NaN to 0: a modifier of the instruction that made x."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _split_reciprocal(b, approximate):
    """1 / b as the sum of two numbers, for 2**-78 <= 1 / b <= 2**126; see NOTE quotient in two steps."""
    high = tl.fma(tl.fma(approximate, -b, 1.0), approximate, approximate)
    rest = tl.fma(high, -b, 1.0)
    return high, high * tl.fma(rest + rest, rest, rest)


@triton.jit
def _half_quotient_codes(x, high, low):
    """E2M1 codes of magnitudes of 2 * x * (high + low), in the low bits of MAGIC_BITS; see NOTE three parts."""
    half = tl.abs(tl.fma(x, high, x * low))
    t = tl.fma(_saturated(half), 4.0, MAGIC)
    t = tl.fma(_saturated(half - 1.0), 2.0, t)
    return bits_of(_saturated(half - 2.0) + t)


@triton.jit
def _two_level_codes(
    x,
    block_amax,
    g,
    scale_ptr,
    granule,
    begins,
    LIFTED: tl.constexpr,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    UNIT_SCALE_BELOW: tl.constexpr,
    DYNAMIC: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """E2M1 codes of magnitudes under E4M3 scales, which it stores; under a scale of zero those of 1, under NaN zeros.

    With LIFTED, for a g so small or large that a step of a quotient would leave fp32's normal range, x and its scale
    are multiplied by a power of two.
    """
    lift = 1.0
    if LIFTED:
        lift = tl.where((g > 1.0) == DIVIDES, 2.0**64, 2.0**-64)
    s, s8 = two_level_scale(block_amax, g, lift, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES)
    is_zero = g == (float("inf") if DIVIDES else 0.0)
    s8 = tl.where(block_amax == 0, 0.0, tl.where(is_zero, block_amax * 0.0, s8))
    tl.store(scale_ptr + granule, _byte_codes(s8, 448.0, -6, 3), mask=begins)
    s = tl.where(s == 0, 1.0, s)
    if LIFTED or not DYNAMIC:  # else nothing is infinite, or the scale is NaN
        x = tl.minimum(tl.abs(x), _each(tl.maximum(QMAX * s, 0.0))) * lift
    twice = tl.maximum(s * lift, SMALLEST_DIVISOR) * 2.0
    high, low = _split_reciprocal(twice, reciprocal(twice))
    return _half_quotient_codes(x, _each(high), _each(low))


@triton.jit
def pack_kernel(
    weight_base,
    weight_table,
    weight_stride,
    codes_base,
    codes_table,
    codes_stride,
    amax_ptr,
    global_scale_ptr,
    scale_ptr,
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
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`pack_reference`, a tile at a time: codes, and scales where each block along `in` has its own."""
    base, offsets, mask, codes_offsets, exists, place, granule, begins = _strands(
        out_features, in_features, rows, columns, ROWS, COLUMNS, BLOCKS, CHUNK, PIECE, TILE, TRANSPOSED
    )
    PIECES: tl.constexpr = BLOCKS * (CHUNK // PIECE)
    weight = address(weight_base, weight_table, weight_stride, ALIGNED) + base + offsets
    codes_ptr = codes_base + tl.program_id(1).to(tl.int64) * codes_stride
    x = _widened(tl.load(weight, mask=mask, other=0.0), not TRANSPOSED and SCALE != "e8m0")
    x = x.reshape(BLOCKS, CHUNK // PIECE, TILE, PIECE)
    if DYNAMIC:
        block_amax = _block_amax(tl.abs(x))
    else:
        block_amax = granule_amax(x, amax_ptr, granule, exists[:, None], False, ROWS, COLUMNS)

    if SCALE == "e8m0":
        e = mx_exponent(block_amax, EXPONENT_ROUNDING, MAX_BITS, MANTISSA)
        tl.store(scale_ptr + granule, tl.where(block_amax >= 0, e + 127, 255).to(tl.uint8), mask=begins)
        factor = _each(power_of_two(-e))
        if BITS == 8:
            codes = _byte_codes(x * factor, QMAX, MIN_EXPONENT, MANTISSA)
        else:
            a = tl.abs(x) * factor
            if EXPONENT_ROUNDING != "up":  # rounded up, none is larger
                a = tl.minimum(a, QMAX)
            codes = _magnitude_codes(a, BITS, MIN_EXPONENT, MANTISSA)
    elif SCALE == "e4m3":
        g = tl.load(global_scale_ptr + tl.program_id(1))
        if (g < 2.0**-62) | (g > 2.0**62):  # leaves at once, as in the forward kernel
            codes = _two_level_codes(
                x, block_amax, g, scale_ptr, granule, begins, True, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES
            )
            _store_words(codes_ptr, codes, x, place, exists, True, BITS, PIECES, PIECE, TILE)
            return
        codes = _two_level_codes(
            x, block_amax, g, scale_ptr, granule, begins, False, QMAX, MIN_SCALE, UNIT_SCALE_BELOW, DYNAMIC, DIVIDES
        )
    elif ELEMENT == "int":
        s, is_tiny = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        if ROWS == 1 and COLUMNS != 0:
            tl.store(scale_ptr + granule, tl.where(is_tiny, 0.0, s), mask=begins)
        v = tl.minimum(tl.maximum(over_int_scale(x, _each(s), False, DIVIDES), LOW), HIGH)
        codes = bits_of(v + (MAGIC + 8 if BITS == 4 else MAGIC))
    else:
        s, _is_tiny = fp32_scale(block_amax, ELEMENT, QMAX, DIVIDES)
        if BITS == 8:
            codes = _byte_codes(x * _each(s), QMAX, MIN_EXPONENT, MANTISSA)
        else:
            a = tl.minimum(tl.abs(x * _each(s)), QMAX)
            codes = _magnitude_codes(a, BITS, MIN_EXPONENT, MANTISSA)

    if BITS == 8:
        codes = codes.to(codes_ptr.dtype.element_ty).reshape(PIECES * TILE, PIECE)
        tl.store(codes_ptr + codes_offsets, codes, mask=mask)
    else:
        _store_words(codes_ptr, codes, x, place, exists, ELEMENT != "int", BITS, PIECES, PIECE, TILE)
