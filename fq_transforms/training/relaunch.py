"""Launches made once more, all of a tree's in one go: to find each by what it reads costs more than to make it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fq_transforms.ops import private
from fq_transforms.ops.launch import CAPTURED, Launched

__all__ = ["Relaunch"]


class Relaunch:
    """Launches on the current device and stream over tensors that lie where they lay, into results likewise.

    It holds on to no tensor but the tables of its launches. That the results are where they were, and that their
    versions are counted up, the caller sees to.
    """

    def __init__(self, launches: Sequence[Launched], tensors: Sequence[Tensor]) -> None:
        self.launches = launches
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._guards = private.Guards(tensors)

    def run(self, tensors: list[Tensor]) -> bool:
        """Make them.

        Args:
            tensors: All that they read, in the order of then.

        Returns:
            False, and none is made, if a tensor lies elsewhere, or on another device or stream than then.
        """
        index = tensors[0].device.index
        if torch.cuda.current_device() != index or private.current_stream(index) != self.launches[0].stream:
            return False
        if list(map(Tensor.data_ptr, tensors)) != self._addresses or not self._guards.match(tensors):
            return False
        for launched in self.launches:
            private.run(launched.compiled, launched.grid, launched.stream, launched.arguments)
        if torch.cuda.is_current_stream_capturing():
            CAPTURED.extend(launched.tables for launched in self.launches)
        return True
