"""Launches over the matrices of a group: new ones, and the forward kernel's that were made before.

The latter are found again by the addresses of all that they read. To build a launch anew costs the host as much as to
run it. A tensor that moves has another address, and so is another launch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.known import Contiguous
from fq_transforms.ops.matrices import CAPTURED, Matrices
from fq_transforms.ops.plans import Plan
from fq_transforms.ops.quantize.kernel import run_compiled

__all__ = ["Call", "Launched", "again", "find", "key_of", "launch", "remember"]


class Launched(NamedTuple):
    """A launch of a compiled kernel, with all that it was given."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]


def _kind(number: int) -> tuple[bool, bool, bool]:
    """What Triton specializes an integer argument on."""
    return number == 1, number % 16 == 0, abs(number) >= 2**31


# CUDA's limit on the second dimension of a grid.
MOST_EXPERTS = 65535

# Kernels and their constants, by all that Triton specializes on: its own look-up compares every constant of a call.
_COMPILED: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launch(kernel: Any, plan: Plan, groups: tuple[Matrices, ...], scales: tuple[Tensor | None, ...]) -> Launched | None:
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
            return launch(kernel, plan, groups, scales)
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
        run_compiled(compiled, grid, stream, launched.arguments)
        return launched
    names = kernel.arg_names[-len(plan.constants) - 1 :]
    assert names == [*plan.constants, "ALIGNED"], names
    tensors = [argument for group in groups for argument in (group.base, group.table, group.stride)] + dense
    rest = (*plan.numbers, *plan.constants.values(), is_aligned)
    compiled = kernel[grid](*tensors, *rest, num_warps=plan.warps, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter compiles nothing
        _COMPILED[key] = (compiled, rest)
    return None


class Call(NamedTuple):
    """A launch over weights [out, in] and scales at known addresses: all of it but where the results go.

    `before` and `behind` are the arguments on both sides of the results' address, `rows` the rows of each result,
    `table` what an argument points to.
    """

    compiled: Any
    grid: tuple[int, int, int]
    before: tuple[object, ...]
    behind: tuple[object, ...]
    stream: int
    rows: list[int]
    table: Tensor | None

    def run(self, start: int) -> None:
        """Launch it, with results one behind the other from an address on, which 16 divides."""
        run_compiled(self.compiled, self.grid, self.stream, (*self.before, start, *self.behind))
        if self.table is not None and torch.cuda.is_current_stream_capturing():
            CAPTURED.append(self.table)


# First in, first out.
_CALLS: dict[object, Call] = {}
MOST = 4096
# Where the results' address stands among the arguments: behind the weights' address, table and stride.
_RESULT = 3


def key_of(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> tuple[Any, ...] | None:
    """What tells launches apart that differ in where their results go only; None for tensors of which none is kept.

    Kept are those of weights, which are known to be contiguous when they come again; inputs come from anywhere.
    """
    if type(weights) is not Contiguous:
        return None
    first = weights[0]
    if first.dim() != 2 or not first.is_cuda or (index := first.device.index) != torch.cuda.current_device():
        return None
    scales = [scale for scale in (amax, global_amax) if scale is not None]
    if not all(map(Tensor.is_contiguous, scales)):
        return None
    stream: int = torch._C._cuda_getCurrentRawStream(index)  # pyright: ignore[reportPrivateUsage] (it has no public name)
    addresses = tuple(map(Tensor.data_ptr, weights))
    where = (index, first.shape, first.dtype, addresses, *map(Tensor.data_ptr, scales))
    return stream, format, transposed, out_dtype, where


def find(key: tuple[Any, ...] | None) -> Call | None:
    """The launch that was remembered, if it was."""
    return _CALLS.get(key)


def remember(key: tuple[Any, ...] | None, launched: Launched | None, table: Tensor | None) -> None:
    """Keep a launch whose results lie one behind the other, from an address on that 16 divides.

    Not while a CUDA graph is captured, whose table is filled within the graph.
    """
    if key is None or launched is None or torch.cuda.is_current_stream_capturing():
        return
    compiled, grid, arguments = launched
    (_, (rows, _), _, addresses, *_) = key[-1]
    before, behind = arguments[:_RESULT], arguments[_RESULT + 1 :]
    _CALLS[key] = Call(compiled, grid, before, behind, key[0], [rows] * len(addresses), table)
    if len(_CALLS) > MOST:
        del _CALLS[next(iter(_CALLS))]


def again(
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...] | None:
    """`fake_quantize_triton`, as one tensor a weight, if such a launch was made before; or None."""
    call = _CALLS.get(key_of(weights, amax, global_amax, format, transposed, out_dtype))
    if call is None:
        return None
    first, rows = weights[0], call.rows
    result = torch.empty((rows[0] * len(rows), first.shape[1]), dtype=out_dtype, device=first.device)
    call.run(result.data_ptr())
    return tuple(torch.unsafe_split_with_sizes(result, rows))  # as in `ops.autograd`
