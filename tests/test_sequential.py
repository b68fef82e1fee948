"""Calibration layer by layer: equal to runs of the whole model, one for each layer; and what it leaves behind."""

import copy
import re
import threading
from dataclasses import replace
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fq_transforms as fqt
from tests.classes import VOCABULARY, batch, classes, tiny
from tests.full import FULL
from tests.interrupts import assert_as_before, check_interrupts, leaves_of, things_of

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


# Every way with one class, and every class with the way that has most: moved weights, and inputs.
PAIRS = [(name, way) for name in CLASSES for way in WAYS if FULL or name == CLASSES[0] or way == "gptq, inputs"]


@WARNS
@pytest.mark.parametrize(("name", "way"), PAIRS)
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
    for key, tensor in own.items():
        if is_moved and key in wanted_params:
            assert torch.equal(params[key], wanted_params[key])
            assert not torch.equal(params[key], tensor)
        else:
            assert params[key] is tensor


OTHERS = ["JambaForCausalLM", "LongcatFlashForCausalLM", "Gemma4ForConditionalGeneration"]
OTHERS += ["NllbMoeForConditionalGeneration"]


@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have
@pytest.mark.parametrize("name", [one for one in classes() if one not in CLASSES] if FULL else OTHERS)
def test_every_class(name):
    """Law: what ordinary calibration takes of a class of transformers is taken layer by layer, to the same bits."""
    model, _ = tiny(name)
    params = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    given = [batch(model, torch.randint(1, VOCABULARY, (2, 7), generator=generator)) for _ in range(2)]
    try:
        fq = fqt.transform(fqt.select(params, [fqt.Rule("*experts*", fqt.FP8, fqt.FP8)]))
        fq.calibrate(params, given, model=model)
    except ValueError as error:
        if name in OTHERS:
            raise
        pytest.skip(f"refused by calibrate: {error}")  # of all classes, those whose experts or batches it must be told
    path = None
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="layers: found 2, .* wanted one"):
            fq.calibrate_sequentially(model, given)
        path = next(
            path for path, _ in model.named_modules() if re.fullmatch(r"(model\.)?decoder\.(layers|block)", path)
        )
    _, state = fq.calibrate_sequentially(model, given, layers=path, unseen="max-of-peers")
    path = path or re.match(r"(.*?\.(?:layers|blocks))\.\d", fq.spec.groups[0].key)[1]
    assert_same(state, two_passes(fq, model, given, path=path, unseen="max-of-peers")[1])


# A small decoder, whose layers leave traces wherever they can.


class Layer(nn.Module):
    """Adds up what the cache has of it, counts its calls, and sends each token to one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, cache=None):
        self.calls.add_(1)
        if cache is not None:
            cache.append(x.mean())
            x = x + torch.stack(cache).sum()
        chosen = x[:, :1] > 0
        return x.add_(torch.where(chosen, *(expert(x) for expert in self.experts)))  # into what it was given


class Decoder(nn.Module):
    def __init__(self, count=3, order=None):
        super().__init__()
        self.embed, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.order = range(count) if order is None else order

    def forward(self, x, fail=False):
        x, cache = self.embed(x), []
        for number in self.order:
            x = self.layers[number](x, cache=cache)
            if fail and number == 1:
                raise RuntimeError("of its own")
        return self.head(x.mul_(0.5))  # into what the last layer gave


RULES = [fqt.Rule("layers.*", fqt.INT8, fqt.FP8), fqt.Rule("head.*", fqt.INT8, fqt.FP8)]
GIVEN = [torch.randn(6, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def decoder(*args, **options):
    model = Decoder(*args, **options)
    return model, fqt.transform(fqt.select(dict(model.named_parameters()), RULES))


def numbers_of(model):
    return {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before, numbers):
    """Tensors, hooks and threads are as they were, and so is every number."""
    assert_as_before(model, before)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor._version == numbers[name][1]
        if not tensor.is_meta:
            assert torch.equal(tensor.detach().nan_to_num(), numbers[name][0].nan_to_num())
    assert all("forward" not in vars(module) for module in model.modules())
    assert not [thread for thread in threading.enumerate() if "calibrate_sequentially" in thread.name]


@pytest.mark.parametrize("gptq", [None, {}])
@WARNS
def test_traces_of_a_calibrating_run_are_gone(gptq):
    """Law: equal to runs of the whole model where a layer writes into its cache, its buffers and its input."""
    model, fq = decoder()
    before, numbers = things_of(model), numbers_of(model)
    params, state = fq.calibrate_sequentially(model, GIVEN, gptq=gptq)
    assert_untouched(model, before, numbers)

    def move(fq, params, state, given, model):
        return fqt.gptq(fq, params, state, fq.input_hessians(params, given, model=model))

    wanted_params, wanted = two_passes(fq, model, GIVEN, None if gptq is None else move, path="layers")
    assert_same(state, wanted)
    assert all(torch.equal(params[name], tensor) for name, tensor in wanted_params.items())


@pytest.mark.slow
def test_interrupts_leave_the_model_as_it_was():
    """Named bug: KeyboardInterrupt, at whichever line, leaves hooks, quantized weights or threads in the model."""
    model, fq = decoder()

    def call():
        try:
            return leaves_of(fq.calibrate_sequentially(model, GIVEN)[1])
        finally:
            assert not [thread for thread in threading.enumerate() if "calibrate_sequentially" in thread.name]

    step = 61 if FULL else 199
    assert check_interrupts(call, model, lambda lines: range(0, lines, step)) > 6


def shared():
    model = Decoder()
    model.layers[2] = model.layers[0]
    return model


def tied():
    model = Decoder()
    for one, other in zip(model.layers[2].experts, model.layers[0].experts, strict=True):
        one.weight = other.weight
    return model


def two_lists():
    model = Decoder()
    model.more = nn.ModuleList([nn.Linear(32, 32, bias=False)])
    return model


def with_nan():
    model = Decoder()
    with torch.no_grad():
        model.layers[1].experts[1].weight[0, 0] = torch.nan
    return model


def on_meta():
    model = Decoder()
    model.layers[1].to("meta")
    return model


class Residual(Decoder):
    """Adds up what its layers give by itself."""

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x, cache=[])
        return self.head(x)


class Wrapped(Residual):
    """Has layers that give an object."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, x: SimpleNamespace(x=x))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x, cache=[]).x
        return self.head(x)


