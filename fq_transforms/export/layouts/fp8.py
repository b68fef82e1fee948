"""Files in DeepSeek's own spelling of square FP8 blocks: `quant_method: fp8`, as DeepSeek-V3 is on the hub.

    {module}.weight              float8_e4m3fn [out, in]
    {module}.weight_scale_inv    what codes are multiplied with, fp32 [out/128, in/128]
    config.json                  `quantization_config`: the block, and which modules are not quantized

Read are also stacks, {stack} and {stack}_scale_inv; other blocks, and one scale per tensor or row; scales that are
exponents; DeepSeek V4's FP4, two in a byte of int8 [out, in/2], with exponents [out, in/32]; and what is called
{module}.weight_scale.

Its readers quantize inputs when the model runs, in blocks of 128 along `in`.

Source: config.json and inference/kernel.py of DeepSeek-V3; `Fp8Config` of vLLM 0.32.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fq_transforms.export.files.shards import Files
from fq_transforms.export.layouts.encoded import EncodedWeight, Found, of_blocks
from fq_transforms.export.layouts.plan import CodedWeight, ExportPlan, Target
from fq_transforms.export.layouts.schemes import FORMAT_KEYS
from fq_transforms.formats import MXFP4
from fq_transforms.ops.pack.reference import unpack_reference
from fq_transforms.parse import shown

__all__ = ["TARGET", "find"]

BLOCK = [128, 128]
# Dtypes of scales that are exponents + 127.
_EXPONENTS = ("F8_E8M0", "U8")
_OF_INPUTS = (".input_scale", "activation_scale")


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
        raise ValueError(f"quantization_config: found weight_block_size={shown(block)}, wanted two sides, or null")
    weights: dict[str, EncodedWeight] = {}
    left: dict[str, str] = {}
    for scale in files.places:
        if scale.endswith(_OF_INPUTS):
            left[scale] = "a scale of inputs, for the codes as they were stored"
        elif scale.endswith(("_scale_inv", ".weight_scale")):
            name = scale.removesuffix("_scale_inv").removesuffix("_scale")
            if name not in files.places:
                raise ValueError(f"tensor {scale!r}: found no {name!r}, wanted the codes that it is the scale of")
            weights[name] = _weight(files, name, scale, (block[0], block[1]))
    return Found(weights, left)


def _weight(files: Files, name: str, scale: str, block: tuple[int, int]) -> EncodedWeight:
    codes, of_scale = files.places[name].type, files.places[scale].type
    parts = {"codes": name, "scale": scale}
    *stack, out, width = codes.shape if len(codes.shape) in (2, 3) else (0, 0)

    def grid(rows: int, columns: int) -> tuple[int, ...]:
        return (*stack, -(-out // rows), -(-width // columns))

    is_float = of_scale.dtype in ("F32", "BF16", "F16", *_EXPONENTS)
    if codes.dtype in ("F8_E4M3", "F8_E5M2") and is_float and out:
        if of_scale.shape in ((), (1,), grid(out, width)):
            return EncodedWeight("FP8", parts, codes.shape, partial(_decode, block=(out, width)))
        if of_scale.shape == grid(*block):
            words = f"FP8 in blocks of ({block[0]}, {block[1]})"
            return EncodedWeight(words, parts, codes.shape, partial(_decode, block=block))
        if of_scale.shape == grid(1, width):
            return EncodedWeight("FP8 per channel", parts, codes.shape, partial(_decode, block=(1, width)))
        if of_scale.shape == grid(1, 32) and of_scale.dtype in _EXPONENTS:
            return EncodedWeight("MXFP8", parts, codes.shape, partial(_decode, block=(1, 32)))
    elif codes.dtype in ("I8", "U8") and of_scale.dtype in _EXPONENTS and of_scale.shape == grid(1, 16):
        return EncodedWeight("MXFP4", parts, (*stack, out, 2 * width), _decode_mxfp4, "scale")
    raise ValueError(
        f"tensor {name!r}: found {codes.dtype} {codes.shape} with scales {of_scale.dtype} {of_scale.shape}, wanted "
        f"float8 with one number, one per row, or {grid(*block)} for blocks of {list(block)}; or bytes of two FP4 with "
        "one exponent for 32"
    )


def _decode(parts: Mapping[str, Tensor], dtype: torch.dtype, *, block: tuple[int, int]) -> Tensor:
    codes, scale = parts["codes"], parts["scale"]
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    return of_blocks(codes, scale if scale.dim() == codes.dim() else scale.reshape(1, 1), block, dtype)


def _decode_mxfp4(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes, scale = (parts[part].view(torch.uint8) for part in ("codes", "scale"))
    return unpack_reference(codes, scale, None, format=MXFP4, out_dtype=dtype)
