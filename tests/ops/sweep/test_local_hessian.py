"""The sweep by second moments of a block's inputs: d^T H d is never above max's, though its terms cancel."""

from functools import partial

import pytest
import torch

from fq_transforms.formats import E4M3, FORMATS, NVFP4_STATIC, Format
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.ops.sweep.autograd import in_units, swept_amax
from fq_transforms.ops.sweep.launch import sweep_triton
from fq_transforms.ops.sweep.reference import Search, bound_of_form, doubt_of, margin_of, sweep_reference
from tests.cases import DTYPES, STATIC_FORMATS, experts, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.ops.sweep.test_reference import Watch
from tests.oracle import fake_quantize_experts
from tests.variants import CPU, on_each_kernel, variants

INT4_BLOCK32 = FORMATS["INT4_BLOCK32"]
SMALL = Format("INT4_BLOCK4", INT4_BLOCK32.element, (1, 4))
FP8_BLOCK32 = Format("FP8_BLOCK32", E4M3, (1, 32))
FORMATS_TRIED = [SMALL, FP8_BLOCK32, *(format for format in STATIC_FORMATS if format.has_blocks_along_in)]
every_format = pytest.mark.parametrize("format", FORMATS_TRIED, ids=name_of)
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)
RATIOS = Search("ratios", Mse().ratios)
FEW = RATIOS if HAS_GPU else Search("ratios", (0.7, 0.9, 1.25))  # the interpreter is slow

# numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def search_of(format):
    return RATIOS if format.scale == "fp32" else Search("scales")


def inputs_of_kind(kind, count, generator):
    """Inputs [tokens, count]: independent; mixed; all alike but for signs, where terms cancel most; fewer than B."""
    if kind == "alike":
        signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
        return torch.randn(64, 1, generator=generator) * signs + 1e-3 * torch.randn(64, count, generator=generator)
    x = torch.randn(3 if kind == "few" else 4 * count, count, generator=generator)
    return x if kind == "independent" else x @ torch.randn(count, count, generator=generator)


