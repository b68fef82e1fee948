"""An export in two steps: a plan, decided and checked before the first byte, and then its tensors, group by group."""

import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checkpoint.storage import local_path
from fq_transforms.checks import check_state, weights_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.export.files.directory import bytes_of, check_free, progress
from fq_transforms.export.files.shards import TensorType, type_of, write
from fq_transforms.export.layouts.stored import Difference, difference, stored
from fq_transforms.export.names.accounted import DEEPSEEKS, check_accounted, check_config, is_router
from fq_transforms.export.names.families import is_tied
from fq_transforms.export.names.from_memory import FileTensor, Source, check_codes, file_tensors, module_of, of_group
from fq_transforms.export.names.ties import check_ties, is_fused
from fq_transforms.fakequant import fakequant
from fq_transforms.formats import E4M3, FORMATS, FP8, Format, IntElement, code_bits, is_own
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.pack import check_packable, pack
from fq_transforms.spec import WITHOUT_INPUTS, Group, Inputs, Spec, ranges, refuse_inputs
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = [
    "CodedWeight",
    "Engine",
    "ExportPlan",
    "FormatKey",
    "FormatKeys",
    "Target",
    "check_inputs",
    "check_values",
    "export",
    "format_key",
    "largest",
    "part_of",
    "planned",
    "tensors_of",
    "types_of",
    "warn_of_notes",
]

# Element, what shares a scale, and the type of the scale.
FormatKey: TypeAlias = tuple[str, str, str]
# Of weights and of their inputs, None if these are not quantized.
FormatKeys: TypeAlias = tuple[FormatKey, FormatKey | None]

# What DeepSeek V3's config says on the hub and transformers leaves out: without it vLLM drops the routing bias, and
# takes a softmax for the sigmoid.
DEEPSEEK = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# The same of who has files.
_WEIGHTS_ALONE = (
    "leave out inputs= (--inputs), and inputs in rules, as fqt.presets.weights_only(rules) does, and in a state"
)
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|embed_in|wte)\.weight")


class CodedWeight(NamedTuple):
    """One weight as `pack` has it.

    Attributes:
        format: Its format.
        scheme: The target's word for it.
        codes: [out, packed in].
        scale: One number per granule, as files have it: see `export.layouts.stored`.
        global_scale: [], of two-level formats, likewise.
        inputs: Format of the inputs, where they are quantized.
        input_amax: [], where it is state.
    """

    format: Format
    scheme: Any
    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    inputs: Format | None
    input_amax: Tensor | None


class ExportPlan(NamedTuple):
    """An export that has been checked.

    Attributes:
        params: All tensors of the model, by their names in memory.
        state: Of the quantized ones.
        sources: What each group and each other parameter becomes in the files, in order.
        schemes: The target's word for each quantized source, by its name.
        config: What config.json will hold.
        dtype: Of the fake-quantized weights.
        is_tied: The head is the embedding.
    """

    params: Mapping[str, Tensor]
    state: State
    sources: list[Source]
    schemes: Mapping[str, Any]
    config: dict[str, Any]
    dtype: torch.dtype
    is_tied: bool = False

    @property
    def modules(self) -> dict[str, Any]:
        """Module of the files to the target's word for its weight and inputs, for what is quantized."""
        quantized = [source for source in self.sources if source.group]
        return {module_of(name): self.schemes[source.name] for source in quantized for name in source.names}

    @property
    def excluded(self) -> list[str]:
        """Modules of the files with a matrix that is not quantized, sorted."""
        plain = [source for source in self.sources if not source.group and len(source.shape) > 1]
        modules = {module_of(name) for source in plain for name in source.names}
        # Not in the files, but a Linear module to readers.
        return sorted(modules | {"lm_head"} if self.is_tied else modules)


