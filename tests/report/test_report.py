"""`report`: equal to what `fakequant` does, on every layout; what it prints; what it refuses."""

import dataclasses
import math
import re

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fq_transforms as fqt
from fq_transforms.report.report import role_of
from tests.cases import (
    ALL_FORMATS,
    CORE_FORMATS,
    ONE_OF_EACH_LEAF,
    assert_names,
    experts,
    message_of,
    name_of,
    shapes_of,
)
from tests.report.models import model, parameters

LAYOUTS = ["separate", "stacked", "transposed", "dense"]


def by_hand(params, fq, state):
    """Signal, noise, zeroed and largest of each expert of the one group, from `fakequant` itself."""
    fake = dataclasses.replace(fq, out_dtype=torch.float32).fakequant(params, state)
    found = []
    for name, weight in params.items():
        pairs = [(weight, fake[name])] if weight.dim() == 2 else zip(weight, fake[name], strict=True)
        for w, y in pairs:
            x = w.float()
            signal, noise = (v.double().square().sum().item() for v in (x, x - y))
            found.append((signal, noise, int(((x != 0) & (y == 0)).sum()), x.abs().max().item()))
    return zip(*found, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_it_measures_what_fakequant_does(format, layout):
    """Every format and layout, bf16 as well: sums, counts and maxima are those of the fp32 fake weights."""
    for dtype in (torch.float32, torch.bfloat16) if layout == "separate" else (torch.float32,):
        params, transposed = parameters(layout, shapes_of(format)[-1], dtype=dtype)
        fq = fqt.transform(fqt.select(params, {"*": format}, transposed=transposed))
        state = optree.tree_map(lambda leaf: leaf * 0.7, fq.calibrate(params))
        (found,) = fq.report(params, state).groups.values()
        signal, noise, zeroed, largest = by_hand(params, fq, state)
        for sums, wanted in ((found.signal, signal), (found.noise, noise)):
            for a, b in zip(sums.tolist(), wanted, strict=True):
                assert abs(a - b) <= 2 * found.weights * 2.0**-53 * b
        assert found.zeroed.tolist() == list(zeroed)
        assert found.largest.tolist() == list(largest)
        sqnr = [10 * math.log10(s / n) for s, n in zip(found.signal.tolist(), found.noise.tolist(), strict=True)]
        assert found.sqnr.tolist() == pytest.approx(sqnr, rel=1e-14)
        assert found.experts == tuple(range(len(sqnr)))
        assert found.worst == min(range(len(sqnr)), key=sqnr.__getitem__)


def test_layouts_of_the_same_weights_give_the_same_report():
    """Separate, stacked and [in, out] experts: the same numbers, the sums up to their order."""
    reports = {}
    for layout in ("separate", "stacked", "transposed"):
        params, transposed = parameters(layout, (48, 64))
        fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}, transposed=transposed))
        (reports[layout],) = fq.report(params, fq.calibrate(params)).groups.values()
    first = reports["separate"]
    for other in reports.values():
        for field in ("clipped", "zeroed", "underflow", "largest", "amax"):
            assert torch.equal(getattr(other, field), getattr(first, field)), field
        assert torch.allclose(other.sqnr, first.sqnr, rtol=1e-12, atol=0)


