"""Packing: parameters and state to the codes and scales that deployment stores, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checks import DTYPES, is_sharded, weights_of
from fq_transforms.dtensor import Layout, layout_of, sharded_tensors
from fq_transforms.formats import Format, code_bits
from fq_transforms.ops.pack.reference import code_dtype, pack_reference, pack_scales, unpack_reference
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import (
    BlockAmax,
    GroupState,
    LeafType,
    State,
    Stateless,
    check,
    check_tensor,
    is_read,
    local_group,
)

__all__ = [
    "Packed",
    "PackedTree",
    "PackedTwoLevel",
    "check_packable",
    "check_packed",
    "pack",
    "packed_leaves",
    "unpack",
]


class Packed(NamedTuple):
    """A group's weights under one level of scales: `codes` [E, out, packed in] and `scale`, one number a granule."""

    codes: Tensor
    scale: Tensor


class PackedTwoLevel(NamedTuple):
    """NVFP4: `codes` uint8 [E, out, in/2], `scale` E4M3 [E, out, in/16], `global_scale` fp32 [E]."""

    codes: Tensor
    scale: Tensor
    global_scale: Tensor


PackedTree: TypeAlias = dict[str, Packed | PackedTwoLevel]


def pack(params: Mapping[str, Tensor], state: State, *, spec: Spec) -> PackedTree:
    """The codes and scales of every selected weight: what deployment stores, and exactly what `fakequant` simulates.

    `unpack(pack(params, state, spec=spec), spec=spec, dtype=dtype)` has the values of `fakequant`, bit for bit; a zero
    that `fakequant` gives a sign loses it in the integer formats. On a GPU a group takes one launch, and one for scales
    that the state alone decides.

    Args:
        params: Names to tensors; may hold more than the spec names.
        state: From `calibrate`, or loaded.
        spec: What is packed, and how. Layouts: `fq_transforms.ops.pack.reference`.

    Returns:
        Group key to `Packed`, or `PackedTwoLevel` for NVFP4: new tensors, experts along dimension 0 in their order,
        [out, in] whatever the weights' layout is. A pytree, like the state. Meta weights and state give its shapes.
        DTensors give DTensors on the same mesh, each axis sharded as in the weights; nothing is communicated.

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: As `fakequant`; a weight on a CPU has NaN or infinity; `in`, or a shard of it, is not a multiple of
            what a byte holds (2 weights of 4 bits), or three of them (4 of 6 bits); the format has scales that no
            stored number stands for (`unit_scale_below`).

    Source: the layouts of compressed-tensors 0.20 and ModelOpt 0.47.

    Example:
        >>> from fq_transforms.calibrate import calibrate
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.0]])}
        >>> spec = select(params, {"*": INT8})
        >>> pack(params, calibrate(params, spec=spec), spec=spec)
        {'experts.*.weight': Packed(codes=tensor([[[  64, -127]]], dtype=torch.int8), scale=tensor([63.5000]))}
    """
    refuse_inputs(spec, "pack")
    check(state, spec, values=is_read)
    packed: PackedTree = {}
    for group in spec.groups:
        check_packable(group)
        weights, scales = weights_of(params, group), state[group.key]
        wanted = packed_leaves(group)
        layout = layout_of(group, weights, group.leaf_shapes | {field: shape for field, (shape, _) in wanted.items()})
        with torch.no_grad():
            if layout is not None or any(map(is_sharded, scales)):
                weights, scales = local_group(group, layout, weights, scales)
            for name, weight in zip(group.names, weights, strict=True):
                if is_read(weight) and not bool(weight.isfinite().all()):
                    raise ValueError(
                        f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights"
                    )
            if weights[0].is_meta or (layout is not None and layout.is_empty):
                leaves = _without_weights(group, layout, scales, weights[0].device)
            else:
                leaves = _pack_group(group, weights, scales)
            if layout is not None:
                leaves = [sharded_tensors(layout, [leaf], field)[0] for field, leaf in zip(wanted, leaves, strict=True)]
        packed[group.key] = PackedTwoLevel(*leaves) if len(leaves) == 3 else Packed(*leaves)
    return packed


def unpack(packed: PackedTree, *, spec: Spec, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights that codes and scales stand for, by the names of the spec.

    Args:
        packed: From `pack`, or loaded.
        spec: What it was packed by.
        dtype: bf16, fp16 or fp32.

    Returns:
        Names to new contiguous tensors, in the layout of the parameters.

    Raises:
        KeyError: A group is missing.
        ValueError: A group is unknown; a leaf has another type, shape or dtype than the spec's, or is a DTensor;
            `dtype` is another.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> spec = select({"experts.0.weight": torch.ones(1, 2)}, {"*": INT8})
        >>> codes = torch.tensor([[[64, -127]]], dtype=torch.int8)
        >>> unpack({"experts.*.weight": Packed(codes, torch.tensor([63.5]))}, spec=spec, dtype=torch.float32)
        {'experts.0.weight': tensor([[ 1.0079, -2.0000]])}
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype}, wanted bfloat16, float16 or float32")
    check_packed(packed, spec)
    weights: dict[str, Tensor] = {}
    for group in spec.groups:
        leaves = packed[group.key]
        for field, leaf in zip(leaves._fields, leaves, strict=True):
            if is_sharded(leaf):
                raise ValueError(
                    f"packed '{group.key}.{field}': found a DTensor, wanted a plain tensor; unpack each rank's shard"
                )
        with torch.no_grad():
            experts = unpack_reference(
                leaves.codes,
                leaves.scale,
                leaves.global_scale if isinstance(leaves, PackedTwoLevel) else None,
                format=group.format,
                out_dtype=dtype,
            )
        if group.transposed:
            experts = experts.mT.contiguous()
        weights.update({group.names[0]: experts} if group.stacked else zip(group.names, experts, strict=True))
    return weights