def moments_of(count, columns, kind="mixed", seed=0, device="cpu"):
    """Second moments of each block of columns, in units: fp32 [count, columns, columns], symmetric to the bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([inputs_of_kind(kind, columns, generator) for _ in range(count)]).double()
    moments = (x.mT @ x) / x.shape[1]
    moments = (moments + moments.mT) / 2
    largest = moments.diagonal(dim1=-2, dim2=-1).amax(-1)
    return torch.ldexp(moments, 1 - torch.frexp(largest)[1][:, None, None]).float().to(device)


def amax_of(weight, format):
    return expert_amax_reference(weight, format=format)


def difference(weight, amax, global_amax, format, fake=fake_quantize_reference):
    """What is lost of each block: fp64 [out, in / B, B]."""
    y = fake(weight, amax, global_amax, format=format, out_dtype=torch.float32)
    return (weight.double() - y.double()).unflatten(-1, (-1, format.block[1]))


def errors(d, moments):
    """d^T H d of each block in fp64."""
    return torch.einsum("obi,bij,obj->ob", d, moments.double(), d)


def doubts(d, moments):
    """What two roundings of an error are less than."""
    return 2 * margin_of(d.shape[-1]) * torch.einsum("obi,bij->ob", d * d, moments.double().abs())


def by_oracle(weight, amax, global_amax, *, format, out_dtype):
    g = None if global_amax is None else global_amax[None]
    return fake_quantize_experts(weight[None], amax[None], g, format)[0]


def candidates(amax, global_amax, search):
    """Every amax that is tried beside max."""
    if search.kind == "ratios":
        return [amax * ratio for ratio in search.ratios]
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return [(global_amax * (scale / torch.tensor(448.0))).expand(amax.shape) for scale in scales]


@pytest.mark.parametrize("kind", ["independent", "mixed", "alike", "few"])
@every_format
def test_never_worse_than_max(format, kind):
    """Law: no block of any expert has a larger d^T H d than under max, in float64, whatever cancels."""
    columns, changed = format.block[1], 0
    for e, dtype in enumerate(DTYPES):
        weight, moments = experts(3, (9, 2 * columns), dtype)[e], moments_of(2, columns, kind, seed=e)
        amax, global_amax = amax_of(weight, format)
        found = sweep_reference(weight, amax, global_amax, moments, format=format, search=search_of(format))
        before, after = (errors(difference(weight, a, global_amax, format), moments) for a in (amax, found))
        moved = found != amax
        assert (after[moved] < before[moved]).all()
        changed += int(moved.sum())
    assert changed


@pytest.mark.parametrize("kind", ["mixed", "alike"])
@every_format
def test_the_least_of_what_is_tried(format, kind):
    """Law: no candidate's error is smaller by more than the doubts of the two, and max's; all by the oracle."""
    columns = format.block[1]
    weight, moments = experts(2, (6, 2 * columns))[1], moments_of(2, columns, kind)
    amax, global_amax = amax_of(weight, format)
    search = search_of(format)
    found = sweep_reference(weight, amax, global_amax, moments, format=format, search=search)
    d = partial(difference, weight, global_amax=global_amax, format=format, fake=by_oracle)
    least = torch.full_like(amax, torch.inf, dtype=torch.float64)
    for tried in [amax, *candidates(amax, global_amax, search)]:
        bound = errors(d(amax=tried), moments) + doubts(d(amax=tried), moments)
        least = torch.minimum(least, torch.where(amax > 2.0**-24, bound, torch.inf))
    assert (errors(d(amax=found), moments) <= least + doubts(d(amax=amax), moments)).all()
    assert (found != amax).any()


@pytest.mark.parametrize("columns", [2, 4, 16, 32, 128, 512])
def test_bounds_of_a_form(columns):
    """Law: the true error is between the bounds, and the upper one is not negative, as the form without doubt may be.

    Moments are v v^T, exact in fp32, and differences nearly orthogonal to v, so that all terms cancel.
    """
    generator = torch.Generator().manual_seed(columns)
    v = torch.randint(-8, 8, (2048 // columns, columns), generator=generator) * 2 + 1.0
    v = v * 2.0**-4
    moments = v[:, :, None] * v[:, None, :]
    d = torch.rand(64, *v.shape, generator=generator).double() - 0.5
    v = v.double()
    d = (d - v * (d * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True)).float()
    true = (d.double() * v).sum(-1) ** 2
    low, plain, high = (
        bound_of_form(d.flatten(1), moments, sign * doubt_of(moments)).double() for sign in (-1.0, 0.0, 1.0)
    )
    assert (low <= true).all()
    assert (true <= high).all()
    assert (high >= 0).all()
    assert (plain < 0).any()
    assert (plain > 2 * true).any()


@every_format
def test_identity_and_diagonal(format):
    """Law: the identity is no statistics, and a diagonal is that of mean squares, but for errors that are equal."""
    columns = format.block[1]
    weight = experts(2, (32, 4 * columns))[1]
    amax, global_amax = amax_of(weight, format)
    run = partial(sweep_reference, weight, amax, global_amax, format=format, search=search_of(format))
    for squares in (torch.ones(4 * columns), torch.rand(4 * columns)):
        moments = torch.diag_embed(squares.view(4, columns))
        found, wanted = run(moments), run(squares)
        one, other = (errors(difference(weight, a, global_amax, format), moments) for a in (found, wanted))
        same = found == wanted
        assert ((one - other).abs() <= 2.0**-14 * other)[~same].all()
        assert same.float().mean() > 0.98
        assert (found != amax).any()


@every_format
def test_correlations_count(format):
    """Inputs that go together: their errors may cancel, so the amax is better than the one by their squares alone."""
    columns = format.block[1]
    weight, moments = experts(2, (64, columns))[1], moments_of(1, columns, "alike")
    amax, global_amax = amax_of(weight, format)
    run = partial(sweep_reference, weight, amax, global_amax, format=format, search=search_of(format))
    by_form, by_squares = run(moments), run(moments.diagonal(dim1=-2, dim2=-1).flatten())
    one, other = (errors(difference(weight, a, global_amax, format), moments).sum() for a in (by_form, by_squares))
    assert one < 0.5 * other


@every_format
def test_zero_blocks_and_granules_that_are_not_swept(format):
    """A block whose inputs were all zero keeps max's amax, and so does one of zeros, tiny, infinite or NaN weights."""
    columns = format.block[1]
    usual = experts(1, (4, 2 * columns))[0]
    moments = moments_of(2, columns)
    moments[0] = 0.0
    amax, global_amax = amax_of(usual, format)
    run = partial(sweep_reference, format=format, search=search_of(format))
    found = run(usual, amax, global_amax, moments)
    assert torch.equal(found[:, 0], amax[:, 0])
    assert not torch.equal(found[:, 1], amax[:, 1])
    for value in (0.0, 2.0**-24, 2.0**-140, torch.nan, torch.inf):
        weight = torch.full((1, 2 * columns), value)
        amax, global_amax = amax_of(weight, format)
        assert same_bits(run(weight, amax, global_amax, moments), amax)


