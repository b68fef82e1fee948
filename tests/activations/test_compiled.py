"""`apply` with quantized inputs under torch.compile: one graph with the eager bits, or an error, or eager code."""

import optree
import pytest
import torch
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fq_transforms as fqt
from tests.cases import name_of

EXPERTS, OUT, IN, TOKENS = 2, 8, 32, 5


class Stack(torch.nn.Module):
    """Experts in one tensor, [E, out, in], and a way to multiply with them."""

    def __init__(self, way):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.up = torch.nn.Parameter(torch.randn(EXPERTS, OUT, IN) * torch.tensor([1.0, 8.0])[:, None, None])
        self.way = way

    def forward(self, x):
        return self.way(x, self.experts.up)


def by_linear(x, w):
    return torch.stack([torch.nn.functional.linear(x[e], w[e]) for e in range(EXPERTS)])


def by_matrix(x, w):
    return torch.stack([x[e] @ w[e].T for e in range(EXPERTS)])


def by_loop(x, w):
    return torch.stack([torch.nn.functional.linear(one, own) for one, own in zip(x, w, strict=True)])


def by_property(x, w):
    return x @ w.mT


def by_transpose(x, w):
    return x.matmul(w.transpose(1, 2))


def by_bmm(x, w):
    return torch.bmm(input=x, mat2=w.transpose(-2, -1))


def by_left(x, w):
    return (w @ x.mT).mT


def by_cast(x, w):
    return torch.stack([torch.nn.functional.linear(x[e], w[e].float().clone()) for e in range(EXPERTS)])


def by_checkpoint(x, w):
    return checkpoint(by_linear, x, w, use_reentrant=False)


def by_sum(x, w):
    return torch.nn.functional.linear(x.sum(0), w.sum(0))


def by_einsum(x, w):
    return torch.einsum("eti,eoi->eto", x, w)


def by_data(x, w):
    return x @ w.data.mT


FOLLOWED = [by_property, by_transpose, by_bmm, by_left, by_cast, by_matrix, by_loop]


def setting(way, format, per_expert=False, **options):
    torch.compiler.reset()
    model = Stack(way)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(EXPERTS, TOKENS, IN) * torch.tensor([3.0, 0.1])[:, None, None]
    rule = fqt.Rule("experts.*", format, format, per_expert_inputs=per_expert)
    fq = fqt.transform(fqt.select(params, [rule]), **options)
    eager = Stack(by_bmm)
    state = optree.tree_map(lambda leaf: leaf * 0.75, fq.calibrate(params, x, model=eager))
    return model, params, fq, state, x


def assert_same(found, wanted):
    for one, other in zip(optree.tree_leaves(found), optree.tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


def values_and_gradients(function, *trees):
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), trees)
    found = function(*leaves)
    found.square().sum().backward()
    return found, optree.tree_map(lambda leaf: leaf.grad, leaves)


def assert_one_graph(way, format, per_expert=False):
    """Values and gradients of weights and inputs; and that they are not those of inputs as they are."""
    model, params, fq, state, x = setting(way, format, per_expert, backward="clip")

    def out(params, x):
        return fq.apply(model, params, state, x)

    found = values_and_gradients(torch.compile(out, fullgraph=True, backend="aot_eager"), params, x)
    assert_same(found, values_and_gradients(out, params, x))
    fakes = fqt.transform(fqt.Spec(fq.spec.groups)).fakequant(params, {g.key: state[g.key] for g in fq.spec.groups})
    assert not torch.equal(found[0], functional_call(model, fakes, (x,)))


@pytest.mark.parametrize("format", [fqt.FP8, fqt.INT8, fqt.NVFP4, fqt.MXFP8], ids=name_of)
def test_one_graph_has_the_eager_bits(format):
    """Each format of inputs, with one scale for all experts."""
    assert_one_graph(by_linear, format)


@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4], ids=name_of)
def test_each_expert_has_its_own_scale(format):
    """Rows meet the amax of their own expert, by `w[i]` and by the whole stack."""
    assert_one_graph(by_linear, format, per_expert=True)
    assert_one_graph(by_bmm, format, per_expert=True)


@pytest.mark.parametrize("way", FOLLOWED, ids=lambda way: way.__name__)
def test_ways_to_multiply(way):
    """Views by property and by loop, of which Dynamo shows nothing, too: they were unquantized, silently."""
    assert_one_graph(way, fqt.INT8)


