"""The one rule by which torch.func.vmap maps an operation: a mapped dim becomes one more expert dim.

It goes in front of the expert dims of each tensor, so a batch is one launch too. An unmapped tensor is expanded with
stride 0, not copied. A leaf [E, ...] gets each tensor's experts `size` times, the mapped dim outermost; a leaf of no
dims, such as a seed, stands for all experts, and once it is mapped has one entry per expert.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Constant", "Mapped", "Unmapped"]


class Statics(Protocol):
    """What a Function is given that is no tensor."""

    def mapped(self, size: int) -> Any:
        """The same for weights with a mapped dim of a size in front."""
        ...


class Mapped(Function):
    """A Function of (statics, leaves, tensors), mapped by the rule above.

    Its tensors are one list of N tensors [*experts, ., .], or several such lists in a row, as gradients and weights.
    Its results are leaves, of which an empty one stands for none, and then tensors.
    """

    leaves: ClassVar[int] = 0  # leaves among the arguments
    lists: ClassVar[int] = 1  # lists of tensors among the arguments
    leaf_results: ClassVar[int] = 0  # leaves among the results

    @classmethod  # PyTorch's is static; this one asks its class for the numbers above
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        statics: Statics = args[0]
        args = args[1:]
        size, dims = info.batch_size, in_dims[1:]
        tensors, tensor_dims = args[cls.leaves :], dims[cls.leaves :]
        one = len(tensors) // cls.lists
        counts = [_experts(t, d) for t, d in zip(tensors[:one], tensor_dims[:one], strict=True)]
        results = cls.apply(
            statics.mapped(size),
            *(_folded_leaf(leaf, d, counts, size) for leaf, d in zip(args[: cls.leaves], dims, strict=False)),
            *(_folded(t, d, size) for t, d in zip(tensors, tensor_dims, strict=True)),
        )
        found = [_unfolded_leaf(leaf, counts, size) for leaf in results[: cls.leaf_results]]
        found += [(result, 0) for result in results[cls.leaf_results :]]
        outs, out_dims = zip(*found, strict=True)
        return outs, out_dims


class Constant(Function):
    """A Function whose results have no gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise AssertionError("amax is not differentiable")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None


class Unmapped(Constant):
    """A search for an amax, which vmap must not map."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise ValueError("calibrate: found weights under torch.func.vmap, wanted method Max there")


def _experts(tensor: Tensor, dim: int | None) -> int:
    """Experts in a tensor [*experts, ., .], not counting a mapped dim."""
    sizes = list(tensor.shape)
    if dim is not None:
        del sizes[dim]
    return prod(sizes[:-2])


def _folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Mapped dim to the front; an unmapped tensor is repeated without a copy."""
    return tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)


def _folded_leaf(leaf: Tensor | None, dim: int | None, counts: Sequence[int], size: int) -> Tensor | None:
    if leaf is None or leaf.dim() == 0:
        return leaf
    mapped = _folded(leaf, dim, size)
    if mapped.dim() == 1:  # one for all experts
        mapped = mapped[:, None].expand(size, sum(counts))
    return torch.cat([part.flatten(0, 1) for part in mapped.split(counts, dim=1)])


def _unfolded_leaf(leaf: Tensor, counts: Sequence[int], size: int) -> tuple[Tensor, int | None]:
    if leaf.numel() == 0:
        return leaf, None
    parts = leaf.split([size * n for n in counts])
    return torch.cat([part.unflatten(0, (size, n)) for part, n in zip(parts, counts, strict=True)], dim=1), 0
