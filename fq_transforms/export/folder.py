"""A folder to another, streamed: each piece is read, calibrated, quantized and written by itself, whatever the model's size.

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
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
    stages_within,
)
from fq_transforms.export.conversion import Conversion
from fq_transforms.export.files import INDEX, bytes_of, check_free, commit, remove_staged, write_json
from fq_transforms.export.plan import Target, check_values, planned, tensors_of, warn_of_notes
from fq_transforms.export.ranks import Ranks
from fq_transforms.export.readers import engine_of
from fq_transforms.export.save import LAYOUTS
from fq_transforms.export.shards import TensorType, Writer, index_of, lay_out, type_of
from fq_transforms.export.sources import Folder
from fq_transforms.export.states import in_files
from fq_transforms.export.ties import fused_sources
from fq_transforms.fakequant import fakequant
from fq_transforms.formats import FORMATS, Format, Layout, check_layout
from fq_transforms.methods import MAX, Max, Method
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.reference import power_of_two
from fq_transforms.rules import Rules
from fq_transforms.select import select
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State, flatten

__all__ = ["folder"]

# Bytes of a piece in the files that are read; a matrix may be larger.
PIECE_BYTES = 2**27
# Bytes of weights that threads hold in memory together.
HELD_BYTES = 2**30
# Bytes that are written before they are known to be on the disk, which a resumed run does not write again.
SYNC_BYTES = 2**30
DONE = ".done"
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
        ValueError: As `select` and `save`; `src` is no such folder; a weight is not finite; all but that before a write.
        OSError: A file cannot be read or written; the disk has too little space.
    """
    target, engine, limit = LAYOUTS[check_layout(layout)], engine_of(layout, reader), bytes_of(max_shard_size)
    count = _jobs(jobs)
    path = local_path(dst)
    with ExitStack() as stack:
        source = stack.enter_context(Folder(src))
        if path == source.path or source.path in path.parents:
            raise ValueError(f"dst {str(path)!r}: found a place within src, wanted another")
        given = _given(source, rules, layout, method, state, inputs, experts, transposed)
        job = _Job(source, target, given, method, engine, torch.device(device or _device()), limit)
        warn_of_notes(job.plan, target, stacklevel=3)
        if not dry_run:
            ranks = stack.enter_context(Ranks())
            _run(job, path, ranks, count, resume)
        return job.conversion(path)


def _jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(8, os.cpu_count() or 1)
    if type(jobs) is not int or jobs < 1:
        raise ValueError(f"jobs: found {jobs!r}, wanted a number of threads, 1 or more")
    return jobs


def _device() -> str:
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


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
    known: State = {}
    if state is not None:
        spec, known = in_files(state, params, source.config)
        if rules is not None:
            chosen = select(params, rules, experts=experts, transposed=transposed)
            ours, theirs = ({group.key: group.format for group in one.all_groups} for one in (chosen, spec))
            if ours != theirs:
                key = sorted(ours.items() ^ theirs.items(), key=str)[0][0]
                raise ValueError(
                    f"state {str(state)!r}: found {key!r} in {_name(theirs.get(key))}, and rules that say "
                    f"{_name(ours.get(key))}, wanted the same of both; leave the rules out"
                )
    elif rules:
        spec = select(params, rules, experts=experts, transposed=transposed).for_layout(layout)
    else:
        spec = Spec(())
    if calibrated := [one for one in spec.inputs if one.is_calibrated and one.key not in known]:
        if inputs is None:
            raise ValueError(
                f"inputs {calibrated[0].key!r}: found no amax for {calibrated[0].format.name} and {len(calibrated) - 1} "
                "more, wanted inputs=, a checkpoint of a state that was calibrated with batches; or rules of weights "
                "alone, such as fqt.presets.weights_only(rules)"
            )
        _, of_inputs = in_files(inputs, params, source.config)
        for one in calibrated:
            if one.key not in of_inputs:
                raise ValueError(
                    f"inputs {str(inputs)!r}: found no {one.key!r}, wanted an amax for it, among "
                    f"{sorted(key for key in of_inputs if key.endswith('.input'))[:3]}"
                )
            known[one.key] = of_inputs[one.key]
    known |= {one.key: {} for one in spec.inputs if not one.is_calibrated}
    check_method(method, spec) if state is None else None
    exact = frozenset[str]()
    if isinstance(method, Max) and state is None:
        exact = frozenset(group.key for group in spec.groups if _is_exact(source, group))
        spec = replace(spec, groups=tuple(_static(group) if group.key in exact else group for group in spec.groups))
    return _Given(spec, known, exact)


