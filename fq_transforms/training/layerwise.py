"""Fake quantization one layer at a time: fake weights live while their layer computes, and are made again in backward.

NOTE what is saved: a layer saves its weights for the backward pass, and so keeps the fake ones. Within a layer's
forward, saved-tensor hooks keep in their place what they are made of: the parameters and the amax, which live anyway.

NOTE who asks again: experts whose weights are one module's (Transformer Engine, stacked) need all of them at once, and
one launch makes them; experts that are modules of their own need one at a time, and get it.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, ParameterDict, ParameterList
from torch.utils import _pytree as pytree

from fq_transforms.checks import check_state, is_read, refuse_compiled
from fq_transforms.dtensor import is_sharded
from fq_transforms.fakequant import quantize_group
from fq_transforms.in_use import InUse, Within
from fq_transforms.ops import private
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import GroupState, State
from fq_transforms.training.main_grad import carry_main_grad, has_main_grad
from fq_transforms.training.reads import Guarded
from fq_transforms.training.wrapped import OTHER_WAY, check_eager, check_plain, check_unparametrized
from fq_transforms.transform import Transform

__all__ = ["layerwise"]

CONTAINERS = (ModuleList, ModuleDict, ParameterList, ParameterDict)  # which have no forward


def layerwise(
    fq: Transform,
    model: Module,
    state: State,
    *,
    recompute: bool = True,
    inspect: Callable[[Module], None] | None = None,
) -> AbstractContextManager[None]:
    """Within, each selected layer of `model` computes with the weights of `fq.fakequant`, made when its forward begins.

    One layer's fake weights exist at a time, and nothing stays on the model. Call `.backward()` inside if activations
    are checkpointed: outside, a layer would run again with its own weights. More: docs/training.md.

    Args:
        fq: "pass_through" or "clip", without inputs.
        model: Whose `named_parameters()` the spec was selected from.
        state: From `fq.calibrate`, or loaded. Its values are checked on entry only.
        recompute: Make the fake weights again in backward, bit for bit. Hooks on saved tensors around it decide first.
        inspect: Called with each selected layer, and each module below it that holds weights; may raise.

    Raises:
        KeyError, ValueError: As `fq.fakequant`; "lsq" or inputs; a layer is wrapped or compiled (docs/training.md), its
            weight is tied, parametrized or read by another module, or it never ran; the model, or a part of it, is
            in use already; with `recompute` a DTensor, torch.func, or Megatron's own fused accumulation; "clip" and
            `main_grad`.
        RuntimeError: In backward, weights or amax have changed since forward.

    Example:
        >>> import fq_transforms as fqt
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4, bias=False))
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        >>> with layerwise(fq, model, fq.calibrate(params)):
        ...     model(torch.ones(2, 32)).sum().backward()
    """
    refuse_compiled("layerwise", "train with fq.fakequant(masters, state, out=model) before the step")
    return _Layerwise(model, state, _Options(fq, recompute, inspect))


class _Layerwise(Within[None]):
    def __init__(self, model: Module, state: State, options: "_Options") -> None:
        self.model, self.state, self.options = model, state, options

    def _use(self) -> InUse:
        fq, model = self.options.fq, self.model
        if fq.backward == "lsq":
            raise ValueError(
                "backward: found 'lsq', wanted 'pass_through' or 'clip'; to learn a state, call fq.fakequant"
            )
        refuse_inputs(fq.spec, "layerwise")
        check_state(self.state, fq.spec, values=is_read)
        check_unparametrized(fq.spec)
        return InUse("layerwise", chain(model.named_modules(), model.named_parameters()))

    def _begin(self, use: InUse) -> None:
        paths, owners = _owners(self.model, self.options.fq.spec)
        calls = _Calls()
        self.sites = sites = [
            _Site(module, groups, self.state, self.options, calls) for module, groups in owners.items()
        ]
        _check_untied(self.model, sites)

        def begin(module: Module, args: Any) -> None:
            frame = None if torch.compiler.is_compiling() else _frame_of_call()
            calls.running.append((_thread(), frame))

        def end(module: Module, args: Any, output: Any) -> None:
            last = [one for one in calls.running if one[0] == _thread()][-1:]
            for one in last:
                calls.running.remove(one)

        for holder, of_holder in _by_holder(sites).items():

            def is_refused(attribute: str, of_holder: Mapping[str, _Site] = of_holder) -> bool:
                return not of_holder[attribute].is_entered() and calls.are_running()

            names = {attribute: site.names[holder, attribute] for attribute, site in of_holder.items()}
            guarded = Guarded(holder, names, is_refused)
            use.undo.append(guarded.put_back)
            guarded.stand_in()
        for module in paths:
            use.hook_before(module, begin, prepend=True)
            use.hook_after(module, end, always_call=True)
        for site in sites:
            use.hook_before(site.module, site.before)
            use.hook_after(site.module, site.after, always_call=True)
        use.undo.append(calls.leave_all)  # last, and so the first to be done

    def _end(self) -> None:
        if idle := [site for site in self.sites if site.runs == 0]:
            group = idle[0].groups[0]
            raise ValueError(
                f"parameter {group.names[0]!r}: found that its layer, {type(idle[0].module).__name__}, never ran "
                f"({len(idle)} of {len(self.sites)} selected layers did not), wanted every selected layer to run; if "
                f"another module computes with its weights, call functional_call(model, fq.fakequant(params, state), "
                f"...), or {OTHER_WAY}"
            )


class _Options(NamedTuple):
    fq: Transform
    recompute: bool
    inspect: Callable[[Module], None] | None


class _Site:
    """A module whose forward uses all weights of some groups."""

    def __init__(
        self, module: Module, groups: dict[Group, list[Module]], state: State, options: _Options, calls: "_Calls"
    ) -> None:
        self.module, self.options = module, options
        self.groups = list(groups)
        self.scales = [state[group.key] for group in groups]
        self.names: dict[tuple[Module, str], str] = {}
        self.modules: dict[str, Module] = {}
        for group, holders in groups.items():
            for name, holder in zip(group.names, holders, strict=True):
                self.names[holder, name.rpartition(".")[2]] = name
                self.modules[name] = holder
        self.runs = 0
        self.calls = calls

    def take(self) -> dict[str, Tensor]:
        """What hangs there now."""
        found: dict[str, Tensor] = {}
        for (holder, attribute), name in self.names.items():
            tensor = tensors_in(holder).get(attribute)
            if tensor is None:
                raise KeyError(f"parameter {name!r} is not in {type(holder).__name__} any more")
            found[name] = tensor
        return found

    def before(self, module: Module, args: Any) -> None:
        check_eager(module)  # what is compiled would keep this hook for later
        entered = _Entered(self, _frame_of_call())
        earlier = self._forwards()
        self.calls.entered.append(entered)  # `after` is called even if this raises
        is_within_itself = self._is_within_one_of(earlier)
        inspect = self.options.inspect
        if inspect is not None:
            for inner in dict.fromkeys([module, *self.modules.values()]):
                inspect(inner)
        if not is_within_itself:
            self._exchange(self.take(), entered)
        self.runs += 1

    def after(self, module: Module, args: Any, output: Any) -> None:
        last = [one for one in self._forwards() if one.thread == _thread()][:1]
        for one in last:
            one.leave(output)

    def is_entered(self) -> bool:
        return any(one.site is self for one in self.calls.entered)

    def _forwards(self) -> "list[_Entered]":
        return [one for one in reversed(self.calls.entered) if one.site is self]

    def _is_within_one_of(self, forwards: "Iterable[_Entered]") -> bool:
        """True if a forward of this layer led to this one. One that an interrupt ended is over: its weights are old."""
        for one in forwards:
            if _is_on_stack(one.frame, _frame_of_call()):
                return True
            if _is_on_a_stack(one.frame):
                raise ValueError(
                    f"layer {type(self.module).__name__}: found that another thread runs it, within one layerwise, "
                    "wanted one thread; give each a model of its own: copy.deepcopy(model)"
                )
            one.leave(None)
        return False

    def _exchange(self, params: dict[str, Tensor], entered: "_Entered") -> None:
        fq = self.options.fq
        weights: dict[str, Tensor] = {}
        for group, scales in zip(self.groups, self.scales, strict=True):
            outs = quantize_group(
                params, group, scales, out_dtype=fq.out_dtype, backward=fq.backward, separate=fq.separate
            )
            weights.update(zip(group.names, outs, strict=True))
        carry_main_grad(fq, params, weights)
        if self.options.recompute and torch.is_grad_enabled():
            self._check_flags_return(params)
            entered.remake = self._remake(params, weights)
        entered.params, entered.weights = params, weights
        if entered.remake is not None:
            torch.autograd.graph.saved_tensors_hooks(entered.remake.pack, entered.remake.unpack).__enter__()
        for (holder, attribute), name in self.names.items():
            tensors_in(holder)[attribute] = weights[name]

    def _check_flags_return(self, params: Mapping[str, Tensor]) -> None:
        """Raise ValueError for layers that set `grad_added_to_main_grad` on the weight that they saved."""
        for name, module in self.modules.items():
            if getattr(module, "gradient_accumulation_fusion", False) and has_main_grad(params[name]):
                raise ValueError(
                    f"parameter {name!r}: found {type(module).__name__} with gradient_accumulation_fusion, "
                    "wanted recompute=False, or Transformer Engine's layers"
                )

    def _remake(self, params: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> "_Remake | None":
        """Hooks that keep fake weights as what they are made of; None where other hooks decide."""
        if private.is_functorch_active():
            raise ValueError(
                f"layer {type(self.module).__name__}: found a torch.func transform, which forbids hooks on saved "
                "tensors, wanted recompute=False"
            )
        outer = private.saved_tensors_hooks()
        if outer is not None and not isinstance(getattr(outer[0], "__self__", None), _Remake):
            return None
        remake = _Remake(outer)
        for group, scales in zip(self.groups, self.scales, strict=True):
            together = len({id(self.modules[name]) for name in group.names}) == 1
            own = [params[name] for name in group.names]
            source = _Source(group, own, scales, self.options, together)
            remake.add(source, [weights[name] for name in group.names])
        return remake


class _Entered:
    """A forward of a layer, and what it has exchanged: nothing within itself."""

    def __init__(self, site: _Site, frame: FrameType) -> None:
        self.site, self.frame, self.thread = site, frame, _thread()
        self.params: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.remake: _Remake | None = None

    def leave(self, output: Any) -> None:
        """Put the parameters back, wherever the fake weights still are. Once more is no fault."""
        for (holder, attribute), name in self.site.names.items() if self.weights else ():
            if tensors_in(holder).get(attribute) is self.weights[name]:
                tensors_in(holder)[attribute] = self.params[name]
        if self.remake is not None:
            if self.remake.is_of(private.saved_tensors_hooks()):
                torch.autograd.graph.saved_tensors_hooks(self.remake.pack, self.remake.unpack).__exit__()
            self.remake.forward_is_done(output)
        if self in self.site.calls.entered:
            self.site.calls.entered.remove(self)


class _Calls:
    """The forwards that run within one `layerwise`: of modules on the way to selected weights, and of their layers.

    They are known by their frames, as KeyboardInterrupt ends a forward without its hooks; None in what is compiled.
    """

    def __init__(self) -> None:
        self.running: list[tuple[int, FrameType | None]] = []
        self.entered: list[_Entered] = []

    def are_running(self) -> bool:
        while self.running:
            frame = self.running[-1][1]
            if frame is None or torch.compiler.is_compiling() or _is_on_a_stack(frame):  # stacks cannot be traced
                return True
            self.running.pop()
        return False

    def leave_all(self) -> None:
        while self.entered:
            self.entered[-1].leave(None)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # which cannot be traced


def _frame_of_call() -> FrameType:
    """Of what has called the caller of this: PyTorch's, as long as a module's hooks and its forward run."""
    return sys._getframe(2)  # pyright: ignore[reportPrivateUsage]


def _is_on_a_stack(frame: FrameType) -> bool:
    return any(_is_on_stack(frame, top) for top in sys._current_frames().values())  # pyright: ignore[reportPrivateUsage]


def _is_on_stack(frame: FrameType, top: FrameType | None) -> bool:
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None


class _Source:
    """What the fake weights of a group are made of, and they themselves while backward asks for one after the other."""

    def __init__(
        self, group: Group, params: list[Tensor], scales: GroupState, options: _Options, together: bool
    ) -> None:
        if is_sharded(params[0]):
            raise ValueError(f"parameter {group.names[0]!r}: found a DTensor, wanted recompute=False for it")
        self.group, self.params, self.scales, self.options, self.together = group, params, scales, options, together
        self.versions = self._versions()
        self.made: Sequence[Tensor] | None = None
        self.places = self.to_come = 0

    def _versions(self) -> list[int]:
        tensors = (*self.params, *self.scales.values())
        try:
            return [tensor._version for tensor in tensors]  # pyright: ignore[reportPrivateUsage] (it has no public name)
        except RuntimeError:  # made under inference mode: without a version
            return [0 if tensor.is_inference() else tensor._version for tensor in tensors]  # pyright: ignore

    def make(self, number: int) -> Tensor:
        """One of them, bit for bit as it was in forward; all are kept as long as backward asks for the next."""
        if not self.together:
            return self._quantize(slice(number, number + 1))[0]
        self.to_come = (self.to_come or self.places) - 1  # a second backward starts over
        made = self._quantize(slice(None)) if self.made is None else self.made
        self.made = made if self.to_come else None
        return made[number]

    def _quantize(self, experts: slice) -> Sequence[Tensor]:
        if self._versions() != self.versions:
            raise RuntimeError(
                f"group {self.group.key!r}: found that a parameter or its amax was changed in place after forward, "
                "wanted the values of forward to make the fake weights again; call backward before the optimizer, or "
                "pass recompute=False"
            )
        amax, global_amax = self.scales.get("amax"), self.scales.get("global_amax")
        if not self.group.stacked:
            amax, global_amax = (None if leaf is None else leaf[experts] for leaf in (amax, global_amax))
        with torch.no_grad():
            return fake_quantize(
                self.params[experts],
                amax,
                global_amax,
                format=self.group.format,
                transposed=self.group.transposed,
                out_dtype=self.options.fq.out_dtype,
                separate=self.options.fq.separate,
            )


class _Place(NamedTuple):
    """A fake weight, or a view of it (size, stride, and offset in it), without its memory."""

    source: _Source
    number: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None


class _Remake:
    """The hooks of one forward of a site; what is no fake weight goes to the hooks of the site around it, if any."""

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        # By identity, as what a layer saves is mostly the weight itself; with the address of its numbers.
        self.weights: dict[int, tuple[Tensor, _Place, int]] = {}
        self.storages: dict[int, list[tuple[Tensor, _Place]]] | None = None
        self.is_complete = True

    def is_of(self, hooks: Any) -> bool:
        return hooks is not None and getattr(hooks[0], "__self__", None) is self

    def add(self, source: _Source, weights: Sequence[Tensor]) -> None:
        for number, weight in enumerate(weights):
            self.weights[id(weight)] = (weight, _Place(source, number), weight.data_ptr())

    def pack(self, tensor: Tensor) -> Any:
        entry = self.weights.get(id(tensor))
        if entry is not None and tensor.data_ptr() == entry[2]:  # else the layer put other numbers into `.data`
            place = entry[1]
        elif type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            place = self._view(tensor)
        else:
            place = None
        if place is not None:
            place.source.places += 1
            return place
        return tensor if self.outer is None else (self.outer[1], self.outer[0](tensor))

    def _view(self, tensor: Tensor) -> _Place | None:
        """The place of a tensor that shares the memory of a fake weight."""
        sharing = self._by_storage().get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if sharing is None:
            return None
        first = sharing[0][0]
        if tensor.dtype != first.dtype:
            self.is_complete = False
            return None
        weight, place = sharing[(int(tensor.storage_offset()) - int(first.storage_offset())) // first.numel()]
        start = int(tensor.storage_offset()) - int(weight.storage_offset())
        return place._replace(view=(tuple(tensor.shape), tensor.stride(), start))

    def _by_storage(self) -> dict[int, list[tuple[Tensor, _Place]]]:
        """The fake weights of each allocation, in the order of their memory."""
        if self.storages is None:
            self.storages = {}
            for weight, place, address in self.weights.values():
                if weight.numel() and weight.data_ptr() == address:
                    self.storages.setdefault(weight.untyped_storage().data_ptr(), []).append((weight, place))
        return self.storages

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Place):
            weight = packed.source.make(packed.number)
            if packed.view is None:
                return weight
            size, stride, start = packed.view
            return weight.as_strided(size, stride, weight.storage_offset() + start)
        if isinstance(packed, tuple):
            unpack, inner = packed
            return unpack(inner)
        return packed

    def forward_is_done(self, output: Any) -> None:
        """Let go of the fake weights. Those that carry `main_grad` are kept by the layer, as names: without memory."""
        if self.is_complete and any(has_main_grad(weight) for weight, *_ in self.weights.values()):
            given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(output) if type(t) is Tensor}
            for address, sharing in self._by_storage().items():
                if address not in given and has_main_grad(sharing[0][0]):
                    sharing[0][0].untyped_storage().resize_(0)
        self.weights, self.storages = {}, {}


def tensors_in(module: Module) -> dict[str, Tensor | None]:
    """A module's own parameters, to read and to exchange."""
    return vars(module)["_parameters"]


