"""Searches for an amax over the weights of a group: kernel or reference by the device, and what torch.func needs.

Weights are as `fq_transforms.ops.quantize.autograd` has them. A search is not differentiable; it may run within torch.func.grad
and vjp, whose wrapped tensors only a Function's forward sees plain, but is not mapped by vmap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd import Function

from fq_transforms.formats import Format
from fq_transforms.ops.percentile.reference import percentile_reference
from fq_transforms.ops.sweep.reference import Search, sweep_reference

__all__ = ["percentile_amax", "swept_amax"]


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool
    search: Search | float


def swept_amax(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, "..."] | None,
    importance: Float32[Tensor, "e in"] | None,
    *,
    format: Format,
    transposed: bool = False,
    search: Search,
) -> Float32[Tensor, "..."]:
    """The amax of each granule that has the least error: `sweep_reference` of each expert; one launch on a GPU.

    Args:
        weights: N tensors [*experts, out, in] of one shape and dtype; [*experts, in, out] if transposed.
        amax: fp32 [E, *format.amax_shape(out, in)], of `expert_amax`.
        global_amax: fp32 [E] for static two-level formats, else None.
        importance: fp32 [E, in], finite and at least 0; None for ones. Only ratios within an expert count.
        format: With a static amax.
        transposed: True if a matrix is stored [in, out].
        search: What is tried.

    Returns:
        fp32, a new tensor like `amax`.

    Raises:
        ValueError: It is mapped by vmap.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.6] * 31 + [-1.0]])
        >>> tried = Search("ratios", (0.84,))
        >>> swept_amax([w], torch.tensor([[[1.0]]]), None, None, format=FORMATS["INT4_BLOCK32"], search=tried)
        tensor([[[0.8400]]])
    """
    statics = _Statics(format, transposed, search)
    return _Search.apply(statics, amax, global_amax, importance, *weights)


def percentile_amax(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."],
    *,
    format: Format,
    transposed: bool = False,
    percentile: float,
) -> Float32[Tensor, "..."]:
    """`percentile_reference` of each expert, as a new tensor like `amax`, [E, *format.amax_shape(out, in)].

    On a GPU one launch; per tensor one a digit of the weights' bits, and one more (`percentile_triton`).

    Raises:
        ValueError: It is mapped by vmap.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[1.0, -3.0, 2.0]])
        >>> percentile_amax([w], torch.tensor([3.0]), format=FORMATS["FP8"], percentile=50)
        tensor([2.])
    """
    return _Search.apply(_Statics(format, transposed, percentile), amax, None, None, *weights)


class _Search(Function):
    @staticmethod
    def forward(
        statics: _Statics,
        amax: Tensor,
        global_amax: Tensor | None,
        importance: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        if importance is not None:
            importance = _in_units(importance).contiguous()
        search = statics.search
        layout: Any = {"format": statics.format, "transposed": statics.transposed}
        if weights[0].is_cuda and isinstance(search, Search):
            from fq_transforms.ops.sweep.launch import sweep_triton

            return sweep_triton(weights, amax, global_amax, importance, search=search, **layout)
        if weights[0].is_cuda and not isinstance(search, Search):
            from fq_transforms.ops.percentile.launch import percentile_triton

            return percentile_triton(weights, percentile=search, **layout)
        found = torch.empty_like(amax, memory_format=torch.contiguous_format)
        experts = (matrix for weight in weights for matrix in weight.reshape(-1, *weight.shape[-2:]))
        for e, matrix in enumerate(experts):
            weight = matrix.mT if statics.transposed else matrix
            if isinstance(search, Search):
                g, h = (None if leaf is None else leaf[e] for leaf in (global_amax, importance))
                found[e] = sweep_reference(weight, amax[e], g, h, format=statics.format, search=search)
            else:
                found[e] = percentile_reference(weight, search, format=statics.format)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise AssertionError("amax is not differentiable")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise ValueError("calibrate: found weights under torch.func.vmap, wanted method Max there")


def _in_units(importance: Tensor) -> Tensor:
    """Each expert's importance divided by the power of two that brings its largest into [1, 2)."""
    largest = importance.amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)
    half = (1 - exponent) // 2  # in two steps: 2**149 is beyond fp32
    return torch.ldexp(torch.ldexp(importance, half), 1 - exponent - half)
