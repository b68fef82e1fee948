# %% [markdown]
"""# A Megatron model with MoE layers, from the first step to the restored one

A GPTModel at TP=2 and EP=2: build it, calibrate, train under fake quantization with Megatron's own data-parallel
wrapper and optimizer, save weights and amax in one distributed checkpoint, restore them into a model built on the meta
device, and go on training.

    torchrun --nproc-per-node=2 examples/03_megatron_moe.py --folder /tmp/moe
    torchrun --nproc-per-node=1 examples/03_megatron_moe.py --folder /tmp/moe --load    # the same checkpoints at EP=1

With GPUs the experts are Transformer Engine's, and gradients are accumulated by its matrix products. Without,
everything runs on two cores, with Megatron's own layers, in a minute.
"""

# %%
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import optree
import torch
import torch.distributed as dist
from torch.func import functional_call

import fq_transforms as fqt
import tiny_moe

warnings.simplefilter("ignore")  # Megatron names packages that are not installed
ON_GPU = torch.cuda.is_available()
STEPS, MICROBATCHES = 6, 2
EXPERTS, HIDDEN, FFN, VOCABULARY, LENGTH = 4, 256, 256, 128, 32
FORMATS = [fqt.FP8, fqt.NVFP4, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32]


# %% [markdown]
# ## Without a GPU
# Megatron-Core asks for CUDA in a few places where it need not. On a GPU none of this runs.


# %%
def without_a_gpu():
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()  # for dropout, of which there is none here
    moe_utils.te_general_gemm = None

    # Its optimizers make their scalars on "cuda", and know bf16 parameters by the name of their type there.
    def on_the_cpu(make, *args, device=None, **options):
        return make(*args, device="cpu" if device == "cuda" else device, **options)

    torch.tensor, torch.zeros = partial(on_the_cpu, torch.tensor), partial(on_the_cpu, torch.zeros)
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: type_of(self, *to) if to else type_of(self).replace("torch.", "torch.cuda.")


def without_sequence_parallelism(model):
    """Megatron trains MoE under tensor parallelism with sequence parallelism only, whose norms need a GPU."""
    from megatron.core import parallel_state

    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".experts." in name:  # drawn from one seed: the ranks' experts are to differ
                param.mul_(1 + 0.25 * parallel_state.get_expert_model_parallel_rank())
            elif not getattr(param, "tensor_model_parallel", False):
                param.average_gradients_across_tp_domain = True
    return model.eval()


# %% [markdown]
# ## The model
# Nothing in it knows of quantization.


# %%
def build(device=None):
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel = dist.get_world_size()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_ffn_hidden_size=FFN,
        moe_grouped_gemm=ON_GPU,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=not ON_GPU,
        init_model_with_meta_device=ON_GPU and device == "meta",
        perform_initialization=device != "meta",
        tensor_model_parallel_size=parallel,
        expert_model_parallel_size=parallel,
        expert_tensor_parallel_size=1,
        sequence_parallel=ON_GPU and parallel > 1,
    )
    if ON_GPU:
        layers = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(EXPERTS, moe_grouped_gemm=True)
    else:
        layers = gpt_layer_specs.get_gpt_layer_local_spec(EXPERTS, moe_grouped_gemm=False)
    with torch.device(device) if device else nullcontext():
        model = GPTModel(config, layers, vocab_size=VOCABULARY, max_sequence_length=LENGTH)
    model = model.bfloat16()
    if not ON_GPU:
        return without_sequence_parallelism(model)
    for module in model.modules():  # the config's switch would ask for APEX in Megatron's own output layer
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    return model if device else model.cuda()


