"""GPTQ beside ModelOpt 0.47's own, on the same Hessians and scales: the output error is as small, for every expert.

Codes are not compared: where fp32 takes a weight that lies between two values to the other, all later ones follow it.
"""

import warnings

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.ops.gptq.reference import on_grid_of
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import experts, name_of

KEY = "experts.*.weight"
FORMATS = [fqt.INT4_BLOCK32, fqt.INT4_BLOCK128, fqt.NVFP4_STATIC, fqt.MXFP4]
# Tokens an input, and the powers of ten that sizes of channels are over: well conditioned, and badly.
CONDITIONS = {"many tokens": (4.0, 0.5), "few tokens": (0.5, 0.5), "few channels": (4.0, 3.0), "both": (0.25, 3.0)}


@pytest.fixture(scope="module")
def calib_utils():
    return pytest.importorskip("modelopt.torch.quantization.utils.calib_utils")


def hessians(count, side, condition, seed):
    """Means of x x^T of inputs that are mixed, [count, side, side]."""
    tokens, decay = CONDITIONS[condition]
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, side, side, generator=generator) * torch.logspace(0, -decay, side)[:, None]
    x = (torch.randn(count, round(tokens * side), side, generator=generator) @ mix).double()
    return (x.mT @ x / x.shape[1]).float()


def quantizer(weight, leaves, e, format):
    """What ModelOpt's loop calls with the whole weight, under scales that stay."""
    if format.is_stateless:
        return lambda x: on_grid_of(weight, x, format)
    scales = [leaves[name][e] if name in leaves else None for name in ("amax", "global_amax")]
    return lambda x: fake_quantize_reference(x, *scales, format=format, out_dtype=torch.float32)


def losses(weights, others, hessian):
    """tr((w - q) H (w - q)^T) in float64."""
    errors = torch.stack(weights).double() - torch.stack(others).double()
    return (errors @ hessian.double() * errors).sum((1, 2))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_errors_are_at_most_modelopts(calib_utils, format, condition):
    """Law: at most 1.001 of ModelOpt's for each expert, over seeds and shapes, blocks of 128 columns in both.

    Nearly all codes are the same; badly conditioned, the inverse that ModelOpt factors has fewer right bits.
    """
    for seed, (rows, side) in enumerate([(24, 128), (9, 256)]):
        weights = experts(3, (rows, side), seed=seed)
        params = {f"experts.{e}.weight": weight for e, weight in enumerate(weights)}
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state = fq.calibrate(params)
        h = hessians(3, side, condition, seed)
        given = {KEY: {"hessian": h, "tokens": torch.ones(3)}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experts that are as well rounded to the nearest
            found = fqt.gptq(fq, params, state, given, damping=0.01, shrinkage=0.0)
        theirs = []
        for e, weight in enumerate(weights):
            updated = weight.clone()
            inverse = calib_utils.compute_hessian_inverse(h[e], weight, 0.01)
            calib_utils.gptq_blockwise_update(updated, inverse, 128, quantizer(weight, state.get(KEY, {}), e, format))
            theirs.append(updated)
        ours, peers = losses(weights, list(found.values()), h), losses(weights, theirs, h)
        nearest = losses(weights, list(fq.fakequant(params, state).values()), h)
        assert (ours <= 1.001 * peers).all(), (seed, ours / peers)
        assert (peers < nearest).all()  # it is GPTQ that is compared
