"""A model in files, calibrated layer by layer: the same as in memory, in the memory of two layers, and after a kill."""

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import UserDict
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

import fq_transforms as fqt
from fq_transforms.export.files import shards
from fq_transforms.export.layers import STATE, LayerFiles
from tests.classes import tiny
from tests.export.models import read, transformers, write
from tests.full import FULL
from tests.test_sequential import CLASSES, GIVEN, GPTQ, WARNS, Decoder, assert_same, batches, transform_of

OWN = {"model_type": "own", "architectures": ["Own"]}


def on_meta(model):
    """A copy whose parameters have no values, tied ones once."""
    own = {id(param): nn.Parameter(param.detach().to("meta"), requires_grad=False) for param in model.parameters()}
    return copy.deepcopy(model, own)


PAIRS = [(name, way) for name in CLASSES for way in ("gptq", "FP8 inputs")]


@WARNS
@pytest.mark.parametrize(("name", "way"), PAIRS if FULL else [PAIRS[0], PAIRS[-1]])
def test_files_are_as_memory(name, way, tmp_path):
    """Law: from a folder to a folder, on meta, gives what the model in memory does; transformers loads it, bit for bit.

    And `export.folder` takes it with its state, by names in files, stacks of experts in separate tensors.
    """
    model, _ = tiny(name)
    fq, given, options = transform_of(model, way), batches(), {"gptq": GPTQ if way == "gptq" else None}
    wanted, wanted_state = fq.calibrate_sequentially(model, given, **options)
    model.save_pretrained(tmp_path / "src")

    store = LayerFiles(tmp_path / "src", tmp_path / "out", max_shard_size="200KB")
    params, state = fq.calibrate_sequentially(on_meta(model), given, store=store, **options)
    assert_same(state, wanted_state)
    assert list(params) == list(wanted)
    assert all(torch.equal(params[key], tensor) for key, tensor in wanted.items())
    assert_same(fqt.checkpoint.load_file(tmp_path / "out" / STATE, fq), wanted_state)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, wanted.get(key, tensor)) for key, tensor in loaded.named_parameters())
    for key, tensor in model.named_buffers():
        assert torch.equal(loaded.get_buffer(key), tensor)
    if not fq.spec.inputs:  # which plain weights have no place for
        fqt.export.folder(tmp_path / "out", tmp_path / "dst", state=tmp_path / "out" / STATE, layout="plain")
        packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32)
        fake = fq.fakequant(wanted, wanted_state)
        for key in {key for group in fq.spec.groups for key in group.names}:
            assert torch.equal(packed.get_parameter(key), fake[key]), key

    params, state = fq.calibrate_sequentially(on_meta(model), given, store=LayerFiles(tmp_path / "src"), **options)
    assert_same(state, wanted_state)
    assert all(torch.equal(params[key], tensor) for key, tensor in wanted.items())

    store = LayerFiles(None, tmp_path / "own", config=model.config.to_dict() | {"architectures": [name]})
    params, state = fq.calibrate_sequentially(model, given, store=store, **options)
    assert_same(state, wanted_state)
    assert all((params[key] is tensor) == (wanted[key] is tensor) for key, tensor in model.named_parameters())
    assert all(torch.equal(params[key], tensor) for key, tensor in wanted.items())
    found, other = read(tmp_path / "own"), read(tmp_path / "out")
    assert found.keys() == other.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in other.items())


def own_model():
    """A model of a class that transformers does not have, and what moves its weights."""
    torch.manual_seed(3)
    model = Decoder(4)
    fq = fqt.transform(fqt.select(dict(model.named_parameters()), [fqt.Rule("layers.*", fqt.INT4_BLOCK32, fqt.FP8)]))
    return model, fq


def run(place, *, resume=False, kind=LayerFiles, given=GIVEN, seed=None):
    """Calibrate, from a folder to a folder; what came out."""
    model, fq = own_model()
    if not (place / "src").exists():
        write(place / "src", {key: one.detach() for key, one in model.state_dict().items()}, {"config.json": OWN})
    store = kind(place / "src", place / "out", resume=resume, max_shard_size=20_000)
    return fq.calibrate_sequentially(on_meta(model), given, gptq={}, store=store)


