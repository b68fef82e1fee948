"""`megatron.attach` on Megatron's own optimizers in real processes; with Transformer Engine on GPUs at the end.

The law: whatever Megatron's step leaves in the model is `fq.fakequant` of the masters, and the masters are those of a
loop written by hand, which writes fake weights into the model itself and steps PyTorch's AdamW.
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, vjp

import fq_transforms as fqt
from fq_transforms.integrations import megatron
from tests.cases import assert_names, name_of
from tests.checkpoint.test_megatron import Layout, allow_writers, same, share, state_of
from tests.full import FULL
from tests.integrations.test_megatron import initialized
from tests.training.ways import halved

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, MICROBATCHES, LR = 10, 2, 1e-3
EXPERTS = ("*.mlp.experts.*",)
RULES = (*EXPERTS, "*.linear_qkv.weight", "*.linear_proj.weight")
FORMATS = [fqt.NVFP4, fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.MXFP4]
MADE = ("tensor", "zeros", "empty", "ones")


@contextmanager
def megatrons_optimizers_on_a_cpu():
    """They ask parameters whether they are 'torch.cuda.BFloat16Tensor', and make their scalars on 'cuda'."""
    own_type, own = torch.Tensor.type, {name: getattr(torch, name) for name in MADE}

    def type_of(self, *args, **kwargs):
        found = own_type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def made(name, *args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return own[name](*args, **kwargs)

    torch.Tensor.type = type_of
    for name in MADE:
        setattr(torch, name, partial(made, name))
    try:
        yield
    finally:
        torch.Tensor.type = own_type
        for name in MADE:
            setattr(torch, name, own[name])


def wrapped(layout, *, distributed=False, dtype=torch.bfloat16, change=lambda model: None):
    """Half precision, in Megatron's DistributedDataParallel, as its optimizers want it.

    eval: Megatron trains MoE under tensor parallelism with sequence parallelism only, whose norms need a GPU.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    model = initialized(layout, gated=True).to(dtype).eval()
    model.config.params_dtype = model.config.pipeline_dtype = dtype
    model.config.finalize_model_grads_func = finalize_model_grads
    change(model)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    return DistributedDataParallel(model.config, config, model)


def optimizer_of(ddp, **options):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = {"clip_grad": 0.0, "bf16": True, "params_dtype": torch.bfloat16} | options
    distributed = ddp.ddp_config.use_distributed_optimizer
    config = OptimizerConfig(optimizer="adam", lr=LR, use_distributed_optimizer=distributed, **options)
    return get_megatron_optimizer(config, [ddp])


def batches(step):
    """Microbatches of this data-parallel rank."""
    from megatron.core import parallel_state

    first = step * 31 + parallel_state.get_data_parallel_rank() * 17
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    for number in range(MICROBATCHES):
        ids = (torch.arange(16).view(2, 8) * 7 + first + number * 5) % 64
        yield ids, torch.arange(8).expand(2, -1), mask


