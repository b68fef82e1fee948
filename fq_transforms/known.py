"""What a group's tensors were when they were last checked, so that a call compares hundreds of them at once."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

__all__ = ["Known"]

guards: Any = import_module("torch._C._dynamo.guards")  # torch.compile's own check of many tensors in one call

MOST = 16384


class Known:
    """Types, dtypes, devices and shapes of each group's tensors, not the tensors; with `strides` their strides too.

    To compare them takes one call, where checking them in Python took a fifth of a call to `fakequant`. Placements of
    DTensors are not among what is compared.
    """

    def __init__(self, *, strides: bool = False) -> None:
        self.strides = strides
        self.groups: dict[int, tuple[object, object, Any]] = {}

    def are(self, group: object, tensors: Sequence[Tensor], what: object = None) -> bool:
        """True if these are as those that were remembered for the group, with the same `what`."""
        found = self.groups.get(id(group))
        return found is not None and found[0] is group and found[1] == what and bool(found[2].check(*tensors))

    def remember(self, group: object, tensors: Sequence[Tensor], what: object = None) -> None:
        """These are right, and so are others like them."""
        sizes = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) if self.strides else [None] * tensor.dim() for tensor in tensors]
        guard = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.groups[id(group)] = (group, what, guard)
        if len(self.groups) > MOST:
            del self.groups[next(iter(self.groups))]
