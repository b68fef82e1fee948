"""The write of a step's fake weights into tensors that are there: `fakequant(out=)`."""

from collections import Counter
from importlib import import_module
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fq_transforms as fqt
from tests.cases import CORE_FORMATS, assert_names, message_of, name_of
from tests.lens import (
    BF16,
    FP16,
    FP32,
    Tied,
    assert_same,
    assert_untouched,
    dtypes_of,
    lower,
    on_each_case,
    parameters,
    record,
    targets,
    transform_of,
    written,
)

every_format = pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)


@on_each_case
def test_the_write_is_fakequant_bit_for_bit(format, layout, device):
    """In every dtype, rounded either way: the values of the functional form, the rest cast, nothing read changed."""
    masters = parameters(layout, device=device)
    for dtype in dtypes_of(format, device):
        fq = transform_of(masters, format)
        state = fq.calibrate(masters)
        in_out_dtype = transform_of(masters, format, out_dtype=dtype)
        for rounding in (None, fqt.Stochastic(3, first_expert=5)):
            out = targets(layout, dtype, device)
            tensors, versions, before = dict(out), {n: t._version for n, t in out.items()}, record(masters, state)
            found = fq.fakequant(masters, state, rounding=rounding, out=out)
            wanted = {n: w.to(dtype) for n, w in in_out_dtype.fakequant(masters, state, rounding=rounding).items()}
            assert_same(found, wanted)
            assert all(found[name] is tensors[name] for name in found)
            assert all(tensor._version > versions[name] for name, tensor in found.items())
            assert_untouched(before)


@on_each_case
def test_the_write_in_place_is_fakequant_bit_for_bit(format, layout, device):
    """With `inplace`; what is not selected is the master itself, and is left alone, its version too."""
    for dtype, rounding in product(dtypes_of(format, device)[::2], (None, fqt.Stochastic(3, first_expert=5))):
        params = parameters(layout, dtype, device)
        fq = transform_of(params, format)
        state = fq.calibrate(params)
        wanted = {name: w.clone() for name, w in fq.fakequant(params, state, rounding=rounding).items()}
        versions = {name: p._version for name, p in params.items()}
        assert_same(fq.fakequant(params, state, rounding=rounding, out=params, inplace=True), wanted)
        for name, p in params.items():
            assert p._version > versions[name] or not name.startswith("experts"), name
            assert p._version == versions[name] or name.startswith("experts") or layout == "flat"  # which shares them


def test_a_write_that_was_right_before():
    """What is remembered of a write is where everything lay: tensors that changed places are written where they are."""
    masters, fq, state, out = written()
    wanted = {name: w.bfloat16() for name, w in fq.fakequant(masters, state).items()}
    for _ in range(2):
        assert_same(fq.fakequant(masters, state, out=out), wanted)
        out["experts.0.w1"], out["experts.2.w1"] = out["experts.2.w1"], out["experts.0.w1"]
    backwards = dict(reversed(masters.items()))
    assert_same(fq.fakequant(backwards, state, out=out), {name: wanted[name] for name in backwards})
    only = {name: m for name, m in masters.items() if name != "norm.weight"}
    out["norm.weight"].data.fill_(3.0)
    assert list(fq.fakequant(only, state, out=out)) == list(only)
    assert out["norm.weight"].eq(3.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["separate", "stacked", "flat"])
def test_a_launch_that_is_remembered_is_one_of_what_lies_there(layout):
    """Whatever of masters, targets, state, seed or stream is another at the next call, alone or together."""
    masters = parameters(layout, device="cuda")
    fq = transform_of(masters, fqt.NVFP4_STATIC)
    state, outs = fq.calibrate(masters), [targets(layout, BF16, "cuda") for _ in range(2)]
    moved = next(name for name in masters if name.startswith("experts"))

    def move():
        masters[moved].data = masters[moved].data.flip(0).contiguous()

    changes = {
        "nothing": lambda: None,
        "the target": outs.reverse,
        "its memory": lambda: setattr(outs[0][moved], "data", torch.empty_like(outs[0][moved])),
        "a master's memory": move,
        "its values": lambda: masters[moved].mul_(1.25),
        "the state": lambda: state.update(lower(state, 0.9)),
        "its values in place": lambda: [leaf.mul_(1.1) for leaves in state.values() for leaf in leaves.values()],
    }
    for change in [*changes, *reversed(changes)]:
        changes[change]()
        torch.cuda.synchronize()
        for rounding in (None, fqt.Stochastic(3), fqt.Stochastic(4), fqt.Stochastic(4, first_expert=1), None):
            wanted = {name: w.bfloat16() for name, w in fq.fakequant(masters, state, rounding=rounding).items()}
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                with torch.cuda.stream(stream):
                    for out in outs[0].values():
                        out.fill_(torch.nan)
                    found = fq.fakequant(masters, state, rounding=rounding, out=outs[0])
                stream.synchronize()
                assert_same(found, wanted)


