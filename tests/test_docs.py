"""Every Python block of a page that runs by itself, in order, in one namespace."""

import pathlib
import re

import pytest
import torch

from tests.export.models import write

CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
MODEL = {
    f"model.layers.0.mlp.experts.{expert}.{role}_proj.weight": torch.randn(32, 32).bfloat16()
    for expert in range(2)
    for role in ("gate", "up", "down")
} | {"lm_head.weight": torch.randn(32, 32).bfloat16()}
DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["calibration", "state", "folders", "gptq"])
def test_examples_run(page, tmp_path, monkeypatch):
    """A block that raises, or a name that no block has made, fails here."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model", MODEL, {"config.json": CONFIG})  # of which one page tells
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
