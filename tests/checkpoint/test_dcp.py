"""Checkpoints without faults: what is loaded is what was saved, at any sharding, by any number of ranks, and small."""

import inspect
import json
import os
import re
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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.spec import Spec
from fq_transforms.state import BlockAmax, ExpertAmax, InputAmax, Stateless, flatten, init
from tests.cases import ALL_FORMATS, experts, name_of

RESHARDED = {
    "a.experts.fp8": fqt.FP8,
    "a.experts.channel": fqt.INT8_PER_CHANNEL,
    "a.experts.block": fqt.INT4_BLOCK32,
    "b.experts.nvfp4": fqt.NVFP4,
    "b.experts.static": fqt.NVFP4_STATIC,
    "b.experts.square": fqt.FP8_BLOCK,
    "b.experts.none": fqt.MXFP4,
}
# (expert parallel, tensor parallel); the ranks that are left over are replicas.
PARALLELISM = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


def whole_params(count=8, formats=RESHARDED):
    """Stacked experts [E, 256, 128], each with a magnitude of its own, the same on every rank."""
    return {name: torch.stack(experts(count, (256, 128), seed=i)) for i, name in enumerate(formats)}


def sharded(params, placements, mesh):
    """The same parameters on a mesh, without a collective."""
    return {name: distribute_tensor(weight, mesh, placements, src_data_rank=None) for name, weight in params.items()}


