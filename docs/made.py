"""What pages have from the package's own data: tables of formats, and figures from the benchmark's JSON, with pictures.

A table stands in its page between `<!-- made: name -->` and `<!-- end -->`. `python docs/made.py` writes all anew;
tests/test_docs.py compares them with what lies here.
"""

import json
import re
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Any

import optree
import torch

import fq_transforms as fqt
from fq_transforms.export.layouts.plan import format_key
from fq_transforms.export.readers import READERS
from fq_transforms.formats import FORMATS, Format, IntElement
from fq_transforms.report.plot import element_values

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "fq_transforms" / "bench" / "results"
OUT, IN = 1856, 2688  # Nemotron-3-Nano fc1: bits per weight are of this matrix
SCALES = {"fp32": "fp32", "e4m3": "E4M3 under one fp32 per expert", "e8m0": "E8M0"}
READER_NAMES = {"vllm": "vLLM", "transformers": "transformers"}
# Whose convention a constant is, by what its name has more than the first of its kind, and of the first by its scale.
WHOSE = {
    "COMPRESSED_TENSORS": "compressed-tensors",
    "TORCHAO": "torchao",
    "TORCHAO_EVEN": "torchao, its EVEN mode",
    "MODELOPT": "ModelOpt's fake quantization kernel",
    "MODELOPT_FILES": "readers of ModelOpt's files",
    "KIMI": "Kimi-K2, slime",
    "OCP": "the OCP specification",
    "TRANSFORMER_ENGINE": "Transformer Engine",
}
WHOSE_FIRST = {"fp32": "ModelOpt", "e4m3": "what deployment stores", "e8m0": "ModelOpt"}
WHOSE_FIRST |= {"MXINT8": "as the other MX formats"}
FULL_SIZE = ["select", "calibrate", "fakequant again", "report again", "checkpoint: save", "checkpoint: load"]
# Lines and text in colours that are read on white and on black.
INK, LINE, MARK = "#7a8290", "#9aa2ae", "#0d9488"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Formats.


def core() -> list[Format]:
    """The formats that are no convention of another, in their order."""
    endings = tuple(f"_{ending}" for ending in WHOSE)
    return [format for name, format in FORMATS.items() if not name.endswith(endings)]


def shared_by(format: Format) -> str:
    """What has one scale."""
    rows, columns = format.block
    if format.block in ((None, None), (1, None)):
        return "one expert" if rows is None else "a row of `out`"
    return f"{columns} along `in`" if rows == 1 else f"{rows} x {columns}"


def leaves(format: Format) -> str:
    """The state of E experts."""
    if format.is_stateless:
        return "none"
    rows, columns = format.block
    shape = "[E]"
    if format.amax_shape(OUT, IN):
        along_in = f"in / {columns}" if columns else "1"
        shape = f"[E, out, {along_in}]" if rows == 1 else f"[E, out / {rows}, {along_in}]"
    return f"`amax` {shape}" + (", `global_amax` [E]" if format.has_global_amax else "")


def bits(format: Format) -> str:
    """Stored bits over weights, of one expert."""
    params = {"experts.0.w": torch.empty(OUT, IN, device="meta", dtype=torch.bfloat16)}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    stored = sum(8 * leaf.nbytes for leaf in optree.tree_leaves(fq.pack(params, fq.init(params))))
    return f"{stored / (OUT * IN):.4g}"


def read_by(format: Format) -> str:
    """Engines, and the layouts that each of them reads, for experts."""
    layouts: dict[str, list[str]] = {}
    for layout, engines in READERS.items():
        for engine in engines.values():
            if engine.loads and (format_key(format), None) in engine.loads.get("experts", {}):
                layouts.setdefault(f"{READER_NAMES[engine.name]} {engine.version}", []).append(layout)
    return "; ".join(f"{name} ({', '.join(names)})" for name, names in layouts.items()) or "plain files only"


def at_a_glance() -> str:
    """Every public format."""
    return table(
        ["constant", "scale shared by", "scale", "state", "bits per weight", "read by"],
        [[f"`{f.name}`", shared_by(f), SCALES[f.scale], leaves(f), bits(f), read_by(f)] for f in core()],
    )


def conventions() -> str:
    """Every constant beside the first of its kind; in bold what differs."""
    rows = []
    for base in core():
        same = [f for f in FORMATS.values() if f.name == base.name or f.name.startswith(f"{base.name}_")]
        same = [f for f in same if f.block == base.block and f.dynamic == base.dynamic and f.scale == base.scale]
        if len(same) == 1:
            continue
        for format in sorted(same, key=lambda f: f.name != base.name):
            pairs = zip(numbers(format), numbers(base), strict=True)
            whose = WHOSE_FIRST.get(base.name, WHOSE_FIRST[base.scale])
            if format != base:
                whose = WHOSE[format.name.removeprefix(f"{base.name}_")]
            rows.append([f"`{format.name}`", *(f"**{a}**" if a != b else a for a, b in pairs), whose])
    return table(["constant", "codes", "qmax", "order", "smallest scale", "exponent", "whose"], rows)


