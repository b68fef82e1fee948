"""Masters in fp32, the cast that writes them back, and what no write takes. The write itself: test_write.py."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import grad, jvp, vjp, vmap

import fq_transforms as fqt
from tests.cases import assert_names, message_of, name_of
from tests.lens import (
    BF16,
    FP16,
    FP32,
    LAYOUTS,
    Tied,
    assert_same,
    assert_untouched,
    leaves,
    mesh,  # noqa: F401 (a fixture)
    parameters,
    record,
    targets,
    transform_of,
    written,
)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_are_leaves_in_fp32_with_memory_of_their_own(layout, dtype):
    """Of fp32 parameters too, whose `.float()` would be the parameter itself; and what is written is not read."""
    params = leaves(parameters(layout, dtype))
    before = record(params)
    with torch.no_grad():  # where models are often made
        masters = fqt.masters(params)
    assert_same(masters, {name: p.float() for name, p in params.items()})
    for name, master in masters.items():
        assert master.is_leaf
        assert master.requires_grad
        assert master.untyped_storage().data_ptr() != params[name].untyped_storage().data_ptr()
        master.data.fill_(7.0)
    assert_untouched(before)


def test_masters_share_what_is_neither_selected_nor_in_need_of_a_copy():
    """With fq: fp32 and frozen entries are the same objects, selected and trained bf16 ones never."""
    params = leaves(parameters())
    params["gain"] = torch.nn.Parameter(params["gain"].bfloat16())
    params["frozen"] = torch.nn.Parameter(torch.ones(2, dtype=BF16), requires_grad=False)
    params["experts.2.w1"].requires_grad_(False)
    masters = fqt.masters(params, fq=transform_of(params, fqt.INT8))
    assert list(masters) == list(params)
    assert {name for name in params if masters[name] is params[name]} == {"norm.weight", "frozen"}
    assert (masters["gain"].dtype, masters["frozen"].dtype) == (FP32, BF16)
    assert {name for name, master in masters.items() if not master.requires_grad} == {"frozen", "experts.2.w1"}
    storages = {p.untyped_storage().data_ptr() for p in params.values()}
    assert all(m.untyped_storage().data_ptr() not in storages for n, m in masters.items() if n.startswith("experts"))


def test_masters_of_frozen_parameters():
    """fp32 like all others, so that a group has one dtype; with `fq`, a group that is frozen whole keeps its own."""
    params = {f"experts.{i}.w": torch.nn.Parameter(torch.ones(2, 2, dtype=BF16), i == 2) for i in range(3)}
    params |= {"a": torch.ones(2, 2, dtype=BF16), "i": torch.ones(2, dtype=torch.int8)}
    fq = fqt.transform(fqt.select(params, {"experts.*": fqt.FP8, "a": fqt.FP8}))

    def dtypes(masters):
        return {name: (m.dtype, m.requires_grad) for name, m in masters.items()}

    experts = {f"experts.{i}.w": (torch.float32, i == 2) for i in range(3)}
    integers = {"i": (torch.int8, False)}
    assert dtypes(fqt.masters(params)) == experts | {"a": (torch.float32, False)} | integers
    found = fqt.masters(params, fq=fq)
    assert dtypes(found) == experts | {"a": (BF16, False)} | integers
    assert found["i"] is params["i"]
    assert found["a"] is not params["a"]


def test_masters_of_a_module_have_a_tied_parameter_once():
    """Two masters of one parameter would be two optimizers of it."""
    assert list(fqt.masters(Tied())) == ["embed.weight", "norm.weight", "norm.bias"]


@pytest.mark.parametrize(("wrong", "found"), [({"dtype": torch.float64}, "float64"), ({"device": "meta"}, "meta")])
def test_masters_refuse_by_name(wrong, found):
    params = leaves(parameters()) | {"odd": torch.nn.Parameter(torch.ones(2, **wrong))}
    assert_names(message_of(ValueError, fqt.masters, params), "odd", found)


def test_cast_is_to_the_dtype_of_out():
    """Rounded to the nearest, returned by identity; an entry that is the master itself is not even counted up."""
    masters, _, _, out = written()
    masters["experts.0.w1"].data.mul_(1.001)  # no value of bf16
    out["norm.weight"] = masters["norm.weight"]
    version = masters["norm.weight"]._version
    found = fqt.cast(masters, out=out)
    assert all(found[name] is out[name] for name in found)
    assert_same(found, {n: m if n == "norm.weight" else m.bfloat16() for n, m in masters.items()})
    assert masters["norm.weight"]._version == version
    wide = targets("separate", FP32)
    assert_same(fqt.cast(found, out=wide), {name: w.float() for name, w in found.items()})


# What no write takes.


def overlap_part(masters, out):
    buffer = torch.zeros(5000, dtype=BF16)
    return {"experts.0.w1": buffer[:3072].view(24, 128), "experts.1.w1": buffer[1000:4072].view(24, 128)}


def around_a_master(masters, out):
    buffer = torch.zeros(131)
    masters["gain"] = buffer[100]
    return {"norm.weight": buffer}


def overlap_unselected(masters, out):
    return {"norm.weight": out["experts.2.w2"].detach().view(-1)[:131]}


# What is wrong -> (what replaces entries of `out`, what the error says)
WRONG_OUT = {
    "shape": (lambda m, o: {"experts.2.w2": o["experts.2.w1"].clone()}, ["'experts.2.w2'", "(24, 128)", "(7, 256)"]),
    "shape, unselected": (lambda m, o: {"norm.weight": torch.zeros(130)}, ["'norm.weight'", "(130,)", "(131,)"]),
    "shape, broadcast": (lambda m, o: {"gain": torch.zeros(1)}, ["'gain'", "(1,)"]),
    "device": (lambda m, o: {"experts.2.w2": torch.zeros(7, 256, device="meta")}, ["'experts.2.w2'", "meta", "cpu"]),
    "device, unselected": (lambda m, o: {"gain": torch.zeros((), device="meta")}, ["'gain'", "meta", "cpu"]),
    "float64": (lambda m, o: {"experts.2.w2": torch.zeros(7, 256).double()}, ["'experts.2.w2'", "float64"]),
    "int8": (lambda m, o: {"experts.2.w2": torch.zeros(7, 256).char()}, ["'experts.2.w2'", "int8"]),
    "int8, unselected": (lambda m, o: {"gain": torch.zeros(()).char()}, ["'gain'", "int8"]),
    "strides": (lambda m, o: {"experts.2.w2": torch.zeros(256, 7).mT}, ["'experts.2.w2'", "contiguous"]),
    "expanded": (lambda m, o: {"experts.2.w2": torch.zeros(256).expand(7, 256)}, ["'experts.2.w2'", "contiguous"]),
    "expanded, unselected": (lambda m, o: {"norm.weight": torch.zeros(1).expand(131)}, ["'norm.weight'"]),
    "one tensor twice": (lambda m, o: {"experts.2.w2": o["experts.0.w2"]}, ["'experts.2.w2'", "'experts.0.w2'"]),
    "one memory twice": (
        lambda m, o: {"experts.2.w2": torch.nn.Parameter(o["experts.0.w2"].data)},
        ["'experts.2.w2'", "'experts.0.w2'"],
    ),
    "around a master": (around_a_master, ["'norm.weight'", "'gain'"]),
    "a part twice": (overlap_part, ["'experts.0.w1'", "'experts.1.w1'"]),
    "a part twice, unselected": (overlap_unselected, ["'experts.2.w2'", "'norm.weight'"]),
    "another's master": (lambda m, o: {"experts.2.w2": m["experts.0.w2"].data}, ["'experts.2.w2'", "shares"]),
    "part of a master": (lambda m, o: {"gain": m["norm.weight"].data[3]}, ["'gain'", "'norm.weight'"]),
    "unselected over a selected master": (
        lambda m, o: {"norm.weight": m["experts.0.w1"].data.view(-1)[5:136]},
        ["'norm.weight'", "'experts.0.w1'"],
    ),
    "dtypes within a group": (
        lambda m, o: {"experts.2.w2": torch.zeros(7, 256)},
        ["'experts.2.w2'", "float32", "bfloat16"],
    ),
    "no tensor": (lambda m, o: {"experts.2.w2": [[0.0]]}, ["'experts.2.w2'"]),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrong", WRONG_OUT)
def test_a_wrong_out_is_refused_before_anything_is_written(wrong, inplace):
    """By the name of the entry, what was found and what was wanted; by `cast` too; after a good write, and again."""
    masters, fq, state, out = written()
    fq.fakequant(masters, state, out=out, inplace=inplace)
    fqt.cast(masters, out=out)
    replace, fragments = WRONG_OUT[wrong]
    right = dict(out)
    out |= replace(masters, out)
    before = record(masters, state, right, {name: t for name, t in out.items() if isinstance(t, torch.Tensor)})
    for _ in range(2):
        message = message_of(ValueError, fq.fakequant, masters, state, out=out, inplace=inplace)
        assert_names(message, *fragments)
        if wrong not in ("strides", "dtypes within a group"):  # a cast has no kernel that could not
            assert_names(message_of(ValueError, fqt.cast, masters, out=out), fragments[0])
        assert_untouched(before)


def test_what_is_missing_is_refused_before_anything_is_written():
    """A selected or an unselected name in `out`, a module's parameter, a master, a group of the state, a bad amax."""
    masters, fq, state, out = written()
    before = record(masters, state, out)

    def without(mapping, name):
        return {other: value for other, value in mapping.items() if other != name}

    bad = {**state, "experts.*.w2": {"amax": torch.tensor([1.0, torch.nan, 1.0])}}
    calls = [
        (KeyError, ["'experts.2.w2'"], (masters, state), {"out": without(out, "experts.2.w2")}),
        (KeyError, ["'gain'"], (masters, state), {"out": without(out, "gain")}),
        (KeyError, ["norm.weight"], (masters, state), {"out": torch.nn.Linear(2, 2)}),
        (KeyError, ["'experts.2.w2'"], (without(masters, "experts.2.w2"), state), {"out": out}),
        (KeyError, ["'experts.*.w2'"], (masters, without(state, "experts.*.w2")), {"out": out}),
        (ValueError, ["experts.*.w2.amax", "nan"], (masters, bad), {"out": out}),
        (ValueError, ["inplace", "out"], (masters, state), {"inplace": True}),
        (ValueError, ["rounding"], (masters, state), {"out": out, "rounding": 3}),
    ]
    for error, fragments, args, kwargs in calls:
        assert_names(message_of(error, fq.fakequant, *args, **kwargs), *fragments)
        assert_untouched(before)
    assert_names(message_of(KeyError, fqt.cast, masters, out=without(out, "gain")), "'gain'")
    assert_untouched(before)


