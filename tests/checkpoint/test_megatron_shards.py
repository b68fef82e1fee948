"""The shards that all ranks of a large job declare to Megatron, without the ranks."""

import itertools
from collections import defaultdict
from contextlib import nullcontext
from math import prod
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fq_transforms.checkpoint.megatron import _from_megatron, _to_megatron
from fq_transforms.checkpoint.megatron_shards import BETWEEN, FORMAT, ShardMetadata, is_small, join_layers, leaf_shards
from fq_transforms.formats import FP8, FP8_BLOCK, INT4_BLOCK32, INT8_PER_CHANNEL, MXFP4, NVFP4_STATIC
from fq_transforms.partition import Part
from fq_transforms.spec import Group
from tests.cases import CORE_FORMATS, assert_names, message_of, name_of

pytestmark = pytest.mark.filterwarnings("ignore")  # importing Megatron warns of itself


class Job(NamedTuple):
    """Experts of one role, and the parallelism that splits them."""

    ep: int = 1
    tp: int = 1
    pp: int = 1
    dp: int = 1
    experts_each: int = 1
    layers_each: int = 1
    rows: int = 128  # of each piece along `out`, on each rank
    columns: int = 128
    role: str = "fc1"
    gated: bool = False
    has_layer_axis: bool = True

    @property
    def layers(self):
        return self.pp * self.layers_each

    @property
    def shape(self):
        """(out, in) of a rank's weight."""
        return self.rows * (2 if self.gated else 1), self.columns

    def coordinates(self):
        """Of every rank and each of its layers."""
        ranks = itertools.product(range(self.pp), range(self.ep), range(self.tp), range(self.dp))
        for pp, ep, tp, dp in ranks:
            for layer in range(self.layers_each):
                yield (pp, ep, tp, dp), pp * self.layers_each + layer

    def weights(self, rank, layer):
        """The entries that Megatron gives a rank for one layer: for each expert its pieces along `out`."""
        _, ep, tp, dp = rank
        pieces = 2 if self.gated else 1
        experts = self.ep * self.experts_each
        if self.role == "fc1":
            whole = (self.rows * pieces * self.tp, self.columns)
            offsets = [((tp + piece * self.tp) * self.rows, 0) for piece in range(pieces)]
        else:
            whole, offsets = (self.rows, self.columns * self.tp), [(0, tp * self.columns)]
        head, at, key = ((self.layers,), (layer,), "") if self.has_layer_axis else ((), (), f"{layer}.")
        ones = (1,) * (len(head) + 1)
        return [
            [
                ShardMetadata(
                    f"layers.{key}experts.{self.role}.weight",
                    Part((*head, experts, *whole), (*at, expert, *offset), (*ones, self.rows, self.columns)),
                    len(ones),
                    (0, 0, dp),
                )
                for offset in offsets
            ]
            for expert in range(ep * self.experts_each, (ep + 1) * self.experts_each)
        ]

    def group(self, format):
        names = tuple(f"experts.{self.role}.weight{i}" for i in range(self.experts_each))
        return Group(f"experts.{self.role}.weight*", names, format, self.experts_each, self.shape)


def declared(job, format):
    """What every rank declares, as `sharded_state_dict` does: [(rank, shard)]."""
    group = job.group(format)
    found, small = [], defaultdict(dict)
    for rank, layer in job.coordinates():
        shards = leaf_shards(group, job.weights(rank, layer))
        for field, wanted in group.leaf_shapes.items():
            # Together they are the local leaf, pieces along `out`.
            local = [shard.local_shape for shard in shards[field]]
            assert all(shape[:1] + shape[2:] == wanted[:1] + wanted[2:] for shape in local)
            assert sum(map(prod, local)) == prod(wanted)
        for field, pieces in shards.items():
            if is_small(pieces[0]):
                (small[rank][f"{layer}.{field}"],) = pieces
            else:
                found += [(rank, piece) for piece in pieces]
    for rank, layers in small.items():
        joined = join_layers(layers)
        assert sum(map(len, (name.split(BETWEEN) for name in joined))) == len(layers)
        found += [(rank, shard) for shard in joined.values()]
    return found


def check_tiling(found):
    """Main replicas cover each global tensor exactly once; no two ranks have the same part and replica id."""
    by_key = defaultdict(list)
    for rank, shard in found:
        by_key[shard.key].append((rank, shard))
    for key, shards in by_key.items():
        (whole,) = {shard.part.whole for _, shard in shards}
        (shape,) = {shard.part.shape for _, shard in shards}
        # Boxes of one shape on the grid of that shape are the same or apart.
        assert all(not at % extent for _, shard in shards for at, extent in zip(shard.part.offset, shape, strict=True))
        main = [shard.part.offset for _, shard in shards if not any(shard.replica)]
        assert len(main) == len(set(main)), f"{key}: overlap"
        assert len(main) * prod(shape) == prod(whole), f"{key}: hole"
        everyone = [(shard.part.offset, shard.replica) for _, shard in shards]
        assert len(everyone) == len(set(everyone)), f"{key}: one replica id for two copies"
    return by_key


