"""Every Python block of a page that runs by itself, in order, in one namespace."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["calibration", "state"])
def test_examples_run(page, tmp_path, monkeypatch):
    """A block that raises, or a name that no block has made, fails here."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
