"""Packing against its floor: the time in which `copy_` would read and write as many bytes."""

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from fq_transforms.bench.cases import ALL, SHAPES, Shape, check_same, expert_weights, fits
from fq_transforms.bench.timing import device_us, floor_us
from fq_transforms.formats import Format
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.pack.launch import pack_triton
from fq_transforms.ops.pack.reference import pack_reference

__all__ = ["measure", "page", "rows"]

Row = dict[str, Any]


def measure(
    shape: Shape, format: Format, weights: list[Tensor], amax: Tensor | None, global_amax: Tensor | None, copy_us: float
) -> tuple[float, float]:
    """Device time and floor in microseconds, once every expert has equalled the reference.

    Args:
        shape: Of the weights.
        format: What they are packed in.
        weights: One per expert.
        amax: From `expert_amax`, as `global_amax`; None for MX formats.
        global_amax: For static two-level formats.
        copy_us: Time of a copy of the weights.
    """

    def pack() -> tuple[Tensor, Tensor, Tensor | None]:
        return pack_triton(weights, amax, global_amax, format=format, transposed=False)

    packed = pack()
    for e, weight in enumerate(weights):
        a, g = (None if scale is None else scale[e] for scale in (amax, global_amax))
        wanted = pack_reference(weight, a, g, format=format)
        for found, leaf in zip(packed, wanted, strict=True):
            assert (found is None) == (leaf is None)
            if found is not None and leaf is not None:
                a, b = (t.flatten().view(torch.uint8) for t in (found[e], leaf))
                check_same(a, b, f"pack, {format.name}, {shape}")
    read = sum(t.nbytes for t in (*weights, amax, global_amax) if t is not None)
    written = sum(leaf.nbytes for leaf in packed if leaf is not None)
    copied = 2 * sum(weight.nbytes for weight in weights)
    return device_us(pack), copy_us * (read + written) / copied


def rows(progress: Callable[..., Any]) -> Generator[Row, None, None]:
    """One row per shape: floor over ours for each format that can be packed."""
    with torch.no_grad():
        for shape in progress(SHAPES, desc="pack"):
            stacked = expert_weights(shape).bfloat16()
            weights, out = list(stacked.unbind()), torch.empty_like(stacked)
            copy_us = floor_us(lambda stacked=stacked, out=out: out.copy_(stacked))
            row: Row = {"shape": str(shape), "model": shape.model, "copy_us": copy_us}
            for format in (f for f in ALL if fits(f, shape) and not f.unit_scale_below):
                amax, global_amax = (None, None) if format.is_stateless else expert_amax(weights, format=format)
                us, floor = measure(shape, format, weights, amax, global_amax, copy_us)
                row |= {format.name: floor / us, f"{format.name}_us": us}
            yield row


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown: formats by shapes."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    names = [format.name for format in ALL if any(format.name in row for row in rows)]
    lines = [["", *(row["shape"] for row in rows)], ["---"] * (len(rows) + 1)]
    lines.append(["`copy_` of the weights, us", *(f"{row['copy_us']:.1f}" for row in rows)])
    for name in names:
        cells = (f"{row[name]:.3f} ({row[f'{name}_us']:.1f})" if name in row else "" for row in rows)
        lines.append([name, *cells])
    return "\n".join(
        [
            f"# Packing, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench pack`: {facts}.",
            "",
            "The floor over ours, and our device time in microseconds: 1 is the speed of memory. The floor is the time "
            "that all bytes read and written take at `copy_`'s bandwidth; device time is the median of graph replays, "
            "bf16 in. Every expert equalled the reference before it was timed.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )
