"""The definition of amax, in plain PyTorch; the kernel equals it bit for bit."""

from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.quantize.reference import in_granules

__all__ = ["expert_amax_reference"]


def expert_amax_reference(
    weight: Float[Tensor, "*experts out in"], *, format: Format
) -> tuple[Float32[Tensor, "..."], Float32[Tensor, "*experts"] | None]:
    """Largest absolute value of each granule, and for static two-level formats of each expert as well.

    Args:
        weight: bf16, fp16 or fp32; any number of leading expert dimensions.
        format: The numbers; for dynamic formats the granule is the whole expert.

    Returns:
        `amax`, fp32 `[*experts, *format.amax_shape(out, in)]`, and `global_amax`, fp32 `[*experts]` or None. Exact. A
        NaN or an infinity stays in its granule.

    Example:
        >>> import torch
        >>> from fq_transforms.formats import FORMATS
        >>> expert_amax_reference(torch.tensor([[[1.0, -3.0], [2.0, 0.5]]]), format=FORMATS["INT8_PER_CHANNEL"])
        (tensor([[[3.],
             [2.]]]), None)
    """
    magnitude = weight.abs()
    per_expert = magnitude.amax((-2, -1)).float()
    if format.dynamic or format.block == (None, None):
        return per_expert, None
    per_granule = in_granules(magnitude, format.block).amax((-3, -1)).float()
    return per_granule, per_expert if format.has_global_amax else None
