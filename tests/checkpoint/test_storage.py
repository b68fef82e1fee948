"""Checkpoints with faults: an error that names the leaf, group or file; nothing is half written or half loaded."""

import contextlib
import dataclasses
import errno
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import _StridedShard

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint.trees import STATE
from fq_transforms.state import ExpertAmax
from tests.cases import assert_names, experts, message_of
from tests.checkpoint.test_dcp import assert_same, small

ROOT = Path(__file__).parents[2]
KINDS = ["directory", "file"]


def save_as(kind, state, path, spec):
    {"directory": checkpoint.save, "file": checkpoint.save_file}[kind](state, path, spec=spec)


def load_as(kind, path, like, spec):
    return {"directory": checkpoint.load, "file": checkpoint.load_file}[kind](path, like=like, spec=spec)


def of(formats, count=4, shape=(128, 256), **numbers):
    """Spec and state of groups `{key}.experts.{i}.w`."""
    params = {f"{key}.experts.{i}.w": w for key in formats for i, w in enumerate(experts(count, shape))}
    spec = fqt.select(params, {f"{key}.*": format for key, format in formats.items()})
    return spec, fqt.calibrate(params, spec=spec)


A, B, C = ({"a": fqt.FP8}, {"a": fqt.FP8, "b": fqt.FP8}, {"a": fqt.FP8, "c": fqt.FP8})
NARROW = dataclasses.replace(fqt.FP8, element=dataclasses.replace(fqt.FP8.element, max=240.0))

