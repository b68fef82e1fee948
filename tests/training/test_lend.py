"""Layers that are one node of the graph: their parameters hold the fake numbers while they compute, and only then."""

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from tests.cases import assert_names
from tests.training.ways import (
    EXPERTS,
    FFN,
    HIDDEN,
    SEEN,
    OneNode,
    OneNodeMLP,
    assert_equal,
    assert_own,
    by_layer,
    functional,
    grads_of,
    lends,
    numbers_of,
    setup,
)

GROUP = EXPERTS * FFN * HIDDEN * 4  # bytes of one group's fake weights


def lending(fq, model, state, **options):
    return fqt.layerwise(fq, model, state, lends=lends, **options)


def lent(model, fq, state, x, **options):
    return by_layer(model, fq, state, x, lends=lends, **options)


def test_the_parameters_hold_the_fake_numbers_in_forward_and_backward():
    """What the node sees of its own parameters; test_all_ways.py compares what it makes of them."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP, dtype=torch.bfloat16)
    SEEN.clear()
    lent(model, fq, state, x)
    fakes = fq.fakequant(dict(model.named_parameters()), state)
    firsts = [fakes[f"mlp.{layer}.linear_{fc}.weight0"] for layer in (0, 1) for fc in ("fc1", "fc2")]
    assert len(SEEN) == 8
    for seen, fake in zip(SEEN, firsts + firsts[::-1], strict=True):
        assert torch.equal(seen, fake)


def test_memory(books):
    """One group's fake weights at a time."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    with lending(fq, model, state):
        loss = model(x)
        assert (books.now, books.most, books.calls) == (0, GROUP, 4)
        books.most = 0
        loss.backward()
        assert (books.now, books.most, books.calls) == (0, GROUP, 8)


def test_twice_through_one_graph():
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    wanted = functional(model, fq, state, x)[1]
    with lending(fq, model, state):
        loss = model(x)
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert not [name for name, grad in grads_of(model).items() if not torch.equal(grad, wanted[name])]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(reentrant):
    """Forward is run again within backward, and the non-reentrant kind even within the node's own backward."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP, checkpointed=reentrant)
    before = numbers_of(model)
    x.requires_grad_()
    found = lent(model, fq, state, x)
    assert_own(model, before)
    model.checkpointed = None
    assert_equal(found, functional(model, fq, state, x))


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
        with lending(fq, model, state):
            leaf = x.clone().requires_grad_()
            out = torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=False) if checkpointed else model(leaf)
            out.square().sum().backward()
        assert_own(model, before)
        grads.append([leaf.grad, *grads_of(model).values()])
    assert all(map(torch.equal, *grads))


def test_parameters_are_their_own_between():
    """Hooks on gradients, and whoever looks between the layers, see the parameters' own numbers."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
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
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    for name, param in model.named_parameters():
        param.requires_grad_("mlp" not in name)
    wanted = functional(model, fq, state, x)
    found = lent(model, fq, state, x)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1] if "dense" in name)
    books.calls = 0
    with torch.no_grad(), lending(fq, model, state):
        assert torch.equal(model(x), wanted[0])
    assert books.calls == 4


def test_a_failed_forward_leaves_nothing():
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    before = numbers_of(model)
    with lending(fq, model, state):
        with pytest.raises(ArithmeticError, match="forward"):
            model(x * torch.nan)
        assert_own(model, before)
        model(x).backward()
    found = grads_of(model)
    wanted = functional(model, fq, state, x)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_failed_backward_leaves_nothing():
    """Whoever comes next takes the numbers back: another forward, of the model or the layer, or the end."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    before = numbers_of(model)
    wanted = functional(model, fq, state, x)
    with lending(fq, model, state):
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
    with pytest.raises(ArithmeticError), lending(fq, model, state):
        (model(x) * torch.nan).backward()
    assert_own(model, before)


def test_backward_outside_is_refused():
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    before = numbers_of(model)
    with lending(fq, model, state):
        loss = model(x)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    assert_names(str(error.value), "OneNode", "within")
    assert_own(model, before)


def test_parameters_that_changed_are_refused():
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    with lending(fq, model, state):
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
    with pytest.raises(ValueError) as error, fqt.layerwise(fq, model, state, lends=lambda module: True):
        model(x)
    assert_names(str(error.value), "Grouped", "CatBackward0", "one node")
    assert_own(model, before)


def test_weights_that_cannot_hold_other_numbers_are_exchanged():
    """Results of other operations, gradients that are not the identity's, another dtype, torch.func."""
    model, fq, state, x = setup(OneNodeMLP, OneNodeMLP)
    params = dict(model.named_parameters())
    computed = {name: param * 1.0 for name, param in params.items()}
    with lending(fq, model, state):
        loss = functional_call(model, computed, (x,))
        loss.backward()
    assert_equal((loss.detach(), grads_of(model)), functional(model, fq, state, x))

    master = setup(OneNodeMLP, OneNodeMLP, out_dtype=torch.bfloat16)
    wanted = functional(*master)
    assert_equal(lent(*master), wanted)

    model, fq, state, x = master
    with lending(fq, model, state, recompute=False):
        loss = model(x)
    loss.backward()  # kept: nothing to make again, so it may be outside
    assert_equal((loss.detach(), grads_of(model)), wanted)
