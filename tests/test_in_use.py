"""What puts tensors or hooks into a model has it to itself, and leaves it as it was, in any order, after anything."""

import asyncio
import sys
import threading

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms import checks
from fq_transforms.in_use import _USES, InUse
from fq_transforms.integrations import megatron_step
from fq_transforms.ops import launch
from tests.cases import assert_names, message_of
from tests.interrupts import (
    Small,
    assert_as_before,
    check_interrupts,
    interrupted,
    same,
    small,
    switching_often,
    things_of,
    ways_of,
)

PULLBACK, MASTERS = (
    sys.modules[f"fq_transforms.{name}"] for name in ("pullback", "masters")
)  # functions have the names
WAYS = [*small()[1]]
EXCLUSIVE, CALLS = WAYS[:1], [way for way in WAYS if way not in ("layerwise", "quantized_inputs")]


def layering(model, part=None):
    """`layerwise` on a model, or on a part of one."""
    part = model if part is None else part
    params = dict(part.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*weight": fqt.INT8}))
    return fqt.layerwise(fq, part, fq.calibrate(params))


def in_thread(function):
    """What a function gives or raises in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="the other")
    thread.start()
    thread.join()
    return found[0]


# A second use is refused.


class Parts(torch.nn.Module):
    def __init__(self, one=None, weight=None):
        super().__init__()
        self.one, self.two = one or torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False)
        if weight is not None:
            self.two.weight = weight

    def forward(self, x):
        return self.two(self.one(x))


def the_same(model):
    return model, "the model"


def a_part(model):
    return model.one, "the model"


def around_it(model):
    return Parts(one=model), "one"


def a_shared_module(model):
    return Parts(one=model.one), "one"


def a_shared_parameter(model):
    return Parts(weight=model.two.weight), "two.weight"


@pytest.mark.parametrize("other", [the_same, a_part, around_it, a_shared_module, a_shared_parameter])
@pytest.mark.parametrize("runs", [lambda call: call(), in_thread], ids=["here", "thread"])
def test_layerwise_is_refused_where_it_is_already(other, runs):
    """Named bug: whoever left first took the other's fake weights for the model's own, and they stayed for good."""
    model = Parts()
    second, name = other(model)
    before, before_second = things_of(model), things_of(second)
    first = layering(model)
    first.__enter__()
    within, within_second = things_of(model), things_of(second)

    def enter():
        with pytest.raises(ValueError, match="found") as error:
            layering(model, second).__enter__()
        return str(error.value)

    said = runs(enter)
    assert_names(said, "layerwise", repr(name), "in use by layerwise", "MainThread", "copy.deepcopy")
    for found, wanted in ((model, within), (second, within_second)):
        for (now, items), (then, then_items) in zip(things_of(found), wanted, strict=True):
            assert now is then
            assert [id(value) for _, value in items] == [id(value) for _, value in then_items]
    model(torch.ones(2, 32)).sum().backward()
    first.__exit__(None, None, None)
    assert_as_before(model, before)
    assert_as_before(second, before_second)
    for param in model.parameters():
        param.grad = None
    with layering(second):  # nobody uses it any more
        second(torch.ones(2, 32))


def test_two_tasks():
    """Named bug: of two tasks that take turns within `layerwise` the first to leave left fakes to the second."""
    model, x = Parts(), torch.ones(2, 32)
    before = things_of(model)

    async def task():
        with layering(model):
            await asyncio.sleep(0)
            model(x)
            await asyncio.sleep(0)

    async def both():
        return await asyncio.gather(task(), task(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert_names(str(second), "in use by layerwise")
    assert_as_before(model, before)


def test_generators_that_are_left_in_any_order_or_dropped():
    """Models of their own are left in any order. A context that nobody leaves ends with its generator."""
    models, x = [Parts(), Parts(), Parts()], torch.ones(2, 32)
    before = [things_of(model) for model in models]

    def generated(model):
        with layering(model):
            yield model(x)

    running = [generated(model) for model in models]
    assert [len(next(one)) for one in running] == [2, 2, 2]
    assert len(_USES) == 3
    for i in (0, 2, 1):
        running[i] = None
    for model, wanted in zip(models, before, strict=True):
        assert_as_before(model, wanted)


@pytest.mark.parametrize("way", CALLS)
def test_two_threads(way):
    """Named bug: `value_and_grad` of two threads on one model was wrong in 1 of 70 calls. The first stays right."""
    model, ways = small()
    before, wanted = things_of(model), ways[way]()
    said = {}

    def meanwhile(module, args):
        for other in [*CALLS, *EXCLUSIVE]:
            if other not in said:
                said[other] = ""
                said[other] = str(in_thread(ways[other]))

    hook = model.tail.register_forward_pre_hook(meanwhile)
    assert same(ways[way](), wanted)
    hook.remove()
    assert len(said) == len(CALLS) + len(EXCLUSIVE)
    caller = way.removesuffix(", inputs")
    for message in said.values():
        assert_names(message, "found 'the model' (Small)", f"{caller} in 'MainThread'")
    assert_as_before(model, before)


@pytest.mark.parametrize("way", CALLS)
def test_within_layerwise(way):
    """What quantizes, or wants no quantization, is refused where each layer quantizes what it has."""
    model, ways = small()
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"layer.*": fqt.NVFP4}))
    with fqt.layerwise(fq, model, fq.calibrate(params)):
        assert_names(message_of(ValueError, ways[way]), "in use by layerwise")
        model(torch.ones(2, 32))
    assert not isinstance(in_thread(ways[way]), Exception)


def test_a_layer_that_two_threads_run_within_one_layerwise():
    """The second would compute with the first one's weights, and take them away."""
    model = Parts()
    said, before = [], things_of(model)

    def meanwhile(module, args, output):
        if not said:
            said.append("")
            said[0] = str(in_thread(lambda: model(torch.ones(2, 32))))

    hook = model.one.register_forward_hook(meanwhile)
    hooked = things_of(model)
    with layering(model):
        model(torch.ones(2, 32))
    assert_names(said[0], "layer Linear", "another thread runs it", "copy.deepcopy")
    assert_as_before(model, hooked)
    hook.remove()
    assert_as_before(model, before)


def test_what_fails_while_it_ends_lets_others_begin():
    """Otherwise a model could never be used again."""
    model = Parts()
    with pytest.raises(ZeroDivisionError), InUse("one", model.named_modules()) as use:
        use.undo.append(lambda: 1 // 0)
    with layering(model):
        model(torch.ones(2, 32))


def test_unquantized_is_not_entered_twice():
    """Named bug: whoever left first wrote fake weights, which the other took for unquantized ones."""
    model = Parts()
    opt = optimizing(model)
    written = [param.clone() for param in model.parameters()]
    with opt.unquantized():
        values = [param.clone() for param in model.parameters()]
        assert_names(message_of(ValueError, opt.unquantized().__enter__), "unquantized", "'one.weight'", "MainThread")
        assert same([*model.parameters()], values)
        assert not same(values, written)
    assert same([*model.parameters()], written)


def optimizing(model):
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*weight": fqt.INT4_BLOCK32}))
    return fqt.FakeQuantOptimizer(fq, torch.optim.SGD(params.values(), lr=0.1), model, fq.calibrate(params))


def test_quantized_inputs_are_left_in_any_order():
    """Named bug: who left first took away the other's, whose inputs stayed unquantized from then on."""
    models = [Small(), Small()]
    x = torch.randn(4, 32)
    wanted = [ways_of(model, x)["quantized_inputs"]() for model in models]

    def generated(model):
        params = dict(model.named_parameters())
        fq = fqt.transform(fqt.select(params, [fqt.Rule("layer.*", fqt.FP8, fqt.INT8)]))
        with fq.quantized_inputs(model, fq.calibrate(params, x, model=model)):
            first = model(x)
            yield first
            yield model(x)

    one, two = map(generated, models)
    before = [things_of(model) for model in models]
    assert same(next(one), wanted[0])
    assert same(next(two), wanted[1])
    next(one)
    assert list(one) == []  # left before the one within
    assert same(next(two), wanted[1])
    assert list(two) == []
    for model, things in zip(models, before, strict=True):
        assert_as_before(model, things)


class Shared(Small):
    """A module of three names, one of them further down, with a selected weight and a buffer; and what `Small` has."""

    def __init__(self):
        super().__init__()
        self.again, self.inner = self.layer, torch.nn.Module()
        self.inner.layer = self.layer
        self.layer.register_buffer("gain", torch.full((), 2.0))

    def forward(self, x):
        return super().forward(self.again(x) + self.inner.layer(x) * self.layer.gain)


@pytest.mark.parametrize("way", [*WAYS, "buffers"])
def test_a_module_of_several_names_keeps_its_tensors(way):
    """Named bug: PyTorch's functional_call left fake weights in it for good; after an error, too, each is its own."""
    model, x = Shared(), torch.randn(4, 32)
    call = (ways_of(model, x) | {"buffers": lambda: called_with_copies(model, x)})[way]
    fails = []

    def fail(module, args):
        if fails:
            raise ZeroDivisionError

    model.tail.register_forward_pre_hook(fail)
    before = things_of(model)
    wanted = call()
    assert_as_before(model, before)
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        call()
    assert_as_before(model, before)
    fails.clear()
    assert same(call(), wanted)


def called_with_copies(model, x):
    copies = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "tail" not in name}
    del copies["again.weight"], copies["again.gain"], copies["inner.layer.weight"], copies["inner.layer.gain"]
    with InUse("one", model.named_modules()) as use:
        return use.call(model, copies, (x,), {})


# Interrupts. tests/fuzz_threads.py tries every line.


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_leaves_the_model_as_it_was(way):
    """Named bug: it left parameters replaced in 24 of 5,996. Here at every 17th line."""
    model, ways = small()
    assert check_interrupts(ways[way], model, lambda lines: range(0, lines, 17)) > 20


def test_an_interrupt_leaves_fake_weights_after_unquantized():
    """Neither half of the masters, nor a context that nobody can enter again."""
    torch.manual_seed(0)
    model = Parts()
    opt = optimizing(model)
    written = [param.clone() for param in model.parameters()]

    def evaluate():
        with opt.unquantized():
            model(torch.ones(2, 32))

    lines, _ = interrupted(evaluate)
    for at in range(lines):
        assert interrupted(evaluate, at)[1]
        assert same([*model.parameters()], written), at
    evaluate()


def test_training_goes_on_within_layerwise_after_an_interrupt():
    """Named bug: the layer that was interrupted kept its fake weights, of before the optimizer's step."""
    model, x = Parts(), torch.ones(2, 32)
    params, before = dict(model.named_parameters()), things_of(model)
    fq = fqt.transform(fqt.select(params, {"*weight": fqt.INT8}))
    state = fq.calibrate(params)
    with fqt.layerwise(fq, model, state):
        hook = model.one.register_forward_pre_hook(_interrupt)  # behind those of the layer
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        with torch.no_grad():
            for param in params.values():
                param.mul_(0.5)
        found = model(x)
        with torch.no_grad():
            read = model.one.weight + 1  # while nothing runs
    assert torch.equal(read, params["one.weight"] + 1)
    assert torch.equal(found, functional_call(model, fq.fakequant(params, state), (x,)))
    assert_as_before(model, before)


def _interrupt(*args):
    raise KeyboardInterrupt


class Part:
    """As one of Megatron's optimizers: methods that are replaced on the instance."""

    def step_with_ready_grads(self):
        return True

    def prepare_grads(self):
        return False

    def _copy_main_params_to_model_params(self):
        """Replaced."""

    def _copy_model_params_to_main_params(self, state_dict=None):
        """Replaced."""


def attaching(part, params, main):
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), backward="clip")
    options = {"recalibrate": None, "rounding": None, "is_distributed": False}
    return megatron_step.Attached(fq, part, [part], main, params, fq.calibrate(main), **options)


