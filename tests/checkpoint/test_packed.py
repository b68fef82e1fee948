"""Checkpoints of packed weights: the same bytes at any sharding, and an error for what does not fit."""

import errno
import os
import pickle
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import dcp as dcp_of_ours
from fq_transforms.checkpoint import dcp_files, storage
from fq_transforms.checkpoint.dcp_files import read_metadata
from fq_transforms.checkpoint.storage import seal_of
from fq_transforms.formats import INT8, IntElement
from fq_transforms.state import flatten, unflatten
from tests.cases import assert_names, message_of, name_of
from tests.checkpoint.samples import (
    FORMATS,
    assert_same,
    damaged,
    files_below,
    like_of,
    packed_of,
    placed,
    sharded,
    whole_params,
)
from tests.checkpoint.samples import small as small_state
from tests.ops.pack.cases import PACKABLE


def small(format=fqt.NVFP4, count=4):
    fq, _, params = small_state(format, count, torch.bfloat16)
    return fq, packed_of(fq, params), params


@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_round_trip(format, tmp_path):
    """load(save(packed)) is packed, byte for byte, onto the CPU from a place on meta; and it unpacks to `fakequant`."""
    fq, packed, params = small(format)
    before = [leaf._version for leaf in flatten(packed).values()]
    checkpoint.save(tmp_path / "packed", fq, packed)
    found = checkpoint.load(tmp_path / "packed", fq, like=like_of(fq, params))
    assert_same(found, packed)
    wanted = fq.fakequant(params, fq.calibrate(params))
    assert all(torch.equal(weight, wanted[name]) for name, weight in fq.unpack(found).items())
    assert [leaf._version for leaf in flatten(packed).values()] == before
    assert not {leaf.data_ptr() for leaf in flatten(found).values()} & {p.data_ptr() for p in flatten(packed).values()}
    assert checkpoint.read_spec(tmp_path / "packed") == fq.spec
    # Another tree of the kind is a place too, and so is it again after a save over the first.
    checkpoint.save(tmp_path / "packed", fq, found)
    assert_same(checkpoint.load(tmp_path / "packed", fq, like=packed), packed)
    assert os.listdir(tmp_path) == ["packed"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(PACKABLE),
    count=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_bytes(format, count, rows, columns, seed, tmp_path_factory):
    """Any byte in any leaf comes back, NaN of every kind among them, whatever the shape: nothing reads the numbers."""
    params = {"experts.w": torch.empty(count, rows, 128 * columns, device="meta")}
    fq, generator = fqt.transform(fqt.select(params, {"*": format})), torch.Generator().manual_seed(seed)
    like = like_of(fq, params)
    leaves = {
        name: torch.randint(256, (leaf.nbytes,), dtype=torch.uint8, generator=generator)
        .view(leaf.dtype)
        .view(leaf.shape)
        for name, leaf in flatten(like).items()
    }
    packed, path = unflatten(leaves, like), tmp_path_factory.mktemp("any") / "packed"
    checkpoint.save(path, fq, packed)
    assert_same(checkpoint.load(path, fq, like=like), packed)


def test_size(tmp_path):
    """NVFP4 in a file is 4.5 bits a weight, codes and scales, and what 16 KiB hold."""
    fq, packed, params = small(fqt.NVFP4)
    checkpoint.save(tmp_path / "a", fq, packed)
    weights = sum(weight.numel() for weight in params.values())
    leaves = sum(leaf.nbytes for leaf in flatten(packed).values())
    assert leaves == weights * 4.5 / 8 + 4 * len(params)
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) <= leaves + 16384


def test_any_reader_of_dcp(tmp_path):
    """DCP's own reader finds every leaf under its flat name, in its own dtype, without this package."""
    fq, packed, _ = small()
    checkpoint.save(tmp_path / "a", fq, packed)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(packed).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=tmp_path / "a")
    assert_same(unflatten(leaves, packed), packed)


