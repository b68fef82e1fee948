"""Gradients moved from a model's parameters to its masters, and steps of an optimizer: `take_grads`."""

import optree
import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from tests.cases import assert_names, message_of, name_of
from tests.lens import (
    BF16,
    FP32,
    assert_same,
    assert_untouched,
    gradients,
    leaves,
    lower,
    parameters,
    record,
    setup,
    transform_of,
)


def trained(format=fqt.INT8, backward="clip", dtype=BF16):
    """As `setup`, with masters and state that are leaves, and the parameters of a model."""
    masters, fq, state = setup(format, backward)
    masters = leaves(masters)
    if backward == "lsq":
        state = optree.tree_map(lambda leaf: leaf.requires_grad_(), state)
    params = leaves({name: m.detach().to(dtype, copy=True) for name, m in masters.items()})
    fq.fakequant(masters, state, out=params)
    return masters, fq, state, params


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_gradients_are_moved_and_add_up_in_fp32(dtype, backward):
    """Once per step or once per microbatch: sums of pullbacks in order; None stays None, and what is there stays."""
    masters, fq, state, params = trained(backward=backward, dtype=dtype)
    wanted, wanted_of_state = {}, {}
    for microbatch in range(3):
        grads = gradients(masters, dtype)
        grads["experts.1.w1"] = None  # no token, ever
        if microbatch == 1:
            grads["experts.2.w2"] = grads["norm.weight"] = None  # none here
        for name, p in params.items():
            p.grad = None if grads[name] is None else grads[name].clone()
        pulled, of_state = fq.pullback(masters, state, grads)
        for name, g in pulled.items():
            if g is not None:
                wanted[name] = wanted[name] + g if name in wanted else g
        for name, g in fqt.state.flatten(of_state).items():
            wanted_of_state[name] = wanted_of_state[name] + g if name in wanted_of_state else g
        assert fq.take_grads(params, masters, state) is None
        assert all(p.grad is None for p in params.values())
    assert_same(
        {name: m.grad for name, m in masters.items() if m.grad is not None},
        {n: wanted[n] for n in masters if n in wanted},
    )
    assert all(m.grad is None or m.grad.dtype == FP32 for m in masters.values())
    learned = fqt.state.flatten(state)
    assert_same({n: leaf.grad for n, leaf in learned.items() if leaf.grad is not None}, wanted_of_state)
    assert (learned.keys() == wanted_of_state.keys()) == (backward == "lsq")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_main_grad_is_taken_in_place_of_a_dummy(dtype, backward):
    """Copied, then zero, for the next step to fill; a `grad` beside it counts where no layer calls it a dummy."""
    masters, fq, state, params = trained(backward=backward)
    for name, p in params.items():
        p.main_grad = torch.zeros(p.shape, dtype=dtype)
        if name.startswith("experts"):
            p.grad_added_to_main_grad = False
    wanted = {}
    for _ in range(2):
        grads = gradients(masters, dtype)
        real = torch.randn(131).bfloat16()
        for name, p in params.items():
            p.main_grad += grads[name]
            if name.startswith("experts"):
                p.grad, p.grad_added_to_main_grad = torch.full_like(p, torch.nan), True
        params["norm.weight"].grad = real.clone()
        grads["norm.weight"] = grads["norm.weight"] + real
        fq.take_grads(params, masters, state)
        pulled, _ = fq.pullback(masters, state, grads)
        wanted = {name: wanted[name] + g if wanted else g for name, g in pulled.items()}
        assert all(p.grad is None and not p.main_grad.any() for p in params.values())
        assert not any(getattr(p, "grad_added_to_main_grad", False) for p in params.values())
        assert_same({name: m.grad for name, m in masters.items()}, wanted)


def test_a_gradient_in_a_buffer_that_others_fill_is_copied():
    """DDP's `gradient_as_bucket_view`: the next microbatch writes over what `p.grad` was, in the masters' dtype too."""
    masters, fq, state, params = trained(backward="pass_through", dtype=FP32)
    bucket = torch.zeros(sum(p.numel() for p in params.values()))
    total = 0
    for _ in range(2):
        bucket.normal_()
        total = total + bucket
        for p, part in zip(params.values(), bucket.split([p.numel() for p in params.values()]), strict=True):
            p.grad = part.view(p.shape)
        fq.take_grads(params, masters, state)
    bucket.fill_(torch.nan)
    assert torch.equal(torch.cat([m.grad.flatten() for m in masters.values()]), total)


def test_expanded_gradients_add_up():
    """What autograd may leave in `grad` need not be memory that can be added to."""
    masters, fq, state, params = trained(backward="pass_through", dtype=FP32)
    for _ in range(2):
        for p in params.values():
            p.grad = torch.tensor(0.5).expand(p.shape)
        fq.take_grads(params, masters, state)
    assert all(torch.equal(m.grad, torch.ones_like(m)) for m in masters.values())


