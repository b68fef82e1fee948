"""What an export will write, decided and checked before the first byte, and then its tensors, a group at a time."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checks import weights_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.export.files import progress
from fq_transforms.export.names import Part, check_config, expanded, module_of, parts
from fq_transforms.export.ties import check_ties
from fq_transforms.formats import Format, IntElement, code_bits
from fq_transforms.checks import check_state
from fq_transforms.pack import check_packable, pack
from fq_transforms.spec import Group, Inputs, Spec, refuse_inputs
from fq_transforms.state import State

__all__ = ["Coded", "Kind", "Kinds", "Plan", "inverse", "kind_of", "plan", "tensors"]

# Element, what shares a scale, and the type of the scale: what a target has a name for, or not.
Kind: TypeAlias = tuple[str, str, str]
# Of weights and of what they are multiplied with, if that is quantized.
Kinds: TypeAlias = tuple[Kind, Kind | None]
Formats: TypeAlias = tuple[Format, Format | None]


class Coded(NamedTuple):
    """One weight as `pack` has it, and its inputs: their format, and their amax [] if that is state."""

    format: Format
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    inputs: Format | None
    input_amax: Tensor | None


# To the tensors of the weight's module, by their last names.
Encode: TypeAlias = Callable[[Coded], dict[str, Tensor]]


class Plan(NamedTuple):
    """An export that has been checked.

    Attributes:
        params: All tensors of the model, by their names in memory.
        state: The amax of the quantized ones.
        groups: Group key to group.
        inputs: Group key to the inputs of its weights, where they are quantized.
        parts: What each group (by its key) and each other parameter (by its name) becomes in the files, in order.
        config: What config.json will hold.
        formats: Module of the files to the formats of its weight and of its inputs, for what is quantized.
        excluded: Modules of the files with a matrix that is not quantized, sorted.
    """

    params: Mapping[str, Tensor]
    state: State
    groups: dict[str, Group]
    inputs: dict[str, Inputs]
    parts: dict[str, list[Part]]
    config: dict[str, Any]
    formats: dict[str, Formats]
    excluded: list[str]


def kind_of(format: Format) -> Kind:
    """What decides how a format is stored: element, what shares a scale, type of the scale.

    Example:
        >>> from fq_transforms.formats import FP8_BLOCK, INT4_BLOCK32_KIMI
        >>> kind_of(INT4_BLOCK32_KIMI), kind_of(FP8_BLOCK)
        (('int4', '1x32', 'fp32'), ('e4m3', '128x128', 'fp32'))
    """
    element = format.element
    if isinstance(element, IntElement):
        name = f"int{code_bits(format)}"
    else:
        name = f"e{element.exponent_bits}m{element.mantissa_bits}"
    rows, columns = format.block
    if columns is None:
        return name, "tensor" if rows is None else "channel", format.scale
    return name, f"{rows}x{columns}", format.scale


def inverse(scale: Tensor, of_zero: float) -> Tensor:
    """1 / scale, and `of_zero` where the scale is 0, which marks weights that are all zero.

    Example:
        >>> inverse(torch.tensor([4.0, 0.0]), of_zero=1.0)
        tensor([0.2500, 1.0000])
    """
    return torch.where(scale == 0, torch.full_like(scale, of_zero), scale.reciprocal())


def plan(
    params: Mapping[str, Tensor],
    state: State,
    spec: Spec,
    config: Any,
    *,
    target: str,
    kinds: Collection[Kinds],
) -> Plan:
    """Check all that can be checked without packing, and decide every name.

    `kinds` is what the target has names for: weights, and with which inputs, None for such as are not quantized.

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: See `fq_transforms.export.modelopt_hf`.

    Example:
        >>> from fq_transforms.calibrate import calibrate
        >>> from fq_transforms.formats import FP8
        >>> from fq_transforms.select import select
        >>> params = {"lm_head.weight": torch.ones(4, 2), "norm.weight": torch.ones(2)}
        >>> spec = select(params, {"lm_head*": FP8})
        >>> config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        >>> state = calibrate(params, spec=spec)
        >>> list(plan(params, state, spec, config, target="t", kinds={(kind_of(FP8), None)}).parts)
        ['lm_head.weight', 'norm.weight']
    """
    entries = _config(config)
    if not spec.groups:
        raise ValueError(
            f"export to {target}: found no weights in the spec, and inputs of {len(spec.inputs)} groups, wanted "
            "weights to pack; give them a rule"
        )
    if all(of_inputs is None for _, of_inputs in kinds):
        refuse_inputs(spec, f"export to {target}")
    check(state, spec)
    of_weights = {kind for kind, _ in kinds}
    for group in spec.groups:
        check_packable(group)
        if kind_of(group.format) not in of_weights:
            raise ValueError(
                f"group {group.key!r}: found {group.format.name}, {kind_of(group.format)}, for which {target} has no "
                f"name, wanted one of {sorted(of_weights)}"
            )
        weights_of(params, group)
    inputs = _inputs(spec, target, kinds)
    for name, tensor in params.items():
        _check_storable(name, tensor)
    dtypes = {params[group.names[0]].dtype: group.key for group in spec.groups}
    if len(dtypes) > 1:
        raise ValueError(f"groups: found weights of {dtypes}, wanted one dtype; config.json has room for one")
    groups = {group.key: group for group in spec.groups}
    found = _parts(params, groups, entries)
    check_ties(state, groups, inputs, found)
    check_config(_rows_in_files(params, groups, found), entries)
    formats, excluded = _modules(params, groups, inputs, found)
    if entries.get("tie_word_embeddings"):  # not in the files, but a Linear module to readers
        excluded = sorted({*excluded, "lm_head"})
    entries["dtype"] = str(params[spec.groups[0].names[0]].dtype).removeprefix("torch.")
    return Plan(params, state, groups, inputs, found, entries, formats, excluded)


def tensors(plan: Plan, encode: Encode, what: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the files, under a progress bar called `what`.

    One group is packed at a time: what is yielded need not be kept. `encode` is the target's.
    """
    for source in progress(list(plan.parts), what):
        found = plan.parts[source]
        if source in plan.groups:
            yield from _packed(plan, plan.groups[source], found, encode)
            continue
        tensor = plan.params[source].detach()
        for name, rows in found:
            if "*" in name:
                yield from ((name.replace("*", str(e)), expert[rows]) for e, expert in enumerate(tensor))
            else:
                yield name, tensor[rows] if tensor.dim() else tensor


