"""From the names that a model has in memory to those that its files have: text and numbers only.

    in memory                                            in files
    model.layers.0.mlp.experts.gate_up_proj [E, ., .]    ...mlp.experts.{e}.gate_proj.weight, ...up_proj.weight
    model.layers.0.mlp.experts.down_proj                 ...mlp.experts.{e}.down_proj.weight
    decoder.layers.0.mlp.experts.linear_fc1.weight{e}    the first, under model.layers.0
    decoder.layers.0.mlp.experts.local_experts.{e}....   likewise

Files of Mixtral have `block_sparse_moe` in place of `mlp`, and w1, w3, w2 in place of gate_proj, up_proj, down_proj.
Names of lists of experts, and of whatever is no expert in transformers, are the same in files.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MODEL_TYPES", "Part", "file_names", "module_of", "parts"]


class Family(NamedTuple):
    """How the files of a family of models name the block of experts, its projections and its shared experts."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


# By the `model_type` of config.json. Source: the conversion mapping of transformers 5.23.
_QWEN2, _DEEPSEEK = Family(shared="shared_expert"), Family()
MODEL_TYPES = {
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN2,
    "olmoe": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
}

# Names in Megatron-Core, under `decoder.layers.{n}.`, to those under `model.layers.{n}.`: more than one name for a
# matrix that holds them one below the other. {e} is the expert.
_MEGATRON_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<of_list>\*|\d+)\.(?P<fc_of_list>linear_fc[12])\.weight"
    r"|(?P<fc>linear_fc[12])\.weight(?P<grouped>\*|\d+))"
)
_MEGATRON_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",),
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.linear_q_up_proj.layer_norm_weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.linear_kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "mlp.router.weight": ("{moe}.gate.weight",),
    "mlp.router.expert_bias": ("{moe}.gate.e_score_correction_bias",),
    "mlp.shared_experts.linear_fc1.weight": ("mlp.{shared}.gate_proj.weight", "mlp.{shared}.up_proj.weight"),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.{shared}.down_proj.weight",),
    "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight",),
}
_MEGATRON_TOP = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
_MEGATRON_NAME = re.compile(r"(?:module\.)*(?:decoder\.layers\.(?P<layer>\d+)\.(?P<inside>.+)|(?P<top>[^.]+\..+))")
_STACKED = re.compile(r"(?P<parent>(?:.*\.)?)mlp\.experts\.(?P<role>gate_up_proj|down_proj)")


class Part(NamedTuple):
    """A tensor of the files: its name, `*` for an expert of a stack, and which rows of `out` of its source it has."""

    name: str
    rows: slice | Tensor


def parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Part]:
    """The tensors of the files that the parameter `name`, or the group of that key, becomes.

    Args:
        name: A parameter's name, or a group's key, with `*` for the expert.
        shape: (out, in) of the matrix, canonical; or the shape of what is no weight.
        config: What config.json holds; read are `model_type` and, for a fused QKV, the numbers of heads.

    Raises:
        ValueError: The name is none that files of this model have.

    Example:
        >>> [part.name for part in parts("mlp.experts.gate_up_proj", (8, 4), {"model_type": "mixtral"})]
        ['block_sparse_moe.experts.*.w1.weight', 'block_sparse_moe.experts.*.w3.weight']
        >>> parts("decoder.layers.2.mlp.experts.linear_fc2.weight5", (4, 8), {"model_type": "qwen3_moe"})
        [Part(name='model.layers.2.mlp.experts.5.down_proj.weight', rows=slice(None, None, None))]
    """
    names = file_names(name, config)
    if len(names) == 1:
        return [Part(names[0], slice(None))]
    if len(names) == 3:
        return [Part(n, rows) for n, rows in zip(names, _rows_of_qkv(name, shape[0], config), strict=True)]
    half, odd = divmod(shape[0], 2)
    if odd:
        raise ValueError(f"parameter {name!r}: found {shape[0]} rows of `out`, wanted two halves, gate and up")
    return [Part(names[0], slice(0, half)), Part(names[1], slice(half, None))]


