"""Files for compressed-tensors: its own decompressors give `fakequant`'s weights; what transformers makes of them."""

import json
import sys

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.formats import FORMATS
from tests.cases import assert_names, name_of
from tests.export.models import (
    COMPRESSED,
    MODELS,
    TOKENS,
    assert_equal,
    build,
    exported,
    in_files,
    in_lists,
    read,
    to_compressed_tensors,
    to_modelopt,
    transformers,
    write,
)

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

CONVENTIONS = [FORMATS[name] for name in ("INT4_BLOCK32_KIMI", "NVFP4_TRANSFORMER_ENGINE", "MXFP4_OCP")]


def decompressed(folder):
    """What its own decompressors read."""
    plain = folder.with_name(f"{folder.name}-plain")
    fqt.export.folder(folder, plain, layout="plain")
    return read(plain)


@pytest.mark.parametrize("layout", ["stacked", "lists"])
@pytest.mark.parametrize("format", COMPRESSED + CONVENTIONS, ids=name_of)
def test_it_reads_the_files(format, layout, tmp_path):
    """Its own decompressors give fakequant's bf16 weights, each; and what is not quantized is as it was."""
    model, params = build()
    config = model.config.to_dict()
    if layout == "lists":
        params = in_lists(params)
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, format, model.config)
    found = decompressed(tmp_path / "a")
    assert_equal(found, in_files(fq.fakequant(params, state), config))
    assert not all(torch.equal(found[name], weight) for name, weight in in_files(params, config).items())


@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.INT4_BLOCK32, fqt.FP8], ids=name_of)
def test_the_dtype_is_that_of_the_transform(format, tmp_path):
    """Law: what a reader gets is `fakequant` under the Transform's own out_dtype, here bf16 from fp32 weights.

    Kills an export that takes the weights' dtype: multipliers of INT4 would be right in fp32 only.
    """
    model, params = build()
    params = {name: (1 + 2**-10) * weight.float() if ".experts." in name else weight for name, weight in params.items()}
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}), out_dtype=torch.bfloat16)
    state = fq.calibrate(params)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(decompressed(tmp_path / "a"), in_files(fq.fakequant(params, state), model.config.to_dict()))


@pytest.mark.parametrize("format", COMPRESSED, ids=name_of)
def test_zero_experts_are_zero(format, tmp_path):
    """An expert without weights has scales of 0, whose reciprocal is infinite: it reads as zeros, not as NaN."""
    model, params = build()
    for name, param in params.items():
        if ".experts." in name:
            param[1] = 0
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, format, model.config)
    assert all(t.isfinite().all() for t in read(tmp_path / "a").values() if t.dtype in (torch.float32, torch.bfloat16))
    wanted, found = in_files(fq.fakequant(params, state), model.config.to_dict()), decompressed(tmp_path / "a")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.INT4_BLOCK32, fqt.FP8_BLOCK], ids=name_of)
def test_decompressed_files_have_the_logits_of_the_fake_quantized_model(kind, format, tmp_path):
    """from_pretrained of what `folder` has decoded: the class, the names and every weight are right."""
    model, params = build(kind)
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, format, model.config)
    with torch.no_grad():
        wanted = functional_call(model, fq.fakequant(params, state), (TOKENS,)).logits
        original = model(TOKENS).logits
    fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        found = loaded(TOKENS).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(found, original)


# What transformers 5.23 makes of the compressed files themselves, where experts are quantized.
LOADED_BY_TRANSFORMERS = {
    "FP8": "exact",
    "FP8_PER_CHANNEL": "exact",
    "MXFP4": "exact",
    "MXFP6_E2M3": "exact",
    "INT4_BLOCK32": "in fp32",
    "NVFP4": "wrong",
    "INT8": "raises",
    "INT8_PER_CHANNEL": "raises",
    "FP8_BLOCK": "raises",
    "MXFP8": "raises",
}


@pytest.mark.parametrize("name", LOADED_BY_TRANSFORMERS)
def test_what_transformers_loads_without_us(name, tmp_path):
    """The table of docs/export: exact, raises, or (NVFP4, whose global scale it drops) silently incorrect."""
    model, params = build()
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, FORMATS[name], model.config)
    if LOADED_BY_TRANSFORMERS[name] == "raises":
        with pytest.raises(RuntimeError, match="conversion"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        return
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    weights, found = fq.fakequant(params, state), loaded.state_dict()
    equal = all(torch.equal(found[name].bfloat16(), weight) for name, weight in weights.items())
    assert equal == (LOADED_BY_TRANSFORMERS[name] != "wrong")
    if LOADED_BY_TRANSFORMERS[name] == "exact":
        with torch.no_grad():
            wanted = functional_call(model, weights, (TOKENS,)).logits
            assert torch.equal(loaded(TOKENS).logits, wanted)


def test_ragged_square_blocks(tmp_path):
    """A weight whose edges cut blocks of 128 x 128: the last row and column of scales stand for less."""
    params = {"model.ragged.weight": torch.randn(130, 200).bfloat16()}
    config = {"model_type": "any", "architectures": ["Any"]}
    for target, name in ((to_compressed_tensors, "ct"), (to_modelopt, "mo")):
        fq, state = exported(target, tmp_path / name, params, fqt.FP8_BLOCK, config, rules="*")
        assert read(tmp_path / name)["model.ragged.weight_scale"].numel() == 4
    assert_equal(decompressed(tmp_path / "ct"), fq.fakequant(params, state))


def test_several_formats(tmp_path):
    """One scheme per format, each with the modules that it is for: the decompressed weights are right for all."""
    model, params = build()
    rules = {"*.0.mlp.experts.*": fqt.NVFP4, "*.1.mlp.experts.*": fqt.FP8, "*o_proj*": fqt.MXFP4, "lm_head*": fqt.INT8}
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config)
    about = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert about["format"] == "mixed-precision"
    assert [group["targets"][0] for group in about["config_groups"].values()] == [
        r"re:^model\.layers\.0\.self_attn\.o_proj$",
        r"re:^model\.layers\.0\.mlp\.experts\.\d+\.gate_proj$",
        r"re:^model\.layers\.1\.mlp\.experts\.\d+\.gate_proj$",
        r"re:^lm_head$",
    ]
    assert_equal(decompressed(tmp_path / "a"), in_files(fq.fakequant(params, state), model.config.to_dict()))


