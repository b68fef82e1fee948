"""`value_and_grad`: the gradients of a step, as if every microbatch had been quantized and pulled back on its own."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from fq_transforms.ops.quantize import autograd
from tests.cases import assert_names, message_of, name_of
from tests.training.ways import halved

FORMATS = [fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.NVFP4, fqt.NVFP4_STATIC, fqt.MXFP4]


class Model(torch.nn.Module):
    """A dense layer, experts in a list of which the last gets no token, and a weight that no loss depends on."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.dense = torch.nn.Linear(32, 32)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(3))
        self.unused = torch.nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def routed(self, x):
        return torch.cat([torch.relu(expert(part)) for expert, part in zip(self.experts, x.chunk(2), strict=False)])

    def forward(self, x):
        x = self.dense(x)
        return checkpoint(self.routed, x, use_reentrant=False) if self.checkpointed else self.routed(x)


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


def setup(format=fqt.NVFP4, dtype=torch.float32, checkpointed=False, **options):
    model = Model(checkpointed).to(dtype)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"experts.*": format}), **options)
    state = fq.calibrate(params)
    if options.get("backward") == "clip":
        state = halved(state)
    return model, params, fq, state, [{"x": torch.randn(8, 32, dtype=dtype)} for _ in range(4)]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.equal(found[name], grad), name


def one_by_one(model, params, fakequant, state, batches):
    """What it must equal: each microbatch on its own, through autograd."""
    losses = []
    for batch in batches:
        loss = functional_call(model, fakequant(params, state), (batch["x"],)).square().mean()
        loss.backward()
        losses.append(loss.detach())
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
    model.zero_grad()
    return torch.stack(losses), grads


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
@pytest.mark.parametrize("format", [fqt.INT8_PER_CHANNEL, fqt.NVFP4], ids=name_of)
def test_equals_one_by_one(format, backward):
    """Four microbatches, bit for bit; the unused have zeros; nothing of the model or the inputs is changed.

    test_all_ways.py has one microbatch, in every format.
    """
    model, params, fq, state, batches = setup(format, backward=backward)
    wanted_losses, wanted = one_by_one(model, params, fq.fakequant, state, batches)
    versions = [param._version for param in params.values()]
    losses, grads = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    assert torch.equal(losses, wanted_losses)
    assert not losses.requires_grad
    assert list(grads) == list(params)
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name]), name
        assert grad.dtype == params[name].dtype
        assert bool(grad.any()) == (name not in ("experts.2.weight", "unused.weight", "unused.bias"))
    assert all(param.grad is None for param in params.values())
    assert [param._version for param in params.values()] == versions
    assert all(param is params[name] for name, param in model.named_parameters())


def test_as_torch_func_does():
    """torch.func.grad of the sum of the losses gives the same, up to the order of additions."""
    model, params, fq, state, batches = setup(backward="clip")

    def total(params):
        weights = fq.fakequant(params, state)
        return sum(functional_call(model, weights, (batch["x"],)).square().mean() for batch in batches)

    wanted = torch.func.grad(total)({name: param.detach() for name, param in params.items()})
    _, grads = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name])


def test_one_fakequant_and_one_pullback(monkeypatch):
    calls = {"forward": 0, "backward": 0}
    forward, pull = autograd._run_fake_quantize, autograd._run_clip_backward
    monkeypatch.setattr(
        autograd, "_run_fake_quantize", lambda *a: calls.update(forward=calls["forward"] + 1) or forward(*a)
    )
    monkeypatch.setattr(
        autograd, "_run_clip_backward", lambda *a: calls.update(backward=calls["backward"] + 1) or pull(*a)
    )
    model, params, fq, state, batches = setup(fqt.INT8, backward="clip")
    fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    assert calls == {"forward": 1, "backward": 1}


def test_checkpointed_activations():
    """Made again with the fake weights, since backward is called with them in place."""
    model, params, fq, state, batches = setup(fqt.INT4_BLOCK32, checkpointed=True)
    _, grads = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    model.checkpointed = False
    _, wanted = one_by_one(model, params, fq.fakequant, state, batches)
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


