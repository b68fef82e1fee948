"""Tiny models of transformers and Megatron, and what tests of exports do with them."""

import copy
from functools import cache, partial

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.files import shards
from fq_transforms.export.names.from_memory import file_tensors

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, HIDDEN, INNER, EXPERTS, LAYERS = 32, 256, 128, 3, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": ("MixtralConfig", {"intermediate_size": INNER, "num_local_experts": EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "moe_intermediate_size": INNER,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_nextn_predict_layers": 0,  # transformers has 1 by default, and leaves the layer out
        },
    ),
}
MODELS |= {
    "olmoe": (
        "OlmoeConfig",
        {"num_key_value_heads": 4, "intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "intermediate_size": 64,
            "moe_intermediate_size": INNER,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "head_dim": 64,
            "num_nextn_predict_layers": 0,
        },
    ),
}
TOKENS = torch.arange(VOCABULARY)[None]
# All that compressed-tensors has a name for, and all that ModelOpt has without inputs.
COMPRESSED = [
    *(fqt.NVFP4, fqt.NVFP4_STATIC, fqt.INT4_BLOCK32, fqt.INT4_BLOCK128, fqt.INT8, fqt.INT8_PER_CHANNEL),
    *(fqt.FP8, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK, fqt.MXFP8, fqt.MXFP6_E2M3, fqt.MXFP4),
]
MODELOPT = [
    *(fqt.NVFP4, fqt.NVFP4_STATIC, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK, fqt.MXFP8, fqt.INT8_PER_CHANNEL),
]
to_compressed_tensors = fqt.export.save
to_modelopt = partial(fqt.export.save, layout="modelopt")
TARGETS = pytest.mark.parametrize("target", [to_compressed_tensors, to_modelopt], ids=["ct", "mo"])
GATE_UP = [("gate_proj", "up_proj")]


def build(kind="qwen3_moe", **options):
    """A tiny model in bf16, no two experts of one magnitude, and its tensors: copies that may be written to."""
    model = copy.deepcopy(_built(kind, tuple(options.items())))
    return model, model.state_dict()


@cache
def _built(kind, options):
    name, own = MODELS[kind]
    config = getattr(transformers, name)(**COMMON | own | dict(options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for name, param in model.state_dict().items():
            # Drawn in fp32: bf16's own normal_ ends at one value, and then gate and up share an amax (PyTorch 2.11).
            if param.dim() > 1:
                param.copy_(0.02 * torch.randn(param.shape))
            if ".experts." in name:
                param.mul_(2.0 ** torch.arange(EXPERTS)[:, None, None])
    return model


def in_lists(params):
    """The same model with separate experts, three matrices each, as before transformers 5."""
    found = {name: param for name, param in params.items() if ".experts." not in name}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp.experts"
        for e in range(EXPERTS):
            gate, up = params[f"{block}.gate_up_proj"][e].chunk(2)
            for role, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", params[f"{block}.down_proj"][e])):
                found[f"{block}.{e}.{role}.weight"] = weight.contiguous()
    return found


def megatron_of(params, config, layout):
    """A Megatron model's tensors with the weights of a transformers model: the inverse of the table, by hand."""
    found = {
        "embedding.word_embeddings.weight": params["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": params["model.norm.weight"],
        "output_layer.weight": params["lm_head.weight"],
    }
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    for n in range(config.num_hidden_layers):
        old, new = f"model.layers.{n}.", f"decoder.layers.{n}."
        q, k, v = (params[f"{old}self_attn.{x}_proj.weight"] for x in "qkv")
        dim = q.shape[0] // heads
        blocks = []
        for g in range(groups):
            per = heads // groups
            blocks += [q[g * per * dim : (g + 1) * per * dim], k[g * dim : (g + 1) * dim], v[g * dim : (g + 1) * dim]]
        found[f"{new}self_attention.linear_qkv.weight"] = torch.cat(blocks)
        found[f"{new}self_attention.linear_qkv.layer_norm_weight"] = params[f"{old}input_layernorm.weight"]
        found[f"{new}self_attention.linear_proj.weight"] = params[f"{old}self_attn.o_proj.weight"]
        for x in "qk":
            if f"{old}self_attn.{x}_norm.weight" in params:
                found[f"{new}self_attention.{x}_layernorm.weight"] = params[f"{old}self_attn.{x}_norm.weight"]
        found[f"{new}pre_mlp_layernorm.weight"] = params[f"{old}post_attention_layernorm.weight"]
        found[f"{new}mlp.router.weight"] = params[f"{old}mlp.gate.weight"]
        for e in range(EXPERTS):
            name = f"linear_fc1.weight{e}" if layout == "te" else f"local_experts.{e}.linear_fc1.weight"
            found[f"{new}mlp.experts.{name}"] = params[f"{old}mlp.experts.gate_up_proj"][e].clone()
            name = name.replace("fc1", "fc2")
            found[f"{new}mlp.experts.{name}"] = params[f"{old}mlp.experts.down_proj"][e].clone()
    return found


def calibrated(params, format, rules="*.experts.*", transposed=()):
    """A Transform and its state, gate and up tied where they are two."""
    fq = fqt.transform(fqt.select(params, {rules: format}, transposed=transposed))
    state = fq.calibrate(params)
    return fq, fqt.tie(state, GATE_UP) if any("gate_proj" in key for key in state) else state


def exported(target, folder, params, format, config, rules="*.experts.*", transposed=(), **options):
    """The same, once they are exported to a folder."""
    fq, state = calibrated(params, format, rules, transposed)
    target(folder, fq, params, state, config=config, **options)
    return fq, state


def weights_only(fq):
    """The Transform of the weights alone."""
    return fqt.transform(fqt.Spec(fq.spec.groups))


def of_each_expert(spec, first=1.0):
    """A state of inputs, no two experts and layers with the same amax; gate, up, q, k and v of a layer alike."""
    state = {}
    for inputs in spec.inputs:
        layer = next(int(word) for word in inputs.key.split(".") if word.isdigit())
        offset = first + 16 * layer + (8 if "down_proj" in inputs.key or "fc2" in inputs.key else 0)
        amax = offset + torch.arange(inputs.leaf_shapes["amax"][0])
        state[inputs.key] = {"amax": amax, "tokens": torch.ones(inputs.experts, dtype=torch.float64)}
    return state


def read(folder):
    """All tensors of a folder."""
    with shards.Files(folder) as opened:
        return {name: opened.read(name) for name in opened.places}


def write(folder, tensors, documents, limit=10**9):
    """A folder of these tensors."""
    types = {name: (shards.type_of(tensor), tensor.nbytes) for name, tensor in tensors.items()}
    shards.write(folder, types, tensors.items(), documents, limit)


def in_files(weights, config):
    """Weights by their names in files, stacks taken apart."""
    found = {}
    tensors = file_tensors({name: tuple(weight.shape) for name, weight in weights.items()}, config)
    for source, weight in weights.items():
        for name, rows in tensors[source]:
            if "*" in name:
                found |= {name.replace("*", str(e)): expert[rows] for e, expert in enumerate(weight)}
            else:
                found[name] = weight[rows]
    return found


def bits_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_equal(found, wanted):
    """The same names, shapes and numbers; a zero's sign, which integer codes cannot hold, aside."""
    _assert_equal(found, wanted, lambda tensor: tensor)


def assert_same_bytes(found, wanted):
    """The same names, shapes, dtypes and bytes."""
    _assert_equal(found, wanted, bits_of)


def _assert_equal(found, wanted, of):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(of(found[name]), of(tensor)), name
