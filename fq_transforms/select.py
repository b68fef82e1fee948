"""Names and patterns to a static `Spec`: which parameters are quantized, grouped by expert, and in which format.

A group is one role in one layer. How its experts are found:

    ...linear_fc1.weight0 .. weightN-1            Transformer Engine GroupedLinear
    ...local_experts.{i}.linear_fc1.weight        Megatron SequentialMLP
    ...experts.{i}.w1.weight                      module lists (Mixtral, DeepSeek, Qwen checkpoints)
    ...experts.gate_up_proj  [E, out, in]         stacked experts (transformers 5); [E, in, out] in gpt-oss, Llama 4
    any other matrix                              dense: a group of one

The group key is the parameter's name with the expert number as `*`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from importlib import import_module
from math import prod
from typing import Any, NamedTuple, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.known import Known

__all__ = [
    "Group",
    "Inputs",
    "Preset",
    "Rule",
    "Skipped",
    "Spec",
    "is_mapped",
    "is_sharded",
    "refuse_inputs",
    "select",
    "weights_of",
]

functorch: Any = import_module("torch._C._functorch")  # what a wrapped tensor wraps has no public name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_EXPERT_LISTS = (r"(?:.*\.)?(?:local_)?experts\.(?P<expert>\d+)\..+", r"(?:.*\.)?weight(?P<expert>\d+)")
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


@dataclass(frozen=True)
class Group:
    """The weights of one role in one layer, one an expert.

    Attributes:
        key: The parameters' name with the expert number as `*`; for stacked and dense weights the name itself.
        names: Parameter names in the order of the experts; one name if stacked or dense.
        format: How each is quantized.
        experts: Number of experts E.
        shape: (out, in) of one expert.
        stacked: One parameter holds all experts along dimension 0.
        transposed: Matrices are stored [in, out].
        leaf_shapes: Shape of each leaf of the group's state, by field.
        number: 31 bits of the key, by which stochastic rounding tells groups apart.
    """

    key: str
    names: tuple[str, ...]
    format: Format
    experts: int
    shape: tuple[int, int]
    stacked: bool = False
    transposed: bool = False
    # Made once, as a field: each call of `fakequant` compares the state with it.
    leaf_shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    number: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.format.is_stateless:
            shapes["amax"] = (self.experts, *self.format.amax_shape(*self.shape))
        if self.format.has_global_amax:
            shapes["global_amax"] = (self.experts,)
        object.__setattr__(self, "leaf_shapes", shapes)
        object.__setattr__(self, "number", crc32(self.key.encode()) & 0x7FFFFFFF)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of each parameter in `names`, as stored."""
        matrix = self.shape[::-1] if self.transposed else self.shape
        return (self.experts, *matrix) if self.stacked else matrix

    @property
    def layout(self) -> str:
        """How the weights are stored, in words."""
        kind = "stacked" if self.stacked else "separate" if self.names != (self.key,) else "dense"
        return kind + ", transposed" * self.transposed

    def expert_name(self, expert: int) -> str:
        """What to call one expert's weight in a message."""
        return f"{self.names[0]}[{expert}]" if self.stacked else self.names[expert]


@dataclass(frozen=True)
class Inputs(Group):
    """What the weights of one role in one layer are multiplied with: tokens [tokens, in], and how they are quantized.

    The fields of `Group`, of these weights; `key` is theirs with `.input` behind it, `format` that of the inputs. A row
    of a matrix [tokens, in] is a token, so a format by channel has a scale a token, made when the model runs.

    Attributes:
        per_expert: Each expert has an amax of its own; else they share one, the largest.
    """

    per_expert: bool = False

    def __post_init__(self) -> None:
        # Where nothing is calibrated there is nothing to keep.
        shapes = {"amax": (self.experts if self.per_expert else 1,), "tokens": (self.experts,)}
        object.__setattr__(self, "leaf_shapes", shapes if self.is_calibrated else {})

    @property
    def is_calibrated(self) -> bool:
        """True if an amax is state: formats by tensor, and NVFP4's global amax."""
        return self.format.block == (None, None) or self.format.scale == "e4m3"

    @property
    def always_runs(self) -> bool:
        """False for experts that are modules of their own: where none of a rank's has a token, none runs."""
        return self.stacked or self.experts == 1

    @property
    def scope(self) -> str:
        """How many scales there are, in words."""
        if self.is_calibrated:
            return "an amax an expert" if self.per_expert else "one amax"
        return "a scale a token" if self.format.block == (1, None) else "a scale a block"


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not quantized, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


AnyGroup = TypeVar("AnyGroup", bound=Group)


