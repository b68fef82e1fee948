# %% [markdown]
"""# Sensitivity: which experts can take four bits?

A small byte-level Mixture-of-Experts language model is trained on the help texts that come with Python. Then
`fqt.search` asks what four and eight bits would cost each expert, in four ways, and chooses under a budget of bytes:

1. "loss": measured, a run of the model for each expert and format;
2. "jvp": predicted, by `torch.func.jvp` of the loss along the quantization error, its second order;
3. "hessian": the error of each expert's outputs, from the second moments of its inputs;
4. "report": the error of the weights, which looks at no data.

The choices are tested on held-out data. This takes a few minutes on two cores, after
`pip install -e '.[examples]'`; with `--small` it takes seconds and learns little.
"""

# %%
from dataclasses import replace

import torch
from torch.func import functional_call
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(__doc__)
torch.manual_seed(0)
torch.set_num_threads(1)  # the matrices are small, and threads that wait for each other are slower than one
SMALL = options.small
STEPS = 200 if SMALL else 400
SIZES = tiny_moe.Sizes(layers=2, hidden=64, inner=128, context=64)
if SMALL:
    SIZES = tiny_moe.Sizes(layers=2, hidden=32, inner=64, experts=4, context=32)
LAYERS, EXPERTS = SIZES.layers, SIZES.experts
SAMPLE, HELDOUT = (96, 512) if SMALL else (96, 768)  # sequences that sensitivity is measured on, and held out

# %% [markdown]
# ## Text and model
# Sensitivity is measured on training text. In this form of the model no shape depends on data, and every operation has
# a second forward derivative, which "jvp" needs.

# %%
training, heldout = tiny_moe.read_text()


def windows(text, count):
    """`count` sequences of bytes, evenly spaced, each with one byte more than the model takes."""
    starts = torch.linspace(0, len(text) - SIZES.context - 1, count).long()[:, None]
    return text[starts + torch.arange(SIZES.context + 1)]


sample, test = windows(training, SAMPLE), windows(heldout, HELDOUT)
model = tiny_moe.MappableLanguageModel(SIZES)


def losses(weights, sequences):
    """Mean loss of each sequence, in nats per byte."""
    return tiny_moe.losses(functional_call(model, weights, (sequences[:, :-1],))[0], sequences[:, 1:])


# %% [markdown]
# ## Training

# %%
params = tiny_moe.train(
    model,
    dict(model.named_parameters()),
    training,
    STEPS,
    lr=4e-3,
    label="train",
    loss_of=lambda logits, targets: tiny_moe.losses(logits, targets).mean(),
    schedule=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps, pct_start=0.1
    ),
)

# Rounded to bf16, as a checkpoint would be; what follows computes in fp32.
weights = {name: param.bfloat16().float() for name, param in params.items()}

# %% [markdown]
# ## Sensitivities
# What a format costs a part of the model, in four ways, all on the same few sequences. Beside them stands what four
# bits for one expert add to the loss of held-out text.


# %%
def sample_loss(weights):
    return losses(weights, sample).mean()


EIGHT = fqt.INT8
FOUR = replace(EIGHT, name="INT4", element=fqt.INT4_BLOCK32.element)  # a new format is one constant
FORMATS = [FOUR, EIGHT]
fq = fqt.transform(fqt.select(weights, {"*.experts.*": EIGHT}))
hessians = fq.input_hessians(weights, sample[:, :-1], model=model, unseen="ones")
WAYS = {
    "loss": {"loss": sample_loss},
    "jvp": {"loss": sample_loss},
    "hessian": {"hessians": hessians},
    "report": {},
}


def searched(way, by):
    """The choice under no limit; its `at` gives those under less."""
    return fqt.search(fq, weights, FORMATS, budget="1GB", sensitivity=way, by=by, **WAYS[way])


by_expert = {way: searched(way, "expert") for way in WAYS}
heldout = fqt.search(
    fq, weights, [FOUR], budget="1GB", by="expert", sensitivity="loss", loss=lambda w: losses(w, test).mean()
)
costs = {
    way: torch.tensor([unit.options[0].sensitivity for unit in found.units])
    for way, found in (by_expert | {"held out": heldout}).items()
}
measured = costs.pop("held out")
print(f"Four bits for one expert of {LAYERS * EXPERTS}: the loss on {HELDOUT} held-out sequences changes by")
print(f"{measured.min():+.5f} to {measured.max():+.5f} nats per byte, {measured.mean():+.5f} on average.")


def rank_correlation(a, b):
    """Spearman's: 1 if both order the experts alike, 0 if one says nothing of the other."""
    return torch.corrcoef(torch.stack([x.argsort().argsort().float() for x in (a, b)]))[0, 1].item()


correlation = {way: rank_correlation(cost, measured) for way, cost in costs.items()}
print(f"Rank correlation with it of what {SAMPLE} sequences of training text show:")
for way, value in correlation.items():
    print(f"    {way:10}{value:+.2f}")

# %% [markdown]
# ## A spec under a budget of bytes
# Four bits for all, and a quarter of what eight would add. Engines load one format for a layer's experts, which leaves
# few choices in a small model; `fakequant` takes one for each role, or each expert, too.

