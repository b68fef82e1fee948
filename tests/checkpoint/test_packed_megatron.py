"""Packed weights in Megatron's distributed checkpoints: real models and processes, any parallelism to any other."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.checkpoint import megatron
from fq_transforms.formats import FP8, FP8_BLOCK, INT4_BLOCK32, INT8_PER_CHANNEL, MXFP4, MXFP6_E2M3, NVFP4
from tests.cases import assert_names
from tests.checkpoint.test_megatron import (
    Good,
    Layout,
    build,
    load,
    own,
    renamed,
    save,
    share,
    spec_of,
    state_of,
    under,
)
from tests.checkpoint.test_packed import assert_same_bytes, place_of

pytestmark = pytest.mark.filterwarnings("ignore")

# Gated or not; a gated fc1 that is split along `out` lies in two pieces.
CASES = [
    (FP8, True),
    (FP8_BLOCK, False),
    (INT8_PER_CHANNEL, True),
    (INT4_BLOCK32, False),
    (NVFP4, True),
    (MXFP4, True),
    (MXFP6_E2M3, False),
]
LAYOUTS = [Layout(), Layout(ep=2), Layout(ep=4), Layout(ep=2, etp=2, tp=2)]
PAIRS = [(0, 2), (1, 2), (2, 0), (2, 1), (1, 3), (3, 1), (2, 2)]
RULES = ("*.experts.*",)


def cases_at(layout):
    """For each format: parameters, their spec, the model's entries for them, and what this rank packs."""
    share(layout)
    models = {gated: build(layout, gated=gated) for gated in (True, False)}
    cases = {}
    for format, gated in CASES:
        if format == FP8_BLOCK and layout.etp > 1:
            continue  # its blocks of 128 are cut
        params = dict(models[gated].named_parameters())
        spec, prefix = spec_of(params, format, RULES), format.name
        packed = fqt.pack(params, state_of(params, spec), spec=spec)
        cases[prefix] = params, spec, under(prefix, models[gated]), packed
    return cases


def _any_to_any(rank, size, folder):
    compared, all_cases = 0, []
    for number, layout in enumerate(LAYOUTS):
        all_cases.append(cases_at(layout))
        entries = {}
        for prefix, (_, spec, model_sharded, packed) in all_cases[-1].items():
            entries |= renamed(prefix, megatron.sharded_state_dict(packed, spec, model_sharded))
        save(entries, f"{folder}/{number}")
    for source, target in PAIRS:
        both = all_cases[source].keys() & all_cases[target].keys()
        cases = {prefix: all_cases[target][prefix] for prefix in sorted(both)}
        places, like = {}, {}
        for prefix, (params, spec, model_sharded, _) in cases.items():
            like[prefix] = place_of(params, spec)
            megatron.verify(f"{folder}/{source}", spec, model_sharded, like=like[prefix])
            places |= renamed(prefix, megatron.sharded_state_dict(like[prefix], spec, model_sharded))
        loaded = load(places, f"{folder}/{source}")
        for prefix, (_, spec, _, wanted) in cases.items():
            assert_same_bytes(megatron.load_state(own(prefix, loaded), spec, like[prefix]), wanted)
            compared += len(spec.groups)
    return compared


@pytest.mark.dist
def test_any_parallelism_to_any(ranks, tmp_path):
    """Packed at one EP and TP, loaded at another: each rank has the bytes that it packs from its own weights."""
    fewer = sum(3 in pair for pair in PAIRS)
    assert ranks(_any_to_any, str(tmp_path)) == [4 * (len(CASES) * len(PAIRS) - fewer)] * 4


