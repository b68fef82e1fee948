"""Learned scales: the published formula, finite differences, the laws of torch.func, kernel and reference alike."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import fq_transforms as fqt
from fq_transforms.formats import FP8, INT4_BLOCK32, INT8, MXFP4, NVFP4, NVFP4_STATIC, IntElement
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.ops.quantize.launch import LSQ, lsq_backward_triton
from fq_transforms.ops.quantize.reference import (
    clip_backward_reference,
    fake_quantize_reference,
    lsq_backward_reference,
    lsq_push_reference,
    quantize_two_level,
    spread,
)
from tests.cases import (
    ALL_FORMATS,
    CORE_FORMATS,
    ONE_OF_EACH_LEAF,
    assert_names,
    experts,
    message_of,
    name_of,
    same_bits,
    shapes_of,
)
from tests.conftest import HAS_GPU
from tests.full import FULL
from tests.variants import CPU, on_each_kernel, stored, variants

DEVICES = [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
LEARNED = [format for format in ALL_FORMATS if not format.is_stateless]
CORE = [format for format in CORE_FORMATS if not format.is_stateless]
ONE_OF_EACH = [format for format in CORE if format.name not in ("INT8", "FP8_PER_CHANNEL", "INT4_BLOCK128")]
IN_FP32 = [variant for variant in variants(LEARNED) if variant[1] == torch.float32]
# Of conventions `test_kernel_equals_reference` has the numbers; where these are read they change nothing.
IN_FP32_OF_CORE = [variant for variant in IN_FP32 if variant[0] in CORE]
learned = pytest.mark.parametrize("format", LEARNED, ids=name_of)
one_of_each = pytest.mark.parametrize("format", ONE_OF_EACH, ids=name_of)

pytestmark = [
    # numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Dynamo makes an instance of an autograd.Function when it traces one, and PyTorch warns that nobody should.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def scales_of(weights, format, factor=0.6):
    """Leaves of a group, under which some weights saturate; of two levels also E4M3 scales, at both ends."""
    amax, global_amax = expert_amax(weights, format=format)
    if global_amax is not None:
        return amax * factor, global_amax * torch.linspace(0.4, 1.3, len(global_amax), device=amax.device)
    return amax * factor, None


def elementwise(weight, amax, global_amax, format):
    """Dy / damax and dy / dglobal_amax of each weight, as pushed forward along one of them: fp32 [out, in]."""
    zero, options = torch.zeros_like(weight, dtype=torch.float32), {"format": format, "out_dtype": torch.float32}
    leaves = (weight, amax, global_amax)
    nothing = None if global_amax is None else torch.zeros_like(global_amax)
    along = lsq_push_reference(zero, torch.ones_like(amax), nothing, *leaves, **options)
    if global_amax is None:
        return along, None
    return along, lsq_push_reference(zero, torch.zeros_like(amax), torch.ones_like(global_amax), *leaves, **options)


# --- The formula.


@pytest.mark.parametrize("format", [f for f in LEARNED if isinstance(f.element, IntElement)], ids=name_of)
def test_the_published_formula(format):
    """Esser et al., equation 3, for step = amax / qmax, in fp64: -v + round(v) within the range, its end beyond."""
    for shape in shapes_of(format):
        weight = experts(1, shape, seed=3)[0]
        amax, _ = scales_of([weight], format)
        element, step = format.element, spread(amax[0], weight, format).double() / format.element.qmax
        v = weight.double() / step.clamp(min=1e-30)
        # Where fp32's product lies beside a tie, or an end, its rounding may choose otherwise than fp64's.
        is_beyond = (v > element.high + 1) | (v < element.low - 1)
        decided = is_beyond | (((v - v.floor() - 0.5).abs() > 1e-4) & ((v - element.high).abs() > 1e-4))
        wanted = (v.round() - v).where((v > element.low) & (v < element.high), v.clamp(element.low, element.high))
        wanted = torch.where(step * element.qmax < 2.0**-24, 0.0, wanted / element.qmax)
        found, _ = elementwise(weight, amax[0], None, format)
        assert decided.double().mean() > 0.9
        error = (found.double() - wanted).abs()[decided]
        assert error.max() <= 2.0**-23 * 2, "two roundings of v, which is at most qmax, over qmax"


@on_each_device
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_a_weight_on_the_end_of_the_range(format, device):
    """Counts as beyond it, as published: v = qmax and v = -qmax exactly owe +1 and -1; int8's -128 lies farther out."""
    columns = 3 * format.block[1] if format.has_blocks_along_in else 128
    weight = torch.full((2, columns), 0.5, device=device)
    weight[0, :3] = torch.tensor([1.0, -1.0, 1.0 - 2.0**-12])
    weights, amax = [weight * 2.0**e for e in (0, 3)], torch.tensor([1.0, 8.0], device=device)
    global_amax = None
    if format.scale == "e4m3":  # u = 448 / 7 = 64, of which E4M3 has it exactly; of dynamic blocks u = 448
        global_amax = None if format.dynamic else amax * 7
    shape = format.amax_shape(2, columns)
    leaf = amax.view(-1, *(1,) * len(shape)).expand(2, *shape).contiguous()
    for column in range(4):
        grads = [torch.zeros_like(w) for w in weights]
        for g in grads:
            g[0, column] = 1.0
        _, found, _ = lsq_backward_triton(grads, weights, leaf, global_amax, format=format, transposed=False)
        for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
            expert = None if global_amax is None else global_amax[i]
            _, wanted, _ = lsq_backward_reference(g, w, leaf[i], expert, format=format)
            assert torch.equal(found[i], wanted)
        if format.scale == "e4m3" and format.dynamic:
            continue
        is_int = isinstance(format.element, IntElement)
        owed = found.reshape(2, -1).sum(1).tolist()
        if column == 0:
            assert owed == [1.0, 1.0]
        elif column == 1:
            assert owed == ([0.0, 0.0] if is_int else [-1.0, -1.0])
        else:
            assert all(abs(o) < 0.1 for o in owed)


