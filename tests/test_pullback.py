"""Gradients of fake weights back to masters, without moving any: `pullback`."""

import optree
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.func import grad, jvp, vjp, vmap

import fq_transforms as fqt
from tests.cases import assert_names, message_of, name_of
from tests.lens import (
    BF16,
    FP16,
    FP32,
    LAYOUTS,
    assert_same,
    assert_untouched,
    dtypes_of,
    gradients,
    lower,
    mesh,  # noqa: F401 (a fixture)
    on_each_case,
    parameters,
    record,
    setup,
    targets,
    transform_of,
)

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_rule = pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])

# Dynamo makes an instance of an autograd.Function when it traces one, and PyTorch warns that nobody should.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def rules_of(format):
    return ["pass_through", "clip"] + ["lsq"] * (not format.is_stateless)


def by_vjp(fq, masters, state, grads):
    """What autograd gives: of masters and of the state, with a cotangent of zeros where there is no gradient."""
    dtypes = {g.dtype for g in grads.values() if g is not None}
    (dtype,) = dtypes
    fq = fqt.transform(fq.spec, backward=fq.backward, out_dtype=dtype)
    masters = {name: m.detach() for name, m in masters.items()}
    out, pull = vjp(lambda m, s: {n: w.to(dtype) for n, w in fq.fakequant(m, s).items()}, masters, state)
    return pull({n: torch.zeros_like(w) if grads.get(n) is None else grads[n] for n, w in out.items()})


@on_each_case
def test_the_pullback_is_that_of_fakequant(format, layout, device):
    """Bit for bit what `vjp` gives, for gradients of every dtype, NaN and infinities among them; and it is pure."""
    for backward in rules_of(format):
        masters, fq, state = setup(format, backward, layout, device)
        for dtype in dtypes_of(format, device):
            grads = gradients(masters, dtype)
            for g in grads.values():
                g.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: g.numel()]
            before = record(masters, state, grads)
            found, of_state = fq.pullback(masters, state, grads)
            wanted, wanted_of_state = by_vjp(fq, masters, state, grads)
            assert_same(found, wanted)
            assert all(g.dtype == FP32 for g in found.values())
            if backward == "lsq":
                assert_same(fqt.state.flatten(of_state), fqt.state.flatten(wanted_of_state))
                assert list(of_state) == list(state)
            else:
                assert of_state == {}
            assert_untouched(before)


@every_rule
def test_nan_passes_through(backward):
    """A gradient that is NaN within the range is NaN of the master, and nowhere else."""
    masters, fq, state = setup(backward=backward)
    masters["experts.0.w1"][0, :2] = torch.tensor([0.01, 0.02])
    grads = {name: torch.ones_like(m) for name, m in masters.items()}
    grads["experts.0.w1"][0, 1] = grads["gain"][()] = torch.nan
    found, _ = fq.pullback(masters, state, grads)
    assert {name: int(g.isnan().sum()) for name, g in found.items() if g.isnan().any()} == {
        "experts.0.w1": 1,
        "gain": 1,
    }
    assert found["experts.0.w1"][0, 1].isnan()


@every_layout
@every_rule
def test_none_stays_none(layout, backward):
    """Of an expert without tokens, of a group without, of all: the others' gradients are as with zeros in its place."""
    masters, fq, state = setup(backward=backward, layout=layout)
    names = list(masters)
    w2 = {name for name in names if name.endswith("w2")}
    for without in ({"experts.1.w1", "gain"}, w2, {names[0]}, set(names)):
        grads = {name: None if name in without else g for name, g in gradients(masters).items()}
        found, of_state = fq.pullback(masters, state, grads)
        assert list(found) == names
        assert {name for name in names if found[name] is None} == {name for name in names if grads[name] is None}
        if without != set(names):
            wanted, wanted_of_state = by_vjp(fq, masters, state, grads)
            assert_same(
                {n: g for n, g in found.items() if g is not None}, {n: wanted[n] for n in names if grads[n] is not None}
            )
        if backward == "lsq":
            assert of_state.keys() == state.keys()
            for key, leaves in of_state.items():
                assert leaves.keys() == {"amax"}
                live = any(
                    grads[name] is not None for group in fq.spec.groups if group.key == key for name in group.names
                )
                assert (leaves["amax"] is not None) == live
                assert leaves["amax"] is None or torch.equal(leaves["amax"], wanted_of_state[key]["amax"])


@every_rule
def test_some_gradients_in_several_dtypes(backward):
    """Any names of masters, in any order and dtype within a group: each is pulled back as it would be alone in fp32."""
    masters, fq, state = setup(backward=backward)
    dtypes = {
        "experts.2.w1": BF16,
        "norm.weight": FP16,
        "experts.0.w1": FP32,
        "experts.1.w1": FP16,
        "experts.0.w2": BF16,
    }
    grads = {name: torch.randn(masters[name].shape).to(dtype) for name, dtype in dtypes.items()}
    found, of_state = fq.pullback(masters, state, grads)
    wanted, wanted_of_state = by_vjp(fq, masters, state, {name: g.float() for name, g in grads.items()})
    assert_same(found, {name: wanted[name] for name in grads})
    assert all(torch.equal(leaf["amax"], wanted_of_state[key]["amax"]) for key, leaf in of_state.items())
    assert fq.pullback(masters, state, {})[0] == {}


