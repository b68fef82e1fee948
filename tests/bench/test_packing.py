"""The benchmark of packing: each row is checked before it is timed; its page has formats by shapes."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench import packing
from fq_transforms.bench.cases import Shape, check_same
from fq_transforms.ops.amax.autograd import expert_amax
from tests.cases import assert_names


@pytest.mark.gpu
def test_measured_rows_are_times():
    weights = list(torch.randn(4, 256, 512, device="cuda").bfloat16())
    amax, global_amax = expert_amax(weights, format=fqt.NVFP4)
    us, floor = packing.measure(Shape(4, 256, 512, ""), fqt.NVFP4, weights, amax, global_amax, 1.0)
    assert us > 0
    read_and_written = 4 * (256 * 512 * (2 + 0.5 + 1 / 16) + 4 + 4)
    assert floor == pytest.approx(read_and_written / (4 * 256 * 512 * 4))


def test_what_differs_is_not_timed():
    with pytest.raises(SystemExit) as error:
        check_same(torch.tensor([1, 2]), torch.tensor([1, 3]), "pack, NVFP4")
    assert_names(str(error.value), "pack, NVFP4", "1 of 2")


def test_page():
    rows = [
        {"shape": "2 x [4, 8]", "copy_us": 3.0, "FP8": 0.97, "FP8_us": 2.5, "NVFP4": 0.9, "NVFP4_us": 2.0},
        {"shape": "1 x [4, 4]", "copy_us": 1.0, "FP8": 1.0, "FP8_us": 0.8},
    ]
    page = packing.page({"gpu": "none", "date": "2026-11-24"}, rows)
    assert_names(
        page, "|  | 2 x [4, 8] | 1 x [4, 4] |", "| FP8 | 0.970 (2.5) | 1.000 (0.8) |", "| NVFP4 | 0.900 (2.0) |  |"
    )
