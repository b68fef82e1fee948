"""Packing: parameters and state to the codes and scales that deployment stores, and back.

Packed weights are nested plain dicts, as a state is: group key to leaf name to tensor.

    codes           [E, out, packed in]
    scale           one number per granule: [E], [E, out, 1] or [E, out, in/block]
    global_scale    fp32 [E], of two-level formats only
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fq_transforms.checks import (
    DTYPES,
    LeafType,
    check_device,
    check_state,
    check_tensor,
    is_read,
    local_group,
    weights_of,
)
from fq_transforms.dtensor import Layout, is_sharded, layout_of, sharded_tensors
from fq_transforms.formats import Format, code_bits
from fq_transforms.ops.launch import has_kernel
from fq_transforms.ops.pack.reference import code_dtype, pack_reference, pack_scales, unpack_reference
from fq_transforms.ops.pieces import pieces_of
from fq_transforms.ops.private import is_mapped
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import GroupState, State

__all__ = ["PackedTree", "check_packable", "check_packed", "pack", "packed_leaves", "unpack"]

PackedTree: TypeAlias = dict[str, dict[str, Tensor]]


def pack(params: Mapping[str, Tensor], state: State, *, spec: Spec) -> PackedTree:
    """`Transform.pack`, with the spec of the Transform."""
    refuse_inputs(spec, "pack")
    check_state(state, spec, values=is_read)
    packed: PackedTree = {}
    for group in spec.groups:
        check_packable(group)
        weights, scales = weights_of(params, group), state[group.key]
        check_device(group, scales, weights[0].device)
        wanted = packed_leaves(group)
        layout = layout_of(group, weights, group.leaf_shapes | {name: shape for name, (shape, _) in wanted.items()})
        with torch.no_grad():
            if layout is not None or any(map(is_sharded, scales.values())):
                weights, scales = local_group(group, layout, weights, scales)
            for name, weight in zip(group.names, weights, strict=True):
                if not torch.compiler.is_compiling() and is_mapped(weight):
                    raise ValueError(
                        f"parameter {name!r}: found mapped by vmap, wanted a plain tensor; pack one by one"
                    )
                # All are finite where the ends are; to ask each weight takes 20 times as long.
                if is_read(weight) and weight.numel() and not bool(torch.stack(weight.aminmax()).isfinite().all()):
                    raise ValueError(
                        f"parameter {name!r}: found NaN or infinity, which has no code, wanted finite weights"
                    )
            if weights[0].is_meta or (layout is not None and layout.is_empty):
                leaves = _without_weights(group, layout, scales, weights[0].device)
            else:
                leaves = _pack_group(group, weights, scales)
            if layout is not None:
                leaves = [sharded_tensors(layout, [leaf], name)[0] for name, leaf in zip(wanted, leaves, strict=True)]
        packed[group.key] = dict(zip(wanted, leaves, strict=True))
    return packed


def unpack(packed: PackedTree, *, spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """`Transform.unpack`, with the spec of the Transform."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype}, wanted bfloat16, float16 or float32")
    check_packed(packed, spec)
    weights: dict[str, Tensor] = {}
    for group in spec.groups:
        leaves = packed[group.key]
        for name, leaf in leaves.items():
            if is_sharded(leaf):
                raise ValueError(
                    f"packed '{group.key}.{name}': found a DTensor, wanted a plain tensor; unpack each rank's shard"
                )
        with torch.no_grad():
            parts = {name: leaf.detach() for name, leaf in leaves.items()}  # no_grad lets tangents through
            experts = unpack_reference(
                parts["codes"], parts["scale"], parts.get("global_scale"), format=group.format, out_dtype=dtype
            )
        if group.transposed:
            experts = experts.mT.contiguous()
        weights.update({group.names[0]: experts} if group.stacked else zip(group.names, experts, strict=True))
    return weights


def packed_leaves(group: Group) -> dict[str, LeafType]:
    """Shape and dtype of each packed leaf of a group, by name.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> packed_leaves(Group("w", ("w",), NVFP4, 1, (64, 32)))["codes"]
        ((1, 64, 16), torch.uint8)
    """
    return _leaves_of(group.format, group.experts, group.shape)


