"""Percentiles of abs(w) in each granule are those of torch in float64, rounded once; numpy's to the last bit."""

import numpy as np
import pytest
import torch

from fq_transforms.formats import FORMATS, Format
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.percentile.reference import percentile_reference
from tests.cases import DTYPES, STATIC_FORMATS, experts, name_of, same_bits

PERCENTILES = [1e-9, 25.0, 50.0, 99.0, 99.9, 99.99, 100.0]
FORMATS_TRIED = [*STATIC_FORMATS, Format("INT8_SQUARE", FORMATS["INT8"].element, (4, 8))]


def shapes_of(format):
    return [(3, 256)] if format.has_blocks_along_in else [(1, 1), (11, 37)]


def granules_of(weight, format):
    """The weights of each granule, and its place in the amax."""
    rows, columns = (side or extent for side, extent in zip(format.block, weight.shape, strict=True))
    shape = format.amax_shape(*weight.shape)
    for i in range(0, weight.shape[0], rows):
        for j in range(0, weight.shape[1], columns):
            yield (i // rows, j // columns)[: len(shape)], weight[i : i + rows, j : j + columns]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS_TRIED, ids=name_of)
def test_equals_numpy_and_torch(format, dtype):
    """Law: granule by granule `torch.quantile` of float64, ragged edges too.

    `numpy.quantile` interpolates in another order, so the last bit of float64, and of fp32 on a tie, may be another.
    """
    for shape in shapes_of(format):
        weight = experts(3, shape, dtype)[1]
        for percentile in PERCENTILES:
            found = percentile_reference(weight, percentile, format=format)
            assert found.shape == format.amax_shape(*shape)
            assert found.dtype == torch.float32
            for place, granule in granules_of(weight, format):
                values = granule.abs().double().flatten()
                assert found[place].item() == torch.quantile(values, percentile / 100).float().item()
                numpys = np.float32(np.quantile(values.numpy(), percentile / 100))
                assert abs(found[place].numpy().view(np.int32) - numpys.view(np.int32)) <= 1


@pytest.mark.parametrize("format", FORMATS_TRIED, ids=name_of)
def test_the_hundredth_is_max(format):
    """Law: 100 is max, bit for bit, and lower percentiles are never above it; a NaN stays in its granule."""
    weight = experts(3, shapes_of(format)[-1])[2]
    amax, _ = expert_amax_reference(weight, format=format)
    assert same_bits(percentile_reference(weight, 100.0, format=format), amax)
    assert (percentile_reference(weight, 90.0, format=format) <= amax).all()
    weight[0, 0] = torch.nan
    found = percentile_reference(weight, 100.0, format=format)
    assert found.isnan().sum() == 1
    assert found.flatten()[0].isnan()


def test_more_weights_than_torch_takes():
    """fp32 positions would be off by weights beyond 2**24 values, which `torch.quantile` refuses up to PyTorch 2.13."""
    values = torch.arange(2**24 + 2**10, dtype=torch.int32)
    weight = (values / 2**25).view(2**10, -1)  # exact in fp32
    found = percentile_reference(weight, 99.9, format=FORMATS["FP8"])
    assert found.item() == np.float32((values.numel() - 1) * 0.999 / 2**25)
