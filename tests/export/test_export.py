"""Export: files that the real libraries read to `fakequant`'s values, and refusals before a byte is written."""

import json
import subprocess
import sys
from dataclasses import replace

import optree
import pytest
import torch
from safetensors import safe_open
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.export import files
from fq_transforms.export.compressed_tensors import multipliers
from fq_transforms.export.names import file_names, parts
from fq_transforms.formats import FORMATS, IntElement
from tests.cases import assert_names, name_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

VOCABULARY, HIDDEN, INNER, EXPERTS = 32, 256, 128, 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
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
        },
    ),
}
NAMED = [
    *(fqt.NVFP4, fqt.NVFP4_STATIC, fqt.INT4_BLOCK32, fqt.INT4_BLOCK128, fqt.INT8, fqt.INT8_PER_CHANNEL),
    *(fqt.FP8, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK, fqt.MXFP8, fqt.MXFP6_E2M3, fqt.MXFP4),
]
CONVENTIONS = [FORMATS[name] for name in ("INT4_BLOCK32_KIMI", "NVFP4_TRANSFORMER_ENGINE", "MXFP4_OCP")]
MODELOPT = [
    *(fqt.NVFP4, fqt.NVFP4_STATIC, fqt.FP8, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK, fqt.MXFP8, fqt.INT8_PER_CHANNEL),
]
TOKENS = torch.arange(VOCABULARY)[None]


def build(kind="qwen3_moe", **options):
    """A tiny model in bf16, no two experts of one magnitude, and its tensors."""
    name, own = MODELS[kind]
    config = getattr(transformers, name)(**COMMON | own | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    params = model.state_dict()
    with torch.no_grad():
        for name, param in params.items():
            if ".experts." in name:
                param.mul_(2.0 ** torch.arange(EXPERTS)[:, None, None])
    return model, params


def in_lists(params):
    """The same model with separate experts, three matrices each, as before transformers 5."""
    found = {name: param for name, param in params.items() if ".experts." not in name}
    for layer in range(COMMON["num_hidden_layers"]):
        block = f"model.layers.{layer}.mlp.experts"
        for e in range(EXPERTS):
            gate, up = params[f"{block}.gate_up_proj"][e].chunk(2)
            for role, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", params[f"{block}.down_proj"][e])):
                found[f"{block}.{e}.{role}.weight"] = weight.contiguous()
    return found


def exported(target, params, format, config, folder, rules="*.experts.*", **options):
    fq = fqt.transform(fqt.select(params, {rules: format}))
    state = fq.calibrate(params)
    if any("gate_proj" in key for key in state):
        state = fqt.tie(state, [("gate_proj", "up_proj")])
    target(params, state, folder, spec=fq.spec, config=config, **options)
    return fq, state


def read(folder):
    """All tensors of a checkpoint."""
    with files.Files(folder) as opened:
        return {name: opened.read(name) for name in opened.shards}


def in_files(weights, config):
    """Weights by their names in files, stacks taken apart."""
    found = {}
    for source, weight in weights.items():
        for name, rows in parts(source, tuple(weight.shape[-2:]), config):
            if "*" in name:
                found |= {name.replace("*", str(e)): expert[rows] for e, expert in enumerate(weight)}
            else:
                found[name] = weight[rows]
    return found


# compressed-tensors


@pytest.mark.parametrize("layout", ["stacked", "lists"])
@pytest.mark.parametrize("format", NAMED + CONVENTIONS, ids=name_of)
def test_compressed_tensors_reads_the_files(format, layout, tmp_path):
    """Its own decompressors give fakequant's bf16 weights, each; and what is not quantized is as it was."""
    model, params = build()
    if layout == "lists":
        params = in_lists(params)
    fq, state = exported(fqt.export.compressed_tensors, params, format, model.config, tmp_path / "a")
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    wanted = in_files(fq.fakequant(params, state), model.config.to_dict())
    found = read(tmp_path / "b")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert not all(
        torch.equal(found[name], weight) for name, weight in in_files(params, {"model_type": "olmoe"}).items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "granules"), [(fqt.INT4_BLOCK32, 0), (fqt.INT8, 15)], ids=["INT4", "INT8"])
