"""`fq.fill_unseen`: experts without tokens are an error that names them, or get what the user chose; never 0 or NaN."""

import pytest
import torch

import fq_transforms as fqt
from tests.cases import assert_names, message_of

KEY = "layers.3.mlp.experts.*.w1.weight.input"
NONE = -torch.inf


def prepared(amax, *, per_expert=True, weights=(1.0, 2.0, 4.0, 0.0)):
    params = {KEY.replace("*", str(i)).removesuffix(".input"): torch.full((2, 2), w) for i, w in enumerate(weights)}
    spec = fqt.select(params, [fqt.Rule("*", fqt.FP8, fqt.FP8, per_expert_inputs=per_expert)])
    fq, weights = fqt.transform(spec), fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    tokens = torch.tensor([0.0 if a == NONE else 3.0 for a in amax] if per_expert else [0.0, 3.0, 0.0, 0.0])
    return params, fq, weights.calibrate(params) | {KEY: {"amax": torch.tensor(amax), "tokens": tokens.double()}}


@pytest.mark.parametrize(
    ("unseen", "wanted"),
    [
        ("max-of-peers", [3.0, 1.0, 3.0, 3.0]),
        # Peers' largest ratio to their weights is 3 / 1; a zero weight has none.
        ("from-weights", [3.0, 1.0, 12.0, 3.0]),
        (0.25, [3.0, 1.0, 0.25, 0.25]),
        (2, [3.0, 1.0, 2.0, 2.0]),
    ],
)
def test_an_unseen_expert_gets_what_is_chosen(unseen, wanted):
    """The others keep theirs, and `tokens` still says who has seen none."""
    params, fq, state = prepared([3.0, 1.0, NONE, NONE])
    filled = fq.fill_unseen(state, unseen=unseen, params=params)
    assert filled[KEY]["amax"].tolist() == wanted
    assert filled[KEY]["tokens"] is state[KEY]["tokens"]
    assert state[KEY]["amax"].tolist() == [3.0, 1.0, NONE, NONE]
    assert filled[fq.spec.groups[0].key] is state[fq.spec.groups[0].key]


def test_raise_names_layer_and_experts():
    _, fq, state = prepared([3.0, NONE, NONE, 1.0])
    message = message_of(ValueError, fq.fill_unseen, state)
    assert_names(message, KEY, "found no token for expert 1-2 of 4", "fq.fill_unseen(state, unseen=...)")
    with pytest.raises(ValueError, match="found no token for expert 1-2 of 4"):
        fqt.state.check(state, fq.spec)


@pytest.mark.parametrize("unseen", ["raise", "max-of-peers", "from-weights", 1.0])
def test_a_filled_state_stays_as_it_is(unseen):
    """Also one that experts share, of which only one has seen tokens; and an amax of 0 that was seen is a number."""
    for amax, per_expert in (([3.0, 0.0, 1.0, 2.0], True), ([0.5], False)):
        params, fq, state = prepared(amax, per_expert=per_expert)
        filled = fq.fill_unseen(state, unseen=unseen, params=params)
        assert all(filled[key] is state[key] for key in state)


def test_without_peers_only_a_number_helps():
    for per_expert in (True, False):
        params, fq, state = prepared([NONE] * (4 if per_expert else 1), per_expert=per_expert)
        for unseen in ("max-of-peers", "from-weights"):
            message = message_of(ValueError, fq.fill_unseen, state, unseen=unseen, params=params)
            assert_names(message, KEY, "found no token for any of 4 experts", "pass a number")
        assert set(fq.fill_unseen(state, unseen=2.0)[KEY]["amax"].tolist()) == {2.0}
        assert_names(message_of(ValueError, fq.fill_unseen, state), KEY, "found no token")


@pytest.mark.parametrize("unseen", ["max", "", 0.0, -1.0, torch.inf, torch.nan])
def test_other_choices_are_refused(unseen):
    _, fq, state = prepared([3.0, 1.0, NONE, NONE])
    assert_names(message_of(ValueError, fq.fill_unseen, state, unseen=unseen), f"unseen: found {unseen!r}")


def test_what_is_wrong_stays_wrong():
    """No choice covers up a NaN, and the weights are asked for."""
    _, fq, state = prepared([3.0, torch.nan, NONE, 1.0])
    message = message_of(ValueError, fq.fill_unseen, state, unseen=1.0)
    assert_names(message, "found nan for expert 1 of 4, wanted a finite amax")
    message = message_of(ValueError, fq.fill_unseen, state, unseen="from-weights")
    assert_names(message, "params: found None")
