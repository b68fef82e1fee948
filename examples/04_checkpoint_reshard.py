# %% [markdown]
"""# Checkpoint: calibrated at one expert parallelism, loaded at another

A small Mixture-of-Experts layer has its experts split over the ranks of a process group. Its state is calibrated at
EP=4 and saved. Then the same checkpoint is loaded at EP=4, EP=2 and EP=1, and the logits are the same to the last bit.

    torchrun --nproc-per-node=4 examples/04_checkpoint_reshard.py

As a notebook, or without torchrun, it runs on one rank. It takes a few seconds on two cores.
"""

# %%
import os

import optree
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(__doc__)  # it is small as it is
EXPERTS, HIDDEN, INNER, TOKENS, CLASSES = 8, 64, 128, 32, 10

for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
    os.environ.setdefault(name, value)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
torch.set_num_threads(1)


# %% [markdown]
# ## The layer
# Stacked experts `[E, out, in]`, as transformers 5 has them. A rank computes its own experts for all tokens; their
# outputs are gathered and summed in the order of the experts, so that the sum is the same however they are split.


# %%
def local(parameter):
    """This rank's experts."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        magnitude = torch.logspace(-1, 1, EXPERTS)[:, None, None]  # each expert has an amax of its own
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * magnitude / HIDDEN**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * magnitude / INNER**0.5)

    def forward(self, x_TC, router_TE):
        outputs = []
        for gate_up, down in zip(local(self.gate_up_proj), local(self.down_proj), strict=True):
            gate, up = F.linear(x_TC, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        mine_ETC = torch.stack(outputs)
        if isinstance(self.down_proj, DTensor):
            mesh, placements = self.down_proj.device_mesh, self.down_proj.placements
            mine_ETC = DTensor.from_local(mine_ETC, mesh, placements).full_tensor()
        return sum(mine_ETC[e] * router_TE[:, e, None] for e in range(EXPERTS))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, x_TC):
        return self.head(x_TC + self.experts(x_TC, self.router(x_TC).softmax(-1)))


model, tokens = Model(), torch.randn(TOKENS, HIDDEN)
weights = {name: parameter.detach() for name, parameter in model.named_parameters()}


def at_expert_parallelism(ep):
    """The parameters with the experts split over `ep` ranks, and as many replicas as there are ranks left."""
    mesh = init_device_mesh("cpu", (size // ep, ep), mesh_dim_names=("replica", "expert"))
    return {
        name: distribute_tensor(w, mesh, [Replicate(), Shard(0)]) if ".experts." in f".{name}" else w
        for name, w in weights.items()
    }


# %% [markdown]
# ## Calibrate and save
# The spec is made of global shapes, so one spec serves all splits. Each amax is reduced by a tenth, as a search for a
# better one might do: what is loaded below cannot have been computed anew.

# %%
params = at_expert_parallelism(size)
rules = {"experts.gate_up_proj": fqt.NVFP4, "experts.down_proj": fqt.INT8_PER_CHANNEL}
fq = fqt.transform(fqt.select(params, rules))
if rank == 0:
    tiny_moe.show(fq.spec)

state = optree.tree_map(lambda amax: 0.9 * amax, fq.calibrate(params))
logits = functional_call(model, fq.fakequant(params, state), (tokens,))

path = options.out / "reshard_state"
fqt.checkpoint.save(path, fq, state)

# %% [markdown]
# ## Load at every other parallelism

# %%
splits = [ep for ep in (4, 2, 1) if ep <= size]
for ep in splits:
    params = at_expert_parallelism(ep)
    loaded = fqt.checkpoint.load(path, fq, like=fq.init(params))
    again = functional_call(model, fq.fakequant(params, loaded), (tokens,))
    assert torch.equal(again, logits), f"EP={ep}: the logits differ from those at EP={size}"
    if rank == 0:
        amax = loaded["experts.gate_up_proj"]["amax"].to_local()
        print(f"saved at EP={size}, loaded at EP={ep}: {len(amax)} of {EXPERTS} amax on rank 0, the same logits")

# %% [markdown]
# ## What it found

# %%
if rank == 0:
    count = sum(leaf.numel() for group in state.values() for leaf in group.values())
    print(f"\nOne checkpoint of {count:,} amax, saved at EP={size}, was read at EP={', '.join(map(str, splits))}.")
    print(f"At each the model gave the same {logits.numel()} logits, to the last bit.")
dist.destroy_process_group()
