"""Launchers: a group of weights and its scales to one launch of a kernel.

NOTE memory of the results: by default the results of a group share one allocation, evenly spaced: one call to the
allocator and no table. The price: one result that is kept keeps all N. With `separate` each has memory of its own. That
took 224 us of the host a call in place of 59 for 32 experts, 706 in place of 126 for 128 (bench/results/2026-11-27.md).
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops import calls
from fq_transforms.ops.calls import launch
from fq_transforms.ops.matrices import Matrices, experts_of, matrices_of, results_for, shape_of
from fq_transforms.ops.pack import kernel as pack_kernel
from fq_transforms.ops.pack.reference import code_bits, code_dtype
from fq_transforms.ops.plans import BACKWARD, Tile, amax_plan, backward_plan, forward_plan, pack_plan, report_plan
from fq_transforms.ops.quantize import kernel as kernels
from fq_transforms.ops.relaunch import Placed
from fq_transforms.ops.report import kernel as report_kernel
from fq_transforms.ops.report.reference import Measures, scale_underflows

__all__ = [
    "clip_backward_operator",
    "clip_backward_triton",
    "expert_amax_operator",
    "expert_amax_triton",
    "fake_quantize_into_triton",
    "fake_quantize_operator",
    "fake_quantize_separate_operator",
    "fake_quantize_separate_triton",
    "fake_quantize_triton",
    "pack_triton",
    "report_triton",
]


def fake_quantize_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """`fake_quantize_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    inputs = matrices_of(weights)
    out = results_for(inputs, out_dtype)
    plan = forward_plan(format, inputs.matrix, transposed, tile)
    launched = launch(kernels.fake_quantize_kernel, plan, (inputs, out), (amax, global_amax))
    if tile is None:
        calls.remember(calls.key_of(weights, amax, global_amax, format, transposed, out_dtype), launched, inputs.table)
    return out.base


def fake_quantize_into_triton(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
) -> Placed | None:
    """`fake_quantize_triton` into contiguous tensors of one dtype, one a weight, in its shape.

    Returns:
        The launch, if it was made before: for `Relaunch`.
    """
    key = calls.key_of(weights, amax, global_amax, format, transposed, outs[0].dtype)
    into = matrices_of(outs)
    is_one_behind_the_other = into.start % 16 == 0 and (
        into.experts == 1 or (into.table is None and into.stride == prod(into.matrix))
    )
    if is_one_behind_the_other and (call := calls.find(key)) is not None:
        call.run(into.start)
        return Placed(call, into.start)
    inputs = matrices_of(weights)
    plan = forward_plan(format, inputs.matrix, transposed, None)
    launched = launch(kernels.fake_quantize_kernel, plan, (inputs, into), (amax, global_amax))
    if is_one_behind_the_other:
        calls.remember(key, launched, inputs.table)
    return None


def fake_quantize_separate_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`fake_quantize_triton` into one new tensor a weight, in its shape, none of which keeps another alive."""
    outs = [torch.empty(weight.shape, dtype=out_dtype, device=weight.device) for weight in weights]
    fake_quantize_into_triton(outs, weights, amax, global_amax, format=format, transposed=transposed)
    return outs


def expert_amax_triton(
    weights: Sequence[Tensor], *, format: Format, transposed: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every expert of a group, in one launch: [E, *amax_shape], and [E] or None."""
    inputs = matrices_of(weights)
    plan = amax_plan(format, inputs.matrix, transposed, tile)
    shape = (inputs.experts, *format.amax_shape(*shape_of(inputs.matrix, transposed)))
    is_shared = plan.constants["SWEEP"] == "scatter" or len(shape) == 1  # several programs meet in one granule
    amax = _maxima(shape, inputs.base.device, is_shared)
    global_amax = _maxima(shape[:1], inputs.base.device, True) if plan.constants["GLOBAL"] else None
    launch(kernels.expert_amax_kernel, plan, (inputs,), (amax, global_amax))
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def clip_backward_triton(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor,
    *,
    format: Format,
    transposed: bool,
    tile: Tile = BACKWARD,
) -> Tensor:
    """`clip_backward_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    inputs = matrices_of(weights)
    out = results_for(inputs, inputs.base.dtype)
    plan = backward_plan(format, inputs.matrix, transposed, tile)
    launch(kernels.clip_backward_kernel, plan, (matrices_of(grads), inputs, out), (amax,))
    return out.base


