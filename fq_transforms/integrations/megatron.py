"""Megatron-Core: select, calibrate, fake-quantize, save and load a whole model with MoE layers, in one call each.

    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": fqt.NVFP4}))
    state = megatron.calibrate(fq, model)                                   # equal on ranks that share a weight
    attached = megatron.attach(fq, optimizer, model, state)                 # from now on the model has fake weights,
    losses = forward_backward_func(...)                                     # whatever trains it
    optimizer.step()                                                        # and Megatron's own step leaves new ones
    attached.detach()                                                       # the masters' values, unquantized
    megatron.save(path, fq, model, state)                                   # weights and amax, one checkpoint
    state = megatron.load(path, fq, model)                                  # another model, another parallelism

`model` is a GPTModel or another of Megatron's models, alone or wrapped by its DistributedDataParallel and
Float16Module. Names are those of the innermost model, so that they do not depend on the wrappers.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import fq_transforms as fqt
from fq_transforms.calibrate import bar_of, check_statistics, chosen_leaves, importance_of, progress
from fq_transforms.checkpoint import megatron as leaves
from fq_transforms.checkpoint.storage import refuse_uri
from fq_transforms.checks import weights_of
from fq_transforms.integrations import te
from fq_transforms.integrations.megatron_step import Attached
from fq_transforms.methods import MAX, Max
from fq_transforms.partition import DIMS, collapsed_dims
from fq_transforms.rounding import check_seed_of_steps
from fq_transforms.rules import Rules
from fq_transforms.spec import Spec, refuse_inputs
from fq_transforms.state import State
from fq_transforms.training.optimizer import Recalibrate

__all__ = ["Attached", "attach", "calibrate", "fakequant", "layerwise", "load", "save", "select", "unwrap"]

# Experts of an MoE layer; shared experts are parallel as dense layers are.
_EXPERTS = re.compile(r"(?:^|\.)experts\.")


def unwrap(model: Module) -> Module:
    """The model within Megatron's wrappers."""
    while isinstance(inner := getattr(model, "module", None), Module):
        model = inner
    return model


def select(model: Module, rules: Rules) -> Spec:
    """`fq_transforms.select` over the parameters of a model.

    Args:
        model: As above.
        rules: As of `fq_transforms.select`.

    Raises:
        ValueError: As `fq_transforms.select`.
    """
    return fqt.select(dict(unwrap(model).named_parameters()), rules)


def calibrate(
    fq: fqt.Transform,
    model: Module,
    *,
    statistics: Mapping[str, Tensor] | None = None,
    masters: Mapping[str, Tensor] | None = None,
) -> State:
    """The amax of every selected weight, where tensor parallelism splits it over all ranks that hold a part.

    At most two collectives, an all-reduce(max) of all leaves that need it: over the experts' tensor-parallel group and
    over that of the dense layers. None over expert or data parallel ranks. What is split is read from
    `model.sharded_state_dict()`. Methods other than `Max` choose after the collectives, by the global amax of all
    ranks, and want whole granules on each.

    Args:
        fq: Of a spec from `select`, without inputs.
        model: As above.
        statistics: For `Mse`, of this rank's parts: [E, in] of the experts and input channels that it holds, or their
            blocks' second moments. Replicas of a weight have one state only if their statistics are equal: see
            docs/calibration.
        masters: The values to calibrate on, by the model's names, where the model itself has fake weights: as in
            `recalibrate=lambda step, masters, state: megatron.calibrate(fq, model, masters=masters)` for `attach`.

    Raises:
        KeyError, ValueError: As `fq.calibrate` and `fq.sync`; the method is not `Max`, and tensor parallelism splits a
            granule, on all ranks alike. Statistics, in which ranks may differ, are checked after the last collective,
            so that no rank waits for one that has raised; weights are before it.
    """
    from megatron.core import parallel_state

    refuse_inputs(fq.spec, "integrations.megatron.calibrate")
    model = unwrap(model)
    axes = leaves.split_axes(fq, _sharded_state_dict(model))
    _check_whole(fq, axes)
    params = dict(model.named_parameters()) if masters is None else masters
    state = replace(fq, method=MAX).calibrate(params)
    experts: dict[str, Any] = {key: axis for key, axis in axes.items() if _EXPERTS.search(key)}
    dense: dict[str, Any] = {key: axis for key, axis in axes.items() if key not in experts}
    groups: Any = parallel_state  # whose functions are annotated as giving None or a number too
    if experts:
        state = fq.sync(state, groups.get_expert_tensor_parallel_group(), split=experts)
    if dense:
        state = fq.sync(state, groups.get_tensor_model_parallel_group(), split=dense)
    # Last: ranks may differ in statistics, and none may wait for one that has raised.
    check_statistics(fq.method, statistics, fq.spec)
    return state if isinstance(fq.method, Max) else _chosen(fq, params, state, statistics)


