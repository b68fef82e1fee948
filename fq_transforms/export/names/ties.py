"""Roles that inference engines fuse into one matrix, so that they need one format and one scale."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fq_transforms.checkpoint.modelopt_names import FUSED
from fq_transforms.export.names.from_memory import Source
from fq_transforms.spec import Group
from fq_transforms.state import State

__all__ = ["check_ties", "fused_sources", "is_fused"]

# ModelOpt's, and those of DeepSeek's latent attention in vLLM and SGLang.
FUSED_BY_ENGINES = (*FUSED, ("q_a_proj", "kv_a_proj_with_mqa"))


def check_ties(sources: Iterable[Source], state: State | None) -> None:
    """Raise ValueError unless fused roles have one format and, where it is one number per weight or input, one amax.

    Without a state only formats are compared: who makes it ties it.
    """
    for fused in fused_sources(sources):
        source, others = fused[0], fused[1:]
        # What the error tells to tie: all that is fused with this source.
        pairs = [pair for other in others for pair in _words_apart(source.name, other.name)]
        for other in others:
            _check_tied(state, (source.name, other.name), (source.group, other.group), pairs)
            inputs = f"{source.name}.input", f"{other.name}.input"
            _check_tied(state, inputs, (source.inputs, other.inputs), pairs)


def fused_sources(sources: Iterable[Source]) -> list[list[Source]]:
    """Sources that engines fuse into one matrix, two or more together."""
    # The experts of a group are alike, so the first stands for all.
    source_of = {tensor.name.replace("*", "0"): source for source in sources for tensor in source.tensors}
    found: list[list[Source]] = []
    for name, source in source_of.items():
        words = name.split(".")
        for first, *roles in (roles for roles in FUSED_BY_ENGINES if roles[0] in words):
            named = [source_of.get(".".join(role if word == first else word for word in words)) for role in roles]
            others = [other for other in named if other is not None and other is not source]
            if others:
                found.append([source, *others])
    return found


def is_fused(name: str) -> bool:
    """True for a tensor of the files that engines fuse with others.

    Example:
        >>> is_fused("model.layers.0.self_attn.k_proj.weight"), is_fused("model.layers.0.self_attn.o_proj.weight")
        (True, False)
    """
    return any(role in name.split(".") for roles in FUSED_BY_ENGINES for role in roles)


def _words_apart(first: str, second: str) -> list[tuple[str, str]]:
    """Where two keys of a state differ: what `tie` takes."""
    return [(a, b) for a, b in zip(first.split("."), second.split("."), strict=False) if a != b]


def _check_tied(
    state: State | None,
    names: tuple[str, str],
    groups: tuple[Group | None, Group | None],
    pairs: Sequence[tuple[str, str]],
) -> None:
    (a, b), both = groups, " and ".join(map(repr, names))
    if a is None and b is None:
        return
    if a is None or b is None or a.format != b.format:
        found = [group.format.name if group else "not quantized" for group in groups]
        raise ValueError(
            f"{both}: found {found[0]} and {found[1]}, wanted one format: inference engines fuse them into one matrix; "
            "let the rules treat them alike"
        )
    if state is None:
        return
    one, two = _one_number(state, a), _one_number(state, b)
    if one is None or two is None:
        return
    if len(one) != len(two):
        raise ValueError(
            f"state {both}: found {len(one)} and {len(two)} amax, wanted one for all experts or one per expert in "
            "both: inference engines fuse them under one scale; let their rules have the same `per_expert_inputs`, and "
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
    """The leaf of one number per expert, which engines share between fused roles; None if there is none."""
    leaves = state[group.key]
    leaf = leaves.get("global_amax", leaves.get("amax"))
    return leaf if leaf is not None and leaf.dim() == 1 else None
