"""`FakeQuantOptimizer`. Law: its masters are those of the plain form, `functional_call` and one pullback, exactly."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from tests.cases import assert_names, message_of, name_of
from tests.full import FULL
from tests.models import ListMoE, language_model, tokens

MICROBATCHES, STEPS = 4, 20 if FULL else 6
STATIC = [fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32]
RULES = [
    *((format, rule) for format in (fqt.NVFP4, *STATIC, fqt.MXFP4) for rule in ("pass_through", "clip")),
    *((format, "lsq") for format in (*STATIC, fqt.NVFP4_STATIC)),
]
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}
LEARN = partial(torch.optim.Adam, lr=1e-2)


def setup(format=fqt.NVFP4, backward="pass_through", dtype=torch.bfloat16, layers=1, rule="*.experts.*"):
    """A model, a Transform of its experts, and half the calibrated state, so that some weights are clipped."""
    model, _ = language_model(ListMoE)
    del model.layers[layers:]
    model.to(dtype)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {rule: format}), backward=backward)
    state = fq.calibrate(fqt.masters(params))
    return model, fq, {key: {name: leaf * 0.5 for name, leaf in leaves.items()} for key, leaves in state.items()}


def batches_of(step, count=MICROBATCHES):
    """Each one token over and over, so that some experts see no token in a step."""
    return [tokens(1, 1, seed=count * step + i).expand(2, 3) for i in range(count)]


def loss_of(logits, batch):
    return F.cross_entropy(logits.float().flatten(0, -2), batch.roll(1).flatten())


def make(model, fq, state, optimizer=torch.optim.AdamW, options=ADAMW, **given):
    if fq.backward == "lsq":
        given = {"state_optimizer": LEARN, **given}
    return fqt.FakeQuantOptimizer(fq, optimizer(model.parameters(), **options), model, state, **given)


def train(model, opt, steps, first=0, between=lambda step: None):
    for step in range(first, first + steps):
        for batch in batches_of(step):
            loss_of(model(batch), batch).backward()
        between(step)
        opt.step()
        opt.zero_grad()


def same(found, wanted):
    assert found.keys() == wanted.keys()
    differ = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    assert not differ, differ


def fake_weights(fq, masters, state, dtype=torch.bfloat16):
    """What the model holds, by functions that do not write."""
    plain = fqt.transform(fq.spec, out_dtype=dtype)
    return {name: weight.detach().to(dtype) for name, weight in plain.fakequant(masters, state).items()}


class Plain:
    """The contract: `functional_call` on detached fake weights, `.backward()` per microbatch, and one pullback."""

    def __init__(self, model, fq, state, optimizer=torch.optim.AdamW, options=ADAMW):
        self.model, self.dtype = model, next(model.parameters()).dtype
        self.fq = fqt.transform(fq.spec, backward=fq.backward)
        self.masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
        self.opt = optimizer(self.masters.values(), **options)
        self.state, self.unseen = state, 0
        if fq.backward == "lsq":
            self.state = {k: {n: leaf.clone().requires_grad_() for n, leaf in g.items()} for k, g in state.items()}
            self.learn = LEARN([leaf for group in self.state.values() for leaf in group.values()])

    def step(self, step, scale=1.0):
        leaves = {n: w.requires_grad_() for n, w in fake_weights(self.fq, self.masters, self.state, self.dtype).items()}
        for batch in batches_of(step):
            (loss_of(functional_call(self.model, leaves, (batch,)), batch) * scale).backward()
        with_grads = [name for name, leaf in leaves.items() if leaf.grad is not None]
        self.unseen += len(leaves) - len(with_grads)
        fakes = self.fq.fakequant(self.masters, self.state)
        # `grad` of experts without tokens stays None, though the others of the group have one.
        for name in leaves.keys() - with_grads:
            fakes[name] = fakes[name].detach()
        outs = [fakes[name].to(self.dtype) for name in with_grads]
        torch.autograd.backward(outs, [leaves[name].grad for name in with_grads])
        for name in leaves.keys() - with_grads:
            self.masters[name].grad = None
        for name in with_grads:
            self.masters[name].grad /= scale
        self.opt.step()
        self.opt.zero_grad()
        if self.fq.backward == "lsq":
            self.learn.step()
            self.learn.zero_grad()
            for group in self.state.values():
                for leaf in group.values():
                    leaf.data.clamp_(min=2.0**-23)


# The law.


@pytest.mark.parametrize(
    ("format", "backward", "kind"),
    [*((*rule, {"foreach": True}) for rule in RULES), *((fqt.NVFP4, "clip", kind) for kind in ({"fused": True}, {}))],
    ids=lambda value: str(*value) if isinstance(value, dict) else name_of(value),
)
def test_steps_give_the_masters_of_the_plain_form(format, backward, kind):
    """With four microbatches whose gradients add up in bf16, and experts without tokens."""
    options = ADAMW | kind
    model, fq, state = setup(format, backward)
    plain = Plain(setup(format, backward)[0], fq, state, options=options)
    opt = make(model, fq, state, options=options)
    for step in range(STEPS):
        plain.step(step)
        train(model, opt, 1, step)
    same(opt.masters, plain.masters)
    same(fqt.state.flatten(opt.quantizer_state), fqt.state.flatten(plain.state))
    same(dict(model.named_parameters()), fake_weights(fq, plain.masters, plain.state))
    assert plain.unseen
    moved = [not torch.equal(opt.masters[n], p.float()) for n, p in setup(format, backward)[0].named_parameters()]
    assert all(moved)


def test_the_fake_weights_are_there_from_the_start_and_after_each_step_alone():
    """One write when it is made and one in each step; gradients of either are no reason for another."""
    model, fq, state = setup()
    before = {name: param.clone() for name, param in model.named_parameters()}
    opt = make(model, fq, state)
    same(dict(model.named_parameters()), fake_weights(fq, before, state))
    versions = {name: param._version for name, param in model.named_parameters()}
    train(model, opt, 2)
    assert all(param._version == versions[name] + 2 for name, param in model.named_parameters())
    assert all(tensor.grad is None for tensor in (*model.parameters(), *opt.masters.values()))


def test_a_step_takes_the_gradients_so_that_zero_grad_of_the_model_is_enough():
    """The Trainer of transformers calls model.zero_grad(), which does not know of the masters."""
    one, two = ((model, make(model, fq, state)) for model, fq, state in (setup(), setup()))
    train(*one, 2)
    for step in range(2):
        for batch in batches_of(step):
            loss_of(two[0](batch), batch).backward()
        two[1].step()
        two[0].zero_grad()
    same(two[1].masters, one[1].masters)


def test_gradients_taken_after_each_microbatch_add_up_in_fp32():
    """Each is that of one backward pass in bf16; their sum is not rounded to bf16 again."""
    model, fq, state = setup()
    opt = make(model, fq, state, torch.optim.SGD, {"lr": 1.0})
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    total = {name: torch.zeros_like(master) for name, master in before.items()}
    for batch in batches_of(0):
        loss_of(model(batch), batch).backward()
        for name, param in model.named_parameters():
            total[name] += 0 if param.grad is None else param.grad.float()
        opt.take_grads()
    opt.step()
    same(opt.masters, {name: before[name] - total[name] for name in before})


def test_zero_grad_clears_what_was_taken():
    """And `main_grad`, which a step that was skipped has left."""
    for set_to_none in (True, False):
        model, fq, state = setup()
        opt = make(model, fq, state)
        loss_of(model(batches_of(0)[0]), batches_of(0)[0]).backward()
        opt.take_grads()
        assert opt.masters["embed.weight"].grad.any()
        opt.zero_grad(set_to_none=set_to_none)
        grads = [master.grad for master in opt.masters.values()]
        assert all(grad is None for grad in grads) if set_to_none else not any(g.any() for g in grads if g is not None)
    model.lm_head.weight.main_grad = torch.ones_like(opt.masters["lm_head.weight"])
    opt.zero_grad()
    assert not model.lm_head.weight.main_grad.any()


def test_fp32_parameters_that_are_not_selected_are_their_own_masters():
    """And are trained as the others are; those that are selected have fp32 masters apart from them."""
    model, fq, state = setup(dtype=torch.float32)
    plain = Plain(setup(dtype=torch.float32)[0], fq, state)
    opt = make(model, fq, state)
    for step in range(3):
        plain.step(step)
        train(model, opt, 1, step)
    same(opt.masters, plain.masters)
    selected = {name for group in fq.spec.groups for name in group.names}
    assert {n for n, p in model.named_parameters() if p is not opt.masters[n]} == selected


# Param groups: schedulers, clipping, hooks.


def grouped(model, fq, state, **given):
    """Two param groups of different options, with names."""
    decayed, others = [], []
    for name, param in model.named_parameters():
        (decayed if param.dim() == 2 else others).append((name, param))
    groups = [{"params": decayed, "lr": 1e-2}, {"params": others, "weight_decay": 0.0}]
    return fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(groups, **ADAMW), model, state, **given)


def test_a_scheduler_of_the_param_groups_schedules_the_masters():
    """Against AdamW on masters with the same groups and scheduler."""
    model, fq, state = setup()
    opt = grouped(model, fq, state)
    other, _, _ = setup()
    plain = Plain(other, fq, state)
    names = [[n for n, p in other.named_parameters() if (p.dim() == 2) == two] for two in (True, False)]
    groups = [{"params": [plain.masters[n] for n in names[0]], "lr": 1e-2}]
    groups += [{"params": [plain.masters[n] for n in names[1]], "weight_decay": 0.0}]
    plain.opt = torch.optim.AdamW(groups, **ADAMW)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: step / 2) for one in (opt, plain.opt)]
    for step in range(4):
        plain.step(step)
        train(model, opt, 1, step)
        for scheduler in schedulers:
            scheduler.step()
    same(opt.masters, plain.masters)
    assert [group["lr"] for group in opt.param_groups] == [2e-2, 6e-3]
    assert opt.param_groups[0]["param_names"] == names[0]


def test_a_scheduler_of_the_inner_optimizer_is_refused_at_the_next_step():
    """Bug: each step copied the outer options over what it had set, so that the learning rate never changed."""
    model, fq, state = setup()
    opt = make(model, fq, state)
    train(model, opt, 1)
    torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, 0.1)
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    assert_names(message_of(ValueError, opt.step), "a learning rate scheduler", "schedule the FakeQuantOptimizer")
    same(opt.masters, before)


def norm_of(grads):
    return torch.stack([grad.float().norm() for grad in grads if grad is not None]).norm()


def test_norms_of_parameters_are_those_before_the_mask_and_a_hook_sees_those_of_the_masters():
    """Under "clip" the two differ. What the hook clips to is what SGD moves the masters by."""
    for clips_masters in (True, False):
        model, fq, state = setup(fqt.INT8_PER_CHANNEL, backward="clip")
        opt = make(model, fq, state, torch.optim.SGD, {"lr": 1.0})
        before = {name: master.detach().clone() for name, master in opt.masters.items()}
        norms = []

        def clip(inner, args, kwargs, masters=opt.masters, norms=norms):
            norms.append(norm_of(master.grad for master in masters.values()))
            torch.nn.utils.clip_grad_norm_(masters.values(), 0.5)

        def measure(step, model=model, norms=norms, clips=not clips_masters):
            norms.append(norm_of(param.grad for param in model.parameters()))
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

        if clips_masters:
            opt.optimizer.register_step_pre_hook(clip)
        train(model, opt, 1, between=measure)
        moved = norm_of(before[name] - master.detach() for name, master in opt.masters.items())
        if clips_masters:
            assert norms[1] < 0.995 * norms[0]
            assert abs(moved - 0.5) < 1e-3
        else:
            assert 0.1 < moved < 0.499


class Counting(torch.optim.SGD):
    """Counts in its param groups, as Prodigy and schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_counts_in_its_param_groups_is_kept():
    model, fq, state = setup()
    opt = make(model, fq, state, Counting, {"lr": 0.1})
    train(model, opt, 3)
    assert opt.param_groups[0]["k"] == opt.optimizer.param_groups[0]["k"] == 3
    assert opt.state_dict()["param_groups"][0]["k"] == 3


