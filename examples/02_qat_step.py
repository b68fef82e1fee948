# %% [markdown]
"""# Quantization-aware training: what a step looks like, and what it costs

A small Mixture-of-Experts model learns under NVFP4 fake quantization. The training loop is a lens around the optimizer
step: fake weights are written into an ordinary bf16 model, and its gradients are taken to fp32 master weights. Three
other ways give the same gradients, bit for bit:

1. `functional_call` with new fake weights at every microbatch: the plain form, for experiments.
2. `fqt.value_and_grad`: fake weights and their pullback once per optimizer step, without masters.
3. `fqt.layerwise`: a layer's fake weights exist while it computes, without masters.

`python examples/02_qat_step.py` runs on a GPU if there is one, else on a CPU, where it takes some seconds on two cores;
with `--small` it is over sooner.
"""

# %%
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm.auto import trange

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(__doc__)
torch.manual_seed(0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = tiny_moe.Sizes(layers=2, hidden=128, inner=256)
STEPS, MICROBATCHES, TOKENS = 60, 4, 64
if options.small:
    SIZES = tiny_moe.Sizes(layers=2, hidden=64, inner=64, experts=4)
    STEPS, MICROBATCHES, TOKENS = 16, 2, 32


# %% [markdown]
# ## A bf16 model that knows nothing of quantization
# Each token goes to two experts. The second layer's activations are checkpointed: made again in backward.


# %%
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(SIZES.hidden), tiny_moe.MoE(SIZES)

    def forward(self, x_TC):
        y_TC, _ = self.moe(self.norm(x_TC))
        return x_TC + y_TC


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(SIZES.layers))
        self.head = nn.Linear(SIZES.hidden, SIZES.hidden, bias=False)

    def forward(self, x_TC):
        x_TC = self.layers[0](x_TC)
        x_TC = torch.utils.checkpoint.checkpoint(self.layers[1], x_TC, use_reentrant=False)
        return self.head(x_TC)


teacher = nn.Sequential(nn.Linear(SIZES.hidden, 256), nn.Tanh(), nn.Linear(256, SIZES.hidden))
teacher = teacher.to(DEVICE, torch.bfloat16).requires_grad_(False)


def microbatches(step):
    """Random tokens, and what a fixed network makes of them."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(MICROBATCHES, TOKENS, SIZES.hidden, generator=generator).to(DEVICE, torch.bfloat16)
    return list(zip(inputs, teacher(inputs), strict=True))


def loss_fn(model, microbatch):
    inputs, targets = microbatch
    return F.mse_loss(model(inputs).float(), targets.float()) / MICROBATCHES


model = Model().to(DEVICE, torch.bfloat16)
params = dict(model.named_parameters())

# %% [markdown]
# ## What the lens needs
# Masters are fp32 leaves, which mixed-precision training has anyway: the optimizer steps them, and amax is calibrated
# from them, never from the model's own parameters, which are quantized from the first write on.

# %%
masters = fqt.masters(model)
fq = fqt.transform(fqt.select(masters, {"*.experts.*": fqt.NVFP4}))
state = fq.calibrate(masters)
tiny_moe.show(fq.spec)

# %% [markdown]
# ## Four ways to the same gradients
# The lens and the others, at the same weights. For the others `.backward()` is called with the fake weights in place.
# With a checkpointed layer it must be: outside, that layer would run again with its own weights, and its gradients
# would be silently incorrect. Under the lens the model's own weights are the fake ones, so there is no outside.

# %%


class Step(nn.Module):
    """Loss and backward as one call, for `functional_call` to surround."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        loss_fn(self.model, microbatch).backward()


def taken(tensors):
    """The gradients that autograd left, as new tensors in fp32."""
    grads = {name: tensor.grad.float() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return grads


def plain(batch):
    for microbatch in batch:
        weights = fq.fakequant(params, state)
        functional_call(Step(model), {f"model.{name}": weight for name, weight in weights.items()}, (microbatch,))
    return taken(params)


def once(batch):
    _, grads = fqt.value_and_grad(loss_fn, fq, model)(params, state, batch)
    return {name: grad.float() for name, grad in grads.items()}


def layerwise(batch):
    with fqt.layerwise(fq, model, state):
        for microbatch in batch:
            loss_fn(model, microbatch).backward()
    return taken(params)


def lens(batch):
    fq.fakequant(masters, state, out=model)
    for microbatch in batch:
        loss_fn(model, microbatch).backward()
    fq.take_grads(model, masters, state)
    return taken(masters)


def unquantized(batch):
    fqt.cast(masters, out=model)
    for microbatch in batch:
        loss_fn(model, microbatch).backward()
    return taken(params)


batch = microbatches(0)
wanted, milliseconds = plain(batch), {}
for way in (unquantized, plain, once, layerwise, lens):  # the lens is last: it leaves fake weights in the model
    way(batch)  # compiles, on a GPU
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(5):
        started = time.perf_counter()
        grads = way(batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        took.append((time.perf_counter() - started) * 1e3)
    milliseconds[way.__name__] = min(took)
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if DEVICE == "cuda" else ""
    equal = all(torch.equal(grads[name], grad) for name, grad in wanted.items())
    print(f"{way.__name__:12} {min(took):7.1f} ms per step{peak}; gradients equal: {equal}")
    assert equal == (way != unquantized)

# %% [markdown]
# ## Training
# The whole loop. Any optimizer will do, any wrapper of the model, and any number of microbatches.

# %%
optimizer = torch.optim.AdamW(masters.values(), lr=3e-3)
history = []
for number in (bar := trange(STEPS, desc="QAT")):
    state = fq.calibrate(masters)
    fq.fakequant(masters, state, out=model)  # in place of a cast from fp32 to bf16
    losses = []
    for microbatch in microbatches(number):
        loss = loss_fn(model, microbatch)
        loss.backward()
        losses.append(loss.detach())
    fq.take_grads(model, masters, state)
    optimizer.step()
    optimizer.zero_grad()
    history.append(sum(losses).item())
    bar.set_postfix(loss=f"{history[-1]:.4f}")

# %% [markdown]
# ## What it found

# %%
first, last = sum(history[:5]) / 5, sum(history[-5:]) / 5
assert last < 0.8 * first
over = {way: f"{least / milliseconds['unquantized']:.2f}" for way, least in milliseconds.items()}
print(
    f"\nFour ways gave the same gradients; here a step took {over['lens']} times the unquantized one by the lens, "
    f"{over['once']} by value_and_grad, {over['layerwise']} by layerwise and {over['plain']} by functional_call."
)
print(f"Under NVFP4 the loss fell from {first:.4f} to {last:.4f} in {STEPS} steps of {MICROBATCHES} microbatches.")
