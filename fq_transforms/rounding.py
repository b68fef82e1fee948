"""How fake quantization rounds, other than to the nearest: `Stochastic`, a seed and nothing else."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["Stochastic", "Stream", "check_rounding", "check_seed_of_steps", "of_step"]


class Stochastic(NamedTuple):
    """Round to one of the two neighbours in the format, the nearer one more often, so that the mean is the weight.

    A weight t steps from zero becomes floor(t) + 1 steps with probability t - floor(t), else floor(t). What saturates
    saturates as it does without, and scales are rounded to the nearest. Values of the format stay: t within 2**-22 * t
    of an integer is one, since that is how far fp32 carries a value through its own scale.

    The random bits of a weight are a function of the seed, the name of its group (the key, with `*` for the expert),
    the number of its expert and its row and column in [out, in], and of nothing else: not of how a kernel is tiled, how
    the matrix is stored, which other groups there are, or how a DTensor is sharded. Plain parameters of a rank that
    holds some of the experts count from zero: give `first_expert`, or ranks draw the same bits for different experts.
    So do rows and columns of plain slices, as under tensor parallelism: give each such rank a seed of its own.

    Attributes:
        seed: An int, or an int64 tensor of no dimensions on the device of the weights, which a CUDA graph and a
            compiled function read anew at each call. A new seed a step: the same one rounds the same way.
        first_expert: Number of the first expert here, for parameters that hold a rank's own experts only; groups of
            one dense weight have none.

    Source: Philox 4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"weight": torch.full((1, 10000), 0.3)}
        >>> params["weight"][0, 0] = 127.0
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        >>> state = fq.calibrate(params)
        >>> nearest = fq.fakequant(params, state)["weight"]
        >>> by_chance = fq.fakequant(params, state, rounding=fqt.Stochastic(seed=0))["weight"]
        >>> nearest[0, 1:].mean(), by_chance[0, :6], by_chance[0, 1:].mean()
        (tensor(0.), tensor([127.,   1.,   0.,   1.,   0.,   1.]), tensor(0.3025))
    """

    seed: int | Int64[Tensor, ""]
    first_expert: int = 0


@dataclass(frozen=True)
class Stream:
    """Which random bits the experts of a launch draw: what is the same for all of them, in numbers.

    Attributes:
        group: Number of the group, from its name.
        first_expert: Number of the first expert.
        row: Row of the whole weight at which this rank's begins.
        column: Likewise the column.
        experts: Experts of each tensor, mapped dimensions apart.
        copies: How many times they lie in each tensor, by mapped dimensions in front.
    """

    group: int
    first_expert: int = 0
    row: int = 0
    column: int = 0
    experts: int = 1
    copies: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of them, in the order of a kernel's arguments."""
        return self.group, self.first_expert, self.row, self.column, self.experts, self.copies


def check_rounding(rounding: Any) -> None:
    """Raise ValueError unless it is a `Stochastic` of a seed and a number of an expert."""
    if not isinstance(rounding, Stochastic):
        raise ValueError(f"rounding: found {type(rounding).__name__}, wanted None or fqt.Stochastic(seed)")
    seed: Any = rounding.seed
    first: Any = rounding.first_expert
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(f"seed: found {tuple(seed.shape)} {seed.dtype}, wanted an int64 tensor of no dimensions")
    elif not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: found {seed!r}, wanted an int of 64 bits or an int64 tensor")
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < 2**31:
        raise ValueError(f"first_expert: found {first!r}, wanted an int >= 0")


def check_seed_of_steps(seed: Any) -> None:
    """Raise ValueError unless it is an int that leaves 32 bits of a seed to the number of a step."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**31) <= seed < 2**31:
        raise ValueError(f"seed: found {seed!r}, wanted an int of 32 bits, which the number of the step follows")


def of_step(rounding: Stochastic | None, step: int) -> Stochastic | None:
    """The rounding of a step of training: other bits at each step, the same ones when it is resumed."""
    return rounding and rounding._replace(seed=(rounding.seed << 32) + step)
