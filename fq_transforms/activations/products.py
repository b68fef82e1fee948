"""Where a model multiplies with a selected weight, seen as it runs: what it is multiplied with can be read or replaced.

    with products(model, weights, spec.inputs, on_input):
        functional_call(model, weights, args)      # each x of x @ w.T is on_input(Use(...), x) in its place

PyTorch shows every call of its functions to a `TorchFunctionMode`, so no function, class or module is changed. A weight
is known by its memory: `experts[i]`, `weight.T` and one allocation for many experts are views of it, whose offset says
which expert it is. Copies that a model makes (a cast, the gathered weights of `batched_mm`) are followed.

Any other use of a selected weight by a function of PyTorch raises: a product may hide in it.

NOTE what is not seen: a product inside an `autograd.Function` would get its input quantized in forward, and keep the
other for backward. Transformer Engine's and Megatron's linear layers are such, and have a forward pre-hook for the time
of the call instead. A kernel that is no function of PyTorch's shows nothing: layers that never ran are an error, but
experts that are modules of their own may have had no token.

NOTE cost: about 12 us of the host for each call of a PyTorch function, measured on a CPU; no wait for a device.
"""

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fq_transforms.in_use import InUse, Within
from fq_transforms.ops.private import is_mapped, unwrapped
from fq_transforms.spec import Inputs

__all__ = ["TracedProducts", "Use", "products", "refuse_opaque"]


class Use(NamedTuple):
    """Who multiplies an input x [..., in].

    Attributes:
        inputs: The group.
        experts: The expert of all rows; or of each row, integers [...], where `inputs.experts` is no expert's.
        is_first: False for a further part of one expert's weight, which may see the same tokens again.
        blocks: How many rows are one token's: a matrix may be used as several, each with rows of its own.
    """

    inputs: Inputs
    experts: int | Tensor
    is_first: bool
    blocks: int = 1


OnInput = Callable[[Use, Tensor], Tensor]


class _Span(NamedTuple):
    """Where a parameter lies, in elements of its storage."""

    inputs: Inputs
    name: str
    expert: int  # the first
    start: int
    stop: int
    expert_stride: int  # 0 unless stacked
    in_stride: int


class _Copy(NamedTuple):
    """A tensor that a model made of a weight: of one expert, or gathered by `experts` [n]."""

    span: _Span
    experts: int | Tensor
    is_first: bool


# Functions that multiply: (position, names of the keyword) of left and right, and the dimension of `in` on the right.
_MATMUL = ((0, ("input", "self")), (1, ("other", "mat2", "tensor2")), -2)
_ADDED = ((1, ("mat1", "batch1")), (2, ("mat2", "batch2")), -2)
_GROUPED = ((0, ("input", "self", "mat_a")), (1, ("weight", "mat2", "mat_b")), -2)
_PRODUCTS: dict[str, Any] = {
    "linear": ((0, ("input",)), (1, ("weight",)), -1),
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _MATMUL),
    "__rmatmul__": ((1, ("other",)), (0, ("self",)), -2),
    **dict.fromkeys(("addmm", "baddbmm"), _ADDED),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _GROUPED),
}
_GROUPED_NAMES = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
# Functions whose result is the same weight in memory of its own; the last two may gather experts.
_CASTS = ("to", "type", "type_as", "float", "bfloat16", "half", "contiguous", "clone")
_GATHERS = ("__getitem__", "index_select")
# Their names while Dynamo traces, which knows functions but not what they are called.
_NAMES: dict[Any, str] = {
    getattr(owner, name): name
    for owner in (torch, Tensor, torch.nn.functional)
    for name in (*_PRODUCTS, *_CASTS, *_GATHERS)
    if hasattr(owner, name)
}


