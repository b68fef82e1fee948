"""`transform`: a static spec to a `Transform`, the pure functions closed over it."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.apply import apply
from fq_transforms.activations.observe import Forward
from fq_transforms.activations.unseen import finish
from fq_transforms.calibrate import calibrate
from fq_transforms.choose import check_method
from fq_transforms.fakequant import check_options, fakequant
from fq_transforms.methods import MAX, Method
from fq_transforms.ops.quantize.autograd import Backward
from fq_transforms.pack import PackedTree, pack, unpack
from fq_transforms.rounding import Stochastic
from fq_transforms.spec import Spec
from fq_transforms.state import State, init

__all__ = ["Transform", "transform"]


class Init(Protocol):
    """`init(params) -> state`."""

    def __call__(self, params: Mapping[str, Tensor]) -> State: ...


class Calibrate(Protocol):
    """`calibrate(params, batch, statistics=None) -> state`."""

    def __call__(
        self,
        params: Mapping[str, Tensor],
        batch: Any = None,
        *,
        statistics: Mapping[str, Tensor] | None = None,
        forward: Forward | None = None,
    ) -> State: ...


class Fakequant(Protocol):
    """`fakequant(params, state, rounding=None) -> params`."""

    def __call__(
        self, params: Mapping[str, Tensor], state: State, *, rounding: Stochastic | None = None
    ) -> dict[str, Tensor]: ...


class Pack(Protocol):
    """`pack(params, state) -> packed`."""

    def __call__(self, params: Mapping[str, Tensor], state: State) -> PackedTree: ...


class Unpack(Protocol):
    """`unpack(packed) -> params`."""

    def __call__(self, packed: PackedTree, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]: ...


class Apply(Protocol):
    """`apply(params, state, *args, **kwargs)`."""

    def __call__(self, params: Mapping[str, Tensor], state: State, /, *args: Any, **kwargs: Any) -> Any: ...


class Finish(Protocol):
    """`finish(state) -> state`."""

    def __call__(
        self, state: State, *, unseen: str | float = "raise", params: Mapping[str, Tensor] | None = None
    ) -> State: ...


class Transform(NamedTuple):
    """Pure functions closed over a spec, and what they are closed over.

    Attributes:
        init: `init(params) -> state`, the identity of `merge`; see `fq_transforms.state.init`.
        calibrate: `calibrate(params, batch, statistics=None) -> state`; see `fq_transforms.calibrate.calibrate`.
        fakequant: `fakequant(params, state) -> params`; see `fq_transforms.fakequant.fakequant`.
        pack: `pack(params, state) -> packed`; see `fq_transforms.pack.pack`.
        unpack: `unpack(packed, dtype=torch.bfloat16) -> params`; see `fq_transforms.pack.unpack`.
        spec: What is quantized, and how.
        backward: The rule of the gradient: "pass_through", "clip" or "lsq".
        apply: `apply(params, state, *args, **kwargs)`, the output of the model with weights and inputs quantized; see
            `fq_transforms.activations.apply.apply`.
        finish: `finish(state, unseen="raise") -> state`; see `fq_transforms.finish`.
    """

    init: Init
    calibrate: Calibrate
    fakequant: Fakequant
    pack: Pack
    unpack: Unpack
    spec: Spec
    backward: Backward
    apply: Apply
    finish: Finish


def transform(
    spec: Spec,
    *,
    model: Module | None = None,
    out_dtype: torch.dtype | None = None,
    backward: Backward = "pass_through",
    separate: bool = False,
    method: Method = MAX,
) -> Transform:
    """The functions that quantize by a spec.

    Args:
        spec: From `select`.
        model: Whose parameters the spec was selected from: `apply` runs it, and `calibrate` where inputs are selected.
        out_dtype: dtype of the fake-quantized weights; their own if None.
        backward: "pass_through", "clip" or "lsq"; see `fq_transforms.fakequant.fakequant`.
        separate: True gives each fake-quantized weight memory of its own on a GPU, in place of one allocation a group.
        method: How `calibrate` chooses an amax; see `fq_transforms.methods`.

    Raises:
        ValueError: `spec` is no Spec, an option is not one of its choices, or a format has no amax that the method
            could choose.

    Example:
        >>> import fq_transforms as fqt
        >>> from torch.func import functional_call
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4, bias=False))
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.MXFP4}))
        >>> state = fq.calibrate(params)
        >>> functional_call(model, fq.fakequant(params, state), (torch.ones(2, 32),)).shape
        torch.Size([2, 4])
    """
    if not isinstance(spec, Spec):  # pyright: ignore[reportUnnecessaryIsInstance] (rules are passed by mistake)
        raise ValueError(f"spec: found {type(spec).__name__}, wanted a Spec; call transform(select(params, rules))")
    check_options(out_dtype, backward)
    check_method(method, None, spec)
    options: dict[str, Any] = {"out_dtype": out_dtype, "backward": backward, "separate": separate}

    def run(params: Mapping[str, Tensor], state: State, /, *args: Any, **kwargs: Any) -> Any:
        if model is None:
            raise ValueError(
                "model: found None, wanted the module that `apply` runs; call transform(spec, model=model)"
            )
        return apply(model, params, state, args, kwargs, spec=spec, **options)

    return Transform(
        init=partial(init, spec=spec),
        calibrate=partial(calibrate, spec=spec, method=method, model=model),
        fakequant=partial(fakequant, spec=spec, **options),
        pack=partial(pack, spec=spec),
        unpack=partial(unpack, spec=spec),
        spec=spec,
        backward=backward,
        apply=run,
        finish=partial(finish, spec=spec),
    )
