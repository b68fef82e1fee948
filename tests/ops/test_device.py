"""Exhaustive proofs of the kernels' quotients: over all 2**23 significands of a divisor, on a GPU.

Quotients scale with powers of two, so one binade of divisors stands for all. In the interpreter a sample is run, which
shows that the arithmetic means the same there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fq_transforms.ops import device
from fq_transforms.ops.pack import kernel as pack_kernel
from tests.conftest import HAS_GPU
from tests.full import FULL

SIGNIFICANDS = 2**23 if HAS_GPU else 2**9
STEP = 1 if HAS_GPU or FULL else 4  # between the integers that are tried
DEVICE = "cuda" if HAS_GPU else "cpu"

pytestmark = [pytest.mark.gpu] if HAS_GPU else []


def significands():
    """Every fp32 in [1, 2); a spread of them in the interpreter."""
    step = 2**23 // SIGNIFICANDS
    bits = 0x3F800000 + torch.arange(0, 2**23, step, dtype=torch.int32, device=DEVICE)
    bits[1], bits[-1] = 0x3F800001, 0x3FFFFFFF  # next to the powers of two, where reciprocals are worst
    return bits.view(torch.float32)


@triton.jit
def quotients_kernel(dividends, divisors, fast, exact, n, BLOCK: tl.constexpr):
    """Fast = the kernels' quotient, exact = IEEE division."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(dividends + i, mask=i < n, other=1.0)
    b = tl.load(divisors + i, mask=i < n, other=1.0)
    tl.store(fast + i, device.quotient(a, b, device.reciprocal(b)), mask=i < n)
    tl.store(exact + i, tl.div_rn(a, b), mask=i < n)


@triton.jit
def scales_kernel(QMAX: tl.constexpr, amaxes, fast, exact, n, BLOCK: tl.constexpr):
    """Fast = the kernels' QMAX / amax, exact = IEEE division."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax = tl.load(amaxes + i, mask=i < n, other=1.0)
    tl.store(fast + i, device.qmax_over(QMAX, amax), mask=i < n)
    tl.store(exact + i, tl.div_rn(QMAX, amax), mask=i < n)


@triton.jit
def rounded_kernel(
    dividends, divisors, fast, exact, n, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BLOCK: tl.constexpr
):
    """Both quotients, rounded to a small float as the kernels do."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(dividends + i, mask=i < n, other=1.0)
    b = tl.load(divisors + i, mask=i < n, other=1.0)
    q = device.quotient(a, b, device.reciprocal(b))
    tl.store(fast + i, device.round_magnitude(q, MIN_EXPONENT, MANTISSA), mask=i < n)
    tl.store(exact + i, device.round_magnitude(tl.div_rn(a, b), MIN_EXPONENT, MANTISSA), mask=i < n)


