"""Where a model's tensors hang, to take them out and put others in their place.

`torch.func.functional_call` does so one tensor at a time and takes 2 us of the host for each, longer than it takes
to fake-quantize it. Here a module's tensors are exchanged in one go.
"""

from collections.abc import Collection, Iterable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["Places", "Slots", "slots_of", "tensors_in"]


class Slots:
    """Places in modules by the names of what hangs there; a tied tensor has several."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[Module, str], tuple[list[str], list[str]]] = {}

    def add(self, name: str, module: Module, attribute: str, *, kind: str = "_parameters") -> None:
        """One more place: `kind` is where modules have it, `_parameters` or `_buffers`."""
        attributes, names = self.attributes.setdefault((module, kind), ([], []))
        attributes.append(attribute)
        names.append(name)

    def take(self) -> dict[str, Tensor]:
        """What hangs there now.

        Raises:
            KeyError: A place is gone.
        """
        found: dict[str, Any] = {}
        for (module, kind), (attributes, names) in self.attributes.items():
            found.update(zip(names, map(vars(module)[kind].get, attributes), strict=True))
        if any(tensor is None for tensor in found.values()):
            self._complain()
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensor of each name in all its places."""
        for (module, kind), (attributes, names) in self.attributes.items():
            vars(module)[kind].update(zip(attributes, map(tensors.__getitem__, names), strict=True))

    def _complain(self) -> None:
        for (module, kind), (attributes, names) in self.attributes.items():
            for attribute, name in zip(attributes, names, strict=True):
                if vars(module)[kind].get(attribute) is None:
                    raise KeyError(f"parameter {name!r} is not in {type(module).__name__} any more")


def tensors_in(module: Module, kind: str = "_parameters") -> dict[str, Tensor | None]:
    """A module's own tensors, for reading.

    Raises:
        ValueError: The module is TorchScript's.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"found {type(module).__name__}, wanted a module whose tensors Python holds")
    return vars(module)[kind]


def slots_of(model: Module, names: Collection[str]) -> Slots:
    """Places of parameters and buffers in a model, those too that share a named tensor under another name.

    Raises:
        KeyError: A name is not in the model.
        ValueError: Two names are of one tensor; a module is TorchScript's, whose tensors cannot be exchanged so.
    """
    slots, known, others = Slots(), dict[int, str](), list[tuple[Tensor, Module, str, str]]()
    found = set[str]()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for kind in ("_parameters", "_buffers"):
            for attribute, tensor in tensors_in(module, kind).items():
                name = prefix + attribute
                if tensor is None:
                    continue
                if name in names:
                    if (tied := known.setdefault(id(tensor), name)) != name:
                        raise ValueError(
                            f"parameters {tied!r} and {name!r} are one tensor of the {type(model).__name__}, wanted "
                            "one of the names; named_parameters() has each tensor once"
                        )
                    slots.add(name, module, attribute, kind=kind)
                    found.add(name)
                else:
                    others.append((tensor, module, attribute, kind))
    for tensor, module, attribute, kind in others:
        if id(tensor) in known:  # tied to a named one
            slots.add(known[id(tensor)], module, attribute, kind=kind)
    if len(found) < len(names):
        missing = next(name for name in names if name not in found)
        raise KeyError(f"parameter {missing!r} is not in the {type(model).__name__}; pass its own named_parameters()")
    return slots


class Places:
    """The slots of a model, looked for again where its modules or tensors are not those of the last time."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self.names: list[str] = []
        self.known: list[object] = []
        self.slots = Slots()
        self._own: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def find(self, names: Iterable[str]) -> Slots:
        """`slots_of` these names; what hangs there now, `put_back` will put there again."""
        wanted = list(names)
        names, found = [*wanted], list[object]()
        modules, seen = [self.model], {self.model}
        for module in modules:  # and those that are added below; `named_modules` makes names that are not needed
            for kind in ("_parameters", "_buffers"):
                tensors = tensors_in(module, kind)
                names += tensors
                found += tensors.values()
            children: dict[str, Module | None] = vars(module)["_modules"]
            names += children
            found += children.values()
            for child in children.values():
                if child is not None and child not in seen:
                    modules.append(child)
                    seen.add(child)
        if names != self.names or len(found) != len(self.known) or not all(map(is_, found, self.known)):
            self.slots, self.names, self.known = slots_of(self.model, wanted), names, found
            own = self.slots.take()
            self._own = [
                (vars(module)[kind], {attribute: own[name] for attribute, name in zip(*places, strict=True)})
                for (module, kind), places in self.slots.attributes.items()
            ]
        return self.slots

    def put_back(self) -> None:
        """Put what hung there in its places."""
        for holder, own in self._own:
            holder.update(own)