@dataclass(frozen=True)
class Spec:
    """What is quantized, how, and what is not. Static: frozen, hashable, a table when printed, JSON when stored.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> params = {f"experts.{i}.w1.weight": torch.empty(8, 32) for i in range(4)} | {"norm.weight": torch.empty(32)}
        >>> spec = select(params, {"*.w1.*": NVFP4})
        >>> print(spec)
        quantized              format  experts  out x in  layout
        experts.*.w1.weight    NVFP4         4  8 x 32    separate
        not quantized          why              shape
        norm.weight            1-D              32
        1 group, 4 weights: 97.0 % of 1,056 parameters
        >>> Spec.from_json(spec.to_json()) == spec
        True
    """

    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...] = ()
    inputs: tuple[Inputs, ...] = ()

    @property
    def all_groups(self) -> tuple[Group, ...]:
        """Everything that a state has an entry for: weights, then inputs."""
        return (*self.groups, *self.inputs)

    def to_json(self) -> str:
        """The spec as one line of JSON, formats with all of their numbers."""
        data: dict[str, Any] = {
            "groups": [_group_to_dict(group) for group in self.groups],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }
        if self.inputs:
            data["inputs"] = [_group_to_dict(inputs) for inputs in self.inputs]
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> "Spec":
        """The spec that `to_json` wrote. Raises ValueError if the text is not one."""
        try:
            data = json.loads(text)
            groups = tuple(_group_from_json(Group, **group) for group in data["groups"])
            inputs = tuple(_group_from_json(Inputs, **group) for group in data.get("inputs", ()))
            skipped = tuple(Skipped(shape=tuple(s.pop("shape")), **s) for s in data["skipped"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a stored Spec: {error!r} in {text[:80]!r}") from error
        return Spec(groups, skipped, inputs)

    def __str__(self) -> str:
        quantized = [
            (group.key, (group.format.name, str(group.experts), _by(group.shape), group.layout))
            for group in self.groups
        ]
        rows = [("quantized", "format", "experts", "out x in", "layout")]
        rows += [(name, *cells) for name, cells in _collapse(quantized)]
        if self.inputs:
            rows += [("inputs", "format", "experts", "in", "scales")]
            of_inputs = [(i.key, (i.format.name, str(i.experts), str(i.shape[1]), i.scope)) for i in self.inputs]
            rows += [(name, *cells) for name, cells in _collapse(of_inputs)]
        if self.skipped:
            rows += [("not quantized", "why", "", "shape", "")]
            not_quantized = [(_group_key(s.name, ())[0], (s.reason, "", _by(s.shape), "")) for s in self.skipped]
            rows += [(name, *cells) for name, cells in _collapse(not_quantized)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        inside = sum(group.experts * prod(group.shape) for group in self.groups)
        total = inside + sum(prod(s.shape) for s in self.skipped)
        n, experts = len(self.groups), sum(group.experts for group in self.groups)
        lines += [
            f"{n} group{'s' * (n != 1)}, {experts:,} weight{'s' * (experts != 1)}: "
            f"{100 * inside / max(total, 1):.1f} % of {total:,} parameters"
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        return f"<pre>{str(self).replace('&', '&amp;').replace('<', '&lt;')}</pre>"


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
        key, expert = _group_key(name, patterns)
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


def refuse_inputs(spec: Spec, what: str) -> None:
    """Raise ValueError if a spec has inputs, which `what` has no place for: to leave them out must be the user's."""
    if spec.inputs:
        raise ValueError(
            f"{what}: found the inputs of {len(spec.inputs)} groups in the spec, such as {spec.inputs[0].key!r}, "
            "wanted weights only; pass dataclasses.replace(spec, inputs=()), and a state without the entries '*.input'"
        )


def weights_of(params: Mapping[str, Tensor], group: Group) -> list[Tensor]:
    """The parameters of a group, checked against the spec.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape is not the spec's, a dtype is not bf16, fp16 or fp32, or dtypes, devices, plain tensors and
            DTensors, or the placements of DTensors are mixed; a DTensor under torch.compile.
    """
    try:
        weights = [params[name] for name in group.names]
    except KeyError as error:
        raise KeyError(
            f"parameter {error.args[0]!r} of group {group.key!r} is not in params ({len(params)} entries)"
        ) from error
    if torch.compiler.is_compiling():
        _check_weights(group, weights, weights)
    elif torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage] (it has no public name)
        _check_weights(group, weights, [unwrapped(weight) for weight in weights])
    elif (known := _CHECKED.find(group, weights)) is not None:
        return known
    else:
        _check_weights(group, weights, weights)
        if not is_sharded(weights[0]):
            _CHECKED.remember(group, weights)
    return weights


_CHECKED = Known()


def _check_weights(group: Group, weights: Sequence[Tensor], inner: Sequence[Tensor]) -> None:
    """Raise unless the weights fit the spec; `inner` are they without the wrappers of torch.func."""
    shape, dtype, device = group.parameter_shape, weights[0].dtype, weights[0].device
    n = len(weights)  # counted in C: a group may have hundreds of parameters
    if (
        dtype in DTYPES
        and all(kind in (Tensor, torch.nn.Parameter) for kind in {type(w) for w in inner})
        and [w.shape for w in weights].count(shape) == n  # pyright: ignore[reportArgumentType] (a Size is a tuple)
        and [w.dtype for w in weights].count(dtype) == n
        and [w.device for w in weights].count(device) == n
    ):
        return
    for name, weight, tensor in zip(group.names, weights, inner, strict=True):
        _check_spread(name, tensor, group.names[0], inner[0])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"parameter {name!r}: found shape {tuple(weight.shape)}, the spec wants {shape}; "
                "select again if the model has changed"
            )
        _check_dtype(name, weight)
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(
                f"parameter {name!r}: found {weight.dtype} on {weight.device}, wanted {dtype} on {device} as "
                f"{group.names[0]!r} in the same group"
            )


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
            key, expert = _group_key(name, patterns)
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


def _group_key(name: str, patterns: Sequence[str]) -> tuple[str, int]:
    """Key of a parameter's group, and its expert's number: 0 if it has none."""
    for pattern in (*patterns, *_EXPERT_LISTS):
        match = re.fullmatch(pattern, name)
        if match and "expert" in match.re.groupindex:
            start, end = match.span("expert")
            return f"{name[:start]}*{name[end:]}", int(match["expert"])
    return name, 0


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
        _check_dtype(name, params[name])
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


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func: under vjp a DTensor does not look like one."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_mapped(tensor: Tensor) -> bool:
    """True under torch.func.vmap, if the tensor has a dimension that it maps."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, under torch.func too. torch.compile is given none: `weights_of` refuses them there."""
    # A name that a type has not is dear to ask a tensor for.
    if type(tensor) not in _PLAIN and hasattr(tensor, "to_local"):
        return not torch.compiler.is_compiling()
    if not torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage] (it has no public name)
        return False
    return not torch.compiler.is_compiling() and hasattr(unwrapped(tensor), "to_local")


def spread_of(tensor: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Mesh and placements of a DTensor, None for a plain tensor."""
    inner: Any = tensor if torch.compiler.is_compiling() else unwrapped(tensor)
    return (inner.device_mesh, tuple(inner.placements)) if hasattr(type(inner), "to_local") else None


def spread_in_words(spread: tuple[Any, tuple[Any, ...]] | None) -> str:
    """What `spread_of` found, for a message."""
    return "a plain tensor" if spread is None else f"a DTensor {spread[1]} on {spread[0]}"


def _check_spread(name: str, weight: Tensor, first_name: str, first: Tensor) -> None:
    # Asked of the type: while torch.compile traces, a DTensor itself says that it has no such method.
    if torch.compiler.is_compiling():
        if hasattr(type(weight), "to_local"):
            raise ValueError(f"parameter {name!r}: found a DTensor under torch.compile, wanted a plain tensor")
        return
    found, wanted = spread_of(weight), spread_of(first)
    if found != wanted:
        raise ValueError(
            f"parameter {name!r}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)} as "
            f"{first_name!r} in the same group"
        )


def _check_dtype(name: str, weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise ValueError(f"parameter {name!r}: found {weight.dtype}, wanted bfloat16, float16 or float32")


def _group_to_dict(group: Group) -> dict[str, Any]:
    return {f.name: getattr(group, f.name) for f in fields(group) if f.init} | {"format": group.format.to_dict()}


def _group_from_json(
    kind: type[AnyGroup], format: dict[str, Any], names: list[str], shape: list[int], **others: Any
) -> AnyGroup:
    return kind(format=Format.from_dict(format), names=tuple(names), shape=(shape[0], shape[1]), **others)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _collapse(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Rows that differ only in the layer number become one, 'layers.{0-27}.mlp'. The layer is the first number."""
    merged: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for name, cells in dict.fromkeys(rows):
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        head, tail = (name[: match.start()], name[match.end() :]) if match else (name, "")
        merged.setdefault((head, tail, cells), []).extend([int(match.group())] if match else [])
    return [
        (head + (f"{{{ranges(n)}}}" if len(n) > 1 else "".join(map(str, n))) + tail, cells)
        for (head, tail, cells), n in merged.items()
    ]
