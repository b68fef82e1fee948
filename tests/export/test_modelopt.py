"""Files as ModelOpt's exporter writes them: its own files of the same model, its tensor classes, and inputs."""

import json

import pytest
import torch

import fq_transforms as fqt
from tests.cases import assert_names, name_of
from tests.export.models import (
    EXPERTS,
    GATE_UP,
    MODELOPT,
    TOKENS,
    assert_same_bytes,
    bits_of,
    build,
    exported,
    in_files,
    in_lists,
    megatron_of,
    of_each_expert,
    read,
    to_modelopt,
    weights_only,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have


@pytest.fixture(scope="module")
def mtq():
    return pytest.importorskip("modelopt.torch.quantization")


@pytest.fixture(scope="module")
def exporter():
    return pytest.importorskip("modelopt.torch.export")


def of_experts(name, inputs=None):
    """A configuration of ModelOpt's, experts only: of weights, and of inputs if told so."""
    bits = {"FP8": (4, 3), "FP8_PER_CHANNEL": (4, 3), "FP8_BLOCK": (4, 3), "MXFP8": (4, 3), "INT8_PER_CHANNEL": 8}
    blocks = {
        "FP8_BLOCK": {-1: 128, -2: 128},
        "NVFP4": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
        "MXFP8": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
    }
    own = {"num_bits": bits.get(name, (2, 1))}
    if name in blocks:
        own["block_sizes"] = blocks[name]
    else:
        own["axis"] = 0 if "CHANNEL" in name else None
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*mlp.experts*weight_quantizer*", "cfg": own}]
    if inputs is not None:
        rules.append({"quantizer_name": "*mlp.experts*input_quantizer", "cfg": inputs})
    return {"quant_cfg": rules, "algorithm": "max"}


def built(kind="qwen3_moe"):
    """A model for ModelOpt to change, and the tensors that it had: wide enough for its blocks of 128."""
    inner = {"intermediate_size": 256} if kind == "mixtral" else {"moe_intermediate_size": 256}
    model, params = build(kind, **inner)
    model.config._experts_implementation = "eager"  # the only one whose linears ModelOpt sees
    return model, {name: tensor.clone() for name, tensor in params.items()}


LARGEST = {"FP8": 448, "FP8_PER_CHANNEL": 448, "FP8_BLOCK": 448, "INT8_PER_CHANNEL": 127}


def round_amax_up(model, name):
    """Every amax becomes the largest code times a power of two: then the exporter's bf16 quotients are exact."""
    for buffer, amax in model.named_buffers():
        if name in LARGEST and buffer.endswith("._amax") and "weight_quantizer" in buffer:
            amax.copy_(LARGEST[name] * torch.exp2(torch.ceil(torch.log2(amax.float() / LARGEST[name]))))


def written_by_both(exporter, tmp_path, model, fq, params, state):
    """All tensors of our folder and of theirs, and both configs without what is not quantized.

    ModelOpt lists there what it found no quantizer in, we every matrix that is not quantized.
    """
    fqt.export.save(tmp_path / "ours", fq, params, state, config=model.config, layout="modelopt")
    exporter.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    found = []
    for who in ("ours", "theirs"):
        about = json.loads((tmp_path / who / "hf_quant_config.json").read_text())
        about["quantization"].pop("exclude_modules")
        config = json.loads((tmp_path / who / "config.json").read_text())["quantization_config"]
        config.pop("ignore")
        found.append((read(tmp_path / who), (about, config)))
    return found


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", [f for f in MODELOPT if f is not fqt.NVFP4_STATIC], ids=name_of)
def test_it_writes_the_same(format, kind, mtq, exporter, tmp_path):
    """Its export_hf_checkpoint of the same model with the same amax: every name, shape, dtype and bit; both configs."""
    model, params = built(kind)
    model = mtq.quantize(model, of_experts(format.name), lambda m: m(TOKENS))
    round_amax_up(model, format.name)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    state = fq.init(params) if format.is_stateless else fqt.checkpoint.modelopt.read(model.state_dict(), fq)
    (ours, own), (theirs, wanted) = written_by_both(exporter, tmp_path, model, fq, params, state)
    if kind == "mixtral" and format is fqt.FP8_BLOCK:
        # It warns that it cannot name Mixtral's experts as files do where scales have four axes.
        for role, in_file in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), ("mlp", "block_sparse_moe")):
            theirs = {name.replace(f".{role}.", f".{in_file}."): tensor for name, tensor in theirs.items()}
    assert_same_bytes(ours, theirs)
    assert own == wanted


