"""The inputs of ranks that calibrated on different batches: one state, as if one rank had seen all of them."""

from typing import TYPE_CHECKING

import torch

from fq_transforms.dtensor import largest_over, sum_over
from fq_transforms.spec import Spec
from fq_transforms.state import InputAmax, State, check

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sync_inputs"]


def sync_inputs(state: State, spec: Spec, group: "ProcessGroup", *, same_experts: bool = True) -> State:
    """The state with, for all inputs, amax = max(amax of all ranks) and tokens = sum(tokens of all ranks).

    What `merge` of all ranks' states is, weights left alone. Data-parallel ranks have the same experts and each its own
    tokens. Expert-parallel ranks have other experts each: there only the amax that a group's experts share is reduced,
    with `same_experts=False`; an expert's own amax and count stay its rank's.

    Args:
        state: From `calibrate`, of this rank's own batches; an expert without tokens is no mistake yet.
        spec: The same on all ranks, but for the experts' names.
        group: Ranks with different tokens, this one among them.
        same_experts: False for expert-parallel ranks.

    Returns:
        A new state; weights are the same objects. At most one all-reduce(max) and one all-reduce(sum), on every rank of
        the group. NaN wins.

    Raises:
        KeyError: A group is missing from the state.
        ValueError: `group` is no process group; the state does not fit the spec. Before anything is sent.

    Source: ModelOpt 0.47 `max_calibrate`, which reduces inputs over data and expert parallel ranks.

    Example:
        >>> import fq_transforms as fqt
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> fq = fqt.transform(fqt.select(dict(model.named_parameters()), {}, inputs={"*": fqt.FP8}), model=model)
        >>> state = fq.calibrate(dict(model.named_parameters()), torch.tensor([[1.0, -3.0]]))
        >>> sync_inputs(state, fq.spec, torch.distributed.group.WORLD)
        {'weight.input': InputAmax(amax=tensor([3.]), tokens=tensor([1.], dtype=torch.float64))}
        >>> torch.distributed.destroy_process_group()
    """
    # None would mean every rank.
    if not isinstance(group, torch.distributed.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"group: found {group!r}, wanted a process group that this rank is in")
    check(state, spec, values=False)
    entries = {i.key: (i, entry) for i in spec.inputs if isinstance(entry := state[i.key], InputAmax)}
    for key, (_, entry) in entries.items():
        if entry.amax.is_meta:
            raise ValueError(f"sync_inputs: state {key!r}: found meta tensors, wanted values; calibrate first")
    chosen = {key: entry for key, (inputs, entry) in entries.items() if same_experts or not inputs.per_expert}
    amaxes = largest_over(group, [entry.amax for entry in chosen.values()])
    tokens = [entry.tokens for entry in chosen.values()]
    if same_experts:
        tokens = sum_over(group, tokens)
    return state | {
        key: InputAmax(*leaves) for key, leaves in zip(chosen, zip(amaxes, tokens, strict=True), strict=True)
    }
