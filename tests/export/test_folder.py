"""Laws of `folder`: it writes what an export from memory writes, and what decodes to `fakequant`'s weights; whole."""

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fq_transforms as fqt
from fq_transforms import methods
from fq_transforms.export import folder
from fq_transforms.export.files.shards import ShardWriter
from fq_transforms.export.names.ties import FUSED_BY_ENGINES
from fq_transforms.export.streaming import job, run, stage
from fq_transforms.formats import IntElement
from fq_transforms.presets import weights_only
from tests.cases import assert_names
from tests.checkpoint.test_storage import forked, in_fresh_process
from tests.classes import classes, tiny
from tests.export.models import assert_equal, assert_same_bytes, build, read
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of what engines quantize besides, and of the libraries

EXPERTS_ONLY = "*.experts.*"
# Names of stacks that are not called experts, so that it must be said: what `folder` is given besides.
_GRANITE = "*.block_sparse_moe.*put_linear.weight", r".*\.block_sparse_moe\.\w+put_linear\.weight"
TOLD = {
    "GraniteMoeForCausalLM": _GRANITE,
    "GraniteMoeHybridForCausalLM": _GRANITE,
    "GraniteMoeSharedForCausalLM": _GRANITE,
    "Step3p7ForConditionalGeneration": ("*.moe.*_proj.weight", r".*\.moe\.\w+_proj\.weight"),
}
# Classes whose experts are not selected by one rule, and what the error says.
NOT_SELECTED = {
    "DbrxForCausalLM": ("ffn.experts.mlp.v1", "among experts, without the number of one"),
    "Ernie4_5_VLMoeForConditionalGeneration": ("layers.1.mlp.experts.*.down_proj", "of one shape and dtype"),
    "Ernie4_5_VL_MoeForConditionalGeneration": ("layers.1.mlp.experts.*.down_proj", "of one shape and dtype"),
}
# Classes whose files hold all experts of a layer in one tensor: codes of them are read by no engine.
ONE_TENSOR = {
    *("AriaTextForCausalLM", "AriaForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    *("GptOssForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeHybridForCausalLM"),
    *("GraniteMoeSharedForCausalLM", "HYV4ForCausalLM", "InklingForCausalLM", "InklingForConditionalGeneration"),
    *("Inkling2ForCausalLM", "Inkling2ForConditionalGeneration", "JetMoeForCausalLM", "Llama4ForCausalLM"),
    *("Llama4ForConditionalGeneration", "MiniMaxM3VLForCausalLM", "Mistral4ForCausalLM", "ZayaForCausalLM"),
    *("MuseSparkForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Step3p7ForConditionalGeneration"),
}
DEFAULT = [
    *("DeepseekV3ForCausalLM", "NemotronHForCausalLM", "GptOssForCausalLM"),
    *("GraniteMoeForCausalLM", "Qwen3VLMoeForConditionalGeneration", "DbrxForCausalLM"),
]
FORMATS = [fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.MXFP4]


@pytest.fixture(autouse=True)
def _few_pieces(monkeypatch):
    """Pieces of some experts, so that groups are cut."""
    monkeypatch.setattr(job, "PIECE_BYTES", 3 * 10**4)


def saved(name, path):
    """A folder that transformers wrote of a tiny model of a class, in several shards."""
    model, _ = tiny(name)
    model.bfloat16().save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def config_of(path):
    return json.loads((path / "config.json").read_text())


def files_of(path):
    """All files within a directory, and what they hold."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def tied(state):
    """The state with one number per expert for roles that engines fuse, found by their names."""
    found = dict(state)
    for key, roles in itertools.product(state, FUSED_BY_ENGINES):
        alike = [".".join(role if word == roles[0] else word for word in key.split(".")) for role in roles]
        keys = [one for one in alike if one in state] if roles[0] in key.split(".") else []
        for name, leaf in state[key].items():
            if leaf.dim() == 1:
                largest = torch.stack([state[one][name] for one in {key, *keys}]).amax(0)
                found |= {one: found[one] | {name: largest} for one in keys}
    return found


def in_memory(plain, rules, layout, **options):
    """The Transform and the state of a folder's plain weights, as `folder` makes them."""
    fq = fqt.transform(fqt.select(plain, rules, **options), layout=layout)
    return fq, tied(fq.calibrate(plain))


def assert_law(src, tmp_path, rules, layout, **options):
    """Decoded: fakequant's weights, and all else as it was. In files: what an export from memory writes."""
    plain = read(src)
    folder(src, tmp_path / "dst", rules, layout=layout, max_shard_size="100KB", jobs=2, **options)
    folder(tmp_path / "dst", tmp_path / "back", layout="plain")
    fq, state = in_memory(plain, rules, layout, **options)
    selected = {name for group in fq.spec.groups for name in group.names}
    fakes = fq.fakequant(plain, state)
    back = read(tmp_path / "back")
    # Integer codes cannot hold the sign of a zero.
    is_int = isinstance(fq.spec.groups[0].format.element, IntElement) and layout != "plain"
    (assert_equal if is_int else assert_same_bytes)(back, plain | fakes)
    assert any(not torch.equal(back[name], plain[name]) for name in selected)
    found = read(tmp_path / "dst")
    others = plain.keys() - selected
    assert_same_bytes({name: found[name] for name in others}, {name: plain[name] for name in others})
    fqt.export.save(tmp_path / "mem", fq, plain, state, config=config_of(src), layout=layout)
    assert_same_bytes(found, read(tmp_path / "mem"))
    assert config_of(tmp_path / "dst") == config_of(tmp_path / "mem")
    for name in ("dst", "back", "mem"):
        shutil.rmtree(tmp_path / name)


# Every class of transformers


@pytest.mark.parametrize("name", classes() if FULL else DEFAULT)
def test_every_class(name, tmp_path):
    """Experts in codes that an engine reads, or a refusal that names them; fake weights always."""
    src = saved(name, tmp_path / "src")
    before = files_of(src)
    pattern, experts = TOLD.get(name, (EXPERTS_ONLY, ()))
    options = {"experts": experts}
    for format in FORMATS if FULL else FORMATS[:2]:
        rules = {pattern: format}
        if name in NOT_SELECTED:
            with pytest.raises(ValueError) as caught:
                folder(src, tmp_path / "dst", rules)
            assert_names(str(caught.value), *NOT_SELECTED[name])
        elif name in ONE_TENSOR:
            with pytest.raises(ValueError) as caught:
                folder(src, tmp_path / "dst", rules, **options)
            assert_names(str(caught.value), pattern.strip("*").split("*")[0], "in files", "engines read codes")
            assert_names(str(caught.value), "found", "wanted", "layout='plain'")
            assert_law(src, tmp_path, rules, "plain", **options)
        else:
            assert_law(src, tmp_path, rules, "compressed-tensors")
    assert os.listdir(tmp_path) == ["src"]
    assert files_of(src) == before


# Classes of which a preset selects more than codes can be made of, and what the error says.
_STACK = "found the 3-D shape", "pass experts="
WHOLE_REFUSED = NOT_SELECTED | {
    "DeepseekV4ForCausalLM": ("attn.wo_a.weight", "multiple of 16"),
    "JetMoeForCausalLM": ("mlp.input_linear.weight", *_STACK),
    "KimiLinearForCausalLM": ("block_sparse_moe.gate_proj.weight", "let the rules treat them alike"),
    **{name: (pattern.split("*")[1], *_STACK) for name, (pattern, _) in TOLD.items()},
}


@pytest.mark.parametrize("name", classes() if FULL else ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_a_preset_of_a_whole_model(name, tmp_path):
    """Attention too: q, k and v share a global scale, wherever their weights lie."""
    rules = weights_only(fqt.presets.NVFP4_DEFAULT_CFG)
    src = saved(name, tmp_path / "src")
    if name in WHOLE_REFUSED or name in ONE_TENSOR:
        with pytest.raises(ValueError) as caught:
            folder(src, tmp_path / "dst", rules)
        assert_names(str(caught.value), *WHOLE_REFUSED.get(name, ("experts", "in files", "engines read codes")))
    if name not in WHOLE_REFUSED:
        assert_law(src, tmp_path, rules, "plain" if name in ONE_TENSOR else "compressed-tensors")


# Streamed


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of a tiny Qwen3-MoE whose every tensor has a file of its own, and what lies beside weights."""
    path = tmp_path_factory.mktemp("of") / "src"
    model, _ = build()
    model.save_pretrained(path.with_name("saved"))
    plain = read(path.with_name("saved"))
    names = sorted(plain, key=lambda name: name[::-1])
    write_folder(path, [{name: plain[name]} for name in names], config_of(path.with_name("saved")))
    (path / "tokenizer.json").write_text("{}")
    (path / "inference" / "deep").mkdir(parents=True)
    (path / "inference" / "deep" / "code.py").write_text("raise SystemExit")
    return path


RULES = weights_only(fqt.presets.NVFP4_DEFAULT_CFG)


def write_folder(path, shards, config):
    """A folder of these tensors, one dict a shard."""
    path.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, path / f"model-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


CONFIG = {"model_type": "mine", "architectures": ["MineForCausalLM"], "dtype": "bfloat16"}


def in_lists(roles, experts, shape=(32, 64), dtype=torch.bfloat16):
    """Weights of experts, no two of one magnitude."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.0.mlp.experts.{e}.{role}.weight": (torch.randn(shape, generator=generator) * 2.0 ** (e + i)).to(dtype)
        for i, role in enumerate(roles)
        for e in range(experts)
    }


@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
def test_tied_roles_of_different_shards(layout, source, tmp_path):
    """Gate, up, q, k and v, each in a file of its own, far from the others in name."""
    assert len(list(source.glob("*.safetensors"))) == len(read(source))
    assert_law(source, tmp_path, RULES, layout)


def test_roles_of_two_formats_are_not_tied(source, tmp_path):
    """Plain weights may be such, as no engine loads them: gate and up have scales of their own then."""
    rules = {EXPERTS_ONLY: fqt.FP8, "*.up_proj.weight": fqt.INT8}
    folder(source, tmp_path / "dst", rules, layout="plain")
    plain = read(source)
    fq = fqt.transform(fqt.select(plain, rules))
    assert len({group.format for group in fq.spec.groups}) == 2
    assert_same_bytes(read(tmp_path / "dst"), plain | fq.fakequant(plain, fq.calibrate(plain)))


METHODS = {
    "max": (methods.MAX, fqt.NVFP4_STATIC),
    "mse": (methods.Mse(), fqt.FP8_PER_CHANNEL),
    "mse blocks": (methods.Mse(), fqt.NVFP4_STATIC),
    "four over six": (methods.FourOverSix(), fqt.NVFP4_STATIC),
    "percentile": (methods.Percentile(99.0), fqt.FP8),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, source, tmp_path):
    """Of some experts at a time: what a search over all of them finds."""
    method, format = METHODS[name]
    folder(source, tmp_path / "dst", {EXPERTS_ONLY: format}, method=method, layout="plain")
    plain = read(source)
    fq = fqt.transform(fqt.select(plain, {EXPERTS_ONLY: format}), method=method)
    assert_same_bytes(read(tmp_path / "dst"), plain | fq.fakequant(plain, tied(fq.calibrate(plain))))


SIZES = [1, 100_000, 200_000, 2**40]


@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
def test_the_bytes_do_not_depend_on_pieces_and_threads(layout, source, tmp_path, monkeypatch):
    """Cut by every number of experts; 1, 2 and 8 threads."""
    files, cuts = [], set()
    for size in range(1, 450_000, 20_000) if FULL else SIZES:
        monkeypatch.setattr(job, "PIECE_BYTES", size)
        for jobs in (1, 2, 8) if FULL or size == SIZES[1] else (2,):
            dst = tmp_path / f"{size}-{jobs}"
            with monkeypatch.context() as patch:
                patch.setattr(run, "_fill", lambda job, *args: (cuts.add(len(job.pieces)), _fill(job, *args)))
                folder(source, dst, RULES, layout=layout, jobs=jobs, max_shard_size="100KB")
            files.append(files_of(dst))
            shutil.rmtree(dst)
    assert all(one == files[0] for one in files[1:])
    assert len(cuts) > 2, cuts


_fill = run._fill


@pytest.mark.parametrize("limit", [1, 1000, "20KB", "64 KiB", "1GB", "1TB"] if FULL else [1, "20KB", "1TB"])
def test_shards_of_any_size(limit, source, tmp_path):
    """The same tensors, no file larger than it may be but for one tensor, an index that names each."""
    folder(source, tmp_path / "dst", RULES, max_shard_size=limit)
    folder(source, tmp_path / "one", RULES)
    found = read(tmp_path / "dst")
    assert_same_bytes(found, read(tmp_path / "one"))
    most = fqt.export.files.directory.bytes_of(limit)
    shards = sorted((tmp_path / "dst").glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            names = list(opened.keys())
        assert len(names) == 1 or sum(found[name].nbytes for name in names) <= most, shard
    index = tmp_path / "dst" / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        document = json.loads(index.read_text())
        assert document["weight_map"].keys() == found.keys()
        assert document["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("experts", [1, 2, 7])
def test_few_and_many_experts(experts, format, tmp_path):
    """Also one that is alone, whose group is a list of one; more than ten come by number, not by letter."""
    tensors = in_lists(["gate_proj", "up_proj", "down_proj"], experts + 10 * (experts == 7))
    src = write_folder(tmp_path / "src", [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])], CONFIG)
    assert_law(src, tmp_path, {EXPERTS_ONLY: format}, "compressed-tensors")


ODD = {
    "e8m0": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "e5m2": torch.arange(3, dtype=torch.uint8).view(torch.float8_e5m2),
    "e4m3": torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "fnuz": torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fnuz),
    "i64": torch.arange(3),
    "i16": torch.arange(3, dtype=torch.int16),
    "u32": torch.arange(3, dtype=torch.int32).view(torch.uint32),
    "u64": torch.arange(3).view(torch.uint64),
    "bool": torch.tensor([True, False, True]),
    "c64": torch.ones(3, dtype=torch.complex64),
    "f64": torch.ones(1, 1, 1, dtype=torch.float64),
    "scalar": torch.tensor(3.0),
    "scalar.bool": torch.tensor(True),
    "empty": torch.empty(0),
    "empty.matrix": torch.empty(4, 0, dtype=torch.float64),
    "nan": torch.tensor([torch.nan, torch.inf]),
    "f4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "table": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "table.i8": torch.arange(12, dtype=torch.int8).view(3, 4),
    "table.weight": torch.arange(12, dtype=torch.uint8).view(torch.float8_e4m3fn).view(3, 4),
    "visual.attn.q_scale": torch.arange(3, dtype=torch.float32),
    "visual.attn.k_scale": torch.arange(3, dtype=torch.bfloat16),
}


