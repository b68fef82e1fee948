"""The figure of a report: heat maps of SQNR, and histograms of the worst experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.report.reference import half_step_beyond

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Histogram", "Row", "element_values", "plot"]

# Roles beside each other, and the most cells of a heat map in which numbers can be read.
ACROSS, READABLE = 4, (16, 16)


@dataclass(frozen=True, eq=False)
class Histogram:
    """The weights of one expert over their scales, so that every granule has the values of the element.

    Attributes:
        key: The group.
        expert: The expert's number.
        sqnr: Its SQNR in dB.
        format: Its format.
        edges: fp64 [bins + 1].
        counts: int64 [bins]; the outer bins count what lies beyond them, too.
    """

    key: str
    expert: int
    sqnr: float
    format: Format
    edges: Tensor
    counts: Tensor


class Row(NamedTuple):
    """A row of a heat map: a layer's number or a group's key, the numbers of its experts, and their SQNR in dB, [E]."""

    label: str
    experts: tuple[int, ...]
    sqnr: Tensor


def plot(roles: Mapping[str, tuple[Sequence[Row], Histogram]]) -> "Figure":
    """A figure: for each role its layers by experts, above the histogram of its worst expert."""
    from matplotlib.figure import Figure  # only where a figure is wanted

    across = min(ACROSS, len(roles))
    down = -(-len(roles) // across)
    tallest = max(len(rows) for rows, _ in roles.values())
    height = min(7.0, 1.2 + 0.28 * tallest)
    figure = Figure(figsize=(1 + 4.8 * across, down * (height + 3)), layout="constrained")
    axes: Any = figure.subplots(2 * down, across, squeeze=False, height_ratios=[height, 3] * down)
    values = torch.cat([row.sqnr for rows, _ in roles.values() for row in rows])
    finite = values[values.isfinite()].tolist() or [0.0]
    image: Any = None
    for i, (role, (rows, histogram)) in enumerate(roles.items()):
        above, below = axes[2 * (i // across)][i % across], axes[2 * (i // across) + 1][i % across]
        image = _heat_map(above, role, rows, (min(finite), max(finite)))
        _histogram(below, histogram)
    for i in range(len(roles), across * down):
        axes[2 * (i // across)][i % across].set_axis_off()
        axes[2 * (i // across) + 1][i % across].set_axis_off()
    figure.colorbar(image, ax=axes[0, :].tolist(), label="SQNR, dB")
    return figure


def _heat_map(axes: Any, role: str, rows: Sequence[Row], limits: tuple[float, float]) -> Any:
    """Rows by experts, in colours of the same limits for all roles; grey where SQNR is infinite or NaN."""
    experts = sorted({expert for row in rows for expert in row.experts})
    grid = torch.full((len(rows), len(experts)), nan, dtype=torch.float64)
    for y, row in enumerate(rows):
        for expert, value in zip(row.experts, row.sqnr.tolist(), strict=True):
            grid[y, experts.index(expert)] = value if isfinite(value) else nan
    axes.set_facecolor("0.85")
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    if len(rows) <= READABLE[0] and len(experts) <= READABLE[1]:
        for y, line in enumerate(grid.tolist()):
            for x, value in enumerate(line):
                if isfinite(value):
                    color = "white" if image.norm(value) < 0.6 else "black"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=7)
    for axis, labels in ((axes.set_xticks, [*map(str, experts)]), (axes.set_yticks, [row.label for row in rows])):
        step = -(-len(labels) // 16)
        axis(range(0, len(labels), step), labels[::step])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(role, fontsize=9)
    return image


def _histogram(axes: Any, found: Histogram) -> None:
    """Counts on a logarithmic axis, the element's values as ticks below, and shades where weights are clipped."""
    edges, counts = found.edges.tolist(), found.counts.tolist()
    axes.stairs(counts, edges, fill=True, color="tab:blue", baseline=0.5)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 2 * max(2, *counts))
    axes.set_xlim(edges[0], edges[-1])
    axes.vlines(element_values(found.format), 0, 0.05, transform=axes.get_xaxis_transform(), color="black", lw=0.6)
    lowest, highest = half_step_beyond(found.format)
    axes.axvspan(edges[0], lowest, color="tab:red", alpha=0.15, lw=0)
    axes.axvspan(highest, edges[-1], color="tab:red", alpha=0.15, lw=0)
    axes.set_xlabel(f"weight / scale; ticks: the values of {found.format.name}; red: clipped", fontsize=8)
    axes.set_ylabel("weights")
    axes.set_title(f"worst: {found.key}, expert {found.expert}, {found.sqnr:.1f} dB", fontsize=8)


def element_values(format: Format) -> list[float]:
    """Every value that an element of the format can take, in order.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> element_values(FORMATS["NVFP4"])
        [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    element = format.element
    if isinstance(element, IntElement):
        return [float(value) for value in range(element.low, element.high + 1)]
    steps = 2**element.mantissa_bits
    subnormal = [mantissa / steps * 2.0**element.min_exponent for mantissa in range(steps)]
    normal = [
        (1 + mantissa / steps) * 2.0**exponent
        for exponent in range(element.min_exponent, element.min_exponent + 2**element.exponent_bits)
        for mantissa in range(steps)
    ]
    positive = [value for value in subnormal + normal if 0 < value <= element.max]
    return [*(-value for value in reversed(positive)), 0.0, *positive]
