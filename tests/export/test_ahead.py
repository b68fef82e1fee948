"""Laws of reading ahead: what a conversion reads and nothing else, each byte once, in a window; no thread stays."""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export import folder
from fq_transforms.export.files.shards import ShardWriter
from fq_transforms.export.folder import decided
from fq_transforms.export.streaming import ahead
from fq_transforms.export.streaming import job as jobs
from fq_transforms.export.streaming.ahead import Ahead, Span
from fq_transforms.export.streaming.ranks import Ranks
from fq_transforms.export.streaming.run import share_of
from fq_transforms.export.streaming.sources import Folder
from tests.export.test_folder import CONFIG, in_lists, write_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of what engines quantize besides


@pytest.fixture
def asked(monkeypatch):
    """What is read ahead: name of the file, first byte, end."""
    found = []

    def read(span, nowhere):
        found.append((span.file.name, span.start, span.start + span.size))

    monkeypatch.setattr(ahead, "_read", read)
    monkeypatch.setattr(ahead, "STEP_BYTES", 1000)
    monkeypatch.setattr(jobs, "PIECE_BYTES", 10_000)
    return found


def is_over():
    return all(thread.name != "ahead" for thread in threading.enumerate())


def wait():
    """Until a thread has asked for all that it may."""
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(20)


def stacks(path):
    """Stacks of experts beside a matrix and a buffer, in two shards."""
    tensors = {
        f"layers.{layer}.mlp.experts.{role}": torch.randn(7, *shape).bfloat16()
        for layer in range(2)
        for role, shape in (("gate_up_proj", (64, 32)), ("down_proj", (32, 32)))
    }
    return write_folder(path, [tensors, {"norm.weight": torch.ones(32), "odd.bias": torch.ones(3)}], CONFIG)


def lists(path):
    """Experts one by one, gate and up of which are fused, in three shards."""
    tensors = in_lists(["gate_proj", "up_proj", "down_proj"], 7)
    return write_folder(path, [dict([*tensors.items()][first::3]) for first in range(3)], CONFIG)


def encoded(path):
    """Experts in NVFP4, each with a number of its own beside codes and scales."""
    folder(lists(path.with_name("plain")), path, {"*.experts.*": fqt.NVFP4}, max_shard_size="20KB")
    return path


def fp8(path):
    """Stacks in codes, whose scale all experts share."""
    shapes = {"gate_up_proj": (64, 32), "down_proj": (32, 32)}
    tensors = {
        f"layers.0.mlp.experts.{name}": torch.randn(7, *shape).to(torch.float8_e4m3fn) for name, shape in shapes.items()
    }
    scales = {f"{name}_scale_inv": torch.ones(()) for name in tensors}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    return write_folder(path, [tensors, scales], config)


CASES = [
    *((lists, {"*.experts.*": fqt.NVFP4}, "compressed-tensors"), (lists, None, "plain")),
    *((stacks, {"*.experts.*": fqt.NVFP4}, "plain"), (stacks, None, "plain")),
    *((encoded, {"*.experts.*": fqt.FP8_PER_CHANNEL}, "compressed-tensors"), (encoded, None, "plain")),
    *((fp8, None, "plain"), (fp8, {"*.experts.*": fqt.NVFP4}, "plain")),
]


@pytest.mark.parametrize(("make", "rules", "layout"), CASES)
def test_each_byte_that_is_read_is_asked_for_once(make, rules, layout, asked, tmp_path, monkeypatch):
    """What is asked for is disjoint, and is all that the conversion reads, and no more."""
    src = make(tmp_path / "src")
    asked.clear()
    read = []
    take, copy, convert = fqt.export.files.shards.Files.read, ShardWriter.copy, jobs.Job.convert

    def reading(self, name, part=None):
        file, (_, shape), start, size = self.places[name]
        rows = range(*part.indices(shape[0])) if part else range(1)
        row = size // (shape[0] if part else 1)
        if self.folder == src:
            read.append((file, start + rows.start * row, start + rows.stop * row))
        return take(self, name, part)

    def copying(self, name, source, start):
        read.append((source.name, start, start + self.places[name].size))
        copy(self, name, source, start)

    def converting(self, piece, writer):
        wait()
        convert(self, piece, writer)

    monkeypatch.setattr(fqt.export.files.shards.Files, "read", reading)
    monkeypatch.setattr(ShardWriter, "copy", copying)
    monkeypatch.setattr(jobs.Job, "convert", converting)
    folder(src, tmp_path / "dst", rules, layout=layout)
    assert len(asked) > 10
    assert len(bytes_of(asked)) == sum(end - start for _, start, end in asked)
    assert bytes_of(asked) == bytes_of(read)