@every_rule
def test_gradients_and_masters_that_are_not_contiguous(backward):
    """Transposed, expanded and strided ones give what their copies give."""
    masters, fq, state = setup(backward=backward)
    masters["experts.2.w1"] = masters["experts.2.w1"].mT.contiguous().mT
    grads = gradients(masters)
    grads["experts.0.w1"] = torch.tensor(0.3, dtype=BF16).expand(24, 128)
    grads["experts.1.w1"] = torch.randn(128, 24).bfloat16().mT
    grads["experts.2.w2"] = torch.randn(7, 512).bfloat16()[:, ::2]
    grads["norm.weight"] = torch.ones((), dtype=BF16).expand(131)
    dense = [{name: t.contiguous() for name, t in tree.items()} for tree in (masters, grads)]
    for pulled, wanted in zip(fq.pullback(masters, state, grads), fq.pullback(dense[0], state, dense[1]), strict=True):
        assert optree.tree_all(optree.tree_map(torch.equal, pulled, wanted))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_gradients_are_in_the_dtype_of_the_masters(dtype):
    """Of masters in bf16 too; by the same mask as in fp32."""
    masters, fq, state = setup()
    masters = {name: m.to(dtype) for name, m in masters.items()}
    for grads in (gradients(masters), gradients(masters, FP32)):
        found, _ = fq.pullback(masters, state, grads)
        wide, _ = fq.pullback({name: m.float() for name, m in masters.items()}, state, grads)
        assert_same(found, {name: g.to(dtype) for name, g in wide.items()})


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", BF16)])
def test_the_pullback_in_a_context(context):
    """The same bits; and with masters and state that are leaves, no graph is kept."""
    masters, fq, state = setup(backward="lsq")
    grads = gradients(masters)
    wanted, wanted_of_state = fq.pullback(masters, state, grads)
    masters, state = optree.tree_map(lambda t: t.requires_grad_(), (masters, state))
    with context():
        found, of_state = fq.pullback(masters, state, grads)
    eager, _ = fq.pullback(masters, state, grads)
    assert not any(g.requires_grad for g in (*found.values(), *eager.values()))
    found, of_state = optree.tree_map(torch.clone, (found, of_state))
    assert_same(found, wanted)
    assert_same(fqt.state.flatten(of_state), fqt.state.flatten(wanted_of_state))


@every_layout
@pytest.mark.parametrize("format", [fqt.INT8, fqt.NVFP4, fqt.MXFP4], ids=name_of)
@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_the_pullback_is_linear_in_the_gradients(layout, format, backward):
    """So it is its own pullback: by `.backward()`, `grad`, `vjp` twice, `jvp`, `vmap`, and of an expanded cotangent."""
    masters, fq, state = setup(format, backward, layout)
    grads, other = gradients(masters, FP32), gradients(masters, FP32)

    def pull(g):
        return fq.pullback(masters, state, g)[0]

    wanted = pull(other)
    found, back = vjp(pull, grads)
    assert_same(found, pull(grads))
    assert_same(back(other)[0], wanted)
    assert_same(back(other)[0], wanted)
    expanded = {name: torch.ones(()).expand(m.shape) for name, m in masters.items()}
    assert_same(back(expanded)[0], pull({name: torch.ones_like(m) for name, m in masters.items()}))

    def dot(g):
        return sum((pulled * other[name]).sum() for name, pulled in pull(g).items())

    assert_same(grad(dot)(grads), wanted)
    leaves = {name: g.clone().requires_grad_() for name, g in grads.items()}
    dot(leaves).backward()
    assert_same({name: leaf.grad for name, leaf in leaves.items()}, wanted)
    assert_same(jvp(pull, (grads,), (other,))[1], wanted)
    both = vmap(pull)({name: torch.stack([g, other[name]]) for name, g in grads.items()})
    assert_same({name: g[1] for name, g in both.items()}, wanted)


def test_what_does_not_fit_is_refused():
    """A gradient of no master, of another shape, dtype or device, a state without a group, by their names."""
    for backward in ("pass_through", "clip", "lsq"):
        masters, fq, state = setup(backward=backward)
        grads = gradients(masters)
        wrong = [
            (KeyError, {"another": torch.ones(2)}, ["'another'"]),
            (ValueError, {"experts.1.w2": torch.ones(256, 7)}, ["'experts.1.w2'", "(256, 7)", "(7, 256)"]),
            (ValueError, {"gain": torch.ones(1)}, ["'gain'", "(1,)", "()"]),
            (ValueError, {"experts.1.w2": torch.ones(7, 256).double()}, ["'experts.1.w2'", "float64"]),
            (ValueError, {"norm.weight": torch.ones(131).int()}, ["'norm.weight'", "int32"]),
            (ValueError, {"experts.1.w2": torch.ones(7, 256, device="meta")}, ["'experts.1.w2'", "meta", "cpu"]),
        ]
        for error, replaced, fragments in wrong:
            assert_names(message_of(error, fq.pullback, masters, state, grads | replaced), *fragments)
        lacking = {key: leaves for key, leaves in state.items() if not key.endswith("w2")}
        assert_names(message_of(KeyError, fq.pullback, masters, lacking, grads), "'experts.*.w2'")
        lacking = {name: m for name, m in masters.items() if name != "experts.1.w2"}
        assert_names(message_of(KeyError, fq.pullback, lacking, state, grads), "'experts.1.w2'")


