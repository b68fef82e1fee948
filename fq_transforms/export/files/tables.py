"""Sizes and numbers of layers that can be read: what tables of folders are made of."""

from collections.abc import Iterable

from fq_transforms.spec import ranges

__all__ = ["layers_of", "size"]

# Characters of a list of layers; of a longer one its ends are shown.
MOST_LAYERS = 16


def size(count: int) -> str:
    """Bytes in the largest unit of which there is one.

    Example:
        >>> size(1_500_000_000), size(12)
        ('1.50 GB', '12 B')
    """
    for unit, value in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= value:
            return f"{count / value:.2f} {unit}"
    return f"{count} B"


def layers_of(numbers: Iterable[int]) -> str:
    """Numbers of layers, short.

    Example:
        >>> layers_of(range(61)), layers_of(range(0, 48, 2)), layers_of([])
        ('0-60', '24 of 0-46', '-')
    """
    numbers = sorted(numbers)
    text = ranges(numbers) or "-"
    return text if len(text) <= MOST_LAYERS else f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
