"""`python -m fq_transforms.bench mse`: the sweep over amax, against the larger of its two floors.

    bytes         each weight read once, its leaves read and written, at the bandwidth of `copy_`
    arithmetic    weights * candidates * instructions / (SMs * 128 lanes * clock)

An SM issues one instruction for each of four warps, 128 lanes, per clock. Instructions are what the formulas need per
weight and candidate, each counted once, at the full rate: no loads, no addresses, no work per chunk. No sweep that
tries every candidate with these formulas can be faster; what the chip does at half rate (logic) makes it slower.
"""

import subprocess
from collections.abc import Callable, Generator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

import fq_transforms as fqt
from fq_transforms.bench.cases import SHAPES, Shape
from fq_transforms.bench.timing import device_us, floor_us
from fq_transforms.calibrate import scale_search
from fq_transforms.formats import Format, IntElement
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.sweep.autograd import in_units, swept_amax
from fq_transforms.ops.sweep.reference import Search, sweep_reference

__all__ = ["arithmetic_floor_us", "instructions_of", "page", "rows"]

Row = dict[str, Any]

LANES = 128
# Per weight and candidate, in the order of `fq_transforms.ops.sweep.kernel`.
INSTRUCTIONS = {
    "int": ("* s", "min", "max", "+ magic", "- magic", "* 1/s", "fma", "fma", "x -", "square", "sum"),
    "fp8": ("* s", "min", "exponent", "max", "fma", "fma", "* 1/s", "x -", "square", "sum"),
    "e2m1": ("min", "* 1/s", "fma", "fma", "exponent", "max", "fma", "fma", "* s", "x -", "square", "sum"),
}
FORMATS = [
    fqt.FP8,
    fqt.FP8_PER_CHANNEL,
    fqt.FP8_BLOCK,
    fqt.INT8,
    fqt.INT8_PER_CHANNEL,
    fqt.INT4_BLOCK32,
    fqt.INT4_BLOCK128,
    fqt.NVFP4_STATIC,
]
MOST = 3.0  # the limit: a sweep may take this many times its floor


def instructions_of(format: Format, *, weighted: bool = False, local: bool = False) -> int:
    """Instructions per weight and candidate; one more if the error is weighted, a row of H if it is a form.

    Example:
        >>> instructions_of(fqt.INT8), instructions_of(fqt.FP8), instructions_of(fqt.NVFP4_STATIC)
        (11, 10, 12)
        >>> instructions_of(fqt.NVFP4_STATIC, local=True)
        45
    """
    kind = "int" if isinstance(format.element, IntElement) else "e2m1" if format.scale == "e4m3" else "fp8"
    columns = format.block[1] or 0
    return len(INSTRUCTIONS[kind]) + weighted + local * (2 * columns + 1)  # d * r, then a product and a sum a column


def arithmetic_floor_us(
    format: Format,
    shape: Shape,
    candidates: int,
    *,
    processors: int,
    clock_mhz: float,
    weighted: bool = False,
    local: bool = False,
) -> float:
    """Microseconds that the instructions of a sweep take at the full issue rate.

    Args:
        format: The format.
        shape: Of the group.
        candidates: How many amax are tried, the largest magnitude among them.
        processors: SMs of the chip.
        clock_mhz: Its highest clock.
        weighted: With importance.
        local: With second moments of blocks.

    Example:
        >>> round(arithmetic_floor_us(fqt.FP8, SHAPES[0], 22, processors=132, clock_mhz=1980.0))
        1050
    """
    weights = shape.experts * shape.out_features * shape.in_features
    lanes = weights * candidates * instructions_of(format, weighted=weighted, local=local)
    return lanes / (processors * LANES * clock_mhz)


