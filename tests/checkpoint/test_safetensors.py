"""One file of safetensors: its checksum, what others write, and what does not belong into it."""

import json

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint.safetensors import _checksum
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import assert_same, damaged, of, small


def test_a_file_alone_is_enough(tmp_path):
    """Of a file of which nothing is known, the spec that it holds makes the transform that loads it."""
    fq, state, _ = small(fqt.NVFP4_STATIC)
    checkpoint.save_file(tmp_path / "a", fq, state)
    found = fqt.transform(checkpoint.read_spec(tmp_path / "a"))
    assert found == fq
    assert_same(checkpoint.load_file(tmp_path / "a", found), state)


def test_a_directory_is_refused_with_what_reads_it(tmp_path):
    """Kills an IsADirectoryError that does not say which call reads what `save` wrote."""
    fq, state, params = small()
    checkpoint.save(tmp_path / "a", fq, state)
    message = message_of(ValueError, checkpoint.load_file, tmp_path / "a", fq)
    line = "checkpoint.load(path, fq, like=fq.init(params))"
    assert_names(message, str(tmp_path / "a"), "found a directory", line)
    assert_same(checkpoint.load(tmp_path / "a", fq, like=fq.init(params)), state)


def test_damaged_file(tmp_path):
    """Any bit flipped, any end cut off: header, spec, names and numbers are all under the checksum."""
    fq, state, _ = small()
    file = tmp_path / "amax.safetensors"
    checkpoint.save_file(file, fq, state)
    count = 0
    for _ in damaged(file, 3):
        assert_names(message_of(ValueError, checkpoint.load_file, file, fq), str(file))
        count += 1
    assert count > 200
    assert_same(checkpoint.load_file(file, fq), state)


def test_other_safetensors(tmp_path):
    """Safetensors of another program, of another version, or with other leaves are refused, with what was found."""
    fq, state = of({"a": fqt.FP8, "b": fqt.FP8})
    leaves = fqt.state.flatten(state)
    about = {"format": "fq_transforms", "version": "1", "spec": fq.spec.to_json()}

    def message(leaves, about):
        save_file(leaves, tmp_path / "a", about)
        return message_of(ValueError, checkpoint.load_file, tmp_path / "a", fq)

    assert_names(message(leaves, None), "format None, version None")
    assert_names(message(leaves, {**about, "version": "2"}), "version '2', wanted 'fq_transforms', version '1'")
    assert_names(message(leaves, {**about, "spec": "{}", "crc32": _checksum("{}", leaves)}), "not a stored Spec")
    short = {"a.experts.*.w.amax": leaves["a.experts.*.w.amax"]}
    text = json.dumps(json.loads(fq.spec.to_json()))
    assert_names(
        message(short, {**about, "crc32": _checksum(text, short)}), "missing 1 of 2 leaves", "b.experts.*.w.amax"
    )
    more = {**leaves, "c.amax": torch.zeros(1)}
    assert_names(message(more, {**about, "crc32": _checksum(text, more)}), "unexpected 1 of 2 leaves", "c.amax")
    half = {name: leaf.half() for name, leaf in leaves.items()}
    assert_names(message(half, {**about, "crc32": _checksum(text, half)}), "torch.float16", "wanted (4,) torch.float32")


def test_dtensor_in_a_file(tmp_path, monkeypatch):
    """A file is one process's: a DTensor is refused, and the message says what stores it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fq, state, _ = small()
        leaf = DTensor.from_local(state["experts.*.w"]["amax"], init_device_mesh("cpu", (1,)), [Shard(0)])
        message = message_of(ValueError, checkpoint.save_file, tmp_path / "a", fq, {"experts.*.w": {"amax": leaf}})
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # as tests/ranks.py does in its workers
    assert_names(message, "state 'experts.*.w.amax': found a DTensor", "save stores DTensors")
