# %% [markdown]
"""# Calibration: how should a scale be chosen?

The quickstart's Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are quantized in INT4, NVFP4, FP8 and INT8, with scales chosen by every method: the largest weight, percentiles, the
least squared error, the least squared error weighted by how large the inputs are, and four over six. For each: the
error of the weights, the loss on text that was held out, and how far the predictions move. Five minutes on two cores,
after `pip install -e '.[examples]'`; with `--small` some seconds, too few to learn much.
"""

# %%
import sys

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile

SMALL = "--small" in sys.argv
STEPS = 2 if SMALL else 480
SIZES = tiny_moe.Sizes(layers=4, hidden=128, inner=256)
if SMALL:
    SIZES = tiny_moe.Sizes(layers=1, hidden=64, inner=64, experts=4, context=16)
CALIBRATION = 2 if SMALL else 32  # batches of training text that the inputs are observed on
IS_SCRIPT = "__file__" in globals()  # a notebook has no file

tiny_moe.OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## Text, model and training
# Those of the quickstart, with the same weights.

# %%
training, heldout = tiny_moe.read_text()
inputs, targets = tiny_moe.sequences(heldout, SIZES.context, most=8 if SMALL else None)

model = tiny_moe.LanguageModel(SIZES)
params = dict(model.named_parameters())
generator = torch.Generator().manual_seed(0)
params = tiny_moe.train(model, params, training, STEPS, lr=4e-3, generator=generator, label="train")

# Rounded to bf16, as a checkpoint would be; what follows computes in fp32.
weights = {name: param.bfloat16().float() for name, param in params.items()}


@torch.no_grad()
def predictions(weights):
    """Logarithms of the probabilities of each next byte of the held-out text."""
    return torch.cat([functional_call(model, weights, (tokens,))[0].log_softmax(-1) for tokens in inputs.split(64)])


def loss_of(predicted):
    """Mean loss of each held-out sequence, in nats per byte."""
    return F.nll_loss(predicted.transpose(1, 2), targets, reduction="none").mean(1)


def divergence_of(predicted, wanted):
    """Mean Kullback-Leibler divergence of each held-out sequence, in nats per byte: what is lost of what was wanted."""
    return F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1).mean(1)


# %% [markdown]
# ## How large are the inputs?
# `input_second_moments` runs the model on training text and gives, for each expert, the mean square of each of its
# input channels. An error of a weight that meets large inputs moves the layer's output more. The moments belong to the
# model and not to a format, so once is enough.

# %%
FORMATS = (fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.NVFP4, fqt.FP8, fqt.INT8)


def spec_of(format):
    return fqt.select(weights, {"*.experts.*": format})


spec = spec_of(fqt.INT8)
generator = torch.Generator().manual_seed(1)
windows = [tiny_moe.random_windows(training, tiny_moe.BATCH, SIZES.context, generator) for _ in range(CALIBRATION)]
batches = [window[:, :-1] for window in windows]
moments = fqt.transform(spec).input_second_moments(weights, batches, model=model, unseen="mean-of-peers")
spread = torch.cat([(means.amax(1) / means.median(1).values) for means in moments.values()])
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
        for name, means in zip(group.names, moments[group.key], strict=True):
            square = (fakes[name] - weights[name]).double().square()
            plain.append(square.sum())
            weighted.append((square * means).sum())
    shape = (SIZES.layers, -1, SIZES.experts)
    return torch.stack(plain).view(shape), torch.stack(weighted).view(shape)


wanted = predictions(weights)
base = loss_of(wanted)
pairs = [(format, name) for format in FORMATS for name, method in METHODS.items() if applies(method, format)]
plain, weighted, losses, divergences = {}, {}, {}, {}
for format, name in (bar := tqdm(pairs, desc="calibrate")):
    bar.set_postfix_str(f"{format.name}, {name}")
    fq = fqt.transform(spec_of(format), method=METHODS[name])
    state = fq.calibrate(weights, statistics=moments if name == "mse, weighted" else None)
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


print(f"\n{'':38}{'error / that of max':>21}{'held-out loss, nats per byte':>36}{'divergence':>14}")
print(f"{'format':16}{'method':22}{'weights':>10}{'weighted':>11}{'':16}{'increase':>18}{'1e-3 nats per byte':>22}")
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
    if IS_SCRIPT:
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
    figure.savefig(tiny_moe.OUT / "calibration_errors.png", dpi=110)

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
    figure.suptitle("1e-3 nats per byte, ± standard error")
    figure.savefig(tiny_moe.OUT / "calibration_loss.png", dpi=110)
    print(f"\nfigures: {tiny_moe.OUT / 'calibration_errors.png'}, {tiny_moe.OUT / 'calibration_loss.png'}")
