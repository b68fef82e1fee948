"""Where a part of a leaf lies: the part of the leaf is the leaf of the part."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fq_transforms as fqt
from fq_transforms.formats import FP8_BLOCK, INT4_BLOCK32, MXFP4, NVFP4_STATIC
from fq_transforms.pack import packed_leaves
from fq_transforms.partition import Part, collapsed_dims, leaf_part
from tests.cases import CORE_FORMATS, assert_names, message_of, name_of
from tests.ops.pack.cases import PACKABLE


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), format=st.sampled_from([format for format in CORE_FORMATS if not format.is_stateless]))
def test_the_leaf_of_a_part_is_the_part_of_the_leaf(data, format):
    """To calibrate commutes with sharding; along an axis that a leaf collapses the parts' maximum is the whole's."""
    rows, columns = format.block
    splits = [data.draw(st.sampled_from([1, 2, 3]), label) for label in ("experts", "out", "in")]
    sizes = [2, (rows or 1) * 2, (columns or 1) * 2]
    shape = tuple(count * size for count, size in zip(splits, sizes, strict=True))
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights *= 2.0 ** torch.arange(shape[0])[:, None, None]
    whole = calibrated(weights, format)
    found = {name: torch.full_like(leaf, -torch.inf) for name, leaf in whole.items()}
    for place in itertools.product(*map(range, splits)):
        offset = tuple(n * size for n, size in zip(place, sizes, strict=True))
        box = tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))
        for field, leaf in calibrated(weights[box].contiguous(), format).items():
            part = leaf_part(Part(shape, offset, tuple(sizes)), format, field, "experts.w")
            assert part.whole == tuple(whole[field].shape)
            assert part.shape == tuple(leaf.shape)
            there = tuple(slice(at, at + size) for at, size in zip(part.offset, part.shape, strict=True))
            if all(splits[axis] == 1 for axis in collapsed_dims(format, field)):
                assert torch.equal(leaf, whole[field][there])
            found[field][there] = found[field][there].maximum(leaf)
    assert all(torch.equal(found[field], leaf) for field, leaf in whole.items())


def calibrated(weights, format):
    """The leaves of stacked experts, by field."""
    params = {"experts.w": weights}
    return fqt.transform(fqt.select(params, {"*": format})).calibrate(params)["experts.w"]


@pytest.mark.parametrize(
    ("format", "part", "fragments"),
    [
        (INT4_BLOCK32, Part((8, 64, 128), (0, 0, 48), (8, 64, 80)), ("`in`", "48..128 of 128", "32", "INT4_BLOCK32")),
        (NVFP4_STATIC, Part((8, 64, 128), (0, 0, 0), (8, 64, 24)), ("`in`", "0..24 of 128", "16")),
        (FP8_BLOCK, Part((8, 384, 128), (0, 192, 0), (8, 192, 128)), ("`out`", "192..384 of 384", "128")),
        (MXFP4, Part((8, 64, 128), (0, 0, 16), (8, 64, 112)), ("`in`", "16..128 of 128", "32")),
    ],
    ids=name_of,
)
def test_a_part_that_cuts_a_block_is_refused(format, part, fragments):
    """Also of formats that take their scales from the weight: half a block has another amax."""
    assert_names(message_of(ValueError, leaf_part, part, format, "amax", "experts.w"), "experts.w", *fragments)


def test_a_ragged_last_block_is_no_cut():
    """A square block may be ragged where the weight ends."""
    part = leaf_part(Part((8, 300, 128), (0, 256, 0), (8, 44, 128)), FP8_BLOCK, "amax", "w")
    assert part == Part((8, 3, 1), (0, 2, 0), (8, 1, 1))


def test_an_empty_part_cuts_nothing():
    """Ranks beyond the last row hold nothing, from the ragged end of the weight on."""
    part = leaf_part(Part((8, 300, 128), (0, 300, 0), (8, 0, 128)), FP8_BLOCK, "amax", "w")
    assert part == Part((8, 3, 1), (0, 3, 0), (8, 0, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(PACKABLE),
    splits=st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    unit=st.sampled_from([128, 256]),
    data=st.data(),
)
def test_parts_of_packed_leaves(format, splits, unit, data):
    """The part of a leaf that `leaf_part` gives has the shape that packing the part of the weights has, and tiles."""
    whole = (4, 4 * unit, 4 * unit)
    index = [data.draw(st.integers(0, count - 1)) for count in splits]
    shape = tuple(size // count for size, count in zip(whole, splits, strict=True))
    offset = tuple(i * size for i, size in zip(index, shape, strict=True))
    group = fqt.select({"experts.w": torch.empty(shape, device="meta")}, {"*": format}).groups[0]
    wholes = packed_leaves(fqt.select({"experts.w": torch.empty(whole, device="meta")}, {"*": format}).groups[0])
    for field, (wanted, _) in packed_leaves(group).items():
        part = leaf_part(Part(whole, offset, shape), format, field, "experts.w")
        assert part.shape == wanted
        assert part.whole == wholes[field][0]
        for axis, (size, start) in enumerate(zip(part.shape, part.offset, strict=True)):
            assert start == (index[axis] * size if part.whole[axis] != size else 0)
