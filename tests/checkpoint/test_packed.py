"""Checkpoints of packed weights: the same bytes at any sharding, and an error for what does not fit."""

import errno
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import dcp as dcp_of_ours
from fq_transforms.checkpoint import storage
from fq_transforms.formats import INT8, IntElement
from fq_transforms.pack import Packed, packed_leaves
from fq_transforms.partition import Part, leaf_part
from fq_transforms.state import flatten, init, unflatten
from tests.cases import assert_names, experts, message_of, name_of
from tests.checkpoint.test_dcp import PARALLELISM, placed, sharded, whole_params
from tests.checkpoint.test_storage import damaged, tree
from tests.test_pack import PACKABLE

PACKED = {
    "a.experts.channel": fqt.INT8_PER_CHANNEL,
    "a.experts.block": fqt.INT4_BLOCK32,
    "a.experts.fp8": fqt.FP8,
    "a.experts.square": fqt.FP8_BLOCK,
    "b.experts.nvfp4": fqt.NVFP4,
    "b.experts.mxfp4": fqt.MXFP4,
    "b.experts.mxfp6": fqt.MXFP6_E2M3,
}


def bits(tensor):
    """A tensor's numbers as integers of the same size, which are equal where they are NaN too."""
    return tensor.contiguous().view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def assert_same_bytes(found, wanted):
    """Equal trees: keys in order, types, dtypes, placements, and each byte of this rank's part."""
    assert list(found) == list(wanted)
    assert [type(group) for group in found.values()] == [type(group) for group in wanted.values()]
    a, b = flatten(found), flatten(wanted)
    for name in b:
        x, y = a[name], b[name]
        assert (type(x), x.shape, x.dtype) == (type(y), y.shape, y.dtype), name
        if isinstance(x, DTensor):
            assert (x.placements, x.device_mesh) == (y.placements, y.device_mesh), name
            x, y = x.to_local(), y.to_local()
        assert torch.equal(bits(x), bits(y)), name


def packed_of(params, spec):
    return fqt.pack(params, fqt.calibrate(params, spec=spec), spec=spec)


def place_of(params, spec):
    """A skeleton to load into: `pack` of parameters on meta."""
    meta = {name: torch.empty_like(weight, device="meta") for name, weight in params.items()}
    return fqt.pack(meta, init(meta, spec=spec), spec=spec)


def small(format=fqt.NVFP4, count=4):
    params = {f"experts.{i}.w": w for i, w in enumerate(experts(count, (128, 256), torch.bfloat16))}
    spec = fqt.select(params, {"*": format})
    return spec, packed_of(params, spec), params


@pytest.mark.parametrize("format", PACKABLE, ids=name_of)
def test_round_trip(format, tmp_path):
    """load(save(packed)) is packed, byte for byte, onto the CPU from a place on meta; and it unpacks to `fakequant`."""
    spec, packed, params = small(format)
    fq = fqt.transform(spec)
    before = [leaf._version for leaf in flatten(packed).values()]
    checkpoint.save(packed, tmp_path / "packed", spec=spec)
    found = checkpoint.load(tmp_path / "packed", like=place_of(params, spec), spec=spec)
    assert_same_bytes(found, packed)
    wanted = fq.fakequant(params, fq.calibrate(params))
    assert all(torch.equal(weight, wanted[name]) for name, weight in fq.unpack(found).items())
    assert [leaf._version for leaf in flatten(packed).values()] == before
    assert not {leaf.data_ptr() for leaf in flatten(found).values()} & {p.data_ptr() for p in flatten(packed).values()}
    assert checkpoint.read_spec(tmp_path / "packed") == spec
    # Another tree of the kind is a place too, and so is it again after a save over the first.
    checkpoint.save(found, tmp_path / "packed", spec=spec)
    assert_same_bytes(checkpoint.load(tmp_path / "packed", like=packed, spec=spec), packed)
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
    spec = fqt.select({"experts.w": torch.empty(count, rows, 128 * columns, device="meta")}, {"*": format})
    generator = torch.Generator().manual_seed(seed)
    like = place_of({"experts.w": torch.empty(count, rows, 128 * columns)}, spec)
    leaves = {
        name: torch.randint(256, (leaf.nbytes,), dtype=torch.uint8, generator=generator)
        .view(leaf.dtype)
        .view(leaf.shape)
        for name, leaf in flatten(like).items()
    }
    packed, path = unflatten(leaves, like), tmp_path_factory.mktemp("any") / "packed"
    checkpoint.save(packed, path, spec=spec)
    assert_same_bytes(checkpoint.load(path, like=like, spec=spec), packed)


