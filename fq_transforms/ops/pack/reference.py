"""Codes and scales that stand for a fake-quantized weight: the definition of packing, in plain PyTorch.

    unpack_reference(pack_reference(w, ...)) == fake_quantize_reference(w, ...), bit for bit

What is stored, E experts, canonical [out, in] order whatever the weight's layout is:

    element   codes                                         scale                                    y
    INT8      int8 [E, out, in]                             amax / qmax, fp32                        codes * scale
      divide                                                qmax / amax, fp32                        codes / scale
    INT4      uint8 [E, out, in/2], value + 8, two a byte   likewise                                 likewise
    FP8       float8 [E, out, in]                           1 / (max / amax), fp32                   codes * scale
    NVFP4     uint8 [E, out, in/2], two a byte              E4M3 [E, out, in/16], under an fp32      codes * (scale * g)
                                                            global scale g [E]
      divide                                                                                         codes * (scale / g)
    MXFP8     float8 [E, out, in]                           uint8 [E, out, in/32], exponent + 127    codes * 2**e
    MXFP4     uint8 [E, out, in/2], two a byte              likewise                                 likewise
    MXFP6     uint8 [E, out, in*3/4], four in three bytes   likewise                                 likewise
    MXINT8    int8 [E, out, in], 64 times the value         likewise                                 codes / 64 * 2**e

Of two codes in a byte the even weight's is the low one; four in three bytes are little-endian. An element of a width
between is stored as the next wider: INT3 as INT4, INT5 to INT7 as INT8; a float of 2 or 3 bits in 4, of 5 in 6, of 7 in
8, with its sign in the highest bit. Codes of 8 bits that PyTorch has no dtype for are uint8.

NOTE zeros: an integer has no sign of zero, so where a small negative weight gives -0.0 the unpacked one is 0.0. A scale
of 0 marks a zero granule, NaN (255 in E8M0) one of NaN. A NaN weight under a static scale has no code.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import FloatElement, Format, IntElement, code_bits, element_bits
from fq_transforms.ops.quantize.reference import (
    dequantize_int,
    effective_scale,
    expert_scale,
    fp8_scale,
    int_scale,
    power_of_two,
    quantize_fp8,
    quantize_int,
    quantize_mx,
    quantize_two_level,
    spread,
    valid,
)

__all__ = ["code_bits", "code_dtype", "pack_reference", "pack_scales", "unpack_reference"]

# Elements that PyTorch has a dtype for, one byte each.
CODE_DTYPES = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2, (0, 7): torch.int8}
INT4_OFFSET = 8


def code_dtype(format: Format) -> torch.dtype:
    """The dtype of codes: a float8 where PyTorch has the element, int8, or uint8 for what is packed.

    Example:
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> code_dtype(FP8), code_dtype(NVFP4)
        (torch.float8_e4m3fn, torch.uint8)
    """
    element = format.element
    if isinstance(element, IntElement):
        return torch.int8 if code_bits(format) == 8 else torch.uint8
    return CODE_DTYPES.get((element.exponent_bits, element.mantissa_bits), torch.uint8)


def pack_scales(
    amax: Float32[Tensor, "..."] | None, global_amax: Float32[Tensor, "*experts"] | None, *, format: Format
) -> tuple[Tensor | None, Tensor | None]:
    """The scales that the state alone decides, and the global scale; None where a kernel makes them.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> pack_scales(torch.tensor([2688.0]), None, format=NVFP4)
        (None, tensor([1.]))
    """
    element = format.element
    if format.scale == "e8m0":
        return None, None
    if format.scale == "e4m3":
        expert_amax = valid(amax if format.dynamic else global_amax)
        return None, expert_scale(expert_amax, format)
    if isinstance(element, IntElement):
        return None if format.has_blocks_along_in else int_scale(valid(amax), format), None
    return fp8_scale(valid(amax), element)[1], None


def pack_reference(
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales, and for two-level formats the global scale of each expert.

    Args:
        weight: As for `fake_quantize_reference`, finite; `in` a multiple of what a byte, or three of them, hold.
        amax: As for `fake_quantize_reference`.
        global_amax: Likewise.
        format: The numbers; not one with `unit_scale_below`, whose scales no E4M3 number stands for.

    Returns:
        `codes` and `scale` as in the table above, `scale` with one number per granule; `global_scale`, fp32 [*experts],
        or None.

    Source: the layouts of compressed-tensors 0.20 and ModelOpt 0.47.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> pack_reference(torch.tensor([[0.1, -0.04, 1.0, -7.0]]), torch.tensor(7.0), None, format=FORMATS["INT8"])
        (tensor([[   2,   -1,   18, -127]], dtype=torch.int8), tensor(18.1429), None)
    """
    x, element = weight.float(), format.element
    if format.scale == "e8m0":
        v, e, finite = quantize_mx(x, format, codes_of)
        scale = torch.where(finite, e + 127, 255).to(torch.uint8)[..., 0]
        return _packed(v.flatten(-2), format), scale, None
    if format.scale == "e4m3":
        v, _, s8, g = quantize_two_level(x, amax, global_amax, format, codes_of)
        return _packed(v.flatten(-2), format), s8.to(torch.float8_e4m3fn), g
    granules = valid(amax)
    if isinstance(element, IntElement):
        q, _ = quantize_int(x, granules, format)
        codes = q.to(torch.int8) if code_bits(format) == 8 else q.add_(INT4_OFFSET).to(torch.uint8)
        return _packed(codes, format), int_scale(granules, format), None
    v, _ = quantize_fp8(x, granules, format, codes_of)
    return _packed(v, format), fp8_scale(granules, element)[1], None


