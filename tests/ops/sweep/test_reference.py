"""The sweep over amax: never worse than max, the least of what is tried, and what ModelOpt's calibrators choose."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fq_transforms.formats import E4M3, FORMATS, NVFP4_STATIC, Format
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference, spread
from fq_transforms.ops.sweep.reference import SCALES, Search, chunk_of, shift_of, sweep_reference
from tests.cases import DTYPES, STATIC_FORMATS, experts, name_of, same_bits
from tests.oracle import fake_quantize_experts

RATIOS = Search("ratios", Mse().ratios)
every_format = pytest.mark.parametrize("format", STATIC_FORMATS, ids=name_of)


def searches_of(format):
    return [RATIOS] if format.scale == "fp32" else [RATIOS, Search("window"), Search("scales")]


def shapes_of(format):
    """Small ones, odd where the block allows it, and ragged on both sides of a square block."""
    if format.has_blocks_along_in:
        return [(5, 256)]
    return [(3, 7), (9, 48)] if format.block[0] in (1, None) else [(130, 272)]


def amax_of(weight, format):
    amax, global_amax = expert_amax_reference(weight, format=format)
    return amax, global_amax


def errors(weight, amax, global_amax, format, importance=None, fake=fake_quantize_reference):
    """Squared error of each granule in float64, in the shape of the amax."""
    y = fake(weight, amax, global_amax, format=format, out_dtype=torch.float32)
    error = (weight.double() - y.double()) ** 2
    if importance is not None:
        error = error * importance.double()
    places = torch.arange(amax.numel(), dtype=torch.float32).view(amax.shape)
    granule = spread(places, weight, format).expand(weight.shape).long()
    return (
        torch.zeros(amax.numel(), dtype=torch.float64)
        .index_add_(0, granule.flatten(), error.flatten())
        .view(amax.shape)
    )


def by_oracle(weight, amax, global_amax, *, format, out_dtype):
    return fake_quantize_experts(weight[None], amax[None], None if global_amax is None else global_amax[None], format)[
        0
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_format
def test_never_worse_than_max(format, dtype):
    """Law: no granule of any expert has a larger error than under max, in float64, with and without importance."""
    changed = 0
    for shape in shapes_of(format):
        importance = torch.rand(shape[1]) * 2
        for weight in experts(5, shape, dtype):
            amax, global_amax = amax_of(weight, format)
            for search in searches_of(format):
                for h in (None, importance):
                    found = sweep_reference(weight, amax, global_amax, h, format=format, search=search)
                    before, after = (errors(weight, a, global_amax, format, h) for a in (amax, found))
                    assert (after <= before).all()
                    assert (after[found != amax] < before[found != amax]).all()
                    changed += int((found != amax).sum())
    assert changed


@every_format
def test_the_least_of_what_is_tried(format):
    """Law: no candidate has an error smaller by more than the margin, all by the oracle, which knows no chunks."""
    for shape in shapes_of(format)[-1:]:
        for weight in experts(2, shape):
            amax, global_amax = amax_of(weight, format)
            found = sweep_reference(weight, amax, global_amax, None, format=format, search=RATIOS)
            least = errors(weight, amax, global_amax, format, fake=by_oracle)
            for ratio in RATIOS.ratios:
                tried = errors(weight, amax * ratio, global_amax, format, fake=by_oracle)
                least = torch.minimum(least, torch.where(amax > 2.0**-24, tried, torch.inf))
            assert (errors(weight, found, global_amax, format, fake=by_oracle) <= least * (1 + 2.0**-15)).all()


def blocks_of_every_kind():
    """NVFP4 blocks: Gaussian, heavy tails, one outlier, all equal, and so small that their scales are subnormal."""
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(64, 16, generator=generator)
    outlier = 0.05 * torch.randn(64, 16, generator=generator)
    outlier[:, 5] = 4.0
    equal = torch.linspace(0.1, 1, 64)[:, None].expand(64, 16)
    steps = torch.randint(0, 25, (64, 16), generator=generator) / 4
    kinds = torch.cat([gaussian, gaussian**3, outlier, equal, steps])
    small = kinds * 2.0 ** -torch.randint(0, 19, (len(kinds), 1), generator=generator)
    weight = torch.cat([kinds, small, torch.zeros(1, 16)])
    weight[0, 0] = 80.0
    return weight


def test_the_window_has_the_best_of_all_scales():
    """Law: 24 scales around max's own give an error as small as all 126, by the oracle."""
    weight = blocks_of_every_kind()
    amax, global_amax = amax_of(weight, NVFP4_STATIC)
    chosen = [
        sweep_reference(weight, amax, global_amax, None, format=NVFP4_STATIC, search=Search(kind))
        for kind in ("window", "scales")
    ]
    window, scales = (errors(weight, a, global_amax, NVFP4_STATIC, fake=by_oracle) for a in chosen)
    assert (chosen[0] != amax).float().mean() > 0.3
    assert ((window - scales).abs() <= 2.0**-15 * scales).all()