# stored, wanted, and what the message says.
MISMATCHES = {
    "missing": (of(A), of(B), ("missing 1 of 2 groups: ['b.experts.*.w']",)),
    "extra": (of(B), of(A), ("found 1 groups that the spec has not: ['b.experts.*.w']",)),
    "renamed": (of(B), of(C), ("missing 1 of 2 groups: ['c.experts.*.w']",)),
    "experts": (of(A, 8), of(A, 4), ("group 'a.experts.*.w': found 8 experts, wanted 4",)),
    "shape": (
        of({"a": fqt.INT8_PER_CHANNEL}),
        of({"a": fqt.INT8_PER_CHANNEL}, shape=(64, 256)),
        ("group 'a.experts.*.w': found (out, in) = (128, 256), wanted (64, 256)",),
    ),
    "format": (of(A), of({"a": fqt.INT8}), ("group 'a.experts.*.w': found format FP8, wanted INT8",)),
    "numbers": (of(A), of({"a": NARROW}), ("found format FP8 with element=", "448.0", "wanted element=", "240.0")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MISMATCHES)
def test_another_spec(kind, name, tmp_path):
    """A group too few or too many, other experts, shapes, formats, or numbers of a format: ValueError of the group."""
    (spec, state), (wanted_spec, wanted), fragments = MISMATCHES[name]
    save_as(kind, state, tmp_path / "a", spec)
    message = message_of(ValueError, load_as, kind, tmp_path / "a", wanted, wanted_spec)
    assert_names(message, str(tmp_path / "a"), *fragments)


@pytest.mark.parametrize("kind", KINDS)
def test_like_of_another_spec(kind, tmp_path):
    """`like` and `spec` must fit each other: a leaf that is missing, or of another shape, is named."""
    spec, state = of(B)
    save_as(kind, state, tmp_path / "a", spec)
    small_like = {**state, "a.experts.*.w": ExpertAmax(torch.zeros(3))}
    message = message_of(ValueError, load_as, kind, tmp_path / "a", small_like, spec)
    assert_names(message, "state 'a.experts.*.w.amax': found (3,)", "wanted (4,)")
    short = {"a.experts.*.w": state["a.experts.*.w"]}
    assert_names(message_of((KeyError, ValueError), load_as, kind, tmp_path / "a", short, spec), "'b.experts.*.w'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, -1.0, torch.inf, -torch.inf])
def test_invalid_amax(kind, value, tmp_path, monkeypatch):
    """NaN, negative, infinite and uncalibrated amax are neither written nor read; leaf and expert are named."""
    spec, _, state, _ = small(fqt.INT8_PER_CHANNEL)
    state["experts.*.w"].amax[2, 5] = value
    fragments = ("state 'experts.*.w.amax'", f"found {value} for 'experts.2.w' at [5, 0]", "wanted a finite amax >= 0")
    assert_names(message_of(ValueError, save_as, kind, state, tmp_path / "a", spec), *fragments)
    assert os.listdir(tmp_path) == []

    unchecked = dataclasses.replace(STATE, check=lambda *_, **__: None)
    with monkeypatch.context() as patch:  # as another program might write it
        patch.setattr("fq_transforms.checkpoint.dcp.kind_of", lambda _: unchecked)
        patch.setattr("fq_transforms.checkpoint.file.check", lambda *_: None)
        save_as(kind, state, tmp_path / "a", spec)
    assert_names(message_of(ValueError, load_as, kind, tmp_path / "a", state, spec), str(tmp_path / "a"), *fragments)


def test_state_that_does_not_fit(tmp_path):
    """A state without a group, with another's leaf, or on meta is refused before anything is written."""
    spec, state = of(B)
    for kind in KINDS:
        one = {"a.experts.*.w": state["a.experts.*.w"]}
        assert_names(message_of(KeyError, save_as, kind, one, tmp_path / "a", spec), "'b.experts.*.w'")
        wrong = {**state, "b.experts.*.w": ExpertAmax(torch.zeros(5))}
        assert_names(message_of(ValueError, save_as, kind, wrong, tmp_path / "a", spec), "(5,)", "(4,)")
        meta = {key: ExpertAmax(group.amax.to("meta")) for key, group in state.items()}
        assert_names(message_of(ValueError, save_as, kind, meta, tmp_path / "a", spec), "meta")
    assert os.listdir(tmp_path) == []


def damaged(file, step):
    """Paths to copies of a file's bytes with one bit flipped, then with the end cut off; restored afterwards."""
    content = file.read_bytes()
    for at in range(0, len(content), step):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        yield at
    for end in range(0, len(content), 5 * step):
        file.write_bytes(content[:end])
        yield end
    file.write_bytes(content)


def test_damaged_directory(tmp_path):
    """Any bit flipped in the data or the metadata, or any end cut off, is found, and the file is named."""
    spec, _, state, _ = small(fqt.NVFP4_STATIC, 1)
    target = tmp_path / "a"
    state["experts.*.w"] = state["experts.*.w"]._replace(amax=torch.rand(1, 128, 16))
    checkpoint.save(state, target, spec=spec)
    for file in target.iterdir():
        count = 0
        for _ in damaged(file, 97 if file.suffix else 13):
            message = message_of(ValueError, checkpoint.load, target, like=state, spec=spec)
            assert_names(message, str(target), file.name, "truncated, damaged")
            count += 1
        assert count > 80
        if not file.suffix:
            file.write_bytes(file.read_bytes() + b"x")
            assert_names(message_of(ValueError, checkpoint.load, target, like=state, spec=spec), ".metadata")
            assert_names(message_of(ValueError, checkpoint.read_spec, target), ".metadata")
            file.write_bytes(file.read_bytes()[:-1])
    assert_same(checkpoint.load(target, like=state, spec=spec), state)
    (data,) = target.glob("*.distcp")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=data.name):
        checkpoint.load(target, like=state, spec=spec)


def test_damaged_file(tmp_path):
    """The same of a safetensors file: header, spec, names and numbers are all under the checksum."""
    spec, _, state, _ = small()
    file = tmp_path / "amax.safetensors"
    checkpoint.save_file(state, file, spec=spec)
    count = 0
    for _ in damaged(file, 3):
        assert_names(message_of(ValueError, checkpoint.load_file, file), str(file))
        count += 1
    assert count > 200
    assert_same(checkpoint.load_file(file), state)


def test_hostile_metadata(tmp_path):
    """Metadata that names a function to call is refused before it is called: DCP's own reader would call it."""
    spec, _, state, _ = small()
    target = tmp_path / "a"
    checkpoint.save(state, target, spec=spec)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)

    from fq_transforms.checkpoint.storage import sealed

    content = pickle.dumps(Hostile())
    (target / ".metadata").write_bytes(content + sealed(content))
    message = message_of(ValueError, checkpoint.load, target, like=state, spec=spec)
    assert_names(message, ".metadata", "posix.mkdir")
    assert not (tmp_path / "called").exists()
    dotted = b"\x80\x04\x8c)torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
    dotted = dotted.replace(b")", bytes([len("torch.distributed.checkpoint.metadata")]), 1)
    (target / ".metadata").write_bytes(dotted + sealed(dotted))
    assert_names(message_of(ValueError, checkpoint.load, target, like=state, spec=spec), "os.system")


