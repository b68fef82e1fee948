"""`sync_inputs`: what `merge` of all ranks' states is, in two collectives; experts of other ranks are left alone."""

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import fq_transforms as fqt
from fq_transforms.state import InputAmax
from tests.cases import message_of

SHARED, OWN, DENSE = "experts.*.w1.weight.input", "experts.*.w2.weight.input", "q.weight.input"


def prepared():
    params = {f"experts.{i}.{role}.weight": torch.ones(4, 32) for i in range(3) for role in ("w1", "w2")}
    params |= {"q.weight": torch.ones(4, 32), "k.weight": torch.ones(4, 32)}
    rules = [fqt.Rule("*.w1.*", fqt.FP8, fqt.FP8), fqt.Rule("*.w2.*", fqt.FP8, fqt.FP8, per_expert_inputs=True)]
    rules += [fqt.Rule("q.*", fqt.FP8, fqt.NVFP4), fqt.Rule("k.*", fqt.FP8, fqt.MXFP8)]
    return params, fqt.select(params, rules)


def state_of(rank):
    """A state in which each rank has experts without tokens, and one has none at all."""
    params, spec = prepared()
    generator = torch.Generator().manual_seed(rank)

    def entry(experts, leaves):
        tokens = torch.randint(0, 3, (experts,), generator=generator).double() * (rank != 2)
        amax = torch.where(tokens > 0, torch.rand(experts, generator=generator), -torch.inf)
        return InputAmax(amax if leaves == experts else amax.amax().reshape(1), tokens)

    return fqt.state.init(params, spec=spec) | {SHARED: entry(3, 1), OWN: entry(3, 3), DENSE: entry(1, 1)}


def equals_merge(rank, size):
    _, spec = prepared()
    state, world = state_of(rank), torch.distributed.group.WORLD
    with CommDebugMode() as collectives:
        found = fqt.sync_inputs(state, spec, world)
    assert collectives.get_total_counts() == 2
    wanted = state_of(0)
    for other in range(1, size):
        wanted = fqt.merge(wanted, state_of(other))
    for name, leaf in fqt.state.flatten(found).items():
        assert torch.equal(leaf, fqt.state.flatten(wanted)[name]), name
        assert leaf.dtype == fqt.state.flatten(wanted)[name].dtype
        assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    assert all(found[group.key] is state[group.key] for group in spec.groups)

    with CommDebugMode() as collectives:
        found = fqt.sync_inputs(state, spec, world, same_experts=False)
    assert collectives.get_total_counts() == 1
    assert found[OWN] is state[OWN]
    assert torch.equal(found[SHARED].amax, wanted[SHARED].amax)
    assert torch.equal(found[SHARED].tokens, state[SHARED].tokens)

    nan = state if rank else state | {OWN: state[OWN]._replace(amax=torch.full((3,), torch.nan))}
    assert fqt.sync_inputs(nan, spec, world)[OWN].amax.isnan().all()
    weights_only = fqt.Spec(spec.groups, spec.skipped)
    only = {group.key: state[group.key] for group in spec.groups}
    with CommDebugMode() as collectives:
        assert fqt.sync_inputs(only, weights_only, world) == only
    assert collectives.get_total_counts() == 0

    # sync over tensor-parallel ranks: the amax of inputs, and not the tokens that all of them see.
    split = {"experts.*.w2.weight": "in", "q*": "out"}
    tied = fqt.sync(
        state | {g.key: fqt.calibrate(prepared()[0], spec=weights_only)[g.key] for g in spec.groups},
        spec,
        world,
        split=split,
    )
    for key in (OWN, DENSE):
        assert torch.equal(tied[key].amax, wanted[key].amax)
        assert tied[key].tokens is state[key].tokens
    assert tied[SHARED].amax is state[SHARED].amax


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_is_merge_of_all_ranks(ranks, size):
    """The amax by maximum, tokens by sum; with other experts a rank, only what experts share."""
    ranks(equals_merge, size=size)


def refused(rank, size):
    params, spec = prepared()
    state, world = state_of(rank), torch.distributed.group.WORLD
    meta = fqt.state.init({name: p.to("meta") for name, p in params.items()}, spec=spec)
    with CommDebugMode() as collectives:
        found = [
            message_of(ValueError, fqt.sync_inputs, state, spec, None),
            message_of(ValueError, fqt.sync_inputs, meta, spec, world),
            message_of(ValueError, fqt.sync_inputs, state | {"x": state[OWN]}, spec, world),
            message_of(
                ValueError, fqt.sync_inputs, state | {OWN: InputAmax(torch.ones(2), torch.ones(3))}, spec, world
            ),
        ]
    assert collectives.get_total_counts() == 0
    return found


@pytest.mark.dist
def test_mistakes_are_refused_before_anything_is_sent(ranks):
    for fragment, found in zip(
        ("group: found None", "found meta tensors", "groups that the spec has not: ['x']", "found (2,)"),
        ranks(refused, size=2)[0],
        strict=True,
    ):
        assert fragment in found
