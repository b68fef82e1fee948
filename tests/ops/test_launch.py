"""A launch is found again by addresses: what else differs at the same addresses is seen."""

import random
import threading

import optree
import pytest
import torch

import fq_transforms as fqt
from fq_transforms.ops import launch, private
from fq_transforms.ops.amax.launch import expert_amax_triton
from fq_transforms.ops.quantize.launch import forward_plan
from tests.cases import assert_names, experts, message_of
from tests.interrupts import switching_often
from tests.variants import by_kernel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def named(weights):
    return {f"experts.{i}.weight": weight for i, weight in enumerate(weights)}


def check(params, format, state=None, times=3):
    """Each call gives what one weight at a time on the CPU gives; the second and the third may be launches again."""
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state = fq.calibrate(params) if state is None else state
    cpu = optree.tree_map(torch.Tensor.cpu, state)
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
            group["amax"].mul_(factor)
        check(params, fqt.NVFP4, state)


@pytest.mark.gpu
def test_another_stream(monkeypatch):
    """A launch goes to the stream that is current when it is called, though one to another stream is known."""
    launched, launcher_of = [], private.launcher_of

    def recording(compiled):
        run = launcher_of(compiled)

        def recorded(grid, stream, arguments):
            launched.append(stream)
            run(grid, stream, arguments)

        return recorded

    monkeypatch.setattr(private, "launcher_of", recording)
    monkeypatch.setattr(launch, "_CALLS", launch.Bounded(16))
    forward_plan.cache_clear()  # whose launchers other tests have made
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


@pytest.mark.gpu
def test_threads_that_plan_at_once():
    """Named bug: kernels were kept by the id of a plan. One that lost a race was freed, and a later one had its id."""
    formats = (fqt.INT8, fqt.INT8_PER_CHANNEL, fqt.FP8, fqt.INT4_BLOCK32, fqt.NVFP4, fqt.MXFP4)
    cases = []
    for rows in (16, 32, 48, 64):
        for format in formats:
            params = named(experts(3, (rows, 64), torch.bfloat16, seed=rows))
            fq = fqt.transform(fqt.select(params, {"*": format}))
            state = fq.calibrate(params)
            wanted = [weight.cuda() for weight in fq.fakequant(params, state).values()]
            params, state = optree.tree_map(torch.Tensor.cuda, (params, state))
            cases.append((fq, params, state, wanted))
    wrong, start = [], threading.Barrier(4)

    def run(seed):
        start.wait()
        for fq, params, state, wanted in random.Random(seed).sample(cases, len(cases)):
            found = [*fq.fakequant(params, state).values()]
            wrong.extend(fq for one, other in zip(found, wanted, strict=True) if not torch.equal(one, other))

    with switching_often():
        for again in range(25):
            forward_plan.cache_clear()
            launch._CALLS.clear()
            threads = [threading.Thread(target=run, args=(4 * again + i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


def read(matrices):
    """The addresses that a kernel computes, as `device.address` does."""
    start, table, stride = matrices.place[:3]
    if table is not None:
        return table.tolist()
    return [start + e * stride * matrices.base.element_size() for e in range(matrices.experts)]


def test_every_expert_is_where_the_kernel_looks():
    """Separate, evenly spaced, in reverse, repeated, stacked, expanded, sliced: the address of each, in order."""
    separate = [torch.randn(4, 8) for _ in range(5)]
    block = torch.randn(7, 4, 8)
    groups = {
        "separate": separate,
        "views": list(block),
        "every other": list(block[::2]),
        "reversed": list(block.flip(0).unbind()),
        "backwards": [block[i] for i in (4, 3, 2, 1)],
        "twice the same": [block[0], block[0]],
        "one": [block[3]],
        "stacked": [block],
        "two stacks": [block[:2], block[4:6]],
        "expanded": [block[0].expand(3, 4, 8)],
        "some of a stack": [block[1::3]],
    }
    for name, tensors in groups.items():
        found = launch.matrices_of(tensors)
        wanted = [m.data_ptr() for t in tensors for m in (t if t.dim() == 3 else [t])]
        assert read(found) == wanted, name
        assert found.experts == len(wanted), name
        assert found.matrix == (4, 8), name
        assert name == "separate" or (found.place.table is None) == (name != "two stacks"), name


def test_what_is_not_dense_is_copied_and_held():
    """A transposed or sliced matrix comes as a copy, which lives as long as its addresses do."""
    weight = torch.randn(8, 16)
    for tensors in ([weight.mT], [weight[:, ::2]], [weight[:, :5], weight[:, 5:10]]):
        found = launch.matrices_of(tensors)
        assert read(found) == [t.data_ptr() for t in found.tensors]
        assert all(torch.equal(copy, t) for copy, t in zip(found.tensors, tensors, strict=True))


def test_places_are_found_again_by_their_addresses(monkeypatch):
    """The same table for the same addresses and dtype; another for others, whatever the tensors are."""
    made = []
    uploaded = launch._uploaded
    monkeypatch.setattr(launch, "_uploaded", lambda *args: made.append(args[0]) or uploaded(*args))
    weights = [torch.randn(4, 8) for _ in range(3)]
    first = launch.matrices_of(weights)
    assert launch.matrices_of([w.detach() for w in weights]).place is first.place
    halves = launch.matrices_of([w.view(torch.float16) for w in weights])
    assert halves.place.kind != first.place.kind
    assert launch.matrices_of(weights[::-1]).place is not first.place
    assert len(made) == 3


def test_the_oldest_entry_is_dropped():
    """A bounded dict keeps what was added last."""
    some = launch.Bounded(3)
    for i in range(5):
        some[i] = str(i)
    some[3] = "again"
    assert dict(some) == {2: "2", 3: "again", 4: "4"}


def test_too_many_experts_are_refused():
    """More than CUDA's grid takes: an error with the number, before anything is launched."""
    weight, amax = torch.zeros(launch.MOST_EXPERTS + 1, 1, 1), torch.zeros(launch.MOST_EXPERTS + 1)
    message = message_of(ValueError, expert_amax_triton, [weight], format=fqt.INT8, transposed=False)
    assert_names(message, launch.MOST_EXPERTS + 1, launch.MOST_EXPERTS, "[1, 1]", "split it", "vmap")
    with pytest.raises(ValueError, match="65536 experts"):
        by_kernel([weight], amax, None, format=fqt.INT8, out_dtype=torch.float32)


def test_launches_are_as_triton_specializes():
    """A kernel is known again for what Triton compiles it for: alignment, tables, strides, dtypes."""
    block = torch.randn(3, 4, 8)
    shifted = torch.randn(3 * 32 + 1)[1:].view(3, 4, 8)
    odd = torch.randn(3, 4 * 8 + 1)[:, :32].unflatten(1, (4, 8))
    groups = [[block], [shifted], list(odd.unbind()), [block.half()], [torch.randn(4, 8) for _ in range(3)]]
    kinds = [launch.matrices_of(tensors).place.kind for tensors in groups]
    assert len(set(kinds)) == len(groups)
    assert launch.matrices_of([torch.randn(9, 4, 8)]).place.kind == kinds[0]
