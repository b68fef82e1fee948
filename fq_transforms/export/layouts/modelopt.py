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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.export.files.shards import Files, TensorType
from fq_transforms.export.layouts.encoded import EncodedWeight, Found, of_blocks, take
from fq_transforms.export.layouts.plan import CodedWeight, ExportPlan, FormatKeys, Target, check_inputs, largest
from fq_transforms.export.layouts.schemes import FORMAT_KEYS
from fq_transforms.formats import MXFP4, MXFP8, NVFP4, Format
from fq_transforms.ops.pack.reference import unpack_reference
from fq_transforms.parse import shown

__all__ = ["TARGET", "find"]


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


TARGET = Target("ModelOpt's HF export", "modelopt", _documents, ALGORITHMS, check_inputs, None, _encode)


# Scales of a cache of keys and values, and of inputs.
_OF_CACHE = (
    *(".k_proj.k_scale", ".v_proj.v_scale", ".k_proj.k_bias", ".v_proj.v_bias"),
    *(".k_proj.output_scale", ".v_proj.output_scale", ".q_bmm_scale", ".k_bmm_scale", ".v_bmm_scale"),
)
# What inputs are multiplied with, or added to, before they are quantized: weights alone do not say it.
_OF_AWQ = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b")


def find(files: Files, about: Mapping[str, Any]) -> Found:
    """What is stored so. Raises ValueError for codes of another kind, such as AWQ's, and scales that do not fit."""
    weights: dict[str, EncodedWeight] = {}
    left: dict[str, str] = {}
    has_cache = bool(about.get("kv_cache_quant_algo") or about.get("kv_cache_scheme"))
    algorithm = f"quant_algo {shown(about.get('quant_algo'))}"
    for name in files.places:
        if name.endswith(_OF_AWQ):
            raise ValueError(f"tensor {name!r}: found {algorithm}, whose inputs are changed, wanted another algorithm")
        if name.endswith((*_OF_CACHE, ".k_scale", ".v_scale") if has_cache else _OF_CACHE):
            left[name] = "a scale of the cache of keys and values"
        elif name.endswith(".input_scale"):
            left[name] = "a scale of inputs, for the codes as they were stored"
        elif name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            named = {part: f"{module}.{part}" for part in ("weight", "weight_scale", "weight_scale_2")}
            parts = {part: name for part, name in named.items() if name in files.places}
            what = f"module {module!r} of {algorithm}"
            own = take(parts, ("weight", "weight_scale"), ("weight_scale_2",), what)
            weights[own["weight"]] = _weight(
                what, parts, {part: files.places[name].type for part, name in parts.items()}
            )
    return Found(weights, left)


def _weight(what: str, parts: dict[str, str], types: Mapping[str, TensorType]) -> EncodedWeight:
    codes, scale = types["weight"], types["weight_scale"]
    refused = ValueError(
        f"{what}: found {codes.dtype} {codes.shape} with scales {scale.dtype} {scale.shape}, wanted NVFP4, FP8, MXFP8, "
        "MXFP4 or INT8 as ModelOpt 0.47 writes them"
    )
    if len(codes.shape) not in (2, 3):
        raise refused
    *stack, out, width = codes.shape
    if number := types.get("weight_scale_2"):
        wanted = ((), (1,), *([(*stack,), (*stack, 1), (*stack, 1, 1)] if stack else []))
        fits = codes.dtype == "U8" and scale == TensorType("F8_E4M3", (*stack, out, width // 8))
        if not fits or number.dtype != "F32" or number.shape not in wanted:
            raise refused
        return EncodedWeight("NVFP4", parts, (*stack, out, 2 * width), _decode_nvfp4)
    if codes.dtype == "U8" and width % 16 == 0 and scale == TensorType("U8", (*stack, out, width // 16)):
        return EncodedWeight(
            "MXFP4", parts, (*stack, out, 2 * width), partial(_decode_mx, format=MXFP4), "weight_scale"
        )
    if codes.dtype == "F8_E4M3" and width % 32 == 0 and scale == TensorType("U8", (*stack, out, width // 32)):
        return EncodedWeight("MXFP8", parts, codes.shape, partial(_decode_mx, format=MXFP8))
    if codes.dtype not in ("F8_E4M3", "I8") or scale.dtype not in ("F32", "BF16", "F16"):
        raise refused
    name = "FP8" if codes.dtype == "F8_E4M3" else "INT8"
    if scale.shape in ((), (1,)):
        return EncodedWeight(name, parts, codes.shape, partial(_decode_blocks, block=(out, width)))
    if scale.shape in ((out,), (out, 1)) and not stack:
        return EncodedWeight(f"{name} per channel", parts, codes.shape, partial(_decode_blocks, block=(1, width)))
    if scale.shape == (-(-out // 128), 1, -(-width // 128), 1) and not stack:
        words = f"{name} in blocks of (128, 128)"
        return EncodedWeight(words, parts, codes.shape, partial(_decode_blocks, block=(128, 128)))
    raise refused


def _decode_nvfp4(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes, number = parts["weight"], parts["weight_scale_2"]
    number = number.reshape(codes.shape[:1] if number.numel() > 1 and codes.dim() > 2 else ())
    number = number.expand(codes.shape[:-2])
    return unpack_reference(codes, parts["weight_scale"], number, format=NVFP4, out_dtype=dtype)


def _decode_mx(parts: Mapping[str, Tensor], dtype: torch.dtype, *, format: Format) -> Tensor:
    return unpack_reference(parts["weight"], parts["weight_scale"], None, format=format, out_dtype=dtype)


def _decode_blocks(parts: Mapping[str, Tensor], dtype: torch.dtype, *, block: tuple[int, int]) -> Tensor:
    codes, scale = parts["weight"], parts["weight_scale"]
    rows, columns = (-(-side // of) for side, of in zip(codes.shape[-2:], block, strict=True))
    return of_blocks(codes, scale.reshape(rows, columns), block, dtype)
