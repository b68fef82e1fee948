"""A folder to another, streamed: each piece is read, calibrated, quantized and written by itself.

    plan      names, formats, ties and the place of each byte, from headers alone
    pieces    some experts of the roles that engines fuse; a matrix; or tensors that are copied
    stage     the new shards at their full size, and a byte for each piece that is on the disk; renamed at the end

No piece needs another, so threads, processes and a later run share them, and the bytes are the same.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch

from fq_transforms.calibrate import check_method
from fq_transforms.checkpoint.storage import local_path
from fq_transforms.export.files.directory import bytes_of, check_free
from fq_transforms.export.layouts.plan import warn_of_notes
from fq_transforms.export.names.states import in_files
from fq_transforms.export.readers import engine_of
from fq_transforms.export.save import LAYOUTS
from fq_transforms.export.streaming.ahead import Ahead
from fq_transforms.export.streaming.conversion import Conversion
from fq_transforms.export.streaming.job import Given, Job, named
from fq_transforms.export.streaming.ranks import Ranks
from fq_transforms.export.streaming.run import run, share_of
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.export.streaming.stage import check_space
from fq_transforms.formats import Format, Layout, check_layout, is_own, static_format
from fq_transforms.methods import MAX, Max, Method
from fq_transforms.rules import Rules
from fq_transforms.select import select
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State

__all__ = ["decided", "folder"]


def folder(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
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
    max_shard_size: int | str = "5GB",
    jobs: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Quantize a folder of safetensors to another one, whatever its size; without rules, make it plain weights.

    What is stored in codes (FP8, INT4, MXFP4, NVFP4) is decoded first. What rules do not select keeps its bytes, or, if
    it is in codes, becomes plain. Fused roles are tied. Ranks of torchrun share the work. More: docs/folders.

    Args:
        src: Of transformers: shards, their index, config.json. Names in it are kept.
        dst: A new name, or an empty directory. It appears whole or not at all.
        rules: As `select` takes them, over the names in `src`, in the layout's own formats. None with a `state`: its.
        layout: As in `save`, as is the next.
        reader: Who must load it.
        method: How amax is chosen.
        state: A checkpoint of `fqt.checkpoint`, whose amax is taken; by names of `src`, transformers' or Megatron's.
        inputs: Likewise, for the inputs that rules select.
        experts: As in `select`, as is the next.
        transposed: Stacks stored [in, out].
        device: Where to compute: by default the GPU, if there is one.
        max_shard_size: Of a file: bytes, or such as "5GB".
        jobs: Threads per process; by default one per core, at most 8.
        resume: Go on where a run that was killed has stopped, and keep what an error leaves.
        dry_run: Write nothing.

    Raises:
        ValueError: As `select` and `save`; `src` is no such folder. Before a write, but for what weights' values show:
            one is not finite, or too small for a global scale.
        OSError: A file cannot be read or written; the disk has too little space.
    """
    engine, limit = engine_of(layout, reader), bytes_of(max_shard_size)
    count = _jobs(jobs)
    path = local_path(dst)
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks())

        def decide() -> Job:
            source = stack.enter_context(Folder(src))
            if path == source.path or source.path in path.parents:
                raise ValueError(f"dst {str(path)!r}: found a place within src, wanted another")
            return decided(source, rules, layout, engine, method, state, inputs, experts, transposed, device, limit)

        job = ranks.together(decide)
        mine = share_of(job, ranks)
        ahead = stack.enter_context(Ahead((number, job.spans(piece)) for number, piece in mine.items()))
        if not dry_run and not resume:  # then it begins once what is there is known
            ranks.together(lambda: check_free(path))
            ahead.start()
        ranks.together(job.start)
        warn_of_notes(job.plan, job.target, stacklevel=3)
        _warn_of_other_formats(job)
        if dry_run:
            check_free(path)
            check_space(job, path)
        else:
            run(job, path, ranks, count, resume, mine, ahead)
        return job.conversion(path)


def _warn_of_other_formats(job: Job) -> None:
    """Of a state: rules are in the layout's own formats."""
    layout = job.target.layout
    off = [group for group in job.given.spec.groups if job.target.encode and not is_own(group.format, layout)]
    if off:
        warnings.warn(
            f"state: found {off[0].format.name} in {off[0].key!r} and {len(off) - 1} more, whose scales the library of "
            f"{layout} applies in another order, so that some weights may be read otherwise; for none train in its own "
            f"formats: transform(spec, layout={layout!r})",
            stacklevel=3,
        )


def _jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(8, os.cpu_count() or 1)
    if type(jobs) is not int or jobs < 1:
        raise ValueError(f"jobs: found {jobs!r}, wanted a number of threads, 1 or more")
    return jobs