def test_metadata_of_another_program(tmp_path):
    """Metadata that is whole, but whose leaves are not those of its Spec, or lie elsewhere: refused, by name."""
    from fq_transforms.checkpoint.storage import read_metadata, sealed

    spec, state = of(B)
    checkpoint.save(state, tmp_path / "a", spec=spec)
    file, name = tmp_path / "a" / ".metadata", "a.experts.*.w.amax"
    original = file.read_bytes()

    def message(change):
        file.write_bytes(original)
        metadata = read_metadata(tmp_path / "a")
        change(metadata, metadata.state_dict_metadata)
        content = pickle.dumps(metadata)
        file.write_bytes(content + sealed(content))
        return message_of(ValueError, checkpoint.load, tmp_path / "a", like=state, spec=spec)

    def short(metadata, leaves):
        del leaves[name]

    def more(metadata, leaves):
        leaves["c.amax"] = leaves[name]

    def resized(metadata, leaves):
        leaves[name].size = torch.Size([5])

    def half(metadata, leaves):
        leaves[name].properties.dtype = torch.float16

    def not_a_tensor(metadata, leaves):
        leaves[name] = BytesStorageMetadata()

    def elsewhere(metadata, leaves):
        for where in metadata.storage_data.values():
            where.relative_path = f"../a/{where.relative_path}"

    def unstored(metadata, leaves):
        leaves[name].chunks = []

    def other_kind(metadata, leaves):
        metadata.planner_data["fq_transforms.kind"] = "activations"

    def other_spec(metadata, leaves):
        metadata.planner_data["fq_transforms.spec"] = b"not zlib"

    for change, fragments in {
        short: ("missing 1 of 2 leaves", name),
        more: ("unknown 1 of 2 leaves", "c.amax"),
        resized: (f"leaf {name!r}: found (5,) torch.float32, wanted (4,)",),
        half: (f"leaf {name!r}: found (4,) torch.float16", "wanted (4,) torch.float32"),
        not_a_tensor: (f"leaf {name!r}: found bytes, wanted a tensor",),
        elsewhere: ("found the data file '../a/", "wanted one in the directory"),
        unstored: (f"leaf {name!r}: found 0 of the 4 numbers of this part", "incomplete"),
        other_kind: ("found a checkpoint of 'activations'", "['state', 'packed']"),
        other_spec: ("not a stored Spec",),
    }.items():
        assert_names(message(change), str(tmp_path / "a"), *fragments)
    file.write_bytes(original)
    assert_same(checkpoint.load(tmp_path / "a", like=state, spec=spec), state)


def test_leftovers_make_room_first(tmp_path, monkeypatch):
    """What an interrupted save left is removed before the next one writes; what only looks like it stays."""
    from fq_transforms.checkpoint import storage

    spec, _, state, _ = small()
    checkpoint.save(state, tmp_path / "a", spec=spec)
    save = "0123456789abcdef" * 2
    left = [
        tmp_path / f".a.saving-{save}" / "x",
        tmp_path / "a" / f".saving-{save}" / "x",
        tmp_path / "a" / f"{save}_0.distcp",
    ]
    kept = [tmp_path / f".b.saving-{save}" / "x", tmp_path / ".a.saving-notes", tmp_path / "a" / "mine_0.distcp"]
    for path in left + kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert_same(checkpoint.load(tmp_path / "a", like=state, spec=spec), state)
    there, seal = [], storage.sealed
    monkeypatch.setattr(storage, "sealed", lambda *args: (there.append([p.exists() for p in left]), seal(*args))[1])
    checkpoint.save(state, tmp_path / "a", spec=spec)
    assert there[-1] == [False] * 3
    assert not any(path.parent.exists() for path in left[:2])
    assert all(path.exists() for path in kept)


