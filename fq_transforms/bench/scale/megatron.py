"""The part `megatron`: a GPTModel of MoE layers and DistributedOptimizer, with and without `megatron.attach`.

Both ways train the same model by the same call; what is attached or detached in between is not timed. The optimizer's
own cast and all-gather are in both, after which the lens takes one pass over the bf16 parameters: their fake weights
are `fakequant` of these, and these are the masters in bf16.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fq_transforms as fqt
from fq_transforms.bench.scale import steps
from fq_transforms.bench.timing import Turn
from fq_transforms.checkpoint import megatron as leaves_of
from fq_transforms.integrations import megatron
from fq_transforms.partition import DIMS
from fq_transforms.state import State

__all__ = ["load", "train"]

RULES = {"*.mlp.experts.*": steps.FORMAT}
RATE = 1e-4


def _model(options: Namespace, *, on_meta: bool = False) -> nn.Module:
    """A GPTModel whose every layer has experts, squared ReLU in them; on GPUs of Transformer Engine's layers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor, on_gpu = options.tensor, options.device == "cuda"
    experts: dict[str, Any] = {
        "expert_tensor_parallel_size": tensor,
        "expert_model_parallel_size": dist.get_world_size() // tensor,
    }
    parallel_state.initialize_model_parallel(tensor, **experts)
    if on_gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=2 * max(1, options.hidden // 168),  # 32 of Nemotron-3-Nano's 2688
        num_query_groups=2,
        kv_channels=128,
        num_moe_experts=options.experts,
        moe_router_topk=options.top,
        moe_ffn_hidden_size=options.ffn,
        moe_grouped_gemm=on_gpu,
        moe_token_dispatcher_type="alltoall" if on_gpu else "allgather",
        moe_router_load_balancing_type="none",
        moe_router_force_load_balancing=True,
        activation_func=_squared_relu,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        init_model_with_meta_device=on_gpu and on_meta,
        perform_initialization=not on_meta,
        sequence_parallel=on_gpu and tensor > 1,
        tensor_model_parallel_size=tensor,
        **experts,
    )
    if on_gpu:
        layers = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(options.experts, moe_grouped_gemm=True)
    else:
        layers = gpt_layer_specs.get_gpt_layer_local_spec(options.experts, moe_grouped_gemm=False)
    with torch.device("meta" if on_meta else options.device):
        model = GPTModel(config, layers, vocab_size=steps.VOCABULARY, max_sequence_length=steps.LENGTH).bfloat16()
    # Megatron trains MoE under tensor parallelism with sequence parallelism only, whose norms need a GPU.
    return model if on_gpu else model.eval()


def _squared_relu(x: Tensor) -> Tensor:
    """Megatron's own compiles itself at its first calls."""
    return torch.relu(x).square()


def _entries(model: nn.Module) -> dict[str, Any]:
    return model.sharded_state_dict()  # pyright: ignore[reportCallIssue, reportReturnType] (every MegatronModule's)


def _cuts(fq: fqt.Transform, entries: dict[str, Any]) -> dict[str, int]:
    """Along which dimension tensor parallelism cuts the stacked weights of a group, if it does."""
    return {key: DIMS.index(axis) for key, axis in leaves_of.split_axes(fq, entries).items()}


def _whole(local: Tensor, cut: int | None) -> Tensor:
    """Of all ranks, from this one's experts and its slice along `cut`."""
    from megatron.core import parallel_state as parallel

    over: list[tuple[Any, int]] = [(parallel.get_expert_model_parallel_group(), 0)]
    if cut is not None and cut < local.dim() and local.shape[cut] > 1:
        over.insert(0, (parallel.get_expert_tensor_parallel_group(), cut))
    for group, dim in over:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group)
        local = torch.cat(parts, dim)
    return local


def _whole_state(state: State, cuts: dict[str, int]) -> State:
    return {key: {name: _whole(leaf, cuts.get(key)) for name, leaf in leaves.items()} for key, leaves in state.items()}


@torch.no_grad()
def _tell_apart(fq: fqt.Transform, model: nn.Module, experts: int) -> None:
    """Give each expert a magnitude of its own."""
    from megatron.core import parallel_state

    params, rank = dict(model.named_parameters()), parallel_state.get_expert_model_parallel_rank()
    for group in fq.spec.groups:
        for number, name in enumerate(group.names, len(group.names) * rank):
            params[name].mul_(1 + number / experts)


