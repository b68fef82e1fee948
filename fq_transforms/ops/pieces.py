"""Large matrices in pieces, where a CPU runs the references: some rows at a time, whose temporaries stay in its caches.

A reference makes a dozen tensors as large as its weights. Of a whole matrix they take memory, and the time to write
them there and to read them back. All is elementwise but for what granules share, so whole granules give the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from fq_transforms.formats import Format
from fq_transforms.ops.launch import is_traced

__all__ = ["Cut", "is_cut", "pieces_of"]

# Of a piece. Measured on a Xeon with 2 MB of cache per core: of 2**16 calls cost as much as the arithmetic; of 2**18
# temporaries go back to the system each time, and half of the time is page faults.
WEIGHTS = 2**17


class Cut(NamedTuple):
    """A piece: some rows of an expert, or all of some small experts.

    Attributes:
        experts: Of all.
        rows: Of `out`: whole granules.
        granules: The same, counted in rows of granules.
    """

    experts: slice
    rows: slice
    granules: slice

    def of(self, weights: Tensor) -> Tensor:
        """Its part of [E, out, ...]."""
        return weights[self.experts, self.rows]

    def of_leaf(self, leaf: Tensor) -> Tensor:
        """Its part of a leaf, [E] or [E, rows of granules, columns]."""
        return leaf[self.experts] if leaf.dim() == 1 else leaf[self.experts, self.granules]


def pieces_of(weights: Tensor, format: Format) -> Iterator[Cut]:
    """The pieces of [E, out, in]."""
    experts, out_features, in_features = weights.shape
    side = format.block[0] or 1
    rows = max(1, WEIGHTS // max(1, in_features * side)) * side
    some = max(1, WEIGHTS // max(1, in_features * out_features))
    for expert in range(0, experts, some):
        for row in range(0, out_features, rows):
            granules = slice(row // side, (row + rows) // side)
            yield Cut(slice(expert, expert + some), slice(row, row + rows), granules)


def is_cut(weights: Sequence[Tensor]) -> bool:
    """True where pieces pay: not in a graph, which would hold the operations of each."""
    return weights[0].is_cpu and not is_traced(weights)
