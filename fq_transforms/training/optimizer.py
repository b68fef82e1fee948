"""`FakeQuantOptimizer`: a torch optimizer that steps fp32 masters and leaves their fake weights in the model.

Whatever drives a torch optimizer drives it, because its `param_groups` hold the model's parameters. What to know:

- A step takes the model's gradients away, as `zero_grad()` after it would.
- Clipping norms on the model's parameters sees gradients before the pullback. A hook on the inner optimizer,
  `opt.optimizer.register_step_pre_hook`, sees the masters with theirs in `.grad`.
- Whatever reads the model sees fake weights, moving averages and `save_pretrained` too. Within `opt.unquantized()` it
  holds the masters, cast.
- torch DCP's `get_optimizer_state_dict` keeps what belongs to parameters: masters, the inner optimizer's state and the
  number of the step, all of which it reshards. Save `opt.quantizer_state` beside it, and set it after loading.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fq_transforms.checks import check_same_spread, check_state, check_tensor, is_read
from fq_transforms.dtensor import local_values
from fq_transforms.in_use import InUse, Within
from fq_transforms.masters import cast, masters, tensors_of
from fq_transforms.ops.quantize.reference import TINY_AMAX
from fq_transforms.rounding import Stochastic, check_rounding, check_seed_of_steps, of_step
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.state import State, flatten
from fq_transforms.transform import Transform

__all__ = ["FakeQuantOptimizer", "Recalibrate", "StateOptimizer"]

# (step, masters, state) -> the state of the next forward, or None for the same. Pure; called on all ranks.
Recalibrate: TypeAlias = Callable[[int, Mapping[str, Tensor], State], State | None]
StateOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]

STEP = "fake_quant_step"  # a key of the param groups, which every way to save an optimizer keeps
# Of a learned amax: formats do not divide by less, which has no gradient then, and would stay.
LEAST_AMAX = 2 * TINY_AMAX


class FakeQuantOptimizer(Optimizer):
    """An optimizer around another one, which steps fp32 masters; each step leaves their fake weights in the model.

        masters <- optimizer(masters, pullback(gradients of the model));  model <- fakequant(masters, state)

    The model has fake weights as soon as this is made. `masters` (by name), `optimizer`, the inner one, and
    `quantizer_state` are attributes. What to know when training with it is written at the head of this module.

    Args:
        fq: What is quantized, and how.
        optimizer: Any torch optimizer over the model's parameters. It becomes the inner one, with the state it has.
        model: The module that `fq` was selected on, none that wraps it. FSDP2 comes first.
        state: From `fq.calibrate`, of the unquantized weights.
        recalibrate: `recalibrate(step, masters, state)`, pure, called after inner step number `step` (from 1) and
            before the write. It returns a new state, or None to keep the old one.
        seed: Round at random, anew in each step; a `Stochastic` where a rank has a `first_expert`.
        state_optimizer: With "lsq", what trains the state, as `functools.partial(torch.optim.Adam, lr=1e-4)`: given a
            list of leaves, an optimizer of them all. An amax is kept at 2**-23 or above. Those of frozen weights stay.

    Raises:
        KeyError: A group is missing from the state.
        ValueError: An argument does not fit the others; the message names it. Nothing is changed then.

    Example:
        >>> import fq_transforms as fqt
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        >>> opt = FakeQuantOptimizer(fq, torch.optim.SGD(params.values(), lr=0.1), model, fq.calibrate(params))
    """

    def __init__(
        self,
        fq: Transform,
        optimizer: Optimizer,
        model: Module,
        state: State,
        *,
        recalibrate: Recalibrate | None = None,
        seed: int | Stochastic | None = None,
        state_optimizer: StateOptimizer | None = None,
    ) -> None:
        _check_options(fq, optimizer, model, recalibrate, seed, state_optimizer)
        check_state(state, fq.spec, values=is_read)
        self.fq, self.optimizer, self.model, self.recalibrate = fq, optimizer, model, recalibrate
        self.rounding = Stochastic(seed) if isinstance(seed, int) else seed

        params = tensors_of(model, tied=False)
        self._names = _names_of(optimizer, params, tensors_of(model), fq.spec)
        kept = {*self._names.values(), *_selected(fq.spec.groups)}
        self._params = {name: param for name, param in params.items() if name in kept}
        self.masters = masters(self._params, fq=fq)
        self._untrained = {name for name, master in self.masters.items() if not master.requires_grad}
        # Weights that are frozen are written once for each state, not in each step.
        frozen = [group for group in fq.spec.groups if self._untrained.issuperset(group.names)]
        self._frozen = self._part(frozen, _selected(frozen))
        trained = [group for group in fq.spec.groups if group not in frozen]
        if state_optimizer is not None and not any(state[group.key] for group in trained):
            raise ValueError(
                "state_optimizer: found all selected weights with a state frozen, whose scales are not trained, wanted "
                "a trained one, or backward='pass_through' without a state_optimizer"
            )
        self._trained = self._part(trained, self.masters.keys() - _selected(frozen))

        self._is_made = self._has_state = self._has_taken = False
        self._versions: dict[str, int] = {}
        groups = [{STEP: 0, **group, "params": list(group["params"])} for group in optimizer.param_groups]
        super().__init__(groups, optimizer.defaults)
        self._is_made = True

        self._state, self.state_optimizer = state, None
        if state_optimizer is not None:
            self._state = _mapped(_leaf, state)
            self.state_optimizer = _made_by(state_optimizer, [*flatten(self._state).values()])
            self._keep_positive()
        # All at once, and last, so that an error leaves the model and the given optimizer as they were.
        with _restored(optimizer):
            saved = optimizer.state_dict()
            for group in optimizer.param_groups:  # in place: LBFGS holds on to its list
                group["params"][:] = [self.masters[self._names[param]] for param in group["params"]]
            if saved["state"]:  # as Adagrad's is from the start; it is loaded to get the dtype of the masters
                optimizer.load_state_dict(saved)
                self._has_state = True
            self._write(self._part(fq.spec.groups, self.masters.keys()), self._step)
        self._copied = _options_of(optimizer)

    def _part(self, groups: Sequence[Group], names: Set[str]) -> "_Part":
        only = Transform(Spec(tuple(groups)), out_dtype=self.fq.out_dtype)
        return _Part(only, {name: master for name, master in self.masters.items() if name in names})

    # The model's weights.

    def write(self) -> None:
        """Write the fake weights of the masters into the model, after something else was written there."""
        self._write(self._frozen, 0)
        self._write(self._trained, self._step)

    def _write(self, part: "_Part", step: int) -> None:
        if part.masters:
            part.fq.fakequant(part.masters, **self._arguments(part, step), out=self._model_params())
            self._versions |= {name: self._params[name]._version for name in part.masters}

    def _arguments(self, part: "_Part", step: int) -> dict[str, Any]:
        state = {group.key: self._state[group.key] for group in part.fq.spec.groups}
        return {"state": state, "rounding": of_step(self.rounding, step)}

    def _model_params(self) -> dict[str, Tensor]:
        """The model's parameters, FSDP2's shards, which must be those that this was made with."""
        found = tensors_of(self.model)
        for name, param in self._params.items():
            if found.get(name) is not param:
                raise ValueError(
                    f"parameter {name!r}: found another tensor in the model than when the optimizer was made, wanted "
                    "the same one; shard or replace a model's parameters first, and make the optimizer after that"
                )
        return self._params

    def _check_written(self) -> None:
        """Raise ValueError if a parameter does not hold what was written: the next write would undo what it holds.

        What was changed through `.data` is not noticed, as it counts up no version.

        DDP, which is often made later, writes the first rank's values into all: the same ones, if all began alike.
        """
        for part, step in ((self._frozen, 0), (self._trained, self._step)):
            moved = [name for name in part.masters if self._params[name]._version != self._versions[name]]
            if not moved:
                continue
            wanted = part.fq.fakequant(part.masters, **self._arguments(part, step))
            for name in moved:
                here = local_values(self._params[name])
                if not local_values(wanted[name]).to(here.dtype).equal(here):
                    raise ValueError(
                        f"parameter {name!r}: found other values than the last write's, wanted those, as the next "
                        "write takes their place; load weights, or wrap the model where ranks differ, before the "
                        "optimizer is made; after an evaluation call write()"
                    )
                self._versions[name] = self._params[name]._version

    def unquantized(self) -> AbstractContextManager[None]:
        """Within, the model holds its unquantized weights, cast to its dtypes: to evaluate, average or save it.

        Raises:
            ValueError: On entering: somebody is within it already, who would leave fake weights to the other.
        """
        return _Unquantized(self)

    @property
    def quantizer_state(self) -> State:
        """What the model's fake weights are made with. Setting it writes them. Of "lsq", detached leaves."""
        return self._state if self.state_optimizer is None else _mapped(Tensor.detach, self._state)

    @quantizer_state.setter
    def quantizer_state(self, state: State) -> None:
        check_state(state, self.fq.spec, values=is_read)
        self._set_state(state)
        self.write()

    @torch.no_grad()
    def _set_state(self, state: State) -> None:
        if self.state_optimizer is None:
            self._state = state
        else:  # whose leaves stay the same tensors
            _mapped(Tensor.copy_, self._state, state)
            self._keep_positive()

    @torch.no_grad()
    def _keep_positive(self) -> None:
        for leaf in self._learned():
            leaf.clamp_(min=LEAST_AMAX)

    # A step.

    def take_grads(self) -> None:
        """Move the model's gradients to the masters, as each step does first; after each microbatch to add in fp32."""
        self.fq.take_grads(self._params, self.masters, self._state)
        self._has_taken = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the gradients, step the masters, recalibrate, and write the fake weights.

        Args:
            closure: Evaluates the model, with gradients, before they are taken. Where an optimizer calls it again, as
                LBFGS does, the model has the fake weights of the masters as they are then.

        Returns:
            What the inner optimizer returns, the loss of a closure.

        Raises:
            ValueError: The parameters are no longer those that this was made with, or no longer frozen.
            Exception: Of `state_optimizer` or `recalibrate`, when the masters have stepped: the step counts, its
                gradients are gone, and the model is written.
        """
        try:
            return self._step_masters(closure)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler deletes them only after a step that returns
                vars(self).pop(name, None)
            raise

    def _step_masters(self, closure: Callable[[], float] | None) -> float | None:
        self._check_params()
        if _options_of(self.optimizer) != self._copied:
            raise ValueError(
                "optimizer: found a learning rate scheduler on it, or other changes to its param groups since the last "
                "step, wanted none; schedule the FakeQuantOptimizer, and change its param_groups"
            )
        self._check_written()
        if self._has_taken and hasattr(self, "found_inf"):
            raise ValueError(
                "take_grads: found a call before the step of a GradScaler, which has not seen those gradients, wanted "
                "none; the step takes them"
            )
        if float(getattr(self, "found_inf", 0.0)):
            return None
        is_counted = closure is not None or not self._is_asked_for_state()
        _copy_options(self.param_groups, self.optimizer.param_groups)
        try:
            if closure is None:
                self.take_grads()
                self._unscale()
                loss = self.optimizer.step()
            else:
                loss = self.optimizer.step(self._evaluation(closure))
        finally:
            _copy_options(self.optimizer.param_groups, self.param_groups)  # where some count
            self._copied = _options_of(self.optimizer)
        self._has_state, self._has_taken = True, False
        try:
            if is_counted and self.state_optimizer is not None:
                self.state_optimizer.step()
        finally:
            for leaf in self._leaves():
                leaf.grad = None
            if is_counted:
                self._advance()
        return loss

    def _advance(self) -> None:
        """All of a step that comes after masters and state; the model is written though a recalibration fails."""
        self._keep_positive()
        for group in self.param_groups:
            group[STEP] += 1
        state = None
        try:
            if self.recalibrate is not None:
                state = self.recalibrate(self._step, self.masters, self._state)
            if state is not None:
                check_state(state, self.fq.spec, values=is_read)
                self._set_state(state)
                self._write(self._frozen, 0)
        finally:
            self._write(self._trained, self._step)

    def _evaluation(self, closure: Callable[[], float]) -> Callable[[], float]:
        calls = count()

        def evaluate() -> float:
            if next(calls):
                self._write(self._trained, self._step)
            with torch.enable_grad():
                loss = closure()
            self.take_grads()
            return loss

        return evaluate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters, `main_grad` too, and what `take_grads` has moved already."""
        self._has_taken = False
        super().zero_grad(set_to_none)
        for param in self._names:
            if (main := getattr(param, "main_grad", None)) is not None:
                main.zero_()
        for leaf in self._leaves():
            if set_to_none:
                leaf.grad = None
            elif leaf.grad is not None:
                leaf.grad.zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError: which parameters are trained is settled when this is made."""
        if self._is_made:
            raise ValueError("add_param_group: found a new param group, wanted none; make a new FakeQuantOptimizer")
        super().add_param_group(param_group)

    @property
    def _step(self) -> int:
        return self.param_groups[0][STEP]

    def _learned(self) -> Iterable[Tensor]:
        return () if self.state_optimizer is None else flatten(self._state).values()

    def _leaves(self) -> list[Tensor]:
        """All that gradients are moved to."""
        return [*self.masters.values(), *self._learned()]

    def _check_params(self) -> None:
        found = [*chain(*(group["params"] for group in self.param_groups))]
        if len(found) != len(self._names) or not all(map(is_, found, self._names)):
            raise ValueError(
                "param_groups: found other parameters than the optimizer was made with, wanted the same ones; shard or "
                "replace a model's parameters first, and make the optimizer after that"
            )
        for param, name in self._names.items():
            if param.grad is not None and name in self._untrained:
                raise ValueError(
                    f"parameter {name!r}: found a gradient, wanted none, as it was frozen when the optimizer was made; "
                    "make a new one"
                )

    # GradScaler: of an optimizer with this attribute it looks for infinities only, and sets `grad_scale` and
    # `found_inf` for the step. fp16 gradients it would refuse to unscale.
    _step_supports_amp_scaling = True

    def _unscale(self) -> None:
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            for grad in [leaf.grad for leaf in self._leaves() if leaf.grad is not None]:
                local_values(grad).mul_(1.0 / float(scale))

    # Saving and loading.

    @property
    def state(self) -> Any:
        """Each parameter's master, beside the inner optimizer's state for it; nothing before there is such state.

        Then torch DCP makes it, before it saves or loads, by a step of zero gradients with lr 0.
        """
        inner, named = self.optimizer.state, self._names.items() if self._has_state else ()
        return {
            param: {"master": self.masters[name].detach(), **inner.get(self.masters[name], {})} for param, name in named
        }

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What PyTorch's constructor sets is not kept: the state is made where it is asked for."""

    def _is_asked_for_state(self) -> bool:
        lrs = [group["lr"] for group in self.param_groups if "lr" in group]
        if self._has_state or not lrs or any(map(float, lrs)):
            return False
        grads = [param.grad for param in self._names if param.requires_grad]
        return all(grad is not None and not local_values(grad).any() for grad in grads)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with a "master" in each parameter's state, and "quantizer" beside.

        The latter has the quantizer's "state", masters of "frozen" weights, and the "optimizer" of "lsq".
        """
        packed = super().state_dict()
        state = self.optimizer.state_dict()["state"]
        for i, name in enumerate(self._names.values()):
            state[i] = {"master": self.masters[name].detach(), **state.get(i, {})}
        packed["state"] = state
        frozen = {name: master.detach() for name, master in self.masters.items() if name not in self._names.values()}
        packed["quantizer"] = {"state": self.quantizer_state, "frozen": frozen}
        if self.state_optimizer is not None:
            packed["quantizer"]["optimizer"] = self.state_optimizer.state_dict()
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit; the model has the fake weights of then.

        Without "quantizer", as from torch DCP, the state stays the present one: set `quantizer_state`.

        Raises:
            KeyError: A group is missing from the quantizer's state.
            ValueError: A master is missing, or has another shape or sharding. Or as of PyTorch. Nothing is loaded then.
        """
        groups, quantizer = state_dict["param_groups"], state_dict.get("quantizer", {})
        keys = [*chain(*(group["params"] for group in groups))]
        inner = {key: dict(of) for key, of in state_dict["state"].items()}
        loaded: dict[str, Any] = dict(quantizer.get("frozen", {}))
        for name, key in zip(self._names.values(), keys, strict=False):
            master = inner.get(key, {}).pop("master", None)
            if master is not None or name not in self._untrained:  # DCP leaves out what is frozen
                loaded[name] = master
        self._check_loaded(loaded, quantizer)
        learner = () if self.state_optimizer is None or not quantizer else (self.state_optimizer,)
        with _restored(self, self.optimizer, *learner):
            super().load_state_dict({"state": {}, "param_groups": groups})
            self.optimizer.load_state_dict({"state": {k: of for k, of in inner.items() if of}, "param_groups": groups})
            for one in learner:
                one.load_state_dict(quantizer["optimizer"])
        self._copied = _options_of(self.optimizer)
        for name, value in loaded.items():
            self.masters[name].copy_(value)
        if quantizer:
            self._set_state(_mapped(_moved, quantizer["state"], self._state))
        self._has_state = self._step > 0 or bool(self.optimizer.state)
        self.write()

    def _check_loaded(self, loaded: dict[str, Any], quantizer: dict[str, Any]) -> None:
        self._model_params()
        for name, value in loaded.items():
            what = f"state_dict: master of {name!r}"
            if name not in self.masters:
                raise ValueError(f"{what}: found one, wanted none, as this optimizer has no such master")
            check_tensor(what, value, tuple(self.masters[name].shape), self.masters[name].dtype)
            check_same_spread(what, value, self.masters[name])
        if quantizer:
            check_state(quantizer["state"], self.fq.spec, values=is_read)
            if ("optimizer" in quantizer) != (self.state_optimizer is not None):
                found = "one" if "optimizer" in quantizer else "none"
                raise ValueError(f"state_dict: state_optimizer: found {found} with backward={self.fq.backward!r}")

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.fq!r}, masters of {type(self.optimizer).__name__}: {len(self.masters)}"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("FakeQuantOptimizer: found a copy or a pickle of it, wanted its state_dict()")


