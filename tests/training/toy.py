"""A mixture of experts for training over ranks, its batches, and how it is trained in the plain form.

Weights are bf16, and every layer computes in fp64 from them. So where sums are cut over ranks makes a difference of
1e-16, which no rounding to bf16 or fp32 after them sees: what training over ranks gives equals one process's bit for
bit, if the sums over ranks themselves are done in the same dtype.
"""

import fnmatch

import optree
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.func import functional_call, vjp
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from tests import cases
from tests.full import FULL

# Of five experts the last never gets a token: on four ranks they are 2, 2, 1 and none.
EXPERTS, HIDDEN, INNER, OUT = 5, 32, 64, 3
TOKENS, MICROBATCHES = 16, 4
STEPS = 20 if FULL else 5  # equal to the bit after each: what would drift apart does so in the first
RATE, STATE_RATE = 3e-3, 1e-4

RULES = {
    "stacked.up": fqt.NVFP4,
    "stacked.down": fqt.FP8,
    "listed.experts.*.up.weight": fqt.INT8_PER_CHANNEL,
    "listed.experts.*.down.weight": fqt.INT4_BLOCK32,
    "transposed.up": fqt.MXFP4,
    "transposed.down": fqt.NVFP4_STATIC,
    "head.weight": fqt.FP8,
}


def entered(x, mesh):
    """What all ranks of a mesh have, for each to compute its part with: gradients are summed over them."""
    return x if mesh is None else DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def left(x, mesh):
    """The sum of the ranks' parts."""
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


class Linear(nn.Linear):
    """fp64 from weights of any dtype."""

    def forward(self, x):
        return F.linear(x, self.weight.double())


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Linear(HIDDEN, INNER, bias=False), Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        return F.rms_norm(x, (HIDDEN,)) * self.weight.double()


class Listed(nn.Module):
    """Each expert a module; one without tokens is not called."""

    def __init__(self):
        super().__init__()
        self.norm, self.experts = Norm(), nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        x = self.norm(x)
        return torch.stack([expert(x_E) for expert, x_E in zip(self.experts, x)])  # noqa: B905 (one has none)


class Stacked(nn.Module):
    """One tensor per role, [E, out, in], or [E, in, out] if transposed; a rank of `mesh` may hold parts of them."""

    def __init__(self, transposed):
        super().__init__()
        self.norm, self.transposed, self.mesh, self.first = Norm(), transposed, None, 0
        up, down = torch.empty(EXPERTS, INNER, HIDDEN), torch.empty(EXPERTS, HIDDEN, INNER)
        self.up, self.down = (nn.Parameter(w.mT.contiguous() if transposed else w) for w in (up, down))

    def forward(self, x):
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in (self.up, self.down)]
        first, end = self.first, min(self.first + len(weights[0]), len(x))
        up, down = (w[: end - first].double() for w in weights)
        if not self.transposed:
            up, down = up.mT, down.mT
        out = F.silu(entered(self.norm(x), self.mesh)[first:end] @ up) @ down
        return left(F.pad(out, (0, 0, 0, 0, first, len(x) - end)), self.mesh)


class Toy(nn.Module):
    """Three layers of experts and a head, each of which is None where another rank of a pipeline has it.

    Inside, tokens are [E, tokens, features]: they go to the experts in turn, so that all ranks have some for each.
    """

    def __init__(self):
        super().__init__()
        self.stacked, self.listed, self.transposed = Stacked(False), Listed(), Stacked(True)
        self.head = Linear(HIDDEN, OUT, bias=False)

    def forward(self, x):
        if self.stacked is not None:
            x = x.unflatten(0, (-1, EXPERTS - 1)).transpose(0, 1).contiguous()
        for layer in (self.stacked, self.listed, self.transposed):
            x = x if layer is None else x + layer(x)
        return x if self.head is None else self.head(x).transpose(0, 1).flatten(0, 1)


def toy(dtype=torch.bfloat16):
    """The model, each expert with a magnitude of its own, the same on every rank."""
    model = Toy()
    with torch.no_grad():
        for seed, (name, param) in enumerate(model.named_parameters()):
            if "norm" not in name:
                whole = param if param.dim() == 3 else param[None]
                values = cases.experts(len(whole), whole.shape[1:], seed=seed)
                whole.copy_(torch.stack(values).mul_(4 / param.shape[-1] ** 0.5))
    return model.to(dtype)


def batch(step, microbatch, rank=0, ranks=1):
    """This rank's share of a microbatch, tokens and targets; all ranks' together are what one process has."""
    generator = torch.Generator().manual_seed(100 * step + microbatch)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    y = torch.randn(TOKENS, OUT, generator=generator, dtype=torch.float64)
    share = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    return x[share], y[share]


def loss_of(out, y):
    return (out - y).square().mean()


