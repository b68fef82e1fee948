"""The definition of fake quantization and its gradients, in plain PyTorch; each kernel equals it bit for bit.

Shape letters: `...` experts, `out` and `in` the weight, `rows` and `columns` its granules (`Format.granules`).
All arithmetic is fp32, one rounding to the output dtype at the end. `rint` is round half to even.

NOTE exact division: a quotient is written tensor by tensor. PyTorch computes a Python scalar over a tensor, and on CUDA
a tensor over a Python scalar, through a rounded reciprocal, which changes bits.

NOTE signs: a result has the sign of its weight, zeros included (-0.3 rounds to -0.0), in every format.

NOTE invalid amax: NaN, infinite or negative makes its own granule NaN, never a plausible number.

NOTE random bits: word column % 4 of Philox 4x32-10 with the key (low, high half of the seed) and the counter
(column // 4, row, expert, group). Each is a place in the whole weight [out, in], so no tiling can change it.

NOTE learned scales: what a fake-quantized weight owes to its amax. Esser et al. write y = q * step, with
q = clamp(rint(v)), v = x / step, and let rint pass gradients through:

    dy / dstep = q - v where v is within the range, else q, the end of the range

A step is amax / qmax, so dy / damax is that over qmax. Every format here is q * (amax / qmax) with some rounding of v:

    INT     v = x * (qmax / amax), or x / (amax / qmax)      the range is low..high, which need not be symmetric
    FP8     v = x * (max / amax)                     q - v is the rounding error of the element, not of an integer
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

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from fq_transforms.formats import E4M3, FloatElement, Format, IntElement

__all__ = [
    "clip_backward_reference",
    "dequantize_int",
    "effective_scale",
    "expert_scale",
    "fake_quantize_reference",
    "fp8_scale",
    "in_blocks",
    "in_granules",
    "int_scale",
    "lsq_backward_reference",
    "lsq_push_reference",
    "mx_exponent",
    "over_int_scale",
    "philox",
    "power_of_two",
    "quantize_fp8",
    "quantize_int",
    "quantize_mx",
    "quantize_two_level",
    "random_words",
    "round_to",
    "rounded",
    "spread",
    "stochastic_reference",
    "unrounded_scale",
    "valid",
]

# ModelOpt's threshold (tensor_quant_gpu.cu, 0.47): below the smallest fp16 subnormal a granule counts as zero.
TINY_AMAX = 2.0**-24
# How far fp32 carries a value of a format through its own scale, relative: three roundings, 3 * 2**-24.
ON_GRID = 2.0**-22


def fake_quantize_reference(
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """Quantize and dequantize: y = dequantize(quantize(x)), with x the weight in fp32.

        INT     s = amax / qmax;                         y = clamp(rint(x / s), low, high) * s
          divide: s = qmax / amax;                         y = clamp(rint(x * s), low, high) / s
        FP8     s = max / amax;                          y = element(x * s) * (1 / s)
        NVFP4   g = amax_expert / (6 * 448);  s = E4M3(clamp(amax_block / (6 * g), min_scale, 448)) * g
          divide: g = 1 / amax_expert * 2688;   s = E4M3(clamp(amax_block / 6 * g, min_scale, 448)) / g
        MX      s = 2**e, from the exponent of the block amax;  y = element(x / s) * s, of NVFP4 too

    `element(.)` clamps to +-max and rounds to its nearest value, ties to even. "divide" is `Format.dequantize`.

    Args:
        weight: bf16, fp16 or fp32; any number of leading expert dimensions.
        amax: fp32, `[*experts, *format.amax_shape(out, in)]`; None for MX formats.
        global_amax: fp32 `[*experts]`, static two-level formats only; else None.
        format: The numbers.
        out_dtype: bf16, fp16 or fp32.

    Returns:
        A new contiguous tensor in `out_dtype`. Zeros come from INT with amax < 2**-24, and NVFP4 with a zero scale or
        block amax, or an infinite g; FP8 with amax <= 2**-24 uses amax = 1. NaN stays, and makes a dynamic block NaN,
        as does infinity; where amax is static infinity saturates.

    Source: ModelOpt 0.47 `fake_tensor_quant_device` (INT divide), `fake_e4m3fy`, `NVFP4QTensor`; compressed-tensors
    0.20 `fake_quantize` (INT; NVFP4 divide); OCP Microscaling Formats 1.0, 6.3.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.1, -0.04, 1.0, -7.0]])
        >>> fake_quantize_reference(w, torch.tensor(7.0), None, format=FORMATS["INT8"], out_dtype=torch.float32)
        tensor([[ 0.1102, -0.0551,  0.9921, -7.0000]])
    """
    return _fake_quantized(weight.float(), amax, global_amax, format, None).to(out_dtype).contiguous()


def stochastic_reference(
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "*experts"] | None,
    words: Int64[Tensor, "*experts out in"],
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """`fake_quantize_reference`, with elements rounded up or down at random.

        t = abs(v) / spacing, v as there and clamped as there
        n = rint(t);  lower = floor(t);  u = (word // 2**8 + 1) / 2**24, in (0, 1]
        abs(element(v)) = spacing * (n if abs(t - n) <= 2**-22 * t else lower + (t - lower >= u))

    `spacing` is 1 for integers, and that of the element's values around v for floats. The mean over words is abs(v), up
    to 2**-24 of a spacing and to what counts as a value of the format.

    Args:
        weight: bf16, fp16 or fp32; any number of leading expert dimensions.
        amax: As for `fake_quantize_reference`.
        global_amax: Likewise.
        words: 32 random bits per weight, from `random_words`.
        format: The numbers.
        out_dtype: bf16, fp16 or fp32.

    Returns:
        A new contiguous tensor of the weight's shape in `out_dtype`. Zeros, NaN, infinities and signs are as in
        `fake_quantize_reference`.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, words = torch.tensor([[0.1, 0.1, 1.0, -7.0]]), torch.tensor([[0, 2**32 - 1, 0, 0]])
        >>> stochastic_reference(w, torch.tensor(7.0), None, words, format=FORMATS["INT8"], out_dtype=torch.float32)
        tensor([[ 0.1102,  0.0551,  1.0472, -7.0000]])
    """
    u = ((words >> 8) + 1).float() * 2.0**-24
    return _fake_quantized(weight.float(), amax, global_amax, format, u).to(out_dtype).contiguous()


def _fake_quantized(
    x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format, u: Tensor | None
) -> Tensor:
    """Both of the above in fp32: elements are rounded to the nearest, or at random where there is a u for each."""
    element = format.element
    if format.scale == "e8m0":
        v, e, finite = quantize_mx(x, format, rounded(u))
        return torch.where(finite, v * power_of_two(e), torch.nan).flatten(-2)
    if format.scale == "e4m3":
        v, s, _, _ = quantize_two_level(x, amax, global_amax, format, rounded(u))
        return (v * s).flatten(-2)
    if isinstance(element, IntElement):
        return dequantize_int(*quantize_int(x, valid(amax), format, u), format)
    v, r = quantize_fp8(x, valid(amax), format, rounded(u))
    return v * r


def clip_backward_reference(
    grad: Float[Tensor, "*experts out in"],
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."],
    *,
    format: Format,
) -> Float[Tensor, "*experts out in"]:
    """Gradient of a clipping quantizer: grad where abs(weight) <= amax, else 0, compared in fp32.

    Args:
        grad: Cotangent of the fake-quantized weight; any float dtype.
        weight: bf16, fp16 or fp32.
        amax: As for `fake_quantize_reference`.
        format: A format with a static amax (`Format.clips`).

    Returns:
        A new tensor in the dtype of the weight. A NaN weight gets 0.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, g = torch.tensor([[0.5, -2.0]]), torch.ones(1, 2)
        >>> clip_backward_reference(g, w, torch.tensor(1.0), format=FORMATS["INT8"])
        tensor([[1., 0.]])
    """
    x = weight.float()
    kept = x.abs() <= spread(amax, x, format)
    return torch.where(kept, grad, torch.zeros_like(grad)).to(weight.dtype).contiguous()


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

    with e as in NOTE learned scales.

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
        sums = in_granules(terms.double(), format.block).sum((-3, -1)).float().view(amax.shape)
        return kept, sums / torch.full_like(amax, steps.qmax), None
    assert steps.r is not None
    assert steps.is_free is not None
    blocks = in_blocks(terms, format).double().sum(-1).float()
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
        q, s = quantize_int(x, valid(amax), format)
        v = over_int_scale(x, s, format)
        e = torch.where((v > element.low) & (v < element.high), q - v, q)
        return _Steps(torch.where(s == 0, 0.0, e), element.qmax)
    if format.scale == "fp32":
        a = spread(valid(amax), x, format)
        q, _ = quantize_fp8(x, valid(amax), format)
        e = _error(q, x * fp8_scale(a, element)[0], element)
        return _Steps(torch.where(a <= TINY_AMAX, 0.0, e), element.max)
    q, s, s8, g = quantize_two_level(x, amax, global_amax, format)
    blocks = in_blocks(x, format)
    block_amax = valid(blocks.abs().amax(-1)) if format.dynamic else valid(amax)
    u = unrounded_scale(block_amax, g[..., None, None], format)
    is_free = (u >= format.min_scale) & (u <= E4M3.max)
    # Where the effective scale is a constant, 0 or what stands in for a small one, nothing depends on amax.
    is_constant = (s[..., 0] == 0) | (effective_scale(s8, g[..., None, None], format) < format.unit_scale_below)
    e = _error(q, blocks / torch.where(s == 0, 1.0, s), element)
    e = torch.where(is_constant[..., None], 0.0, e).flatten(-2)
    r = torch.where(is_constant, 0.0, torch.where(is_free, s8 - u, s8))
    return _Steps(e, element.max, r, is_free & ~is_constant)


def _error(q: Tensor, v: Tensor, element: FloatElement) -> Tensor:
    return torch.where(v.abs() < element.max, q - v, q)


# The formulas' parts, which packing, reports and sweeps take as they are. `amax` has one number per granule, and what
# is made of it is computed once per granule. `to` makes elements of weights over their scale.

# From numbers and an element to values of the element, or to its codes.
Rounding: TypeAlias = Callable[[Tensor, FloatElement], Tensor]


def round_to(x: Float32[Tensor, "..."], element: FloatElement, u: Tensor | None = None) -> Float32[Tensor, "..."]:
    """A value of the element: the nearest, ties to even, or one at random; saturates; keeps NaN and the sign.

    At random with a number u in (0, 1] for each weight.
    """
    x = x.clamp(-element.max, element.max)
    exponent = (x.view(torch.int32) >> 23).bitwise_and_(0xFF).clamp_(min=element.min_exponent + 127)
    spacing = exponent.sub_(element.mantissa_bits)
    t = x * (254 - spacing).bitwise_left_shift_(23).view(torch.float32)
    steps = t.round_() if u is None else _round_steps(t.abs(), u.view(x.shape)).copysign(x)
    return steps.mul_(spacing.bitwise_left_shift_(23).view(torch.float32))


def rounded(u: Tensor | None) -> Rounding:
    """`round_to`, at random where there is a u for each weight."""
    return partial(round_to, u=u)


def _round_steps(t: Tensor, u: Tensor) -> Tensor:
    """An integer beside t >= 0, or that which it is."""
    nearest, lower = t.round(), t.floor()
    return torch.where((t - nearest).abs() <= t * ON_GRID, nearest, lower + (t - lower >= u))


def quantize_int(x: Tensor, amax: Tensor, format: Format, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers q and their scale s, y = q * s, or q / s in formats that divide; s = 0 marks a zero granule."""
    element = format.element
    assert isinstance(element, IntElement)
    s = spread(int_scale(amax, format), x, format)
    v = over_int_scale(x, s, format)
    if u is None:
        return v.round_().clamp_(element.low, element.high), s
    return _round_steps(v.clamp(element.low, element.high).abs(), u).copysign(x), s


def int_scale(amax: Tensor, format: Format) -> Tensor:
    """The scale of `quantize_int`."""
    zero = amax < TINY_AMAX
    return torch.where(zero, 0.0, _int_scale(torch.where(zero, 1.0, amax), format))


def _int_scale(amax: Tensor, format: Format) -> Tensor:
    assert isinstance(format.element, IntElement)
    qmax = torch.full_like(amax, format.element.qmax)
    return qmax / amax if format.dequantize == "divide" else amax / qmax


def over_int_scale(x: Tensor, s: Tensor, format: Format) -> Tensor:
    """Weights in steps of the scale of `quantize_int`; in a zero granule under that of amax = 1."""
    s = torch.where(s == 0, _int_scale(torch.ones_like(s), format), s)
    return x * s if format.dequantize == "divide" else x / s


def dequantize_int(q: Tensor, s: Tensor, format: Format) -> Tensor:
    """Integers and their scale to values."""
    if format.dequantize == "multiply":
        return q * s
    return q / torch.where(s == 0, 1.0, s) * torch.where(s == 0, 0.0, 1.0)


def quantize_fp8(x: Tensor, amax: Tensor, format: Format, to: Rounding = round_to) -> tuple[Tensor, Tensor]:
    """Elements v and their scale r, y = v * r."""
    assert isinstance(format.element, FloatElement)
    s, r = fp8_scale(amax, format.element)
    return to(x * spread(s, x, format), format.element), spread(r, x, format)


def fp8_scale(amax: Tensor, element: FloatElement) -> tuple[Tensor, Tensor]:
    """The scale s of `quantize_fp8`, v = element(x * s), and its reciprocal."""
    amax = torch.where(amax <= TINY_AMAX, 1.0, amax)
    s = torch.full_like(amax, element.max) / amax
    return s, torch.ones_like(s) / s


def quantize_two_level(
    x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format, to: Rounding = round_to
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elements v in blocks, their scale s, y = v * s; and what it is made of: E4M3 scales s8 and the expert's g."""
    assert amax is not None
    assert isinstance(format.element, FloatElement)
    blocks = in_blocks(x, format)
    if format.dynamic:
        expert_amax, block_amax = valid(amax), valid(blocks.abs().amax(-1))
    else:
        assert global_amax is not None
        expert_amax, block_amax = valid(global_amax), valid(amax)
    expert_amax = expert_amax[..., None, None]
    g = expert_scale(expert_amax, format)
    s8 = round_to(unrounded_scale(block_amax, g, format).clamp(format.min_scale, E4M3.max), E4M3)
    s = effective_scale(s8, g, format)
    s = torch.where(s < format.unit_scale_below, 1.0, s)
    zero = (block_amax == 0) | (g == (torch.inf if format.dequantize == "divide" else 0))
    s = torch.where(zero, block_amax * 0.0 * expert_amax, s)[..., None]
    v = to(blocks / torch.where(s == 0, 1.0, s), format.element)
    return v, s, torch.where(zero, block_amax * 0.0, s8), g[..., 0, 0]


def expert_scale(expert_amax: Tensor, format: Format) -> Tensor:
    """The expert's scale g: s8 * g, or s8 / g in formats that divide, is a block's scale."""
    assert isinstance(format.element, FloatElement)
    largest = torch.full_like(expert_amax, format.element.max * E4M3.max)
    if format.dequantize == "divide":
        return expert_amax.reciprocal() * largest  # in compressed-tensors a number over a tensor: two roundings
    return expert_amax / largest


def unrounded_scale(block_amax: Tensor, g: Tensor, format: Format) -> Tensor:
    """What E4M3 rounds and clamps to the scale s8 of a block."""
    assert isinstance(format.element, FloatElement)
    if format.dequantize == "divide":
        return block_amax / torch.full_like(block_amax, format.element.max) * g
    return block_amax / (format.element.max * g)


def effective_scale(s8: Tensor, g: Tensor, format: Format) -> Tensor:
    """The scale of a block that codes are multiplied with."""
    return s8 / g if format.dequantize == "divide" else s8 * g


def quantize_mx(x: Tensor, format: Format, to: Rounding = round_to) -> tuple[Tensor, Tensor, Tensor]:
    """Elements v in blocks, the exponents e of their scales, y = v * 2**e, and which blocks are finite."""
    assert isinstance(format.element, FloatElement)
    blocks = in_blocks(x, format)
    amax = blocks.abs().amax(-1, keepdim=True)
    e = mx_exponent(amax, format)
    v = to(blocks * power_of_two(-e), format.element)
    return v, e, amax < torch.inf


def mx_exponent(amax: Float32[Tensor, "..."], format: Format) -> Int32[Tensor, "..."]:
    """Exponent e of a block's scale 2**e, from the bits of its amax (finite), clamped to what E8M0 holds."""
    assert isinstance(format.element, FloatElement)
    bits = amax.view(torch.int32)
    largest_exponent, largest_mantissa = format.element.max_bits >> 23, format.element.max_bits & 0x7FFFFF
    if format.exponent_rounding == "up":
        # A subnormal has no leading one: it is above max * 2**-127 beyond half of max's significand.
        above = torch.where(bits < 1 << 23, (largest_mantissa | 1 << 23) >> 1, largest_mantissa)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > above).int()
    elif format.exponent_rounding == "floor":
        exponent = bits >> 23
    else:
        exponent = (bits + (1 << (22 - format.element.mantissa_bits))) >> 23
    return (exponent - largest_exponent).clamp(-127, 127)


def power_of_two(e: Int32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """2.0**e for -127 <= e <= 127, exactly; 2**-127 is an fp32 subnormal."""
    return torch.where(e == -127, 1 << 22, (e + 127) << 23).to(torch.int32).view(torch.float32)


def valid(amax: Tensor | None) -> Tensor:
    """The amax, with NaN where it is none."""
    assert amax is not None
    return torch.where((amax >= 0) & (amax < torch.inf), amax.abs(), torch.nan)  # abs: -0.0 is a zero


def spread(amax: Tensor, x: Tensor, format: Format) -> Tensor:
    """The amax of each weight's own granule, broadcastable to the weight."""
    if format.block == (None, None):
        return amax[..., None, None]
    for dim, side in zip((-2, -1), format.block, strict=True):
        if side not in (1, None):
            amax = amax.repeat_interleave(side, dim).narrow(dim, 0, x.shape[dim])
    return amax


def in_blocks(x: Tensor, format: Format) -> Tensor:
    """Weights [..., in] as blocks along it, [..., blocks, columns]."""
    columns = format.block[1]
    assert columns is not None
    return x.unflatten(-1, (-1, columns))


def in_granules(x: Tensor, block: tuple[int | None, int | None]) -> Tensor:
    """Numbers [..., out, in] as granules of (r, c), [..., rows, r, columns, c]; zeros at a ragged edge."""
    out_features, in_features = x.shape[-2:]
    r, c = block[0] or out_features, block[1] or in_features
    rows, columns = -(-out_features // r), -(-in_features // c)
    ragged = (0, columns * c - in_features, 0, rows * r - out_features)
    return torch.nn.functional.pad(x, ragged).unflatten(-1, (columns, c)).unflatten(-3, (rows, r))


# Philox.

WORD = 0xFFFFFFFF
# Multipliers and what is added to the key each round, as published.
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def random_words(
    seed: Int64[Tensor, "..."],
    expert: Int64[Tensor, " experts"],
    group: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Int64[Tensor, "experts out in"]:
    """32 random bits per weight, for rows and columns first..first + count - 1 of each expert.

    Args:
        seed: One for all experts, or one for each.
        expert: Numbers of the experts.
        group: Number of the group.
        rows: (first, count).
        columns: (first, count).
    """
    device = seed.device
    first, count = columns
    quads = torch.arange(first // 4, (first + count - 1) // 4 + 1, device=device)
    row = torch.arange(rows[0], rows[0] + rows[1], device=device)[:, None]
    key = seed.reshape(-1, 1, 1)
    counter = (quads, row, expert[:, None, None], torch.full((), group, device=device))
    words = torch.stack(philox(counter, (key & WORD, (key >> 32) & WORD)), dim=-1).flatten(-2)
    return words[..., first % 4 : first % 4 + count]


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random words for a counter of four and a key of two; int64 tensors of 32 bits, broadcast.

    Source: Salmon et al. 2011; `tl.philox` of Triton 3.9 gives the same words.

    Example:
        >>> zero = torch.tensor(0)
        >>> [hex(word) for word in philox((zero,) * 4, (zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high(ROUND_B, c2) ^ c1 ^ k0,
            (c2 * ROUND_B) & WORD,
            _high(ROUND_A, c0) ^ c3 ^ k1,
            (c0 * ROUND_A) & WORD,
        )
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return c0, c1, c2, c3


def _high(factor: int, word: Tensor) -> Tensor:
    """The upper word of a product of two words, by halves, since the whole one does not fit into an int64."""
    return (factor * (word >> 16) + (factor * (word & 0xFFFF) >> 16)) >> 16
