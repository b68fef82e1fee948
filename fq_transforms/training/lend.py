"""Fake numbers lent to a layer's own parameters, where the layer is one node of the autograd graph.

Such a layer (Transformer Engine's GroupedLinear) saves its parameters themselves, and reads their numbers when it
computes: in forward, and again in backward. So these two moments are all that they have to hold fake numbers for. The
graph is that of the unquantized layer, with the parameters at its ends: no weight is exchanged, kept or made again by
itself, and gradient hooks and `main_grad` see the parameters as always.

NOTE failed backward: an exception in the node skips the hook that takes the numbers back. Whoever comes next takes them
back: the layer's forward, the model's, or the end of `layerwise`, after which no backward may lend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lender", "is_lendable"]


class Lender:
    """Lends fake numbers to the parameters of one layer, and takes them back."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.lent: Sequence[Tensor] = ()
        self.own: Sequence[Tensor] = ()
        self.node_type: type | None = None
        self.is_over = False

    def lend(self, params: Sequence[Tensor], fakes: Sequence[Tensor]) -> None:
        """Let parameters hold fake numbers of the same shapes and dtype."""
        self.take_back()
        self.lent, self.own = params, [param.data for param in params]
        _put(params, fakes)

    def take_back(self) -> None:
        """Let them hold their own numbers; nothing if they do."""
        _put(self.lent, self.own)
        self.lent = self.own = ()

    def end(self) -> None:
        """Take back, and lend no more."""
        self.take_back()
        self.is_over = True

    def follow(self, output: Any, params: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> None:
        """Lend once more while the node that made `output` runs backward.

        Args:
            output: What the layer gave: a tensor, or a tuple that begins with it.
            params: What it computed with.
            make: Gives the fake numbers of forward.

        Raises:
            ValueError: Other nodes than that of the output use the parameters.
        """
        first = output if isinstance(output, Tensor) else output[0]
        node: Any = first.grad_fn
        if node is None:
            return
        if type(node) is not self.node_type:
            self._check_ends(node, params)
            self.node_type = type(node)

        def begin(grads: Any) -> None:
            if self.is_over:
                raise RuntimeError(f"layer {self.layer}: found backward after layerwise, wanted it within")
            self.lend(params, make())

        def end(inputs: Any, outputs: Any) -> None:
            self.take_back()

        node.register_prehook(begin)
        node.register_hook(end)

    def _check_ends(self, node: Any, params: Sequence[Tensor]) -> None:
        ends = {id(end.variable) for end, _ in node.next_functions if hasattr(end, "variable")}
        if any(param.requires_grad and id(param) not in ends for param in params):
            raise ValueError(
                f"layer {self.layer}: found that {node.name()}, which made its output, is not what uses all of its "
                "parameters, wanted a layer that is one node of the graph; pass lends=None"
            )


def is_lendable(param: Tensor, out_dtype: torch.dtype | None) -> bool:
    """True for what can hold other numbers for a while: a leaf, plain, of the dtype of the fake numbers."""
    is_plain = type(param) in (Tensor, torch.nn.Parameter) and param.is_leaf and not param.is_inference()
    return is_plain and out_dtype in (None, param.dtype)


def _put(params: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
    for param, its in zip(params, numbers, strict=True):
        param.data = its
