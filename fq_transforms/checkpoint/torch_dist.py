"""Files of Megatron's distributed checkpoints: what is stored where, and whether it is as it was written.

A checkpoint is a directory of torch.distributed.checkpoint, with `metadata.json` beside it. Its data files are records
of `torch.save` one after another, each a zip archive whose CRC-32 `torch.load` does not compare.
"""

import io
import json
import zipfile
from math import prod
from pathlib import Path
from typing import NamedTuple

from fq_transforms.partition import Part

__all__ = ["Record", "Stored", "read_index", "read_records"]


class Record(NamedTuple):
    """A part of a stored tensor, and where its bytes are."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    """A stored tensor: its global shape and its parts."""

    shape: tuple[int, ...]
    records: tuple[Record, ...]


def read_index(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, by key. Reads no data.

    Raises:
        ValueError: `folder` is no such checkpoint, or its metadata is damaged; the message names the file.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    config = folder / "metadata.json"
    wanted = "wanted the directory of a Megatron distributed checkpoint"
    try:
        backend = json.loads(config.read_text())["sharded_backend"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: found {error!r}, {wanted}") from error
    if backend != "torch_dist":
        raise ValueError(f"{config}: found a checkpoint of {backend!r}, wanted 'torch_dist'")
    try:
        metadata = FileSystemReader(folder).read_metadata()
        index = {
            key: (tuple(tensor.size), {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks})
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        records: dict[str, list[Record]] = {key: [] for key in index}
        for item, place in (metadata.storage_data or {}).items():
            if item.fqn in index and item.offset is not None:
                offset = tuple(item.offset)
                shape = index[item.fqn][1][offset]
                records[item.fqn].append(Record(offset, shape, place.relative_path, place.offset, place.length))
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(
            f"{folder / '.metadata'}: found {error!r}, {wanted}; the file is missing or damaged"
        ) from error
    return {key: Stored(shape, tuple(records[key])) for key, (shape, _) in index.items()}


def read_records(
    folder: Path, key: str, stored: Stored, part: Part, *, partly: bool = False
) -> list[tuple[Record, bytes]]:
    """The records that overlap a part of a tensor, and their bytes, each found to be as it was written.

    Args:
        folder: The checkpoint.
        key: The tensor's, for the message.
        stored: What is stored of it.
        part: What is wanted of it.
        partly: Let numbers be missing.

    Raises:
        ValueError: A file is missing, truncated or damaged, or numbers are missing; the message names file and key.
    """
    found: list[tuple[Record, bytes]] = []
    covered = 0
    for record in stored.records:
        numbers = _overlap(record, part)
        covered += numbers
        if numbers:
            found.append((record, _read(folder / record.file, key, record)))
    if covered != prod(part.shape) and not partly:
        raise ValueError(
            f"{folder / '.metadata'}: found {covered} numbers of the part {part.shape} at {part.offset} of {key!r}, "
            f"wanted {prod(part.shape)}; the checkpoint is incomplete"
        )
    return found


def _overlap(record: Record, part: Part) -> int:
    """How many numbers of a part are in a record."""
    boxes = zip(record.offset, record.shape, part.offset, part.shape, strict=True)
    return prod(max(0, min(a + m, b + n) - max(a, b)) for a, m, b, n in boxes)


def _read(path: Path, key: str, record: Record) -> bytes:
    where = f"{path}: bytes {record.start}..{record.start + record.length}, the record of {key!r} at {record.offset}"
    try:
        with path.open("rb") as file:
            file.seek(record.start)
            data = file.read(record.length)
        bad = zipfile.ZipFile(io.BytesIO(data)).testzip()
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{where}: found {error!r}, wanted what was written; the file is missing or damaged"
        ) from error
    if len(data) != record.length or bad is not None:
        raise ValueError(
            f"{where}: found another CRC-32 than was written for {bad!r}, wanted what was written; the file is damaged"
        )
    return data
