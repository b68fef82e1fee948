"""Nemotron-3-Nano's experts at full size on one GPU: every stage from weights to files, timed."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes
from torch.utils._pytree import tree_map

import fq_transforms as fqt
from fq_transforms.checkpoint import modelopt
from fq_transforms.checkpoint.storage import in_threads
from fq_transforms.formats import Format
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.ops.report.reference import report_reference
from fq_transforms.pack import PackedTree
from fq_transforms.report.report import Report
from fq_transforms.state import State

__all__ = ["page", "rows"]

Row = dict[str, Any]

LAYERS, EXPERTS, RANKS = 23, 128, 4
SHAPES = {"linear_fc1": (1856, 2688), "linear_fc2": (2688, 1856)}
FORMATS = [fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.NVFP4]


def rows(progress: Callable[..., Any]) -> Generator[Row, None, None]:
    """One row per format, then one of packed weights; each stage in seconds, reported as it begins and ends.

    Raises:
        SystemExit: A number is not what it should be.
    """
    wanted, found = 2 * 2 * LAYERS * EXPERTS * 2 * 1856 * 2688, torch.cuda.mem_get_info()[0]  # weights and fake ones
    if found < wanted:
        raise SystemExit(f"found {found / 1e9:.0f} GB free on the GPU, wanted {wanted / 1e9:.0f}: an H200 has them")
    params = _weights(progress)
    for format in FORMATS:
        yield _stages(params, format)
    yield _packed_stages(params)


def _weights(progress: Callable[..., Any], layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Tensor]:
    """bf16 weights as Transformer Engine names them; no two have the same largest magnitude."""
    generator = torch.Generator("cuda").manual_seed(0)
    params: dict[str, Tensor] = {}
    for layer in progress(range(layers), desc="weights"):
        for role, shape in SHAPES.items():
            for expert in range(experts):
                weight = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
                largest = (1 + len(params) % 128 / 128) * 2.0 ** (len(params) // 128 - 20)  # consecutive bf16 numbers
                weight.clamp_(-8, 8).mul_(2.0 ** (len(params) // 128 - 23))[0, 0] = largest
                params[f"decoder.layers.{layer}.mlp.experts.{role}.weight{expert}"] = weight
    return params


def _timer(row: Row) -> Callable[[str, Callable[[], Any]], Any]:
    """Calls what it is given, times it, and says on stderr which stage is running, for runs that are cut off."""

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        print(f"{row['format']}: {stage} ... ", end="", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        row[stage] = time.perf_counter() - start
        print(f"{row[stage]:.2f} s", file=sys.stderr, flush=True)
        return result

    return timed


def _stages(params: dict[str, Tensor], format: Format) -> Row:
    row: Row = {"format": format.name, "experts": len(params)}
    timed = _timer(row)
    fq = fqt.transform(timed("select", lambda: fqt.select(params, {"*": format})))
    with torch.no_grad():
        fq.calibrate(dict(params))  # compiles
        state = timed("calibrate", lambda: fq.calibrate(params))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weights = timed("fakequant", lambda: fq.fakequant(params, state))
        row["fakequant, GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        _check(fq, params, state, weights)
        del weights
        timed("fakequant again", lambda: fq.fakequant(params, state))
        _report_stage(row, timed, fq, params, state)
    row["amax"] = sum(leaf.shape[0] for leaf in fqt.state.flatten(state).values())
    _round_trip(row, timed, params, state, format)
    return row


def _check(fq: fqt.Transform, params: dict[str, Tensor], state: State, weights: dict[str, Tensor]) -> None:
    """The first and the last expert of every group equal the reference, bit for bit."""
    for group in fq.spec.groups:
        for expert in (0, group.experts - 1):
            name = group.names[expert]
            amax, _ = expert_amax_reference(params[name], format=group.format)
            wanted = fake_quantize_reference(params[name], amax, None, format=group.format, out_dtype=torch.bfloat16)
            _require(torch.equal(state[group.key]["amax"][expert], amax), f"amax of {name}")
            _require(torch.equal(weights[name], wanted), f"fake weight {name}")


def _report_stage(
    row: Row, timed: Callable[..., Any], fq: fqt.Transform, params: dict[str, Tensor], state: State
) -> None:
    """A report of all experts, and how long its kernels take on the GPU, without the host's time between them."""
    timed("report", lambda: fq.report(params, state))  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = timed("report again", lambda: fq.report(params, state))
    row["report, GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        fq.report(params, state)
        torch.cuda.synchronize()
    row["report, on the GPU"] = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    _check_report(fq, params, state, found)
    print(found, file=sys.stderr)


def _check_report(fq: fqt.Transform, params: dict[str, Tensor], state: State, found: Report) -> None:
    """The first and the last expert of every group equal the reference: counts exactly, sums to their order's bound."""
    for group in fq.spec.groups:
        amax = state[group.key]["amax"]
        for expert in (0, group.experts - 1):
            weight, measured = params[group.names[expert]], found.groups[group.key]
            wanted = report_reference(weight, amax[expert], None, format=group.format)
            for field, value in wanted._asdict().items():
                exact, number = value.item(), getattr(measured, field)[expert].item()
                slack = 2 * weight.numel() * 2.0**-53 * exact if field in ("signal", "noise") else 0
                _require(abs(number - exact) <= slack, f"{field} of {group.names[expert]}")


def _round_trip(row: Row, timed: Callable[..., Any], params: dict[str, Tensor], state: State, format: Format) -> None:
    """What rank 1 has at EP=4, through ModelOpt's keys, one per expert, and through a checkpoint."""
    experts = EXPERTS // RANKS
    local = {
        name.replace(f"weight{expert + experts}", f"weight{expert}"): params[name]
        for name in params
        if 0 <= (expert := int(name.rpartition("weight")[2]) - experts) < experts
    }
    fq = fqt.transform(fqt.select(local, {"*": format}))
    here = fq.calibrate(local)
    whole = {name: leaf[experts : 2 * experts] for name, leaf in fqt.state.flatten(state).items()}
    _same(here, fqt.state.unflatten(whole, like=here), "rank 1's own calibration")
    keys = timed("ModelOpt keys: write", lambda: modelopt.write(fq, here))
    shape = format.amax_shape(*next(iter(SHAPES.values())))
    row["keys"] = sum("_amax" in key for key in keys)
    row["distinct"] = len({leaf.cpu().numpy().tobytes() for leaf in keys.values()})
    row["shape of a key"] = str(list(next(iter(keys.values())).shape))
    _require(row["keys"] == row["distinct"] == 2 * LAYERS * experts, f"number of keys, {row['keys']}")
    back = timed("ModelOpt keys: read", lambda: modelopt.read(keys, fq))
    _same(back, here, "ModelOpt keys")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        timed("checkpoint: save", lambda: fqt.checkpoint.save(path, fq, here))
        loaded = timed("checkpoint: load", lambda: fqt.checkpoint.load(path, fq, like=fq.init(local)))
        _same(loaded, here, "checkpoint")
        row["checkpoint, KiB"] = sum(file.stat().st_size for file in path.iterdir()) / 1024
    row["native shape"] = str([experts, *shape])


def _packed_stages(params: dict[str, Tensor]) -> Row:
    """All experts packed, in NVFP4, from weights to a checkpoint and back."""
    row: Row = {"format": "NVFP4, packed", "experts": len(params)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
    with torch.no_grad():
        _packed_round_trip(row, _timer(row), fq, params, fq.calibrate(params))
    return row


def _packed_round_trip(
    row: Row, timed: Callable[..., Any], fq: fqt.Transform, params: dict[str, Tensor], state: State
) -> None:
    """Packed weights, saved at EP=4 by four processes and loaded at EP=2 by two, byte for byte.

    These are real processes of a gloo group. They map one copy of what this process has packed: the four save their
    experts of it, and the two compare what they have loaded with theirs.
    """
    packed = timed("packed: pack", lambda: fq.pack(params, state))
    leaves = fqt.state.flatten(packed)
    here = sum(leaf.nbytes for leaf in leaves.values())
    memory = os.memfd_create("packed")  # on no disk, without the limit of /dev/shm, and gone with this process
    source = Path(f"/proc/{os.getpid()}/fd/{memory}")
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * here:
            raise SystemExit(f"found {free / 1e9:.0f} GB free in {folder}, wanted {1.1 * here / 1e9:.0f}")
        path = Path(folder) / "packed"

        def by_processes(rank: Callable[..., None], ranks: int) -> float:
            return in_processes(rank, ranks, source, path, fq)

        timed("packed: copy for other processes", lambda: _share(leaves, source))
        stage = f"packed: save at EP={RANKS} by {RANKS} processes"
        row[f"{stage}, without their start"] = timed(stage, lambda: by_processes(_save_rank, RANKS))
        row["packed on disk, GB"] = sum(file.stat().st_size for file in path.iterdir()) / 1e9
        row["bf16, GB"] = sum(params[name].nbytes for group in fq.spec.groups for name in group.names) / 1e9
        row["packed on disk / bf16"] = row["packed on disk, GB"] / row["bf16, GB"]
        stage = "packed: load at EP=2 by 2 processes, and compare"
        row[f"{stage}, without their start"] = timed(stage, lambda: by_processes(_load_rank, 2))
    os.close(memory)


def _share(leaves: dict[str, Tensor], source: Path) -> None:
    """Copy leaves to where other processes can map them."""
    mapped = _mapped(leaves, source)
    in_threads(lambda name: mapped[name].copy_(leaves[name]), list(leaves), sum(x.nbytes for x in leaves.values()))


def _mapped(leaves: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes of `leaves` in the memory of a file, which all that map it see."""
    sizes = [-(-leaf.nbytes // 64) * 64 for leaf in leaves.values()]  # a view of another dtype must be aligned
    memory = torch.from_file(str(source), shared=True, size=sum(sizes), dtype=torch.uint8).split(sizes)
    return {
        name: part[: leaf.nbytes].view(leaf.dtype).view(leaf.shape)
        for part, (name, leaf) in zip(memory, leaves.items(), strict=True)
    }


def in_processes(rank: Callable[..., None], ranks: int, source: Path, path: Path, fq: fqt.Transform) -> float:
    """Seconds that the slowest of several processes took for `rank(path, fq, own)`; `own` are its experts, packed."""
    seconds = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_process, (rank, ranks, folder, source, path, fq, seconds), nprocs=ranks)
    return max(seconds.get() for _ in range(ranks))


def _process(
    number: int,
    rank: Callable[..., None],
    ranks: int,
    folder: str,
    source: Path,
    path: Path,
    fq: fqt.Transform,
    seconds: Any,
) -> None:
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        meta = {name: torch.empty(g.parameter_shape, device="meta") for g in fq.spec.groups for name in g.names}
        place = fq.pack(meta, fq.init(meta))
        whole = fqt.state.unflatten(_mapped(fqt.state.flatten(place), source), place)

        def sharded(leaf: Tensor) -> DTensor:
            return DTensor.from_local(leaf.chunk(ranks)[number], mesh, [Shard(0)])

        own = tree_map(sharded, whole)
        group.barrier()
        start = time.perf_counter()
        rank(path, fq, own)
        seconds.put(time.perf_counter() - start)
        group.barrier()  # gloo aborts a process whose peer leaves while it still receives
    finally:
        group.destroy_process_group()


def _save_rank(path: Path, fq: fqt.Transform, own: PackedTree) -> None:
    fqt.checkpoint.save(path, fq, own)


def _load_rank(path: Path, fq: fqt.Transform, own: PackedTree) -> None:
    _require(fqt.checkpoint.read_spec(path) == fq.spec, "stored spec")
    loaded = fqt.checkpoint.load(path, fq, like=own)
    _same(tree_map(DTensor.to_local, loaded), tree_map(DTensor.to_local, own), "packed experts of a rank")


def _same(found: Any, wanted: Any, what: str) -> None:
    """Raise SystemExit unless two states, or packed weights, have the same leaves, byte for byte."""
    a, b = fqt.state.flatten(found), fqt.state.flatten(wanted)
    _require(a.keys() == b.keys(), f"leaves of {what}")
    for name, leaf in b.items():
        _require((a[name].shape, a[name].dtype) == (leaf.shape, leaf.dtype), f"{name} of {what}")
        x, y = (t.to(leaf.device).contiguous().view(torch.uint8) for t in (a[name], leaf))
        _require(torch.equal(x, y), f"{name} of {what}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"{what} is not what it should be")


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    lines = [["", *(row["format"] for row in rows)], ["---"] * (len(rows) + 1)]
    for key in _keys(rows):
        if key != "format":
            values = [row.get(key, "") for row in rows]
            lines.append([key, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)])
    return "\n".join(
        [
            f"# Nemotron-3-Nano's experts at full size, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench full-size`: {facts}.",
            "",
            f"{LAYERS} layers, {EXPERTS} experts, fc1 [1856, 2688], fc2 [2688, 1856], bf16, on one GPU. In seconds, "
            "unless a row names another unit. The first and the last expert of every group equalled the reference. "
            "Report: all experts; on the GPU: the time of its kernels alone, from the profiler. Keys and files: the 32 "
            "experts of rank 1 at EP=4, read back equal. Packed: all experts, saved at EP=4 by four processes, then "
            "loaded at EP=2 by two, and each byte compared with what was packed.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _keys(rows: Iterable[Row]) -> list[str]:
    """The keys of all rows, each where it first appears."""
    return list(dict.fromkeys(key for row in rows for key in row))
