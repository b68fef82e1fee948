"""How much quantizing some weights is felt: by the weights, by the outputs of their layers, or by a loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.func import jvp

from fq_transforms.calibrate import importance_of
from fq_transforms.checks import weights_of
from fq_transforms.formats import Format
from fq_transforms.gptq import check_hessian
from fq_transforms.report.report import group_report
from fq_transforms.spec import Group, Spec
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = ["Hessians", "Loss", "Sensitivities", "Sensitivity"]

Sensitivity = Literal["report", "hessian", "loss", "jvp"]
Loss: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
Hessians: TypeAlias = Mapping[str, Tensor | Mapping[str, Tensor]]
# Of a parameter's experts: second moments of inputs, [E, in], [E, in / B, B, B] or [E, in, in]; how often each counts.
_Moments: TypeAlias = tuple[Tensor, list[float]]


class Sensitivities:
    """What each format costs some groups: see `search`.

    Raises:
        KeyError: The Hessian of a group is missing.
        ValueError: A Hessian is not of its group.
    """

    def __init__(
        self, fq: Transform, params: dict[str, Tensor], kind: Sensitivity, loss: Loss | None, hessians: Hessians | None
    ) -> None:
        self.fq, self.params, self.kind = fq, params, kind
        self.loss: Any = loss
        self.moments = {} if hessians is None else _moments_by_name(params, fq.spec, hessians)
        self.base = self.loss_of({}).item() if kind == "loss" else 0.0

    def of(self, name: str, groups: Sequence[Group], format: Format | None) -> float:
        """What a format costs groups that have it together, which are called by a name in messages.

        Raises:
            ValueError: It is not finite; the loss is no scalar.
        """
        if format is None:
            return 0.0
        fq = replace(self.fq, spec=Spec(tuple(replace(group, format=format) for group in groups)))
        own = {name: self.params[name] for group in groups for name in group.names}
        kinds = {"report": self.report, "hessian": self.hessian, "loss": self.increase, "jvp": self.curvature}
        found = kinds[self.kind](fq, own, fq.calibrate(own))
        if not isfinite(found):
            raise ValueError(
                f"sensitivity {self.kind!r}: found {found} for {name!r} in {format.name}, wanted a finite number"
            )
        return found

    def report(self, fq: Transform, own: dict[str, Tensor], state: State) -> float:
        """Sum of e^2."""
        return sum(group_report(own, state[group.key], group).noise.sum().item() for group in fq.spec.groups)

    def hessian(self, fq: Transform, own: dict[str, Tensor], state: State) -> float:
        """Sum of tokens * trace(e H e^T), or of e^2 m, or of e m e^T of each block."""
        fakes, found = replace(fq, out_dtype=torch.float32).fakequant(own, state), 0.0
        for group in fq.spec.groups:
            for name in group.names:
                weights, outs = (tensor if group.stacked else tensor[None] for tensor in (own[name], fakes[name]))
                for weight, fake, moment, count in zip(weights, outs, *self.moments[name], strict=True):
                    error = (fake - weight.float()).mT if group.transposed else fake - weight.float()
                    found += count * _form(error, moment)
        return found

    def increase(self, fq: Transform, own: dict[str, Tensor], state: State) -> float:
        """loss(w + e) - loss(w)."""
        return self.loss_of(fq.fakequant(own, state)).item() - self.base

    def curvature(self, fq: Transform, own: dict[str, Tensor], state: State) -> float:
        """E'L''e / 2. The first order is zero at a minimum; a sample's is that sample's chance."""
        fakes = fq.fakequant(own, state)
        errors = {name: (fakes[name].float() - weight.float()).to(weight.dtype) for name, weight in own.items()}

        def at(t: Tensor) -> Tensor:
            return self.loss_of({name: own[name] + t.to(error.device) * error for name, error in errors.items()})

        def slope(t: Tensor) -> Tensor:
            return jvp(at, (t,), (torch.ones(()),))[1]

        try:
            second = jvp(slope, (torch.zeros(()),), (torch.ones(()),))[1]
        except (NotImplementedError, RuntimeError) as error:
            error.add_note(
                "sensitivity 'jvp': wanted a loss of operations with two forward derivatives, which PyTorch's fused "
                "attention, grouped products and silu lack; 'hessian' and 'loss' need none"
            )
            raise
        return second.item() / 2

    def loss_of(self, moved: dict[str, Tensor]) -> Tensor:
        """The loss where some weights are others."""
        found = self.loss(self.params | moved)
        if not isinstance(found, Tensor) or found.numel() != 1:
            kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"loss: found {kind}, wanted a function of all parameters to a scalar tensor")
        return found.reshape(())


def _form(error: Tensor, moments: Tensor) -> float:
    """trace(e M e^T) of [out, in], by M's diagonal [in], its blocks [in / B, B, B], or all of it."""
    if moments.dim() == 1:
        outputs = error * moments
    elif moments.dim() == 2:
        outputs = error @ moments
    else:
        error = error.unflatten(-1, moments.shape[:2]).transpose(0, 1)
        outputs = error @ moments
    return (outputs * error).sum(dtype=torch.float64).item()


def _moments_by_name(params: Mapping[str, Tensor], spec: Spec, hessians: Hessians) -> dict[str, _Moments]:
    found: dict[str, _Moments] = {}
    checked: set[int] = set()
    for group in spec.groups:
        if group.key not in hessians:
            raise KeyError(f"hessians: found none of group {group.key!r}, among {len(hessians)}")
        moments, counts = _moments(params, group, hessians, checked)
        for expert, name in enumerate(group.names):
            own = slice(None) if group.stacked else slice(expert, expert + 1)
            found[name] = moments[own], counts[own]
    return found


def _moments(params: Mapping[str, Tensor], group: Group, hessians: Hessians, checked: set[int]) -> _Moments:
    """Of all experts of a group; `checked` as `check_hessian` takes it."""
    found, weights = hessians[group.key], weights_of(params, group)
    if not isinstance(found, Mapping):
        importance = importance_of(group, weights, cast("Mapping[str, Tensor]", hessians))
        assert importance is not None
        return importance, [1.0] * group.experts
    check_hessian(group, found, weights[0].device, checked)
    counts: list[float] = found["tokens"].double().tolist()
    return found["hessian"].detach(), counts
