from __future__ import annotations

import sys

import pytest
import torch

from lightning_influence import InteractionGreedy, TopK, gain_curve
from lightning_influence.evaluation.retraining import Retraining
from lightning_influence.evaluation.selection_curves import selection_curves
from lightning_influence.report.component_plots import GREY
from lightning_influence.report.selection_plot import held_out_targets_plot, saturation_plot, selection_plot
from lightning_influence.selection import HeldOutChoice


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


def test_gains_that_run_out(tmp_path):
    values, features = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.ones(4, 1)
    found = {
        "additive": TopK().select(values, budget=4),
        "greedy": InteractionGreedy().select(values, features, budget=4),
    }
    figure = saturation_plot(found)
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == ["additive", "greedy"]
    for line, selection in zip(axes.lines, found.values(), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]
        assert line.get_ydata().tolist() == [0.0, *gain_curve(selection).tolist()]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert axes.lines[1].get_ydata().tolist() == pytest.approx([0, 3.5 / 5, 1, 4.5 / 5, 2 / 5])
    figure.savefig(tmp_path / "saturation.png")
    assert not saturation_plot({}).axes[0].lines


@pytest.mark.parametrize("candidates", [(0.1, 0.01), ("raw", "unit")])
def test_what_is_explained_of_held_out_targets(candidates, tmp_path):
    choice = HeldOutChoice(candidates, torch.tensor([[0.2, 0.3], [0.4, -9.0]], dtype=torch.float64))
    figure = held_out_targets_plot(choice)
    [axes] = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0, 0.2, 0.3], [0, 0.4, -9.0]]
    assert [line.get_label() for line in axes.lines] == [str(candidate) for candidate in candidates]
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()
    assert axes.get_ylim()[0] > -1
    figure.savefig(tmp_path / "held_out.png")
