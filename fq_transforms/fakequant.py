"""Fake quantization: parameters and state to parameters, as a pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fq_transforms.checks import check_device, check_state, is_read, local_group, weights_of
from fq_transforms.dtensor import Layout, is_sharded, layout_of, local_values, position, sharded_tensors
from fq_transforms.masters import Tensors, cast_all, count_up, planned_write, tensors_of
from fq_transforms.ops.quantize.autograd import Backward, fake_quantize, fake_quantize_into
from fq_transforms.rounding import Stochastic, Stream, check_rounding
from fq_transforms.spec import Group, Spec
from fq_transforms.state import GroupState, State

__all__ = ["check_learnable", "fakequant", "quantize_group"]


def fakequant(
    params: Mapping[str, Tensor],
    state: State,
    *,
    spec: Spec,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
    rounding: Stochastic | None = None,
    out: Tensors | None = None,
    inplace: bool = False,
) -> dict[str, Tensor]:
    """`Transform.fakequant`, with the options of the Transform given one by one and known to be right."""
    if rounding is not None:
        check_rounding(rounding)
        if backward == "lsq":  # with `out`, the pullback that belongs to it would be that of rounding to the nearest
            raise ValueError(f"rounding: found {rounding} with backward='lsq', wanted None, or backward='clip'")
    check_state(state, spec, values=is_read)
    if out is not None:
        return _write(params, state, tensors_of(out), inplace, spec=spec, out_dtype=out_dtype, rounding=rounding)
    if inplace:
        raise ValueError("inplace: found True without out, wanted out=params, the tensors to write to")

    quantized: dict[str, Tensor] = {}
    for group in spec.groups:
        outs = quantize_group(
            params,
            group,
            state[group.key],
            out_dtype=out_dtype,
            backward=backward,
            separate=separate,
            rounding=rounding,
        )
        quantized.update(zip(group.names, outs, strict=True))
    return dict(params) | quantized


@torch.no_grad()
def _write(
    masters: Mapping[str, Tensor],
    state: State,
    out: Mapping[str, Tensor],
    inplace: bool,
    *,
    spec: Spec,
    out_dtype: torch.dtype | None,
    rounding: Stochastic | None,
) -> dict[str, Tensor]:
    """Fake weights into the tensors of `out`, everything else cast into them; all is checked before."""
    write, sources, outs = planned_write(masters, out, spec)
    ready = [
        _ready(write.weights(number, sources), group, state[group.key], rounding)
        for number, group in enumerate(spec.groups)
    ]
    for group, places in zip(spec.groups, write.groups, strict=True):
        if not inplace and (same := [i for i in places if write.is_inplace[i]]):
            raise ValueError(
                f"out {group.names[places.index(same[0])]!r}: found the weight itself, wanted memory apart from it, "
                "or inplace=True, after which its unquantized values are gone"
            )
        dtype = outs[places[0]].dtype
        if out_dtype not in (None, dtype):
            raise ValueError(f"out {group.names[0]!r}: found {dtype}, wanted {out_dtype}, the Transform's out_dtype")
    here = list(map(local_values, outs)) if write.are_sharded else outs
    for group, places, one in zip(spec.groups, write.groups, ready, strict=True):
        if not one.is_empty:
            fake_quantize_into(
                [here[i] for i in places],
                one.weights,
                one.amax,
                one.global_amax,
                format=group.format,
                transposed=group.transposed,
                seed=one.seed,
                stream=one.stream,
            )
    if write.are_sharded:
        count_up([outs[i] for places in write.groups for i in places])
    for places in write.casts:
        cast_all([sources[i] for i in places], [outs[i] for i in places], are_sharded=write.are_sharded)
    return dict(zip(masters, outs, strict=True))


def quantize_group(
    params: Mapping[str, Tensor],
    group: Group,
    scales: GroupState,
    *,
    out_dtype: torch.dtype | None,
    backward: Backward,
    separate: bool = False,
    rounding: Stochastic | None = None,
) -> Sequence[Tensor]:
    """`fakequant` of one group, in the order of its names, with a state and options that are known to be right."""
    ready = _ready(weights_of(params, group), group, scales, rounding)
    weights, layout = ready.weights, ready.layout
    if backward == "lsq" and layout is not None:
        _check_whole_granules(group, layout)
    if ready.is_empty:
        outs = tuple(weight.to(out_dtype or weight.dtype) for weight in weights)
    else:
        try:
            outs = fake_quantize(
                weights,
                ready.amax,
                ready.global_amax,
                format=group.format,
                transposed=group.transposed,
                out_dtype=out_dtype,
                backward=backward,
                separate=separate,
                seed=ready.seed,
                stream=ready.stream,
            )
        except RuntimeError as error:
            _refuse_inference(group, weights, scales, error)
            raise
    return outs if layout is None else sharded_tensors(layout, outs)


def _refuse_inference(group: Group, weights: Sequence[Tensor], scales: GroupState, error: RuntimeError) -> None:
    """Raise ValueError for a tensor that autograd cannot save: asked for only once it has failed to."""
    names = [f"parameter {name!r}" for name in group.names] + [f"state '{group.key}.{name}'" for name in scales]
    for name, tensor in zip(names, [*weights, *scales.values()], strict=True):
        if not torch.compiler.is_compiling() and tensor.is_inference():
            raise ValueError(
                f"{name}: found an inference tensor, wanted one that autograd can save; make it outside of "
                "torch.inference_mode, or clone() it there"
            ) from error


class _Ready(NamedTuple):
    """A group checked, on this rank: its weights, its scales, and which random bits it draws."""

    weights: Sequence[Tensor]
    amax: Tensor | None
    global_amax: Tensor | None
    layout: Layout | None
    seed: Tensor | None
    stream: Stream | None

    @property
    def is_empty(self) -> bool:
        """True if this rank holds nothing of the weights."""
        return self.layout is not None and self.layout.is_empty


def _ready(weights: Sequence[Tensor], group: Group, scales: GroupState, rounding: Stochastic | None) -> _Ready:
    check_device(group, scales, weights[0].device)
    layout = layout_of(group, weights)
    seed = stream = None
    if rounding is not None:
        seed, stream = _seed(rounding.seed, weights[0].device), _stream(rounding, group, layout, weights)
    if layout is not None or any(map(is_sharded, scales.values())):
        weights, scales = local_group(group, layout, weights, scales)
    return _Ready(weights, scales.get("amax"), scales.get("global_amax"), layout, seed, stream)


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):  # filled on the device: a copy from the host would wait for it
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.device != device:
        raise ValueError(f"seed: found on {seed.device}, wanted on {device} as the weights; move it, or pass an int")
    return seed


def _stream(rounding: Stochastic, group: Group, layout: Layout | None, weights: Sequence[Tensor]) -> Stream:
    """Which random bits this rank's weights of a group draw: a dense weight is the same one on every rank."""
    is_dense = not group.stacked and group.names == (group.key,)
    stream = Stream(group.number, 0 if is_dense else rounding.first_expert)
    if layout is None or layout.is_empty:
        return stream
    shape = layout.weights.local_shape
    first, last = (position(weights[0], index) for index in ([0] * len(shape), [size - 1 for size in shape]))
    if [b - a + 1 for a, b in zip(first, last, strict=True)] != list(shape):
        raise ValueError(
            f"parameter {group.names[0]!r}: found a shard of {list(shape)} from {first} to {last}, wanted one without "
            "gaps for stochastic rounding"
        )
    row, column = reversed(first[-2:]) if group.transposed else first[-2:]
    expert = first[0] if group.stacked else 0
    return replace(stream, first_expert=stream.first_expert + expert, row=row, column=column)


