"""The state under ModelOpt's names: plain dicts of names to tensors, read and written. Weight quantizers only.

    state = modelopt.read(model.state_dict(), fq)                               # or the tensors of a file
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))       # strict: an unknown name raises

`read` finds each group under whichever of ModelOpt's names its entries have, of any version and layout; `write` writes
those of ModelOpt 0.47's own modules. The table of names and shapes: docs/checkpoints.

NOTE dtypes: `write` gives fp32, but ModelOpt's quantizers keep the dtype of the model, so `load_state_dict` of a bf16
model silently rounds to bf16. Only its NVFP4_STATIC quantizers keep fp32.
NOTE a model that was converted and never calibrated has no `_amax`: `load_state_dict(strict=False)` drops them all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fq_transforms.checkpoint.modelopt_names import (
    FUSED,
    PER_EXPERT,
    Form,
    Index,
    fits,
    fits_rows,
    forms_of,
    index_of,
    is_grouped,
    native_shape,
    quantizer_name,
)
from fq_transforms.checks import check_state
from fq_transforms.dtensor import is_sharded
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import State, flatten
from fq_transforms.transform import Transform

__all__ = ["read", "write"]

_IN_SEQUENCE = "two quantizers in sequence, as W4A8 has, are not read"


class _Slice(NamedTuple):
    """Which of all experts are this rank's: `size` of `whole`, from `first` on."""

    first: int
    size: int
    whole: int


def read(
    entries: Mapping[str, Tensor],
    fq: Transform,
    *,
    expert_offset: int = 0,
    experts: int | None = None,
    shared: Literal["refuse", "expand"] = "refuse",
    strict: bool = True,
) -> State:
    """The state whose amax lie in `entries` under ModelOpt's names, the experts in order: new fp32 tensors.

    Args:
        entries: A model's `state_dict()`, or the tensors of a file; all but amax of weight quantizers is left alone.
        fq: Of this rank's weights.
        expert_offset: The number of this rank's first expert among all.
        experts: The number of all experts, None if this rank has them all; entries may be of all or of this rank's.
        shared: Where one amax stands for all experts: "refuse", as it is coarser than what `calibrate` gives, or
            "expand" it to each. ModelOpt has such up to 0.46 for grouped linears, in 0.47 for gpt-oss and Llama 4.
        strict: False leaves alone the amax of weights that are not in the spec.

    Raises:
        KeyError: A group has no entry, or experts are missing.
        ValueError: A shape is not the format's; an amax is invalid or shared; a group is found under two names, with an
            axis of layers, or two quantizers in sequence; an expert, global amax or quantized weight is unexpected.

    Source: ModelOpt 0.47, `plugins.transformer_engine`, `.megatron`, `.huggingface`; pull requests 1550, 1671, 1717.

    Example:
        >>> import fq_transforms as fqt
        >>> fq = fqt.transform(fqt.select({"fc1.weight0": torch.ones(8, 4)}, {"*": fqt.FP8}))
        >>> read({"fc1.weight_quantizer.0._amax": torch.tensor(3.0)}, fq)
        {'fc1.weight*': {'amax': tensor([3.])}}
    """
    spec = fq.spec
    refuse_inputs(spec, "checkpoint.modelopt")
    _check_choice("shared", shared, ("refuse", "expand"))
    index = index_of(entries)
    read_keys: set[str] = set()
    state: State = {}
    for group in spec.groups:
        forms = forms_of(group.key, stacked=group.stacked)
        part = _part_of(group, expert_offset, experts)
        unread = [form for form in forms if form.stem in index["global_amax"]]
        if unread and not group.format.has_global_amax:
            key = next(iter(index["global_amax"][unread[0].stem].values()))
            raise ValueError(
                f"entry {key!r}: found a global amax, wanted none for {group.format.name} in group {group.key!r}; "
                "select the static two-level format that it was made in"
            )
        state[group.key] = {
            name: _read_leaf(entries, index, group, name, forms, part, shared) for name in group.leaf_shapes
        }
        read_keys |= {key for stems in index.values() for form in forms for key in stems.get(form.stem, {}).values()}
    left = {key for stems in index.values() for keys in stems.values() for key in keys.values()} - read_keys
    if left and strict:
        raise ValueError(
            f"entries: found {len(left)} of weights that are not in the spec, such as {sorted(left)[:3]}; select them, "
            "or pass strict=False"
        )
    return state


