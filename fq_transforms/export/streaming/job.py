"""A conversion that is decided to the last byte: its pieces, and how each is read, quantized and written."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.calibrate import calibrate
from fq_transforms.export.files.shards import Shard, ShardWriter, TensorType, lay_out
from fq_transforms.export.layouts.encoded import check_finite
from fq_transforms.export.layouts.plan import ExportPlan, Target, check_values, part_of, planned, tensors_of, types_of
from fq_transforms.export.names.ties import check_ties, fused_sources
from fq_transforms.export.streaming.ahead import Span
from fq_transforms.export.streaming.conversion import Conversion
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.fakequant import fakequant
from fq_transforms.methods import Method
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.reference import power_of_two
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State

__all__ = ["Given", "Job", "Piece", "named"]

# Bytes of a piece in the files that are read; a matrix may be larger. Pinned memory comes in powers of two: with what
# aligns its tensors a piece takes 2**27.
PIECE_BYTES = 120 * 2**20
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


class Given(NamedTuple):
    """What is to be quantized, with the amax that is known before.

    Attributes:
        spec: Weights and inputs.
        state: Of those groups and inputs whose amax was given.
        exact: Keys of groups that take their scales from MXFP4.
    """

    spec: Spec
    state: State
    exact: frozenset[str]


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
        given: Given,
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
        with named(self.source):
            self.device = _device(self._wanted)

    @cached_property
    def _types(self) -> dict[str, dict[str, tuple[TensorType, int]]]:
        # Not while the job is made: reading ahead begins before.
        with named(self.source):
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
        own = [one.group for one in cut if one.name not in self.given.state]
        for format in {group.format for group in own}:  # plain weights of fused roles may be of several
            _tie(state, [group.key for group in own if group.format == format])
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
def named(source: Folder) -> Generator[None, None, None]:
    """Let each ValueError inside say which folder it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"folder {str(source.path)!r}: {error}") from error


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
