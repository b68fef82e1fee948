"""Shards of safetensors: where each tensor of a folder lies, and new ones, laid out before the first byte is written.

A shard is 8 bytes, the length of its header, the header, JSON that says of each tensor where it lies, and the tensors.
Once names, dtypes and shapes are known each has its place, so tensors can be written in any order, by any number of
threads and processes, and the files are the same.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from math import inf, prod
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from fq_transforms.checkpoint.storage import Lock, naming, open_regular, stage_of
from fq_transforms.export.files.directory import (
    INDEX,
    SINGLE,
    check_free,
    commit,
    making_parents,
    read_document,
    remove_staged,
    write_json,
)
from fq_transforms.parse import MOST_NAME, check_name, parse_json, shown

__all__ = [
    "DTYPES",
    "Files",
    "Place",
    "Shard",
    "ShardWriter",
    "TensorType",
    "index_of",
    "is_whole",
    "lay_out",
    "type_of",
    "write",
]

# Names that safetensors has for PyTorch's dtypes. Files may have others, which can be copied only.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"[^/\0]+\.safetensors")
# Bytes that are copied at a time where the system cannot copy from file to file by itself.
COPY_BYTES = 2**23
# Bytes of the memory of a GPU, of which each tensor begins at a multiple.
ALIGNMENT = 256


class TensorType(NamedTuple):
    """A dtype, by its name in files, and a shape."""

    dtype: str
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where the bytes of a tensor are.

    Attributes:
        file: Name of the shard.
        type: Dtype and shape.
        start: Of its bytes in the file.
        size: How many.
    """

    file: str
    type: TensorType
    start: int
    size: int


class Shard(NamedTuple):
    """A file to write: its name, its first bytes, how many it has, and where its tensors go."""

    file: str
    head: bytes
    size: int
    places: dict[str, Place]


def type_of(tensor: Tensor) -> TensorType:
    """What files say of a tensor.

    Example:
        >>> type_of(torch.ones(2, 3))
        TensorType(dtype='F32', shape=(2, 3))
    """
    return TensorType(_NAMES[tensor.dtype], tuple(tensor.shape))


def lay_out(sizes: Mapping[str, tuple[TensorType, int]], limit: int) -> list[Shard]:
    """Shards of at most `limit` bytes of tensors, in the order given; a larger tensor has a file of its own.

    Within a file tensors of wider numbers come first, so that all are aligned.

    Args:
        sizes: Names to types and numbers of bytes.
        limit: Of a file.

    Example:
        >>> one, = lay_out({"a": (TensorType("U8", (3,)), 3), "b": (TensorType("F32", (2,)), 8)}, 100)
        >>> one.file, [(name, place.start - len(one.head), place.size) for name, place in one.places.items()]
        ('model.safetensors', [('b', 0, 8), ('a', 8, 3)])
    """
    cut: list[list[str]] = [[]]
    held = 0
    for name, (_, size) in sizes.items():
        if cut[-1] and held + size > limit:
            cut.append([])
            held = 0
        cut[-1].append(name)
        held += size
    files = [f"model-{n + 1:05d}-of-{len(cut):05d}.safetensors" for n in range(len(cut))] if len(cut) > 1 else [SINGLE]
    return [_shard(file, {name: sizes[name] for name in names}) for file, names in zip(files, cut, strict=True)]


def _shard(file: str, sizes: Mapping[str, tuple[TensorType, int]]) -> Shard:
    def width(name: str) -> float:
        (_, shape), size = sizes[name]
        return size / prod(shape) if size else inf  # without numbers, at the front, which suits any

    ordered = sorted(sizes, key=width, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in ordered:
        (dtype, shape), size = sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, start + size)}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = {
        name: Place(file, sizes[name][0], len(head) + header[name]["data_offsets"][0], sizes[name][1])
        for name in ordered
    }
    return Shard(file, head, len(head) + start, places)


