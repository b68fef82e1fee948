"""Weights for reports, their measures by the reference, and how exactly two measures agree."""

import math

import torch

from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.report.reference import Measures, report_reference
from tests.cases import experts, same_bits


def state_of(weights, format, factor=1.0):
    """Leaves of a group, [E, ...] and [E] or None; those that a static format keeps are scaled by `factor`."""
    if format.is_stateless:
        return None, None
    amax, largest = zip(*(expert_amax_reference(w, format=format) for w in weights), strict=True)
    amax = torch.stack(amax) * factor
    return amax, torch.stack(largest) * factor if format.has_global_amax else None


def wild(count, shape, dtype=torch.float32, device="cpu"):
    """Experts whose rows and blocks differ by many powers of two, so that scales underflow; each with some outliers."""
    generator = torch.Generator().manual_seed(3)
    weights = []
    for weight in experts(count, shape):
        spread = torch.randint(-24, 1, (shape[0], -(-shape[1] // 16)), generator=generator).float().exp2()
        spread[:, ::3] = 1.0
        uneven = weight * spread.repeat_interleave(16, 1)[:, : shape[1]]
        weights.append(uneven.to(dtype).to(device))
    return weights


def assert_close_sum(found, wanted, terms):
    """Equal to the bound of two sums of the same exact terms in any order: 2 n 2**-53, relative."""
    if math.isfinite(wanted):
        assert abs(found - wanted) <= 2 * terms * 2.0**-53 * wanted, (found, wanted)
    else:
        assert str(found) == str(wanted)


def assert_measures_equal(found, wanted, terms):
    for field in ("clipped", "zeroed", "underflow"):
        assert getattr(found, field).dtype == torch.int64
        assert torch.equal(getattr(found, field).cpu(), getattr(wanted, field).cpu()), field
    assert same_bits(found.largest.cpu(), wanted.largest.cpu())
    for field in ("signal", "noise"):
        sums = getattr(found, field)
        assert sums.dtype == torch.float64
        for a, b in zip(sums.tolist(), getattr(wanted, field).tolist(), strict=True):
            assert_close_sum(a, b, terms)


def references(weights, amax, global_amax, format):
    """`report_reference` of each expert, [E] each."""
    each = [
        report_reference(w, *(None if leaf is None else leaf[i] for leaf in (amax, global_amax)), format=format)
        for i, w in enumerate(weights)
    ]
    return Measures(*(torch.stack(column) for column in zip(*each, strict=True)))
