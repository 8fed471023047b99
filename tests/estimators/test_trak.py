from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trak import TRAKer
from trak.projectors import NoOpProjector

from lightning_influence.capture import ClassificationLoss, ExampleLoader, LanguageModelLoss
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.margin import ClassMargin
from lightning_influence.estimators.projected_dot import ProjectedDot
from lightning_influence.estimators.trak import TRAK
from lightning_influence.projections import FactoredProjection, TrakProjection
from tests import oracles
from tests.curvature.models import Tokens, batch_of, labels, mlp, normal, points, ready, texts

TRAIN, QUERIES = points(40), points(5, seed=3)
SHARE = 1e-3
WHOLE = FactoredProjection(1.0)  # signed permutations: inner products are those of whole gradients


def deep(seed: int = 0) -> nn.Module:
    model = mlp(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter += 0.3 * normal(*parameter.shape, seed=seed + k)
    return model


def targets_of(model: nn.Module, row: Any) -> Tensor:
    """Probability of each target of a row alone."""
    batch = batch_of(row)
    if isinstance(batch, dict):
        wanted = row["labels"][1:]
        chances = model(batch["input_ids"], batch["attention_mask"])[0, :-1].softmax(1)
        return chances[wanted != -100, wanted[wanted != -100]]
    return model(batch[0]).softmax(1)[0, batch[1]]


def output_gradients(model: nn.Module, data: list[Any]) -> Tensor:
    """∇ sum of log(p / (1 - p)), from autograd, one row at a time [n, P]."""

    def output(k: int) -> Tensor:
        p = targets_of(model, data[k])
        return (p / (1 - p)).log().sum()

    rows = oracles.example_gradients(dict(model.named_parameters()), output, len(data))
    return torch.cat([value.flatten(1) for value in rows.values()], dim=1)


def dense(models: list[nn.Module], queries: list[Any], train: list[Any], scored: list[Any]) -> Tensor:
    """The formula of the paper with whole gradients in the place of projected ones."""
    products, weights = [], []
    for model in models:
        phi = output_gradients(model, train)
        kernel = phi.T @ phi
        kernel = kernel + SHARE * kernel.trace() / len(kernel) * torch.eye(len(kernel)).double()
        products.append(output_gradients(model, queries) @ torch.linalg.inv(kernel) @ output_gradients(model, scored).T)
        weights.append(torch.stack([1 - targets_of(model, row).mean() for row in scored]).detach())
    return torch.stack(products).mean(0) * torch.stack(weights).mean(0)


@pytest.mark.parametrize("number", [1, 3])
def test_it_is_the_formula_of_the_paper_for_classes(number: int) -> None:
    models = [deep(seed) for seed in range(number)]
    trak = TRAK(models, WHOLE, damping_share=SHARE).fit(TRAIN)
    found = trak.score(QUERIES)
    torch.testing.assert_close(found.values, dense(models, QUERIES, TRAIN, TRAIN))
    several = ", mean of 3 models" if number == 3 else ""
    assert found.formula == f"phi_q^T (Phi^T Phi)^-1 phi_i (1 - p_i){several}"
    assert (found.damping, found.reduction) == ("0.001 x mean eigenvalue", "log-odds")
    assert (found.query_ids, found.train_ids) == (tuple(range(5)), tuple(range(40)))
    torch.testing.assert_close(trak.score(QUERIES, TRAIN).values, found.values)


def test_it_is_the_formula_of_the_paper_for_tokens() -> None:
    model, train, queries, other = ready(Tokens()), texts(12), texts(3, seed=3), texts(5, seed=8)
    trak = TRAK(model, WHOLE, damping_share=SHARE).fit(train)
    torch.testing.assert_close(trak.score(queries, other).values, dense([model], queries, train, other))
    assert trak.score(queries).reduction == "sum"


def test_one_model_may_stand_alone() -> None:
    alone = TRAK(deep(), WHOLE, damping_share=SHARE).fit(TRAIN).score(QUERIES)
    assert torch.equal(alone.values, TRAK([deep()], WHOLE, damping_share=SHARE).fit(TRAIN).score(QUERIES).values)


def test_without_damping_in_few_dimensions() -> None:
    """The kernel of what an own projection gives."""
    projection = TrakProjection(12, seed=5)
    found = TRAK(deep(), projection).fit(TRAIN).score(QUERIES)
    assert found.damping is None
    dot = ProjectedDot(deep(), TrakProjection(12, seed=5), ClassMargin())
    phi, asked = dot.project(TRAIN).double(), dot.project(QUERIES).double()
    weights = torch.stack([1 - targets_of(deep(), row).mean() for row in TRAIN]).detach()
    torch.testing.assert_close(
        found.values.double(), asked @ torch.linalg.inv(phi.T @ phi) @ phi.T * weights, rtol=1e-4, atol=1e-6
    )


def test_every_model_has_a_projection_of_its_own() -> None:
    one, other = (TRAK(deep(), TrakProjection(12, seed=seed)).fit(TRAIN).score(QUERIES).values for seed in (5, 6))
    found = TRAK([deep(), deep()], TrakProjection(12, seed=5)).fit(TRAIN).score(QUERIES).values
    torch.testing.assert_close(found, (one + other) / 2)
    started = TrakProjection(12, seed=5).start(TRAK(deep()).components)
    torch.testing.assert_close(TRAK([deep(), deep()], started).fit(TRAIN).score(QUERIES).values, one)


def test_components_add_up() -> None:
    trak = TRAK([deep(), deep(3)], WHOLE, damping_share=SHARE).fit(TRAIN)
    apart = trak.score(QUERIES, TRAIN, per_component=True)
    assert apart.components == ("0", "2")
    torch.testing.assert_close(apart.total(), trak.score(QUERIES, TRAIN).values)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_and_order_do_not_matter(batch_size: int) -> None:
    expected = TRAK(deep(), WHOLE, damping_share=SHARE).fit(TRAIN).score(QUERIES).values
    order = [*range(20, 40), *range(20)]
    trak = TRAK(deep(), WHOLE, damping_share=SHARE, batch_size=batch_size).fit(ExampleLoader(TRAIN, indices=order))
    found = trak.score(ExampleLoader(QUERIES, indices=[3, 1]))
    assert (found.query_ids, found.train_ids) == ((3, 1), tuple(order))
    torch.testing.assert_close(found.values, expected[[3, 1]][:, order])
    some = trak.score(QUERIES, ExampleLoader(TRAIN, indices=[7, 2]))
    torch.testing.assert_close(some.values, expected[:, [7, 2]])


def test_an_example_helps_itself() -> None:
    """Score > 0: training on it raises its log-odds."""
    assert (TRAK(deep(), WHOLE, damping_share=SHARE).fit(TRAIN).score(TRAIN).values.diagonal() > 0).all()


def test_leaving_an_example_out_of_a_logistic_regression() -> None:
    """The log-odds of the queries lose what the example gave them, up to the p (1 - p) that the kernel leaves out."""
    x, y = normal(80, 3), (normal(80, seed=1) + normal(80, 3)[:, 0] > 0).double()
    asked = normal(20, 3, seed=2)
    whole = oracles.fit_binary(x, y, 1e-3)
    kept = [[j for j in range(80) if j != k] for k in range(80)]
    lost = torch.stack([asked @ (whole - oracles.fit_binary(x[rows], y[rows], 1e-3)) for rows in kept], dim=1)
    model = mlp(nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(whole)
    rows, queries = list(zip(x, y.long(), strict=True)), [(query, torch.tensor(1)) for query in asked]
    found = TRAK(model, FactoredProjection(3)).fit(rows).score(queries).values
    assert torch.corrcoef(torch.stack([found.flatten(), lost.flatten()]))[0, 1] > 0.9


def test_the_first_projection_is_that_of_traker() -> None:
    trak = TRAK(deep(), damping_share=SHARE).fit(TRAIN)
    projection = trak._features[0].estimator.projection
    assert isinstance(projection, TrakProjection)
    assert projection.total == 31  # as many as there are parameters, fewer than 2048


def test_an_inverse_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="40 examples cannot span 50 dimensions"):
        TRAK(mlp(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), FactoredProjection(50)).fit(TRAIN)
    with pytest.raises(ValueError, match="the features have rank 26 in 31 dimensions"):  # 5 columns of the head
        TRAK(deep(), WHOLE).fit(TRAIN)


def test_arguments() -> None:
    with pytest.raises(NotFittedError, match=r"`TRAK.score`: the training data was not seen yet. Call fit\(train\)"):
        TRAK(deep(), WHOLE).score(QUERIES)
    with pytest.raises(ValueError, match=r"`TRAK\(damping_share=-1\)`: expected a finite number >= 0"):
        TRAK(deep(), damping_share=-1)
    with pytest.raises(ValueError, match="expected a model, or at least one in a list"):
        TRAK([])
    with pytest.raises(ValueError, match=r"models \[1\] have other components than the first"):
        TRAK([deep(), mlp()])
    with pytest.raises(ValueError, match=r"TRAK\(loss=FunctionLoss\)`: log-odds are known for classes and tokens"):
        TRAK(deep(), WHOLE, lambda model, batch: model(batch[0]).sum(1)).fit(TRAIN)
    trak = TRAK(deep(), WHOLE, ClassificationLoss(), ["0"], damping_share=SHARE).fit(TRAIN)
    assert [c.name for c in trak.components] == ["0"]
    with pytest.raises(ValueError, match=r"1 of 2 queries have no supervised target \(ids \[0\]\)"):
        trak.score([(QUERIES[0][0], torch.tensor(-100)), QUERIES[1]])
    assert TRAK(ready(Tokens()), WHOLE, LanguageModelLoss("mean"), damping_share=1.0).fit(texts(4)).score(texts(1))


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_traker_computes(tmp_path: Any) -> None:
    """Up to a factor: traker divides the inverse by the mean of its entries. In float32, without a projection."""
    model = deep().float()
    train = [torch.stack([x for x, _ in TRAIN]).float(), labels(40, 3)]
    queries = [torch.stack([x for x, _ in QUERIES]).float(), labels(5, 3, seed=3)]
    phi = output_gradients(deep(), TRAIN)
    size = phi.shape[1]
    theirs = TRAKer(
        model,
        "image_classification",
        train_set_size=40,
        save_dir=tmp_path,
        device="cpu",
        projector=NoOpProjector(device="cpu"),
        use_half_precision=False,
        logging_level=logging.ERROR,
        lambda_reg=0.1 * float(phi.square().sum()) / size / size,  # their kernel is divided by the parameters
    )
    theirs.load_checkpoint(model.state_dict(), model_id=0)
    theirs.featurize(train, num_samples=40)
    theirs.finalize_features()
    theirs.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=5)
    theirs.score(queries, num_samples=5)
    expected = torch.tensor(theirs.finalize_scores("queries")).T.double()
    rows = [list(zip(*side, strict=True)) for side in (train, queries)]
    found = TRAK(model, WHOLE, damping_share=0.1).fit(rows[0]).score(rows[1]).values.double()
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-6)
