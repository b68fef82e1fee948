"""PEFT itself: LoRA over frozen experts that are fake-quantized where they lie."""

import pytest
import torch

import fq_transforms as fqt
from tests.cases import assert_names, message_of
from tests.export.models import TOKENS, build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

RULES = {"*experts*gate_up_proj": fqt.NVFP4, "*experts*down_proj": fqt.FP8}
STEPS = 5


def adapted(role):
    """A tiny Qwen3-MoE in bf16, and LoRA in fp32: over the stacked experts, or over attention beside them."""
    torch.manual_seed(0)
    targets = {
        "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        "attention": {"target_modules": ["q_proj", "v_proj"]},
    }
    return peft.get_peft_model(build()[0], peft.LoraConfig(r=4, lora_alpha=8, **targets[role])).train()


def loss_of(model):
    return torch.nn.functional.cross_entropy(model(TOKENS).logits[0, :-1].float(), TOKENS[0, 1:])


@pytest.mark.parametrize("role", ["experts", "attention"])
def test_updates_are_trained_over_fake_weights(role):
    """As in a model whose frozen weights are fake for good, to the last bit; and the masters of the frozen stay."""
    model, alone = adapted(role), adapted(role)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    fq = fqt.transform(fqt.select(frozen, RULES))
    masters = fqt.masters(model, fq=fq)
    state = fq.calibrate(masters)
    fakes = fq.fakequant(before, state)
    fq.fakequant(masters, state, out=model)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(fakes[name])

    optimizer = torch.optim.AdamW([m for m in masters.values() if m.requires_grad], lr=1e-2)
    plain = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        loss_of(model).backward()
        fq.take_grads(model, masters, state)
        optimizer.step()
        optimizer.zero_grad()
        fq.fakequant(masters, state, out=model)
        loss_of(alone).backward()
        plain.step()
        plain.zero_grad()

    selected = {name for group in fq.spec.groups for name in group.names}
    moved = 0
    for (name, p), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.detach(), other.detach()), name
        if name in selected:
            assert torch.equal(masters[name].detach().to(p.dtype), before[name]), name
            assert not torch.equal(p.detach(), before[name]), name
        moved += p.requires_grad and not torch.equal(p.detach(), before[name])
    assert moved == sum(p.requires_grad for p in model.parameters())


def test_it_is_refused_where_weights_are_put_into_modules():
    """`layerwise` and `value_and_grad` name PEFT's wrapper, and the lens as the way out; the model works as before."""
    model = adapted("experts")
    fq = fqt.transform(fqt.select(dict(model.named_parameters()), RULES))
    params = dict(model.named_parameters())
    state = fq.calibrate(params)
    wanted = loss_of(model)
    doors = (
        lambda: fqt.layerwise(fq, model, state).__enter__(),
        lambda: fqt.value_and_grad(lambda: loss_of(model), fq, model)(params, state),
    )
    for door in doors:
        assert_names(message_of(ValueError, door), "ParamWrapper", "out=")
    assert torch.equal(loss_of(model), wanted)
