"""Names of files: from transformers' and Megatron's names in memory, and the rows that each file has."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.names import file_tensors
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
    fqt.export.decompress(tmp_path / "a", tmp_path / "b")
    assert_equal(read(tmp_path / "b"), in_files(fq.fakequant(other, state), model.config.to_dict()))
