"""Launches of the forward kernel that were made before, found again by the addresses of all that they read.

To build a launch anew costs the host as much as to run it. A tensor that moves has another address, and so is another
launch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.known import Contiguous
from fq_transforms.ops.kernels import run_compiled

__all__ = ["CAPTURED", "Call", "Launched", "again", "find", "key_of", "remember"]

# What a CUDA graph reads stays for good, as the graph may be replayed.
CAPTURED: list[object] = []


class Launched(NamedTuple):
    """A launch of a compiled kernel, with all that it was given."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]


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
