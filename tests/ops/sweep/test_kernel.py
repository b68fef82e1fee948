"""The kernel of the sweep chooses the amax that the reference does, bit for bit: interpreted, and on a GPU.

The interpreter takes a second for a thousand weights, so shapes are small here; on a GPU they are not.
"""

import pytest
import torch

from fq_transforms.formats import FORMATS, Format
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.sweep.autograd import swept_amax
from fq_transforms.ops.sweep.launch import sweep_triton
from fq_transforms.ops.sweep.reference import Search, sweep_reference
from tests.cases import STATIC_FORMATS, experts, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.variants import CPU, on_each_kernel, variants

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
# The interpreter is slow; on a GPU the number of ratios is compiled into the kernel, so one number serves all tests.
RATIOS = Search("ratios", Mse().ratios if HAS_GPU else (0.7, 0.9, 1.25))
SQUARE = Format("INT8_SQUARE", FORMATS["INT8"].element, (8, 16))
CORE = [*(FORMATS[n] for n in ("INT8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "INT4_BLOCK128", "FP8", "FP8_PER_CHANNEL"))]
CORE += [SQUARE, FORMATS["NVFP4_STATIC"]]
WIDELY = [SQUARE, *(FORMATS[name] for name in ("FP8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "NVFP4_STATIC"))]

# numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def searches_of(format):
    return [RATIOS] if format.scale == "fp32" else [RATIOS, Search("window")]


def assert_equals_reference(weights, format, transposed, search, importance=None, amax=None):
    stored = [w.mT.contiguous() if transposed else w for w in weights]
    found_amax, global_amax = expert_amax(weights, format=format)
    amax = found_amax if amax is None else amax
    options = {"format": format, "search": search}
    found = sweep_triton(stored, amax, global_amax, importance, transposed=transposed, **options)
    for e, weight in enumerate(weights):
        g, h = (None if leaf is None else leaf[e] for leaf in (global_amax, importance))
        assert same_bits(found[e], sweep_reference(weight, amax[e], g, h, **options))
    return found


@on_each_kernel(variants(CORE, WIDELY), [])
def test_equals_reference(format, dtype, transposed, device):
    """Three experts of magnitudes of their own, with and without importance, ragged in the last program."""
    shape = (5, 3 * format.block[1]) if format.has_blocks_along_in else (11, 40)
    weights = experts(3, shape, dtype, device=device)
    importance = torch.rand(3, shape[1], device=device) * 2
    for search in searches_of(format):
        assert_equals_reference(weights, format, transposed, search, importance)
        if device == "cpu" and (transposed or dtype != torch.float32):  # as slow again, and no other branch
            continue
        found = assert_equals_reference(weights, format, transposed, search)
        if format.has_blocks_along_in:
            assert not torch.equal(found, expert_amax(weights, format=format)[0])


@on_each_kernel([], variants([*STATIC_FORMATS, SQUARE], WIDELY))
def test_equals_reference_at_size(format, dtype, transposed, device):
    """Every static format and convention over many programs, all that `Mse` tries, and all 126 scales.

    With importance, which bf16 is without.
    """
    shape = (200, 384) if format.has_blocks_along_in else (301, 273) if format.block[0] == 128 else (130, 1000)
    weights = experts(5, shape, dtype, device=device)
    importance = None if dtype == torch.bfloat16 else torch.rand(5, shape[1], device=device) * 2
    searches = [RATIOS]
    if format.scale == "e4m3":
        searches += [Search("window"), Search("scales")]
    for search in searches:
        assert_equals_reference(weights, format, transposed, search, importance)


@on_each_device
def test_all_scales(device):
    """The sweep over all 126 scales, which weighted errors take, equals the reference's."""
    weights = experts(2, (1, 64), device=device)
    importance = torch.rand(2, 64, device=device)
    assert_equals_reference(weights, FORMATS["NVFP4_STATIC"], False, Search("scales"), importance)


@on_each_device
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_granules_that_are_not_swept(format, device):
    """Zero, tiny, subnormal, huge, NaN and infinite experts, each beside a usual one, which is swept all the same."""
    shape = (1, 128)
    usual = experts(1, shape, device=device)[0]
    values = (0.0, 2.0**-24, 2.0**-140, 3e38, torch.nan, torch.inf)
    weights = [usual, *(torch.full(shape, value, device=device) for value in values)]
    alone, _ = expert_amax(weights, format=format)
    for search in searches_of(format):
        found = assert_equals_reference(weights, format, False, search)
        kept = [1, 2, 3, 5, 6]
        assert same_bits(found[kept], alone[kept])


@on_each_device
@pytest.mark.parametrize("format", [FORMATS["INT8"], FORMATS["NVFP4_STATIC"]], ids=name_of)
def test_inputs_of_any_layout(format, device):
    """Strided, misaligned, stacked and unevenly placed weights give what contiguous ones give; none is written to."""
    big = experts(1, (48, 128), device=device)[0]
    search = searches_of(format)[-1]
    groups = {
        "strided": [big[:4:2, ::2]],
        "misaligned": [big.flatten()[1 : 1 + 2 * 64].view(2, 64)],
        "stacked": [big[:6].reshape(3, 2, 128)],
        "a table of addresses": [big[0:2], big[4:6], big[20:22]],
    }
    for layout, weights in groups.items():
        versions = [w._version for w in weights]
        amax, global_amax = expert_amax(weights, format=format)
        found = sweep_triton(weights, amax, global_amax, None, format=format, transposed=False, search=search)
        matrices = [m for w in weights for m in w.reshape(-1, *w.shape[-2:])]
        for e, matrix in enumerate(matrices):
            g = None if global_amax is None else global_amax[e]
            wanted = sweep_reference(matrix, amax[e], g, None, format=format, search=search)
            assert same_bits(found[e], wanted), layout
        assert [w._version for w in weights] == versions


@pytest.mark.gpu
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_the_public_search_launches_once(format):
    """On a GPU `swept_amax` is this kernel, once a group, and takes less memory than a copy of the weights."""
    weights = experts(8, (520, 512), torch.bfloat16, device="cuda")
    amax, global_amax = expert_amax(weights, format=format)
    search = Search("window") if format.scale == "e4m3" else Search("ratios", Mse().ratios)
    swept_amax(weights, amax, global_amax, None, format=format, search=search)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Without acc_events a process's second profile would warn, and warnings are errors.
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as profile:
        swept_amax(weights, amax, global_amax, None, format=format, search=search)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < sum(w.nbytes for w in weights)
    assert sum(event.count for event in profile.key_averages() if "sweep_kernel" in event.key) == 1
