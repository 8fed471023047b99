"""Pictures of the retrieval benchmark: what is drawn is what was measured."""

from __future__ import annotations

import sys

import pytest

from lightning_influence.report import ShareCurve, depth_plot, share_plot
from tests.evaluation.retrieval_cases import NAMES
from tests.report.test_component_tables import report

CURVES = [
    ShareCurve("held-out", (0.01, 0.1, 1.0), (0.5, 0.7, 0.6), ((0.4, 0.6), (0.6, 0.8), (0.5, 0.7))),
    ShareCurve("in-sample", (0.02, 1.0), (0.8, 0.6)),
]
POINTS = [
    ShareCurve("projection", (0.01, 0.05), (0.4, 0.45), ((0.3, 0.5), (0.4, 0.5))),
    ShareCurve("one", (0.1,), (0.2,)),
]


def by_label(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_depth_plot_has_a_line_for_each_kind():
    figure = depth_plot(report())
    assert [axes.get_title() for axes in figure.axes] == ["same", "other"]
    for axes in figure.axes:
        drawn = by_label(axes)
        assert set(drawn) == {"embedding (no layer)", "q_proj", "k_proj", "up_proj", "full gradient", "chance"}
        single = {name: report().line("component", name, axes.get_title()).accuracy for name in NAMES}
        assert drawn["q_proj"] == [(0, single[NAMES[1]]), (1, single[NAMES[3]])]
        assert drawn["up_proj"] == [(1, single[NAMES[5]])]
        assert {value for _, value in drawn["embedding (no layer)"]} == {single[NAMES[0]]}
        assert {value for _, value in drawn["chance"]} == {0.25}
        assert axes.get_xlabel() == "layer"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(by_label(figure.axes[0]))


def test_share_plot_is_in_per_cent_on_a_log_scale():
    figure = share_plot(report(), {"same": CURVES, "other": CURVES[:1]}, {"same": POINTS})
    same, other = figure.axes
    assert same.get_xscale() == "log"
    assert by_label(same)["held-out"] == [(1, 0.5), (10, 0.7), (100, 0.6)]
    assert by_label(same)["in-sample"] == [(2, 0.8), (100, 0.6)]
    bars = {container.get_label(): container for container in same.containers}
    assert set(bars) == {"projection", "one"}
    assert list(bars["projection"].lines[0].get_ydata()) == [0.4, 0.45]
    assert bars["projection"].has_yerr
    assert not bars["one"].has_yerr
    assert "in-sample" not in by_label(other)
    assert not other.containers
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == len(set(texts))
    assert {"held-out", "95 % of held-out", "in-sample", "projection", "one", "full gradient", "chance"} == set(texts)


def test_figures_can_be_saved(tmp_path):
    share_plot(report(), {"same": CURVES}, {"same": POINTS}).savefig(tmp_path / "share.png")
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", [depth_plot, lambda r: share_plot(r, {}, {})])
def test_without_matplotlib_one_line_says_how_to_get_it(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"_plot` needs matplotlib, .*: pip install .*\[plots\]"):
        draw(report())
