"""Where the leaves of a state or of packed weights lie, given where their weights lie, as Megatron's `ShardedTensor`s.

Arithmetic on plain data: it needs neither Megatron nor a model, so that what all ranks of a large job would declare can
be made in one process.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from fq_transforms.checkpoint.manifest import FORMAT, FORMAT_BYTES, STATE, Kind
from fq_transforms.partition import Part, collapsed_dims, leaf_part
from fq_transforms.spec import Group

__all__ = [
    "BETWEEN",
    "FORMAT_NAMES",
    "SUFFIXES",
    "ShardMetadata",
    "is_small",
    "join_layers",
    "leaf_shards",
    "split_axis",
]

# Where the format of a state and that of packed weights is kept: both may be in one checkpoint.
FORMAT_NAMES = {"state": FORMAT, "packed": "packed_format"}
BETWEEN = "\n"  # the names of leaves that are one entry
# What is added to a weight's key, by kind of tree and leaf name.
SUFFIXES = {
    "state": {"amax": "_quantizer._amax", "global_amax": "_quantizer._global_amax", FORMAT: "_quantizer._format"},
    "packed": {
        "codes": "_packed._codes",
        "scale": "_packed._scale",
        "global_scale": "_packed._global_scale",
        "packed_format": "_packed._format",
    },
}


class ShardMetadata(NamedTuple):
    """What a ShardedTensor says about a tensor, as plain data.

    Attributes:
        key: Of the whole tensor.
        part: Where the local tensor lies in the whole one, prepended axes included.
        prepended: Number of axes that only the whole tensor has, before those of the local one.
        replica: Megatron's replica id; all zeros on the one rank that writes.
        flexible: The whole may have another shape in a file, as padded vocabularies may.
        regular: All ranks hold parts of one size, as far as Megatron looks.
        dtype: Of the tensor.
    """

    key: str
    part: Part
    prepended: int
    replica: tuple[int, ...]
    flexible: bool = False
    regular: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return self.part.shape[self.prepended :]


def leaf_shards(
    group: Group, weights: Sequence[Sequence[ShardMetadata]], kind: Kind = STATE
) -> dict[str, list[ShardMetadata]]:
    """Where the leaves of a group lie, by name, and where its format is kept: arithmetic on plain data.

    Args:
        group: Its format, layout and names.
        weights: For each of `group.names` the pieces of the weight, one or several along `out`, in order.
        kind: Of the tree whose leaves they are.

    Returns:
        For each name the shards of the local leaf, in order along `out`. Exactly one of the ranks that hold the same
        part of a leaf has a replica id of zeros, if that is so for the weights.

    Raises:
        ValueError: As `sharded_state_dict`.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> group = Group("*.weight", ("0.weight", "1.weight"), FP8, 2, (8, 4))
        >>> half = [[ShardMetadata("weight", Part((6, 8, 8), (e, 0, 4), (1, 8, 4)), 1, (0, 0, 0))] for e in (4, 5)]
        >>> leaf_shards(group, half)["amax"]
        [ShardMetadata(key='weight_quantizer._amax', part=Part(whole=(6,), offset=(4,), shape=(2,)), prepended=0,
        replica=(0, 1, 0), flexible=False, regular=True, dtype=torch.float32)]
    """
    pieces = _matrices(group, weights)
    shards: dict[str, list[ShardMetadata]] = {}
    for field, (_, dtype) in kind.leaves(group).items():
        # A leaf that collapses `out` is one for all pieces.
        several = pieces[:1] if 1 in collapsed_dims(group.format, field) else pieces
        shards[field] = [_leaf_shard(group, field, piece, SUFFIXES[kind.name][field], dtype) for piece in several]
    layers = len(pieces[0].part.whole) - 3
    whole, offset, shape = (axes[:layers] for axes in pieces[0].part)
    shards[FORMAT_NAMES[kind.name]] = [
        ShardMetadata(
            pieces[0].key + SUFFIXES[kind.name][FORMAT_NAMES[kind.name]],
            Part((*whole, FORMAT_BYTES), (*offset, 0), (*shape, FORMAT_BYTES)),
            layers,
            _replica(pieces[0], (0, 1, 2)),
            dtype=torch.uint8,
        )
    ]
    return shards


def split_axis(group: Group, weights: Sequence[Sequence[ShardMetadata]]) -> Literal["out", "in"] | None:
    """The axis of [E, out, in] that is split among ranks; None if each has whole matrices.

    Raises:
        ValueError: As `sharded_state_dict`.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> half = [[ShardMetadata("w", Part((6, 8, 8), (0, 0, 4), (1, 8, 4)), 1, (0, 0, 0))]]
        >>> split_axis(Group("*.w", ("0.w",), FP8, 1, (8, 4)), half)
        'in'
    """
    whole = _matrices(group, weights)[0].part.whole[-2:]
    return "out" if whole[0] != group.shape[0] else "in" if whole[1] != group.shape[1] else None


def is_small(shard: ShardMetadata) -> bool:
    """True for a format and for one number per expert, of one of the layers that are in one tensor.

    Example:
        >>> shard = ShardMetadata("key", Part((6, 8), (2, 0), (1, 8)), 1, (0, 0, 0))
        >>> is_small(shard), is_small(shard._replace(prepended=0))
        (True, False)
    """
    return shard.prepended == 1 and len(shard.local_shape) == 1


def join_layers(shards: Mapping[str, ShardMetadata]) -> dict[str, ShardMetadata]:
    """Each run of consecutive layers of one tensor as a single shard: an entry costs Megatron 1.5 KiB, however small.

    Args:
        shards: By name, each of one layer, which is the first axis.

    Returns:
        By the names of a run, in the order of the layers and with `BETWEEN` between them.

    Example:
        >>> layers = {f"{i}.amax": ShardMetadata("key", Part((6, 8), (i, 4), (1, 4)), 1, (0, 0, 0)) for i in (3, 4)}
        >>> ((name, shard),) = join_layers(layers).items()
        >>> name.split(BETWEEN), shard.part
        (['3.amax', '4.amax'], Part(whole=(6, 8), offset=(3, 4), shape=(2, 4)))
    """
    runs: list[list[str]] = []
    following: ShardMetadata | None = None
    for name, shard in sorted(shards.items(), key=lambda item: (item[1].key, item[1].part.offset)):
        if shard == following:
            runs[-1].append(name)
        else:
            runs.append([name])
        offset = shard.part.offset
        following = shard._replace(part=shard.part._replace(offset=(offset[0] + 1, *offset[1:])))
    joined: dict[str, ShardMetadata] = {}
    for run in runs:
        first = shards[run[0]]
        part = first.part._replace(shape=(len(run), *first.part.shape[1:]))
        joined[BETWEEN.join(run)] = first._replace(part=part, prepended=0, regular=False)
    return joined


def _leaf_shard(group: Group, field: str, piece: ShardMetadata, suffix: str, dtype: torch.dtype) -> ShardMetadata:
    """The shard of a leaf that belongs to a piece [*layers, E, out, in] of the weights."""
    whole, offset, shape = piece.part
    leaf = leaf_part(Part(whole[-3:], offset[-3:], shape[-3:]), group.format, field, group.names[0])
    collapsed = collapsed_dims(group.format, field)
    return ShardMetadata(
        piece.key + suffix,
        Part(whole[:-3] + leaf.whole, offset[:-3] + leaf.offset, shape[:-3] + leaf.shape),
        len(whole) - 3,
        _replica(piece, collapsed),
        piece.flexible and 1 not in collapsed,
        dtype=dtype,
    )


def _replica(piece: ShardMetadata, collapsed: Iterable[int]) -> tuple[int, ...]:
    """The replica id with the positions along collapsed axes of [E, out, in] folded into its middle number.

    Megatron's ids are (pipeline, tensor, data): the middle is where its own tensor-parallel copies count.
    """
    replica = list(piece.replica)
    for axis in collapsed:
        whole, offset, extent = (axes[axis - 3] for axes in piece.part)
        replica[len(replica) // 2] = replica[len(replica) // 2] * (whole // extent) + offset // extent
    return tuple(replica)


def _matrices(group: Group, weights: Sequence[Sequence[ShardMetadata]]) -> list[ShardMetadata]:
    """The pieces of all experts together, [*layers, E, out, in]; a single one where they make up all of `out`."""
    first = [_with_expert_axis(group, shard) for shard in weights[0]]
    for number, (name, shards) in enumerate(zip(group.names, weights, strict=True)):
        wanted = [_moved(shard, number) for shard in first]
        found = [_with_expert_axis(group, shard) for shard in shards]
        if found != wanted:
            raise ValueError(
                f"parameter {name!r}: found {_in_words(found)} in the model's sharded state dict, wanted "
                f"{_in_words(wanted)}, as expert {number} of group {group.key!r}"
            )
    count = 1 if group.stacked else len(weights)
    whole, offset, shape = first[0].part
    rows = sum(shard.part.shape[-2] for shard in first)
    if (rows, shape[-1]) != group.shape or count * shape[-3] != group.experts:
        raise ValueError(
            f"parameter {group.names[0]!r}: found {rows} x {shape[-1]} in the model's sharded state dict, the spec "
            f"wants {group.shape[0]} x {group.shape[1]}; select from the parameters of the same model"
        )
    starts = [shard.part.offset[-2] for shard in first]
    ends = [shard.part.offset[-2] + shard.part.shape[-2] for shard in first]
    if [0, *ends] == [*starts, whole[-2]]:
        part = Part(whole, (*offset[:-2], 0, offset[-1]), (*shape[:-2], rows, shape[-1]))
        first = [first[0]._replace(part=part)]
    together = [
        shard._replace(part=shard.part._replace(shape=(*shard.part.shape[:-3], group.experts, *shard.part.shape[-2:])))
        for shard in first
    ]
    for shard in together:
        if any(whole % extent or offset % extent for whole, offset, extent in zip(*shard.part, strict=True)):
            raise ValueError(
                f"parameter {group.names[0]!r}: found {shard.part} of all experts together, wanted a whole that is "
                "split evenly"
            )
    return together


def _with_expert_axis(group: Group, shard: ShardMetadata) -> ShardMetadata:
    """A weight's shard as [*layers, E, out, in], whatever its layout is."""
    name, part, local = group.names[0], shard.part, len(group.parameter_shape)
    if len(part.whole) - shard.prepended != local:
        raise ValueError(
            f"parameter {name!r}: found {len(part.whole) - shard.prepended} axes in the model's sharded state dict, "
            f"wanted the {local} of {group.parameter_shape}"
        )
    if group.names == (group.key,) and not group.stacked:
        part = Part(*((*axes[:-2], number, *axes[-2:]) for axes, number in zip(part, (1, 0, 1), strict=True)))
    elif not group.stacked and shard.prepended == 0:
        raise ValueError(
            f"parameter {name!r}: found the key {shard.key!r} of one expert's own tensor, wanted one tensor of all "
            "experts; call model.sharded_state_dict(metadata={'singleton_local_shards': False})"
        )
    if group.transposed:
        part = Part(*((*axes[:-2], axes[-1], axes[-2]) for axes in part))
    return shard._replace(part=part)


def _moved(shard: ShardMetadata, experts: int) -> ShardMetadata:
    offset = shard.part.offset
    return shard._replace(part=shard.part._replace(offset=(*offset[:-3], offset[-3] + experts, *offset[-2:])))


def _in_words(shards: Sequence[ShardMetadata]) -> str:
    parts = ", ".join(f"{shard.part.shape} at {shard.part.offset}" for shard in shards)
    return f"{shards[0].key!r} {shards[0].part.whole}: {parts}, replica {shards[0].replica}"
