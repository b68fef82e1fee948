"""What became of a folder: a table of formats, weights and bytes, and what was left out."""

from dataclasses import dataclass
from pathlib import Path

from fq_transforms.export.files.tables import size
from fq_transforms.spec import Spec
from fq_transforms.tables import preformatted, table

__all__ = ["Conversion"]


@dataclass(frozen=True, repr=False)
class Conversion:
    """What a folder became, or, of a dry run, would become. Prints as a table.

    Attributes:
        source: The folder that was read.
        destination: The folder that was written.
        spec: What was quantized, and what was not, with why.
        rows: Format to weights, bytes before and bytes after.
        left: Names of tensors that are not in the new folder, and why.
        shards: How many files of tensors it has.
        copied: Files that were copied.
        exact: NVFP4 out of MXFP4: blocks of 16 that stand for the same weights, and all, of those that this run has
            converted; None if there are none.
    """

    source: Path
    destination: Path
    spec: Spec
    rows: dict[str, tuple[int, int, int]]
    left: dict[str, str]
    shards: int
    copied: tuple[str, ...]
    exact: tuple[int, int] | None

    @property
    def before(self) -> int:
        """Bytes of tensors that were read."""
        return sum(before for _, before, _ in self.rows.values())

    @property
    def after(self) -> int:
        """Bytes of tensors that were written."""
        return sum(after for _, _, after in self.rows.values())

    def __repr__(self) -> str:
        return f"Conversion({str(self.destination)!r}: {size(self.before)} to {size(self.after)})"

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def __str__(self) -> str:
        weights = sum(count for count, _, _ in self.rows.values())
        cells = [
            ("format", "weights", "before", "after"),
            *((name, f"{count:,}", size(a), size(b)) for name, (count, a, b) in self.rows.items()),
            ("all", f"{weights:,}", size(self.before), size(self.after)),
        ]
        lines = [table(cells)]
        if self.exact is not None:
            same, count = self.exact
            lines.append(f"MXFP4 to NVFP4: {same:,} of {count:,} blocks exact, {100 * same / count:.2f} %")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            lines.append(f"left out: {len(names)} tensors such as {names[0]!r}, {why}")
        lines.append(f"{_count(self.shards, 'shard')}, {_count(len(self.copied), 'other file')} copied")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
