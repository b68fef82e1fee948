"""The kernel of casts equals its reference bit for bit: in Triton's interpreter on a CPU, and compiled on a GPU."""

import pytest
import torch

from fq_transforms.ops.cast.launch import cast_triton
from fq_transforms.ops.cast.reference import cast_reference
from fq_transforms.ops.launch import results_for
from tests.cases import same_bits
from tests.variants import CPU

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 130), (64, 96)])
def test_the_kernel_is_the_reference(shape, dtype, device):
    """Patterns of 16 bits, apart, evenly spaced, and one that is not contiguous; of a NaN the bits are not defined.

    The interpreter rounds bf16 below 2**-126 to zero, so a CPU is not given those.
    """
    patterns = torch.arange(2**16, dtype=torch.int32).sub(2**15).to(torch.int16).view(dtype)
    if device == "cpu":
        patterns = patterns[(patterns.float().abs() >= 2.0**-126) | (patterns == 0)]
    size = shape[0] * shape[1]
    starts = range(0, len(patterns) - size, max(size, 2**12))
    apart = [patterns[at : at + size].to(device).clone().view(shape) for at in starts]
    apart[1] = apart[1].mT.contiguous().mT
    for grads in (apart, list(torch.stack(apart)), apart[:1]):
        found, wanted = results_for(grads, torch.float32), cast_reference(grads)
        cast_triton(found, grads)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert same_bits(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
