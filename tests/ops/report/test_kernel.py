"""The kernel of a report equals the reference: counts and maxima exactly, sums to the bound of their order."""

import math

import pytest
import torch

from fq_transforms.formats import FORMATS
from fq_transforms.ops.report.launch import report_triton
from tests.cases import ALL_FORMATS, ONE_OF_EACH_LEAF, name_of, shapes_of
from tests.measures import assert_measures_equal, references, state_of, wild
from tests.variants import CPU, on_each_kernel, variants

on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_format = pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)

# numpy, inside the interpreter: NaN in lanes that are selected away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@on_each_kernel(variants(ALL_FORMATS), variants(ALL_FORMATS))
def test_kernel_equals_reference(format, dtype, transposed, device):
    """Counts and maxima exactly, sums to the bound of their order; amax too small, so that all is counted."""
    seen = torch.zeros(3, dtype=torch.int64)
    is_wide = format in ONE_OF_EACH_LEAF and dtype == torch.float32 and not transposed
    for shape in shapes_of(format) if is_wide else shapes_of(format)[-1:]:
        weights = wild(4, shape, dtype, device)
        amax, global_amax = state_of(weights, format, 0.5)
        if amax is not None:
            amax[3] = 0.0 if global_amax is None else amax[3]
        if global_amax is not None:
            global_amax[3] = 0.0
        stored = [w.mT.contiguous() if transposed else w for w in weights]
        found = report_triton(stored, amax, global_amax, format=format, transposed=transposed)
        wanted = references(weights, amax, global_amax, format)
        assert_measures_equal(found, wanted, math.prod(shape))
        seen += torch.stack([wanted.clipped.sum(), wanted.zeroed.sum(), wanted.underflow.sum()]).cpu()
    assert seen[1] > 0
    assert seen[2] > 0 or format.scale != "e4m3"
    assert seen[0] > 0 or (format.scale == "e8m0" and format.exponent_rounding != "floor")


@on_each_device
@each_format
def test_kernel_equals_reference_at_the_edges(format, device):
    """Subnormals, the largest floats, NaN and infinity in a weight, against amax from tiny to huge."""
    special = torch.tensor([0.0, -0.0, 1e-45, 2.0**-126, -(2.0**-127), 3.3e38, -3.3e38, 1e-30, 0.3, -0.3])
    exponents = torch.tensor([-149, -126, -60, -24, -9, 0, 7, 60]).double()
    row = torch.cat([torch.arange(-59, 59) / 4, special])
    weight = (row.double() * 2.0 ** exponents[:, None]).clamp(-3.3e38, 3.3e38).float()
    broken = weight.clone()
    broken[2, 3], broken[3, 40] = torch.nan, -torch.inf
    amaxes = [0.0, 1e-45, 2.0**-25, 2.0**-24, 2.0**-23, 1.0, 448.0, 3.3e38]
    weights = [w.to(device) for w in [weight] * len(amaxes) + [broken]]
    scales = torch.tensor([*amaxes, 1.0], device=device)
    amax = global_amax = None
    if not format.is_stateless:
        shape = format.amax_shape(*weight.shape)
        amax = scales.reshape(-1, *(1,) * len(shape)).expand(len(scales), *shape).clone()
        global_amax = scales.flip(0).clone() if format.has_global_amax else None
    found = report_triton(weights, amax, global_amax, format=format, transposed=False)
    wanted = references(weights, amax, global_amax, format)
    assert_measures_equal(found, wanted, weight.numel())
    assert wanted.largest[-1].isnan()
    assert not wanted.noise[-1].isfinite()


@on_each_device
def test_kernel_is_repeatable_and_writes_nothing_else(device):
    """The same bits from every run, and from experts that share an allocation or do not; the inputs are not touched."""
    format = FORMATS["NVFP4"]
    weights = wild(5, (11, 384), device=device)
    stacked = torch.stack(weights)
    amax, _ = state_of(weights, format)
    versions = [w._version for w in weights]
    runs = [
        report_triton(tensors, amax, None, format=format, transposed=False) for tensors in (weights, weights, [stacked])
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert versions == [w._version for w in weights]
