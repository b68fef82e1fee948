"""The reference against an oracle of its own, exhaustively where the numbers are few, and the laws it promises.

The oracle is NumPy in float64. It rounds by looking values up in a table of every number the element has, and finds
E8M0 exponents with frexp. It shares no code with `fq_transforms.ops` and was written from NUMERICS.md.

NOTE fp32 in float64: NUMERICS.md says which steps are fp32. A product or quotient of two float32s, computed in float64
and then rounded to float32, is the correctly rounded fp32 result: float64 has 53 >= 2 * 24 + 2 bits, so the double
rounding is innocuous (Figueroa 1995), for subnormal results too, which keep fewer bits. So `_times` and `_over` are
exact IEEE fp32 arithmetic.
"""

from dataclasses import replace
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from fq_transforms.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, IntElement
from fq_transforms.ops.reference import clip_backward_reference, expert_amax_reference, fake_quantize_reference

from tests.cases import ALL_FORMATS, DTYPES, STATIC_FORMATS, experts, name_of, same_bits, shapes_of

FP32_SCALES = [format for format in ALL_FORMATS if format.scale == "fp32"]
TWO_LEVEL = [format for format in ALL_FORMATS if format.scale == "e4m3"]
MX = [format for format in ALL_FORMATS if format.scale == "e8m0"]
DYNAMIC = [format for format in ALL_FORMATS if format.dynamic]
STATEFUL = [format for format in ALL_FORMATS if not format.is_stateless]

# No constant has an E5M2 element, but the axis has: NUMERICS.md gives its FP8 formula.
FP8_E5M2 = replace(FORMATS["FP8"], name="FP8_E5M2", element=E5M2)
MXFP8_E5M2 = [
    replace(FORMATS[name], name=name.replace("MXFP8", "MXFP8_E5M2"), element=E5M2)
    for name in ("MXFP8", "MXFP8_OCP", "MXFP8_TORCHAO_EVEN")
]
FLOAT_ELEMENTS = {"E4M3": E4M3, "E5M2": E5M2, "E3M2": E3M2, "E2M3": E2M3, "E2M1": E2M1}

FLOAT32_MAX = float(np.finfo(np.float32).max)
TINY = 2.0**-24
# Zeros, the smallest numbers, both sides of the fp16 threshold, ordinary ones, the elements' own maxima, the largest.
AMAXES = [
    0.0,
    2.0**-149,
    2.0**-126,
    2.0**-25,
    float(np.nextafter(np.float32(TINY), np.float32(0))),
    TINY,
    float(np.nextafter(np.float32(TINY), np.float32(1))),
    1e-3,
    1.0,
    3.7,
    127.0,
    448.0,
    2688.0,
    65504.0,
    3e38,
    FLOAT32_MAX,
]
INVALID = [float("nan"), float("inf"), float("-inf"), -1.0, -(2.0**-149)]


def _float32(value):
    return np.asarray(value, np.float64).astype(np.float32)


def _times(a, b):
    return _float32(np.asarray(a, np.float64) * np.asarray(b, np.float64))


def _over(a, b):
    return _float32(np.asarray(a, np.float64) / np.asarray(b, np.float64))


@cache
def _magnitudes(element):
    """Every magnitude of the element, ascending in float64. The parity of an index is that of the last bit."""
    if isinstance(element, IntElement):
        return np.arange(max(-element.low, element.high) + 1, dtype=np.float64)
    bits, bias = element.mantissa_bits, 2 ** (element.exponent_bits - 1) - 1
    values = []
    for exponent in range(2**element.exponent_bits):
        for mantissa in range(2**bits):
            leading, power = (1.0, exponent - bias) if exponent else (0.0, 1 - bias)
            values.append((leading + mantissa / 2**bits) * 2.0**power)
    return np.array([value for value in values if value <= element.max])


