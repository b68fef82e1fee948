"""The sweep over amax of a group: kernel or reference by the device, and what torch.func needs.

A search is not differentiable; it may run within torch.func.grad and vjp, whose wrapped tensors only a Function's
forward sees plain, but is not mapped by vmap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import each_expert, has_kernel
from fq_transforms.ops.sweep.reference import Search, sweep_reference
from fq_transforms.ops.vmap import Unmapped

__all__ = ["in_units", "swept_amax"]


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool
    search: Search


def swept_amax(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, "..."] | None,
    importance: Float32[Tensor, "e in"] | Float32[Tensor, "e blocks b b"] | None,
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
        importance: fp32 [E, in], finite and at least 0; None for ones. Only ratios within an expert count. For blocks
            along `in` also [E, in / B, B, B], symmetric; only ratios within a block count.
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
    return _Sweep.apply(_Statics(format, transposed, search), amax, global_amax, importance, *weights)


class _Sweep(Unmapped):
    @staticmethod
    def forward(
        statics: _Statics,
        amax: Tensor,
        global_amax: Tensor | None,
        importance: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        format, transposed, search = statics.format, statics.transposed, statics.search
        if importance is not None:
            importance = in_units(importance).contiguous()
        if has_kernel(weights):
            from fq_transforms.ops.sweep.launch import sweep_triton

            numbers: dict[str, Any] = {"format": format, "transposed": transposed, "search": search}
            return sweep_triton(weights, amax, global_amax, importance, **numbers)
        found = torch.empty_like(amax, memory_format=torch.contiguous_format)
        for e, weight in enumerate(each_expert(weights, transposed)):
            g, h = (None if leaf is None else leaf[e] for leaf in (global_amax, importance))
            found[e] = sweep_reference(weight, amax[e], g, h, format=format, search=search)
        return found


def in_units(importance: Tensor) -> Tensor:
    """Each expert's importance divided by the power of two that brings its largest into [1, 2).

    Of block-diagonal second moments each block's, by the largest of its diagonal; and symmetric to the bit.
    """
    is_local = importance.dim() == 4
    squares = importance.diagonal(dim1=-2, dim2=-1) if is_local else importance
    _, exponent = torch.frexp(squares.amax(-1, keepdim=True))
    exponent = exponent[..., None] if is_local else exponent
    half = (1 - exponent) // 2  # in two steps: 2**149 is beyond fp32
    scaled = torch.ldexp(torch.ldexp(importance, half), 1 - exponent - half)
    return (scaled + scaled.mT) / 2 if is_local else scaled
