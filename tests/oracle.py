"""The oracle that the reference is held against: NumPy in float64, written from the formulas' text alone.

It rounds by looking values up in a table of every number the element has, and finds E8M0 exponents with frexp. It
shares no code with `fq_transforms.ops`.

NOTE fp32 in float64: a product or quotient of two float32s, computed in float64 and then rounded to float32, is the
correctly rounded fp32 result: float64 has 53 >= 2 * 24 + 2 bits, so the double rounding is innocuous (Figueroa 1995),
for subnormal results too, which keep fewer bits. So `times` and `over` are exact IEEE fp32 arithmetic.
"""

from functools import cache
from math import prod

import numpy as np
import torch

from fq_transforms.formats import E4M3, IntElement

TINY = 2.0**-24


def float32(value):
    return np.asarray(value, np.float64).astype(np.float32)


def times(a, b):
    return float32(np.asarray(a, np.float64) * np.asarray(b, np.float64))


def over(a, b):
    return float32(np.asarray(a, np.float64) / np.asarray(b, np.float64))


@cache
def magnitudes(element):
    """Every magnitude of the element, ascending in float64. The parity of an index is that of the last bit."""
    if isinstance(element, IntElement):
        return np.arange(max(-element.low, element.high) + 1, dtype=np.float64)
    if element.exponent_bits == 0:  # OCP 1.0, 5.3.4: integers, of which all bits but the sign and one are a fraction
        values = np.arange(2**element.mantissa_bits) / 2.0 ** (element.mantissa_bits - 1)
        return values[values <= element.max]
    bits, bias = element.mantissa_bits, 2 ** (element.exponent_bits - 1) - 1
    values = []
    for exponent in range(2**element.exponent_bits):
        for mantissa in range(2**bits):
            leading, power = (1.0, exponent - bias) if exponent else (0.0, 1 - bias)
            values.append((leading + mantissa / 2**bits) * 2.0**power)
    return np.array([value for value in values if value <= element.max])


def nearest(element, x):
    """The element's value nearest to x; of two equally near, the one whose last bit is 0. NaN stays.

    The last bit of the significand: without a mantissa that is the leading one, so the upper value is the even one.
    """
    values = magnitudes(element)
    magnitude = np.abs(np.asarray(x, np.float64))
    between = (values[1:] + values[:-1]) / 2
    below, above = np.searchsorted(between, magnitude, "left"), np.searchsorted(between, magnitude, "right")
    is_even = below == 0 if getattr(element, "mantissa_bits", 1) == 0 else below % 2 == 0
    value = values[np.where(is_even, below, above)]  # the two differ on a tie only
    if isinstance(element, IntElement):
        value = np.where(np.signbit(x), np.minimum(value, -element.low), np.minimum(value, element.high))
    return np.where(np.isnan(magnitude), np.nan, np.copysign(value, x))


def spread(amax, shape, format):
    """The amax of each weight's own granule."""
    if np.ndim(amax) == 0:
        return np.broadcast_to(np.asarray(amax, np.float32), shape)
    rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
    return np.asarray(amax, np.float32)[np.arange(shape[0]) // rows][:, np.arange(shape[1]) // columns]


def granule_amax(x, format):
    """Largest magnitude of each granule of one expert [out, in], as [granules of out, granules of in]."""
    rows, columns = (side or extent for side, extent in zip(format.block, x.shape, strict=True))
    along_in = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[1], columns), axis=1)
    return np.maximum.reduceat(along_in, np.arange(0, x.shape[0], rows), axis=0)


def exponent(amax, element, rounding):
    """E8M0 exponent of the blocks' amax, by frexp: amax = fraction * 2**power with fraction in [1/2, 1)."""
    fraction, power = np.frexp(np.asarray(amax, np.float64))
    max_fraction, max_power = np.frexp(element.max)
    if rounding == "up":
        e = power - max_power + (fraction > max_fraction)
    else:
        if rounding == "even":  # 1 + mantissa_bits significant bits; 1.0 here is a carry into the next power
            fraction = np.rint(fraction * 2.0 ** (element.mantissa_bits + 1)) / 2.0 ** (element.mantissa_bits + 1)
        e = (power - 1 + (fraction == 1.0)) - (max_power - 1)
    return np.clip(e, -127, 127)


def is_invalid(amax):
    return np.isnan(amax) | np.isinf(amax) | (amax < 0)


@np.errstate(all="ignore")  # infinities and NaN are meant
def fake_quantize(x, amax, global_amax, format):
    """What NUMERICS.md says of one expert: x [out, in] in float32 to y [out, in] in float32."""
    element = format.element
    block = spread(granule_amax(x, format) if format.dynamic else amax, x.shape, format)
    invalid = is_invalid(block)
    if isinstance(element, IntElement):
        if format.dequantize == "divide":
            s = over(element.qmax, block)
            y = over(nearest(element, times(x, s)), s)
        else:
            s = over(block, element.qmax)
            y = times(nearest(element, over(x, s)), s)
        y = np.where(block < TINY, 0.0, y)
    elif format.scale == "fp32":
        s = over(element.max, np.where(block <= TINY, 1.0, block))
        y = times(nearest(element, times(x, s)), over(1.0, s))
    elif format.scale == "e4m3":
        expert = np.float32(amax if format.dynamic else global_amax)
        invalid = invalid | is_invalid(expert)
        if format.dequantize == "divide":
            g = times(over(1, expert), 6 * 448)
            s = over(nearest(E4M3, np.clip(times(over(block, 6), g), format.min_scale, 448.0)), g)
        else:
            g = over(expert, 6 * 448)
            s = times(nearest(E4M3, np.clip(over(block, times(6, g)), format.min_scale, 448.0)), g)
        s = np.where(s < np.float32(format.unit_scale_below), np.float32(1), s)
        y = times(nearest(element, over(x, s)), s)
        y = np.where((block == 0) | (g == 0) | np.isinf(g) | (s == 0), 0.0, y)
    else:
        power = np.ldexp(1.0, exponent(block, element, format.exponent_rounding))
        y = np.where(block == 0, 0.0, times(nearest(element, over(x, power)), power))
    y = np.copysign(np.abs(y), x)  # a result has the sign of its weight
    return np.where(invalid | np.isnan(x), np.nan, y).astype(np.float32)


def fake_quantize_experts(weight, amax, global_amax, format):
    """The oracle over any leading expert dimensions, torch in and torch out, in float32."""
    shape = weight.shape
    count = prod(shape[:-2])
    x = weight.float().numpy().reshape(count, *shape[-2:])
    a = [None] * count if amax is None else amax.numpy().reshape(count, *format.amax_shape(*shape[-2:]))
    g = [None] * count if global_amax is None else global_amax.numpy().reshape(count)
    return torch.from_numpy(np.stack([fake_quantize(x[i], a[i], g[i], format) for i in range(count)]).reshape(shape))


def round_once(y, dtype):
    """float32 rounded to nearest even in the output dtype, not by PyTorch: bf16 in integers, fp16 by NumPy."""
    if dtype == torch.float32:
        return y
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            return torch.from_numpy(y.numpy().astype(np.float16))
    bits = y.numpy().view(np.uint32).astype(np.uint64)
    rounded = np.where(np.isnan(y.numpy()), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