def write(
    fq: Transform,
    state: State,
    *,
    layout: Literal["modules", "grouped"] = "modules",
    untied: Literal["refuse", "maximum"] = "refuse",
) -> dict[str, Tensor]:
    """The state as entries of a state dict, for ModelOpt to load: `read(write(fq, state), fq)` is the state.

    Args:
        fq: Of the same weights; the names in its spec are those of the model's parameters.
        state: From `calibrate`, or loaded; plain tensors.
        layout: "modules": the names of ModelOpt 0.47's own quantizers. "grouped": one tensor [E, ...] per group, of all
            experts, for Transformer Engine's grouped linears, as in ModelOpt's pull request 1717.
        untied: Where ModelOpt keeps one number and the state has different ones: "refuse", since ModelOpt would keep
            the last that it loads, or write the "maximum". Which numbers: docs/checkpoints.

    Returns:
        Names to new fp32 tensors, each with memory of its own, in ModelOpt's own shapes. MX formats give none.

    Raises:
        KeyError: A group is missing.
        ValueError: The state does not fit the spec; an amax is invalid; a leaf is a DTensor; numbers that ModelOpt
            keeps once differ; ModelOpt or the layout has no place for a group.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"experts.0.w1.weight": torch.ones(8, 4)}
        >>> write((fq := fqt.transform(fqt.select(params, {"*": fqt.INT8}))), fq.calibrate(params))
        {'experts.0.w1.weight_quantizer._amax': tensor(1.)}
    """
    spec = fq.spec
    _check_choice("layout", layout, ("modules", "grouped"))
    _check_choice("untied", untied, ("refuse", "maximum"))
    leaves = flatten(state)
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(f"state {name!r}: found a DTensor, wanted a plain tensor; take its full_tensor()")
    refuse_inputs(spec, "checkpoint.modelopt")
    check_state(state, spec)
    leaves |= _tied(leaves, spec, untied)

    entries: dict[str, Tensor] = {}
    for group in spec.groups:
        for field in group.leaf_shapes:
            leaf = leaves[f"{group.key}.{field}"].detach()
            if layout == "grouped" and not _is_dense(group):
                if not is_grouped(group.key):
                    raise ValueError(
                        f"group {group.key!r}: found {group.layout} weights, wanted those of Transformer Engine's "
                        "grouped linears, weight0, weight1, ..., in layout 'grouped'; write 'modules'"
                    )
                name = f"{group.key.removesuffix('weight*')}{PER_EXPERT}_{field}"
                entries[name] = leaf.reshape(-1, *native_shape(group, field)).clone()
            elif group.stacked and group.transposed:
                name = f"{quantizer_name(group.key)}._{field}"
                entries[name] = _of_one_quantizer(group, field, leaf, untied)
            else:
                for stem, amax in zip(_module_stems(group), leaf, strict=True):
                    # safetensors refuses tensors that share memory.
                    entries[f"{stem}._{field}"] = amax.reshape(native_shape(group, field)).clone()
    return entries


def _part_of(group: Group, first: int, experts: int | None) -> _Slice:
    if _is_dense(group):
        return _Slice(0, 1, 1)
    whole = group.experts if experts is None else experts
    if not 0 <= first <= whole - group.experts:
        raise ValueError(
            f"group {group.key!r}: found expert_offset {first} and experts {whole}, wanted room for the "
            f"{group.experts} experts of the spec"
        )
    return _Slice(first, group.experts, whole)


def _read_leaf(
    entries: Mapping[str, Tensor],
    index: Index,
    group: Group,
    field: str,
    forms: Sequence[Form],
    part: _Slice,
    shared: str,
) -> Tensor:
    stems = index[field]
    found = [form for form in forms if form.stem in stems]
    if not found:
        raise _missing(index, group, field, forms)
    if len(found) > 1:
        raise ValueError(
            f"group {group.key!r}: found its {field} under {len(found)} names, {_names(found, field)}, wanted one"
        )
    (form,) = found
    if "*" in form.stem:
        keys = _keys_of(stems[form.stem], form, group, part)
        leaf = _stacked([_tensor(entries, key) for key in keys], keys, group, field)
    else:
        keys = [stems[form.stem][0]] * part.size
        leaf = _rows(_tensor(entries, keys[0]), keys[0], group, field, part, shared)
    # A clone: rows of an entry, or one that is expanded, are views of it.
    leaf = leaf.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    valid = (leaf >= 0) & (leaf < torch.inf)
    if not bool(valid.all()):
        expert, *at = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f"entry {keys[expert]!r}: found {leaf[(expert, *at)].item()} for {group.expert_name(expert)!r}"
            f"{f' at {tuple(at)}' if at else ''}, wanted a finite amax >= 0"
        )
    return leaf