def products(
    model: Module,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Inputs],
    on_input: OnInput,
    end: Callable[[set[str]], None] | None = None,
) -> AbstractContextManager[set[str]]:
    """Within, each product of `model` with one of the weights has `on_input(use, x)` in place of its input x.

    Args:
        model: It runs under `functional_call(model, weights, ...)`.
        weights: Names to the tensors that it computes with.
        inputs: Which of them.
        on_input: Called with each input, [..., in], in the order of the computation.
        end: Called on leaving, unless an exception is on its way, with the keys of the inputs that were seen.

    A further call within is its own: what this one quantizes is left alone there. A backward pass within is not seen.
    Calls may be left in any order.

    Returns:
        A context manager, which gives the keys of the inputs that were seen so far.

    Raises:
        ValueError: Within: a weight is used in another way than x @ w.T, or by a layer whose input cannot be seen.
            On entering: a weight is on meta, is mapped by vmap, or is compiled; a layer that is hooked for the time of
            the call, as Transformer Engine's are, is in use by another thread.
    """
    return _Seeing(model, weights, inputs, on_input, end)


class _Seeing(Within[set[str]]):
    def __init__(
        self,
        model: Module,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Inputs],
        on_input: OnInput,
        end: Callable[[set[str]], None] | None,
    ) -> None:
        self.model, self.weights, self.inputs, self.on_input, self.end = model, weights, inputs, on_input, end

    def _use(self) -> InUse:
        self.seen: set[str] = set()
        self.hooked = _hooked(self.model, self.inputs)
        return InUse("quantized inputs", ((path, module) for path, module, _ in self.hooked), nests=True)

    def _begin(self, use: InUse) -> set[str]:
        seen, on_input = self.seen, self.on_input  # and not this context, which would be held by what it begins

        def see(use: Use, x: Tensor) -> Tensor:
            seen.add(use.inputs.key)
            return on_input(use, x)

        call = _Watch(see)
        for _, module, held in self.hooked:
            use.hook_before(module, _PreHook(module, list(held.values()), see, call.is_resting), with_kwargs=True)
        call.add(self.weights, self.inputs, {name for *_, held in self.hooked for name in held})
        use.undo.append(call.end)
        call.begin()
        return seen

    def _end(self) -> None:
        if self.end is not None:
            self.end(self.seen)


class _Stack:
    """The calls that run in a thread, the outermost first, and a mode for each."""

    def __init__(self) -> None:
        self.calls: list[_Watch] = []
        self.modes: list[_Mode] = []


class _Here(threading.local):
    """The stack of this thread, as modes of PyTorch are of a thread."""

    def __init__(self) -> None:
        self.stack = _Stack()


_HERE = _Here()
_PROBE = torch.empty(0)


