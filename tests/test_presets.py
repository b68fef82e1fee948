"""The presets on the parameter names of real models: what they take, in which format, and what they must leave alone.

Held twice: against a table of names written by hand, and against ModelOpt's own configurations, where it imports.
"""

import importlib
import re
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

from fq_transforms import presets
from fq_transforms.formats import (
    FORMATS,
    FP8,
    FP8_BLOCK,
    FP8_PER_CHANNEL,
    INT4_BLOCK128,
    INT8,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP6_E3M2,
    MXFP8,
    MXINT8,
    NVFP4,
    IntElement,
)
from fq_transforms.rules import Rule, unwrapped
from fq_transforms.select import select

LAYERS, EXPERTS = range(2), range(3)
HIDDEN = (256, 128)  # any matrix: every block of a format divides it

# Each model: names of routed experts, of other matrices to quantize, of matrices and vectors to leave alone, by shape.
# {n} is a layer, {i} an expert.
MODELS = {
    "Mixtral": {
        "experts": {f"model.layers.{{n}}.block_sparse_moe.experts.{{i}}.w{k}.weight": HIDDEN for k in (1, 2, 3)},
        "dense": {f"model.layers.{{n}}.self_attn.{role}_proj.weight": HIDDEN for role in "qkvo"},
        "left": {
            "model.embed_tokens.weight": HIDDEN,
            "model.layers.{n}.block_sparse_moe.gate.weight": (8, 128),
            "model.layers.{n}.input_layernorm.weight": (128,),
            "model.norm.weight": (128,),
            "lm_head.weight": HIDDEN,
        },
    },
    "Mixtral, transformers 5": {
        "experts": {
            "model.layers.{n}.mlp.experts.gate_up_proj": (4, 512, 128),
            "model.layers.{n}.mlp.experts.down_proj": (4, 128, 256),
        },
        "dense": {f"model.layers.{{n}}.self_attn.{role}_proj.weight": HIDDEN for role in "qkvo"},
        "left": {
            "model.embed_tokens.weight": HIDDEN,
            "model.layers.{n}.mlp.gate.weight": (4, 128),
            "model.layers.{n}.input_layernorm.weight": (128,),
            "lm_head.weight": HIDDEN,
        },
    },
    "Megatron-Core with Transformer Engine": {
        "experts": {
            "decoder.layers.{n}.mlp.experts.linear_fc1.weight{i}": HIDDEN,
            "decoder.layers.{n}.mlp.experts.linear_fc2.weight{i}": HIDDEN,
        },
        "dense": {
            "decoder.layers.{n}.self_attention.linear_qkv.weight": HIDDEN,
            "decoder.layers.{n}.self_attention.linear_proj.weight": HIDDEN,
            "decoder.layers.{n}.mlp.shared_experts.linear_fc1.weight": HIDDEN,
            "decoder.layers.{n}.mlp.shared_experts.linear_fc2.weight": HIDDEN,
        },
        "left": {
            "embedding.word_embeddings.weight": HIDDEN,
            "embedding.position_embeddings.weight": HIDDEN,
            "decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight": (128,),
            "decoder.layers.{n}.self_attention.linear_qkv.bias": (256,),
            "decoder.layers.{n}.pre_mlp_layernorm.weight": (128,),
            "decoder.layers.{n}.mlp.router.weight": (8, 128),
            "decoder.layers.{n}.mlp.experts.linear_fc1.bias{i}": (256,),
            "decoder.final_layernorm.weight": (128,),
            "output_layer.weight": HIDDEN,
        },
    },
    "Megatron-Core, SequentialMLP": {
        "experts": {
            "decoder.layers.{n}.mlp.experts.local_experts.{i}.linear_fc1.weight": HIDDEN,
            "decoder.layers.{n}.mlp.experts.local_experts.{i}.linear_fc2.weight": HIDDEN,
        },
        "dense": {"decoder.layers.{n}.self_attention.linear_proj.weight": HIDDEN},
        "left": {"decoder.layers.{n}.mlp.router.weight": (8, 128), "output_layer.weight": HIDDEN},
    },
    "Qwen3-Next with vision": {
        "experts": {
            f"model.layers.{{n}}.mlp.experts.{{i}}.{role}_proj.weight": HIDDEN for role in ("gate", "up", "down")
        },
        "dense": {
            "model.layers.{n}.mlp.shared_expert.gate_proj.weight": HIDDEN,
            "model.layers.{n}.mlp.shared_expert.down_proj.weight": HIDDEN,
            "model.layers.{n}.linear_attn.in_proj_qkvz.weight": HIDDEN,
            "model.layers.{n}.linear_attn.out_proj.weight": HIDDEN,
        },
        "left": {
            "model.embed_tokens.weight": HIDDEN,
            "model.layers.{n}.mlp.gate.weight": (8, 128),
            "model.layers.{n}.mlp.shared_expert_gate.weight": (1, 128),
            "model.layers.{n}.linear_attn.conv1d.weight": (64, 1, 4),
            "model.layers.{n}.linear_attn.in_proj_a.weight": (8, 128),
            "model.layers.{n}.linear_attn.in_proj_ba.weight": (8, 128),
            "model.layers.{n}.linear_attn.A_log": (8,),
            "model.visual.blocks.{n}.attn.qkv.weight": HIDDEN,
            "mtp.layers.{n}.mlp.gate_proj.weight": HIDDEN,
            "lm_head.weight": HIDDEN,
        },
    },
    "Llama-4 with vision": {
        "experts": {
            "language_model.model.layers.{n}.feed_forward.experts.gate_up_proj": (4, 128, 512),
            "language_model.model.layers.{n}.feed_forward.experts.down_proj": (4, 256, 128),
        },
        "dense": {
            "language_model.model.layers.{n}.self_attn.q_proj.weight": HIDDEN,
            "language_model.model.layers.{n}.feed_forward.shared_expert.gate_proj.weight": HIDDEN,
        },
        "left": {
            "language_model.model.embed_tokens.weight": HIDDEN,
            "language_model.model.layers.{n}.feed_forward.router.weight": (8, 128),
            "language_model.lm_head.weight": HIDDEN,
            "vision_model.model.layers.{n}.self_attn.q_proj.weight": HIDDEN,
            "vision_model.patch_embedding.linear.weight": (128, 588),
            "vision_tower.blocks.{n}.fc1.weight": HIDDEN,
            "multi_modal_projector.linear_1.weight": HIDDEN,
        },
    },
    "Llama": {
        "experts": {},
        # mlp.gate_proj is no router, and must not be taken for mlp.gate.
        "dense": {f"model.layers.{{n}}.self_attn.{role}_proj.weight": HIDDEN for role in "qkvo"}
        | {f"model.layers.{{n}}.mlp.{role}_proj.weight": HIDDEN for role in ("gate", "up", "down")},
        "left": {
            "model.embed_tokens.weight": HIDDEN,
            "model.layers.{n}.post_attention_layernorm.weight": (128,),
            "model.norm.weight": (128,),
            "lm_head.weight": HIDDEN,
        },
    },
}

