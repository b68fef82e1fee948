"""GPTQ for all experts of a group at once: weights moved onto the grid, each column making up for those before it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fq_transforms.calibrate import progress
from fq_transforms.checks import (
    check_device,
    check_readable,
    check_state,
    check_tensor,
    refuse_compiled,
    refuse_transforms,
    weights_of,
)
from fq_transforms.dtensor import is_sharded
from fq_transforms.formats import Format, static_format
from fq_transforms.ops.gptq.reference import block_amax, gptq_block_reference, on_grid_of
from fq_transforms.ops.launch import each_expert, has_kernel
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.spec import Group, Spec, ranges
from fq_transforms.state import State

if TYPE_CHECKING:
    from fq_transforms.transform import Transform

__all__ = ["Hessians", "check_formats", "check_hessian", "gptq"]

Hessians = Mapping[str, Mapping[str, Tensor]]

# Columns that are rounded one by one before what follows is made up for by a matrix product.
BLOCK = 64
# Bytes of experts in work at a time.
HELD_BYTES = {"cpu": 2**30, "cuda": 2**33}
# Copies of a Hessian and of a weight that an expert in work takes, in fp32.
COPIES = 8
# How far a Hessian may be from its transpose, beside its largest number: sums in fp32 in two orders.
ASYMMETRY = 2.0**-10
# Where a Hessian has no Cholesky factor, ten times the damping is tried, from the one on, up to the other.
LEAST_DAMPING, MOST_DAMPING = 1e-4, 0.1


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
        shrinkage: What the layer knows counts as shrinkage * in tokens, beside those that an expert saw.
        order: "activation" rounds the columns with the largest inputs first; scales stay where they are.

    Returns:
        As `params`, with new tensors of the same dtypes for what the spec names.

    Raises:
        KeyError: Hessians lack a group.
        ValueError: A Hessian is not finite, symmetric and positive semidefinite, or is zero; dynamic NVFP4; DTensors.

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
    refuse_transforms("gptq", "move the weights before")
    refuse_compiled("gptq", "move the weights before")
    _check_options(damping, shrinkage, order)
    check_state(state, fq.spec)
    _check_hessians(fq, params, hessians)
    families: dict[tuple[int, int], list[Group]] = {}  # roles that share their inputs share the factor too
    for group in fq.spec.groups:
        leaves = hessians[group.key]
        families.setdefault((id(leaves["hessian"]), id(leaves["tokens"])), []).append(group)
    moved: dict[str, Tensor] = {}
    for groups in progress(list(families.values()), "GPTQ"):
        roles = [_Role(group, weights_of(params, group), state[group.key]) for group in groups]
        leaves = hessians[groups[0].key]
        with torch.autocast(leaves["hessian"].device.type, enabled=False):  # which would round an average to bf16
            _move(roles, leaves, damping, shrinkage, order)
        for role in roles:
            if role.kept:
                warnings.warn(
                    f"gptq: {role.group.key!r}: rounded expert {ranges(role.kept)} of {role.group.experts} to the "
                    "nearest, which has no larger error",
                    stacklevel=3,  # beyond no_grad's wrapper
                )
            moved |= zip(role.group.names, role.moved, strict=True)
    return dict(params) | moved


def _check_options(damping: Any, shrinkage: Any, order: Any) -> None:
    for name, value in (("damping", damping), ("shrinkage", shrinkage)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}: found {value!r}, wanted a number, 0 or more")
    if order not in (None, "activation"):
        raise ValueError(f"order: found {order!r}, wanted None or 'activation'")


def check_formats(spec: Spec) -> None:
    """Raise ValueError for a group whose scales follow the weights as they move."""
    for group in spec.groups:
        if group.format.dynamic and not group.format.is_stateless:
            raise ValueError(
                f"gptq: found {group.format.name} for group {group.key!r}, whose scales follow the weights as they "
                f"move, wanted {static_format(group.format).name}"
            )


def _check_hessians(fq: "Transform", params: Mapping[str, Tensor], hessians: Hessians) -> None:
    """Raise unless there is a usable Hessian of each group, on the device of its weights. Each is read once."""
    if not isinstance(hessians, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"hessians: found {type(hessians).__name__}, wanted a dict by group, as of input_hessians")
    keys = {group.key for group in fq.spec.groups}
    if missing := sorted(keys - hessians.keys()):
        raise KeyError(f"hessians: found none of group {missing[0]!r}, {len(missing)} of {len(keys)} missing")
    if unexpected := sorted(hessians.keys() - keys):
        raise ValueError(
            f"hessians: found unexpected groups {unexpected[:4]}, wanted the spec's, such as {min(keys)!r}"
        )
    checked: set[int] = set()
    check_formats(fq.spec)
    for group in fq.spec.groups:
        weights = weights_of(params, group)
        if is_sharded(weights[0]):
            raise ValueError(f"gptq: found the DTensor {group.names[0]!r}, wanted plain tensors: whole experts")
        if weights[0].is_meta:
            raise ValueError(f"parameter {group.names[0]!r}: found on meta, wanted values; load the weights")
        check_hessian(group, hessians[group.key], weights[0].device, checked)


def check_hessian(group: Group, leaves: Mapping[str, Tensor], device: torch.device, checked: set[int]) -> None:
    """Raise ValueError unless these are usable Hessians of a group; `checked` has the ids of those read before."""
    what, side = f"hessians {group.key!r}", group.shape[1]
    if not isinstance(leaves, Mapping) or set(leaves) != {"hessian", "tokens"}:  # pyright: ignore[reportUnnecessaryIsInstance]
        found = list(leaves) if isinstance(leaves, Mapping) else type(leaves).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{what}: found {found}, wanted 'hessian' and 'tokens', as of input_hessians")
    check_tensor(f"{what}.hessian", leaves["hessian"], (group.experts, side, side), torch.float32)
    check_readable(f"{what}.tokens", leaves["tokens"])
    check_tensor(f"{what}.tokens", leaves["tokens"], (group.experts,), leaves["tokens"].dtype)
    check_device(group, leaves, device)
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


class _Role:
    """A group in work.

    Attributes:
        group: Which.
        old: Its experts' weights, [out, in] each.
        scales: Its state.
        moved: The result, in the shapes of its parameters.
        new: Its experts' matrices.
        kept: Experts that were rounded to the nearest for want of better.
    """

    def __init__(self, group: Group, weights: Sequence[Tensor], scales: Mapping[str, Tensor]) -> None:
        self.group, self.scales = group, scales
        self.moved = [torch.empty_like(one.detach(), memory_format=torch.contiguous_format) for one in weights]
        self.old, self.new = (list(each_expert(some, group.transposed)) for some in (weights, self.moved))
        self.kept: list[int] = []


def _move(
    roles: Sequence[_Role], leaves: Mapping[str, Tensor], damping: float, shrinkage: float, order: str | None
) -> None:
    """Find the weights of roles that share their inputs, some experts at a time."""
    hessian, side = leaves["hessian"], leaves["hessian"].shape[-1]
    size = side + sum(role.group.shape[0] for role in roles)
    shrink = _Shrinkage(hessian, leaves["tokens"], shrinkage * side)
    for first, own in _chunks(hessian, 4 * COPIES * side * size):
        part = slice(first, first + len(own))
        shrunk = shrink(part)
        columns = None
        if order is not None:
            columns = shrunk.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
            shrunk = _taken(_taken(shrunk, columns, 1), columns, 2)
        factor = _factor(shrunk, damping, roles[0].group, first)
        del shrunk
        for role in roles:
            _move_some(role, part, own, factor, columns)


def _move_some(role: _Role, part: slice, hessian: Tensor, factor: Tensor, columns: Tensor | None) -> None:
    """Some experts of a role."""
    format, old = role.group.format, role.old[part]
    weight = torch.stack(old).float()
    amax, global_amax = (role.scales[name][part] if name in role.scales else None for name in ("amax", "global_amax"))
    errors = _errors(weight, factor, amax, global_amax, columns, format)
    (nearest,) = fake_quantize([weight], amax, global_amax, format=format)
    nearest = weight - nearest
    change = _change(errors, nearest, hessian)
    is_better = change < 0  # False for NaN
    is_kept = (change >= 0) & (errors != nearest).flatten(1).any(1)
    role.kept += [part.start + e for e in is_kept.nonzero().flatten().tolist()]
    # A weight less its error is a value of the format, but for the rounding of the difference.
    found = weight - errors
    if format.is_stateless:
        found = on_grid_of(weight, found, format)
    found = torch.where(is_better[:, None, None], found, weight)
    (found,) = fake_quantize([found], amax, global_amax, format=format, out_dtype=old[0].dtype)
    for to, one in zip(role.new[part], found, strict=True):
        to.copy_(one)


class _Shrinkage:
    """Hessians of a layer, each drawn toward what the layer knows: (n H + k T) / (n + k), n its tokens.

    T = rho * A + (1 - rho) * D. A is the layer's average, over all its tokens, and D the expert's own diagonal, both
    drawn toward a multiple of the identity by k tokens likewise. rho, within [0, 1], says how well other experts tell
    what is off the diagonal of one: the slope of a regression of its numbers on those of their average. Inputs of gate
    and up are of one kind, so it is near 1; channels of down's have nothing in common but their number: near 0.
    """

    def __init__(self, hessian: Tensor, tokens: Tensor, prior: float) -> None:
        tokens = tokens.to(hessian.device).double()
        total = tokens.sum()
        self._hessian, self._prior = hessian, prior
        self._tokens, self._share = tokens, torch.where(tokens > 0, prior / (prior + tokens).clamp(min=1e-30), 0.0)
        self._average = torch.einsum("e,eij->ij", (tokens / total.clamp(min=1)).float(), hessian)
        self._rho = _slope(hessian, self._average, tokens) if prior else 0.0
        mean = self._average.diagonal().mean()
        self._average *= float(total / (total + prior).clamp(min=1))
        self._average.diagonal().add_(mean * float(prior / (total + prior).clamp(min=1)))

    def __call__(self, part: slice) -> Tensor:
        """Some of them."""
        own, n, share = self._hessian[part], self._tokens[part, None], self._share[part, None].float()
        diagonal = own.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        diagonal = ((n * diagonal + self._prior * mean) / (n + self._prior).clamp(min=1e-30)).float()
        shrunk = torch.lerp(own, self._rho * self._average, share[:, None])
        shrunk.diagonal(dim1=1, dim2=2).add_(share * (1 - self._rho) * diagonal)
        return shrunk


def _slope(hessian: Tensor, average: Tensor, tokens: Tensor) -> float:
    """Of a regression of what is off the diagonals on the same of the average of the others, by tokens."""
    total, rest = tokens.sum(), tokens.sum() - tokens
    square = _product(average, average)
    beside = torch.cat([_product(some, average) for _, some in _chunks(hessian, 8 * hessian[0].nbytes)])
    own = torch.cat([_product(some, some) for _, some in _chunks(hessian, 8 * hessian[0].nbytes)])
    with_rest = total * beside - tokens * own  # times what is left of the tokens
    of_rest = total**2 * square - 2 * total * tokens * beside + tokens**2 * own  # times its square
    counts = (tokens > 0) & (rest > 0)
    over = torch.where(counts, tokens / rest.clamp(min=1), 0.0)
    slope = float((over * with_rest).sum() / (over * of_rest / rest.clamp(min=1)).sum())
    return min(max(slope, 0.0), 1.0) if isfinite(slope) else 0.0


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products of what is off the diagonals of [..., in, in]."""
    products = one.double() * other.double()  # whose squares are beyond fp32 where the inputs are large
    return products.sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)


