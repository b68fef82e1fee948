"""`Stateful`: a state beside the model in the user's own DCP checkpoint, at any world size, with its formats."""

import warnings
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fq_transforms as fqt
from fq_transforms.checkpoint import Stateful
from fq_transforms.state import flatten
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import FORMATS, assert_same, bits, packed_of, sharded, small, whole_params


def save(path, **entries):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(entries, checkpoint_id=path)


def load(path, **entries):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(entries, checkpoint_id=path)


def zeros(tree):
    return {key: {name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for key, leaves in tree.items()}


def test_it_is_what_dcp_calls_stateful():
    fq, state, _ = small()
    assert isinstance(Stateful(fq, state), dcp.stateful.Stateful)


@pytest.mark.parametrize("kind", ["state", "packed"])
def test_round_trip_beside_a_model(kind, tmp_path):
    """Every format in one checkpoint with a model: what is loaded is what was saved, leaf by leaf, bit by bit."""
    torch.manual_seed(0)
    params = whole_params(3)
    fq = fqt.transform(fqt.select(params, FORMATS))
    tree = fq.calibrate(params) if kind == "state" else packed_of(fq, params)
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    save(tmp_path, model=model, fq=Stateful(fq, tree))
    kept = Stateful(fq, fq.init(params) if kind == "state" else zeros(tree))
    load(tmp_path, model=other, fq=kept)
    assert_same(kept.tree, tree)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("format", [fqt.INT8, replace(fqt.FP8, element=replace(fqt.FP8.element, max=416.0))])
def test_another_format_is_refused(format, tmp_path):
    """Leaves of the same shapes, another meaning: a bare state would load."""
    fq, state, params = small(fqt.FP8)
    save(tmp_path, fq=Stateful(fq, state))
    other = fqt.transform(fqt.select(params, {"*": format}))
    kept = Stateful(other, other.init(params))
    with pytest.raises(ValueError) as caught:
        load(tmp_path, fq=kept)
    assert_names(str(caught.value), "experts.*.w", "FP8", "in the checkpoint")
    mine = Stateful(other, other.calibrate({name: 3 * weight for name, weight in params.items()}))
    before = {name: leaf.clone() for name, leaf in flatten(mine.tree).items()}
    with pytest.raises(ValueError):
        load(tmp_path, fq=mine)
    assert all(torch.equal(leaf, before[name]) for name, leaf in flatten(mine.tree).items())


def test_a_bare_state_is_not_taken_for_one(tmp_path):
    fq, state, params = small(fqt.FP8)
    save(tmp_path, fq=state)
    with pytest.raises(CheckpointException, match="format"):
        load(tmp_path, fq=Stateful(fq, fq.init(params)))
    assert_names(message_of(KeyError, Stateful(fq, state).load_state_dict, state), "experts.*.w", "format")


def test_bad_values_are_refused_both_ways(tmp_path):
    """NaN, infinite, negative, and a state calibrated in part, before a byte is written; and when they come in."""
    fq, state, params = small(fqt.FP8)
    entries = Stateful(fq, state).state_dict()
    for value in (torch.nan, torch.inf, -1.0, -torch.inf):
        bad = {"experts.*.w": {"amax": state["experts.*.w"]["amax"].clone()}}
        bad["experts.*.w"]["amax"][2] = value
        message_of(ValueError, Stateful(fq, bad).state_dict)
        with pytest.raises(ValueError):
            save(tmp_path / "a", fq=Stateful(fq, bad))
        kept = Stateful(fq, fq.init(params))
        loaded = {"experts.*.w": {**entries["experts.*.w"], "amax": bad["experts.*.w"]["amax"]}}
        message_of(ValueError, kept.load_state_dict, loaded)
        assert bool(torch.isinf(kept.tree["experts.*.w"]["amax"]).all())
    two = fqt.transform(fqt.select({**params, "other": torch.ones(32, 32)}, {"*": fqt.FP8}))
    message_of(KeyError, Stateful, two, state)


def _placements(rank, size, folder, saves):
    mesh = init_device_mesh("cpu", (size,))
    params = sharded(whole_params(12), [Shard(0)], mesh)
    fq = fqt.transform(fqt.select(params, FORMATS))
    state = fq.calibrate(params)
    if saves:
        kept, other = Stateful(fq, state), Stateful(fq, {k: {n: 2 * t for n, t in g.items()} for k, g in state.items()})
        save(f"{folder}/sync", fq=kept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pending = dcp.async_save({"fq": other}, checkpoint_id=f"{folder}/async")
        assert isinstance(pending, Future)
        pending.result()
    for name, times in (("sync", 1), ("async", 2)):
        kept = Stateful(fq, fq.init(params))
        load(f"{folder}/{name}", fq=kept)
        for leaf, wanted in zip(flatten(kept.tree).values(), flatten(state).values(), strict=True):
            assert torch.equal(bits(leaf.to_local()), bits(times * wanted.to_local()))
    return len(flatten(state))


@pytest.mark.dist
def test_any_world_size_to_any_other(ranks, tmp_path):
    """Saved by 2 ranks, synchronously and not, and loaded by 1, 2, 3 and 4; each rank has its own experts' values."""
    counts = ranks(_placements, str(tmp_path), True, size=2)
    assert counts == [7, 7]
    for size in (1, 2, 3, 4):
        assert ranks(_placements, str(tmp_path), False, size=size) == counts[:1] * size


def _stages(rank, size, folder):
    """Pipeline stages: groups of their own, under keys of their own, and formats of their own."""
    params = {f"layers.{rank}.{name}": weight for name, weight in whole_params(2).items()}
    fq = fqt.transform(fqt.select(params, {f"*.{name}": format for name, format in FORMATS.items()}))
    state = fq.calibrate(params)
    save(folder, fq=Stateful(fq, state))
    kept = Stateful(fq, fq.init(params))
    load(folder, fq=kept)
    assert_same(kept.tree, state)


@pytest.mark.dist
def test_pipeline_stages(ranks, tmp_path):
    ranks(_stages, str(tmp_path), size=2)
