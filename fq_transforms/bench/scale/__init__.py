"""`python -m fq_transforms.bench scale`: training and conversion on several ranks, every law checked before its row.

`launch` starts torchrun for each job, gathers what its ranks found, and writes the page; `rank` is what it starts;
`steps` has steps of bf16 and of the lens in turns on all ranks, and equality with one GPU; the rest are the parts.
"""
