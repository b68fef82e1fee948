"""What readers make of our scales: in a layout's own formats `fakequant`'s bits, in others what a warning counts."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.layouts.stored import difference, multipliers
from fq_transforms.formats import FORMATS, LAYOUTS, IntElement, is_own, own_format
from tests.cases import message_of, name_of
from tests.export.models import COMPRESSED, MODELOPT, read

CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
EXPERTS = 128
NAMES = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(EXPERTS)]


def of_every_mantissa(dtype):
    """An expert for each mantissa of bf16, that of the amax of its larger granules; those of 16 have all scales."""
    generator = torch.Generator().manual_seed(3)
    params = {}
    for e, name in enumerate(NAMES):
        amax = (1 + e / 128) * 2.0 ** -(torch.arange(8.0)[:, None] % 3)
        blocks = torch.rand(8, 16, 1, generator=generator) * (2 * torch.rand(8, 16, 16, generator=generator) - 1)
        weight = (0.99 * blocks.flatten(1) * amax).to(dtype)
        weight[:, ::32] = (amax * (1 - 2 * (torch.arange(8)[:, None] % 2))).to(dtype)
        params[name] = weight
    return params


def saved(folder, params, format, layout):
    """The fake-quantized weights, once files for a layout are written; and what was warned of."""
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state = fq.calibrate(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fqt.export.save(folder, fq, params, state, config=CONFIG, layout=layout)
    return fq.fakequant(params, state), [str(warning.message) for warning in caught if "export" in str(warning.message)]


def read_by_compressed_tensors(folder, dtype):
    """As `BaseCompressor.decompress` does, but NVFP4 in the dtype of the model: there it goes to bf16 first."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    stored = read(folder)
    if f"{NAMES[0][:-7]}.weight_global_scale" not in stored or dtype == torch.bfloat16:
        fqt.export.folder(folder, folder.with_name(f"{folder.name}-plain"), layout="plain")
        return read(folder.with_name(f"{folder.name}-plain"))
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    found = {}
    for name in NAMES:
        packed, scale, of_expert = (stored[f"{name}{last}"] for last in ("_packed", "_scale", "_global_scale"))
        codes = helpers.unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=dtype)
        found[name] = forward.dequantize(codes, scale.to(dtype), args=args, global_scale=of_expert, dtype=dtype)
    return found


def read_by_modelopt(folder, dtype):
    """By its tensor classes where it has one, else as products, in fp32."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    stored, found = read(folder), {}
    for name in NAMES:
        codes, scale, shape = stored[name], stored[f"{name}_scale"], (8, 256)
        if codes.shape != shape:
            found[name] = qtensor.NVFP4QTensor(shape, torch.float32, codes).dequantize(
                dtype=torch.float32,
                scale=scale,
                double_scale=stored[f"{name}_scale_2"],
                block_sizes={-1: 16, "scale_bits": (4, 3)},
            )
        elif scale.dtype == torch.uint8:
            found[name] = qtensor.MXFP8QTensor(shape, torch.float32, codes).dequantize(
                dtype=torch.float32, scale=scale, block_sizes={-1: 32}
            )
        elif scale.dim() == 4:
            found[name] = codes.float() * scale[:, 0, :, 0].repeat_interleave(128, 1)
        else:
            found[name] = codes.float() * (scale[:, None] if scale.dim() else scale)
    return {name: weight.to(dtype) for name, weight in found.items()}


READ = {"compressed-tensors": read_by_compressed_tensors, "modelopt": read_by_modelopt}
CASES = [
    pytest.param(format, layout, id=f"{format.name}-{layout}")
    for layout, formats in (("compressed-tensors", COMPRESSED), ("modelopt", MODELOPT))
    for format in formats
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)


@DTYPES
@pytest.mark.parametrize(("format", "layout"), CASES)
def test_own_formats_are_read_bit_for_bit(format, layout, dtype, tmp_path):
    """Law: under a layout's own format its library reads `fakequant`'s weights, for every mantissa of amax.

    Integers and E2M1 apart, the signs of zeros too.
    """
    params = of_every_mantissa(dtype)
    wanted, said = saved(tmp_path / "a", params, own_format(format, layout), layout)
    found = READ[layout](tmp_path / "a", dtype)
    assert not said
    assert [name for name in NAMES if not torch.equal(found[name], wanted[name])] == []
    assert all(weight.dtype == dtype for weight in found.values())


@DTYPES
@pytest.mark.parametrize(("format", "layout"), [case for case in CASES if not is_own(*case.values)])
def test_a_warning_counts_what_is_read_otherwise(format, layout, dtype, tmp_path):
    """Law: of other formats the warning has the number of weights that the library reads otherwise, and by how much."""
    params = of_every_mantissa(dtype)
    wanted, said = saved(tmp_path / "a", params, format, layout)
    found = READ[layout](tmp_path / "a", dtype)
    off = torch.cat([(found[name].double() - wanted[name].double()).flatten() for name in NAMES])
    meant = torch.cat([wanted[name].double().flatten() for name in NAMES])
    count = int((off != 0).sum())
    assert bool(said) == bool(count)
    if count:
        numbers = re.search(r"order: ([\d,]+) of ([\d,]+) weights .* at most (\S+) of themselves", said[0]).groups()
        assert [int(number.replace(",", "")) for number in numbers[:2]] == [count, off.numel()]
        assert numbers[2] == f"{float((off / meant).abs()[off != 0].max()):.1e}"
        assert f"layout={layout!r}" in said[0]


def test_two_mantissas_of_nvfp4():
    """compressed-tensors divides by the reciprocal of the global scale: in bf16 2 of 128 amax feel it, without a mend.

    NUMERICS.md's table; the cheap look at all codes finds these two, so no other expert is packed twice.
    """
    params = of_every_mantissa(torch.bfloat16)
    spec = fqt.select(params, {"*": fqt.NVFP4})
    state = fqt.transform(spec).calibrate(params)
    for e, name in enumerate(NAMES):
        alone = fqt.select({NAMES[0]: params[name]}, {"*": fqt.NVFP4}).groups[0]
        amax = {alone.key: {"amax": state[spec.groups[0].key]["amax"][e : e + 1]}}
        found = difference({NAMES[0]: params[name]}, amax, alone, "compressed-tensors", torch.bfloat16)
        assert bool(found.weights) == (1 + e / 128 in (1.1484375, 1.6953125))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=name_of)
def test_own_formats(format, layout):
    """Law: a layout's own format is its own, has the same codes and leaves, and a name by which it is found."""
    own = own_format(format, layout)
    assert is_own(own, layout)
    assert own_format(own, layout) is own
    assert own is format or FORMATS.get(own.name, own) is own
    numbers = replace(own, name=format.name, element=format.element, dequantize=format.dequantize)
    assert numbers == format
    assert own.is_stateless == format.is_stateless


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_every_door_takes_the_layout(layout):
    """Presets, specs and `transform` give the same formats for a layout, of weights and of inputs."""
    params = {"mlp.experts.0.w1.weight": torch.randn(4, 128)}
    for preset in (fqt.presets.INT8_EXPERTS_ONLY_CFG, fqt.presets.NVFP4_EXPERTS_ONLY_CFG):
        spec = fqt.select(params, fqt.presets.for_layout(preset, layout))
        assert spec == fqt.transform(fqt.select(params, preset), layout=layout).spec
        assert spec.rules == fqt.select(params, preset).for_layout(layout).rules
        assert all(is_own(group.format, layout) for group in spec.all_groups)
        assert spec != fqt.select(params, preset) or layout == "modelopt"


