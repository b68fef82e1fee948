"""Names of files: from transformers' and Megatron's names in memory, and the rows that each file has."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.names import file_names
from tests.cases import name_of
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


def test_norms_of_latent_attention():
    """Megatron's words for them mean other norms in models without it."""
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
    model, params = build()
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
