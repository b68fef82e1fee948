"""DTensor parameters: whatever the mesh, each rank holds exactly its slice of what one process computes.

Every worker makes the whole weights for itself, from one seed, so what is wanted needs no communication.
"""

import ast
import pathlib
import subprocess
import sys

import optree
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.func import functional_call, grad, vjp, vmap

import fq_transforms as fqt
from tests import cases
from tests.cases import message_of, same_bits
from tests.full import FULL

FORMATS = [*cases.ONE_OF_EACH_LEAF, fqt.Format("INT8_SQUARE", fqt.INT8.element, (2, 2))]

# Axes of [E, out, in] that a leaf has, written down by hand.
AXES_OF = {
    "FP8": {"amax": [0]},
    "INT8_PER_CHANNEL": {"amax": [0, 1]},
    "INT4_BLOCK32": {"amax": [0, 1, 2]},
    "NVFP4": {"amax": [0]},
    "NVFP4_STATIC": {"amax": [0, 1, 2], "global_amax": [0]},
    "FP8_BLOCK": {"amax": [0, 1, 2]},
    "INT8_SQUARE": {"amax": [0, 1, 2]},
    "MXFP4": {},
}

# Mesh, and the axis of [E, out, in] that each of its dimensions shards. 5 over 4 ranks: 2, 2, 1 and none.
E = 5
MESHES = [
    ((4,), (None,)),
    ((4,), (0,)),
    ((4,), (1,)),
    ((2, 2), (0, None)),
    ((2, 2), (None, 1)),
    ((2, 2), (2, None)),
    ((2, 2), (0, 1)),
    ((2, 2), (0, 2)),
    ((2, 2), (1, 2)),
]


def shape_of(format, axes):
    """(out, in) that `axes` split between blocks; the last one is ragged, and four ranks split `out` unevenly."""
    if format is fqt.FP8_BLOCK:
        return 255, 256
    return (7 if format.name == "INT8_SQUARE" and axes != (1,) else 5), 64


def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def placed(tensor, mesh, placements):
    """A whole tensor, which every rank has, as a DTensor."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def placements_of(axes, dims):
    """Placements for the sharded axes of [E, out, in], where `dims` are the axes of the tensor's own dimensions."""
    return [Replicate() if axis is None or axis not in dims else Shard(dims.index(axis)) for axis in axes]


def parameters(layout, shape, count=E, dtype=torch.float32):
    """Parameters of one group with the axes of their dimensions, and `transposed=`."""
    weights = cases.experts(count, shape, dtype)
    if layout == "stacked":
        return {"experts.w": torch.stack(weights)}, [0, 1, 2], ()
    if layout == "transposed":
        return {"experts.w": torch.stack(weights).mT.contiguous()}, [0, 2, 1], ("*",)
    if layout == "dense":
        return {"w": weights[0]}, [1, 2], ()
    return {f"experts.{i}.w": weight for i, weight in enumerate(weights)}, [1, 2], ()


def local(tensor):
    return tensor.to_local()


def assert_placed_alike(found, whole, mesh, placements):
    """A DTensor of these placements whose shard here is the slice of the whole, bit for bit."""
    assert isinstance(found, DTensor)
    assert tuple(found.placements) == tuple(placements), (found.placements, placements)
    assert found.shape == whole.shape
    assert found.stride() == whole.contiguous().stride()
    assert local(found).is_contiguous()  # as the strides of the whole say
    assert same_bits(local(found), local(placed(whole, mesh, placements)))