def surrogate(weight, amax, global_amax, format, y):
    """The reference in fp64 as a function of amax and global amax, its rounding errors held at what they are here.

    Args:
        weight: [out, in].
        amax: One expert's.
        global_amax: Likewise, or None.
        format: The numbers.
        y: `fake_quantize_reference` of the weight, from which the errors are taken.
    """
    x = weight.double()
    element = format.element
    low, high = (element.low, element.high) if isinstance(element, IntElement) else (-element.max, element.max)
    qmax = element.qmax if isinstance(element, IntElement) else element.max

    def per_weight(leaf):
        return spread(leaf, x, format)

    if format.scale == "fp32":
        step = per_weight(amax).double() / qmax
        errors = y.double() / step - (x / step).clamp(low, high)
        return lambda a, _: ((x / (per_weight(a) / qmax)).clamp(low, high) + errors) * (per_weight(a) / qmax)

    _, s, s8, _ = quantize_two_level(weight, amax, global_amax, format)
    blocks = x.unflatten(-1, (-1, format.block[1]))
    block_amax = blocks.abs().amax(-1) if format.dynamic else amax.double()
    expert_amax_ = (amax if format.dynamic else global_amax).double()

    def level(b, expert):
        return (b / (6 * (expert / 2688))).clamp(format.min_scale, 448.0)

    rho = s8.double() - level(block_amax, expert_amax_)
    errors = (y.double().view_as(blocks) / s.double()) - (blocks / s.double()).clamp(low, high)

    def value(a, g):
        b, expert = (block_amax, a) if format.dynamic else (a, g)
        scale = ((level(b, expert) + rho) * (expert / 2688))[..., None]
        return (((blocks / scale).clamp(low, high) + errors) * scale).flatten(-2)

    return value


@learned
def test_finite_differences(format):
    """Central differences of the reference along each amax, its rounding errors held, in fp64.

    Left out are weights that enter or leave the range within the difference, and granules whose scale is a constant.
    """
    compared = 0
    for shape in shapes_of(format):
        weights = experts(4, shape, seed=5)
        amax, global_amax = scales_of(weights, format)
        if format.scale == "e4m3" and not format.dynamic:  # scales at both ends of E4M3: 448, and its smallest
            amax[0, 0, 0], amax[1, 0, 0] = global_amax[0] * 40, global_amax[1] * 1e-9
        for i, weight in enumerate(weights):
            a, g = amax[i], None if global_amax is None else global_amax[i]
            y = fake_quantize_reference(weight, a, g, format=format, out_dtype=torch.float32)
            along_amax, along_global = elementwise(weight, a, g, format)
            value = surrogate(weight, a, g, format, y)
            a64, g64 = a.double(), None if g is None else g.double()
            h = 1e-6
            around = a64 if format.dynamic else spread(a64, weight, format)
            with_amax = (value(a64 * (1 + h), g64) - value(a64 * (1 - h), g64)) / (2 * h * around)
            checks = [(along_amax, with_amax)]
            if g is not None:
                checks.append((along_global, (value(a64, g64 * (1 + h)) - value(a64, g64 * (1 - h))) / (2 * h * g64)))
            for found, wanted in checks:
                close = (found.double() - wanted).abs() <= 3e-6 * wanted.abs() + 2e-6
                usable = wanted.isfinite()  # not 0 / 0, as in granules of zeros
                # Between the ends of a difference a weight may saturate: one in a million, as h is.
                assert (~close & usable).sum() <= 1, (shape, i, found[~close & usable], wanted[~close & usable])
                compared += int(usable.sum())
    assert compared > 100


