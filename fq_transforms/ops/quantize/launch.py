"""Launchers of fake quantization and its gradients: one launch per group; and what torch.compile sees in their place.

Addresses cannot be traced, so torch.compile sees opaque operators. A format travels as its JSON, since an operator
takes tensors, numbers and strings only.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fq_transforms.formats import E4M3, Format
from fq_transforms.ops.launch import (
    Plan,
    Tile,
    call_key,
    constants_of,
    experts_of,
    format_of,
    launch,
    launch_again,
    matrices_of,
    results_for,
    shape_of,
    visit_plan,
)
from fq_transforms.ops.quantize.kernel import clip_backward_kernel, fake_quantize_kernel, lsq_backward_kernel
from fq_transforms.ops.quantize.reference import in_granules
from fq_transforms.rounding import Stream

__all__ = [
    "clip_backward_operator",
    "clip_backward_triton",
    "fake_quantize_operator",
    "fake_quantize_triton",
    "lsq_backward_operator",
    "lsq_backward_triton",
]

# Chosen by `python -m fq_transforms.bench --sweep`; bench/results has what was swept and what came out.
FORWARD = Tile(1024, 1)
FORWARD_WIDE = Tile(2048, 2)  # per channel, and NVFP4
BACKWARD = Tile(2048, 8)
STOCHASTIC = Tile(2048, 2)  # not swept yet: as the wide one
LSQ = Tile(2048, 8)  # not swept yet: as the clip backward
# Weights that the LSQ backward adds up before a sum is written, where granules are longer: a row, or a square block.
WIDEST_CHUNK = 128


def fake_quantize_triton(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor | None = None,
    *,
    format: Format,
    transposed: bool,
    stream: Stream | None = None,
    tile: Tile | None = None,
) -> None:
    """`fake_quantize_reference` of every expert of a group into `outs`, in one launch.

    Args:
        outs: Contiguous tensors of one dtype: one per weight, in its shape, or one for all, from `results_for`.
        weights: N tensors [*experts, ., .], as are all that follow those of `autograd.fake_quantize`.
        amax: As there.
        global_amax: As there.
        seed: int64, of no dims or [E]; with a stream `stochastic_reference` in place of the nearest.
        format: The numbers.
        transposed: True if a matrix is stored [in, out].
        stream: Which random bits.
        tile: Another than the one chosen.
    """
    key = None if tile is not None else call_key(outs, weights, (amax, global_amax, seed), format, transposed, stream)
    if launch_again(key, outs):
        return
    assert all(map(Tensor.is_contiguous, outs)), "a copy of an out would be written in its place"
    inputs = matrices_of(weights)
    plan = forward_plan(format, inputs.matrix, transposed, stream, seed is not None and seed.dim() > 0, tile)
    launch(plan, (inputs, matrices_of(outs, inputs.matrix)), (amax, global_amax, seed), key)


@cache
def forward_plan(
    format: Format,
    matrix: tuple[int, int],
    transposed: bool,
    stream: Stream | None = None,
    has_seeds: bool = False,
    tile: Tile | None = None,
) -> Plan:
    """Of `fake_quantize_kernel`: to the nearest, or with a stream at random, if so with a seed per expert."""
    kernel, shape, numbers = fake_quantize_kernel, shape_of(matrix, transposed), constants_of(format)
    if stream is None:
        tile = tile or (FORWARD_WIDE if format.block == (1, None) or format.scale == "e4m3" else FORWARD)
        nearest = numbers | {"STOCHASTIC": False, "SEEDS": False, "QUADS": False}
        plan = visit_plan(kernel, format, shape, transposed, tile, nearest)
        return replace(plan, numbers=plan.numbers + (None,) * 6)
    # With one scale, too, a row must stay a row: `visit_plan` would read a transposed matrix as if it were not.
    is_one = format.block == (None, None)
    rowwise = replace(format, block=(1, None)) if is_one else format
    plan = visit_plan(kernel, rowwise, shape, transposed, tile or STOCHASTIC, {})
    tiling = plan.constants | {"ROWS": 0, "COLUMNS": 0} if is_one else plan.constants
    granules = (1, 1) if is_one else plan.numbers[2:]
    is_quads = tiling["CHUNK"] % 4 == 0 and stream.column % 4 == 0
    by_chance = numbers | {"STOCHASTIC": True, "SEEDS": has_seeds, "QUADS": is_quads}
    return replace(plan, numbers=(*shape, *granules, *stream.numbers), constants=by_chance | tiling)


def clip_backward_triton(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor,
    *,
    format: Format,
    transposed: bool,
    tile: Tile = BACKWARD,
) -> Tensor:
    """`clip_backward_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    inputs = matrices_of(weights)
    out = results_for(weights, weights[0].dtype)
    plan = backward_plan(format, inputs.matrix, transposed, tile)
    launch(plan, (matrices_of(grads), inputs, matrices_of([out], inputs.matrix)), (amax,))
    return out.view(-1, *inputs.matrix)


@cache
def backward_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile) -> Plan:
    """Of `clip_backward_kernel`."""
    return visit_plan(clip_backward_kernel, format, shape_of(matrix, transposed), transposed, tile, {})


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
    out = results_for(weights, weights[0].dtype)
    plan = lsq_plan(format, inputs.matrix, transposed, tile)
    device, experts = out.device, inputs.experts
    out_features, in_features = shape_of(inputs.matrix, transposed)
    chunks = -(-in_features // plan.constants["CHUNK"])
    is_of_expert = format.block == (None, None) or format.dynamic
    chunk_sums = program_sums = None
    if not is_of_expert:
        chunk_sums = torch.empty((experts, out_features, chunks), dtype=torch.float32, device=device)
    if is_of_expert or format.has_global_amax:
        program_sums = torch.empty((experts, plan.blocks), dtype=torch.float32, device=device)
    groups = (matrices_of(grads), inputs, matrices_of([out], inputs.matrix))
    launch(plan, groups, (amax, global_amax, chunk_sums, program_sums))

    of_experts = None
    if program_sums is not None:
        of_experts = program_sums.sum(1)
        divisor = plan.constants["QMAX"] * (E4M3.max if format.scale == "e4m3" else 1.0)
        of_experts = of_experts / torch.full_like(of_experts, divisor)
    if chunk_sums is None:
        assert of_experts is not None
        return out.view(-1, *inputs.matrix), of_experts.view(amax.shape), None
    if not plan.constants["COMPLETE"]:
        columns = None if format.block[1] is None else format.block[1] // plan.constants["CHUNK"]
        chunk_sums = in_granules(chunk_sums, (format.block[0], columns)).sum((-3, -1))
        chunk_sums = chunk_sums / torch.full_like(chunk_sums, plan.constants["QMAX"])
    return out.view(-1, *inputs.matrix), chunk_sums.view(amax.shape), of_experts


@cache
def lsq_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile = LSQ) -> Plan:
    """Of `lsq_backward_kernel`."""
    plan = visit_plan(lsq_backward_kernel, format, shape_of(matrix, transposed), transposed, tile, {})
    out_features, in_features = shape_of(matrix, transposed)
    tiling = plan.constants
    if format.block != (None, None) and not format.has_blocks_along_in and not transposed:
        chunk = min(WIDEST_CHUNK, format.block[1] or WIDEST_CHUNK, in_features & -in_features)
        chunks = max(1, tile.weights // chunk)
        tiling = tiling | {"CHUNK": chunk, "TILE": chunks}
        plan = replace(plan, blocks=-(-out_features * (in_features // chunk) // chunks))
    numbers = {k: v for k, v in constants_of(format).items() if k not in ("EXPONENT_ROUNDING", "MAX_BITS")}
    return replace(plan, constants=numbers | {"COMPLETE": format.has_blocks_along_in} | tiling)


@torch.library.custom_op("fq_transforms::fake_quantize", mutates_args=("outs",))
def fake_quantize_operator(
    outs: list[Tensor],
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor | None,
    format: str,
    transposed: bool,
    stream: list[int] | None,
) -> None:
    """`fake_quantize_triton`, for torch.compile; a stream as its numbers, in their order."""
    draws = None if stream is None else Stream(*stream)
    numbers = format_of(format)
    fake_quantize_triton(outs, weights, amax, global_amax, seed, format=numbers, transposed=transposed, stream=draws)


@torch.library.custom_op("fq_transforms::clip_backward", mutates_args=())
def clip_backward_operator(
    grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool
) -> Tensor:
    """`clip_backward_triton`, for torch.compile."""
    return clip_backward_triton(grads, weights, amax, format=format_of(format), transposed=transposed)


@clip_backward_operator.register_fake
def _(grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool) -> Tensor:
    return weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]))


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
        grads, weights, amax, global_amax, format=format_of(format), transposed=transposed
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
    of_global = amax.new_empty(0) if global_amax is None else amax.new_empty(global_amax.shape)
    out = weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]))
    return out, amax.new_empty(amax.shape), of_global