def index_of(shards: Iterable[Shard]) -> dict[str, Any] | None:
    """What the index of several shards holds; None for one, which needs none."""
    shards = list(shards)
    if len(shards) < 2:
        return None
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    total = sum(place.size for shard in shards for place in shard.places.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter:
    """Shards in a directory, each of its full size from the start, to be filled in any order, by several threads.

    Files are open while they are written to: there may be more than a process can have open.

    Args:
        folder: The directory.
        shards: Of `lay_out`.
        is_new: False to go on with what another one has made there.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, is_new: bool = True) -> None:
        self.places = {name: place for shard in shards for name, place in shard.places.items()}
        self._folder = folder
        self._lock = ThreadLock()
        self._unsynced: set[str] = set()
        for shard in shards if is_new else ():
            with self._opened(shard.file, os.O_CREAT) as file:
                os.ftruncate(file, shard.size)
                _write(file, shard.head, 0)

    @contextmanager
    def _opened(self, name: str, flags: int = 0) -> Generator[int, None, None]:
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)
        with self._lock:
            self._unsynced.add(name)

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a tensor, or, of a stack of matrices, those from the `first` on."""
        place, found = self.places[name], type_of(tensor)
        dtype, shape = place.type
        assert (found.dtype, found.shape[1:]) == (dtype, shape[1:]), (name, found, place)
        assert not shape or first + found.shape[0] <= shape[0], (name, found, place)
        row = place.size // max(1, shape[0]) if shape else 0
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with self._opened(place.file) as file:
            _write(file, flat.numpy().data, place.start + first * row)

    def copy(self, name: str, source: Path, start: int) -> None:
        """Copy the bytes of a tensor from another file, where they begin at `start`."""
        place = self.places[name]
        with open_regular(source) as stream, self._opened(place.file) as file:
            _copy(stream.fileno(), file, start, place.start, place.size, source)

    def sync(self) -> None:
        """Let what was written reach the disk."""
        with self._lock:
            names, self._unsynced = self._unsynced, set()
        for name in names:
            file = os.open(self._folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(file)
            finally:
                os.close(file)


def _write(file: int, content: Any, start: int) -> None:
    view = memoryview(content).cast("B")
    while len(view):
        count = os.pwrite(file, view, start)
        view, start = view[count:], start + count


def _copy(source: int, target: int, start: int, to: int, size: int, name: Path) -> None:
    """By the system, from file to file, or else through memory. The positions of the files stay as they are."""
    by_system = True
    while size:
        count = 0
        if by_system:
            try:
                count = os.copy_file_range(source, target, size, start, to)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
            by_system = count > 0
        if not by_system:
            content = os.pread(source, min(size, COPY_BYTES), start)
            if not content:
                raise ValueError(f"file {str(name)!r}: found {size} bytes less than its header says")
            _write(target, content, to)
            count = len(content)
        size, start, to = size - count, start + count, to + count


def write(
    folder: Path,
    types: Mapping[str, tuple[TensorType, int]],
    tensors: Iterable[tuple[str, Tensor]],
    documents: Mapping[str, Any],
    max_shard_size: int,
) -> None:
    """Write a folder: it appears whole or not at all. No tensor is held.

    Args:
        folder: A new name, or an empty directory.
        types: Of all tensors, with their bytes.
        tensors: The same names and tensors, on any device, taken one at a time.
        documents: Names of JSON files to what they hold.
        max_shard_size: Of a file, in bytes.

    Raises:
        ValueError: The folder is taken.
        OSError: A file cannot be written.

    Example:
        >>> import tempfile
        >>> tensors = {"a": torch.ones(4), "b": torch.ones(4)}
        >>> types = {name: (type_of(tensor), tensor.nbytes) for name, tensor in tensors.items()}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = Path(parent, "model")
        ...     write(folder, types, tensors.items(), {"config.json": {}}, 20)
        ...     sorted(path.name for path in folder.iterdir())[2:]
        ['model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    shards = lay_out(types, max_shard_size)
    index = index_of(shards)
    with naming(folder), making_parents(folder), Lock(folder):
        check_free(folder)
        remove_staged(folder)
        stage = stage_of(folder, uuid4().hex)
        stage.mkdir()
        try:
            writer = ShardWriter(stage, shards)
            for name, tensor in tensors:
                writer.write(name, tensor)
            writer.sync()
            for name, document in {**documents, **({INDEX: index} if index else {})}.items():
                write_json(stage / name, document)
            commit(stage, folder)
        except BaseException:
            remove_staged(folder)
            shutil.rmtree(stage, ignore_errors=True)
            raise


def is_whole(stage: Path, shards: Sequence[Shard]) -> bool:
    """True if shards are as `ShardWriter` lays them out, so that what is said to be done can be there."""
    for shard in shards:
        file = stage / shard.file
        if not file.is_file() or file.stat().st_size != shard.size:
            return False
        with file.open("rb") as stream:
            if stream.read(len(shard.head)) != shard.head:
                return False
    return True


class Files:
    """The tensors of a folder by name. Each file is opened once: its header may list thousands.

    Attributes:
        folder: The directory.
        places: Where each tensor is, in the order of the files.

    Raises:
        ValueError: The directory has no safetensors, or damaged ones; the index names a file or a tensor that is not
            there, or a file of another directory; a tensor is in two files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        self._closing, self._lock = ExitStack(), ThreadLock()
        try:
            self.places = self._places_of(folder)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.clear()
        self._closing.close()

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor, or a part of it along its first dimension. Files are mapped, so others are not read."""
        file = self._file(self.places[name].file)
        return file.get_tensor(name) if part is None else file.get_slice(name)[part]

    def on_device(self, names: Sequence[str], part: slice | None, device: torch.device) -> list[Tensor]:
        """Tensors, or a part of each along its first dimension, on a GPU: read into pinned memory, in one copy."""
        types = [self.places[name].type for name in names]
        shapes = [(len(range(shape[0])[part]), *shape[1:]) if part else shape for _, shape in types]
        sizes = [prod(shape) * DTYPES[dtype].itemsize for (dtype, _), shape in zip(types, shapes, strict=True)]
        # Each begins where a kernel reads fastest.
        starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
        view: Any = host.numpy().data
        for name, start, size in zip(names, starts, sizes, strict=False):
            place = self.places[name]
            skipped = part.start * (place.size // place.type.shape[0]) if part else 0
            self._read_into(place, view[start : start + size], place.start + skipped)
        there = host.to(device, non_blocking=True)
        return [
            there[start : start + size].view(DTYPES[dtype]).view(shape)
            for (dtype, _), shape, start, size in zip(types, shapes, starts, sizes, strict=False)
        ]

    def _read_into(self, place: Place, view: memoryview, start: int) -> None:
        with self._lock:
            if place.file not in self._descriptors:
                stream = self._closing.enter_context(open_regular(self.folder / place.file))
                self._descriptors[place.file] = stream.fileno()
        while len(view):
            count = os.preadv(self._descriptors[place.file], [view], start)
            if not count:
                raise ValueError(f"file {str(self.folder / place.file)!r}: found less than its header says")
            view, start = view[count:], start + count

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self.places[name].file

    def _file(self, name: str) -> Any:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._closing.enter_context(_opened(self.folder / name))
            return self._opened[name]

    def _places_of(self, folder: Path) -> dict[str, Place]:
        index = folder / INDEX
        if not index.exists() and not (folder / SINGLE).exists():
            raise ValueError(f"folder {str(folder)!r}: {_instead(folder)}, wanted {SINGLE!r} or {INDEX!r}")
        named: Any = read_document(index).get("weight_map") if index.exists() else None
        if index.exists() and not (isinstance(named, dict) and all(isinstance(file, str) for file in named.values())):
            raise ValueError(f"file {str(index)!r}: found weight_map={shown(named)}, wanted names of files")
        found: dict[str, Place] = {}
        if named == {}:
            raise ValueError(f"file {str(index)!r}: found an empty weight_map, wanted names of files")
        for file in sorted(set(named.values())) if named is not None else [SINGLE]:
            if not _SHARD.fullmatch(file):
                raise ValueError(
                    f"file {str(index)!r}: found the file {shown(file)}, wanted a name of safetensors in its directory"
                )
            if not (folder / file).exists():
                raise ValueError(f"folder {str(folder)!r}: found no {file!r}, which {INDEX!r} names, wanted all shards")
            self._file(file)  # which checks the header
            for place_name, place in _read_header(folder / file).items():
                if place_name in found:
                    raise ValueError(
                        f"folder {str(folder)!r}: found {place_name!r} in {found[place_name].file!r} and in {file!r}, "
                        "wanted it once"
                    )
                found[place_name] = place
        in_files = {name: place.file for name, place in found.items()}
        if named is not None and named != in_files:
            name = next(name for name in sorted({*named, *in_files}) if named.get(name) != in_files.get(name))
            where = "in no file" if name not in in_files else f"in {in_files[name]!r}"
            said = "does not name it" if name not in named else f"says {named[name]!r}"
            raise ValueError(
                f"folder {str(folder)!r}: found tensor {name[:MOST_NAME]!r} {where}, and {INDEX!r} {said}, wanted both "
                "alike"
            )
        for name in found:
            check_name(name, f"folder {str(folder)!r}")
        return found


def _instead(folder: Path) -> str:
    """What a directory has in place of safetensors, for a message."""
    if not folder.is_dir():
        return "found a file" if folder.exists() else "found nothing"
    names = sorted(entry.name for entry in folder.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return f"found pickles such as {pickles[0]!r}, which are not read, as they can hold code"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"found {shards[0]!r} without an index"
    return "found no checkpoint"


def _opened(file: Path) -> Any:
    """A file of safetensors, mapped. Raises ValueError for a device or a pipe, which the library would wait for."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(file):
            return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"file {str(file)!r}: found no safetensors, or damaged ones: {str(error)[:500]}, wanted a whole file"
        ) from error


def _read_header(path: Path) -> dict[str, Place]:
    """Where the tensors of a file are, in the order of their bytes; the library has checked them."""
    with open_regular(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = parse_json(stream.read(length).decode())
    header.pop("__metadata__", None)
    places = {
        name: Place(
            path.name,
            TensorType(entry["dtype"], tuple(entry["shape"])),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return dict(sorted(places.items(), key=lambda item: item[1].start))
