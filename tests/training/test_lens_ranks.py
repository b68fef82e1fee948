"""The lens over ranks, in real processes: whatever splits the model, its masters become those of one process.

One process trains in the plain form: `functional_call` on `fakequant` of the masters detached as leaves, `.backward()`,
one pullback. Gradients are added up in the same dtype, in the same order, and so everything is equal bit for bit.
"""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import fq_transforms as fqt
from tests import cases
from tests.cases import message_of, same_bits
from tests.full import FULL
from tests.training import toy

pytestmark = pytest.mark.dist

BF16, FP32 = torch.bfloat16, torch.float32
HOW = (("local", "pass_through"), ("reduced", "clip"), ("taken", "lsq"))  # see toy.plain_grads


def whole(tensor):
    """All of a DTensor, from all ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(tensors):
    return optree.tree_map(whole, dict(tensors))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Setup(NamedTuple):
    """A model that is split over ranks.

    Attributes:
        out: What is written to.
        call: What is called, if a whole batch goes in.
        rank: Whose tokens this rank has.
        ranks: How many share a microbatch.
        without_sync: A context in which gradients are not reduced.
        pipeline: `pipeline(step)` makes the gradients of a step, in place of all these.
    """

    out: Any
    call: Any = None
    rank: int = 0
    ranks: int = 1
    without_sync: Any = nullcontext
    pipeline: Any = None


class Trained(NamedTuple):
    """What training gives: names to tensors, whole."""

    masters: dict
    state: dict
    first: dict  # fake weights
    last: dict
    drawn: dict  # by stochastic rounding, which learned scales refuse
    losses: list  # of evaluations in between, on what was then in the model


EVALUATED = (1, 3)  # before the first write, at these steps, and after the last


def loss_at(step, call):
    """On a microbatch that is not trained on, and that all ranks see whole."""
    x, y = toy.batch(step, toy.MICROBATCHES)
    with torch.no_grad():
        return toy.loss_of(call(x), y).item()


def write(fq, masters, state, out):
    """The write counts up the versions of parameters and of their shards, and asks no other rank."""
    params = dict(out.named_parameters())
    before = {name: (p._version, local(p)._version) for name, p in params.items()}
    fq.fakequant(masters, state, out=out)
    for name, p in params.items():
        assert p._version > before[name][0], name
        assert local(p)._version > before[name][1] or not local(p).numel(), name
    with CommDebugMode() as collectives:
        fq.fakequant(masters, state, out=out)
    assert collectives.get_total_counts() == 0


def gradients(setup, step, accumulate, take):
    """Gradients of a step's microbatches, taken once, or from each."""
    if setup.pipeline:
        setup.pipeline(step)
    for i in range(0 if setup.pipeline else toy.MICROBATCHES):
        is_last = i == toy.MICROBATCHES - 1
        x, y = toy.batch(step, i, setup.rank, setup.ranks)
        with nullcontext() if accumulate != "local" or is_last else setup.without_sync():
            toy.loss_of(setup.call(x), y).backward()
        if accumulate == "taken" and not is_last:
            take()
    take()


def train(setup, accumulate, backward):
    """Train with the lens."""
    masters = fqt.masters(setup.out)
    fq = toy.transform(masters, backward)
    with torch.no_grad():
        state = toy.start(fq, masters)
    optimizer = toy.optimizer_of(masters, state)
    losses = []

    def evaluate(step):
        if setup.call:  # FSDP2's root stays gathered after this
            losses.append(loss_at(step, setup.call))

    evaluate(0)
    first = everything(fq.fakequant(masters, state, out=setup.out))
    for step in range(toy.STEPS):
        if step in EVALUATED:
            evaluate(step)
            fqt.cast(masters, out=setup.out)
            evaluate(step)
            fq.fakequant(masters, state, out=setup.out)
        gradients(setup, step, accumulate, lambda: fq.take_grads(setup.out, masters, state))
        assert all(p.grad is None for p in setup.out.parameters())
        optimizer.step()
        optimizer.zero_grad()
        toy.clamp(state)
        if step in (0, toy.STEPS - 1):
            write(fq, masters, state, setup.out)
        else:
            fq.fakequant(masters, state, out=setup.out)
    evaluate(toy.STEPS)
    last = everything(fq.fakequant(masters, state, out=setup.out))
    rounding = None if backward == "lsq" else fqt.Stochastic(7)
    drawn = everything(fq.fakequant(masters, state, out=setup.out, rounding=rounding))
    for leaf in optree.tree_leaves(state):
        check_replicas(leaf)
    return Trained(everything(masters), everything(fqt.state.flatten(state)), first, last, drawn, losses)