def test_step_hooks_and_the_profiler_see_one_step():
    model, fq, state = setup()
    opt = make(model, fq, state)
    seen = []
    opt.register_step_pre_hook(lambda *args: seen.append("before"))
    opt.register_step_post_hook(lambda *args: seen.append("after"))
    train(model, opt, 1)
    assert seen == ["before", "after"]
    assert isinstance(opt, torch.optim.Optimizer)


# Optimizers: closures, and state that is there already.


def test_a_closure_runs_before_the_gradients_are_taken():
    """With gradients enabled, and its loss is what step returns."""
    one, two = ((model, make(model, fq, state)) for model, fq, state in (setup(), setup()))
    train(*one, 2)
    model, opt = two
    for step in range(2):

        def closure(step=step):
            opt.zero_grad()
            losses = [loss_of(model(batch), batch) for batch in batches_of(step)]
            for loss in losses:
                loss.backward()
            return sum(losses)

        assert opt.step(closure) > 0
    same(two[1].masters, one[1].masters)


def test_lbfgs_evaluates_at_fake_weights_of_each_of_its_points():
    """It moves the masters between calls of the closure, and each evaluation has the fake weights of then."""
    model, fq, state = setup()
    opt = make(model, fq, state, torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4})
    seen = []

    def closure():
        opt.zero_grad()
        same(dict(model.named_parameters()), fake_weights(fq, opt.masters, state))
        seen.append(opt.masters["embed.weight"].detach().clone())
        batch = batches_of(0)[0]
        loss = loss_of(model(batch), batch)
        loss.backward()
        return loss

    first = opt.step(closure)
    assert len(seen) == 4
    assert len({tuple(one.flatten().tolist()) for one in seen}) == 4
    assert opt.step(closure) < first