def numbers(format: Format) -> list[str]:
    """What libraries differ in."""
    element = format.element
    is_int, is_two_level = isinstance(element, IntElement), format.scale == "e4m3"
    floor = f"2^{int(torch.tensor(format.min_scale).log2())}" if format.min_scale else "0"
    below = f", 1 below {format.unit_scale_below:g}" if format.unit_scale_below else ""
    return [
        f"{element.low}..{element.high}" if is_int else "",
        f"{element.qmax:g}" if is_int else "",
        format.dequantize if is_int or is_two_level else "",
        floor + below if is_two_level else "",
        format.exponent_rounding if format.scale == "e8m0" else "",
    ]


# Pictures.


def svg(width: int, height: int, parts: Iterable[str], what: str) -> str:
    """A picture with its description."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
    look = f'font-family="sans-serif" font-size="12" fill="{INK}"'
    return f"{head} {look}>\n<title>{what}</title>\n" + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """A label."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def picture_name(format: Format) -> str:
    """Of the file; formats of one element share it."""
    element = format.element
    if isinstance(element, IntElement):
        return f"int{(element.high - element.low).bit_length()}"
    return f"e{element.exponent_bits}m{element.mantissa_bits}"


def element_name(format: Format) -> str:
    """What stands on the picture."""
    element = format.element
    if isinstance(element, IntElement) or element.exponent_bits:
        return picture_name(format).upper()
    return f"INT{element.mantissa_bits + 1} / {2 ** (element.mantissa_bits - 1)}"


def grid(format: Format) -> str:
    """Every value of an element on a line, the largest at the ends."""
    values = element_values(format)
    largest, width = max(map(abs, values)), 560
    few = len(values) <= 16

    def place(value: float) -> float:
        return round(width / 2 + value / largest * (width / 2 - 24), 2)

    ticks = "".join(f"M{place(v):g} 22V46" for v in values)
    parts = [
        text(8, 12, element_name(format), "start"),
        f'<path d="M8 46H{width - 8}" stroke="{LINE}"/>',
        f'<path d="{ticks}" stroke="{MARK}" stroke-width="{2 if few else 0.8}"/>',
        *(text(place(v), 64, f"{v:.4g}") for v in (values if few else [values[0], 0.0, values[-1]])),
    ]
    return svg(width, 72, parts, f"{len(values)} values, {values[0]:g} to {values[-1]:g}")


def bars(rows: list[tuple[str, float, float]], low: float, high: float, axis: str, what: str) -> str:
    """Ranges, one per row, beside a line at 1."""
    left, right, step = 150, 450, 24
    bottom = step * len(rows) + 16

    def place(value: float) -> float:
        return round(left + (value - low) / (high - low) * (right - left), 1)

    one = place(1.0)
    parts = [f'<path d="M{one:g} 8V{bottom}" stroke="{LINE}" stroke-dasharray="4 4"/>']
    parts += [text(place(tick), bottom + 18, f"{tick:.2f}") for tick in (low, 1.0, high)]
    for i, (label, least, most) in enumerate(rows):
        y = 24 + step * i
        across = max(3.0, place(most) - place(least))
        found = f"{least:.3f}" if least == most else f"{least:.2f} to {most:.2f}"
        parts += [
            text(left - 12, y + 4, label, "end"),
            f'<rect x="{place(least):g}" y="{y - 6}" width="{across:g}" height="12" rx="3" fill="{MARK}"/>',
            text(right + 16, y + 4, found, "start"),
        ]
    parts.append(text(place(1.0), bottom + 38, axis))
    return svg(560, bottom + 48, parts, what)


# Figures.


def newest(kind: str) -> tuple[str, Any]:
    """The last results of a kind, whose names begin with their date, and where they come from in a sentence."""
    path = sorted(RESULTS.glob(f"????-??-??{kind}.json"))[-1]
    found = json.loads(path.read_text())
    known = ", ".join(f"{key} {found['environment'][key]}" for key in ("gpu", "torch", "triton", "commit"))
    page = f"../fq_transforms/bench/results/{path.stem}.md"
    return f"Source: [{found['environment']['date']}]({page}), {known}.\n\n", found


