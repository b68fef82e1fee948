"""Rules say which parameters are quantized, and in which formats: what `select` takes, as Python, JSON or YAML.

    rules = {"*.experts.*": NVFP4, "*.0.*": None}                     # weights only; None leaves out
    rules = [Rule("*.experts.*", weights=NVFP4, inputs=FP8)]          # weights, and what they are multiplied with
    rules = [*presets.FP8_DEFAULT_CFG, Rule("*layers.0.*")]           # a preset, and an exception

    text = to_yaml(rules)                    - pattern: '*.experts.*'
    rules = from_yaml(text)                    weights: NVFP4
                                               inputs: FP8

The last rule that matches a name decides alone: its weights and its inputs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, TypeAlias, cast

from fq_transforms.formats import FORMATS, Format, check_layout, own_format
from fq_transforms.parse import check_name, check_text, nearest, parse_json, read_fields, shown, unique

__all__ = ["Rule", "Rules", "as_rules", "from_json", "from_yaml", "to_json", "to_yaml", "unwrapped"]

# What DDP, torch.compile, FSDP, activation checkpointing and PEFT put into the names of what they wrap.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer|to_wrap"
    r"|original_module|modules_to_save\.[^.]+)\."
)


@dataclass(frozen=True)
class Rule:
    """Formats of the weights that match a pattern, and of their inputs, whose amax a group shares by default.

    The last rule that matches a name decides both, so an exception repeats what it does not change. `Rule(pattern)`
    leaves out weights and inputs; `Rule(pattern, inputs=FP8)` quantizes the inputs only.

    Attributes:
        pattern: Glob over the whole parameter name, case-sensitive; `*` crosses dots. It may leave out what wrappers
            put into names: see `unwrapped`.
        weights: Format of the weights; None leaves them as they are.
        inputs: Format of the inputs; None leaves them as they are. Per tensor (FP8, INT8), with a calibrated amax; per
            channel (FP8_PER_CHANNEL), with one scale per token; in dynamic blocks (MX, or NVFP4 with a calibrated
            global amax).
        required: False if the rule may match nothing, as a preset's exclusions may.
        per_expert_inputs: True if the inputs of each expert have an amax of their own; `presets.per_expert_inputs` sets
            it for all of a preset. False: the experts of a group share one, the largest, as in ModelOpt's presets.

    Raises:
        ValueError: A field is of another type; inputs have static scales along blocks; `per_expert_inputs` without
            inputs.

    Example:
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> Rule("*.experts.*", NVFP4, FP8).inputs.name
        'FP8'
    """

    pattern: str
    weights: Format | None = None
    inputs: Format | None = None
    required: bool = field(default=True, kw_only=True)
    per_expert_inputs: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        what = f"rule {shown(self.pattern)}"
        if not isinstance(cast("Any", self.pattern), str):
            raise ValueError(
                f"{what}: found {type(self.pattern).__name__}, wanted a glob pattern such as '*.experts.*'"
            )
        check_name(self.pattern, "rule")
        for role in ("weights", "inputs"):
            found: Any = getattr(self, role)
            if not (found is None or isinstance(found, Format)):
                raise ValueError(f"{what}: found {role}={shown(found)}, wanted a Format such as fqt.NVFP4, or None")
        for flag in ("required", "per_expert_inputs"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{what}: found {flag}={shown(getattr(self, flag))}, wanted True or False")
        if self.inputs and not (self.inputs.block in ((None, None), (1, None)) or self.inputs.dynamic):
            raise ValueError(
                f"{what}: found inputs={self.inputs.name}, whose blocks {self.inputs.block} have static scales, wanted "
                "a format per tensor such as FP8, per channel (one scale per token), or of dynamic blocks such as NVFP4"
            )
        if self.per_expert_inputs and not self.inputs:
            raise ValueError(f"{what}: found per_expert_inputs=True without inputs, wanted inputs= a format beside it")

    def matches(self, name: str) -> bool:
        """True if the pattern is of this parameter, by its name or by the one that it has without wrappers."""
        return name_matches(name, self.pattern)

    def for_layout(self, layout: str) -> "Rule":
        """The same rule in a layout's own formats: see `formats.own_format`. Raises ValueError for no layout."""
        check_layout(layout)
        weights, inputs = (format and own_format(format, layout) for format in (self.weights, self.inputs))
        return replace(self, weights=weights, inputs=inputs)


