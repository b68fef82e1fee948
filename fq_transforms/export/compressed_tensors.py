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

Source: the compressors, `QuantizationConfig` and `BaseCompressor.decompress` of compressed-tensors 0.20.
"""

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from fq_transforms.checkpoint.storage import local_path
from fq_transforms.checks import DTYPES
from fq_transforms.export.files import Files, bytes_of, check_free, progress, read_document, write
from fq_transforms.export.plan import CodedWeight, ExportPlan, Target, check_inputs, largest
from fq_transforms.export.schemes import SCHEMES, Scheme
from fq_transforms.ops.quantize.reference import expert_scale
from fq_transforms.parse import check_name, shown

__all__ = ["TARGET", "decompress"]

# For all patterns of a folder to be matched; 50,000 modules and ten patterns take half a second.
MOST_SECONDS = 10

# What files may hold of a quantized module.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight_zero_point")


def decompress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the plain weights that a folder of compressed-tensors stands for, as its own decompressors read them.

    It is an ordinary folder of transformers, which `from_pretrained` loads into any class.

    Args:
        source: From `save`, or another whose `config_groups` name their formats.
        destination: A new name, or an empty directory. It appears whole or not at all.
        dtype: Of the weights that were quantized: bf16, fp16 or fp32; of NVFP4 bf16.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        ValueError: `source` is no such folder, or says what plain weights cannot; `destination` is taken; tensors of a
            module are missing or unexpected; `dtype` is another.
        ImportError: compressed-tensors or tqdm is not installed.
        OSError: A file cannot be read or written.

    Source: `BaseCompressor.decompress`, compressed-tensors 0.20.

    Example:
        >>> import tempfile
        >>> import fq_transforms as fqt
        >>> from fq_transforms.export import save
        >>> params = {"up_proj.weight": torch.full((4, 16), 6.0)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}), layout="compressed-tensors")
        >>> config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save(f"{parent}/a", fq, params, fq.calibrate(params), config=config)
        ...     decompress(f"{parent}/a", f"{parent}/b")
        ...     json.loads(Path(parent, "b", "config.json").read_text())["dtype"]
        'bfloat16'
    """
    folder, limit = local_path(destination), bytes_of(max_shard_size)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype}, wanted bfloat16, float16 or float32")
    check_free(folder)
    compressed = local_path(source)
    config = read_document(compressed / "config.json")
    about = config.pop("quantization_config", None)
    try:
        formats = _check_about(about)
    except ValueError as error:
        raise ValueError(f"folder {str(source)!r}: quantization_config in config.json: {error}") from error
    if "nvfp4-pack-quantized" in formats and dtype != torch.bfloat16:
        raise ValueError(
            f"dtype: found {dtype} for NVFP4, which compressed-tensors decompresses to bfloat16 only, wanted "
            "torch.bfloat16; or save(..., layout='plain')"
        )
    config["dtype"] = str(dtype).removeprefix("torch.")
    try:
        write(folder, _decompressed(compressed, about, dtype), {"config.json": config}, limit)
    except ValueError as error:
        raise ValueError(f"folder {str(source)!r}: {error}") from error


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
                f"state {group.key!r}: found an amax so small for {group.expert_name(expert)!r} that its global scale "
                f"{scale[expert].item()} has no reciprocal in fp32, wanted 0 or a larger one; scale the weights up, or "
                "set them to 0"
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


