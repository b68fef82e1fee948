"""Which formats, dtypes and layouts a kernel is tried in: all that its branches see, in place of their product.

A kernel loads every dtype as fp32, finds a weight's granule without regard to the format's numbers, and rounds without
regard to the layout. So each format is tried in fp32, and those of each kind of granule and element in the rest, too.
A GPU compiles each combination once for all tests, which takes most of their time.
"""

from itertools import product

import pytest
import torch

from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.launch import results_for
from fq_transforms.ops.quantize.launch import fake_quantize_triton
from tests.cases import DTYPES, ONE_OF_EACH_LEAF, name_of
from tests.conftest import HAS_GPU

CPU = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")


def variants(formats, widely=ONE_OF_EACH_LEAF):
    """(format, dtype, transposed): each in fp32; those tried `widely` also transposed, and in bf16 or fp16 by turns."""
    wide = [format for format in formats if format in widely]
    found = [(format, torch.float32, False) for format in formats]
    found += [(format, torch.float32, True) for format in wide]
    return found + [(format, (torch.bfloat16, torch.float16)[i % 2], False) for i, format in enumerate(wide)]


def all_variants(formats):
    """The product, for kernels that compile fast."""
    return list(product(formats, DTYPES, [False, True]))


def on_each_kernel(interpreted, compiled):
    """Parametrizes format, dtype, transposed and device: the first list in the interpreter, the second on a GPU."""
    params = [pytest.param(*case, "cpu", marks=CPU) for case in interpreted]
    params += [pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in compiled]
    return pytest.mark.parametrize(("format", "dtype", "transposed", "device"), params, ids=name_of)


def by_kernel(weights, amax, global_amax, seed=None, *, out_dtype, transposed=False, **options):
    """`fake_quantize_triton` into new memory: [E, ., .]."""
    out = results_for(weights, out_dtype)
    fake_quantize_triton([out], weights, amax, global_amax, seed, transposed=transposed, **options)
    return out.view(-1, *weights[0].shape[-2:])


def stored(weights, transposed):
    """Matrices [out, in] as they are stored."""
    return [w.mT.contiguous() if transposed else w for w in weights]


def amax_of(weights, format):
    """State leaves of a group by the reference: [E, ...] and [E] or None; both None for a stateless format."""
    if format.is_stateless:
        return None, None
    amax, global_amax = zip(*(expert_amax_reference(w, format=format) for w in weights), strict=True)
    return torch.stack(amax), None if global_amax[0] is None else torch.stack(global_amax)
