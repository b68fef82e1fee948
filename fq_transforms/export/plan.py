"""An export in two steps: a plan, decided and checked before the first byte, and then its tensors, group by group."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checks import check_state, weights_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.export.accounted import check_accounted, check_config
from fq_transforms.export.files import bytes_of, check_free, progress, write
from fq_transforms.export.names import FileTensor, Source, file_tensors, module_of
from fq_transforms.export.ties import check_ties
from fq_transforms.formats import FORMATS, Format, IntElement, code_bits
from fq_transforms.pack import check_packable, pack
from fq_transforms.spec import Group, Inputs, Spec, refuse_inputs
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = ["CodedWeight", "ExportPlan", "FormatKey", "FormatKeys", "Target", "export", "format_key", "inverse"]

# Element, what shares a scale, and the type of the scale.
FormatKey: TypeAlias = tuple[str, str, str]
# Of weights and of their inputs, None if these are not quantized.
FormatKeys: TypeAlias = tuple[FormatKey, FormatKey | None]

EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|embed_in|wte)\.weight")


class CodedWeight(NamedTuple):
    """One weight as `pack` has it.

    Attributes:
        format: Its format.
        codes: [out, packed in].
        scale: One number per granule.
        global_scale: [], of two-level formats.
        dtype: Of the fake-quantized weight that a reader shall get.
        inputs: Format of the inputs, where they are quantized.
        input_amax: [], where it is state.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    dtype: torch.dtype
    inputs: Format | None
    input_amax: Tensor | None


class ExportPlan(NamedTuple):
    """An export that has been checked.

    Attributes:
        params: All tensors of the model, by their names in memory.
        state: Of the quantized ones.
        sources: What each group and each other parameter becomes in the files, in order.
        config: What config.json will hold.
        dtype: Of the fake-quantized weights.
    """

    params: Mapping[str, Tensor]
    state: State
    sources: list[Source]
    config: dict[str, Any]
    dtype: torch.dtype

    @property
    def formats(self) -> dict[str, tuple[Format, Format | None]]:
        """Module of the files to the formats of its weight and of its inputs, for what is quantized."""
        return {
            module_of(name): (source.group.format, source.inputs.format if source.inputs else None)
            for source in self.sources
            if source.group
            for name in source.names
        }

    @property
    def excluded(self) -> list[str]:
        """Modules of the files with a matrix that is not quantized, sorted."""
        plain = [source for source in self.sources if not source.group and len(source.shape) > 1]
        modules = {module_of(name) for source in plain for name in source.names}
        # Not in the files, but a Linear module to readers.
        return sorted(modules | {"lm_head"} if self.config.get("tie_word_embeddings") else modules)


class Target(NamedTuple):
    """A layout of files: all in which one differs from another.

    Attributes:
        name: In messages.
        formats: Of weights and inputs, all that the layout has a name for.
        check: Raises ValueError for what its readers could not use.
        encode: From a weight to the tensors of its module, by their last names.
        documents: The JSON files, by name.
    """

    name: str
    formats: Collection[FormatKeys]
    check: Callable[[ExportPlan], None]
    encode: Callable[[CodedWeight], dict[str, Tensor]]
    documents: Callable[[ExportPlan], dict[str, Any]]


