"""Files by others: no byte of one names code, a path elsewhere, a device or a pipe, or takes memory that it lacks."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import megatron, modelopt, pickles, storage
from fq_transforms.checkpoint.manifest import are_tiles, from_bytes
from fq_transforms.spec import Spec
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import KINDS, assert_same, of, save_as, small
from tests.hostile import watched


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with two leaves of one shape, and what is needed to load it."""
    fq, state = of({"a": fqt.FP8, "b": fqt.FP8})
    checkpoint.save(tmp_path / "a", fq, state)
    return tmp_path / "a", fq, state


def reseal(file, content):
    file.write_bytes(content + storage.seal_of(content))


def metadata_of(path):
    return pickle.loads((path / ".metadata").read_bytes()[: -storage.SEAL_BYTES])


def refused(path, fq, state, *said):
    """A load that raises a ValueError which names the path, and does nothing else."""
    with watched(path):
        message = message_of(ValueError, checkpoint.load, path, fq, like=state)
    assert_names(message, str(path), *said)
    return message


# Pickles.


class Calls:
    """What pickles as the call of a function."""

    def __init__(self, function, *args):
        self._call = function, args

    def __reduce__(self):
        return self._call


NAMES_CODE = {
    "a call": lambda m: Calls(os.mkdir, "called"),
    "a call in a value": lambda m: replace(m, planner_data={**m.planner_data, "x": Calls(os.mkdir, "called")}),
    "a class": lambda m: replace(m, planner_data=Path),
    "an object with state": lambda m: replace(m, storage_meta=zipfile.ZipInfo("x")),
    "a list of calls": lambda m: replace(m, storage_meta=[Calls(eval, "1/0")]),
}


@pytest.mark.parametrize("case", NAMES_CODE)
def test_no_name_is_called(case, saved, monkeypatch, tmp_path):
    """Whatever a pickle names stays a name: of metadata's own records nothing else is read, the rest is refused."""
    monkeypatch.chdir(tmp_path)
    path, fq, state = saved
    reseal(path / ".metadata", pickle.dumps(NAMES_CODE[case](metadata_of(path))))
    with watched(path):
        try:
            assert_same(checkpoint.load(path, fq, like=state), state)
        except ValueError as error:
            assert_names(str(error), str(path))
    assert not Path("called").exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_metadata_of_every_protocol(protocol, saved):
    """What the standard library reads of DCP's own metadata is what is read here."""
    path, fq, state = saved
    metadata = metadata_of(path)
    content = pickle.dumps(metadata, protocol)
    found = pickles.metadata_in(content)
    assert found.state_dict_metadata == metadata.state_dict_metadata
    assert found.storage_data == metadata.storage_data
    assert found.planner_data == metadata.planner_data
    assert found.storage_meta.save_id == metadata.storage_meta.save_id
    reseal(path / ".metadata", content)
    assert_same(checkpoint.load(path, fq, like=state), state)


def test_a_dtype_is_one(saved):
    """Torch imports modules whose names it is asked for."""
    path, fq, state = saved
    content = pickle.dumps(metadata_of(path), 4)
    for name in ("_inductor", "compile", "float32.x", "ops"):
        changed = content.replace(b"\x8c\x07float32", b"\x8c" + bytes([len(name)]) + name.encode())
        assert changed != content
        before = {*sys.modules}
        # In a frame whose length is put right.
        reseal(path / ".metadata", changed[:2] + changed[11:])
        refused(path, fq, state)
        assert not {each for each in {*sys.modules} - before if each.startswith("torch.")}


def test_classes_stay_as_they_are(saved):
    """A BUILD on a class would change it for the process."""
    path, fq, state = saved
    name = b"torch.distributed.checkpoint.metadata\nChunkStorageMetadata\n"
    reseal(path / ".metadata", b"\x80\x02c" + name + b"}X\x08\x00\x00\x00__init__NsbN.")
    before = dict(vars(ChunkStorageMetadata))
    refused(path, fq, state, "a state for what was not made")
    assert dict(vars(ChunkStorageMetadata)) == before


