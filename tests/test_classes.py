"""Every class of transformers that has experts: what presets select there, beside ModelOpt, and each step after it.

What is found is what docs/classes.md says. A class that is not on the page, as of a newer transformers, fails until it
is looked at: `TRITON_INTERPRET=1 python -m tests.class_tables` writes the tables anew, with `?` for what has no reason.
"""

import re

import pytest

from tests.class_tables import NOTES, OF_STEPS, PAGE, PRESETS, REASONS, SELECTION, differing, legend, row, steps_row
from tests.classes import classes
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

DEFAULT = [
    *("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "NemotronHForCausalLM", "JambaForCausalLM", "DbrxForCausalLM"),
    *(
        "JetMoeForCausalLM",
        "GptOssForCausalLM",
        "SwitchTransformersForConditionalGeneration",
        "LongcatFlashForCausalLM",
    ),
    "Ernie4_5_VLMoeForConditionalGeneration",
]
each = pytest.mark.parametrize("name", classes() if FULL else DEFAULT)


def rows_of(head):
    """The rows of one of the page's tables, by class."""
    table = PAGE.read_text().partition(head)[2].partition("\n\n")[0]
    return {re.match(r"\| `(\w+)` \|", line)[1]: line for line in table.splitlines()}


@pytest.mark.parametrize(("head", "reasons"), [(SELECTION, REASONS), (OF_STEPS, NOTES)], ids=["selection", "steps"])
def test_every_class_is_on_the_page(head, reasons):
    """Those of the installed transformers, no other, and none with something that no reason explains."""
    rows = rows_of(head)
    assert [*rows] == classes()
    assert not [line for line in rows.values() if "?" in line]
    assert legend(reasons) in PAGE.read_text().partition(head)[2]


@each
def test_presets_select_what_modelopt_quantizes(name):
    """Weight by weight, at the class's own widths, but for what the page says; and the inputs of the same weights."""
    assert row(name) == rows_of(SELECTION)[name]
    for pair in PRESETS:
        assert not differing(name, *pair)[2]


@each
def test_each_step_holds_or_refuses_by_name(name):
    """Laws are in `Steps`: amax as ModelOpt's, logits and gradients as of written weights, codes of fake weights."""
    assert steps_row(name) == rows_of(OF_STEPS)[name]
