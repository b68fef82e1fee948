"""Packing: what is unpacked is what `fakequant` gave, in the layouts that other libraries read."""

from dataclasses import replace

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fq_transforms as fqt
from fq_transforms.formats import E2M1, E3M2, E5M2, FORMATS, INT4_BLOCK32, NVFP4_MODELOPT, IntElement
from fq_transforms.ops import launch
from fq_transforms.ops.pack.reference import code_bits, pack_reference, pack_scales, unpack_reference
from fq_transforms.ops.quantize.reference import expert_amax_reference, fake_quantize_reference
from fq_transforms.pack import packed_leaves
from tests.cases import DTYPES, assert_names, experts, name_of, same_bits
from tests.conftest import HAS_GPU

CPU = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")
PACKABLE = [format for format in FORMATS.values() if not format.unit_scale_below] + [
    replace(fqt.FP8, name="FP8_E5M2", element=E5M2),
    replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7)),
]
BYTES = {4: 0.5, 6: 0.75, 8: 1.0}


def amax_of(weight, format, share=1.0):
    if format.is_stateless:
        return None, None
    amax, global_amax = expert_amax_reference(weight, format=format)
    return amax if format.dynamic else amax * share, global_amax


def assert_law(weight, amax, global_amax, format):
    wanted = fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=weight.dtype)
    packed = pack_reference(weight, amax, global_amax, format=format)
    found = unpack_reference(*packed, format=format, out_dtype=weight.dtype)
    assert torch.equal(found.nan_to_num(7e4), wanted.nan_to_num(7e4))
    assert torch.equal(found.isnan(), wanted.isnan())
    if not isinstance(format.element, IntElement):
        assert torch.equal(found.signbit(), wanted.signbit())
    return packed


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_the_law(format, dtype):
    """unpack(pack(w)) is fakequant(w) to the last bit: magnitudes, zero blocks, zero experts, amax that clips."""
    for scale in (2.0**-40, 1e-9, 1e-4, 1.0, 1e3):
        for share in (1.0, 0.6, 0.0):
            weight = torch.stack(experts(4, (128, 256), torch.float32)).mul(scale).to(dtype)
            weight[0, 0, :80], weight[1], weight[2, :, 64:] = 0, 0, 0
            assert_law(weight, *amax_of(weight, format, share), format)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(PACKABLE),
    exponents=st.lists(st.integers(-140, 120), min_size=8, max_size=8),
    out=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_law_on_any_magnitudes(format, exponents, out, seed):
    """Weights from the smallest fp32 to the largest side by side, any number of rows; under any amax, NaN too."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor(exponents, dtype=torch.float32).exp2().repeat_interleave(16).repeat(2)
    weight = torch.randn(2, out, 256, generator=generator) * powers
    amax, global_amax = amax_of(weight, format)
    assert_law(weight, amax, global_amax, format)
    if amax is not None:
        drawn = amax.flatten()
        drawn[torch.randint(len(drawn), (1,), generator=generator)] = torch.tensor([torch.nan, 0.0, -1.0, 2.0])[
            seed % 4
        ]
        assert_law(weight, drawn.view(amax.shape), global_amax, format)


@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_size(format):
    """4, 6 or 8 bits per weight, and one scale per granule; every code of the element is used by what needs it."""
    weight = torch.randn(3, 128, 256)
    codes, scale, global_scale = pack_reference(weight, *amax_of(weight, format), format=format)
    bits = code_bits(format)
    assert codes.nbytes == weight.numel() * BYTES[bits]
    shape = () if format.block == (None, None) else format.granules(128, 256)
    assert scale.shape == (3, *shape)
    assert (global_scale is None) == (format.scale != "e4m3")


def params_of(kind, format):
    weights = experts(3, (128, 256), torch.bfloat16)
    if kind == "separate":
        return {f"mlp.experts.{i}.w": w for i, w in enumerate(weights)}, {"*": format}
    return {"mlp.experts.w": torch.stack(weights)}, {"*": format}


@pytest.mark.parametrize("kind", ["separate", "stacked", "transposed"])
@pytest.mark.parametrize("format", [f for f in PACKABLE if f.name in fqt.__all__], ids=name_of)
def test_trees(format, kind):
    """Separate, stacked and transposed experts give the same codes, and come back in their own names and layout."""
    params, rules = params_of(kind, format)
    if kind == "transposed":
        params = {name: weight.mT.contiguous() for name, weight in params.items()}
    fq = fqt.transform(fqt.select(params, rules, transposed=["*"] if kind == "transposed" else []))
    state = fq.calibrate(params)
    before = [weight._version for weight in params.values()]
    packed = fq.pack(params, state)
    (leaves,) = packed.values()
    for field, (shape, dtype) in packed_leaves(fq.spec.groups[0]).items():
        assert (tuple(leaves[field].shape), leaves[field].dtype) == (shape, dtype)
    found, wanted = fq.unpack(packed), fq.fakequant(params, state)
    assert list(found) == list(params)
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name])
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
    assert [weight._version for weight in params.values()] == before
    # The same numbers in another layout are the same codes.
    other, rules = params_of("separate", format)
    theirs = fqt.transform(fqt.select(other, rules))
    (reference,) = theirs.pack(other, theirs.calibrate(other)).values()
    assert list(leaves) == list(reference)
    assert all(torch.equal(leaf.view(torch.uint8), reference[name].view(torch.uint8)) for name, leaf in leaves.items())


def test_a_pytree():
    """`optree` maps over it, as over the state: plain dicts of tensors."""
    params, rules = params_of("separate", fqt.NVFP4)
    fq = fqt.transform(fqt.select(params, rules))
    packed = fq.pack(params, fq.calibrate(params))
    copied = optree.tree_map(torch.clone, packed)
    assert list(copied["mlp.experts.*.w"]) == ["codes", "scale", "global_scale"]
    assert all(torch.equal(a, b) for a, b in zip(fq.unpack(copied).values(), fq.unpack(packed).values(), strict=True))


def test_faults():
    params, rules = params_of("separate", fqt.NVFP4)
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params)
    packed = fq.pack(params, state)
    leaves = packed["mlp.experts.*.w"]
    without = {name: leaf for name, leaf in leaves.items() if name != "global_scale"}

    def unlike(**others):
        return {"mlp.experts.*.w": leaves | others}

    bad = {name: weight.clone() for name, weight in params.items()}
    bad["mlp.experts.1.w"][3, 4] = torch.nan
    modelopt = fqt.transform(fqt.select(params, {"*": NVFP4_MODELOPT}))
    odd = {"w": torch.ones(4, 5)}
    int4 = fqt.transform(fqt.select(odd, {"*": replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7))}))
    for error, call, *fragments in [
        (ValueError, lambda: fq.pack(bad, state), "mlp.experts.1.w", "NaN"),
        (KeyError, lambda: fq.pack({}, state), "mlp.experts.0.w"),
        (KeyError, lambda: fq.pack(params, {}), "mlp.experts.*.w"),
        (ValueError, lambda: modelopt.pack(params, state), "NVFP4_MODELOPT", "1e-05"),
        (ValueError, lambda: int4.pack(odd, int4.calibrate(odd)), "'w'", (4, 5), "4 bits"),
        (KeyError, lambda: fq.unpack({}), "mlp.experts.*.w"),
        (ValueError, lambda: fq.unpack(packed | {"other": leaves}), "other"),
        (ValueError, lambda: fq.unpack(packed, dtype=torch.float64), "float64"),
        (ValueError, lambda: fq.unpack(unlike(codes=leaves["codes"][:2])), "codes", (2, 128, 128)),
        (ValueError, lambda: fq.unpack(unlike(scale=leaves["scale"].float())), "scale"),
        (ValueError, lambda: fq.unpack({"mlp.experts.*.w": without}), "global_scale"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert_names(str(caught.value.args[0]), *fragments)


on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def packed_by_both(weight, amax, global_amax, format, transposed):
    """(name, the kernel's, the reference's) bytes of codes, scale and global scale."""
    wanted = pack_reference(weight, amax, global_amax, format=format)
    stored = [(w.mT if transposed else w).contiguous() for w in weight]
    found = launch.pack_triton(stored, amax, global_amax, format=format, transposed=transposed)
    for name, a, b in zip(("codes", "scale", "global_scale"), found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            yield name, a.view(torch.uint8), b.view(torch.uint8)


def assert_kernel_equals_reference(weight, amax, global_amax, format, transposed):
    for name, found, wanted in packed_by_both(weight, amax, global_amax, format, transposed):
        assert torch.equal(found, wanted), name


@on_each_device
@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter: NaN
def test_scales_of_the_state_alone(format, device):
    """For every kind of amax, more of them than a program takes, those that are none and both zeros included."""
    numbers = [0.0, -0.0, 2.0**-24, 2.0**-25, 1e-40, 2.0**-126, 1.0, 2688.0, 1e38, 3.4e38, torch.inf, torch.nan, -1.0]
    amax = torch.cat([torch.tensor(numbers), torch.rand(2000).exp2()]).to(device)
    amax = None if format.is_stateless else amax
    wanted = pack_scales(amax, amax, format=format)
    for found, scale in zip(launch._scales(amax, amax, format), wanted, strict=True):
        assert (found is None) == (scale is None)
        assert found is None or torch.equal(found.nan_to_num(-7.0), scale.nan_to_num(-7.0))


@on_each_device
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter: NaN in lanes that are not used
def test_the_kernel_equals_the_reference(format, transposed, device):
    """Codes, scales and global scales, bit for bit: odd rows, zero blocks and experts, tiny and clipped weights."""
    few = (5, 2 * (format.block[1] or 48))
    for out, columns in (few, (130, 128)) if device == "cuda" else (few,):
        weights = [w.float() * s for w, s in zip(experts(4, (out, columns)), (2.0**-100, 1e-4, 1.0, 0.0), strict=True)]
        weights[2][0, :40] = 0.0
        stacked = torch.stack(weights).to(device)
        assert_kernel_equals_reference(stacked, *amax_of(stacked, format, 0.6), format, transposed)


def odd_shapes(format):
    """Shapes whose codes end within a strand, a word or a square block."""
    if format.has_blocks_along_in:
        return [(3, 3 * format.block[1])]
    if format.block[0] == 128:
        return [(130, 200)]
    return [(3, 37)] if code_bits(format) == 8 else [(5, 20), (3, 24), (7, 32)]


FP4, FP6 = (replace(fqt.FP8, name=f"FP{4 + 2 * i}", element=element) for i, element in enumerate((E2M1, E3M2)))


@on_each_device
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", [*PACKABLE, FP4, FP6], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
def test_the_kernel_where_words_end(format, transposed, device):
    """An odd number of blocks, rows that end within a strand, and ragged squares; in every dtype.

    In the interpreter bf16 and fp16 have a layout each.
    """
    few = [torch.float32, torch.float16 if transposed else torch.bfloat16]
    for dtype in DTYPES if device == "cuda" else few:
        for shape in odd_shapes(format):
            stacked = torch.stack(experts(3, shape, dtype)).to(device)
            assert_kernel_equals_reference(stacked, *amax_of(stacked, format, 0.8), format, transposed)


@on_each_device
@pytest.mark.parametrize("format", [*PACKABLE, FP4, FP6], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
def test_the_kernel_on_any_magnitudes(format, device):
    """Weights from the smallest fp32 to the largest side by side, and those at and next to every tie."""
    powers = torch.tensor([-140, -126, -60, -20, 0, 7, 60, 120], dtype=torch.float32).exp2().repeat_interleave(32)
    weight = torch.stack(experts(2, (3, 256), torch.float32)) * powers
    ties = torch.arange(-128, 128) / 16.0
    weight[0, 1] = torch.where(ties.abs() > 6.5, 6.0, ties)
    weight[0, 2] = weight[0, 1].nextafter(torch.tensor(torch.inf))
    weight = weight.to(device)
    assert_kernel_equals_reference(weight, *amax_of(weight, format), format, False)


@on_each_device
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.NVFP4_STATIC], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
def test_the_kernel_at_ties_under_any_global_scale(format, device):
    """Scales next to powers of two, where quotients are hardest, from the smallest normal g to the largest; both signs.

    So no step of a quotient underflows, and weights far above a stale amax are the largest value, infinite ones too.
    """
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for significand in (1.0, 1 + 2.0**-23, 1.5 - 2.0**-23, 1.5, 2 - 2.0**-23):
        exponents = torch.tensor([-126, -90, -63, -62, -61, -20, 0, 40, 61, 62, 63, 90, 115])
        g = significand * exponents.float().exp2()
        middle = (g[:, None] * ties).view(torch.int32)
        near = torch.cat([(middle + ulps).view(torch.float32) for ulps in range(-3, 4)], dim=1)
        blocks = near.view(len(g), 7, 7)
        largest = (6 * g)[:, None, None].expand(-1, 7, 1)
        weight = torch.cat([largest, blocks, -largest, -blocks], dim=2).flatten(1)[:, None].to(device)
        amax = (2688 * g).to(device)
        block_amax = largest.view(len(g), 1, 7).to(device)
        if not format.dynamic:
            weight[..., 3], weight[..., 12] = torch.inf, -torch.inf
        for stale in (1.0, 2.0**-30, 2.0**-170, 2.0**-200):
            smaller = (amax.double() * stale).float()  # in fp32 the factor itself would be zero
            stale_amax = torch.where(smaller > 2.0**-120, smaller, amax)
            state = (stale_amax, None) if format.dynamic else (block_amax, stale_amax)
            assert_kernel_equals_reference(weight, *state, format, False)


@on_each_device
@pytest.mark.parametrize("format", [f for f in PACKABLE if f.dynamic], ids=name_of)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
def test_nan_stays_in_its_block(format, device):
    """A NaN or an infinity makes its block's scale NaN; its codes mean nothing, and all others are as they were."""
    columns = format.block[1]
    for invalid in (torch.nan, torch.inf):
        weight = torch.stack(experts(2, (3, 4 * columns), torch.float32)).to(device)
        amax, global_amax = amax_of(weight, format)
        weight[0, 1, columns + 3] = invalid
        (_, codes, wanted), (_, scale, wanted_scale), *_ = packed_by_both(weight, amax, global_amax, format, False)
        assert torch.equal(scale, wanted_scale)
        size = columns * code_bits(format) // 8
        codes[0, 1, size : 2 * size] = wanted[0, 1, size : 2 * size]
        assert torch.equal(codes, wanted)


