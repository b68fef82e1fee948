"""What quantization does to each expert, measured in one pass over the weights: numbers, a table and a plot."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isnan, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.checks import check_device, check_state, is_concrete, local_group, refuse_compiled, weights_of
from fq_transforms.dtensor import is_sharded, layout_of
from fq_transforms.formats import Format
from fq_transforms.ops.launch import has_kernel
from fq_transforms.ops.private import is_functorch_active
from fq_transforms.ops.report.reference import Measures, histogram_reference, report_reference
from fq_transforms.report.plot import Histogram, Row, plot
from fq_transforms.spec import Group, Spec
from fq_transforms.state import GroupState, State
from fq_transforms.tables import html, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GroupReport", "Report", "group_report", "histogram", "report", "role_of", "worst_of_roles"]


@dataclass(frozen=True, eq=False, repr=False)
class GroupReport:
    """What was measured of one group: tensors on the CPU, one number per expert, [E].

    Attributes:
        key: The group.
        format: Its format.
        experts: Numbers of the experts, 0 to E - 1; of DTensors those that this rank holds parts of.
        weights: In one expert; of DTensors, in its part on this rank.
        granules: Scales in one expert, likewise.
        signal: fp64, sum of w^2, w in fp32.
        noise: fp64, sum of (w - y)^2, y = `fakequant(..., out_dtype=torch.float32)`.
        clipped: int64, weights more than half a step beyond what their granule can hold.
        zeroed: int64, weights other than zero with y = 0.
        underflow: int64, granules whose scale is as small as the format has them, with an amax above zero.
        largest: fp32, max of abs(w).
        amax: fp32, the state's: the largest of an expert's granules. `largest` for MX formats, which have none.
        tokens: int64, tokens that each expert saw; None if they were not counted.
    """

    key: str
    format: Format
    experts: tuple[int, ...]
    weights: int
    granules: int
    signal: Tensor
    noise: Tensor
    clipped: Tensor
    zeroed: Tensor
    underflow: Tensor
    largest: Tensor
    amax: Tensor
    tokens: Tensor | None = None

    def __repr__(self) -> str:
        lowest = "" if self.worst is None else f": lowest SQNR {_number(self.sqnr[self.worst].item())} dB"
        return f"GroupReport({self.key!r}, {self.format.name}, {_plural(len(self.experts), 'expert')}{lowest})"

    @property
    def sqnr(self) -> Tensor:
        """Signal to quantization noise, fp64 [E] in dB: 10 log10(signal / noise); inf where nothing is lost."""
        return _decibels(self.signal, self.noise)

    @property
    def worst(self) -> int | None:
        """Place in [E] of the expert with the lowest SQNR, a NaN before all; None if there is none."""
        return int(_nan_first(self.sqnr).argmin()) if self.experts else None


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What quantization does to each expert. Prints as a table, worst group first; an HTML table in notebooks.

    The table has the lowest SQNR and the median, the number of the worst expert, shares of all weights (of all scales
    for underflow), the largest amax over the median and over the smallest of those above zero, dead experts, whose amax
    is zero, and unseen ones, which had no token.

    Attributes:
        groups: Group key to `GroupReport`, in the order of the spec.
        histograms: Of the worst expert of each role, worst first.
    """

    groups: dict[str, GroupReport]
    histograms: tuple[Histogram, ...]

    def __repr__(self) -> str:
        return f"Report({self._totals()[0]})"

    def __str__(self) -> str:
        return "\n".join([table(self._rows(), left=_LEFT), *self._totals()])

    def _repr_html_(self) -> str:
        return html(self._rows(), left=_LEFT, below=self._totals())

    def to_html(self, title: str) -> str:
        """The table as a page of its own."""
        head = f"<!doctype html>\n<meta charset='utf-8'>\n<title>{escape(title)}</title>\n<h1>{escape(title)}</h1>"
        return f"{head}\n{self._repr_html_()}\n"

    def plot(self) -> "Figure":
        """A figure: for each role a heat map of SQNR, layers by experts, above the histogram of its worst expert.

        A role is a group key without its layer number. A histogram is of weights over their scales: counts are on a
        logarithmic axis, ticks are the values that an element can take, and shades are where weights are clipped.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: This rank holds no expert.
        """
        roles: dict[str, tuple[list[Row], Histogram]] = {}
        of_role = {_role(found.key, found.format): found for found in self.histograms}
        for group in self.groups.values():
            role = _role(group.key, group.format)
            if role in of_role:
                _, layer = role_of(group.key)
                rows, _ = roles.setdefault(role, ([], of_role[role]))
                rows.append(Row("" if layer is None else str(layer), group.experts, group.sqnr))
        if not roles:
            raise ValueError("report: found no expert on this rank, wanted some to plot")
        return plot(roles)

    def _worst_first(self) -> list[GroupReport]:
        return sorted(self.groups.values(), key=_lowest)

    def _rows(self) -> list[tuple[str, ...]]:
        """The header and a line for each group; the last column only where tokens were counted."""
        rows = [_HEADER, *map(_cells, self._worst_first())]
        return rows if self._has_tokens() else [row[:-1] for row in rows]

    def _has_tokens(self) -> bool:
        return any(group.tokens is not None for group in self.groups.values())

    def _totals(self) -> list[str]:
        groups = list(self.groups.values())
        experts = sum(len(group.experts) for group in groups)
        weights, granules = (
            sum(getattr(group, name) * len(group.experts) for group in groups) for name in ("weights", "granules")
        )

        def total(name: str) -> Any:
            return sum(getattr(group, name).sum().item() for group in groups)

        overall = _decibels(torch.tensor(float(total("signal"))), torch.tensor(float(total("noise")))).item()
        dead = sum(int((group.amax == 0).sum()) for group in groups)
        lines = [
            f"{_plural(len(groups), 'group')}, {_plural(experts, 'expert')}, {_plural(weights, 'weight')}: "
            f"SQNR {_number(overall)} dB overall",
            f"clipped {_share(total('clipped'), weights)}, zeroed {_share(total('zeroed'), weights)}, underflow "
            f"{_share(total('underflow'), granules)}, dead {_plural(dead, 'expert')}",
        ]
        first = self._worst_first()[0]
        if first.worst is not None:
            lines[0] += (
                f", worst {_number(first.sqnr[first.worst].item())} dB: expert {first.experts[first.worst]} of "
                f"{first.key!r}"
            )
        if self._has_tokens():
            unseen = sum(int((group.tokens == 0).sum()) for group in groups if group.tokens is not None)
            lines[1] += f", unseen {_plural(unseen, 'expert')}"
        return lines


