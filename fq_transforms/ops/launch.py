"""Launchers: a group of weights and its scales to one launch of a kernel.

NOTE addresses: a kernel reaches expert e at `base + e * stride` if the experts are evenly spaced (stacked, or views of
one allocation), else through a table of addresses on the device. Tables are cached by their contents, so a cached table
is never stale: a tensor that moves has another address, and so another table.

NOTE memory of the results: the results of a group share one allocation, evenly spaced. One allocation and N views cost
the host half of N allocations, and save the second table; but one result that is kept keeps all N.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops import kernels

__all__ = [
    "clip_backward_operator",
    "clip_backward_triton",
    "expert_amax_operator",
    "expert_amax_triton",
    "fake_quantize_operator",
    "fake_quantize_triton",
]


class Tile(NamedTuple):
    """Weights a program works on at a time, and its warps."""

    weights: int
    warps: int


# Swept on an H200, 2026-11-23, 32 x [1856, 2688] bf16, over 512 to 4096 weights and 1 to 8 warps.
FORWARD = Tile(2048, 2)
BACKWARD = Tile(2048, 4)
AMAX = Tile(2048, 4)
# Tiles that a program of the amax kernel sweeps: many where they end in one atomic, few where each block is stored.
STEPS_AN_EXPERT, STEPS_A_BLOCK = 16, 2


def fake_quantize_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`fake_quantize_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    weights = [_dense(w) for w in weights]
    out = _empty(weights, out_dtype)
    blocks, geometry = _geometry(format, *_shape(weights[0], transposed), transposed, FORWARD)
    element = format.element
    is_int = isinstance(element, IntElement)
    constants = {
        "ELEMENT": "int" if is_int else "float",
        "SCALE": format.scale,
        "DYNAMIC": format.dynamic,
        "QMAX": float(element.qmax if is_int else element.max),
        "LOW": float(element.low) if is_int else 0.0,
        "HIGH": float(element.high) if is_int else 0.0,
        "MIN_EXPONENT": 0 if is_int else element.min_exponent,
        "MANTISSA": 0 if is_int else element.mantissa_bits,
        "MIN_SCALE": format.min_scale,
        "UNIT_SCALE_BELOW": format.unit_scale_below,
        "EXPONENT_ROUNDING": format.exponent_rounding,
        "MAX_BITS": 0 if is_int else _float_bits(element.max),
    }
    _launch(kernels.fake_quantize_kernel, blocks, (weights, [out]), (amax, global_amax), geometry, FORWARD, constants)
    return out


def expert_amax_triton(weights: Sequence[Tensor], *, format: Format, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every expert of a group, in one launch: [E, *amax_shape], and [E] or None."""
    weights = [_dense(w) for w in weights]
    experts, (out_features, in_features) = _experts(weights), _shape(weights[0], transposed)
    blocks, sweep, geometry = _sweep(format, out_features, in_features, transposed)
    shape = (experts, *format.amax_shape(out_features, in_features))
    is_shared = sweep == "scatter" or len(shape) == 1  # several programs meet in one granule
    amax = _maxima(shape, weights[0].device, is_shared)
    is_static_two_level = format.scale == "e4m3" and not format.dynamic
    global_amax = _maxima((experts,), amax.device, True) if is_static_two_level else None
    constants = {"SWEEP": sweep, "GLOBAL": is_static_two_level}
    _launch(kernels.expert_amax_kernel, blocks, (weights,), (amax, global_amax), geometry, AMAX, constants)
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def clip_backward_triton(
    grads: Sequence[Tensor], weights: Sequence[Tensor], amax: Tensor, *, format: Format, transposed: bool
) -> Tensor:
    """`clip_backward_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    weights, grads = [_dense(w) for w in weights], [_dense(g) for g in grads]
    out = _empty(weights, weights[0].dtype)
    blocks, geometry = _geometry(format, *_shape(weights[0], transposed), transposed, BACKWARD)
    _launch(kernels.clip_backward_kernel, blocks, (grads, weights, [out]), (amax,), geometry, BACKWARD, {})
    return out


# What torch.compile sees in place of the launchers, whose addresses it cannot trace: opaque operators with shapes. A
# format travels as its JSON, since an operator takes tensors, numbers and strings only.


@torch.library.custom_op("fq_transforms::fake_quantize", mutates_args=())
def fake_quantize_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`fake_quantize_triton`, for torch.compile."""
    return fake_quantize_triton(
        weights, amax, global_amax, format=_parse(format), transposed=transposed, out_dtype=out_dtype
    )