@pytest.mark.parametrize("case", ["apart", "shared", "in place"])
def test_a_write_is_checked_once(case, monkeypatch):
    """Also where entries of `out` are the masters: to check a weight costs more than to write it."""
    masters, fq, state, out = written()
    out |= {"apart": {}, "shared": {"norm.weight": masters["norm.weight"]}, "in place": masters}[case]
    checked, module = [], import_module("fq_transforms.masters")
    monkeypatch.setattr(
        module, "_check_apart", lambda *args, check=module._check_apart: checked.append(1) or check(*args)
    )
    for _ in range(3):
        fq.fakequant(masters, state, out=out, inplace=case == "in place")
    assert len(checked) == 1


def test_two_models_written_in_turns_are_each_checked_once(monkeypatch):
    """By one Transform, as a model and its average are."""
    masters, fq, state, out = written()
    others = {name: tensor.clone() for name, tensor in out.items()}
    checked, module = [], import_module("fq_transforms.masters")
    monkeypatch.setattr(
        module, "_check_apart", lambda *args, check=module._check_apart: checked.append(1) or check(*args)
    )
    for _ in range(3):
        for target in (out, others):
            assert_same(fq.fakequant(masters, state, out=target), fq.fakequant(masters, state, out=out))
    assert len(checked) == 2


def test_in_place_only_with_the_flag():
    """Neither `out=masters`, nor a view of the same memory, nor part of it, loses the unquantized values unasked."""
    masters, fq, state, _ = written()
    for out in (masters, {n: m.data for n, m in masters.items()}, {n: m.detach() for n, m in masters.items()}):
        before = record(masters)
        assert_names(message_of(ValueError, fq.fakequant, masters, state, out=out), "experts.0.w", "inplace")
        assert_untouched(before)
    wanted = fq.fakequant(masters, state)
    views = {name: m.detach() for name, m in masters.items()}
    assert_same(fq.fakequant(masters, state, out=views, inplace=True), wanted)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["experts.0.w", "norm"])
def test_a_transposed_view_of_a_master_is_not_the_master(name, inplace):
    """It begins and ends where the master does, but is another matrix: in place it would be read half written."""
    square = {other: torch.arange(1024.0).view(32, 32) + 1 for other in ("experts.0.w", "norm")}
    fq = transform_of(square, fqt.INT8)
    out = {other: torch.zeros(32, 32) for other in square} | {name: square[name].view(32, 32)}
    square[name] = square[name].mT
    state = fq.calibrate(square)
    before = record(square, out)
    assert_names(message_of(ValueError, fq.fakequant, square, state, out=out, inplace=inplace), repr(name))
    assert_names(message_of(ValueError, fqt.cast, square, out=out), repr(name))
    assert_untouched(before)


def test_a_graph_that_kept_a_weight_of_the_last_step_raises():
    """Versions are counted up, so autograd finds what it saved to be another weight: by either write."""
    masters, fq, state, out = written()
    for write in (lambda: fq.fakequant(masters, state, out=out), lambda: fqt.cast(masters, out=out)):
        for name in ("experts.1.w2", "norm.weight"):
            x = torch.ones(out[name].shape, dtype=BF16, requires_grad=True)
            loss = (x * out[name]).sum()
            write()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_parameters_stay_leaves_that_require_a_gradient():
    """The write is no part of a graph, and touches no gradient, though masters and parameters require them."""
    masters, fq, state, out = written()
    kept = torch.ones_like(out["gain"])
    out["gain"].grad = kept
    with torch.enable_grad():
        found = fq.fakequant(masters, state, out=out)
    assert all(t.is_leaf and t.requires_grad and t.grad_fn is None for t in found.values())
    assert out["gain"].grad is kept
    assert all(m.grad is None for m in masters.values())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", BF16)])
def test_the_write_in_a_context(context):
    """Under inference_mode, no_grad and autocast: the same bits, and versions are counted up."""
    masters, fq, state, out = written()
    wanted = {name: w.bfloat16() for name, w in fq.fakequant(masters, state).items()}
    versions = {name: p._version for name, p in out.items()}
    with context():
        found = fq.fakequant(masters, state, out=out)
    assert_same(found, wanted)
    assert all(p._version > versions[name] for name, p in out.items())


def test_the_write_into_inference_tensors():
    """An evaluation's tensors, made under inference_mode, have no versions, and are written to there."""
    masters, fq, state, out = written()
    wanted = {name: w.bfloat16() for name, w in fq.fakequant(masters, state).items()}
    with torch.inference_mode():
        copies = {name: p.clone() for name, p in out.items()}
        found = fq.fakequant(masters, state, out=copies)
    assert_same({name: w.clone() for name, w in found.items()}, wanted)


def test_unselected_entries_are_cast_in_one_call():
    """One foreach call for all, not one copy each."""
    masters, fq, state, out = written()
    masters |= {f"bias.{i}": torch.full((i + 1,), 0.1) for i in range(5)}
    out |= {f"bias.{i}": torch.zeros(i + 1, dtype=BF16) for i in range(5)}
    calls = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        fq.fakequant(masters, state, out=out)
    assert calls["_foreach_copy_"] == 1, calls
    assert all(torch.equal(out[f"bias.{i}"], masters[f"bias.{i}"].bfloat16()) for i in range(5))


