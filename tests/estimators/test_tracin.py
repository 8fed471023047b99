"""Sums over checkpoints: brute force, and what full-batch gradient descent does to the queries' losses."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence.capture.component import find_components
from lightning_influence.errors import StoreError
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.scores import Scores
from lightning_influence.estimators.tracin import TracIn
from lightning_influence.store import Store

CANDIDATES = [[3, 0, 1], [5, 2], [1, 4, 0]]
RATES = [{"0": 0.5, "2": 0.25}, {"0": 0.125, "2": 0.0}, {"0": 1.0, "2": 2.0}]


def data(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


TRAIN, QUERIES = data(6, 1), data(3, 2)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def record(folder, model, rates=None, kind="dots", components=None, train=TRAIN, queries=QUERIES, **options):
    """A store as `GradientDotRecorder` writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    estimator = GradientDot(model, components=components, progress=False)
    store = Store.create(folder, model, estimator.components, train="a", queries="b")
    if kind == "dots":
        estimator.pairs(queries, train, options.get("candidates", CANDIDATES)).at(folder.name).save(store)
    else:
        estimator.score(queries, train, per_component=kind == "apart").at(folder.name).save(store)
    if rates is not None:
        store.write_json("learning_rates", {"next": rates, "last": options.get("last")})
    return folder


def records(folder, kind):
    return [record(folder / f"step={k}", net(k), RATES[k], kind) for k in range(3)]


def brute_force(components=("0", "2"), left=QUERIES, right=TRAIN) -> torch.Tensor:
    """Σ_k Σ_c η_kc <g_q, g_i>, one autograd call per example."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for k, rates in enumerate(RATES):
        model = net(k)
        for name in components:
            parameters = list(model.get_submodule(name).parameters())
            rows = [torch.stack([gradient(model, x, y, parameters) for x, y in dataset]) for dataset in (left, right)]
            total += rates[name] * rows[0] @ rows[1].T
    return total


def gradient(model, x, y, parameters) -> torch.Tensor:
    parts = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("components", [None, ["2"], ["2", "0"]])
def test_scores_are_the_weighted_sum(components, tmp_path):
    tracin = TracIn.from_records(records(tmp_path, "apart"))
    whole = tracin.scores(components)
    expected = brute_force(components or ("0", "2"))
    torch.testing.assert_close(whole.values, expected, rtol=1e-10, atol=1e-12)
    assert whole.components is None
    assert whole.formula == "sum over checkpoints of learning rate x <g_q, g_i>"
    assert whole.checkpoint == "3 checkpoints: step=0, step=1, step=2"
    apart = tracin.scores(components, per_component=True)
    assert apart.components == tuple(components or ("0", "2"))
    torch.testing.assert_close(apart.total(), expected, rtol=1e-10, atol=1e-12)
    assert tracin.rates == tuple(RATES)
    assert tracin.checkpoints == ("step=0", "step=1", "step=2")


def test_dots_are_the_weighted_sum_with_self_products(tmp_path):
    dots = TracIn.from_records(records(tmp_path, "dots")).dots()
    assert dots.candidates() == CANDIDATES
    expected = brute_force()
    pairs = [expected[q, i] for q, row in enumerate(CANDIDATES) for i in row]
    torch.testing.assert_close(dots.total(), torch.stack(pairs), rtol=1e-10, atol=1e-12)
    for name, found, dataset in (("q", dots.query_squares, QUERIES), ("i", dots.train_squares, TRAIN)):
        squares = brute_force(left=dataset, right=dataset).diag()
        torch.testing.assert_close(found.sum(0), squares, rtol=1e-10, atol=1e-12, msg=name)
    assert dots.cosine().abs().max() <= 1 + 1e-12
    only = torch.stack([brute_force(("2",))[q, i] for q, row in enumerate(CANDIDATES) for i in row])
    torch.testing.assert_close(dots.total("2"), only, rtol=1e-10, atol=1e-12)


def test_all_pairs_in_the_form_of_pairs_are_scores_too(tmp_path):
    everything = [[5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5], [4, 5, 1, 0, 3, 2]]
    paths = [record(tmp_path / f"step={k}", net(k), RATES[k], candidates=everything) for k in range(3)]
    scores = TracIn.from_records(paths).scores()
    torch.testing.assert_close(scores.values, brute_force(), rtol=1e-10, atol=1e-12)
    assert TracIn.from_records(paths).scores(per_component=True).components == ("0", "2")


def test_rates_of_ones_own(tmp_path):
    paths = [record(tmp_path / f"step={k}", net(k), kind="apart") for k in range(3)]
    found = TracIn.from_records(paths, rates=RATES).scores()
    torch.testing.assert_close(found.values, brute_force(), rtol=1e-10, atol=1e-12)
    one = TracIn.from_records(paths[:1], rates=[2]).scores()
    torch.testing.assert_close(one.values, 2 * Scores.load(Store.open(paths[0])).total(), rtol=1e-12, atol=0)


def test_the_rates_of_the_last_step(tmp_path):
    last = [{name: 10 * rate for name, rate in rates.items()} for rates in RATES]
    paths = [record(tmp_path / f"step={k}", net(k), RATES[k], "apart", last=last[k]) for k in range(3)]
    found = TracIn.from_records(paths, "last").scores().values
    torch.testing.assert_close(found, 10 * brute_force(), rtol=1e-10, atol=1e-12)


def test_stores_and_what_has_a_path(tmp_path):
    paths = records(tmp_path, "dots")
    expected = TracIn.from_records([str(path) for path in paths]).dots()
    found = TracIn.from_records([Store.open(path) for path in paths]).dots()
    assert torch.equal(found.dots, expected.dots)


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["dots", "apart", "total"])
def test_gradient_descent_lowers_the_loss_by_the_scores(rate, kind, tmp_path):
    """Full-batch steps on a mean over n: Σ_i score / n is the fall of each query's loss, up to terms in η²."""
    model, n = net(), len(TRAIN)
    before = copy.deepcopy(model)
    paths = []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    everything = [list(range(n))] * len(QUERIES)
    for step in range(5):
        paths.append(record(tmp_path / f"{step}", model, {"0": rate, "2": rate}, kind, candidates=everything))
        optimizer.zero_grad()
        F.cross_entropy(model(TRAIN.tensors[0]), TRAIN.tensors[1]).backward()
        optimizer.step()
    x, y = QUERIES.tensors
    with torch.no_grad():
        fall = F.cross_entropy(before(x), y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")
    predicted = TracIn.from_records(paths).scores().total().sum(1) / n
    assert fall.abs().min() > 0.1 * rate
    torch.testing.assert_close(predicted, fall, rtol=3 * rate, atol=0)


def test_sums_over_components_need_one_rate(tmp_path):
    same = [record(tmp_path / f"same{k}", net(k), {"0": 0.5, "2": 0.5}, "total") for k in range(2)]
    tracin = TracIn.from_records(same)
    assert tracin.scores().values.shape == (3, 6)
    with pytest.raises(ValueError, match=r"`TracIn.scores\(components=\['0'\], per_component=False\)`: .* sums over"):
        tracin.scores(["0"])
    with pytest.raises(ValueError, match="per_component=True"):
        tracin.scores(per_component=True)
    with pytest.raises(ValueError, match="whose learning rates differ"):
        TracIn.from_records([record(tmp_path / "other", net(3), RATES[0], "total")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "apart"}, r"differs from .* in kind \('Scores', there 'ComponentDots'\)"),
        ({"components": ["0"]}, r"number of components \(1, there 2\)"),
        ({"queries": data(2, 2), "candidates": CANDIDATES[:2]}, r"the number of queries \(2, there 3\)"),
        ({"candidates": [[3, 0], [5], [1]]}, r"training examples \(4, there 6\); the number of pairs \(4, there 8\)"),
        ({"candidates": [[0, 3, 1], *CANDIDATES[1:]]}, r"pairs \(number 0 is \(0, 0\), there \(0, 3\)\)"),
    ],
)
def test_recordings_that_do_not_go_together(change, message, tmp_path):
    paths = records(tmp_path, "dots")
    record(paths[1], net(1), RATES[1], **change)
    with pytest.raises(ValueError, match=message):
        TracIn.from_records(paths)