def check_slices(layout, format, mesh, axes, backward, out_dtype=None):
    """State, weights and gradients are the slices of what the whole weights give."""
    params, dims, transposed = parameters(layout, shape_of(format, axes))
    at = placements_of(axes, dims)
    sharded = {name: placed(w, mesh, at) for name, w in params.items()}
    spec = fqt.select(sharded, {"*": format}, transposed=transposed)
    assert spec == fqt.select(params, {"*": format}, transposed=transposed)
    fq = fqt.transform(spec, backward=backward, out_dtype=out_dtype)

    state, wanted = fq.calibrate(sharded), fq.calibrate(params)
    ((key, _),) = state.items()
    start = fqt.state.flatten(fq.init(sharded))
    for name, leaf in fqt.state.flatten(state).items():
        whole, which = fqt.state.flatten(wanted)[name], name.removeprefix(f"{key}.")
        had = [axis if axis in AXES_OF[format.name][which] else None for axis in axes]
        leaf_at = [Replicate() if axis is None else Shard(axis) for axis in had]
        assert_placed_alike(leaf, whole, mesh, leaf_at)
        assert_placed_alike(start[name], torch.full_like(whole, -torch.inf), mesh, leaf_at)
    assert list(state[key]) == list(AXES_OF[format.name])

    # Some weights lie beyond their amax, so that clipping is seen.
    state, wanted = (optree.tree_map(lambda leaf: leaf * 0.7, each) for each in (state, wanted))
    with CommDebugMode() as collectives:
        outs, pullback = vjp(lambda p: fq.fakequant(p, state), sharded)
    assert collectives.get_total_counts() == 0
    whole_outs, whole_pullback = vjp(lambda p: fq.fakequant(p, wanted), params)
    for name, out in outs.items():
        assert_placed_alike(out, whole_outs[name], mesh, at)
    for seed in (1, 2):  # twice from one pullback
        generator = torch.Generator().manual_seed(seed)
        cotangents = {n: torch.randn(w.shape, generator=generator).to(w.dtype) for n, w in whole_outs.items()}
        with CommDebugMode() as collectives:
            (grads,) = pullback({n: placed(c, mesh, at) for n, c in cotangents.items()})
        assert collectives.get_total_counts() == 0
        (whole_grads,) = whole_pullback(cotangents)
        for name, found in grads.items():
            assert_placed_alike(found, whole_grads[name], mesh, at)
    if backward == "clip" and format.clips:
        assert any((g == 0).any() for g in whole_grads.values())

    leaf = {name: w.detach().clone().requires_grad_() for name, w in sharded.items()}
    outs = fq.fakequant(leaf, state)
    torch.autograd.backward([*outs.values()], [placed(cotangents[name], mesh, at) for name in outs])
    for name, weight in leaf.items():
        assert_placed_alike(weight.grad, whole_grads[name], mesh, at)


def every_slice(rank, size, layout):
    for at, (shape, axes) in enumerate(MESHES):
        if layout in ("separate", "dense") and 0 in axes:
            continue
        mesh = mesh_of(shape)
        for number, format in enumerate(FORMATS):
            if format is fqt.FP8_BLOCK and axes == (1,):
                continue
            is_clipped = format.clips and (FULL or (at + number) % 2 == 0)
            if FULL or not is_clipped:
                check_slices(layout, format, mesh, axes, "pass_through")
            if is_clipped:
                check_slices(layout, format, mesh, axes, "clip", torch.bfloat16)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["stacked", "transposed", "separate", "dense"])
def test_each_rank_holds_its_slice(ranks, layout):
    """Calibrating, quantizing and pulling back commute with sharding, over every mesh, ragged edges included."""
    ranks(every_slice, layout)


def counts(rank, size):
    stacked = {f"{layer}.experts.w": torch.stack(cases.experts(4, (32, 128), seed=layer)) for layer in range(3)}
    found = {}
    for shape, axes in [*MESHES, ((2, 2), (1, 0)), ((2, 2), (2, 1)), ((1, 4), (2, 0)), ((4, 1), (0, 1))]:
        mesh = mesh_of(shape)
        params = {name: placed(w, mesh, placements_of(axes, [0, 1, 2])) for name, w in stacked.items()}
        for format in (fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.NVFP4_STATIC, fqt.MXFP4):
            fq = fqt.transform(fqt.select(params, {"*": format}))
            with CommDebugMode() as collectives:
                fq.init(params)
            assert collectives.get_total_counts() == 0
            with CommDebugMode() as collectives:
                fq.calibrate(params)
            found[axes, shape, format.name] = collectives.get_total_counts()
    return found


@pytest.mark.dist
def test_calibrate_makes_as_few_collectives_as_there_are_split_axes_to_collapse(ranks):
    """None over experts, whatever the format; one for all groups over each axis of the mesh that needs it."""
    first, *others = ranks(counts)
    assert all(found == first for found in others)
    collapsed = {"FP8": {1, 2}, "INT8_PER_CHANNEL": {2}, "INT4_BLOCK32": set(), "NVFP4_STATIC": {1, 2}, "MXFP4": set()}
    for (axes, shape, name), count in first.items():
        assert count == len(collapsed[name] & {a for a, n in zip(axes, shape, strict=True) if n > 1}), (axes, name)
    assert {0, 1, 2} == set(first.values())


