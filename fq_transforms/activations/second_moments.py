"""How large each channel of a layer's input is, by which `Mse` weighs the errors of its weights.

And how channels of a block that shares a scale go together: their second moments, blocks on the diagonal of GPTQ's
Hessian.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward, observe
from fq_transforms.activations.products import Use
from fq_transforms.distributed import check_group, said_by_all, sum_over, tell_failure
from fq_transforms.spec import Inputs, Spec, ranges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["POLICIES", "Unseen", "check_policy", "check_unseen", "input_second_moments", "inputs_of"]

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
    blocks: bool = False,
) -> dict[str, Tensor]:
    """`Transform.input_second_moments`, with the spec of the Transform."""
    check_group(group)
    given: Any = blocks
    found: dict[str, _Squares] = {}
    try:
        check_policy(unseen)
        if not isinstance(given, bool):
            raise ValueError(f"blocks: found {given!r}, wanted True or False")
        if wanted := inputs_of(spec):
            kind = partial(_seen, blocks=blocks)
            found = observe(params, batches, wanted, kind, model=model, forward=forward, caller="input_second_moments")
    except Exception as error:
        tell_failure(group, error)
        raise
    with_blocks = said_by_all(group, blocks, "input_second_moments")
    if len({*with_blocks}) > 1:
        raise ValueError(
            f"blocks: found True on {sum(with_blocks)} of {len(with_blocks)} ranks, wanted the same on all"
        )
    if group is not None:
        _add_over(group, [leaf for squares in found.values() for leaf in (squares.sums, squares.rows)])
        for squares in found.values():  # one by one, as they are large
            if isinstance(squares, _Moments):
                _add_over(group, [squares.products])
    return {key: squares.means(unseen) for key, squares in found.items()}


class _Squares:
    """Sum of squares of each channel, and count, of the tokens of each expert; the last entry is of no expert."""

    measure = "sum of squares"

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs = inputs
        shape = (inputs.experts + 1, inputs.shape[1])
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.rows = torch.zeros(shape[:1], dtype=torch.float64, device=device)

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
        """By expert, fp32; the policy decides for those without tokens."""
        return self._filled(self._each(self.sums[:-1]), unseen, torch.ones(())).float()

    def _each(self, sums: Tensor) -> Tensor:
        """Sums [E, ...] over the tokens of each expert."""
        return sums / self.rows[:-1].clamp(min=1.0).view(-1, *[1] * (sums.dim() - 1))

    def _filled(self, means: Tensor, unseen: Unseen, ones: Tensor) -> Tensor:
        """The means [E, ...], with others in place of those of experts without tokens."""
        is_unseen = self.rows[:-1] == 0
        if numbers := check_unseen(self.inputs, is_unseen, unseen, "input_second_moments"):
            means[numbers] = ones.to(means) if unseen == "ones" else means[~is_unseen].mean(0)
        return means


class _Moments(_Squares):
    """Sum of x x^T of each block of B inputs besides, fp64 [E, in / B, B, B]."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        super().__init__(inputs, device)
        side = inputs.format.block[1] or 1
        shape = (inputs.experts, inputs.shape[1] // side, side, side)
        self.products = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, use: Use, x: Tensor) -> None:
        super().add(use, x)
        x = x.reshape(-1, x.shape[-1])
        if isinstance(use.experts, int):
            self._add_products(use.experts, x)
            return
        experts = use.experts.reshape(-1)
        x = x[experts.argsort(stable=True)]
        counts: list[int] = experts.long().bincount(minlength=len(self.rows)).tolist()  # waits for the device
        for expert, rows in enumerate(x.split(counts)[:-1]):
            if len(rows):
                self._add_products(expert, rows)

    def _add_products(self, expert: int, x: Tensor) -> None:
        for part in x.split(MOST_ROWS):
            by_block = part.double().unflatten(-1, self.products.shape[1:3]).transpose(0, 1)  # [in / B, rows, B]
            self.products[expert] += by_block.mT @ by_block

    def to(self, device: torch.device) -> "_Moments":
        super().to(device)
        self.products = self.products.to(device)
        return self

    def means(self, unseen: Unseen) -> Tensor:
        means = self._each(self.products)
        means = (means + means.mT) / 2  # a product need not be symmetric to the bit
        # Its sums are in another order, too: the diagonal is that of `blocks=False`, exactly.
        means.diagonal(dim1=-2, dim2=-1).copy_(self._each(self.sums[:-1]).view(means.shape[:-1]))
        return self._filled(means, unseen, torch.eye(means.shape[-1])).float()


def _seen(inputs: Inputs, device: torch.device, *, blocks: bool) -> _Squares:
    """What is kept of a group: second moments of blocks, if they are asked for and its format has some along `in`."""
    kind = _Moments if blocks and inputs.format.has_blocks_along_in else _Squares
    return kind(inputs, device)


def inputs_of(spec: Spec) -> list[Inputs]:
    """The inputs of all groups of weights."""
    return [Inputs(g.key, g.names, g.format, g.experts, g.shape, g.stacked, g.transposed) for g in spec.groups]


def check_policy(unseen: Any) -> None:
    """Raise ValueError for an unknown policy."""
    if unseen not in POLICIES:
        raise ValueError(f"unseen: found {unseen!r}, wanted one of {POLICIES}")


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


def _add_over(group: "ProcessGroup", leaves: Sequence[Tensor]) -> None:
    """Add up fp64 tensors over the ranks, in place. One all-reduce, on the group's device, or none for none."""
    device = torch.device("cpu" if "cpu:" in torch.distributed.get_backend_config(group) else "cuda")
    for leaf, total in zip(leaves, sum_over(group, [leaf.to(device) for leaf in leaves]), strict=True):
        leaf.copy_(total)
