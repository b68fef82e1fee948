"""The quantizer state: a dict from group key to a NamedTuple of floating tensors, [E, ...]. Nothing else.

    {"layers.0.mlp.experts.*.w1.weight": ExpertAmax(amax=[E, *format.amax_shape(out, in)]),
     "layers.0.mlp.experts.*.w1.weight.input": InputAmax(amax=[1] or [E], tokens=[E]), ...}

A state is a plain pytree: optree and torch.utils._pytree map over it, torch.func closes over it or maps along it, and a
checkpoint stores its tensors. Formats, names and shapes are static and live in the `Spec`.

The leaves of DTensor weights are DTensors on the same mesh: an axis that the leaf has is sharded as it is in the
weights, and one that it collapses is replicated. A check of values reads each rank's own shard, so an error may be one
rank's alone; checks of shapes and placements are alike on all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from fq_transforms.checks import is_mapped, is_sharded, spread_in_words, spread_of, weights_of
from fq_transforms.dtensor import (
    Layout,
    check_leaf,
    layout_of,
    local_tensors,
    local_values,
    position,
    sharded_tensors,
)
from fq_transforms.formats import Format
from fq_transforms.spec import Group, Inputs, Spec, ranges

__all__ = [
    "BlockAmax",
    "ExpertAmax",
    "InputAmax",
    "State",
    "Stateless",
    "check",
    "flatten",
    "init",
    "merge",
    "tie",
    "unflatten",
]


class ExpertAmax(NamedTuple):
    """One leaf: `amax`, fp32 [E, *format.amax_shape(out, in)]; for dynamic NVFP4 the expert's global amax, [E]."""

    amax: Float32[Tensor, "..."]


class BlockAmax(NamedTuple):
    """Static two-level formats: `amax`, fp32 [E, out, in / block], and `global_amax`, fp32 [E]."""

    amax: Float32[Tensor, "..."]
    global_amax: Float32[Tensor, "..."]


class InputAmax(NamedTuple):
    """Inputs: `amax`, fp32 [1] for all experts of a group, or [E]; and how many `tokens` each has seen, fp64 [E].

    A count is a float, which torch.func takes anywhere in a tree; fp64 counts exactly up to 2**53.
    """

    amax: Float32[Tensor, "..."]
    tokens: Float64[Tensor, "..."]


class Stateless(NamedTuple):
    """MX formats, and inputs by token: every scale comes from the values themselves, so there is no leaf."""


GroupState: TypeAlias = ExpertAmax | BlockAmax | InputAmax | Stateless
_GROUP_STATES = (ExpertAmax, BlockAmax, InputAmax, Stateless)  # looked up at each call of `fakequant`
_DTYPES = {"tokens": torch.float64}  # of leaves that are not fp32
State: TypeAlias = dict[str, GroupState]
Tree = TypeVar("Tree", bound=Mapping[str, Any])  # a state, or packed weights
LeafType: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # a leaf's shape and dtype

# The identity of max; as an amax it is invalid, so that a state that was never calibrated cannot pass for one of zeros.
UNCALIBRATED = -torch.inf


def init(params: Mapping[str, Tensor], *, spec: Spec) -> State:
    """The state before calibration: every amax -inf, the identity of `merge`. Meta parameters give a meta state.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape, dtype or device is not the spec's; a DTensor's shard cuts a block.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> from fq_transforms.select import select
        >>> params = {f"experts.{i}.weight": torch.ones(8, 4) for i in range(2)}
        >>> init(params, spec=select(params, {"*": FP8}))
        {'experts.*.weight': ExpertAmax(amax=tensor([-inf, -inf]))}
    """
    state: State = {}
    for group in spec.groups:
        weights = weights_of(params, group)
        layout, device = layout_of(group, weights), weights[0].device
        leaves: list[Tensor] = []
        for field, shape in group.leaf_shapes.items():
            here = shape if layout is None else layout.leaves[field].local_shape
            leaf = torch.full(here, UNCALIBRATED, dtype=torch.float32, device=device)
            leaves += [leaf] if layout is None else sharded_tensors(layout, [leaf], field)
        state[group.key] = group_state(group.format, *leaves)
    for inputs in spec.inputs:
        state[inputs.key] = unseen_inputs(inputs, plain_weights_of(params, inputs)[0].device)
    return state


