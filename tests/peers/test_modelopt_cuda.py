"""The kernels against ModelOpt 0.47's own CUDA and Triton kernels, on the GPU, where a peer's definition is its kernel.

Run with `-s` to see the counts. ModelOpt compiles its CUDA extensions on first use.
"""

import pytest
import torch
import triton
import triton.language as tl

from fq_transforms.formats import FORMATS
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.autograd import fake_quantize
from tests.cases import AMAXES, DTYPES, adversarial, experts, finite_bf16, name_of, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
]  # compilers and ModelOpt warn; no number is touched


@pytest.fixture(scope="module")
def tensor_quant():
    return pytest.importorskip("modelopt.torch.quantization.tensor_quant")


def modelopt(tensor_quant, weight, amax, format):
    """ModelOpt's CUDA extension on one weight: amax [] or [out, 1]."""
    if format.element == FORMATS["INT8"].element:
        return tensor_quant.fake_quant_impl(weight, amax, 8, False, False)
    return tensor_quant.scaled_e4m3_impl(weight, amax)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["INT8", "INT8_PER_CHANNEL", "FP8", "FP8_PER_CHANNEL"])
def test_integers_and_fp8_equal_modelopts_cuda_kernels(tensor_quant, name, dtype):
    """Law: 0 elements differ, on random experts and on half steps of the scale and their neighbours, at every amax."""
    format = FORMATS[name]
    generator = torch.Generator().manual_seed(8)
    steps = 127 if name.startswith("INT8") else 448
    rows = 8 if format.block == (None, None) else 1  # that share an amax
    amaxes = torch.cat([torch.tensor(AMAXES), torch.exp2(40 * torch.rand(499, generator=generator) - 20)])
    ties = [*adversarial(amaxes, steps, dtype, 256 * rows).view(64 * rows, 8, 256).cuda()]
    random = experts(32, (256, 512), dtype, device="cuda")
    cases = [(ties, amaxes.view(-1, *([8, 1] if rows == 1 else []))), (random, expert_amax(random, format=format)[0])]
    if dtype != torch.float16:
        patterns = finite_bf16().to(dtype).cuda()
        edges = torch.tensor(AMAXES) if rows > 1 else torch.tensor(AMAXES)[:, None, None].expand(-1, len(patterns), 1)
        cases.append(([patterns] * len(AMAXES), edges))
    differing = total = 0
    for weights, amax in cases:
        outs = fake_quantize(weights, amax.cuda(), None, format=format)
        for found, weight, own in zip(outs, weights, amax.cuda(), strict=True):
            differing += int((found != modelopt(tensor_quant, weight, own, format)).sum())
            total += found.numel()
    print(f"{name} {name_of(dtype)}: {differing} of {total} elements differ from ModelOpt's CUDA kernel")
    assert differing == 0


@triton.jit
def _divide_approximately(a, b, out, n, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    quotient = tl.load(a + i, mask=i < n, other=0.0) / tl.load(b + i, mask=i < n, other=1.0)
    tl.store(out + i, quotient, mask=i < n)


def divide_approximately(a, b):
    """A / b as Triton's `/` divides fp32: `div.full`, within two units in the last place."""
    a, b = (t.contiguous() for t in torch.broadcast_tensors(a, b))
    out = torch.empty_like(a)
    _divide_approximately[(triton.cdiv(a.numel(), 1024),)](a, b, out, a.numel(), SIZE=1024)
    return out


def e2m1(v):
    """The E2M1 value nearest to v >= 0, ties to even, saturating."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=v.device)
    index = (v > 0.25).int() + (v >= 0.75) + (v > 1.25) + (v >= 1.75) + (v > 2.5) + (v >= 3.5) + (v > 5.0)
    return values[index]


def nvfp4(weight, amax, *, global_scale, divide_scale, divide, sign):
    """NVFP4 with ModelOpt's 1e-5 rule, each of its four deviations from our formula to be switched on alone."""
    x = weight.float().unflatten(-1, (-1, 16))
    g = amax / torch.tensor(6.0 * 448.0, device=x.device) if global_scale == "exact" else amax / (6.0 * 448.0)
    block_amax = x.abs().amax(-1, keepdim=True)
    scale = (divide_scale(block_amax, 6.0 * g)).clamp(max=448.0).to(torch.float8_e4m3fn).float() * g
    scale = torch.where(scale >= 1e-5, scale, torch.ones_like(scale))
    y = e2m1(divide(x.abs(), scale)) * scale
    negative = x.signbit() & (y > 0) if sign == "lost on zeros" else x.signbit()
    return torch.where(negative, -y, y).to(weight.dtype).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_nvfp4_differs_from_modelopts_triton_kernel_by_named_causes(tensor_quant, kind, dtype):
    """Law: ModelOpt's kernel is our formula with four changes, and switched on one by one they explain every element.

    The changes: amax / 2688 through a rounded reciprocal (PyTorch's division by a Python number on CUDA), the block's
    scale by an approximate division, the weights' quotients by an approximate division, and zeros losing their sign.
    """
    format = FORMATS["NVFP4_MODELOPT"]
    if kind == "random":
        weights = experts(32, (256, 512), dtype, device="cuda")
    else:  # every half step of a block's scale and its neighbours
        generator = torch.Generator().manual_seed(9)
        blocks = torch.exp2(6 * torch.rand(32 * 1024, generator=generator) - 6)
        weights = [*adversarial(blocks, 6.0, dtype, 16).view(32, 128, 128).cuda()]
    amax, _ = expert_amax(weights, format=format)
    exact = {"global_scale": "exact", "divide_scale": torch.div, "divide": torch.div, "sign": "kept"}
    changes = {
        "global_scale": "rounded reciprocal",
        "divide_scale": divide_approximately,
        "divide": divide_approximately,
        "sign": "lost on zeros",
    }
    counts = dict.fromkeys(changes, 0)
    differing = total = 0
    for found, weight, own in zip(fake_quantize(weights, amax, None, format=format), weights, amax, strict=True):
        theirs = tensor_quant.triton_kernel.fp4_fake_quant_block(weight, own)
        total += weight.numel()
        differing += int((found != theirs).sum())
        step = nvfp4(weight, own, **exact)
        assert same_bits(step, found)
        options = dict(exact)
        for change, value in changes.items():
            options[change] = value
            following = nvfp4(weight, own, **options)
            bits = (t.view(torch.int32 if t.element_size() == 4 else torch.int16) for t in (step, following))
            counts[change] += int((next(bits) != next(bits)).sum())
            step = following
        assert same_bits(step, theirs)
    causes = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(
        f"NVFP4 {name_of(dtype)}, {kind}: {differing} of {total} elements differ from ModelOpt's kernel; bits: {causes}"
    )
