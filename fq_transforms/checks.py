"""What the public door checks, once: the weights of a group, a state and its leaves, and options."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fq_transforms.dtensor import (
    Layout,
    check_leaf,
    is_sharded,
    local_tensors,
    local_values,
    position,
    spread_in_words,
    spread_of,
)
from fq_transforms.ops.launch import Bounded, Contiguous
from fq_transforms.ops.private import Guards, is_functorch_active, is_mapped, unwrapped
from fq_transforms.spec import Group, Inputs, Spec, ranges

__all__ = [
    "DTYPES",
    "UNCALIBRATED",
    "LeafType",
    "check_device",
    "check_dtype",
    "check_is_tensor",
    "check_readable",
    "check_same_leaves",
    "check_same_spread",
    "check_state",
    "check_tensor",
    "is_concrete",
    "is_read",
    "leaf_types",
    "local_group",
    "plain_weights_of",
    "types_of",
    "weights_of",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LeafType: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # a leaf's shape and dtype
_DTYPES = {"tokens": torch.float64}  # of leaves that are not fp32

# The identity of max; as an amax it is invalid, so that a state that was never calibrated cannot pass for one of zeros.
UNCALIBRATED = -torch.inf


def weights_of(params: Mapping[str, Tensor], group: Group) -> list[Tensor]:
    """The parameters of a group, checked against the spec.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape is not the spec's, a dtype is not bf16, fp16 or fp32, or dtypes, devices, plain tensors and
            DTensors, or the placements of DTensors are mixed; a DTensor under torch.compile.
    """
    try:
        weights = [params[name] for name in group.names]
    except TypeError as error:
        raise ValueError(
            f"params: found {type(params).__name__}, wanted names to tensors, such as dict(model.named_parameters())"
        ) from error
    except KeyError as error:
        raise KeyError(
            f"parameter {error.args[0]!r} of group {group.key!r} is not in params ({len(params)} entries)"
        ) from error
    if torch.compiler.is_compiling():
        _check_weights(group, weights, weights)
    elif is_functorch_active():
        _check_weights(group, weights, [unwrapped(weight) for weight in weights])
    else:
        known = _CHECKED.get(id(group))
        if known is None or known.group is not group or not known.guards.match(weights):
            _check_weights(group, weights, weights)
            if is_sharded(weights[0]):
                return weights
            known = _Checked(group, Guards(weights), all(map(Tensor.is_contiguous, weights)))
            _CHECKED[id(group)] = known
        elif (
            weights[0].is_cpu and is_concrete(weights[0]) and not all(map(Tensor.data_ptr, weights))
        ):  # elsewhere a launch looks at addresses
            _check_weights(group, weights, weights)
        return Contiguous(weights) if known.are_contiguous else weights
    return weights


class _Checked(NamedTuple):
    """What a group's weights were when they were last right: others like them are, too."""

    group: Group
    guards: Guards
    are_contiguous: bool


# To compare weights with it takes one call; to check them in Python took a fifth of a call to `fakequant`.
_CHECKED: Bounded[int, _Checked] = Bounded(16384)


def _check_weights(group: Group, weights: Sequence[Tensor], inner: Sequence[Tensor]) -> None:
    """Raise unless the weights fit the spec; `inner` are they without the wrappers of torch.func."""
    for name, tensor in zip(group.names, inner, strict=True):
        check_is_tensor(f"parameter {name!r}", tensor)
    shape, dtype, device = group.parameter_shape, weights[0].dtype, weights[0].device
    n = len(weights)  # counted in C: a group may have hundreds of parameters
    if (
        dtype in DTYPES
        and all(kind in (Tensor, torch.nn.Parameter) for kind in {type(w) for w in inner})
        and [w.shape for w in weights].count(shape) == n  # pyright: ignore[reportArgumentType] (a Size is a tuple)
        and [w.dtype for w in weights].count(dtype) == n
        and [w.device for w in weights].count(device) == n
        and (torch.compiler.is_compiling() or all(map(_is_plain, inner)))
    ):
        return
    for name, weight, tensor in zip(group.names, weights, inner, strict=True):
        check_readable(f"parameter {name!r}", tensor)
        _check_spread(name, tensor, group.names[0], inner[0])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"parameter {name!r}: found shape {tuple(weight.shape)}, the spec wants {shape}; "
                "select again if the model has changed"
            )
        check_dtype(name, weight)
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(
                f"parameter {name!r}: found {weight.dtype} on {weight.device}, wanted {dtype} on {device} as "
                f"{group.names[0]!r} in the same group"
            )


