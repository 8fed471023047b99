from __future__ import annotations

import sys

import pytest

from lightning_influence.evaluation.retraining import Retraining
from lightning_influence.evaluation.selection_curves import selection_curves
from lightning_influence.report.component_plots import GREY
from lightning_influence.report.selection_plot import selection_plot


def curves(seeds):
    retraining = Retraining(lambda ids, seed: sum(ids) + 0.1 * seed, progress=False)
    return selection_curves(retraining, {"top": [3, 2, 1], "random": [0, 1, 2]}, [1, 3], seeds)


@pytest.mark.parametrize("seeds", [1, 3])
def test_it_shows_the_points(seeds, tmp_path):
    figure = selection_plot(curves(seeds), "held-out loss")
    [axes] = figure.axes
    for container, method in zip(axes.containers, ("top", "random"), strict=True):
        line = container.lines[0]
        expected = [curves(seeds).point(method, size).mean for size in (1, 3)]
        assert line.get_ydata().tolist() == pytest.approx(expected)
        assert list(line.get_xdata()) == [1, 3]
        assert container.has_yerr == (seeds > 1)
        assert (line.get_color() == GREY) == (method == "random")
    assert axes.get_ylabel() == "held-out loss"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["top", "random"]
    figure.savefig(tmp_path / "curves.png")


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"`selection_plot` needs matplotlib.*lightning-influence\[plots\]"):
        selection_plot(curves(1))
