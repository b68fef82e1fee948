"""Run by torchrun with two processes: FSDP2 beside the whole model on one device. With `cuda` on GPUs, else on CPUs.

Each process has the whole model too, which sees all tokens, those of one rank after the other's: their gradients are
then rounded to bf16 as the ranks' are.
"""

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import fq_transforms as fqt
from tests.cases import same_bits
from tests.training import toy

STEPS = 3


def whole(tensors):
    return {name: t.detach().full_tensor() for name, t in tensors.items()}


def check_write(fq, masters, state, model):
    """Written with no collective; bit for bit what one device makes of the whole masters."""
    with CommDebugMode() as collectives:
        written = fq.fakequant(masters, state, out=model)
    assert collectives.get_total_counts() == 0
    gathered = whole(masters)
    wanted = fq.fakequant(gathered, {key: whole(leaves) for key, leaves in state.items()})
    for name, fake in whole(written).items():
        assert same_bits(fake, wanted[name].bfloat16()), name


def train(device, rank, backward):
    """The largest difference of logits, in parts of the largest logit, after each step; and how far they went."""
    one, many = toy.toy().to(device), toy.toy().to(device)
    mesh = init_device_mesh(device.type, (2,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in (many.stacked, many.listed, many.transposed, many):
        fully_shard(layer, mesh=mesh, mp_policy=policy)

    lenses = []
    for model, seen in ((one, (0, 1)), (many, (rank,))):
        masters = fqt.masters(model)
        fq = toy.transform(masters, backward)
        state = toy.start(fq, masters)
        fq.fakequant(masters, state, out=model)
        lenses.append((model, seen, masters, fq, state, toy.optimizer_of(masters, state)))

    x = toy.batch(0, toy.MICROBATCHES)[0].to(device)
    with torch.no_grad():
        first = many(x)
        assert torch.equal(first, one(x))
    off = []
    for step in range(STEPS):
        for model, seen, masters, fq, state, optimizer in lenses:
            for i in range(toy.MICROBATCHES):
                for share in seen:
                    tokens, targets = (t.to(device) for t in toy.batch(step, i, share, 2))
                    (toy.loss_of(model(tokens), targets) / len(seen)).backward()
                fq.take_grads(model, masters, state)
            optimizer.step()
            optimizer.zero_grad()
            if model is one:
                fq.fakequant(masters, state, out=model)
            else:
                check_write(fq, masters, state, model)
        with torch.no_grad():
            wanted = one(x)
            off.append(((many(x) - wanted).abs().max() / wanted.abs().max()).item())
    return max(off), ((wanted - first).abs().max() / wanted.abs().max()).item()


def main(kind):
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = distributed.get_rank()
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    for backward in ("pass_through", "clip"):
        off, moved = train(device, rank, backward)
        assert off < 2**-8 < 0.1 < moved, (off, moved)  # an element of bf16 is rounded by up to 2**-9 of it
        if rank == 0:
            print(f"{backward}: fake weights are one device's, logits within {off:.1e}, after a change of {moved:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
