"""Two folders, number by number: what their plain weights differ in, whatever they are stored in."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, isnan, log10, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fq_transforms.export.files.directory import bytes_bar
from fq_transforms.export.files.shards import DTYPES
from fq_transforms.export.files.tables import layers_of
from fq_transforms.export.inspect import is_stack
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.report.report import role_of
from fq_transforms.spec import group_key
from fq_transforms.tables import preformatted, table

__all__ = ["Comparison", "RoleDifference", "compare"]

# Numbers that are compared at a time. In fp64 they stay in a cache: a core compares 0.3 GB of bf16 in a second, and a
# third of that with 2**22.
NUMBERS = 2**16
# Names of a list that are printed.
MOST_NAMES = 5


class RoleDifference(NamedTuple):
    """How the weights of one role differ, in all layers and experts.

    Attributes:
        layers: Numbers of the layers; none for what no layer has.
        weights: How many numbers there are.
        differ: How many of them are not equal; NaN equals NaN, and 0 equals -0.
        signal: Sum of a^2, of those that are finite.
        noise: Sum of (a - b)^2, of those that differ; NaN if one is NaN.
        largest: Largest abs(a - b), likewise.
        where: Name, and expert of a stack, of the weight with the lowest SQNR; empty if none differs.
    """

    layers: tuple[int, ...]
    weights: int
    differ: int
    signal: float
    noise: float
    largest: float
    where: str

    @property
    def sqnr(self) -> float:
        """10 log10(signal / noise) in dB; inf if none differs, NaN if NaN does."""
        return _decibels(self.signal, self.noise)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What two folders differ in. Prints as a table of the roles that differ.

    Attributes:
        a: The folder whose weights are the signal.
        b: The other.
        roles: Name, with `*` for layer and expert, to how they differ, those that are equal too.
        only_a: Names of weights that only `a` has.
        only_b: Names of weights that only `b` has.
        shapes: Names of weights of two shapes, to both.
    """

    a: Path
    b: Path
    roles: dict[str, RoleDifference]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def is_equal(self) -> bool:
        """True if both have the same names, shapes and numbers."""
        return not (self.only_a or self.only_b or self.shapes or any(role.differ for role in self.roles.values()))

    def __repr__(self) -> str:
        differ = sum(role.differ for role in self.roles.values())
        return f"Comparison({str(self.a)!r}, {str(self.b)!r}: {differ:,} numbers differ)"

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def __str__(self) -> str:
        rows = [("role", "layers", "weights", "differ", "largest", "SQNR dB", "lowest in")]
        rows += [
            (
                name,
                layers_of(role.layers),
                f"{role.weights:,}",
                _share(role.differ, role.weights),
                f"{role.largest:.3g}",
                f"{role.sqnr:.2f}",
                role.where,
            )
            for name, role in self.roles.items()
            if role.differ
        ]
        lines = [table(rows, left=(0, 1, 6))] if len(rows) > 1 else []
        for path, names in ((self.a, self.only_a), (self.b, self.only_b)):
            if names:
                lines.append(f"only in {path}: {len(names)} weights: {_some(names)}")
        if self.shapes:
            shown = [f"{name} {a} and {b}" for name, (a, b) in self.shapes.items()]
            lines.append(f"of two shapes: {len(shown)} weights: {_some(shown)}")
        weights, differ = (sum(getattr(role, n) for role in self.roles.values()) for n in ("weights", "differ"))
        equal = len(self.roles) - len(rows) + 1
        lines.append(f"{equal} of {len(self.roles)} roles equal; {differ:,} of {weights:,} numbers differ")
        return "\n".join(lines)


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """What two folders differ in: their plain weights, decoded where they are in codes, one weight at a time.

    Numbers are compared, so bf16 and fp32 of the same numbers are equal. What is no weight is not read: other files,
    config.json, and scales of inputs.

    Args:
        a: A folder as `folder` takes it. Its weights are the signal.
        b: The other.

    Raises:
        ValueError: One of them is no such folder.
        OSError: A file cannot be read.

    Example:
        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as path:
        ...     for name, value in (("a", 1.0), ("b", 1.5)):
        ...         Path(path, name).mkdir()
        ...         _ = Path(path, name, "config.json").write_text("{}")
        ...         save_file({"w": torch.tensor([[value, 2.0]])}, Path(path, name, "model.safetensors"))
        ...     found = compare(f"{path}/a", f"{path}/b").roles["w"]
        >>> found.differ, found.largest, f"{found.sqnr:.2f}"
        (1, 0.5, '13.01')
    """
    with Folder(a) as one, Folder(b) as other, torch.no_grad():
        ours, theirs = one.params(), other.params()
        shapes = {
            name: (tuple(ours[name].shape), tuple(theirs[name].shape))
            for name in ours
            if name in theirs and ours[name].shape != theirs[name].shape
        }
        both = [name for name in ours if name in theirs and name not in shapes]
        roles: dict[str, _Role] = {}
        with bytes_bar(sum(one.size(name) + other.size(name) for name in both), "compare") as bar:
            for name in both:
                role, layer = role_of(group_key(name, ())[0])
                found = roles.setdefault(role, _Role())
                found.layers.update(() if layer is None else (layer,))
                for where, *pair in _pairs(one, other, name, tuple(ours[name].shape)):
                    found.add(where, _difference(*pair))
                bar.update(one.size(name) + other.size(name))
        return Comparison(
            one.path,
            other.path,
            {name: role.done() for name, role in sorted(roles.items())},
            tuple(sorted(ours.keys() - theirs.keys())),
            tuple(sorted(theirs.keys() - ours.keys())),
            shapes,
        )


