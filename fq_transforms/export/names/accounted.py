"""Whether the files have all of a model: each row and each name once, and the layers and experts that config counts."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fq_transforms.export.names.from_memory import Source, module_of

__all__ = ["DEEPSEEKS", "check_accounted", "check_config", "is_router", "text_configs"]

_IN_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?))\.(?P<layer>\d+)\.(?P<inside>.*)")
_EXPERT = re.compile(r"(?P<before>(?:.*\.)?(?:local_)?experts\.)(?P<expert>\d+)(?P<after>\..*)")
_ROUTER = re.compile(r"(?:mlp|moe|ffn|mixer|feed_forward|block_sparse_moe)\.(?:gate|router)(?:\.\w+)?\.weight")
# Parts of a model that config counts elsewhere than the text's layers.
_BESIDE_THE_TEXT = re.compile(r"(?:.*\.)?(?:mtp\w*|\w*(?:vision|visual|audio|image|talker|speech)\w*|encoder)\.")
_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_DECODER_DEPTHS = ("num_decoder_layers", "decoder_layers")  # where an encoder has another
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# Of models of several parts, the part that has experts; one may be within another.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
# Layers behind the last, which predict more than the next token.
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_MTP_LAYER = re.compile(r"(?:^|.*\.)mtp\w*\.(?:\w*\.)?(\d+)\.")
_INNER_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size")
_OUTER_WIDTHS = re.compile(r"hidden_size$|latent")  # between which and another an expert's matrices are
_ENDS = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?(?:embed_tokens|lm_head)\.weight")
_EXPERTS_MATRIX = re.compile(
    r".*\.experts\.(?:(?P<expert>\d+)\.)?(?P<role>gate_up_proj|gate_proj|up_proj|down_proj|w[123])(?:\.weight)?"
)
_DENSE = re.compile(r"(?:mlp|feed_forward|mixer)\.(?:gate_up|gate|up|down)_proj\.weight$")
DEEPSEEKS = ("deepseek_v3", "deepseek_v32", "kimi_k2")
# Model types whose router adds a trained buffer.
ROUTED_WITH_BIAS = (*DEEPSEEKS, "glm4_moe", "dots1")


def check_accounted(sources: Sequence[Source]) -> None:
    """Raise ValueError unless all of each source goes to the files once, and each name in the files has one source.

    Example:
        >>> from fq_transforms.export.names.from_memory import FileTensor
        >>> half = FileTensor("router.weight", slice(0, 2))
        >>> check_accounted([Source("router.weight", None, None, (4, 4), 4, [half])])
        Traceback (most recent call last):
        ...
        ValueError: parameter 'router.weight': found rows of it in files other than once, wanted each once
    """
    taken: dict[str, str] = {}
    for source in sources:
        group, rows = source.group, source.shape[0] if source.shape else 1
        count = torch.zeros(rows, dtype=torch.int64)
        for tensor in source.tensors:
            count[tensor.rows] += 1
        if not bool((count == 1).all()):
            raise ValueError(f"parameter {source.name!r}: found rows of it in files other than once, wanted each once")
        # Codes are called `weight`, or `weight_packed`, whatever the parameter is.
        for name in source.names if group is None else [f"{module_of(name)}.weight" for name in source.names]:
            if name in taken:
                raise ValueError(
                    f"parameters {taken[name]!r} and {source.name!r}: found {name!r} for both in files, wanted two "
                    "names"
                )
            taken[name] = source.name
    quantized = {module_of(name): source.name for source in sources if source.group for name in source.names}
    for name, parameter in taken.items():
        module, _, last = name.rpartition(".")
        if module in quantized and last.startswith(("weight_", "input_")):
            raise ValueError(
                f"parameter {parameter!r}: found {name!r} for it in files, beside the codes and scales of "
                f"{quantized[module]!r}, wanted none; leave it out of params"
            )


def check_config(sources: Iterable[Source], config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the files have the layers, experts, vocabulary and routing biases that config says.

    A part of a model, such as one rank's, has names like those of a whole one. What config does not say is not checked,
    but that experts count from zero without a gap, alike in all layers that have any.
    """
    *_, text = text_configs(config)
    shapes = {name: shape for source in sources for name, shape in _shapes_of(source)}
    _check_layers_and_experts(shapes, text)
    _check_widths(shapes, text)
    for name in shapes if text.get("model_type") in ROUTED_WITH_BIAS else ():
        bias = f"{name.removesuffix('.weight')}.e_score_correction_bias"
        if name.endswith(".mlp.gate.weight") and bias not in shapes:
            raise ValueError(f"params: found {name!r} alone, wanted {bias!r} too, a buffer; pass model.state_dict()")


