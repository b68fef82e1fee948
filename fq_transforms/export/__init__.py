"""Files that inference engines load: safetensors in shards, an index, config.json.

    save                    a model in memory to a folder in a layout, for a reader
    folder                  a folder to another, streamed: quantized, or what is quantized to plain weights
    inspect                 what is in a folder; report: what quantization would do to it; compare: it and another
    LayerFiles              a model in files, calibrated layer by layer
    interleave              block scales in the order that tensor cores read them; deinterleave: and back

Names are those of the model's files on the hub, whatever the names in memory are: see `fq_transforms.export.names`.
Who reads what: `fq_transforms.export.readers`, and the table in docs/export.

Behind these doors are rooms, lowest first: `files`, bytes and directories; `names`, from memory to files; `layouts`,
how files hold weights; `streaming`, a folder to another in pieces.
"""

from fq_transforms.export.compare import compare
from fq_transforms.export.folder import folder
from fq_transforms.export.inspect import inspect
from fq_transforms.export.interleave import deinterleave, interleave
from fq_transforms.export.layers import LayerFiles
from fq_transforms.export.report import report
from fq_transforms.export.save import save

__all__ = ["LayerFiles", "compare", "deinterleave", "folder", "inspect", "interleave", "report", "save"]
