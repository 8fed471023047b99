from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_influence.capture import ExampleLoader, LanguageModelLoss
from lightning_influence.estimators.row_scores import LengthScore, LossScore
from tests.curvature.models import Tokens, batch_of, mlp, points, ready, texts

POOL = texts(7)


def loss_of(row: dict[str, torch.Tensor]) -> float:
    """Of one sequence alone, token by token."""
    batch = batch_of(row)
    logits = ready(Tokens())(batch["input_ids"], batch["attention_mask"])[0].detach()
    labels = row["labels"].tolist()
    return sum(
        float(F.cross_entropy(logits[t], torch.tensor(labels[t + 1])))
        for t in range(len(labels) - 1)
        if labels[t + 1] != -100
    )


def test_losses() -> None:
    found = LossScore(ready(Tokens()), batch_size=3).score(POOL[:2], ExampleLoader(POOL, indices=[5, 0, 2]))
    expected = torch.tensor([loss_of(POOL[k]) for k in (5, 0, 2)], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected.expand(2, 3))
    assert (found.query_ids, found.train_ids) == ((0, 1), (5, 0, 2))
    assert (found.formula, found.reduction) == ("loss of the training example", "sum")
    mean = LossScore(ready(Tokens()), LanguageModelLoss("mean")).score(None, POOL)
    assert (mean.query_ids, mean.reduction) == (("any",), "mean")


def test_the_model_is_left_as_it_was() -> None:
    model = mlp().train()
    LossScore(model).score(None, points(4))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_lengths() -> None:
    model = ready(Tokens())
    supervised = [sum(int(label) != -100 for label in row["labels"][1:]) for row in POOL]
    whole = [int(row["attention_mask"].sum()) for row in POOL]
    assert LengthScore(model).score(None, POOL).values.tolist() == [supervised]
    found = LengthScore(model, "all").score(POOL[:1], POOL)
    assert found.values.tolist() == [whole]
    assert found.formula == "number of all positions of the training example"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`LengthScore\(count='tokens'\)`: expected one of \['supervised', 'all'\]"):
        LengthScore(mlp(), "tokens")
    with pytest.raises(ValueError, match="the batches have no attention mask"):
        LengthScore(mlp(), "all").score(None, points(3))
    rows = points(4)
    rows[2] = (rows[2][0] * torch.nan, rows[2][1])
    with pytest.raises(ValueError, match=r"the loss of 1 of 4 examples is not finite \(ids \[2\]\)"):
        LossScore(mlp()).score(None, rows)
