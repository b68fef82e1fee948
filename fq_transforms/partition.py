"""Where a part of a leaf lies in the whole leaf, derived from where its weights' part lies in the whole weights.

A leaf is one of a state (`amax`, `global_amax`) or of packed weights (`codes`, `scale`, `global_scale`).

Arithmetic on offsets only: what a DTensor, Megatron's ShardedTensor and a slice of a file have in common. The weights
are the experts of a group, [E, out, in]. A dim that the leaf has keeps the offset and size, divided by the block. A dim
that the leaf collapses leaves copies, each the maximum over one part only, until they are synchronized.
"""

from fractions import Fraction
from typing import NamedTuple

from fq_transforms.formats import Format, code_bits

__all__ = ["Part", "blocks_of", "collapsed_dims", "leaf_part"]

DIMS = ("expert", "out", "in")


class Part(NamedTuple):
    """A box in a tensor: the shape of the whole, where the box begins, and its own shape.

    Example:
        >>> Part((8, 4), (2, 0), (2, 4)).is_whole
        False
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """True if the box is the tensor."""
        return self.shape == self.whole


def collapsed_dims(format: Format, leaf: str) -> tuple[int, ...]:
    """Dims of [E, out, in] over which a leaf is a maximum: a part of such a dim gives a part of the maximum only.

    Example:
        >>> from fq_transforms.formats import FP8, INT8_PER_CHANNEL, NVFP4_STATIC
        >>> collapsed_dims(FP8, "amax"), collapsed_dims(INT8_PER_CHANNEL, "amax"), collapsed_dims(NVFP4_STATIC, "amax")
        ((1, 2), (2,), ())
    """
    rows, columns = _granule(format, leaf)
    return tuple(dim for dim, size in ((1, rows), (2, columns)) if size is None)


def leaf_part(weight: Part, format: Format, leaf: str, name: str) -> Part:
    """The part of a leaf that belongs to a part of the weights.

    Args:
        weight: Part of [E, out, in].
        format: The group's.
        leaf: Its name, in a state or in packed weights.
        name: The parameter's, for the message.

    Raises:
        ValueError: The part begins or ends within a block, or within what codes share a byte.

    Example:
        >>> from fq_transforms.formats import INT4_BLOCK32
        >>> leaf_part(Part((8, 64, 128), (4, 0, 64), (4, 64, 64)), INT4_BLOCK32, "amax", "experts.*.weight")
        Part(whole=(8, 64, 4), offset=(4, 0, 2), shape=(4, 64, 2))
    """
    granule = _granule(format, leaf)
    _check_uncut(weight, format, leaf, name)
    parts = [(weight.whole[0], weight.offset[0], weight.shape[0])]
    if granule != (None, None):
        for dim, size in zip((1, 2), granule, strict=True):
            whole, offset, extent = weight.whole[dim], weight.offset[dim], weight.shape[dim]
            parts.append((1, 0, 1) if size is None else (-(-whole // size), -(-offset // size), -(-extent // size)))
    whole, offset, shape = zip(*parts, strict=True)
    return Part(whole, offset, shape)


def blocks_of(format: Format, leaf: str) -> tuple[tuple[int, int], ...]:
    """(dim of [E, out, in], size) of what no part of the weights may cut: blocks, and codes that share bytes.

    Example:
        >>> from fq_transforms.formats import INT8, MXFP6_E2M3
        >>> blocks_of(MXFP6_E2M3, "scale"), blocks_of(MXFP6_E2M3, "codes"), blocks_of(INT8, "codes")
        (((2, 32),), ((2, 32), (2, 4)), ())
    """
    granules = [format.block, _granule(format, leaf)] if leaf == "codes" else [format.block]
    sides = [(dim, side) for granule in granules for dim, side in zip((1, 2), granule, strict=True)]
    return tuple((dim, side.numerator) for dim, side in sides if side is not None and side != 1)


def _granule(format: Format, leaf: str) -> tuple[int | None, int | Fraction | None]:
    """(rows, columns) of weights that one number of a leaf stands for; None is the whole extent."""
    if leaf == "codes":
        return 1, Fraction(8, code_bits(format))
    if leaf in ("global_amax", "global_scale") or (leaf == "amax" and format.dynamic):
        return None, None
    return format.block


def _check_uncut(weight: Part, format: Format, leaf: str, name: str) -> None:
    """Raise ValueError unless the part begins and ends between blocks, those of dynamic formats too, or is empty."""
    if 0 in weight.shape:
        return
    for dim, size in blocks_of(format, leaf):
        whole, start = weight.whole[dim], weight.offset[dim]
        end = start + weight.shape[dim]
        if start % size or (end % size and end != whole):
            raise ValueError(
                f"parameter {name!r}: found a shard of `{DIMS[dim]}` (dim {dim} of [E, out, in]) that holds "
                f"{start}..{end} of {whole} and cuts a block of {size} of {format.name}, wanted multiples of {size}; "
                "split it elsewhere, or choose another format"
            )