class Target(NamedTuple):
    """A layout of files: all in which one differs from another.

    Attributes:
        name: In messages.
        layout: Of `formats.LAYOUTS`.
        documents: The JSON files, by name.
        schemes: Its word for formats of weights and inputs, for all that it has one for; None: weights are plain.
        check: Raises ValueError for numbers that its readers could not use.
        note: What its readers do otherwise than the spec says, for a warning; None for nothing.
        encode: From a weight to the tensors of its module, by their last names; None where weights are plain.
    """

    name: str
    layout: str
    documents: Callable[[ExportPlan], dict[str, Any]]
    schemes: Mapping[FormatKeys, Any] | None = None
    check: Callable[[ExportPlan], None] | None = None
    note: Callable[[ExportPlan], str | None] | None = None
    encode: Callable[[CodedWeight], dict[str, Tensor]] | None = None


class Engine(NamedTuple):
    """What one reader loads of one layout.

    Attributes:
        name: In messages.
        version: That was tried.
        loads: By place and formats, the scheme that it wants in place of the layout's own, or None for that one. None
            in place of all: plain weights, of any format.
        models: Architectures that it does not load, though their files would be right.
    """

    name: str
    version: str
    loads: Mapping[str, Mapping[FormatKeys, Any]] | None
    models: tuple[str, ...] = ()


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


def export(
    target: Target,
    reader: Engine | None,
    path: str | os.PathLike[str],
    fq: Transform,
    params: Mapping[str, Tensor],
    state: State,
    config: Any,
    max_shard_size: int | str,
) -> None:
    """Write a folder in the layout of a target, for a reader. Arguments and errors: `fq_transforms.export.save`."""
    folder, limit = local_path(path), bytes_of(max_shard_size)
    check_free(folder)
    plan = planned(target, reader, fq.spec, params, config, state=state, out_dtype=fq.out_dtype)
    check_values(plan, target)
    warn_of_notes(plan, target, stacklevel=4)
    _warn_of_differences(plan, target)
    sources = progress(plan.sources, f"export {folder.name}")
    tensors = (pair for source in sources for pair in tensors_of(plan, source, target))
    types = {name: one for source in plan.sources for name, one in types_of(plan, source, target).items()}
    write(folder, types, tensors, target.documents(plan), limit)


def planned(
    target: Target,
    reader: Engine | None,
    spec: Spec,
    params: Mapping[str, Tensor],
    config: Any,
    *,
    state: State | None = None,
    out_dtype: torch.dtype | None = None,
) -> ExportPlan:
    """Check all that can be checked without values, and decide every name.

    Args:
        target: The layout.
        reader: Who must load it, if somebody must.
        spec: What is quantized.
        params: All tensors of the model; where there is no state, of a folder: on the meta device, by names of files.
        config: `model.config`, or what config.json holds.
        state: Of the weights and inputs; None if it is made later, group by group.
        out_dtype: Of the weights that files stand for; None for their own.
    """
    entries, is_folder = config_of(config), state is None
    if not spec.groups and not (is_folder and target.schemes is None):
        raise ValueError(
            f"export to {target.name}: found no weights in the spec, and inputs of {len(spec.inputs)} groups, wanted "
            "weights to pack; give them a rule"
        )
    if target.schemes is None:
        refuse_inputs(spec, f"export to {target.name}", _WEIGHTS_ALONE if is_folder else WITHOUT_INPUTS)
    inputs = _inputs(spec)
    for group in spec.groups:
        if target.schemes is not None:
            check_packable(group)
            _check_scheme(target, target.schemes, group, inputs.get(group.key))
        weights_of(params, group)
    if state is not None:
        _check_in_memory(params, state, spec)
    dtypes = {params[group.names[0]].dtype: group.key for group in spec.groups}
    if out_dtype is None and len(dtypes) > 1:
        fix = "store them in one dtype first, or select those of one" if is_folder else "give fq an out_dtype"
        raise ValueError(f"groups: found weights of {dtypes}, wanted one dtype: config.json has room for one; {fix}")
    dtype = out_dtype or next(iter(dtypes), None)
    sources = _sources(params, spec.groups, inputs, entries, is_folder=is_folder)
    check_accounted(sources)
    schemes: dict[str, Any] = {}
    if target.schemes is not None:
        for source in sources:
            if source.group:
                check_codes(source.group, source.tensors)
                _check_cuts(source.group, source.tensors)
                schemes[source.name] = _scheme_for(target.name, target.schemes, reader, source)
        check_ties(sources, state)
    check_config(sources, entries)
    if target.schemes is not None:
        _check_layers(sources)
    if reader is not None:
        _check_model(reader, sources, schemes, entries)
    if dtype is not None:
        entries |= {"dtype": str(dtype).removeprefix("torch.")}
    tied = _is_tied(params, entries, is_folder)
    return ExportPlan(params, state or {}, sources, schemes, entries, dtype or torch.bfloat16, tied)


