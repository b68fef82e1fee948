"""A new format is one constant: every verb and every store takes it, by the reference and by the kernels.

What a format cannot have, such as an amax that a method could choose, is refused by its name.
"""

import sys
from dataclasses import replace

import optree
import pytest
import torch
from safetensors import safe_open
from torch.func import grad

import fq_transforms as fqt
from fq_transforms.formats import E2M3, E3M2, FloatElement, Format, IntElement
from fq_transforms.methods import FourOverSix, Max, Mse, Percentile
from fq_transforms.rules import from_json, to_json
from tests import oracle
from tests.cases import assert_names, experts, message_of, name_of, same_bits
from tests.conftest import HAS_GPU
from tests.export.models import to_compressed_tensors, to_modelopt

# Elements of widths that no constant has: integers of 3 and 5 bits, floats of 2, 3, 5 and 7.
ODD = [
    Format("INT3_BLOCK64", IntElement(3, -4, 3), (1, 64)),
    Format("INT5_BLOCK64", IntElement(15, -16, 15), (1, 64), dequantize="divide"),
    Format("FP2_E1M0_BLOCK64", FloatElement(1, 0, 2.0), (1, 64)),
    Format("FP3_E2M0_BLOCK64", FloatElement(2, 0, 4.0), (1, 64)),
    Format("FP5_E2M2_BLOCK64", FloatElement(2, 2, 7.0), (1, 64)),
    Format("FP7_E3M3_BLOCK64", FloatElement(3, 3, 30.0), (1, 64)),
    Format("MXFP3_E1M1", FloatElement(1, 1, 3.0), (1, 32), scale="e8m0", dynamic=True),
    Format("MXFP5_E3M1", FloatElement(3, 1, 24.0), (1, 32), scale="e8m0", dynamic=True, exponent_rounding="floor"),
]
NEW = [
    Format("INT6_PER_CHANNEL", IntElement(31, -32, 31), (1, None)),
    Format("FP6_E2M3_BLOCK64", E2M3, (1, 64)),
    Format("FP6_E3M2_BLOCK64", E3M2, (1, 64)),
    Format("MXFP6_E2M3_BLOCK64", E2M3, (1, 64), scale="e8m0", dynamic=True),
    Format("MXFP6_E3M2_BLOCK64", E3M2, (1, 64), scale="e8m0", dynamic=True),
    replace(fqt.NVFP4, name="NVFP4_BLOCK32", block=(1, 32)),
    replace(fqt.NVFP4_STATIC, name="NVFP4_STATIC_BLOCK32", block=(1, 32)),
    *ODD,
]
# Packed: the dtype of a code as it is stored, how many bytes 192 codes take, and the scale's shape and dtype.
PACKED = {
    "INT6_PER_CHANNEL": (torch.int8, 192, (1,), torch.float32),
    "FP6_E2M3_BLOCK64": (torch.uint8, 144, (3,), torch.float32),
    "FP6_E3M2_BLOCK64": (torch.uint8, 144, (3,), torch.float32),
    "MXFP6_E2M3_BLOCK64": (torch.uint8, 144, (3,), torch.uint8),
    "MXFP6_E3M2_BLOCK64": (torch.uint8, 144, (3,), torch.uint8),
    "NVFP4_BLOCK32": (torch.uint8, 96, (6,), torch.float8_e4m3fn),
    "NVFP4_STATIC_BLOCK32": (torch.uint8, 96, (6,), torch.float8_e4m3fn),
    "INT3_BLOCK64": (torch.uint8, 96, (3,), torch.float32),
    "INT5_BLOCK64": (torch.int8, 192, (3,), torch.float32),
    "FP2_E1M0_BLOCK64": (torch.uint8, 96, (3,), torch.float32),
    "FP3_E2M0_BLOCK64": (torch.uint8, 96, (3,), torch.float32),
    "FP5_E2M2_BLOCK64": (torch.uint8, 144, (3,), torch.float32),
    "FP7_E3M3_BLOCK64": (torch.uint8, 192, (3,), torch.float32),
    "MXFP3_E1M1": (torch.uint8, 96, (6,), torch.uint8),
    "MXFP5_E3M1": (torch.uint8, 144, (6,), torch.uint8),
}
METHODS = [Max(), Percentile(90), Mse(), FourOverSix()]
KEY = "experts.*.w"
DEVICE = "cuda" if HAS_GPU else "cpu"
# On a GPU kernels are compiled. In the interpreter numpy warns of lanes that are selected away.
on_kernels = pytest.mark.gpu if HAS_GPU else pytest.mark.filterwarnings("ignore::RuntimeWarning")
every_format = pytest.mark.parametrize("format", NEW, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


def params_of(shape=(10, 192), dtype=torch.float32, count=3):
    return {f"experts.{e}.w": weight for e, weight in enumerate(experts(count, shape, dtype))}


def transform_of(format, params, **options):
    return fqt.transform(fqt.select(params, {"*": format}), **options)


def methods_of(format):
    """The methods that have something to choose: a static amax; and of two levels, for the last one."""
    if format.dynamic:
        return METHODS[:1]
    return METHODS if format.scale == "e4m3" else METHODS[:3]


def same(a, b):
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


@every_dtype
@every_format
def test_it_is_what_the_formulas_say(format, dtype):
    """Fake weights are the oracle's, bit for bit, under every method; what is no method of the format is refused."""
    params = params_of(dtype=dtype)
    for method in METHODS:
        if method not in methods_of(format):
            message = message_of(ValueError, transform_of, format, params, method=method)
            assert_names(message, type(method).__name__, format.name, KEY)
            continue
        fq = transform_of(format, params, method=method)
        state = fq.calibrate(params)
        fqt.state.check(state, fq.spec)
        leaves = (state[KEY].get(leaf) for leaf in ("amax", "global_amax"))
        wanted = oracle.fake_quantize_experts(torch.stack(list(params.values())), *leaves, format)
        found = torch.stack(list(fq.fakequant(params, state).values()))
        assert same_bits(found, oracle.round_once(wanted, dtype)), method
        assert same(fqt.merge(fq.init(params), state), state)


@every_format
def test_methods_lower_the_error(format):
    """Mse never has a larger error than Max, and FourOverSix with 448 has none either, for every expert."""
    params = params_of(dtype=torch.bfloat16)
    errors = []
    for method in (Max(), Mse(), FourOverSix(448)):
        if type(method) in map(type, methods_of(format)):
            fq = transform_of(format, params, method=method, out_dtype=torch.float32)
            fakes = fq.fakequant(params, fq.calibrate(params))
            errors.append(torch.stack([(fakes[n].double() - w.double()).square().sum() for n, w in params.items()]))
    assert all(bool((error <= errors[0]).all()) for error in errors)


@every_dtype
@every_format
def test_packed_weights_are_the_fake_ones(format, dtype):
    """unpack(pack(w)) == fakequant(w), in the bytes that the element takes."""
    params = params_of(dtype=dtype)
    fq = transform_of(format, params)
    state = fq.calibrate(params)
    packed = fq.pack(params, state)
    code, width, scale, scale_dtype = PACKED[format.name]
    assert (packed[KEY]["codes"].dtype, packed[KEY]["codes"].shape) == (code, (3, 10, width))
    assert (packed[KEY]["scale"].dtype, packed[KEY]["scale"].shape) == (scale_dtype, (3, 10, *scale))
    assert ("global_scale" in packed[KEY]) == (format.scale == "e4m3")
    assert same(fq.unpack(packed, dtype=dtype), fq.fakequant(params, state))


def test_an_element_wider_than_a_byte_has_no_codes():
    """It is fake-quantized as any other, and `pack` names what it cannot store."""
    params, wide = params_of(), Format("FP10_E5M4", FloatElement(5, 4, 63488.0), (1, 64))
    fq = transform_of(wide, params)
    state = fq.calibrate(params)
    wanted = oracle.fake_quantize_experts(torch.stack(list(params.values())), state[KEY]["amax"], None, wide)
    assert same_bits(torch.stack(list(fq.fakequant(params, state).values())), wanted)
    assert_names(message_of(ValueError, fq.pack, params, state), KEY, "FP10_E5M4", "10 bits, wanted codes of at most 8")


@every_format
def test_a_report_measures_it(format):
    """SQNR is that of the fake weights, by hand."""
    params = params_of()
    fq = transform_of(format, params)
    state = fq.calibrate(params)
    report = fq.report(params, state)
    assert format.name in str(report)
    for w, fake, sqnr in zip(
        params.values(), fq.fakequant(params, state).values(), report.groups[KEY].sqnr, strict=True
    ):
        noise = (w.double() - fake.double()).square().sum()
        torch.testing.assert_close(sqnr, 10 * (w.double().square().sum() / noise).log10())


@every_format
def test_gradients(format):
    """Clip stops at a static amax, dynamic formats pass all; lsq has a gradient for each number of the state."""
    params = params_of()
    clip = transform_of(format, params, backward="clip")
    state = optree.tree_map(lambda leaf: leaf / 2, clip.calibrate(params))
    gradients = grad(lambda p: sum(w.sum() for w in clip.fakequant(p, state).values()))(params)
    for expert, (name, weight) in enumerate(params.items()):
        wanted = torch.ones_like(weight)
        if format.clips:
            limits = state[KEY]["amax"][expert]
            wanted = (weight.abs() <= limits.repeat_interleave(weight.shape[1] // limits.shape[1], 1)).float()
            assert 0 < wanted.mean() < 1
        assert torch.equal(gradients[name], wanted)
    if format.is_stateless:
        assert_names(message_of(ValueError, transform_of, format, params, backward="lsq"), format.name)
        return
    lsq = replace(clip, backward="lsq")
    slopes = grad(lambda s: sum(w.square().sum() for w in lsq.fakequant(params, s).values()))(state)
    assert optree.tree_structure(slopes) == optree.tree_structure(state)
    assert all(leaf.isfinite().all() and leaf.any() for leaf in fqt.state.flatten(slopes).values())


@every_format
def test_stochastic_rounding_keeps_its_values(format):
    """What is a value of the format stays, whatever the seed; other weights do not all round as the nearest do."""
    params = params_of()
    fq = transform_of(format, params)
    state = fq.calibrate(params)
    fakes = fq.fakequant(params, state)
    by_chance = fq.fakequant(params, state, rounding=fqt.Stochastic(1))
    assert any(not torch.equal(by_chance[name], fake) for name, fake in fakes.items())
    if not format.dynamic:
        assert same(fq.fakequant(fakes, state, rounding=fqt.Stochastic(1)), fq.fakequant(fakes, state))


@every_format
def test_it_is_stored_with_all_of_its_numbers(format, tmp_path):
    """Checkpoints of states and of packed weights, one file, specs and rules give it back."""
    params = params_of()
    fq = transform_of(format, params)
    state = fq.calibrate(params)
    packed = fq.pack(params, state)
    for name, tree in (("state", state), ("packed", packed)):
        fqt.checkpoint.save(tmp_path / name, fq, tree)
        assert same(fqt.checkpoint.load(tmp_path / name, fq, like=tree), tree)
        assert fqt.checkpoint.read_spec(tmp_path / name) == fq.spec
    fqt.checkpoint.save_file(tmp_path / "state.safetensors", fq, state)
    assert same(fqt.checkpoint.load_file(tmp_path / "state.safetensors", fq), state)
    assert fqt.Spec.from_json(fq.spec.to_json()) == fq.spec
    (rule,) = from_json(to_json([fqt.Rule("*", format)]))
    assert rule.weights == format


def exported(format):
    """Names, weights and a config that a file of a model has, and the transform."""
    names = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": w for e, w in enumerate(experts(2, (64, 192)))}
    return names, transform_of(format, names), {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


# Integers of a range that a stored INT4 or INT8 has: engines multiply codes by scales, whatever codes occur.
NARROW = [format for format in NEW if format.name in ("INT6_PER_CHANNEL", "INT3_BLOCK64")]


@pytest.mark.parametrize("format", [format for format in NEW if format not in NARROW], ids=name_of)
def test_an_export_without_a_name_for_it_says_so(format, tmp_path):
    """Engines read what they know: refused before the first byte, by the format's name."""
    params, fq, config = exported(format)
    state = fq.calibrate(params)
    for export in (to_compressed_tensors, to_modelopt):
        message = message_of(ValueError, export, tmp_path / "out", fq, params, state, config=config)
        assert_names(message, format.name)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", NARROW, ids=name_of)
def test_integers_of_fewer_bits_are_exported_as_wider_ones(format, tmp_path):
    """A reader of INT8 or INT4 gets the fake weights of INT6 or INT3."""
    pytest.importorskip("compressed_tensors")
    params, fq, config = exported(format)
    state = fq.calibrate(params)
    fqt.export.save(tmp_path / "out", fq, params, state, config=config)
    fqt.export.folder(tmp_path / "out", tmp_path / "plain", layout="plain")
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in params}
    fakes = fq.fakequant(params, state)
    assert all(torch.equal(read[name].float(), fake.to(read[name].dtype).float()) for name, fake in fakes.items())


@pytest.fixture
def kernels(monkeypatch):
    """Where `fq` would take a reference on a CPU, it takes the kernels, in Triton's interpreter. Yields the calls."""
    calls = []
    for module in [module for name, module in sys.modules.items() if name.startswith("fq_transforms.")]:
        if hasattr(module, "has_kernel"):
            monkeypatch.setattr(module, "has_kernel", lambda _, name=module.__name__: calls.append(name) or True)
    return calls


def everything(fq, params):
    """What every operation makes, by name."""
    state = fq.calibrate(params)
    half = optree.tree_map(lambda leaf: leaf / 2, state)
    clip = replace(fq, backward="clip")
    found = {
        "state": state,
        "nearest": fq.fakequant(params, state),
        "stochastic": fq.fakequant(params, state, rounding=fqt.Stochastic(3)),
        "packed": fq.pack(params, state),
        "sqnr": fq.report(params, state).groups[KEY].sqnr,
        "clip": grad(lambda p: sum(w.sum() for w in clip.fakequant(p, half).values()))(params),
    }
    if state[KEY]:
        lsq = replace(fq, backward="lsq")
        found["lsq"] = grad(lambda s: sum(w.square().sum() for w in lsq.fakequant(params, s).values()))(half)
    return found


@on_kernels
@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *((format, torch.float32) for format in NEW),
        *((format, torch.bfloat16) for format in (NEW if HAS_GPU else [NEW[0], NEW[4]])),
    ],
    ids=name_of,
)
def test_the_kernels_take_it(format, dtype, request):
    """Every operation under every method is bit for bit the reference's; sums, whose order differs, to 2**-20.

    Results are fp32: the interpreter truncates to bf16 where a GPU rounds.
    """
    params = params_of((3, 64), dtype, count=2)
    transforms = [transform_of(format, params, method=m, out_dtype=torch.float32) for m in methods_of(format)]
    wanted = [everything(fq, params) for fq in transforms]
    calls = [] if HAS_GPU else request.getfixturevalue("kernels")
    params = {name: weight.to(DEVICE) for name, weight in params.items()}
    for fq, of_reference in zip(transforms, wanted, strict=True):
        found = optree.tree_map(torch.Tensor.cpu, everything(fq, params))
        for what in ("sqnr", "lsq"):
            pairs = zip(*(optree.tree_leaves(each.pop(what, {})) for each in (found, of_reference)), strict=True)
            assert all(bool(((a - b).abs() <= b.abs().max() * 2.0**-20).all()) for a, b in pairs), what
        assert [what for what in found if not same(found[what], of_reference[what])] == []
    if not HAS_GPU:
        assert {f"fq_transforms.{name}" for name in ("pack", "report.report", "ops.quantize.autograd")} <= set(calls)


WIDE = [
    replace(format, name=f"{format.name}_BLOCK{columns}", block=(1, columns))
    for format, columns in ((fqt.MXFP8, 128), (fqt.MXFP6_E3M2, 64), (fqt.MXFP4, 256), (fqt.NVFP4, 64), (fqt.NVFP4, 128))
]


@on_kernels
@pytest.mark.parametrize("transposed", [(), "*"], ids=["", "transposed"])
@pytest.mark.parametrize("format", WIDE, ids=name_of)
def test_a_dynamic_block_wider_than_a_strand_is_packed_whole(format, transposed, request):
    """Named bug: the kernel took the scale of each 32 weights for that of their block."""
    weights = torch.stack(experts(2, (3, 512)))
    params = {"experts.w": weights.mT.contiguous() if transposed else weights}
    fq = fqt.transform(fqt.select(params, {"*": format}, transposed=transposed))
    state = fq.calibrate(params)
    wanted = fq.pack(params, state)
    calls = ["a GPU"] if HAS_GPU else request.getfixturevalue("kernels")
    found = fq.pack(*optree.tree_map(lambda tensor: tensor.to(DEVICE), (params, state)))
    assert same(optree.tree_map(torch.Tensor.cpu, found), wanted)
    assert calls
