"""`fq_transforms.checkpoint.megatron`: Megatron's models in real processes, from any parallelism to any other."""

import itertools
import multiprocessing
import os
import queue
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import optree
import pytest
import torch
import torch.distributed as dist

import fq_transforms as fqt
from fq_transforms.checkpoint import megatron
from fq_transforms.formats import (
    FP8,
    FP8_BLOCK,
    INT4_BLOCK32,
    INT8,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP6_E2M3,
    NVFP4,
    NVFP4_STATIC,
)
from tests.cases import assert_names
from tests.checkpoint.samples import assert_same, like_of
from tests.full import FULL

# Errors of Megatron's come back from the workers as such, and importing Megatron warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS, EXPERTS, HIDDEN, FFN = 2, 4, 128, 128


class Layout(NamedTuple):
    """How the ranks share a model."""

    ep: int = 1
    etp: int = 1
    tp: int = 1
    pp: int = 1


# Of four ranks. Where a product is less, the ranks that are left are data-parallel replicas.
LAYOUTS = [
    Layout(),
    Layout(ep=2),
    Layout(ep=4),
    Layout(etp=2, tp=2),
    Layout(ep=2, etp=2, tp=2),
    Layout(ep=2, etp=1, tp=2),
    Layout(ep=2, pp=2),
    Layout(etp=2, tp=2, pp=2),
]

EVERY = ("*.experts.*", "*.linear_qkv.weight", "*.linear_proj.weight")
EXPERTS_ONLY = ("*.experts.*",)
# For each kind of tree, formats and whether fc1 is gated: one that is gated and split along `out` lies in two pieces.
# Both kinds of fc1 where a leaf has that axis.
CASES = {
    "state": [
        (FP8, True),
        (NVFP4, False),
        *itertools.product((INT8_PER_CHANNEL, INT4_BLOCK32, NVFP4_STATIC), (True, False)),
    ],
    "packed": [
        (FP8, True),
        (INT8_PER_CHANNEL, True),
        (INT4_BLOCK32, False),
        (NVFP4, True),
        (MXFP4, True),
        (MXFP6_E2M3, False),
    ],
    "packed in squares": [(FP8_BLOCK, False)],  # which tensor parallelism would cut
}
RULES = {"state": EVERY, "packed": EXPERTS_ONLY, "packed in squares": EXPERTS_ONLY}

# All of expert parallelism to all; the others from 4 and to 1, and to each other in a ring.
OTHERS = range(3, len(LAYOUTS))
PAIRS = {(0, 0), (2, 3), (4, 0), *zip(OTHERS, [*OTHERS[1:], OTHERS[0]], strict=True)}
if FULL:
    PAIRS |= {
        *itertools.product(range(3), repeat=2),
        *((2, other) for other in OTHERS),
        *((other, 0) for other in OTHERS),
    }


def share(layout):
    """Make Megatron's process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp
    )


def build(layout, *, gated, experts=EXPERTS, hidden=HIDDEN):
    """A GPTModel of Megatron's own layers, whose weights are this rank's parts of one global model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_ffn_hidden_size=FFN,
        ffn_hidden_size=FFN,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False),
        vocab_size=64,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    with torch.no_grad():
        for name, param in model.named_parameters():
            part = part_of(name, layout, gated=gated, experts=experts, hidden=hidden)
            if part is not None:
                param.copy_(part)
    return model


def part_of(name, layout, *, gated, experts=EXPERTS, hidden=HIDDEN):
    """This rank's part of a weight of the global model, cut here by hand; None for what is not quantized."""
    from megatron.core import parallel_state

    words = name.split(".")
    if words[-1] != "weight" or words[-2] not in ("linear_fc1", "linear_fc2", "linear_qkv", "linear_proj"):
        return None
    layer = int(words[2]) + parallel_state.get_pipeline_model_parallel_rank() * LAYERS // layout.pp
    if "local_experts" in words:
        expert = int(words[words.index("local_experts") + 1])
        expert += parallel_state.get_expert_model_parallel_rank() * experts // layout.ep
        rank, size = parallel_state.get_expert_tensor_parallel_rank(), layout.etp
    else:
        expert, rank, size = 0, parallel_state.get_tensor_model_parallel_rank(), layout.tp
    shape, dim = {
        "linear_fc1": ((2 * FFN if gated else FFN, hidden), 0),
        "linear_fc2": ((hidden, FFN), 1),
        "linear_qkv": ((3 * hidden, hidden), 0),
        "linear_proj": ((hidden, hidden), 1),
    }[words[-2]]
    seed = hash((layer, expert, words[-2] == "linear_fc1", words[-2] == "linear_qkv", "local_experts" in words))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**31)) * 2.0 ** (expert + 5 * layer)
    if words[-2] == "linear_fc1" and gated:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank]


