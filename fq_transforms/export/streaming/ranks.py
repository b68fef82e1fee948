"""Processes that write one folder together: torchrun's ranks, or those of torch.distributed as it is.

Nothing but what each has to say is sent.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["LostRankError", "RankError", "Ranks"]

T = TypeVar("T")

# That ranks wait for each other, some of which may have much more to do. One that ends is noticed at once.
PATIENCE = timedelta(days=1)


class LostRankError(RuntimeError):
    """Another process has ended before the work was done."""


class RankError(RuntimeError):
    """Another rank has failed, which the message names."""


class Ranks(AbstractContextManager["Ranks"]):
    """This process among those that share the work.

    Attributes:
        rank: Its number.
        size: How many there are: those of torch.distributed, or of torchrun's WORLD_SIZE, or 1.
    """

    def __init__(self) -> None:
        self._is_own = False
        self._group: Any = None
        if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            self.rank, self.size = 0, 1
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
            self._is_own = True
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Objects go through memory of the host, whatever the job's own backend is.
        self._group = None if self._is_own else dist.new_group(backend="gloo", timeout=PATIENCE)

    def __exit__(self, *error: object) -> None:
        if self._is_own:
            dist.destroy_process_group()
        elif self._group is not None:
            dist.destroy_process_group(self._group)

    def together(self, call: Callable[[], T]) -> T:
        """What a call returns here, once it has returned on all ranks.

        Raises:
            Exception: What it raised here.
            RankError: It raised on another rank.
            LostRankError: Another rank has ended.
        """
        if self.size == 1:
            return call()
        value: list[T] = []
        error: Exception | None = None
        try:
            value.append(call())
        except Exception as raised:  # told to the others, and raised again
            error = raised
        said = self._said(None if error is None else f"{type(error).__name__}: {error}", error)
        if error is not None:
            raise error
        for rank, other in enumerate(said):
            if other is not None:
                raise RankError(f"rank {rank} of {self.size}: {other}")
        return value[0]

    def on_first(self, call: Callable[[], object]) -> None:
        """The same on the first rank alone, for which the others wait."""
        self.together(call if self.rank == 0 else lambda: None)

    def check_same(self, value: str, what: str) -> None:
        """Raise ValueError, beginning with `what`, unless all ranks have the same value."""
        said = self.gather(value)
        if others := [rank for rank, other in enumerate(said) if other != said[0]]:
            raise ValueError(f"{what}: found others on ranks {others} of {self.size} than on 0, wanted the same on all")

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on all of them."""
        return self._said(value) if self.size > 1 else [value]

    def _said(self, value: Any, error: Exception | None = None) -> list[Any]:
        """What each rank has to say. Raises LostRankError, or the error of this rank, if one has ended."""
        said: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(said, value, self._group)
        except RuntimeError as lost:
            raise error or LostRankError(
                f"rank {self.rank} of {self.size}: found another one gone, wanted all: {lost}"
            ) from lost
        return said