def _packed(plan: Plan, group: Group, found: Sequence[Part], encode: Encode) -> Iterator[tuple[str, Tensor]]:
    for name in group.names:
        # On a CPU `pack` says so; elsewhere it does not wait for the device.
        if not plan.params[name].is_cpu and not bool(plan.params[name].isfinite().all()):
            raise ValueError(f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights")
    leaves = pack(plan.params, {group.key: plan.state[group.key]}, spec=Spec((group,)))[group.key]
    inputs = plan.inputs.get(group.key)
    entry = None if inputs is None else plan.state[inputs.key]
    for expert in range(group.experts):
        codes, scale = leaves.codes[expert], leaves.scale[expert]
        global_scale = leaves["global_scale"][expert] if "global_scale" in leaves else None
        for name, rows in found:
            of_rows = _take(scale, _rows_of_scale(rows, group.format)) if scale.dim() else scale
            module = module_of(name.replace("*", str(expert)))
            amax = entry["amax"].expand(group.experts)[expert] if entry and "tokens" in entry else None
            of_inputs = None if inputs is None else inputs.format
            own = encode(Coded(group.format, _take(codes, rows), of_rows, global_scale, of_inputs, amax))
            yield from ((f"{module}.{last}", tensor) for last, tensor in own.items())


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of a matrix. PyTorch cannot take rows of float8 by their numbers, so they are taken as bytes."""
    return tensor.view(torch.uint8)[rows].view(tensor.dtype)


def _rows_of_scale(rows: slice | Tensor, format: Format) -> slice | Tensor:
    block = format.block[0] or 1
    if isinstance(rows, Tensor):
        assert block == 1, "checked by _check_cut"
        return rows
    return slice(*(None if row is None else row // block for row in (rows.start, rows.stop)))


def _config(config: Any) -> dict[str, Any]:
    entries: Any = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(entries, Mapping):
        raise ValueError(f"config: found {type(entries).__name__}, wanted model.config, or what config.json holds")
    for key, fix in (("model_type", "that of transformers"), ("architectures", "such as [type(model).__name__]")):
        if not entries.get(key):
            raise ValueError(f"config: found {key}={entries.get(key)!r}, wanted {fix}; engines choose a class by it")
    if entries.get("quantization_config"):
        raise ValueError("config: found a quantization_config, wanted the config of a model that is not quantized")
    if isinstance(entries["architectures"], str):
        raise ValueError(f"config: found architectures={entries['architectures']!r}, wanted a list of names")
    for key, value in entries.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"config: found {key}={value!r}, which JSON cannot hold, wanted a number, text or list"
            ) from error
    return {key: value for key, value in entries.items() if key != "torch_dtype"}  # `dtype` is its name now


def _check_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        found = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"parameter {name!r}: found {found}, wanted a dense tensor")
    if is_sharded(tensor):
        raise ValueError(f"parameter {name!r}: found a DTensor, wanted a plain tensor; gather the model first")
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r}: found a meta tensor, wanted one with values")


def _parts(
    params: Mapping[str, Tensor], groups: Mapping[str, Group], config: Mapping[str, Any]
) -> dict[str, list[Part]]:
    """What each group and each other parameter becomes. A group stands where its first parameter is."""
    group_of = {name: group for group in groups.values() for name in group.names}
    found: dict[str, list[Part]] = {}
    taken: dict[str, str] = {}
    for name, tensor in params.items():
        group = group_of.get(name)
        source = group.key if group else name
        if source in found or name.endswith("_extra_state"):
            continue
        shape = group.shape if group else tuple(tensor.shape[-2:])
        found[source] = parts(source, shape, config)
        if config.get("tie_word_embeddings") and found[source][0].name == "lm_head.weight":
            if group:
                raise ValueError(
                    f"group {source!r}: found tie_word_embeddings in config, by which the head is the embedding, "
                    "wanted a head of its own to quantize; exclude it with a rule to None"
                )
            _check_is_embedding(name, params)
            del found[source]  # transformers does not store it either
            continue
        experts = group.experts if group else len(tensor) if tensor.dim() else 0
        for part in found[source]:
            for in_files in expanded(part.name, experts):
                if (other := taken.setdefault(in_files, source)) != source:
                    raise ValueError(
                        f"parameters {other!r} and {source!r}: found {in_files!r} for both in files, wanted two names"
                    )
            if group:
                _check_cut(group, part)
    return found


def _check_is_embedding(head: str, params: Mapping[str, Tensor]) -> None:
    for name in (
        "model.embed_tokens.weight",
        "embedding.word_embeddings.weight",
        "module.embedding.word_embeddings.weight",
    ):
        if name in params and not torch.equal(params[head], params[name]):
            raise ValueError(
                f"parameter {head!r}: found other numbers than in {name!r}, and tie_word_embeddings in config, by "
                "which one of the two would be lost, wanted tie_word_embeddings=False"
            )


def _rows_in_files(
    params: Mapping[str, Tensor], groups: Mapping[str, Group], found: Mapping[str, list[Part]]
) -> dict[str, int]:
    """Names of the files, for every expert, to the rows of each."""
    rows: dict[str, int] = {}
    for source, of_source in found.items():
        group = groups.get(source)
        shape = group.shape if group else tuple(params[source].shape)
        experts = group.experts if group else shape[0] if shape else 0
        for part in of_source:
            own = len(torch.arange(shape[max(len(shape) - 2, 0)] if shape else 1)[part.rows])
            rows |= dict.fromkeys(expanded(part.name, experts), own)
    return rows


def _check_cut(group: Group, part: Part) -> None:
    block, rows = group.format.block[0] or 1, part.rows
    if block > 1 and (isinstance(rows, Tensor) or (rows.start or 0) % block or (rows.stop or 0) % block):
        raise ValueError(
            f"group {group.key!r}: found (out, in) = {group.shape}, of which {part.name!r} takes rows that cut a block "
            f"of {block} rows, wanted parts of whole blocks; choose another format"
        )


def _inputs(spec: Spec, target: str, kinds: Collection[Kinds]) -> dict[str, Inputs]:
    """Inputs by the group of their weights, each with a name beside them."""
    groups, found = {group.key: group for group in spec.groups}, dict[str, Inputs]()
    for inputs in spec.inputs:
        group = groups.get(key := inputs.key.removesuffix(".input"))
        if group is None:
            raise ValueError(
                f"inputs {inputs.key!r}: found no quantized weights {key!r} beside them, wanted some: files have no "
                "place for inputs alone; leave them out with a rule to None"
            )
        wanted = [of_inputs for of_weights, of_inputs in kinds if of_weights == kind_of(group.format) and of_inputs]
        if kind_of(inputs.format) not in wanted:
            others = f"one of {wanted}, or no inputs" if wanted else "no inputs"
            raise ValueError(
                f"inputs {inputs.key!r}: found {inputs.format.name}, {kind_of(inputs.format)}, beside weights in "
                f"{group.format.name}, for which {target} has no name, wanted {others}; take them out with a rule to "
                "None"
            )
        found[key] = inputs
    return found


def _modules(
    params: Mapping[str, Tensor],
    groups: Mapping[str, Group],
    inputs: Mapping[str, Inputs],
    found: Mapping[str, list[Part]],
) -> tuple[dict[str, Formats], list[str]]:
    formats: dict[str, Formats] = {}
    excluded: set[str] = set()
    for source, of_source in found.items():
        experts = groups[source].experts if source in groups else len(params[source]) if params[source].dim() else 0
        names = [name for part in of_source for name in expanded(part.name, experts)]
        if source in groups:
            of_inputs = inputs[source].format if source in inputs else None
            formats |= {module_of(name): (groups[source].format, of_inputs) for name in names}
        elif params[source].dim() > 1:
            excluded |= {module_of(name) for name in names}
    return formats, sorted(excluded)