@pytest.mark.parametrize("format", [f for f in CORE if f.clips], ids=name_of)
def test_saturated_weights_need_no_estimate(format):
    """Beyond the range the fp32 reference itself is differentiable: its gradient is the end of the range."""
    element = format.element
    if isinstance(element, IntElement):
        qmax, low, high = element.qmax, element.low, element.high
    else:
        qmax, low, high = element.max, -element.max, element.max
    weight = torch.tensor([[3.0, -3.0, 9.0, -9.0]]).repeat(1, 32)
    shape = format.amax_shape(*weight.shape)
    amax, global_amax = torch.full(shape, 1.0), torch.tensor(1.0) if format.has_global_amax else None
    options = {"format": format, "out_dtype": torch.float32}
    if format.scale == "e4m3":  # the block's E4M3 scale moves in steps of its own: from one value to the next
        global_amax = torch.tensor(6.0)  # amax 1 and 2 are E4M3 values of it, 448 / 6 apart
    up, down = (fake_quantize_reference(weight, amax * f, global_amax, **options) for f in (2.0, 1.0))
    wanted = (up - down).double()
    found, _ = elementwise(weight, amax, global_amax, format)
    ends = torch.where(weight > 0, high, low).double() / qmax
    assert torch.allclose(found.double(), ends, atol=1e-6)
    tolerance = 1e-6 if format.scale == "fp32" else 2.0**-4  # half of E4M3's spacing
    assert torch.allclose(wanted, ends, atol=tolerance)


@pytest.mark.parametrize(("qmax", "low", "high"), [(127, -128, 127), (7, -8, 7), (7, -7, 7), (7.5, -8, 7)])
@pytest.mark.parametrize("amax", [6.0, 1.5])
def test_gradient_of_the_squared_error_is_the_true_one(qmax, low, high, amax):
    """Of integers the estimate is exact on average: the mean squared error of a Gaussian's quantiles, by differences.

    They are so many that the error of the fp32 reference is smooth in amax, saturated weights and all.
    """
    format = replace(INT8, name="INT", element=IntElement(qmax, low, high))
    weight = torch.special.ndtri((torch.arange(400_000) + 0.5).double() / 400_000).float()[None]

    def error(amax):
        (y,) = fake_quantize([weight], amax, None, format=format)
        return (y - weight).double().square().mean()

    def learned_error(amax):
        (y,) = fake_quantize([weight], amax, None, format=format, backward="lsq")
        return (y - weight).square().mean()

    amax = torch.tensor([amax])
    h = amax * 0.01
    found = grad(learned_error)(amax)
    wanted = (error(amax + h) - error(amax - h)) / (2 * h)
    assert abs(float(found) - float(wanted)) <= 0.02 * abs(float(wanted)), (found, wanted)
    assert (found > 0) == (amax > 2), "too wide a range loses in rounding, too narrow a one in saturation"


def test_learning_amax_lowers_the_error():
    """Gradient descent on the logarithm of amax, as the docstring says: less error than with max, for each expert."""
    params = {f"experts.{i}.weight": torch.randn(16, 64) * 2.0**i for i in range(3)}
    fq = fqt.transform(fqt.select(params, {"*": fqt.formats.INT4_BLOCK32}), backward="lsq")
    start = fq.calibrate(params)
    ((key, leaves),) = start.items()

    def errors(logarithm):
        state = {key: {"amax": logarithm.exp()}}
        fake = fq.fakequant(params, state)
        return torch.stack([(fake[name] - w).square().mean() / w.square().mean() for name, w in params.items()])

    logarithm = leaves["amax"].log()
    before = errors(logarithm)
    for _ in range(60):
        gradient = grad(lambda x: errors(x).sum())(logarithm)
        logarithm = logarithm - 60.0 * gradient
    after = errors(logarithm)
    assert (after < before * 0.9).all(), (before, after)


# --- Kernel and reference.


def assert_sums_agree(format, weights, grads, amax, global_amax, found, found_global):
    """Of any order of adding n fp32 numbers, the largest error is n * 2**-24 times the sum of magnitudes."""
    for i, (weight, g) in enumerate(zip(weights, grads, strict=True)):
        a, expert = amax[i], None if global_amax is None else global_amax[i]
        _, wanted, wanted_global = lsq_backward_reference(g, weight, a, expert, format=format)
        along, along_global = elementwise(weight, a, expert, format)
        of_expert = None if found_global is None else found_global[i]
        for got, right, terms in ((found[i], wanted, along), (of_expert, wanted_global, along_global)):
            if right is None:
                continue
            per_weight = (g.float() * terms).abs().double()
            bound = _over(per_weight, right, format) * (weight.numel() + 8) * 2.0**-24
            assert ((got.double() - right.double()).abs() <= bound + 1e-38).all(), (i, got, right)