def test_a_master_that_is_the_parameter_keeps_its_gradient():
    """It is neither taken away nor counted twice; with `main_grad` it is taken from there."""
    params = {name: torch.nn.Parameter(p) for name, p in parameters().items()}
    fq = transform_of(params, fqt.INT8)
    masters = fqt.masters(params, fq=fq)
    state = fq.calibrate(masters)
    kept = params["norm.weight"].grad = torch.ones(131)
    params["gain"].main_grad = torch.tensor(2.0)
    params["experts.0.w1"].grad = torch.ones(24, 128)
    fq.take_grads(params, masters, state)
    assert masters["norm.weight"].grad is kept
    assert (params["gain"].grad, params["gain"].main_grad) == (2.0, 0.0)
    assert (params["experts.0.w1"].grad, int(masters["experts.0.w1"].grad.sum())) == (None, 24 * 128)
    fq.take_grads(params, masters, state)
    assert masters["norm.weight"].grad is kept
    assert kept.eq(1).all()


def test_of_a_module_with_a_tied_parameter():
    """One gradient, of both uses, under the name that the master has; parameters of no master keep theirs."""
    model = torch.nn.Sequential(torch.nn.Embedding(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 16, bias=False))
    model[2].weight = model[0].weight
    masters = fqt.masters(model.bfloat16())
    del masters["1.bias"]
    fq = fqt.transform(fqt.select(masters, {"0.*": fqt.INT8}))
    state = fq.calibrate(masters)
    fq.fakequant(masters, state, out=model)
    model(torch.arange(8)).float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    fq.take_grads(model, masters, state)
    assert_same({name: m.grad for name, m in masters.items()}, {name: grads[name].float() for name in masters})
    assert (model[2].weight.grad, model[1].weight.grad) == (None, None)
    assert torch.equal(model[1].bias.grad, grads["1.bias"])


def test_nothing_is_moved_when_anything_is_refused():
    """A name, a group or a master's shape that is missing, or a `main_grad` that does not fit, as the last of all."""
    for backward in ("pass_through", "clip", "lsq"):
        masters, fq, state, params = trained(backward=backward)
        for tree, dtype in ((params, BF16), (masters, FP32)):
            for name, g in gradients(masters, dtype).items():
                tree[name].grad = g
        params["norm.weight"].main_grad = torch.ones(131)
        main = {"main": params["norm.weight"].main_grad}
        before = record(masters, state, params, main)

        def without(tree, end):
            return {name: value for name, value in tree.items() if not name.endswith(end)}

        calls = [
            (KeyError, "'gain'", (without(params, "gain"), masters, state)),
            (KeyError, "'experts.2.w2'", (params, without(masters, "2.w2"), state)),
            (KeyError, "'experts.*.w2'", (params, masters, without(state, "w2"))),
            (ValueError, "'gain'", (params, masters | {"gain": torch.ones(1, requires_grad=True)}, state)),
        ]
        for error, fragment, args in calls:
            assert_names(message_of(error, fq.take_grads, *args), fragment)
            assert_untouched(before)
        params["gain"].main_grad = torch.ones(1)
        assert_names(message_of(ValueError, fq.take_grads, params, masters, state), "'gain'")
        assert_untouched(before)


