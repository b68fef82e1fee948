"""What is measured: the expert weights of real models on one GPU, and all formats."""

from typing import NamedTuple

import torch
from torch import Tensor

import fq_transforms as fqt
from fq_transforms.formats import FORMATS, Format
from fq_transforms.state import State


class Shape(NamedTuple):
    """N experts of [out, in], and the model they come from."""

    experts: int
    out_features: int
    in_features: int
    model: str

    def __str__(self) -> str:
        return f"{self.experts} x [{self.out_features}, {self.in_features}]"


SHAPES = [
    Shape(32, 1856, 2688, "Nemotron-3-Nano fc1, EP=4"),
    Shape(32, 2688, 1856, "Nemotron-3-Nano fc2, EP=4"),
    Shape(128, 2688, 1024, "128 experts"),
    Shape(32, 5120, 8192, "Ultra"),
    Shape(8, 4096, 7168, "DeepSeek-V3 fc1, EP=32"),
    Shape(8, 7168, 2048, "DeepSeek-V3 fc2, EP=32"),
    Shape(16, 3072, 4096, "Qwen3-235B, EP=8"),
    Shape(16, 5760, 2880, "gpt-oss-120b, EP=8"),
]
# Where the peers are timed too.
PEER_SHAPES = SHAPES[:4]

ALL: list[Format] = [FORMATS[name] for name in fqt.__all__ if name in FORMATS]


def fits(format: Format, shape: Shape) -> bool:
    """True if the format's block divides `in`."""
    columns = format.block[1]
    return not format.has_blocks_along_in or columns is None or shape.in_features % columns == 0


def expert_weights(shape: Shape) -> Tensor:
    """fp32 weights [E, out, in], each expert at its own magnitude."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (shape.experts, shape.out_features, shape.in_features)
    scale = torch.logspace(-3, 0, shape.experts, device="cuda")[:, None, None]
    return torch.randn(size, generator=generator, device="cuda").mul_(scale)


def user(
    weights: list[Tensor], format: Format, *, separate: bool = False
) -> tuple[dict[str, Tensor], fqt.Transform, State]:
    """What a user has before a call: parameters, the transform, the state."""
    params = {f"experts.{i}.weight": w for i, w in enumerate(weights)}
    fq = fqt.transform(fqt.select(params, {"*": format}), separate=separate)
    return params, fq, fq.calibrate(params)


def check_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise unless equal bit for bit: nothing incorrect is timed."""
    if not torch.equal(found, wanted):
        raise SystemExit(f"{what}: {int((found != wanted).sum())} of {wanted.numel()} differ from the reference")
