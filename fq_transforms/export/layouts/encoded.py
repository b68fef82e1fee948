"""Weights that a folder stores quantized: which of its tensors they are, and the plain weights that these stand for."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EncodedWeight", "Found", "check_finite", "of_blocks", "take"]


class EncodedWeight(NamedTuple):
    """A weight that is stored in codes and scales.

    Attributes:
        format: In words, for tables: "NVFP4", "FP8 in blocks of (128, 128)".
        parts: What each tensor is to the decoder, to its name in the files.
        shape: Of the plain weight: [out, in], or that of a stack.
        decode: From the parts, of all experts of a stack or of some, to plain weights of a dtype.
        exponents: MXFP4: the part that holds the E8M0 scales of blocks of 32; else None.
    """

    format: str
    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]
    exponents: str | None = None


class Found(NamedTuple):
    """What of a folder is quantized: plain names to weights, and names of tensors that nothing else needs, with why."""

    weights: dict[str, EncodedWeight]
    left: dict[str, str]


def check_finite(name: str, weight: Tensor, part: slice | None, what: str) -> None:
    """Raise ValueError if there is NaN or infinity, of a stack or some experts of one with the number of the expert.

    Example:
        >>> check_finite("down_proj", torch.tensor([[[1.0]], [[torch.nan]]]), slice(4, 6), "bf16")
        Traceback (most recent call last):
        ...
        ValueError: tensor 'down_proj', expert 5: found NaN or infinity, of bf16, wanted finite weights
    """
    is_finite = weight.isfinite()
    if not bool(is_finite.all()):
        expert = int((~is_finite).nonzero()[0, 0]) + (part.start if part else 0)
        of = f", expert {expert}" if weight.dim() > 2 else ""
        raise ValueError(f"tensor {name!r}{of}: found NaN or infinity, of {what}, wanted finite weights")


def of_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes [..., out, in] times the scale of their block [..., out/rows, in/columns], in fp32, rounded once.

    Example:
        >>> of_blocks(torch.ones(1, 3), torch.tensor([[2.0, 4.0]]), (128, 2), torch.float32)
        tensor([[2., 2., 4.]])
    """
    rows, columns = block
    out, width = codes.shape[-2:]
    per_row = scale.float().repeat_interleave(columns, -1)[..., :width].repeat_interleave(rows, -2)[..., :out, :]
    return (codes.float() * per_row).to(dtype)


def take(parts: Mapping[str, str], wanted: tuple[str, ...], optional: tuple[str, ...], what: str) -> dict[str, str]:
    """The parts of a weight. Raises ValueError, beginning with `what`, if one is missing or unexpected."""
    if missing := [part for part in wanted if part not in parts]:
        raise ValueError(f"{what}: found {sorted(parts)}, wanted {missing[0]!r} beside them")
    if others := sorted(parts.keys() - {*wanted, *optional}):
        raise ValueError(f"{what}: found {others[0]!r}, whose meaning is not known, wanted {[*wanted, *optional]}")
    return {part: parts[part] for part in wanted}