@fake_quantize_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return _empty(weights, out_dtype)


@torch.library.custom_op("fq_transforms::expert_amax", mutates_args=())
def expert_amax_operator(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """`expert_amax_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    amax, global_amax = expert_amax_triton(weights, format=_parse(format), transposed=transposed)
    return amax, amax.new_empty(0) if global_amax is None else global_amax


@expert_amax_operator.register_fake
def _(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    numbers, experts = _parse(format), _experts(weights)
    shape = numbers.amax_shape(*_shape(weights[0], transposed))
    has_global = numbers.scale == "e4m3" and not numbers.dynamic
    new_empty = weights[0].new_empty
    return new_empty((experts, *shape), dtype=torch.float32), new_empty(experts * has_global, dtype=torch.float32)


@torch.library.custom_op("fq_transforms::clip_backward", mutates_args=())
def clip_backward_operator(
    grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool
) -> Tensor:
    """`clip_backward_triton`, for torch.compile."""
    return clip_backward_triton(grads, weights, amax, format=_parse(format), transposed=transposed)


@clip_backward_operator.register_fake
def _(grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool) -> Tensor:
    return _empty(weights, weights[0].dtype)


@cache
def _parse(format: str) -> Format:
    return Format.from_dict(json.loads(format))


class _Geometry(NamedTuple):
    """Numbers of a launch that come from shapes alone, in the order of the kernels' arguments."""

    out_features: int
    in_features: int
    rows: int
    columns: int
    constants: dict[str, Any]


def _geometry(
    format: Format, out_features: int, in_features: int, transposed: bool, tile: Tile
) -> tuple[int, _Geometry]:
    """Programs a weight, and the tile of each, for the kernels that visit every weight once."""
    if format.block == (None, None) and transposed:  # one scale an expert: the layout does not matter
        out_features, in_features, transposed = in_features, out_features, False
    rows, columns = (1, 1) if format.dynamic else format.granules(out_features, in_features)
    if format.has_blocks_along_in:
        chunk = format.block[1] or 1
    else:  # a divisor of `in`, so that no chunk crosses a row; transposed tiles mask their edge instead
        chunk = 16 if transposed else min(16, in_features & -in_features)
    chunks = max(1, tile.weights // chunk)
    if transposed:
        blocks = -(-out_features // chunks) * -(-in_features // chunk)
    else:
        blocks = -(-out_features * (in_features // chunk) // chunks)
    constants = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "TILE": chunks,
        "TRANSPOSED": transposed,
    }
    return blocks, _Geometry(out_features, in_features, rows, columns, constants)


def _sweep(format: Format, out_features: int, in_features: int, transposed: bool) -> tuple[int, str, _Geometry]:
    """Programs a weight, how each sweeps it, and the tile, for the amax kernel."""
    if format.dynamic:  # what is calibrated is the whole expert
        format = replace(format, scale="fp32", dynamic=False, block=(None, None))
    blocks, geometry = _geometry(format, out_features, in_features, transposed, AMAX)
    changes: dict[str, Any] = {"STEPS": 1}
    if geometry.constants["TRANSPOSED"]:
        sweep = "scatter"
    elif format.block == (None, None) or format.has_blocks_along_in:
        sweep, steps = "memory", STEPS_AN_EXPERT if format.block == (None, None) else STEPS_A_BLOCK
        blocks, changes["STEPS"] = -(-blocks // steps), steps
    elif format.block[1] is None:
        sweep, chunk = "row", 512
        changes |= {"CHUNK": chunk, "TILE": AMAX.weights // chunk}
        blocks = -(-out_features // changes["TILE"])
    else:
        sweep, chunk = "square", format.block[1]
        changes |= {"CHUNK": chunk, "TILE": min(format.block[0] or 1, AMAX.weights // chunk)}
        blocks = geometry.rows * geometry.columns
    return blocks, sweep, geometry._replace(constants=geometry.constants | changes)


def _launch(
    kernel: Any,
    blocks: int,
    groups: tuple[Sequence[Tensor], ...],
    scales: tuple[Tensor | None, ...],
    geometry: _Geometry,
    tile: Tile,
    constants: dict[str, Any],
) -> None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest."""
    addresses = [[a for tensor in group for a in _addresses(tensor)] for group in groups]
    scales = tuple(None if scale is None else scale.contiguous() for scale in scales)
    is_aligned = all(a % 16 == 0 for group in addresses for a in group)
    first = groups[0][0]
    with torch.cuda.device_of(first):
        for start in range(0, len(addresses[0]), MOST_EXPERTS):
            stop = start + MOST_EXPERTS
            kernel[(blocks, len(addresses[0][start:stop]))](
                *(
                    argument
                    for group, tensors in zip(addresses, groups, strict=True)
                    for argument in _reach(tensors[0], group[start:stop], is_whole=start == 0)
                ),
                *(None if scale is None else scale[start:stop] for scale in scales),
                *geometry[:4],
                **geometry.constants,
                **constants,
                ALIGNED=is_aligned,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )


# CUDA's limit on the second dimension of a grid.
MOST_EXPERTS = 65535


def _reach(first: Tensor, addresses: Sequence[int], *, is_whole: bool) -> tuple[Tensor, Tensor | None, int]:
    """How a kernel gets to each expert: (base, table or None, stride in elements)."""
    step = addresses[1] - addresses[0] if len(addresses) > 1 else 0
    is_even = len(addresses) == 1 or (
        step % first.element_size() == 0
        and step != 0
        and list(addresses) == list(range(addresses[0], addresses[0] + len(addresses) * step, step))
    )
    if is_even and is_whole:
        return first, None, step // first.element_size()
    return first, _table(tuple(addresses), first.device), 0


# Small: 8 bytes an expert. A table that a CUDA graph was captured with stays for good, as the graph may be replayed.
_TABLES: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()
_CAPTURED: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
MOST_TABLES = 4096


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses as int64 on the device, without waiting for it; cached by contents and stream."""
    if device.type != "cuda":
        return torch.tensor(addresses, dtype=torch.int64)
    key = (device, torch.cuda.current_stream(device).cuda_stream, addresses)
    is_capturing = torch.cuda.is_current_stream_capturing()
    entry = _CAPTURED.get(key) or _TABLES.get(key)
    if entry is None:
        if is_capturing:
            raise RuntimeError(
                "a group of weights was first seen while a CUDA graph was captured; call the function once before, as "
                "torch.cuda.graph's warm-up does, on the stream that captures"
            )
        host = torch.tensor(addresses, dtype=torch.int64).pin_memory()
        entry = (host.to(device, non_blocking=True), host)
        _TABLES[key] = entry
        if len(_TABLES) > MOST_TABLES:
            _TABLES.popitem(last=False)
    if is_capturing:
        _CAPTURED[key] = entry
    return entry[0]


def _empty(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Memory for the results of a group: [E, ., .]."""
    return torch.empty((_experts(weights), *weights[0].shape[-2:]), dtype=dtype, device=weights[0].device)


def _maxima(shape: tuple[int, ...], device: torch.device, is_shared: bool) -> Tensor:
    """Memory for maxima, as integers; zero bits, the identity, where atomics add to it."""
    make = torch.zeros if is_shared else torch.empty
    return make(shape, dtype=torch.int32, device=device)


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
