"""One file to share: the state of one process as safetensors, its Spec in the metadata. Nothing in it can be code.

    checkpoint.save_file("amax.safetensors", fq, state)
    state = checkpoint.load_file("amax.safetensors", fq)

Any reader of safetensors finds each leaf under its flat name, `{group key}.{leaf name}`. The metadata holds

    format  "fq_transforms"        version  "1"
    spec    `Spec.to_json()`       crc32    of the spec, and of each leaf's name and bytes, sorted by name
"""

import os
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fq_transforms.checkpoint.manifest import STATE, check_groups, check_no_others
from fq_transforms.checkpoint.storage import crc32_of, local_path, open_regular, replace_file
from fq_transforms.checks import check_same_leaves
from fq_transforms.dtensor import is_sharded
from fq_transforms.parse import MOST_TEXT, check_text, parse_json, read_fields, shown
from fq_transforms.spec import Spec
from fq_transforms.state import State, flatten, unflatten
from fq_transforms.transform import Transform

__all__ = ["load_file", "read_spec", "save_file"]

FORMAT, VERSION = "fq_transforms", "1"

# What leaves can be, by the names that safetensors has for it.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_file(path: str | os.PathLike[str], fq: Transform, state: State) -> None:
    """Store a state in one file: after it, `load_file(path, fq)` is the state, on the CPU.

    The file appears whole or not at all; one of the same name is replaced. One process calls it.

    Args:
        path: The file; its directory exists.
        fq: Its spec is stored too.
        state: From `calibrate`; an amax of 0 is stored like any other, an uncalibrated one is refused.

    Raises:
        KeyError: A group is missing.
        ValueError: The state does not fit the spec; an amax is NaN, infinite or negative; a leaf is a DTensor.
        OSError: The file cannot be written.

    Source: https://github.com/huggingface/safetensors, version 0.5 and later.

    Example:
        >>> import tempfile, torch, fq_transforms as fqt
        >>> params = {f"experts.{i}.weight": torch.full((8, 4), i + 1.0) for i in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(f"{folder}/amax.safetensors", fq, fq.calibrate(params))
        ...     load_file(f"{folder}/amax.safetensors", fq)
        {'experts.*.weight': {'amax': tensor([1., 2.])}}
    """
    leaves = flatten(state)
    for name, leaf in leaves.items():
        if is_sharded(leaf):
            raise ValueError(f"state {name!r}: found a DTensor, wanted a plain tensor; save stores DTensors")
    STATE.check(state, fq.spec)
    leaves = {name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}
    text = fq.spec.to_json()
    about = {"format": FORMAT, "version": VERSION, "spec": text, "crc32": _checksum(text, leaves)}
    replace_file(local_path(path), to_safetensors(leaves, about))


def load_file(path: str | os.PathLike[str], fq: Transform, *, like: State | None = None) -> State:
    """The state in a file of `save_file`, checked: the checksum, the stored spec, every amax.

    Args:
        path: The file.
        fq: Its groups, formats, experts and shapes must be those stored. For a file of which nothing else is known it
            is `transform(read_spec(path))`.
        like: `fq.init(params)`, or another state whose devices are wanted; the CPU if None or on meta.

    Raises:
        ValueError: It is no such file, a directory, truncated or damaged, or is not what is wanted; the message names
            the file, and the group or leaf.
        OSError: The file is not there or cannot be read.

    Example: See `save_file`.
    """
    what, (_, leaves) = f"file {os.fspath(path)!r}", _read(path, fq.spec)
    try:
        state: State = {
            group.key: {name: leaves[f"{group.key}.{name}"] for name in group.leaf_shapes}
            for group in fq.spec.all_groups
        }
        STATE.check(state, fq.spec)
        if like is None:
            return state
        STATE.check(like, fq.spec, values=False)
        devices = {name: "cpu" if leaf.is_meta else leaf.device for name, leaf in flatten(like).items()}
        return unflatten({name: leaf.to(devices[name]) for name, leaf in leaves.items()}, like)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{what}: {error.args[0]}") from error


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec stored in a file of `save_file`. Raises as `load_file` does."""
    return _read(path)[0]


def _read(path: str | os.PathLike[str], wanted: Spec | None = None) -> tuple[Spec, dict[str, Tensor]]:
    """The spec, which has the groups of the wanted one, and the leaves, as they were written.

    Nothing is read but the spec and what its leaves take.
    """
    what, file = f"file {os.fspath(path)!r}", local_path(path)
    if file.is_dir():
        raise ValueError(
            f"{what}: found a directory, wanted a file of save_file; what save wrote there is read by "
            "checkpoint.load(path, fq, like=fq.init(params))"
        )
    try:
        with open_regular(file) as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            entries, about = _parsed(text := stream.read(min(length, MOST_TEXT)))
            spec = Spec.from_json(check_text(about.get("spec")))
            if wanted is not None:
                check_groups(spec, wanted)
                check_no_others(spec, {group.key for group in wanted.all_groups})
            types = STATE.leaves_of(spec)
            check_same_leaves("leaves", {name: _on_meta(name, entry) for name, entry in entries.items()}, types)
            nbytes = sum(prod(shape) * dtype.itemsize for shape, dtype in types.values())
            if nbytes > os.fstat(stream.fileno()).st_size:
                raise ValueError(f"found no {nbytes} bytes of leaves, as its spec has: truncated or damaged")
            leaves = from_safetensors(start + text + stream.read(nbytes + 1))
        if about.get("crc32") != _checksum(about["spec"], leaves):
            raise ValueError("found bytes that are not those written (crc32): damaged")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    return spec, leaves


def _parsed(header: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the header of safetensors, and its metadata, which say that `save_file` wrote it."""
    try:
        entries = parse_json(header.decode())
    except ValueError as error:
        raise ValueError(f"found no safetensors, or it is truncated or damaged: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"found {shown(entries)} for a header, wanted safetensors")
    about: Any = entries.pop("__metadata__", {})
    found = (about.get("format"), about.get("version")) if isinstance(about, dict) else (about, None)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"found safetensors of format {shown(found[0])}, version {shown(found[1])}, wanted {FORMAT!r}, version "
            f"{VERSION!r}, as save_file writes"
        )
    return entries, about


def _on_meta(name: str, entry: Any) -> Tensor:
    fields = read_fields(
        entry, f"entry {shown(name)}", {"dtype": "text", "shape": "a list of counts", "data_offsets": "two counts"}
    )
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"leaf {shown(name)}: found {shown(fields['dtype'])}, wanted one of {list(DTYPES)}")
    if prod(max(1, size) for size in fields["shape"]) >= 2**48:
        raise ValueError(f"leaf {shown(name)}: found shape {shown(fields['shape'])}, which no memory holds")
    return torch.empty(fields["shape"], dtype=DTYPES[fields["dtype"]], device="meta")


def _checksum(text: str, leaves: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(leaves):
        crc = crc32_of(leaves[name], zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
