"""Stochastic rounding: two neighbours, the right mean, the same bits for the same place, kernel and reference alike."""

import pytest
import torch
import triton
import triton.language as tl
from torch.func import grad, jvp, vjp, vmap

import fq_transforms as fqt
from fq_transforms.formats import FP8, INT8, MXFP4, NVFP4_STATIC
from fq_transforms.ops.amax.autograd import expert_amax
from fq_transforms.ops.quantize.autograd import fake_quantize
from fq_transforms.ops.quantize.launch import STOCHASTIC, fake_quantize_triton
from fq_transforms.ops.quantize.reference import fake_quantize_reference, philox, random_words, stochastic_reference
from fq_transforms.rounding import Stream
from tests.cases import (
    AMAXES,
    CORE_FORMATS,
    DTYPES,
    ONE_OF_EACH_LEAF,
    adversarial,
    assert_names,
    experts,
    message_of,
    name_of,
    same_bits,
    shapes_of,
)
from tests.conftest import HAS_GPU
from tests.variants import CPU, by_kernel, on_each_kernel, stored, variants

on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_format = pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)

# numpy, inside the interpreter: 0 / 0 and NaN casts in lanes that are selected away.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Dynamo makes an instance of an autograd.Function when it traces one, and PyTorch warns that nobody should.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SEED = -0x123456789ABCDEF  # both halves of the key in use, and a sign


def seed_on(device, seed=SEED):
    return torch.full((), seed, dtype=torch.int64, device=device)


def scales_of(weights, format, factor=1.0):
    """State leaves of a group, static ones scaled so that some weights saturate."""
    if format.is_stateless:
        return None, None
    amax, global_amax = expert_amax(weights, format=format)
    return (amax * factor if format.clips else amax), global_amax


def by_reference(weights, amax, global_amax, seed, stream, format, out_dtype=torch.float32):
    """An expert at a time, by the words and the formula, without the group's code."""
    outs = []
    for i, w in enumerate(weights):
        number = torch.tensor([stream.first_expert + i], device=w.device)
        rows, columns = w.shape
        words = random_words(seed, number, stream.group, (stream.row, rows), (stream.column, columns))[0]
        a, g = (None if s is None else s[i] for s in (amax, global_amax))
        outs.append(stochastic_reference(w, a, g, words, format=format, out_dtype=out_dtype))
    return outs


def transform_of(params, format, **options):
    return fqt.transform(fqt.select(params, {"*": format}), **options)


def parameters(device="cpu", dtype=torch.float32):
    return {f"experts.{i}.weight": w for i, w in enumerate(experts(4, (24, 128), dtype, device=device))}


@triton.jit
def _philox_kernel(out_ptr, seed_ptr, counter_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    first, second = tl.load(counter_ptr + i), tl.load(counter_ptr + N + i)
    third, fourth = tl.load(counter_ptr + 2 * N + i), tl.load(counter_ptr + 3 * N + i)
    words = tl.philox(tl.load(seed_ptr), first, second, third, fourth)
    for word in tl.static_range(4):
        tl.store(out_ptr + word * N + i, words[word].to(tl.int32, bitcast=True))


# The known answers of Random123's philox4x32, ten rounds: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_is_the_published_one(counter, key, words):
    """Known answers of the generator's authors."""
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in found] == words


@on_each_device
def test_philox_is_tritons(device):
    """The reference's words are those that `tl.philox` gives a kernel, for random counters and keys."""
    generator = torch.Generator().manual_seed(1)
    counters = torch.randint(0, 2**32, (4, 64), generator=generator).to(device)
    for seed in (0, 1, -1, SEED, 2**63 - 1, -(2**63)):
        out = torch.empty((4, 64), dtype=torch.int32, device=device)
        as_int32 = counters.to(torch.int32)
        _philox_kernel[(1,)](out, seed_on(device, seed), as_int32, N=64)
        key = seed_on(device, seed)
        wanted = philox(tuple(counters), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
        assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, torch.stack(wanted)), seed


