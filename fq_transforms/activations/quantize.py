"""Inputs of the selected weights: what a model multiplies them with, observed in calibration, quantized in `apply`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward, check_input, observe
from fq_transforms.activations.products import TracedProducts, Use, products, refuse_opaque
from fq_transforms.checks import UNCALIBRATED, check_state, plain_weights_of
from fq_transforms.formats import Format
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.private import saved_tensors_hooks
from fq_transforms.ops.quantize.autograd import Backward, fake_quantize
from fq_transforms.spec import Inputs, Spec
from fq_transforms.state import GroupState, State

__all__ = ["calibrated_inputs", "check_traced", "quantize_input", "quantized_inputs", "traced_inputs"]

# Below the most experts of one launch, `ops.launch.MOST_EXPERTS`.
MOST_ROWS = 32768


def calibrated_inputs(
    params: Mapping[str, Tensor], batches: Any, *, spec: Spec, model: Module | None, forward: Forward | None
) -> dict[str, GroupState]:
    """Run the model on the batches, unquantized, and return the entries of its inputs: largest magnitudes and counts.

    See `Transform.calibrate`.
    """
    wanted = [inputs for inputs in spec.inputs if inputs.leaf_shapes]
    found: dict[str, _Largest] = {}
    if wanted:
        found = observe(params, batches, wanted, _Largest, model=model, forward=forward, caller="calibrate")
    return {i.key: found[i.key].entry() if i.leaf_shapes else {} for i in spec.inputs}


class _Largest:
    """Largest magnitude and count of tokens of each expert of a group; the last entry is of no expert."""

    measure = "largest magnitude"

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs = inputs
        self.amax = torch.full((inputs.experts + 1,), UNCALIBRATED, device=device)
        self.tokens = torch.zeros(inputs.experts + 1, dtype=torch.float64, device=device)

    def add(self, use: Use, x: Tensor) -> None:
        if isinstance(use.experts, int):
            at = slice(use.experts, use.experts + 1)
            self.amax[at] = torch.maximum(self.amax[at], x.abs().amax().float())
            self.tokens[at] += x.shape[:-1].numel() * use.is_first
            return
        experts = use.experts.reshape(-1).long()
        largest = x.abs().amax(-1).reshape(-1).float()
        self.amax = self.amax.scatter_reduce(0, experts, largest, "amax")
        if use.is_first:
            rows = torch.zeros_like(self.tokens).index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))
            self.tokens += rows.div(use.blocks, rounding_mode="floor")

    def to(self, device: torch.device) -> "_Largest":
        self.amax, self.tokens = self.amax.to(device), self.tokens.to(device)
        return self

    def sizes(self) -> Tensor:
        return self.amax[:-1]

    def entry(self) -> GroupState:
        amax = self.sizes()
        amax = amax.clone() if self.inputs.per_expert else amax.amax().reshape(1)
        return {"amax": amax, "tokens": self.tokens[:-1].clone()}


def quantized_inputs(
    model: Module,
    weights: Mapping[str, Tensor],
    state: State,
    *,
    spec: Spec,
    backward: Backward,
) -> AbstractContextManager[object]:
    """Within, the model computes with each selected input quantized, if `weights` are what it has as parameters.

    One call or several. Raises ValueError as `Transform.apply` does; for a layer that never ran, on leaving.
    """
    if not spec.inputs:
        return nullcontext()
    if torch.compiler.is_compiling():
        raise ValueError(
            "quantized_inputs: found torch.compile around it, wanted it around what is compiled, or fq.apply within"
        )
    for inputs in spec.inputs:
        plain_weights_of(weights, inputs)
    _check_seen(state, spec)
    differentiates, hooks = torch.is_grad_enabled(), saved_tensors_hooks()

    def quantize(use: Use, x: Tensor) -> Tensor:
        if differentiates and (not torch.is_grad_enabled() or saved_tensors_hooks() != hooks):
            _refuse_recomputed(use, x, weights)
        return quantize_input(use, x, state[use.inputs.key], backward=backward)

    def check_seen(seen: set[str]) -> None:
        if idle := [inputs.key for inputs in spec.inputs if inputs.key not in seen and inputs.always_runs]:
            raise ValueError(
                f"inputs {idle[0]!r}: found that its layer never ran in this call ({len(idle)} of {len(spec.inputs)} "
                "groups did not), or used another tensor than its parameter, wanted every selected layer to run; take "
                "it out with a rule to None"
            )

    return products(model, weights, spec.inputs, quantize, check_seen)


def traced_inputs(
    model: Module, weights: Mapping[str, Tensor], state: State, *, spec: Spec, backward: Backward
) -> TracedProducts:
    """`quantized_inputs` of one call while torch.compile or torch.export traces it; `check_traced` comes after it."""
    for inputs in spec.inputs:
        plain_weights_of(weights, inputs)
    refuse_opaque(model, spec.inputs)
    differentiates = torch.is_grad_enabled()

    def quantize(use: Use, x: Tensor) -> Tensor:
        if differentiates and not torch.is_grad_enabled():  # hooks on saved tensors act on the graph, which is whole
            _refuse_recomputed(use, x, weights)
        return quantize_input(use, x, state[use.inputs.key], backward=backward)

    return TracedProducts(weights, spec.inputs, quantize)


def check_traced(traced: TracedProducts, spec: Spec) -> None:
    """Raise ValueError for a weight that was not seen in what was traced."""
    for inputs in spec.inputs:
        for name in inputs.names:
            if name not in traced.seen:
                raise ValueError(
                    f"inputs {inputs.key!r}: found torch.compile, and no use of {name!r} in what it traced, wanted "
                    "each selected weight to be used; call `apply` outside of torch.compile"
                )


def _refuse_recomputed(use: Use, x: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a layer whose forward will run again in backward, where nothing is seen."""
    if x.requires_grad or any(weights[name].requires_grad for name in use.inputs.names):
        raise ValueError(
            f"inputs {use.inputs.key!r}: found its layer under activation checkpointing, saved-tensor hooks or "
            "torch.no_grad, wanted it as the rest of the call: backward would compute it again with inputs that are "
            "not quantized; switch checkpointing off, call `apply` within what sets the hooks, or take the inputs out "
            "with a rule to None"
        )


