"""How a group of weights gets to a kernel: its matrices, the plan of a launch, and the launch itself.

A group is a sequence of tensors [*experts, out, in] of one shape, dtype and device, or [*experts, in, out] if it is
transposed: N separate matrices, or one stacked tensor. Its leaves, such as amax, are [E, ...]: all experts of all
tensors along dim 0, in order.

NOTE addresses: a kernel reaches expert e at `base + e * stride` if the experts are evenly spaced (stacked, or views of
one allocation), else through a table of addresses on the device.

NOTE what is remembered: a plan keeps the kernels that were compiled for it, `_PLACES` where groups lay, with their
tables, and `_CALLS` whole launches but for where their results go. Places and calls are found by addresses, or by what
stands for addresses that were compared (`Contiguous.known`), so they are never stale: a tensor that moves has another
address. Why: host us per call of `fakequant` on an H200 on 2026-11-28, the median over six formats and three runs, at
commit 1e02380, which remembered the same; the limits are 80 and 200.

                                                    32 experts    128 experts
    with all that is remembered                             65            160
    without whole calls                                     96            180
    nor compiled kernels                                   124            221
    nor what weights were checked for (`checks.py`)        135            263

NOTE memory of the results: by default the results of a group share one allocation, evenly spaced: one call to the
allocator and no table. The price: one result that is kept keeps all N. With `separate` each has memory of its own.
That took 224 us of the host per call in place of 59 for 32 experts, 706 in place of 126 for 128
(bench/results/2026-11-27.md).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops import private

__all__ = [
    "CAPTURED",
    "Bounded",
    "Contiguous",
    "Matrices",
    "Plan",
    "Tile",
    "call_key",
    "check_not_empty",
    "constants_of",
    "each_expert",
    "experts_of",
    "flat",
    "format_of",
    "has_kernel",
    "is_traced",
    "launch",
    "launch_again",
    "matrices_of",
    "results_for",
    "shape_of",
    "split",
    "unstacked",
    "visit_plan",
]

K = TypeVar("K")
V = TypeVar("V")


class Bounded(dict[K, V]):
    """What was added last, at most so many: first in, first out. Threads may add at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self.most:
            try:
                oldest = next(iter(self))
            except (RuntimeError, StopIteration):  # another thread has added, or taken away, in between
                continue
            self.pop(oldest, None)


# Groups.


class Contiguous(list[Tensor]):
    """Tensors of which each is known to be contiguous, which spares 2 us of asking 32 of them.

    Attributes:
        known: Stands for these tensors and what is made of them, where both are known to lie where they lay: all of a
            launch but its scales and its random bits follows from it.
    """

    known: object | None = None


def has_kernel(weights: Sequence[Tensor]) -> bool:
    """True on a GPU, where kernels run; elsewhere the references do."""
    return weights[0].is_cuda


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_traced(weights: Sequence[Tensor]) -> bool:
    """True where weights may have no addresses: what torch.compile and export trace with stands in for them."""
    return torch.compiler.is_compiling() or type(weights[0]) not in _PLAIN


def experts_of(weights: Sequence[Tensor]) -> int:
    """How many experts some tensors [*experts, ., .] hold together."""
    return len(weights) if weights[0].dim() == 2 else sum(prod(w.shape[:-2]) for w in weights)