class _OwnPart(NamedTuple):
    """What this rank has of a group: all of plain tensors, its shards of DTensors."""

    group: Group
    weights: Sequence[Tensor]
    scales: GroupState
    experts: tuple[int, ...]

    def expert(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """An expert's matrix [out, in], and its amax and global amax."""
        weight = (self.weights[0][i] if self.group.stacked else self.weights[i]).detach()
        amax, global_amax = (
            None if leaf is None else leaf[i] for leaf in (self.scales.get("amax"), self.scales.get("global_amax"))
        )
        return weight.mT if self.group.transposed else weight, amax, global_amax


def report(
    params: Mapping[str, Tensor], state: State, *, spec: Spec, tokens: Mapping[str, Tensor] | None = None
) -> Report:
    """`Transform.report`, with the spec of the Transform."""
    if not spec.groups:
        raise ValueError("spec: found no group, wanted at least one; select(params, rules) makes a spec")
    if is_functorch_active():
        raise ValueError("report: found a call under torch.func, wanted plain tensors, whose values it reads")
    refuse_compiled("report", "it reads values")
    check_state(state, spec, values=is_concrete)
    if tokens is None:
        entries = {group.key: state.get(f"{group.key}.input", {}) for group in spec.groups}
        tokens = {key: entry["tokens"].long() for key, entry in entries.items() if "tokens" in entry}
    counted = _checked_tokens(tokens, spec)
    with torch.no_grad():
        parts = {group.key: _own_part(params, group, state[group.key]) for group in spec.groups}
        # All are launched before the first is read, which waits for a GPU.
        measured = {key: _measure(part) for key, part in parts.items()}
        groups = {key: _group_report(part, measured[key], counted.get(key)) for key, part in parts.items()}
        worst = worst_of_roles(groups.values())
        return Report(groups, tuple(_histogram(found, parts[found.key]) for found in worst))


def group_report(params: Mapping[str, Tensor], entry: GroupState, group: Group) -> GroupReport:
    """What is measured of one group, without tokens."""
    part = _own_part(params, group, entry)
    return _group_report(part, _measure(part), None)


def histogram(params: Mapping[str, Tensor], entry: GroupState, group: Group) -> Histogram:
    """Of the worst expert of one group."""
    part = _own_part(params, group, entry)
    return _histogram(_group_report(part, _measure(part), None), part)


def role_of(key: str) -> tuple[str, int | None]:
    """A group's role, its key with `*` for the layer, and the layer: the first number between dots.

    Example:
        >>> role_of("layers.3.experts.*.w1.weight")
        ('layers.*.experts.*.w1.weight', 3)
    """
    match = re.search(r"(?:(?<=\.)|^)\d+(?=\.)", key)
    return (f"{key[: match.start()]}*{key[match.end() :]}", int(match.group())) if match else (key, None)


def _role(key: str, format: Format) -> str:
    return f"{role_of(key)[0]}, {format.name}"


def _checked_tokens(tokens: Mapping[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    experts = {group.key: group.experts for group in spec.groups}
    checked: dict[str, Tensor] = {}
    for key, count in tokens.items():
        if key not in experts:
            raise ValueError(
                f"tokens: found the unexpected group {key!r}, wanted those of the spec, such as {list(experts)[:2]}"
            )
        if tuple(count.shape) != (experts[key],) or count.dtype.is_floating_point:
            raise ValueError(
                f"tokens {key!r}: found {tuple(count.shape)} {count.dtype}, wanted integers ({experts[key]},)"
            )
        checked[key] = count.cpu().long()
    return checked


def _own_part(params: Mapping[str, Tensor], group: Group, entry: GroupState) -> _OwnPart:
    weights: Sequence[Tensor] = weights_of(params, group)
    scales = {name: leaf.detach() for name, leaf in entry.items()}
    for name, weight in zip(group.names, weights, strict=True):
        if weight.is_meta:
            raise ValueError(f"parameter {name!r}: found a tensor on meta, wanted values to measure")
    check_device(group, scales, weights[0].device)
    layout = layout_of(group, weights)
    if layout is not None or any(map(is_sharded, scales.values())):
        weights, scales = local_group(group, layout, weights, scales)
    experts = tuple(range(group.experts)) if layout is None else () if layout.is_empty else layout.experts
    return _OwnPart(group, weights, scales, experts)


def _measure(part: _OwnPart) -> Measures:
    """What is measured of a group's experts, [E] each, where the weights are."""
    weights, scales, format = part.weights, part.scales, part.group.format
    if not part.experts:
        sums = torch.zeros(0, dtype=torch.float64, device=weights[0].device)
        counts, largest = sums.long(), sums.float()
        return Measures(sums, sums, counts, counts, counts, largest)
    if has_kernel(weights):
        from fq_transforms.ops.report.launch import report_triton  # which needs Triton

        amax, global_amax = scales.get("amax"), scales.get("global_amax")
        return report_triton(weights, amax, global_amax, format=format, transposed=part.group.transposed)
    found = [report_reference(*part.expert(i), format=format) for i in range(len(part.experts))]
    return Measures(*(torch.stack(column) for column in zip(*found, strict=True)))


def _group_report(part: _OwnPart, measures: Measures, tokens: Tensor | None) -> GroupReport:
    group, format = part.group, part.group.format
    shape = (part.weights[0].mT if group.transposed else part.weights[0]).shape[-2:]
    amax = part.scales.get("global_amax", part.scales.get("amax", measures.largest))
    return GroupReport(
        key=group.key,
        format=format,
        experts=part.experts,
        weights=prod(shape),
        granules=prod(format.granules(*shape)) if prod(shape) else 0,
        **{name: leaf.cpu() for name, leaf in measures._asdict().items()},
        amax=(amax if amax.dim() == 1 or not amax.numel() else amax.flatten(1).amax(1)).cpu(),
        tokens=None if tokens is None else tokens[list(part.experts)],
    )


def worst_of_roles(groups: Iterable[GroupReport]) -> list[GroupReport]:
    """Of each role the group with the lowest SQNR, worst first."""
    worst: dict[str, GroupReport] = {}
    for group in sorted(groups, key=_lowest):
        if group.experts:
            worst.setdefault(_role(group.key, group.format), group)
    return list(worst.values())


def _histogram(found: GroupReport, part: _OwnPart) -> Histogram:
    """Of the worst expert of a group."""
    i = found.worst
    assert i is not None
    edges, counts = histogram_reference(*part.expert(i), format=found.format)
    return Histogram(found.key, found.experts[i], found.sqnr[i].item(), found.format, edges.cpu(), counts.cpu())


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(noise == 0, inf, 10 * (signal.double() / noise.double()).log10())


def _nan_first(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), -inf, values)


def _lowest(group: GroupReport) -> float:
    return _nan_first(group.sqnr).min().item() if group.experts else inf


_HEADER = (
    "group",
    "format",
    "experts",
    "SQNR dB",
    "median",
    "worst",
    "clipped",
    "zeroed",
    "underflow",
    "amax/median",
    "/min",
    "dead",
    "unseen",
)
_LEFT = (0, 1)


def _cells(group: GroupReport) -> tuple[str, ...]:
    """A line of the table; the spread of amax is that of the experts that are not dead."""
    n = len(group.experts)
    if not n:
        return (group.key, group.format.name, "0", *("-",) * (len(_HEADER) - 3))
    assert group.worst is not None
    alive = group.amax[group.amax > 0]
    spread = [alive.max() / alive.median(), alive.max() / alive.min()] if len(alive) else []
    return (
        group.key,
        group.format.name,
        str(n),
        _number(group.sqnr[group.worst].item()),
        _number(group.sqnr.median().item()),
        str(group.experts[group.worst]),
        _share(int(group.clipped.sum()), n * group.weights),
        _share(int(group.zeroed.sum()), n * group.weights),
        _share(int(group.underflow.sum()), n * group.granules),
        *(_number(ratio.item()) for ratio in spread),
        *("-",) * (2 - len(spread)),
        str(int((group.amax == 0).sum())),
        "-" if group.tokens is None else str(int((group.tokens == 0).sum())),
    )


def _number(value: float) -> str:
    return str(value) if isnan(value) or abs(value) == inf else f"{value:.2f}" if abs(value) < 1000 else f"{value:.2g}"


def _share(count: int, of: int) -> str:
    """A share in per cent, in which what is not zero does not look like it."""
    if count == 0:
        return "0 %"
    return f"{100 * count / of:.2f} %" if count / of >= 1e-4 else "<0.01 %"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
