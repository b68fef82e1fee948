"""Amax as an `autograd.Function`: kernel or reference by the device, and the rules that torch.func needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.launch import check_not_empty, flat, format_of, has_kernel, is_traced
from fq_transforms.ops.pieces import is_cut, pieces_of
from fq_transforms.ops.traced import left_alone
from fq_transforms.ops.vmap import Constant, Mapped

__all__ = ["expert_amax"]


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool

    def mapped(self, size: int) -> "_Statics":
        return self


def expert_amax(
    weights: Sequence[Float[Tensor, "..."]], *, format: Format, transposed: bool = False
) -> tuple[Float32[Tensor, "..."], Float32[Tensor, "..."] | None]:
    """Amax of each expert of a group: `expert_amax_reference`. Not differentiable.

    Args:
        weights: N tensors [*experts, out, in] of one shape and dtype; [*experts, in, out] if transposed.
        format: The numbers; for dynamic formats, MX too, the granule is the whole expert.
        transposed: True if a matrix is stored [in, out].

    Returns:
        amax, fp32 [E, *format.amax_shape(out, in)], and global_amax, fp32 [E] for static two-level formats, else None.

    Raises:
        ValueError: There is no weight, or weights of no elements.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> expert_amax([torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 0.25]])], format=FORMATS["FP8"])
        (tensor([3.0000, 0.5000]), None)
    """
    check_not_empty(weights)
    if torch.compiler.is_compiling():
        from fq_transforms.ops import in_graph  # noqa: F401  # pyright: ignore[reportUnusedImport] (tells the compiler)

        amax, global_amax = expert_amax_traced(format.to_json(), transposed, *weights)
    else:
        amax, global_amax = _ExpertAmax.apply(_Statics(format, transposed), *weights)
    return amax, global_amax if format.has_global_amax else None


@left_alone
def expert_amax_traced(format: str, transposed: bool, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """`expert_amax`; an empty tensor stands for "no global amax"."""
    return _ExpertAmax.apply(_Statics(format_of(format), transposed), *weights)


def _run_expert_amax(statics: _Statics, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Amax and global amax, of which an empty one stands for none: a Function returns tensors."""
    format, transposed = statics.format, statics.transposed
    if has_kernel(weights):
        from fq_transforms.ops.amax.launch import expert_amax_operator, expert_amax_triton

        if is_traced(weights):
            return expert_amax_operator(list(weights), format.to_json(), transposed)
        amax, global_amax = expert_amax_triton(weights, format=format, transposed=transposed)
        return amax, amax.new_empty(0) if global_amax is None else global_amax
    parts = [_amax(w.mT if transposed else w, format) for w in weights]
    amax = torch.cat([leaf for leaf, _ in parts])
    globals_ = [leaf for _, leaf in parts if leaf is not None]
    return amax, torch.cat(globals_) if globals_ else amax.new_empty(0)


def _amax(weight: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """`expert_amax_reference` of each expert, [E, ...]; on a CPU in pieces."""
    if not is_cut([weight]):
        amax, global_amax = expert_amax_reference(weight, format=format)
        return flat(amax, weight), None if global_amax is None else flat(global_amax, weight)
    x = weight.reshape(-1, *weight.shape[-2:])
    shape = (len(x), *format.amax_shape(*x.shape[-2:]))
    amax = torch.zeros(shape)
    global_amax = torch.zeros(shape[:1]) if format.has_global_amax else None
    for piece in pieces_of(x, format):
        parts = expert_amax_reference(piece.of(x), format=format)
        for leaf, part in zip((amax, global_amax), parts, strict=True):
            if leaf is not None and part is not None:
                here = piece.of_leaf(leaf)
                torch.maximum(here, part, out=here)
    return amax, global_amax


class _ExpertAmax(Constant, Mapped):
    leaf_results = 2

    @staticmethod
    def forward(statics: _Statics, *weights: Tensor) -> Any:
        return _run_expert_amax(statics, *weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None, None
