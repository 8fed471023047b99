"""What a fit sees of a pool, and what is kept of it in files and checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_influence.datamodule import DataSelector
from lightning_influence.selection import Selection
from tests.datamodule.test_data_selector import NO_VALIDATION, rows, saver, select
from tests.datamodule.toys import Data, Net, fit, numbered, trainer


def test_whole_pool_at_first_and_the_selection_afterwards():
    data = Data()
    selector = DataSelector(data)
    assert len(fit(selector).seen) == 16
    selector.select(ids=[7, 2, 11])
    model = fit(selector)
    assert sorted(model.seen) == rows(data, [2, 7, 11])
    assert model.validated == 8
    assert selector.selected_ids == [2, 7, 11]
    assert selector.selection is None
    selector.clear()
    assert len(fit(selector).seen) == 16


def test_the_users_loader_is_kept():
    selector = DataSelector(Data(batch_size=3, drop_last=True), selection=list(range(7)))
    running = trainer()
    running.fit(Net(), datamodule=selector)
    loader = running.train_dataloader
    assert (loader.batch_size, loader.drop_last, len(loader), running.global_step) == (3, True, 2, 2)


@NO_VALIDATION
def test_plain_dataset_loader_and_hugging_face_dataset():
    assert sorted(fit(DataSelector(numbered(), selection=[3, 5], batch_size=2)).seen) == [3, 5]
    loader = DataLoader(numbered(), batch_size=2)
    assert fit(DataSelector(loader, selection=[5, 3])).seen == [3, 5]
    assert fit(DataSelector(numbered(), val=numbered(6), batch_size=8)).validated == 6


@NO_VALIDATION
def test_hugging_face_dataset_stays_one():
    datasets = pytest.importorskip("datasets")
    columns = {"x": numbered().tensors[0].tolist(), "y": numbered().tensors[1].tolist()}
    hugging = datasets.Dataset.from_dict(columns).with_format("torch")

    class OfRows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    running, model = trainer(), OfRows()
    running.fit(model, datamodule=DataSelector(hugging, selection=[20, 4, 9], batch_size=2))
    assert sorted(model.seen) == [4, 9, 20]
    assert isinstance(running.train_dataloader.dataset, datasets.Dataset)


def test_own_loader_function():
    data = Data()
    selector = DataSelector(data, selection=[1, 2, 3], loader_fn=lambda part: DataLoader(part, batch_size=1))
    assert sorted(fit(selector).seen) == rows(data, [1, 2, 3])


def test_selection_during_a_fit_counts_when_loaders_are_reloaded():
    class Change(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.datamodule.select(ids=[trainer.current_epoch + 10])
            module.seen.append(-1)

    for reload, expected in ((0, [0, 0, 0]), (1, [0, 10, 11])):
        data = Data()
        settings = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": reload, "callbacks": [Change()]}
        model = fit(DataSelector(data, selection=[0]), **settings)
        assert model.seen[::2] == [rows(data, [k])[0] for k in expected]


def test_stepping_batches_follow_the_selection():
    class Schedules(Net):
        def configure_optimizers(self):
            self.batches = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    assert fit(DataSelector(Data(), selection=list(range(8))), Schedules(), max_epochs=3).batches == 6


def test_data_given_back_at_teardown_is_set_up_again():
    class GivesBack(Data):
        def teardown(self, stage):
            super().teardown(stage)
            del self.train

    data = GivesBack()
    selector = DataSelector(data, budget=3)
    model = fit(selector)
    select(selector, model)
    assert data.calls == ["prepare_data", "setup", "teardown", "prepare_data", "setup"]
    assert len(fit(selector).seen) == 3


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_ranks_that_disagree_train_on_what_rank_0_chose(tmp_path):
    class Disagree(Callback):
        def setup(self, trainer, module, stage):
            trainer.datamodule.select(ids=[0, 1, 2, 3] if trainer.global_rank == 0 else [10, 11, 12, 13])

        def on_train_end(self, trainer, module):
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(module.seen))

    selector = DataSelector(numbered(), batch_size=1)
    trainer(devices=2, strategy="ddp_fork", callbacks=[Disagree()]).fit(Net(), datamodule=selector)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(seen[0] + seen[1]) == [0, 1, 2, 3]


# -- files and checkpoints


def test_saved_selection_is_served_by_another_process(tmp_path):
    first = DataSelector(Data(), budget=3)
    selection = select(first)
    path = first.save(tmp_path / "runs" / "selection.json")
    second = DataSelector(Data(), selection=str(path))
    assert second.selected_ids is None  # read when a fit begins, not before
    model = fit(second)
    assert sorted(model.seen) == rows(second._inner, list(selection.ids))
    assert isinstance(second.selection, Selection)
    assert torch.equal(second.selection.gains, selection.gains)


def test_saving_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing has been selected; call select first"):
        DataSelector(Data()).save(tmp_path / "selection.json")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoint_holds_selection_and_state_as_plain_json(tmp_path):
    data = Data()
    data.count = 7
    fit(DataSelector(data, selection=[3, 1]), **saver(tmp_path))
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["DataSelector"]
    assert json.loads(json.dumps(state)) == state
    assert state["selection"]["positions"] == [3, 1]
    resumed = DataSelector(Data())
    model = fit(resumed, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=2)
    assert (resumed.selected_ids, resumed._inner.count) == ([1, 3], 7)
    assert sorted(model.seen) == rows(resumed._inner, [1, 3])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_selection_made_since_the_checkpoint_wins(tmp_path):
    fit(DataSelector(Data()), **saver(tmp_path))
    later = DataSelector(Data(), selection=[5])
    fit(later, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=2)
    assert later.selected_ids == [5]
    with pytest.warns(UserWarning, match="trained on another selection than the one made since"):
        DataSelector(Data(), selection=[6]).load_state_dict(later.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_state_of_a_plain_datamodule_is_not_found(tmp_path):
    """Lightning files it under the name of the class: a known limit."""
    plain = Data()
    plain.count = 9
    fit(plain, **saver(tmp_path))
    selector = DataSelector(Data())
    fit(selector, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=2)
    assert selector._inner.count == 0