def test_an_optimizer_keeps_the_state_that_it_has_in_the_dtype_of_the_masters():
    """Adagrad has it from the start; AdamW that has stepped has moments."""
    model, fq, state = setup()
    opt = make(model, fq, state, torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5})
    assert all(one["sum"].dtype == torch.float32 and (one["sum"] == 0.5).all() for one in opt.optimizer.state.values())
    assert opt.optimizer.state.keys() == set(opt.masters.values())
    train(model, opt, 1)

    model, fq, state = setup()
    inner = torch.optim.AdamW(model.parameters(), **ADAMW)
    batch = batches_of(0)[0]
    loss_of(model(batch), batch).backward()
    inner.step()
    inner.zero_grad()
    moments = {name: inner.state[p]["exp_avg"].float() for name, p in model.named_parameters() if p in inner.state}
    opt = fqt.FakeQuantOptimizer(fq, inner, model, state)
    same({name: opt.state[dict(model.named_parameters())[name]]["exp_avg"] for name in moments}, moments)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam], ids=lambda o: o.__name__
)
def test_any_torch_optimizer_is_wrapped(optimizer):
    model, fq, state = setup()
    plain = Plain(setup()[0], fq, state, optimizer, {"lr": 0.01})
    opt = make(model, fq, state, optimizer, {"lr": 0.01})
    for step in range(3):
        plain.step(step)
        train(model, opt, 1, step)
    same(opt.masters, plain.masters)


# GradScaler.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=["foreach", "fused"])
def test_grad_scaler_skips_a_step_with_infinities_and_unscales_the_others(dtype, kind):
    """fp16 gradients too, which it refuses to unscale in place; the masters' are unscaled in fp32."""
    options = {"lr": 0.5} | kind
    model, fq, state = setup(dtype=dtype)
    plain = Plain(setup(dtype=dtype)[0], fq, state, torch.optim.SGD, options)
    opt = make(model, fq, state, torch.optim.SGD, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    versions = [param._version for param in model.parameters()]
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    loss_of(model(batches_of(0)[0]), batches_of(0)[0]).backward()
    scaler.scale(torch.ones(()))
    model.lm_head.weight.grad[0, 0] = torch.inf
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert scaler.get_scale() == 2.0
    assert versions == [param._version for param in model.parameters()]
    same(opt.masters, before)
    assert opt.param_groups[0]["fake_quant_step"] == 0

    plain.step(0, scale=2.0)
    for batch in batches_of(0):
        scaler.scale(loss_of(model(batch), batch)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert opt.param_groups[0]["fake_quant_step"] == 1
    same(opt.masters, plain.masters)


def test_unscaling_first_as_for_clipping_works_on_the_models_gradients():
    model, fq, state = setup(dtype=torch.float32)
    opt = make(model, fq, state)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = batches_of(0)[0]
    loss_of(model(batch), batch).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    opt.zero_grad()
    scaler.scale(loss_of(model(batch), batch)).backward()
    scaler.unscale_(opt)
    same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted)
    scaler.step(opt)
    assert opt.param_groups[0]["fake_quant_step"] == 1


# Saving and loading.


def of(masters):
    """The amax of the weights as they are, by a Transform made anew."""
    return fqt.transform(fqt.select(masters, {"*.experts.*": fqt.FP8})).calibrate(masters)


def every_third_step(step, masters, state):
    return of(masters) if step % 3 == 0 else None


def moving_average(step, masters, state):
    new = of(masters)
    return {key: {"amax": 0.9 * group["amax"] + 0.1 * new[key]["amax"]} for key, group in state.items()}


GIVEN = {
    "to the nearest": {},
    "at random": {"seed": 7},
    "recalibrated": {"recalibrate": every_third_step},
    "both": {"seed": 7, "recalibrate": moving_average},
}


def through_a_file(state_dict, folder):
    torch.save(state_dict, folder / "optimizer.pt")
    return torch.load(folder / "optimizer.pt", weights_only=True)


def same_training(one, two):
    (model, opt), (other, resumed) = one, two
    same(dict(other.named_parameters()), dict(model.named_parameters()))
    same(resumed.masters, opt.masters)
    same(fqt.state.flatten(resumed.quantizer_state), fqt.state.flatten(opt.quantizer_state))
    for param, found in zip(model.parameters(), other.parameters(), strict=True):
        same(resumed.state[found], opt.state[param])


@pytest.mark.parametrize(
    ("given", "backward"),
    [(name, "clip") for name in GIVEN] + [("to the nearest", "lsq"), ("at random", "lsq")],
    ids=str,
)
def test_a_resumed_run_is_the_same_bit_for_bit(given, backward, tmp_path):
    """Ten steps, and five, a file, new objects, and five, with a scheduler; the new model's weights matter not."""

    def begin(seed):
        model, fq, state = setup(fqt.FP8, backward)
        if seed:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1.5)
        opt = make(model, fq, state, **GIVEN[given])
        return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))

    straight, first, second = begin(0), begin(0), begin(1)

    def run(model, opt, scheduler, steps, start):
        for step in range(start, start + steps):
            train(model, opt, 1, step)
            scheduler.step()

    run(*straight, 10, 0)
    run(*first, 5, 0)
    saved = through_a_file({"opt": first[1].state_dict(), "scheduler": first[2].state_dict()}, tmp_path)
    second[1].load_state_dict(saved["opt"])
    second[2].load_state_dict(saved["scheduler"])
    same_training(first[:2], second[:2])
    run(*second, 5, 5)
    same_training(straight[:2], second[:2])
    assert second[1].param_groups[0]["fake_quant_step"] == 10


