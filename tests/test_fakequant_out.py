"""`fakequant(out=)`: the results of a call in the memory of an earlier one."""

import pytest
import torch

import fq_transforms as fqt
from tests.cases import CORE_FORMATS, experts, name_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (32, 256)


def separate(device="cpu", dtype=torch.bfloat16, scale=1.0):
    weights = experts(3, SHAPE, dtype, device=device)
    return {f"experts.{i}.weight": w * scale for i, w in enumerate(weights)} | {"norm": torch.ones(2, device=device)}


def stacked(device="cpu", dtype=torch.bfloat16, scale=1.0):
    return {"experts.gate_up_proj": torch.stack(experts(3, SHAPE, dtype, device=device)) * scale}


def transform_of(params, format=fqt.FP8, **options):
    return fqt.transform(fqt.select(params, {"*experts*": format}), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [separate, stacked])
@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_it_equals_a_call_without(format, layout, device):
    """Law: the same bits, in the tensors that were given, again and again, whichever memory the weights are in."""
    first = layout(device)
    for options in ({}, {"separate": True}, {"out_dtype": torch.float32}):
        fq = transform_of(first, format, **options)
        out = fq.fakequant(first, fq.calibrate(first))
        for scale in (2.0, 0.25, 3.0):
            params = layout(device, scale=scale)
            state = fq.calibrate(params)
            for _ in range(3):  # the second call of a kind may take another way than the first
                found = fq.fakequant(params, state, out=out)
                wanted = fq.fakequant(params, state)
                assert list(found) == list(params)
                for name, weight in wanted.items():
                    assert torch.equal(found[name], weight), name
                    assert found[name] is (out[name] if "experts" in name else params[name])


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_that_kept_the_old_values_raises(device):
    """Written over is changed in place, as autograd sees it."""
    params = separate(device)
    fq = transform_of(params)
    state = fq.calibrate(params)
    out = fq.fakequant(params, state)
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    y = (x * out["experts.0.weight"]).sum()
    fq.fakequant(params, state, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda out, params: out.pop("experts.1.weight"), "'experts.1.weight' of group"),
        (lambda out, params: out.update({"experts.1.weight": torch.empty(1, 2)}), r"found Tensor \(1, 2\)"),
        (lambda out, params: out.update({"experts.1.weight": torch.empty(SHAPE)}), "found Tensor .* torch.float32"),
        (
            lambda out, params: out.update({"experts.1.weight": out["experts.1.weight"].mT.contiguous().mT}),
            "not contiguous",
        ),
        (lambda out, params: out.update(params), "the parameters of group .* themselves"),
    ],
)
def test_what_is_no_result_is_refused_and_nothing_is_written(wrong, words):
    """Missing, another shape or dtype, not contiguous, or the parameters: an error that names it."""
    params = separate()
    fq = transform_of(params)
    state = fq.calibrate(params)
    out = fq.fakequant(params, state)
    fq.fakequant(params, state, out=out)  # and so known to be right
    before = {name: weight.clone() for name, weight in params.items()}
    wrong(out, params)
    with pytest.raises((KeyError, ValueError), match=words):
        fq.fakequant(params, state, out=out)
    for name, weight in before.items():
        assert torch.equal(params[name], weight)


def test_gradients_transforms_and_chance_are_refused():
    """`out` has no gradient, and is not for transforms, nor for rounding by chance."""
    params = separate(dtype=torch.float32)
    fq = transform_of(params)
    state = fq.calibrate(params)
    out = fq.fakequant(params, state)
    leaves = {name: weight.requires_grad_() for name, weight in params.items()}
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        fq.fakequant(leaves, state, out=out)
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        torch.func.vmap(lambda amax: fq.fakequant(params, {k: type(g)(amax) for k, g in state.items()}, out=out))(
            torch.stack([group.amax for group in state.values()])
        )
    with torch.no_grad(), pytest.raises(ValueError, match="rounding"):
        fq.fakequant(leaves, state, out=out, rounding=fqt.Stochastic(seed=1))
