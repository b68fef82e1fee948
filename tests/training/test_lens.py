"""The lens and what others do with a model: it is an ordinary one, so nothing of theirs changes what is trained."""

from functools import partial

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from tests.cases import experts, same_bits
from tests.training import toy

STEPS = 3


def step(fq, model, masters, state, optimizer, number, call):
    """One step of training, the write included."""
    for i in range(toy.MICROBATCHES):
        x, y = toy.batch(number, i)
        toy.loss_of(call(x), y).backward()
    fq.take_grads(model, masters, state)
    optimizer.step()
    optimizer.zero_grad()
    fq.fakequant(masters, state, out=model)


def started(model, backward="clip"):
    masters = fqt.masters(model)
    fq = toy.transform(masters, backward)
    state = toy.start(fq, masters)
    fq.fakequant(masters, state, out=model)
    return fq, masters, state, toy.optimizer_of(masters, state)


def trained(call_of=lambda model: model, between=lambda *_: None):
    """Masters after some steps; what comes between two of them must not be seen."""
    model = toy.toy()
    call = call_of(model)
    fq, masters, state, optimizer = started(model)
    for number in range(STEPS):
        step(fq, model, masters, state, optimizer, number, call)
        between(fq, model, masters, state)
    return {name: m.detach() for name, m in masters.items()}


@pytest.mark.parametrize(
    ("accumulate", "backward"), [("reduced", "pass_through"), ("reduced", "clip"), ("taken", "clip"), ("taken", "lsq")]
)
def test_the_lens_trains_as_the_plain_form_does(accumulate, backward):
    """All formats in one model, and an expert without tokens: gradients taken once, or from each microbatch."""
    model = toy.toy()
    fq, masters, state, optimizer = started(model, backward)
    for number in range(toy.STEPS):
        for i in range(toy.MICROBATCHES):
            x, y = toy.batch(number, i)
            toy.loss_of(model(x), y).backward()
            if accumulate == "taken" or i == toy.MICROBATCHES - 1:
                fq.take_grads(model, masters, state)
        assert masters["listed.experts.4.up.weight"].grad is None
        optimizer.step()
        optimizer.zero_grad()
        toy.clamp(state)
        fq.fakequant(masters, state, out=model)
    wanted = toy.train_plainly(toy.toy(), fq, accumulate)
    assert_same(masters, wanted[0])
    assert_same(dict(model.named_parameters()), wanted[2][-1][0])
    assert_same(fqt.state.flatten(state), fqt.state.flatten(wanted[1]))


@pytest.fixture(scope="module")
def wanted():
    return trained()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [name for name, m in found.items() if not same_bits(m.detach(), wanted[name].detach())]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(wanted, reentrant):
    """The recomputed forward reads the weights of the first one: nothing is written before the backward pass."""

    def call_of(model):
        for layer in (model.stacked, model.listed, model.transposed):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
        return lambda x: model(x.requires_grad_())

    assert_same(trained(call_of), wanted)


