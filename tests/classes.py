"""Every class of transformers that has experts: which these are, and each built small, or tiny enough to be run."""

import re
from pathlib import Path

import pytest
import torch

from fq_transforms.export.names import families

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LAYERS, EXPERTS, VOCABULARY = 6, 4, 128
# Numbers of config that are made smaller, wherever they stand in it. Layers for more tokens are none of transformers'.
SMALLER = {
    r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth": LAYERS,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": EXPERTS,
    r"num_experts_per_tok": 2,
    r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_layers": 0,
}
# What a class wants beside its config's defaults.
_TALKER = {"text_config": {"shared_expert_intermediate_size": 64}, "spatial_merge_size": 2}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 2048, "compress_ratio": 4}
_QWEN4 = {f"indexer_{key}": value for key, value in _INDEXER.items()}
OWN = {
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0}},
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"mlp_layer_types": ["dense"] + 11 * ["sparse"]}},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Gemma4ForCausalLM": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "Lfm2MoeForCausalLM": {"layer_types": 16 * ["conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"zero_expert_num": 0},
    "Qwen3OmniMoeForConditionalGeneration": {"talker_config": _TALKER},
    "Qwen4ExpForCausalLM": _QWEN4,
    "Qwen4ExpForConditionalGeneration": {"text_config": _QWEN4},
}
OWN["Gemma4ForConditionalGeneration"] = {"text_config": OWN["Gemma4ForCausalLM"]}
# Numbers by which a model can be run: widths of 16, and what must be equal or fit into each other.
TINY = SMALLER | {
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2,
    r"n_groups?|topk_group|num_expert_group": 1,
    r"(text_|out_)?hidden_size|d_model|n_embd|embed_dim|hidden_size_per_layer_input": 64,
    r"adapter_(in|out)_dim|adapter_input_size": 64,
    r"\w*intermediate_size|\w*ffn_hidden_size|\w*ffn_(dim|size)|d_ff|intermediate_dim": 64,
    r"(num_|n_|(en|de)coder_attention_)(attention_)?heads|(swa_)?num_(attention|key_value)_heads|kv_n_heads": 4,
    r"head_dim|attention_head_dim|d_kv|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|global_head_dim": 16,
    r"linear_((key|value)_)?head_dim": 16,
    r"linear_num_(heads|(key|value)_heads)": 4,
    r"qk_head_dim|swa_head_dim": 32,
    r"\w*lora_rank": 16,
    r"\w*vocab_size\w*": VOCABULARY,
    r"\w*token_id": 0,
    r"max_(position_embeddings|source_positions)": 128,
}
# What a class wants then beside them.
_OF_TEXT = {
    "DeepseekOcr2ForConditionalGeneration": {"num_experts_per_tok": 2},
    "Dots3NoteForConditionalGeneration": {"head_dim": 32, "rope_parameters": None},
    "Ernie4_5_VLMoeForConditionalGeneration": {"head_dim": 128},
    "Ernie4_5_VL_MoeForConditionalGeneration": {"head_dim": 128},
    "Glm4vMoeForConditionalGeneration": {"head_dim": 128},
    "Step3p7ForConditionalGeneration": {"sliding_window": 8},
}
OWN_TINY = {name: {"text_config": own} for name, own in _OF_TEXT.items()} | {
    "DbrxForCausalLM": {"attn_config": {"clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "Dots3NoteForCausalLM": {"head_dim": 32, "rope_parameters": None},
    "GraniteMoeHybridForCausalLM": {
        **{"mamba_n_heads": 8, "mamba_d_head": 16},
        "layer_types": 5 * ["mamba"] + ["attention"],
    },
    "MiMoV2FlashForCausalLM": {"num_key_value_heads": 2},
    "Mistral4ForCausalLM": {"qk_rope_head_dim": 8, "qk_head_dim": 24},
}


def classes():
    """All classes of transformers that generate, in files that have experts."""
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = file.read_text()
        if re.search(r"^class \w*Experts\w*\(", text, re.MULTILINE):
            found += re.findall(r"^class (\w+For(?:CausalLM|ConditionalGeneration))\(", text, re.MULTILINE)
    return [name for name in found if not re.search("PreTrained|CodePredictor|Talker", name)]  # parts of Qwen3-Omni


def smaller(entries, numbers=SMALLER):
    """The same config with few layers and experts; or with other numbers as small."""
    depth = next((entries[key] for key in entries if re.fullmatch("num_hidden_layers|n_layers?", str(key))), None)
    found = {}
    for key, value in entries.items():
        number = next((number for pattern, number in numbers.items() if re.fullmatch(pattern, str(key))), None)
        if key == "per_layer_config":
            found[key] = {layer: smaller(own, numbers) for layer, own in value.items() if int(layer) < LAYERS}
        elif isinstance(value, dict):
            found[key] = smaller(value, numbers)
        elif isinstance(value, list) and depth and len(value) == depth:
            found[key] = value[:LAYERS]
        else:
            found[key] = min(value, number) if isinstance(value, int) and number is not None else value
    return found


def tiny(name):
    """A model of a class that can be run, in fp32: no two experts of one magnitude."""
    cls = getattr(transformers, name)
    entries = smaller(cls.config_class(**OWN.get(name, {})).to_dict(), TINY) | {"architectures": [name]}
    entries = _merged(entries, OWN_TINY.get(name, {}))
    # The fused attention has other kernels under torch.func than outside; the eager one has the same, bit for bit.
    config = families._own_config(cls, entries)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval()
    model.set_experts_implementation("eager")  # the only one that ModelOpt sees
    if name == "Qwen3OmniMoeForConditionalGeneration":  # of which only parts have a forward
        model.forward = model.thinker.forward
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            drawn = 0.05 * torch.randn(param.shape, generator=generator)
            param.copy_(drawn if param.dim() in (2, 3) else param + drawn)  # no factor is zero, as some begin
            if param.dim() == 3:
                param.mul_(2.0 ** (torch.arange(len(param)) % EXPERTS)[:, None, None])
    return model, entries


def batch(model, tokens):
    """The arguments of a call with tokens: of an encoder's decoder the same ones."""
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def _merged(entries, own):
    return entries | {key: _merged(entries[key], v) if isinstance(v, dict) else v for key, v in own.items()}