def accumulate(ddp, step, scale=1.0):
    """The gradients of a step in `main_grad`, by Megatron's own schedule; losses on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data, model):
        ids, positions, mask = next(data)
        loss = lambda out: ((found := out.float().mean()) * scale, {"loss": found.detach()})  # noqa: E731
        return model(ids, positions, mask, labels=ids), loss

    ddp.zero_grad_buffer()
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(step),
        model=[ddp],
        num_microbatches=MICROBATCHES,
        seq_length=8,
        micro_batch_size=2,
        forward_only=False,
    )
    return [one["loss"] for one in found]


def values_of(ddp):
    return {name: param.detach().clone() for name, param in megatron.unwrap(ddp).named_parameters()}


def differing(found, wanted):
    """Names of the tensors that are not equal to the last bit."""
    assert found.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


def adamw(masters):
    """As Megatron sets PyTorch's; that biases do not decay is its scheduler's doing, of which there is none here."""
    return torch.optim.AdamW(masters.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def every_third(fq, model):
    """Recalibrate after each third step, over tensor-parallel ranks too."""

    def recalibrate(step, masters, state):
        return megatron.calibrate(fq, model, masters=masters) if step % 3 == 0 else None

    return recalibrate


# One process: against functional_call.


def _plain(fq, model, state):
    """The contract: functional_call on fakes of the masters detached as leaves, one pullback per step, AdamW."""
    masters = {name: param.detach().float() for name, param in model.named_parameters()}
    optimizer, losses = adamw(masters), []
    for step in range(STEPS):
        fakes, pull = vjp(lambda masters, state=state: fq.fakequant(masters, state), masters)
        leaves = {name: fake.to(torch.bfloat16).requires_grad_() for name, fake in fakes.items()}
        grads = {name: torch.zeros_like(master) for name, master in masters.items()}
        for ids, positions, mask in batches(step):
            loss = functional_call(model, leaves, (ids, positions, mask), {"labels": ids}).float().mean()
            losses.append(loss.detach())
            (loss / MICROBATCHES).backward()
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    grads[name] += leaf.grad
                leaf.grad = None
        (grads,) = pull(grads)
        for name, master in masters.items():
            master.grad = grads[name]
        optimizer.step()
        if (step + 1) % 3 == 0:
            state = fq.calibrate(masters)
    return losses, masters, state


def _equals_functional_call(rank, size, format, backward):
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(Layout())
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, format)), backward=backward)
        state = megatron.calibrate(fq, ddp)
        if backward == "clip":
            state = halved(state)
        wanted_losses, wanted, last_state = _plain(fq, wrapped(Layout()).module, state)
        optimizer = optimizer_of(ddp)
        attached = megatron.attach(fq, optimizer, ddp, state, recalibrate=every_third(fq, ddp))
        losses = []
        for step in range(STEPS):
            losses += accumulate(ddp, step)
            assert optimizer.step()[0]
        assert losses == wanted_losses
        assert attached.step == STEPS
        assert same(attached.quantizer_state, last_state)
        assert not differing(attached.masters, wanted)
        fakes = fq.fakequant(wanted, last_state)
        assert not differing(values_of(ddp), {name: fake.bfloat16() for name, fake in fakes.items()})
        attached.detach()
        assert not differing(values_of(ddp), {name: master.bfloat16() for name, master in wanted.items()})
        return losses


@pytest.mark.dist
@pytest.mark.parametrize(
    ("format", "backward"),
    [*((format, "pass_through") for format in FORMATS), (fqt.FP8, "clip"), (fqt.INT4_BLOCK32, "clip")],
    ids=name_of,
)
def test_one_process_equals_functional_call(ranks, format, backward):
    """Losses, masters, state and weights of 10 steps of two microbatches, bit for bit; recalibrated each third step."""
    (losses,) = ranks(_equals_functional_call, format, backward, size=1)
    assert losses[-1] < losses[0]


# All parallelisms: against a loop that writes weights by hand.


def _by_hand(fq, ddp, state, *, distributed):
    """Own masters, own writes, PyTorch's AdamW; of Megatron the model, its schedule and its sums of gradients.

    Sums of two ranks' gradients are the same whether reduced whole, as here, or scattered.
    """
    params = dict(ddp.module.named_parameters())
    masters = {name: param.detach().float() for name, param in params.items()}
    optimizer = adamw(masters)
    losses = []
    for step in range(STEPS + 1):
        values = {name: m.bfloat16() for name, m in masters.items()} if distributed else masters
        if step and step % 3 == 0:
            state = state_of(values, fq.spec)
        with torch.no_grad():
            for name, fake in fq.fakequant(values, state).items():
                params[name].copy_(fake)
        if step < STEPS:
            losses += accumulate(ddp, step)
            for name, param in params.items():
                masters[name].grad = param.main_grad.clone()
            optimizer.step()
    return losses, masters, state


def _equals_by_hand(rank, size, layout, formats, distributed):
    share(layout)
    with megatrons_optimizers_on_a_cpu():
        other = wrapped(layout)
        fq = fqt.transform(megatron.select(other, dict(zip(SPLIT, formats, strict=True))))
        state = megatron.calibrate(fq, other)
        wanted_losses, wanted, last_state = _by_hand(fq, other, state, distributed=distributed)
        ddp = wrapped(layout, distributed=distributed)
        optimizer = optimizer_of(ddp)
        attached = megatron.attach(fq, optimizer, ddp, state, recalibrate=every_third(fq, ddp))
        losses = []
        for step in range(STEPS):
            losses += accumulate(ddp, step)
            assert optimizer.step()[0]
        assert losses == wanted_losses
        assert same(attached.quantizer_state, last_state)
        weights = values_of(ddp)
        assert not differing(weights, values_of(other))
        attached.cast()
        masters = values_of(ddp)
        assert not differing(masters, {name: master.bfloat16() for name, master in wanted.items()})
        if not distributed:
            assert not differing(attached.masters, wanted)
        selected = [name for group in fq.spec.groups for name in group.names]
        assert differing(weights, masters) == [name for name in weights if name in selected]
        attached.write()
        assert not differing(values_of(ddp), weights)
        kinds = [type(part).__name__ for part in optimizer.chained_optimizers]
        return kinds, place(), weights


def place():
    """Which model-parallel part a rank has of dense layers, and which of experts."""
    from megatron.core import parallel_state as parallel

    stage = parallel.get_pipeline_model_parallel_rank()
    dense = stage, parallel.get_tensor_model_parallel_rank()
    return dense, (stage, parallel.get_expert_model_parallel_rank(), parallel.get_expert_tensor_parallel_rank())


# Tensor parallelism cuts the rows of the first two, and the columns of the others.
SPLIT = ("*.linear_fc1.*", "*.linear_qkv.weight", "*.linear_fc2.*", "*.linear_proj.weight")
MIXED = [fqt.NVFP4, fqt.INT8_PER_CHANNEL, fqt.INT8_PER_CHANNEL, fqt.NVFP4]
PARALLEL = [
    (Layout(), 2, False),
    (Layout(tp=2, etp=2), 2, False),
    (Layout(ep=2), 2, False),
    (Layout(pp=2), 2, False),
    (Layout(ep=2, tp=2, etp=1), 4, False),
    (Layout(), 2, True),
    (Layout(ep=2), 2, True),
    (Layout(ep=2, tp=2, etp=1), 4, True),
]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("formats", [MIXED, MIXED[::-1]] if FULL else [MIXED], ids=len)
@pytest.mark.parametrize(("layout", "size", "distributed"), PARALLEL)
def test_every_parallelism_equals_the_loop_by_hand(ranks, layout, size, distributed, formats):
    """Losses, state, masters and weights of all steps, bit for bit; replicas are equal.

    DistributedOptimizer's masters are compared by their bf16 values, of which its law is.
    """
    found = ranks(_equals_by_hand, layout, formats, distributed, size=size)
    kind = "DistributedOptimizer" if distributed else "Float16OptimizerWithFloat16Params"
    assert found[0][0] == [kind] * (2 if layout.ep > 1 else 1)
    parts = {}
    for _, (dense, of_experts), weights in found:
        for name, weight in weights.items():
            part = of_experts if ".experts." in name else dense
            assert torch.equal(parts.setdefault((part, name), weight), weight), name


# Stochastic rounding.


def _rounds(rank, size, layout, distributed):
    from megatron.core import parallel_state

    share(layout)
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(layout, distributed=distributed)
        optimizer = optimizer_of(ddp)
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.NVFP4)))
        nearest = fq.fakequant(values_of(ddp), state := megatron.calibrate(fq, ddp))
        attached = megatron.attach(fq, optimizer, ddp, state, seed=7)
        first = values_of(ddp)
        assert differing(first, nearest)
        attached.write()
        assert not differing(values_of(ddp), first)  # no new draw without a step
        accumulate(ddp, 0)
        optimizer.step()
        second = values_of(ddp)
        attached.cast()
        masters = values_of(ddp) if distributed else attached.masters
        rounding = fqt.Stochastic((7 << 32) + 1, 4 // layout.ep * parallel_state.get_expert_model_parallel_rank())
        wanted = {name: fake.bfloat16() for name, fake in fq.fakequant(masters, state, rounding=rounding).items()}
        assert not differing(second, wanted)
        attached.step = 0
        attached.write()
        assert differing(values_of(ddp), first)  # other masters, the bits of before
    groups = [[(group.format.name, first[name]) for name in group.names] for group in fq.spec.groups]
    return place()[1], groups


@pytest.mark.dist
def test_stochastic_rounding_is_one_for_all_parallelisms(ranks):
    """Seed, step and the number of the expert decide: at EP=2 experts round as in one process, replicas alike."""
    ((_, whole),) = ranks(_rounds, Layout(), False, size=1)
    for layout, distributed in ((Layout(), False), (Layout(ep=2), False), (Layout(ep=2), True)):
        for (_, ep, _), groups in ranks(_rounds, layout, distributed, size=2):
            for experts, wanted in zip(groups, whole, strict=True):
                mine = wanted[ep * len(experts) :][: len(experts)]
                assert all(torch.equal(a, b) for (_, a), (_, b) in zip(experts, mine, strict=True))


# Checkpoints.


def entries_of(ddp, optimizer, fq, state, distributed, **options):
    """What Megatron's own training saves: the model, the optimizer, and the state beside them."""
    from fq_transforms.checkpoint import megatron as leaves

    model_sd = ddp.module.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"} if distributed else {}
    optimizer_sd = optimizer.sharded_state_dict(model_sd, metadata=metadata, **options)
    return {"model": model_sd, "optimizer": optimizer_sd, "fq": leaves.sharded_state_dict(fq, state, model_sd)}


