"""A static `Spec`: which parameters are quantized, grouped by expert, and how; as a table, JSON, a difference.

A group is one role in one layer. Its key is the parameter's name with the expert number as `*`:

    ...linear_fc1.weight0 .. weightN-1            Transformer Engine GroupedLinear
    ...local_experts.{i}.linear_fc1.weight        Megatron SequentialMLP
    ...experts.{i}.w1.weight                      module lists (Mixtral, DeepSeek, Qwen checkpoints)
    ...experts.expert_{i}.wi.weight               module dicts (Switch, NLLB)
    ...experts.gate_up_proj  [E, out, in]         stacked experts (transformers 5); [E, in, out] in gpt-oss, Llama 4
    any other matrix                              dense: a group of one
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from math import prod
from typing import Any, TypeVar, cast
from zlib import crc32

from fq_transforms.formats import Format, check_layout, own_format
from fq_transforms.parse import check_name, parse_json, read_fields, shown
from fq_transforms.rules import Rule, rule_to_dict, rules_from_list
from fq_transforms.tables import html, table

__all__ = [
    "WITHOUT_INPUTS",
    "Group",
    "Inputs",
    "Skipped",
    "Spec",
    "experts_regex",
    "group_key",
    "numbered",
    "ranges",
    "refuse_inputs",
]

# Names of the experts of a list; `expert` is the number.
EXPERT_LISTS = (
    r"(?:.*\.)?(?:local_)?experts\.(?:expert_)?(?P<expert>\d+)\..+",
    r"(?:.*\.)?weight(?P<expert>\d+)",
)
# What to do where a place has none for inputs, of who has a spec and a state.
WITHOUT_INPUTS = "pass dataclasses.replace(spec, inputs=()), and a state without the entries '*.input'"


@dataclass(frozen=True, repr=False)
class Group:
    """The weights of one role in one layer, one per expert.

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
        _check_group(self)
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.format.is_stateless:
            shapes["amax"] = (self.experts, *self.format.amax_shape(*self.shape))
        if self.format.has_global_amax:
            shapes["global_amax"] = (self.experts,)
        object.__setattr__(self, "leaf_shapes", shapes)
        object.__setattr__(self, "number", crc32(self.key.encode()) & 0x7FFFFFFF)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}: {_in_words(self)})"

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


@dataclass(frozen=True, repr=False)
class Inputs(Group):
    """What the weights of one role in one layer are multiplied with: tokens [tokens, in], and how they are quantized.

    The fields of `Group`, of these weights; `key` is theirs with `.input` behind it, `format` that of the inputs. A row
    of a matrix [tokens, in] is a token, so a format per channel has one scale per token, made when the model runs.

    Attributes:
        per_expert: Each expert has an amax of its own; else they share one, the largest.
    """

    per_expert: bool = False

    def __post_init__(self) -> None:
        _check_group(self)
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
            return "one amax per expert" if self.per_expert else "one amax"
        return "one scale per token" if self.format.block == (1, None) else "one scale per block"


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not quantized, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


# The headers of a spec's table, and the columns that are aligned to the left.
_HEADS = (
    ("quantized", "format", "experts", "out x in", "layout"),
    ("inputs", "format", "experts", "in", "scales"),
    ("not quantized", "why", "", "shape", ""),
)
_LEFT = (0, 1, 3, 4)

AnyGroup = TypeVar("AnyGroup", bound=Group)