def placed(params, ep, tp, size):
    mesh = init_device_mesh("cpu", (size // (ep * tp), ep, tp), mesh_dim_names=("replica", "ep", "tp"))
    return sharded(params, [Replicate(), Shard(0), Shard(1)], mesh)


def assert_same(found, wanted):
    """Equal states: types, keys, placements, and each number of this rank's part."""
    assert found.keys() == wanted.keys()
    assert [type(group) for group in found.values()] == [type(group) for group in wanted.values()]
    a, b = flatten(found), flatten(wanted)
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert type(x) is type(y), name
        if isinstance(x, DTensor):
            assert (x.placements, x.device_mesh, x.shape) == (y.placements, y.device_mesh, y.shape), name
            x, y = x.to_local(), y.to_local()
        assert x.dtype == torch.float32, name
        assert torch.equal(x, y), name


def small(format=fqt.FP8, count=4):
    """A spec, its transform and a state of `count` experts."""
    params = {f"experts.{i}.w": w for i, w in enumerate(experts(count, (128, 256)))}
    spec = fqt.select(params, {"*": format})
    fq = fqt.transform(spec)
    return spec, fq, fq.calibrate(params), params


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_round_trip(format, kind, tmp_path):
    """load(save(state)) is state for every format, onto the CPU from a meta `like`; the state is not written to."""
    spec, fq, state, params = small(format)
    before = [leaf._version for leaf in flatten(state).values()]
    like = fq.init({name: weight.to("meta") for name, weight in params.items()})
    path = tmp_path / "amax.safetensors"
    if kind == "directory":
        checkpoint.save(state, path, spec=spec)
        found = checkpoint.load(path, like=like, spec=spec)
    else:
        checkpoint.save_file(state, path, spec=spec)
        found = checkpoint.load_file(path, like=like, spec=spec)
        assert_same(checkpoint.load_file(path), state)
    assert_same(found, state)
    assert all(leaf.device.type == "cpu" and not leaf.requires_grad for leaf in flatten(found).values())
    assert [leaf._version for leaf in flatten(state).values()] == before
    assert checkpoint.read_spec(path) == spec
    assert os.listdir(tmp_path) == ["amax.safetensors"]


def test_like_keeps_its_values(tmp_path):
    """The state that is loaded is new: `like` is neither returned nor written to, and its device is kept."""
    spec, fq, state, params = small()
    like = fq.init(params)
    checkpoint.save(state, tmp_path / "a", spec=spec)
    checkpoint.save_file(state, tmp_path / "b", spec=spec)
    for found in (
        checkpoint.load(tmp_path / "a", like=like, spec=spec),
        checkpoint.load(str(tmp_path / "a"), like=state, spec=spec, device="cpu"),
        checkpoint.load_file(tmp_path / "b", like=like),
    ):
        assert_same(found, state)
        assert not {leaf.data_ptr() for leaf in flatten(found).values()} & {
            leaf.data_ptr() for leaf in (*flatten(like).values(), *flatten(state).values())
        }
    assert torch.equal(like["experts.*.w"].amax, torch.full((4,), -torch.inf))


def test_views_and_extreme_numbers(tmp_path):
    """What is stored is the numbers themselves: 0, the smallest and the largest fp32, of a view with strides too."""
    spec, _, _, _ = small(fqt.INT8_PER_CHANNEL)
    numbers = torch.tensor([0.0, 2.0**-149, torch.finfo(torch.float32).max, 1 / 3]).repeat(1, 4 * 32)
    amax = numbers.reshape(128, 4, 1).transpose(0, 1)
    assert not amax.is_contiguous()
    state = {"experts.*.w": ExpertAmax(amax)}
    checkpoint.save(state, tmp_path / "a", spec=spec)
    checkpoint.save_file(state, tmp_path / "b", spec=spec)
    assert_same(checkpoint.load(tmp_path / "a", like=state, spec=spec), state)
    assert_same(checkpoint.load_file(tmp_path / "b"), state)

    # A view of a large tensor stores its own numbers only.
    spec, _, _, _ = small()
    state = {"experts.*.w": ExpertAmax(torch.rand(1 << 20)[:4])}
    checkpoint.save(state, tmp_path / "c", spec=spec)
    checkpoint.save_file(state, tmp_path / "d", spec=spec)
    assert sum(file.stat().st_size for file in [*(tmp_path / "c").iterdir(), tmp_path / "d"]) < 8192


def test_any_reader_of_dcp_and_of_safetensors(tmp_path):
    """Flat names and native shapes: DCP's own reader and safetensors' find every leaf without this package."""
    spec, _, state, _ = small(fqt.NVFP4_STATIC)
    checkpoint.save(state, tmp_path / "a", spec=spec)
    checkpoint.save_file(state, tmp_path / "b", spec=spec)
    leaves = {name: torch.empty_like(leaf) for name, leaf in flatten(state).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(leaves, checkpoint_id=tmp_path / "a")
    with safetensors.safe_open(tmp_path / "b", "pt") as file:
        assert json.loads(file.metadata()["spec"]) == json.loads(spec.to_json())
        for name, leaf in flatten(state).items():
            assert torch.equal(leaves[name], leaf)
            assert torch.equal(file.get_tensor(name), leaf)


def test_names_of_parameters_and_what_is_skipped_are_not_compared(tmp_path):
    """A Spec fits another that decides the same leaves: what else the model has may change."""
    spec, _, state, _ = small()
    other = Spec(tuple(replace(group, names=tuple(f"x{n}" for n in group.names)) for group in spec.groups), ())
    checkpoint.save(state, tmp_path / "a", spec=spec)
    checkpoint.save_file(state, tmp_path / "b", spec=spec)
    assert_same(checkpoint.load(tmp_path / "a", like=state, spec=other), state)
    assert_same(checkpoint.load_file(tmp_path / "b", spec=other), state)


def test_replacing_leaves_one_checkpoint(tmp_path):
    """A second save replaces the first: no file of it stays, files of others do, links are followed."""
    spec, fq, first, params = small()
    second = fq.calibrate({name: 3 * weight for name, weight in params.items()})
    target, link = tmp_path / "real" / "deep" / "state", tmp_path / "link"
    checkpoint.save(first, target, spec=spec)
    (target / "README").write_text("mine")
    before = {file.name for file in target.iterdir()}
    link.symlink_to(target)
    checkpoint.save(second, link, spec=spec)
    after = {file.name for file in target.iterdir()}
    assert link.is_symlink()
    assert len(after) == 3
    assert before & after == {".metadata", "README"}
    assert_same(checkpoint.load(target, like=first, spec=spec), second)
    (tmp_path / "empty").mkdir()
    checkpoint.save(first, tmp_path / "empty", spec=spec)
    assert_same(checkpoint.load(tmp_path / "empty", like=first, spec=spec), first)


def test_imports_are_lazy():
    """`import fq_transforms` loads no engine: torch.distributed.checkpoint takes a second, megatron-core more."""
    import subprocess
    import sys

    code = (
        "import sys, fq_transforms.checkpoint as c; "
        "print([m for m in ('torch.distributed.checkpoint', 'megatron', 'safetensors') if m in sys.modules]); "
        "from fq_transforms.checkpoint import save, load, save_file, load_file, read_spec; "
        "print(sorted(set(c.__all__) - set(dir(c))), hasattr(c, 'nothing'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[] False"]


# Ranks


def _save_at(rank, size, folder, parallelism):
    torch.manual_seed(rank)
    params = whole_params()
    spec = fqt.select(params, RESHARDED)
    for ep, tp in parallelism:
        state = fqt.calibrate(placed(params, ep, tp, size), spec=spec)
        checkpoint.save(state, Path(folder, f"{size}-{ep}-{tp}"), spec=spec)


def _load_at(rank, size, folder, parallelism):
    params = whole_params()
    spec = fqt.select(params, RESHARDED)
    whole = fqt.calibrate(params, spec=spec)
    paths = sorted(path for path in Path(folder).iterdir() if path.name[0] != ".")
    for ep, tp in parallelism:
        weights = placed(params, ep, tp, size)
        wanted = fqt.calibrate(weights, spec=spec)
        for path in paths:
            assert_same(checkpoint.load(path, like=init(weights, spec=spec), spec=spec), wanted)
    # Plain tensors, the same on all ranks; and meta DTensors.
    assert_same(checkpoint.load(paths[-1], like=init(params, spec=spec), spec=spec), whole)
    meta = {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
    like = init(meta, spec=spec)
    assert like["a.experts.fp8"].amax.is_meta
    assert_same(checkpoint.load(paths[0], like=like, spec=spec), wanted)
    return [path.name for path in paths]


@pytest.mark.dist
def test_any_parallelism_to_any_other(ranks, tmp_path):
    """EP and TP at save, by 1, 2, 4 and 8 ranks, to EP and TP at load: each rank gets what it would have calibrated."""
    fitting = {size: [(ep, tp) for ep, tp in PARALLELISM if size % (ep * tp) == 0] for size in (1, 2, 4)}
    fitting[8] = [(4, 2)]
    for size, parallelism in fitting.items():
        ranks(_save_at, tmp_path, parallelism, size=size)
    for size, parallelism in fitting.items():
        saved = ranks(_load_at, tmp_path, parallelism, size=size)
        assert [len(names) for names in saved] == [1 + 3 + 5 + 1] * size
    # And one process without a process group.
    params = whole_params()
    spec = fqt.select(params, RESHARDED)
    for path in tmp_path.iterdir():
        found = checkpoint.load(path, like=fqt.transform(spec).init(params), spec=spec)
        assert_same(found, fqt.calibrate(params, spec=spec))


def _odd_shardings(rank, size, folder):
    """Shards of unequal size, empty ones, two axes on one dimension, a mesh of some ranks, and a stage's own spec."""
    mesh, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))
    formats = {"x.experts.channel": fqt.INT8_PER_CHANNEL, "x.experts.fp8": fqt.FP8}
    for count in (1, 3, 5):
        params = whole_params(count, formats)
        spec = fqt.select(params, formats)
        path = Path(folder, f"uneven{count}")
        shardings = [
            (mesh, [Shard(0)]),
            (mesh, [Shard(1)]),
            (square, [Shard(0), Shard(0)]),
            (square, [Shard(0), Shard(1)]),
            (square, [_StridedShard(1, split_factor=2), Shard(1)]),  # FSDP2 over tensor parallelism
        ]
        for number, (on, placements) in enumerate(shardings):
            state = fqt.calibrate(sharded(params, placements, on), spec=spec)
            checkpoint.save(state, path, spec=spec)  # replaces the one before
            other_mesh, other = shardings[number - 1]
            weights = sharded(params, other, other_mesh)
            found = checkpoint.load(path, like=init(weights, spec=spec), spec=spec)
            assert_same(found, fqt.calibrate(weights, spec=spec))

    # Pipeline stages: each half of the ranks has its own layer, spec and mesh; all save and load one checkpoint.
    layers = [{f"layers.{layer}.experts.w": fqt.INT8_PER_CHANNEL} for layer in (0, 1)]
    both = {**layers[0], **layers[1]}
    params = whole_params(4, both)
    halves = [DeviceMesh("cpu", list(range(size // 2))), DeviceMesh("cpu", list(range(size // 2, size)))]
    stage = rank // (size // 2)
    path = Path(folder, "stages")

    def stage_weights(stage):
        return sharded({name: params[name] for name in layers[stage]}, [Shard(0)], halves[rank // (size // 2)])

    spec = fqt.select(stage_weights(stage), layers[stage])
    checkpoint.save(fqt.calibrate(stage_weights(stage), spec=spec), path, spec=spec)
    assert {group.key for group in checkpoint.read_spec(path).groups} == both.keys()
    swapped = stage_weights(1 - stage)
    spec = fqt.select(swapped, layers[1 - stage])
    found = checkpoint.load(path, like=init(swapped, spec=spec), spec=spec)
    assert_same(found, fqt.calibrate(swapped, spec=spec))
    spec = fqt.select(params, both)
    assert_same(checkpoint.load(path, like=init(params, spec=spec), spec=spec), fqt.calibrate(params, spec=spec))

    # Some of the ranks, as a group of their own.
    group = dist.new_group([0, 1])
    if rank in (0, 1):
        checkpoint.save(found, Path(folder, "some"), spec=fqt.select(swapped, layers[1 - stage]), process_group=group)


@pytest.mark.dist
def test_odd_shardings(ranks, tmp_path):
    """Uneven and empty shards, one dimension split twice, pipeline stages, and a group of some ranks: exact, too."""
    ranks(_odd_shardings, tmp_path)
    assert [group.key for group in checkpoint.read_spec(tmp_path / "some").groups] == ["layers.1.experts.w"]


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
    spec = fqt.select(params, RESHARDED)
    weights = placed(params, 2, 2, size)
    state, like = fqt.calibrate(weights, spec=spec), init(weights, spec=spec)
    with _Collectives() as collectives:
        checkpoint.save(state, folder / "a", spec=spec)
        checkpoint.load(folder / "a", like=like, spec=spec)
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


def _many_groups():
    """46 layers of 128 experts, as Nemotron-3-Nano has: 5,888 amax."""
    params = {
        f"backbone.layers.{layer}.mixer.experts.{i}.up_proj.weight": torch.empty(1856, 2688, device="meta")
        for layer in range(46)
        for i in range(128)
    }
    spec = fqt.select(params, {"*": fqt.NVFP4})
    return spec, {group.key: ExpertAmax(torch.rand(128)) for group in spec.groups}


def _seconds_and_bytes(rank, size, folder):
    spec, state = _many_groups()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        state = {k: ExpertAmax(distribute_tensor(v.amax, mesh, [Shard(0)])) for k, v in state.items()}
    seconds = {"engine": [], "save": [], "load": []}
    for i in range(3):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"tiny": torch.ones(1)}, checkpoint_id=Path(folder, f"tiny{size}-{i}"))
        middle = time.perf_counter()
        checkpoint.save(state, Path(folder, f"ours{size}"), spec=spec)
        end = time.perf_counter()
        checkpoint.load(Path(folder, f"ours{size}"), like=state, spec=spec)
        for key, value in zip(seconds, (middle - start, end - middle, time.perf_counter() - end), strict=True):
            seconds[key].append(value)
    total = sum(file.stat().st_size for file in Path(folder, f"ours{size}").iterdir())
    return {key: min(values) for key, values in seconds.items()}, total


@pytest.mark.dist
def test_size_and_speed(ranks, tmp_path):
    """46 groups of 128 experts: under a second beside what DCP takes for one number, and 64 KiB a rank."""
    for size, results in ((1, [_seconds_and_bytes(0, 1, tmp_path)]), (4, ranks(_seconds_and_bytes, tmp_path))):
        for seconds, total in results:
            assert seconds["save"] - seconds["engine"] < 1, (size, seconds)
            assert seconds["load"] < 1, (size, seconds)
            assert total <= 1.2 * 46 * 128 * 4 + size * 65536, (size, total)


def test_state_types_are_named_tuples_again(tmp_path):
    """Static two-level formats come back with both leaves."""
    spec, _, state, _ = small(fqt.NVFP4_STATIC)
    checkpoint.save_file(state, tmp_path / "a", spec=spec)
    assert isinstance(checkpoint.load_file(tmp_path / "a")["experts.*.w"], BlockAmax)


STATIC = fqt.NVFP4_STATIC
RULES = [
    fqt.Rule("*.up.*", STATIC, fqt.FP8),
    fqt.Rule("*.down.*", STATIC, fqt.NVFP4, per_expert_inputs=True),
    fqt.Rule("q*", STATIC, fqt.MXFP8),
]


def of_inputs():
    """Weights, and inputs that experts share, that each has, and that keep nothing."""
    params = {f"experts.{i}.{role}.w": w for role in ("up", "down") for i, w in enumerate(experts(3, (32, 32)))}
    params |= {"q.w": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(params, RULES))
    state = fqt.calibrate(params, spec=replace(fq.spec, inputs=()))
    tokens = torch.tensor([2.0**52 + 1, 0.0, 3.0], dtype=torch.float64)
    return (
        params,
        fq,
        state
        | {
            "experts.*.up.w.input": InputAmax(torch.tensor([0.3]), tokens),
            "experts.*.down.w.input": InputAmax(torch.tensor([0.3, 1.0, 7.0]), tokens / 3),
            "q.w.input": Stateless(),
        },
    )


def same_leaves(found, wanted):
    a, b = flatten(found), flatten(wanted)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_inputs_round_trip(kind, tmp_path):
    """Scales and tokens to the last bit, with the spec; unseen experts cannot be saved, other inputs not be loaded."""
    params, fq, state = of_inputs()
    meta = {name: w.to("meta") for name, w in params.items()}
    save, load = (
        (checkpoint.save, checkpoint.load) if kind == "directory" else (checkpoint.save_file, checkpoint.load_file)
    )
    path = tmp_path / "state"
    save(state, path, spec=fq.spec)
    assert checkpoint.read_spec(path) == fq.spec
    assert checkpoint.read_spec(path).rules == tuple(RULES)
    found = load(path, like=fq.init(meta), spec=fq.spec)
    assert same_leaves(found, state)
    assert [type(entry) for entry in found.values()] == [type(entry) for entry in state.values()]
    for change, fragment in [
        (fqt.Rule("*.up.*", STATIC, fqt.INT8), "'experts.*.up.w.input': found format FP8"),
        (
            fqt.Rule("*.down.*", STATIC, fqt.NVFP4),
            "'experts.*.down.w.input': found leaves {'amax': (3,), 'tokens': (3,)}",
        ),
        (fqt.Rule("q*", STATIC), "['q.w.input']"),
        (fqt.Rule("*", STATIC), "['experts.*.down.w.input', 'experts.*.up.w.input', 'q.w.input']"),
    ]:
        other = fqt.transform(fqt.select(params, [*RULES, change]))
        with pytest.raises(ValueError, match=re.escape(fragment)):
            load(path, like=other.init(meta), spec=other.spec)
    unseen = state | {"experts.*.down.w.input": InputAmax(torch.tensor([0.3, -torch.inf, 7.0]), torch.ones(3).double())}
    with pytest.raises(ValueError, match="found no token for expert 1 of 3"):
        save(unseen, tmp_path / "unseen", spec=fq.spec)


def save_inputs(rank, size, path):
    _, fq, state = of_inputs()
    checkpoint.save(state, path, spec=fq.spec)
    assert same_leaves(checkpoint.load(path, like=state, spec=fq.spec), state)


@pytest.mark.dist
def test_inputs_are_saved_by_ranks_and_loaded_by_one(ranks, tmp_path):
    ranks(save_inputs, tmp_path / "state", size=2)
    _, fq, state = of_inputs()
    assert same_leaves(checkpoint.load(tmp_path / "state", like=state, spec=fq.spec), state)
