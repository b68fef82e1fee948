"""Methods through the public functions: what each chooses, on trained weights too, and what is refused in words."""

import sys
from dataclasses import replace

import numpy as np
import optree
import pytest
import torch
from torch.func import grad, vmap

import fq_transforms as fqt
from fq_transforms.calibrate import check_statistics, scale_search
from fq_transforms.formats import Format
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile
from fq_transforms.state import flatten
from tests.cases import CORE_FORMATS, STATIC_FORMATS, assert_names, experts, message_of, name_of
from tests.test_transform import MoE

STATIC = [format for format in CORE_FORMATS if format in STATIC_FORMATS]
DYNAMIC = [format for format in CORE_FORMATS if format not in STATIC_FORMATS]
every_static = pytest.mark.parametrize("format", STATIC, ids=name_of)


def params_of(count=4, shape=(6, 128), dtype=torch.bfloat16):
    return {f"experts.{e}.weight": w for e, w in enumerate(experts(count, shape, dtype))}


def transform_of(params, format, **options):
    return fqt.transform(fqt.select(params, {"*experts.*": format}), **options)


def errors_of(params, state, spec, statistics=None):
    """Squared error of each expert's weight in float64, weighted by its inputs' mean squares: {name: error}."""
    fakes = fqt.transform(spec, out_dtype=torch.float32).fakequant(params, state)
    found = {}
    for group in spec.groups:
        for e, name in enumerate(group.names):
            error = (params[name].double() - fakes[name].double()) ** 2
            if statistics is not None:
                error = error * statistics[group.key].double().expand(group.experts, -1)[e]
            found[name] = error.sum().item()
    return found


@pytest.fixture(scope="module")
def trained():
    """A small MoE that has learned: its experts, and the mean squares of the inputs that they meet."""
    torch.manual_seed(0)
    model = MoE()
    teacher = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.no_grad():
        scales = torch.logspace(-1, 0.5, 128)
    first = last = None
    for _ in range(150):
        x = torch.randn(64, 128) * scales
        loss = torch.nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.5 * first
    params = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    with torch.no_grad():
        squares = (model.norm(torch.randn(512, 128) * scales) ** 2).mean(0)
    return params, squares


@every_static
def test_mse_never_has_a_larger_error_than_max_on_trained_weights(trained, format):
    """Law: for each expert, without and with the statistics of the inputs; and weighting helps what it weighs."""
    params, squares = trained
    spec = fqt.select(params, {"experts.*.weight": format})
    statistics = {group.key: squares for group in spec.groups}
    by_max, fq = fqt.transform(spec).calibrate(params), fqt.transform(spec, method=Mse())
    plain, weighted = fq.calibrate(params), fq.calibrate(params, statistics=statistics)
    for h, state in ((None, plain), (statistics, weighted)):
        before, after = errors_of(params, by_max, spec, h), errors_of(params, state, spec, h)
        assert all(after[name] <= before[name] for name in before)
        assert sum(after.values()) < sum(before.values())
    one, other = (sum(errors_of(params, state, spec, statistics).values()) for state in (weighted, plain))
    assert one <= other


def test_four_over_six_on_trained_weights(trained):
    """Blocks of 4 are some of all; each has a smaller error than with 6, and each other no larger a one."""
    params, _ = trained
    spec = fqt.select(params, {"experts.*.weight": fqt.NVFP4_STATIC})
    (group,) = spec.groups
    by_max = fqt.transform(spec).calibrate(params)[group.key]
    for e4m3_max in (256, 448):
        found = fqt.transform(spec, method=FourOverSix(e4m3_max)).calibrate(params)[group.key]
        assert torch.equal(found["global_amax"], by_max["global_amax"] * (448 / e4m3_max))
        is_four = found["amax"] == by_max["amax"] * 1.5
        assert torch.equal(found["amax"][~is_four], by_max["amax"][~is_four])
        assert 0.1 < is_four.float().mean() < 0.6

        def blocks(factor, found=found):
            leaves = found | {"amax": factor * by_max["amax"]}
            fakes = fqt.transform(spec, out_dtype=torch.float32).fakequant(params, {group.key: leaves})
            errors = [(params[name].double() - fakes[name].double()) ** 2 for name in group.names]
            return torch.stack(errors).unflatten(-1, (-1, 16)).sum(-1)

        six, four = blocks(1.0), blocks(1.5)
        assert (four < six)[is_four].all()
        assert (six <= four * (1 + 2.0**-15))[~is_four].all()
    errors = [
        sum(errors_of(params, fqt.transform(spec, method=method).calibrate(params), spec).values())
        for method in (Max(), FourOverSix(448), FourOverSix(), Mse())
    ]
    assert errors[3] < errors[2] < errors[0]
    assert errors[1] < errors[0]


