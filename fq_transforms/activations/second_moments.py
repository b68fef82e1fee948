"""`mean_squares`: how large each channel of a layer's input is, by which `Mse` weighs the errors of its weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward, observe
from fq_transforms.activations.products import Use
from fq_transforms.dtensor import sum_over
from fq_transforms.spec import Inputs, Spec, ranges

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["mean_squares"]

Unseen = Literal["raise", "mean-of-peers", "ones"]
POLICIES: tuple[Unseen, ...] = get_args(Unseen)

# Tokens that are float64 at a time.
MOST_ROWS = 1024


def mean_squares(
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    spec: Spec,
    model: Module,
    forward: Forward | None = None,
    unseen: Unseen = "raise",
    group: "ProcessGroup | None" = None,
) -> dict[str, Tensor]:
    """m[e, i] = mean of x[t, i]**2 over the tokens t that expert e multiplies its weight with, x @ w[e].T.

    The `statistics` of `calibrate`: with them `Mse` takes the amax with the least sum of m[e, i] * error[o, i]**2, the
    squared error of the layer's output but for correlations of channels, in place of that of the weight.
    `functional_call(model, params, batch)` runs for each batch, nothing quantized and without gradients, and what the
    selected weights are multiplied with is observed, whether the spec selects inputs or not.

        unseen             m[e] of an expert e without tokens, among the experts p of its group that have seen some
        "raise"            none: ValueError, naming layer and experts
        "mean-of-peers"    mean of m[p]
        "ones"             1: the error of the weight itself

    Args:
        params: Names to tensors; may hold more than the spec names.
        batch: One batch or many, as `calibrate` takes them.
        spec: Whose weights; its inputs are not read.
        model: Whose parameters `params` are, in the mode (`eval()`) that it shall run in. It is not changed; what it
            writes into buffers is lost.
        forward: `forward(call, batch)`, if `call(batch)` is not how a batch is passed.
        unseen: The choice for experts without tokens.
        group: Ranks with the same weights and each its own batches, this one among them: sums and counts are added up
            over them, in one all-reduce. A rank that fails makes the others raise, not wait, and so does one without a
            batch or with a layer that never ran.

    NOTE expert parallelism: experts see the tokens of all ranks that share them out, dense layers those of their own
    rank. So make one call for the experts, whose group is the ranks that hold replicas of them, or None, and one for
    the dense layers, whose group is all data-parallel ranks (Megatron's `get_expert_data_parallel_group()`, and
    `get_data_parallel_group(with_context_parallel=True)`), each with a spec from `select` by rules of its own. Keys are
    those of one spec of both, whose statistics are the two dicts joined, `experts | dense`.

    Returns:
        By group key, float32 [E, in] on the device of the weights. Squares and their sums are float64, rounded once at
        the end: however tokens are split into batches and ranks, the mean is the same but for the order in which
        float64 adds. A weight that is used twice has the mean of both uses. Dense weights have E = 1.

    Raises:
        KeyError: A parameter is missing.
        ValueError: There is no batch, or no model; an input is NaN or infinite: the first such layer is named, and the
            batch by its number from 0; a layer never ran; a weight is used in another way than a product with an
            input, or within the model's own vmap, or is a DTensor; "raise" found an expert without a token,
            "mean-of-peers" a group of which no expert has seen one; `unseen` is not one of these; `group` is no process
            group; another rank failed. What the model raises comes through, with a note of the batch. `calibrate`
            refuses means that are all 0 for an expert, or beyond float32.

    Source: the diagonal of the Hessian of GPTQ, Frantar et al., arXiv:2210.17323, section 3; by expert, what
    `llama-imatrix` of llama.cpp collects.

    Example:
        >>> import fq_transforms as fqt
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), method=fqt.methods.Mse())
        >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 2.0]])]
        >>> means = mean_squares(params, batches, spec=fq.spec, model=model)
        >>> means
        {'weight': tensor([[5., 2.]])}
        >>> state = fq.calibrate(params, statistics=means)
    """
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"group: found {group!r}, wanted None or a process group that this rank is in")
    wanted = [Inputs(g.key, g.names, g.format, g.experts, g.shape, g.stacked, g.transposed) for g in spec.groups]
    try:  # all that may differ between ranks, so that those without the error do not wait for ever
        if unseen not in POLICIES:
            raise ValueError(f"unseen: found {unseen!r}, wanted one of {POLICIES}")
        if not wanted:
            return {}
        found = observe(params, batch, wanted, _Squares, model=model, forward=forward, caller="mean_squares")
    except Exception:
        if group is not None:
            _add_up([_Squares(inputs, torch.device("cpu"), torch.nan) for inputs in wanted], group)
        raise
    if group is not None:
        _add_up(list(found.values()), group)
        if bool(found[wanted[0].key].rows.isnan().any()):
            raise ValueError("mean_squares: found that another rank of the group failed, wanted sums from all of them")
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

    def merge(self, other: "_Squares") -> None:
        self.sums += other.sums.to(self.sums.device)
        self.rows += other.rows.to(self.rows.device)

    def sizes(self) -> Tensor:
        return self.sums[:-1].sum(-1)

    def means(self, unseen: Unseen) -> Tensor:
        rows = self.rows[:-1, None]
        means, is_unseen = self.sums[:-1] / rows.clamp(min=1.0), (rows == 0).flatten()
        numbers: list[int] = is_unseen.nonzero().flatten().tolist()
        if numbers and unseen == "ones":
            means[is_unseen] = 1.0
        elif numbers:
            is_without_peers = len(numbers) == self.inputs.experts
            if unseen == "raise" or is_without_peers:
                wanted = "tokens for each" if unseen == "raise" else f"peers for unseen={unseen!r}"
                choices = "'ones'" if is_without_peers else "'mean-of-peers' or 'ones'"
                raise ValueError(
                    f"mean_squares: inputs {self.inputs.key!r}: found no token for expert {ranges(numbers)} of "
                    f"{self.inputs.experts}, wanted {wanted}; pass more batches, or choose by unseen={choices}"
                )
            means[is_unseen] = means[~is_unseen].mean(0)
        return means.float()


def _add_up(found: Sequence[_Squares], group: "ProcessGroup") -> None:
    """Add up sums and counts over the ranks, in place. One all-reduce, on the group's device, or none for none."""
    device = torch.device("cpu" if "cpu:" in torch.distributed.get_backend_config(group) else "cuda")
    leaves = [leaf for squares in found for leaf in (squares.sums, squares.rows)]
    for leaf, total in zip(leaves, sum_over(group, [leaf.to(device) for leaf in leaves]), strict=True):
        leaf.copy_(total)
