"""The benchmark of steps: whole steps of every way on a model of plain PyTorch, on a CPU."""

import gc
from math import isnan
from statistics import median
from time import sleep

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.bench import step
from fq_transforms.bench.step import AGAIN, WAYS, page, step_rows, write_rows
from fq_transforms.bench.timing import Queue, Turn, in_turns, median_and_error, turn_us
from fq_transforms.bench.ways import Training, Way, _Given
from tests.training.ways import EXPERTS, HIDDEN, GroupedMLP

OURS = set(WAYS) - {AGAIN, "ModelOpt"}


@pytest.fixture
def training(monkeypatch):
    """Two experts and microbatches, few rounds; what only a GPU has is left out."""
    for name, value in {
        "FORMATS": [fqt.FP8, fqt.NVFP4],
        "ROUNDS": {1: 3, 2: 2},
        "OTHER_ROUNDS": 2,
        "WRITE_ROUNDS": 3,
        "DEVICE_ROUNDS": 2,
        "QUEUED_ROUNDS": {1: 4},
        "_queued_us": lambda training, turn: turn_us(turn),
        "device_us": lambda call: 1.0 if call() is not None else 0.0,
    }.items():
        monkeypatch.setattr(step, name, value)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which takes a second with all the imports of a test
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    xs = [torch.randn(4 * EXPERTS, HIDDEN, dtype=torch.bfloat16) for _ in range(2)]
    return Training(GroupedMLP().bfloat16(), xs)


def untouched(iterable, desc):
    return iterable


def test_every_way_is_checked_and_timed(training):
    """All formats, and one and more microbatches; nothing is left on the parameters, and the masters stay."""
    masters = {name: master.detach().clone() for name, master in training.masters.items()}
    found = [*write_rows(training), *step_rows(training, untouched, peers=False)]
    assert [(row["kind"], row["format"]) for row in found[:4]] == [
        ("fakequant(out=)", "FP8"),
        ("fakequant(out=)", "NVFP4"),
        ("fakequant(inplace=True)", "NVFP4"),
        ("take_grads", "pass-through"),
    ]
    assert [(row["microbatches"], row["format"]) for row in found[4:]] == [
        (number, name) for number in (1, 2) for name in ("FP8", "NVFP4")
    ]
    for row in found[4:]:
        assert set(row["ways"]) == {AGAIN, *OURS}
        assert all(way["ratio"] > 0 and way["mib"] == 0 for way in row["ways"].values())
        assert len(row["ways"]["lens"]["ratios"]) == step.ROUNDS[row["microbatches"]]
        assert len(row["ways"]["layerwise"]["ratios"]) == step.OTHER_ROUNDS
        assert ("device" in row) == (row["microbatches"] == 1)
    assert len(found[4]["device"]["ratios"]) == len(found[4]["device_again"]["ratios"]) == 4
    assert len(training.xs) == 2
    assert all(param.grad is None for param in training.params.values())
    for name, master in training.masters.items():
        assert torch.equal(master, masters[name])
        assert master.grad is None
    text = page({"date": "today"}, found)
    assert "| 2 | NVFP4 | " in text
    assert "| fakequant(out=) | FP8 | " in text
    assert "| take_grads | pass-through | " in text
    assert "; the limit is 0.005." in text


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_way_with_other_weights_is_not_timed(training, monkeypatch, name):
    """One that leaves a format's weights for another's, as if it were never written."""
    made = getattr(Training, name)
    fq, state = step._transform(training, fqt.INT8)
    monkeypatch.setattr(Training, name, lambda self, *_: made(self, fq, state))
    with pytest.raises(SystemExit, match=f"gradient of .*, {name}, FP8"):
        list(step_rows(training, untouched, peers=False))


def test_a_wrong_write_is_not_timed(training, monkeypatch):
    monkeypatch.setattr(Training, "lens", lambda self, *_: self.bf16())
    with pytest.raises(SystemExit, match=r"linear_fc1\.weight0, written, FP8"):
        list(write_rows(training))