def _name(format: Format | None) -> str:
    return "no format" if format is None else format.name


def _is_exact(source: Folder, group: Group) -> bool:
    """True for NVFP4 out of MXFP4: a power of two is a scale of E4M3 too."""
    format = group.format
    is_nvfp4 = format.scale == "e4m3" and format.block == (1, 16) and format.min_scale == 2.0**-9
    stored = [source.encoded.get(name) for name in group.names]
    return is_nvfp4 and not format.unit_scale_below and all(one is not None and one.exponents for one in stored)


def _static(group: Group) -> Group:
    """The same with scales in its state, as NVFP4_STATIC has them."""
    name = group.format.name.replace("NVFP4", "NVFP4_STATIC", 1) if group.format.dynamic else group.format.name
    static = replace(group.format, dynamic=False, name=name)
    return replace(group, format=next((known for known in FORMATS.values() if known == static), static))


class _Job:
    """A conversion, decided to the last byte.

    Attributes:
        plan: What becomes of each weight.
        pieces: In which it is done.
        written: Bytes that each source becomes.
        shards: What is written.
        exact: Of NVFP4 out of MXFP4: blocks that stand for the same weights, and all.
    """

    def __init__(
        self,
        source: Folder,
        target: Target,
        given: _Given,
        method: Method,
        engine: Any,
        device: torch.device,
        limit: int,
    ) -> None:
        self.source, self.target, self.given, self.method, self.device = source, target, given, method, device
        self.params = source.params()
        self.plan = planned(target, engine, given.spec, self.params, source.config)
        types = {one.name: self._types_of(one) for one in self.plan.sources}
        self.written = {name: sum(size for _, size in of_source.values()) for name, of_source in types.items()}
        self.shards = lay_out({name: one for of_source in types.values() for name, one in of_source.items()}, limit)
        self.pieces = list(self._pieces())
        self.exact = [0, 0]
        self._lock = ThreadLock()

    def _types_of(self, source: Any) -> dict[str, tuple[TensorType, int]]:
        """All tensors that a source becomes: what comes out for weights on the meta device."""
        group: Group | None = source.group
        if group is None and source.name not in self.source.encoded:
            place = self.source.files.places[source.name]
            return {source.name: (place.type, place.size)}
        if group is None or self.target.encode is None:
            dtype = self.plan.dtype if group else self.source.dtype
            likes = {name: self.params[name].to(dtype) for name in (group.names if group else [source.name])}
            return {name: (type_of(like), like.nbytes) for name, like in likes.items()}
        state = {one.key: _meta(one) for one in (group, source.inputs) if one}
        tensors = tensors_of(self.plan._replace(state=state), source, self.target)
        return {name: (type_of(tensor), tensor.nbytes) for name, tensor in tensors}

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

    def convert(self, piece: Piece, writer: Writer) -> None:
        """Read, quantize and write a piece. On a CPU expert by expert, which stays in caches."""
        if piece.sources[0].group is None:
            for one in piece.sources:
                if one.name not in self.source.encoded:
                    writer.copy(one.name, self.source.files.path_of(one.name), self.source.files.places[one.name].start)
                    continue
                for part in self._steps(piece):
                    writer.write(one.name, self.source.read(one.name, part), part.start if part else 0)
            return
        for part in self._steps(piece):
            self._quantize(piece.sources, part, writer)

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
                if name in self.source.encoded:
                    held += 4 * self.params[name].nbytes
                elif one.group:
                    held += self.params[name].nbytes
        experts = first.group.experts if first.group else len(self.params[first.name])
        return held if part is None else held * (part.stop - part.start) // experts

    def _quantize(self, sources: Sequence[Any], part: slice | None, writer: Writer) -> None:
        first = part.start if part else 0
        cut = [_part_of(one, part) for one in sources]
        params: dict[str, Tensor] = {}
        for one in cut:
            for name in one.group.names:
                params[name] = self.source.read(name, part if one.group.stacked else None).to(self.device)
        state = self._state(cut, params, part)
        plan = self.plan._replace(params=params, state=state, sources=cut)
        check_values(plan, self.target)
        for one in cut:
            for name, tensor in tensors_of(plan, one, self.target, first):
                writer.write(name, tensor, first if one.group.stacked else 0)

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
                state[group.key] = self._exact(group, params, part)
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
            _tie(state, [one.inputs.key for one in cut if one.inputs])
        return state

    def _exact(self, group: Group, params: Mapping[str, Tensor], part: slice | None) -> dict[str, Tensor]:
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
        k = (top - 8).clamp(*EXPONENTS)
        block = torch.where(largest > 0, 6 * power_of_two(e), 0.0)
        leaves = {"amax": block, "global_amax": 2688 * power_of_two(k)}
        spec = Spec((group,))
        fakes = fakequant(params, {group.key: leaves}, spec=spec, out_dtype=torch.float32)
        same = [fakes[name] == params[name] for name in group.names]
        same = [(one.mT if group.transposed else one).unflatten(-1, (-1, 16)).all(-1) for one in same]
        with self._lock:
            self.exact[0] += sum(int(one.sum()) for one in same)
            self.exact[1] += sum(one.numel() for one in same)
        return leaves

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
            exact=(self.exact[0], self.exact[1]) if self.given.exact else None,
        )