def _keys_of(keys: Mapping[int, str], form: Form, group: Group, part: _Slice) -> list[str]:
    """The keys of this rank's experts, whether `keys` are all experts' or this rank's only."""
    found, whole = set(keys), set(range(part.whole))
    mine = range(part.first, part.first + part.size)
    if found in (whole, set(mine)):
        return [keys[expert] for expert in mine]
    if form.is_local and found == set(range(part.size)):
        return [keys[expert] for expert in range(part.size)]
    missing, unknown = sorted(whole - found), sorted(found - whole)
    advice = ""
    if unknown and not missing:
        advice = "; if the spec is of one rank, pass expert_offset= and experts="
    elif form.stem.endswith("weight_quantizer.*") and found == {0, 1}:
        advice = f"; {_IN_SEQUENCE}"
    raise (ValueError if unknown else KeyError)(
        f"group {group.key!r}: found {len(found)} experts, such as {keys[min(found)]!r}, wanted {part.whole}, from 0 on"
        f"; missing {missing[:4]}, unknown {unknown[:4]}{advice}"
    )


def _stacked(amaxes: Sequence[Tensor], keys: Sequence[str], group: Group, field: str) -> Tensor:
    """One amax per expert, as rows."""
    one = group.leaf_shapes[field][1:]
    for key, amax in zip(keys, amaxes, strict=True):
        if not fits(amax.shape, one):
            may_be_two = is_grouped(group.key) and len(amaxes) == 2 and amaxes[0].shape != amaxes[1].shape
            raise ValueError(
                f"entry {key!r}: found shape {tuple(amax.shape)}, wanted {native_shape(group, field)}, the {field} of "
                f"one expert in {group.format.name}, group {group.key!r}" + (f"; {_IN_SEQUENCE}" if may_be_two else "")
            )
    return torch.stack([amax.to(amaxes[0].device, torch.float32).reshape(one) for amax in amaxes])


def _rows(amax: Tensor, key: str, group: Group, field: str, part: _Slice, shared: str) -> Tensor:
    """This rank's rows of a tensor that holds all experts, or this rank's, or one amax for all."""
    one, native = group.leaf_shapes[field][1:], native_shape(group, field)
    if fits_rows(amax.shape, part.whole, one):
        return amax.reshape(part.whole, *one)[part.first : part.first + part.size]
    if fits(amax.shape, one):
        if shared == "refuse":
            raise ValueError(
                f"entry {key!r}: found one {field}, shape {tuple(amax.shape)}, for the {part.whole} experts of group "
                f"{group.key!r}, wanted one per expert; pass shared='expand' to give it to each"
            )
        return amax.reshape(1, *one).expand(part.size, *one)
    if fits_rows(amax.shape, part.size, one):
        return amax.reshape(part.size, *one)
    shapes = [native] if _is_dense(group) else [(n, *native) for n in dict.fromkeys((part.whole, part.size))]
    raise ValueError(
        f"entry {key!r}: found shape {tuple(amax.shape)}, wanted {' or '.join(map(str, shapes))}, the {field} of "
        f"{group.format.name} in group {group.key!r}; slice a layer's part out first, and pass experts= for those of "
        "all ranks"
    )


def _tensor(entries: Mapping[str, Tensor], key: str) -> Tensor:
    found: Any = entries[key]
    if not isinstance(found, Tensor) or found.is_meta or is_sharded(found):
        what = "a meta tensor" if isinstance(found, Tensor) and found.is_meta else type(found).__name__
        raise ValueError(f"entry {key!r}: found {what}, wanted a plain tensor with values")
    if found.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"entry {key!r}: found {found.dtype}, wanted an amax in float32, bfloat16 or float16")
    return found.detach()


