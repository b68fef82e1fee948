"""Real processes for tests: workers, started once a session, that run a function as the ranks of a gloo group.

    def on_each_rank(rank, size, number): ...                     # at the top of a module; runs in the workers

    @pytest.mark.dist
    def test_it(ranks):
        results = ranks(on_each_rank, 3, size=2)                  # one result a rank; what a rank raises is raised here

Each call makes a process group of `size` ranks, and destroys it afterwards. Workers have megatron-core's two calls of
CUDA stubbed, which it makes when saving also with a PyTorch that has none.

Workers are forked from a server that has imported the engines and started no thread: eight of them on two busy cores
took 11 s to start and 0.1 s to stop, and 64 s and 22 s when each was spawned and imported PyTorch for itself.
"""

import gc
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

SIZE = 4
TIMEOUT_S = 120

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.cases",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor.debug",
        "megatron.core.dist_checkpointing",
        "megatron.core.parallel_state",
        "transformers.modeling_utils",
    ]
)


def _let_go():
    """Free the process groups of a job, each of which has a thread that wakes up a hundred times a second.

    Kept, there were a thousand on each rank before the last test, and they took a quarter of two cores. Megatron's
    DistributedDataParallel holds on to itself: nodes of autograd have its hooks, where gc does not see them.
    """
    if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
        megatron.destroy_model_parallel()
        for wrapper in [each for each in gc.get_objects() if hasattr(type(each), "zero_grad_buffer")]:
            vars(wrapper).clear()
    gc.collect()


def _work(connection):
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache as clear_operator_cache

    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    gc.freeze()  # what was imported is not looked at again
    while True:
        job = connection.recv()
        if job is None:
            return
        function, rank, size, store, args = job
        try:
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            torch.manual_seed(0)
            result, error = function(rank, size, *args), None
        except BaseException as caught:
            caught.add_note(f"on rank {rank} of {size}:\n{traceback.format_exc()}")
            result, error = None, caught
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            clear_operator_cache()  # of DTensor: it would hand out equal meshes of the group that is gone
            _let_go()
        try:
            connection.send((result, error))
        except Exception:
            connection.send((None, AssertionError(f"rank {rank} gave {result!r}, {error!r}, which cannot be sent")))


class Ranks:
    """Workers; `ranks(function, *args, size=n)` runs function(rank, n, *args) on n of them."""

    def __init__(self):
        self.workers = []

    def start(self, size):
        while len(self.workers) < size:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def __call__(self, function, *args, size=SIZE):
        self.start(max(size, SIZE))
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            used = self.workers[:size]
            for rank, (_, connection) in enumerate(used):
                connection.send((function, rank, size, store, args))
            outcomes = []
            for rank, (_, connection) in enumerate(used):
                assert connection.poll(TIMEOUT_S), f"rank {rank} of {size} did not answer in {TIMEOUT_S} s"
                outcomes.append(connection.recv())
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def stop(self):
        for _, connection in self.workers:
            connection.send(None)
        for process, _ in self.workers:
            process.join(5)
            process.kill()


@pytest.fixture(scope="session")
def ranks():
    workers = Ranks()
    yield workers
    workers.stop()
