"""What a checkpoint says of itself: its Spec, the kind of tree that it holds, and its leaves; and what else was wanted.

Only what decides the meaning of the leaves is compared: not what was skipped, nor how parameters are named.
"""

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fq_transforms.checks import UNCALIBRATED, LeafType, check_same_leaves, check_state, leaf_types
from fq_transforms.dtensor import local_values
from fq_transforms.formats import Format
from fq_transforms.pack import PackedTree, check_packed, packed_leaves
from fq_transforms.parse import MOST_TEXT, shown
from fq_transforms.spec import Group, Inputs, Skipped, Spec, refuse_inputs
from fq_transforms.state import flatten

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = [
    "FORMAT",
    "FORMAT_BYTES",
    "KINDS",
    "PACKED",
    "STATE",
    "Kind",
    "are_tiles",
    "check_format",
    "check_groups",
    "check_kind",
    "check_no_others",
    "check_stored_leaves",
    "describe",
    "encode_format",
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

# A format where it is stored as a tensor beside its group's leaves: its name, and its bytes, filled up with spaces.
FORMAT, FORMAT_BYTES = "format", 512


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
        >>> from_bytes(to_bytes(Spec(()))) == Spec(())
        True
    """
    return zlib.compress(spec.to_json().encode(), 9)


def from_bytes(content: bytes) -> Spec:
    """The spec that `to_bytes` wrote. Raises ValueError if the bytes are not one."""
    if not isinstance(cast("Any", content), bytes):
        raise ValueError(f"not a stored Spec: found {shown(content)}, wanted bytes")
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(content, MOST_TEXT)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"not a stored Spec: found bytes of more than {MOST_TEXT}, or cut, wanted all of a Spec")
        return Spec.from_json(text.decode())
    except (zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a stored Spec: {error}") from error


def encode_format(format: Format) -> Tensor:
    """The format's numbers as JSON in FORMAT_BYTES bytes, filled up with spaces: one per layer of a group."""
    text = format.to_json().encode()
    if len(text) > FORMAT_BYTES:
        raise ValueError(
            f"format {format.name!r}: found {len(text)} bytes of JSON, wanted at most {FORMAT_BYTES}; shorten it"
        )
    return torch.frombuffer(bytearray(text.ljust(FORMAT_BYTES)), dtype=torch.uint8)


def check_format(group: Group, stored: Any) -> None:
    """Raise ValueError unless the stored bytes are the group's format."""
    text = (
        bytes(stored.flatten().tolist())
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8
        else repr(stored).encode()
    )
    try:
        found = Format.from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"group {group.key!r}: found {text[:40]!r} for its format in the checkpoint, wanted the JSON of a Format"
        ) from error
    if found != group.format:
        # Two formats of one name differ in a number only.
        both = (found.name, group.format.name) if found.name != group.format.name else (found, group.format)
        raise ValueError(
            f"group {group.key!r}: found format {both[0]} in the checkpoint, the spec wants {both[1]}; select the "
            "format that it was saved with, or calibrate anew"
        )


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
    # Which takes a second to import.
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    found: dict[str, TensorStorageMetadata] = {}
    for name, leaf in metadata.state_dict_metadata.items():
        if not isinstance(leaf, TensorStorageMetadata):
            raise ValueError(f"leaf {name!r}: found bytes, wanted a tensor")
        if prod(max(1, size) for size in leaf.size) >= 2**48:
            raise ValueError(f"leaf {name!r}: found shape {tuple(leaf.size)}, which no memory holds")
        found[name] = leaf
    leaves = {name: torch.empty(leaf.size, dtype=leaf.properties.dtype, device="meta") for name, leaf in found.items()}
    check_same_leaves("metadata", leaves, wanted)
    for name, leaf in found.items():
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in leaf.chunks]
        if not are_tiles(chunks, tuple(leaf.size)):
            raise ValueError(
                f"leaf {name!r}: found {len(chunks)} chunks such as {chunks[:2]}, wanted all numbers of "
                f"{tuple(leaf.size)}, each once; the checkpoint is incomplete or damaged"
            )
        for offset, _ in chunks:
            if MetadataIndex(name, offset) not in metadata.storage_data:
                raise ValueError(f"leaf {name!r}: found no file for the chunk at {offset}, wanted one for each")


def are_tiles(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """True if boxes, each given by offset and sizes, hold every number of a shape once.

    They are told apart by cuts straight through all of them, as shards of any mesh and chunks of shards can be.

    Example:
        >>> are_tiles([((0, 0), (2, 4)), ((2, 0), (1, 4))], (3, 4))
        True
        >>> are_tiles([((0, 0), (2, 4)), ((1, 0), (2, 4))], (3, 4)), are_tiles([((0, 0), (2, 4))], (3, 4))
        (False, False)
    """
    if not all(len(offset) == len(sizes) == len(shape) for offset, sizes in boxes):
        return False
    full = [box for box in boxes if prod(box[1])]
    if not prod(shape):
        return not full
    return _is_cut(full, [*range(len(shape))], [(0, size) for size in shape])


def _is_cut(
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], axes: Sequence[int], bounds: Sequence[tuple[int, int]]
) -> bool:
    """`are_tiles`, of a region with bounds along each axis, cut along some axes."""
    if len(boxes) == 1:
        ((offset, sizes),) = boxes
        return all((a, a + n) == bound for a, n, bound in zip(offset, sizes, bounds, strict=True))
    for axis in axes:
        slabs: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for box in boxes:
            slabs.setdefault((box[0][axis], box[0][axis] + box[1][axis]), []).append(box)
        ends = sorted(slabs)
        edges = [bounds[axis][0], *(end for _, end in ends)]
        if [start for start, _ in ends] == edges[:-1] and edges[-1] == bounds[axis][1]:
            others = [other for other in axes if other != axis]
            within = list(bounds)
            for slab, of_slab in slabs.items():
                within[axis] = slab
                if not _is_cut(of_slab, others, within):
                    return False
            return True
    return False


def _has_spec(metadata: "Metadata") -> bool:
    return isinstance(metadata.planner_data, dict) and SPEC in metadata.planner_data


def _kind_in(metadata: "Metadata") -> Kind:
    name = metadata.planner_data.get(KIND, STATE.name)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"found a checkpoint of {shown(name)}, wanted one of {list(KINDS)}")
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
