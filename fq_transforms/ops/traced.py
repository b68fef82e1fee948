"""What torch.compile sees in place of the Functions: calls that it leaves alone, and that run where its graph runs.

NOTE why: Dynamo traces a Function by rules of its own, which are not torch.func's. Under a compiled transform it kept
the forward and differentiated that, and rounding has a gradient of zero (PyTorch 2.13 and 2.14). A call that it leaves
alone runs later, eagerly or as AOTAutograd traces it, with torch.func's transforms around it: the same Function as in
eager mode, with its rules for grad, jvp and vmap. It is torch.func's Function always, as the levels of forward mode
that a graph enters cannot be asked for. Tensors and constants alone travel in a graph, so a format is its JSON.

NOTE import: to be imported where torch.compile traces, since the decorator imports Dynamo, which takes 0.8 s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fq_transforms.ops.amax.autograd import ExpertAmax
from fq_transforms.ops.amax.autograd import Statics as AmaxStatics
from fq_transforms.ops.launch import format_of
from fq_transforms.ops.quantize.autograd import Backward, FakeQuantize, Statics, pull_back_eager
from fq_transforms.rounding import Stream

__all__ = ["expert_amax_traced", "fake_quantize_traced", "pull_back_traced"]


@torch.compiler.allow_in_graph
def expert_amax_traced(format: str, transposed: bool, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """`expert_amax`; an empty tensor stands for "no global amax"."""
    return ExpertAmax.apply(AmaxStatics(format_of(format), transposed), *weights)


@torch.compiler.allow_in_graph
def fake_quantize_traced(
    format: str,
    transposed: bool,
    out_dtype: torch.dtype,
    backward: Backward,
    separate: bool,
    draws: Sequence[int] | None,
    seed: Tensor | None,
    amax: Tensor | None,
    global_amax: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    """`fake_quantize`; a stream as its numbers, in their order."""
    stream = None if draws is None else Stream(*draws)
    statics = Statics(format_of(format), transposed, out_dtype, backward, separate, stream=stream)
    return FakeQuantize.apply(statics, seed, amax, global_amax, *weights)


@torch.compiler.allow_in_graph
def pull_back_traced(
    format: str,
    transposed: bool,
    backward: Backward,
    amax: Tensor | None,
    global_amax: Tensor | None,
    weights: Sequence[Tensor],
    *grads: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`pull_back`: the gradients of amax, of global amax, and of the weights."""
    of_amax, of_global, pulled = pull_back_eager(
        grads, weights, amax, global_amax, format=format_of(format), transposed=transposed, backward=backward
    )
    return of_amax, of_global, *pulled
