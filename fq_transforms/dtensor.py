"""DTensors to local shards and back: the only file that knows DTensor, which it imports once one is seen.

A group's weights on a mesh give its state on the same mesh. A mesh has axes, a tensor has dims; for each axis:

    the weights                     a leaf of the state
    Replicate()                     Replicate()
    Shard of a dim the leaf has     Shard of the leaf's own dim for it
    Shard of a dim it collapses     Replicate(), after a maximum over the axis

So each rank quantizes its own shard by its own part of the state, with the operations for plain tensors in between: the
crossings `local_tensors` and `sharded_tensors` are each other's derivative. They are `autograd.Function`s because under
torch.func a DTensor is not an instance of DTensor, except inside a Function's forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fq_transforms.distributed import largest_over
from fq_transforms.ops.private import is_functorch_active, is_mapped, unwrapped
from fq_transforms.partition import Part, blocks_of, collapsed_dims, leaf_part
from fq_transforms.spec import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

__all__ = [
    "Layout",
    "check_leaf",
    "is_sharded",
    "layout_of",
    "local_tensors",
    "local_values",
    "local_vectors",
    "position",
    "reduce_leaves",
    "sharded_tensors",
    "sharded_vectors",
    "spread_in_words",
    "spread_of",
]

# A name that a type lacks is slow to ask a tensor for.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, under torch.func too. torch.compile is given none: `weights_of` refuses them there."""
    if type(tensor) not in _PLAIN and hasattr(tensor, "to_local"):
        return not torch.compiler.is_compiling()
    if not is_functorch_active():
        return False
    return not torch.compiler.is_compiling() and hasattr(unwrapped(tensor), "to_local")


