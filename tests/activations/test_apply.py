"""`apply` and `calibrate` of inputs on whole models: equal to ModelOpt's, pure, differentiable, scoped to the call."""

import copy
import warnings
from dataclasses import replace

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from fq_transforms import presets
from tests import models
from tests.cases import assert_names, message_of
from tests.models import language_model, tokens

BATCHES = [tokens(2, 9, seed=seed) for seed in range(3)]
NAMES = ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"]


class UntiedListMoE(models.ListMoE):
    """A list of experts that ModelOpt does not know for one: its inputs are not synchronized over the experts."""

    def __init__(self):
        super().__init__()
        del self.gate.top_k
        self.top = models.TOP_K

    def forward(self, x):
        self.gate.__dict__["top_k"] = self.top
        try:
            return super().forward(x)
        finally:
            del self.gate.__dict__["top_k"]


@pytest.fixture(scope="module")
def modelopt():
    """ModelOpt's quantize, with its CUDA kernels' definitions of FP8 and NVFP4 in place of the CPU's.

    Named causes: on a CPU ModelOpt's FP8 multiplies by a reciprocal where its kernel divides (NUMERICS.md), and it has
    no NVFP4 that is dynamic; here it gets the codes and scales that its own `NVFP4QTensor` packs for deployment.
    """
    quantization = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def fp8(x, amax=None):
        safe = torch.where(amax.float() <= 2.0**-24, 1.0, amax.float())
        scale = torch.full_like(safe, 448.0) / safe
        codes = (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.float() * (1 / scale)).to(x.dtype)

    def nvfp4(x, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits):
        assert (block_size, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) == (16, 4, 2, 8, 4)
        double_scale = amax.float() / torch.full_like(amax.float(), 6 * 448)
        packed, scale, double_scale = NVFP4QTensor.quantize(x, 16, None, double_scale)
        return packed.dequantize(dtype=x.dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16})

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(tensor_quant, "_fp8_eager", fp8)
        patch.setattr(tensor_quant, "dynamic_block_quantize_op", nvfp4)
        yield quantization


def theirs(modelopt, model, preset):
    """The model as ModelOpt calibrates and fake-quantizes it."""
    model = copy.deepcopy(model)
    modelopt.quantize(model, copy.deepcopy(getattr(modelopt, preset)), run_all)
    return model


def run_all(model):
    for batch in BATCHES:
        model(batch)


def input_amax_of(model):
    """ModelOpt's, by the name of the module and the role."""
    return {
        name.replace("_input_quantizer._amax", "").replace(".input_quantizer._amax", ""): amax
        for name, amax in model.named_buffers()
        if name.endswith("input_quantizer._amax")
    }


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("moe", [models.ListMoE, UntiedListMoE])
def test_a_list_of_experts_equals_modelopt(modelopt, moe, preset):
    """Every input's amax and every logit, whether ModelOpt ties the experts' inputs or does not."""
    model, params = language_model(moe)
    peer = theirs(modelopt, model, preset)
    rules, untied = getattr(presets, preset), moe is UntiedListMoE
    rules = [replace(rule, per_expert_inputs=untied and rule.inputs is not None) for rule in rules]
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params, BATCHES, model=model)
    amaxes = input_amax_of(peer)
    assert bool(amaxes) == any("tokens" in entry for entry in state.values())
    for inputs in fq.spec.inputs if amaxes else ():
        entry = state[inputs.key]
        for number, name in enumerate(inputs.names):
            ours = entry["amax"][number if inputs.per_expert else 0]
            assert torch.equal(ours, amaxes[name.removesuffix(".weight")].reshape(())), name
    for batch in BATCHES:
        with torch.no_grad():
            assert torch.equal(fq.apply(model, params, state, batch), peer(batch))


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_equal_modelopt(modelopt, implementation, preset):
    """Mixtral of transformers 5: ModelOpt's eager experts exactly; other implementations observe the same amax."""
    from tests.peers.test_transformers import CASES, build

    model, params = build(CASES[0])
    model.eval()
    peer = copy.deepcopy(model)
    batches = [tokens(2, 9, seed=seed) for seed in range(3)]
    modelopt.quantize(
        peer, copy.deepcopy(getattr(modelopt, preset)), lambda m: [m(input_ids=batch) for batch in batches]
    )
    model.config._experts_implementation = implementation
    fq = fqt.transform(fqt.select(params, getattr(presets, preset)))
    state = fq.calibrate(params, [{"input_ids": batch} for batch in batches], model=model)
    exactly = implementation == "eager"
    amaxes = input_amax_of(peer)
    for inputs in fq.spec.inputs if amaxes else ():
        theirs_here = amaxes[inputs.key.removesuffix(".input").removesuffix(".weight")].reshape(1)
        torch.testing.assert_close(state[inputs.key]["amax"], theirs_here, rtol=0 if exactly else 1e-5, atol=0)
        if "experts" in inputs.key:
            assert state[inputs.key]["tokens"].sum() == sum(batch.numel() for batch in batches) * 2
    with torch.no_grad():
        logits = fq.apply(model, params, state, input_ids=batches[0]).logits
        assert torch.equal(logits, peer(input_ids=batches[0]).logits) or not exactly
        assert not torch.equal(logits, model(input_ids=batches[0]).logits)


