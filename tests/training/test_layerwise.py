"""`layerwise`: the numbers of the whole-model form, one layer's fake weights at a time, and nothing left behind."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from tests.cases import assert_names
from tests.training.ways import (
    EXPERTS,
    FFN,
    HIDDEN,
    GroupedMLP,
    Lists,
    Model,
    Stacked,
    assert_equal,
    assert_untouched,
    by_layer,
    functional,
    grads_of,
    numbers_of,
    setup,
)

KINDS = [Lists, GroupedMLP, Stacked]


GROUP = EXPERTS * FFN * HIDDEN * 4  # bytes of one group's fake weights


@pytest.mark.parametrize(
    ("kind", "in_forward", "in_backward"),
    [(Lists, 2 * GROUP, GROUP // EXPERTS), (GroupedMLP, GROUP, GROUP), (Stacked, 2 * GROUP, GROUP)],
)
def test_fake_weights_are_not_kept(books, kind, in_forward, in_backward):
    """None outlives its layer's forward, nor its use in backward. Without recompute all of them wait for backward."""
    model, fq, state, x = setup(kind, kind)
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        assert (books.now, books.most, books.calls) == (0, in_forward, 4)
        books.most = 0
        loss.backward()
    del loss
    assert (books.now, books.most) == (0, in_backward)

    books.most = 0
    with fqt.layerwise(fq, model, state, recompute=False):
        loss = model(x)
        assert books.now == 4 * GROUP
        loss.backward()
    del loss
    assert (books.now, books.most) == (0, 4 * GROUP)


def test_no_gradient_no_hooks(books):
    model, fq, state, x = setup()
    with torch.no_grad(), fqt.layerwise(fq, model, state):
        loss = model(x)
    assert (books.now, books.most, books.calls) == (0, GROUP, 4)
    assert torch.equal(loss, functional(model, fq, state, x)[0])


def test_frozen_weights(books):
    """Weights without a gradient are saved by their layer too, for the gradient of its input."""
    model, fq, state, x = setup()
    for name, param in model.named_parameters():
        param.requires_grad_("mlp" not in name)
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        assert books.now == 0
        loss.backward()
    found = grads_of(model)
    wanted = functional(model, fq, state, x)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in found if "dense" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_through_one_graph(kind):
    """retain_graph: the second backward makes the fake weights again, as the first did."""
    model, fq, state, x = setup(kind, kind)
    wanted = functional(model, fq, state, x)[1]
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert not [name for name, grad in grads_of(model).items() if not torch.equal(grad, wanted[name])]


def test_two_launches_per_group_through_one_graph(books):
    """Weights of one module are made again together, once a backward."""
    model, fq, state, x = setup()
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        for backwards in (1, 2):
            loss.backward(retain_graph=True)
            assert books.calls == 4 + 4 * backwards


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations(books, kind, reentrant):
    """A layer whose activations are made again is run again with fake weights, and keeps none in between."""
    model, fq, state, x = setup(kind, kind, checkpointed=reentrant)
    x.requires_grad_()
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        assert books.now == 0
        loss.backward()
    found = loss.detach(), grads_of(model)
    del loss
    assert books.now == 0
    model.checkpointed = None
    assert_equal(found, functional(model, fq, state, x))


def test_checkpoint_outside_is_another_gradient():
    """Why backward belongs inside, as the docstring says: outside, the layer is run again with its own weights."""
    model, fq, state, x = setup(format=fqt.INT4_BLOCK32, checkpointed=False)
    x.requires_grad_()
    with fqt.layerwise(fq, model, state):
        loss = model(x)
    loss.backward()
    outside = grads_of(model)
    inside = by_layer(model, fq, state, x)[1]
    assert any(not torch.equal(outside[name], inside[name]) for name in inside)


def test_inside_functional_call():
    """What is quantized is what the layer has when it runs."""
    model, fq, state, x = setup()
    params = {name: param.detach().mul(1.25).requires_grad_() for name, param in model.named_parameters()}
    state = fq.calibrate(params)
    with fqt.layerwise(fq, model, state):
        loss = functional_call(model, params, (x,))
        loss.backward()
    wanted_loss = functional_call(model, fq.fakequant(params, state), (x,))
    wanted = torch.autograd.grad(wanted_loss, list(params.values()))
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params.values(), wanted, strict=True))


def test_under_torch_func():
    """recompute=False composes with torch.func.grad; recompute says why it does not."""
    model, fq, state, x = setup()
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params, recompute):
        with fqt.layerwise(fq, model, state, recompute=recompute):
            return functional_call(model, params, (x,))

    found = torch.func.grad(loss)(params, False)
    wanted = functional(model, fq, state, x)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="recompute=False"):
        torch.func.grad(loss)(params, True)