@triton.jit
def codes_kernel(dividends, divisors, fast, exact, n, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of E2M1 as packing makes them, from a reciprocal with an error; and those of the IEEE quotient."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(dividends + i, mask=i < n, other=1.0)
    b = tl.load(divisors + i, mask=i < n, other=1.0)
    approximate = device.float_of(device.bits_of(device.reciprocal(b + b)) + ERROR)
    high, low = pack_kernel._split_reciprocal(b + b, approximate)
    tl.store(fast + i, (pack_kernel._half_quotient_codes(a, high, low) & 15).to(tl.float32), mask=i < n)
    codes = pack_kernel._magnitude_codes(tl.minimum(tl.div_rn(a, b), 6.0), 4, 0, 1)
    tl.store(exact + i, (codes & 15).to(tl.float32), mask=i < n)


def count_differences(kernel, *inputs, **constants):
    fast, exact = torch.empty_like(inputs[-1]), torch.empty_like(inputs[-1])
    n = fast.numel()
    kernel[(triton.cdiv(n, 1024),)](*inputs, fast, exact, n, BLOCK=1024, enable_fp_fusion=False, **constants)
    assert not fast.isnan().any()
    return int((fast != exact).sum())


def test_integer_quotients_are_correctly_rounded():
    """Q / s for integers 1..128, on a GPU each, and every significand of s, as INT dequantization computes it."""
    s = significands()
    for q in range(1, 129, STEP):
        assert count_differences(quotients_kernel, torch.full_like(s, q), s) == 0, q


@pytest.mark.parametrize("qmax", [7.0, 7.5, 127.0, 127.5, 448.0, 57344.0])
def test_scales_are_correctly_rounded(qmax):
    """QMAX / amax for every significand of amax, at both ends of its range too: there 1 / amax is subnormal."""
    for exponent in (-24, 0, 126, 127):
        amax = significands() * 2.0**exponent
        fast, exact = torch.empty_like(amax), torch.empty_like(amax)
        grid = (triton.cdiv(amax.numel(), 1024),)
        scales_kernel[grid](qmax, amax, fast, exact, amax.numel(), BLOCK=1024, enable_fp_fusion=False)
        assert torch.equal(fast, exact), exponent


E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
# One binade of normal ties, and all of the subnormal ones.
E4M3_TIES = [1 + (2 * k + 1) / 16 for k in range(8)] + [(k + 0.5) * 2.0**-9 for k in range(8)]


@pytest.mark.parametrize(
    ("ties", "min_exponent", "mantissa"), [(E2M1_TIES, 0, 1), (E4M3_TIES, -6, 3)], ids=["E2M1", "E4M3"]
)
def test_quotients_fall_on_the_right_side_of_every_tie(ties, min_exponent, mantissa):
    """For every divisor and tie, the eleven fp32 dividends around tie * divisor round as their IEEE quotient does.

    Any other dividend is several units in the last place from a tie, further than both quotients are from the real one.
    """
    s = significands()
    for tie in ties:
        middle = (s * tie).view(torch.int32)
        for ulps in range(-5, 6):
            dividend = (middle + ulps).view(torch.float32)
            found = count_differences(rounded_kernel, dividend, s, MIN_EXPONENT=min_exponent, MANTISSA=mantissa)
            assert found == 0, (tie, ulps)


@triton.jit
def steps_kernel(dividends, divisors, fast, exact, n, BLOCK: tl.constexpr):
    """Weights in steps of an integer's scale, rounded: by the kernels' quotient, and by IEEE division."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(dividends + i, mask=i < n, other=1.0)
    b = tl.load(divisors + i, mask=i < n, other=1.0)
    tl.store(fast + i, device.round_integer(device.over_int_scale(a, b, False, False), -128.0, 127.0), mask=i < n)
    tl.store(exact + i, device.round_integer(tl.div_rn(a, b), -128.0, 127.0), mask=i < n)


@triton.jit
def far_kernel(weight: tl.constexpr, divisors, fast, n, BLOCK: tl.constexpr):
    """One weight in steps of each scale."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(divisors + i, mask=i < n, other=1.0)
    a = tl.full([BLOCK], weight, tl.float32)
    tl.store(fast + i, device.round_integer(device.over_int_scale(a, b, False, False), -128.0, 127.0), mask=i < n)


def test_quotients_fall_on_the_right_side_of_every_half_step():
    """As above for integers from 0, both signs, and for what lies far beyond them, at both ends of a scale's range."""
    s = significands()
    for tie in [k + 0.5 for k in range(0, 129, STEP)]:
        middle = (s * tie).view(torch.int32)
        for ulps in range(-5, 6):
            dividend = (middle + ulps).view(torch.float32) * (1 if ulps % 2 else -1)
            assert count_differences(steps_kernel, dividend, s) == 0, (tie, ulps)
    for exponent in (-31, 0, 119):
        scale = s * 2.0**exponent
        for weight in (400.0, 3.4e38, torch.inf, 1e-45, 0.0):
            steps = (torch.full_like(s, weight).double() / scale).round().clamp(max=127)
            found = torch.empty_like(s)
            far_kernel[(triton.cdiv(s.numel(), 1024),)](
                weight, scale, found, s.numel(), BLOCK=1024, enable_fp_fusion=False
            )
            assert torch.equal(found.double(), steps), (exponent, weight)


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_codes_are_those_of_the_quotient(error):
    """As above for packing's quotient in two steps, whatever the error of the reciprocal; and above the largest value.

    With the rest of the reciprocal as it is, or with its square, 2 - 2**-23 fails.
    """
    s = significands()
    for tie in [*E2M1_TIES, 6.0, 7.0, 1000.0]:
        middle = (s * tie).view(torch.int32)
        for ulps in range(-5, 6):
            dividend = (middle + ulps).view(torch.float32)
            assert count_differences(codes_kernel, dividend, s, ERROR=error) == 0, (tie, ulps)


@pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here anyway")
def test_every_kernel_compiles_for_an_h200():
    """Without one: the interpreter takes Python that the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "ahead.py")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(root)}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "278 kernels compiled for sm_90" in done.stdout
