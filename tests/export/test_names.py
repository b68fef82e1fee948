"""Names of files: from transformers' and Megatron's names in memory, and the rows that each file has."""

import re
from functools import partial

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.names import accounted
from fq_transforms.export.names.from_memory import file_tensors
from tests.cases import assert_names, name_of
from tests.export.models import (
    assert_equal,
    assert_same_bytes,
    build,
    exported,
    in_files,
    megatron_of,
    read,
    to_compressed_tensors,
    to_modelopt,
)
from tests.export.test_families import built

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have


ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "anything": "X",
}


def names_of(name, kind, shape=(8, 4)):
    """Names in files of one parameter, of a model of few layers."""
    config = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "num_hidden_layers": 4}
    return [tensor.name for tensor in file_tensors({name: shape}, config)[name]]


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("model.layers.1.mlp.gate.weight", "mixtral", ["layers.1.block_sparse_moe.gate.weight"]),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", "mixtral", ["block_sparse_moe.experts.7.w1.weight"]),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight7", "deepseek_v3", ["mlp.experts.7.gate_proj", "7.up_proj"]),
        ("module.module.decoder.layers.1.mlp.linear_fc1.weight", "deepseek_v3", ["mlp.gate_proj", "mlp.up_proj"]),
        ("decoder.layers.3.mlp.shared_experts.linear_fc2.weight", "deepseek_v3", ["mlp.shared_experts.down_proj"]),
        ("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", "qwen2_moe", ["mlp.shared_expert.down_proj"]),
        ("decoder.layers.3.mlp.router.expert_bias", "deepseek_v3", ["mlp.gate.e_score_correction_bias"]),
        ("decoder.layers.1.self_attention.linear_kv_down_proj.weight", "deepseek_v3", ["kv_a_proj_with_mqa"]),
        ("model.layers.1.mlp.experts.7.gate_proj.weight", "anything", ["model.layers.1.mlp.experts.7.gate_proj"]),
    ],
)
def test_names(name, kind, wanted):
    found = names_of(name, kind)
    assert len(found) == len(wanted)
    assert all(part in full for part, full in zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.gate_up_proj", "decoder.layers.1.mlp.experts.linear_fc1"])
def test_experts_of_mixtral(name):
    """A stack in memory and Megatron's separate ones: the same names, and the halves of `out` for gate and up."""
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2}
    is_stack = name.endswith("gate_up_proj")
    shapes = {name: (3, 8, 4)} if is_stack else {f"{name}.weight{e}": (8, 4) for e in range(3)}
    found = file_tensors(shapes, config)
    for expert, of_expert in enumerate([found[name]] if is_stack else found.values()):
        block = f"model.layers.1.block_sparse_moe.experts.{'*' if is_stack else expert}"
        assert of_expert == [(f"{block}.w1.weight", slice(0, 4)), (f"{block}.w3.weight", slice(4, 8))]


@pytest.mark.parametrize(
    ("name", "kind", "shape", "said"),
    [
        ("model.layers.1.mlp.experts.7.up_proj.weight", "mixtral", (8, 4), "neither in memory nor in files"),
        ("layers.1.mlp.experts.gate_up_proj", "mixtral", (8, 8, 4), "neither in memory nor in files"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "mixtral", (8, 4), "no 'model.layers.1.mlp.gate_proj.weight'"),
        ("decoder.layers.9.mlp.experts.linear_fc1.weight0", "mixtral", (8, 4), "no 'model.layers.9.mlp.experts"),
        ("decoder.layers.1.self_attention.kv_layernorm.weight", "qwen3_moe", (8,), "no 'model.layers.1.self_attn.kv_a"),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight0", "anything", (8, 4), "transformers does not have"),
        ("model.layers.1.mlp.experts.gate_up_proj", "anything", (8, 8, 4), "transformers does not have"),
    ],
)
def test_names_that_the_class_does_not_have(name, kind, shape, said):
    """Kills guesses: a name that nobody reads, by what other classes have."""
    with pytest.raises(ValueError) as caught:
        names_of(name, kind, shape)
    assert_names(str(caught.value), name, said, "found", "wanted")


