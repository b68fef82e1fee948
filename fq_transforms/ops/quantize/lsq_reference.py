"""Learned step size quantization by its definition, in plain PyTorch: what a fake-quantized weight owes to its amax.

Esser et al. write y = q * step, with q = clamp(rint(v)), v = x / step, and let rint pass gradients through:

    dy / dstep = q - v where v is within the range, else q, the end of the range

A step is amax / qmax, so dy / damax is that over qmax. Every format here is q * (amax / qmax) with some rounding of v:

    INT     v = x * s, s = qmax / amax               the range is low..high, which need not be symmetric
    FP8     v = x * s, s = max / amax                q - v is the rounding error of the element, not of an integer
    NVFP4   v = x / s, s = s8 * g                    dy / ds = q - v, or +-6
            s = E4M3(u) * g, u = amax_block / (6 * g), g = amax_expert / (6 * 448)

Two levels are the formula twice: E4M3 passes gradients through too, so ds / damax_block = 1 / 6 where u lies within
min_scale..448, else 0, and ds / damax_expert = r / (6 * 448) with r = s8 - u within, else s8.

NOTE ends: as published, a weight that lies exactly on an end of the range is beyond it. So after `calibrate` each
granule's largest weight pulls on its amax, as far as fp32 leaves v there: x * s may come out a little less.

NOTE floats: the error of an integer in steps does not depend on the step, which is why the formula estimates well how
a loss changes with amax. That of a float does: twice the amax gives the same values again, but for subnormals and the
ends. So of float formats trust the sign of what saturates; errors inside push amax down a little.

NOTE units: e is what the formulas call q - v or q, in steps. Sums are of e, and are divided by qmax once a granule.

NOTE sums: terms are fp32, their sum here is that of fp64, rounded. A kernel adds in fp32, in an order that is fixed by
the shape; it lies within n * 2**-24 of the sum of magnitudes for n terms, and equals this where only one is not zero.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import E4M3, FloatElement, Format, IntElement
from fq_transforms.ops.quantize.reference import (
    TINY_AMAX,
    clip_backward_reference,
    fp8_scale,
    quantize_fp8,
    quantize_int,
    quantize_two_level,
    spread,
    valid,
)

__all__ = ["lsq_backward_reference", "lsq_push_reference"]


def lsq_backward_reference(
    grad: Float[Tensor, "*experts out in"],
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
) -> tuple[Float[Tensor, "*experts out in"], Float32[Tensor, "..."], Float32[Tensor, "*experts"] | None]:
    """Gradients of sum(grad * y) to the weight, its amax and its global amax.

        grad_weight = grad where abs(weight) <= amax, else 0; grad everywhere in dynamic formats
        grad_amax   = sum over the granule of grad * e / qmax

    with e as at the top of this file.

    Args:
        grad: Cotangent of the fake-quantized weight; any float dtype.
        weight: bf16, fp16 or fp32.
        amax: As for `fake_quantize_reference`; of a dynamic two-level format the expert's, whose blocks count as
            constants.
        global_amax: Likewise.
        format: A format with a state.

    Returns:
        In the dtype of the weight, and fp32 in the shapes of the amax. Zero granules, FP8 with amax <= 2**-24, and
        scales that `unit_scale_below` replaces have a gradient of 0. A NaN in a weight, and an invalid amax, give NaN
        to the amax of their own granules.

    Source: Esser et al. 2020, "Learned Step Size Quantization", equations 3 and 5, without their gradient scale.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, g = torch.tensor([[0.7, -9.0, 6.0]]), torch.ones(1, 3)
        >>> lsq_backward_reference(g, w, torch.tensor(7.0), None, format=FORMATS["INT8"])
        (tensor([[1., 0., 1.]]), tensor(-1.0044), None)
    """
    if format.clips:
        kept = clip_backward_reference(grad, weight, amax, format=format)
    else:
        kept = grad.to(weight.dtype, copy=True).contiguous()
    steps = _steps(weight.float(), amax, global_amax, format)
    terms = grad.float() * steps.e
    if format.scale != "e4m3":
        return kept, _over_granules(terms, amax, format) / torch.full_like(amax, steps.qmax), None
    columns = format.block[1]
    assert columns is not None
    assert steps.r is not None
    assert steps.is_free is not None
    blocks = terms.unflatten(-1, (-1, columns)).double().sum(-1).float()
    of_expert = (blocks * steps.r).double().sum((-2, -1)).float()
    of_expert = of_expert / torch.full_like(of_expert, steps.qmax * E4M3.max)
    if format.dynamic:
        return kept, of_expert, None
    of_block = torch.where(steps.is_free, blocks / torch.full_like(blocks, steps.qmax), blocks * 0.0)
    return kept, of_block, of_expert


def lsq_push_reference(
    tangent: Float[Tensor, "*experts out in"],
    amax_tangent: Float32[Tensor, "..."],
    global_amax_tangent: Float32[Tensor, "*experts"] | None,
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """Tangent of the fake-quantized weight along those of the weight and its amax: the transpose of the backward."""
    kept = clip_backward_reference(tangent, weight, amax, format=format) if format.clips else tangent
    steps = _steps(weight.float(), amax, global_amax, format)
    if format.scale != "e4m3":
        along = steps.e * spread(amax_tangent / torch.full_like(amax_tangent, steps.qmax), weight, format)
        return (kept.float() + along).to(out_dtype).contiguous()
    assert steps.r is not None
    assert steps.is_free is not None
    of_expert = amax_tangent if format.dynamic else global_amax_tangent
    assert of_expert is not None
    scale = steps.r * of_expert[..., None, None]
    scale = scale / torch.full_like(scale, steps.qmax * E4M3.max)
    if not format.dynamic:
        scale = scale + torch.where(steps.is_free, amax_tangent / torch.full_like(amax_tangent, steps.qmax), 0.0)
    return (kept.float() + steps.e * spread(scale, weight, format)).to(out_dtype).contiguous()


class _Steps(NamedTuple):
    """Error e of each weight in steps; of two levels also r of each block, and whether u is within its range."""

    e: Tensor
    qmax: float
    r: Tensor | None = None
    is_free: Tensor | None = None


def _steps(x: Tensor, amax: Tensor, global_amax: Tensor | None, format: Format) -> _Steps:
    element = format.element
    if isinstance(element, IntElement):
        a = spread(valid(amax), x, format)
        q, s = quantize_int(x, a, element)
        v = x * torch.where(s == 0, element.qmax, s)
        e = torch.where((v > element.low) & (v < element.high), q - v, q)
        return _Steps(torch.where(s == 0, 0.0, e), element.qmax)
    if format.scale == "fp32":
        a = spread(valid(amax), x, format)
        q, _ = quantize_fp8(x, a, element)
        e = _error(q, x * fp8_scale(a, element)[0], element)
        return _Steps(torch.where(a <= TINY_AMAX, 0.0, e), element.max)
    q, s, s8, g = quantize_two_level(x, amax, global_amax, format)
    columns = x.shape[-1] // s.shape[-2]
    blocks = x.unflatten(-1, (-1, columns))
    block_amax = valid(blocks.abs().amax(-1)) if format.dynamic else valid(amax)
    u = block_amax / (element.max * g[..., None, None])
    is_free = (u >= format.min_scale) & (u <= E4M3.max)
    # Where the effective scale is a constant, 0 or what stands in for a small one, nothing depends on amax.
    is_constant = (s[..., 0] == 0) | (s8 * g[..., None, None] < format.unit_scale_below)
    e = _error(q, blocks / torch.where(s == 0, 1.0, s), element)
    e = torch.where(is_constant[..., None], 0.0, e).flatten(-2)
    r = torch.where(is_constant, 0.0, torch.where(is_free, s8 - u, s8))
    return _Steps(e, element.max, r, is_free & ~is_constant)


def _error(q: Tensor, v: Tensor, element: FloatElement) -> Tensor:
    return torch.where(v.abs() < element.max, q - v, q)


def _over_granules(terms: Tensor, amax: Tensor, format: Format) -> Tensor:
    """Sums over each granule, in the shape of amax."""
    if format.block == (None, None):
        return terms.double().sum((-2, -1)).float()
    rows, columns = amax.shape[-2:]
    r, c = format.block[0] or terms.shape[-2], format.block[1] or terms.shape[-1]
    ragged = (0, columns * c - terms.shape[-1], 0, rows * r - terms.shape[-2])
    tiles = torch.nn.functional.pad(terms.double(), ragged).unflatten(-1, (columns, c)).unflatten(-3, (rows, r))
    return tiles.sum((-3, -1)).float()
