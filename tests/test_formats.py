"""Formats are numbers: what a format may be, and that every format that may be is right in the kernels."""

import json
import pickle
import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from fq_transforms import formats
from fq_transforms.formats import (
    E0M7,
    E2M1,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    MXINT8,
    MXINT8_OCP,
    NVFP4,
    FloatElement,
    Format,
    IntElement,
)
from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.pack.reference import pack_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import assert_names, experts, message_of, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.variants import by_kernel

DEVICE = "cuda" if HAS_GPU else "cpu"

MX = {"element": E4M3, "block": (1, 32), "scale": "e8m0", "dynamic": True}

REFUSED = {
    "a number of columns alone": {"element": E4M3, "block": 128},
    "columns without rows": {"element": E4M3, "block": (None, 128)},
    "rows without columns": {"element": E4M3, "block": (64, None)},
    "no power of two": {"element": E4M3, "block": (1, 24)},
    "too wide": {"element": E4M3, "block": (1, 4096)},
    "empty": {"element": E4M3, "block": (1, 0)},
    "integers under a power of two": {
        "element": IntElement(7, -8, 7),
        "block": (1, 32),
        "scale": "e8m0",
        "dynamic": True,
    },
    "E3M2 under two levels": {"element": E3M2, "block": (1, 16), "scale": "e4m3"},
    "two levels per channel": {"element": E2M1, "block": (1, None), "scale": "e4m3"},
    "an element without exponent under a power of two, beyond 2": {**MX, "element": FloatElement(0, 7, 2.0)},
    "a max below one under a power of two": {**MX, "element": FloatElement(0, 3, 0.75)},
    "E0M7 with EVEN": {**MX, "element": E0M7, "exponent_rounding": "even"},
    "a static power of two": {"element": E4M3, "block": (1, 32), "scale": "e8m0"},
    "a dynamic fp32 scale": {"element": E4M3, "block": (1, 32), "dynamic": True},
    "sixteen bits": {"element": IntElement(32767, -32768, 32767), "block": (None, None)},
    "an element of nine exponent bits": {"element": FloatElement(9, 3, 448.0), "block": (None, None)},
    "an element without exponent": {"element": FloatElement(0, 3, 1.0), "block": (None, None)},
    "an infinite element": {"element": FloatElement(4, 3, float("inf")), "block": (None, None)},
    "an unknown scale": {"element": E4M3, "block": (None, None), "scale": "fp16"},
    "an unknown rounding": {
        "element": E4M3,
        "block": (1, 32),
        "scale": "e8m0",
        "dynamic": True,
        "exponent_rounding": "near",
    },
}


