"""The definition of every operation, in plain PyTorch; each kernel equals it bit for bit.

Shape letters: `...` experts, `out` and `in` the weight, `rows` and `columns` its granules (`Format.granules`).
All arithmetic is fp32, one rounding to the output dtype at the end. `rint` is round half to even.

NOTE exact division: a quotient is written tensor by tensor. PyTorch computes a Python scalar over a tensor, and on CUDA
a tensor over a Python scalar, through a rounded reciprocal, which changes bits.

NOTE signs: a result has the sign of its weight, zeros included (-0.3 rounds to -0.0), in every format.

NOTE invalid amax: NaN, infinite or negative makes its own granule NaN, never a plausible number.
"""

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from fq_transforms.formats import E4M3, FloatElement, Format, IntElement

__all__ = [
    "clip_backward_reference",
    "dequantize_int",
    "expert_amax_reference",
    "fake_quantize_reference",
    "fp8_scale",
    "int_scale",
    "power_of_two",
    "quantize_fp8",
    "quantize_int",
    "quantize_mx",
    "quantize_two_level",
    "spread",
    "valid",
]

# ModelOpt's threshold (tensor_quant_gpu.cu, 0.47): below the smallest fp16 subnormal a granule counts as zero.
TINY_AMAX = 2.0**-24


