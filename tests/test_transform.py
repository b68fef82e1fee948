"""The contract of the whole: pure functions on parameter dicts that compose with functional_call and torch.func."""

import copy
import multiprocessing
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from inspect import signature

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call, grad, vjp, vmap

import fq_transforms as fqt
from fq_transforms import methods
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import ALL_FORMATS, CORE_FORMATS, message_of, name_of

every_format = pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)


class MoE(torch.nn.Module):
    """Four experts, top-2, 128 wide; `norm` and `router` are not to be quantized."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(128)
        self.router = torch.nn.Linear(128, 4, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(4))

    def forward(self, x):
        x = self.norm(x)
        weight, chosen = self.router(x).softmax(-1).topk(2)
        return sum((weight * (chosen == e)).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(self.experts))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MoE()
    with torch.no_grad():
        for e, expert in enumerate(model.experts):
            expert.weight *= 2.0**e
    return model


@pytest.fixture
def params(model):
    return dict(model.named_parameters())


def transform_of(params, format, **options):
    return fqt.transform(fqt.select(params, {"experts.*": format}), **options)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_fakequant_replaces_selected_entries_and_nothing_else(params, format):
    """A new dict in the same order: selected weights are new tensors, the others the same objects, no input written."""
    fq = transform_of(params, format)
    before = {name: (p.detach().clone(), p._version) for name, p in params.items()}
    state = fq.calibrate(params)
    leaves = copy.deepcopy(state)
    weights = fq.fakequant(params, state)
    assert list(weights) == list(params)
    for name, param in params.items():
        is_selected = name.startswith("experts.") and name.endswith("weight")
        assert (weights[name] is not param) == is_selected
        assert torch.equal(param, before[name][0])
        assert param._version == before[name][1]
        if is_selected:
            expert = int(name.split(".")[1])
            (group,) = state.values()
            amax, global_amax = (group[leaf][expert] if leaf in group else None for leaf in ("amax", "global_amax"))
            wanted = fake_quantize_reference(param, amax, global_amax, format=format, out_dtype=torch.float32)
            assert torch.equal(weights[name], wanted)
    assert optree.tree_all(optree.tree_map(torch.equal, state, leaves))


@every_format
def test_functional_call_gives_gradients_to_master_weights(model, params, format):
    """Through functional_call, .backward() and grad agree, and reach every expert, the router and the norm."""
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    x = torch.randn(64, 128)

    def loss(p):
        return functional_call(model, fq.fakequant(p, state), (x,)).square().mean()

    gradients = grad(loss)({name: p.detach() for name, p in params.items()})
    loss(params).backward()
    for name, param in params.items():
        assert param.grad.abs().sum() > 0, name
        torch.testing.assert_close(param.grad, gradients[name])


@every_format
def test_one_pullback_for_many_microbatches(model, params, format):
    """The README's recipe: quantize once a step, accumulate over microbatches, pull back once."""
    fq = transform_of(params, format, backward="clip")
    primals = {name: p.detach() for name, p in params.items()}
    state = fq.calibrate(primals)
    state = optree.tree_map(lambda amax: amax * 0.8, state)
    microbatches = torch.randn(3, 16, 128)

    weights, pullback = vjp(lambda p: fq.fakequant(p, state), primals)
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    for x in microbatches:
        functional_call(model, weights, (x,)).square().mean().backward()
    (accumulated,) = pullback({name: w.grad for name, w in weights.items()})

    def loss(p):
        return sum(functional_call(model, fq.fakequant(p, state), (x,)).square().mean() for x in microbatches)

    torch.testing.assert_close(accumulated, grad(loss)(primals))


@every_format
def test_batch_of_states_by_vmap(model, params, format):
    """Logits under a batch of states, one vmap over the state pytree, equal a loop over states."""
    fq = transform_of(params, format)
    primals = {name: p.detach() for name, p in params.items()}
    state = fq.calibrate(primals)
    if not fqt.state.flatten(state):
        return
    x = torch.randn(8, 128)
    factors = (1.0, 0.5, 0.25)
    states = optree.tree_map(lambda amax: torch.stack([amax * f for f in factors]), state)
    found = vmap(lambda s: functional_call(model, fq.fakequant(primals, s), (x,)))(states)
    for i in range(len(factors)):
        one = optree.tree_map(lambda leaf, i=i: leaf[i], states)
        torch.testing.assert_close(found[i], functional_call(model, fq.fakequant(primals, one), (x,)))


