"""`finish`: what becomes of experts that calibration showed no token."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fq_transforms.checks import weights_of
from fq_transforms.formats import FP8
from fq_transforms.ops.quantize.autograd import expert_amax
from fq_transforms.spec import Inputs, Spec
from fq_transforms.state import UNCALIBRATED, InputAmax, State, check

__all__ = ["finish"]

POLICIES = ("raise", "max-of-peers", "from-weights")


def finish(
    state: State, *, spec: Spec, unseen: str | float = "raise", params: Mapping[str, Tensor] | None = None
) -> State:
    """The state with an amax for the inputs of experts that have seen no token, once all batches and ranks are merged.

        unseen            amax of an unseen expert e, among the experts p of its group that have seen tokens
        "raise"           none: ValueError, naming layers and experts
        "max-of-peers"    max(amax[p])
        "from-weights"    max(amax[p] / max(abs(w[p]))) * max(abs(w[e]))
        a number          the number

    "from-weights" is this package's own: the input stands to the expert's weight as its peers' do; where a weight is
    zero it is "max-of-peers". A group that shares one amax has it as soon as one of its experts has seen a token.
    Whatever the choice, `tokens` still says who has seen none.

    Args:
        state: From `calibrate`, `merge` or `sync_inputs`.
        spec: What it was calibrated by.
        unseen: The choice.
        params: For "from-weights", the weights.

    Returns:
        A new state; entries without unseen experts are the same objects.

    Raises:
        KeyError: A group or a parameter is missing.
        ValueError: `unseen` is none of these, or no finite number > 0; the state does not fit the spec, or has an amax
            that is NaN, infinite or negative; "raise" found unseen experts; no expert of a group has seen a token, so
            that it has no peers; `params` is missing.

    Source: "max-of-peers" is what ModelOpt 0.47's export does (`set_expert_quantizer_amax`), with a warning.

    Example:
        >>> params = {f"experts.{i}.w1.weight": torch.full((2, 2), i + 1.0) for i in range(3)}
        >>> import fq_transforms as fqt
        >>> spec = fqt.select(params, {}, inputs={"*": FP8}, per_expert="*")
        >>> seen = InputAmax(torch.tensor([1.0, 3.0, -torch.inf]), torch.tensor([5.0, 2.0, 0.0], dtype=torch.float64))
        >>> state = {"experts.*.w1.weight.input": seen}
        >>> finish(state, spec=spec, unseen="max-of-peers")["experts.*.w1.weight.input"].amax
        tensor([1., 3., 3.])
        >>> finish(state, spec=spec, unseen="from-weights", params=params)["experts.*.w1.weight.input"].amax
        tensor([1.0000, 3.0000, 4.5000])
    """
    if isinstance(unseen, str) and unseen not in POLICIES:
        raise ValueError(f"unseen: found {unseen!r}, wanted one of {POLICIES}, or a number")
    if not isinstance(unseen, str) and not 0 < unseen < torch.inf:
        raise ValueError(f"unseen: found {unseen!r}, wanted a finite number > 0")
    if unseen == "from-weights" and params is None:
        raise ValueError("params: found None, wanted the weights, for unseen='from-weights'")
    check(state, spec, values=False)
    finished = dict(state)
    for inputs in spec.inputs:
        entry = state[inputs.key]
        if unseen != "raise" and isinstance(entry, InputAmax) and bool((entry.amax == UNCALIBRATED).any()):
            finished[inputs.key] = entry._replace(amax=_filled(inputs, entry.amax, unseen, params))
    check(finished, spec)
    return finished


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
