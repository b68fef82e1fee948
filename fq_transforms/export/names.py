"""From the names that a model has in memory to those that its files have: text and numbers only.

    in memory                                            in files
    model.layers.0.mlp.experts.gate_up_proj [E, ., .]    ...mlp.experts.{e}.gate_proj.weight, ...up_proj.weight
    model.layers.0.mlp.experts.down_proj                 ...mlp.experts.{e}.down_proj.weight
    decoder.layers.0.mlp.experts.linear_fc1.weight{e}    as gate_up_proj, under model.layers.0
    decoder.layers.0.mlp.experts.local_experts.{e}....   likewise

Files of Mixtral have `block_sparse_moe` in place of `mlp`, and w1, w3, w2 in place of gate_proj, up_proj, down_proj.
Lists of experts, and whatever is no expert in transformers, have the same names in files.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.spec import Group, Inputs

__all__ = [
    "MODEL_TYPES",
    "FileTensor",
    "Source",
    "file_names",
    "file_tensors",
    "module_of",
]


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

# Names in Megatron-Core, under `decoder.layers.{n}.`, to those under `model.layers.{n}.`. A matrix that holds several,
# one below the other, has a name for each.
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
# Under multi-latent attention the same words mean other norms.
_MEGATRON_LATENT = {
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
}
_MEGATRON_TOP = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
_MEGATRON_NAME = re.compile(r"(?:module\.)*(?:decoder\.layers\.(?P<layer>\d+)\.(?P<inside>.+)|(?P<top>[^.]+\..+))")
_OF_A_WRAPPER = re.compile(
    r"(?:module|base_model\.model)\.|(?:.*\.)?(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|lora_\w+)\."
)
_NOT_IN_FILES = re.compile(
    r"(?:language_model\.)?(?:decoder\.(?:layers|final_\w+)|embedding|output_layer)\."
    r"|mtp\.layers\.\d+\.(?:eh_proj|enorm|hnorm|final_layernorm|transformer_layer)\."
)
_STACKED = re.compile(r"(?P<parent>(?:.*\.)?)mlp\.experts\.(?P<role>gate_up_proj|down_proj)")


class FileTensor(NamedTuple):
    """A tensor of the files: its name, `*` for an expert of a stack, and which rows of `out` of its source it has."""

    name: str
    rows: slice | Tensor


class Source(NamedTuple):
    """A quantized group, or a parameter that is not quantized, and what it becomes in the files.

    Attributes:
        name: Group key, or name of the parameter.
        group: The group; None for a parameter that is not quantized.
        inputs: What the group's weights are multiplied with, where that is quantized.
        shape: (out, in) of the matrix; or the shape of what is no matrix.
        experts: How many a `*` in a name of the files stands for.
        tensors: Of the files.
    """

    name: str
    group: Group | None
    inputs: Inputs | None
    shape: tuple[int, ...]
    experts: int
    tensors: list[FileTensor]

    def names_of(self, tensor: FileTensor) -> list[str]:
        """The names that one of `tensors` has in the files: one per expert if it has a `*`."""
        if "*" not in tensor.name:
            return [tensor.name]
        return [tensor.name.replace("*", str(expert)) for expert in range(self.experts)]

    @property
    def names(self) -> list[str]:
        """All names in the files."""
        return [name for tensor in self.tensors for name in self.names_of(tensor)]


def file_tensors(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[FileTensor]:
    """The tensors of the files that the parameter `name`, or the group of that key, becomes.

    Args:
        name: A parameter's name, or a group's key, with `*` for the expert.
        shape: (out, in) of the matrix, canonical; or the shape of what is no matrix.
        config: What config.json holds. `model_type` is read and, for a fused QKV, the numbers of heads.

    Raises:
        ValueError: Files of this model have no such name; rows are not those of two halves or of all heads.

    Example:
        >>> [tensor.name for tensor in file_tensors("mlp.experts.gate_up_proj", (8, 4), {"model_type": "mixtral"})]
        ['block_sparse_moe.experts.*.w1.weight', 'block_sparse_moe.experts.*.w3.weight']
    """
    names = file_names(name, config)
    if len(names) == 1:
        return [FileTensor(names[0], slice(None))]
    if len(names) == 3:
        return [FileTensor(n, rows) for n, rows in zip(names, _rows_of_qkv(name, shape[0], config), strict=True)]
    half, odd = divmod(shape[0], 2)
    if odd:
        raise ValueError(f"parameter {name!r}: found {shape[0]} rows of `out`, wanted two halves, gate and up")
    return [FileTensor(names[0], slice(0, half)), FileTensor(names[1], slice(half, None))]


def file_names(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of `file_tensors`, which need no shape.

    Raises:
        ValueError: The name is none that files of this model have.

    Example:
        >>> file_names("decoder.layers.0.mlp.router.weight", {"model_type": "mixtral"})
        ('model.layers.0.block_sparse_moe.gate.weight',)
        >>> file_names("model.layers.0.mlp.experts.3.up_proj.weight", {"model_type": "any other"})
        ('model.layers.0.mlp.experts.3.up_proj.weight',)
    """
    megatron = _MEGATRON_NAME.fullmatch(name)
    is_megatron = megatron is not None and bool(megatron["inside"] or megatron["top"] in _MEGATRON_TOP)
    if _OF_A_WRAPPER.match(name) and not is_megatron:
        raise ValueError(
            f"parameter {name!r}: found a wrapper's prefix, wanted names as the model itself has them; give the module "
            "within the wrapper, merged, or leave it out of params"
        )
    if match := _STACKED.fullmatch(name):
        family = _family(name, config)
        roles = (family.down,) if match["role"] == "down_proj" else (family.gate, family.up)
        return tuple(f"{match['parent']}{family.moe}.experts.*.{role}.weight" for role in roles)
    if re.search(r"(?:^|\.)experts\.[^.]+$", name):
        raise ValueError(
            f"parameter {name!r}: found stacked experts of a role that is not known in files of "
            f"{config.get('model_type')!r}, wanted mlp.experts.gate_up_proj or mlp.experts.down_proj"
        )
    if megatron and megatron["inside"]:
        inside = _names_in_layer(name, megatron["inside"], _family(name, config), bool(config.get("kv_lora_rank")))
        return tuple(f"model.layers.{megatron['layer']}.{n}" for n in inside)
    if megatron and megatron["top"] in _MEGATRON_TOP:
        return _MEGATRON_TOP[megatron["top"]]
    if _NOT_IN_FILES.match(name):
        raise ValueError(
            f"parameter {name!r}: found a name of Megatron's whose name in transformers is not known, wanted names as "
            "the model itself has them; rename it, or leave it out of params"
        )
    # transformers keeps Mixtral's block of experts as `mlp` in memory.
    family = MODEL_TYPES.get(str(config.get("model_type")), Family())
    if family.moe == "mlp":
        return (name,)
    roles = {"gate_proj": family.gate, "up_proj": family.up, "down_proj": family.down}
    in_files = name.replace(".mlp.", f".{family.moe}.")
    if match := re.fullmatch(r"(.*\.experts\.(?:\d+|\*)\.)(gate_proj|up_proj|down_proj)(\..*)", in_files):
        in_files = match[1] + roles[match[2]] + match[3]
    return (in_files,)


