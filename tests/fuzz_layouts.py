"""Drawn layouts: however a weight lies in memory, every result is that of a contiguous copy, bit for bit.

A sample in CI; with FULL=1, as in `.ci/full`, many more. A failure names its seed, with which `drawn(seed)` makes it.
"""

import random

import pytest
import torch

import fq_transforms as fqt
from tests.cases import ALL_FORMATS, assert_same_results
from tests.full import FULL

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = range(4000 if FULL else 200)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transposed(draw, x):
    a, b = draw.sample(range(x.dim()), 2) if x.dim() > 1 else (0, 0)
    return x.transpose(a, b).contiguous().transpose(a, b)


def sliced(draw, x):
    """Every n-th of a larger tensor, with others around it."""
    dim, step = draw.randrange(x.dim()), draw.choice([2, 3])
    before, after = draw.randrange(3), draw.randrange(3)
    shape = list(x.shape)
    shape[dim] = before + step * shape[dim] + after
    larger = torch.full(shape, 7.0, dtype=x.dtype, device=x.device)
    found = larger.narrow(dim, before, step * x.shape[dim])[(slice(None),) * dim + (slice(None, None, step),)]
    return found.copy_(x)


def expanded(draw, x):
    dim = draw.randrange(x.dim())
    return x.narrow(dim, draw.randrange(x.shape[dim]), 1).expand(x.shape)


def offset(draw, x):
    """Behind some elements of another tensor: its address is a multiple of its element's size only."""
    start = draw.randrange(1, 9)
    flat = torch.full((start + x.numel() + 3,), 7.0, dtype=x.dtype, device=x.device)
    return flat[start : start + x.numel()].view(x.shape).copy_(x)


def permuted(draw, x):
    """Any order of dims in memory, as channels_last is one."""
    order = draw.sample(range(x.dim()), x.dim())
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def negated(draw, x):
    """The values of x as a lazily negated view, which is refused."""
    return torch._neg_view(-x)


LAYOUTS = [transposed, sliced, expanded, offset, permuted]


def drawn(seed, device):
    """Parameters laid out at random, contiguous copies of them, and a Transform of both."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    format, dtype = draw.choice(ALL_FORMATS), draw.choice(DTYPES)
    is_stacked, is_transposed = draw.random() < 0.5, draw.random() < 0.5
    experts, out, columns = draw.randint(1, 4), draw.choice([1, 3, 8, 17]), (format.block[1] or 8) * draw.randint(1, 2)
    matrix = (columns, out) if is_transposed else (out, columns)
    names = ["experts.w"] if is_stacked else [f"experts.{e}.w" for e in range(experts)]
    params = {}
    for name in names:
        shape = (experts, *matrix) if is_stacked else matrix
        x = torch.randn(shape, generator=generator).to(device, dtype)
        for layout in draw.choices(LAYOUTS, k=draw.randint(1, 3)):
            x = layout(draw, x)
        params[name] = x
    plain = {name: x.clone(memory_format=torch.contiguous_format) for name, x in params.items()}
    spec = fqt.select(params, {"*": format}, transposed={"*": is_transposed})
    return draw, params, plain, fqt.transform(spec, backward=draw.choice(["pass_through", "clip"]))


def results(fq, params, state, cotangents, draw):
    """What the doors make of them, by name."""
    out = {name: torch.empty(p.shape, dtype=torch.bfloat16, device=p.device) for name, p in params.items()}
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    fakes = fq.fakequant(leaves, state)
    found = {"fakequant": fakes, "out": fq.fakequant(params, state, out=out)}
    found["backward"] = torch.autograd.grad(list(fakes.values()), list(leaves.values()), list(cotangents.values()))
    found["pullback"] = fq.pullback(params, state, cotangents)
    found["masters"] = {name: master.detach() for name, master in fqt.masters(params).items()}
    try:
        found["pack"] = fq.pack(params, state)
    except ValueError as error:  # a format without codes, the same for both
        found["pack"] = str(error)
    if draw.random() < 0.2:
        found["stochastic"] = fq.fakequant(params, state, rounding=fqt.Stochastic(3))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", range(8))
def test_a_layout_in_memory_changes_nothing(part, device):
    """Transposed, sliced, expanded, offset, permuted, and those of those: weights and cotangents alike."""
    for seed in SEEDS[part::8]:
        draw, params, plain, fq = drawn(seed, device)
        state = fq.calibrate(params)
        assert_same_results(state, fq.calibrate(plain), seed)
        state = {key: {name: leaf * 0.9 for name, leaf in leaves.items()} for key, leaves in state.items()}
        cotangents = {name: draw.choice(LAYOUTS)(draw, torch.randn_like(p)) for name, p in plain.items()}
        same = {name: c.clone(memory_format=torch.contiguous_format) for name, c in cotangents.items()}
        coin = draw.getstate()
        found = results(fq, params, state, cotangents, draw)
        draw.setstate(coin)
        assert_same_results(found, results(fq, plain, state, same, draw), seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", range(4))
def test_a_negated_view_is_refused_or_right(part, device):
    """As a weight, as a state and as a gradient it is refused by name; what autograd brings as one is right."""
    for seed in range(part, len(SEEDS) // 4, 4):
        draw, params, plain, fq = drawn(seed, device)
        state = fq.calibrate(plain)
        name = draw.choice(list(params))
        view = negated(draw, params[name])
        doors = [
            lambda: fq.calibrate(params | {name: view}),  # noqa: B023 (called here)
            lambda: fq.fakequant(params | {name: view}, state),  # noqa: B023
            lambda: fq.report(params | {name: view}, state),  # noqa: B023
            lambda: fq.pullback(params, state, {name: view}),  # noqa: B023
            lambda: fqt.select(params | {name: view}, {"*": fqt.INT8}),  # noqa: B023
        ]
        for door in doors:
            with pytest.raises(ValueError, match=f"'{name}': found a lazily negated"):
                door()
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        fakes = fq.fakequant(leaves, state)
        cotangents = [torch.randn_like(y) for y in fakes.values()]
        wanted = torch.autograd.grad(list(fakes.values()), list(leaves.values()), cotangents, retain_graph=True)
        views = [negated(draw, c) for c in cotangents]
        found = torch.autograd.grad(list(fakes.values()), list(leaves.values()), views)
        assert_same_results(tuple(grad.resolve_neg() for grad in found), wanted, seed)
