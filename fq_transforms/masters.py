"""Master weights: leaves beside a model's own parameters that an optimizer steps, and how they are written back.

Mixed-precision training has them anyway: fp32 where the model computes in bf16. docs/training.md has the whole loop.
"""

from collections.abc import Mapping, Sequence, Set
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fq_transforms.checks import (
    DTYPES,
    check_dtype,
    check_is_tensor,
    check_readable,
    refuse_compiled,
    refuse_transforms,
    weights_of,
)
from fq_transforms.dtensor import is_sharded, local_values, spread_in_words, spread_of
from fq_transforms.ops.launch import Bounded, Contiguous
from fq_transforms.ops.private import Guards, copy_all, is_transformed
from fq_transforms.spec import Spec

if TYPE_CHECKING:
    from fq_transforms.transform import Transform

__all__ = [
    "Tensors",
    "Write",
    "cast",
    "cast_all",
    "count_up",
    "masters",
    "missing_in_words",
    "planned_write",
    "tensors_of",
]

Tensors: TypeAlias = Mapping[str, Tensor] | Module


def masters(params: Tensors, *, fq: "Transform | None" = None) -> dict[str, Tensor]:
    """Leaves for an optimizer: the values of each parameter in fp32, in memory of its own.

    Args:
        params: Names to parameters, or a module, all of whose parameters are taken, a tied one once. Not yet
            fake-quantized.
        fq: If given, what needs no copy gets none: parameters that it does not select, if they are fp32 or frozen, are
            the same objects, and groups that are frozen as a whole keep their dtype.

    Returns:
        A new dict of fp32 leaves, which require a gradient where their parameters do; frozen ones of other dtypes than
        bf16, fp16 and fp32 keep theirs. A DTensor gives one placed alike, with no collective.

    Raises:
        ValueError: A trained parameter is not bf16, fp16 or fp32, or is on meta.

    Source: Micikevicius et al. 2018, section 3.1.

    Example:
        >>> params = {"w": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
        >>> masters(params)
        {'w': Parameter containing:
        tensor([1., 1.], requires_grad=True)}
    """
    refuse_transforms("masters", "make them outside, and write param.float() within")
    refuse_compiled("masters", "make them before")
    tensors = tensors_of(params, tied=False)
    for name, param in tensors.items():
        check_is_tensor(f"parameter {name!r}", param)
    dtypes = dict.fromkeys(tensors, torch.float32)
    shared = set[str]()
    if fq is not None:
        shared = {name for name, param in tensors.items() if param.dtype == torch.float32 or not param.requires_grad}
        for group in fq.spec.groups:
            shared.difference_update(group.names)
            weights = {name: tensors[name] for name in group.names if name in tensors}
            if not any(weight.requires_grad for weight in weights.values()):  # one trained makes its whole group fp32
                dtypes |= {name: weight.dtype for name, weight in weights.items()}
    made: dict[str, Tensor] = {}
    for name, param in tensors.items():
        if param.requires_grad:
            check_dtype(name, param)
        if name not in shared:
            check_readable(f"parameter {name!r}", param)
        if param.is_meta:
            raise ValueError(f"parameter {name!r}: found it on meta, wanted values; materialize the model first")
        if name in shared:
            made[name] = param
        elif param.dtype not in DTYPES:
            made[name] = Parameter(param.detach().clone(), requires_grad=False)
        else:
            copied = param.detach().to(dtypes[name], copy=True, memory_format=torch.contiguous_format)
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
    write, sources, outs = planned_write(masters, tensors_of(out), None)
    for places in write.casts:
        cast_all([sources[i] for i in places], [outs[i] for i in places], are_sharded=write.are_sharded)
    return dict(zip(masters, outs, strict=True))


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


def missing_in_words(name: str, tensors: Mapping[str, Tensor], where: str) -> str:
    """That a name is missing, for a message, and what to give where wrappers have put something before the names."""
    found = f"parameter {name!r} is not in {where} ({len(tensors)} entries)"
    for other in tensors:
        if other.endswith(f".{name}"):
            prefix = other.removesuffix(name)
            return f"{found}, but {other!r} is; give the module within the wrapper, whose names lack {prefix!r}"
        if name.endswith(f".{other}"):
            prefix = name.removesuffix(other)
            return (
                f"{found}, but {other!r} is; make masters and spec of the module within the wrapper, without {prefix!r}"
            )
    return f"{found}, such as {next(iter(tensors))!r}" if tensors else found