def cuts(rank, size):
    mesh = mesh_of((4,))
    found = {}
    for format, shape, axis in [
        (fqt.NVFP4, (8, 32), 2),
        (fqt.NVFP4_STATIC, (8, 32), 2),
        (fqt.MXFP4, (8, 64), 2),
        (fqt.INT4_BLOCK32, (8, 96), 2),
        (fqt.FP8_BLOCK, (384, 128), 1),
        (fqt.FP8_BLOCK, (2, 128), 1),  # the last two ranks hold nothing, and must not wait for those that raise
    ]:
        for layout in ("stacked", "transposed", "separate"):
            params, dims, transposed = parameters(layout, shape, count=2)
            fq = fqt.transform(fqt.select(params, {"*": format}, transposed=transposed))
            state = fq.calibrate(params)
            sharded = {name: placed(w, mesh, placements_of((axis,), dims)) for name, w in params.items()}
            calls = {"init": (fq.init, sharded), "calibrate": (fq.calibrate, sharded)}
            calls["fakequant"] = (fq.fakequant, sharded, state)
            for call, (function, *args) in calls.items():
                found[format.name, shape, layout, call] = message_of(ValueError, function, *args)
    return found


@pytest.mark.dist
def test_a_shard_that_cuts_a_block_is_refused_on_every_rank(ranks):
    """Dynamic formats too, which have no leaf of blocks; on ranks without a cut as well, else these would hang."""
    first, *others = ranks(cuts)
    assert all(found == first for found in others)
    axes = {"FP8_BLOCK": "`out` (dim 1 of"}
    for (name, _, layout, _), message in first.items():
        parameter = "parameter 'experts.0.w'" if layout == "separate" else "parameter 'experts.w'"
        block = fqt.formats.FORMATS[name].block[1]
        cases.assert_names(message, parameter, axes.get(name, "`in` (dim 2 of"), f"a block of {block} of {name}")
    assert "holds 0..96 of 384" in first["FP8_BLOCK", (384, 128), "stacked", "init"]


