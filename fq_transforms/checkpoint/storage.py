"""Bytes on disk, for every kind of checkpoint: checksums, threads, and files and directories that appear whole or not.

What is written lies under a hidden staging name until one rename. What a crash leaves there is removed by the next save
to the same path: docs/checkpoints.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

__all__ = [
    "AROUND_NUMBERS",
    "SEAL_BYTES",
    "Lock",
    "check_seal",
    "crc32_of",
    "fsync",
    "fsync_directory",
    "in_threads",
    "is_taken",
    "local_path",
    "named",
    "naming",
    "numbers_in",
    "open_regular",
    "read_all",
    "refuse_uri",
    "remove_left",
    "replace_file",
    "seal_of",
    "some_files",
    "stage_beside",
    "stage_of",
    "stage_within",
    "stages_beside",
    "stages_within",
    "threads_for",
    "write_tensor",
]

A = TypeVar("A")
B = TypeVar("B")

_STAGE, _LOCK = ".saving-", ".saving"
# Bytes of a name that has room for what stages add to it, in the 255 of a file system.
_MOST_NAME = 255 - len("." + _STAGE) - 32
_STAGE_ID = re.compile(r"[0-9a-f]{32}")

# How many threads a rank hashes and moves bytes with, and how many bytes are worth another. Hashing and files release
# the interpreter, so four threads are nearly four times as fast as one; hosts have more than four cores per GPU.
THREADS, BYTES_PER_THREAD = 4, 2**26


def crc32_of(tensor: Tensor, crc: int = 0) -> int:
    """crc32 of a tensor's numbers; `crc` is that of what went before."""
    numbers: Any = tensor.detach().cpu().contiguous()
    # NumPy has no float8.
    return zlib.crc32((numbers.view(torch.uint8) if numbers.element_size() == 1 else numbers).numpy(), crc)


def seal_of(content: bytes | bytearray | memoryview, crc: int = 0) -> bytes:
    """What follows `content` in a file: its crc32, in 16 bytes; `crc` is that of what went before.

    Example:
        >>> seal_of(b"amax").decode().strip()
        'crc32=c0e9b4e1'
        >>> seal_of(b"ax", zlib.crc32(b"am")) == seal_of(b"amax")
        True
    """
    return b"\ncrc32=%08x\n" % zlib.crc32(content, crc)


SEAL_BYTES = len(seal_of(b""))


def check_seal(content: bytes | bytearray | memoryview, seal: bytes, what: str, crc: int = 0) -> None:
    """Raise ValueError, beginning with `what`, unless the seal is that of the content.

    Example:
        >>> check_seal(b"amax", seal_of(b"amin"), "file 'a'")
        Traceback (most recent call last):
        ...
        ValueError: file 'a': found bytes that are not those written (crc32): truncated, damaged or moved
    """
    if seal != seal_of(content, crc):
        raise ValueError(f"{what}: found bytes that are not those written (crc32): truncated, damaged or moved")


def write_tensor(tensor: Tensor, stream: BinaryIO, crc: int = 0) -> int:
    """Write a tensor as torch.save does, and return the crc32 of the bytes; `crc` is that of what went before.

    The older of torch.save's two layouts adds 0.3 KB to the numbers, the newer 1.6. float8 needs the newer: the older
    names a storage class of the dtype, and float8 has none.
    """
    numbers = tensor.detach().cpu().contiguous()
    if numbers.untyped_storage().nbytes() != numbers.nbytes:
        numbers = _alone(numbers)  # or all of the memory that it is a view of would be written
    is_float8 = numbers.is_floating_point() and numbers.element_size() == 1
    summed: Any = _Summed(stream, crc)
    torch.save(numbers, summed, _use_new_zipfile_serialization=is_float8)
    return summed.crc


# What torch.save adds to the numbers of a tensor, at most.
AROUND_NUMBERS = 2**12


def numbers_in(content: bytearray, shape: Sequence[int], dtype: torch.dtype, what: str) -> Tensor:
    """The numbers of a contiguous tensor that torch.save wrote: a view of the bytes, in which nothing else is read.

    torch.load would carry out the pickle in them, and inflate what is compressed.

    Args:
        content: What torch.save wrote, in either of its layouts.
        shape: Of the tensor.
        dtype: Of the tensor.
        what: What the message begins with.

    Raises:
        ValueError: There is no such tensor.

    Example:
        >>> stream = io.BytesIO()
        >>> _ = write_tensor(torch.tensor([1.0, 2.0]), stream)
        >>> numbers_in(bytearray(stream.getvalue()), (2,), torch.float32, "leaf 'amax'")
        tensor([1., 2.])
    """
    size = prod(shape) * dtype.itemsize
    try:
        is_zip = content.startswith(b"PK")
        start = _start_in_zip(content, size) if is_zip else _start_at_end(content, size, dtype.itemsize)
    except (LookupError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{what}: found {len(content)} bytes without {tuple(shape)} numbers of {dtype}: {error}"
        ) from error
    if not size:
        return torch.empty(torch.Size(shape), dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=prod(shape), offset=start).view(torch.Size(shape))


