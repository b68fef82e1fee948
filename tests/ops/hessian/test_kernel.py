"""The kernel of sums of products of inputs equals float64 to the rounding of its sums: interpreted, and on a GPU."""

import pytest
import torch

from fq_transforms.ops.hessian import kernel
from fq_transforms.ops.hessian.launch import SIDE, TOKENS, add_products, add_products_triton
from tests.cases import DTYPES, name_of
from tests.conftest import HAS_GPU
from tests.ops.hessian.test_reference import assert_sums, inputs
from tests.variants import CPU

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
# Several tiles and several steps of tokens, at the sizes that the interpreter takes; `tl.dot` wants 16 at least.
SMALL = {} if HAS_GPU else {"side": 16, "tokens": 16}

# numpy, inside the interpreter: products of infinity and zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def by_kernel(sums, x, experts, **settings):
    """In place; `experts` on the device of x, where `len(sums)` is no expert's."""
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=len(sums) + 1)[: len(sums)]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    add_products_triton(sums, x, order, starts, **SMALL | settings)


def chosen(tokens, seed=1):
    """Experts 0 to 4 of which 2 has no token and 3 many, and tokens of none."""
    experts = torch.randint(0, 6, (tokens,), generator=torch.Generator().manual_seed(seed))
    experts[experts == 2] = 3
    return experts


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (70, 33), (100, 50)])
def test_equals_float64(shape, dtype, device):
    """Ragged tiles and steps, experts without tokens, tokens of none, which are NaN; sums amid NaN."""
    x, experts = inputs(*shape, dtype).to(device), chosen(shape[0]).to(device)
    x[experts == 5] = torch.nan
    side = shape[1]
    memory = torch.full((7, side, side), torch.nan, device=device)
    sums = memory[1:6]
    before = torch.randn(5, side, side).to(device)
    sums.copy_(before + before.mT)
    before = sums.clone()
    versions = x._version, experts._version
    by_kernel(sums, x, experts)
    assert_sums(sums, before, x, experts)
    assert memory[0].isnan().all()
    assert memory[6].isnan().all()
    assert (x._version, experts._version) == versions


@on_each_device
def test_inputs_of_any_layout(device):
    """Strided, transposed and expanded inputs are what contiguous ones are, to the bit."""
    big = inputs(48, 40, torch.float32).to(device)
    for x in (big[::2, :20], big[:, 1::2], big[:40, :24].T, big[:1].expand(30, -1)):
        experts = chosen(len(x)).to(device)
        sums = [torch.zeros(5, x.shape[1], x.shape[1], device=device) for _ in range(2)]
        by_kernel(sums[0], x, experts)
        by_kernel(sums[1], x.clone(memory_format=torch.contiguous_format), experts)
        assert torch.equal(*sums)
        assert_sums(sums[0], torch.zeros_like(sums[0]), x, experts)


@on_each_device
def test_a_nan_stays_with_its_expert(device):
    """One token's NaN and infinity: in their own rows and columns of their own expert."""
    x, experts = inputs(40, 20, torch.bfloat16).to(device), chosen(40).to(device)
    first, second = (int((experts == e).nonzero()[0]) for e in (0, 4))
    x[first, 3], x[second, 7] = torch.nan, torch.inf
    sums = torch.zeros(5, 20, 20, device=device)
    by_kernel(sums, x, experts)
    assert sums[[1, 2, 3]].isfinite().all()
    for e, channel in ((0, 3), (4, 7)):
        assert not sums[e, channel, channel].isfinite()
        others = [i for i in range(20) if i != channel]
        assert sums[e][others][:, others].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(3000, 2 * SIDE + 1), (5 * TOKENS + 1, 768), (20_000, 130)])
def test_equals_float64_at_size(shape, dtype):
    """Through the public function, by experts and for one of them."""
    x, experts = inputs(*shape, dtype).cuda(), chosen(shape[0]).cuda()
    before = torch.zeros(5, shape[1], shape[1], device="cuda")
    sums = before.clone()
    add_products(sums, x, experts)
    assert_sums(sums, before, x, experts)
    middle = sums.clone()
    add_products(sums, x, 2)
    assert_sums(sums, middle, x, torch.full_like(experts, 2))


class Recorded:
    """In place of a kernel: what it was launched with."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        self.options = options


def test_fusion_is_not_left_to_triton(monkeypatch):
    """Bug: Triton 3.9 warns on a GPU of a launch that does not say whether products and sums are fused."""
    monkeypatch.setattr(kernel, "add_products_kernel", recorded := Recorded())
    by_kernel(torch.zeros(1, 8, 8), torch.ones(3, 8), torch.zeros(3, dtype=torch.int64))
    assert recorded.options["enable_fp_fusion"] is False
