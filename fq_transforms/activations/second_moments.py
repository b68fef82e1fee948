"""How large each channel of a layer's input is, by which `Mse` weighs the errors of its weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward, observe
from fq_transforms.activations.products import Use
from fq_transforms.distributed import sum_over
from fq_transforms.spec import Inputs, Spec, ranges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["POLICIES", "Unseen", "check_unseen", "input_second_moments"]

Unseen = Literal["raise", "mean-of-peers", "ones"]
POLICIES: tuple[Unseen, ...] = get_args(Unseen)

# Tokens that are float64 at a time.
MOST_ROWS = 1024


def input_second_moments(
    params: Mapping[str, Tensor],
    batches: Any,
    *,
    spec: Spec,
    model: Module,
    forward: Forward | None,
    unseen: Unseen,
    group: "ProcessGroup | None",
) -> dict[str, Tensor]:
    """`Transform.input_second_moments`, with the spec of the Transform."""
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"group: found {group!r}, wanted None or a process group that this rank is in")
    wanted = [Inputs(g.key, g.names, g.format, g.experts, g.shape, g.stacked, g.transposed) for g in spec.groups]
    try:  # all that may differ between ranks, so that those without the error do not wait for ever
        if unseen not in POLICIES:
            raise ValueError(f"unseen: found {unseen!r}, wanted one of {POLICIES}")
        if not wanted:
            return {}
        found = observe(params, batches, wanted, _Squares, model=model, forward=forward, caller="input_second_moments")
    except Exception:
        if group is not None:
            _add_up([_Squares(inputs, torch.device("cpu"), torch.nan) for inputs in wanted], group)
        raise
    if group is not None:
        _add_up(list(found.values()), group)
        if bool(found[wanted[0].key].rows.isnan().any()):
            raise ValueError(
                "input_second_moments: found that another rank of the group failed, wanted sums from all of them"
            )
    return {key: squares.means(unseen) for key, squares in found.items()}


class _Squares:
    """Sum of squares of each channel, and count, of the tokens of each expert; the last entry is of no expert."""

    measure = "sum of squares"

    def __init__(self, inputs: Inputs, device: torch.device, value: float = 0.0) -> None:
        self.inputs = inputs
        shape = (inputs.experts + 1, inputs.shape[1])
        self.sums = torch.full(shape, value, dtype=torch.float64, device=device)
        self.rows = torch.full(shape[:1], value, dtype=torch.float64, device=device)

    def add(self, use: Use, x: Tensor) -> None:
        parts = x.reshape(-1, x.shape[-1]).split(MOST_ROWS)
        if isinstance(use.experts, int):
            for part in parts:
                self.sums[use.experts] += part.double().square().sum(0)
                self.rows[use.experts] += len(part)
            return
        for part, experts in zip(parts, use.experts.reshape(-1).long().split(MOST_ROWS), strict=True):
            self.sums.index_add_(0, experts, part.double().square())
            self.rows.index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))

    def to(self, device: torch.device) -> "_Squares":
        self.sums, self.rows = self.sums.to(device), self.rows.to(device)
        return self

    def sizes(self) -> Tensor:
        return self.sums[:-1].sum(-1)

    def means(self, unseen: Unseen) -> Tensor:
        rows = self.rows[:-1, None]
        means, is_unseen = self.sums[:-1] / rows.clamp(min=1.0), (rows == 0).flatten()
        if numbers := check_unseen(self.inputs, is_unseen, unseen, "input_second_moments"):
            means[numbers] = 1.0 if unseen == "ones" else means[~is_unseen].mean(0)
        return means.float()


def check_unseen(inputs: Inputs, is_unseen: Tensor, unseen: Unseen, caller: str) -> list[int]:
    """The experts of a group without tokens. Raises ValueError where the policy has nothing to give them."""
    numbers: list[int] = is_unseen.nonzero().flatten().tolist()
    is_without_peers = len(numbers) == inputs.experts
    if numbers and unseen != "ones" and (unseen == "raise" or is_without_peers):
        wanted = "tokens for each" if unseen == "raise" else f"peers for unseen={unseen!r}"
        choices = "'ones'" if is_without_peers else "'mean-of-peers' or 'ones'"
        raise ValueError(
            f"{caller}: inputs {inputs.key!r}: found no token for expert {ranges(numbers)} of {inputs.experts}, wanted "
            f"{wanted}; pass more batches, or choose by unseen={choices}"
        )
    return numbers


def _add_up(found: Sequence[_Squares], group: "ProcessGroup") -> None:
    """Add up sums and counts over the ranks, in place. One all-reduce, on the group's device, or none for none."""
    device = torch.device("cpu" if "cpu:" in torch.distributed.get_backend_config(group) else "cuda")
    leaves = [leaf for squares in found for leaf in (squares.sums, squares.rows)]
    for leaf, total in zip(leaves, sum_over(group, [leaf.to(device) for leaf in leaves]), strict=True):
        leaf.copy_(total)
