# pyright: reportPrivateUsage=false
# Part of `ops.autograd`, split by operation: what is private there is private to both.
"""Learned scales as `autograd.Function`s: fake quantization that is differentiable in its amax as well.

Three Functions: the fake quantization, its pullback (cotangents to gradients) and its pushforward (tangents to
tangents). The latter two are linear in their vectors and each other's transpose, so each is the other's derivative, and
every order of derivatives is there; errors of rounding count as constants, as they do in the formula.

NOTE pushforward: it is plain PyTorch on every device, since training goes the other way. The pullback is a kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd import Function

from fq_transforms.formats import Format
from fq_transforms.ops.quantize.autograd import (
    _check_not_empty,
    _experts,
    _flat,
    _fold,
    _fold_amax,
    _is_differentiated,
    _known_statics,
    _matrix,
    _run_fake_quantize,
    _split,
    _Statics,
    _unstack,
    is_transformed,
)
from fq_transforms.ops.quantize.lsq_reference import lsq_backward_reference, lsq_push_reference

__all__ = ["fake_quantize_lsq"]


def fake_quantize_lsq(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, "..."] | None,
    *,
    format: Format,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    separate: bool = False,
) -> tuple[Float[Tensor, "..."], ...]:
    """`ops.autograd.fake_quantize`, differentiable in the weights as under "clip", and in amax and global amax.

    Gradients: `ops.lsq_reference.lsq_backward_reference`. Arguments, result and errors are as there.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, amax = torch.tensor([[0.7, -9.0, 6.0]]), torch.tensor([7.0], requires_grad=True)
        >>> (y,) = fake_quantize_lsq([w], amax, None, format=FORMATS["INT8"])
        >>> y.sum().backward()
        >>> amax.grad
        tensor([-1.0044])
    """
    _check_not_empty(weights)
    make = _Statics if torch.compiler.is_compiling() else _known_statics
    statics = make(format, transposed, out_dtype or weights[0].dtype, format.clips, separate)
    if not _is_differentiated(weights, amax, global_amax):
        return _run_fake_quantize(statics, amax, global_amax, weights)
    has_rules = is_transformed() and not torch.compiler.is_compiling()
    return (_Lsq if has_rules else _TracedLsq).apply(statics, amax, global_amax, *weights)


def _run_pull(
    statics: _Statics, dtype: torch.dtype, amax: Tensor, global_amax: Tensor | None, *grads_and_weights: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of amax, of global amax (empty if there is none), and of the weights."""
    half = len(grads_and_weights) // 2
    grads, weights = grads_and_weights[:half], grads_and_weights[half:]
    format, transposed = statics.format, statics.transposed
    if weights[0].is_cuda:
        from fq_transforms.ops.quantize.lsq_launch import lsq_backward_operator, lsq_backward_triton

        if torch.compiler.is_compiling():
            out, of_amax, of_global = lsq_backward_operator(
                list(grads), list(weights), amax, global_amax, format.to_json(), transposed
            )
        else:
            numbers: dict[str, Any] = {"format": format, "transposed": transposed}
            out, of_amax, of_global = lsq_backward_triton(grads, weights, amax, global_amax, **numbers)
        return of_amax, _or_empty(of_global, amax), *_unstack(out.to(dtype), weights)
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    global_sums: list[Tensor] = []
    scales = (_split(amax, weights), _split(global_amax, weights))
    for g, w, a, of_expert in zip(grads, weights, *scales, strict=True):
        assert a is not None
        out, of_amax, of_global = lsq_backward_reference(
            _matrix(g, transposed), _matrix(w, transposed), a, of_expert, format=format
        )
        outs.append(_matrix(out, transposed).contiguous().to(dtype))
        sums.append(_flat(of_amax, w.dim() - 2))
        if of_global is not None:
            global_sums.append(_flat(of_global, w.dim() - 2))
    return torch.cat(sums), torch.cat(global_sums) if global_sums else _or_empty(None, amax), *outs