def test_frozen_parameters_have_no_entry():
    model, params, fq, state, batches = setup()
    for name, param in params.items():
        param.requires_grad_("experts.1" in name or name == "dense.bias")
    _, grads = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    assert list(grads) == ["dense.bias", "experts.1.weight"]
    for param in params.values():
        param.requires_grad_()
    _, wanted = one_by_one(model, params, fq.fakequant, state, batches)
    assert all(torch.equal(grads[name], wanted[name]) for name in grads)


def test_parameters_that_are_not_given_are_constants():
    """Named bug: a step with some of the parameters added to `grad` of the others. A tied one is given by any name."""
    model, params, fq, state, batches = setup()
    _, wanted = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    model.dense.tied = model.experts[1].weight  # by which the model names it first
    for param in params.values():
        param.grad = torch.full_like(param, 7)
    some = {name: params[name].detach().requires_grad_() for name in params if "experts" in name}
    _, grads = fqt.value_and_grad(loss_fn, fq, model)(some, state, batches)
    assert_equal(grads, {name: wanted[name] for name in some})
    for param in params.values():
        assert bool((param.grad == 7).all())
    params["dense.bias"].main_grad = torch.zeros(32)
    message = message_of(ValueError, fqt.value_and_grad(loss_fn, fq, model), some, state, batches)
    assert_names(message, "params: found no 'dense.bias', which has main_grad", "requires_grad_(False)")


