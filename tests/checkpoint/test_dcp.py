"""Checkpoints without faults: what is loaded is what was saved, at any sharding, by any number of ranks, and small."""

import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.spec import Spec
from fq_transforms.state import flatten
from tests.cases import ALL_FORMATS, assert_names, experts, message_of, name_of
from tests.checkpoint.samples import (
    FORMATS,
    KINDS,
    assert_same,
    bits,
    like_of,
    load_as,
    packed_of,
    placed,
    save_as,
    sharded,
    small,
    whole_params,
)
from tests.full import FULL

# (expert parallel, tensor parallel); the ranks that are left over are replicas.
PARALLELISM = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_round_trip(format, tmp_path):
    """load(save(state)) is state for every format, onto the CPU from a meta `like`; the state is not written to."""
    fq, state, params = small(format)
    before = [leaf._version for leaf in flatten(state).values()]
    like = fq.init({name: weight.to("meta") for name, weight in params.items()})
    for kind in KINDS:
        path = tmp_path / kind
        save_as(kind, path, fq, state)
        found = load_as(kind, path, fq, like)
        assert_same(found, state)
        assert all(leaf.device.type == "cpu" and not leaf.requires_grad for leaf in flatten(found).values())
        assert checkpoint.read_spec(path) == fq.spec
    assert_same(checkpoint.load_file(tmp_path / "file", fq), state)
    assert [leaf._version for leaf in flatten(state).values()] == before
    assert sorted(os.listdir(tmp_path)) == KINDS


def test_like_keeps_its_values(tmp_path):
    """The state that is loaded is new: `like` is neither returned nor written to, and its device is kept."""
    fq, state, params = small()
    like = fq.init(params)
    checkpoint.save(tmp_path / "a", fq, state)
    checkpoint.save_file(tmp_path / "b", fq, state)
    for found in (
        checkpoint.load(tmp_path / "a", fq, like=like),
        checkpoint.load(str(tmp_path / "a"), fq, like=state, device="cpu"),
        checkpoint.load_file(tmp_path / "b", fq, like=like),
    ):
        assert_same(found, state)
        assert not {leaf.data_ptr() for leaf in flatten(found).values()} & {
            leaf.data_ptr() for leaf in (*flatten(like).values(), *flatten(state).values())
        }
    assert torch.equal(like["experts.*.w"]["amax"], torch.full((4,), -torch.inf))


def test_views_and_extreme_numbers(tmp_path):
    """What is stored is the numbers themselves: 0, the smallest and the largest fp32, of a view with strides too."""
    fq, _, _ = small(fqt.INT8_PER_CHANNEL)
    numbers = torch.tensor([0.0, 2.0**-149, torch.finfo(torch.float32).max, 1 / 3]).repeat(1, 4 * 32)
    amax = numbers.reshape(128, 4, 1).transpose(0, 1)
    assert not amax.is_contiguous()
    state = {"experts.*.w": {"amax": amax}}
    for kind in KINDS:
        save_as(kind, tmp_path / kind, fq, state)
        assert_same(load_as(kind, tmp_path / kind, fq, state), state)

    # A view of a large tensor stores its own numbers only.
    fq, _, _ = small()
    state = {"experts.*.w": {"amax": torch.rand(1 << 20)[:4]}}
    checkpoint.save(tmp_path / "c", fq, state)
    checkpoint.save_file(tmp_path / "d", fq, state)
    assert sum(file.stat().st_size for file in [*(tmp_path / "c").iterdir(), tmp_path / "d"]) < 8192


def test_any_reader_of_dcp_and_of_safetensors(tmp_path):
    """Flat names and native shapes: DCP's own reader and safetensors' find every leaf without this package."""
    fq, state, _ = small(fqt.NVFP4_STATIC)
    checkpoint.save(tmp_path / "a", fq, state)
    checkpoint.save_file(tmp_path / "b", fq, state)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(state).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=tmp_path / "a")
    with safetensors.safe_open(tmp_path / "b", "pt") as file:
        assert json.loads(file.metadata()["spec"]) == json.loads(fq.spec.to_json())
        for name, leaf in flatten(state).items():
            assert torch.equal(leaves[name], leaf)
            assert torch.equal(file.get_tensor(name), leaf)