def test_a_peer_is_timed_or_is_a_gap_with_its_reason(training, monkeypatch):
    """A peer's model is trained in place of ours, with the same masters."""

    def convert(model, format, forward, pattern):
        if format is fqt.FP8:
            raise RuntimeError("no FP8")
        forward(model)
        return model

    monkeypatch.setattr(step, "modelopt_model", convert)
    found = list(step_rows(training, untouched))
    assert ["ModelOpt" in row["ways"] for row in found] == [False, True] * 2
    assert "FP8: RuntimeError: no FP8" in page({"date": "today"}, found)


def test_ways_are_left_out(training, monkeypatch):
    """All but the noise and the lens, as where time on a GPU is short."""
    monkeypatch.setattr(step, "WAYS", {name: WAYS[name] for name in (AGAIN, "lens")})
    for name in OURS - {"lens"}:
        monkeypatch.setattr(Training, name, None)
    found = list(step_rows(training, untouched, peers=False))
    assert all(set(row["ways"]) == {AGAIN, "lens"} for row in found)
    assert "layerwise" not in page({"date": "today"}, found)


@pytest.mark.gpu
def test_a_queue_times_the_device_without_the_host():
    """A host that sleeps between launches is not seen, nor is a cut; more launches than a queue takes are an error."""
    x = torch.randn(4096, 4096, device="cuda")
    x @ x  # whose first call takes the host longer than the head start

    def took(pause=0.0, is_cut=False, times=4):
        with Queue() as queue:
            for number in range(times):
                if is_cut and number == 2:
                    queue.cut()
                x @ x
                sleep(pause)
        return queue.us

    fast, slow, cut = (median(took(*how) for _ in range(5)) for how in ((), (0.008,), (0.0, True)))
    assert fast > 500
    # Pauses are 32 ms together. Other tests use the same GPU, so no two times are close.
    assert slow < fast + 16_000
    assert cut < fast + 16_000
    with pytest.raises(SystemExit, match="parts of fewer launches"):
        took(times=20_000)


def test_microbatches_are_cut_apart(training):
    """As often as there are others after one, whatever the way."""
    cuts = []
    training.between = lambda: cuts.append(1)
    training.step(training.bf16())
    assert len(cuts) == len(training.xs) - 1


def test_a_step_steps(training):
    """The halves of a way are around the optimizer, and no gradient is left for the next step."""
    order = []
    training.optimizer.register_step_post_hook(lambda *_: order.append("step"))
    way = Way(lambda: order.append("write"), lambda: order.append("grads"))
    turn = step._turn(training, way)
    turn.before()
    turn.call()
    assert order == ["write", "grads", "step", "write"]


def test_the_given_loss_is_the_gradient_given():
    x, grad = torch.randn(3, requires_grad=True), torch.randn(3)
    loss = _Given.apply(x * 1, grad)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(x.grad, grad)


def test_ratios_are_to_the_base_beside():
    """A base that slows down from call to call, by as much each time, does not show."""
    calls = []

    def timed(turn):
        turn.before()
        calls.append(turn.call())
        return len(calls) * {"base": 1.0, "a": 2.0, "b": 3.0}[calls[-1]]

    ready = []
    turns = {name: Turn(lambda name=name: name, lambda name=name: ready.append(name)) for name in ("base", "a", "b")}
    ratios, times = in_turns(turns.pop("base"), turns, 2, timed)
    assert calls == ready == ["base", "a", "base", "b", "base", "base", "b", "base", "a", "base"]
    assert ratios == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert times == [1, 3, 5, 6, 8, 10]


def test_the_error_of_a_median():
    """Of normal values sqrt(pi / 2) deviations over sqrt(n); outliers, which a host makes, do not change it."""
    values = torch.randn(200, 400)
    errors = [median_and_error(some.tolist())[1] for some in values]
    wanted = (torch.pi / 2 / 400) ** 0.5
    assert sum(errors) / 200 == pytest.approx(wanted, rel=0.1)
    assert values.median(1).values.std().item() == pytest.approx(wanted, rel=0.2)
    some = sorted(values[0].tolist())
    assert median_and_error([*some[:-20], *[1e9] * 20]) == median_and_error(some)
    assert median_and_error([3.0, 1.0]) == (2.0, 1.0)
    value, error = median_and_error([3.0])
    assert value == 3.0
    assert isnan(error)