def unseen_inputs(inputs: Inputs, device: torch.device) -> GroupState:
    """The entry of a state for inputs that no token was seen of."""
    if not inputs.leaf_shapes:
        return Stateless()
    amax = torch.full(inputs.leaf_shapes["amax"], UNCALIBRATED, dtype=torch.float32, device=device)
    return InputAmax(amax, torch.zeros(inputs.leaf_shapes["tokens"], dtype=torch.float64, device=device))


def plain_weights_of(params: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """`weights_of`, refusing DTensors: whose inputs a rank sees, their placements do not say."""
    weights = weights_of(params, inputs)
    if is_sharded(weights[0]):
        raise ValueError(
            f"inputs {inputs.key!r}: found the DTensor {inputs.names[0]!r}, wanted plain tensors, of which each "
            "rank has its own; inputs of DTensors are not observed"
        )
    return weights


def merge(a: State, b: State) -> State:
    """Elementwise maximum of amax, and the sum of tokens: the state of both calibrations together. NaN wins.

    Associative and commutative, with `init` as its identity, so microbatches, data-parallel ranks and resumed runs all
    fold in the same way.

    Raises:
        ValueError: The states differ in a key, a type, or the shape, device or placements of a leaf; the message names
            the leaf.

    Example:
        >>> a = {"w": ExpertAmax(torch.tensor([1.0, 5.0]))}
        >>> b = {"w": ExpertAmax(torch.tensor([2.0, 3.0]))}
        >>> merge(a, b)
        {'w': ExpertAmax(amax=tensor([2., 5.]))}
    """
    wanted = _types_of(flatten(a))
    for which, state in (("first", a), ("second", b)):
        check_same_leaves(f"merge: {which} state", flatten(state), wanted)
    others = flatten(b)
    for name, leaf in flatten(a).items():
        if leaf.device != others[name].device:
            raise ValueError(f"merge: state {name!r} is on {leaf.device} and {others[name].device}, wanted one device")
        _check_same_spread(f"merge: state {name!r}", others[name], leaf)
    for key in a.keys() | b.keys():
        if type(a.get(key)) is not type(b.get(key)):
            raise ValueError(
                f"merge: group {key!r} is {_type_name(a.get(key))} and {_type_name(b.get(key))}, wanted one type"
            )
    # A dict of NamedTuples is a PyTree, which optree's own types do not say.
    merged: Any = optree.tree_map(torch.maximum, a, b)  # pyright: ignore[reportArgumentType]
    for key, group in a.items():
        other = b[key]
        if isinstance(group, InputAmax) and isinstance(other, InputAmax):
            merged[key] = merged[key]._replace(tokens=group.tokens + other.tokens)
    return merged


def tie(state: State, pairs: Iterable[tuple[str, str]]) -> State:
    """The state with one scale an expert for two roles that an inference engine fuses: the larger amax of each expert.

    Gate and up, w1 and w3, are one matrix to such engines, with one global scale. What is tied are the leaves of one
    number an expert: `amax` [E] and `global_amax`. Scales of channels and blocks are the engine's own for each. Inputs
    are tied likewise: their `amax` [1] or [E], and of `tokens` the larger count is kept.

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
        >>> one, two = (ExpertAmax(torch.tensor([a, 1.0])) for a in (2.0, 3.0))
        >>> tied = tie({"experts.*.w1.weight": one, "experts.*.w3.weight": two}, [("w1", "w3")])
        >>> tied["experts.*.w1.weight"].amax, tied["experts.*.w3.weight"].amax
        (tensor([3., 1.]), tensor([3., 1.]))
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
            leaves = zip(*(state[name] for name in tied_to[key]), strict=True)
            tied[key] = type(group)(
                *(
                    own if own.dim() != 1 else reduce(torch.maximum, all_)
                    for own, all_ in zip(group, leaves, strict=True)
                )
            )
    return tied


def _check_alike(state: State, key: str, other: str) -> None:
    """Raise ValueError unless two groups have the same leaves of one number an expert."""
    a, b = state[key], state.get(other)
    shapes = [None if group is None else [tuple(leaf.shape) for leaf in group] for group in (a, b)]
    # Of scales of channels and blocks only that there are some, for as many experts: k has fewer than q.
    alike = [None if of is None else [(len(shape), shape[0]) for shape in of] for of in shapes]
    if b is None or type(a) is not type(b) or alike[0] != alike[1]:
        found = "a missing group" if b is None else f"{_type_name(b)} {shapes[1]}"
        raise ValueError(
            f"state {key!r}: found {found} for {other!r}, wanted {_type_name(a)} {shapes[0]} to be tied to"
        )


def flatten(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leaves by flat name, `{group key}.{field}`: what safetensors and other flat stores take.

    Args:
        tree: A state, or packed weights: group keys to NamedTuples of tensors.

    Example:
        >>> flatten({"mlp.experts.down_proj": ExpertAmax(torch.tensor([1.0]))})
        {'mlp.experts.down_proj.amax': tensor([1.])}
    """
    for key, group in tree.items():
        if not hasattr(group, "_fields"):
            _check_group(key, group, "leaves")
    return {
        f"{key}.{field}": leaf for key, group in tree.items() for field, leaf in zip(group._fields, group, strict=True)
    }


def unflatten(leaves: Mapping[str, Tensor], like: Tree) -> Tree:
    """The state whose flat leaves are `leaves` and whose structure is that of `like` (`init(params)`, meta will do).

    Likewise for packed weights.

    Raises:
        ValueError: A leaf is missing, unknown, or of another shape, dtype or placements; the message names it.

    Example:
        >>> like = {"w": ExpertAmax(torch.empty(2, device="meta"))}
        >>> unflatten({"w.amax": torch.tensor([1.0, 2.0])}, like)
        {'w': ExpertAmax(amax=tensor([1., 2.]))}
    """
    wanted = flatten(like)
    check_same_leaves("unflatten", leaves, _types_of(wanted))
    for name, leaf in wanted.items():
        _check_same_spread(f"unflatten: leaf {name!r}", leaves[name], leaf)
    groups: dict[str, Any] = dict(like)
    tree: Any = {key: type(g)(*(leaves[f"{key}.{field}"] for field in g._fields)) for key, g in groups.items()}
    return tree


def check(state: State, spec: Spec, *, values: bool | Callable[[Tensor], bool] = True) -> None:
    """Raise unless the state fits the spec and, with `values`, every amax is finite and not negative.

    `values` may be a function that says of which leaves the values are read.

    Reading values waits for the device. `fakequant` reads them on the CPU only; elsewhere an invalid amax makes the
    weights that it scales NaN, and this function says which it was.

    Raises:
        KeyError: A group is missing.
        ValueError: A group is unknown, of another type, shape or dtype, or an amax is NaN, infinite or negative.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> spec = Spec((Group("w", ("w",), FP8, 1, (8, 4)),))
        >>> check({"w": ExpertAmax(torch.tensor([-1.0]))}, spec)
        Traceback (most recent call last):
        ...
        ValueError: state 'w.amax': found -1.0 for 'w', wanted a finite amax >= 0; calibrate again
    """
    groups = spec.all_groups
    if len(state) != len(groups):
        _check_known(state, groups)
    for group in groups:
        found: Any = state.get(group.key)
        if found is None:
            _check_known(state, groups)
            others = ", or leave out its inputs: dataclasses.replace(spec, inputs=())" if group in spec.inputs else ""
            raise KeyError(
                f"group {group.key!r} is not in the state ({len(state)} groups); calibrate with this spec{others}"
            )
        wanted = group.leaf_shapes
        if type(found) not in _GROUP_STATES:
            _check_group(group.key, found, f"those of {group.format.name}")
        if found._fields != tuple(wanted):
            raise ValueError(
                f"state {group.key!r}: found {_type_name(found)} with {list(found._fields)}, and {group.format.name} "
                f"wants {list(wanted)}; calibrate with this spec"
            )
        for field, leaf in zip(wanted, found, strict=True):
            shape, dtype = wanted[field], _DTYPES.get(field, torch.float32)
            if type(leaf) is not Tensor or leaf.shape != shape or leaf.dtype != dtype:
                check_tensor(f"state '{group.key}.{field}'", leaf, shape, dtype)
            if values(leaf) if callable(values) else values:
                _check_values(f"{group.key}.{field}", leaf, group)


def _check_known(state: State, groups: Sequence[Group]) -> None:
    unknown = state.keys() - {group.key for group in groups}
    if unknown:
        raise ValueError(
            f"state has groups that the spec has not: {sorted(unknown)}; calibrate with this spec, or leave them out"
        )


def group_state(format: Format, *leaves: Tensor) -> GroupState:
    """The leaves of one group, in the type that the format has."""
    if format.is_stateless:
        return Stateless()
    return BlockAmax(*leaves) if len(leaves) == 2 else ExpertAmax(*leaves)


def state_of(group: Group, leaves: Sequence[Tensor]) -> GroupState:
    """The leaves of a group's weights or of inputs, in the order of `leaf_shapes`, in their type."""
    if isinstance(group, Inputs):
        return InputAmax(*leaves) if group.leaf_shapes else Stateless()
    return group_state(group.format, *leaves)


def leaf_types(group: Group) -> dict[str, LeafType]:
    """Shape and dtype of each leaf, by field."""
    return {field: (shape, _DTYPES.get(field, torch.float32)) for field, shape in group.leaf_shapes.items()}


def local_group(
    group: Group, layout: Layout | None, weights: Sequence[Tensor], scales: GroupState
) -> tuple[Sequence[Tensor], GroupState]:
    """This rank's shards of a group's weights and of its state, once that is placed as they are."""
    for field, leaf in zip(scales._fields, scales, strict=True):
        check_leaf(f"{group.key}.{field}", leaf, layout, field)
    assert layout is not None
    leaves = (local_tensors(layout, [leaf], field)[0] for field, leaf in zip(scales._fields, scales, strict=True))
    return local_tensors(layout, weights), group_state(group.format, *leaves)


def check_same_leaves(where: str, found: Mapping[str, Tensor], wanted: Mapping[str, LeafType]) -> None:
    """Raise ValueError, naming the leaf, unless `found` has exactly the wanted names, shapes and dtypes."""
    for kind, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{where}: {kind} {len(names)} of {len(wanted)} leaves: {sorted(names)[:4]}")
    for name, (shape, dtype) in wanted.items():
        check_tensor(f"{where}: leaf {name!r}", found[name], shape, dtype)


def is_concrete(tensor: Tensor) -> bool:
    """True if values can be read here and now: not on meta, not being traced, not batched by vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return False
    return not is_mapped(tensor)


def is_read(leaf: Tensor) -> bool:
    """True for leaves whose values `fakequant` and `pack` check: reading them elsewhere would wait for a device."""
    return leaf.is_cpu and is_concrete(leaf)


def check_tensor(what: str, leaf: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError, beginning with `what`, unless a leaf is a tensor of that shape and dtype."""
    if not isinstance(leaf, Tensor):
        raise ValueError(f"{what}: found {type(leaf).__name__}, wanted a tensor")
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        raise ValueError(f"{what}: found {tuple(leaf.shape)} {leaf.dtype}, wanted {shape} {dtype}")


def _types_of(leaves: Mapping[str, Tensor]) -> dict[str, LeafType]:
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}