def test_names_of_parameters_and_what_is_skipped_are_not_compared(tmp_path):
    """A Spec fits another that decides the same leaves: what else the model has may change."""
    fq, state, _ = small()
    groups = tuple(
        replace(group, names=tuple(n.replace("experts.", "experts.0") for n in group.names)) for group in fq.spec.groups
    )
    other = fqt.transform(Spec(groups))
    for kind in KINDS:
        save_as(kind, tmp_path / kind, fq, state)
        assert_same(load_as(kind, tmp_path / kind, other, state), state)


def test_replacing_leaves_one_checkpoint(tmp_path):
    """A second save replaces the first: no file of it stays, files of others do, links are followed."""
    fq, first, params = small()
    second = fq.calibrate({name: 3 * weight for name, weight in params.items()})
    target, link = tmp_path / "real" / "deep" / "state", tmp_path / "link"
    checkpoint.save(target, fq, first)
    (target / "README").write_text("mine")
    before = {file.name for file in target.iterdir()}
    link.symlink_to(target)
    checkpoint.save(link, fq, second)
    after = {file.name for file in target.iterdir()}
    assert link.is_symlink()
    assert len(after) == 3
    assert before & after == {".metadata", "README"}
    assert_same(checkpoint.load(target, fq, like=first), second)
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", fq, first)
    assert_same(checkpoint.load(tmp_path / "empty", fq, like=first), first)


