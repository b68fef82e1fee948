"""Inputs of the selected weights: what a model multiplies them with, observed in calibration, quantized in `apply`."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from fq_transforms.formats import Format
from fq_transforms.ops.autograd import Backward, expert_amax, fake_quantize
from fq_transforms.products import Use, products
from fq_transforms.spec import Inputs, Spec
from fq_transforms.state import UNCALIBRATED, GroupState, InputAmax, State, Stateless, check, plain_weights_of
from fq_transforms.weights import DTYPES

__all__ = ["Forward", "observe", "quantize_input", "quantized_inputs"]

# Below the most experts of one launch, `ops.launch.MOST_EXPERTS`.
MOST_ROWS = 32768

Forward = Callable[[Callable[..., Any], Any], Any]


def observe(
    params: Mapping[str, Tensor], batch: Any, *, spec: Spec, model: Module | None, forward: Forward | None
) -> dict[str, GroupState]:
    """Run the model on the batches, unquantized, and return the entries of its inputs: largest magnitudes and counts.

    See `fq_transforms.calibrate.calibrate`.
    """
    wanted = [inputs for inputs in spec.inputs if inputs.leaf_shapes]
    if not wanted:
        return {inputs.key: Stateless() for inputs in spec.inputs}
    if model is None:
        raise ValueError(f"model: found None, wanted the module that reads {wanted[0].names[0]!r}, for its inputs")
    for inputs in wanted:
        plain_weights_of(params, inputs)
    # Calibration changes nothing: what a layer writes into its buffers as it runs goes into copies.
    values = {name: buffer.clone() for name, buffer in model.named_buffers()} | dict(params)
    ran: set[str] = set()
    found = {inputs.key: _Seen(inputs, params[inputs.names[0]].device) for inputs in wanted}
    number = -1
    for number, one in enumerate(_batches(batch, wanted[0])):
        of_batch: dict[str, _Seen] = {}  # in the order in which the layers ran

        def see(use: Use, x: Tensor, of_batch: dict[str, _Seen] = of_batch) -> Tensor:
            seen = of_batch.setdefault(use.inputs.key, _Seen(use.inputs, x.device))
            seen.add(use, x.detach())
            return x

        with torch.no_grad(), products(model, values, wanted, see) as keys:
            try:
                _run(lambda *args, **kwargs: functional_call(model, values, args, kwargs), one, forward)
            except Exception as error:
                error.add_note(f"calibrate: in batch {number}")
                raise
        ran |= keys
        _check_finite(of_batch.values(), number)
        for key, seen in of_batch.items():
            found[key].merge(seen)
    if number < 0:
        raise ValueError(f"batch: found no batch in {type(batch).__name__}, wanted at least one")
    if idle := [inputs for inputs in wanted if inputs.key not in ran and inputs.always_runs]:
        raise ValueError(
            f"inputs {idle[0].key!r}: found that its layer never ran in {number + 1} batches ({len(idle)} of "
            f"{len(wanted)} groups did not), or used another tensor than its parameter, wanted every selected layer to "
            "run; take it out of `inputs` with a rule to None"
        )
    return {i.key: found[i.key].entry() if i.leaf_shapes else Stateless() for i in spec.inputs}


class _Seen:
    """Largest magnitude and count of tokens of each expert of a group; the last entry is of no expert."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs = inputs
        self.amax = torch.full((inputs.experts + 1,), UNCALIBRATED, device=device)
        self.tokens = torch.zeros(inputs.experts + 1, dtype=torch.float64, device=device)

    def add(self, use: Use, x: Tensor) -> None:
        rows = _checked(use, x).numel() // use.inputs.shape[1]
        if rows == 0:
            return
        if isinstance(use.experts, int):
            at = slice(use.experts, use.experts + 1)
            self.amax[at] = torch.maximum(self.amax[at], x.abs().amax().float())
            self.tokens[at] += rows * use.is_first
            return
        experts = use.experts.reshape(-1).long()
        largest = x.abs().amax(-1).reshape(-1).float()
        self.amax = self.amax.scatter_reduce(0, experts, largest, "amax")
        if use.is_first:
            self.tokens.index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))

    def merge(self, other: "_Seen") -> None:
        self.amax = torch.maximum(self.amax, other.amax.to(self.amax.device))
        self.tokens += other.tokens.to(self.tokens.device)

    def of_experts(self) -> Tensor:
        return self.amax[:-1]

    def entry(self) -> InputAmax:
        amax = self.of_experts()
        return InputAmax(amax.clone() if self.inputs.per_expert else amax.amax().reshape(1), self.tokens[:-1].clone())


