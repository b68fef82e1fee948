"""The benchmark of GPTQ: every row on a CPU, small, beside ModelOpt's loop; what its page says."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench import gptq

pytestmark = pytest.mark.filterwarnings("ignore")  # of ModelOpt's imports


@pytest.fixture
def small(monkeypatch):
    """Four experts of two blocks of columns."""
    for name, value in {
        "DEVICE": "cpu",
        "EXPERTS": 4,
        "INNER": 32,
        "HIDDEN": 160,
        "TOKENS": 32,
        "ROUNDS": 1,
        "FORMATS": [fqt.INT4_BLOCK32, fqt.NVFP4_STATIC],
    }.items():
        monkeypatch.setattr(gptq, name, value)


def untouched(iterable, desc):
    return iterable


def test_every_format_is_checked_and_timed(small):
    """Ours and the products; ModelOpt's loop where its kernel is not needed, which only a GPU runs."""
    gptq.FORMATS[1:] = []
    (row,) = gptq.rows(untouched)
    assert row["ratio"] > 0
    assert row["over_modelopt"] == row["modelopt_ms"] / (row["hessian_ms"] + row["gptq_ms"])
    text = gptq.page({"date": "a day", "commit": "abc"}, [row])
    assert "| INT4_BLOCK32 |" in text
    assert f"{row['ratio']:.2f}" in text


def test_without_peers(small):
    rows = list(gptq.rows(untouched, peers=False))
    assert [row["format"] for row in rows] == ["INT4_BLOCK32", "NVFP4_STATIC"]
    assert "| - | - |" in gptq.page({"date": "a day"}, rows)


def test_a_worse_result_is_not_timed(small, monkeypatch):
    """Weights that are moved off the grid, or up in error, end the run."""

    def worse(fq, params, state, hessians):
        return {name: torch.zeros_like(weight) for name, weight in params.items()}

    monkeypatch.setattr(gptq.fqt, "gptq", worse)
    with pytest.raises(SystemExit, match="worse than the nearest"):
        list(gptq.rows(untouched, peers=False))
