"""One file to share: the state of one process as safetensors, its Spec in the metadata. Nothing in it can be code.

    checkpoint.save_file(state, "amax.safetensors", spec=spec)
    state = checkpoint.load_file("amax.safetensors")

Any reader of safetensors finds each leaf, fp32 [E, ...], under its flat name, `{group key}.{field}`. The metadata holds

    format  "fq_transforms"        version  "1"
    spec    `Spec.to_json()`       crc32    of the spec, and of each leaf's name and bytes, sorted by name
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from fq_transforms.checkpoint.contents import check_groups, check_no_others, named
from fq_transforms.checkpoint.trees import STATE
from fq_transforms.dtensor import is_sharded
from fq_transforms.spec import Spec
from fq_transforms.checks import check_same_leaves
from fq_transforms.checks import check_state as check
from fq_transforms.state import State, flatten, unflatten

__all__ = ["load_file", "read_spec", "save_file"]

FORMAT, VERSION = "fq_transforms", "1"


def save_file(state: State, path: str | os.PathLike[str], *, spec: Spec) -> None:
    """Store a state in one file: after it, `load_file(path)` is the state, on the CPU.

    The file appears whole or not at all; one of the same name is replaced. One process calls it.

    Args:
        state: From `calibrate`; an amax of 0 is stored like any other, an uncalibrated one is refused.
        path: The file; its directory exists.
        spec: From `select`.

    Raises:
        KeyError: A group is missing.
        ValueError: The state does not fit the spec; an amax is NaN, infinite or negative; a leaf is a DTensor.
        OSError: The file cannot be written.

    Source: https://github.com/huggingface/safetensors, version 0.5 and later.

    Example:
        >>> import tempfile, torch
        >>> import fq_transforms as fqt
        >>> params = {f"experts.{i}.weight": torch.full((8, 4), i + 1.0) for i in range(2)}
        >>> spec = fqt.select(params, {"*": fqt.FP8})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(fqt.calibrate(params, spec=spec), f"{folder}/amax.safetensors", spec=spec)
        ...     load_file(f"{folder}/amax.safetensors")
        {'experts.*.weight': ExpertAmax(amax=tensor([1., 2.]))}
    """
    leaves = flatten(state)
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(f"state {name!r}: found a DTensor, wanted a plain tensor; save stores DTensors")
    check(state, spec)
    leaves = {name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}
    text = spec.to_json()
    about = {"format": FORMAT, "version": VERSION, "spec": text, "crc32": _crc32(text, leaves)}
    _replace(Path(os.path.realpath(path)), safetensors_torch.save(leaves, about))


def load_file(path: str | os.PathLike[str], *, like: State | None = None, spec: Spec | None = None) -> State:
    """The state in a file of `save_file`, checked: the checksum, the stored spec, every amax.

    Args:
        path: The file.
        like: `fq.init(params)`, meta will do: the structure that is wanted, and the devices (the CPU for meta).
        spec: The spec that is wanted: the same groups, formats, experts and shapes. What neither gives is taken from
            the file.

    Raises:
        ValueError: It is no such file, is truncated or damaged, or is not what is wanted; the message names the file,
            and the group or leaf.
        OSError: The file is not there or cannot be read.

    Example:
        See `save_file`.
    """
    what, (stored, leaves) = f"file {os.fspath(path)!r}", _read(path)
    try:
        if spec is not None:
            check_groups(stored, spec)
            check_no_others(stored, {group.key for group in spec.all_groups})
        state: State = {
            group.key: {name: leaves[f"{group.key}.{name}"] for name in group.leaf_shapes}
            for group in stored.all_groups
        }
        check(state, stored)
        if like is None:
            return state
        check(like, stored, values=False)
        devices = {name: "cpu" if leaf.is_meta else leaf.device for name, leaf in flatten(like).items()}
        return unflatten({name: leaf.to(devices[name]) for name, leaf in leaves.items()}, like)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{what}: {error.args[0]}") from error


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec stored in a file of `save_file`. Raises as `load_file` does."""
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[Spec, dict[str, Tensor]]:
    """The spec and the leaves, as they were written."""
    what, content = f"file {os.fspath(path)!r}", Path(path).read_bytes()
    try:
        leaves = safetensors_torch.load(content)
        about: Any = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{what}: found no safetensors, or it is truncated or damaged: {error}") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(
            f"{what}: found safetensors of format {about.get('format')!r}, version {about.get('version')!r}, wanted "
            f"{FORMAT!r}, version {VERSION!r}, as save_file writes"
        )
    text = about.get("spec", "")
    if about.get("crc32") != _crc32(text, leaves):
        raise ValueError(f"{what}: found bytes that are not those written (crc32): damaged")
    try:
        spec = Spec.from_json(text)
        check_same_leaves("leaves", leaves, STATE.leaves_of(spec))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return spec, leaves


def _crc32(text: str, leaves: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(leaves):
        numbers: Any = leaves[name].contiguous().numpy()
        crc = zlib.crc32(numbers, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _replace(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, after removing what an interrupted save has left."""
    left = re.compile(re.escape(f".{path.name}.saving-") + "[0-9a-f]{32}")
    temporary = path.parent / f".{path.name}.saving-{uuid4().hex}"
    try:
        for entry in [entry for entry in path.parent.iterdir() if left.fullmatch(entry.name)]:
            entry.unlink()
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise named(error, path, f"file {str(path)!r}: {error.strerror}") from error
        raise
