"""The definition of a group's cast to fp32, in plain PyTorch; the kernel equals it bit for bit, NaN for NaN."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

__all__ = ["cast_reference"]


def cast_reference(grads: Sequence[Float[Tensor, "out in"]]) -> Float32[Tensor, "e_out in"]:
    """The matrices of a group in fp32, all rows of all of them below each other; exact for bf16 and fp16.

    Example:
        >>> cast_reference([torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)])
        tensor([[1.5000, 2.0000],
                [1.0000, 1.0000]])
    """
    return torch.cat([grad.float() for grad in grads])
