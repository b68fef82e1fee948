"""Fake quantization as `autograd.Function`s: kernel or reference by the device, and the rules that torch.func needs.

Weights are a group, as `fq_transforms.ops.launch` has it.

NOTE second Function: under torch.func, tensors saved for backward are wrappers without storage. So each gradient is a
Function of its own, whose forward sees plain tensors again. All of them are linear in their vectors, so that every
order of derivatives is there: the clip gradient is its own transpose, and the pullback and the pushforward of learned
scales are each other's. Errors of rounding count as constants, as they do in the formula.

NOTE two Functions: torch.func needs rules for jvp and vmap, and `setup_context` apart, for which PyTorch binds a
signature at each call. Plain autograd need not pay for that: for 32 experts its own Function costs the host 65 us,
torch.func's 89. torch.compile traces neither: see `fq_transforms.ops.traced`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd import Function

from fq_transforms.formats import Format
from fq_transforms.ops import private
from fq_transforms.ops.launch import (
    Contiguous,
    check_not_empty,
    experts_of,
    flat,
    format_of,
    has_kernel,
    is_traced,
    results_for,
    split,
    unstacked,
)
from fq_transforms.ops.pieces import is_cut, pieces_of
from fq_transforms.ops.quantize.reference import (
    clip_backward_reference,
    fake_quantize_reference,
    lsq_backward_reference,
    lsq_push_reference,
    random_words,
    stochastic_reference,
)
from fq_transforms.ops.traced import left_alone
from fq_transforms.ops.vmap import Mapped
from fq_transforms.rounding import Stream

__all__ = ["Backward", "fake_quantize", "fake_quantize_into", "pull_back"]

T = TypeVar("T")

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
    seed: Int64[Tensor, ""] | None = None,
    stream: Stream | None = None,
) -> tuple[Float[Tensor, "..."], ...]:
    """Fake-quantize each expert of a group by its own amax: `fake_quantize_reference`, differentiable in the weights.

    Args:
        weights: N tensors [*experts, out, in], or [*experts, in, out] if transposed, of one shape and dtype.
        amax: fp32 [E, *format.amax_shape(out, in)], E experts over all tensors; None for MX formats.
        global_amax: fp32 [E] for static two-level formats, else None.
        format: The numbers.
        transposed: True if a matrix is stored [in, out]. Granules always lie in [out, in].
        out_dtype: bf16, fp16 or fp32; the dtype of the weights if None.
        backward: "pass_through": the gradient of the identity (no kernel, nothing saved). "clip": that of
            clamp(w, -amax, amax); dynamic formats pass it through. "lsq": that of "clip", and `lsq_backward_reference`
            to amax and global amax, which get none otherwise; MX formats, with nothing to learn, pass it through.
        separate: On a GPU, one allocation per tensor, in place of one for the group.
        seed: On the device of the weights, with a stream: rounded as `stochastic_reference` does, unseen by gradients.
        stream: Which random bits; its `experts` is set here.

    Returns:
        N new contiguous tensors; on a GPU, unless `separate`, views of one allocation.

    Raises:
        ValueError: There is no weight, or weights of no elements.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, amax = torch.tensor([[0.7, -9.0, 6.0]], requires_grad=True), torch.tensor([7.0], requires_grad=True)
        >>> (y,) = fake_quantize([w], amax, None, format=FORMATS["INT8"], backward="lsq")
        >>> y.sum().backward()
        >>> w.grad, amax.grad
        (tensor([[1., 0., 1.]]), tensor([-1.0044]))
    """
    check_not_empty(weights)
    if (backward == "clip" and not format.clips) or (backward == "lsq" and amax is None):
        backward = "pass_through"
    dtype, is_contiguous = out_dtype or weights[0].dtype, type(weights) is Contiguous
    statics = _statics(weights, stream, format, transposed, dtype, backward, separate, is_contiguous)
    if torch.compiler.is_compiling():
        from fq_transforms.ops import in_graph  # noqa: F401  # pyright: ignore[reportUnusedImport] (tells the compiler)

        draws = None if statics.stream is None else statics.stream.numbers
        numbers = (format.to_json(), transposed, dtype, backward, separate, draws)
        return fake_quantize_traced(*numbers, seed, amax, global_amax, *weights)
    if not _is_differentiated(weights, seed, amax, global_amax):
        return _run_fake_quantize(statics, seed, amax, global_amax, weights)
    function = _FakeQuantize if private.is_transformed() else _Eager
    return function.apply(statics, seed, amax, global_amax, *weights)


def fake_quantize_into(
    outs: Sequence[Float[Tensor, "..."]],
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "..."] | None,
    *,
    format: Format,
    transposed: bool = False,
    seed: Int64[Tensor, ""] | None = None,
    stream: Stream | None = None,
) -> None:
    """`fake_quantize` into memory that is there: contiguous tensors of one dtype, shaped as the weights are.

    Not differentiable. Their versions are counted up, as by any change in place: a graph that has kept them raises in
    backward.
    """
    check_not_empty(weights)
    statics = _statics(weights, stream, format, transposed, outs[0].dtype)
    if has_kernel(weights):
        _write(statics, outs, seed, amax, global_amax, weights)
        if not torch.compiler.is_compiling():  # which sees an operator that says what it changes
            torch.autograd.graph.increment_version(outs)
        return
    for out, result in zip(outs, _run_fake_quantize(statics, seed, amax, global_amax, weights), strict=True):
        out.copy_(result)


def pull_back(
    grads: Sequence[Tensor | None],
    weights: Sequence[Float[Tensor, "..."]],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "..."] | None,
    *,
    format: Format,
    transposed: bool,
    backward: Backward,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of `fake_quantize`, from those of its results, without its forward.

    Returns:
        Gradients of amax and of global amax, None unless backward is "lsq", and of the weights in their dtype, None
        where there is none of a result.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, g, amax = torch.tensor([[3.0, -9.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([7.0])
        >>> pull_back([g], [w], amax, None, format=FORMATS["INT8"], transposed=False, backward="clip")
        (None, None, [tensor([[1., 0.]])])
    """
    if (backward == "clip" and not format.clips) or amax is None:
        backward = "pass_through"
    if all(grad is None for grad in grads):
        return None, None, list(grads)
    if torch.compiler.is_compiling() and backward != "pass_through":
        from fq_transforms.ops import in_graph  # noqa: F401  # pyright: ignore[reportUnusedImport] (tells the compiler)

        numbers = (format.to_json(), transposed, backward)
        of_amax, of_global, *pulled = pull_back_traced(*numbers, amax, global_amax, list(weights), *grads)
        return of_amax, of_global, pulled
    return _pull_back(grads, weights, amax, global_amax, format=format, transposed=transposed, backward=backward)