def test_size(tmp_path):
    """NVFP4 in a file is 4.5 bits a weight, codes and scales, and what 16 KiB hold."""
    spec, packed, params = small(fqt.NVFP4)
    checkpoint.save(packed, tmp_path / "a", spec=spec)
    weights = sum(weight.numel() for weight in params.values())
    leaves = sum(leaf.nbytes for leaf in flatten(packed).values())
    assert leaves == weights * 4.5 / 8 + 4 * len(params)
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) <= leaves + 16384


def test_any_reader_of_dcp(tmp_path):
    """DCP's own reader finds every leaf under its flat name, in its own dtype, without this package."""
    spec, packed, _ = small()
    checkpoint.save(packed, tmp_path / "a", spec=spec)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(packed).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=tmp_path / "a")
    assert_same_bytes(unflatten(leaves, packed), packed)


def test_large_in_parts(tmp_path, monkeypatch):
    """Above a size: parts of whole experts, 2^n of them, in a file a thread; any reader of DCP and the crc32 see it."""
    spec, packed, params = small(count=7)
    monkeypatch.setattr(dcp_of_ours, "PART", 5 * 128 * 128)  # of codes: 5 experts, so 4 in a part
    monkeypatch.setattr(storage, "BYTES_A_THREAD", 2**15)
    path = tmp_path / "a"
    checkpoint.save(packed, path, spec=spec)
    metadata = storage.read_metadata(path)
    chunks = metadata.state_dict_metadata["experts.*.w.codes"].chunks
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [(0, 0, 0, 4, 128, 128), (4, 0, 0, 3, 128, 128)]
    assert len(metadata.state_dict_metadata["experts.*.w.scale"].chunks) == 1
    first = {file.name for file in path.iterdir()}
    assert len(first) == 1 + storage.THREADS
    assert_same_bytes(checkpoint.load(path, like=place_of(params, spec), spec=spec), packed)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(packed).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=path)
    assert_same_bytes(unflatten(leaves, packed), packed)
    for file in path.glob("*.distcp"):
        for _ in damaged(file, 4999):
            message = message_of(ValueError, checkpoint.load, path, like=packed, spec=spec)
            assert_names(message, file.name, "truncated, damaged")
    checkpoint.save(packed, path, spec=spec)
    assert {file.name for file in path.iterdir()} & first == {".metadata"}
    assert len(list(path.iterdir())) == len(first)
    # With a disk that is full for one of the threads, what was there before stays.
    before, write = tree(path), storage._write_parts

    def full(file, items, planner):
        if file.stem.endswith("_2"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write(file, items, planner)

    monkeypatch.setattr(storage, "_write_parts", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(packed, path, spec=spec)
    assert caught.value.errno == errno.ENOSPC
    assert tree(path) == before


# Ranks


def _in_parts(rank, size, folder):
    """Save and load at each parallelism with small parts and files; and what a rank reads of a file for its experts."""
    fitting, tensor_of, read = [(1, 1), (4, 1), (2, 2)], storage._tensor_of, []

    def counted(part, what):
        read.append(len(part))
        return tensor_of(part, what)

    with mock.patch.object(dcp_of_ours, "PART", 2**15), mock.patch.object(storage, "BYTES_A_THREAD", 2**14):
        _save_at(rank, size, folder, fitting)
        torch.distributed.barrier()
        _load_at(rank, size, folder, fitting)
        params = whole_params(8, {"x.experts.w": fqt.NVFP4})
        spec = fqt.select(params, {"*": fqt.NVFP4})
        whole = packed_of(params, spec)
        checkpoint.save(whole, folder / "whole", spec=spec)
        torch.distributed.barrier()
        like = packed_of(sharded(params, [Shard(0)], init_device_mesh("cpu", (size,))), spec)
        with mock.patch.object(storage, "_tensor_of", counted):
            assert_same_bytes(checkpoint.load(folder / "whole", like=like, spec=spec), like)
        return sum(read), sum(leaf.to_local().nbytes for leaf in flatten(like).values())


@pytest.mark.dist
def test_ranks_in_parts(ranks, tmp_path):
    """Large leaves at any sharding to any other; of what one has saved, four read their experts and little more."""
    for read, wanted in ranks(_in_parts, tmp_path, size=4):
        assert wanted < read < wanted + 8 * 2000


def _save_at(rank, size, folder, parallelism):
    params = whole_params(formats=PACKED)
    spec = fqt.select(params, PACKED)
    for ep, tp in parallelism:
        checkpoint.save(packed_of(placed(params, ep, tp, size), spec), Path(folder, f"{size}-{ep}-{tp}"), spec=spec)


def _load_at(rank, size, folder, parallelism):
    params = whole_params(formats=PACKED)
    spec = fqt.select(params, PACKED)
    whole = packed_of(params, spec)
    paths = sorted(path for path in Path(folder).iterdir() if path.name[0] != ".")
    for ep, tp in parallelism:
        weights = placed(params, ep, tp, size)
        wanted = packed_of(weights, spec)
        # What a rank packs of its shard is its part of what one process packs.
        for name, leaf in flatten(wanted).items():
            part = distribute_tensor(flatten(whole)[name], leaf.device_mesh, leaf.placements, src_data_rank=None)
            assert torch.equal(bits(leaf.to_local()), bits(part.to_local())), name
        for number, path in enumerate(paths):
            like = place_of(weights, spec) if number % 2 else wanted
            assert_same_bytes(checkpoint.load(path, like=like, spec=spec), wanted)
    assert_same_bytes(checkpoint.load(paths[-1], like=place_of(params, spec), spec=spec), whole)
    return [path.name for path in paths]


@pytest.mark.dist
def test_any_parallelism_to_any_other(ranks, tmp_path):
    """Packed and saved at EP and TP by 1, 2 and 4 ranks, loaded at EP and TP: the bytes that each rank would pack."""
    fitting = {size: [(ep, tp) for ep, tp in PARALLELISM if size % (ep * tp) == 0] for size in (1, 2, 4)}
    for size, parallelism in fitting.items():
        ranks(_save_at, tmp_path, parallelism, size=size)
    for size, parallelism in fitting.items():
        saved = ranks(_load_at, tmp_path, parallelism, size=size)
        assert [len(names) for names in saved] == [1 + 3 + 5] * size
    params = whole_params(formats=PACKED)
    spec = fqt.select(params, PACKED)
    for path in tmp_path.iterdir():
        assert_same_bytes(checkpoint.load(path, like=place_of(params, spec), spec=spec), packed_of(params, spec))


def _odd_shardings(rank, size, folder):
    """Shards of unequal size, empty ones, an axis that a scale collapses, and each rank's own experts, packed alone."""
    mesh, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))
    formats = {"x.experts.channel": fqt.INT8_PER_CHANNEL, "x.experts.fp8": fqt.FP8, "x.experts.nvfp4": fqt.NVFP4}
    for count, out in ((1, 2), (3, 128), (5, 3)):
        params = {name: weight[:, :out].contiguous() for name, weight in whole_params(count, formats).items()}
        spec = fqt.select(params, formats)
        whole, path = packed_of(params, spec), Path(folder, f"{count}")
        for on, placements in (
            (mesh, [Shard(0)]),
            (mesh, [Shard(1)]),
            (mesh, [Shard(2)]),
            (square, [Shard(0), Shard(0)]),
            (square, [Shard(0), Shard(1)]),
            (square, [Replicate(), Shard(2)]),
        ):
            packed = packed_of(sharded(params, placements, on), spec)
            checkpoint.save(packed, path, spec=spec)  # replaces the one before
            assert_same_bytes(checkpoint.load(path, like=place_of(params, spec), spec=spec), whole)
            assert_same_bytes(checkpoint.load(path, like=packed, spec=spec), packed)

    # Plain weights, as engines hold them: what each rank packs of its own experts is its shard.
    params = whole_params(8, formats)
    spec = fqt.select(params, formats)
    here = {name: weight.chunk(size)[rank] for name, weight in params.items()}
    own = packed_of(here, fqt.select(here, formats))
    leaves = {name: DTensor.from_local(leaf, mesh, [Shard(0)]) for name, leaf in flatten(own).items()}
    checkpoint.save(_typed(leaves, spec), Path(folder, "own"), spec=spec)
    assert_same_bytes(
        checkpoint.load(Path(folder, "own"), like=place_of(params, spec), spec=spec), packed_of(params, spec)
    )