def make_state(optimizer):
    """DistributedOptimizer of 0.16.1 asks PyTorch's AdamW for the number of its last step before there is one."""
    for part in optimizer.chained_optimizers:
        for param in part.get_parameters():
            param.grad = torch.zeros_like(param)
        part.optimizer.step()


def set_steps(optimizer, number):
    """And loads this number for PyTorch's AdamW wrong, in one tensor that all parameters count up."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(float(number))


def _resumes(rank, size, folder, layout, distributed, first):
    from megatron.core import dist_checkpointing

    from fq_transforms.checkpoint import megatron as leaves

    share(layout)
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(layout, distributed=distributed)
        optimizer = optimizer_of(ddp, clip_grad=1.0)
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(RULES, fqt.NVFP4)))
        options = {"recalibrate": every_third(fq, ddp), "seed": 3}
        attached = megatron.attach(fq, optimizer, ddp, megatron.calibrate(fq, ddp), **options)
        for step in range(4):
            accumulate(ddp, step)
            optimizer.step()
        allow_writers()
        dist_checkpointing.save(entries_of(ddp, optimizer, fq, attached.quantizer_state, distributed), folder)
        saved = values_of(ddp)
        losses = []
        for step in range(4, 8):
            losses += accumulate(ddp, step)
            optimizer.step()
        wanted = values_of(ddp)

        ddp = wrapped(layout, distributed=distributed)
        with torch.no_grad():
            for param in ddp.parameters():
                param.mul_(0.5)
        optimizer = optimizer_of(ddp, clip_grad=1.0)
        options["recalibrate"] = every_third(fq, ddp)
        if first == "attach":
            attached = megatron.attach(fq, optimizer, ddp, megatron.calibrate(fq, ddp), **options)
        if distributed:
            make_state(optimizer)
        empty = fq.init(dict(ddp.module.named_parameters()))
        loaded = dist_checkpointing.load(entries_of(ddp, optimizer, fq, empty, distributed, is_loading=True), folder)
        ddp.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        if distributed:
            set_steps(optimizer, 4)
        state = leaves.load_state(fq, loaded["fq"], empty)
        if first == "attach":
            attached.quantizer_state = state
        else:
            attached = megatron.attach(fq, optimizer, ddp, state, **options)
        attached.step = 4
        attached.write()
        assert not differing(values_of(ddp), saved)
        again = []
        for step in range(4, 8):
            again += accumulate(ddp, step)
            optimizer.step()
        assert again == losses
        assert not differing(values_of(ddp), wanted)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "distributed", "first"),
    [
        (Layout(ep=2), False, "attach"),
        (Layout(tp=2, etp=2), False, "load"),
        (Layout(ep=2), True, "attach"),
        (Layout(ep=2), True, "load"),
    ],
)
def test_resumes_bitwise(ranks, tmp_path, layout, distributed, first):
    """Megatron's own checkpoint of model and optimizer, with the state and the step: the same losses and weights."""
    (tmp_path / "checkpoint").mkdir()
    ranks(_resumes, str(tmp_path / "checkpoint"), layout, distributed, first, size=2)


