"""The definition of the sweep over amax, in plain PyTorch; the kernel chooses the same amax, bit for bit.

What is tried of a granule, by a `Search`:

    "ratios"    amax * ratio, in fp32
    "scales"    two-level formats: global_amax * (s / 448), for every E4M3 scale s, 126 of them
    "window"    the 24 of these around the scale of amax, among which the best of all is always found

NOTE window, for blocks of at most 16 weights: let s be the scale of a block's largest weight a, so 6 * s is within a
sixteenth of a. A scale below s / 4 clips a by more than 0.73 * a, and the square of that is more than all 16 errors
under s together. A scale from 2 * s on has, up to a, no value that half of it lacks. So the best is from 16 codes
below that of s to 7 above, where E4M3's codes are 8 to a binade; at its bottom they are coarser, and the window is the
lowest 24. Weighted errors have no such bound.

NOTE units: all is computed on weights divided by a power of two, so that the granule's amax (two-level: the expert's)
is within [1, 2). That changes no significand, and no square overflows or vanishes.

NOTE order: a chunk is at most 16 weights along `in` that share a scale, or a whole block along `in`. Its squared errors
are fp32 and added by pairs: neighbours, then neighbouring sums, and so on. A granule of many chunks adds their errors
as int64 in units of 2**-shift, exactly: in whatever order, the sum is the same.

NOTE margin: max stays unless another's error is smaller by more than a part in 2**16, and by a unit per chunk. The fp32
sum of a chunk is off by less than a part in 2**18, its integer by less than a unit. So the true error falls, too.

NOTE local Hessian: with H [B, B], the second moments of the B inputs of a block along `in`, the block's error is
d^T H d for d = w - fakequant(w). In fp32: p = r * d, then p += H[j] * d[j] for j = 0, 1, ... B - 1, then d * p is added
by pairs. H is symmetric to the bit, and scaled so that the largest number of its diagonal is within [1, 2).

NOTE margin of a form: terms of both signs cancel, so its rounding is no part of it, but of a = sum of |d_i H_ij d_j|:
of each term d twice, H, a product, up to B additions, d * p and log2(B) additions by pairs are rounded, which is less
than m * a for m = max(B, 16) * 2**-23. As H is symmetric, a is at most sum of R_i d_i**2, R_i = sum over j of |H_ij|.
So r = m * R makes of a candidate's error a bound that the true error is not above; r = -m * R, less 2**-120 for what
underflows, makes of max's one that it is not below. The least bound wins if it is below that of max. So the true error
falls, too, and no rounding below zero wins. True errors that are within 2 * m * sum of R_i d_i**2 count as equal. Where
H is diagonal that is a part of the error.

NOTE not swept: a granule whose amax is at most 2**-24 (two-level: the expert's), which INT rounds to zero and FP8 does
not scale, or not finite, keeps its amax, as it does from a candidate that is either.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fq_transforms.formats import E4M3, Format, IntElement
from fq_transforms.ops.quantize.reference import (
    TINY_AMAX,
    dequantize_int,
    in_granules,
    power_of_two,
    quantize_fp8,
    quantize_int,
    quantize_two_level,
    spread,
)

__all__ = [
    "MARGIN",
    "SCALES",
    "UNDERFLOW",
    "WINDOW",
    "WINDOW_COLUMNS",
    "Search",
    "bound_of_form",
    "chunk_of",
    "doubt_of",
    "limit",
    "margin_of",
    "pick",
    "shift_of",
    "sweep_reference",
    "units_of",
]

SCALES = 126  # positive finite values of E4M3, codes 1 to 126
WINDOW = 24
WINDOW_COLUMNS = 16  # the widest block of which it is shown that the window has the best
BELOW = 16  # how many codes under that of max the window begins
MARGIN = 16
CHUNK = 16
UNDERFLOW = 2.0**-120


@dataclass(frozen=True)  # not a tuple: torch.func would look for tensors inside
class Search:
    """What is tried beside the amax itself."""

    kind: Literal["ratios", "scales", "window"]
    ratios: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """How many amax are tried, max among them."""
        return 1 + {"ratios": len(self.ratios), "scales": SCALES, "window": WINDOW}[self.kind]


def sweep_reference(
    weight: Float[Tensor, "out in"],
    amax: Float32[Tensor, "..."],
    global_amax: Float32[Tensor, ""] | None,
    importance: Float32[Tensor, " in"] | Float32[Tensor, "blocks b b"] | None,
    *,
    format: Format,
    search: Search,
) -> Float32[Tensor, "..."]:
    """The amax of each granule of one expert with the least error, of d = w - fakequant(w).

        importance          error of a granule
        None                sum of d_i**2
        h [in]              sum of h_i * d_i**2
        H [in / B, B, B]    d^T H_b d of block b, for formats with blocks of (1, B)

    Args:
        weight: bf16, fp16 or fp32.
        amax: fp32 `format.amax_shape(out, in)`: of `expert_amax_reference`, which is tried first.
        global_amax: fp32, static two-level formats only.
        importance: At least 0 and below 2; H symmetric, as NOTE local Hessian has it.
        format: With a static amax, and no `unit_scale_below`.
        search: What is tried.

    Returns:
        A new tensor like `amax`. Memory: at most twelve fp32 copies of this one weight, however many are tried.

    Source: ModelOpt 0.47 `MseCalibrator`, `NVFP4MSECalibrator`; the order of sums and the margin are this package's.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, amax = torch.tensor([[0.6] * 7 + [-1.0]]), torch.tensor(1.0)
        >>> int4 = Format("INT4", FORMATS["INT4_BLOCK32"].element, (None, None))
        >>> sweep_reference(w, amax, None, None, format=int4, search=Search("ratios", (0.7, 0.84, 0.9)))
        tensor(0.8400)
    """
    unit, ok = units_of(amax if global_amax is None else global_amax)
    x = weight.float() * (spread(unit, weight, format) if global_amax is None else unit)
    global_unit = None if global_amax is None else global_amax * unit

    doubt = doubt_of(importance) if importance is not None and importance.dim() == 3 else None

    def error(tried: Tensor, sign: float = 1.0) -> Tensor:
        d = x - _dequantized(x, tried * unit, global_unit, format)
        if importance is None or doubt is None:
            return _sum_of_squares(d, importance, format)
        return bound_of_form(d, importance, sign * doubt)

    def trials() -> Iterator[tuple[Tensor, Tensor]]:
        if search.kind == "ratios":
            for ratio in search.ratios:
                tried = amax * torch.tensor(ratio, dtype=torch.float32, device=amax.device)
                yield tried, error(tried)
            return
        assert global_amax is not None
        _, _, s8, _ = quantize_two_level(x, amax * unit, global_unit, format)
        lowest = torch.ones_like(s8, dtype=torch.int32)
        if search.kind == "window":
            codes = (s8 * 2.0**-120).view(torch.int32) >> 20
            lowest = (codes - BELOW).clamp(1, SCALES + 1 - WINDOW)
        for k in range(search.count - 1):
            scale = ((lowest + k) << 20).view(torch.float32) * 2.0**120
            scale = scale.clamp(min=format.min_scale)
            tried = global_amax * (scale / torch.full_like(scale, E4M3.max))
            yield tried, error(tried)

    best = limit(error(amax), format, x.shape[-2:]) if doubt is None else error(amax, -1.0) - UNDERFLOW
    return pick(amax, ok, best, trials(), format)


def limit(first: Tensor, format: Format, shape: "torch.Size | tuple[int, ...]") -> Tensor:
    """What another's error must be below, where that of max is `first`; see NOTE margin.

    Errors are fp32, or int64 if granules have many chunks; `shape` is (out, in) of a weight.
    """
    if first.dtype != torch.int64:
        return first * (1 - 2.0**-MARGIN)
    rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
    return first - (first >> MARGIN) - rows * columns // chunk_of(format, shape[-1])


def pick(amax: Tensor, ok: Tensor, best: Tensor, trials: Iterable[tuple[Tensor, Tensor]], format: Format) -> Tensor:
    """The amax with the least error of some tried (amax, error), or the given one if none is below `best`."""
    least = 0.0 if format.scale == "e4m3" else TINY_AMAX
    for tried, error in trials:
        better = ok & (tried > least) & (tried < torch.inf) & (error < best)
        best = torch.where(better, error, best)
        amax = torch.where(better, tried, amax)
    return amax


def units_of(amax: Float32[Tensor, "..."]) -> tuple[Tensor, Tensor]:
    """The power of two that brings an amax into [1, 2), and True where it is to be swept; see NOTE units."""
    ok = (amax > TINY_AMAX) & (amax < torch.inf)
    exponent = (amax.view(torch.int32) >> 23) - 127
    return power_of_two(torch.where(ok, -exponent, 0)), ok


def chunk_of(format: Format, in_features: int) -> int:
    """Weights along `in` whose errors are added in fp32, by pairs: a power of two that divides `in`."""
    if format.has_blocks_along_in:
        return format.block[1] or 1
    return min(CHUNK, format.block[1] or CHUNK, in_features & -in_features)


def shift_of(format: Format, shape: "torch.Size | tuple[int, ...]") -> int:
    """Bits after the point of a granule's int64 error: a weight's is below 8, and that of all must stay below 2**62.

    Example:
        >>> from fq_transforms.formats import FP8
        >>> shift_of(FP8, (1856, 2688))
        36
    """
    rows, columns = (side or extent for side, extent in zip(format.block, shape, strict=True))
    return 62 - 3 - ceil(log2(rows * columns))


def doubt_of(moments: Float32[Tensor, "blocks b b"]) -> Float32[Tensor, "blocks b"]:
    """How far an error may be off, by each d_i**2: m * sum over j of |H_ij|, added in order. See NOTE margin of a form.

    Example:
        >>> doubt_of(torch.eye(16)[None])[0, 0].item() == 2.0**-19
        True
    """
    total = torch.zeros_like(moments[:, 0])
    for row in moments.unbind(1):
        total = total + row.abs()
    return total * margin_of(moments.shape[-1])


def margin_of(columns: int) -> float:
    """The m of NOTE margin of a form, for blocks of so many weights."""
    return max(columns, 16) * 2.0**-23


def _dequantized(x: Tensor, amax: Tensor, global_amax: Tensor | None, format: Format) -> Tensor:
    """What is left of weights in units under an amax."""
    element = format.element
    if format.scale == "e4m3":
        v, s, _, _ = quantize_two_level(x, amax, global_amax, format)
        return (v * s).flatten(-2)
    if isinstance(element, IntElement):
        return dequantize_int(*quantize_int(x, amax, format), format)
    v, r = quantize_fp8(x, amax, format)
    return v * r


def _sum_of_squares(d: Tensor, importance: Tensor | None, format: Format) -> Tensor:
    """Error of each granule, in the shape of its amax: fp32 of a single chunk, int64 of many."""
    error = d * d
    if importance is not None:
        error = error * importance
    chunk = chunk_of(format, d.shape[-1])
    error = _by_pairs(error.unflatten(-1, (-1, chunk)))
    if format.has_blocks_along_in:
        return error
    error = (error * 2.0 ** shift_of(format, d.shape[-2:])).to(torch.int64)
    if format.block == (None, None):
        return error.sum()
    rows, columns = format.block
    return in_granules(error, (rows, None if columns is None else columns // chunk)).sum((-3, -1))


def bound_of_form(d: Tensor, moments: Tensor, doubt: Tensor) -> Tensor:
    """Bound of the error of each block, fp32 [out, in / B]; see NOTE margin of a form."""
    d = d.unflatten(-1, doubt.shape)
    p = d * doubt
    for one, row in zip(d.unbind(-1), moments.unbind(1), strict=True):
        p += row * one[..., None]
    return _by_pairs(d * p)


def _by_pairs(error: Tensor) -> Tensor:
    """Sum along the last dim: neighbours, then neighbouring sums, and so on."""
    while error.shape[-1] > 1:
        error = error[..., 0::2] + error[..., 1::2]
    return error[..., 0]