@dataclass(frozen=True, repr=False)
class Spec:
    """What is quantized, how, and what is not. Static: frozen, hashable, a table when printed, JSON when stored.

    Attributes:
        groups: Weights that are quantized.
        skipped: Parameters that are not, and why.
        inputs: What weights are multiplied with, where that is quantized.
        rules: What `select` was given, for the record. Two specs are equal if they quantize the same, whatever rules
            led there: a state, a checkpoint and a compiled function depend on the groups alone.
        assumed: Globs of stacks that `select` took for [E, out, in] without being told or shown.

    Example:
        >>> import torch
        >>> from fq_transforms.formats import NVFP4
        >>> from fq_transforms.select import select
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
    rules: tuple[Rule, ...] = field(default=(), compare=False, repr=False)
    assumed: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for what, names in (
            ("group", [group.key for group in self.all_groups]),
            ("parameter", [name for group in self.groups for name in group.names] + [s.name for s in self.skipped]),
            ("input of the parameter", [name for inputs in self.inputs for name in inputs.names]),
        ):
            if len(set(names)) < len(names):
                name, count = Counter(names).most_common(1)[0]
                raise ValueError(f"found the {what} {shown(name)} {count} times, wanted each once")

    @property
    def all_groups(self) -> tuple[Group, ...]:
        """Everything that a state has an entry for: weights, then inputs."""
        return (*self.groups, *self.inputs)

    def for_layout(self, layout: str) -> "Spec":
        """The same in a layout's own formats: see `formats.own_format`. Raises ValueError for no layout."""
        check_layout(layout)
        return replace(
            self,
            groups=tuple(replace(group, format=own_format(group.format, layout)) for group in self.groups),
            inputs=tuple(replace(inputs, format=own_format(inputs.format, layout)) for inputs in self.inputs),
            rules=tuple(rule.for_layout(layout) for rule in self.rules),
        )

    def to_json(self) -> str:
        """The spec as one line of JSON, its rules too, all formats with their numbers."""
        data: dict[str, Any] = {
            "groups": [_group_to_dict(group) for group in self.groups],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }
        if self.inputs:
            data["inputs"] = [_group_to_dict(inputs) for inputs in self.inputs]
        if self.rules:
            data["rules"] = [rule_to_dict(rule, names=False) for rule in self.rules]
        if self.assumed:
            data["assumed"] = list(self.assumed)
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> "Spec":
        """The spec that `to_json` wrote. Raises ValueError if the text is not one; the message names the entry."""
        try:
            data = read_fields(
                parse_json(text),
                "spec",
                {"groups": "a list", "skipped": "a list"},
                {"inputs": "a list", "rules": "a list", "assumed": "a list of text"},
            )
            spec = Spec(
                tuple(_group_from_dict(Group, f"groups[{i}]", group) for i, group in enumerate(data["groups"])),
                tuple(_skipped_from_dict(f"skipped[{i}]", entry) for i, entry in enumerate(data["skipped"])),
                tuple(
                    _group_from_dict(Inputs, f"inputs[{i}]", group) for i, group in enumerate(data.get("inputs", ()))
                ),
                rules_from_list(data.get("rules", [])),
                tuple(data.get("assumed", ())),
            )
        except ValueError as error:
            raise ValueError(f"not a stored Spec: {error}, in {str(text)[:80]!r}") from error
        return spec

    def diff(self, other: "Spec") -> str:
        """What differs between two specs: a table, layers as a range; "" if they are equal.

        Each row says what differs in a group, in its inputs, or in a parameter that is not quantized; "-" stands where
        a spec has no such entry. Rules are not compared. The order is named where nothing else differs.

        Example:
            >>> import torch
            >>> from fq_transforms.formats import FP8, NVFP4
            >>> from fq_transforms.select import select
            >>> params = {f"layers.{i}.up.weight": torch.empty(8, 32) for i in range(4)} | {"head": torch.empty(8, 32)}
            >>> print(select(params, {"*": FP8}).diff(select(params, {"*": NVFP4, "head": None})))
            name                     what           self               other
            layers.{0-3}.up.weight   format         FP8                NVFP4
            head                     quantized      FP8, 8 x 32 dense  -
            head                     not quantized  -                  8 x 32: excluded by head
        """
        if not isinstance(cast("Any", other), Spec):
            raise ValueError(f"other: found {type(other).__name__}, wanted a Spec")
        rows = [
            *_differences("quantized", self.groups, other.groups),
            *_differences("inputs", self.inputs, other.inputs),
            *_differences("not quantized", self.skipped, other.skipped),
        ]
        if not rows:
            return "" if self == other else "the order of groups or parameters"
        head = ("name", "what", "self", "other")
        return table([head, *((name, *cells) for name, cells in _collapse(rows))], left=range(4))

    def __repr__(self) -> str:
        return f"Spec({self.summary})"

    def __str__(self) -> str:
        return "\n".join([table(self._rows(), left=_LEFT), self.summary, *self._hints()])

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, *below: str) -> str:
        """The table as HTML, with lines of text below it."""
        rows = self._rows()
        heads = [i for i, row in enumerate(rows) if row in _HEADS]
        return html(rows, left=_LEFT, heads=heads, below=[self.summary, *self._hints(), *below])

    def _hints(self) -> list[str]:
        """What to look at: matrices that may be experts, and stacks that may be stored the other way round."""
        told = f"transposed={{{', '.join(f'{glob!r}: True' for glob in self.assumed)}}}"
        of_layout = f"hint: nothing shows that these stacks are [experts, out, in]; for [experts, in, out] pass {told}"
        return [*_ungrouped(self.groups), *[of_layout][: len(self.assumed)]]

    def _rows(self) -> list[tuple[str, ...]]:
        quantized = [
            (group.key, (group.format.name, str(group.experts), _by(group.shape), group.layout))
            for group in self.groups
        ]
        rows: list[tuple[str, ...]] = [_HEADS[0]]
        rows += [(name, *cells) for name, cells in _collapse(quantized)]
        if self.inputs:
            rows += [_HEADS[1]]
            of_inputs = [(i.key, (i.format.name, str(i.experts), str(i.shape[1]), i.scope)) for i in self.inputs]
            rows += [(name, *cells) for name, cells in _collapse(of_inputs)]
        if self.skipped:
            rows += [_HEADS[2]]
            not_quantized = [(group_key(s.name, ())[0], (s.reason, "", _by(s.shape), "")) for s in self.skipped]
            rows += [(name, *cells) for name, cells in _collapse(not_quantized)]
        return rows

    @property
    def summary(self) -> str:
        """How much is quantized, in one line."""
        inside = sum(group.experts * prod(group.shape) for group in self.groups)
        total = inside + sum(prod(s.shape) for s in self.skipped)
        n, experts = len(self.groups), sum(group.experts for group in self.groups)
        return (
            f"{n} group{'s' * (n != 1)}, {experts:,} weight{'s' * (experts != 1)}: "
            f"{100 * inside / max(total, 1):.1f} % of {total:,} parameters"
        )


