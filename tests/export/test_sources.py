"""Folders that others have quantized: of their codes `folder` makes what the library that defines them reads."""

import json

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.streaming.sources import Folder
from tests.cases import assert_names
from tests.export.models import assert_equal, assert_same_bytes, read
from tests.export.sources import BLOCK, CONFIG, EXPERTS, HIDDEN, INNER, MODULES, STACKS, plain, weights, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have


def made_plain(source, target, **options):
    """The tensors of a source made plain, once nothing but `target` is new, and config.json says nothing of codes."""
    before = {path.name for path in source.parent.iterdir()}
    fqt.export.folder(source, target, layout="plain", **options)
    assert {path.name for path in source.parent.iterdir()} == before | {target.name}
    config = json.loads((target / "config.json").read_text())
    text = config.get("text_config", {})
    assert not {"quantization_config", "compression_config"} & {*config, *text}
    assert not (target / "hf_quant_config.json").exists()
    return read(target)


# What compressed-tensors writes: its name for the format, the arguments of weights, and dtypes of scales.
def _args(bits, kind, strategy, **others):
    return {"num_bits": bits, "type": kind, "strategy": strategy} | others


WRITTEN = {
    **{
        f"INT4 in groups of {size}": ("pack-quantized", _args(4, "int", "group", group_size=size))
        for size in (32, 64, 128)
    },
    "INT3": ("pack-quantized", _args(3, "int", "group", group_size=64)),
    "INT4 per channel": ("pack-quantized", _args(4, "int", "channel")),
    "INT4 with zero points": ("pack-quantized", _args(4, "int", "group", group_size=32, symmetric=False)),
    "INT4 by activations": ("pack-quantized", _args(4, "int", "group", group_size=32, actorder="weight")),
    "packed INT8": ("pack-quantized", _args(8, "int", "channel")),
    "packed INT8 in groups": ("pack-quantized", _args(8, "int", "group", group_size=128)),
    "INT8": ("int-quantized", _args(8, "int", "tensor")),
    "INT8 per channel": ("int-quantized", _args(8, "int", "channel")),
    "INT8 with zero points": ("int-quantized", _args(8, "int", "channel", symmetric=False)),
    "naive INT8": ("naive-quantized", _args(8, "int", "channel")),
    "FP8": ("float-quantized", _args(8, "float", "tensor")),
    "FP8 per channel": ("float-quantized", _args(8, "float", "channel")),
    "FP8 in groups": ("float-quantized", _args(8, "float", "group", group_size=128)),
    "FP8 in blocks": ("float-quantized", _args(8, "float", "block", block_structure=[128, 128])),
    "naive FP8": ("naive-quantized", _args(8, "float", "tensor")),
    "NVFP4": ("nvfp4-pack-quantized", _args(4, "float", "tensor_group", group_size=16)),
    "MXFP4": ("mxfp4-pack-quantized", _args(4, "float", "group", group_size=32)),
    "MXFP6": ("mxfp6-pack-quantized", _args(6, "float", "group", group_size=32)),
    "MXFP8": ("mxfp8-quantized", _args(8, "float", "group", group_size=32)),
}


