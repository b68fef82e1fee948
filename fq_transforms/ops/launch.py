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
# Weights of a row that the amax kernel takes at a time, per channel.
ROW_CHUNK = 512


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
    inputs = _group(weights)
    out = _empty(inputs, out_dtype)
    plan = _forward_plan(format, inputs.matrix, transposed)
    _launch(kernels.fake_quantize_kernel, plan, (inputs, _group([out])), (amax, global_amax))
    return out


def expert_amax_triton(weights: Sequence[Tensor], *, format: Format, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every expert of a group, in one launch: [E, *amax_shape], and [E] or None."""
    inputs = _group(weights)
    plan = _amax_plan(format, inputs.matrix, transposed)
    shape = (inputs.experts, *format.amax_shape(*_shape(inputs.matrix, transposed)))
    is_shared = plan.constants["SWEEP"] == "scatter" or len(shape) == 1  # several programs meet in one granule
    amax = _maxima(shape, inputs.first.device, is_shared)
    global_amax = _maxima(shape[:1], inputs.first.device, True) if plan.constants["GLOBAL"] else None
    _launch(kernels.expert_amax_kernel, plan, (inputs,), (amax, global_amax))
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def clip_backward_triton(
    grads: Sequence[Tensor], weights: Sequence[Tensor], amax: Tensor, *, format: Format, transposed: bool
) -> Tensor:
    """`clip_backward_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    inputs = _group(weights)
    out = _empty(inputs, inputs.first.dtype)
    plan = _backward_plan(format, inputs.matrix, transposed)
    _launch(kernels.clip_backward_kernel, plan, (_group(grads), inputs, _group([out])), (amax,))
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
    return _empty(_group(weights, with_addresses=False), out_dtype)


@torch.library.custom_op("fq_transforms::expert_amax", mutates_args=())
def expert_amax_operator(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """`expert_amax_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    amax, global_amax = expert_amax_triton(weights, format=_parse(format), transposed=transposed)
    return amax, amax.new_empty(0) if global_amax is None else global_amax


@expert_amax_operator.register_fake
def _(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    numbers, inputs = _parse(format), _group(weights, with_addresses=False)
    experts, shape = inputs.experts, numbers.amax_shape(*_shape(inputs.matrix, transposed))
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
    return _empty(_group(weights, with_addresses=False), weights[0].dtype)


@cache
def _parse(format: str) -> Format:
    return Format.from_dict(json.loads(format))


class _Group(NamedTuple):
    """The matrices of a group: their number, their common shape as stored, and where each begins."""

    first: Tensor
    experts: int
    matrix: tuple[int, int]
    addresses: list[int]
    tensors: Sequence[Tensor]


def _group(tensors: Sequence[Tensor], *, with_addresses: bool = True) -> _Group:
    """The group of some tensors [*experts, ., .]; what is not dense is copied, and lives as long as the group."""
    first = tensors[0]
    matrix = (first.shape[-2], first.shape[-1])
    if not with_addresses:
        return _Group(first, sum(prod(t.shape[:-2]) for t in tensors), matrix, [], tensors)
    if first.dim() == 2 and all(t.is_contiguous() for t in tensors):  # the usual case, without a loop in Python
        return _Group(first, len(tensors), matrix, [t.data_ptr() for t in tensors], tensors)
    tensors = [_dense(t) for t in tensors]
    addresses = [a for t in tensors for a in _addresses(t)]
    return _Group(tensors[0], len(addresses), matrix, addresses, tensors)


class _Plan(NamedTuple):
    """All of a launch that comes from the format and the shape: made once, then looked up."""

    blocks: int
    numbers: tuple[int, int, int, int]
    constants: dict[str, Any]
    warps: int


@cache
def _forward_plan(format: Format, matrix: tuple[int, int], transposed: bool) -> _Plan:
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
    return _visit(format, _shape(matrix, transposed), transposed, FORWARD, constants)


@cache
def _backward_plan(format: Format, matrix: tuple[int, int], transposed: bool) -> _Plan:
    return _visit(format, _shape(matrix, transposed), transposed, BACKWARD, {})


@cache
def _amax_plan(format: Format, matrix: tuple[int, int], transposed: bool) -> _Plan:
    out_features, in_features = _shape(matrix, transposed)
    is_static_two_level = format.scale == "e4m3" and not format.dynamic
    constants: dict[str, Any] = {"SWEEP": "memory", "GLOBAL": is_static_two_level, "STEPS": 1}
    if format.dynamic:  # what is calibrated is the whole expert
        format = replace(format, scale="fp32", dynamic=False, block=(None, None))
    plan = _visit(format, (out_features, in_features), transposed, AMAX, constants)
    rows, columns = format.block
    if plan.constants["TRANSPOSED"]:
        return plan._replace(constants=plan.constants | {"SWEEP": "scatter"})
    if format.block == (None, None) or format.has_blocks_along_in:
        steps = STEPS_AN_EXPERT if columns is None else STEPS_A_BLOCK
        return plan._replace(blocks=-(-plan.blocks // steps), constants=plan.constants | {"STEPS": steps})
    if columns is None:
        tile = AMAX.weights // ROW_CHUNK
        changes = {"SWEEP": "row", "CHUNK": ROW_CHUNK, "TILE": tile}
        return plan._replace(blocks=-(-out_features // tile), constants=plan.constants | changes)
    changes = {"SWEEP": "square", "CHUNK": columns, "TILE": min(rows or 1, AMAX.weights // columns)}
    return plan._replace(blocks=plan.numbers[2] * plan.numbers[3], constants=plan.constants | changes)


def _visit(format: Format, shape: tuple[int, int], transposed: bool, tile: Tile, constants: dict[str, Any]) -> _Plan:
    """The plan of a kernel that visits each weight once: programs a matrix, and the tile of each."""
    out_features, in_features = shape
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
    tiling = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "TILE": chunks,
        "TRANSPOSED": transposed,
    }
    return _Plan(blocks, (out_features, in_features, rows, columns), constants | tiling, tile.warps)


# CUDA's limit on the second dimension of a grid.
MOST_EXPERTS = 65535


def _launch(kernel: Any, plan: _Plan, groups: tuple[_Group, ...], scales: tuple[Tensor | None, ...]) -> None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest."""
    if groups[0].experts > MOST_EXPERTS:
        raise ValueError(f"found {groups[0].experts} experts in one group, wanted at most {MOST_EXPERTS}")
    reaches = [_reach(group) for group in groups]
    is_aligned = all(a % 16 == 0 for group in groups for a in group.addresses)
    with torch.cuda.device_of(groups[0].first):
        kernel[(plan.blocks, groups[0].experts)](
            *(argument for reach in reaches for argument in reach),
            *(None if scale is None else scale.contiguous() for scale in scales),
            *plan.numbers,
            **plan.constants,
            ALIGNED=is_aligned,
            num_warps=plan.warps,
            enable_fp_fusion=False,
        )


def _reach(group: _Group) -> tuple[Tensor, Tensor | None, int]:
    """How a kernel gets to each expert: (base, table or None, stride in elements)."""
    first, addresses, experts = group.first, group.addresses, group.experts
    step, rest = divmod(addresses[1] - addresses[0], first.element_size()) if experts > 1 else (0, 0)
    stride = step * first.element_size()
    if experts == 1 or (
        rest == 0 and step != 0 and addresses == list(range(addresses[0], addresses[0] + experts * stride, stride))
    ):
        return first, None, step
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


def _empty(group: _Group, dtype: torch.dtype) -> Tensor:
    """Memory for the results of a group: [E, ., .]."""
    return torch.empty((group.experts, *group.matrix), dtype=dtype, device=group.first.device)


def _maxima(shape: tuple[int, ...], device: torch.device, is_shared: bool) -> Tensor:
    """Memory for maxima, as integers; zero bits, the identity, where atomics add to it."""
    make = torch.zeros if is_shared else torch.empty
    return make(shape, dtype=torch.int32, device=device)


def _shape(matrix: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """(out, in) of a matrix as stored."""
    return (matrix[1], matrix[0]) if transposed else matrix


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
