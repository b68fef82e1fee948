"""Sharded checkpoints, on torch.distributed.checkpoint (DCP): of a state or packed weights, any sharding to any other.

    checkpoint.save(state, path, spec=spec)
    state = checkpoint.load(path, like=fq.init(params), spec=spec)

    checkpoint.save(packed, path, spec=spec)
    packed = checkpoint.load(path, like=fq.pack(params, fq.init(params)), spec=spec)        # params on meta

DCP moves the bytes, and its own collectives are the only ones. What ranks must agree on travels with the plans that DCP
gathers and scatters anyway, and each check is made inside one of DCP's steps, which raise on every rank what any found.
"""

import os
import warnings
import zlib
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

from fq_transforms.checkpoint.contents import check_groups, check_no_others, joined, named
from fq_transforms.checkpoint.described import (
    check_complete,
    check_kind,
    check_stored_leaves,
    describe,
    may_replace,
    spec_in,
    squeezed,
    unsqueezed,
)
from fq_transforms.checkpoint.storage import Reader, Writer, in_threads, read_metadata
from fq_transforms.checkpoint.trees import KINDS, Kind, Tree, kind_of
from fq_transforms.dtensor import local_values, position, spread_of
from fq_transforms.pack import PackedTree
from fq_transforms.spec import Spec
from fq_transforms.state import State, flatten, unflatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["load", "read_spec", "save"]

# The most bytes of a part that holds several experts. It is read whole for any of them, and its memory is used again
# for the next: parts of 64 MiB were read at a third of the speed of 16 MiB, those of 4 MiB no faster.
PART = 2**24


def save(
    tree: State | PackedTree,
    path: str | os.PathLike[str],
    *,
    spec: Spec,
    process_group: "ProcessGroup | None" = None,
) -> None:
    """Store a state or packed weights: `load(path, like=tree, spec=spec)` is the tree, whoever holds which part of it.

    Each leaf is stored under its flat name, `{group key}.{field}`, in its shape [E, ...] and dtype, once: of parts that
    several ranks hold, one writes. Leaves are DTensors, or plain tensors that are the same on all ranks; the spec may
    be each rank's own, as with pipeline stages, and is stored too. Every rank of the process group calls it, with the
    same path on a file system that all of them see; one save at a time to a path. Paths in a cloud (`s3://`) are out of
    scope.

    The checkpoint appears whole or not at all: after an error, a full disk or a killed rank there is nothing at a new
    path, and the previous checkpoint at the path of one, which is replaced. Other files in its directory are kept.

    Args:
        tree: From `calibrate`, or from `pack`. An amax of 0 is stored like any other, an uncalibrated one is refused.
        path: A new name, an empty directory, or a checkpoint of the same kind, a state's or one of packed weights.
        spec: From `select`.
        process_group: The ranks that save; all if None. Without torch.distributed, this process.

    Raises:
        KeyError: A group is missing.
        ValueError: The tree does not fit the spec; an amax is NaN, infinite or negative; a DTensor is Partial; copies
            of one part differ between ranks, so that one would be lost; the path holds something else. It is raised on
            every rank, and names the leaf and expert, and the rank that found it.
        OSError: The path cannot be written.

    Example:
        >>> import tempfile
        >>> import fq_transforms as fqt
        >>> params = {f"experts.{i}.weight": torch.full((8, 4), i + 1.0) for i in range(2)}
        >>> spec = fqt.select(params, {"*": fqt.FP8})
        >>> fq = fqt.transform(spec)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(fq.calibrate(params), f"{folder}/step1", spec=spec)
        ...     load(f"{folder}/step1", like=fq.init(params), spec=spec)
        {'experts.*.weight': ExpertAmax(amax=tensor([1., 2.]))}
        >>> packed = fq.pack(params, fq.calibrate(params))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(packed, f"{folder}/packed", spec=spec)
        ...     meta = {name: weight.to("meta") for name, weight in params.items()}
        ...     loaded = load(f"{folder}/packed", like=fq.pack(meta, fq.init(meta)), spec=spec)
        >>> torch.equal(fq.unpack(loaded)["experts.1.weight"], fq.unpack(packed)["experts.1.weight"])
        True
    """
    target = _resolved(path)
    no_dist = not _is_distributed()
    ranks = [0] if no_dist else torch.distributed.get_process_group_ranks(process_group)
    kind = kind_of(tree)
    writer = Writer(target, is_ours=lambda metadata: may_replace(metadata, kind))
    planner = _SavePlanner(tree, spec, ranks)
    try:
        with _errors_of(target):
            dcp_save({}, storage_writer=writer, planner=planner, process_group=process_group, no_dist=no_dist)
    except BaseException:
        writer.discard()
        raise


