"""Sharded checkpoints on torch.distributed.checkpoint (DCP), of a state or packed weights: any sharding to any other.

    checkpoint.save(path, fq, state)
    state = checkpoint.load(path, fq, like=fq.init(params))

    checkpoint.save(path, fq, packed)
    packed = checkpoint.load(path, fq, like=fq.pack(params, fq.init(params)))        # params on meta

DCP moves the bytes, and its own collectives are the only ones. What ranks must agree on travels with the plans that DCP
gathers and scatters anyway. Each check runs inside one of DCP's steps, which raise on every rank what any rank found.
"""

import os
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fq_transforms.checkpoint.dcp_files import Reader, ReplacedError, Writer, read_metadata
from fq_transforms.checkpoint.manifest import (
    KINDS,
    Kind,
    check_groups,
    check_kind,
    check_no_others,
    check_stored_leaves,
    describe,
    from_bytes,
    joined,
    kind_of,
    may_replace,
    spec_in,
    to_bytes,
)
from fq_transforms.checkpoint.storage import crc32_of, in_threads, local_path, named
from fq_transforms.dtensor import local_values, position, spread_of
from fq_transforms.pack import PackedTree
from fq_transforms.spec import Spec
from fq_transforms.state import State, flatten, unflatten
from fq_transforms.transform import Transform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["load", "read_spec", "save"]

# The most bytes of a chunk that holds several experts. It is read whole for any of them, and its memory is used again
# for the next: chunks of 64 MiB were read at a third of the speed of 16 MiB, those of 4 MiB no faster.
CHUNK_BYTES = 2**24

# How often a load begins that saves overtake.
ATTEMPTS = 5


def save(
    path: str | os.PathLike[str],
    fq: Transform,
    tree: State | PackedTree,
    *,
    process_group: "ProcessGroup | None" = None,
) -> None:
    """Store a state or packed weights: `load(path, fq, like=tree)` gives the tree, whoever holds which part of it.

    Every rank of the process group calls it, with the same path on a file system that all ranks see. The checkpoint
    appears whole or not at all. What is stored, and how: docs/checkpoints.

    Args:
        path: A new name, an empty directory, or a checkpoint of the same kind, which is replaced. Not a URI.
        fq: Its spec is stored too; it may be each rank's own, as with pipeline stages.
        tree: From `calibrate` or `pack`. Leaves are DTensors, or plain tensors that are the same on all ranks.
        process_group: The ranks that save; all if None. Without torch.distributed, this process.

    Raises:
        KeyError: A group is missing.
        ValueError: The tree does not fit the spec; an amax is NaN, infinite, negative or uncalibrated; a DTensor is
            Partial; copies of a part differ between ranks; the path holds something else. The same on every rank.
        OSError: The path cannot be written, or another save to it is going on.

    Example:
        >>> import tempfile, fq_transforms as fqt
        >>> params = {"experts.0.weight": torch.ones(8, 4), "experts.1.weight": torch.zeros(8, 4)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/step1", fq, fq.calibrate(params))
        ...     load(f"{folder}/step1", fq, like=fq.init(params))
        {'experts.*.weight': {'amax': tensor([1., 0.])}}
    """
    target = local_path(path)
    no_dist = not _is_distributed()
    ranks = [0] if no_dist else torch.distributed.get_process_group_ranks(process_group)
    kind = kind_of(tree)
    writer = Writer(target, is_ours=lambda metadata: may_replace(metadata, kind))
    planner = _SavePlanner(tree, fq.spec, ranks)
    try:
        with _errors_of(target):
            dcp_save({}, storage_writer=writer, planner=planner, process_group=process_group, no_dist=no_dist)
    except BaseException:
        writer.discard()
        raise


