"""Launchers: a group of weights and its scales to one launch of a kernel.

NOTE addresses: a kernel reaches expert e at `base + e * stride` if the experts are evenly spaced (stacked, or views of
one allocation), else through a table of addresses on the device. Tables are cached by their contents, so a cached table
is never stale: a tensor that moves has another address, and so another table.

NOTE memory of the results: by default the results of a group share one allocation, evenly spaced: one call to the
allocator and no table. The price: one result that is kept keeps all N. With `separate` each has memory of its own. That
took 280 us of the host a call in place of 73 for 32 experts, 905 in place of 151 for 128 (bench/results/2026-11-27.md).
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.known import Contiguous
from fq_transforms.ops import calls, kernels, pack_kernel, report_kernel
from fq_transforms.ops.calls import CAPTURED, Launched
from fq_transforms.ops.packing import code_bits, code_dtype
from fq_transforms.ops.reporting import Measures, half_step_beyond, scale_underflows

__all__ = [
    "clip_backward_operator",
    "clip_backward_triton",
    "expert_amax_operator",
    "expert_amax_triton",
    "fake_quantize_into_triton",
    "fake_quantize_operator",
    "fake_quantize_separate_operator",
    "fake_quantize_separate_triton",
    "fake_quantize_triton",
    "pack_triton",
    "report_triton",
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


def fake_quantize_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """`fake_quantize_reference` of every expert of a group, in one launch: [E, ., .], laid out as the weights are."""
    inputs = _group(weights)
    out = _result(inputs, out_dtype)
    plan = _forward_plan(format, inputs.matrix, transposed, tile)
    launched = _launch(kernels.fake_quantize_kernel, plan, (inputs, out), (amax, global_amax))
    if tile is None:
        calls.remember(calls.key_of(weights, amax, global_amax, format, transposed, out_dtype), launched, inputs.table)
    return out.base


def fake_quantize_into_triton(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
) -> None:
    """`fake_quantize_triton` into contiguous tensors of one dtype, one a weight, in its shape."""
    key = calls.key_of(weights, amax, global_amax, format, transposed, outs[0].dtype)
    into = _group(outs)
    is_one_behind_the_other = into.start % 16 == 0 and (
        into.experts == 1 or (into.table is None and into.stride == prod(into.matrix))
    )
    if is_one_behind_the_other and (call := calls.find(key)) is not None:
        call.run(into.start)
        return
    inputs = _group(weights)
    plan = _forward_plan(format, inputs.matrix, transposed, None)
    launched = _launch(kernels.fake_quantize_kernel, plan, (inputs, into), (amax, global_amax))
    if is_one_behind_the_other:
        calls.remember(key, launched, inputs.table)


def fake_quantize_separate_triton(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`fake_quantize_triton` into one new tensor a weight, in its shape, none of which keeps another alive."""
    outs = [torch.empty(weight.shape, dtype=out_dtype, device=weight.device) for weight in weights]
    fake_quantize_into_triton(outs, weights, amax, global_amax, format=format, transposed=transposed)
    return outs