def test_four_over_six_scales_to_four():
    """A block of 4, 4, ... 3, 2 under scale 1 keeps every value with 4, and loses some with 6; E4M3 has its scale."""
    block = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -4.0] * 2)
    other = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, -6.0] * 2)
    params = {"experts.0.weight": torch.stack([block * 16, other * 256]).view(1, 32)}  # scales in g = 1: 16 and 256
    fq = transform_of(params, fqt.NVFP4_STATIC, method=FourOverSix())
    state = fq.calibrate(params)
    assert torch.equal(state["experts.*.weight"]["amax"], torch.tensor([[[96.0, 1536.0]]]))
    assert torch.equal(fq.fakequant(params, state)["experts.0.weight"], params["experts.0.weight"])
    packed = fq.pack(params, state)["experts.*.weight"]
    assert torch.equal(packed["scale"].float(), torch.tensor([[[16.0, 256.0]]]))


@every_static
def test_percentile(format):
    """Through the public door: 100 is max; another is that of each granule, [E, ...]; the global amax is max's."""
    params = params_of()
    spec = fqt.select(params, {"*": format})
    by_max, hundredth, found = (
        flatten(fqt.transform(spec, method=method).calibrate(params))
        for method in (Max(), Percentile(100), Percentile(75))
    )
    assert all(torch.equal(hundredth[name], leaf) for name, leaf in by_max.items())
    if format.block == (None, None):
        for e, weight in enumerate(params.values()):
            assert found["experts.*.weight.amax"][e].item() == np.float32(
                torch.quantile(weight.double().abs(), 0.75).item()
            )
    if format.has_global_amax:
        assert torch.equal(*(state["experts.*.weight.global_amax"] for state in (found, by_max)))


@every_static
def test_max_is_the_default(format):
    """Without a method, and with `Max()`, a transform gives the largest magnitudes; with another, another state."""
    params = params_of()
    spec = fqt.select(params, {"*": format})
    assert fqt.transform(spec) == fqt.transform(spec, method=Max())
    largest, other = (flatten(fqt.transform(spec, **o).calibrate(params)) for o in ({}, {"method": Percentile(75)}))
    assert any(not torch.equal(other[name], leaf) for name, leaf in largest.items())


def test_statistics_of_each_expert():
    """[E, in] weighs each expert by its own row; [in] all alike."""
    params = params_of(3)
    fq = transform_of(params, fqt.NVFP4_STATIC, method=Mse())
    rows = torch.rand(3, 128) ** 4

    def amax(statistics):
        return fq.calibrate(params, statistics={"experts.*.weight": statistics})["experts.*.weight"]["amax"]

    found = amax(rows)
    assert torch.equal(found, torch.stack([amax(row)[e] for e, row in enumerate(rows)]))
    assert not torch.equal(found, amax(rows[0]))
    assert torch.equal(amax(rows[1].double()), amax(rows[1]))


def test_one_search_a_group_whatever_the_layout():
    """Separate, stacked and transposed experts give one state."""
    weights = torch.stack(experts(3, (8, 64), torch.bfloat16))
    for format in (fqt.FP8_PER_CHANNEL, fqt.NVFP4_STATIC):
        layouts = (
            ({"experts.w": weights}, ()),
            ({f"experts.{e}.w": w for e, w in enumerate(weights)}, ()),
            ({"experts.w": weights.mT.contiguous()}, "*"),
        )
        states = [
            fqt.transform(fqt.select(params, {"*": format}, transposed=transposed), method=Mse()).calibrate(params)
            for params, transposed in layouts
        ]
        stacked, *others = (next(iter(state.values())) for state in states)
        assert all(optree.tree_all(optree.tree_map(torch.equal, stacked, other)) for other in others)


def test_within_grad():
    """QAT that chooses its amax at each step: a constant under grad, as max is."""
    params = params_of(2, dtype=torch.float32)
    fq = transform_of(params, fqt.INT8_PER_CHANNEL, method=Mse())

    def loss(p):
        return sum((w**2).sum() for w in fq.fakequant(p, fq.calibrate(p)).values())

    gradients = grad(loss)(params)
    wanted = fq.fakequant(params, fq.calibrate(params))
    assert all(torch.equal(gradients[name], 2 * w) for name, w in wanted.items())


