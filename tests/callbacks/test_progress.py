"""Bars are shown by the Trainer's own display, and by nobody else."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_influence.callbacks.progress import progress
from tests.callbacks.toys import NormRecorder, Toy, every_step, loader, trainer


class Shows(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            with progress(trainer, 3, "norms [step 1]") as advance:
                for _ in range(3):
                    advance(1)


def shown(tmp_path, capsys, bar: Callback | None) -> str:
    callbacks = [Shows(), *([bar] if bar else [])]
    trainer(tmp_path, callbacks, max_epochs=1, enable_progress_bar=bar is not None).fit(Toy(), loader(), loader(8))
    return capsys.readouterr().out


def test_tqdm_gets_a_second_line(tmp_path, capsys):
    text = shown(tmp_path, capsys, TQDMProgressBar())
    assert "norms [step 1]:   0%" in text
    assert "Epoch 0: 100%" in text


def test_rich_gets_a_second_task(tmp_path, capsys):
    tasks = []

    class Watched(RichProgressBar):
        def refresh(self, hard=False):
            tasks.extend((task.description, task.completed) for task in self.progress.tasks)
            super().refresh(hard)

    bar = Watched()
    shown(tmp_path, capsys, bar)
    assert ("norms \\[step 1]", 3) in tasks
    assert not [task for task in bar.progress.tasks if "norms" in task.description]


class Own(ProgressBar):
    """Somebody else's bar, of which nothing is known."""

    is_disabled = False


def test_another_bar_gets_a_plain_line(tmp_path, capsys):
    assert "norms [step 1]:   0%" in shown(tmp_path, capsys, Own())


@pytest.mark.parametrize("bar", [None, TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0)])
def test_nothing_is_shown_without_a_bar(bar, tmp_path, capsys):
    assert "norms" not in shown(tmp_path, capsys, bar)


def test_a_recording_shows_its_progress(tmp_path, capsys):
    callbacks = [NormRecorder(when="checkpoint"), every_step(tmp_path, 4), TQDMProgressBar()]
    trainer(tmp_path, callbacks, max_epochs=1, enable_progress_bar=True).fit(Toy(), loader(), loader(8))
    assert "norms, step 4" in capsys.readouterr().out