def pack_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pack_reference` of every expert of a group, in one launch, and one for scales that the state alone decides."""
    inputs = matrices_of(weights)
    out_features, in_features = shape_of(inputs.matrix, transposed)
    bits, experts, device = code_bits(format), inputs.experts, inputs.base.device
    dtype = torch.int8 if isinstance(format.element, IntElement) and bits == 8 else torch.uint8
    codes = torch.empty((experts, out_features, in_features * bits // 8), dtype=dtype, device=device)
    out = Matrices(codes, codes.data_ptr(), None, codes[0].numel(), experts, inputs.matrix, True, [codes])
    scale, global_scale = _scales(amax, global_amax, format)
    if scale is None:
        shape = (experts, *format.granules(out_features, in_features))
        scale = torch.empty(shape, dtype=torch.float32 if format.scale == "fp32" else torch.uint8, device=device)
    plan = pack_plan(format, inputs.matrix, transposed, inputs.base.element_size(), tile)
    amax = None if format.dynamic else amax
    launch(pack_kernel.pack_kernel, plan, (inputs, out), (amax, global_scale, scale))
    if format.scale == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return codes.view(code_dtype(format)), scale, global_scale


def report_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    tile: Tile | None = None,
) -> Measures:
    """`report_reference` of every expert of a group, [E] each: one launch, and sums over what its programs found."""
    inputs = matrices_of(weights)
    plan = report_plan(format, inputs.matrix, transposed, tile)
    places, device = (inputs.experts, plan.blocks), inputs.base.device
    sums = torch.empty((2, *places), dtype=torch.float64, device=device)
    counts = torch.empty((4, *places), dtype=torch.int32, device=device)
    launch(report_kernel.report_kernel, plan, (inputs,), (amax, global_amax, sums, counts))
    signal, noise = sums.sum(-1)
    clipped, zeroed, underflow = counts[:3].sum(-1, dtype=torch.int64)
    largest = counts[3].amax(-1).view(torch.float32)
    # Larger granules are few. Of blocks, a sum over the state would take a temporary of 8 bytes each.
    if format.scale == "fp32" and not format.has_blocks_along_in:
        assert amax is not None
        underflow = scale_underflows(amax, format).reshape(inputs.experts, -1).sum(1)
    return Measures(signal, noise, clipped, zeroed, underflow, largest)


# Scales that a program makes, of those that the state alone decides.
SCALE_TILE = 1024


def _scales(amax: Tensor | None, global_amax: Tensor | None, format: Format) -> tuple[Tensor | None, Tensor | None]:
    """`pack_scales`, in one launch in place of ten."""
    is_int, is_global = isinstance(format.element, IntElement), format.scale == "e4m3"
    source = global_amax if is_global and not format.dynamic else amax
    if format.scale == "e8m0" or (is_int and format.has_blocks_along_in):
        return None, None
    assert source is not None
    source = source.contiguous()
    scale = torch.empty_like(source)
    qmax = float(format.element.qmax if isinstance(format.element, IntElement) else format.element.max)
    kind = "global" if is_global else "int" if is_int else "float"
    kernel: Any = pack_kernel.pack_scale_kernel
    with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
        kernel[(-(-source.numel() // SCALE_TILE),)](
            source, scale, source.numel(), KIND=kind, QMAX=qmax, TILE=SCALE_TILE, enable_fp_fusion=False
        )
    return (None, scale) if is_global else (scale, None)


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
    return weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]), dtype=out_dtype)


@torch.library.custom_op("fq_transforms::fake_quantize_separate", mutates_args=())
def fake_quantize_separate_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`fake_quantize_separate_triton`, for torch.compile."""
    return fake_quantize_separate_triton(
        weights, amax, global_amax, format=_parse(format), transposed=transposed, out_dtype=out_dtype
    )


@fake_quantize_separate_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    return [weight.new_empty(weight.shape, dtype=out_dtype) for weight in weights]


@torch.library.custom_op("fq_transforms::expert_amax", mutates_args=())
def expert_amax_operator(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """`expert_amax_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    amax, global_amax = expert_amax_triton(weights, format=_parse(format), transposed=transposed)
    return amax, amax.new_empty(0) if global_amax is None else global_amax


@expert_amax_operator.register_fake
def _(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    a, b = weights[0].shape[-2:]
    numbers, experts = _parse(format), experts_of(weights)
    shape = numbers.amax_shape(*shape_of((a, b), transposed))
    new_empty, globals_ = weights[0].new_empty, experts * numbers.has_global_amax
    return new_empty((experts, *shape), dtype=torch.float32), new_empty(globals_, dtype=torch.float32)


@torch.library.custom_op("fq_transforms::clip_backward", mutates_args=())
def clip_backward_operator(
    grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool
) -> Tensor:
    """`clip_backward_triton`, for torch.compile."""
    return clip_backward_triton(grads, weights, amax, format=_parse(format), transposed=transposed)


@clip_backward_operator.register_fake
def _(grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool) -> Tensor:
    return weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]))


@cache
def _parse(format: str) -> Format:
    return Format.from_dict(json.loads(format))


def _maxima(shape: tuple[int, ...], device: torch.device, is_shared: bool) -> Tensor:
    """Memory for maxima, as integers; zero bits, the identity, where atomics add to it."""
    make = torch.zeros if is_shared else torch.empty
    return make(shape, dtype=torch.int32, device=device)
