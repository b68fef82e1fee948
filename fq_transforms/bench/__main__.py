"""Measure, check, print, and write JSON, a plot and a page. Needs one CUDA GPU, matplotlib and tqdm.

python -m fq_transforms.bench --out results
python -m fq_transforms.bench folder --help
python -m fq_transforms.bench scale --help
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from fq_transforms.bench import folder, full_size, gptq, host, mse, packing, peers, report, step, sweep
from fq_transforms.bench.cases import ALL, PEER_SHAPES, SHAPES, Shape, check_same, expert_weights, fits, user
from fq_transforms.bench.scale import launch as scale
from fq_transforms.bench.timing import device_us, eager_in_turn_us, eager_us, floor_us, host_us
from fq_transforms.formats import Format
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.ops.quantize.launch import clip_backward_triton
from fq_transforms.ops.quantize.reference import clip_backward_reference, fake_quantize_reference

Row = dict[str, Any]

PARTS = ["kernels", "host", "pack", "mse", "gptq", "step", "full-size"]
WHAT = (
    "kernels against their floors and peers; the host's time with and without private APIs; packing alone; the sweep "
    "over amax; GPTQ of a layer; training steps (needs Transformer Engine); a whole model"
)


def main() -> None:
    """Run the benchmark from the command line."""
    if sys.argv[1:2] == ["folder"]:  # which needs no GPU
        folder.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["scale"]:
        scale.main(sys.argv[2:], _commit())
        return
    parser = argparse.ArgumentParser(prog="python -m fq_transforms.bench", description=__doc__)
    parser.add_argument("what", nargs="?", choices=PARTS, default="kernels", help=WHAT)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for JSON, plot and page")
    parser.add_argument("--quick", action="store_true", help="the first shape only, and no peers")
    parser.add_argument("--no-peers", action="store_true", help="leave out the peers, which take minutes to compile")
    parser.add_argument("--sweep", action="store_true", help="only sweep the launch settings, and write their page")
    parser.add_argument("--commit", default=_commit(), help="the commit that the results name")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs a CUDA GPU, and found none")
    from tqdm import tqdm

    environment = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0))),
        "commit": options.commit,
    }
    rows: list[Row] = []
    if options.what != "kernels":
        _write_page(options.what, options.out, environment, tqdm, peers=not options.no_peers)
        return
    if options.sweep:
        with torch.no_grad():
            for shape in tqdm(sweep.SWEEP_SHAPES, desc="shapes"):
                rows += sweep.sweep(shape)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{environment['date']}-sweep.md").write_text(sweep.page(environment, rows))
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = SHAPES[:1] if options.quick else SHAPES
        for shape in tqdm(report.PASSES * shapes, desc="shapes"):
            measure(shape, rows)
            report.write(options.out, environment, rows)  # after each shape, so that nothing measured is lost
        for shape in tqdm(report.PASSES * shapes, desc="host"):
            measure_host(shape, rows)
        report.write(options.out, environment, rows)
        for shape in tqdm([] if options.quick or options.no_peers else PEER_SHAPES, desc="peers"):
            measure_peers(shape, rows)
            report.write(options.out, environment, rows)
    print(report.table(rows))


def _write_page(
    what: str, folder: Path, environment: dict[str, str], progress: Callable[..., Any], *, peers: bool
) -> None:
    """Measure one of the other parts; print the page, and write it beside its JSON after each row."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{environment['date']}-{what}"
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts, page = {
            "host": ((host.rows,), host.page),
            "pack": ((packing.rows,), packing.page),
            "step": ((partial(step.rows, peers=peers),), step.page),
            "full-size": ((full_size.rows,), full_size.page),
            "mse": ((mse.rows,), mse.page),
            "gptq": ((partial(gptq.rows, peers=peers),), gptq.page),
        }[what]
        for part in parts:
            for row in part(progress):
                rows.append(row)
                stem.with_suffix(".json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
                stem.with_suffix(".md").write_text(page(environment, rows))
    print(page(environment, rows))


def measure(shape: Shape, rows: list[Row]) -> None:
    """Add the device times of all operations and formats on one shape, each checked against the reference before.

    Passes over all shapes are far apart, each in its own memory: what slows a GPU down for seconds, and where tensors
    happen to lie, changes a time by up to 2 %.
    """
    torch.cuda.empty_cache()
    master = expert_weights(shape)
    inputs = {"bf16": [w.bfloat16() for w in master], "fp32 to bf16": [w.clone() for w in master]}
    grads = [torch.randn_like(w) for w in inputs["bf16"]]
    floors = _floors(master, grads)
    del master
    for format in (f for f in ALL if fits(f, shape)):
        for kind, us, floor in _measure_format(shape, format, inputs, grads, floors):
            _add(rows, kind, shape, format, us, floor)


def measure_host(shape: Shape, rows: list[Row]) -> None:
    """Add the times of whole calls to the forward rows of a shape, which show the median of all passes so far.

    Other work on the host disturbs it for seconds. Passes over all shapes are far apart, so it meets only one of them,
    and each round of a pass is on the core that is fastest then.
    """
    weights = [w.bfloat16() for w in expert_weights(shape)]
    for format in (f for f in ALL if fits(f, shape)):
        row = _forward_row(rows, shape, format)
        passes: list[Row] = row.setdefault("host_passes", [])
        passes.append(_host(weights, format))
        row |= {key: median(one[key] for one in passes) for key in passes[0]}


def measure_peers(shape: Shape, rows: list[Row]) -> None:
    """Add the peers' times to the forward rows of a shape, and ours in turn with them."""
    weights = [w.bfloat16() for w in expert_weights(shape)]
    for format in (f for f in ALL if fits(f, shape)):
        params, fq, state = user(weights, format)
        amax, global_amax = (None, None) if format.is_stateless else expert_amax(weights, format=format)
        calls: dict[str, Callable[[], object] | None] = {
            "torch_us": peers.stacked_torch(weights, amax, global_amax, format),
            "compile_us": peers.compiled_torch(weights, amax, global_amax, format),
            "modelopt_us": peers.modelopt_loop(weights, amax, format),
        }
        row = _forward_row(rows, shape, format)
        ready: dict[str, Callable[[], object]] = {
            "beside_us": lambda params=params, fq=fq, state=state: fq.fakequant(params, state)
        }
        for name, call in calls.items():
            row[name] = None
            try:
                if call is not None:
                    call()  # compiles
                    ready[name] = call
            except (
                RuntimeError,
                ValueError,
                AssertionError,
                TypeError,
            ) as error:  # a gap in the table, with its reason
                row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
        row |= eager_in_turn_us(ready)


def _floors(master: Tensor, grads: list[Tensor]) -> dict[str, float]:
    """Device time of copies of the same bytes, and of a sum of two streams into a third."""
    stacked, grad = master.bfloat16(), torch.stack(grads)
    out = torch.empty_like(stacked)
    return {
        "bf16": floor_us(lambda: out.copy_(stacked)),
        "fp32 to bf16": floor_us(lambda: out.copy_(master)),
        "three streams": floor_us(lambda: torch.add(stacked, grad, out=out)),
    }


def _measure_format(
    shape: Shape,
    format: Format,
    inputs: dict[str, list[Tensor]],
    grads: list[Tensor],
    floors: dict[str, float],
) -> list[tuple[str, float, float]]:
    """Kind, device time and floor of each operation."""
    where = f"{format.name}, {shape}"
    weights = inputs["bf16"]
    found: list[tuple[str, float, float]] = []
    amax = global_amax = None
    if not format.is_stateless:
        amax, global_amax = expert_amax(weights, format=format)
        check_same(amax, torch.stack([expert_amax_reference(w, format=format)[0] for w in weights]), f"amax, {where}")
        found.append(("amax", device_us(lambda: expert_amax(weights, format=format)), floors["bf16"]))
    for kind, tensors in inputs.items():

        def forward(tensors: list[Tensor] = tensors) -> tuple[Tensor, ...]:
            return fake_quantize(tensors, amax, global_amax, format=format, out_dtype=torch.bfloat16)

        for e, y in enumerate(forward()):
            a, g = (None if scale is None else scale[e] for scale in (amax, global_amax))
            wanted = fake_quantize_reference(tensors[e], a, g, format=format, out_dtype=torch.bfloat16)
            check_same(y, wanted, f"forward, {kind}, {where}")
        found.append((f"forward, {kind}", device_us(forward), floors[kind]))
    if format.clips and amax is not None:
        half = amax * 0.5

        def backward() -> Tensor:
            return clip_backward_triton(grads, weights, half, format=format, transposed=False)

        for e, y in enumerate(backward()):
            wanted = clip_backward_reference(grads[e], weights[e], half[e], format=format)
            check_same(y, wanted, f"clip backward, {where}")
        found.append(("clip backward", device_us(backward), floors["three streams"]))
    if not format.unit_scale_below:  # whose scales cannot be stored
        packed = packing.measure(shape, format, weights, amax, global_amax, floors["bf16"])
        found.append(("pack", *packed))
    return found


def _add(rows: list[Row], kind: str, shape: Shape, format: Format, us: float, floor: float) -> None:
    """Add a measurement to its row, which shows the medians of all so far and their ratio.

    `own` is the ratio to a floor of all bytes, those of the amax leaf too, 4 bytes per granule.
    """
    row = _find(rows, kind, shape, format)
    if row is None:
        row = Row(kind=kind, shape=str(shape), model=shape.model, format=format.name, device_passes=[])
        rows.append(row)
    row["device_passes"].append((us, floor))
    us, floor = map(median, zip(*row["device_passes"], strict=True))
    own = floor
    if kind != "pack":  # its floor is of all its bytes already
        weight_bytes = {"forward, bf16": 4, "forward, fp32 to bf16": 6, "clip backward": 6, "amax": 2}[kind]
        amax_bytes = 4 * prod(format.amax_shape(shape.out_features, shape.in_features))
        own *= 1 + amax_bytes / (weight_bytes * shape.out_features * shape.in_features)
    row |= {
        "us": us,
        "floor_us": floor,
        "ratio": us / floor if kind == "amax" else floor / us,
        "own": own / 2 / us if kind == "amax" else own / us,
    }


def _find(rows: list[Row], kind: str, shape: Shape, format: Format) -> Row | None:
    wanted = (kind, str(shape), format.name)
    return next((row for row in rows if (row["kind"], row["shape"], row["format"]) == wanted), None)


def _forward_row(rows: list[Row], shape: Shape, format: Format) -> Row:
    row = _find(rows, "forward, bf16", shape, format)
    assert row is not None
    return row


def _host(weights: list[Tensor], format: Format) -> Row:
    """Whole calls of the public function, as a user makes them, and torch's own cost of making as many views."""
    params, fq, state = user(weights, format)
    _, apart, _ = user(weights, format, separate=True)
    stacked = weights[0].new_empty((len(weights), *weights[0].shape))
    return {
        "host_us": host_us(lambda: fq.fakequant(params, state)),
        "call_us": eager_us(lambda: fq.fakequant(params, state)),
        "unbind_us": host_us(stacked.unbind),
        "separate_us": host_us(lambda: apart.fakequant(params, state)),
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
