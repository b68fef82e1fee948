"""Every private API of PyTorch and Triton that this package calls, each beside the public one that does without.

The private ones are faster, or are all that there is for a plain question. Where one is missing, as in another release,
its name here is None, and the public way gives the same answers. Tests set the names to None and compare.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

__all__ = [
    "Guards",
    "add_all",
    "copy_all",
    "current_stream",
    "is_functorch_active",
    "is_in_compiled",
    "is_mapped",
    "is_transformed",
    "launcher_of",
    "may_be_view",
    "saved_tensors_hooks",
    "unwrapped",
]


def _find(module: str, *names: str) -> Any:
    """What the names stand for in a private module, a single one by itself; None where one is missing."""
    try:
        found = [getattr(import_module(module), name) for name in names]
    except (ImportError, AttributeError):
        return None
    return found[0] if len(found) == 1 else found


def _level() -> int:
    return forward_ad._current_level  # pyright: ignore[reportPrivateUsage]


_tensor_guards: Any = _find("torch._C._dynamo.guards", "TensorGuards")
_raw_stream: Callable[[int], int] | None = _find("torch._C", "_cuda_getCurrentRawStream")
_functorch_active: Callable[[], bool] | None = _find("torch._C", "_are_functorch_transforms_active")
_forward_level: Callable[[], int] | None = _level if hasattr(forward_ad, "_current_level") else None
_top_hooks: Any = _find("torch._C._autograd", "_top_saved_tensors_default_hooks")
_frame_callback: Any = _find("torch._C._dynamo.eval_frame", "get_eval_frame_callback")
_is_view: Callable[[Tensor], bool] | None = getattr(Tensor, "_is_view", None)
_copy_all: Callable[..., None] | None = _find("torch", "_foreach_copy_")
_add_all: Callable[..., None] | None = _find("torch", "_foreach_add_")
_launcher: tuple[str, ...] | None = ("run", "function", "packed_metadata")  # of Triton's compiled kernels


# What many tensors are, compared at once.


class Guards:
    """Types, dtypes, devices, shapes and strides of some tensors, not the tensors; placements of DTensors apart.

    torch.compile's own check compares all in one call: 2.3 us for 32 tensors in place of 20 in Python.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)  # for another the private check raises
        if _tensor_guards is None:
            self._facts = list(map(_facts, tensors))
            self._check = self._check_in_python
        else:
            sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
            guards = _tensor_guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            self._check: Callable[..., bool] = guards.check

    def match(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are as those were."""
        return len(tensors) == self._count and self._check(*tensors)

    def _check_in_python(self, *tensors: Tensor) -> bool:
        return list(map(_facts, tensors)) == self._facts


def _facts(t: Tensor) -> tuple[object, ...]:
    return type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad


# torch.func and forward-mode differentiation.


class _Refused(Function):
    """torch.func refuses a Function without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def is_functorch_active() -> bool:
    """True within torch.func's transforms."""
    if _functorch_active is not None:
        return _functorch_active()
    try:
        _Refused.apply(torch.empty(0))
    except RuntimeError:
        return True
    return False


def is_transformed() -> bool:
    """True within torch.func's transforms and forward-mode differentiation."""
    return is_functorch_active() or _is_forward_mode()


def _is_forward_mode() -> bool:
    if _forward_level is not None:
        return _forward_level() >= 0
    try:
        with forward_ad.dual_level():  # which does not nest
            return False
    except RuntimeError:
        return True


class _Found:
    """What `_Look` saw."""

    tensor: Tensor
    is_mapped = False


class _Look(Function):
    """The forward of a Function sees what torch.func has wrapped."""

    @staticmethod
    def forward(found: _Found, tensor: Tensor) -> Tensor:
        found.tensor = tensor
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        found, tensor = args
        found.is_mapped = True
        return _Look.apply(found, tensor), None


def _look(tensor: Tensor) -> _Found:
    found = _Found()
    with torch.no_grad():
        _Look.apply(found, tensor)
    return found


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func: under vjp a DTensor does not look like one."""
    return _look(tensor).tensor if is_functorch_active() else tensor


def is_mapped(tensor: Tensor) -> bool:
    """True under torch.func.vmap, if the tensor has a dim that it maps."""
    return is_functorch_active() and _look(tensor).is_mapped


def is_in_compiled() -> bool:
    """True within a function that torch.compile has compiled, what it runs eagerly included, as far as can be told."""
    return torch.compiler.is_compiling() or (_frame_callback is not None and callable(_frame_callback()))


def saved_tensors_hooks() -> Any:
    """The innermost hooks on saved tensors, (pack, unpack), or None.

    Raises:
        RuntimeError: This PyTorch lacks the function. No public one tells, and to go on without would be to guess.
    """
    if _top_hooks is None:
        raise RuntimeError(
            f"saved-tensor hooks: found PyTorch {torch.__version__}, which does not tell which are active, wanted one "
            "that does (2.11 to 2.14); use fq.fakequant with functional_call, or layerwise(recompute=False)"
        )
    return _top_hooks(True)


def may_be_view(tensor: Tensor) -> bool:
    """False only for a tensor that autograd does not know as a view of another; True where it cannot be asked."""
    return _is_view is None or _is_view(tensor)


# Many tensors at once.


def copy_all(outs: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its out, cast: on a GPU one launch for many tensors of one pair of dtypes."""
    if _copy_all is None:
        for out, source in zip(outs, sources, strict=True):
            out.copy_(source)
    else:
        _copy_all(outs, sources)


def add_all(sums: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add each part to its sum, in place: on a GPU one launch for many tensors of one dtype."""
    if _add_all is None:
        for total, part in zip(sums, parts, strict=True):
            total.add_(part)
    else:
        _add_all(sums, parts)


# Launches.


def current_stream(index: int) -> int:
    """The address of a CUDA device's current stream."""
    return torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


def launcher_of(compiled: Any) -> Callable[[tuple[int, int, int], int, Sequence[object]], None]:
    """What launches a compiled kernel, given a grid, a stream and all arguments: `compiled[grid]`, but in less time.

    Triton asks its settings for profilers' hooks three times per launch, and builds a function for it: 5 us of the 45
    and 65 that a call to `fakequant` took on the host of an H200 for 8 and 32 experts, in three runs in turns.
    """

    def launch_public(grid: tuple[int, int, int], stream: int, arguments: Sequence[object]) -> None:
        compiled[grid](*arguments, stream=stream)

    knobs = _find("triton.knobs", "runtime")
    if _launcher is None or knobs is None or not all(hasattr(compiled, name) for name in _launcher):
        return launch_public
    run, function, metadata = (getattr(compiled, name) for name in _launcher)

    def launch(grid: tuple[int, int, int], stream: int, arguments: Sequence[object]) -> None:
        if _launcher is None or _is_hook(knobs.launch_enter_hook) or _is_hook(knobs.launch_exit_hook):
            launch_public(grid, stream, arguments)
        else:
            run(*grid, stream, function, metadata, None, None, None, *arguments)

    return launch


def _is_hook(hook: Any) -> bool:
    """False for none, and for a chain of none."""
    return hook is not None and bool(getattr(hook, "calls", True))