@on_each_kernel(variants(CORE_FORMATS), variants(CORE_FORMATS))
def test_kernel_equals_reference(format, dtype, transposed, device):
    """Bit for bit, in odd shapes, from any dtype of weight; where a shard begins between four columns too.

    On a GPU to the same dtype, and to bf16 from fp32 as well; the interpreter truncates what a GPU rounds.
    """
    is_wide = format in ONE_OF_EACH_LEAF and dtype == torch.float32 and not transposed
    out_dtypes = {torch.float32, torch.bfloat16} if is_wide else {dtype}
    for shape in shapes_of(format) if is_wide else shapes_of(format)[-1:]:
        weights = experts(3, shape, dtype, device=device)
        amax, global_amax = scales_of(weights, format, 0.6)
        for column in (0, 32) if format.has_blocks_along_in else (0, 3):
            stream = Stream(group=77, first_expert=5, row=9, column=column)
            for out_dtype in out_dtypes if device == "cuda" else {torch.float32}:
                operands = (stored(weights, transposed), amax, global_amax, seed_on(device))
                numbers = {"stream": stream, "format": format, "transposed": transposed, "out_dtype": out_dtype}
                outs = by_kernel(*operands, **numbers)
                wanted = by_reference(weights, amax, global_amax, seed_on(device), stream, format, out_dtype)
                for expert, (out, right) in enumerate(zip(outs, wanted, strict=True)):
                    assert same_bits(out.mT if transposed else out, right), (shape, column, out_dtype, expert)


@on_each_device
def test_separate_results(device):
    """The same bits in tensors of their own."""
    weights = experts(3, (4, 64), device=device)
    amax, _ = scales_of(weights, INT8)
    numbers = {"stream": Stream(1), "format": INT8, "transposed": False, "out_dtype": torch.float32}
    wanted = by_kernel(weights, amax, None, seed_on(device), **numbers)
    del numbers["out_dtype"]
    outs = [torch.empty_like(weight) for weight in weights]
    fake_quantize_triton(outs, weights, amax, None, seed_on(device), **numbers)
    assert same_bits(torch.stack(outs), wanted)


@on_each_device
@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_adversarial_values(format, device):
    """Ties, subnormals, the largest floats, infinities and zeros, under amax from tiny to huge and invalid."""
    columns = 256
    special = [0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 2.0**-127, 1.5 * 2.0**-126, 3.3e38, -3.3e38, 1e-30, 0.3, -0.3]
    row = torch.cat([torch.arange(-32, 32) / 8, torch.tensor(special), torch.linspace(-7, 7, columns - 64 - 12)])
    exponents = torch.tensor([-149, -140, -126, -40, -24, -9, 0, 7, 60, 120]).double()
    weight = (row.double() * 2.0 ** exponents[:, None]).clamp(-3.3e38, 3.3e38).float()
    weight = torch.cat([weight, weight[-3:]])
    weight[-1, 0], weight[-2, 40], weight[-3, 3] = torch.inf, -torch.inf, torch.nan
    amaxes = [0.0, 1e-45, 2.0**-25, 2.0**-24, 2.0**-23, 1.0, 448.0, 3.3e38, torch.nan, torch.inf, -1.0]
    weights = [weight.to(device)] * len(amaxes)
    scales = torch.tensor(amaxes, device=device)
    amax = global_amax = None
    if format.clips:
        shape = format.amax_shape(*weight.shape)
        amax = scales.reshape(-1, *(1,) * len(shape)).expand(len(amaxes), *shape).clone()
        global_amax = scales.flip(0).clone() if format.scale == "e4m3" else None
    elif not format.is_stateless:
        amax = scales
    stream, seed = Stream(3), seed_on(device)
    numbers = {"stream": stream, "format": format, "transposed": False, "out_dtype": torch.float32}
    outs = by_kernel(weights, amax, global_amax, seed, **numbers)
    wanted = by_reference(weights, amax, global_amax, seed, stream, format)
    for expert, (out, right) in enumerate(zip(outs, wanted, strict=True)):
        assert same_bits(out, right), amaxes[expert]
        a, g = (None if s is None else s[expert] for s in (amax, global_amax))
        nearest = fake_quantize_reference(weights[0], a, g, format=format, out_dtype=torch.float32)
        assert torch.equal(out.isnan(), nearest.isnan()), "a NaN is where it is without chance, and nowhere else"
        assert torch.equal(out.signbit() | out.isnan(), nearest.signbit() | out.isnan()), "signs of zeros too"