def test_products_give_the_quotients(format, granules, dtype):
    """Readers multiply where fakequant divides: a multiplier is found by which every code comes out right.

    The reciprocal alone would miss some codes; for INT8 a few granules of a hundred thousand have no such multiplier.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(3 * torch.randn(100_000, generator=generator))
    s = format.element.qmax / (torch.rand(100_000, generator=generator) * spread)
    q = torch.arange(float(format.element.low), format.element.high + 1)

    def wrong(multiplier):
        return ((q * multiplier[:, None]).to(dtype) != (q / s[:, None]).to(dtype)).any(1)

    found = multipliers(s, format.element, dtype)
    assert int(wrong(found).sum()) <= granules
    assert int(wrong(s.reciprocal()).sum()) > granules
    assert int((found.view(torch.int32) - s.reciprocal().view(torch.int32)).abs().max()) <= 2


def test_zero_experts_are_zero(tmp_path):
    """An expert without weights has scales of 0, whose reciprocal is infinite: it reads as zeros, not as NaN."""
    model, params = build()
    for name in list(params):
        if ".experts." in name:
            params[name] = params[name].clone()
            params[name][1] = 0
    for format in NAMED:
        fq, state = exported(fqt.export.compressed_tensors, params, format, model.config, tmp_path / format.name)
        stored = read(tmp_path / format.name)
        assert all(t.isfinite().all() for t in stored.values() if t.dtype in (torch.float32, torch.bfloat16))
        fqt.export.decompress(tmp_path / format.name, tmp_path / f"{format.name}_plain")
        found = read(tmp_path / f"{format.name}_plain")
        wanted = in_files(fq.fakequant(params, state), model.config.to_dict())
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("format", NAMED, ids=name_of)
def test_decompressed_files_have_the_logits_of_the_fake_quantized_model(kind, format, tmp_path):
    """from_pretrained of what `decompress` has written: the class, the names and every weight are right."""
    model, params = build(kind)
    fq, state = exported(fqt.export.compressed_tensors, params, format, model.config, tmp_path / "a")
    with torch.no_grad():
        wanted = functional_call(model, fq.fakequant(params, state), (TOKENS,)).logits
        original = model(TOKENS).logits
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        found = loaded(TOKENS).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(found, original)


# What transformers 5.23 makes of the compressed files themselves, where experts are quantized.
LOADED_BY_TRANSFORMERS = {
    "FP8": "exact",
    "FP8_PER_CHANNEL": "exact",
    "MXFP4": "exact",
    "MXFP6_E2M3": "exact",
    "INT4_BLOCK32": "in fp32",
    "NVFP4": "wrong",
    "INT8": "raises",
    "INT8_PER_CHANNEL": "raises",
    "FP8_BLOCK": "raises",
    "MXFP8": "raises",
}


@pytest.mark.parametrize("name", LOADED_BY_TRANSFORMERS)
def test_what_transformers_loads_without_us(name, tmp_path):
    """The table of the README: exact, raises, or (NVFP4, whose global scale it drops) wrong without a word."""
    model, params = build()
    fq, state = exported(fqt.export.compressed_tensors, params, FORMATS[name], model.config, tmp_path / "a")
    if LOADED_BY_TRANSFORMERS[name] == "raises":
        with pytest.raises(RuntimeError, match="conversion"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        return
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    weights, found = fq.fakequant(params, state), loaded.state_dict()
    equal = all(torch.equal(found[name].bfloat16(), weight) for name, weight in weights.items())
    assert equal == (LOADED_BY_TRANSFORMERS[name] != "wrong")
    if LOADED_BY_TRANSFORMERS[name] == "exact":
        with torch.no_grad():
            wanted = functional_call(model, weights, (TOKENS,)).logits
            assert torch.equal(loaded(TOKENS).logits, wanted)


def test_ragged_square_blocks(tmp_path):
    """A weight whose edges cut blocks of 128 x 128: the last row and column of scales stand for less."""
    params = {"model.ragged.weight": torch.randn(130, 200).bfloat16()}
    config = {"model_type": "any", "architectures": ["Any"]}
    for target, name in ((fqt.export.compressed_tensors, "ct"), (fqt.export.modelopt_hf, "mo")):
        fq, state = exported(target, params, fqt.FP8_BLOCK, config, tmp_path / name, rules="*")
        assert read(tmp_path / name)["model.ragged.weight_scale"].numel() == 4
    fqt.export.decompress(tmp_path / "ct", tmp_path / "plain")
    found = read(tmp_path / "plain")["model.ragged.weight"]
    assert torch.equal(found, fq.fakequant(params, state)["model.ragged.weight"])


def test_several_formats(tmp_path):
    """One scheme a format, each with the modules that it is for: the decompressed weights are right for all."""
    model, params = build()
    rules = {"*.experts.gate_up*": fqt.NVFP4, "*.experts.down*": fqt.FP8, "*o_proj*": fqt.MXFP4, "lm_head*": fqt.INT8}
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params)
    fqt.export.compressed_tensors(params, state, tmp_path / "a", spec=fq.spec, config=model.config)
    about = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert about["format"] == "mixed-precision"
    assert [group["targets"][0] for group in about["config_groups"].values()] == [
        r"re:^model\.layers\.0\.self_attn\.o_proj$",
        r"re:^model\.layers\.0\.mlp\.experts\.\d+\.gate_proj$",
        r"re:^model\.layers\.0\.mlp\.experts\.\d+\.down_proj$",
        r"re:^lm_head$",
    ]
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    found, wanted = read(tmp_path / "b"), in_files(fq.fakequant(params, state), model.config.to_dict())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


# ModelOpt


def of_experts(mtq, name, inputs=None):
    """A configuration of ModelOpt's, experts only: of weights, and of inputs if told so."""
    bits = {"FP8": (4, 3), "FP8_PER_CHANNEL": (4, 3), "FP8_BLOCK": (4, 3), "MXFP8": (4, 3), "INT8_PER_CHANNEL": 8}
    blocks = {
        "FP8_BLOCK": {-1: 128, -2: 128},
        "NVFP4": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
        "MXFP8": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
    }
    own = {"num_bits": bits.get(name, (2, 1))}
    if name in blocks:
        own["block_sizes"] = blocks[name]
    else:
        own["axis"] = 0 if "CHANNEL" in name else None
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*mlp.experts*weight_quantizer*", "cfg": own}]
    if inputs is not None:
        rules.append({"quantizer_name": "*mlp.experts*input_quantizer", "cfg": inputs})
    return {"quant_cfg": rules, "algorithm": "max"}


def round_amax_up(model, largest):
    """Every amax becomes `largest` times a power of two: then the exporter's bf16 quotients are exact."""
    for name, amax in model.named_buffers():
        if name.endswith("._amax") and "weight_quantizer" in name:
            amax.copy_(largest * torch.exp2(torch.ceil(torch.log2(amax.float() / largest))))


