"""Trains a model of Transformer Engine's experts with `megatron.attach`; the ranks of torchrun, each on a GPU.

    python -m torch.distributed.run --nproc-per-node=2 tests/integrations/attach_on_gpus.py --folder /tmp/f --tp 2

The first run, of one rank, saves the weights that it starts with, which later ones load at their own parallelism. Each
rank saves its losses, its fake weights and its masters after the last step. See test_megatron_attach.py.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import fq_transforms as fqt
from tests.integrations.test_te import gpt, loss_of, trainer

STEPS = 8
RULES = {"*.mlp.experts.*": fqt.NVFP4, "*.linear_proj.weight": fqt.INT8_PER_CHANNEL}


def main():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import finalize_model_grads

    from fq_transforms.integrations import megatron

    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--microbatches", type=int, default=2, help="of a step, over all data-parallel ranks")
    options = parser.parse_args()
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(
        options.tp, expert_model_parallel_size=options.ep, expert_tensor_parallel_size=options.tp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = gpt(
        fused=True,
        tensor_model_parallel_size=options.tp,
        sequence_parallel=options.tp > 1,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.tp,
    )
    fq = fqt.transform(megatron.select(model, RULES))
    start = options.folder / "start"
    if not start.exists():
        megatron.save(start, fq, model, megatron.calibrate(fq, model))
    state = megatron.load(start, fq, model)
    ddp, optimizer = trainer(model, options.distributed, clip_grad=0.0)

    def recalibrate(step, masters, state):
        return megatron.calibrate(fq, ddp, masters=masters)

    attached = megatron.attach(fq, optimizer, ddp, state, recalibrate=recalibrate)
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = []
    for step in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        mine = range(options.microbatches)[rank::replicas]
        total = 0.0
        for microbatch in mine:
            loss = loss_of(ddp, step * options.microbatches + microbatch) / len(mine)
            loss.backward()
            total += loss.item()
        finalize_model_grads([ddp])
        assert optimizer.step()[0]
        losses.append(total)

    params = dict(megatron.unwrap(ddp).named_parameters())
    names = [name for group in fq.spec.groups for name in group.names]
    weights = {name: params[name].detach().cpu().clone() for name in names}
    attached.cast()
    masters = {name: attached.masters[name].detach().cpu() for name in names}
    number = f"{dist.get_world_size()}-{options.distributed}-{dist.get_rank()}"
    torch.save({"losses": losses, "weights": weights, "masters": masters}, options.folder / f"{number}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's writer starts processes that import this file
    main()
