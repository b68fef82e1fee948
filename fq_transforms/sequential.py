"""Calibration layer by layer: each decoder layer on what the quantized layers before it give.

    batch 0   embed ->| layer 0 ->| layer 1 -> ... ->| head      a thread each: the model's own forward
    batch 1   embed ->| layer 0 ->| layer 1 -> ... ->| head      |: where it waits for the others

When all batches wait before a layer, it is calibrated on the arguments that they bring, and its weights are moved by
GPTQ. Then it has the quantized weights, and each batch goes through it to the next layer. The model's own code runs in
between, so arguments, masks, caches and positions are what each layer gets, whatever the family.

What runs a layer for calibration gets copies of its arguments, so that it leaves nothing in a cache. Of weights one
layer is in use; where the others are is the `LayerStore`'s matter.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Sequential

from fq_transforms.activations.fill_unseen import fill_unseen
from fq_transforms.activations.observe import Forward, each_batch, run_batch
from fq_transforms.activations.stepped import SteppedForward
from fq_transforms.calibrate import progress
from fq_transforms.checks import refuse_compiled, refuse_transforms, weights_of
from fq_transforms.gptq import check_formats
from fq_transforms.gptq import gptq as moved_by_gptq
from fq_transforms.in_use import InUse
from fq_transforms.parse import nearest, shown
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State

if TYPE_CHECKING:
    from fq_transforms.transform import Transform

__all__ = ["LayerStore", "calibrate_sequentially"]

CALLER = "calibrate_sequentially"


class LayerStore:
    """Where the tensors of a model are while it is calibrated, in parts: each layer, then what lies outside them.

    This one leaves them in the model, and keeps what was moved. Files are another: `fq_transforms.export.layers`.
    """

    def using(
        self, fq: "Transform", model: Module, names: Sequence[Sequence[str]], about: Sequence[str | Tensor]
    ) -> AbstractContextManager[object]:
        """Within, the parts of one run: the names of each part's tensors, and what else its numbers depend on."""
        del names, about
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        return nullcontext()

    def load(self, part: int) -> dict[str, Tensor]:
        """The tensors of a part that the model does not hold."""
        del part
        return {}

    def state_of(self, part: int) -> State | None:
        """The state of a part that an earlier run has finished."""
        del part

    def keep(self, part: int, fq: "Transform", moved: Mapping[str, Tensor], state: State) -> None:
        """Keep what has become of a part: its weights that were moved, and its state, by `fq`'s spec."""
        del part, fq, state
        self.params.update(moved)

    def finish(self, state: State) -> Mapping[str, Tensor]:
        """The model's parameters, now that all parts are done."""
        del state
        return self.params


def calibrate_sequentially(
    fq: "Transform",
    model: Module,
    batches: Any,
    *,
    gptq: Mapping[str, Any] | None,
    forward: Forward | None,
    layers: str | None,
    unseen: str | float,
    store: LayerStore | None,
) -> tuple[Mapping[str, Tensor], State]:
    """`Transform.calibrate_sequentially`, of this Transform."""
    refuse_transforms(CALLER, "calibrate outside")
    refuse_compiled(CALLER, "calibrate before you compile")
    found: Any = gptq
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"gptq: found {type(found).__name__}, wanted None, or options of gptq as a dict")
    if gptq is not None:
        options = [
            *(p.name for p in signature(moved_by_gptq).parameters.values() if p.kind is p.KEYWORD_ONLY),
            "unseen",
        ]
        for name in gptq:
            if name not in options:
                (meant,) = nearest(str(name), options)
                raise ValueError(f"gptq: found {shown(name)}, wanted one of {options} (did you mean {meant!r}?)")
        check_formats(fq.spec)
        moved_by_gptq(replace(fq, spec=Spec(())), {}, {}, {}, **_split(gptq)[1])  # which checks the options
    fill_unseen({}, spec=Spec(()), unseen=unseen, params={})  # which checks `unseen`
    if store is not None and not isinstance(store, LayerStore):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"store: found {type(store).__name__}, wanted None or fqt.export.LayerFiles(folder, out)")
    path, listed = _layers_of(model, fq.spec, layers)
    given = [] if batches is None else list(each_batch(batches, fq.spec.groups[0], CALLER))
    if not given:
        raise ValueError(f"batches: found none in {type(batches).__name__}, wanted at least one")
    given = [optree.tree_map(_detached, one) for one in given]
    run = _Run(fq, model, path, listed, given, gptq, forward, unseen, store or LayerStore())
    return run.parameters_and_state()


