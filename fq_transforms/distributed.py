"""One maximum over the ranks that split a weight, for a state of plain local tensors: Megatron's, Transformer Engine's.

DTensors need none: `calibrate` knows from their placements which of their leaves to reduce.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fq_transforms.checks import is_sharded
from fq_transforms.dtensor import largest_over
from fq_transforms.partition import AXES, Part, collapsed_axes, leaf_part
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State, check, flatten, unflatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sync"]

SPLITS = ("out", "in")


def sync(state: State, spec: Spec, group: "ProcessGroup", *, split: Mapping[str, Literal["out", "in"]]) -> State:
    """The state with amax = max(amax of all ranks in `group`) for exactly those leaves that collapse the split axis.

    Where tensor parallelism splits a weight, a rank's calibration sees its own part only. A leaf that has the split
    axis is complete as it is. Experts are never synchronized: over expert parallelism there is nothing to do.

        split    per tensor, global_amax, dynamic NVFP4    per channel    blocks    MX
        "out"    maximum                                   kept           kept      no leaf
        "in"     maximum                                   maximum        kept      no leaf

    The amax of inputs is the maximum for either split; their tokens, which all ranks see, are kept. Ranks that see
    different tokens, `sync_inputs` joins.

    Args:
        state: From `calibrate`, of this rank's own weights. Leaves have the same names and shapes on all ranks.
        spec: This rank's, in the shapes of its own weights.
        group: The ranks that split each weight into equal parts, this one among them, such as Megatron's
            `get_expert_tensor_parallel_group()`.
        split: Globs over group keys to the axis of [E, out, in] that is split: "out" (column parallel, fc1) or "in"
            (row parallel, fc2). The last one that matches a group counts; a group that none matches is not split. The
            same on all ranks.

    Returns:
        A new state. Leaves that are reduced are new tensors, all others are the same objects. One all-reduce(max) for
        all leaves together, on every rank of the group; none at all if no leaf needs it. NaN wins; -inf, which is not
        calibrated, is the identity. So is a group of one rank.

    Raises:
        KeyError: A group is missing from the state.
        ValueError: A glob matches no group, or has another value than "out" and "in"; `group` is no process group, or
            one without this rank; the state does not fit the spec; the split cuts a square block; a leaf is a DTensor,
            is on meta, or is on another device than the rest. All before anything is sent.

    Source: ModelOpt 0.47 `TensorQuantizer.sync_amax_across_distributed_group`.

    Example:
        >>> import torch
        >>> from fq_transforms.calibrate import calibrate
        >>> from fq_transforms.formats import FP8
        >>> from fq_transforms.select import select
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> params = {"experts.0.fc1.weight": torch.tensor([[1.0, -2.0]])}
        >>> spec = select(params, {"*": FP8})
        >>> sync(calibrate(params, spec=spec), spec, torch.distributed.group.WORLD, split={"*.fc1.*": "out"})
        {'experts.*.fc1.weight': ExpertAmax(amax=tensor([2.]))}
        >>> torch.distributed.destroy_process_group()
    """
    # None would mean every rank, also those with other experts.
    if not isinstance(group, torch.distributed.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"group: found {group!r}, wanted a process group that this rank is in")
    leaves = flatten(state)
    _check_local(leaves)
    check(state, spec, values=False)
    axes = _split_axes(spec, split)
    # Each rank sees a part of the tokens' features, or under sequence parallelism of the tokens.
    axes_of_inputs = {i.key: axes.get(i.key.removesuffix(".input")) for i in spec.inputs if i.leaf_shapes}
    for of in spec.groups:
        if of.key in axes:
            _check_uncut(of, axes[of.key], group.size())
    chosen = {
        f"{of.key}.{field}": leaves[f"{of.key}.{field}"]
        for of in spec.groups
        for field in of.leaf_shapes
        if axes.get(of.key) in collapsed_axes(of.format, field)
    }
    chosen |= {f"{key}.amax": leaves[f"{key}.amax"] for key, axis in axes_of_inputs.items() if axis is not None}
    _check_reducible(chosen)
    if chosen:
        leaves |= dict(zip(chosen, largest_over(group, list(chosen.values())), strict=True))
    return unflatten(leaves, like=state)


def _split_axes(spec: Spec, split: Mapping[str, Any]) -> dict[str, int]:
    """Axis of [E, out, in] that is split, by key of the group."""
    axes: dict[str, int] = {}
    keys = list(dict.fromkeys(group.key.removesuffix(".input") for group in spec.all_groups))
    for glob, side in split.items():
        if side not in SPLITS:
            raise ValueError(f"split[{glob!r}]: found {side!r}, wanted 'out' or 'in'")
        matched = [key for key in keys if fnmatchcase(key, glob)]
        if not matched:
            raise ValueError(f"split[{glob!r}] matches no group, among {len(keys)} such as {keys[:3]}")
        axes |= dict.fromkeys(matched, AXES.index(side))
    return axes


def _check_uncut(of: Group, axis: int, ranks: int) -> None:
    """Raise ValueError if the part of the first rank, of as many as there are, ends within a block."""
    part = (of.experts, *of.shape)
    whole = tuple(extent * (ranks if i == axis else 1) for i, extent in enumerate(part))
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