def state_of(params, spec):
    """What this rank calibrates on its weights, and the maxima over a split axis over its ranks, reduced by hand."""
    from megatron.core import parallel_state

    state = fqt.transform(spec).calibrate(params)
    for key, group in state.items():
        axis = 1 if "linear_fc1" in key or "linear_qkv" in key else 2
        of_experts = parallel_state.get_expert_tensor_parallel_group()
        over = of_experts if "local_experts" in key else parallel_state.get_tensor_model_parallel_group()
        for leaf in group.values():
            if leaf.dim() == 1 or leaf.shape[axis] == 1:
                dist.all_reduce(leaf, dist.ReduceOp.MAX, group=over)
    return state


def transform_of(params, format, rules=EVERY):
    return fqt.transform(fqt.select(params, dict.fromkeys(rules, format)))


def allow_writers():
    """Megatron's writer starts processes, which daemons, as these workers are, may not."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    multiprocessing.current_process()._config["daemon"] = False
    # What a writer has to say comes back through a queue in a server process, which would outlive a worker that is
    # killed: any queue will do here.
    filesystem_async._results_queue = queue.Queue()


def save(entries, folder):
    from megatron.core import dist_checkpointing

    allow_writers()
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save(entries, str(folder))


def load(entries, folder, **options):
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(entries, str(folder), **options)


COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "recv",
    "isend",
    "irecv",
    "new_group",
]


@contextmanager
def counted():
    """How many collectives there were, and how many had this package among their callers."""
    count = {"all": 0, "ours": 0}
    package = str(Path(fqt.__file__).parent)

    def counting(function):
        def call(*args, **kwargs):
            count["all"] += 1
            frame, ours = sys._getframe(), False
            while frame is not None:
                ours |= frame.f_code.co_filename.startswith(package)
                frame = frame.f_back
            count["ours"] += ours
            return function(*args, **kwargs)

        return call

    modules = [dist, dist.distributed_c10d]
    before = [(module, name, getattr(module, name)) for module in modules for name in COLLECTIVES]
    for module, name, function in before:
        setattr(module, name, counting(function))
    try:
        yield count
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def same(a, b):
    """Equal leaf for leaf, to the last bit."""
    return a.keys() == b.keys() and optree.tree_all(optree.tree_map(torch.equal, a, b))


# Eight ranks: EP 4 and TP 2 at once, to and from others.
LAYOUTS_OF_EIGHT = [Layout(ep=4, etp=2, tp=2), Layout(ep=2, etp=1, tp=2), *([Layout()] if FULL else [])]
PAIRS_OF_EIGHT = {(0, 1), (1, 0), *({(0, 2), (2, 0)} if FULL else ())}


def _any_to_any(rank, size, folder, layouts, pairs):
    """Save at every layout, all trees in one checkpoint, and load from others at each."""
    compared = 0
    with counted() as count:
        trees = []
        for number, layout in enumerate(layouts):
            trees.append(trees_at(layout))
            entries = {}
            for fq, _, model_sharded, tree in trees[-1].values():
                entries |= megatron.sharded_state_dict(fq, tree, model_sharded)
            save(entries, f"{folder}/{number}")
        for source, target in sorted(pairs):
            places, wanted = {}, []
            for kind in trees[target].keys() & trees[source].keys():
                fq, params, model_sharded, tree = trees[target][kind]
                # Some places are of meta parameters, and so without memory.
                params = {name: param.to("meta") if "NVFP4" in name else param for name, param in params.items()}
                like = fq.init(params) if kind == "state" else like_of(fq, params)
                megatron.verify(f"{folder}/{source}", fq, model_sharded, like=like)
                places |= megatron.sharded_state_dict(fq, like, model_sharded)
                wanted.append((fq, like, tree))
            loaded = load(places, f"{folder}/{source}")
            for fq, like, tree in wanted:
                # Entries of several layers have the names of all their leaves.
                assert_same(megatron.load_state(fq, of(fq, loaded), like), tree)
                compared += len(tree)
    return compared, count


def of(fq, loaded):
    """The entries of the groups of a transform, where the groups of others are loaded with them."""
    keys = {group.key for group in fq.spec.groups}
    return {name: entry for name, entry in loaded.items() if name.partition("\n")[0].rpartition(".")[0] in keys}


def trees_at(layout):
    """For each kind of tree: its transform, the parameters of all its cases, their entries, and this rank's tree."""
    share(layout)
    models = {gated: build(layout, gated=gated) for gated in (True, False)}
    sharded = {gated: model.sharded_state_dict() for gated, model in models.items()}
    trees = {}
    for kind, cases in CASES.items():
        if kind == "packed in squares" and layout.etp > 1:
            continue
        params, entries, rules = {}, {}, {}
        for format, gated in cases:
            prefix = f"{format.name}-{gated}."  # keys of its own for each case, in one checkpoint
            for name, param in models[gated].named_parameters():
                params[prefix + name], entry = param, sharded[gated][name]
                entries[prefix + name] = replace(entry, key=prefix + entry.key)
            rules |= {f"{prefix}{rule}": format for rule in RULES[kind]}
        fq = fqt.transform(fqt.select(params, rules))
        state = state_of(params, fq.spec)
        trees[kind] = fq, params, entries, state if kind == "state" else fq.pack(params, state)
    return trees


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("size", "layouts", "pairs"), [(4, LAYOUTS, PAIRS), (8, LAYOUTS_OF_EIGHT, PAIRS_OF_EIGHT)])
def test_any_parallelism_to_any(ranks, tmp_path, size, layouts, pairs):
    """Saved at one parallelism and loaded at another, each rank has what it calibrates and packs of its own weights.

    And nothing here communicates: of all collectives of saving and loading, none has this package among its callers.
    """
    results = ranks(_any_to_any, str(tmp_path), layouts, pairs, size=size)
    wanted = 0
    for source, target in pairs:
        for kind, cases in CASES.items():
            if kind != "packed in squares" or layouts[source].etp == layouts[target].etp == 1:
                # fc1 and fc2, qkv and proj, of two layers, or of one at PP=2.
                wanted += len(cases) * (4 if RULES[kind] == EVERY else 2) * LAYERS // layouts[target].pp
    for compared, count in results:
        assert compared == wanted
        assert count["ours"] == 0
        assert count["all"] > len(pairs)


