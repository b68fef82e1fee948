"""Files that inference engines load: safetensors in shards, an index, config.json.

    compressed_tensors      as compressed-tensors 0.20 reads them, and through it transformers, vLLM and SGLang
    modelopt_hf             as ModelOpt 0.47's unified export writes them, for TensorRT-LLM, vLLM and SGLang
    decompress              a checkpoint of compressed_tensors to one of plain weights, which any transformers loads

Names are those of the model's files on the hub, whatever the names in memory are: see `fq_transforms.export.names`.
Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fq_transforms.export.compressed import compressed_tensors, decompress
    from fq_transforms.export.modelopt import modelopt_hf

__all__ = ["compressed_tensors", "decompress", "modelopt_hf"]

_HOME = {"compressed_tensors": "compressed", "decompress": "compressed", "modelopt_hf": "modelopt"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
