"""Sums of products of inputs: the kernel's launcher, and the choice between it and the reference, by the device."""

from typing import Any

import torch
from torch import Tensor

from fq_transforms.ops.hessian.reference import add_products_reference

__all__ = ["add_products", "add_products_triton"]

# A tile's side, the tokens of a step, and warps: the quickest on an H200, of 64 and 128, 32 and 64, 4 and 8.
SIDE, TOKENS, WARPS = 64, 64, 4


def add_products(sums: Tensor, x: Tensor, experts: Tensor | int) -> None:
    """sums[e] += the sum of x[t] x[t]^T over the tokens of expert e.

    Args:
        sums: fp32 [E, in, in], dense.
        x: [tokens, in], bf16, fp16 or fp32.
        experts: The expert of all tokens; or of each, integers [tokens], where E is none.
    """
    count = len(sums)
    if isinstance(experts, int):
        order = torch.arange(len(x), device=x.device)
        counts = torch.zeros(count + 1, dtype=torch.int64, device=x.device)
        counts[experts] = len(x)
    else:
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=count + 1)
    starts = torch.nn.functional.pad(counts[:count].cumsum(0), (1, 0))
    if x.is_cuda:
        add_products_triton(sums, x, order, starts)
    else:
        add_products_reference(sums, x, order, starts.tolist())


def add_products_triton(
    sums: Tensor, x: Tensor, order: Tensor, starts: Tensor, *, side: int = SIDE, tokens: int = TOKENS
) -> None:
    """`add_products_reference` in one launch."""
    from fq_transforms.ops.hessian.kernel import add_products_kernel

    x, in_features = x.contiguous(), x.shape[-1]
    tiles = -(-in_features // side)
    grid = (tiles * tiles, len(sums))
    numbers: Any = {"SIDE": side, "TOKENS": tokens, "num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        add_products_kernel[grid](x, order, starts, sums, in_features, tiles, **numbers)
