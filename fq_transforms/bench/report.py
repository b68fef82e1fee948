"""Rows to a table for a terminal, a JSON file, a plot, and a page of results."""

import json
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

PEERS = {"torch_us": "torch, stacked", "compile_us": "torch.compile", "modelopt_us": "ModelOpt loop"}
HOST = {"host_us": "host us", "unbind_us": "unbind us", "separate_us": "separate us", "call_us": "call us"}
PASSES = 3  # over all shapes, for the device's times, and again for the host's
WHOLE_CALLS = HOST | {"beside_us": "beside us"} | PEERS


def table(rows: list[Row], *, markdown: bool = False) -> str:
    """One line per measurement. The ratio is floor over ours, for amax ours over the floor."""
    header = ["kind", "shape", "format", "us", "floor us", "ratio", "own", *WHOLE_CALLS.values(), "gain"]
    lines = [header] + [
        [
            row["kind"],
            row["shape"],
            row["format"],
            f"{row['us']:.1f}",
            f"{row['floor_us']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['own']:.3f}",
            *("" if row.get(key) is None else f"{row[key]:.0f}" for key in WHOLE_CALLS),
            _gain(row),
        ]
        for row in rows
    ]
    if markdown:
        lines.insert(1, ["---"] * len(header))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _gain(row: Row) -> str:
    """The best peer's whole call over ours."""
    peers = [row[key] for key in PEERS if row.get(key) is not None]
    return f"{min(peers) / row['beside_us']:.2f}" if peers else ""


def _host_summary(rows: list[Row]) -> str:
    """Host time by the number of experts: the median of all formats and shapes."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if "host_us" in row:
            found.setdefault(int(row["shape"].split()[0]), []).append(row)
    parts = [
        f"{experts} experts {median(r['host_us'] for r in some):.0f} us "
        f"(unbind {median(r['unbind_us'] for r in some):.0f} us, {len(some)} rows)"
        for experts, some in sorted(found.items())
    ]
    return f"Host, median: {', '.join(parts)}." if parts else ""


def write(folder: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """`{date}.json`, `{date}.png` and `{date}.md` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / environment["date"]
    stem.with_suffix(".json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    plot(stem.with_suffix(".png"), environment, rows)
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    page = [
        f"# Benchmark, {environment['date']}",
        "",
        f"`python -m fq_transforms.bench`: {facts}. Each row equalled the reference bit for bit before it was timed.",
        "",
        f"Device time is the median of graph replays, in microseconds, and of {PASSES} passes over all shapes; so is "
        "the floor. The floor is `copy_` of the weights; for clip backward `torch.add`, three streams; for pack "
        "`copy_`'s bandwidth for all bytes read and written. Ratio: floor over ours, for amax ours over `copy_`. Own: "
        "the same bandwidth for all bytes that ours has to move, the amax leaf too, over ours. Host: one whole "
        "`fakequant` call in a row of calls that nobody waits for; unbind: what making as many views costs by itself; "
        f"separate: the host's time with one allocation per weight; each the median of {PASSES} passes, on the core "
        "that is the fastest at the moment, as is what follows. Call: one call, waited for; beside: the same, in turns "
        "with the peers. Gain: the best peer's call over ours beside it.",
        "",
        _host_summary(rows),
        "",
        f"![device time against the floor]({environment['date']}.png)",
        "",
        table(rows, markdown=True),
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(page))


def plot(path: Path, environment: dict[str, str], rows: list[Row]) -> None:
    """Forward ratio to the floor, formats by shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forward = [row for row in rows if row["kind"] == "forward, bf16"]
    formats = list(dict.fromkeys(row["format"] for row in forward))
    shapes = list(dict.fromkeys(row["shape"] for row in forward))
    ratio = {(row["format"], row["shape"]): row["ratio"] for row in forward}
    grid = [[ratio.get((format, shape), float("nan")) for shape in shapes] for format in formats]
    figure, axes = plt.subplots(figsize=(2.5 + 1.2 * len(shapes), 1.5 + 0.42 * len(formats)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0.7, vmax=1.0)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(shapes)), shapes, rotation=25, ha="right")
    axes.set_yticks(range(len(formats)), formats)
    axes.set_title(f"copy_ over fakequant, bf16, {environment['gpu']}, {environment['date']}")
    figure.colorbar(image, label="1 is the speed of memory")
    figure.savefig(path, dpi=120)
