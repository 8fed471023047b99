"""An extra pass leaves no trace: at every hook, whatever the model keeps, also when the pass fails."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from lightning_influence.callbacks.guard import pristine
from tests.callbacks.toys import Toy, assert_same, data, every_step, fit, loader, trainer

HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_before_optimizer_step",
    "on_train_end",
]


class ExtraPass(Callback):
    """Everything an extra pass may do: train-like steps on other data, with whatever noise they make."""

    def __init__(self, *hooks: str) -> None:
        self.calls = 0
        for hook in hooks:
            setattr(self, hook, self.run)

    def run(self, trainer: Any, module: Toy, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.calls += 1
        with pristine(trainer, module):
            extra_pass(module)


def draw() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]  # noqa: NPY002


def extra_pass(module: Toy) -> None:
    draw()
    module.train()
    for batch in loader(8, seed=9, shuffle=True):
        seen = len(module.seen)
        module.training_step(batch, 0).backward()
        del module.seen[seen:]
        module.log_dict({"train_loss": torch.tensor(100.0)})
    module.net[0].weight.requires_grad_(False)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_identical_at_every_hook(accumulate, tmp_path):
    settings = {"accumulate_grad_batches": accumulate}
    plain = fit([every_step(tmp_path / "a", 2)], tmp_path, **settings)
    extra = ExtraPass(*HOOKS)
    assert_same(fit([extra, every_step(tmp_path / "b", 2)], tmp_path, **settings), plain)
    assert extra.calls > len(HOOKS)


def test_the_pass_itself_would_show(tmp_path):
    """Without the guard the same pass changes the training: the test above can fail."""

    class Unguarded(ExtraPass):
        def run(self, trainer, module, *_):
            F.cross_entropy(module(data().tensors[0]), data().tensors[1]).backward()

    plain = fit([], tmp_path, enable_checkpointing=False)
    with pytest.raises(AssertionError):
        assert_same(fit([Unguarded("on_train_batch_start")], tmp_path, enable_checkpointing=False), plain)


def test_gradients_are_there_inside_trainer_validate(tmp_path):
    """The evaluation loop runs under inference_mode, in which nothing can be differentiated."""

    class Gradients(Callback):
        norm = None

        def on_validation_end(self, trainer, module):
            with pristine(trainer, module):
                x, y = data().tensors
                F.cross_entropy(module(x), y).backward()
                self.norm = module.net[0].weight.grad.norm()

    gradients = Gradients()
    trainer(tmp_path, [gradients]).validate(Toy(), loader(8), verbose=False)
    assert gradients.norm > 0