def nested(count):
    """Bytes of a pickle whose value has 2**count items, by remembering and taking twice."""
    steps = b"\x80\x04)\x94"
    for number in range(count):
        steps += b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86\x94"
    return steps


def colliding(count):
    """A dict whose keys are numbers of one hash."""
    numbers = (((2**61 - 1) * i).to_bytes(16, "little", signed=True) for i in range(count))
    return b"\x80\x04}(" + b"".join(b"\x8a\x10" + number + b"N" for number in numbers) + b"u."


BOMBS = {
    "keys that collide": colliding(100_000),
    "a number to print": b"\x80\x04\x8b" + struct.pack("<i", 10**4) + b"\x7f" * 10**4 + b".",
    "a place in the memo": b"\x80\x02Nr\x00\x00\x00\x10.",
    "a length": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a text length": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "a number": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6 + b".",
    "a key": b"\x80\x04}" + nested(60)[2:] + b"Ns.",
    "a value": nested(60) + b".",
    "marks": b"\x80\x04" + b"(" * 10**6 + b"t" * 10**6 + b".",
    "no end": b"\x80\x04N",
    "nothing": b"",
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickles_take_what_they_are(case, saved):
    path, fq, state = saved
    reseal(path / ".metadata", BOMBS[case])
    refused(path, fq, state, ".metadata")


# Numbers that do not fit together.


def chunk(offset, size):
    return ChunkStorageMetadata(torch.Size([offset]), torch.Size([size]))


def with_chunks(*chunks):
    """Leaf a in other chunks, each of which has bytes somewhere."""

    def change(metadata):
        name = next(iter(metadata.state_dict_metadata))
        (where,) = (where for index, where in metadata.storage_data.items() if index.fqn == name)
        metadata.state_dict_metadata[name].chunks = list(chunks)
        metadata.storage_data |= {MetadataIndex(name, one.offsets): where for one in chunks}

    return change


def elsewhere(file):
    def change(metadata):
        for where in metadata.storage_data.values():
            where.relative_path = file

    return change


def placed(**fields):
    def change(metadata):
        for where in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(where, name, value)

    return change


DO_NOT_FIT = {
    "an overlap and a gap": with_chunks(chunk(0, 2), chunk(0, 2)),
    "an overlap": with_chunks(chunk(0, 3), chunk(2, 2)),
    "a gap": with_chunks(chunk(0, 1), chunk(2, 2)),
    "no chunk": with_chunks(),
    "beyond the end": with_chunks(chunk(0, 5)),
    "another rank": with_chunks(ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 1]))),
    "no place": lambda metadata: metadata.storage_data.clear(),
    "a parent": elsewhere("../a/x.distcp"),
    "the parent": elsewhere(".."),
    "an absolute path": elsewhere("/etc/passwd"),
    "a number for a path": elsewhere(7),
    "a length below zero": placed(length=-8),
    "a length of an exabyte": placed(length=2**60),
    "an offset below zero": placed(offset=-8),
    "an offset that is text": placed(offset="0"),
    "a transform": placed(transform_descriptors=["zstd"]),
}


@pytest.mark.parametrize("case", DO_NOT_FIT)
def test_all_is_read_once(case, saved):
    """Kills memory that is loaded as it was found, and paths elsewhere: what does not add up is refused before."""
    path, fq, state = saved
    metadata = metadata_of(path)
    DO_NOT_FIT[case](metadata)
    reseal(path / ".metadata", pickle.dumps(metadata))
    refused(path, fq, state)