@every_format
def test_what_underflows_keeps_max(format):
    """Errors so small that fp32 has no place for them are no reason to leave max."""
    columns = format.block[1]
    weight = experts(1, (8, columns))[0]
    amax, global_amax = amax_of(weight, format)
    run = partial(sweep_reference, weight, amax, global_amax, format=format, search=search_of(format))
    moments = moments_of(1, columns)
    assert torch.equal(run(moments * 2.0**-125), amax)
    assert not torch.equal(run(moments * 2.0**-60), amax)


@pytest.mark.parametrize("layout", ["separate", "stacked", "transposed"])
@pytest.mark.parametrize("format", [INT4_BLOCK32, NVFP4_STATIC], ids=name_of)
def test_each_expert_by_itself(format, layout):
    """An expert's amax comes from its own moments; only ratios within a block count, and no input is written.

    Moments that are not symmetric to the bit are as their mean with their transpose.
    """
    columns = format.block[1]
    weights = experts(4, (5, 3 * columns), torch.bfloat16)
    stored = {"stacked": [torch.stack(weights)], "transposed": [w.mT.contiguous() for w in weights]}.get(
        layout, weights
    )
    options = {"format": format, "transposed": layout == "transposed"}
    amax, global_amax = expert_amax(stored, **options)
    moments = torch.stack([moments_of(3, columns, seed=e) for e in range(4)])
    skew = 2.0**-9 * torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    exponents = torch.randint(-90, 90, (4, 3, 1, 1), generator=torch.Generator().manual_seed(8))
    given = torch.ldexp(moments + (skew - skew.mT), exponents)
    versions = [t._version for t in (*stored, amax, given)]
    search = RATIOS if format.scale == "fp32" else Search("window")
    found = swept_amax(stored, amax, global_amax, given, search=search, **options)
    assert [t._version for t in (*stored, amax, given)] == versions
    both = moments + (skew - skew.mT)
    both = (both + both.mT) / 2
    assert torch.equal(in_units(given), both)
    for e, weight in enumerate(weights):
        g = None if global_amax is None else global_amax[e]
        wanted = sweep_reference(weight, amax[e], g, both[e], format=format, search=search)
        assert torch.equal(found[e], wanted)
    assert not torch.equal(found, swept_amax(stored, amax, global_amax, given.flip(0), search=search, **options))