BAD_NUMBERS = [
    (lambda: Percentile(0), ("percentile: found 0", "(0, 100]")),
    (lambda: Percentile(-1.0), ("found -1.0", "(0, 100]")),
    (lambda: Percentile(100.1), ("found 100.1", "(0, 100]")),
    (lambda: Percentile(float("nan")), ("found nan", "(0, 100]")),
    (lambda: Percentile("99"), ("found '99'", "(0, 100]")),
    (lambda: Mse(step=None), ("step=None", "above 0")),
    (lambda: Mse(start=1.0, stop=0.5), ("empty sweep from 1.0 to 0.5", "start <= stop")),
    (lambda: Mse(step=0.0), ("step=0.0", "above 0")),
    (lambda: Mse(start=-0.5), ("start=-0.5", "above 0")),
    (lambda: Mse(stop=float("inf")), ("stop=inf", "finite")),
    (lambda: Mse(step=1e-9), ("ratios", "at most 4096")),
    (lambda: FourOverSix(300), ("e4m3_max=300", "256 or 448")),
]


@pytest.mark.parametrize(("make", "fragments"), BAD_NUMBERS)
def test_bad_numbers(make, fragments):
    """A method that cannot be is refused where it is made, with what was found and wanted."""
    assert_names(message_of(ValueError, make), *fragments)