def rows(progress: Callable[..., Any]) -> Generator[Row, None, None]:
    """One row per format on Nemotron-3-Nano's fc1 at EP=4, some with weighted errors, by channel and by block.

    Each is checked before it is timed.

    Raises:
        SystemExit: An amax is not the reference's.
    """
    shape = SHAPES[0]
    processors = torch.cuda.get_device_properties().multi_processor_count
    clock_mhz = _clock_mhz()
    generator = torch.Generator("cuda").manual_seed(0)
    size = (shape.out_features, shape.in_features)
    weights = [torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(shape.experts)]
    stacked = torch.stack(weights)
    out = torch.empty_like(stacked)
    copy_us = floor_us(lambda: out.copy_(stacked))
    ones = torch.rand((shape.experts, shape.in_features), generator=generator, device="cuda")
    cases = [(format, None) for format in FORMATS] + [(fqt.INT4_BLOCK32, ones), (fqt.NVFP4_STATIC, ones)]
    cases += [(format, _moments(format, shape, generator)) for format in FORMATS if format.has_blocks_along_in]
    for format, importance in progress(cases, desc="mse"):
        kind = "" if importance is None else "weighted" if importance.dim() == 2 else "local"
        search = _search(format, importance)
        amax, global_amax = expert_amax(weights, format=format)
        given = (format, search, amax, global_amax, importance)
        call = _checked(weights, *given)
        both = _checked(weights, *given, with_max=True)
        moved = sum(leaf.nbytes for leaf in (amax, amax, global_amax, importance) if leaf is not None)
        bytes_us = copy_us * (stacked.nbytes + moved) / (2 * stacked.nbytes)
        chip: dict[str, Any] = {"processors": processors, "clock_mhz": clock_mhz}
        counted = {"weighted": kind == "weighted", "local": kind == "local"}
        arithmetic_us = arithmetic_floor_us(format, shape, search.count, **counted, **chip)
        us = device_us(call)
        yield {
            "format": format.name + {"": "", "weighted": ", weighted", "local": ", local Hessian"}[kind],
            "shape": str(shape),
            "tried": search.count,
            "instructions": instructions_of(format, **counted),
            "us": us,
            "with_max_us": device_us(both),
            "bytes_us": bytes_us,
            "arithmetic_us": arithmetic_us,
            "ratio": us / max(bytes_us, arithmetic_us),
            **chip,
        }


def page(environment: dict[str, str], rows: Sequence[Row]) -> str:
    """The rows as a page, which says how the floors are made."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    header = ["format", "shape", "tried", "us", "with max us", "bytes us", "arithmetic us", "us over the larger"]
    lines = [header, ["---"] * len(header)] + [
        [
            row["format"],
            row["shape"],
            str(row["tried"]),
            *(f"{row[key]:.0f}" for key in ("us", "with_max_us", "bytes_us", "arithmetic_us")),
            f"{row['ratio']:.2f}" + " (above the limit)" * (row["ratio"] > MOST),
        ]
        for row in rows
    ]
    chip = f"{rows[0]['processors']} SMs at {rows[0]['clock_mhz']:.0f} MHz" if rows else ""
    counts = "; ".join(f"{kind} {len(some)}: {', '.join(some)}" for kind, some in INSTRUCTIONS.items())
    return "\n".join(
        [
            f"# The sweep over amax, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench mse`: {facts}. Each amax equalled the reference's bit for bit before it "
            "was timed. Device time is the median of graph replays, bf16. With max: with the pass for the largest "
            f"magnitudes before it. The limit is {MOST:.0f} times the larger floor.",
            "",
            "Bytes: each weight read once, the leaves read and written, at `copy_`'s bandwidth. Arithmetic: weights * "
            f"tried * instructions / (SMs * {LANES} * clock), {chip}; instructions per weight and candidate: "
            f"{counts}; one more if weighted; a product and a sum for each weight of the block, and one more, with its "
            "local Hessian.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _moments(format: Format, shape: Shape, generator: torch.Generator) -> Tensor:
    """Second moments of blocks of inputs that go together, by expert."""
    side = format.block[1] or 1
    size = (shape.experts, shape.in_features // side, 2 * side, side)
    x = torch.randn(size, generator=generator, device="cuda") + torch.randn(
        (*size[:-1], 1), generator=generator, device="cuda"
    )
    return x.mT @ x / (2 * side)


def _search(format: Format, importance: Tensor | None) -> Search:
    """What `Mse()` tries."""
    if format.scale == "e4m3":
        return scale_search(format, is_weighted=importance is not None)
    return Search("ratios", Mse().ratios)


def _checked(
    weights: list[Tensor],
    format: Format,
    search: Search,
    amax: Tensor,
    global_amax: Tensor | None,
    importance: Tensor | None,
    *,
    with_max: bool = False,
) -> Callable[[], Tensor]:
    """The call, after it has given the reference's amax."""

    def call() -> Tensor:
        leaves = expert_amax(weights, format=format) if with_max else (amax, global_amax)
        return swept_amax(weights, *leaves, importance, format=format, search=search)

    found = call()
    units = None if importance is None else in_units(importance)
    for e, weight in enumerate(weights):
        g, h = (None if leaf is None else leaf[e] for leaf in (global_amax, units))
        wanted = sweep_reference(weight, amax[e], g, h, format=format, search=search)
        if not torch.equal(found[e], wanted):
            differ = int((found[e] != wanted).sum())
            raise SystemExit(f"{format.name}, expert {e}: {differ} of {prod(wanted.shape)} differ from the reference")
    return call


def _clock_mhz() -> float:
    """The highest clock of the SMs."""
    uuid = torch.cuda.get_device_properties().uuid
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