# Every preset: the formats of its weights and of its inputs, and whether it takes the whole model.
WHOLE = {
    "NVFP4_DEFAULT_CFG": (NVFP4, NVFP4),
    "W4A16_NVFP4_CFG": (NVFP4, None),
    "FP8_DEFAULT_CFG": (FP8, FP8),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": (FP8_PER_CHANNEL, FP8_PER_CHANNEL),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": (FP8_BLOCK, None),
    "INT8_DEFAULT_CFG": (INT8_PER_CHANNEL, INT8),
    "INT8_WEIGHT_ONLY_CFG": (INT8_PER_CHANNEL, None),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": (INT4_BLOCK128, None),
    "MXFP8_DEFAULT_CFG": (MXFP8, MXFP8),
    "MXINT8_DEFAULT_CFG": (MXINT8, MXINT8),
    "MXFP6_DEFAULT_CFG": (MXFP6_E3M2, MXFP6_E3M2),
    "MXFP4_DEFAULT_CFG": (MXFP4, MXFP4),
}
EXPERTS_ONLY = {
    "NVFP4_EXPERTS_ONLY_CFG": (NVFP4, NVFP4),
    "FP8_EXPERTS_ONLY_CFG": (FP8, FP8),
    "FP8_PER_CHANNEL_EXPERTS_ONLY_CFG": (FP8_PER_CHANNEL, FP8_PER_CHANNEL),
    "FP8_2D_BLOCKWISE_EXPERTS_ONLY_CFG": (FP8_BLOCK, None),
    "INT8_EXPERTS_ONLY_CFG": (INT8_PER_CHANNEL, INT8),
    "INT4_BLOCKWISE_EXPERTS_ONLY_CFG": (INT4_BLOCK128, None),
    "MXFP8_EXPERTS_ONLY_CFG": (MXFP8, MXFP8),
    "MXINT8_EXPERTS_ONLY_CFG": (MXINT8, MXINT8),
    "MXFP6_EXPERTS_ONLY_CFG": (MXFP6_E3M2, MXFP6_E3M2),
    "MXFP4_EXPERTS_ONLY_CFG": (MXFP4, MXFP4),
}
MIXTURES = [name for name, model in MODELS.items() if model["experts"]]

