"""Private names of PyTorch: what torch.func's wrappers wrap, and whether a transform looks on."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_functorch_active", "is_mapped", "unwrapped"]

functorch: Any = import_module("torch._C._functorch")  # what a wrapped tensor wraps has no public name


def is_functorch_active() -> bool:
    """True within a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func: under vjp a DTensor does not look like one."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_mapped(tensor: Tensor) -> bool:
    """True under torch.func.vmap, if the tensor has a dim that it maps."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
