"""A state by names in memory, of transformers or Megatron, to the same by the names that files have."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fq_transforms.checkpoint import read_spec
from fq_transforms.checkpoint.storage import local_path
from fq_transforms.export.names.from_memory import FileTensor, file_tensors, of_group
from fq_transforms.spec import Group, Inputs, Spec
from fq_transforms.state import State
from fq_transforms.transform import transform

__all__ = ["in_files"]


def in_files(
    path: str | os.PathLike[str], params: Mapping[str, Tensor], config: Mapping[str, Any], what: str = "state"
) -> tuple[Spec, State]:
    """The spec and the state of a checkpoint, by the names of a folder's tensors.

    Args:
        path: A file of `save_file` or a directory of `save`.
        params: The folder's plain weights, on meta.
        config: What its config.json holds.
        what: The argument that it is, for messages.

    Raises:
        ValueError: It is no such checkpoint; a group is not in the folder, or has another shape there.
    """
    spec, state = _loaded(path)
    groups: list[Group] = []
    inputs: list[Inputs] = []
    found: State = {}
    try:
        tensors = _tensors(spec, params, config)
        for group in spec.all_groups:
            parts = tensors[group.names[0]] if group.names == (group.key,) else None
            for part in of_group(group, tensors) if parts is None else parts:
                made = _part(group, part, params)
                (inputs if isinstance(made, Inputs) else groups).append(made)  # pyright: ignore[reportArgumentType]
                found[made.key] = {name: _rows(leaf, group, part) for name, leaf in state[group.key].items()}
    except ValueError as error:
        raise ValueError(f"{what} {str(path)!r}: {error}") from error
    return Spec(tuple(groups), (), tuple(inputs), spec.rules), found


def _loaded(path: str | os.PathLike[str]) -> tuple[Spec, State]:
    from fq_transforms import checkpoint

    spec = read_spec(path)
    fq = transform(spec)
    if local_path(path).is_file():
        return spec, checkpoint.load_file(path, fq)
    like: State = {
        one.key: {
            name: torch.empty(shape, dtype=torch.float64 if name == "tokens" else torch.float32)
            for name, shape in one.leaf_shapes.items()
        }
        for one in spec.all_groups
    }
    return spec, checkpoint.load(path, fq, like=like)


def _tensors(spec: Spec, params: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, list[FileTensor]]:
    """What each parameter of the spec is in files."""
    shapes = {name: group.parameter_shape for group in spec.all_groups for name in group.names}
    if all(name in params for name in shapes):
        return {name: [FileTensor(name, slice(None))] for name in shapes}
    return file_tensors(shapes, config)


def _part(group: Group, part: FileTensor, params: Mapping[str, Tensor]) -> Group:
    """The group of a folder that is some rows of another."""
    key = part.name + (".input" if isinstance(group, Inputs) else "")
    count = group.experts if "*" in part.name else 1
    names = tuple(part.name.replace("*", str(expert)) for expert in range(count))
    stacked = group.stacked and "*" not in part.name
    rows = len(range(group.shape[0])[part.rows]) if isinstance(part.rows, slice) else len(part.rows)
    made = replace(group, key=key, names=names, shape=(rows, group.shape[1]), stacked=stacked)
    for name in names:
        if name not in params:
            raise ValueError(f"group {group.key!r}: found no {name!r} in the folder, wanted the state of this model")
        if tuple(params[name].shape) != made.parameter_shape:
            raise ValueError(
                f"group {group.key!r}: found {name!r} {tuple(params[name].shape)} in the folder, wanted "
                f"{made.parameter_shape}, as the state has it"
            )
    return made


def _rows(leaf: Tensor, group: Group, part: FileTensor) -> Tensor:
    """The scales of some rows of `out`."""
    if leaf.dim() < 3 or leaf.shape[1] == 1:
        return leaf
    block = group.format.block[0] or 1
    if block == 1:
        return leaf[:, part.rows]
    rows = part.rows
    if isinstance(rows, Tensor) or (rows.start or 0) % block or (rows.stop or 0) % block:
        raise ValueError(f"group {group.key!r}: found rows that cut a block of {block}, wanted whole blocks")
    return leaf[:, slice(*(None if row is None else row // block for row in (rows.start, rows.stop)))]
