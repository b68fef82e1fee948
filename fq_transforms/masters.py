"""Master weights: leaves beside a model's own parameters that an optimizer steps, and how they are written back.

Mixed-precision training has them anyway: fp32 where the model computes in bf16. docs/training.md has the whole loop.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fq_transforms.checks import DTYPES
from fq_transforms.dtensor import is_sharded, local_values, spread_in_words, spread_of
from fq_transforms.ops.launch import Bounded
from fq_transforms.ops.private import Guards, copy_all, is_transformed
from fq_transforms.spec import Spec

if TYPE_CHECKING:
    from fq_transforms.transform import Transform

__all__ = ["Destination", "Tensors", "cast", "check_destinations", "copy_into", "count_up", "masters", "tensors_of"]

Tensors: TypeAlias = Mapping[str, Tensor] | Module


def masters(params: Tensors, *, fq: "Transform | None" = None) -> dict[str, Tensor]:
    """Leaves for an optimizer: of each trained parameter its values in fp32, in memory of its own.

    Args:
        params: Names to parameters, or a module, all of whose parameters are taken, a tied one once. Not yet
            fake-quantized.
        fq: If given, parameters that it does not select and that need no copy, because they are fp32 or frozen, are
            not copied: the same objects.

    Returns:
        A new dict. Trained parameters give fp32 leaves that require a gradient; frozen ones keep their dtype and
        require none. A DTensor gives one placed alike, with no collective.

    Raises:
        ValueError: A trained parameter is not bf16, fp16 or fp32, or is on meta.

    Source: Micikevicius et al. 2018, section 3.1.

    Example:
        >>> params = {"w": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
        >>> masters(params)
        {'w': Parameter containing:
        tensor([1., 1.], requires_grad=True)}
    """
    selected = None if fq is None else {name for group in fq.spec.groups for name in group.names}
    made: dict[str, Tensor] = {}
    for name, param in tensors_of(params, tied=False).items():
        if param.requires_grad and param.dtype not in DTYPES:
            raise ValueError(f"parameter {name!r}: found {param.dtype}, wanted bfloat16, float16 or float32")
        if param.is_meta:
            raise ValueError(f"parameter {name!r}: found it on meta, wanted values; materialize the model first")
        is_kept = param.dtype == torch.float32 or not param.requires_grad
        if selected is not None and name not in selected and is_kept:
            made[name] = param
        else:
            dtype = torch.float32 if param.requires_grad else param.dtype
            copied = param.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            made[name] = Parameter(copied, param.requires_grad)
    return made


def cast(masters: Mapping[str, Tensor], *, out: Tensors) -> dict[str, Tensor]:
    """Write master weights into tensors that are there, rounded to their dtypes, unquantized: for an evaluation.

    Args:
        masters: Names to tensors.
        out: A mapping with at least their names, or a module, whose FSDP2 parts are resharded first. An entry that is
            the master itself is left alone.

    Returns:
        The names of `masters` with the tensors of `out`. Their versions are counted up.

    Raises:
        KeyError: A name is missing in `out`.
        ValueError: As `Transform.fakequant` with `out`. Nothing is written then.

    Example:
        >>> weight = torch.zeros(2, dtype=torch.bfloat16)
        >>> _ = cast({"w": torch.tensor([1.0, 2.0])}, out={"w": weight})
        >>> weight
        tensor([1., 2.], dtype=torch.bfloat16)
    """
    tensors = tensors_of(out)
    targets = check_destinations(masters, tensors)
    copy_into(targets)
    return {name: tensors[name] for name in masters}


def tensors_of(tensors: Tensors, *, tied: bool = True) -> Mapping[str, Tensor]:
    """Names to tensors, of a module its parameters: FSDP2's shards, where it has gathered them too.

    Args:
        tensors: Names to tensors, or a module.
        tied: True for all names that a module has for a parameter, False for the first one.

    NOTE resharding: FSDP2 leaves the parameters of a root gathered after a forward without backward. Whatever is
    written to its shards would be unseen by the next forward.
    """
    if not isinstance(tensors, Module):
        return tensors
    for module in tensors.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # pyright: ignore[reportCallIssue]
    return dict(tensors.named_parameters(remove_duplicate=not tied))


class Destination(NamedTuple):
    """Where a master is written to; `is_master` if it lies there itself."""

    name: str
    master: Tensor
    out: Tensor
    is_master: bool = False


def check_destinations(
    masters: Mapping[str, Tensor], out: Mapping[str, Tensor], spec: Spec | None = None
) -> list[Destination]:
    """What is written where: each master and its tensor in `out`.

    Args:
        masters: Names to tensors.
        out: At least their names.
        spec: Of weights that a kernel writes, which takes contiguous ones only.

    Raises:
        KeyError: A name is missing.
        ValueError: A tensor cannot be written to; see `Transform.fakequant`.
    """
    if is_transformed():
        raise ValueError("out: found a transform of torch.func, wanted none; call fakequant without out")
    outs: list[Any] = []
    for name in masters:
        if (tensor := out.get(name)) is None:
            raise KeyError(f"parameter {name!r} is not in out ({len(out)} entries)")
        outs.append(tensor)
    if torch.compiler.is_compiling():
        return _checked(masters, outs, spec)
    known = _CHECKED.get(id(spec))
    are_same = [tensor is master for tensor, master in zip(outs, masters.values(), strict=True)]
    # Each once: guards match no tensor that comes twice.
    tensors = [*masters.values(), *(tensor for tensor, same in zip(outs, are_same, strict=True) if not same)]
    if known is None or known.spec is not spec or not known.match(list(masters), are_same, tensors):
        found = _checked(masters, outs, spec)
        if any(map(is_sharded, tensors)):
            return found
        known = _CheckedWrite(
            spec, list(masters), are_same, Guards(tensors), _addresses(tensors), _masters_among(found)
        )
        _CHECKED[id(spec)] = known
    return list(map(Destination, masters, masters.values(), outs, known.are_masters))


class _CheckedWrite(NamedTuple):
    """What a write was when it was last right: all that is checked of it follows from these."""

    spec: Spec | None
    names: list[str]
    are_same: list[bool]
    guards: Guards
    addresses: list[int]
    are_masters: list[bool]

    def match(self, names: list[str], are_same: list[bool], tensors: Sequence[Tensor]) -> bool:
        """True if the same tensors, or others that lie where they lay, are written again."""
        return (
            names == self.names
            and are_same == self.are_same
            and self.guards.match(tensors)
            and _addresses(tensors) == self.addresses
        )


# To check a write anew at each step takes the host 12 us per weight, which is more than the device takes to make it.
_CHECKED: Bounded[int, _CheckedWrite] = Bounded(64)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_meta else tensor.data_ptr() for tensor in tensors]


def _masters_among(destinations: Sequence[Destination]) -> list[bool]:
    return [destination.is_master for destination in destinations]


def _checked(masters: Mapping[str, Tensor], outs: Sequence[Any], spec: Spec | None) -> list[Destination]:
    selected = set[str]() if spec is None else {name for group in spec.groups for name in group.names}
    found: list[Destination] = []
    for (name, master), target in zip(masters.items(), outs, strict=True):
        if target is not master:
            _check_target(name, master, target, name in selected)
        found.append(Destination(name, master, target, target is master))
    return found if torch.compiler.is_compiling() else _check_apart(found)


def _check_target(name: str, master: Tensor, target: Any, is_selected: bool) -> None:
    if not isinstance(target, Tensor):
        raise ValueError(f"out {name!r}: found {type(target).__name__}, wanted a tensor")
    if target.shape != master.shape:
        raise ValueError(f"out {name!r}: found shape {tuple(target.shape)}, wanted {tuple(master.shape)}")
    if target.device != master.device:
        raise ValueError(f"out {name!r}: found it on {target.device}, wanted {master.device} as its master")
    if target.dtype not in DTYPES and target.dtype != master.dtype:
        raise ValueError(f"out {name!r}: found {target.dtype}, wanted bfloat16, float16 or float32")
    found, wanted = spread_of(target), spread_of(master)
    if found != wanted:
        raise ValueError(
            f"out {name!r}: found {spread_in_words(found)}, wanted {spread_in_words(wanted)} as its master is placed; "
            "give the module itself, whose gathered parameters are resharded first"
        )
    here = local_values(target)
    is_spread = not here.is_contiguous() if is_selected else 0 in here.stride() and here.numel() > 1
    if is_spread and not here.is_contiguous():
        raise ValueError(
            f"out {name!r}: found shape {tuple(here.shape)} with strides {here.stride()}, wanted a contiguous tensor, "
            "which can be written to in place"
        )


def _check_apart(targets: Sequence[Destination]) -> list[Destination]:
    """Raise ValueError if what is written overlaps anything else that is; `is_master` says where it is the master."""
    spans: list[tuple[int, int, str, bool]] = []
    found: list[Destination] = []
    for name, master, out, is_same in targets:
        start, end = _span(out)
        is_master = is_same or (start < end and _span(master) == (start, end) and _is_laid_out_as(out, master))
        if start < end:
            spans.append((start, end, name, True))
            if not is_master:
                spans.append((*_span(master), name, False))
        found.append(Destination(name, master, out, is_master))
    spans.sort()
    reach, before = 0, ("", True)
    for start, end, name, is_written in spans:
        if start < reach and (is_written or before[1]):
            what = "its own master" if before[0] == name else f"{before[0]!r}"
            raise ValueError(
                f"out {name!r}: found memory that it shares with {what}, wanted memory of its own; of tied parameters "
                "give one name"
            )
        if end > reach:
            reach, before = end, (name, is_written)
    return found


def _is_laid_out_as(out: Tensor, master: Tensor) -> bool:
    """False for a transposed view, which begins and ends where its matrix does."""
    here, there = local_values(out), local_values(master)
    return here.dtype == there.dtype and (here.stride() == there.stride())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address of this rank's part; an empty span for none."""
    here = local_values(tensor)
    if here.numel() == 0 or here.is_meta:
        return 0, 0
    start = here.data_ptr()
    if here.is_contiguous():
        return start, start + here.numel() * here.element_size()
    last = sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
    return start, start + (last + 1) * here.element_size()


@torch.no_grad()
def copy_into(targets: Sequence[Destination]) -> None:
    """Cast each master into its target: one call per pair of dtypes on a device, of DTensors their shards."""
    kinds: dict[tuple[torch.dtype, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for _, master, out, is_master in targets:
        if not is_master:
            outs, sources = kinds.setdefault((master.dtype, out.dtype, out.device), ([], []))
            outs.append(local_values(out))
            sources.append(local_values(master))
    for outs, sources in kinds.values():
        copy_all(outs, sources)
    count_up([out for _, _, out, is_master in targets if not is_master])


def count_up(outs: Sequence[Tensor]) -> None:
    """Count up the versions of DTensors whose shards were written, so that graphs that have kept them raise."""
    if sharded := [out for out in outs if is_sharded(out)]:
        torch.autograd.graph.increment_version(sharded)