def _faults(rank, size, folder):
    share(Layout())
    model = build(Layout(), gated=True)
    params = dict(model.named_parameters())
    spec, sharded = spec_of(params, NVFP4, RULES), model.sharded_state_dict()
    state, folder = state_of(params, spec), Path(folder)
    packed, place = fqt.pack(params, state, spec=spec), place_of(params, spec)
    good = Good(folder, model, params, sharded, spec, state, fqt.transform(spec).init(params), {})

    def entries(tree):
        return megatron.sharded_state_dict(tree, spec, sharded)

    # The model, the state and the packed weights in one checkpoint; each is found, and the others are left alone.
    save(sharded | entries(state) | entries(packed), folder / "all")
    megatron.verify(folder / "all", spec, sharded)
    megatron.verify(folder / "all", spec, sharded, like=place)
    loaded = load(model.sharded_state_dict() | entries(good.empty) | entries(place), folder / "all")
    assert_same_bytes(megatron.load_state(loaded, spec, place), packed)
    found = megatron.load_state(loaded, spec, good.empty)
    assert all(torch.equal(found[key].amax, state[key].amax) for key in state)

    save(entries(state), folder / "state")
    save(entries(packed), folder / "packed")
    good.fault("state as packed", KeyError, megatron.verify, folder / "state", spec, sharded, like=place)
    good.fault("packed as state", KeyError, megatron.verify, folder / "packed", spec, sharded)
    good.fault("state loaded", KeyError, megatron.load_state, load(entries(good.empty), folder / "state"), spec, place)
    mx = spec_of(params, MXFP4, RULES)
    like = place_of(params, mx)
    good.fault("format", ValueError, megatron.verify, folder / "packed", mx, sharded, like=like)
    few = spec_of(params, NVFP4, ("*.linear_fc1.weight",))
    good.fault("extra", ValueError, megatron.verify, folder / "packed", few, sharded, like=place_of(params, few))

    loaded = load(entries(place), folder / "packed")
    codes = next(name for name in loaded if name.endswith("linear_fc2.weight.codes"))
    fewer = {name: leaf for name, leaf in loaded.items() if name != codes}
    good.fault("missing", KeyError, megatron.load_state, fewer, spec, place)
    cut, signed = loaded | {codes: loaded[codes][:, :3]}, loaded | {codes: loaded[codes].view(torch.int8)}
    good.fault("shape", ValueError, megatron.load_state, cut, spec, place)
    good.fault("dtype", ValueError, megatron.load_state, signed, spec, place)
    good.fault("unknown", ValueError, megatron.load_state, loaded, few, place_of(params, few))
    good.fault("not packed", Exception, save, entries(place), folder / "empty")

    numbers = packed["decoder.layers.1.mlp.experts.local_experts.*.linear_fc2.weight"].codes.numpy().tobytes()[:4096]
    shutil.copytree(folder / "packed", folder / "bit")
    (file,) = (file for file in (folder / "bit").glob("*.distcp") if numbers in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(numbers) + 9] ^= 4
    file.write_bytes(content)
    good.fault("bit", ValueError, megatron.verify, folder / "bit", spec, sharded, like=place)
    shutil.copytree(folder / "packed", folder / "truncated")
    os.truncate(folder / "truncated" / file.name, 3000)
    good.fault("truncated", ValueError, megatron.verify, folder / "truncated", spec, sharded, like=place)
    return good.said


@pytest.mark.dist
def test_faults_are_named(ranks, tmp_path):
    """A state for packed weights and the other way round, and what does not fit or is damaged: an error by name."""
    (said,) = ranks(_faults, str(tmp_path), size=1)
    fc2 = "decoder.layers.0.mlp.experts.local_experts.*.linear_fc2.weight"
    for name, *fragments in [
        ("state as packed", "_packed._format", "4 entries of a state", "0 entries of packed weights"),
        ("packed as state", "_quantizer._format", "0 entries of a state", "entries of packed weights"),
        ("state loaded", "missing", ".codes"),
        ("format", "found format NVFP4 in the checkpoint, the spec wants MXFP4"),
        ("extra", "linear_fc2.weight_packed._codes"),
        ("missing", f"{fc2}.codes"),
        ("shape", f"{fc2}.codes", (4, 3, 64), (4, 128, 64)),
        ("dtype", f"{fc2}.codes", "torch.int8", "torch.uint8"),
        ("unknown", f"{fc2}.codes"),
        ("not packed", "`data`", "_packed"),
        ("bit", tmp_path / "bit", "_packed._codes", "CRC-32"),
        ("truncated", tmp_path / "truncated"),
    ]:
        assert_names(said[name], *fragments)