def load(
    path: str | os.PathLike[str],
    *,
    like: Tree,
    spec: Spec,
    device: torch.device | str | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tree:
    """The state or the packed weights that `save` stored at `path`, with the structure and sharding of `like`.

    Every rank of the process group calls it; each reads the parts it needs, and their checksums are verified.

    Args:
        path: A directory that `save` wrote.
        like: `fq.init(params)` for a state, `fq.pack(params, fq.init(params))` of meta parameters for packed weights,
            or any other tree of the kind. Its structure, shapes, devices, and for DTensors mesh and placements are
            wanted; its values are not read, and it may be meta.
        spec: From `select`; formats, experts and shapes must be those stored. Together the ranks must want every group.
        device: Where the leaves go; that of `like` if None, and for a meta `like` the CPU or the device of the mesh.
        process_group: The ranks that load; all if None. Without torch.distributed, this process.

    Returns:
        A new tree; never a part of one.

    Raises:
        KeyError: A group of the spec is missing in `like`.
        ValueError: The path is no checkpoint, or of the other kind; a group or leaf is missing, unknown, or of another
            format, number of experts or shape; a file is truncated or damaged; an amax is NaN, infinite or negative. It
            is raised on every rank, and names the leaf, group or file, what was found and what was wanted.
        OSError: There is nothing at the path, or it cannot be read.

    Example:
        See `save`.
    """
    target = _resolved(path)
    planner = _LoadPlanner(like, spec, device)
    with _errors_of(target):
        dcp_load(
            {},
            storage_reader=Reader(target),
            planner=planner,
            process_group=process_group,
            no_dist=not _is_distributed(),
        )
    return unflatten(planner.leaves, like)


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec stored in the checkpoint at `path`; of several ranks, all of their groups. Reads only the metadata.

    Raises:
        ValueError: The path is no checkpoint that `save` wrote, or is damaged.
        OSError: There is nothing at the path, or it cannot be read.
    """
    target = _resolved(path)
    with _errors_of(target):
        return spec_in(read_metadata(target))


class _Told(NamedTuple):
    """What each rank tells the coordinator, beside its plan."""

    kind: str
    spec: bytes
    # crc32 of each part that it holds; None for one that no other rank may hold
    parts: dict[MetadataIndex, int | None]
    mappings: Any


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, tree: State | PackedTree, spec: Spec, ranks: list[int]) -> None:
        super().__init__()
        self._tree, self._kind, self._spec, self._ranks = tree, kind_of(tree), spec, ranks
        self._parts: dict[MetadataIndex, Tensor] = {}

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
            for part, start in _parts(item):
                assert part.tensor_data is not None
                self._parts[part.index] = local[start : start + part.tensor_data.chunk.sizes[0]]
                items.append(part)
        told = _Told(self._kind.name, squeezed(self._spec), self._sums(), plan.planner_data)
        self.plan = replace(plan, items=items, planner_data=told)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._parts[write_item.index]

    def _sums(self) -> dict[MetadataIndex, int | None]:
        """What another rank's copies are compared by."""
        own = {name for name, leaf in self.state_dict.items() if _is_spread_over(leaf, self._ranks)}
        sums: dict[MetadataIndex, int | None] = dict.fromkeys(self._parts)
        asked = [index for index, part in self._parts.items() if index.fqn not in own or not part.numel()]
        size = sum(self._parts[index].nbytes for index in asked)
        return sums | dict(zip(asked, in_threads(lambda index: _crc32(self._parts[index]), asked, size), strict=True))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        told: list[_Told] = [plan.planner_data for plan in all_plans]
        _check_one_kind([rank.kind for rank in told])
        _check_copies(self._kind, [rank.parts for rank in told])
        first: dict[bytes, int] = {}
        for number, rank in enumerate(told):
            first.setdefault(rank.spec, number)
        spec = joined({number: unsqueezed(squeezed) for squeezed, number in first.items()})
        plans = [replace(plan, planner_data=rank.mappings) for plan, rank in zip(all_plans, told, strict=True)]
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
        check_complete(plan.items, self.leaves)
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
        """Called for each part that is read. After the last the values are checked, while DCP still tells all ranks."""
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


def _parts(item: WriteItem) -> list[tuple[WriteItem, int]]:
    """A rank's part of a leaf in parts of at most `PART` bytes, each with the first of its experts there.

    Experts are whole, and their number in a part is a power of two, so that a rank at another expert parallelism finds
    the bounds of its shard between two parts.
    """
    assert item.tensor_data is not None
    whole, bytes_each = item.tensor_data.chunk, item.tensor_data.properties.dtype.itemsize
    count, *others = whole.sizes
    step = 2 ** max(0, (PART // max(1, prod(others) * bytes_each)).bit_length() - 1)
    if count <= step:
        return [(item, 0)]
    parts: list[tuple[WriteItem, int]] = []
    for start in range(0, count, step):
        offsets = torch.Size([whole.offsets[0] + start, *whole.offsets[1:]])
        chunk = ChunkStorageMetadata(offsets, torch.Size([min(step, count - start), *others]))
        index = MetadataIndex(item.index.fqn, offsets)
        data = replace(item.tensor_data, chunk=chunk)
        parts.append((WriteItem(index, WriteItemType.SHARD, tensor_data=data), start))
    return parts


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
    for rank, parts in enumerate(ranks):
        for index, found in parts.items():
            owner, wanted = first.setdefault(index, (rank, found))
            if owner != rank and (found is None or found != wanted):
                raise ValueError(
                    f"{kind.name} {index.fqn!r}: found different values on ranks {owner} and {rank}, wanted the same "
                    "or DTensors that say which part each rank holds; for the experts of Megatron and Transformer "
                    "Engine use checkpoint.megatron, for a part of a maximum sync first"
                )


def _crc32(data: Any) -> int:
    """crc32 of a tensor's numbers; NumPy has no float8."""
    numbers = data.detach().cpu().contiguous()
    return zlib.crc32((numbers.view(torch.uint8) if numbers.element_size() == 1 else numbers).numpy())


def _device(leaf: Tensor, device: torch.device | str | None) -> torch.device | str:
    if device is not None or not leaf.is_meta:
        return device or leaf.device
    spread = spread_of(leaf)
    return "cpu" if spread is None else spread[0].device_type


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Absolute, links followed: what is renamed must lie beside the directory itself."""
    return Path(os.path.realpath(path))


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
            rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
            where = f", rank {rank}" if _is_distributed() else ""
            raise _error(error, what + where, path) from failed
        except (ValueError, OSError) as error:
            raise _error(error, what, path) from error


def _error(error: BaseException, what: str, path: Path) -> BaseException:
    if isinstance(error, OSError):
        return named(error, path, f"{what}: {error.strerror or error}")
    if isinstance(error, KeyError):
        return KeyError(f"{what}: {error.args[0]}")
    if isinstance(error, ValueError):
        return ValueError(f"{what}: {error}")
    if isinstance(error, Exception):
        return ValueError(f"{what}: {type(error).__name__}: {error}")
    return error
