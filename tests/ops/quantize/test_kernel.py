"""Every kernel equals the reference bit for bit: in Triton's interpreter on a CPU, and compiled on a GPU.

The interpreter truncates fp32 to bf16 (a GPU rounds), so bf16 results are compared on a GPU only.
"""

import pytest
import torch

from fq_transforms.formats import FP8_BLOCK, INT4_BLOCK32, INT8, INT8_PER_CHANNEL, NVFP4, NVFP4_STATIC
from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.launch import clip_backward_triton
from fq_transforms.ops.quantize.reference import clip_backward_reference, fake_quantize_reference
from tests.cases import ALL_FORMATS, DTYPES, STATIC_FORMATS, experts, name_of, same_bits, shapes_of
from tests.variants import CPU, all_variants, amax_of, by_kernel, on_each_kernel, stored, variants

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
ONE_OF_EACH_GRANULARITY = [INT8, INT8_PER_CHANNEL, INT4_BLOCK32, FP8_BLOCK, NVFP4, NVFP4_STATIC]

# numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def cases(formats):
    return on_each_kernel(variants(formats), all_variants(formats))


def out_dtypes(device, shape):
    if device == "cuda":
        return DTYPES
    return [torch.float32] if shape[0] > 32 else [torch.float32, torch.float16]


def assert_forward_equals_reference(weights, amax, global_amax, format, transposed, out_dtype):
    outs = by_kernel(
        stored(weights, transposed), amax, global_amax, format=format, transposed=transposed, out_dtype=out_dtype
    )
    assert len(outs) == len(weights)
    for expert, (out, weight) in enumerate(zip(outs, weights, strict=True)):
        leaf, global_leaf = (None if s is None else s[expert] for s in (amax, global_amax))
        wanted = fake_quantize_reference(weight, leaf, global_leaf, format=format, out_dtype=out_dtype)
        found = out.mT if transposed else out
        assert same_bits(found, wanted), f"expert {expert}: {int((found != wanted).sum())} of {wanted.numel()} differ"


@cases(ALL_FORMATS)
def test_forward_equals_reference(format, dtype, transposed, device):
    """Odd shapes, each expert at its own magnitude with zeros and a zero row; every output dtype."""
    for shape in shapes_of(format):
        weights = experts(3, shape, dtype, device=device)
        amax, global_amax = amax_of(weights, format)
        if format.clips:
            amax = amax * 0.6  # some weights lie beyond amax
        for out_dtype in out_dtypes(device, shape):
            assert_forward_equals_reference(weights, amax, global_amax, format, transposed, out_dtype)


@cases(STATIC_FORMATS)
def test_clip_backward_equals_reference(format, dtype, transposed, device):
    """Gradient only where abs(w) <= amax, compared in fp32, at the edge itself too; NaN weights get none."""
    for shape in shapes_of(format):
        weights = experts(3, shape, dtype, device=device)
        weights[0][0, 0] = torch.nan
        amax, _ = amax_of([w.nan_to_num() for w in weights], format)
        amax[1] *= 0.5
        grads = [torch.randn_like(w) for w in weights]
        outs = clip_backward_triton(
            stored(grads, transposed), stored(weights, transposed), amax, format=format, transposed=transposed
        )
        for expert, (out, grad, weight) in enumerate(zip(outs, grads, weights, strict=True)):
            wanted = clip_backward_reference(grad, weight, amax[expert], format=format)
            assert same_bits(out.mT if transposed else out, wanted)


@on_each_device
@pytest.mark.parametrize("count", [1, 2, 8, 33])
@pytest.mark.parametrize("format", ONE_OF_EACH_GRANULARITY, ids=name_of)
def test_any_number_of_experts(format, count, device):
    """Each expert of 1 to 33 meets its own scales: an index that is off by one shows, since all magnitudes differ."""
    weights = experts(count, (5, 64), device=device)
    amax, global_amax = amax_of(weights, format)
    found, found_global = expert_amax_triton(weights, format=format, transposed=False)
    assert same_bits(found, amax)
    assert global_amax is None or same_bits(found_global, global_amax)
    assert_forward_equals_reference(weights, amax, global_amax, format, False, torch.float32)


