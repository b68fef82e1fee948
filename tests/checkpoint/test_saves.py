"""Saves and loads at the same time, and what a save leaves of the place that it is given."""

import errno
import multiprocessing
import os
import stat
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import dcp_files, storage
from fq_transforms.export.files import directory, shards
from fq_transforms.state import flatten
from tests.cases import assert_names, message_of
from tests.checkpoint.samples import KINDS, assert_same, load_as, save_as, sharded, small, whole_params
from tests.full import FULL
from tests.ranks import CONTEXT

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def states(fq, state, count):
    """As many states, told apart by every number."""
    return [{key: {n: leaf + i for n, leaf in leaves.items()} for key, leaves in state.items()} for i in range(count)]


def which(found, known):
    """The number of the state that was found, which is one of them whole."""
    (number,) = (
        i
        for i, state in enumerate(known)
        if all(torch.equal(a, b) for a, b in zip(flatten(found).values(), flatten(state).values(), strict=True))
    )
    return number


# Two saves to one path.


def _save_again_and_again(connection, kind, path, seconds, number):
    fq, state, _ = small(fqt.NVFP4_STATIC)
    mine = states(fq, state, number + 1)[number]
    said, until = [], time.monotonic() + seconds
    connection.send("ready")
    connection.recv()
    while time.monotonic() < until:
        try:
            save_as(kind, path, fq, mine)
            said.append("saved")
        except OSError as error:
            said.append("refused" if error.errno == errno.EBUSY and ".saving'" in str(error) else str(error))
    connection.send(said)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_save_to_one_path(kind, tmp_path):
    """Each save is whole or refused by the name of the lock; what stays is one of the states, and takes the next.

    A load that saves overtake five times in a row says so, as they do here now and then where a machine is busy.
    """
    fq, state, _ = small(fqt.NVFP4_STATIC)
    path, known = tmp_path / "a", states(fq, state, 3)
    save_as(kind, path, fq, known[2])
    ends = []
    for number in range(2):
        ours, theirs = CONTEXT.Pipe()
        seconds = 20 if FULL else 2
        process = CONTEXT.Process(target=_save_again_and_again, args=(theirs, kind, path, seconds, number))
        process.start()
        ends.append((process, ours))
    for _, ours in ends:
        assert ours.recv() == "ready"
    for _, ours in ends:
        ours.send("go")
    loads = 0
    while not all(ours.poll() for _, ours in ends):
        try:
            assert which(load_as(kind, path, fq, state), known) in range(3)
            loads += 1
        except dcp_files.ReplacedError as error:
            assert_names(str(error), str(path), "it was replaced while it was read")
    said = []
    for process, ours in ends:
        said += ours.recv()
        process.join()
    assert set(said) == {"saved", "refused"}, (len(said), set(said))
    assert loads > 20, loads
    assert which(load_as(kind, path, fq, state), known) in range(2)
    save_as(kind, path, fq, state)
    assert_same(load_as(kind, path, fq, state), state)
    assert sorted(os.listdir(tmp_path)) == ["a"]


@pytest.mark.parametrize("door", ["directory", "replaced directory", "file", "replaced file", "export"])
def test_a_save_that_goes_on_refuses_another(door, tmp_path, monkeypatch):
    """The second is refused before it touches anything, with the name of the lock; the first ends as if alone."""
    up = {"up_proj.weight": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(up, {"*": fqt.FP8}))
    state = fq.calibrate(up)
    path = tmp_path / "a"
    save = {
        "directory": lambda: checkpoint.save(path, fq, state),
        "file": lambda: checkpoint.save_file(path, fq, state),
        "export": lambda: fqt.export.save(path, fq, up, state, config=CONFIG),
    }[door.split()[-1]]
    if door.startswith("replaced"):
        save()
    inside, go_on, said = threading.Event(), threading.Event(), []
    sync = os.fsync

    def wait(descriptor):
        if threading.current_thread() is first:
            inside.set()
            assert go_on.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                said.append(save())
            except BaseException as error:
                said.append(error)

    first = threading.Thread(target=run)
    first.start()
    assert inside.wait(30)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(OSError, match="another save to it is going on") as caught:
        save()
    assert caught.value.errno == errno.EBUSY
    assert_names(str(caught.value), str(path), ".saving'")
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    go_on.set()
    first.join()
    assert said == [None]
    assert sorted(os.listdir(tmp_path)) == ["a"]
    if door != "export":
        save()