def places_of(file):
    """The header of a file and where its tensors begin."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length, content


WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def bytes_by_name(path):
    found = {}
    for file in path.glob("*.safetensors"):
        header, start, content = places_of(file)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            at, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], content[start + at : start + end]
    return found


@pytest.mark.parametrize("limit", [1, "1GB"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
def test_odd_dtypes_and_shapes_keep_their_bytes(layout, limit, tmp_path):
    """All that safetensors has, those included that PyTorch has not; each aligned to its numbers."""
    src = write_folder(tmp_path / "src", [ODD, in_lists(["up_proj"], 2)], CONFIG)
    folder(src, tmp_path / "dst", {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}, layout=layout, max_shard_size=limit)
    was, found = bytes_by_name(src), bytes_by_name(tmp_path / "dst")
    assert {name: found[name] for name in ODD} == {name: was[name] for name in ODD}
    for file in (tmp_path / "dst").glob("*.safetensors"):
        header, start, _ = places_of(file)
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            at = start + entry["data_offsets"][0]
            assert at % WIDTHS.get(entry["dtype"], 1) == 0, (name, entry)
        with safe_open(file, "pt") as opened:
            assert all(opened.get_tensor(name) is not None for name in opened.keys() if name != "f4")  # noqa: SIM118


@pytest.mark.parametrize(("layout", "format"), [("compressed-tensors", fqt.NVFP4), ("modelopt", fqt.NVFP4)])
def test_what_was_written_is_read(layout, format, tmp_path):
    """Law: with all that was copied, whatever it looks like. A bug: matrices of bytes were taken for codes."""
    src = write_folder(tmp_path / "src", [ODD, in_lists(["up_proj"], 2)], CONFIG)
    folder(src, tmp_path / "dst", {EXPERTS_ONLY: format}, layout=layout)
    assert fqt.export.inspect(tmp_path / "dst").left == {}
    found = fqt.export.compare(src, tmp_path / "dst")
    assert not found.only_a + found.only_b
    folder(tmp_path / "dst", tmp_path / "back", layout="plain")
    was, found = bytes_by_name(src), bytes_by_name(tmp_path / "back")
    assert {name: found[name] for name in ODD} == {name: was[name] for name in ODD}


def test_files_that_are_not_aligned_are_read(tmp_path):
    """As older writers made them: a header of any length, numbers at odd places."""
    tensors = in_lists(["up_proj"], 2) | {"norm.weight": torch.arange(3.0)}
    src = write_folder(tmp_path / "src", [tensors], CONFIG)
    for content in src.glob("*.safetensors"):
        header, start, whole = places_of(content)
        text = json.dumps(header).encode()
        text += b" " * ((1 - len(text)) % 8)
        content.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])
        assert (8 + len(text)) % 8 == 1
    assert_law(src, tmp_path, {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}, "compressed-tensors")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077] if FULL else [0o027])
@pytest.mark.parametrize("is_there", [False, True])
def test_files_have_the_mode_of_any_new_file(is_there, mask, source, tmp_path):
    """Whatever the source's are."""
    before = os.umask(mask)
    try:
        if is_there:
            (tmp_path / "dst").mkdir()
        folder(source, tmp_path / "dst", RULES, max_shard_size="100KB")
        (tmp_path / "new").write_text("")
        (tmp_path / "directory").mkdir()
    finally:
        os.umask(before)
    for file in (tmp_path / "dst").rglob("*"):
        like = tmp_path / ("directory" if file.is_dir() else "new")
        assert file.stat().st_mode == like.stat().st_mode, file
    assert (tmp_path / "dst").stat().st_mode == (tmp_path / "directory").stat().st_mode