@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_inputs_are_not_changed_and_a_report_is_repeated_bit_for_bit(format):
    params, transposed = parameters("separate", shapes_of(format)[-1])
    fq = fqt.transform(fqt.select(params, {"*": format}, transposed=transposed))
    state = fq.calibrate(params)
    tensors = [*params.values(), *fqt.state.flatten(state).values()]
    before = [(t._version, t.clone()) for t in tensors]
    first, second = (fq.report(params, state) for _ in range(2))
    assert all(t._version == v and torch.equal(t, old) for t, (v, old) in zip(tensors, before, strict=True))
    for key, group in first.groups.items():
        for field in dataclasses.fields(group):
            a, b = getattr(group, field.name), getattr(second.groups[key], field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert not any(t.requires_grad for t in (first.groups[key].signal for key in first.groups))


def test_parameters_that_want_gradients_and_parameters_of_a_module():
    """A report is of values: it makes no graph, and takes what `named_parameters` gives."""
    params = {name: torch.nn.Parameter(w) for name, w in parameters("separate", (32, 64))[0].items()}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    (found,) = fq.report(params, fq.calibrate(params)).groups.values()
    assert not found.noise.requires_grad


def test_the_table_has_a_line_per_group_the_worst_first_and_totals():
    """An outlier ruins expert 2 of layer 1 under INT8: its group leads, and the totals name it."""
    params, fq, _ = model([fqt.INT8, fqt.FP8])
    params["layers.1.experts.2.w0"][0, 0] = 20.0
    params["layers.2.experts.3.w1"].zero_()
    state = fq.calibrate(params)
    found = fq.report(params, state)
    header, first, *others, weights, counts = str(found).splitlines()
    assert header.split()[:7] == ["group", "format", "experts", "SQNR", "dB", "median", "worst"]
    assert header.split()[7:] == ["clipped", "zeroed", "underflow", "amax/median", "/min", "dead"]
    assert first.split()[:3] == ["layers.1.experts.*.w0", "INT8", "4"]
    group = found.groups["layers.1.experts.*.w0"]
    assert group.worst == 2
    assert first.split()[3:6] == [f"{group.sqnr[2]:.2f}", f"{group.sqnr.median():.2f}", "2"]
    assert f"{group.amax.max() / group.amax.median():.2f}" in first.split()
    assert len(others) == len(fq.spec.groups) - 1
    lowest = [float(line.split()[3]) for line in (first, *others)]
    assert lowest == sorted(lowest)
    assert weights.startswith(f"6 groups, 24 experts, {24 * 32 * 64:,} weights: SQNR ")
    assert weights.endswith("expert 2 of 'layers.1.experts.*.w0'")
    assert counts.endswith("dead 1 expert")
    dead = found.groups["layers.2.experts.*.w1"]
    assert dead.sqnr[3] == math.inf
    assert dead.amax[3] == 0
    assert max(map(len, str(found).splitlines())) <= 140


def test_a_repr_is_short():
    """A notebook's tuple of reports, or a traceback, is not full of tensors."""
    params, fq, state = model([fqt.INT8, fqt.FP8], count=64, shape=(4, 32))
    found = fq.report(params, state)
    assert repr(found).startswith("Report(6 groups, 384 experts, 49,152 weights: SQNR ")
    key, group = next(iter(found.groups.items()))
    assert repr(group) == f"GroupReport({key!r}, INT8, 64 experts: lowest SQNR {group.sqnr.min():.2f} dB)"
    assert max(len(repr(found)), len(repr(group))) < 160


def test_html_has_the_cells_of_the_table():
    params, fq, state = model([fqt.NVFP4])
    first, *others = fq.spec.groups
    fq = fqt.transform(fqt.Spec((dataclasses.replace(first, key="<b>&"), *others)))
    state["<b>&"] = state.pop(first.key)
    found = fq.report(params, state)
    html = found._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert len(rows) == 1 + len(fq.spec.groups)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
    for line, row in zip(str(found).splitlines()[1:], cells, strict=False):
        assert re.split(r"  +", line.strip()) == [cell.replace("&lt;b&gt;&amp;", "<b>&") for cell in row]


def test_a_nan_is_the_worst():
    """It is not lost in a minimum: its expert leads its group, and its group the table."""
    params, fq, state = model([fqt.INT8])
    params["layers.2.experts.1.w0"][3, 3] = math.nan
    found = fq.report(params, state)
    assert found.groups["layers.2.experts.*.w0"].worst == 1
    assert str(found).splitlines()[1].split()[:4] == ["layers.2.experts.*.w0", "INT8", "4", "nan"]
    assert "worst nan dB: expert 1 of 'layers.2.experts.*.w0'" in str(found)


def test_shares_that_are_small_are_not_shown_as_zero():
    """One weight in 100,000 that is zeroed reads '<0.01 %'."""
    weight = torch.ones(250, 400)
    weight[0, 0] = 1e-4
    params = {"w": weight}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    line = str(fq.report(params, fq.calibrate(params))).splitlines()[1]
    assert "<0.01 %" in line
    assert line.count(" 0 %") == 2


def test_tokens_are_shown_where_they_were_counted():
    params, fq, state = model([fqt.FP8], layers=2)
    other, key = (group.key for group in fq.spec.groups)
    found = fq.report(params, state, tokens={key: torch.tensor([5, 0, 7, 0])})
    assert found.groups[key].tokens.tolist() == [5, 0, 7, 0]
    assert found.groups[other].tokens is None
    lines = {line.split()[0]: line.split()[-1] for line in str(found).splitlines()[:-2]}
    assert lines == {"group": "unseen", key: "2", other: "-"}
    assert str(found).endswith("unseen 2 experts")
    assert "unseen" not in str(fq.report(params, state))


def test_bad_tokens_are_refused():
    params, fq, state = model([fqt.FP8], layers=1)
    (key,) = (group.key for group in fq.spec.groups)
    for tokens, fragments in (
        ({"w": torch.ones(4)}, ("tokens", "'w'", key)),
        ({key: torch.ones(3, dtype=torch.long)}, (key, "(3,)", "(4,)")),
        ({key: torch.ones(4)}, (key, "float32", "integers")),
    ):
        assert_names(message_of(ValueError, fq.report, params, state, tokens=tokens), *fragments)


def test_bad_input_is_refused_by_name():
    """The errors of `fakequant`, an empty spec, and tensors without values."""
    params, fq, state = model([fqt.INT8_PER_CHANNEL], layers=1)
    (group,) = fq.spec.groups
    key, name = group.key, group.names[2]

    def message(error, params=params, state=state, fq=fq):
        return message_of(error, fq.report, params, state)

    assert_names(message(ValueError, fq=fqt.transform(fqt.Spec(()))), "spec", "no group", "select")
    assert_names(message(KeyError, params={n: w for n, w in params.items() if n != name}), name, key)
    assert_names(message(KeyError, state={}), key, "calibrate")
    assert_names(message(ValueError, state=state | {"other": state[key]}), "other")
    short = {key: {"amax": state[key]["amax"][:3]}}
    assert_names(message(ValueError, state=short), f"{key}.amax", "(3, 32, 1)", "(4, 32, 1)")
    infinite = {key: {"amax": state[key]["amax"].index_fill(0, torch.tensor(2), math.inf)}}
    assert_names(message(ValueError, state=infinite), f"{key}.amax", "inf", name)
    assert_names(message(ValueError, state=fq.init(params)), "never calibrated")
    assert_names(message(ValueError, params=params | {name: torch.ones(8, 64)}), name, "(8, 64)", "(32, 64)")
    double = {n: w.double() for n, w in params.items()}
    assert_names(message(ValueError, params=double), "float64", "bfloat16")
    meta = {n: w.to("meta") for n, w in params.items()}
    stateless = fqt.transform(fqt.select(params, {"*": fqt.MXFP4}))
    assert_names(message(ValueError, params=meta, state={key: {}}, fq=stateless), "meta", "values")
    elsewhere = {key: {"amax": state[key]["amax"].to("meta")}}
    assert_names(message(ValueError, state=elsewhere), key, "meta", "cpu")


def test_it_is_refused_under_torch_func():
    """Where a tensor has no values of its own: mapped weights, mapped states, and weights that are differentiated."""
    params, fq, state = model([fqt.INT8], layers=1)
    (key,) = (group.key for group in fq.spec.groups)

    def noise(params, state):
        return fq.report(params, state).groups[key].noise.sum()

    twice = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), (params, state))
    for call in (
        lambda: torch.func.vmap(noise, in_dims=(0, None))(twice[0], state),
        lambda: torch.func.vmap(noise, in_dims=(None, 0))(params, twice[1]),
        lambda: torch.func.grad(noise)(params, state),
    ):
        assert_names(message_of(ValueError, call), "report", "torch.func", "plain tensors")