def text_configs(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config, and within it those of the part that has experts, from the outermost on.

    Example:
        >>> [*text_configs({"a": 1, "text_config": {"b": 2}})][-1]
        {'b': 2}
    """
    inner: Any = config
    while inner is not None:
        yield inner
        inner = next((inner[key] for key in _TEXT_CONFIGS if isinstance(inner.get(key), Mapping)), None)


def is_router(name: str) -> bool:
    """True for the matrix that sends tokens to experts.

    Example:
        >>> is_router("model.layers.0.mlp.gate.weight"), is_router("model.layers.0.mlp.gate_proj.weight")
        (True, False)
    """
    match = _IN_LAYER.match(name)
    return match is not None and _ROUTER.fullmatch(match["inside"]) is not None


def _shapes_of(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the files, and the shape of each; of a stack that rules select, its experts first."""
    shape = source.shape
    for tensor in source.tensors:
        rows = len(torch.arange(shape[0] if shape else 1)[tensor.rows])
        own = (rows, *shape[1:]) if shape else ()
        is_whole = source.group is not None and source.group.stacked and "*" not in tensor.name
        for name in source.names_of(tensor):
            yield name, (source.experts, *own) if is_whole else own


def _check_widths(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Raise ValueError unless matrices are as wide as config says, and as many experts lie in a stack."""
    hidden, vocabulary = (config[key] if type(config.get(key)) is int else 0 for key in ("hidden_size", "vocab_size"))
    inner = _inner_widths(shapes, config)
    outer = {width for key, width in config.items() if type(width) is int and _OUTER_WIDTHS.search(str(key))}
    of_experts, told = _count(config, _EXPERT_COUNTS)
    for name, shape in shapes.items():
        if _BESIDE_THE_TEXT.match(name):
            continue
        is_end = _ENDS.fullmatch(name)
        if is_end and vocabulary and shape[0] != vocabulary:
            raise ValueError(
                f"parameter {name!r}: found {shape[0]} rows, wanted {vocabulary}, as vocab_size in config says; cut "
                "the padding off"
            )
        if (is_end or is_router(name)) and hidden and len(shape) == 2 and shape[1] != hidden:
            raise ValueError(
                f"parameter {name!r}: found {shape}, wanted rows of {hidden}, as hidden_size in config says; give the "
                "config of this model"
            )
        match = _EXPERTS_MATRIX.fullmatch(name)
        if not match or len(shape) != (2 if match["expert"] else 3):
            continue
        if len(shape) == 3 and told and shape[0] != told:
            raise ValueError(
                f"parameter {name!r}: found {shape[0]} experts, wanted {told}, as {of_experts} in config says"
            )
        wanted = {2 * width for width in inner.values()} if match["role"] == "gate_up_proj" else {*inner.values()}
        a, b = shape[-2:]
        if hidden and wanted and not ((a in outer and b in wanted) or (b in outer and a in wanted)):
            raise ValueError(
                f"parameter {name!r}: found a matrix {(a, b)}, wanted sides of {sorted(outer)} and {sorted(wanted)}, "
                f"as hidden_size and {', '.join(inner)} in config say; give the config of this model"
            )


def _inner_widths(shapes: Iterable[str], config: Mapping[str, Any]) -> dict[str, int]:
    """What config says of the width between an expert's matrices; nothing where that is not one number."""
    for key in _INNER_WIDTHS:
        if config.get(key) is not None:
            return {key: config[key]} if type(config[key]) is int else {}
    is_dense = any(_DENSE.search(name) for name in shapes)
    width = config.get("intermediate_size")
    return {} if is_dense or type(width) is not int else {"intermediate_size": width}


class _Layer(NamedTuple):
    """What a layer has: for each role of its experts their numbers, and the names of its routers."""

    experts: dict[str, set[int]]
    routers: list[str]


def _layers_of(names: Iterable[str]) -> dict[str, dict[int, _Layer]]:
    """All layers, by what is before their number, and by number."""
    stacks: dict[str, dict[int, _Layer]] = {}
    for name in names:
        if match := _IN_LAYER.match(name):
            layer = stacks.setdefault(match["stack"], {}).setdefault(int(match["layer"]), _Layer({}, []))
            if expert := _EXPERT.fullmatch(match["inside"]):
                role = expert["before"] + "*" + expert["after"]
                layer.experts.setdefault(role, set()).add(int(expert["expert"]))
            elif _ROUTER.fullmatch(match["inside"]):
                layer.routers.append(name)
    return stacks


def _count(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, int]:
    """The first of some numbers that config has, with its name; no name and 0 for none, or one for each layer."""
    found = {key: config[key] for key in keys if config.get(key)}
    for key, number in found.items():
        if type(number) is int:
            return key, number
        if not isinstance(number, list | tuple | dict):
            raise ValueError(f"config: found {key}={number!r}, wanted a whole number")
    return "", 0


def _check_layers_and_experts(names: Iterable[str], config: Mapping[str, Any]) -> None:
    names = list(names)
    stacks = _layers_of(names)
    of_depth, depth = _count(config, _DEPTHS)
    of_experts, told = _count(config, _EXPERT_COUNTS)
    is_by_layer = any(isinstance(config.get(key), list) for key in _EXPERT_COUNTS)
    of_whole = of_depth, depth
    for stack, layers in stacks.items():
        is_text = not _BESIDE_THE_TEXT.match(f"{stack}.")
        of_depth, depth = of_whole
        if "decoder" in stack.split(".") and (of_decoder := _count(config, _DECODER_DEPTHS))[0]:
            of_depth, depth = of_decoder
        has_experts = any(layer.experts or layer.routers for layer in layers.values())
        missing = [number for number in range(min(depth, len(layers) + 1)) if number not in layers]
        if missing and is_text and (has_experts or stack == "model.layers"):
            raise ValueError(
                f"params: found no layer {missing[0]} of {stack!r}, wanted {depth}, as {of_depth} in config says"
            )
        roles = {role for layer in layers.values() for role in layer.experts}
        beyond = sorted(number for number in layers if number >= depth + _count(config, _MTP_COUNTS)[1])
        if depth and beyond and is_text and (has_experts or stack == "model.layers"):
            raise ValueError(
                f"params: found layer {beyond[0]} of {stack!r}, wanted no more than {depth}, as {of_depth} in config "
                "says, and those for more tokens; give the config of this model"
            )
        most = max((max(found) + 1 for layer in layers.values() for found in layer.experts.values()), default=0)
        said = f"as {of_experts} in config says" if told and is_text else "as another role or layer has"
        for number, layer in layers.items():
            if is_by_layer:  # config has a number for each layer, whose order is not known
                most = max(map(len, layer.experts.values()), default=0)
            wanted = told if told and is_text else most
            if layer.routers and not layer.experts and most:
                raise ValueError(
                    f"params: found the router {layer.routers[0]!r} and no experts in layer {number} of {stack!r}, "
                    f"wanted {wanted}; gather the experts of all ranks"
                )
            if layer.experts and (lacks := sorted(roles - layer.experts.keys())):
                raise ValueError(
                    f"params: found no {lacks[0]!r} in layer {number} of {stack!r}, whose experts have "
                    f"{sorted(layer.experts)[0]!r}, wanted all roles that another layer has"
                )
            for role, found in layer.experts.items():
                if len(found) != wanted or max(found) + 1 != wanted:
                    raise ValueError(
                        f"params: found {len(found)} experts in layer {number} of {stack!r}, {role!r}, wanted "
                        f"{wanted}, {said}; gather the experts of all ranks"
                    )
    _check_promised(names, stacks, config, of_whole[1])


def _check_promised(
    names: Iterable[str], stacks: Mapping[str, Mapping[int, object]], config: Mapping[str, Any], depth: int
) -> None:
    """Raise ValueError if config says that there are layers for more tokens, and there are fewer."""
    key, count = _count(config, _MTP_COUNTS)
    text = [layers for stack, layers in stacks.items() if not _BESIDE_THE_TEXT.match(f"{stack}.")]
    is_there = any(all(n in layers for n in range(depth, depth + count)) for layers in text)
    apart = {int(match[1]) for match in map(_MTP_LAYER.match, names) if match}
    if key and not is_there and len(apart) < count:
        raise ValueError(
            f"params: found no layer {depth} and {len(apart)} of 'mtp', wanted {count}, as {key} in config says; "
            f"transformers leaves them out: add them from the model's own files, or give a config with {key}=0"
        )