def load(
    path: str | os.PathLike[str],
    fq: Transform,
    *,
    like: State | PackedTree,
    device: torch.device | str | None = None,
    process_group: "ProcessGroup | None" = None,
) -> State | PackedTree:
    """The state or packed weights that `save` stored at `path`: a new tree, structured and sharded as `like` is.

    Every rank of the process group calls it; each reads the parts it needs, and their checksums are verified.

    Args:
        path: A directory that `save` wrote.
        fq: Its groups, formats, experts and shapes must be those stored; of several ranks, all of theirs together.
        like: `fq.init(params)`, `fq.pack(params, fq.init(params))` of meta parameters, or any other tree of the kind.
            Its devices, mesh and placements are wanted; its values are not read.
        device: Where the leaves go; that of `like` if None, and for a meta `like` the CPU or the device of the mesh.
        process_group: The ranks that load; all if None. Without torch.distributed, this process.

    Raises:
        KeyError: A group is missing in `like`.
        ValueError: The path is no checkpoint, or of the other kind; a group or leaf is missing, unexpected or
            different; a file is damaged; an amax is NaN, infinite or negative. The same on every rank.
        OSError: There is nothing at the path, or it cannot be read.

    Example:
        >>> load("/nowhere", Transform(Spec(())), like={})  # what it loads: see `save`
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] checkpoint '/nowhere': there is nothing, wanted a checkpoint: '/nowhere'
    """
    target = local_path(path)
    left = ATTEMPTS
    while True:
        planner, left = _LoadPlanner(like, fq.spec, device), left - 1
        try:
            with _errors_of(target):
                dcp_load(
                    {},
                    storage_reader=Reader(target),
                    planner=planner,
                    process_group=process_group,
                    no_dist=not _is_distributed(),
                )
            return unflatten(planner.leaves, like)
        except ReplacedError:  # on all ranks alike
            if not left:
                raise


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec stored in the checkpoint at `path`; of several ranks, all of their groups. Reads only the metadata.

    Raises:
        ValueError: The path is no checkpoint that `save` wrote, or is damaged.
        OSError: There is nothing at the path, or it cannot be read.
    """
    target = local_path(path)
    with _errors_of(target):
        return spec_in(read_metadata(target))


class _RankInfo(NamedTuple):
    """What each rank tells the coordinator, beside its plan."""

    kind: str
    spec: bytes
    # crc32 of each chunk that it holds; None for one that no other rank may hold
    sums: dict[MetadataIndex, int | None]
    mappings: Any


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, tree: State | PackedTree, spec: Spec, ranks: list[int]) -> None:
        super().__init__()
        self._tree, self._kind, self._spec, self._ranks = tree, kind_of(tree), spec, ranks
        self._chunks: dict[MetadataIndex, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._kind.check(self._tree, self._spec)
        leaves = flatten(self._tree)
        for name, leaf in leaves.items():
            _check_is_box(f"{self._kind.name} {name!r}", leaf)
        super().set_up_planner(leaves, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        _settle(self.state_dict.values())
        items: list[WriteItem] = []
        for item in plan.items:
            local = super().resolve_data(item)
            assert isinstance(local, Tensor), "a tree has only tensors"
            for chunk, start in _chunks_of(item):
                assert chunk.tensor_data is not None
                self._chunks[chunk.index] = local[start : start + chunk.tensor_data.chunk.sizes[0]]
                items.append(chunk)
        info = _RankInfo(self._kind.name, to_bytes(self._spec), self._sums(), plan.planner_data)
        self.plan = replace(plan, items=items, planner_data=info)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._chunks[write_item.index]

    def _sums(self) -> dict[MetadataIndex, int | None]:
        """What another rank's copies are compared by."""
        own = {name for name, leaf in self.state_dict.items() if _is_spread_over(leaf, self._ranks)}
        sums: dict[MetadataIndex, int | None] = dict.fromkeys(self._chunks)
        asked = [index for index, chunk in self._chunks.items() if index.fqn not in own or not chunk.numel()]
        chunks = [self._chunks[index] for index in asked]
        return sums | dict(zip(asked, in_threads(crc32_of, chunks, sum(c.nbytes for c in chunks)), strict=True))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        infos: list[_RankInfo] = [plan.planner_data for plan in all_plans]
        _check_one_kind([rank.kind for rank in infos])
        _check_copies(self._kind, [rank.sums for rank in infos])
        first: dict[bytes, int] = {}
        for number, rank in enumerate(infos):
            first.setdefault(rank.spec, number)
        spec = joined({number: from_bytes(content) for content, number in first.items()})
        plans = [replace(plan, planner_data=rank.mappings) for plan, rank in zip(all_plans, infos, strict=True)]
        plans, metadata = super().create_global_plan(plans)
        metadata.planner_data = {**metadata.planner_data, **describe(spec, self._kind)}
        return plans, metadata


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, like: Any, spec: Spec, device: torch.device | str | None) -> None:
        super().__init__()
        self._like, self._kind, self._spec, self._device = like, kind_of(like), spec, device
        self.leaves: dict[str, Tensor] = {}
        self._unread = 0

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._kind.check(self._like, self._spec, values=False)
        for name, leaf in flatten(self._like).items():
            _check_is_box(f"{self._kind.name} {name!r}", leaf)
        self.leaves = {
            name: torch.empty_like(leaf, device=_device(leaf, self._device), requires_grad=False)
            for name, leaf in flatten(self._like).items()
        }
        _settle(self.leaves.values())
        super().set_up_planner(self.leaves, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = spec_in(self.metadata)
        check_kind(self.metadata, self._kind)
        check_groups(stored, self._spec)
        check_stored_leaves(self.metadata, self._kind.leaves_of(stored))
        plan = super().create_local_plan()
        plan.planner_data = tuple(group.key for group in self._spec.all_groups)
        return plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        check_no_others(spec_in(self.metadata), {key for plan in global_plan for key in plan.planner_data})
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self._unread = len(new_plan.items)
        return super().finish_plan(new_plan)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Called for each item that is read. After the last the values are checked, while DCP still tells all ranks."""
        self._unread -= 1
        if not self._unread:
            self._kind.check(unflatten(self.leaves, self._like), self._spec)


def _check_is_box(what: str, leaf: Tensor) -> None:
    """Raise ValueError unless this rank's part of a leaf is a box of final numbers: others DCP would store wrongly."""
    spread = spread_of(leaf)
    if spread is None:
        return
    placements = spread[1]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{what}: found a DTensor with placements {placements}, wanted Shard or Replicate; redistribute it"
        )
    shape = local_values(leaf).shape
    if shape.numel() and any(type(placement).__name__ == "_StridedShard" for placement in placements):
        first, last = position(leaf, [0] * len(shape)), position(leaf, [size - 1 for size in shape])
        if any(b - a + 1 != size for a, b, size in zip(first, last, shape, strict=True)):
            raise ValueError(
                f"{what}: found a DTensor with placements {placements}, whose shards have gaps, wanted shards in one "
                "piece; redistribute it"
            )