def refuse_inputs(spec: Spec, what: str, fix: str = WITHOUT_INPUTS) -> None:
    """Raise ValueError if a spec has inputs, which `what` has no place for: to leave them out must be the user's."""
    if spec.inputs:
        raise ValueError(
            f"{what}: found the inputs of {len(spec.inputs)} groups in the spec, such as {spec.inputs[0].key!r}, "
            f"wanted weights only; {fix}"
        )


def group_key(name: str, patterns: Sequence[str]) -> tuple[str, int]:
    """Key of a parameter's group, and its expert's number: 0 if it has none."""
    for pattern in (*patterns, *EXPERT_LISTS):
        match = re.fullmatch(pattern, name)
        if match and "expert" in match.re.groupindex:
            start, end = match.span("expert")
            return f"{name[:start]}*{name[end:]}", int(match["expert"])
    return name, 0


def numbered(names: Iterable[str]) -> list[tuple[str, str, list[int]]]:
    """Names that differ in one number, from 0 on without a gap: what stands before and behind it, and the numbers.

    Of several such numbers in a name, the last.

    Example:
        >>> numbered(["a.0.ffn_0.w2", "a.0.ffn_1.w2", "a.1.ffn_0.w2", "a.1.ffn_1.w2"])
        [('a.0.ffn_', '.w2', [0, 1]), ('a.1.ffn_', '.w2', [0, 1])]
    """
    places = {name: [m.span() for m in re.finditer(r"\d+", name)][::-1] for name in names}
    numbers: dict[tuple[str, str], list[int]] = {}
    for name, spans in places.items():
        for start, end in spans:
            numbers.setdefault((name[:start], name[end:]), []).append(int(name[start:end]))
    lists = {place: sorted(found) for place, found in numbers.items() if len(found) > 1}
    lists = {place: found for place, found in lists.items() if found == list(range(len(found)))}
    last = (next(((n[:a], n[b:]) for a, b in spans if (n[:a], n[b:]) in lists), None) for n, spans in places.items())
    return [(*place, lists[place]) for place in dict.fromkeys(last) if place]


def experts_regex(before: str, after: str) -> str:
    """What to pass as `experts=` for names with their expert's number in between; other numbers may be any."""
    before, after = (re.sub(r"\d+", r"\\d+", re.escape(part)) for part in (before, after))
    return rf"{before}(?P<expert>\d+){after}"


# What layers are called, and heads, whose numbers are of no expert.
_LAYERS = re.compile(r"(?:layer|block|stage|level|head|resnet|attention)s?$|^h$", re.IGNORECASE)
_OF_EXPERTS = re.compile(r"expert|moe|ffn", re.IGNORECASE)
MOST_HINTS = 3


def _ungrouped(groups: Sequence[Group]) -> list[str]:
    """Of dense groups that differ in a number within a layer, or in one beside an expert's name: how to group them."""
    dense: dict[tuple[tuple[int, int], Format], list[str]] = {}
    for group in groups:
        if group.names == (group.key,) and not group.stacked:
            dense.setdefault((group.shape, group.format), []).append(group.key)
    found: dict[str, str] = {}
    for names in dense.values():
        for before, after, numbers in numbered(names):
            words = re.findall(r"[A-Za-z]+", before)
            is_named = bool(_OF_EXPERTS.search(before))
            is_within = is_named or bool(re.search(r"\d", before))
            if is_within and len(numbers) >= (2 if is_named else 4) and not (words and _LAYERS.search(words[-1])):
                regex = experts_regex(before, after)
                found.setdefault(
                    regex,
                    f"hint: {before}[{ranges(numbers)}]{after} are {len(numbers)} groups; if they are experts of one "
                    f"layer, pass experts=r'{regex}'",
                )
    return [*found.values()][:MOST_HINTS]


