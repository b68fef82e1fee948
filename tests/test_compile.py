"""torch.compile traces the transform whole, a CUDA graph replays it, and no call waits for the device."""

import warnings

import optree
import pytest
import torch

import fq_transforms as fqt
from tests.cases import CORE_FORMATS, ONE_OF_EACH_LEAF, experts, name_of

# Dynamo makes an instance of an autograd.Function when it traces one, and PyTorch warns that nobody should.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_format = pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)


def parameters(device, dtype=torch.float32):
    weights = experts(4, (24, 128), dtype, device=device)
    return {f"experts.{i}.weight": w for i, w in enumerate(weights)} | {"norm.weight": torch.ones(128, device=device)}


def transform_of(params, format, **options):
    return fqt.transform(fqt.select(params, {"experts.*": format}), **options)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("format", "backward"),
    [(format, "clip" if format.clips else "pass_through") for format in CORE_FORMATS]
    + [(format, "pass_through") for format in ONE_OF_EACH_LEAF if format.clips],
    ids=name_of,
)
def test_fullgraph_fakequant(format, device, backward):
    """One graph, no break: values and gradients of the compiled function are the eager ones, bit for bit."""
    torch.compiler.reset()
    params = parameters(device)
    fq = transform_of(params, format, backward=backward, out_dtype=torch.bfloat16)
    state = fq.calibrate(params)
    # On the CPU the compiler's own arithmetic is not the subject, only that everything is traced.
    compiled = torch.compile(fq.fakequant, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for function in (compiled, fq.fakequant):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        weights = function(leaves, state)
        sum(w.float().square().sum() for w in weights.values()).backward()
        results.append((weights, {name: leaf.grad for name, leaf in leaves.items()}))
    (found, found_grads), (wanted, wanted_grads) = results
    assert_same(found, wanted)
    assert_same(found_grads, wanted_grads)


@pytest.mark.parametrize("device", DEVICES)
@every_format
def test_fullgraph_calibrate(format, device):
    """Calibration compiles whole too; what cannot be traced is the check of values, which is left out."""
    torch.compiler.reset()
    params = parameters(device)
    fq = transform_of(params, format)
    compiled = torch.compile(fq.calibrate, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert_same(fqt.state.flatten(compiled(params)), fqt.state.flatten(fq.calibrate(params)))


@pytest.mark.gpu
@every_format
def test_cuda_graph_replays_with_weights_updated_in_place(format):
    """Captured once; after an in-place update of weights and state, a replay gives what an eager call gives."""
    params = parameters("cuda", torch.bfloat16)
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        fq.fakequant(params, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        captured = fq.fakequant(params, state)
    for factor in (3.0, 0.25):
        for weight in params.values():
            weight.mul_(factor).add_(torch.randn_like(weight) * 0.01)
        fresh = fqt.state.flatten(fq.calibrate(params))
        for name, leaf in fqt.state.flatten(state).items():
            leaf.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, fq.fakequant(params, state))


@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
def test_a_graph_of_weights_never_seen_before(separate):
    """Tables of addresses that were first needed during capture are filled at each replay, not by the host once."""
    weights = [torch.randn(8, 32, device="cuda") for _ in range(7)]
    params = {f"experts.{i}.weight": w for i, w in enumerate(weights[i] for i in (0, 4, 1, 6, 2))}
    fq = transform_of(params, fqt.INT8, separate=separate)
    state = fq.calibrate({name: p.clone() for name, p in params.items()})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = fq.fakequant(params, state)
    for _ in range(2):
        for weight in params.values():
            weight.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, fq.fakequant(params, state))


@pytest.mark.gpu
@every_format
def test_separate_results_keep_no_other_alive(format):
    """`separate` changes no bit and gives each result a storage of its own size; by default a group shares one."""
    params = parameters("cuda", torch.bfloat16)
    state = transform_of(params, format).calibrate(params)
    shared, separate = (transform_of(params, format, separate=s).fakequant(params, state) for s in (False, True))
    assert_same(separate, shared)
    for name, weight in params.items():
        if name.startswith("experts"):
            assert separate[name].untyped_storage().nbytes() == weight.untyped_storage().nbytes()
            assert shared[name].untyped_storage().nbytes() == 4 * weight.untyped_storage().nbytes()
    compiled = torch.compile(transform_of(params, format, separate=True).fakequant, fullgraph=True)
    torch.compiler.reset()
    assert_same(compiled(params, state), shared)


@pytest.mark.gpu
@every_format
def test_no_call_waits_for_the_device(format):
    """Under CUDA's sync debug mode, fakequant with and without autograd never synchronizes, not even the first time."""
    params = parameters("cuda", torch.bfloat16)
    fq = transform_of(params, format, backward="clip")
    state = fq.calibrate(params)
    with warnings.catch_warnings():  # PyTorch says that the mode is a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            fq.fakequant(params, state)
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            sum(w.sum() for w in fq.fakequant(leaves, state).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_weight_that_moves_is_found():
    """Tables are keyed by addresses: after a weight is replaced, freed or moved, no stale address is used."""
    for trial in range(20):
        params = {f"experts.{i}.weight": torch.randn(16, 64 + 16 * (trial % 3), device="cuda") for i in range(5)}
        filler = [torch.empty(1000 * (trial % 7 + 1), device="cuda")]
        params["experts.2.weight"] = params["experts.2.weight"].clone()
        fq = transform_of(params, fqt.INT8)
        state = fq.calibrate(params)
        found = fq.fakequant(params, state)
        cpu = {name: p.cpu() for name, p in params.items()}
        wanted = fq.fakequant(cpu, optree.tree_map(torch.Tensor.cpu, state))
        assert_same({name: w.cpu() for name, w in found.items()}, wanted)
        del filler


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 127, 512])
def test_many_experts(count):
    """1, 2, 127 and 512 experts in one launch, each with its own scale."""
    params = {f"experts.{i}.weight": w for i, w in enumerate(experts(count, (16, 64), torch.bfloat16, device="cuda"))}
    fq = transform_of(params, fqt.NVFP4)
    state = fq.calibrate(params)
    cpu = {name: p.cpu() for name, p in params.items()}
    wanted_state = fq.calibrate(cpu)
    assert_same({k: v.cpu() for k, v in fqt.state.flatten(state).items()}, fqt.state.flatten(wanted_state))
    wanted = fq.fakequant(cpu, wanted_state)
    assert_same({name: w.cpu() for name, w in fq.fakequant(params, state).items()}, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("format", [fqt.INT8, fqt.NVFP4, fqt.INT4_BLOCK32, fqt.FP8_BLOCK], ids=name_of)
def test_more_than_two_to_the_31_elements(format):
    """A group beyond 2**31 elements, stacked: the last expert is as right as the first."""
    weight = torch.empty(33, 8192, 8192, dtype=torch.bfloat16, device="cuda").normal_()
    weight[-1] *= 64
    params = {"experts.gate_up_proj": weight}
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    out = fq.fakequant(params, state)["experts.gate_up_proj"]
    for expert in (0, 32):
        one = {"experts.gate_up_proj": weight[expert : expert + 1]}
        alone = transform_of(one, format)
        wanted = alone.fakequant(one, alone.calibrate(one))["experts.gate_up_proj"]
        assert torch.equal(out[expert], wanted[0])