def test_tiles_are_told_from_overlaps():
    """Law: boxes are tiles if and only if each number is in one: grids with a box moved, cut, doubled or lost."""
    generator = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(1, most + 1, (), generator=generator))

    told = {True: 0, False: 0}
    for _ in range(400):
        shape = tuple(draw(5) for _ in range(draw(3)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(3)):  # cut all boxes straight through
            axis, at = draw(len(shape)) - 1, draw(5)
            boxes = [half for box in boxes for half in cut(box, axis, at)]
        number = draw(len(boxes)) - 1
        offset, sizes = boxes[number]
        match draw(5):
            case 1:
                boxes[number] = offset, tuple(max(1, size - 1) for size in sizes)
            case 2:
                boxes[number] = tuple(start + 1 for start in offset), sizes
            case 3:
                boxes.append(boxes[number])
            case 4:
                del boxes[number]
        counts = torch.zeros(tuple(2 * size + 1 for size in shape))
        for offset, sizes in boxes:
            counts[tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))] += 1
        inside = counts[tuple(slice(0, size) for size in shape)]
        wanted = bool((inside == 1).all() and counts.sum() == inside.sum())
        assert are_tiles(boxes, shape) == wanted, (boxes, shape)
        told[wanted] += 1
    assert min(told.values()) > 50, told


def cut(box, axis, at):
    offset, sizes = box
    size = at - offset[axis]
    if not 0 < size < sizes[axis]:
        return [box]
    first = (*sizes[:axis], size, *sizes[axis + 1 :])
    rest = (*sizes[:axis], sizes[axis] - size, *sizes[axis + 1 :])
    return [(offset, first), ((*offset[:axis], at, *offset[axis + 1 :]), rest)]


# Content in another place.


def test_seals_bind_content_to_its_place(saved, tmp_path):
    """Two parts of one size exchanged within a file, two files, or a file of another save under this name: refused."""
    path, fq, state = saved
    (data,) = path.glob("*.distcp")
    whole = data.read_bytes()
    first, second = sorted((w.offset, w.length + storage.SEAL_BYTES) for w in metadata_of(path).storage_data.values())
    (a, n), (b, m) = first, second
    assert n == m
    data.write_bytes(whole[b : b + n] + whole[a : a + n])
    refused(path, fq, state, "crc32", data.name)
    data.write_bytes(whole)

    other = {key: {name: 2 * leaf for name, leaf in leaves.items()} for key, leaves in state.items()}
    checkpoint.save(tmp_path / "b", fq, other)
    (foreign,) = (tmp_path / "b").glob("*.distcp")
    shutil.copy(foreign, data)
    refused(path, fq, state, "crc32", data.name)

    # Two files of one save: as those of two ranks.
    metadata = metadata_of(path)
    twin = data.with_name(data.name.replace("_0.", "_1."))
    twin.write_bytes(whole)
    for where in metadata.storage_data.values():
        where.relative_path = twin.name
    reseal(path / ".metadata", pickle.dumps(metadata))
    refused(path, fq, state, "crc32", twin.name)


def test_files_of_a_save_cannot_be_exchanged(saved):
    """Law: of all ways to take one chunk's bytes for another's, none loads."""
    path, fq, state = saved
    original = (path / ".metadata").read_bytes()
    metadata = metadata_of(path)
    (one, two) = metadata.storage_data
    metadata.storage_data[one], metadata.storage_data[two] = metadata.storage_data[two], metadata.storage_data[one]
    reseal(path / ".metadata", pickle.dumps(metadata))
    refused(path, fq, state, "crc32")
    (path / ".metadata").write_bytes(original)
    assert_same(checkpoint.load(path, fq, like=state), state)


# Files that are none, or that are more than they seem.


