"""Roles that inference engines make one matrix of, and so give one format and one scale."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fq_transforms.checkpoint.modelopt_names import FUSED
from fq_transforms.export.names import Part
from fq_transforms.spec import Group, Inputs
from fq_transforms.state import State

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
            named = [
                source_of.get(".".join(role if word == roles[0] else word for word in words)) for role in roles[1:]
            ]
            others = [other for other in named if other is not None and other != source]
            pairs = [pair for other in others for pair in _words_apart(source, other)]
            for other in others:
                if source in groups or other in groups:
                    _check_tied(state, groups, (source, other), pairs)
                if source in inputs or other in inputs:
                    _check_tied(state, inputs, (source, other), pairs, suffix=".input")


def _words_apart(first: str, second: str) -> list[tuple[str, str]]:
    """Where two keys of a state differ: what `tie` takes."""
    return [(a, b) for a, b in zip(first.split("."), second.split("."), strict=False) if a != b]


def _check_tied(
    state: State,
    groups: Mapping[str, Group],
    sources: tuple[str, str],
    pairs: Sequence[tuple[str, str]],
    *,
    suffix: str = "",
) -> None:
    a, b = (groups.get(source) for source in sources)
    names = [group.format.name if group else "not quantized" for group in (a, b)]
    both = " and ".join(repr(source + suffix) for source in sources)
    if a is None or b is None or a.format != b.format:
        raise ValueError(
            f"{both}: found {names[0]} and {names[1]}, wanted one format: inference engines fuse them into one matrix; "
            "let the rules treat them alike"
        )
    one, two = _one_number(state, a), _one_number(state, b)
    if one is None or two is None:
        return
    if len(one) != len(two):
        raise ValueError(
            f"state {both}: found {len(one)} and {len(two)} amax, wanted one for all experts or one for each in both: "
            "inference engines fuse them under one scale; let their rules have the same `per_expert_inputs`, and "
            "calibrate again"
        )
    if torch.equal(one, two):
        return
    expert = int((one != two).nonzero()[0, 0])
    of = f" for expert {expert}" if len(one) > 1 else ""
    raise ValueError(
        f"state {both}: found the amax {one[expert].item()} and {two[expert].item()}{of}, wanted one: inference "
        f"engines fuse them under one scale; call fqt.tie(state, {list(pairs)})"
    )


def _one_number(state: State, group: Group) -> Tensor | None:
    """The leaf of one number an expert, which engines share between fused roles; None if there is none."""
    leaves = state[group.key]
    leaf = leaves.get("global_amax", leaves.get("amax"))
    return leaf if leaf is not None and leaf.dim() == 1 else None
