"""Block scales in the order that tensor cores read them, and back. Only for a GEMM: state and files are never so."""

from torch import Tensor

__all__ = ["deinterleave", "interleave"]

ROWS, COLUMNS = 128, 4  # of a tile


def interleave(scale: Tensor) -> Tensor:
    """Scales [E, out, in/block] in tiles of 128 x 4, each in the order of Blackwell's block-scaled matrix products.

    Within a tile the scale of row r and column c is at 16 * (r % 32) + 4 * (r // 32) + c. Edges are filled with zeros.

    Args:
        scale: NVFP4's (E4M3) or MX's (E8M0 as uint8) block scales, [..., out, in/block].

    Returns:
        A new tensor [..., rows of tiles, columns of tiles, 512] of the same dtype.

    Source: the cuBLAS documentation, "1D block scaling factors layout".

    Example:
        >>> import torch
        >>> interleave(torch.arange(128 * 4, dtype=torch.int16).view(128, 4).to(torch.uint8)).shape
        torch.Size([1, 1, 512])
    """
    out, columns = scale.shape[-2:]
    padded = scale.new_zeros((*scale.shape[:-2], -(-out // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS))
    padded[..., :out, :columns] = scale
    tiles = padded.unflatten(-1, (-1, COLUMNS)).unflatten(-3, (-1, 4, 32))  # [..., tile, 4, 32, tile, 4]
    return tiles.movedim((-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1)).flatten(-3)


def deinterleave(scale: Tensor, out: int, columns: int) -> Tensor:
    """The inverse of `interleave`, without its padding.

    Args:
        scale: [..., rows of tiles, columns of tiles, 512].
        out: Rows of the scales.
        columns: Columns of the scales, in/block.

    Raises:
        ValueError: The tiles are not those of [out, columns].

    Example:
        >>> import torch
        >>> scale = torch.randint(0, 255, (2, 130, 6), dtype=torch.uint8)
        >>> torch.equal(deinterleave(interleave(scale), 130, 6), scale)
        True
    """
    wanted = (-(-out // ROWS), -(-columns // COLUMNS), ROWS * COLUMNS)
    if tuple(scale.shape[-3:]) != wanted:
        raise ValueError(f"scale: found tiles {tuple(scale.shape[-3:])}, wanted {wanted} for [{out}, {columns}]")
    tiles = scale.unflatten(-1, (32, 4, COLUMNS)).movedim((-5, -4, -3, -2, -1), (-5, -2, -3, -4, -1))
    return tiles.flatten(-2).flatten(-4, -2)[..., :out, :columns].contiguous()