def check_replicas(tensor):
    """A DTensor that is replicated over an axis of its mesh is the same there."""
    for axis, placement in enumerate(tensor.placements if isinstance(tensor, DTensor) else ()):
        if placement.is_replicate():
            group, here = tensor.device_mesh.get_group(axis), tensor.to_local().detach().contiguous()
            parts = [torch.empty_like(here) for _ in range(group.size())]
            torch.distributed.all_gather(parts, here, group)
            assert all(torch.equal(part, here) for part in parts)


@cache
def plain(accumulate, backward, ranks, sums, dtype):
    """What one process gives."""
    model = toy.toy(dtype)
    fq = toy.transform(dict(model.named_parameters()), backward)
    initial = dict(model.named_parameters())
    masters, state, seen = toy.train_plainly(model, fq, accumulate, ranks, sums)
    there = [(0, initial), *((step, weights) for step in EVALUATED for weights in seen[step]), (toy.STEPS, seen[-1][0])]
    losses = [
        loss_at(step, lambda x, w=weights: functional_call(model, {name: p.bfloat16() for name, p in w.items()}, (x,)))
        for step, weights in there
    ]
    rounding = None if backward == "lsq" else fqt.Stochastic(7)
    with torch.no_grad():
        drawn = fq.fakequant(masters, state, rounding=rounding)
    drawn = {name: w.to(dtype) for name, w in drawn.items()}
    masters, state = everything(masters), everything(fqt.state.flatten(state))
    return Trained(masters, state, seen[0][0], seen[-1][0], everything(drawn), losses)


def check_same(found, *how, cut=False):
    """All that one process gives, bit for bit; losses but for the order of summation in fp64.

    NOTE cut granules: where ranks hold parts of what a learned scale covers, its gradient is summed in another order,
    and it may come out one bit off. That may round a fake weight the other way, and this then moves what follows it.
    Held to a hundredth of a step of the optimizer.
    """
    wanted = plain(*how)
    is_exact = not cut or how[1] != "lsq"
    for what in ("first", "masters", "state", "last", "drawn"):
        mine, whole = getattr(found, what), getattr(wanted, what)
        assert mine.keys() == whole.keys()
        wrong = {}
        for name, tensor in mine.items():
            off = (tensor.double() - whole[name].double()).abs()
            rate = toy.STATE_RATE if what == "state" else toy.RATE
            if off.max() > 0 if is_exact else (off > rate / 100).double().mean() > 1e-3:
                wrong[name] = off.max()
        assert not wrong, (what, how)
    if found.losses:
        assert found.losses == pytest.approx(wanted.losses, rel=1e-12 if is_exact else 1e-4)


def merged(results):
    """What the ranks of a pipeline have, together."""
    return Trained(
        *({k: v for each in part for k, v in each.items()} for part in list(zip(*results, strict=True))[:-1]), []
    )


def shard(module, mesh, **placements):
    """Make DTensors of a module's own parameters."""
    for name, placement in placements.items():
        p = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)))


# Data parallel.


def ddp(rank, size):
    model = toy.toy()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    return Setup(model, call, rank, size, call.no_sync)


DDP_HOW = (("local", "pass_through"), ("local", "clip"), ("taken", "lsq"))


def train_ddp(rank, size):
    return [train(ddp(rank, size), *how) for how in DDP_HOW]


def test_ddp(ranks):
    for how, found in zip(DDP_HOW, ranks(train_ddp, size=2)[0], strict=True):
        check_same(found, *how, 2, BF16, BF16)


# Fully sharded.


def fsdp_setup(model, rank, size):
    @contextmanager
    def without_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return Setup(model, model, rank, size, without_sync)


SUMS_IN_FP32 = MixedPrecisionPolicy(reduce_dtype=FP32, cast_forward_inputs=False)
COMPUTES_IN_BF16 = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32, cast_forward_inputs=False)