def _layers_of(model: Module, spec: Spec, layers: str | None) -> tuple[str, list[Module]]:
    """The path of the list of layers, and the layers.

    Raises:
        KeyError, ValueError: The model lacks a weight; it has no such list, or several, or one that has a layer twice;
            a weight is in several places.
    """
    params = dict(model.named_parameters())
    for group in spec.groups:
        weights_of(params, group)
    selected = [name for group in spec.groups for name in group.names]
    if not selected:
        raise ValueError("spec: found no group, wanted selected weights")
    if layers is None:
        lists = [path for path, module in model.named_modules() if isinstance(module, ModuleList)]
        held = [path for path in lists if any(name.startswith(_dotted(path)) for name in selected)]
        outer = [path for path in held if not any(path.startswith(_dotted(other)) for other in held if other != path)]
        if len(outer) != 1:
            what = f"{len(outer)}, {outer[:4]}" if outer else "none"
            raise ValueError(
                f"layers: found {what} among ModuleLists of {type(model).__name__} that hold selected weights such as "
                f"{selected[0]!r}, wanted one; name it: layers='model.layers'"
            )
        (layers,) = outer
    try:
        found = model.get_submodule(layers)
    except AttributeError as error:
        raise ValueError(f"layers: found no module {layers!r} in {type(model).__name__}: {error}") from error
    names = [name for name, _ in found.named_children()]
    if not isinstance(found, ModuleList | Sequential) or not names or not all(map(str.isdecimal, names)):
        raise ValueError(f"layers: found {type(found).__name__} at {layers!r}, wanted a ModuleList with layers in it")
    _check_apart(model, layers, list(found), spec.groups)
    return layers, list(found)


def _check_apart(model: Module, path: str, listed: Sequence[Module], groups: Sequence[Group]) -> None:
    """Raise ValueError for a layer that is in the list twice, or a group or a selected weight that is in two layers."""
    numbers: dict[int, int] = {}
    for number, layer in enumerate(listed):
        if (first := numbers.setdefault(id(layer), number)) != number:
            raise ValueError(
                f"layers: found '{_dotted(path)}{number}' to be the same module as '{_dotted(path)}{first}', wanted "
                "each layer once"
            )
    for group in groups:
        parts = {_part_of(name, path): name for name in group.names}
        if len(parts) > 1:
            one, other, *_ = parts.values()
            raise ValueError(
                f"layers: found {one!r} and {other!r}, of two layers, in the group {group.key!r}, wanted experts of "
                "one layer in a group; correct `experts` of select"
            )
    selected = {name for group in groups for name in group.names}
    names: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(weight), name)
        if first in selected and _part_of(first, path) != _part_of(name, path):
            raise ValueError(
                f"parameter {first!r}: found the same tensor as {name!r}, wanted one of its own; leave it out with a "
                "rule to None"
            )


def _part_of(name: str, path: str) -> int | None:
    """The number of the layer that a tensor lies in."""
    prefix = _dotted(path)
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if name.startswith(prefix) and number.isdecimal() else None


def _dotted(path: str) -> str:
    return f"{path}." if path else ""


