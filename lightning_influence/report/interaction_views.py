"""The interactions of a pool as tables and pictures: between classes, and along their leading directions ([IA])."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_influence.estimators.interaction_views import ClassInteractions, Spectrum
from lightning_influence.report.component_tables import Table, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
_WRITTEN = 12  # classes up to which the numbers are written into the picture


def class_pair_table(view: ClassInteractions) -> Table:
    """Mean interaction of every pair of classes, and the size of each; for `markdown`.

    >>> import torch
    >>> from lightning_influence.report import markdown
    >>> means = torch.tensor([[2e-6, -5e-7], [-5e-7, float("nan")]])
    >>> print(markdown(class_pair_table(ClassInteractions(("cat", "dog"), means, torch.tensor([3, 1])))))
    | class | examples | cat    | dog    |
    | ----- | -------- | ------ | ------ |
    | cat   | 3        | 2e-06  | -5e-07 |
    | dog   | 1        | -5e-07 |        |
    """
    names = [str(label) for label in view.labels]
    rows = zip(names, view.counts.tolist(), view.values.tolist(), strict=True)
    body = [[name, str(count), *(_number(value) for value in values)] for name, count, values in rows]
    return [["class", "examples", *names], *body]


def spectrum_table(spectrum: Spectrum, directions: Sequence[int] = DIRECTIONS) -> Table:
    """Eigenvalues of K, and the share of the leading directions together; for `markdown`.

    Args:
        spectrum: Of `Interactions.spectrum`.
        directions: Which lines to show, counted from 1; those that there are not are left out, the last one is added.

    >>> import torch
    >>> spectrum_table(Spectrum(torch.tensor([3.0, 1.0]).double(), 5))
    [['directions', 'eigenvalue', 'share together'], ['1', '3', '75 %'], ['2', '1', '100 %']]
    """
    count, shares = len(spectrum.eigenvalues), spectrum.shares().tolist()
    shown = sorted({k for k in directions if 1 <= k <= count} | ({count} if count else set()))
    values = spectrum.eigenvalues.tolist()
    body = [[str(k), _number(values[k - 1]), percent(shares[k - 1])] for k in shown]
    return [["directions", "eigenvalue", "share together"], *body]


def class_pair_plot(view: ClassInteractions) -> Figure:
    """A heat map of the mean interactions between classes; red: they repeat each other, blue: they work against.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    count = len(view.labels)
    side = 2.4 + 0.5 * min(count, 20)
    figure = _figure("class_pair_plot", side + 1.0, side)
    axes = figure.subplots()
    known = view.values[view.values.isfinite()]
    scale = (float(known.abs().max()) if len(known) else 0.0) or 1.0
    image = axes.imshow(view.values.cpu().numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    axes.set_facecolor("0.85")
    names = [str(label) for label in view.labels]
    axes.set_xticks(range(count), names, rotation=0 if max(map(len, names)) < 4 else 90)
    axes.set_yticks(range(count), names)
    if count <= _WRITTEN:
        for a, row in enumerate(view.values.tolist()):
            for b, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 * scale else "black"
                text = "" if math.isnan(value) else f"{value / scale:.2f}"
                axes.text(b, a, text, ha="center", va="center", color=colour)
    axes.set_title(f"mean interaction between classes (1 = {scale:.2g})", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def spectrum_plot(spectrum: Spectrum) -> Figure:
    """Sizes of the eigenvalues of K, falling, and the share of the leading directions together.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = _figure("spectrum_plot", 10.0, 4.2)
    left, right = figure.subplots(1, 2)
    places = range(1, len(spectrum.eigenvalues) + 1)
    for sign, marker, label in ((1, "o", "positive"), (-1, "x", "negative")):
        pairs = [(k, abs(v)) for k, v in zip(places, spectrum.eigenvalues.tolist(), strict=True) if sign * v > 0]
        if pairs:
            left.plot(*zip(*pairs, strict=True), marker, markersize=3, label=label)
    if len(places):
        left.set_yscale("log")
        left.legend(frameon=False)
    left.set_ylabel("size of the eigenvalue")
    right.plot(places, spectrum.shares().tolist())
    right.set_ylim(0, 1.02)
    right.set_ylabel("share together")
    for axes in (left, right):
        axes.set_xlabel(f"direction, of a pool of {spectrum.num_examples} examples")
        axes.grid(alpha=0.25)
    return figure


def _figure(call: str, width: float, height: float) -> Figure:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'`{call}` needs matplotlib, which is not installed: pip install "lightning-influence[plots]"'
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _number(value: float) -> str:
    """Three digits; nothing for a mean over no pair."""
    return "" if math.isnan(value) else f"{value:.3g}"
