"""A model's forward on a batch that goes on a step at a time: from the start to a layer, to the next, to its end.

It is a thread, which waits before each layer until it is told to go on. Of all threads one computes at a time.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from fq_transforms.activations.observe import Forward, run_batch
from fq_transforms.in_use import InUse

__all__ = ["SteppedForward"]


class _StoppedError(BaseException):
    """Raised in a batch whose run is over."""


class SteppedForward(threading.Thread):
    """A model's forward on one batch, which goes on only while `advance` waits for it.

    Args:
        number: Of the batch.
        given: The batch.
        model: Its layers call `arrive` and `leave`.
        forward: See `Transform.calibrate`.
        use: The caller's use of the model, which is the thread's while that computes.

    Attributes:
        at: Number of the layer that it waits before; None at the start and at the end.
        args: What that layer is called with, and `kwargs`.
        within: What its next step is within, as far as the end of that layer.
        output: Of a layer, where it is kept.
    """

    def __init__(self, number: int, given: Any, model: Module, forward: Forward | None, use: InUse) -> None:
        super().__init__(name=f"{use.caller}, batch {number}", daemon=True)
        self.number, self.given = number, given
        self.at: int | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.within: AbstractContextManager[object] = nullcontext()
        self.output: Any = None
        self._call = partial(run_batch, model, given, forward)
        self._use, self._is_over = use, False
        self._error: BaseException | None = None
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._vars, self._as_here = copy_context(), _as_here()

    def run(self) -> None:
        """What the thread does."""
        try:
            self._wait()
            with ExitStack() as self._entered:
                self._entered.enter_context(self._as_here())
                self._vars.run(self._call)
        except _StoppedError:
            pass
        except BaseException as error:
            error.add_note(f"{self._use.caller}: in batch {self.number}")
            self._error = error
        self.at, self.args, self.kwargs = None, (), {}
        self._came.release()

    def arrive(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by the thread, before a layer: wait until the caller lets it go on."""
        self.at, self.args, self.kwargs = number, args, kwargs
        self._came.release()
        self._wait()
        self.args, self.kwargs = (), {}
        self._inputs = self._entered.enter_context(ExitStack())
        self._inputs.enter_context(self.within)

    def leave(self) -> None:
        """Called by the thread, after the layer."""
        self._inputs.close()

    def _wait(self) -> None:
        self._go.acquire()
        if self._is_over:
            raise _StoppedError

    def advance(self) -> None:
        """Called by the caller: let the thread go on to the next layer, or to its end. Raises what it raised."""
        if self.ident is None:
            self.start()
        caller, self._use.thread = self._use.thread, self
        try:
            self._go.release()
            self._came.acquire()
        finally:
            self._use.thread, self.within = caller, nullcontext()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let the thread come to its end, wherever it is. Once more is no fault."""
        self._is_over = True
        self._go.release()
        if self.is_alive():
            self.join()


def _as_here() -> Callable[[], AbstractContextManager[object]]:
    """What lets another thread compute as this one would now: PyTorch keeps its modes for each thread."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) for kind in kinds]
    device, is_inference = torch.get_default_device(), torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    count = torch.get_num_threads()  # sums of products are in another order with another number

    @contextmanager
    def entered() -> Generator[None]:
        torch.set_num_threads(count)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if is_inference else torch.no_grad())
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            if device != torch.device("cpu"):
                stack.enter_context(device)
            for kind, dtype, is_cached in casts:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=is_cached))
            yield

    return entered