@pytest.mark.parametrize("method", [Percentile(), Mse(), FourOverSix()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("format", DYNAMIC, ids=name_of)
def test_formats_without_a_static_amax_are_refused(format, method):
    """When the transform is made, naming the group, the format and the method."""
    params = params_of()
    message = message_of(ValueError, transform_of, params, format, method=method)
    assert_names(message, type(method).__name__, format.name, "experts.*.weight", "static amax")
    assert transform_of(params, format, method=Max()).calibrate(params).keys() == {"experts.*.weight"}


def test_other_formats_that_a_method_cannot_use():
    """FourOverSix is of NVFP4_STATIC alone; a scale that cannot be stored has no sweep."""
    params = params_of()
    message = message_of(ValueError, transform_of, params, fqt.FP8, method=FourOverSix())
    assert_names(message, "FourOverSix", "FP8", "NVFP4_STATIC")
    unstored = Format("NVFP4_ODD", fqt.NVFP4.element, (1, 16), scale="e4m3", unit_scale_below=1e-5)
    message = message_of(ValueError, transform_of, params, unstored, method=Mse())
    assert_names(message, "NVFP4_ODD", "unit_scale_below=1e-05")


def bad_statistics():
    good = torch.ones(4, 128)
    for value in (torch.nan, torch.inf, -1.0):
        bad = good.clone()
        bad[2, 7] = value
        yield bad, ValueError, (str(value).rstrip("0").rstrip("."), "expert 2", "experts.2.weight")
    unseen = good.clone()
    unseen[3] = 0.0
    yield unseen, ValueError, ("expert 3", "not all 0", "without tokens")
    yield torch.ones(3, 128), ValueError, ("(3, 128)", "(4, 128)", "(128,)")
    yield torch.ones(4, 128, dtype=torch.int32), ValueError, ("int32", "floats")
    yield [1.0], ValueError, ("list", "floats")
    yield torch.ones(128, device="meta"), ValueError, ("on meta", "on cpu")


@pytest.mark.parametrize(("bad", "error", "fragments"), list(bad_statistics()))
def test_bad_statistics(bad, error, fragments):
    """Refused with the group, the expert and what was found: an expert without tokens never gets a silent default."""
    params = params_of()
    fq = transform_of(params, fqt.INT8, method=Mse())
    statistics = {"experts.*.weight": bad}
    assert_names(message_of(error, fq.calibrate, params, statistics=statistics), "experts.*.weight", *fragments)


def moments_of(count, columns, side=32):
    """Second moments of blocks of inputs that go together, by expert: [count, columns / side, side, side]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, columns // side, 2 * side, side, generator=generator)
    x = x @ torch.randn(count, columns // side, side, side, generator=generator)
    return x.mT @ x / (2 * side)


@pytest.mark.parametrize("format", [format for format in STATIC if format.has_blocks_along_in], ids=name_of)
def test_second_moments_of_each_expert(format):
    """[E, in / B, B, B] weighs each expert by its own; [in / B, B, B] all alike; never above max's, block by block."""
    params = params_of(3, (6, 256))
    fq, by_max = transform_of(params, format, method=Mse()), transform_of(params, format).calibrate(params)
    side = format.block[1]
    moments = moments_of(3, 256, side)

    def amax(statistics):
        return fq.calibrate(params, statistics={"experts.*.weight": statistics})["experts.*.weight"]["amax"]

    found = amax(moments)
    assert torch.equal(found, torch.stack([amax(one)[e] for e, one in enumerate(moments)]))
    assert not torch.equal(found, amax(moments[0]))
    assert torch.equal(amax(moments[1].double()), amax(moments[1]))
    state = {"experts.*.weight": by_max["experts.*.weight"] | {"amax": found}}
    errors = []
    for one in (state, by_max):
        fakes = replace(fq, out_dtype=torch.float32).fakequant(params, one)
        d = torch.stack([(params[name] - fakes[name]).double() for name in params]).unflatten(-1, (-1, side))
        errors.append(torch.einsum("eobi,ebij,eobj->eob", d, moments.double(), d))
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def bad_moments():
    good = moments_of(4, 128)
    for place, value, fragments in (
        ((2, 1, 7, 7), torch.nan, ("nan", "expert 2", "experts.2.weight", "finite")),
        ((2, 1, 7, 7), torch.inf, ("inf", "expert 2", "experts.2.weight", "finite")),
        ((2, 1, 7, 7), -1.0, ("-1.0", "expert 2", "at least 0")),
        ((1, 3, 0, 5), torch.nan, ("nan at (0, 5)", "block 3", "expert 1", "second moments")),
        ((1, 3, 0, 5), torch.inf, ("inf at (0, 5)", "block 3", "expert 1", "at most")),
        ((1, 3, 0, 5), 1e6, ("1000000.0 at (0, 5)", "block 3", "expert 1", "at most", "root")),
    ):
        bad = good.clone()
        bad[place] = value
        yield bad, fragments
    root = (good[3, 0, 4, 4] * good[3, 0, 9, 9]).sqrt().item()
    skew = good.clone()
    skew[3, 0, 4, 9], skew[3, 0, 9, 4] = 0.25 * root, 0.5 * root
    yield skew, ("at (4, 9) and", "at (9, 4) of block 0", "expert 3", "experts.3.weight", "symmetric")
    yield good * (torch.arange(4) != 1)[:, None, None, None], ("expert 1", "not all 0", "without tokens")
    yield good[:3], ("(3, 4, 32, 32)", "(4, 4, 32, 32)", "(4, 32, 32)", "(4, 128)")
    yield moments_of(4, 128, 16), ("(4, 8, 16, 16)", "(4, 4, 32, 32)")
    yield good.int(), ("int32", "floats")
    yield good.to("meta"), ("on meta", "on cpu")


@pytest.mark.parametrize(("bad", "fragments"), list(bad_moments()))
def test_bad_second_moments(bad, fragments):
    """What cannot be the mean of x x^T is refused with the group, the expert, the block and the place."""
    params = params_of()
    fq = transform_of(params, fqt.INT4_BLOCK32, method=Mse())
    message = message_of(ValueError, fq.calibrate, params, statistics={"experts.*.weight": bad})
    assert_names(message, "statistics 'experts.*.weight'", *fragments)


def test_second_moments_of_formats_without_blocks_along_in():
    """Channels, tensors and squares have no block whose inputs go together with its scale alone: said by name."""
    params = params_of()
    for format in (fqt.INT8, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK):
        fq = transform_of(params, format, method=Mse())
        message = message_of(ValueError, fq.calibrate, params, statistics={"experts.*.weight": moments_of(4, 128)})
        assert_names(message, "experts.*.weight", "(4, 4, 32, 32)", "(4, 128)", format.name, "no blocks along `in`")


def test_second_moments_that_rounding_leaves_good():
    """Law: what is refused is not what arithmetic loses: bf16, fp16, inputs alike or tiny enough to underflow."""
    params = params_of(1)
    fq = transform_of(params, fqt.INT4_BLOCK32, method=Mse())
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, -1.0]).repeat(64)
    x = x.double() * 2.0 ** -torch.linspace(0, 80, 128).double()
    blocks = x.unflatten(-1, (4, 32)).transpose(0, 1)
    moments = blocks.mT @ blocks / 64
    assert (moments.float() == 0).any()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert fq.calibrate(params, statistics={"experts.*.weight": moments.to(dtype)[None]})
    assert fq.calibrate(params, statistics={"experts.*.weight": moments_of(1, 128).half()})


