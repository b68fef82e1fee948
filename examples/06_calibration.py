# %% [markdown]
"""# Calibration: how should a scale be chosen, and a weight be rounded?

A small Mixture-of-Experts language model is trained on the help texts that come with Python. Then its experts
are quantized in INT4, NVFP4, MXFP4, FP8 and INT8, with scales chosen by every method: the largest weight, percentiles,
the least squared error, the same weighted by how large the inputs are or by how they go together, and four over six;
and rounded to the nearest or by GPTQ. For each: the error of the weights, that of the layers' outputs and the loss on
text that was held out, and how far the predictions move. Six minutes on two cores, after
`pip install -e '.[examples]'`; with `--small` some seconds, too few to learn much.
"""

# %%
import warnings

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm.auto import tqdm

import fq_transforms as fqt
import tiny_moe
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile

options = tiny_moe.options(__doc__)
torch.manual_seed(0)
SMALL = options.small
STEPS = 200 if SMALL else 480
SIZES = tiny_moe.Sizes(layers=4, hidden=128, inner=256)
if SMALL:
    SIZES = tiny_moe.Sizes(layers=1, hidden=64, inner=64, experts=4, context=16)
CALIBRATION = 16 if SMALL else 32  # batches of training text that the inputs are observed on

# %% [markdown]
# ## Text, model and training
# Those of the quickstart, with more layers and for more steps.

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
# ## What do experts multiply?
# `input_hessians` runs the model on training text and gives, for each expert, the mean of x xᵀ over its tokens. An
# error of a weight that meets large inputs moves the layer's output more; what is off the diagonal says which errors
# make up for each other. They belong to the model and not to a format, so once is enough; and once on held-out text, to
# judge.

# %%
FORMATS = (fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.NVFP4, fqt.MXFP4, fqt.FP8, fqt.INT8)


def spec_of(format):
    return fqt.select(weights, {"*.experts.*": format})


def hessians_on(batches):
    return fqt.transform(spec).input_hessians(weights, batches, model=model, unseen="mean-of-peers")


spec = spec_of(fqt.INT8)
generator = torch.Generator().manual_seed(1)
windows = [tiny_moe.random_windows(training, tiny_moe.BATCH, SIZES.context, generator) for _ in range(CALIBRATION)]
hessians, seen = hessians_on([window[:, :-1] for window in windows]), hessians_on(list(inputs.split(64)))
moments = {key: found["hessian"].diagonal(dim1=1, dim2=2) for key, found in hessians.items()}
spread = torch.cat([(means.amax(1) / means.median(1).values) for means in moments.values()])
fewest = min(found["tokens"].min().item() for found in hessians.values())
print(f"Largest mean square of an input channel, over the median's: {spread.median():.1f}, at most {spread.max():.1f}")
print(f"Tokens that an expert saw: at least {fewest:.0f}")

# %% [markdown]
# ## Every method
# Methods choose an amax for each granule: an expert for INT8 and FP8, 32 weights for INT4, 16 for NVFP4. Where a
# format keeps no amax of its granules there is nothing to choose: NVFP4 and MXFP4 take the scales of their blocks from
# the weights, and have Max only. NVFP4_STATIC is NVFP4 with calibrated scales. GPTQ rounds under scales that are chosen
# already: those of mse, or of max where there is no choice; NVFP4's would move with the weights.

# %%
METHODS = {
    "max": Max(),
    "percentile 99.99": Percentile(99.99),
    "percentile 99.9": Percentile(99.9),
    "percentile 99": Percentile(99),
    "mse": Mse(),
    "mse, weighted": Mse(),
    "mse, local Hessian": Mse(),
    "four over six, 256": FourOverSix(256),
    "four over six, 448": FourOverSix(448),
    "GPTQ": Mse(),
    "GPTQ, activation": Mse(),
    "GPTQ of ModelOpt": Mse(),
}
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else it lacks
        from modelopt.torch.quantization.utils import calib_utils
except ImportError:
    calib_utils = None
    del METHODS["GPTQ of ModelOpt"]
    print("no rows of ModelOpt: it is not installed")


def has_choice(format):
    """True if the format keeps the amax of its granules."""
    return not format.dynamic


