"""The law of doors: whatever a tensor is, every public function computes as of its values, or names it and refuses."""

import random
import tempfile

import optree
import pytest
import torch
from torch import Tensor, nn

import fq_transforms as fqt
from tests.full import FULL

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BAD = "layers.0.experts.1.w1.weight"
KEY = "layers.0.experts.*.w1.weight"


class Wrapper(Tensor):
    """A tensor without values of its own, as those of torchao and Transformer Engine are."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside = optree.tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        found = func(*inside[0], **inside[1])
        return cls(found) if func is torch.ops.aten.detach.default else found


class Codes(nn.Parameter):
    """A parameter whose functions are its own, as those of bitsandbytes are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Named(Tensor):
    """A subclass that only adds a method; what is computed with it is one too, which cannot be loaded."""

    def name(self):
        return "a name"


class NamedParameter(nn.Parameter):
    """A parameter that only adds a method; what is computed with it is a plain tensor."""

    def name(self):
        return "a name"


def negated(x):
    """A lazily negated view with the values of x: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(x).float(), -x.float()).conj().imag
    assert view.is_neg()
    return view


def freed(x):
    found = x.clone()
    found.untyped_storage().resize_(0)
    return found


def inference(x):
    with torch.inference_mode():
        return x.clone()


# Kind -> a tensor of this kind with the values of one in fp32.
KINDS = {
    "None": lambda x: None,
    "numpy": lambda x: x.cpu().numpy(),
    "list": lambda x: x.tolist(),
    "wrapper": Wrapper,
    "wrapper as parameter": lambda x: nn.Parameter(Wrapper(x), requires_grad=False),
    "codes": Codes,
    "lazily negated": negated,
    "freed": freed,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "complex": lambda x: x.to(torch.complex64),
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.abs().to(torch.uint8),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "fp64": lambda x: x.double(),
    "lazy": lambda x: nn.UninitializedParameter(device=x.device),
    "empty": lambda x: x[:0],
    "on meta": lambda x: x.to("meta"),
    "inference": inference,
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
    "a subclass with a method": lambda x: x.as_subclass(Named),
    "a parameter with a method": NamedParameter,
    "a view": lambda x: torch.stack([x, x], -1)[..., 1],
}
FINE = ["expanded", "transposed", "a parameter with a method", "a view"]  # right everywhere


def plain_of(value, x):
    """The same values in a plain tensor; None where the kind has others."""
    if isinstance(value, Tensor) and value.shape == (0, *x.shape[1:]):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.float32 and not isinstance(value, nn.UninitializedParameter):
        return x[:1].expand(x.shape).clone() if 0 in value.stride() else x
    return None


class Setup:
    """A group of experts, one of which may be of another kind, with all that the doors take."""

    def __init__(self, device, one=None):
        generator = torch.Generator().manual_seed(0)
        self.params = {
            f"layers.0.experts.{e}.w1.weight": (torch.randn(8, 32, generator=generator) * (e + 1)).to(device)
            for e in range(3)
        }
        self.x = self.params[BAD]
        self.fq = {rule: fqt.transform(fqt.select(self.params, {"*": fqt.INT8}), backward=rule)
                   for rule in ("pass_through", "clip", "lsq")}  # fmt: skip
        self.state = {KEY: {"amax": torch.tensor([2.0, 3.0, 4.0], device=device)}}
        self.fresh = {name: param.clone() for name, param in self.params.items()}
        self.with_one = self.params if one is None else self.params | {BAD: one}

    def learned(self):
        return optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), self.state)


def gradients(s, rule, params):
    leaves = {name: p if name == BAD else p.clone().requires_grad_() for name, p in params.items()}
    state = s.learned() if rule == "lsq" else s.state
    out = s.fq[rule].fakequant(leaves, state)
    sum(y.float().square().sum() for y in out.values()).backward()
    return [leaf.grad for name, leaf in leaves.items() if name != BAD]


def taken(s, params):
    masters = {name: p.clone().requires_grad_() for name, p in s.params.items()}
    model = {name: nn.Parameter(torch.zeros_like(p)) for name, p in masters.items()}
    for name, p in model.items():
        p.grad = s.x.clone() if name != BAD else None
    s.fq["clip"].take_grads(model, masters | {BAD: params[BAD]}, s.state)
    return [masters[name].grad for name in masters if name != BAD]


def saved(tree, s):
    with tempfile.TemporaryDirectory() as folder:
        fqt.checkpoint.save(f"{folder}/a", s.fq["clip"], tree)
        return fqt.checkpoint.load(f"{folder}/a", s.fq["clip"], like=s.state)


def into_layers(s, params):
    model = Model().to(s.x.device)
    for name, p in params.items():
        owner = model.get_submodule(name.removesuffix(".weight"))
        owner.weight = p if isinstance(p, nn.Parameter) or p is None else nn.Parameter(p, requires_grad=False)
    with fqt.layerwise(s.fq["clip"], model, s.state):
        return model(torch.ones(2, 32, device=s.x.device))


class Model(nn.Module):
    """Three experts, which all run."""

    def __init__(self):
        super().__init__()
        experts = [nn.ModuleDict({"w1": nn.Linear(32, 8, bias=False)}) for _ in range(3)]
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(experts)})])

    def forward(self, x):
        return [expert["w1"](x) for expert in self.layers[0]["experts"]]


# Door -> what it makes of parameters one of which is of some kind.
OF_PARAMS = {
    "select": lambda s, params: fqt.select(params, {"*": fqt.INT8}).groups,
    "init": lambda s, params: s.fq["clip"].init(params),
    "calibrate": lambda s, params: s.fq["clip"].calibrate(params),
    "calibrate, Mse": lambda s, params: fqt.transform(s.fq["clip"].spec, method=fqt.methods.Mse()).calibrate(params),
    "fakequant": lambda s, params: s.fq["pass_through"].fakequant(params, s.state),
    "fakequant, clip": lambda s, params: gradients(s, "clip", params),
    "fakequant, lsq": lambda s, params: gradients(s, "lsq", params),
    "fakequant from": lambda s, params: s.fq["clip"].fakequant(params, s.state, out=s.fresh),
    "fakequant into": lambda s, params: s.fq["clip"].fakequant(s.params, s.state, out=s.fresh | {BAD: params[BAD]}),
    "cast from": lambda s, params: fqt.cast(params, out=s.fresh),
    "cast into": lambda s, params: fqt.cast(s.params, out=s.fresh | {BAD: params[BAD]}),
    "pullback": lambda s, params: s.fq["clip"].pullback(params, s.state, dict.fromkeys(params, s.x)),
    "pullback, lsq": lambda s, params: s.fq["lsq"].pullback(params, s.state, dict.fromkeys(params, s.x)),
    "pullback of": lambda s, params: s.fq["clip"].pullback(s.params, s.state, {BAD: params[BAD]}),
    "pullback of, as it is": lambda s, params: s.fq["pass_through"].pullback(s.params, s.state, {BAD: params[BAD]}),
    "take_grads": taken,
    "masters": lambda s, params: {name: p.detach().clone() for name, p in fqt.masters(params).items()},
    "pack": lambda s, params: s.fq["clip"].pack(params, s.state),
    "report": lambda s, params: s.fq["clip"].report(params, s.state).groups[KEY].sqnr.float(),  # sums in fp64
    "layerwise": into_layers,
}
# Door -> what it makes of a state, or of packed weights, one leaf of which is of some kind.
OF_LEAVES = {
    "fakequant": lambda s, leaf: s.fq["clip"].fakequant(s.params, {KEY: {"amax": leaf}}),
    "fakequant into": lambda s, leaf: s.fq["clip"].fakequant(s.params, {KEY: {"amax": leaf}}, out=s.fresh),
    "pullback": lambda s, leaf: s.fq["clip"].pullback(s.params, {KEY: {"amax": leaf}}, {BAD: s.x}),
    "pack": lambda s, leaf: s.fq["clip"].pack(s.params, {KEY: {"amax": leaf}}),
    "report": lambda s, leaf: s.fq["clip"].report(s.params, {KEY: {"amax": leaf}}).groups[KEY].sqnr,
    "check": lambda s, leaf: fqt.state.check({KEY: {"amax": leaf}}, s.fq["clip"].spec),
    "save": lambda s, leaf: saved({KEY: {"amax": leaf}}, s),
    "unpack": lambda s, leaf: s.fq["clip"].unpack(
        s.fq["clip"].pack(s.params, s.state)
        | {KEY: {"codes": s.fq["clip"].pack(s.params, s.state)[KEY]["codes"], "scale": leaf}}
    ),
}
# What has no values to read may pass where only shapes are.
SHAPES_ONLY = {("select", "on meta"), ("select", "inference"), ("init", "inference")}


def drawn(doors, but=()):
    """Kind and door: all of them, or what a seed draws."""
    pairs = [(kind, door) for kind in KINDS if kind not in but for door in doors]
    pairs = [(kind, door) for kind, door in pairs if door != "layerwise" or kind not in ("None", "numpy", "list")]
    return pairs if FULL else random.Random(8).sample(pairs, len(pairs) // 2)


def outcome(call):
    try:
        return call(), None
    except (ValueError, TypeError, KeyError) as error:
        return None, str(error)


def assert_right(found, wanted, what):
    leaves, others = optree.tree_leaves(found, none_is_leaf=True), optree.tree_leaves(wanted, none_is_leaf=True)
    assert len(leaves) == len(others), what
    for one, other in zip(leaves, others, strict=True):
        if isinstance(other, Tensor):
            assert (one.dtype, one.device) == (other.dtype, other.device), what
            assert torch.equal(one.as_subclass(Tensor), other), what
        else:
            assert one == other, what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "door"), drawn(OF_PARAMS), ids=str)
def test_a_parameter_is_right_or_refused(kind, door, device):
    """The result is that of a plain tensor with its values, or the error names the parameter."""
    s = Setup(device)
    one = KINDS[kind](s.x.clone())
    found, error = outcome(lambda: OF_PARAMS[door](s, s.with_one | {BAD: one}))
    if error is not None:
        assert kind not in FINE or door.endswith("into"), error
        assert BAD in error or "experts.1.w1" in error, error
        return
    wanted = one.clone() if door == "masters" and one.dtype != torch.float32 else plain_of(one, s.x)  # frozen: kept
    if (door, kind) == ("cast from", "fp64"):
        wanted = s.x
    assert wanted is not None or (door, kind) in SHAPES_ONLY or (kind == "None" and "of" in door)
    if wanted is not None and one.device == wanted.device:
        assert kind != "freed"
        again = Setup(device)
        assert_right(found, OF_PARAMS[door](again, again.params | {BAD: wanted}), (kind, door))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "door"), drawn(OF_LEAVES, but=["nested"]), ids=str)  # a vector cannot be
def test_a_leaf_is_right_or_refused(kind, door, device):
    """The same of a state and of packed weights."""
    s = Setup(device)
    plain = s.state[KEY]["amax"]
    leaf = KINDS[kind](plain.clone())
    found, error = outcome(lambda: OF_LEAVES[door](s, leaf))
    if error is not None:
        assert kind not in FINE or kind == "transposed", error
        assert KEY in error, error
        return
    wanted = plain[:1].expand(3) if kind == "expanded" else plain
    assert isinstance(leaf, Tensor)
    assert (leaf.dtype, leaf.device) == (plain.dtype, plain.device)
    assert kind != "freed"
    assert_right(found, OF_LEAVES[door](Setup(device), wanted.clone()), (kind, door))