def decided(
    source: Folder,
    rules: Rules | None,
    layout: Layout,
    engine: Any,
    method: Method,
    state: str | os.PathLike[str] | None,
    inputs: str | os.PathLike[str] | None,
    experts: str | Sequence[str],
    transposed: str | Sequence[str] | Mapping[str, bool],
    device: torch.device | str | None,
    limit: int,
) -> Job:
    """The conversion that `folder` makes of these arguments, checked, before the first byte."""
    with named(source):
        target = LAYOUTS[check_layout(layout)]
        if not rules and state is None and (experts or transposed or method != MAX):
            raise ValueError(
                f"rules: found none, and experts={experts!r}, transposed={transposed!r}, method={method!r}, which say "
                "how to quantize, wanted rules beside them"
            )
        given = _given(source, rules, layout, method, state, inputs, experts, transposed)
        return Job(source, target, given, method, engine, device, limit)


def _given(
    source: Folder,
    rules: Rules | None,
    layout: Layout,
    method: Method,
    state: str | os.PathLike[str] | None,
    inputs: str | os.PathLike[str] | None,
    experts: str | Sequence[str],
    transposed: str | Sequence[str] | Mapping[str, bool],
) -> Given:
    params = source.params()
    chosen = select(params, rules, experts=experts, transposed=transposed) if rules else Spec(())
    spec, known = chosen.for_layout(layout), State()
    if state is not None:
        if method != MAX:
            raise ValueError(f"method: found {method!r} beside a state, whose amax is taken as it is, wanted none")
        if not rules and (experts or transposed):
            raise ValueError(f"experts, transposed: found {experts or transposed!r} beside a state, which says itself")
        spec, known = in_files(state, params, source.config)
        if rules is not None:
            ours, theirs = ({group.key: group.format for group in one.all_groups} for one in (chosen, spec))
            if ours != theirs:
                key = sorted(ours.items() ^ theirs.items(), key=str)[0][0]
                raise ValueError(
                    f"state {str(state)!r}: found {key!r} in {_name(theirs.get(key))}, and rules that say "
                    f"{_name(ours.get(key))}, wanted the same of both; leave the rules out"
                )
    calibrated = [one for one in spec.inputs if one.is_calibrated and one.key not in known]
    if inputs is not None and not calibrated:
        raise ValueError(f"inputs: found {str(inputs)!r}, and no inputs that want an amax of it, wanted rules for them")
    if calibrated:
        if inputs is None:
            raise ValueError(
                f"inputs {calibrated[0].key!r}: found no amax for them, nor for {len(calibrated) - 1} others, wanted "
                "inputs=, a checkpoint of a state that was calibrated with batches; or rules of weights alone, such as "
                "fqt.presets.weights_only(rules)"
            )
        _, of_inputs = in_files(inputs, params, source.config, "inputs")
        for one in calibrated:
            if "amax" not in of_inputs.get(one.key, {}):
                raise ValueError(
                    f"inputs {str(inputs)!r}: found no {one.key!r}, wanted an amax for it, among "
                    f"{sorted(key for key in of_inputs if key.endswith('.input'))[:3]}"
                )
            found, wanted = tuple(of_inputs[one.key]["amax"].shape), one.leaf_shapes["amax"]
            if found != wanted:
                raise ValueError(
                    f"inputs {str(inputs)!r}: found amax {found} of {one.key!r}, wanted {wanted}: of this model, and "
                    "with the same `per_expert_inputs`"
                )
            known[one.key] = of_inputs[one.key]
    known |= {one.key: {} for one in spec.inputs if not one.is_calibrated}
    check_method(method, spec) if state is None else None
    exact = frozenset[str]()
    if isinstance(method, Max) and state is None:
        exact = frozenset(group.key for group in spec.groups if _is_exact(source, group))
        of = {group.key: static_format(group.format) if group.key in exact else group.format for group in spec.groups}
        spec = replace(spec, groups=tuple(replace(group, format=of[group.key]) for group in spec.groups))
    return Given(spec, known, exact)


def _name(format: Format | None) -> str:
    return "no format" if format is None else format.name


def _is_exact(source: Folder, group: Group) -> bool:
    """True for NVFP4 out of MXFP4: a power of two is a scale of E4M3 too."""
    format = group.format
    is_nvfp4 = format.scale == "e4m3" and format.block == (1, 16) and format.min_scale == 2.0**-9
    stored = [source.encoded.get(name) for name in group.names]
    return is_nvfp4 and not format.unit_scale_below and all(one is not None and one.exponents for one in stored)
