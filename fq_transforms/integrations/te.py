"""Transformer Engine: its modules take fake-quantized weights as they are, but not under its own quantization.

GroupedLinear and Megatron's wrappers of it read `weight0..N-1` when they run, so `functional_call` and `layerwise`
work on them: forward, input and weight gradients, and gradient accumulation fused into `main_grad`. Under an active
autocast Transformer Engine would quantize the fake-quantized weights once more: here that is an error.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn import Module

import fq_transforms as fqt
from fq_transforms.in_use import InUse
from fq_transforms.state import State

__all__ = ["functional_call", "is_te", "layerwise", "refuse_autocast"]


def is_te(module: Module) -> bool:
    """True for Transformer Engine's modules and operations, and what derives from them."""
    return any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)


def refuse_autocast(module: Module) -> None:
    """Raise ValueError if Transformer Engine would quantize what this module computes.

    Source: Transformer Engine 2.20.2 `FP8GlobalStateManager.is_fp8_enabled`, for all recipes, NVFP4 too.
    """
    if not is_te(module):
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # pyright: ignore[reportMissingImports]

    is_quantized = FP8GlobalStateManager.is_fp8_enabled()
    # Megatron's layers may have a recipe of their own, and enter its autocast, or leave it, within forward.
    ask = getattr(module, "will_execute_quantized", None)
    if ask(is_quantized) if ask else is_quantized:
        recipe = type(FP8GlobalStateManager.get_fp8_recipe()).__name__
        raise ValueError(
            f"layer {type(module).__name__} {getattr(module, 'name', None)!r}: found Transformer Engine's autocast, "
            f"{recipe}, which quantizes weights itself, wanted none around fake-quantized weights; leave the autocast, "
            "or the layer out of the spec"
        )


def _refuse(module: Module, args: Any) -> None:
    refuse_autocast(module)


def functional_call(
    model: Module, weights: Mapping[str, Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """`torch.func.functional_call`, which raises if a layer whose weights are replaced runs under an autocast.

    Args:
        model: Of Transformer Engine's modules, or with some below it.
        weights: From `fakequant`. Entries that are the model's own parameters are not replaced.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        ValueError: Transformer Engine's autocast is active in such a layer; the message names its type.
    """
    replaced = {
        name.rpartition(".")[0] for name, param in model.named_parameters() if weights.get(name, param) is not param
    }
    use = InUse("integrations.te.functional_call", model.named_modules(), nests=True)
    with use, use:
        for name in replaced:
            use.hook_before(model.get_submodule(name), _refuse)
        return use.call(model, dict(weights), tuple(args), dict(kwargs or {}))


def layerwise(
    fq: fqt.Transform, model: Module, state: State, *, recompute: bool = True
) -> AbstractContextManager[None]:
    """`fq_transforms.layerwise`, which raises if a selected layer runs under Transformer Engine's autocast.

    Raises:
        KeyError, ValueError, RuntimeError: As `fq_transforms.layerwise`; a selected layer runs under an autocast.
    """
    return fqt.layerwise(fq, model, state, recompute=recompute, inspect=refuse_autocast)
