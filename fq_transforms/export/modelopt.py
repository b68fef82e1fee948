"""Files as ModelOpt 0.47's unified HF export writes them.

    {module}.weight            codes: float8 or int8 [out, in], or two E2M1 in a byte [out, in/2]
    {module}.weight_scale      by `AXES`
    {module}.weight_scale_2    NVFP4: the global scale, fp32 []
    {module}.input_scale       calibrated inputs: amax over the largest code, for NVFP4 over 6 * 448, fp32 []
    hf_quant_config.json       the algorithm, and which modules are not quantized; in config.json once more

NOTE differences from its exporter, none of which changes what the files mean. FP8 weights' scales are 1 / (448 / amax),
as the fake quantization of both computes, where its exporter stores amax / 448: they differ by at most one step of
fp32; so do INT8's, with 127. It divides bf16 weights to bf16 before it rounds them to a code, so that some of its codes
are a step off its own fake quantization; ours never are. Square blocks always have scales in four axes here; it gives
[] to a weight that is one block, and Mixtral's experts the names that they have in memory. Where modules differ in
algorithm it names blocks of experts, and lists groups in config.json too; here each expert is named, and listed in
`quantized_layers` only. Inputs that were zero throughout are refused here; there they get the scale of other experts,
or 1, in NVFP4 1/448.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fq_transforms.export.files import bytes_of, check_free, write
from fq_transforms.export.plan import Coded, Kind, Kinds, Plan, inverse, kind_of, plan, tensors
from fq_transforms.formats import E4M3, Format, IntElement
from fq_transforms.spec import Spec, ranges
from fq_transforms.state import State

__all__ = ["modelopt_hf"]


class Algorithm(NamedTuple):
    """A name of ModelOpt's, and what config.json says beside it, for engines that read that."""

    name: str
    group_size: int | None = None
    weights: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None


_FP8: Kind = ("e4m3", "tensor", "fp32")
_FP8_ROWS: Kind = ("e4m3", "channel", "fp32")
_FP8_SQUARES: Kind = ("e4m3", "128x128", "fp32")
_MXFP8: Kind = ("e4m3", "1x32", "e8m0")
_NVFP4: Kind = ("e2m1", "1x16", "e4m3")
_INT8: Kind = ("int8", "tensor", "fp32")
_INT8_ROWS: Kind = ("int8", "channel", "fp32")