def warn_of_notes(plan: ExportPlan, target: Target, *, stacklevel: int) -> None:
    """Warn of what the target's readers do otherwise."""
    if target.note is not None and (note := target.note(plan)):
        warnings.warn(note, stacklevel=stacklevel)


def check_values(plan: ExportPlan, target: Target) -> None:
    """Raise ValueError for numbers of the state that the target's readers could not use."""
    if target.check is not None:
        target.check(plan)


def _keys_of(group: Group, inputs: Inputs | None) -> FormatKeys:
    return format_key(group.format), format_key(inputs.format) if inputs else None


def _check_scheme(target: Target, schemes: Mapping[FormatKeys, Any], group: Group, inputs: Inputs | None) -> None:
    """Raise ValueError unless the layout has a word for a group and its inputs."""
    key, of_inputs = keys = _keys_of(group, inputs)
    if keys in schemes:
        return
    if all(key != weights for weights, _ in schemes):
        raise ValueError(
            f"group {group.key!r}: found {group.format.name}, {key}, for which {target.name} has no name, wanted one "
            f"of {_names_of({weights for weights, _ in schemes})}"
        )
    wanted = {beside for weights, beside in schemes if weights == key and beside}
    if inputs is None:
        raise ValueError(
            f"group {group.key!r}: found {group.format.name} without inputs, which engines that read {target.name} "
            f"compute otherwise, wanted inputs in {_names_of(wanted)} too: Rule(pattern, weights, inputs); or another "
            "layout"
        )
    others = f"one of {_names_of(wanted) or sorted(wanted)}, or no inputs" if wanted else "no inputs"
    raise ValueError(
        f"inputs {inputs.key!r}: found {inputs.format.name}, {of_inputs}, beside weights in {group.format.name}, for "
        f"which {target.name} has no name, wanted {others}; take them out with a rule to None"
    )


def _scheme_for(layout: str, schemes: Mapping[FormatKeys, Any], reader: Engine | None, source: Source) -> Any:
    """The layout's word for a source, as the reader wants it."""
    assert source.group is not None
    keys = _keys_of(source.group, source.inputs)
    if reader is None or reader.loads is None:
        return schemes[keys]
    place = _place_of(source)
    loads = reader.loads.get(place, {})
    if place not in reader.loads:
        raise ValueError(
            f"group {source.name!r}: found {source.group.format.name} for {place}, which {reader.name} "
            f"{reader.version} does not load quantized, wanted it left out with a rule to None; or layout='plain'"
        )
    if keys not in loads:
        alone = {weights for weights, inputs in loads if inputs is None}
        found = source.group.format.name + (f" with inputs in {source.inputs.format.name}" if source.inputs else "")
        beside = {inputs for weights, inputs in loads if weights == keys[0] and inputs}
        or_inputs = f", or inputs in {_names_of(beside)} beside them" if beside else ""
        raise ValueError(
            f"group {source.name!r}: found {found}, which {reader.name} {reader.version} does not load as {place} of "
            f"{layout}, wanted one of {_names_of(alone)}{or_inputs}; or layout='plain'"
        )
    return loads[keys] or schemes[keys]


def _place_of(source: Source) -> str:
    """Where a matrix is to a reader: "experts", "lm_head", "linears", or what is none of these."""
    name = source.tensors[0].name
    if ".experts." in name:
        return "experts"
    if EMBEDDING.fullmatch(name):
        return "an embedding"
    if is_router(name):
        return "a router"
    return "lm_head" if module_of(name).rpartition(".")[2] == "lm_head" else "linears"


