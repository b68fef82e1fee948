"""Pieces on a CPU: whatever is cut, the bits are those of the reference of the whole, and memory does not grow."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fq_transforms as fqt
from fq_transforms.formats import FORMATS
from fq_transforms.ops import pieces
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.pack.reference import pack_reference
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.pack import pack
from fq_transforms.spec import Group, Spec
from tests.cases import name_of
from tests.ops.pack.cases import PACKABLE

ALL = [*FORMATS.values(), *(format for format in PACKABLE if format.name not in FORMATS)]
# [E, out, in]: ragged edges of square blocks; experts so small that a piece has several; one row.
SHAPES = [(2, 150, 256), (7, 16, 128), (1, 1, 128)]


def weight_of(shape):
    """Experts of their own magnitudes, with a row of zeros of the other sign."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    weight *= torch.logspace(-3, 2, shape[0])[:, None, None]
    weight[0, 0] = -0.0
    return weight.bfloat16()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "WEIGHTS", 2**13)


def assert_bits(found, wanted):
    """The same bits; a NaN has many."""
    if found is None or wanted is None:
        assert found is wanted
        return
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if found.dtype.is_floating_point:
        found, wanted = found.float(), wanted.float()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() | found.isnan(), wanted.signbit() | wanted.isnan())
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ALL, ids=name_of)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_give_the_bits_of_the_whole(format, shape):
    """Amax, fake weights and codes are those of the reference: stacked, separate, transposed in memory; NaN as well."""
    weight = weight_of(shape)
    amax, global_amax = expert_amax_reference(weight, format=format)
    amax = None if format.is_stateless else amax if format.dynamic else amax * 0.75
    hostile = weight.clone()
    hostile[0, -1, 3], hostile[-1, 0, 7], hostile[-1, -1, -1] = torch.nan, torch.inf, -torch.inf
    for transposed in (False, True):
        options = {"format": format, "transposed": transposed}
        for x in (weight, hostile):
            stored = x.mT.contiguous() if transposed else x
            for tensors in ([stored], list(stored)):
                for found, wanted in zip(
                    expert_amax(tensors, **options), expert_amax_reference(x, format=format), strict=True
                ):
                    assert_bits(found, wanted)
                fakes = fake_quantize(tensors, amax, global_amax, out_dtype=torch.float32, **options)
                wanted = fake_quantize_reference(x, amax, global_amax, format=format, out_dtype=torch.float32)
                for i, fake in enumerate(fakes):
                    assert fake.is_contiguous()
                    assert_bits(fake.mT if transposed else fake, wanted if fake.dim() == 3 else wanted[i])
                if x is weight and not format.unit_scale_below:
                    found = packed(tensors, amax, global_amax, **options)
                    leaves = pack_reference(x, amax, global_amax, format=format)
                    for leaf, one in zip(found, [leaf for leaf in leaves if leaf is not None], strict=True):
                        assert_bits(leaf, one)


def packed(tensors, amax, global_amax, *, format, transposed):
    params = {f"w.{i}": tensor for i, tensor in enumerate(tensors)}
    is_stacked = tensors[0].dim() == 3
    experts = len(tensors[0]) if is_stacked else len(tensors)
    a, b = tensors[0].shape[-2:]
    group = Group("w", tuple(params), format, experts, (b, a) if transposed else (a, b), is_stacked, transposed)
    state = {"w": {name: leaf for name, leaf in (("amax", amax), ("global_amax", global_amax)) if leaf is not None}}
    return pack(params, state, spec=Spec((group,)))["w"].values()


class Made(TorchDispatchMode):
    """The memory of all tensors that operations make: address and bytes."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.made.add(memory_of(one))
        return out


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4_STATIC", "FP8", "FP8_BLOCK", "INT4_BLOCK32", "MXFP6_E3M2"])
def test_temporaries_do_not_grow_with_a_matrix(name):
    """All that `calibrate`, `fakequant` and `pack` make beside their results is as large as a piece."""
    params = {"w": torch.randn(8 * pieces.WEIGHTS // 256, 256).bfloat16()}
    fq = fqt.transform(fqt.select(params, {"*": FORMATS[name]}))
    state = fq.calibrate(params)
    for call in (lambda: fq.calibrate(params), lambda: fq.fakequant(params, state), lambda: fq.pack(params, state)):
        with Made() as mode:
            results = call()
        known = {memory_of(tensor) for tensor in tree_leaves([results, params, state])}
        assert max(size for _, size in mode.made - known) <= 4 * pieces.WEIGHTS
