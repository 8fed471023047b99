from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import EKFAC, KFAC, Exact, Identity, InfluenceFunction, Interactions, UnsupportedLayerError
from lightning_influence.capture import FunctionLoss
from lightning_influence.selection import (
    BlockGreedy,
    InteractionGreedy,
    Newton,
    NewtonGreedy,
    NewtonPool,
    Random,
    TopK,
    held_out_weight,
)
from lightning_influence.selection.pipeline import choose, select_training_data
from lightning_influence.selection.saturation import saturating_weight
from tests.curvature.models import Tokens, ready, texts

CENTRES = 1.5 * torch.eye(3, 6).double()


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    return CENTRES[labels] + 0.7 * torch.randn(n, 6, generator=generator).double(), labels


def noisy(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels of which a quarter is wrong, and which."""
    x, y = blobs(n, seed)
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < 0.25
    return x, torch.where(wrong, (y + 1) % 3, y), wrong


X, Y, WRONG = noisy()
POOL, TARGETS = TensorDataset(X, Y), TensorDataset(*blobs(40, seed=7))


def trained(x: Tensor, y: Tensor, steps: int = 300) -> nn.Linear:
    """Softmax regression with a little decay, which has one optimum."""
    model = nn.Linear(6, 3).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture
def model() -> nn.Linear:
    """A warm-up of a few steps on the pool."""
    return trained(X, Y, steps=5)


def selected(model: nn.Module, budget: int | float = 20, pool: Any = POOL, targets: Any = TARGETS, **o: Any) -> Any:
    return select_training_data(model, pool, targets, budget=budget, progress=False, **o)


def test_what_is_selected_is_what_helps(model: nn.Linear) -> None:
    selection = selected(model)
    assert len(set(selection.ids)) == 20
    assert selection.objective < 0
    assert WRONG[list(selection.ids)].float().mean() < 0.06 < 0.2 < WRONG.float().mean()
    x, y = blobs(500, seed=11)

    def loss(rows: list[int]) -> float:
        return float(F.cross_entropy(trained(X[rows], Y[rows])(x), y).detach())

    draws = [torch.randperm(120, generator=torch.Generator().manual_seed(seed))[:20].tolist() for seed in range(5)]
    assert loss(list(selection.ids)) < 0.6 * sum(loss(rows) for rows in draws) / 5
    assert loss(list(selection.ids)) < 0.8 * loss(list(range(120)))


def test_it_predicts_more_than_a_random_choice(model: nn.Linear) -> None:
    weight = 0.05
    ours = selected(model, weight=weight).objective
    for rule in (Random(0), Random(1), TopK()):
        assert ours <= selected(model, weight=weight, rule=rule).objective


@pytest.mark.parametrize("target_curvature", ["empirical", "sampled"])
@pytest.mark.parametrize("normalise", [True, False])
def test_it_is_the_pieces_put_together(model: nn.Linear, target_curvature: Any, normalise: bool) -> None:
    options = {"rule": InteractionGreedy(), "target_curvature": target_curvature, "normalise": normalise}
    found = selected(model, 12, seed=3, **options)
    influence = InfluenceFunction(model, EKFAC(seed=3), normalise=normalise).fit(POOL)
    scores = influence.score(TARGETS, POOL)
    sampled = influence.score(TARGETS, POOL, labels="sampled", seed=3) if target_curvature == "sampled" else None
    interactions = Interactions.from_scores(scores, 1 / 12, sampled)
    weight = saturating_weight(interactions, InteractionGreedy(), 12)
    expected = interactions.reweighted(weight).select(InteractionGreedy(), 12)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains)
    assert (found.positions, found.budget, found.pool_size) == (found.ids, 12, 120)


@pytest.mark.parametrize("rule", [InteractionGreedy(), BlockGreedy(2), TopK(), Random(3)])
@pytest.mark.parametrize("weight", ["saturate", "1/n", "1/k", 0.02, 1])
def test_every_rule_at_every_weight(model: nn.Linear, rule: Any, weight: Any) -> None:
    selection = selected(model, 0.1, rule=rule, weight=weight)
    assert len(selection) == 12
    assert selection.rule == repr(rule)
    interactions = Interactions.from_scores(InfluenceFunction(model, normalise=True).fit(POOL).score(TARGETS, POOL), 1)
    numbers = {"1/n": 1 / 120, "1/k": 1 / 12}
    if weight == "saturate":
        number = (
            saturating_weight(interactions, rule, 12) if isinstance(rule, InteractionGreedy | BlockGreedy) else 1 / 12
        )
    else:
        number = numbers.get(weight, weight)
    assert selection.weight == pytest.approx(number)
    first_order = -number * interactions.values[list(selection.ids)]
    torch.testing.assert_close(selection.first_order, first_order)


@pytest.mark.parametrize("target_curvature", ["empirical", "sampled"])
@pytest.mark.parametrize(("rule", "folds"), [(None, None), (BlockGreedy(2), 8), (InteractionGreedy(), 40)])
def test_the_weight_by_held_out_targets(model: nn.Linear, target_curvature: Any, rule: Any, folds: Any) -> None:
    options = {"rule": rule, "folds": folds, "target_curvature": target_curvature}
    found = selected(model, 12, weight="held-out", seed=3, **options)
    influence = InfluenceFunction(model, EKFAC(seed=3), normalise=True).fit(POOL)
    scores = influence.score(TARGETS, POOL)
    sampled = influence.score(TARGETS, POOL, labels="sampled", seed=3) if target_curvature == "sampled" else None
    choice = held_out_weight(scores, 12, curvature_scores=sampled, rule=rule, folds=folds or 5)
    rule = rule or InteractionGreedy()
    expected = Interactions.from_scores(scores, choice.best, sampled).select(rule, 12)
    assert (found.ids, found.weight, found.rule) == (expected.ids, choice.best, repr(rule))
    assert found.held_out.to_dict() == choice.to_dict()
    assert selected(model, 12, weight=choice.best).held_out is None


@pytest.mark.parametrize("target_curvature", ["empirical", "sampled"])
def test_the_newton_step_is_the_pieces_put_together(model: nn.Linear, target_curvature: Any) -> None:
    influence = InfluenceFunction(model, EKFAC(seed=3), normalise=True).fit(POOL)
    told = {"target_curvature": target_curvature, "seed": 3}
    problem = replace(NewtonPool.scored(influence, TARGETS, POOL, landmarks=120, **told), shrink=True)
    found = selected(model, 12, **told)  # the default rule, which takes all rows of such a pool
    screened = problem.screened(12)
    expected = screened.select(12, NewtonGreedy(screened.ridge(12).nearly(0.95)), screen=False)
    assert found.ids == found.positions == expected.ids
    assert (found.rule, found.weight) == (expected.rule, None)
    assert (found.screened, found.pool_size) == (len(problem.opposed(12)), 120 - found.screened)
    assert 10 < found.screened < 60
    torch.testing.assert_close(found.gains, expected.gains)
    assert WRONG[list(found.ids)].float().mean() < 0.1
    assert selected(model, 12, rule="newton", **told).to_dict() == found.to_dict()
    given = selected(model, 12, rule=NewtonGreedy(2.0), **told)
    alone = NewtonPool.scored(influence, TARGETS, POOL, **told)
    assert given.ids == alone.select(12, NewtonGreedy(2.0), screen=False).ids
    assert (given.rule, given.screened) == ("NewtonGreedy(ridge=2.0)", 0)


def test_settings_arrive(model: nn.Linear) -> None:
    fitted = KFAC(damping=0.3).fit(model, POOL)
    influence = InfluenceFunction(model, fitted, normalise=True)
    expected = choose(Interactions.from_scores(influence.score(TARGETS, POOL)), InteractionGreedy(), 10)
    assert selected(model, 10, curvature=fitted, rule=InteractionGreedy()).ids == expected.ids
    assert selected(model, 10, curvature=KFAC(damping=0.3), rule=InteractionGreedy()).ids == expected.ids
    assert selected(model, 10, curvature=Identity()).ids != expected.ids
    deep = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    one = selected(deep, 5, components=["2"], curvature=Exact())
    assert one.ids == selected(deep, 5, curvature=Exact().fit(deep, POOL, components=["2"])).ids
    assert one.ids != selected(deep, 5, curvature=Exact()).ids


def test_loaders_are_read_in_order_and_the_model_is_left_alone(model: nn.Linear) -> None:
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    expected = selected(model)
    loader = DataLoader(POOL, batch_size=7, shuffle=True)
    assert selected(model, pool=loader, targets=DataLoader(TARGETS, batch_size=9)).ids == expected.ids
    assert selected(model, batch_size=5).ids == expected.ids
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None or parameter.requires_grad for parameter in model.parameters())


def text_pool() -> list[dict[str, Tensor]]:
    pool = texts(12)
    for k in (0, 3):
        pool[k] = {**pool[k], "labels": torch.full((6,), -100)}
    return pool


def test_rows_without_a_target_are_left_out_and_named() -> None:
    model, pool, targets = ready(Tokens()), text_pool(), texts(4, seed=9)
    with pytest.warns(UserWarning, match=r"2 of 12 pool rows have no supervised target and are left out") as caught:
        selection = selected(model, 1.0, pool, targets)
    assert [warning.filename for warning in caught] == [__file__]
    assert "(ids [0, 3])" in str(caught[0].message)
    assert sorted(selection.ids) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert selection.positions == selection.ids  # in the whole pool, so that rows can be looked up there
    assert selection.pool_size == 10
    left_out = pytest.warns(UserWarning, match="have no supervised target and are left out")
    with left_out, pytest.raises(ValueError, match=r"budget=11\)`: .* The pool has 10 rows"):
        selected(model, 11, pool, targets)
    for row in pool:
        row["labels"] = torch.full((6,), -100)
    with pytest.raises(ValueError, match="no row of the pool has a supervised target; check the label mask"):
        selected(model, 1, pool, targets)


def test_duplicates_and_leaks_are_named(model: nn.Linear) -> None:
    pool = [POOL[k] for k in range(20)] + [POOL[4], TARGETS[1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection = selected(model, 3, pool)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert re.search(r"1 of 22 pool rows repeat an earlier row; interactions .*\(ids \[20\]\)", messages[0])
    assert re.search(r"1 of 22 pool rows also stand in the target set.*\(ids \[21\]\)", messages[1])
    assert len(selection) == 3


def test_a_pool_that_only_harms() -> None:
    """All labels wrong: the hours of scoring are not thrown away, but nothing is promised either."""
    pool = [(scale * CENTRES[0], torch.tensor(1)) for scale in (1.0, 3.0, 2.0)]
    targets = [(CENTRES[0], torch.tensor(0))]
    for rule in (InteractionGreedy(), "newton", Newton("saturate"), Newton(screen=False), NewtonGreedy()):
        options = {"curvature": Identity(), "normalise": False, "rule": rule}
        with pytest.warns(UserWarning, match="no row of the pool is predicted to lower the target loss; the") as one:
            selection = selected(trained(X, Y, steps=0), 2, pool, targets, **options)
        assert one[0].filename == __file__
        assert (selection.gains[0] > 0).all()
        assert not isinstance(rule, InteractionGreedy) or selection.ids == (0, 2)
    options = {"curvature": Identity(), "normalise": False, "weight": "held-out", "folds": 2}
    with pytest.warns(UserWarning, match="the least harmful ones are chosen, with weight 1/k"):
        selection = selected(trained(X, Y, steps=0), 2, pool, 2 * targets, **options)
    assert (selection.ids, selection.weight, selection.held_out) == ((0, 2), 0.5, None)


class Unread:
    """A pool that must not be touched."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, position: int) -> Any:
        raise AssertionError("read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"`select_training_data\(budget=0\)`: expected an int >= 1 or a fraction"),
        ({"budget": 11}, r"`select_training_data\(budget=11\)`: .*The pool has 10 rows"),
        ({"budget": 1.5}, r"`select_training_data\(budget=1.5\)`: expected an int >= 1 or a fraction"),
        ({"budget": float("nan")}, r"`select_training_data\(budget=nan\)`: expected an int >= 1 or a fraction"),
        ({"budget": "all"}, r"`select_training_data\(budget='all'\)`: .*A str is neither"),
        ({"budget": True}, r"`select_training_data\(budget=True\)`"),
        ({"budget": 0.01}, r"Of a pool of 10 rows this share is 0 rows"),
        ({"weight": 0}, r"`select_training_data\(weight=0\)`: expected 'saturate', 'held-out', '1/n', '1/k' or a num"),
        ({"weight": float("inf")}, r"`select_training_data\(weight=inf\)`"),
        ({"weight": float("nan")}, r"`select_training_data\(weight=nan\)`"),
        ({"weight": True}, r"`select_training_data\(weight=True\)`"),
        ({"weight": "1/m"}, r"`select_training_data\(weight='1/m'\)`"),
        ({"weight": "1/k", "rule": "newton"}, r"`select_training_data\(weight='1/k'\)`: the Newton step has no weight"),
        (
            {"weight": 0.1, "rule": NewtonGreedy()},
            r"Expected its ridge instead, such as rule=Newton\(ridge=0.3\)",
        ),
        ({"weight": 0.1, "rule": Newton()}, r"Expected its ridge instead, such as rule=Newton\(ridge=0.3\)"),
        (
            {"rule": Newton(landmarks=11)},
            r"`select_training_data\(rule=Newton\(landmarks=11\)\)`: expected at most the 10 rows of the pool",
        ),
        (
            {"weight": "held-out", "folds": 41},
            r"`select_training_data\(weight='held-out', folds=41\)`: expected an int from 2 to the number of targets",
        ),
        (
            {"weight": "held-out", "targets": [TARGETS[0]]},
            r"weight='held-out', folds=5\)`: expected an int from 2 to the number of targets, 1",
        ),
        ({"weight": "held-out", "folds": 1}, r"weight='held-out', folds=1\)`: expected an int from 2 to the number"),
        ({"folds": 4}, r"`select_training_data\(folds=4, weight='saturate'\)`: folds are for weight='held-out'"),
        ({"folds": 4, "rule": Newton("held-out")}, r"expected them in the rule, Newton\(ridge='held-out', folds="),
        ({"weight": "held-out", "rule": TopK()}, r"weight='held-out', rule=TopK\(\)\)`: only rules that look at inter"),
        ({"weight": "held-out", "rule": "newton"}, r"such as rule=Newton\(ridge='held-out'\)"),
        (
            {"rule": Newton("held-out", folds=41)},
            r"`select_training_data\(rule=Newton\(folds=41\)\)`: expected an int from 2 to the number of targets, 40",
        ),
        ({"rule": "greedy"}, r"`select_training_data\(rule='greedy'\)`: expected a SelectionRule, such as Inter"),
        ({"target_curvature": "exact"}, r"`select_training_data\(target_curvature='exact'\)`: expected 'empirical' or"),
        ({"rule": TopK}, r"`select_training_data\(rule=.*\)`: expected a SelectionRule, such as InteractionGreedy\(\)"),
        ({"curvature": "ekfac"}, r"`select_training_data\(curvature='ekfac'\)`: expected a Curvature, such as EKFAC\("),
        ({"curvature": EKFAC}, r"`select_training_data\(curvature=<class .*EKFAC'>\)`: expected a Curvature"),
        ({"components": "nonsense"}, "nonsense"),
        ({"targets": []}, "the data is empty; expected at least one example"),
        ({"targets": [(X[0], torch.tensor(-100))]}, r"1 of 1 queries have no supervised target \(ids \[0\]\)"),
        ({"targets": [TARGETS[0], (X[0] * torch.nan, Y[0])]}, r"1 of 2 targets is not finite \(ids \[1\]\)"),
        ({"loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}, r"has shape \(\); expected one"),
    ],
)
def test_arguments_are_checked_before_the_pool_is_read(model: nn.Linear, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selected(model, **{"budget": 2, "pool": Unread(), **options})


def test_a_loss_that_cannot_sample_is_found_before_the_pool_is_read(model: nn.Linear) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    options: dict[str, Any] = {"loss": losses, "curvature": EKFAC(fisher="empirical")}
    with pytest.raises(ValueError, match=r"loss=losses: a function of .* cannot sample labels"):
        selected(model, 2, Unread(), target_curvature="sampled", **options)
    with pytest.raises(ValueError, match=r"loss=losses: a function of .* cannot sample labels"):
        selected(model, 2, Unread(), loss=losses)  # the default curvature samples
    assert selected(model, 5, **options).ids == selected(model, 5, curvature=EKFAC(fisher="empirical")).ids


def test_an_empty_pool(model: nn.Linear) -> None:
    with pytest.raises(ValueError, match="the data is empty; expected at least one example"):
        selected(model, 1, [])


def test_a_model_without_components() -> None:
    frozen = nn.Linear(6, 3).requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match="has no component left"):
        selected(frozen, 1, Unread())


def test_a_pool_row_whose_loss_is_not_finite_is_named(model: nn.Linear) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / batch[2]

    lengths = torch.ones(len(X), dtype=torch.int64)
    options: dict[str, Any] = {"loss": losses, "curvature": EKFAC(fisher="empirical")}
    targets = TensorDataset(*TARGETS.tensors, lengths[:40])
    assert selected(model, pool=TensorDataset(X, Y, lengths), targets=targets, **options).budget == 20
    lengths[33] = 0  # the row itself holds nothing odd
    with pytest.raises(ValueError, match=r"is not finite \(ids \[33\]\)"):
        selected(model, pool=TensorDataset(X, Y, lengths), targets=targets, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_pool_row_of_no_numbers_is_named_before_any_pass(
    model: nn.Linear, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InfluenceFunction, "fit", lambda *_: pytest.fail("a pass over the pool has begun"))
    x = X.clone()
    x[3, 1] = x[101] = value
    with pytest.raises(ValueError, match=r"the loss of 2 of 2 pool rows is not finite \(ids \[3, 101\]\)"):
        selected(model, pool=TensorDataset(x, Y))


def test_numbers_that_are_not_finite_may_do_no_harm(model: nn.Linear) -> None:
    """A mask of minus infinities, a note that is NaN: what counts is the loss."""
    note = torch.where(torch.arange(len(X)) == 7, torch.nan, 0.0)
    y = torch.where(torch.arange(len(X)) == 9, -100, Y)
    x = X.clone()
    x[9] = torch.nan  # has no target, and is left out
    zero, targets = torch.zeros(len(X)), TensorDataset(*TARGETS.tensors, torch.zeros(40))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    class Masked(FunctionLoss):
        def supervised(self, batch: Any) -> Tensor:
            return (batch[1] >= 0).long()

    options: dict[str, Any] = {"loss": Masked(losses), "curvature": EKFAC(fisher="empirical"), "targets": targets}
    with pytest.warns(UserWarning, match="no supervised target"):
        noted = selected(model, pool=TensorDataset(x, y, note), **options)
    with pytest.warns(UserWarning, match="no supervised target"):
        assert noted.ids == selected(model, pool=TensorDataset(x, y, zero), **options).ids
