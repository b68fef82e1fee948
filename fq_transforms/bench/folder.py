r"""`python -m fq_transforms.bench folder`: folder to folder, beside `cp` and llm-compressor's `model_free_ptq`.

A synthetic Qwen3-MoE is written, then each way makes a new folder of it in a process of its own, whose memory is
sampled with that of its children. A time ends when all bytes are on the disk. Before each run the source is read, so
that it lies in the page cache, or with `--cache cold` it is dropped from there; other work is the same for all.

    python -m fq_transforms.bench folder --gb 12 --jobs 1 2 8 64 --peer ~/venv-llmc/bin/python
    python -m fq_transforms.bench folder --gb 24 --jobs 8 16 --device cuda --cache cold
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fq_transforms.bench.timing import median_and_error
from fq_transforms.export.files.shards import ShardWriter, TensorType, index_of, lay_out

__all__ = ["drop", "main", "make_source", "page", "rates", "run", "ways"]

Row = dict[str, Any]

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 48, 2048, 768, 4096
SHARD = 10**9
HERTZ = 20
# llm-compressor's names for the same weights; those of 128 x 128 have inputs besides, which hold no numbers.
SCHEMES = {"NVFP4": "NVFP4A16", "FP8_BLOCK": "FP8_BLOCK", "MXFP4": "MXFP4A16"}

OURS = """
import json, sys, time
import fq_transforms as fqt
a = json.loads(sys.argv[1])
start = time.perf_counter()
fqt.export.folder(a["src"], a["dst"], {"*.experts.*": getattr(fqt, a["format"])}, jobs=a["jobs"],
                  device=a["device"], max_shard_size=a["shard"])
print(time.perf_counter() - start)
"""
SYNC = """
for root, _, files in os.walk(a["dst"]):
    for name in files:
        file = os.open(os.path.join(root, name), os.O_RDONLY)
        os.fsync(file)
        os.close(file)
print(time.perf_counter() - start)
"""
PEER = """
import json, os, sys, time
from llmcompressor import model_free_ptq
a = json.loads(sys.argv[1])
start = time.perf_counter()
model_free_ptq(a["src"], a["dst"], scheme=a["scheme"], ignore=["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*",
               "re:.*embed_tokens"], max_workers=a["jobs"], device=a["device"])
"""
COPY = """
import json, os, subprocess, sys, time
a = json.loads(sys.argv[1])
start = time.perf_counter()
subprocess.run(["cp", "-r", a["src"], a["dst"]], check=True)
"""


def make_source(
    folder: Path, size: int, *, layers: int = LAYERS, hidden: int = HIDDEN, inner: int = INTERMEDIATE
) -> int:
    """Write a Qwen3-MoE of about `size` bytes, experts of random bf16 numbers; the bytes of its tensors."""
    rest = 2 * (2 * VOCABULARY * hidden + layers * 4 * hidden**2)
    experts = max(2, round((size - rest) / (layers * 3 * hidden * inner * 2)))
    heads = hidden // 64
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    types = {
        name: (TensorType("BF16", shape), 2 * shape[0] * (shape[1:] or (1,))[0]) for name, shape in _shapes(config)
    }
    shards = lay_out(types, min(SHARD, max(1, size // 3)))
    folder.mkdir(parents=True)
    random = torch.randn(max(2**24, 2 * VOCABULARY * hidden)).mul_(0.02).bfloat16()
    writer = ShardWriter(folder, shards)
    with ThreadPoolExecutor(8) as pool:

        def write(number: int, name: str) -> None:
            (_, shape), size = types[name]
            start = number * 7919 % (len(random) - size // 2)
            writer.write(name, random[start : start + size // 2].view(shape))

        list(pool.map(write, range(len(types)), types))
        writer.sync()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(size for _, size in types.values())


def _shapes(config: Row) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield from ((f"{prefix}.self_attn.{name}_norm.weight", (64,)) for name in "qk")
        yield from ((f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
        yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for role, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                yield f"{prefix}.mlp.experts.{expert}.{role}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def run(code: str, arguments: Row, *, python: str = sys.executable) -> Row:
    """Run a way in a process of its own: seconds that it prints, the most anonymous memory of all, bytes that it wrote.

    Raises:
        SystemExit: It fails.
    """
    before, peak = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([python, "-c", code, json.dumps(arguments)], stdout=said, stderr=errors)
        while process.poll() is None:
            peak = max(peak, sum(map(_anonymous, _tree(process.pid))))
            time.sleep(1 / HERTZ)
        for stream in (said, errors):
            stream.seek(0)
        if process.returncode:
            raise SystemExit(f"{python} {json.dumps(arguments)}: {errors.read()[-2000:]}")
        seconds = float(said.read().split()[-1])
    written = sum(file.stat().st_size for file in Path(arguments["dst"]).rglob("*") if file.is_file())
    cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    return {"seconds": seconds, "peak": peak, "cpu": cpu, "written": written}


def _tree(process: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def _anonymous(process: int) -> int:
    """Bytes of memory that no file stands behind."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    return 0


