"""Sums of products of inputs are float64's, to the rounding of fp32 sums, and symmetric to the bit."""

import pytest
import torch

from fq_transforms.ops.hessian.launch import add_products
from tests.cases import DTYPES, name_of


def inputs(tokens, side, dtype, seed=0):
    """Channels over several powers of two, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, side, generator=generator) * 2.0 ** torch.randint(-4, 4, (side,), generator=generator)
    return (x * (torch.rand(tokens, side, generator=generator) > 0.1)).to(dtype)


def assert_sums(sums, before, x, experts):
    """What was there and the sum of x x^T of each expert's tokens, within T * 2**-24 of the sum of magnitudes.

    T products and what was there are T + 1 numbers, which fp32 adds in T additions, in any order; products of bf16 and
    fp16 are exact, and those of fp32 are rounded once each, or not at all. Symmetric to the bit if what was there is.
    """
    for e in range(len(sums)):
        own = x[experts == e].double()
        wanted = before[e].double() + own.T @ own
        size = before[e].double().abs() + own.abs().T @ own.abs()
        assert ((sums[e].double() - wanted).abs() <= (len(own) + 1) * 2.0**-24 * size).all(), e
        assert torch.equal(sums[e], sums[e].T), e
        if not len(own):
            assert torch.equal(sums[e], before[e]), e


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1), (40, 7), (200, 65)])
def test_equals_float64(shape, dtype):
    """Experts without tokens keep what they had; tokens of no expert are left out, whatever is in them."""
    x = inputs(*shape, dtype)
    experts = torch.randint(0, 6, shape[:1], generator=torch.Generator().manual_seed(1))
    experts[experts == 2] = 3  # of whom expert 2 has none, and none is of expert 5
    x[experts == 5] = torch.nan
    before = torch.randn(5, shape[1], shape[1])
    before = before + before.mT
    sums = before.clone()
    versions = x._version, experts._version
    add_products(sums, x, experts)
    assert_sums(sums, before, x, experts)
    assert (x._version, experts._version) == versions
    middle, x = sums.clone(), x.nan_to_num()
    add_products(sums, x, 4)
    assert_sums(sums, middle, x, torch.full(shape[:1], 4))


def test_no_tokens():
    """An empty batch adds nothing."""
    sums = torch.ones(3, 4, 4)
    add_products(sums, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    add_products(sums, torch.empty(0, 4), 1)
    assert torch.equal(sums, torch.ones(3, 4, 4))


def test_order_of_tokens():
    """Tokens sorted by expert or not: each expert's own come in the order in which they were, so bits are the same."""
    x = inputs(60, 9, torch.float32)
    experts = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(2))
    sums = [torch.zeros(4, 9, 9) for _ in range(2)]
    order = experts.argsort(stable=True)
    add_products(sums[0], x, experts)
    add_products(sums[1], x[order], experts[order])
    assert torch.equal(*sums)