@every_rule
def test_gradients_of_dtensors(backward, mesh):  # noqa: F811
    """Placed as their masters are, also where they came as parts of a sum, or None; a plain gradient is refused."""
    plain, fq, plain_state = setup(backward=backward)
    del plain["gain"]
    grads = gradients(plain)
    wanted, wanted_of_state = fq.pullback(plain, plain_state, grads)
    masters = {name: distribute_tensor(m, mesh, [Shard(0)]) for name, m in plain.items()}
    state = fq.calibrate(masters)
    for key, found in state.items():
        found["amax"].to_local().copy_(plain_state[key]["amax"])
    sharded = {name: distribute_tensor(g, mesh, [Shard(0)]) for name, g in grads.items()}
    parts = {name: DTensor.from_local(g, mesh, [Partial()]) for name, g in grads.items()}
    for given in (sharded, parts, parts | {"experts.1.w1": sharded["experts.1.w1"]}):
        found, of_state = fq.pullback(masters, state, given)
        assert all(g.placements == (Shard(0),) for g in found.values())
        assert_same({name: g.to_local() for name, g in found.items()}, wanted)
        of_state = {name: leaf.full_tensor() for name, leaf in fqt.state.flatten(of_state).items()}
        assert_same(of_state, fqt.state.flatten(wanted_of_state))
    assert fq.pullback(masters, state, {"experts.1.w1": None})[0] == {"experts.1.w1": None}
    for name in ("experts.1.w1", "norm.weight"):
        assert_names(message_of(ValueError, fq.pullback, masters, state, sharded | {name: grads[name]}), repr(name))


@pytest.mark.parametrize(
    ("format", "device"),
    [(fqt.INT8, "cpu"), *(pytest.param(format, "cuda", marks=pytest.mark.gpu) for format in (fqt.INT8, fqt.NVFP4))],
    ids=name_of,
)
def test_a_compiled_step_writes_and_pulls_back(format, device):
    """One graph: the write, gradients, the pullback and an update, as eager, bit for bit, with versions counted up."""
    torch.compiler.reset()
    names = ["experts.0.w1", "experts.1.w1", "norm.weight"]
    masters = {name: parameters(device=device)[name] for name in names}
    # Inductor leaves out the rounding to bf16 between operations that it fuses, also where nothing is ours.
    masters["norm.weight"] = masters["norm.weight"].bfloat16().float()
    fq = transform_of(masters, format, backward="clip")
    state = lower(fq.calibrate(masters))
    x = torch.randn(128, device=device, dtype=BF16)

    def step(masters, state, out):
        fq.fakequant(masters, state, out=out)
        grads = {name: w * 2 for name, w in out.items()} | {"experts.0.w1": x.expand(24, 128)}
        pulled, _ = fq.pullback(masters, state, grads)
        return {name: m - 0.25 * pulled[name] for name, m in masters.items()}

    out, eager_out = ({name: targets("separate", BF16, device)[name] for name in names} for _ in range(2))
    wanted = step(masters, state, eager_out)
    versions = {name: t._version for name, t in out.items()}
    before = record(masters, state)
    backend = "inductor" if device == "cuda" else "aot_eager"
    found = torch.compile(step, fullgraph=True, backend=backend)(masters, state, out)
    assert_same(out, eager_out)
    assert_same(found, wanted)
    assert all(t._version > versions[name] for name, t in out.items())
    assert_untouched(before)
    with pytest.raises(Exception, match="inplace"):  # the compiler wraps errors in its own
        torch.compile(lambda m, s: fq.fakequant(m, s, out=m), backend=backend, fullgraph=True)(masters, state)
    assert_untouched(before)


def test_gradients_without_addresses_are_cast_by_torch():
    """Kills a kernel that is given what torch.compile and export trace with, on a GPU or as if there were one."""
    names = [f"experts.{e}.w" for e in range(4)]
    fq = fqt.transform(fqt.select({name: torch.empty(32, 64) for name in names}, {"*": fqt.FP8}))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        masters = {name: torch.empty(32, 64) for name in names}
        grads = {name: torch.empty(32, 64, dtype=torch.bfloat16) for name in names}
        pulled, _ = fq.pullback(masters, {"experts.*.w": {"amax": torch.empty(4)}}, grads)
    assert all(grad.dtype == torch.float32 and grad.shape == (32, 64) for grad in pulled.values())
