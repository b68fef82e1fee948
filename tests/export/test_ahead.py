"""Laws of reading ahead: what a conversion reads and nothing else, each byte once, in a window; no thread stays."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export import ahead, folder
from fq_transforms.export.ahead import Ahead, Span
from fq_transforms.export.shards import ShardWriter
from tests.export.test_folder import CONFIG, in_lists, write_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of what engines quantize besides

module = sys.modules["fq_transforms.export.folder"]


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked to read: name of the file, first byte, end."""
    found = []

    def fadvise(file, start, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, start, start + size))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(ahead, "STEP_BYTES", 1000)
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
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
    take, copy, convert = fqt.export.shards.Files.read, ShardWriter.copy, module.Job.convert

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

    monkeypatch.setattr(fqt.export.shards.Files, "read", reading)
    monkeypatch.setattr(ShardWriter, "copy", copying)
    monkeypatch.setattr(module.Job, "convert", converting)
    folder(src, tmp_path / "dst", rules, layout=layout)
    assert len(asked) > 10
    assert len(bytes_of(asked)) == sum(end - start for _, start, end in asked)
    assert bytes_of(asked) == bytes_of(read)


def bytes_of(spans):
    return {(file, at) for file, start, end in spans for at in range(start, end)}


def test_ranks_ask_for_what_they_convert(asked, tmp_path):
    """Of three ranks no two ask for the same bytes, and together they ask for all."""
    src, shares = stacks(tmp_path / "src"), []
    with module.Folder(src) as source:
        job = module.decided(source, None, "plain", None, fqt.methods.MAX, None, None, (), (), "cpu", 10**9)
        ranks = module.Ranks()
        for ranks.rank in range(3):
            ranks.size = 3
            mine = module._mine(job, ranks)
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

    monkeypatch.setattr(module.Job, "convert", fail)
    with pytest.raises(error):
        folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4})
    assert is_over()
    assert 0 < len(bytes_of(asked)) <= 3000


def test_a_file_that_is_gone_is_left_to_who_reads_it(asked, tmp_path):
    """No error of the thread is seen, and it ends."""
    with Ahead([(0, [Span(tmp_path / "none", 0, 10)])]) as one:
        one.start()
    assert is_over()
    assert not asked


def test_nothing_is_asked_for_where_nothing_is_written(asked, tmp_path):
    """A dry run reads headers alone."""
    folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, dry_run=True)
    assert not asked
    assert is_over()


def test_a_system_that_cannot_is_not_asked(tmp_path, monkeypatch):
    """Without `posix_fadvise` a conversion is as it was."""
    monkeypatch.delattr(os, "posix_fadvise")
    folder(lists(tmp_path / "src"), tmp_path / "dst", {"*.experts.*": fqt.NVFP4})
    assert (tmp_path / "dst" / "config.json").exists()


def test_few_bytes_wait_for_the_disk(asked, tmp_path, monkeypatch):
    """Where pieces lie in two files by turns, too: beyond those allowed a byte of the oldest step is read first."""
    monkeypatch.setattr(ahead, "QUEUED_BYTES", 3000)
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(10_000))
    order, fadvise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: [order.append(1), fadvise(*args)])
    monkeypatch.setattr(os, "pread", lambda file, size, start: [order.append(-1)])
    pieces = [(number, [Span(files[number % 2], number // 2 * 1000, 1000)]) for number in range(20)]
    with Ahead(pieces, 10**6) as one:
        one.start()
        wait()
    assert [sum(order[:at]) for at in range(1, 7)] == [1, 2, 3, 4, 3, 4]
    assert order.count(1) == 20
    assert max(sum(order[:at]) for at in range(len(order))) == 4


def test_what_is_on_the_disk_is_not_asked_for_again(asked, tmp_path, monkeypatch):
    """Of a conversion that is gone on with only what is left is read ahead, once the marks are known."""
    src, convert, done = lists(tmp_path / "src"), module.Job.convert, []

    def fail(self, piece, writer):
        if len(done) == 2:
            raise OSError("stopped")
        convert(self, piece, writer)
        done.append(set(self.spans(piece)))

    monkeypatch.setattr(module.Job, "convert", fail)
    with pytest.raises(OSError, match="stopped"):
        folder(src, tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, resume=True, jobs=1)
    monkeypatch.setattr(module.Job, "convert", convert)
    asked.clear()
    folder(src, tmp_path / "dst", {"*.experts.*": fqt.NVFP4}, resume=True, jobs=1)
    there = [(span.file.name, span.start, span.start + span.size) for spans in done for span in spans]
    assert there
    assert bytes_of(asked)
    assert not bytes_of(asked) & bytes_of(there)


def test_a_model_larger_than_the_window_is_read_ahead_to_its_end(asked, tmp_path, monkeypatch):
    """What has been used makes room. Each piece waits here until it has been asked for."""
    monkeypatch.setattr(ahead, "MOST_BYTES", 40_000)
    convert, late = module.Job.convert, []

    def patient(self, piece, writer):
        own = bytes_of([(span.file.name, span.start, span.start + span.size) for span in self.spans(piece)])
        deadline = time.monotonic() + 20
        while own - bytes_of(list(asked)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if own - bytes_of(list(asked)):
            late.append(piece)
            raise OSError("it was not asked for")
        convert(self, piece, writer)

    monkeypatch.setattr(module.Job, "convert", patient)
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
