"""Bytes on disk with faults: an error that names the file; nothing is half written, half loaded or lost."""

import contextlib
import errno
import io
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

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import dcp_files
from fq_transforms.checkpoint.storage import seal_of
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import KINDS, assert_same, damaged, files_below, load_as, save_as, small
from tests.full import FULL
from tests.ranks import CONTEXT

ROOT = Path(__file__).parents[2]


def test_damaged_directory(tmp_path):
    """Any bit flipped in the data or the metadata, or any end cut off, is found, and the file is named."""
    fq, state, _ = small(fqt.NVFP4_STATIC, 1)
    target = tmp_path / "a"
    state["experts.*.w"]["amax"] = torch.rand(1, 128, 16)
    checkpoint.save(target, fq, state)
    for file in target.iterdir():
        count = 0
        for _ in damaged(file, 97 if file.suffix else 13):
            message = message_of(ValueError, checkpoint.load, target, fq, like=state)
            assert_names(message, str(target), file.name, "truncated, damaged")
            count += 1
        assert count > 80
        if not file.suffix:
            file.write_bytes(file.read_bytes() + b"x")
            assert_names(message_of(ValueError, checkpoint.load, target, fq, like=state), ".metadata")
            assert_names(message_of(ValueError, checkpoint.read_spec, target), ".metadata")
            file.write_bytes(file.read_bytes()[:-1])
    assert_same(checkpoint.load(target, fq, like=state), state)
    (data,) = target.glob("*.distcp")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=data.name):
        checkpoint.load(target, fq, like=state)


def test_hostile_metadata(tmp_path):
    """Metadata that names a function to call is refused before it is called: DCP's own reader would call it."""
    fq, state, _ = small()
    target = tmp_path / "a"
    checkpoint.save(target, fq, state)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)

    content = pickle.dumps(Hostile())
    (target / ".metadata").write_bytes(content + seal_of(content))
    message = message_of(ValueError, checkpoint.load, target, fq, like=state)
    assert_names(message, ".metadata", "posix.mkdir")
    assert not (tmp_path / "called").exists()
    dotted = b"\x80\x04\x8c)torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
    dotted = dotted.replace(b")", bytes([len("torch.distributed.checkpoint.metadata")]), 1)
    (target / ".metadata").write_bytes(dotted + seal_of(dotted))
    assert_names(message_of(ValueError, checkpoint.load, target, fq, like=state), "os.system")


def test_leftovers_make_room_first(tmp_path, monkeypatch):
    """What an interrupted save left is removed before the next one writes; what only looks like it stays."""
    fq, state, _ = small()
    checkpoint.save(tmp_path / "a", fq, state)
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
    assert_same(checkpoint.load(tmp_path / "a", fq, like=state), state)
    there, write = [], dcp_files.write_tensor
    monkeypatch.setattr(
        dcp_files, "write_tensor", lambda *args: (there.append([p.exists() for p in left]), write(*args))[1]
    )
    checkpoint.save(tmp_path / "a", fq, state)
    assert there[-1] == [False] * 3
    assert not any(path.parent.exists() for path in left[:2])
    assert all(path.exists() for path in kept)


