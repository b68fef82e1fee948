"""The weights of a group, checked against the spec; what they are under torch.func, and as DTensors."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fq_transforms.ops.known import Known
from fq_transforms.spec import Group

__all__ = [
    "DTYPES",
    "check_dtype",
    "is_mapped",
    "is_sharded",
    "spread_in_words",
    "spread_of",
    "unwrapped",
    "weights_of",
]

functorch: Any = import_module("torch._C._functorch")  # what a wrapped tensor wraps has no public name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weights_of(params: Mapping[str, Tensor], group: Group) -> list[Tensor]:
    """The parameters of a group, checked against the spec.

    Raises:
        KeyError: A parameter is missing.
        ValueError: A shape is not the spec's, a dtype is not bf16, fp16 or fp32, or dtypes, devices, plain tensors and
            DTensors, or the placements of DTensors are mixed; a DTensor under torch.compile.
    """
    try:
        weights = [params[name] for name in group.names]
    except KeyError as error:
        raise KeyError(
            f"parameter {error.args[0]!r} of group {group.key!r} is not in params ({len(params)} entries)"
        ) from error
    if torch.compiler.is_compiling():
        _check_weights(group, weights, weights)
    elif torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage] (it has no public name)
        _check_weights(group, weights, [unwrapped(weight) for weight in weights])
    elif (known := _CHECKED.find(group, weights)) is not None:
        return known
    else:
        _check_weights(group, weights, weights)
        if not is_sharded(weights[0]):
            _CHECKED.remember(group, weights)
    return weights


_CHECKED = Known()


def _check_weights(group: Group, weights: Sequence[Tensor], inner: Sequence[Tensor]) -> None:
    """Raise unless the weights fit the spec; `inner` are they without the wrappers of torch.func."""
    shape, dtype, device = group.parameter_shape, weights[0].dtype, weights[0].device
    n = len(weights)  # counted in C: a group may have hundreds of parameters
    if (
        dtype in DTYPES
        and all(kind in (Tensor, torch.nn.Parameter) for kind in {type(w) for w in inner})
        and [w.shape for w in weights].count(shape) == n  # pyright: ignore[reportArgumentType] (a Size is a tuple)
        and [w.dtype for w in weights].count(dtype) == n
        and [w.device for w in weights].count(device) == n
    ):
        return
    for name, weight, tensor in zip(group.names, weights, inner, strict=True):
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


def check_dtype(name: str, weight: Tensor) -> None:
    """Raise ValueError unless a parameter is bf16, fp16 or fp32."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"parameter {name!r}: found {weight.dtype}, wanted bfloat16, float16 or float32")


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


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func: under vjp a DTensor does not look like one."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_mapped(tensor: Tensor) -> bool:
    """True under torch.func.vmap, if the tensor has a dimension that it maps."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, under torch.func too. torch.compile is given none: `weights_of` refuses them there."""
    # A name that a type has not is dear to ask a tensor for.
    if type(tensor) not in _PLAIN and hasattr(tensor, "to_local"):
        return not torch.compiler.is_compiling()
    if not torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage] (it has no public name)
        return False
    return not torch.compiler.is_compiling() and hasattr(unwrapped(tensor), "to_local")


def spread_of(tensor: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Mesh and placements of a DTensor, None for a plain tensor."""
    inner: Any = tensor if torch.compiler.is_compiling() else unwrapped(tensor)
    return (inner.device_mesh, tuple(inner.placements)) if hasattr(type(inner), "to_local") else None


def spread_in_words(spread: tuple[Any, tuple[Any, ...]] | None) -> str:
    """What `spread_of` found, for a message."""
    return "a plain tensor" if spread is None else f"a DTensor {spread[1]} on {spread[0]}"
