"""Two ranks record what one records, and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_influence.callbacks.records import find_records
from tests.callbacks import toys
from tests.callbacks.toys import (
    Failing,
    NormRecorder,
    Toy,
    assert_norms,
    assert_same,
    every_step,
    loader,
    trainer,
)


class Witness(Callback):
    """Writes what only the forked ranks see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, module):
        torch.save(torch.rand(3), self.folder / f"random{trainer.global_rank}.pt")


def fit_on_two_ranks(folder: Path, callbacks: list[Callback], strategy: Any = "ddp_fork") -> Toy:
    folder.mkdir()
    seed_everything(0, verbose=False)
    model = Toy()
    settings = {"devices": 2, "strategy": strategy, "max_epochs": 1, "limit_val_batches": 0}
    running = trainer(folder, [*callbacks, Witness(folder), every_step(folder, 2)], **settings)
    running.fit(model, loader(13, shuffle=True))
    return model


NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@NO_VALIDATION
def test_two_ranks_equal_one_and_the_training_does_not_notice(tmp_path):
    plain = fit_on_two_ranks(tmp_path / "plain", [])
    recorded = fit_on_two_ranks(tmp_path / "recorded", [NormRecorder(batch_size=3)])
    assert_same(recorded.state_dict(), plain.state_dict())
    for rank in (0, 1):
        left, right = (tmp_path / f / f"random{rank}.pt" for f in ("plain", "recorded"))
        assert torch.equal(torch.load(left, weights_only=True), torch.load(right, weights_only=True))
    [record] = find_records(tmp_path / "recorded" / "influence" / "norms")
    norms = toys.read_norms(record.path)
    assert sorted(norms) == list(range(13))
    # BatchNorm statistics differ between ranks; the file, and so the recording, has those of rank 0
    model = Toy.load_from_checkpoint(record.checkpoint).eval()
    assert_norms(model, norms, toys.data(13))


class Telling(Failing):
    """Goes on training after the failure, which a rank left waiting could not."""

    def _record(self, trainer, *args):
        try:
            super()._record(trainer, *args)
        except RuntimeError as error:
            (Path(trainer.default_root_dir) / f"error{trainer.global_rank}.txt").write_text(str(error))


@NO_VALIDATION
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path):
    fit_on_two_ranks(tmp_path / "failed", [Telling(when="checkpoint")])
    for rank in (0, 1):
        text = (tmp_path / "failed" / f"error{rank}.txt").read_text()
        assert "failed at step 2 (checkpoint): rank 1: ValueError: example 3 has no label." in text
        assert (tmp_path / "failed" / f"random{rank}.pt").exists()


@NO_VALIDATION
@pytest.mark.parametrize(
    "options", [{"static_graph": True, "gradient_as_bucket_view": True}, {"find_unused_parameters": True}]
)
def test_the_options_of_ddp_do_not_matter(options, tmp_path):
    """A backward pass of our own would count in a static graph; asking for gradients at outputs does not."""
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **options)
    plain = fit_on_two_ranks(tmp_path / "plain", [], strategy=strategy)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **options)
    recorded = fit_on_two_ranks(tmp_path / "recorded", [NormRecorder(batch_size=3)], strategy=strategy)
    assert_same(recorded.state_dict(), plain.state_dict())
    assert len(find_records(tmp_path / "recorded" / "influence" / "norms")) == 1
