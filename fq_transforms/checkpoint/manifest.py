"""What a checkpoint says of itself: its Spec, the kind of tree that it holds, and its leaves; and what else was wanted.

Only what decides the meaning of the leaves is compared: not what was skipped, nor how parameters are named.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fq_transforms.checks import UNCALIBRATED, LeafType, check_same_leaves, check_state, leaf_types
from fq_transforms.dtensor import local_values
from fq_transforms.pack import PackedTree, check_packed, packed_leaves
from fq_transforms.spec import Group, Inputs, Skipped, Spec, refuse_inputs
from fq_transforms.state import flatten

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import ReadItem

__all__ = [
    "KINDS",
    "PACKED",
    "STATE",
    "Kind",
    "check_complete",
    "check_groups",
    "check_kind",
    "check_no_others",
    "check_stored_leaves",
    "describe",
    "from_bytes",
    "joined",
    "kind_of",
    "may_replace",
    "spec_in",
    "to_bytes",
]

# Keys in the `planner_data` of DCP's metadata: zlib of the spec's JSON, and the name of the kind. A checkpoint without
# a kind is of a state, as all were once.
SPEC, KIND = "fq_transforms.spec", "fq_transforms.kind"


@dataclass(frozen=True)
class Kind:
    """A kind of tree, a state or packed weights, and all in which the two differ here.

    Attributes:
        name: What messages call one, and what a checkpoint says that it holds.
        noun: The same in a sentence.
        like: How to make one to load into.
        leaves: Shape and dtype of each leaf of a group, by name.
        check: Raises unless a tree fits a spec and, with `values=True`, holds numbers that can be saved.
        has_values: False for a leaf without numbers, which can only be loaded into.
    """

    name: str
    noun: str
    like: str
    leaves: Callable[[Group], dict[str, LeafType]]
    check: Callable[..., None]
    has_values: Callable[[Tensor], bool]

    def leaves_of(self, spec: Spec) -> dict[str, LeafType]:
        """Shape and dtype of each leaf of a tree, by flat name as `state.flatten` has them."""
        return {f"{g.key}.{name}": leaf for g in spec.all_groups for name, leaf in self.leaves(g).items()}


def kind_of(tree: Mapping[str, Any]) -> Kind:
    """The kind of a tree: packed weights if any of its groups is packed. Whether all are, its `check` says.

    Example:
        >>> kind_of({"w": {"codes": torch.zeros(1, 2, 2), "scale": torch.ones(1)}}).name
        'packed'
    """
    return PACKED if any(isinstance(group, Mapping) and "codes" in group for group in tree.values()) else STATE


def _check_packed(packed: PackedTree, spec: Spec, *, values: bool = True) -> None:
    """Any byte is a code, and NaN marks a granule of NaN: numbers have to be there, and nothing else."""
    refuse_inputs(spec, "packed weights")
    check_packed(packed, spec)
    for name, leaf in flatten(packed).items():
        if values and leaf.is_meta:
            raise ValueError(f"packed {name!r}: found a meta tensor, wanted numbers; pack weights that are not on meta")


def _is_calibrated(leaf: Tensor) -> bool:
    return not leaf.is_meta and not bool((local_values(leaf) == UNCALIBRATED).all())


STATE = Kind("state", "a state", "fq.init(params)", leaf_types, check_state, _is_calibrated)
PACKED = Kind(
    "packed",
    "packed weights",
    "fq.pack(params, fq.init(params)) of meta parameters",
    packed_leaves,
    _check_packed,
    lambda leaf: not leaf.is_meta,
)
KINDS = {kind.name: kind for kind in (STATE, PACKED)}


def check_groups(stored: Spec, wanted: Spec) -> None:
    """Raise ValueError unless each wanted group is stored with the same format, number of experts and shape."""
    found = {group.key: group for group in stored.all_groups}
    missing = [group.key for group in wanted.all_groups if group.key not in found]
    if missing:
        raise ValueError(
            f"missing {len(missing)} of {len(wanted.all_groups)} groups: {sorted(missing)[:4]}; it holds {_some(found)}"
        )
    for group in wanted.all_groups:
        if differ := _difference(found[group.key], group):
            raise ValueError(f"group {group.key!r}: found {differ[0]}, wanted {differ[1]} as the spec says")


def check_no_others(stored: Spec, wanted: Collection[str]) -> None:
    """Raise ValueError if a group is stored that nobody wants."""
    unexpected = {group.key for group in stored.all_groups} - set(wanted)
    if unexpected:
        raise ValueError(
            f"found {len(unexpected)} unexpected groups: {sorted(unexpected)[:4]}; wanted {_some(wanted)} only"
        )


def joined(specs: Mapping[int, Spec]) -> Spec:
    """The groups of all ranks, each once, in the order of the ranks; and their rules, where they are the same.

    Raises:
        ValueError: Ranks disagree about a group; the message names them.
    """
    first: dict[str, tuple[int, Group]] = {}
    skipped: dict[str, Skipped] = {}
    for rank, spec in specs.items():
        for group in spec.all_groups:
            owner, known = first.setdefault(group.key, (rank, group))
            if differ := _difference(known, group):
                raise ValueError(
                    f"group {group.key!r}: found {differ[0]} on rank {owner} and {differ[1]} on rank {rank}, wanted "
                    "one spec"
                )
        for parameter in spec.skipped:
            skipped.setdefault(parameter.name, parameter)
    groups = [group for _, group in first.values()]
    inputs = tuple(group for group in groups if isinstance(group, Inputs))
    weights = tuple(group for group in groups if not isinstance(group, Inputs))
    rules = {spec.rules for spec in specs.values()}
    return Spec(weights, tuple(skipped.values()), inputs, rules.pop() if len(rules) == 1 else ())


def to_bytes(spec: Spec) -> bytes:
    """A spec in few bytes; `from_bytes` leads back.

    Example:
        >>> from_bytes(to_bytes(Spec(())))
        Spec(groups=(), skipped=(), inputs=())
    """
    return zlib.compress(spec.to_json().encode(), 9)


def from_bytes(content: bytes) -> Spec:
    """The spec that `to_bytes` wrote. Raises ValueError if the bytes are not one."""
    try:
        return Spec.from_json(zlib.decompress(content).decode())
    except (zlib.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"not a stored Spec: {error}") from error


def describe(spec: Spec, kind: Kind) -> dict[str, bytes | str]:
    """What goes into the `planner_data` of DCP's metadata."""
    return {SPEC: to_bytes(spec), KIND: kind.name}


