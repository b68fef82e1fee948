"""How compressed-tensors describes what is quantized: one scheme per format of weights and of their inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fq_transforms.export.layouts.plan import FormatKey, FormatKeys, format_key
from fq_transforms.formats import FORMATS

__all__ = ["FORMAT_KEYS", "SCHEMES", "Scheme", "packed_int8", "with_inputs"]


class Scheme(NamedTuple):
    """A compressor, its name for the codes, and the arguments of weights and of inputs, as config.json has them."""

    format: str
    codes: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


_NAMES = (
    *("INT8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "INT4_BLOCK128"),
    *("FP8", "FP8_PER_CHANNEL", "FP8_BLOCK", "NVFP4", "MXFP8", "MXFP6_E2M3", "MXFP4"),
)
# By the names that the formats have here; one has no constant.
FORMAT_KEYS: dict[str, FormatKey] = {name: format_key(FORMATS[name]) for name in _NAMES}
FORMAT_KEYS["INT4_BLOCK64"] = ("int4", "1x64", "fp32")


def _args(bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | others


_NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_WEIGHTS: dict[str, Scheme] = {
    "INT8": Scheme("int-quantized", "weight", _args(8, "int", "tensor")),
    "INT8_PER_CHANNEL": Scheme("int-quantized", "weight", _args(8, "int", "channel")),
    **{
        f"INT4_BLOCK{size}": Scheme("pack-quantized", "weight_packed", _args(4, "int", "group", group_size=size))
        for size in (32, 64, 128)
    },
    "FP8": Scheme("float-quantized", "weight", _args(8, "float", "tensor")),
    "FP8_PER_CHANNEL": Scheme("float-quantized", "weight", _args(8, "float", "channel")),
    "FP8_BLOCK": Scheme("float-quantized", "weight", _args(8, "float", "block", block_structure=[128, 128])),
    "NVFP4": Scheme("nvfp4-pack-quantized", "weight_packed", _args(4, "float", "tensor_group", **_NV)),
    "MXFP8": Scheme("mxfp8-quantized", "weight", _args(8, "float", "group", **_MX)),
    "MXFP6_E2M3": Scheme("mxfp6-pack-quantized", "weight_packed", _args(6, "float", "group", **_MX)),
    "MXFP4": Scheme("mxfp4-pack-quantized", "weight_packed", _args(4, "float", "group", **_MX)),
}
# Inputs: scales in the files ("dynamic": False), made when the model runs (True), or both (NVFP4's "local").
_INPUTS: dict[FormatKey, dict[str, Any]] = {
    FORMAT_KEYS["INT8"]: _args(8, "int", "tensor", dynamic=False),
    FORMAT_KEYS["INT8_PER_CHANNEL"]: _args(8, "int", "token", dynamic=True),
    FORMAT_KEYS["FP8"]: _args(8, "float", "tensor", dynamic=False),
    FORMAT_KEYS["FP8_PER_CHANNEL"]: _args(8, "float", "token", dynamic=True),
    FORMAT_KEYS["NVFP4"]: _args(4, "float", "tensor_group", dynamic="local", **_NV),
    FORMAT_KEYS["MXFP8"]: _args(8, "float", "group", dynamic=True, **_MX),
    FORMAT_KEYS["MXFP4"]: _args(4, "float", "group", dynamic=True, **_MX),
}
_BESIDE: dict[str, tuple[FormatKey, ...]] = {
    "INT8_PER_CHANNEL": (FORMAT_KEYS["INT8"], FORMAT_KEYS["INT8_PER_CHANNEL"]),
    "FP8": (FORMAT_KEYS["FP8"],),
    "FP8_PER_CHANNEL": (FORMAT_KEYS["FP8_PER_CHANNEL"],),
    "NVFP4": (FORMAT_KEYS["NVFP4"],),
    "MXFP8": (FORMAT_KEYS["MXFP8"],),
    "MXFP4": (FORMAT_KEYS["MXFP4"],),
}
# All that the layout has a name for.
SCHEMES: dict[FormatKeys, Scheme] = {
    **{(FORMAT_KEYS[name], None): scheme for name, scheme in _WEIGHTS.items()},
    **{
        (FORMAT_KEYS[name], inputs): _WEIGHTS[name]._replace(inputs=_INPUTS[inputs])
        for name, beside in _BESIDE.items()
        for inputs in beside
    },
}


def with_inputs(name: str, strategy: str, **others: Any) -> Scheme:
    """Of FP8 weights whose inputs a reader quantizes when the model runs, though the spec leaves them alone."""
    return _WEIGHTS[name]._replace(inputs=_args(8, "float", strategy, dynamic=True, **others))


def packed_int8() -> Scheme:
    """Of INT8 weights alone, four codes in an int32, for readers whose INT8 wants quantized inputs."""
    return Scheme("pack-quantized", "weight_packed", _args(8, "int", "channel"))