def test_the_worst_expert_of_each_role_has_a_histogram():
    params, fq, state = model([fqt.FP8, fqt.INT4_BLOCK32])
    found = fq.report(params, state)
    assert len(found.histograms) == 2
    for histogram in found.histograms:
        role = role_of(histogram.key)[0]
        lowest = min(group.sqnr.min() for key, group in found.groups.items() if role_of(key)[0] == role)
        assert histogram.sqnr == lowest
        assert histogram.counts.sum() == 32 * 64


def local_report(rank, size):
    """Five experts over four ranks by their number, and one matrix over `out`: each rank's own part."""
    mesh = init_device_mesh("cpu", (size,))
    weights = torch.stack(experts(5, (32, 64)))
    whole = {"experts.w": weights}
    fq = fqt.transform(fqt.select(whole, {"*": fqt.NVFP4}))
    wanted = fq.report(whole, fq.calibrate(whole)).groups["experts.w"]

    params = {"experts.w": distribute_tensor(weights, mesh, [Shard(0)], src_data_rank=None)}
    state = fq.calibrate(params)
    tokens = {"experts.w": torch.arange(5)}
    found = fq.report(params, state, tokens=tokens)
    (group,) = found.groups.values()
    here = list(group.experts)
    assert here == list(range(5))[2 * rank : 2 * rank + 2]
    for field in ("signal", "noise", "clipped", "zeroed", "underflow", "largest", "amax"):
        assert torch.equal(getattr(group, field), getattr(wanted, field)[here]), field
    assert group.tokens.tolist() == here
    assert str(found).count("\n") == 3
    assert len(found.histograms) == (1 if here else 0)
    if not here:
        assert "no expert" in message_of(ValueError, found.plot)

    split = {"experts.w": distribute_tensor(weights, mesh, [Shard(1)], src_data_rank=None)}
    state = fq.calibrate(split)
    (group,) = fq.report(split, state).groups.values()
    assert group.experts == (0, 1, 2, 3, 4)
    assert group.weights == 32 * 64 // size
    signal = group.signal.clone()
    torch.distributed.all_reduce(signal)
    assert torch.allclose(signal, wanted.signal, rtol=1e-13, atol=0)

    elsewhere = fq.calibrate(whole)
    message = message_of(ValueError, fq.report, params, elsewhere)
    assert_names(message, "experts.w.amax", "a plain tensor", "Shard")
    copies = {"experts.w": distribute_tensor(weights, mesh, [Replicate()], src_data_rank=None)}
    (group,) = fq.report(copies, fq.calibrate(copies)).groups.values()
    assert torch.equal(group.noise, wanted.noise)