def snapshot_of(source, path):
    """The same as a snapshot in a Hugging Face cache: links to files elsewhere."""
    blobs = path / "blobs"
    snapshot = path / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(source.rglob("*"))):
        if file.is_file():
            shutil.copy(file, blobs / str(number))
            link = snapshot / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


LEFT = [".gitattributes", ".cache/x", "pytorch_model.bin", "original/consolidated.00.pth", "a/.hidden", "model.gguf"]
KEPT = ["tokenizer.model", "README.md", "inference/convert.py", "a/b/c.json", "a/config.json", "chat_template.jinja"]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("is_snapshot", [False, True])
def test_other_files_are_copied(is_snapshot, is_there, source, tmp_path):
    """Byte for byte, also from within directories, and files, not links; hidden ones and pickles are left."""
    src = tmp_path / "src"
    shutil.copytree(source, src)
    for number, name in enumerate([*LEFT, *KEPT]):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(bytes(range(number, 256)) * 100)
    (src / "script.sh").write_text("exit 1")
    (src / "script.sh").chmod(0o755)
    if is_snapshot:
        src = snapshot_of(src, tmp_path / "cache")
    before = {file: (os.lstat(file).st_mtime_ns, os.lstat(file).st_mode) for file in src.rglob("*")}
    was = files_of(src)
    dst = tmp_path / "dst"
    if is_there:
        dst.mkdir()
    inode = dst.stat().st_ino if is_there else None
    made = folder(src, dst, RULES, max_shard_size="100KB")
    found = files_of(dst)
    own = {name for name in found if name.endswith((".safetensors", ".index.json"))} | {"config.json"}
    assert found.keys() - own == {*KEPT, "script.sh", "tokenizer.json"} | {"inference/deep/code.py"}
    assert sorted(made.copied) == sorted(found.keys() - own)
    assert all(found[name] == was[name] for name in found.keys() - own)
    assert not any(file.is_symlink() for file in dst.rglob("*"))
    assert {file: (os.lstat(file).st_mtime_ns, os.lstat(file).st_mode) for file in src.rglob("*")} == before
    assert files_of(src) == was
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert inode is None or dst.stat().st_ino == inode
    assert not [name for name in os.listdir(dst) if name.startswith(".")]


