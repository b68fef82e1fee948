"""A state or packed weights in Megatron's distributed checkpoints, with the model's own or alone, at any parallelism.

    model_sd = model.sharded_state_dict()
    leaves = megatron.sharded_state_dict(state, spec, model_sd)
    dist_checkpointing.save(model_sd | leaves, path)

    model_sd = model.sharded_state_dict()
    megatron.verify(path, spec, model_sd)                                  # before anything is loaded
    leaves = megatron.sharded_state_dict(fq.init(params), spec, model_sd)  # a place to load into
    loaded = dist_checkpointing.load(model_sd | leaves, path)
    state = megatron.load_state(loaded, spec, like=fq.init(params))

Where a leaf lies is read from the `ShardedTensor` that the model gives for its weight, and from nothing else: an axis
that the leaf has keeps offset and extent, divided by the block; the position along one that it collapses goes into the
replica id. So layers, pipeline, expert, tensor and data parallelism need no code, and nothing here communicates. A leaf
that collapses a tensor-parallel axis must be the same on all ranks of it: call `fqt.sync` first.

    entry                                    global shape                                       dtype
    {weight's key}_quantizer._amax           [layers, experts, *format.amax_shape(out, in)]     float32
    {weight's key}_quantizer._global_amax    [layers, experts]                                  float32
    {weight's key}_quantizer._format         [layers, FORMAT_BYTES], the format as JSON         uint8
    {weight's key}_packed._codes             [layers, experts, out, packed in]                  that of the leaf
    {weight's key}_packed._scale             [layers, experts], or with the granules            that of the leaf
    {weight's key}_packed._global_scale      [layers, experts]                                  float32
    {weight's key}_packed._format            as that of the state                               uint8

`layers` is whatever axes Megatron puts before the experts, none where the layer is in the key; a dense weight is one
expert. The state's keys are ModelOpt 0.47's: `...experts.linear_fc1.weight_quantizer._amax`. Packed weights take the
same functions, with `fq.pack(params, fq.init(params))` of meta parameters as the place to load into, and
`verify(..., like=place)`; a checkpoint may have both. To quantize some layers only by
channels or blocks, have the layer in the key: `model.sharded_state_dict(metadata={"non_homogeneous_layers": True})`.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checkpoint.megatron_format import check_format, encode
from fq_transforms.checkpoint.megatron_shards import (
    BETWEEN,
    FORMAT_BYTES,
    FORMATS,
    SUFFIXES,
    Shard,
    is_small,
    join_layers,
    leaf_shards,
    split_axis,
)
from fq_transforms.checkpoint.torch_dist import Stored, read_index, read_records
from fq_transforms.checkpoint.trees import KINDS, Kind, Tree, kind_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.pack import PackedTree
from fq_transforms.partition import Part
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import State, flatten, unflatten

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

__all__ = ["load_state", "sharded_state_dict", "split_axes", "verify"]

# A leaf lies in two pieces where a gated fc1, [gate; up], is split along `out`.
Sharded: TypeAlias = "ShardedTensor | list[ShardedTensor]"


def sharded_state_dict(
    tree: State | PackedTree, spec: Spec, model_sharded_state_dict: Mapping[str, Any]
) -> dict[str, Sharded]:
    """The leaves of this rank and the formats of its groups, as `ShardedTensor`s: what Megatron saves or loads.

    Args:
        tree: The state of this rank's plain local weights, or they packed. `fq.init(params)`, meta parameters too, and
            packed leaves on meta give entries without data: a place to load into, which cannot be saved. Megatron may
            load into the memory of any other tree.
        spec: Of the same weights; its names are those of `model.named_parameters()`.
        model_sharded_state_dict: `model.sharded_state_dict()`.

    Returns:
        `{group key}.{field}` to a ShardedTensor, a view of the leaf; to two of them for a gated fc1 that is split along
        `out`. `{group key}.format`, of packed weights `.packed_format`, to the format. Formats and leaves of one number
        an expert, of consecutive layers that are in one tensor, are one entry, a copy, under all their names, a newline
        between them. Megatron changes the entries that it saves: make them anew each time.

    Raises:
        KeyError: A weight is not in the model's sharded state dict; a group is not in the tree.
        ValueError: The tree does not fit the spec, or an amax is invalid; a weight's entry has another shape, is split
            within a block or unevenly, or has the expert's number in its key.

    Source: Megatron-Core 0.16.1 `dist_checkpointing.mapping.ShardedTensor`.

    Example:
        >>> import warnings
        >>> from fq_transforms.formats import FP8
        >>> from fq_transforms.select import select
        >>> from fq_transforms.state import ExpertAmax
        >>> with warnings.catch_warnings(action="ignore"):  # it names packages that are not installed
        ...     from megatron.core.dist_checkpointing import ShardedTensor
        >>> params = {f"experts.fc1.weight{i}": torch.ones(8, 4) for i in range(2)}
        >>> model_sd = {  # experts 2 and 3 of 8 in layer 0 of 3
        ...     f"experts.fc1.weight{i}": ShardedTensor.from_rank_offsets(
        ...         "experts.fc1.weight", torch.ones(8, 4), (0, 0, 3), (1, 2 + i, 8), prepend_axis_num=2
        ...     )
        ...     for i in range(2)
        ... }
        >>> state = {"experts.fc1.weight*": ExpertAmax(torch.tensor([1.0, 2.0]))}
        >>> leaf = sharded_state_dict(state, select(params, {"*": FP8}), model_sd)["experts.fc1.weight*.amax"]
        >>> leaf.key, leaf.global_shape, leaf.global_offset, leaf.local_shape
        ('experts.fc1.weight_quantizer._amax', (3, 8), (0, 2), (1, 2))
    """
    refuse_inputs(spec, "checkpoint.megatron")
    kind, leaves = kind_of(tree), flatten(tree)
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(
                f"{kind.name} {name!r}: found a DTensor, wanted the plain local tensor that Megatron's weights are"
            )
    empty = all(kind.is_place(leaf) for leaf in leaves.values())
    kind.check(tree, spec, values=not empty)

    entries: dict[str, Sharded] = {}
    small: dict[str, Shard] = {}
    data: dict[str, Tensor] = {} if empty else leaves
    for group in spec.groups:
        # A place is not the format that is looked for: of a layer that is in no file, Megatron says nothing.
        data |= {
            f"{group.key}.{FORMATS[kind.name]}": torch.zeros(FORMAT_BYTES, dtype=torch.uint8)
            if empty
            else encode(group.format)
        }
        for field, pieces in leaf_shards(group, _weight_shards(group, model_sharded_state_dict), kind).items():
            name = f"{group.key}.{field}"
            if is_small(pieces[0]):
                (small[name],) = pieces
            elif pieces[1:]:
                rows = [piece.local_shape[1] for piece in pieces]
                parts = data[name].split(rows, dim=1) if name in data else [None] * len(pieces)
                entries[name] = [_to_megatron(piece, part) for piece, part in zip(pieces, parts, strict=True)]
            else:
                entries[name] = _to_megatron(pieces[0], data.get(name))
    for names, shard in join_layers(small).items():
        layers = [data[name] for name in names.split(BETWEEN) if name in data]
        entries[names] = _to_megatron(shard, torch.stack(layers) if layers else None)
    return entries


def load_state(loaded: Mapping[str, Any], spec: Spec, like: Tree) -> Tree:
    """The state, or the packed weights, in what Megatron loaded for the entries of `sharded_state_dict`.

    Complete and checked, or an error.

    Args:
        loaded: From `dist_checkpointing.load`; other entries, such as the model's, are left alone.
        spec: What the tree must fit.
        like: `fq.init(params)`, or packed weights, whose devices the result has; meta leaves leave it where it was
            loaded.

    Returns:
        A new tree, of the kind of `like`. Its leaves may be the loaded tensors themselves.

    Raises:
        KeyError: A leaf or a format is missing.
        ValueError: A leaf is unknown, or of another shape or dtype; the checkpoint was made in another format; an amax
            is NaN, infinite or negative. The message names the leaf or the group.

    Example:
        >>> from fq_transforms.formats import FP8, INT8
        >>> from fq_transforms.select import select
        >>> from fq_transforms.state import init
        >>> params = {"experts.0.weight": torch.ones(8, 4), "experts.1.weight": torch.ones(8, 4)}
        >>> spec = select(params, {"*": FP8})
        >>> loaded = {"experts.*.weight.amax": torch.tensor([1.0, 2.0]), "experts.*.weight.format": encode(FP8)}
        >>> load_state(loaded, spec, like=init(params, spec=spec))
        {'experts.*.weight': ExpertAmax(amax=tensor([1., 2.]))}
        >>> load_state(loaded | {"experts.*.weight.format": encode(INT8)}, spec, like=init(params, spec=spec))
        Traceback (most recent call last):
        ...
        ValueError: group 'experts.*.weight': found format INT8 in the checkpoint, the spec wants FP8; select the format
        that it was saved with, or calibrate anew
    """
    refuse_inputs(spec, "checkpoint.megatron")
    kind = kind_of(like)
    kind.check(like, spec, values=False)
    places = flatten(like)
    loaded = _split(loaded)
    format_field = FORMATS[kind.name]
    wanted = {f"{group.key}.{format_field}" for group in spec.groups} | places.keys()
    if missing := wanted - loaded.keys():
        raise KeyError(
            f"load_state: missing {len(missing)} of {len(wanted)} entries: {sorted(missing)[:4]}; load what "
            "sharded_state_dict gives for this spec"
        )
    if unknown := _ours(loaded, kind) - wanted:
        raise ValueError(f"load_state: unknown {len(unknown)} entries, which the spec has not: {sorted(unknown)[:4]}")

    for group in spec.groups:
        check_format(group, loaded[f"{group.key}.{format_field}"])
    found = {name: _joined(loaded[name], places[name]) for name in places}
    kind.check(unflatten(found, like), spec)
    moved = {name: leaf if places[name].is_meta else leaf.to(places[name].device) for name, leaf in found.items()}
    return unflatten(moved, like)


def verify(
    path: str | Path,
    spec: Spec,
    model_sharded_state_dict: Mapping[str, Any],
    *,
    like: State | PackedTree | None = None,
) -> None:
    """Raise unless a checkpoint has all that this rank needs, in the spec's formats, bit for bit as it was written.

    To be called before `dist_checkpointing.load`, which reads values without their checksums and says nothing of what
    it leaves unread. Reads the parts of files that overlap this rank's leaves, and communicates nothing: an error may
    be one rank's alone.

    Args:
        path: A local directory, made by `dist_checkpointing.save`.
        spec: What will be loaded.
        model_sharded_state_dict: `model.sharded_state_dict()`.
        like: What will be loaded into: packed weights, or a state, which None is too.

    Raises:
        KeyError: A leaf is not in the checkpoint, or a weight not in the model's sharded state dict.
        ValueError: `path` is no such checkpoint; a group was saved in another format; a leaf has another global shape;
            one of this rank's weights has a leaf that the spec has not; a file is missing, truncated or damaged. The
            message names the group, leaf or file.

    Source: the CRC-32 that `torch.save` writes of each record and `torch.load` does not compare.

    Example:
        >>> verify("nowhere", Spec(()), {})
        Traceback (most recent call last):
        ...
        ValueError: nowhere/metadata.json: found FileNotFoundError(2, 'No such file or directory'), wanted the directory
        of a Megatron distributed checkpoint
    """
    refuse_inputs(spec, "checkpoint.megatron")
    folder, kind = Path(path), kind_of(like or {})
    format_field = FORMATS[kind.name]
    stored = read_index(folder)
    needed = [
        (group, leaf_shards(group, _weight_shards(group, model_sharded_state_dict), kind)) for group in spec.groups
    ]
    # Formats first: another one has other leaves, of other shapes, and is what an error should speak of.
    for group, shards in needed:
        (shard,) = shards[format_field]
        _check_stored(folder, f"{group.key}.{format_field}", shard, stored)
        for record, data in read_records(folder, shard.key, stored[shard.key], shard.part):
            layers = torch.load(io.BytesIO(data), weights_only=True).view(-1, FORMAT_BYTES)
            check_format(group, layers[shard.part.offset[0] - record.offset[0] if len(record.shape) > 1 else 0])
    for group, shards in needed:
        for field in kind.leaves(group):
            for shard in shards[field]:
                _check_stored(folder, f"{group.key}.{field}", shard, stored)
                read_records(folder, shard.key, stored[shard.key], shard.part, partly=shard.flexible)
    wanted = {shard.key for _, shards in needed for found in shards.values() for shard in found}
    _check_nothing_more(folder, spec, model_sharded_state_dict, wanted, stored, SUFFIXES[kind.name].values())


def split_axes(spec: Spec, model_sharded_state_dict: Mapping[str, Any]) -> dict[str, Literal["out", "in"]]:
    """The axis of each group's weights that tensor parallelism splits, for `fqt.sync`; no entry for whole weights.

    Args:
        spec: Of this rank's weights.
        model_sharded_state_dict: `model.sharded_state_dict()`.

    Raises:
        KeyError, ValueError: As `sharded_state_dict`.
    """
    axes: dict[str, Literal["out", "in"]] = {}
    for group in spec.groups:
        axis = split_axis(group, _weight_shards(group, model_sharded_state_dict))
        if axis is not None:
            axes[group.key] = axis
    return axes


def _weight_shards(group: Group, model_sharded_state_dict: Mapping[str, Any]) -> list[list[Shard]]:
    """What the model's entries say about the weights of a group."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    weights: list[list[Shard]] = []
    for name in group.names:
        if name not in model_sharded_state_dict:
            raise KeyError(
                f"parameter {name!r} of group {group.key!r} is not in the model's sharded state dict "
                f"({len(model_sharded_state_dict)} entries); select from model.named_parameters() of the same model"
            )
        entry = model_sharded_state_dict[name]
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        pieces: list[Any] = entry if isinstance(entry, list) else [entry]
        for piece in pieces:
            if (
                not isinstance(piece, ShardedTensor)
                or piece.axis_fragmentations is None
                or piece.flattened_range is not None
            ):
                raise ValueError(
                    f"parameter {name!r}: found {piece} in the model's sharded state dict, wanted ShardedTensors that "
                    "are split evenly and not flattened"
                )
        weights.append([_from_megatron(piece) for piece in pieces])
    return weights