def powers(most):
    return st.sampled_from([2**n for n in range(most.bit_length())])


@st.composite
def jobs(draw):
    """Of any parallelism up to EP 256, TP 8 and PP 16, of at most 2048 ranks."""
    ep, tp, pp, dp = draw(powers(256)), draw(powers(8)), draw(powers(16)), draw(st.integers(1, 3))
    while ep * tp * pp * dp > 2048:
        ep, pp, dp = max(ep // 2, 1), max(pp // 2, 1), 1
    role = draw(st.sampled_from(["fc1", "fc2"]))
    return Job(
        ep,
        tp,
        pp,
        dp,
        experts_each=draw(st.integers(1, 3)),
        layers_each=draw(st.integers(1, 2)),
        rows=128 * draw(st.integers(1, 3)),
        columns=128 * draw(st.integers(1, 3)),
        role=role,
        gated=role == "fc1" and draw(st.booleans()),
        has_layer_axis=draw(st.booleans()),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(job=jobs(), format=st.sampled_from(CORE_FORMATS))
def test_shards_of_all_ranks_tile_each_tensor(job, format):
    """At any parallelism the ranks that write have each number of each leaf and each format exactly once."""
    by_key = check_tiling(declared(job, format))
    assert len(by_key) == (len(job.group(format).leaf_shapes) + 1) * (1 if job.has_layer_axis else job.layers)


@pytest.mark.parametrize(
    ("job", "format"),
    [
        (Job(ep=256, tp=8, pp=16, gated=True), NVFP4_STATIC),
        (Job(ep=256, tp=8, pp=16, role="fc2"), INT8_PER_CHANNEL),
    ],
)
def test_shards_of_32768_ranks_tile_each_tensor(job, format):
    """The largest job of all: EP 256, TP 8, PP 16."""
    found = declared(job, format)
    assert len({rank for rank, _ in found}) == 32768
    check_tiling(found)


@pytest.mark.parametrize("damage", ["hole", "overlap", "two writers"])
def test_the_tiling_check_can_fail(damage):
    """A missing rank, one that is somewhere else, and a replica that takes itself for the main one are found."""
    found = declared(Job(ep=4, tp=2, dp=2, gated=True), NVFP4_STATIC)
    main = next(n for n, (_, shard) in enumerate(found) if not any(shard.replica))
    copy = next(n for n, (_, shard) in enumerate(found) if any(shard.replica))
    if damage == "hole":
        del found[main]
    elif damage == "overlap":
        rank, shard = found[main]
        other = next(s for _, s in found if s.key == shard.key and s.part.offset != shard.part.offset)
        found[main] = rank, shard._replace(part=other.part)
    else:
        rank, shard = found[copy]
        found[copy] = rank, shard._replace(replica=(0, 0, 0))
    with pytest.raises(AssertionError, match="hole|overlap"):
        check_tiling(found)


def validated(found, monkeypatch):
    """Raise as Megatron does when it saves."""
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    by_rank = defaultdict(list)
    for rank, shard in found:
        by_rank[rank].append(_to_megatron(shard, None))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    validate_sharding_integrity(list(by_rank.values()))


@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_megatron_agrees(format, monkeypatch):
    """Megatron's own check of all ranks' shards passes, and does not without one of the ranks."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    for job in (
        Job(ep=4, tp=2, pp=2, dp=2, experts_each=2, gated=True),
        Job(ep=2, tp=4, pp=2, layers_each=2, role="fc2"),
        Job(ep=8, tp=2, dp=3, has_layer_axis=False),
    ):
        found = declared(job, format)
        validated(found, monkeypatch)
        without = [(rank, shard) for rank, shard in found if rank != (0, 0, 0, 0)]
        # Megatron leaves the check of entries of several layers to torch.distributed.checkpoint.
        expected = pytest.raises(CheckpointingException, match="Invalid access pattern")
        with expected if any(shard.regular for _, shard in found) else nullcontext():
            validated(without, monkeypatch)


@pytest.mark.parametrize(("role", "gated"), [("fc1", True), ("fc1", False), ("fc2", False)])
def test_jobs_are_as_megatron_describes_them(role, gated):
    """The plain data above are those of ShardedTensors as Transformer Engine's grouped layers make them, built here.

    Source: Megatron-Core 0.16.1 `TEGroupedLinear._sharded_state_dict_grouped` and `apply_swiglu_sharded_factory`.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    job = Job(ep=4, tp=2, pp=2, dp=2, experts_each=3, layers_each=2, role=role, gated=gated)
    for rank, layer in job.coordinates():
        _, ep, tp, dp = rank
        for i, wanted in enumerate(job.weights(rank, layer)):
            offsets = (0, layer, job.layers), (1, ep * job.experts_each + i, job.ep * job.experts_each)
            axis = 2 if role == "fc1" else 3
            entry = ShardedTensor.from_rank_offsets(
                f"layers.experts.{role}.weight",
                torch.empty(job.shape, device="meta"),
                *offsets,
                (axis, tp, job.tp),
                replica_id=(0, 0, dp),
                prepend_axis_num=2,
            )
            pieces = apply_swiglu_sharded_factory(entry, offsets).build() if gated else [entry]
            assert [_from_megatron(piece) for piece in pieces] == wanted


def test_a_shard_is_a_sharded_tensor():
    """To Megatron and back nothing changes."""
    for _, shard in declared(Job(ep=2, tp=2, pp=2, dp=2, gated=True), NVFP4_STATIC):
        assert _from_megatron(_to_megatron(shard, None)) == shard._replace(regular=True)


def test_pieces_of_a_whole_gated_fc1_are_one():
    """Unsplit, [gate; up] is one piece, also where a square block straddles the two; split, that is refused."""
    group = Group("weight*", ("weight0",), FP8_BLOCK, 1, (2 * 192, 128))
    whole = Job(rows=192, gated=True)
    (amax,) = leaf_shards(group, whole.weights((0, 0, 0, 0), 0))["amax"]
    assert amax.part == Part((1, 1, 3, 1), (0, 0, 0, 0), (1, 1, 3, 1))
    halves = whole._replace(tp=2)
    said = message_of(ValueError, leaf_shards, group, halves.weights((0, 0, 0, 0), 0))
    assert_names(said, "weight0", "`out`", "0..192 of 768", "FP8_BLOCK")
    # In another order it is the two pieces, or the rows would be exchanged.
    swapped = [pieces[::-1] for pieces in whole._replace(rows=128).weights((0, 0, 0, 0), 0)]
    amax = leaf_shards(Group("weight*", ("weight0",), INT8_PER_CHANNEL, 1, (256, 128)), swapped)["amax"]
    assert [shard.part.offset for shard in amax] == [(0, 0, 128, 0), (0, 0, 0, 0)]


def test_dense_stacked_and_transposed():
    """A dense weight is one expert; experts that are stacked, or stored [in, out], lie where separate ones do."""
    layers = {"prepended": 1, "replica": (0, 0, 0)}
    dense = ShardMetadata("w", Part((3, 64, 128), (2, 32, 0), (1, 32, 128)), **layers)
    (amax,) = leaf_shards(Group("w", ("w",), INT8_PER_CHANNEL, 1, (32, 128)), [[dense]])["amax"]
    assert amax.part == Part((3, 1, 64, 1), (2, 0, 32, 0), (1, 1, 32, 1))
    assert amax.local_shape == (1, 32, 1)

    stacked = ShardMetadata("w", Part((3, 8, 64, 128), (2, 4, 0, 64), (1, 4, 64, 64)), **layers)
    (amax,) = leaf_shards(Group("w", ("w",), INT4_BLOCK32, 4, (64, 64), stacked=True), [[stacked]])["amax"]
    assert amax.part == Part((3, 8, 64, 4), (2, 4, 0, 2), (1, 4, 64, 2))
    swapped = ShardMetadata("w", Part((3, 8, 128, 64), (2, 4, 64, 0), (1, 4, 64, 64)), **layers)
    group = Group("w", ("w",), INT4_BLOCK32, 4, (64, 64), stacked=True, transposed=True)
    assert leaf_shards(group, [[swapped]])["amax"] == [amax]


def test_padded_vocabulary_stays_flexible():
    """Megatron loads a vocabulary of another padding; so do the leaves that have its axis, and only those."""
    embedding = ShardMetadata("w", Part((256, 128), (128, 0), (128, 128)), 0, (0, 0, 0), flexible=True)
    for format, flexible in ((INT8_PER_CHANNEL, True), (FP8, False)):
        shards = leaf_shards(Group("w", ("w",), format, 1, (128, 128)), [[embedding]])
        assert [shard.flexible for shard in shards["amax"]] == [flexible]
        assert [shard.flexible for shard in shards[FORMAT]] == [False]


def test_a_stateless_format_is_stored():
    """MX formats have no leaf; what they are is in the checkpoint all the same."""
    assert leaf_shards(Job().group(MXFP4), Job().weights((0, 0, 0, 0), 0)).keys() == {FORMAT}
