from __future__ import annotations

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import greedy_sweep
from lightning_influence.selection.greedy_exchange import Alone
from lightning_influence.selection.greedy_path import Candidates, predict
from lightning_influence.selection.greedy_sweep import Sweep, sweep_dtype
from tests.selection.cases import clustered_pool

N = 90


@pytest.mark.parametrize("columns", [512, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_winners_are_kept_and_lower_ends_hold(
    dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_sweep, "_COLUMNS", columns)
    pool = clustered_pool(N, 10, dtype)
    factors = Factors.checked("test", pool.values, pool.features, pool.metric)
    alone, keys, rows = 0.5 * factors.self_interactions() - factors.values, torch.arange(N), torch.arange(N)
    errors = 1e-10 * torch.ones(N).double()
    some = Candidates(pool.features[::2].double(), alone[::2], errors[::2], keys[::2])
    path = predict(factors, factors.shift([]), some, 6, Alone())
    sweep = Sweep(factors, path, alone, keys, sweep_dtype(pool.features, 1.0), N)
    lowest = torch.cat([sweep.evaluate(part, factors.norms()[part], errors[part]) for part in rows.split(20)])
    found = sweep.found()
    assert sweep.kept_steps == [6, 0, 1, 2, 3, 4, 5]
    for place, step in enumerate(sweep.kept_steps):
        if place == 0 or step in found[:, 0]:
            truth = alone + pool.features.double() @ path.directions[step]
            assert (lowest[:, place] <= truth).all()
            torch.testing.assert_close(lowest[:, place], truth, atol=1e-2, rtol=1e-4)
    for step in found[:, 0].unique().int().tolist():
        scores = alone + pool.features.double() @ path.directions[step]
        scores[path.keys[:step]] = torch.inf
        here = found[found[:, 0] == step]
        assert int(here[here[:, 4] <= here[:, 4].min() + 1e-9][:, 2].min()) == int(
            (scores <= scores.min() + 1e-9).nonzero()[0]
        )
        torch.testing.assert_close(here[:, 4], scores[here[:, 1].long()])
        assert torch.equal(here[:, 3], pool.values[here[:, 1].long()])


def test_fewer_scores_are_kept_where_they_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = clustered_pool(N, 10, torch.float32)
    factors = Factors.checked("test", pool.values, pool.features, pool.metric)
    alone, keys = 0.5 * factors.self_interactions() - factors.values, torch.arange(N)
    some = Candidates(pool.features.double(), alone, 1e-10 * torch.ones(N).double(), keys)
    path = predict(factors, factors.shift([]), some, 6, Alone())
    monkeypatch.setattr(greedy_sweep, "_LEAST_MEMORY", 0)
    monkeypatch.setattr(greedy_sweep, "_MEMORY", 0.5)  # 1800 bytes
    for count, kept in ((56, [6, 0, 2, 4]), (75, [6, 0, 3]), (90, [6, 0]), (1000, [6, 0]), (0, [6, 0, 1, 2, 3, 4, 5])):
        assert Sweep(factors, path, alone, keys, torch.float32, count).kept_steps == kept


def test_float32_only_where_it_is_safe() -> None:
    assert sweep_dtype(torch.zeros(1, 1).half(), 1.0) == torch.float32
    assert sweep_dtype(torch.zeros(1, 1).half(), 0.0) == torch.float64
    assert sweep_dtype(torch.zeros(1, 1), 1e20) == torch.float64
    assert sweep_dtype(torch.zeros(1, 1).double(), 1.0) == torch.float64
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert sweep_dtype(torch.zeros(1, 1), 1.0) == torch.float64
    finally:
        torch.set_float32_matmul_precision(precision)