_GROUP_FIELDS = {
    "key": "text",
    "names": "a list of text",
    "format": "an object",
    "experts": "a count",
    "shape": "two counts",
}


def _group_to_dict(group: Group) -> dict[str, Any]:
    return {f.name: getattr(group, f.name) for f in fields(group) if f.init} | {"format": group.format.to_dict()}


def _check_group(group: Group) -> None:
    """Raise ValueError unless the names are of so many experts, in their order, and the format fits the shape."""
    what = f"group {shown(group.key)}"
    for name in (group.key, *group.names):
        check_name(name, what)
    names, experts, columns = len(group.names), group.experts, group.format.block[1]
    if names != (1 if group.stacked else experts) or experts < 1:
        raise ValueError(f"{what}: found {names} names of {experts} experts, wanted one of each, or one if stacked")
    if experts * prod(group.shape) >= 2**50:
        raise ValueError(f"{what}: found {experts} experts of {group.shape}, which no memory holds")
    if min(group.shape) < 1 or (group.format.has_blocks_along_in and columns and group.shape[1] % columns):
        raise ValueError(
            f"{what}: found shape (out, in) = {group.shape}, wanted a matrix whose `in` is a multiple of the block of "
            f"{group.format.name}"
        )
    before, star, after = group.key.removesuffix(".input" * isinstance(group, Inputs)).partition("*")
    for number, name in enumerate(group.names if star else ()):
        found = name.removeprefix(before).removesuffix(after)
        if name != f"{before}{found}{after}" or not found.isdecimal() or int(found) != number:
            raise ValueError(f"{what}: found {shown(name)} for expert {number}, wanted its number in place of '*'")


def _group_from_dict(kind: type[AnyGroup], what: str, data: Any) -> AnyGroup:
    if isinstance(data, dict) and "key" in data:
        what += f", key {shown(data['key'])}"
    flags = ["stacked", "transposed"] + ["per_expert"] * (kind is Inputs)
    values = read_fields(data, what, _GROUP_FIELDS, dict.fromkeys(flags, "true or false"))
    try:
        values["format"] = Format.from_dict(values["format"])
        values.update(names=tuple(values["names"]), shape=tuple(values["shape"]))
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _skipped_from_dict(what: str, data: Any) -> Skipped:
    values = read_fields(data, what, {"name": "text", "shape": "a list of counts", "reason": "text"})
    check_name(values["name"], what)
    return Skipped(values["name"], tuple(values["shape"]), values["reason"])


def _differences(
    what: str, these: Sequence[Group | Skipped], those: Sequence[Group | Skipped]
) -> Iterable[tuple[str, tuple[str, str, str]]]:
    """Rows of (name, (what differs, here, there))."""
    here, there = ({x.key if isinstance(x, Group) else x.name: x for x in side} for side in (these, those))
    for key in here | there:
        name = key if what != "not quantized" else group_key(key, ())[0]
        one, two = here.get(key), there.get(key)
        if one is None or two is None:
            yield name, (what, _in_words(one), _in_words(two))
        else:
            for f in (f.name for f in fields(one) if f.compare):
                if (a := getattr(one, f)) != (b := getattr(two, f)):
                    yield name, (f, *_both_in_words(a, b))


def _in_words(entry: Group | Skipped | None) -> str:
    if entry is None:
        return "-"
    if isinstance(entry, Skipped):
        return f"{_by(entry.shape)}: {entry.reason}"
    experts = f"{entry.experts} experts, " if entry.experts != 1 else ""
    if isinstance(entry, Inputs):
        return f"{entry.format.name}, {experts}{entry.scope}"
    return f"{entry.format.name}, {experts}{_by(entry.shape)} {entry.layout}"


def _both_in_words(a: Any, b: Any) -> tuple[str, str]:
    """Two values of a field, short, and so that their difference is seen."""
    if isinstance(a, Format) and a.name == b.name:
        differ = [
            (name, x, y) for (name, x), y in zip(a.to_dict().items(), b.to_dict().values(), strict=True) if x != y
        ]
        one, two = (", ".join(f"{name}={pair[i]}" for name, *pair in differ) for i in range(2))
        return f"{a.name} with {one}", f"{b.name} with {two}"
    if isinstance(a, Format):
        return a.name, b.name
    if isinstance(a, tuple) and all(isinstance(x, int) for x in (*a, *b)):
        return _by(a), _by(b)
    if isinstance(a, tuple):  # names
        return next((repr(x), repr(y)) for x, y in zip_longest(a, b) if x != y)
    return str(a), str(b)


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
