from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.layers import EmbeddingRule, FallbackRule, rule_for
from lightning_influence.capture.record import IndexedRecord
from tests.oracles import example_gradients

WEIGHTS = torch.arange(1.0, 4.0)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) @ WEIGHTS.to(model.weight)).flatten(1).sum(1)


def recorded(layer: nn.Module, batch: Tensor) -> IndexedRecord:
    with GradientCapture(layer) as capture:
        [record] = capture.record(batch, losses)
    assert isinstance(record, IndexedRecord)
    return record


def test_repeated_tokens_add_up() -> None:
    record = recorded(nn.Embedding(4, 3), torch.tensor([[2, 2, 0], [1, 2, 3]]))
    expected = torch.tensor([[1.0, 0, 2, 0], [0, 1, 1, 1]])[:, :, None] * WEIGHTS
    torch.testing.assert_close(record.example_gradients(), expected)
    torch.testing.assert_close(record.squared_norms(), torch.tensor([5.0, 3.0]) * 14)
    torch.testing.assert_close(record.dot_products(record), torch.tensor([[5.0, 2], [2, 3]]) * 14)


def test_the_padding_row_gets_nothing() -> None:
    record = recorded(nn.Embedding(4, 3, padding_idx=2), torch.tensor([[2, 2, 0], [1, 2, 3]]))
    assert not record.example_gradients()[:, 2].any()
    torch.testing.assert_close(record.squared_norms(), torch.tensor([1.0, 2.0]) * 14)


def test_nothing_of_the_size_of_the_table_is_kept() -> None:
    record = recorded(nn.Embedding(10**6, 3), torch.tensor([[2, 10**6 - 1]]))
    assert record.example_numel == 3 * 10**6
    assert record.indices.shape == (1, 2)
    assert record.gradients.shape == (1, 2, 3)
    torch.testing.assert_close(record.dot_products(record), torch.tensor([[28.0]]))


def test_a_largest_norm_is_applied_before_the_gradient() -> None:
    layer, batch = nn.Embedding(4, 3, max_norm=0.5).double(), torch.tensor([[2, 2, 0], [1, 2, 3]])
    truth = example_gradients({"weight": layer.weight}, lambda k: losses(layer, batch[k : k + 1]).sum(), 2)
    torch.testing.assert_close(recorded(layer, batch).example_gradients(), truth["weight"])


def test_rows_may_be_sparse() -> None:
    batch = torch.tensor([[2, 2, 0]])
    dense = recorded(nn.Embedding(4, 3), batch).example_gradients()
    torch.testing.assert_close(recorded(nn.Embedding(4, 3, sparse=True), batch).example_gradients(), dense)


def test_which_tables_are_covered_by_the_formula() -> None:
    assert isinstance(rule_for(nn.Embedding(4, 3)), EmbeddingRule)
    assert isinstance(rule_for(nn.Embedding(4, 3, scale_grad_by_freq=True)), FallbackRule)
    assert isinstance(rule_for(nn.EmbeddingBag(4, 3)), FallbackRule)


def test_indices_that_all_examples_share() -> None:
    rule = EmbeddingRule()
    assert rule.is_shared(torch.arange(5), 3)
    assert not rule.is_shared(torch.arange(3), 3)  # one token for each
    assert not rule.is_shared(torch.ones(1, 5), 3)  # [1, t] has room for examples