RULES = {"*.experts.*": fqt.INT8, "*proj*": fqt.FP8}


def prepared(backward="pass_through", per_expert=False):
    model, params = language_model()
    rules = [fqt.Rule(pattern, f, f, per_expert_inputs=per_expert) for pattern, f in RULES.items()]
    fq = fqt.transform(fqt.select(params, rules), backward=backward)
    return model, params, fq, fq.calibrate(params, BATCHES, model=model)


def by_hand(model, params, fq, state, batch, backward="pass_through"):
    """The same numbers with every selected linear layer replaced, in a model made for it."""

    class Quantized(nn.Module):
        def __init__(self, entry, format, of, expert):
            super().__init__()
            self.entry, self.format, self.of, self.expert = entry, format, of, expert

        def forward(self, x):
            from fq_transforms.ops.quantize.autograd import fake_quantize

            amax = self.entry["amax"][self.expert : self.expert + 1]
            (x,) = fake_quantize([x.reshape(-1, x.shape[-1])], amax, None, format=self.format, backward=backward)
            return x

    class Linear(nn.Module):
        def __init__(self, linear, quantizer):
            super().__init__()
            self.weight, self.bias, self.quantizer = linear.weight, linear.bias, quantizer

        def forward(self, x):
            return nn.functional.linear(self.quantizer(x).view_as(x), self.weight, self.bias)

    model = copy.deepcopy(model)
    for inputs in fq.spec.inputs:
        for number, name in enumerate(inputs.names):
            path, _, leaf = name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(path)
            expert = number if inputs.per_expert else 0
            quantizer = Quantized(state[inputs.key], inputs.format, inputs, expert)
            setattr(parent, leaf, Linear(getattr(parent, leaf), quantizer))
    return functional_call(model, fq.fakequant(params, state), (batch,))


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
@pytest.mark.parametrize("per_expert", [False, True])
def test_gradients_equal_those_of_quantized_layers(backward, per_expert):
    """`.backward()` and torch.func.grad, weights and inputs, as of a model whose layers quantize their inputs."""
    model, params, fq, state = prepared(backward=backward, per_expert=per_expert)
    # Smaller scales, so that clipping shows.
    state = {k: v | {"amax": v["amax"] / 4} if "tokens" in v else v for k, v in state.items()}
    batch = BATCHES[0]

    def loss(p, run):
        return (run(p) ** 2).sum()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    loss(leaves, lambda p: by_hand(model, p, fq, state, batch, backward)).backward()
    wanted = {name: p.grad for name, p in leaves.items()}
    found = grad(lambda p: loss(p, lambda q: fq.apply(model, q, state, batch)))(
        {name: p.detach() for name, p in params.items()}
    )
    again = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    loss(again, lambda p: fq.apply(model, p, state, batch)).backward()
    for name in params:
        assert torch.equal(again[name].grad, wanted[name]), name
        # torch.func adds up what an embedding and a layer norm get in another order.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6 * wanted[name].abs().max().item())
    other = "clip" if backward == "pass_through" else "pass_through"
    fq2 = fqt.transform(fq.spec, backward=other)
    detached = {name: p.detach() for name, p in params.items()}
    differ = grad(lambda p: loss(p, lambda q: fq2.apply(model, q, state, batch)))(detached)
    assert not torch.equal(differ["embed.weight"], found["embed.weight"])


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_inputs_of_a_model_whose_weights_are_written(backward):
    """`quantized_inputs` around a model that holds fake weights: outputs and gradients of `apply` on its masters."""
    model, params, fq, state = prepared(backward=backward)
    state = {k: v | {"amax": v["amax"] / 4} if "tokens" in v else v for k, v in state.items()}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    wanted = fq.apply(model, leaves, state, BATCHES[0])
    (wanted**2).sum().backward()
    masters = fqt.masters(model)
    fq.fakequant(masters, state, out=model)
    with fq.quantized_inputs(model, state):
        found = model(BATCHES[0])
        (found**2).sum().backward()
    assert torch.equal(found, wanted)
    assert not torch.equal(found, model(BATCHES[0]))
    fq.take_grads(model, masters, state)
    for name, leaf in leaves.items():
        assert torch.equal(masters[name].grad, leaf.grad), name


def test_the_result_is_that_of_quantized_layers():
    """One number for all, and one an expert."""
    for per_expert in (False, True):
        model, params, fq, state = prepared(per_expert=per_expert)
        for batch in BATCHES:
            assert torch.equal(fq.apply(model, params, state, batch), by_hand(model, params, fq, state, batch))