def _missing(index: Index, group: Group, field: str, forms: Sequence[Form]) -> Exception:
    """What to raise where a group has no entry of a field."""
    stems = index[field]
    for form in forms:
        if f"{form.stem}.0" in stems:
            key = next(iter(stems[f"{form.stem}.0"].values()))
            return ValueError(
                f"entry {key!r}: wanted one quantizer for a weight of group {group.key!r}; {_IN_SEQUENCE}"
            )
        without_layer = re.sub(r"(?<=\.)\d+\.", "", form.stem, count=1)
        if without_layer != form.stem and without_layer in stems:
            key = next(iter(stems[without_layer].values()))
            return ValueError(
                f"entry {key!r}: found an axis of layers, wanted the {field} of one layer; take the layer of group "
                f"{group.key!r} from it and name it {_names([form], field)[0]!r}"
            )
    keys = sorted({key for found in stems.values() for key in found.values()})
    return KeyError(
        f"group {group.key!r}: found no entry for its {field}, among {len(keys)} of weights such as {keys[:2]}, wanted "
        f"one kind of {_names(forms, field)}"
    )


def _names(forms: Sequence[Form], field: str) -> list[str]:
    """The forms as keys, `{i}` for an expert's number."""
    return [form.stem.replace("*", "{i}") + ("_" if form.stem.endswith(PER_EXPERT) else "._") + field for form in forms]


def _module_stems(group: Group) -> list[str]:
    """The quantizers of ModelOpt 0.47's own modules, in the order of the experts."""
    if group.stacked:
        return [f"{group.key}_weight_quantizers.{expert}" for expert in range(group.experts)]
    if is_grouped(group.key):
        return [f"{group.key.removesuffix('*')}_quantizer.{expert}" for expert in range(group.experts)]
    return [quantizer_name(name) for name in group.names]


def _of_one_quantizer(group: Group, field: str, leaf: Tensor, untied: str) -> Tensor:
    """What ModelOpt's one quantizer of a transposed stacked parameter holds for all experts."""
    if leaf.dim() == 1:
        return _one_number(leaf, [group.expert_name(e) for e in range(group.experts)], group.key, field, untied)
    if group.format.block[1] is None:
        raise ValueError(
            f"group {group.key!r}: found {group.format.name} for {group.layout} weights, wanted a format by tensor or "
            "block; ModelOpt has one quantizer for all their experts, and what it calls channels are the experts"
        )
    shape = (-1, 1) if group.format.has_blocks_along_in else (group.experts, *leaf.unsqueeze(2).unsqueeze(-1).shape[1:])
    return leaf.reshape(shape if leaf.numel() > 1 else ()).clone()


def _tied(leaves: Mapping[str, Tensor], spec: Spec, untied: str) -> dict[str, Tensor]:
    """By leaf, the global amax of weights for which ModelOpt keeps one."""
    fused: dict[tuple[str, int], list[Group]] = {}
    for group in spec.groups:
        module, dot, role = group.key.removesuffix(".weight").rpartition(".")
        family = next((n for n, roles in enumerate(FUSED) if role in roles), None)
        if family is not None and group.format.has_global_amax and not group.stacked:
            fused.setdefault((module + dot, family), []).append(group)
    tied: dict[str, Tensor] = {}
    for groups in fused.values():
        what = " and ".join(group.key for group in groups)
        amaxes = torch.stack([leaves[f"{group.key}.global_amax"] for group in groups], dim=1)
        numbers = [
            _one_number(amax, [group.expert_name(expert) for group in groups], what, "global_amax", untied)
            for expert, amax in enumerate(amaxes)
        ]
        tied |= {f"{group.key}.global_amax": torch.stack(numbers) for group in groups}
    return tied


def _one_number(values: Tensor, names: Sequence[str], what: str, field: str, untied: str) -> Tensor:
    """The number that all `values` are, or by choice their maximum."""
    low, high = int(values.argmin()), int(values.argmax())
    if untied == "refuse" and values[low] != values[high]:
        raise ValueError(
            f"state of {what}, {field}: found {values[low].item()} for {names[low]!r} and {values[high].item()} for "
            f"{names[high]!r}, wanted one number, as ModelOpt keeps; tie them, or pass untied='maximum'"
        )
    return values.max().clone()


def _is_dense(group: Group) -> bool:
    return group.names == (group.key,) and not group.stacked


def _check_choice(option: str, found: str, choices: Sequence[str]) -> None:
    if found not in choices:
        raise ValueError(f"{option}: found {found!r}, wanted {' or '.join(map(repr, choices))}")
