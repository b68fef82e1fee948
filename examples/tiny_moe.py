"""What the other examples share: their options, a byte-level Mixture-of-Experts language model, its text, its training.

Nothing here knows of quantization. The text is the help texts that come with Python, so nothing is downloaded.
"""

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from tqdm.auto import trange

from fq_transforms import tables

OUT = Path(__file__).parent / "out"
BATCH = 16


# The command line, and figures


def options(doc, **more):
    """What an example was asked for: `small`, `out` (the folder, which is made), and options of its own.

    A notebook's command line is the kernel's, so its options are those in the environment's EXAMPLE_OPTIONS.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").removeprefix("# "), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="as little as shows that it runs")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="of figures and files (examples/out)")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    found = parser.parse_args(None if is_script() else shlex.split(os.environ.get("EXAMPLE_OPTIONS", "")))
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def is_script():
    """False in a notebook, which has no file."""
    return hasattr(sys.modules["__main__"], "__file__")


class Table:
    """Rows of text, the first of which is the header, and lines below; HTML in a notebook."""

    def __init__(self, rows, *below, left=(0,)):
        self.rows, self.below, self.left = rows, below, left

    def __repr__(self):
        return "\n".join([tables.table(self.rows, left=self.left), *self.below])

    def _repr_html_(self):
        return tables.html(self.rows, left=self.left, below=self.below)


def show(value):
    """Print a table; a notebook shows it as HTML."""
    if is_script():
        print(value)
    else:
        from IPython.display import display

        display(value)


def pyplot():
    """Matplotlib's, with or without a display; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return None
    if is_script():
        matplotlib.use("Agg")
    else:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path):
    """Write a figure, and say where; a notebook shows it."""
    from matplotlib.pyplot import close

    figure.savefig(path, dpi=110)
    if is_script():
        print(f"figure: {path}")
    else:
        show(figure)
    close(figure)


class Sizes(NamedTuple):
    layers: int
    hidden: int
    inner: int  # of an expert
    heads: int = 4
    experts: int = 8
    top_k: int = 2  # experts per token
    context: int = 128


# The text


def read_text():
    """Bytes to train on, and bytes held out.

    Some topics share paragraphs. Each paragraph is kept once, so what is held out was not seen in training.
    """
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = torch.frombuffer(bytearray("\n\n".join(dict.fromkeys(paragraphs)).encode()), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def random_windows(text, count, length, generator=None):
    """`count` sequences of `length` + 1 bytes, at random."""
    start = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[start + torch.arange(length + 1)]


def sequences(text, length, most=None):
    """All sequences of `length` bytes, one after the other, or the first of them; and the byte after each byte."""
    count = (len(text) - 1) // length if most is None else most
    return text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)


# The model


def rotary(x):
    """Turn pairs of channels of [..., T, C] by angles that grow with the position."""
    T, C = x.shape[-2:]
    angle = torch.outer(torch.arange(T), 1000 ** -torch.linspace(0, 1, C // 2))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)


class Expert(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.w1 = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.w2 = nn.Linear(sizes.inner, sizes.hidden, bias=False)
        self.w3 = nn.Linear(sizes.hidden, sizes.inner, bias=False)

    def forward(self, x):
        return self.w2(self.silu(self.w1(x)) * self.w3(x))

    def silu(self, x):
        return F.silu(x)


class MoE(nn.Module):
    def __init__(self, sizes, expert=Expert):
        super().__init__()
        self.top_k = sizes.top_k
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.experts = nn.ModuleList(expert(sizes) for _ in range(sizes.experts))

    def forward(self, x):
        """Outputs for [..., C], and the load-balancing loss of Switch Transformers: 1 if the load is even."""
        tokens = x.flatten(0, -2)
        probability = self.router(tokens).float().softmax(-1)
        gate, chosen = probability.topk(self.top_k)
        gate = (gate / gate.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            # An expert that no token chose runs on zero rows: its gradients are then zeros, not None.
            token, rank = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(tokens[token]) * gate[token, rank, None])
        load = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))
        return y.view_as(x), len(self.experts) * load @ probability.mean(0)


class Layer(nn.Module):
    def __init__(self, sizes, norm=nn.RMSNorm, attention=Attention, moe=MoE):
        super().__init__()
        self.attention_norm, self.attention = norm(sizes.hidden), attention(sizes)
        self.moe_norm, self.moe = norm(sizes.hidden), moe(sizes)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        y, balance = self.moe(self.moe_norm(x))
        return x + y, balance


class LanguageModel(nn.Module):
    """Logits of the next byte for bytes [B, T], and the mean load-balancing loss of the layers."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(256, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens):
        x, balance = self.embed(tokens), 0.0
        for layer in self.layers:
            x, layer_balance = layer(x)
            balance = balance + layer_balance / len(self.layers)
        return self.head(self.norm(x)), balance

    def embed(self, tokens):
        return self.embedding(tokens)


# The same for `vmap` and `jvp`: no shape depends on data, and every operation has a second forward derivative.


class RMS(nn.Module):
    def __init__(self, hidden):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class MappableAttention(Attention):
    def mix(self, q, k, v):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


class MappableExpert(Expert):
    def silu(self, x):
        return x * x.sigmoid()  # F.silu has no second forward derivative


class MappableMoE(MoE):
    """Every expert runs on every token, and sees zeros where it was not chosen."""

    def __init__(self, sizes):
        super().__init__(sizes, MappableExpert)

    def forward(self, x):
        probability = self.router(x).softmax(-1)
        smallest = probability.topk(self.top_k).values[..., -1:]
        gate = torch.where(probability >= smallest, probability, 0.0)
        load = (gate > 0).float().mean((0, 1)) / self.top_k
        gate = gate / gate.sum(-1, keepdim=True)
        own = [gate[..., e : e + 1] for e in range(len(self.experts))]
        y = sum(expert(x * (g > 0)) * g for expert, g in zip(self.experts, own, strict=True))
        return y, len(self.experts) * (load * probability.mean((0, 1))).sum()


class MappableLanguageModel(LanguageModel):
    def __init__(self, sizes):
        nn.Module.__init__(self)  # and not that of LanguageModel: the parts are others, and drawn in another order
        self.sizes = sizes
        self.embedding, self.position = nn.Embedding(256, sizes.hidden), nn.Embedding(sizes.context, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, RMS, MappableAttention, MappableMoE) for _ in range(sizes.layers))
        self.norm = RMS(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, 256, bias=False)

    def embed(self, tokens):
        return self.embedding(tokens) + self.position.weight


# The training


def mean_loss(logits, targets):
    """Mean loss of all bytes, in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(logits, targets):
    """Mean loss of each sequence, in nats per byte."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def warm_up_and_cosine(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )


def train(
    model,
    params,
    text,
    steps,
    *,
    lr,
    label,
    generator=None,
    quantize=lambda params: params,
    loss_of=mean_loss,
    schedule=warm_up_and_cosine,
):
    """New parameters, after steps of AdamW on random windows of the text.

    `quantize` maps the parameters to the weights that the model runs with. In plain training it is the identity; in
    quantization-aware training it is `fakequant`, whose gradient is that of the identity.
    """
    params = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = schedule(optimizer, steps)
    for _ in (bar := trange(steps, desc=label)):
        windows = random_windows(text, BATCH, model.sizes.context, generator)
        logits, balance = functional_call(model, quantize(params), (windows[:, :-1],))
        loss = loss_of(logits, windows[:, 1:])
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return {name: param.detach() for name, param in params.items()}
