"""Pictures of selections: the target loss over their sizes, where their predicted gains run out, held-out targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_influence.evaluation.selection_curves import SelectionCurves
from lightning_influence.report.component_plots import COLOURS, GREY, MARKERS
from lightning_influence.selection import HeldOutChoice, Selection, gain_curve

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
    figure = _figure("selection_plot")
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


def saturation_plot(selections: Mapping[str, Selection]) -> Figure:
    """Share of its largest predicted gain that each selection has after every pick (`gain_curve`).

    A curve that is flat long before its end belongs to a weight or ridge at which the later rows do nothing, or undo
    what the first did too much of; one that is straight to rows that do not know of each other.

    Args:
        selections: By name.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = _figure("saturation_plot")
    axes = figure.subplots()
    for place, (name, selection) in enumerate(selections.items()):
        curve = [0.0, *gain_curve(selection).tolist()]
        axes.plot(range(len(curve)), curve, color=COLOURS[place % len(COLOURS)], linewidth=1.4, label=name)
    axes.set_xlabel("rows picked")
    axes.set_ylabel("share of the largest predicted gain")
    axes.grid(alpha=0.25)
    if selections:
        axes.legend(frameon=False)
    return figure


def held_out_targets_plot(choice: HeldOutChoice) -> Figure:
    """What each candidate explains of held-out targets after every pick (`HeldOutChoice`), the best one in bold.

    Args:
        choice: From `held_out_ridge`, `held_out_weight` or `held_out_pool`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = _figure("held_out_targets_plot")
    axes = figure.subplots()
    for place, (candidate, explained) in enumerate(zip(choice.candidates, choice.explained.tolist(), strict=True)):
        label = candidate if isinstance(candidate, str) else f"{candidate:.3g}"
        width = 2.8 if candidate == choice.best else 1.0
        curve = [0.0, *explained]
        axes.plot(range(len(curve)), curve, color=COLOURS[place % len(COLOURS)], linewidth=width, label=label)
    axes.set_ylim(min(0.0, 1.1 * float(choice.explained[:, -1].max())) - 0.05, 1.05)  # overshoots may be of any size
    axes.set_xlabel("rows picked")
    axes.set_ylabel("share of the held-out targets' loss that is explained")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _figure(call: str) -> Figure:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'`{call}` needs matplotlib, which is not installed: pip install "lightning-influence[plots]"'
        ) from None
    return Figure(figsize=(6.4, 4.8), layout="constrained")