class _Unquantized(Within[None]):
    def __init__(self, optimizer: FakeQuantOptimizer) -> None:
        self.optimizer = optimizer

    def _use(self) -> InUse:
        return InUse("unquantized", self.optimizer._params.items())  # pyright: ignore[reportPrivateUsage] (its own)

    def _begin(self, use: InUse) -> None:
        use.undo.append(self.optimizer.write)
        cast(self.optimizer.masters, out=self.optimizer.model)

    def _end(self) -> None:
        """Nothing can be amiss."""


class _Part(NamedTuple):
    """Masters that are written at the same times."""

    fq: Transform
    masters: dict[str, Tensor]


def _mapped(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """A state of what the function makes of each leaf, and of its like in the others."""
    return {
        key: {name: function(leaf, *(other[key][name] for other in others)) for name, leaf in leaves.items()}
        for key, leaves in state.items()
    }


def _leaf(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_()


def _moved(leaf: Tensor, like: Tensor) -> Tensor:
    return leaf.to(like.device)


@contextmanager
def _restored(*optimizers: Optimizer) -> Generator[None]:
    """Within, an error leaves optimizers with the parameters, options and state that they had."""
    before = [(vars(one).copy(), [[*group["params"]] for group in one.param_groups]) for one in optimizers]
    try:
        yield
    except BaseException:
        for one, (attributes, params) in zip(optimizers, before, strict=True):
            vars(one).update(attributes)
            for group, had in zip(one.param_groups, params, strict=True):
                group["params"][:] = had
        raise


def _selected(groups: Iterable[Group]) -> set[str]:
    return {name for group in groups for name in group.names}


def _options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _copy_options(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    for one, other in zip(source, target, strict=True):
        other.update({key: value for key, value in one.items() if key not in ("params", STEP)})


def _names_of(
    optimizer: Optimizer, params: Mapping[str, Tensor], tied: Mapping[str, Tensor], spec: Spec
) -> dict[Tensor, str]:
    """The names of all that an optimizer steps, in its order; raises where optimizer, model and spec do not fit.

    `params` has the first name of each parameter, `tied` all of them.
    """
    names = {param: name for name, param in params.items()}
    for group in spec.groups:
        for name in group.names:
            if name in tied and name not in params:
                first = names[tied[name]]
                raise ValueError(f"fq: found {name!r}, which is tied to {first!r}, wanted the latter; select {first!r}")
            if name not in params:
                raise ValueError(
                    f"model: found no parameter {name!r}, which fq selects, among {len(params)} such as "
                    f"{next(iter(params), None)!r}, wanted the model that it was selected on; of a wrapper give what "
                    "it wraps, as model.module"
                )
    found: dict[Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        if "initial_lr" in group:
            raise ValueError(
                f"optimizer: found param group {number} with a learning rate scheduler, wanted none; schedule the "
                "FakeQuantOptimizer"
            )
        for param in group["params"]:
            if param not in names:
                raise ValueError(
                    f"optimizer: found a tensor of shape {tuple(param.shape)} in param group {number} that is no "
                    "parameter of the model, wanted an optimizer over model.parameters() as they are now"
                )
            found[param] = names[param]
    for name in _selected(spec.groups):
        if params[name].requires_grad and params[name] not in found:
            raise ValueError(
                f"optimizer: found {name!r}, which fq selects and which is trained, in no param group, wanted it in "
                "one, or frozen"
            )
    return found


def _made_by(state_optimizer: StateOptimizer, leaves: list[Tensor]) -> Optimizer:
    made: Any = state_optimizer([*leaves])
    if not isinstance(made, Optimizer):
        raise ValueError(f"state_optimizer: found {type(made).__name__} from it, wanted an Optimizer of the leaves")
    found = {param for group in made.param_groups for param in group["params"]}
    if found != set(leaves):
        raise ValueError(
            f"state_optimizer: found an optimizer of {len(found.intersection(leaves))} of the {len(leaves)} leaves and "
            f"{len(found.difference(leaves))} other tensors, wanted one of the leaves that it is given, all of them"
        )
    return made


def _check_options(fq: Any, optimizer: Any, model: Any, recalibrate: Any, seed: Any, state_optimizer: Any) -> None:
    for name, value, kind in (("fq", fq, Transform), ("optimizer", optimizer, Optimizer), ("model", model, Module)):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}: found {type(value).__name__}, wanted {kind.__module__.split('.')[0]}.{kind.__name__}"
            )
    refuse_inputs(fq.spec, "FakeQuantOptimizer")
    if isinstance(optimizer, FakeQuantOptimizer):
        raise ValueError("optimizer: found a FakeQuantOptimizer, wanted the one that it is made around")
    if seed is not None:
        check_rounding(seed if isinstance(seed, Stochastic) else Stochastic(seed))
        check_seed_of_steps(seed.seed if isinstance(seed, Stochastic) else seed)
    if (fq.backward == "lsq") != (state_optimizer is not None):
        wanted = "one, as functools.partial(torch.optim.Adam, lr=1e-4)" if fq.backward == "lsq" else "None"
        raise ValueError(f"state_optimizer: found {state_optimizer!r} with backward={fq.backward!r}, wanted {wanted}")
    if recalibrate is not None and fq.backward == "lsq":
        raise ValueError("recalibrate: found one with backward='lsq', which trains the state, wanted None")