@on_each_device
@pytest.mark.parametrize("format", [format for format in CORE_FORMATS if format.scale != "e8m0"], ids=name_of)
def test_ties_and_their_neighbours(format, device):
    """Each half step of every amax, with both fp32 neighbours: where one bit decides."""
    columns = format.block[1] or 128
    amaxes = torch.tensor([a for a in AMAXES if 1e-4 < a < 1e30])
    steps = format.element.qmax if hasattr(format.element, "qmax") else format.element.max
    weight = adversarial(amaxes, steps, torch.float32, max(columns, 64))
    weights = [row[None].repeat(2, 1).to(device) for row in weight]
    amax, global_amax = scales_of(weights, format)
    stream, seed = Stream(5), seed_on(device)
    numbers = {"stream": stream, "format": format, "transposed": False, "out_dtype": torch.float32}
    outs = by_kernel(weights, amax, global_amax, seed, **numbers)
    for out, right in zip(outs, by_reference(weights, amax, global_amax, seed, stream, format), strict=True):
        assert same_bits(out, right)


@every_format
def test_mean_and_variance(format):
    """Each weight becomes one of its two neighbours, with the mean of the weight and the variance p (1 - p) step**2.

    The mean of n draws lies within five of its standard deviations, which the count gives; correlated draws, between
    rows, columns, experts or seeds, would not.
    """
    block = format.block[1] or 1
    count, top = 128 * 256, 6.0
    targets = torch.tensor([0.013, 0.2, 0.5, 0.77, 1.0, 1.31, 2.05, 3.9, 4.6, 5.37, -0.4, -2.7, -5.9])
    weight = targets[:, None].repeat(1, count)
    fixed = torch.zeros(count, dtype=torch.bool)
    fixed[:: max(block, 16)] = True  # each block has its amax, so that its scale is known
    weight[:, fixed] = top
    amax, global_amax = scales_of([weight], format)
    operands = ([weight], amax, global_amax)
    (out,) = fake_quantize(*operands, seed=seed_on("cpu"), stream=Stream(1), format=format)
    (nearest,) = fake_quantize(*operands, format=format)
    if format.block != (128, 128):
        assert torch.equal(out[:, fixed], nearest[:, fixed]), "the amax is a value of the format, or saturates"
    ups = []
    for row, x in enumerate(targets.double()):
        found = out[row, ~fixed].double()
        values = found.unique()
        assert len(values) <= 2
        assert nearest[row, ~fixed][0].double() in values, "the nearest value is one of the two"
        low, high = values[0], values[-1]
        assert low - 1e-6 <= x <= high + 1e-6
        step = high - low
        if step == 0:
            continue
        p = ((x - low) / step).clamp(0, 1)
        n = len(found)
        deviation = (p * (1 - p) / n).sqrt() * step
        assert abs(found.mean() - x) <= 5 * deviation + 1e-6 * x.abs(), f"{x}: mean {found.mean()}, {low} or {high}"
        # Of the variance of n draws of two values, the standard deviation is abs(1 - 2 p) times that of the mean.
        variance = p * (1 - p) * step**2
        assert abs(found.var() - variance) <= 5 * deviation * step * (abs(1 - 2 * p) + 3 / n**0.5) + 1e-5 * variance
        ups.append(((found == high).double() - p) / (p * (1 - p)).sqrt())
    draws = torch.stack(ups)
    n = draws.shape[1]
    for shift in (1, 2, 3, 4, 16, 128):
        between_columns = (draws[:, shift:] * draws[:, :-shift]).sum() / (len(draws) * (n - shift)) ** 0.5
        assert abs(between_columns) < 5, f"columns {shift} apart are correlated"
    between_rows = (draws[1:] * draws[:-1]).sum() / ((len(draws) - 1) * n) ** 0.5
    assert abs(between_rows) < 5


def test_other_seeds_experts_and_groups_draw_independently():
    """Two draws of the same weight agree as often as independent ones do, p**2 + (1 - p)**2."""
    weight, amax = torch.full((16, 1024), 0.3), torch.tensor([127.0])

    def ups(seed=0, **places):
        (out,) = fake_quantize([weight], amax, None, seed=seed_on("cpu", seed), stream=Stream(**places), format=INT8)
        assert set(out.unique().tolist()) == {0.0, 1.0}
        return out == 1.0

    first = ups(group=1)
    others = [
        ups(seed, group=group, first_expert=expert)
        for seed, group, expert in [(1, 1, 0), (2**32, 1, 0), (-1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 0, 1)]
    ]
    others.append(ups(group=1, row=16))
    others.append(ups(group=1, column=1024))
    wanted, n = 0.3**2 + 0.7**2, weight.numel()
    for other in others:
        assert abs((first == other).double().mean() - wanted) < 5 * (wanted * (1 - wanted) / n) ** 0.5
    assert torch.equal(first, ups(group=1)), "the same place and seed: the same bits"


