"""Fake weights that are kept from step to step and written over: the tensors themselves, with their places in autograd.

To make a tensor for each of N weights, and its leaf in the graph, costs the host more than to fake-quantize them.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fq_transforms.fakequant import quantize_group
from fq_transforms.known import Contiguous
from fq_transforms.ops.autograd import is_transformed
from fq_transforms.spec import Spec
from fq_transforms.state import State, check, is_read

__all__ = ["Kept"]

_HOOKS = (attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks"))


class Kept:
    """The leaves that the last step computed with, and what they were made for.

    Only leaves that are as they were made are used again: none that has moved, or that somebody has hooked.
    """

    def __init__(self) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.quantized: list[str] = []
        self.others: list[str] = []
        self.is_used = False
        self._made_for: object = None
        self._addresses: list[int] = []

    def refill(
        self, params: Mapping[str, Tensor], state: State, *, spec: Spec, made_for: object
    ) -> dict[str, Tensor] | None:
        """`fakequant` under pass-through into the leaves: a new dict with them; or None if they cannot be used.

        Raises:
            KeyError, ValueError: As `fakequant`.
        """
        leaves = self.leaves
        if not leaves or self._made_for != made_for or is_transformed():
            return None
        tensors = leaves.values()
        if self._addresses != list(map(Tensor.data_ptr, tensors)) or any(any(map(hooks, tensors)) for hooks in _HOOKS):
            return None
        check(state, spec, values=is_read)
        torch.clear_autocast_cache()  # in which the leaves' old values may be
        for group in spec.groups:
            outs = Contiguous(map(leaves.__getitem__, group.names))
            quantize_group(params, group, state[group.key], out_dtype=None, backward="pass_through", outs=outs)
        return {**params, **leaves}

    def keep(
        self,
        leaves: Mapping[str, Tensor],
        quantized: Sequence[str],
        others: Sequence[str],
        *,
        spec: Spec,
        made_for: object,
    ) -> None:
        """Keep the fake weights among these, and which parameters are trained, quantized and not."""
        self.leaves = {name: leaves[name] for group in spec.groups for name in group.names}
        self.quantized, self.others = list(quantized), list(others)
        self._made_for = made_for
        self._addresses = list(map(Tensor.data_ptr, self.leaves.values()))

    def forget_gradients(self) -> None:
        """The caller has them, or the step failed: the next one must not add to them."""
        for leaf in self.leaves.values():
            leaf.grad = None
