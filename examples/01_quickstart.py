# %% [markdown]
"""# Quickstart: train, calibrate, fake-quantize, fine-tune

A byte-level Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are fake-quantized after training (PTQ) in every format, and in one of two bits that is defined here. Two bits hurt, and
some more steps of training under fake quantization (QAT) bring back most of it. This takes two to three minutes on two
cores, after `pip install -e '.[examples]'`; with `--small` it takes seconds.
"""

# %%
import time

import optree
import torch
from torch.func import functional_call
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(__doc__)
started = time.perf_counter()
torch.manual_seed(0)

SIZES = tiny_moe.Sizes(layers=2, hidden=128, inner=256)
STEPS, LR, QAT_STEPS, QAT_LR = 360, 4e-3, 60, 5e-4
if options.small:
    SIZES = tiny_moe.Sizes(layers=1, hidden=128, inner=128, experts=4, context=32)
    STEPS, LR, QAT_STEPS, QAT_LR = 150, 8e-3, 40, 2e-3

# %% [markdown]
# ## Text and model
# `tiny_moe.py` has both, and the training loop. Nothing in it knows of quantization.

# %%
training, heldout = tiny_moe.read_text()
inputs, targets = tiny_moe.sequences(heldout, SIZES.context, most=128 if options.small else 256)
print(f"{len(training):,} bytes to train on, {targets.numel():,} held out")

model = tiny_moe.LanguageModel(SIZES)
params = dict(model.named_parameters())
generator = torch.Generator().manual_seed(0)
params = tiny_moe.train(model, params, training, STEPS, lr=LR, generator=generator, label="train")


@torch.no_grad()
def heldout_logits(weights):
    return torch.cat([functional_call(model, weights, (tokens,))[0] for tokens in inputs.split(64)])


def heldout_loss(weights):
    """Mean loss of each held-out sequence, in nats per byte."""
    return tiny_moe.losses(heldout_logits(weights), targets)


# %% [markdown]
# ## Select and calibrate
# `select` says which parameters are quantized, grouped by expert. The state holds what calibration found: for NVFP4,
# the largest magnitude (amax) of each expert.

# %%
spec = fqt.select(params, {"*.experts.*": fqt.NVFP4})
fq = fqt.transform(spec)
state = fq.calibrate(params)
tiny_moe.show(spec)
amax = state["layers.0.moe.experts.*.w1.weight"]["amax"]
print("amax of each expert's w1:", ", ".join(f"{value:.3f}" for value in amax))

# %% [markdown]
# What this does to each expert: the signal to quantization noise ratio (SQNR), and how many weights are clipped or
# become zero.

# %%
found = fq.report(params, state)
tiny_moe.show(found)
if tiny_moe.pyplot():
    tiny_moe.save(found.plot(), options.out / "report.png")

# %% [markdown]
# ## PTQ in every format, and in one of our own
# A format is data. INT2 has the integers -2 to 1, and a scale for each 32 weights along `in`.
#
# The state is a pytree, so sharing one scale is a map over it: each entry becomes the largest of the same entry over
# all experts. NVFP4 keeps one amax per expert, formats with blocks one per block; MX formats, which take every scale
# from the weights, keep nothing to share.

# %%
INT2 = fqt.Format("INT2", fqt.formats.IntElement(qmax=2, low=-2, high=1), block=(1, 32))
FORMATS = [value for value in vars(fqt).values() if isinstance(value, fqt.Format)]


def experts_in(format):
    return fqt.transform(fqt.select(params, {"*.experts.*": format}))


def tie(state):
    return optree.tree_map(lambda amax: amax.amax(0, keepdim=True).expand_as(amax).contiguous(), state)


base = heldout_loss(params)
each, tied = {}, {}
for format in (bar := tqdm([*FORMATS, INT2], desc="PTQ")):
    bar.set_postfix_str(format.name)
    fq_format = experts_in(format)
    amax = fq_format.calibrate(params)
    each[format] = heldout_loss(fq_format.fakequant(params, amax))
    if not format.is_stateless:
        tied[format] = heldout_loss(fq_format.fakequant(params, tie(amax)))

# %% [markdown]
# ## QAT in two bits: a lens around the optimizer step
# The optimizer steps fp32 masters. `fakequant` writes them, quantized, into the model's own parameters, and
# `take_grads` brings the gradients back. The model in between is an ordinary model.

# %%
two_bits = experts_in(INT2)
fqt.cast(params, out=model)
masters = fqt.masters(model)
optimizer = torch.optim.AdamW(masters.values(), lr=QAT_LR, betas=(0.9, 0.95), weight_decay=0.1)
scheduler = tiny_moe.warm_up_and_cosine(optimizer, QAT_STEPS)
generator = torch.Generator().manual_seed(1)
for _ in tqdm(range(QAT_STEPS), desc="QAT INT2"):
    amax = two_bits.calibrate(masters)
    two_bits.fakequant(masters, amax, out=model)
    windows = tiny_moe.random_windows(training, tiny_moe.BATCH, SIZES.context, generator)
    logits, balance = model(windows[:, :-1])
    (tiny_moe.mean_loss(logits, windows[:, 1:]) + 0.01 * balance).backward()
    two_bits.take_grads(model, masters, amax)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
qat = heldout_loss(two_bits.fakequant(masters, two_bits.calibrate(masters)))

# %% [markdown]
# More steps help by themselves. So the control is the same steps on the same batches without quantization, and PTQ
# after them.