def _check_model(
    reader: Engine, sources: Iterable[Source], schemes: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Raise ValueError for what a reader would not load, or would lose, of this model."""
    if unknown := [name for name in config["architectures"] if name in reader.models]:
        raise ValueError(
            f"config: found architectures={unknown}, which {reader.name} {reader.version} does not load, wanted "
            "another reader, or None"
        )
    missing = {key: value for key, value in DEEPSEEK.items() if key not in config}
    if reader.name == "vllm" and config["model_type"] in DEEPSEEKS and missing:
        raise ValueError(
            f"config: found no {list(missing)}, without which {reader.name} routes tokens otherwise, wanted "
            f"config.to_dict() | {missing}"
        )
    if reader.name == "vllm" and schemes:
        for source in sources:
            _check_fused_blocks(reader, source)
    if reader.name == "transformers" and schemes:
        _check_packed_alike(reader, sources, schemes)


def _check_packed_alike(reader: Engine, sources: Iterable[Source], schemes: Mapping[str, Any]) -> None:
    """Raise ValueError for packed codes in a model whose experts do not all have one scheme."""
    packed = next((name for name, scheme in schemes.items() if scheme.codes == "weight_packed"), None)
    found: list[tuple[str, Any]] = []
    for source in sources:
        if _place_of(source) == "experts" and all(scheme != schemes.get(source.name) for _, scheme in found):
            found.append((source.name, schemes.get(source.name)))
    if packed is not None and len(found) > 1:
        raise ValueError(
            f"experts: found {found[0][0]!r} and {found[1][0]!r} quantized differently, and packed codes of "
            f"{packed!r}, which {reader.name} {reader.version} does not load, wanted all experts in one format, or "
            "formats of 8 bits; or layout='plain'"
        )


def _check_fused_blocks(reader: Engine, source: Source) -> None:
    """Raise ValueError where a matrix that is fused with others ends within a square block."""
    block = (source.group.format.block[0] if source.group else None) or 1
    for name, rows in source.tensors:
        count = len(range(source.shape[0])[rows]) if isinstance(rows, slice) else len(rows)
        if is_fused(name) and count % block:
            raise ValueError(
                f"group {source.name!r}: found {count} rows of {name!r} in blocks of {block}, which {reader.name} "
                f"{reader.version} does not load of a matrix that it fuses with others, wanted a multiple of {block}; "
                "choose FP8_PER_CHANNEL, or layout='plain'"
            )


def _warn_of_differences(plan: ExportPlan, target: Target) -> None:
    """Warn of weights that readers get otherwise than `fakequant` has them."""
    layout = target.layout
    off = [source.group for source in plan.sources if source.group and not is_own(source.group.format, layout)]
    found: list[tuple[Group, Difference]] = []
    for group in progress(off, "compare with readers") if off else ():
        for name in group.names:
            _finite(plan, name)
        each = difference(plan.params, plan.state, group, layout, plan.dtype)
        if each.weights:
            found.append((group, each))
    if found:
        count = sum(each.weights for _, each in found)
        weights = sum(group.experts * group.shape[0] * group.shape[1] for group in off)
        formats = sorted({group.format.name for group, _ in found})
        largest = max(each.largest for _, each in found)
        warnings.warn(
            f"export to {target.name}: found {formats} in {len(found)} of {len(plan.sources)} groups and parameters, "
            f"the first {found[0][0].key!r}, whose scales its library applies in another order: {count:,} of "
            f"{weights:,} weights will be read otherwise, by at most {largest:.1e} of themselves; for none choose its "
            f"own formats: transform(spec, layout={layout!r})",
            stacklevel=4,
        )


def tensors_of(plan: ExportPlan, source: Source, target: Target, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the files of one source. What is yielded need not be kept.

    Args:
        plan: With the parameters and the state of at least this source.
        source: A group, or a parameter that is not quantized.
        target: The layout.
        first: Number of the first expert, where the source has a part of them.
    """
    if source.group and target.encode is not None:
        yield from _packed(plan, source, source.group, target.layout, target.encode, first)
        return
    weights = _fake(plan, source.group) if source.group else [plan.params[source.name].detach()]
    is_list = source.group is not None and not source.group.stacked
    for tensor in source.tensors:
        experts: Iterable[Tensor] = weights if is_list or "*" not in tensor.name else weights[0]
        for expert, weight in enumerate(experts, first):
            yield tensor.name.replace("*", str(expert)), weight[tensor.rows] if weight.dim() else weight


def types_of(plan: ExportPlan, source: Source, target: Target) -> dict[str, tuple[TensorType, int]]:
    """Types and bytes of what `tensors_of` gives: it is run on the meta device, for one expert, as all are alike."""
    group = source.group
    params = {name: plan.params[name].to("meta") for name in (group.names if group else (source.name,))}
    one = source
    if group and all("*" in tensor.name for tensor in source.tensors):
        one = part_of(source, slice(0, 1))
        params = {name: tensor[:1] if group.stacked else tensor for name, tensor in params.items()}
    state = {one.group.key: _on_meta(one.group)} if one.group else {}
    if source.inputs:
        state[source.inputs.key] = {name: leaf[:1] for name, leaf in _on_meta(source.inputs).items()}
    tensors = tensors_of(plan._replace(params=params, state=state), one, target)
    found = {name: (type_of(tensor), tensor.nbytes) for name, tensor in tensors}
    if one is source:
        return found
    modules = [(module_of(tensor.name.replace("*", "0")), module_of(tensor.name)) for tensor in source.tensors]
    return {
        now.replace("*", str(expert)) + name.removeprefix(was): type
        for expert in range(source.experts)
        for was, now in modules
        for name, type in found.items()
        if name == was or name.startswith(f"{was}.")
    }


def part_of(source: Source, part: slice) -> Source:
    """A source with some of its experts; its group has a key of its own."""
    group, count = source.group, part.stop - part.start
    assert group is not None
    if group.stacked:
        return source._replace(group=replace(group, experts=count), experts=count)
    numbers = f"{part.start}" if count == 1 else f"{part.start}-{part.stop - 1}"
    key, names = group.key.replace("*", numbers), group.names[part]
    return source._replace(group=replace(group, key=key, names=names, experts=count), experts=count)


def _on_meta(group: Group) -> dict[str, Tensor]:
    """The state of a group, or of inputs, without numbers."""
    dtypes = {"tokens": torch.float64}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float32), device="meta")
        for name, shape in group.leaf_shapes.items()
    }


