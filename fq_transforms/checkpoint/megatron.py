"""A state or packed weights in Megatron's distributed checkpoints, with the model's own or alone, at any parallelism.

    model_sd = model.sharded_state_dict()
    dist_checkpointing.save(model_sd | megatron.sharded_state_dict(fq, state, model_sd), path)

    model_sd, like = model.sharded_state_dict(), fq.init(params)
    megatron.verify(path, fq, model_sd)                                    # before anything is loaded
    loaded = dist_checkpointing.load(model_sd | megatron.sharded_state_dict(fq, like, model_sd), path)
    state = megatron.load_state(fq, loaded, like)

Where a leaf lies is read from the `ShardedTensor` that the model gives for its weight, and from nothing else: no kind
of parallelism needs code of its own, and nothing here communicates. Packed weights take the same functions, with
`fq.pack(params, fq.init(params))` of meta parameters as `like`. Keys, shapes and rules: docs/checkpoints.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checkpoint.manifest import (
    FORMAT_BYTES,
    KINDS,
    Kind,
    are_tiles,
    check_format,
    encode_format,
    kind_of,
)
from fq_transforms.checkpoint.megatron_shards import (
    BETWEEN,
    FORMAT_NAMES,
    SUFFIXES,
    ShardMetadata,
    is_small,
    join_layers,
    leaf_shards,
    split_axis,
)
from fq_transforms.checkpoint.pickles import METADATA, MOST_METADATA, metadata_in
from fq_transforms.checkpoint.storage import AROUND_NUMBERS, numbers_in, open_regular, read_all, refuse_uri
from fq_transforms.dtensor import is_sharded
from fq_transforms.pack import PackedTree
from fq_transforms.parse import MOST_TEXT, shown
from fq_transforms.partition import Part
from fq_transforms.spec import Group, refuse_inputs
from fq_transforms.state import State, flatten, unflatten
from fq_transforms.transform import Transform

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

__all__ = ["load_state", "sharded_state_dict", "split_axes", "verify"]

_FILE = re.compile(r"\w+\.distcp")

# A leaf lies in two pieces where a gated fc1, [gate; up], is split along `out`.
Sharded: TypeAlias = "ShardedTensor | list[ShardedTensor]"


class _Record(NamedTuple):
    """A part of a stored tensor, and where its bytes are: one zip archive of `torch.save`, with a CRC-32 of its own."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class _StoredTensor(NamedTuple):
    """A stored tensor: its global shape, dtype and parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    records: tuple[_Record, ...]


def sharded_state_dict(
    fq: Transform, tree: State | PackedTree, model_sharded_state_dict: Mapping[str, Any]
) -> dict[str, Sharded]:
    """The leaves of this rank, and the formats of its groups, as `ShardedTensor`s: what Megatron saves or loads.

    Args:
        fq: Of this rank's weights, by the names of `model.named_parameters()`.
        tree: Of plain local tensors. `fq.init(params)`, or packed leaves on meta, give entries to load into.
        model_sharded_state_dict: `model.sharded_state_dict()`.

    Returns:
        `{group key}.{leaf name}` to a ShardedTensor, or to two where a gated fc1 is split; small leaves of many layers
        are joined: docs/checkpoints. Megatron changes what it saves: make the entries anew each time.

    Raises:
        KeyError: A weight is not in the model's sharded state dict; a group is not in the tree.
        ValueError: The tree does not fit the spec; a weight's entry has another shape, is split within a block or
            unevenly, or has the expert's number in its key.

    Example:
        >>> import warnings, fq_transforms as fqt
        >>> with warnings.catch_warnings(action="ignore"):  # Megatron names packages that are not installed
        ...     from megatron.core.dist_checkpointing import ShardedTensor
        >>> entry = ShardedTensor.from_rank_offsets("fc1.weight", torch.ones(8, 4), (0, 3, 8), prepend_axis_num=1)
        >>> fq = fqt.transform(fqt.select({"fc1.weight0": entry.data}, {"*": fqt.FP8}))
        >>> leaves = sharded_state_dict(fq, fq.calibrate({"fc1.weight0": entry.data}), {"fc1.weight0": entry})
        >>> leaves["fc1.weight*.amax"].key
        'fc1.weight_quantizer._amax'
    """
    refuse_inputs(fq.spec, "checkpoint.megatron")
    kind, leaves = kind_of(tree), flatten(tree)
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(
                f"{kind.name} {name!r}: found a DTensor, wanted the plain local tensor that Megatron's weights are"
            )
    is_empty = not any(kind.has_values(leaf) for leaf in leaves.values())
    kind.check(tree, fq.spec, values=not is_empty)

    entries: dict[str, Sharded] = {}
    small: dict[str, ShardMetadata] = {}
    data: dict[str, Tensor] = {} if is_empty else leaves
    for group in fq.spec.groups:
        # To load into, the format is bytes of zero: of a layer that is in no file, Megatron says nothing.
        data |= {
            f"{group.key}.{FORMAT_NAMES[kind.name]}": torch.zeros(FORMAT_BYTES, dtype=torch.uint8)
            if is_empty
            else encode_format(group.format)
        }
        for leaf_name, pieces in leaf_shards(group, _weight_shards(group, model_sharded_state_dict), kind).items():
            name = f"{group.key}.{leaf_name}"
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


def load_state(fq: Transform, loaded: Mapping[str, Any], like: State | PackedTree) -> State | PackedTree:
    """The state or the packed weights in what Megatron loaded for the entries of `sharded_state_dict`, checked.

    Args:
        fq: What the tree must fit.
        loaded: From `dist_checkpointing.load`; other entries, such as the model's, are left alone.
        like: `fq.init(params)`, or packed weights, whose devices the result has; meta leaves leave it where it was
            loaded.

    Returns:
        A new tree of the kind of `like`. Its leaves may be the loaded tensors themselves.

    Raises:
        KeyError: A leaf or a format is missing.
        ValueError: A leaf is unexpected, or of another shape or dtype; the checkpoint was made in another format; an
            amax is NaN, infinite or negative. The message names the leaf or the group.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"experts.0.weight": torch.ones(8, 4), "experts.1.weight": torch.ones(8, 4)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> format = {"experts.*.weight.format": encode_format(fqt.FP8)}
        >>> load_state(fq, {"experts.*.weight.amax": torch.tensor([1.0, 2.0])} | format, fq.init(params))
        {'experts.*.weight': {'amax': tensor([1., 2.])}}
    """
    refuse_inputs(fq.spec, "checkpoint.megatron")
    kind = kind_of(like)
    kind.check(like, fq.spec, values=False)
    targets = flatten(like)
    loaded = _split(loaded)
    format_name = FORMAT_NAMES[kind.name]
    wanted = {f"{group.key}.{format_name}" for group in fq.spec.groups} | targets.keys()
    if missing := wanted - loaded.keys():
        raise KeyError(
            f"load_state: missing {len(missing)} of {len(wanted)} entries: {sorted(missing)[:4]}; load what "
            "sharded_state_dict gives for this spec"
        )
    if unexpected := _ours(loaded, kind) - wanted:
        raise ValueError(f"load_state: {len(unexpected)} unexpected entries: {sorted(unexpected)[:4]}")

    for group in fq.spec.groups:
        check_format(group, loaded[f"{group.key}.{format_name}"])
    found = {name: _joined(loaded[name], targets[name]) for name in targets}
    kind.check(unflatten(found, like), fq.spec)
    moved = {name: leaf if targets[name].is_meta else leaf.to(targets[name].device) for name, leaf in found.items()}
    return unflatten(moved, like)


def verify(
    path: str | Path,
    fq: Transform,
    model_sharded_state_dict: Mapping[str, Any],
    *,
    like: State | PackedTree | None = None,
) -> None:
    """Raise unless a checkpoint has all that this rank needs, in the spec's formats, bit for bit as it was written.

    To be called before `dist_checkpointing.load`, which reads values without their checksums and says nothing of what
    it leaves unread. Reads the records that overlap this rank's leaves. Nothing is communicated: an error may be one
    rank's alone.

    Args:
        path: A local directory, made by `dist_checkpointing.save`.
        fq: What will be loaded.
        model_sharded_state_dict: `model.sharded_state_dict()`.
        like: What will be loaded into: packed weights, or a state, which None is too.

    Raises:
        KeyError: A leaf is not in the checkpoint, or a weight not in the model's sharded state dict.
        ValueError: `path` is no such checkpoint; a group was saved in another format; a leaf has another global shape;
            one of this rank's weights has an unexpected leaf; a file is missing, truncated or damaged.

    Example:
        >>> import fq_transforms as fqt
        >>> verify("nowhere", fqt.transform(fqt.Spec(())), {})
        Traceback (most recent call last):
        ...
        ValueError: nowhere/metadata.json: found FileNotFoundError(2, 'No such file or directory'), wanted the directory
        of a Megatron distributed checkpoint
    """
    refuse_inputs(fq.spec, "checkpoint.megatron")
    refuse_uri(path)
    folder, kind = Path(path), kind_of(like or {})
    format_name = FORMAT_NAMES[kind.name]
    stored = _read_index(folder)
    needed = [
        (group, leaf_shards(group, _weight_shards(group, model_sharded_state_dict), kind)) for group in fq.spec.groups
    ]
    # Formats first: another one has other leaves, of other shapes, and is what an error should speak of.
    for group, shards in needed:
        (shard,) = shards[format_name]
        _check_stored(folder, f"{group.key}.{format_name}", shard, stored)
        for record, numbers in _read_records(folder, shard.key, stored[shard.key], shard.part):
            layers = numbers.view(-1, FORMAT_BYTES)
            check_format(group, layers[shard.part.offset[0] - record.offset[0] if len(record.shape) > 1 else 0])
    for group, shards in needed:
        for leaf_name in kind.leaves(group):
            for shard in shards[leaf_name]:
                _check_stored(folder, f"{group.key}.{leaf_name}", shard, stored)
                _read_records(folder, shard.key, stored[shard.key], shard.part, partly=shard.flexible)
    wanted = {shard.key for _, shards in needed for found in shards.values() for shard in found}
    _check_nothing_more(folder, model_sharded_state_dict, wanted, stored, SUFFIXES[kind.name].values())


def split_axes(fq: Transform, model_sharded_state_dict: Mapping[str, Any]) -> dict[str, Literal["out", "in"]]:
    """The axis of each group's weights that tensor parallelism splits, for `fq.sync`; no entry for whole weights.

    Raises:
        KeyError, ValueError: As `sharded_state_dict`.
    """
    axes: dict[str, Literal["out", "in"]] = {}
    for group in fq.spec.groups:
        axis = split_axis(group, _weight_shards(group, model_sharded_state_dict))
        if axis is not None:
            axes[group.key] = axis
    return axes


def _weight_shards(group: Group, model_sharded_state_dict: Mapping[str, Any]) -> list[list[ShardMetadata]]:
    """What the model's entries say about the weights of a group."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    weights: list[list[ShardMetadata]] = []
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