def test_the_write_is_refused_under_transforms_of_torch_func():
    """`out` is not differentiable: under grad, vjp, jvp and vmap it is refused, not written without a gradient."""
    masters, fq, state, out = written()
    masters = {name: m.detach() for name, m in masters.items()}
    before = record(masters, state, out)

    def total(masters, state=state, out=out):
        return sum(w.float().sum() for w in fq.fakequant(masters, state, out=out).values())

    two = {name: torch.stack([m, m]) for name, m in masters.items()}
    states = {key: {"amax": torch.stack([leaves["amax"]] * 2)} for key, leaves in state.items()}
    outs = {name: torch.zeros(2, *t.shape, dtype=BF16) for name, t in out.items()}
    calls = {
        "grad": lambda: grad(total)(masters),
        "vjp": lambda: vjp(total, masters),
        "jvp": lambda: jvp(total, (masters,), (masters,)),
        "vmap": lambda: vmap(total)(two),
        "vmap of the state": lambda: vmap(lambda s: total(masters, s))(states),
        "vmap of all": lambda: vmap(total)(two, states, outs),
    }
    for name, call in calls.items():
        assert "out: found a transform of torch.func" in message_of(ValueError, call), name
        assert_untouched(before)


# DTensors, on one rank: what ranks share is tested with real processes.


