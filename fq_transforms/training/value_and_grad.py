"""Losses and gradients of an optimizer step: one `fakequant` and one pullback, however many microbatches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.quantize import quantized_inputs
from fq_transforms.dtensor import is_sharded
from fq_transforms.rounding import Stochastic
from fq_transforms.state import State
from fq_transforms.training.kept import Kept
from fq_transforms.training.layerwise import check_not_fsdp
from fq_transforms.training.main_grad import carry_main_grad, has_main_grad
from fq_transforms.training.slots import Places
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


def value_and_grad(
    loss_fn: Callable[[Module, Any], Tensor], fq: Transform, model: Module, *, keep: bool = False
) -> ValueAndGrad:
    """A function `(params, state, microbatches, *, rounding=None) -> (losses, grads)`: one `fakequant`, one pullback.

    `losses` is [microbatches], detached. `grads` has an entry for each parameter that requires a gradient, in its shape
    and dtype, added up over microbatches: zeros if no loss depends on it, `main_grad` itself if it has one.

    Args:
        loss_fn: `loss_fn(model, microbatch)` gives a scalar, scaled as for any gradient accumulation.
        fq: "pass_through" or "clip". Inputs are quantized as by `fq.apply`; their layers cannot be checkpointed.
        model: What the weights are put into. Its own parameters and their `grad` are neither used nor changed.
        keep: Write over the last step's fake weights, which `loss_fn` must not hold on to: see docs/training.md.

    Raises:
        KeyError, ValueError: As `fq.fakequant`; a parameter is not in the model; none is trained; no microbatch; a loss
            is no scalar or has no gradient; "lsq"; "clip" and `main_grad`; FSDP2; `keep` with clip, rounding, DTensors.

    Source: the design of JAX's `value_and_grad`.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"weight": torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))}
        >>> fq = fqt.transform(fqt.select(params, {"weight": fqt.FP8}))
        >>> step = value_and_grad(lambda model, x: model(x).sum(), fq, torch.nn.Linear(2, 1, bias=False))
        >>> step(params, fq.calibrate(params), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        (tensor([-3., -5.]), {'weight': tensor([[4., 6.]])})
    """
    check_not_fsdp("model", model.modules())
    if fq.backward == "lsq":
        raise ValueError(
            "backward: found 'lsq', whose gradient of the state is not among what value_and_grad gives, wanted "
            "'pass_through' or 'clip'; take torch.func.vjp of fq.fakequant in params and state"
        )
    places = Places(model)
    if keep and fq.backward != "pass_through":
        raise ValueError(f"keep: found backward={fq.backward!r}, wanted 'pass_through'")
    memory = Kept() if keep else None

    def step(
        params: Mapping[str, Tensor],
        state: State,
        microbatches: Iterable[Any],
        *,
        rounding: Stochastic | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if keep and rounding is not None:
            raise ValueError(f"keep: found rounding={rounding}, wanted None; leave `keep` away")
        trained = [name for name, param in params.items() if param.requires_grad]
        if not trained:
            raise ValueError(f"params: found none of {len(params)} that requires a gradient, wanted one at least")
        fused: dict[str, Any] = {name: params[name] for name in trained if hasattr(params[name], "main_grad")}
        fused = {name: param for name, param in fused.items() if has_main_grad(param)}
        # A step within a step, as where microbatches are drawn, has weights of its own.
        kept = None if memory is None or memory.is_used else memory
        try:
            if kept is not None:
                kept.is_used = True
            with torch.enable_grad():
                leaves, pull = _fake_leaves(fq, params, state, rounding, trained, fused, kept)
                places.find(leaves)
                with quantized_inputs(model, leaves, state, spec=fq.spec, backward=fq.backward):
                    losses = _run(partial(loss_fn, model), microbatches, places, leaves, fused)
            if not losses:
                raise ValueError("microbatches: found none, wanted one at least")
            grads: dict[str, Any] = {name: leaves[name].grad for name in trained}
        finally:
            if kept is not None:
                kept.is_used = False
                kept.forget_gradients()
        grads.update((name, param.main_grad) for name, param in fused.items())
        for name, grad in grads.items():
            if grad is None:
                grads[name] = torch.zeros_like(leaves[name])
        grads.update(pull(grads))
        return torch.stack(losses), grads

    return step


def _fake_leaves(
    fq: Transform,
    params: Mapping[str, Tensor],
    state: State,
    rounding: Stochastic | None,
    trained: Sequence[str],
    fused: Mapping[str, Any],
    kept: Kept | None,
) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """What the model computes with: leaves that end the graph, and how their gradients get to the quantized weights."""
    made_for, leaves = None, None
    if kept is not None:
        firsts = [params[group.names[0]] for group in fq.spec.groups if group.names[0] in params]
        likes = [(type(first), first.shape, first.dtype, first.device) for first in firsts]
        made_for = (trained, list(fused), likes)
        leaves = kept.refill(params, state, spec=fq.spec, made_for=made_for)
    needs_graph = leaves is None and not _is_identity(fq, params)
    primals = params
    if needs_graph:  # primals of our own, so that the pullback ends at them and not in the caller's graph
        if kept is not None:
            raise ValueError("keep: found DTensors, wanted plain tensors; leave `keep` away")
        primals = {name: param.detach().requires_grad_(param.requires_grad) for name, param in params.items()}
    if kept is not None and leaves is not None:
        quantized, others, weights = kept.quantized, kept.others, dict(leaves)
    else:
        with torch.set_grad_enabled(needs_graph):
            weights = fq.fakequant(primals, state, rounding=rounding)
        leaves = {name: weight.detach() for name, weight in weights.items()} if needs_graph else dict(weights)
        quantized = [name for name in trained if weights[name] is not primals[name]]
        others = [name for name in trained if weights[name] is primals[name]]
        for name in quantized:
            leaves[name].requires_grad_()
        if kept is not None:
            kept.keep(leaves, quantized, others, spec=fq.spec, made_for=made_for)
    for name in others:
        leaves[name] = params[name].detach().requires_grad_()
    if fused:
        carry_main_grad(fq, params, {name: leaves[name] for name in (*quantized, *fused)})

    def pull(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pulled = [name for name in quantized if name not in fused] if fused else quantized
        if not needs_graph:
            is_cast = any(weights[group.names[0]].dtype != params[group.names[0]].dtype for group in fq.spec.groups)
            return {name: grads[name].to(params[name].dtype) for name in pulled} if is_cast else {}
        if not pulled:
            return {}
        ends, starts, cotangents = ([tree[name] for name in pulled] for tree in (weights, primals, grads))
        return dict(zip(pulled, torch.autograd.grad(ends, starts, cotangents), strict=True))

    return leaves, pull


def _is_identity(fq: Transform, params: Mapping[str, Tensor]) -> bool:
    """True if the pullback is known to be the identity: no graph has to be kept for it, nor walked."""
    firsts = (params.get(group.names[0]) for group in fq.spec.groups)  # a group is sharded as its first parameter is
    return fq.backward == "pass_through" and not any(p is not None and is_sharded(p) for p in firsts)


def _run(
    loss_of: Callable[[Any], Any],
    microbatches: Iterable[Any],
    places: Places,
    leaves: Mapping[str, Tensor],
    fused: Mapping[str, Any],
) -> list[Tensor]:
    """Losses of all microbatches, and gradients in the leaves, which are the model's parameters for each of them."""
    losses: list[Tensor] = []
    is_drawn = isinstance(microbatches, list | tuple)  # else each is drawn with the model as it is
    try:
        for microbatch in microbatches:
            if not losses or not is_drawn:
                places.slots.put(leaves)
            loss = loss_of(microbatch)
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
            if not is_drawn:
                places.put_back()
            losses.append(loss.detach() if loss.dim() == 0 else loss.detach().reshape(()))
            for name, param in fused.items():
                _settle(param, leaves[name])
    finally:
        places.put_back()
    return losses


def _settle(param: Any, leaf: Tensor) -> None:
    """Add what a microbatch left in `grad` to `main_grad`, unless the layer has done so itself."""
    if leaf.grad is not None and not getattr(leaf, "grad_added_to_main_grad", False):
        param.main_grad.add_(leaf.grad)
    leaf.grad = None
