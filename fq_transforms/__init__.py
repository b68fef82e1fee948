"""Per-expert fake quantization of Mixture-of-Experts weights, as pure functions on torch.func."""

from fq_transforms import checkpoint, export, formats, methods, presets, rules, state
from fq_transforms.formats import (
    FP8,
    FP8_BLOCK,
    FP8_PER_CHANNEL,
    INT4_BLOCK32,
    INT4_BLOCK128,
    INT8,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8,
    NVFP4,
    NVFP4_STATIC,
    Format,
)
from fq_transforms.gptq import gptq
from fq_transforms.masters import cast, masters
from fq_transforms.rounding import Stochastic
from fq_transforms.rules import Rule
from fq_transforms.search import search
from fq_transforms.select import select
from fq_transforms.spec import Spec
from fq_transforms.state import merge, tie
from fq_transforms.training.layerwise import layerwise
from fq_transforms.training.main_grad import carry_main_grad
from fq_transforms.training.optimizer import FakeQuantOptimizer
from fq_transforms.training.value_and_grad import value_and_grad
from fq_transforms.transform import Transform, transform

__version__ = "0.2.0"

__all__ = [
    "FP8",
    "FP8_BLOCK",
    "FP8_PER_CHANNEL",
    "INT4_BLOCK32",
    "INT4_BLOCK128",
    "INT8",
    "INT8_PER_CHANNEL",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "NVFP4",
    "NVFP4_STATIC",
    "FakeQuantOptimizer",
    "Format",
    "Rule",
    "Spec",
    "Stochastic",
    "Transform",
    "carry_main_grad",
    "cast",
    "checkpoint",
    "export",
    "formats",
    "gptq",
    "layerwise",
    "masters",
    "merge",
    "methods",
    "presets",
    "rules",
    "search",
    "select",
    "state",
    "tie",
    "transform",
    "value_and_grad",
]


def __dir__() -> list[str]:
    """The public names, which is what completion in a notebook shows; modules inside are imported by their path."""
    return __all__
