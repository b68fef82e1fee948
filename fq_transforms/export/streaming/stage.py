"""The directory in which a folder is made: what is kept of it, for whom, and which of its pieces are on the disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Lock as ThreadLock

from fq_transforms.checkpoint.storage import (
    Lock,
    crc32_of,
    fsync,
    fsync_directory,
    naming,
    stage_beside,
    stages_beside,
    stages_within,
)
from fq_transforms.export.files.directory import CONFIG, MOVING, check_free, remove_staged
from fq_transforms.export.files.shards import ShardWriter, is_whole
from fq_transforms.export.streaming.job import Job
from fq_transforms.export.streaming.ranks import LostRankError
from fq_transforms.export.streaming.sources import MODELOPT
from fq_transforms.state import flatten

__all__ = ["DONE", "FAILED", "Marks", "Stage", "check_space", "fingerprint"]

# Bytes that are written before they are known to be on the disk, which a resumed run does not write again.
SYNC_BYTES = 2**30
# In a stage: a byte for each piece, 1 if it is on the disk; and a sign that a rank has failed.
DONE, FAILED = ".done", ".failed"


class Stage:
    """The directory in which a folder is made: new, or that of a run that was killed. Left if an error may be mended.

    Raises:
        ValueError: `path` is taken; to go on with there is only a part of another conversion, or elsewhere.
        OSError: Another save to `path` is going on; the disk has too little space.
    """

    def __init__(self, job: Job, path: Path, stage: Path, resume: bool) -> None:
        self._path, self._stage, self._resume = path, stage, resume
        with naming(path):
            self._lock = Lock(path)
            try:
                self._prepare(job)
            except BaseException:
                self._lock.release()
                raise

    def _prepare(self, job: Job) -> None:
        path, stage = self._path, self._stage
        check_free(path)
        (stage / FAILED).unlink(missing_ok=True)
        if self._resume and (stage / CONFIG).exists() and not {DONE, MOVING} & {one.name for one in stage.iterdir()}:
            _write_marks(stage, b"\1" * len(job.pieces))  # all was there but the name
        if self._resume and _has_marks(job, stage) and is_whole(stage, job.shards):
            check_space(job, path)
            return
        others = [one for one in _stages(path) if (one / DONE).exists() and one != stage]
        before = stage_beside(path, stage.name.rpartition("-")[2])
        if self._resume and before in others:
            raise ValueError(
                f"resume: found {str(before)!r}, a part of this conversion from before {str(path)!r} was a directory, "
                "wanted no directory there; remove it, as it is empty, to go on; or no resume, to begin anew"
            )
        if self._resume and others:
            raise ValueError(
                f"resume: found {str(others[0])!r}, a part of another conversion to {str(path)!r}: of another source, "
                "or with other options; wanted those, or no resume, to begin anew"
            )
        _remove(path)
        check_space(job, path)
        try:
            stage.mkdir()
            ShardWriter(stage, job.shards).sync()
            _write_marks(stage, bytes(len(job.pieces)))
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Interrupted, it is left for the next run; so is what an error leaves, if somebody wants to go on.
        is_error = kind is not None and issubclass(kind, Exception) and not issubclass(kind, LostRankError)
        try:
            if is_error and not self._resume:
                _remove(self._path)
        finally:
            self._lock.release()


def _remove(path: Path) -> None:
    """Remove what runs have left; first that which says that it can be gone on with."""
    for stage in _stages(path):
        (stage / DONE).unlink(missing_ok=True)
    remove_staged(path)


def _write_marks(stage: Path, marks: bytes) -> None:
    with (stage / f"{DONE}.new").open("wb") as stream:
        stream.write(marks)
        fsync(stream)
    (stage / f"{DONE}.new").rename(stage / DONE)
    fsync_directory(stage)


def _has_marks(job: Job, stage: Path) -> bool:
    return (stage / DONE).exists() and (stage / DONE).stat().st_size == len(job.pieces)


def _stages(path: Path) -> list[Path]:
    return [*stages_beside(path), *stages_within(path)]


def check_space(job: Job, path: Path) -> None:
    """Raise OSError unless the disk has the space, with that of stages, which are gone on with or removed."""
    others = sum((job.source.path / name).stat().st_size for name in job.source.others())
    held = sum(512 * file.stat().st_blocks for one in _stages(path) for file in one.rglob("*"))
    wanted = sum(shard.size for shard in job.shards) + others - held
    free = shutil.disk_usage(next(one for one in (path, *path.parents) if one.is_dir())).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC, f"found {free:,} free bytes on its disk, wanted {wanted:,}; nothing was written", str(path)
        )


def fingerprint(job: Job) -> str:
    """32 hex digits of all that the bytes depend on: of another source or another option they are others."""
    files = {place.file for place in job.source.files.places.values()}
    about_source = [name for name in (CONFIG, MODELOPT) if (job.source.path / name).exists()]
    stats = {name: (job.source.path / name).stat() for name in sorted({*files, *about_source, *job.source.others()})}
    about = [
        str(job.source.path),
        {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
        job.target.documents(job.plan),
        job.given.spec.to_json(),
        sorted(job.given.exact),
        repr(job.method),
        [(len(piece.sources), piece.first, piece.experts) for piece in job.pieces],
        {name: crc32_of(leaf) for name, leaf in flatten(job.given.state).items()},
    ]
    digest = hashlib.sha256(json.dumps(about).encode())
    for shard in job.shards:
        digest.update(shard.head)
    return digest.hexdigest()[:32]


class Marks:
    """Which pieces are on the disk: a byte each, written once the pieces are."""

    def __init__(self, path: Path, writer: ShardWriter) -> None:
        self._writer, self._lock, self._syncing = writer, ThreadLock(), ThreadLock()
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._held: list[int] = []
        self._bytes = 0
        self._is_lost = False

    def __enter__(self) -> "Marks":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync(self._held)
        finally:
            os.close(self._file)

    def add(self, number: int, size: int) -> None:
        """A piece is written, which is on the disk after the next sync."""
        with self._lock:
            self._held.append(number)
            self._bytes += size
            if self._bytes < SYNC_BYTES:
                return
            held, self._held, self._bytes = self._held, [], 0
        self._sync(held)  # for which the other threads need not wait

    def _sync(self, held: Sequence[int]) -> None:
        with self._syncing:  # one after another: what one has begun to sync is not there yet for the next
            try:
                self._writer.sync()
            except OSError:
                self._is_lost = True  # a system tells once what it could not write; no piece is known to be there then
                raise
            if self._is_lost:
                return
            for number in held:
                os.pwrite(self._file, b"\1", number)
            os.fdatasync(self._file)