@on_each_device
@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_adversarial_values(format, device):
    """Ties, subnormals, the largest floats, infinities and signed zeros, against amax from tiny to huge and invalid."""
    columns = 256
    halves = torch.arange(-32, 32) / 8
    special = [0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 2.0**-127, 1.5 * 2.0**-126, 3.3e38, -3.3e38, 1e-30, 0.3, -0.3]
    row = torch.cat([halves, torch.tensor(special), torch.linspace(-7, 7, columns - len(halves) - len(special))])
    exponents = torch.tensor([-149, -140, -126, -40, -24, -9, 0, 7, 60, 120]).double()
    weight = (row.double() * 2.0 ** exponents[:, None]).clamp(-3.3e38, 3.3e38).float()
    weight = torch.cat([weight, weight[-2:]])
    weight[-1, 0], weight[-2, 40] = torch.inf, -torch.inf
    amaxes = [0.0, 1e-45, 2.0**-25, 2.0**-24, 2.0**-23, 1.0, 448.0, 3.3e38, torch.nan, torch.inf, -1.0]
    weights = [weight.to(device)] * len(amaxes)
    scales = torch.tensor(amaxes, device=device)
    amax = global_amax = None
    if format.clips:
        shape = format.amax_shape(*weight.shape)
        amax = scales.reshape(-1, *(1,) * len(shape)).expand(len(amaxes), *shape).clone()
        global_amax = scales.flip(0).clone() if format.scale == "e4m3" else None
    elif not format.is_stateless:
        amax = scales
    assert_forward_equals_reference(weights, amax, global_amax, format, False, torch.float32)


@on_each_device
@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_nan_stays_in_its_granule(format, device):
    """A NaN weight reaches its own block (dynamic) or only itself (static), never another block or expert."""
    weights = experts(3, (4, 256), device=device)
    amax, global_amax = amax_of(weights, format)
    weights[1][2, 130] = torch.nan
    outs = by_kernel(weights, amax, global_amax, format=format, transposed=False, out_dtype=torch.float32)
    wanted = torch.zeros(4, 256, dtype=torch.bool)
    columns = format.block[1] if format.dynamic else 1
    start = 130 // columns * columns
    wanted[2, start : start + columns] = True
    assert torch.equal(outs[1].isnan().cpu(), wanted)
    assert not outs[0].isnan().any()
    assert not outs[2].isnan().any()


@on_each_device
def test_inputs_of_any_layout(device):
    """Sliced, strided, misaligned, stacked and expanded weights give what contiguous ones give; none is written to."""
    format = NVFP4
    big = experts(1, (48, 256), device=device)[0]
    layouts = {
        "strided": big[::2, ::2],
        "transposed view": big[:, :32].mT,
        "misaligned": big.flatten()[1 : 1 + 32 * 128].view(32, 128),
        "stacked": big.view(6, 8, 256),
        "expanded": big.expand(3, 48, 256),
    }
    for layout, weight in layouts.items():
        versions = weight._version
        amax = expert_amax_reference(weight, format=format)[0]
        found, _ = expert_amax_triton([weight], format=format, transposed=False)
        assert same_bits(found, amax.reshape(-1)), layout
        out = by_kernel([weight], amax.reshape(-1), None, format=format, transposed=False, out_dtype=torch.float32)
        wanted = fake_quantize_reference(weight, amax, None, format=format, out_dtype=torch.float32)
        assert same_bits(out.view(wanted.shape), wanted), layout
        assert weight._version == versions


@pytest.mark.gpu
def test_a_profilers_hooks_see_every_launch():
    """The first launch, which compiles, and the later ones, which go round Triton's own look-up."""
    from triton import knobs

    weights = experts(3, (4, 256), device="cuda")
    amax, _ = amax_of(weights, INT8)
    seen = []

    def hook(metadata):
        seen.append(metadata)

    def run():
        return by_kernel(weights, amax, None, format=INT8, transposed=False, out_dtype=torch.float32)

    wanted = run()
    hooks = [knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook]
    for chain in hooks:
        chain.add(hook)
    try:
        found = run()
    finally:
        for chain in hooks:
            chain.remove(hook)
    assert len(seen) == 2
    assert same_bits(found, wanted)
    run()
    assert len(seen) == 2
