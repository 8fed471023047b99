"""Which components matter at which point of the training: a table, and a heat map of layers and kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from lightning_influence.estimators.component_dots import ComponentDots, Id
from lightning_influence.report.component_places import Place, Places, find_places
from lightning_influence.report.component_tables import csv_text, markdown, percent
from lightning_influence.selection.component_greedy import component_score, single_component_scores
from lightning_influence.selection.component_objective import OBJECTIVES, Objective
from lightning_influence.selection.component_pairs import ComponentPairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure: TypeAlias = Literal["accuracy", "mrr", "similarity", "norm_share"]
MEASURES: dict[str, str] = {
    "accuracy": "retrieval accuracy of one component",
    "mrr": "mean reciprocal rank of one component",
    "similarity": "correlation with the full gradient",
    "norm_share": "share of the squared gradient length",
}
_STEP = re.compile(r"step=(\d+)")
_PANELS = 4  # side by side


def component_importance(
    recordings: Sequence[ComponentDots],
    sources: Mapping[Id, Id] | Sequence[Id] | None = None,
    *,
    measure: Measure | None = None,
    labels: Sequence[str] | None = None,
    places: Places = None,
    eps: float = 0.0,
) -> ComponentImportance:
    """How much each component alone tells, at every checkpoint.

    - ``"accuracy"`` and ``"mrr"``: retrieval of the true source by cos_c alone (a tie is a miss);
    - ``"similarity"``: correlation of cos_c with the cosine of the full gradient over a query's candidates, mean over
      queries ([SP] section 3.3): whether the component ranks the candidates as all of them together do;
    - ``"norm_share"``: Σ_q δ_c(q, q) over the same of all components: how much of the gradients is in the component.

    Args:
        recordings: One for each checkpoint, in the order of the training, of the same components.
        sources: Id of the training example that each query was made from, by query id or in the order of the queries.
        measure: One of the above; None: ``"accuracy"`` with sources, ``"similarity"`` without.
        labels: Names of the checkpoints; None: their steps, as far as `ComponentDots.checkpoint` tells.
        places: Layer and kind of components: for some or all of them by name, or a function of the name; see
            `find_places` for the others. Components in one place share a cell of the heat map, which shows their mean.
        eps: ε of the cosine ([SP] section 3.1).

    Raises:
        ValueError: If there are no recordings, their components differ, a query has fewer than two candidates where
            they are ranked, sources are missing or do not fit, or an argument is none of the above.
    """
    call = "component_importance"
    first = _checked(recordings)
    chosen = measure or ("similarity" if sources is None else "accuracy")
    if chosen not in get_args(Measure):
        raise ValueError(f"`{call}(measure={measure!r})`: expected one of {get_args(Measure)}, or None.")
    if chosen in ("accuracy", "mrr") and sources is None:
        raise ValueError(
            f"`{call}(measure={chosen!r})`: expected `sources`, the id of the training example that each query was "
            "made from. Without them take measure='similarity'."
        )
    names = [_label(dots, k) for k, dots in enumerate(recordings)] if labels is None else list(labels)
    if len(names) != len(recordings):
        raise ValueError(
            f"`{call}(labels=...)`: expected one for each of {len(recordings)} recordings, got {len(names)}."
        )
    found = [_measured(dots, sources, chosen, eps) for dots in recordings]
    return ComponentImportance(
        measure=chosen,
        components=tuple(first.components),
        sizes=tuple(first.sizes),
        places=tuple(find_places(first.components, places)),
        checkpoints=tuple(names),
        values=torch.stack([values for values, _ in found]),
        whole=torch.tensor([whole for _, whole in found], dtype=torch.float64),
    )


@dataclass(frozen=True, eq=False)
class ComponentImportance:
    """What `component_importance` found.

    Attributes:
        measure: What the values are.
        components: Names of the c components.
        sizes: Number of parameters of each.
        places: Layer and kind of each.
        checkpoints: Names of the k checkpoints.
        values: Float64 [k, c].
        whole: The same measure of all components together, float64 [k].
    """

    measure: Measure
    components: tuple[str, ...]
    sizes: tuple[int, ...]
    places: tuple[Place, ...]
    checkpoints: tuple[str, ...]
    values: Tensor
    whole: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each checkpoint and component, as a data frame takes them."""
        total = sum(self.sizes)
        return [
            {
                "checkpoint": checkpoint,
                "component": name,
                "layer": place.layer,
                "kind": place.kind,
                "parameters": size,
                "share": size / total,
                self.measure: value,
            }
            for checkpoint, values in zip(self.checkpoints, self.values.tolist(), strict=True)
            for name, place, size, value in zip(self.components, self.places, self.sizes, values, strict=True)
        ]

    def csv(self) -> str:
        """`rows` as CSV."""
        return csv_text(self.rows())

    def markdown(self, top: int | None = None) -> str:
        """A table with a line for each component and a column for each checkpoint; all of them together come first.

        Args:
            top: Only so many components, those with the highest values at the last checkpoint, highest first (the best
                of many flatters itself); None: all, in the order of the model.
        """
        order = list(range(len(self.components)))
        if top is not None:
            order = sorted(order, key=lambda c: -float(self.values[-1, c]))[:top]
        whole = ["all together", "", "", "100 %", *map(_number, self.whole.tolist())]
        return markdown(
            [["component", "layer", "kind", "parameters", *self.checkpoints], whole, *map(self._cells, order)]
        )

    def grid(self) -> tuple[Tensor, list[int | None], list[str]]:
        """(values [k, layers, kinds], layers, kinds); NaN where there is no component.

        Layers ascend, with None, for components outside of them, first; kinds in the order in which they first come.
        """
        layers: list[int | None] = sorted({place.layer for place in self.places}, key=lambda k: -1 if k is None else k)
        kinds = list(dict.fromkeys(place.kind for place in self.places))
        cells = torch.zeros(len(self.checkpoints), len(layers), len(kinds), dtype=torch.float64)
        counts = torch.zeros(len(layers), len(kinds), dtype=torch.float64)
        for place, values in zip(self.places, self.values.T, strict=True):
            at = layers.index(place.layer), kinds.index(place.kind)
            cells[:, at[0], at[1]] += values
            counts[at] += 1
        return cells / counts, layers, kinds

    def heat_map(self, path: str | Path | None = None) -> Figure:
        """A panel for each checkpoint, layers upwards and kinds across, all on one scale of colours.

        Args:
            path: Where to save it as well; the suffix gives the format.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        values, layers, kinds = self.grid()
        figure, panels = _figure(len(self.checkpoints), len(layers), kinds)
        low, high = self._scale()
        for number, axes in enumerate(panels):
            if number >= len(self.checkpoints):
                axes.set_axis_off()
                continue
            image = axes.imshow(values[number].numpy(), vmin=low, vmax=high, origin="lower", aspect="auto")
            axes.set_facecolor("0.93")
            axes.set_title(self._title(number), fontsize=10)
            _ticks(axes, layers, kinds)
        bar = figure.colorbar(image, ax=panels, fraction=0.04, pad=0.02, aspect=30)
        figure.suptitle(MEASURES[self.measure], fontsize=11)
        bar.ax.tick_params(labelsize=8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _title(self, number: int) -> str:
        whole = f" (all: {_number(float(self.whole[number]))})"
        return self.checkpoints[number] + whole * (self.measure in ("accuracy", "mrr"))  # of the others it is 1

    def _scale(self) -> tuple[float, float]:
        """From 0, or the lowest where there are lower ones; to 1, or the highest of shares, which add up to 1."""
        low, high = min(0.0, float(self.values.min())), float(self.values.max())
        return low, high if self.measure == "norm_share" else 1.0

    def _cells(self, c: int) -> list[str]:
        layer, kind = self.places[c]
        share = percent(self.sizes[c] / sum(self.sizes))
        values = map(_number, self.values[:, c].tolist())
        return [self.components[c], "" if layer is None else str(layer), kind, share, *values]


def _checked(recordings: Sequence[ComponentDots]) -> ComponentDots:
    wrong = isinstance(recordings, ComponentDots) or not all(isinstance(dots, ComponentDots) for dots in recordings)
    if wrong or not recordings:
        raise ValueError("`component_importance(recordings)`: expected a list of at least one ComponentDots.")
    first = recordings[0]
    for k, dots in enumerate(recordings):
        if (dots.components, dots.sizes) != (first.components, first.sizes):
            other = sorted(set(dots.components) ^ set(first.components))[:8] or "their order or sizes"
            raise ValueError(
                f"`component_importance(recordings)`: expected the same components everywhere; recording {k} differs "
                f"from the first in {other}. `ComponentDots.only(...)` takes those that they share."
            )
    return first


def _measured(
    dots: ComponentDots, sources: Mapping[Id, Id] | Sequence[Id] | None, measure: str, eps: float
) -> tuple[Tensor, float]:
    """([c], of all together)."""
    if measure not in OBJECTIVES:
        squares = dots.query_squares.double().sum(1).cpu()
        return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny), 1.0
    candidates = dots.candidates()
    few = [name for name, ids in zip(dots.query_ids, candidates, strict=True) if len(ids) < 2]
    if few:
        raise ValueError(
            f"`component_importance(measure={measure!r})`: expected at least two candidates for every query, to have "
            f"something to rank; {len(few)} of {len(candidates)} have fewer (queries {few[:8]}). Record more, or take "
            "measure='norm_share'."
        )
    wanted = [ids[0] for ids in candidates] if sources is None else sources  # similarity looks at no source
    pairs = ComponentPairs.from_dots(dots, wanted)
    objective = cast(Objective, measure)
    alone = single_component_scores(pairs, objective, eps=eps)
    return alone, component_score(pairs, pairs.components, objective, eps=eps)


def _label(dots: ComponentDots, k: int) -> str:
    """The step in the name of the checkpoint, else its name."""
    if dots.checkpoint is None:
        return f"checkpoint {k + 1}"
    step = _STEP.findall(dots.checkpoint)
    return f"step {step[-1]}" if step else Path(dots.checkpoint).stem


def _number(value: float) -> str:
    return f"{value:.3f}"


def _figure(panels: int, layers: int, kinds: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            '`heat_map` needs matplotlib, which is not installed: pip install "lightning-influence[plots]"'
        ) from None
    down = -(-panels // _PANELS)
    across = -(-panels // down)
    longest = max(map(len, kinds))  # written upwards below the panel
    width, height = 1.4 + across * (0.7 + 0.25 * max(len(kinds), 6)), 0.8 + 0.08 * longest + 0.2 * max(layers, 8)
    figure = Figure(figsize=(width, 0.4 + down * height), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    return figure, list(axes.flatten())


def _ticks(axes: Axes, layers: Sequence[int | None], kinds: Sequence[str]) -> None:
    step = -(-len(layers) // 16)
    shown = [k for k, layer in enumerate(layers) if layer is None or layer % step == 0]
    axes.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=8)
    axes.set_yticks(shown, ["none" if layers[k] is None else str(layers[k]) for k in shown], fontsize=8)
    axes.tick_params(labelbottom=True, length=2)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("layer")