def transform(params, backward="pass_through"):
    """By the rules for what is there."""
    rules = {pattern: format for pattern, format in RULES.items() if fnmatch.filter(params, pattern)}
    transposed = ["transposed.*"] if "transposed.up" in params else []
    stacks = {"experts": r"(stacked|transposed)\.(up|down)"} if {"stacked.up", "transposed.up"} & params.keys() else {}
    spec = fqt.select(params, rules, transposed=transposed, **stacks)
    return fqt.transform(spec, backward=backward)


def start(fq, masters):
    """A state that clips a few weights; leaves to learn, if that is what the backward does."""
    state = optree.tree_map(lambda leaf: (leaf * 0.8).detach(), fq.calibrate(masters))
    return optree.tree_map(torch.Tensor.requires_grad_, state) if fq.backward == "lsq" else state


def optimizer_of(masters, state):
    leaves = [leaf for leaf in optree.tree_leaves(state) if leaf.requires_grad]
    groups = [{"params": [m for m in masters.values() if m.requires_grad]}]
    learned = {"params": leaves, "lr": STATE_RATE, "weight_decay": 0.0}
    return torch.optim.AdamW(groups + [learned] * bool(leaves), lr=RATE)


@torch.no_grad()
def clamp(state):
    """Learned scales stay positive."""
    for leaf in optree.tree_leaves(state):
        if leaf.requires_grad:
            leaf.clamp_(min=1e-6)


# The plain form.


def mean(grads, dtype):
    """Of what the ranks have, None where they have none."""
    if grads[0] is None:
        assert all(grad is None for grad in grads)
        return None
    return (sum(grads[1:], grads[0]) / len(grads)).to(dtype)


def plain_grads(model, leaves, step, accumulate, ranks, dtype):
    """Gradients of fake weights of a step: dicts of names to gradients, each of which is pulled back by itself.

    Args:
        model: Whose forward is run, in bf16.
        leaves: Fake weights.
        step: Its number.
        accumulate: "local": each rank adds up its microbatches, then they are reduced. "reduced": each microbatch is
            reduced, and these add up in the dtype of the weights. "taken": each is reduced, and pulled back.
        ranks: How many share a microbatch.
        dtype: Of sums over ranks, and of each rank's own.
    """

    def local(microbatches, rank):
        total = dict.fromkeys(leaves)
        for i in microbatches:
            mine = {name: w.detach().bfloat16().requires_grad_() for name, w in leaves.items()}
            x, y = batch(step, i, rank, ranks)
            loss_of(functional_call(model, mine, (x,)), y).backward()
            for name, w in mine.items():
                if w.grad is not None:
                    total[name] = w.grad.to(dtype) + (0 if total[name] is None else total[name])
        return total

    def reduced(microbatches):
        found = [local(microbatches, rank) for rank in range(ranks)]
        return {name: mean([grads[name] for grads in found], leaves[name].dtype) for name in leaves}

    if accumulate == "local":
        return [reduced(range(MICROBATCHES))]
    each = [reduced([i]) for i in range(MICROBATCHES)]
    if accumulate == "taken":
        return each
    total = each[0]
    for grads in each[1:]:
        total = {name: None if grad is None else total[name] + grad for name, grad in grads.items()}
    return [total]


def add_up(tensor, grad):
    if grad is not None:
        tensor.grad = grad.to(tensor.dtype) if tensor.grad is None else tensor.grad + grad.to(tensor.dtype)


def train_plainly(model, fq, accumulate="local", ranks=1, dtype=torch.bfloat16):
    """Masters and state of one process, and of each step, and after the last, fake weights and masters as cast.

    `functional_call` on `fakequant` of the masters detached as leaves, `.backward()`, one pullback.
    """
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    state = start(fq, masters)
    learned = fq.backward == "lsq"
    optimizer = optimizer_of(masters, state)

    def cast(tensors):
        return {name: w.to(dtypes[name]) for name, w in tensors.items()}

    seen = []
    for step in range(STEPS + 1):
        m, s = optree.tree_map(torch.Tensor.detach, (masters, state))
        if learned:
            weights, pullback = vjp(lambda m, s: cast(fq.fakequant(m, s)), m, s)
        else:
            weights, pullback = vjp(lambda m: cast(fq.fakequant(m, s)), m)  # noqa: B023 (called in this turn only)
        seen.append(optree.tree_map(torch.clone, (weights, cast(m))))
        if step == STEPS:
            return masters, state, seen
        for grads in plain_grads(model, seen[-1][0], step, accumulate, ranks, dtype):
            there = {name: torch.zeros_like(w) if grads[name] is None else grads[name] for name, w in weights.items()}
            of_masters, *of_state = pullback(there)
            for name, master in masters.items():
                add_up(master, None if grads[name] is None else of_masters[name])
            if learned:
                optree.tree_map(add_up, state, of_state[0])
        optimizer.step()
        optimizer.zero_grad()
        clamp(state)
