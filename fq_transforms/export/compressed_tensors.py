"""Files as compressed-tensors 0.20 reads them, written without it; and plain weights from such files, read by it.

    {module}.weight_packed          codes of less than 8 bits: uint8, or int32 with eight INT4 in each
    {module}.weight                 codes of 8 bits: float8 or int8 [out, in]
    {module}.weight_scale           what codes are multiplied with: fp32 [1], [out, 1], [out, in/block] or
                                    [out/128, in/128]; E4M3 (NVFP4) or E8M0 as uint8 (MX) [out, in/block]
    {module}.weight_global_scale    NVFP4: what scales are divided by, fp32 [1]
    {module}.weight_shape           INT4: [out, in]
    config.json                     `quantization_config`: a scheme for each format, and which modules are not quantized

NOTE integers: fakequant divides by qmax / amax, readers multiply. With the reciprocal five in a million weights would
differ by one step, once rounded to bf16; so of the reciprocal and its neighbours that one is stored by which all codes
come out right. For INT8 there is none in one granule of a hundred thousand: there one code is a step off.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from fq_transforms.checks import DTYPES
from fq_transforms.export.files import Files, bytes_of, check_free, progress, write
from fq_transforms.export.plan import Coded, Kind, Plan, inverse, kind_of, plan, tensors
from fq_transforms.formats import Format, IntElement
from fq_transforms.ops.pack.reference import pack_scales
from fq_transforms.spec import Spec
from fq_transforms.state import State

__all__ = ["compressed_tensors", "decompress", "multipliers"]

# In units of the last place, the nearest first.
NEIGHBOURS = (0, 1, -1, 2, -2)
# What files have of a quantized module.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight_zero_point")


class Scheme(NamedTuple):
    """How compressed-tensors names a format: its compressor, the arguments of its weights, what it calls the codes."""

    format: str
    codes: str
    weights: dict[str, Any]


def _scheme(format: str, codes: str, bits: int, kind: str, strategy: str, **others: Any) -> Scheme:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True}
    return Scheme(format, codes, weights | others)


_NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
SCHEMES: dict[Kind, Scheme] = {
    ("int8", "tensor", "fp32"): _scheme("int-quantized", "weight", 8, "int", "tensor"),
    ("int8", "channel", "fp32"): _scheme("int-quantized", "weight", 8, "int", "channel"),
    **{
        ("int4", f"1x{size}", "fp32"): _scheme("pack-quantized", "weight_packed", 4, "int", "group", group_size=size)
        for size in (32, 64, 128)
    },
    ("e4m3", "tensor", "fp32"): _scheme("float-quantized", "weight", 8, "float", "tensor"),
    ("e4m3", "channel", "fp32"): _scheme("float-quantized", "weight", 8, "float", "channel"),
    ("e4m3", "128x128", "fp32"): _scheme("float-quantized", "weight", 8, "float", "block", block_structure=[128, 128]),
    ("e2m1", "1x16", "e4m3"): _scheme("nvfp4-pack-quantized", "weight_packed", 4, "float", "tensor_group", **_NV),
    ("e4m3", "1x32", "e8m0"): _scheme("mxfp8-quantized", "weight", 8, "float", "group", **_MX),
    ("e2m3", "1x32", "e8m0"): _scheme("mxfp6-pack-quantized", "weight_packed", 6, "float", "group", **_MX),
    ("e2m1", "1x32", "e8m0"): _scheme("mxfp4-pack-quantized", "weight_packed", 4, "float", "group", **_MX),
}


def compressed_tensors(
    params: Mapping[str, Tensor],
    state: State,
    folder: str | os.PathLike[str],
    *,
    spec: Spec,
    config: Any,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint that compressed-tensors reads: `folder` has shards, their index and config.json.

    The codes and scales are those of `fqt.pack`, so a reader gets `fakequant`'s weights. One group is packed at a
    time, and no more than a shard is held. One process calls it, with the whole model; copy tokenizer files afterwards.
    transformers 5.23 loads quantized Linear modules, but of stacked experts only some formats: use `decompress`.

    Args:
        params: `model.state_dict()`: names to tensors [out, in], or stacked [E, out, in], from transformers or
            Megatron-Core. All are written, those that the spec does not name as they are, but for Transformer Engine's
            `_extra_state`, and for a head that is the embedding.
        state: From `calibrate`; roles that engines fuse are tied.
        folder: A new name, or an empty directory. It appears whole or not at all.
        spec: What is packed, and how: any format but MXFP6_E3M2. Weights only.
        config: `model.config` of transformers, or what config.json holds, with `architectures`.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        KeyError: As `modelopt_hf`.
        ValueError: As `modelopt_hf`, or the spec has inputs.
        ImportError: As `modelopt_hf`.
        OSError: As `modelopt_hf`.

    Source: the compressors and `QuantizationConfig` of compressed-tensors 0.20.

    Example:
        >>> import tempfile
        >>> import fq_transforms as fqt
        >>> params = {f"mlp.experts.{i}.up_proj.weight": torch.ones(4, 16) for i in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     compressed_tensors(params, fq.calibrate(params), f"{parent}/model", spec=fq.spec, config=config)
        ...     sorted(path.name for path in Path(parent, "model").iterdir())
        ['config.json', 'model.safetensors']
    """
    path, limit = Path(os.path.realpath(folder)), bytes_of(max_shard_size)
    check_free(path)
    found = plan(params, state, spec, config, target="compressed-tensors", kinds=[(kind, None) for kind in SCHEMES])
    _check_global_scales(found)
    document = found.config | {"quantization_config": _quantization_config(found)}
    encode = partial(_encode, dtype=params[spec.groups[0].names[0]].dtype)
    write(path, tensors(found, encode, f"export {path.name}"), {"config.json": document}, limit)


