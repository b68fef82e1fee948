"""What a training step costs under fake quantization: a layer of Transformer Engine, and a model of Megatron."""

import copy
import gc
import tempfile
from collections.abc import Callable, Generator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

import fq_transforms as fqt
from fq_transforms.bench.cases import ALL, Shape, fits
from fq_transforms.bench.models import GroupedMLP, gpt, single_rank
from fq_transforms.bench.peers import modelopt_model
from fq_transforms.bench.timing import quiet_core
from fq_transforms.formats import Format
from fq_transforms.integrations import te
from fq_transforms.state import State

__all__ = ["layer_rows", "model_rows", "page"]

Row = dict[str, Any]
Call = Callable[[], object]

EXPERTS, HIDDEN, FFN, TOKENS = 32, 2688, 1856, 512  # Nemotron-3-Nano at EP=4
MICROBATCHES = 4
MODEL_FORMATS = [fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.NVFP4]

OFTEN = ("every", "once")  # what a training loop would take


class Rounds(NamedTuple):
    """Rounds in a pass; turns of each way of `OFTEN` in a round; the others are timed in one of `others_every`."""

    number: int
    turns: int
    others_every: int


LAYER_ROUNDS, MODEL_ROUNDS = Rounds(20, 4, 5), Rounds(6, 2, 2)
LAYER_PASSES = 3  # over all formats
WARM_UPS = 4  # until a step finds what it keeps at the same addresses as the two before

WAYS = {
    "every": "fakequant at every microbatch: `value_and_grad(keep=True)` of one, gradients added up in one call",
    "once": "one fakequant for four microbatches: `value_and_grad(keep=True)` of four",
    "kept": "fakequant at every microbatch: `layerwise`, recompute=False",
    "recompute": "two at every microbatch: `layerwise`",
    "whole": "fakequant at every microbatch, into one `functional_call`",
    "ModelOpt": "ModelOpt's quantizers, one per expert; in the model without fused accumulation, which it switches off",
}


