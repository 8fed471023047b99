from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import EKFAC
from lightning_influence.capture import ExampleLoader, LanguageModelLoss
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.selection import Constraints, InteractionGreedy, Random, TokenBudget, TopK
from lightning_influence.selection.pipeline import select_training_data
from lightning_influence.selection.terms import expected_rows, in_numbers, token_counts
from tests.curvature.models import Tokens, ready, texts


class Batches:
    """Rows that come as they are."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        return self.rows[position]


def row(*labels: int, padding: int = 0) -> dict[str, Tensor]:
    mask = torch.tensor([1] * (len(labels) - padding) + [0] * padding)
    return {"input_ids": torch.tensor(labels).abs(), "labels": torch.tensor(labels), "attention_mask": mask}


def counted(of: Any, *rows: dict[str, Tensor]) -> dict[Any, int]:
    return token_counts("select", ExampleLoader(Batches(*rows), 2), LanguageModelLoss(), of)


def test_tokens_with_a_target_and_all_that_are_not_padding() -> None:
    rows = row(-100, -100, 5, 6), row(-100, 5, 6, 7), row(4, 5, -100, -100, padding=2)
    assert counted("supervised", *rows) == {0: 2, 1: 3, 2: 1}
    assert counted("total", *rows) == {0: 4, 1: 4, 2: 2}
    bare = [{name: found[name] for name in ("input_ids", "labels")} for found in rows]
    assert counted("total", *bare) == {0: 4, 1: 4, 2: 4}


def test_batches_that_do_not_say_what_a_token_is() -> None:
    with pytest.raises(ValueError, match=re.escape("`select(budget)`: expected batches with an 'attention_mask' or")):
        counted("total", {"x": torch.ones(3), "labels": torch.ones(3).long()})


def test_about_how_many_rows_a_budget_is_good_for() -> None:
    assert expected_rows(7, [0, 1]) == 7
    counts = [1, 2, 3, 6]
    assert expected_rows(TokenBudget(6, counts=counts), [0, 1, 2, 3]) == 2
    assert expected_rows(TokenBudget(1, counts=counts), [0, 1, 2, 3]) == 1
    assert expected_rows(TokenBudget(0.5, counts=counts), [0, 1, 2, 3]) == 2
    assert expected_rows(TokenBudget(99, counts=counts), [0, 1, 2, 3]) == 4


def test_a_share_of_the_tokens_is_a_number_of_them() -> None:
    share, number = TokenBudget(0.5, counts=[1, 2, 3, 6]), TokenBudget(7, counts=[1, 2])
    found = in_numbers(share, range(4))
    assert isinstance(found, TokenBudget)
    assert (found.tokens, found.counts, in_numbers(5, []), in_numbers(number, [])) == (6, share.counts, 5, number)


X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] > 0).long()
POOL = list(zip(X, Y, strict=True))
GOALS = [(x + 0.01, y) for x, y in POOL[:6]]


def selected(budget: Any = 6, pool: Any = POOL, targets: Any = GOALS, **options: Any) -> Any:
    torch.manual_seed(0)
    return select_training_data(nn.Linear(4, 2).double(), pool, targets, budget=budget, progress=False, **options)


@pytest.mark.parametrize("rule", [None, TopK(), Random(2), "newton"])
def test_constraints_reach_the_rule_of_the_pipeline(rule: Any) -> None:
    limits = Constraints(
        must_include=[20, 3],
        exclude=range(8, 12),
        sources=[k % 3 for k in range(24)],
        min_per_source=2,
        max_per_source=2,
    )
    found = selected(rule=rule, constraints=limits)
    assert found.ids[:2] == (20, 3)
    assert found.positions == found.ids
    assert not set(found.ids) & set(range(8, 12))
    assert sorted(k % 3 for k in found.ids) == [0, 0, 1, 1, 2, 2]
    assert found.ids != selected(rule=rule).ids


@pytest.mark.parametrize("rule", [None, TopK(), "newton"])
def test_it_may_stop_before_the_budget(rule: Any) -> None:
    found = selected(24, rule=rule, constraints=Constraints(stop_if_negative_gain=True))
    assert 0 < len(found) < 24
    assert (found.gains <= 0).all()
    assert found.ids == selected(24, rule=rule).ids[: len(found)]


@pytest.mark.parametrize("of", ["supervised", "total"])
@pytest.mark.parametrize("rule", [None, "newton"])
def test_tokens_are_counted(of: Any, rule: Any) -> None:
    model, pool, targets = ready(Tokens()), texts(20, seed=3), texts(3, seed=5)
    options = {"rule": rule, "curvature": EKFAC(fisher="empirical"), "progress": False}
    found = select_training_data(model, pool, targets, budget=TokenBudget(25, of), **options)
    counts = token_counts("", ExampleLoader(pool), LanguageModelLoss(), of)
    assert 0 < sum(counts[k] for k in found.ids) <= 25
    left = min(counts[k] for k in counts if k not in found.ids)
    assert sum(counts[k] for k in found.ids) + left > 25
    given = select_training_data(model, pool, targets, budget=TokenBudget(25, counts=counts), **options)
    assert given.ids == found.ids


def test_rows_are_equal_if_their_data_are() -> None:
    pool = [*POOL, POOL[4], POOL[4]]
    once = selected(24, pool, constraints=Constraints(duplicates="first"))  # without a warning
    assert sorted(once.ids) == list(range(24))
    kept = selected(24, pool, constraints=Constraints(duplicates="first", must_include=[25]))
    assert sorted(kept.ids) == [k for k in range(24) if k != 4] + [25]
    with pytest.raises(ValueError, match=r"2 of 26 rows repeat another: ids 24, 25"):
        selected(24, pool, constraints=Constraints(duplicates="refuse"))


def test_rows_of_the_target_set_are_refused_or_left_out_on_request() -> None:
    targets = [*GOALS, POOL[7]]
    with pytest.warns(UserWarning, match="1 of 24 pool rows also stand in the target set"):
        assert 7 in selected(24, targets=targets).ids
    message = (
        "`select_training_data(leaks='refuse')`: 1 of 24 pool rows also stand in the target set (ids [7]). Take them "
        "out of one of the two, or pass leaks='exclude'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        selected(24, targets=targets, leaks="refuse")
    assert sorted(selected(23, targets=targets, leaks="exclude").ids) == [k for k in range(24) if k != 7]
    assert sorted(selected(2, targets=targets, leaks="exclude", constraints=Constraints(exclude=[7])).ids)
    with pytest.raises(ValueError, match="every row of the pool has no supervised target or also stands in the target"):
        selected(1, [POOL[7]], targets, leaks="exclude")
    with pytest.raises(ValueError, match=r"must_include names rows that are left out of the pool, id 7: they have"):
        selected(2, targets=targets, leaks="exclude", constraints=Constraints(must_include=[7]))
    with pytest.raises(ValueError, match=re.escape("(leaks='drop')`: expected 'warn', 'refuse' or 'exclude'.")):
        selected(leaks="drop")


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (6, {"exclude": range(20)}, "only 4 rows may be picked, fewer than the budget of 6"),
        (6, {"must_include": [24]}, "must_include names rows that are not in the pool: id 24"),
        (6, {"sources": [0] * 24, "max_per_source": 5}, "only 5 rows may be picked"),
        (6, {"sources": [0] * 20, "max_per_source": 5}, "of 4 of 24 rows there is none: ids 20, 21, 22, 23"),
        (
            TokenBudget(3),
            {"must_include": [0, 1, 2, 3]},
            "the rows of must_include have 4 tokens, more than the budget",
        ),
        (TokenBudget(3, of="total"), {}, "expected batches with an 'attention_mask' or 'input_ids'"),
    ],
)
def test_what_cannot_be_met_is_refused_before_a_pass_over_the_pool(
    budget: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InfluenceFunction, "fit", lambda *_: pytest.fail("a pass over the pool has begun"))
    with pytest.raises(ValueError, match=re.escape(message)):
        selected(budget, constraints=Constraints(**options))


def test_costs_with_a_rule_that_compares_no_gains() -> None:
    with pytest.raises(ValueError, match=r"Random\(seed=0\) compares no gains"):
        selected(rule=Random(), constraints=Constraints(costs=[1.0] * 24))
    cheap = [1.0 if k % 2 else 100.0 for k in range(24)]
    found = selected(rule=InteractionGreedy(), constraints=Constraints(costs=cheap))
    assert all(k % 2 for k in found.ids)
