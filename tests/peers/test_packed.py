"""What other libraries read of packed weights: compressed-tensors, ModelOpt and torchao."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.formats import FORMATS, INT4_BLOCK32
from fq_transforms.ops.pack.reference import code_bits, pack_reference, unpack_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import DTYPES, experts, name_of, same_bits
from tests.ops.pack.cases import amax_of


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