# What a step meets besides.


def _skips(rank, size):
    """fp16: a step whose gradients are infinite writes nothing, counts nothing, and calibrates nothing."""
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(Layout(), dtype=torch.float16)
        optimizer = optimizer_of(
            ddp, bf16=False, fp16=True, params_dtype=torch.float16, initial_loss_scale=8.0, hysteresis=1
        )
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.FP8)), backward="clip")
        called = []
        attached = megatron.attach(
            fq,
            optimizer,
            ddp,
            megatron.calibrate(fq, ddp),
            recalibrate=lambda step, masters, state: called.append(step),
        )
        before = values_of(ddp)
        accumulate(ddp, 0, scale=float("inf"))
        assert not optimizer.step()[0]
        assert (attached.step, called) == (0, [])
        assert not differing(values_of(ddp), before)
        accumulate(ddp, 0, scale=float(optimizer.get_loss_scale()))
        assert optimizer.step()[0]
        assert (attached.step, called) == (1, [1])
        fakes = fq.fakequant(attached.masters, attached.quantizer_state)
        assert not differing(values_of(ddp), {name: fake.half() for name, fake in fakes.items()})
        assert differing(values_of(ddp), before)


@pytest.mark.dist
def test_infinite_gradients_write_nothing(ranks):
    ranks(_skips, size=1)


