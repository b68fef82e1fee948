"""What fake quantization costs in training: whole optimizer steps of two grouped layers of Transformer Engine.

AdamW steps fp32 masters; forward and backward are bf16's. A driver may set the constants below before it calls `rows`.
"""

import copy
import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import hypot
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

import fq_transforms as fqt
from fq_transforms.bench.cases import ALL, Shape, check_same, fits
from fq_transforms.bench.peers import modelopt_model
from fq_transforms.bench.timing import Turn, device_us, in_turns, median_and_error, turn_us
from fq_transforms.formats import Format
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.state import State

__all__ = ["GroupedMLP", "Training", "page", "rows", "step_rows", "write_rows"]

Row = dict[str, Any]
Call = Callable[[], object]

EXPERTS, HIDDEN, FFN, TOKENS = 32, 2688, 1856, 512  # Nemotron-3-Nano at EP=4
SHAPES = [Shape(EXPERTS, FFN, HIDDEN, ""), Shape(EXPERTS, HIDDEN, FFN, "")]
FORMATS = [format for format in ALL if all(fits(format, shape) for shape in SHAPES)]
ROUNDS = {1: 120, 4: 60}  # by microbatches: rounds over all formats of the lens, and of bf16 against itself
OTHER_ROUNDS = 5  # of the other ways, which are slower and have no limit
WRITE_ROUNDS, DEVICE_ROUNDS = 50, 5
WARM_UPS = 2
LIMIT = 0.005  # of the lens above bf16 against itself

AGAIN = "bf16 again"
WAYS = {
    AGAIN: "as bf16, timed as the others are: the noise",
    "lens": "`fq.take_grads`, the optimizer, `fq.fakequant(masters, state, out=params)`",
    "value_and_grad": "of the masters: fake weights are put into the model, once a step",
    "layerwise": "fake weights of the bf16 parameters, one layer at a time, at every microbatch and again in backward",
    "ModelOpt": "its quantizers of the bf16 parameters, one per expert, at every microbatch",
}
OFTEN = (AGAIN, "lens")


class GroupedMLP(Module):
    """Two GroupedLinears without bias, bf16; `forward` takes [experts * tokens, hidden], as many tokens per expert."""

    def __init__(self, experts: int, hidden: int, ffn: int, tokens: int) -> None:
        super().__init__()
        from transformer_engine.pytorch import GroupedLinear  # pyright: ignore[reportMissingImports]

        options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
        self.linear_fc1: Module = GroupedLinear(experts, hidden, ffn, **options)
        self.linear_fc2: Module = GroupedLinear(experts, ffn, hidden, **options)
        self.splits = [tokens] * experts

    def forward(self, x: Tensor) -> Tensor:
        """[experts * tokens, hidden] to the same."""
        return self.linear_fc2(torch.relu(self.linear_fc1(x, self.splits)), self.splits)


class Way(NamedTuple):
    """The two halves of a step around the optimizer: how weights get out of the masters, and gradients into them."""

    write: Call
    grads: Call


