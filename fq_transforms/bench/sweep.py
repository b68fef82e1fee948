"""`python -m fq_transforms.bench --sweep`: launch settings of each kernel, each timed against the floor of memory.

Each `launch.py` of `fq_transforms.ops` holds the settings that were chosen. All settings of a kernel give the same
bits, which is checked before each is timed.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.bench.cases import SHAPES, Shape
from fq_transforms.bench.timing import device_us, floor_us
from fq_transforms.formats import FORMATS, Format
from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.launch import Tile, results_for
from fq_transforms.ops.pack.launch import pack_triton
from fq_transforms.ops.quantize.launch import clip_backward_triton, fake_quantize_triton

Row = dict[str, Any]


class Sweep(NamedTuple):
    """An operation, a format, and the tiles that are tried."""

    operation: str
    format: Format
    tiles: list[Tile]


def tiles(weights: Sequence[int], warps: Sequence[int], steps: Sequence[int] = (1,)) -> list[Tile]:
    """All combinations that give each thread at least one 16-byte load of bf16."""
    return [Tile(*numbers) for numbers in product(weights, warps, steps) if numbers[0] >= 8 * 32 * numbers[1]]


# One strand of 32 weights per thread, or two: with less, threads would share a strand and exchange its numbers.
STRANDS = [Tile(strands * 32 * 32 * warps, warps) for warps in (1, 2, 4, 8) for strands in (1, 2)]
VISIT = tiles((1024, 2048, 4096), (1, 2, 4, 8))
VISITED = (
    "FP8",
    "INT8_PER_CHANNEL",
    "FP8_BLOCK",
    "INT4_BLOCK32",
    "INT4_BLOCK128",
    "NVFP4",
    "NVFP4_STATIC",
    "MXFP8",
    "MXFP4",
)
SWEEPS = [
    *(Sweep("forward", FORMATS[name], VISIT) for name in VISITED),
    *(Sweep("clip backward", FORMATS[name], VISIT) for name in ("FP8", "NVFP4_STATIC")),
    *(Sweep("pack", FORMATS[name], STRANDS) for name in (*VISITED, "MXFP6_E3M2")),
    Sweep("amax", FORMATS["FP8"], tiles((1024, 2048, 4096), (4, 8, 16), (8, 16))),
    Sweep("amax", FORMATS["NVFP4_STATIC"], tiles((2048, 4096), (4, 8), (1, 2, 4, 8))),
    Sweep("amax", FORMATS["INT4_BLOCK32"], tiles((2048, 4096), (4, 8), (1, 2, 4, 8))),
    Sweep("amax", FORMATS["FP8_PER_CHANNEL"], tiles((1024, 2048, 4096), (2, 4, 8))),
    Sweep("amax", FORMATS["FP8_BLOCK"], tiles((1024, 2048, 4096), (4, 8))),
]
# Many experts, and few larger ones.
SWEEP_SHAPES = [SHAPES[0], SHAPES[4]]


def sweep(shape: Shape, sweeps: Sequence[Sweep] = SWEEPS) -> Iterator[Row]:
    """One row per tile of each sweep on one shape: device time against its floor, `copy_` or three streams."""
    weights = [
        torch.randn(shape.out_features, shape.in_features, device="cuda").bfloat16() for _ in range(shape.experts)
    ]
    grads = [torch.randn_like(weight) for weight in weights]
    stacked, grad = torch.stack(weights), torch.stack(grads)
    out = torch.empty_like(stacked)
    two, three = floor_us(lambda: out.copy_(stacked)), floor_us(lambda: torch.add(stacked, grad, out=out))
    for operation, format, choices in sweeps:
        amax = global_amax = wanted = None
        if not format.is_stateless:
            amax, global_amax = expert_amax_triton(weights, format=format, transposed=False)
        for tile in choices:
            call = _call(operation, format, weights, grads, amax, global_amax, tile)
            found = call()
            wanted = found if wanted is None else wanted
            assert all(map(torch.equal, found, wanted)), f"{operation}, {format.name}: {tile} changes the result"
            us, floor = device_us(call), three if operation == "clip backward" else two
            if operation == "pack":  # which reads and writes less than a copy does
                leaves = (*weights, *found, *(leaf for leaf in (amax, global_amax) if leaf is not None))
                floor *= sum(leaf.nbytes for leaf in leaves) / (2 * stacked.nbytes)
            yield {
                "operation": operation,
                "format": format.name,
                "shape": str(shape),
                "tile": tile,
                "us": us,
                "ratio": us / floor if operation == "amax" else floor / us,
            }


def page(environment: dict[str, str], rows: Sequence[Row]) -> str:
    """The rows as a page: for each operation, format and shape its tiles, the best first."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    lines = [
        f"# Launch settings, {environment['date']}",
        "",
        f"`python -m fq_transforms.bench --sweep`: {facts}. A tile is weights / warps / steps. In brackets: floor over "
        "ours, for amax ours over `copy_`; median of graph replays, bf16.",
        "",
        "| operation | format | shape | tiles, the best first |",
        "| --- | --- | --- | --- |",
    ]
    cases = {(row["operation"], row["format"], row["shape"]) for row in rows}
    for case in sorted(cases):
        found = [row for row in rows if (row["operation"], row["format"], row["shape"]) == case]
        found.sort(key=lambda row: row["us"])
        cells = ", ".join(f"{'/'.join(map(str, row['tile']))} ({row['ratio']:.3f})" for row in found)
        lines.append(f"| {' | '.join(case)} | {cells} |")
    return "\n".join([*lines, ""])


def _call(
    operation: str,
    format: Format,
    weights: list[Tensor],
    grads: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    tile: Tile,
) -> Callable[[], tuple[Tensor, ...]]:
    options: dict[str, Any] = {"format": format, "transposed": False, "tile": tile}
    if operation == "forward":

        def forward() -> tuple[Tensor, ...]:
            out = results_for(weights, torch.bfloat16)
            fake_quantize_triton([out], weights, amax, global_amax, **options)
            return (out,)

        return forward
    if operation == "amax":
        return lambda: tuple(leaf for leaf in expert_amax_triton(weights, **options) if leaf is not None)
    if operation == "pack":
        return lambda: tuple(
            leaf.flatten().view(torch.uint8)
            for leaf in pack_triton(weights, amax, global_amax, **options)
            if leaf is not None
        )
    assert amax is not None, format.name
    half = amax * 0.5
    return lambda: (clip_backward_triton(grads, weights, half, **options),)
