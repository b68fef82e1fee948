"""Fake quantization: parameters and state to parameters, as a pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fq_transforms.checks import DTYPES, is_sharded, weights_of
from fq_transforms.dtensor import Layout, check_leaf, layout_of, position, sharded_tensors
from fq_transforms.ops.quantize.autograd import Backward, fake_quantize, fake_quantize_into
from fq_transforms.ops.quantize.lsq import fake_quantize_lsq
from fq_transforms.ops.quantize.stochastic import fake_quantize_stochastic
from fq_transforms.ops.relaunch import Placed
from fq_transforms.rounding import Stochastic, Stream, check_rounding
from fq_transforms.spec import Group, Spec
from fq_transforms.state import BlockAmax, GroupState, State, Stateless, check, is_read, local_group

__all__ = ["check_options", "fakequant", "quantize_group", "requantize_group"]


def fakequant(
    params: Mapping[str, Tensor],
    state: State,
    *,
    spec: Spec,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
    rounding: Stochastic | None = None,
) -> dict[str, Tensor]:
    """The parameters with each selected weight quantized and dequantized by its own expert's scales.

    One kernel launch a group on a GPU, plain PyTorch on a CPU, equal bit for bit. Differentiable in the weights.

    Args:
        params: Names to tensors; may hold more than the spec names.
        state: From `calibrate`, or loaded.
        spec: What is quantized, and how. Formulas: `fq_transforms.ops.quantize.reference.fake_quantize_reference`.
        out_dtype: bf16, fp16 or fp32 for the quantized weights; their own dtype if None. From fp32 master weights to
            bf16 is one pass. The other parameters keep their dtype.
        backward: "pass_through": the gradient of the identity. "clip": zero where abs(w) > amax; dynamic formats pass
            every gradient, also where a stale NVFP4 amax saturates a weight. "lsq": that of "clip", and a gradient to
            the state, so that scales are learned: give the state as a primal of `torch.func.grad` or vjp, or leaves
            with `requires_grad`. See NOTE learned scales.
        separate: On a GPU the new tensors of a group are views of one allocation, the fastest to make, of which one
            that is kept alive keeps all. True gives each memory of its own. On a CPU each always has.
        rounding: To the nearest if None, else `Stochastic(seed)`: up or down by chance, in every format, equal bit for
            bit on CPU and GPU. The gradient does not see it.

    Returns:
        A new dict in the order of `params`. Quantized entries are new tensors; all others are the same objects. No
        input is changed. A DTensor gives a DTensor placed alike, of which each rank quantizes its own shard, with no
        collective; its gradient is placed alike too, and only a cotangent that is not is redistributed.

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: A shape, dtype or device is not the spec's; a DTensor's shard cuts a block, its state is not placed
            as it is, or it is mapped by vmap or compiled; "lsq" with `rounding`, without a format that has a state, or
            with DTensors that cut what one scale covers; a seed is none, or on another device; on the CPU, an amax is
            NaN, infinite or negative. On a GPU the values are not read, since that would wait for the device: there
            such an amax makes the weights that it scales NaN, and `state.check` says which it was.

    NOTE learned scales: d fakequant(w) / d amax = (q - v) / qmax within the range, v the weight in steps and q what it
    is rounded to, and +-1 beyond it, as Learned Step Size Quantization has it; for NVFP4 at both of its levels
    (`fq_transforms.ops.quantize.lsq_reference`). It is not divided by sqrt(N * qmax), N the weights of a granule, as that paper
    proposes: multiply the gradients so, or choose the learning rate. An amax must stay positive: learn its logarithm,
    or clamp it after a step. MX formats have no state, so nothing is learned there. Where ranks hold parts of what one
    scale covers, as under tensor parallelism, each has its part of the gradient: add them up; DTensors placed so are
    refused.

    Source: ModelOpt 0.47 `TensorQuantizer` with `pass_through_bwd` True (default) or False; Esser et al. 2020.

    Example:
        >>> from fq_transforms.calibrate import calibrate
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.01]]), "norm.weight": torch.ones(2)}
        >>> spec = select(params, {"experts.*": INT8})
        >>> fakequant(params, calibrate(params, spec=spec), spec=spec)["experts.0.weight"]
        tensor([[ 0.9971, -2.0100]])
    """
    check_options(out_dtype, backward)
    if rounding is not None:
        check_rounding(rounding)
    if backward == "lsq":
        _check_lsq(spec, rounding)
    check(state, spec, values=is_read)

    quantized = dict(params)
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
    return quantized


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
    weights = weights_of(params, group)
    _check_device(group, scales, weights[0].device)
    layout = layout_of(group, weights)
    stream = None if rounding is None else _stream(rounding, group, layout, weights)
    if layout is not None or any(map(is_sharded, scales)):
        weights, scales = local_group(group, layout, weights, scales)
    amax, global_amax = _amax_of(scales)
    if backward == "lsq" and layout is not None:
        _check_whole_granules(group, layout)
    if layout is not None and layout.is_empty:
        outs = tuple(weight.to(out_dtype or weight.dtype) for weight in weights)
    elif backward == "lsq" and amax is not None:
        outs = fake_quantize_lsq(
            weights,
            amax,
            global_amax,
            format=group.format,
            transposed=group.transposed,
            out_dtype=out_dtype,
            separate=separate,
        )
    elif rounding is not None and stream is not None:
        outs = fake_quantize_stochastic(
            weights,
            amax,
            global_amax,
            _seed(rounding.seed, weights[0].device),
            stream=stream,
            format=group.format,
            transposed=group.transposed,
            out_dtype=out_dtype,
            backward=backward,
            separate=separate,
        )
    else:
        outs = fake_quantize(
            weights,
            amax,
            global_amax,
            format=group.format,
            transposed=group.transposed,
            out_dtype=out_dtype,
            backward=backward,
            separate=separate,
        )
    return outs if layout is None else sharded_tensors(layout, outs)


def requantize_group(
    params: Mapping[str, Tensor], group: Group, scales: GroupState, outs: Sequence[Tensor]
) -> Placed | None:
    """`quantize_group` of plain tensors, without a gradient, into what it has given before for weights like these.

    Returns:
        The launch, if it is one that was made before.
    """
    weights = weights_of(params, group)
    _check_device(group, scales, weights[0].device)
    for field, leaf in zip(scales._fields, scales, strict=True):
        if is_sharded(leaf):
            check_leaf(f"{group.key}.{field}", leaf, None, field)
    amax, global_amax = _amax_of(scales)
    return fake_quantize_into(outs, weights, amax, global_amax, format=group.format, transposed=group.transposed)


def _check_device(group: Group, scales: GroupState, device: torch.device) -> None:
    for leaf in scales:
        if leaf.device != device:
            raise ValueError(
                f"state {group.key!r}: found on {leaf.device}, wanted on {device} as its weights; "
                "move it with optree.tree_map(lambda leaf: leaf.to(device), state)"
            )


def _amax_of(scales: GroupState) -> tuple[Tensor | None, Tensor | None]:
    amax = None if isinstance(scales, Stateless) else scales.amax
    return amax, scales.global_amax if isinstance(scales, BlockAmax) else None


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


def _check_lsq(spec: Spec, rounding: Stochastic | None) -> None:
    if rounding is not None:
        raise ValueError(f"rounding: found {rounding} with backward='lsq', wanted None, or backward='clip'")
    if all(group.format.is_stateless for group in spec.groups):
        names = sorted({group.format.name for group in spec.groups})
        raise ValueError(f"backward 'lsq': found {', '.join(names)} only, wanted a format with a state to learn")


def _check_whole_granules(group: Group, layout: Layout) -> None:
    """Raise ValueError where ranks hold parts of what one scale covers: its gradient would be a sum over them."""
    for field, leaf in layout.leaves.items():
        cut = [dim for dim in leaf.reduced if layout.mesh.size(dim) > 1]
        if cut:
            raise ValueError(
                f"state '{group.key}.{field}': found weights sharded by {layout.weights.placements} with "
                f"backward='lsq', wanted whole granules on each rank: dimension {cut[0]} of the mesh cuts what one "
                "scale covers; shard experts, or choose a format of smaller granules"
            )


def check_options(out_dtype: torch.dtype | None, backward: str) -> None:
    """Raise ValueError unless both are what `fakequant` takes."""
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ValueError(f"out_dtype: found {out_dtype}, wanted bfloat16, float16 or float32")
    if backward not in ("pass_through", "clip", "lsq"):
        raise ValueError(f"backward: found {backward!r}, wanted 'pass_through', 'clip' or 'lsq'")
