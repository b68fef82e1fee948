"""What a report measures by its definition, against loops over single weights and against `pack`."""

import math

import pytest
import torch

from fq_transforms.formats import FORMATS, FloatElement, IntElement
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.ops.report import reference as reporting
from fq_transforms.ops.report.reference import half_step_beyond, histogram_reference, report_reference
from tests.cases import ALL_FORMATS, experts, name_of, shapes_of
from tests.measures import assert_measures_equal, references, state_of, wild

each_format = pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)


@each_format
def test_zeroed_and_sums_are_those_of_fakequant(format):
    """What is measured is what `fakequant(out_dtype=torch.float32)` gives, in exact rational arithmetic's bound."""
    from fractions import Fraction

    shape = shapes_of(format)[-1]
    (weight,) = wild(1, shape)
    amax, global_amax = (None if leaf is None else leaf[0] for leaf in state_of([weight], format, 0.7))
    found = report_reference(weight, amax, global_amax, format=format)
    y = fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=torch.float32)
    assert found.zeroed == ((weight != 0) & (y == 0)).sum()
    assert found.largest == weight.abs().max()
    for field, values in (("signal", weight), ("noise", weight - y)):
        exact = sum((Fraction(v) ** 2 for v in values.flatten().tolist()), Fraction(0))
        assert abs(Fraction(getattr(found, field).item()) - exact) <= exact * weight.numel() / 2**53, field


STATIC = [f for f in ALL_FORMATS if f.clips and f.scale == "fp32"]


@pytest.mark.parametrize("format", STATIC, ids=name_of)
def test_clipped_begins_half_a_step_beyond_the_end(format):
    """At amax, and up to half a step beyond the largest value, nothing is clipped; just beyond that it is."""
    element = format.element
    lowest, highest = half_step_beyond(format)
    if isinstance(element, IntElement):
        assert (lowest, highest) == (element.low - 0.5, element.high + 0.5)
        top = element.qmax
    else:
        top = element.max
    columns = 128
    amax = torch.full(format.amax_shape(1, columns), top)  # so the scale is 1, and a weight is its own v
    for value, is_clipped in [
        (top, False),
        (-top, False),
        (highest, False),
        (math.nextafter(highest, math.inf), None),
        (highest * (1 + 1e-6), True),
        (lowest * (1 + 1e-6), True),
        (highest * 100, True),
        (lowest, False),
    ]:
        weight = torch.zeros(1, columns)
        weight[0, 5] = value
        if is_clipped is not None:
            assert report_reference(weight, amax, None, format=format).clipped == is_clipped, value
    # The error there is half a step, and that of a step further is more.
    weight = torch.zeros(1, columns)
    weight[0, 5] = highest
    y = fake_quantize_reference(weight, amax, None, format=format, out_dtype=torch.float32)
    step = 2 * (highest - (element.high if isinstance(element, IntElement) else element.max))
    assert weight[0, 5] - y[0, 5] == step / 2
    assert isinstance(element, (IntElement, FloatElement))


def test_a_fresh_state_clips_nothing():
    """No format clips under its own amax, but MX whose exponents are not rounded up.

    EVEN leaves at most half a step, but where the largest value is not the last of its binade, as 448 of E4M3.
    """
    for format in ALL_FORMATS:
        weights = experts(3, shapes_of(format)[-1])
        amax, global_amax = state_of(weights, format)
        clipped = references(weights, amax, global_amax, format).clipped.sum()
        is_down = format.exponent_rounding == "floor" or format.name == "MXFP8_TORCHAO_EVEN"
        assert (clipped > 0) == is_down, format.name


def test_underflow_counts_the_stored_scales():
    """NVFP4: E4M3 scales of zero, subnormals and the floor, by hand; a zero block is none."""
    wanted = 6 * 448.0  # an amax under which the expert's scale is 1, and a block's is its amax / 6
    blocks = torch.zeros(6, 16)
    for row, scale in enumerate([2.0**-6, 2.0**-7, 2.0**-9, 2.0**-12, 0.0, 448.0]):
        blocks[row, 3] = 6 * scale
    for name, underflow in (
        ("NVFP4", 3),
        ("NVFP4_TRANSFORMER_ENGINE", 3),
        ("NVFP4_TORCHAO", 4),  # its floor is 2**-6, and that counts
        ("NVFP4_MODELOPT", 3),
    ):
        found = report_reference(blocks, torch.tensor(wanted), None, format=FORMATS[name])
        assert found.underflow == underflow, name
    # ModelOpt's replacement of small scales, under a small amax.
    found = report_reference(blocks * 1e-8, torch.tensor(wanted * 1e-8), None, format=FORMATS["NVFP4_MODELOPT"])
    assert found.underflow == 5
    assert found.zeroed == 5
    # E8M0: an amax that would want an exponent under -127.
    tiny = torch.full((2, 32), 2.0**-130)
    tiny[1] = 1.0
    assert report_reference(tiny, None, None, format=FORMATS["MXFP8"]).underflow == 1
    # fp32: an amax that the formulas give up.
    amax = torch.tensor([[0.0], [2.0**-25], [2.0**-24], [1.0]])
    for name, underflow in (("INT8_PER_CHANNEL", 1), ("FP8_PER_CHANNEL", 2)):
        assert report_reference(torch.ones(4, 32), amax, None, format=FORMATS[name]).underflow == underflow


@pytest.mark.parametrize("format", [f for f in ALL_FORMATS if f.block[0] != 128] + [FORMATS["FP8_BLOCK"]], ids=name_of)
def test_chunks_of_rows_change_nothing(format, monkeypatch):
    """In bounded memory: a few rows at a time, whole granules of them, give what all rows at once give."""
    shape = shapes_of(format)[-1]
    weights = wild(2, shape)
    amax, global_amax = state_of(weights, format, 0.6)
    whole = references(weights, amax, global_amax, format)
    whole_bins = histogram_reference(
        weights[0], *(None if leaf is None else leaf[0] for leaf in (amax, global_amax)), format=format
    )
    monkeypatch.setattr(reporting, "WEIGHTS_AT_A_TIME", 2 * shape[1])
    assert_measures_equal(references(weights, amax, global_amax, format), whole, math.prod(shape))
    bins = histogram_reference(
        weights[0], *(None if leaf is None else leaf[0] for leaf in (amax, global_amax)), format=format
    )
    assert all(torch.equal(a, b) for a, b in zip(bins, whole_bins, strict=True))


@each_format
def test_histogram_counts_each_weight_once(format):
    """Every weight that has a scale is in one bin; those beyond the end of the axis are in the outer ones."""
    shape = shapes_of(format)[-1]
    (weight,) = experts(1, shape)
    amax, global_amax = (None if leaf is None else leaf[0] for leaf in state_of([weight], format, 0.1))
    edges, counts = histogram_reference(weight, amax, global_amax, format=format)
    assert len(edges) == len(counts) + 1
    assert counts.sum() <= weight.numel()
    # A block of zeros has no scale under E4M3 scales, and amax * 0.1 leaves all others one.
    if format.scale != "e4m3":
        assert counts.sum() == weight.numel()
    if format.clips and format.scale == "fp32":
        assert counts[0] > 0
        assert counts[-1] > 0