def entries_of(model, *, by_layer):
    """The model's entries; a dict of options of its own each time, for Megatron writes its process groups into it."""
    return model.sharded_state_dict(metadata={"non_homogeneous_layers": by_layer})


def _with_the_model(rank, size, folder):
    """Save a model and its state at one layout, load both at another; layers in one tensor, and each in its own."""
    loaded_keys = 0
    for number in range(2):
        for source, target in ((Layout(ep=4), Layout(ep=2, etp=2, tp=2)), (Layout(ep=2, pp=2), Layout(ep=4))):
            path = f"{folder}/{number}-{source.pp}"
            share(source)
            model = build(source, gated=True)
            params = dict(model.named_parameters())
            fq, model_sharded = transform_of(params, NVFP4_STATIC), entries_of(model, by_layer=number == 1)
            save(model_sharded | megatron.sharded_state_dict(fq, state_of(params, fq.spec), model_sharded), path)

            share(target)
            model = build(target, gated=True)
            params = dict(model.named_parameters())
            fq = transform_of(params, NVFP4_STATIC)
            wanted = state_of(params, fq.spec)
            weights = {name: param.detach().clone() for name, param in params.items()}
            with torch.no_grad():
                for param in params.values():
                    param.zero_()
            model_sharded = entries_of(model, by_layer=number == 1)
            megatron.verify(path, fq, model_sharded)
            places = megatron.sharded_state_dict(fq, fq.init(params), model_sharded)
            loaded = load(model_sharded | places, path, strict="raise_all")
            model.load_state_dict({name: loaded[name] for name in model_sharded})
            assert_same(megatron.load_state(fq, loaded, fq.init(params)), wanted)
            for group in fq.spec.groups:
                assert all(torch.equal(params[name], weights[name]) for name in group.names)
                loaded_keys += 1

            # Alone, from a checkpoint that has the model too.
            places = megatron.sharded_state_dict(fq, fq.init(params), model_sharded)
            assert_same(megatron.load_state(fq, load(places, path), fq.init(params)), wanted)
    return loaded_keys