def _from_megatron(tensor: "ShardedTensor") -> ShardMetadata:
    prepended, replica = tensor.prepend_axis_num, tensor.replica_id
    return ShardMetadata(
        tensor.key,
        Part(tuple(tensor.global_shape), tuple(tensor.global_offset), (1,) * prepended + tuple(tensor.local_shape)),
        prepended,
        (replica,) if isinstance(replica, int) else tuple(replica),
        tensor.allow_shape_mismatch,
        dtype=tensor.dtype,
    )


def _to_megatron(shard: ShardMetadata, data: Tensor | None) -> "ShardedTensor":
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


def _check_stored(folder: Path, name: str, shard: ShardMetadata, stored: Mapping[str, _StoredTensor]) -> None:
    """Raise unless the checkpoint has a tensor for a leaf, of the wanted global shape."""
    if shard.key not in stored:
        has = ", ".join(
            f"{len(keys)} entries of {kind.noun} such as {keys[:2]}"
            for kind in KINDS.values()
            for keys in [sorted(key for key in stored if key.endswith(tuple(SUFFIXES[kind.name].values())))]
        )
        raise KeyError(f"{folder}: leaf {name!r} is not in the checkpoint, wanted the key {shard.key!r}; it has {has}")
    found, dtype = stored[shard.key].shape, stored[shard.key].dtype
    if dtype != shard.dtype:
        raise ValueError(f"{folder}: leaf {name!r}, key {shard.key!r}: found {dtype}, wanted {shard.dtype}")
    if found != shard.part.whole and not shard.flexible:
        raise ValueError(
            f"{folder}: leaf {name!r}, key {shard.key!r}: found the global shape {found}, wanted {shard.part.whole}, "
            "[layers, experts, ...]"
        )


