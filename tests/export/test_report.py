"""The report of a folder is that of its weights in memory, whatever it is read in."""

import json
from collections import defaultdict
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

import fq_transforms as fqt
from fq_transforms.export import compare, folder, report
from fq_transforms.export.streaming import job
from fq_transforms.methods import MAX, FourOverSix
from tests.export.models import EXPERTS, GATE_UP, build, read

RULES = "*.experts.*"
SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}


def assert_same(found, wanted):
    """All numbers of two reports, and their histograms, bit for bit."""
    assert found.groups.keys() == wanted.groups.keys()
    for key, group in wanted.groups.items():
        for field in fields(group):
            a, b = (getattr(one, field.name) for one in (found.groups[key], group))
            if isinstance(b, torch.Tensor):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), (key, field.name)
                assert torch.equal(a, b), (key, field.name)
            else:
                assert a == b, (key, field.name)
    assert str(found) == str(wanted)
    assert len(found.histograms) == len(wanted.histograms)
    for a, b in zip(found.histograms, wanted.histograms, strict=True):
        assert (a.key, a.expert, a.sqnr, a.format) == (b.key, b.expert, b.sqnr, b.format)
        assert torch.equal(a.edges, b.edges)
        assert torch.equal(a.counts, b.counts)


def in_memory(params, rules, layout, method=MAX):
    """The report of the state that `save` takes."""
    fq = fqt.transform(fqt.select(params, rules), layout=layout, method=method)
    return fq.report(params, fqt.tie(fq.calibrate(params), GATE_UP))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model on a disk, in several shards."""
    path = tmp_path_factory.mktemp("models") / "src"
    build(**SMALL)[0].save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.mark.parametrize("size", [1, 2**27], ids=["expert", "layer"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "plain"])
@pytest.mark.parametrize("format", [fqt.NVFP4, fqt.FP8, fqt.INT4_BLOCK32, fqt.MXFP4], ids=lambda format: format.name)
def test_it_is_the_report_of_tied_state_in_memory(format, layout, size, source, monkeypatch):
    """Bit for bit, read expert by expert or layer by layer."""
    monkeypatch.setattr(job, "PIECE_BYTES", size)
    params = read(source)
    assert_same(report(source, {RULES: format}, layout=layout), in_memory(params, {RULES: format}, layout))


def test_a_method_reaches_it(source):
    """FourOverSix has another loss than Max; both are those of memory."""
    rules, params = {"*.layers.1.mlp.experts.*": fqt.NVFP4_STATIC}, read(source)
    found = [report(source, rules, method=method) for method in (MAX, FourOverSix())]
    for one, method in zip(found, (MAX, FourOverSix()), strict=True):
        assert_same(one, in_memory(params, rules, "compressed-tensors", method))
    assert str(found[0]) != str(found[1])


def test_stacks_are_read_in_parts(tmp_path, monkeypatch):
    """Of a stack that is stored [in, out], and of a matrix that is no expert."""
    monkeypatch.setattr(job, "PIECE_BYTES", 1)
    scale = 2.0 ** torch.arange(EXPERTS)[:, None, None]
    params = {"l.0.mlp.experts.down_proj": torch.randn(EXPERTS, 32, 64) * scale, "l.0.q.weight": torch.randn(64, 32)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))
    save_file(params, tmp_path / "model.safetensors")
    rules = {"*": fqt.NVFP4}
    fq = fqt.transform(fqt.select(params, rules, transposed="*.down_proj"), layout="plain")
    wanted = fq.report(params, fq.calibrate(params))
    assert_same(report(tmp_path, rules, layout="plain", transposed="*.down_proj"), wanted)


def test_a_state_and_its_tokens_are_taken(source, tmp_path):
    """With a state the loss is that of its amax, not of max, and its tokens are in the table."""
    params = read(source)
    spec = fqt.select(params, [fqt.Rule(RULES, fqt.FP8, fqt.FP8)])
    fq = fqt.transform(spec, layout="compressed-tensors")
    state = {key: {name: leaf * 0.5 for name, leaf in entry.items()} for key, entry in fq.init(params).items()}
    weights = fqt.tie(fqt.transform(fqt.Spec(spec.groups)).calibrate(params), GATE_UP)
    for key, entry in weights.items():
        state[key] = {"amax": 0.5 * entry["amax"]}
        state[f"{key}.input"] = {
            "amax": torch.ones(1),
            "tokens": torch.arange(EXPERTS, dtype=torch.float64),
        }
    fqt.checkpoint.save_file(tmp_path / "state.safetensors", fq, state)
    found = report(source, state=tmp_path / "state.safetensors")
    assert_same(found, fq.report(params, state))
    assert all(group.tokens.tolist() == list(range(EXPERTS)) for group in found.groups.values())
    assert all(group.clipped.sum() for group in found.groups.values())


def test_it_is_the_loss_of_the_folder(tmp_path):
    """What `compare` finds between the source and the folder that was written is the noise that was reported."""
    model, _ = build(**SMALL)
    model.float().save_pretrained(tmp_path / "src")
    rules = {RULES: fqt.FP8}  # compressed-tensors decodes NVFP4 to bf16, whatever the model's dtype
    folder(tmp_path / "src", tmp_path / "dst", rules, jobs=1)
    reported = report(tmp_path / "src", rules)
    noise = defaultdict(float)
    for key, group in reported.groups.items():
        noise[key.replace("layers.0", "layers.*").replace("layers.1", "layers.*")] += float(group.noise.sum())
    found = compare(tmp_path / "src", tmp_path / "dst")
    assert {name: role.noise for name, role in found.roles.items() if role.differ} == pytest.approx(noise, rel=1e-12)


def test_what_is_in_codes_is_decoded_first(source, tmp_path):
    """The signal is the plain weight that codes stand for: in FP8 again nothing is lost."""
    folder(source, tmp_path / "fp8", {RULES: fqt.FP8}, jobs=1)
    found = report(tmp_path / "fp8", {RULES: fqt.FP8_PER_CHANNEL})
    folder(tmp_path / "fp8", tmp_path / "plain", layout="plain", jobs=1)
    assert_same(found, in_memory(read(tmp_path / "plain"), {RULES: fqt.FP8_PER_CHANNEL}, "compressed-tensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rules": None, "layout": "plain"}, "found none"),
        ({"rules": {RULES: fqt.NVFP4}, "layout": "modelop"}, "'modelopt'"),
        ({"rules": {RULES: fqt.FP8_BLOCK}, "layout": "modelopt", "reader": "vllm"}, "FP8_BLOCK"),
        ({"rules": {"*.expert.*": fqt.NVFP4}}, "expert"),
        ({"rules": {RULES: fqt.NVFP4}, "device": "meta"}, "meta"),
        ({"rules": {RULES: fqt.NVFP4}, "device": "cuda:99"}, "cuda:99"),
        ({"rules": {RULES: fqt.NVFP4}, "device": ""}, "device: found ''"),
        ({"rules": {RULES: fqt.NVFP4}, "inputs": "nothing"}, "inputs"),
    ],
)
def test_it_refuses_what_folder_refuses(options, words, source, tmp_path):
    """With the same error, but for rules of nothing, of which plain weights can be written."""
    with pytest.raises(ValueError, match=words) as found:
        report(source, **options)
    if options["rules"]:
        with pytest.raises(ValueError) as wanted:
            folder(source, tmp_path / "dst", **options)
        assert str(found.value) == str(wanted.value)


def test_a_weight_too_small_for_a_global_scale_is_refused_as_folder_does(tmp_path):
    """Kills a report of what `folder` refuses in the middle, in words of a state that nobody gave."""
    params = {f"layers.0.mlp.experts.{e}.down_proj.weight": torch.full((16, 32), 10.0 ** (-37 * e)) for e in range(2)}
    (tmp_path / "src").mkdir()
    save_file(params, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text('{"model_type": "own", "architectures": ["OwnForCausalLM"]}')
    with pytest.raises(ValueError, match=r"weight '.*experts\.1\.down_proj.*so small.*such as MXFP4") as found:
        report(tmp_path / "src", {RULES: fqt.NVFP4})
    with pytest.raises(ValueError) as wanted:
        folder(tmp_path / "src", tmp_path / "dst", {RULES: fqt.NVFP4})
    assert str(found.value) == str(wanted.value)
    folder(tmp_path / "src", tmp_path / "dst", {RULES: fqt.MXFP4})


def test_a_page_of_its_own(source):
    """The page has the table; a title is text, whatever is in it."""
    page = report(source, {RULES: fqt.FP8}).to_html("<b>&")
    assert page.startswith("<!doctype html>")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 1 + 6