def expert_amax_triton(
    weights: Sequence[Tensor], *, format: Format, transposed: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of every expert of a group, in one launch: [E, *amax_shape], and [E] or None."""
    inputs = _group(weights)
    plan = _amax_plan(format, inputs.matrix, transposed, tile)
    shape = (inputs.experts, *format.amax_shape(*_shape(inputs.matrix, transposed)))
    is_shared = plan.constants["SWEEP"] == "scatter" or len(shape) == 1  # several programs meet in one granule
    amax = _maxima(shape, inputs.base.device, is_shared)
    global_amax = _maxima(shape[:1], inputs.base.device, True) if plan.constants["GLOBAL"] else None
    _launch(kernels.expert_amax_kernel, plan, (inputs,), (amax, global_amax))
    return amax.view(torch.float32), None if global_amax is None else global_amax.view(torch.float32)


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
    inputs = _group(weights)
    out = _result(inputs, inputs.base.dtype)
    plan = _backward_plan(format, inputs.matrix, transposed, tile)
    _launch(kernels.clip_backward_kernel, plan, (_group(grads), inputs, out), (amax,))
    return out.base


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
    inputs = _group(weights)
    out_features, in_features = _shape(inputs.matrix, transposed)
    bits, experts, device = code_bits(format), inputs.experts, inputs.base.device
    dtype = torch.int8 if isinstance(format.element, IntElement) and bits == 8 else torch.uint8
    codes = torch.empty((experts, out_features, in_features * bits // 8), dtype=dtype, device=device)
    out = _Group(codes, codes.data_ptr(), None, codes[0].numel(), experts, inputs.matrix, True, [codes])
    scale, global_scale = _scales(amax, global_amax, format)
    if scale is None:
        shape = (experts, *format.granules(out_features, in_features))
        scale = torch.empty(shape, dtype=torch.float32 if format.scale == "fp32" else torch.uint8, device=device)
    plan = _pack_plan(format, inputs.matrix, transposed, inputs.base.element_size(), tile)
    amax = None if format.dynamic else amax
    _launch(pack_kernel.pack_kernel, plan, (inputs, out), (amax, global_scale, scale))
    if format.scale == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    return codes.view(code_dtype(format)), scale, global_scale


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
    inputs = _group(weights)
    plan = _report_plan(format, inputs.matrix, transposed, tile)
    places, device = (inputs.experts, plan.blocks), inputs.base.device
    sums = torch.empty((2, *places), dtype=torch.float64, device=device)
    counts = torch.empty((4, *places), dtype=torch.int32, device=device)
    _launch(report_kernel.report_kernel, plan, (inputs,), (amax, global_amax, sums, counts))
    signal, noise = sums.sum(-1)
    clipped, zeroed, underflow = counts[:3].sum(-1, dtype=torch.int64)
    largest = counts[3].amax(-1).view(torch.float32)
    # Larger granules are few. Of blocks, a sum over the state would take a temporary of 8 bytes each.
    if format.scale == "fp32" and not format.has_blocks_along_in:
        assert amax is not None
        underflow = scale_underflows(amax, format).reshape(inputs.experts, -1).sum(1)
    return Measures(signal, noise, clipped, zeroed, underflow, largest)


# Scales that a program makes, of those that the state alone decides.
SCALE_TILE = 1024


def _scales(amax: Tensor | None, global_amax: Tensor | None, format: Format) -> tuple[Tensor | None, Tensor | None]:
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
    kernel: Any = pack_kernel.pack_scale_kernel
    with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
        kernel[(-(-source.numel() // SCALE_TILE),)](
            source, scale, source.numel(), KIND=kind, QMAX=qmax, TILE=SCALE_TILE, enable_fp_fusion=False
        )
    return (None, scale) if is_global else (scale, None)


# What torch.compile sees in place of the launchers, whose addresses it cannot trace: opaque operators with shapes. A
# format travels as its JSON, since an operator takes tensors, numbers and strings only.


@torch.library.custom_op("fq_transforms::fake_quantize", mutates_args=())
def fake_quantize_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`fake_quantize_triton`, for torch.compile."""
    return fake_quantize_triton(
        weights, amax, global_amax, format=_parse(format), transposed=transposed, out_dtype=out_dtype
    )


@fake_quantize_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return weights[0].new_empty((_experts(weights), *weights[0].shape[-2:]), dtype=out_dtype)


@torch.library.custom_op("fq_transforms::fake_quantize_separate", mutates_args=())
def fake_quantize_separate_operator(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`fake_quantize_separate_triton`, for torch.compile."""
    return fake_quantize_separate_triton(
        weights, amax, global_amax, format=_parse(format), transposed=transposed, out_dtype=out_dtype
    )


@fake_quantize_separate_operator.register_fake
def _(
    weights: list[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    return [weight.new_empty(weight.shape, dtype=out_dtype) for weight in weights]


@torch.library.custom_op("fq_transforms::expert_amax", mutates_args=())
def expert_amax_operator(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """`expert_amax_triton`, for torch.compile; an empty tensor stands for "no global amax"."""
    amax, global_amax = expert_amax_triton(weights, format=_parse(format), transposed=transposed)
    return amax, amax.new_empty(0) if global_amax is None else global_amax


@expert_amax_operator.register_fake
def _(weights: list[Tensor], format: str, transposed: bool) -> tuple[Tensor, Tensor]:
    a, b = weights[0].shape[-2:]
    numbers, experts = _parse(format), _experts(weights)
    shape = numbers.amax_shape(*_shape((a, b), transposed))
    new_empty, globals_ = weights[0].new_empty, experts * numbers.has_global_amax
    return new_empty((experts, *shape), dtype=torch.float32), new_empty(globals_, dtype=torch.float32)


@torch.library.custom_op("fq_transforms::clip_backward", mutates_args=())
def clip_backward_operator(
    grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool
) -> Tensor:
    """`clip_backward_triton`, for torch.compile."""
    return clip_backward_triton(grads, weights, amax, format=_parse(format), transposed=transposed)


@clip_backward_operator.register_fake
def _(grads: list[Tensor], weights: list[Tensor], amax: Tensor, format: str, transposed: bool) -> Tensor:
    return weights[0].new_empty((_experts(weights), *weights[0].shape[-2:]))


@cache
def _parse(format: str) -> Format:
    return Format.from_dict(json.loads(format))


class _Group(NamedTuple):
    """The matrices of a group: their number, their common shape as stored, and how a kernel gets to each.

    Expert e begins `stride` elements after e - 1, the first at `base`, whose address is `start`; or, with a table, at
    the e-th address. `tensors` holds on to copies of what was not dense.
    """

    base: Tensor
    start: int
    table: Tensor | None
    stride: int
    experts: int
    matrix: tuple[int, int]
    is_aligned: bool
    tensors: Sequence[Tensor]


def _group(tensors: Sequence[Tensor]) -> _Group:
    """The group of some tensors [*experts, ., .]."""
    first = tensors[0]
    # The usual case, without a loop in Python.
    if first.dim() == 2 and (type(tensors) is Contiguous or all(map(Tensor.is_contiguous, tensors))):
        addresses = list(map(Tensor.data_ptr, tensors))
    else:
        tensors = [_dense(t) for t in tensors]
        addresses = [a for t in tensors for a in _addresses(t)]
        first = tensors[0]
    a, b = first.shape[-2:]
    experts, size = len(addresses), first.element_size()
    start, gap = addresses[0], addresses[1] - addresses[0] if experts > 1 else 0
    is_even = gap % size == 0 and addresses[-1] == start + (experts - 1) * gap  # most that are not end here
    if is_even and (experts == 1 or (gap != 0 and addresses == list(range(start, start + experts * gap, gap)))):
        return _Group(first, start, None, gap // size, experts, (a, b), True, tensors)
    table = _table(tuple(addresses), first.device)
    return _Group(first, start, table.addresses, 0, experts, (a, b), table.is_aligned, tensors)


def _result(group: _Group, dtype: torch.dtype) -> _Group:
    """Memory for the results of a group: one allocation [E, ., .]."""
    a, b = group.matrix
    out = torch.empty((group.experts, a, b), dtype=dtype, device=group.base.device)
    return _Group(out, out.data_ptr(), None, a * b, group.experts, group.matrix, True, [out])


class _Plan(NamedTuple):
    """All of a launch that comes from the format and the shape: made once, then looked up.

    `numbers` and `constants` are in the order of the kernel's arguments.
    """

    blocks: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    warps: int


@cache
def _forward_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> _Plan:
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
    return _visit(format, _shape(matrix, transposed), transposed, tile, constants)


@cache
def _report_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> _Plan:
    plan = _forward_plan(format, matrix, transposed, tile or REPORT)
    lowest, highest = half_step_beyond(format)
    return plan._replace(constants=plan.constants | {"LOWEST": lowest, "HIGHEST": highest})


@cache
def _pack_plan(
    format: Format, matrix: tuple[int, int], transposed: bool, bytes_a_weight: int, tile: Tile | None = None
) -> _Plan:
    """A thread takes a strand or two: the pieces of one chunk, or of two, and stores a strand's codes as words."""
    tile = tile or (PACK_TRANSPOSED if transposed else PACK if code_bits(format) == 8 else PACK_WORDS)
    constants = _forward_plan(format, matrix, transposed, None).constants
    out_features, in_features = shape = _shape(matrix, transposed)
    bits, block = code_bits(format), format.block[1] or STRAND
    if format.has_blocks_along_in:
        chunk = min(STRAND, block)
    else:  # as in `_visit`; but transposed tiles mask their edge only where a code is a byte
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
    return _Plan(programs, (*shape, *format.granules(*shape)), numbers | {"BITS": bits} | tiling, tile.warps)


@cache
def _backward_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile) -> _Plan:
    return _visit(format, _shape(matrix, transposed), transposed, tile, {})


@cache
def _amax_plan(format: Format, matrix: tuple[int, int], transposed: bool, tile: Tile | None) -> _Plan:
    out_features, in_features = _shape(matrix, transposed)
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
    plan = _visit(format, (out_features, in_features), transposed, tile, constants)
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


def _visit(
    format: Format,
    shape: tuple[int, int],
    transposed: bool,
    tile: Tile,
    constants: dict[str, Any],
) -> _Plan:
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
    return _Plan(blocks, (out_features, in_features, rows, columns), constants | tiling, tile.warps)


def _kind(number: int) -> tuple[bool, bool, bool]:
    """What Triton specializes an integer argument on."""
    return number == 1, number % 16 == 0, abs(number) >= 2**31


# CUDA's limit on the second dimension of a grid.
MOST_EXPERTS = 65535

# Kernels and their constants, by all that Triton specializes on: its own look-up compares every constant of a call.
_COMPILED: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def _launch(kernel: Any, plan: _Plan, groups: tuple[_Group, ...], scales: tuple[Tensor | None, ...]) -> Launched | None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest.

    Returns:
        What it was given, or None where the kernel was compiled for it, or was interpreted.
    """
    first = groups[0]
    if first.experts > MOST_EXPERTS:
        raise ValueError(
            f"a group of {first.experts} experts of {list(first.matrix)}: found more than {MOST_EXPERTS}, the limit of "
            "one launch; split it, or map over less with vmap"
        )
    dense = [None if scale is None else scale.contiguous() for scale in scales]
    addresses: list[int | None] = []  # in the order of the kernel's arguments, as are kinds and tensors
    index = first.base.device.index
    if first.base.is_cuda and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return _launch(kernel, plan, groups, scales)
    kinds: list[object] = [kernel, id(plan), index]  # plans are cached for good
    is_aligned = True
    for base, start, table, stride, _, _, group_is_aligned, _ in groups:
        addresses += (start, None if table is None else table.data_ptr(), stride)
        kinds += (base.dtype, start % 16 == 0, table is None, *_kind(stride))
        is_aligned &= group_is_aligned
    for scale in dense:
        addresses.append(address := None if scale is None else scale.data_ptr())
        kinds.append(None if address is None else address % 16 == 0)
    key = (*kinds, is_aligned)
    grid = (plan.blocks, first.experts, 1)
    known = _COMPILED.get(key)
    if known is not None:  # a launcher that is given addresses asks no tensor for its own
        compiled, rest = known
        stream: int = torch._C._cuda_getCurrentRawStream(index)  # pyright: ignore[reportPrivateUsage] (as below)
        launched = Launched(compiled, grid, (*addresses, *rest))
        kernels.run_compiled(compiled, grid, stream, launched.arguments)
        return launched
    names = kernel.arg_names[-len(plan.constants) - 1 :]
    assert names == [*plan.constants, "ALIGNED"], names
    tensors = [argument for group in groups for argument in (group.base, group.table, group.stride)] + dense
    rest = (*plan.numbers, *plan.constants.values(), is_aligned)
    compiled = kernel[grid](*tensors, *rest, num_warps=plan.warps, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter compiles nothing
        _COMPILED[key] = (compiled, rest)
    return None


class _Table(NamedTuple):
    """Addresses on the device, whether all are multiples of 16, and the pinned memory that they were copied from."""

    addresses: Tensor
    is_aligned: bool
    host: Tensor


# Small: 8 bytes an expert. First in, first out.
_TABLES: dict[tuple[object, ...], _Table] = {}
MOST_TABLES = 4096


def _table(addresses: tuple[int, ...], device: torch.device) -> _Table:
    """The table of some addresses, made without waiting, for the current stream.

    A table that is first needed while a CUDA graph is captured is filled by a copy within the graph, at each replay.
    """
    if device.type != "cuda":
        return _uploaded(addresses, device)
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)  # pyright: ignore[reportPrivateUsage] (no wrapper)
    is_capturing = torch.cuda.is_current_stream_capturing()
    key = (device.index, stream, addresses)
    table = _TABLES.get(key)
    if table is None:
        table = _uploaded(addresses, device)
        if is_capturing:
            CAPTURED.append(table.host)
            return table
        _TABLES[key] = table
        if len(_TABLES) > MOST_TABLES:
            del _TABLES[next(iter(_TABLES))]
    if is_capturing:
        CAPTURED.append(table)
    return table


def _uploaded(addresses: tuple[int, ...], device: torch.device) -> _Table:
    host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    is_aligned = all(address % 16 == 0 for address in addresses)
    return _Table(host.to(device, non_blocking=True), is_aligned, host)


def _maxima(shape: tuple[int, ...], device: torch.device, is_shared: bool) -> Tensor:
    """Memory for maxima, as integers; zero bits, the identity, where atomics add to it."""
    make = torch.zeros if is_shared else torch.empty
    return make(shape, dtype=torch.int32, device=device)


def _experts(weights: Sequence[Tensor]) -> int:
    return sum(prod(w.shape[:-2]) for w in weights)


def _shape(matrix: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """(out, in) of a matrix as stored."""
    return (matrix[1], matrix[0]) if transposed else matrix


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, with each expert's matrix contiguous; expert dimensions keep their strides, stride 0 included."""
    a, b = tensor.shape[-2:]
    is_dense = (b == 1 or tensor.stride(-1) == 1) and (a == 1 or tensor.stride(-2) == b)
    return tensor if is_dense else tensor.contiguous()


def _addresses(tensor: Tensor) -> list[int]:
    """Address of each expert's matrix in a tensor [*experts, ., .]."""
    addresses = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True):
        addresses = [a + i * stride * tensor.element_size() for a in addresses for i in range(size)]
    return addresses
