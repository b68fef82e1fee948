"""Roles that engines fuse: refused with the call that ties them, and written once that is done."""

import json

import pytest
import torch

import fq_transforms as fqt
from tests.cases import assert_names
from tests.export.models import (
    EXPERTS,
    GATE_UP,
    TARGETS,
    build,
    in_lists,
    of_each_expert,
    read,
    to_compressed_tensors,
    to_modelopt,
    weights_only,
)


@pytest.mark.parametrize(
    ("target", "format"),
    [
        *((to_compressed_tensors, format) for format in (fqt.NVFP4, fqt.NVFP4_STATIC, fqt.FP8)),
        *((to_modelopt, format) for format in (fqt.NVFP4, fqt.NVFP4_STATIC)),
    ],
    ids=lambda value: {to_compressed_tensors: "ct", to_modelopt: "mo"}.get(value) or value.name,
)
def test_untied_roles_are_refused(format, target, tmp_path):
    """Gate and up with an amax each: the error names both, the values, the expert and the call; tied, it is written."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    state = fq.calibrate(params)
    with pytest.raises(ValueError) as caught:
        target(tmp_path / "a", fq, params, state, config=model.config)
    assert_names(
        str(caught.value),
        "model.layers.0.mlp.experts.*.gate_proj.weight",
        "model.layers.0.mlp.experts.*.up_proj.weight",
        "for expert 0",
        "fqt.tie(state, [('gate_proj', 'up_proj')])",
    )
    assert not list(tmp_path.iterdir())
    target(tmp_path / "a", fq, params, fqt.tie(state, GATE_UP), config=model.config)
    scales = {n: t for n, t in read(tmp_path / "a").items() if n.endswith(("global_scale", "scale_2"))}
    for name, scale in scales.items():
        assert torch.equal(scale, scales[name.replace("up_proj", "gate_proj")])


@TARGETS
def test_scales_of_rows_need_no_tie(target, tmp_path):
    """Channels and blocks have a scale of their own in engines too."""
    model, params = build()
    params = in_lists(params)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.FP8_PER_CHANNEL}))
    target(tmp_path / "a", fq, params, fq.calibrate(params), config=model.config)
    assert (tmp_path / "a" / "config.json").exists()


@TARGETS
def test_queries_and_keys_of_other_sizes_are_tied(target, tmp_path):
    """Grouped-query attention under static NVFP4: the call that the error names makes it exportable."""
    model, params = build()
    fq = fqt.transform(fqt.select(params, {"*self_attn.[qkv]_proj*": fqt.NVFP4_STATIC}))
    state = fq.calibrate(params)
    with pytest.raises(ValueError, match="call fqt.tie") as caught:
        target(tmp_path / "a", fq, params, state, config=model.config)
    pairs = json.loads(str(caught.value).rpartition("fqt.tie(state, ")[2][:-1].translate(str.maketrans("()'", '[]"')))
    target(tmp_path / "a", fq, params, fqt.tie(state, [tuple(pair) for pair in pairs]), config=model.config)
    assert (tmp_path / "a" / "config.json").exists()


def test_unseen_experts_from_weights_are_tied(tmp_path):
    """What `fill_unseen` gives an expert without tokens differs between gate and up: refused, and tied as told."""
    model, params = build()
    lists = in_lists(params)
    fq = fqt.transform(fqt.select(lists, [fqt.Rule("*.experts.*", fqt.FP8, fqt.FP8, per_expert_inputs=True)]))
    state = fqt.tie(weights_only(fq).calibrate(lists), GATE_UP) | of_each_expert(fq.spec)
    for inputs in fq.spec.inputs:
        state[inputs.key]["amax"][1] = -torch.inf
    state = fq.fill_unseen(state, unseen="from-weights", params=lists)
    with pytest.raises(
        ValueError, match=r"for expert 1, wanted one: .* fqt.tie\(state, \[\('gate_proj', 'up_proj'\)\]\)"
    ):
        fqt.export.save(tmp_path / "a", fq, lists, state, config=model.config, layout="modelopt")
    fqt.export.save(tmp_path / "a", fq, lists, fqt.tie(state, GATE_UP), config=model.config, layout="modelopt")
    scales = [name for name in read(tmp_path / "a") if name.endswith("input_scale")]
    assert len(scales) == 2 * 3 * EXPERTS
