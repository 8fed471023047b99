"""A small training that has everything a callback could disturb, and a recorder that does real work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.callbacks.base import Recorder
from lightning_influence.callbacks.preconditions import training_data
from lightning_influence.callbacks.recording import Recording
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.gradient_capture import GradientCapture


def data(n: int = 16, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def loader(n: int = 16, seed: int = 0, shuffle: bool = False, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(data(n, seed), batch_size=4, shuffle=shuffle, **kwargs)


class Toy(LightningModule):
    """BatchNorm, dropout, momentum, a logged loss and a logged metric."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.seen.append(x[:, 0].clone())
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Manual(Toy):
    """The same with manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def trainer(folder: Path | str, callbacks: list[Callback] | None = None, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "default_root_dir": str(folder),
    }
    return Trainer(callbacks=callbacks, **{**settings, **kwargs})


def every_step(folder: Path | str, steps: int = 1, **kwargs: Any) -> ModelCheckpoint:
    settings = {"every_n_train_steps": steps, "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(dirpath=str(folder), **{**settings, **kwargs})


class NormRecorder(Recorder):
    """Squared gradient norm of each training example, shared out over the ranks."""

    default_name = "norms"

    def __init__(self, examples: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples = examples

    def record(self, recording: Recording) -> None:
        parts = recording.on_each_rank(lambda: self.norms(recording))
        norms = {k: v for part in parts for k, v in part.items()}
        if recording.is_writer:
            (recording.folder / "norms.json").write_text(json.dumps(norms, sort_keys=True))

    def norms(self, recording: Recording) -> dict[int, float]:
        data = self.examples if self.examples is not None else training_data("NormRecorder()", recording.trainer)
        mine = recording.shard(ExampleLoader(data).ids)
        norms: dict[int, float] = {}
        with recording.progress(len(mine)) as advance, GradientCapture(recording.model, self.components) as capture:
            examples = recording.examples(data, self.batch_size, mine, advance)
            loss = recording.loss(examples, self.loss)
            for ids, batch in examples:
                squares = sum(r.squared_norms() for r in capture.record(batch, loss.losses, ids))
                norms.update(zip(ids.tolist(), squares.tolist(), strict=True))
        return norms


class Failing(NormRecorder):
    """Fails while recording."""

    def norms(self, recording: Recording) -> dict[int, float]:
        if recording.trainer.global_rank == recording.trainer.world_size - 1:
            raise ValueError("example 3 has no label.")
        return super().norms(recording)


def read_norms(path: Path) -> dict[int, float]:
    return {int(k): v for k, v in json.loads((path / "norms.json").read_text()).items()}


def outcome(model: Toy, trainer: Trainer) -> dict[str, Any]:
    """Everything that a callback must leave alone, after a fit; random states by what they draw next."""
    optimizer = trainer.optimizers[0].state_dict() if trainer.optimizers else {}
    momenta = {k: v["momentum_buffer"] for k, v in optimizer.get("state", {}).items()}
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "momenta": momenta,
        "metrics": {k: v.clone() for k, v in trainer.logged_metrics.items()},
        "callback_metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
        "seen": torch.cat(model.seen),
        "random": torch.rand(3),
        "modes": [m.training for m in model.modules()],
    }


def fit(callbacks: list[Callback], folder: Path, model: Toy | None = None, **kwargs: Any) -> dict[str, Any]:
    """One seeded fit and what came out of it."""
    seed_everything(1, verbose=False)
    model = model or Toy()
    running = trainer(folder, callbacks, **kwargs)
    running.fit(model, loader(18, shuffle=True, drop_last=True), loader(8, seed=5))
    return outcome(model, running)


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert torch.equal(left, right)
    else:
        assert left == right


class Interrupted(Callback):
    """Stops a run right after a step, as a killed process would."""

    def __init__(self, step: int, hook: str = "on_train_batch_end") -> None:
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def run(folder: Path, callbacks: list[Callback], model: type[Toy] = Toy, ckpt_path=None, **settings):
    seed_everything(1, verbose=False)
    model = model()
    running = trainer(folder, callbacks, **settings)
    running.fit(model, loader(), loader(8, seed=5), ckpt_path=ckpt_path)
    return model, running


def assert_norms(model: Toy, norms: dict[int, float], data) -> None:
    """Against one example at a time."""
    for k, norm in norms.items():
        x, y = data[k]
        gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        assert norm == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-5)


def steps(recorder: Recorder) -> list[int]:
    return [record.step for record in recorder.records]