@pytest.mark.parametrize("reentrant", [False, True])
def test_constants_may_lead_to_a_checkpoint(reentrant):
    """Without a gradient of their own they would take away that of a reentrant checkpoint behind them."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in ("constant", "layer", "head")})
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"layer.weight": fqt.INT8}))

    def loss(model, x):
        hidden = checkpoint(model["layer"], model["constant"](x), use_reentrant=reentrant)
        return model["head"](hidden).square().mean()

    step, state, x = fqt.value_and_grad(loss, fq, model), fq.calibrate(params), torch.randn(4, 32)
    some = {name: param for name, param in params.items() if "constant" not in name}
    _, wanted = step(params, state, [x])
    assert_equal(step(some, state, [x])[1], {name: wanted[name] for name in some})
    assert all(param.grad is None for param in params.values())


def test_under_no_grad_and_from_a_generator():
    model, params, fq, state, batches = setup()
    with torch.no_grad():
        losses, _ = fqt.value_and_grad(loss_fn, fq, model)(params, state, (batch for batch in batches))
    assert losses.shape == (4,)


def test_microbatches_are_drawn_with_the_model_as_it_is():
    """A generator may use the model: what hangs in it then are its own parameters."""
    model, params, fq, state, batches = setup()
    seen = []

    def draw():
        for batch in batches:
            seen.append(all(param is params[name] for name, param in model.named_parameters()))
            yield batch

    fqt.value_and_grad(loss_fn, fq, model)(params, state, draw())
    assert seen == [True] * len(batches)


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_a_step_rounds_at_random_by_its_own_number(backward):
    """`rounding` is given to a step, as to `fakequant`; another seed is another loss."""
    model, params, fq, state, batches = setup(fqt.INT8, backward=backward)
    step, seen = fqt.value_and_grad(loss_fn, fq, model), []
    for number in range(3):
        rounding = fqt.Stochastic(number)
        losses, grads = step(params, state, batches, rounding=rounding)
        wanted_losses, wanted = one_by_one(model, params, partial(fq.fakequant, rounding=rounding), state, batches)
        assert torch.equal(losses, wanted_losses)
        assert_equal(grads, wanted)
        seen.append(losses)
    assert not torch.equal(seen[0], seen[1])


def check_replicated(rank, size):
    """Experts on every rank, tokens split: the gradient is the sum over all tokens, placed as the parameter is."""
    mesh = init_device_mesh("cpu", (size,))
    weight, tokens = torch.randn(32, 32), torch.randint(-4, 5, (2 * size, 32)).float()  # whose sums are exact
    model = torch.nn.Linear(32, 32, bias=False)
    model.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    batches = [distribute_tensor(tokens * scale, mesh, [Shard(0)]) for scale in (1.0, 2.0)]
    step = fqt.value_and_grad(lambda model, x: model(x).sum(), fq, model)
    _, grads = step(params, fq.calibrate(params), batches)

    whole = torch.nn.Linear(32, 32, bias=False)
    whole.weight = torch.nn.Parameter(weight)
    wanted_params = dict(whole.named_parameters())
    step = fqt.value_and_grad(lambda model, x: model(x).sum(), fq, whole)
    _, wanted = step(wanted_params, fq.calibrate(wanted_params), [tokens, tokens * 2.0])
    assert tuple(grads["weight"].placements) == (Replicate(),)
    assert torch.equal(grads["weight"].to_local(), wanted["weight"])


@pytest.mark.dist
def test_dtensors(ranks):
    ranks(check_replicated, size=2)


def test_faults():
    model, params, fq, state, batches = setup()
    step = fqt.value_and_grad(loss_fn, fq, model)
    with pytest.raises(ValueError, match="microbatches"):
        step(params, state, [])
    with pytest.raises(ValueError) as error:
        fqt.value_and_grad(lambda model, batch: model(batch["x"]), fq, model)(params, state, batches)
    assert_names(str(error.value), "loss_fn", (8, 32))
    with pytest.raises(ValueError, match="loss_fn: found float, wanted a scalar tensor"):
        fqt.value_and_grad(lambda model, batch: 1.0, fq, model)(params, state, batches)
    with pytest.raises(ValueError, match="loss_fn: found a loss that depends on no trained parameter"):
        fqt.value_and_grad(lambda model, batch: loss_fn(model, batch).detach(), fq, model)(params, state, batches)
    with pytest.raises(KeyError, match="experts"):
        step({name: param for name, param in params.items() if "experts.1" not in name}, state, batches)
    with pytest.raises(ValueError, match="requires a gradient"):
        step({name: param.detach() for name, param in params.items()}, state, batches)
    with pytest.raises(KeyError, match="'absent.weight' is not in the Model"):
        step(params | {"absent.weight": torch.ones(1)}, state, batches)
    assert all(param is params[name] for name, param in model.named_parameters())


class Layers(torch.nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(32, 32) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x).relu()
        again = self.reentrant is not None
        x = checkpoint(self.second, x, use_reentrant=self.reentrant) if again else self.second(x)
        return self.third(x.relu())


def of_inputs(model, backward):
    """The transform, a state whose inputs clip, parameters and microbatches."""
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    inputs = {"first.*": fqt.FP8, "second.*": fqt.INT8, "third.*": fqt.MXFP4}
    rules = [fqt.Rule(pattern, fqt.INT8, format) for pattern, format in inputs.items()]
    fq = fqt.transform(fqt.select(params, rules), backward=backward)
    batches = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    state = fq.calibrate(params, batches, model=model)
    for inputs in fq.spec.inputs:
        state[inputs.key] = {name: leaf / 2 if name == "amax" else leaf for name, leaf in state[inputs.key].items()}
    return fq, state, params, batches


def loss_of(model, x):
    return model(x).square().sum()


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_inputs_are_quantized_as_apply_does(backward):
    """Losses and gradients of all microbatches, and not those of quantized weights only."""
    model = Layers()
    fq, state, params, batches = of_inputs(model, backward)
    losses, grads = fqt.value_and_grad(loss_of, fq, model)(params, state, batches)
    by_hand = [fq.apply(model, params, state, x).square().sum() for x in batches]
    assert torch.equal(losses, torch.stack(by_hand).detach())
    own = torch.autograd.grad(sum(by_hand), list(params.values()))
    for (name, found), gradient in zip(grads.items(), own, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-4, msg=name)
    weights_only = fqt.transform(replace(fq.spec, inputs=()), backward=backward)
    other = {group.key: state[group.key] for group in fq.spec.groups}
    _, others = fqt.value_and_grad(loss_of, weights_only, model)(params, other, batches)
    assert not torch.allclose(others["first.weight"], grads["first.weight"], rtol=1e-2)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where calibration runs without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_with_inputs_are_refused(reentrant):
    """In backward nothing would see their inputs as they are computed again; the model gets its own weights back."""
    model = Layers(reentrant)
    fq, state, params, batches = of_inputs(model, "pass_through")
    own = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"'second.weight.input': found its layer under activation checkpointing"):
        fqt.value_and_grad(loss_of, fq, model)(params, state, batches)
    assert all(param is own[name] for name, param in model.named_parameters())


def test_a_step_that_fails_leaves_no_gradient_to_the_next():
    """Named bug: the gradients of the microbatches before an error are not added to those of the next step."""
    model, params, fq, state, batches = setup()
    step = fqt.value_and_grad(loss_fn, fq, model)
    step(params, state, batches)
    with pytest.raises(KeyError):
        step(params, state, [batches[0], {}])
    _, grads = step(params, state, batches)
    _, wanted = fqt.value_and_grad(loss_fn, fq, model)(params, state, batches)
    assert_equal(grads, wanted)


def test_a_step_within_a_step_has_weights_of_its_own():
    """Named bug: a step that runs while microbatches are drawn took and dropped the gradients of the outer one."""
    model, params, fq, state, batches = setup()
    step = fqt.value_and_grad(loss_fn, fq, model)
    wanted = [step(params, state, some)[1] for some in (batches[2:], batches[:2])]
    inner = []

    def drawn():
        yield batches[0]
        inner.append(step(params, state, batches[2:])[1])
        yield batches[1]

    outer = step(params, state, drawn())[1]
    assert_equal(inner[0], wanted[0])
    assert_equal(outer, wanted[1])


def test_steps_within_one_autocast():
    """Named bugs: autocast remembers the casts of leaves: it computed with an earlier step's, and kept them all."""
    model, params, fq, state, batches = setup()
    fakes, losses, alone = [], [], []

    def watching(model, batch):
        fakes.append(weakref.ref(model.experts[0].weight))
        return loss_fn(model, batch)

    step = fqt.value_and_grad(watching, fq, model)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            losses.append(step(params, state, batches[:1])[0])
            assert fakes[-1]() is None
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                alone.append(one_by_one(model, params, fq.fakequant, state, batches[:1])[0])
            with torch.no_grad():
                for param in params.values():
                    param.mul_(0.5)
            state = fq.calibrate(params)
    assert losses == alone
    assert losses[0] != losses[1]


