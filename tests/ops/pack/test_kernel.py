"""The kernel equals the reference, byte by byte."""

from dataclasses import replace

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.formats import E2M1, E3M2, FloatElement
from fq_transforms.ops.pack.launch import pack_scales_triton, pack_triton
from fq_transforms.ops.pack.reference import code_bits, pack_reference, pack_scales
from tests.cases import CORE_FORMATS, DTYPES, experts, name_of
from tests.conftest import HAS_GPU
from tests.full import FULL
from tests.ops.pack.cases import PACKABLE, amax_of

CPU = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def packed_by_both(weight, amax, global_amax, format, transposed):
    """(name, the kernel's, the reference's) bytes of codes, scale and global scale."""
    wanted = pack_reference(weight, amax, global_amax, format=format)
    stored = [(w.mT if transposed else w).contiguous() for w in weight]
    found = pack_triton(stored, amax, global_amax, format=format, transposed=transposed)
    for name, a, b in zip(("codes", "scale", "global_scale"), found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            yield name, a.view(torch.uint8), b.view(torch.uint8)


def assert_kernel_equals_reference(weight, amax, global_amax, format, transposed):
    for name, found, wanted in packed_by_both(weight, amax, global_amax, format, transposed):
        assert torch.equal(found, wanted), name


@on_each_device
@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter: NaN
def test_scales_of_the_state_alone(format, device):
    """For every kind of amax, more of them than a program takes, those that are none and both zeros included."""
    numbers = [0.0, -0.0, 2.0**-24, 2.0**-25, 1e-40, 2.0**-126, 1.0, 2688.0, 1e38, 3.4e38, torch.inf, torch.nan, -1.0]
    amax = torch.cat([torch.tensor(numbers), torch.rand(2000).exp2()]).to(device)
    amax = None if format.is_stateless else amax
    wanted = pack_scales(amax, amax, format=format)
    for found, scale in zip(pack_scales_triton(amax, amax, format), wanted, strict=True):
        assert (found is None) == (scale is None)
        assert found is None or torch.equal(found.nan_to_num(-7.0), scale.nan_to_num(-7.0))


def odd_shapes(format):
    """Shapes whose codes end within a strand, a word or a square block."""
    if format.has_blocks_along_in:
        return [(3, 3 * format.block[1])]
    if format.block[0] == 128:
        return [(130, 200)]
    return [(3, 37)] if code_bits(format) == 8 else [(5, 20), (3, 24), (7, 32)]


FP4, FP6 = (replace(fqt.FP8, name=f"FP{4 + 2 * i}", element=element) for i, element in enumerate((E2M1, E3M2)))


@on_each_device
@pytest.mark.parametrize(
    ("format", "transposed"),
    [(format, False) for format in [*PACKABLE, FP4, FP6]]
    # A convention's numbers do not depend on the layout: it has the other one on a GPU, and with FULL=1.
    + [(format, True) for format in [*PACKABLE, FP4, FP6] if FULL or HAS_GPU or format in [*CORE_FORMATS, FP4, FP6]],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter: NaN in lanes that are not used
def test_the_kernel_equals_the_reference(format, transposed, device):
    """Codes, scales and global scales, bit for bit, in every dtype: odd rows, an odd number of blocks, ragged squares.

    Rows end within a strand or a word; blocks and experts are zero, tiny, or clipped. In the interpreter bf16 and fp16
    have one layout each.
    """
    half = torch.float16 if transposed else torch.bfloat16
    dtypes, shapes = [torch.float32, half], odd_shapes(format)
    if device == "cuda":
        dtypes, shapes = DTYPES, [*shapes, (5, 2 * (format.block[1] or 48)), (130, 128)]
    for dtype in dtypes:
        magnitudes = (2.0**-100, 1e-4, 1.0, 0.0) if dtype == torch.float32 else (1.0, 2.0**-10)
        for shape in shapes:
            weights = experts(len(magnitudes), shape)
            stacked = torch.stack([w.mul(m).to(dtype) for w, m in zip(weights, magnitudes, strict=True)]).to(device)
            stacked[-2, 0, :40] = 0.0
            assert_kernel_equals_reference(stacked, *amax_of(stacked, format, 0.6), format, transposed)


ODD = [
    replace(fqt.FP8, name=f"FP{1 + e + m}_E{e}M{m}", element=FloatElement(e, m, largest))
    for e, m, largest in [(1, 0, 2.0), (1, 1, 3.0), (2, 0, 4.0), (2, 2, 7.0), (3, 1, 24.0), (3, 3, 30.0), (3, 4, 31.0)]
]


@on_each_device
@pytest.mark.parametrize("format", [*PACKABLE, FP4, FP6, *ODD], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as there
def test_the_kernel_on_any_magnitudes(format, device):
    """Weights from the smallest fp32 to the largest side by side, and those at and next to every tie."""
    powers = torch.tensor([-140, -126, -60, -20, 0, 7, 60, 120], dtype=torch.float32).exp2().repeat_interleave(32)
    weight = torch.stack(experts(2, (3, 256), torch.float32)) * powers
    ties = torch.arange(-128, 128) / 16.0
    weight[0, 1] = torch.where(ties.abs() > 6.5, 6.0, ties)
    weight[0, 2] = weight[0, 1].nextafter(torch.tensor(torch.inf))
    weight = weight.to(device)
    assert_kernel_equals_reference(weight, *amax_of(weight, format), format, False)


@on_each_device
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.NVFP4_STATIC], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as there
def test_the_kernel_at_ties_under_any_global_scale(format, device):
    """Scales next to powers of two, where quotients are hardest, from the smallest normal g to the largest; both signs.

    So no step of a quotient underflows, and weights far above a stale amax are the largest value, infinite ones too.
    """
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for significand in (1.0, 1 + 2.0**-23, 1.5 - 2.0**-23, 1.5, 2 - 2.0**-23):
        exponents = torch.tensor([-126, -90, -63, -62, -61, -20, 0, 40, 61, 62, 63, 90, 115])
        g = significand * exponents.float().exp2()
        middle = (g[:, None] * ties).view(torch.int32)
        near = torch.cat([(middle + ulps).view(torch.float32) for ulps in range(-3, 4)], dim=1)
        blocks = near.view(len(g), 7, 7)
        largest = (6 * g)[:, None, None].expand(-1, 7, 1)
        weight = torch.cat([largest, blocks, -largest, -blocks], dim=2).flatten(1)[:, None].to(device)
        amax = (2688 * g).to(device)
        block_amax = largest.view(len(g), 1, 7).to(device)
        if not format.dynamic:
            weight[..., 3], weight[..., 12] = torch.inf, -torch.inf
        stales = (1.0, 2.0**-30, 2.0**-170, 2.0**-200)
        for stale in stales if device == "cuda" or significand in (1.0, 1.5) else stales[:1]:
            smaller = (amax.double() * stale).float()  # in fp32 the factor itself would be zero
            stale_amax = torch.where(smaller > 2.0**-120, smaller, amax)
            state = (stale_amax, None) if format.dynamic else (block_amax, stale_amax)
            assert_kernel_equals_reference(weight, *state, format, False)


@on_each_device
@pytest.mark.parametrize("format", [f for f in PACKABLE if f.dynamic], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as there
def test_nan_stays_in_its_block(format, device):
    """A NaN or an infinity makes its block's scale NaN; its codes mean nothing, and all others are as they were."""
    columns = format.block[1]
    for invalid in (torch.nan, torch.inf):
        weight = torch.stack(experts(2, (3, 4 * columns), torch.float32)).to(device)
        amax, global_amax = amax_of(weight, format)
        weight[0, 1, columns + 3] = invalid
        (_, codes, wanted), (_, scale, wanted_scale), *_ = packed_by_both(weight, amax, global_amax, format, False)
        assert torch.equal(scale, wanted_scale)
        size = columns * code_bits(format) // 8
        codes[0, 1, size : 2 * size] = wanted[0, 1, size : 2 * size]
        assert torch.equal(codes, wanted)