# What other libraries read.


def packed_weight(format, dtype=torch.bfloat16, scale=1.0):
    weight = experts(1, (128, 256), torch.float32)[0].mul(scale).to(dtype)
    amax, global_amax = amax_of(weight, format)
    wanted = fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=dtype)
    return weight, wanted, pack_reference(weight, amax, global_amax, format=format)


# How compressed-tensors names a format, its arguments, and what it calls the codes.
READERS = {
    "MXFP8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}, "weight"),
    "MXFP6_E2M3": (
        "mxfp6-pack-quantized",
        {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32},
        "weight_packed",
    ),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        "weight_packed",
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "weight_packed",
    ),
    "FP8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, "weight"),
    "FP8_PER_CHANNEL": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "weight"),
    "FP8_BLOCK": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        "weight",
    ),
    "INT8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}, "weight"),
    "INT8_PER_CHANNEL": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, "weight"),
    "INT4_BLOCK32": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        "weight_packed",
    ),
    "INT4_BLOCK128": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        "weight_packed",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_compressed_tensors_reads(name):
    """Its own decompressors give `fakequant`'s bf16 values, exactly. Its scales multiply: they are our reciprocals."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    kind, arguments, key = READERS[name]
    weights = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    reader = compressors.BaseCompressor.get_value_from_registry(kind)
    for scale_of_weights in (1.0, 1e-3, 37.0):
        weight, wanted, (codes, scale, global_scale) = packed_weight(FORMATS[name], scale=scale_of_weights)
        if name.startswith("INT"):
            scale = 1 / scale
        stored = {key: codes, "weight_scale": scale.view(1) if arguments["strategy"] == "tensor" else scale}
        if name == "NVFP4":
            stored["weight_global_scale"] = (1 / global_scale).view(1)
        if kind == "pack-quantized":
            stored |= {key: codes.view(torch.int32), "weight_shape": torch.tensor(weight.shape)}
        found = reader.decompress(stored, scheme)["weight"]
        assert torch.equal(found.to(wanted.dtype), wanted)


@pytest.mark.parametrize("format", [INT4_BLOCK32, fqt.INT4_BLOCK128], ids=name_of)
def test_compressed_tensors_reads_int4_codes(format):
    """Eight codes to an int32, little end first: the same bytes, and the integers that it unpacks."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight, _, (codes, scale, _) = packed_weight(format)
    words = codes.view(torch.int32)
    integers = helpers.unpack_from_int32(words, 4, weight.shape)
    assert torch.equal(helpers.pack_to_int32(integers, 4), words)
    spread = scale.repeat_interleave(format.block[1], dim=1)
    assert torch.equal(integers.float(), (weight.float() * spread).round().clamp(-8, 7))


