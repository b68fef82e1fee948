"""Packed trees: what is unpacked is what `fakequant` gives, under the names and in the layout of the parameters."""

from dataclasses import replace

import optree
import pytest
import torch

import fq_transforms as fqt
from fq_transforms.formats import NVFP4_MODELOPT, IntElement
from fq_transforms.pack import packed_leaves
from tests.cases import CORE_FORMATS, assert_names, experts, name_of


def params_of(kind, format):
    weights = experts(3, (128, 256), torch.bfloat16)
    if kind == "separate":
        return {f"mlp.experts.{i}.w": w for i, w in enumerate(weights)}, {"*": format}
    return {"mlp.experts.w": torch.stack(weights)}, {"*": format}


@pytest.mark.parametrize("kind", ["separate", "stacked", "transposed"])
@pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)
def test_trees(format, kind):
    """Separate, stacked and transposed experts give the same codes, and come back in their own names and layout."""
    params, rules = params_of(kind, format)
    if kind == "transposed":
        params = {name: weight.mT.contiguous() for name, weight in params.items()}
    fq = fqt.transform(fqt.select(params, rules, transposed=["*"] if kind == "transposed" else []))
    state = fq.calibrate(params)
    before = [weight._version for weight in params.values()]
    packed = fq.pack(params, state)
    (leaves,) = packed.values()
    for field, (shape, dtype) in packed_leaves(fq.spec.groups[0]).items():
        assert (tuple(leaves[field].shape), leaves[field].dtype) == (shape, dtype)
    found, wanted = fq.unpack(packed), fq.fakequant(params, state)
    assert list(found) == list(params)
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name])
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
    assert [weight._version for weight in params.values()] == before
    # The same numbers in another layout are the same codes.
    other, rules = params_of("separate", format)
    theirs = fqt.transform(fqt.select(other, rules))
    (reference,) = theirs.pack(other, theirs.calibrate(other)).values()
    assert list(leaves) == list(reference)
    assert all(torch.equal(leaf.view(torch.uint8), reference[name].view(torch.uint8)) for name, leaf in leaves.items())


def test_a_pytree():
    """`optree` maps over it, as over the state: plain dicts of tensors."""
    params, rules = params_of("separate", fqt.NVFP4)
    fq = fqt.transform(fqt.select(params, rules))
    packed = fq.pack(params, fq.calibrate(params))
    copied = optree.tree_map(torch.clone, packed)
    assert list(copied["mlp.experts.*.w"]) == ["codes", "scale", "global_scale"]
    assert all(torch.equal(a, b) for a, b in zip(fq.unpack(copied).values(), fq.unpack(packed).values(), strict=True))


def test_faults():
    params, rules = params_of("separate", fqt.NVFP4)
    fq = fqt.transform(fqt.select(params, rules))
    state = fq.calibrate(params)
    packed = fq.pack(params, state)
    leaves = packed["mlp.experts.*.w"]
    without = {name: leaf for name, leaf in leaves.items() if name != "global_scale"}

    def unlike(**others):
        return {"mlp.experts.*.w": leaves | others}

    bad = {name: weight.clone() for name, weight in params.items()}
    bad["mlp.experts.1.w"][3, 4] = torch.nan
    modelopt = fqt.transform(fqt.select(params, {"*": NVFP4_MODELOPT}))
    odd = {"w": torch.ones(4, 5)}
    int4 = fqt.transform(fqt.select(odd, {"*": replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7))}))
    for error, call, *fragments in [
        (ValueError, lambda: fq.pack(bad, state), "mlp.experts.1.w", "NaN"),
        (KeyError, lambda: fq.pack({}, state), "mlp.experts.0.w"),
        (KeyError, lambda: fq.pack(params, {}), "mlp.experts.*.w"),
        (ValueError, lambda: modelopt.pack(params, state), "NVFP4_MODELOPT", "1e-05"),
        (ValueError, lambda: int4.pack(odd, int4.calibrate(odd)), "'w'", (4, 5), "4 bits"),
        (KeyError, lambda: fq.unpack({}), "mlp.experts.*.w"),
        (ValueError, lambda: fq.unpack(packed | {"other": leaves}), "other"),
        (ValueError, lambda: fq.unpack(packed, dtype=torch.float64), "float64"),
        (ValueError, lambda: fq.unpack(unlike(codes=leaves["codes"][:2])), "codes", (2, 128, 128)),
        (ValueError, lambda: fq.unpack(unlike(scale=leaves["scale"].float())), "scale"),
        (ValueError, lambda: fq.unpack({"mlp.experts.*.w": without}), "global_scale"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert_names(str(caught.value.args[0]), *fragments)
