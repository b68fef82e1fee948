"""Gradients of fake weights back to what they were made of: `fakequant`'s pullback, without its forward.

A pure form, and one that moves gradients from a model's parameters to its masters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from fq_transforms.checks import DTYPES, check_state, local_group, weights_of
from fq_transforms.distributed import sum_over
from fq_transforms.dtensor import (
    Layout,
    is_sharded,
    layout_of,
    local_values,
    local_vectors,
    sharded_tensors,
    sharded_vectors,
    spread_of,
)
from fq_transforms.masters import Tensors, cast_all, tensors_of
from fq_transforms.ops.launch import Bounded
from fq_transforms.ops.private import Guards, add_all, is_transformed
from fq_transforms.ops.quantize.autograd import Backward, pull_back
from fq_transforms.spec import Group, Spec
from fq_transforms.state import GroupState, State

__all__ = ["pullback", "take_grads"]

Gradients: TypeAlias = Mapping[str, Tensor | None]
StateGradients: TypeAlias = dict[str, dict[str, Tensor | None]]


def pullback(
    masters: Mapping[str, Tensor], state: State, grads: Gradients, *, spec: Spec, backward: Backward
) -> tuple[dict[str, Tensor | None], StateGradients]:
    """`Transform.pullback`, with the options of the Transform given one by one."""
    check_state(state, spec, values=False)
    live = {name: grad for name, grad in grads.items() if grad is not None}
    if len(masters) < len(grads) or not grads.keys() <= masters.keys():
        unknown = next(name for name in grads if name not in masters)
        raise KeyError(f"gradient {unknown!r} is of no master ({len(masters)} entries)")
    are_sharded = _check_grads(masters, live, spec)
    # Masters are leaves, and a graph of theirs would be kept by whatever is added to their `grad`.
    is_differentiated = is_transformed() or any(grad is not None and grad.requires_grad for grad in grads.values())
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_differentiated):
        return _pull(masters, state, grads, spec, backward, are_sharded)


def _pull(
    masters: Mapping[str, Tensor], state: State, grads: Gradients, spec: Spec, backward: Backward, are_sharded: bool
) -> tuple[dict[str, Tensor | None], StateGradients]:
    pulled: dict[str, Tensor | None] = {}
    of_state: StateGradients = {}
    for group in spec.groups:
        weights = weights_of(masters, group)
        passes = backward == "pass_through" or (backward == "clip" and not group.format.clips)
        if passes or group.format.is_stateless:
            of_leaves: dict[str, Tensor | None] = {}
        else:
            vectors = [grads.get(name) for name in group.names]
            of_leaves, vectors = _pull_group(weights, group, state[group.key], vectors, backward)
            pulled.update(zip(group.names, vectors, strict=True))
        if backward == "lsq":
            of_state[group.key] = of_leaves
    passed = {name: grad for name, grad in grads.items() if grad is not None and name not in pulled}
    cast = _cast(list(passed.values()), [masters[name] for name in passed], are_sharded)
    pulled.update(zip(passed, cast, strict=True))
    return {name: pulled.get(name) for name in grads}, of_state


def take_grads(params: Tensors, masters: Mapping[str, Tensor], state: State, *, spec: Spec, backward: Backward) -> None:
    """`Transform.take_grads`, with the options of the Transform given one by one."""
    tensors: Mapping[str, Any] = tensors_of(params)
    taken: dict[str, Tensor | None] = {}
    fused: dict[str, Tensor] = {}
    for name, master in masters.items():
        param = tensors.get(name)
        if param is None:
            raise KeyError(f"parameter {name!r} is not in params ({len(tensors)} entries)")
        if (main := _main_grad(param)) is not None:
            fused[name], taken[name] = main, _fused_gradient(param, main, param is master)
        elif param is not master:
            taken[name] = param.grad
    with torch.no_grad():
        pulled, of_state = pullback(masters, state, taken, spec=spec, backward=backward)
        for name in taken:
            if name not in fused or tensors[name] is not masters[name] or _has_dummy(tensors[name]):
                tensors[name].grad = None
        found = [(masters[name], grad, grad is taken[name], name in fused) for name, grad in pulled.items()]
        found += [
            (state[key][leaf], grad, False, False) for key, leaves in of_state.items() for leaf, grad in leaves.items()
        ]
        _add(found)
        for name, main in fused.items():
            main.zero_()
            if _has_dummy(tensors[name]):
                tensors[name].grad_added_to_main_grad = False


def _check_grads(masters: Mapping[str, Tensor], grads: Mapping[str, Tensor], spec: Spec) -> bool:
    """Raise ValueError unless each gradient fits its master; True if there are DTensors."""
    tensors = [*map(masters.__getitem__, grads), *grads.values()]
    if not torch.compiler.is_compiling() and not is_transformed():
        known = _CHECKED.get(id(spec))
        if known is not None and known[0] is spec and known[1].match(tensors):
            return False
    for name, grad in grads.items():
        _check_grad(name, grad, masters[name])
    are_sharded = any(map(is_sharded, tensors))
    if not torch.compiler.is_compiling() and not is_transformed() and not are_sharded:
        _CHECKED[id(spec)] = (spec, Guards(tensors))
    return are_sharded


# What the gradients of a spec were when they were last right: others like them are, too.
_CHECKED: Bounded[int, tuple[Spec, Guards]] = Bounded(64)


def _check_grad(name: str, grad: Tensor, master: Tensor) -> None:
    if grad.shape != master.shape or grad.device != master.device or grad.dtype not in DTYPES:
        raise ValueError(
            f"gradient {name!r}: found {tuple(grad.shape)} {grad.dtype} on {grad.device}, wanted "
            f"{tuple(master.shape)} of bfloat16, float16 or float32 on {master.device}"
        )
    if is_sharded(grad) != is_sharded(master):
        found, wanted = ("a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (grad, master))
        raise ValueError(f"gradient {name!r}: found {found}, wanted {wanted} as its master is one")


# Pulling back.


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
            (total,) = sum_over(layout.mesh.get_group(axis), [part.double()])
            of_leaf = total.float()
    return None if of_leaf is None else sharded_tensors(layout, [of_leaf], name)[0]


def _cast(grads: Sequence[Tensor], masters: Sequence[Tensor], are_sharded: bool) -> list[Tensor]:
    """Each gradient in its master's dtype, placed as it is: one call for all of a dtype, where nothing looks on."""
    found = list(map(_placed, grads, masters)) if are_sharded else list(grads)
    dtypes = [master.dtype for master in masters]
    if is_transformed() or torch.compiler.is_compiling() or any(grad.requires_grad for grad in found):
        return [grad.to(dtype) for grad, dtype in zip(found, dtypes, strict=True)]
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for i, (grad, dtype) in enumerate(zip(found, dtypes, strict=True)):
        if grad.dtype != dtype:
            found[i] = torch.empty_like(grad, dtype=dtype)
            sources, outs = kinds.setdefault((grad.dtype, dtype, grad.device), ([], []))
            sources.append(grad)
            outs.append(found[i])
    for sources, outs in kinds.values():
        cast_all(sources, outs, are_sharded=are_sharded)
    return found