def layer_rows(progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """Forward and backward of two GroupedLinears, 32 experts, 512 tokens each, four microbatches, by format and way.

    Passes over all formats are far apart: what slows the host down for seconds meets only one of them. ModelOpt is in
    the first only.
    """
    model = GroupedMLP(EXPERTS, HIDDEN, FFN, TOKENS)
    xs = [torch.randn(EXPERTS * TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(MICROBATCHES)]
    grad = torch.randn_like(xs[0])

    def loss(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _Given.apply(forward(x.detach().requires_grad_()), grad)

    def run(forward: Callable[[Tensor], Tensor]) -> None:
        for x in xs:
            loss(forward, x).backward()

    shapes = [Shape(EXPERTS, FFN, HIDDEN, ""), Shape(EXPERTS, HIDDEN, FFN, "")]
    formats = [format for format in ALL if all(fits(format, shape) for shape in shapes)]
    rows: dict[str, Row] = {}
    for number, format in enumerate(progress(LAYER_PASSES * formats, desc="layer step")):
        params = dict(model.named_parameters())
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state = fq.calibrate(params)
        peer = partial(_layer_peer, model, format, run, xs[0])
        make = partial(fqt.value_and_grad, loss, fq, model, keep=True)
        ways = _steps(make, params, state, xs) | _ways(fq, model, state, run)
        row = rows.setdefault(format.name, Row(kind=f"layer, {EXPERTS} x [{FFN}, {HIDDEN}]", format=format.name))
        first = number < len(formats)
        _measure(row, model, ways, partial(run, model), peer if peers and first else None, LAYER_ROUNDS)
        if number >= len(formats) * (LAYER_PASSES - 1):
            yield row


def model_rows(progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """Forward, backward and DDP's `main_grad` of Megatron's GPTModel, fused accumulation on, four microbatches."""
    options: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": HIDDEN // 128,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": FFN,
    }
    batches = [torch.randint(0, 1024, (4, 1024), device="cuda") for _ in range(MICROBATCHES)]
    positions = torch.arange(1024, device="cuda").expand(4, -1)

    def loss(forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return forward(ids, positions, None, labels=ids).mean()

    def run(ddp: Any, forward: Callable[..., Tensor]) -> None:
        ddp.zero_grad_buffer()
        for ids in batches:
            loss(forward, ids).backward()

    with tempfile.TemporaryDirectory() as folder, single_rank(folder):
        for format in progress(MODEL_FORMATS, desc="model step"):
            ddp = gpt(**options)
            params = dict(ddp.module.named_parameters())
            fq = fqt.transform(fqt.select(params, {"*.mlp.experts.*": format}))
            state = fq.calibrate(params)
            make = partial(fqt.value_and_grad, loss, fq, ddp.module, keep=True)
            ways = _steps(make, params, state, batches, ddp.zero_grad_buffer)
            ways |= _ways(fq, ddp.module, state, partial(run, ddp))
            peer = partial(_model_peer, options, format, run)
            plain = partial(run, ddp, ddp.module)
            row = Row(kind="model, 4 layers", format=format.name)
            _measure(row, ddp.module, ways, plain, peer if peers else None, MODEL_ROUNDS)
            yield row
            del ddp, params, state, make, ways, plain, peer


def _layer_peer(model: Module, format: Format, run: Callable[..., None], x: Tensor) -> tuple[Module, Call] | None:
    peer = modelopt_model(copy.deepcopy(model), format, lambda m: m(x), "*")
    return None if peer is None else (peer, partial(run, peer))


def _model_peer(options: dict[str, Any], format: Format, run: Callable[..., None]) -> tuple[Module, Call] | None:
    """Without fused accumulation, which ModelOpt switches off."""
    found: list[Module | None] = []
    ids = torch.zeros((1, 128), dtype=torch.int64, device="cuda")
    positions = torch.arange(128, device="cuda")[None]

    def convert(model: Module) -> None:
        found.append(modelopt_model(model, format, lambda m: m(ids, positions, None, labels=ids), "*mlp.experts*"))

    ddp = gpt(convert, fused=False, **options)
    return None if found[0] is None else (ddp.module, partial(run, ddp, ddp.module))


def _steps(
    make: Callable[[], Callable[..., Any]],
    params: dict[str, Any],
    state: State,
    microbatches: list[Tensor],
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Call]:
    """The ways by `value_and_grad`, each with its own kept weights; gradients outside `main_grad` are added up."""
    step, step_of_all = make(), make()
    added = [name for name, param in params.items() if not hasattr(param, "main_grad")]

    def every() -> list[Tensor]:
        begin()
        total: list[Tensor] = []
        for microbatch in microbatches:
            _, grads = step(params, state, [microbatch])
            found = [grads[name] for name in added]
            if total and added:
                torch._foreach_add_(total, found)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            total = total or found
        return total

    def once() -> object:
        begin()
        return step_of_all(params, state, microbatches)

    return {"every": every, "once": once}


def _ways(fq: fqt.Transform, model: Module, state: State, run: Callable[..., None]) -> dict[str, Call]:
    """The ways around a model's own forward and backward, each with all microbatches."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        params = dict(model.named_parameters())
        weights = fq.fakequant(params, state)
        fqt.carry_main_grad(fq, params, weights)
        return functional_call(model, weights, args, kwargs)

    def by_layer(recompute: bool) -> None:
        with te.layerwise(fq, model, state, recompute=recompute):
            run(model)

    return {"kept": partial(by_layer, False), "recompute": partial(by_layer, True), "whole": partial(run, forward)}


class _Given(torch.autograd.Function):
    """A loss that costs nothing: zero, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.grad, None


def _measure(
    row: Row, model: Module, ways: dict[str, Call], plain: Call, peer: Callable[[], Any] | None, rounds: Rounds
) -> None:
    """Add a pass to a row: in every round each way runs between two runs of bf16, as hosts change their speed.

    `rounds` of the row has the ratios of all passes so far, and bf16's milliseconds. The other entries are their
    medians, and the largest peaks of memory.
    """
    calls = {"bf16": plain, **ways}
    models = [model]
    try:
        if peer is not None and (theirs := peer()) is not None:
            models.append(theirs[0])
            calls["ModelOpt"] = theirs[1]
    except Exception as error:  # whatever a peer raises is a gap in the table, with its reason
        row["reason"] = f"{type(error).__name__}: {error}"[:200]
    found: dict[str, list[float]] = row.setdefault("rounds", {})
    kept = dict.fromkeys(calls, 0)
    gc.collect()  # models in reference cycles, such as Megatron's, must not be freed while memory is measured
    torch.cuda.empty_cache()
    gc.disable()
    for name, call in calls.items():  # compiles, and makes what is kept between steps
        _forget_gradients(models)
        before = torch.cuda.memory_allocated()
        for _ in range(WARM_UPS if name in OFTEN else 1):
            _timed(call, models)
        _forget_gradients(models)
        gc.collect()
        kept[name] = torch.cuda.memory_allocated() - before
    peaks = dict.fromkeys(calls, 0)
    others = [(name,) for name in calls if name not in ("bf16", *OFTEN)]
    for number in range(rounds.number):
        for names in [OFTEN * rounds.turns, *([] if number % rounds.others_every else others)]:
            times: list[float] = []
            with quiet_core(whole=True):
                for way in ("bf16", *(each for name in names for each in (name, "bf16"))):
                    milliseconds, peak = _timed(calls[way], models)
                    times.append(milliseconds)
                    peaks[way] = max(peaks[way], peak)
            found.setdefault("bf16", []).extend(times[::2])
            for name, before_ms, took, after_ms in zip(names, times[::2], times[1::2], times[2::2], strict=False):
                found.setdefault(name, []).append(2 * took / (before_ms + after_ms))
    gc.enable()
    row["bf16_ms"] = median(found["bf16"])
    for name in (each for each in calls if each != "bf16"):
        mib = (peaks[name] + kept[name] - peaks["bf16"]) / 2**20
        row |= {name: median(found[name]), f"{name}_mib": max(mib, row.get(f"{name}_mib", mib))}


def _timed(call: Call, models: list[Module]) -> tuple[float, int]:
    """Milliseconds per microbatch of one way, from parameters without gradients, and its peak of memory in bytes."""
    _forget_gradients(models)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result  # the other ways leave their gradients on the parameters, where they are freed above
    return start.elapsed_time(stop) / MICROBATCHES, torch.cuda.max_memory_allocated() - before


def _forget_gradients(models: list[Module]) -> None:
    for param in (param for each in models for param in each.parameters()):
        param.grad = None


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    header = ["step", "format", "bf16 ms", *WAYS, *(f"{name}, MiB" for name in WAYS)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        times = [f"{row[name]:.3f}" if name in row else "" for name in WAYS]
        memory = [f"{row[f'{name}_mib']:.0f}" if name in row else "" for name in WAYS]
        lines.append([row["kind"], row["format"], f"{row['bf16_ms']:.2f}", *times, *memory])
    reasons = sorted({f"{row['format']}: {row['reason']}" for row in rows if "reason" in row})
    group = EXPERTS * HIDDEN * FFN * 2 / 2**20
    return "\n".join(
        [
            f"# Training steps, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench step`: {facts}.",
            "",
            "Forward and backward, per microbatch, over the mean of bf16 just before and after: 1 is bf16's time. The "
            f"median of all, which the JSON has: {_often(LAYER_ROUNDS)} in each of {LAYER_PASSES} passes over all "
            f"formats for {' and '.join(OFTEN)}, {_often(MODEL_ROUNDS)} of the model; {_seldom(LAYER_ROUNDS)} for the "
            f"others, {_seldom(MODEL_ROUNDS)} of the model; ModelOpt is in the first pass only. On the core that is "
            "fastest then. Parameters and state stay where they are, as in a loop that updates them in place. MiB: the "
            "peak of memory above bf16's, with what is kept from step to step; one group's fake weights are "
            f"{group:.0f} MiB.",
            "",
            *(f"- {name}: {what}." for name, what in WAYS.items()),
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            *reasons,
        ]
    )


def _often(rounds: Rounds) -> int:
    return rounds.number * rounds.turns


def _seldom(rounds: Rounds) -> int:
    return len(range(0, rounds.number, rounds.others_every))
