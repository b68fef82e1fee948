"""The amax kernel equals its reference bit for bit: in Triton's interpreter on a CPU, and compiled on a GPU."""

import torch

from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.amax.reference import expert_amax_reference
from tests.cases import ALL_FORMATS, experts, same_bits, shapes_of
from tests.variants import all_variants, on_each_kernel, stored, variants


@on_each_kernel(variants(ALL_FORMATS), all_variants(ALL_FORMATS))
def test_amax_equals_reference(format, dtype, transposed, device):
    """Amax of every granule and expert, of MX formats the expert's alone; a NaN and an infinity stay in theirs."""
    for shape in shapes_of(format):
        weights = experts(4, shape, dtype, device=device)
        weights[1][-1, -1] = torch.nan
        weights[2][0, 0] = -torch.inf
        amax, global_amax = expert_amax_triton(stored(weights, transposed), format=format, transposed=transposed)
        wanted, wanted_global = zip(*(expert_amax_reference(w, format=format) for w in weights), strict=True)
        assert same_bits(amax, torch.stack(wanted))
        assert (global_amax is None) == (wanted_global[0] is None)
        assert global_amax is None or same_bits(global_amax, torch.stack(wanted_global))
