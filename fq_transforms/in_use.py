"""One use of a module at a time: what puts tensors or hooks into a model has it to itself, and leaves it as it was.

NOTE interrupts: Python raises KeyboardInterrupt between any two instructions of the main thread. So a use records what
it is about to do before it does it, whatever it records can be undone twice, and leaving starts over where it is
interrupted. The package itself writes `with use, use:`, so that what interrupts the first leaving before its first
instruction is met by the second. A `with` of the user's leaves once: where `__exit__` is interrupted before its first
instruction, or leaving for a second time, the model stays changed until the exception is gone, and with it the context.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from traceback import clear_frames
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

__all__ = ["InUse", "Within", "call_traced"]

T = TypeVar("T")

# In the order of their beginnings. No lock: one that is held at an interrupt, or at a fork, is never given back.
_USES: list["InUse"] = []


class InUse(AbstractContextManager["InUse"]):
    """A function's use of some modules and tensors, which is refused to others until it ends.

    Args:
        caller: The function that errors name.
        parts: Names and what they name.
        nests: True for a use that lasts for a call, within which its thread may begin others that do, too.

    Raises:
        ValueError: On entering: one of the parts is in use. Nothing is changed then.
    """

    def __init__(self, caller: str, parts: Iterable[tuple[str, object]], *, nests: bool = False) -> None:
        self.caller, self.nests = caller, nests
        self.parts = {id(part): (name, part) for name, part in parts}  # held, so that each id stays theirs
        self.thread = threading.current_thread()
        self.undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        try:
            if self not in _USES:
                _USES.append(self)  # first: of two that begin at once one is earlier, and the other sees it
                for other in (*_USES,):  # as it is now, whoever leaves meanwhile
                    if other is self:
                        break
                    self._check_apart(other)
            return self
        except BaseException:
            self.leave()
            raise

    def _check_apart(self, other: "InUse") -> None:
        if self.nests and other.nests and other.thread is self.thread:
            return
        shared = next((part for part in self.parts if part in other.parts), None)
        if shared is not None:
            name, part = self.parts[shared]
            raise ValueError(
                f"{self.caller}: found {name or 'the model'!r} ({type(part).__name__}) in use by {other.caller} in "
                f"{other.thread.name!r}, wanted one use at a time; leave the other first, or give each thread and "
                "task a model of its own: copy.deepcopy(model)"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            # PyTorch's functional_call, interrupted as it ends, puts back what it has exchanged when its frame goes,
            # which must not be after this use has put back its own.
            clear_frames(trace)
        self.leave()

    def leave(self) -> None:
        """Undo all, in the order from last to first, and let others have the parts."""
        try:
            self._undo_all()
            self._end()
        except BaseException:  # an interrupt, which comes once
            try:
                self._undo_all()
            finally:
                self._end()
            raise

    def _undo_all(self) -> None:
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def _end(self) -> None:
        if self in _USES:
            _USES.remove(self)

    # What a use does to its modules.

    def hook_before(self, module: Module, hook: Callable[..., Any], **options: bool) -> None:
        """`module.register_forward_pre_hook`, for the time of the use."""
        self.undo.append(partial(_unhook, module, hook))
        module.register_forward_pre_hook(hook, **options)

    def hook_after(self, module: Module, hook: Callable[..., Any], **options: bool) -> None:
        """`module.register_forward_hook`, for the time of the use."""
        self.undo.append(partial(_unhook, module, hook))
        module.register_forward_hook(hook, **options)

    def exchange(self, model: Module, tensors: Mapping[str, Tensor]) -> None:
        """Let a model have tensors by their names in place of its own, for the time of the use."""
        own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        given = {id(tensor): tensors[name] for name, tensor in own if name in tensors}
        places = _places(model, tensors)
        self.undo.append(partial(_put_back, places))
        for entries, attribute, tensor in places:
            entries[attribute] = given[id(tensor)]

    def stand_in(self, module: Module, forward: Callable[..., Any]) -> None:
        """Let a module's forward be another, for the time of the use."""
        had, own = "forward" in vars(module), module.forward
        self.undo.append(partial(_put_forward, module, own if had else None))
        vars(module)["forward"] = forward

    def call(self, model: Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`functional_call`, which by itself loses what it has exchanged where it is interrupted.

        So it does where a module has two names: under the second it finds what it has put there, and gives that back.
        """
        self.undo.append(partial(_put_back, _places(model, tensors)))
        out = functional_call(model, tensors, args, kwargs)
        self.undo[-1]()
        self.undo.pop()
        return out


def call_traced(model: Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`InUse.call` as torch.compile can trace it: without a use."""
    places = _places(model, tensors)
    try:
        return functional_call(model, tensors, args, kwargs)
    finally:
        _put_back(places)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def _unhook(module: Module, hook: object) -> None:
    """Remove a hook, whose handle may not have been made yet; its options first, by which it may be found once more."""
    found = [key for hooks in _HOOKS for key, one in list(vars(module)[hooks].items()) if one is hook]
    for key in found:
        for entries in (*_OPTIONS, *_HOOKS):
            vars(module)[entries].pop(key, None)


_Place = tuple[dict[str, Tensor | None], str, Tensor | None]


def _places(model: Module, tensors: Mapping[str, Tensor]) -> list[_Place]:
    """Where a model has parameters and buffers of these names, or tied to such, and what they are."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    given = {id(own[name]) for name in tensors if name in own}
    return [
        (entries, attribute, tensor)
        for module in model.modules()
        for entries in (vars(module)["_parameters"], vars(module)["_buffers"])
        for attribute, tensor in entries.items()
        if id(tensor) in given
    ]


def _put_back(places: Iterable[_Place]) -> None:
    for entries, attribute, tensor in places:
        if entries.get(attribute) is not tensor:
            entries[attribute] = tensor


def _put_forward(module: Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


class Within(AbstractContextManager[T], Generic[T]):
    """A `with` of the user's around a use. It may be entered anew, but once at a time."""

    _now: InUse | None = None

    def __enter__(self) -> T:
        use = self._use()
        try:
            use.__enter__()
            begun = self._begin(use)
            self._now = use
            return begun
        except BaseException:
            use.leave()
            raise

    def __exit__(self, kind: object, *error: object) -> None:
        if self._now is not None:
            self._now.leave()
            self._now = None
        if kind is None:
            self._end()

    def __del__(self) -> None:
        if self._now is not None:  # of a context that nobody has left: a dropped generator's, or an interrupted one
            self._now.leave()

    @abstractmethod
    def _use(self) -> InUse:
        """What is to be used; raises where it cannot be. Nothing is changed yet."""

    @abstractmethod
    def _begin(self, use: InUse) -> T:
        """Change the parts of the use, through it; what the `with` gives."""

    @abstractmethod
    def _end(self) -> None:
        """Raise where something was amiss, after all is undone; not called while an exception is on its way."""