def _pull_back(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    amax: Tensor | None,
    global_amax: Tensor | None,
    *,
    format: Format,
    transposed: bool,
    backward: Backward,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """`pull_back` of at least one gradient, but what torch.compile leaves alone."""
    dtypes = [grad.dtype for grad in grads if grad is not None]
    saved = (amax, *weights) if backward == "clip" else (amax, global_amax, *weights)
    kept = _Kept(_Statics(format, transposed, dtypes[0], backward), weights[0].dtype, saved)
    if backward == "lsq":
        of_amax, of_global, *pulled = _pull_learned(kept, grads)
        return of_amax, of_global, pulled
    return None, None, _pull(kept, grads, kept.dtype)


@left_alone
def fake_quantize_traced(
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
    backward: Backward,
    separate: bool,
    draws: Sequence[int] | None,
    seed: Tensor | None,
    amax: Tensor | None,
    global_amax: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    """`fake_quantize`; a stream as its numbers, in their order."""
    stream = None if draws is None else Stream(*draws)
    statics = _Statics(format_of(format), transposed, out_dtype, backward, separate, stream=stream)
    return _FakeQuantize.apply(statics, seed, amax, global_amax, *weights)


@left_alone
def pull_back_traced(
    format: str,
    transposed: bool,
    backward: Backward,
    amax: Tensor | None,
    global_amax: Tensor | None,
    weights: Sequence[Tensor],
    *grads: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`pull_back`: the gradients of amax, of global amax, and of the weights."""
    of_amax, of_global, pulled = _pull_back(
        grads, weights, amax, global_amax, format=format_of(format), transposed=transposed, backward=backward
    )
    return of_amax, of_global, *pulled


class _Kept(NamedTuple):
    """What a Function's context would have kept for `backward`."""

    statics: "_Statics"
    dtype: torch.dtype
    saved_tensors: Sequence[Tensor | None]


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class _Statics:
    format: Format
    transposed: bool
    out_dtype: torch.dtype  # of the results, of gradients too
    backward: Backward = "pass_through"
    separate: bool = False
    contiguous: bool = False  # the weights are known to be
    stream: Stream | None = None

    def mapped(self, size: int) -> "_Statics":
        """Of copies of the weights. Under one seed they draw the same bits, as a loop over them would."""
        if self.stream is None:
            return self
        return replace(self, stream=replace(self.stream, copies=self.stream.copies * size))

    def matrix(self, tensor: Tensor) -> Tensor:
        """[..., out, in] of what is stored, and back."""
        return tensor.mT if self.transposed else tensor


_known_statics = cache(_Statics)


def _statics(weights: Sequence[Tensor], stream: Stream | None, *statics: Any) -> _Statics:
    if stream is not None:
        stream = replace(stream, experts=experts_of(weights[:1]))
    make = _Statics if torch.compiler.is_compiling() else _known_statics
    return make(*statics) if stream is None else make(*statics, stream=stream)


def _launchers() -> Any:
    """`quantize.launch`, imported where a GPU asks for it: it needs Triton."""
    from fq_transforms.ops.quantize import launch

    return launch


_known_launchers = cache(_launchers)  # which torch.compile cannot trace


def _is_differentiated(weights: Sequence[Tensor], *others: Tensor | None) -> bool:
    """False if no transform and no gradient looks on: then the rules, and their cost to the host, can be left out."""
    return private.is_transformed() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *others))
    )