_OF_FP8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_OF_NVFP4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
ALGORITHMS: dict[Kinds, Algorithm] = {
    (_FP8, None): Algorithm("FP8", weights=_OF_FP8, inputs=_OF_FP8),
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
# Of `weight_scale`, from [out, in / block]: "" one number [], "o" [out], "oi" as they are, "o1i1" with two more axes.
AXES: dict[Kind, str] = {_FP8: "", _FP8_ROWS: "o", _FP8_SQUARES: "o1i1", _MXFP8: "oi", _NVFP4: "oi", _INT8_ROWS: "o"}
# Engines ask for this producer before they read the file; the version is that of the layout.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def modelopt_hf(
    params: Mapping[str, Tensor],
    state: State,
    folder: str | os.PathLike[str],
    *,
    spec: Spec,
    config: Any,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint as ModelOpt's `export_hf_checkpoint` does: `folder` has shards, index and two configs.

    The codes and scales are those of `fqt.pack`, so a reader gets `fakequant`'s weights. One group is packed at a
    time, and no more than a shard is held. One process calls it, with the whole model; copy tokenizer files
    afterwards. Inputs that the spec has and the state was calibrated for become `input_scale`, one an expert or the
    same for all. Without them NVFP4 has the name of weights under 16-bit inputs, and engines that take FP8 with one
    scale a tensor (vLLM, SGLang) want an input scale that they do not find; FP8_PER_CHANNEL, whose inputs are scaled
    by the token, needs none. Engines want one algorithm for all experts of a layer, so inputs of all their roles
    have one format, or none.

    Args:
        params: `model.state_dict()`: names to tensors [out, in], or stacked [E, out, in], from transformers or
            Megatron-Core. All are written, those that the spec does not name as they are, but for Transformer Engine's
            `_extra_state`, and for a head that is the embedding.
        state: From `calibrate`; roles that engines fuse are tied. Experts that have seen no token have an amax from
            `finish`.
        folder: A new name, or an empty directory. It appears whole or not at all.
        spec: What is packed, and how: FP8, FP8_PER_CHANNEL, FP8_BLOCK, NVFP4, NVFP4_STATIC, MXFP8, INT8_PER_CHANNEL.
            Inputs in FP8 beside FP8, in NVFP4 beside both NVFP4, in INT8 beside INT8_PER_CHANNEL, scaled by the token
            in FP8_PER_CHANNEL beside the same, in MXFP8 beside MXFP8; or none.
        config: `model.config` of transformers, or what config.json holds, with `architectures`.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: A group is not calibrated, or an amax is NaN, infinite or negative; `in` is not a multiple of what
            a byte holds; the target has no name for a format, or for inputs beside it; inputs have no weights beside
            them, or an amax so small that its scale is no normal number; some weights in FP8, or experts of a layer,
            have inputs and some have not; two roles that engines fuse (gate and up, w1 and w3, q, k and v) are not
            tied, or their inputs are not; a name is none of files; a weight is a DTensor; the folder is not empty; a
            weight has NaN or infinity. All but the last are found before a byte is written.
        ImportError: tqdm is not installed.
        OSError: A file cannot be written.

    Source: `modelopt.torch.export.unified_export_hf` and `convert_hf_config`, ModelOpt 0.47.

    Example:
        >>> import tempfile, torch
        >>> import fq_transforms as fqt
        >>> params = {f"mlp.experts.{i}.up_proj.weight": torch.ones(4, 16) for i in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     modelopt_hf(params, fq.calibrate(params), f"{parent}/model", spec=fq.spec, config=config)
        ...     sorted(path.name for path in Path(parent, "model").iterdir())
        ['config.json', 'hf_quant_config.json', 'model.safetensors']
    """
    path, limit = Path(os.path.realpath(folder)), bytes_of(max_shard_size)
    check_free(path)
    found = plan(params, state, spec, config, target="ModelOpt's HF export", kinds=ALGORITHMS)
    _check_input_scales(found)
    of_file = _hf_quant_config(found)
    documents = {
        "config.json": found.config | {"quantization_config": _quantization_config(of_file)},
        "hf_quant_config.json": of_file,
    }
    write(path, tensors(found, _encode, f"export {path.name}"), documents, limit)


def _check_input_scales(plan: Plan) -> None:
    """Raise ValueError where engines would find no scale that they can divide by, or for some modules none."""
    for inputs in plan.inputs.values():
        entry = plan.state[inputs.key]
        if not entry or "tokens" not in entry:
            continue
        scale = entry.amax / _largest(inputs.format)
        wrong: list[int] = (scale < torch.finfo(torch.float32).tiny).nonzero().flatten().tolist()
        if wrong:
            of = f"expert {ranges(wrong)} of {inputs.experts}" if inputs.per_expert else "all experts"
            raise ValueError(
                f"state '{inputs.key}.amax': found {entry.amax[wrong[0]].item()} for {of}, whose scale "
                f"{scale[wrong[0]].item()} engines cannot divide by, wanted more; calibrate with inputs that are not "
                f"all zero, or set it: state | {{{inputs.key!r}: state[{inputs.key!r}]._replace(amax=...)}}"
            )
    alike: dict[str, tuple[str, Format | None]] = {}
    for module, (format, of_inputs) in plan.formats.items():
        block, is_expert, _ = module.partition(".experts.")
        places = [f"experts of {block!r}"] if is_expert else []
        places += ["modules in FP8"] if kind_of(format) == _FP8 else []
        for place in places:
            first, wanted = alike.setdefault(place, (module, of_inputs))
            if of_inputs != wanted:
                names = [other.name if other else "none" for other in (wanted, of_inputs)]
                raise ValueError(
                    f"inputs of {first!r} and {module!r}: found {names[0]} and {names[1]}, wanted one format, or none, "
                    f"for all {place}, which engines treat alike; change the rules of the inputs"
                )


def _encode(coded: Coded) -> dict[str, Tensor]:
    scale = coded.scale
    if isinstance(coded.format.element, IntElement):
        scale = inverse(scale, of_zero=0.0)  # readers multiply
    axes = AXES[kind_of(coded.format)]
    if axes == "o1i1":
        scale = scale[:, None, :, None]
    elif axes == "o":
        scale = scale[:, 0]
    own = {"weight": coded.codes, "weight_scale": scale}
    if coded.global_scale is not None:
        own["weight_scale_2"] = coded.global_scale
    if coded.inputs is not None and coded.input_amax is not None:
        own["input_scale"] = coded.input_amax / _largest(coded.inputs)
    return own


def _largest(format: Format) -> float:
    """What a scale of inputs times amax stands for: the largest code; for NVFP4 times the largest scale of a block."""
    element = format.element
    code = float(element.qmax) if isinstance(element, IntElement) else float(element.max)
    return code * E4M3.max if format.scale == "e4m3" else code


def _hf_quant_config(plan: Plan) -> dict[str, Any]:
    layers = {module: _layer(*formats) for module, formats in plan.formats.items()}
    distinct = [dict(items) for items in {tuple(layer.items()): None for layer in layers.values()}]
    if len(distinct) == 1:
        own = distinct[0] | {"exclude_modules": plan.excluded}
    else:
        own = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return {"producer": PRODUCER, "quantization": {"quant_algo": None, "kv_cache_quant_algo": None} | own}


def _layer(format: Format, inputs: Format | None) -> dict[str, Any]:
    algorithm = ALGORITHMS[kind_of(format), None if inputs is None else kind_of(inputs)]
    size = algorithm.group_size
    return {"quant_algo": algorithm.name} | ({} if size is None else {"group_size": size})


def _quantization_config(of_file: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says: the same, in the words that engines read it by there."""
    own = of_file["quantization"]
    algorithm = next((a for a in ALGORITHMS.values() if a.name == own["quant_algo"] and a.weights), None)
    groups: dict[str, Any] = {}
    if algorithm is not None:
        inputs = {"input_activations": algorithm.inputs} if algorithm.inputs else {}
        groups = {"config_groups": {"group_0": inputs | {"weights": algorithm.weights, "targets": ["Linear"]}}}
    elif "quantized_layers" in own:
        groups = {"quantized_layers": own["quantized_layers"]}
    rest = {"ignore": own.get("exclude_modules", []), "quant_algo": own["quant_algo"], "producer": PRODUCER}
    return groups | rest | {"quant_method": "modelopt"}