# The presets whose names are ModelOpt's own.
MODELOPT = [*WHOLE, "NVFP4_EXPERTS_ONLY_CFG"]


def expand(templates):
    """Names of all layers and experts, as meta tensors of their shapes."""
    return {
        template.format(n=n, i=i): torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for template, shape in templates.items()
        for n in (LAYERS if "{n}" in template else [0])
        for i in (EXPERTS if "{i}" in template else [0])
    }


def parameters(model):
    """All parameters of a model, in three parts: experts, dense, left."""
    return {part: expand(templates) for part, templates in MODELS[model].items()}


def names_of(groups):
    """The names of all weights in some groups."""
    return {name for group in groups for name in group.names}


def quantized_by(preset, params):
    """The names that a preset quantizes."""
    return names_of(select(params, getattr(presets, preset)).groups)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", WHOLE)
def test_a_whole_model_preset_takes_every_matrix_but_the_excluded(preset, model):
    """Kills a quantized head, router, embedding, norm or vision tower, and a projection that is left out."""
    parts = parameters(model)
    params = parts["left"] | parts["dense"] | parts["experts"]
    spec = select(params, getattr(presets, preset))
    weights, inputs = WHOLE[preset]
    assert names_of(spec.groups) == parts["dense"].keys() | parts["experts"].keys()
    assert {group.format for group in spec.groups} == {weights}
    assert names_of(spec.inputs) == (names_of(spec.groups) if inputs else set())
    assert {group.format for group in spec.inputs} == {inputs} - {None}
    assert {skipped.name for skipped in spec.skipped} == parts["left"].keys()


@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("preset", EXPERTS_ONLY)
def test_an_experts_only_preset_takes_the_routed_experts(preset, model):
    """Kills a quantized attention or shared expert, and an expert that is left out."""
    parts = parameters(model)
    params = parts["left"] | parts["dense"] | parts["experts"]
    spec = select(params, getattr(presets, preset))
    weights, inputs = EXPERTS_ONLY[preset]
    assert names_of(spec.groups) == parts["experts"].keys()
    assert {group.format for group in spec.groups} == {weights}
    assert names_of(spec.inputs) == (names_of(spec.groups) if inputs else set())
    assert {group.format for group in spec.inputs} == {inputs} - {None}
    assert {group.experts for group in spec.groups} == ({4} if spec.groups[0].stacked else {len(EXPERTS)})
    assert {skipped.name for skipped in spec.skipped} == parts["left"].keys() | parts["dense"].keys()


@pytest.mark.parametrize("preset", EXPERTS_ONLY)
def test_experts_only_on_a_dense_model_is_an_error(preset):
    """A model without experts is a mistake, not an empty success."""
    parts = parameters("Llama")
    with pytest.raises(ValueError, match=r"select no weight among \d+ parameters.*\*\.experts\.\*"):
        select(parts["dense"] | parts["left"], getattr(presets, preset))


@pytest.mark.parametrize(
    "templates",
    [
        {"experts.w13": (4, *HIDDEN), "experts.w2": (4, *HIDDEN)},
        {"experts.{i}.w1.weight": HIDDEN},
        {"experts.linear_fc1.weight{i}": HIDDEN},
        {"local_experts.{i}.linear_fc1.weight": HIDDEN},
    ],
    ids=list,
)
def test_experts_only_takes_a_layer_alone(templates):
    """The parameters of one MoE layer on its own, with no name in front of "experts", are found like a model's."""
    params = expand(templates)
    left = expand({"router.weight": (8, 128), "shared_experts.linear_fc1.weight": HIDDEN})
    assert quantized_by("FP8_EXPERTS_ONLY_CFG", left | params) == params.keys()


