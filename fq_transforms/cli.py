"""The command line: `fqt`, or `python -m fq_transforms`. Each command is a function of `fq_transforms.export`.

    fqt quantize SRC DST        folder
    fqt inspect SRC             inspect
    fqt report SRC              report
    fqt compare A B             compare

Tables are on standard output, all else is on standard error. More: docs/command-line.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import EISDIR, ENOENT
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fq_transforms import export, presets
from fq_transforms.checkpoint.storage import read_all
from fq_transforms.export.streaming.ranks import LostRankError, RankError
from fq_transforms.formats import LAYOUTS, static_format
from fq_transforms.methods import MAX, FourOverSix, Method, Mse
from fq_transforms.parse import MOST_TEXT, nearest
from fq_transforms.rules import Rule, as_rules, from_json, from_yaml

__all__ = ["main"]

DIFFERENT, REFUSED, BROKEN, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141
# What is wrong with arguments or input, rather than with us.
ERRORS = (ValueError, OSError, ImportError, KeyError, RankError, LostRankError)

METHODS: dict[str, Method] = {"max": MAX, "mse": Mse(), "four-over-six": FourOverSix()}
PRESETS: dict[str, tuple[Rule, ...]] = {
    name.removesuffix("_CFG"): rules for name, rules in vars(presets).items() if name.endswith("_CFG")
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those after the name of the program; by default the process's own.

    Returns:
        0, or 1 if `compare` found a difference, 2 for what was refused, 3 for a fault of this library, 130 for Ctrl-C.

    Example:
        >>> main(["inspect", "a-folder-that-is-not-there"])
        2
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        options: Any = None
        try:
            options = _parser().parse_args(arguments)
            code: int = options.run(options)
            sys.stdout.flush()
        except SystemExit as stopped:  # of --help
            return int(stopped.code or 0)
        except KeyboardInterrupt:
            is_kept = getattr(options, "command", None) == "quantize" and not options.dry_run
            _say("interrupted" + ("; the same command with --resume goes on" if is_kept else ""))
            return INTERRUPTED
        except BrokenPipeError:  # of `| head`, which has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return UNREAD
        except ERRORS as error:
            _say(f"error: {_message(error)}")
            return REFUSED
        except Exception:
            traceback.print_exc()
            return BROKEN
        return code


class _Parser(argparse.ArgumentParser):
    """One whose errors are those of all else."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help says what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fqt",
        description="Quantize, inspect and compare folders of safetensors, streamed, whatever their size.",
        epilog="Exit codes: 0; 1 if compare finds a difference; 2 for what is refused; 3 for a fault of fqt itself; "
        "130 for Ctrl-C.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int], about: str, *folders: tuple[str, str]) -> _Parser:
        made = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
        made.set_defaults(run=run)
        for folder, what in folders:
            made.add_argument(folder.lower(), metavar=folder, help=what)
        return made

    source = ("SRC", "a folder of transformers: safetensors, their index, config.json; quantized or not")
    made = command(
        "quantize", _quantize, "a folder to another, quantized, or to plain weights", source, ("DST", "a new name")
    )
    _add_what(made)
    made.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file: bytes, or such as 5GB")
    made.add_argument("--jobs", metavar="N", type=int, help="threads; by default one per core, at most 8")
    made.add_argument("--resume", action="store_true", help="go on where a run that was killed has stopped")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: print what would be quantized, what is left out and why, and the sizes before and after",
    )
    made = command("inspect", _inspect, "what is in a folder: roles, layers, experts, formats, sizes", source)
    made.add_argument("--json", action="store_true", help="for programs")
    made = command("report", _report, "what quantization would do to each expert: SQNR and more", source)
    _add_what(made)
    made.add_argument("--html", metavar="FILE", type=Path, help="write the table there, too")
    made.add_argument("--png", metavar="FILE", type=Path, help="write a plot there: layers by experts, histograms")
    command(
        "compare",
        _compare,
        "what the plain weights of two folders differ in, whatever their formats; exit code 1 if they do",
        ("A", "a folder, whose weights are the signal"),
        ("B", "another"),
    )
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Options that say what is quantized, and how."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--preset",
        metavar="NAME",
        type=_preset,
        help="rules of fq_transforms.presets, by ModelOpt's names, of their weights alone unless --inputs is given: "
        + ", ".join(sorted(PRESETS)),
    )
    what.add_argument("--rules", metavar="FILE", help="rules in YAML or JSON")
    what.add_argument("--state", metavar="PATH", help="a checkpoint of fq_transforms.checkpoint, whose amax is taken")
    add(
        "--layout",
        "--target",
        metavar="NAME",
        default="compressed-tensors",
        help=f"of the files: {', '.join(LAYOUTS)}; plain weights need no rules; by default %(default)s",
    )
    add("--reader", metavar="NAME", help="vllm or transformers: what it does not load is refused")
    add(
        "--method",
        choices=METHODS,
        default="max",
        help="how amax is chosen; mse and four-over-six choose the scale of "
        "each block, so they take NVFP4 as NVFP4_STATIC, whose files are the same; by default %(default)s",
    )
    add("--inputs", metavar="PATH", help="a checkpoint of calibrated inputs, whose amax is taken")
    add(
        "--experts",
        metavar="REGEX",
        action="append",
        default=[],
        help="names of experts of a list, with (?P<expert>\\d+), or of a stack; may be repeated",
    )
    add(
        "--transposed",
        metavar="GLOB",
        action="append",
        default=[],
        help="stacks that are stored [in, out]; GLOB=false for [out, in]; may be repeated",
    )
    add("--device", metavar="NAME", help="such as cpu or cuda:1; by default the GPU, if there is one")