LARGEST = {"FP8": 448, "FP8_PER_CHANNEL": 448, "FP8_BLOCK": 448, "INT8_PER_CHANNEL": 127}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", [f for f in MODELOPT if f is not fqt.NVFP4_STATIC], ids=name_of)
def test_modelopt_writes_the_same(format, kind, tmp_path):
    """Its export_hf_checkpoint of the same model with the same amax: every name, shape, dtype and bit; both configs."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    exporter = pytest.importorskip("modelopt.torch.export")
    inner = {"intermediate_size": 256} if kind == "mixtral" else {"moe_intermediate_size": 256}
    model, params = build(kind, **inner)
    params = {name: tensor.clone() for name, tensor in params.items()}
    model = mtq.quantize(model, of_experts(mtq, format.name), lambda m: m(TOKENS))
    if format.name in LARGEST:
        round_amax_up(model, LARGEST[format.name])
    spec = fqt.select(params, {"*.experts.*": format})
    state = {group.key: fqt.state.Stateless() for group in spec.groups}
    if not format.is_stateless:
        state = fqt.checkpoint.modelopt.read(model.state_dict(), spec)
    fqt.export.modelopt_hf(params, state, tmp_path / "ours", spec=spec, config=model.config)
    exporter.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    if kind == "mixtral" and format is fqt.FP8_BLOCK:
        # It warns that it cannot name Mixtral's experts as files do where scales have four axes.
        for role, in_file in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("mlp", "block_sparse_moe")):
            theirs = {name.replace(f".{role}.", f".{in_file}."): tensor for name, tensor in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (wanted.shape, wanted.dtype), name
        assert torch.equal(bits_of(ours[name]), bits_of(wanted)), name
    files_of = [json.loads((tmp_path / who / "hf_quant_config.json").read_text()) for who in ("ours", "theirs")]
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    for own in files_of:  # it lists what it found no quantizer in, we every matrix that is not quantized
        own["quantization"].pop("exclude_modules")
    assert files_of[0] == files_of[1]
    for config in configs:
        config["quantization_config"].pop("ignore")
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


INPUTS = {
    "FP8": (fqt.FP8, fqt.FP8, {"num_bits": (4, 3), "axis": None}),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        *(fqt.FP8_PER_CHANNEL, fqt.FP8_PER_CHANNEL),
        {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
    ),
    "W8A8_SQ_PER_CHANNEL": (fqt.INT8_PER_CHANNEL, fqt.INT8, {"num_bits": 8, "axis": None}),
    "NVFP4": (
        *(fqt.NVFP4, fqt.NVFP4),
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    ),
    "MXFP8": (
        *(fqt.MXFP8, fqt.MXFP8),
        {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    ),
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", INPUTS)
def test_modelopt_writes_the_same_input_scales(name, kind, tmp_path):
    """Inputs calibrated by each library by itself, weights too but where its codes are quotients in bf16: every bit."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    exporter = pytest.importorskip("modelopt.torch.export")
    format, of_inputs, theirs_of_inputs = INPUTS[name]
    inner = {"intermediate_size": 256} if kind == "mixtral" else {"moe_intermediate_size": 256}
    model, params = build(kind, **inner)
    model.config._experts_implementation = "eager"  # the only one whose linears ModelOpt sees
    params = {name: tensor.clone() for name, tensor in params.items()}
    spec = fqt.select(params, [fqt.Rule("*.experts.*", format, of_inputs)])
    state = fqt.calibrate(params, [TOKENS], spec=spec, model=model)
    model = mtq.quantize(model, of_experts(mtq, format.name, theirs_of_inputs), lambda m: m(TOKENS))
    if format.name in LARGEST:
        round_amax_up(model, LARGEST[format.name])
        weights = replace(spec, inputs=())
        state |= fqt.checkpoint.modelopt.read(model.state_dict(), weights)
    fqt.export.modelopt_hf(params, state, tmp_path / "ours", spec=spec, config=model.config)
    exporter.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for tensor, wanted in theirs.items():
        assert (ours[tensor].shape, ours[tensor].dtype) == (wanted.shape, wanted.dtype), tensor
        assert torch.equal(bits_of(ours[tensor]), bits_of(wanted)), tensor
    scales = [tensor for tensor in theirs if tensor.endswith("input_scale")]
    assert len(scales) == (0 if of_inputs in (fqt.FP8_PER_CHANNEL, fqt.MXFP8) else 2 * 3 * EXPERTS)
    files_of = [json.loads((tmp_path / who / "hf_quant_config.json").read_text()) for who in ("ours", "theirs")]
    for own in files_of:
        own["quantization"].pop("exclude_modules")
    assert files_of[0] == files_of[1]
    assert files_of[0]["quantization"]["quant_algo"] == name
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["quantization_config"].pop("ignore")
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
def test_modelopt_writes_the_same_input_scales_of_whole_models(name, tmp_path):
    """Presets, attention and experts, each calibrated by its own library: all names, and each input scale's bits."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    exporter = pytest.importorskip("modelopt.torch.export")
    model, params = build(moe_intermediate_size=256)
    model.config._experts_implementation = "eager"
    params = {name: tensor.clone() for name, tensor in params.items()}
    spec = fqt.select(params, getattr(fqt.presets, name))
    state = fqt.calibrate(params, [TOKENS], spec=spec, model=model)
    state = fqt.tie(state, [("q_proj", "k_proj"), ("q_proj", "v_proj")]) if name != "MXFP8_DEFAULT_CFG" else state
    model = mtq.quantize(model, getattr(mtq, name), lambda m: m(TOKENS))
    fqt.export.modelopt_hf(params, state, tmp_path / "ours", spec=spec, config=model.config)
    exporter.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    scales = [tensor for tensor in theirs if tensor.endswith("input_scale")]
    assert len(scales) == (0 if name == "MXFP8_DEFAULT_CFG" else 2 * (4 + 3 * EXPERTS))
    for tensor in scales if "P4" not in name else theirs:
        assert torch.equal(bits_of(ours[tensor]), bits_of(theirs[tensor])), tensor


def of_each_expert(spec, first=1.0):
    """Inputs of a spec, no two experts and layers with the same amax; gate, up, q, k and v of a layer alike."""
    state = {}
    for inputs in spec.inputs:
        layer = next(int(word) for word in inputs.key.split(".") if word.isdigit())
        offset = first + 16 * layer + (8 if "down_proj" in inputs.key or "fc2" in inputs.key else 0)
        amax = offset + torch.arange(inputs.leaf_shapes["amax"][0])
        state[inputs.key] = fqt.state.InputAmax(amax, torch.ones(inputs.experts, dtype=torch.float64))
    return state


@pytest.mark.parametrize("layout", ["stacked", "lists", "te", "sequential"])
def test_input_scales_of_each_expert(layout, tmp_path):
    """An amax an expert, from any layout in memory: each file has its own expert's; q, k and v share theirs."""
    model, params = build()
    params = {
        "stacked": lambda: params,
        "lists": lambda: in_lists(params),
        "te": lambda: megatron_of(params, model.config, "te"),
        "sequential": lambda: megatron_of(params, model.config, "sequential"),
    }[layout]()
    both = {"weights": fqt.NVFP4, "inputs": fqt.NVFP4, "required": False}
    dense = [fqt.Rule(pattern, **both) for pattern in ("*self_attn.[qkv]*_proj*", "*linear_qkv.weight")]
    spec = fqt.select(params, [fqt.Rule("*.experts.*", **both, per_expert_inputs=True), *dense])
    state = fqt.calibrate(params, spec=replace(spec, inputs=())) | of_each_expert(spec)
    pairs = [("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("q_proj", "v_proj")]
    state = fqt.tie(state, [pair for pair in pairs if any(pair[0] in key.split(".") for key in state)])
    fqt.export.modelopt_hf(params, state, tmp_path / "a", spec=spec, config=model.config)
    stored = read(tmp_path / "a")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("input_scale")}
    assert len(scales) == 2 * (3 + 3 * EXPERTS)
    for layer in range(2):
        of_layer = f"model.layers.{layer}"
        for role in "qkv":
            assert scales[f"{of_layer}.self_attn.{role}_proj.input_scale"] == (1.0 + 16 * layer) / (6 * 448)
        for e in range(EXPERTS):
            for role, offset in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 8)):
                wanted = torch.tensor(1.0 + 16 * layer + offset + e) / (6 * 448)
                assert scales[f"{of_layer}.mlp.experts.{e}.{role}.input_scale"] == wanted, (layer, e, role)


def test_unseen_experts_from_weights_are_tied(tmp_path):
    """What `finish` makes of an expert without tokens differs between gate and up: refused, and tied as told."""
    model, params = build()
    lists = in_lists(params)
    spec = fqt.select(lists, [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8, per_expert_inputs=True)])
    state = fqt.tie(fqt.calibrate(lists, spec=replace(spec, inputs=())), [("gate_proj", "up_proj")])
    state |= of_each_expert(spec)
    for key, entry in state.items():
        if key.endswith(".input"):
            state[key] = entry._replace(amax=torch.where(torch.arange(EXPERTS) == 1, -torch.inf, entry.amax))
    state = fqt.finish(state, spec=spec, unseen="from-weights", params=lists)
    options = {"spec": spec, "config": model.config}
    with pytest.raises(
        ValueError, match=r"for expert 1, wanted one: .* fqt.tie\(state, \[\('gate_proj', 'up_proj'\)\]\)"
    ):
        fqt.export.modelopt_hf(lists, state, tmp_path / "a", **options)
    fqt.export.modelopt_hf(lists, fqt.tie(state, [("gate_proj", "up_proj")]), tmp_path / "a", **options)


