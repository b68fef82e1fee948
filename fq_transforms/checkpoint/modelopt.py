"""ModelOpt's names for an amax, to read all and to write two. Plain dicts of tensors; ModelOpt itself is not needed.

    entry, for the weights `...linear_fc1.weight{i}`, `...{i}.w1.weight` or stacked `...gate_up_proj`        holds
    ...linear_fc1.weight_quantizer.{i}._amax                         ModelOpt main, Transformer Engine       an expert
    ...linear_fc1.weight_quantizer_{i}._amax                         its first per-expert commits            an expert
    ...experts.{i}.linear_fc1.weight_quantizer._amax                 its torch_dist keys, i global           an expert
    ...local_experts.{i}.linear_fc1.weight_quantizer._amax           Megatron SequentialMLP                  an expert
    ...experts.{i}.w1.weight_quantizer._amax                         lists of modules                        an expert
    ...gate_up_proj_weight_quantizers.{i}._amax                      transformers, fused experts             an expert
    ...linear_fc1.weight_quantizer._amax                             torch_dist with an expert axis          [E, ...]
    the same                                                         pull request 1671                       flat [E]
    the same, ...gate_up_proj_weight_quantizer._amax                 up to 0.46; gpt-oss, Llama 4            one for all
    ...linear_fc1._modelopt_per_expert_weight_quantizer_amax         pull request 1717                       [E, ...]

`_global_amax` stands beside `_amax` for static two-level formats. The shape of an entry does not tell its format (INT8
per channel and INT4 in blocks of 128 look alike where `in` is 128): that is the spec's.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fq_transforms.select import Group, Spec
from fq_transforms.state import State, check, flatten, group_state

__all__ = ["read", "write"]

_WEIGHT_AMAX = re.compile(
    r".*(?:weight_quantizers?(?:[._]\d+)?\._(?:global_)?amax|_modelopt_per_expert_weight_quantizer_(?:global_)?amax)"
)
_PULL_REQUEST_1717 = "_modelopt_per_expert_weight_quantizer_"
# Matrices that inference engines fuse, and that ModelOpt therefore gives one global amax.
_FUSED = (("w1", "w3"), ("gate_proj", "up_proj"))


def read(
    entries: Mapping[str, Tensor],
    spec: Spec,
    *,
    expert_offset: int = 0,
    experts: int | None = None,
    shared: Literal["refuse", "expand"] = "refuse",
    strict: bool = True,
) -> State:
    """The state in ModelOpt's entries: each expert's `_amax`, reshaped to [*format.amax_shape(out, in)], in fp32.

    Args:
        entries: Names to tensors, a model's `state_dict()` or a checkpoint's; those of inputs and weights are not read.
        spec: The local spec, whose names are the entries' but for the quantizer's part.
        expert_offset: This rank's first expert, where entries hold the experts of all ranks.
        experts: Number of experts of all ranks; those of the spec if None.
        shared: What to do with one value for all experts (ModelOpt up to 0.46): "refuse" it, or "expand" it.
        strict: False leaves alone the amax of weights that the spec has not.

    Returns:
        A new state on the device of the entries.

    Raises:
        KeyError: A group has no entry, or an expert none.
        ValueError: A group has entries of two kinds; an expert too many; a shape that is not the format's; one value
            for all experts, unless expanded; an amax that is NaN, infinite or negative; an entry of another weight.

    Source: ModelOpt 0.47 `TensorQuantizer`, its pull requests 1671 and 1717.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> from fq_transforms.select import select
        >>> params = {f"mlp.experts.linear_fc1.weight{i}": torch.ones(8, 4) for i in range(2)}
        >>> stored = {f"mlp.experts.linear_fc1.weight_quantizer.{i}._amax": torch.tensor(i + 1.0) for i in range(2)}
        >>> read(stored, select(params, {"*": FP8}))
        {'mlp.experts.linear_fc1.weight*': ExpertAmax(amax=tensor([1., 2.]))}
    """
    if shared not in ("refuse", "expand"):
        raise ValueError(f"shared: found {shared!r}, wanted 'refuse' or 'expand'")
    left = {name: value for name, value in entries.items() if _WEIGHT_AMAX.fullmatch(name)}
    state: State = {}
    for group in spec.groups:
        total = group.experts if experts is None or not _has_experts(group) else experts
        first = expert_offset if _has_experts(group) and total != group.experts else 0
        if not 0 <= first <= total - group.experts:
            raise ValueError(
                f"group {group.key!r}: found expert_offset {expert_offset} and experts {experts}, wanted room for the "
                f"{group.experts} experts of the spec"
            )
        leaves = [_leaf(left, group, field, first, total, shared) for field in group.leaf_shapes]
        state[group.key] = group_state(group.format, *leaves)
    if left and strict:
        raise ValueError(
            f"entries: found {len(left)} of weights that the spec has not, such as {sorted(left)[:3]}; select them, or "
            "pass strict=False"
        )
    check(state, spec)
    return state


def write(state: State, spec: Spec, *, layout: Literal["modules", "pr1717"] = "modules") -> dict[str, Tensor]:
    """A state under ModelOpt's names, in ModelOpt's shapes: `read(write(state, spec), spec)` is the state.

    Args:
        state: What is written; plain local tensors.
        spec: Its spec. Experts are numbered as in it.
        layout: "modules": one entry an expert, where ModelOpt 0.47 and its main branch keep it in such a model.
            "pr1717": one entry a group, [E, *format.amax_shape(out, in)], for Transformer Engine's names.

    Returns:
        Names to fp32 tensors. A model in bf16 rounds what it loads to bf16: keep its quantizers in fp32.

    Raises:
        KeyError: A group is missing.
        ValueError: The state does not fit the spec, or an amax is invalid; with "pr1717", a group that is not
            Transformer Engine's; with "modules", two matrices that ModelOpt gives one global amax have two.

    Source: as `read`.

    Example:
        >>> from fq_transforms.formats import INT8_PER_CHANNEL
        >>> from fq_transforms.select import select
        >>> from fq_transforms.calibrate import calibrate
        >>> params = {f"experts.{i}.w1.weight": torch.ones(8, 4) for i in range(2)}
        >>> spec = select(params, {"*": INT8_PER_CHANNEL})
        >>> {name: tuple(amax.shape) for name, amax in write(calibrate(params, spec=spec), spec).items()}
        {'experts.0.w1.weight_quantizer._amax': (8, 1), 'experts.1.w1.weight_quantizer._amax': (8, 1)}
    """
    if layout not in ("modules", "pr1717"):
        raise ValueError(f"layout: found {layout!r}, wanted 'modules' or 'pr1717'")
    check(state, spec)
    leaves = flatten(state)
    written: dict[str, Tensor] = {}
    for group in spec.groups:
        for field in group.leaf_shapes:
            leaf = leaves[f"{group.key}.{field}"]
            if layout == "pr1717":
                if not _is_transformer_engine(group):
                    raise ValueError(
                        f"group {group.key!r}: found {group.layout} weights, wanted Transformer Engine's "
                        "`weight0..N-1`, which pull request 1717 is for; layout='modules' writes any"
                    )
                written[f"{group.key.removesuffix('weight*')}{_PULL_REQUEST_1717}{field}"] = leaf.clone()
                continue
            _check_tied(group, leaves, field)
            for expert, value in enumerate(leaf):
                name = _own_name(group).format(i=expert)
                written[f"{name}._{field}"] = value.reshape(_modelopt_shape(group, field)).clone()
    return written


def _leaf(left: dict[str, Tensor], group: Group, field: str, first: int, total: int, shared: str) -> Tensor:
    """One leaf [E, ...], whose entries are taken out of `left`."""
    shape = group.leaf_shapes[field]
    found: dict[str, dict[int, str]] = {}
    for pattern in _patterns(group, field):
        regex = re.compile(re.escape(pattern).replace(re.escape("{i}"), r"(?P<i>\d+)"))
        names = {int(m.groupdict().get("i") or 0): m.string for m in map(regex.fullmatch, left) if m}
        if names:
            found[pattern] = names
    if len(found) != 1:
        error = KeyError if not found else ValueError
        raise error(
            f"group {group.key!r}: found {sorted(found) or 'no entry'} for its {field}, wanted one kind of "
            f"{_patterns(group, field)}"
        )
    ((pattern, names),) = found.items()
    values = {number: left.pop(name).detach() for number, name in names.items()}
    if "{i}" in pattern:
        return _from_list(group, names, values, shape, first, total)
    return _from_one(group, names[0], values[0], shape, first, total, shared)


def _from_list(
    group: Group, names: Mapping[int, str], values: Mapping[int, Tensor], shape: tuple[int, ...], first: int, total: int
) -> Tensor:
    """An entry an expert: all ranks' experts, or this rank's, numbered from 0 or as all are."""
    numbers, here = sorted(values), range(first, first + group.experts)
    if numbers == list(range(total)):
        numbers = list(here)
    elif numbers not in (list(here), list(range(group.experts))):
        missing, unknown = set(here) - set(numbers), set(numbers) - set(range(total))
        raise (ValueError if unknown else KeyError)(
            f"group {group.key!r}: found {len(numbers)} experts such as {names[numbers[0]]!r}, wanted the "
            f"{group.experts} of this rank or all {total}; missing {sorted(missing)[:4]}, unknown {sorted(unknown)[:4]}"
        )
    for number in numbers:
        if values[number].numel() != prod(shape[1:]):
            raise ValueError(
                f"entry {names[number]!r}: found shape {tuple(values[number].shape)}, wanted the {prod(shape[1:])} "
                f"numbers of {shape[1:]}, an expert's amax in {group.format.name}"
            )
    return torch.stack([values[number].float().reshape(shape[1:]) for number in numbers])


def _from_one(
    group: Group, name: str, value: Tensor, shape: tuple[int, ...], first: int, total: int, shared: str
) -> Tensor:
    """One entry a group: with an expert axis, or one value for all experts. Its length tells."""
    each = prod(shape[1:])
    if total > 1 and value.numel() == each:
        if shared == "refuse":
            raise ValueError(
                f"entry {name!r}: found one amax {tuple(value.shape)} for all of {total} experts, wanted one an "
                "expert; calibrate anew, or pass shared='expand' to give each expert the same"
            )
        return value.float().reshape(1, *shape[1:]).repeat(group.experts, *[1] * (len(shape) - 1))
    if value.numel() != total * each or (value.dim() > 0 and total > 1 and value.shape[0] != total):
        raise ValueError(
            f"entry {name!r}: found shape {tuple(value.shape)}, wanted {(total, *shape[1:])}, the amax of {total} "
            f"experts in {group.format.name}; slice a layer's part out first, and pass experts= for those of all ranks"
        )
    return value.float().reshape(total, *shape[1:])[first : first + group.experts].clone()


def _has_experts(group: Group) -> bool:
    """False for a dense weight."""
    return group.stacked or group.names != (group.key,)


def _is_transformer_engine(group: Group) -> bool:
    return group.key.endswith("weight*") and not group.stacked


def _own_name(group: Group) -> str:
    """The quantizer of expert {i} where ModelOpt keeps it in a model of this layout."""
    if group.stacked:
        return f"{group.key}_weight_quantizers.{{i}}"
    if _is_transformer_engine(group):
        return f"{group.key.removesuffix('*')}_quantizer.{{i}}"
    return f"{group.key}_quantizer".replace("*", "{i}")


def _patterns(group: Group, field: str) -> list[str]:
    """Names under which a group's leaf may be stored; {i} is an expert's number."""
    quantizers = [_own_name(group)]
    if group.stacked:
        quantizers += [f"{group.key}_weight_quantizer"]
    elif _is_transformer_engine(group):
        module = group.key.removesuffix("weight*")
        quantizers += [f"{module}weight_quantizer_{{i}}", f"{module}weight_quantizer"]
        quantizers += [_under_experts(module) + "weight_quantizer"] if ".experts." in f".{module}" else []
    elif "local_experts.*." in group.key:
        quantizers += [f"{group.key}_quantizer".replace("local_experts.*.", part) for part in ("{i}.", "")]
    names = [f"{quantizer}._{field}" for quantizer in quantizers]
    if _is_transformer_engine(group):
        names += [f"{group.key.removesuffix('weight*')}{_PULL_REQUEST_1717}{field}"]
    return names


def _under_experts(module: str) -> str:
    """`mlp.experts.linear_fc1.` with an expert's number behind `experts`."""
    start = f".{module}".rindex(".experts.") + len("experts.")
    return f"{module[:start]}{{i}}.{module[start:]}"


def _modelopt_shape(group: Group, field: str) -> tuple[int, ...]:
    """Shape of one expert's `_amax` or `_global_amax` in ModelOpt 0.47."""
    shape = group.leaf_shapes[field][1:]
    if not shape or group.format.block == (1, None):
        return shape
    if group.format.has_blocks_along_in:
        return (prod(shape), 1)
    return (shape[0], 1, shape[1], 1)


def _check_tied(group: Group, leaves: Mapping[str, Tensor], field: str) -> None:
    for one, other in _FUSED if field == "global_amax" else ():
        key = re.sub(rf"\.{one}\.", f".{other}.", group.key)
        partner = leaves.get(f"{key}.{field}")
        if key != group.key and partner is not None and not torch.equal(leaves[f"{group.key}.{field}"], partner):
            raise ValueError(
                f"state {group.key!r} and {key!r}: found different global_amax, wanted the same, since ModelOpt "
                "keeps one for both; take their maximum"
            )