def shape_of(matrix: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """(out, in) of a matrix as stored."""
    return (matrix[1], matrix[0]) if transposed else matrix


def split(leaf: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Each tensor's part of a leaf [E, ...], with the tensor's own expert dims."""
    if leaf is None:
        return [None] * len(weights)
    parts = leaf.split([experts_of([w]) for w in weights])
    return [part.reshape((*w.shape[:-2], *part.shape[1:])) for part, w in zip(parts, weights, strict=True)]


def each_expert(weights: Sequence[Tensor], transposed: bool) -> Iterator[Tensor]:
    """The matrices [out, in] of a group, one at a time."""
    for weight in weights:
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            yield matrix.mT if transposed else matrix


def flat(leaf: Tensor, weight: Tensor) -> Tensor:
    """A tensor's part of a leaf, [*experts, ...], as [E, ...]."""
    return leaf.reshape((-1, *leaf.shape[weight.dim() - 2 :]))


def check_not_empty(weights: Sequence[Tensor]) -> None:
    """Raise ValueError where there is no weight, or weights of no elements."""
    if not weights or weights[0].numel() == 0:
        found = f"shape {tuple(weights[0].shape)}" if weights else "an empty list"
        raise ValueError(f"weights: found {found}, wanted the weights of at least one expert")


def results_for(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Memory for the results of a group: one allocation, all rows of all matrices below each other."""
    first = weights[0]
    *_, rows, columns = first.shape
    return torch.empty((experts_of(weights) * rows, columns), dtype=dtype, device=first.device)


def unstacked(out: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Such results as one tensor per weight, in the weight's own shape, all in one storage."""
    if weights[0].dim() == 2:
        rows = out.shape[0] // len(weights)
        # The cheapest way to N tensors (bench, host): autograd does not count them as views.
        return tuple(torch.unsafe_split_with_sizes(out, [rows] * len(weights)))
    parts = out.split([w.numel() // out.shape[1] for w in weights])
    return tuple(part.view(w.shape) for part, w in zip(parts, weights, strict=True))


class _Place(NamedTuple):
    """Where the experts of a group lie: `stride` elements apart, the first at `start`; or at a table's addresses.

    `kind` is all of it that Triton compiles a kernel for, and `host` the pinned memory that a table was copied from.
    """

    start: int
    table: Tensor | None
    stride: int
    kind: tuple[object, ...]
    is_aligned: bool = True
    host: Tensor | None = None


class Matrices(NamedTuple):
    """The matrices of a group: their place, their number, and their common shape as stored.

    `tensors` holds on to copies of what was not dense.
    """

    base: Tensor
    place: _Place
    experts: int
    matrix: tuple[int, int]
    tensors: Sequence[Tensor]


# Small: 8 bytes per expert.
_PLACES: Bounded[tuple[object, ...], _Place] = Bounded(4096)

# What a CUDA graph reads stays for good, as the graph may be replayed.
CAPTURED: list[object] = []


def matrices_of(tensors: Sequence[Tensor], matrix: tuple[int, int] | None = None) -> Matrices:
    """The group of some tensors [*experts, ., .]; or of one from `results_for`, which holds matrices of this shape."""
    first = tensors[0]
    a, b = matrix = matrix or (first.shape[-2], first.shape[-1])
    if len(tensors) == 1 and first.is_contiguous():
        if not (start := first.data_ptr()):
            raise _freed(first)
        return Matrices(first, _evenly_spaced(start, a * b, first.dtype), first.numel() // (a * b), matrix, tensors)
    # The usual case, without a loop in Python.
    if first.dim() == 2 and (type(tensors) is Contiguous or all(map(Tensor.is_contiguous, tensors))):
        addresses = tuple(map(Tensor.data_ptr, tensors))
    else:
        tensors = [_dense(t) for t in tensors]
        addresses = tuple(a for t in tensors for a in _addresses(t))
        first = tensors[0]
    return Matrices(first, _place_of(addresses, first), len(addresses), matrix, tensors)


def _freed(tensor: Tensor) -> ValueError:
    return ValueError(
        f"a tensor of {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: found that its memory was freed, as by "
        "FSDP, wanted its values; gather it first"
    )


def _place_of(addresses: tuple[int, ...], first: Tensor) -> _Place:
    """Where experts at some addresses lie, for the current stream, without waiting.

    A table that is first needed while a CUDA graph is captured is filled by a copy within the graph, at each replay.
    """
    stream = private.current_stream(first.device.index) if first.is_cuda else None
    key = (stream, first.dtype, addresses)  # no two GPUs have an address in common
    place = _PLACES.get(key)
    if place is None:
        if not all(addresses):
            raise _freed(first)
        start, size, experts = addresses[0], first.element_size(), len(addresses)
        gap = addresses[1] - start if experts > 1 else 0
        is_even = gap % size == 0 and addresses[-1] == start + (experts - 1) * gap  # most that are not end here
        if is_even and all(address == start + e * gap for e, address in enumerate(addresses)):
            place = _evenly_spaced(start, gap // size, first.dtype)
        else:
            place = _uploaded(addresses, first)
            if first.is_cuda and torch.cuda.is_current_stream_capturing():
                CAPTURED.append(place.host)
                return place
        _PLACES[key] = place
    if place.table is not None and first.is_cuda and torch.cuda.is_current_stream_capturing():
        CAPTURED.append(place)
    return place


def _evenly_spaced(start: int, stride: int, dtype: torch.dtype) -> _Place:
    kind = (dtype, start % 16 == 0, stride == 1, stride % 16 == 0, abs(stride) >= 2**31)
    return _Place(start, None, stride, kind)


def _uploaded(addresses: tuple[int, ...], first: Tensor) -> _Place:
    host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=first.is_cuda)
    is_aligned = all(address % 16 == 0 for address in addresses)
    kind = (first.dtype, addresses[0] % 16 == 0, is_aligned)
    return _Place(addresses[0], host.to(first.device, non_blocking=True), 0, kind, is_aligned, host)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, with each expert's matrix contiguous; expert dims keep their strides, stride 0 included."""
    a, b = tensor.shape[-2:]
    is_dense = (b == 1 or tensor.stride(-1) == 1) and (a == 1 or tensor.stride(-2) == b)
    return tensor if is_dense else tensor.contiguous()


def _addresses(tensor: Tensor) -> list[int]:
    """Address of each expert's matrix in a tensor [*experts, ., .]."""
    addresses = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True):
        addresses = [a + i * stride * tensor.element_size() for a in addresses for i in range(size)]
    return addresses


# Plans.


class Tile(NamedTuple):
    """Weights that a program works on at a time, its warps, and how many such tiles it takes one after the other."""

    weights: int
    warps: int
    steps: int = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a launch that comes from the format and the shape: made once, then looked up.

    `numbers` and `constants` are in the order of the kernel's arguments; a number is None where a kernel does without.
    """

    kernel: Any
    blocks: int
    numbers: tuple[int | None, ...]
    constants: dict[str, Any]
    warps: int
    # Of compiled kernels, by all that Triton specializes on besides: its own look-up compares every constant of a call.
    launchers: dict[tuple[object, ...], Callable[..., None]] = field(
        default_factory=dict[tuple[object, ...], Callable[..., None]], init=False
    )

    @cached_property
    def arguments(self) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Those behind the pointers, if the addresses are not all multiples of 16, and if they are."""
        names = self.kernel.arg_names[-len(self.constants) - 1 :]
        assert names == [*self.constants, "ALIGNED"], names
        known = (*self.numbers, *self.constants.values())
        return (*known, False), (*known, True)


def constants_of(format: Format) -> dict[str, Any]:
    """A format's numbers as kernels take them."""
    element = format.element
    is_int = isinstance(element, IntElement)
    return {
        "ELEMENT": "int" if is_int else "float",
        "SCALE": format.scale,
        "DYNAMIC": format.dynamic,
        "DIVIDES": format.dequantize == "divide",
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


@cache
def format_of(numbers: str) -> Format:
    """The format of some JSON, as which it travels through torch.compile's operators."""
    return Format.from_dict(json.loads(numbers))


def visit_plan(
    kernel: Any, format: Format, shape: tuple[int, int], transposed: bool, tile: Tile, constants: dict[str, Any]
) -> Plan:
    """The plan of a kernel that visits each weight once: programs per matrix, and the tile of each."""
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
    return Plan(kernel, blocks, (out_features, in_features, rows, columns), constants | tiling, tile.warps)


# Launches.

# CUDA's limit on the second dimension of a grid.
MOST_EXPERTS = 65535


class _Call(NamedTuple):
    """A launch that can be made again while all lies where it lay; `tables` are held for it."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[object, ...]
    tables: list[Tensor]


# Launches by what they read; the address of one allocation for the results takes the place of the last.
_CALLS: Bounded[tuple[object, ...], _Call] = Bounded(4096)
# Where the results' address stands among the arguments: behind the weights' address, table and stride.
RESULT = 3


def call_key(
    outs: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor | None], *statics: object
) -> tuple[object, ...] | None:
    """What tells launches apart, but for where one allocation for all results lies; None where none is remembered.

    Remembered are those over weights that are known to be contiguous, which come again; inputs come from anywhere.
    """
    first, out = weights[0], outs[0]
    if type(weights) is not Contiguous or not first.is_cuda:
        return None
    index, leaves = first.device.index, [scale for scale in scales if scale is not None]
    if index != torch.cuda.current_device() or not all(map(Tensor.is_contiguous, leaves)):
        return None
    stream = private.current_stream(index)
    if weights.known is not None:
        return (weights.known, stream, *statics, *map(Tensor.data_ptr, leaves))
    if len(outs) > 1 or first.dim() != 2 or out.data_ptr() % 16:
        return None
    what = (stream, first.shape, first.dtype, out.dtype, *statics)
    return (*what, *map(Tensor.data_ptr, [*leaves, *weights]))


def launch_again(key: tuple[object, ...] | None, outs: Sequence[Tensor]) -> bool:
    """Make the launch that was remembered, into `outs`; False if there is none."""
    known = None if key is None else _CALLS.get(key)
    if known is None:
        return False
    run, grid, stream, arguments, tables = known
    if len(outs) == 1:  # a write that is remembered has the address of before anyway
        arguments = (*arguments[:RESULT], outs[0].data_ptr(), *arguments[RESULT + 1 :])
    run(grid, stream, arguments)
    if tables and torch.cuda.is_current_stream_capturing():
        CAPTURED.append(tables)
    return True


def launch(
    plan: Plan,
    groups: tuple[Matrices, ...],
    scales: tuple[Tensor | None, ...],
    key: tuple[object, ...] | None = None,
) -> None:
    """Launch a kernel over a group: grid (blocks of one weight, experts), the block index fastest.

    With a key the launch is remembered, but not while a CUDA graph is captured, whose tables are filled within it.
    """
    base, _, experts, matrix, _ = groups[0]
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"a group of {experts} experts of {list(matrix)}: found more than {MOST_EXPERTS}, the limit of one launch; "
            "split it, or map over less with vmap"
        )
    index = base.device.index
    if base.is_cuda and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return launch(plan, groups, scales, key)
    dense: list[Tensor | None] = []
    addresses: list[int | None] = []  # in the order of the kernel's arguments
    kinds: list[object] = [index]
    tables: list[Tensor] = []
    is_aligned = True
    for _, (start, table, stride, kind, group_is_aligned, _), _, _, _ in groups:
        addresses += (start, None if table is None else table.data_ptr(), stride)
        if table is not None:
            tables.append(table)
        kinds.append(kind)
        is_aligned &= group_is_aligned
    for scale in scales:
        leaf = None if scale is None else scale.contiguous()
        start = None if leaf is None else leaf.data_ptr()
        dense.append(leaf)
        addresses.append(start)
        kinds.append(None if start is None else start % 16 == 0)
    kind, rest, grid = tuple(kinds), plan.arguments[is_aligned], (plan.blocks, experts, 1)
    run = plan.launchers.get(kind)
    if run is None:
        tensors = [argument for group in groups for argument in (group.base, group.place.table, group.place.stride)]
        compiled = plan.kernel[grid](*tensors, *dense, *rest, num_warps=plan.warps, enable_fp_fusion=False)
        if compiled is not None:  # None from the interpreter
            plan.launchers[kind] = private.launcher_of(compiled)
        return
    # A kernel that is given addresses asks no tensor for its own.
    call = _Call(run, grid, private.current_stream(index), (*addresses, *rest), tables)
    run(*call[1:4])
    if key is not None and not torch.cuda.is_current_stream_capturing():
        _CALLS[key] = call