def test_tied_inputs_are_exported(tmp_path):
    """What the error about inputs that are not tied tells to do."""
    spec, state, *_ = faults_of_inputs()["not tied"]
    model, params = build()
    fqt.export.modelopt_hf(
        in_lists(params),
        fqt.tie(state, [("gate_proj", "up_proj")]),
        tmp_path / "a",
        spec=spec,
        config=model.config,
    )
    stored, block = read(tmp_path / "a"), "model.layers.1.mlp.experts.0"
    assert stored[f"{block}.gate_proj.input_scale"] == stored[f"{block}.up_proj.input_scale"] == 2.0 / 448
    assert stored[f"{block}.down_proj.input_scale"] == 1.0 / 448


def test_modelopt_mixed_inputs(tmp_path):
    """Weights alone beside weights with inputs: each module by its algorithm."""
    model, params = build()
    rules = [fqt.Rule("*.experts.*", fqt.NVFP4), fqt.Rule("*layers.0.*.experts.*", fqt.NVFP4, fqt.NVFP4)]
    spec = fqt.select(params, rules)
    state = fqt.calibrate(params, [TOKENS], spec=spec, model=model)
    fqt.export.modelopt_hf(params, state, tmp_path / "a", spec=spec, config=model.config)
    own = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    found = {layer: own[f"model.layers.{layer}.mlp.experts.0.up_proj"]["quant_algo"] for layer in range(2)}
    assert found == {0: "NVFP4", 1: "W4A16_NVFP4"}
    with_scale = {name for name in read(tmp_path / "a") if name.endswith("input_scale")}
    roles = [(e, role) for e in range(EXPERTS) for role in ("gate_proj", "up_proj", "down_proj")]
    assert with_scale == {f"model.layers.0.mlp.experts.{e}.{role}.input_scale" for e, role in roles}


def faults_of_inputs():
    lists = in_lists(build()[1])
    gate, up = (f"model.layers.1.mlp.experts.*.{role}.weight" for role in ("gate_proj", "up_proj"))
    fp8 = fqt.FP8
    spec = fqt.select(lists, [fqt.Rule("*.experts.*", fp8, fp8)])
    state = fqt.tie(fqt.calibrate(lists, spec=replace(spec, inputs=())), [("gate_proj", "up_proj")])
    for inputs in spec.inputs:
        state[inputs.key] = fqt.state.InputAmax(torch.ones(1), torch.ones(EXPERTS, dtype=torch.float64))

    def with_amax(value):
        return state | {f"{up}.input": state[f"{up}.input"]._replace(amax=torch.tensor([value]))}

    def after(*first, **last):
        return fqt.select(lists, [fqt.Rule("*.experts.*", *first), fqt.Rule(**last)])

    both = {"weights": fp8, "inputs": fp8}
    other = after(fp8, pattern="*.experts.*", weights=fp8, inputs=fqt.NVFP4)
    gate_only, up_only, down_only = (after(fp8, pattern=f"*{role}_proj*", **both) for role in ("gate", "up", "down"))
    alone = after(None, fp8, pattern="*down_proj*", **both)
    first_layer = after(fp8, pattern="*layers.0.*.experts.*", **both)
    mixed = after(fp8, fp8, pattern="*up_proj*", **both, per_expert_inputs=True)
    each = after(fp8, pattern="*.experts.*", **both, per_expert_inputs=True)
    of_experts = state | of_each_expert(each)
    of_mixed = {key: (of_experts if "up_proj" in key else state)[key] for key in state}
    down = up.replace("up_proj", "down_proj")
    one_is_zero = of_experts | {
        f"{down}.input": of_experts[f"{down}.input"]._replace(amax=torch.tensor([1.0, 0.0, 1.0]))
    }
    return {
        "not tied": (spec, with_amax(2.0), f"{gate}.input", f"{up}.input", "1.0 and 2.0", "fqt.tie"),
        "zero": (spec, with_amax(0.0) | {f"{gate}.input": with_amax(0.0)[f"{up}.input"]}, "found 0.0 for all experts"),
        "zero for one": (
            each,
            one_is_zero,
            f"{down}.input.amax",
            "found 0.0 for expert 1 of 3",
        ),
        "too small": (
            spec,
            with_amax(1e-38) | {f"{gate}.input": with_amax(1e-38)[f"{up}.input"]},
            f"{gate}.input.amax",
            "cannot divide by",
        ),
        "one beside one an expert": (mixed, of_mixed, "gate_proj.weight.input", "found 1 and 3 amax", "per_expert"),
        "inputs of some weights": (first_layer, state, "layers.0", "layers.1", "FP8 and none", "all modules in FP8"),
        "never calibrated": (spec, with_amax(-torch.inf), up, "no token"),
        "no name for the pair": (other, state, "NVFP4", "beside weights in FP8", "no name"),
        "no weights": (alone, state, "gate_proj.weight.input", "no quantized weights"),
        "inputs of some roles": (down_only, state, "gate_proj", "down_proj", "none and FP8", "all experts of"),
        "no weights at all": (
            fqt.select(lists, [fqt.Rule("*.experts.*", inputs=fp8)]),
            state,
            "found no weights in the spec",
            "inputs of 6 groups",
        ),
        "the first of what is fused": (gate_only, state, "up_proj.weight.input'", "FP8 and not quantized"),
        "the second of what is fused": (up_only, state, "up_proj.weight.input'", "not quantized and FP8"),
    }


@pytest.mark.parametrize("name", faults_of_inputs())
def test_faults_of_inputs_are_found_before_a_byte_is_written(name, tmp_path):
    """Each names the inputs, what was found and what was wanted; the folder is not made."""
    model, params = build()
    spec, state, *fragments = faults_of_inputs()[name]
    keys = [group.key for group in spec.all_groups]
    with pytest.raises(ValueError) as caught:
        fqt.export.modelopt_hf(
            in_lists(params), {key: state[key] for key in keys}, tmp_path / "a", spec=spec, config=model.config
        )
    assert_names(str(caught.value), *fragments, "found", "wanted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", [fqt.FP8, fqt.FP8_PER_CHANNEL], ids=name_of)