def _split(gptq: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `input_hessians` among those of `gptq`, and the others."""
    of_inputs = {name: gptq[name] for name in ("unseen",) if name in gptq}
    return of_inputs, {name: value for name, value in gptq.items() if name not in of_inputs}


def _unknown(output: Any) -> Any:
    """A copy, of whatever structure, with NaN for each number of its tensors of floats."""
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(output, memo)
    for made in memo.values():
        if isinstance(made, Tensor) and made.is_floating_point():
            made.fill_(torch.nan)
    return copied


def _detached(leaf: Any) -> Any:
    """A tensor without its graph, with which it could not be copied."""
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


class _Alone(Module):
    """A layer by itself, whose tensors have the names that they have in the model."""

    def __init__(self, path: str, layer: Module) -> None:
        super().__init__()
        *above, last = path.split(".")
        parent: Module = self
        for name in above:
            parent.add_module(name, Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, layer)
        self.forward = layer.__call__


class _Run:
    """One calibration of a model. The last part is what lies outside the layers."""

    def __init__(
        self,
        fq: "Transform",
        model: Module,
        path: str,
        listed: Sequence[Module],
        given: Sequence[Any],
        gptq: Mapping[str, Any] | None,
        forward: Forward | None,
        unseen: str | float,
        store: LayerStore,
    ) -> None:
        self.fq, self.model, self.path, self.listed, self.store = fq, model, path, listed, store
        self.gptq, self.forward, self.unseen = gptq, forward, unseen
        self.use = InUse(CALLER, model.named_modules(), nests=True)
        self.batches = [SteppedForward(number, one, model, forward, self.use) for number, one in enumerate(given)]
        self.passing: Callable[[], AbstractContextManager[object]] = nullcontext
        self.of_outside = self._within(lambda of: _part_of(of, path) is None)

    def parameters_and_state(self) -> tuple[Mapping[str, Tensor], State]:
        parts: list[list[str]] = [[] for _ in range(len(self.listed) + 1)]
        stored = self.model.state_dict(keep_vars=True)
        own = dict(self.model.named_parameters()) | {n: t for n, t in self.model.named_buffers() if n in stored}
        for name in own:
            number = _part_of(name, self.path)
            parts[-1 if number is None else number].append(name)
        options = f"{self.fq!r} gptq={self.gptq!r} unseen={self.unseen!r} layers={self.path!r}"
        # Of a mapping that is no dict, such as transformers' BatchEncoding, optree has no leaves.
        given: Any = [dict(one) if isinstance(one, Mapping) else one for one in (b.given for b in self.batches)]
        leaves = [
            leaf if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in optree.tree_leaves(given)
            if isinstance(leaf, Tensor | bool | int | float | str)
        ]
        about = [self.fq.spec.to_json(), options, *leaves]
        state: State = {}
        with torch.no_grad(), self.store.using(self.fq, self.model, parts, about), self.use, self.use:
            # What layers write into buffers as they run goes into copies.
            self.use.exchange(self.model, {name: buffer.clone() for name, buffer in self.model.named_buffers()})
            self.use.exchange(self.model, self.store.load(len(self.listed)))
            outside = [name for name, _ in self.model.named_buffers() if _part_of(name, self.path) is None]
            self._check_values([*parts[-1], *outside])
            for number, layer in enumerate(self.listed):
                self.use.hook_before(layer, partial(self._arrive, number), prepend=True, with_kwargs=True)
                # First, as the hooks of the user come after what stands in for a layer, too.
                self.use.hook_after(layer, partial(self._leave, number), prepend=True)
            self.use.undo.append(self._end)
            self._advance(0)
            for number in progress(range(len(self.listed)), CALLER):
                state |= self._layer(number)
            state |= self._outside(parts[-1])
            state = {group.key: state[group.key] for group in self.fq.spec.all_groups}
            return self.store.finish(state), state

    def _end(self) -> None:
        for batch in self.batches:
            batch.end()

    # In the threads of the batches.

    def _arrive(self, number: int, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = threading.current_thread()
        if isinstance(batch, SteppedForward) and batch in self.batches:
            batch.arrive(number, args, kwargs)

    def _leave(self, number: int, module: Module, args: Any, output: Any) -> None:
        batch = threading.current_thread()
        if isinstance(batch, SteppedForward) and batch in self.batches:
            batch.leave()
            if number == len(self.listed) - 1 and self.of_outside.spec.groups:
                batch.output = copy.deepcopy(output)  # what follows may write into it

    # In the thread of the caller.

    def _advance(self, layer: int) -> None:
        """Let each batch go on to a layer, or, behind the last one, to its end."""
        path, wanted = _dotted(self.path), None if layer == len(self.listed) else layer
        for batch in self.batches:
            batch.within = self.passing()
            batch.advance()
            if batch.at == wanted:
                continue
            if batch.at is not None and batch.at < layer:
                found = f"'{path}{batch.at}' called twice"
            elif batch.at is None:
                found = f"'{path}{wanted}' not called"
            else:
                found = f"'{path}{batch.at}' called before '{path}{wanted}'"
            raise ValueError(
                f"layers: found {found} in batch {batch.number}, wanted each of {len(self.listed)} layers called once "
                "in each forward, in the order of the list"
            )

    def _layer(self, number: int) -> State:
        """Calibrate the layer that the batches wait before, and let them go through it."""
        name = f"{_dotted(self.path)}{number}"
        layer = _Alone(name, self.listed[number])
        fq = self._within(lambda of: _part_of(of, self.path) == number)
        with InUse(CALLER, ()) as use, use:
            use.exchange(layer, self.store.load(number))
            params: dict[str, Tensor] = dict(layer.named_parameters())
            self._check_values([*params, *dict(layer.named_buffers())])
            params, state = self._part(number, fq, params, layer, self._again)
            use.exchange(layer, fq.fakequant(params, state))
            self.passing = lambda: fq.quantized_inputs(layer, state)
            self._advance(number + 1)
            self.passing = nullcontext
        return state

    def _again(self, call: Callable[..., Any], batch: SteppedForward) -> None:
        """Run a layer on copies of its arguments. The model's own parts are no copies."""
        memo = {id(one): one for one in (*self.model.modules(), *self.model.parameters(), *self.model.buffers())}
        args, kwargs = copy.deepcopy((batch.args, batch.kwargs), memo)
        call(*args, **kwargs)

    def _check_values(self, names: Sequence[str]) -> None:
        """Raise ValueError for a tensor on meta."""
        here = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        if on_meta := [name for name in names if name in here and here[name].is_meta]:
            raise ValueError(
                f"tensor {on_meta[0]!r}: found on meta ({len(on_meta)} of {len(names)} here), wanted values; load the "
                "weights, or pass store=fqt.export.LayerFiles(folder), which reads those of a layer at a time. Buffers "
                "that no folder has need values, as under accelerate.init_empty_weights()"
            )

    def _outside(self, names: Sequence[str]) -> State:
        """Calibrate what lies outside the layers, each of which stands still: the last one gives what it gave.

        Those before it give NaN, as what they gave is gone. Nothing outside may read it, and NaN shows what does.
        """
        params: dict[str, Tensor] = {n: tensor for n, tensor in self.model.named_parameters() if n in names}
        output: Any = None

        def again(call: Callable[..., Any], batch: SteppedForward) -> None:
            nonlocal output
            output = batch.output
            run_batch(call, batch.given, self.forward)

        *before, last = self.listed
        for layer in before:
            self.use.stand_in(layer, lambda *args, **kwargs: _unknown(output))
        self.use.stand_in(last, lambda *args, **kwargs: copy.deepcopy(output))
        try:
            return self._part(len(self.listed), self.of_outside, params, self.model, again)[1]
        except ValueError as error:
            error.add_note(
                f"{CALLER}: weights outside of {self.path!r} may read what its last layer gives; what those before it "
                "give is NaN to them. Move what lies between layers, or adds up their outputs, into the layers; or "
                "leave these weights out with a rule to None"
            )
            raise

    def _within(self, is_inside: Callable[[str], bool]) -> "Transform":
        """The Transform of some of the weights."""
        groups = tuple(group for group in self.fq.spec.groups if is_inside(group.names[0]))
        inputs = tuple(group for group in self.fq.spec.inputs if is_inside(group.names[0]))
        return replace(self.fq, spec=Spec(groups, (), inputs))

    def _part(
        self, part: int, fq: "Transform", params: dict[str, Tensor], model: Module, forward: Forward
    ) -> tuple[dict[str, Tensor], State]:
        """The weights of a part, moved by GPTQ, and its state: made, or as an earlier run has left them."""
        state = self.store.state_of(part)
        if state is not None:
            devices = {group.key: params[group.names[0]].device for group in fq.spec.all_groups}
            return params, {
                key: {name: leaf.to(devices[key]) for name, leaf in leaves.items()} for key, leaves in state.items()
            }
        state, moved = fq.calibrate(params, self.batches, model=model, forward=forward), params
        state = fq.fill_unseen(state, unseen=self.unseen, params=params)
        if self.gptq is not None and fq.spec.groups:
            of_inputs, options = _split(self.gptq)
            hessians = fq.input_hessians(params, self.batches, model=model, forward=forward, **of_inputs)
            moved = moved_by_gptq(fq, params, state, hessians, **options)
        self.store.keep(part, fq, {n: w for n, w in moved.items() if w is not params[n]}, state)
        return dict(moved), state
