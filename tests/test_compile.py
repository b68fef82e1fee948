"""torch.compile traces the transform whole, a CUDA graph replays it, and no call waits for the device."""

import warnings

import optree
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap

import fq_transforms as fqt
from fq_transforms.ops.amax import autograd as amax_autograd
from fq_transforms.ops.quantize import autograd
from tests.cases import CORE_FORMATS, ONE_OF_EACH_LEAF, experts, name_of

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


def layouts(device):
    """Weights as N matrices, as one tensor of all experts, and as one dense matrix; with zeros of both signs."""
    weights = torch.stack(experts(2, (4, 128), torch.float32, device=device))
    weights[0, 0, :4] = torch.tensor([-0.0, 0.0, 1e-45, -1e-30])
    return {
        "grouped": {f"experts.{i}.weight": weight for i, weight in enumerate(weights)},
        "stacked": {"experts.weight": weights},
        "dense": {"experts": weights[1]},
    }


def vectors_like(tree):
    """Numbers that every compiler computes exactly."""
    return optree.tree_map(lambda t: (torch.arange(t.numel(), device=t.device) % 7 - 2.5).view(t.shape) * 0.5, tree)


def transforms_of(fq):
    """Functions of params and state, each one or more transforms of torch.func around `fakequant` or `pullback`."""

    def loss(params, state):
        return sum(w.square().sum() for w in fq.fakequant(params, state).values())

    def pull(params, state):
        return vjp(fq.fakequant, params, state)[1](vectors_like(params))

    def push(params, state):
        return jvp(fq.fakequant, (params, state), (vectors_like(params), vectors_like(state)))

    def push_gradient(params, state):
        return jvp(grad(loss, argnums=(0, 1)), (params, state), (vectors_like(params), vectors_like(state)))

    def pull_each(params, state):
        return vmap(pull, (0, None))({name: torch.stack([p, p * 0.5, -p]) for name, p in params.items()}, state)

    def pull_rows(params, state):
        return jacrev(lambda params: {name: w.sum(-1) for name, w in fq.fakequant(params, state).items()})(params)

    def calibrate(params, state):
        return grad(lambda params: loss(params, fq.calibrate(params)))(params)

    def pull_twice(params, state):
        def of(grads):
            return sum(g.square().sum() for g in fq.pullback(params, state, grads)[0].values())

        return grad(of)(vectors_like(params)), fq.pullback(params, state, vectors_like(params))

    return {
        "grad": grad(loss, argnums=(0, 1)),
        "grad_and_value": grad_and_value(loss),
        "vjp": pull,
        "jvp": push,
        "jvp of grad": push_gradient,
        "vmap of vjp": pull_each,
        "jacrev": pull_rows,
        "grad through calibrate": calibrate,
        "grad of pullback": pull_twice,
    }


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# PyTorch 2.11 refuses to compile jacrev, of any function, and what is compiled within a transform within another graph.
TRANSFORMS = tuple(name for name in transforms_of(None) if name != "jacrev" or TORCH >= (2, 12))


def assert_same_bits(found, wanted):
    """Every leaf of a tree, signs of zeros included."""
    paths, found_leaves, found_structure = optree.tree_flatten_with_path(found)
    _, wanted_leaves, wanted_structure = optree.tree_flatten_with_path(wanted)
    assert found_structure == wanted_structure
    for path, one, other in zip(paths, found_leaves, wanted_leaves, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, at=path: f"{at}: {text}"
        )
        assert torch.equal(one.signbit(), other.signbit()), path


def assert_compiles(device, layout, format, backward, backend, names):
    """Some transforms, in one graph, equal eager ones. To compile each alone takes four times as long."""
    torch.compiler.reset()
    params = layouts(device)[layout]
    fq = fqt.transform(fqt.select(params, {"*": format}), backward=backward)
    state, transforms = fq.calibrate(params), transforms_of(fq)

    def every(params, state):
        return {name: transforms[name](params, state) for name in names}

    wanted = every(params, state)
    for name in {"grad", "vjp"} & wanted.keys():
        assert all(g.any() for g in wanted[name][0].values())
    assert_same_bits(torch.compile(every, fullgraph=True, backend=backend)(params, state), wanted)