def train_fsdp(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    hybrid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    found = []
    for how, dtype, reshards in zip(HOW, (BF16, BF16, FP32), (True, False, 2 if size == 4 else True), strict=True):
        model = toy.toy(dtype)
        for layer in (model.stacked, model.listed, model.transposed, model):
            policy = COMPUTES_IN_BF16 if dtype == FP32 else SUMS_IN_FP32
            on = hybrid if size == 4 and reshards is True else mesh
            fully_shard(layer, mesh=on, mp_policy=policy, reshard_after_forward=reshards)
        found.append(train(fsdp_setup(model, rank, size), *how))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_fsdp(ranks, size):
    """Per block and root: all ways to reshard, gradients synchronized or not, parameters in bf16 and in fp32, HSDP."""
    for how, dtype, found in zip(HOW, (BF16, BF16, FP32), ranks(train_fsdp, size=size)[0], strict=True):
        check_same(found, *how, size, FP32, dtype, cut=True)


def train_ep_fsdp(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    found = []
    for how in HOW:
        model = toy.toy()
        for layer in (model.stacked, model.transposed):
            shard(layer, mesh["ep"], up=Shard(0), down=Shard(0))
            layer.mesh, layer.first = mesh["ep"], 3 * (rank % 2)
        for layer in (model.stacked, model.listed, model.transposed, model):
            dim = 1 if layer is model.stacked else 0
            rows = {"shard_placement_fn": lambda p, dim=dim: Shard(dim if p.dim() == 3 else 0)}
            fully_shard(layer, mesh=mesh["fsdp"], mp_policy=SUMS_IN_FP32, **rows)
        found.append(train(fsdp_setup(model, rank // 2, 2), *how))
    return found


@pytest.mark.slow
def test_ep_with_fsdp(ranks):
    """On one mesh: experts over one axis, and over the other these again, or their rows."""
    for how, found in zip(HOW, ranks(train_ep_fsdp)[0], strict=True):
        check_same(found, *how, 2, FP32, BF16, cut=True)


# Tensor parallel, and pipelines.


def train_tp(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for how in HOW:
        model = toy.toy()
        for expert in model.listed.experts:
            parallelize_module(expert, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
        shard(model.stacked, mesh, up=Shard(1), down=Shard(2))
        shard(model.transposed, mesh, up=Shard(2), down=Shard(1))
        model.stacked.mesh = model.transposed.mesh = mesh
        found.append(train(Setup(model, model), *how))
    return found


def test_tp(ranks):
    """Column and row parallel; the head has two rows on one rank, and one on the other."""
    for how, found in zip(HOW, ranks(train_tp, size=2)[0], strict=True):
        check_same(found, *how, 1, BF16, BF16, cut=True)


def train_pipeline(rank, size):
    found = []
    for _, backward in HOW:
        model = toy.toy()
        for name in [("transposed", "head"), ("stacked", "listed")][rank]:
            setattr(model, name, None)
        stage = PipelineStage(model, rank, size, torch.device("cpu"))
        schedule = Schedule1F1B(stage, toy.MICROBATCHES, loss_fn=toy.loss_of, scale_grads=False)

        def run(step, rank=rank, schedule=schedule):
            x, y = (torch.cat(t) for t in zip(*(toy.batch(step, i) for i in range(toy.MICROBATCHES)), strict=True))
            schedule.step(x) if rank == 0 else schedule.step(target=y)

        found.append(train(Setup(model, pipeline=run), "local", backward))
    return found


def test_pipeline(ranks):
    """1F1B over two stages, each with masters, a spec and a state of its own."""
    for (_, backward), *found in zip(HOW, *ranks(train_pipeline, size=2), strict=True):
        check_same(merged(found), "local", backward, 1, BF16, BF16)


PARTS = ("stacked", "listed", "transposed", "head")
# The stages of each rank. Here the gradients of inputs and of weights are made apart, weights' where a rank would wait.
ZERO_BUBBLE = {
    "interleaved": (ScheduleInterleavedZeroBubble, [(0, 2), (1, 3)]),
    "v": (ScheduleZBVZeroBubble, [(0, 3), (1, 2)]),
}


def shallow(model):
    """Another module of the same parts."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    return other


def without(model, kept):
    """The model, of which only some parts are left."""
    for name in set(PARTS) - set(kept):
        setattr(model, name, None)
    return model


def train_zero_bubble(rank, size, kind):
    found = []
    schedule_of, numbers = ZERO_BUBBLE[kind]
    for _, backward in HOW:
        whole = toy.toy()
        stages = []
        for number in numbers[rank]:
            part = without(shallow(whole), [PARTS[number]])
            stages.append(PipelineStage(part, number, len(PARTS), torch.device("cpu")))
        model = without(whole, [PARTS[number] for number in numbers[rank]])
        schedule = schedule_of(stages, toy.MICROBATCHES, loss_fn=toy.loss_of, scale_grads=False)

        def run(step, schedule=schedule):
            x, y = (torch.cat(t) for t in zip(*(toy.batch(step, i) for i in range(toy.MICROBATCHES)), strict=True))
            inputs = (x,) if 0 in numbers[rank] else ()
            schedule.step(*inputs, target=y if len(PARTS) - 1 in numbers[rank] else None)

        found.append(train(Setup(model, pipeline=run), "local", backward))
    return found


@pytest.mark.parametrize("kind", ZERO_BUBBLE)
def test_zero_bubble(ranks, kind):
    """Two stages per rank, whose weights' gradients come apart from the inputs'."""
    for (_, backward), *found in zip(HOW, *ranks(train_zero_bubble, kind, size=2), strict=True):
        check_same(merged(found), "local", backward, 1, BF16, BF16)


# Faults by name.


def reduced_gradient(rank, _, as_views, dtype):
    """Rank 0 has tokens of 0, rank 1 of 1, 2 and 4: three microbatches, each taken."""
    model = torch.nn.Linear(32, 1, bias=False).to(dtype)
    call = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    masters = fqt.masters(model)
    fq = fqt.transform(fqt.select(masters, {"*": fqt.INT8}))
    state = fq.calibrate(masters)
    fq.fakequant(masters, state, out=model)
    found = []
    for size in (1, 2, 4):
        call(torch.full((1, 32), float(rank * size), dtype=dtype)).sum().backward()
        fq.take_grads(model, masters, state)
        found.append(masters["weight"].grad.unique().tolist())
        if size == 1:  # DDP makes its buckets anew after the first backward pass
            masters["weight"].grad = None
    return found


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("as_views", [False, True])
def test_ddp_reduces_gradients(ranks, as_views, dtype):
    """`value_and_grad` on a DDP module left rank 0 with 0.0 and rank 1 with 1.0; the mean is 0.5.

    Gradients that are views of DDP's buckets are written over by the next backward pass: they are not kept.
    """
    for found in ranks(reduced_gradient, as_views, dtype, size=2):
        assert found == [[0.5], [1.0], [3.0]]


def after_an_evaluation(rank, size):
    """FSDP2's root stays gathered, its layers do not: a mapping has both."""
    mesh = init_device_mesh("cpu", (size,))
    model = toy.toy()
    for layer in (model.stacked, model.listed, model):
        fully_shard(layer, mesh=mesh)
    masters = fqt.masters(model)
    fq = toy.transform(masters)
    state = fq.calibrate(masters)
    before = everything(model.named_parameters())
    toy.loss_of(model(toy.batch(0, 0)[0]), 0).item()
    mixed = dict(model.named_parameters())
    assert {isinstance(p, DTensor) for p in mixed.values()} == {True, False}
    versions = {name: (p._version, local(p)._version) for name, p in mixed.items()}
    found = [
        message_of(ValueError, fq.fakequant, masters, state, out=mixed),
        message_of(ValueError, fqt.cast, masters, out=mixed),
        message_of(ValueError, fq.take_grads, mixed, masters, state),
    ]
    assert versions == {name: (p._version, local(p)._version) for name, p in mixed.items()}
    written = fq.fakequant(masters, state, out=model)
    params = dict(model.named_parameters())
    assert all(written[name] is p for name, p in params.items())
    assert all(isinstance(p, DTensor) for p in params.values())
    for name, whole_before in everything(params).items():
        assert same_bits(whole_before, before[name]) == (name not in {n for g in fq.spec.groups for n in g.names})
    return found


def test_a_mixture_of_gathered_and_sharded_is_refused(ranks):
    """On every rank, before anything is written or taken; the module itself is resharded first."""
    for messages in ranks(after_an_evaluation, size=2):
        for message in messages:
            cases.assert_names(message, "'transposed.up'", "found a plain tensor", "wanted a DTensor")
        cases.assert_names(messages[0], "give the module itself")


def partial(rank, size):
    """Gradients as they are without a reduction: parts of a sum, one on each rank."""
    mesh = init_device_mesh("cpu", (size,))
    whole = {"w": cases.experts(1, (8, 32))[0], "norm": torch.ones(32)}
    for dtype, backward in ((BF16, "clip"), (FP32, "pass_through"), (BF16, "lsq")):
        params = {
            name: torch.nn.Parameter(distribute_tensor(t.to(dtype), mesh, [Replicate()], src_data_rank=None))
            for name, t in whole.items()
        }
        masters = fqt.masters(params)
        fq = fqt.transform(fqt.select(params, {"w": fqt.FP8}), backward=backward)
        state = optree.tree_map(lambda leaf: leaf * 0.5, fq.calibrate(masters))
        fq.fakequant(masters, state, out=params)
        x = torch.arange(size * 32.0).view(size, 32).to(dtype)
        tokens = DTensor.from_local(x[rank : rank + 1], mesh, [Shard(0)])
        for _ in range(2):
            ((tokens * params["norm"]) @ params["w"].mT).sum().backward()
            assert params["w"].grad.placements == (Partial(),)
            fq.take_grads(params, masters, state)
        alone = {name: p.full_tensor().detach().requires_grad_() for name, p in params.items()}
        ((x * alone["norm"]) @ alone["w"].mT).sum().backward()
        gathered = optree.tree_map(lambda t: t.full_tensor().detach(), (masters, state))
        grads, of_state = fq.pullback(*gathered, {name: p.grad for name, p in alone.items()})
        for name, master in masters.items():
            assert master.grad.placements == (Replicate(),)
            assert torch.equal(master.grad.to_local(), 2 * grads[name]), name
        if backward == "lsq":
            assert torch.equal(state["w"]["amax"].grad.to_local(), 2 * of_state["w"]["amax"])


def test_partial_gradients_are_summed(ranks):
    """A parameter that is the same everywhere, with other tokens on each rank, and nobody who reduces gradients."""
    ranks(partial, size=2)


def lens_of(model, call, backward):
    """Two steps in fp32, of a model with a frozen layer and masters that are the parameters themselves."""
    model.stacked.requires_grad_(False)
    fq = toy.transform(dict(model.named_parameters()), backward)
    masters = fqt.masters(model, fq=fq)
    with torch.no_grad():
        state = toy.start(fq, masters)
    optimizer = toy.optimizer_of(masters, state)
    fq.fakequant(masters, state, out=model)
    for step in range(2):
        for i in range(2):
            x, y = toy.batch(step, i)
            toy.loss_of(call(x), y).backward()
            with CommDebugMode() as collectives:
                fq.take_grads(model, masters, state)
            assert backward == "lsq" or collectives.get_total_counts() == 0
        assert not any(m.grad is not None for m in masters.values() if not m.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        toy.clamp(state)
        fq.fakequant(masters, state, out=model)
    params = dict(model.named_parameters())
    assert [name for name, p in params.items() if p is masters[name]] == [n for n in params if "norm" in n]
    assert [name for name, m in masters.items() if not m.requires_grad] == [n for n in params if "stacked" in n]
    in_place = fq.fakequant(params, state, out=model, inplace=True)
    assert all(in_place[name] is p for name, p in params.items())
    return everything(masters) | {f"fake {name}": w for name, w in everything(in_place).items()}


def with_shared_masters(rank, size):
    """Both ranks see the same tokens, so that the mean of their gradients is either's."""
    mesh = init_device_mesh("cpu", (size,))
    for backward in ("clip", "lsq"):
        model = toy.toy(FP32)
        wanted = lens_of(model, model, backward)
        model = toy.toy(FP32)
        for layer in (model.stacked, model.transposed, model):
            fully_shard(layer, mesh=mesh)
        found = lens_of(model, model, backward)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0 if backward == "clip" else 1e-5)


def test_parameters_in_fp32_and_frozen_ones(ranks):
    """Of DTensors too, unselected masters in fp32 are the parameters, and a frozen layer is quantized, not trained."""
    ranks(with_shared_masters, size=2)


def without_tokens(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    weights = {f"{layer}.experts.{i}.w": w for layer in "ab" for i, w in enumerate(cases.experts(2, (8, 32)))}
    params = {name: distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for name, w in weights.items()}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}), backward="lsq")
    masters = fqt.masters({name: torch.nn.Parameter(p) for name, p in params.items()})
    state = fq.calibrate(masters)
    grads = dict.fromkeys(masters) | {"a.experts.0.w": masters["a.experts.0.w"].detach()}
    pulled, of_state = fq.pullback(masters, state, grads)
    assert [name for name, grad in pulled.items() if grad is not None] == ["a.experts.0.w"]
    assert of_state["b.experts.*.w"]["amax"] is None
    one, other = of_state["a.experts.*.w"]["amax"].to_local().tolist()
    assert one != 0 == other
    return one


def test_a_layer_without_tokens_has_no_gradient(ranks):
    """Nor has its state, where ranks sum the gradients of scales: an optimizer would step it all the same."""
    first, second = ranks(without_tokens, size=2)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not FULL, reason="as test_fsdp, by torchrun; FULL=1 runs it")),
        pytest.param("cuda", marks=pytest.mark.gpu2),
    ],
)
def test_fsdp_is_one_device(kind):
    """By torchrun, over NCCL too: fake weights bit for bit, and logits of three steps but for bf16's roundings."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.training.two_ranks", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if "one device's" in line] == ["pass_through", "clip"]
