"""Whole steps of bf16 and of the lens in turns, on all ranks at once; and what both trainings check afterwards."""

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import fq_transforms as fqt
from fq_transforms.bench.step import AGAIN, above, summary
from fq_transforms.bench.timing import Turn, in_turns, median_and_error
from fq_transforms.state import GroupState

__all__ = ["check_equal", "in_turns_on_ranks", "largest", "on_one_gpu", "random_ids"]

Row = dict[str, Any]

FORMAT = fqt.NVFP4
VOCABULARY, LENGTH = 4096, 1024  # of the models, and of their sequences
WARM_UPS, WRITES = 3, 11


def largest(value: float, device: str) -> float:
    """The largest value of all ranks, none of which has it before all are there and their devices are done."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def random_ids(options: Namespace) -> Tensor:
    """Sequences of `options.tokens` tokens in all, and of each the one that follows."""
    length: int = min(LENGTH, options.tokens)
    generator = torch.Generator(options.device).manual_seed(0)  # ranks of tensor parallelism want the same ones
    size = (options.tokens // length, length + 1)
    return torch.randint(VOCABULARY, size, generator=generator, device=options.device)


def in_turns_on_ranks(bf16: Turn, lens: Turn, write: Callable[[], object], options: Namespace) -> Row:
    """Steps of both ways by turns, `options.steps` of the lens; the most memory of a rank in a step; the write alone.

    A step takes as long as on the slowest rank, so that all ranks have the same times. The ratio of bf16 to itself is
    taken as that of the lens is: one step over the mean of those of bf16 just before and after it.
    """
    device: str = options.device
    gib = {name: _peak_gib(turn, device) for name, turn in {"bf16": bf16, "lens": lens}.items()}
    times: dict[bool, list[float]] = {False: [], True: []}  # in milliseconds, by whether it is of the lens
    with tqdm(total=5 * options.steps, desc="steps", disable=dist.get_rank() > 0) as bar:

        def timed(turn: Turn) -> float:
            turn.before()
            gc.collect(0)  # which `in_turns` turns off: a step's cycles may hold its activations
            times[turn is lens].append(_ms(turn.call, device))
            bar.update()
            return times[turn is lens][-1] * 1e3

        ratios, _ = in_turns(bf16, {AGAIN: bf16, "lens": lens}, options.steps, timed, on_quiet_core=False)
    found = {name: summary(values) for name, values in ratios.items()}
    return Row(
        bf16_ms=median_and_error(times[False]),
        lens_ms=median_and_error(times[True]),
        write_ms=median_and_error([_ms(write, device) for _ in range(WRITES)]),
        again=found[AGAIN],
        lens=found["lens"],
        above=above(found["lens"], found[AGAIN]),
        gib=gib,
    )


def _ms(call: Callable[[], object], device: str) -> float:
    """The time of a call on the slowest rank; all begin at once."""
    largest(0.0, device)
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return largest(time.perf_counter() - start, device) * 1e3


def _peak_gib(turn: Turn, device: str) -> float | None:
    """The most memory that a rank has during a step, with all that is kept between steps."""
    for _ in range(WARM_UPS):
        turn.before()
        turn.call()
    if device != "cuda":
        return None
    turn.before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    turn.call()
    return largest(torch.cuda.max_memory_allocated() / 2**30, device)


def on_one_gpu(masters: Sequence[Tensor], leaves: GroupState) -> tuple[list[Tensor], GroupState]:
    """bf16 fake weights of all experts of a group by a state of all, and the state that is calibrated on them here."""
    params = {f"experts.{number}.weight": master for number, master in enumerate(masters)}
    fq = fqt.transform(fqt.select(params, {"*": FORMAT}), out_dtype=torch.bfloat16)
    ((key, calibrated),) = fq.calibrate(params).items()
    return list(fq.fakequant(params, {key: leaves}).values()), calibrated


def check_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise SystemExit unless two tensors have the same bits."""
    integers = {2: torch.int16, 4: torch.int32}[found.element_size()]
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise SystemExit(f"{what}: found {found.dtype} {list(found.shape)}, wanted {wanted.dtype} {list(wanted.shape)}")
    other = int((found.contiguous().view(integers) != wanted.contiguous().view(integers)).sum())
    if other:
        raise SystemExit(f"{what}: found {other} of {found.numel()} numbers other than one GPU's, wanted none")
