# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
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
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fq_transforms.formats import FloatElement, Format, IntElement

__all__ = ["clip_backward_triton", "expert_amax_triton", "fake_quantize_triton"]

# Weights a program works on. 2048 with 4 warps (16 weights a thread, two 16-byte loads in bf16) is the figure that the
# field notes of November 2026 measured at 0.99 of copy_ on an H200; the benchmark's sweep owns this number.
WEIGHTS_PER_PROGRAM = 2048
NUM_WARPS = 4

# Below ModelOpt's threshold a granule counts as zero; the reference has the same number.
TINY_AMAX = tl.constexpr(2.0**-24)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _clamp(x, low, high):
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _with_sign_of(magnitude, x):
    return _float(_bits(magnitude) | (_bits(x) & -2147483648))


@triton.jit
def _round_magnitude(a, MAX: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Nearest value of a small float to a >= 0, ties to even, saturated at MAX."""
    a = tl.minimum(a, MAX, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.maximum(_bits(a) & 0x7F800000, (MIN_EXPONENT + 127) << 23)
    magic = _float(exponent + ((23 - MANTISSA) << 23))
    return (a + magic) - magic


@triton.jit
def _round_integer(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """rint(v) within LOW..HIGH; loses the sign of zero."""
    v = _clamp(v, LOW, HIGH)
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: right for both signs


@triton.jit
def _power_of_two(e):
    """2.0**e for -127 <= e <= 127, exactly."""
    return _float(tl.where(e == -127, 1 << 22, (e + 127) << 23))


@triton.jit
def _valid(amax):
    return tl.where(amax >= 0, tl.where(amax < float("inf"), amax, float("nan")), float("nan"))


@triton.jit
def _chunks(out_features, in_features, CHUNK: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where this program's [TILE, CHUNK] weights are: base (int64), offsets, mask, and each chunk's row and column."""
    block = tl.program_id(0)
    c = tl.arange(0, TILE)
    j = tl.arange(0, CHUNK)
    if TRANSPOSED:  # memory is [in, out]: a program takes CHUNK inputs of TILE neighbouring outputs
        tiles = tl.cdiv(out_features, TILE)
        first = (block % tiles) * TILE
        column = (block // tiles) * CHUNK
        base = column.to(tl.int64) * out_features + first
        row = first + c
        offsets = j[None, :] * out_features + c[:, None]
        mask = (row < out_features)[:, None] & ((column + j) < in_features)[None, :]
        return base, offsets, mask, row, column + c * 0
    else:
        chunks_a_row = in_features // CHUNK
        chunk = block * TILE + c
        base = block.to(tl.int64) * (TILE * CHUNK)
        row = chunk // chunks_a_row
        offsets = c[:, None] * CHUNK + j[None, :]
        mask = (row < out_features)[:, None] & (j >= 0)[None, :]
        return base, offsets, mask, row, (chunk - row * chunks_a_row) * CHUNK


@triton.jit
def _address(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + tl.program_id(1)).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _granule(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Index of a chunk's granule among the group's; a side of 0 is the whole extent."""
    expert = tl.program_id(1).to(tl.int64)
    index = row * 0 if ROWS == 0 else (row // ROWS) * columns
    if COLUMNS != 0:
        index += column // COLUMNS
    return expert * rows * columns + index


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
    base, offsets, mask, row, column = _chunks(out_features, in_features, CHUNK, TILE, TRANSPOSED)
    weight = _address(weight_table, IN_DTYPE, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    a = tl.abs(x)

    if DYNAMIC:
        block_amax = _float(tl.max(_bits(a), axis=1))
    elif SCALE == "e4m3" or ROWS != 0 or COLUMNS != 0:
        granule = _granule(row, column, rows, columns, ROWS, COLUMNS)
        block_amax = _valid(tl.load(amax_ptr + granule, mask=row < out_features, other=0.0))
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
        q = _round_magnitude(a * _power_of_two(-e)[:, None], QMAX, MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * scale[:, None], x)
    elif SCALE == "e4m3":
        expert_amax_ptr = amax_ptr if DYNAMIC else global_amax_ptr
        g = tl.div_rn(_valid(tl.load(expert_amax_ptr + tl.program_id(1))), QMAX * 448.0)
        s8 = _clamp(tl.div_rn(block_amax, QMAX * g), MIN_SCALE, 448.0)
        s = _round_magnitude(s8, 448.0, -6, 3) * g
        s = tl.where(s < UNIT_SCALE_BELOW, 1.0, s)
        s = tl.where(g == 0, 0.0, s)
        s = tl.where(block_amax == 0, 0.0, s)
        divisor = tl.where(s == 0, 1.0, s)
        q = _round_magnitude(tl.div_rn(a, divisor[:, None]), QMAX, MIN_EXPONENT, MANTISSA)
        y = _with_sign_of(q * s[:, None], x)
    elif ELEMENT == "int":
        zero = block_amax < TINY_AMAX
        s = tl.div_rn(QMAX, block_amax)
        v = x * _each(tl.where(zero, 0.0, s))
        y = _with_sign_of(tl.div_rn(_round_integer(v, LOW, HIGH), _each(tl.where(zero, 1.0, s))), x)
    else:
        s = tl.div_rn(QMAX, tl.where(block_amax <= TINY_AMAX, 1.0, block_amax))
        q = _round_magnitude(a * _each(s), QMAX, MIN_EXPONENT, MANTISSA)
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
    GLOBAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    base, offsets, mask, row, column = _chunks(out_features, in_features, CHUNK, TILE, TRANSPOSED)
    weight = _address(weight_table, IN_DTYPE, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    chunk_amax = tl.max(_bits(tl.abs(x)), axis=1)
    if ROWS == 0 and COLUMNS == 0:
        tl.atomic_max(amax_ptr + tl.program_id(1), tl.max(chunk_amax, axis=0))
    else:
        granule = _granule(row, column, rows, columns, ROWS, COLUMNS)
        tl.atomic_max(amax_ptr + granule, chunk_amax, mask=row < out_features)
    if GLOBAL:
        tl.atomic_max(global_amax_ptr + tl.program_id(1), tl.max(chunk_amax, axis=0))


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
    base, offsets, mask, row, column = _chunks(out_features, in_features, CHUNK, TILE, TRANSPOSED)
    weight = _address(weight_table, IN_DTYPE, ALIGNED) + base
    grad = _address(grad_table, GRAD_DTYPE, ALIGNED) + base
    x = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=mask, other=0.0)
    granule = _granule(row, column, rows, columns, ROWS, COLUMNS)
    amax = tl.load(amax_ptr + granule, mask=row < out_features, other=0.0)
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
    _launch(
        _fake_quantize_kernel,
        (weights, outs),
        (None if amax is None else amax.contiguous(), None if global_amax is None else global_amax.contiguous()),
        format=format,
        transposed=transposed,
        ELEMENT="int" if isinstance(element, IntElement) else "float",
        SCALE=format.scale,
        DYNAMIC=format.dynamic,
        QMAX=float(element.qmax if isinstance(element, IntElement) else element.max),
        LOW=float(element.low) if isinstance(element, IntElement) else 0.0,
        HIGH=float(element.high) if isinstance(element, IntElement) else 0.0,
        MIN_EXPONENT=element.min_exponent if isinstance(element, FloatElement) else 0,
        MANTISSA=element.mantissa_bits if isinstance(element, FloatElement) else 0,
        MIN_SCALE=format.min_scale,
        UNIT_SCALE_BELOW=format.unit_scale_below,
        EXPONENT_ROUNDING=format.exponent_rounding,
        MAX_BITS=_float_bits(element.max) if isinstance(element, FloatElement) else 0,
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
    whole = {"ROWS": 0, "COLUMNS": 0} if format.dynamic else {}
    _launch(
        _expert_amax_kernel,
        (weights,),
        (amax, global_amax),
        format=format,
        transposed=transposed,
        GLOBAL=is_static_two_level,
        IN_DTYPE=_TRITON_DTYPES[weights[0].dtype],
        **whole,
    )
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def clip_backward_triton(
    grads: Sequence[Tensor], weights: Sequence[Tensor], amax: Tensor, *, format: Format, transposed: bool
) -> list[Tensor]:
    """`clip_backward_reference` of every weight of a group, in one launch."""
    weights, grads = [_dense(w) for w in weights], [_dense(g) for g in grads]
    outs = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    _launch(
        _clip_backward_kernel,
        (grads, weights, outs),
        (amax.contiguous(),),
        format=format,
        transposed=transposed,
        GRAD_DTYPE=_TRITON_DTYPES[grads[0].dtype],
        IN_DTYPE=_TRITON_DTYPES[weights[0].dtype],
    )
    return outs


def _launch(
    kernel: Any,
    tables: tuple[Sequence[Tensor], ...],
    scales: tuple[Tensor | None, ...],
    *,
    format: Format,
    transposed: bool,
    **constants: Any,
) -> None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest."""
    first = tables[0][0]
    experts, (out_features, in_features) = _experts(tables[0]), _shape(first, transposed)
    rows, columns = (1, 1) if format.dynamic else format.granules(out_features, in_features)
    chunk = _chunk(format, in_features, transposed)
    tile = max(1, WEIGHTS_PER_PROGRAM // chunk)
    if transposed:
        blocks = triton.cdiv(out_features, tile) * triton.cdiv(in_features, chunk)
    else:
        blocks = triton.cdiv(out_features * (in_features // chunk), tile)
    addresses = [[a for tensor in group for a in _addresses(tensor)] for group in tables]
    device = first.device
    arguments = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "TILE": tile,
        "TRANSPOSED": transposed,
        "ALIGNED": all(a % 16 == 0 for group in addresses for a in group),
        **constants,
    }
    with torch.cuda.device_of(first):
        for start in range(0, experts, 65535):  # CUDA's limit on the second grid dimension
            part = slice(start, start + 65535)
            kernel[(blocks, len(addresses[0][part]))](
                *(torch.tensor(group[part], dtype=torch.int64).to(device) for group in addresses),
                *(None if scale is None else scale[part] for scale in scales),
                out_features,
                in_features,
                rows,
                columns,
                **arguments,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


def _chunk(format: Format, in_features: int, transposed: bool) -> int:
    """Weights along `in` that share a scale and are worked on together: a power of two."""
    if format.has_blocks_along_in:
        return format.block[1] or 1
    # A divisor of `in`, so that no chunk crosses a row; transposed tiles mask their edge instead.
    return 16 if transposed else min(16, in_features & -in_features)


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
