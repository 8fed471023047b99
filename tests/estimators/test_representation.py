from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.representation import RepresentationSimilarity
from tests.capture.models import llama
from tests.curvature.models import Tokens, batch_of, mlp, points, ready, texts

TRAIN, QUERIES = texts(9), texts(4, seed=3)


def hidden(row: dict[str, Tensor]) -> Tensor:
    """Of the layer ``up``, one example at a time, positions that belong to it alone [s, d]."""
    model = ready(Tokens())
    seen: list[Tensor] = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    batch = batch_of(row)
    model(batch["input_ids"], batch["attention_mask"])
    return seen[0][0][row["attention_mask"].bool()]


def pooled(row: dict[str, Tensor], pooling: str) -> Tensor:
    states = hidden(row)
    if pooling == "last":
        return states[-1]
    if pooling == "mean":
        return states.mean(0)
    total = sum(range(1, len(states) + 1))
    return sum((k + 1) / total * state for k, state in enumerate(states))  # type: ignore[return-value]


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_cosines_of_states_without_the_padding(pooling: Any, batch_size: int | None) -> None:
    found = RepresentationSimilarity(ready(Tokens()), "up", pooling, batch_size=batch_size).score(QUERIES, TRAIN)
    left, right = ([pooled(row, pooling) for row in rows] for rows in (QUERIES, TRAIN))
    expected = torch.stack([torch.stack([torch.cosine_similarity(a, b, 0) for b in right]) for a in left])
    torch.testing.assert_close(found.values, expected)
    assert (found.query_ids, found.train_ids) == (tuple(range(4)), tuple(range(9)))
    assert found.formula == f"cosine of hidden states of up, {pooling} over positions"
    assert found.reduction == "no loss"


def test_permuting_the_data_permutes_the_scores() -> None:
    similarity = RepresentationSimilarity(ready(Tokens()), "up")
    rows, columns = [2, 0, 3, 1], [4, 8, 0, 2]
    found = similarity.score(ExampleLoader(QUERIES, 2, indices=rows), ExampleLoader(TRAIN, 3, indices=columns))
    assert (found.query_ids, found.train_ids) == (tuple(rows), tuple(columns))
    torch.testing.assert_close(found.values, similarity.score(DataLoader(QUERIES), TRAIN).values[rows][:, columns])


def test_states_without_positions_and_the_model_left_as_it_was() -> None:
    model = mlp().train()
    data = points(6)
    x = torch.stack([row[0] for row in data])
    expected = torch.nn.functional.normalize(model[:2](x).detach(), dim=1)
    for rows in (data, [row[0] for row in data]):  # with labels and without
        found = RepresentationSimilarity(model, "1").score(rows, rows)
        torch.testing.assert_close(found.values, expected @ expected.T)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_lengths_do_not_matter() -> None:
    for scale in (1e-200, 1e200):
        model = mlp(nn.Linear(3, 4, bias=False))
        with torch.no_grad():
            model[0].weight *= scale
        found = RepresentationSimilarity(model, "0").score(points(3), points(3))
        expected = RepresentationSimilarity(mlp(nn.Linear(3, 4, bias=False)), "0").score(points(3), points(3))
        torch.testing.assert_close(found.values, expected.values)


def test_an_example_without_a_position_scores_nothing() -> None:
    rows = [{**row, "attention_mask": row["attention_mask"] * (k != 1)} for k, row in enumerate(texts(3))]
    for pooling in ("mean", "last", "weighted"):
        values = RepresentationSimilarity(ready(Tokens()), "up", pooling).score(rows, rows).values
        assert torch.equal(values[1], torch.zeros(3).double())
        assert (values[0, [0, 2]] != 0).all()


