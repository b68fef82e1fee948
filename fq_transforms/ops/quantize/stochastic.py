# pyright: reportPrivateUsage=false
# Part of `ops.autograd`, split by operation: what is private there is private to both.
"""Stochastic rounding as `autograd.Function`s, with the gradients of `ops.autograd`, which do not see the rounding.

NOTE vmap over seeds: a mapped seed becomes one seed an expert, folded as an amax is. Weights and states that are mapped
under one seed draw the same bits for each element of the batch, as a loop over it would.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd import Function

from fq_transforms.formats import Format
from fq_transforms.ops.quantize.autograd import (
    Backward,
    _check_not_empty,
    _experts,
    _fold,
    _fold_amax,
    _is_differentiated,
    _known_statics,
    _matrix,
    _pull,
    _split,
    _Statics,
    _unstack,
    is_transformed,
)
from fq_transforms.ops.quantize.stochastic_reference import random_words, stochastic_reference
from fq_transforms.rounding import Stream

__all__ = ["fake_quantize_stochastic"]


def fake_quantize_stochastic(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "..."] | None,
    seed: Int64[Tensor, ""],
    *,
    stream: Stream,
    format: Format,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
) -> tuple[Float[Tensor, "..."], ...]:
    """`ops.autograd.fake_quantize`, rounded by chance: `stochastic_reference`, differentiable in the weights.

    Args:
        weights: As there.
        amax: As there.
        global_amax: As there.
        seed: On the device of the weights.
        stream: Which random bits; its `experts` is set here.
        format: The numbers.
        transposed: As there.
        out_dtype: As there.
        backward: "pass_through" or "clip".
        separate: As there.

    Raises:
        ValueError: There is no weight, or weights of no elements.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> w = torch.tensor([[127.0, 0.25, 0.25, 0.25, 0.25]])
        >>> fake_quantize_stochastic([w], torch.tensor([127.0]), None, torch.tensor(3), stream=Stream(0), format=INT8)
        (tensor([[127.,   1.,   0.,   0.,   0.]]),)
    """
    _check_not_empty(weights)
    stream = replace(stream, experts=_experts(weights[0]))
    make = _Statics if torch.compiler.is_compiling() else _known_statics
    statics = make(format, transposed, out_dtype or weights[0].dtype, backward == "clip" and format.clips, separate)
    if not _is_differentiated(weights, amax, global_amax, seed):
        return _run_stochastic(statics, stream, seed, amax, global_amax, *weights)
    is_eager = is_transformed() and not torch.compiler.is_compiling()
    function = _Stochastic if is_eager else _TracedStochastic
    return function.apply(statics, stream, seed, amax, global_amax, *weights)


def _run_stochastic(
    statics: _Statics, stream: Stream, seed: Tensor, amax: Tensor | None, global_amax: Tensor | None, *weights: Tensor
) -> tuple[Tensor, ...]:
    format, transposed, out_dtype = statics.format, statics.transposed, statics.out_dtype
    if weights[0].is_cuda:
        from fq_transforms.ops import stochastic_launch as launch

        numbers: dict[str, Any] = {"transposed": transposed, "out_dtype": out_dtype}
        if torch.compiler.is_compiling():
            run = launch.stochastic_separate_operator if statics.separate else launch.stochastic_operator
            places = list(stream.numbers)
            out = run(list(weights), amax, global_amax, seed, stream=places, format=format.to_json(), **numbers)
        else:
            run = launch.stochastic_separate_triton if statics.separate else launch.stochastic_triton
            out = run(weights, amax, global_amax, seed, stream=stream, format=format, **numbers)
        return tuple(out) if isinstance(out, list) else _unstack(out, weights)
    outs: list[Tensor] = []
    seeds = [seed] * len(weights) if seed.dim() == 0 else seed.split([_experts(w) for w in weights])
    scales = (_split(amax, weights), _split(global_amax, weights))
    for i, (w, s, a, g) in enumerate(zip(weights, seeds, *scales, strict=True)):
        x = _matrix(w, transposed)
        own = torch.arange(stream.experts, device=w.device) + (stream.first_expert + i * stream.experts)
        # Of copies only those with seeds of their own need words of their own.
        numbers_of = own if s.dim() == 0 else own.repeat(stream.copies)
        rows, columns = ((stream.row, x.shape[-2]), (stream.column, x.shape[-1]))
        words = random_words(s, numbers_of, stream.group, rows, columns)
        if s.dim() == 0:
            words = words.repeat(stream.copies, 1, 1)
        y = stochastic_reference(x, a, g, words.view(x.shape), format=format, out_dtype=out_dtype)
        outs.append(_matrix(y, transposed).contiguous())
    return tuple(outs)


class _TracedStochastic(Function):
    """What plain autograd and torch.compile take: no rules for jvp and vmap, which the latter refuses."""

    @staticmethod
    def forward(statics: _Statics, stream: Stream, seed: Tensor, *tensors: Any) -> Any:
        return _run_stochastic(statics, stream, seed, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, _, _, amax, _, *weights = inputs
        ctx.statics = statics
        ctx.dtype, ctx.shape, ctx.device = weights[0].dtype, weights[0].shape, weights[0].device
        ctx.set_materialize_grads(False)
        if statics.clip:
            ctx.save_for_backward(amax, *weights)
            ctx.save_for_forward(amax, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, None, None, *_pull(ctx, grads, ctx.dtype)


class _Stochastic(_TracedStochastic):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        # As in `ops.autograd`: forward-mode autograd asks for all tangents or for none.
        some = next((tangent for tangent in tangents[5:] if tangent is not None), None)
        if some is None:  # along the amax alone, which has no gradient
            some = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        filled = [torch.zeros_like(some) if tangent is None else tangent for tangent in tangents[5:]]
        return tuple(_pull(ctx, filled, ctx.statics.out_dtype))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, stream, seed, amax, global_amax, *weights = args
        size, weight_dims = info.batch_size, in_dims[5:]
        folded = [_fold(w, d, size) for w, d in zip(weights, weight_dims, strict=True)]
        scales = [
            _fold_amax(s, d, weights, weight_dims, size) for s, d in zip((amax, global_amax), in_dims[3:5], strict=True)
        ]
        seed_dim = in_dims[2]
        if seed_dim is not None:
            seed = seed.movedim(seed_dim, 0)
            if seed.dim() == 1:  # not yet one an expert
                experts = sum(_experts(w, d) for w, d in zip(weights, weight_dims, strict=True))
                seed = seed[:, None].expand(size, experts)
        if seed.dim() > 0:
            seed = _fold_amax(seed, None if seed_dim is None else 0, weights, weight_dims, size)
        more = replace(stream, copies=stream.copies * size)
        outs = _Stochastic.apply(statics, more, seed, *scales, *folded)
        return outs, (0,) * len(weights)