def check_device(group: Group, scales: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ValueError unless a group's state is on the device of its weights."""
    for leaf in scales.values():
        if leaf.device != device:
            raise ValueError(
                f"state {group.key!r}: found on {leaf.device}, wanted on {device} as its weights; "
                "move it with optree.tree_map(lambda leaf: leaf.to(device), state)"
            )


def check_dtype(name: str, weight: Tensor) -> None:
    """Raise ValueError unless a parameter is bf16, fp16 or fp32."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"parameter {name!r}: found {weight.dtype}, wanted bfloat16, float16 or float32{_if_packed(weight.dtype)}"
        )


def _if_packed(dtype: torch.dtype) -> str:
    """What to do about weights of a dtype that only codes have."""
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1):
        return ""
    return (
        "; of a folder that is quantized already make one of weights first, by "
        "fqt.export.folder(folder, out, layout='plain'), or load it by from_pretrained(..., dequantize=True) of "
        "transformers' config for its method"
    )


# Subclasses that are seen through: shards, and what stands for tensors while a program is traced.
_SEEN_THROUGH = ("DTensor", "FakeTensor", "FunctionalTensor")


def check_is_tensor(what: str, tensor: Any) -> None:
    """Raise ValueError, beginning with `what`, for what is no tensor, or one that has no shape yet."""
    if not _is_tensor(tensor):
        kind = type(tensor)
        if isinstance(tensor, Tensor):
            raise ValueError(f"{what}: found {kind.__name__}, wanted values; run the lazy module once first")
        hint = ": pass torch.from_numpy(array)" if isinstance(tensor, np.ndarray) else ""
        raise ValueError(f"{what}: found {kind.__name__}, wanted a tensor{hint}")


def check_readable(what: str, tensor: Any) -> None:
    """Raise ValueError, beginning with `what`, unless a tensor's values lie in its memory as its strides say."""
    check_is_tensor(what, tensor)
    kind = type(tensor)
    if _sees_its_own_functions(kind) or tensor.is_nested:
        raise ValueError(
            f"{what}: found {kind.__module__}.{kind.__name__}, which has functions of its own, wanted a plain tensor: "
            "dequantize() it, or unwrap it as its library says, or leave it out with a rule to None"
        )
    if torch.compiler.is_compiling():
        return
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what}: found {tensor.layout}, wanted a dense tensor; call to_dense() first")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            f"{what}: found a lazily negated or conjugated view, wanted its values in memory; call resolve_neg() or "
            "resolve_conj() first"
        )
    here = local_values(tensor)
    if here is not tensor:
        check_readable(f"{what}, shard", here)
    elif _is_in_memory(tensor) and (wanted := _bytes_of(tensor)) > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{what}: found memory of {tensor.untyped_storage().nbytes()} bytes, wanted {wanted} for "
            f"{tuple(tensor.shape)} of {tensor.dtype}: it was freed, as by FSDP; gather it first"
        )


