"""ModelOpt 0.47's `local_hessian` beside `Mse` with block-diagonal statistics, on a CPU, on the same second moments.

Errors are d^T H d of each block in float64, with ModelOpt's own H: means over tokens of x x^T, in fp32.

NOTE block sizes: ModelOpt's H has blocks of 16 unless it is told otherwise; here they are the format's. It takes one H
for each quantizer, so experts that share a quantizer share an H; here each has its own.
"""

from types import SimpleNamespace

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.formats import FORMATS, NVFP4_STATIC
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.reference import expert_amax_reference
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from fq_transforms.ops.sweep.reference import margin_of
from tests.cases import experts, name_of

TOKENS = 48
KINDS = ["independent", "mixed", "alike", "few"]


@pytest.fixture(scope="module")
def modelopt():
    quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    calib = pytest.importorskip("modelopt.torch.quantization.calib.mse")
    model_calib = pytest.importorskip("modelopt.torch.quantization.model_calib")
    return SimpleNamespace(
        quantize=quant.fake_tensor_quant,
        Mse=calib.MseCalibrator,
        Scales=calib.NVFP4MSECalibrator,
        Accumulator=model_calib._LocalHessianAccumulator,
    )


def inputs(kind, columns, seed):
    """Tokens [TOKENS, columns]: independent channels, mixed ones, all alike but for noise, fewer than a block has."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "alike":
        return torch.randn(TOKENS, 1, generator=generator) + 0.01 * torch.randn(TOKENS, columns, generator=generator)
    x = torch.randn(3 if kind == "few" else TOKENS, columns, generator=generator)
    return x if kind == "independent" else x @ torch.randn(columns, columns, generator=generator)


def chosen_by_us(weight, moments, format, method):
    params = {"experts.0.weight": weight}
    fq = fqt.transform(fqt.select(params, {"*": format}), method=method)
    return fq.calibrate(params, statistics={"experts.*.weight": moments[None]})["experts.*.weight"]["amax"][0]


def errors_and_doubts(weight, amax, global_amax, format, moments):
    """d^T H d of each block in float64, and how far two fp32 sums of it may be off (see NOTE margin of a form)."""
    columns, moments = format.block[1], moments.double()
    y = fake_quantize_reference(weight, amax, global_amax, format=format, out_dtype=torch.float32)
    d = (weight.double() - y.double()).unflatten(-1, (-1, columns))
    errors = torch.einsum("obi,bij,obj->ob", d, moments, d)
    return errors, 2 * margin_of(columns) * torch.einsum("obi,bij->ob", d * d, moments.abs())


def assert_not_above(weight, ours, theirs, global_amax, format, moments):
    """No block's error is above that of ModelOpt's choice, but for what fp32 cannot tell apart; and few are equal."""
    initial, _ = expert_amax_reference(weight, format=format)
    found, _ = errors_and_doubts(weight, ours, global_amax, format, moments)
    wanted, doubt = errors_and_doubts(weight, theirs, global_amax, format, moments)
    by_max, doubt_of_max = errors_and_doubts(weight, initial, global_amax, format, moments)
    assert (found <= wanted + doubt + doubt_of_max).all()
    assert (found <= by_max).all()
    assert found.sum() < by_max.sum()
    return found, wanted


@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_scales_are_not_worse_than_modelopts(modelopt, kind):
    """Law: of all E4M3 scales, ours has the least error, ModelOpt's among them; in sum it is not above."""
    weight = experts(2, (32, 128), torch.bfloat16, seed=4)[1].float()
    accumulator = modelopt.Accumulator(*weight.shape, 16)
    accumulator.accumulate(inputs(kind, 128, 0))
    moments = accumulator.normalized_hessian().clone()
    amax, global_amax = expert_amax_reference(weight, format=NVFP4_STATIC)

    def quantize(x, tried):
        return fake_quantize_reference(
            x.view(weight.shape), tried.view(amax.shape), global_amax, format=NVFP4_STATIC, out_dtype=torch.float32
        ).view(x.shape)

    theirs = modelopt.Scales(
        amax.flatten(), global_amax, axis=0, quant_func=quantize, error_func=accumulator.build_error_func()
    )
    theirs.collect(weight.view(-1, 16))
    by_modelopt = theirs.compute_amax().view(amax.shape)
    ours = chosen_by_us(weight, moments, NVFP4_STATIC, Mse())
    found, wanted = assert_not_above(weight, ours, by_modelopt, global_amax, NVFP4_STATIC, moments)
    assert found.sum() <= wanted.sum() * (1 + 2.0**-12)
    assert (found == wanted).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [FORMATS["INT4_BLOCK32"], FORMATS["INT4_BLOCK128"]], ids=name_of)