def _clips_before_the_norm(rank, size):
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        norms = {}
        for backward in ("pass_through", "clip"):
            ddp = wrapped(Layout())
            fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.FP8)), backward=backward)
            (optimizer,) = optimizer_of(ddp, clip_grad=1.0).chained_optimizers  # attached by itself
            state = halved(megatron.calibrate(fq, ddp))
            attached = megatron.attach(fq, optimizer, ddp, state)
            accumulate(ddp, 0)
            grads = {name: param.main_grad.clone() for name, param in ddp.module.named_parameters()}
            pulled, _ = fq.pullback(attached.masters, state, grads)
            wanted = torch.stack([grad.norm() for grad in pulled.values()]).norm().item()
            _, found, _ = optimizer.step()
            assert found == pytest.approx(wanted, rel=1e-5)
            for name, master in attached.masters.items():
                torch.testing.assert_close(master.grad, pulled[name] / (wanted + 1e-6), rtol=1e-5, atol=0)
            norms[backward] = found
        assert norms["clip"] < norms["pass_through"]


@pytest.mark.dist
def test_clip_masks_gradients_before_their_norm_is_taken(ranks):
    """Against the mask and the norm by hand; the norm of Megatron's own gradient clipping has no masked ones in it."""
    ranks(_clips_before_the_norm, size=1)


