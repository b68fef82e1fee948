"""What torch.compile sees in place of our Functions: calls that it leaves alone, and that run where its graph runs.

    @left_alone
    def fake_quantize_traced(...): ...           # in the operation's autograd.py

    if torch.compiler.is_compiling():
        from fq_transforms.ops import in_graph   # now they are left alone
        return fake_quantize_traced(...)

NOTE why: Dynamo traces a Function by rules of its own, which are not torch.func's. Under a compiled transform it kept
the forward and differentiated that, and rounding has a gradient of zero (PyTorch 2.13 and 2.14). A call that it leaves
alone runs later, eagerly or as AOTAutograd traces it, with torch.func's transforms around it: the same Function as in
eager mode, with its rules for grad, jvp and vmap. It is torch.func's Function always, as the levels of forward mode
that a graph enters cannot be asked for. Tensors and constants alone travel in a graph, so a format is its JSON.
"""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["FUNCTIONS", "left_alone"]

F = TypeVar("F", bound=Callable[..., Any])

# All of them, for `in_graph`.
FUNCTIONS: list[Callable[..., Any]] = []


def left_alone(function: F) -> F:
    """Let torch.compile leave calls of a function alone, once `in_graph` is imported."""
    FUNCTIONS.append(function)
    return function
