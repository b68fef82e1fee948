"""`integrations.megatron` on Megatron's own models in real processes; with Transformer Engine in test_te.py."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.integrations import megatron
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile
from tests.cases import assert_names
from tests.checkpoint.test_megatron import LAYERS, Layout, allow_writers, build, same, share, state_of

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
        fq = fqt.transform(megatron.select(model, dict.fromkeys(RULES, format)))
        assert len(fq.spec.groups) == 4 * LAYERS
        params = dict(model.named_parameters())
        assert same(megatron.calibrate(fq, model), state_of(params, fq.spec)), format.name


@pytest.mark.dist
@pytest.mark.parametrize("layout", [Layout(ep=2, etp=2, tp=2), Layout(ep=2, etp=1, tp=2), Layout(ep=4)])
def test_calibrate_reduces_what_tensor_parallelism_splits(ranks, layout):
    """As calibrated and reduced by hand, leaf by leaf; over the experts' group and over the dense layers'."""
    ranks(_calibrates_as_by_hand, layout)


# Format, rules and a method: tensor parallelism splits fc1 and qkv along `out`, fc2 and proj along `in`.
FIRST = tuple(rule.replace("*.", "*.layers.0.*", 1) for rule in RULES)
CHOICES = [
    (fqt.NVFP4_STATIC, FIRST, Mse()),
    (fqt.NVFP4_STATIC, FIRST, FourOverSix()),
    (fqt.INT4_BLOCK32, FIRST, Mse()),
    (fqt.INT4_BLOCK32, FIRST, Percentile(90)),
    (fqt.INT8_PER_CHANNEL, ("*.layers.0.*.linear_fc1.weight", "*.layers.1.*.linear_qkv.weight"), Mse()),
]


def importance(key, columns):
    """Statistics of a group's whole input, different for each."""
    return torch.rand(columns, generator=torch.Generator().manual_seed(len(key) + int(key.split(".")[2]))) + 0.1


def _chooses(rank, size, layout):
    """For each choice, the leaves of this rank's state by name; with where the rank is, and what is refused."""
    from megatron.core import parallel_state

    share(layout)
    model = build(layout, gated=False)
    place = (
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    found = []
    for format, rules, method in CHOICES:
        fq = fqt.transform(megatron.select(model, dict.fromkeys(rules, format)), method=method)
        for is_weighted in (False, True)[: 1 + isinstance(method, Mse)]:
            statistics = {}
            for group in fq.spec.groups:
                rank_of, ranks = (place[1], layout.etp) if "experts" in group.key else (place[2], layout.tp)
                is_cut = "linear_fc2" in group.key or "linear_proj" in group.key
                whole = importance(group.key, group.shape[1] * (ranks if is_cut else 1))
                statistics[group.key] = whole.chunk(ranks)[rank_of] if is_cut else whole
            given = statistics if is_weighted else None
            found.append(fqt.state.flatten(megatron.calibrate(fq, model, statistics=given)))
    refused = {}
    for format, method in ((fqt.FP8, Mse()), (fqt.INT8_PER_CHANNEL, Percentile(90)), (fqt.NVFP4, Mse())):
        try:
            spec = megatron.select(model, dict.fromkeys(RULES, format))
            megatron.calibrate(fqt.transform(spec, method=method), model)
        except ValueError as error:
            refused[format.name] = str(error)
    return place, found, refused


@pytest.mark.dist
def test_a_method_chooses_as_in_one_process(ranks):
    """Law: at EP=2, TP=2 each rank has its part of the state of the whole model; a split granule is refused by all."""
    ((_, whole, refused),) = ranks(_chooses, Layout(), size=1)
    assert list(refused) == ["NVFP4"]
    found = ranks(_chooses, Layout(ep=2, etp=2, tp=2))
    for (ep, etp, tp), states, _ in found:
        for wanted, state in zip(whole, states, strict=True):
            assert state.keys() == wanted.keys()
            for name, leaf in state.items():
                is_expert = "experts" in name
                part = wanted[name].chunk(2)[ep] if is_expert else wanted[name]
                axis = 1 if "linear_fc1" in name or "linear_qkv" in name else 2
                if not name.endswith("global_amax"):
                    part = part.chunk(2, axis)[etp if is_expert else tp]
                assert torch.equal(leaf, part), name
    assert all(refusals == found[0][2] for *_, refusals in found)
    for name in ("FP8", "INT8_PER_CHANNEL"):
        assert_names(found[0][2][name], "linear_proj.weight' split along 'in' by tensor parallelism", name, "use Max")


def _errs_in_statistics_on_rank_1(rank, size, fault):
    layout = Layout(etp=2, tp=2)
    share(layout)
    model = build(layout, gated=False)
    spec = megatron.select(model, dict.fromkeys(FIRST, fqt.NVFP4_STATIC))
    statistics = {group.key: torch.ones(group.shape[1]) for group in spec.groups}
    method = Mse()
    if rank and fault == "missing":
        statistics.popitem()
    elif rank and fault == "unknown":
        statistics["none"] = torch.ones(1)
    elif rank:
        method = Max()
    try:
        state = megatron.calibrate(fqt.transform(spec, method=method), model, statistics=statistics)
    except (KeyError, ValueError) as error:
        return str(error)
    return len(state)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "words"),
    [("missing", "1 of 4 missing"), ("unknown", "found unexpected groups ['none']"), ("max", "found some for Max")],
)
def test_statistics_that_are_wrong_on_one_rank_leave_the_other_its_state(ranks, fault, words):
    """They are checked after the collectives, which the other rank waits in."""
    found, message = ranks(_errs_in_statistics_on_rank_1, fault, size=2)
    assert found > 0
    assert_names(message, "statistics: ", words)


