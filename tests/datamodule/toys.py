"""Data whose rows know their number, and a model that notes which rows it was trained on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split


def numbered(n: int = 24, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    x[:, 3] = torch.arange(n) / 100
    return TensorDataset(x, x[:, :3].argmax(1))


def numbers(x: Any) -> list[int]:
    """What the rows are numbered."""
    return (x[:, 3] * 100).round().int().tolist()


class Rows(Dataset):  # type: ignore[type-arg]
    """Numbered rows with a constructor of plain arguments."""

    def __init__(self, n: int = 4) -> None:
        self.rows = numbered(n)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Any:
        return self.rows[k]


class Data(LightningDataModule):
    """Train and validation split of numbered rows, with a state of its own."""

    def __init__(self, n: int = 24, batch_size: int = 4, seeded: bool = True, **loader: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["loader"])
        self.n = n
        self.batch_size = batch_size
        self.seeded = seeded
        self.loader = loader
        self.calls: list[str] = []
        self.count = 0

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup")
        generator = torch.Generator().manual_seed(0) if self.seeded else None
        self.train, self.val = random_split(numbered(self.n), [self.n - 8, 8], generator)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown")

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, **self.loader)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class TrainOnly(LightningDataModule):
    """Any train_dataloader, and nothing else."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader


class Net(LightningModule):
    """Notes the numbers of the rows it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.seen: list[int] = []
        self.validated = 0

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += numbers(batch[0])
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += len(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**settings, **kwargs})


def fit(data: Any, model: Net | None = None, ckpt_path: str | None = None, **kwargs: Any) -> Net:
    model = model or Net()
    trainer(**kwargs).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model
