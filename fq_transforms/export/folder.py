"""A folder to another, streamed: each piece is read, calibrated, quantized and written by itself.

    plan      names, formats, ties and the place of each byte, from headers alone
    pieces    some experts of the roles that engines fuse; a matrix; or tensors that are copied
    stage     the new shards at their full size, and a byte for each piece that is on the disk; renamed at the end

No piece needs another, so threads, processes and a later run share them, and the bytes are the same.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Condition
from threading import Lock as ThreadLock
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fq_transforms.calibrate import calibrate, check_method
from fq_transforms.checkpoint.storage import (
    Lock,
    crc32_of,
    fsync,
    fsync_directory,
    local_path,
    naming,
    stage_of,
    stages_beside,
    stages_within,
)
from fq_transforms.export.ahead import Ahead, Span
from fq_transforms.export.conversion import Conversion
from fq_transforms.export.encoded import check_finite
from fq_transforms.export.files import (
    CONFIG,
    INDEX,
    MOVING,
    bytes_bar,
    bytes_of,
    check_free,
    commit,
    remove_staged,
    write_json,
)
from fq_transforms.export.plan import (
    ExportPlan,
    Target,
    check_values,
    part_of,
    planned,
    tensors_of,
    types_of,
    warn_of_notes,
)
from fq_transforms.export.ranks import LostRankError, Ranks
from fq_transforms.export.readers import engine_of
from fq_transforms.export.save import LAYOUTS
from fq_transforms.export.shards import Shard, ShardWriter, TensorType, index_of, is_whole, lay_out
from fq_transforms.export.sources import MODELOPT, Folder
from fq_transforms.export.states import in_files
from fq_transforms.export.ties import check_ties, fused_sources
from fq_transforms.fakequant import fakequant
from fq_transforms.formats import Format, Layout, check_layout, is_own, static_format
from fq_transforms.methods import MAX, Max, Method
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.reference import power_of_two
from fq_transforms.rules import Rules
from fq_transforms.select import select
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State, flatten

__all__ = ["Job", "Piece", "decided", "folder"]

# Bytes of a piece in the files that are read; a matrix may be larger. Pinned memory comes in powers of two: with what
# aligns its tensors a piece takes 2**27.
PIECE_BYTES = 120 * 2**20
# Bytes of weights that threads hold in memory together.
HELD_BYTES = 2**30
# Bytes that are written before they are known to be on the disk, which a resumed run does not write again.
SYNC_BYTES = 2**30
# In a stage: a byte for each piece, 1 if it is on the disk; and a sign that a rank has failed.
DONE, FAILED = ".done", ".failed"
# Of a scale of an expert: neither its amax nor its reciprocal, which some files have, is infinite.
EXPONENTS = (-118, 112)


class Piece(NamedTuple):
    """What is read, quantized and written in one go.

    Attributes:
        sources: One, or those that engines fuse; or parameters that are copied.
        first: Number of the first expert.
        experts: How many; None for all that there is.
        size: Bytes in the files that are read.
    """

    sources: tuple[Any, ...]
    first: int
    experts: int | None
    size: int


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
        ValueError: As `select` and `save`; `src` is no such folder; a weight is not finite: all else before a write.
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
        mine = _mine(job, ranks)
        ahead = stack.enter_context(Ahead((number, job.spans(piece)) for number, piece in mine.items()))
        if not dry_run and not resume:  # then it begins once what is there is known
            ranks.together(lambda: check_free(path))
            ahead.start()
        ranks.together(job.start)
        warn_of_notes(job.plan, job.target, stacklevel=3)
        _warn_of_other_formats(job)
        if dry_run:
            check_free(path)
        else:
            _run(job, path, ranks, count, resume, mine, ahead)
        return job.conversion(path)


@contextmanager
def _named(source: Folder) -> Generator[None, None, None]:
    """Let each ValueError inside say which folder it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"folder {str(source.path)!r}: {error}") from error


def _warn_of_other_formats(job: "Job") -> None:
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
) -> "Job":
    """The conversion that `folder` makes of these arguments, checked, before the first byte."""
    with _named(source):
        target = LAYOUTS[check_layout(layout)]
        if not rules and state is None and (experts or transposed or method != MAX):
            raise ValueError(
                f"rules: found none, and experts={experts!r}, transposed={transposed!r}, method={method!r}, which say "
                "how to quantize, wanted rules beside them"
            )
        given = _given(source, rules, layout, method, state, inputs, experts, transposed)
        return Job(source, target, given, method, engine, device, limit)


