# %% [markdown]
"""# Quickstart: train, calibrate, fake-quantize, fine-tune

A byte-level Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are fake-quantized in every format: after training (PTQ), with one amax an expert and with one for all experts, and
during some more steps of training (QAT). A few minutes on two cores, after `pip install -e '.[examples]'`; with
`--small` some seconds, too few to learn much.
"""

# %%
import math
import sys
import timeit
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import optree
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm, trange

import fq_transforms as fqt

SMALL = "--small" in sys.argv
STEPS, QAT_STEPS = (20, 3) if SMALL else (480, 80)
LAYERS, HIDDEN, INNER, HEADS = 1 if SMALL else 4, 128, 256, 4
EXPERTS, TOP_K = 8, 2
CONTEXT, BATCH = 128, 16

SCRIPT = globals().get("__file__")  # a notebook has none
OUT = (Path(SCRIPT).parent if SCRIPT else Path.cwd()) / "out"
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## The text
# Some topics share paragraphs. Each paragraph is kept once, so that what is held out was not seen in training.

# %%
paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
text = torch.frombuffer(bytearray("\n\n".join(dict.fromkeys(paragraphs)).encode()), dtype=torch.uint8).long()
training, heldout = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

sequences = (len(heldout) - 1) // CONTEXT
inputs = heldout[: sequences * CONTEXT].view(sequences, CONTEXT)
targets = heldout[1 : sequences * CONTEXT + 1].view(sequences, CONTEXT)
print(f"{len(training):,} bytes to train on, {targets.numel():,} held out")


# %% [markdown]
# ## The model
# Nothing in it knows of quantization.


# %%
def rotary(x):
    """Turn pairs of channels of [..., T, C] by angles that grow with the position."""
    T, C = x.shape[-2:]
    angle = torch.outer(torch.arange(T), 1000 ** -torch.linspace(0, 1, C // 2))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        """Outputs for tokens [N, C], and the load-balancing loss of Switch Transformers: 1 if the load is even."""
        probability = self.router(x).float().softmax(-1)
        gate, chosen = probability.topk(TOP_K)
        gate = (gate / gate.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            # An expert that no token chose runs on zero rows: its gradients are then zeros, not None.
            token, rank = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * gate[token, rank, None])
        load = F.one_hot(chosen, EXPERTS).float().mean((0, 1))
        return y, EXPERTS * load @ probability.mean(0)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(HIDDEN), Attention()
        self.moe_norm, self.moe = nn.RMSNorm(HIDDEN), MoE()

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        y, balance = self.moe(self.moe_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens):
        x, balance = self.embedding(tokens), 0.0
        for layer in self.layers:
            x, layer_balance = layer(x)
            balance = balance + layer_balance / LAYERS
        return self.head(self.norm(x)), balance


# %% [markdown]
# ## Training
# `quantize` maps the parameters to the weights that the model runs with. In plain training it is the identity; in QAT
# it is `fakequant`, whose gradient is that of the identity.


# %%
def train(params, steps, *, lr, seed, label, quantize=lambda params: params):
    params = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in (bar := trange(steps, desc=label)):
        start = torch.randint(len(training) - CONTEXT, (BATCH, 1), generator=generator)
        window = training[start + torch.arange(CONTEXT + 1)]
        logits, balance = functional_call(model, quantize(params), (window[:, :-1],))
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return {name: param.detach() for name, param in params.items()}


model = LanguageModel()
params = train(dict(model.named_parameters()), STEPS, lr=4e-3, seed=0, label="train")

# %% [markdown]
# ## Held-out loss
# Weights are rounded to bf16 before anything else is done to them. The model then computes in bf16 too, unless this
# CPU is slow at it.


# %%
def matmul_seconds(dtype):
    a = torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: a @ a, number=2, repeat=5))


compute = torch.bfloat16 if matmul_seconds(torch.bfloat16) < 2 * matmul_seconds(torch.float32) else torch.float32


def bf16(params):
    return {name: param.bfloat16() for name, param in params.items()}


@torch.no_grad()
def heldout_logits(weights):
    weights = {name: weight.to(compute) for name, weight in weights.items()}
    return torch.cat([functional_call(model, weights, (tokens,))[0] for tokens in inputs.split(64)])


def heldout_loss(weights):
    """Mean loss of each held-out sequence, in nats a byte."""
    logits = heldout_logits(weights).float()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


# %% [markdown]
# ## Select and calibrate
# `select` says which parameters are quantized, grouped by expert. The state holds what calibration found: for NVFP4,
# the largest magnitude (amax) of each expert.

# %%
weights = bf16(params)
spec = fqt.select(weights, {"*.experts.*": fqt.NVFP4})
fq = fqt.transform(spec)
state = fq.calibrate(weights)
print(spec)
print(state["layers.0.moe.experts.*.w1.weight"])

# %% [markdown]
# ## PTQ in every format
# The state is a pytree, so sharing one scale is a map over it: each entry becomes the largest of the same entry over
# all experts. For INT4, NVFP4_STATIC and others with blocks that is every block's amax; NVFP4 keeps only an amax an
# expert, and MX formats, which take every scale from the weights, keep nothing to share.

# %%
FORMATS = [value for value in vars(fqt).values() if isinstance(value, fqt.Format)]


def experts_in(format):
    return fqt.transform(fqt.select(params, {"*.experts.*": format}))


def tie(state):
    return optree.tree_map(lambda amax: amax.amax(0, keepdim=True).expand_as(amax).contiguous(), state)


