"""The peers, as calls on the same N separate weights; None where a peer lacks the format."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.quantize.reference import fake_quantize_reference

Call = Callable[[], object]


def stacked_torch(weights: Sequence[Tensor], amax: Tensor | None, global_amax: Tensor | None, format: Format) -> Call:
    """Stack the weights, then quantize with torch's own operators."""
    return lambda: fake_quantize_reference(
        torch.stack(list(weights)), amax, global_amax, format=format, out_dtype=weights[0].dtype
    )


def compiled_torch(weights: Sequence[Tensor], amax: Tensor | None, global_amax: Tensor | None, format: Format) -> Call:
    """The same through torch.compile."""
    torch.compiler.reset()

    def quantize(weights: list[Tensor]) -> Tensor:
        return fake_quantize_reference(
            torch.stack(weights), amax, global_amax, format=format, out_dtype=weights[0].dtype
        )

    compiled = torch.compile(quantize)
    return lambda: compiled(list(weights))


def modelopt_loop(weights: Sequence[Tensor], amax: Tensor | None, format: Format) -> Call | None:
    """ModelOpt: one TensorQuantizer per weight, in a loop. None where it is not installed or lacks the format."""
    try:
        from modelopt.torch.quantization.config import (  # pyright: ignore[reportMissingImports]
            QuantizerAttributeConfig,
        )
        from modelopt.torch.quantization.nn import TensorQuantizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    attributes = _modelopt_attributes(format)
    if attributes is None:
        return None
    quantizers: list[Any] = []
    for expert in range(len(weights)):
        quantizer: Any = TensorQuantizer(QuantizerAttributeConfig(**attributes))
        if amax is not None:
            quantizer.amax = amax[expert].clone()
        quantizers.append(quantizer)
    return lambda: [quantizer(weight) for quantizer, weight in zip(quantizers, weights, strict=True)]


def _modelopt_attributes(format: Format) -> dict[str, Any] | None:
    is_tensor, is_channel = format.block == (None, None), format.block == (1, None)
    if format.scale == "fp32" and (is_tensor or is_channel):
        bits: Any = 8 if isinstance(format.element, IntElement) else (4, 3)
        return {"num_bits": bits, "axis": 0 if is_channel else None}
    element = {"NVFP4": (2, 1), "MXFP4": (2, 1), "MXFP8": (4, 3), "MXFP6_E3M2": (3, 2), "MXFP6_E2M3": (2, 3)}
    if format.name not in element:
        return None
    scale = (4, 3) if format.scale == "e4m3" else (8, 0)
    blocks = {-1: format.block[1], "type": "dynamic", "scale_bits": scale}
    return {"num_bits": element[format.name], "block_sizes": blocks}


def modelopt_model(model: Module, format: Format, forward: Callable[[Module], None], pattern: str) -> Module | None:
    """A model converted by ModelOpt in place, one calibrated quantizer per weight. None where it lacks the format."""
    attributes = _modelopt_attributes(format)
    if attributes is None:
        return None
    try:
        import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": f"{pattern}weight_quantizer*", "cfg": attributes},
    ]
    return mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, forward)
