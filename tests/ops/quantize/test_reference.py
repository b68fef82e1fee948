"""The reference against an oracle of its own, exhaustively where the numbers are few, and the laws it promises."""

from dataclasses import replace
from functools import cache
from math import prod

import numpy as np
import pytest
import torch

from fq_transforms.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, IntElement
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import clip_backward_reference, fake_quantize_reference
from tests import oracle
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
ELEMENTS = FLOAT_ELEMENTS | {
    "INT8": FORMATS["INT8"].element,
    "INT4": FORMATS["INT4_BLOCK32"].element,
    "INT4_KIMI": FORMATS["INT4_BLOCK32_KIMI"].element,
}

FLOAT32_MAX = float(np.finfo(np.float32).max)
# Zeros, the smallest numbers, both sides of the fp16 threshold, ordinary ones, the elements' own maxima, the largest.
AMAXES = [
    0.0,
    2.0**-149,
    2.0**-126,
    2.0**-25,
    float(np.nextafter(np.float32(oracle.TINY), np.float32(0))),
    oracle.TINY,
    float(np.nextafter(np.float32(oracle.TINY), np.float32(1))),
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
    return not same_bits(y, oracle.fake_quantize_experts(weight, amax, global_amax, format))


def test_tables_hold_the_elements():
    """The oracle's tables are the OCP elements: a wrong table would make every test below agree on a wrong number."""
    for element, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
        assert oracle.magnitudes(element).tolist() == values[values.isfinite()].tolist()
    assert oracle.magnitudes(E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e2m3 = [i / 8 for i in range(16)] + [i / 4 for i in range(8, 16)] + [i / 2 for i in range(8, 16)]
    assert oracle.magnitudes(E2M3).tolist() == e2m3
    e3m2 = [i / 16 for i in range(4)] + [i / 16 * 2**e for e in range(7) for i in range(4, 8)]
    assert oracle.magnitudes(E3M2).tolist() == e3m2
    assert oracle.magnitudes(IntElement(7, -8, 7)).tolist() == list(range(9))


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
    thresholds = oracle.float32(np.outer([1.0, 2 * np.frexp(format.element.max)[0], rounds_up], powers))
    bits = thresholds.reshape(-1, 1).view(np.int32) + np.arange(-3, 4, dtype=np.int32)
    amax = np.maximum(bits, 1).view(np.float32).reshape(-1, 1)
    amax = amax[np.isfinite(amax[:, 0])]
    weight = oracle.times(amax, np.linspace(1, -1, 32))
    assert weight.shape == (len(amax), 32)
    assert len(amax) > 5800
    assert not _wrong(torch.from_numpy(weight), None, None, format)


@pytest.mark.parametrize("format", [*FP32_SCALES, FP8_E5M2], ids=name_of)
def test_quotients_are_exact_at_any_amax(format):
    """Law: the divisions are IEEE's. Kills q * (1/s) for q / s, and reciprocal * qmax for qmax / amax.

    Every granule has an amax of a random mantissa, and weights at the values and midpoints of the element.
    """
    generator = np.random.default_rng(2)
    values = oracle.magnitudes(format.element)
    steps = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    shape = (256, 4, 128)
    amax = np.exp2(generator.uniform(-20, 20, (256, *format.amax_shape(4, 128)))).astype(np.float32)
    step = np.stack([oracle.spread(expert, shape[1:], format) for expert in amax]).astype(np.float64) / _top(
        format.element
    )
    weight = oracle.float32(generator.choice(steps, shape) * generator.choice([-1, 1], shape) * step)
    assert not _wrong(torch.from_numpy(weight), torch.from_numpy(amax), None, format)


@pytest.mark.parametrize("format", TWO_LEVEL, ids=name_of)
def test_nvfp4_scale_next_to_its_ties(format):
    """Law: a block scale is E4M3(amax / (6 * g)), two fp32 roundings. Kills amax / 6 / g, which rounds elsewhere.

    For 64 global amaxes of random mantissas: block amaxes within four fp32 numbers of each midpoint of E4M3 scales.
    """
    generator = np.random.default_rng(15)
    global_amax = oracle.float32(np.exp2(generator.uniform(-8, 8, (64, 1))))
    values = oracle.magnitudes(E4M3)
    midpoints = np.repeat((values[1:] + values[:-1]) / 2, 9)
    near = oracle.float32(midpoints * 6 * (global_amax.astype(np.float64) / 2688))
    near = (near.view(np.int32) + np.tile(np.arange(-4, 5, dtype=np.int32), len(midpoints) // 9)).view(np.float32)
    weight = torch.from_numpy(oracle.times(near[..., None], np.linspace(1, -1, 16)))
    amax, expert = torch.from_numpy(near[..., None]), torch.from_numpy(global_amax[:, 0])
    state = (expert, None) if format.dynamic else (amax, expert)
    assert not _wrong(weight, *state, format)


@pytest.mark.parametrize("format", [*ALL_FORMATS, FP8_E5M2, *MXFP8_E5M2], ids=name_of)
def test_fp32_weights_of_any_bits(format):
    """Law: fp32 weights, whose low bits bf16 never sets, calibrated: 65536 mantissas over forty binades."""
    generator = np.random.default_rng(3)
    weight = torch.from_numpy(
        oracle.float32(generator.standard_normal((4, 128, 128)) * np.exp2(generator.uniform(-40, 0)))
    )
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


FP32_ELEMENTS = [pytest.param(element, "fp32", id=f"{name}-fp32") for name, element in ELEMENTS.items()]
E8M0_ELEMENTS = [pytest.param(element, "e8m0", id=f"{name}-e8m0") for name, element in FLOAT_ELEMENTS.items()]


def _values(element):
    """Every value of the element in float32, ascending, and the index parity of each from zero."""
    magnitudes = oracle.magnitudes(element)
    low, high = (-element.low, element.high) if isinstance(element, IntElement) else (element.max, element.max)
    negative = -magnitudes[(magnitudes <= low) & (magnitudes > 0)][::-1]
    values = np.concatenate([negative, magnitudes[magnitudes <= high]])
    return torch.from_numpy(oracle.float32(values)), torch.arange(len(values)) - len(negative)


@pytest.mark.parametrize(("element", "scale"), FP32_ELEMENTS + E8M0_ELEMENTS)
def test_values_are_fixed_points(element, scale):
    """Law: every value that the element has is kept, zeros with their sign."""
    values, _ = _values(element)
    values = torch.cat([values, torch.tensor([-0.0])])
    assert same_bits(_at_unit_scale(element, values, scale), values)


@pytest.mark.parametrize(("element", "scale"), FP32_ELEMENTS + E8M0_ELEMENTS)
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


@pytest.mark.parametrize(("element", "scale"), FP32_ELEMENTS)
def test_beyond_the_largest_value_saturates(element, scale):
    """Law: what lies above the largest value, infinities too, becomes it. Kills E4M3's NaN and E5M2's infinity."""
    values, _ = _values(element)
    for end, outward in ((values[0], -torch.inf), (values[-1], torch.inf)):
        outside = torch.stack([end.nextafter(end * torch.inf), end * 1.01, end * 2, end * 1e30, end * torch.inf])
        assert outside[-1] == outward
        assert same_bits(_at_unit_scale(element, outside, scale), end.expand(5).contiguous())


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_twice_is_once_in_the_same_state(format, dtype):
    """Law: fq(fq(w)) == fq(w) bit for bit under one state, in any output dtype, where block scales are normal E4M3.

    A result is a value of the element times s, up to a relative error of at most 2**-8 (one bf16 rounding), which is
    less than half a step of any element (INT8: 127 * 2**-9 < 1/2), so it is rounded to the same value again. Dynamic
    blocks recompute an amax whose block scale, or exponent up to an exact factor of two, is the same again.
    """
    for shape in shapes_of(format):
        weight = torch.stack(experts(5, shape, dtype))
        amax, global_amax = _calibrated(weight, format)
        once = _fake_quantize(weight, amax, global_amax, format=format, out_dtype=dtype)
        assert same_bits(_fake_quantize(once, amax, global_amax, format=format, out_dtype=dtype), once)


@pytest.mark.parametrize("format", [*FP32_SCALES, FP8_E5M2], ids=name_of)
def test_twice_is_once_at_any_static_amax(format):
    """Law: as above for every bf16 weight at every kind of amax, clipped and saturated weights included."""
    finite = _finite_layouts()[0]
    for amax in AMAXES:
        state = _filled(amax, finite.shape, format)
        once = _fake_quantize(finite, state, format=format)
        assert same_bits(_fake_quantize(once, state, format=format), once)


@pytest.mark.parametrize("format", MX, ids=name_of)
def test_twice_is_once_in_every_mx_block(format):
    """Law: MX formats are idempotent on every bf16 weight up to 2**127, though "up" may lower e: 2 * value is a value.

    Above, a weight may be rounded up to 2**128, which fp32 does not have: 3.3e38 becomes infinity in MXFP4.
    """
    assert _fake_quantize(torch.full((1, 32), 3.3e38), format=FORMATS["MXFP4"]).isinf().all()
    for weight in (layout.clamp(-(2.0**127), 2.0**127) for layout in _finite_layouts()):
        once = _fake_quantize(weight, format=format)
        assert same_bits(_fake_quantize(once, format=format), once)


INTEGERS = [format for format in ALL_FORMATS if isinstance(format.element, IntElement)]


@pytest.mark.parametrize("format", [format for format in INTEGERS if format.element.qmax % 1 == 0], ids=name_of)
def test_recalibrated_integers_with_a_whole_qmax_are_idempotent(format):
    """Law: with a whole qmax, calibrating on the result gives the same result, bit for bit.

    The largest result is qmax / s, so the new scale is qmax / (qmax / s), two IEEE divisions. Where that could differ
    from s (the mantissa of s is the larger), s was finer than amax, so qmax / s is amax itself.
    """
    weight = torch.cat([torch.stack(experts(8, (64, 256), seed=seed)) for seed in range(4)]) * 1.37
    once = _fake_quantize(weight, *_calibrated(weight, format), format=format)
    assert same_bits(_fake_quantize(once, *_calibrated(once, format), format=format), once)


@pytest.mark.parametrize("format", [format for format in INTEGERS if format.element.qmax % 1 != 0], ids=name_of)
def test_recalibrated_integers_with_half_a_step_are_not_idempotent(format):
    """No law: qmax 127.5 or 7.5 is not a value, so the largest weight moves, and the scale with it.

    A positive largest weight becomes high / qmax of itself. Calibrating again shrinks the granule again, for ever.
    """
    qmax, high = format.element.qmax, format.element.high
    weight = torch.zeros(1, 128)
    weight[0, ::32] = qmax
    for _ in range(3):
        amax = weight.max()
        once = _fake_quantize(weight, *_calibrated(weight, format), format=format)
        assert torch.allclose(once[0, 0], amax * (high / qmax), rtol=1e-6, atol=0)
        weight = once
    random = torch.stack(experts(4, (64, 256)))
    once = _fake_quantize(random, *_calibrated(random, format), format=format)
    twice = _fake_quantize(once, *_calibrated(once, format), format=format)
    assert (twice != once).sum() > random.numel() // 2


@pytest.mark.parametrize("name", ["FP8_PER_CHANNEL", "FP8_BLOCK", "NVFP4", "NVFP4_STATIC"])
def test_recalibrated_floats_move_by_their_last_bits_only(name):
    """No law: y = value * (1 / s) rounds twice, so an amax taken from y can be an ulp or two off, and all y with it.

    The values themselves stay: no result moves by more than three parts in 2**22.
    """
    format = FORMATS[name]
    weight = torch.stack(experts(16, (256, 256)))
    once = _fake_quantize(weight, *_calibrated(weight, format), format=format)
    twice = _fake_quantize(once, *_calibrated(once, format), format=format)
    assert (twice != once).any()
    assert ((twice - once).abs() <= once.abs() * (3 * 2.0**-22)).all()


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4_TRANSFORMER_ENGINE", "NVFP4_MODELOPT"])
def test_nvfp4_is_not_idempotent_where_a_block_scale_is_subnormal(name):
    """No law: a subnormal E4M3 scale may be a third above the true one, and then no value of the block reaches 6.

    With g = 1 and a block amax of 9.6 * 2**-9 the scale is 1.6 * 2**-9, stored as 2**-8. The largest weight becomes
    4 * 2**-8. Its scale is then 4/3 * 2**-9, stored as 2**-9, under which it saturates at 6 * 2**-9.
    """
    block = torch.zeros(1, 16)
    block[0, 0] = 9.6 * 2.0**-9
    once = _fake_quantize(block, torch.tensor(2688.0), format=FORMATS[name])
    assert once[0, 0] == 4 * 2.0**-8
    assert _fake_quantize(once, torch.tensor(2688.0), format=FORMATS[name])[0, 0] == 6 * 2.0**-9


def test_nvfp4_is_idempotent_where_the_block_scale_is_normal():
    """Law: NVFP4 is not idempotent in blocks with an E4M3 scale under 2**-6 only, and never under torchao's floor."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(4096, 16, generator=generator) * 2.0 ** -(20 * torch.rand(4096, 1, generator=generator))
    amax = weight.abs().max()
    scale = weight.abs().amax(1).double() / (6 * amax.double() / 2688)
    moved = {}
    for name in ("NVFP4", "NVFP4_TRANSFORMER_ENGINE", "NVFP4_TORCHAO"):
        once = _fake_quantize(weight, amax, format=FORMATS[name])
        moved[name] = (_fake_quantize(once, amax, format=FORMATS[name]) != once).any(1)
    assert moved["NVFP4"].any()
    assert moved["NVFP4_TRANSFORMER_ENGINE"].any()
    assert scale[moved["NVFP4"] | moved["NVFP4_TRANSFORMER_ENGINE"]].max() < 2.0**-6
    assert not moved["NVFP4_TORCHAO"].any()


LEADING = [(), (5,), (2, 3), (0,), (1, 1, 2)]


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_stack_is_its_experts_one_by_one(format, dtype):
    """Law: [*leading, out, in] gives what each expert gives alone, under any leading dims, none and zero too."""
    for shape in shapes_of(format):
        for leading in LEADING:
            count = prod(leading)
            alone = experts(count, shape, dtype)
            weight = torch.stack(alone).view(*leading, *shape) if count else torch.empty(*leading, *shape, dtype=dtype)
            y = _fake_quantize(weight, *_calibrated(weight, format), format=format, out_dtype=dtype)
            assert y.shape == weight.shape
            assert y.is_contiguous()
            for expert, result in zip(alone, y.reshape(count, *shape), strict=True):
                expected = _fake_quantize(expert, *_calibrated(expert, format), format=format, out_dtype=dtype)
                assert same_bits(result, expected)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_an_expert_never_sees_its_neighbours(format):
    """Law: neighbours of NaN, of infinity, a thousandfold larger or all zero change no bit of an expert's result."""
    shape = shapes_of(format)[-1]
    expert = experts(1, shape)[0]
    expected = _fake_quantize(expert, *_calibrated(expert, format), format=format)
    for neighbour in (expert * torch.nan, expert + torch.inf, expert * 1000, expert * 0):
        weight = torch.stack([neighbour, expert, neighbour])
        amax, global_amax = _calibrated(weight, format)
        assert same_bits(_fake_quantize(weight, amax, global_amax, format=format)[1], expected)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_the_result_has_the_sign_of_its_weight(format):
    """Law: negating a weight negates every result where the element is symmetric; zeros keep the weight's sign.

    An integer's range has one value more below, so only signs are compared there.
    """
    weight = torch.stack(experts(3, shapes_of(format)[-1]))
    weight[:, ::2] *= 2.0**-30  # rounds to zero where the granule is larger than a row
    assert (weight == 0).any()
    amax, global_amax = _calibrated(weight, format)
    y, z = (_fake_quantize(w, amax, global_amax, format=format) for w in (weight, -weight))
    assert torch.equal(y.signbit(), weight.signbit())
    assert torch.equal(z.signbit(), ~weight.signbit())
    if not isinstance(format.element, IntElement):
        assert same_bits(z, -y)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_dtypes_round_once_at_each_end(format):
    """Law: a bf16 or fp16 weight is upcast exactly, and every output dtype is the fp32 result rounded once, to even.

    Kills arithmetic in the weight's dtype, and bf16 results by way of fp16. Amax is no number of either dtype, and the
    largest results overflow fp16.
    """
    for dtype in DTYPES:
        for shape in shapes_of(format):
            weight = torch.stack(experts(3, shape, dtype))
            weight[0] *= 1000.0
            weight[1, 0, 0] = 60000.0
            amax, global_amax = _calibrated(weight, format)
            if amax is not None:
                amax = amax * 1.2345
            y = _fake_quantize(weight.float(), amax, global_amax, format=format)
            for out_dtype in DTYPES:
                result = _fake_quantize(weight, amax, global_amax, format=format, out_dtype=out_dtype)
                assert same_bits(result, oracle.round_once(y, out_dtype))


@pytest.mark.parametrize("format", [*STATIC_FORMATS, *(f for f in TWO_LEVEL if f.dynamic)], ids=name_of)
@pytest.mark.parametrize("invalid", INVALID, ids=str)
def test_an_invalid_amax_makes_exactly_its_granule_nan(format, invalid):
    """Law: amax NaN, infinite or negative gives NaN in its own granule, zero weights too, and nowhere else."""
    shape = (3, 256) if format.has_blocks_along_in else (130, 257)
    weight = torch.stack(experts(3, shape))
    amax, global_amax = _calibrated(weight, format)
    clean = _fake_quantize(weight, amax, global_amax, format=format)
    rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
    granules = format.amax_shape(*shape)
    for expert, i, j in ((1, 0, 0), (2, -1, -1)):
        bad, expected = amax.clone(), clean.clone()
        if granules:
            bad[expert, i, j] = invalid
            top, left = i % granules[0] * rows, j % granules[1] * columns
            expected[expert, top : top + rows, left : left + columns] = torch.nan
        else:
            bad[expert] = invalid
            expected[expert] = torch.nan
        assert same_bits(_fake_quantize(weight, bad, global_amax, format=format), expected)


@pytest.mark.parametrize("invalid", INVALID, ids=str)
def test_an_invalid_global_amax_makes_exactly_its_expert_nan(invalid):
    """Law: the global amax of NVFP4_STATIC is the whole expert's: all of it is NaN, blocks of zeros too."""
    format = FORMATS["NVFP4_STATIC"]
    weight = torch.stack(experts(3, (3, 256)))
    amax, global_amax = _calibrated(weight, format)
    expected = _fake_quantize(weight, amax, global_amax, format=format)
    expected[2] = torch.nan
    global_amax[2] = invalid
    assert same_bits(_fake_quantize(weight, amax, global_amax, format=format), expected)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_zero_experts_stay_zero(format):
    """Law: an expert of zeros, calibrated, keeps every zero and its sign. Kills 0 / 0."""
    for shape in shapes_of(format):
        weight = torch.zeros(2, *shape)
        weight[:, :, ::2] = -0.0
        assert same_bits(_fake_quantize(weight, *_calibrated(weight, format), format=format), weight)


@pytest.mark.parametrize("format", STATIC_FORMATS, ids=name_of)
def test_static_granules_of_amax_zero(format):
    """Law: amax 0 (or -0.0) gives zeros in INT and NVFP4, and in FP8 what amax 1 gives; NaN stays where it is."""
    shape = shapes_of(format)[1]
    weight = torch.stack(experts(2, shape))
    weight[0, 0, 0] = torch.nan
    amax, global_amax = _calibrated(weight, format)
    global_amax = None if global_amax is None else torch.ones_like(global_amax)
    if isinstance(format.element, IntElement) or format.scale == "e4m3":
        expected = torch.zeros_like(weight).copysign(weight).masked_fill(weight.isnan(), torch.nan)
    else:
        expected = _fake_quantize(weight, torch.ones_like(amax), format=format)
    for zero in (0.0, -0.0):
        y = _fake_quantize(weight, torch.full_like(amax, zero), global_amax, format=format)
        assert same_bits(y, expected)


def test_the_zero_threshold_differs_between_int_and_fp8():
    """Law: INT is zero under 2**-24, FP8 takes amax = 1 up to 2**-24 itself: strict in one, not in the other."""
    weight = torch.tensor([[oracle.TINY]])
    assert _fake_quantize(weight, torch.tensor(oracle.TINY), format=FORMATS["INT8"])[0, 0] == oracle.TINY
    below, above = (torch.tensor(oracle.TINY).nextafter(torch.tensor(to)) for to in (0.0, 1.0))
    assert _fake_quantize(weight, below, format=FORMATS["INT8"])[0, 0] == 0
    assert _fake_quantize(weight, torch.tensor(oracle.TINY), format=FORMATS["FP8"])[0, 0] == 0
    assert _fake_quantize(weight, above, format=FORMATS["FP8"])[0, 0] != 0


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_no_input_is_changed(format):
    """Law: neither weight, amax, global amax nor gradient is written to, in version or in bits, by any operation."""
    weight = torch.stack(experts(3, shapes_of(format)[-1]))
    amax, global_amax = _calibrated(weight, format)
    grad = torch.randn_like(weight)
    inputs = [tensor for tensor in (weight, amax, global_amax, grad) if tensor is not None]
    copies, versions = [tensor.clone() for tensor in inputs], [tensor._version for tensor in inputs]
    outputs = [_fake_quantize(weight, amax, global_amax, format=format)]
    if format.clips:
        outputs.append(clip_backward_reference(grad, weight, amax, format=format))
    if not format.is_stateless:
        outputs += [tensor for tensor in expert_amax_reference(weight, format=format) if tensor is not None]
    assert [tensor._version for tensor in inputs] == versions
    assert all(same_bits(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert all(output.untyped_storage().data_ptr() not in storages for output in outputs)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_strided_weights(format):
    """Law: a transposed or strided weight gives what its contiguous copy gives, in a contiguous tensor."""
    out, columns = shapes_of(format)[-1]
    dense = torch.stack(experts(2, (columns, 2 * out)))
    for weight in (dense.mT[:, ::2], dense.mT[:, out:], dense[:1, :columns, :1].expand(2, columns, out).mT):
        copy = weight.contiguous()
        amax, global_amax = _calibrated(copy, format)
        y = _fake_quantize(weight, amax, global_amax, format=format)
        assert same_bits(y, _fake_quantize(copy, amax, global_amax, format=format))
        if not format.is_stateless:
            assert same_bits(expert_amax_reference(weight, format=format)[0], amax)
        assert y.is_contiguous()


@pytest.mark.parametrize("format", STATIC_FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("grad_dtype", [torch.float64, *DTYPES], ids=name_of)
def test_clip_backward_masks_each_granule(format, dtype, grad_dtype):
    """Law: grad where |w| <= amax, else 0, per granule of each expert; equality is kept; the dtype is the weight's."""
    for shape in shapes_of(format):
        weight = torch.stack(experts(3, shape, dtype))
        amax = _calibrated(weight, format)[0] * torch.tensor([1.0, 0.5, 0.7]).view(
            3, *[1] * len(format.amax_shape(*shape))
        )
        grad = torch.randn(weight.shape).to(grad_dtype)
        limit = np.stack([oracle.spread(expert, shape, format) for expert in amax.numpy()]).astype(np.float64)
        kept = torch.from_numpy(np.abs(weight.double().numpy()) <= limit)
        assert kept[0].all()  # the largest weight of each granule equals its amax
        assert not kept[1:].all() or weight[1:].count_nonzero() == 0
        expected = torch.where(kept, grad.to(dtype), torch.zeros((), dtype=dtype))
        assert same_bits(clip_backward_reference(grad, weight, amax, format=format), expected)


def test_clip_backward_compares_in_fp32():
    """Kills the comparison in bf16: 1 - 2**-20 and 1 + 2**-20 are both 1.0 in bf16, and only one of them keeps 1.0."""
    weight = torch.tensor([[1.0, -1.0, 0.5, 1.0078125]], dtype=torch.bfloat16)
    grad = torch.tensor([[3.0, 5.0, 7.0, 9.0]], dtype=torch.bfloat16)
    for amax, kept in ((1 - 2.0**-20, [0, 0, 7, 0]), (1.0, [3, 5, 7, 0]), (1 + 2.0**-20, [3, 5, 7, 0])):
        result = clip_backward_reference(grad, weight, torch.tensor(amax), format=FORMATS["INT8"])
        assert result.tolist() == [kept]


def test_clip_backward_of_nan_and_infinity():
    """Law: a NaN or clipped weight gets 0, whatever the gradient is. Kills grad * mask, where 0 * inf is NaN."""
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 2.0, 0.5, -0.5]])
    for value in (1.0, torch.inf, torch.nan):
        grad = torch.full_like(weight, value)
        result = clip_backward_reference(grad, weight, torch.tensor(1.0), format=FORMATS["INT8"])
        assert result[0, :4].tolist() == [0, 0, 0, 0]
        assert same_bits(result[:, 4:], grad[:, 4:])


def test_kimi_leaves_out_the_lowest_integer():
    """Kimi-K2 clamps to [-7, 7], ModelOpt to [-8, 7]: they differ below -7.5 steps, which calibration never makes."""
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([-9.0, -7.6, -7.4, -7.0, 7.6, 9.0])
    amax = torch.tensor([[7.0]])
    modelopt = _fake_quantize(weight, amax, format=FORMATS["INT4_BLOCK32"])
    kimi = _fake_quantize(weight, amax, format=FORMATS["INT4_BLOCK32_KIMI"])
    assert modelopt[0, :6].tolist() == [-8, -8, -7, -7, 7, 7]
    assert kimi[0, :6].tolist() == [-7, -7, -7, -7, 7, 7]
    calibrated = torch.stack(experts(4, (16, 256)))
    formats = replace(FORMATS["INT4_BLOCK32"], dequantize="multiply"), FORMATS["INT4_BLOCK32_KIMI"]
    assert same_bits(*(_fake_quantize(calibrated, *_calibrated(calibrated, f), format=f) for f in formats))


HALF_STEPS = {
    "INT8": ["INT8_COMPRESSED_TENSORS"],
    "INT8_PER_CHANNEL": ["INT8_PER_CHANNEL_COMPRESSED_TENSORS", "INT8_PER_CHANNEL_TORCHAO"],
    "INT4_BLOCK32": ["INT4_BLOCK32_COMPRESSED_TENSORS", "INT4_BLOCK32_TORCHAO"],
    "INT4_BLOCK128": ["INT4_BLOCK128_COMPRESSED_TENSORS"],
}


@pytest.mark.parametrize(("modelopt", "names"), HALF_STEPS.items(), ids=HALF_STEPS.keys())
def test_half_a_step_more_than_the_largest_integer(modelopt, names):
    """compressed-tensors and torchao map amax to 7.5 (127.5): amax becomes 7 (127) steps, -amax -8 (-128)."""
    qmax = FORMATS[names[0]].element.qmax
    weight = torch.zeros(1, 128)
    weight[0, ::32], weight[0, 1::32], weight[0, 2::32] = qmax, -qmax, qmax - 1.25
    for name in names:
        y = _fake_quantize(weight, *_calibrated(weight, FORMATS[name]), format=FORMATS[name])
        assert y[0, :3].tolist() == [qmax - 0.5, -qmax - 0.5, qmax - 1.5]
    y = _fake_quantize(weight, *_calibrated(weight, FORMATS[modelopt]), format=FORMATS[modelopt])
    step = qmax / (qmax - 0.5)
    assert torch.allclose(y[0, :3], torch.tensor([qmax, -qmax, (qmax - 1.5) * step]), rtol=2.0**-22, atol=0)


def test_compressed_tensors_and_torchao_name_one_definition():
    """Law: the two libraries' names of one convention give the same bits."""
    weight = torch.stack(experts(4, (33, 384)))
    for name in ("INT8_PER_CHANNEL", "INT4_BLOCK32"):
        results = [
            _fake_quantize(weight, *_calibrated(weight, format), format=format)
            for format in (FORMATS[f"{name}_COMPRESSED_TENSORS"], FORMATS[f"{name}_TORCHAO"])
        ]
        assert same_bits(*results)


def _small_block(global_amax, *values, format):
    block = torch.zeros(1, 16)
    block[0, : len(values)] = torch.tensor(values)
    y = _fake_quantize(block, torch.tensor(global_amax), format=FORMATS[format])
    return y[0, : len(values)].tolist()


def test_what_becomes_of_an_underflowed_nvfp4_scale():
    """With g = 1, true block scales of 2**-11 and 2**-8, where each library does something else.

    Deployment stores 2**-9 for the first, under which 1.5 steps are the weight itself; TransformerEngine stores 0.
    torchao stores 2**-6 for both: the second block's 2**-8 is then a quarter of a step, a tie that goes to 0.
    """
    underflowed, small = (6 * 2.0**-11, 2.0**-11), (6 * 2.0**-8, 2.0**-8)
    assert _small_block(2688.0, *underflowed, format="NVFP4") == [6 * 2.0**-11, 0]
    assert _small_block(2688.0, *underflowed, format="NVFP4_TRANSFORMER_ENGINE") == [0, 0]
    assert _small_block(2688.0, *underflowed, format="NVFP4_TORCHAO") == [0, 0]
    assert _small_block(2688.0, *small, format="NVFP4") == [*small]
    assert _small_block(2688.0, *small, format="NVFP4_TRANSFORMER_ENGINE") == [*small]
    assert _small_block(2688.0, *small, format="NVFP4_TORCHAO") == [6 * 2.0**-8, 0]


def test_modelopt_replaces_a_small_nvfp4_scale_by_one():
    """ModelOpt's fake kernel: an effective scale under 1e-5 becomes 1, so its block becomes 0; others keep theirs.

    With g = 2**-20, block scales of 8 and 16 are effective scales of 7.6e-6 and 1.5e-5. An underflowed scale is under
    1e-5 too, whatever g is: with g = 1024, weights of 3 and 1.4 are rounded in steps of 1.
    """
    g = 2.0**-20
    below, above = (48 * g, 8 * g), (96 * g, 16 * g)
    for values in (below, above):
        assert _small_block(2688 * g, *values, format="NVFP4") == [*values]
    assert _small_block(2688 * g, *below, format="NVFP4_MODELOPT") == [0, 0]
    assert _small_block(2688 * g, *above, format="NVFP4_MODELOPT") == [*above]
    assert _small_block(2688 * 1024.0, 3.0, 1.4, format="NVFP4_MODELOPT") == [3, 1.5]
    assert _small_block(2688 * 1024.0, 3.0, 1.4, format="NVFP4_TRANSFORMER_ENGINE") == [0, 0]


def _largest_of_block(value, name):
    block = torch.zeros(1, 32)
    block[0, 0] = value
    return _fake_quantize(block, format=FORMATS[name])[0, 0].item()


@pytest.mark.parametrize(
    ("name", "amax", "up", "floor", "even"),
    [
        # E2M1's largest power of two is 4. 6.5 needs e = 1; 1.625 rounds down to 1.5, and 6.5 is clipped by two.
        ("MXFP4", 6.5, 6.0, 6.0, 6.0),
        ("MXFP4", 7.0, 8.0, 6.0, 8.0),  # 1.75 is a tie that EVEN rounds up to 2; 3.5 is a tie that goes to 4
        ("MXFP4", 6.0, 6.0, 6.0, 6.0),
        ("MXFP8", 480.0, 480.0, 448.0, 448.0),  # 1.875 is an E4M3 mantissa, 480 is not an E4M3 value
        ("MXFP8", 500.0, 512.0, 448.0, 512.0),
        ("MXFP6_E3M2", 30.0, 32.0, 28.0, 32.0),  # 1.875 is a tie between 1.75 and 2
        ("MXFP6_E3M2", 29.0, 28.0, 28.0, 28.0),
        ("MXFP6_E2M3", 7.8, 8.0, 7.5, 8.0),
        ("MXFP6_E2M3", 7.6, 7.5, 7.5, 7.5),
    ],
)
def test_mx_exponent_conventions(name, amax, up, floor, even):
    """Round-up (ModelOpt, TransformerEngine) clips nothing; OCP's floor clips above max; torchao's EVEN in between."""
    assert _largest_of_block(amax, name) == up
    assert _largest_of_block(amax, f"{name}_OCP") == floor
    assert _largest_of_block(amax, f"{name}_TORCHAO_EVEN") == even


def test_ocp_floor_clips_two_fifths_of_gaussian_mxfp4_blocks_with_less_error():
    """NUMERICS.md's reason for the field: floor clips 42 % of Gaussian blocks, yet has the lower mean squared error.

    42 % = 1 - log2(1.5) is over weights of every standard deviation; at a given one it is 27 to 56 %.
    """
    deviation = torch.exp2(torch.arange(4096) / 4096).view(4096, 1)
    weight = torch.randn(4096, 512, generator=torch.Generator().manual_seed(5)) * deviation
    mantissa, _ = weight.view(4096, 16, 32).abs().amax(-1).frexp()
    clipped = (mantissa > 0.75).float().mean(1)
    assert abs(clipped.mean() - (1 - np.log2(1.5))) < 0.01
    assert 0.28 < clipped[:64].mean() < 0.32
    error = {
        name: (_fake_quantize(weight, format=FORMATS[name]) - weight) / deviation for name in ("MXFP4", "MXFP4_OCP")
    }
    assert error["MXFP4_OCP"].square().mean() < error["MXFP4"].square().mean()
