"""Block scales in the order of tensor cores: torchao's, and back."""

import pytest
import torch

from fq_transforms.export import deinterleave, interleave


@pytest.mark.parametrize(("out", "columns"), [(128, 4), (1, 1), (130, 6), (256, 16), (300, 33)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_as_torchao_and_back(out, columns, dtype):
    """Each expert's tiles are those of torchao's `to_blocked`; padding is zeros, and gone again on the way back."""
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = torch.randint(0, 120, (3, out, columns), dtype=torch.uint8).view(dtype)
    tiles = interleave(scale)
    assert tiles.shape == (3, -(-out // 128), -(-columns // 4), 512)
    assert tiles.dtype == dtype
    for expert in range(3):
        theirs = utils.to_blocked(scale[expert].view(torch.uint8))
        assert torch.equal(tiles[expert].view(torch.uint8).flatten(), theirs.flatten())
    back = deinterleave(tiles, out, columns)
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(deinterleave(tiles[0], out, columns).view(torch.uint8), scale[0].view(torch.uint8))


def test_other_tiles_are_refused():
    with pytest.raises(ValueError, match="130, 6") as error:
        deinterleave(torch.zeros(1, 2, 512, dtype=torch.uint8), 130, 6)
    assert "(1, 2, 512)" in str(error.value)
    assert "(2, 2, 512)" in str(error.value)
