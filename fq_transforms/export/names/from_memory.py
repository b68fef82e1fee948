"""From the names that a model has in memory to those that its files have: text and numbers only.

in memory                                            in files
names of a class of transformers                     as `save_pretrained` writes them: see `families`
decoder.layers.0.mlp.experts.linear_fc1.weight{e}    as expert e of mlp.experts.gate_up_proj, under model.layers.0
decoder.layers.0.mlp.experts.local_experts.{e}....   likewise
names that the class has in files                    the same
names of a class that transformers does not have     the same, but for stacks of experts, which are refused
"""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.export.names.families import FileLayout, FileTensor, files_of, folded, model_of, rows_of
from fq_transforms.spec import Group, Inputs

__all__ = ["FileTensor", "Source", "check_codes", "file_tensors", "module_of", "of_group"]

# Names in Megatron-Core, under `decoder.layers.{n}.`, to those in memory of transformers, under `model.layers.{n}.`. A
# matrix that holds several, one below the other, has a name for each. Of names between bars it is the one that the
# class has.
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
    # Under multi-latent attention the same words mean other norms.
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight|self_attn.q_a_layernorm.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    "mlp.shared_experts.linear_fc1.weight": (
        "mlp.shared_expert.gate_proj.weight|mlp.shared_experts.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight|mlp.shared_experts.up_proj.weight",
    ),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_expert.down_proj.weight|mlp.shared_experts.down_proj.weight",),
    "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight",),
}
# Of hybrids, whose layers have one norm and one mixer each: Mamba's keeps its names, and experts have no gate.
_MEGATRON_MIXER = {
    **{f"mixer.{part}": (f"mixer.{part}",) for part in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias")},
    **{f"mixer.{part}.weight": (f"mixer.{part}.weight",) for part in ("in_proj", "norm", "out_proj")},
    "norm.weight": ("norm.weight",),
    "mixer.in_proj.layer_norm_weight": ("norm.weight",),
    "input_layernorm.weight": ("norm.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("norm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"mixer.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("norm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("norm.weight",),
    "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
    "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
    "mlp.router.weight": ("mixer.gate.weight",),
    "mlp.router.expert_bias": ("mixer.gate.e_score_correction_bias",),
    "mlp.shared_experts.linear_fc1.weight": ("mixer.shared_experts.up_proj.weight",),
    "mlp.shared_experts.linear_fc2.weight": ("mixer.shared_experts.down_proj.weight",),
}
_MEGATRON_TOP = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight|model.embeddings.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "decoder.final_norm.weight": ("model.norm_f.weight",),
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
_STACKED = re.compile(r"(?:.*\.)?experts\.[^.]+")


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


class _Origin(NamedTuple):
    """What a parameter is in memory of transformers.

    Attributes:
        name: Of transformers' parameter, or its own.
        expert: Which one of a stack.
        rows: Which of its rows; None for all of them.
    """

    name: str
    expert: int | None = None
    rows: Tensor | None = None


def file_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, list[FileTensor]]:
    """What each parameter becomes in the files: tensors with whole rows of it, `*` for the expert of a stack.

    Args:
        shapes: Of all parameters, by name.
        config: What config.json holds. `architectures` and `model_type` are read, what the class of transformers reads
            besides and, for a fused QKV, the numbers of heads.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Files of this model have no such name, or hold the parameter otherwise than by its rows; rows are
            not those of two halves or of all heads.

    Example:
        >>> config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        >>> fc1 = {f"decoder.layers.0.mlp.experts.linear_fc1.weight{e}": (8, 4) for e in range(2)}
        >>> [tensor.name for tensor in file_tensors(fc1, config)["decoder.layers.0.mlp.experts.linear_fc1.weight1"]]
        ['model.layers.0.block_sparse_moe.experts.1.w1.weight', 'model.layers.0.block_sparse_moe.experts.1.w3.weight']
    """
    model = model_of(config)
    if model is None:
        return {name: [FileTensor(_kept(name, config), slice(None))] for name in shapes}
    known = model.state_dict().keys()
    origins = {name: _origins(name, shape, known, config) for name, shape in shapes.items()}
    in_memory = dict[str, tuple[int, ...]]()
    for name, of_name in origins.items():
        for origin in of_name:
            shape = shapes[name] if origin.rows is None else (len(origin.rows), *shapes[name][1:])
            if origin.expert is not None:
                most = in_memory.get(origin.name, (0,))[0]
                shape = (max(most, origin.expert + 1), *shape)
            in_memory[origin.name] = shape
    files = files_of(model, in_memory)
    return {
        name: [tensor for origin in of_name for tensor in _of_origin(name, shapes[name], origin, files)]
        for name, of_name in origins.items()
    }


def of_group(group: Group, tensors: Mapping[str, Sequence[FileTensor]]) -> list[FileTensor]:
    """The tensors of the files that a group becomes, `*` for the expert.

    Raises:
        ValueError: The files have experts of other numbers.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> names = ("experts.0.up.weight", "experts.1.up.weight")
        >>> tensors = {name: [FileTensor(name, slice(None))] for name in names}
        >>> of_group(Group("experts.*.up.weight", names, FP8, 2, (4, 4)), tensors)
        [FileTensor(name='experts.*.up.weight', rows=slice(None, None, None))]
    """
    of_each = [tensors[name] for name in group.names]
    found = folded(of_each) if "*" in group.key else list(of_each[0])
    if found is None:
        raise ValueError(
            f"group {group.key!r}: found the names {[tensor.name for of in of_each for tensor in of]} for its experts "
            "in files, wanted names that differ by the expert's number; leave it out with a rule to None"
        )
    return found


def check_codes(group: Group, tensors: Sequence[FileTensor]) -> None:
    """Raise ValueError unless the files of a group have a module for each expert, beside whose weight its codes stand.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> name = "experts.gate_up_proj"
        >>> check_codes(Group(name, (name,), FP8, 8, (4, 4), stacked=True), [FileTensor(name, slice(None))])
        Traceback (most recent call last):
        ...
        ValueError: group 'experts.gate_up_proj': found one tensor for all of its 8 experts in files,
        'experts.gate_up_proj', wanted one for each, as engines read codes; leave it out with a rule to None, or take
        layout='plain'
    """
    for tensor in tensors:
        what = None
        if group.transposed:
            what = "matrices stored [in, out]", "[out, in]"
        elif group.stacked and "*" not in tensor.name:
            what = f"one tensor for all of its {group.experts} experts", "one for each"
        elif not tensor.name.endswith(".weight"):
            what = "a parameter that is no module's weight", "a name that ends in .weight"
        if what:
            raise ValueError(
                f"group {group.key!r}: found {what[0]} in files, {tensor.name!r}, wanted {what[1]}, as engines read "
                "codes; leave it out with a rule to None, or take layout='plain'"
            )


def module_of(name: str) -> str:
    """The module that a weight of the files belongs to.

    Example:
        >>> module_of("model.layers.0.mlp.experts.3.up_proj.weight")
        'model.layers.0.mlp.experts.3.up_proj'
    """
    return name.removesuffix(".weight")


def _kept(name: str, config: Mapping[str, Any]) -> str:
    """The same name, which a class that transformers does not have has in files too."""
    megatron, architecture = _MEGATRON_NAME.fullmatch(name), config["architectures"][0]
    if megatron and (megatron["inside"] or megatron["top"] in _MEGATRON_TOP):
        raise ValueError(
            f"parameter {name!r}: found a name of Megatron's and the architecture {architecture!r}, which transformers "
            "does not have, wanted one of its classes, whose names in files are known"
        )
    _check_kept(name)
    if _STACKED.fullmatch(name):
        raise ValueError(
            f"parameter {name!r}: found stacked experts of {architecture!r}, an architecture that transformers does "
            "not have, so that their names in files are not known, wanted experts in a list, whose names those are"
        )
    return name


def _check_kept(name: str) -> None:
    if _OF_A_WRAPPER.match(name):
        raise ValueError(
            f"parameter {name!r}: found a wrapper's prefix, wanted names as the model itself has them; give the module "
            "within the wrapper, merged, or leave it out of params"
        )
    if _NOT_IN_FILES.match(name):
        raise ValueError(
            f"parameter {name!r}: found a name of Megatron's whose name in transformers is not known, wanted names as "
            "the model itself has them; rename it, or leave it out of params"
        )


def _origins(name: str, shape: tuple[int, ...], known: Set[str], config: Mapping[str, Any]) -> list[_Origin]:
    """What a parameter is in memory of transformers: several parameters for a fused one of Megatron's."""
    megatron = None if name in known else _MEGATRON_NAME.fullmatch(name)
    if megatron and megatron["inside"]:
        layer = f"model.layers.{megatron['layer']}."
        has_mixers = any(one.startswith("model.layers.0.mixer.") for one in known)
        if match := _MEGATRON_EXPERT.fullmatch(megatron["inside"]):
            is_first = "linear_fc1" in (match["fc"], match["fc_of_list"])
            up = "mixer.experts.up_proj" if has_mixers else "mlp.experts.gate_up_proj"
            stack = up if is_first else f"{up.rpartition('.')[0]}.down_proj"
            return [_Origin(_of_class(name, layer + stack, known, config), int(match["of_list"] or match["grouped"]))]
        table = _MEGATRON_MIXER if has_mixers else _MEGATRON_LAYER
        if megatron["inside"] not in table:
            raise ValueError(
                f"parameter {name!r}: found {megatron['inside']!r} in a Megatron layer, wanted one of "
                f"{sorted(table)}, or experts; leave it out of params, or give it its name in transformers"
            )
        inside = table[megatron["inside"]]
        names = ["|".join(layer + either for either in one.split("|")) for one in inside]
    elif megatron and megatron["top"] in _MEGATRON_TOP:
        names = list(_MEGATRON_TOP[megatron["top"]])
    else:
        if name not in known:
            _check_kept(name)
        return [_Origin(name)]
    names = [_of_class(name, either, known, config) for either in names]
    if len(names) == 1:
        return [_Origin(names[0])]
    if len(names) == 3:
        rows = _rows_of_qkv(name, shape[0], config)
    else:
        if shape[0] % 2:
            raise ValueError(f"parameter {name!r}: found {shape[0]} rows of `out`, wanted two halves, gate and up")
        rows = torch.arange(shape[0]).chunk(2)
    return [_Origin(each, None, of_each) for each, of_each in zip(names, rows, strict=True)]


def _of_class(name: str, either: str, known: Set[str], config: Mapping[str, Any]) -> str:
    """Of some names, with a bar between them, the one that the class has."""
    for one in either.split("|"):
        if one in known:
            return one
    raise ValueError(
        f"parameter {name!r}: found no {either!r} in memory of {config['architectures'][0]!r}, wanted a class and a "
        "config that have it; leave it out of params, or give it its name in transformers"
    )


def _of_origin(name: str, shape: tuple[int, ...], origin: _Origin, files: FileLayout) -> list[FileTensor]:
    if reason := files.refused.get(origin.name):
        raise ValueError(
            f"parameter {name!r}: {reason}; give params by the names and in the layout of the files, as transformers' "
            "revert_weight_conversion makes them"
        )
    tensors = files.tensors[origin.name]
    if origin.expert is not None:
        if any("*" not in tensor.name for tensor in tensors):
            raise ValueError(
                f"parameter {name!r}: found one tensor for all experts in files, {tensors[0].name!r}, wanted one for "
                "each; stack them under the name that they have in transformers"
            )
        tensors = [FileTensor(tensor.name.replace("*", str(origin.expert)), tensor.rows) for tensor in tensors]
    if origin.rows is None:
        return tensors
    return [FileTensor(tensor.name, rows_of(origin.rows[tensor.rows], shape[0])) for tensor in tensors]


def _rows_of_qkv(name: str, out: int, config: Mapping[str, Any]) -> list[Tensor]:
    """Rows of q, k and v in Megatron's fused matrix: for each group of queries its queries, its key, its value."""
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    are_numbers = type(heads) is int and type(groups) is int
    if not are_numbers or not heads or not groups or heads % groups or out % (heads + 2 * groups):
        raise ValueError(
            f"parameter {name!r}: found {out} rows, num_attention_heads={heads!r} and num_key_value_heads={groups!r} "
            "in config, wanted rows for all heads, of queries, keys and values"
        )
    rows = torch.arange(out).view(groups, heads // groups + 2, -1)
    return [rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()]