def test_other_hooks_on_saved_tensors_decide():
    """save_on_cpu and the like are not gone round: inside them nothing is made again, and the numbers are the same."""
    model, fq, state, x = setup()
    wanted = functional(model, fq, state, x)
    packed = []
    with (
        fqt.layerwise(fq, model, state),
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t),
    ):
        loss = model(x)
        loss.backward()
    assert_equal((loss.detach(), grads_of(model)), wanted)
    assert torch.Size([HIDDEN, FFN]) in packed


def test_dense_weights_within_a_site():
    """A layer within another's site has hooks of its own, and each keeps none of its own fake weights."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Lists().experts
            self.gate = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

        def forward(self, x):
            return Lists.forward(self, torch.relu(self.gate(x)))

    model, fq, state, x = setup(Both, Both)
    assert len(fq.spec.groups) == 6
    assert_equal(by_layer(model, fq, state, x), functional(model, fq, state, x))


def test_faults_name_the_parameter():
    model, fq, state, x = setup()
    before = numbers_of(model)

    # An exception within the layer.
    with pytest.raises(RuntimeError, match="shape|size"), fqt.layerwise(fq, model, state):
        model(x[:, :3])
    assert_untouched(model, before)

    # Weights changed between forward and backward.
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        with torch.no_grad():
            model.mlp[0].linear_fc2.weight1.mul_(2)
        before = numbers_of(model)
        with pytest.raises(RuntimeError) as error:
            loss.backward()
    assert_names(str(error.value), "mlp.0.linear_fc2.weight*", "changed in place")
    assert_untouched(model, before)

    # Amax changed likewise.
    model.zero_grad()
    with fqt.layerwise(fq, model, state):
        loss = model(x)
        state["mlp.1.linear_fc1.weight*"]["amax"].mul_(2)
        with pytest.raises(RuntimeError) as error:
            loss.backward()
    assert_names(str(error.value), "mlp.1.linear_fc1.weight*")

    # A spec of another model; a state of another spec.
    other = Model(Lists, Lists)
    with pytest.raises(KeyError) as error, fqt.layerwise(fq, other, state):
        pass
    assert_names(error.value.args[0], "mlp.0.linear_fc1.weight0", "Model")
    with pytest.raises(KeyError, match="linear_fc1"), fqt.layerwise(fq, model, {}):
        pass
    lsq = replace(fq, backward="lsq")
    with pytest.raises(ValueError, match=r"backward: found 'lsq'.*fakequant"), fqt.layerwise(lsq, model, state):
        pass

    # An invalid amax: the quantizer's own error, from within the layer's hook.
    bad = {key: {name: leaf * torch.nan for name, leaf in group.items()} for key, group in state.items()}
    with pytest.raises(ValueError, match="amax"), fqt.layerwise(fq, model, bad):
        model(x)
    assert_untouched(model, before)

    # `inspect` sees each module before its weights are replaced, and may refuse.
    seen = []
    with fqt.layerwise(fq, model, state, inspect=seen.append):
        model(x)
    assert seen == [m for mlp in model.mlp for m in (mlp.linear_fc1, mlp.linear_fc2)]


def test_a_layer_that_never_runs_is_named():
    """Weights that another module reads would be silently unquantized."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = (torch.nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))

        def forward(self, x):
            return torch.nn.functional.linear(self.used(x), self.read.weight)

    model = Reader()
    fq = fqt.transform(fqt.select(dict(model.named_parameters()), {"*": fqt.INT8}))
    state = fq.calibrate(dict(model.named_parameters()))
    with pytest.raises(ValueError) as error, fqt.layerwise(fq, model, state):
        model(torch.ones(2, HIDDEN))
    assert_names(str(error.value), "read.weight", "Linear", "outside the forward of its layer")
    with pytest.raises(ValueError) as error, fqt.layerwise(fq, model, state):
        model.used(torch.ones(2, HIDDEN))
    assert_names(str(error.value), "read.weight", "Linear", "never ran", "1 of 2")


def only_layer(module, rules="*"):
    """A model of one layer, its transform and its state."""
    model = torch.nn.Sequential(module)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {rules: fqt.INT8}))
    return model, fq, fq.calibrate(params)


def test_weights_in_a_parameter_list():
    """A ParameterList never runs: the module above it is the layer."""

    class Listed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.randn(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x):
            return sum(x @ weight for weight in self.weights)

    model, fq, state = only_layer(Listed())
    x = torch.ones(2, HIDDEN)
    with torch.no_grad(), fqt.layerwise(fq, model, state):
        found = model(x)
    with torch.no_grad():
        assert torch.equal(found, functional_call(model, fq.fakequant(dict(model.named_parameters()), state), (x,)))


