"""What the benchmark of steps trains: a layer of Transformer Engine, and a model of Megatron on one GPU."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["GroupedMLP", "gpt", "single_rank"]


class GroupedMLP(Module):
    """Two GroupedLinears without bias, bf16; `forward` takes [experts * tokens, hidden], as many tokens per expert."""

    def __init__(self, experts: int, hidden: int, ffn: int, tokens: int) -> None:
        super().__init__()
        from transformer_engine.pytorch import GroupedLinear  # pyright: ignore[reportMissingImports]

        options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
        self.linear_fc1: Module = GroupedLinear(experts, hidden, ffn, **options)
        self.linear_fc2: Module = GroupedLinear(experts, ffn, hidden, **options)
        self.splits = [tokens] * experts

    def forward(self, x: Tensor) -> Tensor:
        """[experts * tokens, hidden] to the same."""
        return self.linear_fc2(torch.relu(self.linear_fc1(x, self.splits)), self.splits)


@contextmanager
def single_rank(folder: str) -> Generator[None]:
    """Megatron's process groups of one rank."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def gpt(prepare: Callable[[Module], object] = lambda model: None, *, fused: bool = True, **options: Any) -> Any:
    """A GPTModel with TEGroupedMLP, bf16, in Megatron's DistributedDataParallel.

    Args:
        prepare: What is done to the model before it is wrapped.
        fused: Gradients are accumulated in `main_grad` by the layers.
        options: Of Megatron's TransformerConfig.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        moe_grouped_gemm=True,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        **options,
    )
    layers = get_gpt_layer_with_transformer_engine_spec(num_experts=options["num_moe_experts"], moe_grouped_gemm=True)
    model = GPTModel(config, layers, vocab_size=1024, max_sequence_length=1024).cuda().bfloat16()
    for module in model.modules():  # not by the config, under which Megatron's own output layer would ask for APEX
        if hasattr(module, "fuse_wgrad_accumulation"):
            vars(module)["fuse_wgrad_accumulation"] = fused
    prepare(model)
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