def trainer(model):
    """Megatron's DistributedDataParallel and optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(model.config, config, model)
    options = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, use_distributed_optimizer=True)
    return ddp, get_megatron_optimizer(options, [ddp])


# %% [markdown]
# ## Steps of training
# `megatron.attach` makes the optimizer's own step leave fake weights in the model. Nothing else of a training loop
# knows of it. Each amax is that of the masters after the step. `detach` leaves the masters' values, unquantized.


# %%
def batch(seed):
    """Rows that count by threes from somewhere."""
    device = "cuda" if ON_GPU else "cpu"
    start = torch.randint(0, VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(seed)).to(device)
    ids = (start + 3 * torch.arange(LENGTH + 1, device=device)) % VOCABULARY
    mask = None if ON_GPU else torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    positions = torch.arange(LENGTH, device=device).expand(4, -1)
    return ids[:, :-1].contiguous(), positions, mask, ids[:, 1:].contiguous()


def train(fq, ddp, optimizer, steps):
    from megatron.core.distributed import finalize_model_grads

    from fq_transforms.integrations import megatron

    def recalibrate(step, masters, state):
        return megatron.calibrate(fq, ddp, masters=masters)

    attached = megatron.attach(fq, optimizer, ddp, megatron.calibrate(fq, ddp), recalibrate=recalibrate)
    losses = []
    for number in steps:
        ddp.zero_grad_buffer()
        total = 0.0
        for microbatch in range(MICROBATCHES):
            ids, positions, mask, labels = batch(number * MICROBATCHES + microbatch)
            loss = ddp(ids, positions, mask, labels=labels).float().mean() / MICROBATCHES
            loss.backward()
            total += loss.item()
        finalize_model_grads([ddp])
        optimizer.step()
        say(f"step {number}: loss {total:.4f}")
        losses.append(total)
    attached.detach()
    return losses


def transform_of(model, format):
    from fq_transforms.integrations import megatron

    return fqt.transform(megatron.select(model, {"*.mlp.experts.*": format}))


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def logits_of(fq, model, state):
    from fq_transforms.integrations import megatron

    ids, positions, mask, _ = batch(0)
    with torch.no_grad():
        return functional_call(model, megatron.fakequant(fq, model, state), (ids, positions, mask))


# %% [markdown]
# ## The story
# Each amax is reduced by a tenth before it is saved, as a search for a better one might do: what is restored cannot
# have been calibrated anew. Before logits are compared, the restored model is wrapped as the first one is: its weights
# are then aligned alike, on which matrix products may depend in the last bit.


# %%
def main():
    options = tiny_moe.options(
        __doc__,
        folder={"type": Path, "help": "of the checkpoints (OUT/megatron)"},
        load={"action": "store_true", "help": "only load what another run has saved there"},
    )
    folder, formats = options.folder or options.out / "megatron", FORMATS[: 2 if options.small else None]
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    from megatron.core import parallel_state, tensor_parallel

    from fq_transforms.integrations import megatron

    parallel_state.initialize_model_parallel(size, expert_model_parallel_size=size, expert_tensor_parallel_size=1)
    torch.manual_seed(7)  # routers and position embeddings are drawn on the CPU, alike on all ranks
    if ON_GPU:
        torch.cuda.set_device(rank)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
    else:
        without_a_gpu()
        torch.set_num_threads(1)

    if options.load:
        for format in formats:
            model = build("meta")
            fq = transform_of(model, format)
            state = megatron.load(folder / format.name, fq, model)
            wanted = optree.tree_map(lambda amax: 0.9 * amax, megatron.calibrate(fq, model))
            assert all(map(torch.equal, optree.tree_leaves(state), optree.tree_leaves(wanted)))
            count = sum(len(leaf) for leaf in optree.tree_leaves(state))
            say(f"{format.name}: {count} experts at EP={size}, the amax of each is 0.9 of its own weights'")
    else:
        model = build()
        ddp, optimizer = trainer(model)
        nvfp4 = transform_of(ddp, fqt.NVFP4)
        say(nvfp4.spec)
        first = train(nvfp4, ddp, optimizer, range(STEPS))[0]
        for format in formats:
            fq = transform_of(ddp, format)
            state = optree.tree_map(lambda amax: 0.9 * amax, megatron.calibrate(fq, ddp))
            logits = logits_of(fq, model, state)
            megatron.save(folder / format.name, fq, ddp, state)

            fresh = build("meta")
            restored = megatron.load(folder / format.name, fq, fresh)
            assert all(map(torch.equal, optree.tree_leaves(restored), optree.tree_leaves(state)))
            model = fresh
            ddp, optimizer = trainer(model)
            assert torch.equal(logits_of(fq, model, restored), logits)
            say(f"{format.name}: restored at TP={size}, EP={size} into a model on meta, the same state and logits")
        last = train(nvfp4, ddp, optimizer, range(STEPS, 2 * STEPS))[-1]
        assert last < first
        say(f"\nIn {len(formats)} formats a model on meta took back the same state and logits at TP={size}, EP={size}.")
        say(f"Under NVFP4 the loss went from {first:.4f} to {last:.4f} in {2 * STEPS} steps, restored half way.")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's writer starts processes that import this file
    main()