def test_a_fresh_optimizer_is_saved_and_loaded_with_its_masters():
    """As accelerate does as soon as it is given one."""
    one, two = ((model, make(model, fq, state)) for model, fq, state in (setup(), setup()))
    saved = two[1].state_dict()
    assert all(of.keys() == {"master"} for of in saved["state"].values())
    two[1].load_state_dict(saved)
    train(*one, 2)
    train(*two, 2)
    same_training(one, two)


def test_write_gives_the_same_fake_weights_again():
    """Rounded at random too: the bits are those of the step."""
    model, fq, state = setup()
    opt = make(model, fq, state, seed=3)
    train(model, opt, 2)
    wanted = {name: param.clone() for name, param in model.named_parameters()}
    with opt.unquantized():
        same(dict(model.named_parameters()), {n: m.bfloat16() for n, m in opt.masters.items()})
    same(dict(model.named_parameters()), wanted)
    fqt.cast(opt.masters, out=model)
    opt.write()
    same(dict(model.named_parameters()), wanted)


def test_each_step_rounds_at_random_anew_and_ranks_with_other_experts_differ():
    def fake(steps, **given):
        model, fq, state = setup()
        train(model, make(model, fq, state, torch.optim.SGD, {"lr": 0.0}, **given), steps)
        return model.layers[0].mlp.experts[0].w1.weight.detach().clone()

    assert torch.equal(fake(1, seed=0), fake(1, seed=0))
    assert torch.equal(fake(1, seed=0), fake(1, seed=fqt.Stochastic(0)))
    different = [fake(1, seed=0), fake(2, seed=0), fake(1, seed=1), fake(1, seed=-1), fake(0, seed=1), fake(0)]
    different += [fake(1, seed=fqt.Stochastic(0, first_expert=4))]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_recalibration_is_from_the_masters_after_the_step_and_counts_from_one():
    model, fq, state = setup(fqt.FP8)
    seen = []

    def recalibrate(step, masters, state):
        seen.append((step, {name: master.clone() for name, master in masters.items()}, state))
        return fq.calibrate(masters) if step == 2 else None

    opt = make(model, fq, state, recalibrate=recalibrate)
    train(model, opt, 3)
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert seen[0][2] is seen[1][2] is state
    same(fqt.state.flatten(opt.quantizer_state), fqt.state.flatten(fq.calibrate(seen[1][1])))
    same(dict(model.named_parameters()), fake_weights(fq, opt.masters, opt.quantizer_state))


def test_setting_the_state_writes_it():
    model, fq, state = setup(fqt.FP8)
    opt = make(model, fq, state)
    assert opt.quantizer_state is state
    opt.quantizer_state = wanted = fq.calibrate(opt.masters)
    same(dict(model.named_parameters()), fake_weights(fq, opt.masters, wanted))


# Learned scales.


def test_a_learned_amax_stays_positive_and_experts_of_zeros_learn_too():
    """Long steps drive it below zero: it stays where it has a gradient, weights stay finite, and it comes back."""
    model, fq, state = setup(fqt.INT4_BLOCK32, "lsq")
    state = {key: {"amax": group["amax"] * (".w2." not in key)} for key, group in state.items()}
    opt = make(model, fq, state, state_optimizer=partial(torch.optim.SGD, lr=100.0))
    for step in range(3):
        train(model, opt, 1, step)
        for leaf in fqt.state.flatten(opt.quantizer_state).values():
            assert leaf.min() >= 2.0**-23
            assert not leaf.requires_grad
        assert all(param.isfinite().all() for param in model.parameters())
    learned = fqt.state.flatten(opt.quantizer_state)
    assert any(leaf.min() == 2.0**-23 for leaf in learned.values())
    assert all(leaf.max() > 1e-3 for leaf in learned.values())
    assert any(leaf.max() == 0 for leaf in fqt.state.flatten(state).values())  # what was given stays as it is


def test_scales_of_frozen_weights_stay_and_those_alone_are_refused():
    """Bug: with all weights frozen an optimizer was made that never trained anything."""
    model, fq, state = setup(fqt.FP8, "lsq")
    model.layers[0].mlp.experts.requires_grad_(False)
    inner = torch.optim.AdamW(model.parameters())
    refused(
        ValueError,
        "all selected weights with a state frozen",
        model=model,
        fq=fq,
        optimizer=inner,
        state_optimizer=LEARN,
    )
    trained = ".w1."
    for name, param in model.named_parameters():
        param.requires_grad_(trained in name)
    opt = make(model, fq, state)
    train(model, opt, 1)
    learned, given = fqt.state.flatten(opt.quantizer_state), fqt.state.flatten(state)
    assert [torch.equal(learned[name], given[name]) for name in given] == [trained not in name for name in given]


def test_setting_the_state_keeps_the_leaves_that_are_trained():
    model, fq, state = setup(fqt.FP8, "lsq")
    opt = make(model, fq, state)
    train(model, opt, 1)
    opt.quantizer_state = state
    same(fqt.state.flatten(opt.quantizer_state), fqt.state.flatten(state))
    train(model, opt, 1)
    assert not torch.equal(next(iter(opt.quantizer_state.values()))["amax"], next(iter(state.values()))["amax"])