def _over(terms, like, format):
    """Sums over each granule of `like`."""
    if like.dim() == 0:
        return terms.sum()
    rows, columns = like.shape
    r, c = format.block[0] or terms.shape[0], format.block[1] or terms.shape[1]
    padded = torch.nn.functional.pad(terms, (0, columns * c - terms.shape[1], 0, rows * r - terms.shape[0]))
    return padded.view(rows, r, columns, c).sum((1, 3))


@on_each_kernel(variants(LEARNED), variants(CORE))
def test_kernel_equals_reference(format, dtype, transposed, device):
    """Odd shapes, each expert at its own magnitude; weights' gradients bit for bit, sums within their bound."""
    is_wide = format in ONE_OF_EACH_LEAF and dtype == torch.float32 and not transposed
    for shape in shapes_of(format) if is_wide else shapes_of(format)[-1:]:
        weights = experts(3, shape, dtype, device=device)
        amax, global_amax = scales_of(weights, format)
        grads = [torch.randn_like(w) for w in weights]
        out, found, found_global = lsq_backward_triton(
            stored(grads, transposed),
            stored(weights, transposed),
            amax,
            global_amax,
            format=format,
            transposed=transposed,
        )
        assert found.shape == amax.shape
        assert (found_global is None) == (global_amax is None)
        for i, (weight, g) in enumerate(zip(weights, grads, strict=True)):
            wanted = clip_backward_reference(g, weight, amax[i], format=format) if format.clips else g
            assert same_bits(out[i].mT if transposed else out[i], wanted)
        assert_sums_agree(format, weights, grads, amax, global_amax, found, found_global)