def test_more_than_the_masters_and_odd_sizes():
    """Entries of `out` alone are left alone; empty and 0-dim ones are cast, transposed ones too if unselected."""
    masters, fq, state, out = written()
    out["another"] = torch.ones(3)
    masters |= {"none": torch.ones(0, 4), "mT": torch.arange(6.0).view(2, 3)}
    out |= {"none": torch.ones(0, 4, dtype=BF16), "mT": torch.zeros(3, 2, dtype=BF16).mT}
    before = record({"another": out["another"]})
    found = fq.fakequant(masters, state, out=out)
    assert list(found) == list(masters)
    assert torch.equal(out["mT"], masters["mT"].bfloat16())
    assert_untouched(before)


@pytest.mark.parametrize("expanded", [False, True])
def test_masters_that_are_not_contiguous(expanded):
    """Masters are read at their strides: of a transposed or an expanded tensor as of its copy."""
    masters = parameters()
    masters["experts.1.w1"] = masters["experts.1.w1"].mT.contiguous().mT
    masters["norm.weight"] = torch.ones(131, 2)[:, 0]
    if expanded:
        masters["experts.0.w1"] = torch.tensor(0.3).expand(24, 128)
    fq = transform_of(masters, fqt.NVFP4)
    state = fq.calibrate(masters)
    wanted = fq.fakequant({name: m.clone() for name, m in masters.items()}, state)
    assert_same(fq.fakequant(masters, state, out=targets("separate", FP32)), wanted)


def test_a_module_as_out_with_a_tied_parameter():
    """The embedding that is a head is written once, and is seen by both."""
    model = Tied()
    masters = fqt.masters(model)
    fq = fqt.transform(fqt.select(masters, {"embed.*": fqt.INT8}))
    state = fq.calibrate(masters)
    wanted = fq.fakequant(masters, state)
    assert not torch.equal(wanted["embed.weight"], masters["embed.weight"])
    found = fq.fakequant(masters, state, out=model)
    assert model.head.weight is model.embed.weight is found["embed.weight"]
    assert_same(found, {name: w.bfloat16() for name, w in wanted.items()})
    fqt.cast(masters, out=model)
    assert torch.equal(model.head.weight, masters["embed.weight"].bfloat16())


def test_the_dtype_is_that_of_out_or_the_transforms():
    """A Transform's `out_dtype` that `out` has not is refused; one that it has, or none, is that of the values."""
    masters, fq, state, out = written()
    wanted = fq.fakequant(masters, state)
    for dtype in (BF16, FP16):
        other = transform_of(masters, fqt.INT8, out_dtype=dtype)
        if dtype == FP16:
            assert_names(message_of(ValueError, other.fakequant, masters, state, out=out), "float16", "bfloat16")
        else:
            assert_same(other.fakequant(masters, state, out=out), {name: w.to(dtype) for name, w in wanted.items()})


def test_stochastic_rounding_is_refused_under_lsq():
    """As without `out`: the pullback to the state is that of rounding to the nearest."""
    masters, _, state, out = written()
    fq = transform_of(masters, fqt.INT8, backward="lsq")
    before = record(masters, state, out)
    for options in ({}, {"out": out}):
        assert_names(
            message_of(ValueError, fq.fakequant, masters, state, rounding=fqt.Stochastic(0), **options),
            "rounding",
            "lsq",
        )
    assert_untouched(before)
    wanted = {name: w.bfloat16() for name, w in fq.fakequant(masters, state).items()}
    assert_same(fq.fakequant(masters, state, out=out), wanted)


@pytest.mark.gpu
@every_format
def test_a_cuda_graph_of_the_write_replays(format):
    """Captured once; after masters and state change in place, a replay writes what an eager call gives."""
    masters, out = parameters(device="cuda"), targets("flat", BF16, "cuda")
    fq = transform_of(masters, format)
    state = fq.calibrate(masters)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fq.fakequant(masters, state, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fq.fakequant(masters, state, out=out)
    for factor in (3.0, 0.25):
        for master in masters.values():
            master.mul_(factor)
        for key, leaves_ in lower(fq.calibrate(masters), 0.9).items():
            for name, leaf in leaves_.items():
                state[key][name].copy_(leaf)
        graph.replay()
        torch.cuda.synchronize()
        assert_same({n: out[n] for n in masters}, {n: w.bfloat16() for n, w in fq.fakequant(masters, state).items()})


def test_a_group_that_is_not_contiguous_is_refused_in_place_before_anything_is_written():
    """Bug: the first group was overwritten, and its unquantized values gone, when the second raised."""
    params = {"a": torch.randn(4, 32), "b": torch.randn(32, 4).mT}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    state, before = fq.calibrate(params), record(params)
    assert_names(message_of(ValueError, fq.fakequant, params, state, out=params, inplace=True), "out 'b'", "contiguous")
    assert_untouched(before)
