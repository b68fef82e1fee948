"""Who loads what: the table of readers is what they do, and what the docs say; the rest is refused before a write."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.export.layouts.plan import format_key
from fq_transforms.export.layouts.schemes import FORMAT_KEYS, SCHEMES
from fq_transforms.export.readers import PLACES, READERS
from fq_transforms.export.save import LAYOUTS
from fq_transforms.formats import FORMATS, Format
from tests.cases import assert_names, message_of, name_of
from tests.export.models import TOKENS, assert_equal, build, in_files, in_lists, read, to_modelopt, transformers, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

RULES = {"experts": "*.experts.*", "linears": "*self_attn.?_proj*", "lm_head": "lm_head*"}
BY_KEY = {format_key(format): format for format in reversed(FORMATS.values())}
BY_KEY[FORMAT_KEYS["INT4_BLOCK64"]] = Format("INT4_BLOCK64", fqt.INT4_BLOCK32.element, (1, 64))
ROWS = [(BY_KEY[weights], BY_KEY[inputs] if inputs else None) for weights, inputs in SCHEMES]
ROW_IDS = [f"{weights.name}-{inputs.name if inputs else 'alone'}" for weights, inputs in ROWS]
TIED = [("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")]


def prepared(weights, inputs=None, rules="*.experts.*", kind="qwen3_moe", dtype=torch.float32, change=lambda p: p):
    """A tiny model, its tensors, and the Transform and state of one rule."""
    model, params = build(kind)
    model, params = model.to(dtype), {name: param.to(dtype) for name, param in change(params).items()}
    rules = [rules] if isinstance(rules, str) else rules
    spec = fqt.select(params, [fqt.Rule(rule, weights, inputs) for rule in rules])
    fq = fqt.transform(spec)
    state = fq.calibrate(params, [(TOKENS,)], model=model) if inputs else fq.calibrate(params)
    pairs = [pair for pair in TIED if all(any(role in key for key in state) for role in pair)]
    return model, params, fq, fqt.tie(state, pairs) if pairs else state


def of_weights(fq, params, state):
    """Fake weights, whatever is selected of inputs."""
    weights = fqt.transform(fqt.Spec(fq.spec.groups))
    return weights.fakequant(params, {group.key: state[group.key] for group in fq.spec.groups})


@pytest.mark.parametrize(("weights", "inputs"), ROWS, ids=ROW_IDS)
def test_compressed_tensors_understands_every_scheme(weights, inputs, tmp_path):
    """Its config class takes each, its decompressors give fakequant's weights, and scales of inputs are there."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model, params, fq, state = prepared(weights, inputs, dtype=torch.bfloat16)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config)
    config, tensors = json.loads((tmp_path / "a" / "config.json").read_text()), read(tmp_path / "a")
    (scheme,) = quantization.QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    assert (scheme.input_activations is None) == (inputs is None)

    # Weights alone: plain files have no place for inputs.
    for group in config["quantization_config"]["config_groups"].values():
        group.pop("input_activations", None)
    of_inputs = {
        name: tensors.pop(name) for name in list(tensors) if name.endswith(("input_scale", "input_global_scale"))
    }
    write(tmp_path / "b", tensors, {"config.json": config})
    fqt.export.folder(tmp_path / "b", tmp_path / "c", layout="plain")
    assert_equal(read(tmp_path / "c"), in_files(of_weights(fq, params, state), model.config.to_dict()))

    assert bool(of_inputs) == (inputs is not None and inputs.name in ("FP8", "INT8", "NVFP4"))
    for name, tensor in of_inputs.items():
        source = re.sub(r"\.\d+\.(gate|up)_proj\..*", ".gate_up_proj.input", name)
        (amax,) = state[re.sub(r"\.\d+\.down_proj\..*", ".down_proj.input", source)]["amax"]
        wanted = {"FP8": amax / 448, "INT8": amax / 127, "NVFP4": 2688 / amax}[inputs.name]
        assert torch.allclose(tensor, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", [fqt.INT8, fqt.INT8_PER_CHANNEL], ids=name_of)
def test_int8_in_words_is_the_same_int8(format, tmp_path):
    """Packed four to a word for vLLM, codes and scales are those of a byte each, as compressed-tensors unpacks them."""
    pytest.importorskip("compressed_tensors")
    model, params, fq, state = prepared(format, dtype=torch.bfloat16)
    for name, reader in (("bytes", None), ("words", "vllm")):
        fqt.export.save(tmp_path / name, fq, params, state, config=model.config, reader=reader)
        fqt.export.folder(tmp_path / name, tmp_path / f"{name}-plain", layout="plain")
    assert {tensor.dtype for name, tensor in read(tmp_path / "words").items() if "packed" in name} == {torch.int32}
    assert_equal(read(tmp_path / "words-plain"), read(tmp_path / "bytes-plain"))


# Rows that transformers loads in bf16 only: it keeps these experts in bf16, and computes fp32 models with them.
IN_BF16 = {"MXFP4", "MXFP6_E2M3"}
CELLS = [
    (place, weights)
    for place in PLACES
    for weights, inputs in READERS["compressed-tensors"]["transformers"].loads[place]
    if inputs is None
]


@pytest.mark.parametrize(("place", "key"), CELLS, ids=[f"{place}-{'-'.join(key)}" for place, key in CELLS])
def test_what_transformers_loads(place, key, tmp_path):
    """Each row of its table: from_pretrained has fakequant's logits, within 2e-5 in fp32, or its weights in bf16."""
    pytest.importorskip("compressed_tensors")
    format = BY_KEY[key]
    rules = RULES[place] if place == "experts" or key[0] != "int4" else [RULES["experts"], RULES[place]]
    model, params, fq, state = prepared(format, rules=rules)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, reader="transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    fakes = fq.fakequant(params, state)
    if format.name in IN_BF16:
        found = loaded.state_dict()
        assert all(torch.equal(found[name].float(), fakes[name]) for name in fakes if ".experts." in name)
        return
    with torch.no_grad():
        wanted = functional_call(model, fakes, (TOKENS,)).logits.log_softmax(-1)
        found = loaded(TOKENS).logits.log_softmax(-1)
    assert float((found - wanted).abs().max()) <= 2e-5


WITH_FORMATS = [(layout, name) for layout, readers in READERS.items() for name in readers if readers[name].loads]


@pytest.mark.parametrize(("layout", "reader"), WITH_FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_in_the_table_is_refused(place, layout, reader, tmp_path):
    """Every format that a layout has and a reader does not load: named with the place and with what loads."""
    loads = READERS[layout][reader].loads.get(place)
    if loads is None:
        model, params, fq, state = prepared(fqt.FP8_BLOCK, rules=RULES[place])
        options = {"config": model.config, "layout": layout, "reader": reader}
        message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, state, **options)
        assert_names(message, place, reader, "does not load quantized", "layout='plain'")
        return
    for format in (fqt.NVFP4, fqt.INT8, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK, fqt.MXFP8, fqt.MXFP6_E2M3):
        if (format_key(format), None) in loads or (format_key(format), None) not in LAYOUTS[layout].schemes:
            continue
        model, params, fq, state = prepared(format, rules=RULES[place])
        options = {"config": model.config, "layout": layout, "reader": reader}
        message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, state, **options)
        assert_names(message, format.name, reader, place, "wanted one of", "layout='plain'")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["stacked", "lists"])
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.MXFP6_E3M2, fqt.FP8_BLOCK, fqt.INT8], ids=name_of)
def test_plain_files_are_the_fake_weights(format, layout, tmp_path):
    """Any format, those without a name in other layouts too: an ordinary model, with fakequant's logits."""
    change = in_lists if layout == "lists" else lambda params: params
    model, params, fq, state = prepared(format, change=change)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, layout="plain")
    fakes = fq.fakequant(params, state)
    assert_equal(read(tmp_path / "a"), in_files(fakes, model.config.to_dict()))
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    if layout == "stacked":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, functional_call(model, fakes, (TOKENS,)).logits)