def test_where_modelopt_differs_under_any_amax(format, tmp_path):
    """Its scale amax / 448 is at most a step of fp32 from ours; its codes, of bf16 quotients, at most a step."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    exporter = pytest.importorskip("modelopt.torch.export")
    model, params = build()
    params = {name: tensor.clone() for name, tensor in params.items()}
    model = mtq.quantize(model, of_experts(mtq, format.name), lambda m: m(TOKENS))
    spec = fqt.select(params, {"*.experts.*": format})
    state = fqt.checkpoint.modelopt.read(model.state_dict(), spec)
    fqt.export.modelopt_hf(params, state, tmp_path / "ours", spec=spec, config=model.config)
    exporter.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    count = differ = 0
    for name, wanted in theirs.items():
        if name.endswith("weight_scale"):
            assert (ours[name].view(torch.int32) - wanted.view(torch.int32)).abs().max() <= 1
        elif f"{name}_scale" in theirs:
            steps = (ours[name].view(torch.uint8).int() - wanted.view(torch.uint8).int()).abs()
            assert steps.max() <= 1
            count, differ = count + steps.numel(), differ + int((steps > 0).sum())
    assert 0 < differ < 0.05 * count


def bits_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("format", MODELOPT, ids=name_of)
def test_modelopt_files_stand_for_fakequant(format, tmp_path):
    """NVFP4QTensor, MXFP8QTensor and FP8QTensor of ModelOpt, and products for the rest, give fakequant's weights."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    model, params = build()
    fq, state = exported(fqt.export.modelopt_hf, params, format, model.config, tmp_path / "a")
    stored, wanted = read(tmp_path / "a"), in_files(fq.fakequant(params, state), model.config.to_dict())
    for name, weight in wanted.items():
        scale = stored.get(f"{name}_scale")
        if scale is None:
            assert torch.equal(stored[name], weight)
            continue
        codes = stored[name]
        if format.scale == "e4m3":
            theirs = qtensor.NVFP4QTensor(weight.shape, torch.float32, codes)
            found = theirs.dequantize(
                dtype=torch.float32,
                scale=scale,
                double_scale=stored[f"{name}_scale_2"],
                block_sizes={-1: 16, "scale_bits": (4, 3)},
            )
        elif format is fqt.MXFP8:
            found = qtensor.MXFP8QTensor(weight.shape, torch.float32, codes).dequantize(
                dtype=torch.float32, scale=scale, block_sizes={-1: 32}
            )
        elif scale.dim() == 4:
            found = codes.float() * scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            found = codes.float() * (scale[:, None] if scale.dim() else scale)
        assert torch.equal(found.bfloat16(), weight), name


def test_modelopt_mixed_precision(tmp_path):
    """Several formats: each module by its name, with its algorithm."""
    model, params = build()
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.NVFP4, "*o_proj*": fqt.FP8}))
    fqt.export.modelopt_hf(params, fq.calibrate(params), tmp_path / "a", spec=fq.spec, config=model.config)
    own = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]
    assert own["quant_algo"] == "MIXED_PRECISION"
    assert own["quantized_layers"]["model.layers.1.self_attn.o_proj"] == {"quant_algo": "FP8"}
    nvfp4 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert own["quantized_layers"]["model.layers.1.mlp.experts.2.up_proj"] == nvfp4
    assert len(own["quantized_layers"]) == 2 + 2 * 3 * EXPERTS


# Names


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


@pytest.mark.parametrize("layout", ["te", "sequential"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.FP8_BLOCK], ids=name_of)
def test_megatron_and_transformers_write_the_same_files(kind, layout, format, tmp_path):
    """Names, the halves of fc1 and the heads of QKV: the same bytes as from the same model in transformers."""
    model, params = build(kind)
    other = megatron_of(params, model.config, layout)
    exported(fqt.export.compressed_tensors, params, format, model.config, tmp_path / "a")
    exported(fqt.export.compressed_tensors, other, format, model.config, tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(bits_of(a[name]), bits_of(b[name])) for name in a)


def test_a_bias_of_a_fused_qkv(tmp_path):
    """Named bug: an IndexError without a name. Rows of q, k and v are taken out of it as out of the weight."""
    model, params = build()
    names = {x: [f"model.layers.{n}.self_attn.{x}_proj.bias" for n in range(2)] for x in "qkv"}
    sizes = {x: params[f"model.layers.0.self_attn.{x}_proj.weight"].shape[0] for x in "qkv"}
    params |= {name: torch.randn(sizes[x]) for x, of_x in names.items() for name in of_x}
    other = megatron_of(params, model.config, "te")
    for n in range(2):
        stacked = {
            f"model.layers.{k}.self_attn.{x}_proj.weight": params[names[x][k]][:, None] for x in "qkv" for k in range(2)
        }
        columns = megatron_of(params | stacked, model.config, "te")
        other[f"decoder.layers.{n}.self_attention.linear_qkv.bias"] = columns[
            f"decoder.layers.{n}.self_attention.linear_qkv.weight"
        ][:, 0]
    for folder, source in (("a", params), ("b", other)):
        exported(fqt.export.modelopt_hf, source, fqt.NVFP4, model.config, tmp_path / folder)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for of_x in names.values() for name in of_x)


def test_a_quantized_fused_qkv(tmp_path):
    """Rows of q, k and v are taken out of codes and scales too."""
    model, params = build()
    other = megatron_of(params, model.config, "te")
    for format in (fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.MXFP8):
        folder = tmp_path / format.name
        fq, state = exported(
            fqt.export.compressed_tensors, other, format, model.config, folder, rules="*linear_qkv.weight"
        )
        fqt.export.decompress(folder, tmp_path / f"{format.name}_plain")
        found = read(tmp_path / f"{format.name}_plain")
        wanted = in_files(fq.fakequant(other, state), model.config.to_dict())
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", "mixtral", ["block_sparse_moe.experts.*.w1", "experts.*.w3"]),
        ("model.layers.1.mlp.experts.down_proj", "mixtral", ["block_sparse_moe.experts.*.w2"]),
        ("model.layers.1.mlp.gate.weight", "mixtral", ["layers.1.block_sparse_moe.gate.weight"]),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight7", "deepseek_v3", ["mlp.experts.7.gate_proj", "7.up_proj"]),
        ("module.module.decoder.layers.1.mlp.linear_fc1.weight", "deepseek_v3", ["mlp.gate_proj", "mlp.up_proj"]),
        ("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", "deepseek_v3", ["mlp.shared_experts.down_proj"]),
        ("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", "qwen2_moe", ["mlp.shared_expert.down_proj"]),
        ("decoder.layers.1.mlp.router.expert_bias", "deepseek_v3", ["mlp.gate.e_score_correction_bias"]),
        ("decoder.layers.1.self_attention.linear_kv_down_proj.weight", "deepseek_v3", ["kv_a_proj_with_mqa"]),
        ("model.layers.1.mlp.experts.7.gate_proj.weight", "anything", ["model.layers.1.mlp.experts.7.gate_proj"]),
    ],
)
def test_names(name, kind, wanted):
    found = file_names(name, {"model_type": kind})
    assert len(found) == len(wanted)
    assert all(part in full for part, full in zip(wanted, found, strict=True))


# Files


