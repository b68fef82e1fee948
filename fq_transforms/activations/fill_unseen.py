"""What becomes of experts to which calibration showed no token."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fq_transforms.checks import UNCALIBRATED, check_state, refuse_compiled, refuse_transforms, weights_of
from fq_transforms.formats import FP8
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.spec import Inputs, Spec
from fq_transforms.state import State

__all__ = ["fill_unseen"]

POLICIES = ("raise", "max-of-peers", "from-weights")


def fill_unseen(state: State, *, spec: Spec, unseen: str | float, params: Mapping[str, Tensor] | None = None) -> State:
    """`Transform.fill_unseen`, with the spec of the Transform."""
    refuse_transforms("fill_unseen", "fill the state before")
    refuse_compiled("fill_unseen", "fill the state before")
    if isinstance(unseen, str) and unseen not in POLICIES:
        raise ValueError(f"unseen: found {unseen!r}, wanted one of {POLICIES}, or a number")
    if not isinstance(unseen, str) and not 0 < unseen < torch.inf:
        raise ValueError(f"unseen: found {unseen!r}, wanted a finite number > 0")
    if unseen == "from-weights" and params is None:
        raise ValueError("params: found None, wanted the weights, for unseen='from-weights'")
    check_state(state, spec, values=False)
    filled = dict(state)
    for inputs in spec.inputs:
        amax = state[inputs.key].get("amax")
        if unseen != "raise" and amax is not None and bool((amax == UNCALIBRATED).any()):
            filled[inputs.key] = state[inputs.key] | {"amax": _filled(inputs, amax, unseen, params)}
    check_state(filled, spec)
    return filled


def _filled(inputs: Inputs, amax: Tensor, unseen: str | float, params: Mapping[str, Tensor] | None) -> Tensor:
    is_seen = amax != UNCALIBRATED
    if not isinstance(unseen, str):
        return torch.where(is_seen, amax, unseen)
    if not bool(is_seen.any()):
        raise ValueError(
            f"inputs {inputs.key!r}: found no token for any of {inputs.experts} experts, wanted peers for "
            f"unseen={unseen!r}; calibrate with more batches, or pass a number"
        )
    most = amax.max()
    if unseen == "max-of-peers" or not inputs.per_expert:
        return torch.where(is_seen, amax, most)
    assert params is not None
    weights, _ = expert_amax([w.detach() for w in weights_of(params, inputs)], format=FP8)
    weights = weights.to(amax.device)
    has_ratio = is_seen & (weights > 0)
    ratio = torch.where(has_ratio, amax / weights, 0.0).max()
    guess = torch.where((weights > 0) & has_ratio.any(), ratio * weights, most)
    return torch.where(is_seen, amax, guess)