class Training:
    """A bf16 model, its fp32 masters and their optimizer, and the microbatches of a step; all ways share them.

    The rate is 0: as much is computed, and every step has the numbers that were checked before the first.
    """

    def __init__(self, model: Module, xs: Sequence[Tensor]) -> None:
        self.model, self.xs = model, list(xs)
        self.grad = torch.randn_like(self.xs[0])
        self.params = dict(model.named_parameters())
        self.weights: list[Tensor] = list(self.params.values())
        self.masters = fqt.masters(self.params)
        with torch.no_grad():  # each expert has an amax of its own, and no master is a bf16 number
            for number, master in enumerate(self.masters.values()):
                master.mul_(1.001 * 2.0 ** (number % 4 - 2))
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, fused=True)

    def loss(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of one microbatch, whose gradient is asked for too."""
        return _Given.apply(forward(x.detach().requires_grad_()), self.grad)

    def backward(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of all microbatches."""
        for x in self.xs:
            self.loss(forward, x).backward()

    def cast(self, weights: Sequence[Tensor]) -> None:
        """Bf16's own write."""
        with torch.no_grad():
            torch._foreach_copy_(list(weights), list(self.masters.values()))  # pyright: ignore[reportPrivateUsage]

    def take(self, weights: Sequence[Tensor]) -> None:
        """Bf16's own way of gradients to the masters."""
        grads = [torch.empty_like(master) for master in self.masters.values()]
        found: list[Any] = [weight.grad for weight in weights]
        torch._foreach_copy_(grads, found)  # pyright: ignore[reportPrivateUsage]
        for weight, master, grad in zip(weights, self.masters.values(), grads, strict=True):
            weight.grad, master.grad = None, grad

    def turn(self, way: Way) -> Turn:
        """A whole step; the weights that it computes with are written before it, as the step before would have."""

        def step() -> None:
            way.grads()
            self.optimizer.step()
            self.optimizer.zero_grad()
            way.write()

        return Turn(step, way.write)

    def plain(self, model: Module | None = None) -> Way:
        """Bf16; or another model of the same parameters, trained alike."""
        model = model or self.model
        named = dict(model.named_parameters())
        weights = [named[name] for name in self.params]

        def grads() -> None:
            self.backward(model)
            self.take(weights)

        return Way(partial(self.cast, weights), grads)

    def lens(self, fq: fqt.Transform, state: State) -> Way:
        """The two halves of `fq` at the optimizer step, around an ordinary bf16 model."""

        def grads() -> None:
            self.backward(self.model)
            fq.take_grads(self.params, self.masters, state)

        return Way(lambda: fq.fakequant(self.masters, state, out=self.params), grads)

    def value_and_grad(self, fq: fqt.Transform, state: State) -> Way:
        """The model's own parameters are not used."""
        of_step = fqt.value_and_grad(self.loss, replace(fq, out_dtype=torch.bfloat16), self.model)

        def grads() -> None:
            _, found = of_step(self.masters, state, self.xs)
            for name, master in self.masters.items():
                master.grad = found[name]

        return Way(lambda: None, grads)

    def layerwise(self, fq: fqt.Transform, state: State) -> Way:
        """Masters are cast as bf16's are, and fake weights made of what they were cast to."""

        def grads() -> None:
            with fqt.layerwise(fq, self.model, state):
                self.backward(self.model)
            self.take(self.weights)

        return Way(partial(self.cast, self.weights), grads)

    def check(self, way: Way, weights: dict[str, Tensor], what: str) -> None:
        """Raise SystemExit unless a way's gradients are those of an ordinary model with these weights, bit for bit."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.backward(partial(functional_call, self.model, leaves))
        way.write()
        way.grads()
        for name, master in self.masters.items():
            found, wanted = master.grad, leaves[name].grad
            assert found is not None, name
            assert wanted is not None, name
            check_same(found, wanted.float(), f"gradient of {name}, {what}")
        self.optimizer.zero_grad()


class _Given(torch.autograd.Function):
    """A loss that costs nothing: zero, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.grad, None


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
    source = torch.cat([master.detach().flatten() for master in training.masters.values()])
    target = source.bfloat16()
    turns: dict[str, Turn] = {}
    for format in FORMATS:
        fq, state = _transform(training, format)
        turns[format.name] = Turn(training.lens(fq, state).write)
        turns[format.name].call()
        for name, wanted in _reference(fq, training.masters, state).items():
            check_same(training.params[name].detach(), wanted, f"{name}, written, {format.name}")
    wall, cast_us = in_turns(Turn(training.plain().write), turns, WRITE_ROUNDS)
    copy = Turn(lambda: target.copy_(source))
    device, copy_us = in_turns(copy, turns, DEVICE_ROUNDS, lambda turn: device_us(turn.call))
    for name in turns:
        speed = _summary([1 / ratio for ratio in device[name]])
        row = Row(kind="fakequant(out=)", format=name, plain_us=median(cast_us), wall=_summary(wall[name]))
        yield row | Row(copy_us=median(copy_us), device=speed)

    grads = [torch.randn_like(weight) for weight in training.weights]

    def give() -> None:
        training.optimizer.zero_grad()
        for weight, grad in zip(training.weights, grads, strict=True):
            weight.grad = grad

    fq, state = _transform(training, FORMATS[0])
    ours = Turn(lambda: fq.take_grads(training.params, training.masters, state), give)
    wall, take_us = in_turns(Turn(partial(training.take, training.weights), give), {"take": ours}, WRITE_ROUNDS)
    training.optimizer.zero_grad()
    yield Row(kind="take_grads", format="pass_through", plain_us=median(take_us), wall=_summary(wall["take"]))


def step_rows(training: Training, progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """Whole steps, one row per number of microbatches and format, each way checked before it is timed."""
    bf16 = training.plain()
    training.check(bf16, _rounded(training), "bf16")
    base = training.turn(bf16)
    floor = _peak(base)
    turns: dict[tuple[str, str], Turn] = {(AGAIN, ""): base}
    mib = {(AGAIN, ""): 0.0}
    reasons: dict[str, str] = {}
    for format in progress(FORMATS, desc="checks"):
        fq, state = _transform(training, format)
        of_masters, of_params = (_reference(fq, w, state) for w in (training.masters, _rounded(training)))
        ways = {
            "lens": (training.lens(fq, state), of_masters),
            "value_and_grad": (training.value_and_grad(fq, state), of_masters),
            "layerwise": (training.layerwise(fq, state), of_params),
        }
        try:
            theirs = _peer(training, format) if peers else None
        except Exception as error:  # whatever a peer raises is a gap in the table, with its reason
            theirs, reasons[format.name] = None, f"{type(error).__name__}: {error}"[:200]
        for name, (way, weights) in (ways | ({} if theirs is None else {"ModelOpt": (theirs, None)})).items():
            turns[name, format.name] = training.turn(way)
            mib[name, format.name] = (_peak(turns[name, format.name]) - floor) / 2**20
            if weights is not None:
                training.check(way, weights, f"{name}, {format.name}")
    every = training.xs
    often = {key: turn for key, turn in turns.items() if key[0] in OFTEN}
    seldom = {key: turn for key, turn in turns.items() if key[0] not in OFTEN}
    for number, rounds in progress(ROUNDS.items(), desc="steps"):
        training.xs = every[:number]
        ratios, times = in_turns(base, often, rounds)
        ratios |= in_turns(base, seldom, OTHER_ROUNDS)[0]
        for name in (format.name for format in FORMATS):
            keys = {way: (way, "" if way == AGAIN else name) for way in WAYS}
            found = {way: _summary(ratios[key]) | {"mib": mib[key]} for way, key in keys.items() if key in turns}
            lens, again = found["lens"], found[AGAIN]
            row = Row(kind="step", microbatches=number, format=name, bf16_ms=median(times) / 1e3, ways=found)
            row["above"] = {"ratio": lens["ratio"] - again["ratio"], "error": hypot(lens["error"], again["error"])}
            yield row | ({"reason": reasons[name]} if name in reasons else {})
    training.xs = every


def _transform(training: Training, format: Format) -> tuple[fqt.Transform, State]:
    fq = fqt.transform(fqt.select(training.params, {"*": format}))
    return fq, fq.calibrate(training.masters)


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
            weight = weights[name].detach()
            found[name] = fake_quantize_reference(
                weight, amax, global_amax, format=group.format, out_dtype=torch.bfloat16
            )
    return found


def _peer(training: Training, format: Format) -> Way | None:
    training.plain().write()  # it calibrates what it finds
    peer = modelopt_model(copy.deepcopy(training.model), format, lambda model: model(training.xs[0]), "*")
    return None if peer is None else training.plain(peer)


def _peak(turn: Turn) -> int:
    """The most memory that one has at a time, in bytes, above what there was before the first; not to be run before."""
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(WARM_UPS):
        turn_us(turn)
    torch.cuda.reset_peak_memory_stats()
    turn_us(turn)
    return torch.cuda.max_memory_allocated() - held


def _summary(ratios: list[float]) -> dict[str, Any]:
    value, error = median_and_error(ratios)
    return {"ratio": value, "error": error, "ratios": ratios}


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    steps = [row for row in rows if row["kind"] == "step"]
    table = [["microbatches", "format", "bf16 ms", *WAYS, f"lens above {AGAIN}", *(f"{way}, MiB" for way in WAYS)]]
    for row in steps:
        ways = [row["ways"].get(way) for way in WAYS]
        line = [str(row["microbatches"]), row["format"], f"{row['bf16_ms']:.2f}", *map(_cell, ways)]
        table.append([*line, _cell(row["above"]), *("" if way is None else f"{way['mib']:.0f}" for way in ways)])
    writes = [["call", "format", "plain us", "ours over it, whole calls", "copy_ us", "copy_ over ours, device"]]
    for row in (row for row in rows if row["kind"] != "step"):
        copied = f"{row['copy_us']:.0f}" if "copy_us" in row else ""
        line = [row["kind"], row["format"], f"{row['plain_us']:.0f}", _cell(row["wall"])]
        writes.append([*line, copied, _cell(row.get("device"))])
    worst = max(steps, key=lambda row: row["above"]["ratio"], default=None)
    reasons = sorted({f"{row['format']}: {row['reason']}" for row in steps if "reason" in row})
    return "\n".join(
        [
            f"# Optimizer steps, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench step`: {facts}.",
            "",
            f"Two GroupedLinears, {' and '.join(map(str, SHAPES))}, {TOKENS} tokens per expert; forward and backward of "
            "each microbatch, gradients to the fp32 masters, AdamW (fused) on them, and the write of the next step's "
            "weights; bf16 casts both ways by `torch._foreach_copy_`. Ratios are over the mean of bf16 just before "
            "and after: the median of all rounds, which the JSON has, with its standard error. Rounds of bf16 again "
            f"and lens: {', '.join(f'{n} ({number})' for number, n in ROUNDS.items())} (microbatches); of the others "
            f"{OTHER_ROUNDS}. Gradients equalled those of the reference's weights bit for bit before. MiB: the peak of "
            "memory above bf16's with masters, with what is kept between steps.",
            "",
            *(f"- {name}: {what}." for name, what in WAYS.items()),
            "",
            *_lines(table),
            "",
            ""
            if worst is None
            else f"The lens is at most {_cell(worst['above'])} above {AGAIN} "
            f"({worst['format']}, microbatches {worst['microbatches']}); the limit is {LIMIT}.",
            "",
            "The write and the gradients' way alone. Whole calls are waited for, in turns with "
            "`torch._foreach_copy_` of the same weights; the device's time is of graph replays, beside one `copy_` of "
            "as many weights from fp32 to bf16. What was written equalled the reference bit for bit before.",
            "",
            *_lines(writes),
            "",
            *reasons,
        ]
    )


def _lines(table: list[list[str]]) -> list[str]:
    header, *lines = table
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def _cell(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['ratio']:.4f} ± {value['error']:.4f}"