def module_of(name: str) -> str:
    """The module that a weight of the files belongs to.

    Example:
        >>> module_of("model.layers.0.mlp.experts.3.up_proj.weight")
        'model.layers.0.mlp.experts.3.up_proj'
    """
    return name.removesuffix(".weight")


def _names_in_layer(name: str, inside: str, family: Family, is_latent: bool) -> tuple[str, ...]:
    if match := _MEGATRON_EXPERT.fullmatch(inside):
        expert = match["of_list"] or match["grouped"]
        first = "linear_fc1" in (match["fc"], match["fc_of_list"])
        roles = (family.gate, family.up) if first else (family.down,)
        return tuple(f"{family.moe}.experts.{expert}.{role}.weight" for role in roles)
    if is_latent and inside in _MEGATRON_LATENT:
        return _MEGATRON_LATENT[inside]
    if inside not in _MEGATRON_LAYER:
        raise ValueError(
            f"parameter {name!r}: found {inside!r} in a Megatron layer, wanted one of {sorted(_MEGATRON_LAYER)}, or "
            "experts; leave it out of params, or give it its name in transformers"
        )
    return tuple(n.format(moe=family.moe, shared=family.shared) for n in _MEGATRON_LAYER[inside])


def _family(name: str, config: Mapping[str, Any]) -> Family:
    found = str(config.get("model_type"))
    if found not in MODEL_TYPES:
        raise ValueError(
            f"parameter {name!r}: found the model_type {found!r}, whose names in files are not known, wanted one of "
            f"{sorted(MODEL_TYPES)}; or experts in a list, whose names are those of the files"
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
