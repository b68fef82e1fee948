"""`apply`: the model's output with weights and inputs fake-quantized, as a pure function."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from fq_transforms.activations.quantize import quantized_inputs
from fq_transforms.fakequant import fakequant
from fq_transforms.ops.quantize.autograd import Backward
from fq_transforms.spec import Spec
from fq_transforms.state import State

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
            amax by tensor; "lsq" only where no inputs are selected.
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
    with quantized_inputs(model, weights, state, spec=spec, backward=backward):
        return functional_call(model, weights, args, dict(kwargs))
