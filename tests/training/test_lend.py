"""Layers that are one node of the graph: their parameters hold the fake numbers while they compute, and only then."""

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from tests.cases import ALL_FORMATS, assert_names, name_of
from tests.training.test_layerwise import (
    EXPERTS,
    FFN,
    GROUP,
    HIDDEN,
    Grouped,
    assert_equal,
    assert_untouched,
    grads_of,
    setup,
    whole,
)

SEEN = []  # what the weights are when they are computed with


class _Node(torch.autograd.Function):
    """As Transformer Engine's GroupedLinear: one node, which saves the weights as they are."""

    @staticmethod
    def forward(ctx, x, *weights):
        SEEN.append(weights[0].detach().clone())
        if torch.isnan(x).any():
            raise ArithmeticError("forward")
        ctx.save_for_backward(x, *weights)
        return torch.cat([part @ w.mT for part, w in zip(x.chunk(EXPERTS), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        SEEN.append(weights[0].detach().clone())
        if torch.isnan(grad).any():
            raise ArithmeticError("backward")
        parts = list(zip(grad.chunk(EXPERTS), x.chunk(EXPERTS), weights, strict=True))
        return torch.cat([g @ w for g, _, w in parts]), *[g.mT @ part for g, part, _ in parts]


class OneNode(Grouped):
    def forward(self, x):
        return _Node.apply(x, *[getattr(self, f"weight{i}") for i in range(EXPERTS)])


class OneNodeMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = OneNode(FFN, HIDDEN), OneNode(HIDDEN, FFN)

    def forward(self, x):
        return self.linear_fc2(torch.relu(self.linear_fc1(x)))


def lends(module):
    return isinstance(module, OneNode)


def lent(model, fq, state, x, **options):
    with fqt.layerwise(model, state, spec=fq.spec, backward=fq.backward, lends=lends, **options):
        loss = model(x)
        loss.backward()
    return loss.detach(), grads_of(model)


def numbers_of(model):
    return {name: (param.data_ptr(), param.detach().clone()) for name, param in model.named_parameters()}


def assert_own(model, before):
    """Each parameter is where it was, and what it was."""
    for name, (address, numbers) in before.items():
        param = model.get_parameter(name)
        assert param.data_ptr() == address
        assert torch.equal(param, numbers)


@pytest.mark.parametrize("format", ALL_FORMATS[:13], ids=name_of)
def test_numbers_of_the_whole_model_form(format):
    """Loss and every gradient, bit for bit, and nothing left behind."""
    model, fq, state, x = setup(OneNodeMLP, format, torch.bfloat16)
    before, ids = numbers_of(model), {name: id(param) for name, param in model.named_parameters()}
    wanted = whole(model, fq, state, x)
    SEEN.clear()
    assert_equal(lent(model, fq, state, x), wanted)
    assert_own(model, before)
    assert_untouched(model, ids)
    fakes = fq.fakequant(dict(model.named_parameters()), state)
    firsts = [fakes[f"mlp.{layer}.linear_{fc}.weight0"] for layer in (0, 1) for fc in ("fc1", "fc2")]
    assert len(SEEN) == 8
    for seen, fake in zip(SEEN, firsts + firsts[::-1], strict=True):
        assert torch.equal(seen, fake)


def test_memory(books):
    """One group's fake weights at a time."""
    model, fq, state, x = setup(OneNodeMLP)
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        loss = model(x)
        assert (books.now, books.most, books.calls) == (0, GROUP, 4)
        books.most = 0
        loss.backward()
        assert (books.now, books.most, books.calls) == (0, GROUP, 8)


def test_twice_through_one_graph():
    model, fq, state, x = setup(OneNodeMLP)
    wanted = whole(model, fq, state, x)[1]
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        loss = model(x)
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert not [name for name, grad in grads_of(model).items() if not torch.equal(grad, wanted[name])]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(reentrant):
    """Forward is run again within backward, and the non-reentrant kind even within the node's own backward."""
    model, fq, state, x = setup(OneNodeMLP, checkpointed=reentrant)
    before = numbers_of(model)
    x.requires_grad_()
    found = lent(model, fq, state, x)
    assert_own(model, before)
    model.checkpointed = None
    assert_equal(found, whole(model, fq, state, x))


def test_checkpointed_layer_alone():
    """Nothing but the node is saved, so its own backward asks for the forward."""
    torch.manual_seed(0)
    model = OneNode(FFN, HIDDEN)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
    state, x = fq.calibrate(params), torch.randn(8 * EXPERTS, HIDDEN)
    before = numbers_of(model)
    grads = []
    for checkpointed in (False, True):
        with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
            leaf = x.clone().requires_grad_()
            out = torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=False) if checkpointed else model(leaf)
            out.square().sum().backward()
        assert_own(model, before)
        grads.append([leaf.grad, *grads_of(model).values()])
    assert all(map(torch.equal, *grads))


def test_parameters_are_their_own_between():
    """Hooks on gradients, and whoever looks between the layers, see the parameters' own numbers."""
    model, fq, state, x = setup(OneNodeMLP)
    before = numbers_of(model)
    seen = []

    def look(_):
        assert_own(model, before)
        seen.append(1)

    for param in model.parameters():
        param.register_hook(look)
        param.register_post_accumulate_grad_hook(look)
    model.mlp[0].linear_fc1.register_forward_pre_hook(lambda *_: assert_own(model, before))
    model.mlp[1].register_forward_hook(lambda *_: assert_own(model, before))
    lent(model, fq, state, x)
    assert len(seen) == 2 * len(before)


def test_frozen_weights_and_no_gradient(books):
    model, fq, state, x = setup(OneNodeMLP)
    for name, param in model.named_parameters():
        param.requires_grad_("mlp" not in name)
    wanted = whole(model, fq, state, x)
    found = lent(model, fq, state, x)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1] if "dense" in name)
    books.calls = 0
    with torch.no_grad(), fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        assert torch.equal(model(x), wanted[0])
    assert books.calls == 4


