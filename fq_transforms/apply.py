"""`apply`: the model's output with weights and inputs fake-quantized, as a pure function."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from fq_transforms.fakequant import fakequant
from fq_transforms.inputs import quantize_input
from fq_transforms.ops.autograd import Backward
from fq_transforms.products import Use, products
from fq_transforms.select import Spec
from fq_transforms.state import InputAmax, State, check, plain_weights_of

__all__ = ["apply"]


def apply(
    model: Module,
    params: Mapping[str, Tensor],
    state: State,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    spec: Spec,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
) -> Any:
    """`functional_call(model, fakequant(params, state), args, kwargs)`, each x of x @ w.T quantized where inputs are.

    Only this call computes so: no module, class or function is changed, but for forward pre-hooks on layers of
    Transformer Engine and Megatron, which are removed when it ends, by an exception too. Calls may be nested.

    Args:
        model: Whose parameters `params` are.
        params: Names to tensors; may hold more than the spec names.
        state: From `calibrate` or `finish`, or loaded.
        args: The model's.
        kwargs: The model's.
        spec: What is quantized, and how.
        out_dtype: Of the weights, as `fakequant`; an input keeps its dtype.
        backward: As `fakequant`, for weights and for inputs: "clip" stops the gradient of an input beyond a calibrated
            amax by tensor.
        separate: As `fakequant`.

    Returns:
        What the model returns; differentiable in `params`, and in `args` and `kwargs`.

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: As `fakequant`; an expert has seen no token; a selected weight is used in another way than a product
            with an input, or in a layer that is computed again in backward, where nothing would be quantized; a layer
            with inputs never ran; DTensors, torch.compile and vmap over weights.

    Example:
        >>> import fq_transforms as fqt
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.eye(2))
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}, inputs={"*": fqt.INT8}), model=model)
        >>> state = fq.calibrate(params, torch.tensor([[1.0, -2.0]]))
        >>> fq.apply(params, state, torch.tensor([[0.5, 3.0]]))
        tensor([[0.5039, 2.0000]], grad_fn=<MmBackward0>)
    """
    weights = fakequant(params, state, spec=spec, out_dtype=out_dtype, backward=backward, separate=separate)
    if not spec.inputs:
        return functional_call(model, weights, args, dict(kwargs))
    for inputs in spec.inputs:
        plain_weights_of(params, inputs)
    _check_seen(state, spec)
    differentiates, hooks = torch.is_grad_enabled(), _saved_tensors_hooks()

    def quantize(use: Use, x: Tensor) -> Tensor:
        if differentiates and (not torch.is_grad_enabled() or _saved_tensors_hooks() != hooks):
            _refuse_recomputed(use, x, weights)
        return quantize_input(use, x, state[use.inputs.key], backward=backward)

    with products(model, weights, spec.inputs, quantize) as seen:
        out = functional_call(model, weights, args, dict(kwargs))
    if idle := [inputs.key for inputs in spec.inputs if inputs.key not in seen and inputs.always_runs]:
        raise ValueError(
            f"inputs {idle[0]!r}: found that its layer never ran in this call ({len(idle)} of {len(spec.inputs)} "
            "groups did not), or used another tensor than its parameter, wanted every selected layer to run; take it "
            "out of `inputs` with a rule to None"
        )
    return out


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore


def _refuse_recomputed(use: Use, x: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a layer whose forward will run again in backward, outside of the call."""
    if x.requires_grad or any(weights[name].requires_grad for name in use.inputs.names):
        raise ValueError(
            f"inputs {use.inputs.key!r}: found its layer under activation checkpointing, saved-tensor hooks or "
            "torch.no_grad, wanted it as the rest of the call: backward would compute it again with inputs that are "
            "not quantized; switch checkpointing off, or call `apply` within what sets the hooks"
        )


def _check_seen(state: State, spec: Spec) -> None:
    """Raise ValueError unless every input has an amax. Those on a CPU `fakequant` has checked; others wait once."""
    leaves = [entry.amax for entry in state.values() if isinstance(entry, InputAmax)]
    for device in {leaf.device for leaf in leaves if leaf.device.type not in ("cpu", "meta")}:
        if not bool(torch.cat([leaf for leaf in leaves if leaf.device == device]).isfinite().all()):
            check(state, spec)
