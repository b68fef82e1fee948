"""A format for each part of a model under a budget of bytes, so that the sum of what they cost is the least."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fq_transforms.calibrate import progress
from fq_transforms.checkpoint.modelopt_names import is_grouped
from fq_transforms.checks import weights_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.export.files.directory import bytes_of
from fq_transforms.export.names.ties import FUSED_BY_ENGINES
from fq_transforms.formats import Format
from fq_transforms.methods import check_format
from fq_transforms.pack import check_packable, packed_leaves
from fq_transforms.parse import shown
from fq_transforms.rules import Rule
from fq_transforms.search.knapsack import least
from fq_transforms.search.sensitivity import Hessians, Loss, Sensitivities, Sensitivity
from fq_transforms.select import check_fits
from fq_transforms.spec import Group, Skipped, Spec, refuse_inputs
from fq_transforms.tables import html, table
from fq_transforms.transform import Transform

__all__ = ["Mixture", "Option", "Unit", "search"]

Part = Literal["engine", "group", "expert"]


class Option(NamedTuple):
    """A format, None to leave weights as they are, the bytes of the weights in it, and what it costs."""

    format: Format | None
    bytes: int
    sensitivity: float


@dataclass(frozen=True)
class Unit:
    """Weights that get one format.

    Attributes:
        name: What the keys have in common.
        keys: Groups of the spec.
        options: One for each format, in their order.
        choice: The number of the option taken.
    """

    name: str
    keys: tuple[str, ...]
    options: tuple[Option, ...]
    choice: int

    @property
    def chosen(self) -> Option:
        """The option taken."""
        return self.options[self.choice]


class _Given(NamedTuple):
    """What formats are chosen for.

    Attributes:
        fq: As given.
        groups: That get a format, in order; their own is not used.
        names: Of all parameters, in order.
        is_split: The groups are single experts, which no rule can tell apart.
    """

    fq: Transform
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    is_split: bool


@dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """What `search` has chosen. Prints as a table: each unit, its format and bytes, and what each format would cost.

    The sensitivity is the least that there is, unless two million sums are open at once; then it exceeds `bound` by
    less than a step of one unit from one format to the next. Of equals the smaller counts, then the earlier format.

    Attributes:
        fq: The Transform that was given, with the spec that was chosen; what is left as it is has no group.
        units: In the order of the spec.
        budget: Bytes allowed.
        bound: No choice under the budget has a smaller sensitivity. That of the choice itself if it is the least.

    Example:
        >>> import fq_transforms as fqt
        >>> weight = torch.linspace(-1, 1, 128).view(4, 32)
        >>> params = {f"layers.{i}.experts.{e}.w": weight * (i + 1) for i in range(2) for e in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> print(found := fqt.search(fq, params, [fqt.MXFP4, fqt.FP8, None], budget=500))
        unit              format  bytes  in MXFP4  in FP8
        layers.0.experts  MXFP4     136     0.765  0.0551
        layers.1.experts  FP8       264      3.06    0.22
        2 units, 400 of 500 bytes, 6.25 bits per weight: sensitivity 0.985, the least that there is
        >>> found.at("1KB").spec == fq.spec
        True
    """

    fq: Transform
    units: tuple[Unit, ...]
    budget: int
    bound: float
    _given: _Given = field(repr=False)

    @property
    def spec(self) -> Spec:
        """An ordinary one: `fqt.select(params, spec.rules)` makes it too, but for by="expert", of which it has none."""
        return self.fq.spec

    @property
    def bytes(self) -> int:
        """Of all units: codes and scales as `pack` stores them, and the weights that are left as they are."""
        return sum(unit.chosen.bytes for unit in self.units)

    @property
    def sensitivity(self) -> float:
        """The sum of all units."""
        return sum(unit.chosen.sensitivity for unit in self.units)

    def at(self, budget: int | str) -> "Mixture":
        """The choice under another budget, from the same sensitivities. Raises ValueError as `search`."""
        return _chosen(self._given, self.units, _checked_budget(budget, self.units))

    def __repr__(self) -> str:
        return f"Mixture({self._total()})"

    def __str__(self) -> str:
        return f"{table(self._rows(), left=(0, 1))}\n{self._total()}"

    def _repr_html_(self) -> str:
        return html(self._rows(), left=(0, 1), below=[self._total()])

    def _rows(self) -> list[tuple[str, ...]]:
        formats = [option.format for option in self.units[0].options]
        header = ("unit", "format", "bytes", *(f"in {format.name}" for format in formats if format))
        rows = [
            (
                unit.name,
                unit.chosen.format.name if unit.chosen.format else "unquantized",
                f"{unit.chosen.bytes:,}",
                *(f"{option.sensitivity:.3g}" for option in unit.options if option.format),
            )
            for unit in self.units
        ]
        return [header, *rows]

    def _total(self) -> str:
        weights = sum(group.experts * prod(group.shape) for group in self._given.groups)
        is_least = self.bound >= self.sensitivity
        return (
            f"{len(self.units)} unit{'s' * (len(self.units) != 1)}, {self.bytes:,} of {self.budget:,} bytes, "
            f"{8 * self.bytes / weights:.2f} bits per weight: sensitivity {self.sensitivity:.3g}, "
            + ("the least that there is" if is_least else f"and at least {self.bound:.3g} under any choice")
        )


def search(
    fq: Transform,
    params: Mapping[str, Tensor],
    formats: Sequence[Format | None],
    *,
    budget: int | str,
    sensitivity: Sensitivity = "report",
    loss: Loss | None = None,
    hessians: Hessians | None = None,
    by: Part = "engine",
) -> Mixture:
    """A format for each unit of the spec: the least sum of sensitivities under a budget of bytes.

    Sensitivities, with e = fakequant(w) - w of one unit in one format; docs/calibration says when to use which:

        "report"     sum of e^2
        "hessian"    sum over experts of tokens * trace(e H e^T), or of e^2 m
        "loss"       loss(w + e) - loss(w)
        "jvp"        e'L''e / 2, by torch.func.jvp of jvp

    Args:
        fq: Whose groups, and whose method. Its own formats count only if they are among `formats`.
        params: As `calibrate` takes them; plain tensors.
        formats: Which a unit may have; None leaves its weights as they are, in their own dtype, at sensitivity 0.
        budget: Bytes of the weights of `fq`, as `pack` has them, such as 3_000_000 or "12GB". No others count.
        sensitivity: As above.
        loss: For "loss" and "jvp": a pure function of all parameters to a scalar.
        hessians: For "hessian": group key to m, as `input_second_moments` gives it, or to {"hessian": [E, in, in],
            "tokens": [E]}, H the mean of x x^T over an expert's tokens.
        by: What has one format. "engine": all roles of a layer's experts, and other roles that engines fuse; they load
            nothing else. "group", or "expert" of a layer: for `fakequant`.

    Raises:
        KeyError, ValueError: A parameter or a Hessian is missing; a Hessian is one that `gptq` refuses; the budget is
            below the cheapest choice; a format does not fit; a sensitivity is not finite; an option is not one of its
            choices, or lacks its data.

    Example: see `Mixture`.
    """
    _check_given(fq, formats, sensitivity, loss, hessians, by)
    parts = [part for group in fq.spec.groups for part in _parts(group, by)]
    given = _Given(fq, tuple(group for _, group in parts), tuple(params), by == "expert")
    params = {name: param.detach() for name, param in params.items()}
    members: dict[str, list[Group]] = {}
    for name, group in parts:
        members.setdefault(name, []).append(group)
        _check_group(fq, params, group, formats)
    units = [
        Unit(name, tuple(group.key for group in own), tuple(_unmeasured(params, own, format) for format in formats), 0)
        for name, own in members.items()
    ]
    limit = _checked_budget(budget, units)
    with torch.no_grad():
        costs = Sensitivities(fq, params, sensitivity, loss, hessians)
        units = [_measured(unit, members[unit.name], costs) for unit in progress(units, f"search, {sensitivity}")]
    return _chosen(given, units, limit)


def _parts(group: Group, by: Part) -> list[tuple[str, Group]]:
    """A group, or each of its experts, and the name of the unit that it is in."""
    words, is_list = group.key.split("."), "*" in group.key
    if by == "group":
        return [(group.key, group)]
    if not is_list and not group.stacked:
        fused = {role: "+".join(roles) for roles in FUSED_BY_ENGINES for role in roles}
        return [(".".join(fused.get(word, word) for word in words), group)]
    if is_list:
        end = next(i for i, word in enumerate(words) if "*" in word) - is_grouped(group.key)
    else:
        end = len(words) - 1 - (words[-1] == "weight")
    layer = ".".join(words[: max(end, 0)]) or "model"
    if by == "engine":
        return [(layer, group)]
    if group.stacked:
        raise ValueError(
            f"by: found 'expert' and {group.key!r}, which holds all experts of a layer, wanted 'engine', or a "
            "parameter for each expert"
        )
    return [
        (f"{layer}.{expert}", Group(name, (name,), group.format, 1, group.shape, transposed=group.transposed))
        for expert, name in enumerate(group.names)
    ]


def _unmeasured(params: Mapping[str, Tensor], groups: Iterable[Group], format: Format | None) -> Option:
    """A format and its bytes."""
    if format is None:
        return Option(None, sum(params[name].nbytes for group in groups for name in group.names), 0.0)
    leaves = [leaf for group in groups for leaf in packed_leaves(replace(group, format=format)).values()]
    return Option(format, sum(prod(shape) * dtype.itemsize for shape, dtype in leaves), 0.0)


def _measured(unit: Unit, groups: Sequence[Group], costs: Sensitivities) -> Unit:
    found = (costs.of(unit.name, groups, option.format) for option in unit.options)
    options = (option._replace(sensitivity=cost) for option, cost in zip(unit.options, found, strict=True))
    return replace(unit, options=tuple(options))


def _chosen(given: _Given, units: Sequence[Unit], budget: int) -> Mixture:
    solution = least([[(option.bytes, option.sensitivity) for option in unit.options] for unit in units], budget)
    units = tuple(replace(unit, choice=choice) for unit, choice in zip(units, solution.options, strict=True))
    format_of = {key: unit.chosen.format for unit in units for key in unit.keys}
    spec, place = given.fq.spec, {name: number for number, name in enumerate(given.names)}
    groups, left = list[Group](), list(spec.skipped)
    for group in given.groups:
        if (format := format_of[group.key]) is not None:
            groups.append(replace(group, format=format))
        else:  # as `select` says it of the rules below
            left += [Skipped(name, group.parameter_shape, f"excluded by {_glob(group.key)}") for name in group.names]
    left.sort(key=lambda skipped: place.get(skipped.name, len(place)))
    rules = (*spec.rules, *(Rule(_glob(key), format_of[key]) for key in (group.key for group in given.groups)))
    chosen = Spec(tuple(groups), tuple(left), rules=() if given.is_split else rules)
    return Mixture(replace(given.fq, spec=chosen), units, budget, solution.bound, given)


def _glob(key: str) -> str:
    """The pattern of a rule for one group, whose names may have brackets, as paths in a tree do."""
    return key.replace("[", "[[]")


def _checked_budget(budget: int | str, units: Iterable[Unit]) -> int:
    limit, smallest = bytes_of(budget, "budget"), sum(min(option.bytes for option in unit.options) for unit in units)
    if limit < smallest:
        raise ValueError(
            f"budget: found {limit:,} bytes, wanted at least {smallest:,}, those of the cheapest format for each unit"
        )
    return limit


def _check_given(fq: Any, formats: Any, sensitivity: Any, loss: Any, hessians: Any, by: Any) -> None:
    if not isinstance(fq, Transform):
        raise ValueError(f"fq: found {type(fq).__name__}, wanted a Transform; call transform(select(params, rules))")
    if not fq.spec.groups:
        raise ValueError("fq: found no group in its spec, wanted at least one; select(params, rules) makes a spec")
    refuse_inputs(fq.spec, "search")
    given: list[Any] = list(formats) if isinstance(formats, list | tuple) else []
    if not given or not all(isinstance(format, Format | None) for format in given):
        raise ValueError(
            f"formats: found {shown(formats)}, wanted a list of formats, such as [fqt.NVFP4, fqt.FP8, None]"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"formats: found {[format and format.name for format in given]}, wanted each once")
    for name, found, choices in (("sensitivity", sensitivity, get_args(Sensitivity)), ("by", by, get_args(Part))):
        if found not in choices:
            raise ValueError(f"{name}: found {found!r}, wanted one of {choices}")
    for name, found, kinds in (("loss", loss, ("loss", "jvp")), ("hessians", hessians, ("hessian",))):
        if (found is not None) != (sensitivity in kinds):
            is_found = "none" if found is None else type(found).__name__
            wanted = "none" if sensitivity not in kinds else "a function" if name == "loss" else "a dict by group"
            raise ValueError(f"{name}: found {is_found} for sensitivity={sensitivity!r}, wanted {wanted}")


def _check_group(fq: Transform, params: Mapping[str, Tensor], group: Group, formats: Iterable[Format | None]) -> None:
    if is_sharded(weights_of(params, group)[0]):
        raise ValueError(
            f"parameter {group.names[0]!r}: found a DTensor, of which each rank would choose by its own shard, wanted "
            "plain tensors"
        )
    for format in formats:
        if format is not None:
            check_fits(group.names[0], group.shape, format)
            check_packable(replace(group, format=format))
            check_format(fq.method, format, group.key)
