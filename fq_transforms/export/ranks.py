"""Processes that write one folder together: torchrun's ranks, or those of torch.distributed as it is.

Nothing but what each has to say is sent.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["RankError", "Ranks"]

T = TypeVar("T")


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
        if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            self.rank, self.size, self._group = 0, 1, None
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo")
            self._is_own = True
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Objects go through memory of the host, whatever the job's own backend is.
        self._group = None if self._is_own else dist.new_group(backend="gloo")

    def __exit__(self, *error: object) -> None:
        if self._is_own:
            dist.destroy_process_group()
        elif self._group is not None:
            dist.destroy_process_group(self._group)

    def together(self, call: Callable[[], T], *, only_first: bool = False) -> T | None:
        """What a call returns here, once it has returned on all ranks; or on the first, which alone makes it.

        Raises:
            Exception: What it raised here.
            RankError: It raised on another rank.
        """
        if self.size == 1:
            return call()
        value: T | None = None
        error: BaseException | None = None
        if self.rank == 0 or not only_first:
            try:
                value = call()
            except Exception as raised:  # told to the others, and raised again
                error = raised
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}", self._group)
        if error is not None:
            raise error
        for rank, other in enumerate(said):
            if other is not None:
                raise RankError(f"rank {rank} of {self.size}: {other}")
        return value