def unpack_reference(
    codes: Tensor,
    scale: Tensor,
    global_scale: Float32[Tensor, "*experts"] | None,
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """The weight that codes and scales stand for: `fake_quantize_reference` of what was packed.

    Args:
        codes: From `pack_reference`, as are the scales.
        scale: One number a granule.
        global_scale: Two-level formats only.
        format: What it was packed in.
        out_dtype: bf16, fp16 or fp32.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> codes, scale = torch.tensor([[2, -1, 18, -127]], dtype=torch.int8), torch.tensor(127 / 7)
        >>> unpack_reference(codes, scale, None, format=FORMATS["INT8"], out_dtype=torch.float32)
        tensor([[ 0.1102, -0.0551,  0.9921, -7.0000]])
    """
    v, columns = _decode(codes, format), format.block[1]
    if format.scale == "e8m0":
        s = torch.where(scale == 255, torch.nan, power_of_two(scale.int() - 127))
        y = (v.unflatten(-1, (-1, columns or 1)) * s[..., None]).flatten(-2)
    elif format.scale == "e4m3":
        assert global_scale is not None
        s = effective_scale(scale.float(), global_scale[..., None, None], format)
        y = (v.unflatten(-1, (-1, columns or 1)) * s[..., None]).flatten(-2)
    elif isinstance(format.element, IntElement):
        y = dequantize_int(v, spread(scale, v, format), format)
    else:
        y = v * spread(scale, v, format)
    return y.to(out_dtype).contiguous()


def codes_of(x: Float32[Tensor, "..."], element: FloatElement) -> Tensor:
    """Codes of the values that `round_to` gives, one each.

    Within a binade a code is linear in the magnitude, and from one to the next it grows more slowly. So it is the
    smallest of the lines, each rounded.
    """
    x, bits = x.clamp(-element.max, element.max), element_bits(element)
    if (dtype := CODE_DTYPES.get((element.exponent_bits, element.mantissa_bits))) is not None:
        return (x.mul_(64).round_() if dtype == torch.int8 else x).to(dtype)
    step = 2**element.mantissa_bits
    sign = (x.view(torch.int32) >> (32 - bits)).bitwise_and_(1 << (bits - 1))
    x = x.abs_().mul_(2.0 ** (element.mantissa_bits - element.min_exponent))  # in units of the smallest spacing
    magnitude, line = x.round(), torch.empty_like(x)
    for binade in range(1, 2**element.exponent_bits - 1):
        torch.round(x.mul_(0.5), out=line)
        torch.minimum(magnitude, line.add_(binade * step), out=magnitude)
    return sign.bitwise_or_(magnitude.int()).to(torch.uint8)


def _packed(codes: Tensor, format: Format) -> Tensor:
    """Codes of 4 or 6 bits packed along the last dimension, two in a byte or four in three; of 8 as they are."""
    bits = code_bits(format)
    if bits == 8:
        return codes
    if bits == 4:
        even, odd = codes.unflatten(-1, (-1, 2)).unbind(-1)
        return even | odd << 4
    a, b, c, d = codes.int().unflatten(-1, (-1, 4)).unbind(-1)
    word = a | b << 6 | c << 12 | d << 18
    return torch.stack([word, word >> 8, word >> 16], dim=-1).bitwise_and(0xFF).to(torch.uint8).flatten(-2)


def _decode(codes: Tensor, format: Format) -> Float32[Tensor, "..."]:
    """Codes to values of the element, in fp32."""
    element, bits = format.element, code_bits(format)
    if bits == 4:
        codes = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)
    elif bits == 6:
        a, b, c = codes.int().unflatten(-1, (-1, 3)).unbind(-1)
        word = a | b << 8 | c << 16
        codes = torch.stack([word >> shift & 0x3F for shift in (0, 6, 12, 18)], dim=-1).flatten(-2)
    if isinstance(element, IntElement):
        return codes.float() - (INT4_OFFSET if bits == 4 else 0)
    if codes.is_floating_point():
        return codes.float()
    if codes.dtype == torch.int8:
        return codes.float() / 64
    return _values(element, codes.device)[codes.long()]


def _values(element: FloatElement, device: torch.device) -> Float32[Tensor, "..."]:
    """The value of every code of a small float, in the order of the codes."""
    bits = element_bits(element)
    codes = torch.arange(2**bits, device=device, dtype=torch.int32)
    sign, magnitude = codes >> (bits - 1), codes & (len(codes) // 2 - 1)
    field = magnitude >> element.mantissa_bits
    exponent = field.clamp(min=1) - 1 + element.min_exponent
    significand = (magnitude & (2**element.mantissa_bits - 1)) + (field > 0).int() * 2**element.mantissa_bits
    value = significand.float() * power_of_two(exponent - element.mantissa_bits)
    return torch.where(sign == 1, -value, value)