def _nearest(element, x):
    """The element's value nearest to x; of two equally near, the one whose last bit is 0. NaN stays."""
    values = _magnitudes(element)
    magnitude = np.abs(np.asarray(x, np.float64))
    between = (values[1:] + values[:-1]) / 2
    below, above = np.searchsorted(between, magnitude, "left"), np.searchsorted(between, magnitude, "right")
    value = values[np.where(below % 2 == 0, below, above)]  # the two differ on a tie only
    if isinstance(element, IntElement):
        value = np.where(np.signbit(x), np.minimum(value, -element.low), np.minimum(value, element.high))
    return np.where(np.isnan(magnitude), np.nan, np.copysign(value, x))


def _spread(amax, shape, format):
    """The amax of each weight's own granule."""
    if np.ndim(amax) == 0:
        return np.broadcast_to(np.asarray(amax, np.float32), shape)
    rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
    return np.asarray(amax, np.float32)[np.arange(shape[0]) // rows][:, np.arange(shape[1]) // columns]


def _granule_amax(x, format):
    """Largest magnitude of each granule of one expert [out, in], as [granules of out, granules of in]."""
    rows, columns = (side or extent for side, extent in zip(format.block, x.shape, strict=True))
    along_in = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[1], columns), axis=1)
    return np.maximum.reduceat(along_in, np.arange(0, x.shape[0], rows), axis=0)


def _exponent(amax, element, rounding):
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


def _is_invalid(amax):
    return np.isnan(amax) | np.isinf(amax) | (amax < 0)


@np.errstate(all="ignore")  # infinities and NaN are meant
def _oracle(x, amax, global_amax, format):
    """What NUMERICS.md says of one expert: x [out, in] in float32 to y [out, in] in float32."""
    element = format.element
    block = _spread(_granule_amax(x, format) if format.dynamic else amax, x.shape, format)
    invalid = _is_invalid(block)
    if isinstance(element, IntElement):
        s = _over(element.qmax, block)
        y = np.where(block < TINY, 0.0, _over(_nearest(element, _times(x, s)), s))
    elif format.scale == "fp32":
        s = _over(element.max, np.where(block <= TINY, 1.0, block))
        y = _times(_nearest(element, _times(x, s)), _over(1.0, s))
    elif format.scale == "e4m3":
        expert = np.float32(amax if format.dynamic else global_amax)
        invalid = invalid | _is_invalid(expert)
        g = _over(expert, 6 * 448)
        s = _times(_nearest(E4M3, np.clip(_over(block, _times(6, g)), format.min_scale, 448.0)), g)
        s = np.where(s < np.float32(format.unit_scale_below), np.float32(1), s)
        y = _times(_nearest(element, _over(x, s)), s)
        y = np.where((block == 0) | (g == 0) | (s == 0), 0.0, y)
    else:
        power = np.ldexp(1.0, _exponent(block, element, format.exponent_rounding))
        y = np.where(block == 0, 0.0, _times(_nearest(element, _over(x, power)), power))
    y = np.copysign(np.abs(y), x)  # a result has the sign of its weight
    return np.where(invalid | np.isnan(x), np.nan, y).astype(np.float32)


def _oracle_of(weight, amax, global_amax, format):
    """The oracle over any leading expert dimensions, torch in and torch out, in float32."""
    shape = weight.shape
    count = prod(shape[:-2])
    x = weight.float().numpy().reshape(count, *shape[-2:])
    a = [None] * count if amax is None else amax.numpy().reshape(count, *format.amax_shape(*shape[-2:]))
    g = [None] * count if global_amax is None else global_amax.numpy().reshape(count)
    return torch.from_numpy(np.stack([_oracle(x[i], a[i], g[i], format) for i in range(count)]).reshape(shape))


def _round_once(y, dtype):
    """float32 rounded to nearest even in the output dtype, not by PyTorch: bf16 in integers, fp16 by NumPy."""
    if dtype == torch.float32:
        return y
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            return torch.from_numpy(y.numpy().astype(np.float16))
    bits = y.numpy().view(np.uint32).astype(np.uint64)
    rounded = np.where(np.isnan(y.numpy()), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def _fake_quantize(weight, amax=None, global_amax=None, *, format, out_dtype=torch.float32):
    return fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=out_dtype)


