"""One rank of a job: `python -m torch.distributed.run ... -m fq_transforms.bench.scale.rank JOB OPTIONS FILE`."""

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["main"]


def main(job: str, options: str, file: str) -> None:
    """Run a job, a function of a module beside this, as a rank of torchrun; rank 0 writes what it gives to a file."""
    warnings.simplefilter("ignore")  # Megatron names packages that are not installed
    given = Namespace(**json.loads(options))
    if given.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    module, _, name = job.partition(".")
    function: Callable[[Namespace], Any] = getattr(import_module(f"fq_transforms.bench.scale.{module}"), name)
    found = function(given)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's writer starts processes that import this file
    main(*sys.argv[1:])
