"""Files as compressed-tensors 0.20 reads them, written without it; and plain weights from such files, read by it.

{module}.weight_packed          codes of less than 8 bits: uint8, or int32 with eight INT4 in each, or four INT8
{module}.weight                 codes of 8 bits: float8 or int8 [out, in]
{module}.weight_scale           what codes are multiplied with: fp32 [1], [out, 1], [out, in/block] or
                                [out/128, in/128]; E4M3 (NVFP4) or E8M0 as uint8 (MX) [out, in/block]
{module}.weight_global_scale    NVFP4: what scales are divided by, fp32 [1]
{module}.weight_shape           INT4, and packed INT8: [out, in]
{module}.input_scale            inputs per tensor: amax / largest code, fp32 [1]
{module}.input_global_scale     inputs in NVFP4: 6 * 448 / amax, fp32 [1]
config.json                     `quantization_config`: a scheme per format, and which modules are not quantized

Source: the compressors, `QuantizationConfig` and `BaseCompressor.decompress` of compressed-tensors 0.20, which reads
them here too.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from fq_transforms.export.files.shards import Files
from fq_transforms.export.layouts.encoded import EncodedWeight, Found, take
from fq_transforms.export.layouts.plan import CodedWeight, ExportPlan, Target, check_inputs, largest
from fq_transforms.export.layouts.schemes import SCHEMES, Scheme
from fq_transforms.ops.quantize.reference import expert_scale
from fq_transforms.parse import check_name, shown

__all__ = ["TARGET", "find"]

# For all patterns of a folder to be matched; 50,000 modules and ten patterns take half a second.
MOST_SECONDS = 10

# What files may hold of a quantized module, and of its inputs.
INPUTS = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point")
_SCALES = ("F32", "BF16", "F16")
OF_CACHE = ("q_scale", "k_scale", "v_scale")
PARTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight_zero_point")


def _check_global_scales(plan: ExportPlan) -> None:
    """Raise ValueError where a global scale is so small that its reciprocal, which readers divide by, is infinite."""
    for group in (source.group for source in plan.sources):
        if group is None or group.format.scale != "e4m3":
            continue
        leaves = plan.state[group.key]
        amax = leaves.get("global_amax", leaves["amax"])
        scale = expert_scale(amax, group.format)
        # One that divides is infinite for tiny weights too, which are then zeros; of amax 0 they are.
        wrong = ((scale > 0) & (scale.isinf() | scale.reciprocal().isinf()) & (amax > 0)).nonzero()
        if len(wrong):
            expert = int(wrong[0, 0])
            raise ValueError(
                f"weight {group.expert_name(expert)!r}: found an amax of {amax[expert].item():.3g}, so small that its "
                f"global scale {scale[expert].item()} has no reciprocal in fp32, wanted 0 or a larger one; set the "
                "weight to 0, or choose a format without a global scale, such as MXFP4"
            )


def _encode(coded: CodedWeight) -> dict[str, Tensor]:
    scheme: Scheme = coded.scheme
    codes, scale = coded.codes, coded.scale
    tensors = {scheme.codes: codes}
    if scheme.format == "pack-quantized":
        per_byte = 8 // scheme.weights["num_bits"]
        tensors["weight_shape"] = torch.tensor([codes.shape[0], per_byte * codes.shape[1]])
        tensors[scheme.codes] = _packed_in_words(codes)
    if scheme.weights["strategy"] == "channel" and not scale.dim():  # one number, for a reader that wants one per row
        scale = scale.expand(len(codes), 1)
    tensors["weight_scale"] = scale.contiguous() if scale.dim() else scale[None]
    if coded.global_scale is not None:
        tensors["weight_global_scale"] = coded.global_scale[None]
    if coded.inputs is not None and coded.input_amax is not None:
        if coded.inputs.scale == "e4m3":
            of_expert = expert_scale(coded.input_amax, coded.inputs)
            divides = coded.inputs.dequantize == "divide"
            tensors["input_global_scale"] = (of_expert if divides else of_expert.reciprocal())[None]
        else:
            tensors["input_scale"] = (coded.input_amax / largest(coded.inputs))[None]
    return tensors


def _packed_in_words(codes: Tensor) -> Tensor:
    """Codes as int32, the first in the lowest bits: bytes of two INT4, or INT8, which is offset by 128 and padded."""
    if codes.dtype == torch.int8:
        codes = torch.nn.functional.pad((codes.to(torch.int16) + 128).to(torch.uint8), (0, -codes.shape[1] % 4))
    return codes.view(torch.int32)


def _documents(plan: ExportPlan) -> dict[str, Any]:
    modules_of: dict[str, list[str]] = {}
    schemes: dict[str, Scheme] = {}
    for module, scheme in plan.modules.items():
        said = json.dumps(scheme)
        schemes[said] = scheme
        modules_of.setdefault(said, []).append(module)
    groups: dict[str, dict[str, Any]] = {}
    for n, (said, modules) in enumerate(modules_of.items()):
        scheme = schemes[said]
        # To vLLM a head is no Linear.
        heads = [module for module in modules if module.rpartition(".")[2] == "lm_head"]
        targets = ["Linear", *_patterns(heads)] if len(modules_of) == 1 else _patterns(modules)
        groups[f"group_{n}"] = {"targets": targets, "weights": scheme.weights, "format": scheme.format}
        if scheme.inputs is not None:
            groups[f"group_{n}"]["input_activations"] = scheme.inputs
    names = {scheme.format for scheme in schemes.values()}
    about = {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plan.excluded,
    }
    return {"config.json": plan.config | {"quantization_config": about}}


def _patterns(modules: list[str]) -> list[str]:
    """Regular expressions that match these modules; experts of one role are one."""
    experts = [re.sub(r"\\\.experts\\\.\d+\\\.", r"\\.experts\\.\\d+\\.", re.escape(module)) for module in modules]
    return [f"re:^{pattern}$" for pattern in dict.fromkeys(experts)]


def find(files: Files, about: Mapping[str, Any]) -> Found:
    """What is stored so. Raises ValueError for formats that are not known here, parts that do not fit."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise ImportError("to read it needs compressed-tensors: pip install 'fq_transforms[export]'") from error
    try:
        _check_about(about)
        schemes = [QuantizationScheme.model_validate(group) for group in about["config_groups"].values()]
    except Exception as error:  # its own checks compare what they are given
        raise ValueError(f"quantization_config in config.json: {str(error)[:500]}") from error
    modules = [name.removesuffix(".weight_scale") for name in files.places if name.endswith(".weight_scale")]
    scheme_of = _schemes_of(modules, schemes)
    parts_of: dict[str, dict[str, str]] = {module: {} for module in modules}
    left: dict[str, str] = {}
    has_cache = bool(about.get("kv_cache_scheme")) or any(scheme.weights is None for scheme in schemes)
    for name in files.places:
        module, _, part = name.rpartition(".")
        if part in OF_CACHE and has_cache:
            left[name] = "a scale of the cache of keys and values"
        elif module in parts_of and part in INPUTS:
            left[name] = "a scale of inputs, for the codes as they were stored"
        elif module in parts_of and part != "bias":
            parts_of[module][part] = name
    weights: dict[str, EncodedWeight] = {}
    for module, parts in parts_of.items():
        scheme = scheme_of[module]
        if scheme.weights is None:
            raise ValueError(f"module {module!r}: found scales, and a scheme without weights, wanted one with them")
        format = str(scheme.format or about["format"])
        compressor: Any = BaseCompressor.get_value_from_registry(format)
        known = compressor.compression_param_names(scheme)
        shape = _shape_of(files, f"module {module!r}", parts, format, scheme.weights, known)
        decode = partial(_decode, module=module, shape=shape, scheme=scheme, compressor=compressor)
        exponents = "weight_scale" if format == "mxfp4-pack-quantized" else None
        weights[f"{module}.weight"] = EncodedWeight(format, parts, shape, decode, exponents)
    return Found(weights, left)