def in_codes(name, of=MODULES, dtype=torch.bfloat16):
    """Tensors as compressed-tensors' own compressor makes them, what its decompressor makes of them, and the config."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    format, entries = WRITTEN[name]
    args = QuantizationArgs(**entries)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors, wanted = {}, {}
    for module, weight in weights(of).items():
        out, width = weight.shape
        rows, columns = {
            "tensor": (out, width),
            "channel": (1, width),
            "block": args.block_structure or (),
        }.get(entries["strategy"], (1, args.group_size))
        blocks = weight.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        least, most = (
            each.reshape(-1) if blocks.shape[:3:2] == (1, 1) and rows > 1 else each
            for each in (blocks.amin((1, 3)), blocks.amax((1, 3)))
        )
        number = 448 * 6 / weight.abs().max().float()[None] if entries["strategy"] == "tensor_group" else None
        scale, zero = calculate_qparams(least, most, args, global_scale=number)
        one_level = number is None and not format.startswith("mx")
        parts = {"weight": weight, "weight_scale": scale.to(dtype) if one_level else scale}
        parts |= {} if number is None else {"weight_global_scale": number}
        parts |= {} if args.symmetric else {"weight_zero_point": zero}
        stored = compressor.compress(parts, scheme)
        tensors |= {f"{module}.{part}": tensor for part, tensor in stored.items()}
        wanted[f"{module}.weight"] = compressor.decompress(dict(stored), scheme)["weight"].bfloat16()
    about = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head", "re:.*gate$"],
        "quantization_status": "compressed",
    }
    return tensors, wanted, about


IN_FP32 = ["INT4 in groups of 32", "FP8", "FP8 in blocks", "INT8 with zero points"]  # scales of others have one dtype


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in WRITTEN), *((name, torch.float32) for name in IN_FP32)]
)
def test_of_compressed_tensors(name, dtype, tmp_path):
    """Law: what its compressor wrote is what its decompressor reads of it, bit for bit; the rest keeps its bytes."""
    tensors, wanted, about = in_codes(name, dtype=dtype)
    source = write(tmp_path / "a", plain() | tensors, about, shards=2)
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)


def test_a_name_goes_before_a_pattern(tmp_path):
    """And one pattern before another by the alphabet, as in compressed-tensors' `match_targets`, not by their order."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils.match import match_targets

    named, other, *rest = MODULES
    # Each has what `match_targets` puts first, in groups that are in another order.
    of = {"re:.*": [other], f"re:(?!{other}|{named}).*": rest, named: [named]}
    kinds = ["INT4 in groups of 32", "INT4 in groups of 64", "INT4 per channel"]
    tensors, wanted, groups = {}, {}, {}
    for kind, (target, modules) in zip(kinds, of.items(), strict=True):
        some, of_some, about = in_codes(kind, {module: MODULES[module] for module in modules})
        tensors, wanted = tensors | some, wanted | of_some
        groups[kind] = about["config_groups"]["group_0"] | {"targets": [target]}
        assert all(match_targets(module, torch.nn.Linear(2, 2), of)[0] == target for module in modules)
    source = write(tmp_path / "a", plain() | tensors, about | {"config_groups": groups})
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)


def test_each_part_of_a_model_keeps_its_prefix(tmp_path):
    """Kimi-K2.5's: names under `language_model.model`, and what says how it is quantized within `text_config`."""
    of = {f"language_model.{module}": shape for module, shape in MODULES.items()}
    tensors, wanted, about = in_codes("INT4 in groups of 32", of)
    text = {key: CONFIG[key] for key in ("num_experts", "num_hidden_layers", "hidden_size")}
    config = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "dtype": "bfloat16"}
    source = write(tmp_path / "a", tensors, config=config | {"text_config": text | {"quantization_config": about}})
    assert_same_bytes(made_plain(source, tmp_path / "b"), wanted)


def test_scales_of_inputs_and_caches_are_left_out(tmp_path):
    """They are of the codes that were there; the table of what was done counts them."""
    tensors, wanted, about = in_codes("FP8")
    attention = "model.layers.0.self_attn"
    extra = {f"{module}.input_scale": torch.ones(1) for module in MODULES}
    extra |= {f"{attention}.{part}": torch.ones(1) for part in ("k_scale", "v_scale")}
    about["config_groups"]["group_0"]["input_activations"] = _args(8, "float", "tensor")
    about["kv_cache_scheme"] = _args(8, "float", "tensor")
    source = write(tmp_path / "a", plain() | tensors | extra, about)
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)
    with Folder(source) as opened:
        assert opened.left.keys() == extra.keys()


