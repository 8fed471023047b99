from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_influence.capture import find_components
from lightning_influence.estimators.less import less_scores
from lightning_influence.estimators.scores import Scores
from lightning_influence.store import Store


def recorded(path: Path, values: torch.Tensor, rate: float | None, **labels: object) -> Path:
    model = nn.Linear(2, 1)
    store = Store.create(path, model, find_components(model), **labels)
    Scores(values, (0, 1), ("a", "b", "c"), "cos", "mean").save(store)
    if rate is not None:
        store.write_json("mean_learning_rate", {"mean": rate if rate >= 0 else None, "steps": 3})
    return path


def test_checkpoints_are_weighted_by_their_mean_rate(tmp_path: Path) -> None:
    tables = [torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    rates = [2e-5, 1e-5, 0.0]
    paths = [recorded(tmp_path / str(k), t, r) for k, (t, r) in enumerate(zip(tables, rates, strict=True))]
    found = less_scores(paths)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for table, rate in zip(tables, rates, strict=True):
        for q in range(2):
            for i in range(3):
                expected[q, i] += rate * float(table[q, i])
    torch.testing.assert_close(found.values, expected)
    assert found.train_ids == ("a", "b", "c")
    assert found.formula == "sum over checkpoints of mean learning rate x cos"
    torch.testing.assert_close(less_scores(paths, [1, 0, 0]).values, tables[0].double())


def test_a_rate_that_is_missing(tmp_path: Path) -> None:
    paths = [recorded(tmp_path / "a", torch.ones(2, 3), None), recorded(tmp_path / "b", torch.ones(2, 3), -1)]
    for path in paths:
        with pytest.raises(ValueError, match=re.escape("has no mean learning rate: it is no recording of a")):
            less_scores([path])
    assert less_scores(paths, [1.0, 2.0]).values.unique().tolist() == [3.0]
    with pytest.raises(ValueError, match="expected a rate"):
        less_scores(paths, [1.0])
