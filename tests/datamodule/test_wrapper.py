"""For a Trainer of either namespace, the wrapper is what it wraps."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_influence.datamodule.wrapper import DataModuleWrapper, PlainData, is_datamodule, overrides
from tests.datamodule.toys import Data, Net, TrainOnly, fit, numbered, numbers, trainer

SETTINGS = {"batch_size": 4, "collate_fn": None, "num_workers": 0}
NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def test_a_fit_is_that_of_the_wrapped_datamodule():
    inner = Data()
    wrapper = DataModuleWrapper(inner)
    model = fit(wrapper)
    assert inner.calls == ["prepare_data", "setup", "teardown"]
    assert sorted(model.seen) == sorted(numbers(torch.stack([x for x, _ in inner.train])))
    assert model.validated == 8
    assert inner.trainer is wrapper.trainer


@NO_VALIDATION
def test_there_is_no_validation_where_there_was_none():
    wrapper = DataModuleWrapper(TrainOnly(DataLoader(numbered(), batch_size=4)))
    assert fit(wrapper).validated == 0
    assert not overrides(wrapper, "val_dataloader")


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_are_the_wrapped_ones(hook):
    inner = Data()
    setattr(inner, hook, lambda batch, dataloader_idx: [batch[0] + 1, batch[1]])
    assert min(fit(DataModuleWrapper(inner)).seen) >= 100


def test_attributes_and_settings_pass_through():
    inner = Data(n=17)
    inner.prepare_data_per_node = False
    wrapper = DataModuleWrapper(inner)
    assert wrapper.n == 17
    assert wrapper.prepare_data_per_node is False
    assert wrapper.hparams == inner.hparams
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapper.no_such


def test_hyperparameters_reach_logs_and_checkpoints(tmp_path):
    def written(data):
        logger = CSVLogger(tmp_path, name=type(data).__name__, version=0)
        running = trainer(logger=logger, enable_checkpointing=True, default_root_dir=tmp_path, log_every_n_steps=1)
        running.fit(Net(), datamodule=data)
        return (
            tmp_path / type(data).__name__ / "version_0" / "hparams.yaml"
        ).read_text(), running._checkpoint_connector.dump_checkpoint()

    plain, wrapped = written(Data()), written(DataModuleWrapper(Data()))
    assert plain[0] == wrapped[0]
    assert "seeded: true" in plain[0]
    assert plain[1]["datamodule_hyper_parameters"] == wrapped[1]["datamodule_hyper_parameters"]


def test_state_is_nested():
    inner, other = Data(), Data()
    inner.count = 7
    DataModuleWrapper(other).load_state_dict(DataModuleWrapper(inner).state_dict())
    assert other.count == 7


def test_copies_work():
    wrapper = copy.deepcopy(DataModuleWrapper(Data()))
    assert isinstance(wrapper, DataModuleWrapper)
    assert fit(wrapper).validated == 8


def test_str_lists_the_loaders():
    wrapper = DataModuleWrapper(Data())
    wrapper.setup("fit")
    assert "{Train dataloader: size=16}" in str(wrapper)


# -- plain data


@NO_VALIDATION
def test_plain_dataset_is_shuffled_in_batches():
    model = fit(DataModuleWrapper(PlainData(numbered(), None, SETTINGS)))
    assert sorted(model.seen) == list(range(24))
    assert model.seen != list(range(24))


def test_plain_loaders_are_taken_as_they_are():
    train, val = DataLoader(numbered(), batch_size=3), DataLoader(numbered(6))
    plain = PlainData(train, val, SETTINGS)
    assert plain.train_dataloader() is train
    model = fit(DataModuleWrapper(plain))
    assert (model.seen, model.validated) == (list(range(24)), 6)


@pytest.mark.parametrize("bad", [iter([1]), 3, DataLoader])
def test_other_things_are_refused(bad):
    with pytest.raises(ValueError, match="expected a LightningDataModule, a DataLoader or a map-style dataset"):
        PlainData(bad, None, SETTINGS)


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match=r"`DataSelector\(val=list\)`: expected at least one example"):
        PlainData(numbered(), [], SETTINGS)
    with pytest.raises(ValueError, match=r"`DataSelector\(data=DataLoader\)`: expected at least one example"):
        PlainData(DataLoader([]), None, SETTINGS)


# -- pytorch_lightning

pl = pytest.importorskip("pytorch_lightning")


class LegacyData(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.train = numbered()

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=4)


class LegacyNet(pl.LightningModule):
    forward, configure_optimizers = Net.forward, Net.configure_optimizers
    training_step, validation_step = Net.training_step, Net.validation_step

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.validated = Net().net, [], 0


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


@NO_VALIDATION
@pytest.mark.parametrize("inner", [LegacyData, Data, lambda: PlainData(numbered(), None, SETTINGS)])
@pytest.mark.parametrize("positional", [True, False])
def test_works_in_a_trainer_of_pytorch_lightning(inner, positional):
    model, data = LegacyNet(), DataModuleWrapper(inner())
    running = pl.Trainer(**QUIET)
    if positional:
        running.fit(model, data)
    else:
        running.fit(model, datamodule=data)
    assert len(model.seen) in (16, 24)
    assert isinstance(copy.deepcopy(DataModuleWrapper(inner())), pl.LightningDataModule)
    assert data.__reduce__()[1] == (DataModuleWrapper,)  # a class that another process can import


@NO_VALIDATION
def test_legacy_datamodule_works_in_a_trainer_of_lightning():
    assert is_datamodule(LegacyData())
    assert fit(DataModuleWrapper(LegacyData())).seen == list(range(24))


def test_says_so_when_pytorch_lightning_came_too_late():
    class Trainer:
        __module__ = "pytorch_lightning.trainer.trainer"

    wrapper = object.__new__(DataModuleWrapper)
    wrapper.__init__(Data())
    assert not isinstance(wrapper, pl.LightningDataModule)
    with pytest.raises(TypeError, match=r"Expected `import pytorch_lightning` before `DataModuleWrapper\(\.\.\.\)`"):
        wrapper.trainer = Trainer()
