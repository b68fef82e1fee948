"""`apply`: the model's output with weights and inputs fake-quantized, as a pure function."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from fq_transforms.activations.quantize import quantized_inputs
from fq_transforms.fakequant import fakequant
from fq_transforms.in_use import InUse
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
    out_dtype: torch.dtype | None,
    backward: Backward,
    separate: bool,
) -> Any:
    """`Transform.apply`, with the options of the Transform given one by one."""
    weights = fakequant(params, state, spec=spec, out_dtype=out_dtype, backward=backward, separate=separate)
    if torch.compiler.is_compiling() and not spec.inputs:  # which cannot trace who else uses the model
        return functional_call(model, weights, args, dict(kwargs))
    use = InUse("apply", model.named_modules(), nests=True)
    with use, use, quantized_inputs(model, weights, state, spec=spec, backward=backward):
        return use.call(model, weights, args, dict(kwargs))