ROUTED = ["mlp", "block_sparse_moe", "moe", "text_moe", "vision_moe", "ffn", "feed_forward", "mixer"]
ALONE = {
    "a state matrix": ("layers.0.mamba.A_log", (64, 16)),
    "a hyper-connection": ("layers.0.attn_hc.fn", (24, 128)),
    "a relative bias": ("layers.0.self_attn.rel_logits_proj.proj", (16, 128)),
    "an embedding of biases": ("block.0.SelfAttention.relative_attention_bias.weight", (32, 16)),
    "a shared embedding": ("shared.weight", (128, 128)),
    "one within a model": ("model.shared.weight", (128, 128)),
    "one of Nemotron-H": ("model.embeddings.weight", (128, 128)),
    "an embedder": ("token_embedder.weight", (128, 128)),
    "shared 3-D experts": ("layers.0.mlp.shared_experts.gate_proj", (2, 128, 128)),
    "a convolution": ("layers.0.mamba.conv1d.weight", (64, 1, 4)),
    "LoRA": ("layers.0.q.lora_A.default.weight", (8, 128)),
    "LoRA in an expert": ("layers.0.mlp.experts.0.up.lora_B.default.weight", (128, 16)),
} | {f"a router, {block}.gate": (f"layers.0.{block}.gate.weight", (4, 128)) for block in ROUTED}


@pytest.mark.parametrize("what", ALONE)
def test_what_only_looks_like_a_matrix_is_left_alone(what):
    """By every preset, alone and under wrappers; a linear beside it is taken, and so are experts that have its name."""
    name, shape = ALONE[what]
    others = {"layers.0.mlp.experts.0.up.weight": HIDDEN, "layers.0.mlp.experts.0.gate.weight": HIDDEN}
    dense = {"layers.0.mlp.gate_proj.weight": HIDDEN, "layers.0.patch_embedder.proj.weight": HIDDEN}
    for wrapper in ("", "module.", "_orig_mod.", "module._orig_mod."):
        params = expand({f"{wrapper}{each}": s for each, s in {name: shape, **others, **dense}.items()})
        left = {f"{wrapper}{each}" for each in others}
        assert quantized_by("FP8_EXPERTS_ONLY_CFG", params) == left
        assert quantized_by("FP8_DEFAULT_CFG", params) == left | {f"{wrapper}{each}" for each in dense}


@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "base_model.model"])
def test_wrappers_change_nothing(model, wrapper):
    """Law: a preset takes the same weights of a wrapped model, wherever in it the wrapper is."""
    parts = parameters(model)
    params = parts["left"] | parts["dense"] | parts["experts"]
    wanted = quantized_by("FP8_DEFAULT_CFG", params)
    for depth in range(6):
        names = {name: _wrapped(name, wrapper, depth) for name in params}
        found = quantized_by("FP8_DEFAULT_CFG", {names[name]: param for name, param in params.items()})
        assert found == {names[name] for name in wanted}


def _wrapped(name, wrapper, depth):
    """A name with a wrapper before its module at a depth, but not before a number, which stands in a list."""
    parts = name.split(".")
    at = min(depth, len(parts) - 1)
    return name if parts[at].isdigit() else ".".join([*parts[:at], wrapper, *parts[at:]])


