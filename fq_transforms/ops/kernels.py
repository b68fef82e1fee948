# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""Triton kernels over the N separate weights of a group, one launch each, and their launchers.

Every kernel equals `fq_transforms.ops.reference` bit for bit. The weights are reached through a table of addresses, so
nothing is stacked. A program works on TILE chunks of CHUNK weights; the weights of a chunk lie along `in` and share one
scale, so scales are computed once a chunk. Formats enter as constexpr numbers only.

NOTE magic rounding: for 0 <= a < 2**k, (a + M) - M with M = 2**23 * spacing rounds a to a multiple of the spacing, ties
to even, in two additions. It needs fp contraction off, or a preceding product is fused into the first of them.

NOTE signs: rounding is done on magnitudes; the sign bit of the weight is put back at the end, on zeros too.

NOTE integer maxima: the bits of non-negative floats order as the floats do, with NaN above infinity. So amax is an
integer maximum: NaN is kept, atomics are exact, and the order of the programs does not matter.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fq_transforms.formats import Format, IntElement

__all__ = ["clip_backward_triton", "expert_amax_triton", "fake_quantize_triton"]

# Weights a program works on. 2048 with 4 warps (16 weights a thread, two 16-byte loads in bf16) is the figure that the
# field notes of November 2026 measured at 0.99 of copy_ on an H200; the benchmark's sweep owns this number.
WEIGHTS_PER_PROGRAM = 2048
NUM_WARPS = 4
# Tiles that a program of the amax kernel sweeps before it reduces once.
STEPS = 8

# Below ModelOpt's threshold a granule counts as zero; the reference has the same number.
TINY_AMAX = tl.constexpr(2.0**-24)

# Stands in for a divisor of zero, under which every dividend is zero too.
SMALLEST_DIVISOR = tl.constexpr(2.0**-120)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
def _with_sign_of(magnitude, x):
    return _float(_bits(magnitude) | (_bits(x) & -2147483648))


@triton.jit
def _round_magnitude(a, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Nearest value of a small float to a, 0 <= a <= its largest value and half a step, ties to even."""
    exponent = tl.maximum(_bits(a) & 0x7F800000, (MIN_EXPONENT + 127) << 23)
    magic = _float(exponent + ((23 - MANTISSA) << 23))
    return (a + magic) - magic


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
    return tl.fma(tl.fma(-q, b, a), reciprocal, q)


@triton.jit
def _scale(QMAX: tl.constexpr, amax):
    """QMAX / amax, correctly rounded, for amax >= 2**-24; a quarter of both keeps the reciprocal normal."""
    quarter = amax * 0.25
    return _quotient(QMAX * 0.25, quarter, _reciprocal(quarter))


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
    """This program's [TILE, CHUNK] weights: base (int64), offsets, which exist, which chunks exist, and their granules.

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
def _address(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + tl.program_id(1)).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _fake_quantize_kernel(
    weight_table,
    out_table,
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
    IN_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
):
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_table, IN_DTYPE, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)

    if DYNAMIC:
        block_amax = _float(tl.max(_bits(a), axis=1))
    elif SCALE == "e4m3" or ROWS != 0 or COLUMNS != 0:
        block_amax = _valid(tl.load(amax_ptr + granule, mask=exists, other=0.0))
    else:
        block_amax = _valid(tl.load(amax_ptr + tl.program_id(1)))

    if SCALE == "e8m0":
        bits = _bits(block_amax)
        if EXPONENT_ROUNDING == "up":
            exponent = (bits >> 23) + ((bits & 0x7FFFFF) > (MAX_BITS & 0x7FFFFF)).to(tl.int32)
        elif EXPONENT_ROUNDING == "floor":
            exponent = bits >> 23
        else:
            exponent = (bits + (1 << (22 - MANTISSA))) >> 23
        e = tl.minimum(tl.maximum(exponent - (MAX_BITS >> 23), -127), 127)
        scale = tl.where(block_amax < float("inf"), _power_of_two(e), float("nan"))
        q = _round_magnitude(_min(a * _power_of_two(-e)[:, None], QMAX), MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * scale[:, None], x)
    elif SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        # Dividends are saturated first, so no quotient overflows; tiny divisors are lifted, so none underflows.
        lift = tl.where(g < 2.0**-62, 2.0**64, 1.0)
        d = QMAX * g
        lifted = _max(d * lift, SMALLEST_DIVISOR)
        s8 = _max(_quotient(_min(block_amax, 448.0 * d) * lift, lifted, _reciprocal(lifted)), MIN_SCALE)
        s = _round_magnitude(s8, -6, 3) * g
        if UNIT_SCALE_BELOW != 0:
            s = tl.where(s < UNIT_SCALE_BELOW, 1.0, s)
        if not DYNAMIC or UNIT_SCALE_BELOW != 0:
            s = tl.where(block_amax == 0, 0.0, s)
            s = tl.where(g == 0, 0.0, s)
        lifted = _max(s * lift, SMALLEST_DIVISOR)
        dividend = _min(a, _each(QMAX * s))
        if lift != 1.0:
            dividend *= lift
        v = _quotient(dividend, _each(lifted), _each(_reciprocal(lifted)))
        y = _with_sign_of(_round_magnitude(v, MIN_EXPONENT, MANTISSA) * _each(s), x)
    elif ELEMENT == "int":
        zero = block_amax < TINY_AMAX
        s = _scale(QMAX, tl.where(zero, 1.0, block_amax))
        q = _round_integer(x * _each(tl.where(zero, 0.0, s)), LOW, HIGH)
        half = _quotient(q, _each(s + s), _each(_reciprocal(s + s)))  # q / s may overflow where its half does not
        y = _with_sign_of(half + half, x)
    else:
        s = _scale(QMAX, tl.where(block_amax <= TINY_AMAX, 1.0, block_amax))
        q = _round_magnitude(_min(a * _each(s), QMAX), MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * _each(tl.div_rn(1.0, s)), x)

    out = _address(out_table, OUT_DTYPE, ALIGNED) + base
    tl.store(out + offsets, y.to(OUT_DTYPE), mask=mask)