def test_all_scales_are_tried():
    """Each E4M3 scale is chosen by the block whose weights lie on that scale's values, and comes out of the amax."""
    codes = torch.arange(1, SCALES + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0]).repeat(2)
    for top in (1.0, 1.7, 2.0**-20, 3e30):
        g = torch.tensor(top) / torch.tensor(2688.0)
        weight = (codes * g)[:, None] * values
        weight[:, 8] *= 1.9  # beyond 6 for no scale, between two values for max's own
        amax, _ = amax_of(weight, NVFP4_STATIC)
        importance = torch.ones(16)
        importance[8] = 0.0
        search = Search("scales")
        found = sweep_reference(weight, amax, torch.tensor(top), importance, format=NVFP4_STATIC, search=search)
        s8 = (found[:, 0] / (6 * g)).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(s8, codes)
        assert errors(weight, found, torch.tensor(top), NVFP4_STATIC, importance).max() == 0


@every_format
def test_powers_of_two_change_nothing(format):
    """Law: weights times 2**k give the amax times 2**k: no square overflows or vanishes on the way."""
    weight = experts(1, shapes_of(format)[-1], torch.bfloat16)[0].float()
    amax, global_amax = amax_of(weight, format)
    for search in searches_of(format):
        found = sweep_reference(weight, amax, global_amax, None, format=format, search=search)
        for k in (-15, 100):
            times = 2.0**k
            g = None if global_amax is None else global_amax * times
            moved = sweep_reference(weight * times, amax * times, g, None, format=format, search=search)
            if format.scale == "fp32":
                swept = amax * times * 0.25 > 2.0**-24  # all candidates
                assert torch.equal(moved[swept], (found * times)[swept])
                assert swept.any()
            else:
                assert torch.equal(moved, found * times)


@every_format
def test_what_is_not_swept(format):
    """Zeros, a tiny, an infinite and a NaN granule keep max's amax; so does one whose error max makes zero."""
    shape = shapes_of(format)[-1]
    for value in (0.0, 2.0**-24, 2.0**-140, torch.nan, torch.inf):
        weight = torch.full(shape, value)
        amax, global_amax = amax_of(weight, format)
        for search in searches_of(format):
            assert same_bits(sweep_reference(weight, amax, global_amax, None, format=format, search=search), amax)
    exact = torch.ones(shape)
    amax, global_amax = amax_of(exact, format)
    for search in searches_of(format):
        found = sweep_reference(exact, amax, global_amax, None, format=format, search=search)
        assert (errors(exact, found, global_amax, format) <= errors(exact, amax, global_amax, format)).all()


def test_the_first_of_equals_wins():
    """A ratio that is tried again, or no better than max, changes nothing."""
    weight = experts(1, (4, 32))[0]
    format = FORMATS["INT4_BLOCK32"]
    amax, _ = amax_of(weight, format)
    once = sweep_reference(weight, amax, None, None, format=format, search=Search("ratios", (0.9, 0.8)))
    again = sweep_reference(weight, amax, None, None, format=format, search=Search("ratios", (0.9, 0.8, 0.8, 1.0, 0.9)))
    assert torch.equal(once, again)
    assert torch.equal(sweep_reference(weight, amax, None, None, format=format, search=Search("ratios", (1.0,))), amax)


@every_format
def test_importance(format):
    """Ones are no importance; a channel without any may be clipped; twice the importance is the same choice."""
    weight = experts(2, shapes_of(format)[-1])[1]
    amax, global_amax = amax_of(weight, format)
    run = partial(sweep_reference, weight, amax, global_amax, format=format, search=searches_of(format)[-1])
    ones = torch.ones(weight.shape[1])
    h = torch.rand(weight.shape[1])
    assert torch.equal(run(h / 4), run(h))
    if format.scale == "fp32":
        assert torch.equal(run(ones), run(None))
    if format.element == E4M3:  # a float's steps are as fine below a third of its largest value
        return
    weight[:, 1] = 3 * weight.abs().max()
    amax, global_amax = amax_of(weight, format)
    h = ones.clone()
    h[1] = 0.0
    run = partial(sweep_reference, weight, amax, global_amax, format=format)
    search = Search("ratios", (1 / 3,)) if format.scale == "fp32" else Search("scales")
    assert run(h, search=search).flatten()[0] < amax.flatten()[0]
    if format.scale == "fp32":
        assert torch.equal(run(ones, search=search).flatten()[0], amax.flatten()[0])


def test_units_of_the_sum():
    """Errors of the largest matrix stay below 2**62 and of the smallest are fine-grained; chunks divide `in`."""
    assert shift_of(FORMATS["FP8"], (2**13, 2**13)) == 62 - 3 - 26
    assert shift_of(FORMATS["FP8"], (1, 1)) == 59
    assert shift_of(FORMATS["FP8_PER_CHANNEL"], (2**13, 2688)) == 62 - 3 - 12
    assert [chunk_of(FORMATS["FP8"], n) for n in (7, 130, 2688, 24)] == [1, 2, 16, 8]
    assert [chunk_of(FORMATS[name], 4096) for name in ("FP8_BLOCK", "INT4_BLOCK128", "NVFP4_STATIC")] == [16, 128, 16]