def _leaves_of(format: Format, experts: int, shape: tuple[int, int]) -> dict[str, LeafType]:
    out, columns = shape
    codes = (experts, out, columns * code_bits(format) // 8)
    leaves: dict[str, LeafType] = {"codes": (codes, code_dtype(format))}
    rows = () if format.block == (None, None) else format.granules(out, columns)
    scale = {"fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[format.scale]
    leaves["scale"] = ((experts, *rows), scale)
    if format.scale == "e4m3":
        leaves["global_scale"] = ((experts,), torch.float32)
    return leaves


def check_packed(packed: PackedTree, spec: Spec) -> None:
    """Raise unless packed weights fit the spec: groups, types, and the shape and dtype of each leaf.

    Raises:
        KeyError: A group is missing.
        ValueError: A group is unexpected; a leaf has another type, shape or dtype than the spec's.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> spec = Spec((Group("w", ("w",), INT8, 1, (8, 4)),))
        >>> check_packed({"w": {"codes": torch.zeros(1, 8, 4), "scale": torch.ones(1)}}, spec)
        Traceback (most recent call last):
        ...
        ValueError: packed 'w.codes': found (1, 8, 4) torch.float32, wanted (1, 8, 4) torch.int8
    """
    if unexpected := packed.keys() - {group.key for group in spec.groups}:
        raise ValueError(f"packed weights have unexpected groups: {sorted(unexpected)}")
    for group in spec.groups:
        if group.key not in packed:
            raise KeyError(f"group {group.key!r} is not among the packed ({len(packed)} groups)")
        leaves: Any = packed[group.key]
        wanted = packed_leaves(group)
        if not isinstance(leaves, Mapping) or leaves.keys() != wanted.keys():
            found = list(leaves) if isinstance(leaves, Mapping) else type(leaves).__name__
            raise ValueError(f"packed {group.key!r}: found {found}, wanted {list(wanted)} as {group.format.name} has")
        for name, (shape, dtype) in wanted.items():
            check_tensor(f"packed '{group.key}.{name}'", leaves[name], shape, dtype)
            if leaves[name].device != (device := leaves["codes"].device):
                raise ValueError(
                    f"packed '{group.key}.{name}': found on {leaves[name].device}, wanted on {device} as its codes"
                )


def _pack_group(group: Group, weights: Sequence[Tensor], scales: GroupState) -> list[Tensor]:
    amax, global_amax = scales.get("amax"), scales.get("global_amax")
    if has_kernel(weights):
        from fq_transforms.ops.pack.launch import pack_triton

        parts = pack_triton(weights, amax, global_amax, format=group.format, transposed=group.transposed)
        return [leaf for leaf in parts if leaf is not None]
    matrices = [(weight if group.stacked else weight[None]) for weight in weights]
    matrices = [weight.mT if group.transposed else weight for weight in matrices]
    types = _leaves_of(group.format, sum(map(len, matrices)), (matrices[0].shape[1], matrices[0].shape[2]))
    leaves = [torch.empty(shape, dtype=dtype, device=weights[0].device) for shape, dtype in types.values()]
    for i, x in enumerate(matrices):
        own = slice(i, i + len(x))
        a, g = (None if leaf is None else leaf[own] for leaf in (amax, global_amax))
        codes, *of_scales = (leaf[own] for leaf in leaves)
        for piece in pieces_of(x, group.format):
            of_piece = (None if leaf is None else piece.of_leaf(leaf) for leaf in (a, g))
            packed, *found = pack_reference(piece.of(x), *of_piece, format=group.format)
            piece.of(codes).copy_(packed)
            for leaf, scale in zip(of_scales, found, strict=False):  # a format without a global scale has None
                if scale is not None:
                    piece.of_leaf(leaf).copy_(scale)
    return leaves


def _without_weights(group: Group, layout: Layout | None, scales: GroupState, device: torch.device) -> list[Tensor]:
    """The leaves where there is no weight to read: on meta, or on a rank with an empty shard.

    A scale that collapses the axis along which the shard is empty is not empty itself; it comes from the state alone.
    """
    leaves = {
        name: torch.empty(shape if layout is None else layout.leaves[name].local_shape, dtype=dtype, device=device)
        for name, (shape, dtype) in packed_leaves(group).items()
    }
    if device.type == "meta":  # there PyTorch imports its compiler for some formulas, which takes seconds
        return list(leaves.values())
    scale, global_scale = pack_scales(scales.get("amax"), scales.get("global_amax"), format=group.format)
    known = {"scale": scale, "global_scale": global_scale}
    return list((leaves | {name: leaf for name, leaf in known.items() if leaf is not None}).values())


def check_packable(group: Group) -> None:
    """Raise ValueError unless codes and scales can stand for the group's weights."""
    format: Format = group.format
    if format.unit_scale_below:
        raise ValueError(
            f"group {group.key!r}: found {format.name}, whose scales below {format.unit_scale_below} become 1, for "
            "which no E4M3 scale stands, wanted a format that can be stored, such as NVFP4"
        )
    if code_bits(format) > 8:
        raise ValueError(
            f"group {group.key!r}: found {format.name}, whose elements have {code_bits(format)} bits, wanted codes of "
            "at most 8, such as FP8's"
        )
    multiple = {8: 1, 6: 4, 4: 2}[code_bits(format)]
    if group.shape[1] % multiple:
        raise ValueError(
            f"parameter {group.names[0]!r}: found (out, in) = {group.shape}, wanted `in` to be a multiple of "
            f"{multiple} for codes of {code_bits(format)} bits"
        )
