"""The rule of vmap by itself, on a Function that says which expert met which leaf."""

from dataclasses import dataclass

import pytest
import torch
from torch.func import vmap

from fq_transforms.ops.launch import split
from fq_transforms.ops.vmap import Mapped, Unmapped


@dataclass(frozen=True)
class Copies:
    """How many copies of the weights there are."""

    copies: int = 1

    def mapped(self, size):
        return Copies(self.copies * size)


class Scaled(Mapped):
    """Each expert times its leaf and a factor; each expert's sum as a leaf, and a leaf that is none."""

    leaves = 2
    leaf_results = 2

    @staticmethod
    def forward(statics, leaf, factor, *tensors):
        assert leaf.shape[0] == 6 * statics.copies
        factors = split(factor.expand(leaf.shape), tensors)
        parts = split(leaf, tensors)
        outs = [t * p[..., None, None] * f[..., None, None] for t, p, f in zip(tensors, parts, factors, strict=True)]
        return torch.cat([out.sum((-2, -1)).reshape(-1) for out in outs]), leaf.new_empty(0), *outs

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def scaled(leaf, factor, *tensors):
    sums, none, *outs = Scaled.apply(Copies(), leaf, factor, *tensors)
    assert none.numel() == 0
    return sums, *outs


def cases(stacked):
    """A leaf [6], factors, and tensors of two and four experts, or of six in one."""
    tensors = [torch.randn(2, 3, 5), torch.randn(4, 3, 5)] if stacked else [torch.randn(3, 5) for _ in range(6)]
    return torch.rand(6) + 1, torch.tensor(2.0), tensors


@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
@pytest.mark.parametrize("mapped", ["leaf", "factor", "tensors", "all"])
def test_a_batch_is_a_loop(stacked, mapped):
    """Whatever is mapped, along whatever dim, each element meets its own, and the rest meet all of the batch."""
    leaf, factor, tensors = cases(stacked)
    is_mapped = {name: mapped in (name, "all") for name in ("leaf", "factor", "tensors")}
    leaves = torch.stack([leaf, leaf * 3, -leaf], dim=1) if is_mapped["leaf"] else leaf
    factors = torch.stack([factor, factor * 5, factor + 1]) if is_mapped["factor"] else factor
    batch = [torch.stack([t, t * 7, t - 1], dim=1) for t in tensors] if is_mapped["tensors"] else tensors
    in_dims = (1 if is_mapped["leaf"] else None, 0 if is_mapped["factor"] else None)
    in_dims += ((1 if is_mapped["tensors"] else None),) * len(tensors)
    found = vmap(scaled, in_dims=in_dims)(leaves, factors, *batch)
    for i in range(3):
        own = [
            t if dim is None else t.select(dim, i) for t, dim in zip((leaves, factors, *batch), in_dims, strict=True)
        ]
        for out, wanted in zip(found, scaled(*own), strict=True):
            torch.testing.assert_close(out[i], wanted)


@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
def test_two_batches_are_two_loops(stacked):
    """Nested: one mapped dim inside the other, a leaf by one and a factor by the other."""
    leaf, factor, tensors = cases(stacked)
    leaves, factors = torch.stack([leaf, leaf * 3, -leaf]), torch.stack([factor, factor * 5])
    none = (None,) * len(tensors)
    found = vmap(vmap(scaled, in_dims=(None, 0, *none)), in_dims=(0, None, *none))(leaves, factors, *tensors)
    for i in range(3):
        for j in range(2):
            for out, wanted in zip(found, scaled(leaves[i], factors[j], *tensors), strict=True):
                torch.testing.assert_close(out[i, j], wanted)


def test_one_of_some_tensors_mapped():
    """An unmapped tensor is repeated beside a mapped one."""
    leaf, factor, (one, other) = cases(True)
    batch = torch.stack([one, one * 2], dim=-1)
    sums, first, second = vmap(scaled, in_dims=(None, None, -1, None))(leaf, factor, batch, other)
    for i in range(2):
        wanted = scaled(leaf, factor, batch[..., i], other)
        for out, right in zip((sums, first, second), wanted, strict=True):
            torch.testing.assert_close(out[i], right)


def test_what_must_not_be_mapped_says_so():
    """A search for an amax is refused under vmap, with what to do."""

    class Search(Unmapped):
        @staticmethod
        def forward(tensor):
            return tensor.clone()

    with pytest.raises(ValueError, match="found weights under torch.func.vmap, wanted method Max"):
        vmap(Search.apply)(torch.ones(2, 3))
