"""What is chosen by is what is trained on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.curvature import EKFAC
from lightning_influence.datamodule import DataSelector
from lightning_influence.datamodule.placement import placed
from lightning_influence.selection.pipeline import select_training_data
from tests.datamodule.test_reselection import RELOAD
from tests.datamodule.toys import Data, Net, TrainOnly, fit, numbered, trainer


def turned(x, y):
    return x.roll(1, 1), (y + 1) % 3


class TurningNet(Net):
    """Sees other numbers and labels than those in the dataset."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return turned(*batch)


class TurningData(TrainOnly):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return turned(*batch)


class Own(Net):
    """A loss without labels to draw."""

    def example_losses(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


def loader(n=24, seed=0):
    return DataLoader(numbered(n, seed), batch_size=5)


@pytest.mark.parametrize(
    ("model", "data"), [(TurningNet, TrainOnly), (Net, TurningData)], ids=["of the module", "of the datamodule"]
)
def test_transfer_hooks_make_the_batches_that_are_looked_at(model, data):
    torch.manual_seed(1)
    looking, pool, goals = model(), loader(), loader(6, 1)
    settings = {"budget": 5, "curvature": EKFAC(damping=0.1), "progress": False}
    near, far = (TensorDataset(*turned(*part.dataset.tensors)) for part in (pool, goals))
    expected = select_training_data(looking, near, {"a": far, "b": far}, **settings)
    raw = select_training_data(looking, pool, {"a": goals, "b": goals}, **settings)
    settings.pop("progress")
    selector = DataSelector(data(pool), {"a": goals, "b": loader(6, 1)}, **settings)
    found = selector.select(looking, progress=False)
    assert found.ids == expected.ids
    assert selector.select(torch.compile(looking, backend="eager"), progress=False).ids == expected.ids
    torch.testing.assert_close(found.gains, expected.gains)
    assert not torch.allclose(found.gains, raw.gains)


class InTraining(Net):
    """As in Lightning's own example of augmentation."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return turned(*batch) if self.trainer.training else batch


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
def test_a_hook_that_needs_a_trainer_says_so():
    selector = DataSelector(loader(), loader(6, 1), val=loader(6, 2), budget=4, curvature=EKFAC(damping=0.1))
    with pytest.raises(
        ValueError, match=r"`on_after_batch_transfer` fails on a batch \(RuntimeError: .* needs `self.trainer`"
    ):
        selector.select(InTraining(), progress=False)
    assert len(selector.select(fit(selector, model=InTraining()), progress=False).ids) == 4


def test_data_that_a_fit_only_moves_is_left_as_it_is():
    data = {"a": loader(), "b": loader()}
    assert placed(data, Net(), TrainOnly(loader()), None) == data


def test_equal_parts_make_equal_batches():
    model, inner = TurningNet(), TrainOnly(loader())
    one, two, other = (
        placed(ExampleLoader(part), net, inner, None).collate_fn
        for part, net in ((loader(), model), (loader(6), model), (loader(), TurningNet()))
    )
    assert one == two
    assert one != other


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.filterwarnings("ignore:select_training_data")
def test_a_choice_in_the_middle_of_a_fit_is_made_in_its_precision(precision):
    settings = {"budget": 6, "reselect_every_n_epochs": 1, "curvature": EKFAC(damping=0.1)}
    selector = DataSelector(loader(), val=loader(6, 1), **settings)
    model = fit(selector, max_epochs=2, precision=precision, **RELOAD)
    assert next(model.parameters()).dtype != torch.float32
    assert len(selector.selected_ids) == 6
    assert len(selector.select(model, progress=False).ids) == 6  # and after it
    assert len(selector.select(Net(), progress=False).ids) == 6  # by a model of another precision


def test_labels_that_cannot_be_drawn_are_told_before_the_first_epoch():
    model = Own()
    selector = DataSelector(Data(), budget=4, reselect_every_n_epochs=3)
    with pytest.raises(ValueError, match=r"not sampled_example_losses.*ask for fisher='empirical'"):
        trainer(max_epochs=9, **RELOAD).fit(model, datamodule=selector)
    assert not model.seen
