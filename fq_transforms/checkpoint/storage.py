"""Files of a sharded checkpoint: each byte is checked when it is read, and a directory appears whole or not at all.

A checkpoint is a directory as torch.distributed.checkpoint (DCP) writes it, which any reader of DCP can read:

    .metadata                   what is stored and in which file; written last, and by one rank
    {save}_{rank}.distcp        the parts of leaves that one rank has written, one after another
    {save}_{rank}_{n}.distcp    more of them, where they are many bytes: a file a thread

Two things are added, and need no collective. Each part, and `.metadata`, is followed by the crc32 of its bytes. And all
is written into a staging directory first. For a new name it is a sibling, whose renaming is the commit. To replace a
checkpoint it lies within it; its data files are moved up beside the old ones, and the replacement of `.metadata`, one
atomic rename, is the commit. What a crash leaves is named by no `.metadata`, and removed by the next save to the path.
"""

import contextlib
import errno
import io
import pickle
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fq_transforms.checkpoint.contents import named, naming
from fq_transforms.checkpoint.staging import (
    is_taken,
    remove_left,
    some_files,
    stage_beside,
    stage_within,
    sync,
    sync_directory,
)

__all__ = ["Reader", "Writer", "in_threads", "read_metadata", "sealed", "unsealed"]

A = TypeVar("A")
B = TypeVar("B")

filesystem: Any = import_module("torch.distributed.checkpoint.filesystem")  # where a part lies has no public name

METADATA = ".metadata"
_DATA_FILE = re.compile(r"[0-9a-f]{32}_\d+(_\d+)?\.distcp")

# How many threads a rank hashes and moves bytes with, and how many bytes are worth another. Hashing and files let go of
# the interpreter, so that four are nearly four times one; hosts have more than four cores a GPU.
THREADS, BYTES_A_THREAD = 4, 2**26

# All that DCP's metadata is made of. It is pickled, and a pickle can name any function to call: these are harmless.
_METADATA_GLOBALS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def sealed(content: bytes | memoryview, crc: int = 0) -> bytes:
    """What follows `content` in a file: its crc32, in 16 bytes; `crc` is that of what went before.

    Example:
        >>> sealed(b"amax").decode().strip()
        'crc32=c0e9b4e1'
        >>> sealed(b"ax", zlib.crc32(b"am")) == sealed(b"amax")
        True
    """
    return b"\ncrc32=%08x\n" % zlib.crc32(content, crc)


SEAL = len(sealed(b""))


def unsealed(content: bytes, what: str) -> memoryview:
    """`content` without its seal.

    Raises:
        ValueError: The seal is missing or is not that of the content; the message begins with `what`.

    Example:
        >>> bytes(unsealed(b"amax" + sealed(b"amax"), "file 'a'"))
        b'amax'
    """
    inside = memoryview(content)[:-SEAL]
    _check_seal(inside, content[-SEAL:], what)
    return inside


def _check_seal(content: bytes | memoryview, seal: bytes, what: str) -> None:
    if seal != sealed(content):
        raise ValueError(
            f"{what}: found bytes that are not those written (crc32): truncated, damaged, or not of a state"
        )


def in_threads(call: Callable[[A], B], entries: Sequence[A], size: int) -> list[B]:
    """`[call(entry) for entry in entries]`, by as many threads as `size` bytes are worth; none for a small state.

    Raises:
        Exception: What the first of the entries raised whose call did.

    Example:
        >>> in_threads(abs, [-1, 2], 2**40)
        [1, 2]
    """
    count = _threads(size, len(entries))
    if count <= 1:
        return [call(entry) for entry in entries]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, entries))


def _threads(size: int, most: int) -> int:
    return min(THREADS, most, 1 + size // BYTES_A_THREAD)


def read_metadata(path: Path) -> Metadata:
    """DCP's metadata of the checkpoint at `path`, checked.

    Raises:
        OSError: There is nothing, or it cannot be read.
        ValueError: It is no checkpoint, or its metadata is damaged.
    """
    file = path / METADATA
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "there is nothing, wanted a checkpoint", str(path)) from error
        raise ValueError(
            f"found a directory without {METADATA!r} and with {some_files(path)}, wanted a checkpoint"
        ) from error
    except NotADirectoryError as error:
        if path.is_file():
            raise ValueError("found a file, wanted the directory of a checkpoint; load_file reads a file") from error
        raise named(error, file) from error
    except OSError as error:
        raise named(error, file) from error
    inside = unsealed(content, f"file {METADATA!r}")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(inside)).load()
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"file {METADATA!r}: found no metadata of DCP: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"file {METADATA!r}: found {type(metadata).__name__}, wanted metadata of DCP")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _METADATA_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which metadata of DCP does not")
        return super().find_class(module_name, global_name)