# %%
smallest, largest = (sum(u.options[i].bytes for u in by_expert["jvp"].units) for i in (0, -1))
budget = smallest + (largest - smallest) // 4
mixed = {f"by expert, {way}": found.at(budget) for way, found in by_expert.items()}
mixed |= {"by role, jvp": searched("jvp", "group").at(budget), "by layer, jvp": searched("jvp", "engine").at(budget)}
tiny_moe.show(mixed["by role, jvp"])


# %% [markdown]
# ## Held-out loss
# An increase of less than two standard errors may be chance.


# %%
@torch.no_grad()
def heldout_losses(spec):
    quantizer = fqt.transform(spec)
    return losses(quantizer.fakequant(weights, quantizer.calibrate(weights)), test)


with torch.no_grad():
    base = losses(weights, test)
rows = {
    "8 bits for all": fqt.search(fq, weights, [EIGHT], budget="1GB"),
    **mixed,
    "4 bits for all": by_expert["jvp"].at(smallest),
}
increase = {name: heldout_losses(found.spec) - base for name, found in rows.items()}
count = sum(weights[name].numel() for group in fq.spec.groups for name in group.names)
table = [("choice", "bytes", "bits", "increase")]
for name, found in rows.items():
    each = increase[name]
    error = each.std() / len(each) ** 0.5
    table.append((name, f"{found.bytes:,}", f"{8 * found.bytes / count:.2f}", f"{each.mean():+.5f} ±{error:.5f}"))
about = f"Increase of the loss of {HELDOUT} held-out sequences in nats per byte, ± its standard error."
tiny_moe.show(tiny_moe.Table(table, about))

# %% [markdown]
# ## From four bits to eight
# One search measures, and its `at` chooses again under every budget.

# %%
budgets = torch.linspace(smallest, largest, 5 if SMALL else 9).int().tolist()
paths = {way: [found.at(limit) for limit in budgets] for way, found in by_expert.items()}
known = {found.spec: None for path in paths.values() for found in path}
for spec in tqdm(known, desc="held-out loss"):
    known[spec] = (heldout_losses(spec) - base).mean().item()
curves = {way: [known[found.spec] for found in path] for way, path in paths.items()}
average = {way: sum(curve) / len(curve) for way, curve in curves.items()}

if plt := tiny_moe.pyplot():
    figure, panels = plt.subplot_mosaic(
        [["experts", "experts"], ["ways", "budgets"]], figsize=(10.5, 7.5), height_ratios=(1, 2.4), layout="constrained"
    )
    left, middle, right = panels.values()
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3, "frameon": False}
    grid = 1000 * measured.view(LAYERS, EXPERTS)
    image = left.imshow(grid, aspect="auto", cmap="viridis")
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            value = grid[layer, expert].item()
            color = "white" if image.norm(value) < 0.6 else "black"
            left.text(expert, layer, f"{value:.2f}", ha="center", va="center", color=color)
    left.set_xticks(range(EXPERTS))
    left.set_yticks(range(LAYERS))
    left.set_xlabel("expert")
    left.set_ylabel("layer")
    left.set_title("INT4 for one expert: held-out loss, +1e-3 nats per byte")

    for way, marker in zip(correlation, "ox.+", strict=True):
        scale = 1000 if "loss" in WAYS[way] else 1000 * measured.max() / costs[way].max()  # the others are not in nats
        middle.plot(1000 * measured, scale * costs[way], marker, label=f"{way}, {correlation[way]:+.2f}")
    ends = 1000 * torch.stack([measured.min(), measured.max()])
    middle.plot(ends, ends, color="0.6", linewidth=0.8, label="as held out")
    middle.set_xlabel("increase of the held-out loss, 1e-3 nats per byte")
    middle.set_ylabel("sensitivity; of hessian and report scaled to it")
    middle.set_title("Sensitivity of an expert, and rank correlation")
    middle.legend(**below)

    for width, (way, curve) in zip((7, 5, 3, 1), curves.items(), strict=True):  # choices alike lie over each other
        kilobytes, cost = [found.bytes / 1000 for found in paths[way]], [1000 * value for value in curve]
        right.plot(kilobytes, cost, ".-", linewidth=width, markersize=6 + width, label=way)
    right.axhline(0, color="0.6", linewidth=0.8, label="bf16")
    right.set_xlabel("kB of packed experts")
    right.set_ylabel("increase of the held-out loss, 1e-3 nats per byte")
    right.set_title("From four bits to eight, by expert")
    right.legend(**below)
    tiny_moe.save(figure, options.out / "sensitivity.png")

# %% [markdown]
# ## What it found

# %%
ahead, best = max(correlation, key=correlation.get), min(average, key=average.get)
others = ", ".join(f"{way} {value:+.2f}" for way, value in correlation.items() if way != ahead)
behind = ", ".join(f"{way} {value:+.5f}" for way, value in average.items() if way != best)
cost = {name: f"{each.mean():+.5f}" for name, each in increase.items()}
print(
    f"\nOf the four, {ahead} orders the experts most as the held-out loss does ({correlation[ahead]:+.2f}; "
    f"{others}), and over {len(budgets)} budgets the choices by {best} have the smallest held-out loss on average "
    f"({average[best]:+.5f}; {behind})."
)
print(
    f"At {8 * budget / count:.2f} bits per weight a choice by jvp costs {cost['by expert, jvp']} nats per byte for "
    f"each expert, {cost['by role, jvp']} for each role and {cost['by layer, jvp']} for each layer, as engines do; "
    f"four bits for all cost {cost['4 bits for all']}."
)
