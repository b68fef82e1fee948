"""Each private API has a public way beside it that gives the same answers: here the private ones are taken away."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import fq_transforms as fqt
from fq_transforms.ops import private
from fq_transforms.ops.launch import Contiguous, results_for
from fq_transforms.ops.quantize.launch import fake_quantize_triton
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import experts

PRIVATE = [
    "_tensor_guards",
    "_raw_stream",
    "_functorch_active",
    "_forward_level",
    "_launcher",
    "_is_view",
    "_copy_all",
    "_add_all",
]


@pytest.fixture(params=[False, True], ids=["private", "public"])
def either(request, monkeypatch):
    """With the private APIs, and without any."""
    if request.param:
        for name in PRIVATE:
            monkeypatch.setattr(private, name, None)


def test_every_name_is_one_that_can_be_taken_away():
    """A private API that is added is added here, too."""
    found = [name for name, value in vars(private).items() if value is not None and name in PRIVATE]
    wanted = PRIVATE if torch.version.cuda else [name for name in PRIVATE if name != "_raw_stream"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.usefixtures("either")
def test_guards_see_what_differs():
    """Another type, dtype, shape, stride or number of tensors is seen; other values and other memory are not."""
    tensors = [torch.randn(4, 6) for _ in range(3)]
    guards = private.Guards(tensors)
    assert guards.match(tensors)
    assert guards.match([t.clone() for t in tensors])
    for other in (
        torch.nn.Parameter(torch.randn(4, 6)),
        torch.randn(4, 6, dtype=torch.float64),
        torch.randn(6, 4),
        torch.randn(6, 4).mT,
        torch.randn(4, 6, 1),
        torch.randn(4, 6, device="meta"),
    ):
        assert not guards.match([tensors[0], other, tensors[2]])


@pytest.mark.usefixtures("either")
def test_what_looks_on():
    """True within each transform and within forward mode, and False outside and after an error inside."""
    seen = []

    def look(x):
        seen.append((private.is_functorch_active(), private.is_transformed()))
        return (x * x).sum()

    x = torch.ones(3)
    for run in (
        lambda: grad(look)(x),
        lambda: vjp(look, x),
        lambda: jvp(look, (x,), (x,)),
        lambda: vmap(look)(x[None]),
        lambda: grad(lambda y: vmap(look)(y[None]).sum())(x),
    ):
        run()
    assert seen == [(True, True)] * 5
    with forward_ad.dual_level():
        assert (private.is_functorch_active(), private.is_transformed()) == (False, True)
    assert (private.is_functorch_active(), private.is_transformed()) == (False, False)
    for level in (nullcontext, torch.no_grad, torch.inference_mode):
        with level():
            assert not private.is_transformed()


@pytest.mark.usefixtures("either")
def test_what_is_under_the_wrappers():
    """The tensor itself, of which only vmap makes a mapped one; a plain tensor is itself."""
    found = []

    def look(x, y):
        found.append((private.unwrapped(x), private.unwrapped(y), private.is_mapped(x), private.is_mapped(y)))
        return (x * y).sum()

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    wanted = {(False, False): 0, (True, False): 0}
    grad(look)(x, y)
    vjp(look, x, y)
    jvp(lambda x: look(x, y), (x,), (y,))
    vmap(look, in_dims=(0, None))(x, y)
    grad(lambda x: vmap(look, in_dims=(0, None))(x, y).sum())(x)
    vmap(grad(look), in_dims=(0, None))(x, y)
    look(x, y)
    for inner, other, is_mapped, is_other_mapped in found:
        assert torch.equal(inner, x)
        assert torch.equal(other, y)
        assert type(inner) is torch.Tensor
        assert inner.data_ptr() == x.data_ptr()
        wanted[is_mapped, is_other_mapped] += 1
    assert wanted == {(False, False): 4, (True, False): 3}


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_fakequant_is_the_same(backward):
    """Values, gradients, and a batch: nothing that a user sees depends on a private API."""
    params = {f"experts.{i}.weight": w for i, w in enumerate(experts(3, (4, 64)))}
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), backward=backward)
    state = {key: {"amax": leaves["amax"] * 0.7} for key, leaves in fq.calibrate(params).items()}
    (leaves,) = state.values()
    clamped = {name: w.clamp(-a, a) for (name, w), a in zip(params.items(), leaves["amax"], strict=True)}
    for _ in range(2):
        for fake, w, a in zip(fq.fakequant(params, state).values(), params.values(), leaves["amax"], strict=True):
            assert torch.equal(fake, fake_quantize_reference(w, a, None, format=fqt.INT8, out_dtype=w.dtype))
    fakes, pullback = vjp(lambda p: fq.fakequant(p, state), params)
    (gradients,) = pullback({name: torch.ones_like(w) for name, w in fakes.items()})
    for name, gradient in gradients.items():
        is_kept = backward == "pass_through" or params[name] == clamped[name]
        assert torch.equal(gradient, torch.ones_like(gradient) * is_kept)
    leaves = {name: w.clone().requires_grad_() for name, w in params.items()}
    sum(w.sum() for w in fq.fakequant(leaves, state).values()).backward()
    assert all(torch.equal(leaf.grad, gradients[name]) for name, leaf in leaves.items())
    batch = vmap(lambda f: fq.fakequant({name: w * f for name, w in params.items()}, state))(torch.tensor([1.0, 2.0]))
    for name, fake in fq.fakequant({name: w * 2 for name, w in params.items()}, state).items():
        assert torch.equal(batch[name][1], fake)


class Compiled:
    """As Triton's compiled kernels are launched, the private way and the public one."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.seen = []

    def run(self, *arguments):
        self.seen.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.seen.append((grid, stream, arguments))