def _device(device: torch.device | str | None) -> torch.device:
    """Where to compute. Raises ValueError for no device, or one that is not here."""
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        where = torch.empty(0, device="cpu" if device is None else device).device
        said = "it holds no values"
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch's three ways to say so
        where, said = torch.device("meta"), str(error).splitlines()[0]
    if where.type == "meta":
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device: found {device!r}, wanted one of {here}: {said}")
    return where


class _Given(NamedTuple):
    """What is to be quantized, with the amax that is known before.

    Attributes:
        spec: Weights and inputs.
        state: Of those groups and inputs whose amax was given.
        exact: Keys of groups that take their scales from MXFP4.
    """

    spec: Spec
    state: State
    exact: frozenset[str]


def _given(
    source: Folder,
    rules: Rules | None,
    layout: Layout,
    method: Method,
    state: str | os.PathLike[str] | None,
    inputs: str | os.PathLike[str] | None,
    experts: str | Sequence[str],
    transposed: str | Sequence[str] | Mapping[str, bool],
) -> _Given:
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
    return _Given(spec, known, exact)


def _name(format: Format | None) -> str:
    return "no format" if format is None else format.name


def _is_exact(source: Folder, group: Group) -> bool:
    """True for NVFP4 out of MXFP4: a power of two is a scale of E4M3 too."""
    format = group.format
    is_nvfp4 = format.scale == "e4m3" and format.block == (1, 16) and format.min_scale == 2.0**-9
    stored = [source.encoded.get(name) for name in group.names]
    return is_nvfp4 and not format.unit_scale_below and all(one is not None and one.exponents for one in stored)