def _typed(leaves, spec):
    """The tree of flat leaves, by the fields that the spec's groups have."""
    types = {2: Packed, 3: fqt.PackedTwoLevel}
    groups = {group.key: [leaves[f"{group.key}.{field}"] for field in packed_leaves(group)] for group in spec.groups}
    return {key: types[len(found)](*found) for key, found in groups.items()}


@pytest.mark.dist
def test_odd_shardings(ranks, tmp_path):
    """Uneven and empty shards of every axis: exact, too; and plain tensors that are given their placements by hand."""
    ranks(_odd_shardings, tmp_path)


# Faults


def test_a_state_is_not_packed(tmp_path):
    """Loaded as the other kind, or saved over it: an error that says what there is and how to load it."""
    spec, packed, params = small()
    state = fqt.calibrate(params, spec=spec)
    checkpoint.save(state, tmp_path / "state", spec=spec)
    checkpoint.save(packed, tmp_path / "packed", spec=spec)
    before = tree(tmp_path)
    message = message_of(ValueError, checkpoint.load, tmp_path / "state", like=packed, spec=spec)
    assert_names(message, str(tmp_path / "state"), "found a checkpoint of a state, wanted packed weights", "fq.init")
    message = message_of(ValueError, checkpoint.load, tmp_path / "packed", like=state, spec=spec)
    assert_names(message, "found a checkpoint of packed weights, wanted a state", "fq.pack(params, fq.init(params))")
    message = message_of(ValueError, checkpoint.save, packed, tmp_path / "state", spec=spec)
    assert_names(message, "found a checkpoint of a state, which packed weights would replace", "remove it yourself")
    message = message_of(ValueError, checkpoint.save, state, tmp_path / "packed", spec=spec)
    assert_names(message, "found a checkpoint of packed weights, which a state would replace")
    message = message_of(ValueError, checkpoint.save_file, packed, tmp_path / "file", spec=spec)
    assert_names(message, "'experts.*.w'", "PackedTwoLevel", "ExpertAmax")
    assert tree(tmp_path) == before