def test_devices_and_pipes_are_no_files(tmp_path):
    """A pipe waits for a writer, /dev/zero has no end: each reader of each file refuses both, by name."""
    fq, state, _ = small()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for kind in KINDS:
        save_as(kind, tmp_path / kind, fq, state)
    up = {"up_proj.weight": torch.ones(32, 32)}
    nv = fqt.transform(fqt.select(up, {"*": fqt.NVFP4}), layout="compressed-tensors")
    fqt.export.save(tmp_path / "model", nv, up, nv.calibrate(up), config=config)
    readers = {
        "directory": lambda: checkpoint.load(tmp_path / "directory", fq, like=state),
        "file": lambda: checkpoint.load_file(tmp_path / "file", fq),
        "model": lambda: fqt.export.folder(tmp_path / "model", tmp_path / "plain", layout="plain"),
    }
    files = [*(tmp_path / "directory").iterdir(), tmp_path / "file", *(tmp_path / "model").iterdir()]
    assert len(files) == 5
    for file in files:
        kept = file.read_bytes()
        kind = file.name if file.parent == tmp_path else file.parent.name
        file.unlink()
        for make in (lambda f: f.symlink_to("/dev/zero"), os.mkfifo, lambda f: f.mkdir()):
            make(file)
            with (
                watched(tmp_path, "/dev/zero", writes=tmp_path),
                pytest.raises((ValueError, OSError), match=re.escape(file.name)),
            ):
                readers[kind]()
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        file.write_bytes(kept)
        readers[kind]()
        shutil.rmtree(tmp_path / "plain", ignore_errors=True)


def sparse(file, size):
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_sizes_are_bounded_before_memory_is_taken(tmp_path):
    """Files of terabytes that are holes, headers and parts that inflate: refused by what the spec accounts for."""
    fq, state, _ = small()
    for kind in KINDS:
        save_as(kind, tmp_path / kind, fq, state)
    sparse(tmp_path / "file", 2**42)
    with watched(tmp_path):
        assert_names(message_of(ValueError, checkpoint.load_file, tmp_path / "file", fq), str(tmp_path / "file"))
        message_of(ValueError, checkpoint.read_spec, tmp_path / "file")
    sparse(tmp_path / "directory" / ".metadata", 2**42)
    refused(tmp_path / "directory", fq, state, ".metadata", "wanted at most")
    claims = tmp_path / "claims"
    text = fq.spec.to_json().replace("[128, 256]", "[8388608, 16777216]")
    for shape in ([4], [0, 2**64]):
        entries = {"experts.*.w.amax": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}
        about = {"format": "fq_transforms", "version": "1", "spec": text, "crc32": "0"}
        content = json.dumps(entries | {"__metadata__": about}).encode()
        claims.write_bytes(struct.pack("<Q", len(content)) + content)
        with watched(tmp_path):
            assert_names(message_of(ValueError, checkpoint.read_spec, claims), str(claims))
    header = tmp_path / "header"
    header.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with watched(tmp_path):
        message_of(ValueError, checkpoint.load_file, header, fq)
    bomb = zlib.compress(b"[" * 2**28, 9)
    with watched(tmp_path):
        assert "more than" in message_of(ValueError, from_bytes, bomb)
        message_of(ValueError, Spec.from_json, "[" * 10**6)


def test_parts_are_numbers_and_nothing_else(tmp_path):
    """What torch.save adds is not read: not a pickle with a call, not what inflates, not another storage."""
    numbers = torch.arange(4.0)
    stream = io.BytesIO()
    torch.save({"x": Calls(os.mkdir, str(tmp_path / "called"))}, stream)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**28))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/data/0", bytes(16))
        archive.writestr("b/data/0", bytes(16))
    beside = io.BytesIO()
    with zipfile.ZipFile(beside, "w") as archive:
        archive.writestr("a/data/0", bytes(16))
        archive.writestr("a/other", bytes(2**20), zipfile.ZIP_DEFLATED)
    for content in (stream, bomb, twice, beside, io.BytesIO(b""), io.BytesIO(b"PK"), io.BytesIO(bytes(64))):
        with watched(tmp_path):
            message = message_of(
                ValueError, storage.numbers_in, bytearray(content.getvalue()), (4,), torch.float32, "leaf 'a'"
            )
        assert_names(message, "leaf 'a': found", "without (4,) numbers of torch.float32")
    assert not (tmp_path / "called").exists()
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float64, torch.float8_e4m3fn):
        for shape in ((4,), (2, 2), (1,), (0, 3), ()):
            tensor = numbers[: max(1, torch.Size(shape).numel())].to(dtype)[: torch.Size(shape).numel()].view(shape)
            for zipped in (False, True) if dtype != torch.float8_e4m3fn else (True,):
                stream = io.BytesIO()
                torch.save(tensor.clone(), stream, _use_new_zipfile_serialization=zipped)
                found = storage.numbers_in(bytearray(stream.getvalue()), shape, dtype, "leaf")
                assert found.dtype == dtype
                assert found.shape == shape
                assert torch.equal(
                    found.view(torch.uint8) if shape else found, tensor.view(torch.uint8) if shape else tensor
                )