def test_imports_are_lazy():
    """`import fq_transforms` loads no engine: torch.distributed.checkpoint takes a second, megatron-core more."""
    code = (
        "import sys, fq_transforms.checkpoint, fq_transforms.checkpoint.storage; "
        "print([m for m in ('torch.distributed.checkpoint', 'megatron') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[]"
    assert all(hasattr(checkpoint, name) and name in dir(checkpoint) for name in checkpoint.__all__)
    assert not hasattr(checkpoint, "nothing")


STATIC = fqt.NVFP4_STATIC
RULES = [
    fqt.Rule("*.up.*", STATIC, fqt.FP8),
    fqt.Rule("*.down.*", STATIC, fqt.NVFP4, per_expert_inputs=True),
    fqt.Rule("q*", STATIC, fqt.MXFP8),
]


def of_inputs(*changes):
    """Weights, and inputs that experts share, that each has, and that keep nothing; with changes to the rules."""
    params = {f"experts.{i}.{role}.w": w for role in ("up", "down") for i, w in enumerate(experts(3, (32, 32)))}
    params |= {"q.w": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(params, [*RULES, *changes]))
    state = fqt.transform(replace(fq.spec, inputs=())).calibrate(params)
    tokens = torch.tensor([2.0**52 + 1, 0.0, 3.0], dtype=torch.float64)
    state |= {
        "experts.*.up.w.input": {"amax": torch.tensor([0.3]), "tokens": tokens},
        "experts.*.down.w.input": {"amax": torch.tensor([0.3, 1.0, 7.0]), "tokens": tokens / 3},
        "q.w.input": {},
    }
    return params, fq, state


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_round_trip(kind, tmp_path):
    """Scales and tokens to the last bit, with the spec; unseen experts cannot be saved, other inputs not be loaded."""
    params, fq, state = of_inputs()
    meta = {name: w.to("meta") for name, w in params.items()}
    save_as(kind, tmp_path / "state", fq, state)
    assert checkpoint.read_spec(tmp_path / "state") == fq.spec
    assert checkpoint.read_spec(tmp_path / "state").rules == tuple(RULES)
    found = load_as(kind, tmp_path / "state", fq, fq.init(meta))
    assert_same({key: found[key] for key in state}, state)
    for change, fragment in [
        (fqt.Rule("*.up.*", STATIC, fqt.INT8), "'experts.*.up.w.input': found format FP8"),
        (
            fqt.Rule("*.down.*", STATIC, fqt.NVFP4),
            "'experts.*.down.w.input': found leaves {'amax': (3,), 'tokens': (3,)}",
        ),
        (fqt.Rule("q*", STATIC), "['q.w.input']"),
        (fqt.Rule("*", STATIC), "['experts.*.down.w.input', 'experts.*.up.w.input', 'q.w.input']"),
    ]:
        _, other, _ = of_inputs(change)
        message = message_of(ValueError, load_as, kind, tmp_path / "state", other, other.init(meta))
        assert_names(message, fragment)
    amax = torch.tensor([0.3, -torch.inf, 7.0])
    unseen = state | {"experts.*.down.w.input": {"amax": amax, "tokens": torch.ones(3).double()}}
    message = message_of(ValueError, save_as, kind, tmp_path / "unseen", fq, unseen)
    assert_names(message, "found no token for expert 1 of 3")


# Ranks


def _save_at(rank, size, folder, parallelism):
    torch.manual_seed(rank)
    params = whole_params()
    fq = fqt.transform(fqt.select(params, FORMATS))
    for ep, tp in parallelism:
        weights = placed(params, ep, tp, size)
        checkpoint.save(folder / f"state {size} {ep} {tp}", fq, fq.calibrate(weights))
        checkpoint.save(folder / f"packed {size} {ep} {tp}", fq, packed_of(fq, weights))


def _load_at(rank, size, folder, parallelism, every):
    """Each rank's part of what was saved is what it calibrates and packs from its own weights."""
    params = whole_params()
    fq = fqt.transform(fqt.select(params, FORMATS))
    whole, whole_packed = fq.calibrate(params), packed_of(fq, params)
    states, packeds = sorted(folder.glob("state *")), sorted(folder.glob("packed *"))
    compared = 0
    for number, (ep, tp) in enumerate(parallelism):
        weights = placed(params, ep, tp, size)
        state, packed = fq.calibrate(weights), packed_of(fq, weights)
        # What a rank packs of its shard is its part of what one process packs.
        for name, leaf in flatten(whole_packed).items():
            wanted = flatten(packed)[name]
            part = distribute_tensor(leaf, wanted.device_mesh, wanted.placements, src_data_rank=None)
            assert torch.equal(bits(wanted.to_local()), bits(part.to_local())), name
        for path in states[number % every :: every]:
            assert_same(checkpoint.load(path, fq, like=fq.init(weights)), state)
            compared += 1
        for other, path in enumerate(packeds[number % every :: every]):
            assert_same(checkpoint.load(path, fq, like=like_of(fq, weights) if other % 2 else packed), packed)
            compared += 1
    # Plain tensors, the same on all ranks; and meta DTensors.
    assert_same(checkpoint.load(states[-1], fq, like=fq.init(params)), whole)
    assert_same(checkpoint.load(packeds[-1], fq, like=like_of(fq, params)), whole_packed)
    like = fq.init({name: torch.empty_like(weight, device="meta") for name, weight in weights.items()})
    assert like["a.experts.fp8"]["amax"].is_meta
    assert_same(checkpoint.load(states[0], fq, like=like), state)
    return compared


@pytest.mark.dist
def test_any_parallelism_to_any_other(ranks, tmp_path):
    """EP and TP at save, by 1, 2, 4 and 8 ranks, to EP and TP at load: each rank has what it would have made itself.

    Each loads every third of the ten checkpoints of each kind, beginning with another; 4 and 8 ranks all with FULL=1.
    """
    fitting = {size: [(ep, tp) for ep, tp in PARALLELISM if size % (ep * tp) == 0] for size in (1, 2, 4)}
    fitting[8] = [(4, 2)]
    for size, parallelism in fitting.items():
        ranks(_save_at, tmp_path, parallelism, size=size)
    for size, parallelism in fitting.items():
        every = 1 if FULL and size >= 4 else 3
        compared = ranks(_load_at, tmp_path, parallelism, every, size=size)
        assert min(compared) == max(compared) >= 2 * len(parallelism) * (10 // every)
    # And one process without a process group.
    params = whole_params()
    fq = fqt.transform(fqt.select(params, FORMATS))
    for path in tmp_path.glob("state *"):
        assert_same(checkpoint.load(path, fq, like=fq.init(params)), fq.calibrate(params))
    for path in tmp_path.glob("packed *"):
        assert_same(checkpoint.load(path, fq, like=like_of(fq, params)), packed_of(fq, params))


def _odd_shardings(rank, size, folder):
    """Shards of unequal size, empty ones, two axes on one dim, an axis that a scale collapses: each kind of tree."""
    mesh, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))
    formats = {"x.experts.channel": fqt.INT8_PER_CHANNEL, "x.experts.fp8": fqt.FP8, "x.experts.nvfp4": fqt.NVFP4}
    shardings = [
        (mesh, [Shard(0)]),
        (mesh, [Shard(1)]),
        (mesh, [Shard(2)]),
        (square, [Shard(0), Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Shard(2)]),
        (square, [_StridedShard(1, split_factor=2), Shard(1)]),  # FSDP2 over tensor parallelism
    ]
    for count, out in ((1, 2), (3, 128), (5, 3)):
        params = {name: weight[:, :out].contiguous() for name, weight in whole_params(count, formats).items()}
        fq = fqt.transform(fqt.select(params, formats))
        whole = {
            "state": (fq.calibrate(params), fq.init(params)),
            "packed": (packed_of(fq, params), like_of(fq, params)),
        }
        before = whole
        for on, placements in [*shardings, shardings[0]]:
            weights = sharded(params, placements, on)
            here = {
                "state": (fq.calibrate(weights), fq.init(weights)),
                "packed": (packed_of(fq, weights), like_of(fq, weights)),
            }
            for kind, (tree, _) in here.items():
                path = folder / f"{kind}{count}"
                checkpoint.save(path, fq, tree)  # replaces the one before
                for wanted, like in (whole[kind], before[kind]):
                    assert_same(checkpoint.load(path, fq, like=like), wanted)
            before = here


