"""Gradients of fake weights back to what they were made of: `fakequant`'s pullback, without its forward.

A pure form, and one that moves gradients from a model's parameters to its masters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from fq_transforms.checks import (
    DTYPES,
    check_device,
    check_readable,
    check_state,
    local_group,
    refuse_compiled,
    refuse_transforms,
    weights_of,
)
from fq_transforms.distributed import sum_over
from fq_transforms.dtensor import (
    Layout,
    is_sharded,
    layout_of,
    local_values,
    local_vectors,
    sharded_tensors,
    sharded_vectors,
    spread_in_words,
    spread_of,
)
from fq_transforms.masters import Tensors, cast_all, missing_in_words, tensors_of
from fq_transforms.ops.launch import Bounded, has_kernel, is_traced, results_for, unstacked
from fq_transforms.ops.private import Guards, add_all, is_transformed, may_be_view
from fq_transforms.ops.quantize.autograd import Backward, pull_back
from fq_transforms.spec import Group, Spec
from fq_transforms.state import GroupState, State

__all__ = ["pullback", "take_grads"]

Gradients: TypeAlias = Mapping[str, Tensor | None]
StateGradients: TypeAlias = dict[str, dict[str, Tensor | None]]


def pullback(
    masters: Mapping[str, Tensor],
    state: State,
    grads: Gradients,
    *,
    spec: Spec,
    backward: Backward,
    separate: bool = False,
) -> tuple[dict[str, Tensor | None], StateGradients]:
    """`Transform.pullback`, with the options of the Transform given one by one."""
    if not grads.keys() <= masters.keys():
        unknown = next(name for name in grads if name not in masters)
        raise KeyError(f"gradient {unknown!r} is of no master ({len(masters)} entries)")
    pulled, of_state = _pulled(masters, state, [grads.get(name) for name in masters], spec, backward, separate)
    found = dict(zip(masters, pulled, strict=True))
    return {name: found[name] for name in grads}, of_state


def take_grads(
    params: Tensors,
    masters: Mapping[str, Tensor],
    state: State,
    *,
    spec: Spec,
    backward: Backward,
    separate: bool = False,
    set_to_none: bool = True,
) -> None:
    """`Transform.take_grads`, with the options of the Transform given one by one."""
    refuse_transforms("take_grads", "call pullback, which is pure")
    refuse_compiled("take_grads", "call it between what is compiled, or call pullback")
    tensors: Mapping[str, Any] = tensors_of(params)
    try:
        sources = [tensors[name] for name in masters]
    except KeyError as error:
        raise KeyError(missing_in_words(error.args[0], tensors, "params")) from error
    leaves = list(masters.values())
    fused = _fused(sources)
    taken = _left_behind(masters, sources, fused)
    with torch.no_grad():
        pulled, of_state = _pulled(masters, state, taken, spec, backward, separate)
        given = set[int]()
        for i, grad in enumerate(taken):
            if grad is not None and grad is pulled[i]:
                is_ours = set_to_none and i not in fused and _owns_its_memory(grad)
                address = local_values(grad).data_ptr()
                pulled[i] = grad if is_ours and address not in given else grad.clone()
                given.add(address)
        for i, param in enumerate(sources) if set_to_none else ():
            if param is not leaves[i] or (i in fused and _has_dummy(param)):
                param.grad = None
        _give(leaves, pulled)
        for key, of_leaves in of_state.items():
            _give(list(map(state[key].__getitem__, of_leaves)), list(of_leaves.values()))
        kept = [] if set_to_none else [grad for i, grad in enumerate(taken) if grad is not None and i not in fused]
        for buffer in [*fused.values(), *kept]:
            buffer.zero_()
        for i in fused:
            if _has_dummy(sources[i]):
                sources[i].grad_added_to_main_grad = False


# Checks. Gradients are in the order of the masters, None for those without.


class _Checked(NamedTuple):
    """Masters and gradients of a spec when they were last right: others like them are, too.

    Attributes:
        spec: The spec.
        names: Of the masters.
        are_live: For each whether it has a gradient.
        guards: What the tensors were; None where that is not remembered.
        casts: What is cast, one list per dtype of a gradient and of its master: numbers of those of a group, and
            whether all their masters are contiguous matrices; of what no group has one by one.
        are_sharded: True if there are DTensors.
    """

    spec: Spec
    names: list[str]
    are_live: list[bool]
    guards: Guards | None
    casts: list[list[tuple[list[int], bool]]]
    are_sharded: bool


# To check gradients anew at each step takes the host 2 us per weight, and it has none to spare behind a backward.
_CHECKED: Bounded[int, _Checked] = Bounded(64)


def _checked(masters: Mapping[str, Tensor], grads: Sequence[Tensor | None], spec: Spec) -> _Checked:
    """What follows from masters that fit the spec, and gradients that each fit its master; raises for others."""
    names, are_live = list(masters), [grad is not None for grad in grads]
    tensors = [*masters.values(), *(grad for grad in grads if grad is not None)]
    is_seen = torch.compiler.is_compiling() or is_transformed()
    known = None if is_seen else _CHECKED.get(id(spec))
    if known is not None and known.spec is spec and known.names == names and known.are_live == are_live:
        assert known.guards is not None
        if known.guards.match(tensors):
            return known
    for group in spec.groups:
        weights_of(masters, group)
    group_of = {name: group.key for group in spec.groups for name in group.names}
    casts: dict[object, dict[object, list[int]]] = {}
    for i, (name, grad) in enumerate(zip(names, grads, strict=True)):
        master = masters[name]
        if grad is None:
            continue
        _check_grad(name, grad, master)
        if grad.dtype != master.dtype:
            of_pair = casts.setdefault((grad.dtype, master.dtype), {})
            of_pair.setdefault(group_of.get(name, i), []).append(i)
    are_sharded = any(map(is_sharded, tensors))
    guards = None if is_seen or are_sharded else Guards(tensors)
    lists = [[(one, _are_matrices([tensors[i] for i in one])) for one in each.values()] for each in casts.values()]
    checked = _Checked(spec, names, are_live, guards, lists, are_sharded)
    if guards is not None:
        _CHECKED[id(spec)] = checked
    return checked


def _are_matrices(masters: Sequence[Tensor]) -> bool:
    return all(master.dim() == 2 and not is_sharded(master) and master.is_contiguous() for master in masters)


def _check_grad(name: str, grad: Tensor, master: Tensor) -> None:
    check_readable(f"gradient {name!r}", grad)
    check_readable(f"parameter {name!r}", master)
    if grad.shape != master.shape or grad.device != master.device or grad.dtype not in DTYPES:
        raise ValueError(
            f"gradient {name!r}: found {tuple(grad.shape)} {grad.dtype} on {grad.device}, wanted "
            f"{tuple(master.shape)} of bfloat16, float16 or float32 on {master.device}"
        )
    if is_sharded(grad) != is_sharded(master):
        found, wanted = ("a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (grad, master))
        raise ValueError(f"gradient {name!r}: found {found}, wanted {wanted} as its master is one")


# Pulling back.


def _pulled(
    masters: Mapping[str, Tensor],
    state: State,
    grads: Sequence[Tensor | None],
    spec: Spec,
    backward: Backward,
    separate: bool,
) -> tuple[list[Tensor | None], StateGradients]:
    """`pullback`, of gradients in the order of the masters."""
    check_state(state, spec, values=False)
    checked = _checked(masters, grads, spec)
    # Masters are leaves, and a graph of theirs would be kept by whatever is added to their `grad`.
    is_seen = is_transformed() or (torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads))
    with torch.set_grad_enabled(is_seen):
        pulled, of_state = _pull(masters, state, grads, spec, backward)
        leaves, found = list(masters.values()), list(grads)
        for i in range(len(found)) if checked.are_sharded else ():
            if i not in pulled and (grad := found[i]) is not None:
                found[i] = _placed(grad, leaves[i])
        for same_dtypes in checked.casts:
            if is_seen or torch.compiler.is_compiling():
                for i in (i for of_group, _ in same_dtypes for i in of_group if i not in pulled):
                    found[i] = found[i].to(leaves[i].dtype)  # pyright: ignore[reportOptionalMemberAccess] (is there)
            else:
                _cast(leaves, found, same_dtypes, pulled, checked.are_sharded, separate)
    for i, grad in pulled.items():
        found[i] = grad
    return found, of_state


def _pull(
    masters: Mapping[str, Tensor], state: State, grads: Sequence[Tensor | None], spec: Spec, backward: Backward
) -> tuple[dict[int, Tensor | None], StateGradients]:
    """Gradients of the groups whose rule is not the identity, by number, and of the state under "lsq"."""
    pulled: dict[int, Tensor | None] = {}
    of_state: StateGradients = {}
    if backward == "pass_through":
        return pulled, of_state
    place = {name: i for i, name in enumerate(masters)}
    for group in spec.groups:
        of_leaves: dict[str, Tensor | None] = {}
        if not group.format.is_stateless and (group.format.clips or backward == "lsq"):
            places = [place[name] for name in group.names]
            weights = weights_of(masters, group)
            check_device(group, state[group.key], weights[0].device)
            vectors = [grads[i] for i in places]
            of_leaves, vectors = _pull_group(weights, group, state[group.key], vectors, backward)
            pulled.update(zip(places, vectors, strict=True))
        if backward == "lsq":
            of_state[group.key] = of_leaves
    return pulled, of_state


def _pull_group(
    weights: Sequence[Tensor],
    group: Group,
    scales: GroupState,
    grads: Sequence[Tensor | None],
    backward: Backward,
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    """Gradients of a group's leaves, none unless they are learned, and of its weights."""
    layout = layout_of(group, weights)
    if layout is not None or any(map(is_sharded, scales.values())):
        weights, scales = local_group(group, layout, weights, scales)
    local = list(grads) if layout is None else local_vectors(layout, grads)
    if len({grad.dtype for grad in local if grad is not None}) > 1:
        local = [None if grad is None else grad.float() for grad in local]
    of_leaves: dict[str, Tensor | None] = dict.fromkeys(scales)
    if layout is not None and layout.is_empty:
        local = [None if grad is None else grad.to(weights[0].dtype) for grad in local]
    elif any(grad is not None for grad in local):
        amax, global_amax = scales.get("amax"), scales.get("global_amax")
        of_leaves["amax"], of_global, local = pull_back(
            local, weights, amax, global_amax, format=group.format, transposed=group.transposed, backward=backward
        )
        if global_amax is not None:
            of_leaves["global_amax"] = of_global
    pulled = local if layout is None else sharded_vectors(layout, local)
    if backward != "lsq":
        return {}, pulled
    if layout is not None:
        of_leaves = {name: _summed(layout, name, of_leaves[name], scales[name]) for name in scales}
    return of_leaves, pulled


