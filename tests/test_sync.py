"""`fq.sync`: plain local tensors of many ranks become one state.

Ranks that split each weight get the amax of the whole weight, by one all-reduce. Ranks with different batches get what
`merge` of all their states is, in two; experts of other ranks are left alone.
"""

from dataclasses import replace

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import vjp

import fq_transforms as fqt
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
        fq, whole_fq = (fqt.transform(fqt.select(tensors, {"*": format})) for tensors in (params, whole))
        state, wanted = fq.calibrate(params), whole_fq.calibrate(whole)
        before = optree.tree_map(torch.clone, state)
        with CommDebugMode() as collectives:
            result = fq.sync(state, world(), split=SPLIT)
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
    fq = fqt.transform(fqt.select(many, rules))
    with CommDebugMode() as collectives:
        result = fq.sync(fq.calibrate(many), world(), split=SPLIT)
    assert collectives.get_total_counts() == 1
    inside = {}

    def quantize(p):
        inside.update(fq.sync(fq.calibrate(p), world(), split=SPLIT))
        return fq.fakequant(p, inside)

    out, _ = vjp(quantize, many)
    for name, w in fq.fakequant(many, result).items():
        assert torch.equal(out[name], w)

    # Experts' amax stay their own: no split, no collective, and later globs win.
    for split in ({}, {"*": "out", "0.*": "in", "*fc?.*": "out"}):
        with CommDebugMode() as collectives:
            kept = fq.sync(fq.calibrate(many), world(), split=split)
        assert collectives.get_total_counts() == bool(split)
    channel = kept["1.mlp.linear_fc1.weight*"]["amax"]
    assert torch.equal(channel, fq.calibrate(many)["1.mlp.linear_fc1.weight*"]["amax"])


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
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    state = {"experts.w": {"amax": pairs[:, rank].clone()}}
    result = fq.sync(state, world(), split={"*": "in"})["experts.w"]["amax"]
    assert cases.same_bits(result + 0.0, torch.maximum(pairs[:, 0], pairs[:, 1]) + 0.0)  # -0.0 and 0.0 are equal


@pytest.mark.dist
def test_nan_wins_and_uncalibrated_is_the_identity(ranks):
    """A maximum of floats may drop NaN, by backend and by order; that of their ordered integers cannot."""
    ranks(values, size=2)