def _decompressed(folder: Path, about: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All weights of a folder, module by module."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise ImportError("decompress needs compressed-tensors: pip install 'fq_transforms[export]'") from error
    try:
        schemes = [QuantizationScheme.model_validate(group) for group in about["config_groups"].values()]
    except Exception as error:  # its own checks compare what they are given
        raise ValueError(f"config_groups in config.json: {str(error)[:500]}") from error
    with Files(folder) as files:
        modules = [name.removesuffix(".weight_scale") for name in files.shards if name.endswith(".weight_scale")]
        scheme_of = _schemes_of(modules, schemes)
        names_of: dict[str, list[str]] = {module: [] for module in modules}
        for name in files.shards:
            module = name.rpartition(".")[0]
            if module in names_of and not name.endswith(".bias"):
                names_of[module].append(name)
            else:
                yield name, files.read(name)
        for module in progress(modules, f"decompress {folder.name}"):
            scheme = scheme_of[module]
            compressor: Any = BaseCompressor.get_value_from_registry(str(scheme.format or about["format"]))
            stored = {name.removeprefix(f"{module}."): files.read(name) for name in names_of[module]}
            _check_stored(module, stored, compressor.compression_param_names(scheme))
            shape = _shape_of(module, stored, scheme.weights.num_bits)
            try:
                weight = compressor.decompress(stored, scheme)["weight"]
            except Exception as error:  # whatever it finds wrong with numbers, shapes and arguments
                raise ValueError(f"module {module!r}: {type(error).__name__}: {str(error)[:500]}") from error
            if weight.shape != shape:
                raise ValueError(f"module {module!r}: found a weight of {tuple(weight.shape)}, wanted {shape}")
            yield f"{module}.weight", weight.to(dtype)


def _check_stored(module: str, stored: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError unless a module has its codes, and nothing that a decompressor would ignore."""
    wanted = {"weight", "weight_packed"} & set(known)
    others = stored.keys() - PARTS
    if not wanted <= stored.keys() or others:
        raise ValueError(f"module {module!r}: found {sorted(stored)}, wanted {sorted(wanted)}, and nothing but {PARTS}")


def _shape_of(module: str, stored: Mapping[str, Tensor], bits: int) -> tuple[int, ...]:
    """The shape of the weight that codes stand for, [out, in]; with no more scales, by which it would be made larger.

    Raises:
        ValueError: Codes or scales are no matrix, or do not fit.
    """
    packed, scale = stored.get("weight_packed"), stored["weight_scale"]
    codes = stored["weight"] if packed is None else packed
    if codes.dim() != 2 or not 1 <= bits <= 8:
        raise ValueError(f"module {module!r}: found codes {tuple(codes.shape)} of {bits} bits, wanted a matrix")
    rows, columns = codes.shape
    most = columns if packed is None else columns * 8 * codes.element_size() // bits
    sizes = stored["weight_shape"].flatten()[:3].tolist() if "weight_shape" in stored else [rows, most]
    if len(sizes) != 2 or sizes[0] != rows or not 0 < sizes[1] <= most:
        raise ValueError(f"module {module!r}: found weight_shape {sizes} for codes of {tuple(codes.shape)}")
    fits = scale.numel() == 1 or (scale.dim() == 2 and scale.shape[0] <= rows and scale.shape[1] <= sizes[1])
    if not fits:
        raise ValueError(f"module {module!r}: found weight_scale {tuple(scale.shape)} for a weight of {tuple(sizes)}")
    return tuple(sizes)


def _check_about(about: Any) -> set[str]:
    """The formats that a `quantization_config` names, each of which is known here.

    compressed-tensors imports a format that is called like a file. Raises ValueError for such, and for what plain
    weights do not say: rotations, sparsity, quantized activations or caches.
    """
    method = about.get("quant_method") if isinstance(about, dict) else about
    if method != "compressed-tensors":
        raise ValueError(f"found quant_method {shown(method)}, wanted 'compressed-tensors'")
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"found config_groups={shown(groups)}, wanted an object of groups")
    found = [key for key in ("transform_config", "sparsity_config", "kv_cache_scheme") if about.get(key)]
    for name, group in groups.items():
        found += [f"{name}.{key}" for key in ("input_activations", "output_activations") if group.get(key)]
    if found:
        raise ValueError(f"found {shown(found)}, which plain weights cannot have, wanted quantized weights only")
    known = {scheme.format for scheme in SCHEMES.values()}
    named = {f"{name}.format": group.get("format") or about.get("format") for name, group in groups.items()}
    if about.get("format") not in (None, "mixed-precision"):
        named["format"] = about["format"]
    for where, format in named.items():
        if not isinstance(format, str) or format not in known:
            raise ValueError(f"found {shown(where)}={shown(format)}, wanted one of {sorted(known)}")
    return {str(format) for format in named.values()}


def _schemes_of(modules: Iterable[str], schemes: list[Any]) -> dict[str, Any]:
    """For each module the scheme whose targets match it, or else the one that is for all Linear modules.

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

    exact = {target: scheme for scheme in reversed(schemes) for target in scheme.targets}
    try:
        patterns = [(compiled(t), s) for s in schemes for t in s.targets if t.startswith("re:")]
        for module in modules:
            matching = (scheme for pattern, scheme in patterns if pattern.match(module, timeout=left()))
            scheme = next(matching, None) or exact.get(module) or exact.get("Linear")
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
    alone = [source.name for source in plan.sources if source.group and not source.inputs]
    if added := [name for name in alone if plan.schemes[name].inputs is not None]:
        warnings.warn(
            f"group {added[0]!r} and {len(added) - 1} more: found weights alone, whose inputs this reader quantizes "
            "too, when the model runs; to simulate it, select inputs: Rule(pattern, weights, inputs)",
            stacklevel=4,
        )


TARGET = Target("compressed-tensors", "compressed-tensors", _documents, SCHEMES, _check, _encode)
