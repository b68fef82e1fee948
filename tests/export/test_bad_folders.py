"""Folders that are damaged, or contradict themselves: an error that says what and where, before the first byte."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fq_transforms as fqt
from fq_transforms.export.files import shards
from fq_transforms.export.layouts import plan
from fq_transforms.export.names.accounted import check_config
from fq_transforms.export.streaming import run
from tests.cases import assert_names
from tests.classes import classes
from tests.export import models
from tests.export.models import assert_same_bytes, read
from tests.export.sources import BLOCK, CONFIG, EXPERTS, HIDDEN, INNER, MODULES, STACKS, plain, weights, write
from tests.export.test_sources import DEEPSEEK, OF_NVFP4, gpt_oss, in_codes, nvfp4_of_modelopt
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

RULES = {"*.experts.*": fqt.NVFP4}
INDEX, FIRST, SECOND = "model.safetensors.index.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
DOWN = f"{BLOCK}.experts.2.down_proj.weight"


def model():
    return plain() | {f"{module}.weight": weight for module, weight in weights().items()}


def refused(parent, source, *said, rules=RULES, error=ValueError, target=None, **options):
    """An error with all that is said, and nothing new beside the source."""
    before = sorted(parent.rglob("*"))
    with pytest.raises(error) as caught:
        fqt.export.folder(source, target or parent / "b", rules, **options)
    assert_names(str(caught.value), *said)
    assert sorted(parent.rglob("*")) == before
    return str(caught.value)


def index(change):
    """Change what the index says."""

    def of(folder):
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return of


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def other(name, content=b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def cut(size):
    """Cut the second shard to a size, or by a number of bytes from its end."""
    return lambda folder: os.truncate(folder / SECOND, size if size >= 0 else (folder / SECOND).stat().st_size + size)


def twice(folder):
    """The first tensor of the first shard in the second one, too; the index fits one of them."""
    first, second = load_file(folder / FIRST), load_file(folder / SECOND)
    save_file(second | dict(list(first.items())[:1]), folder / SECOND)


def in_the_second(folder):
    """The same, and the index says that it is there."""
    twice(folder)
    name = next(iter(load_file(folder / FIRST)))
    index(lambda document: document["weight_map"].update({name: SECOND}))(folder)


def huge_header(folder):
    with (folder / SECOND).open("wb") as stream:
        stream.write((2**40).to_bytes(8, "little"))
        stream.truncate(2**41)  # sparse


DAMAGED = {
    "no safetensors": (without(INDEX, FIRST, SECOND), ["found no checkpoint", "model.safetensors"]),
    "pickles": (
        lambda folder: [without(INDEX, FIRST, SECOND)(folder), other("pytorch_model.bin")(folder)],
        ["pytorch_model.bin", "not read"],
    ),
    "no config": (without("config.json"), ["no 'config.json'"]),
    "a shard is missing": (without(SECOND), [SECOND, INDEX, "wanted all shards"]),
    "a shard is empty": (cut(0), [SECOND, "damaged"]),
    "a shard without its header": (cut(4), [SECOND, "damaged"]),
    "a shard with a part of its header": (cut(100), [SECOND, "damaged"]),
    "a shard with a part of its tensors": (cut(-10), [SECOND, "damaged"]),
    "a shard with more than its tensors": (
        lambda folder: (folder / SECOND).open("ab").write(b"x"),
        [SECOND, "damaged"],
    ),
    "a header beyond all files": (huge_header, [SECOND, "damaged"]),
    "no index": (without(INDEX), [FIRST, "without an index"]),
    "a shard that the index lacks": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "model-00003-of-00003.safetensors"),
        ["model-00003-of-00003", "does not name"],
    ),
    "shards of which one is called the only one": (
        lambda folder: [(folder / FIRST).rename(folder / "model.safetensors"), (folder / INDEX).unlink()],
        [SECOND],
    ),
    "a tensor that is in no file": (index(lambda d: d["weight_map"].update({"x.y": FIRST})), ["'x.y'", "no file"]),
    "a tensor that the index lacks": (index(lambda d: d["weight_map"].pop(DOWN)), [DOWN, "does not name it"]),
    "a tensor in another shard": (
        index(lambda d: d["weight_map"].update({DOWN: FIRST if d["weight_map"][DOWN] == SECOND else SECOND})),
        [DOWN, FIRST, SECOND],
    ),
    "a tensor in two shards": (twice, ["lm_head.weight", FIRST, SECOND, "once"]),
    "a tensor in two shards, of which the index names one": (in_the_second, ["lm_head.weight", FIRST, SECOND, "once"]),
    "a shard of another directory": (index(lambda d: d["weight_map"].update({DOWN: "../x.safetensors"})), ["../x"]),
    "a shard by no name": (index(lambda d: d["weight_map"].update({DOWN: "\0.safetensors"})), ["0.safetensors"]),
    "a shard of no safetensors": (index(lambda d: d["weight_map"].update({DOWN: "a.bin"})), ["'a.bin'", "wanted"]),
    "an index of nothing": (index(lambda d: d.clear()), ["weight_map"]),
    "an index that is no JSON": (other(INDEX), [INDEX, "no JSON"]),
    "a config that is no JSON": (other("config.json"), ["config.json", "no JSON"]),
    "a config that is a list": (other("config.json", b"[]"), ["config.json", "an object"]),
    "a link to nothing": (lambda folder: (folder / "merges.txt").symlink_to("/no/such/file"), ["merges.txt", "link"]),
    "a pipe for a shard": (lambda folder: [(folder / SECOND).unlink(), os.mkfifo(folder / SECOND)], [SECOND, "pipe"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused(name, tmp_path):
    """What, and where; nothing is written."""
    damage, said = DAMAGED[name]
    source = write(tmp_path / "a", model(), shards=2)
    damage(source)
    refused(tmp_path, source, *said, "found", "wanted")


@pytest.mark.parametrize("name", ["model (1).safetensors", "ö,ü\n.safetensors", "...safetensors"])
def test_a_shard_may_have_any_name_in_its_directory(name, tmp_path):
    """Law: the name of a shard changes nothing."""
    source = write(tmp_path / "a", model(), shards=2)
    fqt.export.folder(source, tmp_path / "b", RULES)
    (source / SECOND).rename(source / name)
    (source / INDEX).write_text((source / INDEX).read_text().replace(f'"{SECOND}"', json.dumps(name)))
    fqt.export.folder(source, tmp_path / "c", RULES)
    assert_same_bytes(read(tmp_path / "c"), read(tmp_path / "b"))


def test_paths_that_are_no_folders(tmp_path):
    """No source, a file in its place, and targets that are taken or lie within the source."""
    source = write(tmp_path / "a", model())
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    refused(tmp_path, tmp_path / "none", "none", "found nothing", "wanted")
    refused(tmp_path, tmp_path / "file", "file", "found a file", "wanted")
    for target in (tmp_path / "taken", tmp_path / "file"):
        refused(tmp_path, source, target.name, "found a", "wanted a new name", target=target)
    for target in (source, source / "b", source / "b" / "c", tmp_path / "x" / ".." / "a" / "b"):
        refused(tmp_path, source, "within src", "wanted another", target=target)


def test_other_files_are_copied_and_other_weights_named(tmp_path):
    """A tokenizer, code and linked directories with their bytes; other forms of weights are left out, and named."""
    source = write(tmp_path / "a", model())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("x")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "x.txt")
    (source / "modeling.py").write_text("raise SystemExit")
    save_file({"x": torch.ones(1)}, source / "consolidated.safetensors")
    (source / "2_Dense").mkdir()
    save_file({"x": torch.ones(1)}, source / "2_Dense" / "model.safetensors")
    (source / "voices").mkdir()
    (source / "voices" / "a.pt").write_text("x")
    made = fqt.export.folder(source, tmp_path / "b", RULES)
    names = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "linked/x.txt", "tokenizer.json", "modeling.py"}
    assert not any(path.is_symlink() for path in (tmp_path / "b").rglob("*"))
    others = ["consolidated.safetensors", "2_Dense/model.safetensors", "voices/a.pt"]
    assert list(made.left) == list(fqt.export.inspect(source).left) == others
    assert "left out: 3 tensors such as 'consolidated.safetensors'" in str(made)


TOO_WIDE = {
    "hidden_size": ({"hidden_size": HIDDEN + 16}, ["weight'", "hidden_size", str(HIDDEN + 16)]),
    "moe_intermediate_size": ({"moe_intermediate_size": 64}, ["experts", "moe_intermediate_size", "64"]),
    "intermediate_size": (
        {"moe_intermediate_size": None, "intermediate_size": 64},
        ["experts", "intermediate_size", "64"],
    ),
    "vocab_size": ({"vocab_size": 40}, ["weight'", "vocab_size", "40"]),
    "num_experts": ({"num_experts": 4}, ["experts", "num_experts", "wanted 4"]),
    "num_hidden_layers": ({"num_hidden_layers": 2}, ["no layer 1", "num_hidden_layers"]),
}


@pytest.mark.parametrize("of", ["a folder", "a model"])
@pytest.mark.parametrize("name", TOO_WIDE)
def test_a_config_that_contradicts_shapes_is_refused(name, of, tmp_path):
    """The config of another model: which number, which tensor; of `save` as of `folder`."""
    change, said = TOO_WIDE[name]
    config = CONFIG | {"model_type": "own", "architectures": ["OwnForCausalLM"]} | change
    if of == "a folder":
        refused(tmp_path, write(tmp_path / "a", model(), config=config), *said, "found", "wanted")
        return
    fq = fqt.transform(fqt.select(model(), RULES))
    state = fqt.tie(fq.calibrate(model()), [("gate_proj", "up_proj")])
    with pytest.raises(ValueError) as caught:
        fqt.export.save(tmp_path / "b", fq, model(), state, config=config)
    assert_names(str(caught.value), *said, "found", "wanted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"hidden_size": 512}, {"intermediate_size": 64}, {"num_local_experts": 2}])
def test_a_config_that_contradicts_stacks_is_refused(change, tmp_path):
    """Of gpt-oss, whose matrices are transposed, gate and up in one; selected or not."""
    tensors, _, about = gpt_oss()
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    source = write(tmp_path / "a", tensors, about, config=config | change)
    key = next(iter(change))
    for rules in (RULES, None):
        refused(tmp_path, source, "experts", key, "found", "wanted", layout="plain", rules=rules)
    fqt.export.folder(write(tmp_path / "good", tensors, about, config=config), tmp_path / "b", RULES, layout="plain")


def test_experts_of_another_width_than_the_model_are_right(tmp_path):
    """Nemotron's latent experts, shared ones of their own width, and dense layers beside sparse ones."""
    shapes = {
        f"{BLOCK}.experts.{e}.{r}": s
        for e in range(EXPERTS)
        for r, s in (("up_proj", (128, 64)), ("down_proj", (64, 128)))
    }
    shapes |= {f"{BLOCK}.shared_experts.up_proj": (320, HIDDEN), f"{BLOCK}.shared_experts.down_proj": (HIDDEN, 320)}
    tensors = {f"{module}.weight": weight for module, weight in weights(shapes).items()}
    config = CONFIG | {"moe_latent_size": 64, "intermediate_size": 512}
    fqt.export.folder(write(tmp_path / "a", plain() | tensors, config=config), tmp_path / "b", RULES)
    refused(tmp_path, write(tmp_path / "c", plain() | tensors), "experts", "hidden_size", target=tmp_path / "d")