@pytest.mark.parametrize("format", [INT4_BLOCK32, NVFP4_STATIC], ids=name_of)
def test_memory_is_a_few_copies_of_the_weight(format):
    """However wide a row of moments is, it meets the weight without a copy for each of its numbers."""
    weight, columns = experts(1, (128, 256))[0], format.block[1]
    amax, global_amax = amax_of(weight, format)
    moments = moments_of(256 // columns, columns)
    with Watch() as watch:
        sweep_reference(weight, amax, global_amax, moments, format=format, search=search_of(format))
    assert watch.most < 12 * weight.nbytes


def assert_equals_reference(weights, format, transposed, search, moments):
    stored = [w.mT.contiguous() if transposed else w for w in weights]
    amax, global_amax = expert_amax(weights, format=format)
    options = {"format": format, "search": search}
    found = sweep_triton(stored, amax, global_amax, moments, transposed=transposed, **options)
    for e, weight in enumerate(weights):
        g = None if global_amax is None else global_amax[e]
        assert same_bits(found[e], sweep_reference(weight, amax[e], g, moments[e], **options))
    return found, amax


CORE = [SMALL, FP8_BLOCK32, NVFP4_STATIC, *(FORMATS[n] for n in ("INT4_BLOCK32_KIMI", "INT4_BLOCK32", "INT4_BLOCK128"))]
WIDELY = [NVFP4_STATIC, INT4_BLOCK32]


@on_each_kernel(variants(CORE, WIDELY), [])
def test_kernel_equals_reference(format, dtype, transposed, device):
    """Two experts of magnitudes of their own, two blocks of columns, rows that do not fill the program."""
    columns = format.block[1]
    moments = torch.stack([moments_of(2, columns, kind, e, device) for e, kind in enumerate(("mixed", "alike"))])
    weights = experts(2, (5, 2 * columns), dtype, device=device)
    found, amax = assert_equals_reference(weights, format, transposed, FEW, moments)
    assert not torch.equal(found, amax)


@on_each_kernel([], variants([*CORE, *(f for f in FORMATS_TRIED if f not in CORE)], CORE))
def test_kernel_equals_reference_at_size(format, dtype, transposed, device):
    """Many programs, all that `Mse` tries."""
    columns = format.block[1]
    moments = torch.stack([moments_of(512 // columns, columns, "mixed", e, device) for e in range(3)])
    assert_equals_reference(experts(3, (301, 512), dtype, device=device), format, transposed, FEW, moments)


@on_each_device
def test_kernel_tries_all_scales(device):
    """The sweep over all 126 scales, which weighted errors take, equals the reference's."""
    weights = experts(1, (1, 16), device=device)
    moments = moments_of(1, 16, device=device)[None]
    assert_equals_reference(weights, NVFP4_STATIC, False, Search("scales"), moments)


@on_each_device
@pytest.mark.parametrize("format", [INT4_BLOCK32, FP8_BLOCK32, NVFP4_STATIC], ids=name_of)
def test_kernel_of_granules_that_are_not_swept(format, device):
    """Zero, tiny, subnormal, NaN and infinite experts keep max's amax, beside a usual one; so does a block of zeros."""
    shape = (4, format.block[1])
    values = (0.0, 2.0**-24, 2.0**-140, torch.nan, torch.inf)
    usual = experts(1, shape, device=device) * 2
    weights = [*usual, *(torch.full(shape, value, device=device) for value in values)]
    moments = moments_of(1, shape[1], device=device).repeat(len(weights), 1, 1, 1)
    moments[1] = 0.0
    found, amax = assert_equals_reference(weights, format, False, FEW, moments)
    assert same_bits(found[1:], amax[1:])
    assert not torch.equal(found[0], amax[0])


@pytest.mark.gpu
@pytest.mark.parametrize("format", [INT4_BLOCK32, NVFP4_STATIC], ids=name_of)
def test_the_public_search_launches_once(format):
    """On a GPU `swept_amax` is this kernel, once a group, beside what brings the moments into units."""
    columns = format.block[1]
    weights = experts(8, (520, 512), torch.bfloat16, device="cuda")
    moments = torch.stack([moments_of(512 // columns, columns, seed=e, device="cuda") for e in range(8)])
    amax, global_amax = expert_amax(weights, format=format)
    call = partial(swept_amax, weights, amax, global_amax, moments, format=format, search=search_of(format))
    call()
    torch.cuda.synchronize()
    # Without acc_events a process's second profile would warn, and warnings are errors.
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "sweep_kernel" in event.key) == 1
