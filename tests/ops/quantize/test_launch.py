"""From the door to the kernel, eager, compiled, and into memory that is there; the interpreter stands in for a GPU."""

import optree
import pytest
import torch

import fq_transforms as fqt
from fq_transforms.formats import INT8, MXFP4, NVFP4, NVFP4_STATIC
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize import autograd
from fq_transforms.ops.quantize.autograd import fake_quantize, fake_quantize_into
from fq_transforms.ops.quantize.launch import fake_quantize_triton
from fq_transforms.rounding import Stream
from tests.cases import experts, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.variants import CPU

pytestmark = [
    # numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Dynamo makes an instance of an autograd.Function when it traces one, and PyTorch warns that nobody should.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
DEVICE = "cuda" if HAS_GPU else "cpu"
on_this_device = pytest.mark.gpu if HAS_GPU else CPU


def run_kernels(monkeypatch, runs):
    """Kernels or references, on whatever device."""
    monkeypatch.setattr(autograd, "has_kernel", lambda weights: runs)


def step(fakequant, params, state, *, learns=False, rounding=None):
    """Fake weights, and the gradients of parameters and state."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    scales = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(learns), state)
    outs = fakequant(leaves, scales, rounding=rounding)
    sum((out * out).sum() for out in outs.values()).backward()
    learned = optree.tree_leaves(scales) if learns else []
    return [out.detach() for out in outs.values()], [t.grad for t in leaves.values()], [t.grad for t in learned]


def compiled(fakequant):
    torch.compiler.reset()
    return torch.compile(fakequant, fullgraph=True, backend="aot_eager")


@on_this_device
@pytest.mark.parametrize("stacked", [False, True], ids=["separate weights", "stacked"])
@pytest.mark.parametrize("separate", [False, True], ids=["one allocation", "separate"])
@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_kernels_behind_the_door(backward, separate, stacked, monkeypatch):
    """Eager and under torch.compile, which sees one operator that writes: values and gradients of the references."""
    weights = experts(3, (4, 64), device=DEVICE)
    params = {"experts.w": torch.stack(weights)} if stacked else {f"experts.{i}.w": w for i, w in enumerate(weights)}
    fq = fqt.transform(fqt.select(params, {"*": NVFP4_STATIC}), backward=backward, separate=separate)
    state, learns = fq.calibrate(params), backward == "lsq"
    run_kernels(monkeypatch, True)
    found = [step(f, params, state, learns=learns) for f in (fq.fakequant, compiled(fq.fakequant))]
    run_kernels(monkeypatch, False)
    wanted = step(fq.fakequant, params, state, learns=learns)
    for outs, of_weights, of_state in found:
        assert all(map(torch.equal, outs, wanted[0]))
        assert all(map(torch.equal, of_weights, wanted[1]))
        assert all(torch.allclose(*pair, rtol=1e-5) for pair in zip(of_state, wanted[2], strict=True)), "sums"


@on_this_device
@pytest.mark.parametrize("separate", [False, True], ids=["one allocation", "separate"])
def test_kernels_behind_the_door_by_chance(separate, monkeypatch):
    """The same operator with a seed."""
    params = {f"experts.{i}.w": w for i, w in enumerate(experts(3, (4, 64), device=DEVICE))}
    fq = fqt.transform(fqt.select(params, {"*": INT8}), backward="clip", separate=separate)
    state, rounding = fq.calibrate(params), fqt.Stochastic(torch.tensor(5, device=DEVICE))
    run_kernels(monkeypatch, True)
    found = [step(f, params, state, rounding=rounding) for f in (fq.fakequant, compiled(fq.fakequant))]
    run_kernels(monkeypatch, False)
    outs, of_weights, _ = step(fq.fakequant, params, state, rounding=rounding)
    for kind in found:
        assert all(map(torch.equal, kind[0], outs))
        assert all(map(torch.equal, kind[1], of_weights))


@on_this_device
@pytest.mark.parametrize("runs_kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("format", [INT8, NVFP4, NVFP4_STATIC, MXFP4], ids=name_of)
def test_into_memory_that_is_there(format, runs_kernel, monkeypatch):
    """Bit for bit what `fake_quantize` gives, into other dtypes too; versions count up, inputs are not written."""
    run_kernels(monkeypatch, runs_kernel)
    weights = experts(3, (4, 64), device=DEVICE)
    before = [weight._version for weight in weights]
    amax, global_amax = (None, None) if format.is_stateless else expert_amax(weights, format=format)
    for dtype in (torch.float32, torch.bfloat16) if HAS_GPU or not runs_kernel else (torch.float32, torch.float16):
        for draws in ({}, {"seed": torch.tensor(3, device=DEVICE), "stream": Stream(7)}):
            wanted = fake_quantize(weights, amax, global_amax, format=format, out_dtype=dtype, **draws)
            outs = [torch.empty_like(w, dtype=dtype) for w in weights]
            block = torch.empty(3, 4, 64, dtype=dtype, device=DEVICE)
            for into in (outs, list(block)):
                versions = [out._version for out in into]
                fake_quantize_into(into, weights, amax, global_amax, format=format, **draws)
                assert all(map(same_bits, into, wanted))
                assert all(out._version > version for out, version in zip(into, versions, strict=True))
    assert [weight._version for weight in weights] == before


def test_into_what_is_not_contiguous_is_an_error():
    """A copy would be written in its place, and nobody would see it."""
    weight = torch.randn(4, 8)
    with pytest.raises(AssertionError, match="a copy of an out"):
        fake_quantize_triton([torch.empty(8, 4).mT], [weight], torch.tensor([1.0]), None, format=INT8, transposed=False)


@CPU
def test_a_graph_that_kept_what_is_written_over_raises():
    """As after any change in place, backward says so."""
    weights, amax = [torch.randn(2, 4)], torch.tensor([1.0])
    out = torch.randn(2, 4)
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x * out).sum()
    fake_quantize_into([out], weights, amax, None, format=INT8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