def some_ranks(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    params = {"experts.w": torch.stack(cases.experts(4, (4, 8), seed=rank))}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    state = fq.calibrate(params)
    result = fq.sync(state, mesh.get_group("tp"), split={"*": "out"})
    return state["experts.w"]["amax"], result["experts.w"]["amax"]


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
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    state = fq.calibrate(params)
    key = "mlp.linear_fc1.weight*"
    mesh = init_device_mesh("cpu", (size,))
    sharded = {"experts.w": distribute_tensor(torch.ones(4, 8, 32), mesh, [Shard(1)])}
    sharded_fq = fqt.transform(fqt.select(sharded, {"*": fqt.FP8}))
    square = {"fc1.weight": torch.ones(192, 128)}
    square_fq = fqt.transform(fqt.select(square, {"*": fqt.FP8_BLOCK}))
    square_state = square_fq.calibrate(square)
    other = torch.distributed.new_group([1 - rank], use_local_synchronization=True)

    def said(state, error=ValueError, *, group=torch.distributed.group.WORLD, split=SPLIT, **options):
        return message_of(error, fq.sync, state, group, split=split, **options)

    by_mesh = sharded_fq.calibrate(sharded)
    with CommDebugMode() as collectives:
        found = {
            "glob": said(state, split=SPLIT | {"*fc3*": "in"}),
            "side": said(state, split={"*": "column"}),
            "axis": said(state, split={"*": 1}),
            "other experts": said(state, same_experts=False),
            "DTensor": message_of(ValueError, sharded_fq.sync, by_mesh, world(), split={"*": "out"}),
            "meta": said(state | {key: {"amax": torch.empty(2, device="meta")}}),
            "shape": said(state | {key: {"amax": torch.ones(3)}}),
            "missing": said({key: state[key]}, KeyError),
            "block": message_of(ValueError, square_fq.sync, square_state, world(), split={"*": "out"}),
            "no group": said(state, group=None),
            "not in it": said(state, group=other),
            "type": said({key: torch.ones(2)}),
        }
    assert collectives.get_total_counts() == 0
    return found


@pytest.mark.dist
def test_mistakes_of_a_split_are_refused_before_anything_is_sent(ranks):
    """A rank that raises in the middle would leave the others waiting."""
    first, second = ranks(refused, size=2)
    assert first == second
    wanted = {
        "glob": ("split['*fc3*'] matches no group, among 2 such as ['mlp.linear_fc1.weight*'",),
        "side": ("split['*']: found 'column', wanted 'out' or 'in'",),
        "axis": ("split['*']: found 1, wanted 'out' or 'in'",),
        "other experts": ("split: found a split of weights between ranks with same_experts=False",),
        "DTensor": ("sync: state 'experts.w.amax': found a DTensor, wanted a plain local tensor", "has reduced it"),
        "meta": ("sync: state 'mlp.linear_fc1.weight*.amax': found a meta tensor, wanted values",),
        "shape": ("state 'mlp.linear_fc1.weight*.amax': found (3,)", "wanted (2,)"),
        "missing": ("group 'mlp.linear_fc2.weight*' is not in the state",),
        "block": ("parameter 'fc1.weight'", "holds 0..192 of 384 and cuts a block of 128 of FP8_BLOCK"),
        "no group": ("group: found None, wanted a process group that this rank is in",),
        "not in it": ("group: found ", "wanted a process group that this rank is in"),
        "type": ("state 'mlp.linear_fc1.weight*': found Tensor, wanted a dict",),
    }
    assert wanted.keys() == first.keys()
    for what, fragments in wanted.items():
        cases.assert_names(first[what], *fragments)


SHARED, OWN, DENSE = "experts.*.w1.weight.input", "experts.*.w2.weight.input", "q.weight.input"


def with_inputs():
    params = {f"experts.{i}.{role}.weight": torch.ones(4, 32) for i in range(3) for role in ("w1", "w2")}
    params |= {"q.weight": torch.ones(4, 32), "k.weight": torch.ones(4, 32)}
    rules = [fqt.Rule("*.w1.*", fqt.FP8, fqt.FP8), fqt.Rule("*.w2.*", fqt.FP8, fqt.FP8, per_expert_inputs=True)]
    rules += [fqt.Rule("q.*", fqt.FP8, fqt.NVFP4), fqt.Rule("k.*", fqt.FP8, fqt.MXFP8)]
    return params, fqt.transform(fqt.select(params, rules))


def state_of(rank):
    """A state in which each rank has experts without tokens, and one has none at all."""
    params, fq = with_inputs()
    generator = torch.Generator().manual_seed(rank)

    def entry(experts, leaves):
        tokens = torch.randint(0, 3, (experts,), generator=generator).double() * (rank != 2)
        amax = torch.where(tokens > 0, torch.rand(experts, generator=generator), -torch.inf)
        return {"amax": amax if leaves == experts else amax.amax().reshape(1), "tokens": tokens}

    return fq.init(params) | {SHARED: entry(3, 1), OWN: entry(3, 3), DENSE: entry(1, 1)}


def equals_merge(rank, size):
    params, fq = with_inputs()
    state = state_of(rank)
    with CommDebugMode() as collectives:
        found = fq.sync(state, world())
    assert collectives.get_total_counts() == 2
    wanted = state_of(0)
    for other in range(1, size):
        wanted = fqt.merge(wanted, state_of(other))
    for name, leaf in fqt.state.flatten(found).items():
        assert torch.equal(leaf, fqt.state.flatten(wanted)[name]), name
        assert leaf.dtype == fqt.state.flatten(wanted)[name].dtype
        assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    assert all(found[group.key] is state[group.key] for group in fq.spec.groups)

    with CommDebugMode() as collectives:
        found = fq.sync(state, world(), same_experts=False)
    assert collectives.get_total_counts() == 1
    assert found[OWN] is state[OWN]
    assert torch.equal(found[SHARED]["amax"], wanted[SHARED]["amax"])
    assert found[SHARED]["tokens"] is state[SHARED]["tokens"]

    nan = state if rank else state | {OWN: state[OWN] | {"amax": torch.full((3,), torch.nan)}}
    assert fq.sync(nan, world())[OWN]["amax"].isnan().all()
    weights = replace(fq, spec=replace(fq.spec, inputs=()))
    only = {group.key: state[group.key] for group in fq.spec.groups}
    with CommDebugMode() as collectives:
        assert weights.sync(only, world()) == only
    assert collectives.get_total_counts() == 0

    # Over tensor-parallel ranks: the amax of inputs, and not the tokens that all of them see.
    tied = fq.sync(state | weights.calibrate(params), world(), split={"experts.*.w2.weight": "in", "q*": "out"})
    for key in (OWN, DENSE):
        assert torch.equal(tied[key]["amax"], wanted[key]["amax"])
        assert tied[key]["tokens"] is state[key]["tokens"]
    assert tied[SHARED]["amax"] is state[SHARED]["amax"]


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_merge_of_all_ranks(ranks, size):
    """The amax by maximum, tokens by sum; with other experts a rank, only what experts share."""
    ranks(equals_merge, size=size)


def refused_batches(rank, size):
    params, fq = with_inputs()
    state = state_of(rank)
    meta = fq.init({name: p.to("meta") for name, p in params.items()})
    short = state | {OWN: {"amax": torch.ones(2), "tokens": torch.ones(3, dtype=torch.float64)}}
    with CommDebugMode() as collectives:
        found = [
            message_of(ValueError, fq.sync, state, None),
            message_of(ValueError, fq.sync, meta, world()),
            message_of(ValueError, fq.sync, state | {"x": state[OWN]}, world()),
            message_of(ValueError, fq.sync, short, world()),
        ]
    assert collectives.get_total_counts() == 0
    return found


@pytest.mark.dist
def test_mistakes_of_batches_are_refused_before_anything_is_sent(ranks):
    """As of a split: nobody waits for a rank that has raised."""
    wanted = ("group: found None", "found a meta tensor, wanted values", "unexpected groups: ['x']", "found (2,)")
    for fragment, found in zip(wanted, ranks(refused_batches, size=2)[0], strict=True):
        assert fragment in found