def _summed(layout: Layout, name: str, of_leaf: Tensor | None, leaf: Tensor) -> Tensor | None:
    """A leaf's gradient, of whose granules ranks may hold parts: then the sum over them, in which all take part."""
    for axis in layout.leaves[name].reduced:
        if layout.mesh.size(axis) > 1:
            part = torch.zeros_like(leaf) if of_leaf is None else of_leaf
            found = torch.full((), of_leaf is not None, dtype=torch.float64, device=leaf.device)
            total, count = sum_over(layout.mesh.get_group(axis), [part.double(), found])
            if of_leaf is not None or count.item():  # read only where this rank has none, since it waits for the device
                of_leaf = total.float()
    return None if of_leaf is None else sharded_tensors(layout, [of_leaf], name)[0]


def _cast(
    masters: Sequence[Tensor],
    grads: list[Any],
    same_dtypes: Sequence[tuple[list[int], bool]],
    pulled: Mapping[int, object],
    are_sharded: bool,
    separate: bool,
) -> None:
    """Cast gradients of one dtype to their masters', in the list, but for those that were pulled.

    On a GPU one launch per group of matrices to fp32; all others in one call.
    """
    parts: list[Tensor] = []
    outs: list[Tensor] = []
    for of_group, are_matrices in same_dtypes:
        places = [i for i in of_group if i not in pulled] if pulled else of_group
        like = [masters[i] for i in places]
        some = [grads[i] for i in places]
        if are_matrices and len(like) > 1 and not separate:  # one allocation, as for a group's results
            out = results_for(like, like[0].dtype)
            made: Sequence[Tensor] = unstacked(out, like)
        else:
            out, made = None, list(map(torch.empty_like, like))
        if out is not None and out.dtype == torch.float32 and has_kernel(some) and not is_traced(some):
            from fq_transforms.ops.cast.launch import cast_triton

            cast_triton(out, some)
        else:
            parts += some
            outs += made
        for i, one in zip(places, made, strict=True):
            grads[i] = one
    if parts:
        cast_all(parts, outs, are_sharded=are_sharded)


