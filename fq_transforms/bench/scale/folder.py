"""The part `folder`: one folder quantized by 1, 2, 4, ... ranks, read from the disk each time, to the same bytes."""

import hashlib
import os
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

import fq_transforms as fqt
from fq_transforms.bench.scale.steps import FORMAT, largest

__all__ = ["check_same_files", "convert", "hashes"]

MOST_JOBS = 16


def convert(options: Namespace) -> float:
    """Quantize the folder `options.src` to `options.dst` with all ranks; the seconds of the slowest."""
    jobs = min(MOST_JOBS, max(1, len(os.sched_getaffinity(0)) // dist.get_world_size()))
    device = options.device if options.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    largest(0.0, options.device)  # all begin at once, with CUDA started
    start = time.perf_counter()
    rules = {"*.experts.*": FORMAT}
    fqt.export.folder(options.src, options.dst, rules, device=device, jobs=jobs, max_shard_size=options.shard)
    return largest(time.perf_counter() - start, options.device)


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its name."""

    def of(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        return dict(zip((str(file.relative_to(folder)) for file in files), pool.map(of, files), strict=True))


def check_same_files(found: dict[str, str], wanted: dict[str, str], ranks: int) -> None:
    """Raise SystemExit unless files have the names and the bytes that one rank has written."""
    if found != wanted:
        other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise SystemExit(f"folder on {ranks} ranks: found other bytes in {', '.join(other)}, wanted those of one rank")