@on_each_device
@pytest.mark.parametrize("format", ONE_OF_EACH_LEAF, ids=name_of)
def test_bits_belong_to_places(format, device):
    """No tile, no storage, no stacking, no subset of experts, and no shard changes a weight's bits."""
    weights = experts(3, (6, 256), device=device)
    amax, global_amax = scales_of(weights, format)
    stream, seed = Stream(9, first_expert=2), seed_on(device)
    numbers = {"format": format, "out_dtype": torch.float32}
    whole = by_kernel(weights, amax, global_amax, seed, stream=stream, transposed=False, **numbers)

    def run(weights, amax, global_amax, stream, transposed=False, tile=STOCHASTIC):
        return by_kernel(weights, amax, global_amax, seed, stream=stream, transposed=transposed, tile=tile, **numbers)

    small = run(weights, amax, global_amax, stream, tile=STOCHASTIC._replace(weights=512))
    assert same_bits(small, whole)
    turned = run(stored(weights, True), amax, global_amax, stream, transposed=True)
    assert same_bits(turned.mT.contiguous(), whole)
    stacked = run([torch.stack(weights)], amax, global_amax, stream)
    assert same_bits(stacked.view_as(whole), whole)
    last = [None if s is None else s[2:] for s in (amax, global_amax)]
    alone = run(weights[2:], *last, Stream(9, first_expert=4))
    assert same_bits(alone[0], whole[2])
    if format.block[0] == 128:
        return  # cut below, a square block has other neighbours but the same amax: no shard
    for (row, rows), (column, columns) in [((2, 3), (128, 128)), ((4, 2), (0, 128))]:
        part = [w[row : row + rows, column : column + columns].contiguous() for w in weights]
        cut, cut_global = amax, global_amax
        if amax is not None and amax.dim() == 3:
            cut = amax[:, row : row + rows]
            if amax.shape[2] > 1:
                block = format.block[1]
                cut = cut[..., column // block : (column + columns) // block]
        found = run(part, cut, cut_global, Stream(9, first_expert=2, row=row, column=column))
        assert same_bits(found, whole[:, row : row + rows, column : column + columns].contiguous())


@every_format
def test_values_of_the_format_are_never_moved(format):
    """What nearest rounding made stays, under every seed: x * s is a few ulps from the integer that it was."""
    weights = experts(7, (4, 256))
    amax, global_amax = scales_of(weights, format, 0.83)
    values = fake_quantize(weights, amax, global_amax, format=format)
    again = fake_quantize(values, amax, global_amax, format=format)
    assert all(map(torch.equal, again, values))
    for seed in range(20):
        outs = fake_quantize(values, amax, global_amax, seed=seed_on("cpu", seed), stream=Stream(seed), format=format)
        assert all(map(same_bits, outs, values))


def test_values_of_integers_under_many_scales():
    """Every integer under 4,096 amax: the scale's rounding would move one in 10**5 but for the rule of 2**-22."""
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(2)) * 10 + 1e-3
    q = torch.arange(-128, 128).float().repeat(4096, 1)
    s = torch.full_like(amax, 127.0) / amax
    values = (q / s[:, None]).unsqueeze(1)
    for seed in range(4):
        (out,) = fake_quantize([values], amax, None, seed=seed_on("cpu", seed), stream=Stream(0), format=INT8)
        assert torch.equal(out, values)


@pytest.mark.parametrize("format", [f for f in CORE_FORMATS if f.clips], ids=name_of)
def test_what_was_rounded_by_chance_can_be_packed(format):
    """unpack(pack(y)) == y for y = fakequant(w, rounding=...) in fp32: codes exist for whatever chance made."""
    params = parameters()
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    rounded = fq.fakequant(params, state, rounding=fqt.Stochastic(3))
    back = fq.unpack(fq.pack(rounded, state), dtype=torch.float32)
    for name, weight in rounded.items():
        assert torch.equal(back[name], weight), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_format