class Expert(torch.nn.Module):
    """One expert, of which PEFT adapts the layer `up`."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 64, bias=False)


class Routed(torch.nn.Module):
    """A layer with attention, a router and experts, and an embedding: only its names matter."""

    def __init__(self):
        super().__init__()
        self.config = {}
        self.wte, self.q = torch.nn.Embedding(8, 64), torch.nn.Linear(64, 64, bias=False)
        self.mlp = torch.nn.ModuleDict({"gate": torch.nn.Linear(64, 2, bias=False)})
        self.mlp["experts"] = torch.nn.ModuleList(Expert() for _ in range(2))


KINDS = ["Lora", "LoHa", "LoKr", "HRA", "OFT", "BOFT", "Glora", "Delora", "RandLora", "LNTuning", "Hira"]


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it would like to have
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_are_left_alone(kind):
    """Law: whatever its kind, a preset takes of an adapted model what it takes of the plain one."""
    peft = pytest.importorskip("peft")
    plain = dict(Routed().named_parameters())
    targets = ["up", "q", "wte"] if kind == "Lora" else ["up", "q"]
    model = peft.get_peft_model(Routed(), getattr(peft, f"{kind}Config")(target_modules=targets))
    params = dict(model.named_parameters())
    assert len(params) > len(plain)
    for preset in ("FP8_DEFAULT_CFG", "FP8_EXPERTS_ONLY_CFG"):
        found = quantized_by(preset, params)
        assert {unwrapped(name) for name in found} == quantized_by(preset, plain)
        assert len(found) == len(quantized_by(preset, plain))


def test_the_raw_gate_of_megatrons_shared_experts_is_left_alone():
    """SharedExpertMLP.gate_weight [1, hidden] gates as a router does, and is no layer that ModelOpt quantizes."""
    params = expand(
        {
            "decoder.layers.{n}.mlp.shared_experts.gate_weight": (1, 128),
            "decoder.layers.{n}.mlp.linear_fc1.weight": HIDDEN,
        }
    )
    assert quantized_by("FP8_DEFAULT_CFG", params) == {f"decoder.layers.{n}.mlp.linear_fc1.weight" for n in LAYERS}


def test_every_preset_is_in_the_tables():
    """No preset without a test, none that the tables name only, and none by two names."""
    found = {name: value for name, value in vars(presets).items() if name.isupper() and name[0] != "_"}
    del found["EXCLUDED"]
    assert found.keys() == WHOLE.keys() | EXPERTS_ONLY.keys()
    assert len(set(found.values())) == len(found)


def test_every_format_has_both_kinds_of_preset():
    """Each format of weights is there for the whole model and for its experts only."""
    assert {weights for weights, _ in WHOLE.values()} == {weights for weights, _ in EXPERTS_ONLY.values()}


@pytest.mark.parametrize("preset", [name for name in EXPERTS_ONLY if name not in MODELOPT])
def test_our_own_presets_are_modelopts_for_the_experts(preset):
    """Law: an experts-only preset that ModelOpt has not is one that it has, with the rule for the experts alone."""
    name = next(name for name in WHOLE if name.startswith(preset.removesuffix("EXPERTS_ONLY_CFG")))  # its default
    whole = getattr(presets, name)[0]
    assert presets.experts_only(whole.weights, whole.inputs) == getattr(presets, preset)


def test_an_amax_of_each_experts_inputs_is_one_word_away():
    """Formats and weights stay, inputs of experts have one amax each in place of a shared one; twice is as once."""
    params = {f"experts.{i}.w1.weight": torch.empty(64, 32, device="meta") for i in range(3)}
    rules = presets.per_expert_inputs(presets.FP8_DEFAULT_CFG)
    shared, own = select(params, presets.FP8_DEFAULT_CFG), select(params, rules)
    assert (shared.inputs[0].leaf_shapes["amax"], own.inputs[0].leaf_shapes["amax"]) == ((1,), (3,))
    assert own.groups == shared.groups
    assert [i.format for i in own.inputs] == [i.format for i in shared.inputs]
    assert presets.per_expert_inputs(rules) == rules
    assert presets.per_expert_inputs(presets.W4A16_NVFP4_CFG) == presets.W4A16_NVFP4_CFG


@pytest.mark.parametrize("preset", [*WHOLE, *EXPERTS_ONLY])
def test_the_weights_of_a_preset_alone(preset):
    """Law: `weights_only` selects the same weights, in the same formats, and no inputs; twice is as once."""
    parts = parameters("Mixtral")
    params = parts["left"] | parts["dense"] | parts["experts"]
    rules = getattr(presets, preset)
    spec = select(params, presets.weights_only(rules))
    assert spec == replace(select(params, rules), inputs=())
    assert presets.weights_only(spec.rules) == spec.rules


@pytest.mark.parametrize("preset", [*WHOLE, *EXPERTS_ONLY])
def test_a_preset_is_rules_to_build_on(preset):
    """A preset is a tuple of rules: a later rule changes it for a layer, and the preset itself stays as it is."""
    rules = getattr(presets, preset)
    assert isinstance(rules, tuple)
    assert all(isinstance(rule, Rule) and not rule.required for rule in rules if rule.weights is None)
    parts = parameters("Mixtral")
    params = parts["left"] | parts["dense"] | parts["experts"]
    both = {name for name in quantized_by(preset, params) if ".layers.0." not in name}
    spec = select(params, [*rules, Rule("*.layers.0.*")])
    assert {name for group in spec.groups for name in group.names} == both
    assert getattr(presets, preset) is rules


@pytest.mark.parametrize("kind", ["whole_model", "experts_only"])
def test_a_preset_can_be_made_of_any_format(kind):
    """whole_model and experts_only are the presets' own functions: any format takes the place of theirs."""
    parts = parameters("Mixtral")
    params = parts["left"] | parts["dense"] | parts["experts"]
    wanted = parts["experts"].keys() | (parts["dense"].keys() if kind == "whole_model" else set())
    for format in FORMATS.values():
        spec = select(params, getattr(presets, kind)(format, FP8))
        assert names_of(spec.inputs) == wanted
        assert {name for group in spec.groups for name in group.names} == wanted
        assert {group.format for group in spec.groups} == {format}