INPUTS = {
    "FP8": (fqt.FP8, fqt.FP8, {"num_bits": (4, 3), "axis": None}),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        *(fqt.FP8_PER_CHANNEL, fqt.FP8_PER_CHANNEL),
        {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
    ),
    "W8A8_SQ_PER_CHANNEL": (fqt.INT8_PER_CHANNEL, fqt.INT8, {"num_bits": 8, "axis": None}),
    "NVFP4": (
        *(fqt.NVFP4, fqt.NVFP4),
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    ),
    "MXFP8": (
        *(fqt.MXFP8, fqt.MXFP8),
        {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    ),
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", INPUTS)
def test_it_writes_the_same_input_scales(name, kind, mtq, exporter, tmp_path):
    """Inputs calibrated by each library by itself, weights too but where its codes are quotients in bf16: every bit."""
    format, of_inputs, theirs_of_inputs = INPUTS[name]
    model, params = built(kind)
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*.experts.*", format, of_inputs)]))
    state = fq.calibrate(params, [TOKENS], model=model)
    model = mtq.quantize(model, of_experts(format.name, theirs_of_inputs), lambda m: m(TOKENS))
    if format.name in LARGEST:
        round_amax_up(model, format.name)
        state |= fqt.checkpoint.modelopt.read(model.state_dict(), weights_only(fq))
    (ours, own), (theirs, wanted) = written_by_both(exporter, tmp_path, model, fq, params, state)
    assert_same_bytes(ours, theirs)
    assert own == wanted
    assert own[0]["quantization"]["quant_algo"] == name
    scales = [tensor for tensor in theirs if tensor.endswith("input_scale")]
    assert len(scales) == (0 if of_inputs in (fqt.FP8_PER_CHANNEL, fqt.MXFP8) else 2 * 3 * EXPERTS)


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
def test_it_writes_the_same_input_scales_of_whole_models(name, mtq, exporter, tmp_path):
    """Presets, attention and experts, each calibrated by its own library: all names, and each input scale's bits."""
    model, params = built()
    fq = fqt.transform(fqt.select(params, getattr(fqt.presets, name)))
    state = fq.calibrate(params, [TOKENS], model=model)
    state = fqt.tie(state, [("q_proj", "k_proj"), ("q_proj", "v_proj")]) if name != "MXFP8_DEFAULT_CFG" else state
    model = mtq.quantize(model, getattr(mtq, name), lambda m: m(TOKENS))
    (ours, _), (theirs, _) = written_by_both(exporter, tmp_path, model, fq, params, state)
    assert ours.keys() == theirs.keys()
    scales = [tensor for tensor in theirs if tensor.endswith("input_scale")]
    assert len(scales) == (0 if name == "MXFP8_DEFAULT_CFG" else 2 * (4 + 3 * EXPERTS))
    for tensor in scales if "P4" not in name else theirs:
        assert torch.equal(bits_of(ours[tensor]), bits_of(theirs[tensor])), tensor


@pytest.mark.parametrize("format", [fqt.FP8_PER_CHANNEL], ids=name_of)
def test_where_it_differs_under_any_amax(format, mtq, exporter, tmp_path):
    """Its scale amax / 448 is at most a step of fp32 from ours; its codes, of bf16 quotients, at most a step."""
    model, params = built()
    model = mtq.quantize(model, of_experts(format.name), lambda m: m(TOKENS))
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    state = fqt.checkpoint.modelopt.read(model.state_dict(), fq)
    (ours, _), (theirs, _) = written_by_both(exporter, tmp_path, model, fq, params, state)
    count = differ = 0
    for name, wanted in theirs.items():
        if name.endswith("weight_scale"):
            assert (ours[name].view(torch.int32) - wanted.view(torch.int32)).abs().max() <= 1
        elif f"{name}_scale" in theirs:
            steps = (ours[name].view(torch.uint8).int() - wanted.view(torch.uint8).int()).abs()
            assert steps.max() <= 1
            count, differ = count + steps.numel(), differ + int((steps > 0).sum())
    assert 0 < differ < 0.05 * count


@pytest.mark.parametrize("format", MODELOPT, ids=name_of)
def test_files_stand_for_fakequant(format, tmp_path):
    """NVFP4QTensor and MXFP8QTensor of ModelOpt, and products for the rest, give fakequant's weights."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    model, params = build()
    fq, state = exported(to_modelopt, tmp_path / "a", params, format, model.config)
    stored, wanted = read(tmp_path / "a"), in_files(fq.fakequant(params, state), model.config.to_dict())
    for name, weight in wanted.items():
        scale = stored.get(f"{name}_scale")
        if scale is None:
            assert torch.equal(stored[name], weight)
            continue
        codes = stored[name]
        if format.scale == "e4m3":
            theirs = qtensor.NVFP4QTensor(weight.shape, torch.float32, codes)
            found = theirs.dequantize(
                dtype=torch.float32,
                scale=scale,
                double_scale=stored[f"{name}_scale_2"],
                block_sizes={-1: 16, "scale_bits": (4, 3)},
            )
        elif format is fqt.MXFP8:
            found = qtensor.MXFP8QTensor(weight.shape, torch.float32, codes).dequantize(
                dtype=torch.float32, scale=scale, block_sizes={-1: 32}
            )
        elif scale.dim() == 4:
            found = codes.float() * scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            found = codes.float() * (scale[:, None] if scale.dim() else scale)
        assert torch.equal(found.bfloat16(), weight), name


@pytest.mark.parametrize("layout", ["stacked", "lists", "te", "sequential"])
def test_input_scales_of_each_expert(layout, tmp_path):
    """An amax per expert, from any layout in memory: each file has its own expert's; q, k and v share theirs."""
    model, params = build()
    params = {
        "stacked": lambda: params,
        "lists": lambda: in_lists(params),
        "te": lambda: megatron_of(params, model.config, "te"),
        "sequential": lambda: megatron_of(params, model.config, "sequential"),
    }[layout]()
    both = {"weights": fqt.NVFP4, "inputs": fqt.NVFP4, "required": False}
    dense = [fqt.Rule(pattern, **both) for pattern in ("*self_attn.[qkv]*_proj*", "*linear_qkv.weight")]
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*.experts.*", **both, per_expert_inputs=True), *dense]))
    state = weights_only(fq).calibrate(params) | of_each_expert(fq.spec)
    pairs = [*GATE_UP, ("q_proj", "k_proj"), ("q_proj", "v_proj")]
    state = fqt.tie(state, [pair for pair in pairs if any(pair[0] in key.split(".") for key in state)])
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, layout="modelopt")
    stored = read(tmp_path / "a")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("input_scale")}
    assert len(scales) == 2 * (3 + 3 * EXPERTS)
    for layer in range(2):
        of_layer = f"model.layers.{layer}"
        for role in "qkv":
            assert scales[f"{of_layer}.self_attn.{role}_proj.input_scale"] == (1.0 + 16 * layer) / (6 * 448)
        for e in range(EXPERTS):
            for role, offset in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 8)):
                wanted = torch.tensor(1.0 + 16 * layer + offset + e) / (6 * 448)
                assert scales[f"{of_layer}.mlp.experts.{e}.{role}.input_scale"] == wanted, (layer, e, role)