def _has_number(source: Any) -> bool:
    """True if engines that fuse a role need it to share a number."""
    of_weights = any(len(shape) == 1 for shape in source.group.leaf_shapes.values())
    return of_weights or (source.inputs is not None and source.inputs.is_calibrated)


def _meta(group: Group) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=torch.float64 if name == "tokens" else torch.float32, device="meta")
        for name, shape in group.leaf_shapes.items()
    }


def _part_of(source: Any, part: slice | None) -> Any:
    """A source with some of its experts."""
    if part is None:
        return source
    group, count = source.group, part.stop - part.start
    if group.stacked:
        return source._replace(group=replace(group, experts=count), experts=count)
    numbers = f"{part.start}" if count == 1 else f"{part.start}-{part.stop - 1}"
    key, names = group.key.replace("*", numbers), group.names[part]
    return source._replace(group=replace(group, key=key, names=names, experts=count), experts=count)


def _tie(state: State, keys: Sequence[str]) -> None:
    """Give groups of as many experts the larger amax of each, where it is one number."""
    for name in ("amax", "global_amax"):
        leaves = [state[key][name] for key in keys if name in state[key] and state[key][name].dim() == 1]
        if len(leaves) > 1:
            largest = torch.stack(leaves).amax(0)
            for key in keys:
                if name in state[key]:
                    state[key] = state[key] | {name: largest}


def _run(job: _Job, path: Path, ranks: Ranks, jobs: int, resume: bool) -> None:
    """Write the folder, with the other ranks."""
    stage = stage_of(path, _fingerprint(job))
    with ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(_Stage(job, path, stage, resume)), only_first=True)
        ranks.together(lambda: _fill(job, stage, ranks, jobs))
        ranks.together(lambda: _finish(job, path, stage), only_first=True)


class _Stage:
    """The directory in which a folder is made: new, or that of a run that was killed. Left if an error may be mended.

    Raises:
        ValueError: `path` is taken; to go on with there is only a part of another conversion.
        OSError: Another save to `path` is going on; the disk has too little space.
    """

    def __init__(self, job: _Job, path: Path, stage: Path, resume: bool) -> None:
        self._path, self._stage, self._resume = path, stage, resume
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(path)
            try:
                self._prepare(job)
            except BaseException:
                self._lock.release()
                raise

    def _prepare(self, job: _Job) -> None:
        path, stage = self._path, self._stage
        check_free(path)
        if self._resume and (stage / DONE).exists():
            _check_space(job, path, stage)
            return
        others = [one for one in _stages(path) if (one / DONE).exists()]
        if self._resume and others:
            raise ValueError(
                f"resume: found {str(others[0])!r}, a part of another conversion to {str(path)!r}: of another source, "
                "or with other options; wanted those, or no resume, to begin anew"
            )
        remove_staged(path)
        _check_space(job, path, stage)
        try:
            stage.mkdir()
            with Writer(stage, job.shards) as writer:
                writer.sync()
            with (stage / f"{DONE}.new").open("xb") as stream:
                stream.write(bytes(len(job.pieces)))
                fsync(stream)
            (stage / f"{DONE}.new").rename(stage / DONE)
            fsync_directory(stage)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Interrupted, it is left for the next run; so is what an error leaves, if somebody wants to go on.
        if kind is not None and issubclass(kind, Exception) and not self._resume:
            remove_staged(self._path)
            shutil.rmtree(self._stage, ignore_errors=True)
        self._lock.release()


