"""The directories that torch.distributed.checkpoint (DCP) writes, with a checksum on each part, and atomically.

    .metadata                   what is stored and in which file; written last, and by one rank
    {save}_{rank}.distcp        the chunks of leaves that one rank has written, one after another
    {save}_{rank}_{n}.distcp    more of them, where they are many bytes: one file per thread

Each chunk, and `.metadata`, is followed by the crc32 of its bytes. Any reader of DCP can read it: docs/checkpoints.
"""

import contextlib
import errno
import io
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fq_transforms.checkpoint.storage import (
    SEAL_BYTES,
    check_seal,
    fsync,
    fsync_directory,
    in_threads,
    is_taken,
    named,
    naming,
    read_tensor,
    remove_left,
    seal_of,
    some_files,
    stage_beside,
    stage_within,
    threads_for,
    write_tensor,
)

__all__ = ["Reader", "Writer", "read_metadata"]

filesystem: Any = import_module("torch.distributed.checkpoint.filesystem")  # where a chunk lies has no public name

METADATA = ".metadata"
_DATA_FILE = re.compile(r"[0-9a-f]{32}_\d+(_\d+)?\.distcp")

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
    check_seal(content[:-SEAL_BYTES], content[-SEAL_BYTES:], f"file {METADATA!r}")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content[:-SEAL_BYTES])).load()
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
        """Decide which file each rank writes; what an interrupted save has left is removed first."""
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
    """Reads what `Writer` has written, and checks each chunk."""

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
        """Read the chunks that this rank needs, each once; files from front to back, large ones by several threads."""
        chunks: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            chunks.setdefault(item.storage_index, []).append(item)
        files: dict[str, list[tuple[Any, list[ReadItem]]]] = {}
        for index, items in chunks.items():
            where = self.storage_data[index]
            files.setdefault(where.relative_path, []).append((where, items))
        runs: list[tuple[str, list[tuple[Any, list[ReadItem]]]]] = []
        for name, wanted in files.items():
            if Path(name).name != name:
                raise ValueError(f"file {METADATA!r}: found the data file {name!r}, wanted one in the directory")
            count = threads_for(sum(where.length for where, _ in wanted), len(wanted))
            wanted.sort(key=lambda entry: entry[0].offset)
            runs += [(name, wanted[number::count]) for number in range(count)]

        def read(run: tuple[str, list[tuple[Any, list[ReadItem]]]]) -> list[tuple[ReadItem, Tensor]]:
            return _read_chunks(self._target / run[0], run[1], planner)

        for done in in_threads(read, runs, sum(where.length for _, wanted in runs for where, _ in wanted)):
            for item, tensor in done:
                planner.commit_tensor(item, tensor)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _write_chunks(file: Path, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write chunks to a new file, one after another, each with its seal."""
    results: list[WriteResult] = []
    with naming(file), file.open("wb") as stream:
        for item in items:
            start, tensor = stream.tell(), planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "a tree has only tensors"
            crc = write_tensor(tensor, stream)
            where = filesystem._StorageInfo(file.name, start, stream.tell() - start)
            stream.write(seal_of(b"", crc))
            results.append(WriteResult(item.index, where.length, where))
        fsync(stream)
    return results


def _read_chunks(
    file: Path, wanted: Sequence[tuple[Any, Sequence[ReadItem]]], planner: LoadPlanner
) -> list[tuple[ReadItem, Tensor]]:
    """Read chunks of a file, each where it lies, check them, and copy what is wanted of them to where it is wanted."""
    done: list[tuple[ReadItem, Tensor]] = []
    with naming(file), file.open("rb") as stream:
        for where, items in wanted:
            what = f"leaf {items[0].storage_index.fqn!r} in file {file.name!r}"
            stream.seek(where.offset)
            content = stream.read(where.length)
            check_seal(content, stream.read(SEAL_BYTES), what)
            chunk = read_tensor(content, what)
            for item in items:
                box = tuple(
                    slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True)
                )
                tensor = planner.resolve_tensor(item).detach()
                if chunk.dtype != tensor.dtype or chunk[box].shape != tensor.shape:
                    raise ValueError(f"{what}: found {tuple(chunk.shape)} {chunk.dtype}, not what is wanted")
                tensor.copy_(chunk[box])
                done.append((item, tensor))
    return done


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a tree has only tensors"
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _sweep(target: Path) -> None:
    """Remove what saves to `target` that were interrupted have left; the checkpoint itself stays as it is."""
    remove_left(target)
    if (target / METADATA).exists():
        kept = {where.relative_path for where in read_metadata(target).storage_data.values()}
        for entry in list(target.iterdir()):
            if _DATA_FILE.fullmatch(entry.name) and entry.name not in kept:
                entry.unlink()