def _calibrated(weight, format):
    return (None, None) if format.is_stateless else expert_amax_reference(weight, format=format)


def _top(element):
    """What the scale maps amax to."""
    return element.qmax if isinstance(element, IntElement) else element.max


def _filled(value, shape, format):
    return torch.full(format.amax_shape(*shape), value, dtype=torch.float32)


def _every_bf16():
    """All 65536 patterns, infinities and NaN among them: [256, 256], in the order of their bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)


@cache
def _finite_layouts():
    """The 65280 finite patterns as [255, 256], each magnitude beside its negative, at several mixtures of magnitudes.

    With a stride k, neighbours are k/2 patterns apart: a block of 32 spans 1/8, 5, 26 binades; at random, all of them.
    """
    magnitude = torch.arange(32640, dtype=torch.int32)
    patterns = torch.stack([magnitude, magnitude - 32768], dim=1).flatten().to(torch.int16).view(torch.bfloat16)
    index = torch.arange(patterns.numel())
    random = torch.randperm(patterns.numel(), generator=torch.Generator().manual_seed(1))
    orders = [index, index * 37 % index.numel(), index * 211 % index.numel(), random]
    assert all(order.unique().numel() == index.numel() for order in orders)
    return [patterns[order].view(255, 256) for order in orders]


def _wrong(weight, amax, global_amax, format):
    y = _fake_quantize(weight, amax, global_amax, format=format)
    return not same_bits(y, _oracle_of(weight, amax, global_amax, format))


def test_tables_hold_the_elements():
    """The oracle's tables are the OCP elements: a wrong table would make every test below agree on a wrong number."""
    for element, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
        assert _magnitudes(element).tolist() == values[values.isfinite()].tolist()
    assert _magnitudes(E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e2m3 = [i / 8 for i in range(16)] + [i / 4 for i in range(8, 16)] + [i / 2 for i in range(8, 16)]
    assert _magnitudes(E2M3).tolist() == e2m3
    e3m2 = [i / 16 for i in range(4)] + [i / 16 * 2**e for e in range(7) for i in range(4, 8)]
    assert _magnitudes(E3M2).tolist() == e3m2
    assert _magnitudes(IntElement(7, -8, 7)).tolist() == list(range(9))


@pytest.mark.parametrize("format", [*FP32_SCALES, FP8_E5M2], ids=name_of)
def test_every_bf16_weight_at_fp32_scales(format):
    """Law: every bf16 weight, infinities and NaN included, at every kind of amax, is what NUMERICS.md says."""
    weight = _every_bf16()
    shape = format.amax_shape(256, 256)
    mixed = torch.tensor(AMAXES).repeat(-(-prod(shape) // len(AMAXES)))[: prod(shape)].view(shape)
    wrong = [amax for amax in AMAXES if _wrong(weight, _filled(amax, (256, 256), format), None, format)]
    assert wrong == []
    assert not _wrong(weight, mixed, None, format)


@pytest.mark.parametrize("format", [format for format in TWO_LEVEL if format.dynamic], ids=name_of)
def test_every_finite_bf16_weight_in_dynamic_two_level_blocks(format):
    """Law: every finite bf16 weight, among near and far neighbours, under every kind of global amax."""
    wrong = [
        (layout, amax)
        for layout, weight in enumerate(_finite_layouts())
        for amax in AMAXES
        if _wrong(weight, torch.tensor(amax), None, format)
    ]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("format", [format for format in TWO_LEVEL if not format.dynamic], ids=name_of)
def test_every_bf16_weight_in_static_two_level_blocks(format):
    """Law: every bf16 weight at every pair of block amax and global amax, also pairs no calibration would make."""
    weight = _every_bf16()
    wrong = [
        (amax, global_amax)
        for amax in AMAXES
        for global_amax in AMAXES
        if _wrong(weight, _filled(amax, (256, 256), format), torch.tensor(global_amax), format)
    ]
    assert wrong == []


@pytest.mark.parametrize("format", [*MX, *MXFP8_E5M2], ids=name_of)
def test_every_finite_bf16_weight_in_mx_blocks(format):
    """Law: every finite bf16 weight, among near and far neighbours; exponents from the clamp at -127 to the top."""
    assert [layout for layout, weight in enumerate(_finite_layouts()) if _wrong(weight, None, None, format)] == []


@pytest.mark.parametrize("format", [*MX, *MXFP8_E5M2], ids=name_of)
def test_mx_exponent_turns_over_at_one_amax(format):
    """Law: in each binade of fp32, subnormal ones too, e steps at exactly one amax. Kills e through a float log.

    Around each possible threshold (a power of two, the element's max, the first amax that EVEN rounds up to the next
    power of two): the three fp32 numbers below it, itself, the three above.
    """
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    rounds_up = 2.0 - 2.0 ** -(format.element.mantissa_bits + 1)
    thresholds = _float32(np.outer([1.0, 2 * np.frexp(format.element.max)[0], rounds_up], powers))
    bits = thresholds.reshape(-1, 1).view(np.int32) + np.arange(-3, 4, dtype=np.int32)
    amax = np.maximum(bits, 1).view(np.float32).reshape(-1, 1)
    amax = amax[np.isfinite(amax[:, 0])]
    weight = _times(amax, np.linspace(1, -1, 32))
    assert weight.shape == (len(amax), 32)
    assert len(amax) > 5800
    assert not _wrong(torch.from_numpy(weight), None, None, format)


@pytest.mark.parametrize("format", [*FP32_SCALES, FP8_E5M2], ids=name_of)
def test_quotients_are_exact_at_any_amax(format):
    """Law: the divisions are IEEE's. Kills q * (1/s) for q / s, and reciprocal * qmax for qmax / amax.

    Every granule has an amax of a random mantissa, and weights at the values and midpoints of the element.
    """
    generator = np.random.default_rng(2)
    values = _magnitudes(format.element)
    steps = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    shape = (256, 4, 128)
    amax = np.exp2(generator.uniform(-20, 20, (256, *format.amax_shape(4, 128)))).astype(np.float32)
    step = np.stack([_spread(expert, shape[1:], format) for expert in amax]).astype(np.float64) / _top(format.element)
    weight = _float32(generator.choice(steps, shape) * generator.choice([-1, 1], shape) * step)
    assert not _wrong(torch.from_numpy(weight), torch.from_numpy(amax), None, format)


@pytest.mark.parametrize("format", [*ALL_FORMATS, FP8_E5M2, *MXFP8_E5M2], ids=name_of)
def test_fp32_weights_of_any_bits(format):
    """Law: fp32 weights, whose low bits bf16 never sets, calibrated: 65536 mantissas over forty binades."""
    generator = np.random.default_rng(3)
    weight = torch.from_numpy(_float32(generator.standard_normal((4, 128, 128)) * np.exp2(generator.uniform(-40, 0))))
    weight *= torch.tensor([1.0, 2.0**-20, 2.0**20, 3.0]).view(4, 1, 1)
    weight[0] *= torch.from_numpy(np.exp2(generator.integers(-40, 1, (128, 128)))).float()
    assert not _wrong(weight, *_calibrated(weight, format), format)


@pytest.mark.parametrize("format", DYNAMIC, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_or_inf_makes_its_own_dynamic_block_nan(format, dtype):
    """Law: each of bf16's 256 non-finite patterns makes its own block NaN and changes no other one."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    patterns = bits.view(torch.bfloat16)[~bits.view(torch.bfloat16).isfinite()]
    assert patterns.numel() == 256
    clean = experts(1, (256, 128), dtype)[0]
    amax = None if format.is_stateless else clean.float().abs().max()
    column = torch.arange(256) * 37 % 128
    weight = clean.clone()
    weight[torch.arange(256), column] = patterns.to(dtype)
    block = torch.arange(128) // format.block[1] == (column // format.block[1]).view(256, 1)
    expected = _fake_quantize(clean, amax, format=format).masked_fill(block, torch.nan)
    assert same_bits(_fake_quantize(weight, amax, format=format), expected)


def _at_unit_scale(element, weight, scale):
    """The element's rounding alone: weight [n] fake quantized in fp32 where the scale is exactly 1."""
    if scale == "fp32":
        format = replace(FORMATS["INT8" if isinstance(element, IntElement) else "FP8"], element=element)
        return _fake_quantize(weight.view(1, -1), torch.tensor(float(_top(element))), format=format).view(-1)
    # A block of 32 for each weight, with the largest value beside it, so that 2**e == 1.
    block = torch.zeros(weight.numel(), 32)
    block[:, 0], block[:, 1] = weight, element.max
    return _fake_quantize(block, format=replace(FORMATS["MXFP8"], element=element))[:, 0]


UNIT_SCALES = [(name, element, scale) for name, element in FLOAT_ELEMENTS.items() for scale in ("fp32", "e8m0")] + [
    ("INT8", IntElement(127, -128, 127), "fp32"),
    ("INT4", IntElement(7, -8, 7), "fp32"),
    ("INT4_KIMI", IntElement(7, -7, 7), "fp32"),
]


def _values(element):
    """Every value of the element in float32, ascending, and the index parity of each from zero."""
    magnitudes = _magnitudes(element)
    low, high = (-element.low, element.high) if isinstance(element, IntElement) else (element.max, element.max)
    negative = -magnitudes[(magnitudes <= low) & (magnitudes > 0)][::-1]
    values = np.concatenate([negative, magnitudes[magnitudes <= high]])
    return torch.from_numpy(_float32(values)), torch.arange(len(values)) - len(negative)


@pytest.mark.parametrize(("element", "scale"), [case[1:] for case in UNIT_SCALES], ids=[f"{n}-{s}" for n, _, s in UNIT_SCALES])
def test_values_are_fixed_points(element, scale):
    """Law: every value that the element has is kept, zeros with their sign."""
    values, _ = _values(element)
    values = torch.cat([values, torch.tensor([-0.0])])
    assert same_bits(_at_unit_scale(element, values, scale), values)


@pytest.mark.parametrize(("element", "scale"), [case[1:] for case in UNIT_SCALES], ids=[f"{n}-{s}" for n, _, s in UNIT_SCALES])
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer(element, scale):
    """Law: round to nearest, ties to even, decided by a single fp32 ulp, in subnormals and across binades."""
    values, index = _values(element)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    even = torch.where(index[:-1] % 2 == 0, low, high)
    for weight, expected in (
        (middle, even),
        (middle.nextafter(low), low),
        (middle.nextafter(high), high),
    ):
        assert weight.unique().numel() == middle.numel()
        assert same_bits(_at_unit_scale(element, weight, scale), expected.abs().copysign(weight))


@pytest.mark.parametrize(("element", "scale"), [case[1:] for case in UNIT_SCALES if case[2] == "fp32"], ids=name_of)
def test_beyond_the_largest_value_saturates(element, scale):
    """Law: what lies above the largest value, infinities too, becomes it. Kills E4M3's NaN and E5M2's infinity."""
    values, _ = _values(element)
    for end, outward in ((values[0], -torch.inf), (values[-1], torch.inf)):
        outside = torch.stack([end.nextafter(end * torch.inf), end * 1.01, end * 2, end * 1e30, end * torch.inf])
        assert outside[-1] == outward
        assert same_bits(_at_unit_scale(element, outside, scale), end.expand(5).contiguous())
