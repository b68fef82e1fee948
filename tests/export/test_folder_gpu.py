"""`folder` on a GPU: the bytes that a CPU writes, whatever the pieces and threads; and what it cannot quantize."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export import folder
from fq_transforms.export.files import shards
from fq_transforms.export.streaming import job

pytestmark = pytest.mark.gpu

CONFIG = {
    **{"model_type": "mine", "architectures": ["MineForCausalLM"], "dtype": "bfloat16"},
    "tie_word_embeddings": False,
}
RULES = {"*.experts.*": fqt.NVFP4, "*.q_proj.*": fqt.FP8_PER_CHANNEL}
CASES = [
    *((RULES, "modelopt"), ({"*.experts.*": fqt.NVFP4_STATIC}, "compressed-tensors")),
    *(({"*.experts.*": format}, "compressed-tensors") for format in (fqt.FP8_BLOCK, fqt.MXFP4, fqt.INT4_BLOCK32)),
    *(({"*.experts.*": format}, "plain") for format in (fqt.NVFP4, fqt.MXFP6_E2M3)),
]


def write(path, tensors):
    """A folder of several shards."""
    types = {name: (shards.type_of(tensor), tensor.nbytes) for name, tensor in tensors.items()}
    shards.write(path, types, tensors.items(), {"config.json": CONFIG}, 200_000)
    return path


def weights():
    """Experts of gate, up and down, no two of one magnitude; a dense matrix, and tensors of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    found = {"odd.bias": torch.ones(3, dtype=torch.uint8), "layers.0.q_proj.weight": torch.randn(64, 96).bfloat16()}
    for expert in range(7):
        for place, (role, shape) in enumerate({"gate": (128, 256), "up": (128, 256), "down": (256, 128)}.items()):
            weight = torch.randn(shape, generator=generator) * 2.0 ** (expert + place)
            found[f"layers.0.mlp.experts.{expert}.{role}_proj.weight"] = weight.bfloat16()
    return found


def bytes_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what engines quantize besides
@pytest.mark.parametrize(("rules", "layout"), CASES)
@pytest.mark.parametrize("piece", [10**5, 2**27])
def test_the_bytes_are_those_of_a_cpu(rules, layout, piece, tmp_path, monkeypatch):
    """Files whole: codes, scales, what is copied, headers, config."""
    src = write(tmp_path / "src", weights())
    monkeypatch.setattr(job, "PIECE_BYTES", piece)
    for device, jobs in (("cpu", 1), ("cuda", 4)):
        folder(src, tmp_path / device, rules, layout=layout, device=device, jobs=jobs, max_shard_size="100KB")
    assert bytes_of(tmp_path / "cuda") == bytes_of(tmp_path / "cpu")


def test_codes_are_decoded_on_the_device_to_the_same_bytes(tmp_path):
    """ModelOpt's NVFP4 and FP8 to plain weights, and to FP8 in blocks."""
    src = write(tmp_path / "src", weights())
    folder(src, tmp_path / "codes", RULES, layout="modelopt", device="cuda")
    for device in ("cpu", "cuda"):
        folder(tmp_path / "codes", tmp_path / f"{device}-plain", layout="plain", device=device)
        folder(tmp_path / "codes", tmp_path / f"{device}-mx", {"*.experts.*": fqt.MXFP8}, device=device)
    for kind in ("plain", "mx"):
        assert bytes_of(tmp_path / f"cuda-{kind}") == bytes_of(tmp_path / f"cpu-{kind}")


@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.MXFP4])
def test_a_weight_that_is_not_finite_is_named(format, tmp_path):
    tensors = weights()
    tensors["layers.0.mlp.experts.5.up_proj.weight"][3, 4] = torch.nan
    src = write(tmp_path / "src", tensors)
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj"):
        folder(src, tmp_path / "dst", {"*.experts.*": format}, device="cuda", jobs=2)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
