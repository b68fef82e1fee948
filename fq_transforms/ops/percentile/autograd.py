"""The percentile of a group's magnitudes: kernel or reference by the device, and what torch.func needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import each_expert, has_kernel
from fq_transforms.ops.percentile.reference import percentile_reference
from fq_transforms.ops.vmap import Unmapped

__all__ = ["percentile_amax"]


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool
    percentile: float


def percentile_amax(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."],
    *,
    format: Format,
    transposed: bool = False,
    percentile: float,
) -> Float32[Tensor, "..."]:
    """`percentile_reference` of each expert, as a new tensor like `amax`, [E, *format.amax_shape(out, in)].

    On a GPU one launch; per tensor one per digit of the weights' bits, and one more (`percentile_triton`).

    Raises:
        ValueError: It is mapped by vmap.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[1.0, -3.0, 2.0]])
        >>> percentile_amax([w], torch.tensor([3.0]), format=FORMATS["FP8"], percentile=50)
        tensor([2.])
    """
    return _Percentile.apply(_Statics(format, transposed, percentile), amax, *weights)


class _Percentile(Unmapped):
    @staticmethod
    def forward(statics: _Statics, amax: Tensor, *weights: Tensor) -> Tensor:
        format, transposed, percentile = statics.format, statics.transposed, statics.percentile
        if has_kernel(weights):
            from fq_transforms.ops.percentile.launch import percentile_triton

            return percentile_triton(weights, format=format, transposed=transposed, percentile=percentile)
        found = torch.empty_like(amax, memory_format=torch.contiguous_format)
        for e, weight in enumerate(each_expert(weights, transposed)):
            found[e] = percentile_reference(weight, percentile, format=format)
        return found