class _Mode(TorchFunctionMode):
    """A place in PyTorch's stack of modes, of which only the top can be taken away: serves whoever has its number."""

    def __init__(self, stack: _Stack, number: int) -> None:
        super().__init__()
        self.stack, self.number = stack, number
        self.was_asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.was_asked = True
        calls = self.stack.calls
        if self.number < len(calls):
            return calls[self.number].on_function(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def is_pushed(self) -> bool:
        """An interrupt may come before or behind what pushes it, or pops it, and nobody tells."""
        self.was_asked = False
        _PROBE.dim()
        return self.was_asked


class _Watch:
    """What one call watches for."""

    def __init__(self, see: OnInput) -> None:
        self.see = see
        self.stack = _HERE.stack
        self.spans: dict[int, list[_Span]] = {}  # by address of the storage, in order
        self.copies: Any = WeakIdKeyDictionary()

    def begin(self) -> None:
        stack = self.stack
        stack.calls.append(self)
        stack.modes.append(_Mode(stack, len(stack.modes)))
        stack.modes[-1].__enter__()

    def end(self) -> None:
        """Once more is no fault. Calls that began later move down by a place each."""
        stack = self.stack
        if self in stack.calls:
            stack.calls.remove(self)
        while len(stack.modes) > len(stack.calls):
            mode = stack.modes[-1]
            mode.number = sys.maxsize  # if PyTorch, interrupted itself, pushes it back later, it serves nobody
            if stack is _HERE.stack and mode.is_pushed():
                mode.__exit__(None, None, None)
            stack.modes.pop()

    def is_resting(self) -> bool:
        """True while another call runs within this one, in its thread."""
        calls = _HERE.stack.calls
        return bool(calls) and calls[-1] is not self

    def add(self, weights: Mapping[str, Tensor], inputs: Sequence[Inputs], hooked: set[str]) -> None:
        for group in inputs:
            for number, name in enumerate(group.names):
                if name not in hooked:
                    weight = weights[name]
                    _check_visible(name, weight)
                    self.spans.setdefault(_address(weight), []).append(_span_of(group, number, name, weight))
        for spans in self.spans.values():
            spans.sort(key=lambda span: span.start)

    def on_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        name: str = getattr(func, "__name__", "").removesuffix(".default")
        if (name == "__get__" and not self.copies) or self.is_resting():
            return func(*args, **kwargs)
        return self.on_named(name, func, args, kwargs)

    def on_named(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        found: list[tuple[Tensor, _Span | _Copy]] = []
        for tensor in _tensors((*args, *kwargs.values())):
            if (at := self.find(tensor)) is not None:
                found.append((tensor, at))  # noqa: PERF401 (in brackets, Dynamo loses `self`)
        if not found:
            return func(*args, **kwargs)
        if name in _PRODUCTS:
            args, kwargs = self.multiply(name, args, kwargs)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            self.follow(name, args, kwargs, found, tensor)
        return out

    def find(self, tensor: Tensor) -> _Span | _Copy | None:
        """What weight a tensor is, is a view of, or was made of."""
        copy: _Copy | None = self.copies.get(tensor)
        if copy is not None:
            return copy
        if tensor.layout is not torch.strided or tensor.is_meta:
            return None
        spans = self.spans.get(_address(tensor))
        if spans is None:
            return None
        offset = _offset(tensor)
        index = bisect_right(spans, offset, key=lambda span: span.start) - 1
        return spans[index] if index >= 0 and offset < spans[index].stop else None

    def remember(self, tensor: Tensor, at: _Copy) -> None:
        self.copies[tensor] = at

    def is_same_memory(self, one: Tensor, other: Tensor) -> bool:
        return _address(one) == _address(other)

    def follow(self, name: str, args: Any, kwargs: Any, found: Sequence[tuple[Tensor, Any]], out: Tensor) -> None:
        """Remember a result that is a weight still; refuse one that is not, for a product may hide in it."""
        if self.find(out) is not None or not out.is_floating_point():
            return
        of, at = found[0]
        span = at.span if isinstance(at, _Copy) else at
        sides = (of.shape[-2:], of.shape[:-3:-1])
        if isinstance(at, _Copy) and self.is_same_memory(out, of) and out.shape[-2:] in sides:
            self.remember(out, at)
        elif name in _CASTS and of.dim() == 2:
            self.remember(out, at if isinstance(at, _Copy) else _Copy(at, _expert(at, of), _begins_an_expert(at, of)))
        elif name in _GATHERS and isinstance(at, _Span) and of.dim() == 3 and span.inputs.stacked:
            index = args[-1] if args[1:] else kwargs.get("index")
            index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
            if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
                raise _not_followed(span, f"{name} with {index!r:.60}")
            if of.shape[0] != span.inputs.experts:
                raise _not_followed(span, f"{name} of {of.shape[0]} of its {span.inputs.experts} experts")
            self.remember(out, _Copy(span, index % span.inputs.experts, _begins_an_expert(span, of)))
        else:
            raise _not_followed(span, f"{name} of {tuple(of.shape)}")

    def multiply(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a product, with its input replaced."""
        *sides, in_dim = _PRODUCTS[name]
        slots = [_slot(args, kwargs, *sides[0]), _slot(args, kwargs, *sides[1])]
        operands = [_operand(args, kwargs, slots[0]), _operand(args, kwargs, slots[1])]
        left, right = self.find(operands[0]), self.find(operands[1])
        if left is None and right is None:
            raise _not_followed(_one(self, args, kwargs), f"what {name} adds")
        if left is not None and right is not None:
            raise _not_followed(left.span if isinstance(left, _Copy) else left, f"{name} with another selected weight")
        if right is not None:
            (x, w), at, side = operands, right, 0
        else:
            (w, x), at, side, in_dim = operands, left, 1, -1
        assert at is not None
        span = at.span if isinstance(at, _Copy) else at
        _check_contraction(name, span, w, in_dim)
        rows = x.mT if side == 1 and x.dim() > 1 else x
        rows, experts = _experts_of_rows(name, span, at, w, rows, _offsets(name, args, kwargs))
        is_first = at.is_first if isinstance(at, _Copy) else _begins_an_expert(span, w)
        is_split = w.dim() == 3 and isinstance(at, _Span) and not span.expert_stride and w.stride(0) > 0
        rows = self.see(Use(span.inputs, experts, is_first, w.shape[0] if is_split else 1), rows)
        x = rows.mT if side == 1 and x.dim() > 1 else rows
        slot = slots[side]
        if isinstance(slot, int):
            return (*args[:slot], x, *args[slot + 1 :]), kwargs
        return args, kwargs | {slot: x}


class TracedProducts(_Watch, TorchFunctionMode):
    """`products` of one call while torch.compile or torch.export traces it: nothing of it runs in the graph.

    A weight is known by the tensor that others are views of, as there are no addresses and no offsets yet. A view of a
    stack is one of unknown experts then, which does where all have one scale; else `w[i]` says which it is.

    NOTE Dynamo shows a mode no property (`weight.mT`, `weight.T`) and no loop over a stack. What they give are views,
    and views are found. `weight.data` is neither shown nor a view, so each weight has to be seen, not one of a group.
    """

    def __init__(self, weights: Mapping[str, Tensor], inputs: Sequence[Inputs], on_input: OnInput) -> None:
        TorchFunctionMode.__init__(self)
        self.on_input = on_input
        self.seen: list[str] = []
        self.roots: list[tuple[Tensor, _Span]] = []
        self.made: list[tuple[Tensor, _Copy]] = []
        for group in inputs:
            for number, name in enumerate(group.names):
                self.roots.append((weights[name], _span_of(group, number, name, weights[name])))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_named(_NAMES.get(func, "another function"), func, args, kwargs or {})

    def see(self, use: Use, x: Tensor) -> Tensor:
        """What the caller makes of an input."""
        return self.on_input(use, x)

    def on_named(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """As a call of a function that is named; one expert of a stack is followed first."""
        if name == "__getitem__" and isinstance(args[1], int):
            at = self.find(args[0])
            if isinstance(at, _Span) and at.expert_stride and args[0].dim() == 3:
                out = func(*args, **kwargs)
                self.remember(out, _Copy(at, args[1] % at.inputs.experts, True))
                return out
        return _Watch.on_named(self, name, func, args, kwargs)

    def find(self, tensor: Tensor) -> _Span | _Copy | None:
        """What weight a tensor is, is a view of, or was made of."""
        for made, copy in self.made:
            if tensor is made:
                return copy
        root = _root(tensor)
        for held, span in self.roots:
            if root is held:
                is_whole = tensor.dim() == 3 and tensor.shape[0] == span.inputs.experts
                is_whole = is_whole and tensor.stride(0) == span.expert_stride
                if span.expert_stride and span.inputs.per_expert and not is_whole:
                    raise _not_followed(span, f"torch.compile, as a view {tuple(tensor.shape)} of unknown experts")
                return span
        return None

    def remember(self, tensor: Tensor, at: _Copy) -> None:
        """A tensor that was made of a weight."""
        self.made.append((tensor, at))

    def is_same_memory(self, one: Tensor, other: Tensor) -> bool:
        """True for two views of one tensor."""
        return _root(one) is _root(other)

    def multiply(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a product, with its input replaced; its weight was seen."""
        for tensor in _tensors((*args, *kwargs.values())):
            at = self.find(tensor)
            if at is not None:
                self.seen.append(at.span.name if isinstance(at, _Copy) else at.name)
        return _Watch.multiply(self, name, args, kwargs)


def _experts_of_rows(
    name: str, span: _Span, at: _Span | _Copy, w: Tensor, x: Tensor, offsets: Tensor | None
) -> tuple[Tensor, int | Tensor]:
    """The input, and the expert of each of its rows: w is one matrix, or one for each of x's first dimension."""
    if w.dim() == 2:
        if isinstance(at, _Span) and not _is_within_an_expert(at, w):
            raise _not_followed(span, f"{name} with several experts as one matrix {tuple(w.shape)}")
        return x, at.experts if isinstance(at, _Copy) else _expert(at, w)
    if w.dim() != 3 or x.dim() not in (2, 3):
        raise _not_followed(span, f"{name} of {tuple(x.shape)} with {tuple(w.shape)}")
    if isinstance(at, _Copy):
        assert isinstance(at.experts, Tensor)
        of_matrix = at.experts
    else:
        first = _expert(at, w)
        if w.shape[0] > 1 and w.stride(0) != (span.expert_stride or w.stride(0)):
            raise _not_followed(span, f"{name} with experts {w.stride(0)} elements apart")
        of_matrix = torch.arange(first, first + w.shape[0], device=x.device)
        if not span.expert_stride:  # one matrix as several, such as the blocks of a block-diagonal one
            of_matrix = torch.full_like(of_matrix, first)
    if name in _GROUPED_NAMES and offsets is not None:
        if x.dim() != 2:
            raise _not_followed(span, f"{name} of {tuple(x.shape)} by offsets")
        matrix = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True)
        none = of_matrix.new_full((1,), span.inputs.experts)
        return x, torch.cat([of_matrix, none])[matrix]
    if x.dim() == 2 or x.shape[0] != w.shape[0]:
        x = x.expand(w.shape[0], *x.shape[-2:])
    return x, of_matrix[:, None].expand(x.shape[:-1])


def _expert(span: _Span, view: Tensor) -> int:
    """The (first) expert that a view of a parameter holds."""
    if not span.expert_stride:
        return span.expert
    return (_offset(view) - span.start) // span.expert_stride


def _is_within_an_expert(span: _Span, view: Tensor) -> bool:
    if not span.expert_stride:
        return True
    offset = (_offset(view) - span.start) % span.expert_stride
    return offset + _extent(view) <= span.expert_stride


def _extent(tensor: Tensor) -> int:
    """Elements of storage from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _begins_an_expert(span: _Span, view: Tensor) -> bool:
    offset = _offset(view) - span.start
    return (offset % span.expert_stride if span.expert_stride else offset) == 0


def _check_contraction(name: str, span: _Span, w: Tensor, dim: int) -> None:
    columns = span.inputs.shape[1]
    if w.dim() < 2 or w.shape[dim] != columns or (columns > 1 and w.stride(dim) != span.in_stride):
        raise _not_followed(span, f"{name} with {tuple(w.shape)}, over another dim than `in` = {columns}")


def _offsets(name: str, args: Any, kwargs: Any) -> Tensor | None:
    return kwargs.get("offs", args[2] if len(args) > 2 else None) if name in _GROUPED_NAMES else None


def _slot(args: Any, kwargs: Any, position: int, keywords: Sequence[str]) -> Any:
    return position if position < len(args) else next(keyword for keyword in keywords if keyword in kwargs)


def _operand(args: Any, kwargs: Any, slot: Any) -> Tensor:
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def _one(mode: _Watch, args: Any, kwargs: Any) -> _Span:
    at = next(at for t in _tensors((*args, *kwargs.values())) if (at := mode.find(t)) is not None)
    return at.span if isinstance(at, _Copy) else at


def _span_of(group: Inputs, number: int, name: str, weight: Tensor) -> _Span:
    start = _offset(weight)
    strides = weight.stride()
    in_stride = strides[-2] if group.transposed else strides[-1]
    stop = start + _extent(weight)
    return _Span(group, name, number, start, stop, strides[0] if group.stacked else 0, in_stride)


def _check_visible(name: str, weight: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(f"parameter {name!r}: found torch.compile, wanted eager mode for quantized inputs")
    if weight.is_meta:
        raise ValueError(f"parameter {name!r}: found a meta tensor, wanted values to run the model with")
    if is_mapped(weight):
        raise ValueError(f"parameter {name!r}: found mapped by vmap, wanted one model for quantized inputs")


def _address(tensor: Tensor) -> int:
    return unwrapped(tensor).untyped_storage().data_ptr()


def _offset(tensor: Tensor) -> int:
    """In elements; 0 while a program is traced, where it cannot be asked for: see `TracedProducts.find`."""
    return 0 if torch.compiler.is_compiling() else int(unwrapped(tensor).storage_offset())


def _root(tensor: Tensor) -> Tensor:
    """The tensor that a view is of, or the tensor itself: what memory is while a program is traced."""
    base = tensor._base  # pyright: ignore[reportPrivateUsage]
    return tensor if base is None else base


def _tensors(values: Any) -> Generator[Tensor]:
    """The tensors in arguments or results, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _not_followed(span: _Span, use: str) -> ValueError:
    return ValueError(
        f"inputs {span.inputs.key!r}: found the weight {span.name!r} in {use}, wanted x @ w.T by linear, matmul, "
        "bmm or grouped_mm; take it out with a rule to None"
    )


# Modules whose products lie inside an autograd.Function: the classes of these modules, by the name of their package.
_OPAQUE = ("transformer_engine.", "megatron.core.tensor_parallel.")


def _hooked(model: Module, inputs: Sequence[Inputs]) -> list[tuple[str, Module, dict[str, tuple[Inputs, int]]]]:
    """The modules that hold selected weights and whose products cannot be seen, with their names and those weights."""
    where = {name: (group, number) for group in inputs for number, name in enumerate(group.names)}
    found: list[tuple[str, Module, dict[str, tuple[Inputs, int]]]] = []
    for path, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith(_OPAQUE)]
        if not kinds:
            continue
        prefix = f"{path}." if path else ""
        names = [prefix + name for name, _ in module.named_parameters(recurse=False)]
        held = {name: where[name] for name in names if name in where}
        if not held:
            continue
        if any("LayerNorm" in kind.__name__ for kind in kinds):
            raise ValueError(
                f"inputs {next(iter(held.values()))[0].key!r}: found {type(module).__name__}, which normalizes its "
                "input itself, so that nobody sees what its weight gets; take it out with a rule to None"
            )
        found.append((path, module, held))
    return found


def refuse_opaque(model: Module, inputs: Sequence[Inputs]) -> None:
    """Raise ValueError for a layer that needs a hook, where a program is traced."""
    for path, module, held in _hooked(model, inputs):
        raise ValueError(
            f"inputs {next(iter(held.values()))[0].key!r}: found torch.compile around {path!r} "
            f"({type(module).__name__}), whose product is not seen there, wanted eager mode"
        )


class _PreHook:
    """Replaces the first argument of a module that holds one weight, or a group's weights and takes their splits."""

    def __init__(
        self, module: Module, held: list[tuple[Inputs, int]], see: OnInput, is_resting: Callable[[], bool]
    ) -> None:
        self.held, self.see, self.is_resting = held, see, is_resting
        if {group.key for group, _ in held} != {held[0][0].key} or any(group.stacked for group, _ in held):
            raise ValueError(
                f"inputs {held[0][0].key!r}: found {type(module).__name__} with weights of several roles, wanted one"
            )

    def __call__(self, module: Module, args: Any, kwargs: Any) -> Any:
        if self.is_resting():
            return None
        group, expert = self.held[0]
        name = next((k for k in ("inp", "input_", "input", "x", "hidden_states") if k in kwargs), None)
        x: Any = args[0] if args else None if name is None else kwargs[name]
        if not isinstance(x, Tensor):
            raise ValueError(f"inputs {group.key!r}: found no input among the arguments of {type(module).__name__}")
        experts: int | Tensor = expert
        if len(self.held) > 1:
            splits: Any = args[1] if len(args) > 1 else kwargs.get("m_splits")
            if splits is None:
                raise ValueError(f"inputs {group.key!r}: found no m_splits in the call of {type(module).__name__}")
            counts = torch.as_tensor(splits, device=x.device)
            numbers = torch.tensor([number for _, number in self.held] + [group.experts], device=x.device)
            counts = torch.cat([counts, x.shape[:-1].numel() - counts.sum().reshape(1)])
            experts = numbers.repeat_interleave(counts, output_size=x.shape[:-1].numel()).reshape(x.shape[:-1])
        x = self.see(Use(group, experts, True), x)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {name: x})
