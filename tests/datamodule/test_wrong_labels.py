"""What a user of `DataSelector` gets by its default rule where a fifth of the labels are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence.datamodule import DataSelector
from lightning_influence.selection import Constraints, Newton, NewtonGreedy
from tests.datamodule.toys import trainer

POOL, TARGETS = 600, 100


class DigitsNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, images: Tensor) -> Any:
        return self.layers(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def split() -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Pool, targets, and which rows of the pool have one of the nine wrong labels."""
    generator, data = torch.Generator().manual_seed(0), load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    pool, targets, _ = torch.randperm(len(labels), generator=generator).tensor_split([POOL, POOL + TARGETS])
    given, wrong = labels[pool].clone(), torch.rand(POOL, generator=generator) < 0.2
    given[wrong] = (given[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    return TensorDataset(images[pool], given), TensorDataset(images[targets], labels[targets]), wrong


@pytest.fixture(scope="module")
def warm(split: tuple[TensorDataset, TensorDataset, Tensor]) -> DigitsNet:
    seed_everything(1, verbose=False)
    model = DigitsNet()
    trainer(max_steps=30, max_epochs=-1).fit(model, datamodule=DataSelector(split[0], batch_size=25))
    return model


def test_few_wrong_labels_are_among_many_picks(split: Any, warm: DigitsNet) -> None:
    pool, targets, wrong = split
    selector = DataSelector(pool, targets, 0.5)
    rules = {"default": None, "unscreened": Newton(screen=False), "targets alone": NewtonGreedy()}
    made = {name: selector.select(warm, rule=rule, progress=False) for name, rule in rules.items()}
    shares = {name: float(wrong[list(found.positions)].float().mean()) for name, found in made.items()}
    assert shares["default"] < 0.03 < 0.08 < min(shares["unscreened"], shares["targets alone"])
    assert len(made["default"]) == 300
    assert wrong.sum() / 2 < made["default"].screened < 1.5 * wrong.sum()


def test_constraints_hold_beside_the_screen(split: Any, warm: DigitsNet) -> None:
    """A source of wrong labels alone keeps as many as it must have; wrong rows that are asked for come first."""
    pool, targets, wrong = split
    bad = wrong.nonzero().flatten().tolist()
    limits = Constraints(must_include=bad[:3], sources=wrong.tolist(), min_per_source=20, max_per_source={False: 70})
    found = DataSelector(pool, targets, 90, constraints=limits).select(warm, progress=False)
    assert found.ids[:3] == tuple(bad[:3])
    assert int(wrong[list(found.ids)].sum()) == 20
    assert found.screened > 0
