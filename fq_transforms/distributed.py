"""What the ranks of a process group have to say; maxima and sums over them, one all-reduce for many tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check_group", "largest_over", "said_by_all", "sum_over", "tell_failure"]

T = TypeVar("T")

# Bits of the one NaN that stands for all, above those of infinity; and a mask.
NAN_BITS = 0x7FC00000
ALL_BUT_SIGN = 0x7FFFFFFF


def check_group(group: Any) -> None:
    """Raise ValueError unless `group` is None or a process group that this rank is in."""
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"group: found {group!r}, wanted None or a process group that this rank is in")


def said_by_all(group: "ProcessGroup | None", what: T, caller: str) -> list[T]:
    """What each rank of a group says, in their order; None is this rank alone. One that fails calls `tell_failure`.

    Raises:
        ValueError: Another one has failed.
    """
    if group is None:
        return [what]
    said = _exchanged(group, (None, what))
    for rank, (error, _) in enumerate(said):
        if error is not None:
            raise ValueError(f"{caller}: found that rank {rank} of the group failed, wanted all of them: {error}")
    return [one for _, one in said]


def tell_failure(group: "ProcessGroup | None", error: Exception) -> None:
    """Let the ranks that are in `said_by_all`, or will be, not wait for this one."""
    if group is not None:
        _exchanged(group, (f"{type(error).__name__}: {error}", None))


def _exchanged(group: "ProcessGroup", own: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
    said: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(said, own, group)
    return said


def largest_over(group: "ProcessGroup", tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Elementwise maximum of fp32 tensors over the ranks of a group: new tensors, by one all-reduce. NaN wins.

    What is reduced is integers of the same order: the maximum of floats drops NaN on some backends. No collective if
    there is no element.
    """
    return _LargestOver.apply(_Ranks(group), *tensors) if sum(t.numel() for t in tensors) else tuple(tensors)


def sum_over(group: "ProcessGroup", tensors: Sequence[Tensor]) -> list[Tensor]:
    """Elementwise sum of fp64 tensors over the ranks of a group: new tensors, by one all-reduce, or none for none."""
    if not sum(tensor.numel() for tensor in tensors):
        return list(tensors)
    total = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM, group)
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class _Ranks:
    group: "ProcessGroup"


class _LargestOver(Function):
    @staticmethod
    def forward(ranks: _Ranks, *tensors: Tensor) -> Any:
        keys = torch.cat([_ordered(tensor).flatten() for tensor in tensors])
        torch.distributed.all_reduce(keys, torch.distributed.ReduceOp.MAX, ranks.group)
        parts = keys.split([tensor.numel() for tensor in tensors])
        # Flipped part by part: a leaf that is a view of all would keep, and a saver would write, those of all groups.
        return tuple(
            _flipped(part).view(torch.float32).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise AssertionError("amax is not differentiable")


def _ordered(tensor: Tensor) -> Tensor:
    """int32 of the order of the floats, above them every NaN as one; `_flipped` leads back."""
    bits = torch.where(tensor.isnan(), NAN_BITS, tensor.contiguous().view(torch.int32))
    return _flipped(bits.to(torch.int32))


def _flipped(bits: Tensor) -> Tensor:
    """Negative floats order backwards as integers, so their bits but the sign are inverted. Its own inverse."""
    return bits ^ ((bits >> 31) & ALL_BUT_SIGN)