def test_a_link_to_nothing_is_told(source, tmp_path):
    """As of a cache whose blob is gone: before a write, not a folder without it."""
    src = tmp_path / "src"
    shutil.copytree(source, src)
    (src / "merges.txt").symlink_to("nowhere")
    with pytest.raises((ValueError, OSError)) as caught:
        folder(src, tmp_path / "dst", RULES)
    assert_names(str(caught.value), "merges.txt")
    assert os.listdir(tmp_path) == ["src"]


def test_links_to_directories_are_followed(source, tmp_path):
    """Once, if one leads in a circle."""
    src = tmp_path / "src"
    shutil.copytree(source, src)
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "x").write_text("x")
    (src / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "circle").symlink_to(src)
    (src / "one").mkdir()
    (src / "two").mkdir()
    (src / "one" / "to").symlink_to(src / "two")
    (src / "two" / "to").symlink_to(src / "one")
    (src / "two" / "y").write_text("y")
    made = folder(src, tmp_path / "dst", RULES)
    assert {*made.copied} == {"inference/deep/code.py", "link/deep/x", "one/to/y", "tokenizer.json", "two/y"}
    assert all((tmp_path / "dst" / name).is_file() for name in made.copied)


def test_within_the_source_is_refused(source, tmp_path):
    """Also by a link: what is written there would be read, and the source changed."""
    shutil.copytree(source, tmp_path / "src")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    before = files_of(tmp_path / "src")
    for dst in ("src", "src/out", "link/out", "link"):
        with pytest.raises(ValueError, match="within src"):
            folder(tmp_path / "src", tmp_path / dst, RULES)
    for dst in ("src/out", "link"):
        with pytest.raises(ValueError, match="within src"):
            folder(tmp_path / "link", tmp_path / dst, RULES)
    assert files_of(tmp_path / "src") == before


