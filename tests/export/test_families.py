"""The law of names: those of every model of experts are what transformers' own `save_pretrained` writes."""

import copy
import sys

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.layouts import plan
from fq_transforms.export.names import accounted, families
from fq_transforms.export.names.accounted import check_accounted
from tests.cases import assert_names
from tests.classes import OWN, classes, smaller
from tests.export.models import assert_same_bytes, read, transformers
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

COLUMNS = 32
# Classes whose files hold a parameter otherwise than by its rows: that parameter, and what the error says of it.
REFUSED = {
    "Ernie4_5_VLMoeForConditionalGeneration": ("text_moe.gate.weight", "not rows of it"),
    "Ernie4_5_VL_MoeForConditionalGeneration": ("text_moe.gate.weight", "not rows of it"),
    "Step3p7ForConditionalGeneration": ("self_attn.k_proj.weight", "together in files"),
    "UnlimitedOcrForConditionalGeneration": ("self_attn.k_proj.weight", "together in files"),
    "InklingForConditionalGeneration": ("experts.gate_up_proj", "not rows of it"),
    "Inkling2ForCausalLM": ("experts.gate_up_proj", "not rows of it"),
    "Inkling2ForConditionalGeneration": ("experts.gate_up_proj", "not rows of it"),
}
# Classes whose files hold all experts of a layer in one tensor.
ONE_TENSOR = {
    *("AriaTextForCausalLM", "AriaForConditionalGeneration", "DbrxForCausalLM", "Gemma4ForCausalLM"),
    *("Gemma4ForConditionalGeneration", "GptOssForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM"),
    *("GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "HYV4ForCausalLM", "InklingForCausalLM"),
    *("JetMoeForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration", "MiniMaxM3VLForCausalLM"),
    *("Mistral4ForCausalLM", "MuseSparkForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    "ZayaForCausalLM",
}
DEFAULT = [
    *("MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM"),
    *("NemotronHForCausalLM", "JambaForCausalLM", "GraniteMoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"),
    "Ernie4_5_VLMoeForConditionalGeneration",
]


def built(name):
    """A model of a class, its matrices cut to a few columns, and its config."""
    cls = getattr(transformers, name)
    entries = smaller(cls.config_class(**OWN.get(name, {})).to_dict()) | {"architectures": [name]}
    model = families.model_of(entries)
    model.tie_weights()
    generator, drawn = torch.Generator().manual_seed(0), {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        shape = (*tensor.shape[:-1], COLUMNS) if 1 < tensor.dim() < 4 else tensor.shape
        if id(tensor) not in drawn:  # tied ones stay tied
            drawn[id(tensor)] = torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
        owner, _, last = key.rpartition(".")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(model.get_submodule(owner), last, drawn[id(tensor)] if is_parameter else drawn[id(tensor)].data)
    return model, entries


def planned(params, entries):
    """What an export without a group writes."""
    sources = plan._sources(params, (), {}, entries)
    check_accounted(sources)
    whole = plan.ExportPlan(params, {}, sources, {}, entries, torch.bfloat16)
    return {name: tensor for source in sources for name, tensor in plan.tensors_of(whole, source, None)}


def without_ties(found, model):
    """Without what is tied to another name and written beside it: an encoder's embedding, say. Not so the head."""
    tied = {*model.all_tied_weights_keys} - {"lm_head.weight"}
    return {key: tensor for key, tensor in found.items() if key not in tied}


@pytest.mark.parametrize("name", classes() if FULL else DEFAULT)
def test_what_is_written_is_what_save_pretrained_writes(name, tmp_path):
    """Names, shapes and bytes, from names in memory and from those of files; or a refusal with the class's reason."""
    model, entries = built(name)
    params = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "theirs")
    theirs = read(tmp_path / "theirs")
    assert_same_bytes(planned(theirs, entries), theirs)
    if name in REFUSED:
        with pytest.raises(ValueError) as caught:
            planned(params, entries)
        assert_names(str(caught.value), *REFUSED[name], "found", "wanted", "revert_weight_conversion")
        return
    assert_same_bytes(without_ties(planned(params, entries), model), theirs)


@pytest.mark.parametrize("name", classes() if FULL else DEFAULT)
def test_quantized_experts_have_the_names_of_save_pretrained(name, tmp_path, monkeypatch):
    """Codes are where the weights would be, unless files have experts in one tensor; fake weights always are.

    They stand for `fakequant`'s weights, bit for bit: in compressed-tensors as its own decompressors read them.
    """
    model, entries = built(name)
    params = copy.deepcopy(model.state_dict())
    if name == "DbrxForCausalLM":
        with pytest.raises(ValueError, match="among experts, without the number of one"):
            fqt.select(params, {"*.experts.*": fqt.FP8_PER_CHANNEL})
        return
    # Matrices cut to a few columns show no layout themselves.
    whole = fqt.select(dict(families.model_of(entries).named_parameters()), {"*.experts.*": fqt.FP8_PER_CHANNEL})
    layouts = {group.key: group.transposed for group in whole.groups if group.stacked}
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.FP8_PER_CHANNEL}, transposed=layouts))
    state = fq.calibrate(params)
    monkeypatch.setattr(accounted, "_check_widths", lambda *_: None)  # config has those of the whole matrices

    def written(layout):
        fqt.export.save(tmp_path / layout, fq, params, state, config=entries, layout=layout)
        return without_ties(read(tmp_path / layout), model)

    if name in REFUSED:
        with pytest.raises(ValueError) as caught:
            written("plain")
        assert_names(str(caught.value), *REFUSED[name], "found", "wanted")
        return
    fakes = params | fq.fakequant(params, state)
    assert_same_bytes(written("plain"), without_ties(planned(fakes, entries), model))
    wanted = without_ties(planned(fakes, entries), model)
    for layout in ("compressed-tensors", "modelopt"):
        if name in ONE_TENSOR:
            with pytest.raises(ValueError) as caught:
                written(layout)
            assert_names(str(caught.value), "in files", "engines read codes", "found", "wanted", "layout='plain'")
            continue
        stored = written(layout)
        assert {key for key in stored if not key.endswith(".weight_scale")} == wanted.keys()
        if layout == "compressed-tensors":
            fqt.export.folder(tmp_path / layout, tmp_path / "decompressed", layout="plain")
            found = without_ties(read(tmp_path / "decompressed"), model)
        else:
            scales = {key: stored.get(f"{key}_scale") for key in wanted}
            found = {
                key: stored[key] if scale is None else (stored[key].float() * scale[:, None]).bfloat16()
                for key, scale in scales.items()
            }
        assert_same_bytes(found, wanted)