@pytest.fixture(scope="module")
def modelopt():
    """ModelOpt's configurations, as it defines them; importing it warns about many things that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("modelopt.torch.quantization", reason="ModelOpt does not import")
        return importlib.import_module("modelopt.torch.quantization.config")


def decide(config, name, shape, role="weight"):
    """What a ModelOpt configuration makes of a parameter: its quantizer's numbers, or None. The last entry wins."""
    if len(shape) == 1:
        return None  # norms and biases have no quantizer
    quantizer = re.sub(r"\.weight\d*$", ".weight", name)
    quantizer = quantizer.removesuffix("weight") if quantizer.endswith(".weight") else f"{quantizer}_"
    quantizer = f"{quantizer}{role}_quantizer"
    decision = None
    for entry in config["quant_cfg"]:
        of_class = {"nn.Embedding": "embed" in name, None: True}.get(entry.get("parent_class"), False)
        if of_class and fnmatchcase(quantizer, entry["quantizer_name"]):
            decision = entry.get("cfg", decision) if entry.get("enable", True) else None
    return decision


@pytest.mark.parametrize("role", ["weight", "input"])
@pytest.mark.parametrize(
    ("preset", "model"),
    [(preset, model) for preset in MODELOPT for model in (MIXTURES if preset in EXPERTS_ONLY else MODELS)],
)
def test_modelopt_quantizes_the_same(modelopt, preset, model, role):
    """ModelOpt's configuration of the name, read as it reads it, enables exactly these quantizers, name by name."""
    parts = parameters(model)
    params = parts["left"] | parts["dense"] | parts["experts"]
    config = getattr(modelopt, preset)
    theirs = {name for name, param in params.items() if decide(config, name, param.shape, role) is not None}
    spec = select(params, getattr(presets, preset))
    assert names_of(spec.groups if role == "weight" else spec.inputs) == theirs


@pytest.mark.parametrize("role", ["weight", "input"])
@pytest.mark.parametrize("preset", MODELOPT)
def test_modelopt_has_the_same_numbers(modelopt, preset, role):
    """Element, block, scale and who sets it, from ModelOpt's num_bits, axis and block_sizes."""
    numbers = decide(getattr(modelopt, preset), "model.layers.0.mlp.experts.0.up_proj.weight", HIDDEN, role)
    format = (WHOLE | EXPERTS_ONLY)[preset][role == "input"]
    assert (format is None) == (numbers is None)
    if format is None:
        return
    blocks = dict(numbers.get("block_sizes") or {})
    bits = numbers["num_bits"]
    if isinstance(bits, int) and blocks.get("scale_bits") == (8, 0):  # its integers are 64 times OCP's INT8
        assert (format.element.mantissa_bits, 64 * format.element.max) == (bits - 1, 2 ** (bits - 1) - 1)
    elif isinstance(bits, int):
        assert format.element == IntElement(2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        assert (format.element.exponent_bits, format.element.mantissa_bits) == tuple(bits)
    if blocks:  # a block of None along `in` is a whole row, which is a token
        assert format.block == (blocks.get(-2, 1), blocks[-1])
    else:
        assert format.block == {None: (None, None), 0: (1, None)}[numbers["axis"]]
    assert format.scale == {None: "fp32", (4, 3): "e4m3", (8, 0): "e8m0"}[blocks.get("scale_bits")]
    # Scales of one token are made from the token, whatever the format says of weights.
    per_token = role == "input" and format.block == (1, None)
    assert (format.dynamic or per_token) == ("dynamic" in (blocks.get("type"), numbers.get("type")))


def test_the_other_names_are_not_modelopts(modelopt):
    """Kills a name that is taken from ModelOpt and means something else there."""
    assert not [preset for preset in WHOLE | EXPERTS_ONLY if preset not in MODELOPT and hasattr(modelopt, preset)]
