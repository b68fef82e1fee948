# pyright: reportPrivateUsage=false
# Part of `ops.launch`, split by operation: what is private there is private to both.
"""Launcher of stochastic rounding, and what torch.compile sees in its place."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.calls import launch
from fq_transforms.ops.launch import _parse
from fq_transforms.ops.matrices import experts_of, matrices_of, results_for, shape_of
from fq_transforms.ops.plans import Plan, Tile, forward_plan, visit_plan
from fq_transforms.ops.quantize.stochastic_kernel import stochastic_kernel
from fq_transforms.rounding import Stream

__all__ = ["stochastic_operator", "stochastic_separate_operator", "stochastic_separate_triton", "stochastic_triton"]

# Not swept yet: as the forward kernel's wide tile.
STOCHASTIC = Tile(2048, 2)


def stochastic_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    *,
    stream: Stream,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
    tile: Tile = STOCHASTIC,
) -> Tensor:
    """`stochastic_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are.

    `seed` is int64, of no dimensions or [E].
    """
    inputs = matrices_of(weights)
    out = results_for(inputs, out_dtype)
    plan = _stochastic_plan(format, inputs.matrix, transposed, stream, seed.dim() > 0, tile)
    launch(stochastic_kernel, plan, (inputs, out), (amax, global_amax, seed))
    return out.base


def stochastic_separate_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    *,
    stream: Stream,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`stochastic_triton` into one new tensor a weight, in its shape, none of which keeps another alive."""
    inputs = matrices_of(weights)
    outs = [torch.empty(weight.shape, dtype=out_dtype, device=weight.device) for weight in weights]
    plan = _stochastic_plan(format, inputs.matrix, transposed, stream, seed.dim() > 0, STOCHASTIC)
    launch(stochastic_kernel, plan, (inputs, matrices_of(outs)), (amax, global_amax, seed))
    return outs


@cache
def _stochastic_plan(
    format: Format, matrix: tuple[int, int], transposed: bool, stream: Stream, seeds: bool, tile: Tile
) -> Plan:
    numbers = forward_plan(format, matrix, transposed, None).constants
    is_one = format.block == (None, None)
    # With one scale, too, a row must stay a row: `visit_plan` would read a transposed matrix as if it were not.
    visited = replace(format, block=(1, None)) if is_one else format
    plan = visit_plan(visited, shape_of(matrix, transposed), transposed, tile, {})
    tiling = plan.constants | {"ROWS": 0, "COLUMNS": 0} if is_one else plan.constants
    granules = (1, 1) if is_one else plan.numbers[2:]
    is_quads = tiling["CHUNK"] % 4 == 0 and stream.column % 4 == 0
    constants: dict[str, Any] = {name: value for name, value in numbers.items() if name not in tiling}
    constants |= {"SEEDS": seeds, "QUADS": is_quads} | tiling
    return plan._replace(numbers=(*plan.numbers[:2], *granules, *stream.numbers), constants=constants)


@torch.library.custom_op("fq_transforms::stochastic", mutates_args=())
def stochastic_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    stream: list[int],
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`stochastic_triton`, for torch.compile; the stream as its numbers, in their order."""
    return stochastic_triton(
        weights,
        amax,
        global_amax,
        seed,
        stream=Stream(*stream),
        format=_parse(format),
        transposed=transposed,
        out_dtype=out_dtype,
    )


@stochastic_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    stream: list[int],
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return weights[0].new_empty((experts_of(weights), *weights[0].shape[-2:]), dtype=out_dtype)


@torch.library.custom_op("fq_transforms::stochastic_separate", mutates_args=())
def stochastic_separate_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    stream: list[int],
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`stochastic_separate_triton`, for torch.compile."""
    return stochastic_separate_triton(
        weights,
        amax,
        global_amax,
        seed,
        stream=Stream(*stream),
        format=_parse(format),
        transposed=transposed,
        out_dtype=out_dtype,
    )


@stochastic_separate_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    seed: Tensor,
    stream: list[int],
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    return [weight.new_empty(weight.shape, dtype=out_dtype) for weight in weights]
