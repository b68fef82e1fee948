"""`FakeQuantOptimizer`. Law: its masters are those of the plain form, `functional_call` and one pullback, bit for bit."""

from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from tests.cases import assert_names, message_of, name_of
from tests.models import ListMoE, language_model, tokens

MICROBATCHES = 4
STATIC = [fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32]
RULES = [
    *((format, rule) for format in (fqt.NVFP4, *STATIC, fqt.MXFP4) for rule in ("pass_through", "clip")),
    *((format, "lsq") for format in (*STATIC, fqt.NVFP4_STATIC)),
]
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}
LEARN = partial(torch.optim.Adam, lr=1e-2)


def setup(format=fqt.NVFP4, backward="pass_through", dtype=torch.bfloat16, layers=1):
    """A model, a Transform of its experts, and a state: half the largest magnitude, so that some weights are clipped."""
    model, _ = language_model(ListMoE)
    del model.layers[layers:]
    model.to(dtype)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}), backward=backward)
    state = fq.calibrate(fqt.masters(params))
    return model, fq, {key: {name: leaf * 0.5 for name, leaf in leaves.items()} for key, leaves in state.items()}


def batches_of(step, count=MICROBATCHES):
    """Each one token over and over, so that some experts see no token in a step."""
    return [tokens(1, 1, seed=count * step + i).expand(2, 3) for i in range(count)]


def loss_of(logits, batch):
    return F.cross_entropy(logits.float().flatten(0, -2), batch.roll(1).flatten())


def make(model, fq, state, optimizer=torch.optim.AdamW, options=ADAMW, **given):
    if fq.backward == "lsq":
        given = {"state_optimizer": LEARN, **given}
    return fqt.FakeQuantOptimizer(fq, optimizer(model.parameters(), **options), model, state, **given)


def train(model, opt, steps, first=0, between=lambda step: None):
    for step in range(first, first + steps):
        for batch in batches_of(step):
            loss_of(model(batch), batch).backward()
        between(step)
        opt.step()
        opt.zero_grad()


def same(found, wanted):
    assert found.keys() == wanted.keys()
    differ = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    assert not differ, differ


def fake_weights(fq, masters, state, dtype=torch.bfloat16):
    """What the model holds, by functions that do not write."""
    plain = fqt.transform(fq.spec, out_dtype=dtype)
    return {name: weight.detach().to(dtype) for name, weight in plain.fakequant(masters, state).items()}


class Plain:
    """The contract: `functional_call` on detached fake weights, `.backward()` per microbatch, and one pullback."""

    def __init__(self, model, fq, state, optimizer=torch.optim.AdamW, options=ADAMW):
        self.model, self.dtype = model, next(model.parameters()).dtype
        self.fq = fqt.transform(fq.spec, backward=fq.backward)
        self.masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
        self.opt = optimizer(self.masters.values(), **options)
        self.state, self.unseen = state, 0
        if fq.backward == "lsq":
            self.state = {k: {n: leaf.clone().requires_grad_() for n, leaf in g.items()} for k, g in state.items()}
            self.learn = LEARN([leaf for group in self.state.values() for leaf in group.values()])

    def step(self, step):
        leaves = {n: w.requires_grad_() for n, w in fake_weights(self.fq, self.masters, self.state, self.dtype).items()}
        for batch in batches_of(step):
            loss_of(functional_call(self.model, leaves, (batch,)), batch).backward()
        with_grads = [name for name, leaf in leaves.items() if leaf.grad is not None]
        self.unseen += len(leaves) - len(with_grads)
        fakes = self.fq.fakequant(self.masters, self.state)
        # `grad` of experts without tokens stays None, though the others of the group have one.
        for name in leaves.keys() - with_grads:
            fakes[name] = fakes[name].detach()
        outs = [fakes[name].to(self.dtype) for name in with_grads]
        torch.autograd.backward(outs, [leaves[name].grad for name in with_grads])
        for name in leaves.keys() - with_grads:
            self.masters[name].grad = None
        self.opt.step()
        self.opt.zero_grad()
        if self.fq.backward == "lsq":
            self.learn.step()
            self.learn.zero_grad()
            for group in self.state.values():
                for leaf in group.values():
                    leaf.data.clamp_(min=torch.finfo(torch.float32).tiny)


# The law.


@pytest.mark.parametrize(
    ("format", "backward", "kind"),
    [*((*rule, {"foreach": True}) for rule in RULES), *((fqt.NVFP4, "clip", kind) for kind in ({"fused": True}, {}))],
    ids=lambda value: str(*value) if isinstance(value, dict) else name_of(value),
)
def test_twenty_steps_give_the_masters_of_the_plain_form(format, backward, kind):
    """With four microbatches whose gradients add up in bf16, and experts without tokens."""
    options = ADAMW | kind
    model, fq, state = setup(format, backward)
    plain = Plain(setup(format, backward)[0], fq, state, options=options)
    opt = make(model, fq, state, options=options)
    for step in range(20):
        plain.step(step)
        train(model, opt, 1, step)
    same(opt.masters, plain.masters)
    same(fqt.state.flatten(opt.quantizer_state), fqt.state.flatten(plain.state))
    same(dict(model.named_parameters()), fake_weights(fq, plain.masters, plain.state))
    assert plain.unseen
    moved = [not torch.equal(opt.masters[n], p.float()) for n, p in setup(format, backward)[0].named_parameters()]
    assert all(moved)
