"""Experts as models have them, and every way to train them under fake quantization."""

import weakref

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from fq_transforms.integrations import megatron, te

HIDDEN, FFN, EXPERTS = 128, 256, 2


class Lists(torch.nn.Module):
    """Experts in a module list, each a module of two linear layers."""

    def __init__(self):
        super().__init__()
        up, down = (
            (lambda: torch.nn.Linear(HIDDEN, FFN, bias=False)),
            (lambda: torch.nn.Linear(FFN, HIDDEN, bias=False)),
        )
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"w1": up(), "w2": down()}) for _ in range(EXPERTS))

    def forward(self, x):
        parts = x.chunk(EXPERTS)
        return torch.cat([e["w2"](torch.relu(e["w1"](part))) for e, part in zip(self.experts, parts, strict=True)])


class Grouped(torch.nn.Module):
    """Experts as weight0..N-1 of one module, as in Transformer Engine."""

    def __init__(self, out_features, in_features):
        super().__init__()
        for i in range(EXPERTS):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.randn(out_features, in_features) / 8))

    def forward(self, x):
        weights = [getattr(self, f"weight{i}") for i in range(EXPERTS)]
        return torch.cat([part @ w.mT for part, w in zip(x.chunk(EXPERTS), weights, strict=True)])


class _Node(torch.autograd.Function):
    """As Transformer Engine's: it saves the weights as they are, and adds gradients to `main_grad` if they have one.

    It then gives gradients of NaN, which nobody may use. tests/integrations/test_te.py has the real one, on a GPU.
    """

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.refs = [weakref.ref(weight) for weight in weights]
        ctx.main_grads = lambda: [getattr(weight, "main_grad", None) for weight in weights]
        return torch.cat([part @ w.mT for part, w in zip(x.chunk(EXPERTS), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        back, grads = [], grad.chunk(EXPERTS)
        for part, g, ref, main_grad in zip(x.chunk(EXPERTS), grads, ctx.refs, ctx.main_grads(), strict=True):
            if main_grad is None:
                back.append(g.mT @ part)
                continue
            weight = ref()
            assert weight is not None, "weight was removed"
            main_grad.add_(g.mT @ part)
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                back.append(torch.full(main_grad.shape, torch.nan, dtype=weight.dtype))
            else:
                back.append(None)
        return torch.cat([g @ w for g, w in zip(grads, weights, strict=True)]), *back


class OneNode(Grouped):
    """As Transformer Engine's GroupedLinear: one node of the autograd graph."""

    def forward(self, x):
        return _Node.apply(x, *[getattr(self, f"weight{i}") for i in range(EXPERTS)])


class GroupedMLP(torch.nn.Module):
    layer = Grouped

    def __init__(self):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = self.layer(FFN, HIDDEN), self.layer(HIDDEN, FFN)

    def forward(self, x):
        return self.linear_fc2(torch.relu(self.linear_fc1(x)))


class OneNodeMLP(GroupedMLP):
    layer = OneNode


class Stacked(torch.nn.Module):
    """Experts in one parameter [E, out, in]."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.forward = self.compute
        self.experts.up = torch.nn.Parameter(torch.randn(EXPERTS, FFN, HIDDEN) / 8)
        self.experts.down = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, FFN) / 8)

    def compute(self, x):
        x = torch.relu(torch.bmm(x.view(EXPERTS, -1, HIDDEN), self.experts.up.mT))
        return torch.bmm(x, self.experts.down.mT).flatten(0, 1)

    def forward(self, x):
        return self.experts(x)


class Model(torch.nn.Module):
    """Layers of experts, each after a dense one; gives a loss."""

    def __init__(self, *kinds, checkpointed=None):
        super().__init__()
        self.dense = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in kinds)
        self.mlp = torch.nn.ModuleList(kind() for kind in kinds)
        self.checkpointed = checkpointed

    def forward(self, x):
        for dense, mlp in zip(self.dense, self.mlp, strict=True):
            x = dense(x)
            x = x + (mlp(x) if self.checkpointed is None else checkpoint(mlp, x, use_reentrant=self.checkpointed))
        return x.square().mean()


KINDS = [Lists, GroupedMLP, Stacked, OneNodeMLP]


def setup(*kinds, format=fqt.NVFP4, dtype=torch.float32, checkpointed=None, **options):
    """A model of two grouped layers, or of these kinds; its transform; a state, which clips under "clip"; an input."""
    model = Model(*kinds or (GroupedMLP, GroupedMLP), checkpointed=checkpointed).to(dtype)
    with torch.no_grad():
        for number, param in enumerate(model.mlp.parameters()):
            param.mul_(2.0 ** (number % 3 - 1))  # each expert an amax of its own
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"mlp.*": format}), **options)
    state = fq.calibrate(params)
    if fq.backward == "clip":
        state = halved(state)
    model.dense.to(fq.out_dtype or dtype)
    return model, fq, state, torch.randn(8 * EXPERTS, HIDDEN, dtype=fq.out_dtype or dtype)


def halved(state):
    return {key: {name: leaf * 0.5 for name, leaf in leaves.items()} for key, leaves in state.items()}


def grads_of(model):
    """The gradient of each parameter, wherever its layer adds it; forgotten on the model."""
    found = {}
    for name, param in model.named_parameters():
        is_added = getattr(param, "grad_added_to_main_grad", False)
        found[name] = param.main_grad if is_added else param.grad
    model.zero_grad()
    return found


# Each way takes (model, fq, state, x), and gives (loss, gradients by name).


def functional(model, fq, state, x):
    """What all others must equal."""
    loss = functional_call(model, fq.fakequant(dict(model.named_parameters()), state), (x,))
    loss.backward()
    return loss.detach(), grads_of(model)


def carried(model, fq, state, x):
    params = dict(model.named_parameters())
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(fq, params, weights)
    loss = functional_call(model, weights, (x,))
    loss.backward()
    return loss.detach(), grads_of(model)


def applied(model, fq, state, x):
    loss = fq.apply(model, dict(model.named_parameters()), state, x)
    loss.backward()
    return loss.detach(), grads_of(model)


def stepped(model, fq, state, x):
    step = fqt.value_and_grad(lambda model, x: model(x), fq, model)
    (loss,), grads = step(dict(model.named_parameters()), state, [x])
    return loss, grads


def within(context, model, x):
    with context:
        loss = model(x)
        loss.backward()
    return loss.detach(), grads_of(model)


def by_layer(model, fq, state, x, **options):
    return within(fqt.layerwise(fq, model, state, **options), model, x)


def te_call(model, fq, state, x):
    loss = te.functional_call(model, fq.fakequant(dict(model.named_parameters()), state), (x,))
    loss.backward()
    return loss.detach(), grads_of(model)


def megatron_call(model, fq, state, x):
    loss = functional_call(model, megatron.fakequant(fq, model, state), (x,))
    loss.backward()
    return loss.detach(), grads_of(model)


# Those that let layers add to `main_grad`, where parameters have one.
CARRYING = {
    "functional_call and carry_main_grad": carried,
    "value_and_grad": stepped,
    "layerwise": by_layer,
    "layerwise, kept": lambda *args: by_layer(*args, recompute=False),
    "te.layerwise": lambda model, fq, state, x: within(te.layerwise(fq, model, state), model, x),
    "te.layerwise, kept": lambda model, fq, state, x: within(te.layerwise(fq, model, state, recompute=False), model, x),
    "megatron.layerwise": lambda model, fq, state, x: within(megatron.layerwise(fq, model, state), model, x),
    "megatron.fakequant": megatron_call,
}
WAYS = CARRYING | {"apply": applied, "te.functional_call": te_call}


def assert_equal(found, wanted):
    """Loss and every gradient, bit for bit."""
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert all(grad is not None and grad.any() for grad in wanted[1].values())
    assert not [name for name, grad in wanted[1].items() if not torch.equal(found[1][name], grad)]


def numbers_of(model):
    """Each parameter, where its memory is, and what it holds."""
    return {name: (param, param.data_ptr(), param.detach().clone()) for name, param in model.named_parameters()}


def assert_own(model, before):
    """Parameters are the same objects, where they were and what they were."""
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, param in model.named_parameters():
        own, address, numbers = before[name]
        assert param is own
        assert param.data_ptr() == address
        assert torch.equal(param, numbers)


def assert_untouched(model, before):
    """Nor is there a hook left."""
    assert_own(model, before)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