def test_a_taken_destination_is_refused(source, tmp_path):
    """A directory that has something, and a file; what is there stays."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("mine")
    (tmp_path / "b").write_text("mine")
    for name in "ab":
        for resume in (False, True):
            with pytest.raises(ValueError, match="wanted a new name or an empty directory"):
                folder(source, tmp_path / name, RULES, resume=resume)
    assert files_of(tmp_path) == {"a/x": b"mine", "b": b"mine"}


def test_a_dry_run_writes_nothing(source, tmp_path):
    """And says the same sizes as the run itself."""
    planned = folder(source, tmp_path / "dst", RULES, dry_run=True)
    assert not os.listdir(tmp_path)
    made = folder(source, tmp_path / "dst", RULES)
    assert (planned.rows, planned.spec, planned.shards) == (made.rows, made.spec, made.shards)
    found = read(tmp_path / "dst")
    assert made.after == sum(tensor.nbytes for tensor in found.values())
    assert made.before == sum(tensor.nbytes for tensor in read(source).values())


# Killed, and gone on with


KILLS = 100 if FULL else 2
# Events of the system that a kill comes before, as of Python's audit hooks.
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}
CALLS = "pwrite", "copy_file_range", "fdatasync", "fsync"


def small(path):
    """A folder that is converted in a moment: experts, a copied tensor, files and directories beside them."""
    tensors = in_lists(["gate_proj", "up_proj", "down_proj"], 3) | {"norm.weight": torch.ones(2000)}
    src = write_folder(path, [dict([entry]) for entry in tensors.items()], CONFIG)
    (src / "inference").mkdir()
    for name in ("README.md", "inference/code.py", "tokenizer.json", "moving.json", "inference.txt"):
        (src / name).write_text(name * 10)
    return src


SMALL = {EXPERTS_ONLY: fqt.NVFP4}
OPTIONS = {"layout": "compressed-tensors", "max_shard_size": "4KB", "jobs": 2}


def counted(limit=None):
    """SIGKILL this process before its `limit`-th step on the file system; how many there were, and pieces done."""
    steps, pieces, lock = [0], [0], threading.Lock()

    def step():
        if threading.current_thread().name == "ahead":  # which only reads, at any time
            return
        with lock:
            steps[0] += 1
            if steps[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    for name in CALLS:
        call = getattr(os, name)
        setattr(os, name, lambda *args, call=call: (step(), call(*args))[1])
    sys.addaudithook(lambda event, _: step() if event in STEPS else None)
    convert = job.Job.convert

    def counting(self, piece, writer):
        convert(self, piece, writer)
        pieces[0] += 1

    job.Job.convert = counting
    return steps, pieces


def _converted(src, dst, limit, report, options):
    job.PIECE_BYTES, stage.SYNC_BYTES = 5000, 1
    steps, pieces = counted(limit)
    folder(src, dst, SMALL, **OPTIONS | options)
    with open(report, "w") as stream:
        json.dump([steps[0], pieces[0]], stream)


def _run_of(src, dst, limit=None, **options):
    """Exit status of a run in a process of its own, how many steps it took and pieces it converted."""
    report = f"{src}-report"
    child = forked(lambda: _converted(src, dst, limit, report, options))
    _, status = os.waitpid(child, 0)
    with open(report) as stream:
        return status, *json.load(stream)


def _killed_and_resumed(place):
    """At each of some steps: killed, and then whole, by going on or anew. How many pieces going on has converted."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = Path(place)
    src, to, whole = small(place / "src"), place / "to", place / "whole"
    status, _, pieces = _run_of(src, whole)
    assert status == 0
    wanted, again = files_of(whole), []
    for start in (to, to / "dst"):  # a new name, an empty directory
        start.mkdir(parents=True)
        status, total, _ = _run_of(src, to / "dst")
        assert (status, files_of(to / "dst")) == (0, wanted)
        shutil.rmtree(to)
        for number in sorted(random.Random(str(start.name)).sample(range(1, total + 1), KILLS)):
            for options in ({"resume": True}, {}):
                start.mkdir(parents=True)
                status, *_ = _run_of(src, to / "dst", number, **options)
                assert status == signal.SIGKILL or files_of(to / "dst") == wanted, number
                if not (to / "dst" / "config.json").exists():
                    assert start.name == "dst" or not (to / "dst").exists(), number
                    status, _, converted = _run_of(src, to / "dst", **options)
                    assert status == 0, (number, options)
                    again += [converted] if options else []
                found = {name: content for name, content in files_of(to / "dst").items() if "saving" not in name}
                assert found == wanted, number
                assert not [one for one in os.listdir(to) if one not in ("dst", ".dst.saving")], number
                shutil.rmtree(to)
    return again, pieces


def test_killed_at_any_step_and_resumed(tmp_path):
    """The same bytes as one run, and what was done is not done again; without `resume` it begins anew."""
    again, pieces = in_fresh_process(_killed_and_resumed, str(tmp_path))
    assert min(again) < pieces, again


@pytest.fixture
def part(tmp_path):
    """What a run leaves that was killed in the middle: its source and its destination."""
    src = small(tmp_path / "src")
    in_fresh_process(_run_of_part, str(src), str(tmp_path / "to" / "dst"))
    (stage,) = (tmp_path / "to").glob(".dst.saving-*")
    assert sum((stage / ".done").read_bytes()) > 0
    return src, tmp_path / "to" / "dst", stage


def _run_of_part(src, dst):
    torch.set_num_threads(1)
    os.mkdir(os.path.dirname(dst))
    status, *_ = _run_of(src, f"{dst}-whole")
    assert status == 0
    steps = json.loads(Path(f"{src}-report").read_text())[0]
    shutil.rmtree(f"{dst}-whole")
    status, *_ = _run_of(src, dst, steps // 2)
    assert status == signal.SIGKILL


def _touched(src):
    file = next(src.glob("*.safetensors"))
    os.utime(file, ns=(0, 0))


def _rewritten(src):
    (src / "README.md").write_text("other")


def _other_config(src):
    (src / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5}))


OTHERS = {
    "layout": {"layout": "plain"},
    "shards": {"max_shard_size": "9KB"},
    "method": {"method": methods.Percentile(99.0), "rules": {EXPERTS_ONLY: fqt.FP8}},
    "rule": {"rules": {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}},
    "weights": _touched,
    "other files": _rewritten,
    "config": _other_config,
}


