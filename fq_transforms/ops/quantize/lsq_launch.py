# pyright: reportPrivateUsage=false
# Part of `ops.launch`, split by operation: what is private there is private to both.
"""Launcher of the backward of learned scales, and what torch.compile sees in its place."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fq_transforms.formats import E4M3, Format
from fq_transforms.ops.calls import launch
from fq_transforms.ops.launch import _parse
from fq_transforms.ops.matrices import experts_of, matrices_of, results_for, shape_of
from fq_transforms.ops.plans import Plan, Tile, forward_plan, visit_plan
from fq_transforms.ops.quantize.lsq_kernel import lsq_backward_kernel

__all__ = ["lsq_backward_operator", "lsq_backward_triton"]

# Not swept yet: as the clip backward.
LSQ = Tile(2048, 8)
# Weights that are added up before a sum is written, where granules are longer: a row, or a square block.
WIDEST_CHUNK = 128


def lsq_backward_triton(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    tile: Tile = LSQ,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lsq_backward_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are.

    The gradients of amax and global amax are in their shapes. Where a granule is more than a chunk, what the launch
    leaves is added by PyTorch: a number for 128 weights at best, fewer where `in` is odd or matrices are transposed.
    """
    inputs = matrices_of(weights)
    out = results_for(inputs, inputs.base.dtype)
    plan = _lsq_plan(format, inputs.matrix, transposed, tile)
    device, experts = inputs.base.device, inputs.experts
    out_features, in_features, _, _ = plan.numbers
    chunks = -(-in_features // plan.constants["CHUNK"])
    is_of_expert = format.block == (None, None) or format.dynamic
    chunk_sums = program_sums = None
    if not is_of_expert:
        chunk_sums = torch.empty((experts, out_features, chunks), dtype=torch.float32, device=device)
    if is_of_expert or format.has_global_amax:
        program_sums = torch.empty((experts, plan.blocks), dtype=torch.float32, device=device)
    scales = (amax, global_amax, chunk_sums, program_sums)
    launch(lsq_backward_kernel, plan, (matrices_of(grads), inputs, out), scales)

    of_experts = None
    if program_sums is not None:
        of_experts = program_sums.sum(1)
        divisor = plan.constants["QMAX"] * (E4M3.max if format.scale == "e4m3" else 1.0)
        of_experts = of_experts / torch.full_like(of_experts, divisor)
    if chunk_sums is None:
        assert of_experts is not None
        return out.base, of_experts.view(amax.shape), None
    if not plan.constants["COMPLETE"]:
        rows, columns = amax.shape[-2:]
        r = format.block[0] or out_features
        c = chunks if format.block[1] is None else format.block[1] // plan.constants["CHUNK"]
        ragged = (0, columns * c - chunks, 0, rows * r - out_features)
        tiles = torch.nn.functional.pad(chunk_sums, ragged).unflatten(-1, (columns, c)).unflatten(-3, (rows, r))
        chunk_sums = tiles.sum((-3, -1))
        chunk_sums = chunk_sums / torch.full_like(chunk_sums, plan.constants["QMAX"])
    return out.base, chunk_sums.view(amax.shape), of_experts


@cache
def _lsq_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile) -> Plan:
    plan = visit_plan(format, shape_of(matrix, transposed), transposed, tile, {})
    out_features, in_features, _, _ = plan.numbers
    tiling = plan.constants
    if format.block != (None, None) and not format.has_blocks_along_in and not transposed:
        chunk = min(WIDEST_CHUNK, format.block[1] or WIDEST_CHUNK, in_features & -in_features)
        chunks = max(1, tile.weights // chunk)
        tiling = tiling | {"CHUNK": chunk, "TILE": chunks}
        plan = plan._replace(blocks=-(-out_features * (in_features // chunk) // chunks))
    names = ("ELEMENT", "SCALE", "DYNAMIC", "QMAX", "LOW", "HIGH", "MIN_EXPONENT", "MANTISSA")
    names += ("MIN_SCALE", "UNIT_SCALE_BELOW")
    numbers = forward_plan(format, matrix, transposed, None).constants
    constants = {name: numbers[name] for name in names} | {"COMPLETE": format.has_blocks_along_in}
    return plan._replace(constants=constants | tiling)


@torch.library.custom_op("fq_transforms::lsq_backward", mutates_args=())
def lsq_backward_operator(
    grads: list[Tensor],
    weights: list[Tensor],
    amax: Tensor,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lsq_backward_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    out, of_amax, of_global = lsq_backward_triton(
        grads, weights, amax, global_amax, format=_parse(format), transposed=transposed
    )
    return out, of_amax, amax.new_empty(0) if of_global is None else of_global


@lsq_backward_operator.register_fake
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    amax: Tensor,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]))
    of_global = amax.new_empty(0) if global_amax is None else amax.new_empty(global_amax.shape)
    return out, amax.new_empty(amax.shape), of_global
