"""What will be read, asked of the disk before: it is busy while a GPU starts, kernels compile and writes wait."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import groupby
from pathlib import Path
from threading import Condition, Thread
from typing import NamedTuple

__all__ = ["Ahead", "Span"]

# Bytes that may lie in the page cache before they are used, and at most 1 in so many of those available.
MOST_BYTES, SHARE = 12 * 2**30, 4
# Bytes that are asked for at a time, and before the first must be there: reads of others, such as those of libraries,
# queue behind them. One disk gave as much with 64 MiB as to eight threads that read.
STEP_BYTES, QUEUED_BYTES = 2**23, 2**26


class Span(NamedTuple):
    """Bytes of a file: its path, the first of them, how many."""

    file: Path
    start: int
    size: int


class Ahead(AbstractContextManager["Ahead"]):
    """A thread that lets the system read pieces into the page cache, in their order, before they are used.

    No byte is asked for twice, and none of a piece that has been used. Errors are left to who reads.

    Args:
        pieces: The number of each, and its bytes; taken as they are needed.
        window: Bytes that are asked for and not used, at most. None: of what memory has.
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
        with suppress(OSError):
            for path, steps in groupby(self._steps(), lambda step: step[1].file):
                with path.open("rb", buffering=0) as stream:
                    waits: deque[tuple[int, int]] = deque()  # last byte of each step, and its size
                    for number, (_, start, size) in steps:
                        if self._may_ask(number, size):
                            os.posix_fadvise(stream.fileno(), start, size, os.POSIX_FADV_WILLNEED)
                            waits.append((start + size - 1, size))
                        while sum(size for _, size in waits) > QUEUED_BYTES:
                            os.pread(stream.fileno(), 1, waits.popleft()[0])  # which returns once it is there

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
    """Bytes that the page cache can hold for one of the processes here, as the system and its control group say."""
    words = Path("/proc/meminfo").read_text().split()
    free = [1024 * int(words[words.index("MemAvailable:") + 1])]
    with suppress(OSError, ValueError):  # there is no group, or no limit, which is "max"
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(MOST_BYTES, min(free) // SHARE) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