def _mixes(rank, size, distributed):
    """Experts 0 and 1 of each layer frozen, a router in fp32: the frozen ones are quantized from their own values."""
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(Layout(), distributed=distributed, change=_freeze_half)
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.NVFP4)))
        own, (optimizer,) = values_of(ddp), optimizer_of(ddp).chained_optimizers  # attached by itself
        attached = megatron.attach(fq, optimizer, ddp, megatron.calibrate(fq, ddp), recalibrate=every_third(fq, ddp))
        for step in range(4):
            accumulate(ddp, step)
            optimizer.step()
        found = values_of(ddp)
        attached.cast()
        masters = values_of(ddp) if distributed else dict(attached.masters)
        frozen = [name for name, param in ddp.module.named_parameters() if not param.requires_grad]
        assert len(frozen) == 8
        assert not differing({n: masters[n] for n in frozen}, {n: own[n] for n in frozen})
        routers = [name for name in own if name.endswith("router.weight")]
        assert all(found[name].dtype == torch.float32 for name in routers)
        assert differing(found, own) == list(own)  # everything else has been trained
        fakes = fq.fakequant(masters, attached.quantizer_state)
        assert not differing(found, {name: fake.to(found[name].dtype) for name, fake in fakes.items()})
        attached.detach()
        assert not differing({n: values_of(ddp)[n] for n in frozen}, {n: own[n] for n in frozen})


def _freeze_half(model):
    for name, param in model.named_parameters():
        if name.endswith("router.weight"):
            param.data = param.data.float()
        elif ".local_experts.0." in name or ".local_experts.1." in name:
            param.requires_grad_(False)


@pytest.mark.dist
@pytest.mark.parametrize("distributed", [False, True])
def test_frozen_experts_and_fp32_parameters(ranks, distributed):
    ranks(_mixes, distributed, size=2)


def _detaches(rank, size, distributed):
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(Layout(), distributed=distributed)
        fq = fqt.transform(megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.NVFP4)))
        own, optimizer = values_of(ddp), optimizer_of(ddp)
        parts = [optimizer, *optimizer.chained_optimizers]
        attributes = [dict(vars(part)) for part in parts]
        state = megatron.calibrate(fq, ddp)
        attached = megatron.attach(fq, optimizer, ddp, state)
        fakes = values_of(ddp)
        assert differing(fakes, own)
        said = {}
        for name, call in {
            "twice": lambda: megatron.attach(fq, optimizer, ddp, state),
            "reload": optimizer.reload_model_params,
            "reload a part": optimizer.chained_optimizers[0].reload_model_params,
        }.items():
            with pytest.raises(ValueError) as error:
                call()
            said[name] = str(error.value)
        assert not differing(values_of(ddp), fakes)
        if distributed:  # what is given in a state dict is no fake weight
            doubled = {name: 2 * tensor.float() for name, tensor in own.items()}
            optimizer.reload_model_params(state_dict=doubled)
            attached.write()
            doubled = {name: tensor.bfloat16() for name, tensor in doubled.items()}
            assert not differing(values_of(ddp), fq.fakequant(doubled, state))
            optimizer.reload_model_params(state_dict=own)
        attached.detach()
        assert repr(attached).endswith("detached)")
        assert not differing(values_of(ddp), own)
        assert [dict(vars(part)) for part in parts] == attributes
        for call in (attached.write, attached.detach):
            with pytest.raises(ValueError, match="found that it is detached"):
                call()
        optimizer.reload_model_params()
        accumulate(ddp, 0)
        optimizer.step()
        trained = values_of(ddp)
        again = megatron.attach(fq, optimizer, ddp, state)
        again.cast()
        assert not differing(values_of(ddp), trained)
        return said


