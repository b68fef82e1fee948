"""Roles that inference engines make one matrix of, and so give one format and one scale."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fq_transforms.checkpoint.modelopt_names import FUSED
from fq_transforms.export.names import Part
from fq_transforms.spec import Group, Inputs
from fq_transforms.state import BlockAmax, ExpertAmax, InputAmax, State

__all__ = ["check_ties"]

# ModelOpt's, and those of DeepSeek's latent attention in vLLM, SGLang.
FUSED_BY_ENGINES = (*FUSED, ("q_a_proj", "kv_a_proj_with_mqa"))


def check_ties(
    state: State, groups: Mapping[str, Group], inputs: Mapping[str, Inputs], found: Mapping[str, list[Part]]
) -> None:
    """Raise unless roles that engines fuse have one format and one scale, of weights with one number and of inputs."""
    # The experts of a group are alike, so the first stands for all.
    source_of = {part.name.replace("*", "0"): source for source, of_source in found.items() for part in of_source}
    for name, source in source_of.items():
        words = name.split(".")
        for roles in (roles for roles in FUSED_BY_ENGINES if roles[0] in words):
            for role in roles[1:]:
                other = source_of.get(".".join(role if word == roles[0] else word for word in words))
                if other is not None and other != source and (source in groups or other in groups):
                    _check_tied(state, groups, source, other, roles)
                    if source in inputs or other in inputs:
                        _check_tied(state, inputs, source, other, roles)


def _check_tied(state: State, groups: Mapping[str, Group], first: str, second: str, roles: tuple[str, ...]) -> None:
    a, b = groups.get(first), groups.get(second)
    names = [group.format.name if group else "not quantized" for group in (a, b)]
    first, second = (group.key if group else name for group, name in ((a, first), (b, second)))
    if a is None or b is None or a.format != b.format:
        raise ValueError(
            f"{first!r} and {second!r}: found {names[0]} and {names[1]}, wanted one format: inference engines fuse "
            "them into one matrix; let the rules treat them alike"
        )
    one, two = _one_number(state, a), _one_number(state, b)
    if one is None or two is None:
        return
    one, two = torch.broadcast_tensors(one, two)  # of inputs that share one amax, and of such as do not
    if torch.equal(one, two):
        return
    expert = int((one != two).nonzero()[0, 0])
    pairs = [(roles[0], role) for role in roles[1:]]
    pairs += pairs[:-1]  # again, for the first to get what the last has
    raise ValueError(
        f"state {first!r} and {second!r}: found the amax {one[expert].item()} and {two[expert].item()} for expert "
        f"{expert}, wanted one: inference engines fuse them under one scale; call fqt.tie(state, {pairs})"
    )


def _one_number(state: State, group: Group) -> Tensor | None:
    """The leaf of one number an expert, which engines share between fused roles; None if there is none."""
    leaves = state[group.key]
    if isinstance(leaves, BlockAmax):
        return leaves.global_amax
    return leaves.amax if isinstance(leaves, ExpertAmax | InputAmax) and leaves.amax.dim() == 1 else None
