"""Launcher of the report: one launch per group."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import Plan, Tile, constants_of, launch, matrices_of, shape_of, visit_plan
from fq_transforms.ops.report.kernel import report_kernel
from fq_transforms.ops.report.reference import Measures, half_step_beyond, scale_underflows

__all__ = ["report_triton"]

REPORT = Tile(2048, 2)  # the fewest instructions per weight with two warps or more; not timed yet


def report_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    tile: Tile | None = None,
) -> Measures:
    """`report_reference` of every expert of a group, [E] each: one launch, and sums over what its programs found."""
    inputs = matrices_of(weights)
    plan = report_plan(format, inputs.matrix, transposed, tile)
    places, device = (inputs.experts, plan.blocks), inputs.base.device
    sums = torch.empty((2, *places), dtype=torch.float64, device=device)
    counts = torch.empty((4, *places), dtype=torch.int32, device=device)
    launch(plan, (inputs,), (amax, global_amax, sums, counts))
    signal, noise = sums.sum(-1)
    clipped, zeroed, underflow = counts[:3].sum(-1, dtype=torch.int64)
    largest = counts[3].amax(-1).view(torch.float32)
    # Larger granules are few. Of blocks, a sum over the state would take a temporary of 8 bytes each.
    if format.scale == "fp32" and not format.has_blocks_along_in:
        assert amax is not None
        underflow = scale_underflows(amax, format).reshape(inputs.experts, -1).sum(1)
    return Measures(signal, noise, clipped, zeroed, underflow, largest)


@cache
def report_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None = None) -> Plan:
    """Of `report_kernel`."""
    lowest, highest = half_step_beyond(format)
    constants = constants_of(format) | {"LOWEST": lowest, "HIGHEST": highest}
    return visit_plan(report_kernel, format, shape_of(matrix, transposed), transposed, tile or REPORT, constants)
