"""Fused gradient accumulation: what Transformer Engine and Megatron's DDP do to `main_grad`, in a few lines of PyTorch.

`Fused` does as Transformer Engine's GroupedLinear: it adds to `main_grad` in backward, by the weight objects that it
saw in forward, and gives a gradient of NaN, which nobody may use. tests/integrations/test_te.py has the real one, on a GPU.
"""

import weakref

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from tests.cases import assert_names

EXPERTS, OUT, IN = 3, 32, 64


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.refs = [weakref.ref(weight) for weight in weights]
        ctx.main_grads = lambda: [weight.main_grad for weight in weights]
        return torch.cat([part @ w.mT for part, w in zip(x.chunk(len(weights)), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        grads = grad.chunk(len(weights))
        back = []
        main_grads = ctx.main_grads()
        for part, g, ref, main_grad in zip(x.chunk(len(weights)), grads, ctx.refs, main_grads, strict=True):
            weight = ref()
            assert weight is not None, "weight was removed"
            main_grad.add_(g.mT @ part)
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                back.append(torch.full(main_grad.shape, torch.nan, dtype=weight.dtype))
            else:
                back.append(None)
        return torch.cat([g @ w for g, w in zip(grads, weights, strict=True)]), *back


class Grouped(torch.nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        for i in range(EXPERTS):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.randn(OUT, IN)))

    def forward(self, x):
        weights = [getattr(self, f"weight{i}") for i in range(EXPERTS)]
        if self.fused:
            return _Fused.apply(x, *weights)
        return torch.cat([part @ w.mT for part, w in zip(x.chunk(EXPERTS), weights, strict=True)])


class Model(torch.nn.Module):
    def __init__(self, fused, checkpointed=False):
        super().__init__()
        self.dense, self.experts, self.checkpointed = torch.nn.Linear(IN, IN), Grouped(fused), checkpointed

    def forward(self, x):
        x = torch.tanh(self.dense(x))
        return checkpoint(self.experts, x, use_reentrant=False) if self.checkpointed else self.experts(x)


def ddp(model, flags=True):
    """Megatron's DistributedDataParallel on one rank: `main_grad` in fp32, and a hook on what accumulates gradients."""
    kept = []
    for param in model.parameters():
        param.main_grad = torch.zeros(param.shape)
        if flags:
            param.grad_added_to_main_grad = False
        accumulator = param.expand_as(param).grad_fn.next_functions[0][0]

        def hook(*_, param=param):
            if param.grad is not None and not getattr(param, "grad_added_to_main_grad", False):
                param.main_grad.add_(param.grad)
            param.grad = None

        accumulator.register_hook(hook)
        kept.append(accumulator)
    return kept


def setup(fused, dtype=torch.float32, flags=True, **options):
    torch.manual_seed(0)
    model = Model(fused, **options).to(dtype)
    kept = ddp(model, flags)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"experts.*": fqt.NVFP4}))
    xs = [torch.randn(EXPERTS * 8, IN, dtype=dtype) for _ in range(3)]
    return model, params, fq, fq.calibrate(params), xs, kept


def run_whole(model, params, fq, state, xs):
    for x in xs:
        weights = fq.fakequant(params, state)
        fqt.carry_main_grad(params, weights)
        functional_call(model, weights, (x,)).square().sum().backward()


def run_once(model, params, fq, state, xs):
    """One fakequant for all microbatches: under pass-through its graph is good for any number of backward passes."""
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(params, weights)
    for x in xs:
        functional_call(model, weights, (x,)).square().sum().backward()


def run_layerwise(model, params, fq, state, xs, **options):
    for x in xs:
        with fqt.layerwise(model, state, spec=fq.spec, **options):
            model(x).square().sum().backward()


def run_layerwise_kept(*args):
    run_layerwise(*args, recompute=False)


def run_lent(*args):
    """The layer's own parameters hold the fake numbers, where it is one node."""
    run_layerwise(*args, lends=lambda module: module.fused)


def run_value_and_grad(model, params, fq, state, xs):
    step = fqt.value_and_grad(lambda model, x: model(x).square().sum(), model, fq)
    _, grads = step(params, state, xs)
    assert all(grads[name] is param.main_grad for name, param in params.items())


WAYS = [run_whole, run_once, run_layerwise, run_layerwise_kept, run_lent, run_value_and_grad]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_unfused(way, flags, dtype):
    """The same `main_grad` of every parameter, whether the layer adds to it or autograd's hook does."""
    model, params, *rest, _kept = setup(True, dtype, flags)
    way(model, params, *rest)
    found = {name: param.main_grad for name, param in params.items()}
    reference, params, *rest, _kept = setup(False, dtype, flags)
    run_whole(reference, params, *rest)
    for name, param in params.items():
        assert param.main_grad.any()
        assert torch.equal(found[name], param.main_grad), name
    # Without fake quantization the gradient is another one.
    plain, params, _, _, xs, _kept = setup(False, dtype, flags)
    for x in xs:
        plain(x).square().sum().backward()
    assert not torch.allclose(found["experts.weight0"], params["experts.weight0"].main_grad, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("way", [run_layerwise, run_lent, run_value_and_grad])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointed_activations(way, fused):
    model, params, *rest, _kept = setup(fused, checkpointed=True)
    way(model, params, *rest)
    reference, wanted, *rest, _kept = setup(False)
    run_whole(reference, wanted, *rest)
    assert all(torch.equal(params[name].main_grad, wanted[name].main_grad) for name in wanted)


def test_memory_is_let_go_where_the_layer_keeps_the_weights():
    """A fused layer keeps its weight objects until backward; the fake ones' memory goes all the same."""
    model, _, fq, state, xs, _kept = setup(True)
    seen = []
    model.experts.register_forward_hook(lambda module, *_: seen.append(module.weight0))
    # Registered before `layerwise` registers its own, so that it sees the fake weight.
    with fqt.layerwise(model, state, spec=fq.spec):
        loss = model(xs[0]).square().sum()
        assert type(seen[0]) is torch.Tensor
        assert seen[0].untyped_storage().nbytes() == 0
        loss.backward()


def test_what_is_carried():
    model, params, fq, state, *_ = setup(True)
    params["experts.weight1"].zero_out_wgrad = True
    del params["experts.weight2"].main_grad
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(params, weights)
    assert weights["experts.weight0"].main_grad is params["experts.weight0"].main_grad
    assert not hasattr(weights["experts.weight0"], "zero_out_wgrad")
    assert weights["experts.weight1"].zero_out_wgrad
    assert not hasattr(weights["experts.weight2"], "main_grad")
    assert weights["dense.weight"] is params["dense.weight"]

    for call in (
        lambda: fqt.carry_main_grad(params, weights, backward="clip"),
        lambda: fqt.value_and_grad(lambda m, x: m(x).sum(), model, fqt.transform(fq.spec, backward="clip"))(
            params, state, [torch.ones(EXPERTS, IN)]
        ),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert_names(str(error.value), "experts.weight0", "clip", "pass_through")
    with (
        pytest.raises(ValueError, match="pass_through"),
        fqt.layerwise(model, state, spec=fq.spec, backward="clip"),
    ):
        model(torch.ones(EXPERTS, IN))
    params["experts.weight0"].__fsdp_param__ = True
    with pytest.raises(ValueError, match="FSDP"):
        fqt.carry_main_grad(params, weights)


def test_no_cycle():
    """The hook that reports back does not keep the fake weight alive."""
    _, params, fq, state, *_ = setup(True)
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(params, weights)
    fake = weakref.ref(weights["experts.weight0"])
    del weights
    assert fake() is None
