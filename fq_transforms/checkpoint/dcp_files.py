"""The directories that torch.distributed.checkpoint (DCP) writes, with a checksum on each part, and atomically.

    .metadata                   what is stored and in which file; written last, and by one rank
    {save}_{rank}.distcp        the chunks of leaves that one rank has written, one after another
    {save}_{rank}_{n}.distcp    more of them, where they are many bytes: one file per thread

Each chunk, and `.metadata`, is followed by the crc32 of its bytes. Any reader of DCP can read it: docs/checkpoints.
"""

import contextlib
import errno
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fq_transforms.checkpoint.pickles import METADATA, MOST_METADATA, metadata_in
from fq_transforms.checkpoint.storage import (
    AROUND_NUMBERS,
    SEAL_BYTES,
    Lock,
    check_seal,
    fsync,
    fsync_directory,
    in_threads,
    is_taken,
    named,
    naming,
    numbers_in,
    open_regular,
    read_all,
    remove_left,
    seal_of,
    some_files,
    stage_of,
    stages_within,
    threads_for,
    write_tensor,
)
from fq_transforms.parse import shown

__all__ = ["Reader", "ReplacedError", "Writer", "read_metadata"]

filesystem: Any = import_module("torch.distributed.checkpoint.filesystem")  # where a chunk lies has no public name

_DATA_FILE = re.compile(r"[0-9a-f]{32}_\d+(_\d+)?\.distcp")


