"""`search` through the public door: the choice is the least under the budget, its bytes are those that are stored."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from fq_transforms.methods import Mse
from fq_transforms.search.knapsack import least
from fq_transforms.state import flatten
from tests.cases import ALL_FORMATS, assert_names, experts, message_of, name_of
from tests.export.models import build, in_lists, read
from tests.lens import mesh  # noqa: F401 (a fixture)
from tests.models import language_model, tokens

FORMATS = [fqt.NVFP4, fqt.FP8_PER_CHANNEL, None]
ROLES = ("w1", "w2", "w3")


def params_of(layers=3, count=2, dtype=torch.bfloat16):
    """Layers of experts, each layer with a magnitude of its own, and a dense matrix."""
    found = {}
    for layer in range(layers):
        for number, role in enumerate(ROLES):
            weights = experts(count, (16, 32), dtype, seed=10 * layer + number)
            found |= {f"layers.{layer}.experts.{e}.{role}.weight": w * 8.0**layer for e, w in enumerate(weights)}
    return found | {"head.weight": experts(1, (8, 32), dtype)[0], "norm.weight": torch.ones(32)}


def transform_of(params, rules=None, **options):
    return fqt.transform(fqt.select(params, rules or {"*.experts.*": fqt.FP8, "head.*": fqt.FP8}), **options)


def size_of(found, params):
    """Bytes of codes and scales as `pack` makes them, and of the selected weights that are left."""
    packed = found.fq.pack(params, found.fq.calibrate(params))
    left = [params[name].nbytes for name in params if name not in names_of(found.spec) and params[name].dim() == 2]
    return sum(leaf.nbytes for leaf in flatten(packed).values()) + sum(left)


def names_of(spec):
    return {name for group in spec.groups for name in group.names}


def smallest_and_largest(found):
    sizes = [[option.bytes for option in unit.options] for unit in found.units]
    return sum(map(min, sizes)), sum(map(max, sizes))


# The knapsack


def sums(rows, choice):
    return tuple(sum(row[i][part] for row, i in zip(rows, choice, strict=True)) for part in range(2))


def brute(rows, budget):
    """The least cost over every choice that fits."""
    every = (sums(rows, choice) for choice in itertools.product(*(range(len(row)) for row in rows)))
    return min(cost for size, cost in every if size <= budget)


# Whole costs, so that sums in any order are equal.
OPTION = st.tuples(st.integers(1, 9), st.integers(-3, 20).map(float))
ROWS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, spare=st.integers(0, 25))
def test_least_equals_brute_force(rows, spare):
    """Law: within the budget, of the cost that the best of all choices has, which is the bound; the same each time."""
    budget = sum(min(size for size, _ in row) for row in rows) + spare
    found = least(rows, budget)
    size, cost = sums(rows, found.options)
    assert size <= budget
    assert cost == brute(rows, budget) == found.bound
    assert least(rows, budget) == found


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, spare=st.integers(0, 25))
def test_thinned_sums_are_within_a_step_of_the_bound(rows, spare):
    """Law: where sums are left out, the choice still fits, and the bound is below the optimum by less than a step."""
    budget = sum(min(size for size, _ in row) for row in rows) + spare
    found = least(rows, budget, most=2)
    size, cost = sums(rows, found.options)
    step = max(max(c for _, c in row) - min(c for _, c in row) for row in rows)
    # Of the bound alone: it is a sum of products with a price.
    slack = 1e-9
    assert size <= budget
    assert found.bound - slack <= brute(rows, budget) <= cost <= found.bound + step + slack


def test_of_equals_the_smaller_and_then_the_earlier_is_taken():
    """Law: ties have an order."""
    assert least([[(3, 1.0), (2, 1.0), (2, 1.0)], [(1, 5.0), (2, 5.0)]], 9).options == (1, 0)
    assert least([[(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.0)]], 3) == least([[(1, 2.0), (2, 1.0)]] * 2, 3)


def test_many_rows_take_seconds():
    """Named bug: a bound for each row took the square of the rows, seven minutes for the experts of a large model."""
    generator = torch.Generator().manual_seed(0)
    costs = (torch.randn(3, 4000, generator=generator) * 2 + torch.tensor([[0.0], [-4], [-9]])).exp().T.tolist()
    rows = [[(1000, a), (2000, b), (4000, c)] for a, b, c in costs]
    found = least(rows, 6_000_000)
    size, cost = sums(rows, found.options)
    assert size <= 6_000_000
    assert cost == found.bound


# The choice


def test_the_choice_is_the_least_of_all_and_fits_every_budget():
    """Laws: brute force over the units finds no better one; a larger budget has no larger sensitivity; sizes are real.

    `at` is `search` with another budget.
    """
    params = params_of()
    fq = transform_of(params)
    first = fqt.search(fq, params, FORMATS, budget="1GB")
    rows = [[(option.bytes, option.sensitivity) for option in unit.options] for unit in first.units]
    smallest, largest = smallest_and_largest(first)
    assert first.bytes == largest
    assert first.sensitivity == 0
    before = torch.inf
    for budget in range(smallest, largest + 500, 371):
        found = first.at(budget)
        assert found.bytes <= budget == found.budget
        assert found.bytes == size_of(found, params)
        # Sums of floats in one order: that of the units.
        assert found.sensitivity == found.bound == brute(rows, budget)
        assert found.sensitivity <= before
        before = found.sensitivity
        again = fqt.search(fq, params, FORMATS, budget=budget)
        assert (again.spec, again.units, again.bound) == (found.spec, found.units, found.bound)
    assert first.at(smallest).bytes == smallest


@pytest.mark.parametrize("format", [format for format in ALL_FORMATS if not format.unit_scale_below], ids=name_of)
def test_bytes_are_those_of_pack(format):
    """Law: for every format that can be stored, whatever shares a scale or a byte."""
    params = {f"experts.{e}.weight": w for e, w in enumerate(experts(3, (130, 256), torch.bfloat16))}
    found = fqt.search(transform_of(params, {"*": fqt.INT8}), params, [format], budget="1MB")
    assert found.bytes == size_of(found, params)
    assert found.units[0].options[0].bytes == found.bytes


@pytest.mark.parametrize("small", [fqt.NVFP4, fqt.INT4_BLOCK32], ids=name_of)
def test_bytes_are_those_of_a_folder(small, tmp_path):
    """Law: codes and scales of the files take the bytes that were counted, and an export takes what was chosen."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": small, "*self_attn*": small}))
    free = fqt.search(fq, params, [small, fqt.FP8_PER_CHANNEL], budget="1GB")
    found = free.at(sum(smallest_and_largest(free)) // 2)
    assert {group.format for group in found.spec.groups} == {small, fqt.FP8_PER_CHANNEL}
    pairs = [("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("q_proj", "v_proj")]
    state = fqt.tie(found.fq.calibrate(params), pairs)
    fqt.export.save(tmp_path / "out", found.fq, params, state, config=model.config, layout="compressed-tensors")
    modules = {name.removesuffix(".weight") for name in names_of(found.spec)}
    stored = {name: tensor for name, tensor in read(tmp_path / "out").items() if name.rpartition(".")[0] in modules}
    shapes = [stored.pop(name) for name in list(stored) if name.endswith("weight_shape")]  # of packed integers
    assert bool(shapes) == (small == fqt.INT4_BLOCK32)
    assert sum(tensor.nbytes for tensor in stored.values()) == found.bytes


def test_a_unit_is_what_engines_load_together():
    """Law: roles of a layer's experts, q with k and v, gate with up of a dense MLP; each of these has one format."""
    _, params = build("glm4_moe")
    fq = fqt.transform(
        fqt.select(params, {"*.experts.*": fqt.FP8, "*self_attn*": fqt.FP8, "*mlp*proj.weight": fqt.FP8})
    )
    found = fqt.search(fq, params, [fqt.INT8, fqt.FP8_PER_CHANNEL], budget="1GB")
    keys = {unit.name: [key.split(".", 3)[3] for key in unit.keys] for unit in found.units}
    assert keys["model.layers.1.mlp.experts"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for n in range(2):
        fused = "self_attn.q_proj+k_proj+v_proj.weight"
        assert keys[f"model.layers.{n}.{fused}"] == [f"self_attn.{x}_proj.weight" for x in "qkv"]
        assert keys[f"model.layers.{n}.self_attn.o_proj.weight"] == ["self_attn.o_proj.weight"]
    assert keys["model.layers.0.mlp.gate_proj+up_proj.weight"] == ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    assert keys["model.layers.0.mlp.down_proj.weight"] == ["mlp.down_proj.weight"]
    shared = "mlp.shared_experts"
    assert keys[f"model.layers.1.{shared}.down_proj.weight"] == [f"{shared}.down_proj.weight"]
    assert sum(map(len, keys.values())) == len(fq.spec.groups)


@pytest.mark.parametrize(
    ("pattern", "unit"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc{r}.weight{e}", "decoder.layers.0.mlp.experts"),
        (
            "decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc{r}.weight",
            "decoder.layers.0.mlp.experts.local_experts",
        ),
        ("layers.0.experts.expert_{e}.w{r}.weight", "layers.0.experts"),
        ("fc{r}.weight{e}", "model"),
    ],
)
def test_experts_by_any_names_are_one_unit(pattern, unit):
    """Law: Megatron's, Transformer Engine's and Switch's names; and those of one expert, by="expert"."""
    params = {pattern.format(r=r, e=e): torch.randn(8, 32) for r in (1, 2) for e in range(3)}
    fq = transform_of(params, {"*": fqt.FP8})
    assert [u.name for u in fqt.search(fq, params, [fqt.FP8], budget="1MB").units] == [unit]
    by_expert = fqt.search(fq, params, [fqt.FP8], budget="1MB", by="expert")
    assert [u.name for u in by_expert.units] == [f"{unit}.{e}" for e in range(3)]
    assert all(len(u.keys) == 2 for u in by_expert.units)


@pytest.mark.parametrize("by", ["engine", "group", "expert"])
def test_the_spec_is_an_ordinary_one(by):
    """Laws: JSON and back; `select` makes it by its rules; its fake weights are those of its formats; None leaves out.

    And the sensitivity that was added up is that of the weights all together.
    """
    params = params_of()
    fq = transform_of(params, method=fqt.methods.Max(), backward="clip", out_dtype=torch.float32)
    free = fqt.search(fq, params, FORMATS, budget="1GB", by=by)
    every = (free.at(budget) for budget in range(*smallest_and_largest(free), 97))
    found = next(found for found in every if {unit.choice for unit in found.units} == {0, 1, 2})
    assert fqt.Spec.from_json(found.spec.to_json()) == found.spec
    assert found.fq == replace(fq, spec=found.spec)
    if by == "expert":
        assert not found.spec.rules
    else:
        assert fqt.select(params, found.spec.rules) == found.spec
        assert fqt.rules.from_json(fqt.rules.to_json(found.spec.rules)) == found.spec.rules
    fakes = found.fq.fakequant(params, found.fq.calibrate(params))
    error, format_of = 0.0, {name: group.format for group in found.spec.groups for name in group.names}
    for unit in found.units:
        names = [
            name for group in fq.spec.groups for name in group.names if name in unit.keys or group.key in unit.keys
        ]
        for name in names:
            assert format_of.get(name) == unit.chosen.format
            if unit.chosen.format is None:
                assert fakes[name] is params[name]
            error += ((fakes[name].double() - params[name].double()) ** 2).sum().item()
    # Both are sums of float64 in another order.
    assert found.sensitivity == pytest.approx(error, rel=1e-12)


def test_names_with_brackets_keep_their_format():
    """Bug: a rule for 'x[0].w' was a glob that matches 'x0.w', so `select` by these rules left 'x[0].w' as it was."""
    params = {"x[0].w": torch.randn(4, 32), "x0.w": torch.randn(4, 32), "m['y'].w": torch.randn(4, 32)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    free = fqt.search(fq, params, [fqt.MXFP4, fqt.INT8, None], budget="1GB")
    for budget in range(smallest_and_largest(free)[0], smallest_and_largest(free)[1], 13):
        found = free.at(budget)
        assert fqt.select(params, found.spec.rules) == found.spec


def test_all_may_be_left_as_they_are():
    """Edge: a budget of all bytes, and None among the formats: a spec without groups, at sensitivity 0."""
    params = params_of()
    found = fqt.search(transform_of(params), params, [fqt.INT8, None], budget="1GB")
    assert (found.spec.groups, found.sensitivity) == ((), 0.0)
    assert found.fq.fakequant(params, {}).keys() == params.keys()


# The sensitivities


def stacked_params(transposed=False):
    shape = (3, 32, 16) if transposed else (3, 16, 32)
    return {"layers.0.experts.w1": torch.randn(shape), "layers.0.experts.w2": torch.randn(shape)}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_error_of_outputs_is_the_error_of_outputs(transposed):
    """Law: under H the sum over all tokens of the squared error of the outputs; under m that of the diagonal."""
    params = stacked_params(transposed)
    spec = fqt.select(params, {"*": fqt.INT8}, transposed={"*": transposed})
    fq = fqt.transform(spec)
    # Each expert its own count of tokens; channels that are correlated.
    inputs = {key: [torch.randn(n, 32) @ torch.randn(32, 32) for n in (3, 40, 7)] for key in params}
    hessians = {
        key: {"hessian": torch.stack([x.T @ x / len(x) for x in xs]), "tokens": torch.tensor([len(x) for x in xs])}
        for key, xs in inputs.items()
    }
    diagonal = {key: entry["hessian"].diagonal(dim1=1, dim2=2).clone() for key, entry in hessians.items()}
    found, by_mean = (
        fqt.search(fq, params, [fqt.NVFP4_STATIC], budget="1GB", sensitivity="hessian", hessians=each)
        for each in (hessians, diagonal)
    )
    fakes = found.fq.fakequant(params, found.fq.calibrate(params))
    errors = {key: (fakes[key] - params[key]).double() for key in params}
    wanted, wanted_mean = 0.0, 0.0
    for key, xs in inputs.items():
        for e, x in enumerate(xs):
            error = errors[key][e] if transposed else errors[key][e].T
            wanted += (x.double() @ error).square().sum().item()
            wanted_mean += (error.square() * diagonal[key][e].double()[:, None]).sum().item()
    blocks = {  # [E, in / B, B, B], as of input_second_moments(blocks=True)
        key: torch.stack([h[:, at : at + 16, at : at + 16] for at in range(0, 32, 16)], 1)
        for key, h in ((key, entry["hessian"]) for key, entry in hessians.items())
    }
    static = fqt.transform(fqt.select(params, {"*": fqt.NVFP4_STATIC}, transposed={"*": transposed}))
    options = {"budget": "1GB", "sensitivity": "hessian"}
    by_blocks = fqt.search(static, params, [fqt.NVFP4_STATIC], hessians=blocks, **options)
    wanted_blocks = sum(
        (error.reshape(-1, 2, 16).double() * torch.einsum("obi,bij->obj", error.reshape(-1, 2, 16), block.double()))
        .sum()
        .item()
        for key in params
        for error, block in zip(errors[key].mT if transposed else errors[key], blocks[key], strict=True)
    )
    assert by_blocks.sensitivity == pytest.approx(wanted_blocks, rel=1e-4)
    # Sums of a few thousand products in fp32.
    assert found.sensitivity == pytest.approx(wanted, rel=1e-4)
    assert by_mean.sensitivity == pytest.approx(wanted_mean, rel=1e-5)


def test_what_the_transform_measures_is_taken_as_it_comes():
    """Law: `input_hessians` and `input_second_moments` are what `search` takes; experts add up to their layer."""
    model, params = language_model()
    fq = transform_of(params, {"*.experts.*": fqt.INT8})
    measured = (
        fq.input_hessians(params, tokens(16, 8), model=model, unseen="ones"),
        fq.input_second_moments(params, tokens(16, 8), model=model, unseen="ones"),
    )
    for hessians in measured:
        whole, by_expert = (
            fqt.search(fq, params, [fqt.MXFP4], budget="1GB", sensitivity="hessian", hessians=hessians, by=by)
            for by in ("engine", "expert")
        )
        assert (len(whole.units), len(by_expert.units)) == (2, 8)
        assert whole.sensitivity == pytest.approx(by_expert.sensitivity, rel=1e-12)  # float64 in another order


def squares(params):
    """A loss for bad input."""
    return sum(p.float().square().sum() for p in params.values())


def test_jvp_is_the_increase_of_a_loss_from_its_minimum():
    """Laws: of a loss of the second degree at its minimum, all of the measured difference; a slope changes nothing."""
    params = {name: p.float() for name, p in params_of(layers=2).items()}
    slopes = {name: torch.randn_like(p) for name, p in params.items()}
    fq = transform_of(params)

    def loss(weights, slope=0.0):
        moved = {name: weights[name] - p for name, p in params.items()}
        bowl = sum((d**2 * torch.linspace(1, 2, d.shape[-1])).sum() for d in moved.values())
        return bowl + slope * sum((slopes[name] * d).sum() for name, d in moved.items())

    def options(kind, loss):
        found = fqt.search(fq, params, FORMATS, budget="1GB", sensitivity=kind, loss=loss)
        return [option for unit in found.units for option in unit.options]

    measured, predicted = options("loss", loss), options("jvp", loss)
    tilted = options("jvp", lambda weights: loss(weights, slope=3.0))
    assert any(option.sensitivity > 1 for option in measured)
    for one, other, third in zip(measured, predicted, tilted, strict=True):
        # Sums of a few thousand squares in fp32.
        assert one.sensitivity == pytest.approx(other.sensitivity, rel=1e-4)
        assert one.sensitivity == pytest.approx(third.sensitivity, rel=1e-4)
        assert (one.format is None) == (one.sensitivity == 0)


def test_the_loss_of_a_model_is_measured():
    """Law: "loss" is that of the model with a unit's fake weights, less that without; no parameter changes."""
    model, params = language_model()
    fq, x = transform_of(params, {"*.experts.*": fqt.INT8}), tokens(4, 8)
    before = {name: (p.clone(), p._version) for name, p in params.items()}

    def loss(weights):
        return F.cross_entropy(functional_call(model, weights, (x,)).flatten(0, 1), x.flatten())

    found = fqt.search(fq, params, [fqt.MXFP4, fqt.INT8], budget="1GB", sensitivity="loss", loss=loss)
    base = loss(params).item()
    for number, unit in enumerate(found.units):
        for option in unit.options:
            alone = fqt.transform(fqt.select(params, {f"layers.{number}.mlp.experts.*": option.format}))
            assert option.sensitivity == loss(alone.fakequant(params, alone.calibrate(params))).item() - base
    assert all(torch.equal(p, before[name][0]) and p._version == before[name][1] for name, p in params.items())
    assert all(p.requires_grad and p.grad is None for p in params.values())


def test_what_has_no_forward_derivative_says_what_to_take():
    """A loss that forward mode cannot follow raises PyTorch's own error, with a note of the sensitivity that can."""
    model, params = language_model()  # F.silu has no second forward derivative
    fq, x = transform_of(params, {"*.experts.*": fqt.INT8}), tokens(2, 4)

    def loss(weights):
        return functional_call(model, weights, (x,)).square().mean()

    with pytest.raises((NotImplementedError, RuntimeError)) as caught:
        fqt.search(fq, params, [fqt.INT8], budget="1GB", sensitivity="jvp", loss=loss)
    assert any("two forward derivatives" in note for note in caught.value.__notes__)


def test_the_method_is_that_of_the_transform():
    """Law: errors are those under the scales that the method chooses, and `Mse` has no larger ones than `Max`."""
    params = params_of()
    plain, mse = (
        fqt.search(transform_of(params, method=method), params, [fqt.INT4_BLOCK32], budget="1GB")
        for method in (fqt.methods.Max(), Mse())
    )
    assert mse.fq.method == Mse()
    assert mse.sensitivity < plain.sensitivity


# The table


def test_it_prints_as_a_table():
    """A row for each unit, what each format would cost, the bytes, and whether it is the least; HTML escapes names."""
    params = {f"a<b.experts.{e}.w": torch.randn(4, 32) for e in range(2)}
    found = fqt.search(transform_of(params, {"*": fqt.FP8}), params, [fqt.MXFP4, None], budget=150)
    header, row, total = str(found).splitlines()
    assert header.split() == ["unit", "format", "bytes", "in", "MXFP4"]
    assert row.split()[:3] == ["a<b.experts", "MXFP4", "136"]
    assert total.startswith("1 unit, 136 of 150 bytes, 4.25 bits per weight: sensitivity ")
    assert total.endswith("the least that there is")
    assert repr(found) == f"Mixture({total})"
    assert "a&lt;b.experts" in found._repr_html_()
    thinned = replace(found, bound=0.0)
    assert str(thinned).endswith("and at least 0 under any choice")


# Bad input


def test_a_budget_that_cannot_be_kept():
    """Refused with the least that would do, in `search` and in `at`, and no sensitivity is measured first."""
    params = params_of()
    fq = transform_of(params)

    def never(weights):
        raise AssertionError

    message = message_of(ValueError, fqt.search, fq, params, FORMATS, budget=100, sensitivity="loss", loss=never)
    smallest, _ = smallest_and_largest(found := fqt.search(fq, params, FORMATS, budget="1GB"))
    assert_names(message, "budget: found 100 bytes", f"wanted at least {smallest:,}")
    assert message_of(ValueError, found.at, smallest - 1).startswith(f"budget: found {smallest - 1:,} bytes")
    assert message_of(ValueError, found.at, "much").startswith("budget: found 'much'")


WRONG = {
    "fq": (lambda fq, params: {"fq": fq.spec}, ("fq: found Spec", "transform(select(params, rules))")),
    "no formats": (lambda fq, params: {"formats": []}, ("formats: found []", "wanted a list of formats")),
    "a format": (lambda fq, params: {"formats": fqt.FP8}, ("formats: found", "wanted a list of formats")),
    "None": (lambda fq, params: {"formats": None}, ("formats: found None", "wanted a list of formats")),
    "a name": (lambda fq, params: {"formats": ["FP8"]}, ("formats: found ['FP8']",)),
    "twice": (lambda fq, params: {"formats": [fqt.FP8, None, fqt.FP8]}, ("['FP8', None, 'FP8']", "each once")),
    "kind": (lambda fq, params: {"sensitivity": "kl"}, ("sensitivity: found 'kl'", "'report', 'hessian'")),
    "by": (lambda fq, params: {"by": "layer"}, ("by: found 'layer'", "'engine', 'group', 'expert'")),
    "no loss": (lambda fq, params: {"sensitivity": "jvp"}, ("loss: found none for sensitivity='jvp'", "a function")),
    "a loss": (lambda fq, params: {"loss": squares}, ("loss: found function for sensitivity='report'", "none")),
    "no hessians": (lambda fq, params: {"sensitivity": "hessian"}, ("hessians: found none", "wanted a dict by group")),
    "vector": (
        lambda fq, params: {"sensitivity": "loss", "loss": lambda p: p["norm.weight"]},
        ("loss: found a tensor (32,)", "to a scalar tensor"),
    ),
    "float": (
        lambda fq, params: {"sensitivity": "loss", "loss": lambda p: 1.0},
        ("loss: found float", "to a scalar tensor"),
    ),
    "nan": (
        lambda fq, params: {"sensitivity": "jvp", "loss": lambda p: squares(p) * torch.nan},
        ("sensitivity 'jvp': found nan for 'layers.0.experts' in NVFP4", "wanted a finite number"),
    ),
    "block": (
        lambda fq, params: {"formats": [fqt.FP8, fqt.INT4_BLOCK128]},
        (
            "parameter 'layers.0.experts.0.w1.weight': found shape (out, in) = (16, 32)",
            "multiple of 128",
            "INT4_BLOCK32",
        ),
    ),
    "not stored": (
        lambda fq, params: {"formats": [next(f for f in ALL_FORMATS if f.unit_scale_below)]},
        ("group 'layers.0.experts.*.w1.weight'", "wanted a format that can be stored"),
    ),
    "method": (
        lambda fq, params: {"fq": replace(fq, method=Mse())},
        ("method Mse: found NVFP4 for group 'layers.0.experts.*.w1.weight'",),
    ),
    "infinite": (
        lambda fq, params: {"params": params | {"head.weight": params["head.weight"] * torch.inf}},
        ("weight 'head.weight'", "wanted finite values"),
    ),
    "meta": (
        lambda fq, params: {"params": {name: p.to("meta") for name, p in params.items()}},
        ("parameter 'layers.0.experts.0.w1.weight': found on meta",),
    ),
    "shape": (
        lambda fq, params: {"params": params | {"head.weight": torch.ones(4, 32)}},
        ("parameter 'head.weight': found shape (4, 32)",),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    """Each says what it is of, what was found and what was wanted."""
    change, fragments = WRONG[case]
    params = params_of()
    fq = transform_of(params)
    given = {"fq": fq, "params": params, "formats": FORMATS, "budget": "1GB"} | change(fq, params)
    message = message_of(ValueError, fqt.search, **given)
    assert_names(message, *fragments)


def test_a_parameter_that_is_missing_is_named():
    """KeyError, as of every function that takes parameters."""
    params = params_of()
    fq = transform_of(params)
    less = {name: p for name, p in params.items() if name != "head.weight"}
    assert_names(message_of(KeyError, fqt.search, fq, less, FORMATS, budget="1GB"), "'head.weight'")


def test_inputs_are_refused():
    """A format of weights does not say which inputs go with it."""
    params = params_of()
    fq = transform_of(params, [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8)])
    message = message_of(ValueError, fqt.search, fq, params, FORMATS, budget="1GB")
    assert_names(message, "search: found the inputs of 9 groups", "dataclasses.replace(spec, inputs=())")


def test_dtensors_are_refused(mesh):  # noqa: F811
    """Each rank would choose by its own shard, and ranks would differ."""
    params = {"head.weight": torch.randn(8, 32)}
    fq = transform_of(params, {"*": fqt.FP8})
    sharded = {"head.weight": distribute_tensor(params["head.weight"], mesh, [Shard(0)])}
    assert_names(message_of(ValueError, fqt.search, fq, sharded, [fqt.FP8], budget="1GB"), "'head.weight'", "DTensor")


def test_stacks_have_no_format_for_each_expert():
    """Refused: a stack is one parameter, and has one format."""
    params = stacked_params()
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}, transposed={"*": False}))
    message = message_of(ValueError, fqt.search, fq, params, FORMATS, budget="1GB", by="expert")
    assert_names(message, "by: found 'expert' and 'layers.0.experts.w1'", "wanted 'engine'")


HESSIANS = {
    "missing": (lambda entry: None, KeyError, ("hessians: found none of group 'w'",)),
    "leaves": (lambda entry: {"hessian": entry["hessian"]}, ValueError, ("'w': found ['hessian']", "tokens")),
    "shape": (
        lambda entry: entry | {"hessian": torch.eye(32)},
        ValueError,
        ("'w'.hessian: found (32, 32)", "wanted (1, 32, 32)"),
    ),
    "tokens": (lambda entry: entry | {"tokens": torch.tensor(3)}, ValueError, ("'w'.tokens: found ()", "wanted (1,)")),
    "nan": (
        lambda entry: entry | {"hessian": entry["hessian"] * torch.nan},
        ValueError,
        ("hessians 'w': found a value of nan for expert 0, 'w'",),
    ),
    "negative diagonal": (
        lambda entry: entry | {"hessian": -entry["hessian"]},
        ValueError,
        ("hessians 'w': found -1.0 on the diagonal of expert 0, 'w'",),
    ),
    "not symmetric": (
        lambda entry: entry | {"hessian": entry["hessian"] + torch.ones(32, 32).triu()},
        ValueError,
        ("hessians 'w': found a matrix that is not symmetric for expert 0, 'w'",),
    ),
    "NaN tokens": (
        lambda entry: entry | {"tokens": torch.tensor([torch.nan])},
        ValueError,
        ("hessians 'w'.tokens: found nan for expert 0",),
    ),
    "a list": (lambda entry: [1.0], ValueError, ("'w': found list",)),
    "negative": (lambda entry: -torch.ones(1, 32), ValueError, ("statistics 'w'", "wanted finite ones")),
    "width": (lambda entry: torch.ones(1, 31), ValueError, ("statistics 'w': found (1, 31)", "wanted floats (1, 32)")),
}


@pytest.mark.parametrize("case", HESSIANS)
def test_wrong_hessians_are_named(case):
    """The group, the leaf, what was found and wanted. Named bug: of what `gptq` refuses the worst format was chosen."""
    change, error, fragments = HESSIANS[case]
    params = {"w": torch.randn(8, 32)}
    found = change({"hessian": torch.eye(32)[None], "tokens": torch.tensor([3])})
    hessians = {} if found is None else {"w": found}
    fq = transform_of(params, {"*": fqt.FP8})
    options = {"budget": "1GB", "sensitivity": "hessian", "hessians": hessians}
    assert_names(message_of(error, fqt.search, fq, params, FORMATS, **options), *fragments)