def _observes(rank, size, layout):
    share(layout)
    model = initialized(layout, gated=True).eval()
    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": fqt.NVFP4_STATIC}), method=Mse())
    params, batches = dict(model.named_parameters()), [tokens(), tokens(1)]
    means = fq.input_second_moments(params, batches, model=model, unseen="ones")
    seen = {}
    for name in (name for group in fq.spec.groups for name in group.names):
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for group in fq.spec.groups:
        for name, found in zip(group.names, means[group.key], strict=True):
            assert found.shape == (128 // layout.etp if "linear_fc2" in name else 128,)
            x = torch.cat(seen.get(name, [torch.ones(0, len(found))]))
            wanted = x.square().mean(0).float() if len(x) else torch.ones_like(found)
            torch.testing.assert_close(found, wanted, rtol=2**-23, atol=0)
    megatron.calibrate(fq, model, statistics=means)
    return sum(len(torch.cat(x)) for x in seen.values())


@pytest.mark.dist
def test_second_moments_are_of_the_ranks_part(ranks):
    """By hooks: of its experts, and for fc2 of its input channels; and as such `calibrate` takes them."""
    assert sum(ranks(_observes, Layout(ep=2, etp=2, tp=2))) > 0


def _rounds(rank, size):
    """At random: what `fq.fakequant` gives, with `main_grad` carried; another seed is another rounding."""
    share(Layout())
    ddp = wrapped(build(Layout(), gated=True))
    fq = fqt.transform(megatron.select(ddp, {"*.mlp.experts.*": fqt.NVFP4}))
    state, params = megatron.calibrate(fq, ddp), dict(ddp.module.named_parameters())
    at_random = [megatron.fakequant(fq, ddp, state, rounding=fqt.Stochastic(seed)) for seed in (1, 2)]
    wanted = fq.fakequant(params, state, rounding=fqt.Stochastic(1))
    for group in fq.spec.groups:
        for name in group.names:
            assert torch.equal(at_random[0][name], wanted[name])
            assert not torch.equal(at_random[0][name], at_random[1][name])
            assert at_random[0][name].main_grad is params[name].main_grad


@pytest.mark.dist
def test_fakequant_rounds_at_random(ranks):
    ranks(_rounds, size=1)


def _trains(rank, size, folder, layout):
    """Two microbatches, whole and by layer: equal `main_grad`; then save, load, the same logits."""
    share(layout)
    found = {}
    for way in ("whole", "layerwise", "kept"):
        # eval: Megatron trains MoE under tensor parallelism with sequence parallelism only, whose norms need a GPU.
        ddp = wrapped(initialized(layout, gated=True).eval())
        fq = fqt.transform(megatron.select(ddp, {"*.mlp.experts.*": fqt.NVFP4}))
        state = megatron.calibrate(fq, ddp)
        ddp.zero_grad_buffer()
        ids, positions, mask = tokens()
        losses = []
        for _ in range(2):
            if way == "whole":
                weights = megatron.fakequant(fq, ddp, state)
                loss = functional_call(ddp.module, weights, (ids, positions, mask), {"labels": ids}).mean()
                loss.backward()
            else:
                with megatron.layerwise(fq, ddp, state, recompute=way == "layerwise"):
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
        logits = functional_call(ddp.module, megatron.fakequant(fq, ddp, state), (ids, positions, mask))
    allow_writers()
    megatron.save(f"{folder}/model", fq, ddp, state)
    with torch.device("meta"):
        fresh = build(layout, gated=True).eval()
    assert all(param.is_meta for param in fresh.parameters())
    marked = {name: vars(param).copy() for name, param in fresh.named_parameters()}
    restored = megatron.load(f"{folder}/model", fq, fresh)
    assert same(restored, state)
    assert all(vars(param) == marked[name] and not param.is_meta for name, param in fresh.named_parameters())
    with torch.no_grad():
        again = functional_call(fresh, megatron.fakequant(fq, fresh, restored), (ids, positions, mask))
    assert torch.equal(again, logits)
    return logits


def _loads_elsewhere(rank, size, folder, layout):
    share(layout)
    model = build(layout, gated=True).eval()
    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": fqt.NVFP4}))
    state = megatron.load(f"{folder}/model", fq, model)
    assert same(state, megatron.calibrate(fq, model))
    with torch.no_grad():
        return functional_call(model, megatron.fakequant(fq, model, state), tokens())


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
    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": fqt.FP8}))
    state = megatron.calibrate(fq, model)
    gathering = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    gathering.ddp_config.overlap_param_gather = True
    for name, call in {
        "fakequant": lambda: megatron.fakequant(fq, gathering, state),
        "layerwise": lambda: megatron.layerwise(fq, gathering, state),
        "no rule": lambda: megatron.select(model, {"*.no_such.*": fqt.FP8}),
        "no checkpoint": lambda: megatron.load(f"{folder}/nothing", fq, model),
    }.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    # A checkpoint of another format changes nothing of the model that was to be loaded.
    allow_writers()
    megatron.save(f"{folder}/fp8", fq, model, state)
    other = build(Layout(), gated=True)
    with torch.no_grad():
        for param in other.parameters():
            param.fill_(7.0)
    try:
        int8 = fqt.transform(megatron.select(other, {"*.mlp.experts.*": fqt.INT8}))
        megatron.load(f"{folder}/fp8", int8, other)
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
    model.experts.linear_fc1 = torch.nn.Module()
    model.experts.linear_fc1.weight0 = torch.nn.Parameter(torch.randn(32, 32))
    fq = fqt.transform(megatron.select(model, {"*": fqt.FP8}))
    state = fq.calibrate(dict(model.named_parameters()))
    megatron.fakequant(fq, model, state)
    model.experts._with_fused_impl = True
    for call in (megatron.fakequant, megatron.layerwise):
        with pytest.raises(ValueError) as error:
            call(fq, model, state)
        assert_names(str(error.value), "experts.linear_fc1.weight", "op_fuser")


def test_unwrap():
    """The innermost model, however many wrappers there are."""
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Module()
    outer.module = torch.nn.Module()
    outer.module.module = inner
    assert megatron.unwrap(outer) is inner
    assert megatron.unwrap(inner) is inner