def file_names(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of `parts`, which need no shape.

    Raises:
        ValueError: The name is none that files of this model have.

    Example:
        >>> file_names("decoder.layers.0.mlp.router.weight", {"model_type": "mixtral"})
        ('model.layers.0.block_sparse_moe.gate.weight',)
        >>> file_names("model.layers.0.mlp.experts.3.up_proj.weight", {"model_type": "any other"})
        ('model.layers.0.mlp.experts.3.up_proj.weight',)
    """
    if match := _STACKED.fullmatch(name):
        family = _family(name, config)
        roles = (family.down,) if match["role"] == "down_proj" else (family.gate, family.up)
        return tuple(f"{match['parent']}{family.moe}.experts.*.{role}.weight" for role in roles)
    if re.search(r"(?:^|\.)experts\.[^.]+$", name):
        raise ValueError(
            f"parameter {name!r}: found stacked experts of a role that no files of {config.get('model_type')!r} are "
            "known to have, wanted mlp.experts.gate_up_proj or mlp.experts.down_proj"
        )
    megatron = _MEGATRON_NAME.fullmatch(name)
    if megatron and megatron["inside"]:
        inside = _names_in_layer(name, megatron["inside"], _family(name, config))
        return tuple(f"model.layers.{megatron['layer']}.{n}" for n in inside)
    if megatron and megatron["top"] in _MEGATRON_TOP:
        return _MEGATRON_TOP[megatron["top"]]
    # transformers keeps Mixtral's block of experts as `mlp` in memory.
    family = MODEL_TYPES.get(str(config.get("model_type")), Family())
    return (name if family.moe == "mlp" else name.replace(".mlp.", f".{family.moe}."),)


def module_of(name: str) -> str:
    """The module that a weight of the files belongs to.

    Example:
        >>> module_of("model.layers.0.mlp.experts.3.up_proj.weight")
        'model.layers.0.mlp.experts.3.up_proj'
    """
    return name.removesuffix(".weight")


def _names_in_layer(name: str, inside: str, family: Family) -> tuple[str, ...]:
    if match := _MEGATRON_EXPERT.fullmatch(inside):
        expert = match["of_list"] or match["grouped"]
        first = "linear_fc1" in (match["fc"], match["fc_of_list"])
        roles = (family.gate, family.up) if first else (family.down,)
        return tuple(f"{family.moe}.experts.{expert}.{role}.weight" for role in roles)
    if inside not in _MEGATRON_LAYER:
        raise ValueError(
            f"parameter {name!r}: found {inside!r} in a layer of Megatron's, wanted one of {sorted(_MEGATRON_LAYER)}, "
            "or experts; leave it out of params, or give it its name in transformers"
        )
    return tuple(n.format(moe=family.moe, shared=family.shared) for n in _MEGATRON_LAYER[inside])


def _family(name: str, config: Mapping[str, Any]) -> Family:
    found = str(config.get("model_type"))
    if found not in MODEL_TYPES:
        raise ValueError(
            f"parameter {name!r}: found the model_type {found!r}, for which the names in files are not known, wanted "
            f"one of {sorted(MODEL_TYPES)}; or experts in a list, whose names are those of the files"
        )
    return MODEL_TYPES[found]


def _rows_of_qkv(name: str, out: int, config: Mapping[str, Any]) -> list[Tensor]:
    """Rows of q, k and v in Megatron's fused matrix: for each group of queries its queries, its key, its value."""
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if not heads or not groups or heads % groups or out % (heads + 2 * groups):
        raise ValueError(
            f"parameter {name!r}: found {out} rows, num_attention_heads={heads} and num_key_value_heads={groups} in "
            "config, wanted rows for all heads, of queries, keys and values"
        )
    rows = torch.arange(out).view(groups, heads // groups + 2, -1)
    return [rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()]
