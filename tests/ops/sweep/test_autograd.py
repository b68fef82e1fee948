"""The sweep over a group: every expert by itself, in any layout, and within torch.func."""

import pytest
import torch
from torch.func import grad, vmap

from fq_transforms.formats import FORMATS
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.sweep.autograd import swept_amax
from fq_transforms.ops.sweep.reference import Search, sweep_reference
from tests.cases import experts, name_of

FORMATS_TRIED = [FORMATS[name] for name in ("INT8", "FP8_PER_CHANNEL", "INT4_BLOCK32", "FP8_BLOCK", "NVFP4_STATIC")]
every_format = pytest.mark.parametrize("format", FORMATS_TRIED, ids=name_of)


def search_of(format):
    return Search("window") if format.scale == "e4m3" else Search("ratios", (0.6, 0.8, 0.9))


def leaf(tensor, e):
    return None if tensor is None else tensor[e]


@pytest.mark.parametrize("layout", ["separate", "stacked", "transposed"])
@every_format
def test_each_expert_by_itself(format, layout):
    """An expert's amax comes from its own weight, amax, global amax and importance; no input is written."""
    weights = experts(4, (5, 64), torch.bfloat16)
    stored = {"stacked": [torch.stack(weights)], "transposed": [w.mT.contiguous() for w in weights]}.get(
        layout, weights
    )
    options = {"format": format, "transposed": layout == "transposed"}
    amax, global_amax = expert_amax(stored, **options)
    importance = torch.rand(4, 64) * torch.tensor([[2.0**-140], [1.0], [7.0], [3e38]])
    versions = [t._version for t in (*stored, amax, importance)]
    found = swept_amax(stored, amax, global_amax, importance, search=search_of(format), **options)
    assert [t._version for t in (*stored, amax, importance)] == versions
    for e, weight in enumerate(weights):
        h = importance[e].double()
        h = (h / 2.0 ** torch.frexp(h.max()).exponent.item()).float()
        wanted = sweep_reference(weight, amax[e], leaf(global_amax, e), h, format=format, search=search_of(format))
        assert torch.equal(found[e], wanted)


@every_format
def test_within_grad_and_not_within_vmap(format):
    """Under grad the search is a constant of the same value; vmap is refused in words."""
    weight = experts(1, (5, 64))[0]
    wanted = swept_amax([weight], *expert_amax([weight], format=format), None, format=format, search=search_of(format))

    def loss(w):
        found = swept_amax([w], *expert_amax([w], format=format), None, format=format, search=search_of(format))
        assert found.shape == wanted.shape
        return (w * w).sum() + found.sum(), found

    gradient, found = grad(loss, has_aux=True)(weight)
    assert torch.equal(gradient, 2 * weight)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="vmap"):
        vmap(
            lambda w: swept_amax([w], *expert_amax([w], format=format), None, format=format, search=search_of(format))
        )(weight[None])
