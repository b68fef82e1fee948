"""SIGKILL at drawn moments of saves: what was there, or what was being written, whole; and the next save works."""

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fq_transforms as fqt
from fq_transforms.export.streaming import job, stage
from tests.checkpoint.samples import assert_same, load_as, of, save_as
from tests.checkpoint.test_storage import forked, in_fresh_process
from tests.export.test_folder import SMALL, files_of, small
from tests.full import FULL

ROUNDS = 300 if FULL else 10
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _good():
    return of({"a": fqt.INT4_BLOCK32, "b": fqt.NVFP4_STATIC}, 8, (64, 64))


def _is_one_of(found, states):
    for state in states:
        try:
            assert_same(found, state)
        except AssertionError:
            continue
        return True
    return False


def _killed_saves(folder, kind, start):
    """Kill a process that saves two states in turns, after a drawn time; load what is there, and save again."""
    fq, state = _good()
    states = [state, {key: {n: 2 * leaf for n, leaf in leaves.items()} for key, leaves in state.items()}]
    path = os.path.join(folder, kind, "state")
    os.makedirs(os.path.dirname(path))
    if start == "empty directory":
        os.mkdir(path)
    save_as(kind, path + "warm", fq, state)
    before = time.monotonic()
    save_as(kind, path + "warm", fq, state)
    takes = time.monotonic() - before
    load_as(kind, path + "warm", fq, state)
    (shutil.rmtree if kind == "directory" else os.remove)(path + "warm")

    def save_for_ever():
        while True:
            for each in states:
                save_as(kind, path, fq, each)

    draws, loaded = random.Random(f"{kind} {start}"), 0
    for number in range(ROUNDS):
        child = forked(save_for_ever)
        time.sleep(draws.random() * 6 * takes)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        is_there = os.path.isfile(path) or os.path.exists(os.path.join(path, ".metadata"))
        assert is_there or not loaded, (number, os.listdir(os.path.dirname(path)))
        if is_there:
            assert _is_one_of(load_as(kind, path, fq, state), states), number
            loaded += 1
        if draws.random() < 0.3:
            save_as(kind, path, fq, states[0])
            assert_same(load_as(kind, path, fq, state), states[0])
            assert os.listdir(os.path.dirname(path)) == ["state"], number
            assert kind == "file" or len(os.listdir(path)) == 2, number
    return loaded


def _killed_exports(folder, start):
    """Kill a process that exports, after a drawn time: a whole folder, or one that the next export takes."""
    # tqdm's own lock is one of processes, which a child that is killed can keep.
    tqdm.set_lock(threading.RLock())
    params = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(32, 32) * (i + 1) for i in range(4)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    state = fq.calibrate(params)
    path = os.path.join(folder, "model")

    def export():
        fqt.export.save(path, fq, params, state, config=CONFIG, layout="plain", max_shard_size=1100)

    export()
    whole = sorted(os.listdir(path))
    shutil.rmtree(path)
    before = time.monotonic()
    export()
    takes = time.monotonic() - before
    draws, ends = random.Random(start), {"whole": 0, "none": 0}
    for number in range(ROUNDS):
        shutil.rmtree(path)
        if start == "empty directory":
            os.mkdir(path)
        child = forked(export)
        if number == 1:  # one round ends by itself, one is killed at once
            os.waitpid(child, 0)
        else:
            time.sleep(draws.random() * 3 * takes * bool(number))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not os.path.exists(os.path.join(path, "config.json")):
            ends["none"] += 1
            export()
        else:
            ends["whole"] += 1
        assert sorted(name for name in os.listdir(path) if "saving" not in name) == whole, number
    return ends


def _killed_conversions(place, start):
    """Kill a process that converts a folder, after a drawn time, again and again until it has ended: the same bytes.

    Every other time it is asked to go on; whatever was converted already is not converted again.
    """
    os.makedirs(place)
    src = small(Path(place) / "src")
    job.PIECE_BYTES, stage.SYNC_BYTES = 5000, 1
    whole, path = Path(place) / "whole", Path(place) / "to" / "model"

    def convert(dst, **options):
        fqt.export.folder(src, dst, SMALL, max_shard_size="4KB", jobs=2, **options)

    before = time.monotonic()
    convert(whole)
    takes = time.monotonic() - before
    wanted, draws, ends = files_of(whole), random.Random(start), {"whole": 0, "none": 0}
    begin = path if start == "empty directory" else path.parent
    begin.mkdir(parents=True)
    for number in range(ROUNDS):
        child = forked(lambda number=number: convert(path, resume=number % 4 != 3))
        time.sleep(draws.random() * 2 * takes * bool(number))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not (path / "config.json").exists():
            assert start == "empty directory" or not path.exists(), number
            ends["none"] += 1
            if draws.random() < 0.7:  # the next goes on with it
                continue
            convert(path, resume=True)
        ends["whole"] += 1
        found = {name: content for name, content in files_of(path).items() if "saving" not in name}
        assert found == wanted, number
        shutil.rmtree(path.parent)
        begin.mkdir(parents=True)
    return ends


def _all(folder):
    """In one process, which imports once."""
    saves = {
        (kind, start): _killed_saves(os.path.join(folder, start), kind, start)
        for kind, start in (("directory", "new"), ("directory", "empty directory"), ("file", "new"))
    }
    starts = "new", "empty directory"
    exports = {start: _killed_exports(os.path.join(folder, start), start) for start in starts}
    conversions = {start: _killed_conversions(os.path.join(folder, start, "of"), start) for start in starts}
    return saves, exports, conversions


def test_saves_and_exports(tmp_path):
    """Rounds of saves have something to load; exports and conversions are cut before their end, and after it."""
    saves, exports, conversions = in_fresh_process(_all, str(tmp_path))
    assert min(saves.values()) > 0, saves
    assert all(min(ends.values()) > 0 for ends in conversions.values()), conversions
    assert all(min(ends.values()) > 0 for ends in exports.values()), exports