def spread_of(tensor: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Mesh and placements of a DTensor, None for a plain tensor."""
    inner: Any = tensor if torch.compiler.is_compiling() else unwrapped(tensor)
    return (inner.device_mesh, tuple(inner.placements)) if hasattr(type(inner), "to_local") else None


def spread_in_words(spread: tuple[Any, tuple[Any, ...]] | None) -> str:
    """What `spread_of` found, for a message."""
    return "a plain tensor" if spread is None else f"a DTensor {spread[1]} on {spread[0]}"


class Sharding(NamedTuple):
    """How tensors of one global shape lie on the mesh.

    Attributes:
        names: Theirs, for messages.
        shape: Of the whole.
        placements: One for each axis of the mesh.
        local_shape: Of the shard on this rank.
        reduced: Axes of the mesh over which a leaf is a maximum.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    placements: "tuple[Placement, ...]"
    local_shape: tuple[int, ...]
    reduced: tuple[int, ...] = ()


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class Layout:
    """How a group lies on a mesh: its parameters, leaves of its state or of it packed, and the experts of this rank.

    Attributes:
        mesh: The mesh.
        weights: Of each parameter.
        leaves: Of each leaf, by name.
        experts: Numbers of the experts that this rank holds parts of.
    """

    mesh: "DeviceMesh"
    weights: Sharding
    leaves: dict[str, Sharding]
    experts: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """True if this rank holds nothing of the weights."""
        return prod(self.weights.local_shape) == 0


@dataclass(frozen=True)
class _Crossing:
    """What the Functions are told: which tensors cross, and the mesh."""

    mesh: "DeviceMesh"
    sharding: Sharding


def layout_of(
    group: Group, weights: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Layout | None:
    """How a group's weights and leaves lie on their mesh; None for plain tensors. The same error on every rank.

    Args:
        group: The group.
        weights: Its parameters.
        shapes: Of the leaves, by name; those of the state if None.

    Raises:
        ValueError: A shard cuts a block, on any rank; a placement is neither Shard nor Replicate; a weight is mapped by
            vmap; this rank is not in the mesh.
    """
    if not is_sharded(weights[0]):
        return None
    for name, weight in zip(group.names, weights, strict=True):
        _check_unmapped(f"parameter {name!r}", weight)
    first: Any = unwrapped(weights[0])
    mesh = first.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"parameter {group.names[0]!r}: found {mesh}, which this rank is not in, wanted one with it; leave out "
            "parameters that other ranks hold"
        )
    # The mesh itself is not remembered: an equal one of a process group that is gone would come back.
    leaves = tuple((group.leaf_shapes if shapes is None else shapes).items())
    return Layout(mesh, *_layout(group, leaves, tuple(first.placements), tuple(mesh.shape), tuple(coordinate)))


def local_tensors(layout: Layout, tensors: Sequence[Tensor], leaf: str = "") -> tuple[Tensor, ...]:
    """Each DTensor's shard on this rank, differentiable: the parameters of a group, or a leaf of its state by name.

    A DTensor that is placed otherwise, as a cotangent may be, is redistributed.
    """
    sharding = layout.leaves[leaf] if leaf else layout.weights
    return _ToLocal.apply(_Crossing(layout.mesh, sharding), *tensors)


def sharded_tensors(layout: Layout, tensors: Sequence[Tensor], leaf: str = "") -> tuple[Tensor, ...]:
    """DTensors whose shards on this rank are `tensors`, differentiable; contiguous."""
    sharding = layout.leaves[leaf] if leaf else layout.weights
    return _FromLocal.apply(_Crossing(layout.mesh, sharding), *tensors)


def local_vectors(layout: Layout, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`local_tensors` of cotangents of a group's parameters, of those that there are."""
    return _cross(_ToLocal, _Crossing(layout.mesh, layout.weights), vectors)


def sharded_vectors(layout: Layout, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`sharded_tensors` of gradients of a group's parameters, of those that there are."""
    return _cross(_FromLocal, _Crossing(layout.mesh, layout.weights), vectors)


def check_leaf(what: str, leaf: Tensor, layout: Layout | None, name: str) -> None:
    """Raise ValueError unless the leaf `name` is placed as its weights want it: a plain tensor if they are."""
    found = spread_of(leaf)
    wanted = None if layout is None else (layout.mesh, layout.leaves[name].placements)
    if found != wanted:
        raise ValueError(
            f"state {what!r}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)} as its weights are "
            "placed; calibrate with these parameters, or redistribute it"
        )
    if found is not None:
        _check_unmapped(f"state {what!r}", leaf)


def local_values(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, a plain tensor itself; no collective, not differentiable."""
    if not is_sharded(tensor):
        return tensor
    inner: Any = unwrapped(tensor)
    with torch.no_grad():  # else `to_local` is a Function of its own, which torch.func refuses
        return inner.to_local()


def position(tensor: Tensor, index: Sequence[int]) -> list[int]:
    """Where an element of this rank's shard lies in the whole DTensor; for a plain tensor the index itself."""
    if not is_sharded(tensor):
        return list(index)
    inner: Any = unwrapped(tensor)
    mesh = inner.device_mesh
    axes = zip(inner.shape, index, strict=True)
    return [
        int(_indices(size, dim, inner.placements, mesh.shape, mesh.get_coordinate())[i])
        for dim, (size, i) in enumerate(axes)
    ]


def reduce_leaves(leaves: Sequence[tuple[Tensor, Layout, str]]) -> list[Tensor]:
    """Local leaves (tensor, layout, name) as maxima over the axes of the mesh that shard what they collapse.

    One all-reduce for each axis of a mesh that any of them needs, in the order of first need, so that every rank makes
    the same ones; none if none is needed. Not differentiable.
    """
    tensors = [tensor for tensor, _, _ in leaves]
    needs: dict[tuple[str, torch.device], tuple[ProcessGroup, list[int]]] = {}
    for i, (tensor, layout, name) in enumerate(leaves):
        for axis in layout.leaves[name].reduced:
            if layout.mesh.size(axis) > 1 and not tensor.is_meta:
                group = layout.mesh.get_group(axis)
                needs.setdefault((group.group_name, tensor.device), (group, []))[1].append(i)
    for group, members in needs.values():
        for i, tensor in zip(members, largest_over(group, [tensors[i] for i in members]), strict=True):
            tensors[i] = tensor
    return tensors


class _ToLocal(Function):
    @staticmethod
    def forward(crossing: _Crossing, *tensors: Tensor) -> Any:
        names = crossing.sharding.names
        return tuple(_local(tensor, crossing, name) for name, tensor in zip(names, tensors, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.crossing = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *_cross(_FromLocal, ctx.crossing, grads)


class _FromLocal(Function):
    @staticmethod
    def forward(crossing: _Crossing, *tensors: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        shape, placements = torch.Size(crossing.sharding.shape), crossing.sharding.placements
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return tuple(
            DTensor.from_local(tensor.contiguous(), crossing.mesh, placements, shape=shape, stride=stride)
            for tensor in tensors
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.crossing = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *_cross(_ToLocal, ctx.crossing, grads)


def _cross(function: type[Function], crossing: _Crossing, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Cotangents to the other side, those that there are."""
    live = [i for i, vector in enumerate(vectors) if vector is not None]
    crossed: dict[int, Tensor] = {}
    if live:
        names = tuple(crossing.sharding.names[i] for i in live)
        those = _Crossing(crossing.mesh, crossing.sharding._replace(names=names))
        crossed = dict(zip(live, function.apply(those, *(vectors[i] for i in live)), strict=True))
    return [crossed.get(i) for i in range(len(vectors))]


def _local(tensor: Any, crossing: _Crossing, name: str) -> Tensor:
    sharding = crossing.sharding
    if not is_sharded(tensor):
        raise ValueError(f"{name!r}: found a plain tensor as its cotangent, wanted a DTensor as its weight is")
    if spread_of(tensor) != (crossing.mesh, sharding.placements):
        tensor = tensor.redistribute(crossing.mesh, sharding.placements)
    local = tensor.to_local()
    if tuple(local.shape) != sharding.local_shape:
        raise ValueError(
            f"{name!r}: found a local shard of {tuple(local.shape)}, wanted {sharding.local_shape} for "
            f"{spread_in_words((crossing.mesh, sharding.placements))} of shape {sharding.shape}"
        )
    # Detached: the Function's result is given a history, which the DTensor's own tensor must not get.
    return local.detach()


def _check_unmapped(what: str, tensor: Tensor) -> None:
    """Raise ValueError for a DTensor under vmap: its placements count the mapped dimension, its shape does not."""
    if is_mapped(tensor):
        raise ValueError(f"{what}: found a DTensor under torch.func.vmap, wanted a plain tensor")


@lru_cache(maxsize=16384)
def _layout(
    group: Group,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    placements: "tuple[Placement, ...]",
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[Sharding, dict[str, Sharding], tuple[int, ...]]:
    """What `Layout` says, from numbers only."""
    from torch.distributed.tensor import Replicate

    dim_of = _dims(group)
    # The dim of [E, out, in] that each axis of the mesh shards.
    dims = [None if p.is_replicate() else dim_of[_sharded_dim(p, group.names[0])] for p in placements]
    _check_uncut(group, [name for name, _ in shapes], placements, dims, mesh)

    def shape_here(shape: tuple[int, ...], placed: "tuple[Placement, ...]") -> tuple[int, ...]:
        return tuple(len(_indices(size, dim, placed, mesh, coordinate)) for dim, size in enumerate(shape))

    leaves: dict[str, Sharding] = {}
    for name, shape in shapes:
        collapsed = collapsed_dims(group.format, name)
        placed = tuple(
            Replicate() if dim is None or dim in collapsed else _on_dim(placement, dim)
            for placement, dim in zip(placements, dims, strict=True)
        )
        reduced = tuple(axis for axis, dim in enumerate(dims) if dim in collapsed)
        leaves[name] = Sharding((f"{group.key}.{name}",), shape, placed, shape_here(shape, placed), reduced)
    weights = Sharding(group.names, group.parameter_shape, placements, shape_here(group.parameter_shape, placements))
    experts = _indices(group.experts, 0, placements, mesh, coordinate) if group.stacked else range(group.experts)
    return weights, leaves, tuple(int(expert) for expert in experts)


def _dims(group: Group) -> tuple[int, ...]:
    """Which dim of [E, out, in] each dim of a parameter is."""
    matrix = (2, 1) if group.transposed else (1, 2)
    return (0, *matrix) if group.stacked else matrix


def _sharded_dim(placement: Any, name: str) -> int:
    if type(placement).__name__ not in ("Shard", "_StridedShard"):
        raise ValueError(f"parameter {name!r}: found the placement {placement!r}, wanted Shard or Replicate")
    return placement.dim


def _on_dim(placement: Any, dim: int) -> "Placement":
    """The same sharding of another dim."""
    if type(placement).__name__ == "Shard":
        return type(placement)(dim)
    return type(placement)(dim, split_factor=placement.split_factor)


def _indices(size: int, dim: int, placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]) -> Tensor:
    """Which of 0..size-1 along a dim a coordinate of the mesh holds."""
    index = torch.arange(size, device="cpu")
    for placement, ranks, rank in zip(placements, mesh, coordinate, strict=True):
        if not placement.is_replicate() and placement.dim == dim:
            along: Any = _on_dim(placement, 0)
            index = along._split_tensor(index, ranks, with_padding=False, contiguous=False)[0][rank]
    return index


def _check_uncut(
    group: Group,
    leaves: Sequence[str],
    placements: "tuple[Placement, ...]",
    dims: Sequence[int | None],
    mesh: Sequence[int],
) -> None:
    """Raise ValueError if the shard of any rank, so on every rank alike, cuts a block or what shares a byte."""
    whole, codes = (group.experts, *group.shape), "codes" if "codes" in leaves else "amax"
    for dim, block in blocks_of(group.format, codes):
        if dim not in dims:
            continue
        placed = tuple(
            _on_dim(placement, dim) if found == dim else _replicate()
            for placement, found in zip(placements, dims, strict=True)
        )
        sides = (range(ranks if found == dim else 1) for ranks, found in zip(mesh, dims, strict=True))
        for coordinate in product(*sides):
            index = _indices(whole[dim], dim, placed, mesh, coordinate)
            for start, length in _runs(index):
                offset, shape = [0, 0, 0], list(whole)
                offset[dim], shape[dim] = start, length
                leaf_part(Part(whole, tuple(offset), tuple(shape)), group.format, codes, group.names[0])
            blocks = _indices(-(-whole[dim] // block), dim, placed, mesh, coordinate)
            # A leaf of blocks is split by the same rule, so where no block is cut it comes out with the weights' own.
            assert torch.equal((index // block).unique(), blocks)


def _replicate() -> "Placement":
    from torch.distributed.tensor import Replicate

    return Replicate()


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """(start, length) of each run of consecutive numbers."""
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero().flatten().add(1).tolist()
    return [(int(run[0]), len(run)) for run in index.tensor_split(breaks)]
