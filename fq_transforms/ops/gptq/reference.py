"""The definition of GPTQ's inner loop, in plain PyTorch; the kernel equals it bit for bit.

Shape letters: `e` experts, `out` and `in` the weight, `k` the columns of a block, which GPTQ rounds one by one.

NOTE the factor: a Hessian is H = R R^T with R upper triangular, so the error (w - q) H (w - q)^T is the squared length
of (w - q) R, whose j-th number has the errors of columns 0 to j only. Rounding column j, with all before it known, what
is left free makes that number zero, so the best q_j is the one nearest to

    t_j = w_j + sum over i < j of (w_i - q_i) * R_ij / R_jj

This is GPTQ: the published loop takes R_ij from an inverse of H and its Cholesky factor, which gives the same numbers
(Chen et al., arXiv:2507.18553, on GPTQ as Babai's nearest plane). Here nothing is inverted.

NOTE order: within a block the sum is fp32, one product and one addition a column, in the order of the columns. What the
blocks before contribute is a matrix product, in whatever order the library adds.
"""

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.quantize.reference import (
    dequantize_int,
    mx_exponent,
    power_of_two,
    quantize_fp8,
    quantize_int,
    quantize_two_level,
    round_to,
    valid,
)

__all__ = ["block_amax", "gptq_block_reference", "on_grid_of"]


def gptq_block_reference(
    target: Float32[Tensor, "e out k"],
    weight: Float32[Tensor, "e out k"],
    factor: Float32[Tensor, "e k k"],
    amax: Float32[Tensor, "e ..."],
    global_amax: Float32[Tensor, " e"] | None,
    columns: Int64[Tensor, "e k"],
    *,
    format: Format,
) -> Float32[Tensor, "e out k"]:
    """Errors w - q of the columns of a block, each rounded after those before it: see NOTE the factor.

        t = target;  for j in 0..k - 1:  q_j = quantized(t_j);  e_j = w_j - q_j;  t_i += e_j * factor[j, i] for i > j

    Args:
        target: The weight, and what the errors of the blocks before add to it.
        weight: What the errors are counted from.
        factor: R_ij / R_jj within the block, of which what is above the diagonal is read.
        amax: The state's, [E, *amax_shape]; of MX formats `block_amax`.
        global_amax: Of static two-level formats.
        columns: Where each column is in the whole weight, as the order of the columns may not be its own.
        format: A format whose scales are known: any but a dynamic two-level one.

    Returns:
        A new tensor.

    Source: Frantar et al., arXiv:2210.17323, algorithm 1.

    Example:
        >>> from fq_transforms.formats import INT8
        >>> w, factor = torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[1.0, 0.9], [0.0, 1.0]]])
        >>> amax, columns = torch.tensor([127.0]), torch.arange(2)[None]
        >>> w - gptq_block_reference(w, w, factor, amax, None, columns, format=INT8)
        tensor([[[0., 1.]]])
    """
    rest, errors = target.clone(), torch.empty_like(target)
    for j in range(target.shape[-1]):
        # The kernel takes a column out by a sum, which has no negative zero.
        q = _column(rest[..., j] + 0.0, _amax_of(amax, columns[:, j], format, target.shape[-2]), global_amax, format)
        e = errors[..., j] = weight[..., j] - q
        rest[..., j + 1 :] += e[..., None] * factor[:, None, j, j + 1 :]
    return errors


def block_amax(weight: Float32[Tensor, "... out in"], format: Format) -> Float32[Tensor, "... out blocks"]:
    """The amax of each block of an MX format, which its scales come from; NaN and infinity make it NaN.

    Example:
        >>> from fq_transforms.formats import MXFP4
        >>> block_amax(torch.arange(64.0).view(1, 64), MXFP4)
        tensor([[31., 63.]])
    """
    blocks = weight.unflatten(-1, (-1, format.block[1] or 1))
    return valid(blocks.abs().amax(-1))


def on_grid_of(
    weight: Float32[Tensor, "... out in"], x: Float32[Tensor, "... out in"], format: Format
) -> Float32[Tensor, "... out in"]:
    """Rounds x to the nearest under the exponents of an MX format that another weight has.

    Those of x itself may be others: a last bit above the largest value of a block doubles its scale.

    Example:
        >>> from fq_transforms.formats import MXFP4
        >>> weight, x = torch.full((1, 32), 6.0), torch.full((1, 32), 0.5)
        >>> x[0, 0] = 6.0000005
        >>> on_grid_of(weight, x, MXFP4)[0, :2]
        tensor([6.0000, 0.5000])
    """
    assert not isinstance(format.element, IntElement)
    e = mx_exponent(block_amax(weight, format), format).repeat_interleave(format.block[1] or 1, -1)
    return round_to(x * power_of_two(-e), format.element) * power_of_two(e)


def _amax_of(amax: Tensor, column: Tensor, format: Format, out_features: int) -> Tensor:
    """The amax of one column's weights, [E, out or 1]: of column `column[e]` in expert e."""
    if format.block == (None, None):
        return amax[:, None]
    rows, columns = format.block
    at = (column if columns is None else column // columns) * (columns is not None)
    of_rows = amax[torch.arange(len(amax), device=amax.device), :, at]
    return of_rows if rows == 1 else of_rows.repeat_interleave(rows or out_features, 1)[:, :out_features]


@cache
def _of_single_weights(format: Format) -> Format:
    """The same numbers, where each weight comes with an amax of its own."""
    return replace(format, block=(1, 1))


def _column(x: Tensor, amax: Tensor, global_amax: Tensor | None, format: Format) -> Tensor:
    """`fake_quantize_reference` of a column [E, out], in fp32, under an amax for each weight."""
    element = format.element
    if format.scale == "e8m0":
        assert not isinstance(element, IntElement)
        e = mx_exponent(amax.expand(x.shape), format)
        return round_to(x * power_of_two(-e), element) * power_of_two(e)
    x, amax, single = x[..., None], amax.expand(x.shape)[..., None], _of_single_weights(format)
    if format.scale == "e4m3":
        v, s, _, _ = quantize_two_level(x, amax, global_amax, single)
        return (v * s)[..., 0, 0]
    if isinstance(element, IntElement):
        return dequantize_int(*quantize_int(x, valid(amax), single), single)[..., 0]
    v, r = quantize_fp8(x, valid(amax), single)
    return (v * r)[..., 0]