def test_shards(tmp_path):
    """Files are no larger than asked, the index names each tensor once, the bytes are those of one file."""
    model, params = build()
    options = {"format": fqt.FP8, "config": model.config}
    exported(fqt.export.compressed_tensors, params, folder=tmp_path / "one", **options)
    exported(fqt.export.compressed_tensors, params, folder=tmp_path / "many", max_shard_size="200KB", **options)
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(bits_of(one[name]), bits_of(many[name])) for name in one)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            held = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (it is no dict)
        assert sum(held.values()) <= 200_000 or len(held) == 1
        assert all(index["weight_map"][name] == shard.name for name in held)


def test_one_group_is_packed_at_a_time(tmp_path, monkeypatch):
    """The packed model is never held: when a group is packed, at most a shard of the earlier ones is alive."""
    import weakref

    from fq_transforms.export import plan

    model, params = build(num_hidden_layers=6)
    alive, most = weakref.WeakSet(), []

    def counted(*args, **kwargs):
        packed = real(*args, **kwargs)
        alive.update(leaf for leaves in packed.values() for leaf in leaves)
        most.append(sum(leaf.nbytes for leaf in alive))
        return packed

    real = plan.pack
    monkeypatch.setattr(plan, "pack", counted)
    exported(fqt.export.compressed_tensors, params, fqt.FP8, model.config, tmp_path / "a", max_shard_size=1000)
    assert len(most) == 12
    assert max(most) <= 2 * EXPERTS * 2 * INNER * HIDDEN * 1.1


def test_a_crash_leaves_nothing_at_the_path(tmp_path):
    """No folder and no staging after an error; what a killed process left, the next export removes."""
    model, params = build()
    params["model.layers.1.mlp.experts.down_proj"] = params["model.layers.1.mlp.experts.down_proj"].clone()
    spec = fqt.select(params, {"*.experts.*": fqt.NVFP4})
    state = fqt.calibrate(params, spec=spec)
    bad = dict(params)
    bad["model.layers.1.mlp.experts.down_proj"] = params["model.layers.1.mlp.experts.down_proj"].clone()
    bad["model.layers.1.mlp.experts.down_proj"][2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fqt.export.compressed_tensors(bad, state, tmp_path / "a", spec=spec, config=model.config, max_shard_size=9999)
    assert not list(tmp_path.iterdir())
    left = tmp_path / f".a.saving-{'0' * 32}"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"half")
    fqt.export.compressed_tensors(params, state, tmp_path / "a", spec=spec, config=model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_process_leaves_no_config(tmp_path):
    """SIGKILL while tensors are written: the path does not exist, so no index or config points at missing files."""
    script = (
        "import os, signal, sys, torch, pathlib\n"
        "from fq_transforms.export.files import write\n"
        "def tensors():\n"
        "    yield 'a', torch.ones(100)\n"
        "    yield 'b', torch.ones(100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(pathlib.Path(sys.argv[1]), tensors(), {'config.json': {}}, 400)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], check=False, capture_output=True)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.saving-")


def test_importing_the_package_imports_no_engine():
    script = (
        "import sys, fq_transforms as fqt; fqt.export\n"
        "wrong = {'transformers', 'compressed_tensors', 'safetensors', 'modelopt'} & set(sys.modules)\n"
        "assert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("engine", "call"), [("tqdm", "export"), ("compressed_tensors", "decompress")])
def test_a_missing_engine_is_named(engine, call, tmp_path, monkeypatch):
    """The error names the extra, and nothing is written."""
    model, params = build()
    spec = fqt.select(params, {"*.experts.*": fqt.FP8})
    state = fqt.calibrate(params, spec=spec)
    fqt.export.compressed_tensors(params, state, tmp_path / "a", spec=spec, config=model.config)
    for module in [engine, *(m for m in sys.modules if m.startswith(f"{engine}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    calls = {
        "export": lambda: fqt.export.compressed_tensors(params, state, tmp_path / "b", spec=spec, config=model.config),
        "decompress": lambda: fqt.export.decompress(tmp_path / "a", tmp_path / "b"),
    }
    with pytest.raises(ImportError, match=r"pip install 'fq_transforms\[export\]'"):
        calls[call]()
    assert not (tmp_path / "b").exists()


# Ties, and other refusals

TARGETS = pytest.mark.parametrize("target", [fqt.export.compressed_tensors, fqt.export.modelopt_hf], ids=["ct", "mo"])


@TARGETS
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.NVFP4_STATIC, fqt.FP8], ids=name_of)
def test_untied_roles_are_refused(format, target, tmp_path):
    """Gate and up with an amax each: the error names both, the values, the expert and the call; tied, it is written."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    state = fq.calibrate(params)
    with pytest.raises(ValueError) as caught:
        target(params, state, tmp_path / "a", spec=fq.spec, config=model.config)
    assert_names(
        str(caught.value),
        "model.layers.0.mlp.experts.*.gate_proj.weight",
        "model.layers.0.mlp.experts.*.up_proj.weight",
        "for expert 0",
        "fqt.tie(state, [('gate_proj', 'up_proj')])",
    )
    assert not list(tmp_path.iterdir())
    target(params, fqt.tie(state, [("gate_proj", "up_proj")]), tmp_path / "a", spec=fq.spec, config=model.config)
    scales = {n: t for n, t in read(tmp_path / "a").items() if n.endswith(("global_scale", "scale_2"))}
    for name, scale in scales.items():
        assert torch.equal(scale, scales[name.replace("up_proj", "gate_proj")])


@TARGETS
def test_scales_of_rows_need_no_tie(target, tmp_path):
    """Channels and blocks have a scale of their own in engines too."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.FP8_PER_CHANNEL}))
    target(params, fq.calibrate(params), tmp_path / "a", spec=fq.spec, config=model.config)
    assert (tmp_path / "a" / "config.json").exists()


def faults():
    model, params = build()
    lists = in_lists(params)
    deepseek_model, deepseek = build("deepseek_v3")
    config = model.config.to_dict()
    uncalibrated = fqt.state.init(params, spec=fqt.select(params, {"*.experts.*": fqt.FP8}))
    spec = fqt.select(params, {"*.experts.*": fqt.FP8})
    nan = optree.tree_map(torch.clone, fqt.calibrate(params, spec=spec))
    nan["model.layers.1.mlp.experts.down_proj"].amax[2] = torch.nan
    int4 = replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7))
    odd = {"model.odd.weight": torch.ones(4, 5)}
    ours = {"format": fqt.FP8, "params": params, "rules": "*.experts.*", "config": config}
    small = {"vocab_size": 8, "hidden_size": 64, "moe_intermediate_size": 96}
    other_names = {"blocks.0.experts.w": torch.ones(2, 32, 32)}
    untold = {**config, "model_type": "gpt_oss"}
    return {
        "uncalibrated": (ours | {"state": uncalibrated}, "gate_up_proj", "never calibrated"),
        "NaN amax": (ours | {"state": nan}, "model.layers.1.mlp.experts.down_proj", "nan", "finite amax"),
        "odd in": (ours | {"params": odd, "format": int4, "rules": "*"}, "model.odd.weight", (4, 5), "4 bits"),
        "no name for the format": (ours | {"format": fqt.MXFP6_E3M2}, "MXFP6_E3M2", "no name"),
        "no such names": (ours | {"params": other_names}, "blocks.0.experts.w", "gate_up_proj"),
        "unknown model": (ours | {"config": untold}, "gpt_oss", "qwen3_moe"),
        "no architectures": (ours | {"config": {"model_type": "qwen3_moe"}}, "architectures"),
        "quantized already": (ours | {"config": config | {"quantization_config": {"a": 1}}}, "quantization_config"),
        "a name twice": (
            ours | {"params": params | {"decoder.layers.0.mlp.router.weight": torch.ones(3, 256)}},
            "decoder.layers.0.mlp.router.weight",
            "two names",
        ),
        "Megatron's unknown": (
            ours | {"params": params | {"decoder.layers.0.mlp.odd.weight": torch.ones(3, 256)}},
            "decoder.layers.0.mlp.odd.weight",
            "mlp.router.weight",
        ),
        "halves that cut a block": (
            ours | {"params": build(**small)[1], "format": fqt.FP8_BLOCK},
            "gate_up_proj",
            "(192, 64)",
            "whole blocks",
        ),
        "heads in one block": (
            ours
            | {
                "params": megatron_of(params, model.config, "te"),
                "format": fqt.FP8_BLOCK,
                "rules": "*linear_qkv.weight",
            },
            "linear_qkv",
            "q_proj",
            "whole blocks",
        ),
        "another block": (
            ours | {"format": replace(fqt.NVFP4, name="NVFP4_BLOCK32", block=(1, 32))},
            "NVFP4_BLOCK32",
            "1x32",
            "no name",
        ),
        "a head that is the embedding": (
            ours | {"rules": "lm_head*", "config": config | {"tie_word_embeddings": True}},
            "lm_head",
            "tie_word_embeddings",
        ),
        "half of what is fused": (
            ours | {"params": lists, "rules": "*gate_proj*"},
            "gate_proj",
            "up_proj",
            "not quantized",
        ),
        "one rank's experts": (
            ours | {"params": {n: p for n, p in lists.items() if ".experts.2." not in n}, "rules": "*down_proj*"},
            "found 2 experts in layer 0",
            "wanted 3, as num_",
        ),
        "one stage's layers": (
            ours | {"params": {n: p for n, p in params.items() if ".layers.0." not in n}},
            "found no layer 0",
            "num_hidden_layers",
        ),
        "a padded vocabulary": (
            ours | {"params": params | {"model.embed_tokens.weight": torch.ones(64, HIDDEN)}},
            "model.embed_tokens.weight",
            "found 64 rows, wanted 32",
        ),
        "a head of its own, said to be tied": (
            ours | {"config": config | {"tie_word_embeddings": True}},
            "lm_head.weight",
            "model.embed_tokens.weight",
            "tie_word_embeddings=False",
        ),
        "parameters without buffers": (
            ours
            | {
                "params": {n: p for n, p in deepseek.items() if "e_score" not in n},
                "config": deepseek_model.config.to_dict(),
            },
            "e_score_correction_bias",
            "model.state_dict()",
        ),
        "a wrapper's names": (
            ours | {"params": {f"_orig_mod.{n}": p for n, p in params.items()}},
            "_orig_mod.model.",
            "a wrapper's prefix",
        ),
        "Megatron's other names": (
            ours | {"params": params | {"mtp.layers.0.eh_proj.weight": torch.ones(4, 4)}},
            "mtp.layers.0.eh_proj.weight",
            "a name of Megatron's",
        ),
        "a stack beside a list": (
            ours
            | {
                "params": params | {"model.layers.0.mlp.experts.1.down_proj.weight": torch.ones(4, 4)},
                "rules": "*.experts.down_proj",
            },
            "model.layers.0.mlp.experts.1.down_proj.weight",
            "two names",
        ),
        "two dtypes": (
            ours | {"params": {n: p.float() if ".0." in n else p for n, p in params.items()}},
            "torch.float32",
            "one dtype",
        ),
        "what JSON cannot hold": (ours | {"config": config | {"odd": torch.bfloat16}}, "odd=torch.bfloat16", "JSON"),
        "one architecture as a text": (ours | {"config": config | {"architectures": "X"}}, "architectures='X'", "list"),
        "latent attention that engines fuse": (
            ours
            | {
                "params": deepseek,
                "config": deepseek_model.config.to_dict(),
                "rules": "*q_a_proj*",
            },
            "q_a_proj",
            "kv_a_proj_with_mqa",
            "not quantized",
        ),
        "a meta tensor": (ours | {"params": params | {"model.norm.weight": torch.empty(4, device="meta")}}, "norm"),
        "a shard size that is none": (ours | {"max_shard_size": "5 apples"}, "max_shard_size", "5 apples"),
    }