# %%
generator = torch.Generator().manual_seed(1)
control = tiny_moe.train(
    model, params, training, QAT_STEPS, lr=QAT_LR, generator=generator, label="the same steps without"
)
base_more = heldout_loss(control)
later = heldout_loss(two_bits.fakequant(control, two_bits.calibrate(control)))

# %% [markdown]
# ## The table
# An increase of less than two standard errors may be chance. This model is small and was trained for a minute: a large
# one need not rank the formats alike.


# %%
def increase(losses, base):
    """Mean increase of the loss, and its standard error over the held-out sequences."""
    difference = losses - base
    return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def cell(losses, base):
    return "-" if losses is None else "{:.4f} {:+.4f} ±{:.4f}".format(losses.mean(), *increase(losses, base))


columns = ("PTQ, amax per expert", "PTQ, one for all", f"{QAT_STEPS} more steps, PTQ", f"{QAT_STEPS} steps of QAT")
rows = [("format", *columns), ("unquantized", f"{base.mean():.4f}", "-", f"{base_more.mean():.4f}", "-")]
rows += [(format.name, cell(each[format], base), cell(tied.get(format), base), "-", "-") for format in FORMATS]
rows += [("INT2", cell(each[INT2], base), cell(tied[INT2], base), cell(later, base_more), cell(qat, base_more))]
about = (
    f"The held-out loss in nats per byte ({targets.numel():,} bytes), and its increase over the unquantized model's",
    "with as many steps, ± the standard error of that.",
)
tiny_moe.show(tiny_moe.Table(rows, *about, left=range(5)))

# %% [markdown]
# ## Save and load
# One safetensors file, which also says what it holds: the spec is in its metadata. Whoever gets it needs nothing else.

# %%
path = options.out / "nvfp4_state.safetensors"
fqt.checkpoint.save_file(path, fq, state)

stored = fqt.transform(fqt.checkpoint.read_spec(path))
reloaded = fqt.checkpoint.load_file(path, stored)
before = heldout_logits(fq.fakequant(params, state))
after = heldout_logits(stored.fakequant(params, reloaded))
assert torch.equal(before, after)
leaves = fqt.state.flatten(reloaded)
print(f"{path.name}: {len(leaves)} leaves, {path.stat().st_size:,} bytes, the same logits after loading")

# %% [markdown]
# ## Figure

# %%
if plt := tiny_moe.pyplot():
    figure, panels = plt.subplot_mosaic(
        [["formats", "two bits"], ["formats", "amax"]], figsize=(10.5, 8.5), width_ratios=(1.2, 1), layout="constrained"
    )
    left, middle, right = panels.values()
    order = sorted(FORMATS, key=lambda format: each[format].mean())
    for losses, shift, color, label in (
        (each, 0.2, "tab:blue", "one amax per expert"),
        (tied, -0.2, "tab:orange", "one amax for all (MX: none)"),
    ):
        at = [row + shift * (format in tied) for row, format in enumerate(order) if format in losses]
        cost, error = zip(*(increase(losses[format], base) for format in order if format in losses), strict=True)
        left.barh(at, cost, 0.38, xerr=error, color=color, ecolor="0.4", capsize=2, label=label)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(order)), [format.name for format in order])
    left.set_xlabel("increase of the loss, nats per byte, ± standard error")
    left.locator_params(axis="x", nbins=5)
    left.set_title("PTQ in the formats of hardware")
    left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=2, frameon=False)

    bars = {"PTQ": (each[INT2], base), "PTQ after\nmore steps": (later, base_more), "QAT": (qat, base_more)}
    cost, error = zip(*(increase(*pair) for pair in bars.values()), strict=True)
    drawn = middle.bar(list(bars), cost, 0.6, yerr=error, color=("0.5", "0.7", "tab:green"), ecolor="0.3", capsize=4)
    middle.bar_label(drawn, [f"{value:+.3f}" for value in cost], padding=4)
    worst = order[-1]  # the topmost on the left
    middle.axhline(increase(each[worst], base)[0], color="tab:blue", linestyle="--", label=f"PTQ in {worst.name}")
    middle.axhline(0, color="black", linewidth=0.8)
    middle.margins(y=0.2)
    middle.set_ylabel("increase of the loss, nats per byte")
    middle.set_title("Two bits (INT2)")
    middle.legend(loc="upper right", frameon=False)

    amax = torch.stack([group["amax"] for group in state.values()])
    image = right.imshow(amax, aspect="auto", cmap="viridis", vmin=0)
    for row, column in torch.cartesian_prod(torch.arange(len(amax)), torch.arange(SIZES.experts)).tolist():
        value = amax[row, column].item()
        color = "white" if image.norm(value) < 0.6 else "black"
        right.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    right.set_yticks(range(len(amax)), [key.removesuffix(".weight").replace(".moe.experts.*", "") for key in state])
    right.set_xticks(range(SIZES.experts))
    right.set_xlabel("expert")
    right.set_title("amax of each expert in NVFP4")
    tiny_moe.save(figure, options.out / "quickstart.png")

# %% [markdown]
# ## What it found

# %%
costs = {format: increase(losses, base)[0] for format, losses in each.items()}
most = max(FORMATS, key=costs.get)
broken, mended = increase(later, base_more)[0], increase(qat, base_more)[0]
print(
    f"\nAfter training, no format of four bits or more, with scales of each expert's own, costs over "
    f"{costs[most]:.4f} nats per byte ({most.name}); two bits cost {costs[INT2]:.4f}."
)
print(
    f"{QAT_STEPS} steps under fake quantization bring back {1 - mended / broken:.0%} of what two bits cost without: "
    f"{broken:.4f} became {mended:.4f}."
)
print(f"All of this took {time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time.")
