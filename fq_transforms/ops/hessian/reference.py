"""The definition of sums of products of inputs, in plain PyTorch.

NOTE sums: products are exact or fp32, their sums fp32, in whatever order the library or the kernel adds. They are
within T * 2**-24 of the sum of magnitudes for T tokens; tests hold them against float64. They are symmetric to the bit.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

__all__ = ["add_products_reference"]


def add_products_reference(
    sums: Float32[Tensor, "e in in"], x: Float[Tensor, "tokens in"], order: Int64[Tensor, " some"], starts: list[int]
) -> None:
    """sums[e] += the sum of x[t] x[t]^T over the tokens t of expert e, which are order[starts[e] : starts[e + 1]].

    Example:
        >>> sums, x = torch.zeros(2, 2, 2), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> add_products_reference(sums, x, torch.tensor([1, 0]), [0, 0, 2])
        >>> sums.tolist()
        [[[0.0, 0.0], [0.0, 0.0]], [[10.0, 2.0], [2.0, 4.0]]]
    """
    for e, (first, end) in enumerate(pairwise(starts)):
        if first < end:
            own = x[order[first:end]].float()
            product = torch.zeros_like(sums[e]).addmm_(own.mT, own)
            sums[e] += product.triu() + product.triu(1).mT  # a library need not add both halves in one order