def _stages(path: Path) -> list[Path]:
    beside = [one for one in path.parent.glob(f".{path.name}.saving-*") if one.is_dir()]
    return [*beside, *stages_within(path)]


def _check_space(job: _Job, path: Path, stage: Path) -> None:
    others = sum((job.source.path / name).stat().st_size for name in job.source.others())
    here = [stage / shard.file for shard in job.shards]
    held = sum(512 * file.stat().st_blocks for file in here if file.exists())
    wanted = sum(shard.size for shard in job.shards) + others - held
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC, f"found {free:,} free bytes on its disk, wanted {wanted:,}; nothing was written", str(path)
        )


def _fingerprint(job: _Job) -> str:
    """32 hex digits of all that the bytes depend on: of another source or another option they are others."""
    files = {place.file for place in job.source.files.places.values()}
    stats = {name: (job.source.path / name).stat() for name in sorted({*files, *job.source.others()})}
    about = [
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


def _fill(job: _Job, stage: Path, ranks: Ranks, jobs: int) -> None:
    """Convert this rank's pieces that are not on the disk yet."""
    done = (stage / DONE).read_bytes()
    total = sum(piece.size for piece in job.pieces)
    mine: list[tuple[int, Piece]] = []
    at = 0
    for number, piece in enumerate(job.pieces):
        middle, at = at + piece.size // 2, at + piece.size
        if middle * ranks.size // max(1, total) == ranks.rank and not done[number]:
            mine.append((number, piece))
    with ExitStack() as stack:
        writer = stack.enter_context(Writer(stage, job.shards, is_new=False))
        marks = stack.enter_context(_Marks(stage / DONE, writer))
        bar = stack.enter_context(_bar(sum(piece.size for _, piece in mine), job, ranks))

        memory = _Memory()

        def one(number: int, piece: Piece) -> None:
            with memory.of(job.held(piece)):
                job.convert(piece, writer)
            marks.add(number, piece.size)
            bar.update(piece.size)

        with torch.no_grad(), ThreadPoolExecutor(jobs, initializer=_alone) as pool:
            futures = [pool.submit(one, *entry) for entry in mine]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)


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


def _alone() -> None:
    """Let a thread compute by itself: with others that share each operation it is slower, even one job."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class _Marks:
    """Which pieces are on the disk: a byte each, written once the pieces are."""

    def __init__(self, path: Path, writer: Writer) -> None:
        self._writer, self._lock = writer, ThreadLock()
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._held: list[int] = []
        self._bytes = 0

    def __enter__(self) -> "_Marks":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync()
        finally:
            os.close(self._file)

    def add(self, number: int, size: int) -> None:
        with self._lock:
            self._held.append(number)
            self._bytes += size
            if self._bytes >= SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        self._writer.sync()
        for number in self._held:
            os.pwrite(self._file, b"\1", number)
        os.fdatasync(self._file)
        self._held, self._bytes = [], 0


def _bar(total: int, job: _Job, ranks: Ranks) -> Any:
    """Bytes that were read, on standard error."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("export needs tqdm: pip install 'fq_transforms[export]'") from error
    what = job.source.path.name + (f", rank {ranks.rank}" if ranks.size > 1 else "")
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5, position=ranks.rank)


def _finish(job: _Job, path: Path, stage: Path) -> None:
    """Write what is beside the tensors, and let the folder appear."""
    with naming(path):
        for name in job.source.others():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(job.source.path / name, stage / name)
            with (stage / name).open("rb") as stream:
                os.fsync(stream.fileno())
        index = index_of(job.shards)
        documents = job.target.documents(job.plan) | ({INDEX: index} if index else {})
        for name, document in documents.items():
            write_json(stage / name, document)
        (stage / DONE).unlink()
        fsync_directory(stage)
        commit(stage, path)
