"""Tables and pictures of what was measured."""

from __future__ import annotations

from lightning_influence.report.component_curves import ShareCurve, held_out_curve, path_curve, prefix_ranks
from lightning_influence.report.component_importance import ComponentImportance, component_importance
from lightning_influence.report.component_plots import depth_plot, share_plot
from lightning_influence.report.component_tables import (
    best_line,
    csv_text,
    kind_table,
    layer_of,
    markdown,
    method_table,
)
from lightning_influence.report.interaction_views import (
    class_pair_plot,
    class_pair_table,
    spectrum_plot,
    spectrum_table,
)
from lightning_influence.report.selection_plot import held_out_targets_plot, saturation_plot, selection_plot

__all__ = [
    "ComponentImportance",
    "ShareCurve",
    "best_line",
    "class_pair_plot",
    "class_pair_table",
    "component_importance",
    "csv_text",
    "depth_plot",
    "held_out_curve",
    "held_out_targets_plot",
    "kind_table",
    "layer_of",
    "markdown",
    "method_table",
    "path_curve",
    "prefix_ranks",
    "saturation_plot",
    "selection_plot",
    "share_plot",
    "spectrum_plot",
    "spectrum_table",
]
