"""What a checkpoint says of itself against what is wanted: group, leaf and kind are named, and nothing is changed."""

import dataclasses
import os
import pickle
import warnings

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint.dcp_files import Writer, read_metadata
from fq_transforms.checkpoint.manifest import STATE
from fq_transforms.checkpoint.storage import seal_of
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import KINDS, assert_same, files_below, load_as, of, packed_of, save_as, small

A, B, C = ({"a": fqt.FP8}, {"a": fqt.FP8, "b": fqt.FP8}, {"a": fqt.FP8, "c": fqt.FP8})
NARROW = dataclasses.replace(fqt.FP8, element=dataclasses.replace(fqt.FP8.element, max=240.0))

# stored, wanted, and what the message says.
MISMATCHES = {
    "missing": (of(A), of(B), ("missing 1 of 2 groups: ['b.experts.*.w']",)),
    "extra": (of(B), of(A), ("found 1 unexpected groups: ['b.experts.*.w']",)),
    "renamed": (of(B), of(C), ("missing 1 of 2 groups: ['c.experts.*.w']",)),
    "experts": (of(A, 8), of(A, 4), ("group 'a.experts.*.w': found 8 experts, wanted 4",)),
    "shape": (
        of({"a": fqt.INT8_PER_CHANNEL}),
        of({"a": fqt.INT8_PER_CHANNEL}, shape=(64, 256)),
        ("group 'a.experts.*.w': found (out, in) = (128, 256), wanted (64, 256)",),
    ),
    "format": (of(A), of({"a": fqt.INT8}), ("group 'a.experts.*.w': found format FP8, wanted INT8",)),
    "numbers": (of(A), of({"a": NARROW}), ("found format FP8 with element=", "448.0", "wanted element=", "240.0")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MISMATCHES)
def test_another_spec(kind, name, tmp_path):
    """A group too few or too many, other experts, shapes, formats, or numbers of a format: ValueError of the group."""
    (fq, state), (wanted_fq, wanted), fragments = MISMATCHES[name]
    save_as(kind, tmp_path / "a", fq, state)
    message = message_of(ValueError, load_as, kind, tmp_path / "a", wanted_fq, wanted)
    assert_names(message, str(tmp_path / "a"), *fragments)


@pytest.mark.parametrize("kind", KINDS)
def test_like_of_another_spec(kind, tmp_path):
    """`like` and `fq` must fit each other: a leaf that is missing, or of another shape, is named."""
    fq, state = of(B)
    save_as(kind, tmp_path / "a", fq, state)
    small_like = {**state, "a.experts.*.w": {"amax": torch.zeros(3)}}
    message = message_of(ValueError, load_as, kind, tmp_path / "a", fq, small_like)
    assert_names(message, "state 'a.experts.*.w.amax': found (3,)", "wanted (4,)")
    short = {"a.experts.*.w": state["a.experts.*.w"]}
    error = {"directory": KeyError, "file": ValueError}[kind]
    assert_names(message_of(error, load_as, kind, tmp_path / "a", fq, short), "'b.experts.*.w'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, -1.0, torch.inf, -torch.inf])
def test_invalid_amax(kind, value, tmp_path, monkeypatch):
    """NaN, negative, infinite and uncalibrated amax are neither written nor read; leaf and expert are named."""
    fq, state, _ = small(fqt.INT8_PER_CHANNEL)
    state["experts.*.w"]["amax"][2, 5] = value
    fragments = ("state 'experts.*.w.amax'", f"found {value} for 'experts.2.w' at [5, 0]", "wanted a finite amax >= 0")
    assert_names(message_of(ValueError, save_as, kind, tmp_path / "a", fq, state), *fragments)
    assert os.listdir(tmp_path) == []

    unchecked = dataclasses.replace(STATE, check=lambda *_, **__: None)
    with monkeypatch.context() as patch:  # as another program might write it
        patch.setattr("fq_transforms.checkpoint.dcp.kind_of", lambda _: unchecked)
        patch.setattr("fq_transforms.checkpoint.safetensors.STATE", unchecked)
        save_as(kind, tmp_path / "a", fq, state)
    assert_names(message_of(ValueError, load_as, kind, tmp_path / "a", fq, state), str(tmp_path / "a"), *fragments)


def test_state_that_does_not_fit(tmp_path):
    """A state without a group, with another's leaf, or on meta is refused before anything is written."""
    fq, state = of(B)
    for kind in KINDS:
        one = {"a.experts.*.w": state["a.experts.*.w"]}
        assert_names(message_of(KeyError, save_as, kind, tmp_path / "a", fq, one), "'b.experts.*.w'")
        wrong = {**state, "b.experts.*.w": {"amax": torch.zeros(5)}}
        assert_names(message_of(ValueError, save_as, kind, tmp_path / "a", fq, wrong), "(5,)", "(4,)")
        meta = optree.tree_map(lambda leaf: leaf.to("meta"), state)
        assert_names(message_of(ValueError, save_as, kind, tmp_path / "a", fq, meta), "meta")
    assert os.listdir(tmp_path) == []


def test_metadata_of_another_program(tmp_path):
    """Metadata that is whole, but whose leaves are not those of its Spec, or lie elsewhere: refused, by name."""
    fq, state = of(B)
    checkpoint.save(tmp_path / "a", fq, state)
    file, name = tmp_path / "a" / ".metadata", "a.experts.*.w.amax"
    original = file.read_bytes()

    def message(change):
        file.write_bytes(original)
        metadata = read_metadata(tmp_path / "a")
        change(metadata, metadata.state_dict_metadata)
        content = pickle.dumps(metadata)
        file.write_bytes(content + seal_of(content))
        return message_of(ValueError, checkpoint.load, tmp_path / "a", fq, like=state)

    def short(metadata, leaves):
        del leaves[name]

    def more(metadata, leaves):
        leaves["c.amax"] = leaves[name]

    def resized(metadata, leaves):
        leaves[name].size = torch.Size([5])

    def half(metadata, leaves):
        leaves[name].properties.dtype = torch.float16

    def not_a_tensor(metadata, leaves):
        leaves[name] = BytesStorageMetadata()

    def elsewhere(metadata, leaves):
        for where in metadata.storage_data.values():
            where.relative_path = f"../a/{where.relative_path}"

    def unstored(metadata, leaves):
        leaves[name].chunks = []

    def other_kind(metadata, leaves):
        metadata.planner_data["fq_transforms.kind"] = "activations"

    def other_spec(metadata, leaves):
        metadata.planner_data["fq_transforms.spec"] = b"not zlib"

    for change, fragments in {
        short: ("missing 1 of 2 leaves", name),
        more: ("unexpected 1 of 2 leaves", "c.amax"),
        resized: (f"leaf {name!r}: found (5,) torch.float32, wanted (4,)",),
        half: (f"leaf {name!r}: found (4,) torch.float16", "wanted (4,) torch.float32"),
        not_a_tensor: (f"leaf {name!r}: found bytes, wanted a tensor",),
        elsewhere: ("found the data file '../a/", "wanted one that save has written"),
        unstored: (f"leaf {name!r}: found 0 chunks such as []", "wanted all numbers of (4,), each once", "incomplete"),
        other_kind: ("found a checkpoint of 'activations'", "['state', 'packed']"),
        other_spec: ("not a stored Spec",),
    }.items():
        assert_names(message(change), str(tmp_path / "a"), *fragments)
    file.write_bytes(original)
    assert_same(checkpoint.load(tmp_path / "a", fq, like=state), state)


def test_the_kind_is_compared(tmp_path):
    """Loaded as the other kind, or saved over it: an error that says what there is and how to load it."""
    fq, state, params = small(fqt.NVFP4)
    packed = packed_of(fq, params)
    checkpoint.save(tmp_path / "state", fq, state)
    checkpoint.save(tmp_path / "packed", fq, packed)
    before = files_below(tmp_path)
    message = message_of(ValueError, checkpoint.load, tmp_path / "state", fq, like=packed)
    assert_names(message, str(tmp_path / "state"), "found a checkpoint of a state, wanted packed weights", "fq.init")
    message = message_of(ValueError, checkpoint.load, tmp_path / "packed", fq, like=state)
    assert_names(message, "found a checkpoint of packed weights, wanted a state", "fq.pack(params, fq.init(params))")
    message = message_of(ValueError, checkpoint.save, tmp_path / "state", fq, packed)
    assert_names(message, "found a checkpoint of a state, which packed weights would replace", "remove it yourself")
    message = message_of(ValueError, checkpoint.save, tmp_path / "packed", fq, state)
    assert_names(message, "found a checkpoint of packed weights, which a state would replace")
    message = message_of(ValueError, checkpoint.save_file, tmp_path / "file", fq, packed)
    assert_names(message, "'experts.*.w'", "found leaves ['codes', 'scale', 'global_scale']", "['amax']")
    assert files_below(tmp_path) == before

    # Metadata that does not say what it holds: a state, as all were once.
    file, metadata = tmp_path / "state" / ".metadata", read_metadata(tmp_path / "state")
    del metadata.planner_data["fq_transforms.kind"]
    content = pickle.dumps(metadata)
    file.write_bytes(content + seal_of(content))
    assert_same(checkpoint.load(tmp_path / "state", fq, like=state), state)
    message = message_of(ValueError, checkpoint.load, tmp_path / "state", fq, like=packed)
    assert_names(message, "found a checkpoint of a state")


def test_a_checkpoint_without_a_spec(tmp_path):
    """Whole and unharmed, but of something else than a state: neither loaded nor replaced."""
    fq, state, _ = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(fqt.state.flatten(state), storage_writer=Writer(tmp_path / "a", is_ours=lambda _: True))
    before = files_below(tmp_path)
    message = message_of(ValueError, checkpoint.load, tmp_path / "a", fq, like=state)
    assert_names(message, "found a checkpoint without a Spec")
    message = message_of(ValueError, checkpoint.save, tmp_path / "a", fq, state)
    assert_names(message, "found a checkpoint of something else than a state")
    assert files_below(tmp_path) == before
