"""The benchmark of the sweep: its arithmetic floor is below what the kernel issues, and its page states both floors."""

import pytest

import fq_transforms as fqt
from fq_transforms.bench.cases import SHAPES
from fq_transforms.bench.mse import FORMATS, arithmetic_floor_us, instructions_of, page
from tests.ahead import MOST_SWEEP_INSTRUCTIONS
from tests.cases import name_of


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_the_floor_is_below_the_kernels_own_count(format):
    """The compiled loop, which tests/ahead.py counts, has these instructions per weight and at most a fifth more."""
    (most,) = (most for name, most in MOST_SWEEP_INSTRUCTIONS.items() if format.name.startswith(name))
    assert instructions_of(format) < most < 1.2 * instructions_of(format)


def test_the_floor_by_hand():
    """2 * 1856 * 2688 weights of one SM of 128 lanes at 1 MHz: a microsecond for 128 instructions."""
    shape = SHAPES[0]._replace(experts=2)
    weights = 2 * 1856 * 2688
    found = arithmetic_floor_us(fqt.INT8, shape, 5, processors=1, clock_mhz=1.0)
    assert found == weights * 5 * 11 / 128
    weighted = arithmetic_floor_us(fqt.INT8, shape, 5, processors=2, clock_mhz=10.0, weighted=True)
    assert weighted == weights * 5 * 12 / 128 / 20
    local = arithmetic_floor_us(fqt.INT4_BLOCK32, shape, 5, processors=1, clock_mhz=1.0, local=True)
    assert local == weights * 5 * (11 + 2 * 32 + 1) / 128


def test_the_page_names_what_is_above_the_limit():
    """Ratios are to the larger floor, both are printed, and a row above three times it says so."""
    row = {
        "format": "FP8",
        "shape": "32 x [1856, 2688]",
        "tried": 22,
        "instructions": 10,
        "us": 3500.0,
        "with_max_us": 3600.0,
        "bytes_us": 80.0,
        "arithmetic_us": 1050.0,
        "ratio": 3500 / 1050,
        "processors": 132,
        "clock_mhz": 1980.0,
    }
    text = page({"date": "today", "gpu": "H200"}, [row, row | {"format": "INT8", "us": 2000.0, "ratio": 2000 / 1050}])
    assert "| FP8 | 32 x [1856, 2688] | 22 | 3500 | 3600 | 80 | 1050 | 3.33 (above the limit) |" in text
    assert "| INT8 | 32 x [1856, 2688] | 22 | 2000 | 3600 | 80 | 1050 | 1.90 |" in text
    assert "132 SMs at 1980 MHz" in text
