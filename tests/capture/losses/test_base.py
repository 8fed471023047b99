"""The laws that hold for every per-example loss, and what they share."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from lightning_influence.capture import ExampleLoss, GradientCapture
from lightning_influence.capture.losses import base
from lightning_influence.capture.sampling import Uniforms
from tests.capture.losses.cases import CASES, SAMPLING, LossCase
from tests.capture.models import Mlp, text

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_sampling_case = pytest.mark.parametrize("case", SAMPLING, ids=str)


def test_no_loss_is_missing() -> None:
    from lightning_influence.capture import losses

    public = [getattr(losses, name) for name in losses.__all__]
    members = {cls for cls in public if isinstance(cls, type) and issubclass(cls, ExampleLoss)}
    assert {type(case.loss) for case in CASES} == {cls for cls in members if not inspect.isabstract(cls)}


@every_case
def test_one_attached_loss_per_example(case: LossCase) -> None:
    model, batch = case.model().eval(), case.batch(4)
    losses = case.loss.losses(model, batch)
    assert losses.shape == (4,)
    assert losses.requires_grad
    assert case.loss.batch_size(batch) == 4
    assert case.loss.supervised(batch).shape == (4,)
    assert case.loss.supervised(batch).dtype == torch.int64
    assert (case.loss.supervised(batch) > 0).all()
    assert case.loss.reduction


@every_case
def test_an_example_has_the_same_loss_in_every_batch(case: LossCase) -> None:
    model, batch = case.model().eval(), case.batch(4)
    whole = case.loss.losses(model, batch)
    for rows in ([3], [2, 0]):
        part = case.take(batch, rows)
        torch.testing.assert_close(case.loss.losses(model, part), whole[rows], rtol=1e-9, atol=1e-9)
        assert torch.equal(case.loss.supervised(part), case.loss.supervised(batch)[rows])


@every_case
def test_losses_where_supervised_are_the_same(case: LossCase) -> None:
    model, batch = case.model().eval(), case.batch(4)
    torch.testing.assert_close(case.loss.where_supervised().losses(model, batch), case.loss.losses(model, batch))


@every_case
def test_the_losses_can_be_recorded(case: LossCase) -> None:
    batch = case.batch(3)
    with GradientCapture(case.model(), lambda name, module: "relative_attention_bias" not in name) as capture:
        records = list(capture.record(batch, case.loss.losses, mask=case.loss.position_mask(batch)))
    assert len(records) == len(capture.components)


@every_sampling_case
def test_labels_depend_on_id_and_seed_alone(case: LossCase) -> None:
    model, batch, ids = case.model().eval(), case.batch(4), torch.tensor([7, 2, 9, 4])
    whole = case.loss.sampled_losses(model, batch, Uniforms(ids, 0))
    assert whole.shape == (4,)
    assert whole.requires_grad
    assert torch.equal(case.loss.sampled_losses(model, batch, Uniforms(ids, 0)), whole)
    for rows in ([3], [2, 0]):
        part = case.loss.sampled_losses(model, case.take(batch, rows), Uniforms(ids[rows], 0))
        torch.testing.assert_close(part, whole[rows], rtol=1e-9, atol=1e-9)
    assert not torch.equal(case.loss.sampled_losses(model, batch, Uniforms(ids + 1, 0)), whole)
    assert not torch.equal(case.loss.sampled_losses(model, batch, Uniforms(ids, 1)), whole)


@every_sampling_case
def test_sampled_losses_ignore_the_labels(case: LossCase) -> None:
    """Their values, that is; where there are labels is kept."""
    model, batch = case.model().eval(), case.batch(4)
    changed: Any
    if isinstance(batch, tuple):
        changed = (batch[0], (batch[1] == 0).to(batch[1]))
    else:
        key = "classes" if "classes" in batch else "labels"
        changed = {**batch, key: torch.where(batch[key] == -100, batch[key], (batch[key] == 0).long())}
    if case.name == "encoder-decoder":  # there they are the decoder's inputs, too
        changed["decoder_input_ids"] = batch["decoder_input_ids"] = batch["input_ids"]
    uniforms = Uniforms(torch.arange(4), 0)
    found = case.loss.sampled_losses(model, changed, uniforms)
    assert torch.equal(found, case.loss.sampled_losses(model, batch, uniforms))
    assert not torch.equal(case.loss.losses(model, changed), case.loss.losses(model, batch))


@pytest.mark.parametrize("case", [case for case in SAMPLING if isinstance(case.batch(1), tuple)], ids=str)
def test_the_mean_score_of_sampled_labels_is_zero(case: LossCase) -> None:
    """E[grad log p(y)] = 0 when y is drawn from p: what makes their second moment the Fisher information."""
    n, model = 20_000, case.model().eval()
    losses = case.loss.sampled_losses(model, case.take(case.batch(1), [0] * n), Uniforms(torch.arange(n), 0))
    *_, bias = model.parameters()
    [mean] = torch.autograd.grad(losses.mean(), [bias])
    assert (mean.abs() < 4 / n**0.5).all()


@pytest.mark.parametrize(
    ("batch", "found"),
    [((1, 2), 2), ([1, 2], 2), ((1, 2, 3), None), ({"labels": 3}, 3), ({"x": 1}, None), (torch.ones(2), None)],
)
def test_where_labels_are(batch: Any, found: Any) -> None:
    assert base.labels_of(batch) == found


def test_batches_are_split_into_inputs_and_labels() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert base.split_batch((x, y)) == (x, y)
    inputs, labels = base.split_batch(BatchEncoding({"input_ids": x, "labels": y}))
    assert labels is y
    assert list(inputs) == ["input_ids"]
    with pytest.raises(ValueError, match=r"got a batch of type tuple; expected \(x, y\) or a mapping with 'labels'"):
        base.split_batch((x, x, y))


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: SimpleNamespace(logits=t), lambda t: {"logits": t}, lambda t: (t, 1)]
)
def test_logits_are_found(wrap: Any) -> None:
    logits = torch.ones(2)
    assert base.logits_of(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, {"scores": torch.ones(2)}, (), ("a", torch.ones(2)), 3.0])
def test_logits_are_missing(output: Any) -> None:
    message = rf"the model returned {type(output).__name__}; expected a tensor, an object with .logits"
    with pytest.raises(ValueError, match=message):
        base.logits_of(output)


def test_wrapped_networks_are_called() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss = Mlp(), nn.CrossEntropyLoss()

    wrapper, inputs = Wrapper(), torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(base.predictions(wrapper, inputs), wrapper.network(inputs))
    assert torch.equal(base.predictions(wrapper, {"inputs": inputs}), wrapper.network(inputs))


def test_the_attention_mask_is_the_position_mask() -> None:
    loss = CASES[4].loss
    mask = loss.position_mask(text())
    assert mask.dtype == torch.bool
    assert torch.equal(mask, text()["attention_mask"].bool())
    assert loss.position_mask({"attention_mask": torch.ones(2, 1, 3, 3)}) is None
    assert loss.position_mask((torch.ones(2), torch.ones(2))) is None


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
@settings(max_examples=4)
def test_losses_are_formed_in_float32_at_least(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert base.at_least_float(torch.ones(1, dtype=dtype)).dtype == expected