def test_norms_of_latent_attention():
    """Megatron's words for them mean other norms in models without it."""
    layer = "decoder.layers.0.self_attention."
    for word, kind, wanted in (
        ("q_layernorm", "deepseek_v3", "q_a_layernorm"),
        ("kv_layernorm", "deepseek_v3", "kv_a_layernorm"),
        ("q_layernorm", "qwen3_moe", "q_norm"),
    ):
        assert names_of(f"{layer}{word}.weight", kind, (8,)) == [f"model.layers.0.self_attn.{wanted}.weight"]


@pytest.mark.parametrize("layout", ["te", "sequential"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.FP8_BLOCK], ids=name_of)
def test_megatron_and_transformers_write_the_same_files(kind, layout, format, tmp_path):
    """Names, the halves of fc1 and the heads of QKV: the same bytes as from the same model in transformers."""
    model, params = build(kind)
    other = megatron_of(params, model.config, layout)
    exported(to_compressed_tensors, tmp_path / "a", params, format, model.config)
    exported(to_compressed_tensors, tmp_path / "b", other, format, model.config)
    assert_same_bytes(read(tmp_path / "b"), read(tmp_path / "a"))


def of_deepseek(name):
    """Megatron's name for a matrix of DeepSeek-V3 in transformers, and where in it that lies; by hand."""
    name = name.replace("model.layers.", "decoder.layers.")
    for old, new in (
        ("model.embed_tokens.", "embedding.word_embeddings."),
        ("model.norm.", "decoder.final_layernorm."),
        ("lm_head.", "output_layer."),
        ("post_attention_layernorm.", "pre_mlp_layernorm."),
        ("self_attn.q_a_proj.", "self_attention.linear_q_down_proj."),
        ("self_attn.q_a_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
        ("self_attn.q_b_proj.", "self_attention.linear_q_up_proj."),
        ("self_attn.kv_a_proj_with_mqa.", "self_attention.linear_kv_down_proj."),
        ("self_attn.kv_a_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
        ("self_attn.kv_b_proj.", "self_attention.linear_kv_up_proj."),
        ("self_attn.o_proj.", "self_attention.linear_proj."),
        ("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias"),
        ("mlp.gate.", "mlp.router."),
        (".down_proj.", ".linear_fc2."),
    ):
        name = name.replace(old, new)
    return name


def of_nemotron(name, kinds):
    """Megatron's name for a parameter of Nemotron-H in transformers; by hand."""
    name = name.replace("model.layers.", "decoder.layers.").replace("model.embeddings.", "embedding.word_embeddings.")
    name = name.replace("model.norm_f.", "decoder.final_norm.").replace("lm_head.", "output_layer.")
    if not name.startswith("decoder.layers."):
        return name
    kind = kinds[int(name.split(".")[2])]
    if kind == "linear_attention":
        return re.sub(r"(\d)\.norm\.", r"\1.mixer.in_proj.layer_norm_", name)
    if kind == "full_attention":
        name = re.sub(r"(\d)\.norm\.", r"\1.self_attention.linear_qkv.layer_norm_", name)
        return name.replace("mixer.o_proj.", "self_attention.linear_proj.")
    name = re.sub(r"(\d)\.norm\.", r"\1.pre_mlp_layernorm.", name).replace(
        "mixer.gate.e_score_correction_bias", "mlp.router.expert_bias"
    )
    name = name.replace("mixer.gate.", "mlp.router.").replace("mixer.", "mlp.")
    return name.replace("up_proj.", "linear_fc1.").replace("down_proj.", "linear_fc2.")


def in_megatron(params, rename, config):
    """The tensors of a transformers model as Megatron has them, experts grouped, gate above up, heads in groups."""
    found = {}
    for name, param in params.items():
        role = name.rpartition(".")[2]
        if ".experts." in name:
            fc = "linear_fc2" if role == "down_proj" else "linear_fc1"
            layer = rename(name).partition(".experts.")[0].replace("mixer", "mlp")
            found |= {f"{layer}.experts.{fc}.weight{e}": weight.clone() for e, weight in enumerate(param)}
        elif "gate_proj" in name:
            up = params[name.replace("gate_proj", "up_proj")]
            found[rename(name).replace("gate_proj", "linear_fc1")] = torch.cat([param, up])
        elif "q_proj" in name:
            q, k, v = (params[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            groups = config.num_key_value_heads
            parts = [each.unflatten(0, (groups, -1)) for each in (q, k, v)]
            found[rename(name).replace("mixer.q_proj", "self_attention.linear_qkv")] = torch.cat(parts, 1).flatten(0, 1)
        elif not re.search(r"\.[kv]_proj\.", name) and not (
            "up_proj" in name and name.replace("up_proj", "gate_proj") in params
        ):
            found[rename(name)] = param
    return found


@pytest.mark.parametrize("format", [fqt.FP8_PER_CHANNEL, fqt.MXFP8], ids=name_of)
@pytest.mark.parametrize("kind", ["deepseek_v3", "nemotron_h"])
def test_latent_attention_and_hybrids_from_megatron(kind, format, tmp_path, monkeypatch):
    """As above for DeepSeek-V3 and Nemotron-H: all layers, dense ones, shared experts, Mamba and biases of routers."""
    if kind == "deepseek_v3":
        model, params = build(kind)
        entries, config, rename = model.config.to_dict(), model.config, of_deepseek
    else:
        model, entries = built("NemotronHForCausalLM")
        monkeypatch.setattr(accounted, "_check_widths", lambda *_: None)  # config has those of the whole matrices
        params, config = model.state_dict(), model.config
        rename = partial(of_nemotron, kinds=entries["layers_block_type"])
    other = in_megatron(params, rename, config)
    assert not other.keys() & params.keys()
    # Matrices cut to a few columns show no layout themselves.
    exported(fqt.export.save, tmp_path / "a", params, format, entries, transposed={"*.experts.*_proj": False})
    exported(fqt.export.save, tmp_path / "b", other, format, entries)
    assert_same_bytes(read(tmp_path / "b"), read(tmp_path / "a"))


def test_a_bias_of_a_fused_qkv(tmp_path):
    """Named bug: an IndexError without a name. Rows of q, k and v are taken out of it as out of the weight."""
    model, params = build(attention_bias=True)
    params = {name: param for name, param in params.items() if not name.endswith("o_proj.bias")}
    names = {x: [f"model.layers.{n}.self_attn.{x}_proj.bias" for n in range(2)] for x in "qkv"}
    sizes = {x: params[f"model.layers.0.self_attn.{x}_proj.weight"].shape[0] for x in "qkv"}
    params |= {name: torch.randn(sizes[x]) for x, of_x in names.items() for name in of_x}
    other = megatron_of(params, model.config, "te")
    stacked = {
        f"model.layers.{n}.self_attn.{x}_proj.weight": params[names[x][n]][:, None] for x in "qkv" for n in (0, 1)
    }
    columns = megatron_of(params | stacked, model.config, "te")
    for n in range(2):
        fused = f"decoder.layers.{n}.self_attention.linear_qkv"
        other[f"{fused}.bias"] = columns[f"{fused}.weight"][:, 0]
    for folder, source in (("a", params), ("b", other)):
        exported(to_modelopt, tmp_path / folder, source, fqt.NVFP4, model.config)
    assert_same_bytes(read(tmp_path / "b"), read(tmp_path / "a"))


@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.MXFP8], ids=name_of)
def test_a_quantized_fused_qkv(format, tmp_path):
    """Rows of q, k and v are taken out of codes and scales too."""
    model, params = build()
    other = megatron_of(params, model.config, "te")
    rules = "*linear_qkv.weight"
    fq, state = exported(to_compressed_tensors, tmp_path / "a", other, format, model.config, rules)
    fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    assert_equal(read(tmp_path / "b"), in_files(fq.fakequant(other, state), model.config.to_dict()))
