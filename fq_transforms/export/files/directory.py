"""A folder in the layout of transformers: safetensors in shards, their index, and the JSON files beside them.

It is written into a staging directory beside the target, whose renaming is the commit.
"""

import json
import re
import shutil
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from fq_transforms.checkpoint.storage import (
    fsync,
    fsync_directory,
    is_taken,
    read_all,
    remove_left,
    some_files,
    stages_within,
)
from fq_transforms.parse import MOST_TEXT, parse_json, shown

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "bytes_bar",
    "bytes_of",
    "check_free",
    "commit",
    "making_parents",
    "progress",
    "read_document",
    "remove_staged",
    "write_json",
]

T = TypeVar("T")

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
# In a stage: the names of what is moved up from it. Nothing else there is hidden then.
MOVING = ".moving.json"
_OURS = re.compile(r"[^./\0][^/\0]*")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: int | str, what: str = "max_shard_size") -> int:
    """A size such as 5_000_000 or "5MB", in bytes; `what` it is called in the message.

    Raises:
        ValueError: It is no size, or not positive.

    Example:
        >>> bytes_of("5GB"), bytes_of("2 MiB")
        (5000000000, 2097152)
    """
    text = str(size) if type(size) in (int, str) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", text.strip().upper())
    number = float(match[1]) * _UNITS[match[2] or ""] if match and (match[2] or "") in _UNITS else 0.0
    if not 0.5 < number < inf:
        raise ValueError(f'{what}: found {size!r}, wanted a number of bytes, or a text such as "5GB"')
    return round(number)


def check_free(folder: Path) -> None:
    """Raise ValueError unless the directory can be made: there is nothing, or an empty directory."""
    if is_taken(folder, but=_moved(folder)):
        found = f"a directory with {some_files(folder)}" if folder.is_dir() else "a file"
        raise ValueError(f"folder {str(folder)!r}: found {found}, wanted a new name or an empty directory")


@contextmanager
def making_parents(folder: Path) -> Generator[None, None, None]:
    """Make the directories above; after an error those that were made go again, if nothing is in them."""
    made = [one for one in folder.parents if not one.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in made:
            with suppress(OSError):
                one.rmdir()
        raise


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The same items, with a bar on standard error that counts them; in a log it is written once a minute.

    Raises:
        ImportError: tqdm is not installed.
    """
    return _tqdm()(items, desc=what, mininterval=_interval())


def bytes_bar(total: int, what: str, position: int = 0) -> Any:
    """A bar of bytes on standard error, with what it has of them per second; likewise.

    Raises:
        ImportError: tqdm is not installed.
    """
    return _tqdm()(total=total, desc=what, unit="B", unit_scale=True, mininterval=_interval(), position=position)


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("export needs tqdm: pip install 'fq_transforms[export]'") from error
    return tqdm


def _interval() -> float:
    """Seconds between two states of a bar. A notebook's standard error is no terminal either."""
    return 0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 60.0


def commit(stage: Path, folder: Path) -> None:
    """Let a staged folder appear: by its renaming, or file by file in a directory that was there, config.json last.

    What is hidden in the stage, which is about its writing, is removed.
    """
    for file in stage.glob(".*"):
        file.unlink()
    fsync_directory(stage)
    if stage.parent == folder:
        files = sorted(stage.iterdir(), key=lambda file: file.name == CONFIG)
        write_json(stage / f"{MOVING}.new", [file.name for file in files])
        (stage / f"{MOVING}.new").rename(stage / MOVING)
        for file in files:
            file.rename(folder / file.name)
        fsync_directory(folder)
        shutil.rmtree(stage, ignore_errors=True)  # it is written; what stays is removed by the next
    else:
        stage.rename(folder)
        fsync_directory(folder.parent)


def _moved(folder: Path) -> set[str]:
    """What a write has moved into a directory that was empty, before it was cut: it is no folder of a model yet.

    What still lies in the stage was not moved, and a file of its name is somebody else's.
    """
    names: set[str] = set()
    for stage in stages_within(folder):
        if (stage / MOVING).exists() and (stage / CONFIG).exists():
            moving: Any = parse_json(read_all(stage / MOVING, MOST_TEXT).decode())
            ours = [name for name in moving if isinstance(name, str) and _OURS.fullmatch(name)]
            names |= {name for name in ours if not (stage / name).exists()}
    return names


def remove_staged(folder: Path) -> None:
    """Remove what interrupted writes have left of a folder that has not appeared. Only who holds its `Lock` may."""
    for name in _moved(folder):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    remove_left(folder)


def read_document(file: Path) -> dict[str, Any]:
    """What a JSON file holds, which is an object. Raises ValueError, which names the file, for anything else."""
    try:
        document = parse_json(read_all(file, MOST_TEXT).decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"file {str(file)!r}: found what is no JSON, {error}, wanted an object") from error
    except ValueError as error:
        raise ValueError(f"file {str(file)!r}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"file {str(file)!r}: found {shown(document)}, wanted an object")
    return document


def write_json(file: Path, document: Any) -> None:
    """Write a JSON file, which reaches the disk."""
    with file.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=2)
        stream.write("\n")
        fsync(stream)
