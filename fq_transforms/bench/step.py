"""What fake quantization adds to training: whole optimizer steps, and its two halves alone.

A driver may set the constants below before it calls `rows`, and leave ways out of `WAYS`, but the first two.
"""

import copy
import gc
from collections.abc import Callable, Generator, Mapping
from functools import partial
from math import hypot
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fq_transforms as fqt
from fq_transforms.bench.cases import ALL, Shape, check_same, fits
from fq_transforms.bench.peers import modelopt_model
from fq_transforms.bench.timing import Queue, Turn, against_itself, device_us, in_turns, median_and_error, turn_us
from fq_transforms.bench.ways import GroupedMLP, Training, Way
from fq_transforms.formats import Format
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.state import State

__all__ = ["above", "cell", "lines", "page", "rows", "step_rows", "summary", "write_rows"]

Row = dict[str, Any]

EXPERTS, HIDDEN, FFN, TOKENS = 32, 2688, 1856, 512  # Nemotron-3-Nano at EP=4
SHAPES = [Shape(EXPERTS, FFN, HIDDEN, ""), Shape(EXPERTS, HIDDEN, FFN, "")]
FORMATS = [format for format in ALL if all(fits(format, shape) for shape in SHAPES)]
ROUNDS = {1: 40, 4: 40}  # by microbatches: of the lens, and of bf16 against itself
IN_A_ROW = {1: 8, 4: 2}  # steps that are timed at a time, by microbatches: a training loop does not wait for each
QUEUED_ROUNDS = {1: 20, 4: 10}  # of a step whose launches wait for the device, by microbatches
OTHER_ROUNDS = 5  # of the other ways, which are slower and have no limit
WRITE_ROUNDS, DEVICE_ROUNDS = 50, 5
WARM_UPS = 2
LIMIT = 0.005  # of the lens above bf16 against itself

AGAIN = "bf16 again"
WAYS = {
    AGAIN: "bf16 over the mean of its own times before and after: the noise",
    "lens": "`fq.take_grads`, AdamW, `fq.fakequant(masters, state, out=params)`",
    "value_and_grad": "of the masters: fake weights are put into the model, once a step",
    "layerwise": "fake weights of the bf16 parameters, a layer at a time, for each forward and each backward",
    "ModelOpt": "its quantizers of the bf16 parameters, one per expert, for each forward",
}


def rows(progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """The write and the gradients' way alone, then whole steps.

    Raises:
        SystemExit: Weights or gradients are not the reference's.
    """
    size = (EXPERTS * TOKENS, HIDDEN)
    xs = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(max(ROUNDS))]
    training = Training(GroupedMLP(EXPERTS, HIDDEN, FFN, TOKENS), xs)
    yield from write_rows(training)
    yield from step_rows(training, progress, peers=peers)


def write_rows(training: Training) -> Generator[Row, None, None]:
    """`fakequant(out=)` by format, beside the plain cast and one `copy_` of the same bytes; then `take_grads`."""
    turns: dict[str, Turn] = {}
    scales: dict[str, int] = {}
    for format in FORMATS:
        fq, state = _transform(training, format)
        scales[format.name] = sum(leaf.nbytes for leaves in state.values() for leaf in leaves.values())
        turns[format.name] = Turn(training.lens(fq, state).write)
        turns[format.name].call()
        for name, wanted in _reference(fq, training.masters, state).items():
            check_same(training.params[name].detach(), wanted, f"{name}, written, {format.name}")
    wall, plain = in_turns(Turn(training.bf16().write), turns, WRITE_ROUNDS)
    source = torch.cat([master.detach().flatten() for master in training.masters.values()])
    target = source.bfloat16()
    floor = Turn(lambda: target.copy_(source))
    device, copies = in_turns(floor, turns, DEVICE_ROUNDS, lambda turn: device_us(turn.call))
    for name in turns:
        row = Row(kind="fakequant(out=)", format=name, plain_us=median(plain), wall=summary(wall[name]))
        share = 1 + scales[name] / (source.nbytes + target.nbytes)  # copy_ moves no scales
        yield row | Row(copy_us=median(copies), device=summary([share / ratio for ratio in device[name]]))

    fq, state = _transform(training, fqt.NVFP4)  # what follows an optimizer that writes bf16 parameters itself
    training.bf16().write()
    again = Turn(lambda: fq.fakequant(training.params, state, out=training.params, inplace=True))
    wall, plain = in_turns(Turn(training.bf16().write), {"ours": again}, WRITE_ROUNDS)
    yield Row(kind="fakequant(inplace=True)", format="NVFP4", plain_us=median(plain), wall=summary(wall["ours"]))

    weights = list(training.params.values())
    grads = [torch.randn_like(weight) for weight in weights]

    def give() -> None:
        training.optimizer.zero_grad()
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad

    fq, state = _transform(training, FORMATS[0])
    ours = Turn(lambda: fq.take_grads(training.params, training.masters, state), give)
    wall, plain = in_turns(Turn(lambda: training.take(weights), give), {"ours": ours}, WRITE_ROUNDS)
    training.optimizer.zero_grad()
    yield Row(kind="take_grads", format="pass-through", plain_us=median(plain), wall=summary(wall["ours"]))