def fake_quantize_reference(
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """Quantize and dequantize: y = dequantize(quantize(x)), with x the weight in fp32.

        INT     s = qmax / amax;                         y = clamp(rint(x * s), low, high) / s
        FP8     s = max / amax;                          y = element(x * s) * (1 / s)
        NVFP4   g = amax_expert / (6 * 448);  s = E4M3(clamp(amax_block / (6 * g), min_scale, 448)) * g
                                                         y = element(x / s) * s
        MX      s = 2**e, from the exponent of the block amax;  y = element(x / s) * s

    `element(.)` clamps to +-max and rounds to the nearest value of the element, ties to even.

    Args:
        weight: bf16, fp16 or fp32; any number of leading expert dimensions.
        amax: fp32, `[*experts, *format.amax_shape(out, in)]`; None for MX formats.
        global_amax: fp32 `[*experts]`, static two-level formats only; else None.
        format: The numbers.
        out_dtype: bf16, fp16 or fp32.

    Returns:
        A new contiguous tensor of the weight's shape in `out_dtype`. Zero granules: INT with amax < 2**-24, and NVFP4
        with a zero scale or block amax, give zeros; FP8 with amax <= 2**-24 uses amax = 1. NaN in a weight stays NaN,
        and in a dynamic block makes that block NaN. Infinite weights saturate where amax is static, and make a dynamic
        block NaN.

    Source: ModelOpt 0.47 `fake_tensor_quant_device`, `fake_e4m3fy`, `NVFP4QTensor`; OCP Microscaling Formats 1.0, 6.3.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.1, -0.04, 1.0, -7.0]])
        >>> fake_quantize_reference(w, torch.tensor(7.0), None, format=FORMATS["INT8"], out_dtype=torch.float32)
        tensor([[ 0.1102, -0.0551,  0.9921, -7.0000]])
    """
    x = weight.float()
    element = format.element
    if format.scale == "e8m0":
        v, e, finite = quantize_mx(x, format)
        y = torch.where(finite, v * power_of_two(e), torch.nan).flatten(-2)
    elif format.scale == "e4m3":
        v, s, _, _ = quantize_two_level(x, amax, global_amax, format)
        y = (v * s).flatten(-2)
    elif isinstance(element, IntElement):
        y = dequantize_int(*quantize_int(x, spread(valid(amax), x, format), element))
    else:
        v, r = quantize_fp8(x, spread(valid(amax), x, format), element)
        y = v * r
    return y.to(out_dtype).contiguous()


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
        >>> from fq_transforms.formats import FORMATS
        >>> expert_amax_reference(torch.tensor([[[1.0, -3.0], [2.0, 0.5]]]), format=FORMATS["INT8_PER_CHANNEL"])
        (tensor([[[3.],
             [2.]]]), None)
    """
    magnitude = weight.float().abs()
    per_expert = magnitude.amax((-2, -1))
    if format.dynamic or format.block == (None, None):
        return per_expert, None
    rows, columns = format.granules(*weight.shape[-2:])
    r, c = format.block[0] or weight.shape[-2], format.block[1] or weight.shape[-1]
    ragged = (0, columns * c - weight.shape[-1], 0, rows * r - weight.shape[-2])
    tiles = torch.nn.functional.pad(magnitude, ragged).unflatten(-1, (columns, c)).unflatten(-3, (rows, r))
    return tiles.amax((-3, -1)), per_expert if format.has_global_amax else None


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


def quantize_int(x: Tensor, amax: Tensor, element: IntElement) -> tuple[Tensor, Tensor]:
    """Integers q and their scale s, y = q / s; s = 0 marks a zero granule."""
    s = int_scale(amax, element)
    return (x * torch.where(s == 0, element.qmax, s)).round().clamp(element.low, element.high), s


def int_scale(amax: Tensor, element: IntElement) -> Tensor:
    """The scale of `quantize_int`."""
    zero = amax < TINY_AMAX
    return torch.where(zero, 0.0, torch.full_like(amax, element.qmax) / torch.where(zero, 1.0, amax))


def dequantize_int(q: Tensor, s: Tensor) -> Tensor:
    """Integers and their scale to values."""
    return q / torch.where(s == 0, 1.0, s) * torch.where(s == 0, 0.0, 1.0)


def quantize_fp8(x: Tensor, amax: Tensor, element: FloatElement) -> tuple[Tensor, Tensor]:
    """Elements v and their scale r, y = v * r."""
    s, r = fp8_scale(amax, element)
    return _round_to(x * s, element), r


def fp8_scale(amax: Tensor, element: FloatElement) -> tuple[Tensor, Tensor]:
    """The scale s of `quantize_fp8`, v = element(x * s), and its reciprocal."""
    amax = torch.where(amax <= TINY_AMAX, 1.0, amax)
    s = torch.full_like(amax, element.max) / amax
    return s, torch.ones_like(s) / s


def quantize_two_level(
    x: Tensor, amax: Tensor | None, global_amax: Tensor | None, format: Format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elements v in blocks, their scale s, y = v * s; and what it is made of: E4M3 scales and g, s = s8 * g."""
    assert amax is not None
    assert isinstance(format.element, FloatElement)
    columns = format.block[1]
    assert columns is not None
    blocks = x.unflatten(-1, (-1, columns))
    if format.dynamic:
        expert_amax, block_amax = valid(amax), valid(blocks.abs().amax(-1))
    else:
        assert global_amax is not None
        expert_amax, block_amax = valid(global_amax), valid(amax)
    g = expert_amax / torch.full_like(expert_amax, format.element.max * E4M3.max)
    g = g[..., None, None]
    s8 = _round_to((block_amax / (format.element.max * g)).clamp(format.min_scale, E4M3.max), E4M3)
    s = s8 * g
    s = torch.where(s < format.unit_scale_below, 1.0, s)
    zero = (block_amax == 0) | (g == 0)
    s = torch.where(zero, block_amax * 0.0 * g, s)[..., None]
    v = _round_to(blocks / torch.where(s == 0, 1.0, s), format.element)
    return v, s, torch.where(zero, block_amax * 0.0, s8), g[..., 0, 0]


def quantize_mx(x: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Elements v in blocks, the exponents e of their scales, y = v * 2**e, and which blocks are finite."""
    assert isinstance(format.element, FloatElement)
    columns = format.block[1]
    assert columns is not None
    blocks = x.unflatten(-1, (-1, columns))
    amax = blocks.abs().amax(-1, keepdim=True)
    e = _mx_exponent(amax, format)
    return _round_to(blocks * power_of_two(-e), format.element), e, amax < torch.inf


def _mx_exponent(amax: Float32[Tensor, "..."], format: Format) -> Int32[Tensor, "..."]:
    """Exponent e of a block's scale 2**e, from the bits of its amax (finite), clamped to what E8M0 holds."""
    assert isinstance(format.element, FloatElement)
    bits = amax.view(torch.int32)
    largest_exponent, largest_mantissa = format.element.max_bits >> 23, format.element.max_bits & 0x7FFFFF
    if format.exponent_rounding == "up":
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) > largest_mantissa).int()
    elif format.exponent_rounding == "floor":
        exponent = bits >> 23
    else:
        exponent = (bits + (1 << (22 - format.element.mantissa_bits))) >> 23
    return (exponent - largest_exponent).clamp(-127, 127)


def power_of_two(e: Int32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """2.0**e for -127 <= e <= 127, exactly; 2**-127 is an fp32 subnormal."""
    return torch.where(e == -127, 1 << 22, (e + 127) << 23).to(torch.int32).view(torch.float32)


def _round_to(x: Float32[Tensor, "..."], element: FloatElement) -> Float32[Tensor, "..."]:
    """Nearest value of the element, ties to even; saturates; keeps NaN."""
    x = x.clamp(-element.max, element.max)
    exponent = ((x.view(torch.int32) >> 23) & 0xFF).clamp(min=element.min_exponent + 127)
    spacing = exponent - element.mantissa_bits
    return (x * ((254 - spacing) << 23).view(torch.float32)).round() * (spacing << 23).view(torch.float32)


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
