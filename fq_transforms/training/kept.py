"""Fake weights that are kept from step to step and written over: the tensors themselves, with their places in autograd.

To make a tensor for each of N weights, and its leaf in the graph, costs the host more than to fake-quantize them.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fq_transforms.checks import check_state, is_read
from fq_transforms.fakequant import requantize_group
from fq_transforms.ops.launch import Contiguous
from fq_transforms.ops.private import is_transformed
from fq_transforms.spec import Spec
from fq_transforms.state import State
from fq_transforms.training.relaunch import Relaunch

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
        self._relaunch: Relaunch | None = None
        self._read_at: list[int] = []

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
        params = dict(params)  # which may make its tensors as they are asked for
        check_state(state, spec, values=is_read)
        torch.clear_autocast_cache()  # in which the leaves' old values may be
        if self._launch_again(params, state, spec):
            torch.autograd.graph.increment_version(tensors)
        else:
            self._requantize(params, state, spec)
        params.update(leaves)
        return params

    def _launch_again(self, params: Mapping[str, Tensor], state: State, spec: Spec) -> bool:
        """All launches of the last step in one go; False if there are none, or something is not where it was."""
        if self._relaunch is None:
            return False
        try:
            tensors = self._read(params, state, spec)
        except KeyError:  # a parameter is missing: `_requantize` says which
            return False
        return self._relaunch.run(tensors)

    @torch.no_grad()
    def _requantize(self, params: Mapping[str, Tensor], state: State, spec: Spec) -> None:
        """A group at a time.

        The next step makes all launches in one go where each was made before, twice in a row over tensors that are
        apart from each other and at the same addresses: stacked weights, and an amax that alternates between two, are
        looked up at each step.
        """
        placed = [
            requantize_group(params, group, state[group.key], Contiguous(map(self.leaves.__getitem__, group.names)))
            for group in spec.groups
        ]
        launches = [launch for launch in placed if launch is not None]
        tensors = self._read(params, state, spec)
        earlier, self._read_at = self._read_at, list(map(Tensor.data_ptr, tensors))
        is_steady = self._read_at == earlier and len(set(earlier)) == len(earlier)
        self._relaunch = Relaunch(launches, tensors) if is_steady and len(launches) == len(spec.groups) else None

    def _read(self, params: Mapping[str, Tensor], state: State, spec: Spec) -> list[Tensor]:
        """All that a step reads."""
        return [
            *map(params.__getitem__, self.leaves),
            *(leaf for group in spec.groups for leaf in state[group.key].values()),
        ]

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
        self._made_for, self._relaunch = made_for, None
        self._addresses = list(map(Tensor.data_ptr, self.leaves.values()))

    def forget_gradients(self) -> None:
        """The caller has them, or the step failed: the next one must not add to them."""
        for leaf in self.leaves.values():
            leaf.grad = None
