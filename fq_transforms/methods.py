"""How calibration chooses an amax: `Max`, `Percentile`, `Mse`, `FourOverSix`, for `transform(spec, method=)`.

A method is numbers only, frozen and hashable, and works on each granule (`Format.block`) of each expert by itself:

    method             amax of a granule                                         formats
    Max                the largest abs(w)                                        all
    Percentile(p)      the p-th percentile of abs(w)                             all with a static amax
    Mse                of several, the one with the least squared error          all with a static amax
    FourOverSix        the largest abs(w), or 1.5 times it                       static two-level, as NVFP4_STATIC

Formats without a static amax take their scales from the weights at each call, so there is nothing to choose: MX
formats have no state, and dynamic NVFP4 has only an expert's global amax. They are refused, and NVFP4_STATIC is the
format for NVFP4 weights whose scales are chosen. Its global amax is that of `Max` under `Percentile` and `Mse`.
More: docs/calibration.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fq_transforms.formats import Format

__all__ = ["MAX", "FourOverSix", "Max", "Method", "Mse", "Percentile", "check_format"]

MOST_RATIOS = 4096


@dataclass(frozen=True)
class Max:
    """The largest abs(w): nothing is clipped.

    Source: ModelOpt 0.47 `MaxCalibrator`.
    """


@dataclass(frozen=True)
class Percentile:
    """The percentile of abs(w) in each granule: sorted, at position p / 100 * (n - 1), linear between neighbours.

    Exact, not from a histogram; the interpolation is in float64 and rounded once to fp32. It equals
    `torch.quantile(abs(w), p / 100)` of float64. 100 is `Max`. The global_amax of NVFP4_STATIC stays the largest
    magnitude of the expert. On a GPU nothing is sorted: the kernels of `fq_transforms.ops.percentile` count bits.

    Attributes:
        percentile: Within (0, 100].

    Raises:
        ValueError: It is not.

    Example:
        >>> Percentile(99.9)
        Percentile(percentile=99.9)
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not _is_number(self.percentile) or not 0 < self.percentile <= 100:  # False for NaN
            raise ValueError(f"percentile: found {self.percentile!r}, wanted a number within (0, 100]")


@dataclass(frozen=True)
class Mse:
    """Of several amax, the one under which the granule's squared error is the least: sum of (w - fakequant(w))**2.

    Tried are ratio * max(abs(w)), for ratios evenly spaced from `start` to `stop`, as many as ModelOpt takes for a
    `step`: ceil((stop - start) / step) + 1. For NVFP4_STATIC all scales that E4M3 has are tried in their place, and the
    three numbers are not used.

    Max itself is always tried. It stays unless another amax lowers the error by more than the sum may be off by, a part
    in 2**16 (see `fq_transforms.ops.sweep.reference`), so the error is never larger than max's. Of equals the first
    wins. Errors are those of results in fp32; a bf16 or fp16 result is rounded once more. With
    `calibrate(..., statistics=)` each squared error is weighted by its input channel's mean square, or, in formats with
    blocks along `in`, a block's errors d by all its inputs' second moments H, as d^T H d: the error of the outputs, but
    for correlations between blocks. Both are from `Transform.input_second_moments`.

    ModelOpt's defaults are (0.25, 4.0, 0.1); here ratios are twice as close, and few are above 1, where integers only
    lose resolution. A granule of many weights with one far outlier may want a smaller `start`.

    Attributes:
        start: The smallest ratio, above 0.
        stop: The largest.
        step: About how far they are apart.

    Raises:
        ValueError: The sweep is empty or has more than 4096 ratios; a number is not positive and finite.

    Source: ModelOpt 0.47 `MseCalibrator`, `NVFP4MSECalibrator` for the sweep over scales, `local_hessian_calibrate`.

    Example:
        >>> Mse(0.5, 1.0, 0.25).ratios
        (0.5, 0.75, 1.0)
    """

    start: float = 0.25
    stop: float = 1.25
    step: float = 0.05

    def __post_init__(self) -> None:
        for name in ("start", "stop", "step"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"Mse: found {name}={value!r}, wanted a finite number above 0")
        if self.start > self.stop:
            raise ValueError(f"Mse: found an empty sweep from {self.start} to {self.stop}, wanted start <= stop")
        if self._count > MOST_RATIOS:
            raise ValueError(
                f"Mse: found a sweep of {self._count} ratios, from {self.start} to {self.stop} by {self.step}, wanted "
                f"at most {MOST_RATIOS}"
            )

    @property
    def _count(self) -> int:
        return math.ceil((self.stop - self.start) / self.step) + 1

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios, as fp32 has them."""
        found: list[float] = torch.linspace(
            self.start, self.stop, self._count, dtype=torch.float32, device="cpu"
        ).tolist()
        return tuple(found)


@dataclass(frozen=True)
class FourOverSix:
    """Static two-level formats, as NVFP4_STATIC: the largest weight of a block becomes 6, or 4 if that has less error.

    E2M1 has nothing between 4 and 6, so a block whose large weights lie there may do better on the finer steps below 4.
    A block that prefers 4 has an amax of 1.5 times its largest weight in the state; all else works as without. Equal
    errors, to a part in 2**16, choose 6.

    Attributes:
        e4m3_max: The scale of an expert's largest block, if it chooses 6. With 256 this block can choose 4 as well, for
            which E4M3 needs 384; the expert's global amax in the state is 448 / 256 = 1.75 times its largest weight.
            With 448 the global amax is that of `Max`, so that the error is never larger than under `Max`, and blocks
            within a third of the expert's largest weight can hardly choose 4.

    Raises:
        ValueError: `e4m3_max` is neither.

    Source: Cook et al., "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling",
    arXiv:2512.02010; ModelOpt 0.47 `NVFP4_FOUR_OVER_SIX_CFG` (256, and multipliers 1 and 1.5 of an mse sweep).

    Example:
        >>> FourOverSix()
        FourOverSix(e4m3_max=256)
    """

    e4m3_max: int = 256

    def __post_init__(self) -> None:
        if self.e4m3_max not in (256, 448):
            raise ValueError(f"FourOverSix: found e4m3_max={self.e4m3_max!r}, wanted 256 or 448")


Method: TypeAlias = Max | Percentile | Mse | FourOverSix

MAX = Max()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_format(method: Method, format: Format, key: str) -> None:
    """Raise ValueError unless the method can choose an amax for the format of group `key`.

    Example:
        >>> from fq_transforms.formats import MXFP4
        >>> check_format(Mse(), MXFP4, "w")
        Traceback (most recent call last):
        ...
        ValueError: method Mse: found MXFP4 for group 'w', wanted a format with a static amax; it has no state
    """
    name = type(method).__name__
    if isinstance(method, Max):
        return
    if format.dynamic:
        why = (
            "it has no state"
            if format.is_stateless
            else "its blocks follow the weights at each call; NVFP4_STATIC keeps what is chosen"
        )
        raise ValueError(
            f"method {name}: found {format.name} for group {key!r}, wanted a format with a static amax; {why}"
        )
    if isinstance(method, FourOverSix) and format.scale != "e4m3":
        raise ValueError(
            f"method {name}: found {format.name} for group {key!r}, wanted a static two-level format, such as "
            "NVFP4_STATIC"
        )
    if format.unit_scale_below:
        raise ValueError(
            f"method {name}: found {format.name} with unit_scale_below={format.unit_scale_below} for group {key!r}, "
            "wanted a format whose scales are all stored"
        )