def _is_tensor(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def _sees_its_own_functions(kind: Any) -> bool:
    """True for subclasses that compute in ways of their own, as wrappers of codes do, or make results of their kind."""
    if kind in (Tensor, torch.nn.Parameter) or any(base.__name__ in _SEEN_THROUGH for base in kind.__mro__):
        return False
    plain: Any = torch.nn.Parameter
    return kind.__torch_dispatch__ != plain.__torch_dispatch__ or kind.__torch_function__ != plain.__torch_function__


def _is_plain(tensor: Tensor) -> bool:
    """`check_readable`, in short, of a tensor or a parameter that is no subclass."""
    is_lazy = tensor.is_neg() or tensor.is_conj() or tensor.is_nested or tensor.layout is not torch.strided
    return not is_lazy and (not _is_in_memory(tensor) or _bytes_of(tensor) <= tensor.untyped_storage().nbytes())


def _is_in_memory(tensor: Tensor) -> bool:
    """False on meta, while a program is traced, and for wrappers of torch.func."""
    return is_concrete(tensor) and not is_functorch_active() and type(tensor).__name__ != "FunctionalTensor"


def _bytes_of(tensor: Tensor) -> int:
    """Bytes of storage up to a tensor's last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _check_spread(name: str, weight: Tensor, first_name: str, first: Tensor) -> None:
    # Asked of the type: while torch.compile traces, a DTensor itself says that it has no such method.
    if torch.compiler.is_compiling():
        if hasattr(type(weight), "to_local"):
            raise ValueError(f"parameter {name!r}: found a DTensor under torch.compile, wanted a plain tensor")
        return
    found, wanted = spread_of(weight), spread_of(first)
    if found != wanted:
        raise ValueError(
            f"parameter {name!r}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)} as "
            f"{first_name!r} in the same group"
        )


def plain_weights_of(params: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """`weights_of`, refusing DTensors: their placements do not say whose inputs a rank sees."""
    weights = weights_of(params, inputs)
    if is_sharded(weights[0]):
        raise ValueError(
            f"inputs {inputs.key!r}: found the DTensor {inputs.names[0]!r}, wanted plain tensors, of which each "
            "rank has its own; inputs of DTensors are not observed"
        )
    return weights


def leaf_types(group: Group) -> dict[str, LeafType]:
    """Shape and dtype of each leaf of a group's state, by name."""
    return {name: (shape, _DTYPES.get(name, torch.float32)) for name, shape in group.leaf_shapes.items()}


def local_group(
    group: Group, layout: Layout | None, weights: Sequence[Tensor], scales: Mapping[str, Tensor]
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """This rank's shards of a group's weights and of its state, once the state is placed as the weights are."""
    for name, leaf in scales.items():
        check_leaf(f"{group.key}.{name}", leaf, layout, name)
    assert layout is not None
    leaves = {name: local_tensors(layout, [leaf], name)[0] for name, leaf in scales.items()}
    return local_tensors(layout, weights), leaves


def check_state(
    state: Mapping[str, Mapping[str, Tensor]], spec: Spec, *, values: bool | Callable[[Tensor], bool] = True
) -> None:
    """Raise unless the state fits the spec and, with `values`, every amax is finite and not negative.

    `values` may be a function that says of which leaves the values are read. Reading values waits for the device.
    `fakequant` reads them on the CPU only; elsewhere an invalid amax makes the weights that it scales NaN, and this
    function says which it was.

    Raises:
        KeyError: A group is missing.
        ValueError: A group is unexpected, has other leaves, or leaves of another shape or dtype, or an amax is NaN,
            infinite or negative.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> spec = Spec((Group("w", ("w",), FP8, 1, (8, 4)),))
        >>> check_state({"w": {"amax": torch.tensor([-1.0])}}, spec)
        Traceback (most recent call last):
        ...
        ValueError: state 'w.amax': found -1.0 for 'w', wanted a finite amax >= 0; calibrate again
    """
    groups = spec.all_groups
    if len(state) != len(groups):
        _check_expected(state, groups)
    for group in groups:
        found: Any = state.get(group.key)
        if found is None:
            _check_expected(state, groups)
            others = ", or leave out its inputs: dataclasses.replace(spec, inputs=())" if group in spec.inputs else ""
            raise KeyError(
                f"group {group.key!r} is not in the state ({len(state)} groups); calibrate with this spec{others}"
            )
        wanted = group.leaf_shapes
        if type(found) is not dict and not isinstance(found, Mapping):
            raise ValueError(f"state {group.key!r}: found {type(found).__name__}, wanted a dict of {list(wanted)}")
        if found.keys() != wanted.keys():
            raise ValueError(
                f"state {group.key!r}: found leaves {list(found)}, and {group.format.name} wants {list(wanted)}; "
                "calibrate with this spec"
            )
        for name, shape in wanted.items():
            leaf, dtype = found[name], _DTYPES.get(name, torch.float32)
            if type(leaf) is not Tensor or leaf.shape != shape or leaf.dtype != dtype or not _is_dense(leaf):
                check_tensor(f"state '{group.key}.{name}'", leaf, shape, dtype)
            if values(leaf) if callable(values) else values:
                _check_values(f"{group.key}.{name}", leaf, group)


def _is_dense(leaf: Tensor) -> bool:
    """`check_readable`, in short, of a plain tensor."""
    if torch.compiler.is_compiling():
        return True
    if leaf.layout is not torch.strided or leaf.is_neg() or leaf.is_nested:
        return False
    return leaf.is_meta or is_functorch_active() or leaf.data_ptr() != 0


def _check_expected(state: Mapping[str, Any], groups: Sequence[Group]) -> None:
    unexpected = state.keys() - {group.key for group in groups}
    if unexpected:
        more = f" and {len(unexpected) - 4} more" if len(unexpected) > 4 else ""
        raise ValueError(
            f"state has unexpected groups: {sorted(unexpected)[:4]}{more}; calibrate with this spec, or leave them "
            "out; if these are parameters, give those first and the state behind them"
        )


def check_same_leaves(where: str, found: Mapping[str, Tensor], wanted: Mapping[str, LeafType]) -> None:
    """Raise ValueError, naming the leaf, unless `found` has exactly the wanted names, shapes and dtypes."""
    for kind, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{where}: {kind} {len(names)} of {len(wanted)} leaves: {sorted(names)[:4]}")
    for name, (shape, dtype) in wanted.items():
        check_tensor(f"{where}: leaf {name!r}", found[name], shape, dtype)


def check_same_spread(what: str, leaf: Tensor, like: Tensor) -> None:
    """Raise ValueError unless two leaves are both plain, or DTensors placed alike."""
    found, wanted = spread_of(leaf), spread_of(like)
    if found != wanted:
        raise ValueError(f"{what}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)}")


def check_tensor(what: str, leaf: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError, beginning with `what`, unless a leaf is a tensor of that shape and dtype."""
    check_readable(what, leaf)
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        raise ValueError(f"{what}: found {tuple(leaf.shape)} {leaf.dtype}, wanted {shape} {dtype}")


def types_of(leaves: Mapping[str, Tensor]) -> dict[str, LeafType]:
    """Shape and dtype of each leaf that is there."""
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}


def refuse_transforms(verb: str, instead: str) -> None:
    """Raise ValueError under a transform of torch.func, which this verb has no rule for."""
    if is_functorch_active():
        raise ValueError(f"{verb}: found a transform of torch.func, wanted none; {instead}")


def refuse_compiled(verb: str, instead: str) -> None:
    """Raise ValueError in what torch.compile or torch.export traces: this verb reads values, or makes parameters."""
    if torch.compiler.is_compiling():
        raise ValueError(f"{verb}: found torch.compile or torch.export, wanted eager mode; {instead}")


def is_concrete(tensor: Tensor) -> bool:
    """True if values can be read here and now: not on meta, not being traced, not batched by vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return False
    return not is_mapped(tensor)


def is_read(leaf: Tensor) -> bool:
    """True for leaves whose values `fakequant` and `pack` check: reading them elsewhere would wait for a device."""
    return leaf.is_cpu and is_concrete(leaf)


def _check_values(name: str, leaf: Tensor, group: Group) -> None:
    if leaf.is_meta:
        raise ValueError(f"state {name!r}: found a meta tensor, which has no values to check; pass values=False")
    here = local_values(leaf)
    invalid = ~((here >= 0) & (here < torch.inf))
    if not bool(invalid.any()):
        return
    first: list[int] = invalid.nonzero()[0].tolist()
    if isinstance(group, Inputs):
        raise ValueError(f"state {name!r}: {_wrong_input(name, here, invalid, group)}")
    value, index = here[tuple(first)].item(), position(leaf, first)
    advice = "it was never calibrated; call calibrate" if value == UNCALIBRATED else "calibrate again"
    at = f" at {index[1:]}" if len(index) > 1 else ""
    raise ValueError(
        f"state {name!r}: found {value} for {group.expert_name(index[0])!r}{at}, wanted a finite amax >= 0; {advice}"
    )


def _wrong_input(name: str, leaf: Tensor, invalid: Tensor, inputs: Inputs) -> str:
    numbers: list[int] = invalid.nonzero().flatten().tolist()
    value = leaf[numbers[0]].item()
    of = f"expert {ranges(numbers)} of {inputs.experts}" if len(leaf) == inputs.experts else "all experts"
    if name.endswith(".tokens"):
        return f"found {value} for {of}, wanted counts >= 0; calibrate again"
    if value == UNCALIBRATED:
        return (
            f"found no token for {of}, wanted an input for each; calibrate with more batches, or choose by "
            "fq.fill_unseen(state, unseen=...)"
        )
    return f"found {value} for {of}, wanted a finite amax >= 0; calibrate again"
