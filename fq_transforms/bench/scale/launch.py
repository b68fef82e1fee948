"""`python -m fq_transforms.bench scale`: the lens on N ranks against plain bf16, and folders quantized by 1 to N ranks.

    megatron    a GPTModel of MoE layers, DistributedOptimizer, at EP=N and at TP=2 x EP=N/2 (needs GPUs)
    fsdp        FSDP2 and expert parallelism on one mesh, masters and AdamW
    folder      one folder by 1, 2, 4, ... N ranks

Steps are timed in turns with plain bf16's. Fake weights and amax equal one GPU's of the gathered masters bit for bit, a
saved state loads on fewer ranks, and every number of ranks writes the same files, or this ends with an error.

    python -m fq_transforms.bench scale --ranks 8 --out results
    python -m fq_transforms.bench scale --ranks 2 --layers 4 --experts 32 --gb 8 --out results
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fq_transforms.bench.folder import SHARD, drop, make_source, rates
from fq_transforms.bench.scale.folder import check_same_files, hashes
from fq_transforms.bench.scale.page import page
from fq_transforms.bench.scale.steps import LENGTH

__all__ = ["main"]

Row = dict[str, Any]

LAYOUTS = {"megatron": (1, 2), "fsdp": (1,)}  # tensor parallelism; the rest of the ranks is expert parallelism
PARTS = [*LAYOUTS, "folder"]
PACKAGES = ["triton", "megatron-core", "transformer-engine"]


def main(arguments: list[str], commit: str) -> None:
    """Run it from the command line.

    Raises:
        SystemExit: An option is wrong; a law does not hold.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fq_transforms.bench scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS if has_gpu else PARTS[1:])
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()), help="N, a power of 2")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--layers", type=int, default=23, help="of the models, each with experts")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top", type=int, default=6, help="experts per token")
    parser.add_argument("--hidden", type=int, default=2688)
    parser.add_argument("--ffn", type=int, default=1856, help="of an expert")
    parser.add_argument("--tokens", type=int, default=8192, help="of a data-parallel rank in a step")
    parser.add_argument("--steps", type=int, default=50, help="of the lens; bf16 has four times as many")
    parser.add_argument("--gb", type=float, default=60.0, help="size of the folder")
    parser.add_argument("--where", type=Path, default=None, help="directory for folders, by default the system's")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the page and its JSON")
    parser.add_argument("--commit", default=commit, help="the commit that the results name")
    options = parser.parse_args(arguments)
    _check(options)
    environment = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": f"{options.ranks} x {torch.cuda.get_device_name()}" if options.device == "cuda" else "none",
        "cores": str(len(os.sched_getaffinity(0))),
        **{name: str(getattr(options, name)) for name in ("layers", "experts", "top", "hidden", "ffn", "tokens")},
        "torch": torch.__version__,
        **{name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "commit": options.commit,
    }
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{environment['date']}-scale"

    def write() -> None:
        stem.with_suffix(".json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
        stem.with_suffix(".md").write_text(page(environment, rows))

    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.where) as where:
        for part in options.parts:
            folder = Path(where) / part
            folder.mkdir()
            for row in _folder(options, folder) if part == "folder" else _training(part, options, folder):
                rows.append(row)
                write()
            shutil.rmtree(folder)
            write()
    print(page(environment, rows))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check(options: argparse.Namespace) -> None:
    ranks: int = options.ranks
    if ranks < 2 or ranks & (ranks - 1):
        raise SystemExit(f"--ranks: found {ranks}, wanted a power of 2, at least 2")
    if options.device == "cuda" and torch.cuda.device_count() < ranks:
        raise SystemExit(f"--ranks: found {torch.cuda.device_count()} GPUs, wanted {ranks}; or --device cpu")
    if options.device == "cpu" and "megatron" in options.parts:
        raise SystemExit("--parts: found megatron with --device cpu, wanted GPUs for it, or the other parts")
    # A share of the experts for each rank; heads of 64; blocks of 16 in half of an expert's columns.
    for name, divisor in (("experts", ranks), ("hidden", 64), ("ffn", 32)):
        if (size := getattr(options, name)) % divisor:
            raise SystemExit(f"--{name}: found {size}, wanted a multiple of {divisor}")
    if options.tokens % min(LENGTH, options.tokens) or options.tokens * options.top % options.experts:
        raise SystemExit(
            f"--tokens: found {options.tokens}, to {options.top} experts each, wanted whole sequences of {LENGTH}, and "
            f"as many for each of the {options.experts} experts"
        )


def _torchrun(job: str, ranks: int, options: argparse.Namespace, **more: Any) -> Any:
    """What rank 0 of some processes gives for a job: a module here, and a function of it."""
    names = ("device", "layers", "experts", "top", "hidden", "ffn", "tokens", "steps")
    given = {name: getattr(options, name) for name in names} | more
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "fq_transforms.bench.scale.rank", job, json.dumps(given), str(file)]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # which Megatron wants to be 1, and FSDP2 not
        if job.startswith("megatron"):
            environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{job} on {ranks} ranks: found an error, which is above, wanted none")
        return json.loads(file.read_text())


def _training(part: str, options: argparse.Namespace, where: Path) -> Generator[Row]:
    """A row per layout; then the states of all are loaded on fewer ranks, and their rows say so."""
    rows: list[Row] = []
    saved: list[str] = []
    for tensor in LAYOUTS[part]:
        folder = where / f"TP={tensor}"
        folder.mkdir()
        saved.append(str(folder))
        rows.append(_torchrun(f"{part}.train", options.ranks, options, saved=saved[-1], tensor=tensor) | Row(loaded=[]))
        yield rows[-1]
    for shift in range(1, options.ranks.bit_length()):
        found = _torchrun(f"{part}.load", options.ranks >> shift, options, saved=saved, tensor=1)
        for row in rows:
            row["loaded"].append(found)


def _folder(options: argparse.Namespace, where: Path) -> Generator[Row]:
    """A row per number of ranks; the source is read from the disk each time."""
    size = make_source(where / "source", int(options.gb * 1e9), layers=options.layers)
    disk = rates(where / "source", where, options.device)
    shard = min(SHARD, size // 8)  # several files, whatever the size
    wanted: dict[str, str] = {}
    for ranks in (1 << shift for shift in range(options.ranks.bit_length())):
        drop(where / "source")
        given: dict[str, Any] = {"src": str(where / "source"), "dst": str(where / "made"), "shard": shard}
        seconds: float = _torchrun("folder.convert", ranks, options, **given)
        found = hashes(where / "made")
        written = sum(file.stat().st_size for file in (where / "made").rglob("*") if file.is_file())
        shutil.rmtree(where / "made")
        wanted = wanted or found
        check_same_files(found, wanted, ranks)
        yield Row(
            part="folder", ranks=ranks, seconds=seconds, bytes=size, written=written, files=len(found), rates=disk
        )