def test_records_of_megatron_are_archives(tmp_path):
    """Each number is under the CRC-32 of an archive: bytes that are none are refused, whatever archive ends them."""
    whole, bomb = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(4.0), whole)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/data/0", bytes(2**28))
    numbers = bomb.getvalue() + bytes(-len(bomb.getvalue()) % 4)
    old = (len(numbers) // 4).to_bytes(8, "little") + numbers
    flipped = whole.getvalue().replace(torch.arange(4.0).numpy().tobytes(), torch.arange(1.0, 5.0).numpy().tobytes())
    assert flipped != whole.getvalue()
    for content, count in ((whole.getvalue(), 4), (old, len(numbers) // 4), (flipped, 4)):
        (tmp_path / "a.distcp").write_bytes(content)
        record = megatron._Record((0,), (count,), "a.distcp", 0, len(content))
        with watched(tmp_path):
            if content == whole.getvalue():
                assert megatron._read_record(tmp_path, "a", record, torch.float32).tolist() == [0, 1, 2, 3]
            else:
                message_of(ValueError, megatron._read_record, tmp_path, "a", record, torch.float32)


def test_names_of_modelopt_take_time_in_proportion():
    """Each number of a name is another entry of the index: names that no model has are refused, not indexed."""
    fq, _, _ = small()
    for name in ("1." * 10**5 + "weight_quantizer._amax", ".1" * 400 + ".weight_quantizer._amax"):
        with watched():
            message_of(ValueError, modelopt.read, {name: torch.ones(())}, fq)


# Folders of models.


@pytest.fixture
def folder(tmp_path):
    """A folder of compressed-tensors in two shards."""
    params = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(32, 32) for i in range(2)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fqt.export.save(tmp_path / "in", fq, params, fq.calibrate(params), config=config, max_shard_size=1100)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    return tmp_path / "in"


def changed(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def set_format(value):
    return "config.json", lambda d: d["quantization_config"].update(format=value)


def set_group(**values):
    return "config.json", lambda d: d["quantization_config"]["config_groups"]["group_0"].update(values)


def set_files(change):
    def each(document):
        document["weight_map"] = {name: change(file) for name, file in document["weight_map"].items()}

    return "model.safetensors.index.json", each


CONFIGS = {
    "a format that is a file": set_format("{folder}/evil.py:Compressor"),
    "a format of a group that is a file": set_group(format="{folder}/evil.py:Compressor"),
    "a format that is a list": set_format(["float-quantized"]),
    "an unknown format": set_format("naive-float"),
    "a pattern without an end": set_group(targets=["re:^(a|[a-z._0-9])+$x"], format="float-quantized"),
    "a pattern that is none": set_group(targets=["re:(" * 3]),
    "a nested pattern": set_group(targets=["re:" + "(" * 10**5]),
    "targets of numbers": set_group(targets=[1]),
    "a pattern of megabytes": set_group(targets=["re:" + "x" * 10**6]),
    "a size that is text": set_group(weights={"num_bits": 8, "type": "float", "group_size": "x"}),
    "a size that is a list": set_group(weights={"num_bits": 8, "type": "float", "group_size": [1]}),
    "no groups": ("config.json", lambda d: d["quantization_config"].pop("config_groups")),
    "groups of text": ("config.json", lambda d: d["quantization_config"].update(config_groups={"a": "b"})),
    "a config that is a list": ("config.json", lambda d: d.update(quantization_config=[])),
    "a parent": set_files(lambda file: f"../in/{file}"),
    "an absolute path": set_files(lambda file: "/etc/passwd"),
    "a hidden file": set_files(lambda file: "..safetensors"),
    "a number": set_files(lambda file: 7),
    "no map": ("model.safetensors.index.json", lambda d: d.pop("weight_map")),
    "a map that is a list": ("model.safetensors.index.json", lambda d: d.update(weight_map=[1])),
}


def to_plain(source, out):
    fqt.export.folder(source, out, layout="plain")


@pytest.mark.parametrize("case", CONFIGS)
def test_no_config_names_code_or_paths(case, folder, tmp_path):
    """Formats from a closed list, files within the directory, patterns within seconds; the rest is refused by name."""
    evil = folder / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'called')!r}, 'w')\nclass Compressor: pass\n")
    name, change = CONFIGS[case]
    changed(folder / name, change)
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("{folder}", str(folder)))
    with watched(tmp_path, writes=tmp_path, seconds=60):
        message = message_of(ValueError, to_plain, folder, tmp_path / "out")
    assert len(message) < 2000
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / "out").exists()


