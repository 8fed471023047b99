"""Pictures of the retrieval benchmark: accuracy by depth, and over the share of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_influence.evaluation.kinds import kind_of
from lightning_influence.evaluation.retrieval_report import RetrievalReport
from lightning_influence.report.component_curves import ShareCurve
from lightning_influence.report.component_tables import layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^vDPX*<>"
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # without the grey one
GREY = "0.35"


def depth_plot(report: RetrievalReport) -> Figure:
    """Accuracy of each single component by layer, a line for each kind and a panel for each setting.

    Components outside the layers are horizontal lines; beside them are the full gradient and chance.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    settings = list(report.choices)
    figure, panels = _figure("depth_plot", len(settings))
    from matplotlib.ticker import MaxNLocator  # it is there now

    for setting, axes in zip(settings, panels, strict=True):
        series: dict[str, list[tuple[int | None, float]]] = {}
        for line in report.lines:
            if (line.setting, line.group) == (setting, "component"):
                series.setdefault(kind_of(line.name), []).append((layer_of(line.name), line.accuracy))
        for number, (kind, points) in enumerate(series.items()):
            _depth(axes, kind, points, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
        _references(axes, report, setting)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        _finish(axes, setting, "retrieval accuracy of one component")
    _legend(figure, panels)
    return figure


def share_plot(
    report: RetrievalReport,
    curves: Mapping[str, Sequence[ShareCurve]],
    points: Mapping[str, Sequence[ShareCurve]],
) -> Figure:
    """Accuracy over the share of the parameters: curves of greedy choices, and points such as projections.

    Args:
        report: From `evaluate_retrieval`, for the full gradient and chance.
        curves: By setting; drawn as steps, with a band where there are intervals.
        points: By setting; drawn with error bars where there are intervals.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    settings = list(report.choices)
    figure, panels = _figure("share_plot", len(settings))
    for setting, axes in zip(settings, panels, strict=True):
        for number, curve in enumerate(curves.get(setting, ())):
            _steps(axes, curve, COLOURS[number % len(COLOURS)], band=number == 0)
        for number, point in enumerate(points.get(setting, ())):
            _points(axes, point, COLOURS[(number + 3) % len(COLOURS)], MARKERS[number % len(MARKERS)])
        _references(axes, report, setting)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("share of the parameters, % (log scale)")
        _finish(axes, setting, "retrieval accuracy")
    _legend(figure, panels)
    return figure


def _figure(call: str, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'`{call}` needs matplotlib, which is not installed: pip install "lightning-influence[plots]"'
        ) from None
    figure = Figure(figsize=(max(6.4, 5.2 * panels), 5.2), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _depth(axes: Axes, kind: str, points: Sequence[tuple[int | None, float]], colour: str, marker: str) -> None:
    within = sorted((layer, value) for layer, value in points if layer is not None)
    if within:
        layers, values = zip(*within, strict=True)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}
        axes.plot(layers, values, label=kind, **style)
    for layer, value in points:
        if layer is None:
            axes.axhline(value, color=colour, linestyle="-.", linewidth=1.2, label=f"{kind} (no layer)")


def _steps(axes: Axes, curve: ShareCurve, colour: str, band: bool) -> None:
    shares = [100 * share for share in curve.shares]
    axes.step(shares, curve.values, where="post", color=colour, linewidth=1.6, label=curve.label)
    if band and curve.intervals is not None:
        low, high = zip(*curve.intervals, strict=True)
        axes.fill_between(
            shares, low, high, step="post", color=colour, alpha=0.15, linewidth=0, label=f"95 % of {curve.label}"
        )


def _points(axes: Axes, point: ShareCurve, colour: str, marker: str) -> None:
    errors = None
    if point.intervals is not None:
        ends = zip(point.values, point.intervals, strict=True)
        errors = list(zip(*[(max(0.0, v - low), max(0.0, high - v)) for v, (low, high) in ends], strict=True))
    shares = [100 * share for share in point.shares]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linestyle": "none"}
    axes.errorbar(shares, point.values, yerr=errors, label=point.label, zorder=3, **style)


def _references(axes: Axes, report: RetrievalReport, setting: str) -> None:
    for group, style in (("full gradient", "--"), ("chance", ":")):
        value = report.line(group, setting=setting).accuracy
        axes.axhline(value, color=GREY, linestyle=style, linewidth=1.2, label=group)


def _finish(axes: Axes, title: str, measured: str) -> None:
    axes.set_title(title)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel(measured)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False)