def _check_nothing_more(
    folder: Path,
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
            f"{folder}: found {len(extra)} unexpected entries, such as {extra[:2]}; select what it was saved with"
        )


def _read_index(folder: Path) -> dict[str, _StoredTensor]:
    """The tensors of a checkpoint, by key. Reads no data.

    Raises:
        ValueError: `folder` is no such checkpoint, or its metadata is damaged; the message names the file.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    config = folder / "metadata.json"
    wanted = "wanted the directory of a Megatron distributed checkpoint"
    try:
        backend = json.loads(read_all(config, MOST_TEXT))["sharded_backend"]
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{config}: found {repr(error)[:300]}, {wanted}") from error
    if backend != "torch_dist":
        raise ValueError(f"{config}: found a checkpoint of {shown(backend)}, wanted 'torch_dist'")
    try:
        metadata = metadata_in(read_all(folder / METADATA, MOST_METADATA))
        index = {
            key: (tensor, {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks})
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        records: dict[str, list[_Record]] = {key: [] for key in index}
        for item, where in (metadata.storage_data or {}).items():
            if item.fqn in index and item.offset is not None:
                offset = tuple(item.offset)
                shape = index[item.fqn][1][offset]
                records[item.fqn].append(_Record(offset, shape, where.relative_path, where.offset, where.length))
    except (OSError, LookupError, ValueError) as error:
        raise ValueError(
            f"{folder / METADATA}: found {repr(error)[:300]}, {wanted}; the file is missing or damaged"
        ) from error
    return {
        key: _StoredTensor(tuple(tensor.size), tensor.properties.dtype, tuple(records[key]))
        for key, (tensor, _) in index.items()
    }


def _read_records(
    folder: Path, key: str, stored: _StoredTensor, part: Part, *, partly: bool = False
) -> list[tuple[_Record, Tensor]]:
    """The records that overlap a part of a tensor, and their numbers, each found to be as it was written.

    Args:
        folder: The checkpoint.
        key: The tensor's, for the message.
        stored: What is stored of it.
        part: What is wanted of it.
        partly: Let numbers be missing.

    Raises:
        ValueError: A file is missing, truncated or damaged, or numbers are missing; the message names file and key.
    """
    found: list[tuple[_Record, Tensor]] = []
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for record in stored.records:
        if (box := _overlap(record, part)) is not None:
            boxes.append(box)
            found.append((record, _read_record(folder, key, record, stored.dtype)))
    if not are_tiles(boxes, part.shape) and not partly:
        raise ValueError(
            f"{folder / METADATA}: found {sum(prod(sizes) for _, sizes in boxes)} numbers of the part {part.shape} at "
            f"{part.offset} of {key!r}, wanted each of {prod(part.shape)} once; the checkpoint is incomplete"
        )
    return found


def _overlap(record: _Record, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What of a part is in a record, by its offset in the part and its sizes; None for nothing."""
    if len(record.shape) != len(part.shape):
        return None
    starts, ends = (), ()
    for a, m, b, n in zip(record.offset, record.shape, part.offset, part.shape, strict=True):
        starts, ends = (*starts, max(a, b) - b), (*ends, min(a + m, b + n) - b)
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, sizes) if min(sizes, default=1) > 0 else None


