"""Files as ModelOpt 0.47's unified HF export writes them.

    {module}.weight            codes: float8 or int8 [out, in], or two E2M1 in a byte [out, in/2]
    {module}.weight_scale      [], [out] or [out, in/block]; of square blocks [out/128, 1, in/128, 1]
    {module}.weight_scale_2    NVFP4: the global scale, fp32 []
    {module}.input_scale       calibrated inputs: amax / largest code, for NVFP4 amax / (6 * 448); fp32 []
    hf_quant_config.json       the algorithm, and which modules are not quantized; once more in config.json

Where these files differ from those of its own exporter: docs/export.

Source: `modelopt.torch.export.unified_export_hf` and `convert_hf_config`, ModelOpt 0.47.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fq_transforms.export.plan import CodedWeight, ExportPlan, FormatKeys, Target, check_inputs, largest
from fq_transforms.export.schemes import FORMAT_KEYS

__all__ = ["TARGET"]


class Algorithm(NamedTuple):
    """ModelOpt's name, and what config.json says beside it, for engines that read that."""

    name: str
    group_size: int | None = None
    weights: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None


_OF_FP8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_OF_NVFP4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
# By the formats of weights and of inputs, which are "-" where they are not quantized. FP8 has no row without inputs:
# engines then make up a scale of inputs, and compute other numbers silently.
_ALGORITHMS: dict[tuple[str, str], Algorithm] = {
    ("FP8", "FP8"): Algorithm("FP8", weights=_OF_FP8, inputs=_OF_FP8),
    ("FP8_PER_CHANNEL", "-"): Algorithm("FP8_PER_CHANNEL_PER_TOKEN"),
    ("FP8_PER_CHANNEL", "FP8_PER_CHANNEL"): Algorithm("FP8_PER_CHANNEL_PER_TOKEN"),
    ("FP8_BLOCK", "-"): Algorithm("fp8_pb_wo"),
    ("MXFP8", "-"): Algorithm("MXFP8", 32),
    ("MXFP8", "MXFP8"): Algorithm("MXFP8", 32),
    ("NVFP4", "-"): Algorithm("W4A16_NVFP4", 16, weights=_OF_NVFP4),
    ("NVFP4", "NVFP4"): Algorithm("NVFP4", 16, weights=_OF_NVFP4, inputs=_OF_NVFP4),
    ("INT8_PER_CHANNEL", "-"): Algorithm("W8A16"),
    ("INT8_PER_CHANNEL", "INT8"): Algorithm("W8A8_SQ_PER_CHANNEL"),
}
ALGORITHMS: dict[FormatKeys, Algorithm] = {
    (FORMAT_KEYS[weights], FORMAT_KEYS.get(inputs)): algorithm for (weights, inputs), algorithm in _ALGORITHMS.items()
}
# Engines look for this producer before they read the file; the version is that of the layout.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def _encode(coded: CodedWeight) -> dict[str, Tensor]:
    scale = coded.scale
    if coded.format.block == (1, None):
        scale = scale[:, 0]
    elif (coded.format.block[0] or 1) > 1:  # square blocks
        scale = scale[:, None, :, None]
    tensors = {"weight": coded.codes, "weight_scale": scale}
    if coded.global_scale is not None:
        tensors["weight_scale_2"] = coded.global_scale
    if coded.inputs is not None and coded.input_amax is not None:
        tensors["input_scale"] = coded.input_amax / largest(coded.inputs)
    return tensors


def _documents(plan: ExportPlan) -> dict[str, Any]:
    layers = {module: _layer(algorithm) for module, algorithm in plan.modules.items()}
    distinct = [dict(items) for items in {tuple(layer.items()): None for layer in layers.values()}]
    if len(distinct) == 1:
        own = distinct[0] | {"exclude_modules": plan.excluded}
    else:
        own = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    own = {"quant_algo": None, "kv_cache_quant_algo": None} | own
    return {
        "config.json": plan.config | {"quantization_config": _quantization_config(own)},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": own},
    }


def _layer(algorithm: Algorithm) -> dict[str, Any]:
    size = algorithm.group_size
    return {"quant_algo": algorithm.name} | ({} if size is None else {"group_size": size})


def _quantization_config(own: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says: the same, in the words that engines know there."""
    algorithm = next((a for a in ALGORITHMS.values() if a.name == own["quant_algo"] and a.weights), None)
    groups: dict[str, Any] = {}
    if algorithm is not None:
        inputs = {"input_activations": algorithm.inputs} if algorithm.inputs else {}
        groups = {"config_groups": {"group_0": inputs | {"weights": algorithm.weights, "targets": ["Linear"]}}}
    elif "quantized_layers" in own:
        groups = {"quantized_layers": own["quantized_layers"]}
    rest = {"ignore": own.get("exclude_modules", []), "quant_algo": own["quant_algo"], "producer": PRODUCER}
    return groups | rest | {"quant_method": "modelopt"}


TARGET = Target("ModelOpt's HF export", "modelopt", _documents, ALGORITHMS, check_inputs, _encode)