def _change(errors: Tensor, nearest: Tensor, hessian: Tensor) -> Tensor:
    """tr(a H a^T) - tr(b H b^T) of each expert, a the errors and b those by rounding to the nearest, in float64.

    It is tr((a - b) H (a + b)^T), as H is symmetric: one product in place of two.
    """
    symmetric = hessian.double().add_(hessian.mT)  # and twice as large
    product = (errors.double() - nearest) @ symmetric
    return product.mul_(errors.double() + nearest).sum((1, 2)) / 2


def _errors(
    weight: Tensor,
    factor: Tensor,
    amax: Tensor | None,
    global_amax: Tensor | None,
    columns: Tensor | None,
    format: Format,
) -> Tensor:
    """What some experts' weights are off by, w - q, [E, out, in]."""
    if format.is_stateless:
        amax = block_amax(weight, format)
    assert amax is not None
    places = columns
    if places is None:
        places = torch.arange(weight.shape[-1], device=weight.device).expand(len(weight), -1)
    else:
        weight = _taken(weight, places, 2)
    errors = torch.empty_like(weight)
    for first in range(0, weight.shape[-1], BLOCK):
        block = slice(first, min(first + BLOCK, weight.shape[-1]))
        target = weight[..., block].contiguous()
        if first:
            target.baddbmm_(errors[..., :first], factor[:, :first, block])
        if has_kernel([weight]):
            from fq_transforms.ops.gptq.launch import gptq_block_triton

            gptq_block_triton(target, weight, errors, factor, amax, global_amax, places, first, format=format)
            continue
        numbers = (factor[:, block, block], amax, global_amax, places[:, block])
        errors[..., block] = gptq_block_reference(target, weight[..., block], *numbers, format=format)
    return errors if columns is None else _taken(errors, columns.argsort(dim=1), 2)