def _check_seen(state: State, spec: Spec) -> None:
    """Raise ValueError unless every input has an amax. Those on a CPU `fakequant` has checked; others wait once."""
    leaves = [state[inputs.key]["amax"] for inputs in spec.inputs if inputs.leaf_shapes]
    for device in {leaf.device for leaf in leaves if leaf.device.type not in ("cpu", "meta")}:
        if not bool(torch.cat([leaf for leaf in leaves if leaf.device == device]).isfinite().all()):
            check_state(state, spec)


def quantize_input(use: Use, x: Tensor, scales: GroupState, *, backward: Backward) -> Tensor:
    """Quantize and dequantize x [..., in], each row by the scales of its expert; in the dtype of x.

    The formulas are those of weights, `fake_quantize_reference`, with a token as a row: per tensor by the amax of the
    state, per channel by amax = max(abs(row)), in blocks along `in`.
    """
    inputs = use.inputs
    check_input(inputs, x)
    if x.numel() == 0:
        return x
    format, matrix = inputs.format, x.reshape(-1, x.shape[-1]).resolve_neg()
    if "amax" in scales:
        amax = scales["amax"].to(x.device)
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

    The latter, NVFP4's and all in a graph, costs a GPU's host time for each row.
    """
    if format.scale == "fp32" and not torch.compiler.is_compiling():  # which cannot make a format
        rows = _rows_of(format)
        return fake_quantize([matrix], amax[None, :, None].contiguous(), None, format=rows, backward=backward)[0]
    parts = zip(matrix[:, None].split(MOST_ROWS), amax.split(MOST_ROWS), strict=True)
    return torch.cat([fake_quantize([x], a, None, format=format, backward=backward)[0][:, 0] for x, a in parts])


@cache
def _rows_of(format: Format) -> Format:
    return replace(format, name=f"{format.name} by row", block=(1, None))
