"""Scales as a layout's files hold them, and which weights a reader then gets otherwise than `fakequant` has them.

Readers multiply codes with a scale; NVFP4's in compressed-tensors divides one scale by another. A format that does the
same (`formats.is_own`) is read bit for bit. For another the numbers next to its own are searched, and what they cannot
mend is counted before anything is written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from fq_transforms.formats import Format, IntElement, dequantize_of, is_own
from fq_transforms.ops.pack.reference import unpack_reference
from fq_transforms.ops.quantize.reference import (
    dequantize_int,
    effective_scale,
    expert_scale,
    int_scale,
    valid,
)
from fq_transforms.pack import pack
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State

__all__ = ["Difference", "difference", "inverse", "multipliers", "stored"]

# In units of the last place, the nearest first.
NEIGHBOURS = (0, 1, -1, 2, -2)


class Difference(NamedTuple):
    """Weights that a reader gets otherwise: how many, and the largest relative difference."""

    weights: int
    largest: float


def inverse(scale: Tensor, of_zero: float) -> Tensor:
    """1 / scale, and `of_zero` where the scale is 0, which marks weights that are all zero.

    Example:
        >>> inverse(torch.tensor([4.0, 0.0]), of_zero=1.0)
        tensor([0.2500, 1.0000])
    """
    return torch.where(scale == 0, torch.full_like(scale, of_zero), scale.reciprocal())


def multipliers(scale: Float32[Tensor, "..."], element: IntElement, dtype: torch.dtype) -> Float32[Tensor, "..."]:
    """What codes are multiplied with to get, in `dtype`, what dividing by `scale` gives; 0 for a scale of 0.

    In bf16 the reciprocal would set five in a million weights a step off. So of the fp32 numbers next to it that one is
    taken by which fewest codes differ, the nearest of several. INT8 has no exact one in one of a hundred thousand
    granules: there one code is a step off. In fp32 it is the reciprocal: quotients and products differ there anyway.

    Example:
        >>> from fq_transforms.formats import IntElement
        >>> multipliers(torch.tensor([4.0, 0.0]), IntElement(qmax=127, low=-127, high=127), torch.bfloat16)
        tensor([0.2500, 0.0000])
    """
    nominal = inverse(scale, of_zero=0.0)
    if dtype == torch.float32:
        return nominal
    codes = torch.arange(1.0, max(-element.low, element.high) + 1, device=scale.device)
    wanted = (codes / scale[..., None]).to(dtype)
    best, fewest = nominal, torch.full_like(scale, torch.inf)
    for step in NEIGHBOURS:
        neighbour = torch.where(scale == 0, nominal, (nominal.view(torch.int32) + step).view(torch.float32))
        wrong = ((codes * neighbour[..., None]).to(dtype) != wanted).sum(-1).float()
        best, fewest = torch.where(wrong < fewest, neighbour, best), torch.minimum(wrong, fewest)
    return best


def stored(
    format: Format, layout: str, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The scales of `pack` as files of a layout hold them, for weights that are read in `dtype`.

    Example:
        >>> from fq_transforms.formats import NVFP4
        >>> scale, of_expert = torch.ones(1, 1).to(torch.float8_e4m3fn), torch.tensor(0.25)
        >>> stored(NVFP4, "compressed-tensors", scale, of_expert, torch.bfloat16)[1]
        tensor(4.)
    """
    if global_scale is not None:
        if not is_own(format, layout):
            global_scale = inverse(global_scale, of_zero=torch.inf)
        if dequantize_of(format, layout) == "divide":  # all codes are zero there
            global_scale = torch.where(global_scale == torch.inf, 1.0, global_scale)
        return scale, global_scale
    if isinstance(format.element, IntElement) and not is_own(format, layout):
        return multipliers(scale, format.element, dtype), None
    return scale, None


def difference(params: Mapping[str, Tensor], state: State, group: Group, layout: str, dtype: torch.dtype) -> Difference:
    """What a layout's library reads otherwise, of one group. Packs the group only if some code could be."""
    format, scales = group.format, state[group.key]
    if is_own(format, layout):
        return Difference(0, 0.0)
    read_as = replace(format, dequantize=dequantize_of(format, layout))
    if format.scale == "e4m3":
        amax = valid(scales["amax" if format.dynamic else "global_amax"])
        of_codes = [(None, g) for g in expert_scale(amax, format)]
    else:
        of_codes = [(s, None) for s in int_scale(valid(scales["amax"]), format)]
    off = [e for e, of_code in enumerate(of_codes) if _may_differ(format, read_as, layout, *of_code, dtype)]
    if not off:
        return Difference(0, 0.0)
    leaves = pack(params, {group.key: scales}, spec=Spec((group,)))[group.key]
    count, largest = 0, 0.0
    for expert in off:
        codes, *own = (leaf[expert] for leaf in leaves.values())
        scale, global_scale = own[0], own[1] if len(own) > 1 else None
        meant = unpack_reference(codes, scale, global_scale, format=format, out_dtype=dtype).double()
        in_file = stored(format, layout, scale, global_scale, dtype)
        found = unpack_reference(codes, *in_file, format=read_as, out_dtype=dtype).double()
        wrong = meant != found
        count += int(wrong.sum())
        relative = ((found - meant).abs() / meant.abs()).where(wrong, 0.0)
        largest = max(largest, float(relative.nan_to_num(torch.inf).max()))
    return Difference(count, largest)


def _may_differ(
    format: Format, read_as: Format, layout: str, scale: Tensor | None, global_scale: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether one of an expert's codes could be read otherwise, under any scale of a block that E4M3 has."""
    element = format.element
    if scale is not None:
        assert isinstance(element, IntElement)
        codes = torch.arange(1.0, max(-element.low, element.high) + 1, device=scale.device)
        in_file, _ = stored(format, layout, scale, None, dtype)
        meant, found = dequantize_int(codes, scale[..., None], format), codes * in_file[..., None]
    else:
        assert global_scale is not None
        every = torch.arange(1, 127, dtype=torch.uint8, device=global_scale.device).view(torch.float8_e4m3fn)
        _, in_file = stored(format, layout, every, global_scale, dtype)
        assert in_file is not None
        values = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=every.device)[:, None]
        meant = values * effective_scale(every.float(), global_scale, format)
        found = values * effective_scale(every.float(), in_file, read_as)
    return bool((meant.to(dtype) != found.to(dtype)).any())