def test_fakequant_is_reproducible(format, dtype):
    """Same seed, same result; an int is the tensor of it; another seed differs; no input is written to."""
    params = parameters(dtype=dtype)
    fq = transform_of(params, format)
    state = fq.calibrate(params)
    versions = {name: p._version for name, p in params.items()}
    first, again, as_tensor, other = (
        fq.fakequant(params, state, rounding=fqt.Stochastic(seed)) for seed in (5, 5, torch.tensor(5), 6)
    )
    assert {name: p._version for name, p in params.items()} == versions
    for name, weight in first.items():
        assert weight.dtype == dtype
        assert same_bits(weight, again[name])
        assert same_bits(weight, as_tensor[name])
        assert not torch.equal(weight, other[name])
    key = "experts.*.weight"
    amax, global_amax = state[key].get("amax"), state[key].get("global_amax")
    (group,) = (group.number for group in fq.spec.groups)
    wanted = by_reference(list(params.values()), amax, global_amax, torch.tensor(5), Stream(group), format, dtype)
    assert all(map(same_bits, first.values(), wanted))


def test_a_rank_with_some_of_the_experts():
    """`first_expert` gives a rank's own experts the bits that they have in the whole; dense weights keep theirs."""
    params = parameters() | {"router.weight": torch.randn(8, 128)}
    whole_fq = transform_of(params, FP8)
    state = whole_fq.calibrate(params)
    whole = whole_fq.fakequant(params, state, rounding=fqt.Stochastic(1))
    here = {f"experts.{i}.weight": params[f"experts.{i + 2}.weight"] for i in range(2)}
    here["router.weight"] = params["router.weight"]
    fq = transform_of(here, FP8)
    found = fq.fakequant(here, fq.calibrate(here), rounding=fqt.Stochastic(1, first_expert=2))
    for i in range(2):
        assert torch.equal(found[f"experts.{i}.weight"], whole[f"experts.{i + 2}.weight"])
    assert torch.equal(found["router.weight"], whole["router.weight"])


@pytest.fixture(params=["separate", "stacked, transposed"])
def group(request):
    stacked = request.param != "separate"

    def make(format):
        weights = stored(experts(3, (3, 128)), stacked)
        amax, global_amax = scales_of(experts(3, (3, 128)), format, 0.7)
        weights = (torch.stack(weights),) if stacked else tuple(weights)
        return weights, amax, global_amax, {"format": format, "transposed": stacked, "stream": Stream(4, 1)}

    return make


@pytest.mark.parametrize("backward", ["pass_through", "clip"])
@pytest.mark.parametrize("format", ONE_OF_EACH_LEAF, ids=name_of)
def test_gradients_do_not_see_the_rounding(format, backward, group):
    """backward(), grad, vjp twice, jvp and the second derivative are those of rounding to the nearest."""
    weights, amax, global_amax, options = group(format)
    cotangents = tuple(torch.randn_like(w) for w in weights)
    nearest = {name: value for name, value in options.items() if name != "stream"}

    def fq(*w):
        return fake_quantize(w, amax, global_amax, seed=torch.tensor(3), **options, backward=backward)

    wanted = vjp(lambda *w: fake_quantize(w, amax, global_amax, **nearest, backward=backward), *weights)[1](cotangents)
    outs, pullback = vjp(fq, *weights)
    assert all(map(torch.equal, outs, fq(*weights)))
    assert all(map(torch.equal, pullback(cotangents), wanted))
    assert all(map(torch.equal, pullback(cotangents), wanted))
    leaves = [w.clone().requires_grad_() for w in weights]
    torch.autograd.backward(fq(*leaves), cotangents)
    assert all(torch.equal(leaf.grad, right) for leaf, right in zip(leaves, wanted, strict=True))
    places = tuple(range(len(weights)))
    found = grad(lambda *w: sum((y * c).sum() for y, c in zip(fq(*w), cotangents, strict=True)), places)(*weights)
    assert all(map(torch.equal, found, wanted))
    primals, tangents = jvp(fq, weights, cotangents)
    assert all(map(torch.equal, primals, outs))
    assert all(map(torch.equal, tangents, wanted))
    first = torch.autograd.grad(sum((y**2).sum() for y in fq(*leaves)) / 2, leaves, create_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(first, leaves, grad_outputs=cotangents), wanted))


