from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.capture import find_components
from lightning_influence.estimators import Scores
from lightning_influence.store import Store

LABELS: dict[str, Any] = {"query_ids": (7, 9), "train_ids": (0, 2, 4), "formula": "<g_q, g_i>", "reduction": "sum"}


def total() -> Scores:
    return Scores(torch.tensor([[1.0, 3.0, 3.0], [-1.0, -2.0, 0.0]]), **LABELS, damping="0.1")


def apart() -> Scores:
    return Scores(torch.arange(12.0).reshape(2, 2, 3), **LABELS, components=("up", "down"), checkpoint="last.ckpt")


def test_components_add_up() -> None:
    assert torch.equal(total().total(), total().values)
    assert torch.equal(apart().total(), apart().values[0] + apart().values[1])
    assert torch.equal(apart().total(["down"]), apart().values[1])
    assert torch.equal(apart().total(["down", "up"]), apart().total())
    assert torch.equal(apart().total([]), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("scores", "components", "shown"),
    [
        (apart(), ["up", "head"], r"\['head'\]\)`: expected names among \['up', 'down'\], each once"),
        (apart(), ["up", "up"], r"\['up', 'up'\]\)`: expected names among"),
        (total(), ["up"], r"\['up'\]\)`: expected names among \[\], each once. Scores hold components when they were"),
    ],
)
def test_unknown_components(scores: Scores, components: list[str], shown: str) -> None:
    with pytest.raises(ValueError, match=rf"`Scores.total\(components={shown}"):
        scores.total(components)


@pytest.mark.parametrize("changes", [{"query_ids": (1,)}, {"train_ids": ()}, {"components": ("up",)}])
def test_labels_must_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`Scores\(values=\(2, 3\)\)`: expected \(.*\) from the labels"):
        Scores(total().values, **{**LABELS, **changes})


def test_top() -> None:
    assert total().top(2) == [(2, 3.0), (4, 3.0)]
    assert total().top(1, query=1) == [(4, 0.0)]
    assert total().top(9, query=1) == [(4, 0.0), (0, -1.0), (2, -2.0)]
    assert total().top(2, query=1, harmful=True) == [(2, -2.0), (0, -1.0)]
    assert apart().top(1, query=-1) == [(4, 16.0)]


def test_repr_is_short() -> None:
    assert repr(total()) == (
        "Scores(2 queries x 3 training examples, formula='<g_q, g_i>', reduction='sum', damping='0.1')"
    )
    assert repr(apart()) == (
        "Scores(2 queries x 3 training examples of 2 components, formula='<g_q, g_i>', reduction='sum', "
        "checkpoint='last.ckpt')"
    )


def test_at_a_checkpoint() -> None:
    scores = total().at("epoch=3.ckpt")
    assert scores.checkpoint == "epoch=3.ckpt"
    assert scores.values is not None
    assert total().checkpoint is None


@pytest.mark.parametrize("scores", [total(), apart(), Scores(torch.zeros(1, 1).double(), ("q",), ("a",), "f", "mean")])
def test_a_store_gives_them_back(scores: Scores, tmp_path: Any) -> None:
    model = nn.Linear(2, 1)
    scores.save(Store.create(tmp_path, model, find_components(model)), "influence")
    found = Scores.load(Store.open(tmp_path), "influence")
    assert torch.equal(found.values, scores.values)
    assert repr(found) == repr(scores)
    assert (found.query_ids, found.train_ids) == (scores.query_ids, scores.train_ids)
    assert (found.components, found.checkpoint) == (scores.components, scores.checkpoint)
