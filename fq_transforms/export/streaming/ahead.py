"""Reading ahead: bytes that a conversion will need are brought into the page cache, and the disk is never idle."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import NamedTuple

__all__ = ["Ahead", "Span"]

# Bytes that may lie in the page cache before they are used, and at most 1 in so many of those available.
MOST_BYTES, SHARE = 12 * 2**30, 4
# Threads, and bytes that each asks for at a time: fewer stand still where another thread keeps Python to itself.
THREADS, STEP_BYTES = 2, 2**25


class Span(NamedTuple):
    """Bytes of a file: its path, the first of them, how many."""

    file: Path
    start: int
    size: int


class Ahead(AbstractContextManager["Ahead"]):
    """Threads that read pieces, in their order, before they are used.

    No byte is read twice, and none of a piece that has been used. Errors are left to who reads what is wanted.

    Args:
        pieces: The number of each, and its bytes; taken as they are needed.
        window: Bytes that are read and not used, at most; None for a share of the memory that is free.
    """

    def __init__(self, pieces: Iterable[tuple[int, Iterable[Span]]], window: int | None = None) -> None:
        self._steps, self._drawing = self._cut(pieces), Lock()
        self._window, self._most = window, 0
        self._unused: dict[int, int] = {}  # bytes that were read, by piece
        self._used: set[int] = set()
        self._is_over, self._changed = False, Condition()
        self._threads: list[Thread] = []

    def start(self, used: Iterable[int] = ()) -> None:
        """Begin, unless it has begun, without the pieces that have been used."""
        if not self._threads:
            self._used.update(used)
            self._most = _window() if self._window is None else self._window
            self._threads = [Thread(target=self._run, name="ahead", daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()

    def used(self, number: int) -> None:
        """A piece is not needed any more."""
        with self._changed:
            self._used.add(number)
            self._unused.pop(number, None)
            self._changed.notify_all()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with suppress(OSError), open(os.devnull, "wb", buffering=0) as nowhere:
            while (span := self._next()) is not None:
                _read(span, nowhere.fileno())

    def _next(self) -> Span | None:
        """What is read next, once there is room for it; None at the end. One thread at a time, so that order holds."""
        with self._drawing:
            return next((span for number, span in self._steps if self._may_read(number, span.size)), None)

    def _cut(self, pieces: Iterable[tuple[int, Iterable[Span]]]) -> Iterator[tuple[int, Span]]:
        """The pieces, each in the order of its files, cut; without what several share and another one has had."""
        had: set[Span] = set()
        for number, spans in pieces:
            if self._is_over:
                return
            own = sorted({*spans} - had)
            had.update(own)
            for file, start, size in own:
                for at in range(start, start + size, STEP_BYTES):
                    yield number, Span(file, at, min(STEP_BYTES, start + size - at))

    def _may_read(self, number: int, size: int) -> bool:
        """True once there is room for bytes of a piece; False if nobody needs them."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or number in self._used or sum(self._unused.values()) + size <= self._most
            )
            if self._is_over or number in self._used:
                return False
            self._unused[number] = self._unused.get(number, 0) + size
            return True


def _read(span: Span, nowhere: int) -> None:
    """Bring bytes into the page cache, where they stay: none is copied.

    To advise the system by `posix_fadvise` is not enough: it takes no more than `read_ahead_kb` of what it is told,
    which is 128 KiB on many.
    """
    with span.file.open("rb", buffering=0) as stream:
        at, end = span.start, span.start + span.size
        while at < end and (count := os.sendfile(nowhere, stream.fileno(), at, end - at)):
            at += count


def _window() -> int:
    """Bytes that the page cache has for one of the processes here, as the system and a container say; 0 if neither."""
    try:
        words = Path("/proc/meminfo").read_text().split()
        free = 1024 * int(words[words.index("MemAvailable:") + 1])
    except (OSError, ValueError):
        return 0
    with suppress(OSError, ValueError):  # there is no limit, or it is called "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(MOST_BYTES, free // SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