# Characters of YAML, of which PyYAML reads 100,000 in a second, and entries of a mapping: a format has eight.
MOST_YAML, MOST_ENTRIES = 2**20, 100


def name_matches(name: str, glob: str) -> bool:
    """True if a glob is of a parameter, by its name or by the one that it has without wrappers."""
    plain = unwrapped(name)
    return fnmatchcase(name, glob) or (plain != name and fnmatchcase(plain, glob))


@lru_cache  # each name meets all the rules in turn
def unwrapped(name: str) -> str:
    """A parameter's name in the model itself, without what DDP, torch.compile, FSDP, checkpointing and PEFT put in.

    Example:
        >>> unwrapped("module._orig_mod.mtp.layers.0.mlp._orig_mod.up_proj.base_layer.weight")
        'mtp.layers.0.mlp.up_proj.weight'
    """
    return _WRAPPERS.sub("", name)


Rules: TypeAlias = Mapping[str, Format | None] | Sequence[Rule]


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Rules as a tuple: a mapping from patterns to formats is of weights only, required, in its order.

    Raises:
        ValueError: These are no rules.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> as_rules({"*": FP8, "*.0.*": None}) == (Rule("*", FP8), Rule("*.0.*"))
        True
    """
    if isinstance(rules, Mapping):
        return tuple(Rule(pattern, weights) for pattern, weights in rules.items())
    given: Any = rules
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes)  # a str is a sequence too
    if wrong := [rule for rule in given if not isinstance(rule, Rule)] if is_list else [given]:
        found = f"the format {wrong[0].name}" if isinstance(wrong[0], Format) else shown(wrong[0])
        raise ValueError(
            f"rules: found {found}, wanted a mapping from patterns to formats such as "
            "{'*.experts.*': fqt.NVFP4}, a list of fqt.Rule(pattern, weights, inputs), or a preset such as "
            f"fqt.presets.FP8_DEFAULT_CFG{_how_to_write(wrong[0])}"
        )
    return tuple(given)


def _how_to_write(wrong: Any) -> str:
    """What to write in place of what is no rules, for a message; "" where it is not known."""
    if isinstance(wrong, Rule):
        return "; put it into a list"
    if isinstance(wrong, Format):
        name = f"fqt.formats.{wrong.name}" if FORMATS.get(wrong.name) == wrong else "the format"
        return f"; to say which weights, write {{'*.experts.*': {name}}}, or {{'*': {name}}} for every matrix"
    if isinstance(wrong, str) and wrong in FORMATS:
        return f"; to say which weights, write {{'*.experts.*': fqt.formats.{wrong}}}"
    return f"; write fqt.presets.{wrong}" if isinstance(wrong, str) and wrong.endswith("_CFG") else ""


def to_json(rules: Rules) -> str:
    """Rules as JSON, one per line; a format by its name if it is one of `FORMATS`, else as its numbers.

    Example:
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> print(to_json([Rule("*.experts.*", NVFP4, FP8), Rule("*.0.*", required=False)]))
        [
          {"pattern": "*.experts.*", "weights": "NVFP4", "inputs": "FP8"},
          {"pattern": "*.0.*", "weights": null, "required": false}
        ]
    """
    lines = [json.dumps(rule_to_dict(rule)) for rule in as_rules(rules)]
    return "[\n  " + ",\n  ".join(lines) + "\n]"


def from_json(text: str) -> tuple[Rule, ...]:
    """The rules that `to_json` wrote, or that a person did: `weights` and what follows may be left out.

    Raises:
        ValueError: The text is no list of rules. The message names the rule and the key, and the nearest known name.

    Example:
        >>> rule, = from_json('[{"pattern": "*", "weights": "FP8"}]')
        >>> rule.weights.name, rule.inputs
        ('FP8', None)
    """
    try:
        return rules_from_list(parse_json(text))
    except ValueError as error:
        raise ValueError(f"not rules in JSON: {error}") from error


def to_yaml(rules: Rules) -> str:
    """Rules as YAML, the same lists and keys as in JSON. Raises ImportError without PyYAML.

    Example:
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> print(to_yaml([Rule("*.experts.*", NVFP4, FP8)]))
        - pattern: '*.experts.*'
          weights: NVFP4
          inputs: FP8
    """
    entries = [rule_to_dict(rule) for rule in as_rules(rules)]
    # Not allow_unicode: PyYAML 6.0 writes U+0085 as it is then, and reads it back as a space.
    return str(_yaml().safe_dump(entries, sort_keys=False)).rstrip("\n")


def from_yaml(text: str) -> tuple[Rule, ...]:
    """The rules in a YAML text, read by PyYAML's safe loader, which makes plain values only and runs nothing.

    Raises:
        ValueError: As `from_json`.
        ImportError: PyYAML is not installed.

    Example:
        >>> rule, = from_yaml("- {pattern: '*', weights: FP8}")
        >>> rule.weights.name
        'FP8'
    """
    yaml = _yaml()

    class Loader(yaml.SafeLoader):
        """The safe loader takes the last of equal keys; this one refuses them."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # Before the safe loader merges `<<` into the node, whose keys may come again.
            unique((key.value, value.value) for key, value in node.value)
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: Any) -> None:
            """Merges of merges have as many entries as a file likes: each can double them."""
            super().flatten_mapping(node)
            if len(node.value) > MOST_ENTRIES:
                raise ValueError(f"found {len(node.value)} entries in a mapping, wanted at most {MOST_ENTRIES}")

        def construct_scalar(self, node: Any) -> Any:
            """A number of many digits takes minutes to read."""
            return check_name(super().construct_scalar(node), "scalar")

    try:
        if len(check_text(text)) > MOST_YAML:
            raise ValueError(f"found {len(text)} characters, wanted at most {MOST_YAML}; JSON is read faster")
        return rules_from_list(yaml.load(text, Loader=Loader))
    except yaml.YAMLError as error:
        raise ValueError(f"not rules in YAML; is each pattern quoted, as '*.experts.*' is? {error}") from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # The safe loader lets errors of its conversions through, as of `!!bool x`, and fails on a list as a key.
        raise ValueError(f"not rules in YAML: {error or type(error).__name__}") from error


