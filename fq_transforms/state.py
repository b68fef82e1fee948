"""The quantizer state: nested plain dicts of floating tensors, group key to leaf name to tensor [E, ...]. Nothing else.

    {"layers.0.mlp.experts.*.w1.weight": {"amax": [E, *format.amax_shape(out, in)]},
     "layers.0.mlp.experts.*.w1.weight.input": {"amax": [1] or [E], "tokens": [E]}, ...}

    format                  leaves
    most                    amax, fp32 [E, *format.amax_shape(out, in)]; for dynamic NVFP4 the expert's global amax, [E]
    static two-level        amax, fp32 [E, out, in / block], and global_amax, fp32 [E]
    MX                      none: every scale comes from the weights themselves
    inputs                  amax, fp32 [1] for all experts of a group, or [E]; tokens, fp64 [E], how many each has seen

A state is a plain pytree: optree and torch.utils._pytree map over it, torch.func closes over it or maps along it,
torch.save, torch.load(weights_only=True) and torch DCP store it. Formats, names and shapes are static: see `Spec`.
More, with laws, storage and DTensors: docs/state.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from fq_transforms.checks import (
    UNCALIBRATED,
    check_same_leaves,
    check_same_spread,
    plain_weights_of,
    types_of,
    weights_of,
)
from fq_transforms.checks import check_state as check
from fq_transforms.dtensor import layout_of, sharded_tensors
from fq_transforms.spec import Inputs, Spec

__all__ = ["GroupState", "State", "check", "flatten", "init", "merge", "tie", "unflatten"]

GroupState: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, GroupState]
Tree = TypeVar("Tree", bound=Mapping[str, Mapping[str, Tensor]])  # a state, or packed weights


def init(params: Mapping[str, Tensor], *, spec: Spec) -> State:
    """The state before calibration: every amax -inf, the identity of `merge`. Meta parameters give a meta state.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape, dtype or device is not the spec's; a DTensor's shard cuts a block.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {f"experts.{i}.weight": torch.ones(8, 4) for i in range(2)}
        >>> init(params, spec=fqt.select(params, {"*": fqt.FP8}))
        {'experts.*.weight': {'amax': tensor([-inf, -inf])}}
    """
    state: State = {}
    for group in spec.groups:
        weights = weights_of(params, group)
        layout, device = layout_of(group, weights), weights[0].device
        leaves: GroupState = {}
        for name, shape in group.leaf_shapes.items():
            here = shape if layout is None else layout.leaves[name].local_shape
            leaf = torch.full(here, UNCALIBRATED, dtype=torch.float32, device=device)
            leaves[name] = leaf if layout is None else sharded_tensors(layout, [leaf], name)[0]
        state[group.key] = leaves
    for inputs in spec.inputs:
        state[inputs.key] = unseen_inputs(inputs, plain_weights_of(params, inputs)[0].device)
    return state


def unseen_inputs(inputs: Inputs, device: torch.device) -> GroupState:
    """The entry of a state for inputs of which no token was seen."""
    if not inputs.leaf_shapes:
        return {}
    amax = torch.full(inputs.leaf_shapes["amax"], UNCALIBRATED, dtype=torch.float32, device=device)
    return {"amax": amax, "tokens": torch.zeros(inputs.leaf_shapes["tokens"], dtype=torch.float64, device=device)}


def merge(a: State, b: State) -> State:
    """Elementwise maximum of amax, and the sum of tokens: the state of both calibrations together. NaN wins.

    Associative and commutative, with `init` as its identity, so microbatches, data-parallel ranks and resumed runs all
    fold in the same way.

    Raises:
        ValueError: The states differ in a group, or in the name, shape, device or placements of a leaf; the message
            names the leaf.

    Example:
        >>> merge({"w": {"amax": torch.tensor([1.0, 5.0])}}, {"w": {"amax": torch.tensor([2.0, 3.0])}})
        {'w': {'amax': tensor([2., 5.])}}
    """
    leaves, others = flatten(a), flatten(b)
    check_same_leaves("merge: second state", others, types_of(leaves))
    if a.keys() != b.keys():  # of groups without leaves
        raise ValueError(f"merge: found groups {sorted(a.keys() ^ b.keys())[:4]} in one state only, wanted the same")
    for name, leaf in leaves.items():
        if leaf.device != others[name].device:
            raise ValueError(f"merge: state {name!r} is on {leaf.device} and {others[name].device}, wanted one device")
        check_same_spread(f"merge: state {name!r}", others[name], leaf)

    def join(path: tuple[Any, ...], one: Tensor, other: Tensor) -> Tensor:
        return one + other if path[-1] == "tokens" else torch.maximum(one, other)

    # A dict of dicts is a PyTree, which optree's own types do not say.
    merged: Any = optree.tree_map_with_path(join, a, b)  # pyright: ignore[reportArgumentType]
    return merged


def tie(state: State, pairs: Iterable[tuple[str, str]]) -> State:
    """The state with one scale per expert for two roles that an inference engine fuses: the larger amax of each expert.

    Gate and up, w1 and w3, are one matrix to such engines, with one global scale. Tied are the leaves of one number per
    expert: `amax` [E] and `global_amax`. Scales of channels and blocks are the engine's own for each. Inputs are tied
    likewise: their `amax` [1] or [E], and of `tokens` the larger count is kept.

    Args:
        state: From `calibrate`, or loaded.
        pairs: Two words each, parts of group keys between dots: ("gate_proj", "up_proj"), ("w1", "w3"). Pairs that
            share a role tie all of theirs, in any order: (q, k) and (k, v) tie three.

    Returns:
        A new state; leaves that are not tied are the same objects.

    Raises:
        ValueError: A pair is not two words, is one word twice, or matches no group; a group has no partner, or one of
            other leaves.

    Source: the shared global scale of fused experts in ModelOpt 0.47's export and in vLLM.

    Example:
        >>> one, two = ({"amax": torch.tensor([a, 1.0])} for a in (2.0, 3.0))
        >>> tie({"experts.*.w1.weight": one, "experts.*.w3.weight": two}, [("w1", "w3")])["experts.*.w1.weight"]
        {'amax': tensor([3., 1.])}
    """
    tied_to: dict[str, list[str]] = {key: [key] for key in state}  # shared by all that have one scale
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
            raise ValueError(f"pairs: found {pair!r} as one of them, wanted pairs of words, as in [('w1', 'w3')]")
        first, second = pair
        if first == second:
            raise ValueError(f"pair {(first, second)}: found one word twice, wanted two roles to tie")
        keys = [key for key in state if first in key.split(".")]
        if not keys:
            raise ValueError(f"pair {(first, second)}: matches no group, among {len(state)} such as {list(state)[:2]}")
        for key in keys:
            other = ".".join(second if word == first else word for word in key.split("."))
            _check_alike(state, key, other)
            if tied_to[key] is not tied_to[other]:
                tied_to[key] += tied_to[other]
                for name in tied_to[other]:
                    tied_to[name] = tied_to[key]
    tied = dict(state)
    for key, group in state.items():
        if len(tied_to[key]) > 1:
            tied[key] = {
                name: own if own.dim() != 1 else reduce(torch.maximum, (state[other][name] for other in tied_to[key]))
                for name, own in group.items()
            }
    return tied


def _check_alike(state: State, key: str, other: str) -> None:
    """Raise ValueError unless two groups have the same leaves of one number per expert."""
    shapes = [{name: tuple(leaf.shape) for name, leaf in state.get(one, {}).items()} for one in (key, other)]
    # Of scales of channels and blocks only that there are some, for as many experts: k has fewer than q.
    alike = [{name: (len(shape), shape[0]) for name, shape in of.items()} for of in shapes]
    if other not in state or alike[0] != alike[1]:
        found = f"{shapes[1]}" if other in state else "a missing group"
        raise ValueError(f"state {key!r}: found {found} for {other!r}, wanted {shapes[0]} to be tied to")


def flatten(tree: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Leaves by flat name, `{group key}.{leaf name}`: what safetensors and other flat stores take.

    Args:
        tree: A state, or packed weights.

    Raises:
        ValueError: A group is not a dict of tensors; the message names it.

    Example:
        >>> flatten({"mlp.experts.down_proj": {"amax": torch.tensor([1.0])}})
        {'mlp.experts.down_proj.amax': tensor([1.])}
    """
    for key, group in tree.items():
        if not isinstance(group, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"state {key!r}: found {type(group).__name__}, wanted a dict of tensors")
    return {f"{key}.{name}": leaf for key, group in tree.items() for name, leaf in group.items()}


def unflatten(leaves: Mapping[str, Tensor], like: Tree) -> Tree:
    """The tree whose flat leaves are `leaves` and whose structure is that of `like` (`fq.init(params)`, meta will do).

    Raises:
        ValueError: A leaf is missing, unexpected, or of another shape, dtype or placements; the message names it.

    Example:
        >>> unflatten({"w.amax": torch.tensor([1.0, 2.0])}, {"w": {"amax": torch.empty(2, device="meta")}})
        {'w': {'amax': tensor([1., 2.])}}
    """
    wanted = flatten(like)
    check_same_leaves("unflatten", leaves, types_of(wanted))
    for name, leaf in wanted.items():
        check_same_spread(f"unflatten: leaf {name!r}", leaves[name], leaf)
    tree: Any = {key: {name: leaves[f"{key}.{name}"] for name in group} for key, group in like.items()}
    return tree
