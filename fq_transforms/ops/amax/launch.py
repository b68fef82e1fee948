"""Launcher of amax: one launch per group; and what torch.compile sees in its place."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fq_transforms.formats import FP8, Format
from fq_transforms.ops.amax.kernel import expert_amax_kernel
from fq_transforms.ops.launch import Plan, Tile, experts_of, format_of, launch, matrices_of, shape_of, visit_plan

__all__ = ["expert_amax_operator", "expert_amax_triton"]

# Chosen by `python -m fq_transforms.bench --sweep`; bench/results has what was swept and what came out.
AMAX = {
    "expert": Tile(1024, 4, 8),
    "blocks": Tile(4096, 8, 2),
    "rows": Tile(1024, 4),
    "square": Tile(4096, 8),
    "scatter": Tile(2048, 4),
}
# Weights of a row that the kernel takes at a time, per channel: two warps of 16-byte loads.
ROW_CHUNK = 512


def expert_amax_triton(
    weights: Sequence[Tensor], *, format: Format, transposed: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every expert of a group, in one launch: [E, *amax_shape], and [E] or None."""
    inputs = matrices_of(weights)
    plan = amax_plan(format, inputs.matrix, transposed, tile)
    shape = (inputs.experts, *format.amax_shape(*shape_of(inputs.matrix, transposed)))
    is_shared = plan.constants["SWEEP"] == "scatter" or len(shape) == 1  # several programs meet in one granule
    amax = _maxima(shape, inputs.base.device, is_shared)
    global_amax = _maxima(shape[:1], inputs.base.device, True) if plan.constants["GLOBAL"] else None
    launch(plan, (inputs,), (amax, global_amax))
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


def _maxima(shape: tuple[int, ...], device: torch.device, is_shared: bool) -> Tensor:
    """Memory for maxima, as integers; zero bits, the identity, where atomics add to it."""
    make = torch.zeros if is_shared else torch.empty
    return make(shape, dtype=torch.int32, device=device)


@cache
def amax_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None = None) -> Plan:
    """Of `expert_amax_kernel`."""
    out_features, in_features = shape_of(matrix, transposed)
    if format.dynamic:  # what is calibrated is the whole expert, whatever the element
        format = FP8
    rows, columns = format.block
    if format.block == (None, None):
        sweep = "expert"
    elif transposed:
        sweep = "scatter"
    else:
        sweep = "rows" if columns is None else "blocks" if rows == 1 else "square"
    tile = tile or AMAX[sweep]
    constants = {"SWEEP": sweep, "GLOBAL": format.has_global_amax, "STEPS": tile.steps}
    plan = visit_plan(expert_amax_kernel, format, (out_features, in_features), transposed, tile, constants)
    if sweep in ("expert", "blocks"):
        return replace(plan, blocks=-(-plan.blocks // tile.steps))
    if sweep == "rows":
        rows = max(1, tile.weights // ROW_CHUNK)
        tiling = {"CHUNK": ROW_CHUNK, "TILE": rows}
        return replace(plan, blocks=-(-out_features // rows), constants=plan.constants | tiling)
    if sweep == "square":
        tiling = {"CHUNK": columns, "TILE": max(1, min(rows or 1, tile.weights // (columns or 1)))}
        blocks_out, blocks_in = format.granules(out_features, in_features)
        return replace(plan, blocks=blocks_out * blocks_in, constants=plan.constants | tiling)
    return plan


@torch.library.custom_op("fq_transforms::expert_amax", mutates_args=())
def expert_amax_operator(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """`expert_amax_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    amax, global_amax = expert_amax_triton(weights, format=format_of(format), transposed=transposed)
    return amax, amax.new_empty(0) if global_amax is None else global_amax


@expert_amax_operator.register_fake
def _(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    a, b = weights[0].shape[-2:]
    numbers, experts = format_of(format), experts_of(weights)
    shape = numbers.amax_shape(*shape_of((a, b), transposed))
    new_empty, globals_ = weights[0].new_empty, experts * numbers.has_global_amax
    return new_empty((experts, *shape), dtype=torch.float32), new_empty(globals_, dtype=torch.float32)
