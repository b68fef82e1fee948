"""The figure of a report: heat maps of SQNR, and histograms of the worst experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, isfinite, log2, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.report.reference import half_step_beyond

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Histogram", "Row", "element_values", "plot"]

# Roles beside each other, and the most cells of a heat map in which numbers can be read.
ACROSS, READABLE = 3, (16, 16)
# The least that colours span, in dB: one bit. Over less, noise would look like a pattern.
LEAST_SPAN = 6.0
# The most labels along an axis, and the most values of an element that are told apart as ticks.
MOST_LABELS, MOST_VALUES = 9, 64
BLUE, RED, GREY = "tab:blue", "tab:red", "0.85"


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
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    across = 2 if len(roles) == 4 else min(ACROSS, len(roles))
    down = -(-len(roles) // across)
    tallest = max(len(rows) for rows, _ in roles.values())
    height = min(7.0, 1.2 + 0.28 * tallest)
    figure = _figure(figsize=(5.6 if across == 1 else 3.8 * across, 0.6 + down * (height + 3)), layout="constrained")
    axes: Any = figure.subplots(2 * down, across, squeeze=False, height_ratios=[height, 3] * down)
    values = torch.cat([row.sqnr for rows, _ in roles.values() for row in rows])
    finite = values[values.isfinite()].tolist() or [0.0]
    middle, half = (min(finite) + max(finite)) / 2, max(max(finite) - min(finite), LEAST_SPAN) / 2
    image: Any = None
    for i, (role, (rows, histogram)) in enumerate(roles.items()):
        above, below = axes[2 * (i // across)][i % across], axes[2 * (i // across) + 1][i % across]
        image = _heat_map(above, role, rows, (middle - half, middle + half))
        _histogram(below, histogram)
    for i in range(len(roles), across * down):
        axes[2 * (i // across)][i % across].set_axis_off()
        axes[2 * (i // across) + 1][i % across].set_axis_off()
    figure.colorbar(image, ax=axes[0, :].tolist(), label="SQNR, dB", location="top", shrink=0.5, aspect=40, pad=0.2)
    legend: list[Any] = [
        Patch(color=BLUE, label="weights of the worst expert"),
        Patch(color=RED, alpha=0.4, label="clipped: over half a step beyond the largest value"),
    ]
    if any(len(element_values(histogram.format)) <= MOST_VALUES for _, histogram in roles.values()):
        tick = Line2D([], [], color="black", marker="|", markersize=10, linestyle="")
        tick.set_label("values that an element can take")
        legend.append(tick)
    if len(finite) < len(values):
        legend.append(Patch(color=GREY, label="SQNR infinite (nothing is lost) or NaN"))
    figure.legend(handles=legend, loc="outside lower center", ncols=1 if across == 1 else 2, frameon=False)
    return figure


def _figure(**options: Any) -> "Figure":
    """A figure that a notebook shows even if nothing there has loaded pyplot; it is pickled as an ordinary one."""
    import matplotlib.figure  # only where a figure is wanted

    class Figure(matplotlib.figure.Figure):
        def _repr_png_(self) -> bytes:
            png = BytesIO()
            self.savefig(png, format="png", dpi=100)
            return png.getvalue()

        def __reduce__(self) -> Any:
            return matplotlib.figure.Figure, (), self.__getstate__()

    return Figure(**options)


def _heat_map(axes: Any, role: str, rows: Sequence[Row], limits: tuple[float, float]) -> Any:
    """Rows by experts, in colours of the same limits for all roles; grey where SQNR is infinite or NaN."""
    experts = sorted({expert for row in rows for expert in row.experts})
    grid = torch.full((len(rows), len(experts)), nan, dtype=torch.float64)
    for y, row in enumerate(rows):
        for expert, value in zip(row.experts, row.sqnr.tolist(), strict=True):
            grid[y, experts.index(expert)] = value if isfinite(value) else nan
    axes.set_facecolor(GREY)
    image = axes.imshow(
        grid.numpy(), aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest"
    )
    if len(rows) <= READABLE[0] and len(experts) <= READABLE[1]:
        for y, line in enumerate(grid.tolist()):
            for x, value in enumerate(line):
                if isfinite(value):
                    color = "white" if image.norm(value) < 0.6 else "black"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
    for axis, labels in ((axes.set_xticks, [*map(str, experts)]), (axes.set_yticks, [row.label for row in rows])):
        step = 1 if len(labels) <= READABLE[0] else 2 ** ceil(log2(len(labels) / MOST_LABELS))
        axis(range(0, len(labels), step), labels[::step])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(role.replace(", ", "\n"), fontsize=9)
    return image


def _histogram(axes: Any, found: Histogram) -> None:
    """Counts on a logarithmic axis, the element's values as ticks above, and red where weights are clipped."""
    edges, counts, values = found.edges.tolist(), found.counts.tolist(), element_values(found.format)
    lowest, highest = half_step_beyond(found.format)
    axes.stairs(counts, edges, fill=True, color=BLUE, baseline=0.5)
    for low, high in ((edges[0], lowest), (highest, edges[-1])):
        axes.axvspan(low, high, color=RED, alpha=0.15, lw=0)
        beyond = [n if low <= (a + b) / 2 <= high else 0 for a, b, n in zip(edges, edges[1:], counts, strict=False)]
        axes.stairs(beyond, edges, fill=True, color=RED, baseline=0.5)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 4 * max(2, *counts))
    axes.set_xlim(edges[0], edges[-1])
    if len(values) <= MOST_VALUES:
        axes.vlines(values, 0.94, 1, transform=axes.get_xaxis_transform(), color="black", lw=0.8)
    else:  # a line each would be a bar
        about = f"{len(values)} values, {values[0]:g} to {values[-1]:g}"
        axes.text(0.5, 0.97, about, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    axes.set_xlabel(f"weight / scale in {found.format.name}")
    axes.set_ylabel("weights")
    axes.set_title(f"worst: expert {found.expert}, {found.sqnr:.1f} dB\n{found.key}", fontsize=9)


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