def test_int4_blocks_are_not_worse_than_modelopts(modelopt, format, kind):
    """Law: of the same ratios, ours has the least error; ModelOpt's sweep may lack max itself, ours has it."""
    columns, numbers = format.block[1], (0.25, 4.0, 0.1)
    weight = experts(2, (16, 256), torch.bfloat16, seed=4)[1].float()
    accumulator = modelopt.Accumulator(*weight.shape, columns)
    accumulator.accumulate(inputs(kind, 256, 0))
    moments = accumulator.normalized_hessian().clone()
    amax, _ = expert_amax_reference(weight, format=format)

    def quantize(x, tried):
        return modelopt.quantize(x, tried, None, 4, False, False)

    start, stop, step = numbers
    theirs = modelopt.Mse(
        amax.reshape(-1, 1), 0, step, start, stop, quant_func=quantize, error_func=accumulator.build_error_func()
    )
    theirs.collect(weight.view(-1, columns))
    by_modelopt = theirs.compute_amax().view(amax.shape)
    ours = chosen_by_us(weight, moments, format, Mse(*numbers))
    assert_not_above(weight, ours, by_modelopt, None, format, moments)


@pytest.mark.filterwarnings("ignore:GPTModel.sharded_state_dict:UserWarning")  # of Megatron, which is not used here
def test_a_model_that_modelopt_calibrates_itself(modelopt):
    """`mtq.quantize` with algorithm local_hessian, INT4 in blocks: its H is ours, and its amax is not better."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    format, numbers = FORMATS["INT4_BLOCK32"], (0.25, 4.0, 0.1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False), torch.nn.ReLU(), torch.nn.Linear(48, 32))
    weight, x = model[0].weight.detach().clone(), inputs("mixed", 64, 1)
    params = {"0.weight": weight}
    fq = fqt.transform(fqt.select(params, {"*": format}), method=Mse(*numbers))
    first = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    statistics = fq.input_second_moments(params, x, model=first, blocks=True)
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*0.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}, "enable": True},
        ],
        "algorithm": {
            "method": "local_hessian",
            "fp8_scale_sweep": False,
            "block_size": 32,
            "start_multiplier": numbers[0],
            "stop_multiplier": numbers[1],
            "step_size": numbers[2],
            "debug": True,
        },
    }
    mtq.quantize(model, config, forward_loop=lambda model: model(x))
    (accumulator,) = model._local_hessian_accumulators.values()
    theirs = accumulator.hessian_per_block / accumulator.num_samples
    moments = statistics["0.weight"][0]
    roots = moments.diagonal(dim1=-2, dim2=-1).sqrt()
    # Theirs is a sum of TOKENS products in fp32.
    slack = TOKENS * 2.0**-24 * roots[..., :, None] * roots[..., None, :]
    assert ((theirs - moments).abs() <= slack).all()
    by_modelopt = model[0].weight_quantizer._amax.view(48, 2).float()
    ours = fq.calibrate(params, statistics=statistics)["0.weight"]["amax"][0]
    found, wanted = assert_not_above(weight, ours, by_modelopt, None, format, moments)
    assert found.sum() <= wanted.sum() * (1 + 2.0**-12)
