"""Files in DeepSeek's own spelling of square FP8 blocks: `quant_method: fp8`, as DeepSeek-V3 is on the hub.

    {module}.weight              float8_e4m3fn [out, in]
    {module}.weight_scale_inv    what codes are multiplied with, fp32 [out/128, in/128]
    config.json                  `quantization_config`: the block, and which modules are not quantized

Read are also stacks, {stack} and {stack}_scale_inv, other blocks, and one scale per tensor, {module}.weight_scale, with
or without the scale of inputs beside it.

Its readers quantize inputs when the model runs, in blocks of 128 along `in`.

Source: config.json and inference/kernel.py of DeepSeek-V3; `Fp8Config` of vLLM 0.32.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fq_transforms.export.encoded import EncodedWeight, Found, of_blocks
from fq_transforms.export.plan import CodedWeight, ExportPlan, Target
from fq_transforms.export.schemes import FORMAT_KEYS
from fq_transforms.export.shards import Files
from fq_transforms.parse import shown

__all__ = ["TARGET", "find"]

BLOCK = [128, 128]


def _encode(coded: CodedWeight) -> dict[str, Tensor]:
    return {"weight": coded.codes, "weight_scale_inv": coded.scale}


def _documents(plan: ExportPlan) -> dict[str, Any]:
    about = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": BLOCK,
        "modules_to_not_convert": plan.excluded,
    }
    return {"config.json": plan.config | {"quantization_config": about}}


def _note(plan: ExportPlan) -> str:
    return (
        f"{len(plan.schemes)} groups: found weights alone, whose inputs readers of this layout quantize too, when the "
        "model runs, in blocks of 128 along `in`"
    )


TARGET = Target("DeepSeek's FP8", "fp8", _documents, {(FORMAT_KEYS["FP8_BLOCK"], None): "fp8"}, None, _note, _encode)


def find(files: Files, about: Mapping[str, Any]) -> Found:
    """What is stored so. Raises ValueError for scales that do not fit the codes."""
    block: Any = about.get("weight_block_size") or BLOCK
    if not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
        raise ValueError(f"quantization_config: found weight_block_size={shown(block)}, wanted two sides")
    rows, columns = block
    weights: dict[str, EncodedWeight] = {}
    left: dict[str, str] = {}
    for scale in files.places:
        ending = next((end for end in ("_scale_inv", ".weight_scale") if scale.endswith(end)), None)
        if scale.endswith((".input_scale", ".activation_scale")):
            left[scale] = "a scale of inputs, of the codes that were there"
        if ending is None:
            continue
        name = scale.removesuffix("_scale_inv").removesuffix("_scale")
        if name not in files.places:
            raise ValueError(f"tensor {scale!r}: found no {name!r}, wanted the codes that it is the scale of")
        of_codes, of_scale = files.places[name].type, files.places[scale].type.shape
        *stack, out, width = of_codes.shape if len(of_codes.shape) > 1 else (0, 0)
        in_blocks = (*stack, -(-out // rows), -(-width // columns))
        is_number = of_scale in ((), (1,))
        if not of_codes.dtype.startswith("F8_") or not (is_number or of_scale == in_blocks):
            raise ValueError(
                f"tensor {name!r}: found {of_codes.dtype} {of_codes.shape} with scales {of_scale}, wanted float8 and "
                f"one number, or {in_blocks}, for blocks of {block}"
            )
        parts = {"codes": name, "scale": scale}
        words = "FP8" if is_number else f"FP8 in blocks of ({rows}, {columns})"
        decode = partial(_decode, block=None if is_number else (rows, columns))
        weights[name] = EncodedWeight(words, parts, of_codes.shape, decode)
    return Found(weights, left)


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype, *, block: tuple[int, int] | None) -> Tensor:
    codes, scale = parts["codes"], parts["scale"]
    if block is None:
        return (codes.float() * scale.float()).to(dtype)
    return of_blocks(codes, scale, block, dtype)
