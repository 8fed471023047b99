from __future__ import annotations

import pytest
import torch

from lightning_influence.estimators.factors import Factors
from lightning_influence.selection import BlockGreedy, InteractionGreedy, StochasticGreedy, certify, refine
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.greedy_rule import GreedyRule, Marginals
from tests.selection.cases import clustered_pool

RULES = [
    InteractionGreedy("pruned"),
    InteractionGreedy(),
    InteractionGreedy("plain"),
    StochasticGreedy(0.5),
    BlockGreedy(3),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_autocast_changes_nothing(rule: GreedyRule) -> None:
    pool = clustered_pool(dtype=torch.float32)
    options = {"budget": 60, "ids": pool.ids}
    expected = rule.select(pool.values, pool.features, pool.metric, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rule.select(pool.values, pool.features, pool.metric, **options)
    assert found.to_dict() == expected.to_dict()


def test_autocast_changes_neither_certificate_nor_refinement() -> None:
    pool = clustered_pool(60, 5, torch.float32)
    options = {"budget": 10, "ids": pool.ids}
    selection = BlockGreedy(10).select(pool.values, pool.features, **options)
    expected = certify(selection, pool.values, pool.features, ids=pool.ids)
    refined = refine(selection, pool.values, pool.features, ids=pool.ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert certify(selection, pool.values, pool.features, ids=pool.ids).to_dict() == expected.to_dict()
        assert refine(selection, pool.values, pool.features, ids=pool.ids).to_dict() == refined.to_dict()


@pytest.mark.parametrize("call", ["select", "certify", "refine"])
def test_nothing_is_computed_under_the_autocast_of_the_caller(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pools may come out right by luck: what counts is that the rounding bounds hold, which bfloat16 breaks."""
    pool = clustered_pool(60, 5, torch.float32)
    rule = InteractionGreedy("pruned")
    selection = rule.select(pool.values, pool.features, budget=10, ids=pool.ids)
    seen: list[bool] = []
    original = Factors.products

    def products(self: Factors, directions: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(self, directions)

    blocks = Factors.blocks
    monkeypatch.setattr(Factors, "products", products)
    monkeypatch.setattr(Factors, "blocks", lambda *a: (seen.append(torch.is_autocast_enabled("cpu")), blocks(*a))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        {
            "select": lambda: rule.select(pool.values, pool.features, budget=10, ids=pool.ids),
            "certify": lambda: certify(selection, pool.values, pool.features, ids=pool.ids),
            "refine": lambda: refine(selection, pool.values, pool.features, ids=pool.ids),
        }[call]()
        assert torch.is_autocast_enabled("cpu")
    assert seen
    assert not any(seen)


def test_marginal_scores_are_those_of_the_group() -> None:
    pool = clustered_pool(40, 6)
    factors = Factors.checked("test", pool.values, pool.features, pool.metric)
    marginals, rows = Marginals(factors), torch.tensor([7, 0, 31])
    for row in (4, 9):
        marginals.add(row)
    scores, errors = marginals.scores(rows, Admission.of_rows(factors, 3))
    truth = [float(torch.stack(factors.in_order([4, 9, row])).sum(dim=0)[-1]) for row in rows.tolist()]
    assert ((scores - torch.tensor(truth, dtype=torch.float64)).abs() <= errors).all()
    assert float(errors.max()) < 1e-9


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_without_features(rule: GreedyRule) -> None:
    with pytest.raises(ValueError, match=r"expected features \[n, r\] with the interactions"):
        rule.select(torch.ones(3), budget=1)