def hooked(model):
    model.experts[0].weight.register_hook(lambda grad: grad * 2)


def hooked_behind(model):
    def double(weight):
        weight.grad.mul_(2)

    model.experts[0].weight.register_post_accumulate_grad_hook(double)


def exchanged(model):
    model.experts[0].weight.data = torch.ones_like(model.experts[0].weight)


@pytest.mark.parametrize("change", [hooked, hooked_behind, exchanged])
def test_what_a_loss_does_to_weights_ends_with_the_step(change):
    """Named bugs: hooks added up from step to step, and fake weights were written into the user's own memory."""
    model, params, fq, state, batches = setup()

    def loss(model, batch):
        change(model)
        return loss_fn(model, batch)

    step = fqt.value_and_grad(loss, fq, model)
    first, *others = [step(params, state, batches[:1])[1] for _ in range(3)]
    for grads in others:
        assert_equal(grads, first)


def test_attributes_of_fused_accumulation_are_those_of_now():
    """Named bug: what a parameter said of its `main_grad` in one step was believed in the next."""
    model, params, fq, state, batches = setup()
    step = fqt.value_and_grad(loss_fn, fq, model)
    wanted = step(params, state, batches)[1]
    for says in (True, False):
        for param in params.values():
            param.main_grad = torch.zeros_like(param)
            param.grad_added_to_main_grad = says
        found = step(params, state, batches)[1]
        if not says:
            assert_equal(found, wanted)


def test_a_loss_is_no_view_of_a_weight():
    """Named bug: the loss of one microbatch was the weight's own memory, and changed with the next step."""
    model = torch.nn.Linear(1, 1, bias=False)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    step = fqt.value_and_grad(lambda model, batch: model.weight.squeeze(), fq, model)
    first, _ = step(params, fq.calibrate(params), [None])
    before = first.clone()
    with torch.no_grad():
        model.weight.mul_(2)
    step(params, fq.calibrate(params), [None])
    assert torch.equal(first, before)