def _start_in_zip(content: bytearray, size: int) -> int:
    """Where the numbers are in the newer layout: an archive whose entries are stored as they are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("they are compressed")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its entries are more than it holds")
    (entry,) = (entry for entry in entries if entry.filename.endswith("/data/0"))
    at = entry.header_offset
    name, extra = (int.from_bytes(content[at + i : at + i + 2], "little") for i in (26, 28))
    start = at + 30 + name + extra
    if entry.file_size != size or start + size > len(content):
        raise ValueError(f"it has {entry.file_size} bytes of them")
    return start


def _start_at_end(content: bytearray, size: int, itemsize: int) -> int:
    """Where the numbers are in the older layout: at its end, behind how many they are."""
    start = len(content) - size
    if start < 8 or int.from_bytes(content[start - 8 : start], "little") * itemsize != size:
        raise ValueError("it has another number of them")
    return start


class _Summed:
    """A stream that takes the crc32 of what is written to it: no copy is made, and the bytes are read once."""

    def __init__(self, stream: BinaryIO, crc: int) -> None:
        self._stream, self.crc = stream, crc

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        return self._stream.write(content)

    def flush(self) -> None:
        """Nothing: whoever opened the stream flushes it, once."""


def _alone(tensor: Tensor) -> Tensor:
    """The same numbers, in the same memory, as a tensor whose storage is no larger than they are."""
    if not tensor.numel():
        return tensor.clone()
    return torch.frombuffer(tensor.view(-1).view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


def in_threads(call: Callable[[A], B], entries: Sequence[A], size: int) -> list[B]:
    """`[call(entry) for entry in entries]`, by as many threads as `size` bytes are worth; by none for a small state.

    Raises:
        Exception: What the first entry raised whose call failed.

    Example:
        >>> in_threads(abs, [-1, 2], 2**40)
        [1, 2]
    """
    count = threads_for(size, len(entries))
    if count <= 1:
        return [call(entry) for entry in entries]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, entries))


def threads_for(size: int, most: int) -> int:
    """How many threads `size` bytes are worth, at most `most`."""
    return min(THREADS, most, 1 + size // BYTES_PER_THREAD)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Absolute, links followed: what is renamed must lie beside the directory itself. Raises as `refuse_uri`."""
    refuse_uri(path)
    return Path(os.path.realpath(path))


