"""Readers of a selected weight other than its layer: while a model runs, they would get it unquantized.

A parent that reads its child's weight before it calls the child (transformers' DBRX) is the usual one. So while a
module runs, its `_parameters` gives such a reader a tensor of the weight's shape and dtype, which raises when it is
computed with. Whoever goes over a module's parameters, as `named_parameters()` and optimizers do, sees them as always.

NOTE torch.compile: what it compiled before checks the type of `_parameters`, finds another, and so looks again, and
sees the hooks of the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.training.wrapped import OTHER_WAY, check_eager

__all__ = ["Guarded"]

# What a reader may ask a weight for.
_FACTS = {
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "get_device", "type", "__len__", "__hash__", "__get__"),
}


class Guarded(dict[str, Tensor | None]):
    """A module's `_parameters`, of which some are only for their layer.

    Args:
        module: Whose.
        names: Attributes to the names of those parameters.
        is_refused: True for an attribute that is read by another than its layer.

    It takes the dict's place in `stand_in`, until `put_back`, which may be called before that, and again.
    """

    def __init__(self, module: Module, names: Mapping[str, str], is_refused: Callable[[str], bool]) -> None:
        self.module, self.names, self.is_refused = module, names, is_refused
        self.own: dict[str, Tensor | None] = vars(module)["_parameters"]
        super().__init__(self.own)

    def stand_in(self) -> None:
        """From now on the module has this one."""
        vars(self.module)["_parameters"] = self

    def __getitem__(self, attribute: str) -> Tensor | None:
        tensor = super().__getitem__(attribute)
        if tensor is not None and attribute in self.names and self.is_refused(attribute):
            check_eager(self.module)  # its forward may be compiled, and then is called without its hooks
            return _Unquantized.of(tensor, self.names[attribute], type(self.module).__name__)
        return tensor

    def __setitem__(self, attribute: str, tensor: Tensor | None) -> None:
        """Whoever puts back what it has taken out, such as `functional_call`, puts back the weight."""
        super().__setitem__(attribute, tensor.own if isinstance(tensor, _Unquantized) else tensor)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy of the model is not guarded

    def put_back(self) -> None:
        """The module has the dict that it had, with what is in it now: at no time without its parameters."""
        if vars(self.module)["_parameters"] is not self:
            return
        for attribute in self.own.keys() - self.keys():
            del self.own[attribute]
        self.own.update(self)
        vars(self.module)["_parameters"] = self.own


class _Unquantized(Tensor):
    """Stands for a weight that is not to be computed with: answers what it is, holds NaN, and raises otherwise."""

    own: Tensor
    parameter: str
    layer: str
    _is_param: bool

    @staticmethod
    def of(own: Tensor, name: str, layer: str) -> "_Unquantized":
        stand_in = torch.full((), torch.nan, dtype=own.dtype, device=own.device).expand(own.shape)
        found = stand_in.as_subclass(_Unquantized)
        vars(found).update(vars(own))
        found.own, found.parameter, found.layer = own, name, layer
        found._is_param = isinstance(own, torch.nn.Parameter)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func.__name__ in _FACTS and isinstance(first, _Unquantized):
            answer = func(first.own, *args[1:], **(kwargs or {}))
            if not isinstance(answer, Tensor):
                return answer
        found = next(t for t in _flat((args, kwargs)) if isinstance(t, _Unquantized))
        raise ValueError(
            f"parameter {found.parameter!r}: found that it is read outside the forward of its layer, {found.layer}, "
            "where it is not quantized, wanted its layer alone to compute with it; call "
            f"functional_call(model, fq.fakequant(params, state), ...), or {OTHER_WAY}"
        )


def _flat(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _flat(branch)
    elif isinstance(tree, dict):
        yield from _flat(list(tree.values()))
    else:
        yield tree
