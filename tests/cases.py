"""Shapes, formats, dtypes and inputs that tests run over, as tables. No tolerances: what is compared here is exact."""

import pytest
import torch

import fq_transforms
from fq_transforms.formats import FORMATS

ALL_FORMATS = list(FORMATS.values())
STATIC_FORMATS = [format for format in ALL_FORMATS if format.clips]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The formats themselves; the others are conventions, which differ in one number.
CORE_FORMATS = [getattr(fq_transforms, name) for name in fq_transforms.__all__ if name in FORMATS]

# (out, in): odd and prime where the format's block allows it; ragged on both sides of a square block.
ANY_SHAPES = [(1, 1), (3, 7), (17, 130)]
BLOCK_SHAPES = [(1, 128), (11, 384)]
SQUARE_BLOCK_SHAPES = [(3, 7), (130, 257)]


def shapes_of(format):
    """Shapes that a format can quantize."""
    if format.has_blocks_along_in:
        return BLOCK_SHAPES
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
    """What an error says; for a KeyError without its quotes."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value.args[0])


def assert_names(message, *fragments):
    """A message says what was found, what was wanted, and of which leaf or weight."""
    assert not [fragment for fragment in fragments if str(fragment) not in message], message