def rules_of(format):
    """Backward rules that a format has."""
    return ("pass_through", *("clip" for _ in range(format.clips)), *("lsq" for _ in range(not format.is_stateless)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("format", "backward"),
    [(format, rules_of(format)[-1]) for format in CORE_FORMATS] + [(fqt.INT8, "pass_through"), (fqt.INT8, "clip")],
    ids=name_of,
)
def test_compiled_gradients_of_every_format(format, backward, device):
    """Gradients and tangents, compiled around `fakequant`, have the eager bits: they were 0, silently."""
    assert_compiles(device, "stacked", format, backward, "eager", ("grad", "jvp"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("layout", "format", "backward"),
    [
        ("grouped", fqt.NVFP4_STATIC, "lsq"),
        ("stacked", fqt.INT8_PER_CHANNEL, "clip"),
        ("dense", fqt.MXFP4, "pass_through"),
    ],
    ids=name_of,
)
def test_every_compiled_transform(layout, format, backward, device):
    """Whatever transform is compiled around `fakequant` and `pullback` equals the eager one, bit for bit."""
    assert_compiles(device, layout, format, backward, "eager", TRANSFORMS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_later_passes_of_the_compiler_keep_the_bits(backend, device):
    """What AOTAutograd lowers, and what Inductor makes of it, is the eager result too."""
    if backend == "inductor":  # whose sums, of learned scales, are its own
        assert_compiles(device, "dense", fqt.NVFP4_STATIC, "clip", backend, ("vjp",))
    else:
        assert_compiles(device, "dense", fqt.NVFP4_STATIC, "lsq", backend, ("vjp", "jvp", "vmap of vjp"))


def in_steps(fq, state):
    """Losses of params in which a graph breaks, or a compiled function calls another, or is called by a transform."""

    def loss(params):
        return sum(w.square().sum() for w in fq.fakequant(params, state).values())

    def broken(params):
        torch._dynamo.graph_break()
        weights = fq.fakequant(params, state)
        torch._dynamo.graph_break()
        return sum(w.square().sum() for w in weights.values())

    compiled = {"fullgraph": True, "backend": "eager"}
    return grad(loss), {
        # With the backend "eager" PyTorch itself refuses what a transform has wrapped, behind a break, by an assertion.
        "break within": torch.compile(grad(broken), backend="aot_eager"),
        "transform of compiled": grad(torch.compile(loss, **compiled)),
        "dynamic shapes": torch.compile(grad(loss), dynamic=True, **compiled),
    } | (
        {"compiled of transform of compiled": torch.compile(grad(torch.compile(loss, **compiled)), **compiled)}
        if TORCH >= (2, 12)
        else {}
    )


# A warning of Dynamo's, of tensors that torch.func has wrapped.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_breaks_and_nesting_keep_the_gradient(backward, device):
    """However compiled and eager code are nested, the gradient is that of eager code."""
    torch.compiler.reset()
    params = layouts(device)["stacked"]
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), backward=backward)
    eager, nested = in_steps(fq, fq.calibrate(params))
    wanted = eager(params)
    for name, function in nested.items():
        assert_same_bits({name: function(params)}, {name: wanted})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", ["pass_through", "clip", "lsq"])
def test_compiled_forward_mode_outside_torch_func(backward, device):
    """A dual level that only the graph enters is seen too: its tangents were 0."""
    torch.compiler.reset()
    params = layouts(device)["grouped"]
    fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}), backward=backward)
    state = fq.calibrate(params)

    def push(params, tangents):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()}
            return {name: forward_ad.unpack_dual(w).tangent for name, w in fq.fakequant(duals, state).items()}

    wanted = push(params, vectors_like(params))
    compiled = torch.compile(push, fullgraph=True, backend="eager")
    assert_same_bits(compiled(params, vectors_like(params)), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_within_compiled_transforms(device):
    """`functional_call` with fake weights, its gradient compiled whole, and a compiled function's own `backward`."""
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, {"*.weight": fqt.NVFP4_STATIC}), backward="lsq")
    state, x = fq.calibrate(params), torch.linspace(-1, 1, 96, device=device).view(3, 32)

    def loss(params, state):
        return functional_call(model, fq.fakequant(params, state), (x,)).square().sum()

    def leaf_gradients(loss):
        leaves = optree.tree_map(lambda t: t.detach().clone().requires_grad_(), (params, state))
        loss(*leaves).backward()
        return optree.tree_map(lambda leaf: leaf.grad, leaves)

    compiled = {"fullgraph": True, "backend": "aot_eager"}
    wanted = grad(loss, argnums=(0, 1))(params, state)
    assert_same_bits(torch.compile(grad(loss, argnums=(0, 1)), **compiled)(params, state), wanted)
    assert_same_bits(leaf_gradients(torch.compile(loss, **compiled)), leaf_gradients(loss))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_stochastic_rounding_under_transforms(device):
    """The bits that eager code draws, of one seed and of a mapped one, and the gradient that does not see them."""
    torch.compiler.reset()
    params = layouts(device)["grouped"]
    fq = fqt.transform(fqt.select(params, {"*": fqt.MXFP8}))
    state, seeds = fq.calibrate(params), torch.arange(3, device=device)

    def loss(params, seed):
        weights = fq.fakequant(params, state, rounding=fqt.Stochastic(seed))
        return sum(w.square().sum() for w in weights.values()), weights

    every = vmap(grad(loss, has_aux=True), (None, 0))
    assert_same_bits(torch.compile(every, fullgraph=True, backend="eager")(params, seeds), every(params, seeds))


@pytest.mark.parametrize("method", [fqt.methods.Mse(), fqt.methods.Percentile(99.0)], ids=name_of)
def test_searches_are_refused_where_they_are_compiled(method):
    """A method that cannot be traced raises under a compiled transform and names what to do, rather than give zeros."""
    torch.compiler.reset()
    params = layouts("cpu")["grouped"]
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), method=method)

    def loss(params):
        return sum(w.sum() for w in fq.fakequant(params, fq.calibrate(params)).values())

    compiled = torch.compile(grad(loss), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="found torch.compile, wanted Max there; calibrate before"):
        compiled(params)


@pytest.mark.parametrize("backward", ["clip", "lsq"])
def test_compiled_transforms_of_kernels(backward, monkeypatch):
    """The operators that stand for kernels in a graph, run by Triton's interpreter, equal eager launches."""
    for module in (autograd, amax_autograd):
        monkeypatch.setattr(module, "has_kernel", lambda weights: True)
    names = ("vjp", "jvp", "vmap of vjp", "grad of pullback") if backward == "lsq" else ("grad", "grad of pullback")
    assert_compiles("cpu", "grouped", fqt.NVFP4_STATIC, backward, "aot_eager", names)


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
    params = {"experts.w13": weight}
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    out = fq.fakequant(params, state)["experts.w13"]
    for expert in (0, 32):
        one = {"experts.w13": weight[expert : expert + 1]}
        alone = transform_of(one, format)
        wanted = alone.fakequant(one, alone.calibrate(one))["experts.w13"]
        assert torch.equal(out[expert], wanted[0])