class Write(NamedTuple):
    """A write that was checked, and what follows from its tensors: which of them, by number, go where.

    Attributes:
        groups: For each group of the spec, its weights.
        casts: What is cast only, one list per pair of dtypes on a device.
        is_inplace: For each, whether it is written where its master lies.
        are_sharded: True if there is a DTensor.
        are_contiguous: For each group, whether its weights are known to be plain and contiguous.
        known: For each group what stands for it, if this write is remembered: see `Contiguous`.
    """

    groups: list[list[int]]
    casts: list[list[int]]
    is_inplace: list[bool]
    are_sharded: bool
    are_contiguous: list[bool]
    known: list[object] | None = None

    def weights(self, group: int, masters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights of a group, out of all masters."""
        found = [masters[i] for i in self.groups[group]]
        if not self.are_contiguous[group]:
            return found
        weights = Contiguous(found)
        weights.known = None if self.known is None else self.known[group]
        return weights


def planned_write(
    masters: Mapping[str, Tensor], out: Mapping[str, Tensor], spec: Spec | None
) -> tuple[Write, list[Tensor], list[Tensor]]:
    """What is written where, out of which masters; `spec` says what a kernel writes, None that everything is cast.

    Raises:
        KeyError: A name is missing.
        ValueError: A tensor cannot be written to; see `Transform.fakequant`.
    """
    if is_transformed():
        instead = "call fakequant without out" if spec is not None else "write master.to(dtype) in place of cast"
        raise ValueError(f"out: found a transform of torch.func, wanted none; {instead}")
    try:
        outs = [out[name] for name in masters]
    except KeyError as error:
        raise KeyError(missing_in_words(error.args[0], out, "out")) from error
    sources = list(masters.values())
    if torch.compiler.is_compiling():
        return _plan(masters, outs, spec), sources, outs
    key = id(spec), id(outs[0]) if outs else 0  # of two models that are written in turns each has its own
    known, names = _PLANNED.get(key), list(masters)
    are_same = list(map(is_, outs, sources))
    tensors = sources + outs
    if any(are_same):  # guards match no tensor that comes twice
        tensors = sources + [out for out, is_same in zip(outs, are_same, strict=True) if not is_same]
    if known is not None and known.spec is spec and known.match(names, are_same, tensors):
        return known.write, sources, outs
    write = _plan(masters, outs, spec)
    if not write.are_sharded and len(set(map(id, tensors))) == len(tensors):
        write = write._replace(known=[object() for _ in write.groups])
        _PLANNED[key] = _Planned(spec, names, are_same, Guards(tensors), _addresses(tensors), write)
    return write, sources, outs


class _Planned(NamedTuple):
    """A write of a spec into some tensors: all that was checked of it follows from these."""

    spec: Spec | None
    names: list[str]
    are_same: list[bool]
    guards: Guards
    addresses: list[int]
    write: Write

    def match(self, names: list[str], are_same: list[bool], tensors: Sequence[Tensor]) -> bool:
        """True if the same tensors, or others that lie where they lay, are written again."""
        return (
            names == self.names
            and are_same == self.are_same
            and self.guards.match(tensors)
            and _addresses(tensors) == self.addresses
        )


# To check a write anew at each step takes the host 12 us per weight, which is more than the device takes to make it.
_PLANNED: Bounded[tuple[int, int], _Planned] = Bounded(16)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _plan(masters: Mapping[str, Tensor], outs: Sequence[Any], spec: Spec | None) -> Write:
    groups = () if spec is None else spec.groups
    selected = {name for group in groups for name in group.names}
    for (name, master), out in zip(masters.items(), outs, strict=True):
        if out is not master or name in selected:
            _check_target(name, master, out, name in selected)
    is_inplace = [out is master for out, master in zip(outs, masters.values(), strict=True)]
    if not torch.compiler.is_compiling():
        is_inplace = _check_apart(masters, outs, selected)
    place = {name: i for i, name in enumerate(masters)}
    for group in groups:
        dtypes = {name: outs[place[name]].dtype for name in group.names if name in place}
        for name, dtype in dtypes.items():
            if dtype != (wanted := next(iter(dtypes.values()))):
                raise ValueError(f"out {name!r}: found {dtype}, wanted {wanted} as the others in its group")
    kinds: dict[object, list[int]] = {}
    for i, (name, master) in enumerate(masters.items()):
        if name not in selected and not is_inplace[i]:
            kinds.setdefault((master.dtype, outs[i].dtype, outs[i].device), []).append(i)
    weights = [weights_of(masters, group) for group in groups]
    return Write(
        [[place[name] for name in group.names] for group in groups],
        list(kinds.values()),
        is_inplace,
        any(map(is_sharded, outs)),
        [type(of_group) is Contiguous for of_group in weights],
    )


def _check_target(name: str, master: Tensor, target: Any, is_selected: bool) -> None:
    check_readable(f"out {name!r}", target)
    check_readable(f"parameter {name!r}", master)
    if not torch.compiler.is_compiling() and target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"out {name!r}: found an inference tensor, wanted one that can be written to; make it outside of "
            "torch.inference_mode, or write within it"
        )
    if target.shape != master.shape:
        raise ValueError(f"out {name!r}: found shape {tuple(target.shape)}, wanted {tuple(master.shape)}")
    if target.device != master.device:
        raise ValueError(f"out {name!r}: found it on {target.device}, wanted {master.device} as its master")
    if target.dtype != master.dtype and not (master.is_floating_point() and master.dtype.itemsize > 1):
        raise ValueError(f"out {name!r}: found {target.dtype}, wanted {master.dtype} as its master, which is no float")
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


def _check_apart(masters: Mapping[str, Tensor], outs: Sequence[Tensor], selected: Set[str]) -> list[bool]:
    """Raise ValueError if what is written overlaps anything else that is there; True for each that is its own master.

    Tied names that are not written, because they are their masters and only cast, may overlap.
    """
    spans: list[tuple[int, int, str, bool]] = []
    found: list[bool] = []
    for (name, master), out in zip(masters.items(), outs, strict=True):
        start, end = _span(out)
        is_same = out is master or (start < end and _span(master) == (start, end) and _is_laid_out_as(out, master))
        if start < end:
            spans.append((start, end, name, not is_same or name in selected))
            if not is_same:
                spans.append((*_span(master), name, False))
        found.append(is_same)
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
def cast_all(sources: Sequence[Tensor], outs: Sequence[Tensor], *, are_sharded: bool) -> None:
    """Cast each source into its out, of one pair of dtypes on a device: in one call, of DTensors their shards."""
    if are_sharded:
        copy_all(list(map(local_values, outs)), list(map(local_values, sources)))
        count_up(outs)
    else:
        copy_all(outs, sources)


def count_up(outs: Sequence[Tensor]) -> None:
    """Count up the versions of DTensors whose shards were written, so that graphs that have kept them raise."""
    if sharded := [out for out in outs if is_sharded(out)]:
        torch.autograd.graph.increment_version(sharded)