def test_a_transposed_stack_stays_as_it_is(tmp_path):
    """gpt-oss has its experts as [in, out] in files too: fake weights are written so, codes not at all."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 2, "head_dim": 16}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, architectures=["GptOssForCausalLM"]))
    params = model.state_dict()
    fq = fqt.transform(fqt.select(params, {"*.experts.*_proj": fqt.FP8_PER_CHANNEL}))
    state = fq.calibrate(params)
    assert all(group.transposed for group in fq.spec.groups)
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config, layout="plain")
    assert_same_bytes(read(tmp_path / "a"), params | fq.fakequant(params, state))
    with pytest.raises(ValueError) as caught:
        fqt.export.save(tmp_path / "b", fq, params, state, config=model.config)
    assert_names(str(caught.value), "found matrices stored [in, out]", "wanted [out, in]", "layout='plain'")


def test_without_transformers_names_are_not_guessed(monkeypatch):
    """Names that look like those of files may be others there."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as caught:
        families.model_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    assert_names(str(caught.value), "MixtralForCausalLM", "found", "wanted", "fq_transforms[export]")


def test_a_config_that_the_class_does_not_take():
    """What transformers says of it is in the error, with what was wanted."""
    config = {"model_type": "lfm2_moe", "architectures": ["Lfm2MoeForCausalLM"], "layer_types": None}
    with pytest.raises(ValueError) as caught:
        families.model_of(config)
    assert_names(str(caught.value), "Lfm2MoeForCausalLM", "NoneType", "found", "wanted")


class Reverted(torch.nn.Module):
    """A model whose one parameter transformers would make these tensors of."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)


FOUND = {
    "columns in another order": (lambda weight: {"a": weight.flip(1)}, "not rows of it"),
    "transposed": (lambda weight: {"a": weight.T}, "not rows of it"),
    "a row twice": (lambda weight: {"a": weight, "b": weight[:1]}, None),
    "nothing": (lambda weight: {}, "found [] for it"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_no_rows_is_not_taken_for_rows(name, monkeypatch):
    """Also of a square matrix, where shapes are alike; rows that are there twice are found by `check_accounted`."""
    revert, said = FOUND[name]
    monkeypatch.setattr(families, "_reverted", lambda _, tensors: revert(tensors["weight"]))
    files = families.files_of(Reverted(torch.ones(2, 2)), {})
    assert (said is None and len(files.tensors["weight"]) == 2) or said in files.refused["weight"]


def test_a_config_of_another_name_is_read_by_its_class():
    """Kimi's, which transformers reads as DeepSeek V3; one of another class of transformers is refused."""
    config = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1}
    assert type(families.model_of(config)).__name__ == "DeepseekV3ForCausalLM"
    with pytest.raises(ValueError, match="found the model_type 'mixtral'"):
        families.model_of(config | {"model_type": "mixtral"})


def test_names_do_not_depend_on_kernels_of_attention():
    """A config that asks for flash attention, which is not installed here, also within its parts."""
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1}
    asked = config | {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    assert families.model_of(asked).state_dict().keys() == families.model_of(config).state_dict().keys()


def test_a_head_is_tied_by_default_where_its_class_says_so():
    """Whether config spells it or not; of an unknown class only config says."""
    tied = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    assert families.is_tied(tied)
    assert not families.is_tied(tied | {"tie_word_embeddings": False})
    assert not families.is_tied({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    assert families.is_tied({"model_type": "x", "architectures": ["X"], "tie_word_embeddings": True})


@pytest.mark.parametrize("found", [5, True, {"a": 1}, [None], [5], [["Qwen3MoeForCausalLM"]], "MixtralForCausalLM"])
def test_architectures_are_names(found, tmp_path):
    """Anything else is a clear error, and so is the class of a config in place of a config."""
    params = {"mlp.experts.0.up_proj.weight": torch.ones(4, 16)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
    config = {"model_type": "mixtral", "architectures": found}
    with pytest.raises(ValueError, match="found architectures=.*, wanted a list of names"):
        fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), config=config)
    with pytest.raises(ValueError, match="config: found type, wanted model.config"):
        fqt.export.save(tmp_path / "a", fq, params, fq.calibrate(params), config=transformers.MixtralConfig)
    assert not list(tmp_path.iterdir())
