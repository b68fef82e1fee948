"""`report`: what quantization does to each expert, measured in one pass over the weights: numbers, table and plot."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isnan, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fq_transforms.checks import check_state, is_concrete, local_group, weights_of
from fq_transforms.dtensor import is_sharded, layout_of
from fq_transforms.formats import Format
from fq_transforms.ops.private import is_functorch_active
from fq_transforms.ops.report.reference import Measures, histogram_reference, report_reference
from fq_transforms.report.plot import Histogram, Row, plot
from fq_transforms.spec import Group, Spec
from fq_transforms.state import GroupState, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GroupReport", "Report", "report"]


@dataclass(frozen=True, eq=False)
class GroupReport:
    """What was measured of one group: tensors on the CPU, one number an expert, [E].

    In the table: the lowest SQNR and its median, the number of the worst expert, shares of all weights (of all scales
    for underflow), the largest amax over the median and over the smallest of those above zero, dead experts, whose amax
    is zero, and unseen ones, which had no token.

    Attributes:
        key: The group.
        format: Its format.
        experts: Numbers of the experts, 0 to E - 1; of DTensors those that this rank holds parts of.
        weights: Weights in one expert, and
        granules: scales in one expert, of its part on this rank.
        signal: fp64, sum of w^2, w in fp32.
        noise: fp64, sum of (w - y)^2, y = `fakequant(..., out_dtype=torch.float32)`.
        clipped: int64, weights more than half a step beyond what their granule can hold.
        zeroed: int64, weights other than zero with y = 0.
        underflow: int64, granules whose scale is as small as the format has them, with an amax above zero.
        largest: fp32, max of abs(w).
        amax: fp32, the state's: the largest of an expert's granules. `largest` for MX formats, which have none.
        tokens: int64, tokens that each expert saw; None if nobody counted.
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

    @property
    def sqnr(self) -> Tensor:
        """Signal to quantization noise, fp64 [E] in dB: 10 log10(signal / noise); inf where nothing is lost."""
        return _decibels(self.signal, self.noise)

    @property
    def worst(self) -> int | None:
        """Place in [E] of the expert with the lowest SQNR, a NaN before all; None if there is none."""
        return int(_nan_first(self.sqnr).argmin()) if self.experts else None


@dataclass(frozen=True, eq=False)
class Report:
    """What quantization does to each expert. Prints as a table, worst group first; an HTML table in notebooks.

    Attributes:
        groups: Group key to `GroupReport`, in the order of the spec.
        histograms: Of the worst expert of each role, worst first.
    """

    groups: dict[str, GroupReport]
    histograms: tuple[Histogram, ...]

    def __str__(self) -> str:
        rows = [_HEADER, *map(_cells, self._worst_first())]
        columns = [i for i in range(len(_HEADER)) if i != _TOKENS or self._has_tokens()]
        widths = [max(len(row[i]) for row in rows) for i in columns]
        lines = [
            "  ".join(row[i].ljust(w) if i in _LEFT else row[i].rjust(w) for i, w in zip(columns, widths, strict=True))
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), *self._totals()])

    def _repr_html_(self) -> str:
        columns = [i for i in range(len(_HEADER)) if i != _TOKENS or self._has_tokens()]

        def line(row: Sequence[str], tag: str) -> str:
            side = {i: "left" if i in _LEFT else "right" for i in columns}
            cells = (f"<{tag} style='text-align:{side[i]}'>{escape(row[i])}</{tag}>" for i in columns)
            return f"<tr>{''.join(cells)}</tr>"

        rows = [line(_cells(group), "td") for group in self._worst_first()]
        totals = "<br>".join(escape(text) for text in self._totals())
        return f"<table><thead>{line(_HEADER, 'th')}</thead><tbody>{''.join(rows)}</tbody></table><p>{totals}</p>"

    def plot(self) -> "Figure":
        """A figure: for each role a heat map of SQNR, layers by experts, above the histogram of its worst expert.

        A role is a group key without its layer number. Histograms are of the weights over their scales, on a
        logarithmic axis, with the values that an element can take as ticks below, and shaded where weights are clipped.

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


def report(
    params: Mapping[str, Tensor], state: State, *, spec: Spec, tokens: Mapping[str, Tensor] | None = None
) -> Report:
    """`Transform.report`, with the spec of the Transform."""
    if not spec.groups:
        raise ValueError("spec: found no group, wanted at least one; select(params, rules) makes a spec")
    if is_functorch_active():
        raise ValueError("report: found a call under torch.func, wanted plain tensors, whose values it reads")
    check_state(state, spec, values=is_concrete)
    if tokens is None:
        entries = {group.key: state.get(f"{group.key}.input", {}) for group in spec.groups}
        tokens = {key: entry["tokens"].long() for key, entry in entries.items() if "tokens" in entry}
    counted = _checked_tokens(tokens, spec)
    found: list[tuple[Group, tuple[int, ...], Measures, Tensor]] = []
    local: dict[str, tuple[Sequence[Tensor], GroupState]] = {}
    with torch.no_grad():
        for group in spec.groups:
            detached = {name: leaf.detach() for name, leaf in state[group.key].items()}
            weights, scales, experts = _local(params, group, detached)
            local[group.key] = weights, scales
            measures = _measure(group, weights, scales, len(experts))
            found.append((group, experts, measures, _expert_amax(scales, measures)))
        groups: dict[str, GroupReport] = {}
        for group, experts, measures, amax in found:  # only now: what is on a GPU has been launched
            shape = _matrix(group, local[group.key][0]).shape[-2:]
            groups[group.key] = GroupReport(
                key=group.key,
                format=group.format,
                experts=experts,
                weights=prod(shape),
                granules=prod(group.format.granules(*shape)) if prod(shape) else 0,
                **{name: leaf.cpu() for name, leaf in measures._asdict().items()},
                amax=amax.cpu(),
                tokens=counted[group.key][list(experts)] if group.key in counted else None,
            )
        return Report(groups, tuple(_histograms(groups.values(), spec, local)))


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


def _local(
    params: Mapping[str, Tensor], group: Group, scales: GroupState
) -> tuple[Sequence[Tensor], GroupState, tuple[int, ...]]:
    """This rank's weights, scales and experts of a group; plain tensors are all its own."""
    weights: Sequence[Tensor] = weights_of(params, group)
    for name, weight in zip(group.names, weights, strict=True):
        if weight.is_meta:
            raise ValueError(f"parameter {name!r}: found a tensor on meta, wanted values to measure")
    for leaf in scales.values():
        if leaf.device != weights[0].device:
            raise ValueError(
                f"state {group.key!r}: found on {leaf.device}, wanted on {weights[0].device} as its weights; "
                "move it with optree.tree_map(lambda leaf: leaf.to(device), state)"
            )
    layout = layout_of(group, weights)
    if layout is not None or any(map(is_sharded, scales.values())):
        weights, scales = local_group(group, layout, weights, scales)
    if layout is None:
        return weights, scales, tuple(range(group.experts))
    return weights, scales, () if layout.is_empty else layout.experts