def _run_push(
    statics: _Statics,
    dtype: torch.dtype,
    amax: Tensor,
    global_amax: Tensor | None,
    amax_tangent: Tensor,
    global_amax_tangent: Tensor | None,
    *tangents_and_weights: Tensor,
) -> tuple[Tensor, ...]:
    half = len(tangents_and_weights) // 2
    tangents, weights = tangents_and_weights[:half], tangents_and_weights[half:]
    outs: list[Tensor] = []
    leaves = [_split(leaf, weights) for leaf in (amax_tangent, global_amax_tangent, amax, global_amax)]
    for t, w, amax_t, global_t, a, g in zip(tangents, weights, *leaves, strict=True):
        assert a is not None
        assert amax_t is not None
        x, along = _matrix(w, statics.transposed), _matrix(t, statics.transposed)
        out = lsq_push_reference(along, amax_t, global_t, x, a, g, format=statics.format, out_dtype=dtype)
        outs.append(_matrix(out, statics.transposed).contiguous())
    return tuple(outs)


class _TracedLsq(Function):
    """What plain autograd and torch.compile take: no rules for jvp and vmap, which the latter refuses."""

    @staticmethod
    def forward(statics: _Statics, amax: Tensor, global_amax: Tensor | None, *weights: Tensor) -> Any:
        return _run_fake_quantize(statics, amax, global_amax, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, amax, global_amax, *weights = inputs
        ctx.statics = statics
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, global_amax, *weights)
        ctx.save_for_forward(amax, global_amax, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        live = [grad is not None for grad in grads]
        if not any(live):
            return None, None, None, *grads
        run = _run_pull if torch.compiler.is_compiling() else _Pull.apply
        filled = _filled(grads, weights, ctx.statics.out_dtype)
        of_amax, of_global, *pulled = run(ctx.statics, weights[0].dtype, amax, global_amax, *filled, *weights)
        kept = [p if is_live else None for p, is_live in zip(pulled, live, strict=True)]
        return None, of_amax, None if global_amax is None else of_global, *kept


class _Lsq(_TracedLsq):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        leaves = _filled_leaves(tangents[1:3], (amax, global_amax))
        filled = _filled(tangents[3:], weights, weights[0].dtype)
        return tuple(_Push.apply(ctx.statics, ctx.statics.out_dtype, amax, global_amax, *leaves, *filled, *weights))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, amax, global_amax, *weights = args
        fold = _Folding(info.batch_size, weights, in_dims[3:])
        outs = _Lsq.apply(
            statics, fold.leaf(amax, in_dims[1]), fold.leaf(global_amax, in_dims[2]), *fold.all(weights, in_dims[3:])
        )
        return outs, (0,) * len(weights)


class _Pull(Function):
    """Cotangents to gradients (amax, global amax, weights). Linear in the cotangents."""

    @staticmethod
    def forward(
        statics: _Statics, dtype: torch.dtype, amax: Tensor, global_amax: Tensor | None, *grads_and_weights: Tensor
    ) -> Any:
        return _run_pull(statics, dtype, amax, global_amax, *grads_and_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, dtype, amax, global_amax, *pairs = inputs
        half = len(pairs) // 2
        ctx.statics, ctx.dtype, ctx.grad_dtype, ctx.half = statics, dtype, pairs[0].dtype, half
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, global_amax, *pairs[half:])
        ctx.save_for_forward(amax, global_amax, *pairs[half:])

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        leaves = _filled_leaves(vectors[:2], (amax, global_amax))
        filled = _filled(vectors[2:], weights, ctx.dtype)
        pushed = _Push.apply(ctx.statics, ctx.grad_dtype, amax, global_amax, *leaves, *filled, *weights)
        return None, None, None, None, *pushed, *(None,) * ctx.half

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        filled = _filled(tangents[4 : 4 + ctx.half], weights, ctx.grad_dtype)
        return tuple(_Pull.apply(ctx.statics, ctx.dtype, amax, global_amax, *filled, *weights))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, dtype, amax, global_amax, *pairs = args
        half = len(pairs) // 2
        fold = _Folding(info.batch_size, pairs[half:], in_dims[4 + half :])
        leaves = fold.leaf(amax, in_dims[2]), fold.leaf(global_amax, in_dims[3])
        of_amax, of_global, *outs = _Pull.apply(statics, dtype, *leaves, *fold.all(pairs, in_dims[4:]))
        if global_amax is None:
            return (fold.unfolded(of_amax), of_global, *outs), (0, None, *(0,) * half)
        return (fold.unfolded(of_amax), fold.unfolded(of_global), *outs), (0, 0, *(0,) * half)


class _Push(Function):
    """Tangents (amax, global amax, weights) to those of the fake-quantized weights. Linear in the tangents."""

    @staticmethod
    def forward(statics: _Statics, dtype: torch.dtype, *tensors: Any) -> Any:
        return _run_push(statics, dtype, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, dtype, amax, global_amax, _, _, *pairs = inputs
        half = len(pairs) // 2
        ctx.statics, ctx.dtype, ctx.tangent_dtype, ctx.half = statics, dtype, pairs[0].dtype, half
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, global_amax, *pairs[half:])
        ctx.save_for_forward(amax, global_amax, *pairs[half:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        filled = _filled(grads, weights, ctx.dtype)
        of_amax, of_global, *pulled = _Pull.apply(ctx.statics, ctx.tangent_dtype, amax, global_amax, *filled, *weights)
        of_global = None if global_amax is None else of_global
        return None, None, None, None, of_amax, of_global, *pulled, *(None,) * ctx.half

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        leaves = _filled_leaves(tangents[4:6], (amax, global_amax))
        filled = _filled(tangents[6 : 6 + ctx.half], weights, ctx.tangent_dtype)
        return tuple(_Push.apply(ctx.statics, ctx.dtype, amax, global_amax, *leaves, *filled, *weights))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, dtype, *leaves = args[:6]
        pairs = args[6:]
        half = len(pairs) // 2
        fold = _Folding(info.batch_size, pairs[half:], in_dims[6 + half :])
        folded = [fold.leaf(leaf, dim) for leaf, dim in zip(leaves, in_dims[2:6], strict=True)]
        outs = _Push.apply(statics, dtype, *folded, *fold.all(pairs, in_dims[6:]))
        return outs, (0,) * half


class _Folding:
    """A mapped dimension as one more expert dimension of each tensor, and back for leaves [E, ...]."""

    def __init__(self, size: int, weights: Sequence[Tensor], dims: Sequence[int | None]) -> None:
        self.size, self.weights, self.dims = size, weights, dims

    def all(self, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        return [_fold(tensor, dim, self.size) for tensor, dim in zip(tensors, dims, strict=True)]

    def leaf(self, leaf: Tensor | None, dim: int | None) -> Tensor | None:
        return _fold_amax(leaf, dim, self.weights, self.dims, self.size)

    def unfolded(self, leaf: Tensor) -> Tensor:
        counts = [_experts(w, d) for w, d in zip(self.weights, self.dims, strict=True)]
        parts = leaf.split([self.size * n for n in counts])
        return torch.cat([part.unflatten(0, (self.size, n)) for part, n in zip(parts, counts, strict=True)], dim=1)


def _filled(vectors: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros where there is none."""
    return [torch.zeros_like(w, dtype=dtype) if v is None else v for v, w in zip(vectors, like, strict=True)]


def _filled_leaves(vectors: Sequence[Tensor | None], leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(vectors, leaves, strict=True)
    return [None if leaf is None else torch.zeros_like(leaf) if v is None else v for v, leaf in pairs]


def _or_empty(leaf: Tensor | None, like: Tensor) -> Tensor:
    """A Function returns tensors: an empty one stands for none."""
    return like.new_empty(0) if leaf is None else leaf