def test_to_go_on_with_another_conversion_is_refused(part, monkeypatch):
    """Other options, other rules, a changed source: nothing is lost, and without `resume` it begins anew."""
    src, dst, stage = part
    monkeypatch.setattr(job, "PIECE_BYTES", 5000)
    before = files_of(stage)
    times = {file: file.stat().st_mtime_ns for file in src.rglob("*")}
    for name, other in OTHERS.items():
        options = {"rules": SMALL, **OPTIONS, "resume": True} | (other if isinstance(other, dict) else {})
        was = files_of(src)
        if not isinstance(other, dict):
            other(src)
        with pytest.raises(ValueError) as caught:
            folder(src, dst, **options)
        assert_names(str(caught.value), "resume", stage.name, "found", "wanted"), name
        assert files_of(stage) == before, name
        for file, content in was.items():
            (src / file).write_bytes(content) if (src / file).read_bytes() != content else None
        for file, time in times.items():
            os.utime(file, ns=(time, time))
    folder(src, dst, SMALL, **OPTIONS, resume=True)
    assert os.listdir(dst.parent) == ["dst"]


def test_without_resume_it_begins_anew(part, monkeypatch):
    """Whatever the part is of."""
    src, dst, _ = part
    folder(src, dst, {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}, jobs=1)
    assert os.listdir(dst.parent) == ["dst"]
    folder(src, dst.with_name("other"), {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}, jobs=2)
    assert files_of(dst) == files_of(dst.with_name("other"))


@pytest.mark.parametrize("name", ["out[1]", "out*", "-", "a.saving-0", "ö ü", "o" * 214, "o" * 215, "ö" * 127])
def test_parts_are_found_under_any_name(name, tmp_path, monkeypatch):
    """Also under one that would be a pattern, and one that leaves no room for more in the 255 bytes of a name."""
    src = small(tmp_path / "src")
    (tmp_path / "to").mkdir()
    _fails_once(monkeypatch)
    with pytest.raises(OSError, match="Input/output"):
        folder(src, tmp_path / "to" / name, SMALL, resume=True)
    with pytest.raises(ValueError, match="resume: found"):
        folder(src, tmp_path / "to" / name, {EXPERTS_ONLY: fqt.FP8}, resume=True)
    folder(src, tmp_path / "to" / name, SMALL, resume=True)
    assert os.listdir(tmp_path / "to") == [name]


def test_a_part_from_before_the_directory_is_told(tmp_path, monkeypatch):
    """Kills an error that calls the same conversion another one; what it advises goes on with it."""
    src, dst = small(tmp_path / "src"), tmp_path / "dst"
    cut(monkeypatch, "_finish", src, dst)
    dst.mkdir()
    with pytest.raises(ValueError, match="a part of this conversion.*remove it"):
        folder(src, dst, SMALL, resume=True)
    dst.rmdir()
    monkeypatch.setattr(job.Job, "convert", None)
    folder(src, dst, SMALL, resume=True)


def _fails_once(monkeypatch, error=errno.EIO, after=3):
    """Let a write of tensors fail, once."""
    left = [after]
    write = ShardWriter.write

    def fails(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(error, os.strerror(error))
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", fails)


def broken(path, value=torch.nan):
    """A folder whose last expert has a weight that is not finite."""
    tensors = in_lists(["up_proj"], 3)
    tensors["layers.0.mlp.experts.2.up_proj.weight"][5, 7] = value
    return write_folder(path, [tensors], CONFIG)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
@pytest.mark.parametrize("format", [*FORMATS, fqt.FP8_BLOCK] if FULL else FORMATS[::2], ids=lambda format: format.name)
def test_an_error_leaves_nothing_unless_somebody_goes_on(format, layout, is_there, tmp_path):
    """NaN or infinity in the last weight, which is named."""
    for value in (torch.nan, torch.inf):
        src = broken(tmp_path / "src", value)
        (tmp_path / "to").mkdir()
        dst = tmp_path / "to" / "dst"
        if is_there:
            dst.mkdir()
        for resume in (False, True):
            with pytest.raises(ValueError) as caught:
                folder(src, dst, {EXPERTS_ONLY: format}, layout=layout, resume=resume)
            assert_names(str(caught.value), "experts.2.up_proj.weight", "found", "wanted")
            left = [one.name for one in (tmp_path / "to").rglob("*") if "saving" in one.name]
            assert len(left) == (1 if resume else 0), left
            assert dst.exists() == is_there
        shutil.rmtree(tmp_path / "to")
        shutil.rmtree(src)


def test_an_error_leaves_no_directories_that_it_made(tmp_path):
    """Those above the new folder, of which somebody else's stay, and those with what can be gone on with."""
    src, dst = broken(tmp_path / "src"), tmp_path / "mine" / "new" / "a" / "b"
    (tmp_path / "mine").mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match="found NaN"):
            folder(src, dst, SMALL, resume=resume)
        assert dst.parent.exists() == resume
        assert (tmp_path / "mine").exists()
    with pytest.raises(ValueError, match="found NaN"):
        folder(src, dst, SMALL)
    assert [one.name for one in (tmp_path / "mine").rglob("*")] == ["new", "a"]