def _check_same_spread(what: str, leaf: Tensor, like: Tensor) -> None:
    found, wanted = spread_of(leaf), spread_of(like)
    if found != wanted:
        raise ValueError(f"{what}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)}")


def _check_values(name: str, leaf: Tensor, group: Group) -> None:
    if leaf.is_meta:
        raise ValueError(f"state {name!r}: found a meta tensor, which has no values to check; pass values=False")
    here = local_values(leaf)
    invalid = ~((here >= 0) & (here < torch.inf))
    if not bool(invalid.any()):
        return
    first: list[int] = invalid.nonzero()[0].tolist()
    if isinstance(group, Inputs):
        raise ValueError(f"state {name!r}: {_wrong_input(name, here, invalid, group)}")
    value, index = here[tuple(first)].item(), position(leaf, first)
    advice = "it was never calibrated; call calibrate" if value == UNCALIBRATED else "calibrate again"
    at = f" at {index[1:]}" if len(index) > 1 else ""
    raise ValueError(
        f"state {name!r}: found {value} for {group.expert_name(index[0])!r}{at}, wanted a finite amax >= 0; {advice}"
    )


def _wrong_input(name: str, leaf: Tensor, invalid: Tensor, inputs: Inputs) -> str:
    numbers: list[int] = invalid.nonzero().flatten().tolist()
    value = leaf[numbers[0]].item()
    of = f"expert {ranges(numbers)} of {inputs.experts}" if len(leaf) == inputs.experts else "all experts"
    if name.endswith(".tokens"):
        return f"found {value} for {of}, wanted counts >= 0; calibrate again"
    if value == UNCALIBRATED:
        return (
            f"found no token for {of}, wanted an input for each; calibrate with more batches, or choose by "
            "finish(state, spec=spec, unseen=...)"
        )
    return f"found {value} for {of}, wanted a finite amax >= 0; calibrate again"


def _check_group(key: str, group: Any, leaves: str) -> None:
    if not isinstance(group, GroupState):
        raise ValueError(
            f"state {key!r}: found {type(group).__name__}, wanted {leaves} in an ExpertAmax, BlockAmax, InputAmax or "
            "Stateless"
        )


def _type_name(group: Any) -> str:
    return "missing" if group is None else type(group).__name__