def check_learnable(spec: Spec) -> None:
    """Raise ValueError unless "lsq" can learn all scales: a format has a state, and no inputs are selected."""
    if spec.inputs:
        raise ValueError(
            f"backward 'lsq': found the inputs of {len(spec.inputs)} groups, such as {spec.inputs[0].key!r}, whose "
            "scales are not learned, wanted 'pass_through' or 'clip'; or leave them out: "
            "dataclasses.replace(spec, inputs=())"
        )
    if all(group.format.is_stateless for group in spec.groups):
        names = sorted({group.format.name for group in spec.groups})
        raise ValueError(f"backward 'lsq': found {', '.join(names)} only, wanted a format with a state to learn")


def _check_whole_granules(group: Group, layout: Layout) -> None:
    """Raise ValueError where ranks hold parts of what one scale covers: its gradient would be a sum over them."""
    for name, leaf in layout.leaves.items():
        cut = [axis for axis in leaf.reduced if layout.mesh.size(axis) > 1]
        if cut:
            raise ValueError(
                f"state '{group.key}.{name}': found weights sharded by {layout.weights.placements} with "
                f"backward='lsq', wanted whole granules on each rank: axis {cut[0]} of the mesh cuts what one "
                "scale covers; shard experts, or choose a format of smaller granules"
            )