def bytes_of(spans):
    return {(file, at) for file, start, end in spans for at in range(start, end)}


def test_ranks_ask_for_what_they_convert(asked, tmp_path):
    """Of three ranks no two ask for the same bytes, and together they ask for all."""
    src, shares = stacks(tmp_path / "src"), []
    with Folder(src) as source:
        job = decided(source, None, "plain", None, fqt.methods.MAX, None, None, (), (), "cpu", 10**9)
        ranks = Ranks()
        for ranks.rank in range(3):
            ranks.size = 3
            mine = share_of(job, ranks)
            with Ahead((number, job.spans(piece)) for number, piece in mine.items()) as one:
                one.start()
                wait()
            shares.append(bytes_of(asked))
            asked.clear()
        whole = [(place.file, place.start, place.start + place.size) for place in source.files.places.values()]
    assert all(shares)
    assert sum(map(len, shares)) == len(bytes_of(whole))
    assert set.union(*shares) == bytes_of(whole)


def pieces_in(path, count=20, size=2500):
    path.write_bytes(bytes(count * size))
    return {number: [Span(path, number * size, size)] for number in range(count)}


def test_no_more_is_ahead_than_the_window(asked, tmp_path):
    """Bytes that are asked for and not used, whatever the order of use; and in the end all are asked for."""
    pieces, used = pieces_in(tmp_path / "file"), []
    with Ahead(pieces.items(), 6000) as one:
        one.start()
        while len(used) < 20:
            for thread in threading.enumerate():
                if thread.name == "ahead":
                    thread.join(0.02)
            left = [start for _, start, _ in asked if start // 2500 not in used]
            assert sum(min(1000, 2500 - start % 2500) for start in left) <= 6000
            # Of two that were asked for whole the later first: threads do not end in order.
            if whole := {start // 2500 for start in left if start % 2500 == 2000}:
                used.append(max(whole))
                one.used(used[-1])
    assert bytes_of(asked) == {("file", at) for at in range(50_000)}


def test_what_has_been_used_is_not_asked_for(asked, tmp_path):
    """Of a conversion that is gone on with, and of a piece that was faster."""
    pieces = pieces_in(tmp_path / "file")
    with Ahead(pieces.items(), 10**6) as one:
        one.used(3)
        one.start(range(10, 20))
        wait()
    assert {start // 2500 for _, start, _ in asked} == {*range(10)} - {3}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_no_thread_stays_after_an_error(error, asked, tmp_path, monkeypatch):
    """While it waits for room, of which there is none left."""
    monkeypatch.setattr(ahead, "MOST_BYTES", 3000)

    def fail(*_):
        raise error

    monkeypatch.setattr(jobs.Job, "convert", fail)
    with pytest.raises(error):
        folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4})
    assert is_over()
    assert 0 < len(bytes_of(asked)) <= 3000


def test_a_file_that_is_gone_is_left_to_who_reads_it(tmp_path):
    """No error of a thread is seen, and all end."""
    with Ahead([(number, [Span(tmp_path / "none", 0, 10)]) for number in range(9)]) as one:
        one.start()
        wait()
        assert is_over()


def test_all_bytes_are_read(tmp_path, monkeypatch):
    """To the last one, though a call may bring fewer: and a system that is only advised takes few of them."""
    monkeypatch.setattr(ahead, "STEP_BYTES", 1000)
    pieces, found, sendfile = pieces_in(tmp_path / "file"), [], os.sendfile

    def reading(to, file, start, size):
        assert os.readlink(f"/proc/self/fd/{to}") == os.devnull
        count = sendfile(to, file, start, min(size, 700))
        found.append(("file", start, start + count))
        return count

    monkeypatch.setattr(os, "sendfile", reading)
    with Ahead(pieces.items(), 10**6) as one:
        one.start()
        wait()
    assert bytes_of(found) == {("file", at) for at in range(20 * 2500)}
    assert sum(end - start for _, start, end in found) == 20 * 2500


def test_bytes_are_in_the_page_cache(tmp_path):
    """All of a file that was not there before."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**26))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 2**25:
        pytest.skip("this file system keeps what it is told to drop")
    with Ahead([(0, [Span(path, 0, 2**26)])], 2**27) as one:
        one.start()
        wait()
    assert resident(path) == 2**26


def resident(path):
    """Bytes of a file that are in the page cache, by `mincore`."""
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages, first = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))(), ctypes.c_char.from_buffer(mapped)
        address, size = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped))
        assert ctypes.CDLL(None).mincore(address, size, pages) == 0
        del first
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


def test_nothing_is_asked_for_where_nothing_is_written(asked, tmp_path):
    """A dry run reads headers alone."""
    folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, dry_run=True)
    assert not asked
    assert is_over()


def test_what_is_on_the_disk_is_not_asked_for_again(asked, tmp_path, monkeypatch):
    """Of a conversion that is gone on with only what is left is read ahead, once the marks are known."""
    src, convert, done = lists(tmp_path / "src"), jobs.Job.convert, []

    def fail(self, piece, writer):
        if len(done) == 2:
            raise OSError("stopped")
        convert(self, piece, writer)
        done.append(set(self.spans(piece)))

    monkeypatch.setattr(jobs.Job, "convert", fail)
    with pytest.raises(OSError, match="stopped"):
        folder(src, tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, resume=True, jobs=1)
    monkeypatch.setattr(jobs.Job, "convert", convert)
    asked.clear()
    folder(src, tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, resume=True, jobs=1)
    there = [(span.file.name, span.start, span.start + span.size) for spans in done for span in spans]
    assert there
    assert bytes_of(asked)
    assert not bytes_of(asked) & bytes_of(there)


def test_a_model_larger_than_the_window_is_read_ahead_to_its_end(asked, tmp_path, monkeypatch):
    """What has been used makes room. Each piece waits here until it has been asked for."""
    monkeypatch.setattr(ahead, "MOST_BYTES", 40_000)
    convert, late = jobs.Job.convert, []

    def patient(self, piece, writer):
        own = bytes_of([(span.file.name, span.start, span.start + span.size) for span in self.spans(piece)])
        deadline = time.monotonic() + 20
        while own - bytes_of(list(asked)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if own - bytes_of(list(asked)):
            late.append(piece)
            raise OSError("it was not asked for")
        convert(self, piece, writer)

    monkeypatch.setattr(jobs.Job, "convert", patient)
    folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, jobs=1)
    assert not late
    assert len(bytes_of(asked)) > 40_000


def test_the_window_is_a_share_of_what_is_free(monkeypatch):
    """Of the system's memory or the container's, whichever is less, for each process; none where nothing is known."""
    texts = {}

    def read_text(self):
        if str(self) not in texts:
            raise FileNotFoundError(self)
        return texts[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ahead._window() == 0
    texts["/proc/meminfo"] = "MemTotal: 9 kB"
    assert ahead._window() == 0
    texts["/proc/meminfo"] = "MemTotal: 99 kB\nMemAvailable: 4000 kB\n"
    assert ahead._window() == 1_024_000
    texts["/sys/fs/cgroup/memory.max"] = "max"
    assert ahead._window() == 1_024_000
    texts["/sys/fs/cgroup/memory.max"] = "400000"
    assert ahead._window() == 100_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ahead._window() == 25_000
    texts |= {"/proc/meminfo": "MemAvailable: 999999999 kB", "/sys/fs/cgroup/memory.max": "max"}
    assert ahead._window() == ahead.MOST_BYTES // 4
