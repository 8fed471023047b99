"""A picture of selections: the target loss over their sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_influence.evaluation.selection_curves import SelectionCurves
from lightning_influence.report.component_plots import COLOURS, GREY, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def selection_plot(curves: SelectionCurves, ylabel: str = "target loss") -> Figure:
    """Mean target loss of every method over the size, with 95 % intervals over the seeds; the baseline is grey.

    Args:
        curves: From `selection_curves`.
        ylabel: What the loss is.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            '`selection_plot` needs matplotlib, which is not installed: pip install "lightning-influence[plots]"'
        ) from None
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for row, method in enumerate(curves.methods):
        points = [curves.point(method, size) for size in curves.sizes]
        known = all(math.isfinite(end) for point in points for end in point.interval)
        axes.errorbar(
            curves.sizes,
            [point.mean for point in points],
            yerr=[point.mean - point.interval[0] for point in points] if known else None,
            color=GREY if method == curves.baseline else COLOURS[row % len(COLOURS)],
            marker=MARKERS[row % len(MARKERS)],
            capsize=3,
            linewidth=1.2,
            label=method,
        )
    axes.set_xscale("log")
    axes.set_xticks(curves.sizes, [str(size) for size in curves.sizes])
    axes.minorticks_off()
    axes.set_xlabel("rows selected (log scale)")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
