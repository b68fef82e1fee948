# %% [markdown]
"""# Distillation: the model teaches its own quantized copy

A small Mixture-of-Experts language model is trained on the help texts that come with Python, and its experts
are fake-quantized. Then it is tuned for some steps, in three ways that see the same text:

1. QAT: the loss is that of training, on the bytes of the text.
2. QAD, quantization-aware distillation: the loss is the Kullback-Leibler divergence from the logits of the
   unquantized model, a frozen copy of it. Nothing is learned but what quantization has moved.
3. QAD from a cache: the same from the teacher's largest logits, which are kept beforehand. No copy is needed.

For each format: the loss on text that was held out, the divergence from the teacher, and which part of both increases
is recovered. About four minutes on two cores, after `pip install -e '.[examples]'`; with `--small` some seconds. Other
formats are named by `--formats`.
"""

# %%
import copy

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(
    __doc__,
    steps={"type": int, "help": "steps of each tuning"},
    formats={"nargs": "+", "default": ["MXFP4", "NVFP4"], "metavar": "NAME"},
)
torch.manual_seed(0)

SIZES = tiny_moe.Sizes(layers=4, hidden=128, inner=256)
TRAIN_STEPS, TRAIN_LR, STEPS = 480, 4e-3, 50
if options.small:
    SIZES = tiny_moe.Sizes(layers=2, hidden=64, inner=64, experts=4, context=32)
    TRAIN_STEPS, TRAIN_LR, STEPS = 200, 8e-3, 40
STEPS = options.steps or STEPS
LR = 1e-4  # larger ones move the student by more than quantization has: AdamW's steps do not shrink with the gradient
FORMATS = [fqt.formats.FORMATS[name] for name in options.formats]
KEPT = 16  # logits in the cache, of 256

# %% [markdown]
# ## Text, model and training
# Those of the quickstart, with more layers and for more steps, and batches of training text to tune on.

# %%
training, heldout = tiny_moe.read_text()
inputs, targets = tiny_moe.sequences(heldout, SIZES.context, most=64 if options.small else None)

model = tiny_moe.LanguageModel(SIZES)
params = dict(model.named_parameters())
generator = torch.Generator().manual_seed(0)
params = tiny_moe.train(model, params, training, TRAIN_STEPS, lr=TRAIN_LR, generator=generator, label="train")
generator = torch.Generator().manual_seed(1)
batches = [tiny_moe.random_windows(training, tiny_moe.BATCH, SIZES.context, generator) for _ in range(STEPS)]

# Rounded to bf16, as a checkpoint would be; what follows computes in fp32.
weights = {name: param.bfloat16().float() for name, param in params.items()}
fqt.cast(weights, out=model)


@torch.no_grad()
def predictions(model):
    """Logarithms of the probabilities of each next byte of the held-out text."""
    return torch.cat([model(tokens)[0].log_softmax(-1) for tokens in inputs.split(64)])


# %% [markdown]
# ## The teacher, in two forms
# The student's fake weights are written into the model's own parameters, so a teacher that shares them would be the
# student. Either it is a copy, as large as the model; or the model, before anything is written, says once what it will
# be asked, and only the largest logits are kept. What is left of the probability goes to one outcome, "any other".


# %%
def coarse(logits, kept):
    """Logarithms of the probabilities of the bytes in `kept` [B, T, K], and of all others together: [B, T, K + 1]."""
    others = logits.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, kept), others], dim=-1).log_softmax(-1)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


teacher = copy.deepcopy(model).requires_grad_(False)
asked, _ = teacher(inputs[:16])

cache = []
with torch.no_grad():
    for windows in tqdm(batches, desc="teacher's logits"):
        logits, _ = model(windows[:, :-1])
        kept = logits.topk(KEPT).indices
        cache.append((coarse(logits, kept).half(), kept.to(torch.uint8)))