def test_attaching_twice_or_interrupted_leaves_the_optimizers_own_methods():
    """Of two that attach at once one is refused; whatever an interrupt comes in, detaching or its error gives back."""
    params = {"w": torch.nn.Parameter(torch.randn(4, 4))}
    main = {"w": torch.nn.Parameter(params["w"].detach().clone())}
    part = Part()
    attached = attaching(part, params, main)
    names = vars(part).copy()
    assert_names(message_of(ValueError, attaching, part, params, main), "attached already", "detach")
    assert vars(part) == names
    attached.detach()
    assert not vars(part)

    files = {megatron_step.__file__}
    lines, _ = interrupted(lambda: attaching(part, params, main), files=files)
    vars(part).clear()
    for at in range(lines):
        assert interrupted(lambda: attaching(part, params, main), at, files=files)[1]
        assert not vars(part), at

    attached = attaching(part, params, main)
    lines, _ = interrupted(attached.detach, files=files)
    for at in range(lines):
        attached = attaching(part, params, main)
        assert interrupted(attached.detach, at, files=files)[1]
        if attached._is_attached:
            attached.detach()
        assert not vars(part), at
        assert torch.equal(params["w"], main["w"])


# What is remembered.


def test_an_entry_holds_what_its_key_names():
    """A key that is an id is of an object that lives as long as the entry, so that no later one has it."""
    for _ in range(3):
        params = {f"{i}.weight": torch.nn.Parameter(torch.randn(4, 4)) for i in range(3)}
        fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
        state = fq.calibrate(params)
        main = fqt.masters(params)
        fq.fakequant(main, state, out=params)
        fq.pullback(main, state, params)
    of_groups, of_specs, of_writes = checks._CHECKED, PULLBACK._CHECKED, MASTERS._PLANNED
    assert all(key == id(of_groups[key].group) for key in of_groups)
    assert all(key == id(of_specs[key].spec) for key in of_specs)
    assert all(key[0] == id(of_writes[key].spec) for key in of_writes)
    assert of_groups
    assert of_specs
    assert of_writes