def _from_megatron(tensor: "ShardedTensor") -> Shard:
    prepended, replica = tensor.prepend_axis_num, tensor.replica_id
    return Shard(
        tensor.key,
        Part(tuple(tensor.global_shape), tuple(tensor.global_offset), (1,) * prepended + tuple(tensor.local_shape)),
        prepended,
        (replica,) if isinstance(replica, int) else tuple(replica),
        tensor.allow_shape_mismatch,
        dtype=tensor.dtype,
    )


def _to_megatron(shard: Shard, data: Tensor | None) -> "ShardedTensor":
    from megatron.core.dist_checkpointing import ShardedTensor

    whole, offset, extent = shard.part
    return ShardedTensor(
        shard.key,
        data,
        shard.dtype,
        shard.local_shape,
        whole,
        offset,
        tuple(size // length for size, length in zip(whole, extent, strict=True)) if shard.regular else None,
        replica_id=shard.replica,
        prepend_axis_num=shard.prepended,
        allow_shape_mismatch=shard.flexible,
    )


def _split(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of several layers as one for each of them."""
    entries: dict[str, Any] = {}
    for name, value in loaded.items():
        names = name.split(BETWEEN)
        if names[1:] and (not isinstance(value, Tensor) or value.shape[:1] != (len(names),)):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"load_state: found {found} for {len(names)} leaves, wanted [{len(names)}, ...]: {names}")
        entries |= zip(names, value, strict=True) if names[1:] else {name: value}
    return entries


def _ours(loaded: Mapping[str, Any], kind: Kind) -> set[str]:
    """Entries of a kind of tree. A model's own names do not end so, but for `.scale`, which has codes beside it."""
    names = (name.rpartition(".") for name in loaded)
    return {
        f"{key}.{field}"
        for key, _, field in names
        if field in SUFFIXES[kind.name] and (field != "scale" or f"{key}.codes" in loaded)
    }


def _joined(loaded: Any, like: Tensor) -> Any:
    """The leaf of one or several pieces along `out`, or of one layer that may have kept its axis."""
    if isinstance(loaded, list):
        return torch.cat(loaded, dim=1)
    return loaded[0] if isinstance(loaded, Tensor) and loaded.shape == (1, *like.shape) else loaded


def _check_stored(folder: Path, name: str, shard: Shard, stored: Mapping[str, Stored]) -> None:
    """Raise unless the checkpoint has a tensor for a leaf, of the wanted global shape."""
    if shard.key not in stored:
        has = ", ".join(
            f"{len(keys)} entries of {kind.noun} such as {keys[:2]}"
            for kind in KINDS.values()
            for keys in [sorted(key for key in stored if key.endswith(tuple(SUFFIXES[kind.name].values())))]
        )
        raise KeyError(f"{folder}: leaf {name!r} is not in the checkpoint, wanted the key {shard.key!r}; it has {has}")
    found = stored[shard.key].shape
    if found != shard.part.whole and not shard.flexible:
        raise ValueError(
            f"{folder}: leaf {name!r}, key {shard.key!r}: found the global shape {found}, wanted {shard.part.whole}, "
            "[layers, experts, ...]"
        )


def _check_nothing_more(
    folder: Path,
    spec: Spec,
    model_sharded_state_dict: Mapping[str, Any],
    wanted: set[str],
    stored: Iterable[str],
    suffixes: Iterable[str],
) -> None:
    """Raise if the checkpoint has a leaf of one of this rank's weights that the spec does not quantize so."""
    weights = {key for entry in model_sharded_state_dict.values() if (key := getattr(entry, "key", None))}
    extra = sorted(
        key
        for key in stored
        for suffix in suffixes
        if key.endswith(suffix) and key.removesuffix(suffix) in weights and key not in wanted
    )
    if extra:
        raise ValueError(
            f"{folder}: found {len(extra)} entries, such as {extra[:2]}, that the spec of {len(spec.groups)} groups "
            "has not; select what it was saved with"
        )
