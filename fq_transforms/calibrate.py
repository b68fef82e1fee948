"""Calibration: parameters to state, as a pure function; a method chooses each amax."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward
from fq_transforms.activations.quantize import calibrated_inputs
from fq_transforms.checks import UNCALIBRATED, is_concrete, weights_of
from fq_transforms.dtensor import Layout, is_sharded, layout_of, local_tensors, reduce_leaves, sharded_tensors
from fq_transforms.formats import Format
from fq_transforms.methods import FourOverSix, Max, Method, Mse, Percentile, check_format
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.percentile.autograd import percentile_amax
from fq_transforms.ops.private import is_mapped
from fq_transforms.ops.sweep.autograd import swept_amax
from fq_transforms.ops.sweep.reference import WINDOW_COLUMNS, Search
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State

__all__ = [
    "bar_of",
    "calibrate",
    "check_method",
    "check_statistics",
    "chosen_leaves",
    "importance_of",
    "progress",
    "scale_search",
]

T = TypeVar("T")


def calibrate(
    params: Mapping[str, Tensor],
    batches: Any = None,
    *,
    spec: Spec,
    method: Method,
    statistics: Mapping[str, Tensor] | None = None,
    model: Module | None = None,
    forward: Forward | None = None,
) -> State:
    """`Transform.calibrate`, with the spec and the method of the Transform given one by one and known to be right."""
    check_statistics(method, statistics, spec)
    inputs = calibrated_inputs(params, batches, spec=spec, model=model, forward=forward)
    layouts: list[Layout | None] = []
    held: list[list[Tensor]] = []
    importances: list[Tensor | None] = []
    found: list[dict[str, Tensor]] = []
    for group in spec.groups:
        weights = [weight.detach() for weight in weights_of(params, group)]
        if weights[0].is_meta:
            raise ValueError(
                f"parameter {group.names[0]!r}: found on meta, wanted values; load the weights, those too that "
                "accelerate has offloaded, or call init, which gives the shapes of a state"
            )
        layouts.append(layout_of(group, weights))
        check_whole(method, group, layouts[-1])
        held.append(weights)
        importances.append(importance_of(group, weights, statistics))
        found.append(_local_leaves(group, weights, layouts[-1]))
    _reduce(found, layouts)

    state: State = {}
    largest: list[tuple[Tensor, Group, Sequence[int]]] = []
    groups = list(zip(spec.groups, held, layouts, found, importances, strict=True))
    for group, weights, layout, leaves, importance in progress(groups, bar_of(method)):
        experts = range(group.experts) if layout is None else layout.experts
        # A stateless format keeps no amax, but its weights are held to the same rule: finite.
        most = leaves.get("global_amax", leaves.get("amax"))
        if most is not None and is_concrete(most) and most.numel():
            largest.append((most if most.dim() == 1 else most.flatten(1).amax(1), group, experts))
        chosen = chosen_leaves(method, group, weights, layout, leaves, importance)
        state[group.key] = {
            name: chosen[name] if layout is None else sharded_tensors(layout, [chosen[name]], name)[0]
            for name in group.leaf_shapes
        }
    # Last: ranks may differ in what they find, and none may wait for one that has raised.
    _check_finite(largest)
    return state | inputs


def _local_leaves(group: Group, weights: Sequence[Tensor], layout: Layout | None) -> dict[str, Tensor]:
    """The amax leaves of the weights that this rank holds, by name; of MX formats, too, an amax per expert."""
    if layout is not None:
        if layout.is_empty:
            numbers: dict[str, Any] = {"dtype": torch.float32, "device": weights[0].device}
            shapes = {name: leaf.local_shape for name, leaf in layout.leaves.items()}
            return {name: torch.full(shape, UNCALIBRATED, **numbers) for name, shape in shapes.items()}
        weights = local_tensors(layout, weights)
    amax, global_amax = expert_amax(weights, format=group.format, transposed=group.transposed)
    return {"amax": amax} if global_amax is None else {"amax": amax, "global_amax": global_amax}


def _reduce(found: Sequence[dict[str, Tensor]], layouts: Sequence[Layout | None]) -> None:
    """Replace the leaves of sharded groups by their maxima over the ranks, all together."""
    leaves = [
        (where, name, layout)
        for where, layout in zip(found, layouts, strict=True)
        if layout is not None
        for name in layout.leaves
    ]
    reduced = reduce_leaves([(where[name], layout, name) for where, name, layout in leaves])
    for (where, name, _), leaf in zip(leaves, reduced, strict=True):
        where[name] = leaf


def _check_finite(largest: Sequence[tuple[Tensor, Group, Sequence[int]]]) -> None:
    """Raise ValueError for the first expert whose largest magnitude, [experts] per group, is not finite.

    With each group the numbers of its experts. One wait per device.
    """
    for device in {leaf.device for leaf, _, _ in largest}:
        found = [entry for entry in largest if entry[0].device == device]
        if bool(torch.cat([leaf for leaf, _, _ in found]).isfinite().all()):
            continue
        for leaf, group, experts in found:
            for expert, value in zip(experts, leaf.tolist(), strict=True):
                if not abs(value) < torch.inf:
                    raise ValueError(
                        f"calibrate: weight {group.expert_name(expert)!r} (expert {expert} of {group.key!r}): found "
                        f"the largest magnitude {value}, wanted finite values"
                    )


FOUR = Search("ratios", (1.5,))  # of an amax that becomes 6, the one that becomes 4


def check_method(method: Any, spec: Spec) -> None:
    """Raise ValueError unless a method is one, and fits every format of a spec."""
    if not isinstance(method, Method):
        raise ValueError(f"method: found {method!r}, wanted Max(), Percentile(p), Mse() or FourOverSix()")
    for group in spec.groups:
        check_format(method, group.format, group.key)


def check_statistics(method: Method, statistics: Mapping[str, Tensor] | None, spec: Spec) -> None:
    """Raise unless statistics are for a method that weighs errors by them, and for the groups of a spec.

    Raises:
        KeyError: Statistics lack a group.
        ValueError: They are given to another method, or are of an unexpected group; torch.compile traces a method that
            is not `Max`.
    """
    name = type(method).__name__
    if not isinstance(method, Max) and torch.compiler.is_compiling():
        raise ValueError(f"method {name}: found torch.compile, wanted Max there; calibrate before you compile")
    if statistics is None:
        return
    if not isinstance(method, Mse):
        raise ValueError(f"statistics: found some for {name}, wanted none, or method Mse, which weighs errors by them")
    keys = {group.key for group in spec.groups}
    if missing := sorted(keys - statistics.keys()):
        raise KeyError(f"statistics: found none of group {missing[0]!r}, {len(missing)} of {len(keys)} missing")
    if unexpected := sorted(statistics.keys() - keys):
        raise ValueError(
            f"statistics: found unexpected groups {unexpected[:4]}, wanted the spec's, such as {min(keys)!r}"
        )


def check_whole(method: Method, group: Group, layout: Layout | None) -> None:
    """Raise ValueError if a rank holds only a part of a granule: sums over ranks are not made. On all ranks alike."""
    if layout is None or isinstance(method, Max):
        return
    cut = [axis for axis in layout.leaves["amax"].reduced if layout.mesh.size(axis) > 1]
    if cut:
        raise ValueError(
            f"method {type(method).__name__}: found group {group.key!r} sharded over mesh axis {cut[0]} within "
            f"the granules of {group.format.name}, wanted whole ones on each rank; use Max, or shard the experts"
        )


def importance_of(group: Group, weights: Sequence[Tensor], statistics: Mapping[str, Tensor] | None) -> Tensor | None:
    """Statistics of a group as fp32 [E, in], or block-diagonal [E, in / B, B, B], on the device of its weights.

    Raises:
        ValueError: They are no floats of such a shape, shared or by expert, on the device of the weights; they are
            block-diagonal for a format without blocks along `in`; they are not finite, or no mean squares, or all zero
            for an expert; the weights are DTensors.
    """
    if statistics is None:
        return None
    found: Any = statistics[group.key]
    what, experts, columns = f"statistics {group.key!r}", group.experts, group.shape[1]
    is_tensor = isinstance(found, Tensor)
    text = f"{tuple(found.shape)} {found.dtype}" if is_tensor else type(found).__name__
    shapes: list[tuple[int, ...]] = [(experts, columns), (columns,)]
    wanted = f"floats {shapes[0]} or {shapes[1]}: mean squares of the inputs"
    if group.format.has_blocks_along_in:
        side = group.format.block[1] or 1
        shapes += [(experts, columns // side, side, side), (columns // side, side, side)]
        wanted += f"; or {shapes[2]} or {shapes[3]}: second moments of each block's"
    elif is_tensor and found.dim() > 2:
        wanted += f"; {group.format.name} has no blocks along `in`, whose second moments could be taken"
    if not is_tensor or not found.is_floating_point() or tuple(found.shape) not in shapes:
        raise ValueError(f"{what}: found {text}, wanted {wanted}")
    if is_sharded(weights[0]) or is_sharded(found):
        raise ValueError(
            f"{what}: found DTensors, wanted plain weights and statistics; or calibrate without statistics"
        )
    if found.device != weights[0].device:
        raise ValueError(f"{what}: found on {found.device}, wanted on {weights[0].device} as the weights")
    is_local = found.dim() > 2
    importance = found.detach().float()
    importance = importance if found.dim() in (2, 4) else importance[None]
    if is_concrete(importance):
        squares = importance.diagonal(dim1=-2, dim2=-1).flatten(1) if is_local else importance
        usable = ((squares >= 0) & (squares < torch.inf)).all(-1) & (squares > 0).any(-1)
        if not bool(usable.all()):
            expert = int(usable.logical_not().nonzero()[0])
            row = squares[expert]
            raise ValueError(
                f"{what}: found values from {row.min().item()} to {row.max().item()} for expert {expert}, "
                f"{group.expert_name(expert)!r}, wanted finite ones, at least 0 and not all 0; give an expert without "
                "tokens ones, or the mean of its peers"
            )
        if is_local:
            _check_moments(importance, group, what)
    return importance.expand(experts, *importance.shape[1:])


def _check_moments(moments: Tensor, group: Group, what: str) -> None:
    """Raise ValueError unless blocks [E or 1, in / B, B, B] of good diagonals can be second moments.

    Such blocks are symmetric, and no number is beyond the root of the product of the two on the diagonal in its row and
    column. Both may be off by a part in 128 of that root: bf16 and products in TF32 lose less.
    """
    roots = (moments.diagonal(dim1=-2, dim2=-1) + torch.finfo(torch.float32).tiny).sqrt()  # squares may underflow
    most = roots[..., :, None] * roots[..., None, :]
    slack = most * 2.0**-7
    is_symmetric = (moments - moments.mT).abs() <= slack  # False for NaN, and for infinities
    is_possible = moments.abs() <= most + slack
    is_right = is_symmetric & is_possible
    if bool(is_right.all()):
        return
    expert, block, i, j = map(int, is_right.logical_not().nonzero()[0])
    one, other = moments[expert, block, i, j].item(), moments[expert, block, j, i].item()
    if math.isfinite(one) and math.isfinite(other) and bool(is_possible[expert, block, i, j]):
        found, wanted = f"{one} at ({i}, {j}) and {other} at ({j}, {i})", "symmetric ones"
    else:
        limit = most[expert, block, i, j].item()
        found, wanted = f"{one} at ({i}, {j})", f"at most {limit} there, the root of the two on the diagonal beside it"
    raise ValueError(
        f"{what}: found {found} of block {block} for expert {expert}, {group.expert_name(expert)!r}, wanted {wanted}: "
        "the second moments of a block's inputs"
    )


def chosen_leaves(
    method: Method,
    group: Group,
    weights: Sequence[Tensor],
    layout: Layout | None,
    leaves: dict[str, Tensor],
    importance: Tensor | None,
) -> dict[str, Tensor]:
    """The leaves of a group by name, from those of max on this rank, which are left as they are.

    Raises:
        ValueError: The weights are mapped by vmap.
    """
    if isinstance(method, Max):
        return leaves
    if any(map(is_mapped, weights)):
        raise ValueError(f"method {type(method).__name__}: found weights under torch.func.vmap, wanted Max there")
    amax, global_amax = leaves["amax"], leaves.get("global_amax")
    chosen = dict(leaves)
    if isinstance(method, FourOverSix) and method.e4m3_max != 448:
        assert global_amax is not None
        chosen["global_amax"] = global_amax = global_amax * (448 / method.e4m3_max)
    if layout is not None:
        if layout.is_empty:
            return chosen
        weights = local_tensors(layout, weights)
    options: dict[str, Any] = {"format": group.format, "transposed": group.transposed}
    if isinstance(method, Percentile):
        chosen["amax"] = percentile_amax(weights, amax, percentile=float(method.percentile), **options)
        return chosen
    if isinstance(method, FourOverSix):
        search = FOUR
    elif group.format.scale == "e4m3":
        search = scale_search(group.format, is_weighted=importance is not None)
    else:
        search = Search("ratios", method.ratios)
    chosen["amax"] = swept_amax(weights, amax, global_amax, importance, search=search, **options)
    return chosen


def scale_search(format: Format, *, is_weighted: bool) -> Search:
    """The sweep over scales of a two-level format: the window, where it is sure to have the best of all.

    Example:
        >>> from fq_transforms.formats import NVFP4_STATIC
        >>> scale_search(NVFP4_STATIC, is_weighted=False)
        Search(kind='window', ratios=())
    """
    is_sure = not is_weighted and (format.block[1] or 0) <= WINDOW_COLUMNS
    return Search("window" if is_sure else "scales")


def bar_of(method: Method) -> str:
    """What a bar over groups is called; `Max` is too fast for one."""
    return "" if isinstance(method, Max) else f"calibrate, {type(method).__name__}"


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The same items; unless `what` is empty, with a bar on standard error once a second has passed.

    One item has none: of a folder that is calibrated group by group there would be thousands. A bar within another goes
    when it ends.

    Raises:
        ImportError: tqdm is not installed, and `what` is not empty.
    """
    if not what:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{what} needs tqdm: pip install 'fq_transforms[calibrate]'") from error
    return items if len(items) < 2 else tqdm(items, desc=what, delay=1.0, mininterval=0.5, leave=None)