PARTS = {
    "a scale of more rows": lambda t: t.update({"a.weight_scale": torch.ones(3000, 1)}),
    "a scale of more columns": lambda t: t.update({"a.weight_scale": torch.ones(1, 3000)}),
    "a scale of three dims": lambda t: t.update({"a.weight_scale": torch.ones(2, 32, 32)}),
    "scales in a row": lambda t: t.update({"a.weight_scale": torch.ones(32)}),
    "codes of three dims": lambda t: t.update({"a.weight": torch.zeros(2, 32, 32).to(torch.float8_e4m3fn)}),
    "another shape": lambda t: t.update({"a.weight_shape": torch.tensor([2**30, 2**30])}),
}


@pytest.mark.parametrize("case", PARTS)
def test_scales_do_not_make_a_weight_larger(case, folder, tmp_path):
    """Codes of kilobytes and scales of kilobytes are no weight of gigabytes: shapes fit before anything is made."""
    tensors = {"a.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    fqt.export.folder(folder, tmp_path / "good", layout="plain")
    PARTS[case](tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with watched(tmp_path, writes=tmp_path):
        message = message_of(ValueError, to_plain, folder, tmp_path / "out")
    assert_names(message, str(folder), "module 'a': found")


def test_patterns_have_seconds(monkeypatch):
    """A pattern that backtracks for hours is given up, whichever of many modules it meets."""
    from fq_transforms.export.layouts import compressed_tensors

    monkeypatch.setattr(compressed_tensors, "MOST_SECONDS", 0.5)

    class Scheme:
        targets = ("re:^(a|a)+$",)

    with watched():
        message = message_of(ValueError, compressed_tensors._schemes_of, [*["a"] * 9, "a" * 60 + "b"], [Scheme()])
    assert_names(message, "0.5 seconds", "(a|a)+")

    class Many:
        targets = ("Linear", *(f"re:.*x{i}" for i in range(400)))

    with watched():  # none of which takes long
        message = message_of(ValueError, compressed_tensors._schemes_of, [f"m{i}" for i in range(10**5)], [Many()])
    assert_names(message, "0.5 seconds")


def test_not_json(folder, tmp_path):
    for name in ("config.json", "model.safetensors.index.json"):
        kept = (folder / name).read_bytes()
        for content in (b"", b"[" * 10**6, b'{"a": 1, "a": 2}', b"\xff", b"7", kept[:-9]):
            (folder / name).write_bytes(content)
            assert_names(message_of(ValueError, to_plain, folder, tmp_path / "out"), name)
        (folder / name).write_bytes(kept)
