"""Times of the device, by graph replay, of the host, by calls in a row that nobody waits for, and of both, in turns."""

import gc
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from math import floor, nan
from statistics import median
from typing import NamedTuple

import torch

CALLS_PER_GRAPH = 5
REPLAYS = 15
WARM_UP_S = 0.02  # of replays that are not timed: after a pause the first ones are slower
HOST_CALLS, HOST_ROUNDS = 20, 7
EAGER_CALLS = 30
TURNS, CALLS_PER_TURN = 7, 3
PROBES, CALLS_PER_PROBE = 3, 4
HEAD_START = 10**8  # cycles that a GPU waits before it begins: 0.05 s


def device_us(call: Callable[[], object]) -> float:
    """Median device time of one call, in microseconds: graphs of several calls, so that launch gaps do not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS_PER_GRAPH):
            call()
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS_PER_GRAPH)
    return median(times)


def floor_us(call: Callable[[], object]) -> float:
    """Device time of a floor: the faster of graph replay and calls in a row.

    A captured `copy_` may become a memory copy node, which above a gigabyte was slower than PyTorch's own copy (H200).
    """
    for _ in range(2):
        call()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS_PER_GRAPH):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS_PER_GRAPH)
    return min(median(times), device_us(call))


@contextmanager
def quiet_core(*, whole: bool = False) -> Generator[None]:
    """Run this thread on the core that is fastest now, so that other work of the host is not timed.

    A core whose sibling works for somebody else is 1.7 times slower, and which ones are changes within seconds (H200
    hosts). With `whole` all threads of the process go there, autograd's too, which works while this one waits. Where
    a thread cannot choose its core, on macOS or Windows, this does nothing.
    """
    if sys.platform != "linux":
        yield
        return
    threads = list(map(int, os.listdir("/proc/self/task"))) if whole else [0]
    allowed = {thread: os.sched_getaffinity(thread) for thread in threads}
    here = os.sched_getaffinity(0)
    try:
        core = min(sorted(here), key=_probe)
        _keep_to({thread: {core} for thread in [*threads, 0]})
        yield
    finally:
        _keep_to({0: here, **allowed})


def _keep_to(cores: Mapping[int, set[int]]) -> None:
    """Let each thread run on its cores only; 0 is this one."""
    for thread, some in cores.items():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, some)


def _probe(core: int) -> float:
    """Seconds that a core takes for a part of what a call to `fakequant` does: making views."""
    os.sched_setaffinity(0, {core})
    stacked = torch.empty((8, 1, 1))
    times: list[float] = []
    for _ in range(PROBES):
        start = time.perf_counter()
        for _ in range(CALLS_PER_PROBE):
            stacked.unbind()
        times.append(time.perf_counter() - start)
    return median(times)


def eager_us(call: Callable[[], object]) -> float:
    """Median whole time of one call, waited for, in microseconds: for calls that cannot be captured."""
    with quiet_core():
        call()
        return median(_waited_us(call) for _ in range(EAGER_CALLS))


def eager_in_turn_us(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The same for several calls, a few of each in turn, so that what disturbs the host meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        with quiet_core():
            for name, call in calls.items():
                call()
                times[name] += [_waited_us(call) for _ in range(CALLS_PER_TURN)]
    return {name: median(found) for name, found in times.items()}


def _waited_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


class Turn(NamedTuple):
    """A call that is timed, and what is done just before it, each time, and is not."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None


def turn_us(turn: Turn) -> float:
    """Whole time of one call, waited for, in microseconds."""
    turn.before()
    return _waited_us(turn.call)


class Queue:
    """Times the device alone: all launches of a part of the work are there before it begins.

    It is what counts where the host is ahead of the device; graphs cannot hold every call. A queue takes about a
    thousand launches, so longer work is cut into parts, by calls of `cut` in between.
    """

    def __init__(self) -> None:
        self.us = 0.0

    def __enter__(self) -> "Queue":
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._end()

    def cut(self) -> None:
        """End a part, and begin another."""
        self._end()
        self._begin()

    def _begin(self) -> None:
        self._start, self._stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] (no public one)
        self._start.record()

    def _end(self) -> None:
        self._stop.record()
        if self._start.query():
            raise SystemExit("Queue: found a device that began before all was launched, wanted parts of fewer launches")
        self._stop.synchronize()
        self.us += self._start.elapsed_time(self._stop) * 1e3


def in_turns(
    base: Turn,
    turns: Mapping[str, Turn],
    rounds: int,
    timed: Callable[[Turn], float] = turn_us,
    *,
    on_quiet_core: bool = True,
) -> tuple[dict[str, list[float]], list[float]]:
    """Each one's time over the mean of `base` just before and after it, once a round; and all times of `base`.

    Hosts and GPUs change their speed within seconds, which meets both alike. Each round begins with another, as the
    first follows a pause, in which a core is chosen; not `on_quiet_core`, where other ranks of the host would choose
    the same one.
    """
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    order = deque(turns.items())
    times: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            with quiet_core(whole=True) if on_quiet_core else nullcontext():
                times.append(timed(base))
                for name, turn in order:
                    took, before = timed(turn), times[-1]
                    times.append(timed(base))
                    ratios[name].append(2 * took / (before + times[-1]))
            order.rotate(-1)
    finally:
        gc.enable()
    return ratios, times


def against_itself(times: list[float], rounds: int) -> list[float]:
    """Of each round of `in_turns` the median of the times of `base`, each over the mean of those before and after it.

    Example:
        >>> against_itself([1.0, 2.0, 1.0, 8.0, 8.0, 8.0], 2)
        [2.0, 1.0]
    """
    size = len(times) // rounds
    each = [times[at : at + size] for at in range(0, len(times), size)]
    return [median(2 * b / (a + c) for a, b, c in zip(one[:-2], one[1:-1], one[2:], strict=True)) for one in each]


def median_and_error(values: list[float]) -> tuple[float, float]:
    """The median and its standard error, whatever the distribution; the error of a single value is NaN.

    How many of n values lie below the true median is binomial, n / 2 with a deviation of sqrt(n) / 2: the error is
    half the distance between the values which lie that many ranks below and above.
    """
    ranked, n = sorted(values), len(values)
    below = max(0, floor((n - n**0.5) / 2))
    return median(ranked), (ranked[n - 1 - below] - ranked[below]) / 2 if n > 1 else nan


def host_us(call: Callable[[], object]) -> float:
    """Host time of one call, in microseconds: the median of rounds of calls in a row, the device left to itself."""
    for _ in range(3):
        call()
    times: list[float] = []
    torch.cuda.synchronize()
    for _ in range(HOST_ROUNDS):  # within which nothing is waited for, as a host that waits slows down
        with quiet_core():
            call()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times.append((time.perf_counter() - start) * 1e6 / HOST_CALLS)
    torch.cuda.synchronize()
    return median(times)
