"""Files that inference engines load: safetensors in shards, an index, config.json.

    compressed_tensors      as compressed-tensors 0.20 reads them, and through it transformers, vLLM and SGLang
    modelopt_hf             as ModelOpt 0.47's unified export writes them, for TensorRT-LLM, vLLM and SGLang
    decompress              a folder of compressed_tensors to one of plain weights, which any transformers loads
    interleave              block scales in the order that tensor cores read them; deinterleave: and back

Names are those of the model's files on the hub, whatever the names in memory are: see `fq_transforms.export.names`.
"""

from fq_transforms.export.compressed_tensors import compressed_tensors, decompress
from fq_transforms.export.interleave import deinterleave, interleave
from fq_transforms.export.modelopt import modelopt_hf

__all__ = ["compressed_tensors", "decompress", "deinterleave", "interleave", "modelopt_hf"]