# torch DCP.


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda one: one.__name__)
def test_dcp_saves_and_loads_masters_and_moments_by_name(optimizer, flat, tmp_path):
    """It makes a new optimizer's state by a step with lr 0: nothing is written, recalibrated or counted then."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as names

    options = names.StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, first, second = (
        (model, make(model, fq, s, optimizer, {"lr": 0.01}, seed=1)) for model, fq, s in map(setup, [fqt.FP8] * 3)
    )
    train(*straight, 6)
    train(*first, 3)
    dcp.save(names.get_optimizer_state_dict(*first, options=options), checkpoint_id=tmp_path)

    model, opt = second
    with torch.no_grad():
        for master in opt.masters.values():
            master.mul_(1.5)
    opt.write()
    versions = [param._version for param in model.parameters()]
    opt.recalibrate = lambda *_: pytest.fail("recalibrated")
    loaded = names.get_optimizer_state_dict(model, opt, options=options)
    assert versions == [param._version for param in model.parameters()]
    assert opt.param_groups[0]["fake_quant_step"] == 0
    opt.recalibrate = None
    dcp.load(loaded, checkpoint_id=tmp_path)
    names.set_optimizer_state_dict(model, opt, loaded, options=options)
    same_training(first, second)
    train(*second, 3, 3)
    same_training(straight, second)


def test_a_first_step_with_lr_zero_is_a_step_if_there_are_gradients():
    """As of a warm-up from zero: it counts."""
    model, fq, state = setup()
    opt = make(model, fq, state, options={"lr": 0.0})
    train(model, opt, 2)
    assert opt.param_groups[0]["fake_quant_step"] == 2


# What is frozen.


def test_frozen_weights_are_written_once_for_each_state():
    """As under LoRA; with another state, or after something else was written, they are written again."""
    model, fq, state = setup(fqt.FP8)
    frozen = [param for name, param in model.named_parameters() if ".experts." in name]
    others = [param for name, param in model.named_parameters() if ".experts." not in name]
    for param in frozen:
        param.requires_grad_(False)
    opt = fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(others, **ADAMW), model, state, seed=1)
    params = dict(model.named_parameters())
    wanted = {name: param.clone() for name, param in params.items() if ".experts." in name}
    versions = [param._version for param in frozen]
    train(model, opt, 2)
    assert versions == [param._version for param in frozen]
    assert all(opt.masters[name].dtype == torch.bfloat16 for name in wanted)
    opt.write()
    same({name: params[name] for name in wanted}, wanted)
    opt.quantizer_state = fq.calibrate(opt.masters)
    assert not torch.equal(params[next(iter(wanted))], next(iter(wanted.values())))

    saved = opt.state_dict()
    assert saved["quantizer"]["frozen"].keys() == wanted.keys()
    other, fq, state = setup(fqt.FP8)
    for name, param in other.named_parameters():
        param.requires_grad_(params[name].requires_grad).data.mul_(2)
    rest = [param for param in other.parameters() if param.requires_grad]
    resumed = fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(rest, **ADAMW), other, state, seed=1)
    resumed.load_state_dict(saved)
    same(dict(other.named_parameters()), params)


@pytest.mark.parametrize("in_groups", [False, True])
def test_experts_that_are_frozen_among_others_stay_as_they_are(in_groups, tmp_path):
    """Their group is written in each step, their masters never change, and the others train and resume."""

    def begin():
        model, fq, state = setup(fqt.INT4_BLOCK32, "clip")
        for param in model.layers[0].mlp.experts[1].parameters():
            param.requires_grad_(False)
        params = [param for param in model.parameters() if in_groups or param.requires_grad]
        return model, fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(params, **ADAMW), model, state)

    (model, opt), second = begin(), begin()
    frozen = {name: master.clone() for name, master in opt.masters.items() if ".experts.1." in name}
    train(model, opt, 2)
    same({name: opt.masters[name] for name in frozen}, frozen)
    assert any(not torch.equal(master, second[1].masters[name]) for name, master in opt.masters.items())
    second[1].load_state_dict(through_a_file(opt.state_dict(), tmp_path))
    train(model, opt, 2, 2)
    train(*second, 2, 2)
    same(second[1].masters, opt.masters)
    same(dict(second[0].named_parameters()), dict(model.named_parameters()))


def test_tied_weights_have_one_master():
    """A head that is the embedding: one name, and both sides see what is written."""
    model, fq, state = setup()
    model.lm_head.weight = model.embed.weight
    opt = make(model, fq, state)
    train(model, opt, 2)
    assert "lm_head.weight" not in opt.masters
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.lm_head.weight, opt.masters["embed.weight"].bfloat16())


def test_parameters_of_another_optimizer_are_left_alone():
    model, fq, state = setup()
    ours = [param for name, param in model.named_parameters() if name != "lm_head.weight"]
    opt = fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(ours, **ADAMW), model, state)
    before = model.lm_head.weight._version
    train(model, opt, 1)
    assert "lm_head.weight" not in opt.masters
    assert model.lm_head.weight._version == before
    assert model.lm_head.weight.grad is not None


# transformers' Trainer and accelerate.


def tiny_qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.INT4_BLOCK32}))
    return model, fq, fq.calibrate(params)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = tokens(8, seed=index)
        return {"input_ids": ids, "labels": ids}


def trainer_of(folder, **given):
    from transformers import Trainer, TrainingArguments

    model, fq, state = tiny_qwen3_moe()
    opt = fqt.FakeQuantOptimizer(
        fq, torch.optim.AdamW(model.parameters(), lr=1e-2), model, state, seed=5, recalibrate=moving_average_qwen3_moe
    )
    options = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=2,
        report_to=[],
        use_cpu=True,
        **given,
    )
    return Trainer(model=model, args=options, train_dataset=Tokens(), optimizers=(opt, None)), model, opt, fq


def moving_average_qwen3_moe(step, masters, state):
    fq = fqt.transform(fqt.select(masters, {"*.experts.*": fqt.INT4_BLOCK32}))
    new = fq.calibrate(masters)
    return {key: {"amax": 0.9 * group["amax"] + 0.1 * new[key]["amax"]} for key, group in state.items()}


def test_transformers_trainer_trains_and_resumes_bit_for_bit(tmp_path):
    """With accumulation, clipping and a schedule; what it saves half way is resumed by new objects."""
    pytest.importorskip("accelerate")
    trainer, model, opt, fq = trainer_of(tmp_path / "straight")
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    trainer.train()
    assert opt.param_groups[0]["fake_quant_step"] == 6
    assert opt.masters["lm_head.weight"].dtype == torch.float32
    assert all(not torch.equal(before[name], master) for name, master in opt.masters.items())
    plain = fqt.transform(fq.spec, out_dtype=torch.bfloat16)
    wanted = plain.fakequant(opt.masters, opt.quantizer_state, rounding=fqt.Stochastic((5 << 32) + 6))
    same(dict(model.named_parameters()), {name: weight.detach().bfloat16() for name, weight in wanted.items()})

    resumed, other, other_opt, _ = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    same_training((model, opt), (other, other_opt))


def test_accelerate_trains_and_resumes_bit_for_bit(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def begin():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, fq, state = tiny_qwen3_moe()
        opt = fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(model.parameters(), lr=1e-2), model, state, seed=5)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))
        return accelerator, opt, *accelerator.prepare(model, opt, schedule)

    def run(accelerator, _, model, opt, schedule, steps):
        for step in steps:
            for half in range(2):
                with accelerator.accumulate(model):
                    ids = tokens(2, 8, seed=2 * step + half)
                    accelerator.backward(model(input_ids=ids, labels=ids).loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    opt.step()
                    schedule.step()
                    opt.zero_grad()

    straight, first, second = begin(), begin(), begin()
    run(*straight, range(6))
    run(*first, range(3))
    first[0].save_state(tmp_path)
    second[0].load_state(tmp_path)
    same_training((first[2], first[1]), (second[2], second[1]))
    run(*second, range(3, 6))
    same_training((straight[2], straight[1]), (second[2], second[1]))
    assert straight[1].param_groups[0]["fake_quant_step"] == 6


# torch.compile.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backward", "rule", "given"),
    [
        ("clip", "lm_head.weight", {"seed": 3}),  # on a CPU each weight has a graph of its own, large with random bits
        ("lsq", "*.w2.weight", {"state_optimizer": partial(torch.optim.SGD, lr=1e-3)}),
    ],
    ids=["clip", "lsq"],
)
def test_a_compiled_step_is_the_same_bit_for_bit(backward, rule, given):
    """Of an optimizer that is: AdamW computes in another order when it is compiled."""
    (model, opt), (other, compiled) = (
        (model, make(model, fq, state, torch.optim.SGD, {"lr": 0.1}, **given))
        for model, fq, state in (setup(fqt.FP8, backward, rule=rule) for _ in range(2))
    )
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="aot_eager")
    train(model, opt, 3)
    for number in range(3):
        for batch in batches_of(number):
            loss_of(other(batch), batch).backward()
        step()
    same_training((model, opt), (other, compiled))
    assert compiled.param_groups[0]["fake_quant_step"] == 3


# Bad input.


def refused(error, *fragments, fq=None, optimizer=None, model=None, state=None, **given):
    """What it says; and the model, and the optimizer that was given, are as before."""
    own, own_fq, own_state = setup(fqt.FP8)
    model, fq, state = own if model is None else model, fq or own_fq, own_state if state is None else state
    optimizer = torch.optim.AdamW(own.parameters()) if optimizer is None else optimizer
    versions = [param._version for param in own.parameters()]
    groups = [dict(group) for group in getattr(optimizer, "param_groups", ())]
    assert_names(message_of(error, fqt.FakeQuantOptimizer, fq, optimizer, model, state, **given), *fragments)
    assert versions == [param._version for param in own.parameters()]
    for group, before in zip(getattr(optimizer, "param_groups", ()), groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], before["params"], strict=True))


EXPERT = "layers.0.mlp.experts.0.w1.weight"


def test_arguments_of_other_kinds_are_refused():
    _, fq, state = setup(fqt.FP8)
    refused(ValueError, "fq: found Spec, wanted fq_transforms.Transform", fq=fq.spec)
    refused(ValueError, "optimizer: found list, wanted torch.Optimizer", optimizer=[])
    refused(ValueError, "model: found dict, wanted torch.Module", model={})
    refused(ValueError, "seed: found 4294967296, wanted an int of 32 bits", seed=2**32)
    refused(ValueError, "seed: found 0.5", seed=0.5)
    refused(
        ValueError, "state_optimizer: found <class", "backward='pass_through', wanted None", state_optimizer=LEARN.func
    )
    lsq = fqt.transform(fq.spec, backward="lsq")
    refused(ValueError, "state_optimizer: found None with backward='lsq'", "functools.partial", fq=lsq)
    # Bug: such a factory was taken, and no scale was ever trained.
    refused(ValueError, "state_optimizer: found NoneType from it", fq=lsq, state_optimizer=lambda _: None)
    for wrong, count in (
        (lambda leaves: LEARN([leaf.detach() for leaf in leaves]), 0),
        (lambda some: LEARN(some[1:]), 2),
    ):
        refused(ValueError, f"an optimizer of {count} of the 3 leaves", fq=lsq, state_optimizer=wrong)
    refused(ValueError, "recalibrate: found one", fq=lsq, recalibrate=of, state_optimizer=LEARN)
    refused(KeyError, "layers.0.mlp.experts.*.w1.weight", "calibrate with this spec", state={})
    refused(
        ValueError,
        "found -1.0",
        state=fqt.state.unflatten({k: -torch.ones_like(v) for k, v in fqt.state.flatten(state).items()}, state),
    )


def test_tensors_that_do_not_belong_together_are_refused():
    model, _, _ = setup(fqt.FP8)
    other, _, _ = setup(fqt.FP8)
    refused(
        ValueError,
        "optimizer: found a tensor of shape (32, 32) in param group 0",
        "no parameter of the model",
        optimizer=torch.optim.SGD(other.parameters()),
    )
    wrapped = torch.nn.ModuleDict({"module": model})
    refused(
        ValueError,
        f"model: found no parameter '{EXPERT}'",
        "such as 'module.embed.weight'",
        "model.module",
        model=wrapped,
    )
    some = [param for name, param in model.named_parameters() if name != EXPERT]
    refused(
        ValueError, f"optimizer: found '{EXPERT}'", "in no param group", model=model, optimizer=torch.optim.SGD(some)
    )
    scheduled = torch.optim.SGD(model.parameters())
    torch.optim.lr_scheduler.ConstantLR(scheduled)
    refused(
        ValueError, "optimizer: found param group 0 with a learning rate scheduler", model=model, optimizer=scheduled
    )
    opt = make(*setup(fqt.FP8))
    refused(ValueError, "optimizer: found a FakeQuantOptimizer", optimizer=opt, model=opt.model)


def test_a_second_name_of_a_tied_weight_is_refused_with_the_first():
    """Bug: it was said not to be in the model, and to be looked for in a wrapper."""
    model = torch.nn.ModuleDict({"e": torch.nn.Embedding(10, 32), "h": torch.nn.Linear(32, 10, bias=False)})
    model["h"].weight = model["e"].weight
    params = dict(model.named_parameters(remove_duplicate=False))
    fq = fqt.transform(fqt.select(params, {"h.*": fqt.FP8}))
    refused(
        ValueError,
        "fq: found 'h.weight', which is tied to 'e.weight'",
        "select 'e.weight'",
        fq=fq,
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        state=fq.calibrate(params),
    )


def test_a_foreign_transform_is_refused():
    """Of another architecture, and of the same names with other shapes."""
    weights = {"other.weight": torch.ones(8, 32)}
    foreign = fqt.transform(fqt.select(weights, {"*": fqt.FP8}))
    refused(ValueError, "model: found no parameter 'other.weight'", fq=foreign, state=foreign.calibrate(weights))
    _, fq, _ = setup(fqt.FP8)
    weights = {name: torch.ones(8, 32) for group in fq.spec.groups for name in group.names}
    foreign = fqt.transform(fqt.select(weights, {"*": fqt.FP8}))
    refused(
        ValueError, EXPERT, "found shape (64, 32), the spec wants (8, 32)", fq=foreign, state=foreign.calibrate(weights)
    )


class Stubborn(torch.optim.SGD):
    """Has a state from the start, and loads none."""

    def __init__(self, params):
        super().__init__(params)
        for group in self.param_groups:
            self.state |= {param: {"momentum_buffer": torch.ones_like(param)} for param in group["params"]}

    def load_state_dict(self, state_dict):
        raise RuntimeError("no other state")


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, Stubborn], ids=lambda one: one.__name__)
def test_nothing_is_changed_where_the_trained_part_or_the_optimizer_is_refused(optimizer):
    """Bug: frozen weights were fake by then, and their unquantized values were gone."""
    model = torch.nn.ParameterDict({"a": torch.randn(32, 32), "b": torch.randn(32, 32)})
    model["a"].requires_grad_(False)
    if optimizer is not Stubborn:
        model["b"] = torch.nn.Parameter(torch.randn(32, 16).t())
    fq = fqt.transform(fqt.select(dict(model.items()), {"*": fqt.INT4_BLOCK32}))
    inner, before = optimizer([model["b"]]), {name: param.clone() for name, param in model.items()}
    state, groups = dict(inner.state), inner.param_groups
    error, message = (RuntimeError, "no other") if optimizer is Stubborn else (ValueError, "out 'b': found shape")
    assert message in message_of(error, fqt.FakeQuantOptimizer, fq, inner, model, fq.calibrate(before))
    same(dict(model.items()), before)
    assert inner.param_groups is groups
    assert groups[0]["params"][0] is model["b"]
    assert inner.state == state


def test_parameters_that_change_later_are_refused_at_the_step():
    """As accelerate's FSDP2 exchanges those of an optimizer, and as layers are unfrozen."""
    model, fq, state = setup()
    opt = make(model, fq, state)
    opt.param_groups[0]["params"][3] = torch.nn.Parameter(torch.zeros(2))
    assert_names(message_of(ValueError, opt.step), "param_groups: found other parameters")

    model, fq, state = setup()
    model.embed.weight.requires_grad_(False)
    opt = make(model, fq, state)
    model.embed.weight.requires_grad_(True)
    batch = batches_of(0)[0]
    loss_of(model(batch), batch).backward()
    assert_names(message_of(ValueError, opt.step), "parameter 'embed.weight': found a gradient", "frozen")
    message = message_of(ValueError, opt.add_param_group, {"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert_names(message, "add_param_group: found a new param group")
    assert_names(message_of(TypeError, copy.deepcopy, opt), "FakeQuantOptimizer: found a copy", "state_dict()")


def test_what_else_writes_the_parameters_is_no_fault_if_it_writes_the_same():
    """Bug: DDP made later copies rank 0's parameters to all, and the next write took them back: ranks drifted apart.

    So did weights that were loaded into the model.
    """
    model, fq, state = setup()
    opt = make(model, fq, state)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.clone())
    train(model, opt, 1)
    fqt.cast(opt.masters, out=model)
    assert_names(message_of(ValueError, opt.step), "found other values than the last write's", EXPERT, "write()")
    opt.write()
    train(model, opt, 1, first=1)
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    model.load_state_dict({name: param + 1 for name, param in model.state_dict().items()})
    assert_names(message_of(ValueError, opt.step), "load weights", "before the optimizer")
    same(opt.masters, before)
    model, fq, state = setup()
    opt = make(model, fq, state)
    model.load_state_dict(model.state_dict(), assign=True)
    assert_names(message_of(ValueError, opt.write), "found another tensor in the model")


def test_gradients_that_a_grad_scaler_has_not_seen_are_refused():
    """Bug: taken early they stayed scaled, and infinities among them were not found."""
    model, fq, state = setup()
    opt, scaler, batch = make(model, fq, state), torch.amp.GradScaler("cpu", init_scale=4.0), batches_of(0)[0]
    scaler.scale(loss_of(model(batch), batch)).backward()
    opt.take_grads()
    scaler.scale(loss_of(model(batch), batch)).backward()
    assert_names(message_of(ValueError, scaler.step, opt), "take_grads: found a call before the step of a GradScaler")


def test_a_step_after_one_that_a_grad_scaler_began_and_that_was_refused_is_a_plain_one():
    """Bug: the scale was left on the optimizer, so that gradients that were never scaled were divided by it."""
    (one, plain), (two, scaled) = ((m, make(m, fq, s, torch.optim.SGD, {"lr": 1.0})) for m, fq, s in (setup(), setup()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(two(batches_of(0)[0]), batches_of(0)[0])).backward()
    scaled.take_grads()
    message_of(ValueError, scaler.step, scaled)
    scaled.zero_grad()
    train(one, plain, 1)
    train(two, scaled, 1)
    same(scaled.masters, plain.masters)


def test_the_model_is_written_though_a_recalibration_fails():
    """Bug: the masters had stepped, the model had not, and their gradients were added to those of the next step."""

    def fails(step, masters, state):
        raise RuntimeError("no batches")

    model, fq, state = setup()
    opt = make(model, fq, state, recalibrate=fails)
    with pytest.raises(RuntimeError, match="no batches"):
        train(model, opt, 1)
    same(dict(model.named_parameters()), fake_weights(fq, opt.masters, state))
    assert all(master.grad is None for master in opt.masters.values())


def test_the_model_is_written_though_the_state_optimizer_fails():
    """Bug: the masters had stepped, the model had not, and the next step took the same gradients again."""
    model, fq, state = setup(fqt.FP8, "lsq")
    opt = make(model, fq, state, state_optimizer=torch.optim.SparseAdam)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        train(model, opt, 1)
    same(dict(model.named_parameters()), fake_weights(fq, opt.masters, opt.quantizer_state))
    assert all(tensor.grad is None for tensor in (*model.parameters(), *opt.masters.values()))
    assert opt.param_groups[0]["fake_quant_step"] == 1
    before = {name: master.detach().clone() for name, master in opt.masters.items()}
    opt.step()
    same(opt.masters, before)


def test_inputs_are_refused():
    """Only their weights would be quantized."""
    model, _, _ = setup()
    fq = fqt.transform(fqt.select(dict(model.named_parameters()), [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8)]))
    refused(ValueError, "FakeQuantOptimizer: found the inputs of", fq=fq)


def test_a_state_dict_that_does_not_fit_is_refused_before_anything_is_loaded():
    model, fq, state = setup(fqt.FP8)
    opt = make(model, fq, state)
    versions = [tensor._version for tensor in (*model.parameters(), *opt.masters.values())]
    plain = torch.optim.AdamW(model.parameters(), **ADAMW)
    saved = opt.state_dict()
    other = make(*setup(fqt.FP8, "lsq")).state_dict()
    for wrong, *fragments in (
        (plain.state_dict(), "state_dict: master of 'embed.weight': found NoneType, wanted a tensor"),
        (saved | {"state": saved["state"] | {0: {"master": torch.ones(2)}}}, "master of 'embed.weight': found (2,)"),
        (
            saved | {"quantizer": {"state": state, "frozen": {"x": torch.ones(2)}}},
            "master of 'x': found one, wanted none",
        ),
        (saved | {"quantizer": {"state": state | {"x": {}}}}, "unexpected groups", "'x'"),
        (other, "state_optimizer: found one with backward='pass_through'"),
        (saved | {"param_groups": saved["param_groups"] * 2}, "different number of parameter groups"),
    ):
        assert_names(message_of(ValueError, opt.load_state_dict, wrong), *fragments)
        assert versions == [tensor._version for tensor in (*model.parameters(), *opt.masters.values())]


@pytest.mark.parametrize("fails", ["state_optimizer", "optimizer", "model"])
def test_nothing_is_loaded_where_the_last_part_cannot_be(fails):
    """Bug: masters and the number of the step were those of the file, and the model was not written."""
    first, second = ((model, make(model, fq, state)) for model, fq, state in [setup(fqt.FP8, "lsq") for _ in range(2)])
    train(*first, 1)
    saved, (model, opt), error = first[1].state_dict(), second, ValueError
    if fails == "state_optimizer":
        saved["quantizer"]["optimizer"]["param_groups"] *= 2
    elif fails == "optimizer":
        opt.optimizer.load_state_dict = partial(Stubborn.load_state_dict, opt.optimizer)
        error = RuntimeError
    else:
        model.load_state_dict(model.state_dict(), assign=True)
    tensors = [*model.parameters(), *opt.masters.values(), *fqt.state.flatten(opt.quantizer_state).values()]
    versions = [tensor._version for tensor in tensors]
    message_of(error, opt.load_state_dict, saved)
    assert versions == [tensor._version for tensor in tensors]
    assert opt.param_groups[0]["fake_quant_step"] == 0
    assert not opt.optimizer.state
    assert not opt.state_optimizer.state


def test_its_repr_says_what_is_inside():
    assert_names(
        repr(make(*setup())), "FakeQuantOptimizer (", "lr: 0.003", "Transform(3 groups", "masters of AdamW: 18"
    )


# Wrappers, in real processes. Both ranks have the same batches, so that means of gradients are exact.


def whole(tensors):
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for name, t in tensors.items()}