def mixtures(rank, size):
    mesh = mesh_of((2, 2))
    plain = {f"experts.{i}.w": w for i, w in enumerate(cases.experts(2, (8, 32)))}
    one, other = [Shard(0), Replicate()], [Shard(0), Shard(1)]
    sharded = {name: placed(w, mesh, one) for name, w in plain.items()}
    second = plain["experts.1.w"]
    partial = DTensor.from_local(second, mesh, [Partial(), Replicate()], run_check=False)
    odd = DTensor.from_local(torch.ones(1 + 6 * (1 - rank // 2), 32), mesh, one, shape=second.shape, stride=(32, 1))
    fq = fqt.transform(fqt.select(plain, {"*": fqt.FP8}))
    groups = {
        "a plain tensor": sharded | {"experts.1.w": second},
        "a DTensor among plain ones": plain | {"experts.1.w": sharded["experts.1.w"]},
        "another placement": sharded | {"experts.1.w": placed(second, mesh, other)},
        "another mesh": sharded | {"experts.1.w": placed(second, mesh["b"], [Shard(0)])},
        "partial": dict.fromkeys(plain, partial),
        "odd": dict.fromkeys(plain, odd),
    }
    found = {}
    for what, params in groups.items():
        fq.calibrate(sharded)  # that it was checked must not let pass what follows
        found[what] = message_of(ValueError, fq.calibrate, params)
        if what != "odd":
            assert message_of(ValueError, fq.init, params) == found[what]
            assert message_of(ValueError, fq.fakequant, params, fq.calibrate(plain)) == found[what]
            if what != "partial":
                assert (
                    message_of(ValueError, vjp, lambda p: fq.fakequant(p, fq.calibrate(plain)), params) == found[what]
                )

    # State and weights that are placed differently.
    state, whole = fq.calibrate(sharded), fq.calibrate(plain)
    channel = fqt.transform(fqt.select(plain, {"*": fqt.INT8_PER_CHANNEL}))
    by_out = channel.calibrate(sharded)
    elsewhere = channel.calibrate({name: placed(w, mesh, [Replicate(), Shard(0)]) for name, w in plain.items()})
    leaves = fqt.state.flatten(elsewhere)
    with CommDebugMode() as collectives:
        found |= {
            "plain state": message_of(ValueError, fq.fakequant, sharded, whole),
            "plain weights": message_of(ValueError, fq.fakequant, plain, state),
            "state elsewhere": message_of(ValueError, channel.fakequant, sharded, elsewhere),
            "merge": message_of(ValueError, fqt.merge, by_out, elsewhere),
            "merge with plain": message_of(ValueError, fqt.merge, whole, state),
            "unflatten": message_of(ValueError, fqt.state.unflatten, leaves, by_out),
        }
    assert collectives.get_total_counts() == 0

    # Groups of either kind side by side.
    both = sharded | {f"other.experts.{i}.w": w for i, w in enumerate(plain.values())}
    fq = fqt.transform(fqt.select(both, {"*": fqt.FP8}))
    state = fq.calibrate(both)
    outs = fq.fakequant(both, state)
    assert [isinstance(group["amax"], DTensor) for group in state.values()] == [True, False]
    assert list(outs) == list(both)
    for name in sharded:
        assert_placed_alike(outs[name], outs[f"other.{name}"], mesh, one)
    return found


@pytest.mark.dist
def test_groups_are_of_one_placement_and_their_state_follows_it(ranks):
    """Never redistributed in silence: an error names the parameter or the leaf, what was found and what was wanted."""
    first, *others = ranks(mixtures)
    assert all(found.keys() == first.keys() for found in others)
    one, mesh = "(Shard(dim=0), Replicate())", "DeviceMesh((a=2, b=2), 'cpu'"
    wanted = {
        "a plain tensor": ("'experts.1.w': found a plain tensor, wanted a DTensor", one, mesh, "as 'experts.0.w'"),
        "a DTensor among plain ones": ("'experts.1.w': found a DTensor", one, "wanted a plain tensor as 'experts.0.w'"),
        "another placement": ("'experts.1.w': found a DTensor (Shard(dim=0), Shard(dim=1))", "'experts.0.w'"),
        "another mesh": ("'experts.1.w': found a DTensor (Shard(dim=0),) on DeviceMesh((b=2)", one, "'experts.0.w'"),
        "partial": ("'experts.0.w': found the placement Partial(sum), wanted Shard or Replicate",),
        "odd": ("'experts.0.w': found a local shard of (7, 32), wanted (4, 32) for", one),
        "plain state": ("state 'experts.*.w.amax': found a plain tensor, wanted a DTensor (Replicate(), Replicate())",),
        "plain weights": ("'experts.*.w.amax': found a DTensor (Replicate(), Replicate())", "wanted a plain tensor"),
        "state elsewhere": ("'experts.*.w.amax': found a DTensor (Replicate(), Shard(dim=1))", "(Shard(dim=1), Repl"),
        "merge": (
            "merge: state 'experts.*.w.amax': found a DTensor (Replicate(), Shard(dim=1))",
            "(Shard(dim=1), Repl",
        ),
        "merge with plain": ("merge: state 'experts.*.w.amax': found a DTensor", "wanted a plain tensor"),
        "unflatten": (
            "unflatten: leaf 'experts.*.w.amax': found a DTensor (Replicate(), Shard(dim=1))",
            "(Shard(dim=1)",
        ),
    }
    assert wanted.keys() == first.keys()
    for what, fragments in wanted.items():
        cases.assert_names(first[what], *fragments)


def not_finite(rank, size):
    mesh = mesh_of((2, 2))
    found = {}
    for format in (fqt.FP8, fqt.INT8_PER_CHANNEL, fqt.NVFP4_STATIC, fqt.MXFP4):
        for value in (torch.nan, -torch.nan, torch.inf):
            weights = torch.stack(cases.experts(4, (8, 128)))
            weights[3, 5, 120] = value  # in the last shard of each axis
            weights[3, 5, 0] = 3e38
            for axes in ((0, None), (0, 1), (0, 2), (2, 1)):
                params = {"experts.w": placed(weights, mesh, placements_of(axes, [0, 1, 2]))}
                fq = fqt.transform(fqt.select(params, {"*": format}))
                try:
                    fq.calibrate(params)
                    message = ""
                except ValueError as error:
                    message = str(error)
                found[format.name, str(value), axes] = message
                torch.distributed.barrier()

    # An amax that is invalid is found by the rank that holds it, under the expert's own number.
    params = {"experts.w": placed(torch.stack(cases.experts(4, (8, 128))), mesh, [Shard(0), Shard(1)])}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8_PER_CHANNEL}))
    whole = torch.ones(4, 8, 1)
    whole[3, 5, 0] = -1.0
    state = {"experts.w": {"amax": placed(whole, mesh, [Shard(0), Shard(1)])}}
    for what, (call, *args) in {
        "check": (fqt.state.check, state, fq.spec),
        "fakequant": (fq.fakequant, params, state),
    }.items():
        if rank == 3:
            found[what] = message_of(ValueError, call, *args)
        else:
            call(*args)
    return found