def decompress(
    folder: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the plain weights that a checkpoint of compressed-tensors stands for, as its own decompressors read them.

    What is written is an ordinary checkpoint of transformers with `fakequant`'s weights, which `from_pretrained`
    loads into any class, also where it does not load the compressed one.

    Args:
        folder: From `compressed_tensors`, or another whose `config_groups` name their formats.
        to: A new name, or an empty directory. It appears whole or not at all.
        dtype: Of the weights that were quantized: bf16, fp16 or fp32.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        ValueError: `folder` is no such checkpoint, `to` is not empty, a module's tensors are incomplete, or `dtype` is
            another.
        ImportError: compressed-tensors or tqdm is not installed.
        OSError: A file cannot be read or written.

    Source: `BaseCompressor.decompress`, compressed-tensors 0.20.

    Example:
        >>> import tempfile
        >>> import fq_transforms as fqt
        >>> params = {"up_proj.weight": torch.full((4, 16), 6.0)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        >>> config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     compressed_tensors(params, fq.calibrate(params), f"{parent}/a", spec=fq.spec, config=config)
        ...     decompress(f"{parent}/a", f"{parent}/b")
        ...     json.loads(Path(parent, "b", "config.json").read_text())["dtype"]
        'bfloat16'
    """
    source, path, limit = Path(folder), Path(os.path.realpath(to)), bytes_of(max_shard_size)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype}, wanted bfloat16, float16 or float32")
    check_free(path)
    config = json.loads((source / "config.json").read_text())
    about = config.pop("quantization_config", {})
    if about.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"folder {str(source)!r}: found quant_method {about.get('quant_method')!r} in config.json, wanted "
            "'compressed-tensors'"
        )
    _check_weights_only(source, about)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write(path, _decompressed(source, about, dtype), {"config.json": config}, limit)


def _check_global_scales(plan: Plan) -> None:
    """Raise ValueError where a global scale is so small that its reciprocal, which readers divide by, is infinite."""
    for key, group in plan.groups.items():
        leaves = plan.state[key]
        if group.format.scale != "e4m3" or not leaves:
            continue
        _, scale = pack_scales(leaves["amax"], leaves.get("global_amax"), format=group.format)
        assert scale is not None
        wrong = ((scale > 0) & scale.reciprocal().isinf()).nonzero()
        if len(wrong):
            expert = int(wrong[0, 0])
            raise ValueError(
                f"state {key!r}: found an amax so small for {group.expert_name(expert)!r} that its global scale "
                f"{scale[expert].item()} has no reciprocal in fp32, wanted 0 or a larger one; scale the weights up, or "
                "set them to 0"
            )


def multipliers(scale: Float32[Tensor, "..."], element: IntElement, dtype: torch.dtype) -> Float32[Tensor, "..."]:
    """What codes are multiplied with to get what dividing by `scale` gives, in `dtype`; see NOTE integers.

    Of the numbers next to the reciprocal the one by which fewest codes differ, the nearest of several. In fp32 it is
    the reciprocal, since quotients and products differ there anyway. For a scale of 0 it is 0.

    Example:
        >>> from fq_transforms.formats import IntElement
        >>> multipliers(torch.tensor([4.0, 0.0]), IntElement(qmax=127, low=-127, high=127), torch.bfloat16)
        tensor([0.2500, 0.0000])
    """
    nominal = inverse(scale, of_zero=0.0)
    if dtype == torch.float32:
        return nominal
    codes = torch.arange(1.0, max(-element.low, element.high) + 1, device=scale.device)
    wanted = (codes / scale[..., None]).to(dtype)
    best, fewest = nominal, torch.full_like(scale, torch.inf)
    for step in NEIGHBOURS:
        neighbour = torch.where(scale == 0, nominal, (nominal.view(torch.int32) + step).view(torch.float32))
        wrong = ((codes * neighbour[..., None]).to(dtype) != wanted).sum(-1).float()
        best, fewest = torch.where(wrong < fewest, neighbour, best), torch.minimum(wrong, fewest)
    return best


def _encode(coded: Coded, *, dtype: torch.dtype) -> dict[str, Tensor]:
    codes, scale, global_scale = coded.codes, coded.scale, coded.global_scale
    scheme = SCHEMES[kind_of(coded.format)]
    if isinstance(coded.format.element, IntElement):
        scale = multipliers(scale, coded.format.element, dtype)
    own = {scheme.codes: codes, "weight_scale": scale if scale.dim() else scale[None]}
    if scheme.format == "pack-quantized":
        shape = torch.tensor([codes.shape[0], 2 * codes.shape[1]])
        own |= {scheme.codes: codes.view(torch.int32), "weight_shape": shape}
    if global_scale is not None:
        own["weight_global_scale"] = inverse(global_scale, of_zero=1.0)[None]
    return own


def _quantization_config(plan: Plan) -> dict[str, Any]:
    of_format: dict[Format, list[str]] = {}
    for module, (format, _) in plan.formats.items():
        of_format.setdefault(format, []).append(module)
    groups = {
        f"group_{n}": {
            "targets": ["Linear"] if len(of_format) == 1 else _patterns(modules),
            "weights": SCHEMES[kind_of(format)].weights,
            "format": SCHEMES[kind_of(format)].format,
        }
        for n, (format, modules) in enumerate(of_format.items())
    }
    formats = {SCHEMES[kind_of(format)].format for format in of_format}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plan.excluded,
    }


def _patterns(modules: list[str]) -> list[str]:
    """Regular expressions that match these modules; experts of one role are one."""
    experts = [re.sub(r"\\\.experts\\\.\d+\\\.", r"\\.experts\\.\\d+\\.", re.escape(module)) for module in modules]
    return [f"re:^{pattern}$" for pattern in dict.fromkeys(experts)]


def _decompressed(folder: Path, about: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All weights of a checkpoint, a module at a time."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise ImportError("decompress needs compressed-tensors: pip install 'fq_transforms[export]'") from error
    schemes = [QuantizationScheme.model_validate(group) for group in about["config_groups"].values()]
    with Files(folder) as files:
        modules = [name.removesuffix(".weight_scale") for name in files.shards if name.endswith(".weight_scale")]
        names_of: dict[str, list[str]] = {module: [] for module in modules}
        for name in files.shards:
            module = name.rpartition(".")[0]
            if module in names_of and not name.endswith(".bias"):
                names_of[module].append(name)
            else:
                yield name, files.read(name)
        for module in progress(modules, f"decompress {folder.name}"):
            scheme = _scheme_of(module, schemes)
            compressor: Any = BaseCompressor.get_value_from_registry(str(scheme.format or about["format"]))
            stored = {name.removeprefix(f"{module}."): files.read(name) for name in names_of[module]}
            _check_stored(module, stored, compressor.compression_param_names(scheme))
            yield f"{module}.weight", compressor.decompress(stored, scheme)["weight"].to(dtype)


def _check_stored(module: str, stored: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError unless a module has its codes, and nothing that a decompressor would pass over."""
    wanted = {"weight", "weight_packed"} & set(known)
    others = stored.keys() - PARTS
    if not wanted <= stored.keys() or others:
        raise ValueError(f"module {module!r}: found {sorted(stored)}, wanted {sorted(wanted)}, and none but {PARTS}")


def _check_weights_only(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise ValueError for what plain weights do not say: rotations, sparsity, quantized activations or caches."""
    found = [key for key in ("transform_config", "sparsity_config", "kv_cache_scheme") if about.get(key)]
    for name, group in about["config_groups"].items():
        found += [f"{name}.{key}" for key in ("input_activations", "output_activations") if group.get(key)]
    if found:
        raise ValueError(
            f"folder {str(folder)!r}: found {found} in quantization_config, which plain weights cannot have, wanted "
            "quantized weights only"
        )


def _scheme_of(module: str, schemes: list[Any]) -> Any:
    """The scheme whose targets match a module, or the one that is for all Linear modules."""
    for scheme in schemes:
        if any((t.startswith("re:") and re.match(t[3:], module)) or t == module for t in scheme.targets):
            return scheme
    for scheme in schemes:
        if "Linear" in scheme.targets:
            return scheme
    raise ValueError(f"module {module!r}: found no scheme among {[scheme.targets for scheme in schemes][:3]}")
