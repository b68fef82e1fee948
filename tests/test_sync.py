"""`sync`: plain local tensors of ranks that split each weight get the amax of the whole weight, by one all-reduce."""

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import vjp

import fq_transforms as fqt
from fq_transforms.spec import Group
from tests import cases
from tests.cases import message_of

# Leaves that are a maximum over the split axis, written down by hand.
REDUCED = {
    "out": {"FP8": ["amax"], "NVFP4": ["amax"], "NVFP4_STATIC": ["global_amax"]},
    "in": {"FP8": ["amax"], "INT8_PER_CHANNEL": ["amax"], "NVFP4": ["amax"], "NVFP4_STATIC": ["global_amax"]},
}


def world():
    return torch.distributed.group.WORLD


def layers(shape=(512, 1024), count=2):
    """Separate experts of two roles, as Transformer Engine names them."""
    up, down = cases.experts(count, shape, seed=1), cases.experts(count, shape[::-1], seed=2)
    return {f"mlp.linear_fc1.weight{i}": w for i, w in enumerate(up)} | {
        f"mlp.linear_fc2.weight{i}": w for i, w in enumerate(down)
    }


SPLIT = {"*fc1*": "out", "*fc2*": "in"}


def part_of(params, rank, size):
    """What tensor parallelism leaves on a rank: fc1 split in `out`, fc2 in `in`."""
    return {name: w.chunk(size, 0 if "fc1" in name else 1)[rank].contiguous() for name, w in params.items()}


def synced(rank, size):
    whole = layers()
    params = part_of(whole, rank, size)
    for format in cases.ONE_OF_EACH_LEAF:
        spec = fqt.select(params, {"*": format})
        fq, whole_fq = fqt.transform(spec), fqt.transform(fqt.select(whole, {"*": format}))
        state, wanted = fq.calibrate(params), whole_fq.calibrate(whole)
        before = optree.tree_map(torch.clone, state)
        with CommDebugMode() as collectives:
            result = fqt.sync(state, spec, world(), split=SPLIT)
        touched = {
            f"mlp.linear_{role}.weight*.{field}"
            for role, side in (("fc1", "out"), ("fc2", "in"))
            for field in REDUCED[side].get(format.name, ())
        }
        assert collectives.get_total_counts() == bool(touched), format.name
        flat = {which: fqt.state.flatten(s) for which, s in (("in", state), ("out", result), ("was", before))}
        assert list(flat["out"]) == list(flat["in"])
        for name, leaf in flat["out"].items():
            assert (leaf is flat["in"][name]) == (name not in touched)
            assert torch.equal(flat["in"][name], flat["was"][name])
            if name in touched:
                assert leaf.untyped_storage().nbytes() == 4 * leaf.numel()  # its own memory, for savers
        # What the rank then holds is its part of the whole state, and of the whole quantized weights.
        wanted_weights = part_of(whole_fq.fakequant(whole, wanted), rank, size)
        for name, w in fq.fakequant(params, result).items():
            assert torch.equal(w, wanted_weights[name]), (format.name, name)
        for name, leaf in fqt.state.flatten(wanted).items():
            if flat["out"][name].shape == leaf.shape:
                assert torch.equal(flat["out"][name], leaf)

    # Everything at once is one collective still; under torch.func too.
    rules = {f"{i}.*": format for i, format in enumerate(cases.ONE_OF_EACH_LEAF)}
    many = {f"{i}.{name}": w for i in range(len(cases.ONE_OF_EACH_LEAF)) for name, w in params.items()}
    spec = fqt.select(many, rules)
    fq = fqt.transform(spec)
    with CommDebugMode() as collectives:
        result = fqt.sync(fq.calibrate(many), spec, world(), split=SPLIT)
    assert collectives.get_total_counts() == 1
    inside = {}

    def quantize(p):
        inside.update(fqt.sync(fq.calibrate(p), spec, world(), split=SPLIT))
        return fq.fakequant(p, inside)

    out, _ = vjp(quantize, many)
    for name, w in fq.fakequant(many, result).items():
        assert torch.equal(out[name], w)

    # Experts' amax stay their own: no split, no collective, and later globs win.
    for split in ({}, {"*": "out", "0.*": "in", "*fc?.*": "out"}):
        with CommDebugMode() as collectives:
            kept = fqt.sync(fq.calibrate(many), spec, world(), split=split)
        assert collectives.get_total_counts() == bool(split)
    channel = kept["1.mlp.linear_fc1.weight*"].amax
    assert torch.equal(channel, fq.calibrate(many)["1.mlp.linear_fc1.weight*"].amax)


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 4])
def test_local_state_becomes_the_part_of_the_whole(ranks, size):
    """Calibrate of a part, then sync, is the part of calibrate of the whole; exactly the leaves that need it change."""
    ranks(synced, size=size)


def values(rank, size):
    """Every pair of edge values, in either order of ranks, beside torch.maximum."""
    edges = [-torch.inf, -2.0, -0.0, 0.0, 2.0**-149, 1.0, 448.0, 3.4e38, torch.inf, torch.nan, -torch.nan]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    params = {"experts.w": torch.ones(len(pairs), 2, 2)}
    spec = fqt.select(params, {"*": fqt.FP8})
    state = {"experts.w": fqt.state.ExpertAmax(pairs[:, rank].clone())}
    result = fqt.sync(state, spec, world(), split={"*": "in"})["experts.w"].amax
    assert cases.same_bits(result + 0.0, torch.maximum(pairs[:, 0], pairs[:, 1]) + 0.0)  # -0.0 and 0.0 are equal
    assert fqt.sync({"experts.w": fqt.state.ExpertAmax(torch.empty(0))}, empty_spec(), world(), split={"*": "in"})


