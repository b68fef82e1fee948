"""Amax within torch.func. Its vmap is tested beside that of fake quantization."""

import torch
from torch.func import grad, jvp, vjp

from fq_transforms.formats import NVFP4_STATIC
from fq_transforms.ops.amax.autograd import expert_amax
from tests.cases import ALL_FORMATS


def test_amax_is_not_differentiable():
    """Calibration inside a loss is a constant: no gradient, no error."""
    weight = torch.randn(4, 32, requires_grad=True)
    amax, _ = expert_amax([weight], format=ALL_FORMATS[0])
    assert not amax.requires_grad
    gradient = grad(lambda w: (w * expert_amax([w], format=ALL_FORMATS[0])[0]).sum())(weight.detach())
    assert torch.equal(gradient, amax.expand(4, 32))


def test_no_tangent_and_no_gradient_under_a_transform():
    """Under vjp and jvp amax and global amax are constants: nothing flows through them, and nothing raises."""
    weight = torch.randn(4, 32)

    def scaled(w):
        amax, global_amax = expert_amax([w], format=NVFP4_STATIC)
        return w * amax.amax() + global_amax

    factor = expert_amax([weight], format=NVFP4_STATIC)[0].amax()
    _, pullback = vjp(scaled, weight)
    assert torch.equal(pullback(torch.ones(4, 32))[0], factor.expand(4, 32))
    _, tangent = jvp(scaled, (weight,), (torch.ones(4, 32),))
    assert torch.equal(tangent, factor.expand(4, 32))
