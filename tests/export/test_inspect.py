"""What is in a folder, from its headers."""

import html
import json

import pytest
import torch
from safetensors.torch import save_file

import fq_transforms as fqt
from fq_transforms.export import folder, inspect
from fq_transforms.export.streaming.sources import Folder
from tests.export.models import EXPERTS, build

BF16 = {"BF16"}


def write(path, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.filterwarnings("ignore:.*inputs readers of this layout quantize")
def test_every_number_and_byte_is_in_one_row(tmp_path):
    """Rows add up to the plain weights, and to the bytes of all tensors but those that are left; so after folder."""
    build(num_hidden_layers=3)[0].save_pretrained(tmp_path / "src", max_shard_size="300KB")
    folder(tmp_path / "src", tmp_path / "nvfp4", {"*.experts.*": fqt.NVFP4}, jobs=1)
    folder(tmp_path / "src", tmp_path / "fp8", {"*.experts.*": fqt.FP8_BLOCK}, layout="fp8", jobs=1)
    for name in ("src", "nvfp4", "fp8"):
        found = inspect(tmp_path / name)
        with Folder(tmp_path / name) as opened:
            sizes = {one: place.size for one, place in opened.files.places.items() if one not in opened.left}
            weights = sum(param.numel() for param in opened.params().values())
            shards = {place.file for place in opened.files.places.values()}
        assert sum(role.size for role in found.roles) == sum(sizes.values())
        assert sum(role.weights for role in found.roles) == weights
        assert [sum(column) for column in zip(*found.formats.values(), strict=True)] == [weights, sum(sizes.values())]
        assert found.shards == len(shards)
        assert (found.model_type, found.architectures) == ("qwen3_moe", ("Qwen3MoeForCausalLM",))
        experts = [role for role in found.roles if ".experts." in role.name]
        assert {role.layers for role in experts} == {(0, 1, 2)}
        assert {role.experts for role in experts} == {EXPERTS}
        assert ({role.stored for role in experts} == BF16) == (name == "src")
        assert {role.stored for role in found.roles if role not in experts} == BF16
        assert found.method == {"src": None, "nvfp4": "compressed-tensors", "fp8": "fp8"}[name]


def test_a_row_is_of_what_is_alike(tmp_path):
    """Layers of another shape, dtype or number of experts have a row of their own; stacks are experts, filters not."""
    one = torch.ones(4, 8)
    tensors = {f"l.{n}.mlp.experts.{e}.w1.weight": one for n in range(3) for e in range(2 + (n == 2))}
    tensors |= {f"l.{n}.q.weight": one if n else one.bfloat16() for n in range(3)}
    tensors |= {"l.0.experts.down_proj": torch.ones(5, 4, 8), "l.0.experts.down_proj_bias": torch.ones(5, 8)}
    tensors |= {"l.0.conv1d.weight": torch.ones(6, 1, 4), "scalar": torch.tensor(1.0)}
    found = inspect(write(tmp_path / "a", {name: tensor.clone() for name, tensor in tensors.items()}))
    rows = {(role.name, role.layers, role.experts, role.shape, role.stored) for role in found.roles}
    assert rows == {
        ("l.*.mlp.experts.*.w1.weight", (0, 1), 2, (4, 8), "F32"),
        ("l.*.mlp.experts.*.w1.weight", (2,), 3, (4, 8), "F32"),
        ("l.*.q.weight", (0,), None, (4, 8), "BF16"),
        ("l.*.q.weight", (1, 2), None, (4, 8), "F32"),
        ("l.*.experts.down_proj", (0,), 5, (4, 8), "F32"),
        ("l.*.experts.down_proj_bias", (0,), None, (5, 8), "F32"),
        ("l.*.conv1d.weight", (0,), None, (6, 1, 4), "F32"),
        ("scalar", (), None, (), "F32"),
    }
    assert json.loads(json.dumps(found.to_dict()))["roles"][0]["name"] == found.roles[0].name


def test_a_large_model_fits_on_a_screen(tmp_path):
    """61 layers of experts: a line per role, none longer than a terminal is wide."""
    experts = {
        f"model.layers.{n}.mlp.experts.{e}.{role}_proj.weight": torch.ones(1, 1)
        for n in range(3, 61)
        for e in range(16)
        for role in ("gate", "up", "down")
    }
    experts |= {f"model.layers.{n}.input_layernorm.weight": torch.ones(1) for n in range(61)}
    experts |= {f"model.layers.{n}.self_attn.indexer.weight": torch.ones(1, 1) for n in range(0, 61, 2)}
    lines = str(inspect(write(tmp_path / "a", experts))).splitlines()
    assert len(lines) < 15
    assert max(map(len, lines)) < 120
    assert sum("3-60" in line and "16" in line for line in lines) == 3
    assert sum("31 of 0-60" in line for line in lines) == 1


def test_no_folder_of_a_model(tmp_path):
    """It says what is wanted."""
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        inspect(tmp_path)


def test_what_folder_inspect_and_compare_give_is_shown_in_notebooks_as_it_is_printed(tmp_path):
    """Kills one line of repr in place of the tables."""
    write(tmp_path / "a", {"model.layers.0.w.weight": torch.ones(32, 32)})
    made = folder(tmp_path / "a", tmp_path / "b", {"*": fqt.FP8_BLOCK}, layout="plain")
    for found in (made, inspect(tmp_path / "a"), fqt.export.compare(tmp_path / "a", tmp_path / "b")):
        page = found._repr_html_()
        assert html.unescape(page.partition(">")[2].rpartition("<")[0]) == str(found)
        assert "monospace" in page