def test_not_a_checkpoint(tmp_path):
    """No path, a file, an empty or foreign directory, a checkpoint of something else: each says what was found."""
    spec, _, state, _ = small()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.bin").write_text("x")
    (tmp_path / "file").write_text("not safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "model")
    like = {"like": state, "spec": spec}
    for name, error, found in [
        ("nothing", FileNotFoundError, "there is nothing"),
        ("empty", ValueError, "found a directory without '.metadata' and with no entries"),
        ("foreign", ValueError, "found a directory without '.metadata' and with 1 entries such as ['model.bin']"),
        ("file", ValueError, "found a file, wanted the directory of a checkpoint; load_file reads a file"),
        ("model", ValueError, "file '.metadata': found bytes that are not those written"),
    ]:
        with pytest.raises(error) as caught:
            checkpoint.load(tmp_path / name, **like)
        assert_names(str(caught.value), str(tmp_path / name), found)
    assert_names(message_of(ValueError, checkpoint.load_file, tmp_path / "file"), str(tmp_path / "file"), "safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load_file(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match="empty"):
        checkpoint.load_file(tmp_path / "empty")


def test_other_safetensors(tmp_path):
    """Safetensors of another program, of another version, or with other leaves are refused, with what was found."""
    import json

    from safetensors.torch import save_file

    from fq_transforms.checkpoint.file import _crc32

    spec, state = of(B)
    leaves = fqt.state.flatten(state)
    about = {"format": "fq_transforms", "version": "1", "spec": spec.to_json()}

    def message(leaves, about):
        save_file(leaves, tmp_path / "a", about)
        return message_of(ValueError, checkpoint.load_file, tmp_path / "a")

    assert_names(message(leaves, None), "format None, version None")
    assert_names(message(leaves, {**about, "version": "2"}), "version '2', wanted 'fq_transforms', version '1'")
    assert_names(message(leaves, {**about, "spec": "{}", "crc32": _crc32("{}", leaves)}), "not a stored Spec")
    short = {"a.experts.*.w.amax": leaves["a.experts.*.w.amax"]}
    text = json.dumps(json.loads(spec.to_json()))
    assert_names(message(short, {**about, "crc32": _crc32(text, short)}), "missing 1 of 2 leaves", "b.experts.*.w.amax")
    more = {**leaves, "c.amax": torch.zeros(1)}
    assert_names(message(more, {**about, "crc32": _crc32(text, more)}), "unknown 1 of 2 leaves", "c.amax")
    half = {name: leaf.half() for name, leaf in leaves.items()}
    assert_names(message(half, {**about, "crc32": _crc32(text, half)}), "torch.float16", "wanted (4,) torch.float32")


def tree(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_save_refuses_to_replace_what_is_no_state(tmp_path):
    """A file, a directory with anything in it, a model's checkpoint, a damaged one: refused, and not a byte changes."""
    spec, _, state, _ = small()
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.bin").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "model")
    checkpoint.save(state, tmp_path / "damaged", spec=spec)
    (tmp_path / "damaged" / ".metadata").write_bytes(b"x")
    before = tree(tmp_path)
    for name, found in {
        "file": "found a file",
        "foreign": "found a directory with 1 entries such as ['model.bin']",
        "model": "file '.metadata': found bytes that are not those written",
        "damaged": "file '.metadata': found bytes that are not those written",
    }.items():
        message = message_of(ValueError, checkpoint.save, state, tmp_path / name, spec=spec)
        assert_names(message, str(tmp_path / name), found, "wanted a new name, an empty directory or a checkpoint")
    with pytest.raises(OSError, match="below") as caught:
        checkpoint.save(state, tmp_path / "file" / "below", spec=spec)
    assert isinstance(caught.value, (NotADirectoryError, FileExistsError))
    with pytest.raises(OSError, match="below"):
        checkpoint.save_file(state, tmp_path / "file" / "below", spec=spec)
    with pytest.raises(OSError, match="nowhere"):
        checkpoint.save_file(state, tmp_path / "nowhere" / "a", spec=spec)
    with pytest.raises(IsADirectoryError, match="foreign"):
        checkpoint.save_file(state, tmp_path / "foreign", spec=spec)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".metadata", "distcp"])
def test_unreadable(name, tmp_path, monkeypatch):
    """A path below a file, and files that may not be opened: OSError with the path, of its own kind."""
    spec, _, state, _ = small()
    checkpoint.save(state, tmp_path / "a", spec=spec)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file/below"):
        checkpoint.load(tmp_path / "file" / "below", like=state, spec=spec)
    real = io.open

    def denied(file, *args, **kwargs):
        if str(file).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", denied)
    with pytest.raises(PermissionError, match=rf"checkpoint '{tmp_path}/a': Permission denied.*{name}"):
        checkpoint.load(tmp_path / "a", like=state, spec=spec)


# Full disks


def _fill(folder, limit=0):
    """On a file system that is too small: the error says so, what was saved before loads, nothing else is left."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    spec, _, state, _ = small()
    large_spec, _, large, _ = small(fqt.NVFP4_STATIC, 16)
    expected = {errno.EFBIG if limit else errno.ENOSPC}
    for kind in KINDS:
        old, new = Path(folder, kind, "old"), Path(folder, kind, "new")
        old.parent.mkdir()
        save_as(kind, state, old, spec)
        before = tree(Path(folder))
        for path in (old, new):
            with pytest.raises(OSError) as caught:
                save_as(kind, large, path, large_spec)
            assert caught.value.errno in expected, caught.value
            assert str(path.parent) in str(caught.value)
        assert tree(Path(folder)) == before
        assert_same(load_as(kind, old, state, spec), state)
    return str(caught.value)


def run_python(code, prefix="", cwd=ROOT):
    command = f"{prefix}exec {sys.executable} -c '{code}'"
    return subprocess.run(["sh", "-c", command], cwd=cwd, capture_output=True, text=True, check=False)


def test_full_disk(tmp_path):
    """A full disk: a tmpfs of 64 KiB, mounted here or in a namespace; where neither may be, a limit on file sizes."""
    code = f'from tests.checkpoint.test_storage import _fill; print("said:", _fill("{tmp_path}"))'
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    unmount = f"umount {tmp_path}"
    ways = []
    if subprocess.run(mount.split(), capture_output=True, check=False).returncode == 0:
        try:
            ways.append(("mounted", run_python(code)))
        finally:
            subprocess.run(unmount.split(), check=True)
    elif subprocess.run(["unshare", "-rm", *mount.split()], capture_output=True, check=False).returncode == 0:
        command = f"{mount} && exec {sys.executable} -c '{code}'"
        result = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        ways.append(("in a namespace", result))
    else:
        ways.append(("limited", run_python(code.replace('")', '", 65536)', 1))))
    ((way, result),) = ways
    assert result.returncode == 0, (way, result.stderr)
    assert ("File too large" if way == "limited" else "No space left on device") in result.stdout, (way, result.stdout)


def test_file_size_limit(tmp_path):
    """A file that may not grow further, as a quota does it: the same promise."""
    code = f'from tests.checkpoint.test_storage import _fill; print("said:", _fill("{tmp_path}", 65536))'
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout


# Killed


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def kill_before(count):
    """SIGKILL this process before its `count`-th step on the file system: opened, written, synced, renamed, removed."""
    left = [count]

    def step():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    from fq_transforms.checkpoint import storage

    seal, sync = storage.sealed, os.fsync
    storage.sealed = lambda *args: (step(), seal(*args))[1]
    os.fsync = lambda descriptor: (step(), sync(descriptor))[1]
    sys.addaudithook(lambda event, _: step() if event in EVENTS else None)
    return left


def forked(function):
    """Exit status of a forked child that runs a function; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def in_fresh_process(function, *args):
    """Run a function in a process that may fork: one that has started no threads."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(100), "no answer"
        result, error = ours.recv()
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def _answer(connection, function, args):
    torch.set_num_threads(1)
    try:
        connection.send((function(*args), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))


def _killed_in_turn(folder, kind):
    """Kill a save before each of its steps, at a name that has a checkpoint and at a new one."""
    spec, fq, old, params = small(fqt.NVFP4_STATIC)
    new = fq.calibrate({name: 3 * weight for name, weight in params.items()})
    outcomes = {"replaced": [], "new": []}
    load_as(kind, _saved(kind, old, Path(folder, "warm"), spec), old, spec)  # imports are no steps
    for case, found in outcomes.items():
        for count in range(1, 500):
            path = Path(folder, f"{case}{count}", "state")
            path.parent.mkdir()
            if case == "replaced":
                save_as(kind, old, path, spec)

            def save(count=count, path=path):
                kill_before(count)
                save_as(kind, new, path, spec)

            _, status = os.waitpid(forked(save), 0)
            killed = os.WIFSIGNALED(status)
            assert killed or os.waitstatus_to_exitcode(status) == 0
            found.append(_what_is_there(kind, path, {"old": old, "new": new}, spec))
            # The next save works, and leaves nothing of the one that was killed.
            save_as(kind, old, path, spec)
            assert_same(load_as(kind, path, old, spec), old)
            assert len(list(path.parent.iterdir())) == 1, list(path.parent.iterdir())
            assert kind == "file" or len(list(path.iterdir())) == 2, list(path.iterdir())
            shutil.rmtree(path.parent)
            if not killed:
                break
    return outcomes


def _saved(kind, state, path, spec):
    save_as(kind, state, path, spec)
    return path


def _what_is_there(kind, path, states, spec):
    if not path.exists():
        return "nothing"
    found = load_as(kind, path, states["old"], spec)
    for name, state in states.items():
        with contextlib.suppress(AssertionError):
            assert_same(found, state)
            return name
    raise AssertionError("neither the old state nor the new one")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(kind, tmp_path):
    """SIGKILL before any step of a save: the old checkpoint loads or the new one; at a new name nothing or the new."""
    outcomes = in_fresh_process(_killed_in_turn, str(tmp_path), kind)
    for case, before in (("replaced", "old"), ("new", "nothing")):
        found = outcomes[case]
        first = found.index("new")
        assert set(found[:first]) == {before}
        assert set(found[first:]) == {"new"}
        assert first >= {"directory": 10, "file": 3}[kind], found


def _rank_state(magnitude):
    mesh = init_device_mesh("cpu", (2,))
    spec, _, state, _ = small(fqt.INT8_PER_CHANNEL)
    whole = state["experts.*.w"].amax * magnitude
    local = whole[2 * dist.get_rank() :][:2]
    return spec, {"experts.*.w": ExpertAmax(DTensor.from_local(local, mesh, [Shard(0)]))}


def _ranks_killed(folder):
    """Two ranks save; one of them is killed before its n-th step, for several n."""
    spec, _, one, _ = small(fqt.INT8_PER_CHANNEL)
    three = {key: ExpertAmax(3 * group.amax) for key, group in one.items()}
    load_as("directory", _saved("directory", one, Path(folder, "warm"), spec), one, spec)
    outcomes = []
    for victim, count in [(1, 1), (1, 2), (1, 3), (0, 2), (0, 6), (0, 9), (0, 12), (0, 16), (0, 26), (0, 400)]:
        for case in ("replaced", "new"):
            path = Path(folder, f"{case}{victim}-{count}", "state")
            path.parent.mkdir()
            if case == "replaced":
                save_as("directory", one, path, spec)

            def rank(number, victim=victim, count=count, path=path):
                store = f"file://{path.parent}/../store-{path.parent.name}"
                dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
                spec, state = _rank_state(3)
                dist.barrier()
                if number == victim:
                    kill_before(count)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what gloo says of the one that is gone
                checkpoint.save(state, path, spec=spec)

            children = [forked(lambda number=number: rank(number)) for number in range(2)]
            _, status = os.waitpid(children[victim], 0)
            survivor = children[1 - victim]
            if os.WIFSIGNALED(status):
                time.sleep(0.2)
                os.kill(survivor, signal.SIGKILL)
            os.waitpid(survivor, 0)
            there = _what_is_there("directory", path, {"old": one, "new": three}, spec)
            outcomes.append((case, victim, os.WIFSIGNALED(status), there))
            save_as("directory", one, path, spec)
            assert len(list(path.parent.iterdir())) == 1
            assert len(list(path.iterdir())) == 2, list(path.iterdir())
    return outcomes


def test_rank_killed(tmp_path):
    """SIGKILL of one of two ranks, a writer or the coordinator, while files are written and around the commit."""
    outcomes = in_fresh_process(_ranks_killed, str(tmp_path))
    for case, victim, killed, there in outcomes:
        before = {"replaced": "old", "new": "nothing"}[case]
        assert there == ("new" if not killed else before) or (victim == 0 and there == "new"), outcomes
    seen = {(case, killed, there) for case, _, killed, there in outcomes}
    assert {("replaced", True, "old"), ("new", True, "nothing"), ("replaced", False, "new")} <= seen, outcomes


# Ranks that differ


class _Scene:
    """What each rank is told of faults that one of them has."""

    def __init__(self, rank, size):
        self.rank, self.size, self.mesh = rank, size, init_device_mesh("cpu", (size,))
        params = {"x.experts.w": torch.stack(experts(8, (64, 32)))}
        self.spec, self.other = (fqt.select(params, {"*": format}) for format in (fqt.FP8, fqt.INT8))
        self.amax = torch.rand(8) + 1
        self.told = {}

    def whole(self, amax, placement=None):
        leaf = amax if placement is None else DTensor.from_local(amax, self.mesh, [placement])
        return {"x.experts.w": ExpertAmax(leaf)}

    def sharded(self, amax):
        return self.whole(amax.chunk(self.size)[self.rank].clone(), Shard(0))

    def with_gaps(self):
        square, gaps = init_device_mesh("cpu", (2, self.size // 2)), [Shard(0), _StridedShard(0, split_factor=2)]
        local = self.amax.chunk(self.size)[self.rank].clone()
        return {"x.experts.w": ExpertAmax(DTensor.from_local(local, square, gaps, shape=(8,), stride=(1,)))}

    def tell(self, name, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
            self.told[name] = "no error"
        except (ValueError, OSError) as error:
            self.told[name] = f"{type(error).__name__}: {error}"
        dist.barrier()


def _save_with_faults(rank, size, folder):
    scene = _Scene(rank, size)
    amax, spec = scene.amax, scene.spec
    invalid = amax.clone()
    invalid[5] = torch.nan
    scene.tell("nan", checkpoint.save, scene.sharded(invalid), folder / "a", spec=spec)
    scene.tell("copies", checkpoint.save, scene.whole(amax + rank), folder / "b", spec=spec)
    scene.tell("replicas", checkpoint.save, scene.whole(amax + rank, Replicate()), folder / "c", spec=spec)
    scene.tell("partial", checkpoint.save, scene.whole(amax + rank, Partial("max")), folder / "d", spec=spec)
    scene.tell("gaps", checkpoint.save, scene.with_gaps(), folder / "e", spec=spec)
    scene.tell("specs", checkpoint.save, scene.whole(amax), folder / "f", spec=scene.other if rank == 2 else spec)
    (folder / "file").write_text("x")
    scene.tell("taken", checkpoint.save, scene.sharded(amax), folder / "file", spec=spec)
    return scene.told, sorted(path.name for path in folder.iterdir())


def _load_with_faults(rank, size, folder):
    scene, good = _Scene(rank, size), folder / "good"
    amax, spec = scene.amax, scene.spec
    checkpoint.save(scene.sharded(amax), good, spec=spec)
    scene.tell("like", checkpoint.load, good, like=scene.whole(torch.zeros(7 if rank == 1 else 8)), spec=spec)
    scene.tell("gaps", checkpoint.load, good, like=scene.with_gaps(), spec=spec)
    scene.tell("wanted", checkpoint.load, good, like=scene.whole(amax), spec=scene.other if rank == 3 else spec)
    # Damage in the file that rank 2 wrote, which rank 2 alone reads again.
    (file,) = good.glob("*_2.distcp")
    dist.barrier()
    if rank == 0:
        content = file.read_bytes()
        file.write_bytes(content[:-30] + bytes([content[-30] ^ 4]) + content[-29:])
    dist.barrier()
    scene.tell("damaged", checkpoint.load, good, like=scene.sharded(amax), spec=spec)
    if rank == 0:
        file.unlink()
    dist.barrier()
    scene.tell("gone", checkpoint.load, good, like=scene.sharded(amax), spec=spec)
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


def test_dtensor_in_a_file(tmp_path, monkeypatch):
    """A file is one process's: a DTensor is refused, and the message says what stores it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spec, _, state, _ = small()
        leaf = DTensor.from_local(state["experts.*.w"].amax, init_device_mesh("cpu", (1,)), [Shard(0)])
        message = message_of(
            ValueError, checkpoint.save_file, {"experts.*.w": ExpertAmax(leaf)}, tmp_path / "a", spec=spec
        )
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # as tests/ranks.py does in its workers
    assert_names(message, "state 'experts.*.w.amax': found a DTensor", "save stores DTensors")


def test_a_checkpoint_without_a_spec(tmp_path):
    """Whole and unharmed, but of something else than a state: neither loaded nor replaced."""
    from fq_transforms.checkpoint.storage import Writer

    spec, _, state, _ = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(fqt.state.flatten(state), storage_writer=Writer(tmp_path / "a", is_ours=lambda _: True))
    before = tree(tmp_path)
    message = message_of(ValueError, checkpoint.load, tmp_path / "a", like=state, spec=spec)
    assert_names(message, "found a checkpoint without a Spec")
    message = message_of(ValueError, checkpoint.save, state, tmp_path / "a", spec=spec)
    assert_names(message, "found a checkpoint of something else than a state")
    assert tree(tmp_path) == before