@pytest.mark.dist
def test_what_is_not_finite_raises_on_each_rank_that_holds_the_amax(ranks):
    """NaN survives the maximum, of either sign, beside 3e38; the error has the expert's number in the whole tensor.

    A maximum of floats drops NaN on some backends. Over a collapsed axis all its ranks raise; the others do not, and
    nothing hangs, because the check comes last.
    """
    results = ranks(not_finite)
    # Ranks (a, b) of the mesh that must raise: those that hold the expert's amax, or for MX the weight itself.
    everyone, last_row, last = {0, 1, 2, 3}, {2, 3}, {3}
    kept = {"FP8": (), "INT8_PER_CHANNEL": (1,), "NVFP4_STATIC": (), "MXFP4": (1, 2)}
    for (name, value, axes), _ in ((k, v) for k, v in results[0].items() if isinstance(k, tuple)):
        raised = {rank for rank in range(4) if results[rank][name, value, axes]}
        if axes == (0, None):
            assert raised == last_row
        elif axes[0] == 0:
            assert raised == (last if axes[1] in kept[name] else last_row), (name, axes)
        elif name == "INT8_PER_CHANNEL":
            assert raised == {1, 3}  # mesh axis b splits `out`, which is kept, and a is collapsed
        else:
            assert raised == (last if name == "MXFP4" else everyone), (name, axes)
        for rank in raised:
            seen = "inf" if value == "inf" else "nan"
            wanted = f"calibrate: weight 'experts.w[3]' (expert 3 of 'experts.w'): found the largest magnitude {seen}"
            assert wanted in results[rank][name, value, axes]
    for what in ("check", "fakequant"):
        assert "state 'experts.w.amax': found -1.0 for 'experts.w[3]' at [5, 0]" in results[3][what]


def folds(rank, size):
    mesh = mesh_of((2, 2))
    at = [Shard(0), Shard(2)]
    first, second = (torch.stack(cases.experts(5, (4, 64), seed=seed)) for seed in (1, 2))
    for format in FORMATS[:5]:
        a, b = ({"experts.w": placed(w, mesh, at)} for w in (first, second))
        fq = fqt.transform(fqt.select(a, {"*": format}))
        with CommDebugMode() as collectives:
            merged = fqt.merge(fq.calibrate(a), fq.calibrate(b))
            start = fqt.merge(fq.init(a), merged)
        assert collectives.get_total_counts() == 2 * (format is not fqt.INT4_BLOCK32)
        fqt.state.check(merged, fq.spec)
        wanted = fqt.merge(fq.calibrate({"experts.w": first}), fq.calibrate({"experts.w": second}))
        flat = fqt.state.flatten(merged)
        for name, leaf in fqt.state.flatten(wanted).items():
            assert torch.equal(flat[name].full_tensor(), leaf)
            assert torch.equal(fqt.state.flatten(start)[name].full_tensor(), leaf)
        again = fqt.state.unflatten(flat, like=fq.init(a))
        assert all(x is y for x, y in zip(optree.tree_leaves(again), optree.tree_leaves(merged), strict=True))

    # Meta parameters give a meta state that is placed as the real one is.
    meta = {
        "experts.w": DTensor.from_local(
            torch.empty(local(placed(first, mesh, at)).shape, device="meta"),
            mesh,
            at,
            shape=first.shape,
            stride=first.stride(),
        )
    }
    fq = fqt.transform(fqt.select(meta, {"*": fqt.NVFP4_STATIC}))
    real = fqt.state.flatten(fq.calibrate({"experts.w": placed(first, mesh, at)}))
    state = fq.init(meta)
    for name, leaf in fqt.state.flatten(state).items():
        assert leaf.is_meta
        assert (leaf.shape, leaf.placements, leaf.device_mesh) == (
            real[name].shape,
            real[name].placements,
            real[name].device_mesh,
        )
    assert fq.fakequant(meta, state)["experts.w"].is_meta


@pytest.mark.dist
def test_a_sharded_state_is_a_monoid_and_a_pytree(ranks):
    """merge, flatten and unflatten work on the shards where they lie, with no collective, and meta keeps placements."""
    ranks(folds)