def hooks_of(model):
    return [len(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]


def test_nothing_changes_and_nothing_stays():
    """Parameters, state, batches and the module are as before, by identity, version and bits; errors leave it too."""
    model, params, fq, state = prepared()
    before = {name: (p, p._version, p.clone()) for name, p in params.items()}
    leaves = optree.tree_map(torch.clone, state)
    plain = model(BATCHES[0])
    fq.apply(model, params, state, BATCHES[0])
    with pytest.raises(IndexError):
        fq.apply(model, params, state, torch.tensor([[models.VOCABULARY]]))
    with pytest.raises(TypeError):
        fq.apply(model, params, state)
    with pytest.raises(IndexError) as caught:
        fq.calibrate(params, [BATCHES[0], torch.tensor([[models.VOCABULARY]])], model=model)
    assert caught.value.__notes__ == ["calibrate: in batch 1"]
    with pytest.raises(TypeError) as caught:
        fq.calibrate(params, torch.cat([BATCHES[0]] * 2).split(1), model=model)
    assert "give many batches as a list" in caught.value.__notes__[0]
    for name, param in model.named_parameters():
        was, version, value = before[name]
        assert param is was and param._version == version and torch.equal(param, value)  # noqa: PT018
    assert optree.tree_all(optree.tree_map(torch.equal, state, leaves))
    assert not sum(hooks_of(model))
    assert torch.equal(model(BATCHES[0]), plain)
    assert not torch.overrides._get_current_function_mode_stack()


def test_calls_may_be_nested():
    """A teacher within the student's forward, of the same model and parameters, quantizes by its own state only."""
    model, params, fq, state = prepared()
    other = fqt.transform(fqt.select(params, [fqt.Rule("*proj*", inputs=fqt.INT8)]))
    teacher_state = other.calibrate(params, BATCHES[0], model=model)
    alone = fq.apply(model, params, state, BATCHES[0]), other.apply(model, params, teacher_state, BATCHES[1])
    found = []

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            found.append(other.apply(model, params, teacher_state, BATCHES[1]))
            return self.model(batch)

    both = Both()
    names = dict(both.named_parameters())
    outer = fqt.transform(fqt.select(names, [fqt.Rule(f"*{pattern}", f, f) for pattern, f in RULES.items()]))
    out = outer.apply(both, names, {f"model.{key}": entry for key, entry in state.items()}, BATCHES[0])
    assert torch.equal(out, alone[0])
    assert torch.equal(found[0], alone[1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_backward_are_refused(reentrant):
    """Activation checkpointing would compute them again, unquantized, and give gradients of another function."""
    model = Checkpointed(reentrant)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*", fqt.FP8, fqt.FP8)]))
    x = torch.ones(2, 4, requires_grad=True)
    state = fq.calibrate(params, x, model=model)
    message = message_of(ValueError, fq.apply, model, params, state, x)
    assert_names(message, "'layer.weight.input'", "activation checkpointing", "switch checkpointing off", "a rule")
    with torch.no_grad():
        fq.apply(model, params, state, x)


def test_without_inputs_it_is_functional_call():
    model, params = language_model()
    fq = fqt.transform(fqt.select(params, RULES))
    state = fq.calibrate(params)
    assert all(list(entry) == ["amax"] for entry in state.values())
    assert torch.equal(
        fq.apply(model, params, state, BATCHES[0]), functional_call(model, fq.fakequant(params, state), (BATCHES[0],))
    )


def test_mistakes_are_named():
    model, params, fq, state = prepared(per_expert=True)
    few = fq.calibrate(params, BATCHES[0][:1, :1], model=model)
    message = message_of(ValueError, fq.apply, model, params, few, BATCHES[0])
    assert_names(message, "layers.", "found no token for expert ", " of 4", "fq.fill_unseen(state, unseen=...)")
    missing = {key: entry for key, entry in state.items() if not key.endswith("layers.0.proj.weight.input")}
    assert_names(message_of(KeyError, fq.apply, model, params, missing, BATCHES[0]), "layers.0.proj.weight.input")
    idle = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    idle.forward = idle["used"].forward
    params = dict(idle.named_parameters())
    rules = [fqt.Rule("*", inputs=fqt.MXFP8), fqt.Rule("*weight", inputs=fqt.FP8_PER_CHANNEL)]
    fq = fqt.transform(fqt.select(params, rules))
    message = message_of(ValueError, fq.apply, idle, params, fq.calibrate(params), torch.ones(1, 4))
    assert_names(message, "'idle.weight.input'", "never ran in this call (1 of 2 groups")


def test_a_report_has_the_tokens_that_calibration_counted():
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*", fqt.INT8, fqt.INT8)]))
    state = fq.calibrate(params, [torch.randn(4, 32), torch.randn(3, 32)], model=model)
    found = fq.report(params, state)
    assert found.groups["0.weight"].tokens.tolist() == [7]
    assert "unseen" in str(found)