def test_a_lock_that_was_left_blocks_nothing(tmp_path):
    """A lock is the system's, and ends with its process: the file alone is no lock."""
    fq, state, _ = small()
    for kind in KINDS:
        (tmp_path / f".{kind}.saving").touch()
        save_as(kind, tmp_path / kind, fq, state)
    (tmp_path / "directory" / ".saving").touch()
    checkpoint.save(tmp_path / "directory", fq, state)
    assert sorted(os.listdir(tmp_path)) == KINDS
    assert len(os.listdir(tmp_path / "directory")) == 2


def test_one_lock_wherever_it_lies(tmp_path, monkeypatch):
    """A path that becomes a directory while its lock is taken: who locked beside it begins again, within it."""
    target = tmp_path / "a"
    flock, left = storage.fcntl.flock, [1]

    def commits(*args):
        if left[0]:
            left[0] -= 1
            target.mkdir()
        return flock(*args)

    monkeypatch.setattr(storage.fcntl, "flock", commits)
    with storage.Lock(target), pytest.raises(OSError, match="another save to it is going on"):
        storage.Lock(target)
    assert not list(target.iterdir())


def test_a_lock_that_another_user_has_left(tmp_path):
    fq, state, _ = small()
    (tmp_path / ".a.saving").touch(mode=0o444)
    checkpoint.save_file(tmp_path / "a", fq, state)
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fq, state, _ = small()
    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="without locks"):
        checkpoint.save_file(tmp_path / "a", fq, state)
    assert_same(checkpoint.load_file(tmp_path / "a", fq), state)


# A load while a save replaces what it reads.


def test_a_load_begins_again_where_a_save_overtook_it(tmp_path, monkeypatch):
    """A checkpoint that is replaced between its metadata and its data loads as the new one, whole."""
    fq, state, _ = small(fqt.NVFP4_STATIC)
    known = states(fq, state, 12)
    checkpoint.save(tmp_path / "a", fq, known[0])
    read, left = dcp_files._read_chunks, [3]

    def overtaken(*args):
        if left[0]:
            left[0] -= 1
            checkpoint.save(tmp_path / "a", fq, known[3 - left[0]])
        return read(*args)

    monkeypatch.setattr(dcp_files, "_read_chunks", overtaken)
    assert which(checkpoint.load(tmp_path / "a", fq, like=state), known) == 3
    left[0] = 10**6
    monkeypatch.setattr(
        dcp_files, "_read_chunks", lambda *a: (checkpoint.save(tmp_path / "a", fq, known[1]), read(*a))[1]
    )
    with pytest.raises(OSError, match="replaced while it was read"):
        checkpoint.load(tmp_path / "a", fq, like=state)
    # A file that is gone from the checkpoint that is there is an error of its own.
    monkeypatch.setattr(dcp_files, "_read_chunks", read)
    (data,) = (tmp_path / "a").glob("*.distcp")
    data.unlink()
    with pytest.raises(FileNotFoundError, match=data.name):
        checkpoint.load(tmp_path / "a", fq, like=state)


