"""A launch is found again by addresses: what else differs at the same addresses is seen."""

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.ops import calls
from fq_transforms.ops.quantize import kernel as kernels
from tests.cases import experts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def named(weights):
    return {f"experts.{i}.weight": weight for i, weight in enumerate(weights)}


def check(params, format, state=None, times=3):
    """Each call gives what one weight at a time on the CPU gives; the second and the third may be launches again."""
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state = fq.calibrate(params) if state is None else state
    cpu = {key: type(group)(*(leaf.cpu() for leaf in group)) for key, group in state.items()}
    wanted = fq.fakequant({name: weight.cpu().clone() for name, weight in params.items()}, cpu)
    for _ in range(times):
        for name, weight in fq.fakequant(params, state).items():
            assert torch.equal(weight.cpu(), wanted[name]), name
    return state


@on_each_device
def test_other_strides_at_the_same_addresses(device):
    """Square weights, and the same memory transposed: same addresses, shapes and dtypes, other numbers."""
    weights = experts(3, (64, 64), torch.float32, device=device)
    for _ in range(2):
        check(named(weights), fqt.INT8_PER_CHANNEL)
        check(named([weight.mT for weight in weights]), fqt.INT8_PER_CHANNEL)


@on_each_device
def test_another_dtype_or_shape_at_the_same_addresses(device):
    """The same bytes as bf16 and as fp16, and as matrices of another shape."""
    weights = experts(3, (32, 64), torch.bfloat16, device=device)
    for _ in range(2):
        check(named(weights), fqt.FP8)
        check(named([weight.view(torch.float16) for weight in weights]), fqt.FP8)
        check(named([weight.view(64, 32) for weight in weights]), fqt.INT8_PER_CHANNEL)


@on_each_device
def test_values_are_read_anew(device):
    """Weights and amax that are changed in place give other numbers: nothing of them is remembered."""
    params = named(experts(3, (32, 64), torch.bfloat16, device=device))
    state = check(params, fqt.NVFP4)
    for factor in (0.5, 3.0):
        for weight in params.values():
            weight.mul_(factor)
        for group in state.values():
            group.amax.mul_(factor)
        check(params, fqt.NVFP4, state)


@pytest.mark.gpu
def test_another_stream(monkeypatch):
    """A launch goes to the stream that is current when it is called, though one to another stream is known."""
    launched = []

    def recording(compiled, grid, stream, arguments):
        launched.append(stream)
        kernels.run_compiled(compiled, grid, stream, arguments)

    monkeypatch.setattr(calls, "run_compiled", recording)
    params = named(experts(3, (256, 1024), torch.bfloat16, device="cuda"))
    state = check(params, fqt.FP8)
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream()] * 4:
        with torch.cuda.stream(stream):
            found = len(launched)
            fq.fakequant(params, state)
            assert set(launched[found:]) <= {stream.cuda_stream}
    assert len(set(launched)) == 2
    torch.cuda.synchronize()
