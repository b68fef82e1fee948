"""Weights that are reported."""

import torch

import fq_transforms as fqt
from tests.cases import experts


def parameters(layout, shape, count=4, dtype=torch.float32):
    weights = experts(count, shape, dtype)
    if layout == "stacked":
        return {"0.experts.w": torch.stack(weights)}, ()
    if layout == "transposed":
        return {"0.experts.w": torch.stack(weights).mT.contiguous()}, ("*",)
    if layout == "dense":
        return {"0.w": weights[0]}, ()
    return {f"0.experts.{i}.w": weight for i, weight in enumerate(weights)}, ()


def model(formats, layers=3, count=4, shape=(32, 64)):
    """Layers of experts with a role per format, their Transform, and the state of their own weights."""
    params = {
        f"layers.{layer}.experts.{i}.w{role}": weight
        for layer in range(layers)
        for role in range(len(formats))
        for i, weight in enumerate(experts(count, shape, seed=10 * layer + role))
    }
    fq = fqt.transform(fqt.select(params, {f"*.w{role}": format for role, format in enumerate(formats)}))
    return params, fq, fq.calibrate(params)
