"""What a release says of itself in several places, and which versions docs/install.md says were tested."""

import re
import tomllib
from pathlib import Path

import pytest

import fq_transforms as fqt

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "install.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
VERSION = r"\d+(?:\.\d+)+"
TESTED = "Versions that were tested"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(heading):
    """The rows of the first table below a heading of the page, each a dict by the table's head."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    head, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(cells(head), cells(line), strict=True)) for line in lines]


def test_one_version():
    """The wheel reads the package's; the newest section, the citation and the lines to install say the same."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "fq_transforms/__init__.py"}
    newest = re.search(
        rf"^## ({VERSION}) \((?:unreleased|\d{{4}}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    cited = re.search(rf"^version: ({VERSION})$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert newest
    assert cited
    wheels = set(re.findall(rf"fq_transforms-({VERSION})-py3", PAGE.read_text()))
    assert {newest[1], cited[1]} | wheels == {fqt.__version__}


def test_citation_has_the_date_of_the_release():
    """Once the section in CHANGELOG is dated, and not before."""
    dated = re.findall(rf"^## {re.escape(fqt.__version__)} \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.findall(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert (cited or ["unreleased"]) == dated


def test_tested_versions_are_the_pins():
    """The row of `.ci/run` names what its environment pins, no more and no less of the peers and engines."""
    (row,) = [row for row in rows(TESTED) if ".ci/run" in row["the run"]]
    pins = dict(re.findall(rf"^([\w-]+)(?:\[.*\])?==({VERSION})", "\n".join(EXTRAS["test"]), re.M))
    for tool in ("ruff", "pyright"):
        pins.pop(tool)
    assert row["PyTorch"] == f"{pins.pop('torch')}, CPU"
    assert row["Triton"] == f"{pins.pop('triton')}, interpreter"
    assert dict(one.split() for one in row["with"].split(", ")) == pins
    assert f"torch=={row['PyTorch'].split(',')[0]} " in (ROOT / ".ci" / "wheel").read_text()


def test_oldest_versions():
    """What pip enforces is the first sentence of the page, and rows have run the oldest of each."""
    oldest = dict(re.findall(rf"^([\w-]+)>=({VERSION})", "\n".join(PROJECT["project"]["dependencies"]), re.M))
    oldest["Python"] = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest['Python']} or newer, PyTorch {oldest['torch']} or newer" in PAGE.read_text()
    found = rows(TESTED)
    for column, name in (("Python", "Python"), ("PyTorch", "torch"), ("Triton", "triton")):
        assert any(f"{row[column]}.".startswith(f"{oldest[name]}.") for row in found), name
    (row,) = [row for row in found if row["with"].startswith("the oldest of")]
    others = dict(one.split() for one in row["with"].split(": ")[1].split(", "))
    assert others == {name: f"{oldest[name]}.0" for name in ("optree", "jaxtyping", "safetensors")}


def test_classifiers_name_the_tested_series():
    """Of Python, each has its row, and each row has its classifier."""
    named = re.findall(r"Python :: (\d\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.M)
    assert set(named) == {".".join(row["Python"].split(".")[:2]) for row in rows(TESTED)}


def test_extras_are_all_on_the_page():
    """A new extra has its line; one that is gone has none."""
    assert {row["extra"].strip("`") for row in rows("Extras")} == EXTRAS.keys()


@pytest.mark.parametrize("row", rows(TESTED), ids=lambda row: row["PyTorch"])
def test_what_a_row_names_is_there(row):
    """The results that a link goes to have the row's versions, and a script is one that can be run."""
    for link in re.findall(r"\]\((.*?)\)", row["the run"]):
        text = (PAGE.parent / link).read_text()
        assert f"torch {row['PyTorch']}, triton {row['Triton']}" in text
        assert re.findall(r"at (\w{7})\]", row["the run"]) == re.findall(r"commit (\w{7})\.", text)
    for script in re.findall(r"bash (\.ci/\w+)", row["the run"]):
        assert (ROOT / script).is_file()
