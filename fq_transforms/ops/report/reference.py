"""The definition of what a report measures of one expert, in plain PyTorch; the kernel equals it.

With x the weight and y the fake-quantized weight, both in fp32, y before any rounding to another dtype:

    signal      sum of x^2              each square exact, in fp64
    noise       sum of (x - y)^2        the difference rounded to fp32, its square exact in fp64
    clipped     weights that lie more than half a step beyond the largest value that their granule can hold
    zeroed      weights other than zero with y = 0
    underflow   granules with an amax above zero whose scale is as small as the format has them, or smaller
    largest     max of abs(x)

NOTE sums: squares of fp32 numbers are exact in fp64, and the n terms are not negative. So a sum in any order is right
to n * 2**-53 of itself, and two differ by twice that at most. Counts and maxima are exact.

NOTE clipped: half a step beyond the largest value is where an error stops being one of rounding. With v the weight
over its scale: INT, v outside [low - 1/2, high + 1/2], and abs(x) > amax (with a qmax of 7.5 the amax itself lies on
that edge); FP8, abs(v) > 464 (E5M2: 61440); NVFP4, abs(x) > 7 * s; MX, abs(v) beyond the element's largest value by
half its last step. A scale of zero clips nothing: its weights are zeroed.

NOTE underflow: fp32 scales, 0 < amax < 2**-24 for INT and <= 2**-24 for FP8, where the formulas give up the amax; E4M3
scales, those stored as zero, as a subnormal (below 2**-6) or at the format's `min_scale`, and those that
`unit_scale_below` replaces; E8M0 scales, those of 2**-127.
"""

from collections.abc import Iterator
from math import frexp
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import E4M3, Format, IntElement
from fq_transforms.ops.quantize.reference import (
    TINY_AMAX,
    effective_scale,
    fake_quantize_reference,
    fp8_scale,
    int_scale,
    over_int_scale,
    power_of_two,
    quantize_mx,
    quantize_two_level,
    spread,
    valid,
)

__all__ = ["Measures", "half_step_beyond", "histogram_reference", "report_reference", "scale_underflows"]

# Weights that the reference takes at a time: some tens of MB of temporaries.
WEIGHTS_AT_A_TIME = 2**20
# Bins of a histogram, and how far it reaches beyond the largest value of the element.
BINS, REACH = 256, 1.25


class Measures(NamedTuple):
    """What is measured, one number per expert: fp64 sums, int64 counts, and an fp32 maximum."""

    signal: Tensor
    noise: Tensor
    clipped: Tensor
    zeroed: Tensor
    underflow: Tensor
    largest: Tensor


