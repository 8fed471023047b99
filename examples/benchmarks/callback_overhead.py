"""What the callbacks cost a training step outside their recordings, and that they leave the training as it is.

    python examples/benchmarks/callback_overhead.py [--quick] [--steps 300] [--repeats 7]

An MLP with BatchNorm and dropout is trained with and without `CurvatureRecorder` and `GradientDotRecorder` (both
record at the last step only), in turns. A step is timed from the end of one batch to the end of the next, so that every
hook in between counts; medians over steps, then over rounds. Afterwards weights, optimizer states, logged metrics and
the random state of the two trainings are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import EKFAC, CurvatureRecorder, GradientDotRecorder


class Model(L.LightningModule):
    """Everything that a recording could disturb: batch statistics, dropout, momentum, logged metrics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class StepTimer(L.Callback):
    """Seconds between the ends of successive batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def data(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 64, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def train(steps: int, width: int, recording: bool, accelerator: str) -> tuple[float, list[Tensor]]:
    """Median seconds of a step, and everything that must not differ."""
    L.seed_everything(0, verbose=False)
    model, timer = Model(width), StepTimer()
    recorders = [CurvatureRecorder(EKFAC()), GradientDotRecorder(data(16, 2), when="fit_end")] if recording else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            callbacks=[*recorders, timer],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(data(1024, 1), batch_size=64, shuffle=True))
    state = [value.detach().clone() for value in model.state_dict().values()]
    for values in trainer.optimizers[0].state.values():
        state += [value for value in values.values() if isinstance(value, Tensor)]
    state += [value.detach() for value in trainer.callback_metrics.values()]
    state += [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if accelerator == "gpu" else [])]
    return statistics.median(timer.seconds), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps, three rounds")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats = 60, 3
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train(20, args.width, True, args.accelerator)  # warm-up
    seconds: dict[bool, list[float]] = {False: [], True: []}
    states: dict[bool, list[Tensor]] = {}
    for round_ in range(args.repeats):
        for recording in (False, True) if round_ % 2 == 0 else (True, False):
            median, states[recording] = train(args.steps, args.width, recording, args.accelerator)
            seconds[recording].append(median)
    plain, with_callbacks = statistics.median(seconds[False]), statistics.median(seconds[True])
    same = len(states[False]) == len(states[True]) and all(
        torch.equal(a, b) for a, b in zip(states[False], states[True], strict=True)
    )
    print(f"step without {plain * 1e3:.3f} ms, with {with_callbacks * 1e3:.3f} ms (medians of {args.repeats} rounds)")
    print("RESULT", json.dumps({"step_ratio": round(with_callbacks / plain, 4), "bit_identical": same}))


if __name__ == "__main__":
    main()
