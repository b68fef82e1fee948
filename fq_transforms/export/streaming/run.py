"""A conversion that is done: pieces go to ranks and threads, in the memory they may hold; then the folder appears."""

import os
from collections.abc import Generator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Condition

import torch

from fq_transforms.checkpoint.storage import naming, stage_of
from fq_transforms.export.files.directory import INDEX, bytes_bar, commit, making_parents, write_json
from fq_transforms.export.files.shards import ShardWriter, index_of
from fq_transforms.export.streaming.ahead import Ahead
from fq_transforms.export.streaming.job import Job, Piece, named
from fq_transforms.export.streaming.ranks import Ranks
from fq_transforms.export.streaming.stage import DONE, FAILED, Marks, Stage, fingerprint

__all__ = ["run", "share_of"]

# Bytes of weights that threads hold in memory together.
HELD_BYTES = 2**30


def run(job: Job, path: Path, ranks: Ranks, jobs: int, resume: bool, mine: dict[int, Piece], ahead: Ahead) -> None:
    """Write the folder, with the other ranks."""
    stage = ranks.together(lambda: stage_of(path, fingerprint(job)))
    ranks.check_same(str(stage), "src, dst and options")
    with ExitStack() as stack:
        ranks.on_first(lambda: _begin(job, path, stage, resume, stack))
        ranks.together(lambda: _fill(job, path, stage, ranks, jobs, mine, ahead))
        job.exact = [sum(counts) for counts in zip(*ranks.gather(job.exact), strict=True)]
        ranks.on_first(lambda: _finish(job, path, stage))


def _begin(job: Job, path: Path, stage: Path, resume: bool, stack: ExitStack) -> None:
    stack.enter_context(making_parents(path))
    stack.enter_context(Stage(job, path, stage, resume))


def share_of(job: Job, ranks: Ranks) -> dict[int, Piece]:
    """This rank's share of the pieces, by number."""
    total, at = max(1, sum(piece.size for piece in job.pieces)), 0
    mine: dict[int, Piece] = {}
    for number, piece in enumerate(job.pieces):
        middle, at = at + piece.size // 2, at + piece.size
        if min(middle * ranks.size // total, ranks.size - 1) == ranks.rank:
            mine[number] = piece
    return mine


def _fill(job: Job, path: Path, stage: Path, ranks: Ranks, jobs: int, mine: Mapping[int, Piece], ahead: Ahead) -> None:
    """Convert this rank's pieces that are not on the disk yet."""
    done = (stage / DONE).read_bytes()
    left = [(number, piece) for number, piece in mine.items() if not done[number]]
    ahead.start(number for number in mine if done[number])
    with naming(path), ExitStack() as stack:
        writer = ShardWriter(stage, job.shards, is_new=False)
        marks = stack.enter_context(Marks(stage / DONE, writer))
        what = job.source.path.name + (f", rank {ranks.rank}" if ranks.size > 1 else "")
        bar = stack.enter_context(bytes_bar(sum(piece.size for _, piece in left), what, ranks.rank))

        memory, failed, threads = _Memory(), stage / FAILED, torch.get_num_threads()

        def one(number: int, piece: Piece) -> None:
            if ranks.size > 1 and failed.exists():  # on another rank, which will say so
                return
            with named(job.source), memory.of(job.held(piece)):
                job.convert(piece, writer)
            ahead.used(number)
            marks.add(number, piece.size)
            bar.update(piece.size)

        # More threads than cores take turns in the caches of a CPU: 64 on two were 2.5 times as slow as two.
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        count = min(jobs, cores) if job.device.type == "cpu" else jobs
        with ThreadPoolExecutor(count, initializer=_alone, initargs=(job.device,)) as pool:
            futures = [pool.submit(one, *entry) for entry in left]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except Exception:
                with suppress(OSError):  # the disk may be full; then the others end their share first
                    failed.touch()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)  # that of a thread is that of all later ones too


class _Memory:
    """Lets pieces wait for memory, whatever the number of threads. One that is too large goes by itself."""

    def __init__(self) -> None:
        self._free, self._changed = HELD_BYTES, Condition()

    @contextmanager
    def of(self, size: int) -> Generator[None]:
        """Hold so many bytes."""
        size = min(size, HELD_BYTES)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _alone(device: torch.device) -> None:
    """Let a thread compute by itself: with others that share each operation it is slower; on a GPU in a stream."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _finish(job: Job, path: Path, stage: Path) -> None:
    """Write what is beside the tensors, and let the folder appear."""
    with naming(path):
        job.source.copy_others(stage)
        index = index_of(job.shards)
        documents = job.target.documents(job.plan) | ({INDEX: index} if index else {})
        for name, document in documents.items():
            write_json(stage / name, document)
        assert all((stage / DONE).read_bytes()), "a piece was left out"
        commit(stage, path)