def test_a_full_disk_is_told_before_a_write(source, tmp_path, monkeypatch):
    """How much there is and how much is wanted, in a dry run too."""
    free = os.statvfs(tmp_path)
    names = [name for name in dir(free) if name.startswith("f_")]
    none = types.SimpleNamespace(**{name: getattr(free, name) for name in names} | {"f_bavail": 100, "f_frsize": 1})
    monkeypatch.setattr(os, "statvfs", lambda *_: none)
    for options in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(OSError, match="found 100 free bytes") as caught:
            folder(source, tmp_path / "dst", RULES, **options)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "dst")
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_fills_in_the_middle(is_there, call, tmp_path, monkeypatch):
    """At every kind of call: nothing is left, or what can be gone on with."""
    src = small(tmp_path / "src")
    (tmp_path / "to").mkdir()
    dst = tmp_path / "to" / "dst"
    folder(src, tmp_path / "whole", SMALL, **OPTIONS)
    if is_there:
        dst.mkdir()
    real, left = getattr(os, call), [0]

    def fails(*args):
        left[0] -= stat.S_ISREG(os.fstat(args[0]).st_mode)  # not every system has fsync for directories
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, fails)
    for after in (1, 2, 5):
        left[0] = after
        raised = None
        try:
            folder(src, dst, SMALL, **OPTIONS)
        except OSError as error:
            raised = error
        assert (raised is None) == (left[0] > 0)
        if raised is None:  # there are fewer calls of this kind
            shutil.rmtree(dst)
            if is_there:
                dst.mkdir()
        else:
            assert raised.errno == errno.ENOSPC
            assert str(tmp_path) in str(raised)
        assert [str(one) for one in (tmp_path / "to").rglob("*")] == ([str(dst)] if is_there else [])
    left[0] = 2
    with contextlib.suppress(OSError):
        folder(src, dst, SMALL, **OPTIONS, resume=True)
    if left[0] <= 0:
        folder(src, dst, SMALL, **OPTIONS, resume=True)
    assert files_of(dst) == files_of(tmp_path / "whole")


def test_what_a_failed_sync_loses_is_not_taken_for_done(tmp_path, monkeypatch):
    """A system tells once: later syncs that succeed say nothing of what was lost before."""
    src, calls = small(tmp_path / "src"), [0]
    monkeypatch.setattr(stage, "SYNC_BYTES", 1)
    monkeypatch.setattr(job, "PIECE_BYTES", 5000)
    sync = ShardWriter.sync

    def fails(self):
        calls[0] += 1
        if calls[0] == 4:  # the first is that of the empty files
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(self)

    monkeypatch.setattr(ShardWriter, "sync", fails)
    with pytest.raises(OSError, match="Input/output"):
        folder(src, tmp_path / "to" / "dst", SMALL, jobs=1, resume=True)
    (done,) = (tmp_path / "to").glob(".dst.saving-*/.done")
    assert sum(done.read_bytes()) == 2


