"""Laws of `folder` on several ranks: the same bytes as one; an error of one is that of all; none waits for ever."""

import json
import multiprocessing
import os
import signal
import socket
import time
import warnings

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export import folder
from fq_transforms.export.streaming import job, run, stage
from tests.cases import assert_names
from tests.export.test_folder import CONFIG, EXPERTS_ONLY, SMALL, files_of, in_lists, small, write_folder
from tests.full import FULL

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]

_fill = run._fill
OPTIONS = {"layout": "compressed-tensors", "max_shard_size": "4KB", "jobs": 2}
# Within which all ranks end when one has. Gloo tells at once; imports take a few seconds.
SECONDS = 60


def _small_pieces():
    warnings.simplefilter("ignore")
    job.PIECE_BYTES, stage.SYNC_BYTES = 5000, 1


def in_a_job(rank, size, src, dst, rules, options):
    """On ranks whose torch.distributed is there already."""
    _small_pieces()
    made = folder(src, dst, rules, **OPTIONS | options)
    assert torch.distributed.is_initialized()
    torch.distributed.barrier()  # of the job's own group, which still works
    return made.rows, made.shards


def _of_torchrun(rank, size, port, src, dst, how, report):
    """A process as torchrun starts it, which says how it ended."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRITON_INTERPRET": "1"}
    torch.set_num_threads(1)
    _small_pieces()
    convert, count = job.Job.convert, [0]

    def patched(self, piece, writer):
        count[0] += 1
        if rank == how.get("rank") and count[0] == how.get("at", 1):
            if how["what"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(5, "Input/output error")
        convert(self, piece, writer)

    job.Job.convert = patched
    try:
        folder(src, dst, SMALL, **OPTIONS | how.get("options", {}))
        said = "done"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    with open(f"{report}-{rank}", "w") as stream:
        json.dump([said, count[0], torch.distributed.is_initialized()], stream)


def torchrun(size, src, dst, place, **how):
    """What each of some processes said: how it ended, its pieces, whether a group is left; None if it was killed."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    report = str(place / "report")
    context = multiprocessing.get_context("forkserver")
    args = [(rank, size, port, str(src), str(dst), how, report) for rank in range(size)]
    processes = [context.Process(target=_of_torchrun, args=each) for each in args]
    for process in processes:
        process.start()
    until = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} of {size} did not end"
    found = []
    for rank in range(size):
        file = place / f"report-{rank}"
        found.append(json.loads(file.read_text()) if file.exists() else None)
        file.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("start", ["new", "empty directory"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
def test_the_bytes_do_not_depend_on_ranks(layout, start, ranks, tmp_path):
    """1, 2 and 4, within a job that has a group already."""
    src = small(tmp_path / "src")
    options = {"layout": layout}
    made = folder(src, tmp_path / "one", SMALL, **OPTIONS | options)
    for size in (1, 2, 3, 4) if FULL else (2, 4):
        dst = tmp_path / "to" / str(size)
        if start == "empty directory":
            dst.mkdir(parents=True)
        said = ranks(in_a_job, src, dst, SMALL, options, size=size)
        assert said == [(made.rows, made.shards)] * size
        assert files_of(dst) == files_of(tmp_path / "one")
    assert not [name for name in os.listdir(tmp_path / "to") if not name.isdigit()]


def test_more_ranks_than_pieces(ranks, tmp_path):
    """Those that have nothing to do wait for the others."""
    src = write_folder(tmp_path / "src", [in_lists(["up_proj"], 1)], CONFIG)
    folder(src, tmp_path / "one", SMALL, **OPTIONS)
    ranks(in_a_job, src, tmp_path / "dst", SMALL, {}, size=4)
    assert files_of(tmp_path / "dst") == files_of(tmp_path / "one")


def test_torchrun_starts_and_ends_a_group(tmp_path):
    """Of processes that have none: each has a part of the work, and none has a group afterwards."""
    src = small(tmp_path / "src")
    folder(src, tmp_path / "one", SMALL, **OPTIONS)
    found = torchrun(3, src, tmp_path / "dst", tmp_path)
    assert [said for said, _, _ in found] == ["done"] * 3
    assert all(count > 0 for _, count, _ in found)
    assert not any(is_left for _, _, is_left in found)
    assert files_of(tmp_path / "dst") == files_of(tmp_path / "one")


def one_fails(rank, size, src, dst, failing, what):
    """What each rank says when one cannot read, has no source, other rules, or finds a value that is not finite."""
    _small_pieces()
    rules, place = SMALL, src
    if rank == failing and what == "no source":
        place = f"{src}-not-there"
    if rank == failing and what == "other rules":
        rules = {EXPERTS_ONLY: fqt.FP8_PER_CHANNEL}
    if rank == failing and what == "a rule":
        rules = {"*.nothing.*": fqt.FP8}
    convert = job.Job.convert
    if rank == failing and what == "a piece":
        job.Job.convert = lambda *_: 1 / 0
    try:
        folder(place, dst, rules, **OPTIONS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        job.Job.convert = convert
        torch.distributed.barrier()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("what", ["no source", "a rule", "other rules", "a piece"])
def test_an_error_on_one_rank_is_that_of_all(what, failing, ranks, tmp_path):
    """Each raises it, the others with the rank that had it; none waits, nothing is left."""
    src = small(tmp_path / "src")
    (tmp_path / "to").mkdir()
    said = ranks(one_fails, str(src), tmp_path / "to" / "dst", failing, what, size=2)
    assert None not in said
    if what != "other rules":
        assert_names(said[1 - failing], "RankError", f"rank {failing} of 2", said[failing])
        assert_names(said[failing], {"no source": "found nothing", "a rule": "nothing", "a piece": "Zero"}[what])
    else:
        assert_names(said[0], "ValueError", "src, dst and options", "found others on ranks [1] of 2", "wanted the same")
        assert said[1] == said[0]
    assert not os.listdir(tmp_path / "to")


def test_a_value_that_is_not_finite(ranks, tmp_path):
    """In the part of one rank, which names it; the other names the rank."""
    tensors = in_lists(["up_proj"], 4)
    tensors["layers.0.mlp.experts.3.up_proj.weight"][1, 1] = torch.nan
    src = write_folder(tmp_path / "src", [tensors], CONFIG)
    said = ranks(one_fails, str(src), tmp_path / "dst", None, "", size=2)
    assert_names(said[0], "RankError", "rank 1 of 2", said[1])
    assert_names(said[1], "ValueError", "experts.3.up_proj.weight")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(("size", "killed"), [(2, 0), (2, 1), (4, 2), (4, 0)] if FULL else [(2, 0), (3, 1)])
def test_a_killed_rank(size, killed, resume, tmp_path, monkeypatch):
    """The others end with an error; another number of ranks goes on, and does not do again what was done."""
    src = small(tmp_path / "src")
    monkeypatch.setattr(job, "PIECE_BYTES", 5000)
    pieces = 0

    def fill(job, *args):
        nonlocal pieces
        pieces = len(job.pieces)
        return _fill(job, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_fill", fill)
        folder(src, tmp_path / "one", SMALL, **OPTIONS)
    dst = tmp_path / "to" / "dst"
    at = 1 if size == 4 else 2  # of the few pieces that a rank has
    how = {"rank": killed, "at": at, "what": "killed", "options": {"resume": resume, "jobs": 1}}
    found = torchrun(size, src, dst, tmp_path, **how)
    assert found[killed] is None
    others = [one for rank, one in enumerate(found) if rank != killed]
    assert all(said.startswith("LostRankError: ") and not is_left for said, _, is_left in others), others
    assert not dst.exists()
    done = sum(count for _, count, _ in others) + at - 1
    again = torchrun(size % 4 + 1, src, dst, tmp_path, options={"resume": True})
    assert [said for said, _, _ in again] == ["done"] * (size % 4 + 1)
    assert sum(count for _, count, _ in again) == pieces - done
    assert files_of(dst) == files_of(tmp_path / "one")
    assert os.listdir(tmp_path / "to") == ["dst"]


def test_a_rank_that_fails_leaves_its_part_to_resume(tmp_path):
    """As on one rank, and one rank goes on."""
    src = small(tmp_path / "src")
    dst = tmp_path / "to" / "dst"
    for resume in (False, True):
        found = torchrun(2, src, dst, tmp_path, rank=1, at=2, what="error", options={"resume": resume})
        assert_names(found[0][0], "RankError", "rank 1 of 2", "Input/output error")
        assert_names(found[1][0], "OSError", "Input/output error")
        assert len(list(tmp_path.glob("to/*"))) == (tmp_path / "to").exists() == resume
    folder(src, tmp_path / "one", SMALL, **OPTIONS)
    torchrun(1, src, dst, tmp_path, options={"resume": True})
    assert files_of(dst) == files_of(tmp_path / "one")