ALL_CLASSES = (
    classes() if FULL else ["Qwen3MoeForCausalLM", "NemotronHForCausalLM", "MuseSparkForConditionalGeneration"]
)


@pytest.mark.parametrize("name", ALL_CLASSES)
def test_no_class_contradicts_its_own_config(name):
    """Every class of transformers that has experts, at its own widths, by the names of its files and in memory."""
    from tests.class_tables import model_of

    built = model_of(name)
    config, params = built.config.to_dict() | {"architectures": [name]}, built.state_dict()
    check_config(plan._sources(params, (), {}, config, is_folder=True), config)
    try:
        sources = plan._sources(params, (), {}, config | {"tie_word_embeddings": False})
    except ValueError:
        return  # its names in files are not known: tests of families say so
    check_config(sources, config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", ["modules", "a stack", "codes of modules", "codes of a stack", "not selected"])
def test_what_is_not_finite_is_named(value, stored, tmp_path):
    """The tensor, and of a stack the expert, whether rules select it or it is only made plain; nothing is left."""
    name, said, rules = DOWN, [DOWN], {"*.experts.*": fqt.MXFP4}
    tensors, about, config = model(), None, CONFIG
    if stored == "modules":
        tensors[DOWN] = tensors[DOWN].clone()
        tensors[DOWN][-1, 3] = value
    elif stored == "a stack":
        shapes = {"gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INNER)}
        tensors = plain() | {f"{BLOCK}.experts.{key}": weight for key, weight in weights(shapes).items()}
        name = f"{BLOCK}.experts.down_proj"
        tensors[name][2, 5, 3] = value
        said = [name, "expert 2"]
    elif stored == "codes of a stack":
        shapes = {f"{BLOCK}.experts.{key}": shape for key, shape in STACKS.items()}
        tensors = plain() | {key: weight.to(torch.float8_e4m3fn) for key, weight in weights(shapes).items()}
        tensors |= {
            f"{key}_scale_inv": torch.ones(EXPERTS, 2, 2)[:, : -(-a // 128), : -(-b // 128)]
            for key, (_, a, b) in shapes.items()
        }
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        name, about = f"{BLOCK}.experts.down_proj", DEEPSEEK
        tensors[f"{name}_scale_inv"][1, 0, 1] = value
        said = [name, "expert 1"]
    else:
        tensors, _, about = in_codes("FP8", dtype=torch.float32)
        tensors = plain() | tensors
        tensors[f"{DOWN}_scale"][0] = value
        rules = {f"{BLOCK}.experts.*.up_proj.weight": fqt.FP8_PER_CHANNEL} if stored == "not selected" else rules
    source = write(tmp_path / "a", tensors, about, config=config)
    refused(tmp_path, source, *said, "found NaN or infinity", "wanted finite", rules=rules, layout="plain")


def test_nan_codes_are_named(tmp_path):
    """E4M3 has a code for NaN, and E8M0 has one."""
    tensors, _, about = in_codes("FP8")
    tensors[DOWN].view(torch.uint8)[1, 1] = 0x7F
    refused(tmp_path, write(tmp_path / "a", plain() | tensors, about), DOWN, "NaN", rules=None, layout="plain")
    tensors, _, about = gpt_oss()
    name = f"{BLOCK}.experts.gate_up_proj"
    tensors[f"{name}_scales"][1, 2, 3] = 255
    source = write(tmp_path / "c", tensors, about)
    refused(tmp_path, source, name, "expert 1", "NaN", rules=None, layout="plain")


def test_what_is_copied_may_be_anything(tmp_path):
    """Law: what rules do not select keeps its bytes, NaN and infinity too."""
    tensors = model()
    tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), -float("inf")])
    fqt.export.folder(write(tmp_path / "a", tensors), tmp_path / "b", RULES)
    found = {name: tensor for name, tensor in read(tmp_path / "b").items() if name in plain()}
    assert_same_bytes(found, {name: tensors[name] for name in plain()})


def _of_ct(name):
    return lambda: (in_codes(name)[0], in_codes(name)[2])


SOURCES = {
    "compressed-tensors' NVFP4": _of_ct("NVFP4"),
    "compressed-tensors' FP8": _of_ct("FP8 in blocks"),
    "compressed-tensors' INT4": _of_ct("INT4 in groups of 32"),
    "ModelOpt's NVFP4": lambda: (nvfp4_of_modelopt()[0], OF_NVFP4),
    "DeepSeek's FP8": lambda: (
        {f"{m}.weight": torch.ones(s).to(torch.float8_e4m3fn) for m, s in MODULES.items()}
        | {f"{m}.weight_scale_inv": torch.ones(-(-s[0] // 128), -(-s[1] // 128)) for m, s in MODULES.items()},
        DEEPSEEK,
    ),
    "gpt-oss's MXFP4": lambda: (gpt_oss()[0], gpt_oss()[2]),
}
PARTS = {
    "compressed-tensors' NVFP4": (".weight_packed", ".weight_scale", ".weight_global_scale"),
    "compressed-tensors' FP8": (".weight", ".weight_scale"),
    "compressed-tensors' INT4": (".weight_packed", ".weight_scale", ".weight_shape"),
    "ModelOpt's NVFP4": (".weight", ".weight_scale", ".weight_scale_2"),
    "DeepSeek's FP8": (".weight", ".weight_scale_inv"),
    "gpt-oss's MXFP4": ("_blocks", "_scales"),
}


@pytest.mark.parametrize(("source", "end"), [(source, end) for source, ends in PARTS.items() for end in ends])
def test_a_part_that_is_missing_for_some_is_named(source, end, tmp_path):
    """Law: codes without scales, and scales without codes, are never copied as if they were weights."""
    tensors, about = SOURCES[source]()
    name = next(name for name in tensors if name.endswith(end))
    del tensors[name]
    folder = write(tmp_path / "a", plain() | tensors, about)
    refused(tmp_path, folder, name.removesuffix(end), "found", "wanted", rules=None, layout="plain")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("change", ["a row less", "a column less", "turned", "another dtype", "an axis more"])
def test_a_part_that_does_not_fit_is_named(source, change, tmp_path):
    """Law: of each part another shape or dtype is refused before the first byte; nothing is broadcast or cut."""
    tensors, about = SOURCES[source]()
    prefix = f"{BLOCK}.experts."
    first = f"{prefix}1.down_proj." if f"{prefix}1.down_proj.weight_scale" in tensors else ""
    names = [name for name in tensors if name.startswith(first or prefix) and not name.endswith("_bias")]
    changes = {
        "a row less": lambda t: t.view(torch.uint8)[:-1].view(t.dtype) if t.dim() > 1 else t,
        "a column less": lambda t: t.view(torch.uint8)[..., : -t.element_size()].view(t.dtype) if t.dim() > 1 else t,
        "turned": lambda t: (
            t.view(torch.uint8).mT.contiguous().view(t.dtype) if t.dim() > 1 and t.element_size() == 1 else t
        ),
        "another dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.int16),
        "an axis more": lambda t: t[None, None],
    }
    tried = 0
    for n, name in enumerate(names[:8]):
        changed = changes[change](tensors[name]).contiguous()
        if changed.shape == tensors[name].shape and changed.dtype == tensors[name].dtype:
            continue
        folder = write(tmp_path / f"{n}", plain() | tensors | {name: changed}, about)
        refused(tmp_path, folder, name.rpartition(".")[0], "found", "wanted", rules=None, layout="plain")
        tried += 1
    assert tried or change == "turned"


HOSTILE = {
    "a list": [1],
    "an empty list": [],
    "a number": 3,
    "a text": "fp8",
    "a method that is a list": {"quant_method": ["fp8"]},
    "a method that is none": {"quant_method": None},
    "a block that is a text": DEEPSEEK | {"weight_block_size": "128"},
    "a block of 0": DEEPSEEK | {"weight_block_size": [0, 128]},
    "a block of one side": DEEPSEEK | {"weight_block_size": [128]},
    "a block of true": DEEPSEEK | {"weight_block_size": [True, True]},
    "no groups": {"quant_method": "compressed-tensors"},
    "empty groups": {"quant_method": "compressed-tensors", "config_groups": {}},
    "groups in a list": {"quant_method": "compressed-tensors", "config_groups": [{}]},
    "a group that is a list": {"quant_method": "compressed-tensors", "config_groups": {"a": []}},
    "groups within groups": {"quant_method": "compressed-tensors", "config_groups": {"a": {"b": {"c": {}}}}},
    "a format that is a file": {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"targets": ["Linear"], "format": "evil.py:Compressor"}},
    },
    "another spelling": {"quant_method": "fp-8"},
    "a group without weights": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"a": {"targets": ["Linear"], "weights": None}},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused(name, tmp_path):
    """Whatever stands where it should say how the folder is quantized; and near spellings are named."""
    tensors = model() | ({f"{DOWN}_scale": torch.ones(1)} if name == "a group without weights" else {})
    source = write(tmp_path / "a", tensors, config=CONFIG | {"quantization_config": HOSTILE[name]})
    said = refused(tmp_path, source, str(source), "found", "wanted", rules=None, layout="plain")
    assert ("did you mean 'fp8'" in said) == (name == "another spelling")


def test_patterns_that_never_end_are_stopped(tmp_path, monkeypatch):
    """A regular expression that comes with the files has so many seconds, and no more."""
    from fq_transforms.export.layouts import compressed_tensors

    monkeypatch.setattr(compressed_tensors, "MOST_SECONDS", 1)
    tensors, _, about = in_codes("FP8", {"a" * 40 + "b": (16, 16)})
    about["config_groups"]["group_0"]["targets"] = ["re:^(a|a)+$"]
    source = write(tmp_path / "a", tensors, about)
    refused(tmp_path, source, "config_groups", "seconds", "wanted", rules=None, layout="plain")


def test_codes_that_config_does_not_explain_are_refused(tmp_path):
    """Their config was lost, or says another method: they would be copied as if they were weights."""
    for name, make in SOURCES.items():
        tensors, about = make()
        for method in (None, "mxfp4" if about["quant_method"] != "mxfp4" else "fp8"):
            source = write(tmp_path / f"{name}-{method}", plain() | tensors, method and {"quant_method": method})
            refused(tmp_path, source, "tensor", "found", "wanted", rules=None, layout="plain")


def test_the_largest_blocks_that_fit_are_named(tmp_path):
    """Which tensor, which block, and formats of the same element; of none another element."""
    config = {key: value for key, value in CONFIG.items() if "size" not in key}
    for width, format, wanted in [
        (192, fqt.INT4_BLOCK128, "INT4_BLOCK32"),
        (48, fqt.MXFP4, "NVFP4"),
        (120, fqt.NVFP4, "another element"),
        (72, fqt.MXFP8, "FP8_BLOCK"),
    ]:
        tensors = {f"{BLOCK}.experts.{e}.up_proj.weight": torch.randn(32, width).bfloat16() for e in range(EXPERTS)}
        source = write(tmp_path / f"{width}", tensors, config=config)
        said = [f"{BLOCK}.experts.0.up_proj.weight", str(width), f"multiple of {format.block[1]}", format.name, wanted]
        refused(tmp_path, source, *said, rules={"*.experts.*": format})


def test_the_rule_that_an_error_advises_is_taken(tmp_path):
    """Law: of experts, one role of which no block divides, files of codes want the other roles left out too."""
    tensors = {f"{BLOCK}.experts.{e}.up_proj.weight": torch.randn(24, HIDDEN).bfloat16() for e in range(EXPERTS)}
    tensors |= {f"{BLOCK}.experts.{e}.down_proj.weight": torch.randn(HIDDEN, 24).bfloat16() for e in range(EXPERTS)}
    config = {key: value for key, value in CONFIG.items() if "size" not in key}
    source = write(tmp_path / "a", plain() | tensors, config=config)
    rules = {"*.experts.*": fqt.NVFP4, "lm_head.weight": fqt.NVFP4}
    said = refused(tmp_path, source, "down_proj", rules=rules)
    one, every = re.findall(r"'(\S+)': None", said)
    fqt.export.folder(source, tmp_path / "b", rules | {one: None}, layout="plain")
    fqt.export.folder(source, tmp_path / "c", rules | {every: None})


def test_weights_of_several_dtypes_are_refused(tmp_path):
    """config.json has room for one. Kills advice of an argument that `folder` lacks."""
    source = write(
        tmp_path / "a", model() | {DOWN.replace(".2.", f".{e}."): torch.randn(HIDDEN, INNER) for e in range(EXPERTS)}
    )
    said = refused(tmp_path, source, "float32", "bfloat16", "wanted one dtype", "select those of one", layout="plain")
    assert "out_dtype" not in said
    fqt.export.folder(source, tmp_path / "b", {"*.experts.*": fqt.NVFP4, "*.down_proj.*": None}, layout="plain")


def test_a_rule_that_matches_nothing_names_the_nearest(tmp_path):
    """By spelling, whatever the numbers: what was meant stands first."""
    source = write(tmp_path / "a", model())
    for pattern, meant in [
        ("*.expert.*", ".experts."),
        ("lm_haed*", "lm_head.weight"),
        ("model.embed.weight", "model.embed_tokens.weight"),
    ]:
        said = refused(tmp_path, source, repr(pattern), "found", rules={pattern: fqt.NVFP4})
        assert meant in said.partition("such as")[2].partition(",")[0]


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    """Bytes that are free, and that are wanted."""
    source = write(tmp_path / "a", model())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(tmp_path, source, "1,000 free bytes", "wanted", "nothing was written", error=OSError)


@pytest.mark.parametrize("place", ["weights", "copies", "documents"])
def test_a_disk_that_fills_in_the_middle_leaves_nothing(place, tmp_path, monkeypatch):
    """The system's error, and no part of a folder."""
    source = write(tmp_path / "a", model())
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if place == "documents" or len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    owner, name = {
        "weights": (shards, "_write"),
        "copies": (shards, "_copy"),
        "documents": (run, "write_json"),
    }[place]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    refused(tmp_path, source, os.strerror(errno.ENOSPC), error=OSError)
    assert calls


def test_a_plain_weight_beside_its_codes_is_refused(tmp_path):
    """One of the two would be lost."""
    params = {f"layers.0.mlp.experts.{e}.up_proj.weight": torch.ones(16, 32).bfloat16() for e in range(2)}
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "dtype": "bfloat16"}
    models.write(tmp_path / "plain", params, {"config.json": config})
    fqt.export.folder(tmp_path / "plain", tmp_path / "codes", {"*": fqt.NVFP4})
    documents = {"config.json": json.loads((tmp_path / "codes" / "config.json").read_text())}
    models.write(tmp_path / "both", read(tmp_path / "codes") | dict(list(params.items())[:1]), documents)
    with pytest.raises(ValueError, match=r"experts.0.up_proj'.*found 'weight'"):
        fqt.export.folder(tmp_path / "both", tmp_path / "dst", layout="plain")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("about", [None, [], "FP8"])
def test_what_hf_quant_config_says_is_an_object(about, tmp_path):
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "dtype": "bfloat16"}
    models.write(
        tmp_path / "src",
        {"w": torch.ones(2, 2)},
        {"config.json": config, "hf_quant_config.json": {"quantization": about}},
    )
    with pytest.raises(ValueError, match="hf_quant_config.json"):
        fqt.export.folder(tmp_path / "src", tmp_path / "dst", layout="plain")


def test_an_index_that_names_nothing_is_refused(tmp_path):
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "dtype": "bfloat16"}
    models.write(
        tmp_path / "src",
        {"w": torch.ones(2, 2)},
        {"config.json": config, "model.safetensors.index.json": {"weight_map": {}}},
    )
    with pytest.raises(ValueError, match="empty weight_map"):
        fqt.export.folder(tmp_path / "src", tmp_path / "dst", layout="plain")
