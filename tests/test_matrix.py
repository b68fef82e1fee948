"""What works under torch.func and torch.compile with which verb: docs/matrix.md, every cell of it run.

A verb or a cell that is not on the page, or differs from it, fails: `TRITON_INTERPRET=1 python -m tests.matrix` writes
the table anew.
"""

import pytest

import fq_transforms as fqt
from tests.full import FULL
from tests.matrix import COLUMNS, PAGE, REFUSED, cell, legend, line, rows, uses

# Of the compiler, about what it does not trace, and of libraries that it imports.
pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = list(rows())
NOT_ROWS = {
    *("select", "transform", "search", "Transform", "Spec", "Rule", "Format", "Stochastic"),  # statics
    *("carry_main_grad", "FakeQuantOptimizer"),  # that change an object: an optimizer, parameters
    *("checkpoint", "export", "formats", "methods", "presets", "rules", "state"),  # modules
}


def on_the_page():
    """The page's rows, as lists of cells, by verb and what it is a function of."""
    lines = [text.strip("| ").split(" | ") for text in PAGE.read_text().splitlines() if text.startswith("| `")]
    return {(verb, of): cells for verb, of, *cells in lines}


def test_the_page_has_these_rows_and_columns():
    """No other, each column with its use, each letter with its reason, nothing unknown."""
    page = on_the_page()
    assert list(page) == KEYS
    assert all(len(cells) == len(COLUMNS) for cells in page.values())
    assert {each for cells in page.values() for each in cells} <= {"yes", "0", "·", "gpu", *REFUSED}
    assert uses() in PAGE.read_text()
    assert legend() in PAGE.read_text()


def test_every_verb_is_a_row():
    """A new verb of `Transform`, or public function, comes with its row, or is named here as none."""
    methods = {name for name, made in vars(fqt.Transform).items() if not name.startswith("_") and callable(made)}
    functions = {name for name in fqt.__all__ if not name.isupper() and not name[:3].isupper()} - NOT_ROWS
    missing = {name for name in methods | functions if not any(f"`{name}" in verb for verb, _ in KEYS)}
    # A collective: what it sends is no function of one rank's tree. And a loop over batches in threads, refused there.
    assert missing == {"sync", "calibrate_sequentially"}


def cells():
    """Each cell but a GPU's. What is in no graph is compiled piece by piece around it, by default: ten seconds each."""
    for key, found in on_the_page().items():
        by_column = dict(zip(COLUMNS, found, strict=True))
        for column in by_column.keys() - {"CUDA graph"}:
            if column == "compile" and by_column["fullgraph"] == "c" and not FULL:
                continue
            yield pytest.param(key, column, id=f"{column} of {key[0]} {key[1]}".replace("`", ""))


@pytest.mark.parametrize(("key", "column"), sorted(cells(), key=lambda param: param.id))
def test_cell(key, column):
    """A transform of the verb equals that of its stand-in, or eager code; or the verb is refused by name."""
    assert cell(rows()[key], column) == on_the_page()[key][[*COLUMNS].index(column)]


@pytest.mark.gpu
@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]} {key[1]}".replace("`", ""))
def test_cuda_graph(key):
    """What was captured with other values is, replayed, what eager code gives; the page says where there is no such."""
    row = rows("cuda")[key]
    assert on_the_page()[key][[*COLUMNS].index("CUDA graph")] == ("gpu" if row.captures else "·")
    assert cell(row, "CUDA graph") == ("yes" if row.captures else "·")


def test_a_wrong_rule_is_seen():
    """A stand-in with another derivative differs from the verb: the cells can fail."""
    row = rows()["`fakequant`", "weights"]
    wrong = row._replace(stand_in=rows()["`fakequant`, MX", "weights"].stand_in)
    for column in ("grad", "vjp", "jvp", "jacrev", "per sample"):
        with pytest.raises(AssertionError, match="not close"):
            cell(wrong, column)


def test_lines_are_those_of_the_page():
    """The table is written as it is read."""
    for key, cells in on_the_page().items():
        assert line(key, cells) in PAGE.read_text()