def report_reference(
    weight: Float[Tensor, "out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, ""] | None,
    *,
    format: Format,
) -> Measures:
    """What a report measures of one expert, by the definitions above; some rows at a time, in bounded memory.

    Args:
        weight: bf16, fp16 or fp32; any strides.
        amax: fp32 `format.amax_shape(out, in)`; None for MX formats.
        global_amax: fp32 [], static two-level formats only; else None.
        format: The numbers.

    Returns:
        Tensors of no dimension. A NaN weight, an infinite one and an invalid amax make `noise` NaN or infinite; a
        NaN makes `largest` NaN, too.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.5, 2.0, 0.001, 0.0]])
        >>> found = report_reference(w, torch.tensor(1.0), None, format=FORMATS["INT8"])
        >>> found.clipped, found.zeroed, found.largest
        (tensor(1), tensor(1), tensor(2.))
    """
    parts: list[Measures] = []
    for rows, scales in _rows(weight, amax, format):
        x = rows.float()
        y = fake_quantize_reference(rows, scales, global_amax, format=format, out_dtype=torch.float32)
        parts.append(
            Measures(
                signal=x.double().square().sum(),
                noise=(x - y).double().square().sum(),
                clipped=_is_clipped(x, scales, global_amax, format).sum(),
                zeroed=((x != 0) & (y == 0)).sum(),
                underflow=_underflows(x, scales, global_amax, format).sum(),
                largest=x.abs().amax(),
            )
        )
    columns = Measures(*(torch.stack(column) for column in zip(*parts, strict=True)))
    return Measures(*(column.sum(0) for column in columns))._replace(largest=columns.largest.amax(0))


def histogram_reference(
    weight: Float[Tensor, "out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, ""] | None,
    *,
    format: Format,
) -> tuple[Tensor, Tensor]:
    """Histogram of an expert's weights over their scales, in which every granule has the element's own values.

    Args:
        weight: As for `report_reference`, as are the rest.
        amax: As there.
        global_amax: As there.
        format: As there.

    Returns:
        Edges, fp64 [BINS + 1], from -1.25 to 1.25 of the element's largest magnitude, and counts, int64 [BINS]. What
        lies further out is in the outer bins; NaN, and weights whose scale is zero, are in none.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, format = torch.tensor([[1.0, -1.0]]), FORMATS["FP8"]
        >>> edges, counts = histogram_reference(w, torch.tensor(1.0), None, format=format)
        >>> edges[[0, -1]].tolist(), counts.sum()
        ([-560.0, 560.0], tensor(2))
    """
    element = format.element
    end = REACH * (max(-element.low, element.high) if isinstance(element, IntElement) else element.max)
    counts = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
    for rows, scales in _rows(weight, amax, format):
        v, is_scaled = _over_scale(rows.float(), scales, global_amax, format)
        v = v[is_scaled.expand_as(v) & ~v.isnan()].clamp(-end, end)
        bins = ((v + end) * (BINS / (2 * end))).long().clamp(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS)
    return torch.linspace(-end, end, BINS + 1, dtype=torch.float64, device=weight.device), counts


def half_step_beyond(format: Format) -> tuple[float, float]:
    """The weights over their scale, lowest and highest, that no more than rounding moves.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> half_step_beyond(FORMATS["INT8"]), half_step_beyond(FORMATS["MXFP4"])
        ((-128.5, 127.5), (-7.0, 7.0))
    """
    element = format.element
    if isinstance(element, IntElement):
        return element.low - 0.5, element.high + 0.5
    exponent = max(frexp(element.max)[1] - 1, element.min_exponent)
    end = element.max + 2.0 ** (exponent - element.mantissa_bits - 1)
    return -end, end


def scale_underflows(amax: Float32[Tensor, "..."], format: Format) -> Tensor:
    """Which granules with fp32 scales have an amax above zero that the formulas give up."""
    is_tiny = amax < TINY_AMAX if isinstance(format.element, IntElement) else amax <= TINY_AMAX
    return (amax > 0) & is_tiny


def _rows(weight: Tensor, amax: Tensor | None, format: Format) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some rows of a weight at a time, whole granules of them, with their amax."""
    out_features, in_features = weight.shape
    side = format.block[0] or 1
    step = max(1, WEIGHTS_AT_A_TIME // (in_features * side)) * side
    for start in range(0, out_features, step):
        rows = weight[start : start + step]
        is_per_row = amax is not None and amax.dim() == 2
        yield rows, amax[start // side : -(-(start + step) // side)] if amax is not None and is_per_row else amax


def _over_scale(x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """Weights over their scale, unrounded, as the formulas have them; and which scales there are."""
    if format.scale == "e8m0":
        _, e, finite = quantize_mx(x, format)
        v = x.unflatten(-1, (-1, format.block[1] or 1)) * power_of_two(-e)
        return v.flatten(-2), finite.expand_as(v).flatten(-2)
    if format.scale == "e4m3":
        _, s, _, _ = quantize_two_level(x, amax, global_amax, format)
        v = x.unflatten(-1, (-1, format.block[1] or 1)) / torch.where(s == 0, 1.0, s)
        return v.flatten(-2), (s > 0).expand_as(v).flatten(-2)
    granule = spread(valid(amax), x, format)
    if isinstance(format.element, IntElement):
        s = int_scale(granule, format)
        return over_int_scale(x, s, format), s > 0
    s, _ = fp8_scale(granule, format.element)
    return x * s, s > 0


def _is_clipped(x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format) -> Tensor:
    """Which weights of [out, in] are clipped."""
    lowest, highest = half_step_beyond(format)
    if format.scale == "e4m3":
        _, s, _, _ = quantize_two_level(x, amax, global_amax, format)
        blocks = x.unflatten(-1, (-1, format.block[1] or 1))
        return ((blocks.abs() > highest * s) & (s > 0)).flatten(-2)
    v, is_scaled = _over_scale(x, amax, global_amax, format)
    is_beyond = ((v < lowest) | (v > highest)) & is_scaled
    if isinstance(format.element, IntElement):
        is_beyond &= x.abs() > spread(valid(amax), x, format)
    return is_beyond


def _underflows(x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format) -> Tensor:
    """Which granules of these rows have a scale that underflows."""
    if format.scale == "fp32":
        assert amax is not None
        return scale_underflows(valid(amax), format)
    block_amax = valid(x.unflatten(-1, (-1, format.block[1] or 1)).abs().amax(-1)) if format.dynamic else valid(amax)
    if format.scale == "e8m0":
        _, e, _ = quantize_mx(x, format)
        return (block_amax > 0) & (e[..., 0] == -127)
    _, _, s8, g = quantize_two_level(x, amax, global_amax, format)
    is_replaced = effective_scale(s8, g[..., None, None], format) < format.unit_scale_below
    return (block_amax > 0) & ((s8 < 2.0**E4M3.min_exponent) | (s8 <= format.min_scale) | is_replaced)