def _measure(group: Group, weights: Sequence[Tensor], scales: GroupState, experts: int) -> Measures:
    """What is measured of a group's experts, [E] each, where the weights are."""
    amax, global_amax = scales.get("amax"), scales.get("global_amax")
    if experts == 0:
        device = weights[0].device
        sums = torch.zeros(0, dtype=torch.float64, device=device)
        counts, largest = sums.long(), sums.float()
        return Measures(sums, sums, counts, counts, counts, largest)
    if weights[0].is_cuda:
        from fq_transforms.ops.launch import report_triton  # which needs Triton

        return report_triton(weights, amax, global_amax, format=group.format, transposed=group.transposed)
    each = [
        report_reference(_expert(group, weights, i), _at(amax, i), _at(global_amax, i), format=group.format)
        for i in range(experts)
    ]
    return Measures(*(torch.stack(column) for column in zip(*each, strict=True)))


def _histograms(
    groups: Iterable[GroupReport], spec: Spec, local: Mapping[str, tuple[Sequence[Tensor], GroupState]]
) -> list[Histogram]:
    """Of the worst expert of each role, worst first."""
    worst: dict[str, GroupReport] = {}
    for group in sorted(groups, key=_lowest):
        if group.experts:
            worst.setdefault(_role(group.key, group.format), group)
    of_spec = {group.key: group for group in spec.groups}
    histograms: list[Histogram] = []
    for found in worst.values():
        i = found.worst
        assert i is not None
        weights, scales = local[found.key]
        amax, global_amax = scales.get("amax"), scales.get("global_amax")
        edges, counts = histogram_reference(
            _expert(of_spec[found.key], weights, i), _at(amax, i), _at(global_amax, i), format=found.format
        )
        sqnr = found.sqnr[i].item()
        histograms.append(Histogram(found.key, found.experts[i], sqnr, found.format, edges.cpu(), counts.cpu()))
    return histograms


def _matrix(group: Group, weights: Sequence[Tensor]) -> Tensor:
    return weights[0].mT if group.transposed else weights[0]


def _expert(group: Group, weights: Sequence[Tensor], i: int) -> Tensor:
    """An expert's matrix, [out, in]."""
    weight = (weights[0][i] if group.stacked else weights[i]).detach()
    return weight.mT if group.transposed else weight


def _at(leaf: Tensor | None, i: int) -> Tensor | None:
    return None if leaf is None else leaf[i]


def _expert_amax(scales: GroupState, measures: Measures) -> Tensor:
    leaf = scales.get("global_amax", scales.get("amax"))
    if leaf is None:
        return measures.largest
    return leaf if leaf.dim() == 1 or not leaf.numel() else leaf.flatten(1).amax(1)


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
_LEFT, _TOKENS = (0, 1), 12


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