def format_key(format: Format) -> FormatKey:
    """What decides how a format is stored: element, what shares a scale, type of the scale.

    Example:
        >>> from fq_transforms.formats import FP8_BLOCK, INT4_BLOCK32_KIMI
        >>> format_key(INT4_BLOCK32_KIMI), format_key(FP8_BLOCK)
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


def _names_of(keys: Collection[FormatKey]) -> str:
    """The formats that are stored so, for a message."""
    return ", ".join(sorted(format.name for format in FORMATS.values() if format_key(format) in keys))


def inverse(scale: Tensor, of_zero: float) -> Tensor:
    """1 / scale, and `of_zero` where the scale is 0, which marks weights that are all zero.

    Example:
        >>> inverse(torch.tensor([4.0, 0.0]), of_zero=1.0)
        tensor([0.2500, 1.0000])
    """
    return torch.where(scale == 0, torch.full_like(scale, of_zero), scale.reciprocal())


def export(
    target: Target,
    path: str | os.PathLike[str],
    fq: Transform,
    params: Mapping[str, Tensor],
    state: State,
    config: Any,
    max_shard_size: int | str,
) -> None:
    """Write a folder in the layout of a target. Arguments and errors: `fq_transforms.export.compressed_tensors`."""
    folder, limit = Path(os.path.realpath(path)), bytes_of(max_shard_size)
    check_free(folder)
    plan = _plan(target, fq, params, state, config)
    target.check(plan)
    write(folder, _tensors(plan, target, f"export {folder.name}"), target.documents(plan), limit)


def _plan(target: Target, fq: Transform, params: Mapping[str, Tensor], state: State, config: Any) -> ExportPlan:
    """Check all that can be checked without packing, and decide every name."""
    spec, entries = fq.spec, _config(config)
    if not spec.groups:
        raise ValueError(
            f"export to {target.name}: found no weights in the spec, and inputs of {len(spec.inputs)} groups, wanted "
            "weights to pack; give them a rule"
        )
    if all(inputs is None for _, inputs in target.formats):
        refuse_inputs(spec, f"export to {target.name}")
    check_state(state, spec)
    known = {weights for weights, _ in target.formats}
    for group in spec.groups:
        check_packable(group)
        if format_key(group.format) not in known:
            raise ValueError(
                f"group {group.key!r}: found {group.format.name}, {format_key(group.format)}, for which {target.name} "
                f"has no name, wanted one of {_names_of(known)}"
            )
        weights_of(params, group)
    inputs = _inputs(target, spec)
    for group in spec.groups:
        key = format_key(group.format)
        if group.key not in inputs and (key, None) not in target.formats:
            wanted = {of_inputs for weights, of_inputs in target.formats if weights == key and of_inputs}
            raise ValueError(
                f"group {group.key!r}: found {group.format.name} without inputs, which engines that read {target.name} "
                f"compute otherwise, wanted inputs in {_names_of(wanted)} too: Rule(pattern, weights, inputs); or "
                "another layout"
            )
    for name, tensor in params.items():
        _check_storable(name, tensor)
    dtypes = {params[group.names[0]].dtype: group.key for group in spec.groups}
    if fq.out_dtype is None and len(dtypes) > 1:
        raise ValueError(
            f"groups: found weights of {dtypes}, wanted one dtype, or an out_dtype of fq; config.json has room for one"
        )
    dtype = fq.out_dtype or next(iter(dtypes))
    sources = _sources(params, spec.groups, inputs, entries)
    check_accounted(sources)
    check_ties(state, sources)
    check_config(sources, entries)
    _check_layers(sources)
    return ExportPlan(params, state, sources, entries | {"dtype": str(dtype).removeprefix("torch.")}, dtype)


def _tensors(plan: ExportPlan, target: Target, what: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the files. One group is packed at a time: what is yielded need not be kept."""
    for source in progress(plan.sources, what):
        if source.group:
            yield from _packed(plan, source, source.group, target)
            continue
        whole = plan.params[source.name].detach()
        for tensor in source.tensors:
            experts = whole if "*" in tensor.name else whole[None]
            for name, weight in zip(source.names_of(tensor), experts, strict=True):
                yield name, weight[tensor.rows] if weight.dim() else weight