def killed(place, at):
    """In a process of its own: kill it at a call of the system that writes; or count these calls."""
    calls = 0

    def counted(call):
        def counts(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counts

    run(Path(place) / "source")  # which makes the source, and imports what there is to import
    os.rename(Path(place) / "source" / "src", Path(place) / "src")
    for name in ("pwrite", "copy_file_range", "fsync", "fdatasync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    run(Path(place))
    return calls


def killed_in_forks(place, count):
    """In a process of its own, a fork for each kill, in folders by number: what there is to import is imported once."""
    context = get_context("fork")
    calls = context.SimpleQueue()

    def fork(name, at=None):
        folder = Path(place, name)
        folder.mkdir()
        process = context.Process(target=lambda: calls.put(killed(folder, at)))
        process.start()
        process.join()
        return process.exitcode

    assert fork("all") == 0
    total = calls.get()
    for number, at in enumerate(sorted(random.Random(4).sample(range(total // 4, total), count))):
        assert fork(str(number), at) == -signal.SIGKILL


def in_process(code, **env):
    """What Python prints, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", f"import tests.conftest\n{code}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ | env, check=False
    )


class Counting(LayerFiles):
    """Counts the parts that are calibrated, not read back."""

    kept = 0

    def keep(self, *args):
        super().keep(*args)
        type(self).kept += 1


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@WARNS
def test_killed_and_resumed(tmp_path):
    """Law: killed at any write, and gone on with, gives the same bytes; finished layers are not calibrated again."""
    wanted, wanted_state = run(tmp_path)
    wanted, files = dict(wanted), bytes_of(tmp_path / "out")
    done = in_process(f"from tests.export.test_layers import killed_in_forks\nkilled_in_forks({str(tmp_path)!r}, 3)")
    assert done.returncode == 0, done.stderr
    counts = []
    for number in range(3):
        place = tmp_path / str(number)
        assert not (place / "out").exists()
        stage = next((one for one in place.iterdir() if ".out.saving-" in one.name and one.is_dir()), None)
        marks = len(list(stage.glob(".part-*.json"))) if stage else 0
        Counting.kept = 0
        params, state = run(place, resume=True, kind=Counting)
        assert Counting.kept == 5 - marks
        assert_same(state, wanted_state)
        assert all(torch.equal(params[key], tensor) for key, tensor in wanted.items())
        found = bytes_of(place / "out")
        assert found.keys() == files.keys()
        # Of the state the numbers: safetensors writes its metadata in any order.
        assert [key for key, content in files.items() if key != STATE and found[key] != content] == []
        assert_same(fqt.checkpoint.load_file(place / "out" / STATE, own_model()[1]), wanted_state)
        counts.append(marks)
    assert max(counts) > 0


def test_an_error_leaves_nothing_or_what_can_be_gone_on_with(tmp_path):
    """Law: without `resume` an error takes away what was written; with it, the next run goes on with what is there."""
    model, fq = own_model()
    write(tmp_path / "src", {key: one.detach() for key, one in model.state_dict().items()}, {"config.json": OWN})
    before = sorted(path.name for path in tmp_path.iterdir())
    meta = on_meta(model)

    def call(error=None, **options):
        def forward(call, batch):
            out = call(batch)
            if error is not None:
                raise error
            return out

        store = Counting(tmp_path / "src", tmp_path / "out", **options)
        return fq.calibrate_sequentially(meta, GIVEN, forward=forward, store=store)

    with pytest.raises(RuntimeError, match="of its own"):
        call(RuntimeError("of its own"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(RuntimeError, match="of its own"):
        call(RuntimeError("of its own"), resume=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="resume: found .* of other weights, batches or options"):
        fq.calibrate_sequentially(meta, GIVEN[:2], store=LayerFiles(tmp_path / "src", tmp_path / "out", resume=True))
    Counting.kept = 0
    _, state = call(resume=True)
    assert Counting.kept == 1  # what lies outside the layers
    assert_same(state, fq.calibrate_sequentially(model, GIVEN)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", *before]
    assert all(param.is_meta for param in meta.parameters())


class Words(UserDict):
    """A mapping that is no dict, as transformers' BatchEncoding."""


@WARNS
@pytest.mark.parametrize("other", ["weights", "batches", "option"])
def test_another_run_is_not_gone_on_with(other, tmp_path):
    """Bug: layers were kept of other weights in memory, of batches in a mapping that is no dict, of plain options."""
    model, fq = own_model()
    options = {"store": LayerFiles(out=tmp_path / "out", config=OWN, resume=True), "gptq": {}}
    given = [Words(x=GIVEN[0])]
    with pytest.raises(RuntimeError, match="of its own"):  # after layer 1
        fq.calibrate_sequentially(model, [Words(x=GIVEN[0], fail=True)], **options)
    if other == "weights":
        given = [Words(x=GIVEN[0], fail=True)]
        with torch.no_grad():
            model.layers[0].experts[0].weight[0, 0] += 1
    elif other == "batches":
        given = [Words(x=GIVEN[1], fail=True)]
    with pytest.raises(ValueError, match="resume: found .* of other weights, batches or options"):
        fq.calibrate_sequentially(model, given, **options)


@WARNS
def test_a_model_in_memory_is_gone_on_with(tmp_path):
    """Law: after an interrupt in a layer, those before it are read back: what was moved, not what was left alone."""
    model, fq = own_model()
    wanted, wanted_state = fq.calibrate_sequentially(model, GIVEN, gptq={})
    options = {"out": tmp_path / "out", "config": OWN}

    def interrupted(module, args):
        if threading.current_thread() is not threading.main_thread():
            raise KeyboardInterrupt

    hook = model.layers[2].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        fq.calibrate_sequentially(model, GIVEN, gptq={}, store=Counting(**options))
    hook.remove()
    assert not (tmp_path / "out").exists()
    Counting.kept = 0
    params, state = fq.calibrate_sequentially(model, GIVEN, gptq={}, store=Counting(**options, resume=True))
    assert Counting.kept == 2  # a layer, and what lies outside; the one that was interrupted had its mark
    assert_same(state, wanted_state)
    assert list(params) == list(wanted)
    own = dict(model.named_parameters())
    assert all(torch.equal(params[key], one) for key, one in wanted.items())
    assert all((params[key] is own[key]) == (one is own[key]) for key, one in wanted.items())
    found = read(tmp_path / "out")
    assert all(torch.equal(found[key], one) for key, one in wanted.items())


def peaks_of(place, *counts):
    """In a process of its own: the most anonymous memory that calibration takes, in layers, for numbers of layers."""
    sides, rules = (512, 1024), [fqt.Rule("layers.*", fqt.FP8, fqt.FP8)]

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(*sides, bias=False), nn.Linear(*sides[::-1], bias=False)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = nn.ModuleList(Wide() for _ in range(layers))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def written(layers):
        with torch.device("meta"):
            model = Model(layers)
        folder = Path(place, f"src{layers}")
        types = {key: torch.empty_like(one) for key, one in model.state_dict().items()}
        tensors = ((key, torch.randn(one.shape) / 32) for key, one in types.items())
        sizes = {key: (shards.type_of(one), one.nbytes) for key, one in types.items()}
        shards.write(folder, sizes, tensors, {"config.json": OWN}, 2**22)
        return model, folder

    def calibrated(layers):
        model, folder = written(layers)
        fq = fqt.transform(fqt.select(dict(model.named_parameters()), rules))
        given = [torch.randn(4, sides[0]) for _ in range(3)]
        return lambda: fq.calibrate_sequentially(model, given, store=LayerFiles(folder, f"{folder}.out"))

    def peak(call):
        most, start, is_over = 0, anonymous(), False

        def sample():
            nonlocal most
            while not is_over:
                most = max(most, anonymous())
                time.sleep(0.0005)

        sampler = threading.Thread(target=sample)
        sampler.start()
        call()
        is_over = True
        sampler.join()
        return (most - start) / (2 * 4 * sides[0] * sides[1])

    calibrated(2)()  # which imports what there is to import
    return [peak(calibrated(count)) for count in counts]


def anonymous():
    """Bytes of this process that are of no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.slow
def test_memory_is_that_of_two_layers(tmp_path):
    """Law: the peak of 24 layers is that of 4: a layer as it was, and as it is quantized, beside the hidden states."""
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed is given back
    code = f"from tests.export.test_layers import peaks_of\nprint(*peaks_of({str(tmp_path)!r}, 4, 24))"
    done = in_process(code, **env)
    assert done.returncode == 0, done.stderr
    found = few, many = [float(peak) for peak in done.stdout.split()[-2:]]
    assert 1 < many < 3, found
    assert many < few + 0.5, found


MISTAKES = {
    "nothing": ({}, "folder, out: found None for both"),
    "resume": ({"folder": "src", "resume": True}, "resume: found True and out=None"),
    "no config": ({"out": "out"}, "config: found None, wanted model.config"),
    "size": ({"folder": "src", "max_shard_size": "big"}, "max_shard_size: found 'big'"),
    "no folder": ({"folder": "none"}, "found nothing, wanted 'model.safetensors'"),
    "taken": ({"folder": "src", "out": "src"}, "found a directory with"),
    "another model": ({"folder": "other"}, "found (32, 16) for 'head.weight', wanted (32, 32)"),
    "a part of it": ({"folder": "part"}, "found no such tensor for 'head.weight'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, tmp_path, monkeypatch):
    """Bad input: an error that says what was found and wanted; nothing is written, and the model is on meta still."""
    monkeypatch.chdir(tmp_path)
    model, fq = own_model()
    tensors = {key: one.detach() for key, one in model.state_dict().items()}
    write(tmp_path / "src", tensors, {"config.json": OWN})
    write(tmp_path / "other", tensors | {"head.weight": torch.ones(32, 16)}, {"config.json": OWN})
    write(tmp_path / "part", {key: one for key, one in tensors.items() if key != "head.weight"}, {"config.json": OWN})
    meta, options = on_meta(model), MISTAKES[mistake][0]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r".*") as caught:
        fq.calibrate_sequentially(meta, GIVEN, store=LayerFiles(**options))
    assert MISTAKES[mistake][1] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(param.is_meta for param in meta.parameters())