def test_a_model_that_is_compiled(wanted):
    """One that has run before, too: it reads its parameters' memory, and a write asks for no other graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call_of(model):
        call = torch.compile(model, backend=backend)
        toy.loss_of(call(toy.batch(0, 0)[0]), 0).backward()
        model.zero_grad()
        graphs.append(None)
        return call

    assert_same(trained(call_of), wanted)
    assert graphs.count(None) == 1
    assert graphs[-1] is None, "compiled again"


def test_an_average_of_masters(wanted):
    """An EMA is of masters, is evaluated by a write of its own, and goes as it came; of parameters it is of fakes."""
    average = {}

    def between(fq, model, masters, state):
        for name, m in masters.items():
            average[name] = m.detach().clone() if name not in average else average[name].lerp(m.detach(), 0.5)
        x, _ = toy.batch(0, 0)
        fakes = {name: w.bfloat16() for name, w in fq.fakequant(average, state).items()}
        fq.fakequant(average, state, out=model)
        with torch.no_grad():
            assert torch.equal(model(x), functional_call(model, fakes, (x,)))
        fqt.cast(average, out=model)
        assert all(torch.equal(p, average[name].bfloat16()) for name, p in model.named_parameters())
        fq.fakequant(masters, state, out=model)
        of_fakes = {name: p.float() for name, p in model.named_parameters()}
        assert (of_fakes["stacked.up"] - masters["stacked.up"]).abs().max() > 1e-3

    assert_same(trained(between=between), wanted)


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.proj = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.proj(self.embed(tokens)))


@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_tied_weights(backward):
    """`layerwise` left a tied head unquantized: here there is one parameter, quantized once, with both gradients."""
    model = Tied().bfloat16()
    masters = fqt.masters(model)
    assert list(masters) == ["embed.weight", "proj.weight"]
    fq = fqt.transform(fqt.select(masters, {"*": fqt.INT8_PER_CHANNEL}), backward=backward)
    state = toy.start(fq, masters)
    plain = optree.tree_map(lambda t: t.detach().clone().requires_grad_(), (masters, state))
    fq.fakequant(masters, state, out=model)
    assert model.head.weight is model.embed.weight
    tokens = torch.arange(48).view(4, 12)
    model(tokens).float().square().sum().backward()
    fq.take_grads(model, masters, state)

    fakes = {name: w.bfloat16() for name, w in fq.fakequant(*plain).items()}
    leaves = {name: w.detach().requires_grad_() for name, w in fakes.items()}
    functional_call(model, leaves, (tokens,)).float().square().sum().backward()
    torch.autograd.backward(list(fakes.values()), [leaf.grad for leaf in leaves.values()])
    for name, p in model.named_parameters():
        assert same_bits(p.detach(), fakes[name].detach())
        assert same_bits(masters[name].grad, plain[0][name].grad)
    if backward == "lsq":
        for key, leaves in state.items():
            assert torch.equal(leaves["amax"].grad, plain[1][key]["amax"].grad)


class LowRank(nn.Module):
    """What PEFT's `target_parameters` puts over a weight: the weight and an update of low rank."""

    def __init__(self, shape):
        super().__init__()
        a, b = experts(shape[0], (4, shape[2]), seed=7), experts(shape[0], (shape[1], 4), seed=8)
        self.a, self.b = nn.Parameter(torch.stack(a)), nn.Parameter(torch.stack(b) / 8)

    def forward(self, weight):
        return weight + (self.b @ self.a).to(weight.dtype)


def adapted():
    """The toy with frozen weights, and updates in fp32 of the stacked experts."""
    model = toy.toy().requires_grad_(False)
    for layer, role in ((model.stacked, "up"), (model.stacked, "down")):
        update = LowRank(getattr(layer, role).shape)
        parametrize.register_parametrization(layer, role, update, unsafe=True)
    return model


def test_updates_of_low_rank_over_frozen_experts():
    """Frozen experts are quantized where they lie, once and for all; updates are trained as ever, in their own memory.

    PEFT's `target_parameters` broke after `value_and_grad`.
    """
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rules = {"stacked.parametrizations.up.original": fqt.NVFP4, "stacked.parametrizations.down.original": fqt.FP8}
    rules |= {"listed.experts.*.up.weight": fqt.INT8_PER_CHANNEL}
    params = dict(model.named_parameters())
    fq = fqt.transform(
        fqt.select(params, rules, experts=r"stacked\.parametrizations\.(up|down)\.original"), backward="clip"
    )
    masters = fqt.masters(model, fq=fq)
    selected = {name for group in fq.spec.groups for name in group.names}
    assert {name for name, m in masters.items() if m is not params[name]} == {
        *selected,
        *(name for name, p in params.items() if p.requires_grad and p.dtype != torch.float32),
    }
    state = fq.calibrate(masters)
    optimizer = toy.optimizer_of(masters, state)
    fakes = fq.fakequant(before, state)
    fq.fakequant(masters, state, out=model)

    alone = adapted()  # the same, with fake weights for good
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(fakes[name])
    trained_alone = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    other = toy.optimizer_of(trained_alone, {})
    for number in range(STEPS):
        step(fq, model, masters, state, optimizer, number, model)
        for i in range(toy.MICROBATCHES):
            x, y = toy.batch(number, i)
            toy.loss_of(alone(x), y).backward()
        other.step()
        other.zero_grad()
    for name, p in alone.named_parameters():
        assert same_bits(params[name].detach(), p.detach()), name
        assert same_bits(masters[name].detach(), (before[name] if name in selected else p).detach()), name
    assert all(not same_bits(p.detach(), before[name]) for name, p in trained_alone.items())
