"""The operations as `autograd.Function`s: kernel or reference by the device, and the rules that torch.func needs.

A group is a sequence of tensors `[*experts, out, in]` (or `[*experts, in, out]` if transposed): N separate matrices, or
one stacked tensor. Its amax has all experts of all tensors along dimension 0, in order.

NOTE vmap: a mapped dimension becomes one more expert dimension in front of each tensor, so a batch is one launch too.
An unmapped weight is expanded with stride 0, not copied.

NOTE second Function: under torch.func, tensors saved for backward are wrappers without storage. So the clip gradient is
a Function of its own, whose forward sees plain tensors again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd import Function, forward_ad

from fq_transforms.formats import Format
from fq_transforms.ops.known import Contiguous
from fq_transforms.ops.quantize.reference import clip_backward_reference, expert_amax_reference, fake_quantize_reference
from fq_transforms.ops.relaunch import Placed

__all__ = ["Backward", "expert_amax", "fake_quantize", "fake_quantize_into", "is_transformed"]

# "lsq" is that of `ops.lsq`; here it passes gradients through, for formats with nothing to learn.
Backward = Literal["pass_through", "clip", "lsq"]


def fake_quantize(
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "..."] | None,
    *,
    format: Format,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
) -> tuple[Float[Tensor, "..."], ...]:
    """Fake-quantize each expert of a group by its own amax: `fake_quantize_reference`, differentiable in the weights.

    The gradient is that of the identity ("pass_through": no kernel, nothing saved), or with "clip" that of
    clamp(w, -amax, amax). Dynamic formats pass it through either way. The amax gets no gradient.

    Args:
        weights: N tensors [*experts, out, in] of one shape and dtype (bf16, fp16, fp32); [*experts, in, out] if
            transposed.
        amax: fp32 [E, *format.amax_shape(out, in)], E experts over all tensors; None for MX formats.
        global_amax: fp32 [E] for static two-level formats, else None.
        format: The numbers.
        transposed: True if a matrix is stored [in, out]. Granules always lie in [out, in].
        out_dtype: bf16, fp16 or fp32; the dtype of the weights if None.
        backward: "pass_through" or "clip".
        separate: On a GPU, one allocation a tensor, in place of one for the group.

    Returns:
        N new contiguous tensors; on a GPU, unless `separate`, views of one allocation.

    Raises:
        ValueError: There is no weight, or weights of no elements.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w = torch.tensor([[0.1, -0.04, 1.0, -7.0]], requires_grad=True)
        >>> (y,) = fake_quantize([w], torch.tensor([0.5]), None, format=FORMATS["INT8"], backward="clip")
        >>> y.sum().backward()
        >>> w.grad
        tensor([[1., 1., 0., 0.]])
    """
    _check_not_empty(weights)
    make = _Statics if torch.compiler.is_compiling() else _known_statics
    clip, is_contiguous = backward == "clip" and format.clips, type(weights) is Contiguous
    statics = make(format, transposed, out_dtype or weights[0].dtype, clip, separate, is_contiguous)
    if not _is_differentiated(weights, amax, global_amax):
        return _run_fake_quantize(statics, amax, global_amax, weights)
    return _apply_fake_quantize(statics, amax, global_amax, *weights)


def fake_quantize_into(
    outs: Sequence[Float[Tensor, "..."]],
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "..."] | None,
    *,
    format: Format,
    transposed: bool = False,
) -> Placed | None:
    """`fake_quantize` into memory that is there: contiguous tensors as it gives them. Not differentiable.

    Their versions are counted up, as by any change in place: a graph that has kept them raises in backward.

    Returns:
        The launch, if it is one that was made before: for `Relaunch`.
    """
    if weights[0].is_cuda:
        numbers: dict[str, Any] = {"format": format, "transposed": transposed}
        placed = _launchers().fake_quantize_into_triton(outs, weights, amax, global_amax, **numbers)
        torch.autograd.graph.increment_version(outs)
        return placed
    statics = _known_statics(format, transposed, outs[0].dtype, False, False)
    for out, result in zip(outs, _run_fake_quantize(statics, amax, global_amax, weights), strict=True):
        out.copy_(result)
    return None


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
    _check_not_empty(weights)
    statics = _Statics(format, transposed, torch.float32)
    if torch.compiler.is_compiling():
        return _run_expert_amax(statics, *(weight.detach() for weight in weights))
    amax, global_amax = _ExpertAmax.apply(statics, *weights)
    return amax, global_amax if format.has_global_amax else None


def _check_not_empty(weights: Sequence[Tensor]) -> None:
    if not weights or weights[0].numel() == 0:
        found = f"shape {tuple(weights[0].shape)}" if weights else "an empty list"
        raise ValueError(f"weights: found {found}, wanted the weights of at least one expert")


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool
    out_dtype: torch.dtype
    clip: bool = False
    separate: bool = False
    contiguous: bool = False  # the weights are known to be


_known_statics = cache(_Statics)


@cache
def _launchers() -> Any:
    """`ops.launch`, imported once a GPU asks for it: it needs Triton."""
    from fq_transforms.ops import launch

    return launch


def _is_differentiated(weights: Sequence[Tensor], *scales: Tensor | None) -> bool:
    """False if no transform and no gradient looks on: then the rules, and their cost to the host, can be left out."""
    return is_transformed() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *scales))
    )


def is_transformed() -> bool:
    """True within torch.func's transforms and forward-mode differentiation."""
    return (
        torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage] (as autograd.Function asks)
        or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage] (it has no public name)
    )


