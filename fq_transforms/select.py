"""Names and patterns to a static `Spec`: rules choose a parameter's format, and its name says whose expert it is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

from torch import Tensor

from fq_transforms.checks import check_dtype
from fq_transforms.formats import Format
from fq_transforms.spec import Group, Inputs, Skipped, Spec, group_key, ranges

__all__ = ["Preset", "Rule", "select"]

_STACKED_EXPERTS = (r"(?:.*\.)?(?:local_)?experts\..+",)
_BIAS = re.compile(r"(?:^|[._])bias\d*$")


@dataclass(frozen=True)
class Rule:
    """Quantize what matches a glob pattern in a format, or exclude it (None).

    Attributes:
        pattern: Glob over the whole parameter name, case-sensitive; `*` crosses dots.
        format: What to quantize to; None excludes.
        required: False if the rule may match nothing, as a preset's exclusions may.

    Example:
        >>> Rule("*.experts.*", None).required
        True
    """

    pattern: str
    format: Format | None
    required: bool = True


class Preset(NamedTuple):
    """What a whole model is quantized to: `select(params, preset)`.

    Attributes:
        rules: For the weights.
        inputs: For what the weights are multiplied with; none if empty.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> Preset((Rule("*", FP8),)).inputs
        ()
    """

    rules: tuple[Rule, ...]
    inputs: tuple[Rule, ...] = ()


def select(
    params: Mapping[str, Tensor],
    rules: Mapping[str, Format | None] | Sequence[Rule] | Preset,
    *,
    inputs: Mapping[str, Format | None] | Sequence[Rule] | None = None,
    per_expert: str | Sequence[str] = (),
    experts: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
) -> Spec:
    r"""Which parameters are quantized and how: each takes the format of the last rule whose glob matches its name.

    Only matrices (2-D) and stacked experts (3-D) can be quantized; biases and vectors never are. Values are not read,
    so meta tensors will do. A DTensor counts by its global shape, so that every rank and every mesh has the same spec.

    Args:
        params: `dict(model.named_parameters())`, names to tensors.
        rules: Glob patterns to formats, later ones win, None excludes; or `Rule`s, such as a preset's; or a `Preset`,
            of weights and inputs.
        inputs: As `rules`, over the names of weights: those that are multiplied with quantized inputs, and the format
            of these; None takes the preset's, or none. By tensor (FP8, INT8), with an amax from calibration; by channel
            (FP8_PER_CHANNEL), with a scale a token; in dynamic blocks (NVFP4, with a calibrated global amax; MX).
        per_expert: Globs of weights whose inputs have an amax for each expert. Without, the experts of a group share
            one, as ModelOpt's do.
        experts: Regular expressions (full match) for names that are not found by themselves. With a named group
            `(?P<expert>\d+)`, a list of experts; without, a stacked 3-D parameter.
        transposed: Globs of parameters whose matrices are stored [in, out]. Found by itself where the shapes of
            `gate_up_proj` and `down_proj` tell (gpt-oss, Llama 4); else [out, in] is taken.

    Raises:
        ValueError: A rule or a glob matches nothing, or nothing is selected; the numbers of a group's experts are not
            0..N-1; its experts differ in shape, dtype or format; a 3-D parameter is not known to be experts; `in` is
            not a multiple of the block; a dtype is not bf16, fp16 or fp32; a weight is empty; a format of inputs has
            static scales along tokens or blocks.

    Example:
        >>> import torch
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> params = {"mlp.experts.down_proj": torch.empty(4, 64, 32), "attn.q.weight": torch.empty(64, 64)}
        >>> spec = select(params, {"*": FP8, "*.experts.*": NVFP4})
        >>> [(group.key, group.format.name, group.experts) for group in spec.groups]
        [('mlp.experts.down_proj', 'NVFP4', 4), ('attn.q.weight', 'FP8', 1)]
    """
    if isinstance(rules, Preset):
        rules, inputs = rules.rules, rules.inputs if inputs is None else inputs
    rules, input_rules = _rules(rules), _rules(inputs or ())
    patterns = (experts,) if isinstance(experts, str) else tuple(experts)
    per_expert = (per_expert,) if isinstance(per_expert, str) else tuple(per_expert)
    transposed = (transposed,) if isinstance(transposed, str) else tuple(transposed)
    _check_patterns(params, rules, patterns, transposed)
    _check_patterns(params, input_rules, (), ())

    members: dict[str, list[tuple[int, str, Format | None]]] = {}
    skipped: dict[str, Skipped] = {}
    for name, param in params.items():
        if why_never := _not_a_weight(name, param):
            skipped[name] = Skipped(name, tuple(param.shape), why_never)
            continue
        rule = next((r for r in reversed(rules) if fnmatchcase(name, r.pattern)), None)
        key, expert = group_key(name, patterns)
        members.setdefault(key, []).append((expert, name, rule.format if rule else None))
        if rule is None or rule.format is None:
            why = f"excluded by {rule.pattern}" if rule else "no rule"
            skipped[name] = Skipped(name, tuple(param.shape), why)

    groups = [
        _group(key, sorted(found), params, patterns, transposed)
        for key, found in members.items()
        if any(chosen is not None for _, _, chosen in found)
    ]
    found_inputs = _inputs(params, input_rules, patterns, transposed, per_expert)
    if not groups and not found_inputs:
        raise ValueError(
            f"the rules select no weight among {len(params)} parameters; patterns: {[r.pattern for r in rules]}"
        )
    return Spec(tuple(groups), tuple(skipped.values()), found_inputs)


def _rules(rules: Mapping[str, Format | None] | Sequence[Rule]) -> Sequence[Rule]:
    if isinstance(rules, Mapping):
        rules = [Rule(pattern, format) for pattern, format in rules.items()]
    for rule in rules:
        _check_rule(rule)
    return rules


def _inputs(
    params: Mapping[str, Tensor],
    rules: Sequence[Rule],
    patterns: Sequence[str],
    transposed: Sequence[str],
    per_expert: Sequence[str],
) -> tuple[Inputs, ...]:
    """Of each group of weights whose inputs a rule takes, those inputs."""
    members: dict[str, list[tuple[int, str, Format | None]]] = {}
    for name, param in params.items() if rules else ():
        if not _not_a_weight(name, param):
            rule = next((r for r in reversed(rules) if fnmatchcase(name, r.pattern)), None)
            key, expert = group_key(name, patterns)
            members.setdefault(key, []).append((expert, name, rule.format if rule else None))
    groups = [
        _group(key, sorted(found), params, patterns, transposed)
        for key, found in members.items()
        if any(chosen is not None for _, _, chosen in found)
    ]
    for glob in per_expert:
        if not any(fnmatchcase(name, glob) for group in groups for name in group.names):
            raise ValueError(
                f"per_expert={glob!r} matches no weight with inputs, among {len(groups)} groups such as "
                f"{[group.key for group in groups[:3]]}"
            )
    return tuple(_inputs_of(group, per_expert, params) for group in groups)


def _inputs_of(group: Group, per_expert: Sequence[str], params: Mapping[str, Tensor]) -> Inputs:
    format, key = group.format, f"{group.key}.input"
    if not (format.block in ((None, None), (1, None)) or format.dynamic):
        raise ValueError(
            f"inputs of {group.key!r}: found {format.name}, whose blocks {format.block} have static scales, wanted a "
            "format by tensor such as FP8, by channel for a scale a token, or of dynamic blocks such as NVFP4"
        )
    if key in params:
        raise ValueError(f"inputs of {group.key!r}: found a parameter {key!r}, which is their own name")
    marked = [name for name in group.names if any(fnmatchcase(name, glob) for glob in per_expert)]
    if marked and len(marked) < len(group.names):
        raise ValueError(
            f"group {group.key!r}: per_expert= matches {len(marked)} of {len(group.names)} experts, such as "
            f"{marked[0]!r}; let it match all"
        )
    shapes = (group.shape, group.stacked, group.transposed)
    return Inputs(key, group.names, format, group.experts, *shapes, per_expert=bool(marked))


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, Rule) or not (rule.format is None or isinstance(cast("Any", rule.format), Format)):
        raise ValueError(
            f"rules: found {rule!r}, wanted a mapping from patterns to formats such as fqt.NVFP4, or "
            "Rule(pattern, format)"
        )


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
    found: Sequence[tuple[int, str, Format | None]],
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
    formats = {chosen for _, _, chosen in found}
    if len(formats) > 1:
        shown = ", ".join(f"{name!r}: {chosen.name if chosen else None}" for _, name, chosen in found[:8])
        raise ValueError(f"group {key!r}: its experts get different formats ({shown}); let the rules treat them alike")
    (format,) = formats
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