@pytest.mark.parametrize("numbers", REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_is_right_for_is_refused(numbers):
    """A format that would read or write out of bounds, or whose rounding is unproven, cannot be made."""
    with pytest.raises(ValueError, match="format 'X': found .*, wanted "):
        Format("X", **numbers)


# Words of the table in the module's docstring, and what they stand for.
ELEMENTS = {
    "integers of at most 8 bits": [IntElement(127, -128, 127), IntElement(3, -4, 3), IntElement(7.5, -8, 7)],
    "floats with an exponent": [E2M1, E4M3, FloatElement(1, 0, 2.0), FloatElement(8, 7, 2.0**127)],
    "E2M1": [E2M1],
    "floats, E0M7 for integers": [E2M1, E4M3, FloatElement(1, 0, 2.0), FloatElement(8, 7, 2.0**127), E0M7],
}
ALONG_IN = [(1, 1), (1, 16), (1, 2048)]
BLOCKS = {"along in": ALONG_IN, "any": [(None, None), (1, None), (128, 128), (2, 1), *ALONG_IN]}


def is_made(numbers):
    try:
        Format("X", **numbers)
    except ValueError:
        return False
    return True


def test_the_table_says_what_goes_together():
    """The docstring's table is what the constructor takes: each element, scale, block, dynamic and dequantize."""
    lines = [re.split(r" {2,}", line.strip()) for line in (formats.__doc__ or "").splitlines() if line[:4] == "    "]
    assert lines[0] == ["scale", "element", "block", "dynamic", "dequantize"]
    told = {
        (scale, element, block, dynamic, dequantize)
        for scale, elements, blocks, dynamics, orders in lines[1:]
        for element in ELEMENTS[elements]
        for block in BLOCKS[blocks]
        for dynamic in (word == "True" for word in dynamics.split(", "))
        for dequantize in orders.split(", ")
    }
    keys = ("scale", "element", "block", "dynamic", "dequantize")
    elements = dict.fromkeys(element for of in ELEMENTS.values() for element in of)
    every = product(("fp32", "e4m3", "e8m0"), elements, BLOCKS["any"], (False, True), ("multiply", "divide"))
    assert {case for case in every if is_made(dict(zip(keys, case, strict=True)))} == told


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("_", [pytest.param("", marks=[pytest.mark.gpu] if HAS_GPU else [])])
def test_mxint8_is_the_integers_of_ocp(_):
    """Every code: 64 times the value, 2's complement without -128, under 2**e; E8M0 is the exponent and 127.

    By the text of OCP 1.0 alone: 5.3.4, INT8 of an implied scale 2**-6; 6.3, e = floor(log2(amax)) where it is OCP's,
    else the smallest power that clips nothing, as in ModelOpt 0.47's ceil(log2(amax / 127)) for integers.
    """
    k = torch.arange(-127, 128, dtype=torch.float32)
    for format, top in ((MXINT8, 127.0), (MXINT8_OCP, 64.0)):
        for power in (-130, -126, -20, 0, 9, 126):
            # Each block has a weight that sets its exponent, and 31 others: all codes, ties between, and beside them.
            inside = torch.cat([k, k[:-1] + 0.5, k[1:-1] + 0.501])
            inside = torch.nn.functional.pad(inside[inside.abs() <= top], (0, 31))
            rows = inside[: len(inside) // 31 * 31].view(-1, 31)
            steps = torch.cat([torch.full((len(rows), 1), top), rows], dim=1)
            x = (steps.double() * 2.0 ** (power - 6)).float()[None]
            codes, scale, _ = pack_reference(x, None, None, format=format)
            exact = x.double() / 2.0 ** (power - 6)
            e = max(power, -127)
            wanted = (exact * 2.0 ** (power - e)).round().clamp(-127, 127)
            assert torch.equal(codes.double(), wanted)
            assert (scale == e + 127).all()
            y = fake_quantize_reference(x, None, None, format=format, out_dtype=torch.float32)
            assert torch.equal(y.double(), wanted * 2.0 ** (e - 6))
    # The largest subnormal that 2**-127 holds, and the next one.
    bits = torch.tensor([0x7F0000, 0x7F0001, 0x7E0001, 1, 0x7FFFFF], dtype=torch.int32, device=DEVICE)
    ends = bits.view(torch.float32)[:, None] * torch.linspace(1, -1, 32, device=DEVICE)
    _, scale, _ = pack_reference(ends, None, None, format=MXINT8)
    assert scale[:, 0].tolist() == [0, 1, 0, 0, 1]
    for format in (MXINT8, MXINT8_OCP):
        options = {"format": format, "out_dtype": torch.float32}
        found = by_kernel([ends], None, None, transposed=False, **options)[0]
        assert same_bits(found, fake_quantize_reference(ends, None, None, **options))
    beyond = torch.tensor([[127.7, -127.7, 126.6, -0.2] + [0.0] * 28]) / 64
    for format, wanted, scale in ((MXINT8, [64, -64, 63, 0], 128), (MXINT8_OCP, [127, -127, 127, 0], 127)):
        codes, e, _ = pack_reference(beyond, None, None, format=format)
        assert (codes[0, :4].tolist(), e.item()) == (wanted, scale)


ADMITTED = [
    replace(FORMATS["FP8"], name="FP8_E5M2", element=E5M2),
    replace(FORMATS["FP8_BLOCK"], name="FP8_BLOCK_64x32", block=(64, 32)),
    replace(FORMATS["FP8_BLOCK"], name="FP8_BLOCK_2x256", block=(2, 256)),
    replace(FORMATS["FP8_BLOCK"], name="FP8_BLOCK_2x1", block=(2, 1)),
    replace(FORMATS["INT4_BLOCK32"], name="INT4_BLOCK256", block=(1, 256)),
    replace(FORMATS["INT4_BLOCK32"], name="INT4_BLOCK1", block=(1, 1)),
    replace(FORMATS["INT4_BLOCK32"], name="INT3_BLOCK64", element=IntElement(3, -4, 3), block=(1, 64)),
    replace(FORMATS["MXFP8"], name="MXFP8_E5M2_BLOCK16", element=E5M2, block=(1, 16)),
    replace(NVFP4, name="NVFP4_BLOCK32", block=(1, 32)),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter, in lanes that are selected away
@pytest.mark.parametrize("format", ADMITTED, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("_", [pytest.param("", marks=[pytest.mark.gpu] if HAS_GPU else [])])
def test_a_new_constant_is_all_that_a_new_format_needs(format, transposed, _):
    """Blocks and elements that no constant has are right in amax and forward, without a line of code."""
    shape = (18, max(12, 3 * (format.block[1] or 16)))
    weights = experts(2, shape, device=DEVICE)
    stored = [w.mT.contiguous() if transposed else w for w in weights]
    amax = global_amax = None
    if not format.is_stateless:
        amax, global_amax = expert_amax_triton(stored, format=format, transposed=transposed)
        wanted = torch.stack([expert_amax_reference(w, format=format)[0] for w in weights])
        assert same_bits(amax, wanted)
    options = {"format": format, "out_dtype": torch.float32}
    found = by_kernel(stored, amax, global_amax, transposed=transposed, **options)
    for expert, weight in enumerate(weights):
        leaf = None if amax is None else amax[expert]
        result = found[expert].mT if transposed else found[expert]
        assert same_bits(result, fake_quantize_reference(weight, leaf, None, **options))


def test_a_name_that_is_no_format_has_a_nearest_one():
    """`FORMATS` is a dict like any other, to JSON, copies and `get`, but for what it says of a missing name."""
    for name, meant in (("NVFP5", "NVFP4"), ("mxfp4", "MXFP4"), (4, "")):
        assert_names(message_of(KeyError, FORMATS.__getitem__, name), repr(name), "did you mean", meant)
    assert "NVFP5" not in FORMATS
    assert FORMATS.get("NVFP5") is None
    assert dict(FORMATS) == FORMATS == pickle.loads(pickle.dumps(FORMATS))
    assert json.loads(json.dumps({name: f.to_dict() for name, f in FORMATS.items()})).keys() == FORMATS.keys()


@pytest.mark.parametrize("format", FORMATS.values(), ids=name_of)
def test_json_round_trip(format):
    """All of a format's numbers survive JSON, and equal numbers are equal formats."""
    assert Format.from_dict(format.to_dict()) == format
    assert hash(replace(format)) == hash(format)
