"""Nemotron-3-Nano's experts at full size on one GPU: every stage from weights to files, with its time."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._pytree import tree_map

import fq_transforms as fqt
from fq_transforms.checkpoint import modelopt
from fq_transforms.formats import Format
from fq_transforms.ops.reference import expert_amax_reference, fake_quantize_reference

__all__ = ["page", "rows"]

Row = dict[str, Any]

LAYERS, EXPERTS, RANKS = 23, 128, 4
SHAPES = {"linear_fc1": (1856, 2688), "linear_fc2": (2688, 1856)}
FORMATS = [fqt.NVFP4, fqt.FP8, fqt.INT8_PER_CHANNEL]


def rows(progress: Callable[..., Any]) -> list[Row]:
    """One row a format; each stage in seconds. Raises SystemExit where a number is not what it should be."""
    wanted, found = 2 * 2 * LAYERS * EXPERTS * 2 * 1856 * 2688, torch.cuda.mem_get_info()[0]  # weights and fake ones
    if found < wanted:
        raise SystemExit(f"found {found / 1e9:.0f} GB free on the GPU, wanted {wanted / 1e9:.0f}: an H200 has them")
    params = _weights(progress)
    return [_stages(params, format) for format in progress(FORMATS, desc="formats")]


def _weights(progress: Callable[..., Any], layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Tensor]:
    """bf16 weights as Transformer Engine names them; the largest of each is another number."""
    generator = torch.Generator("cuda").manual_seed(0)
    params: dict[str, Tensor] = {}
    for layer in progress(range(layers), desc="weights"):
        for role, shape in SHAPES.items():
            for expert in range(experts):
                weight = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
                largest = (1 + len(params) % 128 / 128) * 2.0 ** (len(params) // 128 - 20)  # the bf16 in a row
                weight.clamp_(-8, 8).mul_(2.0 ** (len(params) // 128 - 23))[0, 0] = largest
                params[f"decoder.layers.{layer}.mlp.experts.{role}.weight{expert}"] = weight
    return params


def _stages(params: dict[str, Tensor], format: Format) -> Row:
    row: Row = {"format": format.name, "experts": len(params)}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        row[stage] = time.perf_counter() - start
        return result

    spec = timed("select", lambda: fqt.select(params, {"*": format}))
    fq = fqt.transform(spec)
    with torch.no_grad():
        fq.calibrate(dict(params))  # compiles
        state = timed("calibrate", lambda: fq.calibrate(params))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weights = timed("fakequant", lambda: fq.fakequant(params, state))
        row["fakequant, GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        _check(params, state, weights, spec)
        del weights
        timed("fakequant again", lambda: fq.fakequant(params, state))
    row["amax"] = sum(leaf.shape[0] for leaf in fqt.state.flatten(state).values())
    _round_trip(row, timed, params, state, format)
    if format == fqt.NVFP4:
        _packed_round_trip(row, timed, params, state, spec)
    return row


def _check(params: dict[str, Tensor], state: fqt.State, weights: dict[str, Tensor], spec: fqt.Spec) -> None:
    """The first and the last expert of every group equal the reference, bit for bit."""
    for group in spec.groups:
        for expert in (0, group.experts - 1):
            name = group.names[expert]
            amax, _ = expert_amax_reference(params[name], format=group.format)
            wanted = fake_quantize_reference(params[name], amax, None, format=group.format, out_dtype=torch.bfloat16)
            found: Any = state[group.key]
            _require(torch.equal(found.amax[expert], amax), f"amax of {name}")
            _require(torch.equal(weights[name], wanted), f"fake weight {name}")


def _round_trip(
    row: Row, timed: Callable[..., Any], params: dict[str, Tensor], state: fqt.State, format: Format
) -> None:
    """What rank 1 has at EP=4, through ModelOpt's keys, one an expert, and through a checkpoint."""
    experts = EXPERTS // RANKS
    local = {
        name.replace(f"weight{expert + experts}", f"weight{expert}"): params[name]
        for name in params
        if 0 <= (expert := int(name.rpartition("weight")[2]) - experts) < experts
    }
    spec = fqt.select(local, {"*": format})
    fq = fqt.transform(spec)
    here = fq.calibrate(local)
    whole = {name: leaf[experts : 2 * experts] for name, leaf in fqt.state.flatten(state).items()}
    _same(here, fqt.state.unflatten(whole, like=here), "rank 1's own calibration")
    keys = timed("ModelOpt keys: write", lambda: modelopt.write(here, spec))
    shape = format.amax_shape(*next(iter(SHAPES.values())))
    row["keys"] = sum("_amax" in key for key in keys)
    row["distinct"] = len({leaf.cpu().numpy().tobytes() for leaf in keys.values()})
    row["shape of a key"] = str(list(next(iter(keys.values())).shape))
    _require(row["keys"] == row["distinct"] == 2 * LAYERS * experts, f"number of keys, {row['keys']}")
    back = timed("ModelOpt keys: read", lambda: modelopt.read(keys, spec))
    _same(back, here, "ModelOpt keys")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        timed("checkpoint: save", lambda: fqt.checkpoint.save(here, path, spec=spec))
        loaded = timed("checkpoint: load", lambda: fqt.checkpoint.load(path, like=fq.init(local), spec=spec))
        _same(loaded, here, "checkpoint")
        row["checkpoint, KiB"] = sum(file.stat().st_size for file in path.iterdir()) / 1024
    row["native shape"] = str([experts, *shape])


