"""Launcher of percentiles: one launch per group; for whole experts one per digit of the weights' bits, and one."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import Plan, Tile, launch, matrices_of, shape_of
from fq_transforms.ops.percentile.kernel import percentile_digit_kernel, percentile_kernel
from fq_transforms.ops.percentile.reference import positions

__all__ = ["HELD", "percentile_triton"]

# Weights that a thread keeps in registers, and the most that a program does. The kernels ran on an H200, but were not
# timed: no measurement chose these numbers, nor READ, SIDE_BY_SIDE and DIGIT below.
WEIGHTS_PER_THREAD = 32
HELD = 2**14
# Weights that a program takes at a time where they are more, and the granules side by side in memory that it takes at
# once: their rows are 64 bytes of bf16.
READ = 2**12
SIDE_BY_SIDE = 32
# Weights whose digit a program counts before it adds to memory.
DIGIT = Tile(4096, 4, 8)
# Bits of a digit, and the bits at the end of an fp32 number that a dtype never sets.
DIGIT_WIDTH = 8
LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def percentile_triton(
    weights: Sequence[Tensor],
    *,
    format: Format,
    transposed: bool,
    percentile: float,
    held: int = HELD,
    digit: Tile = DIGIT,
) -> Tensor:
    """`percentile_reference` of every expert of a group: [E, *amax_shape].

    One launch, whatever the number of experts. Granules of more weights than `held` are read once a bit in it. Per
    tensor, where a granule is a whole expert: one launch per digit of eight bits, two of bf16, three of fp16, four of
    fp32, each of which reads the weights, and one that reads none.

    Args:
        weights: As `expert_amax_triton` takes them.
        format: With a static amax.
        transposed: True if a matrix is stored [in, out].
        percentile: Within (0, 100].
        held: The most weights that a program keeps.
        digit: Of the launches a digit.

    Returns:
        A new fp32 tensor. Memory: 2 KiB an expert and digit per tensor, else none beside it.
    """
    inputs = matrices_of(weights)
    shape, device = shape_of(inputs.matrix, transposed), inputs.base.device
    amax = torch.empty((inputs.experts, *format.amax_shape(*shape)), dtype=torch.float32, device=device)
    rows, columns = format.block[::-1] if transposed else format.block
    known = _positions(inputs.matrix, (rows, columns), percentile, device)
    low = LOW_BITS[inputs.base.dtype]
    if format.block != (None, None):
        plan = percentile_plan(format, inputs.matrix, transposed, low, held)
        launch(plan, (inputs,), (*known, amax))
        return amax
    digits = digits_of(low)
    counts = torch.zeros((inputs.experts, digits, 2**DIGIT_WIDTH), dtype=torch.int64, device=device)
    above = torch.full((inputs.experts,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
    for number in range(digits + 1):
        plan = digit_plan(inputs.matrix, low, number, digit)
        launch(plan, (inputs,), (*known, counts, above, amax))
    return amax


@cache
def _positions(
    matrix: tuple[int, int], block: tuple[int | None, int | None], percentile: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions [2, inner or last row of granules, column] and fractions on the device; copied once, a copy waits."""
    sides = [side or size for size, side in zip(matrix, block, strict=True)]
    heights, widths = ([side, (size - 1) % side + 1] for size, side in zip(matrix, sides, strict=True))
    count = torch.tensor([[h * w for w in widths] for h in heights], device="cpu")
    first, second, fraction = positions(count, percentile)
    return torch.stack([first, second]).to(device), fraction.to(device)


@cache
def percentile_plan(format: Format, matrix: tuple[int, int], transposed: bool, low: int, held: int) -> Plan:
    """Of `percentile_kernel`."""
    height, width = matrix
    sides, granules = format.block, format.granules(*shape_of(matrix, transposed))
    if transposed:
        sides, granules = sides[::-1], granules[::-1]
    size = (sides[0] or height) * (sides[1] or width)
    chunk = 1 << (size - 1).bit_length()
    beside = SIDE_BY_SIDE if sides[1] == 1 else 1
    is_held = chunk * beside <= held
    if is_held:
        tile = max(beside, min(held, READ) // chunk)
    else:
        chunk, tile = max(1, min(held, READ) // beside), beside
    constants = {
        "LOW": low,
        "ROWS": sides[0] or 0,
        "COLUMNS": sides[1] or 0,
        "CHUNK": chunk,
        "TILE": tile,
        "HELD": is_held,
        "TRANSPOSED": transposed,
    }
    warps = max(1, chunk * tile // (32 * WEIGHTS_PER_THREAD))
    return Plan(percentile_kernel, -(-granules[0] * granules[1] // tile), (height, width, *granules), constants, warps)


def digits_of(low: int) -> int:
    """How many digits the bits of a dtype are."""
    return -(-(32 - low) // DIGIT_WIDTH)


@cache
def digit_plan(matrix: tuple[int, int], low: int, number: int, tile: Tile) -> Plan:
    """Of `percentile_digit_kernel`, for a digit by its number."""
    size, digits = matrix[0] * matrix[1], digits_of(low)
    programs = 1 if number == digits else -(-size // (tile.weights * tile.steps))
    constants = {
        "DIGIT": number,
        "DIGITS": digits,
        "WIDTH": DIGIT_WIDTH,
        "TILE": tile.weights,
        "STEPS": tile.steps,
    }
    return Plan(percentile_digit_kernel, programs, (size,), constants, tile.warps)