def _chunks_of(item: WriteItem) -> list[tuple[WriteItem, int]]:
    """A rank's part of a leaf in chunks of at most `CHUNK_BYTES`, each with the first of its experts there.

    Experts are whole, and their number in a chunk is a power of two, so that a rank at another expert parallelism finds
    the bounds of its shard between two chunks.
    """
    assert item.tensor_data is not None
    whole, itemsize = item.tensor_data.chunk, item.tensor_data.properties.dtype.itemsize
    count, *others = whole.sizes
    step = 2 ** max(0, (CHUNK_BYTES // max(1, prod(others) * itemsize)).bit_length() - 1)
    if count <= step:
        return [(item, 0)]
    chunks: list[tuple[WriteItem, int]] = []
    for start in range(0, count, step):
        offsets = torch.Size([whole.offsets[0] + start, *whole.offsets[1:]])
        chunk = ChunkStorageMetadata(offsets, torch.Size([min(step, count - start), *others]))
        index = MetadataIndex(item.index.fqn, offsets)
        data = replace(item.tensor_data, chunk=chunk)
        chunks.append((WriteItem(index, WriteItemType.SHARD, tensor_data=data), start))
    return chunks


def _settle(leaves: Iterable[Tensor]) -> None:
    """Wait for what the caller's streams still do in the memory of leaves: threads have streams of their own."""
    for device in {leaf.device for leaf in leaves if leaf.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _is_spread_over(leaf: Tensor, ranks: list[int]) -> bool:
    """True if each of these ranks holds a part of the leaf that no other of them holds."""
    spread = spread_of(leaf)
    if spread is None:
        return len(ranks) == 1
    mesh, placements = spread
    return all(placement.is_shard() for placement in placements) and {*ranks} <= {*mesh.mesh.flatten().tolist()}


def _check_one_kind(ranks: list[str]) -> None:
    for rank, kind in enumerate(ranks):
        if kind != ranks[0]:
            raise ValueError(
                f"found {KINDS[ranks[0]].noun} on rank 0 and {KINDS[kind].noun} on rank {rank}, wanted one kind"
            )


def _check_copies(kind: Kind, ranks: list[dict[MetadataIndex, int | None]]) -> None:
    """Raise ValueError if ranks hold different numbers for one part of a leaf: DCP would store one of them."""
    first: dict[MetadataIndex, tuple[int, int | None]] = {}
    for rank, sums in enumerate(ranks):
        for index, found in sums.items():
            owner, wanted = first.setdefault(index, (rank, found))
            if owner != rank and (found is None or found != wanted):
                raise ValueError(
                    f"{kind.name} {index.fqn!r}: found different values on ranks {owner} and {rank}, wanted the same "
                    "or DTensors that say which part each rank holds; for the experts of Megatron and Transformer "
                    "Engine use checkpoint.megatron, for a part of a maximum sync first"
                )


def _device(leaf: Tensor, device: torch.device | str | None) -> torch.device | str:
    if device is not None or not leaf.is_meta:
        return device or leaf.device
    spread = spread_of(leaf)
    return "cpu" if spread is None else spread[0].device_type


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _errors_of(path: Path) -> Generator[None, None, None]:
    """Raise what DCP has gathered from the ranks as the error that the first of them met, with the path in front."""
    what = f"checkpoint {str(path)!r}"
    with warnings.catch_warnings():
        # One process without a process group is a case like any other.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as failed:
            failures = sorted(failed.failures.items(), key=lambda failure: failure[0])
            replaced = [failure for failure in failures if isinstance(failure[1][0], ReplacedError)]
            rank, (error, _) = (replaced or failures)[0]
            where = f", rank {rank}" if _is_distributed() else ""
            raise _error(error, what + where, path) from failed
        except (ValueError, OSError) as error:
            raise _error(error, what, path) from error


def _error(error: BaseException, what: str, path: Path) -> BaseException:
    if isinstance(error, ReplacedError):
        return ReplacedError(error.errno, f"{what}: {error.strerror}", str(path))
    if isinstance(error, OSError):
        return named(error, path, f"{what}: {error.strerror or error}")
    if isinstance(error, KeyError):
        return KeyError(f"{what}: {error.args[0]}")
    if isinstance(error, ValueError):
        return ValueError(f"{what}: {error}")
    if isinstance(error, Exception):
        return ValueError(f"{what}: {type(error).__name__}: {error}")
    return error
