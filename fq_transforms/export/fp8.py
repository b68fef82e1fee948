"""Files in DeepSeek's own spelling of square FP8 blocks: `quant_method: fp8`, as DeepSeek-V3 is on the hub.

    {module}.weight              float8_e4m3fn [out, in]
    {module}.weight_scale_inv    what codes are multiplied with, fp32 [out/128, in/128]
    config.json                  `quantization_config`: the block, and which modules are not quantized

Its readers quantize inputs when the model runs, in blocks of 128 along `in`.

Source: config.json and inference/kernel.py of DeepSeek-V3; `Fp8Config` of vLLM 0.32.
"""

import warnings
from typing import Any

from torch import Tensor

from fq_transforms.export.plan import CodedWeight, ExportPlan, Target
from fq_transforms.export.schemes import FORMAT_KEYS

__all__ = ["TARGET"]

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


def _check(plan: ExportPlan) -> None:
    warnings.warn(
        f"{len(plan.schemes)} groups: found weights alone, whose inputs readers of this layout quantize too, when the "
        "model runs, in blocks of 128 along `in`",
        stacklevel=4,
    )


TARGET = Target("DeepSeek's FP8", "fp8", _documents, {(FORMAT_KEYS["FP8_BLOCK"], None): "fp8"}, _check, _encode)