def attach(
    fq: fqt.Transform,
    optimizer: Any,
    model: Module,
    state: State,
    *,
    recalibrate: Recalibrate | None = None,
    seed: int | None = None,
) -> Attached:
    """Make Megatron's own `optimizer.step()` leave fake weights in the model, which has them when this returns.

    Float16OptimizerWithFloat16Params: fq.fakequant of the fp32 main parameters, in place of their cast. "clip" masks
    their gradients before the norm is taken. DistributedOptimizer, whose flat shards cut rows and blocks: after its own
    cast and all-gather, fq.fakequant of the 16-bit parameters in place; "pass_through" only. docs/training has more.

    Args:
        fq: Of a spec from `select`, without inputs.
        optimizer: One of these two, or a ChainedOptimizer of them, as `get_megatron_optimizer` gives.
        model: The one model that it trains, as above. Frozen selected weights are kept a second time.
        state: From `calibrate`, before this call, or loaded.
        recalibrate: `(step, masters, state) -> state | None`, after each step; equal on ranks that share a weight.
        seed: Of 32 bits, equal on all ranks, for stochastic rounding; each step and each rank's experts draw anew.
            Slices of tensor parallelism, and layers of the same number in two pipeline stages, draw the same bits.

    Raises:
        KeyError, ValueError: As `fq.fakequant`; "lsq"; another optimizer (FP32Optimizer's parameters are themselves
            the masters: set bf16=True), or one that is attached or trains more than this model; a selected weight
            without a main parameter; parameters in fp8, fp4 or of FSDP; parameters gathered while the model runs;
            masters within the optimizer's kernel or on the CPU. Nothing is changed then.

    Source: Megatron-Core 0.16.1 `MixedPrecisionOptimizer.step_with_ready_grads`.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, Float16OptimizerWithFloat16Params

    refuse_inputs(fq.spec, "integrations.megatron.attach")
    parts: list[Any] = optimizer.chained_optimizers if type(optimizer) is ChainedOptimizer else [optimizer]
    for part in parts:
        if type(part) not in (Float16OptimizerWithFloat16Params, DistributedOptimizer):
            raise ValueError(
                f"optimizer: found {type(part).__name__}, wanted Float16OptimizerWithFloat16Params, "
                "DistributedOptimizer or a ChainedOptimizer of them; set bf16=True in OptimizerConfig and in the model"
            )
    if "step_with_ready_grads" in vars(optimizer):
        raise ValueError("optimizer: found it attached already, wanted attached.detach() first")
    is_distributed = any(type(part) is DistributedOptimizer for part in parts)
    if fq.backward == "lsq" or (fq.backward == "clip" and is_distributed):
        raise ValueError(
            f"backward: found {fq.backward!r} with {type(parts[0]).__name__}, wanted 'pass_through'"
            + ("; or 'clip' with use_distributed_optimizer=False" if is_distributed else " or 'clip'")
        )
    if seed is not None:
        check_seed_of_steps(seed)
    _check_masters_are_apart(parts)
    model = unwrap(model)
    params = dict(model.named_parameters())
    for name, param in params.items():
        if type(param) is not torch.nn.Parameter:
            raise ValueError(
                f"parameter {name!r}: found {type(param).__name__}, wanted a plain parameter in bf16 or fp16, without "
                "fp8_param_gather and FSDP"
            )
    masters = _masters(fq, parts, model, params, is_distributed)
    experts: int = getattr(model.config, "num_moe_experts", None) or 0
    local = experts // parallel_state.get_expert_model_parallel_world_size()
    first = local * parallel_state.get_expert_model_parallel_rank()
    return Attached(
        fq,
        optimizer,
        parts,
        masters,
        params,
        state,
        recalibrate=recalibrate,
        rounding=None if seed is None else fqt.Stochastic(seed, first),
        is_distributed=is_distributed,
    )


def fakequant(
    fq: fqt.Transform, model: Module, state: State, *, rounding: fqt.Stochastic | None = None
) -> dict[str, Tensor]:
    """The model's parameters, fake-quantized, for `functional_call(unwrap(model), weights, ...)`.

    Under pass-through they carry `main_grad`, and are good for all microbatches of a step: nothing of their graph is
    used up by a backward pass.

    NOTE stochastic rounding: all ranks take one seed, a new one per step, so that the replicas of a weight, over data
    or tensor parallel ranks, stay equal. A rank of expert parallelism passes `first_expert`, the number of its first,
    or its experts round as those of other ranks do. Slices of tensor parallelism draw the same bits at the same places
    of each: the mean is the weight, but their errors are not independent.

    Raises:
        KeyError, ValueError: As `fq.fakequant` and `carry_main_grad`; Transformer Engine's op fuser computes the
            experts; Megatron's DistributedDataParallel gathers parameters while the model runs
            (`overlap_param_gather`), before which they are stale.
    """
    refuse_inputs(fq.spec, "integrations.megatron.fakequant")
    _check_gathered(model, "layerwise")
    _check_unfused(unwrap(model), fq.spec)
    params = dict(unwrap(model).named_parameters())
    weights = fq.fakequant(params, state, rounding=rounding)
    fqt.carry_main_grad(fq, params, weights)
    return weights


def layerwise(
    fq: fqt.Transform, model: Module, state: State, *, recompute: bool = True
) -> AbstractContextManager[None]:
    """`fq_transforms.layerwise` on the model within the wrappers; Transformer Engine's autocast is refused.

    Around a whole `forward_backward_func`: backward belongs inside. Enter it anew at each step: hooks that Megatron
    adds meanwhile would come after its own.

    Raises:
        KeyError, ValueError: As `fq_transforms.layerwise`; Transformer Engine's op fuser computes the experts; with
            `overlap_param_gather`, a group's weights are not one module's, as SequentialMLP's are not: they would be
            read before they are gathered.
    """
    inner = unwrap(model)
    _check_unfused(inner, fq.spec)
    for group in fq.spec.groups:
        if len({name.rpartition(".")[0] for name in group.names}) > 1:
            _check_gathered(model, "Transformer Engine's grouped experts")
    return te.layerwise(fq, inner, state, recompute=recompute)


def save(path: str | Path, fq: fqt.Transform, model: Module, state: State) -> None:
    """Save model and state in one distributed checkpoint of Megatron's.

    Args:
        path: An empty directory that all ranks see; made if it is not there.
        fq: What the state was calibrated by.
        model: As above.
        state: From `calibrate`.

    Raises:
        KeyError, ValueError: As `fq_transforms.checkpoint.megatron.sharded_state_dict`; nothing is written then.
        Exception: Whatever Megatron raises.
    """
    from megatron.core import dist_checkpointing

    refuse_uri(path)
    entries = _sharded_state_dict(unwrap(model))
    entries |= leaves.sharded_state_dict(fq, state, entries)
    Path(path).mkdir(parents=True, exist_ok=True)  # by every rank: who is first does not matter, and nobody waits
    dist_checkpointing.save(entries, str(path))


def load(path: str | Path, fq: fqt.Transform, model: Module) -> State:
    """Load a model's weights, in place, and give the state; at any parallelism, whatever it was saved at.

    Everything of the state is checked before the model is changed: see `fq_transforms.checkpoint.megatron.verify`. An
    optimizer that exists already has fp32 copies of the old weights: call its `reload_model_params()`.

    Args:
        path: From `save`.
        fq: Of a spec selected from this model.
        model: As above; parameters on meta are given memory on the current device first.

    Raises:
        KeyError, ValueError: As `verify` and `load_state`. Whatever Megatron raises.
    """
    from megatron.core import dist_checkpointing

    model = unwrap(model)
    leaves.verify(path, fq, _sharded_state_dict(model))
    _materialize(model)
    entries = _sharded_state_dict(model)
    empty = fq.init(dict(model.named_parameters()))
    places = entries | leaves.sharded_state_dict(fq, empty, entries)
    loaded: dict[str, Any] = dist_checkpointing.load(places, str(path))  # pyright: ignore[reportAssignmentType]
    state = leaves.load_state(fq, loaded, empty)
    model.load_state_dict({name: loaded[name] for name in entries})
    return state


def _check_masters_are_apart(parts: Sequence[Any]) -> None:
    """Raise ValueError where a Megatron optimizer does not keep its masters as tensors apart from the parameters."""
    wanted = {
        "overlap_param_gather": "under which parameters are gathered as their layer runs",
        "overlap_param_gather_with_optimizer_step": "under which parameters are gathered as others step",
        "reuse_grad_buf_for_mxfp8_param_ag": "under which parameters are fp8",
        "use_precision_aware_optimizer_no_fp8_or_ds_fp8": "under which masters are the fused optimizer's own, or bits "
        "of the parameters; set use_precision_aware_optimizer=False",
        "optimizer_cpu_offload": "under which masters are on the CPU",
        "use_megatron_fsdp": "which shards parameters",
    }
    for part in parts:
        for config in (part.config, getattr(part, "ddp_config", None)):
            for name, why in wanted.items():
                if getattr(config, name, False):
                    raise ValueError(f"optimizer: found {name}, {why}, wanted it off")


def _masters(
    fq: fqt.Transform, parts: Sequence[Any], model: Module, params: Mapping[str, Tensor], is_distributed: bool
) -> dict[str, Tensor]:
    """What each parameter's values are made of; DistributedOptimizer's parameters stand for themselves."""
    mains: dict[int, Tensor] = {}
    if is_distributed:
        is_foreign = any(unwrap(chunk) is not model for part in parts for chunk in part.model_chunks)
    else:
        stepped: set[int] = set()
        for part in parts:
            if not part.is_stub_optimizer:
                for half_group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
                    mains.update((id(param), main) for param, main in zip(half_group, main_group, strict=True))
                stepped.update(id(param) for group in part.fp32_from_fp32_groups for param in group)
        is_foreign = not mains.keys() | stepped <= set(map(id, params.values()))
    if is_foreign:
        raise ValueError(
            "optimizer: found parameters that are not the model's, wanted those of this one model or chunk; virtual "
            "pipeline stages have several"
        )
    masters = {name: mains.get(id(param), param) for name, param in params.items()}
    for group in fq.spec.groups:
        own = {name: params[name] for name in group.names if name in params}  # fakequant names the others
        are_fp32 = any(id(param) in mains for param in own.values())  # as a group's weights have one dtype
        for name, param in own.items():
            if not param.requires_grad:
                dtype = torch.float32 if are_fp32 else param.dtype
                masters[name] = param.detach().to(dtype, copy=True)
            elif id(param) not in mains and (param.dtype == torch.float32 or not is_distributed):
                raise ValueError(
                    f"parameter {name!r}: found {param.dtype} without a main parameter in the optimizer, wanted bf16 "
                    "or fp16, which has a master in fp32"
                )
    return masters


def _check_whole(fq: fqt.Transform, axes: Mapping[str, str]) -> None:
    """Raise ValueError if a rank holds only a part of a granule: sums over ranks are not made."""
    if isinstance(fq.method, Max):
        return
    for group in fq.spec.groups:
        axis = axes.get(group.key)
        if axis is not None and DIMS.index(axis) in collapsed_dims(group.format, "amax"):
            raise ValueError(
                f"method {type(fq.method).__name__}: found group {group.key!r} split along {axis!r} by tensor "
                f"parallelism within the granules of {group.format.name}, wanted whole ones on each rank; use Max, or "
                "a format of smaller granules"
            )


def _chosen(
    fq: fqt.Transform, params: Mapping[str, Tensor], state: State, statistics: Mapping[str, Tensor] | None
) -> State:
    """The state that the method chooses, from that of `Max` over all ranks."""
    chosen: State = {}
    for group in progress(fq.spec.groups, bar_of(fq.method)):
        weights = [weight.detach() for weight in weights_of(params, group)]
        importance = importance_of(group, weights, statistics)
        chosen[group.key] = chosen_leaves(fq.method, group, weights, None, state[group.key], importance)
    return chosen


def _sharded_state_dict(model: Module) -> dict[str, Any]:
    return model.sharded_state_dict()  # pyright: ignore[reportCallIssue, reportReturnType] (every MegatronModule's)


def _materialize(model: Module) -> None:
    """Memory for parameters and buffers on meta, with the attributes that Megatron put on them."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage]
            if (buffer := module._buffers[name]) is not None and buffer.is_meta:  # pyright: ignore[reportPrivateUsage]
                raise ValueError(
                    f"buffer '{path}.{name}': found it on meta, wanted values, which no checkpoint has; set it first"
                )
    made_of: dict[int, Tensor] = {}  # a parameter that two modules share stays one
    for module in model.modules():
        deferred = {name: p for name, p in module._parameters.items() if p is not None and p.is_meta}  # pyright: ignore[reportPrivateUsage]
        if deferred and te.is_te(module):  # sets the attributes that it leaves out on meta
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
            for name, tensor in deferred.items():
                vars(module._parameters[name]).update(vars(tensor))  # pyright: ignore[reportPrivateUsage]
        for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = made_of.setdefault(id(tensor), _on_device(tensor))  # pyright: ignore[reportArgumentType]


def _on_device(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device=torch.cuda.current_device())
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, tensor.requires_grad)
    vars(made).update(vars(tensor))
    return made


def _check_unfused(model: Module, spec: Spec) -> None:
    """Raise ValueError where Transformer Engine's op fuser computes with the experts' own parameters."""
    modules = dict(model.named_modules())
    for group in spec.groups:
        words = group.names[0].split(".")
        for depth in range(len(words)):
            module = modules.get(".".join(words[:depth]))
            if getattr(module, "_with_fused_impl", False) or hasattr(module, "_make_fused_impl"):
                raise ValueError(
                    f"parameter {group.names[0]!r}: found {type(module).__name__} with Transformer Engine's op fuser, "
                    "which computes with the parameters themselves, wanted use_transformer_engine_op_fuser=False"
                )


def _check_gathered(model: Module, wanted: str) -> None:
    while isinstance(inner := getattr(model, "module", None), Module):
        if getattr(getattr(model, "ddp_config", None), "overlap_param_gather", False):
            raise ValueError(
                f"model: found overlap_param_gather, under which parameters are gathered as their layer runs, wanted "
                f"{wanted}, or overlap_param_gather=False"
            )
        model = inner