def test_more_shards_than_a_process_may_have_open(tmp_path):
    """Files are open while they are written to."""
    tensors = in_lists(["up_proj"], 60, (2, 16))
    src = write_folder(tmp_path / "src", [{name: tensor} for name, tensor in tensors.items()], CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        made = folder(src, tmp_path / "dst", SMALL, max_shard_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert made.shards == 180


LAYOUTS = {
    "modelopt": [fqt.NVFP4, fqt.FP8_PER_CHANNEL, fqt.FP8_BLOCK],
    "fp8": [fqt.FP8_BLOCK],
    "compressed-tensors": [fqt.NVFP4_STATIC, fqt.INT4_BLOCK32, fqt.INT8_PER_CHANNEL, fqt.FP8, fqt.FP8_BLOCK, fqt.MXFP8],
    "plain": [fqt.INT4_BLOCK128, fqt.MXFP6_E2M3],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "format"), [(layout, one) for layout, some in LAYOUTS.items() for one in some])
def test_every_layout(layout, format, dtype, tmp_path):
    """Its formats, of experts in lists; a bug: compressed-tensors' decompressor rounds NVFP4 to bf16."""
    tensors = in_lists(["gate_proj", "up_proj", "down_proj"], 5, (128, 128), dtype)
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch.")}
    src = write_folder(tmp_path / "src", [dict(list(tensors.items())[i::4]) for i in range(4)], config)
    assert_law(src, tmp_path, {EXPERTS_ONLY: format}, layout)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_that_does_not_show_its_layout_must_be_told(is_transposed, tmp_path):
    """Square matrices: which, and how to tell; told, each is quantized along `in`."""
    weights = torch.stack([*in_lists(["x"], 3, (64, 64)).values()])
    name = "layers.0.mlp.experts.down_proj"
    src = write_folder(tmp_path / "src", [{name: weights}], CONFIG)
    with pytest.raises(ValueError) as caught:
        folder(src, tmp_path / "dst", {EXPERTS_ONLY: fqt.MXFP4}, layout="plain")
    assert_names(str(caught.value), name, "found the stack (3, 64, 64)", "pass transposed=")
    folder(src, tmp_path / "dst", {EXPERTS_ONLY: fqt.MXFP4}, layout="plain", transposed={name: is_transposed})
    along = {f"{i}.weight": one.T.contiguous() if is_transposed else one for i, one in enumerate(weights)}
    fq = fqt.transform(fqt.select(along, {"*": fqt.MXFP4}))
    wanted = torch.stack([*fq.fakequant(along, fq.calibrate(along)).values()])
    assert_same_bytes(read(tmp_path / "dst"), {name: wanted.mT if is_transposed else wanted})


def test_two_conversions_to_one_place(source, tmp_path, monkeypatch):
    """The second is refused while the first is going on, and harms nothing."""
    refused = []

    def fill(job, *args):
        for resume in (False, True):
            monkeypatch.setattr(run, "_fill", _fill)
            with pytest.raises(OSError, match="another save to it is going on") as caught:
                folder(source, tmp_path / "dst", RULES, resume=resume)
            refused.append(caught.value.errno)
        _fill(job, *args)

    monkeypatch.setattr(run, "_fill", fill)
    folder(source, tmp_path / "dst", RULES)
    folder(source, tmp_path / "one", RULES)
    assert refused == [errno.EBUSY] * 2
    assert files_of(tmp_path / "dst") == files_of(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["dst", "one"]


def cut(monkeypatch, name, src, dst, **options):
    """A conversion that is interrupted where a function of `run` is called."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder(src, dst, SMALL, **options)


def two_shards(path, seed):
    """Experts in two shards, whose files say nothing of when they were written."""
    tensors = {name: torch.roll(tensor, seed) for name, tensor in in_lists(["gate_proj", "up_proj"], 4).items()}
    halves = [dict(itertools.islice(tensors.items(), start, start + 4)) for start in (0, 4)]
    src = write_folder(path, halves, CONFIG)
    for file in src.iterdir():
        os.utime(file, (1, 1))
    return src


@pytest.mark.parametrize("lost", ["gone", "cut", "of another head"])
def test_what_is_marked_is_not_believed_of_shards_that_are_not_there(lost, tmp_path, monkeypatch):
    """Part of a stage may be gone, as when its removal was killed: then all begins anew, to the same bytes."""
    src = two_shards(tmp_path / "src", 0)
    folder(src, tmp_path / "whole", SMALL, max_shard_size="3KB")
    cut(monkeypatch, "_finish", src, tmp_path / "dst", max_shard_size="3KB")
    (stage,) = tmp_path.glob(".dst.saving-*")
    shard = sorted(stage.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if lost != "gone":
        shard.write_bytes(content[:-1] if lost == "cut" else bytes(len(content)))
    folder(src, tmp_path / "dst", SMALL, max_shard_size="3KB", resume=True)
    assert_same_bytes(read(tmp_path / "dst"), read(tmp_path / "whole"))


def test_a_source_of_the_same_sizes_and_times_is_another(tmp_path, monkeypatch):
    """Two models of one architecture, from a store that keeps no times."""
    one, two = two_shards(tmp_path / "one", 0), two_shards(tmp_path / "two", 1)
    cut(monkeypatch, "_finish", one, tmp_path / "dst")
    with pytest.raises(ValueError, match="another conversion"):
        folder(two, tmp_path / "dst", SMALL, resume=True)


class Cut(BaseException):
    """What a killed process is to the one that calls it here: nothing that comes after is done."""


ENDS = ("open", "rename", "unlink")  # of a path: what the end of a conversion is made of


def _cut_in(monkeypatch, number, call):
    """True if the call was cut: before its `number`-th step on paths."""
    left = [number]

    def step(step_of):
        def cut_or_go_on(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return step_of(*args, **options)

        return cut_or_go_on

    with monkeypatch.context() as patch:
        for name in ENDS:
            patch.setattr(Path, name, step(getattr(Path, name)))
        try:
            call()
        except Cut:
            return True
    return False


@pytest.mark.parametrize("is_there", [False, True])
def test_what_is_cut_twice_is_gone_on_with(is_there, tmp_path, monkeypatch):
    """At each step after the last piece, and again at a drawn one while it is gone on with: the same bytes."""
    src, path, draws = two_shards(tmp_path / "src", 0), tmp_path / "to" / "dst", random.Random(0)
    folder(src, tmp_path / "whole", SMALL, max_shard_size="3KB")
    wanted = files_of(tmp_path / "whole")

    def convert():
        folder(src, path, SMALL, max_shard_size="3KB", resume=True, jobs=1)

    cuts, number, is_cut = 0, 0, True
    while is_cut:
        (path if is_there else path.parent).mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(Cut))
            with pytest.raises(Cut):
                convert()
        is_cut = _cut_in(monkeypatch, number, convert)
        cuts += _cut_in(monkeypatch, draws.randrange(12), convert) if not (path / "config.json").exists() else 0
        if not (path / "config.json").exists():
            convert()
        assert {name: one for name, one in files_of(path).items() if "saving" not in name} == wanted, number
        shutil.rmtree(path.parent)
        number += 1
    assert number > 10
    assert cuts > 5


def test_what_lacks_its_name_only_is_not_converted_again(tmp_path, monkeypatch):
    """Killed between the last piece and the commit."""
    src = two_shards(tmp_path / "src", 0)
    cut(monkeypatch, "commit", src, tmp_path / "dst")
    monkeypatch.setattr(job.Job, "convert", None)
    folder(src, tmp_path / "dst", SMALL, resume=True)
    assert not [name for name in os.listdir(tmp_path / "dst") if name.startswith(".")]


def test_threads_of_others_are_left_alone(tmp_path):
    """A conversion computes in threads that are alone; those that begin later are not."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        folder(two_shards(tmp_path / "src", 0), tmp_path / "dst", SMALL)
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [torch.get_num_threads()] == [2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"experts": "a"}, {"transposed": "a"}, {"method": methods.Mse()}])
def test_options_of_rules_want_rules(options, tmp_path):
    src = two_shards(tmp_path / "src", 0)
    with pytest.raises(ValueError, match=f"rules: found none, and .*{next(iter(options))}="):
        folder(src, tmp_path / "dst", layout="plain", **options)


@pytest.mark.parametrize("rules", [None, SMALL])
def test_config_names_the_dtype(rules, tmp_path):
    """By the name that transformers has now, whatever the name was."""
    src = two_shards(tmp_path / "src", 0)
    config = {key: value for key, value in CONFIG.items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    (src / "config.json").write_text(json.dumps(config))
    folder(src, tmp_path / "dst", rules, layout="plain")
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == CONFIG


WITHOUT_A_COMPILER = """
import sys, warnings
import fq_transforms as fqt
from fq_transforms.formats import FORMATS

warnings.simplefilter("ignore")
done = 0
for layout in ("compressed-tensors", "modelopt", "plain"):
    for name, format in FORMATS.items():
        try:
            fqt.export.folder(sys.argv[1], f"{sys.argv[2]}/{layout}-{name}", {"*.experts.*": format}, layout=layout)
        except ValueError:  # the layout does not have it
            continue
        done += 1
        assert not {"torch._dynamo", "sympy"} & set(sys.modules), (layout, name)
assert done > 20, done
"""


def test_no_compiler_is_imported(tmp_path):
    """PyTorch imports its compiler for most formulas on the meta device: 5 s in which little is read ahead."""
    src = write_folder(tmp_path / "src", [in_lists(["gate_proj", "up_proj", "down_proj"], 2, (128, 128))], CONFIG)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER, src, tmp_path], check=False, capture_output=True, text=True, env=env
    )
    assert not found.returncode, found.stderr[-2000:]