def _placed(grad: Any, master: Any) -> Tensor:
    wanted = spread_of(master)
    return grad if wanted is None or spread_of(grad) == wanted else grad.redistribute(*wanted)


# Moving.


def _fused(sources: Sequence[Any]) -> dict[int, Tensor]:
    """The memory in which layers with fused accumulation add gradients up, of the parameters that have any."""
    some = range(len(sources))
    # Not within torch.compile, which cannot trace the dict of a parameter, nor where the class itself has a property.
    if not torch.compiler.is_compiling() and not hasattr(Parameter, "main_grad"):
        # Of a plain parameter it is an attribute of its own; to ask for one that is not there takes ten times as long.
        some = [i for i, p in enumerate(sources) if type(p) is not Parameter or "main_grad" in vars(p)]
    return {i: main for i in some if (main := getattr(sources[i], "main_grad", None)) is not None}


def _has_dummy(param: Any) -> bool:
    """True where the layer says that `main_grad` has what `grad` is a dummy of."""
    return getattr(param, "grad_added_to_main_grad", False)


def _left_behind(
    masters: Mapping[str, Tensor], sources: Sequence[Any], fused: Mapping[int, Tensor]
) -> list[Tensor | None]:
    """What the backward passes have left at the parameters, but for what is in the `grad` of a master already."""
    taken: list[Tensor | None] = [
        None if param is master else param.grad for param, master in zip(sources, masters.values(), strict=True)
    ]
    if not fused and all(grad is not None for grad in taken):
        return taken
    for i, (name, master) in enumerate(masters.items()):
        if i in fused:
            taken[i] = _fused_gradient(sources[i], fused[i], sources[i] is master)
        # FSDP2's gathered parameters have no gradient; their shards, which are elsewhere, may have.
        elif taken[i] is None and is_sharded(master) and not is_sharded(sources[i]):
            raise ValueError(
                f"parameter {name!r}: found a plain tensor, wanted {spread_in_words(spread_of(master))} as its "
                "master is placed; give the module itself, whose gathered parameters are resharded first"
            )
    return taken


def _fused_gradient(param: Any, main: Tensor, is_master: bool) -> Tensor:
    """What the backward passes have left; of a master only what is not in its `grad` already."""
    return main if param.grad is None or is_master or _has_dummy(param) else main + param.grad


def _give(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add each gradient to its tensor's: one call for all of a dtype."""
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, grad in zip(tensors, grads, strict=True):
        if grad is None:
            continue
        if (total := tensor.grad) is None:
            tensor.grad = grad
        else:
            totals, parts = kinds.setdefault((total.dtype, total.device), ([], []))
            totals.append(local_values(total))
            parts.append(local_values(_placed(grad, total)))
    for totals, parts in kinds.values():
        add_all(totals, parts)


def _owns_its_memory(grad: Tensor) -> bool:
    """False for an expanded tensor, and for a view of a buffer, which its owner fills anew.

    One of DDP's buckets may be just as large as the one gradient in it.
    """
    here = local_values(grad)
    return not may_be_view(here) and here.untyped_storage().nbytes() == here.numel() * here.element_size()
