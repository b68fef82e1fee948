"""Every way to multiply with a selected weight is seen, with the right expert for each row; every other use raises."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from fq_transforms.activations.products import products
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import assert_names, message_of

E, OUT, IN, T = 3, 8, 4, 6  # grouped_mm wants rows of 16 bytes


class Call(nn.Module):
    """A module with weights of all kinds, whose forward is given."""

    def __init__(self, function):
        super().__init__()
        self.dense = nn.Parameter(torch.randn(OUT, IN))
        self.experts = nn.ParameterDict(
            {"up": nn.Parameter(torch.randn(E, OUT, IN)), "down": nn.Parameter(torch.randn(E, IN, OUT))}
        )
        self.weight0, self.weight1 = (nn.Parameter(torch.randn(OUT, IN)) for _ in range(2))
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


def x(*shape):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(5))


OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second expert has no token, and the last row no expert
BY_OFFSETS = [0, 0, 2, 2, 2, 3]
PICKED = torch.tensor([2, 0, 1, 0, -1, 2])


class Case(NamedTuple):
    name: str
    function: object
    args: tuple
    key: str
    experts: object  # of each row
    rows: tuple = ()  # of the input as it is seen; the argument's own if empty


CASES = [
    Case("linear", lambda m, x: F.linear(x, m.dense), (x(2, T),), "dense", 0),
    Case("linear by keyword", lambda m, x: F.linear(weight=m.dense, input=x), (x(T),), "dense", 0),
    Case("linear of a vector", lambda m, x: F.linear(x, m.dense), (x(),), "dense", 0),
    Case("matmul", lambda m, x: x @ m.dense.T, (x(2, T),), "dense", 0),
    Case("torch.matmul", lambda m, x: torch.matmul(x, other=m.dense.mT), (x(T),), "dense", 0),
    Case("weight first", lambda m, x: m.dense @ x.T, (x(T),), "dense", 0),
    Case("weight times vector", lambda m, x: m.dense @ x, (x(),), "dense", 0),
    Case("mm", lambda m, x: torch.mm(x, m.dense.t()), (x(T),), "dense", 0),
    Case("addmm", lambda m, x: torch.addmm(torch.ones(OUT), x, m.dense.t()), (x(T),), "dense", 0),
    Case("a cast weight", lambda m, x: F.linear(x, m.dense.to(torch.float16).float()), (x(T),), "dense", 0),
    Case("a copied weight, transposed", lambda m, x: x @ m.dense.clone().T, (x(T),), "dense", 0),
    Case("one expert of a list", lambda m, x: F.linear(x, m.weight1), (x(T),), "weight*", 1),
    Case("one of stacked experts", lambda m, x: F.linear(x, m.experts["up"][2]), (x(T),), "experts.up", 2),
    Case("one by a tensor", lambda m, x: F.linear(x, m.experts["up"][torch.tensor(1)]), (x(T),), "experts.up", 1),
    Case("unbound", lambda m, x: F.linear(x, m.experts["up"].unbind()[1]), (x(T),), "experts.up", 1),
    Case("transposed experts", lambda m, x: x @ m.experts["down"][1], (x(T),), "experts.down", 1),
    Case("part of an expert", lambda m, x: F.linear(x, m.experts["up"][2, :3]), (x(T),), "experts.up", 2),
    Case(
        "bmm, transposed",
        lambda m, x: torch.bmm(x, m.experts["down"]),
        (x(E, T),),
        "experts.down",
        [[e] * T for e in range(E)],
    ),
    Case(
        "matmul, one input for all",
        lambda m, x: torch.matmul(x, m.experts["up"].mT),
        (x(T),),
        "experts.up",
        [[e] * T for e in range(E)],
        (E, T),
    ),
    Case(
        "the blocks of a matrix",
        lambda m, x: torch.bmm(x, m.dense.view(2, OUT // 2, IN).transpose(1, 2)),
        (x(2, T),),
        "dense",
        [[0] * T] * 2,
    ),
    Case(
        "the blocks of one of a list, one input for all",
        lambda m, x: x @ m.weight1.view(4, 2, IN).mT,
        (x(T),),
        "weight*",
        [[1] * T] * 4,
        (4, T),
    ),
    Case(
        "a matrix for each of a batch",
        lambda m, x: torch.bmm(x, m.weight1.expand(3, OUT, IN).mT),
        (x(3, T),),
        "weight*",
        [[1] * T] * 3,
    ),
    Case("matmul with some", lambda m, x: x @ m.experts["up"][1:].mT, (x(2, T),), "experts.up", [[1] * T, [2] * T]),
    Case(
        "baddbmm",
        lambda m, x: torch.baddbmm(torch.ones(E, 1, OUT), x, m.experts["up"].mT),
        (x(E, T),),
        "experts.up",
        [[e] * T for e in range(E)],
    ),
    Case(
        "gathered",
        lambda m, x: torch.bmm(m.experts["up"][PICKED], x.unsqueeze(-1)),
        (x(T),),
        "experts.up",
        (PICKED % E)[:, None].tolist(),
        (T, 1),
    ),
    Case(
        "gathered, transposed",
        lambda m, x: torch.bmm(x.unsqueeze(1), m.experts["down"].index_select(0, PICKED % E)),
        (x(T),),
        "experts.down",
        (PICKED % E)[:, None].tolist(),
        (T, 1),
    ),
    Case(
        "grouped_mm",
        lambda m, x: F.grouped_mm(x, m.experts["up"].mT, offs=OFFSETS),
        (x(T),),
        "experts.up",
        BY_OFFSETS,
    ),
    Case(
        "_grouped_mm",
        lambda m, x: torch._grouped_mm(x, m.experts["down"], OFFSETS),
        (x(T),),
        "experts.down",
        BY_OFFSETS,
    ),
]


def seen(case, change, *, params=None):
    model = Call(case.function)
    weights = dict(model.named_parameters()) if params is None else params
    rules = [fqt.Rule(pattern, inputs=fqt.FP8) for pattern in ("dense", "experts.*", "weight?")]
    spec = fqt.select(weights, rules, transposed="experts.down")
    uses = []

    def on_input(use, x):
        uses.append((use, x))
        return change(x)

    with products(model, weights, spec.inputs, on_input) as keys:
        out = functional_call(model, weights, case.args)
    return model, weights, uses, keys, out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_product_is_seen(case):
    """Once, with all of its input, whose rows have these experts; and what replaces the input is what is multiplied."""
    model, weights, [(use, found)], keys, out = seen(case, lambda x: x * 2)
    assert keys == {f"{case.key}.input"} == {use.inputs.key}
    assert use.is_first
    (argument,) = case.args
    rows = case.rows or argument.shape[:-1]
    is_repeated = argument.numel() < found.numel()
    assert torch.equal(found, argument.expand(*rows, IN) if is_repeated else argument.reshape(*rows, IN))
    experts = use.experts if isinstance(use.experts, int) else use.experts.tolist()
    assert experts == case.experts
    doubled = functional_call(model, weights, (argument * 2,))
    if "grouped" in case.name:
        out, doubled = out[:5], doubled[:5]  # the last row is nobody's, and not written
    assert torch.equal(out, doubled)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_product_is_seen_within_grad(case):
    """Under torch.func weights are wrappers without storage: their views are known by what is wrapped."""
    params = {name: p.detach() for name, p in Call(None).named_parameters()}
    found = []

    def loss(p):
        *_, uses, _, out = seen(case, lambda x: x * 2, params=p)
        found.append([use.inputs.key for use, _ in uses])
        return out[:5].sum() if "grouped" in case.name else out.sum()

    gradients = grad(loss)(params)
    assert found == [[f"{case.key}.input"]]
    assert any(bool(g.any()) for g in gradients.values())


def test_weights_in_one_allocation_are_told_apart():
    """`fakequant` gives the experts of a group as views of one allocation on a GPU."""
    memory = torch.randn(7 * OUT * IN).split(OUT * IN)
    model = Call(lambda m, x: F.linear(x, m.weight1) + F.linear(x, m.dense))
    weights = dict(model.named_parameters()) | {
        name: part.view(OUT, IN) for name, part in zip(("weight0", "weight1", "dense"), memory, strict=False)
    }
    spec = fqt.select(weights, [fqt.Rule("weight?", inputs=fqt.FP8), fqt.Rule("dense", inputs=fqt.FP8)])
    uses = []
    with products(model, weights, spec.inputs, lambda use, x: uses.append(use) or x):
        functional_call(model, weights, (x(T),))
    assert [(use.inputs.key, use.experts) for use in uses] == [("weight*.input", 1), ("dense.input", 0)]


def test_a_further_part_of_a_weight_is_no_further_token():
    case = Case(
        "halves", lambda m, x: F.linear(x, m.dense[:2]).sum() + F.linear(x, m.dense[2:]).sum(), (x(T),), "dense", 0
    )
    _, _, uses, _, _ = seen(case, lambda x: x)
    assert [use.is_first for use, _ in uses] == [True, False]


REFUSED = {
    "einsum": lambda m, x: torch.einsum("ti,oi->to", x, m.dense),
    "over out": lambda m, x: x[:, :1].expand(T, OUT) @ m.dense,
    "over out, squares": lambda m, x: x @ m.experts["up"][0, :IN].contiguous(),
    "arithmetic": lambda m, x: F.linear(x, m.dense * 2),
    "embedding": lambda m, x: F.embedding(torch.tensor([1]), m.dense),
    "norm": lambda m, x: m.dense.norm(),
    "weight by weight": lambda m, x: m.dense @ m.weight0.T,
    "as a bias": lambda m, x: torch.addmm(m.dense[:, :1], torch.ones(OUT, 2), torch.ones(2, 1)),
    "cast of all experts": lambda m, x: F.linear(x, m.experts["up"].half().float()[1]),
    "mask of experts": lambda m, x: x @ m.experts["up"][torch.tensor([True, False, True])].mT,
    "all experts as one matrix": lambda m, x: x @ m.experts["up"].view(E * OUT, IN).T,
    "every second expert": lambda m, x: x @ m.experts["up"][::2].mT,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused(name):
    """A weight whose product cannot be followed would be multiplied with inputs that nobody quantized."""
    case = Case(name, REFUSED[name], (x(T),), "", 0)
    message = message_of(ValueError, seen, case, lambda x: x)
    assert_names(message, ".input'", "wanted x @ w.T by linear, matmul", "with a rule to None")
    assert not torch.overrides._get_current_function_mode_stack()


def test_looking_at_a_weight_is_no_use():
    case = Case(
        "looks",
        lambda m, x: x * m.dense.shape[0] + len(m.experts["up"]) + m.dense.numel() + m.dense.requires_grad,
        (x(T),),
        "",
        0,
    )
    _, _, uses, keys, _ = seen(case, lambda x: x)
    assert (uses, keys) == ([], set())


class GroupedLinear(nn.Module):
    """Stands in for Transformer Engine's: weights weight0.., called with tokens in the order of experts and splits."""

    def __init__(self, experts):
        super().__init__()
        for i in range(experts):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(OUT, IN)))

    def forward(self, inp, m_splits, is_first_microbatch=None):
        parts = inp.split(m_splits)
        return torch.cat([_Opaque.apply(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class LayerNormLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x):
        return _Opaque.apply(x, self.weight)


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


@pytest.fixture
def engine(monkeypatch):
    for kind in (GroupedLinear, LayerNormLinear):
        monkeypatch.setattr(kind, "__module__", "transformer_engine.pytorch.module")


@pytest.mark.parametrize("as_keyword", [False, True])
def test_transformer_engines_grouped_layer_is_hooked_for_the_call(engine, as_keyword):
    """Its product lies in an autograd.Function: rows have their experts by m_splits, and gradients the fake input."""
    model = GroupedLinear(3)
    weights = dict(model.named_parameters())
    spec = fqt.select(weights, [fqt.Rule("*", inputs=fqt.INT8, per_expert_inputs=True)])
    fq = fqt.transform(spec)
    args, kwargs = ((x(T),), {"m_splits": [2, 0, 4]}) if as_keyword else ((x(T), [2, 0, 4]), {})
    state = fq.calibrate(weights, [kwargs | {"inp": args[0]} if as_keyword else args], model=model)
    entry = state["weight*.input"]
    assert entry["tokens"].tolist() == [2, 0, 4]
    rows = args[0].abs()
    assert torch.equal(entry["amax"], torch.stack([rows[:2].max(), torch.tensor(-torch.inf), rows[2:].max()]))
    state = fq.fill_unseen(state, unseen=1.0)
    out = fq.apply(model, weights, state, *args, **kwargs)
    quantized = torch.cat(
        [fake_quantize_reference(part, amax, None, format=fqt.INT8, out_dtype=torch.float32)
         for part, amax in ((args[0][:2], rows[:2].max()), (args[0][2:], rows[2:].max()))]
    )  # fmt: skip
    assert torch.equal(out[:2], quantized[:2] @ weights["weight0"].T)
    assert torch.equal(out[2:], quantized[2:] @ weights["weight2"].T)
    out.sum().backward()
    assert torch.equal(weights["weight0"].grad, torch.ones(2, OUT).T @ quantized[:2])
    assert not model._forward_pre_hooks


def test_layers_that_normalize_their_input_are_refused(engine):
    model = LayerNormLinear()
    weights = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(weights, [fqt.Rule("*", inputs=fqt.INT8)]))
    assert_names(
        message_of(ValueError, fq.calibrate, weights, x(T), model=model),
        "'weight.input'",
        "LayerNormLinear, which normalizes",
    )


def _megatron(rank, size):
    from megatron.core import tensor_parallel

    from tests.checkpoint.test_megatron import Layout, share
    from tests.integrations.test_megatron import initialized, tokens

    share(Layout(ep=2))
    model = initialized(Layout(ep=2), gated=True).eval()
    weights = dict(model.named_parameters())
    rules = [fqt.Rule("*.local_experts.*weight", fqt.FP8, fqt.FP8, per_expert_inputs=True)]
    fq = fqt.transform(fqt.select(weights, [*rules, fqt.Rule("*linear_proj.weight", fqt.FP8, fqt.FP8)]))
    state = fq.calibrate(weights, tokens(), model=model)
    counts = {i.key: state[i.key]["tokens"] for i in fq.spec.inputs}
    amaxes = {i.key: state[i.key]["amax"] for i in fq.spec.inputs}
    assert all(torch.isfinite(amaxes[key][n > 0]).all() for key, n in counts.items() if len(amaxes[key]) == len(n))
    out = fq.apply(model, weights, fq.fill_unseen(state, unseen="max-of-peers"), *tokens())
    fakes = fq.fakequant(weights, fq.fill_unseen(state, unseen=1.0))
    assert not torch.equal(out, functional_call(model, fakes, tokens()))
    assert not any(module._forward_pre_hooks for module in model.modules())

    # The layer alone: what it saves for backward is the quantized input.
    layer = tensor_parallel.ColumnParallelLinear(
        IN, OUT, config=model.config, init_method=lambda w: w, bias=False, gather_output=False, is_expert=True
    )
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, IN))
    own = dict(layer.named_parameters())
    fq = fqt.transform(fqt.select(own, [fqt.Rule("*", inputs=fqt.INT8)]))
    at = fq.calibrate(own, x(T), model=layer)
    fq.apply(layer, own, at, x(T))[0].sum().backward()
    quantized = fake_quantize_reference(x(T), x(T).abs().max(), None, format=fqt.INT8, out_dtype=torch.float32)
    assert torch.equal(own["weight"].grad, torch.ones(T, OUT).T @ quantized)
    assert not torch.equal(quantized, x(T))
    return counts


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
def test_megatrons_linear_layers_are_hooked_for_the_call(ranks):
    """SequentialMLP at EP=2, every expert's tokens counted; ColumnParallelLinear saves the quantized input."""
    pytest.importorskip("megatron.core")
    first, second = ranks(_megatron, size=2)
    for key, tokens_here in first.items():
        if "experts" in key:
            assert tokens_here.sum() + second[key].sum() == 2 * 16 * 2, key  # ranks, tokens each, experts a token
        else:
            assert tokens_here.tolist() == [16]


def test_meta_weights_are_refused():
    weights = {name: p.to("meta") for name, p in Call(None).named_parameters()}
    spec = fqt.select(weights, [fqt.Rule("dense", inputs=fqt.FP8)])
    with (
        pytest.raises(ValueError, match="'dense': found a meta tensor"),
        products(Call(None), weights, spec.inputs, None),
    ):
        pass
