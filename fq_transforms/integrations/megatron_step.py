"""`Attached`: what `megatron.attach` puts around the step of a Megatron optimizer, and how it is taken off again.

NOTE where it hooks: Megatron calls nothing of a user's between an optimizer's step and its copy of the main parameters
to the model. So methods of this one instance, and of no class, are replaced, in `Attached.__init__` and nowhere else:
`step_with_ready_grads`, which runs only where no gradient was infinite, and after which all chained optimizers have
stepped; the copy of main parameters that our write takes the place of; the copy back, which would read fake weights;
and under "clip" `prepare_grads`, after which main parameters have their gradients, before their norm is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import fq_transforms as fqt
from fq_transforms.rounding import of_step
from fq_transforms.state import State
from fq_transforms.training.optimizer import Recalibrate

__all__ = ["Attached"]

_STEP, _PREPARE = "step_with_ready_grads", "prepare_grads"
_CAST, _RELOAD = "_copy_main_params_to_model_params", "_copy_model_params_to_main_params"


class Attached:
    """A Megatron optimizer whose step leaves fake weights in the model; from `megatron.attach`.

    Attributes:
        masters: Names to the main parameters, in fp32; of frozen selected weights their own values; all others as they
            are in the model. With DistributedOptimizer, whose main parameters are flat ranges of other ranks too, the
            model's own parameters: masters only while `recalibrate` runs, and after `cast`.
        quantizer_state: What the next write quantizes with. To set it writes nothing: call `write`.
        step: How many steps there were. Save it with the state and set it before `write`: rounding draws from it.
    """

    def __init__(
        self,
        fq: fqt.Transform,
        optimizer: Any,
        parts: Sequence[Any],
        masters: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        state: State,
        *,
        recalibrate: Recalibrate | None,
        rounding: fqt.Stochastic | None,
        is_distributed: bool,
    ) -> None:
        self.masters: Mapping[str, Tensor] = MappingProxyType(dict(masters))
        self.quantizer_state = state
        self.step = 0
        self._fq, self._optimizer, self._parts, self._params = fq, optimizer, parts, params
        self._recalibrate, self._rounding, self._is_distributed = recalibrate, rounding, is_distributed
        self._own_step: Callable[[], bool] = getattr(optimizer, _STEP)
        self._own_prepare: Callable[[], bool] = getattr(optimizer, _PREPARE)
        self._is_attached = True
        self.write()  # before anything is replaced: what it refuses leaves the optimizer as it was
        self._replaced: list[tuple[Any, str, Callable[..., Any]]] = []
        try:
            self._replace(optimizer, _STEP, self._step)
            if fq.backward == "clip":
                self._replace(optimizer, _PREPARE, self._prepare)
            for part in parts:
                self._replace(part, _RELOAD, _reloading(getattr(part, _RELOAD)))
                if not is_distributed:
                    self._replace(part, _CAST, lambda: None)
        except BaseException:
            self._give_back()
            raise

    def __repr__(self) -> str:
        kinds = ", ".join(type(part).__name__ for part in self._parts)
        return f"Attached({kinds}; step {self.step}{'' if self._is_attached else '; detached'})"

    @torch.no_grad()
    def write(self) -> None:
        """Write fake weights of the masters into the model: after a checkpoint is loaded, and after `cast`.

        With DistributedOptimizer a collective over its ranks, as its step is.
        """
        self._check_attached()
        if self._is_distributed:
            self.cast()
        self._write()

    @torch.no_grad()
    def cast(self) -> None:
        """Write the masters into the model, unquantized: for an evaluation, or to save the model by itself.

        With DistributedOptimizer a collective over its ranks. `write` brings the fake weights back.
        """
        if self._is_distributed:
            for part in self._parts:
                getattr(type(part), _CAST)(part)
            for chunk in self._optimizer.model_chunks:
                chunk.start_param_sync()
        fqt.cast(self.masters, out=self._params)

    def detach(self) -> None:
        """Give the optimizer its own step back, and the model its masters, unquantized."""
        self._check_attached()
        self._give_back()
        self.cast()
        self._is_attached = False  # last: what interrupts may call it once more

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._replaced.append((owner, name, function))  # before it is done, as an interrupt may follow
        if vars(owner).setdefault(name, function) is not function:  # in one instruction, as threads may attach at once
            raise ValueError("optimizer: found it attached already, wanted attached.detach() first")

    def _give_back(self) -> None:
        """The optimizer has its own methods again. Once more is no fault."""
        for owner, name, function in self._replaced:
            if vars(owner).get(name) is function:
                delattr(owner, name)

    def _check_attached(self) -> None:
        if not self._is_attached:
            raise ValueError("attached: found that it is detached, wanted one in use; call megatron.attach again")

    @torch.no_grad()
    def _step(self) -> bool:
        done = self._own_step()  # DistributedOptimizer's casts and gathers, too
        self.step += 1
        if self._recalibrate is not None:
            state = self._recalibrate(self.step, self.masters, self.quantizer_state)
            self.quantizer_state = self.quantizer_state if state is None else state
        self._write()
        return done

    def _write(self) -> None:
        rounding = of_step(self._rounding, self.step)
        self._fq.fakequant(
            self.masters, self.quantizer_state, rounding=rounding, out=self._params, inplace=self._is_distributed
        )

    @torch.no_grad()
    def _prepare(self) -> bool:
        found_inf = self._own_prepare()
        if not found_inf:
            names = [name for group in self._fq.spec.groups for name in group.names]
            grads = {name: self.masters[name].grad for name in names}
            pulled, _ = self._fq.pullback(self.masters, self.quantizer_state, grads)
            for name, grad in pulled.items():
                self.masters[name].grad = grad
        return found_inf


def _reloading(own: Callable[..., None]) -> Callable[..., None]:
    """The copy of model parameters to main ones, of a `state_dict` only: what the model holds is fake."""

    def reload(state_dict: Any = None) -> None:
        if state_dict is None:
            raise ValueError(
                "reload_model_params: found fake weights in the model, of which no masters can be made, wanted "
                "attached.detach() before the model is loaded, and megatron.attach anew after reload_model_params()"
            )
        own(state_dict=state_dict)

    return reload
