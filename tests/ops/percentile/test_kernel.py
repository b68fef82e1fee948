"""The kernels of percentiles equal the reference, bit for bit: interpreted, and on a GPU at sizes of their own."""

import pytest
import torch

from fq_transforms.formats import FORMATS, Format
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.launch import Tile
from fq_transforms.ops.percentile.autograd import percentile_amax
from fq_transforms.ops.percentile.launch import HELD, percentile_triton
from fq_transforms.ops.percentile.reference import percentile_reference
from tests.cases import DTYPES, experts, name_of, same_bits
from tests.conftest import HAS_GPU

CPU = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")
DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_each_layout = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
SQUARE = Format("INT8_SQUARE", FORMATS["INT8"].element, (4, 8))
CORE = [*(FORMATS[n] for n in ("INT8", "FP8_PER_CHANNEL", "INT4_BLOCK32", "NVFP4_STATIC")), SQUARE]
WIDE = Format("INT8_WIDE", FORMATS["INT8"].element, (64, 512))
PERCENTILES = [1e-9, 50.0, 99.9, 100.0]
# Several programs an expert, and several steps of each, at the sizes that the interpreter takes.
SMALL_DIGIT = Tile(32, 1, 2)

# numpy, inside the interpreter: infinities that are subtracted.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def shape_of(format):
    return (2, 128) if format.has_blocks_along_in else (5, 18)


def assert_equals_reference(weights, format, transposed, percentile, **settings):
    stored = [w.mT.contiguous() if transposed else w for w in weights]
    found = percentile_triton(stored, format=format, transposed=transposed, percentile=percentile, **settings)
    wanted = [percentile_reference(weight.cpu(), percentile, format=format) for weight in weights]
    assert same_bits(found.cpu(), torch.stack(wanted)), (format.name, percentile, settings)
    return found


@on_each_device
@pytest.mark.parametrize(("dtype", "transposed"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)])
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_equals_reference(format, dtype, transposed, device):
    """Two experts of magnitudes of their own, ragged in the last program and at both edges of a square block."""
    weights = experts(2, shape_of(format), dtype, device=device)
    for percentile in PERCENTILES:
        found = assert_equals_reference(weights, format, transposed, percentile, digit=SMALL_DIGIT)
    amax, _ = expert_amax(weights, format=format)
    assert torch.equal(found, amax)  # the hundredth


@on_each_device
@on_each_layout
@pytest.mark.parametrize("format", [FORMATS["FP8_PER_CHANNEL"], SQUARE], ids=name_of)
def test_granules_that_do_not_fit(format, transposed, device):
    """A granule larger than what a program keeps is read once a bit, a part of it at a time; ties lie in all parts."""
    weights = experts(2, (2, 37) if format.block[0] == 1 else (3, 9), torch.bfloat16, device=device)
    weights[1] = weights[1].sign()
    held = 512 if transposed and format.block[0] == 1 else 16  # 16 weights of each of 32 rows, or of one granule
    assert_equals_reference(weights, format, transposed, 75.0, held=held)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", [FORMATS[n] for n in ("INT8", "FP8_PER_CHANNEL", "INT4_BLOCK32")], ids=name_of)
def test_values_at_the_edges(format, dtype, device):
    """Zeros, ties, subnormals, the largest, infinities and NaN: each where it is next to the percentile asked for."""
    out_features, in_features = shape = shape_of(format)
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    patterns = {
        "zeros": [0.0, -0.0],
        "ties": [1.0, -1.0, 1.0, 2.0],
        "tiny": [0.0, least / 2, -least / 4, least],
        "ends": [most, -most, least, 0.0],
        "infinite": [1.0, torch.inf, -2.0, -torch.inf],
        "NaN": [1.0, torch.nan, 3.0, 4.0, 5.0],
    }
    if device == "cpu" and dtype == torch.bfloat16:  # whose subnormals are wrong in the interpreter's fp32
        patterns["tiny"] = [0.0, 2 * least, -least, 4 * least]
    weights = []
    for values in patterns.values():
        repeated = torch.tensor(values).repeat(out_features * in_features // len(values) + 1)
        weights.append(repeated[: out_features * in_features].view(shape).to(device, dtype))
    for percentile in (49.0, 50.0, 100.0):  # short of the middle, in it
        found = assert_equals_reference(weights, format, False, percentile)
        assert found[:4].isfinite().all()
        assert (found[0] == 0).all()
    assert found[4].isnan().all()  # infinity less infinity, as `torch.quantile` has it
    assert found[5].isnan().any()


@on_each_device
def test_neighbours_in_other_digits(device):
    """The neighbour above may share all digits, all but the last, or none: both are found, whatever lies between."""
    pairs = [(1.0, 1.0), (1.0, 1.0 + 2.0**-7), (1.0, 2.0**60), (0.0, 2.0**-100)]
    weights = [torch.tensor([[one] * 15 + [other] * 18], device=device) for one, other in pairs]
    for dtype in (torch.bfloat16, torch.float32):
        for percentile in (40.0, 45.0, 48.0):  # at one, between the two, at the other
            typed = [w.to(dtype) for w in weights]
            assert_equals_reference(typed, FORMATS["FP8"], False, percentile, digit=Tile(32, 1))


@on_each_device
@pytest.mark.parametrize("format", [FORMATS["INT8"], FORMATS["NVFP4_STATIC"], SQUARE], ids=name_of)
def test_inputs_of_any_layout(format, device):
    """Strided, misaligned, stacked and unevenly placed weights give what contiguous ones give; none is written to."""
    big = experts(1, (48, 128), device=device)[0]
    groups = {
        "strided": [big[:4:2, ::2]],
        "misaligned": [big.flatten()[1 : 1 + 2 * 64].view(2, 64)],
        "stacked": [big[:6].reshape(3, 2, 128)],
        "a table of addresses": [big[0:2], big[4:6], big[20:22]],
    }
    for layout, weights in groups.items():
        versions = [w._version for w in weights]
        found = percentile_triton(weights, format=format, transposed=False, percentile=75.0)
        matrices = [m for w in weights for m in w.reshape(-1, *w.shape[-2:])]
        wanted = torch.stack([percentile_reference(m.cpu(), 75.0, format=format) for m in matrices])
        assert same_bits(found.cpu(), wanted), layout
        assert [w._version for w in weights] == versions


@pytest.mark.gpu
@on_each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", [*CORE, FORMATS["INT4_BLOCK128"], FORMATS["FP8_BLOCK"], WIDE], ids=name_of)
def test_equals_reference_at_size(format, dtype, transposed):
    """Every granularity and layout over many programs, rows of more weights than a program keeps among them."""
    shapes = [(200, 384)] if format.has_blocks_along_in else [(301, 273), (3, HELD + 5), (HELD + 5, 3)]
    for shape in shapes:
        weights = experts(3, shape, dtype, device="cuda")
        for percentile in (*PERCENTILES, 99.99):
            assert_equals_reference(weights, format, transposed, percentile)


@pytest.mark.gpu
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_the_public_search_launches_once(format):
    """On a GPU `percentile_amax` is these kernels, once a group or once a digit, and takes little memory."""
    weights = experts(8, (512, 512), torch.bfloat16, device="cuda")
    amax, _ = expert_amax(weights, format=format)
    percentile_amax(weights, amax, format=format, percentile=99.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Without acc_events a process's second profile would warn, and warnings are errors.
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as profile:
        percentile_amax(weights, amax, format=format, percentile=99.0)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= amax.nbytes + 8 * 2**13
    launches = sum(event.count for event in profile.key_averages() if "percentile" in event.key)
    assert launches == (3 if format.block == (None, None) else 1)