@pytest.mark.dist
def test_each_rank_reports_its_own_shard(ranks):
    """DTensors: global numbers of the experts, the numbers of the whole's report, an empty shard too."""
    ranks(local_report)


@pytest.mark.gpu
@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_a_gpu_reports_what_a_cpu_does(format):
    """Through the public door, one launch per group: counts equal, sums to their order's bound."""
    params, transposed = parameters("separate", shapes_of(format)[-1], dtype=torch.bfloat16)
    fq = fqt.transform(fqt.select(params, {"*": format}, transposed=transposed))
    state = optree.tree_map(lambda leaf: leaf * 0.7, fq.calibrate(params))
    (wanted,) = fq.report(params, state).groups.values()
    there = optree.tree_map(torch.Tensor.cuda, state)
    found = fq.report({name: w.cuda() for name, w in params.items()}, there)
    (group,) = found.groups.values()
    for field in ("clipped", "zeroed", "underflow", "largest", "amax"):
        assert torch.equal(getattr(group, field), getattr(wanted, field)), field
    for field in ("signal", "noise"):
        for a, b in zip(getattr(group, field).tolist(), getattr(wanted, field).tolist(), strict=True):
            assert abs(a - b) <= 2 * group.weights * 2.0**-53 * b
    assert str(found).splitlines()[0].startswith("group")


@pytest.mark.gpu
@pytest.mark.parametrize("format", [*ONE_OF_EACH_LEAF, fqt.INT4_BLOCK128], ids=name_of)
def test_no_fake_weight_is_stored(format):
    """What a group's measures take is a few numbers per program: less than a fortieth of its weights in bf16."""
    from fq_transforms.ops.report.launch import report_triton

    weights = [torch.randn(1024, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    params = {"experts.w": torch.stack(weights)}
    state = fqt.transform(fqt.select(params, {"*": format})).calibrate(params)["experts.w"]
    leaves = state.get("amax"), state.get("global_amax")
    measured = {"format": format, "transposed": False}
    report_triton(weights, *leaves, **measured)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report_triton(weights, *leaves, **measured)
    assert torch.cuda.max_memory_allocated() - before < sum(w.nbytes for w in weights) / 40