def fp8_codes(weight, block, scales=torch.float32):
    """Codes and scales as DeepSeek has them, edges that are cut included."""
    out, width = weight.shape[-2:]
    rows, columns = block
    padded = torch.nn.functional.pad(weight.float(), (0, -width % columns, 0, -out % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scale = blocks.abs().amax((-3, -1)) / 448
    scale = (torch.exp2(scale.log2().ceil()) if scales == torch.float8_e8m0fnu else scale).to(scales)
    codes = (blocks / scale.float()[..., None, :, None]).flatten(-2).flatten(-3, -2)[..., :out, :width]
    return codes.to(torch.float8_e4m3fn), scale


def by_transformers(codes, scale):
    """What transformers reads of them, in bf16."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    return fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (64, 128), "tensor", "row"], ids=str)
def test_of_deepseek(block, scales, tmp_path):
    """Modules and stacks, in blocks, per tensor or per row: as transformers dequantizes them."""
    shapes = MODULES | {f"{BLOCK}.experts.{name}": shape for name, shape in STACKS.items()}
    tensors, wanted = {}, {}
    for name, weight in weights(shapes).items():
        sides = {"tensor": weight.shape[-2:], "row": (1, weight.shape[-1])}.get(block, block)
        codes, scale = fp8_codes(weight, sides, scales)
        key = name if weight.dim() > 2 else f"{name}.weight"
        tensors |= {key: codes, f"{key}_scale_inv": scale, f"{key}_activation_scale": torch.ones(1)}
        wanted[key] = by_transformers(codes, scale)
    about = DEEPSEEK | {"weight_block_size": None if isinstance(block, str) else list(block)}
    source = write(tmp_path / "a", plain() | tensors, about, shards=2)
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)


def test_one_number_per_weight(tmp_path):
    """Mistral's: scales that are numbers, [] and [1], of a matrix and of a whole stack."""
    tensors, wanted = {}, {}
    for n, (name, weight) in enumerate(weights(STACKS | SHAPES_OF_LINEARS).items()):
        key = f"{BLOCK}.experts.{name}" if weight.dim() > 2 else f"{name}.weight"
        scale = (weight.abs().max().float() / 448).reshape([1] if n % 2 else [])
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors |= {key: codes, f"{key}_scale_inv": scale}
        wanted[key] = (codes.float() * scale).bfloat16()
    source = write(tmp_path / "a", plain() | tensors, DEEPSEEK | {"weight_block_size": None})
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)


SHAPES_OF_LINEARS = {"model.layers.0.self_attn.q_proj": (64, HIDDEN), "model.layers.0.self_attn.o_proj": (HIDDEN, 64)}


@pytest.mark.parametrize("shape", [(1, 1), (130, 200), (127, 129), (256, 1), (2, 130, 200)], ids=str)
def test_blocks_that_edges_cut(shape, tmp_path):
    """Law: each code times the scale of its block, in fp32, rounded once: by loops over blocks."""
    weight = torch.randn(shape)
    codes, scale = fp8_codes(weight, (128, 128))
    wanted = torch.empty(shape)
    for r in range(scale.shape[-2]):
        for c in range(scale.shape[-1]):
            at = (..., slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
            wanted[at] = codes[at].float() * scale[..., r : r + 1, c : c + 1]
    name = "model.ragged.weight" if len(shape) == 2 else f"{BLOCK}.experts.down_proj"
    tensors = {name: codes, f"{name}_scale_inv": scale}
    config = {key: value for key, value in CONFIG.items() if "num_" not in key and "size" not in key}
    source = write(tmp_path / "a", tensors, DEEPSEEK, config=config)
    assert_same_bytes(made_plain(source, tmp_path / "b"), {name: wanted.bfloat16()})


@pytest.mark.parametrize("scales", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("codes", ["FP8", "FP4"])
def test_exponents_for_32(codes, scales, tmp_path):
    """MXFP8, and DeepSeek V4's FP4 experts: scales that are exponents + 127, as transformers dequantizes them."""
    tensors, wanted = {}, {}
    for name, (out, width) in MODULES.items():
        exponents = torch.randint(100, 140, (out, width // 32), dtype=torch.uint8)
        if codes == "FP8":
            drawn = torch.randn(out, width).to(torch.float8_e4m3fn)
        else:
            drawn = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8).view(torch.int8)
        scale = exponents.view(scales)
        tensors |= {f"{name}.weight": drawn, f"{name}.weight_scale_inv": scale}
        wanted[f"{name}.weight"] = by_transformers(drawn, scale)
    source = write(tmp_path / "a", plain() | tensors, DEEPSEEK)
    assert_same_bytes(made_plain(source, tmp_path / "b"), plain() | wanted)


def gpt_oss(exponents=(100, 140), dtype=torch.bfloat16):
    """Stacks of MXFP4 with their biases as gpt-oss has them; what transformers reads of them; and the config."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(3)
    tensors, wanted = {}, {}
    for name, (experts, width, out) in STACKS.items():
        shape = (experts, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(*exponents, shape, dtype=torch.uint8, generator=generator)
        stack = f"{BLOCK}.experts.{name}"
        tensors |= {f"{stack}_blocks": blocks, f"{stack}_scales": scales}
        tensors[f"{stack}_bias"] = torch.randn(experts, out, generator=generator).bfloat16()
        wanted[f"{stack}_bias"] = tensors[f"{stack}_bias"]
        wanted[stack] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return tensors, wanted, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


OF_GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 1,
    "num_local_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": 32,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_of_gpt_oss(dtype, tmp_path):
    """Law: what transformers' own conversion gives, in the dtype that config names; biases keep their bytes."""
    tensors, wanted, about = gpt_oss(dtype=dtype)
    config = OF_GPT_OSS | {"dtype": str(dtype).removeprefix("torch.")}
    source = write(tmp_path / "a", plain() | tensors, about, shards=3, config=config)
    found = made_plain(source, tmp_path / "b")
    assert_same_bytes(found, plain() | wanted)
    rules = {"*.experts.*": fqt.FP8_PER_CHANNEL}
    again = made_plain(source, tmp_path / "c", rules=rules)
    fq = fqt.transform(fqt.select(found, rules))
    assert_same_bytes(again, found | fq.fakequant(found, fq.calibrate(found)))


def by_modelopt(codes, scale, number):
    """What ModelOpt's tensor classes make of what its exporter wrote, in fp32, rounded to bf16 once."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    options, dtype = {"scale": scale, "dtype": torch.float32}, torch.float32
    shape = (codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1))
    if number is not None:
        cls, sizes = qtensor.NVFP4QTensor, {-1: 16, "scale_bits": (4, 3)}
        options["double_scale"] = number
    elif scale.dtype == torch.uint8:
        cls = qtensor.MXFP8QTensor if codes.dtype == torch.float8_e4m3fn else qtensor.MXFP4QTensor
        sizes = {-1: 32}
    else:
        cls = qtensor.FP8QTensor if codes.dtype == torch.float8_e4m3fn else qtensor.INT8QTensor
        sizes = {-1: 128, -2: 128} if scale.dim() == 4 else None
        options["scale"] = scale[:, 0, :, 0] if scale.dim() == 4 else scale[:, None] if scale.dim() else scale
    return cls(shape, dtype, codes).dequantize(block_sizes=sizes, **options).bfloat16()


OF_MODELOPT = ["NVFP4", "FP8", "FP8_PER_CHANNEL", "FP8_BLOCK", "MXFP8", "INT8_PER_CHANNEL", "MIXED_PRECISION"]


@pytest.mark.parametrize("name", OF_MODELOPT)
def test_of_modelopt(name, tmp_path):
    """Its export_hf_checkpoint of a whole model: what its tensor classes read of it; the rest keeps its bytes."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    from tests.export.models import TOKENS
    from tests.export.test_modelopt import built, of_experts

    model, _ = built()
    rules = of_experts("NVFP4" if name == "MIXED_PRECISION" else name)
    if name == "MIXED_PRECISION":
        other = {"quantizer_name": "*layers.1*mlp.experts*weight_quantizer*", "cfg": {"num_bits": (4, 3), "axis": 0}}
        rules["quant_cfg"].append(other)
    export_hf_checkpoint(mtq.quantize(model, rules, lambda m: m(TOKENS)), export_dir=tmp_path / "a")
    about = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]
    assert name != "MIXED_PRECISION" or about["quant_algo"] == name
    stored, wanted = read(tmp_path / "a"), {}
    for key, tensor in stored.items():
        if key.endswith((".weight_scale", ".weight_scale_2", ".input_scale")):
            continue
        scale = stored.get(f"{key}_scale")
        wanted[key] = tensor if scale is None else by_modelopt(tensor, scale, stored.get(f"{key}_scale_2"))
    assert len(wanted) < len(stored)
    assert_equal(made_plain(tmp_path / "a", tmp_path / "b"), wanted)  # its table has no -0.0


OF_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}


def nvfp4_of_modelopt(of=MODULES):
    """Codes and scales by its tensor class, and what that reads of them."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    tensors, wanted = {}, {}
    for module, weight in weights(of).items():
        codes, scale, number = qtensor.NVFP4QTensor.quantize(weight, 16)
        parts = {"weight": codes._quantized_data, "weight_scale": scale, "weight_scale_2": number}
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        wanted[f"{module}.weight"] = by_modelopt(parts["weight"], scale, number)
    return tensors, wanted


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_where_modelopt_says_how(where, tmp_path):
    """Older exporters say it in a file of their own alone; scales of inputs and caches are left out."""
    tensors, wanted = nvfp4_of_modelopt()
    extra = {f"{module}.input_scale": torch.tensor(1.0) for module in MODULES}
    extra |= {f"model.layers.0.self_attn.{x}_proj.{x}_scale": torch.tensor(1.0) for x in "kv"}
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    files = {"hf_quant_config": own} if where.startswith("hf") else {}
    source = write(tmp_path / "a", plain() | tensors | extra, None if files else OF_NVFP4, **files)
    assert_equal(made_plain(source, tmp_path / "b"), plain() | wanted)


def test_a_scale_of_zero_is_a_block_of_zeros(tmp_path):
    """NVFP4 of ModelOpt: E4M3 scales of 0 and of 2**-9, the smallest; and MXFP4, by its tensor class."""
    tensors, wanted = nvfp4_of_modelopt()
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name].view(torch.uint8)[0, :4] = torch.tensor([0, 1, 0x7E, 0], dtype=torch.uint8)
        module = name.removesuffix("_scale")
        wanted[module] = by_modelopt(tensors[module], tensors[name], tensors[f"{name}_2"])
    module = "model.layers.0.self_attn.o_proj.weight"
    codes = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (64, 2), dtype=torch.uint8)
    tensors |= {module: codes, f"{module}_scale": exponents}
    wanted[module] = by_modelopt(codes, exponents, None)
    source = write(tmp_path / "a", plain() | tensors, OF_NVFP4)
    assert_equal(made_plain(source, tmp_path / "b"), plain() | wanted)
    assert any(bool((weight[0, :16] == 0).all()) for weight in wanted.values())


_MODULE = next(iter(MODULES))
_BYTES, _NUMBERS = torch.zeros(64, 256, dtype=torch.uint8), torch.ones(128, 2)
REFUSED = {
    "AWQ's scales of inputs": (
        nvfp4_of_modelopt,
        {f"{_MODULE}.pre_quant_scale": torch.ones(HIDDEN)},
        OF_NVFP4 | {"quant_algo": "NVFP4_AWQ"},
        ["pre_quant_scale", "NVFP4_AWQ"],
    ),
    "INT4_AWQ": (
        dict,
        {f"{_MODULE}.weight": _BYTES, f"{_MODULE}.weight_scale": _NUMBERS},
        OF_NVFP4 | {"quant_algo": "W4A16_AWQ"},
        [_MODULE, "W4A16_AWQ", "U8"],
    ),
    **{
        method: (
            dict,
            {f"{_MODULE}.qweight": torch.zeros(32, 128, dtype=torch.int32)},
            {"quant_method": method, "bits": 4},
            [method, "compressed-tensors", "modelopt", "fp8", "mxfp4"],
        )
        for method in ("gptq", "awq", "bitsandbytes", "quark", "fbgemm_fp8", "hqq", "torchao")
    },
    "an order of columns": (
        lambda: in_codes("INT4 in groups of 32")[:2],
        {f"{_MODULE}.weight_g_idx": torch.zeros(HIDDEN, dtype=torch.int32)},
        lambda: in_codes("INT4 in groups of 32")[2],
        [_MODULE, "weight_g_idx"],
    ),
    "a rotation": (
        lambda: in_codes("FP8")[:2],
        {},
        lambda: in_codes("FP8")[2] | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        ["transform_config"],
    ),
    "sparsity": (
        lambda: in_codes("FP8")[:2],
        {},
        lambda: in_codes("FP8")[2] | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        ["sparsity_config"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name, tmp_path):
    """Before the first byte: what it is, and what is read."""
    made, extra, about, said = REFUSED[name]
    tensors = (made() or ({},))[0]
    source = write(tmp_path / "a", plain() | tensors | extra, about() if callable(about) else about)
    with pytest.raises(ValueError) as caught:
        fqt.export.folder(source, tmp_path / "b", layout="plain")
    assert_names(str(caught.value), *said, "found", "wanted")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_codes_that_are_quantized_again_are_those_of_the_plain_weights(tmp_path):
    """Law: quantizing a source in codes is quantizing the plain folder of it: the same files, byte for byte."""
    tensors, _, about = in_codes("INT4 in groups of 32")
    source = write(tmp_path / "a", plain() | tensors, about, shards=2)
    made_plain(source, tmp_path / "b")
    for name in ("FP8_BLOCK", "NVFP4", "MXFP4", "INT8_PER_CHANNEL"):
        for start in ("a", "b"):
            rules = {"*.experts.*": fqt.formats.FORMATS[name]}
            fqt.export.folder(tmp_path / start, tmp_path / f"{name}-{start}", rules)
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"{name}-{start}").iterdir()} for start in "ab")
        assert one == two, name


def mxfp4(lowest, highest, *, seed=4, zeros=False):
    """Experts in MXFP4 for compressed-tensors, of codes and exponents (+ 127) in a range, what it reads, the config."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    _, _, about = in_codes("MXFP4", {_MODULE: SHAPES_OF_LINEARS["model.layers.0.self_attn.q_proj"]})
    scheme = QuantizationScheme.model_validate(about["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(about["format"])
    generator = torch.Generator().manual_seed(seed)
    tensors, wanted = {}, {}
    for module, (out, width) in MODULES.items():
        codes = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(lowest, highest + 1, (out, width // 32), dtype=torch.uint8, generator=generator)
        scales[0, :2] = torch.tensor([lowest, highest])  # so that no expert spans less
        codes[0, :32] |= 0x11  # nor one whose blocks are zeros
        if zeros:
            codes[1] = torch.randint(0, 2, (width // 2,), generator=generator) * 0x88  # 0.0 and -0.0
            scales[1] = torch.arange(0, 255, 255 // (width // 32))[: width // 32]
        parts = {"weight_packed": codes, "weight_scale": scales}
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        wanted[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"].bfloat16()
    return tensors, wanted, about


def blocks_alike(found, wanted):
    """How many blocks of 16 are the same numbers, and how many there are."""
    same = [(found[name] == weight).unflatten(-1, (-1, 16)).all(-1) for name, weight in wanted.items()]
    return sum(int(one.sum()) for one in same), sum(one.numel() for one in same)


def read_back(layout, folder, plain_folder):
    """Its experts, by the library that defines the layout."""
    if layout == "modelopt":
        stored = read(folder)
        names = [f"{module}.weight" for module in MODULES]
        return {name: by_modelopt(*(stored[name + end] for end in ("", "_scale", "_scale_2"))) for name in names}
    found = made_plain(folder, plain_folder) if layout == "compressed-tensors" else read(folder)
    return {name: weight for name, weight in found.items() if ".experts." in name}


LAYOUTS = pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt", "plain"])


@LAYOUTS
@pytest.mark.parametrize(("lowest", "highest"), [(100, 117), (1, 18), (230, 247), (127, 127)])
def test_mxfp4_to_nvfp4_is_exact_within_17_octaves(layout, lowest, highest, tmp_path):
    """Law: the same weights, gate and up under one number included; so are blocks of zeros of whatever exponent."""
    tensors, wanted, about = mxfp4(lowest, highest, zeros=True)
    source = write(tmp_path / "a", plain() | tensors, about, shards=2)
    made = fqt.export.folder(source, tmp_path / "b", {"*.experts.*": fqt.NVFP4}, layout=layout)
    found = read_back(layout, tmp_path / "b", tmp_path / "c")
    assert_equal(found, wanted)
    count = sum(weight.numel() // 16 for weight in wanted.values())
    assert made.exact == (count, count)
    assert "100.00 %" in str(made)


@LAYOUTS
def test_the_share_that_is_printed_is_the_true_one(layout, tmp_path):
    """Counted by brute force: experts that span more, and gate and up that span more together than each alone."""
    tensors, wanted, about = mxfp4(100, 117)
    for module in MODULES:
        if module.endswith("gate_proj"):
            tensors[f"{module}.weight_scale"] += 6
            wanted[f"{module}.weight"] *= 2.0**6
    wide, of_wide, _ = mxfp4(90, 120, seed=5)
    for name in [name for name in tensors if ".experts.1." in name]:
        tensors[name] = wide[name]
    wanted |= {name: weight for name, weight in of_wide.items() if ".experts.1." in name}
    source = write(tmp_path / "a", plain() | tensors, about)
    made = fqt.export.folder(source, tmp_path / "b", {"*.experts.*": fqt.NVFP4}, layout=layout)
    found = read_back(layout, tmp_path / "b", tmp_path / "c")
    assert made.exact == blocks_alike(found, wanted)
    assert 0 < made.exact[0] < made.exact[1]


@LAYOUTS
@pytest.mark.parametrize("exponent", [0, 1, 248, 254, 255])
def test_extreme_exponents_are_right_or_refused(layout, exponent, tmp_path):
    """2**-127 is a scale like others; NaN, what bf16 cannot hold, and what has no finite scales is refused."""
    tensors, wanted, about = mxfp4(exponent, exponent)
    source = write(tmp_path / "a", plain() | tensors, about)
    if exponent > 247:
        with pytest.raises(ValueError) as caught:
            fqt.export.folder(source, tmp_path / "b", {"*.experts.*": fqt.NVFP4}, layout=layout)
        assert_names(str(caught.value), "experts.", "found", "wanted")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        return
    fqt.export.folder(source, tmp_path / "b", {"*.experts.*": fqt.NVFP4}, layout=layout)
    assert_equal(read_back(layout, tmp_path / "b", tmp_path / "c"), wanted)


def test_stacks_of_mxfp4_to_nvfp4_are_exact(tmp_path):
    """gpt-oss's, stored [in, out]: the same weights, and the share is counted in blocks along `in`."""
    for name, exponents in (("narrow", (110, 128)), ("wide", (90, 128))):
        tensors, wanted, about = gpt_oss(exponents)
        source = write(tmp_path / name, plain() | tensors, about, config=OF_GPT_OSS)
        made = fqt.export.folder(source, tmp_path / f"{name}-b", {"*.experts.*": fqt.NVFP4}, layout="plain")
        stacks = {key: weight.mT for key, weight in wanted.items() if weight.dim() == 3}
        found = {key: weight.mT for key, weight in read(tmp_path / f"{name}-b").items() if weight.dim() == 3}
        assert made.exact == blocks_alike(found, stacks)
        assert (made.exact[0] == made.exact[1]) == (name == "narrow")


KEPT = {
    "MXFP4": (lambda: mxfp4(100, 140), fqt.MXFP4),
    "FP8 in blocks": (lambda: in_codes("FP8 in blocks", dtype=torch.float32), fqt.FP8_BLOCK),
    "INT4 in groups of 32": (lambda: in_codes("INT4 in groups of 32"), fqt.INT4_BLOCK32),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_format_keeps_of_itself(name, tmp_path):
    """MXFP4 keeps each weight. FP8 in blocks and INT4 are quantized anew, as the plain weights would be.

    Where the largest code of a block is not used, as in INT4's -8..7, or bf16 has rounded, the amax is another one.
    """
    made, format = KEPT[name]
    tensors, wanted, about = made()
    source = write(tmp_path / "a", plain() | tensors, about)
    fqt.export.folder(source, tmp_path / "b", {"*.experts.*": format})
    found = read_back("compressed-tensors", tmp_path / "b", tmp_path / "c")
    if format is fqt.MXFP4:
        assert_equal(found, wanted)
        return
    fq = fqt.transform(fqt.select(wanted, {"*": format}), layout="compressed-tensors")
    assert_equal(found, fq.fakequant(wanted, fq.calibrate(wanted)))
    largest = max(((found[key] - weight).abs().max() / weight.abs().max()).item() for key, weight in wanted.items())
    assert largest < {"FP8 in blocks": 2**-4, "INT4 in groups of 32": 0.1}[name]