class Experts(torch.nn.Module):
    """A toy MoE layer: every token takes every expert, and the weights are stacked, [E, out, in]."""

    def __init__(self, count=4, features=32, hidden=64):
        super().__init__()
        self.up = torch.nn.Parameter(torch.stack(cases.experts(count, (hidden, features), seed=1)))
        self.down = torch.nn.Parameter(torch.stack(cases.experts(count, (features, hidden), seed=2)))

    def forward(self, tokens):
        hidden = torch.matmul(tokens, self.up.mT).relu()
        return torch.matmul(hidden, self.down.mT).sum(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.head = torch.nn.Linear(32, 3, bias=False)

    def forward(self, tokens):
        return self.head(self.experts(tokens))


RULES = {"experts.*": fqt.NVFP4_STATIC, "head.weight": fqt.FP8_PER_CHANNEL}


def tokens_and_model():
    torch.manual_seed(3)
    return torch.randn(6, 32), Model()


def whole_step(tokens, model, backward="clip"):
    """What one process makes of it: quantized weights, the output, and the gradients of the masters."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    fq = fqt.transform(fqt.select(params, RULES), backward=backward)
    state = fq.calibrate(params)
    weights, pullback = vjp(lambda p: fq.fakequant(p, state), params)
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    out = functional_call(model, weights, (tokens,))
    out.square().sum().backward()
    (grads,) = pullback({name: w.grad for name, w in weights.items()})
    return weights, out, grads


def functional_step(rank, size):
    """functional_call on a module of DTensors, experts over 2 ranks and `out` of the head over 2."""
    mesh = mesh_of((2, 2))
    tokens, model = tokens_and_model()
    wanted, wanted_out, wanted_grads = whole_step(tokens, model)
    at = {"experts.up": [Shard(0), Replicate()], "experts.down": [Shard(0), Replicate()]}
    at["head.weight"] = [Replicate(), Shard(0)]
    for name, p in list(model.named_parameters()):
        module, field = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, field, torch.nn.Parameter(placed(p.detach(), mesh, at[name])))
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, RULES), backward="clip")
    state = fq.calibrate(params)
    inputs = placed(tokens, mesh, [Replicate(), Replicate()])

    # `.backward()` through everything.
    weights = fq.fakequant(params, state)
    for name, w in weights.items():
        assert same_bits(w.full_tensor().detach(), wanted[name].detach())
    out = functional_call(model, weights, (inputs,))
    out.square().sum().backward()
    torch.testing.assert_close(out.full_tensor(), wanted_out)  # sums over ranks run in another order
    for name, p in params.items():
        assert p.grad.placements == p.placements
        torch.testing.assert_close(p.grad.full_tensor(), wanted_grads[name])
        assert (p.grad.full_tensor() == 0).equal(wanted_grads[name] == 0)

    # The quantizer's leg by vjp, the model's by `.backward()`, as in training.
    leaves, pullback = vjp(lambda p: fq.fakequant(p, state), {name: p.detach() for name, p in params.items()})
    leaves = {name: w.detach().requires_grad_() for name, w in leaves.items()}
    functional_call(model, leaves, (inputs,)).square().sum().backward()
    (grads,) = pullback({name: w.grad for name, w in leaves.items()})
    for name, p in params.items():
        assert grads[name].placements == p.placements
        assert torch.equal(grads[name].full_tensor(), p.grad.full_tensor())


@pytest.mark.dist
def test_functional_call_on_a_module_of_dtensors(ranks):
    """The whole training step of the README on DTensors: weights bit for bit, gradients masked alike."""
    ranks(functional_step)


def fsdp_step(rank, size):
    tokens, model = tokens_and_model()
    wanted, wanted_out, wanted_grads = whole_step(tokens, model)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model.experts, mesh=mesh)
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in params.values())
    fq = fqt.transform(fqt.select(params, RULES), backward="clip")
    state = fq.calibrate(params)
    masters = {name: p.detach().clone() for name, p in params.items()}
    weights, pullback = vjp(lambda p: fq.fakequant(p, state), masters)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(weights[name])
    out = model(tokens)
    out.square().sum().backward()
    assert torch.equal(out, wanted_out)
    (grads,) = pullback({name: p.grad for name, p in params.items()})
    for name, weight in weights.items():
        assert same_bits(weight.full_tensor(), wanted[name].detach())
        assert torch.equal(grads[name].full_tensor(), wanted_grads[name])
    optimizer = torch.optim.SGD(params.values(), lr=0.5)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(masters[name])
            p.grad.copy_(grads[name])
    optimizer.step()
    for name, p in params.items():
        assert torch.equal(p.full_tensor(), masters[name].full_tensor() - 0.5 * wanted_grads[name])


@pytest.mark.dist
def test_a_step_under_fully_shard(ranks):
    """FSDP2: calibrated, quantized and pulled back as shards; the head's 3 rows leave the fourth rank with none."""
    ranks(fsdp_step)


def strided(rank, size):
    """FSDP2 over tensor parallelism: both split dimension 0, the outer one within the inner one's shards."""
    mesh = mesh_of((2, 2))
    at = [_StridedShard(0, split_factor=2), Shard(0)]
    for format, out in ((fqt.FP8_BLOCK, 512), (fqt.INT8_PER_CHANNEL, 8), (fqt.FP8, 8)):
        weights = {f"experts.{i}.w": w for i, w in enumerate(cases.experts(2, (out, 32)))}
        params = {name: placed(w, mesh, at) for name, w in weights.items()}
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state, wanted = fq.calibrate(params), fq.calibrate(weights)
        quarter = out // 4
        mine = slice((2 * (rank % 2) + rank // 2) * quarter, (2 * (rank % 2) + rank // 2 + 1) * quarter)
        for name, w in fq.fakequant(params, state).items():
            assert same_bits(local(w), fq.fakequant(weights, wanted)[name][mine])
        amax, whole = state["experts.*.w"]["amax"], wanted["experts.*.w"]["amax"]
        rows = whole.shape[1] // 4 if whole.dim() > 1 else 0
        place = 2 * (rank % 2) + rank // 2
        assert torch.equal(local(amax), whole[:, place * rows : (place + 1) * rows] if rows else whole)
    experts = torch.stack(cases.experts(8, (4, 32)))
    experts[5] = torch.nan
    params = {"experts.w": placed(experts, mesh, at)}
    message = ""
    try:
        fqt.transform(fqt.select(params, {"*": fqt.FP8})).calibrate(params)
    except ValueError as error:
        message = str(error)
    # Without the inner shard the strided one takes every other piece, which no block survives.
    cut = {"experts.w": placed(torch.ones(2, 8, 32), mesh, [_StridedShard(1, split_factor=2), Replicate()])}
    square = fqt.Format("SQUARE", fqt.INT8.element, (4, 4))
    return message, message_of(ValueError, fqt.transform(fqt.select(cut, {"*": square})).init, cut)


@pytest.mark.dist
def test_strided_shards(ranks):
    """What FSDP2 makes of a dimension that tensor parallelism splits too: rows out of the order of the ranks."""
    found = ranks(strided)
    assert ["'experts.w[5]'" in message for message, _ in found] == [False, True, False, False]
    assert len({cut for _, cut in found}) == 1
    cases.assert_names(found[0][1], "'experts.w'", "holds 0..2 of 8", "a block of 4 of SQUARE")


def total(fq, state):
    return lambda params: fq.fakequant(params, state)["experts.w"].sum()


def slope(fq, state):
    """Sum of the gradient of a cube, to be differentiated again."""

    def cube(params):
        return fq.fakequant(params, state)["experts.w"].pow(3).sum()

    return lambda params: grad(cube)(params)["experts.w"].sum()


def halved(state):
    return optree.tree_map(lambda leaf: leaf / 2, state)


def check_transforms(params, whole, fq, rank):
    """Gradients of the sharded parameters are those of the whole ones. Returns what a plain cotangent is told."""
    (param,) = params.values()
    mesh, at = param.device_mesh, param.placements
    state, wanted = halved(fq.calibrate(params)), halved(fq.calibrate(whole))

    # Cotangents that lie elsewhere: a sum's is replicated, and others are partial sums.
    grads = grad(total(fq, state))(params)["experts.w"]
    assert_placed_alike(grads, grad(total(fq, wanted))(whole)["experts.w"], mesh, at)
    _, pullback = vjp(lambda p: fq.fakequant(p, state), params)
    _, whole_pullback = vjp(lambda p: fq.fakequant(p, wanted), whole)
    cotangent = torch.stack(cases.experts(4, (8, 32), seed=9))
    partial = DTensor.from_local(cotangent * (rank // 2 + 1), mesh, [Partial(), Replicate()])
    (pulled,) = pullback({"experts.w": partial})
    (wanted_pulled,) = whole_pullback({"experts.w": cotangent * 3})
    assert_placed_alike(pulled["experts.w"], wanted_pulled["experts.w"], mesh, at)
    (pulled,) = pullback({"experts.w": placed(3 * cotangent.mT.contiguous(), mesh, [Shard(0), Shard(2)]).mT})
    assert_placed_alike(pulled["experts.w"], wanted_pulled["experts.w"], mesh, at)

    # A gradient of a gradient, and the state as an argument. PyTorch's own DTensor has no forward mode.
    twice, wanted_twice = grad(slope(fq, state))(params), grad(slope(fq, wanted))(whole)
    assert_placed_alike(twice["experts.w"], wanted_twice["experts.w"], mesh, at)
    out, _ = vjp(fq.fakequant, params, state)
    assert_placed_alike(out["experts.w"], fq.fakequant(whole, wanted)["experts.w"], mesh, at)
    inside, _ = vjp(lambda p: fq.fakequant(p, halved(fq.calibrate(p))), params)
    assert same_bits(local(inside["experts.w"]), local(out["experts.w"]))

    # The parameter's own shard gets no history.
    leaf = param.detach().requires_grad_()
    fq.fakequant({"experts.w": leaf}, state)["experts.w"].sum().backward()
    assert not leaf._local_tensor.requires_grad
    assert leaf._local_tensor.grad_fn is None
    assert local(leaf.grad).is_contiguous()
    return message_of(ValueError, pullback, {"experts.w": cotangent})


def transforms(rank, size):
    mesh = mesh_of((2, 2))
    whole = {"experts.w": torch.stack(cases.experts(4, (8, 32)))}
    params = {name: placed(w, mesh, [Shard(0), Shard(1)]) for name, w in whole.items()}
    spec = fqt.select(params, {"*": fqt.INT8_PER_CHANNEL})
    found = {}
    for backward in ("pass_through", "clip"):
        fq = fqt.transform(spec, backward=backward, separate=True)
        found["plain cotangent"] = check_transforms(params, whole, fq, rank)
    state = fq.calibrate(params)
    batched = {"experts.w": torch.stack([whole["experts.w"]] * 2)}
    batched = {"experts.w": placed(batched["experts.w"], mesh, [Shard(1), Shard(2)])}
    found["vmap"] = message_of(ValueError, vmap(lambda p: fq.fakequant(p, state)), batched)
    stacked = {"experts.w": {"amax": placed(torch.ones(4, 8, 2, 1), mesh, [Shard(0), Shard(1)])}}
    over = {"experts.w": {"amax": 2}}
    found["vmap of the state"] = message_of(
        ValueError, vmap(lambda s: fq.fakequant(params, s), in_dims=(over,)), stacked
    )
    found["compile"] = message_of(
        Exception, torch.compile(lambda p: fq.fakequant(p, state), backend="eager", fullgraph=True), params
    )
    return found


@pytest.mark.dist
def test_transforms_of_torch_func(ranks):
    """grad, vjp and grad of grad cross to the shards and back; a cotangent placed elsewhere is redistributed."""
    for found in ranks(transforms):
        cases.assert_names(found["plain cotangent"], "'experts.w'", "found a plain tensor", "wanted a DTensor")
        under_vmap = "found a DTensor under torch.func.vmap, wanted a plain tensor"
        cases.assert_names(found["vmap"], "parameter 'experts.w'", under_vmap)
        cases.assert_names(found["vmap of the state"], "state 'experts.w.amax'", under_vmap)
        cases.assert_names(
            found["compile"], "'experts.w'", "found a DTensor under torch.compile, wanted a plain tensor"
        )


PACKAGE = pathlib.Path(fqt.__file__).parent


def test_one_file_knows_dtensor():
    """`dtensor.py` alone imports torch.distributed.tensor; the benchmark makes DTensors as a user does."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            if any(name.startswith("torch.distributed.tensor") for name in names):
                found[path.relative_to(PACKAGE).as_posix()] = True
    assert {path for path in found if not path.startswith("bench/")} == {"dtensor.py"}


def test_plain_tensors_never_import_it():
    """It takes most of a second to import, which nobody pays without a DTensor."""
    code = """
import sys, torch, fq_transforms as fqt
params = {"experts.w": torch.ones(2, 4, 32)}
fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4_STATIC}))
torch.func.vjp(lambda p: fq.fakequant(p, fqt.merge(fq.init(params), fq.calibrate(params))), params)
print("torch.distributed.tensor" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout == "False\n"
