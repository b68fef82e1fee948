"""Directories that appear whole or not at all: what is written lies in a staging directory until one rename.

What a crash leaves is a hidden directory beside the target, or within it, which the next save to the path removes.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

__all__ = ["is_taken", "remove_left", "some_files", "stage_beside", "stage_within", "sync", "sync_directory"]

_STAGE = "saving-"
_STAGE_ID = re.compile(r"[0-9a-f]{32}")


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
    """Remove the staging directories of saves to `target` that were interrupted."""
    for folder, prefix in ((target.parent, f".{target.name}.{_STAGE}"), (target, f".{_STAGE}")):
        for entry in list(folder.iterdir()) if folder.is_dir() else ():
            if entry.name.startswith(prefix) and _STAGE_ID.fullmatch(entry.name[len(prefix) :]):
                shutil.rmtree(entry, ignore_errors=True)


def is_taken(path: Path) -> bool:
    """True unless a directory can be renamed to `path`: there is nothing, or only an empty directory."""
    if not path.is_dir():
        return path.exists()
    return any(path.iterdir())


def some_files(path: Path) -> str:
    """What lies in a directory, for a message."""
    names = sorted(entry.name for entry in path.iterdir())
    return f"{len(names)} entries such as {names[:3]}" if names else "no entries"


def sync(stream: Any) -> None:
    """Let what was written to a file reach the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Let renames in a directory reach the disk in order, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
