"""The launcher of the sweep over amax: one launch per group, whatever is tried."""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import Plan, constants_of, launch, matrices_of, shape_of
from fq_transforms.ops.sweep.kernel import sweep_kernel
from fq_transforms.ops.sweep.reference import (
    BELOW,
    MARGIN,
    SCALES,
    UNDERFLOW,
    WINDOW,
    Search,
    chunk_of,
    limit,
    margin_of,
    pick,
    shift_of,
    units_of,
)

__all__ = ["sweep_triton"]

# Chunks per thread, and warps per program; 32 weights of a granule of many chunks spare exchanges between threads.
WARPS_BLOCKS, WARPS_SUMS = 4, 1
CHUNKS_PER_THREAD_SUMS = 2
# Of a form a thread keeps four numbers a weight in registers, for so many weights; a wider block takes more threads, of
# one warp, which exchange numbers without a barrier. Not measured yet: read from what ptxas made.
WEIGHTS_PER_THREAD_FORMS = 32


def sweep_triton(
    weights: Sequence[Tensor],
    amax: Tensor,
    global_amax: Tensor | None,
    importance: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    search: Search,
) -> Tensor:
    """`sweep_reference` of every expert of a group, in one launch: [E, *amax_shape].

    Args:
        weights: As `expert_amax_triton` takes them.
        amax: fp32 [E, *amax_shape], of max.
        global_amax: fp32 [E], static two-level formats only.
        importance: fp32 [E, in] or [E, in / B, B, B], as the reference takes them, or None.
        format: The numbers.
        transposed: True if a matrix is stored [in, out].
        search: What is tried.

    Returns:
        A new tensor. Memory: 8 bytes per granule and candidate where a granule has many chunks, else none beside it.
    """
    inputs = matrices_of(weights)
    is_local = importance is not None and importance.dim() == 4
    plan = sweep_plan(format, inputs.matrix, transposed, inputs.base.element_size(), search, is_local=is_local)
    shape, count = shape_of(inputs.matrix, transposed), search.count
    device = inputs.base.device
    ratios = _ratios(search, device)
    amax = amax.contiguous()
    if format.has_blocks_along_in:
        result = torch.empty_like(amax)
        launch(plan, (inputs,), (amax, global_amax, importance, ratios, result))
        return result
    sums = torch.zeros((inputs.experts, prod(amax.shape[1:]), count), dtype=torch.int64, device=device)
    launch(plan, (inputs,), (amax, global_amax, importance, ratios, sums))
    sums = sums.view(*amax.shape, count)
    trials = ((amax * ratios[k], sums[..., k]) for k in range(1, count))
    return pick(amax, units_of(amax)[1], limit(sums[..., 0], format, shape), trials, format)


@cache
def _ratios(search: Search, device: torch.device) -> Tensor:
    """The ratios on the device, that of max first; copied once, since a copy waits for the host."""
    return torch.tensor((1.0, *search.ratios), dtype=torch.float32, device=device)


@cache
def sweep_plan(
    format: Format,
    matrix: tuple[int, int],
    transposed: bool,
    bytes_per_weight: int,
    search: Search,
    *,
    is_local: bool = False,
) -> Plan:
    """Of `sweep_kernel`."""
    out_features, in_features = shape = shape_of(matrix, transposed)
    rows, columns = format.granules(*shape)
    chunk = chunk_of(format, in_features)
    is_block = format.has_blocks_along_in
    warps = WARPS_BLOCKS if is_block and chunk <= 32 else WARPS_SUMS
    chunks = 32 * warps * (1 if is_block else CHUNKS_PER_THREAD_SUMS)
    if is_local:
        chunks = max(1, 32 * warps * WEIGHTS_PER_THREAD_FORMS // max(WEIGHTS_PER_THREAD_FORMS, chunk))
    if transposed or is_local:
        programs = -(-out_features // chunks) * (in_features // chunk)
    elif is_block:
        programs = -(-rows * columns // chunks)
    else:
        height, width = format.block[0] or out_features, (format.block[1] or in_features) // chunk
        programs = rows * columns * -(-height * width // chunks)
    numbers = constants_of(format)
    names = ("ELEMENT", "SCALE", "DIVIDES", "QMAX", "LOW", "HIGH", "MIN_EXPONENT", "MANTISSA", "MIN_SCALE")
    constants = {
        "KIND": search.kind,
        "COUNT": search.count,
        **{name: numbers[name] for name in names},
        "LOCAL": is_local,
        "DOUBT": margin_of(chunk),
        "UNDERFLOW": UNDERFLOW,
        "SHIFT": 0 if is_block else shift_of(format, shape),
        "KEPT": 1 - 2.0**-MARGIN,
        "WINDOW": WINDOW,
        "BELOW": BELOW,
        "SCALES": SCALES,
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "PIECE": min(16 // bytes_per_weight, chunk),
        "TILE": chunks,
        "TRANSPOSED": transposed,
    }
    return Plan(sweep_kernel, programs, (out_features, in_features, rows, columns), constants, warps)
