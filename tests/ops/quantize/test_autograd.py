"""The laws of torch.func hold for every format, for separate and for stacked weights, and for both gradients."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from fq_transforms.formats import FORMATS, INT8
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import ALL_FORMATS, CORE_FORMATS, ONE_OF_EACH_LEAF, assert_names, experts, message_of, name_of
from tests.full import FULL

OUT, IN = 3, 128


class Group:
    """A group of three experts in one format, and `fq`, its fake quantization as a function of the weights alone."""

    def __init__(self, format, *, stacked, transposed, backward, device="cpu", out_dtype=None, dtype=torch.float32):
        self.format, self.transposed = format, transposed
        self.matrices = experts(3, (OUT, IN), dtype, device=device)
        weights = [w.mT.contiguous() if transposed else w for w in self.matrices]
        self.weights = (torch.stack(weights),) if stacked else tuple(weights)
        self.amax = self.global_amax = None
        if not format.is_stateless:
            self.amax, self.global_amax = expert_amax(self.weights, format=format, transposed=transposed)
        if format.clips:
            self.amax = self.amax * 0.7
        self.options = {"format": format, "transposed": transposed, "backward": backward, "out_dtype": out_dtype}
        self.cotangents = tuple(torch.randn_like(w) for w in self.weights)

    def fq(self, *weights):
        return fake_quantize(weights, self.amax, self.global_amax, **self.options)

    def expected_gradients(self):
        """By the formula, without autograd: g, or g where abs(w) <= amax."""
        if self.options["backward"] == "pass_through" or not self.format.clips:
            return self.cotangents
        kept = []
        for matrix, amax in zip(self.matrices, self.amax, strict=True):
            rows, columns = (side or extent for side, extent in zip(self.format.block, matrix.shape, strict=True))
            spread = amax if amax.dim() == 0 else amax.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            mask = matrix.abs() <= (spread if amax.dim() == 0 else spread[: matrix.shape[0], : matrix.shape[1]])
            kept.append(mask.mT if self.transposed else mask)
        masks = (torch.stack(kept),) if len(self.weights) == 1 else kept
        return tuple(g * m for g, m in zip(self.cotangents, masks, strict=True))


@pytest.fixture(params=["pass_through", "clip"])
def backward(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=["separate", "stacked, transposed"])
def group_of(request, backward, device):
    def make(format, **options):
        stacked, transposed = request.param.startswith("stacked"), request.param.endswith("transposed")
        return Group(format, stacked=stacked, transposed=transposed, backward=backward, device=device, **options)

    return make


def all_equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


# The conventions of a format differ from it in one number of the forward, which the test of the reference sees.
every_format = pytest.mark.parametrize("format", ALL_FORMATS if FULL else CORE_FORMATS, ids=name_of)
every_leaf = pytest.mark.parametrize("format", ALL_FORMATS if FULL else ONE_OF_EACH_LEAF, ids=name_of)


@every_format
def test_every_way_to_a_gradient_agrees(format, group_of):
    """backward(), grad, vjp twice from one pullback, and jvp give the gradient of the formula."""
    group = group_of(format)
    wanted = group.expected_gradients()
    _, pullback = vjp(group.fq, *group.weights)
    assert all_equal(pullback(group.cotangents), wanted)
    assert all_equal(pullback(group.cotangents), wanted), "the second pullback differs: a saved tensor was written to"

    leaves = [w.clone().requires_grad_() for w in group.weights]
    torch.autograd.backward(group.fq(*leaves), group.cotangents)
    assert all_equal([leaf.grad for leaf in leaves], wanted)

    def loss(*weights):
        return sum((y * g).sum() for y, g in zip(group.fq(*weights), group.cotangents, strict=True))

    assert all_equal(grad(loss, argnums=tuple(range(len(group.weights))))(*group.weights), wanted)

    primals, tangents = jvp(group.fq, group.weights, group.cotangents)
    assert all_equal(tangents, wanted)
    assert all_equal(primals, group.fq(*group.weights))


@every_leaf
def test_expanded_cotangents(format, group_of):
    """A cotangent with stride 0, as `.sum().backward()` makes, is read right."""
    group = group_of(format)
    group.cotangents = tuple(torch.tensor(1.5, device=w.device).expand_as(w) for w in group.weights)
    _, pullback = vjp(group.fq, *group.weights)
    assert all_equal(pullback(group.cotangents), group.expected_gradients())


@every_leaf
def test_vmap_over_weights(format, group_of):
    """A batch of weights, mapped along any dimension, equals a loop; amax over the batch too."""
    group = group_of(format)
    factors = (1.0, 2.0, 0.5)
    batch = tuple(torch.stack([w * f for f in factors], dim=1) for w in group.weights)
    outs = vmap(group.fq, in_dims=1)(*batch)
    for i, factor in enumerate(factors):
        assert all_equal([out[i] for out in outs], group.fq(*(w * factor for w in group.weights)))
    if format.is_stateless:
        return

    def amax(*weights):
        leaves = expert_amax(weights, format=format, transposed=group.transposed)
        return tuple(leaf for leaf in leaves if leaf is not None)

    found = vmap(amax, in_dims=1)(*batch)
    for i, factor in enumerate(factors):
        assert all_equal([leaf[i] for leaf in found], amax(*(w * factor for w in group.weights)))


@every_leaf
def test_vmap_over_states(format, group_of):
    """One set of weights under a batch of states, forward and gradient, equals a loop."""
    group = group_of(format)
    if format.is_stateless:
        return
    amaxes = torch.stack([group.amax, group.amax * 1.7], dim=-1)
    globals_ = None if group.global_amax is None else torch.stack([group.global_amax, group.global_amax * 0.6])

    def value_and_gradients(amax, global_amax):
        outs, pullback = vjp(lambda *w: fake_quantize(w, amax, global_amax, **group.options), *group.weights)
        return outs, pullback(group.cotangents)

    in_dims = (-1, None if globals_ is None else 0)
    outs, gradients = vmap(value_and_gradients, in_dims=in_dims)(amaxes, globals_)
    for i in range(2):
        wanted = value_and_gradients(amaxes[..., i], None if globals_ is None else globals_[i])
        assert all_equal([out[i] for out in outs], wanted[0])
        assert all_equal([g[i] for g in gradients], wanted[1])


@every_leaf
def test_nested_vmap(format, group_of):
    """States inside, weights outside: two mapped dimensions fold into the experts in the right order."""
    group = group_of(format)
    if format.is_stateless:
        return
    amaxes = torch.stack([group.amax, group.amax * 1.7])
    weights = tuple(torch.stack([w, w * 2, w * 3]) for w in group.weights)

    def fq(amax, *w):
        return fake_quantize(w, amax, group.global_amax, **group.options)

    def over_states(*w):
        return vmap(fq, in_dims=(0, *(None,) * len(w)))(amaxes, *w)

    found = vmap(over_states)(*weights)
    for i in range(3):
        for j in range(2):
            assert all_equal([f[i, j] for f in found], fq(amaxes[j], *(w[i] for w in weights)))


@every_format
def test_jacobian(format, backward):
    """Jacrev of a fake quantization is the identity, or its clipped diagonal."""
    group = Group(format, stacked=False, transposed=False, backward=backward)
    weight, amax = group.matrices[0], None if group.amax is None else group.amax[:1]
    global_amax = None if group.global_amax is None else group.global_amax[:1]
    jacobian = jacrev(lambda w: fake_quantize([w], amax, global_amax, **group.options)[0])(weight)
    group.cotangents = tuple(torch.ones_like(w) for w in group.weights)
    assert torch.equal(jacobian.reshape(OUT * IN, OUT * IN), torch.diag(group.expected_gradients()[0].flatten()))


@every_leaf
def test_second_derivative(format, group_of):
    """The gradient is linear in its cotangent, so differentiating it again gives the mask again."""
    group = group_of(format)
    leaves = [w.clone().requires_grad_() for w in group.weights]
    outs = group.fq(*leaves)
    first = torch.autograd.grad(sum((y**2).sum() for y in outs) / 2, leaves, create_graph=True)
    second = torch.autograd.grad(first, leaves, grad_outputs=group.cotangents)
    # d/dw of mask * y(w) along g is mask * mask * g.
    assert all_equal(second, group.expected_gradients())


@every_leaf
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_gradient_has_the_dtype_of_the_weight(format, group_of, dtypes):
    """fp32 master weights, bf16 results: the gradient comes back in fp32, from cotangents in bf16."""
    dtype, out_dtype = dtypes
    group = group_of(format, dtype=dtype, out_dtype=out_dtype)
    outs, pullback = vjp(group.fq, *group.weights)
    assert all(out.dtype == out_dtype for out in outs)
    group.cotangents = tuple(g.to(out_dtype) for g in group.cotangents)
    gradients = pullback(group.cotangents)
    assert all(g.dtype == dtype for g in gradients)
    assert all_equal(gradients, [g.to(dtype) for g in group.expected_gradients()])
    _, tangents = jvp(group.fq, group.weights, tuple(w.clone() for w in group.weights))
    assert all(t.dtype == out_dtype for t in tangents)


@every_leaf
def test_an_unused_expert_costs_nothing_and_breaks_nothing(format, backward):
    """A loss that reads one expert gives the others no gradient at all, and that one its own."""
    group = Group(format, stacked=False, transposed=False, backward=backward)
    leaves = [w.clone().requires_grad_() for w in group.weights]
    torch.autograd.backward(group.fq(*leaves)[1], group.cotangents[1])
    assert torch.equal(leaves[1].grad, group.expected_gradients()[1])
    assert leaves[0].grad is None
    assert leaves[2].grad is None


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_group_equals_reference_an_expert(format, group_of):
    """The group's operations are the reference's, expert by expert, in every layout; no input is written to."""
    group = group_of(format)
    versions = [w._version for w in group.weights]
    found = group.fq(*group.weights)
    assert [w._version for w in group.weights] == versions
    results = [m for out in found for m in (out if out.dim() == 3 else [out])]
    for expert, (result, matrix) in enumerate(zip(results, group.matrices, strict=True)):
        amax, global_amax = (None if s is None else s[expert] for s in (group.amax, group.global_amax))
        wanted = fake_quantize_reference(matrix, amax, global_amax, format=format, out_dtype=torch.float32)
        assert torch.equal(result.mT if group.transposed else result, wanted)
        assert result.is_contiguous()
        if not format.is_stateless and not format.clips:
            assert torch.equal(amax, expert_amax_reference(matrix, format=format)[0])


def test_pass_through_saves_nothing():
    """Pass-through keeps no weight alive for backward; clip keeps weights and amax."""
    for backward, wanted in (("pass_through", 0), ("clip", 4)):
        group = Group(ALL_FORMATS[0], stacked=False, transposed=False, backward=backward)
        outs = group.fq(*(w.requires_grad_() for w in group.weights))
        assert len(outs[0].grad_fn.saved_tensors) == wanted


def test_backward_outside_functional_call_with_checkpointing():
    """With non-reentrant checkpointing a backward outside functional_call recomputes with the module's own weights.

    So its gradients are wrong without a word, as of PyTorch 2.13; inside the call they are right. The README says so.
    """
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x, step):
            y = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(x @ self.w1) @ self.w2, x, use_reentrant=False)
            loss = (y**2).sum()
            if step:
                loss.backward()
            return loss

    block, x = Block(), torch.randn(4, 8)
    other = {name: torch.randn(8, 8) for name in ("w1", "w2")}

    def gradients(step):
        weights = {name: w.clone().requires_grad_() for name, w in other.items()}
        loss = functional_call(block, weights, (x, step))
        if not step:
            loss.backward()
        return [w.grad for w in weights.values()]

    wanted = grad(lambda w: ((torch.tanh(x @ w["w1"]) @ w["w2"]) ** 2).sum())(other)
    torch.testing.assert_close(gradients(step=True), [wanted["w1"], wanted["w2"]])
    wrong = gradients(step=False)
    assert not torch.allclose(wrong[0], wanted["w1"]), "PyTorch has mended this: drop the warning from the README"


@pytest.mark.parametrize("weights", [[], [torch.empty(0, 4, 8)]], ids=["no list", "no experts"])
def test_no_expert_at_all_is_refused(weights):
    """An empty list of experts, or a stacked weight of none, is a mistake that is named, not an index error."""
    for call in (
        lambda: fake_quantize(weights, torch.ones(0), None, format=FORMATS["FP8"]),
        lambda: expert_amax(weights, format=FORMATS["FP8"]),
    ):
        assert_names(message_of(ValueError, call), "weights", "at least one expert")


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_tangents_of_some_weights(backward):
    """Along one weight of a group: its own tangent, and zeros for the others."""
    weights = [torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.5]])]
    amax = torch.tensor([2.0, 2.0])

    def fq(weight):
        return fake_quantize([weight, weights[1]], amax, None, format=INT8, backward=backward)

    _, tangents = jvp(fq, (weights[0],), (torch.ones(1, 2),))
    assert tangents[0].tolist() == [[1.0, 1.0 if backward == "pass_through" else 0.0]]
    assert tangents[1].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
def test_a_tensor_left_over_from_a_transform(backward):
    """Its gradient is that of the tensor that it stands for."""
    weight, left = torch.tensor([[1.0, -1.5]], requires_grad=True), []
    grad(lambda w: (left.append(w), w.sum())[1])(weight)
    (out,) = fake_quantize(left, torch.tensor([2.0]), None, format=INT8, backward=backward)
    out.sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0]]
