"""The launcher of GPTQ's inner loop: one launch per block of columns, for all experts."""

from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.gptq.kernel import gptq_block_kernel
from fq_transforms.ops.launch import Plan, constants_of, launch, matrices_of

__all__ = ["gptq_block_triton"]

# Rows of a program, and its warps: the quickest for INT4 and NVFP4 together on an H200, of 8 to 64 and 1 to 8.
TILE, WARPS = 32, 1


def gptq_block_triton(
    target: Tensor,
    weight: Tensor,
    errors: Tensor,
    factor: Tensor,
    amax: Tensor,
    global_amax: Tensor | None,
    columns: Tensor,
    first: int,
    *,
    format: Format,
) -> None:
    """Write `gptq_block_reference` of the block that begins at column `first` into `errors`; one launch.

    Args:
        target: fp32 [E, out, k], dense.
        weight: fp32 [E, out, in], dense, as are the next.
        errors: fp32 [E, out, in].
        factor: fp32 [E, in, in].
        amax: As the reference takes it.
        global_amax: Likewise.
        columns: int64 [E, in].
        first: Where the block begins.
        format: Likewise.
    """
    inputs = matrices_of([weight])
    plan = gptq_plan(format, inputs.matrix, first, target.shape[-1])
    launch(plan, (inputs,), (target, errors, factor, amax, global_amax, columns))


def gptq_plan(format: Format, matrix: tuple[int, int], first: int, width: int) -> Plan:
    """Of `gptq_block_kernel`."""
    out_features, in_features = matrix
    rows, columns_of = format.granules(out_features, in_features)
    constants = {name: value for name, value in constants_of(format).items() if name != "DYNAMIC"} | {
        "ROWS": format.block[0] or 0,
        "COLUMNS": format.block[1] or 0,
        "TILE": TILE,
        "WIDTH": 1 << (width - 1).bit_length(),
    }
    numbers = (out_features, in_features, rows, columns_of, first, width)
    return Plan(gptq_block_kernel, -(-out_features // TILE), numbers, constants, WARPS)