@pytest.mark.parametrize("format", ONE_OF_EACH_LEAF, ids=name_of)
def test_vmap_over_weights_states_and_seeds(format, group):
    """Each equals a loop, alone and nested: the same bits in each element of a batch, but for mapped seeds."""
    weights, amax, global_amax, options = group(format)

    def fq(seed, factor, *w):
        a = amax if amax is None else amax * factor
        return fake_quantize(w, a, global_amax, seed=seed, **options)

    seeds, factors = torch.tensor([3, -4]), torch.tensor([1.0, 1.7, 0.9])
    batch = tuple(torch.stack([w, w * 2, w * 0.5], dim=1) for w in weights)
    unmapped = (None,) * len(weights)
    over_weights = vmap(fq, in_dims=(None, None, *(1,) * len(weights)))(seeds[0], factors[0], *batch)
    over_seeds = vmap(fq, in_dims=(0, None, *unmapped))(seeds, factors[1], *weights)
    nested = vmap(vmap(fq, in_dims=(None, 0, *unmapped)), in_dims=(0, None, *unmapped))(seeds, factors, *weights)
    inside = vmap(vmap(fq, in_dims=(0, None, *unmapped)), in_dims=(None, 0, *(1,) * len(weights)))
    seeds_inside = inside(seeds, factors, *batch)
    for i, factor in enumerate(factors):
        wanted = fq(seeds[0], factors[0], *(b.select(1, i) for b in batch))
        assert all(torch.equal(out[i], right) for out, right in zip(over_weights, wanted, strict=True))
        for j, seed in enumerate(seeds):
            wanted = fq(seed, factor, *weights)
            assert all(torch.equal(out[j, i], right) for out, right in zip(nested, wanted, strict=True))
            wanted = fq(seed, factor, *(b.select(1, i) for b in batch))
            assert all(torch.equal(out[i, j], right) for out, right in zip(seeds_inside, wanted, strict=True))
    for j, seed in enumerate(seeds):
        assert all(
            torch.equal(out[j], right) for out, right in zip(over_seeds, fq(seed, factors[1], *weights), strict=True)
        )


@on_each_device
def test_kernel_under_mapped_dimensions(device):
    """Copies in front of each tensor, with one seed and with one an expert, as `vmap` folds them."""
    weights = [torch.stack(experts(2, (3, 64), seed=s, device=device)).repeat(3, 1, 1, 1) for s in range(2)]
    amax = torch.cat([w.flatten(0, 1).abs().amax((-2, -1)) for w in weights])
    stream = Stream(6, first_expert=1, experts=2, copies=3)
    seeds = torch.arange(12, device=device)
    numbers = {"stream": stream, "format": INT8, "transposed": False, "out_dtype": torch.float32}
    for seed in (seed_on(device), seeds):
        outs = by_kernel(weights, amax, None, seed, **numbers)
        for place, out in enumerate(outs):
            tensor, copy, own = place // 6, place % 6 // 2, place % 2
            one = Stream(6, first_expert=1 + 2 * tensor + own)
            of = seed if seed.dim() == 0 else seed[place]
            wanted = by_reference([weights[tensor][copy, own]], amax[place : place + 1], None, of, one, INT8)
            assert same_bits(out, wanted[0]), place


@pytest.mark.dist
def test_a_dtensors_shards_round_as_the_whole(ranks):
    """Experts over two ranks, then `out`, then `in`: each shard has the bits of its place in the whole."""
    ranks(shards_round_as_the_whole, size=2)