def _check_finite(seen: Iterable[_Seen], number: int) -> None:
    """Raise ValueError for the first layer that got NaN or infinity in this batch. One wait a device."""
    in_order = list(seen)
    for device in {one.amax.device for one in in_order}:
        here = [one for one in in_order if one.amax.device == device]
        if bool((torch.cat([one.of_experts() for one in here]) < torch.inf).all()):
            continue
        for one in here:
            wrong = ~(one.of_experts() < torch.inf)
            if bool(wrong.any()):
                expert = int(wrong.nonzero()[0])
                raise ValueError(
                    f"calibrate: batch {number}: the input of {one.inputs.expert_name(expert)!r} is the first with the "
                    f"largest magnitude {one.of_experts()[expert].item()}, wanted finite values"
                )


def _batches(batch: Any, inputs: Inputs) -> Generator[Any]:
    """One batch (a tensor, a tuple, a mapping), or each of many."""
    if batch is None:
        raise ValueError(
            f"batch: found None, wanted batches for {inputs.key!r}: calibrate(params, batch), with a tensor, a tuple "
            "of arguments, a dict of keyword arguments, or a list of these"
        )
    if isinstance(batch, Tensor | tuple | Mapping):
        yield batch
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        yield from batch
    else:
        raise ValueError(
            f"batch: found {type(batch).__name__}, wanted a tensor, a tuple, a dict, or an iterable of these"
        )


def _run(call: Callable[..., Any], one: Any, forward: Forward | None) -> None:
    if forward is not None:
        forward(call, one)
    elif isinstance(one, Tensor):
        call(one)
    elif isinstance(one, tuple):
        call(*one)
    elif isinstance(one, Mapping):
        call(**cast("Mapping[str, Any]", one))
    else:
        raise ValueError(
            f"batch: found {type(one).__name__} as one of them, wanted a tensor, a tuple of arguments or a dict of "
            "keyword arguments; pass forward=lambda call, batch: call(...) for others"
        )


@contextmanager
def quantized_inputs(
    model: Module,
    weights: Mapping[str, Tensor],
    state: State,
    *,
    spec: Spec,
    backward: Backward,
) -> Generator[None]:
    """Within, the model computes with each selected input quantized, if `weights` are what it has as parameters.

    One call or several. Raises ValueError as `fq_transforms.apply.apply` does; for a layer that never ran, on leaving.
    """
    if not spec.inputs:
        yield
        return
    if backward == "lsq":
        raise ValueError(
            "backward: found 'lsq' and inputs, whose scales are not learned, wanted 'pass_through' or 'clip'"
        )
    for inputs in spec.inputs:
        plain_weights_of(weights, inputs)
    _check_seen(state, spec)
    differentiates, hooks = torch.is_grad_enabled(), _saved_tensors_hooks()

    def quantize(use: Use, x: Tensor) -> Tensor:
        if differentiates and (not torch.is_grad_enabled() or _saved_tensors_hooks() != hooks):
            _refuse_recomputed(use, x, weights)
        return quantize_input(use, x, state[use.inputs.key], backward=backward)

    with products(model, weights, spec.inputs, quantize) as seen:
        yield
    if idle := [inputs.key for inputs in spec.inputs if inputs.key not in seen and inputs.always_runs]:
        raise ValueError(
            f"inputs {idle[0]!r}: found that its layer never ran in this call ({len(idle)} of {len(spec.inputs)} "
            "groups did not), or used another tensor than its parameter, wanted every selected layer to run; take it "
            "out of `inputs` with a rule to None"
        )


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore


