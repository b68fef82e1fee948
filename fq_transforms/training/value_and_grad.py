"""Losses and gradients of an optimizer step: one `fakequant` and one pullback, however many microbatches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.quantize import quantized_inputs
from fq_transforms.checks import check_is_tensor, refuse_compiled, refuse_transforms
from fq_transforms.in_use import InUse
from fq_transforms.rounding import Stochastic
from fq_transforms.state import State
from fq_transforms.training.main_grad import carry_main_grad, has_main_grad
from fq_transforms.training.wrapped import check_plain, check_unparametrized
from fq_transforms.transform import Transform

__all__ = ["value_and_grad"]


class ValueAndGrad(Protocol):
    """`(params, state, microbatches) -> (losses, grads)`; `rounding` is that of `fq.fakequant`."""

    def __call__(
        self,
        params: Mapping[str, Tensor],
        state: State,
        microbatches: Iterable[Any],
        *,
        rounding: Stochastic | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def value_and_grad(loss_fn: Callable[[Module, Any], Tensor], fq: Transform, model: Module) -> ValueAndGrad:
    """A function `(params, state, microbatches, *, rounding=None) -> (losses, grads)`: one `fakequant`, one pullback.

    `losses` is [microbatches], detached. `grads` has an entry for each parameter that requires a gradient, in its shape
    and dtype, added up over microbatches: zeros if no loss depends on it, `main_grad` itself if it has one.

    Args:
        loss_fn: `loss_fn(model, microbatch)` gives a scalar, scaled as for any gradient accumulation.
        fq: "pass_through" or "clip". Inputs are quantized as by `fq.apply`; their layers cannot be checkpointed.
        model: What the weights are put into. Its own parameters and their `grad` stay as they are; those that `params`
            lacks are constants.

    Raises:
        KeyError, ValueError: As `fq.fakequant`; a parameter is not in the model; one with `main_grad` is not given;
            none is trained; no microbatch; a loss is no scalar or has no gradient; "lsq"; "clip" and `main_grad`; a
            module is wrapped or compiled, a weight parametrized, the model in use by another thread or by
            `layerwise` (docs/training.md).

    Source: the design of JAX's `value_and_grad`.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"weight": torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))}
        >>> fq = fqt.transform(fqt.select(params, {"weight": fqt.FP8}))
        >>> step = value_and_grad(lambda model, x: model(x).sum(), fq, torch.nn.Linear(2, 1, bias=False))
        >>> step(params, fq.calibrate(params), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        (tensor([-3., -5.]), {'weight': tensor([[4., 6.]])})
    """
    if fq.backward == "lsq":
        raise ValueError(
            "backward: found 'lsq', whose gradient of the state is not among what value_and_grad gives, wanted "
            "'pass_through' or 'clip'; take torch.func.vjp of fq.fakequant in params and state"
        )
    check_plain("model", model.modules())
    check_unparametrized(fq.spec)
    run = _Run(loss_fn, model)

    def step(
        params: Mapping[str, Tensor],
        state: State,
        microbatches: Iterable[Any],
        *,
        rounding: Stochastic | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        refuse_transforms("value_and_grad", "take torch.func.grad of a loss with fq.apply")
        refuse_compiled("value_and_grad", "compile what loss_fn calls")
        check_plain("model", model.modules())  # again: it may have been compiled or wrapped since
        for name, param in params.items():
            check_is_tensor(f"parameter {name!r}", param)
        trained = [name for name, param in params.items() if param.requires_grad]
        if not trained:
            raise ValueError(f"params: found none of {len(params)} that requires a gradient, wanted one at least")
        fused: dict[str, Any] = {name: params[name] for name in trained if has_main_grad(params[name])}
        # Primals of our own, so that the pullback ends at them and not in the caller's graph.
        primals = {name: param.detach().requires_grad_(param.requires_grad) for name, param in params.items()}
        losses: list[Tensor] = []
        with torch.enable_grad():
            weights = fq.fakequant(primals, state, rounding=rounding)
            leaves = {name: weight.detach().requires_grad_(name in trained) for name, weight in weights.items()}
            carry_main_grad(fq, params, {name: leaves[name] for name in trained})
            use = InUse("value_and_grad", model.named_modules(), nests=True)
            try:
                with use, use, quantized_inputs(model, leaves, state, spec=fq.spec, backward=fq.backward):
                    tensors = leaves | _constants(model, params)  # now that nobody else exchanges the model's own
                    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
                    for microbatch in microbatches:  # each is drawn with the model as it is
                        losses.append(use.call(run, named, (microbatch,), {}))
                        for name, param in fused.items():
                            _settle(param, leaves[name])
            finally:
                torch.clear_autocast_cache()  # which would keep the leaves alive
        if not losses:
            raise ValueError("microbatches: found none, wanted one at least")
        grads: dict[str, Tensor] = {}
        for name in trained:
            found = fused[name].main_grad if name in fused else leaves[name].grad
            grads[name] = torch.zeros_like(leaves[name]) if found is None else found
        pulled = [name for name in trained if weights[name] is not primals[name] and name not in fused]
        if pulled:
            ends, starts, cotangents = ([tree[name] for name in pulled] for tree in (weights, primals, grads))
            grads.update(zip(pulled, torch.autograd.grad(ends, starts, cotangents), strict=True))
        return torch.stack(losses), grads

    return step


class _Run(Module):
    """Loss and backward of a microbatch, with whatever `functional_call` puts into the model."""

    def __init__(self, loss_fn: Callable[[Module, Any], Any], model: Module) -> None:
        super().__init__()
        self.loss_fn, self.model = loss_fn, model

    def forward(self, microbatch: Any) -> Tensor:
        loss = self.loss_fn(self.model, microbatch)
        if not isinstance(loss, Tensor):
            raise ValueError(f"loss_fn: found {type(loss).__name__}, wanted a scalar tensor")
        if loss.numel() != 1:
            raise ValueError(f"loss_fn: found a loss of shape {tuple(loss.shape)}, wanted a scalar")
        if not loss.requires_grad:
            raise ValueError(
                "loss_fn: found a loss that depends on no trained parameter, wanted one with a gradient; is it "
                "detached, or was it computed under no_grad?"
            )
        loss.backward()
        return loss.detach().reshape(())


def _constants(model: Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's other parameters that require a gradient, with a `grad` of their own that nobody reads.

    Without one, a reentrant checkpoint that they lead to would give none to what is within it either.

    Raises:
        KeyError: The model lacks a parameter, which `functional_call` would leave out in silence.
        ValueError: Another has `main_grad`, to which its layer may add.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if missing := next((name for name in params if name not in own), None):
        raise KeyError(f"parameter {missing!r} is not in the {type(model).__name__}; pass its own named_parameters()")
    given = {id(own[name]) for name in params}  # by whatever name
    others = {name: one for name, one in model.named_parameters() if one.requires_grad and id(one) not in given}
    if fused := next((name for name, other in others.items() if has_main_grad(other)), None):
        raise ValueError(
            f"params: found no {fused!r}, which has main_grad and requires a gradient, wanted it too; or call "
            "requires_grad_(False) on it"
        )
    return {name: other.detach().requires_grad_() for name, other in others.items()}


def _settle(param: Any, leaf: Tensor) -> None:
    """Add what a microbatch left in `grad` to `main_grad`, unless the layer has done so itself."""
    if leaf.grad is not None and not getattr(leaf, "grad_added_to_main_grad", False):
        param.main_grad.add_(leaf.grad)
    leaf.grad = None
