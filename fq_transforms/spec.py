"""A static `Spec`: which parameters are quantized, grouped by expert, and how; as a table, and as JSON.

A group is one role in one layer. Its key is the parameter's name with the expert number as `*`:

    ...linear_fc1.weight0 .. weightN-1            Transformer Engine GroupedLinear
    ...local_experts.{i}.linear_fc1.weight        Megatron SequentialMLP
    ...experts.{i}.w1.weight                      module lists (Mixtral, DeepSeek, Qwen checkpoints)
    ...experts.gate_up_proj  [E, out, in]         stacked experts (transformers 5); [E, in, out] in gpt-oss, Llama 4
    any other matrix                              dense: a group of one
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, TypeVar
from zlib import crc32

from fq_transforms.formats import Format

__all__ = ["Group", "Inputs", "Skipped", "Spec", "group_key", "ranges", "refuse_inputs"]

# Names of the experts of a list; `expert` is the number.
EXPERT_LISTS = (r"(?:.*\.)?(?:local_)?experts\.(?P<expert>\d+)\..+", r"(?:.*\.)?weight(?P<expert>\d+)")


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
            not_quantized = [(group_key(s.name, ())[0], (s.reason, "", _by(s.shape), "")) for s in self.skipped]
            rows += [(name, *cells) for name, cells in _collapse(not_quantized)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in [*lines, self.summary])

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

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        return f"<pre>{str(self).replace('&', '&amp;').replace('<', '&lt;')}</pre>"


def refuse_inputs(spec: Spec, what: str) -> None:
    """Raise ValueError if a spec has inputs, which `what` has no place for: to leave them out must be the user's."""
    if spec.inputs:
        raise ValueError(
            f"{what}: found the inputs of {len(spec.inputs)} groups in the spec, such as {spec.inputs[0].key!r}, "
            "wanted weights only; pass dataclasses.replace(spec, inputs=()), and a state without the entries '*.input'"
        )


def group_key(name: str, patterns: Sequence[str]) -> tuple[str, int]:
    """Key of a parameter's group, and its expert's number: 0 if it has none."""
    for pattern in (*patterns, *EXPERT_LISTS):
        match = re.fullmatch(pattern, name)
        if match and "expert" in match.re.groupindex:
            start, end = match.span("expert")
            return f"{name[:start]}*{name[end:]}", int(match["expert"])
    return name, 0


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
