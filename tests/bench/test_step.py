"""The benchmark of steps times ways that give the same gradients."""

from functools import partial

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench import step
from fq_transforms.bench.step import WARM_UPS, WAYS, Rounds, _Given, _measure, _steps, _ways, page
from tests.training.test_layerwise import EXPERTS, HIDDEN, GroupedMLP


@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4], ids=["FP8", "NVFP4"])
def test_every_way_has_the_same_gradients(format):
    """Gradients of the parameters, over all microbatches, and of the inputs."""
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
    for name, way in _ways(fq, model, state, run).items():
        model.zero_grad()
        of_inputs.clear()
        way()
        found[name] = [param.grad.clone() for param in params.values()] + list(of_inputs)
    make = partial(fqt.value_and_grad, loss, fq, model, keep=True)
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


def test_rounds_of_all_passes_are_pooled(monkeypatch):
    """Each ratio is over the two of bf16 beside it; what is shown is the median of all rounds."""
    calls = {name: lambda name=name: name for name in ("bf16", *WAYS)}
    plain, theirs = calls.pop("bf16"), calls.pop("ModelOpt")
    slower = {"every": 2.0, "once": 3.0, "kept": 4.0, "recompute": 5.0, "whole": 6.0, "ModelOpt": 7.0}
    order, passes = [], [1.0, 10.0, 10.0]

    def timed(call, models):
        """bf16 becomes slower from call to call, by as much each time, and all others in one pass."""
        order.append(call())
        return len(order) * slower.get(order[-1], 1.0) * (passes[0] if order[-1] in slower else 1.0), 2**20

    monkeypatch.setattr(step, "_timed", timed)
    row = {"kind": "layer", "format": "FP8"}
    for number in range(3):
        peer = (lambda: (torch.nn.Linear(1, 1), theirs)) if number == 0 else None
        _measure(row, torch.nn.Linear(1, 1), calls, plain, peer, Rounds(4, 2, 2))
        passes.pop(0)
    rounds = row["rounds"]
    assert {name: len(found) for name, found in rounds.items()} == {
        "every": 24,
        "once": 24,
        "kept": 6,
        "recompute": 6,
        "whole": 6,
        "ModelOpt": 2,
        "bf16": 12 * 5 + (6 * 3 + 2) * 2,
    }
    assert rounds["every"] == pytest.approx([2.0] * 8 + [20.0] * 16)
    assert [row[name] for name in WAYS] == pytest.approx([20.0, 30.0, 40.0, 50.0, 60.0, 7.0])
    warm_up = ["bf16", *["every"] * WARM_UPS, *["once"] * WARM_UPS, "kept", "recompute", "whole", "ModelOpt"]
    assert order[: len(warm_up)] == warm_up
    turn = ["bf16", "every", "bf16", "once"]
    assert order[len(warm_up) :][:12] == [*turn, *turn, "bf16", "bf16", "kept", "bf16"]
    assert "| layer | FP8 |" in page({"date": "today"}, [row])