def _preset(name: str) -> tuple[Rule, ...]:
    if (short := name.removesuffix("_CFG")) in PRESETS:
        return PRESETS[short]
    meant = " or ".join(nearest(short, PRESETS, 2))
    raise argparse.ArgumentTypeError(f"found {name!r}, wanted a preset such as {meant}")


def _what(options: Any) -> dict[str, Any]:
    """Arguments of `folder` and `report`, but for folders."""
    rules = options.preset
    if rules is not None and options.inputs is None:
        rules = presets.weights_only(rules)
    if options.rules is not None:
        rules = _rules_in(Path(options.rules))
    method = METHODS[options.method]
    if rules is None and options.state is None and options.layout != "plain":
        raise ValueError("found nothing to quantize, wanted --preset, --rules or --state; or --layout plain")
    if rules is not None and method != MAX:
        rules = [replace(rule, weights=rule.weights and static_format(rule.weights)) for rule in as_rules(rules)]
    return {
        "rules": rules,
        "layout": options.layout,
        "reader": options.reader,
        "method": method,
        "state": options.state,
        "inputs": options.inputs,
        "experts": options.experts,
        "transposed": dict(map(_orientation, options.transposed)),
        "device": options.device,
    }


def _rules_in(path: Path) -> tuple[Rule, ...]:
    readers = {".json": from_json, ".yaml": from_yaml, ".yml": from_yaml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"--rules: found {str(path)!r}, wanted a file that ends in {', '.join(readers)}")
    try:
        rules = readers[path.suffix.lower()](read_all(path, MOST_TEXT).decode())
        if not rules:
            raise ValueError("found no rules, wanted some")
        return rules
    except ValueError as error:
        raise ValueError(f"--rules {str(path)!r}: {error}") from error


def _orientation(text: str) -> tuple[str, bool]:
    glob, has_value, value = text.rpartition("=")
    if not has_value:
        return text, True
    if value not in ("true", "false"):
        raise ValueError(f"--transposed: found {text!r}, wanted GLOB, GLOB=true or GLOB=false")
    return glob, value == "true"


def _quantize(options: Any) -> int:
    conversion = export.folder(
        options.src,
        options.dst,
        max_shard_size=options.max_shard_size,
        jobs=options.jobs,
        resume=options.resume,
        dry_run=options.dry_run,
        **_what(options),
    )
    if options.dry_run:
        _print(conversion.spec)
    _print(conversion)
    return 0


def _inspect(options: Any) -> int:
    contents = export.inspect(options.src)
    _print(json.dumps(contents.to_dict(), indent=1) if options.json else contents)
    return 0


def _report(options: Any) -> int:
    # Told before hours of reading.
    for option, path in (("--html", options.html), ("--png", options.png)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            code = EISDIR if path.is_dir() else ENOENT
            raise OSError(code, os.strerror(code), f"{option} {path}")
    if options.png is not None and find_spec("matplotlib") is None:
        raise ImportError("--png needs matplotlib: pip install matplotlib")
    found = export.report(options.src, **_what(options))
    _print(found)
    if options.html is not None and _is_first():
        options.html.write_text(found.to_html(f"{Path(options.src).name}: what quantization does"), encoding="utf-8")
    if options.png is not None and _is_first():
        found.plot().savefig(options.png, format="png", dpi=150)
    return 0


def _compare(options: Any) -> int:
    comparison = export.compare(options.a, options.b)
    _print(comparison)
    return 0 if comparison.is_equal else DIFFERENT


def _print(table: object) -> None:
    """On the first rank of torchrun alone: the others have the same."""
    if _is_first():
        print(table)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    """A line on standard error, with the rank, if there are several."""
    rank = f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"fqt: {rank}{text}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say("warning: " + " ".join(str(message).split()))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
