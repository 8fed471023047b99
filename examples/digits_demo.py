"""Choose a tenth of a pool of digits and train on it: the whole path, from a warm-up to a better model.

    python examples/digits_demo.py [--quick] [--noise 0.2 0] [--seeds 5] [--out runs/demo]

A pool of 1000 of scikit-learn's digits, some of them with wrong labels, and 300 digits whose loss is to fall. A
small network is trained on the pool for a few steps while the curvature is recorded; from that model 5, 10 and 20
per cent of the pool are selected; fresh networks are trained on each selection, all for the same number of steps,
and measured on digits that nothing has seen. Repeated over seeds, each with its own split, labels and weights.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_report import Result, Run, percent, write_report
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import (
    EKFAC,
    CurvatureRecorder,
    DataSelector,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    Random,
    TopK,
)
from lightning_influence.callbacks import Record
from lightning_influence.metrics import class_entropy
from lightning_influence.selection.pipeline import choose

POOL, TARGETS = 1000, 300
BATCH = 25  # divides every size: at 32, a last batch of 4 rows would move the measured loss by a tenth
LOGGERS = ("lightning.pytorch", "lightning.fabric")


class DigitsNet(LightningModule):
    """64-128-64-10, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass(frozen=True)
class Digits:
    """The digits in three parts; images float32 [n, 64] in [0, 1], labels int64 [n].

    Attributes:
        pool: With the labels as they are given, right or wrong.
        truth: The right labels of the pool.
        rows: Numbers of the pool's digits in scikit-learn's data.
        targets: Examples whose loss is to fall, rightly labelled.
        held_out: All others, for measuring.
    """

    pool: TensorDataset
    truth: Tensor
    rows: Tensor
    targets: TensorDataset
    held_out: TensorDataset

    @classmethod
    def split(cls, noise: float, seed: int) -> Digits:
        """A random split in which a share of the pool gets one of the nine wrong labels each."""
        generator = torch.Generator().manual_seed(seed)
        data = load_digits()
        images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
        pool, targets, held_out = torch.randperm(len(labels), generator=generator).tensor_split([POOL, POOL + TARGETS])
        given = labels[pool].clone()
        wrong = torch.randperm(POOL, generator=generator)[: round(noise * POOL)]
        given[wrong] = (given[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
        return cls(
            TensorDataset(images[pool], given),
            labels[pool],
            pool,
            TensorDataset(images[targets], labels[targets]),
            TensorDataset(images[held_out], labels[held_out]),
        )

    @property
    def given(self) -> Tensor:
        """The labels of the pool, wrong ones included."""
        return self.pool.tensors[1]

    def describe(self, row: int) -> dict[str, int | bool]:
        """What a reader of a selection wants to know about one of its rows."""
        given, truth = int(self.given[row]), int(self.truth[row])
        return {"digit": int(self.rows[row]), "label": given, "true_label": truth, "wrong": given != truth}


def fit(data: DataSelector, steps: int, seed: int, *callbacks: Callback) -> DigitsNet:
    """A new network, trained on what the selector serves now."""
    seed_everything(seed, verbose=False)
    model = DigitsNet()
    trainer = Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model


@torch.no_grad()
def measure(model: DigitsNet, digits: Digits) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out digits."""
    images, labels = digits.held_out.tensors
    logits = model.eval()(images)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def trial(run: Run, noise: float, seed: int) -> Iterator[Result]:
    """Warm up, record, select, retrain: all results of one seed."""
    digits = Digits.split(noise, seed)
    name = f"noise={noise:g}-seed={seed}"
    say = Stages(f"{percent(noise)} wrong labels, seed {seed}")

    whole = DataSelector(digits.pool, batch_size=BATCH)  # nothing is selected yet
    recorder = CurvatureRecorder(EKFAC(), dirpath=str(run.out / "recordings"), name=name)
    warm = fit(whole, run.warm_up_steps, 1000 + seed, recorder)  # its weights are not those of the networks to come
    record = recorder.records[-1]
    scores = baseline_scores(warm, record, digits)
    say.done(f"warm-up of {run.warm_up_steps} steps, curvature recorded, pool scored")

    for share in run.sizes:
        data = DataSelector(digits.pool, digits.targets, share, rule=InteractionGreedy(), batch_size=BATCH)
        chosen = {"interaction-aware": data.select(warm, store=record.path, progress=False)}
        for method, rule in {"additive": TopK(), "random": Random(seed)}.items():
            chosen[method] = choose(scores, rule, chosen["interaction-aware"].budget)
        for method, selection in chosen.items():
            selection.to_jsonl(run.out / "selections" / f"{name}-{method}-{len(selection)}.jsonl", digits.describe)
            data.use(selection)
            network = fit(data, run.steps, seed)
            yield result(digits, method, network, list(selection.positions), noise, seed)
        say.done(f"{percent(share)} of the pool selected, {len(chosen)} networks trained for {run.steps} steps")

    yield result(digits, "whole pool", fit(whole, run.steps, seed), list(range(POOL)), noise, seed)
    say.done(f"whole pool, 1 network trained for {run.steps} steps")


def baseline_scores(model: DigitsNet, record: Record, digits: Digits) -> Interactions:
    """What `DataSelector.select` looks at, for the rules that are compared with its own at every size."""
    influence = InfluenceFunction.from_store(model, str(record.path), normalise=True, progress=False)
    return Interactions.from_scores(influence.score(digits.targets, digits.pool))


def result(digits: Digits, method: str, model: DigitsNet, rows: list[int], noise: float, seed: int) -> Result:
    """What a network is worth, and what it was trained on."""
    loss, accuracy = measure(model, digits)
    given, truth = digits.given[rows], digits.truth[rows]
    wrong = float((given != truth).float().mean())
    return Result(noise, seed, method, len(rows), loss, accuracy, float(class_entropy(given, 10)), wrong)


class Stages:
    """One printed line for each stage, with its time."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.started = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        print(f"{self.subject}: {stage} ({now - self.started:.1f} s)", flush=True)
        self.started = now


def parse(arguments: list[str]) -> Run:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, two sizes, wrong labels only")
    parser.add_argument("--noise", type=float, nargs="+", help="shares of wrong labels, a pool each; 0.2 0")
    parser.add_argument("--seeds", type=int, help="number of repetitions; 5, or 2 with --quick")
    parser.add_argument("--sizes", type=float, nargs="+", help="shares of the pool to select; 0.05 0.1 0.2")
    parser.add_argument("--steps", type=int, default=300, help="of training on a selection")
    parser.add_argument("--warm-up-steps", type=int, default=30, help="of training on the pool before selecting")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything written")
    options = parser.parse_args(arguments)
    noise = options.noise or ([0.2] if options.quick else [0.2, 0.0])
    sizes = options.sizes or ([0.05, 0.1] if options.quick else [0.05, 0.1, 0.2])
    seeds = options.seeds if options.seeds is not None else (2 if options.quick else 5)
    if not all(0 <= share <= 1 for share in noise) or not all(0 < share <= 1 for share in sizes):
        parser.error("expected --noise and --sizes as shares of the pool, such as 0.1")
    if min(seeds, options.steps, options.warm_up_steps) < 1:
        parser.error("expected --seeds, --steps and --warm-up-steps >= 1")
    command = shlex.join(["python", "examples/digits_demo.py", *arguments])
    return Run(tuple(noise), seeds, tuple(sizes), options.steps, options.warm_up_steps, options.out, command)


def silence() -> None:
    """Hundreds of short fits: Lightning's notes on each of them are left out."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    run = parse(arguments)
    silence()
    for folder in ("recordings", "selections"):  # of an earlier run
        shutil.rmtree(run.out / folder, ignore_errors=True)
    torch.set_num_threads(1)  # such small matrices are faster so
    results = [r for noise in run.noise for seed in range(run.seeds) for r in trial(run, noise, seed)]
    print(write_report(run, results, time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1:])