def test_a_failed_forward_leaves_nothing():
    model, fq, state, x = setup(OneNodeMLP)
    before = numbers_of(model)
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        with pytest.raises(ArithmeticError, match="forward"):
            model(x * torch.nan)
        assert_own(model, before)
        model(x).backward()
    found = grads_of(model)
    wanted = whole(model, fq, state, x)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_failed_backward_leaves_nothing():
    """Whoever comes next takes the numbers back: another forward, of the model or the layer, or the end."""
    model, fq, state, x = setup(OneNodeMLP)
    before = numbers_of(model)
    wanted = whole(model, fq, state, x)
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="backward"):
                (model(x) * torch.nan).backward()
            model.zero_grad()
            loss = model(x)
            assert_own(model, before)
        loss.backward()
        assert_equal((loss.detach(), grads_of(model)), wanted)
        with pytest.raises(ArithmeticError, match="backward"):
            (model(x) * torch.nan).backward()
    assert_own(model, before)
    with pytest.raises(ArithmeticError), fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        (model(x) * torch.nan).backward()
    assert_own(model, before)


def test_backward_outside_is_refused():
    model, fq, state, x = setup(OneNodeMLP)
    before = numbers_of(model)
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        loss = model(x)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert_names(str(error.value), "OneNode", "within")
    assert_own(model, before)


def test_parameters_that_changed_are_refused():
    model, fq, state, x = setup(OneNodeMLP)
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        loss = model(x)
        with torch.no_grad():
            model.mlp[1].linear_fc2.weight1.mul_(2)
        with pytest.raises(RuntimeError) as error:
            loss.backward()
    assert_names(str(error.value), "mlp.1.linear_fc2", "changed in place")


def test_layers_of_several_nodes_are_refused():
    """Whoever says that a layer is one node is checked."""
    model, fq, state, x = setup()
    before = numbers_of(model)
    with pytest.raises(ValueError) as error, fqt.layerwise(model, state, spec=fq.spec, lends=lambda module: True):
        model(x)
    assert_names(str(error.value), "Grouped", "CatBackward0", "one node")
    assert_own(model, before)


def test_weights_that_cannot_hold_other_numbers_are_exchanged():
    """Results of other operations, gradients that are not the identity's, another dtype, torch.func."""
    model, fq, state, x = setup(OneNodeMLP)
    params = dict(model.named_parameters())
    computed = {name: param * 1.0 for name, param in params.items()}
    with fqt.layerwise(model, state, spec=fq.spec, lends=lends):
        loss = functional_call(model, computed, (x,))
        loss.backward()
    assert_equal((loss.detach(), grads_of(model)), whole(model, fq, state, x))

    master = fqt.transform(fq.spec, out_dtype=torch.bfloat16)
    for layer in model.dense:
        layer.to(torch.bfloat16)
    wanted = whole(model, master, state, x.bfloat16())
    assert_equal(lent(model, fq, state, x.bfloat16(), out_dtype=torch.bfloat16), wanted)

    with fqt.layerwise(model, state, spec=fq.spec, out_dtype=torch.bfloat16, lends=lends, recompute=False):
        loss = model(x.bfloat16())
    loss.backward()  # kept: nothing to make again, so it may be outside
    assert_equal((loss.detach(), grads_of(model)), wanted)

    clipped = setup(OneNodeMLP, fqt.INT8, backward="clip")
    assert_equal(lent(*clipped), whole(*clipped))
