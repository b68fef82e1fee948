"""Calibration: parameters to state, as a pure function."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward
from fq_transforms.activations.quantize import calibrated_inputs
from fq_transforms.checks import weights_of
from fq_transforms.choose import check_method, check_whole, chosen_leaves, importance_of, progress
from fq_transforms.dtensor import Layout, layout_of, local_tensors, reduce_leaves, sharded_tensors
from fq_transforms.methods import MAX, Method
from fq_transforms.ops.quantize.autograd import expert_amax
from fq_transforms.spec import Group, Spec
from fq_transforms.state import UNCALIBRATED, State, group_state, is_concrete

__all__ = ["calibrate"]


def calibrate(
    params: Mapping[str, Tensor],
    batch: Any = None,
    *,
    spec: Spec,
    method: Method = MAX,
    statistics: Mapping[str, Tensor] | None = None,
    model: Module | None = None,
    forward: Forward | None = None,
) -> State:
    """An amax for each granule of each expert's weight, chosen by a method: by `Max`, amax = max(abs(w)).

    Where the spec has inputs with calibrated scales, `functional_call(model, params, batch)` runs for each batch,
    nothing quantized and without gradients, and amax = max(abs(x)) over all tokens that a weight was multiplied with,
    its sharers' and experts' as the spec says. The states of parts of the batches `merge` to that of all, exactly.

    Args:
        params: Names to tensors; may hold more than the spec names.
        batch: What the model runs on: a tensor, a tuple of arguments or a dict of keyword arguments is one batch; any
            other iterable is many of them. Not read without inputs: amax of weights needs only the weights. It has its
            place in the signature so that a training loop calls every calibration alike, and folds them with `merge`.
        spec: What to calibrate.
        method: How an amax of weights is chosen, see `fq_transforms.methods`. `merge` and `sync` are maxima, so they
            fold states of `Max`; the others choose for the weights at hand, which must hold whole granules.
        statistics: For `Mse`: by group key, the mean square of each input channel, floats [E, in] or [in] on the device
            of the weights, as `mean_squares` gives them. Squared errors are weighted by them, the diagonal of the
            Hessian of the layer's output.
        model: For inputs, the module whose parameters are `params`, in the mode (`eval()`) that it shall run in. It is
            not changed; what it writes into buffers is lost.
        forward: For inputs, `forward(call, batch)`, if `call(batch)` is not how a batch is passed; `call` takes the
            arguments of the model.

    Returns:
        A new state, detached from autograd, on the device of the weights. An expert of zeros has amax 0, which
        `fakequant` maps to zeros. The leaves of DTensors are DTensors, see `fq_transforms.state`; a leaf that collapses
        a sharded axis takes one all-reduce(max), together with all others over the same dimension of the mesh.

    Raises:
        KeyError: A parameter is missing; statistics lack a group.
        ImportError: tqdm is not installed, and the method is not `Max`.
        ValueError: A format has no amax that the method could choose; statistics are not as above, or all 0 for an
            expert; a method other than `Max` meets vmap, torch.compile, or a DTensor whose shard cuts a granule. A
            shape or dtype is not the spec's; a DTensor's shard cuts a block; a weight is NaN or infinite, and
            the parameter and expert are named. The values are read once, at the end, for all groups; under
            torch.compile and vmap, and on meta, they cannot be read, and a NaN or infinity stays in the amax, where
            `state.check` finds it. Of DTensors, the ranks that hold the amax raise; it is after the last collective.
            With inputs: there is no batch, or no model; an input is NaN or infinite, and the first such layer is named,
            and the batch by its number from 0; a layer never ran; a weight is used in another way than a product with
            an input, or is a DTensor. An expert without tokens is no error yet: it keeps the amax -inf, see `finish`.
            What the model raises comes through, with a note of the batch.

    Source: "max" calibration, ModelOpt 0.47 `modelopt.torch.quantization.calib.MaxCalibrator`; of the other methods in
    `fq_transforms.methods`.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.0]]), "experts.1.weight": torch.tensor([[0.5, 0.0]])}
        >>> calibrate(params, spec=select(params, {"*": INT8}))
        {'experts.*.weight': ExpertAmax(amax=tensor([2.0000, 0.5000]))}
    """
    check_method(method, statistics, spec)
    inputs = calibrated_inputs(params, batch, spec=spec, model=model, forward=forward)
    layouts: list[Layout | None] = []
    held: list[list[Tensor]] = []
    importances: list[Tensor | None] = []
    found: list[dict[str, Tensor]] = []
    for group in spec.groups:
        weights = [weight.detach() for weight in weights_of(params, group)]
        layouts.append(layout_of(group, weights))
        check_whole(method, group, layouts[-1])
        held.append(weights)
        importances.append(importance_of(group, weights, statistics))
        found.append(_local_leaves(group, weights, layouts[-1]))
    _reduce(found, layouts)

    state: State = {}
    largest: list[tuple[Tensor, Group, Sequence[int]]] = []
    groups = list(zip(spec.groups, held, layouts, found, importances, strict=True))
    for group, weights, layout, leaves, importance in progress(groups, method):
        experts = range(group.experts) if layout is None else layout.experts
        # A stateless format keeps no amax, but its weights are held to the same rule: finite.
        most = leaves.get("global_amax", leaves.get("amax"))
        if most is not None and is_concrete(most) and most.numel():
            largest.append((most if most.dim() == 1 else most.flatten(1).amax(1), group, experts))
        chosen = chosen_leaves(method, group, weights, layout, leaves, importance)
        placed = (
            leaf if layout is None else sharded_tensors(layout, [leaf], field)[0]
            for field, leaf in chosen.items()
            if field in group.leaf_shapes
        )
        state[group.key] = group_state(group.format, *placed)
    # Last: ranks may differ in what they find, and none may wait for one that has raised.
    _check_finite(largest)
    return state | inputs


def _local_leaves(group: Group, weights: Sequence[Tensor], layout: Layout | None) -> dict[str, Tensor]:
    """The amax leaves of the weights that this rank holds, by field; of MX formats, too, an amax an expert."""
    if layout is not None:
        if layout.is_empty:
            numbers: dict[str, Any] = {"dtype": torch.float32, "device": weights[0].device}
            shapes = {field: leaf.local_shape for field, leaf in layout.leaves.items()}
            return {field: torch.full(shape, UNCALIBRATED, **numbers) for field, shape in shapes.items()}
        weights = local_tensors(layout, weights)
    amax, global_amax = expert_amax(weights, format=group.format, transposed=group.transposed)
    return {"amax": amax} if global_amax is None else {"amax": amax, "global_amax": global_amax}


def _reduce(found: Sequence[dict[str, Tensor]], layouts: Sequence[Layout | None]) -> None:
    """Replace the leaves of sharded groups by their maxima over the ranks, all together."""
    leaves = [
        (where, field, layout)
        for where, layout in zip(found, layouts, strict=True)
        if layout is not None
        for field in layout.leaves
    ]
    reduced = reduce_leaves([(where[field], layout, field) for where, field, layout in leaves])
    for (where, field, _), leaf in zip(leaves, reduced, strict=True):
        where[field] = leaf


def _check_finite(largest: Sequence[tuple[Tensor, Group, Sequence[int]]]) -> None:
    """Raise ValueError for the first expert whose largest magnitude, [experts] a group, is not finite.

    With each group the numbers of its experts. One wait a device.
    """
    for device in {leaf.device for leaf, _, _ in largest}:
        found = [entry for entry in largest if entry[0].device == device]
        if bool(torch.cat([leaf for leaf, _, _ in found]).isfinite().all()):
            continue
        for leaf, group, experts in found:
            for expert, value in zip(experts, leaf.tolist(), strict=True):
                if not abs(value) < torch.inf:
                    raise ValueError(
                        f"calibrate: weight {group.expert_name(expert)!r} (expert {expert} of {group.key!r}): found "
                        f"the largest magnitude {value}, wanted finite values"
                    )
