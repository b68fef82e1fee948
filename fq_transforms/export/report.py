"""The report of a folder: what quantization would do to each expert, read piece by piece."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from fq_transforms.export.files.directory import bytes_bar
from fq_transforms.export.folder import decided
from fq_transforms.export.layouts.plan import check_values
from fq_transforms.export.readers import engine_of
from fq_transforms.export.streaming.job import Job, Piece, named
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.formats import Layout
from fq_transforms.methods import MAX, Method
from fq_transforms.report.plot import Histogram
from fq_transforms.report.report import GroupReport, Report, group_report, histogram, worst_of_roles
from fq_transforms.rules import Rules
from fq_transforms.spec import Group

__all__ = ["report"]

# All that is measured per expert; the rest is the same of all experts of a group.
_PER_EXPERT = ("signal", "noise", "clipped", "zeroed", "underflow", "largest", "amax")


def report(
    src: str | os.PathLike[str],
    rules: Rules | None = None,
    *,
    layout: Layout = "compressed-tensors",
    reader: Literal["vllm", "transformers"] | None = None,
    method: Method = MAX,
    state: str | os.PathLike[str] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    experts: str | Sequence[str] = (),
    transposed: str | Sequence[str] | Mapping[str, bool] = (),
    device: torch.device | str | None = None,
) -> Report:
    """What `folder` with the same arguments would do to each expert: `Transform.report` of weights that are on a disk.

    Scales are those that `folder` would write: in the layout's own formats, and tied where engines fuse roles. The
    weights of the folder are the signal, decoded first if they are in codes. No more is held than a piece of a group.

    Args:
        src: As in `folder`, as are the others.
        rules: What is quantized. None with a `state`: its.
        layout: Decides formats and ties.
        reader: Who must load it.
        method: How amax is chosen.
        state: A checkpoint of `fqt.checkpoint`; its tokens are in the table.
        inputs: Likewise.
        experts: As in `select`, as is the next.
        transposed: Stacks stored [in, out].
        device: Where to compute.

    Raises:
        ValueError: `folder` would refuse it; nothing is quantized.
        OSError: A file cannot be read.
    """
    with Folder(src) as source, torch.no_grad():
        engine = engine_of(layout, reader)
        # Nothing is written, so any size of a shard will do.
        job = decided(source, rules, layout, engine, method, state, inputs, experts, transposed, device, 2**62)
        if not job.given.spec.groups:
            raise ValueError("rules: found none, or none that quantizes weights, wanted some; or a state")
        job.start()
        pieces = [piece for piece in job.pieces if piece.sources[0].group]
        parts: dict[str, list[GroupReport]] = {}
        with bytes_bar(sum(piece.size for piece in pieces), source.path.name) as bar:
            for piece in pieces:
                with named(source):
                    for one, measured in _measured(job, piece):
                        parts.setdefault(one.name, []).append(measured)
                bar.update(piece.size)
        groups = {group.key: _joined(group, parts[group.key], job) for group in job.given.spec.groups}
        sources = {one.name: piece.sources for piece in pieces for one in piece.sources}
        worst = [_histogram(job, sources[found.key], found) for found in worst_of_roles(groups.values())]
        return Report(groups, tuple(worst))


def _measured(job: Job, piece: Piece) -> list[tuple[Any, GroupReport]]:
    """What is measured of some experts of each source of a piece."""
    part = None if piece.experts is None else slice(piece.first, piece.first + piece.experts)
    plan = job.read(piece.sources, part)
    check_values(plan, job.target)
    return [
        (one, group_report(plan.params, plan.state[cut.group.key], cut.group))
        for one, cut in zip(piece.sources, plan.sources, strict=True)
        if cut.group
    ]


def _joined(group: Group, parts: Sequence[GroupReport], job: Job) -> GroupReport:
    """One report of all experts, in their order, which is that of the pieces."""
    tokens = job.given.state.get(f"{group.key}.input", {}).get("tokens")
    return replace(
        parts[0],
        key=group.key,
        experts=tuple(range(group.experts)),
        tokens=None if tokens is None else tokens.long().cpu(),
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_EXPERT},
    )


def _histogram(job: Job, sources: Sequence[Any], found: GroupReport) -> Histogram:
    """Of the worst expert of a group, which is read once more, with those that it is tied to."""
    expert = found.worst
    assert expert is not None
    plan = job.read(sources, slice(expert, expert + 1) if len(found.experts) > 1 else None)
    number = [one.name for one in sources].index(found.key)
    group = plan.sources[number].group
    assert group is not None
    return replace(histogram(plan.params, plan.state[group.key], group), key=found.key, expert=expert)