def packed_leaves(group: Group) -> dict[str, LeafType]:
    """Shape and dtype of each packed leaf of a group, by field.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> packed_leaves(Group("w", ("w",), NVFP4, 1, (64, 32)))["codes"]
        ((1, 64, 16), torch.uint8)
    """
    format, (out, columns) = group.format, group.shape
    codes = (group.experts, out, columns * code_bits(format) // 8)
    leaves: dict[str, LeafType] = {"codes": (codes, code_dtype(format))}
    rows = () if format.block == (None, None) else format.granules(out, columns)
    scale = {"fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[format.scale]
    leaves["scale"] = ((group.experts, *rows), scale)
    if format.scale == "e4m3":
        leaves["global_scale"] = ((group.experts,), torch.float32)
    return leaves


def check_packed(packed: PackedTree, spec: Spec) -> None:
    """Raise unless packed weights fit the spec: groups, types, and the shape and dtype of each leaf.

    Raises:
        KeyError: A group is missing.
        ValueError: A group is unknown; a leaf has another type, shape or dtype than the spec's.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> spec = Spec((Group("w", ("w",), INT8, 1, (8, 4)),))
        >>> check_packed({"w": Packed(torch.zeros(1, 8, 4), torch.ones(1))}, spec)
        Traceback (most recent call last):
        ...
        ValueError: packed 'w.codes': found (1, 8, 4) torch.float32, wanted (1, 8, 4) torch.int8
    """
    if unknown := packed.keys() - {group.key for group in spec.groups}:
        raise ValueError(f"packed has groups that the spec has not: {sorted(unknown)}")
    for group in spec.groups:
        if group.key not in packed:
            raise KeyError(f"group {group.key!r} is not among the packed ({len(packed)} groups)")
        leaves: Any = packed[group.key]
        wanted = packed_leaves(group)
        if not isinstance(leaves, Packed | PackedTwoLevel) or leaves._fields != tuple(wanted):
            raise ValueError(
                f"packed {group.key!r}: found {type(leaves).__name__}, wanted {list(wanted)} as {group.format.name} has"
            )
        for (field, (shape, dtype)), leaf in zip(wanted.items(), leaves, strict=True):
            check_tensor(f"packed '{group.key}.{field}'", leaf, shape, dtype)


def _amaxes(scales: GroupState) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if isinstance(scales, Stateless) else scales.amax,
        scales.global_amax if isinstance(scales, BlockAmax) else None,
    )


def _pack_group(group: Group, weights: Sequence[Tensor], scales: GroupState) -> list[Tensor]:
    amax, global_amax = _amaxes(scales)
    if weights[0].is_cuda:
        from fq_transforms.ops.launch import pack_triton

        parts = pack_triton(weights, amax, global_amax, format=group.format, transposed=group.transposed)
        return [leaf for leaf in parts if leaf is not None]
    of_each = [
        pack_reference(
            weight.mT if group.transposed else weight,
            *(leaf if leaf is None or group.stacked else leaf[i] for leaf in (amax, global_amax)),
            format=group.format,
        )
        for i, weight in enumerate(weights)
    ]
    columns: list[Any] = [column for column in zip(*of_each, strict=True) if column[0] is not None]
    return [column[0] if group.stacked else torch.stack(column) for column in columns]


def _without_weights(group: Group, layout: Layout | None, scales: GroupState, device: torch.device) -> list[Tensor]:
    """The leaves where there is no weight to read: on meta, or on a rank with an empty shard.

    A scale that collapses the axis along which the shard is empty is not empty itself; it comes from the state alone.
    """
    leaves = {
        field: torch.empty(shape if layout is None else layout.leaves[field].local_shape, dtype=dtype, device=device)
        for field, (shape, dtype) in packed_leaves(group).items()
    }
    known = dict(zip(("scale", "global_scale"), pack_scales(*_amaxes(scales), format=group.format), strict=True))
    return list((leaves | {field: leaf for field, leaf in known.items() if leaf is not None}).values())


def check_packable(group: Group) -> None:
    """Raise ValueError unless codes and scales can stand for the group's weights."""
    format: Format = group.format
    if format.unit_scale_below:
        raise ValueError(
            f"group {group.key!r}: found {format.name}, whose scales below {format.unit_scale_below} become 1, for "
            "which no E4M3 scale stands, wanted a format that can be stored, such as NVFP4"
        )
    multiple = {8: 1, 6: 4, 4: 2}[code_bits(format)]
    if group.shape[1] % multiple:
        raise ValueError(
            f"parameter {group.names[0]!r}: found (out, in) = {group.shape}, wanted `in` to be a multiple of "
            f"{multiple} for codes of {code_bits(format)} bits"
        )
