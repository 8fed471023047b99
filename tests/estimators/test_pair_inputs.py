from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_influence import ClassificationLoss, ExampleLoader, LanguageModelLoss
from lightning_influence.estimators.pair_inputs import Side, checked_pairs, positions
from tests.curvature.models import points, texts

QUERIES, TRAIN = ExampleLoader(list(range(2))), ExampleLoader(list(range(50)), indices=[40, 7, 20, 30])


@pytest.mark.parametrize("candidates", [[[20, 40], [30]], [torch.tensor([20, 40]), torch.tensor([30])]])
def test_pairs_count_rows_among_what_occurs(candidates: Any) -> None:
    assert checked_pairs("f()", candidates, QUERIES, TRAIN) == ([(0, 1), (0, 0), (1, 2)], [40, 20, 30])


def test_a_tensor_of_candidates() -> None:
    pairs, ids = checked_pairs("f()", torch.tensor([[7, 40], [7, 30]]), QUERIES, TRAIN)
    assert (pairs, ids) == ([(0, 1), (0, 0), (1, 1), (1, 2)], [40, 7, 30])


@pytest.mark.parametrize(
    ("candidates", "text"),
    [
        ([[7]], "one list for each of 2 queries, got 1"),
        ([[7], []], r"1 without a candidate \(queries \[1\]\)"),
        ([[7], [8]], r"1 with ids that are not in the training data \(queries \[1\]\)"),
        ([[7, 20, 7], [20]], r"1 with an id twice \(queries \[0\]\)"),
        ([[], [9, 9]], r"without a candidate \(queries \[0\]\); 1 with ids .*\[1\]\); 1 with an id twice"),
    ],
)
def test_candidates_that_cannot_be_are_all_named(candidates: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"`f\(\)`: expected .*" + text):
        checked_pairs("f()", candidates, QUERIES, TRAIN)


def test_lengths_are_those_of_the_mask() -> None:
    rows = texts(6)
    side = Side(ExampleLoader(rows, 4), LanguageModelLoss())
    assert side.lengths() == [int(row["attention_mask"].sum()) for row in rows]


def test_lengths_without_a_mask_are_those_of_the_tokens() -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in texts(3)]
    assert Side(ExampleLoader(rows), LanguageModelLoss()).lengths() == [6, 6, 6]
    assert Side(ExampleLoader(points(4)), ClassificationLoss()).lengths() == [1] * 4
    assert positions((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))) == 1


def test_batches_are_of_rows_and_carry_ids() -> None:
    side = Side(ExampleLoader(points(9), indices=[5, 3, 8]), ClassificationLoss())
    ids, (x, _) = side.batch([2, 0])
    assert ids.tolist() == [8, 5]
    assert torch.equal(x, torch.stack([points(9)[8][0], points(9)[5][0]]))