def test_recordings_of_other_data(tmp_path):
    paths = records(tmp_path, "dots")
    dots = ComponentDots.load(Store.open(paths[1]))
    shutil.rmtree(paths[1])
    store = Store.create(paths[1], net(1), find_components(net(1)), train="other", queries="b")
    dots.save(store)
    store.write_json("learning_rates", {"next": RATES[1], "last": None})
    with pytest.raises(ValueError, match=r"the data of `train` \('other', there 'a'\)"):
        TracIn.from_records(paths)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("next", r"has no learning rates\. Pass `rates=\[\.\.\.\]`"),
        ("first", r"rates='first'\)`: expected one of \('next', 'last'\)"),
        ([0.1], r"for each of 2 recordings; got 1"),
        (0.1, r"for each of 2 recordings; got a float"),
        ([0.1, -1.0], r"expected numbers >= 0, got {'0': -1.0"),
        ([0.1, float("nan")], r"expected numbers >= 0"),
        ([0.1, {"0": 0.1, "3": 0.1}], r"1 of 2 have none, such as '2'\. The nearest that have are \['"),
        ([0, {"0": 0, "2": 0}], "every learning rate is 0"),
    ],
)
def test_rates_that_cannot_be(rates, message, tmp_path):
    paths = [record(tmp_path / f"step={k}", net(k)) for k in range(2)]
    with pytest.raises(ValueError, match=message):
        TracIn.from_records(paths, rates)


def test_a_last_step_that_nobody_saw(tmp_path):
    with pytest.raises(ValueError, match=r"does not know the last ones .*or rates='next'"):
        TracIn.from_records(records(tmp_path, "dots"), "last")


def test_records_that_are_none(tmp_path):
    for nothing in ([], None, "step=0"):
        with pytest.raises(ValueError, match="expected at least one recording"):
            TracIn.from_records(nothing)
    with pytest.raises(StoreError, match="has no manifest"):
        TracIn.from_records([tmp_path / "nowhere"])
    paths = records(tmp_path, "dots")
    with pytest.raises(ValueError, match=r"every recording once, these come again: \['.*step=0'\]"):
        TracIn.from_records([paths[0], *paths])
    Store.create(tmp_path / "empty", net(), find_components(net()))
    with pytest.raises(ValueError, match="holds neither 'component_dots' nor 'scores'"):
        TracIn.from_records([tmp_path / "empty"])
    with pytest.raises(ValueError, match="neither products nor scores named 'other'"):
        TracIn.from_records(paths, name="other")


def test_each_form_says_what_it_does_not_have(tmp_path):
    with pytest.raises(
        ValueError, match=r"8 pairs of 3 queries and 6 training examples .* not all 18\. Take `dots\(\)`"
    ):
        TracIn.from_records(records(tmp_path, "dots")).scores()
    with pytest.raises(ValueError, match=r"`TracIn.dots\(\)`: .*Take `scores\(\)`"):
        TracIn.from_records(records(tmp_path, "apart")).dots()
