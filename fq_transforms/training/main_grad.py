"""Fused gradient accumulation under fake quantization: the fake weight carries the real weight's `main_grad`.

Transformer Engine and Megatron add a weight's gradient to `weight.main_grad` within the matrix product, and say so by
`weight.grad_added_to_main_grad`. Under "pass_through" the gradient of the fake weight is that of the real one, so both
can share the memory. Under any other rule they cannot: what the layer adds has not been through the rule.
"""

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from fq_transforms.transform import Transform

__all__ = ["carry_main_grad", "has_main_grad"]

# What Transformer Engine 2.20 and Megatron-Core 0.19 ask a weight for. The first two are its memory and its answer.
ATTRIBUTES = ("main_grad", "grad_added_to_main_grad", "zero_out_wgrad", "overwrite_main_grad")


def has_main_grad(param: Tensor) -> bool:
    """True if gradients of a parameter are accumulated in its `main_grad`."""
    return getattr(param, "main_grad", None) is not None


def carry_main_grad(fq: Transform, params: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Let fake-quantized weights accumulate their gradients where the parameters do. Changes attributes only.

    Args:
        fq: What made the weights.
        params: Names to parameters. Those without `main_grad` are left alone.
        weights: From `fq.fakequant` of these parameters, or leaves made of its results. Entries that are the parameter
            itself are left alone.

    Raises:
        KeyError: A weight has no parameter.
        ValueError: A quantized parameter has `main_grad` and `fq` another rule than "pass_through"; a parameter is
            sharded by Megatron's FSDP, which makes `main_grad` during the backward pass.

    Source: Transformer Engine 2.20.2 `module/grouped_linear.py`, Megatron-Core 0.19.2 `DistributedDataParallel`.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"experts.0.w": torch.nn.Parameter(torch.ones(2, 2))}
        >>> params["experts.0.w"].main_grad = torch.zeros(2, 2)
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        >>> weights = fq.fakequant(params, fq.calibrate(params))
        >>> carry_main_grad(fq, params, weights)
        >>> weights["experts.0.w"].main_grad is params["experts.0.w"].main_grad
        True
    """
    quantized: set[str] | None = None  # made where it is asked for: the names of a whole model
    for name, weight in weights.items():
        param = params[name]
        if hasattr(param, "__fsdp_param__") and weight is not param:
            raise ValueError(
                f"parameter {name!r}: found one that Megatron's FSDP shards, wanted Megatron's DistributedDataParallel "
                "or FSDP2"
            )
        if weight is param or not has_main_grad(param):
            continue
        if fq.backward != "pass_through":
            quantized = quantized or {one for group in fq.spec.groups for one in group.names}
            if name in quantized:
                raise ValueError(
                    f"parameter {name!r}: found main_grad and backward={fq.backward!r}, wanted 'pass_through'; or "
                    "switch off gradient-accumulation fusion"
                )
        for attribute in ATTRIBUTES:
            if hasattr(param, attribute):
                setattr(weight, attribute, getattr(param, attribute))
            elif hasattr(weight, attribute):
                delattr(weight, attribute)
        if hasattr(param, "grad_added_to_main_grad") and not weight.is_leaf:
            _report_back(weight, param)


def _report_back(weight: Tensor, param: Tensor) -> None:
    """Tell the parameter that its gradient was added, before anything is added a second time."""
    fake = weakref.ref(weight)  # or the hook would keep alive the tensor that it is on

    def report(grad: Tensor) -> None:
        if (found := fake()) is not None and found.grad_added_to_main_grad:  # pyright: ignore[reportAttributeAccessIssue]
            param.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]

    if weight.requires_grad and torch.is_grad_enabled():
        weight.register_hook(report)