def _read_record(folder: Path, key: str, record: _Record, dtype: torch.dtype) -> Tensor:
    """The numbers of a record, found to be as they were written: Megatron's CRC-32 is that of each entry of an archive.

    Nothing else is read: an archive holds a pickle too, and may hold what is larger than it says.
    """
    path = folder / record.file
    where = f"{path}: bytes {record.start}..{record.start + record.length}, the record of {key!r} at {record.offset}"
    nbytes = prod(record.shape) * dtype.itemsize
    if not _FILE.fullmatch(record.file) or not nbytes <= record.length <= nbytes + AROUND_NUMBERS:
        raise ValueError(f"{where}: found this place for {nbytes} bytes of numbers, wanted one in the directory")
    try:
        with open_regular(path) as file:
            file.seek(record.start)
            data = bytearray(record.length)
            read = file.readinto(data)
        if not data.startswith(b"PK"):
            raise zipfile.BadZipFile("no archive begins here")
        numbers = numbers_in(data, record.shape, dtype, where)
        bad = zipfile.ZipFile(io.BytesIO(data)).testzip()
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{where}: found {repr(error)[:300]}, wanted what was written; the file is missing or damaged"
        ) from error
    if read != record.length or bad is not None:
        raise ValueError(
            f"{where}: found another CRC-32 than was written for {bad!r}, wanted what was written; the file is damaged"
        )
    return numbers
