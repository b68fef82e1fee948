"""The weights of a group as a model has them, held against what the spec says of them."""

import pytest
import torch

from fq_transforms.checks import weights_of
from fq_transforms.formats import FP8
from fq_transforms.select import select
from tests.cases import assert_names, message_of


def cpu_experts(dtype=torch.float32):
    """Two experts with values, and their group."""
    params = {f"experts.{i}.weight": torch.ones(8, 4, dtype=dtype) for i in range(2)}
    (group,) = select(params, {"*": FP8}).groups
    return params, group


def test_weights_come_in_the_order_of_the_experts():
    """Kills experts in the order of the dict."""
    params, group = cpu_experts()
    shuffled = dict(reversed(params.items())) | {"norm.weight": torch.ones(3)}
    found = weights_of(shuffled, group)
    assert [weight is params[f"experts.{i}.weight"] for i, weight in enumerate(found)] == [True, True]


# name -> (expert 1's weight, the error, what its message must say)
MISFITS = {
    "missing": (None, KeyError, ["'experts.1.weight'", "'experts.*.weight'", "not in params"]),
    "another shape": (
        torch.ones(4, 8),
        ValueError,
        ["'experts.1.weight'", "found shape (4, 8)", "wants (8, 4)", "select again"],
    ),
    "one dimension more": (torch.ones(1, 8, 4), ValueError, ["'experts.1.weight'", "(1, 8, 4)", "(8, 4)"]),
    "float64": (
        torch.ones(8, 4).double(),
        ValueError,
        ["'experts.1.weight'", "torch.float64", "bfloat16, float16 or float32"],
    ),
    "int8": (
        torch.ones(8, 4).to(torch.int8),
        ValueError,
        ["'experts.1.weight'", "torch.int8", "bfloat16, float16 or float32"],
    ),
    "another dtype": (
        torch.ones(8, 4).bfloat16(),
        ValueError,
        ["'experts.1.weight'", "found torch.bfloat16", "wanted torch.float32", "'experts.0.weight'"],
    ),
    "another device": (
        torch.ones(8, 4, device="meta"),
        ValueError,
        ["'experts.1.weight'", "on meta", "on cpu", "'experts.0.weight'"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_spec_are_refused(misfit):
    """Each error of `weights_of` names the parameter, what was found and what the spec wants."""
    weight, error, fragments = MISFITS[misfit]
    params, group = cpu_experts()
    params["experts.1.weight"] = weight
    if weight is None:
        del params["experts.1.weight"]
    assert_names(message_of(error, weights_of, params, group), *fragments)


def test_a_transposed_group_wants_the_stored_shape():
    """Kills a check of [out, in] against a parameter that is stored [in, out]."""
    params = {"experts.w1": torch.ones(2, 4, 8)}
    (group,) = select(params, {"*": FP8}, transposed="*").groups
    assert (group.shape, group.parameter_shape) == ((8, 4), (2, 4, 8))
    assert weights_of(params, group)[0] is params["experts.w1"]
    message = message_of(ValueError, weights_of, {"experts.w1": torch.ones(2, 8, 4)}, group)
    assert_names(message, "'experts.w1'", (2, 8, 4), (2, 4, 8))


CHANGED_IN_PLACE = {
    "shape": lambda w: setattr(w, "data", torch.ones(16, 32)),
    "transposed": lambda w: setattr(w, "data", w.data.T),
    "dtype": lambda w: setattr(w, "data", w.data.double()),
    "mixed": lambda w: setattr(w, "data", w.data.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGED_IN_PLACE.values(), ids=CHANGED_IN_PLACE)
def test_a_parameter_that_changes_in_place_is_checked_again(change):
    """A group that passed once is compared with what it was, and a parameter that became another tensor is refused."""
    params = {f"experts.{i}.w1.weight": torch.nn.Parameter(torch.ones(8, 32)) for i in range(4)}
    (group,) = select(params, {"*": FP8}).groups
    for _ in range(2):
        assert weights_of(params, group) == list(params.values())
    change(params["experts.2.w1.weight"])
    with pytest.raises(ValueError, match=r"experts\.2\.w1\.weight"):
        weights_of(params, group)
    params["experts.2.w1.weight"] = torch.nn.Parameter(torch.ones(8, 32))
    assert weights_of(params, group) == list(params.values())
