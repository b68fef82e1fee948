"""What a group's tensors were when they were last checked, so that a call compares hundreds of them at once."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

__all__ = ["Contiguous", "Known"]

guards: Any = import_module("torch._C._dynamo.guards")  # torch.compile's own check of many tensors in one call

MOST = 16384


class Contiguous(list[Tensor]):
    """Tensors of which each is known to be contiguous."""


class Known:
    """Types, dtypes, devices, shapes and strides of each group's tensors, not the tensors.

    To compare them takes one call, where checking them in Python took a fifth of a call to `fakequant`. Placements of
    DTensors are not among what is compared.
    """

    def __init__(self) -> None:
        self.groups: dict[int, tuple[object, Any, bool]] = {}

    def find(self, group: object, tensors: list[Tensor]) -> list[Tensor] | None:
        """These, if they are as those that were remembered for the group; or None."""
        found = self.groups.get(id(group))
        if found is None or found[0] is not group or not found[1].check(*tensors):
            return None
        return Contiguous(tensors) if found[2] else tensors

    def remember(self, group: object, tensors: Sequence[Tensor]) -> None:
        """These are right, and so are others like them."""
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guard = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.groups[id(group)] = (group, guard, all(map(Tensor.is_contiguous, tensors)))
        if len(self.groups) > MOST:
            del self.groups[next(iter(self.groups))]