@pytest.mark.dist
@pytest.mark.parametrize("distributed", [False, True])
def test_detach_gives_megatrons_own_step_back(ranks, distributed):
    """Attributes and weights as before; until then masters cannot be made of fake weights."""
    said = ranks(_detaches, distributed, size=2)[0]
    assert_names(said["twice"], "attached already", "detach()")
    for name in ("reload", "reload a part"):
        assert_names(said[name], "reload_model_params", "fake weights", "detach()", "attach")


def in_fp32(ddp, optimizer):
    return optimizer_of(wrapped(Layout(), dtype=torch.float32), bf16=False, params_dtype=torch.float32)


def of_another_model(ddp, optimizer):
    return optimizer_of(wrapped(Layout(), distributed=ddp.ddp_config.use_distributed_optimizer))


def of_another_class(ddp, optimizer):
    from megatron.core.optimizer import ChainedOptimizer

    class Chain(ChainedOptimizer):
        pass

    return Chain(optimizer.chained_optimizers)


def with_a_tensor_class(ddp, optimizer):
    class Held(torch.nn.Parameter):
        pass

    norm = ddp.module.decoder.final_layernorm
    norm.weight = Held(norm.weight.detach())


def without_masters(ddp, optimizer):
    for part in optimizer.chained_optimizers:
        part.float16_groups, part.fp32_from_float16_groups = [], []


def configured(name, ddp, optimizer):
    for part in optimizer.chained_optimizers:
        setattr(part.config, name, True)


def wrapped_with(name, ddp, optimizer):
    setattr(ddp.ddp_config, name, True)


def with_inputs(spec):
    rules = [fqt.Rule(rule, fqt.FP8, inputs=fqt.FP8) for rule in EXPERTS]
    return fqt.transform(megatron.select(wrapped(Layout()), rules))


OFF = [
    "overlap_param_gather",
    "overlap_param_gather_with_optimizer_step",
    "use_precision_aware_optimizer_no_fp8_or_ds_fp8",
    "optimizer_cpu_offload",
    "reuse_grad_buf_for_mxfp8_param_ag",
]
# What is changed, whether the optimizer is distributed, other options of `attach`, and what the error names.
FAULTS = [
    (in_fp32, False, {}, ["FP32Optimizer", "bf16=True"]),
    (of_another_class, False, {}, ["found Chain", "Float16OptimizerWithFloat16Params"]),
    *((of_another_model, distributed, {}, ["not the model's", "chunk"]) for distributed in (False, True)),
    (with_a_tensor_class, False, {}, ["decoder.final_layernorm.weight", "found Held"]),
    (without_masters, False, {}, ["linear_fc1.weight", "bfloat16", "without a main parameter"]),
    *((partial(configured, name), True, {}, [f"found {name},", "wanted it off"]) for name in OFF),
    *((partial(wrapped_with, name), True, {}, [f"found {name},"]) for name in (OFF[0], "use_megatron_fsdp")),
    (None, False, {"fq": partial(fqt.transform, backward="lsq")}, ["found 'lsq'", "'pass_through' or 'clip'"]),
    (None, True, {"fq": partial(fqt.transform, backward="clip")}, ["found 'clip'", "use_distributed_optimizer=False"]),
    (None, False, {"fq": partial(fqt.transform, out_dtype=torch.float32)}, ["found torch.bfloat16", "float32"]),
    (None, False, {"fq": with_inputs}, ["megatron.attach", "wanted weights only"]),
    (None, False, {"state": {}}, ["linear_fc1"]),
    (None, False, {"seed": 2**31}, ["found 2147483648", "32 bits"]),
]


