"""The matrices of a group, and how a kernel gets to each.

NOTE addresses: a kernel reaches expert e at `base + e * stride` if the experts are evenly spaced (stacked, or views of
one allocation), else through a table of addresses on the device. Tables are cached by their contents, so a cached table
is never stale: a tensor that moves has another address, and so another table.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fq_transforms.ops.known import Contiguous

__all__ = ["CAPTURED", "Matrices", "experts_of", "matrices_of", "results_for", "shape_of"]

# What a CUDA graph reads stays for good, as the graph may be replayed.
CAPTURED: list[object] = []


class Matrices(NamedTuple):
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


def matrices_of(tensors: Sequence[Tensor]) -> Matrices:
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
        return Matrices(first, start, None, gap // size, experts, (a, b), True, tensors)
    table = _table(tuple(addresses), first.device)
    return Matrices(first, start, table.addresses, 0, experts, (a, b), table.is_aligned, tensors)


def results_for(group: Matrices, dtype: torch.dtype) -> Matrices:
    """Memory for the results of a group: one allocation [E, ., .]."""
    a, b = group.matrix
    out = torch.empty((group.experts, a, b), dtype=dtype, device=group.base.device)
    return Matrices(out, out.data_ptr(), None, a * b, group.experts, group.matrix, True, [out])


def experts_of(weights: Sequence[Tensor]) -> int:
    """How many experts some tensors [*experts, ., .] hold together."""
    return sum(prod(w.shape[:-2]) for w in weights)


def shape_of(matrix: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """(out, in) of a matrix as stored."""
    return (matrix[1], matrix[0]) if transposed else matrix


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