class Watch(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of those made within."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("name", ["INT8", "FP8_PER_CHANNEL", "INT4_BLOCK32", "NVFP4_STATIC", "FP8_BLOCK"])
def test_memory_does_not_grow_with_candidates(name):
    """Trying 64 amax takes the memory of trying two, a few copies of one expert's weight in fp32."""
    format = FORMATS[name]
    weight = experts(1, (128, 256))[0]
    amax, global_amax = amax_of(weight, format)
    most = []
    for count in (2, 64):
        search = Search("ratios", tuple(torch.linspace(0.5, 1, count).tolist()))
        with Watch() as watch:
            sweep_reference(weight, amax, global_amax, None, format=format, search=search)
        most.append(watch.most / weight.nbytes)
    assert 2 < most[1] < most[0] + 0.5
    assert most[1] < 12


@pytest.fixture(scope="module")
def modelopt():
    quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    calib = pytest.importorskip("modelopt.torch.quantization.calib.mse")
    return SimpleNamespace(quant=quant, Mse=calib.MseCalibrator, Scales=calib.NVFP4MSECalibrator)


def modelopt_quantize(modelopt, format):
    """ModelOpt's own fake quantization on the CPU, of weights in granules."""
    if format.element == E4M3:
        return modelopt.quant.fp8_eager
    bits = {127: 8, 7: 4}[format.element.qmax]
    return lambda x, amax: modelopt.quant.fake_tensor_quant(x, amax, None, bits, False, False)


NUMBERS = [(0.25, 4.0, 0.1), (0.25, 1.25, 0.05), (1.0, 1.5, 0.5), (0.3, 1.0, 0.07)]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "name", ["INT8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "INT4_BLOCK128", "FP8", "FP8_PER_CHANNEL"]
)
def test_equals_modelopts_mse_calibrator(modelopt, name, numbers):
    """Law: the amax is that of ModelOpt's sweep, wherever that is better than max, which its sweep may lack."""
    format, (start, stop, step) = FORMATS[name], numbers
    method = Mse(start, stop, step)
    quantize = modelopt_quantize(modelopt, format)
    differ = 0
    for weight in experts(3, (16, 256), torch.bfloat16, seed=5):
        amax, _ = amax_of(weight, format)
        x, initial, axis = weight, amax, None if format.block == (None, None) else 0
        if format.has_blocks_along_in:
            x, initial = weight.reshape(-1, format.block[1]), amax.reshape(-1, 1)
        theirs = modelopt.Mse(initial, axis, step, start, stop, quant_func=quantize)
        theirs.collect(x)
        wanted = theirs.compute_amax().view(amax.shape)
        found = sweep_reference(weight, amax, None, None, format=format, search=Search("ratios", method.ratios))
        moved = found != amax
        assert torch.equal(found[moved], wanted[moved])
        assert (errors(weight, wanted, None, format) >= (1 - 2.0**-15) * errors(weight, amax, None, format))[
            ~moved
        ].all()
        differ += int(moved.sum())
    assert differ or numbers != NUMBERS[1]


def test_equals_modelopts_sweep_over_scales(modelopt):
    """Law: NVFP4's scales are those of ModelOpt's sweep over all 126, block by block, and the amax where it moves."""
    weight = torch.cat([blocks_of_every_kind().bfloat16().float(), torch.randn(512, 16)])
    amax, global_amax = amax_of(weight, NVFP4_STATIC)

    def quantize(x, tried):
        tried = tried.view(amax.shape)
        return fake_quantize_reference(x, tried, global_amax, format=NVFP4_STATIC, out_dtype=torch.float32)

    theirs = modelopt.Scales(amax[:, 0], global_amax, axis=0, quant_func=quantize)
    theirs.collect(weight)
    wanted = theirs.compute_amax()[:, None]
    found = sweep_reference(weight, amax, global_amax, None, format=NVFP4_STATIC, search=Search("window"))
    moved = found != amax
    same = found == wanted
    # Where they differ, both errors are equal but for rounding: ours is the first that is better than max.
    one, other = (errors(weight, a, global_amax, NVFP4_STATIC) for a in (found, wanted))
    assert ((one - other).abs() <= 2.0**-15 * other)[~same].all()
    assert moved.float().mean() > 0.3
    assert same[moved].float().mean() > 0.98


def test_a_format_of_square_blocks_equals_its_blocks():
    """Each block of a ragged matrix is swept as if it were a matrix of its own, but for the unit of its sum."""
    format = Format("INT8_SQUARE", FORMATS["INT8"].element, (4, 8))
    weight = experts(2, (10, 20), seed=2)[1]
    amax, _ = amax_of(weight, format)
    found = sweep_reference(weight, amax, None, None, format=format, search=RATIOS)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
        block = weight[4 * i : 4 * i + 4, 8 * j : 8 * j + 8]
        alone = sweep_reference(block, amax[i, j], None, None, format=FORMATS["INT8"], search=RATIOS)
        assert torch.equal(found[i, j], alone)