def _stages_and_groups(rank, size, folder):
    """Pipeline stages with a spec and a mesh each, in one checkpoint; some ranks alone; and experts packed alone."""
    layers = [{f"layers.{layer}.experts.w": fqt.INT8_PER_CHANNEL} for layer in (0, 1)]
    both = {**layers[0], **layers[1]}
    params = whole_params(4, both)
    halves = [DeviceMesh("cpu", list(range(size // 2))), DeviceMesh("cpu", list(range(size // 2, size)))]
    stage = rank // (size // 2)
    path = folder / "stages"

    def at(stage):
        weights = sharded({name: params[name] for name in layers[stage]}, [Shard(0)], halves[rank // (size // 2)])
        return fqt.transform(fqt.select(weights, layers[stage])), weights

    fq, weights = at(stage)
    checkpoint.save(path, fq, fq.calibrate(weights))
    assert {group.key for group in checkpoint.read_spec(path).groups} == both.keys()
    fq, swapped = at(1 - stage)
    found = checkpoint.load(path, fq, like=fq.init(swapped))
    assert_same(found, fq.calibrate(swapped))
    group = dist.new_group([0, 1])
    if rank in (0, 1):
        checkpoint.save(folder / "some", fq, found, process_group=group)
    fq = fqt.transform(fqt.select(params, both))
    assert_same(checkpoint.load(path, fq, like=fq.init(params)), fq.calibrate(params))

    # Plain weights, as engines hold them: what each rank packs of its own experts is its shard.
    params = whole_params(2 * size)
    fq, mesh = fqt.transform(fqt.select(params, FORMATS)), init_device_mesh("cpu", (size,))
    here = {name: weight.chunk(size)[rank] for name, weight in params.items()}
    own = packed_of(fqt.transform(fqt.select(here, FORMATS)), here)
    shards = {
        key: {name: DTensor.from_local(leaf, mesh, [Shard(0)]) for name, leaf in leaves.items()}
        for key, leaves in own.items()
    }
    checkpoint.save(folder / "own", fq, shards)
    assert_same(checkpoint.load(folder / "own", fq, like=like_of(fq, params)), packed_of(fq, params))


@pytest.mark.dist
def test_odd_shardings(ranks, tmp_path):
    """Uneven and empty shards, one dim split twice, pipeline stages, and a group of some ranks: exact, too."""
    ranks(_odd_shardings, tmp_path)
    ranks(_stages_and_groups, tmp_path)
    assert [group.key for group in checkpoint.read_spec(tmp_path / "some").groups] == ["layers.1.experts.w"]


def _save_inputs(rank, size, path):
    _, fq, state = of_inputs()
    checkpoint.save(path, fq, state)
    assert_same(checkpoint.load(path, fq, like=state), state)


@pytest.mark.dist
def test_inputs_are_saved_by_ranks_and_loaded_by_one(ranks, tmp_path):
    """Plain leaves that are the same on all ranks are stored once."""
    ranks(_save_inputs, tmp_path / "state", size=2)
    _, fq, state = of_inputs()
    assert_same(checkpoint.load(tmp_path / "state", fq, like=state), state)


class _Collectives(TorchDispatchMode):
    """Counts collectives by who asked for them: this package, or DCP."""

    def __init__(self):
        super().__init__()
        self.ours, self.dcps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does to its shards comes here again
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"):
            for frame in inspect.stack(context=0):
                if "/torch/distributed/checkpoint/" in frame.filename:
                    self.dcps += 1
                    break
                if "/fq_transforms/" in frame.filename and "/tests/" not in frame.filename:
                    self.ours.append((func.name(), frame.function))
                    break
        return func(*args, **(kwargs or {}))


def _count_collectives(rank, size, folder):
    params = whole_params()
    fq = fqt.transform(fqt.select(params, FORMATS))
    weights = placed(params, 2, 2, size)
    state, like = fq.calibrate(weights), fq.init(weights)
    with _Collectives() as collectives:
        checkpoint.save(folder / "a", fq, state)
        checkpoint.load(folder / "a", fq, like=like)
    # That it can see one of ours: code with a name inside the package, which asks for one.
    planted = {}
    exec(compile("def planted(t): dist.all_reduce(t)", fqt.__file__, "exec"), {"dist": dist}, planted)
    with _Collectives() as seen:
        planted["planted"](torch.ones(1))
    return collectives.ours, collectives.dcps, [function for _, function in seen.ours]


@pytest.mark.dist
def test_no_collective_of_ours(ranks, tmp_path):
    """Saving and loading make no collective beside DCP's own: the innermost of the two packages on the stack is DCP."""
    for ours, dcps, planted in ranks(_count_collectives, tmp_path):
        assert ours == []
        assert dcps > 4
        assert planted == ["planted"]


def _seconds_and_bytes(rank, size, folder):
    """46 layers of 128 experts, as Nemotron-3-Nano has: 5,888 amax."""
    params = {
        f"backbone.layers.{layer}.mixer.experts.{i}.up_proj.weight": torch.empty(1856, 2688, device="meta")
        for layer in range(46)
        for i in range(128)
    }
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
    state = {group.key: {"amax": torch.rand(128)} for group in fq.spec.groups}
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        state = {key: sharded(group, [Shard(0)], mesh) for key, group in state.items()}
    seconds = {"engine": [], "save": [], "load": []}
    for i in range(3):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"tiny": torch.ones(1)}, checkpoint_id=Path(folder, f"tiny{size}-{i}"))
        middle = time.perf_counter()
        checkpoint.save(Path(folder, f"ours{size}"), fq, state)
        end = time.perf_counter()
        checkpoint.load(Path(folder, f"ours{size}"), fq, like=state)
        for key, value in zip(seconds, (middle - start, end - middle, time.perf_counter() - end), strict=True):
            seconds[key].append(value)
    total = sum(file.stat().st_size for file in Path(folder, f"ours{size}").iterdir())
    return {key: min(values) for key, values in seconds.items()}, total


@pytest.mark.dist
def test_size_and_speed(ranks, tmp_path):
    """46 groups of 128 experts: under a second beside what DCP takes for one number, and 64 KiB per rank."""
    for size, results in ((1, [_seconds_and_bytes(0, 1, tmp_path)]), (4, ranks(_seconds_and_bytes, tmp_path))):
        for seconds, total in results:
            assert seconds["save"] - seconds["engine"] < 1, (size, seconds)
            assert seconds["load"] < 1, (size, seconds)
            assert total <= 1.2 * 46 * 128 * 4 + size * 65536, (size, total)


# Ranks that differ


class _Scene:
    """What each rank is told of faults that one of them has."""

    def __init__(self, rank, size):
        self.rank, self.size, self.mesh = rank, size, init_device_mesh("cpu", (size,))
        params = {"x.experts.w": torch.stack(experts(8, (64, 32)))}
        self.fq, self.other = (fqt.transform(fqt.select(params, {"*": format})) for format in (fqt.FP8, fqt.INT8))
        self.amax = torch.rand(8) + 1
        self.told = {}

    def whole(self, amax, placement=None):
        leaf = amax if placement is None else DTensor.from_local(amax, self.mesh, [placement])
        return {"x.experts.w": {"amax": leaf}}

    def sharded(self, amax):
        return self.whole(amax.chunk(self.size)[self.rank].clone(), Shard(0))

    def with_gaps(self):
        square, gaps = init_device_mesh("cpu", (2, self.size // 2)), [Shard(0), _StridedShard(0, split_factor=2)]
        local = self.amax.chunk(self.size)[self.rank].clone()
        return {"x.experts.w": {"amax": DTensor.from_local(local, square, gaps, shape=(8,), stride=(1,))}}

    def tell(self, name, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
            self.told[name] = "no error"
        except (ValueError, OSError) as error:
            self.told[name] = f"{type(error).__name__}: {error}"
        dist.barrier()


def _save_with_faults(rank, size, folder):
    scene = _Scene(rank, size)
    amax, fq = scene.amax, scene.fq
    invalid = amax.clone()
    invalid[5] = torch.nan
    scene.tell("nan", checkpoint.save, folder / "a", fq, scene.sharded(invalid))
    scene.tell("copies", checkpoint.save, folder / "b", fq, scene.whole(amax + rank))
    scene.tell("replicas", checkpoint.save, folder / "c", fq, scene.whole(amax + rank, Replicate()))
    scene.tell("partial", checkpoint.save, folder / "d", fq, scene.whole(amax + rank, Partial("max")))
    scene.tell("gaps", checkpoint.save, folder / "e", fq, scene.with_gaps())
    scene.tell("specs", checkpoint.save, folder / "f", scene.other if rank == 2 else fq, scene.whole(amax))
    (folder / "file").write_text("x")
    scene.tell("taken", checkpoint.save, folder / "file", fq, scene.sharded(amax))
    return scene.told, sorted(path.name for path in folder.iterdir())


def _load_with_faults(rank, size, folder):
    scene, good = _Scene(rank, size), folder / "good"
    amax, fq = scene.amax, scene.fq
    checkpoint.save(good, fq, scene.sharded(amax))
    scene.tell("like", checkpoint.load, good, fq, like=scene.whole(torch.zeros(7 if rank == 1 else 8)))
    scene.tell("gaps", checkpoint.load, good, fq, like=scene.with_gaps())
    scene.tell("wanted", checkpoint.load, good, scene.other if rank == 3 else fq, like=scene.whole(amax))
    # Damage in the file that rank 2 wrote, which rank 2 alone reads again.
    (file,) = good.glob("*_2.distcp")
    dist.barrier()
    if rank == 0:
        content = file.read_bytes()
        file.write_bytes(content[:-30] + bytes([content[-30] ^ 4]) + content[-29:])
    dist.barrier()
    scene.tell("damaged", checkpoint.load, good, fq, like=scene.sharded(amax))
    if rank == 0:
        file.unlink()
    dist.barrier()
    scene.tell("gone", checkpoint.load, good, fq, like=scene.sharded(amax))
    return scene.told, [path.name for path in folder.iterdir()]


SAVE_FAULTS = {
    "nan": ("rank 2: state 'x.experts.w.amax': found nan for 'x.experts.w[5]'",),
    "copies": ("rank 0: state 'x.experts.w.amax': found different values on ranks 0 and 1", "checkpoint.megatron"),
    "replicas": ("found different values on ranks 0 and 1",),
    "partial": ("state 'x.experts.w.amax': found a DTensor with placements (Partial(max),), wanted Shard or",),
    "gaps": ("state 'x.experts.w.amax'", "whose shards have gaps"),
    "specs": ("group 'x.experts.w': found format FP8 on rank 0 and INT8 on rank 2, wanted one spec",),
    "taken": ("found a file, wanted a new name",),
}
LOAD_FAULTS = {
    "like": ("rank 1: state 'x.experts.w.amax': found (7,) torch.float32, wanted (8,)",),
    "gaps": ("state 'x.experts.w.amax'", "whose shards have gaps"),
    "wanted": ("rank 3: group 'x.experts.w': found format FP8, wanted INT8",),
    "damaged": ("rank 2: leaf 'x.experts.w.amax' in file", "_2.distcp", "truncated, damaged"),
    "gone": ("FileNotFoundError", "_2.distcp"),
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("function", "faults", "left"),
    [(_save_with_faults, SAVE_FAULTS, ["file"]), (_load_with_faults, LOAD_FAULTS, ["good"])],
    ids=["save", "load"],
)
def test_one_rank_finds_it_and_all_raise(function, faults, left, ranks, tmp_path):
    """A fault on one rank is the same error on each, and no rank waits."""
    for told, found in ranks(function, tmp_path):
        assert found == left
        assert told.keys() == faults.keys()
        for name, fragments in faults.items():
            assert_names(told[name], str(tmp_path), *fragments)
