# %% [markdown]
"""# Quickstart: train, calibrate, fake-quantize, fine-tune

A byte-level Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are fake-quantized in every format: after training (PTQ), with one amax per expert and with one for all experts, and
during some more steps of training (QAT). This takes a few minutes on two cores, after `pip install -e '.[examples]'`;
with `--small` it takes seconds and learns little.
"""

# %%
import sys
import timeit

import matplotlib
import optree
import torch
from torch.func import functional_call
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe

SMALL = "--small" in sys.argv
STEPS, QAT_STEPS = (2, 1) if SMALL else (480, 80)
SIZES = tiny_moe.Sizes(layers=4, hidden=128, inner=256)
if SMALL:
    SIZES = tiny_moe.Sizes(layers=1, hidden=128, inner=128, experts=4, context=16)
IS_SCRIPT = "__file__" in globals()  # a notebook has no file

tiny_moe.OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## Text and model
# `tiny_moe.py` has both, and the training loop. Nothing in it knows of quantization.

# %%
training, heldout = tiny_moe.read_text()
inputs, targets = tiny_moe.sequences(heldout, SIZES.context, most=8 if SMALL else None)
print(f"{len(training):,} bytes to train on, {targets.numel():,} held out")


def train(params, steps, *, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return tiny_moe.train(model, params, training, steps, generator=generator, **options)


model = tiny_moe.LanguageModel(SIZES)
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
    """Mean loss of each held-out sequence, in nats per byte."""
    return tiny_moe.losses(heldout_logits(weights).float(), targets)


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
# all experts. For INT4, NVFP4_STATIC and others with blocks that is every block's amax; NVFP4 keeps only one amax
# per expert, and MX formats, which take every scale from the weights, keep nothing to share.

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
# Some more steps from the trained weights, calibrated again at each step, since the weights move. The control is the
# same steps on the same batches without quantization: for bf16, and for PTQ after them.

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
print(f"\nHeld-out loss in nats per byte ({targets.numel():,} bytes; {arithmetic}),")
print("and its increase over bf16 with as many steps, ± the standard error of that\n")
columns = ("PTQ, amax per expert", "PTQ, one for all", f"{QAT_STEPS} more steps, PTQ", f"{QAT_STEPS} steps of QAT")
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
path = tiny_moe.OUT / "nvfp4_state.safetensors"
fqt.checkpoint.save_file(path, fq, state)

stored = fqt.transform(fqt.checkpoint.read_spec(path))
reloaded = fqt.checkpoint.load_file(path, stored)
before = heldout_logits(fq.fakequant(weights, state))
after = heldout_logits(stored.fakequant(weights, reloaded))
assert torch.equal(before, after)
leaves = fqt.state.flatten(reloaded)
print(f"{path.name}: {len(leaves)} leaves, {path.stat().st_size:,} bytes, the same logits after loading")

# %% [markdown]
# ## Figure

# %%
if IS_SCRIPT:
    matplotlib.use("Agg")  # a script may have no display
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), width_ratios=(1.15, 1), layout="constrained")
order = sorted(FORMATS, key=lambda format: each[format].mean())
for losses, shift, color, label in (
    (each, 0.2, "tab:blue", "PTQ, one amax per expert"),
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
left.set_xlabel("increase of loss over bf16 with as many steps (nats per byte, ± standard error)")
left.set_title(f"What each format costs (bf16: {base.mean():.3f} nats per byte)")
left.legend(loc="lower right")

amax = torch.stack([group["amax"] for group in state.values()])
image = right.imshow(amax, aspect="auto", cmap="viridis")
for row, column in torch.cartesian_prod(torch.arange(len(amax)), torch.arange(SIZES.experts)).tolist():
    value = amax[row, column].item()
    dark = image.norm(value) < 0.6
    right.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
right.set_yticks(range(len(amax)), [key.removesuffix(".weight").replace(".moe.experts.*", "") for key in state])
right.set_xticks(range(SIZES.experts))
right.set_xlabel("expert")
right.set_title("Largest magnitude (amax) of each expert's weights")
figure.savefig(tiny_moe.OUT / "quickstart.png", dpi=130)