class Experts(torch.nn.Module):
    """Three experts and a norm; a microbatch goes to the experts that it names, so one may have no tokens."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x, chosen):
        return sum(self.experts[e](self.norm(x)) for e in chosen)


@pytest.mark.parametrize("per_microbatch", [False, True])
@pytest.mark.parametrize(
    ("format", "backward"),
    [(f, b) for f in (fqt.NVFP4, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32) for b in ("pass_through", "clip")]
    + [(fqt.INT8_PER_CHANNEL, "lsq")],
    ids=name_of,
)
def test_steps_of_an_optimizer_are_those_of_the_plain_form(format, backward, per_microbatch):
    """AdamW, four microbatches in bf16: masters and learned state as by functional_call and a pullback of autograd."""
    torch.manual_seed(1)
    model = Experts().bfloat16()
    results = []
    for lens in (False, True):  # which leaves fake weights in the model
        masters = fqt.masters({name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()})
        fq = fqt.transform(fqt.select(masters, {"experts.*": format}), backward=backward, out_dtype=BF16)
        state = optree.tree_map(lambda leaf: leaf.requires_grad_(), lower(fq.calibrate(masters)))
        learned = list(fqt.state.flatten(state).values()) if backward == "lsq" else []
        optimizer = torch.optim.AdamW([*masters.values(), *learned], lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            batches = [(torch.randn(8, 64, generator=generator).bfloat16(), c) for c in ([0], [0, 1], [1], [0, 1, 3])]
            if lens:
                weights = fq.fakequant(masters, state, out=model)
            else:
                weights = {n: w.detach().bfloat16().requires_grad_() for n, w in fq.fakequant(masters, state).items()}
            for x, chosen in batches:
                functional_call(model, weights, (x, chosen)).float().square().mean().backward()
                if lens and per_microbatch:
                    fq.take_grads(model, masters, state)
                elif not lens and per_microbatch:
                    add_plain(fq, masters, state, weights)
            if not per_microbatch:
                fq.take_grads(model, masters, state) if lens else add_plain(fq, masters, state, weights)
            assert masters["experts.2.weight"].grad is None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for leaf in learned:
                    leaf.clamp_(min=1e-6)
        results.append(masters | fqt.state.flatten(state))
    assert_same(*results)


def add_plain(fq, masters, state, weights):
    """One pullback by autograd from gradients of fake weights; none for those that have none."""
    fake = {name: w.bfloat16() for name, w in fq.fakequant(masters, state).items()}
    live = [name for name, w in weights.items() if w.grad is not None]
    kept = {n: m.grad if m.grad is None else m.grad.clone() for n, m in masters.items() if n not in live}
    torch.autograd.backward([fake[name] for name in live], [weights[name].grad for name in live])
    for w in weights.values():
        w.grad = None
    for name, grad in kept.items():
        masters[name].grad = grad  # autograd gives zeros to the rest of a group


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_gradients_can_stay_where_they_are(dtype):
    """A CUDA graph writes its own gradients, in their own memory, at each replay: taken, they are zeros there."""
    masters, fq, state, params = trained(dtype=dtype)
    wanted = {}
    for _ in range(2):
        for name, grad in gradients(masters, dtype).items():
            if params[name].grad is None:
                params[name].grad = torch.zeros_like(params[name])
            params[name].grad.copy_(grad)
        memory = {name: p.grad for name, p in params.items()}
        pulled, _ = fq.pullback(masters, state, memory)
        wanted = {name: grad + wanted.get(name, 0) for name, grad in pulled.items()}
        fq.take_grads(params, masters, state, set_to_none=False)
        for name, param in params.items():
            assert param.grad is memory[name]
            assert not param.grad.any()
            assert torch.equal(masters[name].grad, wanted[name]), name


@pytest.mark.parametrize("separate", [False, True])
def test_gradients_of_a_group_share_an_allocation_and_no_others(separate):
    """Bug: all of one shape in the model did, so that none could be freed by itself."""
    params = {f"{n}.experts.{e}.w": torch.nn.Parameter(torch.ones(4, 8, dtype=BF16)) for n in "ab" for e in range(3)}
    params |= {f"{n}.attention": torch.nn.Parameter(torch.ones(4, 8, dtype=BF16)) for n in "ab"}
    masters = fqt.masters(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.INT8}), separate=separate)
    for param in params.values():
        param.grad = torch.ones_like(param)
    fq.take_grads(params, masters, fq.calibrate(masters))
    storages = [master.grad.untyped_storage().data_ptr() for master in masters.values()]
    assert len(set(storages)) == (8 if separate else 2 + 2)
    assert all(master.grad.eq(1).all() for master in masters.values())


def test_a_sparse_gradient_is_refused_before_any_is_moved():
    """Bug: gradients were taken from the parameters, and then it raised."""
    params = {"w": torch.nn.Parameter(torch.ones(4, 8)), "e": torch.nn.Parameter(torch.ones(4, 8))}
    masters = fqt.masters(params)
    fq = fqt.transform(fqt.select(params, {"w": fqt.INT8}))
    params["w"].grad, params["e"].grad = torch.ones(4, 8), torch.ones(4, 8).to_sparse()
    message = message_of(ValueError, fq.take_grads, params, masters, fq.calibrate(masters))
    assert_names(message, "gradient 'e'", "torch.sparse_coo", "wanted a dense tensor")
    assert params["w"].grad is not None
    assert all(master.grad is None for master in masters.values())


@pytest.mark.parametrize("other", [lambda grad: grad, torch.Tensor.detach])
def test_one_gradient_of_two_parameters_becomes_two(other):
    """Bug: both masters had it, and what was added to one was added to the other."""
    params = {"v": torch.nn.Parameter(torch.ones(4, 8)), "w": torch.nn.Parameter(torch.ones(4, 8))}
    masters = fqt.masters(params)
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    params["v"].grad = torch.ones(4, 8)
    params["w"].grad = other(params["v"].grad)
    fq.take_grads(params, masters, fq.calibrate(masters))
    masters["v"].grad.add_(1)
    assert masters["w"].grad.eq(1).all()


def test_main_grad_that_the_class_has_is_found(monkeypatch):
    """As Megatron's FSDP gives it to parameters: a property, of no parameter's own."""
    params = {"w": torch.nn.Parameter(torch.ones(4, 8, dtype=BF16))}
    masters, buffer = fqt.masters(params), torch.full((4, 8), 3.0)
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    monkeypatch.setattr(torch.nn.Parameter, "main_grad", property(lambda self: buffer), raising=False)
    fq.take_grads(params, masters, fq.calibrate(masters))
    assert masters["w"].grad.eq(3).all()
    assert not buffer.any()
