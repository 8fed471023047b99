from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForTokenClassification, BatchEncoding, BertConfig

from lightning_influence.capture import LanguageModelLoss, resolve_loss
from lightning_influence.capture.sampling import Uniforms
from tests.capture import models
from tests.capture.losses.cases import Mlp
from tests.capture.models import VOCABULARY, causal_losses, take, text, token_losses


def test_equals_the_loss_of_transformers() -> None:
    """Theirs is the mean over all supervised tokens of the batch, in float32."""
    for model in (models.gpt2(), models.llama()):
        batch = text()
        counts = LanguageModelLoss().supervised(batch)
        assert counts.tolist() == [5, 4, 3]
        theirs = model(**batch).loss.double()
        for ours in (
            LanguageModelLoss().losses(model, batch).sum(),
            (LanguageModelLoss("mean").losses(model, batch) * counts).sum(),
        ):
            torch.testing.assert_close(ours / counts.sum(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_head_runs_where_something_is_supervised(reduction: Any) -> None:
    """Columns 1 to 5 of 7: the first labels are masked, and the last position predicts nothing."""
    model, batch, loss = models.llama(), text(), LanguageModelLoss(reduction)
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    trimmed = loss.where_supervised()
    found = trimmed.losses(model, batch), trimmed.sampled_losses(model, batch, Uniforms(torch.arange(3), 0))
    whole = loss.losses(model, batch), loss.sampled_losses(model, batch, Uniforms(torch.arange(3), 0))
    torch.testing.assert_close(found, whole)
    assert shapes == [(3, 5), (3, 5), (3, 7), (3, 7)]


def test_models_that_cannot_leave_out_positions_run_on_all() -> None:
    loss, batch = LanguageModelLoss(shift=False).where_supervised(), text()
    torch.testing.assert_close(
        loss.losses(models.bert(), batch), LanguageModelLoss(shift=False).losses(models.bert(), batch)
    )
    everything = {**text(), "labels": text()["input_ids"].clamp_min(1)}
    torch.testing.assert_close(
        LanguageModelLoss().where_supervised().losses(models.llama(), everything),
        LanguageModelLoss().losses(models.llama(), everything),
    )


def test_masked_labels_stand_at_their_position() -> None:
    model, batch = models.bert(), text()
    loss = LanguageModelLoss(shift=False)
    torch.testing.assert_close(loss.losses(model, batch).sum() / loss.supervised(batch).sum(), model(**batch).loss)


def test_an_encoder_decoder_makes_its_inputs_from_the_labels() -> None:
    model, batch, loss = models.t5(), text(), LanguageModelLoss(encoder_decoder=True)
    assert not loss.shift
    assert loss.position_mask(batch) is None
    torch.testing.assert_close(loss.losses(model, batch).sum() / loss.supervised(batch).sum(), model(**batch).loss)
    given = {**batch, "decoder_input_ids": batch["input_ids"]}
    torch.testing.assert_close(loss.losses(model, given).sum() / loss.supervised(batch).sum(), model(**given).loss)


def test_equals_the_formula() -> None:
    model, batch = models.gpt2(), text()
    torch.testing.assert_close(LanguageModelLoss().losses(model, batch), causal_losses(model, batch))
    torch.testing.assert_close(LanguageModelLoss().losses(model, BatchEncoding(batch)), causal_losses(model, batch))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_sequence_without_labels_has_no_loss(reduction: Any) -> None:
    model, batch, loss = models.gpt2(), text(), LanguageModelLoss(reduction)
    batch["labels"][1] = -100
    batch["labels"][1, 0] = 3  # the first label is never predicted
    assert loss.supervised(batch).tolist() == [5, 0, 3]
    for losses in (loss.losses(model, batch), loss.sampled_losses(model, batch, Uniforms(torch.arange(3), 0))):
        assert losses[1] == 0
        assert (losses[[0, 2]] > 0).all()
    batch["labels"][:] = -100
    assert loss.losses(model, batch).tolist() == [0, 0, 0]
    assert loss.sampled_losses(model, batch, Uniforms(torch.arange(3), 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("right", [0, 2])
def test_padding_does_not_change_what_is_drawn(left: int, right: int) -> None:
    model, batch, uniforms = models.llama(), text(), Uniforms(torch.tensor([5, 8, 2]), 1)
    padded = {k: F.pad(v, (left, right), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    loss = LanguageModelLoss()
    expected = loss.sampled_losses(model, batch, uniforms)
    torch.testing.assert_close(loss.sampled_losses(model, padded, uniforms), expected, rtol=1e-6, atol=1e-6)


class Fixed(Mlp):
    """The same logits at every position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def test_tokens_are_drawn_from_the_model() -> None:
    logits = torch.linspace(-2, 1, VOCABULARY).double()
    model, n, t = Fixed(logits), 4000, 6
    batch = {"input_ids": torch.zeros(n, t, dtype=torch.int64), "labels": torch.zeros(n, t, dtype=torch.int64)}
    losses = LanguageModelLoss().sampled_losses(model, batch, Uniforms(torch.arange(n), 0))
    [gradient] = torch.autograd.grad(losses.sum(), [model.logits])  # n (t - 1) p - how often each was drawn
    draws = n * (t - 1)
    expected = draws * logits.softmax(0)
    chi_square = (gradient.square() / expected).sum()
    assert 4 < chi_square < 49  # 22 degrees of freedom: 0.1 % above
    assert losses.std() > 0.1  # not the same for all examples


def test_the_cache_of_a_generating_model_is_not_filled() -> None:
    model, seen = models.llama(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("use_cache")), with_kwargs=True)
    LanguageModelLoss().losses(model, text())
    LanguageModelLoss().losses(model, {**text(), "use_cache": True})
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, 3)),
            r"LanguageModelLoss: got a batch of type tuple; expected a mapping with 'labels'",
        ),
        ({"input_ids": torch.ones(2, 3)}, r"got a batch of type dict; expected a mapping with 'labels' \[n, t\]"),
        ({**text(), "labels": torch.ones(3, dtype=torch.int64)}, r"expected a mapping with 'labels' \[n, t\]"),
        (
            {**text(), "labels": text()["labels"].masked_fill(text()["labels"] == -100, -1)},
            r"got labels \[-1\]; expected token ids, or -100 where nothing is predicted. Write labels.masked_fill",
        ),
        (
            {**text(), "labels": text()["labels"].masked_fill(text()["labels"] == -100, VOCABULARY + 2)},
            rf"got label {VOCABULARY + 2}; expected token ids below {VOCABULARY}, those that the model scores",
        ),
        (
            {**text(), "input_ids": text()["input_ids"].index_fill(1, torch.tensor([2]), VOCABULARY)},
            rf"got token {VOCABULARY}; expected input_ids from 0 to {VOCABULARY - 1}, those that the model embeds",
        ),
        (
            {**text(), "input_ids": text()["input_ids"].index_fill(1, torch.tensor([2]), -1)},
            r"got token -1; expected input_ids from 0",
        ),
        (
            {**text(), "labels": text(3, 5)["labels"]},
            r"logits of shape \(3, 7, 23\) for labels \(3, 5\); expected \[n, t, V\]",
        ),
    ],
    ids=["tensor", "no labels", "one label each", "negative", "no class", "no token", "below", "other length"],
)
def test_wrong_batches(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelLoss().losses(models.gpt2(), batch)


def test_a_model_without_embeddings_takes_what_it_takes() -> None:
    class Without(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            raise NotImplementedError

        def forward(self, input_ids: Tensor) -> Tensor:
            return F.one_hot(input_ids, 60).double()

    batch = {"input_ids": torch.tensor([[50, 51]]), "labels": torch.tensor([[50, 51]])}
    torch.testing.assert_close(
        LanguageModelLoss().losses(Without(), batch),
        torch.tensor([60.0 - 1 + torch.e]).log().double(),
        rtol=1e-6,
        atol=0,
    )


def test_wrong_reduction() -> None:
    with pytest.raises(ValueError, match=r"`LanguageModelLoss\(reduction='none'\)`: expected 'sum' or 'mean'"):
        LanguageModelLoss("none")


def test_token_classification() -> None:
    config = BertConfig(**models.BERT, num_attention_heads=2, num_labels=4)
    model = models.ready(AutoModelForTokenClassification.from_config(config))
    batch = text()
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 4)
    loss = resolve_loss(model, batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(loss.losses(model, batch), token_losses(logits, batch["labels"]))
    assert take(batch, [0])["labels"].shape == (1, 7)
