# %% [markdown]
"""# Calibration: how should a scale be chosen?

The quickstart's Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are quantized in INT4, NVFP4, FP8 and INT8, with scales chosen by every method: the largest weight, percentiles, the
least squared error, the least squared error weighted by how large the inputs are, and four over six. For each: the
error of the weights, the loss on text that was held out, and how far the predictions move. Five minutes on two cores,
after `pip install -e '.[examples]'`; with `--small` some seconds, too few to learn much.
"""

# %%
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm, trange

import fq_transforms as fqt
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile

SMALL = "--small" in sys.argv
STEPS = 40 if SMALL else 480
LAYERS, HIDDEN, INNER, HEADS = (1, 64, 64, 4) if SMALL else (4, 128, 256, 4)
EXPERTS, TOP_K = 8, 2
CONTEXT, BATCH = 128, 16
CALIBRATION = 4 if SMALL else 32  # batches of training text that the inputs are observed on

SCRIPT = globals().get("__file__")  # a notebook has none
OUT = (Path(SCRIPT).parent if SCRIPT else Path.cwd()) / "out"
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## Text, model and training
# To the letter those of the quickstart, whose weights these are; a test compares them.

# %%
paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
text = torch.frombuffer(bytearray("\n\n".join(dict.fromkeys(paragraphs)).encode()), dtype=torch.uint8).long()
training, heldout = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

sequences = 32 if SMALL else (len(heldout) - 1) // CONTEXT
inputs = heldout[: sequences * CONTEXT].view(sequences, CONTEXT)
targets = heldout[1 : sequences * CONTEXT + 1].view(sequences, CONTEXT)


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


def windows(count, generator):
    """`count` sequences of CONTEXT + 1 bytes of training text, at random."""
    start = torch.randint(len(training) - CONTEXT, (count, 1), generator=generator)
    return training[start + torch.arange(CONTEXT + 1)]


model = LanguageModel()
params = train(dict(model.named_parameters()), STEPS, lr=4e-3, seed=0, label="train")

# Rounded to bf16, as a checkpoint would be; what follows computes in fp32.
weights = {name: param.bfloat16().float() for name, param in params.items()}


@torch.no_grad()
def predictions(weights):
    """Logarithms of the probabilities of each next byte of the held-out text."""
    return torch.cat([functional_call(model, weights, (tokens,))[0].log_softmax(-1) for tokens in inputs.split(64)])


def loss_of(predicted):
    """Mean loss of each held-out sequence, in nats a byte."""
    return F.nll_loss(predicted.transpose(1, 2), targets, reduction="none").mean(1)


def divergence_of(predicted, wanted):
    """Mean Kullback-Leibler divergence of each held-out sequence, in nats a byte: what is lost of what was wanted."""
    return F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1).mean(1)


# %% [markdown]
# ## How large are the inputs?
# `mean_squares` runs the model on training text and gives, for each expert, the mean square of each of its input
# channels. An error of a weight that meets large inputs moves the layer's output more. They are of the model and not of
# a format, so once is enough.

# %%
FORMATS = (fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.NVFP4, fqt.FP8, fqt.INT8)


def spec_of(format):
    return fqt.select(weights, {"*.experts.*": format})


spec = spec_of(fqt.INT8)
generator = torch.Generator().manual_seed(1)
batches = [windows(BATCH, generator)[:, :-1] for _ in range(CALIBRATION)]
squares = fqt.mean_squares(weights, batches, spec=spec, model=model, unseen="mean-of-peers")
spread = torch.cat([(means.amax(1) / means.median(1).values) for means in squares.values()])
print(f"Largest mean square of an input channel, over the median's: {spread.median():.1f}, at most {spread.max():.1f}")

# %% [markdown]
# ## Every method
# Methods choose an amax for each granule: an expert for INT8 and FP8, 32 weights for INT4, 16 for NVFP4. Where a
# format keeps no amax of its granules there is nothing to choose: NVFP4 takes the scales of its blocks from the weights
# at each call, and has Max only. NVFP4_STATIC is the same format with calibrated scales.

# %%
METHODS = {
    "max": Max(),
    "percentile 99.99": Percentile(99.99),
    "percentile 99.9": Percentile(99.9),
    "percentile 99": Percentile(99),
    "mse": Mse(),
    "mse, weighted": Mse(),
    "four over six, 256": FourOverSix(256),
    "four over six, 448": FourOverSix(448),
}


def applies(method, format):
    if isinstance(method, FourOverSix):
        return format == fqt.NVFP4_STATIC
    return isinstance(method, Max) or not format.dynamic


def errors(fakes):
    """Squared error of each expert's matrices, and the same weighted by the inputs: each [layers, roles, experts]."""
    plain, weighted = [], []
    for group in spec.groups:
        for name, means in zip(group.names, squares[group.key], strict=True):
            square = (fakes[name] - weights[name]).double().square()
            plain.append(square.sum())
            weighted.append((square * means).sum())
    shape = (LAYERS, -1, EXPERTS)
    return torch.stack(plain).view(shape), torch.stack(weighted).view(shape)