def test_a_range_of_ones_own_stays():
    """Kills half a step more for a qmax that somebody chose: the order alone makes it the layout's own."""
    mine = fqt.Format("MINE", IntElement(6, -8, 7), (1, 32), dequantize="divide")
    own = own_format(mine, "compressed-tensors")
    assert (own.element, own.dequantize) == (mine.element, "multiply")


@pytest.mark.parametrize("format", [fqt.NVFP4, FORMATS["NVFP4_COMPRESSED_TENSORS"]], ids=name_of)
def test_experts_too_small_for_a_global_scale_are_refused(format, tmp_path):
    """6 * 448 / amax is infinite: not zeros in the files, silently."""
    params = {NAMES[0]: torch.full((8, 256), 1e-37)}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, fq.calibrate(params), config=CONFIG)
    assert "so small" in message
    assert not list(tmp_path.iterdir())


def test_a_nan_is_named_before_it_is_counted(tmp_path):
    params = {NAMES[0]: torch.randn(8, 256)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    state = fq.calibrate(params)
    params[NAMES[0]][0, 0] = torch.nan
    message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, state, config=CONFIG)
    assert NAMES[0] in message
    assert not list(tmp_path.iterdir())


def test_every_door_refuses_a_layout_that_is_none():
    """Also where it has nothing to change."""
    for door in (fqt.Rule("*").for_layout, fqt.Spec(()).for_layout):
        assert "did you mean 'modelopt'?" in message_of(ValueError, door, "model-opt")
    assert "did you mean 'modelopt'?" in message_of(ValueError, fqt.presets.for_layout, [], "model-opt")


def test_a_layout_that_is_none():
    params = {"experts.0.w": torch.ones(4, 32)}
    message = message_of(ValueError, fqt.transform, fqt.select(params, {"*": fqt.NVFP4}), layout="compressed_tensors")
    assert "did you mean 'compressed-tensors'?" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "granules"), [(fqt.INT4_BLOCK32, 0), (fqt.INT8, 15)], ids=["INT4", "INT8"])
def test_products_give_the_quotients(format, granules, dtype):
    """Readers multiply where ModelOpt's formats divide: a multiplier is found by which every code comes out right.

    The reciprocal alone would miss some codes; for INT8 a few granules of a hundred thousand have no such multiplier.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(3 * torch.randn(100_000, generator=generator))
    s = format.element.qmax / (torch.rand(100_000, generator=generator) * spread)
    q = torch.arange(float(format.element.low), format.element.high + 1)

    def wrong(multiplier):
        return ((q * multiplier[:, None]).to(dtype) != (q / s[:, None]).to(dtype)).any(1)

    found = multipliers(s, format.element, dtype)
    assert int(wrong(found).sum()) <= granules
    assert int(wrong(s.reciprocal()).sum()) > granules
    assert int((found.view(torch.int32) - s.reciprocal().view(torch.int32)).abs().max()) <= 2