@pytest.mark.parametrize("static", [False, True])
def test_modelopt_reads_nvfp4(static):
    """NVFP4QTensor dequantizes our codes and scales to `fakequant`'s values; signs of zero aside, which it has not."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    _, wanted, (codes, scale, global_scale) = packed_weight(fqt.NVFP4_STATIC if static else fqt.NVFP4, torch.float32)
    theirs = qtensor(wanted.shape, wanted.dtype, codes)
    found = theirs.dequantize(
        dtype=torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16, "scale_bits": (4, 3)}
    )
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:Skipping extension modelopt_cuda_ext")
@pytest.mark.parametrize("format", [INT4_BLOCK32, fqt.INT4_BLOCK128], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_modelopt_reads_int4(format, dtype):
    """INT4QTensor dequantizes our codes to `fakequant`'s values, by a true division by our scales, in every dtype.

    Its bytes have the even weight's code in the high four bits and ours, as in NVFP4, in the low ones: as they are it
    reads each pair of weights in the other order. A tiny block has the scale 0, by which it divides: NaN, and the
    only values that differ.
    """
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor").INT4QTensor
    for magnitude in (2.0**-20, 1.0, 37.0):
        _, wanted, (codes, scale, _) = packed_weight(format, dtype, magnitude)
        swapped = codes << 4 | codes >> 4
        arguments = {"scale": scale, "block_sizes": {-1: format.block[1]}}
        wanted = torch.where(scale.repeat_interleave(format.block[1], 1) == 0, torch.nan, wanted)
        if dtype != torch.float16:  # which has no weight so small
            assert bool(wanted.isnan().any()) == (magnitude < 1)
        found = qtensor(wanted.shape, dtype, swapped).dequantize(dtype, **arguments)
        assert torch.equal(found.nan_to_num(7e4), wanted.nan_to_num(7e4))
        found = qtensor(wanted.shape, dtype, codes).dequantize(dtype, **arguments)
        assert torch.equal(found.nan_to_num(7e4), wanted.nan_to_num(7e4).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@pytest.mark.parametrize("static", [False, True])
def test_torchao_reads_nvfp4(static):
    """NVFP4Tensor dequantizes our codes and scales, one expert or all at once, to `fakequant`'s bits."""
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
    format = fqt.NVFP4_STATIC if static else fqt.NVFP4
    for dtype in DTYPES:
        params = {"experts.w": torch.stack(experts(3, (128, 256), dtype))}
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state = fq.calibrate(params)
        (wanted,), (leaves,) = fq.fakequant(params, state).values(), fq.pack(params, state).values()
        codes, scale, global_scale = leaves.values()
        stacked = nvfp4(codes, scale, 16, dtype, global_scale.view(-1, 1, 1))
        assert same_bits(stacked.dequantize(dtype), wanted)
        for expert, (codes, scale, global_scale) in enumerate(zip(*leaves.values(), strict=True)):
            assert same_bits(nvfp4(codes, scale, 16, dtype, global_scale).dequantize(dtype), wanted[expert])


