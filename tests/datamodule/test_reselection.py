"""Chosen again while the fit goes on, which is otherwise left alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence.curvature import EKFAC
from lightning_influence.datamodule import DataSelector
from lightning_influence.datamodule.reselection import Reselection
from lightning_influence.selection.pipeline import select_training_data
from tests.datamodule.test_data_selector import saver
from tests.datamodule.toys import Data, Net, fit, numbered, numbers, trainer

RELOAD = {"reload_dataloaders_every_n_epochs": 1}


class Restless(Net):
    """Random numbers, modes, buffers and momenta that a pass in between could disturb."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Watch(Callback):
    """What every epoch begins with."""

    def __init__(self):
        self.served, self.models = [], []

    def on_train_epoch_start(self, trainer, module):
        selector = trainer.datamodule
        self.served.append(selector.selected_ids or selector.warmup_ids)
        self.models.append(copy.deepcopy(module).cpu())
        assert all(part.training for part in module.modules())


class Give(Callback):
    """The same rows, not computed."""

    def __init__(self, served):
        self.served = served

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 in self.served:
            trainer.datamodule.select(ids=self.served[trainer.current_epoch + 1])


def run(callback, epochs=5, **kwargs):
    seed_everything(3, verbose=False)
    selector = DataSelector(Data(n=40), budget=6, warmup=8, curvature=EKFAC(damping=0.1), components="net.4", **kwargs)
    model = fit(selector, Restless(), max_epochs=epochs, callbacks=[callback], **RELOAD)
    return selector, model, torch.rand(3)


@pytest.mark.filterwarnings("ignore:select_training_data")
def test_picks_are_those_of_the_weights_and_nothing_else_changes():
    watch = Watch()
    selector, model, drawn = run(watch, reselect_every_n_epochs=2)
    warm, second, last = watch.served[0], watch.served[2], watch.served[4]
    assert watch.served == [warm, warm, second, second, last]
    for epoch, picked in ((2, second), (4, last)):
        data = selector._inner
        expected = select_training_data(
            watch.models[epoch].eval(),
            DataLoader(data.train, data.batch_size),
            DataLoader(data.val, data.batch_size),
            budget=6,
            curvature=EKFAC(damping=0.1),
            components="net.4",
            progress=False,
        )
        assert sorted(expected.ids) == picked
    assert len({tuple(ids) for ids in watch.served}) == 3
    assert sorted(model.seen[16:22]) != sorted(model.seen[:8])
    _, same, same_drawn = run(Give({2: second, 4: last}))
    assert same.seen == model.seen
    assert torch.equal(drawn, same_drawn)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in same.state_dict().items())


def ordered(budget=5, **kwargs):
    pool = DataLoader(numbered(32), batch_size=4)
    return DataSelector(pool, numbered(6, seed=3), budget, val=numbered(4), reselect_every_n_epochs=2, **kwargs)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:select_training_data")
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_fit_ends_where_the_whole_one_does(stop, tmp_path):
    whole, watch = Net(), Watch()
    start = copy.deepcopy(whole.state_dict())
    fit(ordered(), whole, max_epochs=5, callbacks=[watch], **RELOAD)
    first = Net()
    first.load_state_dict(start)
    fit(ordered(), first, max_epochs=stop, **{**RELOAD, **saver(tmp_path)})
    second, rest = Net(), Watch()
    settings = {"max_epochs": 5, "callbacks": [rest], "ckpt_path": str(tmp_path / "end.ckpt"), **RELOAD}
    fit(ordered(selection=[1]), second, **settings)  # the checkpoint's is later
    begun = [ids for ids in watch.served if ids is not None]
    assert [ids for ids in rest.served if ids is not None] == begun[stop - 2 :]
    assert first.seen + second.seen == whole.seen
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in second.state_dict().items())


@pytest.mark.filterwarnings("ignore:select_training_data")
def test_ranks_train_on_the_same_new_rows(tmp_path):
    class Note(Callback):
        def on_train_epoch_start(self, trainer, module):
            module.seen.append([])

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.seen[-1] += numbers(batch[0])

        def on_train_end(self, trainer, module):
            found = [trainer.datamodule.selected_ids, module.seen]
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    class Quiet(Net):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    settings = {"max_epochs": 3, "callbacks": [Note()], "devices": 2, "strategy": "ddp_fork", **RELOAD}
    selector = ordered(6, warmup=8)
    fit(selector, Quiet(), **settings)
    (first, seen), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == sorted(seen[2] + others[2])
    assert sorted(seen[0] + others[0]) == sorted(seen[1] + others[1])
    assert len(first) == 6


@pytest.mark.filterwarnings("ignore:select_training_data")
def test_every_fit_counts_anew():
    selector = ordered()
    for _ in range(2):
        watch = Watch()
        fit(selector, max_epochs=3, callbacks=[watch], **RELOAD)
        assert selector._reselection.epoch == 2
    selector.train_dataloader()  # outside of a fit nothing is computed


@pytest.mark.parametrize("reload", [0, 2])
def test_a_trainer_that_would_not_ask_again(reload):
    model = Net()
    with pytest.raises(MisconfigurationException, match=rf"=2\)`: this Trainer has .*={reload} .*_every_n_epochs=1"):
        fit(ordered(), model, reload_dataloaders_every_n_epochs=reload)
    assert model.seen == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_refused_before_the_fit():
    for every in (0, True, 1.0):
        with pytest.raises(ValueError, match=r"reselect_every_n_epochs=.*expected an int >= 1, or None"):
            DataSelector(Data(), budget=2, reselect_every_n_epochs=every)
    with pytest.raises(ValueError, match=r"=1, budget=None\)`: expected an int >= 1 or a fraction"):
        DataSelector(Data(), reselect_every_n_epochs=1)
    model, fitted = Net(), EKFAC()
    select_training_data(model, numbered(), numbered(6, seed=3), budget=2, curvature=fitted, progress=False)
    with pytest.raises(ValueError, match=r"curvature=EKFAC\)`: it is fitted to other weights"):
        Reselection(1, 2, fitted)
    with pytest.raises(ValueError, match="no single validation loader"):
        fit(DataSelector(numbered(), budget=2, reselect_every_n_epochs=1), model, **RELOAD)
    assert model.seen == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_loss_that_is_not_known_is_told_before_the_first_epoch():
    class Named(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    rows, model = [{"x": x, "y": y} for x, y in numbered()], Named()
    with pytest.raises(ValueError, match="no per-example loss is known for a batch of type dict"):
        fit(DataSelector(rows, rows[:3], 4, reselect_every_n_epochs=2), model, **RELOAD)
    assert model.seen == []


def test_when_it_is_due():
    rule, running = Reselection(3, 0.5, None), trainer(**RELOAD)
    rule.begin(running)
    assert not rule.is_due(None)
    assert not rule.is_due(running)
    running.training = True
    due = []
    for epoch in range(8):
        running.fit_loop.epoch_progress.current.completed = epoch
        due.append(rule.is_due(running))
    assert due == [False, False, False, True, False, False, True, False]
    rule.epoch = 6
    running.fit_loop.epoch_progress.current.completed = 6
    assert not rule.is_due(running)