def _owners(model: Module, spec: Spec) -> tuple[list[Module], dict[Module, dict[Group, list[Module]]]]:
    """The modules from the model to each selected weight; and by the innermost that runs and has a whole group: it."""
    owners: dict[Module, dict[Group, list[Module]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    checked: dict[Module, None] = {}
    for group in spec.groups:
        paths: dict[str, str] = {}  # each once: Transformer Engine's experts are all in one module
        for name in group.names:
            paths.setdefault(name.rpartition(".")[0], name)
        for path, name in paths.items():
            words = path.split(".") if path else []
            prefixes = (".".join(words[:depth]) for depth in range(len(words) + 1))
            on_path = [modules[prefix] for prefix in prefixes if prefix in modules]
            check_plain(f"parameter {name!r}", (module for module in on_path if module not in checked))
            checked |= dict.fromkeys(on_path)
        holders: list[Module] = []
        for name in group.names:
            path, _, attribute = name.rpartition(".")
            holder = modules.get(path)
            if holder is None or tensors_in(holder).get(attribute) is None:
                raise KeyError(
                    f"parameter {name!r} of group {group.key!r} is not in the {type(model).__name__}; select from its "
                    "named_parameters()"
                )
            holders.append(holder)
        owners.setdefault(modules[_common(paths, modules)], {})[group] = holders
    return list(checked), owners


def _check_untied(model: Module, sites: Iterable[_Site]) -> None:
    """Raise ValueError where a selected weight hangs in a second place, whose module would compute with it as it is."""
    places = {
        id(tensors_in(holder)[attribute]): (holder, attribute) for site in sites for holder, attribute in site.names
    }
    names = {place: name for site in sites for place, name in site.names.items()}
    for path, module in model.named_modules():
        for attribute, tensor in (*tensors_in(module).items(), *module.named_buffers(recurse=False)):
            if (place := places.get(id(tensor), (module, attribute))) != (module, attribute):
                raise ValueError(
                    f"parameter {names[place]!r}: found it tied to {f'{path}.{attribute}'.removeprefix('.')!r}, wanted "
                    f"a selected weight in one place; call value_and_grad, or {OTHER_WAY}"
                )


def _by_holder(sites: Iterable[_Site]) -> dict[Module, dict[str, _Site]]:
    """The modules in which selected weights hang, and which site computes with each."""
    found: dict[Module, dict[str, _Site]] = {}
    for site in sites:
        for holder, attribute in site.names:
            found.setdefault(holder, {})[attribute] = site
    return found


def _common(paths: Iterable[str], modules: Mapping[str, Module]) -> str:
    """The path of the innermost module that runs and has all of these paths at it or below it."""
    first, *others = (path.split(".") if path else [] for path in paths)
    common = first
    for path in others:
        shared = 0
        while shared < min(len(common), len(path)) and common[shared] == path[shared]:
            shared += 1
        common = common[:shared]
    while isinstance(container := modules[".".join(common)], CONTAINERS):
        if not common:
            raise ValueError(
                f"model: found {type(container).__name__}, which has no forward, wanted one that runs its experts"
            )
        common = common[:-1]
    return ".".join(common)
