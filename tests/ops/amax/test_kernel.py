"""The amax kernel equals its reference bit for bit: in Triton's interpreter on a CPU, and compiled on a GPU."""

import torch

from fq_transforms.ops.amax.launch import expert_amax_triton
from tests.cases import ALL_FORMATS, experts, same_bits, shapes_of
from tests.variants import all_variants, amax_of, on_each_kernel, stored, variants

STATEFUL = [format for format in ALL_FORMATS if not format.is_stateless]


@on_each_kernel(variants(STATEFUL), all_variants(STATEFUL))
def test_amax_equals_reference(format, dtype, transposed, device):
    """Amax of every granule and expert; a NaN and an infinity stay in theirs."""
    for shape in shapes_of(format):
        weights = experts(4, shape, dtype, device=device)
        weights[1][-1, -1] = torch.nan
        weights[2][0, 0] = -torch.inf
        amax, global_amax = expert_amax_triton(stored(weights, transposed), format=format, transposed=transposed)
        wanted, wanted_global = amax_of(weights, format)
        assert same_bits(amax, wanted)
        assert (global_amax is None) == (wanted_global is None)
        assert global_amax is None or same_bits(global_amax, wanted_global)
