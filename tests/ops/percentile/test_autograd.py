"""The percentile over a group: every expert by itself, in any layout, and within torch.func."""

import pytest
import torch
from torch.func import grad, vmap

from fq_transforms.formats import FORMATS
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.percentile.autograd import percentile_amax
from fq_transforms.ops.percentile.reference import percentile_reference
from tests.cases import experts, name_of

FORMATS_TRIED = [FORMATS[name] for name in ("INT8", "FP8_PER_CHANNEL", "INT4_BLOCK32", "FP8_BLOCK", "NVFP4_STATIC")]
every_format = pytest.mark.parametrize("format", FORMATS_TRIED, ids=name_of)


@pytest.mark.parametrize("layout", ["separate", "stacked", "transposed"])
@every_format
def test_each_expert_by_itself(format, layout):
    """An expert's percentile comes from its own weight; no input is written."""
    weights = experts(4, (5, 64), torch.bfloat16)
    stored = {"stacked": [torch.stack(weights)], "transposed": [w.mT.contiguous() for w in weights]}.get(
        layout, weights
    )
    options = {"format": format, "transposed": layout == "transposed"}
    amax, _ = expert_amax(stored, **options)
    versions = [t._version for t in (*stored, amax)]
    found = percentile_amax(stored, amax, percentile=50.0, **options)
    assert [t._version for t in (*stored, amax)] == versions
    for e, weight in enumerate(weights):
        assert torch.equal(found[e], percentile_reference(weight, 50.0, format=format))


@every_format
def test_within_grad_and_not_within_vmap(format):
    """Under grad the percentile is a constant of the same value; vmap is refused in words."""
    weight = experts(1, (5, 64))[0]

    def percentile(w):
        return percentile_amax([w], expert_amax([w], format=format)[0], format=format, percentile=90.0)

    def loss(w):
        found = percentile(w)
        return (w * w).sum() + found.sum(), found

    gradient, found = grad(loss, has_aux=True)(weight)
    assert torch.equal(gradient, 2 * weight)
    assert torch.equal(found, percentile(weight))
    with pytest.raises(ValueError, match="vmap"):
        vmap(percentile)(weight[None])
