"""Fused gradient accumulation: what Transformer Engine and Megatron's DDP do to `main_grad`, over microbatches.

test_all_ways.py has one microbatch in every format.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from tests.cases import assert_names
from tests.training import ways
from tests.training.ways import EXPERTS, HIDDEN, GroupedMLP, OneNodeMLP

NAME = "mlp.0.linear_fc1.weight0"


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
    model, fq, state, _ = ways.setup(OneNodeMLP if fused else GroupedMLP, dtype=dtype, **options)
    xs = [torch.randn(EXPERTS * 8, HIDDEN, dtype=dtype) for _ in range(3)]
    return model, dict(model.named_parameters()), fq, state, xs, ddp(model, flags)


def run_whole(model, params, fq, state, xs):
    for x in xs:
        weights = fq.fakequant(params, state)
        fqt.carry_main_grad(fq, params, weights)
        functional_call(model, weights, (x,)).backward()


def run_once(model, params, fq, state, xs):
    """One fakequant for all microbatches: under pass-through its graph is good for any number of backward passes."""
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(fq, params, weights)
    for x in xs:
        functional_call(model, weights, (x,)).backward()


def run_layerwise(model, params, fq, state, xs, **options):
    for x in xs:
        with fqt.layerwise(fq, model, state, **options):
            model(x).backward()


def run_layerwise_kept(*args):
    run_layerwise(*args, recompute=False)


def run_value_and_grad(model, params, fq, state, xs):
    step = fqt.value_and_grad(lambda model, x: model(x), fq, model)
    _, grads = step(params, state, xs)
    assert all(grads[name] is param.main_grad for name, param in params.items())


WAYS = [run_whole, run_once, run_layerwise, run_layerwise_kept, run_value_and_grad]


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
        plain(x).backward()
    own = params[NAME].main_grad
    assert (found[NAME] - own).norm() > 1e-2 * own.norm()


@pytest.mark.parametrize("way", [run_layerwise, run_value_and_grad])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointed_activations(way, fused):
    model, params, *rest, _kept = setup(fused, checkpointed=False)
    way(model, params, *rest)
    reference, wanted, *rest, _kept = setup(False)
    run_whole(reference, wanted, *rest)
    assert all(torch.equal(params[name].main_grad, wanted[name].main_grad) for name in wanted)


def test_memory_is_let_go_where_the_layer_keeps_the_weights():
    """A fused layer keeps its weight objects until backward; the fake ones' memory goes all the same."""
    model, _, fq, state, xs, _kept = setup(True)
    seen = []
    model.mlp[0].linear_fc1.register_forward_hook(lambda module, *_: seen.append(module.weight0))
    # Registered before `layerwise` registers its own, so that it sees the fake weight.
    with fqt.layerwise(fq, model, state):
        loss = model(xs[0])
        assert type(seen[0]) is torch.Tensor
        assert seen[0].untyped_storage().nbytes() == 0
        loss.backward()


def test_what_is_carried():
    _, params, fq, state, *_ = setup(True)
    other, none = NAME.replace("weight0", "weight1"), NAME.replace("fc1", "fc2")
    params[other].zero_out_wgrad = True
    del params[none].main_grad
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(fq, params, weights)
    assert weights[NAME].main_grad is params[NAME].main_grad
    assert not hasattr(weights[NAME], "zero_out_wgrad")
    assert weights[other].zero_out_wgrad
    assert not hasattr(weights[none], "main_grad")
    assert weights["dense.0.weight"] is params["dense.0.weight"]
    params[NAME].__fsdp_param__ = True
    with pytest.raises(ValueError, match="FSDP"):
        fqt.carry_main_grad(fq, params, weights)


@pytest.mark.parametrize("backward", ["clip", "lsq"])
def test_another_rule_than_pass_through_is_refused_for_what_it_is_the_rule_of(backward):
    """The error names the parameter, the rule and the way out; leaves of weights that are not quantized may carry."""
    _, params, fq, state, *_ = setup(True)
    other = replace(fq, backward=backward)
    weights = other.fakequant(params, state)
    with pytest.raises(ValueError) as error:
        fqt.carry_main_grad(other, params, weights)
    assert_names(str(error.value), NAME, f"backward={backward!r}", "pass_through", "fusion")
    leaves = {"dense.0.weight": params["dense.0.weight"].detach().requires_grad_()}
    fqt.carry_main_grad(other, params, leaves)
    assert leaves["dense.0.weight"].main_grad is params["dense.0.weight"].main_grad


def test_value_and_grad_clips_beside_parameters_that_have_main_grad():
    """Experts without it, dense layers with it: the gradients of `functional_call`, each in its place."""
    model, fq, state, x = ways.setup(format=fqt.INT8, backward="clip")
    wanted = ways.functional(model, fq, state, x)
    for param in model.dense.parameters():
        param.main_grad = torch.zeros(param.shape)
    found = ways.stepped(model, fq, state, x)
    ways.assert_equal(found, wanted)
    assert all(found[1][f"dense.{name}"] is param.main_grad for name, param in model.dense.named_parameters())


def test_no_cycle():
    """The hook that reports back does not keep the fake weight alive."""
    _, params, fq, state, *_ = setup(True)
    weights = fq.fakequant(params, state)
    fqt.carry_main_grad(fq, params, weights)
    fake = weakref.ref(weights[NAME])
    del weights
    assert fake() is None
