"""Experts as gpt-oss has them on the hub: stacks of MXFP4, read only.

    {stack}_blocks    two E2M1 in a byte, uint8 [E, out, in/32, 16]
    {stack}_scales    exponent + 127, uint8 [E, out, in/32]

They stand for a stack [E, in, out], of the name without the ending.

Source: `convert_moe_packed_tensors` of transformers, which decodes them here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fq_transforms.export.files.shards import Files, TensorType
from fq_transforms.export.layouts.encoded import EncodedWeight, Found
from fq_transforms.export.names.families import decode_mxfp4

__all__ = ["find"]


def find(files: Files, about: Mapping[str, Any]) -> Found:
    """What is stored so. Raises ValueError for blocks without scales, and shapes that do not fit."""
    weights: dict[str, EncodedWeight] = {}
    for name, place in files.places.items():
        if not name.endswith("_blocks"):
            continue
        stack = name.removesuffix("_blocks")
        scales = files.places.get(f"{stack}_scales")
        shape = place.type.shape
        wanted = TensorType("U8", (*shape[:3], 16)), TensorType("U8", shape[:3])
        if len(shape) != 4 or scales is None or (place.type, scales.type) != wanted:
            found = "none" if scales is None else f"{scales.type.dtype} {scales.type.shape}"
            raise ValueError(
                f"tensor {name!r}: found {place.type.dtype} {shape} and scales {found}, wanted U8 [E, out, in/32, 16] "
                f"and '{stack}_scales' U8 [E, out, in/32]"
            )
        experts, out, blocks, _ = shape
        parts = {"blocks": name, "scales": f"{stack}_scales"}
        weights[stack] = EncodedWeight("MXFP4", parts, (experts, 32 * blocks, out), _decode, "scales")
    return Found(weights, {})


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return decode_mxfp4(parts["blocks"], parts["scales"], dtype)