@pytest.mark.parametrize("format", [fqt.MXFP8, fqt.MXFP4, fqt.MXFP6_E2M3, fqt.MXFP6_E3M2], ids=name_of)
def test_torchao_reads_mx(format):
    """MXTensor dequantizes our codes and exponents to `fakequant`'s bits, of many magnitudes, in fp32 and bf16.

    Its fp6 codes are one a byte: ours are unpacked for it, four from three bytes. fp16 is left out: it multiplies in
    fp16, whose smallest power of two is 2**-24, where `unpack` rounds the product of fp32 once.
    """
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
    kernels = pytest.importorskip("torchao.quantization.quantize_.common").KernelPreference
    elements = {"MXFP8": torch.float8_e4m3fn, "MXFP4": torch.float4_e2m1fn_x2}
    elements |= {"MXFP6_E2M3": "fp6_e2m3", "MXFP6_E3M2": "fp6_e3m2"}
    for dtype in (torch.float32, torch.bfloat16):
        for magnitude in (2.0**-100, 1e-3, 1.0, 2.0**60):
            _, wanted, (codes, scale, _) = packed_weight(format, dtype, magnitude)
            if code_bits(format) == 6:
                codes = one_a_byte(codes)
            theirs = mx(
                codes,
                scale.view(torch.float8_e8m0fnu),
                elements[format.name],
                32,
                dtype,
                kernels.EMULATED,
                None,
                False,
            )
            assert same_bits(theirs.dequantize(dtype), wanted)