wanted = predictions(weights)
base = loss_of(wanted)
pairs = [(format, name) for format in FORMATS for name, method in METHODS.items() if applies(method, format)]
plain, weighted, losses, divergences = {}, {}, {}, {}
for format, name in (bar := tqdm(pairs, desc="calibrate")):
    bar.set_postfix_str(f"{format.name}, {name}")
    fq = fqt.transform(spec_of(format), method=METHODS[name])
    state = fq.calibrate(weights, statistics=squares if name == "mse, weighted" else None)
    fakes = fq.fakequant(weights, state)
    plain[format, name], weighted[format, name] = errors(fakes)
    predicted = predictions(fakes)
    losses[format, name], divergences[format, name] = loss_of(predicted), divergence_of(predicted, wanted)

# %% [markdown]
# ## What is certain
# Max is among what `Mse` tries, so that no expert is worse off under it; weighted, in the weighted error. Four over six
# with 448 chooses between max and 1.5 times max, and is never worse than max either. Percentiles promise nothing.

# %%
for format in FORMATS:
    for name, found in (("mse", plain), ("four over six, 448", plain), ("mse, weighted", weighted)):
        if (format, name) in found:
            assert (found[format, name] <= found[format, "max"]).all(), (format.name, name)
experts = f"all {plain[fqt.INT8, 'max'].numel()} experts' matrices, in every format"
print(f"mse: an error no larger than max's for {experts}; weighted by the inputs, likewise")

# %% [markdown]
# ## The table
# Errors are sums over all experts, over those of max. The loss of a model may go down by luck, and an increase of less
# than two standard errors may be chance; the divergence from bf16's predictions cannot be negative, and orders the
# methods where the loss does not.


# %%
def mean_and_error(each):
    """The mean over the held-out sequences, and its standard error."""
    return each.mean().item(), each.std().item() / len(each) ** 0.5


print(f"\n{'':38}{'error / that of max':>21}{'held-out loss, nats a byte':>36}{'divergence':>14}")
print(f"{'format':16}{'method':22}{'weights':>10}{'weighted':>11}{'':16}{'increase':>18}{'1e-3 nats a byte':>22}")
print(f"{'bf16':59}{base.mean():>10.4f}")
for format, name in pairs:
    ratios = [(found[format, name].sum() / found[format, "max"].sum()).item() for found in (plain, weighted)]
    cost = "{:+.4f} ±{:.4f}".format(*mean_and_error(losses[format, name] - base))
    moved = "{:.3f} ±{:.3f}".format(*mean_and_error(1000 * divergences[format, name]))
    print(f"{format.name:16}{name:22}{ratios[0]:>10.3f}{ratios[1]:>11.3f}", end="")
    print(f"{losses[format, name].mean():>10.4f}{cost:>20}{moved:>20}")

# %% [markdown]
# ## Figures
# Errors by expert; and what each method costs in loss, and how far it moves the predictions.

# %%
try:
    import matplotlib
except ImportError:
    matplotlib = None
    print("no figure: matplotlib is not installed")

if matplotlib:
    if SCRIPT:
        matplotlib.use("Agg")  # a script may have no display
    import matplotlib.pyplot as plt

    roles = [group.key.rpartition("experts.*.")[2].removesuffix(".weight") for group in spec.groups]
    choosing = [format for format in FORMATS if not format.dynamic]
    figure, panels = plt.subplots(1, len(choosing), figsize=(16, 4.8), layout="constrained")
    for panel, format in zip(panels, choosing, strict=True):
        names = [name for of, name in pairs if of == format and name != "max"]
        for column, name in enumerate(names):
            ratio = (plain[format, name] / plain[format, "max"]).transpose(0, 1).flatten(1)  # [roles, layers * experts]
            at = column + torch.linspace(-0.3, 0.3, ratio.shape[1])
            for role, color in enumerate(("tab:blue", "tab:orange", "tab:green")):
                panel.plot(at, ratio[role], ".", color=color, label=None if column else roles[role])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(plt.LogLocator(subs=range(1, 10)))
        is_narrow = panel.get_ylim()[1] < 2
        panel.yaxis.set_minor_formatter("{x:g}" if is_narrow else "")
        panel.set_xticks(range(len(names)), names, rotation=35, ha="right")
        panel.set_title(format.name)
    panels[0].set_ylabel("squared error of an expert's matrix / that of max")
    panels[0].legend()
    figure.suptitle("Each point a matrix of an expert, layer by layer from left to right")
    figure.savefig(OUT / "calibration_errors.png", dpi=110)

    figure, panels = plt.subplots(2, len(choosing), figsize=(16, 7.5), layout="constrained", sharey="col")
    for column, format in zip(panels.T, choosing, strict=True):
        rows = [(of, name) for of, name in pairs if of == format or (of == fqt.NVFP4 and format == fqt.NVFP4_STATIC)]
        rows = rows[::-1]
        labels = [name if of == format else f"{of.name}, {name}" for of, name in rows]
        colors = ["0.5" if name == "max" else "tab:blue" for _, name in rows]
        for panel, each in zip(column, ({key: losses[key] - base for key in rows}, divergences), strict=True):
            cost, error = zip(*(mean_and_error(1000 * each[key]) for key in rows), strict=True)
            panel.barh(labels, cost, xerr=error, color=colors, ecolor="0.3", capsize=2)
            panel.axvline(0, color="black", linewidth=0.8)
        column[0].set_title(format.name)
        column[0].set_xlabel("increase of the held-out loss")
        column[1].set_xlabel("divergence from bf16's predictions")
    figure.suptitle("1e-3 nats a byte, ± standard error")
    figure.savefig(OUT / "calibration_loss.png", dpi=110)
    print(f"\nfigures: {OUT / 'calibration_errors.png'}, {OUT / 'calibration_loss.png'}")
