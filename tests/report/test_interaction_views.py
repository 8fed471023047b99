from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from lightning_influence import ClassInteractions, Interactions, Spectrum
from lightning_influence.report import class_pair_plot, class_pair_table, markdown, spectrum_plot, spectrum_table
from tests.curvature.models import normal


def pool() -> Interactions:
    return Interactions(normal(9), normal(9, 4), torch.diag(torch.tensor([2.0, 1, 1, -1])), ids=range(9), weight=1 / 9)


VIEW = pool().mean_interactions(["b", "a", "c", "a", "b", "a", "b", "a", "b"])


def test_class_pairs_as_a_table() -> None:
    table = class_pair_table(VIEW)
    assert table[0] == ["class", "examples", "a", "b", "c"]
    assert [row[:2] for row in table[1:]] == [["a", "4"], ["b", "4"], ["c", "1"]]
    for a, row in enumerate(table[1:]):
        for b, cell in enumerate(row[2:]):
            value = float(VIEW.values[a, b])
            assert (cell == "") == math.isnan(value)
            assert not cell or float(cell) == pytest.approx(value, rel=5e-3)
    assert markdown(table).count("\n") == 4


def test_the_spectrum_as_a_table() -> None:
    spectrum = pool().spectrum()
    table = spectrum_table(spectrum, directions=(1, 3, 99))
    assert [row[0] for row in table] == ["directions", "1", "3", "4"]
    for row in table[1:]:
        k = int(row[0])
        assert float(row[1]) == pytest.approx(float(spectrum.eigenvalues[k - 1]), rel=5e-3)
        assert float(row[2].removesuffix(" %")) == pytest.approx(100 * float(spectrum.shares()[k - 1]), rel=5e-3)
    assert table[-1][2] == "100 %"


def test_class_pairs_as_a_picture(tmp_path: Any) -> None:
    figure = class_pair_plot(VIEW)
    axes = figure.axes[0]
    drawn = torch.from_numpy(axes.images[0].get_array().filled(math.nan))
    torch.testing.assert_close(drawn, VIEW.values, equal_nan=True)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    low, high = axes.images[0].get_clim()
    assert low == -high
    assert high == pytest.approx(float(VIEW.values.nan_to_num().abs().max()))
    figure.savefig(tmp_path / "pairs.png")


def test_class_pairs_without_a_number(tmp_path: Any) -> None:
    for value in (math.nan, 0.0):
        view = ClassInteractions((0,), torch.tensor([[value]]), torch.tensor([1]))
        class_pair_plot(view).savefig(tmp_path / "pairs.png")


@pytest.mark.parametrize("values", [[3.0, -1.0], [2.0], []])
def test_the_spectrum_as_a_picture(values: list[float], tmp_path: Any) -> None:
    spectrum = Spectrum(torch.tensor(values).double(), 5)
    figure = spectrum_plot(spectrum)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert set(lines) == {
        name for name, sign in (("positive", 1), ("negative", -1)) if any(sign * v > 0 for v in values)
    }
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == spectrum.shares().tolist()
    figure.savefig(tmp_path / "spectrum.png")


@pytest.mark.parametrize(("plot", "view"), [(class_pair_plot, VIEW), (spectrum_plot, pool().spectrum())])
def test_without_matplotlib(plot: Any, view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=f"`{plot.__name__}` needs matplotlib"):
        plot(view)
