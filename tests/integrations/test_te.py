"""Transformer Engine's own modules, and Megatron's models of them, on a GPU: what tests/training/ways.py mimics.

Needs transformer-engine; the last tests megatron-core, and ModelOpt. Skipped, and counted, without.
"""

import copy
import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import assert_names, name_of
from tests.training.ways import halved

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

EXPERTS, IN, OUT, TOKENS = 4, 256, 512, 96
FORMATS = [getattr(fqt, name) for name in fqt.__all__ if isinstance(getattr(fqt, name), fqt.Format)]


@pytest.fixture(scope="module")
def te():
    return pytest.importorskip("transformer_engine.pytorch")


class MLP(torch.nn.Module):
    def __init__(self, te, **options):
        super().__init__()
        options |= {"bias": False, "device": "cuda"}
        self.linear_fc1 = te.GroupedLinear(EXPERTS, IN, OUT, **options)
        self.linear_fc2 = te.GroupedLinear(EXPERTS, OUT, IN, **options)

    def forward(self, x, splits):
        return self.linear_fc2(torch.relu(self.linear_fc1(x, splits)), splits)


def setup(te, format=fqt.NVFP4, fused=False, flags=True, dtype=torch.bfloat16, **options):
    """The module, its transform with these options, a state, which clips under "clip", inputs and their gradients."""
    torch.manual_seed(1)
    model = MLP(te, fuse_wgrad_accumulation=fused, params_dtype=dtype)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for number, param in enumerate(params.values()):
            param.mul_(2.0 ** (number % EXPERTS))  # each expert an amax of its own
    if fused:
        for param in params.values():
            param.main_grad = torch.zeros(param.shape, dtype=torch.float32, device="cuda")
            if flags:
                param.grad_added_to_main_grad = False
    fq = fqt.transform(fqt.select(params, {"*": format}), **options)
    state = fq.calibrate(params)
    if fq.backward == "clip":
        state = halved(state)
    xs = [torch.randn(EXPERTS * TOKENS, IN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    gs = [torch.randn(EXPERTS * TOKENS, IN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return model, params, fq, state, xs, gs


SPLITS = [TOKENS + 16, TOKENS - 16, 2 * TOKENS, 0]


def copied(model, params, fq, state):
    """The same module with the fake-quantized numbers as its own weights: what everything must equal."""
    other = copy.deepcopy(model)
    fakes = fq.fakequant(params, state)
    with torch.no_grad():
        for name, param in other.named_parameters():
            param.copy_(fakes[name])
            if hasattr(params[name], "main_grad"):
                param.main_grad = torch.zeros_like(params[name].main_grad)
                param.grad_added_to_main_grad = False
    return other


def run(call, xs, gs):
    """Outputs and gradients of inputs over the microbatches."""
    found = []
    for microbatch, g in zip(xs, gs, strict=True):
        x = microbatch.detach().requires_grad_()
        out = call(x)
        out.backward(g)
        found += [out.detach(), x.grad]
    return found


def whole(model, params, fq, state, xs, gs):
    def call(x):
        weights = fq.fakequant(params, state)
        fqt.carry_main_grad(fq, params, weights)
        return functional_call(model, weights, (x, SPLITS))

    return run(call, xs, gs)


def once(model, params, fq, state, xs, gs):
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(fq, params, weights)
    return run(lambda x: functional_call(model, weights, (x, SPLITS)), xs, gs)


def layerwise(model, params, fq, state, xs, gs):
    from fq_transforms.integrations import te

    with te.layerwise(fq, model, state):
        return run(lambda x: model(x, SPLITS), xs, gs)


def kept(model, params, fq, state, xs, gs):
    from fq_transforms.integrations import te

    with te.layerwise(fq, model, state, recompute=False):
        return run(lambda x: model(x, SPLITS), xs, gs)


WAYS = [whole, once, layerwise, kept]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_outputs_and_gradients(te, format, way):
    """Output, input gradient and weight gradients equal those of a module that has the fake weights, bit for bit."""
    model, params, fq, state, xs, gs = setup(te, format)
    other = copied(model, params, fq, state)
    wanted = run(lambda x: other(x, SPLITS), xs, gs)
    found = way(model, params, fq, state, xs, gs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for name, param in other.named_parameters():
        assert torch.equal(params[name].grad, param.grad), name
    plain = run(lambda x: model(x, SPLITS), xs, gs)
    assert not torch.equal(plain[0], wanted[0])


@pytest.mark.parametrize("way", [layerwise, kept])
@pytest.mark.parametrize("backward", ["pass_through", "clip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("format", [fqt.FP8, fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.MXFP4], ids=name_of)
def test_rules_and_master_weights(te, format, dtype, backward, way):
    """bf16 weights, and fp32 ones that are computed with in bf16: as `functional_call`, whose "clip" zeroes gradients.

    test_all_ways.py has the same law of layers in plain PyTorch. Only bf16 weights under "pass_through" are lent to.
    """
    model, params, fq, state, xs, gs = setup(te, format, dtype=dtype, backward=backward, out_dtype=torch.bfloat16)

    def grads_by(way, fq):
        outputs = way(model, params, fq, state, xs, gs)
        grads = {name: param.grad for name, param in params.items()}
        model.zero_grad()
        return outputs, grads

    outputs, wanted = grads_by(whole, fq)
    found, grads = grads_by(way, fq)
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    for name, grad in wanted.items():
        assert grads[name].dtype == dtype
        assert torch.equal(grads[name], grad), name
    if backward == "clip":
        _, passed = grads_by(whole, replace(fq, backward="pass_through"))
        assert any(((wanted[name] == 0) & (passed[name] != 0)).any() for name in params) == format.clips


@pytest.mark.parametrize("way", WAYS)
def test_fused_accumulation_is_refused_under_clip(te, way):
    """What Transformer Engine adds to `main_grad` has not been clipped."""
    arguments = setup(te, fqt.FP8, fused=True, backward="clip")
    with pytest.raises(ValueError, match=r"linear_fc1.weight0.*found main_grad and backward='clip'"):
        way(*arguments)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backward", ["pass_through", "clip"])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_lens(te, format, backward, fused):
    """Masters, a write, the module as it is, gradients taken: as a module that has the fake weights, bit for bit.

    Nothing is hooked and nothing refused, with `main_grad` neither: the mask of "clip" comes after all microbatches.
    """
    model, params, fq, state, xs, gs = setup(te, format, fused, backward=backward)
    other = copied(model, params, fq, state)
    masters = fqt.masters(params)
    written = fq.fakequant(masters, state, out=params)
    assert all(written[name] is param for name, param in params.items())
    for name, param in other.named_parameters():
        assert torch.equal(params[name], param), name
    wanted = run(lambda x: other(x, SPLITS), xs, gs)
    found = run(lambda x: model(x, SPLITS), xs, gs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    fq.take_grads(params, masters, state)
    grads = {name: param.main_grad if fused else param.grad for name, param in other.named_parameters()}
    pulled, _ = fq.pullback(masters, state, grads)
    for name, master in masters.items():
        assert master.grad.dtype == torch.float32
        assert torch.equal(master.grad, pulled[name]), name
        assert params[name].grad is None
        assert not fused or not params[name].main_grad.any()
    assert any(grad.any() for grad in pulled.values())
    if backward == "clip":
        assert any(((pulled[name] == 0) & (grads[name] != 0)).any() for name in masters) == format.clips


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_lens_under_transformer_engines_autocast(te, recipe, fused):
    """Its own FP8 over fake weights: as over a module that has them, and the fake weights stay as they were written."""
    from transformer_engine.common import recipe as recipes

    model, params, fq, state, xs, gs = setup(te, fused=fused)
    other = copied(model, params, fq, state)
    masters = fqt.masters(params)
    fq.fakequant(masters, state, out=params)
    splits = [TOKENS] * EXPERTS
    plain = run(lambda x: model(x, splits), xs, gs)
    fq.take_grads(params, masters, state)
    outputs = []
    for module in (model, other):
        with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
            outputs.append(run(lambda x, module=module: module(x, splits), xs, gs))
    found, wanted = outputs
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], plain[0])
    for name, param in other.named_parameters():
        assert torch.equal(params[name], param), name
    for master in masters.values():
        master.grad = None
    fq.take_grads(params, masters, state)
    for name, param in other.named_parameters():
        grad = param.main_grad if fused else param.grad
        assert torch.equal(masters[name].grad, grad.float()), name


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_fused_accumulation(te, way, flags):
    """`main_grad` is what Transformer Engine makes of a module that has the fake weights, over two microbatches."""
    model, params, fq, state, xs, gs = setup(te, fused=True, flags=flags)
    other = copied(model, params, fq, state)
    wanted = run(lambda x: other(x, SPLITS), xs, gs)
    found = way(model, params, fq, state, xs, gs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for name, param in other.named_parameters():
        assert torch.equal(params[name].main_grad, param.main_grad), name
        assert getattr(params[name], "grad_added_to_main_grad", True)


def test_fused_equals_unfused(te):
    """On numbers whose products are exact in bf16, where rounding cannot tell them apart."""
    grads = []
    for fused in (True, False):
        model, params, fq, state, _, _ = setup(te, fqt.FP8, fused)
        generator = torch.Generator("cuda").manual_seed(3)

        def whole_numbers(generator=generator):
            shape = EXPERTS * TOKENS, IN
            return torch.randint(0, 2, shape, generator=generator, device="cuda").to(torch.bfloat16)

        xs, gs = [whole_numbers()], [whole_numbers()]
        with torch.no_grad():  # weights of powers of two, so that FP8 keeps them: fc2 has one 1 a row
            for name, param in params.items():
                param.copy_(torch.eye(*param.shape, device="cuda") if "fc2" in name else param.sign())
        state = fq.calibrate(params)
        layerwise(model, params, fq, state, xs, gs)
        grads.append({n: p.main_grad if fused else p.grad.float() for n, p in params.items() if "fc2" in n})
    for name, grad in grads[0].items():
        exact = grad.abs() <= 256
        assert exact.any()
        assert torch.equal(grad[exact], grads[1][name][exact]), name


def test_value_and_grad(te):
    """Fused and not: the gradients of two microbatches through one fakequant."""
    for fused in (True, False):
        model, params, fq, state, xs, gs = setup(te, fused=fused)
        step = fqt.value_and_grad(lambda model, b: (model(b[0], SPLITS) * b[1]).sum(), fq, model)
        _, grads = step(params, state, zip(xs, gs, strict=True))
        reference, wanted, *rest = setup(te, fused=fused)
        whole(reference, wanted, *rest)
        for name, param in wanted.items():
            assert torch.equal(grads[name], param.main_grad if fused else param.grad), name


@pytest.mark.parametrize("fused", [False, True])
def test_memory(te, fused):
    """With recompute no more than one group's fake weights at the peak, above the module's own; nothing afterwards."""
    model, params, fq, state, xs, gs = setup(te, fused=fused)
    group = EXPERTS * IN * OUT * 2

    def peak(way):
        for param in params.values():
            param.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before

    def plain():
        run(lambda x: model(x, SPLITS), xs[:1], gs[:1])

    for way in (plain, lambda: layerwise(model, params, fq, state, xs[:1], gs[:1])):
        way()  # workspaces of cuBLAS are made once
    own = peak(plain)
    assert peak(lambda: layerwise(model, params, fq, state, xs[:1], gs[:1])) <= own + group + 2**16
    assert peak(lambda: whole(model, params, fq, state, xs[:1], gs[:1])) > own + group + 2**16


@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per expert"])
@pytest.mark.parametrize("format", [fqt.FP8, fqt.INT8, fqt.NVFP4], ids=name_of)
def test_inputs(te, format, per_expert):
    """The amax of each expert's own tokens, and the output of a module that is fed the quantized numbers."""
    model, params, _, _, xs, _ = setup(te, format)
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*", format, format, per_expert_inputs=per_expert)]))
    seen = fq.calibrate(params, [(x, SPLITS) for x in xs], model=model)
    fed = observed(model, xs)
    for name, batches in fed.items():
        found = seen[f"{name}.weight*.input"]
        amax = torch.stack([torch.cat(parts).abs().amax().float() for parts in list(zip(*batches, strict=True))[:3]])
        if per_expert:
            assert torch.equal(found["amax"][:3], amax)
        else:
            assert torch.equal(found["amax"], amax.max()[None])
        assert found["tokens"].tolist() == [2.0 * split for split in SPLITS]
    state = fq.fill_unseen(seen, unseen="max-of-peers") if per_expert else seen
    plain = fqt.transform(fqt.select(params, {"*": format}))
    other = copied(model, params, plain, plain.calibrate(params))

    def quantized(module, rows):
        name = next(name for name, each in other.named_modules() if each is module)
        amax = state[f"{name}.weight*.input"]["amax"]
        return [
            fake_quantize_reference(part, amax[e if per_expert else 0], None, format=format, out_dtype=part.dtype)
            if len(part)
            else part
            for e, part in enumerate(rows)
        ]

    with torch.no_grad():
        found = [fq.apply(model, params, state, x, SPLITS) for x in xs]
        handles = [
            each.register_forward_pre_hook(replacing(quantized)) for each in (other.linear_fc1, other.linear_fc2)
        ]
        wanted = [other(x, SPLITS) for x in xs]
    for handle in handles:
        handle.remove()
    assert all(map(torch.equal, found, wanted))
    assert not any(each._forward_pre_hooks for each in (model.linear_fc1, model.linear_fc2))


def replacing(change):
    """A hook that gives a GroupedLinear what `change` makes of each expert's rows."""
    return lambda module, args: (torch.cat(change(module, args[0].split(SPLITS))), *args[1:])


def observed(model, xs):
    """What each GroupedLinear is fed: by its name, of each batch, the rows of each expert."""
    fed = {name: [] for name in ("linear_fc1", "linear_fc2")}
    handles = [
        getattr(model, name).register_forward_pre_hook(
            lambda module, args, batches=batches: batches.append(args[0].detach().split(SPLITS))
        )
        for name, batches in fed.items()
    ]
    with torch.no_grad():
        for x in xs:
            model(x, SPLITS)
    for handle in handles:
        handle.remove()
    return fed


def test_autocast_is_refused(te):
    from transformer_engine.common.recipe import Float8CurrentScaling

    from fq_transforms.integrations import te as ours

    model, params, fq, state, xs, _ = setup(te)
    weights = fq.fakequant(params, state)
    for call in (
        lambda: ours.functional_call(model, weights, (xs[0], SPLITS)),
        lambda: layerwise(model, params, fq, state, xs, xs),
    ):
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()), pytest.raises(ValueError) as error:
            call()
        assert_names(str(error.value), "GroupedLinear", "Float8CurrentScaling")
    # Its own layers may use it, where nothing of theirs is replaced.
    with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
        ours.functional_call(model, params, (xs[0], [TOKENS] * EXPERTS))
    assert torch.equal(
        ours.functional_call(model, weights, (xs[0], SPLITS)), whole(model, params, fq, state, xs, xs)[0]
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_single_grouped_weight(te, monkeypatch):
    """One GroupedTensor for all experts is refused by name, until Transformer Engine can run it on this GPU."""
    monkeypatch.setenv("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "1")
    module = te.GroupedLinear(
        EXPERTS, IN, OUT, bias=False, params_dtype=torch.bfloat16, device="cuda", single_grouped_weight=True
    )
    params = dict(module.named_parameters())
    print({name: (type(p).__name__, tuple(p.shape)) for name, p in params.items()})
    try:
        module(
            torch.ones(EXPERTS * TOKENS, IN, device="cuda", dtype=torch.bfloat16),
            torch.tensor([TOKENS] * EXPERTS).cuda(),
        )
        print("single_grouped_weight runs here")
    except RuntimeError as error:
        print("single_grouped_weight does not run here:", error)
    with pytest.raises(ValueError) as error:
        fqt.transform(fqt.select(params, {"*": fqt.FP8})).calibrate(params)
    assert_names(str(error.value), "weight")


ATTRIBUTES = {
    "INT8": {"num_bits": 8, "axis": None},
    "INT8_PER_CHANNEL": {"num_bits": 8, "axis": 0},
    "FP8": {"num_bits": (4, 3), "axis": None},
    "NVFP4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_modelopt_on_the_same_modules(te, name):
    """ModelOpt's quantizers in Transformer Engine's module: fake weights, and gradients under pass-through, bit-equal.

    NVFP4's weights are not: test_modelopt_cuda.py names the causes. The gradient of pass-through is the gradient all
    the same where the weights are: so it is compared for the others.
    """
    mtq = pytest.importorskip("modelopt.torch.quantization")
    format = getattr(fqt, name)
    model, params, fq, state, xs, gs = setup(te, format)
    theirs = copy.deepcopy(model)
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer*", "cfg": ATTRIBUTES[name]},
    ]
    with warnings.catch_warnings(action="ignore"):
        mtq.quantize(theirs, {"quant_cfg": rules, "algorithm": "max"}, lambda m: m(xs[0], SPLITS))
    theirs.zero_grad()
    fakes = fq.fakequant(params, state)
    differing = total = 0
    for layer in ("linear_fc1", "linear_fc2"):
        module = getattr(theirs, layer)
        for expert in range(EXPERTS):
            own = fakes[f"{layer}.weight{expert}"]
            with torch.no_grad():
                other = module.weight_quantizer[expert](getattr(module, f"weight{expert}"))
            differing += int((own != other).sum())
            total += own.numel()
    print(f"{name}: {differing} of {total} fake weights differ from ModelOpt's on the same GroupedLinear")
    if name == "NVFP4":
        assert differing < total // 100
        return
    assert differing == 0
    wanted = run(lambda x: theirs(x, SPLITS), xs, gs)
    found = whole(model, params, fq, state, xs, gs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for layer in ("linear_fc1", "linear_fc2"):
        for expert in range(EXPERTS):
            theirs_grad = getattr(getattr(theirs, layer), f"weight{expert}").grad
            assert torch.equal(params[f"{layer}.weight{expert}"].grad, theirs_grad)


@pytest.fixture(scope="module")
def parallel(te, tmp_path_factory):
    """Megatron's process groups of one rank."""
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state, tensor_parallel

    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # losses are compared to the last bit
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gpt(meta=False, experts=4, fused=False, **options):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_router_topk=2,
        moe_ffn_hidden_size=256,
        moe_grouped_gemm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        init_model_with_meta_device=meta,
        **options,
    )
    with torch.device("meta" if meta else "cuda"):
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=True)
        model = GPTModel(config, spec, vocab_size=128, max_sequence_length=64)
    model = (model if meta else model.cuda()).bfloat16()
    for module in model.modules():  # not by the config, under which Megatron's own output layer would ask for APEX
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = fused
    return model


def batch(seed):
    ids = torch.randint(0, 128, (4, 33), generator=torch.Generator().manual_seed(seed)).cuda()
    ids = ids[:, :1] + 3 * torch.arange(33, device="cuda")  # something to learn
    ids = ids % 128
    positions = torch.arange(32, device="cuda").expand(4, -1)
    return ids[:, :-1].contiguous(), positions, None, ids[:, 1:].contiguous()


def loss_of(model, seed):
    ids, positions, mask, labels = batch(seed)
    return model(ids, positions, mask, labels=labels).float().mean()


def trainer(model, distributed, **options):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
    )
    ddp = DistributedDataParallel(model.config, config, model)
    options |= {"optimizer": "adam", "lr": 2e-3, "bf16": True, "params_dtype": torch.bfloat16}
    return ddp, get_megatron_optimizer(OptimizerConfig(use_distributed_optimizer=distributed, **options), [ddp])


STEPS = 24


@pytest.mark.parametrize("distributed", [False, True])
def test_megatron_trains(parallel, distributed):
    """24 steps of Megatron's DDP and optimizer, fused accumulation on: whole-model and by layer give the same losses.

    Recomputed or kept, at every microbatch or once a step: bit for bit. And the loss goes down.
    """
    from fq_transforms.integrations import megatron

    losses = {}
    for way in ("whole", "once", "layerwise", "kept"):
        torch.manual_seed(3)
        from megatron.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(7)
        ddp, optimizer = trainer(gpt(fused=True), distributed)
        assert all(module.fuse_wgrad_accumulation for module in ddp.modules() if hasattr(module, "num_gemms"))
        fq = fqt.transform(megatron.select(ddp, {"*.mlp.experts.*": fqt.NVFP4}))
        found = losses.setdefault(way, [])
        for step in range(STEPS):
            state = megatron.calibrate(fq, ddp)
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            inner = megatron.unwrap(ddp)
            weights = megatron.fakequant(fq, ddp, state) if way == "once" else None
            for microbatch in range(2):
                seed = 2 * step + microbatch
                if way in ("whole", "once"):
                    fakes = weights or megatron.fakequant(fq, ddp, state)
                    ids, positions, mask, labels = batch(seed)
                    loss = functional_call(inner, fakes, (ids, positions, mask), {"labels": labels}).float().mean() / 2
                    loss.backward()
                else:
                    with megatron.layerwise(fq, ddp, state, recompute=way == "layerwise"):
                        loss = loss_of(ddp, seed) / 2
                        loss.backward()
                found.append(loss.item())
            ddp.finish_grad_sync()
            assert optimizer.step()[0]
    for way, found in losses.items():
        assert found == losses["whole"], way
    assert sum(losses["whole"][-8:]) < 0.7 * sum(losses["whole"][:8])


def train_attached(ddp, optimizer, fq, state, steps):
    """Losses, and the fake weights after the last step."""
    from fq_transforms.integrations import megatron

    def recalibrate(step, masters, state):
        return megatron.calibrate(fq, ddp, masters=masters) if step % 3 == 0 else None

    attached = megatron.attach(fq, optimizer, ddp, state, recalibrate=recalibrate)
    losses = [train_step(ddp, optimizer, step) for step in range(steps)]
    weights = {name: param.detach().clone() for name, param in megatron.unwrap(ddp).named_parameters()}
    attached.detach()
    return losses, weights


def train_by_hand(ddp, optimizer, fq, state, steps, distributed):
    """The same of an optimizer left alone: after its cast, its masters' fake weights are copied into the model."""
    from fq_transforms.integrations import megatron

    params = dict(megatron.unwrap(ddp).named_parameters())

    def values():
        return params if distributed else {name: param.main_param for name, param in params.items()}

    def write():
        with torch.no_grad():
            for name, fake in fq.fakequant(values(), state).items():
                params[name].copy_(fake)

    write()
    losses = []
    for step in range(steps):
        losses.append(train_step(ddp, optimizer, step))
        if (step + 1) % 3 == 0:
            state = megatron.calibrate(fq, ddp, masters=values())
        write()
    return losses, {name: param.detach().clone() for name, param in params.items()}


def train_step(ddp, optimizer, step):
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    total = 0.0
    for microbatch in range(2):
        loss = loss_of(ddp, 2 * step + microbatch) / 2
        loss.backward()
        total += loss.item()
    ddp.finish_grad_sync()
    assert optimizer.step()[0]
    return total


@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.INT8_PER_CHANNEL], ids=name_of)
@pytest.mark.parametrize("distributed", [False, True])
def test_megatron_attached(parallel, distributed, format):
    """24 steps of Megatron's fused Adam, norm clipping and fused accumulation on: as fake weights copied by hand."""
    from megatron.core import tensor_parallel

    from fq_transforms.integrations import megatron

    found = []
    for way in (train_attached, lambda *args: train_by_hand(*args, distributed)):
        torch.manual_seed(3)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        ddp, optimizer = trainer(gpt(fused=True), distributed)
        fq = fqt.transform(megatron.select(ddp, {"*.mlp.experts.*": format}))
        losses, weights = way(ddp, optimizer, fq, megatron.calibrate(fq, ddp), STEPS)
        mains = {name: p.main_param.clone() for name, p in megatron.unwrap(ddp).named_parameters()}
        found.append((losses, weights, mains))
    (losses, weights, mains), (wanted_losses, wanted_weights, wanted_mains) = found
    assert losses == wanted_losses
    for name, weight in wanted_weights.items():
        assert torch.equal(weights[name], weight), name
        assert torch.equal(mains[name], wanted_mains[name]), name
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_megatron_refuses_masters_within_the_fused_optimizer(parallel):
    """By Megatron's own configuration; test_megatron_attach.py has the other refusals."""
    from fq_transforms.integrations import megatron

    ddp, optimizer = trainer(gpt(fused=True), True, use_precision_aware_optimizer=True)
    fq = fqt.transform(megatron.select(ddp, {"*.mlp.experts.*": fqt.NVFP4}))
    with pytest.raises(ValueError, match="use_precision_aware_optimizer"):
        megatron.attach(fq, optimizer, ddp, megatron.calibrate(fq, ddp))


@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32], ids=name_of)
def test_megatron_restores_on_meta(parallel, format, tmp_path):
    """Saved with Megatron's dist-checkpointing, restored into a model built on meta: equal state, equal logits."""
    from megatron.core import tensor_parallel

    from fq_transforms.integrations import megatron

    model = gpt()
    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": format}))
    state = megatron.calibrate(fq, model)
    ids, positions, mask, _ = batch(0)
    with torch.no_grad():
        logits = functional_call(model, megatron.fakequant(fq, model, state), (ids, positions, mask))
    megatron.save(tmp_path / "checkpoint", fq, model, state)

    tensor_parallel.model_parallel_cuda_manual_seed(11)
    fresh = gpt(meta=True)
    # Megatron gives its own embeddings memory at once; the experts are Transformer Engine's, and wait.
    assert all(param.is_meta for name, param in fresh.named_parameters() if ".experts." in name)
    again = fqt.transform(megatron.select(fresh, {"*.mlp.experts.*": format}))
    assert again == fq
    restored = megatron.load(tmp_path / "checkpoint", again, fresh)
    assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))
    for key, group in state.items():
        assert group.keys() == restored[key].keys()
        assert all(torch.equal(leaf, restored[key][name]) for name, leaf in group.items()), key
    with torch.no_grad():
        found = functional_call(fresh, megatron.fakequant(again, fresh, restored), (ids, positions, mask))
    assert torch.equal(found, logits)


def test_megatron_refuses_autocast(parallel):
    """config.fp8 makes Megatron enter Transformer Engine's autocast around its layers."""
    from fq_transforms.integrations import megatron

    model = gpt(fp8="e4m3", fp8_recipe="tensorwise")
    fq = fqt.transform(megatron.select(model, {"*.mlp.experts.*": fqt.NVFP4}))
    state = megatron.calibrate(fq, model)
    with pytest.raises(ValueError, match="autocast"), megatron.layerwise(fq, model, state):
        loss_of(model, 0)
