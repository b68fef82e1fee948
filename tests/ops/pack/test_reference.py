"""The reference: what is unpacked is what was fake-quantized, and its size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fq_transforms.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FloatElement, IntElement
from fq_transforms.ops.pack.reference import _values as element_values
from fq_transforms.ops.pack.reference import code_bits, codes_of, pack_reference, unpack_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference, round_to
from tests.cases import DTYPES, experts, name_of, same_bits
from tests.ops.pack.cases import PACKABLE, amax_of

BYTES = {4: 0.5, 6: 0.75, 8: 1.0}


def assert_law(weight, amax, global_amax, format):
    wanted = fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=weight.dtype)
    packed = pack_reference(weight, amax, global_amax, format=format)
    found = unpack_reference(*packed, format=format, out_dtype=weight.dtype)
    assert torch.equal(found.nan_to_num(7e4), wanted.nan_to_num(7e4))
    assert torch.equal(found.isnan(), wanted.isnan())
    if packed[0].dtype != torch.int8 and not isinstance(format.element, IntElement):  # integers have one zero
        assert torch.equal(found.signbit(), wanted.signbit())
    return packed


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_the_law(format, dtype):
    """unpack(pack(w)) is fakequant(w) to the last bit: magnitudes, zero blocks, zero experts, amax that clips."""
    for scale in (2.0**-40, 1e-9, 1e-4, 1.0, 1e3):
        for share in (1.0, 0.6, 0.0):
            # A square block needs its rows; elsewhere fewer tell as much.
            rows = 128 if format.block[0] == 128 else 32
            weight = torch.stack(experts(4, (rows, 256), torch.float32)).mul(scale).to(dtype)
            weight[0, 0, :80], weight[1], weight[2, :, 64:] = 0, 0, 0
            assert_law(weight, *amax_of(weight, format, share), format)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(PACKABLE),
    exponents=st.lists(st.integers(-140, 120), min_size=8, max_size=8),
    out=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_law_on_any_magnitudes(format, exponents, out, seed):
    """Weights from the smallest fp32 to the largest side by side, any number of rows; under any amax, NaN too."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor(exponents, dtype=torch.float32).exp2().repeat_interleave(16).repeat(2)
    weight = torch.randn(2, out, 256, generator=generator) * powers
    amax, global_amax = amax_of(weight, format)
    assert_law(weight, amax, global_amax, format)
    if amax is not None:
        drawn = amax.flatten()
        drawn[torch.randint(len(drawn), (1,), generator=generator)] = torch.tensor([torch.nan, 0.0, -1.0, 2.0])[
            seed % 4
        ]
        assert_law(weight, drawn.view(amax.shape), global_amax, format)


@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_size(format):
    """4, 6 or 8 bits per weight, and one scale per granule; every code of the element is used by what needs it."""
    weight = torch.randn(3, 128, 256)
    codes, scale, global_scale = pack_reference(weight, *amax_of(weight, format), format=format)
    bits = code_bits(format)
    assert codes.nbytes == weight.numel() * BYTES[bits]
    shape = () if format.block == (None, None) else format.granules(128, 256)
    assert scale.shape == (3, *shape)
    assert (global_scale is None) == (format.scale != "e4m3")


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2, FloatElement(3, 0, 16.0)], ids=str)
def test_codes_stand_for_the_rounded_numbers(element):
    """`codes_of` is `round_to` in codes: every bf16 number, and each tie with its neighbours in fp32; signs as well."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    values = element_values(element, torch.device("cpu"))
    values = values[values.isfinite() & (values.abs() <= element.max)].unique()
    ties = (values[1:] + values[:-1]) / 2
    beside = [ties.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([every[~every.isnan()], values, ties, *beside])
    codes, wanted = codes_of(x, element), round_to(x, element)
    found = codes.float() if codes.is_floating_point() else element_values(element, x.device)[codes.long()]
    assert same_bits(found, wanted)
