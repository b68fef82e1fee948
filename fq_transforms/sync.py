"""One state of all ranks, for plain local tensors: Megatron's, Transformer Engine's.

DTensors need no such call: `calibrate` knows from their placements which of their leaves to reduce.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fq_transforms.checks import check_state
from fq_transforms.distributed import largest_over, sum_over
from fq_transforms.dtensor import is_sharded
from fq_transforms.partition import DIMS, Part, collapsed_dims, leaf_part
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State, flatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sync"]

SPLITS = ("out", "in")


def sync(
    state: State,
    group: "ProcessGroup",
    *,
    spec: Spec,
    split: Mapping[str, Literal["out", "in"]] | None,
    same_experts: bool,
) -> State:
    """`Transform.sync`, with the spec of the Transform."""
    # None would mean every rank, also those with other experts.
    if not isinstance(group, torch.distributed.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"group: found {group!r}, wanted a process group that this rank is in")
    if split is not None and not same_experts:
        raise ValueError("split: found a split of weights between ranks with same_experts=False, wanted one of the two")
    leaves = flatten(state)
    check_state(state, spec, values=False)
    largest, summed = _batches(spec, same_experts) if split is None else (_split(spec, split, group.size()), [])
    chosen = {name: leaves[name] for name in (*largest, *summed)}
    # A mesh has an axis for a split, so there even a leaf that is kept must be local. It has none for batches.
    _check_local(chosen if split is None else leaves)
    _check_reducible(chosen)
    reduced = dict(zip(largest, largest_over(group, [leaves[name] for name in largest]), strict=True))
    reduced |= zip(summed, sum_over(group, [leaves[name] for name in summed]), strict=True)
    synced = dict(state)
    for key in {name.rpartition(".")[0] for name in reduced}:
        synced[key] = {name: reduced.get(f"{key}.{name}", leaf) for name, leaf in state[key].items()}
    return synced


def _batches(spec: Spec, same_experts: bool) -> tuple[list[str], list[str]]:
    """Leaves to maximize, and to add up, over ranks with different batches: those of inputs."""
    inputs = [i.key for i in spec.inputs if i.leaf_shapes and (same_experts or not i.per_expert)]
    return [f"{key}.amax" for key in inputs], [f"{key}.tokens" for key in inputs] if same_experts else []


def _split(spec: Spec, split: Mapping[str, Any], ranks: int) -> list[str]:
    """Leaves to maximize over ranks that hold parts of each weight: those that collapse the dim that is split."""
    dims = _split_dims(spec, split)
    for of in spec.groups:
        if of.key in dims:
            _check_uncut(of, dims[of.key], ranks)
    chosen = [
        f"{of.key}.{name}"
        for of in spec.groups
        for name in of.leaf_shapes
        if dims.get(of.key) in collapsed_dims(of.format, name)
    ]
    # Each rank sees a part of the tokens' features, or under sequence parallelism of the tokens.
    return chosen + [f"{i.key}.amax" for i in spec.inputs if i.leaf_shapes and i.key.removesuffix(".input") in dims]


def _split_dims(spec: Spec, split: Mapping[str, Any]) -> dict[str, int]:
    """The dim of [E, out, in] that is split, by key of the group."""
    dims: dict[str, int] = {}
    keys = list(dict.fromkeys(group.key.removesuffix(".input") for group in spec.all_groups))
    for glob, side in split.items():
        if side not in SPLITS:
            raise ValueError(f"split[{glob!r}]: found {side!r}, wanted 'out' or 'in'")
        matched = [key for key in keys if fnmatchcase(key, glob)]
        if not matched:
            raise ValueError(f"split[{glob!r}] matches no group, among {len(keys)} such as {keys[:3]}")
        dims |= dict.fromkeys(matched, DIMS.index(side))
    return dims


def _check_uncut(of: Group, dim: int, ranks: int) -> None:
    """Raise ValueError if the part of the first rank, of as many as there are, ends within a block."""
    part = (of.experts, *of.shape)
    whole = tuple(extent * (ranks if i == dim else 1) for i, extent in enumerate(part))
    leaf_part(Part(whole, (0, 0, 0), part), of.format, "amax", of.names[0])


def _check_local(leaves: Mapping[str, Tensor]) -> None:
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(
                f"sync: state {name!r}: found a DTensor, wanted a plain local tensor; `calibrate` has reduced it over "
                "its mesh already"
            )


def _check_reducible(chosen: Mapping[str, Tensor]) -> None:
    for name, leaf in chosen.items():
        first = next(iter(chosen))
        if leaf.is_meta:
            raise ValueError(f"sync: state {name!r}: found a meta tensor, wanted values; calibrate first")
        if leaf.device != chosen[first].device:
            raise ValueError(
                f"sync: state {name!r}: found on {leaf.device}, wanted on {chosen[first].device} as {first!r}, for one "
                "all-reduce"
            )