def test_statistics_of_other_groups_or_methods():
    """A missing group is a KeyError, an unexpected one and a method that weighs nothing a ValueError."""
    params = params_of()
    fq = transform_of(params, fqt.INT8, method=Mse())
    given = {"experts.*.weight": torch.ones(128)}
    assert_names(message_of(KeyError, fq.calibrate, params, statistics={}), "experts.*.weight")
    message = message_of(ValueError, fq.calibrate, params, statistics=given | {"other": torch.ones(1)})
    assert_names(message, "unexpected groups ['other']")
    for method in (Max(), Percentile()):
        message = message_of(ValueError, replace(fq, method=method).calibrate, params, statistics=given)
        assert_names(message, "statistics", type(method).__name__, "Mse")


@pytest.mark.parametrize("method", [Percentile(), Mse()], ids=lambda m: type(m).__name__)
@every_static
def test_weights_that_are_not_finite(format, method):
    """The same error as under Max: the parameter and the expert."""
    params = params_of()
    params["experts.2.weight"][1, 3] = torch.nan
    message = message_of(ValueError, transform_of(params, format, method=method).calibrate, params)
    assert_names(message, "experts.2.weight", "expert 2", "nan", "finite")


def test_wide_blocks_try_all_scales():
    """The window is shown to have the best for blocks of 16 only: wider ones, and weighted errors, try all."""
    wide = Format("NVFP4_WIDE", fqt.NVFP4.element, (1, 32), scale="e4m3")
    assert scale_search(fqt.NVFP4_STATIC, is_weighted=False).kind == "window"
    assert scale_search(fqt.NVFP4_STATIC, is_weighted=True).kind == "scales"
    assert scale_search(wide, is_weighted=False).kind == "scales"
    params = params_of(2)
    spec = fqt.select(params, {"*": wide})
    before, after = (
        errors_of(params, fqt.transform(spec, method=method).calibrate(params), spec) for method in (Max(), Mse())
    )
    assert all(after[name] < before[name] for name in before)


def test_vmap_and_compile_are_refused(monkeypatch):
    """Under vmap and torch.compile only Max is taken, and the message says so."""
    weight = experts(1, (4, 32))[0]
    fq = fqt.transform(fqt.select({"w": weight}, {"*": fqt.FP8}), method=Mse())
    message = message_of(ValueError, vmap(lambda w: fq.calibrate({"w": w})["w"]["amax"]), weight[None])
    assert_names(message, "Mse", "vmap", "Max")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_names(message_of(ValueError, fq.calibrate, {"w": weight}), "Mse", "torch.compile", "Max")
    check_statistics(Max(), None, fq.spec)


def test_meta_parameters():
    """Meta weights have no values to search in, and are refused by name; `init` has the shapes of a state."""
    params = {name: w.to("meta") for name, w in params_of().items()}
    for format in (fqt.FP8, fqt.INT4_BLOCK32, fqt.NVFP4_STATIC):
        for method in (Percentile(), Mse()):
            fq = transform_of(params, format, method=method)
            assert_names(message_of(ValueError, fq.calibrate, params), "experts.0.weight", "on meta")
            assert all(leaf.is_meta for leaf in flatten(fq.init(params)).values())


def test_tqdm_is_asked_for_by_name(monkeypatch):
    """Without tqdm a method that may take long says what to install; Max needs none."""
    params = params_of()
    fq = transform_of(params, fqt.FP8, method=Mse())
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert_names(message_of(ImportError, fq.calibrate, params), "tqdm", "fq_transforms[calibrate]")
    transform_of(params, fqt.FP8).calibrate(params)


def test_inputs_are_not_written_and_states_stay_apart():
    """No weight, statistic or earlier state changes; the leaves of max are not those of mse."""
    params = params_of()
    statistics = {"experts.*.weight": torch.rand(4, 128)}
    versions = [t._version for t in (*params.values(), *statistics.values())]
    for format in (*STATIC, fqt.MXFP4):
        fq = transform_of(params, format, method=Max() if format.is_stateless else Mse())
        state = fq.calibrate(params, statistics=None if format.is_stateless else statistics)
        assert (state["experts.*.weight"] == {}) == format.is_stateless
        fqt.state.check(state, fq.spec)
    assert [t._version for t in (*params.values(), *statistics.values())] == versions