def _packed_round_trip(
    row: Row, timed: Callable[..., Any], params: dict[str, Tensor], state: fqt.State, spec: fqt.Spec
) -> None:
    """All experts packed: saved by one process, by four at EP=4, by two at EP=2, and read back by one, byte for byte.

    The four and the two are real processes of a gloo group, each of which loads its experts from the checkpoint before,
    and saves them: each pair of neighbours is a load at another expert parallelism than the save's.
    """
    packed = timed("packed: pack", lambda: fqt.pack(params, state, spec=spec))
    here = sum(leaf.nbytes for leaf in fqt.state.flatten(packed).values())
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 2.1 * here:
            raise SystemExit(f"found {free / 1e9:.0f} GB free in {folder}, wanted {2.1 * here / 1e9:.0f}")
        path = {ranks: Path(folder) / f"ep{ranks}" for ranks in (1, RANKS, 2)}
        timed("packed: save, EP=1", partial(fqt.checkpoint.save, packed, path[1], spec=spec))
        for source, ranks in ((1, RANKS), (RANKS, 2)):
            stage = f"packed: load and save by {ranks} processes, EP={source} to EP={ranks}"
            timed(stage, partial(reshard, path[source], path[ranks], ranks))
            shutil.rmtree(path[source])
        loaded = timed("packed: load, EP=1", lambda: fqt.checkpoint.load(path[2], like=packed, spec=spec, device="cpu"))
        _same(loaded, packed, "packed checkpoint")
        row["packed on disk, GB"] = sum(file.stat().st_size for file in path[2].iterdir()) / 1e9
    row["bf16, GB"] = sum(params[name].nbytes for group in spec.groups for name in group.names) / 1e9
    row["packed on disk / bf16"] = row["packed on disk, GB"] / row["bf16, GB"]


def reshard(source: Path, target: Path, ranks: int) -> None:
    """Load packed weights at EP=`ranks` by as many processes, and save them at that; CPU and gloo."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_reshard_rank, (ranks, folder, source, target), nprocs=ranks, start_method="spawn")


def _reshard_rank(rank: int, ranks: int, folder: str, source: Path, target: Path) -> None:
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        spec, mesh = fqt.checkpoint.read_spec(source), init_device_mesh("cpu", (ranks,))
        meta = {name: torch.empty(g.parameter_shape, device="meta") for g in spec.groups for name in g.names}
        whole = fqt.pack(meta, fqt.transform(spec).init(meta), spec=spec)

        def placed(leaf: Tensor) -> Tensor:
            return distribute_tensor(leaf, mesh, [Shard(0)], src_data_rank=None)

        like = tree_map(placed, whole)
        fqt.checkpoint.save(fqt.checkpoint.load(source, like=like, spec=spec), target, spec=spec)
        group.barrier()  # gloo aborts a process whose peer leaves while it still receives
    finally:
        group.destroy_process_group()


def _same(found: Any, wanted: Any, what: str) -> None:
    """Raise SystemExit unless two states, or packed weights, have the same leaves, byte for byte."""
    a, b = fqt.state.flatten(found), fqt.state.flatten(wanted)
    _require(a.keys() == b.keys(), f"leaves of {what}")
    for name, leaf in b.items():
        _require((a[name].shape, a[name].dtype) == (leaf.shape, leaf.dtype), f"{name} of {what}")
        x, y = (t.cpu().contiguous().view(torch.uint8) for t in (a[name], leaf))
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
            f"{LAYERS} layers, {EXPERTS} experts, fc1 [1856, 2688], fc2 [2688, 1856], bf16, on one GPU. Seconds where "
            "a row says no other unit. The first and the last expert of every group equalled the reference. Keys and "
            "files: the 32 experts of rank 1 at EP=4, read back equal. Packed: all experts, saved by one process, then "
            "loaded and saved by four at EP=4 and by two at EP=2, real processes, and read back by one, byte for byte.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _keys(rows: Iterable[Row]) -> list[str]:
    """What any row has, in the order of the first that has it."""
    return list(dict.fromkeys(key for row in rows for key in row))
