"""The definition of the percentile of abs(w) in each granule, in plain PyTorch; the kernels equal it, bit for bit.

NOTE interpolation: `torch.lerp` starts at the nearer end, and multiplies and adds with one rounding.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import Format

__all__ = ["percentile_reference", "positions"]


def percentile_reference(
    weight: Float[Tensor, "out in"], percentile: float, *, format: Format
) -> Float32[Tensor, "..."]:
    """The percentile of abs(weight) in each granule: at position p / 100 * (n - 1) of the n sorted, linear in between.

    Args:
        weight: bf16, fp16 or fp32.
        percentile: Within (0, 100].
        format: With a static amax.

    Returns:
        fp32 `format.amax_shape(out, in)`, interpolated in float64 and rounded once. A ragged granule at an edge counts
        its own weights only. A NaN is above all numbers. Memory: a sorted copy of this one weight, and its indices.

    Source: `numpy.quantile` and `torch.quantile`, "linear"; ModelOpt 0.47 takes a histogram's bin edge in its place.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.0, -1.0, 2.0, 3.0, -100.0]])
        >>> percentile_reference(w, 75.0, format=FORMATS["INT8"]), percentile_reference(w, 90.0, format=FORMATS["INT8"])
        (tensor(3.), tensor(61.2000))
    """
    out_features, in_features = weight.shape
    magnitude = weight.abs()
    shape = format.amax_shape(out_features, in_features)
    rows, columns = (side or extent for side, extent in zip(format.block, weight.shape, strict=True))
    granules = format.granules(out_features, in_features)
    ragged = (0, granules[1] * columns - in_features, 0, granules[0] * rows - out_features)
    if any(ragged):  # -1 sorts before every magnitude
        magnitude = torch.nn.functional.pad(magnitude, ragged, value=-1.0)
    tiles = magnitude.unflatten(-1, (granules[1], columns)).unflatten(0, (granules[0], rows)).transpose(1, 2)
    values = tiles.flatten(-2).sort(dim=-1).values
    heights = _extents(out_features, rows, granules[0], weight.device)
    widths = _extents(in_features, columns, granules[1], weight.device)
    count = heights[:, None] * widths[None, :]
    first, second, fraction = positions(count, percentile)
    padding = values.shape[-1] - count
    one, other = (values.gather(-1, (padding + at)[..., None])[..., 0].double() for at in (first, second))
    return torch.lerp(one, other, fraction).float().reshape(shape)


def positions(count: Tensor, percentile: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where the percentile of `count` sorted numbers lies: between which two (int64), and how far (fp64).

    Example:
        >>> positions(torch.tensor([5, 1]), 90.0)
        (tensor([3, 0]), tensor([4, 0]), tensor([0.6000, 0.0000], dtype=torch.float64))
    """
    position = (count - 1).double() * (percentile / 100)
    first = position.floor().long()
    return first, torch.minimum(first + 1, count - 1), position - position.floor()


def _extents(size: int, side: int, count: int, device: torch.device) -> Tensor:
    """How many of `size` lie in each of `count` granules of a side."""
    start = torch.arange(count, device=device) * side
    return (size - start).clamp(max=side)