class Job:
    """A conversion, decided to the last byte.

    Attributes:
        plan: What becomes of each weight.
        pieces: In which it is done.
        device: Where to compute, once it has been started.
        exact: Of NVFP4 out of MXFP4: blocks that stand for the same weights, and all.
    """

    def __init__(
        self,
        source: Folder,
        target: Target,
        given: _Given,
        method: Method,
        engine: Any,
        device: torch.device | str | None,
        limit: int,
    ) -> None:
        self.source, self.target, self.given, self.method = source, target, given, method
        self._wanted, self._limit = device, limit
        self.device = torch.device("meta")  # until `start`
        self.params = source.params()
        self.plan = planned(target, engine, given.spec, self.params, source.config)
        known = [one if one.name in given.state else one._replace(group=None) for one in self.plan.sources]
        if target.schemes is not None:
            check_ties(known, given.state)
        check_values(self.plan._replace(state=given.state, sources=known), target)
        self.pieces = list(self._pieces())
        self.exact = [0, 0]
        self._lock = ThreadLock()

    def start(self) -> None:
        """Start the device, which takes a GPU seconds. Raises ValueError for none, or one that is not here."""
        with _named(self.source):
            self.device = _device(self._wanted)

    @cached_property
    def _types(self) -> dict[str, dict[str, tuple[TensorType, int]]]:
        # Not while the job is made: in formats other than the layout's own PyTorch imports its compiler for it.
        with _named(self.source):
            return {one.name: self._types_of(one) for one in self.plan.sources}

    @cached_property
    def written(self) -> dict[str, int]:
        """Bytes that each source becomes."""
        return {name: sum(size for _, size in types.values()) for name, types in self._types.items()}

    @cached_property
    def shards(self) -> list[Shard]:
        """What is written."""
        return lay_out({name: one for types in self._types.values() for name, one in types.items()}, self._limit)

    def _types_of(self, source: Any) -> dict[str, tuple[TensorType, int]]:
        """All tensors that a source becomes."""
        if source.group is None and source.name not in self.source.encoded:
            place = self.source.files.places[source.name]
            return {source.name: (place.type, place.size)}
        return types_of(self.plan, source, self.target)

    def _pieces(self) -> Iterator[Piece]:
        """Fused roles together, cut by experts; copies together."""
        fused = {one.name: [one] for one in self.plan.sources}
        if self.target.schemes is not None:
            for some in fused_sources(one for one in self.plan.sources if one.group and _has_number(one)):
                whole = list({one.name: one for each in some for one in fused[each.name]}.values())
                fused |= {one.name: whole for one in whole}
        copied: list[Any] = []
        size = 0
        taken: set[str] = set()
        for one in self.plan.sources:
            if one.name in taken:
                continue
            if one.group is None and one.name not in self.source.encoded:
                copied.append(one)
                size += self.source.size(one.name)
                if size >= PIECE_BYTES:
                    yield Piece(tuple(copied), 0, None, size)
                    copied, size = [], 0
                continue
            sources = tuple(fused[one.name])
            taken |= {each.name for each in sources}
            yield from self._cut(sources)
        if copied:
            yield Piece(tuple(copied), 0, None, size)

    def _cut(self, sources: tuple[Any, ...]) -> Iterator[Piece]:
        size = sum(self.source.size(name) for one in sources for name in (one.group.names if one.group else [one.name]))
        shape = self.params[sources[0].name].shape if sources[0].group is None else ()
        experts = sources[0].group.experts if sources[0].group else (shape[0] if len(shape) > 2 else 1)
        if experts == 1:
            yield Piece(sources, 0, None, size)
            return
        step = max(1, experts * PIECE_BYTES // max(1, size))
        for first in range(0, experts, step):
            count = min(step, experts - first)
            yield Piece(sources, first, count, size * count // experts)

    def convert(self, piece: Piece, writer: ShardWriter) -> None:
        """Read, quantize and write a piece. On a CPU expert by expert, which stays in caches."""
        if piece.sources[0].group is None:
            for one in piece.sources:
                if one.name not in self.source.encoded:
                    writer.copy(one.name, self.source.files.path_of(one.name), self.source.files.places[one.name].start)
                    continue
                for part in self._steps(piece):
                    writer.write(one.name, self.source.read(one.name, part, self.device), part.start if part else 0)
            return
        for part in self._steps(piece):
            self._quantize(piece.sources, part, writer)

    def spans(self, piece: Piece) -> Iterator[Span]:
        """The bytes that `convert` reads."""
        part = None if piece.experts is None else slice(piece.first, piece.first + piece.experts)
        for one in piece.sources:
            is_list = one.group is not None and not one.group.stacked
            names = one.group.names if one.group else (one.name,)
            for name in names[part] if is_list and part else names:
                yield from self.source.spans(name, None if is_list else part)

    def _steps(self, piece: Piece) -> list[slice | None]:
        """The experts that are in memory at a time."""
        if piece.experts is None:
            return [None]
        end, step = piece.first + piece.experts, 1 if self.device.type == "cpu" else piece.experts
        return [slice(first, min(first + step, end)) for first in range(piece.first, end, step)]

    def held(self, piece: Piece) -> int:
        """Bytes that a piece takes in memory at a time, about: weights as they come out, and what decoding makes."""
        first, part, held = piece.sources[0], self._steps(piece)[0], 0
        for one in piece.sources:
            for name in one.group.names if one.group else (one.name,):
                if self.device.type == "cuda":  # what is decoded is there
                    held += self.source.size(name)
                elif name in self.source.encoded:
                    held += 4 * self.params[name].nbytes
                elif one.group:
                    held += self.params[name].nbytes
        if part is None:
            return held
        return held * (part.stop - part.start) // (first.group.experts if first.group else len(self.params[first.name]))

    def _quantize(self, sources: Sequence[Any], part: slice | None, writer: ShardWriter) -> None:
        first = part.start if part else 0
        plan = self.read(sources, part)
        with _by_expert(plan.params, part):
            check_values(plan, self.target)
            for one in plan.sources:
                for name, tensor in tensors_of(plan, one, self.target, first):
                    writer.write(name, tensor, first if one.group and one.group.stacked else 0)

    def read(self, sources: Sequence[Any], part: slice | None) -> ExportPlan:
        """Weights of some sources, or of some experts of them, and their amax."""
        cut: list[Any] = [part_of(one, part) if part else one for one in sources]
        params: dict[str, Tensor] = {}
        for one in cut:
            names = one.group.names
            weights = self.source.read_all(names, part if one.group.stacked else None, self.device)
            params |= zip(names, weights, strict=True)
        with _by_expert(params, part):
            return self.plan._replace(params=params, state=self._state(cut, params, part), sources=cut)

    def _state(self, cut: Sequence[Any], params: Mapping[str, Tensor], part: slice | None) -> State:
        """The amax of some experts: given, or from their weights, and tied."""
        state: State = {}
        for one in cut:
            group: Group = one.group
            if known := self.given.state.get(one.name):
                state[group.key] = {
                    name: (leaf if part is None else leaf[part]).to(self.device) for name, leaf in known.items()
                }
            elif one.name in self.given.exact:
                state[group.key] = self._of_exponents(group, params, part)
            else:
                state |= calibrate(params, spec=Spec((group,)), method=self.method)
            if one.inputs:
                leaves = self.given.state[one.inputs.key]
                is_shared = not one.inputs.per_expert or part is None
                state[one.inputs.key] = {
                    name: (leaf if is_shared else leaf[part]).to(self.device) for name, leaf in leaves.items()
                }
        if self.target.schemes is not None:
            _tie(state, [one.group.key for one in cut if one.name not in self.given.state])
        self._count_exact([one.group for one in cut if one.name in self.given.exact], params, state)
        return state

    def _of_exponents(self, group: Group, params: Mapping[str, Tensor], part: slice | None) -> dict[str, Tensor]:
        """Scales of NVFP4 that are those of MXFP4: 2**e of each block under a power of two of the expert.

        E4M3 has the powers 2**-9 to 2**8, so blocks within 17 octaves of the expert's largest stand for the same
        weights.
        """
        own = [self.source.exponents(name, part if group.stacked else None) for name in group.names]
        e = torch.cat([one if group.stacked else one[None] for one in own if one is not None]).int() - 127
        e = e.to(self.device).repeat_interleave(32 // 16, -1)
        weights = [params[name] for name in group.names]
        largest, _ = expert_amax(weights, format=group.format, transposed=group.transposed)
        top = torch.where(largest > 0, e, -127).flatten(1).amax(1)
        if bool((top > EXPONENTS[1] + 8).any()):
            expert = int((top > EXPONENTS[1] + 8).nonzero()[0, 0])
            number = part.start if part else 0
            where = f"{group.names[0]!r}, expert {expert + number}" if group.stacked else repr(group.names[expert])
            raise ValueError(
                f"weight {where}: found MXFP4 of the exponent {int(top.max())}, wanted at most "
                f"{EXPONENTS[1] + 8}, whose NVFP4 has finite scales"
            )
        k = (top - 8).clamp(min=EXPONENTS[0])
        return {
            "amax": torch.where(largest > 0, 6 * power_of_two(e), 0.0),
            "global_amax": 2688 * power_of_two(k),
        }

    def _count_exact(self, groups: Sequence[Group], params: Mapping[str, Tensor], state: State) -> None:
        """Count blocks that stand for the same weights, under the amax that is written, tied or not."""
        for group in groups:
            weights = {name: params[name] for name in group.names}
            own = {group.key: state[group.key]}
            fakes = fakequant(weights, own, spec=Spec((group,)), out_dtype=torch.float32)
            same = [fakes[name] == weights[name] for name in group.names]
            same = [(one.mT if group.transposed else one).unflatten(-1, (-1, 16)).all(-1) for one in same]
            with self._lock:
                self.exact[0] += sum(int(one.sum()) for one in same)
                self.exact[1] += sum(one.numel() for one in same)

    def conversion(self, path: Path) -> Conversion:
        """What was, or is to be, done."""
        rows: dict[str, list[int]] = {}
        for one in self.plan.sources:
            names = one.group.names if one.group else (one.name,)
            was = sorted({self.source.encoded[name].format for name in names if name in self.source.encoded})
            now = one.group.format.name if one.group else "plain" if was else "as it is"
            row = rows.setdefault(f"{', '.join(was)} to {now}" if was else now, [0, 0, 0])
            row[0] += sum(self.params[name].numel() for name in names)
            row[1] += sum(self.source.size(name) for name in names)
            row[2] += self.written[one.name]
        return Conversion(
            source=self.source.path,
            destination=path,
            spec=self.given.spec,
            rows={name: (row[0], row[1], row[2]) for name, row in rows.items()},
            left=dict(self.source.left),
            shards=len(self.shards),
            copied=tuple(self.source.others()),
            exact=(self.exact[0], self.exact[1]) if self.exact[1] else None,
        )


@contextmanager
def _by_expert(params: Mapping[str, Tensor], part: slice | None) -> Generator[None, None, None]:
    """Let an error say which expert is not finite: in a part of a group it has another number."""
    try:
        yield
    except ValueError:
        for name, weight in params.items():
            check_finite(name, weight, part, str(weight.dtype))
        raise


def _has_number(source: Any) -> bool:
    """True if engines that fuse a role need it to share a number."""
    of_weights = any(len(shape) == 1 for shape in source.group.leaf_shapes.values())
    return of_weights or (source.inputs is not None and source.inputs.is_calibrated)


def _tie(state: State, keys: Sequence[str]) -> None:
    """Give groups of as many experts the larger amax of each, where it is one number."""
    for name in ("amax", "global_amax"):
        leaves = [state[key][name] for key in keys if name in state[key] and state[key][name].dim() == 1]
        if len(leaves) > 1:
            largest = torch.stack(leaves).amax(0)
            for key in keys:
                if name in state[key]:
                    state[key] = state[key] | {name: largest}


def _run(job: Job, path: Path, ranks: Ranks, jobs: int, resume: bool, mine: dict[int, Piece], ahead: Ahead) -> None:
    """Write the folder, with the other ranks."""
    stage = ranks.together(lambda: stage_of(path, _fingerprint(job)))
    ranks.check_same(str(stage), "src, dst and options")
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(_Stage(job, path, stage, resume)))
        ranks.together(lambda: _fill(job, path, stage, ranks, jobs, mine, ahead))
        job.exact = [sum(counts) for counts in zip(*ranks.gather(job.exact), strict=True)]
        ranks.on_first(lambda: _finish(job, path, stage))


class _Stage:
    """The directory in which a folder is made: new, or that of a run that was killed. Left if an error may be mended.

    Raises:
        ValueError: `path` is taken; to go on with there is only a part of another conversion.
        OSError: Another save to `path` is going on; the disk has too little space.
    """

    def __init__(self, job: Job, path: Path, stage: Path, resume: bool) -> None:
        self._path, self._stage, self._resume = path, stage, resume
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
            try:
                self._prepare(job)
            except BaseException:
                self._lock.release()
                raise

    def _prepare(self, job: Job) -> None:
        path, stage = self._path, self._stage
        check_free(path)
        (stage / FAILED).unlink(missing_ok=True)
        if self._resume and (stage / CONFIG).exists() and not {DONE, MOVING} & {one.name for one in stage.iterdir()}:
            _write_marks(stage, b"\1" * len(job.pieces))  # all was there but the name
        if self._resume and _has_marks(job, stage) and is_whole(stage, job.shards):
            _check_space(job, path, stage)
            return
        others = [one for one in _stages(path) if (one / DONE).exists() and one != stage]
        if self._resume and others:
            raise ValueError(
                f"resume: found {str(others[0])!r}, a part of another conversion to {str(path)!r}: of another source, "
                "or with other options; wanted those, or no resume, to begin anew"
            )
        _remove(path)
        _check_space(job, path, stage)
        try:
            stage.mkdir()
            ShardWriter(stage, job.shards).sync()
            _write_marks(stage, bytes(len(job.pieces)))
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Interrupted, it is left for the next run; so is what an error leaves, if somebody wants to go on.
        is_error = kind is not None and issubclass(kind, Exception) and not issubclass(kind, LostRankError)
        try:
            if is_error and not self._resume:
                _remove(self._path)
        finally:
            self._lock.release()


def _remove(path: Path) -> None:
    """Remove what runs have left; first that which says that it can be gone on with."""
    for stage in _stages(path):
        (stage / DONE).unlink(missing_ok=True)
    remove_staged(path)


def _write_marks(stage: Path, marks: bytes) -> None:
    with (stage / f"{DONE}.new").open("wb") as stream:
        stream.write(marks)
        fsync(stream)
    (stage / f"{DONE}.new").rename(stage / DONE)
    fsync_directory(stage)


def _has_marks(job: "Job", stage: Path) -> bool:
    return (stage / DONE).exists() and (stage / DONE).stat().st_size == len(job.pieces)


def _stages(path: Path) -> list[Path]:
    return [*stages_beside(path), *stages_within(path)]


def _check_space(job: Job, path: Path, stage: Path) -> None:
    others = sum((job.source.path / name).stat().st_size for name in job.source.others())
    here = [stage / shard.file for shard in job.shards]
    held = sum(512 * file.stat().st_blocks for file in here if file.exists())
    wanted = sum(shard.size for shard in job.shards) + others - held
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC, f"found {free:,} free bytes on its disk, wanted {wanted:,}; nothing was written", str(path)
        )


def _fingerprint(job: Job) -> str:
    """32 hex digits of all that the bytes depend on: of another source or another option they are others."""
    files = {place.file for place in job.source.files.places.values()}
    about_source = [name for name in (CONFIG, MODELOPT) if (job.source.path / name).exists()]
    stats = {name: (job.source.path / name).stat() for name in sorted({*files, *about_source, *job.source.others()})}
    about = [
        str(job.source.path),
        {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
        job.target.documents(job.plan),
        job.given.spec.to_json(),
        sorted(job.given.exact),
        repr(job.method),
        [(len(piece.sources), piece.first, piece.experts) for piece in job.pieces],
        {name: crc32_of(leaf) for name, leaf in flatten(job.given.state).items()},
    ]
    digest = hashlib.sha256(json.dumps(about).encode())
    for shard in job.shards:
        digest.update(shard.head)
    return digest.hexdigest()[:32]


def _mine(job: Job, ranks: Ranks) -> dict[int, Piece]:
    """This rank's share of the pieces, by number."""
    total, at = max(1, sum(piece.size for piece in job.pieces)), 0
    mine: dict[int, Piece] = {}
    for number, piece in enumerate(job.pieces):
        middle, at = at + piece.size // 2, at + piece.size
        if min(middle * ranks.size // total, ranks.size - 1) == ranks.rank:
            mine[number] = piece
    return mine


def _fill(job: Job, path: Path, stage: Path, ranks: Ranks, jobs: int, mine: Mapping[int, Piece], ahead: Ahead) -> None:
    """Convert this rank's pieces that are not on the disk yet."""
    done = (stage / DONE).read_bytes()
    left = [(number, piece) for number, piece in mine.items() if not done[number]]
    ahead.start(number for number in mine if done[number])
    with naming(path), ExitStack() as stack:
        writer = ShardWriter(stage, job.shards, is_new=False)
        marks = stack.enter_context(_Marks(stage / DONE, writer))
        what = job.source.path.name + (f", rank {ranks.rank}" if ranks.size > 1 else "")
        bar = stack.enter_context(bytes_bar(sum(piece.size for _, piece in left), what, ranks.rank))

        memory, failed, threads = _Memory(), stage / FAILED, torch.get_num_threads()

        def one(number: int, piece: Piece) -> None:
            if ranks.size > 1 and failed.exists():  # on another rank, which will say so
                return
            with _named(job.source), memory.of(job.held(piece)):
                job.convert(piece, writer)
            ahead.used(number)
            marks.add(number, piece.size)
            bar.update(piece.size)

        # More threads than cores take turns in the caches of a CPU: 64 on two were 2.5 times as slow as two.
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        count = min(jobs, cores) if job.device.type == "cpu" else jobs
        with ThreadPoolExecutor(count, initializer=_alone, initargs=(job.device,)) as pool:
            futures = [pool.submit(one, *entry) for entry in left]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except Exception:
                with suppress(OSError):  # the disk may be full; then the others end their share first
                    failed.touch()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)  # that of a thread is that of all later ones too


class _Memory:
    """Lets pieces wait for memory, whatever the number of threads. One that is too large goes by itself."""

    def __init__(self) -> None:
        self._free, self._changed = HELD_BYTES, Condition()

    @contextmanager
    def of(self, size: int) -> Generator[None]:
        """Hold so many bytes."""
        size = min(size, HELD_BYTES)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _alone(device: torch.device) -> None:
    """Let a thread compute by itself: with others that share each operation it is slower; on a GPU in a stream."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


class _Marks:
    """Which pieces are on the disk: a byte each, written once the pieces are."""

    def __init__(self, path: Path, writer: ShardWriter) -> None:
        self._writer, self._lock, self._syncing = writer, ThreadLock(), ThreadLock()
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._held: list[int] = []
        self._bytes = 0
        self._is_lost = False

    def __enter__(self) -> "_Marks":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync(self._held)
        finally:
            os.close(self._file)

    def add(self, number: int, size: int) -> None:
        with self._lock:
            self._held.append(number)
            self._bytes += size
            if self._bytes < SYNC_BYTES:
                return
            held, self._held, self._bytes = self._held, [], 0
        self._sync(held)  # for which the other threads need not wait

    def _sync(self, held: Sequence[int]) -> None:
        with self._syncing:  # one after another: what one has begun to sync is not there yet for the next
            try:
                self._writer.sync()
            except OSError:
                self._is_lost = True  # a system tells once what it could not write; no piece is known to be there then
                raise
            if self._is_lost:
                return
            for number in held:
                os.pwrite(self._file, b"\1", number)
            os.fdatasync(self._file)


def _finish(job: Job, path: Path, stage: Path) -> None:
    """Write what is beside the tensors, and let the folder appear."""
    with naming(path):
        job.source.copy_others(stage)
        index = index_of(job.shards)
        documents = job.target.documents(job.plan) | ({INDEX: index} if index else {})
        for name, document in documents.items():
            write_json(stage / name, document)
        assert all((stage / DONE).read_bytes()), "a piece was left out"
        commit(stage, path)