def _loads_while_replaced(rank, size, folder):
    mesh = init_device_mesh("cpu", (size,))
    params = sharded(whole_params(2 * size), [Shard(0)], mesh)
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4_STATIC}))
    state = fq.calibrate(params)
    checkpoint.save(folder, fq, state)
    read, overtaken = dcp_files._read_chunks, []

    def slow(*args):
        if rank == size - 1 and not overtaken:  # one rank's file goes; all begin again
            overtaken.append(True)
            Path(args[0]).unlink()
            content = (Path(folder) / ".metadata").read_bytes()[: -storage.SEAL_BYTES]
            content = content.replace(args[0].name[:32].encode(), b"f" * 32)
            for file in Path(folder).glob("*.distcp"):
                file.rename(file.with_name(file.name.replace(args[0].name[:32], "f" * 32)))
            (Path(folder) / ".metadata").write_bytes(content + storage.seal_of(content))
        return read(*args)

    dcp_files._read_chunks = slow
    try:
        checkpoint.load(folder, fq, like=state)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dcp_files._read_chunks = read
    return "loaded"


@pytest.mark.dist
def test_ranks_begin_again_together(ranks, tmp_path):
    """Where one rank is overtaken all read anew, and so none waits: here what they then find is the same error."""
    said = ranks(_loads_while_replaced, str(tmp_path / "a"), size=2)
    assert said[0] == said[1]
    assert "ffff" in said[0], said


# The place.


@pytest.mark.parametrize("door", ["directory", "export"])
def test_a_directory_that_is_there_is_kept(door, tmp_path, monkeypatch):
    """An empty directory may be a mount point, the current one, or have a mode: it stays what it is, as it is."""
    up = {"up_proj.weight": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(up, {"*": fqt.FP8}))
    state = fq.calibrate(up)
    path = tmp_path / "a"
    path.mkdir(mode=0o2750)
    path.chmod(0o2750)
    before = path.stat()
    monkeypatch.chdir(path)
    for target in (path, Path()):
        if door == "directory":
            checkpoint.save(target, fq, state)
            assert_same(checkpoint.load(target, fq, like=state), state)
        elif target == path:
            fqt.export.save(target, fq, up, state, config=CONFIG)
        after = path.stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert Path.cwd() == path
        assert not [name for name in os.listdir(path) if "saving" in name]
    assert sorted(os.listdir(tmp_path)) == ["a"]


def left_by_a_cut(path, fq, params, state, monkeypatch, cut):
    """An export into an empty directory that was killed after so many files were moved up."""
    path.mkdir()
    rename, count = Path.rename, [cut]

    class Killed(BaseException):
        pass

    def moves(self, to):
        if Path(to).parent == path:
            count[0] -= 1
            if count[0] < 0:
                raise Killed
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", moves)
        patch.setattr(shards, "remove_staged", lambda folder: None)
        patch.setattr(directory.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            fqt.export.save(path, fq, params, state, config=CONFIG, max_shard_size=100)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_what_a_cut_export_has_left_is_told_from_what_others_put_there(cut, tmp_path, monkeypatch):
    """The next export takes the directory; a file that was not moved is somebody else's, and stays."""
    params = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(32, 32) for i in range(2)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    given = fq, params, fq.calibrate(params)
    left_by_a_cut(tmp_path / "a", *given, monkeypatch, cut)
    left_by_a_cut(tmp_path / "b", *given, monkeypatch, cut)
    (tmp_path / "b" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="wanted a new name or an empty directory"):
        fqt.export.save(tmp_path / "b", *given, config=CONFIG)
    assert (tmp_path / "b" / "config.json").read_text() == "mine"
    left_by_a_cut(tmp_path / "c", *given, monkeypatch, cut)
    (stage,) = (tmp_path / "c").glob(".saving-*")
    for content in ('["../b/config.json", "..", 7]', "{}"):
        (stage / directory.MOVING).write_text(content)
        assert not directory._moved(tmp_path / "c")
    fqt.export.save(tmp_path / "a", *given, config=CONFIG)
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]