def ranges(rows: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, tuple[float, float]]:
    """Format to the least and the most of a value."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        least, most = found.get(row["format"], (inf, -inf))
        found[row["format"]] = (min(least, value(row)), max(most, value(row)))
    return found


def kernels() -> tuple[str, str]:
    """Kernels beside `copy_`: a table and a picture."""
    where, found = newest("")
    kinds = list(dict.fromkeys(row["kind"] for row in found["rows"]))
    of_kind = {kind: ranges((r for r in found["rows"] if r["kind"] == kind), lambda r: r["own"]) for kind in kinds}
    forward = of_kind["forward, bf16"]
    rows = [
        [f"`{name}`", *("{:.2f} to {:.2f}".format(*of_kind[k][name]) if name in of_kind[k] else "" for k in kinds)]
        for name in forward
    ]
    what = "Speed of fakequant over copy_, by format"
    picture = bars([(name, *forward[name]) for name in forward], 0.9, 1.05, "speed over copy_: larger is faster", what)
    return where + table(["format", *kinds], rows), picture


def steps() -> tuple[str, str, str]:
    """Optimizer steps over bf16's: a table, a picture, and other ways."""
    where, found = newest("-lens")
    of = {n: [r for r in found["rows"] if r["kind"] == "step" and r["microbatches"] == n] for n in (1, 4)}
    rows = [
        [f"`{one['format']}`"] + [f"{r[what]['ratio']:.3f}" for r in (one, four) for what in ("device", "whole")]
        for one, four in zip(*([r | {"whole": r["ways"]["lens"]} for r in of[n]] for n in of), strict=True)
    ]
    head = ["format", "1 microbatch: GPU", "1: whole step", "4 microbatches: GPU", "4: whole step"]
    device = [(r["format"], r["device"]["ratio"], r["device"]["ratio"]) for r in of[1]]
    peers = [r for r in found["ModelOpt"]["modelopt"]["rows"] if r["microbatches"] == 1]
    measured = {"lens": of[1], "value_and_grad": of[1], "layerwise": of[1], "ModelOpt": peers}
    taken = {way: span(r["ways"][way]["ratio"] for r in rows) for way, rows in measured.items()}
    called = {"ModelOpt": "ModelOpt 0.47, a quantizer per expert, at each forward"}
    ways = [[called.get(way, f"`{way}`"), "{:.2f} to {:.2f}".format(*taken[way])] for way in taken]
    what = "Time of an optimizer step over bf16's, one microbatch, by format"
    picture = bars(device, 0.9, 1.05, "GPU time of a step over bf16's: smaller is faster", what)
    return where + table(head, rows), picture, table(["way, one microbatch", "whole steps over bf16's"], ways)


def span(values: Iterable[float]) -> tuple[float, float]:
    """The least and the most."""
    values = list(values)
    return min(values), max(values)


def full_size() -> str:
    """A whole model's experts, in seconds."""
    where, found = newest("-full-size")
    whole = [row for row in found["rows"] if "select" in row]
    return where + table(
        ["format", *FULL_SIZE], [[f"`{r['format']}`", *(f"{r[name]:.3f}" for name in FULL_SIZE)] for r in whole]
    )


def sweep() -> str:
    """The sweep of `Mse` over its floor."""
    where, found = newest("-mse")
    rows = [[f"`{r['format']}`", r["shape"], str(r["tried"]), f"{r['ratio']:.2f}"] for r in found["rows"]]
    return where + table(["format", "shape", "scales tried", "time over floor"], rows)


def gptq() -> str:
    """GPTQ of a layer's experts beside its products and ModelOpt's loop."""
    where, found = newest("-gptq")
    rows = [
        [
            f"`{r['format']}`",
            f"{r['hessian_ms'] + r['gptq_ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['modelopt_ms']:.0f}",
            f"{r['fused_ms']:.0f}" if "fused_ms" in r else "",
        ]
        for r in found["rows"]
    ]
    header = ["format", "Hessians and GPTQ, ms", "over its products", "ModelOpt's loop, ms", "with its kernel, ms"]
    return where + table(header, rows)


def made() -> dict[str, str]:
    """Paths under docs/ to what they hold."""
    kernel_table, kernel_picture = kernels()
    step_table, step_picture, ways = steps()
    tables = {"at-a-glance": at_a_glance(), "conventions": conventions()}
    tables |= {"kernels": kernel_table, "steps": step_table, "ways": ways}
    tables |= {"full-size": full_size(), "sweep": sweep(), "gptq": gptq()}
    pictures = {f"pictures/{picture_name(format)}.svg": grid(format) for format in reversed(core())}
    pictures |= {"pictures/forward.svg": kernel_picture, "pictures/step.svg": step_picture}

    def filled(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->"

    marks = re.compile(r"<!-- made: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
    pages = {name: marks.sub(filled, (DOCS / name).read_text()) for name in ("formats.md", "performance.md")}
    return pages | pictures


if __name__ == "__main__":
    for name, content in made().items():
        (DOCS / name).write_text(content)