def _refuse_recomputed(use: Use, x: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a layer whose forward will run again in backward, where nothing is seen."""
    if x.requires_grad or any(weights[name].requires_grad for name in use.inputs.names):
        raise ValueError(
            f"inputs {use.inputs.key!r}: found its layer under activation checkpointing, saved-tensor hooks or "
            "torch.no_grad, wanted it as the rest of the call: backward would compute it again with inputs that are "
            "not quantized; switch checkpointing off, or call `apply` within what sets the hooks"
        )


def _check_seen(state: State, spec: Spec) -> None:
    """Raise ValueError unless every input has an amax. Those on a CPU `fakequant` has checked; others wait once."""
    leaves = [entry.amax for entry in state.values() if isinstance(entry, InputAmax)]
    for device in {leaf.device for leaf in leaves if leaf.device.type not in ("cpu", "meta")}:
        if not bool(torch.cat([leaf for leaf in leaves if leaf.device == device]).isfinite().all()):
            check(state, spec)


def quantize_input(use: Use, x: Tensor, scales: GroupState, *, backward: Backward) -> Tensor:
    """Quantize and dequantize x [..., in], each row by the scales of its expert; in the dtype of x.

    The formulas are those of weights, `fq_transforms.ops.reference.fake_quantize_reference`, with a token as a row: by
    tensor with the amax of the state, by channel with amax = max(abs(row)), in blocks along `in`.
    """
    inputs = use.inputs
    _checked(use, x)
    if x.numel() == 0:
        return x
    format, matrix = inputs.format, x.reshape(-1, x.shape[-1])
    if isinstance(scales, InputAmax):
        amax = scales.amax.to(x.device)
        if not inputs.per_expert or isinstance(use.experts, int):
            amax = amax if len(amax) == 1 else amax.narrow(0, cast("int", use.experts), 1)
        else:
            # Rows of no expert are never read: they take the last one's.
            experts = use.experts.reshape(-1).clamp(max=inputs.experts - 1)
            return _by_row(matrix, amax[experts], format, backward).view(x.shape)
    elif format.block == (1, None):
        amax, _ = expert_amax([matrix.detach()], format=format)
        backward = "pass_through"  # nothing is larger than its own row's
    else:
        amax = None
    (out,) = fake_quantize([matrix], amax, None, format=format, backward=backward)
    return out.view(x.shape)


def _by_row(matrix: Tensor, amax: Tensor, format: Format, backward: Backward) -> Tensor:
    """Each row [in] by an amax of its own: a format by channel if one has its numbers, else each row is an expert.

    The latter, NVFP4's, costs a GPU's host time for each row.
    """
    if format.scale == "fp32":
        rows = _rows_of(format)
        return fake_quantize([matrix], amax[None, :, None].contiguous(), None, format=rows, backward=backward)[0]
    parts = zip(matrix[:, None].split(MOST_ROWS), amax.split(MOST_ROWS), strict=True)
    return torch.cat([fake_quantize([x], a, None, format=format, backward=backward)[0][:, 0] for x, a in parts])


@cache
def _rows_of(format: Format) -> Format:
    return replace(format, name=f"{format.name} by row", block=(1, None))


def _checked(use: Use, x: Tensor) -> Tensor:
    inputs = use.inputs
    if x.dtype not in DTYPES:
        raise ValueError(f"inputs {inputs.key!r}: found {x.dtype}, wanted bfloat16, float16 or float32")
    if not x.dim() or x.shape[-1] != inputs.shape[1]:
        raise ValueError(f"inputs {inputs.key!r}: found {tuple(x.shape)}, wanted (..., {inputs.shape[1]})")
    return x
