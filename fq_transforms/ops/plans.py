"""All of a launch that comes from the format and the shape: the programs, their tiles, and the kernel's constants."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.matrices import shape_of
from fq_transforms.ops.pack.reference import code_bits
from fq_transforms.ops.report.reference import half_step_beyond

__all__ = [
    "BACKWARD",
    "STRAND",
    "Plan",
    "Tile",
    "amax_plan",
    "backward_plan",
    "forward_plan",
    "pack_plan",
    "report_plan",
    "visit_plan",
]


class Tile(NamedTuple):
    """Weights that a program works on at a time, its warps, and how many such tiles it takes one after the other."""

    weights: int
    warps: int
    steps: int = 1


# Chosen by `python -m fq_transforms.bench --sweep`; bench/results has what was swept and what came out.
FORWARD = Tile(1024, 1)
FORWARD_WIDE = Tile(2048, 2)  # per channel, and NVFP4
BACKWARD = Tile(2048, 8)
PACK = Tile(4096, 4)  # one strand of 32 weights a thread, so that its scale is where its weights are
PACK_WORDS = Tile(4096, 2)  # two such strands where codes are less than a byte: fewer instructions a weight
PACK_TRANSPOSED = Tile(2048, 1)  # fewest exchanges between threads
REPORT = Tile(2048, 2)  # the fewest instructions a weight with two warps or more; not timed yet
AMAX = {
    "expert": Tile(1024, 4, 8),
    "blocks": Tile(4096, 8, 2),
    "rows": Tile(1024, 4),
    "square": Tile(4096, 8),
    "scatter": Tile(2048, 4),
}
# Weights of a row that the amax kernel takes at a time, per channel: two warps of 16-byte loads.
ROW_CHUNK = 512
# Weights that a thread packs: 16 bytes of four bits, and the whole block of an MX format.
STRAND = 32


class Plan(NamedTuple):
    """All of a launch that comes from the format and the shape: made once, then looked up.

    `numbers` and `constants` are in the order of the kernel's arguments.
    """

    blocks: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    warps: int


@cache
def forward_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> Plan:
    """Of `kernels.fake_quantize_kernel`."""
    tile = tile or (FORWARD_WIDE if format.block == (1, None) or format.scale == "e4m3" else FORWARD)
    element = format.element
    is_int = isinstance(element, IntElement)
    constants = {
        "ELEMENT": "int" if is_int else "float",
        "SCALE": format.scale,
        "DYNAMIC": format.dynamic,
        "QMAX": float(element.qmax if is_int else element.max),
        "LOW": float(element.low) if is_int else 0.0,
        "HIGH": float(element.high) if is_int else 0.0,
        "MIN_EXPONENT": 0 if is_int else element.min_exponent,
        "MANTISSA": 0 if is_int else element.mantissa_bits,
        "MIN_SCALE": format.min_scale,
        "UNIT_SCALE_BELOW": format.unit_scale_below,
        "EXPONENT_ROUNDING": format.exponent_rounding,
        "MAX_BITS": 0 if is_int else element.max_bits,
    }
    return visit_plan(format, shape_of(matrix, transposed), transposed, tile, constants)


@cache
def report_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> Plan:
    """Of `report_kernel.report_kernel`."""
    plan = forward_plan(format, matrix, transposed, tile or REPORT)
    lowest, highest = half_step_beyond(format)
    return plan._replace(constants=plan.constants | {"LOWEST": lowest, "HIGHEST": highest})


@cache
def pack_plan(
    format: Format, matrix: tuple[int, int], transposed: bool, bytes_a_weight: int, tile: Tile | None = None
) -> Plan:
    """A thread takes a strand or two: the pieces of one chunk, or of two, and stores a strand's codes as words."""
    tile = tile or (PACK_TRANSPOSED if transposed else PACK if code_bits(format) == 8 else PACK_WORDS)
    constants = forward_plan(format, matrix, transposed, None).constants
    out_features, in_features = shape = shape_of(matrix, transposed)
    bits, block = code_bits(format), format.block[1] or STRAND
    if format.has_blocks_along_in:
        chunk = min(STRAND, block)
    else:  # as in `visit_plan`; but transposed tiles mask their edge only where a code is a byte
        chunk = min(16 if bits == 8 else STRAND, block)
        chunk = chunk if transposed and bits == 8 else min(chunk, in_features & -in_features)
    blocks = 1
    if format.has_blocks_along_in and not transposed and out_features * in_features % STRAND == 0:
        blocks = STRAND // chunk
    strands = max(1, tile.weights // (blocks * chunk))
    if transposed:
        programs = -(-out_features // strands) * -(-in_features // chunk)
    else:
        programs = -(-out_features * in_features // (blocks * chunk * strands))
    tiling = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "BLOCKS": blocks,
        "CHUNK": chunk,
        "PIECE": min(16 if bits == 8 else 16 // bytes_a_weight, chunk),
        "TILE": strands,
        "TRANSPOSED": transposed,
    }
    numbers = {name: value for name, value in constants.items() if name not in tiling}
    return Plan(programs, (*shape, *format.granules(*shape)), numbers | {"BITS": bits} | tiling, tile.warps)


@cache
def backward_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile) -> Plan:
    """Of `kernels.clip_backward_kernel`."""
    return visit_plan(format, shape_of(matrix, transposed), transposed, tile, {})


@cache
def amax_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> Plan:
    """Of `kernels.expert_amax_kernel`."""
    out_features, in_features = shape_of(matrix, transposed)
    if format.dynamic:  # what is calibrated is the whole expert
        format = replace(format, scale="fp32", dynamic=False, block=(None, None))
    rows, columns = format.block
    if format.block == (None, None):
        sweep = "expert"
    elif transposed:
        sweep = "scatter"
    else:
        sweep = "rows" if columns is None else "blocks" if rows == 1 else "square"
    tile = tile or AMAX[sweep]
    constants = {"SWEEP": sweep, "GLOBAL": format.has_global_amax, "STEPS": tile.steps}
    plan = visit_plan(format, (out_features, in_features), transposed, tile, constants)
    if sweep in ("expert", "blocks"):
        return plan._replace(blocks=-(-plan.blocks // tile.steps))
    if sweep == "rows":
        rows = max(1, tile.weights // ROW_CHUNK)
        tiling = {"CHUNK": ROW_CHUNK, "TILE": rows}
        return plan._replace(blocks=-(-out_features // rows), constants=plan.constants | tiling)
    if sweep == "square":
        tiling = {"CHUNK": columns, "TILE": max(1, min(rows or 1, tile.weights // (columns or 1)))}
        return plan._replace(blocks=plan.numbers[2] * plan.numbers[3], constants=plan.constants | tiling)
    return plan


def visit_plan(
    format: Format,
    shape: tuple[int, int],
    transposed: bool,
    tile: Tile,
    constants: dict[str, Any],
) -> Plan:
    """The plan of a kernel that visits each weight once: programs a matrix, and the tile of each."""
    out_features, in_features = shape
    if format.block == (None, None) and transposed:  # one scale: the layout does not matter
        out_features, in_features, transposed = in_features, out_features, False
    rows, columns = (1, 1) if format.dynamic else format.granules(out_features, in_features)
    if format.has_blocks_along_in:
        chunk = format.block[1] or 1
    else:  # within a granule, and a divisor of `in`, so that no chunk crosses a row; transposed tiles mask their edge
        chunk = min(16, format.block[1] or 16, 16 if transposed else in_features & -in_features)
    chunks = max(1, tile.weights // chunk)
    if transposed:
        blocks = -(-out_features // chunks) * -(-in_features // chunk)
    else:
        blocks = -(-out_features * (in_features // chunk) // chunks)
    tiling = {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "CHUNK": chunk,
        "TILE": chunks,
        "TRANSPOSED": transposed,
    }
    return Plan(blocks, (out_features, in_features, rows, columns), constants | tiling, tile.warps)
