# %% [markdown]
"""# Sensitivity: which experts can take four bits?

A small byte-level Mixture-of-Experts language model is trained on the help texts that come with Python. Then, with its
experts in eight bits, each is asked in turn what four would cost:

1. measured, by `torch.func.vmap` over quantizer states: the state of an expert decides its precision;
2. predicted, by `torch.func.jvp` of the loss along the quantization error, first and second order, which takes no more
   than the eight-bit model;
3. guessed, from `fq.report` alone, which looks at the weights and at no data.

From that a mixed-precision `Spec` is chosen under a budget of bytes, and tested on held-out data. This takes a minute
or two on two cores, after `pip install -e '.[examples]'`; with `--small` it takes seconds and learns little.
"""

# %%
import sys
from dataclasses import replace

import torch
from torch.func import functional_call, jvp, vmap
from tqdm.auto import trange

import fq_transforms as fqt
import tiny_moe

SMALL = "--small" in sys.argv
STEPS = 2 if SMALL else 400
SIZES = tiny_moe.Sizes(layers=2, hidden=64, inner=128, context=64)
if SMALL:
    SIZES = tiny_moe.Sizes(layers=2, hidden=32, inner=64, experts=2, top_k=1, context=16)
LAYERS, EXPERTS = SIZES.layers, SIZES.experts
SAMPLE, HELDOUT = (4, 8) if SMALL else (96, 768)  # sequences that sensitivity is measured on, and held out
IS_SCRIPT = "__file__" in globals()  # a notebook has no file

tiny_moe.OUT.mkdir(exist_ok=True)
torch.manual_seed(0)
torch.set_num_threads(1)  # the matrices are small, and threads that wait for each other are slower than one

# %% [markdown]
# ## Text and model
# Sensitivity is measured on training text. In this form of the model every expert runs on every token, and the router's
# zeros drop what was not chosen: no shape depends on data, so `vmap` can map the whole model.

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
# ## A state is a precision
# INT8 scales an expert by 127 / amax. Under an amax 127 / 7 times as large it scales by 7 / amax, which is INT4: of the
# 256 integers only -7..7 are used. So one format, INT8, and a state per candidate give every mixture of four and eight
# bits that there is, and `vmap` over states tries many at once.

# %%
EIGHT = fqt.INT8
FOUR = replace(EIGHT, name="INT4", element=fqt.INT4_BLOCK32.element)
COARSER = 127 / 7