@on_each_kernel(IN_FP32 if FULL else IN_FP32_OF_CORE, IN_FP32_OF_CORE)
def test_one_weight_at_a_time(format, dtype, transposed, device):
    """A cotangent for a single weight leaves nothing to add: its amax gets the reference's number, the others zero."""
    shape = shapes_of(format)[-1]
    weights = experts(2, shape, dtype, device=device)
    amax, global_amax = scales_of(weights, format)
    out_features, in_features = shape
    places = [(0, 0), (out_features - 1, in_features - 1), (out_features // 2, in_features // 3), (0, in_features - 2)]
    for row, column in places[: 2 if device == "cpu" and shape[0] > 100 else 4]:
        grads = [torch.zeros_like(w) for w in weights]
        grads[1][row, column] = -1.3
        _, found, found_global = lsq_backward_triton(
            stored(grads, transposed),
            stored(weights, transposed),
            amax,
            global_amax,
            format=format,
            transposed=transposed,
        )
        for i in range(2):
            expert = None if global_amax is None else global_amax[i]
            _, wanted, wanted_global = lsq_backward_reference(grads[i], weights[i], amax[i], expert, format=format)
            assert torch.equal(found[i], wanted), (row, column)
            assert wanted_global is None or torch.equal(found_global[i], wanted_global)
        assert (found[1] != 0).sum() <= 1
        assert (found[0] == 0).all()


@pytest.mark.parametrize("format", LEARNED if FULL or HAS_GPU else CORE, ids=name_of)
@on_each_device
def test_adversarial_values(format, device):
    """Subnormals, the largest floats, infinities and NaN under amax from tiny to huge and invalid, one by one."""
    columns = 3 * format.block[1] if format.has_blocks_along_in else 128
    row = torch.linspace(-7, 7, columns)
    row[:6] = torch.tensor([0.0, -0.0, 1e-45, -(2.0**-126), 3.3e38, -3.3e38])
    weight = torch.stack([row, row * 2.0**-40, row.clamp(-7, 7) * 2.0**100, row, row])
    weight[-1, 7], weight[-2, 8] = torch.inf, torch.nan
    amaxes = [0.0, 1e-45, 2.0**-25, 2.0**-24, 1.0, 448.0, 3.3e38, torch.nan, torch.inf, -1.0]
    weights = [weight.to(device)] * len(amaxes)
    scales = torch.tensor(amaxes, device=device)
    shape = format.amax_shape(*weight.shape)
    amax = scales.reshape(-1, *(1,) * len(shape)).expand(len(amaxes), *shape).clone()
    global_amax = scales.flip(0).clone() if format.has_global_amax else None
    for r, c in [(0, 3), (0, 20), (1, 5), (2, 9), (3, 8), (4, 7), (4, 12)]:
        grads = [torch.zeros_like(w) for w in weights]
        for g in grads:
            g[r, min(c, columns - 1)] = 1.0
        out, found, found_global = lsq_backward_triton(
            grads, weights, amax, global_amax, format=format, transposed=False
        )
        for i in range(len(amaxes)):
            expert = None if global_amax is None else global_amax[i]
            kept, wanted, wanted_global = lsq_backward_reference(grads[i], weights[i], amax[i], expert, format=format)
            assert same_bits(out[i], kept), amaxes[i]
            assert torch.equal(found[i].nan_to_num(7e7), wanted.nan_to_num(7e7)), (amaxes[i], r, c)
            if wanted_global is not None:
                assert torch.equal(found_global[i].nan_to_num(7e7), wanted_global.nan_to_num(7e7)), (amaxes[i], r, c)


def test_nan_and_zero_granules():
    """A NaN weight makes its own granule's gradient NaN and no other; a granule of zero amax has none."""
    weight = torch.randn(3, 64)
    weight[1, 40] = torch.nan
    amax = torch.full((3, 2), 1.5)
    amax[2, 0] = 0.0
    _, found, _ = lsq_backward_reference(torch.ones(3, 64), weight, amax, None, format=INT4_BLOCK32)
    assert found.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert found[2, 0] == 0
    assert found[0, 0] != 0


def test_constant_scales_have_no_gradient():
    """FP8 below 2**-24 takes amax 1, ModelOpt's NVFP4 takes scale 1 for small ones: neither depends on amax."""
    one = torch.ones(1, 16)
    _, found, _ = lsq_backward_reference(one, one * 0.3, torch.tensor(2.0**-24), None, format=FP8)
    assert found == 0
    _, found, _ = lsq_backward_reference(one, one * 1e-6, torch.tensor(1e-6), None, format=fqt.formats.NVFP4_MODELOPT)
    assert found == 0
    _, found, _ = lsq_backward_reference(one, one * 0.31, torch.tensor(1.0), None, format=NVFP4)
    assert found != 0


# --- The laws of torch.func.


class Group:
    """Three experts in one format, and `fq` of leaves and weights."""

    def __init__(self, format, layout="separate", dtype=torch.float32, out_dtype=None, device="cpu"):
        self.format, self.transposed = format, layout != "separate"
        self.matrices = experts(3, (3, 128), dtype, device=device)
        weights = stored(self.matrices, self.transposed)
        self.weights = (torch.stack(weights),) if self.transposed else tuple(weights)
        self.leaves = tuple(leaf for leaf in scales_of(self.matrices, format) if leaf is not None)
        self.options = {"format": format, "transposed": self.transposed, "out_dtype": out_dtype}
        self.cotangents = tuple(torch.randn_like(w, dtype=out_dtype) for w in self.weights)
        self.tangents = tuple(torch.randn_like(w) for w in self.weights)
        self.leaf_tangents = tuple(torch.randn_like(leaf) for leaf in self.leaves)

    def fq(self, leaves, *weights):
        return fake_quantize(weights, leaves[0], (*leaves, None)[1], **self.options, backward="lsq")

    def wanted(self):
        """Gradients of the leaves and of the weights, by the reference, an expert at a time."""
        grads = [m for c in self.cotangents for m in (c if c.dim() == 3 else [c])]
        parts = [
            lsq_backward_reference(
                g.mT if self.transposed else g, m, *(*(leaf[i] for leaf in self.leaves), None)[:2], format=self.format
            )
            for i, (g, m) in enumerate(zip(grads, self.matrices, strict=True))
        ]
        leaves = tuple(torch.stack([p[1 + k] for p in parts]) for k in range(len(self.leaves)))
        matrices = [p[0].mT if self.transposed else p[0] for p in parts]
        return leaves, (torch.stack(matrices),) if self.transposed else tuple(matrices)


@pytest.fixture(params=["separate", "stacked, transposed"])
def group_of(request):
    return lambda format, **options: Group(format, request.param, **options)


def all_equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@learned
def test_every_way_to_a_gradient_agrees(format, group_of):
    """backward(), grad, and vjp twice from one pullback give the reference's gradients; weights' are those of clip."""
    group = group_of(format)
    leaves, weights = group.wanted()
    outs, pullback = vjp(group.fq, group.leaves, *group.weights)
    nearest = fake_quantize(group.weights, *(*group.leaves, None)[:2], **group.options)
    assert all_equal(outs, nearest), "the values are those of fakequant"
    for _ in range(2):
        found_leaves, *found = pullback(group.cotangents)
        assert all_equal(found_leaves, leaves)
        assert all_equal(found, weights)

    def clipped(*w):
        return fake_quantize(w, *(*group.leaves, None)[:2], **group.options, backward="clip")

    assert all_equal(vjp(clipped, *group.weights)[1](group.cotangents), weights)

    tensors = [t.clone().requires_grad_() for t in (*group.leaves, *group.weights)]
    count = len(group.leaves)
    torch.autograd.backward(group.fq(tensors[:count], *tensors[count:]), group.cotangents)
    assert all_equal([t.grad for t in tensors], [*leaves, *weights])

    def loss(leaves, *w):
        return sum((y * c).sum() for y, c in zip(group.fq(leaves, *w), group.cotangents, strict=True))

    assert all_equal(grad(loss)(group.leaves, *group.weights), leaves)


@learned
def test_forward_mode_is_the_transpose(format, group_of):
    """<cotangent, jvp(tangent)> == <vjp(cotangent), tangent>, along the weights, the leaves, and both."""
    group = group_of(format)
    _, pullback = vjp(group.fq, group.leaves, *group.weights)
    leaves, *weights = pullback(group.cotangents)
    nothing = [tuple(map(torch.zeros_like, of)) for of in (group.leaf_tangents, group.tangents)]
    for along, tangents in (
        ((group.leaf_tangents, nothing[1]), group.leaf_tangents),
        ((nothing[0], group.tangents), ()),
        ((group.leaf_tangents, group.tangents), group.leaf_tangents),
    ):
        primals, pushed = jvp(group.fq, (group.leaves, *group.weights), (along[0], *along[1]))
        assert all_equal(primals, group.fq(group.leaves, *group.weights))
        left = sum((p.double() * c).sum() for p, c in zip(pushed, group.cotangents, strict=True))
        pairs = [*zip(leaves, along[0], strict=True), *zip(weights, along[1], strict=True)]
        right = sum((g.double() * t).sum() for g, t in pairs)
        size = sum((g.double() * t).abs().sum() for g, t in pairs)
        assert abs(left - right) <= 1e-6 * size, tangents


def test_tangents_of_the_state_alone():
    """Along amax with weights as constants, and along weights with amax as one: as the formula says."""
    weight, amax = torch.tensor([[127.4, 200.0, 0.25]]), torch.tensor([127.0])

    def fq(a, w):
        return fake_quantize([w], a, None, format=INT8, backward="lsq")[0]

    _, along = jvp(lambda a: fq(a, weight), (amax,), (torch.ones(1),))
    assert torch.allclose(along, torch.tensor([[1.0, 1.0, -0.25 / 127]]))
    _, along = jvp(lambda w: fq(amax, w), (weight,), (torch.ones(1, 3),))
    assert along.tolist() == [[0.0, 0.0, 1.0]]


@one_of_each
def test_second_derivatives(format, group_of):
    """The pullback is linear, so its own pullback is the pushforward, and that one's is the pullback again."""
    group = group_of(format)
    count = len(group.leaves)

    def pull(*cotangents):
        found_leaves, *found = vjp(group.fq, group.leaves, *group.weights)[1](cotangents)
        return (*found_leaves, *found)

    vectors = (*group.leaf_tangents, *group.tangents)
    _, push = vjp(pull, *group.cotangents)
    pushed = push(vectors)
    _, wanted = jvp(group.fq, (group.leaves, *group.weights), (group.leaf_tangents, *group.tangents))
    assert all_equal(pushed, wanted)
    _, pulled = jvp(pull, group.cotangents, group.cotangents)
    assert all_equal(pulled, pull(*group.cotangents))

    def forward(*vectors):
        return jvp(group.fq, (group.leaves, *group.weights), (vectors[:count], *vectors[count:]))[1]

    assert all_equal(vjp(forward, *vectors)[1](group.cotangents), pull(*group.cotangents))

    tensors = [t.clone().requires_grad_() for t in (*group.leaves, *group.weights)]
    outs = group.fq(tensors[:count], *tensors[count:])
    first = torch.autograd.grad(sum((y**2).sum() for y in outs) / 2, tensors, create_graph=True)
    second = torch.autograd.grad(first, tensors, grad_outputs=vectors)
    assert all(torch.allclose(s, p, atol=1e-5) for s, p in zip(second, pull(*wanted), strict=True))


@one_of_each
def test_vmap_is_a_loop(format, group_of):
    """Over states, weights, cotangents, and states within weights: values and all gradients."""
    group = group_of(format)

    def value_and_gradients(leaves, cotangents, *weights):
        outs, pullback = vjp(group.fq, leaves, *weights)
        found_leaves, *found = pullback(cotangents)
        return (*outs, *found_leaves, *found)

    factors = torch.tensor([1.0, 1.7])
    states = tuple(torch.stack([leaf * f for f in factors], dim=-1) for leaf in group.leaves)
    batch = tuple(torch.stack([w, w * 2, w * 0.5], dim=1) for w in group.weights)
    cotangents = tuple(torch.stack([c, -c, c * 3]) for c in group.cotangents)
    none = (None,) * len(group.weights)
    over_states = vmap(value_and_gradients, in_dims=(-1, None, *none))(states, group.cotangents, *group.weights)
    over_cotangents = vmap(value_and_gradients, in_dims=(None, 0, *none))(group.leaves, cotangents, *group.weights)
    ones = (1,) * len(group.weights)
    over_weights = vmap(value_and_gradients, in_dims=(None, 0, *ones))(group.leaves, cotangents, *batch)
    nested = vmap(vmap(value_and_gradients, in_dims=(-1, None, *none)), in_dims=(None, 0, *ones))(
        states, cotangents, *batch
    )
    for i in range(3):
        mine, weights = tuple(c[i] for c in cotangents), tuple(b.select(1, i) for b in batch)
        wanted = value_and_gradients(group.leaves, mine, *group.weights)
        assert all_equal([f[i] for f in over_cotangents], wanted)
        wanted = value_and_gradients(group.leaves, mine, *weights)
        assert all_equal([f[i] for f in over_weights], wanted)
        for j in range(2):
            wanted = value_and_gradients(tuple(s[..., j] for s in states), mine, *weights)
            assert all_equal([f[i, j] for f in nested], wanted)
    for j in range(2):
        wanted = value_and_gradients(tuple(s[..., j] for s in states), group.cotangents, *group.weights)
        assert all_equal([f[j] for f in over_states], wanted)


@one_of_each
def test_jacobians_agree(format):
    """Jacrev and jacfwd, which map the pullback and the pushforward, give the elementwise derivative."""
    weight = experts(1, (2, 128))[0]
    leaves = tuple(leaf for leaf in scales_of([weight], format) if leaf is not None)

    def fq(leaves):
        return fake_quantize([weight], leaves[0], (*leaves, None)[1], format=format, backward="lsq")[0]

    one = tuple(leaf[0] for leaf in leaves)
    wanted = elementwise(weight, *(*one, None)[:2], format)
    for jacobian in (jacrev(fq)(leaves), jacfwd(fq)(leaves)):
        for found, right in zip(jacobian, wanted, strict=False):
            total = found.reshape(2, 128, -1).sum(-1)  # each weight has one amax
            assert torch.allclose(total, right, rtol=1e-6, atol=1e-9)


@one_of_each
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_dtypes(format, group_of, dtypes):
    """Gradients of weights in their dtype, of the state in fp32; tangents in the dtype of the result."""
    dtype, out_dtype = dtypes
    group = group_of(format, dtype=dtype, out_dtype=out_dtype)
    outs, pullback = vjp(group.fq, group.leaves, *group.weights)
    assert all(out.dtype == out_dtype for out in outs)
    leaves, *found = pullback(group.cotangents)
    wanted_leaves, wanted = group.wanted()
    assert all_equal(leaves, wanted_leaves)
    assert all_equal(found, wanted)
    _, tangents = jvp(group.fq, (group.leaves, *group.weights), (group.leaf_tangents, *group.tangents))
    assert all(t.dtype == out_dtype for t in tangents)


def test_an_expert_that_the_loss_does_not_use():
    """Its weight has no gradient at all, its amax one of zero; an expanded cotangent is read right."""
    group = Group(INT8)
    leaves, weights = ([t.clone().requires_grad_() for t in of] for of in (group.leaves, group.weights))
    group.fq(leaves, *weights)[1].sum().backward()
    assert weights[0].grad is None
    assert weights[2].grad is None
    group.cotangents = tuple(torch.full_like(w, float(i == 1)) for i, w in enumerate(group.weights))
    wanted, _ = group.wanted()
    assert torch.equal(leaves[0].grad, wanted[0])
    assert leaves[0].grad[0] == leaves[0].grad[2] == 0


# --- `fakequant`.


def parameters(device="cpu", dtype=torch.float32):
    return {f"experts.{i}.weight": w for i, w in enumerate(experts(4, (24, 128), dtype, device=device))}


def transform_of(params, format, **options):
    return fqt.transform(fqt.select(params, {"*": format}), **{"backward": "lsq"} | options)


@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_a_state_is_a_primal(format):
    """The gradient of a state is a tree of its structure; closed over, only weights have gradients; MX is refused."""
    params = parameters()
    if format.is_stateless:
        message = message_of(ValueError, transform_of, params, format)
        assert_names(message, "backward 'lsq'", format.name, "state to learn")
        return
    fq = transform_of(params, format)
    state = fq.calibrate(params)

    def loss(state):
        return sum((w * torch.linspace(-1, 1, 128)).sum() for w in fq.fakequant(params, state).values())

    gradients = grad(loss)(state)
    assert gradients.keys() == state.keys()
    ((key, leaves),) = state.items()
    assert gradients[key].keys() == leaves.keys()
    for name, leaf in leaves.items():
        gradient = gradients[key][name]
        assert gradient.shape == leaf.shape
        assert gradient.dtype == torch.float32
        assert (gradient != 0).any()
    of_weights = [
        vjp(lambda p, fq=fq: fq.fakequant(p, state), params)[1](params)[0]
        for fq in (fq, transform_of(params, format, backward="clip"))
    ]
    assert all_equal(list(of_weights[0].values()), list(of_weights[1].values()))


def test_formats_with_and_without_a_state():
    """Beside a format with a state, an MX group passes its gradients through, and has none to learn."""
    params = {"a.weight": torch.randn(4, 64), "b.weight": torch.randn(4, 64)}
    fq = fqt.transform(fqt.select(params, {"a*": FP8, "b*": MXFP4}), backward="lsq")
    state = fq.calibrate(params)
    weights, pullback = vjp(fq.fakequant, params, state)
    of_params, of_state = pullback({name: torch.ones_like(w) for name, w in weights.items()})
    assert torch.equal(of_params["b.weight"], torch.ones(4, 64))
    assert of_state["b.weight"] == {}
    assert of_state["a.weight"]["amax"].shape == (1,)


def test_what_cannot_learn_says_so():
    """Stochastic rounding, layerwise, value_and_grad, an unknown rule: each names what it found and what to do."""
    params = parameters()
    fq = transform_of(params, INT8)
    state = fq.calibrate(params)
    message = message_of(ValueError, fq.fakequant, params, state, rounding=fqt.Stochastic(1))
    assert_names(message, "rounding", "lsq", "clip")
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="backward: found 'lsq'"), fqt.layerwise(fq, model, state):
        pass
    assert_names(message_of(ValueError, fqt.value_and_grad, lambda m, x: m(x).sum(), fq, model), "fq", "lsq", "vjp")
    assert_names(message_of(ValueError, fqt.transform, fq.spec, backward="ste"), "backward", "'ste'", "'lsq'")


@on_each_device
@one_of_each
def test_fullgraph(format, device):
    """torch.compile traces the whole step; values and gradients of weights and state are the eager ones."""
    torch.compiler.reset()
    params = parameters(device)
    fq = transform_of(params, format, out_dtype=torch.bfloat16)
    start = fqt.state.flatten(fq.calibrate(params))
    like = fq.init(params)
    is_lowered = device == "cuda" and format == NVFP4_STATIC
    compiled = torch.compile(fq.fakequant, fullgraph=True, backend="inductor" if is_lowered else "aot_eager")
    results = []
    for function in (compiled, fq.fakequant):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        flat = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
        weights = function(leaves, fqt.state.unflatten(flat, like))
        sum(w.float().square().sum() for w in weights.values()).backward()
        results.append([w.detach() for w in weights.values()] + [t.grad for t in (*leaves.values(), *flat.values())])
    assert all_equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("format", CORE, ids=name_of)
def test_no_call_waits_for_the_device(format):
    """Forward and backward under CUDA's sync debug mode, the first time too."""
    import warnings

    params = parameters("cuda", torch.bfloat16)
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    for group in state.values():
        for leaf in group.values():
            leaf.requires_grad_()
    with warnings.catch_warnings():  # PyTorch says that the mode is a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            sum(w.sum() for w in fq.fakequant(params, state).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.dist
def test_dtensors(ranks):
    """Experts over two ranks: gradients of weights and state are slices of the whole's; cut granules are refused."""
    ranks(gradients_are_slices, size=2)


def gradients_are_slices(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    weight, cotangent = torch.randn(4, 32, 64), torch.randn(4, 32, 64)
    plain = {"experts.w13": weight}

    def gradients(fq, params, cotangents):
        state = fq.calibrate(params)
        of_params, of_state = vjp(fq.fakequant, params, state)[1](cotangents)
        return {**of_params, **fqt.state.flatten(of_state)}

    def placed(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)

    for format in (INT8, INT4_BLOCK32, NVFP4_STATIC):
        fq = fqt.transform(fqt.select(plain, {"*": format}), backward="lsq")
        wanted = gradients(fq, plain, {"experts.w13": cotangent})
        for placement in (Replicate(), Shard(0)):
            sharded = {"experts.w13": placed(weight, placement)}
            found = gradients(fq, sharded, {"experts.w13": placed(cotangent, placement)})
            for name, right in wanted.items():
                assert found[name].placements == (placement,), name
                assert torch.equal(found[name].full_tensor(), right), (format, placement, name)
        sharded = {"experts.w13": placed(weight, Shard(1))}
        state = fq.calibrate(sharded)
        if format is INT4_BLOCK32:
            fq.fakequant(sharded, state)
        else:
            assert_names(message_of(ValueError, fq.fakequant, sharded, state), "amax", "lsq", "whole granules")


def test_tiles_do_not_change_what_is_owed():
    """Another tile adds in another order, within the bound; a weight counted twice or not at all would show."""
    weights = experts(2, (40, 256))
    amax, _ = scales_of(weights, INT8)
    grads = [torch.randn_like(w) for w in weights]
    small, large = (
        lsq_backward_triton(grads, weights, amax, None, format=INT8, transposed=False, tile=LSQ._replace(weights=n))[1]
        for n in (256, 4096)
    )
    assert torch.allclose(small, large, rtol=1e-4)
    again = lsq_backward_triton(grads, weights, amax, None, format=INT8, transposed=False)[1]
    once = lsq_backward_triton(grads, weights, amax, None, format=INT8, transposed=False)[1]
    assert same_bits(again, once), "no atomics: the same sum each time"
    assert math.isfinite(float(small.sum()))