@every_format
def test_ensemble_by_vmap_over_parameters(params, format):
    """Calibrate and fakequant over a batch of whole parameter dicts equal a loop, NaN checks notwithstanding."""
    primals = {name: p.detach() for name, p in params.items()}
    fq = transform_of(primals, format)
    batch = {name: torch.stack([p, p * 2]) for name, p in primals.items()}
    found = vmap(lambda p: fq.fakequant(p, fq.calibrate(p)))(batch)
    for i in range(2):
        one = {name: p[i] for name, p in batch.items()}
        wanted = fq.fakequant(one, fq.calibrate(one))
        assert all(torch.equal(found[name][i], wanted[name]) for name in wanted)


def test_one_step_from_master_weights(params):
    """out_dtype: fp32 parameters give bf16 experts, equal to the fp32 result rounded once; the others keep theirs."""
    fq, fq_bf16 = (transform_of(params, fqt.INT8, out_dtype=dtype) for dtype in (None, torch.bfloat16))
    state = fq.calibrate(params)
    found, wanted = fq_bf16.fakequant(params, state), fq.fakequant(params, state)
    assert torch.equal(found["experts.0.weight"], wanted["experts.0.weight"].bfloat16())
    assert found["norm.weight"].dtype == torch.float32


@every_format
def test_calibration_is_a_fold(params, format):
    """Merge over calibrations of changing weights, from init on, is the calibration of their envelope."""
    fq = transform_of(params, format)
    steps = [{name: p.detach() * f for name, p in params.items()} for f in (0.5, 3.0, 1.0)]
    state = fq.init(params)
    for step in steps:
        state = fqt.merge(state, fq.calibrate(step))
    assert optree.tree_all(optree.tree_map(torch.equal, state, fq.calibrate(steps[1])))


def test_per_expert_scales_do_not_mix(params):
    """Changing one expert changes that expert's amax and result, bit for bit nobody else's."""
    fq = transform_of(params, fqt.NVFP4)
    state = fq.calibrate(params)
    changed = params | {"experts.2.weight": params["experts.2.weight"].detach() * 1000}
    other = fq.calibrate(changed)
    before, after = fq.fakequant(params, state), fq.fakequant(changed, other)
    for e in range(4):
        same = torch.equal(before[f"experts.{e}.weight"], after[f"experts.{e}.weight"])
        assert same == (e != 2)


def test_a_state_elsewhere_is_refused(params):
    """A state on another device than its weights says how to move it."""
    fq = transform_of(params, fqt.INT8)
    state = fq.calibrate(params)
    with pytest.raises(ValueError, match="found on meta, wanted on cpu as its weights; move it with optree.tree_map"):
        fq.fakequant(params, optree.tree_map(lambda leaf: leaf.to("meta"), state))


def test_uncalibrated_state_is_refused(params):
    """The identity of merge is no state to quantize with: not zeros in silence, but an error with the way out."""
    fq = transform_of(params, fqt.INT8)
    with pytest.raises(ValueError, match="never calibrated; call calibrate"):
        fq.fakequant(params, fq.init(params))


def test_meta_parameters_go_through(params):
    """Both init and fakequant run on meta tensors: shapes without memory, for planning and for loading."""
    meta = {name: p.detach().to("meta") for name, p in params.items()}
    for format in CORE_FORMATS:
        fq = transform_of(meta, format)
        state = fq.init(meta)
        assert all(leaf.is_meta for leaf in fqt.state.flatten(state).values())
        assert fq.fakequant(meta, state)["experts.0.weight"].shape == (128, 128)


INPUTS = fqt.Rule("experts.*", fqt.FP8, fqt.FP8)