def _fake(plan: ExportPlan, group: Group) -> list[Tensor]:
    """The fake-quantized weights of a group, stored as they are: a stack, one matrix, or one per expert."""
    if plan.params[group.names[0]].is_meta:
        return [plan.params[name].to(plan.dtype) for name in group.names]
    _check_finite(plan, group)
    weights = {name: plan.params[name].detach() for name in group.names}
    state, spec = {group.key: plan.state[group.key]}, Spec((group,))
    return list(fakequant(weights, state, spec=spec, out_dtype=plan.dtype).values())


def _on_host(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a GPU in memory of the host; others as they are."""
    if not any(leaf.is_cuda for leaf in leaves.values()):
        return dict(leaves)
    host = {name: torch.empty_like(leaf, device="cpu", pin_memory=True) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        host[name].copy_(leaf, non_blocking=True)
    torch.cuda.current_stream(leaves["codes"].device).synchronize()
    return host


def _check_finite(plan: ExportPlan, group: Group) -> None:
    """Raise ValueError for the first weight of a group with NaN or infinity; one wait for all of them."""
    weights = [plan.params[name].detach() for name in group.names]
    largest, _ = expert_amax(weights, format=FP8, transposed=group.transposed)
    if not bool(largest.isfinite().all()):
        for name in group.names:
            _finite(plan, name)


def _finite(plan: ExportPlan, name: str) -> Tensor:
    if not bool(plan.params[name].isfinite().all()):
        raise ValueError(f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights")
    return plan.params[name]


def _packed(
    plan: ExportPlan,
    source: Source,
    group: Group,
    layout: str,
    encode: Callable[[CodedWeight], dict[str, Tensor]],
    first: int,
) -> Iterator[tuple[str, Tensor]]:
    if plan.params[group.names[0]].is_cuda:  # on a CPU `pack` says so; elsewhere it does not wait for the device
        _check_finite(plan, group)
    leaves = pack(plan.params, {group.key: plan.state[group.key]}, spec=Spec((group,)))[group.key]
    inputs = source.inputs
    amax = plan.state[inputs.key].get("amax") if inputs else None
    if is_own(group.format, layout):  # nothing is computed any more: one copy from the device in place of hundreds
        leaves, amax = _on_host(leaves), amax if amax is None or amax.is_meta else amax.cpu()
    codes, scale, of_expert = leaves["codes"], leaves["scale"], leaves.get("global_scale")
    scales = _stored_scales(group, layout, scale, of_expert, plan.dtype)
    for expert, (own, global_scale) in enumerate(scales):
        for name, rows in source.tensors:
            coded = CodedWeight(
                format=group.format,
                scheme=plan.schemes[source.name],
                codes=_take(codes[expert], rows),
                scale=_take(own, _rows_of_scale(rows, group.format)) if own.dim() else own,
                global_scale=global_scale,
                inputs=inputs.format if inputs else None,
                input_amax=None if amax is None else amax.expand(group.experts)[expert],
            )
            module = module_of(name.replace("*", str(first + expert)))
            yield from ((f"{module}.{last}", tensor) for last, tensor in encode(coded).items())


def _stored_scales(
    group: Group, layout: str, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and global scale of each expert, as files have them: at once, unless numbers have to be searched for."""
    is_done = scale.is_meta  # there are no numbers, and types stay
    if not is_done and is_own(group.format, layout):
        (scale, global_scale), is_done = stored(group.format, layout, scale, global_scale, dtype), True
    for expert in range(group.experts):
        own = scale[expert], None if global_scale is None else global_scale[expert]
        yield own if is_done else stored(group.format, layout, *own, dtype)


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of a matrix. PyTorch cannot take rows of float8 by their numbers, so they are taken as bytes."""
    if isinstance(rows, slice):
        return tensor if rows == slice(None) else tensor[rows]
    return tensor.view(torch.uint8)[rows].view(tensor.dtype)


def _rows_of_scale(rows: slice | Tensor, format: Format) -> slice | Tensor:
    block = format.block[0] or 1
    if isinstance(rows, Tensor):
        assert block == 1, "checked by _check_cuts"
        return rows
    return slice(*(None if row is None else row // block for row in (rows.start, rows.stop)))


def config_of(config: Any) -> dict[str, Any]:
    """What config.json holds. Raises ValueError unless it is of a model of a known class that is not quantized."""
    entries: Any = config.to_dict() if hasattr(config, "to_dict") and not isinstance(config, type) else config
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
    names = entries["architectures"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config: found architectures={names!r}, wanted a list of names")
    for key, value in entries.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"config: found {key}={value!r}, which JSON cannot hold, wanted a number, text or list"
            ) from error
    renamed = {"dtype" if key == "torch_dtype" else key: value for key, value in entries.items()}
    return renamed | {key: entries[key] for key in ("dtype",) if key in entries}  # its name now, which counts


def _check_in_memory(params: Mapping[str, Tensor], state: State, spec: Spec) -> None:
    check_state(state, spec)
    for name, tensor in params.items():
        _check_storable(name, tensor)


def _check_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        found = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"parameter {name!r}: found {found}, wanted a dense tensor")
    if is_sharded(tensor):
        raise ValueError(f"parameter {name!r}: found a DTensor, wanted a plain tensor; gather the model first")
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r}: found a meta tensor, wanted one with values")


def _sources(
    params: Mapping[str, Tensor],
    groups: Iterable[Group],
    inputs: Mapping[str, Inputs],
    config: Mapping[str, Any],
    *,
    is_folder: bool = False,
) -> list[Source]:
    """What each group and each other parameter becomes. A group stands where its first parameter is.

    What comes from a folder has the names of files already, and all of it goes there.
    """
    group_of = {name: group for group in groups for name in group.names}
    sources: dict[str, Source] = {}
    kept = {name: tensor for name, tensor in params.items() if is_folder or not name.endswith("_extra_state")}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    own = {name: [FileTensor(name, slice(None))] for name in shapes}
    in_files, tied = own if is_folder else file_tensors(shapes, config), _is_tied(params, config, is_folder)
    for parameter, tensor in kept.items():
        group = group_of.get(parameter)
        name = group.key if group else parameter
        if name in sources:
            continue
        tensors = of_group(group, in_files) if group else in_files[parameter]
        is_stack = any("*" in part.name for part in tensors)
        shape = group.shape if group else shapes[parameter][1 if is_stack else 0 :]
        experts = group.experts if group else len(tensor) if tensor.dim() else 0
        source = Source(name, group, inputs.get(name), shape, experts, tensors)
        if tied and source.tensors[0].name == "lm_head.weight" and (group or not is_folder):
            _check_is_embedding(source, params)
            continue  # transformers does not store it either
        if group:
            _check_name(group, tied)
        sources[name] = source
    return list(sources.values())


def _is_tied(params: Mapping[str, Tensor], config: Mapping[str, Any], is_folder: bool) -> bool:
    """True if the head is the embedding. Of a folder with a head transformers, slow to import, is not asked."""
    said: Any = config.get("tie_word_embeddings")
    if is_folder and (isinstance(said, bool) or "lm_head.weight" in params):
        return bool(said)
    return is_tied(config)


def _check_name(group: Group, tied: bool) -> None:
    if "parametrizations" in group.key.split("."):
        raise ValueError(
            f"group {group.key!r}: found what torch.nn.utils.parametrize computes a weight from, wanted the weight"
        )
    if tied and EMBEDDING.fullmatch(group.key):
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


def _check_cuts(group: Group, parts: Iterable[FileTensor]) -> None:
    block = group.format.block[0] or 1
    for name, rows in parts:
        if block > 1 and (isinstance(rows, Tensor) or (rows.start or 0) % block or (rows.stop or 0) % block):
            raise ValueError(
                f"group {group.key!r}: found (out, in) = {group.shape}, of which {name!r} takes rows that cut a block "
                f"of {block} rows, wanted parts of whole blocks; choose another format"
            )


def _inputs(spec: Spec) -> dict[str, Inputs]:
    """Inputs by the group of their weights."""
    groups, found = {group.key for group in spec.groups}, dict[str, Inputs]()
    for inputs in spec.inputs:
        if (key := inputs.key.removesuffix(".input")) not in groups:
            raise ValueError(
                f"inputs {inputs.key!r}: found no quantized weights {key!r} beside them, wanted some: files have no "
                "place for inputs alone; leave them out with a rule to None"
            )
        found[key] = inputs
    return found


def check_inputs(plan: ExportPlan) -> None:
    """Raise ValueError where engines would find no scale that they can divide by."""
    for inputs in (source.inputs for source in plan.sources):
        amax = plan.state[inputs.key].get("amax") if inputs else None
        if inputs is None or amax is None:
            continue
        scale = amax / largest(inputs.format)
        wrong: list[int] = (scale < torch.finfo(torch.float32).tiny).nonzero().flatten().tolist()
        if wrong:
            of = f"expert {ranges(wrong)} of {inputs.experts}" if inputs.per_expert else "all experts"
            raise ValueError(
                f"state '{inputs.key}.amax': found {amax[wrong[0]].item()} for {of}, whose scale "
                f"{scale[wrong[0]].item()} engines cannot divide by, wanted more; calibrate with inputs that are not "
                f"all zero, or set it: state | {{{inputs.key!r}: state[{inputs.key!r}] | {{'amax': ...}}}}"
            )


def largest(format: Format) -> float:
    """Amax of inputs over their scale: the largest code; for NVFP4 times the largest scale of a block."""
    element = format.element
    code = float(element.qmax) if isinstance(element, IntElement) else float(element.max)
    return code * E4M3.max if format.scale == "e4m3" else code
