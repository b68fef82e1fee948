"""Calibration layer by layer: equal to runs of the whole model, one for each layer; and what it leaves behind."""

import copy
from dataclasses import replace

import pytest
import torch

import fq_transforms as fqt
from tests.classes import VOCABULARY, tiny

CLASSES = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"]
LIST = "model.layers"
MSE = fqt.methods.Mse()
EXPERTS = "*.experts.*"
WAYS = {
    "max": ({EXPERTS: fqt.NVFP4}, fqt.methods.MAX),
    "mse": ({EXPERTS: fqt.INT4_BLOCK32, "*.self_attn.*_proj.weight": fqt.NVFP4_STATIC, "lm_head.*": fqt.FP8}, MSE),
    "FP8 inputs": ([fqt.Rule("*.self_attn.?_proj.weight|*.experts.*|lm_head.*", fqt.FP8, fqt.FP8)], fqt.methods.MAX),
    "NVFP4 inputs": ([fqt.Rule(EXPERTS, fqt.NVFP4, fqt.NVFP4, per_expert_inputs=True)], fqt.methods.MAX),
}


def batches(sizes=((2, 9), (1, 12), (3, 5))):
    """Batches of tokens, the second of which is padded at its left."""
    generator = torch.Generator().manual_seed(2)
    made = [{"input_ids": torch.randint(0, VOCABULARY, size, generator=generator)} for size in sizes]
    for one in made[1:2]:
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        one["attention_mask"][:, :3] = 0
    return made


def transform_of(model, way):
    rules, method = WAYS[way]
    if not isinstance(rules, dict):
        rules = [replace(rules[0], pattern=pattern) for pattern in rules[0].pattern.split("|")]
    try:
        spec = fqt.select(dict(model.named_parameters()), rules)
    except ValueError as error:  # DeepSeek's attention has other names
        assert "self_attn" in str(error)
        kept = {k: v for k, v in rules.items() if "self_attn" not in k} if isinstance(rules, dict) else rules[1:]
        spec = fqt.select(dict(model.named_parameters()), kept)
    return fqt.transform(spec, method=method)


def within(fq, is_inside):
    """The Transform of the groups that are inside."""
    groups, inputs = ([g for g in of if is_inside(g.names[0])] for of in (fq.spec.groups, fq.spec.inputs))
    return replace(fq, spec=fqt.Spec(tuple(groups), (), tuple(inputs)))


def quantized_forward(fq, whole, layer, state):
    forward = layer.forward

    def run(*args, **kwargs):
        with fq.quantized_inputs(whole, state):
            return forward(*args, **kwargs)

    return run


def two_passes(fq, model, given, move=None, path=LIST, unseen="raise"):
    """The straightforward way: for each layer the whole model, whose layers before it are quantized."""
    whole = copy.deepcopy(model)
    params, state = {}, {}
    prefixes = [f"{path}.{number}." for number in range(len(whole.get_submodule(path)))]
    insides = [lambda name, prefix=prefix: name.startswith(prefix) for prefix in prefixes]
    for inside, prefix in [*zip(insides, prefixes, strict=True), (lambda n: not n.startswith(path), None)]:
        own = within(fq, inside)
        if not own.spec.groups:
            continue
        here = dict(whole.named_parameters())
        found = own.fill_unseen(own.calibrate(here, given, model=whole), unseen=unseen, params=here)
        moved = here if move is None else move(own, here, found, given, whole)
        params |= {name: moved[name].clone() for group in own.spec.groups for name in group.names}
        state |= found
        if prefix is not None:
            with torch.no_grad():
                for name, weight in own.fakequant(moved, found).items():
                    here[name].copy_(weight)
            layer = whole.get_submodule(prefix[:-1])
            layer.forward = quantized_forward(own, whole, layer, found)
    return params, state


def assert_same(found, wanted):
    """The same groups, leaves and bits."""
    assert found.keys() == wanted.keys()
    for key, leaves in wanted.items():
        assert found[key].keys() == leaves.keys()
        for name, leaf in leaves.items():
            assert torch.equal(found[key][name], leaf), (key, name)


@pytest.fixture(scope="module")
def models():
    return {name: tiny(name)[0] for name in CLASSES}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLASSES)
def test_equals_runs_of_the_whole_model(name, way, models):
    """Law: the state of a layer is that of ordinary calibration on a model whose layers before it are quantized.

    Each family's own masks (sliding and full ones), positions and caches included: keys that a cache held twice, or a
    mask of another layer, change what attention's o_proj gets.
    """
    model, given = models[name], batches()
    fq = transform_of(model, way)
    params, state = fq.calibrate_sequentially(model, given, unseen="max-of-peers")
    assert list(state) == [group.key for group in fq.spec.all_groups]
    assert_same(state, two_passes(fq, model, given, unseen="max-of-peers")[1] | {})
    own = dict(model.named_parameters())
    assert params.keys() == own.keys()
    assert all(params[name] is own[name] for name in own)