def ways(options: argparse.Namespace) -> dict[str, tuple[str, Row, str]]:
    """What is timed, by name: its code, its arguments, and its Python."""
    found: dict[str, tuple[str, Row, str]] = {"cp": (COPY + SYNC, {"format": "copy", "jobs": 1}, sys.executable)}
    for format in options.formats:
        for jobs in options.jobs:
            ours = {"format": format, "jobs": jobs, "device": options.device, "shard": SHARD}
            found[f"{format}, {jobs} jobs"] = (OURS, ours, sys.executable)
        if options.peer and format in SCHEMES:
            for jobs in options.peer_jobs:
                peer = {"format": format, "scheme": SCHEMES[format], "jobs": jobs, "device": options.device}
                found[f"{format}, model_free_ptq, {jobs} workers"] = (PEER + SYNC, peer, options.peer)
    return found


def rates(folder: Path, where: Path, device: str) -> dict[str, float]:
    """Bytes per second of a cold read of the source, of a write that ends on the disk, and over PCIe.

    "both": of a cold read while a third as many bytes are written, as a disk does the two by turns.
    """
    files = sorted(folder.glob("*.safetensors"))
    size, content = sum(file.stat().st_size for file in files), memoryview(files[0].read_bytes())
    paths = [where / f"written-{n}" for n in range(4)]
    drop(folder)
    found = {"read": size / _seconds(lambda: _read(folder))}

    def write(path: Path, size: int) -> None:
        with path.open("wb", buffering=0) as stream:
            for start in range(0, size, len(content)):
                stream.write(content[: size - start])
            os.fsync(stream.fileno())

    def write_all(size: int) -> None:
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(write, paths, [size // len(paths)] * len(paths)))

    found["write"] = len(paths) * len(content) / _seconds(lambda: write_all(len(paths) * len(content)))
    drop(folder)

    def both() -> None:
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(write_all, size // 3)
            _read(folder)
            written.result()

    found["both"] = size / _seconds(both)
    for path in paths:
        path.unlink()
    if torch.device(device).type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there = host.to(device)

        def copy(to: torch.Tensor, source: torch.Tensor) -> None:
            for _ in range(16):
                to.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        for name, pair in (("to the GPU", (there, host)), ("from the GPU", (host, there))):
            copy(*pair)
            found[name] = 16 * 2**28 / _seconds(lambda pair=pair: copy(*pair))
    return found


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _read(folder: Path) -> None:
    def read(file: Path) -> None:
        buffer = bytearray(2**24)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, folder.glob("*.safetensors")))


def drop(folder: Path) -> None:
    """Let the page cache forget a folder, all of which is on the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[Row], str]]:
    """Facts, a row per way, and what was added last: all ways in turn, `--rounds` times."""
    with tempfile.TemporaryDirectory(prefix="folder-", dir=options.where) as name:
        where = Path(name)
        size = make_source(where / "source", int(options.gb * 1e9), layers=options.layers)
        facts: dict[str, Any] = {"bytes": size, "rates": rates(where / "source", where, options.device)}
        rows: dict[str, Row] = {}
        for _ in range(options.rounds):
            for way, (code, arguments, python) in ways(options).items():
                (_read if options.cache == "warm" else drop)(where / "source")
                arguments |= {"src": str(where / "source"), "dst": str(where / "made")}
                found = run(code, arguments, python=python)
                shutil.rmtree(where / "made")
                row = rows.setdefault(way, Row(way=way, **arguments, runs=[]))
                row["runs"].append(found)
                yield facts, list(rows.values()), f"{way}: {found}"


def page(environment: dict[str, str], facts: dict[str, Any], rows: list[Row]) -> str:
    """A page of results in Markdown."""
    of = {row["way"]: [facts["bytes"] / one["seconds"] for one in row["runs"]] for row in rows}
    copied = of["cp"]
    header = [
        "",
        "GB/s of the source",
        "over cp",
        "over model_free_ptq",
        "of the slowest",
        "of both",
        "peak, GB",
        "CPU, s",
        "written, GB",
    ]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        speed, error = median_and_error(of[row["way"]])
        peers = [of[one["way"]] for one in rows if one["format"] == row["format"] and "scheme" in one]
        best = max(peers, key=median, default=[])
        written = row["runs"][0]["written"]
        seconds = {
            name: (written if name in ("write", "from the GPU") else facts["bytes"]) / rate
            for name, rate in facts["rates"].items()
        }
        by_turns = seconds.pop("both")
        least = max(seconds, key=lambda name: seconds[name])
        lines.append(
            [
                row["way"],
                f"{speed / 1e9:.3f} ± {error / 1e9:.3f}",
                _ratio(of[row["way"]], copied),
                "" if "scheme" in row else _ratio(of[row["way"]], best),
                f"{seconds[least] * speed / facts['bytes']:.2f} ({least})",
                f"{by_turns * speed / facts['bytes']:.2f}",
                f"{max(one['peak'] for one in row['runs']) / 1e9:.2f}",
                f"{median(one['cpu'] for one in row['runs']):.1f}",
                f"{written / 1e9:.2f}",
            ]
        )
    known = ", ".join(f"{key} {value}" for key, value in environment.items())
    speeds = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in facts["rates"].items())
    return "\n".join(
        [
            f"# Folder to folder, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench folder`: {known}.",
            "",
            f"{facts['bytes'] / 1e9:.2f} GB; GB/s: {speeds}. Medians of {len(rows[0]['runs'])} rounds and their "
            "errors; ratios are of one round. Of the slowest: the time that reading cold, writing, or PCIe takes by "
            "itself, over the way's own; of both: that of a cold read while a third as many bytes are written. Peak: "
            "anonymous memory of all processes together. CPU: of all threads.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _ratio(found: list[float], base: list[float]) -> str:
    ratios = [one / other for one, other in zip(found, base, strict=False)]
    if not ratios:
        return ""
    middle, error = median_and_error(ratios)
    return f"{middle:.2f} ± {error:.2f}"


def main(arguments: list[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fq_transforms.bench folder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=12.0, help="size of the source")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--formats", nargs="+", default=["NVFP4", "FP8_BLOCK"])
    parser.add_argument("--jobs", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--where", type=Path, default=None, help="directory for the folders, by default the system's")
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="the source, before each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default=None, help="a Python that has llm-compressor")
    parser.add_argument("--peer-jobs", nargs="+", type=int, default=[1, 2], help="its workers")
    parser.add_argument("--out", type=Path, default=None, help="folder for the page and its JSON")
    options = parser.parse_args(arguments)
    environment = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else "CPU",
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
        "cache": options.cache,
    }
    text = ""
    for facts, rows, last in measure(options):
        print(last, file=sys.stderr, flush=True)
        text = page(environment, facts, rows)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            stem = options.out / f"{environment['date']}-folder"
            found = json.dumps({"environment": environment, **facts, "rows": rows}, indent=1)
            stem.with_suffix(".json").write_text(found)
            stem.with_suffix(".md").write_text(text)
    print(text)