@triton.jit
def _each(granule):
    """A chunk's number, shaped to meet its weights; one number for the whole expert stays a scalar."""
    return granule[:, None] if len(granule.shape) == 1 else granule


@triton.jit
def _expert_amax_kernel(
    weight_table,
    amax_ptr,
    global_amax_ptr,
    out_features,
    in_features,
    rows,
    columns,
    SWEEP: tl.constexpr,
    GLOBAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    """A program sweeps STEPS tiles: along memory, along a row, or down a square block; who owns a granule stores it."""
    weight = _address(weight_table, IN_DTYPE, ALIGNED)
    expert = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, TILE)
    j = tl.arange(0, CHUNK)
    largest = tl.zeros([TILE, CHUNK], dtype=tl.int32)
    if SWEEP == "memory":  # one granule an expert, or one a chunk
        chunks = out_features * (in_features // CHUNK)
        for step in tl.static_range(STEPS):
            first = (tl.program_id(0) * STEPS + step) * TILE
            chunk = first + c
            x = tl.load(
                weight + first.to(tl.int64) * CHUNK + c[:, None] * CHUNK + j[None, :],
                mask=(chunk < chunks)[:, None] & (j >= 0)[None, :],
                other=0.0,
            )
            bits = _bits(tl.abs(x.to(tl.float32)))
            if COLUMNS != 0:
                tl.store(amax_ptr + expert * chunks + chunk, tl.max(bits, axis=1), mask=chunk < chunks)
            if COLUMNS == 0 or GLOBAL:
                largest = tl.maximum(largest, bits)
        if COLUMNS == 0:
            tl.atomic_max(amax_ptr + expert, tl.max(largest))
        elif GLOBAL:
            tl.atomic_max(global_amax_ptr + expert, tl.max(largest))
    elif SWEEP == "row":  # TILE whole rows
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
    else:  # "scatter": matrices stored [in, out], where several programs share a granule
        base, offsets, mask, exists, granule = _chunks(
            out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
        )
        x = tl.load(weight + base + offsets, mask=mask, other=0.0)
        chunk_amax = tl.max(_bits(tl.abs(x.to(tl.float32))), axis=1)
        tl.atomic_max(amax_ptr + granule, chunk_amax, mask=exists)
        if GLOBAL:
            tl.atomic_max(global_amax_ptr + expert, tl.max(chunk_amax))


@triton.jit
def _clip_backward_kernel(
    grad_table,
    weight_table,
    out_table,
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
    GRAD_DTYPE: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    base, offsets, mask, exists, granule = _chunks(
        out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
    )
    weight = _address(weight_table, IN_DTYPE, ALIGNED) + base
    grad = _address(grad_table, GRAD_DTYPE, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=mask, other=0.0)
    amax = tl.load(amax_ptr + granule, mask=exists, other=0.0)
    kept = tl.where(tl.abs(x) <= amax[:, None], g, 0.0)
    out = _address(out_table, IN_DTYPE, ALIGNED) + base
    tl.store(out + offsets, kept.to(IN_DTYPE), mask=mask)


def fake_quantize_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`fake_quantize_reference` of every weight of a group, in one launch. Each result has memory of its own."""
    weights = [_dense(w) for w in weights]
    outs = [torch.empty_like(w, dtype=out_dtype, memory_format=torch.contiguous_format) for w in weights]
    element = format.element
    is_int = isinstance(element, IntElement)
    blocks, geometry = _geometry(format, *_shape(weights[0], transposed), transposed)
    _launch(
        _fake_quantize_kernel,
        blocks,
        (weights, outs),
        (amax, global_amax),
        geometry,
        ELEMENT="int" if is_int else "float",
        SCALE=format.scale,
        DYNAMIC=format.dynamic,
        QMAX=float(element.qmax if is_int else element.max),
        LOW=float(element.low) if is_int else 0.0,
        HIGH=float(element.high) if is_int else 0.0,
        MIN_EXPONENT=0 if is_int else element.min_exponent,
        MANTISSA=0 if is_int else element.mantissa_bits,
        MIN_SCALE=format.min_scale,
        UNIT_SCALE_BELOW=format.unit_scale_below,
        EXPONENT_ROUNDING=format.exponent_rounding,
        MAX_BITS=0 if is_int else _float_bits(element.max),
        IN_DTYPE=_TRITON_DTYPES[weights[0].dtype],
        OUT_DTYPE=_TRITON_DTYPES[out_dtype],
    )
    return outs


def expert_amax_triton(weights: Sequence[Tensor], *, format: Format, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every weight of a group, in one launch: [N, *amax_shape] and [N] or None."""
    weights = [_dense(w) for w in weights]
    experts, (out_features, in_features) = _experts(weights), _shape(weights[0], transposed)
    # Zero bits are the smallest integer and 0.0: the identity of the integer maximum.
    amax = torch.zeros(
        experts, *format.amax_shape(out_features, in_features), dtype=torch.int32, device=weights[0].device
    )
    is_static_two_level = format.scale == "e4m3" and not format.dynamic
    global_amax = torch.zeros(experts, dtype=torch.int32, device=amax.device) if is_static_two_level else None
    blocks, sweep, geometry = _sweep(format, out_features, in_features, transposed)
    _launch(
        _expert_amax_kernel,
        blocks,
        (weights,),
        (amax, global_amax),
        geometry,
        SWEEP=sweep,
        GLOBAL=is_static_two_level,
        STEPS=STEPS,
        IN_DTYPE=_TRITON_DTYPES[weights[0].dtype],
    )
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def clip_backward_triton(
    grads: Sequence[Tensor], weights: Sequence[Tensor], amax: Tensor, *, format: Format, transposed: bool
) -> list[Tensor]:
    """`clip_backward_reference` of every weight of a group, in one launch."""
    weights, grads = [_dense(w) for w in weights], [_dense(g) for g in grads]
    outs = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    blocks, geometry = _geometry(format, *_shape(weights[0], transposed), transposed)
    _launch(
        _clip_backward_kernel,
        blocks,
        (grads, weights, outs),
        (amax,),
        geometry,
        GRAD_DTYPE=_TRITON_DTYPES[grads[0].dtype],
        IN_DTYPE=_TRITON_DTYPES[weights[0].dtype],
    )
    return outs


class _Geometry(NamedTuple):
    """Numbers of a launch that do not depend on the format's arithmetic, in the order of the kernels' arguments."""

    out_features: int
    in_features: int
    rows: int
    columns: int
    constants: dict[str, Any]


def _geometry(format: Format, out_features: int, in_features: int, transposed: bool) -> tuple[int, _Geometry]:
    """Programs a weight, and the tile of each, for the kernels that visit every weight once."""
    if format.block == (None, None) and transposed:  # one scale an expert: the layout does not matter
        out_features, in_features, transposed = in_features, out_features, False
    rows, columns = (1, 1) if format.dynamic else format.granules(out_features, in_features)
    if format.has_blocks_along_in:
        chunk = format.block[1] or 1
    else:  # a divisor of `in`, so that no chunk crosses a row; transposed tiles mask their edge instead
        chunk = 16 if transposed else min(16, in_features & -in_features)
    tile = max(1, WEIGHTS_PER_PROGRAM // chunk)
    if transposed:
        blocks = triton.cdiv(out_features, tile) * triton.cdiv(in_features, chunk)
    else:
        blocks = triton.cdiv(out_features * (in_features // chunk), tile)
    constants = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "TILE": tile,
        "TRANSPOSED": transposed,
    }
    return blocks, _Geometry(out_features, in_features, rows, columns, constants)


def _sweep(format: Format, out_features: int, in_features: int, transposed: bool) -> tuple[int, str, _Geometry]:
    """Programs a weight, how each sweeps it, and the tile, for the amax kernel."""
    if format.dynamic:  # what is calibrated is the whole expert
        format = replace(format, scale="fp32", dynamic=False, block=(None, None))
    blocks, geometry = _geometry(format, out_features, in_features, transposed)
    constants = geometry.constants
    if constants["TRANSPOSED"]:
        return blocks, "scatter", geometry
    if format.block == (None, None) or format.has_blocks_along_in:
        return triton.cdiv(blocks, STEPS), "memory", geometry
    if format.block[1] is None:
        chunk = 512
        tile = WEIGHTS_PER_PROGRAM // chunk
        blocks, sweep = triton.cdiv(out_features, tile), "row"
    else:
        chunk = format.block[1]
        tile = min(format.block[0] or 1, WEIGHTS_PER_PROGRAM // chunk)
        blocks, sweep = geometry.rows * geometry.columns, "square"
    return blocks, sweep, geometry._replace(constants=constants | {"CHUNK": chunk, "TILE": tile})


def _launch(
    kernel: Any,
    blocks: int,
    tables: tuple[Sequence[Tensor], ...],
    scales: tuple[Tensor | None, ...],
    geometry: _Geometry,
    **constants: Any,
) -> None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest."""
    addresses = [[a for tensor in group for a in _addresses(tensor)] for group in tables]
    scales = tuple(None if scale is None else scale.contiguous() for scale in scales)
    first = tables[0][0]
    aligned = all(a % 16 == 0 for group in addresses for a in group)
    with torch.cuda.device_of(first):
        for start in range(0, len(addresses[0]), 65535):  # CUDA's limit on the second grid dimension
            part = slice(start, start + 65535)
            kernel[(blocks, len(addresses[0][part]))](
                *(torch.tensor(group[part], dtype=torch.int64).to(first.device) for group in addresses),
                *(None if scale is None else scale[part] for scale in scales),
                *geometry[:4],
                **geometry.constants,
                **constants,
                ALIGNED=aligned,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


def _experts(weights: Sequence[Tensor]) -> int:
    return sum(prod(w.shape[:-2]) for w in weights)


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    a, b = weight.shape[-2:]
    return (b, a) if transposed else (a, b)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, with each expert's matrix contiguous; expert dimensions keep their strides, stride 0 included."""
    a, b = tensor.shape[-2:]
    is_dense = (b == 1 or tensor.stride(-1) == 1) and (a == 1 or tensor.stride(-2) == b)
    return tensor if is_dense else tensor.contiguous()


def _addresses(tensor: Tensor) -> list[int]:
    """Address of each expert's matrix in a tensor [*experts, ., .]."""
    addresses = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True):
        addresses = [a + i * stride * tensor.element_size() for a in addresses for i in range(size)]
    return addresses


def _float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32).item())
