"""Stochastic rounding by its definition, in plain PyTorch: Philox, and the formulas of `ops.reference` around it.

NOTE random bits: word column % 4 of Philox 4x32-10 with the key (low, high half of the seed) and the counter
(column // 4, row, expert, group). Each is a place in the whole weight [out, in], so no tiling can change it.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from fq_transforms.formats import FloatElement, Format, IntElement
from fq_transforms.ops.quantize.reference import (
    dequantize_int,
    fp8_scale,
    int_scale,
    power_of_two,
    quantize_mx,
    quantize_two_level,
    spread,
    valid,
)

__all__ = ["philox", "random_words", "stochastic_reference"]

WORD = 0xFFFFFFFF
# Multipliers and what is added to the key each round, as published.
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85

# How far fp32 carries a value of a format through its own scale, relative: three roundings, 3 * 2**-24.
ON_GRID = 2.0**-22


def stochastic_reference(
    weight: Float[Tensor, "*experts out in"],
    amax: Float32[Tensor, "..."] | None,
    global_amax: Float32[Tensor, "*experts"] | None,
    words: Int64[Tensor, "*experts out in"],
    *,
    format: Format,
    out_dtype: torch.dtype,
) -> Float[Tensor, "*experts out in"]:
    """`fake_quantize_reference`, with elements rounded up or down by chance.

        t = abs(v) / spacing, v as there and clamped as there
        n = rint(t);  lower = floor(t);  u = (word // 2**8 + 1) / 2**24, in (0, 1]
        abs(element(v)) = spacing * (n if abs(t - n) <= 2**-22 * t else lower + (t - lower >= u))

    `spacing` is 1 for integers, and that of the element's values around v for floats. The mean over words is abs(v), up
    to 2**-24 of a spacing and to what counts as a value of the format.

    Args:
        weight: bf16, fp16 or fp32; any number of leading expert dimensions.
        amax: As for `fake_quantize_reference`.
        global_amax: Likewise.
        words: 32 random bits a weight, from `random_words`.
        format: The numbers.
        out_dtype: bf16, fp16 or fp32.

    Returns:
        A new contiguous tensor of the weight's shape in `out_dtype`. Zeros, NaN, infinities and signs are as in
        `fake_quantize_reference`.

    Example:
        >>> from fq_transforms.formats import FORMATS
        >>> w, words = torch.tensor([[0.1, 0.1, 1.0, -7.0]]), torch.tensor([[0, 2**32 - 1, 0, 0]])
        >>> stochastic_reference(w, torch.tensor(7.0), None, words, format=FORMATS["INT8"], out_dtype=torch.float32)
        tensor([[ 0.1102,  0.0551,  1.0472, -7.0000]])
    """
    x, u = weight.float(), ((words >> 8) + 1).float() * 2.0**-24
    element = format.element
    if format.scale == "e8m0":
        _, e, finite = quantize_mx(x, format)
        v = _round_float(_blocks(x, format) * power_of_two(-e), _blocks(u, format), element)
        y = torch.where(finite, v * power_of_two(e), torch.nan).flatten(-2)
    elif format.scale == "e4m3":
        _, s, _, _ = quantize_two_level(x, amax, global_amax, format)
        v = _round_float(_blocks(x, format) / torch.where(s == 0, 1.0, s), _blocks(u, format), element)
        y = (v * s).flatten(-2)
    elif isinstance(element, IntElement):
        s = int_scale(spread(valid(amax), x, format), element)
        t = (x * torch.where(s == 0, element.qmax, s)).clamp(element.low, element.high).abs()
        y = dequantize_int(_round_steps(t, u).copysign(x), s)
    else:
        s, r = fp8_scale(spread(valid(amax), x, format), element)
        y = _round_float(x * s, u, element) * r
    return y.to(out_dtype).contiguous()


def random_words(
    seed: Int64[Tensor, "..."],
    expert: Int64[Tensor, " experts"],
    group: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Int64[Tensor, "experts out in"]:
    """32 random bits a weight, for rows and columns first..first + count - 1 of each expert.

    Args:
        seed: One for all experts, or one for each.
        expert: Numbers of the experts.
        group: Number of the group.
        rows: (first, count).
        columns: (first, count).
    """
    device = seed.device
    first, count = columns
    quads = torch.arange(first // 4, (first + count - 1) // 4 + 1, device=device)
    row = torch.arange(rows[0], rows[0] + rows[1], device=device)[:, None]
    key = seed.reshape(-1, 1, 1)
    counter = (quads, row, expert[:, None, None], torch.full((), group, device=device))
    words = torch.stack(philox(counter, (key & WORD, (key >> 32) & WORD)), dim=-1).flatten(-2)
    return words[..., first % 4 : first % 4 + count]


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random words for a counter of four and a key of two; int64 tensors of 32 bits, broadcast.

    Source: Salmon et al. 2011; `tl.philox` of Triton 3.9 gives the same words.

    Example:
        >>> zero = torch.tensor(0)
        >>> [hex(word) for word in philox((zero,) * 4, (zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high(ROUND_B, c2) ^ c1 ^ k0,
            (c2 * ROUND_B) & WORD,
            _high(ROUND_A, c0) ^ c3 ^ k1,
            (c0 * ROUND_A) & WORD,
        )
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return c0, c1, c2, c3


def _high(factor: int, word: Tensor) -> Tensor:
    """The upper word of a product of two words, by halves, since the whole one does not fit into an int64."""
    return (factor * (word >> 16) + (factor * (word & 0xFFFF) >> 16)) >> 16


def _round_steps(t: Tensor, u: Tensor) -> Tensor:
    """An integer beside t >= 0, or that which it is."""
    nearest, lower = t.round(), t.floor()
    return torch.where((t - nearest).abs() <= t * ON_GRID, nearest, lower + (t - lower >= u))


def _round_float(v: Tensor, u: Tensor, element: IntElement | FloatElement) -> Tensor:
    """A value of the element beside v; saturates; keeps NaN and the sign."""
    assert isinstance(element, FloatElement)
    a = v.abs().clamp(max=element.max)
    exponent = ((a.view(torch.int32) >> 23) & 0xFF).clamp(min=element.min_exponent + 127)
    spacing = exponent - element.mantissa_bits
    t = a * ((254 - spacing) << 23).view(torch.float32)
    return (_round_steps(t, u) * (spacing << 23).view(torch.float32)).copysign(v)


def _blocks(x: Tensor, format: Format) -> Tensor:
    columns = format.block[1]
    assert columns is not None
    return x.unflatten(-1, (-1, columns))