def empty_spec():
    return fqt.Spec((Group("experts.w", ("experts.w",), fqt.FP8, 0, (2, 2), stacked=True),))


@pytest.mark.dist
def test_nan_wins_and_uncalibrated_is_the_identity(ranks):
    """A maximum of floats may drop NaN, by backend and by order; that of their ordered integers cannot."""
    ranks(values, size=2)


def some_ranks(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    params = {"experts.w": torch.stack(cases.experts(4, (4, 8), seed=rank))}
    spec = fqt.select(params, {"*": fqt.FP8})
    state = fqt.calibrate(params, spec=spec)
    result = fqt.sync(state, spec, mesh.get_group("tp"), split={"*": "out"})
    return state["experts.w"].amax, result["experts.w"].amax


@pytest.mark.dist
def test_only_the_ranks_of_the_group_count(ranks):
    """Tensor parallel pairs agree, and expert parallel ranks keep what is theirs."""
    found = ranks(some_ranks)
    for rank, (_, amax) in enumerate(found):
        first = rank - rank % 2
        assert torch.equal(amax, torch.maximum(found[first][0], found[first + 1][0]))
    assert not torch.equal(found[0][1], found[2][1])


def refused(rank, size):
    params = layers()
    spec = fqt.select(params, {"*": fqt.FP8})
    state = fqt.calibrate(params, spec=spec)
    key = "mlp.linear_fc1.weight*"
    mesh = init_device_mesh("cpu", (size,))
    sharded = {"experts.w": distribute_tensor(torch.ones(4, 8, 32), mesh, [Shard(1)])}
    sharded_spec = fqt.select(sharded, {"*": fqt.FP8})
    meta = state | {key: fqt.state.ExpertAmax(torch.empty(2, device="meta"))}
    short = state | {key: fqt.state.ExpertAmax(torch.ones(3))}
    missing = {key: state[key]}

    def call(state, spec=spec):
        return fqt.sync, state, spec, world()

    square = {"fc1.weight": torch.ones(192, 128)}
    square_spec = fqt.select(square, {"*": fqt.FP8_BLOCK})
    square_state = fqt.calibrate(square, spec=square_spec)
    other = torch.distributed.new_group([1 - rank], use_local_synchronization=True)
    with CommDebugMode() as collectives:
        found = {
            "glob": message_of(ValueError, *call(state), split=SPLIT | {"*fc3*": "in"}),
            "side": message_of(ValueError, *call(state), split={"*": "column"}),
            "axis": message_of(ValueError, *call(state), split={"*": 1}),
            "DTensor": message_of(
                ValueError, *call(fqt.calibrate(sharded, spec=sharded_spec), sharded_spec), split={"*": "out"}
            ),
            "meta": message_of(ValueError, *call(meta), split=SPLIT),
            "shape": message_of(ValueError, *call(short), split=SPLIT),
            "missing": message_of(KeyError, *call(missing), split=SPLIT),
            "block": message_of(ValueError, *call(square_state, square_spec), split={"*": "out"}),
            "no group": message_of(ValueError, fqt.sync, state, spec, None, split=SPLIT),
            "not in it": message_of(ValueError, fqt.sync, state, spec, other, split=SPLIT),
            "type": message_of(ValueError, *call({key: torch.ones(2)}), split=SPLIT),
        }
    assert collectives.get_total_counts() == 1  # of calibrate on the DTensors
    return found


@pytest.mark.dist
def test_mistakes_are_refused_before_anything_is_sent(ranks):
    """A rank that raises in the middle would leave the others waiting."""
    first, second = ranks(refused, size=2)
    assert first == second
    wanted = {
        "glob": ("split['*fc3*'] matches no group, among 2 such as ['mlp.linear_fc1.weight*'",),
        "side": ("split['*']: found 'column', wanted 'out' or 'in'",),
        "axis": ("split['*']: found 1, wanted 'out' or 'in'",),
        "DTensor": ("sync: state 'experts.w.amax': found a DTensor, wanted a plain local tensor", "has reduced it"),
        "meta": ("sync: state 'mlp.linear_fc1.weight*.amax': found a meta tensor, wanted values",),
        "shape": ("state 'mlp.linear_fc1.weight*.amax': found (3,)", "wanted (2,)"),
        "missing": ("group 'mlp.linear_fc2.weight*' is not in the state",),
        "block": ("parameter 'fc1.weight'", "holds 0..192 of 384 and cuts a block of 128 of FP8_BLOCK"),
        "no group": ("group: found None, wanted a process group that this rank is in",),
        "not in it": ("group: found ", "wanted a process group that this rank is in"),
        "type": ("state 'mlp.linear_fc1.weight*': found Tensor, wanted leaves",),
    }
    assert wanted.keys() == first.keys()
    for what, fragments in wanted.items():
        cases.assert_names(first[what], *fragments)