bytes_copy = nbytes(teacher.parameters())
bytes_cache = sum(nbytes(entry) for entry in cache)
tokens = STEPS * tiny_moe.BATCH * SIZES.context
print(f"teacher, a frozen copy: {bytes_copy:,} bytes, whatever it is asked")
print(f"teacher, {KEPT} cached logits: {bytes_cache:,} bytes for {tokens:,} tokens, {bytes_cache // tokens} for each")

# %% [markdown]
# ## Three losses
# Each takes the number of the step, its text, and the student's logits and load-balancing loss.


# %%
def divergence(predicted, wanted):
    """Kullback-Leibler divergence of each position, in nats per byte."""
    return F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)


def qat(step, windows, logits, balance):
    return tiny_moe.mean_loss(logits, windows[:, 1:]) + 0.01 * balance


def qad(step, windows, logits, balance):
    wanted, _ = teacher(windows[:, :-1])
    return divergence(logits.log_softmax(-1), wanted.log_softmax(-1)).mean()


def qad_cached(step, windows, logits, balance):
    wanted, kept = cache[step]
    return divergence(coarse(logits, kept.long()), wanted.float().log_softmax(-1)).mean()


WAYS = {"QAT": qat, "QAD": qad, f"QAD, {KEPT} logits": qad_cached}

# %% [markdown]
# ## Tuning
# The lens: fake weights are written into the model, which computes with them as with any others; the gradients are
# moved to fp32 master weights, which the optimizer steps. Amax is calibrated from those at each step: the model's own
# parameters are quantized already.


# %%
def tune(fq, loss_of, label):
    """What the quantized model predicts after tuning. The model is left with the teacher's weights."""
    masters = fqt.masters(model)
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = tiny_moe.warm_up_and_cosine(optimizer, STEPS)
    state = fq.calibrate(masters)
    fq.fakequant(masters, state, out=model)
    for step, windows in enumerate(tqdm(batches, desc=label)):
        loss_of(step, windows, *model(windows[:, :-1])).backward()
        fq.take_grads(model, masters, state)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state = fq.calibrate(masters)
        fq.fakequant(masters, state, out=model)
    found = predictions(model)
    assert torch.equal(teacher(inputs[:16])[0], asked)  # while the student's weights are still in the model
    fqt.cast(weights, out=model)
    return found


# %% [markdown]
# ## Every format
# PTQ is the quantized model without tuning. The text teaches more than quantization has cost, so QAT is compared with
# what the unquantized model makes of the same steps, and with PTQ after those.

# %%
wanted = predictions(model)
generator = torch.Generator().manual_seed(1)
more = tiny_moe.train(model, weights, training, STEPS, lr=LR, generator=generator, label="bf16, same steps")


def ptq(fq, weights):
    fq.fakequant(weights, fq.calibrate(weights), out=model)
    return predictions(model)


found = {}
for format in FORMATS:
    fq = fqt.transform(fqt.select(weights, {"*.experts.*": format}))
    found[format] = {"PTQ": ptq(fq, weights), "PTQ after the steps": ptq(fq, more)}
    fqt.cast(weights, out=model)
    for way, loss_of in WAYS.items():
        found[format][way] = tune(fq, loss_of, f"{format.name}, {way}")

fqt.cast(more, out=model)
wanted_more = predictions(model)
fqt.cast(weights, out=model)
assert torch.equal(predictions(model), wanted)

# %% [markdown]
# ## The table
# An increase of less than two standard errors may be chance, and so is what is recovered of it; the divergence is
# known better. QAT moves away from the teacher: to a lower loss here, where the text is that of training, but a model
# that was aligned after it was trained loses that.


# %%
def heldout_loss(predicted):
    """Mean loss of each held-out sequence, in nats per byte."""
    return F.nll_loss(predicted.transpose(1, 2), targets, reduction="none").mean(1)


def mean_and_error(each):
    """The mean over the held-out sequences, and its standard error."""
    return each.mean().item(), each.std().item() / len(each) ** 0.5