# Forward.


def _run_fake_quantize(
    statics: _Statics,
    seed: Tensor | None,
    amax: Tensor | None,
    global_amax: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    dtype = statics.out_dtype
    if has_kernel(weights):
        if statics.separate:
            separate = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
            _write(statics, separate, seed, amax, global_amax, weights)
            return tuple(separate)
        out = results_for(weights, dtype)
        _write(statics, [out], seed, amax, global_amax, weights)
        return unstacked(out, weights)
    outs: list[Tensor] = []
    numbers: dict[str, Any] = {"format": statics.format, "out_dtype": dtype}
    leaves = (split(amax, weights), split(global_amax, weights), _words(statics, seed, weights))
    for w, a, g, words in zip(weights, *leaves, strict=True):
        if words is None and is_cut(weights):
            outs.append(_in_pieces(statics, a, g, w))
            continue
        if words is None:
            y = fake_quantize_reference(statics.matrix(w), a, g, **numbers)
        else:
            y = stochastic_reference(statics.matrix(w), a, g, words, **numbers)
        outs.append(statics.matrix(y).contiguous())
    return tuple(outs)


def _in_pieces(statics: _Statics, amax: Tensor | None, global_amax: Tensor | None, weight: Tensor) -> Tensor:
    """`fake_quantize_reference` of a tensor as stored, in pieces."""
    format, dtype = statics.format, statics.out_dtype
    out = torch.empty(weight.shape, dtype=dtype)
    x, y = (statics.matrix(t.reshape(-1, *weight.shape[-2:])) for t in (weight, out))
    leaves = [None if leaf is None else flat(leaf, weight) for leaf in (amax, global_amax)]
    for piece in pieces_of(x, format):
        a, g = (None if leaf is None else piece.of_leaf(leaf) for leaf in leaves)
        piece.of(y).copy_(fake_quantize_reference(piece.of(x), a, g, format=format, out_dtype=dtype))
    return out


def _write(
    statics: _Statics,
    outs: Sequence[Tensor],
    seed: Tensor | None,
    amax: Tensor | None,
    global_amax: Tensor | None,
    weights: Sequence[Tensor],
) -> None:
    """One launch, which torch.compile sees as one operator."""
    format, transposed, stream = statics.format, statics.transposed, statics.stream
    if is_traced(weights):
        draws = None if stream is None else list(stream.numbers)
        run = _launchers().fake_quantize_operator
        run(list(outs), list(weights), amax, global_amax, seed, format.to_json(), transposed, draws)
        return
    run = _known_launchers().fake_quantize_triton
    run(outs, weights, amax, global_amax, seed, format=format, transposed=transposed, stream=stream)


def _words(statics: _Statics, seed: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Random words for each tensor, laid out as [*experts, out, in]; None where none are asked for."""
    stream = statics.stream
    if seed is None or stream is None:
        return [None] * len(weights)
    found: list[Tensor | None] = []
    seeds = [seed] * len(weights) if seed.dim() == 0 else seed.split([experts_of([w]) for w in weights])
    for i, (w, s) in enumerate(zip(weights, seeds, strict=True)):
        x = statics.matrix(w)
        own = torch.arange(stream.experts, device=w.device) + (stream.first_expert + i * stream.experts)
        # Of copies only those with seeds of their own need words of their own.
        numbers_of = own if s.dim() == 0 else own.repeat(stream.copies)
        rows, columns = ((stream.row, x.shape[-2]), (stream.column, x.shape[-1]))
        words = random_words(s, numbers_of, stream.group, rows, columns)
        if s.dim() == 0:
            words = words.repeat(stream.copies, 1, 1)
        found.append(words.view(x.shape))
    return found


class _FakeQuantize(Mapped):
    """What torch.func needs."""

    leaves = 3

    @staticmethod
    def forward(
        statics: _Statics, seed: Tensor | None, amax: Tensor | None, global_amax: Tensor | None, *weights: Tensor
    ) -> Any:
        return _run_fake_quantize(statics, seed, amax, global_amax, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, _, amax, global_amax, *weights = inputs
        ctx.statics, ctx.dtype, ctx.shape, ctx.device = statics, weights[0].dtype, weights[0].shape, weights[0].device
        ctx.set_materialize_grads(False)
        if statics.backward != "pass_through":
            saved = (amax, *weights) if statics.backward == "clip" else (amax, global_amax, *weights)
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.statics.backward == "lsq":
            return None, None, *_pull_learned(ctx, _resolved(grads))
        return None, None, None, None, *_pull(ctx, _resolved(grads), ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        # A tangent for each output, also where a weight has none: forward-mode autograd asks for all or nothing.
        filled = [_zeros(ctx) if tangent is None else tangent for tangent in _resolved(tangents[4:])]
        if ctx.statics.backward == "lsq":
            amax, global_amax, *weights = ctx.saved_tensors
            along = _filled_leaves(tangents[2:4], (amax, global_amax))
            return tuple(_LsqPush.apply(ctx.statics, amax, global_amax, *along, *filled, *weights))
        return tuple(_pull(ctx, filled, ctx.statics.out_dtype))


class _Eager(Function):
    """What plain autograd needs."""

    @staticmethod
    def forward(
        ctx: Any,
        statics: _Statics,
        seed: Tensor | None,
        amax: Tensor | None,
        global_amax: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors = Contiguous(weights) if statics.contiguous else weights
        out = _run_fake_quantize(statics, seed, amax, global_amax, tensors)
        _FakeQuantize.setup_context(ctx, (statics, seed, amax, global_amax, *weights), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _FakeQuantize.backward(ctx, *grads)


def _resolved(vectors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Vectors whose values are in memory, where a kernel reads them: of `z.conj().imag` they come lazily negated."""
    if torch.compiler.is_compiling():
        return vectors
    return [vector if vector is None else vector.resolve_neg() for vector in vectors]


def _zeros(ctx: Any) -> Tensor:
    return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)


def _halves(pairs: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Vectors, and the weights behind them."""
    return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


# The gradients of pass-through and clip.


def _pull(ctx: Any, vectors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cotangents to gradients, or tangents to output tangents: the derivative is symmetric."""
    if ctx.statics.backward == "pass_through":
        if ctx.dtype == ctx.statics.out_dtype:
            return list(vectors)
        return [v if v is None or v.dtype == dtype else v.to(dtype) for v in vectors]
    amax, *weights = ctx.saved_tensors
    live = [v is not None for v in vectors]
    if not any(live):
        return list(vectors)
    some = next(v for v in vectors if v is not None)  # in place of one that is not there; what comes of it is dropped
    filled = [some if v is None else v for v in vectors]
    pulled = _ClipBackward.apply(replace(ctx.statics, out_dtype=dtype), amax, *filled, *weights)
    return [p if is_live else None for p, is_live in zip(pulled, live, strict=True)]


def _run_clip_backward(statics: _Statics, amax: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
    grads, weights = _halves(pairs)
    format, transposed, dtype = statics.format, statics.transposed, statics.out_dtype
    if has_kernel(weights):
        if is_traced(weights):
            run = _launchers().clip_backward_operator
            out = run(list(grads), list(weights), amax, format.to_json(), transposed)
        else:
            out = _launchers().clip_backward_triton(grads, weights, amax, format=format, transposed=transposed)
        return unstacked(out.flatten(0, 1).to(dtype), weights)
    outs: list[Tensor] = []
    for g, w, a in zip(grads, weights, split(amax, weights), strict=True):
        assert a is not None
        out = clip_backward_reference(statics.matrix(g), statics.matrix(w), a, format=format)
        outs.append(statics.matrix(out).contiguous().to(dtype))
    return tuple(outs)


class _ClipBackward(Mapped):
    """Gradient where abs(weight) <= amax. Linear in the gradient, so its own derivative is itself."""

    leaves = 1
    lists = 2

    @staticmethod
    def forward(statics: _Statics, amax: Tensor, *pairs: Tensor) -> Any:
        return _run_clip_backward(statics, amax, *pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, amax, *pairs = inputs
        grads, weights = _halves(pairs)
        ctx.statics, ctx.dtype = statics, grads[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, *weights)
        ctx.save_for_forward(amax, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *_pull(ctx, grads, ctx.dtype), *(None for _ in grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return tuple(_pull(ctx, _halves(tangents[2:])[0], ctx.statics.out_dtype))


# The gradients of learned scales. The pushforward is plain PyTorch on every device, since training goes the other way.


def _pull_learned(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Cotangents to gradients of amax, global amax and weights."""
    amax, global_amax, *weights = ctx.saved_tensors
    live = [grad is not None for grad in grads]
    if not any(live):
        return None, None, *grads
    filled = _filled(grads, weights, ctx.statics.out_dtype)
    statics = replace(ctx.statics, out_dtype=ctx.dtype)
    of_amax, of_global, *pulled = _LsqBackward.apply(statics, amax, global_amax, *filled, *weights)
    kept = [p if is_live else None for p, is_live in zip(pulled, live, strict=True)]
    return of_amax, None if global_amax is None else of_global, *kept


def _run_lsq_backward(
    statics: _Statics, amax: Tensor, global_amax: Tensor | None, *pairs: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of amax, of global amax (empty if there is none), and of the weights."""
    grads, weights = _halves(pairs)
    format, transposed, dtype = statics.format, statics.transposed, statics.out_dtype
    if has_kernel(weights):
        if is_traced(weights):
            run = _launchers().lsq_backward_operator
            out, of_amax, of_global = run(list(grads), list(weights), amax, global_amax, format.to_json(), transposed)
        else:
            run, numbers = _launchers().lsq_backward_triton, {"format": format, "transposed": transposed}
            out, of_amax, of_global = run(grads, weights, amax, global_amax, **numbers)
        return (
            of_amax,
            amax.new_empty(0) if of_global is None else of_global,
            *unstacked(out.flatten(0, 1).to(dtype), weights),
        )
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    global_sums: list[Tensor] = []
    for g, w, a, of_expert in zip(grads, weights, split(amax, weights), split(global_amax, weights), strict=True):
        assert a is not None
        out, of_amax, of_global = lsq_backward_reference(
            statics.matrix(g), statics.matrix(w), a, of_expert, format=format
        )
        outs.append(statics.matrix(out).contiguous().to(dtype))
        sums.append(flat(of_amax, w))
        if of_global is not None:
            global_sums.append(flat(of_global, w))
    return torch.cat(sums), torch.cat(global_sums) if global_sums else amax.new_empty(0), *outs


class _LsqBackward(Mapped):
    """Cotangents to gradients (amax, global amax, weights). Linear in the cotangents."""

    leaves = 2
    lists = 2
    leaf_results = 2

    @staticmethod
    def forward(statics: _Statics, amax: Tensor, global_amax: Tensor | None, *pairs: Tensor) -> Any:
        return _run_lsq_backward(statics, amax, global_amax, *pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, amax, global_amax, *pairs = inputs
        grads, weights = _halves(pairs)
        ctx.statics, ctx.dtype = statics, grads[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, global_amax, *weights)
        ctx.save_for_forward(amax, global_amax, *weights)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        along = _filled_leaves(vectors[:2], (amax, global_amax))
        filled = _filled(vectors[2:], weights, ctx.statics.out_dtype)
        statics = replace(ctx.statics, out_dtype=ctx.dtype)
        pushed = _LsqPush.apply(statics, amax, global_amax, *along, *filled, *weights)
        return None, None, None, *pushed, *(None for _ in weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        filled = _filled(_halves(tangents[3:])[0], weights, ctx.dtype)
        return tuple(_LsqBackward.apply(ctx.statics, amax, global_amax, *filled, *weights))


def _run_lsq_push(
    statics: _Statics,
    amax: Tensor,
    global_amax: Tensor | None,
    amax_tangent: Tensor,
    global_amax_tangent: Tensor | None,
    *pairs: Tensor,
) -> tuple[Tensor, ...]:
    tangents, weights = _halves(pairs)
    outs: list[Tensor] = []
    numbers: dict[str, Any] = {"format": statics.format, "out_dtype": statics.out_dtype}
    leaves = [split(leaf, weights) for leaf in (amax_tangent, global_amax_tangent, amax, global_amax)]
    for t, w, amax_t, global_t, a, g in zip(tangents, weights, *leaves, strict=True):
        assert a is not None
        assert amax_t is not None
        x, along = statics.matrix(w), statics.matrix(t)
        outs.append(statics.matrix(lsq_push_reference(along, amax_t, global_t, x, a, g, **numbers)).contiguous())
    return tuple(outs)


class _LsqPush(Mapped):
    """Tangents (amax, global amax, weights) to those of the fake-quantized weights. Linear in the tangents."""

    leaves = 4
    lists = 2

    @staticmethod
    def forward(statics: _Statics, *tensors: Any) -> Any:
        return _run_lsq_push(statics, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statics, amax, global_amax, _, _, *pairs = inputs
        tangents, weights = _halves(pairs)
        ctx.statics, ctx.dtype = statics, tangents[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(amax, global_amax, *weights)
        ctx.save_for_forward(amax, global_amax, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        filled = _filled(grads, weights, ctx.statics.out_dtype)
        statics = replace(ctx.statics, out_dtype=ctx.dtype)
        of_amax, of_global, *pulled = _LsqBackward.apply(statics, amax, global_amax, *filled, *weights)
        of_global = None if global_amax is None else of_global
        return None, None, None, of_amax, of_global, *pulled, *(None for _ in weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        amax, global_amax, *weights = ctx.saved_tensors
        along = _filled_leaves(tangents[3:5], (amax, global_amax))
        filled = _filled(_halves(tangents[5:])[0], weights, ctx.dtype)
        return tuple(_LsqPush.apply(ctx.statics, amax, global_amax, *along, *filled, *weights))


def _filled(vectors: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros where there is none."""
    return [torch.zeros_like(w, dtype=dtype) if v is None else v for v, w in zip(vectors, like, strict=True)]


def _filled_leaves(vectors: Sequence[Tensor | None], leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(vectors, leaves, strict=True)
    return [None if leaf is None else torch.zeros_like(leaf) if v is None else v for v, leaf in pairs]
