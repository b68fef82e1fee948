"""GPTQ's inner loop against a loop over single weights in float64, and the numbers of `fake_quantize_reference`."""

import numpy as np
import pytest
import torch

from fq_transforms.formats import FORMATS
from fq_transforms.ops.gptq.reference import block_amax, gptq_block_reference, on_grid_of
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests import oracle
from tests.cases import ALL_FORMATS, experts, name_of, same_bits
from tests.variants import amax_of

ALLOWED = [format for format in ALL_FORMATS if not format.dynamic or format.is_stateless]
MX = [format for format in ALLOWED if format.is_stateless]


def scales_of(weight, format):
    """What the loop takes of a whole weight [E, out, in]: amax and global amax."""
    if format.is_stateless:
        return block_amax(weight, format), None
    return amax_of(list(weight), format)


def factors(count, width, seed=0):
    """R_ij / R_jj above the diagonal, NaN on and below it, where nothing is to be read."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(count, width, width, generator=generator) * 0.4
    return torch.where(torch.ones(width, width).triu(1) > 0, factor, torch.nan)


def by_rows(target, weight, factor, quantized):
    """The formula, weight by weight in float64: errors [out, k]."""
    rows, width = target.shape
    errors = np.zeros((rows, width))
    for r in range(rows):
        t = target[r].astype(np.float64)
        for j in range(width):
            errors[r, j] = float(weight[r, j]) - quantized(r, j, t[j])
            for i in range(j + 1, width):
                t[i] += errors[r, j] * float(factor[j, i])
    return errors


def quantizer(weight, amax, global_amax, format):
    """The value of one weight under the scales of its place, by the oracle of formats."""
    weight = weight.numpy()
    if format.is_stateless:
        spread = oracle.spread(oracle.granule_amax(weight, format), weight.shape, format)
        power = np.ldexp(1.0, oracle.exponent(spread, format.element, format.exponent_rounding))
        return lambda r, j, x: float(oracle.nearest(format.element, x / power[r, j]) * power[r, j])
    amax, global_amax = amax.numpy(), None if global_amax is None else global_amax.numpy()

    def quantized(r, j, x):
        whole = np.zeros_like(weight)
        whole[r, j] = x
        return float(oracle.fake_quantize(whole, amax, global_amax, format)[r, j])

    return quantized


@pytest.mark.parametrize("format", ALLOWED, ids=name_of)
def test_equals_a_loop_in_float64(format):
    """Each weight after those before it. Of rows of which no weight lies within fp32's errors of two values, all do.

    Errors are fp32: within 2**-20 of the largest number that a row of so few columns has.
    """
    side = format.block[1] if format.has_blocks_along_in else 12
    weight = torch.stack(experts(2, (3, side)))
    target = weight + 0.1 * torch.randn(weight.shape) * weight.abs().amax((1, 2), keepdim=True)
    amax, global_amax = scales_of(weight, format)
    factor, columns = factors(2, side) / side**0.5, torch.arange(side).expand(2, -1)
    found = gptq_block_reference(target, weight, factor, amax, global_amax, columns, format=format)
    rows = 0
    for e in range(2):
        scales = (None, None) if format.is_stateless else (amax[e], None if global_amax is None else global_amax[e])
        wanted = by_rows(target[e].numpy(), weight[e], factor[e], quantizer(weight[e], *scales, format))
        largest = np.abs(wanted).max(1) + weight[e].abs().amax(1).numpy()
        rows += (np.abs(found[e].numpy() - wanted).max(1) <= 2.0**-20 * largest).sum()
    assert rows >= 5  # of six; in one a weight may fall to the other side


@pytest.mark.parametrize("format", ALLOWED, ids=name_of)
def test_without_correlation_it_is_rounding(format):
    """Law: a factor of zeros gives w - fake_quantize(w) to the bit, whatever the order of the columns."""
    side = format.block[1] if format.has_blocks_along_in else 37
    weight = torch.stack(experts(3, (5, side)))
    amax, global_amax = scales_of(weight, format)
    columns = torch.stack([torch.randperm(side) for _ in range(3)])
    taken = weight.gather(2, columns[:, None].expand(weight.shape))
    zeros = torch.zeros(3, side, side)
    versions = [t._version for t in (taken, zeros, amax, columns)]
    found = gptq_block_reference(taken, taken, zeros, amax, global_amax, columns, format=format)
    assert [t._version for t in (taken, zeros, amax, columns)] == versions
    for e in range(3):
        scales = (None, None) if format.is_stateless else (amax[e], None if global_amax is None else global_amax[e])
        fake = fake_quantize_reference(weight[e], *scales, format=format, out_dtype=torch.float32)
        assert torch.equal(found[e], (weight[e] - fake)[:, columns[e]])


@pytest.mark.parametrize("format", MX, ids=name_of)
def test_amax_of_mx_blocks(format):
    """Law: under the exponents of the weight itself `on_grid_of` is `fake_quantize`; NaN makes its own block NaN."""
    weight = torch.stack(experts(2, (4, 96)))
    assert torch.equal(block_amax(weight, format), weight.abs().unflatten(-1, (3, 32)).amax(-1))
    fake = fake_quantize_reference(weight, None, None, format=format, out_dtype=torch.float32)
    assert same_bits(on_grid_of(weight, weight, format), fake)
    assert same_bits(on_grid_of(weight, fake * (1 + 2.0**-20), format), fake)
    for bad in (torch.nan, torch.inf):
        weight[0, 1, 40] = bad
        assert block_amax(weight, format).isnan().nonzero().tolist() == [[0, 1, 1]]


def test_columns_find_their_own_scales():
    """Bug to be: blocks found by the place in the order, not in the weight. Each block has a scale of its own."""
    format = FORMATS["INT4_BLOCK32"]
    weight = torch.ones(1, 2, 96)
    amax = torch.tensor([[[7.0, 14.0, 28.0], [56.0, 112.0, 224.0]]])
    columns = torch.tensor([[70, 3, 40]])
    taken = weight[..., columns[0]] * 3.0
    found = gptq_block_reference(taken, taken, torch.zeros(1, 3, 3), amax, None, columns, format=format)
    assert torch.equal(taken - found, torch.tensor([[[4.0, 3.0, 4.0], [0.0, 0.0, 0.0]]]))