def _taken(tensor: Tensor, columns: Tensor, dim: int) -> Tensor:
    """The rows or columns of each expert's matrix in another order."""
    index = columns[:, :, None] if dim == 1 else columns[:, None, :]
    return tensor.gather(dim, index.expand(tensor.shape))


def _factor(hessian: Tensor, damping: float, group: Group, first: int) -> Tensor:
    """R_ij / R_jj of each expert, where H + damping = R R^T and R is upper triangular; the first is expert `first`.

    A Hessian of fewer tokens than inputs is singular; if fp32 has no factor of it, it is damped further.
    """
    flipped = hessian.flip(1, 2)
    means = hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)

    def factored(experts: Tensor | slice) -> tuple[Tensor, Tensor]:
        damped = flipped[experts].clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping * means[experts])
        return torch.linalg.cholesky_ex(damped)

    lower, failed = factored(slice(None))
    singular = left = failed.nonzero().flatten()
    while len(left):
        damping = max(10 * damping, LEAST_DAMPING)
        if damping > MOST_DAMPING:
            e = first + int(left[0])
            raise ValueError(
                f"hessians {group.key!r}: found one that is not positive definite for expert {e}, "
                f"{group.expert_name(e)!r}, wanted means of x x^T"
            )
        lower[left], failed = factored(left)
        left = left[failed != 0]
    if len(singular):
        warnings.warn(
            f"gptq: {group.key!r}: found singular Hessians of expert {ranges((first + singular).tolist())}, damped by "
            f"up to {damping:g} of their mean diagonal",
            stacklevel=5,
        )
    upper = lower.flip(1, 2)  # whose strides are the library's
    return torch.div(upper, upper.diagonal(dim1=1, dim2=2)[:, None, :], out=flipped)
