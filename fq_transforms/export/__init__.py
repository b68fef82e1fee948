"""Files that inference engines load: safetensors in shards, an index, config.json.

    save                    a folder in a layout (compressed-tensors, ModelOpt's, plain weights), for a reader
    decompress              a folder of compressed-tensors to one of plain weights, which any transformers loads
    interleave              block scales in the order that tensor cores read them; deinterleave: and back

Names are those of the model's files on the hub, whatever the names in memory are: see `fq_transforms.export.names`.
Who reads what: `fq_transforms.export.readers`, and the table in docs/export.
"""

from fq_transforms.export.compressed_tensors import decompress
from fq_transforms.export.interleave import deinterleave, interleave
from fq_transforms.export.save import save

__all__ = ["decompress", "deinterleave", "interleave", "save"]