def _run_fake_quantize(
    statics: _Statics, amax: Tensor | None, global_amax: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    format, transposed, out_dtype = statics.format, statics.transposed, statics.out_dtype
    if weights[0].is_cuda:
        numbers: dict[str, Any] = {"transposed": transposed, "out_dtype": out_dtype}
        if torch.compiler.is_compiling():
            from fq_transforms.ops import launch

            run = launch.fake_quantize_separate_operator if statics.separate else launch.fake_quantize_operator
            out = run(list(weights), amax, global_amax, format=format.to_json(), **numbers)
        else:
            launch = _launchers()
            if statics.contiguous and not statics.separate:
                again = launch.calls.again(weights, amax, global_amax, format=format, **numbers)
                if again is not None:
                    return again
            run = launch.fake_quantize_separate_triton if statics.separate else launch.fake_quantize_triton
            out = run(weights, amax, global_amax, format=format, **numbers)
        return tuple(out) if isinstance(out, list) else _unstack(out, weights)
    outs: list[Tensor] = []
    for w, a, g in zip(weights, _split(amax, weights), _split(global_amax, weights), strict=True):
        y = fake_quantize_reference(_matrix(w, transposed), a, g, format=format, out_dtype=out_dtype)
        outs.append(_matrix(y, transposed).contiguous())
    return tuple(outs)


class _TracedFakeQuantize(Function):
    """What torch.compile can trace: no rules for jvp and vmap, which it refuses."""

    @staticmethod
    def forward(statics: _Statics, amax: Tensor | None, global_amax: Tensor | None, *weights: Tensor) -> Any:
        return _run_fake_quantize(statics, amax, global_amax, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, amax, _, *weights = inputs
        ctx.statics = statics
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        if statics.clip:
            ctx.save_for_backward(amax, *weights)
            ctx.save_for_forward(amax, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *_pull(ctx, grads, ctx.dtype)


class _FakeQuantize(_TracedFakeQuantize):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        # A tangent for each output, also where a weight has none: forward-mode autograd asks for all or nothing.
        some = next(tangent for tangent in tangents[3:] if tangent is not None)
        filled = [torch.zeros_like(some) if tangent is None else tangent for tangent in tangents[3:]]
        return tuple(_pull(ctx, filled, ctx.statics.out_dtype))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, amax, global_amax, *weights = args
        size, weight_dims = info.batch_size, in_dims[3:]
        folded = [_fold(w, d, size) for w, d in zip(weights, weight_dims, strict=True)]
        scales = [
            _fold_amax(s, d, weights, weight_dims, size) for s, d in zip((amax, global_amax), in_dims[1:3], strict=True)
        ]
        outs = _FakeQuantize.apply(statics, *scales, *folded)
        return outs, (0,) * len(weights)


class _EagerFakeQuantize(Function):
    """What plain autograd needs: where `setup_context` is apart, PyTorch binds a signature at each call."""

    @staticmethod
    def forward(
        ctx: Any, statics: _Statics, amax: Tensor | None, global_amax: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        tensors = Contiguous(weights) if statics.contiguous else weights
        out = _run_fake_quantize(statics, amax, global_amax, tensors)
        _TracedFakeQuantize.setup_context(ctx, (statics, amax, global_amax, *weights), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _TracedFakeQuantize.backward(ctx, *grads)


def _apply_fake_quantize(*args: Any) -> Any:
    """The Function for what looks on: for 32 experts plain autograd's costs the host 65 us, torch.func's 89."""
    if torch.compiler.is_compiling():
        return _TracedFakeQuantize.apply(*args)
    if is_transformed():
        return _FakeQuantize.apply(*args)
    return _EagerFakeQuantize.apply(*args)


def _run_expert_amax(statics: _Statics, *weights: Tensor) -> tuple[Tensor, Tensor | None]:
    if weights[0].is_cuda:
        from fq_transforms.ops.launch import expert_amax_operator, expert_amax_triton

        if torch.compiler.is_compiling():
            amax, global_amax = expert_amax_operator(list(weights), statics.format.to_json(), statics.transposed)
            return amax, global_amax if global_amax.numel() else None
        return expert_amax_triton(weights, format=statics.format, transposed=statics.transposed)
    parts = [expert_amax_reference(_matrix(w, statics.transposed), format=statics.format) for w in weights]
    lead = [w.dim() - 2 for w in weights]
    amax = torch.cat([_flat(a, n) for (a, _), n in zip(parts, lead, strict=True)])
    globals_ = [_flat(g, n) for (_, g), n in zip(parts, lead, strict=True) if g is not None]
    return amax, torch.cat(globals_) if globals_ else None


class _ExpertAmax(Function):
    @staticmethod
    def forward(statics: _Statics, *weights: Tensor) -> Any:
        amax, global_amax = _run_expert_amax(statics, *weights)
        # A Function returns tensors: an empty one stands for "no global amax".
        return amax, amax.new_empty(0) if global_amax is None else global_amax

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise AssertionError("amax is not differentiable")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        size, (statics, *weights) = info.batch_size, args
        folded = [_fold(w, d, size) for w, d in zip(weights, in_dims[1:], strict=True)]
        amax, global_amax = _ExpertAmax.apply(statics, *folded)
        counts = [_experts(w, d) for w, d in zip(weights, in_dims[1:], strict=True)]

        def unfold(leaf: Tensor) -> Tensor:
            parts = leaf.split([size * n for n in counts])
            return torch.cat([part.unflatten(0, (size, n)) for part, n in zip(parts, counts, strict=True)], dim=1)

        if global_amax.numel() == 0:
            return (unfold(amax), global_amax), (0, None)
        return (unfold(amax), unfold(global_amax)), (0, 0)


def _run_clip_backward(
    statics: _Statics, out_dtype: torch.dtype, amax: Tensor, *grads_and_weights: Tensor
) -> tuple[Tensor, ...]:
    half = len(grads_and_weights) // 2
    grads, weights = grads_and_weights[:half], grads_and_weights[half:]
    format, transposed = statics.format, statics.transposed
    if weights[0].is_cuda:
        from fq_transforms.ops.launch import clip_backward_operator, clip_backward_triton

        if torch.compiler.is_compiling():
            out = clip_backward_operator(list(grads), list(weights), amax, format.to_json(), transposed)
            return _unstack(out.to(out_dtype), weights)
        out = clip_backward_triton(grads, weights, amax, format=format, transposed=transposed)
        return _unstack(out.to(out_dtype), weights)
    outs: list[Tensor] = []
    for g, w, a in zip(grads, weights, _split(amax, weights), strict=True):
        assert a is not None
        out = clip_backward_reference(_matrix(g, transposed), _matrix(w, transposed), a, format=format)
        outs.append(_matrix(out, transposed).contiguous().to(out_dtype))
    return tuple(outs)


class _ClipBackward(Function):
    """Gradient where abs(weight) <= amax. Linear in the gradient, so its own derivative is itself."""

    @staticmethod
    def forward(statics: _Statics, out_dtype: torch.dtype, amax: Tensor, *grads_and_weights: Tensor) -> Any:
        return _run_clip_backward(statics, out_dtype, amax, *grads_and_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, out_dtype, amax, *grads_and_weights = inputs
        half = len(grads_and_weights) // 2
        ctx.statics, ctx.grad_dtype, ctx.out_dtype, ctx.half = statics, grads_and_weights[0].dtype, out_dtype, half
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, *grads_and_weights[half:])
        ctx.save_for_forward(amax, *grads_and_weights[half:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *_pull(ctx, grads, ctx.grad_dtype), *(None,) * ctx.half

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return tuple(_pull(ctx, tangents[3 : 3 + ctx.half], ctx.out_dtype))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        statics, out_dtype, amax, *pairs = args
        size, half = info.batch_size, len(pairs) // 2
        folded = [_fold(t, d, size) for t, d in zip(pairs, in_dims[3:], strict=True)]
        amax_folded = _fold_amax(amax, in_dims[2], pairs[half:], in_dims[3 + half :], size)
        outs = _ClipBackward.apply(statics, out_dtype, amax_folded, *folded)
        return outs, (0,) * half


def _pull(ctx: Any, vectors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cotangents to gradients, or tangents to output tangents: the derivative is symmetric."""
    if not ctx.statics.clip:
        if ctx.dtype == ctx.statics.out_dtype:
            return list(vectors)
        return [v if v is None or v.dtype == dtype else v.to(dtype) for v in vectors]
    amax, *weights = ctx.saved_tensors
    live = [i for i, v in enumerate(vectors) if v is not None]
    if not live:
        return [None] * len(vectors)
    filled = [torch.zeros_like(w) if v is None else v for v, w in zip(vectors, weights, strict=True)]
    run = _run_clip_backward if torch.compiler.is_compiling() else _ClipBackward.apply
    pulled = run(ctx.statics, dtype, amax, *filled, *weights)
    return [pulled[i] if i in live else None for i in range(len(vectors))]


def _unstack(out: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results [E, ., .] as one tensor a weight, in the weight's own shape, all in one storage."""
    if weights[0].dim() == 2:
        if torch.compiler.is_compiling():
            return out.unbind()
        rows = out.shape[1]  # the cheapest way to N tensors (bench, host): autograd does not count them as views
        return tuple(torch.unsafe_split_with_sizes(out.flatten(0, 1), [rows] * len(weights)))
    parts = out.split([_experts(w) for w in weights])
    return tuple(part.view(w.shape) for part, w in zip(parts, weights, strict=True))


def _matrix(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.mT if transposed else tensor


def _experts(weight: Tensor, batch_dim: int | None = None) -> int:
    """Experts in a tensor [*experts, ., .], not counting a mapped dimension."""
    sizes = list(weight.shape)
    if batch_dim is not None:
        del sizes[batch_dim]
    return prod(sizes[:-2])


def _split(leaf: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Each tensor's part of a leaf [E, ...], with the tensor's own expert dimensions."""
    if leaf is None:
        return [None] * len(weights)
    parts = leaf.split([_experts(w) for w in weights])
    return [part.reshape((*w.shape[:-2], *part.shape[1:])) for part, w in zip(parts, weights, strict=True)]


def _flat(leaf: Tensor, expert_dims: int) -> Tensor:
    """[*experts, ...] to [E, ...]."""
    return leaf.reshape((-1, *leaf.shape[expert_dims:]))


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Mapped dimension to the front, as one more expert dimension; an unmapped tensor is repeated without a copy."""
    return tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)


def _fold_amax(
    leaf: Tensor | None, dim: int | None, weights: Sequence[Tensor], weight_dims: Sequence[int | None], size: int
) -> Tensor | None:
    """A leaf [E, ...] for the folded weights: each tensor's experts `size` times, the mapped dimension outermost."""
    if leaf is None:
        return None
    counts = [_experts(w, d) for w, d in zip(weights, weight_dims, strict=True)]
    parts = _fold(leaf, dim, size).split(counts, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])
