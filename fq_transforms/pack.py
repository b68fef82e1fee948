"""Packing: parameters and state to the codes and scales that deployment stores, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.packing import code_bits, code_dtype, pack_reference, unpack_reference
from fq_transforms.select import DTYPES, Group, Spec, is_sharded, weights_of
from fq_transforms.state import BlockAmax, GroupState, State, Stateless, check, is_concrete

__all__ = ["Packed", "PackedTree", "PackedTwoLevel", "check_packable", "pack", "packed_leaves", "unpack"]


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
    that `fakequant` gives a sign loses it in the integer formats. One kernel launch a group on a GPU.

    Args:
        params: Names to tensors; may hold more than the spec names.
        state: From `calibrate`, or loaded.
        spec: What is packed, and how. Layouts: `fq_transforms.ops.packing`.

    Returns:
        Group key to `Packed`, or `PackedTwoLevel` for NVFP4: new tensors, experts along dimension 0 in their order,
        [out, in] whatever the weights' layout is. A pytree, like the state.

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: As `fakequant`; a weight is a DTensor, or on a CPU has NaN or infinity; `in` is not a multiple of
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
    check(state, spec, values=lambda leaf: leaf.is_cpu and is_concrete(leaf))
    packed: PackedTree = {}
    for group in spec.groups:
        check_packable(group)
        weights = weights_of(params, group)
        scales = state[group.key]
        for name, weight in zip(group.names, weights, strict=True):
            if is_sharded(weight):
                raise ValueError(f"parameter {name!r}: found a DTensor, wanted a plain tensor; pack each rank's shard")
            if weight.is_cpu and is_concrete(weight) and not bool(weight.isfinite().all()):
                raise ValueError(f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights")
        with torch.no_grad():
            packed[group.key] = _pack_group(group, weights, scales)
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
        ValueError: A group is unknown; a leaf has another type, shape or dtype than the spec's; `dtype` is another.

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
    if unknown := packed.keys() - {group.key for group in spec.groups}:
        raise ValueError(f"packed has groups that the spec has not: {sorted(unknown)}")
    weights: dict[str, Tensor] = {}
    for group in spec.groups:
        if group.key not in packed:
            raise KeyError(f"group {group.key!r} is not among the packed ({len(packed)} groups)")
        leaves = packed[group.key]
        _check_leaves(group, leaves)
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


def packed_leaves(group: Group) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each packed leaf of a group, by field.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> packed_leaves(Group("w", ("w",), NVFP4, 1, (64, 32)))["codes"]
        ((1, 64, 16), torch.uint8)
    """
    format, (out, columns) = group.format, group.shape
    codes = (group.experts, out, columns * code_bits(format) // 8)
    leaves: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (codes, code_dtype(format))}
    rows = () if format.block == (None, None) else format.granules(out, columns)
    scale = {"fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[format.scale]
    leaves["scale"] = ((group.experts, *rows), scale)
    if format.scale == "e4m3":
        leaves["global_scale"] = ((group.experts,), torch.float32)
    return leaves


def _pack_group(group: Group, weights: Sequence[Tensor], scales: GroupState) -> Packed | PackedTwoLevel:
    amax = None if isinstance(scales, Stateless) else scales.amax
    global_amax = scales.global_amax if isinstance(scales, BlockAmax) else None
    if weights[0].is_cuda:
        from fq_transforms.ops.launch import pack_triton

        parts = pack_triton(weights, amax, global_amax, format=group.format, transposed=group.transposed)
        leaves = [leaf for leaf in parts if leaf is not None]
    else:
        of_each = [
            pack_reference(
                weight.mT if group.transposed else weight,
                *(leaf if leaf is None or group.stacked else leaf[i] for leaf in (amax, global_amax)),
                format=group.format,
            )
            for i, weight in enumerate(weights)
        ]
        columns: list[Any] = [column for column in zip(*of_each, strict=True) if column[0] is not None]
        leaves = [column[0] if group.stacked else torch.stack(column) for column in columns]
    return PackedTwoLevel(*leaves) if len(leaves) == 3 else Packed(*leaves)


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


def _check_leaves(group: Group, leaves: Any) -> None:
    wanted = packed_leaves(group)
    if not isinstance(leaves, Packed | PackedTwoLevel) or leaves._fields != tuple(wanted):
        raise ValueError(
            f"packed {group.key!r}: found {type(leaves).__name__}, wanted {list(wanted)} as {group.format.name} has"
        )
    for (field, (shape, dtype)), leaf in zip(wanted.items(), leaves, strict=True):
        if tuple(leaf.shape) != shape or leaf.dtype != dtype:
            raise ValueError(
                f"packed '{group.key}.{field}': found {tuple(leaf.shape)} {leaf.dtype}, wanted {shape} {dtype}"
            )