def test_torchao_multiplies_mx_in_fp16():
    """The cause of fp16's difference: 2**-30 is 0 there, so a block of that scale is read as zeros."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
    kernels = pytest.importorskip("torchao.quantization.quantize_.common").KernelPreference
    codes, scale = torch.full((1, 32), 256.0).to(torch.float8_e4m3fn), torch.tensor([[127 - 30]], dtype=torch.uint8)
    ours = unpack_reference(codes, scale, None, format=fqt.MXFP8, out_dtype=torch.float16)
    assert torch.equal(ours, torch.full((1, 32), 2.0**-22, dtype=torch.float16))
    e8m0, e4m3 = scale.view(torch.float8_e8m0fnu), torch.float8_e4m3fn
    theirs = mx(codes, e8m0, e4m3, 32, torch.float16, kernels.EMULATED, None, False)
    assert torch.equal(theirs.dequantize(torch.float16), torch.zeros(1, 32, dtype=torch.float16))


def one_a_byte(codes):
    """Codes of six bits, four in three bytes, as one a byte."""
    first, second, third = codes.int().unflatten(-1, (-1, 3)).unbind(-1)
    word = first | second << 8 | third << 16
    return torch.stack([word >> 6 * i & 63 for i in range(4)], -1).flatten(-2).to(torch.uint8)


INTEGERS = ["INT8_PER_CHANNEL", "INT8", "INT4_BLOCK32", "INT4_BLOCK128"]


@pytest.mark.parametrize("name", INTEGERS)
def test_torchao_reads_integers(name):
    """Its affine dequantization multiplies by 1 / scale, where `fakequant` divides: equal where that is a power of two.

    And else at most one ulp of fp32 apart, because of the reciprocal alone: with its order of operations in plain
    PyTorch the difference is none. Nothing else differs: the integers, and which scale each has, are the same.
    """
    affine = pytest.importorskip("torchao.quantization.quant_primitives").dequantize_affine
    format = FORMATS[name]
    _, wanted, (codes, scale, _) = packed_weight(format, torch.float32)
    if name.startswith("INT4"):
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
    rows, columns = (side or size for side, size in zip(format.block, codes.shape, strict=True))
    spread = scale.view(codes.shape[0] // rows, -1).repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def read(scale):
        reciprocal = torch.ones_like(scale) / scale
        return affine(codes, (rows, columns), reciprocal, None, torch.int8, output_dtype=torch.float32)

    def finite(values):  # a granule of zeros has a scale of 0
        return torch.where(spread == 0, 0.0, values)

    found = finite(read(scale))
    assert torch.equal(found, finite(codes.float() * (torch.ones_like(spread) / spread)))
    assert bool((found == wanted).logical_or(found == wanted.nextafter(found)).all())
    assert not torch.equal(found, wanted)
    powers = torch.where(scale == 0, 0.0, scale.log2().round().exp2())
    wanted = unpack_reference(
        nibbles(codes) if name.startswith("INT4") else codes, powers, None, format=format, out_dtype=torch.float32
    )
    assert torch.equal(finite(read(powers)), finite(wanted))


def nibbles(integers):
    even, odd = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4