def refuse_uri(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a URI: nothing here speaks to a store, and as a path it would lie in the current directory.

    Example:
        >>> refuse_uri("s3://bucket/step1")
        Traceback (most recent call last):
        ...
        ValueError: path 's3://bucket/step1': found a URI of 's3', wanted a path on a file system that is mounted here
    """
    text = os.fsdecode(path)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):  # pathlib leaves one slash of two
        raise ValueError(
            f"path {text!r}: found a URI of {match[1]!r}, wanted a path on a file system that is mounted here"
        )


@contextmanager
def open_regular(path: Path) -> Generator[BufferedReader, None, None]:
    """A file to read. Raises ValueError for a device, a pipe or a socket, which may have no end, or wait for one."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a directory is an error that says so
        raise ValueError(f"file {str(path)!r}: found a device, pipe or socket, wanted a file")
    with path.open("rb") as stream:
        yield stream


def read_all(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises ValueError if there are more than `most`, before memory is taken for them."""
    with open_regular(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise ValueError(f"file {str(path)!r}: found {size} bytes, wanted at most {most}")
        return stream.read(size)


class Lock:
    """What a save holds while it writes to a path, so that another one to the same path is refused.

    The system lets go of it when the process ends, however it ends: what is left of the file blocks nothing.

    Args:
        target: What is saved to.

    Raises:
        OSError: Another save to the same path is going on.
    """

    def __init__(self, target: Path) -> None:
        self._file: int | None = None
        while self._file is None:
            self._path = _lock_of(target)
            file = _opened_lock(self._path)
            try:
                self._take(file, target)
                # Or the one who had it has removed it, or has made the directory in which the next is.
                if _is_at(file, self._path) and self._path == _lock_of(target):
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)

    def _take(self, file: int, target: Path) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                errno.EBUSY, f"another save to it is going on, and holds {str(self._path)!r}", str(target)
            ) from None
        except OSError as error:
            warnings.warn(
                f"{str(target)!r}: found a file system without locks ({error.strerror}); take care that one save at a "
                "time goes to a path",
                stacklevel=4,
            )

    def release(self) -> None:
        """Let go, and remove the file."""
        if self._file is not None:
            try:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            finally:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _lock_of(target: Path) -> Path:
    # Of a directory that is there nothing is known but that it can be written to: it may be a mount point.
    return target / _LOCK if target.is_dir() else target.parent / f"{_hidden(target)}{_LOCK}"


def _hidden(target: Path) -> str:
    """What names beside a target begin with: its own, or a digest of one that is too long to have more behind it."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= _MOST_NAME else hashlib.sha256(name).hexdigest()[:32]}"


def _opened_lock(path: Path) -> int:
    """To read, where another user has left it, whose it stays: a lock needs no more."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def stage_beside(target: Path, save: str) -> Path:
    """Where to write what will be renamed to `target`; `save` is the hex of a UUID.

    Example:
        >>> stage_beside(Path("folder/amax"), "0" * 32).name
        '.amax.saving-00000000000000000000000000000000'
    """
    return target.parent / f"{_hidden(target)}{_STAGE}{save}"


def stage_within(target: Path, save: str) -> Path:
    """Where to write what will be moved up into `target`, which exists."""
    return target / f"{_STAGE}{save}"


def stage_of(target: Path, save: str) -> Path:
    """Where to write what will be renamed to `target`, or, where it is a directory already, be moved up into it."""
    return stage_within(target, save) if target.is_dir() else stage_beside(target, save)


def remove_left(target: Path) -> None:
    """Remove what interrupted saves to `target` have left under staging names. Only who holds its `Lock` may."""
    for folder, prefix in ((target.parent, f"{_hidden(target)}{_STAGE}"), (target, _STAGE)):
        for entry in list(folder.iterdir()) if folder.is_dir() else ():
            if _is_stage(entry.name, prefix):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
    if target.is_dir():  # whose lock lies within; this one was there before it
        (target.parent / f"{_hidden(target)}{_LOCK}").unlink(missing_ok=True)


def _is_stage(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and _STAGE_ID.fullmatch(name[len(prefix) :]) is not None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, in place of one of the same name."""
    stage = stage_beside(path, uuid4().hex)
    try:
        with Lock(path):
            try:
                remove_left(path)
                with stage.open("xb") as stream:
                    stream.write(content)
                    fsync(stream)
                stage.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    stage.unlink()
                raise
    except OSError as error:
        raise named(error, path, f"file {str(path)!r}: {error.strerror}") from error


def is_taken(path: Path, but: Collection[str] = ()) -> bool:
    """True unless a directory can be made there: there is nothing, or one without entries but what saves have left.

    Args:
        path: What is to be made.
        but: Names of further entries that do not count.
    """
    if not path.is_dir():
        return path.exists()
    known = {_LOCK, *but, *(stage.name for stage in stages_within(path))}
    return any(entry.name not in known for entry in path.iterdir())


def stages_within(target: Path) -> list[Path]:
    """Where saves to a directory that is there have begun, and not ended."""
    entries = target.iterdir() if target.is_dir() else ()
    return [entry for entry in entries if _is_stage(entry.name, _STAGE)]


def stages_beside(target: Path) -> list[Path]:
    """Where saves to a directory that is not there have begun, and not ended."""
    entries, prefix = target.parent.iterdir() if target.parent.is_dir() else (), f"{_hidden(target)}{_STAGE}"
    return [entry for entry in entries if _is_stage(entry.name, prefix) and entry.is_dir()]


def some_files(path: Path) -> str:
    """What lies in a directory, for a message."""
    names = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
    return f"{len(names)} entries such as {names[:3]}" if names else "no entries"


def fsync(stream: Any) -> None:
    """Let what was written to a file reach the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def fsync_directory(path: Path) -> None:
    """Let renames in a directory reach the disk in order, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def named(error: OSError, path: Path, message: str = "") -> OSError:
    """The same error, with the path that it is about."""
    return OSError(error.errno, message or error.strerror or str(error), error.filename or str(path))


@contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """Let each OSError inside say which path it is about: one of `write` does not."""
    try:
        yield
    except OSError as error:
        raise named(error, path) from error
