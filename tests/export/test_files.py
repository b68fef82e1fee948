"""Folders of safetensors: shards and their index, and that a folder appears whole or not at all."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch
from safetensors import safe_open

import fq_transforms as fqt
from tests.cases import assert_names
from tests.export.models import TARGETS, assert_same_bytes, build, calibrated, exported, read, to_compressed_tensors


def test_shards(tmp_path):
    """Files are no larger than asked, the index names each tensor once, the bytes are those of one file."""
    model, params = build()
    exported(to_compressed_tensors, tmp_path / "one", params, fqt.FP8, model.config)
    exported(to_compressed_tensors, tmp_path / "many", params, fqt.FP8, model.config, max_shard_size="200KB")
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert_same_bytes(many, one)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            held = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (it is no dict)
        assert sum(held.values()) <= 200_000 or len(held) == 1
        assert all(index["weight_map"][name] == shard.name for name in held)


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    """Headers list every tensor: reading one for each of thousands of modules took longer than all else."""
    model, params = build()
    exported(to_compressed_tensors, tmp_path / "a", params, fqt.NVFP4, model.config, max_shard_size="300KB")
    opened: list[str] = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda file, *args: opened.append(file.name) or real(file, *args))
    fqt.export.folder(tmp_path / "a", tmp_path / "b", layout="plain")
    shards = len(list((tmp_path / "a").glob("*.safetensors")))
    assert shards > 2
    assert len(opened) == shards


def test_a_crash_leaves_nothing_at_the_path(tmp_path):
    """No folder and no staging after an error; what a killed process left, the next export removes."""
    model, params = build()
    fq, state = calibrated(params, fqt.NVFP4)
    last = "model.layers.1.mlp.experts.down_proj"
    bad = params | {last: params[last].clone()}
    bad[last][2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fqt.export.save(tmp_path / "a", fq, bad, state, config=model.config, max_shard_size=9999)
    assert not list(tmp_path.iterdir())
    left = tmp_path / f".a.saving-{'0' * 32}"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"half")
    fqt.export.save(tmp_path / "a", fq, params, state, config=model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_process_leaves_no_config(tmp_path):
    """SIGKILL while tensors are written: the path does not exist, so no index or config points at missing files."""
    script = (
        "import os, signal, sys, torch, pathlib\n"
        "from fq_transforms.export.files.shards import type_of, write\n"
        "types = {name: (type_of(torch.ones(100)), 400) for name in 'ab'}\n"
        "def tensors():\n"
        "    yield 'a', torch.ones(100)\n"
        "    yield 'b', torch.ones(100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(pathlib.Path(sys.argv[1]), types, tensors(), {'config.json': {}}, 400)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], check=False, capture_output=True)
    assert done.returncode == -9
    assert all(left.name.startswith(".a.saving") for left in tmp_path.iterdir())


def test_importing_the_package_imports_no_engine():
    script = (
        "import sys, fq_transforms as fqt; fqt.export\n"
        "wrong = {'transformers', 'compressed_tensors', 'safetensors', 'modelopt'} & set(sys.modules)\n"
        "assert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@TARGETS
def test_a_folder_that_is_not_empty_is_refused(target, tmp_path):
    """What lies there stays; an empty folder is taken."""
    model, params = build()
    fq, state = calibrated(params, fqt.NVFP4)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError) as caught:
        target(tmp_path / "a", fq, params, state, config=model.config)
    assert_names(str(caught.value), "1 entries such as ['thesis.txt']", "empty directory")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.txt"]
    (tmp_path / "b").mkdir()
    target(tmp_path / "b", fq, params, state, config=model.config)
    assert (tmp_path / "b" / "config.json").exists()
