"""KeyboardInterrupt at each line of what puts tensors and hooks into a model, and whether the model is as it was."""

import contextlib
import dis
import sys
from functools import cache

import torch
from torch.nn.utils import stateless
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.overrides import _get_current_function_mode_stack

import fq_transforms as fqt
from fq_transforms import in_use, sequential
from fq_transforms.activations import apply, observe, products, quantize, stepped
from fq_transforms.integrations import te
from fq_transforms.ops import private
from fq_transforms.training import layerwise, main_grad, optimizer, reads, value_and_grad

OURS = (
    in_use,
    sequential,
    stepped,
    apply,
    observe,
    products,
    quantize,
    te,
    layerwise,
    main_grad,
    optimizer,
    reads,
    value_and_grad,
)
# PyTorch's own, which lose what they hold if they are interrupted themselves.
THEIRS = (contextlib, stateless, sys.modules[NamedMemberAccessor.__module__], torch.overrides)
FILES = {module.__file__ for module in (*OURS, *THEIRS)}


@contextlib.contextmanager
def switching_often():
    """Threads take turns after a microsecond each."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# Ways to use a model.


class Small(torch.nn.Module):
    """A selected layer, a tied pair that is not selected, and a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 32, bias=False)
        self.head, self.tail = torch.nn.Linear(32, 2), torch.nn.Linear(32, 2)
        self.tail.weight = self.head.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return (self.head(torch.relu(self.layer(x))) + self.tail(x)).square().mean()


def ways_of(model, x):
    """Name -> a function of no arguments that uses the model and gives what it should give each time."""
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"layer.*": fqt.NVFP4}))
    with_inputs = fqt.transform(fqt.select(params, [fqt.Rule("layer.*", fqt.FP8, fqt.INT8)]))
    state, of_inputs = fq.calibrate(params), with_inputs.calibrate(params, x, model=model)
    step, step_with_inputs = (fqt.value_and_grad(lambda model, x: model(x), one, model) for one in (fq, with_inputs))
    others = {name: param.detach() * 2 for name, param in params.items()}

    def by_layer():
        with fqt.layerwise(fq, model, state):
            return torch.autograd.grad(model(x), list(params.values()))

    def quantized():
        with with_inputs.quantized_inputs(model, of_inputs):
            return model(x)

    return {
        "layerwise": by_layer,
        "value_and_grad": lambda: [*step(params, state, [x, x])[1].values()],
        "value_and_grad, inputs": lambda: [*step_with_inputs(params, of_inputs, [x])[1].values()],
        "apply": lambda: with_inputs.apply(model, params, of_inputs, x),
        "quantized_inputs": quantized,
        "calibrate": lambda: leaves_of(with_inputs.calibrate(params, [x, x], model=model)),
        "te.functional_call": lambda: te.functional_call(model, others, (x,)),
    }


def leaves_of(state):
    return [leaf for leaves in state.values() for leaf in leaves.values()]


def small():
    """A model, and its ways."""
    model = Small()
    return model, ways_of(model, torch.randn(4, 32))


# Interrupts.

opcodes_of = cache(lambda code: code.co_code)


def interrupted(call, at=None, files=FILES):
    """Call with KeyboardInterrupt at line number `at` of those above that it runs; how many it has run, and whether."""
    lines, before = 0, sys.gettrace()

    def on_line(frame, event, arg):
        nonlocal lines
        # A NOP, as of `try:`, stands outside of what `try` and `with` protect, as nothing is ever raised there.
        if event == "line" and opcodes_of(frame.f_code)[frame.f_lasti] != dis.opmap["NOP"]:
            lines += 1
            if lines - 1 == at:
                sys.settrace(before)
                raise KeyboardInterrupt
        return on_line

    def on_call(frame, event, arg):
        # What is raised in a finalizer Python prints and forgets.
        is_ours = frame.f_code.co_filename in files and frame.f_code.co_name != "__del__"
        return on_line if is_ours else None

    sys.settrace(on_call)
    try:
        call()
    except KeyboardInterrupt:
        return lines, True
    finally:
        sys.settrace(before)
    return lines, False


DICTS = (
    *("_parameters", "_buffers", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def things_of(model):
    """All that hangs in a model; the dicts too, which are the model's own."""
    dicts = [vars(module)[name] for module in model.modules() for name in DICTS]
    return [(own, list(own.items())) for own in dicts]


def assert_as_before(model, before):
    """The very same objects hang in the model, in the very same dicts; nothing looks on; nobody uses it."""
    for (now, items), (then, wanted) in zip(things_of(model), before, strict=True):
        assert now is then
        assert [(key, id(value)) for key, value in items] == [(key, id(value)) for key, value in wanted]
    assert private.saved_tensors_hooks() is None
    for mode in _get_current_function_mode_stack():  # an interrupt within PyTorch's own stack leaves one there
        assert mode.number == sys.maxsize  # which serves nobody
        mode.__exit__(None, None, None)
    assert not in_use._USES
    assert not products._HERE.stack.calls
    assert not products._HERE.stack.modes


def same(found, wanted):
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def check_interrupts(call, model, points=range):
    """Whatever line an interrupt comes at, the model is as before, and right; how many lines were tried."""
    wanted, before = call(), things_of(model)
    lines, _ = interrupted(call)
    assert lines > 50
    chosen = points(lines)
    for at in chosen:
        try:
            assert interrupted(call, at)[1]
            assert_as_before(model, before)
        except AssertionError as error:
            error.add_note(f"after an interrupt at line {at} of {lines}")
            raise
    assert same(call(), wanted)
    return len(chosen)
