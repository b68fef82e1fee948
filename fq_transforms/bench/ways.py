"""What the benchmark of steps trains, two layers of Transformer Engine, and the ways to train them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

import fq_transforms as fqt
from fq_transforms.bench.cases import check_same
from fq_transforms.state import State

__all__ = ["GroupedMLP", "Training", "Way"]


class GroupedMLP(Module):
    """Two GroupedLinears without bias, bf16; `forward` takes [experts * tokens, hidden], as many tokens per expert."""

    def __init__(self, experts: int, hidden: int, ffn: int, tokens: int) -> None:
        super().__init__()
        from transformer_engine.pytorch import GroupedLinear  # pyright: ignore[reportMissingImports]

        options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
        self.linear_fc1: Module = GroupedLinear(experts, hidden, ffn, **options)
        self.linear_fc2: Module = GroupedLinear(experts, ffn, hidden, **options)
        self.splits = [tokens] * experts

    def forward(self, x: Tensor) -> Tensor:
        """[experts * tokens, hidden] to the same."""
        return self.linear_fc2(torch.relu(self.linear_fc1(x, self.splits)), self.splits)


class Way(NamedTuple):
    """What a step does around the optimizer: get weights out of the masters, and gradients into them."""

    write: Callable[[], object]
    grads: Callable[[], object]


class Training:
    """A bf16 model, its fp32 masters and their optimizer, and the microbatches of a step; all ways share them.

    The rate is 0: as much is computed, and every step has the numbers that were checked before the first.
    """

    def __init__(self, model: Module, xs: Sequence[Tensor]) -> None:
        self.model, self.xs = model, list(xs)
        self.grad = torch.randn_like(self.xs[0])
        self.params = dict(model.named_parameters())
        self.masters = fqt.masters(self.params)
        with torch.no_grad():  # each expert has an amax of its own, and masters are no bf16 numbers
            for number, master in enumerate(self.masters.values()):
                master.mul_(1.001 * 2.0 ** (number % 4 - 2))
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, fused=True)
        self.in_a_row = 1
        self.between: Callable[[], None] = lambda: None  # of two microbatches

    def step(self, way: Way) -> None:
        """An optimizer step, whose weights were written before; or some in a row."""
        for _ in range(self.in_a_row):
            way.grads()
            self.optimizer.step()
            self.optimizer.zero_grad()
            way.write()

    def loss(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of one microbatch, whose own gradient is asked for too."""
        return _Given.apply(forward(x.detach().requires_grad_()), self.grad)

    def backward(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of all microbatches."""
        for number, x in enumerate(self.xs):
            if number:
                self.between()
            self.loss(forward, x).backward()

    def take(self, weights: Sequence[Tensor]) -> None:
        """Move gradients from bf16 weights to the masters, without a quantizer."""
        found: list[Any] = [weight.grad for weight in weights]
        grads = [torch.empty_like(master) for master in self.masters.values()]
        torch._foreach_copy_(grads, found)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        for weight, master, grad in zip(weights, self.masters.values(), grads, strict=True):
            weight.grad, master.grad = None, grad

    def bf16(self, model: Module | None = None) -> Way:
        """Without fake quantization of ours: of the model, or of another with its parameters."""
        trained = model or self.model
        params = dict[str, Tensor](trained.named_parameters())
        weights, sources = [params[name] for name in self.masters], list(self.masters.values())

        @torch.no_grad()
        def write() -> None:
            torch._foreach_copy_(weights, sources)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

        def grads() -> None:
            self.backward(trained)
            self.take(weights)

        return Way(write, grads)

    def lens(self, fq: fqt.Transform, state: State) -> Way:
        """The two halves of `fq` around the optimizer, and an ordinary bf16 model."""

        def grads() -> None:
            self.backward(self.model)
            fq.take_grads(self.params, self.masters, state)

        return Way(lambda: fq.fakequant(self.masters, state, out=self.params), grads)

    def value_and_grad(self, fq: fqt.Transform, state: State) -> Way:
        """One `fakequant` of the masters, put into the model for all microbatches; its own parameters are not used."""
        of_step = fqt.value_and_grad(self.loss, replace(fq, out_dtype=torch.bfloat16), self.model)

        def grads() -> None:
            _, found = of_step(self.masters, state, self.xs)
            for name, master in self.masters.items():
                master.grad = found[name]

        return Way(lambda: None, grads)

    def layerwise(self, fq: fqt.Transform, state: State) -> Way:
        """Bf16's own casts; fake weights of what was cast are made for each layer, at every microbatch, twice."""

        def grads() -> None:
            with fqt.layerwise(fq, self.model, state):
                self.backward(self.model)
            self.take(list(self.params.values()))

        return Way(self.bf16().write, grads)

    def check(self, way: Way, weights: Mapping[str, Tensor], what: str) -> None:
        """Raise SystemExit unless a way's gradients are those of an ordinary model with these weights, bit for bit."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.backward(partial(functional_call, self.model, leaves))
        way.write()
        way.grads()
        for name, master in self.masters.items():
            found, wanted = master.grad, leaves[name].grad
            assert found is not None
            assert wanted is not None
            check_same(found, wanted.float(), f"gradient of {name}, {what}")
        self.optimizer.zero_grad()


class _Given(torch.autograd.Function):
    """A loss that costs nothing: zero, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.grad, None