def _decode(
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    module: str,
    shape: tuple[int, ...],
    scheme: Any,
    compressor: Any,
) -> Tensor:
    try:
        weight = _decompressed(parts, scheme, compressor)
    except Exception as error:  # whatever it finds wrong with numbers, shapes and arguments
        raise ValueError(f"module {module!r}: {type(error).__name__}: {str(error)[:500]}") from error
    if weight.shape != shape:
        raise ValueError(f"module {module!r}: found a weight of {tuple(weight.shape)}, wanted {shape}")
    return weight.to(dtype)


def _decompressed(parts: Mapping[str, Tensor], scheme: Any, compressor: Any) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if "weight_global_scale" not in parts:
        return compressor.decompress(dict(parts), scheme)["weight"]
    # Its decompressor's own steps, which rounds NVFP4 to bf16, whatever the model's dtype is.
    packed, scale = parts["weight_packed"], parts["weight_scale"].float()
    codes = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype=torch.float32)
    return dequantize(codes, scale, args=scheme.weights, global_scale=parts["weight_global_scale"])


def _shape_of(
    files: Files, what: str, parts: Mapping[str, str], format: str, args: Any, known: Collection[str]
) -> tuple[int, ...]:
    """The shape of the weight that codes stand for, [out, in].

    Raises:
        ValueError: A part is missing, or one that a decompressor would ignore; codes and scales do not fit.
    """
    wanted = tuple(part for part in PARTS if part in known)
    take(parts, wanted, ("weight_zero_point",), what)  # a plain weight beside its codes would be lost
    types = {part: files.places[name].type for part, name in parts.items()}
    name = "weight_packed" if "weight_packed" in wanted else "weight"
    codes, scale = types[name], types["weight_scale"]
    bits = args.num_bits
    dtype = ("I8" if args.type == "int" else "F8_E4M3") if name == "weight" else "I32" if args.type == "int" else "U8"
    if codes.dtype != dtype or len(codes.shape) != 2 or not 1 <= bits <= 8:
        raise ValueError(f"{what}: found codes {codes.dtype} {codes.shape} of {bits} bits, wanted {dtype} [out, in]")
    rows, columns = codes.shape
    most = columns if name == "weight" else columns * (32 if dtype == "I32" else 8) // bits
    sizes = [rows, most]
    if "weight_shape" in wanted:
        of_sizes = types["weight_shape"]
        if of_sizes.shape != (2,) or of_sizes.dtype not in ("I64", "I32"):
            raise ValueError(f"{what}: found weight_shape {of_sizes.dtype} {of_sizes.shape}, wanted two integers")
        sizes = files.read(parts["weight_shape"]).tolist()
        if sizes[0] != rows or -(-sizes[1] * bits // 32) != columns:
            raise ValueError(f"{what}: found weight_shape {sizes} for codes of {codes.shape}, wanted what they hold")
    out, width = sizes
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy in ("tensor", "channel"):
        grid = (1,) if strategy == "tensor" else (out, 1)
    else:
        sides: Any = args.block_structure if strategy == "block" else (1, args.group_size)
        if not (sides and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
            raise ValueError(f"{what}: found strategy {strategy!r} with blocks of {shown(sides)}, wanted two sides")
        grid = (-(-out // sides[0]), -(-width // sides[1]))
    if scale.shape != grid and not (strategy == "tensor" and scale.shape in ((), (1, 1))):
        raise ValueError(
            f"{what}: found weight_scale {scale.shape} for a weight of {(out, width)}, wanted {grid}, as strategy "
            f"{strategy!r} says"
        )
    dtypes = ("F8_E4M3",) if format.startswith("nvfp4") else ("U8",) if format.startswith("mx") else _SCALES
    number = types.get("weight_global_scale")
    if scale.dtype not in dtypes or (number and (number.dtype != "F32" or number.shape not in ((), (1,)))):
        raise ValueError(f"{what}: found scales {scale} and {number}, wanted one of {dtypes} under one number, if any")
    return out, width


def _check_about(about: Any) -> None:
    """Raise ValueError for a `quantization_config` with formats that are not known here, rotations or sparsity.

    compressed-tensors imports a format that is called like a file.
    """
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"found config_groups={shown(groups)}, wanted an object of groups")
    found = [key for key in ("transform_config", "sparsity_config") if about.get(key)]
    if found:
        raise ValueError(f"found {shown(found)}, which is not undone here, wanted quantized weights only")
    known = {"naive-quantized", *(scheme.format for scheme in SCHEMES.values())}
    named = {f"{name}.format": group.get("format") or about.get("format") for name, group in groups.items()}
    if about.get("format") not in (None, "mixed-precision"):
        named["format"] = about["format"]
    for where, format in named.items():
        if not isinstance(format, str) or format not in known:
            raise ValueError(f"found {shown(where)}={shown(format)}, wanted one of {sorted(known)}")


def _schemes_of(modules: Iterable[str], schemes: list[Any]) -> dict[str, Any]:
    """For each module the scheme that names it, or whose pattern matches it, or that is for all Linear modules.

    Of several patterns it is the first in the alphabet, as in compressed-tensors' `match_targets`.

    Patterns come with the files: all of them together have `MOST_SECONDS`, since some never end.
    """
    import regex  # which can be told to stop; transformers has it too

    until = monotonic() + MOST_SECONDS
    found: dict[str, Any] = {}

    def left() -> float:
        if (seconds := until - monotonic()) <= 0:
            raise TimeoutError
        return seconds

    def compiled(target: str) -> Any:
        left()
        return regex.compile(check_name(target, "config_groups").removeprefix("re:"))

    of = {target: scheme for scheme in schemes for target in scheme.targets}
    try:
        patterns = [(compiled(target), of[target]) for target in sorted(of) if target.startswith("re:")]
        for module in modules:
            matching = (scheme for pattern, scheme in patterns if pattern.match(module, timeout=left()))
            scheme = of.get(module) or next(matching, None) or of.get("Linear")
            if scheme is None:
                raise ValueError(f"module {module!r}: found no scheme among {shown([s.targets for s in schemes])}")
            found[module] = scheme
    except TimeoutError as error:
        raise ValueError(
            f"config_groups: found patterns that take more than {MOST_SECONDS} seconds to match, such as "
            f"{shown([t for s in schemes for t in s.targets][:3])}, wanted names or plainer patterns"
        ) from error
    except (regex.error, RecursionError) as error:
        raise ValueError(f"config_groups: found a pattern that is none: {error}") from error
    return found


def _check(plan: ExportPlan) -> None:
    _check_global_scales(plan)
    check_inputs(plan)


def _note(plan: ExportPlan) -> str | None:
    alone = [source.name for source in plan.sources if source.group and not source.inputs]
    added = [name for name in alone if plan.schemes[name].inputs is not None]
    if not added:
        return None
    return (
        f"group {added[0]!r} and {len(added) - 1} more: found weights alone, whose inputs this reader quantizes too, "
        "when the model runs; to simulate it, select inputs: Rule(pattern, weights, inputs)"
    )


TARGET = Target("compressed-tensors", "compressed-tensors", _documents, SCHEMES, _check, _note, _encode)