# Option -> (format or rule, wrong value, what the error says)
WRONG_OPTIONS = {
    "spec, rules": (fqt.FP8, {"spec": {"*": fqt.FP8}}, "spec: found dict, wanted a Spec; call transform(select("),
    "method, by name": (fqt.FP8, {"method": "mse"}, "method: found 'mse', wanted Max(), Percentile(p), Mse() or Four"),
    "method, a class": (fqt.FP8, {"method": methods.Mse}, "method: found <class 'fq_transforms.methods.Mse'>, wanted"),
    "method, without a static amax": (fqt.MXFP8, {"method": methods.Mse()}, "method Mse: found MXFP8 for group"),
    "method, of another format": (fqt.INT8, {"method": methods.FourOverSix()}, "method FourOverSix: found INT8 for"),
    "backward": (fqt.FP8, {"backward": "clp"}, "backward: found 'clp', wanted 'pass_through', 'clip' or 'lsq'"),
    "backward, unhashable": (fqt.FP8, {"backward": ["clip"]}, "backward: found ['clip'], wanted 'pass_through', 'cl"),
    "backward, inputs": (INPUTS, {"backward": "lsq"}, "backward 'lsq': found the inputs of 1 groups, such as 'experts"),
    "backward, nothing to learn": (fqt.MXFP4, {"backward": "lsq"}, "backward 'lsq': found MXFP4 only, wanted a form"),
    "out_dtype": (fqt.FP8, {"out_dtype": torch.float64}, "out_dtype: found torch.float64, wanted bfloat16, float16 or"),
    "out_dtype, by name": (fqt.FP8, {"out_dtype": "bf16"}, "out_dtype: found bf16, wanted bfloat16, float16 or float"),
    "separate": (fqt.FP8, {"separate": 1}, "separate: found 1, wanted True or False"),
}


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_a_wrong_option_is_refused_when_the_transform_is_made(params, option):
    """Not when it is used: by `transform`, by `Transform` and by `dataclasses.replace`, in the same words."""
    format, options, message = WRONG_OPTIONS[option]
    spec = fqt.select(params, [format] if isinstance(format, fqt.Rule) else {"experts.*": format})
    right = fqt.transform(spec)
    for make in (fqt.transform, fqt.Transform, partial(replace, right)):
        assert message in message_of(ValueError, make, **{"spec": spec, **options})


def test_every_option_has_a_wrong_value_above():
    """A new option comes with its check."""
    assert {f.name for f in fields(fqt.Transform)} == {option.split(",")[0] for option in WRONG_OPTIONS}
    assert list(signature(fqt.transform).parameters) == [*(f.name for f in fields(fqt.Transform)), "layout"]


OPTIONS = {
    "method": methods.Percentile(99.0),
    "backward": "clip",
    "out_dtype": torch.bfloat16,
    "separate": True,
}


def test_a_transform_is_a_value(params):
    """Frozen, equal and hashed by what is in it, and whole after a pickle: the same on every rank, a key of a cache."""
    spec = fqt.select(params, {"experts.*": fqt.FP8})
    fq = fqt.transform(spec, **OPTIONS)
    again = pickle.loads(pickle.dumps(fq))
    assert again == fq == fqt.Transform(spec, **OPTIONS) == copy.deepcopy(fq)
    assert hash(again) == hash(fq)
    assert {name: getattr(again, name) for name in OPTIONS} == OPTIONS
    for name in OPTIONS:
        others = {other: value for other, value in OPTIONS.items() if other != name}
        assert fqt.transform(spec, **others) != fq
    with pytest.raises(FrozenInstanceError):
        fq.backward = "lsq"
    with pytest.raises(TypeError):
        fqt.Transform(spec, methods.MAX)  # options are keywords


def test_it_prints_in_a_line_and_as_a_table(params):
    """`repr` has what differs from the defaults; `str` the table of the spec and every option."""
    spec = fqt.select(params, {"experts.*": fqt.FP8})
    summary = "1 group, 4 weights: 98.1 % of 66,816 parameters"
    assert repr(fqt.transform(spec)) == f"Transform({summary})"
    assert repr(fqt.transform(spec, backward="clip")) == f"Transform({summary}; backward='clip')"
    page = fqt.transform(spec, backward="clip")._repr_html_()
    assert page.startswith("<div")
    assert "backward=&#x27;clip&#x27;" in page
    lines = str(fqt.transform(spec, **OPTIONS)).splitlines()
    assert lines[:-1] == str(spec).splitlines()
    assert lines[-1] == "method=Percentile(percentile=99.0), backward='clip', out_dtype=torch.bfloat16, separate=True"


