"""The figure of a report: what it draws, and the values that an element can take."""

import math
import pickle

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.report.plot import LEAST_SPAN, element_values
from tests.cases import ALL_FORMATS, experts, name_of
from tests.report.models import model


def test_the_figure_has_a_heat_map_and_a_histogram_per_role(tmp_path):
    """Heat maps are layers by experts with the report's own SQNR; below each is its worst expert."""
    pytest.importorskip("matplotlib")
    params, fq, _ = model([fqt.NVFP4, fqt.INT8])
    params["layers.1.experts.2.w1"][0, 0] = 20.0
    params["layers.2.experts.3.w1"].zero_()
    found = fq.report(params, fq.calibrate(params))
    figure = found.plot()
    maps = {axes.get_title(): axes for axes in figure.axes if axes.get_images()}
    assert list(maps) == ["layers.*.experts.*.w0\nNVFP4", "layers.*.experts.*.w1\nINT8"]
    shown = torch.from_numpy(maps["layers.*.experts.*.w1\nINT8"].get_images()[0].get_array().filled(math.nan))
    wanted = torch.stack([found.groups[f"layers.{layer}.experts.*.w1"].sqnr for layer in range(3)])
    wanted[wanted == math.inf] = math.nan
    assert torch.equal(shown, wanted) or torch.allclose(shown, wanted, rtol=0, atol=0, equal_nan=True)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title().startswith("worst")]
    assert len(titles) == 2
    assert titles[1].startswith("worst: expert 2, ")
    assert titles[1].endswith(" dB\nlayers.1.experts.*.w1")
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_colours_span_a_bit_and_the_legend_says_what_red_is():
    """Half a dB of noise is not the whole scale, 20 dB are; grey has its line in the legend where there is any."""
    pytest.importorskip("matplotlib")
    params, fq, _ = model([fqt.INT8])
    state, spans, words = fq.calibrate(params), [], []
    for outlier in (False, True):
        if outlier:
            params["layers.1.experts.2.w0"][0, 0] = 2000.0
            params["layers.2.experts.3.w0"].zero_()
            state = fq.calibrate(params)
        figure = fq.report(params, state).plot()
        low, high = figure.axes[0].get_images()[0].get_clim()
        spans.append(high - low)
        words.append([text.get_text() for text in figure.legends[0].get_texts()])
    values = torch.cat([group.sqnr for group in fq.report(params, state).groups.values()])
    finite = values[values.isfinite()]
    assert spans[0] == pytest.approx(LEAST_SPAN)
    assert spans[1] > LEAST_SPAN
    assert spans[1] == pytest.approx((finite.max() - finite.min()).item())
    assert all(any(text.startswith("clipped: ") for text in texts) for texts in words)
    assert ["infinite" in " ".join(texts) for texts in words] == [False, True]


def test_a_figure_of_one_dense_weight():
    """No layer, no expert number: a role of one cell."""
    pytest.importorskip("matplotlib")
    params = {"w": experts(1, (32, 64))[0]}
    fq = fqt.transform(fqt.select(params, {"*": fqt.MXFP8}))
    figure = fq.report(params, fq.calibrate(params)).plot()
    assert figure.axes[0].get_title() == "w\nMXFP8"


def test_a_notebook_shows_the_figure_even_if_nothing_has_loaded_pyplot():
    """A figure of plain Matplotlib is but its `repr` there; its own PNG is asked for first."""
    pytest.importorskip("matplotlib")
    params, fq, state = model([fqt.INT8])
    figure = fq.report(params, state).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(pickle.loads(pickle.dumps(figure)).axes) == len(figure.axes)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_element_values_are_what_quantization_gives(format):
    """Every value of the element, and no other, comes out of the reference when it is put in."""
    values = torch.tensor(element_values(format))
    assert (values.diff() > 0).all()
    assert values.abs().max() in (getattr(format.element, "max", None), abs(getattr(format.element, "low", 0)))
    if format.clips and format.scale == "fp32" and format.block == (None, None):
        top = getattr(format.element, "max", None) or format.element.qmax
        dense = torch.linspace(-values.abs().max(), values.abs().max(), 200_001)[None]
        fq = fqt.transform(fqt.select({"w": dense}, {"*": format}))
        state = {"w": {"amax": torch.tensor([float(top)])}}  # so the scale is 1
        made = fq.fakequant({"w": dense}, state)["w"].unique()
        assert set(made.tolist()) <= set(values.tolist())
        coarse = values[values.abs() >= values.abs().max() / 1000]
        assert set(coarse.tolist()) <= set(made.tolist())