class Between(Decoder):
    """Has a weight between layers."""

    def forward(self, x):
        one, two, three = self.layers
        return self.head(three(self.embed(two(one(x, cache=[]), cache=[])), cache=[]))


@pytest.mark.parametrize("kind", [Residual, Wrapped, Between])
def test_outputs_of_earlier_layers_are_refused_outside(kind):
    """Bug: a head behind `x = x + layer(x)`, and a weight between layers, were shown the last layer's output instead.

    Those within the layers are calibrated all the same.
    """
    model = kind()
    before, numbers = things_of(model), numbers_of(model)
    params = dict(model.named_parameters())
    rules = [[fqt.Rule(pattern, fqt.INT8, fqt.FP8)] for pattern in ("*", "layers.*")]
    everywhere, inside = (fqt.transform(fqt.select(params, one)) for one in rules)
    with pytest.raises(ValueError, match="wanted finite values\n.*weights outside of 'layers' may read what its last"):
        everywhere.calibrate_sequentially(model, GIVEN)
    assert_untouched(model, before, numbers)
    inside.calibrate_sequentially(model, GIVEN)


def test_batches_may_be_of_a_graph():
    """Bug: embeddings that autograd had computed could not be copied; now they are as their numbers."""
    model, fq = decoder()
    with_graph = [(one.clone().requires_grad_() * 1,) for one in GIVEN]
    assert_same(fq.calibrate_sequentially(model, with_graph)[1], fq.calibrate_sequentially(model, GIVEN)[1])


def test_a_group_lies_in_one_layer():
    """Bug: experts that a regular expression found in several layers were missing from the first."""
    model = Decoder()
    params = dict(model.named_parameters())
    experts = [r"layers\.(?P<expert>\d+)\.experts\.0\.weight"]
    fq = fqt.transform(fqt.select(params, {"layers.?.experts.0.weight": fqt.INT8}, experts=experts))
    message = "layers: found 'layers.0.experts.0.weight' and 'layers.1.experts.0.weight', of two layers"
    with pytest.raises(ValueError, match=re.escape(message)):
        fq.calibrate_sequentially(model, GIVEN)