def test_tied_embeddings_are_written_once(tmp_path):
    """A head that is the embedding is not in the files, as in transformers', and loads."""
    model, params = build(tie_word_embeddings=True)
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, fqt.FP8, model.config)
    assert "lm_head.weight" not in read(tmp_path / "a")
    # To a reader it is a Linear that is in no file: unless told, transformers gives it scales at random.
    about = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in about["ignore"]
    fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        weights = {name: w for name, w in fq.fakequant(params, state).items() if name != "lm_head.weight"}
        wanted = functional_call(model, weights, (TOKENS,)).logits
        assert torch.equal(loaded(TOKENS).logits, wanted)


def test_a_global_scale_without_a_reciprocal_is_refused(tmp_path):
    """Readers divide by what files hold, which would be infinite, and the weights zero."""
    model, params = build()
    params = {name: p.float() * 1e-37 if ".experts." in name else p for name, p in params.items()}
    with pytest.raises(ValueError) as caught:
        exported(to_compressed_tensors, tmp_path / "a", params, fqt.NVFP4, model.config)
    assert_names(str(caught.value), "gate_up_proj", "no reciprocal", "wanted 0 or a larger one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("engine", "call"), [("tqdm", "export"), ("tqdm", "folder"), ("compressed_tensors", "folder")])
def test_a_missing_engine_is_named(engine, call, tmp_path, monkeypatch):
    """The error names the extra, and nothing is written."""
    model, params = build()
    fq, state = exported(to_compressed_tensors, tmp_path / "a", params, fqt.FP8, model.config)
    for module in [engine, *(m for m in sys.modules if m.startswith(f"{engine}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    calls = {
        "export": lambda: fqt.export.save(tmp_path / "b", fq, params, state, config=model.config),
        "folder": lambda: fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain"),
    }
    with pytest.raises(ImportError, match=r"pip install 'fq_transforms\[export\]'"):
        calls[call]()
    assert not (tmp_path / "b").exists()


def test_what_weights_cannot_say_is_refused_when_read(tmp_path):
    """A rotation, another part of a module: each would silently be lost."""
    model, params = build()
    exported(to_compressed_tensors, tmp_path / "a", params, fqt.FP8, model.config)
    tensors, config = read(tmp_path / "a"), json.loads((tmp_path / "a" / "config.json").read_text())
    about = config["quantization_config"]
    module = next(n for n in tensors if n.endswith("weight_scale")).removesuffix(".weight_scale")
    for change, more, fragment in [
        ({"transform_config": {"config_groups": {"u": 1}}}, {}, "transform_config"),
        ({}, {f"{module}.weight_g_idx": torch.ones(2)}, "weight_g_idx"),
    ]:
        folder = tmp_path / fragment
        write(folder, tensors | more, {"config.json": config | {"quantization_config": about | change}})
        with pytest.raises(ValueError, match=fragment):
            fqt.export.folder(folder, tmp_path / "b", layout="plain")
    assert not (tmp_path / "b").exists()


def test_damaged_folders_are_refused_when_read(tmp_path):
    """A file that is missing, a name that is not there, a module without its codes."""
    model, params = build()
    exported(to_compressed_tensors, tmp_path / "a", params, fqt.NVFP4, model.config, max_shard_size="200KB")
    first = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=first.name):
        fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    first.write_bytes(content)
    index = tmp_path / "a" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("0.down_proj.weight_packed", "0.down_proj.weight_lost"))
    with pytest.raises(ValueError, match="weight_lost"):
        fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    index.write_text(text)
    tensors = read(tmp_path / "a")
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight_packed"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write(tmp_path / "c", tensors, {"config.json": config})
    with pytest.raises(ValueError) as caught:
        fqt.export.folder(tmp_path / "c", tmp_path / "b", layout="plain")
    assert_names(str(caught.value), "model.layers.1.mlp.experts.0.up_proj", "weight_packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