def test_a_checkpoint_from_before_packed_ones_is_of_a_state(tmp_path):
    """Metadata that does not say what it holds: a state, as all were."""
    from fq_transforms.checkpoint.storage import read_metadata, sealed

    spec, packed, params = small()
    state, file = fqt.calibrate(params, spec=spec), tmp_path / "a" / ".metadata"
    checkpoint.save(state, tmp_path / "a", spec=spec)
    metadata = read_metadata(tmp_path / "a")
    del metadata.planner_data["fq_transforms.kind"]
    content = pickle.dumps(metadata)
    file.write_bytes(content + sealed(content))
    found = checkpoint.load(tmp_path / "a", like=state, spec=spec)
    assert torch.equal(found["experts.*.w"].amax, state["experts.*.w"].amax)
    message = message_of(ValueError, checkpoint.load, tmp_path / "a", like=packed, spec=spec)
    assert_names(message, "found a checkpoint of a state")


def test_what_does_not_fit(tmp_path):
    """Groups too few or too many, other shapes, dtypes, types, formats, or no numbers: refused, and nothing is left."""
    spec, packed, params = small()
    key = "experts.*.w"
    leaves = packed[key]
    both = {**params, **{f"other.{name}": weight for name, weight in params.items()}}
    more = fqt.select(both, {"*": fqt.NVFP4})
    static = fqt.select(params, {"*": fqt.NVFP4_STATIC})
    for error, tree_, of, *fragments in [
        (KeyError, packed, more, "'other.experts.*.w'"),
        (ValueError, packed_of(both, more), spec, "['other.experts.*.w']"),
        (ValueError, {key: leaves._replace(codes=leaves.codes[:3])}, spec, f"packed '{key}.codes'", (3, 128, 128)),
        (ValueError, {key: leaves._replace(scale=leaves.scale.float())}, spec, f"packed '{key}.scale'", "float32"),
        (ValueError, {key: leaves._replace(scale=None)}, spec, f"packed '{key}.scale'", "NoneType"),
        (ValueError, {key: Packed(*leaves[:2])}, spec, f"packed {key!r}", "global_scale"),
        (ValueError, place_of(params, spec), spec, f"packed '{key}.codes'", "meta"),
        (ValueError, {**packed, "other.experts.*.w": fqt.calibrate(both, spec=more)[key]}, more, "ExpertAmax"),
    ]:
        assert_names(
            message_of(error, checkpoint.save, tree_, tmp_path / "a", spec=of), str(tmp_path / "a"), *fragments
        )
    assert os.listdir(tmp_path) == []

    checkpoint.save(packed, tmp_path / "a", spec=spec)
    checkpoint.save(packed_of(both, more), tmp_path / "b", spec=more)
    for name, like, of, *fragments in [
        ("a", packed_of(both, more), more, "missing 1 of 2 groups", "other.experts.*.w"),
        ("b", packed, spec, "found 1 groups that the spec has not"),
        ("a", packed_of(params, static), static, "found format NVFP4, wanted NVFP4_STATIC"),
        ("a", {key: leaves._replace(codes=leaves.codes[:, :64])}, spec, f"packed '{key}.codes'", (4, 64, 128)),
    ]:
        message = message_of(ValueError, checkpoint.load, tmp_path / name, like=like, spec=of)
        assert_names(message, str(tmp_path / name), *fragments)


