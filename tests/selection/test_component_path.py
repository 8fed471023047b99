from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from torch import nn

from lightning_influence.capture.component import find_components
from lightning_influence.selection.component_path import ComponentPath, ComponentSelection

FORWARD = ComponentPath(
    components=("a", "b", "c"),
    order=("c", "a", "b"),
    scores=(0.5, 0.75, 0.75),
    shares=(0.2, 0.4, 1.0),
    whole=0.75,
    objective="accuracy",
    direction="forward",
)
BACKWARD = ComponentPath(("a", "b", "c"), ("b", "a"), (0.75, 0.5), (0.4, 0.2), 0.75, "accuracy", "backward")


def test_best_is_the_smallest_of_the_best():
    assert FORWARD.best == ComponentSelection(("c", "a"), 0.75, 0.4, "accuracy")
    assert BACKWARD.best == ComponentSelection(("a", "c"), 0.75, 0.4, "accuracy")


def test_best_overlooks_rounding():
    assert replace(FORWARD, scores=(0.75, 0.75 + 1e-15, 0.7)).best.names == ("c",)


def test_removing_nothing_may_be_best():
    path = replace(BACKWARD, whole=0.8)
    assert path.best == ComponentSelection(("a", "b", "c"), 0.8, 1.0, "accuracy")
    assert replace(path, order=(), scores=(), shares=()).best.names == ("a", "b", "c")


def test_every_step():
    assert [FORWARD.after(step).names for step in (1, 2, 3)] == [("c",), ("c", "a"), ("c", "a", "b")]
    assert [BACKWARD.after(step).names for step in (0, 1, 2)] == [("a", "b", "c"), ("a", "c"), ("c",)]
    assert [BACKWARD.after(step).score for step in (0, 1, 2)] == [0.75, 0.75, 0.5]
    assert len(FORWARD) == 3


@pytest.mark.parametrize(("path", "steps", "first"), [(FORWARD, 0, 1), (FORWARD, 4, 1), (BACKWARD, -1, 0)])
def test_steps_that_there_are_not(path, steps, first):
    message = f"`ComponentPath.after(steps={steps})`: expected an int from {first} to {len(path)}."
    with pytest.raises(ValueError, match=re.escape(message)):
        path.after(steps)


@pytest.mark.parametrize("record", [FORWARD, BACKWARD, FORWARD.best])
def test_there_and_back_through_json(record):
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_other_fields_are_refused():
    values = FORWARD.best.to_dict() | {"colour": "red"}
    del values["score"]
    with pytest.raises(ValueError, match=r"`ComponentSelection.from_dict`.* Missing or unknown: colour, score\."):
        ComponentSelection.from_dict(values)


def test_a_selection_is_what_find_components_takes():
    layers = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2), "up_proj": nn.Linear(2, 2)})
    selection = ComponentSelection(("up_proj", "q_proj"), 1.0, 0.5, "accuracy")
    assert [component.name for component in find_components(layers, selection)] == ["q_proj", "up_proj"]
    assert len(selection) == 2
    assert "q_proj" in selection
