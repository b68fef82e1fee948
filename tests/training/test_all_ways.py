"""Law: every way to train gives the outputs and gradients of `functional_call`, bit for bit, or refuses by name."""

import pytest
import torch

import fq_transforms as fqt
from tests.cases import CORE_FORMATS, name_of
from tests.full import FULL
from tests.training.ways import CARRYING, KINDS, WAYS, assert_untouched, functional, numbers_of, setup

# The dtype of the parameters, and `out_dtype`.
DTYPES = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)]

# Everything that refuses: what a layer adds to `main_grad` has not been clipped.
REFUSED_WITH_MAIN_GRAD = {(way, "clip"): "found main_grad and backward='clip'" for way in CARRYING}


def record(model):
    """The outputs of the expert layers, as they come, in place of the model's hooks."""
    outputs = []
    for mlp in model.mlp:
        forward = mlp.forward

        def recording(x, forward=forward):
            outputs.append(forward(x))
            return outputs[-1]

        mlp.forward = recording
    return outputs


def run(way, model, fq, state, x, outputs):
    """All that there is to compare: outputs, loss, and gradients of the input and of parameters, by name."""
    outputs.clear()
    x = x.detach().requires_grad_()
    loss, grads = way(model, fq, state, x)
    last = outputs[-len(model.mlp) :]
    return {"loss": loss, "x": x.grad, **grads, **{f"output {i}": out.detach() for i, out in enumerate(last)}}


def is_same(found, wanted, main_grad):
    """`main_grad` is fp32, whatever the dtype of its parameter is."""
    return torch.equal(found.to(wanted.dtype), wanted) and (main_grad or found.dtype == wanted.dtype)


def check(ways, refused, format, dtypes, backward, main_grad):
    dtype, out_dtype = dtypes
    model, fq, state, x = setup(*KINDS, format=format, dtype=dtype, backward=backward, out_dtype=out_dtype)
    outputs, before = record(model), numbers_of(model)
    wanted = run(functional, model, fq, state, x, outputs)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in wanted.values())
    for name, way in ways.items():
        for param in model.parameters() if main_grad else ():
            param.main_grad, param.grad_added_to_main_grad = torch.zeros(param.shape), False
        if (name, backward) in refused:
            with pytest.raises(ValueError, match=refused[name, backward]):
                way(model, fq, state, x)
        else:
            found = run(way, model, fq, state, x, outputs)
            differ = [key for key, tensor in wanted.items() if not is_same(found[key], tensor, main_grad)]
            assert not differ, f"{name}: {differ[:4]}"
            assert found.keys() == wanted.keys()
        assert_untouched(model, before)
    return model, fq, state, x, outputs, wanted


# Every format in one pair of dtypes; the others, of which a format knows nothing, with some.
CASES = [(format, dtypes) for dtypes in DTYPES for format in CORE_FORMATS if FULL or dtypes == DTYPES[0]]
CASES += [(format, dtypes) for dtypes in DTYPES[1:] for format in (fqt.NVFP4, fqt.INT8) if not FULL]


def in_every_format(test):
    params = [pytest.param(f, dtypes, id="-".join(map(name_of, (f, *dtypes)))) for f, dtypes in CASES]
    by_format = pytest.mark.parametrize(("format", "dtypes"), params)
    return pytest.mark.parametrize("backward", ["pass_through", "clip"])(by_format(test))


@in_every_format
def test_every_way_gives_what_functional_call_gives(format, dtypes, backward):
    """In every format; and where a format clips, the gradients of weights beyond their amax are zero, and no others."""
    model, fq, state, x, outputs, wanted = check(WAYS, {}, format, dtypes, backward, main_grad=False)
    if backward == "clip":
        passing = type(fq)(fq.spec, out_dtype=fq.out_dtype)
        passed = run(functional, model, passing, state, x, outputs)
        zeroed = 0
        for group in fq.spec.groups:
            for name in group.names:
                is_zeroed = (wanted[name] == 0) & (passed[name] != 0)
                assert torch.equal(wanted[name], passed[name].masked_fill(is_zeroed, 0))
                zeroed += int(is_zeroed.sum())
        assert (zeroed > 0) == format.clips


@in_every_format
def test_fused_accumulation_adds_what_functional_call_gives(format, dtypes, backward):
    """`main_grad` of layers that add to it themselves; "clip" is refused in every format, also if it never clips."""
    check(CARRYING, REFUSED_WITH_MAIN_GRAD, format, dtypes, backward, main_grad=True)
