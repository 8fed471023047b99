from __future__ import annotations

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_exchange import Alone
from lightning_influence.selection.greedy_path import Candidates, predict
from lightning_influence.selection.greedy_plain import plain_picks
from tests.selection.cases import clustered_pool

POOL = clustered_pool(60, 8)
FACTORS = Factors.checked("test", POOL.values, POOL.features, POOL.metric, POOL.ids)


def candidates(rows: list[int]) -> Candidates:
    scores = 0.5 * FACTORS.self_interactions() - FACTORS.values
    return Candidates(POOL.features[rows], scores[rows], torch.full((len(rows),), 1e-12).double(), torch.tensor(rows))


def test_with_all_rows_as_candidates_the_path_is_the_greedy_choice() -> None:
    by_row = Factors.checked("test", POOL.values, POOL.features, POOL.metric)
    truth = list(plain_picks(by_row, 10))
    path = predict(FACTORS, FACTORS.shift([]), candidates(list(range(60))), 10, Alone())
    assert path.keys.tolist() == truth
    assert torch.equal(path.shifts, POOL.features[truth])
    for step in range(11):
        torch.testing.assert_close(path.directions[step], FACTORS.lift(FACTORS.shift(truth[:step])))


def test_limits_enclose_the_scores_of_the_predicted_picks() -> None:
    path = predict(FACTORS, FACTORS.shift([]), candidates(list(range(0, 60, 3))), 6, Alone())
    alone = 0.5 * FACTORS.self_interactions() - FACTORS.values
    for step, row in enumerate(path.keys.tolist()):
        score = float(alone[row] + POOL.features[row] @ path.directions[step])
        assert float(path.floors[step]) <= score <= float(path.limits[step])
        assert float(path.limits[step] - path.floors[step]) < 1e-8


def test_no_more_steps_than_candidates() -> None:
    assert len(predict(FACTORS, FACTORS.shift([]), candidates([4, 2]), 8, Alone())) == 2


def test_the_best_candidates_are_those_with_the_smallest_scores() -> None:
    some = candidates([5, 6, 7, 8])
    best = some.best(2, Alone())
    assert best.scores.tolist() == sorted(some.scores.tolist())[:2]
    assert torch.equal(best.features, POOL.features[best.keys])