def test_damaged(tmp_path):
    """Any bit flipped in codes or scales, or an end cut off, is found by the crc32, and leaf and file are named."""
    spec, packed, _ = small(fqt.NVFP4, 1)
    checkpoint.save(packed, tmp_path / "a", spec=spec)
    (data,) = (tmp_path / "a").glob("*.distcp")
    named = set()
    for _ in damaged(data, 211):
        message = message_of(ValueError, checkpoint.load, tmp_path / "a", like=packed, spec=spec)
        assert_names(message, str(tmp_path / "a"), data.name, "truncated, damaged")
        named |= {field for field in packed["experts.*.w"]._fields if f".w.{field}'" in message}
    assert named == set(packed["experts.*.w"]._fields)
    assert_same_bytes(checkpoint.load(tmp_path / "a", like=packed, spec=spec), packed)


def test_metadata_of_another_program(tmp_path):
    """Metadata that is whole, but of leaves in another dtype or shape, or with a part missing: refused, by name."""
    from fq_transforms.checkpoint.storage import read_metadata, sealed

    spec, packed, _ = small()
    checkpoint.save(packed, tmp_path / "a", spec=spec)
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
        absent: ("leaf 'experts.*.w.codes': found 0 of the 65536 numbers", "incomplete"),
        fewer: ("missing 1 of 3 leaves", "global_scale"),
    }.items():
        file.write_bytes(original)
        metadata = read_metadata(tmp_path / "a")
        change(metadata.state_dict_metadata)
        content = pickle.dumps(metadata)
        file.write_bytes(content + sealed(content))
        message = message_of(ValueError, checkpoint.load, tmp_path / "a", like=packed, spec=spec)
        assert_names(message, str(tmp_path / "a"), *fragments)


def _faults_of_ranks(rank, size, folder):
    params = whole_params(8, {"x.experts.w": fqt.INT8})
    spec = fqt.select(params, {"*": fqt.INT8})
    state, packed = fqt.calibrate(params, spec=spec), packed_of(params, spec)
    other = {"x.experts.w": packed["x.experts.w"]._replace(codes=packed["x.experts.w"].codes + int(rank == 1))}
    # Two codes of 4 bits to a byte: a shard of 3 columns cuts one.
    odd = replace(INT8, name="INT4", element=IntElement(7, -8, 7))
    narrow = {"x.experts.w": torch.ones(2, 4, 3 * size)}
    narrow_spec = fqt.select(narrow, {"*": odd})
    mesh = init_device_mesh("cpu", (size,))
    cut = sharded(narrow, [Shard(2)], mesh)
    shards = packed_of(sharded(params, [Shard(0)], mesh), spec)
    said = {}

    def in_parts_of_an_expert(packed):
        with mock.patch.object(dcp_of_ours, "PART", 2**15):
            checkpoint.save(packed, folder / "a", spec=spec)

    for name, call in {
        "kinds": lambda: checkpoint.save(state if rank == 2 else packed, folder / "a", spec=spec),
        "copies": lambda: checkpoint.save(other, folder / "a", spec=spec),
        "mixed": lambda: in_parts_of_an_expert(other if rank == 1 else shards),
        "cut": lambda: packed_of(cut, narrow_spec),
        "unpack": lambda: fqt.unpack(packed_of(sharded(params, [Shard(0)], mesh), spec), spec=spec),
        "placed": lambda: fqt.pack(sharded(params, [Shard(0)], mesh), state, spec=spec),
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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(PACKABLE),
    splits=st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    unit=st.sampled_from([128, 256]),
    data=st.data(),
)
def test_parts_of_packed_leaves(format, splits, unit, data):
    """The part of a leaf that `leaf_part` gives has the shape that packing the part of the weights has, and tiles."""
    whole = (4, 4 * unit, 4 * unit)
    index = [data.draw(st.integers(0, count - 1)) for count in splits]
    shape = tuple(size // count for size, count in zip(whole, splits, strict=True))
    offset = tuple(i * size for i, size in zip(index, shape, strict=True))
    group = fqt.select({"experts.w": torch.empty(shape, device="meta")}, {"*": format}).groups[0]
    wholes = packed_leaves(fqt.select({"experts.w": torch.empty(whole, device="meta")}, {"*": format}).groups[0])
    for field, (wanted, _) in packed_leaves(group).items():
        part = leaf_part(Part(whole, offset, shape), format, field, "experts.w")
        assert part.shape == wanted
        assert part.whole == wholes[field][0]
        for axis, (size, start) in enumerate(zip(part.shape, part.offset, strict=True)):
            assert start == (index[axis] * size if part.whole[axis] != size else 0)
