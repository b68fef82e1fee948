"""The benchmark of private APIs: each is switched off alone and together with the others, and comes back."""

import pytest

import fq_transforms as fqt
from fq_transforms.bench import host
from fq_transforms.ops import private
from tests.cases import experts, name_of


def apis():
    return {name: getattr(private, attribute) for name, attribute in host.APIS.items()}


def missing():
    return {name for name, api in apis().items() if api is None}


LACKING = missing()  # in this PyTorch: one without CUDA has no streams


def test_an_api_is_switched_off_within_and_comes_back():
    """After an error too."""
    usual = apis()

    def fail(names):
        with host.without(*names):
            assert missing() == LACKING.union(names)
            raise RuntimeError("within")

    for names in host.WAYS.values():
        with pytest.raises(RuntimeError, match="within"):
            fail(names)
        assert apis() == usual


@pytest.mark.parametrize("format", [fqt.FP8, fqt.NVFP4, fqt.MXFP4], ids=name_of)
def test_every_way_is_timed_where_its_apis_are_off(format, monkeypatch):
    """All ways, from private to public, each in its own state; their results are compared before."""
    off = []

    def timed(call):
        call()
        off.append(missing())
        return float(len(off))

    monkeypatch.setattr(host, "host_us", timed)
    weights = [weight.bfloat16() for weight in experts(3, (32, 128))]
    times = host.measure(weights, format)
    assert list(times) == list(host.WAYS)
    assert off == [LACKING.union(names) for names in host.WAYS.values()]
    assert list(times.values()) == [float(i + 1) for i in range(len(off))]


def test_other_bits_are_not_timed(monkeypatch):
    weights = [weight.bfloat16() for weight in experts(2, (32, 128))]
    monkeypatch.setattr(host, "host_us", lambda call: 1.0)
    turn = iter(range(100))
    fakequant = fqt.Transform.fakequant

    def off_by_one(fq, params, state):
        return {name: w + (next(turn) == 3) for name, w in fakequant(fq, params, state).items()}

    monkeypatch.setattr(fqt.Transform, "fakequant", off_by_one)
    with pytest.raises(SystemExit, match=r"experts\.1\.weight, without guards, FP8: 4096 of 4096 differ"):
        host.measure(weights, fqt.FP8)


def test_page():
    """Medians over formats, shape by shape."""
    row = {"shape": "32 x [4, 8]", "format": "FP8"} | {way: 50.0 + i for i, way in enumerate(host.WAYS)}
    other = {"shape": "128 x [4, 8]", "format": "FP8"} | {way: 150.0 + i for i, way in enumerate(host.WAYS)}
    page = host.page({"date": "today", "gpu": "H200"}, [row, row | {"format": "INT8", "private": 60.0}, other])
    assert "| shape | format | private | without guards |" in page
    assert "| 32 x [4, 8] | median | 55.0 | 51.0 |" in page
    assert "| 128 x [4, 8] | median | 150.0 | 151.0 |" in page