def test_an_error_while_files_are_moved_leaves_nothing(tmp_path, monkeypatch):
    """A disk that fails at the second rename: the directory is empty again, and takes the next."""
    params = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(32, 32) for i in range(2)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    given = fq, params, fq.calibrate(params)
    (tmp_path / "a").mkdir()
    rename, count = Path.rename, [1]

    def moves(self, to):
        if Path(to).parent == tmp_path / "a":
            count[0] -= 1
            if count[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", moves)
        with pytest.raises(OSError, match="Input/output"):
            fqt.export.save(tmp_path / "a", *given, config=CONFIG, max_shard_size=100)
    assert not os.listdir(tmp_path / "a")
    fqt.export.save(tmp_path / "a", *given, config=CONFIG)


def test_a_directory_whose_parent_is_closed(tmp_path, monkeypatch):
    """A mount point: nothing can be made beside it, and nothing has to be. Root could, so the calls are refused."""
    closed = tmp_path / "closed"
    path = closed / "a"
    path.mkdir(parents=True)
    up = {"up_proj.weight": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(up, {"*": fqt.FP8}))
    state = fq.calibrate(up)

    (closed / "b").mkdir()
    calls = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "replace")}

    def refusing(name):
        def call(*args, **kwargs):
            reads = name == "open" and not args[1] & os.O_CREAT
            for place in args[: 2 if name in ("rename", "replace") else 1]:
                if Path(place).parent == closed and not reads:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
            return calls[name](*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, refusing(name))
    with pytest.raises(PermissionError):
        checkpoint.save(closed / "new", fq, state)
    for _ in range(2):
        checkpoint.save(path, fq, state)
        assert_same(checkpoint.load(path, fq, like=state), state)
    fqt.export.save(closed / "b", fq, up, state, config=CONFIG)
    assert sorted(os.listdir(closed)) == ["a", "b"]


def _masked(connection, folder, mask):
    os.umask(mask)
    up = {"up_proj.weight": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(up, {"*": fqt.FP8}))
    state = fq.calibrate(up)
    checkpoint.save(folder / "directory", fq, state)
    checkpoint.save_file(folder / "file", fq, state)
    fqt.export.save(folder / "export", fq, up, state, config=CONFIG, max_shard_size=100)
    connection.send(None)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask(mask, tmp_path):
    """Of every file and directory that is made, whatever library makes it: a group can read what it should."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = CONTEXT.Process(target=_masked, args=(theirs, tmp_path, mask))
    process.start()
    assert ours.poll(100)
    process.join()
    made = list(tmp_path.rglob("*"))
    assert len(made) > 8
    for path in made:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, (path, oct(path.stat().st_mode))


URIS = ["s3://bucket/a", "gs://bucket/a", "az://c/a", "hf://org/model", "file:///tmp/a", "https://host/a"]


@pytest.mark.parametrize("uri", URIS)
def test_uris_are_refused_by_every_door(uri, tmp_path, monkeypatch):
    """As paths they would be directories `s3:` in the current one, of one machine: refused, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    up = {"up_proj.weight": torch.ones(32, 32)}
    fq = fqt.transform(fqt.select(up, {"*": fqt.FP8}))
    state = fq.calibrate(up)
    doors = {
        "save": lambda path: checkpoint.save(path, fq, state),
        "load": lambda path: checkpoint.load(path, fq, like=state),
        "save_file": lambda path: checkpoint.save_file(path, fq, state),
        "load_file": lambda path: checkpoint.load_file(path, fq),
        "read_spec": checkpoint.read_spec,
        "verify": lambda path: checkpoint.megatron.verify(path, fq, {}),
        "export": lambda path: fqt.export.save(path, fq, up, state, config=CONFIG),
        "folder": lambda path: fqt.export.folder(path, tmp_path / "out", layout="plain"),
        "folder to": lambda path: fqt.export.folder(tmp_path, path, layout="plain"),
    }
    for name, door in doors.items():
        for path in (uri, Path(uri)):
            assert_names(message_of(ValueError, door, path), f"a URI of {uri.split(':')[0]!r}")
        assert not os.listdir(tmp_path), name


def test_a_colon_is_no_uri(tmp_path):
    fq, state, _ = small()
    for name in ("a:b", "step:1", "s3"):
        checkpoint.save(tmp_path / name, fq, state)
        assert_same(checkpoint.load(tmp_path / name, fq, like=state), state)