def test_mixed_inputs(tmp_path):
    """Weights alone beside weights with inputs: each module by its algorithm."""
    model, params = build()
    rules = [fqt.Rule("*.experts.*", fqt.NVFP4), fqt.Rule("*layers.0.*.experts.*", fqt.NVFP4, fqt.NVFP4)]
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params, [TOKENS], model=model)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, layout="modelopt")
    own = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    found = {layer: own[f"model.layers.{layer}.mlp.experts.0.up_proj"]["quant_algo"] for layer in range(2)}
    assert found == {0: "NVFP4", 1: "W4A16_NVFP4"}
    with_scale = {name for name in read(tmp_path / "a") if name.endswith("input_scale")}
    roles = [(e, role) for e in range(EXPERTS) for role in ("gate_proj", "up_proj", "down_proj")]
    assert with_scale == {f"model.layers.0.mlp.experts.{e}.{role}.input_scale" for e, role in roles}


def test_mixed_precision(tmp_path):
    """Several formats: each module by its name, with its algorithm."""
    model, params = build()
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.NVFP4, "*o_proj*": fqt.MXFP8}))
    fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), config=model.config, layout="modelopt")
    own = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]
    assert own["quant_algo"] == "MIXED_PRECISION"
    assert own["quantized_layers"]["model.layers.1.self_attn.o_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    nvfp4 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert own["quantized_layers"]["model.layers.1.mlp.experts.2.up_proj"] == nvfp4
    assert len(own["quantized_layers"]) == 2 + 2 * 3 * EXPERTS


def with_inputs():
    """A model of FP8 weights and inputs, tied, every input amax 1."""
    model, params = build()
    lists = in_lists(params)
    fq = fqt.transform(fqt.select(lists, [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8)]))
    state = fqt.tie(weights_only(fq).calibrate(lists), GATE_UP)
    ones = {"amax": torch.ones(1), "tokens": torch.ones(EXPERTS, dtype=torch.float64)}
    return model.config, lists, fq, state | {inputs.key: dict(ones) for inputs in fq.spec.inputs}


