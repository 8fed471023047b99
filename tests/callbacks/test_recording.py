"""Batches and losses as the Trainer makes them, and nothing else in its precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from lightning_influence.callbacks.recording import PrecisionLoss, RankError, Recording, raise_together
from lightning_influence.capture import ClassificationLoss
from lightning_influence.capture.sampling import Uniforms
from tests.callbacks.toys import Toy, data, loader, trainer


class Probe(Callback):
    """Runs a function on the recording at the end of training."""

    def __init__(self, look) -> None:
        self.look = look
        self.found = None

    def on_train_end(self, trainer, module):
        recording = Recording(trainer, module, trainer.global_step, "fit_end", None, Path("unused"), "probe")
        with torch.enable_grad():
            self.found = self.look(recording)


def look(tmp_path, function, model: Toy | None = None, datamodule=None, **settings):
    probe = Probe(function)
    running = trainer(tmp_path, [probe], max_epochs=1, enable_checkpointing=False, **settings)
    if datamodule is None:
        running.fit(model or Toy(), loader(), loader(8))
    else:
        running.fit(model or Toy(), datamodule=datamodule)
    return probe.found


def batches(recording: Recording):
    examples = recording.examples(data(10), batch_size=4, indices=[1, 2, 3, 7, 8])
    return [(ids.tolist(), batch) for ids, batch in examples]


def test_examples_come_with_their_ids(tmp_path):
    found = look(tmp_path, batches)
    assert [ids for ids, _ in found] == [[1, 2, 3, 7], [8]]
    assert torch.equal(torch.cat([batch[0] for _, batch in found]), data(10).tensors[0][[1, 2, 3, 7, 8]])


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_batches_are_in_the_trainers_precision(precision, dtype, tmp_path):
    [(_, batch), _] = look(tmp_path, batches, precision=precision)
    assert batch[0].dtype == dtype
    assert batch[1].dtype == torch.int64


class Doubling(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(8)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


def test_batches_go_through_the_users_transfer_hooks(tmp_path):
    [(_, batch), _] = look(tmp_path, batches, datamodule=Doubling())
    assert torch.equal(batch[0], data(10).tensors[0][[1, 2, 3, 7]] * 2 + 1)


def test_the_users_collate_function_is_kept_and_its_loader_not_iterated(tmp_path):
    def collate(rows):
        return [tensor.double() if tensor.is_floating_point() else tensor for tensor in default_collate(rows)]

    users = loader(num_workers=1, persistent_workers=True, collate_fn=collate)

    def function(recording):
        return [batch[0].dtype for _, batch in recording.examples(users)]

    assert look(tmp_path, function) == [torch.float64] * 4
    assert users._iterator is None


class Sees(Toy):
    """Notes the dtype its last layer computes in."""

    def forward(self, x):
        logits = super().forward(x)
        self.dtype_seen = logits.dtype
        return logits


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_only_the_forward_pass_runs_in_the_trainers_precision(precision, tmp_path):
    expected = torch.float32 if precision == "32-true" else torch.bfloat16

    def function(recording):
        examples = recording.examples(data(4))
        loss = recording.loss(examples)
        [(ids, batch)] = examples
        values = loss.losses(recording.model, batch)
        sampled = loss.sampled_losses(recording.model, batch, Uniforms(ids, 0))
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return recording.model.dtype_seen, values, sampled, product.dtype

    seen, values, sampled, outside = look(tmp_path, function, Sees(), precision=precision)
    assert seen == expected
    assert values.dtype == sampled.dtype == torch.float32
    assert values.shape == sampled.shape == (4,)
    assert outside == torch.float32


def test_loss_is_the_given_one_the_modules_or_one_that_fits(tmp_path):
    class Own(Toy):
        def example_losses(self, batch):
            return self(batch[0]).sum(1)

    def function(recording, loss=None):
        return recording.loss(recording.examples(data(4)), loss).reduction

    assert look(tmp_path, function) == ClassificationLoss.reduction
    assert look(tmp_path, function, Own()) == "defined by the module"
    given = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    assert look(tmp_path, lambda recording: function(recording, given)) == "defined by a function"


def test_precision_loss_answers_everything_the_loss_does():
    loss = PrecisionLoss(ClassificationLoss(), lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    batch = data(5).tensors
    assert loss.batch_size(batch) == 5
    assert loss.position_mask(batch) is None
    assert loss.supervised(batch).tolist() == [1] * 5
    assert loss.losses(nn.Linear(4, 3), batch).dtype == torch.float32
    assert loss.losses(nn.Linear(4, 3).double(), (batch[0].double(), batch[1])).dtype == torch.float64


class Ranks:
    world_size = 1


def test_errors_are_raised_together_once():
    raise_together(Ranks(), None)
    with pytest.raises(RankError, match="ValueError: no label") as raised:
        raise_together(Ranks(), ValueError("no label"))
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(RankError) as again:
        raise_together(Ranks(), raised.value)
    assert again.value is raised.value


def test_shards_cover_everything_once():
    class Two(Ranks):
        world_size = 3

    shards = []
    for rank in range(3):
        Two.global_rank = rank
        shards.append(Recording(Two(), None, 0, "fit_end", None, Path("."), "x").shard(list(range(10, 14))))
    assert shards == [[10, 13], [11], [12]]
    with pytest.raises(ValueError, match="x: 2 examples cannot be shared out over 3 ranks"):
        Recording(Two(), None, 0, "fit_end", None, Path("."), "x").shard([0, 1])


def test_every_batch_is_told(tmp_path):
    told = []
    look(tmp_path, lambda recording: list(recording.examples(data(10), 4, advance=told.append)))
    assert told == [1, 1, 1]
