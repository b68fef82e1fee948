"""The amax of every granule by its definition, against loops over granules in numpy."""

from math import prod

import numpy as np
import pytest
import torch

from fq_transforms.ops.amax.reference import expert_amax_reference
from tests.cases import ALL_FORMATS, DTYPES, experts, name_of, same_bits, shapes_of

STATEFUL = [format for format in ALL_FORMATS if not format.is_stateless]
LEADING = [(), (5,), (2, 3), (0,), (1, 1, 2)]


@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_amax_of_every_granule(format, dtype):
    """Law: amax is the exact maximum of each granule of each expert; odd shapes, ragged edges, any leading dims."""
    for shape in shapes_of(format):
        for leading in LEADING:
            count = prod(leading)
            flat = experts(count, shape, dtype)
            weight = torch.stack(flat).view(*leading, *shape) if count else torch.empty(*leading, *shape, dtype=dtype)
            amax, global_amax = expert_amax_reference(weight, format=format)
            assert amax.dtype == torch.float32
            assert amax.shape == (*leading, *format.amax_shape(*shape))
            x = [expert.double().numpy() for expert in flat]
            of_expert = np.array([np.abs(expert).max() for expert in x]).reshape(leading)
            if format.amax_shape(*shape) == ():
                assert np.array_equal(amax.double().numpy(), of_expert)
            else:
                of_granule = np.zeros((count, *format.amax_shape(*shape)))
                rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
                for e, i, j in np.ndindex(of_granule.shape):
                    of_granule[e, i, j] = np.abs(x[e][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).max()
                assert np.array_equal(amax.double().numpy(), of_granule.reshape(amax.shape))
            if format.scale == "e4m3" and not format.dynamic:
                assert global_amax.dtype == torch.float32
                assert global_amax.shape == leading
                assert np.array_equal(global_amax.double().numpy(), of_expert)
            else:
                assert global_amax is None


@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_amax_keeps_nan_and_infinity_in_their_granule(format, dtype):
    """Law: NaN wins its granule, over infinity too; infinity wins over numbers; no other granule or expert changes."""
    shape = (3, 256) if format.has_blocks_along_in else (130, 259)
    clean = torch.stack(experts(4, shape, dtype))
    weight = clean.clone()
    weight[1, -1, -1] = torch.nan  # the last granule, ragged where the format's blocks are square
    weight[1, -1, -2] = torch.inf
    weight[2, 0, 0] = -torch.inf
    expected, expected_global = expert_amax_reference(clean, format=format)
    granule = (-1, -1) if expected.ndim == 3 else ()
    expected[(1, *granule)] = torch.nan
    expected[(2, *((0, 0) if granule else ()))] = torch.inf
    amax, global_amax = expert_amax_reference(weight, format=format)
    assert same_bits(amax, expected)
    if expected_global is not None:
        expected_global[1], expected_global[2] = torch.nan, torch.inf
        assert same_bits(global_amax, expected_global)