def test_dtensors(mesh):  # noqa: F811
    """Masters are placed alike; a write counts up the wrapper's and the shard's version; a mixture is refused."""
    plain = parameters(dtype=BF16)
    params = {name: torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for name, p in plain.items() if p.dim()}
    masters = fqt.masters(params)
    for name, master in masters.items():
        assert isinstance(master, DTensor)
        assert (master.placements, master.dtype, master.requires_grad) == ((Shard(0),), FP32, True), name
    fq = transform_of(masters, fqt.INT8)
    state = fq.calibrate(masters)
    versions = {name: (p._version, p.to_local()._version) for name, p in params.items()}
    found = fq.fakequant(masters, state, out=params)
    wanted = fq.fakequant(masters, state)
    for name, p in params.items():
        assert found[name] is p
        assert torch.equal(p.to_local(), wanted[name].to_local().bfloat16())
        assert p._version > versions[name][0]
        assert p.to_local()._version > versions[name][1]
    for name in ("experts.1.w1", "norm.weight"):
        replicated = distribute_tensor(plain[name], mesh, [Replicate()])
        for other in (plain[name], replicated):
            before = record({"other": other}, params)
            assert_names(message_of(ValueError, fq.fakequant, masters, state, out=params | {name: other}), name)
            assert_names(message_of(ValueError, fqt.cast, masters, out=params | {name: other}), name)
            assert_untouched(before)
