"""Every Python block of the README runs, in order, in one namespace."""

import pathlib
import re

import optree
import torch

README = pathlib.Path(__file__).parent.parent / "README.md"


class Model(torch.nn.Module):
    """A name layout that the README's patterns fit: layers.{0,1}.experts.{0..3}.w1."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for _ in range(2):
            experts = [torch.nn.ModuleDict({"w1": torch.nn.Linear(128, 128, bias=False)}) for _ in range(4)]
            self.layers.append(torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)}))

    def forward(self, x):
        for layer in self.layers:
            x = sum(expert["w1"](x) for expert in layer["experts"])
        return x


def test_readme_examples_run(capsys, tmp_path, monkeypatch):
    """A block that raises, or a name that no block has made, fails here. Files are written to an empty folder."""
    monkeypatch.chdir(tmp_path)
    tokens = torch.randn(2, 128)
    names = {
        "model": Model(),
        "tokens": tokens,
        "torch": torch,
        "optree": optree,
        "steps": [[(tokens, tokens)]],
        "loss_fn": torch.nn.functional.mse_loss,
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 128)
    assert set(names["masters"]) == set(names["params"])
    assert not torch.equal(
        names["masters"]["layers.0.experts.0.w1.weight"], names["params"]["layers.0.experts.0.w1.weight"]
    )
    assert "quantized" in capsys.readouterr().out
    # Each block did its work: what was trained is what was saved, packed and exported.
    key = names["fq"].spec.groups[0].key
    assert torch.equal(names["found"].groups[key].amax.flatten(), names["state"][key]["amax"].flatten())
    assert names["packed"].keys() == names["state"].keys()
    assert (tmp_path / "nvfp4" / "config.json").exists()


def test_a_newcomer_reads_it_in_five_minutes():
    """At most 120 lines, with the command that CI runs."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert lines[lines.index("<!-- the test command -->") + 1 :][:2][1].startswith("python3 -m venv .venv && ")
