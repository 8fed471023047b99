from __future__ import annotations

import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection.greedy_ties import ROUNDING, magnitudes, metric_size, smallest


def test_of_scores_within_their_errors_the_smallest_key_wins() -> None:
    scores, errors = torch.tensor([0.0, 0.1, 1.0]), torch.tensor([0.06, 0.06, 0.06])
    assert smallest(scores, errors, torch.tensor([2, 1, 0])) == 1
    assert smallest(scores, errors / 2, torch.tensor([2, 1, 0])) == 0


def test_self_interactions_stay_within_the_magnitudes() -> None:
    generator = torch.Generator().manual_seed(0)
    features, half = (torch.randn(*shape, generator=generator).double() for shape in ((20, 5), (5, 5)))
    pool = Factors.checked("test", torch.zeros(20), features, half + half.T)
    sizes = magnitudes(pool.values, pool.norms(), metric_size(pool))
    assert (0.5 * pool.self_interactions().abs() <= sizes).all()
    assert 0 < ROUNDING < 1e-13