base = heldout_loss(weights)
each, tied = {}, {}
for format in (bar := tqdm(FORMATS, desc="PTQ")):
    bar.set_postfix_str(format.name)
    fq_format = experts_in(format)
    amax = fq_format.calibrate(weights)
    each[format] = heldout_loss(fq_format.fakequant(weights, amax))
    if not format.is_stateless:
        tied[format] = heldout_loss(fq_format.fakequant(weights, tie(amax)))

# %% [markdown]
# ## QAT for the formats that lost most
# Some more steps from the trained weights, calibrated again at each, since the weights move. The same steps without
# quantization, on the same batches, are the control: for bf16, and for PTQ after them.

# %%
# NVFP4_STATIC, calibrated on the weights that it quantizes, is NVFP4: of formats with equal losses one is enough.
distinct = {each[format].mean().item(): format for format in reversed(FORMATS)}
worst = [distinct[loss] for loss in sorted(distinct, reverse=True)[:3]]
more = {"lr": 2e-4, "seed": 1}
control = bf16(train(params, QAT_STEPS, label="bf16, same extra steps", **more))
base_more = heldout_loss(control)
later, qat = {}, {}
for format in worst:
    fq_format = experts_in(format)

    def quantize(params, fq=fq_format):
        return fq.fakequant(params, fq.calibrate(params))

    later[format] = heldout_loss(quantize(control))
    trained = bf16(train(params, QAT_STEPS, label=f"QAT {format.name}", quantize=quantize, **more))
    qat[format] = heldout_loss(quantize(trained))

# %% [markdown]
# ## The table
# An increase of less than two standard errors may be chance. This model is small and was trained for a minute or two: a
# large one need not rank the formats alike.


# %%
def increase(losses, base):
    """Mean increase of the loss, and its standard error over the held-out sequences."""
    difference = losses - base
    return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def cell(losses, base):
    return "     -" if losses is None else "{:.4f} {:+.4f} ±{:.4f}".format(losses.mean(), *increase(losses, base))


arithmetic = "weights and compute in bf16" if compute == torch.bfloat16 else "weights rounded to bf16, compute in fp32"
print(f"\nHeld-out loss in nats a byte ({targets.numel():,} bytes; {arithmetic}),")
print("and its increase over bf16 with as many steps, ± the standard error of that\n")
columns = ("PTQ, an amax an expert", "PTQ, one for all", f"{QAT_STEPS} more steps, PTQ", f"{QAT_STEPS} steps of QAT")
rows = [("bf16", f"{base.mean():.4f}"), ("bf16, same extra steps", "", "", f"{base_more.mean():.4f}")]
for format in FORMATS:
    after = [cell(losses.get(format), base) for losses in (each, tied)]
    after += [cell(losses.get(format), base_more) for losses in (later, qat)]
    rows.append((format.name, *after))
for row in (("", *columns), *rows):
    print("".join(f"{entry:24}" for entry in row).rstrip())

# %% [markdown]
# ## Save and load
# One safetensors file, which also says what it holds: the spec is in its metadata. Whoever gets it needs nothing else.

# %%
path = OUT / "nvfp4_state.safetensors"
fqt.checkpoint.save_file(state, path, spec=spec)

reloaded, stored = fqt.checkpoint.load_file(path), fqt.transform(fqt.checkpoint.read_spec(path))
before = heldout_logits(fq.fakequant(weights, state))
after = heldout_logits(stored.fakequant(weights, reloaded))
assert torch.equal(before, after)
leaves = fqt.state.flatten(reloaded)
print(f"{path.name}: {len(leaves)} leaves, {path.stat().st_size:,} bytes, the same logits after loading")

# %% [markdown]
# ## Figure

# %%
if SCRIPT:
    matplotlib.use("Agg")  # a script may have no display
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), width_ratios=(1.15, 1), layout="constrained")
order = sorted(FORMATS, key=lambda format: each[format].mean())
for losses, shift, color, label in (
    (each, 0.2, "tab:blue", "PTQ, an amax an expert"),
    (tied, -0.2, "tab:orange", "PTQ, one amax for all (MX: none)"),
):
    rows = [row + shift * (format in tied) for row, format in enumerate(order) if format in losses]
    cost, error = zip(*(increase(losses[format], base) for format in order if format in losses), strict=True)
    left.barh(rows, cost, 0.38, xerr=error, color=color, ecolor="0.4", capsize=2, label=label)
for losses, shift, fill, label in (
    (later, 0.1, "white", f"PTQ after {QAT_STEPS} more steps"),
    (qat, -0.1, "black", f"{QAT_STEPS} steps of QAT"),
):
    rows = [order.index(format) + shift for format in losses]
    cost, error = zip(*(increase(losses[format], base_more) for format in losses), strict=True)
    left.errorbar(cost, rows, xerr=error, fmt="kD", markerfacecolor=fill, capsize=2, label=label)
left.axvline(0, color="black", linewidth=0.8)
left.set_yticks(range(len(order)), [format.name for format in order])
left.set_xlabel("increase of loss over bf16 with as many steps (nats a byte, ± standard error)")
left.set_title(f"What each format costs (bf16: {base.mean():.3f} nats a byte)")
left.legend(loc="lower right")

amax = torch.stack([group.amax for group in state.values()])
image = right.imshow(amax, aspect="auto", cmap="viridis")
for row, column in torch.cartesian_prod(torch.arange(len(amax)), torch.arange(EXPERTS)).tolist():
    value = amax[row, column].item()
    dark = image.norm(value) < 0.6
    right.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
right.set_yticks(range(len(amax)), [key.removesuffix(".weight").replace(".moe.experts.*", "") for key in state])
right.set_xticks(range(EXPERTS))
right.set_xlabel("expert")
right.set_title("Largest magnitude (amax) of each expert's weights")
figure.savefig(OUT / "quickstart.png", dpi=130)
