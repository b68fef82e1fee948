"""Reading ahead: the system is asked for the bytes that a conversion will need, and the disk is busy from the start."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Condition, Thread
from typing import NamedTuple

__all__ = ["Ahead", "Span"]

# Bytes that may lie in the page cache before they are used, and at most 1 in so many of those available.
MOST_BYTES, SHARE = 12 * 2**30, 4
# Bytes that are asked for at a time, and how many of them may wait for the disk: other reads, such as those of
# libraries, queue behind them.
STEP_BYTES, QUEUED_BYTES = 2**23, 2**26


class Span(NamedTuple):
    """Bytes of a file: its path, the first of them, how many."""

    file: Path
    start: int
    size: int


class _Step(NamedTuple):
    """Bytes that were asked for: an open file, the last of them, how many."""

    file: int
    last: int
    size: int


class Ahead(AbstractContextManager["Ahead"]):
    """A thread that lets the system read pieces into the page cache, in their order, before they are used.

    No byte is asked for twice, and none of a piece that has been used. Errors are left to who reads.

    Args:
        pieces: The number of each, and its bytes; taken as they are needed.
        window: Bytes that are asked for and not used, at most; None for a share of the memory that is free.
    """

    def __init__(self, pieces: Iterable[tuple[int, Iterable[Span]]], window: int | None = None) -> None:
        self._pieces, self._window, self._most = pieces, window, 0
        self._asked: dict[int, int] = {}  # of pieces that are not used yet: bytes
        self._used: set[int] = set()
        self._is_over, self._changed = False, Condition()
        self._thread: Thread | None = None

    def start(self, used: Iterable[int] = ()) -> None:
        """Begin, unless it has begun, without the pieces that have been used; where the system can read ahead."""
        if self._thread is None and hasattr(os, "posix_fadvise"):
            self._used.update(used)
            self._most = _window() if self._window is None else self._window
            self._thread = Thread(target=self._ask, name="ahead", daemon=True)
            self._thread.start()

    def used(self, number: int) -> None:
        """A piece is not needed any more."""
        with self._changed:
            self._used.add(number)
            self._asked.pop(number, None)
            self._changed.notify_all()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _ask(self) -> None:
        queued: deque[_Step] = deque()
        try:
            for number, (path, start, size) in self._steps():
                if not self._may_ask(number, size):
                    continue
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                queued.append(_Step(file, start + size - 1, size))
                os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
                while sum(step.size for step in queued) > QUEUED_BYTES:
                    os.pread(queued[0].file, 1, queued[0].last)  # which returns once it is there
                    os.close(queued.popleft().file)
        except OSError:
            pass  # is met again by who reads
        finally:
            for step in queued:
                os.close(step.file)

    def _steps(self) -> Iterator[tuple[int, Span]]:
        """The pieces, each in the order of its files, cut; without what several share and another one has had."""
        had: set[Span] = set()
        for number, spans in self._pieces:
            if self._is_over:
                return
            own = sorted({*spans} - had)
            had.update(own)
            for file, start, size in own:
                for at in range(start, start + size, STEP_BYTES):
                    yield number, Span(file, at, min(STEP_BYTES, start + size - at))

    def _may_ask(self, number: int, size: int) -> bool:
        """True once there is room for bytes of a piece; False if nobody needs them."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or number in self._used or sum(self._asked.values()) + size <= self._most
            )
            if self._is_over or number in self._used:
                return False
            self._asked[number] = self._asked.get(number, 0) + size
            return True


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
