"""Per-expert fake quantization of Mixture-of-Experts weights, as pure functions on torch.func."""

from fq_transforms import checkpoint, export, formats, methods, presets, state
from fq_transforms.activations.second_moments import mean_squares
from fq_transforms.activations.sync import sync_inputs
from fq_transforms.activations.unseen import finish
from fq_transforms.calibrate import calibrate
from fq_transforms.distributed import sync
from fq_transforms.export.interleave import deinterleave, interleave
from fq_transforms.fakequant import fakequant
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
from fq_transforms.pack import Packed, PackedTree, PackedTwoLevel, pack, unpack
from fq_transforms.report.report import Report, report
from fq_transforms.rounding import Stochastic
from fq_transforms.select import Preset, Rule, select
from fq_transforms.spec import Spec
from fq_transforms.state import State, merge, tie
from fq_transforms.training.layerwise import layerwise
from fq_transforms.training.main_grad import carry_main_grad
from fq_transforms.training.value_and_grad import value_and_grad
from fq_transforms.transform import Transform, transform

__version__ = "0.1.0"

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
    "Format",
    "Packed",
    "PackedTree",
    "PackedTwoLevel",
    "Preset",
    "Report",
    "Rule",
    "Spec",
    "State",
    "Stochastic",
    "Transform",
    "calibrate",
    "carry_main_grad",
    "checkpoint",
    "deinterleave",
    "export",
    "fakequant",
    "finish",
    "formats",
    "interleave",
    "layerwise",
    "mean_squares",
    "merge",
    "methods",
    "pack",
    "presets",
    "report",
    "select",
    "state",
    "sync",
    "sync_inputs",
    "tie",
    "transform",
    "unpack",
    "value_and_grad",
]
