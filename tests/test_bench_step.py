"""The benchmark of steps times ways that do the same: their gradients are equal."""

from functools import partial

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench.step import WAYS, _Given, _steps, _ways
from tests.test_layerwise import EXPERTS, HIDDEN, GroupedMLP


@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4], ids=["FP8", "NVFP4"])
def test_every_way_has_the_same_gradients(format):
    """Of all microbatches together, and those of the inputs."""
    model = GroupedMLP()
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state = fq.calibrate(params)
    xs = [torch.randn(2 * EXPERTS, HIDDEN) for _ in range(3)]
    grad = torch.randn_like(xs[0])
    of_inputs: list[torch.Tensor] = []

    def loss(forward, x):
        leaf = x.detach().requires_grad_()
        leaf.register_hook(of_inputs.append)
        return _Given.apply(forward(leaf), grad)

    def run(forward):
        for x in xs:
            loss(forward, x).backward()

    found = {}
    for name, way in _ways(model, fq, state, run).items():
        model.zero_grad()
        of_inputs.clear()
        way()
        found[name] = [param.grad.clone() for param in params.values()] + list(of_inputs)
    make = partial(fqt.value_and_grad, loss, model, fq, keep=True)
    every, once = _steps(make, params, state, xs).values()
    of_inputs.clear()
    found["every"] = [*every(), *of_inputs]
    of_inputs.clear()
    found["once"] = [*once()[1].values(), *of_inputs]
    assert found.keys() == WAYS.keys() - {"ModelOpt"}
    for name, gradients in found.items():
        assert all(map(torch.equal, gradients, found["whole"])), name


def test_the_given_loss_is_the_gradient_given():
    x, grad = torch.randn(3, requires_grad=True), torch.randn(3)
    loss = _Given.apply(x * 1, grad)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(x.grad, grad)