def faults_of_inputs():
    """Name to the Transform, the state, and what the error must say."""
    _, lists, fq, state = with_inputs()
    gate, up, down = (f"model.layers.1.mlp.experts.*.{role}_proj.weight.input" for role in ("gate", "up", "down"))
    fp8 = fqt.FP8

    def with_amax(value, *keys):
        return state | {key: state[key] | {"amax": torch.tensor([value])} for key in keys}

    def after(*first, **last):
        return fqt.transform(fqt.select(lists, [fqt.Rule("*.experts.*", *first), fqt.Rule(**last)]))

    both = {"weights": fp8, "inputs": fp8}
    other = after(fp8, pattern="*.experts.*", weights=fp8, inputs=fqt.NVFP4)
    down_only = after(fp8, pattern="*down_proj*", **both)
    nvfp4 = {"weights": fqt.NVFP4, "inputs": fqt.NVFP4}
    gate_only, up_only = (after(fqt.NVFP4, pattern=f"*{role}_proj*", **nvfp4) for role in ("gate", "up"))
    alone = after(None, fp8, pattern="*down_proj*", **both)
    first_layer = after(fp8, pattern="*layers.0.*.experts.*", **both)
    mixed = after(fp8, fp8, pattern="*up_proj*", **both, per_expert_inputs=True)
    each = after(fp8, pattern="*.experts.*", **both, per_expert_inputs=True)
    no_weights = fqt.transform(fqt.select(lists, [fqt.Rule("*.experts.*", inputs=fp8)]))
    of_experts = state | of_each_expert(each.spec)
    of_mixed = {key: (of_experts if "up_proj" in key else state)[key] for key in state}
    one_is_zero = of_experts | {down: of_experts[down] | {"amax": torch.tensor([1.0, 0.0, 1.0])}}
    return {
        "not tied": (fq, with_amax(2.0, up), gate, up, "1.0 and 2.0", "fqt.tie"),
        "zero": (fq, with_amax(0.0, gate, up), "found 0.0 for all experts"),
        "zero for one": (each, one_is_zero, f"{down}.amax", "found 0.0 for expert 1 of 3"),
        "too small": (fq, with_amax(1e-38, gate, up), f"{gate}.amax", "cannot divide by", "'amax': ..."),
        "one beside one per expert": (mixed, of_mixed, "gate_proj.weight.input", "found 1 and 3 amax", "per_expert"),
        "inputs of some weights": (
            first_layer,
            state,
            "layers.1",
            "FP8 without inputs",
            "Rule(pattern, weights, inputs)",
        ),
        "no inputs": (weights_only(fq), state, "layers.0", "FP8 without inputs", "inputs in FP8 too"),
        "never calibrated": (fq, with_amax(-torch.inf, up), up, "no token"),
        "no name for the pair": (other, state, "NVFP4", "beside weights in FP8", "no name"),
        "no weights": (alone, state, "gate_proj.weight.input", "no quantized weights"),
        "inputs of some roles": (down_only, state, "gate_proj", "FP8 without inputs"),
        "no weights at all": (no_weights, state, "found no weights in the spec", "inputs of 6 groups"),
        "the first of what is fused": (gate_only, state, "up_proj.weight.input'", "NVFP4 and not quantized"),
        "the second of what is fused": (up_only, state, "up_proj.weight.input'", "not quantized and NVFP4"),
    }


@pytest.mark.parametrize(
    ("fq", "state", "fragments"),
    [pytest.param(fq, state, fragments, id=name) for name, (fq, state, *fragments) in faults_of_inputs().items()],
)
def test_faults_of_inputs_are_found_before_a_byte_is_written(fq, state, fragments, tmp_path):
    """Each names the inputs, what was found and what was wanted; the folder is not made."""
    model, params = build()
    own = {group.key: state[group.key] for group in fq.spec.all_groups}
    with pytest.raises(ValueError) as caught:
        fqt.export.save(tmp_path / "a", fq, in_lists(params), own, config=model.config, layout="modelopt")
    assert_names(str(caught.value), *fragments, "found", "wanted")
    assert not list(tmp_path.iterdir())


def test_tied_inputs_are_exported(tmp_path):
    """What the error about inputs that are not tied tells to do."""
    config, params, fq, state = with_inputs()
    up = "model.layers.1.mlp.experts.*.up_proj.weight.input"
    state[up] = state[up] | {"amax": torch.tensor([2.0])}
    fqt.export.save(tmp_path / "a", fq, params, fqt.tie(state, GATE_UP), config=config, layout="modelopt")
    stored, block = read(tmp_path / "a"), "model.layers.1.mlp.experts.0"
    assert stored[f"{block}.gate_proj.input_scale"] == stored[f"{block}.up_proj.input_scale"] == 2.0 / 448
    assert stored[f"{block}.down_proj.input_scale"] == 1.0 / 448
