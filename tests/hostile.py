"""What reading a file may do to the process: nothing but read it, in time and memory that the file accounts for."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

SECONDS, MEGABYTES = 10, 300

# Steps that no reader has cause for. The standard library's unpickler reports each name that a pickle gives it.
_FORBIDDEN = {
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind"),
}
_WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
_ROOTS = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[1])})
_watching: list[list[str]] = []


def _audit(event, args):
    if not _watching:
        return
    path = str(args[0]) if args else ""
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # within a directory that is open, as rmtree has it
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
    is_elsewhere = not isinstance(args[0] if args else 0, int) and not path.startswith(tuple(_written))
    if event in _FORBIDDEN or (event in _WRITES and is_elsewhere):
        _watching[-1].append(f"{event}{args!r}"[:200])
    elif event == "open" and isinstance(args[0], str | bytes):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path != os.devnull and not path.startswith((*_ROOTS, "/proc/", "/sys/", *_allowed)):
            _watching[-1].append(f"open({path!r})"[:200])


_allowed: list[str] = []
_written: list[str] = []
_hooked: list[bool] = []


@contextlib.contextmanager
def watched(*folders, writes=None, seconds=SECONDS, megabytes=MEGABYTES):
    """Fail if what runs inside names code, opens a file elsewhere, writes, or takes more time or memory than this.

    `writes` begins the paths that may be written to.
    """
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    _allowed.extend(os.path.realpath(folder) for folder in folders)
    _written[:] = [str(writes)] if writes else []
    seen: list[str] = []
    before, start = _reset_peak(), time.monotonic()
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        del _allowed[-len(folders) :]
    took, grew = time.monotonic() - start, _status("VmHWM") - before
    assert not seen, seen
    assert took < seconds, f"{took:.1f} s"
    assert grew < megabytes, f"{grew} MB"


def _too_long(*_):
    raise AssertionError("it takes too long")


def _reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field):
    """Of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024
