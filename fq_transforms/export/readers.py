"""Who reads which files: by layout, reader and place, the formats that load, and how they are spelled for it.

A place is "experts", "linears" (every other matrix that is quantized) or "lm_head". Each row was loaded by the reader
itself and compared with `fakequant`: `.ci/engines` for vLLM, tests/export for transformers. What is not here is
refused.
"""

from fq_transforms.export.layouts.plan import Engine, FormatKeys
from fq_transforms.export.layouts.schemes import FORMAT_KEYS, Scheme, packed_int8, with_inputs
from fq_transforms.formats import check_layout
from fq_transforms.parse import nearest

__all__ = ["PLACES", "READERS", "engine_of"]

PLACES = ("experts", "linears", "lm_head")


def _own(*names: str) -> dict[FormatKeys, Scheme | None]:
    """As the layout has it: weights alone, or with inputs of a format behind a slash."""
    found: dict[FormatKeys, Scheme | None] = {}
    for name in names:
        weights, _, inputs = name.partition("/")
        found[FORMAT_KEYS[weights], FORMAT_KEYS[inputs] if inputs else None] = None
    return found


_INT4 = ("INT4_BLOCK32", "INT4_BLOCK64", "INT4_BLOCK128")
# vLLM's FP8 and INT8 kernels of experts always quantize inputs: they are declared, made when the model runs. INT8 goes
# to its kernels for weights alone.
_VLLM = {
    **_own("NVFP4", "NVFP4/NVFP4", "MXFP8", "MXFP8/MXFP8", "MXFP4", "MXFP4/MXFP4", *_INT4, "FP8/FP8"),
    **_own("FP8_PER_CHANNEL/FP8_PER_CHANNEL", "INT8_PER_CHANNEL/INT8_PER_CHANNEL"),
    (FORMAT_KEYS["INT8_PER_CHANNEL"], None): packed_int8(),
    (FORMAT_KEYS["INT8"], None): packed_int8(),
}
_VLLM_EXPERTS = _VLLM | {
    (FORMAT_KEYS["FP8"], None): with_inputs("FP8", "tensor"),
    (FORMAT_KEYS["FP8_PER_CHANNEL"], None): with_inputs("FP8_PER_CHANNEL", "token"),
    (FORMAT_KEYS["FP8_BLOCK"], None): with_inputs("FP8_BLOCK", "group", group_size=128),
}
_VLLM_LINEARS = _VLLM | _own("FP8", "FP8_PER_CHANNEL", "INT8_PER_CHANNEL/INT8")
# MXFP4 and MXFP6 experts become bf16 there, whatever config says. Packed codes want experts alike: `plan`.
_TRANSFORMERS = _own("FP8", "FP8_PER_CHANNEL", *_INT4)
_TRANSFORMERS_LINEARS = _TRANSFORMERS | _own("FP8_BLOCK")
_NOT_IN_VLLM = ("Dots1ForCausalLM",)
READERS: dict[str, dict[str, Engine]] = {
    "compressed-tensors": {
        "vllm": Engine(
            "vllm",
            "0.32",
            {"experts": _VLLM_EXPERTS, "linears": _VLLM_LINEARS | _own("FP8_BLOCK"), "lm_head": _VLLM_LINEARS},
            _NOT_IN_VLLM,
        ),
        "transformers": Engine(
            "transformers",
            "5.23",
            {
                "experts": _TRANSFORMERS | _own("MXFP4", "MXFP6_E2M3"),
                "linears": _TRANSFORMERS_LINEARS,
                "lm_head": _TRANSFORMERS_LINEARS,
            },
        ),
    },
    "modelopt": {
        "vllm": Engine(
            "vllm",
            "0.32",
            {place: _own("NVFP4", "NVFP4/NVFP4", "MXFP8", "MXFP8/MXFP8", "FP8/FP8") for place in PLACES},
            _NOT_IN_VLLM,
        ),
    },
    "fp8": {"vllm": Engine("vllm", "0.32", dict.fromkeys(PLACES[:2], _own("FP8_BLOCK")), _NOT_IN_VLLM)},
    "plain": {"vllm": Engine("vllm", "0.32", None, _NOT_IN_VLLM), "transformers": Engine("transformers", "5.23", None)},
}


def engine_of(layout: str, reader: str | None) -> Engine | None:
    """What a reader loads of a layout; None for no reader. Raises ValueError if it reads no such layout."""
    readers = READERS[check_layout(layout)]
    if reader is None or str(reader) in readers:
        return None if reader is None else readers[str(reader)]
    meant = nearest(str(reader), {name for some in READERS.values() for name in some})[0]
    of = [name for name, some in READERS.items() if meant in some]
    raise ValueError(
        f"reader: found {reader!r} of layout {layout!r}, wanted one of {sorted(readers)}, or None; {meant!r} reads {of}"
    )
