"""A choice of components goes wherever the package takes components, and everything runs on these alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import (
    EKFAC,
    ComponentPairs,
    ComponentSelection,
    CurvatureRecorder,
    FactoredProjection,
    GradientDot,
    GradientDotRecorder,
    InfluenceFunction,
    LoGra,
    ProjectedDot,
    find_components,
    greedy_components,
    select_training_data,
)
from tests.capture import models
from tests.capture.models import take, text


def rows(n: int) -> list[dict[str, Tensor]]:
    batch = text(n)
    return [{key: value[0] for key, value in take(batch, [k]).items()} for k in range(n)]


TRAIN, TARGETS = rows(6), rows(2)


@pytest.fixture(scope="module")
def chosen() -> ComponentSelection:
    """From products of the rows with themselves, as a user would get it."""
    model = models.llama(num_hidden_layers=12)
    dots = GradientDot(model, components="all-linear").pairs(TRAIN[:4], TRAIN, [[k, (k + 1) % 6] for k in range(4)])
    path = greedy_components(ComponentPairs.from_dots(dots, list(range(4))))
    assert path.best.names == path.order[: len(path.best)]
    picked = ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj")  # layers 10 and 11 are none of them
    return ComponentSelection(picked, path.best.score, path.best.share, path.best.objective)


USES: dict[str, Callable[[Any, Any], list[str]]] = {
    "find_components": lambda model, chosen: [c.name for c in find_components(model, chosen)],
    "EKFAC": lambda model, chosen: [c.name for c in EKFAC().fit(model, TRAIN, components=chosen).components],
    "InfluenceFunction": lambda model, chosen: list(
        InfluenceFunction(model, EKFAC(), components=chosen)
        .fit(TRAIN)
        .score(TRAIN[:2], TRAIN, per_component=True)
        .components
    ),
    "GradientDot": lambda model, chosen: list(GradientDot(model, components=chosen).pairs(TRAIN[:1], TRAIN).components),
    "LoGra": lambda model, chosen: list(ProjectedDot(model, LoGra((2, 2)), components=chosen).sizes),
    "FactoredProjection": lambda model, chosen: list(
        ProjectedDot(model, FactoredProjection(8), components=chosen).sizes
    ),
    "CurvatureRecorder": lambda model, chosen: [
        c.name for c in find_components(model, CurvatureRecorder(components=chosen).components)
    ],
    "GradientDotRecorder": lambda model, chosen: [
        c.name for c in find_components(model, GradientDotRecorder(TRAIN, components=chosen).components)
    ],
}


@pytest.mark.parametrize("use", USES)
def test_everything_runs_on_the_chosen_components(use: str, chosen: ComponentSelection) -> None:
    model = models.llama(num_hidden_layers=12)
    assert sorted(USES[use](model, chosen)) == sorted(chosen)


def test_a_selection_of_rows_by_chosen_components(chosen: ComponentSelection) -> None:
    model = models.llama(num_hidden_layers=12)
    by_choice = select_training_data(model, TRAIN, TARGETS, budget=2, components=chosen, progress=False)
    by_names = select_training_data(model, TRAIN, TARGETS, budget=2, components=list(chosen), progress=False)
    assert by_choice.ids == by_names.ids
    assert torch.equal(by_choice.gains, by_names.gains)
