"""Calibration layer by layer: equal to runs of the whole model, one for each layer; and what it leaves behind."""

import copy
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

import fq_transforms as fqt
from tests.classes import VOCABULARY, tiny

CLASSES = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"]
LIST = "model.layers"
MSE = fqt.methods.Mse()
EXPERTS = "*.experts.*"
HEAD, ATTENTION = "lm_head.*", "*.self_attn.?_proj.weight"
WAYS = {
    "max": ([fqt.Rule(EXPERTS, fqt.NVFP4)], fqt.methods.MAX),
    "mse": ([fqt.Rule(EXPERTS, fqt.INT4_BLOCK32), fqt.Rule(ATTENTION, fqt.NVFP4_STATIC), fqt.Rule(HEAD, fqt.FP8)], MSE),
    "FP8 inputs": ([fqt.Rule(one, fqt.FP8, fqt.FP8) for one in (EXPERTS, ATTENTION, HEAD)], fqt.methods.MAX),
    "NVFP4 inputs": ([fqt.Rule(EXPERTS, fqt.NVFP4, fqt.NVFP4, per_expert_inputs=True)], fqt.methods.MAX),
    "gptq": ([fqt.Rule(one, fqt.INT4_BLOCK32) for one in (EXPERTS, ATTENTION, HEAD)], MSE),
    "gptq, inputs": ([fqt.Rule(EXPERTS, fqt.NVFP4_STATIC, fqt.FP8)], fqt.methods.MAX),
}
GPTQ = {"damping": 0.02, "unseen": "mean-of-peers"}
# Of fewer tokens than inputs, and rounded to the nearest where that is better, which gptq says.
WARNS = pytest.mark.filterwarnings("ignore:gptq:UserWarning")


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
    params = dict(model.named_parameters())
    return fqt.transform(fqt.select(params, [rule for rule in rules if _matches(rule, params)]), method=method)


def _matches(rule, params):
    """DeepSeek's attention has other names than the others'."""
    return any(fnmatch(name, rule.pattern) for name in params)


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


def by_gptq(fq, params, state, given, model):
    hessians = fq.input_hessians(params, given, model=model, unseen=GPTQ["unseen"])
    return fqt.gptq(fq, params, state, hessians, damping=GPTQ["damping"])


@WARNS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLASSES)
def test_equals_runs_of_the_whole_model(name, way, models):
    """Law: a layer's state, and its weights under GPTQ, are those of a model whose layers before it are quantized.

    Each family's own masks (sliding and full ones), positions and caches included: keys that a cache held twice, or a
    mask of another layer, change what attention's o_proj gets.
    """
    model, given = models[name], batches()
    fq, is_moved = transform_of(model, way), way.startswith("gptq")
    options = {"unseen": "max-of-peers", "gptq": GPTQ if is_moved else None}
    params, state = fq.calibrate_sequentially(model, given, **options)
    wanted_params, wanted = two_passes(fq, model, given, by_gptq if is_moved else None, unseen="max-of-peers")
    assert list(state) == [group.key for group in fq.spec.all_groups]
    assert_same(state, wanted)
    own = dict(model.named_parameters())
    assert list(params) == list(own)
    for name, tensor in own.items():
        if is_moved and name in wanted_params:
            assert torch.equal(params[name], wanted_params[name])
            assert not torch.equal(params[name], tensor)
        else:
            assert params[name] is tensor
