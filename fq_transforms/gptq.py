"""GPTQ for all experts of a group at once: weights moved onto the grid, each column making up for those before it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fq_transforms.calibrate import progress
from fq_transforms.checks import check_device, check_readable, check_state, check_tensor, weights_of
from fq_transforms.dtensor import is_sharded
from fq_transforms.formats import static_format
from fq_transforms.ops.gptq.reference import block_amax, gptq_block_reference, on_grid_of
from fq_transforms.ops.launch import each_expert, has_kernel
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.spec import Group, ranges
from fq_transforms.state import State

if TYPE_CHECKING:
    from fq_transforms.transform import Transform

__all__ = ["Hessians", "gptq"]

Hessians = Mapping[str, Mapping[str, Tensor]]

# Columns that are rounded one by one before what follows is made up for by a matrix product.
BLOCK = 128
# Bytes of experts in work at a time.
HELD_BYTES = {"cpu": 2**30, "cuda": 2**33}
# Copies of a Hessian and of a weight that an expert in work takes, in fp32.
COPIES = 8
# How far a Hessian may be from its transpose, beside its largest number: sums in fp32 in two orders.
ASYMMETRY = 2.0**-10
# Damping of a Hessian that has no Cholesky factor under the one asked for: ten times as much, from this on, up to 1.
LEAST_DAMPING = 1e-4


@torch.no_grad()
def gptq(
    fq: "Transform",
    params: Mapping[str, Tensor],
    state: State,
    hessians: Hessians,
    *,
    damping: float = 0.01,
    shrinkage: float = 0.1,
    order: Literal["activation"] | None = None,
) -> dict[str, Tensor]:
    """Weights q on the grid of their formats, for each expert with a small tr((w - q) H (w - q)^T), H its Hessian.

    Columns are rounded one after the other, each making up for those before. `fakequant` leaves the result as it is. An
    expert that it would not help is rounded to the nearest, and a warning says which. More: docs/gptq.

    Args:
        fq: Its formats have scales that do not follow the weights: all but dynamic NVFP4.
        params: May hold more than the spec names.
        state: From `calibrate`, by any method.
        hessians: From `input_hessians`.
        damping: What is added to the diagonal, as a part of its mean.
        shrinkage: H_e counts as n tokens and the layer's average as shrinkage * in, n those that expert e saw.
        order: "activation" rounds the columns with the largest inputs first; scales stay where they are.

    Returns:
        As `params`, with new tensors of the same dtypes for what the spec names.

    Raises:
        KeyError: Hessians lack a group.
        ValueError: A Hessian is not finite, not symmetric, or all zeros; a format is dynamic NVFP4; DTensors.

    Source: Frantar et al., "GPTQ", arXiv:2210.17323.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {"w": torch.tensor([[0.4, 0.4]])}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        >>> state = {"w": {"amax": torch.tensor([127.0])}}
        >>> hessians = {"w": {"hessian": torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), "tokens": torch.tensor([9.0])}}
        >>> fqt.gptq(fq, params, state, hessians)["w"]
        tensor([[0., 1.]])
    """
    _check_options(damping, shrinkage, order)
    check_state(state, fq.spec)
    _check_hessians(fq, params, hessians)
    moved: dict[str, Tensor] = {}
    for group in progress(fq.spec.groups, "GPTQ"):
        weights = [weight.detach() for weight in weights_of(params, group)]
        with torch.autocast(weights[0].device.type, enabled=False):  # which would round an average to bf16
            found, kept = _moved(group, weights, state[group.key], hessians[group.key], damping, shrinkage, order)
        if kept:
            warnings.warn(
                f"gptq: {group.key!r}: rounded expert {ranges(kept)} of {group.experts} to the nearest, which had no "
                "larger error",
                stacklevel=3,  # beyond no_grad's wrapper
            )
        moved |= zip(group.names, found, strict=True)
    return dict(params) | moved


def _check_options(damping: Any, shrinkage: Any, order: Any) -> None:
    for name, value in (("damping", damping), ("shrinkage", shrinkage)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}: found {value!r}, wanted a number, 0 or more")
    if order not in (None, "activation"):
        raise ValueError(f"order: found {order!r}, wanted None or 'activation'")


def _check_hessians(fq: "Transform", params: Mapping[str, Tensor], hessians: Hessians) -> None:
    """Raise unless there is a usable Hessian of each group, on the device of its weights. Each is read once."""
    keys = {group.key for group in fq.spec.groups}
    if missing := sorted(keys - hessians.keys()):
        raise KeyError(f"hessians: found none of group {missing[0]!r}, {len(missing)} of {len(keys)} missing")
    if unexpected := sorted(hessians.keys() - keys):
        raise ValueError(
            f"hessians: found unexpected groups {unexpected[:4]}, wanted the spec's, such as {min(keys)!r}"
        )
    checked: set[int] = set()
    for group in fq.spec.groups:
        if group.format.dynamic and not group.format.is_stateless:
            raise ValueError(
                f"gptq: found {group.format.name} for group {group.key!r}, whose scales follow the weights as they "
                f"move, wanted {static_format(group.format).name}"
            )
        weights, leaves = weights_of(params, group), hessians[group.key]
        if is_sharded(weights[0]):
            raise ValueError(f"gptq: found the DTensor {group.names[0]!r}, wanted plain tensors: whole experts")
        if weights[0].is_meta:
            raise ValueError(f"parameter {group.names[0]!r}: found on meta, wanted values; load the weights")
        what = f"hessians {group.key!r}"
        if not isinstance(leaves, Mapping) or set(leaves) != {"hessian", "tokens"}:  # pyright: ignore[reportUnnecessaryIsInstance]
            found = list(leaves) if isinstance(leaves, Mapping) else type(leaves).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{what}: found {found}, wanted 'hessian' and 'tokens', as of input_hessians")
        side = group.shape[1]
        check_tensor(f"{what}.hessian", leaves["hessian"], (group.experts, side, side), torch.float32)
        check_readable(f"{what}.tokens", leaves["tokens"])
        check_tensor(f"{what}.tokens", leaves["tokens"], (group.experts,), leaves["tokens"].dtype)
        check_device(group, leaves, weights[0].device)
        if id(leaves["hessian"]) not in checked:  # roles that share their inputs share it
            checked.add(id(leaves["hessian"]))
            _check_values(group, leaves["hessian"])
        _check_tokens(group, leaves["tokens"])


def _check_values(group: Group, hessian: Tensor) -> None:
    """Raise ValueError for the first Hessian that is none."""
    for first, some in _chunks(hessian, 4 * hessian[0].nbytes):
        largest = some.abs().amax((1, 2))
        is_symmetric = (some - some.mT).abs().amax((1, 2)) <= ASYMMETRY * largest
        least = some.diagonal(dim1=1, dim2=2).amin(1)
        wrong = (~is_symmetric | (largest == 0) | (least < 0)).nonzero().flatten()
        if not len(wrong):
            continue
        e = int(wrong[0])
        expert = f"expert {first + e}, {group.expert_name(first + e)!r}"
        if not bool(largest[e] < torch.inf):
            found = f"a value of {largest[e].item()} for {expert}, wanted finite ones"
        elif largest[e] == 0:
            found = f"all zeros for {expert}, wanted tokens; pass more batches, or unseen='mean-of-peers' or 'ones'"
        elif not is_symmetric[e]:
            found = f"a matrix that is not symmetric for {expert}, wanted the mean of x x^T"
        else:
            found = f"{least[e].item()} on the diagonal of {expert}, wanted mean squares, 0 or more"
        raise ValueError(f"hessians {group.key!r}: found {found}")


def _check_tokens(group: Group, tokens: Tensor) -> None:
    """Raise ValueError for the first number of tokens that is none."""
    wrong = (~((tokens >= 0) & (tokens < torch.inf))).nonzero().flatten()
    if len(wrong):
        e = int(wrong[0])
        raise ValueError(
            f"hessians {group.key!r}.tokens: found {tokens[e].item()} for expert {e}, {group.expert_name(e)!r}, wanted "
            "a count, 0 or more"
        )


def _chunks(tensor: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Some experts of [E, ...] at a time, with the number of the first; `size` is what one takes in memory."""
    count = max(1, HELD_BYTES[tensor.device.type] // size)
    for first, some in enumerate(tensor.split(count)):
        yield first * count, some


class _Options(NamedTuple):
    """What of a group is the same for all of its experts."""

    group: Group
    damping: float
    order: str | None


def _moved(
    group: Group,
    weights: Sequence[Tensor],
    scales: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    damping: float,
    shrinkage: float,
    order: str | None,
) -> tuple[list[Tensor], list[int]]:
    """The weights of a group on the grid, and the experts that were rounded to the nearest for want of better."""
    moved = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    old, new = (list(each_expert(some, group.transposed)) for some in (weights, moved))
    hessian, tokens = leaves["hessian"], leaves["tokens"].to(leaves["hessian"].device).float()
    average = _average(hessian, tokens)
    kept: list[int] = []
    for first, own in _chunks(hessian, 4 * COPIES * (group.shape[1] * sum(group.shape))):
        part = slice(first, first + len(own))
        weight = torch.stack(old[part]).float()
        amax, global_amax = (leaf if leaf is None else leaf[part] for leaf in map(scales.get, ("amax", "global_amax")))
        share = torch.where(tokens[part] > 0, shrinkage * group.shape[1], 0.0)
        share = (share / (share + tokens[part]).clamp(min=1e-30))[:, None, None]
        shrunk = own + share * (average - own)
        errors = _errors(weight, shrunk, amax, global_amax, _Options(group, damping, order))
        (nearest,) = fake_quantize([weight], amax, global_amax, format=group.format)
        nearest = weight - nearest
        losses = [_loss(one, own) for one in (errors, nearest)]
        is_better = losses[0] < losses[1]
        is_other = (errors != nearest).flatten(1).any(1)
        kept += (first + (is_other & (losses[0] > losses[1])).nonzero().flatten()).tolist()
        # A weight less its error is a value of the format, but for the rounding of the difference.
        found = weight - errors
        if group.format.is_stateless:
            found = on_grid_of(weight, found, group.format)
        found = torch.where(is_better[:, None, None], found, weight)
        (found,) = fake_quantize([found], amax, global_amax, format=group.format, out_dtype=weights[0].dtype)
        for to, one in zip(new[part], found, strict=True):
            to.copy_(one)
    return moved, kept


def _average(hessian: Tensor, tokens: Tensor) -> Tensor:
    """The Hessian of the layer's tokens, whoever got them, [in, in]."""
    shares = tokens / tokens.sum().clamp(min=1e-30)
    return torch.einsum("e,eij->ij", shares, hessian)


def _loss(errors: Tensor, hessian: Tensor) -> Tensor:
    """tr(errors H errors^T) of each expert, in float64."""
    errors = errors.double()
    return (errors @ hessian.double()).mul_(errors).sum((1, 2))


def _errors(
    weight: Tensor, hessian: Tensor, amax: Tensor | None, global_amax: Tensor | None, options: _Options
) -> Tensor:
    """W - q of some experts, [E, out, in]."""
    group, in_features = options.group, weight.shape[-1]
    if group.format.is_stateless:
        amax = block_amax(weight, group.format)
    assert amax is not None
    columns = torch.arange(in_features, device=weight.device).expand(len(weight), -1)
    if options.order is not None:
        columns = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        hessian = _taken(_taken(hessian, columns, 1), columns, 2)
        weight = _taken(weight, columns, 2)
    factor = _factor(hessian, options)
    errors = torch.empty_like(weight)
    for first in range(0, in_features, BLOCK):
        block = slice(first, min(first + BLOCK, in_features))
        target = weight[..., block].contiguous()
        if first:
            target.baddbmm_(errors[..., :first], factor[:, :first, block])
        if has_kernel([weight]):
            from fq_transforms.ops.gptq.launch import gptq_block_triton

            numbers = (amax, global_amax, columns, first)
            gptq_block_triton(target, weight, errors, factor, *numbers, format=group.format)
            continue
        numbers = (factor[:, block, block], amax, global_amax, columns[:, block])
        errors[..., block] = gptq_block_reference(target, weight[..., block], *numbers, format=group.format)
    return errors if options.order is None else _taken(errors, columns.argsort(dim=1), 2)


def _taken(tensor: Tensor, columns: Tensor, dim: int) -> Tensor:
    """The rows or columns of each expert's matrix in another order."""
    index = columns[:, :, None] if dim == 1 else columns[:, None, :]
    return tensor.gather(dim, index.expand(tensor.shape))


def _factor(hessian: Tensor, options: _Options) -> Tensor:
    """R_ij / R_jj of each expert, where H + damping = R R^T and R is upper triangular.

    A Hessian of fewer tokens than inputs is singular; if fp32 has no factor of it, it is damped further.
    """
    means = hessian.diagonal(dim1=1, dim2=2).mean(1)
    lower = torch.empty_like(hessian)
    damping, left = options.damping, torch.arange(len(hessian), device=hessian.device)
    while True:
        damped = hessian[left].flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_((damping * means[left])[:, None])
        found, failed = torch.linalg.cholesky_ex(damped)
        lower[left] = found
        left = left[failed != 0]
        if not len(left):
            break
        damping = max(10 * damping, LEAST_DAMPING)
        if damping > 10:
            raise ValueError(f"hessians {options.group.key!r}: found one that is not positive, wanted means of x x^T")
        warnings.warn(
            f"gptq: {options.group.key!r}: found {len(left)} singular Hessians, damped by {damping:g} of their mean "
            "diagonal",
            stacklevel=6,
        )
    upper = lower.flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2)[:, None, :]
