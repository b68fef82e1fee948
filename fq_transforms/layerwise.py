"""Fake quantization a layer at a time: fake weights live while their layer computes, and are made again in backward.

NOTE what is saved: a layer saves its weights for the backward pass, and so keeps the fake ones. Within a layer's
forward, saved-tensor hooks keep in their place what they are made of: the parameters and the amax, which live anyway.

NOTE who asks again: experts whose weights are one module's (Transformer Engine, stacked) need all of them at once, and
one launch makes them; experts that are modules of their own need one at a time, and get it.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList

from fq_transforms.fakequant import check_options, fakequant
from fq_transforms.main_grad import carry_main_grad, has_main_grad
from fq_transforms.ops.autograd import Backward, fake_quantize
from fq_transforms.select import Group, Spec, is_sharded
from fq_transforms.state import BlockAmax, GroupState, State, Stateless, check

__all__ = ["layerwise"]


@contextmanager
def layerwise(
    model: Module,
    state: State,
    *,
    spec: Spec,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    recompute: bool = True,
    inspect: Callable[[Module], None] | None = None,
) -> Generator[None]:
    """Within, each selected layer of `model` computes with fake-quantized weights, made when its forward begins.

    The whole-model form, `functional_call(model, fakequant(params, state))`, holds a second copy of all selected
    weights until backward. Here one layer's exist at a time. Composes with `functional_call`: what is quantized is
    what a layer has as its parameters when it runs. Nothing stays on the model, after an exception neither.

    Call `.backward()` inside if anything in the model is checkpointed (activations made again in backward): outside,
    the layer would be run again with its own weights.

    Args:
        model: Whose `named_parameters()` the spec was selected from.
        state: From `calibrate`, or loaded.
        spec: What is quantized, and how.
        out_dtype: As `fakequant`.
        backward: As `fakequant`.
        recompute: Make the fake weights again in backward, from the parameters and the amax, bit for bit, in place of
            keeping them: with it the peak of memory is one group's fake weights above the unquantized model's, and
            backward takes a launch more a group. Where hooks on saved tensors are active already, as in a checkpointed
            layer, these decide.
        inspect: Called with each module before its weights are replaced; may raise.

    Raises:
        KeyError: A parameter is not in the model; a group is not in the state.
        ValueError: As `fakequant`; with `recompute`, a parameter is a DTensor, or a torch.func transform looks on. On
            leaving, a selected layer never ran while others did: something else read its weights, unquantized.
        RuntimeError: In backward, parameters or amax have changed since forward.

    Example:
        >>> from fq_transforms.calibrate import calibrate
        >>> from fq_transforms.formats import INT8
        >>> from fq_transforms.select import select
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.01], [0.5, 0.25]]))
        >>> params = dict(model.named_parameters())
        >>> spec = select(params, {"*": INT8})
        >>> with layerwise(model, calibrate(params, spec=spec), spec=spec):
        ...     model(torch.tensor([1.0, 0.0]))
        tensor([0.9971, 0.5065], grad_fn=<SqueezeBackward4>)
    """
    check_options(out_dtype, backward)
    check(state, spec, values=False)
    options = _Options(out_dtype, backward, recompute, inspect)
    sites = [_Site(module, groups, state, options) for module, groups in _owners(model, spec).items()]
    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.leave_all)
            hooks.callback(site.module.register_forward_pre_hook(site.before).remove)
            hooks.callback(site.module.register_forward_hook(site.after, always_call=True).remove)
        yield
    idle = [site for site in sites if site.runs == 0]
    if idle and len(idle) < len(sites):
        group = idle[0].groups[0]
        raise ValueError(
            f"parameter {group.names[0]!r}: found that its layer, {type(idle[0].module).__name__}, never ran while "
            f"{len(sites) - len(idle)} others did, wanted every selected layer to run; if another module reads its "
            "weights, use functional_call(model, fakequant(params, state))"
        )


class _Options(NamedTuple):
    out_dtype: torch.dtype | None
    backward: Backward
    recompute: bool
    inspect: Callable[[Module], None] | None


class _Holder(NamedTuple):
    """Where a parameter hangs."""

    module: Module
    attribute: str

    def get(self) -> Tensor | None:
        return self.module._parameters.get(self.attribute)  # pyright: ignore[reportPrivateUsage] (as functional_call)

    def put(self, tensor: Tensor) -> None:
        self.module._parameters[self.attribute] = tensor  # pyright: ignore[reportPrivateUsage, reportArgumentType]


class _Site:
    """A module whose forward uses all weights of some groups."""

    def __init__(self, module: Module, groups: dict[Group, list[_Holder]], state: State, options: _Options) -> None:
        self.module, self.options = module, options
        self.groups = list(groups)
        self.holders = {name: holder for g in groups for name, holder in zip(g.names, groups[g], strict=True)}
        self.spec = Spec(tuple(groups))
        self.state = {group.key: state[group.key] for group in groups}
        self.runs = 0
        self.entered: list[tuple[ExitStack, dict[str, Tensor]]] = []

    def before(self, module: Module, args: Any) -> None:
        if self.options.inspect is not None:
            self.options.inspect(module)
        out_dtype, backward, recompute, _ = self.options
        params: dict[str, Tensor] = {}
        for name, holder in self.holders.items():
            if (param := holder.get()) is None:
                raise KeyError(f"parameter {name!r} is not in {type(holder.module).__name__} any more")
            params[name] = param
        weights = fakequant(params, self.state, spec=self.spec, out_dtype=out_dtype, backward=backward)
        carry_main_grad(params, weights, backward=backward)
        leaving = ExitStack()
        if recompute and torch.is_grad_enabled():
            leaving.enter_context(self._remade(params, weights))
        self.runs += 1
        self.entered.append((leaving, params))
        for name, holder in self.holders.items():
            holder.put(weights[name])

    def after(self, module: Module, args: Any, output: Any) -> None:
        if self.entered:  # not, where `before` raised
            leaving, params = self.entered.pop()
            for name, holder in self.holders.items():
                holder.put(params[name])
            leaving.close()

    def leave_all(self) -> None:
        while self.entered:
            self.after(self.module, (), None)

    @contextmanager
    def _remade(self, params: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Generator[None]:
        """Saved tensors that are fake weights are kept as what they are made of."""
        if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage] (it has no public name)
            raise ValueError(
                f"layer {type(self.module).__name__}: found a torch.func transform, which forbids hooks on saved "
                "tensors, wanted recompute=False"
            )
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        if outer is not None and not isinstance(getattr(outer[0], "__self__", None), _Remake):
            yield
            return
        remake = _Remake(outer)
        for group, holders in zip(self.groups, self._holders_of_groups(), strict=True):
            together = len({id(holder.module) for holder in holders}) == 1
            remake.add(
                _Source(
                    group,
                    [params[name] for name in group.names],
                    self.state[group.key],
                    self.options,
                    together,
                ),
                [weights[name] for name in group.names],
            )
        with torch.autograd.graph.saved_tensors_hooks(remake.pack, remake.unpack):
            yield
        remake.forward_is_done()

    def _holders_of_groups(self) -> list[list[_Holder]]:
        return [[self.holders[name] for name in group.names] for group in self.groups]


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
        return [tensor._version for tensor in (*self.params, *self.scales)]  # pyright: ignore[reportPrivateUsage]

    def make(self, number: int) -> Tensor:
        """The fake weight, bit for bit as it was in forward."""
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
        amax = None if isinstance(self.scales, Stateless) else self.scales.amax
        global_amax = self.scales.global_amax if isinstance(self.scales, BlockAmax) else None
        if not self.group.stacked:
            amax, global_amax = (None if leaf is None else leaf[experts] for leaf in (amax, global_amax))
        with torch.no_grad():
            return fake_quantize(
                self.params[experts],
                amax,
                global_amax,
                format=self.group.format,
                transposed=self.group.transposed,
                out_dtype=self.options.out_dtype,
            )


class _Place(NamedTuple):
    """A fake weight, or a view of it (size, stride, and offset in it), without its memory."""

    source: _Source
    number: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


class _Remake:
    """The hooks of one forward of a site; what is no fake weight goes to the hooks of the site around it, if any."""

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        self.weights: dict[int, tuple[Tensor, _Source, int]] = {}  # by address
        self.storages: dict[int, list[tuple[Tensor, _Source, int]]] = {}
        self.is_complete = True

    def add(self, source: _Source, weights: Sequence[Tensor]) -> None:
        for number, weight in enumerate(weights):
            if weight.numel():
                entry = (weight, source, number)
                self.weights[weight.data_ptr()] = entry
                self.storages.setdefault(weight.untyped_storage().data_ptr(), []).append(entry)

    def pack(self, tensor: Tensor) -> Any:
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            entry, view = self.weights.get(tensor.data_ptr()), None  # the usual case: the weight itself, as it is
            if entry is None or tensor.shape != entry[0].shape or tensor.stride() != entry[0].stride():
                entry = self._around(tensor)
                if entry is not None:
                    start = int(tensor.storage_offset()) - int(entry[0].storage_offset())
                    view = (tuple(tensor.shape), tensor.stride(), start)
            if entry is not None:
                weight, source, number = entry
                if tensor.dtype == weight.dtype:
                    source.places += 1
                    return _Place(source, number, view)
                self.is_complete = False
        return tensor if self.outer is None else (self.outer[1], self.outer[0](tensor))

    def _around(self, tensor: Tensor) -> tuple[Tensor, _Source, int] | None:
        """The fake weight that a tensor is a view of."""
        sharing = self.storages.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if sharing is None:
            return None
        first = sharing[0][0]
        return sharing[(int(tensor.storage_offset()) - int(first.storage_offset())) // first.numel()]

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

    def forward_is_done(self) -> None:
        """Let go of the fake weights. Those that carry `main_grad` are kept by the layer, as names: without memory."""
        for sharing in self.storages.values():
            if self.is_complete and has_main_grad(sharing[0][0]):
                sharing[0][0].untyped_storage().resize_(0)
        self.weights, self.storages = {}, {}


def _owners(model: Module, spec: Spec) -> dict[Module, dict[Group, list[_Holder]]]:
    """For each group the innermost module that runs and has all of its weights below it."""
    owners: dict[Module, dict[Group, list[_Holder]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for group in spec.groups:
        paths: list[list[str]] = []
        holders: list[_Holder] = []
        for name in group.names:
            path, _, attribute = name.rpartition(".")
            holder = _Holder(modules[path], attribute) if path in modules else None
            if holder is None or holder.get() is None:
                raise KeyError(
                    f"parameter {name!r} of group {group.key!r} is not in the {type(model).__name__}; select from its "
                    "named_parameters()"
                )
            paths.append(path.split(".") if path else [])
            holders.append(holder)
        common = paths[0]
        for path in paths[1:]:
            shared = 0
            while shared < min(len(common), len(path)) and common[shared] == path[shared]:
                shared += 1
            common = common[:shared]
        while isinstance(modules[".".join(common)], ModuleList | ModuleDict):  # which have no forward
            common = common[:-1]
        owners.setdefault(modules[".".join(common)], {})[group] = holders
    return owners
