"""Bytes on disk, for every kind of checkpoint: checksums, threads, and files and directories that appear whole or not.

What is written lies under a hidden staging name until one rename. What a crash leaves there is removed by the next save
to the same path: docs/checkpoints.
"""

import contextlib
import io
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

__all__ = [
    "SEAL_BYTES",
    "check_seal",
    "crc32_of",
    "fsync",
    "fsync_directory",
    "in_threads",
    "is_taken",
    "named",
    "naming",
    "read_tensor",
    "remove_left",
    "replace_file",
    "seal_of",
    "some_files",
    "stage_beside",
    "stage_within",
    "threads_for",
    "write_tensor",
]

A = TypeVar("A")
B = TypeVar("B")

_STAGE = "saving-"
_STAGE_ID = re.compile(r"[0-9a-f]{32}")

# How many threads a rank hashes and moves bytes with, and how many bytes are worth another. Hashing and files release
# the interpreter, so four threads are nearly four times as fast as one; hosts have more than four cores per GPU.
THREADS, BYTES_PER_THREAD = 4, 2**26


def crc32_of(tensor: Tensor, crc: int = 0) -> int:
    """crc32 of a tensor's numbers; `crc` is that of what went before."""
    numbers: Any = tensor.detach().cpu().contiguous()
    # NumPy has no float8.
    return zlib.crc32((numbers.view(torch.uint8) if numbers.element_size() == 1 else numbers).numpy(), crc)


def seal_of(content: bytes | memoryview, crc: int = 0) -> bytes:
    """What follows `content` in a file: its crc32, in 16 bytes; `crc` is that of what went before.

    Example:
        >>> seal_of(b"amax").decode().strip()
        'crc32=c0e9b4e1'
        >>> seal_of(b"ax", zlib.crc32(b"am")) == seal_of(b"amax")
        True
    """
    return b"\ncrc32=%08x\n" % zlib.crc32(content, crc)


SEAL_BYTES = len(seal_of(b""))


def check_seal(content: bytes | memoryview, seal: bytes, what: str) -> None:
    """Raise ValueError, beginning with `what`, unless the seal is that of the content.

    Example:
        >>> check_seal(b"amax", seal_of(b"amin"), "file 'a'")
        Traceback (most recent call last):
        ...
        ValueError: file 'a': found bytes that are not those written (crc32): truncated, damaged, or not of a state
    """
    if seal != seal_of(content):
        raise ValueError(
            f"{what}: found bytes that are not those written (crc32): truncated, damaged, or not of a state"
        )


def write_tensor(tensor: Tensor, stream: BinaryIO) -> int:
    """Write a tensor as torch.save does, and return the crc32 of the bytes.

    The older of torch.save's two layouts adds 0.3 KB to the numbers, the newer 1.6. float8 needs the newer: the older
    names a storage class of the dtype, and float8 has none.
    """
    numbers = tensor.detach().cpu().contiguous()
    if numbers.untyped_storage().nbytes() != numbers.nbytes:
        numbers = _alone(numbers)  # or all of the memory that it is a view of would be written
    is_float8 = numbers.is_floating_point() and numbers.element_size() == 1
    summed: Any = _Summed(stream)
    torch.save(numbers, summed, _use_new_zipfile_serialization=is_float8)
    return summed.crc


def read_tensor(content: bytes, what: str) -> Tensor:
    """The tensor that `write_tensor` wrote. Raises ValueError, beginning with `what`, if there is none."""
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can fail in any way
        raise ValueError(f"{what}: found no tensor: {error}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what}: found {type(tensor).__name__}, wanted a tensor")
    return tensor


class _Summed:
    """A stream that takes the crc32 of what is written to it: no copy is made, and the bytes are read once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.crc = stream, 0

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


def stage_beside(target: Path, save: str) -> Path:
    """Where to write what will be renamed to `target`; `save` is the hex of a UUID.

    Example:
        >>> stage_beside(Path("folder/amax"), "0" * 32).name
        '.amax.saving-00000000000000000000000000000000'
    """
    return target.parent / f".{target.name}.{_STAGE}{save}"


def stage_within(target: Path, save: str) -> Path:
    """Where to write what will be moved up into `target`, which exists."""
    return target / f".{_STAGE}{save}"


def remove_left(target: Path) -> None:
    """Remove what interrupted saves to `target` have left under staging names."""
    for folder, prefix in ((target.parent, f".{target.name}.{_STAGE}"), (target, f".{_STAGE}")):
        for entry in list(folder.iterdir()) if folder.is_dir() else ():
            if entry.name.startswith(prefix) and _STAGE_ID.fullmatch(entry.name[len(prefix) :]):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, in place of one of the same name."""
    stage = stage_beside(path, uuid4().hex)
    try:
        remove_left(path)
        with stage.open("xb") as stream:
            stream.write(content)
            fsync(stream)
        stage.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            stage.unlink()
        if isinstance(error, OSError):
            raise named(error, path, f"file {str(path)!r}: {error.strerror}") from error
        raise


def is_taken(path: Path) -> bool:
    """True unless a directory can be renamed to `path`: there is nothing, or only an empty directory."""
    if not path.is_dir():
        return path.exists()
    return any(path.iterdir())


def some_files(path: Path) -> str:
    """What lies in a directory, for a message."""
    names = sorted(entry.name for entry in path.iterdir())
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