@TARGETS
@pytest.mark.parametrize("name", faults())
def test_faults_are_found_before_a_byte_is_written(name, target, tmp_path):
    """Each names the thing, what was found and what was wanted; the folder is not made."""
    case, *fragments = faults()[name]
    params, options = case["params"], {k: v for k, v in case.items() if k == "max_shard_size"}
    spec = fqt.select(params, {case["rules"]: case["format"]})
    state = case.get("state") or fqt.calibrate(params, spec=spec)
    with pytest.raises(ValueError) as caught:
        target(params, state, tmp_path / "a", spec=spec, config=case["config"], **options)
    assert_names(str(caught.value), *fragments, "found", "wanted")
    assert not list(tmp_path.iterdir())


@TARGETS
def test_a_folder_that_is_not_empty_is_refused(target, tmp_path):
    """What lies there stays; an empty folder is taken."""
    model, params = build()
    spec = fqt.select(params, {"*.experts.*": fqt.FP8})
    state = fqt.calibrate(params, spec=spec)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError) as caught:
        target(params, state, tmp_path / "a", spec=spec, config=model.config)
    assert_names(str(caught.value), "1 entries such as ['thesis.txt']", "empty directory")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.txt"]
    (tmp_path / "b").mkdir()
    target(params, state, tmp_path / "b", spec=spec, config=model.config)
    assert (tmp_path / "b" / "config.json").exists()


def test_a_global_scale_without_a_reciprocal_is_refused(tmp_path):
    """Readers divide by what files hold, which would be infinite, and the weights zero."""
    model, params = build()
    params = {name: p.float() * 1e-37 if ".experts." in name else p for name, p in params.items()}
    with pytest.raises(ValueError) as caught:
        exported(fqt.export.compressed_tensors, params, fqt.NVFP4, model.config, tmp_path / "a")
    assert_names(str(caught.value), "gate_up_proj", "no reciprocal", "wanted 0 or a larger one")
    assert not list(tmp_path.iterdir())


