"""Names and rules to a static `Spec`: rules choose a parameter's formats, and its name says whose expert it is."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

from fq_transforms.checks import check_dtype
from fq_transforms.formats import Format
from fq_transforms.rules import Rule, Rules, as_rules
from fq_transforms.spec import Group, Inputs, Skipped, Spec, group_key, ranges

__all__ = ["select"]

_STACKED_EXPERTS = (r"(?:.*\.)?(?:local_)?experts\..+",)
_BIAS = re.compile(r"(?:^|[._])bias\d*$")
_NO_RULE = Rule("", required=False)


def select(
    params: Mapping[str, Tensor],
    rules: Rules,
    *,
    experts: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
) -> Spec:
    r"""Which parameters are quantized, and how: the last rule whose glob matches a name decides its weights and inputs.

    Only matrices (2-D) and stacked experts (3-D) can be quantized; biases and vectors never are. Values are not read,
    so meta tensors will do. A DTensor counts by its global shape: every rank and every mesh has the same spec.

    Args:
        params: `dict(model.named_parameters())`, names to tensors.
        rules: Globs to formats of weights; or a list of `Rule`s, of weights and inputs; or a preset, which is one.
        experts: Regular expressions (full match) for names that are not found by themselves. With a named group
            `(?P<expert>\d+)`, a list of experts; without, a stacked 3-D parameter.
        transposed: Globs of parameters whose matrices are stored [in, out]. Found by itself where the shapes of
            `gate_up_proj` and `down_proj` tell (gpt-oss, Llama 4); else [out, in] is taken.

    Raises:
        ValueError: A rule or a glob matches nothing, or nothing is selected; a group lacks an expert, or its experts
            differ in shape, dtype or rule; a 3-D parameter is not known to be experts; `in` is not a multiple of the
            block; a dtype is not bf16, fp16 or fp32; a weight is empty.

    Example:
        >>> import torch
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> params = {"mlp.experts.down_proj": torch.empty(4, 64, 32), "attn.q.weight": torch.empty(64, 64)}
        >>> spec = select(params, [Rule("*", FP8), Rule("*.experts.*", NVFP4, inputs=FP8)])
        >>> [(group.key, group.format.name) for group in spec.all_groups]
        [('mlp.experts.down_proj', 'NVFP4'), ('attn.q.weight', 'FP8'), ('mlp.experts.down_proj.input', 'FP8')]
    """
    rules = as_rules(rules)
    patterns = (experts,) if isinstance(experts, str) else tuple(experts)
    transposed = (transposed,) if isinstance(transposed, str) else tuple(transposed)
    _check_patterns(params, rules, patterns, transposed)

    members: dict[str, list[tuple[int, str, Rule]]] = {}
    skipped: list[Skipped] = []
    for name, param in params.items():
        why = _not_a_weight(name, param)
        if not why:
            rule = next((r for r in reversed(rules) if fnmatchcase(name, r.pattern)), _NO_RULE)
            key, expert = group_key(name, patterns)
            members.setdefault(key, []).append((expert, name, rule))
            why = _why_left(rule)
        if why:
            skipped.append(Skipped(name, tuple(param.shape), why))

    of_weights = {key: found for key, found in members.items() if any(rule.weights for _, _, rule in found)}
    of_inputs = {key: found for key, found in members.items() if any(rule.inputs for _, _, rule in found)}
    groups = [_group(key, sorted(found), "weights", params, patterns, transposed) for key, found in of_weights.items()]
    inputs = [
        _inputs(_group(key, sorted(found), "inputs", params, patterns, transposed), found, params)
        for key, found in of_inputs.items()
    ]
    if not groups and not inputs:
        raise ValueError(
            f"the rules select no weight among {len(params)} parameters; patterns: {[r.pattern for r in rules]}"
        )
    return Spec(tuple(groups), tuple(skipped), tuple(inputs), rules)


def _why_left(rule: Rule) -> str:
    """Why the weights are not quantized, or ''."""
    if rule.weights:
        return ""
    if rule.inputs:
        return f"inputs only by {rule.pattern}"
    return "no rule" if rule is _NO_RULE else f"excluded by {rule.pattern}"


def _inputs(group: Group, found: Sequence[tuple[int, str, Rule]], params: Mapping[str, Tensor]) -> Inputs:
    """What the weights of a group are multiplied with."""
    key = f"{group.key}.input"
    if key in params:
        raise ValueError(f"inputs of {group.key!r}: found a parameter {key!r}, which is their own name")
    flags = {rule.per_expert_inputs for _, _, rule in found}
    if len(flags) > 1:
        shown = ", ".join(f"{name!r}: {rule.per_expert_inputs}" for _, name, rule in sorted(found)[:8])
        raise ValueError(
            f"group {group.key!r}: its experts get different per_expert_inputs ({shown}); let the rules treat them "
            "alike"
        )
    shapes = (group.shape, group.stacked, group.transposed)
    return Inputs(key, group.names, group.format, group.experts, *shapes, per_expert=flags.pop())


def _check_patterns(
    params: Mapping[str, Tensor], rules: Sequence[Rule], experts: Sequence[str], transposed: Sequence[str]
) -> None:
    weights = [name for name, param in params.items() if not _not_a_weight(name, param)]
    for rule in rules:
        if rule.required and not any(fnmatchcase(name, rule.pattern) for name in weights):
            others = [name for name in params if fnmatchcase(name, rule.pattern)]
            found = f"only {others[0]!r}, which is no weight" if others else "none"
            raise ValueError(
                f"rule {rule.pattern!r} matches no weight: found {found}, among {len(weights)} weights such as "
                f"{weights[:3]}; correct the pattern or remove the rule"
            )
    for regex in experts:
        try:
            matches = [match for name in weights if (match := re.fullmatch(regex, name))]
        except re.error as error:
            raise ValueError(f"experts={regex!r} is not a regular expression: {error}") from error
        if not matches:
            raise ValueError(f"experts={regex!r} matches no weight, among {len(weights)} such as {weights[:3]}")
        for match in matches:
            number = match.groupdict().get("expert", "0")
            if not (number and number.isdecimal()):
                raise ValueError(
                    f"experts={regex!r}: found the expert {number!r} in {match.string!r}, wanted a number; "
                    r"let the group `expert` match \d+"
                )
    for glob in transposed:
        if not any(fnmatchcase(name, glob) for name in weights):
            raise ValueError(f"transposed={glob!r} matches no weight, among {len(weights)} such as {weights[:3]}")


def _not_a_weight(name: str, param: Tensor) -> str:
    """Why a parameter can never be quantized, or ''."""
    if _BIAS.search(name):
        return "bias"
    return "" if param.dim() in (2, 3) else f"{param.dim()}-D"


def _group(
    key: str,
    found: Sequence[tuple[int, str, Rule]],
    role: Literal["weights", "inputs"],
    params: Mapping[str, Tensor],
    patterns: Sequence[str],
    transposed: Sequence[str],
) -> Group:
    numbers, names = [number for number, _, _ in found], tuple(name for _, name, _ in found)
    wanted = range(numbers[-1] + 1)
    if numbers != list(wanted):
        missing, twice = set(wanted) - set(numbers), {n for n in numbers if numbers.count(n) > 1}
        what = f"{ranges(missing)} missing" if missing else f"{ranges(twice)} twice"
        raise ValueError(
            f"group {key!r}: found experts {ranges(set(numbers))}, wanted {ranges(wanted)}, each once: {what}"
        )
    chosen: list[Format | None] = [getattr(rule, role) for _, _, rule in found]
    if len(set(chosen)) > 1:
        shown = ", ".join(f"{n!r}: {c.name if c else None}" for n, c in zip(names[:8], chosen[:8], strict=True))
        raise ValueError(
            f"group {key!r}: its experts get different formats of {role} ({shown}); let the rules treat them alike"
        )
    format = chosen[0]
    assert format is not None
    first = params[names[0]]
    for name in names:
        check_dtype(name, params[name])
        if params[name].shape != first.shape or params[name].dtype != first.dtype:
            raise ValueError(
                f"group {key!r}: {name!r} is {tuple(params[name].shape)} {params[name].dtype}, but {names[0]!r} is "
                f"{tuple(first.shape)} {first.dtype}; the experts of a group are of one shape and dtype"
            )
        if params[name].numel() == 0:
            raise ValueError(f"parameter {name!r}: found the empty shape {tuple(first.shape)}, wanted a weight")
    stacked = first.dim() == 3
    if stacked and (key not in names or not any(re.fullmatch(p, key) for p in (*patterns, *_STACKED_EXPERTS))):
        raise ValueError(
            f"parameter {names[0]!r}: found the 3-D shape {tuple(first.shape)}, wanted a matrix or stacked experts; "
            "exclude it with a rule to None, or name it in experts="
        )
    matrix = first.shape[-2:]
    marked = [name for name in names if any(fnmatchcase(name, glob) for glob in transposed)]
    if marked and len(marked) < len(names):
        raise ValueError(
            f"group {key!r}: transposed= matches {len(marked)} of {len(names)} experts, such as {marked[0]!r}; "
            "let it match all"
        )
    is_transposed = bool(marked) or (stacked and _stored_transposed(key, params))
    shape = (matrix[1], matrix[0]) if is_transposed else (matrix[0], matrix[1])
    columns = format.block[1]
    if format.has_blocks_along_in and columns and shape[1] % columns:
        raise ValueError(
            f"parameter {names[0]!r}: found shape (out, in) = {shape}, wanted `in` to be a multiple of {columns}, the "
            f"block of {format.name}; choose another format or exclude it with a rule to None"
        )
    return Group(key, names, format, first.shape[0] if stacked else len(names), shape, stacked, is_transposed)


def _stored_transposed(key: str, params: Mapping[str, Tensor]) -> bool:
    """True if stacked gate_up_proj and down_proj fit together only as [E, in, out], gate_up twice as wide."""
    parent = key[: key.rfind(".") + 1]
    gate_up, down = params.get(f"{parent}gate_up_proj"), params.get(f"{parent}down_proj")
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return False
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])