def step_rows(training: Training, progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """Whole steps: a row per number of microbatches and format. Each way but ModelOpt's is checked before."""
    bf16 = training.bf16()
    training.check(bf16, _rounded(training), "bf16")
    base = _turn(training, bf16)
    _peak(base)  # makes the optimizer's state
    floor = _peak(base)
    often, seldom, mib, reasons = dict[str, Turn](), dict[str, Turn](), {AGAIN: 0.0}, dict[str, str]()
    for format in progress(FORMATS, desc="checks"):
        fq, state = _transform(training, format)
        of_masters, of_params = (_reference(fq, w, state) for w in (training.masters, _rounded(training)))
        makers = {
            "lens": (training.lens, of_masters),
            "value_and_grad": (training.value_and_grad, of_masters),
            "layerwise": (training.layerwise, of_params),
        }
        ways = {name: (make(fq, state), weights) for name, (make, weights) in makers.items() if name in WAYS}
        try:
            if peers and (peer := _peer(training, format)) is not None:
                ways["ModelOpt"] = (peer, {})
        except Exception as error:  # whatever a peer raises is a gap in the table, with its reason
            reasons[format.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        gc.collect()  # of what a peer leaves in cycles, which must not be freed while memory is measured
        for name, (way, weights) in ways.items():
            key, turn = f"{name}, {format.name}", _turn(training, way)
            mib[key] = (_peak(turn) - floor) / 2**20
            if weights:
                training.check(way, weights, key)
            (often if name == "lens" else seldom)[key] = turn
    every = training.xs
    for number, rounds in progress(ROUNDS.items(), desc="steps"):
        training.xs, training.in_a_row = every[:number], IN_A_ROW.get(number, 1)
        ratios, times = in_turns(base, often, rounds)
        ratios |= {AGAIN: against_itself(times, rounds)} | in_turns(base, seldom, OTHER_ROUNDS)[0]
        training.in_a_row = 1
        in_queue = QUEUED_ROUNDS.get(number, 0)
        queued, device_times = in_turns(base, often, in_queue, partial(_queued_us, training))
        found = {key: summary(values) | {"mib": mib[key]} for key, values in ratios.items()}
        for name in (format.name for format in FORMATS):
            taken = {AGAIN: found[AGAIN]} | {way: found[key] for way in WAYS if (key := f"{way}, {name}") in found}
            row = Row(
                kind="step",
                microbatches=number,
                format=name,
                bf16_ms=median(times) / IN_A_ROW.get(number, 1) / 1e3,
                ways=taken,
            )
            row |= Row(above=above(taken["lens"], taken[AGAIN]), reason=reasons.get(name))
            if device_times:
                lens, again = summary(queued[f"lens, {name}"]), summary(against_itself(device_times, in_queue))
                row |= Row(device_ms=median(device_times) / 1e3, device=lens, device_again=again)
                row |= Row(device_above=above(lens, again))
            yield row
    training.xs = every


def _transform(training: Training, format: Format) -> tuple[fqt.Transform, State]:
    fq = fqt.transform(fqt.select(training.params, {"*": format}))
    return fq, fq.calibrate(training.masters)


def _turn(training: Training, way: Way) -> Turn:
    return Turn(partial(training.step, way), way.write)


def _queued_us(training: Training, turn: Turn) -> float:
    turn.before()
    with Queue() as queue:
        training.between = queue.cut
        turn.call()
    training.between = lambda: None
    return queue.us


def _rounded(training: Training) -> dict[str, Tensor]:
    """What the masters are in bf16."""
    return {name: master.detach().bfloat16() for name, master in training.masters.items()}


def _reference(fq: fqt.Transform, weights: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """The fake weights in bf16, one at a time, by the definition."""
    found: dict[str, Tensor] = {}
    for group in fq.spec.groups:
        for number, name in enumerate(group.names):
            amax, global_amax = (
                state[group.key][leaf][number] if leaf in state[group.key] else None for leaf in ("amax", "global_amax")
            )
            found[name] = fake_quantize_reference(
                weights[name].detach(), amax, global_amax, format=group.format, out_dtype=torch.bfloat16
            )
    return found


def _peer(training: Training, format: Format) -> Way | None:
    training.bf16().write()  # it calibrates what it finds
    peer = modelopt_model(copy.deepcopy(training.model), format, lambda model: model(training.xs[0]), "*")
    return None if peer is None else training.bf16(peer)


def _peak(turn: Turn) -> int:
    """The most memory that one has at a time, in bytes, above what there was before the first; not to be run before."""
    held = torch.cuda.memory_allocated()
    for _ in range(WARM_UPS):
        turn_us(turn)
    torch.cuda.reset_peak_memory_stats()
    turn_us(turn)
    return torch.cuda.max_memory_allocated() - held


def above(lens: Mapping[str, float], again: Mapping[str, float]) -> dict[str, float]:
    """How far one ratio is above another, with the error of the difference."""
    return {"ratio": lens["ratio"] - again["ratio"], "error": hypot(lens["error"], again["error"])}


def summary(ratios: list[float]) -> dict[str, Any]:
    """Ratios, their median, and its standard error."""
    value, error = median_and_error(ratios)
    return {"ratio": value, "error": error, "ratios": ratios}


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    steps = [row for row in rows if row["kind"] == "step"]
    table = [["microbatches", "format", "bf16 ms", *WAYS, f"lens above {AGAIN}", *(f"{way}, MiB" for way in WAYS)]]
    queued = [["microbatches", "format", "bf16 ms", AGAIN, "lens", f"lens above {AGAIN}"]]
    for row in steps:
        ways = [row["ways"].get(way) for way in WAYS]
        line = [str(row["microbatches"]), row["format"], f"{row['bf16_ms']:.2f}", *map(cell, ways)]
        table.append([*line, cell(row["above"]), *("" if way is None else f"{way['mib']:.0f}" for way in ways)])
        if "device" in row:
            line = [*line[:2], f"{row['device_ms']:.2f}"]
            queued.append([*line, *(cell(row[key]) for key in ("device_again", "device", "device_above"))])
    writes = [["call", "format", "plain us", "ours over it, whole calls", "copy_ us", "copy_ over ours, device"]]
    for row in (row for row in rows if row["kind"] != "step"):
        copied = f"{row['copy_us']:.0f}" if "copy_us" in row else ""
        line = [row["kind"], row["format"], f"{row['plain_us']:.0f}", cell(row["wall"])]
        writes.append([*line, copied, cell(row.get("device"))])
    reasons = sorted({f"{row['format']}: {row['reason']}" for row in steps if row["reason"]})
    return "\n".join(
        [
            f"# Optimizer steps, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench step`: {facts}.",
            "",
            f"Two GroupedLinears, {' and '.join(map(str, SHAPES))}, {TOKENS} tokens per expert: forward and backward "
            "of each microbatch, gradients to the fp32 masters, AdamW (fused) on them, and the write of the next "
            "step's weights; bf16 casts both ways by `torch._foreach_copy_`. Of one microbatch eight steps are timed "
            "in a row, of four two. Ratios are over the mean of bf16 just "
            "before and after: the median of all rounds, which the JSON has, with its standard error. The gradients "
            "equalled those of the reference's weights bit for bit before. MiB: the peak of memory above that of bf16 "
            "with masters, with what is kept between steps.",
            "",
            *(f"- {name}: {what}." for name, what in WAYS.items()),
            "",
            *lines(table),
            "",
            *_verdict(steps, "above"),
            "The device's time of a step, a microbatch at a time, of which all launches were there when it began, as "
            "where the host is ahead.",
            "",
            *lines(queued),
            "",
            *_verdict(steps, "device_above"),
            "The write and the gradients' way alone. Whole calls are waited for, in turns with "
            "`torch._foreach_copy_` of the same weights; the device's time is of graph replays, beside one `copy_` of "
            "as many weights from fp32 to bf16, at whose speed the scales are counted too. What was written equalled "
            "the reference bit for bit before.",
            "",
            *lines(writes),
            "",
            *reasons,
        ]
    )


def _verdict(steps: list[Row], what: str) -> list[str]:
    worst = max((row for row in steps if what in row), key=lambda row: row[what]["ratio"], default=None)
    if worst is None:
        return []
    where = f"{worst['format']}, microbatches: {worst['microbatches']}"
    return [f"The lens is at most {cell(worst[what])} above {AGAIN} ({where}); the limit is {LIMIT}.", ""]


def lines(table: list[list[str]]) -> list[str]:
    """A table in Markdown, of which the first row is the header."""
    header, *body = table
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]


def cell(value: Mapping[str, float] | None) -> str:
    """A ratio and its error, or nothing."""
    return "" if value is None else f"{value['ratio']:.4f} ± {value['error']:.4f}"
