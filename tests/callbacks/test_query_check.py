"""Every query is looked at, and what is not in order is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_influence.callbacks.query_check import check_finite, texts_of
from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.training_step_loss import TrainingStepLoss
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.losses import ClassificationLoss
from tests.callbacks.toys import Toy, data


def recording(folder, model: nn.Module) -> Recording:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return Recording(trainer, model.eval(), 0, "checkpoint", None, folder, "dots")


def queries(n: int, broken: list[int], batch_size: int) -> ExampleLoader:
    dataset = data(n)
    dataset.tensors[0][broken] = torch.inf
    return ExampleLoader(dataset, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 31])
def test_losses_that_are_not_finite(batch_size, tmp_path):
    check_finite(recording(tmp_path, Toy()), queries(31, [], batch_size), ClassificationLoss())
    message = r"the loss of 2 of 31 queries is not finite \(ids \[5, 30\]\); expected finite losses\. Remove"
    with pytest.raises(ValueError, match=message):
        check_finite(recording(tmp_path, Toy()), queries(31, [5, 30], batch_size), ClassificationLoss())


class Whole(TrainingStepLoss):
    """A loss of whole batches without a Trainer."""

    def batch_loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_of_a_batch_that_has_one_loss_the_examples_are_named(tmp_path):
    check_finite(recording(tmp_path, Toy()), queries(9, [], 4), Whole())
    with pytest.raises(ValueError, match=r"1 of 9 queries is not finite \(ids \[6\]\)"):
        check_finite(recording(tmp_path, Toy()), queries(9, [6], 4), Whole())


ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}, {"prompt": "three", "answer": 3}]


@pytest.mark.parametrize("text", ["prompt", lambda row: row["prompt"]])
def test_texts(text):
    assert texts_of(ExampleLoader(ROWS), text, "f()") == ["one", "two", "three"]
    assert texts_of(ExampleLoader(ROWS, indices=[2, 0]), text, "f()") == ["three", "one"]


@pytest.mark.parametrize(
    ("rows", "text", "message"),
    [
        (
            ROWS,
            "text",
            r"`f\(\)`: expected a field .* row 0 has the fields \['prompt', 'answer'\] \(KeyError: 'text'\)",
        ),
        (ROWS, lambda row: row.prompt, "row 0 has the fields .*AttributeError"),
        ([("one", 1)], "prompt", r"row 0 is a tuple \(TypeError"),
        (ROWS, "answer", r"`f\(\)`: expected a text for every row; for row 0 got a int\."),
        ([*ROWS, {"other": 1}], "prompt", r"row 3 has the fields \['other'\]"),
        ([SimpleNamespace(prompt="x")], "prompt", "row 0 is a SimpleNamespace"),
    ],
)
def test_rows_without_a_text(rows, text, message):
    with pytest.raises(ValueError, match=message):
        texts_of(ExampleLoader(rows), text, "f()")