fq8, fq4 = (fqt.transform(fqt.select(weights, {"*.experts.*": format})) for format in (EIGHT, FOUR))
state8, state4 = fq8.calibrate(weights), fq4.calibrate(weights)
KEYS = list(state8)
ROLES = [key.rpartition("experts.*.")[2].removesuffix(".weight") for key in KEYS[: len(KEYS) // LAYERS]]


def state_with(in_four):
    """The INT8 state in which some experts have four bits: `in_four` is 1 for them, [layers, roles, experts]."""
    factor = 1 + (COARSER - 1) * in_four.flatten(0, 1)
    return {key: {"amax": state8[key]["amax"] * f} for key, f in zip(KEYS, factor, strict=True)}


everything = torch.ones(LAYERS, len(ROLES), EXPERTS)
by_state, by_format = fq8.fakequant(weights, state_with(everything)), fq4.fakequant(weights, state4)
names = [name for group in fq4.spec.groups for name in group.names]
ties, count = 0, sum(weights[name].numel() for name in names)
for group in fq4.spec.groups:
    for name, amax in zip(group.names, state4[group.key]["amax"], strict=True):
        differs = (by_state[name] - by_format[name]).abs() > 1e-5 * amax
        integer = weights[name] * 7 / amax
        assert ((integer - integer.floor() - 0.5).abs()[differs] < 1e-4).all()
        ties += differs.sum().item()
print(f"INT4 by its state and by its format: all equal but {ties} of {count:,} weights, ties that fall either way")

# %% [markdown]
# ## Measured: vmap over states
# One candidate for each expert of each layer, and one for each group of the spec: a role in a layer, which engines run
# in one format.


# %%
def sample_loss(weights):
    return losses(weights, sample).mean()


def increases(candidates, label):
    """What each candidate [k, layers, roles, experts] adds to the loss of eight bits."""

    def candidate_loss(in_four):
        return sample_loss(fq8.fakequant(weights, state_with(in_four)))

    chunks = candidates.split(4)
    found = [vmap(candidate_loss)(chunks[i]) for i in trange(len(chunks), desc=label)]
    return torch.cat(found) - sample_loss(fq8.fakequant(weights, state8))


with torch.no_grad():
    one = torch.eye(LAYERS * EXPERTS).view(-1, LAYERS, 1, EXPERTS)
    expert_candidates = one.expand(-1, -1, len(ROLES), -1)
    group_candidates = torch.eye(len(KEYS)).view(-1, LAYERS, len(ROLES), 1).expand(-1, -1, -1, EXPERTS)
    measured = increases(expert_candidates, "vmap over experts")
    measured_groups = increases(group_candidates, "vmap over groups")

# %% [markdown]
# ## Predicted: jvp along the quantization error
# With e the step from an expert's eight-bit weights to its four-bit ones, the loss at w + e is about
# L + L'e + e'He / 2. One jvp gives the first term, a jvp of that jvp the second: no gradient is kept, no Hessian made.
# The longer a model is trained, the less the first order has to say: at a minimum of the loss it is zero.

# %%
at8 = fq8.fakequant(weights, state8)
error = {name: by_format[name] - at8[name] for name in names}
PLACE = {
    name: (*divmod(number, len(ROLES)), expert)
    for number, group in enumerate(fq8.spec.groups)
    for expert, name in enumerate(group.names)
}


def along(in_four):
    """First and second derivative of the loss along the error of some experts."""

    def at(t):
        return sample_loss(at8 | {name: at8[name] + t * in_four[PLACE[name]] * error[name] for name in names})

    def slope(t):
        return jvp(at, (t,), (torch.ones(()),))[1]

    return jvp(slope, (torch.zeros(()),), (torch.ones(()),))


with torch.no_grad():
    chunks = expert_candidates.split(4)
    found = [vmap(along)(chunks[i]) for i in trange(len(chunks), desc="jvp of jvp")]
    first, second = (torch.cat(column) for column in zip(*found, strict=True))

# %% [markdown]
# ## Guessed: the report
# Noise of the four-bit weights over their signal: it knows neither the data nor how often an expert is chosen.

# %%
report = fq4.report(weights, state4)
print(report)
noise = torch.stack([group.noise for group in report.groups.values()]).view(LAYERS, len(ROLES), EXPERTS)
signal = torch.stack([group.signal for group in report.groups.values()]).view(LAYERS, len(ROLES), EXPERTS)
relative = (noise / signal).sum(1).flatten().float()  # over an expert's three matrices


def rank_correlation(a, b):
    """Spearman's: 1 if both order the experts alike, 0 if one says nothing of the other."""
    return torch.corrcoef(torch.stack([x.argsort().argsort().float() for x in (a, b)]))[0, 1].item()


predictions = {
    "first order, jvp": first,
    "second order, jvp of jvp": first + second / 2,
    "noise / signal, report": relative,
}
print(f"\nFour bits for one expert of {LAYERS * EXPERTS}: the loss on {SAMPLE} sequences changes by")
print(f"{measured.min():+.5f} to {measured.max():+.5f} nats per byte, {measured.mean():+.5f} on average.")
print("Rank correlation with it:")
for name, prediction in predictions.items():
    print(f"    {name:26}{rank_correlation(prediction, measured):+.2f}")


# %% [markdown]
# ## A spec under a budget of bytes
# Greedy: the cheapest increase of the loss per byte saved first, until the bytes fit. What `select` makes of the choice
# is an ordinary spec, of two formats.


# %%
def nbytes(fq):
    """Bytes of the packed experts, scales included; shapes will do."""
    meta = {name: weight.to("meta") for name, weight in weights.items()}
    return sum(leaf.nbytes for leaf in fqt.state.flatten(fq.pack(meta, fq.init(meta))).values())


def spec_of(in_four):
    """The spec whose groups of these numbers have four bits."""
    rules = [fqt.Rule("*.experts.*", EIGHT)] + [fqt.Rule(KEYS[group], FOUR) for group in in_four]
    return fqt.select(weights, rules)


def fill(order):
    """The first groups in an order that bring the experts under the budget."""
    taken = []
    for group in order:
        if nbytes(fqt.transform(spec_of(taken))) <= budget:
            break
        taken.append(group)
    return taken


def quantized(spec):
    fq = fqt.transform(spec)
    return fq.fakequant(weights, fq.calibrate(weights))


bytes8, bytes4 = nbytes(fq8), nbytes(fq4)
budget = (bytes8 + bytes4) // 2
saved = torch.tensor([bytes8 - nbytes(fqt.transform(spec_of([group]))) for group in range(len(KEYS))])
order = (measured_groups / saved).argsort().tolist()
chosen, opposite = fill(order), fill(order[::-1])
mixed, worse = fqt.transform(spec_of(chosen)), fqt.transform(spec_of(opposite))
print(f"\n{mixed.spec}")

# %% [markdown]
# ## Held-out loss
# Against eight bits and four bits for all, the opposite choice, and a choice by expert, which only a state can hold: a
# group of a spec has one format. It orders experts by their measured increase, under the same bytes. An increase of
# less than two standard errors may be chance.

# %%
cheapest = measured.argsort()[: int((bytes8 - budget) / (bytes8 - bytes4) * len(measured))]
by_expert = expert_candidates[cheapest].sum(0)
expert_bytes = bytes8 - len(cheapest) * (bytes8 - bytes4) // len(measured)

with torch.no_grad():
    base = losses(weights, test)
    rows = {
        "bf16": (sum(2 * weights[name].numel() for name in names), base),
        "8 bits for all": (bytes8, losses(at8, test)),
        "mixed, by expert (a state)": (expert_bytes, losses(fq8.fakequant(weights, state_with(by_expert)), test)),
        "mixed, by group (a spec)": (nbytes(mixed), losses(quantized(mixed.spec), test)),
        "mixed, the opposite groups": (nbytes(worse), losses(quantized(worse.spec), test)),
        "4 bits for all": (bytes4, losses(by_format, test)),
    }
print(f"\n{'':28}{'bytes':>10}{'bits':>7}{'held-out loss':>15}{'increase':>11}   (nats per byte, {HELDOUT} sequences)")
for name, (size, each) in rows.items():
    difference = each - base
    cost = f"{difference.mean():+.5f} ±{difference.std() / len(difference) ** 0.5:.5f}"
    bits = 8 * size / sum(weights[name].numel() for name in names)
    print(f"{name:28}{size:>10,}{bits:>7.2f}{each.mean():>15.5f}   {cost}")

# %% [markdown]
# ## The path from eight bits to four
# Each step of the greedy order is a state, so the whole path is one `vmap`, on held-out text.

# %%
with torch.no_grad():
    steps = torch.tril(torch.ones(len(KEYS) + 1, len(KEYS)), -1)
    paths = {}
    for label, path in (("greedy", order), ("the opposite", order[::-1])):
        in_four = torch.zeros_like(steps)
        in_four[:, path] = steps
        in_four = in_four.view(-1, LAYERS, len(ROLES), 1).expand(-1, -1, -1, EXPERTS)
        path_losses = vmap(lambda c: losses(fq8.fakequant(weights, state_with(c)), test).mean(), chunk_size=4)
        sizes = bytes8 - torch.cat([torch.zeros(1), saved[path].cumsum(0)])
        paths[label] = sizes, path_losses(in_four)

try:
    import matplotlib
except ImportError:
    matplotlib = None
    print("no figure: matplotlib is not installed")

if matplotlib:
    if IS_SCRIPT:
        matplotlib.use("Agg")  # a script may have no display
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
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
    left.set_title("4 bits for one expert: increase of the loss, 1e-3 nats per byte")

    for (name, prediction), marker in zip(list(predictions.items())[:2], "x.", strict=True):
        middle.plot(1000 * measured, 1000 * prediction, marker, label=name)
    ends = 1000 * torch.stack([measured.min(), measured.max()])
    middle.plot(ends, ends, color="0.6", linewidth=0.8, label="as measured")
    middle.set_xlabel("measured by vmap over states, 1e-3 nats per byte")
    middle.set_ylabel("predicted")
    middle.set_title("What jvp along the error predicts")
    middle.legend()

    for (label, (sizes, path)), color in zip(paths.items(), ("tab:blue", "tab:orange"), strict=True):
        right.plot(sizes / 1000, path, ".-", color=color, label=f"{label}, group by group")
    size, each = rows["mixed, by expert (a state)"]
    right.plot(size / 1000, each.mean(), "kD", label="by expert")
    right.axvline(budget / 1000, color="0.6", linestyle="--", label="budget")
    right.axhline(base.mean(), color="0.6", linewidth=0.8, label="bf16")
    right.set_xlabel("kB of packed experts")
    right.set_ylabel("held-out loss, nats per byte")
    right.set_title("From 8 bits to 4")
    right.legend(loc="center")
    figure.savefig(tiny_moe.OUT / "sensitivity.png", dpi=110)
    report.plot().savefig(tiny_moe.OUT / "sensitivity_report.png", dpi=110)
    print(f"\nfigures: {tiny_moe.OUT / 'sensitivity.png'}, {tiny_moe.OUT / 'sensitivity_report.png'}")
