"""Threads, tasks and interrupts at any time: what is not right is refused, and the model is always as it was.

A sample in CI; with FULL=1 thousands of drawn orders, and every line at which an interrupt may come.
"""

import ctypes
import gc
import random
import threading
import time

import pytest
import torch

import fq_transforms as fqt
from fq_transforms import in_use
from tests.full import FULL
from tests.interrupts import Small, assert_as_before, check_interrupts, same, small, switching_often, things_of, ways_of

WAYS = [*small()[1]]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_line_that_an_interrupt_comes_at(way):
    """At most one interrupt: the very same parameters, buffers and hooks, in the very same dicts."""
    model, ways = small()
    step = 1 if FULL else 11
    assert check_interrupts(ways[way], model, lambda lines: range(0, lines, step)) > 20


# Interrupts of Python's own.


def interrupted_after(call, seconds):
    """Call, while another thread raises KeyboardInterrupt here after some seconds; True if it came in time."""
    here = ctypes.c_ulong(threading.get_ident())
    raise_here = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def interrupt():
        time.sleep(seconds)
        raise_here(here, ctypes.py_object(KeyboardInterrupt))

    thread, came = threading.Thread(target=interrupt), False
    try:
        thread.start()
        call()
        came = not thread.is_alive()  # and if it has, its exception is on its way
        deadline = time.monotonic() + seconds + 1.0
        while time.monotonic() < deadline:
            thread.join(1e-3)
            if not thread.is_alive():
                sum(range(100))  # where it comes
        return came
    except KeyboardInterrupt:
        return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # those that come in finalizers
@pytest.mark.parametrize("way", WAYS)
def test_interrupts_at_any_time(way):
    """Between any two instructions, PyTorch's too: as at lines, for which Python tells where they are."""
    draw = random.Random(way)
    model, ways = small()
    wanted = ways[way]()
    began = time.perf_counter()
    ways[way]()
    lasts = time.perf_counter() - began
    before = things_of(model)
    for _ in range(2000 if FULL else 100):
        interrupted_after(ways[way], draw.random() * lasts * 1.2)
        torch.set_grad_enabled(True)  # which `torch.no_grad` may leave, if it is interrupted itself
        gc.collect(0)
        assert_as_before(model, before)
    assert same(ways[way](), wanted)


# Threads.


@pytest.mark.slow
def test_threads_that_use_one_model_in_every_way():
    """Each call gives what it gives alone, or says that the model is in use; in the end the model is as it was."""
    model = Small()
    x = torch.randn(4, 32)
    ways = ways_of(model, x)
    # What runs the model as it is cannot be right beside what puts weights into it, nor can it be told.
    del ways["quantized_inputs"]
    wanted = {name: way() for name, way in ways.items()}
    before, results, stop = things_of(model), [], time.monotonic() + (60 if FULL else 3)

    def use(seed):
        draw = random.Random(seed)
        while time.monotonic() < stop:
            name = draw.choice([*ways])
            try:
                results.append("right" if same(ways[name](), wanted[name]) else f"{name} is wrong")
            except ValueError as error:
                results.append("refused" if " in use by " in str(error) else f"{name}: {error}")
            except Exception as error:
                results.append(f"{name}: {error!r}")

    with switching_often():
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(results) == {"right", "refused"}
    assert_as_before(model, before)


class Shares(torch.nn.Module):
    """Two layers, each of which may be another model's too, or have another's weight."""

    def __init__(self, draw, others):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(2))
        for i in range(2):
            if others and draw.random() < 0.3:
                other = draw.choice(others).layers[draw.randrange(2)]
                if draw.random() < 0.5:
                    self.layers[i] = other
                else:
                    self.layers[i].weight = other.weight
        if self.layers[0].weight is self.layers[1].weight:
            self.layers[1] = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def things_it_uses(model):
    return {id(thing) for thing in (*model.modules(), *model.parameters())}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000 if FULL else 40))
def test_layerwise_entered_and_left_in_any_order(seed):
    """Refused exactly where a module or parameter is in use; right within; in the end all is as it was."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    models = []
    for _ in range(4):
        models.append(Shares(draw, models))
    x = torch.randn(2, 32)
    made = []
    for model in models:
        params = dict(model.named_parameters())
        fq = fqt.transform(fqt.select(params, {"*weight": draw.choice([fqt.NVFP4, fqt.INT8])}))
        state = fq.calibrate(params)
        made.append((fq, state, torch.func.functional_call(model, fq.fakequant(params, state), (x,))))
    before = [things_of(model) for model in models]
    open_now = {}
    for _ in range(20):
        i = draw.randrange(4)
        if i in open_now and draw.random() < 0.6:
            context = open_now.pop(i)
            act = draw.choice([lambda context=context: context.__exit__(None, None, None), lambda: None])
        else:
            fq, state, _ = made[i]
            context = fqt.layerwise(fq, models[i], state)
            is_free = all(things_it_uses(models[i]).isdisjoint(things_it_uses(models[j])) for j in open_now)

            def act(context=context, i=i, is_free=is_free):
                try:
                    context.__enter__()
                except ValueError as error:
                    said = str(error)
                    assert not is_free, said
                    assert " in use by layerwise" in said
                else:
                    assert is_free
                    open_now[i] = context

        failed = []

        def guarded(act=act, failed=failed):
            try:
                act()
            except BaseException as error:
                failed.append(error)

        if draw.random() < 0.3:
            thread = threading.Thread(target=guarded)
            thread.start()
            thread.join()
        else:
            guarded()
        assert not failed, failed
        del context, act, guarded  # one that nobody has left ends here
        for j in open_now:
            with torch.no_grad():
                assert torch.equal(models[j](x), made[j][2])
    open_now.clear()
    assert not in_use._USES
    for model, things in zip(models, before, strict=True):
        assert_as_before(model, things)