def _packed(plan: ExportPlan, source: Source, group: Group, target: Target) -> Iterator[tuple[str, Tensor]]:
    for name in group.names:
        # On a CPU `pack` says so; elsewhere it does not wait for the device.
        if not plan.params[name].is_cpu and not bool(plan.params[name].isfinite().all()):
            raise ValueError(f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights")
    leaves = pack(plan.params, {group.key: plan.state[group.key]}, spec=Spec((group,)))[group.key]
    inputs = source.inputs
    amax = plan.state[inputs.key].get("amax") if inputs else None
    for expert in range(group.experts):
        codes, scale = leaves["codes"][expert], leaves["scale"][expert]
        for name, rows in source.tensors:
            coded = CodedWeight(
                format=group.format,
                codes=_take(codes, rows),
                scale=_take(scale, _rows_of_scale(rows, group.format)) if scale.dim() else scale,
                global_scale=leaves["global_scale"][expert] if "global_scale" in leaves else None,
                dtype=plan.dtype,
                inputs=inputs.format if inputs else None,
                input_amax=None if amax is None else amax.expand(group.experts)[expert],
            )
            module = module_of(name.replace("*", str(expert)))
            yield from ((f"{module}.{last}", tensor) for last, tensor in target.encode(coded).items())


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
    for key, fix in (
        ("model_type", "that of transformers"),
        ("architectures", "config.architectures = [type(model).__name__]"),
    ):
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


def _sources(
    params: Mapping[str, Tensor], groups: Iterable[Group], inputs: Mapping[str, Inputs], config: Mapping[str, Any]
) -> list[Source]:
    """What each group and each other parameter becomes. A group stands where its first parameter is."""
    group_of = {name: group for group in groups for name in group.names}
    sources: dict[str, Source] = {}
    for parameter, tensor in params.items():
        group = group_of.get(parameter)
        name = group.key if group else parameter
        if name in sources or parameter.endswith("_extra_state"):
            continue
        shape = group.shape if group else tuple(tensor.shape[-2:])
        experts = group.experts if group else len(tensor) if tensor.dim() else 0
        source = Source(name, group, inputs.get(name), shape, experts, file_tensors(name, shape, config))
        if config.get("tie_word_embeddings") and source.tensors[0].name == "lm_head.weight":
            _check_is_embedding(source, params)
            continue  # transformers does not store it either
        if group:
            _check_name(group, config)
            for part in source.tensors:
                _check_cut(group, part)
        sources[name] = source
    return list(sources.values())


def _check_name(group: Group, config: Mapping[str, Any]) -> None:
    if "parametrizations" in group.key.split("."):
        raise ValueError(
            f"group {group.key!r}: found what torch.nn.utils.parametrize computes a weight from, wanted the weight"
        )
    if config.get("tie_word_embeddings") and EMBEDDING.fullmatch(group.key):
        raise ValueError(
            f"group {group.key!r}: found tie_word_embeddings in config, by which the head is the embedding, wanted it "
            "not quantized, or a head of its own; exclude it with a rule to None"
        )


def _check_layers(sources: Iterable[Source]) -> None:
    """Raise ValueError for a layer whose experts' roles are not alike: engines compute them in one kernel."""
    found: dict[str, dict[object, tuple[str, str | None, str | None]]] = {}
    for source in sources:
        group, inputs = source.group, source.inputs
        kind = tuple(format_key(each.format) if each else None for each in (group, inputs))  # formats of one layout
        names = source.name, group.format.name if group else None, inputs.format.name if inputs else None
        for tensor in source.tensors:
            block, is_expert, _ = tensor.name.partition(".experts.")
            if is_expert and len(source.shape) > 1:
                found.setdefault(block, {}).setdefault(kind, names)
    for block, kinds in found.items():
        if len(kinds) > 1:
            said = ", ".join(
                f"{name!r} {format or 'not quantized'}" + (f" with inputs in {of_inputs}" if of_inputs else "")
                for name, format, of_inputs in kinds.values()
            )
            raise ValueError(
                f"experts of {block!r}: found {said}, wanted one format for all roles of a layer, which engines "
                "compute together; let the rules treat them alike"
            )


def _check_is_embedding(head: Source, params: Mapping[str, Tensor]) -> None:
    if head.group:
        raise ValueError(
            f"group {head.name!r}: found tie_word_embeddings in config, by which the head is the embedding, wanted a "
            "head of its own to quantize; exclude it with a rule to None"
        )
    own = params[head.name]
    others = {name: other for name, other in params.items() if name != head.name and other.shape == own.shape}
    named = {name: other for name, other in others.items() if EMBEDDING.fullmatch(name)}
    are_equal = [torch.equal(own.float(), other.float()) for other in (named or others).values()]
    if not (all(are_equal) and named) and not (any(are_equal) and not named):
        raise ValueError(
            f"parameter {head.name!r}: found no embedding of the same numbers, among {list(named)}, and "
            "tie_word_embeddings in config, by which it would be lost, wanted tie_word_embeddings=False"
        )


def _check_cut(group: Group, part: FileTensor) -> None:
    block, rows = group.format.block[0] or 1, part.rows
    if block > 1 and (isinstance(rows, Tensor) or (rows.start or 0) % block or (rows.stop or 0) % block):
        raise ValueError(
            f"group {group.key!r}: found (out, in) = {group.shape}, of which {part.name!r} takes rows that cut a block "
            f"of {block} rows, wanted parts of whole blocks; choose another format"
        )


def _inputs(target: Target, spec: Spec) -> dict[str, Inputs]:
    """Inputs by the group of their weights, each with a name in the target."""
    groups, found = {group.key: group for group in spec.groups}, dict[str, Inputs]()
    for inputs in spec.inputs:
        group = groups.get(key := inputs.key.removesuffix(".input"))
        if group is None:
            raise ValueError(
                f"inputs {inputs.key!r}: found no quantized weights {key!r} beside them, wanted some: files have no "
                "place for inputs alone; leave them out with a rule to None"
            )
        own = format_key(group.format)
        wanted = [of_inputs for of_weights, of_inputs in target.formats if of_weights == own and of_inputs]
        if format_key(inputs.format) not in wanted:
            others = f"one of {wanted}, or no inputs" if wanted else "no inputs"
            raise ValueError(
                f"inputs {inputs.key!r}: found {inputs.format.name}, {format_key(inputs.format)}, beside weights in "
                f"{group.format.name}, for which {target.name} has no name, wanted {others}; take them out with a rule "
                "to None"
            )
        found[key] = inputs
    return found