@TARGETS
def test_a_parameter_that_is_no_tensor(target, tmp_path):
    model, params = build()
    spec = fqt.select(params, {"*.experts.*": fqt.FP8})
    state = fqt.calibrate(params, spec=spec)
    for wrong, found in ((None, "NoneType"), (torch.ones(2, 2).to_sparse(), "torch.sparse_coo")):
        with pytest.raises(ValueError) as caught:
            target(params | {"model.norm.weight": wrong}, state, tmp_path / "a", spec=spec, config=model.config)
        assert_names(str(caught.value), "model.norm.weight", found, "wanted a dense tensor")
    assert not list(tmp_path.iterdir())


def test_norms_of_latent_attention():
    """Megatron's words for them are those of other norms in models without it."""
    layer = "decoder.layers.0.self_attention."
    for word, latent, plain in (
        ("q_layernorm", "q_a_layernorm", "q_norm"),
        ("kv_layernorm", "kv_a_layernorm", None),
    ):
        name = f"{layer}{word}.weight"
        found = file_names(name, {"model_type": "deepseek_v3", "kv_lora_rank": 16})
        assert found == (f"model.layers.0.self_attn.{latent}.weight",)
        if plain:
            assert file_names(name, {"model_type": "qwen3_moe"}) == (f"model.layers.0.self_attn.{plain}.weight",)
        else:
            with pytest.raises(ValueError, match="kv_layernorm"):
                file_names(name, {"model_type": "qwen3_moe"})


@TARGETS
def test_queries_and_keys_of_other_sizes_are_tied(target, tmp_path):
    """Grouped-query attention under static NVFP4: the call that the error names makes it exportable."""
    model, params = build()
    fq = fqt.transform(fqt.select(params, {"*self_attn.[qkv]_proj*": fqt.NVFP4_STATIC}))
    state = fq.calibrate(params)
    with pytest.raises(ValueError, match="call fqt.tie") as caught:
        target(params, state, tmp_path / "a", spec=fq.spec, config=model.config)
    pairs = json.loads(str(caught.value).rpartition("fqt.tie(state, ")[2][:-1].translate(str.maketrans("()'", '[]"')))
    target(params, fqt.tie(state, [tuple(pair) for pair in pairs]), tmp_path / "a", spec=fq.spec, config=model.config)
    assert (tmp_path / "a" / "config.json").exists()


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    """Headers list every tensor: reading one for each of thousands of modules took longer than all else."""
    model, params = build()
    exported(fqt.export.compressed_tensors, params, fqt.NVFP4, model.config, tmp_path / "a", max_shard_size="300KB")
    opened: list[str] = []
    real = files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda file, *args: opened.append(file.name) or real(file, *args))
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    shards = len(list((tmp_path / "a").glob("*.safetensors")))
    assert shards > 2
    assert len(opened) == 2 * shards  # to see what is there, and to read


def test_decompress_refuses_what_weights_cannot_say(tmp_path):
    """A rotation, quantized activations, another part of a module: each would be lost without a word."""
    model, params = build()
    exported(fqt.export.compressed_tensors, params, fqt.FP8, model.config, tmp_path / "a")
    tensors, config = read(tmp_path / "a"), json.loads((tmp_path / "a" / "config.json").read_text())
    about = config["quantization_config"]
    group, name = next(iter(about["config_groups"])), next(n for n in tensors if n.endswith("weight_scale"))
    module = name.removesuffix(".weight_scale")
    activations = about["config_groups"][group] | {"input_activations": {"num_bits": 8, "type": "float"}}
    for change, more, fragment in [
        ({"transform_config": {"config_groups": {"u": 1}}}, {}, "transform_config"),
        ({"kv_cache_scheme": {"num_bits": 8}}, {}, "kv_cache_scheme"),
        ({"config_groups": {group: activations}}, {}, "input_activations"),
        ({}, {f"{module}.weight_g_idx": torch.ones(2)}, "weight_g_idx"),
    ]:
        folder = tmp_path / fragment
        files.write(
            folder, (tensors | more).items(), {"config.json": config | {"quantization_config": about | change}}, 10**9
        )
        with pytest.raises(ValueError, match=fragment):
            fqt.export.decompress(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_tied_head_is_no_module_to_quantize(tmp_path):
    """To a reader it is a Linear that is in no file: unless told, transformers gives it scales at random."""
    model, params = build(tie_word_embeddings=True)
    exported(fqt.export.compressed_tensors, params, fqt.FP8, model.config, tmp_path / "a", rules="*self_attn.o_proj*")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]


def test_decompress_refuses(tmp_path):
    """What is no checkpoint of compressed-tensors, a file that is missing, a module without its codes, a dtype."""
    model, params = build()
    exported(fqt.export.compressed_tensors, params, fqt.NVFP4, model.config, tmp_path / "a", max_shard_size="200KB")
    exported(fqt.export.modelopt_hf, params, fqt.NVFP4, model.config, tmp_path / "m")
    for folder, options, fragments in [
        ("m", {}, ["modelopt", "compressed-tensors"]),
        ("a", {"dtype": torch.float64}, ["float64", "bfloat16"]),
    ]:
        with pytest.raises(ValueError) as caught:
            fqt.export.decompress(tmp_path / folder, tmp_path / "b", **options)
        assert_names(str(caught.value), *fragments)
    first = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=first.name):
        fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    first.write_bytes(content)
    index = tmp_path / "a" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("0.down_proj.weight_packed", "0.down_proj.weight_lost"))
    with pytest.raises(ValueError, match="weight_lost"):
        fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    index.write_text(text)
    tensors = read(tmp_path / "a")
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight_packed"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    files.write(tmp_path / "c", tensors.items(), {"config.json": config}, 10**9)
    with pytest.raises(ValueError) as caught:
        fqt.export.decompress(tmp_path / "c", tmp_path / "b")
    assert_names(str(caught.value), "model.layers.1.mlp.experts.0.up_proj", "weight_packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "m"]


def test_tied_embeddings_are_written_once(tmp_path):
    """A head that is the embedding is not in the files, as in transformers', and loads."""
    model, params = build(tie_word_embeddings=True)
    fq, state = exported(fqt.export.compressed_tensors, params, fqt.FP8, model.config, tmp_path / "a")
    assert "lm_head.weight" not in read(tmp_path / "a")
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        weights = {name: w for name, w in fq.fakequant(params, state).items() if name != "lm_head.weight"}
        wanted = functional_call(model, weights, (TOKENS,)).logits
        assert torch.equal(loaded(TOKENS).logits, wanted)