def spec_in(metadata: "Metadata") -> Spec:
    """The stored spec. Raises ValueError if there is none."""
    if not _has_spec(metadata):
        raise ValueError("found a checkpoint without a Spec, wanted one that fq_transforms.checkpoint.save wrote")
    return from_bytes(metadata.planner_data[SPEC])


def may_replace(metadata: "Metadata", kind: Kind) -> bool:
    """True for a checkpoint of the same kind, False for another program's. Raises ValueError for another kind."""
    if not _has_spec(metadata):
        return False
    if (found := _kind_in(metadata)) is not kind:
        raise ValueError(f"found a checkpoint of {found.noun}, which {kind.noun} would replace")
    return True


def check_kind(metadata: "Metadata", wanted: Kind) -> None:
    """Raise ValueError unless the wanted kind of tree is stored."""
    if (found := _kind_in(metadata)) is not wanted:
        raise ValueError(
            f"found a checkpoint of {found.noun}, wanted {wanted.noun} as `like` is; to load {found.noun} give "
            f"like={found.like}"
        )


def check_stored_leaves(metadata: "Metadata", wanted: Mapping[str, LeafType]) -> None:
    """Raise ValueError unless the stored leaves have exactly these names, shapes and dtypes."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # which takes a second to import

    found: dict[str, Tensor] = {}
    for name, leaf in metadata.state_dict_metadata.items():
        if not isinstance(leaf, TensorStorageMetadata):
            raise ValueError(f"leaf {name!r}: found bytes, wanted a tensor")
        found[name] = torch.empty(leaf.size, dtype=leaf.properties.dtype, device="meta")
    check_same_leaves("metadata", found, wanted)


def check_complete(items: "Iterable[ReadItem]", leaves: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all numbers of this rank's part of each leaf will be read."""
    found: Counter[str] = Counter()
    for item in items:
        found[item.dest_index.fqn] += prod(item.lengths)
    for name, leaf in leaves.items():
        wanted = local_values(leaf).numel()
        if found[name] != wanted:
            raise ValueError(
                f"leaf {name!r}: found {found[name]} of the {wanted} numbers of this part, wanted all; the checkpoint "
                "is incomplete"
            )


def _has_spec(metadata: "Metadata") -> bool:
    return isinstance(metadata.planner_data, dict) and SPEC in metadata.planner_data


def _kind_in(metadata: "Metadata") -> Kind:
    name = metadata.planner_data.get(KIND, STATE.name)
    if name not in KINDS:
        raise ValueError(f"found a checkpoint of {name!r}, wanted one of {list(KINDS)}")
    return KINDS[name]


def _difference(found: Group, wanted: Group) -> tuple[str, str] | None:
    """How two groups of one key differ in what decides their leaves, in words; None if they do not."""
    if found.format != wanted.format:
        a, b = found.format.to_dict(), wanted.format.to_dict()
        names = [name for name in a if a[name] != b[name]]
        if "name" in names:
            return f"format {a['name']}", f"{b['name']}"
        return (
            f"format {a['name']} with {', '.join(f'{n}={a[n]}' for n in names)}",
            ", ".join(f"{n}={b[n]}" for n in names),
        )
    if found.experts != wanted.experts:
        return f"{found.experts} experts", f"{wanted.experts}"
    if found.shape != wanted.shape:
        return f"(out, in) = {found.shape}", f"{wanted.shape}"
    if found.leaf_shapes != wanted.leaf_shapes:
        return f"leaves {found.leaf_shapes}", f"{wanted.leaf_shapes}"
    return None


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:4]
    return f"{len(names)} groups, such as {shown}" if len(names) > 4 else f"{shown}"