def _placed(grad: Any, master: Any) -> Tensor:
    wanted = spread_of(master)
    return grad if wanted is None or spread_of(grad) == wanted else grad.redistribute(*wanted)


# Moving.


def _main_grad(param: Any) -> Tensor | None:
    """The memory in which layers with fused accumulation add gradients up."""
    # Of a plain parameter it is an attribute of its own; to ask for one that is not there takes ten times as long.
    return vars(param).get("main_grad") if type(param) is Parameter else getattr(param, "main_grad", None)


def _has_dummy(param: Any) -> bool:
    """True where the layer says that `main_grad` has what `grad` is a dummy of."""
    return getattr(param, "grad_added_to_main_grad", False)


def _fused_gradient(param: Any, main: Tensor, is_master: bool) -> Tensor:
    """What the backward passes have left; of a master only what is not in its `grad` already."""
    return main if param.grad is None or is_master or _has_dummy(param) else main + param.grad


def _add(found: Sequence[tuple[Tensor, Tensor | None, bool, bool]]) -> None:
    """Add gradients to what the tensors have in `grad`: one call for all that have some.

    Args:
        found: Tensors and their gradients; whether the gradient is a parameter's own; whether that is its `main_grad`.
    """
    totals: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, grad, is_moved, is_main in found:
        if grad is None:
            continue
        total = tensor.grad
        if total is None:
            is_borrowed = is_moved and (is_main or not _fills_its_storage(grad))
            tensor.grad = grad.clone() if is_borrowed else grad
        else:
            sums, parts = totals.setdefault((grad.dtype, grad.device), ([], []))
            sums.append(local_values(total))
            parts.append(local_values(_placed(grad, total)))
    for sums, parts in totals.values():
        add_all(sums, parts)


def _fills_its_storage(grad: Tensor) -> bool:
    """False for an expanded tensor, and for a view of a buffer, which its owner fills anew: DDP's buckets."""
    here = local_values(grad)
    return here.untyped_storage().nbytes() == here.numel() * here.element_size()