class Wraps(nn.Module):
    """Returns what models of transformers return."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.how = how

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        assert self.how == "tuple" or not use_cache
        y = self.inner(x)
        return (y, None) if self.how == "tuple" else SimpleNamespace(last_hidden_state=y) if self.how == "object" else 3


def test_outputs_of_other_forms() -> None:
    rows = [{"x": x} for x, _ in points(4)]
    expected = RepresentationSimilarity(ready(Wraps("object")), "inner").score(rows, rows).values
    torch.testing.assert_close(RepresentationSimilarity(ready(Wraps("object")), "").score(rows, rows).values, expected)
    forward = lambda model, batch: model(batch["x"])  # noqa: E731
    found = RepresentationSimilarity(ready(Wraps("tuple")), "", forward=forward).score(rows, rows)
    torch.testing.assert_close(found.values, expected)
    assert found.formula == "cosine of hidden states of Wraps, mean over positions"
    with pytest.raises(ValueError, match="it returned int; expected a tensor, a tuple that begins with one"):
        RepresentationSimilarity(ready(Wraps("number")), "").score(rows, rows)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 2)
        self.image = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x[:, None, None])


def test_wrong_layers() -> None:
    with pytest.raises(ValueError, match=r"layer='upp'\)`: expected the name of a module; the nearest are \['up'"):
        RepresentationSimilarity(ready(Tokens()), "upp")
    with pytest.raises(ValueError, match=r"pooling='max'\)`: expected one of \['mean', 'last', 'weighted'\]"):
        RepresentationSimilarity(ready(Tokens()), "up", "max")  # type: ignore[arg-type]
    model = ready(Unused())
    with pytest.raises(ValueError, match="it ran 0 times in a forward pass; expected a module that runs once"):
        RepresentationSimilarity(model, "idle").score(points(3), points(3))
    with pytest.raises(
        ValueError, match=r"it returned \(3, 2, 1, 3\) for 3 examples; expected \[n, t, d\] or \[n, d\]"
    ):
        RepresentationSimilarity(model, "image").score(points(3), points(3))
    longer = {**QUERIES[0], "attention_mask": torch.ones(3).long()}
    forward = lambda model, batch: model(batch["input_ids"], torch.ones(1, 6))  # noqa: E731
    with pytest.raises(ValueError, match=r"it returned \(1, 6, 3\) for an attention mask \(1, 3\)"):
        RepresentationSimilarity(ready(Tokens()), "up", forward=forward).score([longer], TRAIN)


def test_states_that_are_not_finite_are_named() -> None:
    data = points(5)
    data[3] = (data[3][0] * torch.inf, data[3][1])
    with pytest.raises(ValueError, match=r"the hidden states of 1 of 1 examples are not finite \(ids \[3\]\)"):
        RepresentationSimilarity(mlp(), "0", batch_size=3).score(points(2), ExampleLoader(data, indices=[3]))
    with pytest.raises(ValueError, match="the data is empty"):
        RepresentationSimilarity(mlp(), "0").score(points(2), [])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_models_are_pooled_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    expected = RepresentationSimilarity(mlp(), "2").score(points(4), points(5)).values
    rows = [[(x.to(dtype), y) for x, y in points(n)] for n in (4, 5)]
    found = RepresentationSimilarity(mlp().to(dtype), "2").score(*rows).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_position_weights_of_rds_plus() -> None:
    """Two positions weigh 1/3 and 2/3, three 1/6, 2/6 and 3/6; padding on either side nothing."""
    states = torch.tensor([[[3.0], [6.0], [1e30]], [[torch.nan], [3.0], [6.0]], [[6.0], [12.0], [2.0]]])
    kept = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
    found = RepresentationSimilarity(ready(Tokens()), "up", "weighted")._pooled(states, kept, 3)
    torch.testing.assert_close(found, torch.tensor([[5.0], [5.0], [6.0]]))


def rds_plus(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """Literally: the last hidden state of each row alone, without padding, pooled by position and scaled."""
    vectors = []
    for row in rows:
        ids = row["input_ids"][row["attention_mask"].bool()]
        with torch.no_grad():
            states = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
        total = sum(t + 1 for t in range(len(ids)))
        vector = torch.zeros(states.shape[1], dtype=states.dtype)
        for t, state in enumerate(states):
            vector += (t + 1) / total * state
        vectors.append(vector / vector.norm())
    return torch.stack(vectors)


@pytest.mark.parametrize("how", ["plain", "lora", "headless"])
def test_rds_plus_of_a_language_model(how: str) -> None:
    model = llama()
    rows = [{**row, "input_ids": row["input_ids"] % model.config.vocab_size} for row in texts(5)]
    expected = rds_plus(model, rows)
    if how == "lora":
        model = get_peft_model(model, LoraConfig(r=2))  # adds nothing before it is trained
    found = RepresentationSimilarity(model.model if how == "headless" else model, pooling="weighted", batch_size=3)
    layer = {"plain": "model", "lora": "base_model.model.model", "headless": "LlamaModel"}[how]
    assert found.formula == f"cosine of hidden states of {layer}, weighted over positions"
    values = found.score(rows, rows).values
    torch.testing.assert_close(values, (expected @ expected.T).to(values), rtol=1e-4, atol=1e-5)


def test_a_layer_must_be_named_where_there_is_no_model_of_transformers() -> None:
    with pytest.raises(ValueError, match=r"Tokens holds no model of transformers\. Expected the name of the module"):
        RepresentationSimilarity(ready(Tokens()))
