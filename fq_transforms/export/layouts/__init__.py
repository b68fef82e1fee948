"""How files hold weights: one layout or encoding per file, and what they share.

    compressed_tensors      compressed-tensors' files, written and read
    modelopt                those of ModelOpt's HF export, written and read
    fp8                     DeepSeek's square FP8 blocks, written and read
    mxfp4                   gpt-oss's stacks of MXFP4, read only
    plan                    what a layout says of itself: `Target`; what becomes of each weight, and its tensors
    schemes                 how compressed-tensors describes formats
    stored                  scales as files hold them, and the weights that a reader then gets
    encoded                 weights found in codes, and what decodes them

A new one is a file here. If it is written: its name in Layout and LAYOUTS of `fq_transforms.formats`, its line in
LAYOUTS of `fq_transforms.export.save`. If it is read: its line in READS of `fq_transforms.export.streaming.sources`.
Who loads it: `fq_transforms.export.readers`.
"""