class Other:
    """A kernel of another Triton."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return Compiled.__getitem__(self, grid)


PRIVATELY, PUBLICLY = (2, 3, 1, 7, "function", "metadata", None, None, None, 10, 11), ((2, 3, 1), 7, (10, 11))


def test_kernels_are_launched_by_what_triton_has(monkeypatch):
    """Its own launcher where it is as known, with profilers' hooks the public one, and that one in another Triton."""
    knobs = pytest.importorskip("triton.knobs").runtime
    compiled, other = Compiled(), Other()
    launch = private.launcher_of(compiled)
    launch((2, 3, 1), 7, (10, 11))
    private.launcher_of(other)((2, 3, 1), 7, (10, 11))
    assert (compiled.seen.pop(), other.seen.pop()) == (PRIVATELY, PUBLICLY)
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(knobs, hook, lambda *_: None)
            launch((2, 3, 1), 7, (10, 11))
            assert compiled.seen.pop() == PUBLICLY
    monkeypatch.setattr(private, "_launcher", None)
    for run in (launch, private.launcher_of(compiled)):
        run((2, 3, 1), 7, (10, 11))
        assert compiled.seen.pop() == PUBLICLY


@pytest.mark.gpu
def test_launches_are_the_same(monkeypatch):
    """On a GPU, through Triton's public launcher and PyTorch's public stream, on another stream too."""
    weights = experts(5, (64, 256), torch.bfloat16, device="cuda")
    amax = torch.stack([w.float().abs().amax() for w in weights])

    def run():
        out = results_for(weights, torch.bfloat16)
        fake_quantize_triton([out], Contiguous(weights), amax, None, format=fqt.FP8, transposed=False)
        return out

    results = [run() for _ in range(3)]
    for name in PRIVATE:
        monkeypatch.setattr(private, name, None)
    results += [run() for _ in range(3)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert private.current_stream(torch.cuda.current_device()) == stream.cuda_stream
        results.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(out, results[0]) for out in results)


def test_hooks_that_nobody_can_tell_of_are_an_error(monkeypatch):
    """Where PyTorch does not tell which saved-tensor hooks are active, the error says what to use."""
    assert private.saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack := lambda t: t, unpack := lambda t: t):
        assert private.saved_tensors_hooks() == (pack, unpack)
    monkeypatch.setattr(private, "_top_hooks", None)
    with pytest.raises(RuntimeError, match=r"recompute=False"):
        private.saved_tensors_hooks()