def read_metadata(path: Path) -> Metadata:
    """DCP's metadata of the checkpoint at `path`, checked.

    Raises:
        OSError: There is nothing, or it cannot be read.
        ValueError: It is no checkpoint, or its metadata is damaged.
    """
    file = path / METADATA
    try:
        content = read_all(file, MOST_METADATA)
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
    check_seal(memoryview(content)[:-SEAL_BYTES], content[-SEAL_BYTES:], f"file {METADATA!r}")
    try:
        metadata = metadata_in(content[:-SEAL_BYTES])
    except ValueError as error:
        raise ValueError(f"file {METADATA!r}: found no metadata of DCP: {error}") from error
    if metadata.storage_data is None:
        raise ValueError(f"file {METADATA!r}: found no places of what is stored, wanted metadata of DCP")
    return metadata


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
        self._lock: Lock | None = None

    def storage_meta(self) -> StorageMeta:
        """Without the path, which DCP would store: checkpoints are moved and shared."""
        return StorageMeta(save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing is made yet: the coordinator looks at the path first."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide which file each rank writes; what an interrupted save has left is removed first."""
        target, save = self._target, uuid4().hex
        with naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(target)
            if is_taken(target, but=_moved(target)):
                self._check_replaceable()
            _sweep(target)
            self._stage = stage_of(target, save)
            self._stage.mkdir()
        return [
            replace(plan, storage_data=str(self._stage / f"{save}_{rank}.distcp")) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks, each with its seal, to one file, or to one per thread if they are large."""
        first = Path(plan.storage_data)
        size = sum(_nbytes(item) for item in plan.items)
        count = threads_for(size, len(plan.items))

        def write(number: int) -> list[WriteResult]:
            file = first if not number else first.with_stem(f"{first.stem}_{number}")
            return _write_chunks(file, plan.items[number::count], planner)

        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in in_threads(write, range(count), size) for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata and commit, by one rename."""
        target, stage = self._target, self._stage
        assert stage is not None
        with naming(stage):
            self.path = stage  # where DCP pickles its metadata
            super().finish(metadata, results)
            self.path = target
            file = stage / METADATA
            with file.open("r+b") as stream:
                stream.write(seal_of(stream.read()))
                fsync(stream)
        with naming(target):
            if stage.parent == target:
                # By their names, for another machine's files may not be in a listing yet.
                for name in {result.storage_data.relative_path for rank in results for result in rank}:
                    (stage / name).rename(target / name)
                fsync_directory(target)
                file.replace(target / METADATA)
                fsync_directory(target)
            else:
                fsync_directory(stage)
                stage.rename(target)
                fsync_directory(target.parent)
        self.discard()  # it is saved; what stays is removed by the next save

    def discard(self) -> None:
        """Remove what is no checkpoint, and let others save; on the coordinator, the others have nothing to remove."""
        if self._lock is not None:
            with contextlib.suppress(OSError, ValueError):
                _sweep(self._target)
            self._lock.release()
            self._lock = None

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


class ReplacedError(OSError):
    """A file is gone, since another checkpoint has taken the place of the one that is being read."""


class Reader(FileSystemReader):
    """Reads what `Writer` has written, and checks each chunk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._target = path
        self._failure: Exception | None = None
        self._stored: Mapping[str, Any] = {}

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
        self._stored = metadata.state_dict_metadata
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the chunks that this rank needs, each once; files from front to back, large ones by several threads."""
        chunks: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            chunks.setdefault(item.storage_index, []).append(item)
        files: dict[str, list[_Wanted]] = {}
        for index, items in chunks.items():
            wanted = self._wanted(index, items)
            files.setdefault(wanted.file, []).append(wanted)
        runs: list[list[_Wanted]] = []
        for of_file in files.values():
            of_file.sort(key=lambda wanted: wanted.start)
            count = threads_for(sum(wanted.length for wanted in of_file), len(of_file))
            runs += [of_file[number::count] for number in range(count)]

        def read(run: list[_Wanted]) -> list[tuple[ReadItem, Tensor]]:
            return _read_chunks(self._target / run[0].file, run, planner)

        try:
            results = in_threads(read, runs, sum(wanted.length for run in runs for wanted in run))
        except FileNotFoundError as error:
            if self._is_replaced():
                raise ReplacedError(error.errno, "it was replaced while it was read", str(self._target)) from error
            raise
        for done in results:
            for item, tensor in done:
                planner.commit_tensor(item, tensor)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _is_replaced(self) -> bool:
        now = read_metadata(self._target).storage_data.values()
        return {where.relative_path for where in now} != {where.relative_path for where in self.storage_data.values()}

    def _wanted(self, index: MetadataIndex, items: list[ReadItem]) -> "_Wanted":
        """Where a chunk is, if a file of this directory can have as many bytes as it says."""
        where, stored = self.storage_data[index], self._stored[index.fqn]
        if not _DATA_FILE.fullmatch(where.relative_path):
            raise ValueError(
                f"file {METADATA!r}: found the data file {shown(where.relative_path)}, wanted one that save has written"
            )
        sizes = next(chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset)
        wanted = _Wanted(where.relative_path, where.offset, where.length, sizes, stored.properties.dtype, index, items)
        if not wanted.nbytes <= where.length <= wanted.nbytes + AROUND_NUMBERS:
            raise ValueError(
                f"leaf {index.fqn!r}: found {where.length} bytes for {tuple(sizes)} numbers of {wanted.dtype}"
            )
        return wanted


class _Wanted(NamedTuple):
    """A chunk that is to be read, and what it is read for."""

    file: str
    start: int
    length: int
    sizes: Sequence[int]
    dtype: torch.dtype
    leaf: MetadataIndex
    items: list[ReadItem]

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


def _place_of(file: str, start: int, index: MetadataIndex) -> int:
    """The crc32 of where a chunk is: its seal follows from it too, so that no chunk is taken for another.

    The file's name has the save's.
    """
    return zlib.crc32(f"{file}:{start}:{index.fqn}:{[*(index.offset or ())]}".encode())


def _write_chunks(file: Path, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write chunks to a new file, one after another, each with its seal."""
    results: list[WriteResult] = []
    with naming(file), file.open("wb") as stream:
        for item in items:
            start, tensor = stream.tell(), planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "a tree has only tensors"
            crc = write_tensor(tensor, stream, _place_of(file.name, start, item.index))
            where = filesystem._StorageInfo(file.name, start, stream.tell() - start)
            stream.write(seal_of(b"", crc))
            results.append(WriteResult(item.index, where.length, where))
        fsync(stream)
    return results


def _read_chunks(file: Path, run: Sequence[_Wanted], planner: LoadPlanner) -> list[tuple[ReadItem, Tensor]]:
    """Read chunks of a file, each where it lies, check them, and copy what is wanted of them to where it is wanted."""
    done: list[tuple[ReadItem, Tensor]] = []
    with naming(file), open_regular(file) as stream:
        for wanted in run:
            what = f"leaf {wanted.leaf.fqn!r} in file {file.name!r}"
            stream.seek(wanted.start)
            content = bytearray(wanted.length)
            stream.readinto(content)
            place = _place_of(file.name, wanted.start, wanted.leaf)
            check_seal(content, stream.read(SEAL_BYTES), what, place)
            chunk = numbers_in(content, wanted.sizes, wanted.dtype, what)
            for item in wanted.items:
                box = tuple(
                    slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True)
                )
                tensor = planner.resolve_tensor(item).detach()
                tensor.copy_(chunk[box])
                done.append((item, tensor))
    return done


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a tree has only tensors"
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _moved(target: Path) -> set[str]:
    """What a save has moved into a directory that was empty, before it was cut: data files that no metadata names."""
    was_cut = any((stage / METADATA).exists() for stage in stages_within(target))
    if not was_cut or (target / METADATA).exists():
        return set()
    return {entry.name for entry in target.iterdir() if _DATA_FILE.fullmatch(entry.name)}


def _sweep(target: Path) -> None:
    """Remove what saves to `target` that were interrupted have left; the checkpoint itself stays as it is."""
    left = _moved(target)
    if (target / METADATA).exists():
        kept = {where.relative_path for where in read_metadata(target).storage_data.values()}
        left = {entry.name for entry in target.iterdir() if _DATA_FILE.fullmatch(entry.name)} - kept
    remove_left(target)
    for name in left:
        (target / name).unlink(missing_ok=True)
