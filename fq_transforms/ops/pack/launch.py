"""Launchers of packing: one launch per group, and one for scales that the state alone decides."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement, code_bits
from fq_transforms.ops.launch import Plan, Tile, constants_of, launch, matrices_of, shape_of
from fq_transforms.ops.pack.kernel import pack_kernel, pack_scale_kernel
from fq_transforms.ops.pack.reference import code_dtype

__all__ = ["pack_scales_triton", "pack_triton"]

# Chosen by `python -m fq_transforms.bench --sweep`; bench/results has what was swept and what came out.
PACK = Tile(4096, 4)  # one strand of 32 weights per thread, so that its scale is where its weights are
PACK_WORDS = Tile(4096, 2)  # two such strands where codes are less than a byte: fewer instructions per weight
PACK_TRANSPOSED = Tile(2048, 1)  # fewest exchanges between threads
# Weights that a thread packs: 16 bytes of four bits, and the whole block of the MX formats that OCP has.
STRAND = 32


def pack_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pack_reference` of every expert of a group, in one launch, and one for scales that the state alone decides."""
    inputs = matrices_of(weights)
    out_features, in_features = shape_of(inputs.matrix, transposed)
    bits, experts, device = code_bits(format), inputs.experts, inputs.base.device
    dtype = torch.int8 if isinstance(format.element, IntElement) and bits == 8 else torch.uint8
    codes = torch.empty((experts, out_features, in_features * bits // 8), dtype=dtype, device=device)
    scale, global_scale = pack_scales_triton(amax, global_amax, format)
    if scale is None:
        shape = (experts, *format.granules(out_features, in_features))
        scale = torch.empty(shape, dtype=torch.float32 if format.scale == "fp32" else torch.uint8, device=device)
    plan = pack_plan(format, inputs.matrix, transposed, inputs.base.element_size(), tile)
    amax = None if format.dynamic else amax
    launch(plan, (inputs, matrices_of([codes])), (amax, global_scale, scale))
    if format.scale == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return codes.view(code_dtype(format)), scale, global_scale


@cache
def pack_plan(
    format: Format, matrix: tuple[int, int], transposed: bool, bytes_per_weight: int, tile: Tile | None = None
) -> Plan:
    """Of `pack_kernel`.

    A thread takes a strand or two: the pieces of one chunk, or of two. It stores a strand's codes as words.
    """
    tile = tile or (PACK_TRANSPOSED if transposed else PACK if code_bits(format) == 8 else PACK_WORDS)
    out_features, in_features = shape = shape_of(matrix, transposed)
    bits, block = code_bits(format), format.block[1] or STRAND
    if format.dynamic:
        chunk = block  # all that its scale is made of: a block may be wider than a strand
    elif format.has_blocks_along_in:
        chunk = min(STRAND, block)
    else:  # as in `visit_plan`; but transposed tiles mask their edge only where a code is a byte
        chunk = min(16 if bits == 8 else STRAND, block)
        chunk = chunk if transposed and bits == 8 else min(chunk, in_features & -in_features)
    blocks = 1
    if format.has_blocks_along_in and not transposed and out_features * in_features % STRAND == 0:
        blocks = max(1, STRAND // chunk)
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
        "PIECE": min(16 if bits == 8 else 16 // bytes_per_weight, chunk),
        "TILE": strands,
        "TRANSPOSED": transposed,
    }
    constants = constants_of(format) | {"BITS": bits} | tiling
    return Plan(pack_kernel, programs, (*shape, *format.granules(*shape)), constants, tile.warps)


# Scales that a program makes, of those that the state alone decides.
SCALE_TILE = 1024


def pack_scales_triton(
    amax: Tensor | None, global_amax: Tensor | None, format: Format
) -> tuple[Tensor | None, Tensor | None]:
    """`pack_scales`, in one launch in place of ten."""
    is_int, is_global = isinstance(format.element, IntElement), format.scale == "e4m3"
    source = global_amax if is_global and not format.dynamic else amax
    if format.scale == "e8m0" or (is_int and format.has_blocks_along_in):
        return None, None
    assert source is not None
    source = source.contiguous()
    scale = torch.empty_like(source)
    qmax = float(format.element.qmax if isinstance(format.element, IntElement) else format.element.max)
    kind = "global" if is_global else "int" if is_int else "float"
    kernel: Any = pack_scale_kernel
    with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
        kernel[(-(-source.numel() // SCALE_TILE),)](
            source,
            scale,
            source.numel(),
            KIND=kind,
            DIVIDES=format.dequantize == "divide",
            QMAX=qmax,
            TILE=SCALE_TILE,
            enable_fp_fusion=False,
        )
    return (None, scale) if is_global else (scale, None)
