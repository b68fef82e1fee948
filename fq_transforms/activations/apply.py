"""`apply`: the model's output with weights and inputs fake-quantized, as a pure function."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.quantize import check_traced, quantized_inputs, traced_inputs
from fq_transforms.fakequant import fakequant
from fq_transforms.in_use import InUse, call_traced
from fq_transforms.ops.private import is_in_compiled
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
    if torch.compiler.is_compiling():  # which cannot trace who else uses the model
        if not spec.inputs:
            return call_traced(model, weights, args, dict(kwargs))
        # A view would be known as another's memory.
        weights = {name: w if w._base is None else w.clone() for name, w in weights.items()}  # pyright: ignore[reportPrivateUsage]
        traced = traced_inputs(model, weights, state, spec=spec, backward=backward)
        with traced:
            out = call_traced(model, weights, args, dict(kwargs))
        check_traced(traced, spec)
        return out
    if is_in_compiled():  # a graph could not: eager code does it, and the model that it runs is left alone
        run: Any = torch.compiler.disable(_applied)
        return run(model, weights, state, args, kwargs, spec, backward)
    return _applied(model, weights, state, args, kwargs, spec, backward)


def _applied(
    model: Module,
    weights: dict[str, Tensor],
    state: State,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    spec: Spec,
    backward: Backward,
) -> Any:
    use = InUse("apply", model.named_modules(), nests=True)
    with use, use, quantized_inputs(model, weights, state, spec=spec, backward=backward):
        return use.call(model, weights, args, dict(kwargs))