def test_plain_files_need_no_ties_and_refuse_inputs(tmp_path):
    """What engines fuse matters to scales only; inputs have no place in plain files."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*.down_proj*": fqt.NVFP4, "*.experts.*.up_proj*": fqt.FP8}))
    fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), config=model.config, layout="plain")
    model, params, fq, state = prepared(fqt.FP8, fqt.FP8)
    options = {"config": model.config, "layout": "plain"}
    message = message_of(ValueError, fqt.export.save, tmp_path / "b", fq, params, state, **options)
    assert_names(message, "plain", "inputs")


def test_a_reader_that_quantizes_inputs_is_said(tmp_path):
    """FP8 experts for vLLM: weights alone are written with inputs declared, and a warning; with them there is none."""
    model, params, fq, state = prepared(fqt.FP8_PER_CHANNEL)
    with pytest.warns(UserWarning, match="whose inputs this reader quantizes too"):
        fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, reader="vllm")
    model, params, fq, state = prepared(fqt.FP8_PER_CHANNEL, fqt.FP8_PER_CHANNEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fqt.export.save(tmp_path / "b", fq, params, state, config=model.config, reader="vllm")
    groups = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in "ab"]
    assert groups[0] == groups[1]


FAULTS = {
    "an unknown layout": ({"layout": "compressed_tensor"}, {}, "compressed_tensor", "'compressed-tensors'"),
    "an unknown reader": ({"reader": "vlm"}, {}, "'vlm'", "vllm"),
    "a reader of another layout": ({"layout": "modelopt", "reader": "transformers"}, {}, "transformers", "plain"),
    "a model that vLLM has dropped": (
        {"reader": "vllm", "architectures": ["Dots1ForCausalLM"]},
        {},
        "Dots1ForCausalLM",
    ),
    "a router that config does not tell": (
        {"reader": "vllm"},
        {"kind": "deepseek_v3"},
        "topk_method",
        "noaux_tc",
        "sigmoid",
    ),
    "a quantized router": ({"reader": "transformers"}, {"weights": fqt.FP8, "rules": "*.mlp.gate.weight"}, "a router"),
    "a quantized router for vLLM": ({"reader": "vllm"}, {"rules": ["*.experts.*", "*.mlp.gate.weight"]}, "a router"),
    "a quantized embedding": (
        {"reader": "transformers"},
        {"weights": fqt.FP8_PER_CHANNEL, "rules": "*embed_tokens.weight"},
        "an embedding",
    ),
    "a layout that is a list": ({"layout": ["plain"]}, {}, "['plain']", "'compressed-tensors'"),
    "a reader that is a list": ({"reader": ["vllm"]}, {}, "['vllm']"),
    "fused rows within a block": (
        {"reader": "vllm"},
        {"weights": fqt.FP8_BLOCK, "rules": RULES["linears"]},
        "64 rows",
        "k_proj",
        "multiple of 128",
    ),
    "packed codes beside plain experts": (
        {"reader": "transformers"},
        {"weights": fqt.INT4_BLOCK32, "rules": "*.1.mlp.experts.*"},
        "model.layers.0.mlp.experts",
        "all experts in one format",
    ),
}


def test_packed_experts_of_two_formats_are_refused_for_transformers(tmp_path):
    """It loads packed codes only where all experts have one scheme; 8 bits per code load side by side."""
    model, params = build()
    for one, two in ((fqt.FP8_PER_CHANNEL, fqt.INT4_BLOCK32), (fqt.INT4_BLOCK128, fqt.INT4_BLOCK32)):
        fq = fqt.transform(fqt.select(params, {"*.0.mlp.experts.*": one, "*.1.mlp.experts.*": two}))
        options = {"config": model.config, "reader": "transformers"}
        message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, fq.calibrate(params), **options)
        assert_names(message, "layers.0", "layers.1", "found", "wanted all experts in one format")
    fq = fqt.transform(fqt.select(params, {"*.0.mlp.experts.*": fqt.FP8_PER_CHANNEL, "*.1.mlp.experts.*": fqt.FP8}))
    fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_before_a_byte_is_written(fault, tmp_path):
    """Each names what was found and what is wanted."""
    options, how, *fragments = FAULTS[fault]
    model, params, fq, state = prepared(**{"weights": fqt.NVFP4} | how)
    config = model.config.to_dict() | {key: options[key] for key in ("architectures",) if key in options}
    options = {key: value for key, value in options.items() if key != "architectures"} | {"config": config}
    message = message_of(ValueError, fqt.export.save, tmp_path / "a", fq, params, state, **options)
    assert_names(message, "found", "wanted", *fragments)
    assert not list(tmp_path.iterdir())


def test_a_head_is_a_target_of_its_own(tmp_path):
    """To vLLM a head is no Linear: with one scheme it is named beside them."""
    model, params, fq, state = prepared(fqt.FP8, rules=list(RULES.values()))
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, reader="transformers")
    about = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert about["config_groups"]["group_0"]["targets"] == ["Linear", "re:^lm_head$"]


def cell(layout, reader, place, keys):
    """What the docs say of a row."""
    loads = READERS[layout][reader].loads.get(place, {})
    if keys not in loads:
        return "-"
    if layout == "fp8":
        return "loads, and quantizes inputs"
    spelled = loads[keys]
    if spelled is None:
        return "loads"
    return "loads, and quantizes inputs" if spelled.inputs else "loads, in words of four codes"


def table():
    """The table of docs/export, from the readers'."""
    columns = [
        ("compressed-tensors", "vllm", "experts"),
        ("compressed-tensors", "vllm", "linears"),
        ("compressed-tensors", "vllm", "lm_head"),
        ("modelopt", "vllm", "experts"),
        ("fp8", "vllm", "experts"),
        ("compressed-tensors", "transformers", "experts"),
        ("compressed-tensors", "transformers", "linears"),
    ]
    lines = [
        "| weights | inputs | vLLM: experts | linears | lm_head | vLLM, modelopt | vLLM, fp8 | transformers: experts "
        "| the rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for keys, (weights, inputs) in zip(SCHEMES, ROWS, strict=True):
        cells = [cell(*column, keys) for column in columns]
        lines.append("| " + " | ".join([weights.name, inputs.name if inputs else "", *cells]) + " |")
    return "\n".join(lines)


def test_the_docs_have_this_table():
    """docs/export is what the readers' table says; all places read ModelOpt's files alike, but the head DeepSeek's."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert table() in page, f"docs/export.md wants this table:\n{table()}"
    assert len({tuple(loads) for loads in READERS["modelopt"]["vllm"].loads.values()}) == 1
    assert [*READERS["fp8"]["vllm"].loads] == ["experts", "linears"]
    ours = READERS["compressed-tensors"]["transformers"].loads
    assert ours["linears"] == ours["lm_head"]


def test_files_as_deepseek_has_them(tmp_path):
    """Codes, scales [out/128, in/128] by which they are multiplied, and what is not quantized; inputs are warned of."""
    model, params, fq, state = prepared(fqt.FP8_BLOCK, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="inputs readers of this layout quantize too"):
        fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, layout="fp8")
    about = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    stored, wanted = read(tmp_path / "a"), in_files(fq.fakequant(params, state), model.config.to_dict())
    assert about["quant_method"] == "fp8"
    assert about["weight_block_size"] == [128, 128]
    assert sorted(about["modules_to_not_convert"]) == sorted(
        name.removesuffix(".weight")
        for name, weight in wanted.items()
        if weight.dim() == 2 and f"{name}_scale_inv" not in stored
    )
    for name, weight in wanted.items():
        codes, scale = stored.pop(name), stored.pop(f"{name}_scale_inv", None)
        if scale is not None:
            assert codes.dtype == torch.float8_e4m3fn
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
            codes = (codes.float() * scale).bfloat16()
        assert torch.equal(codes, weight), name
    assert not stored


def test_modelopt_files_for_vllm_are_its_own(tmp_path):
    """ModelOpt's layout has one spelling: a reader refuses, or gets the same bytes."""
    model, params, fq, state = prepared(fqt.NVFP4, fqt.NVFP4)
    for name, reader in (("a", None), ("b", "vllm")):
        to_modelopt(tmp_path / name, fq, params, state, config=model.config, reader=reader)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
