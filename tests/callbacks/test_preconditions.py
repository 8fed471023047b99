from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader

from lightning_influence.callbacks.preconditions import check_loss, check_strategy, training_data
from tests.callbacks.toys import Manual, Toy, loader


def test_strategies_that_shard_are_refused():
    class FSDPStrategy:
        restore_checkpoint_after_setup = True

    with pytest.raises(MisconfigurationException, match=r"`Norms\(\)`: FSDPStrategy shards the parameters.*one device"):
        check_strategy("Norms()", SimpleNamespace(strategy=FSDPStrategy()))


def test_manual_optimisation_with_a_loss_of_its_own():
    class Own(Manual):
        def example_losses(self, batch):
            return batch

    check_loss("Norms()", Own(), None)
    check_loss("Norms()", Manual(), lambda model, batch: batch)
    check_loss("Norms()", Toy(), None)
    with pytest.raises(MisconfigurationException, match="Manual optimises manually"):
        check_loss("Norms()", Manual(), None)


@pytest.mark.parametrize("data", [CombinedLoader({"a": loader()}), {"a": loader()}, [loader()], None])
def test_several_loaders_have_no_one_numbering(data):
    running = SimpleNamespace(train_dataloader=data, datamodule=None)
    with pytest.raises(MisconfigurationException, match=f"trains on a {type(data).__name__}; expected one DataLoader"):
        training_data("Norms()", running)


def test_pool_of_a_selector_comes_first():
    users, pool = loader(), loader()
    assert training_data("Norms()", SimpleNamespace(train_dataloader=users, datamodule=None)) is users
    selector = SimpleNamespace(pool_dataloader=lambda: pool)
    assert training_data("Norms()", SimpleNamespace(train_dataloader=users, datamodule=selector)) is pool
