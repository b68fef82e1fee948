"""Launches made once more, all of a tree's in one go: to find each by what it reads costs more than to make it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fq_transforms.ops.known import Known

if TYPE_CHECKING:  # `ops.calls` needs Triton
    from fq_transforms.ops.calls import Call

__all__ = ["Placed", "Relaunch"]


class Placed(NamedTuple):
    """A launch, and the address from which on its results lie."""

    call: "Call"
    start: int


class Relaunch:
    """Launches on the current device and stream over tensors that lie where they lay, into results likewise.

    It holds on to no tensor but the tables of its launches. That the results are where they were, and that their
    versions are counted up, the caller sees to.
    """

    def __init__(self, launches: Sequence[Placed], tensors: Sequence[Tensor]) -> None:
        self.launches = launches
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._known = Known()
        self._known.remember(self._addresses, tensors)  # not for itself, which would be a cycle

    def run(self, tensors: list[Tensor]) -> bool:
        """Make them.

        Args:
            tensors: All that they read, in the order of then.

        Returns:
            False, and none is made, if a tensor lies elsewhere, or on another device or stream than then.
        """
        index, stream = tensors[0].device.index, self.launches[0].call.stream
        if torch.cuda.current_device() != index:
            return False
        if torch._C._cuda_getCurrentRawStream(index) != stream:  # pyright: ignore[reportPrivateUsage] (it has no public name)
            return False
        if list(map(Tensor.data_ptr, tensors)) != self._addresses or self._known.find(self._addresses, tensors) is None:
            return False
        for call, start in self.launches:
            call.run(start)
        return True
