"""Losses and gradients of an optimizer step: one `fakequant` and one pullback, however many microbatches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from fq_transforms.layerwise import check_not_fsdp
from fq_transforms.main_grad import carry_main_grad, has_main_grad
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = ["value_and_grad"]


class ValueAndGrad(Protocol):
    """`(params, state, microbatches) -> (losses, grads)`."""

    def __call__(
        self, params: Mapping[str, Tensor], state: State, microbatches: Iterable[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def value_and_grad(loss_fn: Callable[[Module, Any], Tensor], model: Module, fq: Transform) -> ValueAndGrad:
    """The function that gives the losses and the gradients of a step under fake quantization.

    All microbatches see the same fake weights, which are made once, and the gradients are pulled back to the
    parameters once, through whatever rule `fq` has. `.backward()` is called with the fake weights in place, so that
    checkpointed activations are made again with them too.

    Args:
        loss_fn: `loss_fn(model, microbatch)` gives a scalar. Scale it as for any gradient accumulation: gradients add
            up over the microbatches.
        model: What the weights are put into. Its own parameters are neither used nor changed, nor is its `grad`.
        fq: From `transform`.

    Returns:
        `(params, state, microbatches) -> (losses, grads)`. `losses` is [microbatches], detached. `grads` has an entry
        for each parameter with `requires_grad`, in its shape and dtype; zeros where no loss depends on it. For a
        parameter with `main_grad` the gradients are added to that, by the layer's own fusion where it has one, and
        the entry is `main_grad` itself.

    Raises:
        KeyError, ValueError: As `fakequant`; no parameter requires a gradient; there is no microbatch; a loss is no
            scalar; a quantized parameter has `main_grad`, and `fq` does not pass gradients through. The model is
            FSDP2's, which computes with parameters of its own.

    Source: the design of JAX's `value_and_grad`.

    Example:
        >>> import fq_transforms as fqt
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"weight": fqt.FP8}))
        >>> step = value_and_grad(lambda model, x: model(x).sum(), model, fq)
        >>> step(params, fq.calibrate(params), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        (tensor([-3., -5.]), {'weight': tensor([[4., 6.]])})
    """
    check_not_fsdp("model", model.modules())
    runner = _Runner(model, loss_fn)

    def step(
        params: Mapping[str, Tensor], state: State, microbatches: Iterable[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        trained = [name for name, param in params.items() if param.requires_grad]
        if not trained:
            raise ValueError(f"params: found none of {len(params)} that requires a gradient, wanted one at least")
        with torch.enable_grad():
            # New leaves, so that the pullback ends at them and not in the caller's graph.
            primals = {n: p.detach().requires_grad_(p.requires_grad) for n, p in params.items()}
            weights = fq.fakequant(primals, state)
            leaves = {n: w.detach().requires_grad_(params[n].requires_grad) for n, w in weights.items()}
            quantized = [name for name in trained if weights[name] is not primals[name]]
            carry_main_grad(params, {name: leaves[name] for name in quantized}, backward=fq.backward)
            carry_main_grad(params, {name: leaves[name] for name in trained})
            inside = {f"model.{name}": leaf for name, leaf in leaves.items()}
            losses: list[Tensor] = []
            for microbatch in microbatches:
                losses.append(functional_call(runner, inside, (microbatch,)))
                for name in trained:
                    _settle(params[name], leaves[name])
        if not losses:
            raise ValueError("microbatches: found none, wanted one at least")
        grads = {name: _grad(params[name], leaves[name]) for name in trained}
        pulled = [name for name in quantized if not has_main_grad(params[name])]
        if pulled:
            back = torch.autograd.grad(
                [weights[name] for name in pulled],
                [primals[name] for name in pulled],
                [grads[name] for name in pulled],
            )
            grads |= dict(zip(pulled, back, strict=True))
        return torch.stack(losses), grads

    return step


class _Runner(Module):
    """A model's loss and backward pass as one call, for `functional_call` to surround."""

    def __init__(self, model: Module, loss_fn: Callable[[Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, microbatch: Any) -> Tensor:
        loss = self.loss_fn(self.model, microbatch)
        if loss.numel() != 1:
            raise ValueError(f"loss_fn: found a loss of shape {tuple(loss.shape)}, wanted a scalar")
        loss.backward()
        return loss.detach().reshape(())


def _settle(param: Tensor, leaf: Tensor) -> None:
    """Add what a microbatch left in `grad` to `main_grad`, unless the layer has done so itself."""
    if has_main_grad(param):
        if leaf.grad is not None and not getattr(leaf, "grad_added_to_main_grad", False):
            param.main_grad.add_(leaf.grad)  # pyright: ignore[reportAttributeAccessIssue]
        leaf.grad = None


def _grad(param: Tensor, leaf: Tensor) -> Tensor:
    if has_main_grad(param):
        return param.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