@pytest.mark.dist
def test_with_the_model_and_from_its_checkpoint(ranks, tmp_path):
    """Model and state are saved and loaded in one call, under `strict="raise_all"`, or the state alone afterwards.

    Also where the layer is in the key: heterogeneous models have no layer axis.
    """
    assert ranks(_with_the_model, str(tmp_path)) == [32] * 4


FEW = ("*.linear_fc1.weight",)
LAST = "decoder.layers.1.mlp.experts.local_experts.*.linear_fc2.weight"


class Good(NamedTuple):
    """A model, its state, and a checkpoint of it; and what is said of each fault."""

    folder: Path
    model: torch.nn.Module
    params: dict
    model_sharded: dict
    fq: fqt.Transform
    state: dict
    empty: dict
    said: dict

    @property
    def path(self):
        return self.folder / "good"

    def entries(self, tree=None, fq=None, model_sharded=None):
        return megatron.sharded_state_dict(fq or self.fq, tree or self.state, model_sharded or self.model_sharded)

    def fault(self, name, error, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except error as caught:
            self.said[name] = str(caught.args[0]) if isinstance(caught, KeyError) else str(caught)
        else:
            raise AssertionError(f"{name}: nothing was raised")


def _faults(rank, size, folder):
    """What is said of each fault, by its name. One rank: nothing waits for another."""
    share(Layout())
    model = build(Layout(), gated=True)
    params = dict(model.named_parameters())
    fq = transform_of(params, FP8, EXPERTS_ONLY)
    state, empty = state_of(params, fq.spec), fq.init(params)
    good = Good(Path(folder), model, params, model.sharded_state_dict(), fq, state, empty, {})
    save(good.entries(), good.path)
    megatron.verify(good.path, fq, good.model_sharded)
    checks = _other_leaves, _other_formats, _bad_values, _damaged_files, _what_cannot_be_saved, _packed_and_state
    for check in checks:
        check(good)
    return good.said


def _other_leaves(good):
    few = transform_of(good.params, FP8, FEW)
    save(good.entries(state_of(good.params, few.spec), few), good.folder / "few")
    good.fault("unknown", KeyError, megatron.verify, good.folder / "few", good.fq, good.model_sharded)
    good.fault("unknown to the engine", BaseException, load, good.entries(good.empty), good.folder / "few")
    good.fault("extra", ValueError, megatron.verify, good.path, few, good.model_sharded)

    other = build(Layout(), gated=True, experts=2 * EXPERTS)
    others, sharded = dict(other.named_parameters()), other.sharded_state_dict()
    more = transform_of(others, FP8, EXPERTS_ONLY)
    state = state_of(others, more.spec)
    good.fault("experts", ValueError, megatron.verify, good.path, more, sharded)
    good.fault("experts to the engine", BaseException, load, good.entries(state, more, sharded), good.path)
    good.fault("two models", ValueError, good.entries, state, more, sharded | good.model_sharded)
    good.fault("no such parameter", KeyError, good.entries, state, more)

    wide = build(Layout(), gated=True, hidden=2 * HIDDEN)
    by_block = transform_of(good.params, INT4_BLOCK32, FEW)
    save(good.entries(state_of(good.params, by_block.spec), by_block), good.folder / "by block")
    wider = transform_of(dict(wide.named_parameters()), INT4_BLOCK32, FEW)
    good.fault("shape", ValueError, megatron.verify, good.folder / "by block", wider, wide.sharded_state_dict())

    loaded = load(good.entries(good.empty), good.path)
    name = next(name for name in loaded if name.endswith(".amax"))
    fewer = {key: value for key, value in loaded.items() if key != name}
    damaged = {name.replace(".amax", ".format"): torch.zeros(LAYERS, 512, dtype=torch.uint8)}
    good.fault("missing", KeyError, megatron.load_state, good.fq, fewer, good.empty)
    good.fault("unknown loaded", ValueError, megatron.load_state, few, loaded, few.init(good.params))
    cut = {"cut": loaded[name][:, :3], "a layer cut": loaded[name][:1]}
    for fault, value in cut.items():
        good.fault(fault, ValueError, megatron.load_state, good.fq, loaded | {name: value}, good.empty)
    good.fault("damaged format", ValueError, megatron.load_state, good.fq, loaded | damaged, good.empty)


def entry_of(leaf, entries):
    """The name of the entry that holds a leaf."""
    (name,) = (name for name in entries if leaf in name.split("\n"))
    return name


def _other_formats(good):
    fewer_numbers = replace(FP8, element=replace(FP8.element, max=416.0))
    for name, format in (("format", INT8), ("other leaves", NVFP4_STATIC), ("same name", fewer_numbers)):
        fq = transform_of(good.params, format, EXPERTS_ONLY)
        good.fault(name, ValueError, megatron.verify, good.path, fq, good.model_sharded)
    fq = transform_of(good.params, INT8, EXPERTS_ONLY)
    empty = fq.init(good.params)
    loaded = load(good.entries(empty, fq), good.path)
    good.fault("format loaded", ValueError, megatron.load_state, fq, loaded, empty)


def _bad_values(good):
    for value in (torch.nan, torch.inf, -1.0):
        bad, path = optree.tree_map(torch.clone, good.state), good.folder / f"{value}"
        leaves = good.entries(bad)
        bad[LAST]["amax"][3] = value
        leaves[entry_of(f"{LAST}.amax", leaves)].data[1, 3] = value  # behind our back
        save(leaves, path)
        megatron.verify(path, good.fq, good.model_sharded)
        loaded = load(good.entries(good.empty), path)
        good.fault(f"amax {value}", ValueError, megatron.load_state, good.fq, loaded, good.empty)
        good.fault(f"saving {value}", ValueError, good.entries, bad)
    in_part = good.state | {LAST: good.empty[LAST]}
    good.fault("uncalibrated in part", ValueError, good.entries, in_part)
    good.fault("uncalibrated", Exception, save, good.entries(good.empty), good.folder / "empty")


def _damaged_files(good):
    file = min(path.name for path in good.path.glob("*.distcp"))
    for name, damage in (("truncated", lambda path: os.truncate(path, 3000)), ("deleted", Path.unlink)):
        path = good.folder / name
        shutil.copytree(good.path, path)
        damage(path / file)
        good.fault(name, ValueError, megatron.verify, path, good.fq, good.model_sharded)
        good.fault(f"{name} to the engine", BaseException, load, good.entries(good.empty), path)

    numbers = good.state[LAST]["amax"].numpy().tobytes()
    for bit in (0, 23, 31):  # the last bit of a number, the last of its exponent, its sign
        path = good.folder / f"bit {bit}"
        shutil.copytree(good.path, path)
        (file,) = (file for file in path.glob("*.distcp") if numbers in file.read_bytes())
        content = bytearray(file.read_bytes())
        content[content.find(numbers) + bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        good.fault(f"bit {bit}", ValueError, megatron.verify, path, good.fq, good.model_sharded)
        # Megatron loads it silently. Were that to change, `verify` need not read the files.
        loaded = load(good.entries(good.empty), path)
        assert not torch.equal(loaded[entry_of(f"{LAST}.amax", loaded)][1], good.state[LAST]["amax"])

    shutil.copytree(good.path, good.folder / "metadata")
    os.truncate(good.folder / "metadata" / ".metadata", 100)
    (good.folder / "no checkpoint").mkdir()
    for name, content in (("zarr", '{"sharded_backend": "zarr"}'), ("no json", "{")):
        (good.folder / name).mkdir()
        (good.folder / name / "metadata.json").write_text(content)
    for name in ("metadata", "no checkpoint", "zarr", "no json", "nothing"):
        good.fault(name, ValueError, megatron.verify, good.folder / name, good.fq, good.model_sharded)


def _what_cannot_be_saved(good):
    # A tensor with a layer axis has all layers; where the layer is in the key, any of them.
    by_channel = transform_of(good.params, INT8_PER_CHANNEL, ("*layers.1.mlp.experts.*",))
    entries = good.entries(state_of(good.params, by_channel.spec), by_channel)
    good.fault("some layers", Exception, save, entries, good.folder / "by channel")
    some = transform_of(good.params, FP8, ("*layers.1.mlp.experts.*",))
    some_state, empty = state_of(good.params, some.spec), some.init(good.params)
    save(good.entries(some_state, some), good.folder / "some")
    megatron.verify(good.folder / "some", some, good.model_sharded)
    loaded = load(good.entries(empty, some), good.folder / "some")
    assert_same(megatron.load_state(some, loaded, empty), some_state)
    # The other layers are in no file, and Megatron says nothing of it.
    good.fault("not all layers", ValueError, megatron.verify, good.folder / "some", good.fq, good.model_sharded)
    loaded = load(good.entries(good.empty), good.folder / "some")
    good.fault("not all layers loaded", ValueError, megatron.load_state, good.fq, loaded, good.empty)
    by_layer = good.model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    save(good.entries(some_state, some, by_layer), good.folder / "by layer")
    megatron.verify(good.folder / "by layer", some, by_layer)

    one_each = good.model.sharded_state_dict(metadata={"singleton_local_shards": True})
    good.fault("expert in the key", ValueError, good.entries, model_sharded=one_each)
    names = [f"decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc2.weight" for i in (1, 2)]
    swapped = dict(zip(names, [good.model_sharded[name] for name in names[::-1]], strict=True))
    for name, entries in (("experts swapped", swapped), ("no ShardedTensor", {names[0]: torch.ones(2)})):
        good.fault(name, ValueError, good.entries, model_sharded=good.model_sharded | entries)
    long = transform_of(good.params, replace(FP8, name="FP8" * 200), EXPERTS_ONLY)
    good.fault("long name", ValueError, good.entries, state_of(good.params, long.spec), long)
    mesh = dist.init_device_mesh("cpu", (1,))
    spread = optree.tree_map(lambda leaf: dist.tensor.DTensor.from_local(leaf, mesh), good.state)
    good.fault("DTensor", ValueError, good.entries, spread)


def _packed_and_state(good):
    """A state for packed weights and the other way round; what does not fit, or is damaged, among packed weights."""
    fq, sharded, folder = transform_of(good.params, NVFP4, EXPERTS_ONLY), good.model_sharded, good.folder
    state, empty = state_of(good.params, fq.spec), fq.init(good.params)
    packed, like = fq.pack(good.params, state), like_of(fq, good.params)

    def entries(tree):
        return megatron.sharded_state_dict(fq, tree, sharded)

    # The model, the state and the packed weights in one checkpoint; each is found, and the others are left alone.
    save(good.model.sharded_state_dict() | entries(state) | entries(packed), folder / "all")
    megatron.verify(folder / "all", fq, sharded)
    megatron.verify(folder / "all", fq, sharded, like=like)
    loaded = load(good.model.sharded_state_dict() | entries(empty) | entries(like), folder / "all")
    assert_same(megatron.load_state(fq, loaded, like), packed)
    assert_same(megatron.load_state(fq, loaded, empty), state)

    save(entries(state), folder / "state")
    save(entries(packed), folder / "packed")
    good.fault("state as packed", KeyError, megatron.verify, folder / "state", fq, sharded, like=like)
    good.fault("packed as state", KeyError, megatron.verify, folder / "packed", fq, sharded)
    good.fault("state loaded", KeyError, megatron.load_state, fq, load(entries(empty), folder / "state"), like)
    mx = transform_of(good.params, MXFP4, EXPERTS_ONLY)
    mx_like = like_of(mx, good.params)
    good.fault("packed format", ValueError, megatron.verify, folder / "packed", mx, sharded, like=mx_like)
    few = transform_of(good.params, NVFP4, FEW)
    few_like = like_of(few, good.params)
    good.fault("packed extra", ValueError, megatron.verify, folder / "packed", few, sharded, like=few_like)

    loaded = load(entries(like), folder / "packed")
    codes = next(name for name in loaded if name.endswith("linear_fc2.weight.codes"))
    fewer = {name: leaf for name, leaf in loaded.items() if name != codes}
    good.fault("packed missing", KeyError, megatron.load_state, fq, fewer, like)
    cut, signed = loaded | {codes: loaded[codes][:, :3]}, loaded | {codes: loaded[codes].view(torch.int8)}
    good.fault("packed shape", ValueError, megatron.load_state, fq, cut, like)
    good.fault("packed dtype", ValueError, megatron.load_state, fq, signed, like)
    good.fault("packed unknown", ValueError, megatron.load_state, few, loaded, few_like)
    good.fault("not packed", Exception, save, entries(like), folder / "no numbers")

    numbers = packed[LAST]["codes"].numpy().tobytes()[:4096]
    shutil.copytree(folder / "packed", folder / "packed bit")
    (file,) = (file for file in (folder / "packed bit").glob("*.distcp") if numbers in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(numbers) + 9] ^= 4
    file.write_bytes(content)
    good.fault("packed bit", ValueError, megatron.verify, folder / "packed bit", fq, sharded, like=like)
    shutil.copytree(folder / "packed", folder / "packed cut")
    os.truncate(folder / "packed cut" / file.name, 3000)
    good.fault("packed cut", ValueError, megatron.verify, folder / "packed cut", fq, sharded, like=like)


@pytest.mark.dist
def test_faults_are_named(ranks, tmp_path):
    """Each fault is found before anything is loaded, or nothing is; the error names leaf, group, parameter or file."""
    (said,) = ranks(_faults, str(tmp_path), size=1)
    fc1, fc2 = (f"decoder.layers.{{}}.mlp.experts.local_experts.*.linear_fc{i}.weight" for i in (1, 2))
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight_quantizer._amax"
    for name, *fragments in [
        ("unknown", tmp_path / "few", fc2.format(0), "linear_fc2.weight_quantizer._format"),
        ("extra", tmp_path / "good", key),
        ("experts", fc1.format(0), key.replace("fc2", "fc1"), (LAYERS, EXPERTS), (LAYERS, 2 * EXPERTS)),
        ("two models", "local_experts.4.linear_fc1.weight"),
        ("no such parameter", "local_experts.4.linear_fc1.weight"),
        ("shape", fc1.format(0), (LAYERS, EXPERTS, 2 * FFN, 4), (LAYERS, EXPERTS, 2 * FFN, 8)),
        ("format", fc1.format(0), "FP8", "INT8"),
        ("other leaves", fc1.format(0), "FP8", "NVFP4_STATIC"),
        ("same name", fc1.format(0), "448.0", "416.0"),
        ("format loaded", fc1.format(0), "FP8", "INT8"),
        ("amax nan", fc2.format(1), "nan", "local_experts.3"),
        ("amax inf", fc2.format(1), "inf", "local_experts.3"),
        ("amax -1.0", fc2.format(1), "-1.0", "local_experts.3"),
        ("saving nan", fc2.format(1), "nan", "local_experts.3"),
        ("missing", f"{fc1.format(0)}.amax"),
        ("unknown loaded", f"{fc2.format(0)}.amax"),
        ("cut", f"{fc1.format(0)}.amax", "(3,)", "(4,)"),
        ("a layer cut", f"{fc1.format(0)}.amax", "(1, 4)", 2),
        ("damaged format", fc1.format(0)),
        ("truncated", tmp_path / "truncated" / "__0_0.distcp"),
        ("deleted", tmp_path / "deleted" / "__0_0.distcp"),
        *((f"bit {bit}", tmp_path / f"bit {bit}", ".distcp", key, "CRC-32") for bit in (0, 23, 31)),
        ("metadata", tmp_path / "metadata" / ".metadata"),
        ("no checkpoint", tmp_path / "no checkpoint"),
        ("zarr", tmp_path / "zarr", "'zarr'", "'torch_dist'"),
        ("no json", tmp_path / "no json"),
        ("nothing", tmp_path / "nothing"),
        ("uncalibrated in part", fc2.format(1), "calibrate"),
        ("uncalibrated", "`data`", "_amax"),
        # What Megatron says itself, where it does.
        ("unknown to the engine", "linear_fc2.weight_quantizer._amax"),
        ("experts to the engine", "Global shape mismatch", "linear_fc1.weight_quantizer._amax"),
        ("truncated to the engine", "PytorchStreamReader failed"),
        ("deleted to the engine", "__0_0.distcp"),
        ("some layers", "Invalid access pattern", "linear_fc1.weight_quantizer._amax"),
        ("not all layers", tmp_path / "some", "incomplete", "linear_fc1.weight_quantizer._format"),
        ("not all layers loaded", fc1.format(0)),
        ("expert in the key", "local_experts.0", "singleton_local_shards"),
        ("experts swapped", "local_experts.1.linear_fc2.weight"),
        ("no ShardedTensor", "local_experts.1.linear_fc2.weight"),
        ("long name", "512"),
        ("DTensor", f"{fc1.format(0)}.amax"),
        # Packed weights.
        ("state as packed", "_packed._format", "4 entries of a state", "0 entries of packed weights"),
        ("packed as state", "_quantizer._format", "0 entries of a state", "entries of packed weights"),
        ("state loaded", "missing", ".codes"),
        ("packed format", "found format NVFP4 in the checkpoint, the spec wants MXFP4"),
        ("packed extra", "linear_fc2.weight_packed._codes"),
        ("packed missing", f"{fc2.format(0)}.codes"),
        ("packed shape", f"{fc2.format(0)}.codes", (4, 3, 64), (4, 128, 64)),
        ("packed dtype", f"{fc2.format(0)}.codes", "torch.int8", "torch.uint8"),
        ("packed unknown", f"{fc2.format(0)}.codes"),
        ("not packed", "`data`", "_packed"),
        ("packed bit", tmp_path / "packed bit", "_packed._codes", "CRC-32"),
        ("packed cut", tmp_path / "packed cut"),
    ]:
        assert_names(said[name], *fragments)


def _te_to_sequential(rank, size, folder):
    """Save by Transformer Engine's names at EP 4, load by SequentialMLP's at EP 2 and ETP 2, and back."""
    share(Layout(ep=4))
    model = build(Layout(ep=4), gated=True)
    params = dict(model.named_parameters())
    te_names = {name: re.sub(r"local_experts\.(\d+)\.(.*)", r"\2\1", name) for name in params if ".experts." in name}
    te_params = {te: params[name] for name, te in te_names.items()}
    te_sharded = {te: model.sharded_state_dict()[name] for name, te in te_names.items()}
    te_fq, fq = (transform_of(held, INT8_PER_CHANNEL, EXPERTS_ONLY) for held in (te_params, params))
    assert te_fq.spec.groups[0].key == "decoder.layers.0.mlp.experts.linear_fc1.weight*"
    te_state = te_fq.calibrate(te_params)
    save(megatron.sharded_state_dict(te_fq, te_state, te_sharded), f"{folder}/te")
    save(megatron.sharded_state_dict(fq, state_of(params, fq.spec), model.sharded_state_dict()), f"{folder}/s")

    places = megatron.sharded_state_dict(te_fq, te_fq.init(te_params), te_sharded)
    assert_same(megatron.load_state(te_fq, load(places, f"{folder}/s"), te_state), te_state)

    layout = Layout(ep=2, etp=2, tp=2)
    share(layout)
    model = build(layout, gated=True)
    params = dict(model.named_parameters())
    fq = transform_of(params, INT8_PER_CHANNEL, EXPERTS_ONLY)
    places = megatron.sharded_state_dict(fq, fq.init(params), model.sharded_state_dict())
    assert_same(megatron.load_state(fq, load(places, f"{folder}/te"), fq.init(params)), state_of(params, fq.spec))


@pytest.mark.dist
def test_te_and_sequential_are_interchangeable(ranks, tmp_path):
    """Names of parameters are local; keys are the weights', which are the same for both kinds of experts.

    Transformer Engine's own entries are in `test_megatron_shards.test_jobs_are_as_megatron_describes_them`.
    """
    ranks(_te_to_sequential, str(tmp_path))


def _sizes(rank, size, folder):
    """Bytes of 5,888 experts' leaves, of Megatron's files for them, and seconds to save them."""
    from megatron.core.dist_checkpointing import ShardedTensor

    found = {}
    for format in (FP8, INT8_PER_CHANNEL):
        weights, sharded = {}, {}
        for layer, role, expert in itertools.product(range(23), (1, 2), range(128)):
            name = f"decoder.layers.{layer}.mlp.experts.linear_fc{role}.weight{expert}"
            weights[name] = torch.empty((1856, 2688)[:: 3 - 2 * role], device="meta", dtype=torch.bfloat16)
            sharded[name] = ShardedTensor.from_rank_offsets(
                f"decoder.layers.mlp.experts.experts.linear_fc{role}.weight",
                weights[name],
                (0, layer, 23),
                (1, expert, 128),
                prepend_axis_num=2,
            )
        fq = fqt.transform(fqt.select(weights, {"*": format}))
        state = optree.tree_map(lambda leaf: torch.rand(leaf.shape), fq.init(weights))
        entries = megatron.sharded_state_dict(fq, state, sharded)
        if format == INT8_PER_CHANNEL:
            assert all(
                entries[f"{key}.amax"].data.data_ptr() == group["amax"].data_ptr() for key, group in state.items()
            )
        started = time.perf_counter()
        save(entries, f"{folder}/{format.name}")
        seconds = time.perf_counter() - started
        leaves = sum(leaf.nbytes for leaf in fqt.state.flatten(state).values())
        found[format.name] = (leaves, sum(f.stat().st_size for f in Path(folder, format.name).iterdir()), seconds)
    return found


@pytest.mark.dist
def test_files_are_small(ranks, tmp_path):
    """One number per expert and one per channel: the files are the leaves' bytes, and what 64 KiB hold."""
    (found,) = ranks(_sizes, str(tmp_path), size=1)
    for leaves, files, seconds in found.values():
        assert files <= 1.2 * leaves + 2**16
        assert seconds < 1  # what Megatron takes to start its writers included
    print(found)
