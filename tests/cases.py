"""Shapes, formats, dtypes and inputs that tests run over, as tables. No tolerances: what is compared here is exact."""

import numpy as np
import optree
import pytest
import torch
from jaxtyping import TypeCheckError

import fq_transforms
from fq_transforms.formats import FORMATS

ALL_FORMATS = list(FORMATS.values())
STATIC_FORMATS = [format for format in ALL_FORMATS if format.clips]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The formats themselves; the others are conventions, which differ in one number.
CORE_FORMATS = [getattr(fq_transforms, name) for name in fq_transforms.__all__ if name in FORMATS]

# One format for each kind of leaf that a state can have, and one without.
ONE_OF_EACH_LEAF = [
    FORMATS[name] for name in ("FP8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "NVFP4", "NVFP4_STATIC", "FP8_BLOCK", "MXFP4")
]

# (out, in): odd and prime where the format's block allows it; ragged on both sides of a square block.
ANY_SHAPES = [(1, 1), (3, 7), (17, 130)]
SQUARE_BLOCK_SHAPES = [(3, 7), (130, 257)]


# amax at and beside every threshold of a formula.
TINY = 2.0**-24
FLOAT32_MAX = float(np.finfo(np.float32).max)
BELOW_TINY, ABOVE_TINY = (float(np.nextafter(np.float32(TINY), np.float32(to))) for to in (0, 1))
AMAXES = [0.0, 2.0**-149, BELOW_TINY, ABOVE_TINY, 1e-3, 0.3, 1.0, 3.7, 127.0, 448.0, 65504.0, 3e38, FLOAT32_MAX]


def meta(*shape, dtype=torch.bfloat16):
    """A parameter without storage: selection reads names, shapes and dtypes only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def expert_list(pattern, experts=4, shape=(48, 64)):
    """Separate experts, most recent first, so that nothing leans on the order of a state dict."""
    return {pattern.format(i): meta(*shape) for i in reversed(range(experts))}


def shapes_of(format):
    """Shapes that a format can quantize."""
    if format.has_blocks_along_in:  # one block; an odd number of them in a row, and just more than the widest tile
        columns = format.block[1]
        return [(1, columns), (4096 // (3 * columns) + 1, 3 * columns)]
    return ANY_SHAPES if format.block[0] in (1, None) else SQUARE_BLOCK_SHAPES


def experts(count, shape, dtype=torch.float32, *, seed=0, device="cpu"):
    """`count` weights, each with a magnitude of its own, a tenth of them zero, and a zero row in every third expert."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for expert in range(count):
        weight = torch.randn(shape, generator=generator) * 2.0 ** (expert % 7 - 5)
        weight *= torch.rand(shape, generator=generator) > 0.1
        if expert % 3 == 2:
            weight[0] = 0.0
        weights.append(weight.to(dtype).to(device))
    return weights


def finite_bf16(stride=1):
    """Every finite bf16 pattern, [255, 256], each magnitude beside its negative; `stride` apart, around the circle."""
    magnitude = torch.arange(32640, dtype=torch.int32)
    patterns = torch.stack([magnitude, magnitude - 32768], dim=1).flatten().to(torch.int16).view(torch.bfloat16)
    order = torch.arange(65280) * stride % 65280
    assert order.unique().numel() == 65280
    return patterns[order].view(255, 256)


def adversarial(amax, steps, dtype, columns):
    """Weights for granules [..., columns] of this amax: each half step of it with both neighbours, amax, and random.

    Args:
        amax: float32 [granules].
        steps: Largest value of the element, to which amax is scaled.
        dtype: Of the result; what overflows it is left out.
        columns: Weights in a granule.
    """
    generator = torch.Generator().manual_seed(6)
    count = columns // 4
    halves = torch.randint(-2 * round(steps) - 3, 2 * round(steps) + 4, (len(amax), count), generator=generator) / 2
    tie = (halves.double() * amax.double()[:, None] / steps).float()
    up, down = tie.nextafter(torch.tensor(torch.inf)), tie.nextafter(torch.tensor(-torch.inf))
    random = torch.randn(len(amax), columns - 3 * count, generator=generator) * amax[:, None]
    random[:, 0], random[:, 1] = amax, -amax.nextafter(torch.tensor(torch.inf))
    weight = torch.cat([tie, up, down, random], dim=1).to(dtype)
    return torch.where(weight.isfinite(), weight, torch.zeros_like(weight))


def same_bits(a, b):
    """Equal bit for bit, signs of zeros included; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.isnan()
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    equal = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((equal | (nan & b.isnan())).all())


def name_of(value):
    """Test ids: formats and dtypes by name."""
    return getattr(value, "name", None) or str(value).removeprefix("torch.")


def message_of(error, call, *args, **kwargs):
    """What an error says; for a KeyError without its quotes. Under --shape-checks a wrong type has another error."""
    with pytest.raises((error, TypeCheckError)) as caught:
        call(*args, **kwargs)
    if isinstance(caught.value, TypeCheckError):
        pytest.skip("a type checker stands before this error")
    return str(caught.value.args[0])


def assert_names(message, *fragments):
    """A message says what was found, what was wanted, and of which leaf or weight."""
    assert not [fragment for fragment in fragments if str(fragment) not in message], message


def assert_same_results(found, wanted, what):
    """Two trees of tensors, and what else there is in them, alike to the bit; `what` says of which case."""
    ones, others = (optree.tree_flatten(tree, none_is_leaf=True) for tree in (found, wanted))
    assert ones[1] == others[1], what
    for one, other in zip(ones[0], others[0], strict=True):
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), what
            bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other)]
            assert torch.equal(*bits), what
        else:
            assert one == other, what