class _Place(NamedTuple):
    """Where a rank writes, as the coordinator has decided."""

    stage: str
    file: str


class Writer(FileSystemWriter):
    """Writes a checkpoint to `path` atomically. What it shares between ranks travels with DCP's own plans.

    Args:
        path: The directory that is to be made or replaced.
        is_ours: Says of the metadata of a checkpoint whether it may be replaced.
    """

    def __init__(self, path: Path, is_ours: Callable[[Metadata], bool]) -> None:
        super().__init__(path, sync_files=False)  # `finish` syncs, after the seal is on
        self._target = path
        self._is_ours = is_ours
        self._stage: Path | None = None

    def storage_meta(self) -> StorageMeta:
        """Without the path, which DCP would store: checkpoints are moved and shared."""
        return StorageMeta(save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing is made yet: the coordinator looks at the path first."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide where all ranks write; what an interrupted save has left is removed first."""
        target, save = self._target, uuid4().hex
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_taken(target):
                self._check_replaceable()
                self._stage = stage_within(target, save)
            else:
                self._stage = stage_beside(target, save)
            _sweep(target)
            self._stage.mkdir()
        return [
            replace(plan, storage_data=_Place(str(self._stage), f"{save}_{rank}.distcp"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts, each with its seal, to one file, or to one a thread if they are large."""
        place: _Place = plan.storage_data
        size = sum(_nbytes(item) for item in plan.items)
        files = _threads(size, len(plan.items))

        def write(number: int) -> list[WriteResult]:
            name = place.file if not number else place.file.replace(".", f"_{number}.")
            return _write_parts(Path(place.stage, name), plan.items[number::files], planner)

        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in in_threads(write, range(files), size) for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata and commit."""
        target, stage = self._target, self._stage
        assert stage is not None
        with naming(stage):
            self.path = stage  # where DCP pickles its metadata
            super().finish(metadata, results)
            self.path = target
            file = stage / METADATA
            with file.open("r+b") as stream:
                stream.write(sealed(stream.read()))
                sync(stream)
        with naming(target):
            if stage.parent == target:
                # By their names, for another machine's files may not be in a listing yet.
                for name in {result.storage_data.relative_path for rank in results for result in rank}:
                    (stage / name).rename(target / name)
                sync_directory(target)
                file.replace(target / METADATA)
                sync_directory(target)
            else:
                sync_directory(stage)
                stage.rename(target)
                sync_directory(target.parent)
        with contextlib.suppress(OSError, ValueError):  # it is saved; what stays is removed by the next save
            _sweep(target)

    def discard(self) -> None:
        """Remove what a save that failed has written; on the coordinator, the others have nothing to remove."""
        if self._stage is not None:
            with contextlib.suppress(OSError, ValueError):
                _sweep(self._target)

    def _check_replaceable(self) -> None:
        wanted = "wanted a new name, an empty directory or a checkpoint to replace"
        if not self._target.is_dir():
            raise ValueError(f"found a file, {wanted}")
        if not (self._target / METADATA).exists():
            raise ValueError(f"found a directory with {some_files(self._target)} and without {METADATA!r}, {wanted}")
        try:
            is_ours = self._is_ours(read_metadata(self._target))
        except ValueError as error:
            raise ValueError(f"{error}; {wanted}; remove it yourself") from error
        if not is_ours:
            raise ValueError(f"found a checkpoint of something else than a state or packed weights, {wanted}")


class Reader(FileSystemReader):
    """Reads what `Writer` has written, and checks each part."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._target = path
        self._failure: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata. DCP would log a failure and go on to look for other files, so it is raised a step later."""
        try:
            return read_metadata(self._target)
        except Exception as error:
            self._failure = error
            return Metadata({}, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raise what `read_metadata` found."""
        if self._failure is not None:
            raise self._failure
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts that this rank needs, each once; files from front to back, large ones by several threads."""
        files: dict[str, list[tuple[Any, list[Any]]]] = {}
        parts: dict[Any, list[Any]] = {}
        for item in plan.items:
            parts.setdefault(item.storage_index, []).append(item)
        for index, items in parts.items():
            where = self.storage_data[index]
            files.setdefault(where.relative_path, []).append((where, items))
        runs: list[tuple[str, list[tuple[Any, list[Any]]]]] = []
        for name, wanted in files.items():
            if Path(name).name != name:
                raise ValueError(f"file {METADATA!r}: found the data file {name!r}, wanted one in the directory")
            count = _threads(sum(where.length for where, _ in wanted), len(wanted))
            wanted.sort(key=lambda entry: entry[0].offset)
            runs += [(name, wanted[number::count]) for number in range(count)]

        def read(run: tuple[str, list[tuple[Any, list[Any]]]]) -> list[tuple[ReadItem, Tensor]]:
            return _read_parts(self._target / run[0], run[1], planner)

        for done in in_threads(read, runs, sum(where.length for _, wanted in runs for where, _ in wanted)):
            for item, tensor in done:
                planner.commit_tensor(item, tensor)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _write_parts(file: Path, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write parts to a new file, one after another, each with its seal."""
    results: list[WriteResult] = []
    with naming(file), file.open("wb") as stream:
        for item in items:
            part, start = _Summed(stream), stream.tell()
            _write_tensor(planner.resolve_data(item), part)
            where = filesystem._StorageInfo(file.name, start, stream.tell() - start)
            stream.write(sealed(b"", part.crc))
            results.append(WriteResult(item.index, where.length, where))
        sync(stream)
    return results


def _read_parts(
    file: Path, wanted: Sequence[tuple[Any, Sequence[ReadItem]]], planner: LoadPlanner
) -> list[tuple[ReadItem, Tensor]]:
    """Read parts of a file, each where it lies, check them, and copy what is wanted of them to where it is wanted."""
    done: list[tuple[ReadItem, Tensor]] = []
    with naming(file), file.open("rb") as stream:
        for where, items in wanted:
            what = f"leaf {items[0].storage_index.fqn!r} in file {file.name!r}"
            stream.seek(where.offset)
            content = stream.read(where.length)
            _check_seal(content, stream.read(SEAL), what)
            part = _tensor_of(content, what)
            for item in items:
                box = _box(item.storage_offsets, item.lengths)
                tensor = planner.resolve_tensor(item).detach()
                if part.dtype != tensor.dtype or part[box].shape != tensor.shape:
                    raise ValueError(f"{what}: found {tuple(part.shape)} {part.dtype}, not what is wanted")
                tensor.copy_(part[box])
                done.append((item, tensor))
    return done


class _Summed:
    """A stream that sums up, by crc32, what is written to it: no copy is made, and the bytes are read once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.crc = stream, 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        return self._stream.write(content)

    def flush(self) -> None:
        """Nothing: whoever opened the stream flushes it, once."""


def _write_tensor(data: Any, stream: Any) -> None:
    """A tensor as torch.save writes it, in the older of its two layouts: 0.3 KB more than the numbers, not 1.6.

    float8 is in the newer one: what the older names is a storage of the dtype, and there is none for it.
    """
    assert isinstance(data, Tensor), "a tree has only tensors"
    tensor = data.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = _alone(tensor)  # or all of the memory that it is a view of would be written
    is_float8 = tensor.is_floating_point() and tensor.element_size() == 1
    torch.save(tensor, stream, _use_new_zipfile_serialization=is_float8)


def _alone(tensor: Tensor) -> Tensor:
    """The same numbers, in the same memory, as a tensor whose storage is no more than they are."""
    if not tensor.numel():
        return tensor.clone()
    return torch.frombuffer(tensor.view(-1).view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a tree has only tensors"
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _tensor_of(content: bytes, what: str) -> Tensor:
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can fail in any way
        raise ValueError(f"{what}: found no tensor: {error}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what}: found {type(tensor).__name__}, wanted a tensor")
    return tensor


def _box(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


def _sweep(target: Path) -> None:
    """Remove what saves to `target` that were interrupted have left; the checkpoint itself stays as it is."""
    remove_left(target)
    if (target / METADATA).exists():
        kept = {where.relative_path for where in read_metadata(target).storage_data.values()}
        for entry in list(target.iterdir()):
            if _DATA_FILE.fullmatch(entry.name) and entry.name not in kept:
                entry.unlink()
