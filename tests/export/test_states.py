"""Laws of a folder that takes its amax from a checkpoint: what an export from memory writes with that state."""

import json
import random

import pytest
import torch

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.export import folder
from fq_transforms.export.streaming import job
from tests.cases import assert_names
from tests.export.models import assert_same_bytes, build, in_lists, megatron_of, of_each_expert, read, weights_only
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of what engines quantize besides

# What weights are called: in files, in memory of transformers, and of Megatron.
NAMES = {
    "files": lambda model, params: in_lists(params),
    "stacked": lambda model, params: params,
    "te": lambda model, params: megatron_of(params, model.config, "te"),
    "sequential": lambda model, params: megatron_of(params, model.config, "sequential"),
}
SAVES = {"file": checkpoint.save_file, "directory": checkpoint.save}
DENSE = "*self_attn*.[qkv]_proj*", "*linear_qkv.weight"
# Formats of weights and inputs, and a layout that has a word for both.
FORMATS = [
    (fqt.FP8, None, "compressed-tensors"),
    (fqt.FP8_PER_CHANNEL, None, "compressed-tensors"),
    (fqt.INT4_BLOCK32, None, "compressed-tensors"),
    (fqt.FP8_BLOCK, None, "compressed-tensors"),
    (fqt.FP8_BLOCK, None, "fp8"),
    (fqt.NVFP4, None, "compressed-tensors"),
    (fqt.NVFP4_STATIC, None, "modelopt"),
    (fqt.MXFP4, None, "compressed-tensors"),
    (fqt.FP8, fqt.FP8, "compressed-tensors"),
    (fqt.FP8, fqt.FP8, "modelopt"),
    (fqt.NVFP4, fqt.NVFP4, "compressed-tensors"),
    (fqt.NVFP4, fqt.NVFP4, "modelopt"),
]
ALL = [(*one, names, kind) for one in FORMATS for names in NAMES for kind in SAVES]
CASES = ALL if FULL else [ALL[i] for i in random.Random(0).sample(range(len(ALL)), 14)]