MISTAKES = {
    "no list": (lambda: nn.Sequential(nn.Linear(32, 32)), {}, "layers: found none among ModuleLists of Sequential"),
    "two lists": (two_lists, {}, "layers: found 2, ['layers', 'more'] among ModuleLists"),
    "no module": (Decoder, {"layers": "layer"}, "layers: found no module 'layer' in Decoder"),
    "another module": (Decoder, {"layers": "head"}, "layers: found Linear at 'head', wanted a ModuleList"),
    "never called": (lambda: Decoder(order=(0, 1)), {}, "layers: found 'layers.2' not called in batch 0"),
    "left out": (lambda: Decoder(order=(0, 2)), {}, "layers: found 'layers.2' called before 'layers.1' in batch 0"),
    "called twice": (lambda: Decoder(order=(0, 1, 1, 2)), {}, "layers: found 'layers.1' called twice in batch 0"),
    "twice at the end": (lambda: Decoder(order=(0, 1, 2, 2)), {}, "layers: found 'layers.2' called twice in batch 0"),
    "shared": (shared, {}, "layers: found 'layers.2' to be the same module as 'layers.0'"),
    "tied": (tied, {}, "parameter 'layers.0.experts.0.weight': found the same tensor as 'layers.2.experts.0.weight'"),
    "no batches": (Decoder, {"batches": []}, "batches: found none in list, wanted at least one"),
    "None": (Decoder, {"batches": None}, "batches: found none in NoneType"),
    "a number": (Decoder, {"batches": 3}, "batches: found int, wanted a tensor"),
    "a path": (Decoder, {"store": "out"}, "store: found str, wanted None or fqt.export.LayerFiles"),
    "a batch of text": (Decoder, {"batches": [GIVEN[0], "text"]}, "batches: found str as one of them"),
    "unseen": (Decoder, {"unseen": "zero"}, "unseen: found 'zero', wanted one of"),
    "gptq": (Decoder, {"gptq": True}, "gptq: found bool, wanted None, or options"),
    "damping": (Decoder, {"gptq": {"damping": -1}}, "damping: found -1"),
    "an unknown option": (
        Decoder,
        {"gptq": {"unseen": "ones", "dampening": 1}},
        "gptq: found 'dampening', wanted one of ['damping', 'shrinkage', 'order', 'unseen'] (did you mean 'damping'?)",
    ),
    "no option": (Decoder, {"gptq": {1: 1}}, "gptq: found 1, wanted one of ['damping',"),
    "NaN": (with_nan, {}, "weight 'layers.1.experts.1.weight' (expert 1 of 'layers.1.experts.*.weight')"),
    "meta": (on_meta, {}, "tensor 'layers.1.experts.0.weight': found on meta"),
    "no token": (
        Decoder,
        {"batches": GIVEN[0][:0], "unseen": "raise"},
        "state 'layers.0.experts.*.weight.input.amax': found no token for all experts",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_change_nothing(mistake):
    """Bad input: an error that says what was found and wanted; the model is as it was, and no thread is left."""
    make, options, message = MISTAKES[mistake]
    model = make()
    fq = fqt.transform(fqt.select(dict(model.named_parameters()), {"*": fqt.INT8}))
    if mistake == "no token":
        fq = decoder()[1]
    before, numbers = things_of(model), numbers_of(model)
    with pytest.raises(ValueError, match=r".*") as caught:
        fq.calibrate_sequentially(model, **{"batches": GIVEN} | options)
    assert message in str(caught.value)
    assert_untouched(model, before, numbers)


def test_what_the_model_raises_comes_with_its_batch():
    """Named bug: an error in a thread is lost, or nobody knows which batch it is about."""
    model, fq = decoder()
    before, numbers = things_of(model), numbers_of(model)
    given = [{"x": GIVEN[0]}, {"x": GIVEN[1], "fail": True}, {"x": GIVEN[2]}]
    with pytest.raises(RuntimeError, match="of its own") as caught:
        fq.calibrate_sequentially(model, given)
    assert caught.value.__notes__ == ["calibrate_sequentially: in batch 1"]
    assert_untouched(model, before, numbers)


def test_computes_as_the_caller_would():
    """Named bug: PyTorch's modes are of a thread, and the model runs without the caller's autocast or device."""
    model, fq = decoder()
    seen = []

    def forward(call, batch):
        seen.append((torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.empty(0).device.type))
        assert torch.is_autocast_enabled("cpu")
        call(batch)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        _, state = fq.calibrate_sequentially(model, GIVEN, forward=forward)
        assert_same(state, two_passes(fq, model, GIVEN, path="layers")[1])
    assert seen[:3] == [(False, torch.bfloat16, "cpu")] * 3
    with torch.device("meta"), pytest.raises(AssertionError):
        fq.calibrate_sequentially(model, GIVEN, forward=forward)
    assert seen[-1][2] == "meta"