def _faults(rank, size, number):
    change, distributed, options, _ = FAULTS[number]
    share(Layout())
    with megatrons_optimizers_on_a_cpu():
        ddp = wrapped(Layout(), distributed=distributed)
        optimizer = optimizer_of(ddp)
        spec = megatron.select(ddp, dict.fromkeys(EXPERTS, fqt.FP8))
        options = {"fq": fqt.transform, "state": megatron.calibrate(fqt.transform(spec), ddp)} | options
        options["fq"] = options["fq"](spec)
        optimizer = (change and change(ddp, optimizer)) or optimizer
        before, parts = values_of(ddp), [optimizer, *optimizer.chained_optimizers]
        attributes = [dict(vars(part)) for part in parts]
        with pytest.raises((KeyError, ValueError)) as error:
            megatron.attach(optimizer=optimizer, model=ddp, **options)
        assert not differing(values_of(ddp), before)
        assert [dict(vars(part)) for part in parts] == attributes
        return str(error.value)


@pytest.mark.dist
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults(ranks, number):
    """Each is named, and leaves model and optimizer as they were."""
    (said,) = ranks(_faults, number, size=1)
    assert_names(said, *FAULTS[number][3])


# Two GPUs: against one.


def trained(folder, ranks, *options, distributed):
    """What each rank of attach_on_gpus.py has saved."""
    script = Path(__file__).with_name("attach_on_gpus.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", script]
    command = [*launcher, "--folder", folder, *options, *(["--distributed"] if distributed else [])]
    root, paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *([paths] if paths else [])])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{ranks}-{distributed}-{rank}.pt") for rank in range(ranks)]


def joined(parts, layout):
    """The whole model's tensors, of those of two ranks.

    Rows of a gated fc1 lie as tensor parallelism cuts them, [gate, up, gate, up]: each row is quantized by itself.
    """
    first, second = parts
    assert first.keys() == second.keys()
    whole = {}
    for name, tensor in first.items():
        other, is_expert = second[name], ".experts." in name
        if layout.ep == 2 and is_expert:
            stem, number = re.fullmatch(r"(.*\.weight)(\d+)", name).groups()
            experts = sum(each.startswith(stem) for each in first)
            whole[name], whole[f"{stem}{int(number) + experts}"] = tensor, other
        elif layout.tp == 2:
            whole[name] = torch.cat([tensor, other], 0 if "linear_fc1" in name else 1)
        else:
            assert torch.equal(tensor, other), name
            whole[name] = tensor
    return whole


@pytest.mark.gpu2
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(Layout(tp=2, etp=2), False), (Layout(ep=2), False), (Layout(ep=2), True), (Layout(), False), (Layout(), True)],
)
def test_two_gpus_have_the_fake_weights_of_one(tmp_path, layout, distributed):
    """What two ranks have in their models is what one GPU makes of the whole masters, bit for bit, after 8 steps.

    With two data-parallel ranks the masters are those of one GPU that trains on both ranks' microbatches, too: halves
    of gradients are exact, and two are added alike. Tensor and expert parallelism sum in another order.
    """
    from tests.integrations.attach_on_gpus import RULES

    count = "1" if layout.tp == 2 else "2"
    (alone,) = trained(tmp_path, 1, "--microbatches", count, distributed=distributed)
    options = ("--microbatches", count, "--tp", str(layout.tp), "--ep", str(layout.ep))
    ranks = trained(tmp_path, 2, *options, distributed=distributed)
    masters = {name: tensor.cuda() for name, tensor in joined([one["masters"] for one in ranks], layout).items()}
    weights = joined([one["weights"] for one in ranks], layout)
    assert weights.keys() == alone["weights"].keys()
    fq = fqt.transform(fqt.select(masters, RULES))
    fakes = fq.fakequant(masters, fq.calibrate(masters))
    assert not differing(weights, {name: fake.bfloat16().cpu() for name, fake in fakes.items()})
    assert differing(weights, {name: master.bfloat16().cpu() for name, master in masters.items()}) == list(weights)
    losses = torch.tensor([one["losses"] for one in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), rtol=0.05, atol=0)
    if layout == Layout():
        assert not differing(weights, alone["weights"])
        assert not differing(ranks[0]["masters"], alone["masters"])