@pytest.fixture(autouse=True)
def _few_pieces(monkeypatch):
    """Pieces of one expert or two."""
    monkeypatch.setattr(job, "PIECE_BYTES", 3 * 10**5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tiny Qwen3-MoE, the model and its tensors."""
    path = tmp_path_factory.mktemp("of") / "src"
    built, params = build()
    built.save_pretrained(path, max_shard_size="200KB")
    return path, built, params


def trained(params, weights, inputs, layout="plain", per_expert=True):
    """A Transform and a state that no calibration finds again: experts', and q, k and v where their rows may be."""
    experts = fqt.Rule("*.experts.*", weights, inputs, per_expert_inputs=per_expert and inputs is not None)
    dense = [fqt.Rule(pattern, weights, inputs, required=False) for pattern in DENSE]
    fq = fqt.transform(
        fqt.select(params, [experts, *dense] if (weights.block[0] or 1) == 1 else [experts]), layout=layout
    )
    generator = torch.Generator().manual_seed(5)
    state = {
        key: {name: leaf * (0.5 + torch.rand(leaf.shape, generator=generator)) for name, leaf in leaves.items()}
        for key, leaves in weights_only(fq).calibrate(params).items()
    }
    of_inputs = of_each_expert(fq.spec)
    pairs = [("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("q_proj", "v_proj")]
    words = {word for key in state for word in key.split(".")}
    state |= {one.key: of_inputs[one.key] if one.is_calibrated else {} for one in fq.spec.inputs}
    is_number = any(leaf.dim() == 1 for leaves in state.values() for leaf in leaves.values())
    return fq, fqt.tie(state, [pair for pair in pairs if {*pair} <= words]) if is_number else state


def about(path):
    return json.loads((path / "config.json").read_text()).get("quantization_config")


def assert_as_in_memory(tmp_path, fq, params, state, model, layout):
    fqt.export.save(tmp_path / "mem", fq, params, state, config=model.config, layout=layout)
    assert_same_bytes(read(tmp_path / "dst"), read(tmp_path / "mem"))
    assert about(tmp_path / "dst") == about(tmp_path / "mem")


@pytest.mark.parametrize(("weights", "inputs", "layout", "names", "kind"), CASES)
def test_a_state_by_any_names(weights, inputs, layout, names, kind, model, tmp_path):
    """Codes, scales and input scales of the model in memory whose state it is; rules may say the same again."""
    src, built, params = model
    params = NAMES[names](built, params)
    fq, state = trained(params, weights, inputs, layout)
    SAVES[kind](tmp_path / "state", fq, state)
    made = folder(src, tmp_path / "dst", state=tmp_path / "state", layout=layout, jobs=2)
    assert all(group.format == fq.spec.groups[0].format for group in made.spec.groups)
    assert_as_in_memory(tmp_path, fq, params, state, built, layout)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4, fqt.NVFP4_STATIC], ids=lambda format: format.name)
def test_a_state_for_plain_weights(format, names, model, tmp_path):
    """Fake weights under the state, though roles of engines may not be tied: none read codes."""
    src, built, params = model
    params = NAMES[names](built, params)
    fq, state = trained(params, format, None)
    checkpoint.save_file(tmp_path / "state", fq, state)
    folder(src, tmp_path / "dst", state=tmp_path / "state", layout="plain")
    assert_as_in_memory(tmp_path, fq, params, state, built, "plain")


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(("format", "layout"), [(fqt.FP8, "modelopt"), (fqt.NVFP4, "compressed-tensors")])
def test_inputs_of_a_checkpoint(format, layout, names, per_expert, model, tmp_path):
    """Their amax from one that was calibrated with batches, weights' from the weights."""
    src, built, params = model
    fq, state = trained(NAMES[names](built, params), format, format, layout, per_expert)
    checkpoint.save_file(tmp_path / "state", fq, state)
    experts = fqt.Rule("*.experts.*", format, format, per_expert_inputs=per_expert)
    rules = [experts, fqt.Rule("*.[qkv]_proj*", format, format)]
    folder(src, tmp_path / "dst", rules, inputs=tmp_path / "state", layout=layout)
    files = read(src)
    own, fresh = trained(files, format, format, layout, per_expert)
    pairs = [("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("k_proj", "v_proj")]
    fresh = fqt.tie(weights_only(own).calibrate(files), pairs) | {one.key: fresh[one.key] for one in own.spec.inputs}
    assert_as_in_memory(tmp_path, own, files, fresh, built, layout)


def test_rules_beside_a_state_say_the_same(model, tmp_path):
    """Others are refused, and so is a method, which the state makes needless."""
    src, built, params = model
    fq, state = trained(params, fqt.FP8_PER_CHANNEL, None, "compressed-tensors")
    checkpoint.save_file(tmp_path / "state", fq, state)
    rules = {"*.experts.*": fqt.FP8_PER_CHANNEL, "*.[qkv]_proj*": fqt.FP8_PER_CHANNEL}
    folder(src, tmp_path / "dst", rules, state=tmp_path / "state")
    assert_as_in_memory(tmp_path, fq, params, state, built, "compressed-tensors")
    others = {
        "*.experts.*": {"rules": {"*.experts.*": fqt.FP8_PER_CHANNEL}},
        "NVFP4": {"rules": {"*": fqt.NVFP4}},
        "Mse": {"method": fqt.methods.Mse()},
    }
    for said, options in others.items():
        with pytest.raises(ValueError, match="found") as caught:
            folder(src, tmp_path / "other", state=tmp_path / "state", **options)
        assert_names(str(caught.value), "state", "wanted", *([said] if said != "*.experts.*" else ["_proj"]))
    assert not (tmp_path / "other").exists()


def test_a_state_that_is_not_tied_is_refused(model, tmp_path):
    """Before a write, as an export from memory does, with what to call; of plain weights it may be so."""
    src, built, params = model
    params = in_lists(params)
    for weights, inputs, part in ((fqt.NVFP4, None, ""), (fqt.FP8, fqt.FP8, ".input")):
        fq, state = trained(params, weights, inputs, "compressed-tensors")
        key = next(key for key in state if key.endswith(f"up_proj.weight{part}"))
        state = state | {key: state[key] | {"amax": state[key]["amax"] * 2}}
        checkpoint.save_file(tmp_path / "state", fq, state)
        said = []
        for call in (
            lambda fq=fq, state=state: fqt.export.save(tmp_path / "a", fq, params, state, config=built.config),
            lambda: folder(src, tmp_path / "a", state=tmp_path / "state"),
        ):
            with pytest.raises(ValueError, match="fqt.tie") as caught:
                call()
            said.append(str(caught.value))
        assert said[1].endswith(said[0])
        assert_names(said[1], key, "found the amax", "wanted one")
        assert not (tmp_path / "a").exists()


def test_inputs_that_engines_cannot_divide_by_are_refused_before_a_write(model, tmp_path):
    """An amax of zero, of one expert; and inputs of one number beside one per expert in fused roles."""
    src, _, params = model
    fq, state = trained(in_lists(params), fqt.FP8, fqt.FP8, "modelopt")
    key = next(key for key in state if key.endswith("down_proj.weight.input"))
    zero = state | {key: state[key] | {"amax": torch.tensor([1.0, 0.0, 1.0])}}
    checkpoint.save_file(tmp_path / "state", fq, zero)
    for options in ({"state": tmp_path / "state"}, {"rules": fq.spec.rules, "inputs": tmp_path / "state"}):
        with pytest.raises(ValueError) as caught:
            folder(src, tmp_path / "to" / "dst", layout="modelopt", **options)
        assert_names(str(caught.value), key, "found 0.0 for expert 1 of 3", "wanted")
    both = [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8), fqt.Rule("*up_proj*", fqt.FP8, fqt.FP8, per_expert_inputs=True)]
    mixed = fqt.transform(fqt.select(in_lists(params), both))
    of_mixed = weights_only(mixed).calibrate(in_lists(params)) | of_each_expert(mixed.spec)
    checkpoint.save_file(tmp_path / "state", mixed, of_mixed)
    with pytest.raises(ValueError, match="found 1 and 3 amax"):
        folder(src, tmp_path / "to" / "dst", both, inputs=tmp_path / "state", layout="modelopt")
    assert not (tmp_path / "to").exists()


def _narrow(name, tensor):
    """Experts of 64 numbers."""
    if ".experts." not in name:
        return {name: tensor}
    return {name: tensor[..., :64, :] if "down" in name else tensor[..., :64]}


def _more(name, tensor):
    """Four experts."""
    if tensor.dim() == 3:
        return {name: torch.cat([tensor, tensor[:1]])}
    return {name: tensor, name.replace("experts.2.", "experts.3."): tensor}


def _fewer(name, tensor):
    """Two experts, of which the third would stay as it is."""
    return {} if "experts.2." in name else {name: tensor[:2] if tensor.dim() == 3 else tensor}


OTHER = {
    "layers.7": lambda name, tensor: {name.replace("layers.1.", "layers.7."): tensor},
    "64": _narrow,
    "experts.3.": _more,
    "experts": _fewer,
    "other": lambda name, tensor: {name.replace("mlp", "other"): tensor},
}


@pytest.mark.parametrize("names", ["files", "stacked"])
@pytest.mark.parametrize("said", OTHER)
def test_states_of_other_models_are_refused(said, names, model, tmp_path):
    """More layers, other widths, more experts, other names: which, before a write."""
    src, built, params = model
    params = NAMES[names](built, params)
    other = {}
    for name, tensor in params.items():
        other |= OTHER[said](name, tensor)
    fq, state = trained(other, fqt.FP8, fqt.FP8)
    checkpoint.save_file(tmp_path / "state", fq, state)
    rules = [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8, per_expert_inputs=True)]
    for options in ({"state": tmp_path / "state"}, {"rules": rules, "inputs": tmp_path / "state"}):
        with pytest.raises(ValueError) as caught:
            folder(src, tmp_path / "to" / "dst", layout="modelopt", **options)
        which = "state" if "state" in options else "inputs"
        assert_names(str(caught.value), said, "found", "wanted")
        assert OTHER[said] is _fewer or f"{which} {str(tmp_path / 'state')!r}" in str(caught.value), caught.value
    assert not (tmp_path / "to").exists()