def test_not_a_checkpoint(tmp_path):
    """No path, a file, an empty or foreign directory, a checkpoint of something else: each says what was found."""
    fq, state, _ = small()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.bin").write_text("x")
    (tmp_path / "file").write_text("not safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "model")
    for name, error, found in [
        ("nothing", FileNotFoundError, "there is nothing"),
        ("empty", ValueError, "found a directory without '.metadata' and with no entries"),
        ("foreign", ValueError, "found a directory without '.metadata' and with 1 entries such as ['model.bin']"),
        ("file", ValueError, "found a file, wanted the directory of a checkpoint; load_file reads a file"),
        ("model", ValueError, "file '.metadata': found bytes that are not those written"),
    ]:
        with pytest.raises(error) as caught:
            checkpoint.load(tmp_path / name, fq, like=state)
        assert_names(str(caught.value), str(tmp_path / name), found)
    assert_names(
        message_of(ValueError, checkpoint.load_file, tmp_path / "file", fq), str(tmp_path / "file"), "safetensors"
    )
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load_file(tmp_path / "nothing", fq)
    with pytest.raises(ValueError, match="found a directory"):
        checkpoint.load_file(tmp_path / "empty", fq)


def test_save_refuses_to_replace_what_is_no_state(tmp_path):
    """A file, a directory with anything in it, a model's checkpoint, a damaged one: refused, and not a byte changes."""
    fq, state, _ = small()
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.bin").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "model")
    checkpoint.save(tmp_path / "damaged", fq, state)
    (tmp_path / "damaged" / ".metadata").write_bytes(b"x")
    before = files_below(tmp_path)
    for name, found in {
        "file": "found a file",
        "foreign": "found a directory with 1 entries such as ['model.bin']",
        "model": "file '.metadata': found bytes that are not those written",
        "damaged": "file '.metadata': found bytes that are not those written",
    }.items():
        message = message_of(ValueError, checkpoint.save, tmp_path / name, fq, state)
        assert_names(message, str(tmp_path / name), found, "wanted a new name, an empty directory or a checkpoint")
    with pytest.raises(OSError, match="below") as caught:
        checkpoint.save(tmp_path / "file" / "below", fq, state)
    assert isinstance(caught.value, (NotADirectoryError, FileExistsError))
    with pytest.raises(OSError, match="below"):
        checkpoint.save_file(tmp_path / "file" / "below", fq, state)
    with pytest.raises(OSError, match="nowhere"):
        checkpoint.save_file(tmp_path / "nowhere" / "a", fq, state)
    with pytest.raises(IsADirectoryError, match="foreign"):
        checkpoint.save_file(tmp_path / "foreign", fq, state)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", [".metadata", "distcp"])
def test_unreadable(name, tmp_path, monkeypatch):
    """A path below a file, and files that may not be opened: OSError with the path, of its own kind."""
    fq, state, _ = small()
    checkpoint.save(tmp_path / "a", fq, state)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file/below"):
        checkpoint.load(tmp_path / "file" / "below", fq, like=state)
    real = io.open

    def denied(file, *args, **kwargs):
        if str(file).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", denied)
    with pytest.raises(PermissionError, match=rf"checkpoint '{tmp_path}/a': Permission denied.*{name}"):
        checkpoint.load(tmp_path / "a", fq, like=state)


# Full disks


def _fill(folder, limit=0):
    """On a file system that is too small: the error says so, what was saved before loads, nothing else is left."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    fq, state, _ = small()
    large_fq, large, _ = small(fqt.NVFP4_STATIC, 16)
    for kind in KINDS:
        old, new = Path(folder, kind, "old"), Path(folder, kind, "new")
        old.parent.mkdir()
        save_as(kind, old, fq, state)
        before = files_below(Path(folder))
        for path in (old, new):
            with pytest.raises(OSError) as caught:
                save_as(kind, path, large_fq, large)
            assert caught.value.errno == (errno.EFBIG if limit else errno.ENOSPC), caught.value
            assert str(path.parent) in str(caught.value)
        assert files_below(Path(folder)) == before
        assert_same(load_as(kind, old, fq, state), state)
    print(f"said: {caught.value}")


def test_full_disk(tmp_path):
    """A full disk: a tmpfs of 64 KiB, mounted here or in a namespace; where neither may be, a limit on file sizes."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run(mount.split(), capture_output=True, check=False).returncode == 0:
        try:
            in_fresh_process(_fill, str(tmp_path))
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
    elif subprocess.run(["unshare", "-rm", *mount.split()], capture_output=True, check=False).returncode == 0:
        code = f'from tests.checkpoint.test_storage import _fill; _fill("{tmp_path}")'
        command = f"{mount} && exec {sys.executable} -c '{code}'"
        result = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "No space left on device" in result.stdout
    else:
        in_fresh_process(_fill, str(tmp_path), 2**16)


def test_file_size_limit(tmp_path):
    """A file that may not grow further, as a quota does it: the same promise."""
    in_fresh_process(_fill, str(tmp_path), 2**16)


# Killed


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def kill_before(count):
    """SIGKILL this process before its `count`-th step on the file system: opened, written, synced, renamed, removed."""
    left = [count]

    def step():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    seal, sync = dcp_files.seal_of, os.fsync
    dcp_files.seal_of = lambda *args: (step(), seal(*args))[1]
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
    """Run a function in a process that may fork, since it has started no threads."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(100 if not FULL else 3000), "no answer"
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
    fq, old, params = small(fqt.NVFP4_STATIC)
    new = fq.calibrate({name: 3 * weight for name, weight in params.items()})
    outcomes = {"replaced": [], "new": []}
    save_as(kind, Path(folder, "warm"), fq, old)
    load_as(kind, Path(folder, "warm"), fq, old)  # imports are no steps
    for case, found in outcomes.items():
        for count in range(1, 500):
            path = Path(folder, f"{case}{count}", "state")
            path.parent.mkdir()
            if case == "replaced":
                save_as(kind, path, fq, old)

            def save(count=count, path=path):
                kill_before(count)
                save_as(kind, path, fq, new)

            _, status = os.waitpid(forked(save), 0)
            killed = os.WIFSIGNALED(status)
            assert killed or os.waitstatus_to_exitcode(status) == 0
            found.append(_what_is_there(kind, path, fq, {"old": old, "new": new}))
            # The next save works, and leaves nothing of the one that was killed.
            save_as(kind, path, fq, old)
            assert_same(load_as(kind, path, fq, old), old)
            assert len(list(path.parent.iterdir())) == 1, list(path.parent.iterdir())
            assert kind == "file" or len(list(path.iterdir())) == 2, list(path.iterdir())
            shutil.rmtree(path.parent)
            if not killed:
                break
    return outcomes


def _what_is_there(kind, path, fq, states):
    if not path.exists():
        return "nothing"
    found = load_as(kind, path, fq, states["old"])
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
    fq, state, _ = small(fqt.INT8_PER_CHANNEL)
    whole = state["experts.*.w"]["amax"] * magnitude
    local = whole[2 * dist.get_rank() :][:2]
    return fq, {"experts.*.w": {"amax": DTensor.from_local(local, mesh, [Shard(0)])}}


def _ranks_killed(folder):
    """Two ranks save; one of them is killed before its n-th step, for several n."""
    fq, one, _ = small(fqt.INT8_PER_CHANNEL)
    three = optree.tree_map(lambda leaf: 3 * leaf, one)
    save_as("directory", Path(folder, "warm"), fq, one)
    load_as("directory", Path(folder, "warm"), fq, one)
    outcomes = []
    for victim, count in [(1, 1), (1, 3), (0, 2), (0, 9), (0, 16), (0, 26), (0, 400)]:
        for case in ("replaced", "new"):
            path = Path(folder, f"{case}{victim}-{count}", "state")
            path.parent.mkdir()
            if case == "replaced":
                save_as("directory", path, fq, one)

            def rank(number, victim=victim, count=count, path=path):
                store = f"file://{path.parent}/../store-{path.parent.name}"
                dist.init_process_group("gloo", init_method=store, rank=number, world_size=2)
                fq, state = _rank_state(3)
                dist.barrier()
                if number == victim:
                    kill_before(count)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what gloo says of the one that is gone
                checkpoint.save(path, fq, state)

            children = [forked(lambda number=number: rank(number)) for number in range(2)]
            _, status = os.waitpid(children[victim], 0)
            survivor = children[1 - victim]
            if os.WIFSIGNALED(status):
                time.sleep(0.2)
                os.kill(survivor, signal.SIGKILL)
            os.waitpid(survivor, 0)
            there = _what_is_there("directory", path, fq, {"old": one, "new": three})
            outcomes.append((case, victim, os.WIFSIGNALED(status), there))
            save_as("directory", path, fq, one)
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
