"""To be imported where torch.compile traces: it is told of the functions of `traced`, which imports Dynamo, 0.8 s."""

import torch

from fq_transforms.ops.traced import FUNCTIONS

for function in FUNCTIONS:
    torch.compiler.allow_in_graph(function)