def test_large_in_parts(tmp_path, monkeypatch):
    """Above a size: chunks of whole experts, 2^n of them, one file per thread; DCP's reader and the crc32 see it."""
    fq, packed, params = small(count=7)
    monkeypatch.setattr(dcp_of_ours, "CHUNK_BYTES", 5 * 128 * 128)  # of codes: 5 experts, so 4 in a part
    monkeypatch.setattr(storage, "BYTES_PER_THREAD", 2**15)
    path = tmp_path / "a"
    checkpoint.save(path, fq, packed)
    metadata = read_metadata(path)
    chunks = metadata.state_dict_metadata["experts.*.w.codes"].chunks
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [(0, 0, 0, 4, 128, 128), (4, 0, 0, 3, 128, 128)]
    assert len(metadata.state_dict_metadata["experts.*.w.scale"].chunks) == 1
    first = {file.name for file in path.iterdir()}
    assert len(first) == 1 + storage.THREADS
    assert_same(checkpoint.load(path, fq, like=like_of(fq, params)), packed)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(packed).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=path)
    assert_same(unflatten(leaves, packed), packed)
    for file in path.glob("*.distcp"):
        for _ in damaged(file, 4999):
            message = message_of(ValueError, checkpoint.load, path, fq, like=packed)
            assert_names(message, file.name, "truncated, damaged")
    checkpoint.save(path, fq, packed)
    assert {file.name for file in path.iterdir()} & first == {".metadata"}
    assert len(list(path.iterdir())) == len(first)
    # With a disk that is full for one of the threads, what was there before stays.
    before, write = files_below(path), dcp_files._write_chunks

    def full(file, items, planner):
        if file.stem.endswith("_2"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write(file, items, planner)

    monkeypatch.setattr(dcp_files, "_write_chunks", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(path, fq, packed)
    assert caught.value.errno == errno.ENOSPC
    assert files_below(path) == before


# Ranks


def _in_parts(rank, size, folder):
    """Save and load at each parallelism with small parts and files; and what a rank reads of a file for its experts."""
    formats = {name: FORMATS[name] for name in ("a.experts.channel", "b.experts.square", "b.experts.nvfp4")}
    params, read, numbers_in = whole_params(formats=formats), [], dcp_files.numbers_in
    fq = fqt.transform(fqt.select(params, formats))

    def counted(content, *about):
        read.append(len(content))
        return numbers_in(content, *about)

    with mock.patch.object(dcp_of_ours, "CHUNK_BYTES", 2**15), mock.patch.object(storage, "BYTES_PER_THREAD", 2**14):
        trees = [packed_of(fq, placed(params, ep, tp, size)) for ep, tp in ((1, 1), (4, 1), (2, 2))]
        for number, tree in enumerate(trees):
            checkpoint.save(folder / f"{number}", fq, tree)
        for number in range(len(trees)):
            for like in trees:
                assert_same(checkpoint.load(folder / f"{number}", fq, like=like), like)
        params = whole_params(8, {"x.experts.w": fqt.NVFP4})
        fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        checkpoint.save(folder / "whole", fq, packed_of(fq, params))
        torch.distributed.barrier()
        like = packed_of(fq, sharded(params, [Shard(0)], init_device_mesh("cpu", (size,))))
        with mock.patch.object(dcp_files, "numbers_in", counted):
            assert_same(checkpoint.load(folder / "whole", fq, like=like), like)
        return sum(read), sum(leaf.to_local().nbytes for leaf in flatten(like).values())


@pytest.mark.dist
def test_ranks_in_parts(ranks, tmp_path):
    """Large leaves at any sharding to any other; of what one has saved, four read their experts and little more."""
    for read, wanted in ranks(_in_parts, tmp_path, size=4):
        assert wanted < read < wanted + 8 * 2000


# Faults


def test_what_does_not_fit(tmp_path):
    """Groups too few or too many, other shapes, dtypes, types, formats, or no numbers: refused, and nothing is left."""
    fq, packed, params = small()
    key = "experts.*.w"
    leaves = packed[key]
    both = {**params, **{f"other.{name}": weight for name, weight in params.items()}}
    more, static, a = (
        fqt.transform(fqt.select(both, {"*": fqt.NVFP4})),
        fqt.transform(fqt.select(params, {"*": fqt.NVFP4_STATIC})),
        tmp_path / "a",
    )
    fewer = {name: leaf for name, leaf in leaves.items() if name != "global_scale"}
    for error, tree, of, *fragments in [
        (KeyError, packed, more, "'other.experts.*.w'"),
        (ValueError, packed_of(more, both), fq, "['other.experts.*.w']"),
        (ValueError, {key: leaves | {"codes": leaves["codes"][:3]}}, fq, f"packed '{key}.codes'", (3, 128, 128)),
        (ValueError, {key: leaves | {"scale": leaves["scale"].float()}}, fq, f"packed '{key}.scale'", "float32"),
        (ValueError, {key: leaves | {"scale": None}}, fq, f"packed '{key}.scale'", "NoneType"),
        (ValueError, {key: fewer}, fq, f"packed {key!r}", "global_scale"),
        (ValueError, like_of(fq, params), fq, f"packed '{key}.codes'", "meta"),
        (ValueError, packed | {"other.experts.*.w": more.calibrate(both)[key]}, more, "found ['amax']", "codes"),
    ]:
        assert_names(message_of(error, checkpoint.save, a, of, tree), str(a), *fragments)
    assert os.listdir(tmp_path) == []

    checkpoint.save(a, fq, packed)
    checkpoint.save(tmp_path / "b", more, packed_of(more, both))
    for name, like, of, *fragments in [
        ("a", packed_of(more, both), more, "missing 1 of 2 groups", "other.experts.*.w"),
        ("b", packed, fq, "found 1 unexpected groups"),
        ("a", packed_of(static, params), static, "found format NVFP4, wanted NVFP4_STATIC"),
        ("a", {key: leaves | {"codes": leaves["codes"][:, :64]}}, fq, f"packed '{key}.codes'", (4, 64, 128)),
    ]:
        message = message_of(ValueError, checkpoint.load, tmp_path / name, of, like=like)
        assert_names(message, str(tmp_path / name), *fragments)


def test_damaged(tmp_path):
    """Any bit flipped in codes or scales, or an end cut off, is found by the crc32, and leaf and file are named."""
    fq, packed, _ = small(fqt.NVFP4, 1)
    checkpoint.save(tmp_path / "a", fq, packed)
    (data,) = (tmp_path / "a").glob("*.distcp")
    named = set()
    for _ in damaged(data, 211):
        message = message_of(ValueError, checkpoint.load, tmp_path / "a", fq, like=packed)
        assert_names(message, str(tmp_path / "a"), data.name, "truncated, damaged")
        named |= {field for field in packed["experts.*.w"] if f".w.{field}'" in message}
    assert named == set(packed["experts.*.w"])
    assert_same(checkpoint.load(tmp_path / "a", fq, like=packed), packed)


def test_metadata_of_another_program(tmp_path):
    """Metadata that is whole, but of leaves in another dtype or shape, or with a part missing: refused, by name."""
    fq, packed, _ = small()
    checkpoint.save(tmp_path / "a", fq, packed)
    file = tmp_path / "a" / ".metadata"
    original = file.read_bytes()

    def signed(leaves):
        leaves["experts.*.w.codes"].properties.dtype = torch.int8

    def longer(leaves):
        leaves["experts.*.w.scale"].size = torch.Size([4, 128, 17])

    def absent(leaves):
        leaves["experts.*.w.codes"].chunks = []

    def fewer(leaves):
        del leaves["experts.*.w.global_scale"]

    for change, fragments in {
        signed: ("leaf 'experts.*.w.codes': found (4, 128, 128) torch.int8, wanted (4, 128, 128) torch.uint8",),
        longer: ("leaf 'experts.*.w.scale': found (4, 128, 17) torch.float8_e4m3fn, wanted (4, 128, 16)",),
        absent: ("leaf 'experts.*.w.codes': found 0 chunks", "incomplete"),
        fewer: ("missing 1 of 3 leaves", "global_scale"),
    }.items():
        file.write_bytes(original)
        metadata = read_metadata(tmp_path / "a")
        change(metadata.state_dict_metadata)
        content = pickle.dumps(metadata)
        file.write_bytes(content + seal_of(content))
        message = message_of(ValueError, checkpoint.load, tmp_path / "a", fq, like=packed)
        assert_names(message, str(tmp_path / "a"), *fragments)


def _faults_of_ranks(rank, size, folder):
    params, key = whole_params(8, {"x.experts.w": fqt.INT8}), "x.experts.w"
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    state, packed = fq.calibrate(params), packed_of(fq, params)
    other = {key: packed[key] | {"codes": packed[key]["codes"] + int(rank == 1)}}
    # Two codes of 4 bits to a byte: a shard of 3 columns cuts one.
    odd = replace(INT8, name="INT4", element=IntElement(7, -8, 7))
    narrow = {key: torch.ones(2, 4, 3 * size)}
    narrow_fq = fqt.transform(fqt.select(narrow, {"*": odd}))
    mesh = init_device_mesh("cpu", (size,))
    weights, cut = sharded(params, [Shard(0)], mesh), sharded(narrow, [Shard(2)], mesh)
    shards = packed_of(fq, weights)
    said = {}

    def in_chunks_of_an_expert(packed):
        with mock.patch.object(dcp_of_ours, "CHUNK_BYTES", 2**15):
            checkpoint.save(folder / "a", fq, packed)

    for name, call in {
        "kinds": lambda: checkpoint.save(folder / "a", fq, state if rank == 2 else packed),
        "copies": lambda: checkpoint.save(folder / "a", fq, other),
        "mixed": lambda: in_chunks_of_an_expert(other if rank == 1 else shards),
        "cut": lambda: packed_of(narrow_fq, cut),
        "unpack": lambda: fq.unpack(shards),
        "placed": lambda: fq.pack(weights, state),
    }.items():
        with pytest.raises(ValueError) as caught:
            call()
        said[name] = str(caught.value)
    return said, sorted(path.name for path in folder.iterdir())


@pytest.mark.dist
def test_faults_of_ranks(ranks, tmp_path):
    """Ranks that disagree, shards that cut a byte, and DTensors where none can be: the same error on each rank."""
    for said, left in ranks(_faults_of_ranks, tmp_path):
        assert left == []
        assert_names(said["kinds"], "found packed weights on rank 0 and a state on rank 2, wanted one kind")
        assert_names(said["copies"], "packed 'x.experts.w.codes': found different values on ranks 0 and 1")
        assert_names(said["mixed"], "packed 'x.experts.w.codes': found different values on ranks", "wanted the same")
        assert_names(said["cut"], "'x.experts.w'", "0..3 of 12", "cuts a block of 2 of INT4")
        assert_names(said["unpack"], "packed 'x.experts.w.codes': found a DTensor", "unpack each rank's shard")
        assert_names(said["placed"], "state 'x.experts.w.amax': found a plain tensor, wanted a DTensor")