class _Sums(NamedTuple):
    """Of one weight; as `RoleDifference`."""

    weights: int
    differ: int
    signal: float
    noise: float
    largest: float

    def plus(self, other: "_Sums") -> "_Sums":
        gaps = (self.largest, other.largest)
        return _Sums(
            self.weights + other.weights,
            self.differ + other.differ,
            self.signal + other.signal,
            self.noise + other.noise,
            nan if any(map(isnan, gaps)) else max(gaps),
        )


class _Role:
    """Sums of all weights of a role, and the worst."""

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.sums = _Sums(0, 0, 0.0, 0.0, 0.0)
        self.where, self.lowest = "", inf

    def add(self, where: str, sums: _Sums) -> None:
        self.sums = self.sums.plus(sums)
        sqnr = _decibels(sums.signal, sums.noise)
        if sums.differ and (not self.where or sqnr < self.lowest or isnan(sqnr) > isnan(self.lowest)):
            self.where, self.lowest = where, sqnr

    def done(self) -> RoleDifference:
        return RoleDifference(tuple(sorted(self.layers)), *self.sums, self.where)


def _pairs(one: Folder, other: Folder, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A weight of both, a stack expert by expert."""
    if not is_stack(name, shape):
        yield name, _read(one, name), _read(other, name)
        return
    for expert in range(shape[0]):
        part = slice(expert, expert + 1)
        yield f"{name}[{expert}]", _read(one, name, part), _read(other, name, part)


def _read(folder: Folder, name: str, part: slice | None = None) -> Tensor:
    place = folder.places(name)[0]
    if name in folder.encoded or place.type.dtype in DTYPES:
        return folder.read(name, part)
    # Of a dtype that PyTorch does not have. "c" is for memory that may be written to, as a tensor's may.
    return torch.from_numpy(np.memmap(folder.path / place.file, np.uint8, "c", place.start, (place.size,)))


def _difference(a: Tensor, b: Tensor) -> _Sums:
    """Of two weights of one shape, some numbers at a time."""
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    found = _Sums(0, 0, 0.0, 0.0, 0.0)
    for x, y in zip(a.reshape(-1).split(NUMBERS), b.reshape(-1).split(NUMBERS), strict=True):
        found = found.plus(_of_some(x, y))
    return found


def _of_some(x: Tensor, y: Tensor) -> _Sums:
    """Of two vectors."""
    wide, other = x.double(), y.double()
    gap = wide - other
    signal, noise = float(wide.dot(wide)), float(gap.dot(gap))
    if x.is_floating_point() and isfinite(signal) and isfinite(noise):
        differ = int(gap.count_nonzero())
        return _Sums(len(x), differ, signal, noise, float(torch.linalg.vector_norm(gap, inf)) if differ else 0.0)
    # fp64 does not hold all integers; NaN and infinity are no gap to themselves.
    differ = x != y if x.dtype == y.dtype and not x.is_floating_point() else wide != other
    differ &= ~(wide.isnan() & other.isnan())
    gap = torch.where(differ, gap.abs(), 0.0)
    return _Sums(
        weights=len(x),
        differ=int(differ.sum()),
        signal=float(torch.where(wide.isfinite(), wide, 0.0).square().sum()),
        noise=float(gap.square().sum()),
        largest=float(gap.max()) if len(gap) else 0.0,
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0 or isnan(noise):
        return noise or inf
    return 10 * log10(signal / noise) if signal > 0 and noise < inf else -inf


def _share(count: int, of: int) -> str:
    """A share in per cent, in which what is not zero and not all does not look like it."""
    share = 100 * count / of
    return f"{share:.2f} %" if count == of or 0.01 <= share < 99.995 else "<0.01 %" if share < 0.01 else ">99.99 %"


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