# A way -> what a graph says of it.
REFUSED = {
    by_sum: "found the weight 'experts.up' in another function of",
    by_einsum: "found the weight 'experts.up' in another function of",
    by_checkpoint: "found the weight 'experts.up' in another function of",
    by_data: "found torch.compile, and no use of 'experts.up' in what it traced",
}


@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__)
def test_what_is_not_followed_is_refused(way):
    """A use that is no x @ w.T, and one that nothing shows, raise in a graph: they would leave inputs as they are."""
    model, params, fq, state, x = setting(way, fqt.FP8)
    compiled = torch.compile(lambda x: fq.apply(model, params, state, x), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REFUSED[way]):
        compiled(x)


@pytest.mark.parametrize("way", [by_matrix, by_loop], ids=lambda way: way.__name__)
def test_views_of_unknown_experts_are_refused(way):
    """Where each expert has its own scale, a view that nothing shows cannot say whose it is: an error in one graph."""
    model, params, fq, state, x = setting(way, fqt.FP8, per_expert=True)
    compiled = torch.compile(lambda x: fq.apply(model, params, state, x), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"in torch.compile, as a view \(.*\) of unknown experts"):
        compiled(x)


def test_by_default_eager_code_does_what_a_graph_cannot():
    """Without fullgraph the call falls out of the graph, and has the eager bits."""
    model, params, fq, state, x = setting(by_loop, fqt.FP8, per_expert=True)
    compiled = torch.compile(lambda x: fq.apply(model, params, state, x), backend="eager")
    assert_same(compiled(x), fq.apply(model, params, state, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("inputs", [None, fqt.INT8])
def test_a_layer_of_two_names_keeps_its_weight(inputs, fullgraph):
    """Named bug: the compiled call left its fake weight there, as PyTorch's functional_call does."""
    layer = torch.nn.Linear(IN, IN, bias=False)
    own, x = layer.weight, torch.randn(TOKENS, IN)

    def broken(x):
        if not fullgraph:
            torch._dynamo.graph_break()
        return x

    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    model.register_forward_hook(lambda module, args, output: broken(output))
    params = {"0.weight": own}
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*", fqt.INT8, inputs)]))
    state = fq.calibrate(params, x, model=model)
    compiled = torch.compile(lambda params, x: fq.apply(model, params, state, x), fullgraph=fullgraph, backend="eager")
    assert_same(compiled(params, x), fq.apply(model, params, state, x))
    assert layer.weight is own


def test_a_compiled_gradient():
    """torch.func.grad around `apply`, compiled whole."""
    model, params, fq, state, x = setting(by_linear, fqt.NVFP4)

    def gradients(params, x):
        return grad(lambda p, x: fq.apply(model, p, state, x).square().sum(), argnums=(0, 1))(params, x)

    assert_same(torch.compile(gradients, fullgraph=True, backend="aot_eager")(params, x), gradients(params, x))


def test_no_gradient_in_part_of_a_graph_is_refused():
    """As in eager mode: a layer under no_grad within a differentiated call may be one that backward runs again."""

    def way(x, w):
        with torch.no_grad():
            return by_linear(x, w)

    model, params, fq, state, x = setting(way, fqt.FP8)
    params = {name: p.requires_grad_() for name, p in params.items()}
    compiled = torch.compile(lambda x: fq.apply(model, params, state, x), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="found its layer under activation checkpointing"):
        compiled(x)


def test_the_context_goes_around_what_is_compiled():
    """`quantized_inputs` within a graph is refused by name."""
    model, _, fq, state, x = setting(by_linear, fqt.FP8)

    def within(x):
        with fq.quantized_inputs(model, state):
            return model(x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="wanted it around what is compiled, or fq.apply within"):
        torch.compile(within, fullgraph=True, backend="eager")(x)


@pytest.mark.filterwarnings("ignore")  # Dynamo's, of what it does not trace
def test_around_a_compiled_model():
    """Within `quantized_inputs` a model that was compiled before breaks its graph rather than miss an input."""
    model, _, fq, state, x = setting(by_linear, fqt.FP8)
    alone, compiled = model(x), torch.compile(model, backend="eager")
    assert_same(compiled(x), alone)
    with fq.quantized_inputs(model, state):
        wanted, found = model(x), compiled(x)
    assert_same(found, wanted)
    assert not torch.equal(found, alone)
    assert_same(compiled(x), alone)
