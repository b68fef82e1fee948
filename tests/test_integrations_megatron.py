"""`integrations.megatron` on Megatron's own models in real processes; with Transformer Engine in test_te.py."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.integrations import megatron
from tests.cases import assert_names
from tests.test_checkpoint_megatron import LAYERS, Layout, allow_writers, build, same, share, state_of

pytestmark = pytest.mark.filterwarnings("ignore")

RULES = ("*.mlp.experts.*", "*.linear_qkv.weight", "*.linear_proj.weight")


def wrapped(model):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    # Its buffers are made on the current device, which is the CPU here.
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)


def initialized(layout, **options):
    """A model that computes: the layers that `build` leaves empty are filled too."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()  # the random states are CUDA's; nothing draws any
    moe_utils.te_general_gemm = None  # 0.16.1 defines it only where Transformer Engine is installed
    model = build(layout, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "experts" in name or "linear_qkv" in name or "linear_proj" in name:
                param.mul_(0.02 / param.abs().mean())  # the quantized ones differ by powers of two
            elif param.dim() > 1:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
            else:
                param.fill_(1.0 if "bias" not in name else 0.0)
    return model


def tokens(batch=2, length=8):
    ids = torch.arange(batch * length).view(batch, length) * 7 % 64
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return ids, torch.arange(length).expand(batch, -1), mask


def _calibrates_as_by_hand(rank, size, layout):
    share(layout)
    model = build(layout, gated=True)
    for format in (fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.NVFP4, fqt.NVFP4_STATIC):
        spec = megatron.select(model, dict.fromkeys(RULES, format))
        assert len(spec.groups) == 4 * LAYERS
        params = dict(model.named_parameters())
        assert same(megatron.calibrate(model, spec), state_of(params, spec)), format.name


@pytest.mark.dist
@pytest.mark.parametrize("layout", [Layout(ep=2, etp=2, tp=2), Layout(ep=2, etp=1, tp=2), Layout(ep=4)])
def test_calibrate_reduces_what_tensor_parallelism_splits(ranks, layout):
    """As calibrated and reduced by hand, leaf by leaf; over the experts' group and over the dense layers'."""
    ranks(_calibrates_as_by_hand, layout)


def _trains(rank, size, folder, layout):
    """Two microbatches, whole and by layer: equal `main_grad`; then save, load, the same logits."""
    share(layout)
    found = {}
    for way in ("whole", "layerwise", "kept"):
        # eval: Megatron trains MoE under tensor parallelism with sequence parallelism only, whose norms need a GPU.
        ddp = wrapped(initialized(layout, gated=True).eval())
        spec = megatron.select(ddp, {"*.mlp.experts.*": fqt.NVFP4})
        state = megatron.calibrate(ddp, spec)
        ddp.zero_grad_buffer()
        ids, positions, mask = tokens()
        losses = []
        for _ in range(2):
            if way == "whole":
                weights = megatron.fakequant(ddp, state, spec=spec)
                loss = functional_call(ddp.module, weights, (ids, positions, mask), {"labels": ids}).mean()
                loss.backward()
            else:
                with megatron.layerwise(ddp, state, spec=spec, recompute=way == "layerwise"):
                    loss = ddp(ids, positions, mask, labels=ids).mean()
                    loss.backward()
            losses.append(loss.detach())
        ddp.finish_grad_sync()
        found[way] = losses, {name: param.main_grad.clone() for name, param in ddp.module.named_parameters()}
    for way in ("layerwise", "kept"):
        assert all(torch.equal(a, b) for a, b in zip(found[way][0], found["whole"][0], strict=True))
        assert all(torch.equal(found[way][1][name], grad) for name, grad in found["whole"][1].items())
    assert sum(bool(grad.any()) for name, grad in found["whole"][1].items() if ".experts." in name) > 0

    # Without fake quantization the loss is another.
    assert not torch.equal(ddp(ids, positions, mask, labels=ids).mean(), losses[0])

    with torch.no_grad():
        logits = functional_call(ddp.module, megatron.fakequant(ddp, state, spec=spec), (ids, positions, mask))
    allow_writers()
    megatron.save(f"{folder}/model", ddp, state, spec=spec)
    with torch.device("meta"):
        fresh = build(layout, gated=True).eval()
    assert all(param.is_meta for param in fresh.parameters())
    marked = {name: vars(param).copy() for name, param in fresh.named_parameters()}
    restored = megatron.load(f"{folder}/model", fresh, spec=spec)
    assert same(restored, state)
    assert all(vars(param) == marked[name] and not param.is_meta for name, param in fresh.named_parameters())
    with torch.no_grad():
        again = functional_call(fresh, megatron.fakequant(fresh, restored, spec=spec), (ids, positions, mask))
    assert torch.equal(again, logits)
    return logits


def _loads_elsewhere(rank, size, folder, layout):
    share(layout)
    model = build(layout, gated=True).eval()
    spec = megatron.select(model, {"*.mlp.experts.*": fqt.NVFP4})
    state = megatron.load(f"{folder}/model", model, spec=spec)
    assert same(state, megatron.calibrate(model, spec))
    with torch.no_grad():
        return functional_call(model, megatron.fakequant(model, state, spec=spec), tokens())


@pytest.mark.dist
@pytest.mark.slow
def test_train_save_and_load(ranks, tmp_path):
    """Whole-model and layerwise training agree bit for bit at EP=2, TP=2; what is saved loads at EP=4 and at EP=1."""
    saved = ranks(_trains, str(tmp_path), Layout(ep=2, etp=1, tp=2))
    at_ep4 = ranks(_loads_elsewhere, str(tmp_path), Layout(ep=4))
    (alone,) = ranks(_loads_elsewhere, str(tmp_path), Layout(), size=1)
    whole = torch.cat(saved[:2], dim=-1)  # tensor parallelism splits the vocabulary
    assert alone.std() > 0
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    for logits in at_ep4:
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def _faults(rank, size, folder):
    share(Layout())
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build(Layout(), gated=True)
    said = {}
    spec = megatron.select(model, {"*.mlp.experts.*": fqt.FP8})
    state = megatron.calibrate(model, spec)
    gathering = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    gathering.ddp_config.overlap_param_gather = True
    for name, call in {
        "fakequant": lambda: megatron.fakequant(gathering, state, spec=spec),
        "layerwise": lambda: megatron.layerwise(gathering, state, spec=spec),
        "no rule": lambda: megatron.select(model, {"*.no_such.*": fqt.FP8}),
        "no checkpoint": lambda: megatron.load(f"{folder}/nothing", model, spec=spec),
    }.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    # A checkpoint of another format changes nothing of the model that was to be loaded.
    allow_writers()
    megatron.save(f"{folder}/fp8", model, state, spec=spec)
    other = build(Layout(), gated=True)
    with torch.no_grad():
        for param in other.parameters():
            param.fill_(7.0)
    try:
        megatron.load(f"{folder}/fp8", other, spec=megatron.select(other, {"*.mlp.experts.*": fqt.INT8}))
    except ValueError as error:
        said["format"] = str(error)
    assert all(bool((param == 7.0).all()) for param in other.parameters())
    return said


@pytest.mark.dist
def test_faults(ranks, tmp_path):
    (said,) = ranks(_faults, str(tmp_path), size=1)
    for name, *fragments in [
        ("fakequant", "overlap_param_gather", "layerwise"),
        ("layerwise", "overlap_param_gather"),
        ("no rule", "no_such"),
        ("no checkpoint", tmp_path / "nothing"),
        ("format", "linear_fc1", "FP8", "INT8"),
    ]:
        assert_names(said[name], *fragments)


def test_transformer_engines_op_fuser_is_refused():
    """It computes with the parameters themselves, and calls hooks by hand."""
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.linear_fc1 = torch.nn.Linear(32, 32, bias=False)
    spec = megatron.select(model, {"*": fqt.FP8})
    state = fqt.calibrate(dict(model.named_parameters()), spec=spec)
    megatron.fakequant(model, state, spec=spec)
    model.experts._with_fused_impl = True
    for call in (megatron.fakequant, megatron.layerwise):
        with pytest.raises(ValueError) as error:
            call(model, state, spec=spec)
        assert_names(str(error.value), "experts.linear_fc1.weight", "op_fuser")


def test_unwrap():
    """The innermost model, however many wrappers there are."""
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Module()
    outer.module = torch.nn.Module()
    outer.module.module = inner
    assert megatron.unwrap(outer) is inner
    assert megatron.unwrap(inner) is inner
