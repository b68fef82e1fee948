"""The law of every export: all of each parameter goes to the files once, or nothing is written."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fq_transforms as fqt
from tests.cases import assert_names
from tests.export.models import TARGETS, read, to_compressed_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

HIDDEN, INNER = 32, 64
PREFIXES = ["model.", "", "model.language_model.", "language_model.model.", "transformer.", "base_model.model.model."]
BLOCKS = ["mlp", "block_sparse_moe", "moe", "feed_forward", "mixer"]
# Stacks whose names do not say so, for `select`.
STACKED = r".*\.(?:up|down)_proj(?:\.base_layer)?\.weight"
LAYOUTS = ["list", "stacks", "fused stacks", "stacks with .weight", "base_layer"]
COUNTS = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", None]
MODEL_TYPES = ["qwen3_moe", "mixtral", "deepseek_v3", "step3p5", "unknown"]


def experts_of(block, layout, experts):
    """Parameters of the experts of a layer, no two rows alike."""
    up, down = torch.randn(2 * experts, INNER, HIDDEN), torch.randn(experts, HIDDEN, INNER)
    gate, up = up[:experts], up[experts:]
    if layout == "list":
        roles = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        return {f"{block}.experts.{e}.{role}.weight": w[e] for role, w in roles.items() for e in range(experts)}
    if layout == "fused stacks":
        return {f"{block}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{block}.experts.down_proj": down}
    end = {"stacks": "", "stacks with .weight": ".weight", "base_layer": ".base_layer.weight"}[layout]
    inside = block if end else f"{block}.experts"
    return {f"{inside}.{role}{end}": w for role, w in (("up_proj", up), ("down_proj", down))}


def rows_of(tensors):
    """All rows of all matrices: their bytes, and how often."""
    found = Counter()
    for tensor in tensors.values():
        if tensor.dim() > 1:
            found.update(row.numpy().tobytes() for row in tensor.float().flatten(0, -2))
    return found


@st.composite
def models(draw, layouts=LAYOUTS, fewest=1):
    """Parameters and a config of what a model may look like, and how `select` finds its experts."""
    prefix, block = draw(st.sampled_from(PREFIXES)), draw(st.sampled_from(BLOCKS))
    layout, key = draw(st.sampled_from(layouts)), draw(st.sampled_from(COUNTS))
    experts, layers = draw(st.integers(fewest, 4)), draw(st.integers(1, 2))
    config = {"model_type": draw(st.sampled_from(MODEL_TYPES)), "architectures": ["X"], "num_hidden_layers": layers}
    torch.manual_seed(0)
    params = {f"{prefix}embed_tokens.weight": torch.randn(8, HIDDEN), f"{prefix}norm.weight": torch.randn(HIDDEN)}
    for layer in range(layers):
        params |= experts_of(f"{prefix}layers.{layer}.{block}", layout, experts)
    if key:
        config[key] = experts
    told = {"experts": STACKED} if ".weight" in layout or layout == "base_layer" else {}
    return params, config, experts, told | {"transposed": {"*_proj*": False}}


@TARGETS
@settings(max_examples=60, deadline=None)
@given(model=models())
def test_each_row_is_in_the_files_once_or_nothing_is_written(target, tmp_path_factory, model):
    """Whatever layout, prefix and model: codes and plain rows are as many as the model has, and the same ones."""
    params, config, _, options = model
    fq = fqt.transform(fqt.select(params, {"*layers.*": fqt.NVFP4}, **options))
    state = fq.calibrate(params)
    for key in list(state):
        if "gate_proj" in key:  # engines want these alike
            amax = torch.maximum(state[key]["amax"], state[key.replace("gate", "up")]["amax"])
            state[key]["amax"], state[key.replace("gate", "up")]["amax"] = amax, amax.clone()
    folder = tmp_path_factory.mktemp("export") / "a"
    try:
        target(folder, fq, params, state, config=config)
    except ValueError as error:
        assert_names(str(error), "found", "wanted")
        assert not folder.exists()
        return
    found = read(folder)
    packed = fq.pack(params, state)
    wanted = Counter()
    for group in fq.spec.groups:
        wanted.update(row.numpy().tobytes() for row in packed[group.key]["codes"].flatten(0, -2))
    codes = {n: t for n, t in found.items() if t.dtype == torch.uint8}
    assert Counter(row.numpy().tobytes() for t in codes.values() for row in t) == wanted
    selected = {name for group in fq.spec.groups for name in group.names}
    assert rows_of({n: t for n, t in found.items() if t.dtype == torch.float32 and t.dim() > 1}) == rows_of(
        {n: p for n, p in params.items() if n not in selected}
    )


@settings(max_examples=60, deadline=None)
@given(model=models(["list"], fewest=2), number=st.integers(0, 11))
def test_a_rank_without_some_experts_is_refused(tmp_path_factory, model, number):
    """Under every prefix and every name of the count, if config has one; without one, what is no range from zero."""
    params, config, experts, options = model
    is_told = any(key in config for key in COUNTS if key)
    left_out = number % (experts if is_told else experts - 1)
    rest = {name: p for name, p in params.items() if f".experts.{left_out}." not in name}
    parent = tmp_path_factory.mktemp("export")

    def written(params, name):
        fq = fqt.transform(fqt.select(params, {"*layers.*": fqt.MXFP4}, **options))
        fqt.export.save(parent / name, fq, params, fq.calibrate(params), config=config)

    if not any(name.startswith("base_model.") for name in params):
        written(params, "whole")
    with pytest.raises(ValueError) as caught:
        written(rest, "part")
    # `select` says so itself, where the last one is not the missing one.
    if not re.search("each once|wrapper's prefix", str(caught.value)):
        assert_names(str(caught.value), "experts in layer", "found", "wanted", "gather the experts of all ranks")
    assert not (parent / "part").exists()


@TARGETS
def test_what_is_written_beside_codes_is_refused(target, tmp_path):
    """A scale that a quantized file has left in params would take the place of ours, or ours of it."""
    params = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(32, 32) for e in range(2)}
    params["model.layers.0.mlp.experts.1.down_proj.weight_scale"] = torch.ones(1)
    fq = fqt.transform(fqt.select(params, {"*.weight": fqt.NVFP4}))
    config = {"model_type": "qwen3_moe", "architectures": ["X"]}
    with pytest.raises(ValueError) as caught:
        target(tmp_path / "a", fq, params, fq.calibrate(params), config=config)
    assert_names(str(caught.value), "experts.1.down_proj.weight_scale", "beside the codes", "found", "wanted")
    assert not list(tmp_path.iterdir())


@TARGETS
@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
def test_layers_that_config_promises_are_there(target, key, tmp_path):
    """Behind the last layer, or under `mtp`; transformers leaves them out, and an engine would look for them."""
    params = {
        f"model.layers.{n}.mlp.experts.{e}.down_proj.weight": torch.randn(32, 32) for n in (0, 1) for e in range(2)
    }
    config = {"model_type": "qwen3_moe", "architectures": ["X"], "num_hidden_layers": 2, "num_experts": 2, key: 1}
    more = {f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(32, 32) for e in range(2)}
    behind = {name.replace("mtp.layers.0", "model.layers.2"): weight for name, weight in more.items()}

    def written(params, name, config=config):
        fq = fqt.transform(fqt.select(params, {"model.layers.[01].*": fqt.NVFP4}))
        target(tmp_path / name, fq, params, fq.calibrate(params), config=config)
        return read(tmp_path / name)

    with pytest.raises(ValueError) as caught:
        written(params, "a")
    assert_names(str(caught.value), "found no layer 2", "wanted 1", key, f"{key}=0")
    assert not list(tmp_path.iterdir())
    assert written(params | behind, "b").keys() >= behind.keys()
    written(params, "c", config | {key: 0})


def test_a_tied_head_is_left_out_only_if_its_numbers_are_there(tmp_path):
    """Also where the embedding has another prefix; a head whose embedding is not there would be lost."""
    weights = {f"model.text.layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(32, 32) for e in range(2)}
    fq = fqt.transform(fqt.select(weights, {"*": fqt.NVFP4}))
    config = {"model_type": "qwen3_moe", "architectures": ["X"], "tie_word_embeddings": True}
    head = torch.randn(8, 32)

    def written(name, **others):
        params = weights | {"lm_head.weight": head} | {key.replace("__", "."): value for key, value in others.items()}
        fqt.export.save(tmp_path / name, fq, params, fq.calibrate(params), config=config)
        return read(tmp_path / name)

    found = written("a", model__text__embed_tokens__weight=head.clone())
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.text.embed_tokens.weight"], head)
    for name, others in (("b", {}), ("c", {"model__text__embed_tokens__weight": head + 1})):
        with pytest.raises(ValueError, match="by which it would be lost"):
            written(name, **others)
        assert not (tmp_path / name).exists()


CONFIG = {"model_type": "qwen3_moe", "architectures": ["X"], "num_hidden_layers": 1, "num_experts": 2}


def of_layer(prefix="model.layers.0.mlp", experts=2, roles=("up_proj", "down_proj")):
    return {f"{prefix}.experts.{e}.{role}.weight": torch.randn(32, 32) for role in roles for e in range(experts)}


def test_formats_of_one_layout_are_one_format(tmp_path):
    """NVFP4 with static blocks beside dynamic ones: readers see no difference."""
    params = of_layer()
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4, "*down_proj*": fqt.NVFP4_STATIC}))
    fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), config=CONFIG)
    assert len(read(tmp_path / "a")) == 3 * len(params)


def written(tmp_path, params, config=None, rules="*.experts.*", target=to_compressed_tensors):
    fq = fqt.transform(fqt.select(params, {rules: fqt.NVFP4}))
    target(tmp_path / "a", fq, params, fq.calibrate(params), config=CONFIG | (config or {}))
    return read(tmp_path / "a")


EMBEDDING = torch.randn(8, 32)
TIED = {"tie_word_embeddings": True}
LOST = {
    "codes and a plain weight of one name": (
        {"a.router": torch.randn(32, 32), "a.router.weight": torch.ones(32, 32), **of_layer()},
        {},
        "a.router",
        "found 'a.router.weight' for both in files",
    ),
    "a head whose embedding is quantized": (
        {**of_layer(), "model.embed_tokens.weight": EMBEDDING, "lm_head.weight": EMBEDDING.clone()},
        TIED,
        "model.embed_*",
        "not quantized",
    ),
    "a head that is another part's embedding": (
        of_layer()
        | {"model.embed_tokens.weight": EMBEDDING + 1, "a.embed_tokens.weight": EMBEDDING, "lm_head.weight": EMBEDDING},
        TIED,
        "*.experts.*",
        "it would be lost",
    ),
    "a stack within a wrapper": (
        {
            "model.layers.0._orig_mod.mlp.experts.gate_up_proj": torch.randn(2, 64, 32),
            "model.layers.0._orig_mod.mlp.experts.down_proj": torch.randn(2, 32, 32),
        },
        {},
        "*",
        "a wrapper's prefix",
    ),
    "PEFT's prefix": (of_layer("base_model.model.model.layers.0.mlp"), {}, "*", "a wrapper's prefix"),
    "an adapter": (
        of_layer() | {"model.layers.0.mlp.experts.0.up_proj.lora_A.default.weight": torch.randn(4, 32)},
        {},
        "*_proj.weight",
        "a wrapper's prefix",
    ),
    "a role with fewer experts": (
        of_layer(roles=["up_proj"]) | of_layer(experts=1, roles=["down_proj"]),
        {},
        "*",
        "experts.*.down_proj.weight",
    ),
    "a layer whose experts are missing": (
        of_layer() | {"model.layers.1.mlp.gate.weight": torch.randn(2, 32)},
        {"num_hidden_layers": 2},
        "*.experts.*",
        "no experts in layer 1",
    ),
    "a layer more than config has": (of_layer() | of_layer("model.layers.1.mlp"), {}, "*", "wanted no more than 1"),
    "a role that a layer lacks": (
        of_layer() | of_layer("model.layers.1.mlp", roles=["up_proj"]),
        {"num_hidden_layers": 2},
        "*",
        "wanted all roles that another layer has",
    ),
    "a mixer's router alone": (
        of_layer("model.layers.0.mixer") | {"model.layers.1.mixer.gate.weight": torch.randn(2, 32)},
        {"num_hidden_layers": 2},
        "*.experts.*",
        "no experts in layer 1",
    ),
    "a router of that name alone": (
        of_layer("model.layers.0.feed_forward") | {"model.layers.1.feed_forward.router.weight": torch.randn(2, 32)},
        {"num_hidden_layers": 2},
        "*.experts.*",
        "no experts in layer 1",
    ),
    "a decoder deeper than its encoder": (
        of_layer("model.decoder.layers.0.mlp") | {"model.encoder.layers.0.w": torch.randn(32, 32)},
        {"decoder_layers": 2},
        "*.experts.*",
        "wanted 2, as decoder_layers",
    ),
    "a count that is no number": (of_layer(), {"num_experts": "2"}, "*", "wanted a whole number"),
    "one of three layers for more tokens": (
        of_layer() | of_layer("mtp.layers.0.mlp"),
        {"num_nextn_predict_layers": 3},
        "*",
        "1 of 'mtp', wanted 3",
    ),
    "a nested config": (
        of_layer("thinker.model.layers.0.mlp"),
        {"num_experts": None, "num_hidden_layers": None, "thinker_config": {"text_config": {"num_experts": 4}}},
        "*",
        "wanted 4",
    ),
    "fewer layers for more tokens": (
        of_layer() | of_layer("model.layers.1.mlp"),
        {"num_nextn_predict_layers": 3},
        "*",
        "wanted 3",
    ),
    "layers of an image in their place": (
        of_layer() | {"visual.blocks.1.w": torch.randn(32, 32)},
        {"num_nextn_predict_layers": 1},
        "*.experts.*",
        "found no layer 1",
    ),
}


@pytest.mark.parametrize(
    ("params", "config", "rules", "said"), [pytest.param(*case, id=name) for name, case in LOST.items()]
)
def test_what_would_be_lost_is_refused(params, config, rules, said, tmp_path):
    """Each was written once, without a word."""
    with pytest.raises(ValueError) as caught:
        written(tmp_path, params, config, rules)
    assert_names(str(caught.value), said, "found", "wanted")
    assert not list(tmp_path.iterdir())


WHOLE = {
    "Qwen3-Next's layers for more tokens": (of_layer() | of_layer("mtp.layers.0.mlp"), {"num_nextn_predict_layers": 1}),
    "under the model": (of_layer() | of_layer("model.mtp.layers.0.mlp"), {"num_nextn_predict_layers": 1}),
    "in blocks": (of_layer() | {"model.mtp_block.0.w": torch.randn(4, 4)}, {"num_nextn_predict_layers": 1}),
    "another stack of another depth": (
        of_layer() | of_layer("talker.model.layers.0.mlp", 3) | of_layer("model.vision_tower.layers.0.mlp", 1),
        {},
    ),
    "a number of experts for each layer": (
        of_layer() | of_layer("model.layers.1.mlp", 3),
        {"num_experts": [2, 3], "num_hidden_layers": 2},
    ),
    "a gate that is no router": (
        {f"model.layers.0.{name}.weight": torch.randn(32, 32) for name in ("mlp.gate", "mlp.up")} | of_layer("a.0.mlp"),
        {"num_experts": None},
    ),
    "an embedding of another name": (
        of_layer() | {"backbone.embeddings.weight": EMBEDDING, "lm_head.weight": EMBEDDING.clone()},
        TIED,
    ),
    "another part's vocabulary": (
        of_layer()
        | {"model.embed_tokens.weight": EMBEDDING, "model.audio_tower.decoder.embed_tokens.weight": EMBEDDING[:4]},
        {"vocab_size": 8},
    ),
    "a head in another dtype": (
        of_layer()
        | {"model.embed_tokens.weight": EMBEDDING.bfloat16().float(), "lm_head.weight": EMBEDDING.bfloat16()},
        TIED,
    ),
}


@pytest.mark.parametrize(("params", "config"), [pytest.param(*case, id=name) for name, case in WHOLE.items()])
def test_whole_models_are_written(params, config, tmp_path):
    """Each was refused once, or had a message about something else."""
    found = written(tmp_path, params, config)
    assert len([name for name in found if name.endswith(".weight_packed")]) == sum(".experts." in n for n in params)