def shards_round_as_the_whole(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    for transposed in (False, True):
        weight = torch.randn(4, 32, 64)
        plain = {"experts.w13": weight}
        for format in (INT8, NVFP4_STATIC):
            spec = fqt.select(plain, {"*": format}, transposed="*" if transposed else ())
            fq = fqt.transform(spec)
            whole = fq.fakequant(plain, fq.calibrate(plain), rounding=fqt.Stochastic(2))["experts.w13"]
            for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
                params = {"experts.w13": distribute_tensor(weight, mesh, [placement], src_data_rank=None)}
                found = fq.fakequant(params, fq.calibrate(params), rounding=fqt.Stochastic(2))
                assert torch.equal(found["experts.w13"].full_tensor(), whole), (transposed, format, placement)


@pytest.mark.parametrize(
    ("rounding", "fragments"),
    [
        (3, ("rounding", "found int", "fqt.Stochastic")),
        (fqt.Stochastic(1.5), ("seed", "1.5", "int")),
        (fqt.Stochastic(True), ("seed", "True")),
        (fqt.Stochastic(2**63), ("seed", str(2**63))),
        (fqt.Stochastic(torch.tensor(1.0)), ("seed", "torch.float32", "int64")),
        (fqt.Stochastic(torch.tensor([1])), ("seed", "(1,)", "no dimensions")),
        (fqt.Stochastic(torch.tensor(1, device="meta")), ("seed", "meta", "cpu")),
        (fqt.Stochastic(1, first_expert=-1), ("first_expert", "-1", ">= 0")),
    ],
    ids=str,
)
def test_bad_seeds_are_named(rounding, fragments):
    """What is no seed is refused, with what was found and what is wanted."""
    params = parameters()
    fq = transform_of(params, INT8)
    state = fq.calibrate(params)
    assert_names(message_of(ValueError, fq.fakequant, params, state, rounding=rounding), *fragments)


@on_each_device
@pytest.mark.parametrize("format", ONE_OF_EACH_LEAF if HAS_GPU else [FP8, NVFP4_STATIC, MXFP4], ids=name_of)
def test_fullgraph_with_a_seed_that_changes(format, device):
    """One graph for all seeds, if the seed is a tensor: values and gradients are the eager ones; once by inductor."""
    torch.compiler.reset()
    params = parameters(device)
    fq = transform_of(params, format, backward="clip")
    state = fq.calibrate(params)
    traced = []

    def backend(module, inputs):
        traced.append(module)
        return module

    is_lowered = device == "cuda" and format == NVFP4_STATIC
    compiled = torch.compile(fq.fakequant, fullgraph=True, backend="inductor" if is_lowered else backend)
    for seed in (1, 2**40, -7):
        results = []
        for function in (compiled, fq.fakequant):
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            weights = function(leaves, state, rounding=fqt.Stochastic(seed_on(device, seed)))
            sum(w.square().sum() for w in weights.values()).backward()
            results.append((weights, {name: leaf.grad for name, leaf in leaves.items()}))
        for found, wanted in zip(*results, strict=True):
            for name in wanted:
                assert torch.equal(found[name], wanted[name]), name
    assert len(traced) == (0 if is_lowered else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("format", [FP8, NVFP4_STATIC], ids=name_of)
def test_a_cuda_graph_reads_the_seed_anew(format):
    """Captured once; replays round by what the seed holds then."""
    params = parameters("cuda", torch.bfloat16)
    fq = transform_of(params, format)
    state, seed = fq.calibrate(params), seed_on("cuda", 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        fq.fakequant(params, state, rounding=fqt.Stochastic(seed))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        captured = fq.fakequant(params, state, rounding=fqt.Stochastic(seed))
    for value in (11, 12):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        wanted = fq.fakequant(params, state, rounding=fqt.Stochastic(value))
        for name, weight in wanted.items():
            assert torch.equal(captured[name], weight), name


def test_a_step_of_training_rounds_by_its_number():
    """A step of `value_and_grad` takes its rounding: losses are of the rounded weights."""
    model = torch.nn.Linear(64, 3, bias=False)
    params = dict(model.named_parameters())
    fq = transform_of(params, INT8)
    state, x = fq.calibrate(params), torch.randn(2, 64)
    losses = []
    for step in range(3):
        rounding = fqt.Stochastic(step)
        loss, grads = fqt.value_and_grad(lambda m, x: m(x).sum(), fq, model)(params, state, [x], rounding=rounding)
        weight = fq.fakequant(params, state, rounding=rounding)["weight"]
        assert torch.equal(loss[0], (x @ weight.detach().mT).sum())
        assert torch.allclose(grads["weight"], x.sum(0).expand(3, 64))
        losses.append(float(loss[0]))
    assert len(set(losses)) == 3


def test_along_the_amax_there_is_no_tangent():
    """As backward gives it none."""
    weight, amax = torch.randn(2, 8), torch.tensor([1.0])
    out, tangent = jvp(
        lambda a: fake_quantize([weight], a, None, seed=torch.tensor(1), stream=Stream(0), format=INT8)[0],
        (amax,),
        (torch.ones(1),),
    )
    assert out.shape == weight.shape
    assert torch.equal(tangent, torch.zeros_like(weight))
