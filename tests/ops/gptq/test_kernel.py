"""The kernel of GPTQ's inner loop equals the reference, bit for bit: interpreted, and on a GPU at sizes of its own.

The interpreter takes each column of each program by itself, so blocks are narrow here; on a GPU they are not.
"""

import pytest
import torch

from fq_transforms.formats import FORMATS, Format
from fq_transforms.gptq import BLOCK
from fq_transforms.ops.gptq.launch import TILE, gptq_block_triton
from fq_transforms.ops.gptq.reference import gptq_block_reference
from tests.cases import ONE_OF_EACH_LEAF, experts, name_of, same_bits
from tests.ops.gptq.test_reference import ALLOWED, factors, scales_of
from tests.variants import CPU

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
SQUARE = Format("INT8_SQUARE", FORMATS["INT8"].element, (4, 8))
EACH_KIND = [*(format for format in ONE_OF_EACH_LEAF if format in ALLOWED), SQUARE]

# numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def width_of(format, least=45):
    """Columns of a weight, more than one block of the format, and not whole ones where it may be."""
    columns = format.block[1]
    return -(-least // columns) * columns if format.has_blocks_along_in else least


def assert_equals_reference(weight, format, first, width, *, order=None, scales=None, device="cpu", noise=0.1):
    """The kernel's errors of a block, in memory full of NaN: those of the reference, and NaN still around them."""
    count, rows, side = weight.shape
    amax, global_amax = scales or scales_of(weight, format)
    columns = torch.arange(side).expand(count, -1) if order is None else order
    taken = weight.gather(2, columns[:, None].expand(weight.shape))
    block = slice(first, first + width)
    size = torch.where(weight.isfinite(), weight, 0.0).abs().amax((1, 2), keepdim=True)
    target = (taken[..., block] + noise * size * torch.randn(count, rows, width)).contiguous()
    factor = factors(count, side)  # NaN on and below the diagonal
    wanted = gptq_block_reference(
        target, taken[..., block], factor[:, block, block], amax, global_amax, columns[:, block], format=format
    )
    memory = torch.full((count + 2, rows, side), torch.nan, device=device)
    errors = memory[1:-1]
    given = [t if t is None else t.contiguous().to(device) for t in (target, taken, factor, amax, global_amax, columns)]
    versions = [None if t is None else t._version for t in given]
    gptq_block_triton(*given[:2], errors, *given[2:], first, format=format)
    assert [None if t is None else t._version for t in given] == versions
    assert same_bits(errors[..., block].cpu().contiguous(), wanted), (format.name, first, width)
    memory[1:-1, :, block] = torch.nan
    assert memory.isnan().all()
    return wanted


@on_each_device
@pytest.mark.parametrize("format", [*ALLOWED, SQUARE], ids=name_of)
def test_equals_reference(format, device):
    """Every format, three experts of magnitudes of their own, ragged rows, a block amid the columns."""
    side = width_of(format)
    weight = torch.stack(experts(3, (5, side)))
    wanted = assert_equals_reference(weight, format, side // 2 - 3, 7, device=device)
    assert wanted[:2].ne(0).any((1, 2)).all()


@on_each_device
@pytest.mark.parametrize("rows", [1, TILE, TILE + 1])
@pytest.mark.parametrize(("first", "width"), [(0, 1), (0, 8), (30, 3), (44, 1)])
def test_any_rows_and_widths(rows, first, width, device):
    """One row and one more than a tile; one column, the last one, and widths that are no power of two."""
    for format in (FORMATS["INT8_PER_CHANNEL"], SQUARE):
        weight = torch.stack(experts(2, (rows, 45)))
        assert_equals_reference(weight, format, first, width, device=device)


@on_each_device
@pytest.mark.parametrize("format", EACH_KIND, ids=name_of)
def test_columns_in_another_order(format, device):
    """Each expert in an order of its own: its columns find the scales of where they are in the weight."""
    side = width_of(format)
    weight = torch.stack(experts(3, (6, side))) * 2.0 ** (torch.arange(side) // (format.block[1] or side))
    order = torch.stack([torch.randperm(side) for _ in range(3)])
    assert_equals_reference(weight, format, 5, 9, order=order, device=device)


@on_each_device
@pytest.mark.parametrize("format", EACH_KIND, ids=name_of)
def test_tiny_and_huge_experts(format, device):
    """Powers of two beside each other, zeros, what a stale amax clips, and targets far from their weights."""
    side = width_of(format)
    weight = torch.stack(experts(5, (3, side)))
    weight *= 2.0 ** torch.tensor([0, -20, 60, -100, 0])[:, None, None]
    weight[4] = 0.0
    assert_equals_reference(weight, format, 2, 6, device=device)
    assert_equals_reference(weight, format, 2, 6, device=device, noise=50.0)
    if not format.is_stateless:
        amax, global_amax = scales_of(weight, format)
        assert_equals_reference(weight, format, 2, 6, scales=(amax * 0.3, global_amax), device=device)


@on_each_device
@pytest.mark.parametrize("format", EACH_KIND, ids=name_of)
def test_amax_at_the_edges(format, device):
    """Zero, below and above 2**-24, and the largest: what becomes of them is the format's, as in `fake_quantize`."""
    side = width_of(format)
    weight = torch.stack(experts(5, (2, side)))
    weight = weight.sign() * torch.tensor([0.0, 2.0**-24, 2.0**-23, 2.0**-126, 3e38])[:, None, None]
    assert_equals_reference(weight, format, 0, 5, device=device, noise=0.0)


@on_each_device
@pytest.mark.parametrize("format", EACH_KIND, ids=name_of)
def test_nan_stays_in_its_row(format, device):
    """Law: a NaN target makes NaN of its row from there on and of nothing else; so does a NaN weight of its place."""
    side = width_of(format)
    weight = torch.stack(experts(2, (5, side)))
    scales = scales_of(weight, format)
    weight[1, 3, 4] = torch.nan
    wanted = assert_equals_reference(weight, format, 2, 5, scales=scales, device=device)
    assert wanted.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 3]]
    assert wanted[1, 3].isnan().tolist() == [False, False, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("format", ALLOWED, ids=name_of)
def test_equals_reference_at_size(format):
    """Whole blocks over many programs, the last one of the columns narrower, in order and not."""
    side = 384 if format.has_blocks_along_in else 333
    weight = torch.stack(experts(9, (131, side)))
    order = torch.stack([torch.randperm(side) for _ in range(9)])
    for first in range(0, side, BLOCK):
        width = min(BLOCK, side - first)
        assert_equals_reference(weight, format, first, width, device="cuda")
        assert_equals_reference(weight, format, first, width, order=order, device="cuda")
