"""Files as ModelOpt 0.47's unified HF export writes them.

    {module}.weight            codes: float8 or int8 [out, in], or two E2M1 in a byte [out, in/2]
    {module}.weight_scale      [], [out] or [out, in/block]; of square blocks [out/128, 1, in/128, 1]
    {module}.weight_scale_2    NVFP4: the global scale, fp32 []
    {module}.input_scale       calibrated inputs: amax / largest code, for NVFP4 amax / (6 * 448); fp32 []
    hf_quant_config.json       the algorithm, and which modules are not quantized; once more in config.json

Where these files differ from those of its own exporter: docs/export.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.export.plan import (
    CodedWeight,
    ExportPlan,
    FormatKey,
    FormatKeys,
    Target,
    export,
    format_key,
    inverse,
)
from fq_transforms.formats import E4M3, Format, IntElement
from fq_transforms.spec import ranges
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = ["modelopt_hf"]


class Algorithm(NamedTuple):
    """ModelOpt's name, and what config.json says beside it, for engines that read that."""

    name: str
    group_size: int | None = None
    weights: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None


_FP8: FormatKey = ("e4m3", "tensor", "fp32")
_FP8_ROWS: FormatKey = ("e4m3", "channel", "fp32")
_FP8_SQUARES: FormatKey = ("e4m3", "128x128", "fp32")
_MXFP8: FormatKey = ("e4m3", "1x32", "e8m0")
_NVFP4: FormatKey = ("e2m1", "1x16", "e4m3")
_INT8: FormatKey = ("int8", "tensor", "fp32")
_INT8_ROWS: FormatKey = ("int8", "channel", "fp32")

_OF_FP8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_OF_NVFP4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
ALGORITHMS: dict[FormatKeys, Algorithm] = {
    # None without inputs: engines then make up a scale of inputs, and compute other numbers without a word.
    (_FP8, _FP8): Algorithm("FP8", weights=_OF_FP8, inputs=_OF_FP8),
    (_FP8_ROWS, None): Algorithm("FP8_PER_CHANNEL_PER_TOKEN"),
    (_FP8_ROWS, _FP8_ROWS): Algorithm("FP8_PER_CHANNEL_PER_TOKEN"),
    (_FP8_SQUARES, None): Algorithm("fp8_pb_wo"),
    (_MXFP8, None): Algorithm("MXFP8", 32),
    (_MXFP8, _MXFP8): Algorithm("MXFP8", 32),
    (_NVFP4, None): Algorithm("W4A16_NVFP4", 16, weights=_OF_NVFP4),
    (_NVFP4, _NVFP4): Algorithm("NVFP4", 16, weights=_OF_NVFP4, inputs=_OF_NVFP4),
    (_INT8_ROWS, None): Algorithm("W8A16"),
    (_INT8_ROWS, _INT8): Algorithm("W8A8_SQ_PER_CHANNEL"),
}
# Engines look for this producer before they read the file; the version is that of the layout.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def modelopt_hf(
    path: str | os.PathLike[str],
    fq: Transform,
    params: Mapping[str, Tensor],
    state: State,
    *,
    config: Any,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder as ModelOpt's `export_hf_checkpoint` does: shards, their index, config.json, hf_quant_config.json.

    Codes and scales are those of `fq.pack`; calibrated inputs become `input_scale`. Arguments: `compressed_tensors`.

    | weights               | inputs beside them, or none |
    | FP8 (never none), MXFP8 | in the same format |
    | FP8_PER_CHANNEL       | FP8_PER_CHANNEL, scaled per token |
    | NVFP4, NVFP4_STATIC   | NVFP4 |
    | INT8_PER_CHANNEL      | INT8 |
    | FP8_BLOCK             | none |

    Raises:
        KeyError: As `compressed_tensors`.
        ValueError: As there; inputs without weights, or in another format than the table's; FP8 without inputs; an
            input amax whose scale is not normal.
        ImportError: As there.
        OSError: As there.

    Source: `modelopt.torch.export.unified_export_hf` and `convert_hf_config`, ModelOpt 0.47.

    Example:
        >>> import tempfile, torch
        >>> import fq_transforms as fqt
        >>> params = {f"mlp.experts.{i}.up_proj.weight": torch.ones(4, 16) for i in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     modelopt_hf(f"{parent}/model", fq, params, fq.calibrate(params), config=config)
        ...     sorted(os.listdir(f"{parent}/model"))
        ['config.json', 'hf_quant_config.json', 'model.safetensors']
    """
    export(TARGET, path, fq, params, state, config, max_shard_size)


def _check_inputs(plan: ExportPlan) -> None:
    """Raise ValueError where engines would find no scale that they can divide by."""
    for inputs in (source.inputs for source in plan.sources):
        amax = plan.state[inputs.key].get("amax") if inputs else None
        if inputs is None or amax is None:
            continue
        scale = amax / _largest(inputs.format)
        wrong: list[int] = (scale < torch.finfo(torch.float32).tiny).nonzero().flatten().tolist()
        if wrong:
            of = f"expert {ranges(wrong)} of {inputs.experts}" if inputs.per_expert else "all experts"
            raise ValueError(
                f"state '{inputs.key}.amax': found {amax[wrong[0]].item()} for {of}, whose scale "
                f"{scale[wrong[0]].item()} engines cannot divide by, wanted more; calibrate with inputs that are not "
                f"all zero, or set it: state | {{{inputs.key!r}: state[{inputs.key!r}] | {{'amax': ...}}}}"
            )


def _encode(coded: CodedWeight) -> dict[str, Tensor]:
    scale = coded.scale
    if isinstance(coded.format.element, IntElement):
        scale = inverse(scale, of_zero=0.0)  # readers multiply
    granule = format_key(coded.format)[1]
    if granule == "channel":
        scale = scale[:, 0]
    elif granule == "128x128":
        scale = scale[:, None, :, None]
    tensors = {"weight": coded.codes, "weight_scale": scale}
    if coded.global_scale is not None:
        tensors["weight_scale_2"] = coded.global_scale
    if coded.inputs is not None and coded.input_amax is not None:
        tensors["input_scale"] = coded.input_amax / _largest(coded.inputs)
    return tensors


def _largest(format: Format) -> float:
    """Amax of inputs over their scale: the largest code; for NVFP4 times the largest scale of a block."""
    element = format.element
    code = float(element.qmax) if isinstance(element, IntElement) else float(element.max)
    return code * E4M3.max if format.scale == "e4m3" else code


def _documents(plan: ExportPlan) -> dict[str, Any]:
    layers = {module: _layer(*formats) for module, formats in plan.formats.items()}
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


def _layer(format: Format, inputs: Format | None) -> dict[str, Any]:
    algorithm = ALGORITHMS[format_key(format), None if inputs is None else format_key(inputs)]
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


TARGET = Target("ModelOpt's HF export", list(ALGORITHMS), _check_inputs, _encode, _documents)