def test_the_only_layer_never_runs():
    """Also where no other selected layer ran, but the model did."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.read = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

        def forward(self, x):
            return x @ self.read.weight

    model, fq, state = only_layer(Reader())
    with pytest.raises(ValueError, match="0.read.weight"), fqt.layerwise(fq, model, state):
        model(torch.ones(2, HIDDEN))


def test_a_state_made_under_inference_mode():
    model, fq, _, x = setup()
    with torch.inference_mode():
        state = fq.calibrate(dict(model.named_parameters()))
    usual = {key: {name: leaf.clone() for name, leaf in group.items()} for key, group in state.items()}
    assert_equal(by_layer(model, fq, state, x), functional(model, fq, usual, x))


def test_a_layer_that_gives_its_weight():
    """What is given to the outside keeps its memory, though the weight carries `main_grad`."""

    class Giver(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), self.weight

    model, fq, state = only_layer(Giver(HIDDEN, HIDDEN, bias=False))
    model[0].weight.main_grad = torch.zeros(HIDDEN, HIDDEN)
    with fqt.layerwise(fq, model, state):
        _, weight = model(torch.ones(2, HIDDEN))
    (wanted,) = fq.fakequant(dict(model.named_parameters()), state).values()
    assert torch.equal(weight, wanted)


def test_megatrons_own_fused_accumulation_is_refused():
    """Its layer tells the weight that it saved of what it added, and one that is made again is another."""
    model, fq, state = only_layer(torch.nn.Linear(HIDDEN, HIDDEN, bias=False))
    model[0].weight.main_grad = torch.zeros(HIDDEN, HIDDEN)
    model[0].gradient_accumulation_fusion = True
    with pytest.raises(ValueError) as error, fqt.layerwise(fq, model, state):
        model(torch.ones(2, HIDDEN))
    assert_names(str(error.value), "0.weight", "gradient_accumulation_fusion", "recompute=False")
    with fqt.layerwise(fq, model, state, recompute=False):
        model(torch.ones(2, HIDDEN))


def test_a_layer_within_itself():
    """A refusal in an inner call leaves the outer one with its fake weights, and then everything as it was."""

    class Nested(torch.nn.Linear):
        def forward(self, x, deep=False):
            if deep:
                return super().forward(x)
            first = super().forward(x)
            with pytest.raises(ValueError, match="no deeper"):
                self(x, deep=True)
            return first, super().forward(x)

    model, fq, state = only_layer(Nested(HIDDEN, HIDDEN, bias=False))
    calls = []

    def refuse(module):
        calls.append(module)
        if len(calls) > 1:
            raise ValueError("no deeper")

    with fqt.layerwise(fq, model, state, inspect=refuse):
        first, second = model(torch.ones(2, HIDDEN))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(2, HIDDEN) @ model[0].weight.mT)


class Rescaled(torch.nn.Module):
    """A layer that puts other numbers into its weight before it computes, and saves that."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        self.weight.data = self.weight.data * 2
        return x * self.weight * self.weight


def test_a_layer_that_replaces_its_data():
    """What is saved are the numbers that it computed with, not the fake weight's."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, x = Rescaled(), torch.ones(4, 4, requires_grad=True)
        params = dict(model.named_parameters())
        fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        with fqt.layerwise(fq, model, fq.calibrate(params), recompute=recompute):
            model(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


class Bytes(torch.autograd.Function):
    """Saves a part of its weight's bytes, as another dtype."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight.view(torch.uint8)[1:])
        return x + weight.sum()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        assert saved.dtype == torch.uint8
        return grad, grad.sum().expand(4, 4)


class SavesBytes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return Bytes.apply(x, self.weight)


def test_a_view_in_another_dtype_is_saved_as_it_is():
    model, x = SavesBytes(), torch.ones(4, requires_grad=True)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    with fqt.layerwise(fq, model, fq.calibrate(params)):
        model(x).sum().backward()
    assert model.weight.grad is not None


def test_a_container_without_forward_is_no_layer():
    """Nothing runs that has all of these experts below it."""
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))})
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    entering = fqt.layerwise(fq, model, fq.calibrate(params))
    with pytest.raises(ValueError, match="ModuleDict, which has no forward"), entering:
        pass


def test_inspect_sees_the_modules_below():
    """Experts that are modules of their own are asked too."""
    model, fq, state, x = setup(Lists, Lists)
    seen = []
    with fqt.layerwise(fq, model, state, inspect=seen.append):
        model(x)
    assert [module for module in seen if isinstance(module, torch.nn.Linear)] == [
        expert[w] for mlp in model.mlp for w in ("w1", "w2") for expert in mlp.experts
    ]