def applies(name, format):
    if name.startswith("GPTQ"):
        return format != fqt.NVFP4
    if isinstance(METHODS[name], FourOverSix):
        return format == fqt.NVFP4_STATIC
    if name == "mse, local Hessian":
        return has_choice(format) and format.has_blocks_along_in
    return name == "max" or has_choice(format)


def blocks_of(format):
    """The blocks on the diagonals of the Hessians whose channels share a scale, [E, in / B, B, B]."""
    if not format.has_blocks_along_in:
        return None
    side = format.block[1]
    return {
        key: found["hessian"].unflatten(2, (-1, side)).unflatten(1, (-1, side)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        for key, found in hessians.items()
    }


def quantized(name, format):
    """The weights that the model computes with, by a format and a method."""
    fq = fqt.transform(spec_of(format), method=METHODS[name] if has_choice(format) else Max())
    statistics = {"mse, weighted": moments, "mse, local Hessian": blocks_of(format)}.get(name)
    state = fq.calibrate(weights, statistics=statistics)
    if name == "GPTQ of ModelOpt":
        return fq.fakequant(weights | by_modelopt(fq, state), state)
    if name.startswith("GPTQ"):
        order = "activation" if "activation" in name else None
        return fqt.gptq(fq, weights, state, hessians, order=order)
    return fq.fakequant(weights, state)


def by_modelopt(fq, state):
    """ModelOpt's GPTQ, an expert at a time, on the same Hessians and under the same scales."""
    found = {}
    for group in fq.spec.groups:
        for e, name in enumerate(group.names):
            one = fqt.transform(fqt.select({"w": weights[name]}, {"w": group.format}))
            scales = {"w": {leaf: value[e : e + 1] for leaf, value in state[group.key].items()}}
            weight = weights[name].clone()
            inverse = calib_utils.compute_hessian_inverse(hessians[group.key]["hessian"][e], weight, 0.01)
            calib_utils.gptq_blockwise_update(
                weight, inverse, 128, lambda w, one=one, scales=scales: one.fakequant({"w": w}, scales)["w"]
            )
            found[name] = weight
    return found


def errors(fakes):
    """Error of each expert's matrices, plain, weighted by the inputs, and of the outputs on held-out text.

    Each [layers, roles, experts].
    """
    found = [], [], []
    for group in spec.groups:
        for e, name in enumerate(group.names):
            error = (fakes[name] - weights[name]).double()
            found[0].append(error.square().sum())
            found[1].append((error.square() * moments[group.key][e]).sum())
            found[2].append(((error @ seen[group.key]["hessian"][e].double()) * error).sum())
    return [torch.stack(each).view(SIZES.layers, -1, SIZES.experts) for each in found]


wanted = predictions(weights)
base = loss_of(wanted)
pairs = [(format, name) for format in FORMATS for name in METHODS if applies(name, format)]
plain, weighted, outputs, losses, divergences = {}, {}, {}, {}, {}
for format, name in (bar := tqdm(pairs, desc="calibrate")):
    bar.set_postfix_str(f"{format.name}, {name}")
    fakes = quantized(name, format)
    plain[format, name], weighted[format, name], outputs[format, name] = errors(fakes)
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
# Errors are sums over all experts, over those of max; those of outputs on held-out text. GPTQ makes the error of the
# weights larger, which is how it makes that of the outputs smaller. The loss of a model may go down by luck, and an
# increase of less than two standard errors may be chance; the divergence from bf16's predictions cannot be negative,
# and orders the methods where the loss does not.


# %%
def mean_and_error(each):
    """The mean over the held-out sequences, and its standard error."""
    return each.mean().item(), each.std().item() / len(each) ** 0.5


rows = [("format", "method", "weights", "weighted", "outputs", "loss", "increase", "divergence")]
rows += [("bf16", *"----", f"{base.mean():.4f}", "-", "-")]
for format, name in pairs:
    found = plain, weighted, outputs
    ratios = [(each[format, name].sum() / each[format, "max"].sum()).item() for each in found]
    cost = "{:+.4f} ±{:.4f}".format(*mean_and_error(losses[format, name] - base))
    moved = "{:.3f} ±{:.3f}".format(*mean_and_error(1000 * divergences[format, name]))
    shares = [f"{ratio:.3f}" for ratio in ratios]
    rows.append((format.name, name, *shares, f"{losses[format, name].mean():.4f}", cost, moved))
about = (
    "Errors of the weights, of the same weighted by the inputs, and of the outputs, over those of max;",
    "the held-out loss and its increase in nats per byte, the divergence from bf16 in 1e-3 nats per byte.",
)
tiny_moe.show(tiny_moe.Table(rows, *about, left=(0, 1)))

# %% [markdown]
# ## Figures
# Errors by expert; and what each method costs in loss, and how far it moves the predictions.

# %%
if plt := tiny_moe.pyplot():
    roles = [group.key.rpartition("experts.*.")[2].removesuffix(".weight") for group in spec.groups][:3]
    choosing = [format for format in FORMATS if format != fqt.NVFP4]
    tried = {format: [name for of, name in pairs if of == format and name != "max"] for format in choosing}
    widths = [1 + len(names) for names in tried.values()]
    figure, panels = plt.subplots(
        1, len(choosing), figsize=(10.5, 5.5), width_ratios=widths, layout="constrained", sharey=True
    )
    for panel, (format, names) in zip(panels, tried.items(), strict=True):
        for column, name in enumerate(names):
            ratio = outputs[format, name] / outputs[format, "max"]  # [layers, roles, experts]
            for role, color in enumerate(("tab:blue", "tab:orange", "tab:green")):
                found = ratio[:, role].flatten()
                at = column + 0.25 * (role - 1) + torch.linspace(-0.08, 0.08, len(found))
                panel.plot(at, found, ".", markersize=4, color=color, label=None if column else roles[role])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        panel.set_title(format.name, fontsize="medium")
    panels[0].set_ylabel("held-out error of a matrix's outputs / that of max")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=3, frameon=False
    )
    figure.suptitle("Each point is a matrix of an expert; below 1 is better than max")
    tiny_moe.save(figure, options.out / "calibration_errors.png")

    rows = list(METHODS)[::-1]  # the first on top
    figure, panels = plt.subplots(2, len(choosing), figsize=(10.5, 7.5), layout="constrained", sharey=True)
    for column, format in zip(panels.T, choosing, strict=True):
        keys = [(format, name) for name in ("max", *tried[format])]
        at = [rows.index(name) for _, name in keys]
        colors = ["0.5" if name == "max" else "tab:blue" for _, name in keys]
        for panel, each in zip(column, ({key: losses[key] - base for key in keys}, divergences), strict=True):
            cost, error = zip(*(mean_and_error(1000 * each[key]) for key in keys), strict=True)
            panel.barh(at, cost, 0.7, xerr=error, color=colors, ecolor="0.3", capsize=2)
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_yticks(range(len(rows)), rows)
            panel.locator_params(axis="x", nbins=3)
        column[0].set_title(format.name, fontsize="medium")
    panels[0, 2].set_xlabel("increase of the held-out loss, 1e-3 nats per byte, ± standard error")
    panels[1, 2].set_xlabel("divergence from bf16's predictions, 1e-3 nats per byte, ± standard error")
    tiny_moe.save(figure, options.out / "calibration_loss.png")

# %% [markdown]
# ## What it found

# %%
fours = [fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.MXFP4]
left, best, less = {}, {}, {}
for format in fours:
    own = [name for of, name in pairs if of == format]
    nearest = "mse" if "mse" in own else "max"
    left[format] = (outputs[format, "GPTQ"].sum() / outputs[format, nearest].sum()).item()
    best[format] = min(own, key=lambda name, format=format: divergences[format, name].mean())
    less[format] = 1 - (divergences[format, best[format]].mean() / divergences[format, "max"].mean()).item()
shares = ", ".join(f"{share:.0%} in {format.name}" for format, share in left.items())
print(f"\nOf the outputs' error by rounding to the nearest, GPTQ leaves under the same scales {shares}.")
print(
    "Nearest to bf16's predictions come "
    + ", ".join(f"{best[f]} in {f.name} ({less[f]:.0%} less divergence than by max)" for f in fours)
    + "."
)