def recovered(after, before):
    """Which part of an increase is gone; nothing to say if the increase itself may be chance."""
    return f"{1 - after[0] / before[0]:.0%}" if before[0] > 2 * before[1] else "-"


base, base_more = heldout_loss(wanted), heldout_loss(wanted_more)
increases, divergences = {}, {}
for format, ways in found.items():
    for way, predicted in ways.items():
        like = base_more if way in ("QAT", "PTQ after the steps") else base
        increases[format, way] = mean_and_error(heldout_loss(predicted) - like)
        divergences[format, way] = mean_and_error(1000 * divergence(predicted, wanted).mean(1))

moved = 1000 * divergence(wanted_more, wanted).mean()
rows = [
    ("format", "way", "loss", "increase", "recovered", "divergence", "recovered"),
    ("bf16", "the teacher", f"{base.mean():.4f}", *"----"),
    ("bf16", f"after {STEPS} steps", f"{base_more.mean():.4f}", "-", "-", f"{moved:.3f}", "-"),
]
for format, ways in found.items():
    for way in ("PTQ after the steps", "QAT", "PTQ", *list(WAYS)[1:]):
        cost, moved = increases[format, way], divergences[format, way]
        parts = "-", "-"
        if way in WAYS:
            before = "PTQ after the steps" if way == "QAT" else "PTQ"
            parts = recovered(cost, increases[format, before]), recovered(moved, divergences[format, "PTQ"])
        loss, change = f"{heldout_loss(ways[way]).mean():.4f}", "{:+.4f} ±{:.4f}".format(*cost)
        rows.append((format.name, way, loss, change, parts[0], "{:.3f} ±{:.3f}".format(*moved), parts[1]))
about = (
    f"The held-out loss in nats per byte ({targets.numel():,} bytes), and its increase over bf16 (for QAT and the PTQ",
    f"above it, after the same {STEPS} steps); the divergence from the teacher in 1e-3 nats per byte.",
)
tiny_moe.show(tiny_moe.Table(rows, *about, left=(0, 1)))

# %% [markdown]
# ## Figure

# %%
if plt := tiny_moe.pyplot():
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    shown = {"PTQ after the steps": "0.8", "QAT": "tab:orange", "PTQ": "0.5"}
    shown |= dict(zip(list(WAYS)[1:], ("tab:blue", "tab:cyan"), strict=True))
    for panel, values, factor in zip(panels, (increases, divergences), (1000, 1), strict=True):
        for column, (way, color) in enumerate(shown.items()):
            at = [number + 0.16 * (column - 2) for number in range(len(FORMATS))]
            height, error = zip(*(values[format, way] for format in FORMATS), strict=True)
            height, error = ([factor * value for value in each] for each in (height, error))
            panel.bar(at, height, 0.15, yerr=error, color=color, ecolor="0.3", capsize=2, label=way)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(FORMATS)), [format.name for format in FORMATS])
        panel.set_ylabel("1e-3 nats per byte, ± standard error")
    panels[0].set_title("Increase of the loss over bf16 with as many steps")
    panels[1].set_title("Divergence from the teacher")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    tiny_moe.save(figure, options.out / "distill.png")

# %% [markdown]
# ## What it found

# %%
taken = {
    way: ", ".join(f"{1 - divergences[f, way][0] / divergences[f, 'PTQ'][0]:.0%} in {f.name}" for f in FORMATS)
    for way in list(WAYS)[1:]
}
print(
    f"\nOf the divergence that quantization causes, {STEPS} steps of distillation take back "
    + "; ".join(f"{share} ({way})" for way, share in taken.items())
    + "."
)
away = ", ".join(f"{divergences[f, 'QAT'][0] / divergences[f, 'PTQ'][0]:.1f} in {f.name}" for f in FORMATS)
print(f"After as many steps of QAT, whose loss knows no teacher, the divergence over that of PTQ is {away}.")
