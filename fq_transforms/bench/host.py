"""`python -m fq_transforms.bench host`: whole `fakequant` calls on the host, with private APIs and without.

`fq_transforms.ops.private` has each private API of PyTorch and Triton beside a public way that gives the same answers.
Here a call is timed with all of them, without each in turn, and with the public ways only: what each is worth.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fq_transforms.bench.cases import ALL, SHAPES, check_same, expert_weights, fits, user
from fq_transforms.bench.timing import host_us
from fq_transforms.formats import Format
from fq_transforms.ops import private

__all__ = ["measure", "page", "rows", "without"]

Row = dict[str, Any]

HOST_SHAPES = [SHAPES[0], SHAPES[2]]  # 32 and 128 experts
PASSES = 3  # over all shapes and formats
# Names of `fq_transforms.ops.private` that are None where an API is missing.
APIS = {
    "guards": "_tensor_guards",
    "stream": "_raw_stream",
    "functorch": "_functorch_active",
    "launcher": "_launcher",
}
WAYS = {"private": (), **{f"without {name}": (name,) for name in APIS}, "public": tuple(APIS)}


@contextmanager
def without(*names: str) -> Generator[None]:
    """Within, the public ways are taken in place of some private APIs, as if this PyTorch or Triton lacked them."""
    found = {APIS[name]: getattr(private, APIS[name]) for name in names}
    try:
        for attribute in found:
            setattr(private, attribute, None)
        yield
    finally:
        for attribute, api in found.items():
            setattr(private, attribute, api)


def measure(weights: list[Tensor], format: Format) -> dict[str, float]:
    """Microseconds of the host per call, by way; each remembers nothing of the others."""
    times: dict[str, float] = {}
    wanted: dict[str, Tensor] = {}
    for way, names in WAYS.items():
        with without(*names):
            params, fq, state = user(weights, format)
            found = fq.fakequant(params, state)
            wanted = wanted or found
            for name, weight in wanted.items():
                check_same(found[name], weight, f"{name}, {way}, {format.name}")
            del found
            times[way] = host_us(lambda params=params, fq=fq, state=state: fq.fakequant(params, state))
    return times


def rows(progress: Callable[..., Any]) -> Generator[Row, None, None]:
    """One row per shape and format: medians of passes, far apart as other work disturbs a host for seconds."""
    found: dict[tuple[str, str], Row] = {}
    with torch.no_grad():
        for number, shape in enumerate(progress(PASSES * HOST_SHAPES, desc="host")):
            weights = [w.bfloat16() for w in expert_weights(shape)]
            for format in (f for f in ALL if fits(f, shape)):
                row = found.setdefault((str(shape), format.name), Row(shape=str(shape), format=format.name, passes=[]))
                row["passes"].append(measure(weights, format))
                row |= {way: median(one[way] for one in row["passes"]) for way in WAYS}
                if number >= len(HOST_SHAPES) * (PASSES - 1):
                    yield row


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """A page of results in Markdown: formats by ways, and the median of all formats per shape."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    header = ["shape", "format", *WAYS]
    lines = [header, ["---"] * len(header)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        some = [row for row in rows if row["shape"] == shape]
        lines += [[shape, row["format"], *(f"{row[way]:.1f}" for way in WAYS)] for row in some]
        lines.append([shape, "median", *(f"{median(row[way] for row in some):.1f}" for way in WAYS)])
    return "\n".join(
        [
            f"# Private APIs, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench host`: {facts}.",
            "",
            "Microseconds of the host per call of `fakequant`, in a row of calls that nobody waits for, bf16; the "
            f"median of {PASSES} passes over all shapes and formats, on the core that is the fastest at the moment. "
            "Private: with the private APIs of `fq_transforms.ops.private`. Without one: with its public fallback. "
            "Public: with all fallbacks. All ways gave the same bits before they were timed.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )
