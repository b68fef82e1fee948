"""Formats are numbers: what a format may be, and that every format that may be is right in the kernels."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

from fq_transforms.formats import E2M1, E3M2, E4M3, E5M2, FORMATS, NVFP4, FloatElement, Format, IntElement
from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import assert_names, experts, message_of, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.variants import by_kernel

DEVICE = "cuda" if HAS_GPU else "cpu"

MX = {"element": E4M3, "block": (1, 32), "scale": "e8m0", "dynamic": True}

REFUSED = {
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