def rule_to_dict(rule: Rule, *, names: bool = True) -> dict[str, Any]:
    """A rule ready for JSON: `weights` always, the rest where it is no default. Without `names`, formats as numbers."""

    def written(format: Format) -> str | dict[str, Any]:
        if names and FORMATS.get(format.name) == format:
            return format.name
        return {**format.to_dict(), "block": list(format.block)}  # YAML's safe dumper knows no tuples

    data: dict[str, Any] = {"pattern": rule.pattern, "weights": written(rule.weights) if rule.weights else None}
    if rule.inputs:
        data["inputs"] = written(rule.inputs)
    if not rule.required:
        data["required"] = False
    if rule.per_expert_inputs:
        data["per_expert_inputs"] = True
    return data


def rules_from_list(data: Any) -> tuple[Rule, ...]:
    """Rules from what JSON or YAML holds. Raises ValueError that names the rule."""
    if not isinstance(data, list):
        raise ValueError(f"found {shown(data)}, wanted a list of rules such as {{'pattern': '*', 'weights': 'FP8'}}")
    return tuple(_rule_from_dict(number, entry) for number, entry in enumerate(data))


def _rule_from_dict(number: int, data: Any) -> Rule:
    what = f"rules[{number}]"
    if isinstance(data, dict) and isinstance(data.get("pattern"), str):
        what += f", pattern {shown(data['pattern'])}"
    flags = dict.fromkeys(("required", "per_expert_inputs"), "true or false")
    entry = read_fields(data, what, {"pattern": "text"}, {"weights": "a format", "inputs": "a format", **flags})
    for role in ("weights", "inputs"):
        found = entry.get(role)
        if isinstance(found, str):
            if found not in FORMATS:
                raise ValueError(
                    f"{what}: found {role}={shown(found)}, wanted a format's name such as "
                    f"{' or '.join(nearest(found, FORMATS, 2))}, or all of its numbers"
                )
            entry[role] = FORMATS[found]
        elif found is not None:
            try:
                entry[role] = Format.from_dict(found)
            except ValueError as error:
                raise ValueError(f"{what}: {role}: {error}") from error
    try:
        return Rule(**entry)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("rules in YAML need PyYAML: pip install pyyaml; JSON needs nothing") from error
    return yaml