def transforms(params):
    """Formats with one leaf, with two and with none, and every option."""
    return [
        transform_of(params, fqt.NVFP4_STATIC, method=methods.Mse(), backward="clip", out_dtype=torch.bfloat16),
        transform_of(params, fqt.INT8_PER_CHANNEL, method=methods.Percentile(99.0), backward="lsq", separate=True),
        transform_of(params, fqt.MXFP4),
    ]


def in_a_process(pickled, params, connection):
    """What is unpickled equals what is made here, and is found in a dict, though strings hash otherwise here."""
    fqs, own = pickle.loads(pickled), transforms(params)
    same = fqs == own and [{fq: 1}.get(other) for fq, other in zip(own, fqs, strict=True)] == [1] * len(own)
    values = [{name: w.tolist() for name, w in fq.fakequant(params, fq.calibrate(params)).items()} for fq in fqs]
    connection.send((same, values))


@pytest.mark.dist
def test_it_goes_to_a_spawned_process(params):
    """A process that has only the pickle has an equal Transform of an equal hash, which computes the same numbers."""
    params = {name: p.detach() for name, p in params.items()}
    fqs = transforms(params)
    ours, theirs = multiprocessing.Pipe()
    arguments = (pickle.dumps(fqs), params, theirs)
    process = torch.multiprocessing.get_context("spawn").Process(target=in_a_process, args=arguments)
    process.start()
    assert ours.poll(120)
    same, found = ours.recv()
    process.join(10)
    assert same
    wanted = [fq.fakequant(params, fq.calibrate(params)) for fq in fqs]
    assert found == [{name: w.tolist() for name, w in weights.items()} for weights in wanted]


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_parameter_among_plain_ones_is_refused(params, mesh):
    """A DTensor has no address of its own: it is named, and never reaches a kernel beside plain tensors.

    Under vjp it is wrapped, and no instance of DTensor any more; it is refused there too.
    """
    primals = {name: p.detach() for name, p in params.items()}
    fq = transform_of(primals, fqt.FP8)
    state = fq.calibrate(primals)
    sharded = primals | {"experts.1.weight": distribute_tensor(primals["experts.1.weight"], mesh, [Shard(0)])}
    calls = {
        "init": lambda: fq.init(sharded),
        "calibrate": lambda: fq.calibrate(sharded),
        "fakequant": lambda: fq.fakequant(sharded, state),
        "vjp": lambda: vjp(lambda p: fq.fakequant(p, state), sharded),
        "grad": lambda: grad(lambda p: fq.fakequant(p, state)["experts.1.weight"].sum())(sharded),
    }
    for call in calls.values():
        with pytest.raises(
            ValueError, match="'experts.1.weight': found a DTensor .* wanted a plain tensor as 'experts.0"
        ):
            call()


def test_one_unreadable_leaf_does_not_hide_another(params):
    """A bad amax on the CPU is found beside a group on meta."""
    both = {"a.weight": torch.ones(4, 128), "b.weight": torch.ones(4, 128, device="meta")}
    fq = fqt.transform(fqt.select(both, {"*": fqt.FP8}))
    state = fq.init(both)
    state["a.weight"] = {"amax": torch.tensor([-1.0])}
    with pytest.raises(ValueError, match="found -1.0 for 'a.weight'"):
        fq.fakequant(both, state)


def test_amax_never_gets_a_gradient(params):
    """Not even where it asks for one and the weights do not."""
    frozen = {name: p.detach() for name, p in params.items()}
    fq = transform_of(frozen, fqt.INT8)
    state = optree.tree_map(lambda amax: amax.clone().requires_grad_(), fq.calibrate(frozen))
    out = fq.fakequant(frozen, state)["experts.0.weight"]
    if out.requires_grad:
        out.sum().backward()
    assert all(leaf.grad is None for leaf in fqt.state.flatten(state).values())