def _trainer(model: nn.Module) -> tuple[Any, Any]:
    """Megatron's DistributedDataParallel and DistributedOptimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config: Any = model.config
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(config, buffers, model)
    given: dict[str, Any] = {"optimizer": "adam", "lr": RATE, "bf16": True, "params_dtype": torch.bfloat16}
    return ddp, get_megatron_optimizer(OptimizerConfig(use_distributed_optimizer=True, **given), [ddp])


def _check(fq: fqt.Transform, model: nn.Module, attached: megatron.Attached) -> State:
    """Compare what a step has left with one GPU's; the whole state that it was written with. Leaves masters there."""
    cuts = _cuts(fq, _entries(model))

    def stacked() -> dict[str, Tensor]:
        params = dict(model.named_parameters())
        return {group.key: torch.stack([params[name].detach() for name in group.names]) for group in fq.spec.groups}

    fakes = stacked()
    attached.cast()
    whole, new = _whole_state(attached.quantizer_state, cuts), _whole_state(megatron.calibrate(fq, model), cuts)
    for key, masters in stacked().items():
        wanted, leaves = steps.on_one_gpu(_whole(masters, cuts.get(key)).unbind(), whole[key])
        steps.check_equal(_whole(fakes.pop(key), cuts.get(key)), torch.stack(wanted), f"fake weights of {key}")
        for name, leaf in leaves.items():
            steps.check_equal(new[key][name], leaf, f"{name} of {key}")
    return whole


def train(options: Namespace) -> steps.Row:
    """Steps by turns, then one more of the lens, and everything that is to be equal; its state is saved.

    Raises:
        SystemExit: Fake weights or state are not those of one GPU.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import finalize_model_grads

    model = _model(options)
    fq = fqt.transform(megatron.select(model, RULES))
    _tell_apart(fq, model, options.experts)
    ddp, optimizer = _trainer(model)
    state = megatron.calibrate(fq, ddp)
    attached: megatron.Attached | None = None

    def attach() -> None:
        nonlocal attached
        attached = attached or megatron.attach(fq, optimizer, ddp, state)

    def detach() -> None:
        nonlocal attached
        if attached is not None:
            attached.detach()
        attached = None

    ids, length = steps.random_ids(options), min(steps.LENGTH, options.tokens)
    positions = torch.arange(length, device=ids.device).expand(len(ids), -1)
    mask = None if options.device == "cuda" else torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def step() -> None:
        ddp.zero_grad_buffer()
        ddp(ids[:, :-1].contiguous(), positions, mask, labels=ids[:, 1:].contiguous()).float().mean().backward()
        finalize_model_grads([ddp])
        optimizer.step()

    params = dict(model.named_parameters())
    alone = partial(fq.fakequant, params, state, out=params, inplace=True)
    row = steps.in_turns_on_ranks(Turn(step, detach), Turn(step, attach), alone, options)

    attach()
    step()
    assert attached is not None
    whole = _check(fq, model, attached)
    path = Path(options.saved) / "state"
    path.mkdir(exist_ok=True)
    dist_checkpointing.save(leaves_of.sharded_state_dict(fq, state, _entries(model)), str(path))
    if dist.get_rank() == 0:
        torch.save(whole, Path(options.saved) / "whole.pt")
    return row | steps.Row(part="megatron", layout=_layout(options), law="bf16 parameters")


def _layout(options: Namespace) -> str:
    experts = f"EP={dist.get_world_size() // options.tensor}"
    return experts if options.tensor == 1 else f"TP={options.tensor} x {experts}"


def load(options: Namespace) -> str:
    """Load the state of every checkpoint on these ranks, whose model is on meta; how these share it.

    Raises:
        SystemExit: It is not what was saved.
    """
    from megatron.core import dist_checkpointing

    model = _model(options, on_meta=True)
    fq = fqt.transform(megatron.select(model, RULES))
    empty = fq.init(dict(model.named_parameters()))
    for folder in map(Path, options.saved):
        leaves_of.verify(folder / "state", fq, _entries(model))
        places = leaves_of.sharded_state_dict(fq, empty, _entries(model))
        loaded: Any = dist_checkpointing.load(places, str(folder / "state"))
        state: Any = leaves_of.load_state(fq, loaded, empty)
        here = {key: {name: leaf.to(options.device) for name, leaf in state[key].items()} for key in state}
        wanted = torch.load(folder / "whole.pt", map_location=options.device, weights_only=True)
        for key, leaves in _whole_state(here, _cuts(fq, _entries(model))).items():
            for name, leaf in leaves.items():
                steps.check_equal(leaf, wanted[key][name], f"{name} of {key}, loaded from {folder.name}")
    return _layout(options)
