"""Calibration: parameters to state, as a pure function."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fq_transforms.ops.autograd import expert_amax
from fq_transforms.select import Group, Spec, weights_of
from fq_transforms.state import State, group_state, is_concrete

__all__ = ["calibrate"]


def calibrate(params: Mapping[str, Tensor], batch: Any = None, *, spec: Spec) -> State:
    """The largest absolute value of each expert's weight, at the granularity of its format: amax = max(abs(w)).

    Args:
        params: Names to tensors; may hold more than the spec names.
        batch: Not read: max calibration needs only the weights. It has its place in the signature so that a training
            loop calls every calibration alike, and folds them with `merge`.
        spec: What to calibrate.

    Returns:
        A new state, detached from autograd, on the device of the weights. An expert of zeros has amax 0, which
        `fakequant` maps to zeros.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape or dtype is not the spec's; a weight is NaN or infinite; the parameter and expert are named.
            The values are read once, at the end, for all groups; under torch.compile and vmap, and on meta, they cannot
            be read, and a NaN or infinity stays in the amax, where `state.check` finds it.

    Source: "max" calibration, ModelOpt 0.47 `modelopt.torch.quantization.calib.MaxCalibrator`.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.0]]), "experts.1.weight": torch.tensor([[0.5, 0.0]])}
        >>> calibrate(params, spec=select(params, {"*": INT8}))
        {'experts.*.weight': ExpertAmax(amax=tensor([2.0000, 0.5000]))}
    """
    del batch
    state: State = {}
    largest: list[Tensor] = []
    for group in spec.groups:
        weights = [weight.detach() for weight in weights_of(params, group)]
        # A stateless format keeps no amax, but its weights are held to the same rule: finite.
        amax, global_amax = expert_amax(weights, format=group.format, transposed=group.transposed)
        largest.append(amax.reshape(group.experts, -1).amax(1) if global_amax is None else global_amax)
        leaves = (amax,) if global_amax is None else (amax, global_amax)
        state[group.key] = group_state(group.format, *leaves)
    _check_finite([(leaf, group) for leaf, group in zip(largest, spec.groups, strict=True) if is_concrete(leaf)])
    return state


def _check_finite(largest: Sequence[tuple[Tensor, Group]]) -> None:
    """Raise ValueError for the first expert whose largest magnitude, [E] a group, is not finite. One wait a device."""
    for device in {leaf.device for leaf, _ in largest}:
        found = [(leaf, group) for leaf, group in largest if leaf.device == device]
        if bool(torch.cat([leaf for leaf, _ in found]).isfinite().all()):
            continue
        for leaf, group in found:
            for expert, value in enumerate(leaf.tolist()):
                if not abs(value) < torch.inf:
                    raise ValueError(
                        f"calibrate: weight {group.expert_name(expert)!r} (expert {expert} of {group.key!r}): found "
                        f"the largest magnitude {value}, wanted finite values"
                    )