def test_a_full_cache_takes_more_between_any_two_instructions():
    """Named bug: two that made room at once raised KeyError, or 'dictionary changed size during iteration'."""
    code = launch.Bounded.__setitem__.__code__

    def add_while_another_adds(at):
        """Another thread's addition comes before instruction number `at`; how many there were."""
        some, seen = launch.Bounded(2), 0
        some["a"] = some["b"] = 0

        def on_instruction(frame, event, arg):
            nonlocal seen
            if event == "opcode":
                seen += 1
                if seen - 1 == at:
                    for key in "xyz":
                        some[key] = 1  # which is not traced, as this is called while tracing
            return on_instruction

        def on_call(frame, event, arg):
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            return on_instruction

        before = sys.gettrace()
        sys.settrace(on_call)
        try:
            some["c"] = 0
        finally:
            sys.settrace(before)
        assert 0 < len(some) <= 2
        return seen

    instructions = add_while_another_adds(None)
    assert instructions > 10
    for at in range(instructions):
        add_while_another_adds(at)


def test_a_full_cache_takes_more_from_many_threads():
    """Each adds, and in the end there are no more than fit."""
    some, failed = launch.Bounded(4), []
    start = threading.Barrier(4)

    def add(number):
        start.wait()
        try:
            for i in range(20_000):
                some[number, i] = i
        except Exception as error:
            failed.append(error)

    with switching_often():
        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert 0 < len(some) <= 4