def wide_batches(step):
    return [tokens(4, 8, seed=MICROBATCHES * step + i) for i in range(MICROBATCHES)]


def steps_of(model, opt, steps):
    for step in steps:
        for batch in wide_batches(step):
            loss_of(model(batch), batch).backward()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            model(wide_batches(step)[0])  # FSDP2's root stays gathered after it


def wrapped(kind, size, folder):
    """Three steps, a checkpoint of DCP, another three; and the checkpoint in new objects, and three."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as names
    from torch.distributed.fsdp import fully_shard

    found = []
    for is_resumed in (False, True):
        inner, fq, state = setup(fqt.INT4_BLOCK32)
        model = inner
        if kind == "FSDP2":
            mesh = torch.distributed.init_device_mesh("cpu", (size,))
            for layer in inner.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(inner, mesh=mesh)
            state = fq.calibrate(dict(inner.named_parameters()))
        opt = fqt.FakeQuantOptimizer(fq, torch.optim.AdamW(inner.parameters(), **ADAMW), inner, state, seed=1)
        if kind == "DDP":
            model = torch.nn.parallel.DistributedDataParallel(inner)
        if is_resumed:
            saved = names.get_optimizer_state_dict(inner, opt)
            dcp.load(saved, checkpoint_id=folder)
            names.set_optimizer_state_dict(inner, opt, saved)
        else:
            steps_of(model, opt, range(3))
            if kind == "FSDP2":
                inner.reshard()  # DCP wants parameters that are sharded
            dcp.save(names.get_optimizer_state_dict(inner, opt), checkpoint_id=folder)
        steps_of(model, opt, range(3, 6))
        found.append(whole(opt.masters))
    return found


def on_each_rank(rank, size, kind, folder):
    return wrapped(kind, size, folder)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["FSDP2", "DDP"])
def test_wrappers_give_the_masters_of_one_process_and_resume(kind, ranks, tmp_path):
    model, fq, state = setup(fqt.INT4_BLOCK32)
    if kind == "FSDP2":
        state = fq.calibrate(dict(model.named_parameters()))
    opt = make(model, fq, state, seed=1)
    steps_of(model, opt, range(6))
    for straight, resumed in ranks(on_each_rank, kind, tmp_path, size=2):
        same(straight, whole(opt.masters))
        same(resumed, straight)
