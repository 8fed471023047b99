"""Data, models and trainings of `leave_group_out.py`: the pairs of [IA] as far as their data is there."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

PAIRS = (
    "mnist-logistic",
    "fashion_mnist-logistic",
    "mnist-mlp",
    "fashion_mnist-mlp",
    "concrete-mlp",
    "parkinsons-mlp",
    "cifar10-resnet9",
)
FALLBACK = ("digits-logistic", "digits-mlp", "digits-resnet9")
DECAY, BATCH, MOMENTUM = 0.01, 64, 0.9  # as in [IA]


@dataclass(frozen=True)
class Pair:
    """Training examples and held-out ones, whose mean loss is the target; inputs float32 [n, d] or [n, c, h, w].

    Attributes:
        outputs: Number of classes; 1 for regression, whose loss is half the squared error.
        decay: Weight decay.
        smooth: A small network with tanh, of which there is a minimum to be found, instead of the one of [IA].
        width: Channels of the first layer of a ResNet-9.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    target_inputs: Tensor
    target_labels: Tensor
    outputs: int
    decay: float = DECAY
    smooth: bool = False
    width: int = 64

    @property
    def logistic(self) -> bool:
        return self.name.endswith("logistic")

    @property
    def residual(self) -> bool:
        return self.name.endswith("resnet9")

    def network(self, seed: int) -> nn.Sequential:
        """New weights; nothing else is drawn."""
        width = self.inputs.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.residual:
                return resnet9(width, self.outputs, self.width)
            if self.logistic:
                return nn.Sequential(nn.Linear(width, self.outputs))
            first, second = (32, 16) if self.smooth else (128, 64) if self.outputs > 1 else (64, 32)
            unit = nn.Tanh if self.smooth else nn.ReLU
            hidden = (nn.Linear(width, first), unit(), nn.Linear(first, second), unit())
            return nn.Sequential(*hidden, nn.Linear(second, self.outputs))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over examples."""
        if self.outputs > 1:
            return F.cross_entropy(outputs, labels)
        return 0.5 * (outputs - labels).square().mean()

    @torch.no_grad()
    def target_loss(self, network: nn.Module) -> float:
        weight = next(network.parameters())
        return float(self.loss(network(self.target_inputs.to(weight)), self.target_labels.to(weight.device)))


@dataclass(frozen=True)
class Training:
    """``training(ids, seed)``: the target loss after training on these rows alone.

    The objective keeps its weight 1/n when rows are left out, as removal is defined by ([IA] section 3.1): the mean
    loss of what is left with the weight decay times n / (number of rows left) has the same minimum. Logistic regression
    is convex and solved by L-BFGS in float64, whatever the seed. So are smooth networks: from the weights that the seed
    draws where all rows are trained on, from the minimum found there otherwise (so that it is the same one that moves;
    of logistic regression there is but one, which is then found sooner). Other networks take plain SGD as in [IA], a
    ResNet-9 with momentum and a rate that falls to 0 along a cosine, on ``device``.

    With ``further`` epochs a ResNet-9 is trained on all rows first, and so many epochs further with what is left: the
    same batches, from which rows are missing, so that two runs differ by nothing else.
    """

    pair: Pair
    epochs: int
    rate: float
    device: str = "cpu"
    further: int = 0
    minima: dict[int, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, ids: tuple[int, ...], seed: int) -> float:
        return self.pair.target_loss(self.network(ids, seed))

    def network(self, ids: tuple[int, ...], seed: int) -> nn.Module:
        logistic, everything = self.pair.logistic, len(ids) == len(self.pair.labels)
        everyone = tuple(range(len(self.pair.labels)))
        if self.further:
            if seed not in self.minima:
                self.minima[seed] = self.sgd(everyone, seed)[-1]
            return self.onwards(ids, seed, self.minima[seed])
        if not logistic and not self.pair.smooth:
            return self.sgd(ids, seed)[-1]
        seed = 0 if logistic else seed
        if seed not in self.minima:
            self.minima[seed] = self.exact(everyone, None if logistic else self.pair.network(seed))
        return self.minima[seed] if everything else self.exact(ids, self.minima[seed])

    def decay(self, ids: tuple[int, ...]) -> float:
        return self.pair.decay * len(self.pair.labels) / len(ids)

    def exact(self, ids: tuple[int, ...], start: nn.Module | None = None) -> nn.Module:
        """The minimum, to a gradient of 1e-7, or 1e-6 of a network; from zeros without a start."""
        network = copy.deepcopy(self.pair.network(0) if start is None else start).double()
        for parameter in network.parameters() if start is None else ():
            nn.init.zeros_(parameter)
        rows, tolerance = list(ids), 1e-7 if self.pair.logistic else 1e-6
        inputs, labels = self.pair.inputs[rows].double(), self.pair.labels[rows]
        optimizer = torch.optim.LBFGS(
            network.parameters(),
            max_iter=5000,
            max_eval=10000,
            tolerance_grad=tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            squares = sum(parameter.square().sum() for parameter in network.parameters())
            loss = self.pair.loss(network(inputs), labels) + 0.5 * self.decay(ids) * squares
            loss.backward()
            return loss

        optimizer.step(closure)
        return network.eval().requires_grad_(True)

    def sgd(self, ids: tuple[int, ...], seed: int, checkpoints: int = 1) -> list[nn.Module]:
        """Networks at so many evenly spaced ends of epochs, the last one last."""
        generator = torch.Generator().manual_seed(seed)
        network, rows = self.pair.network(seed).to(self.device), torch.tensor(ids)
        momentum = MOMENTUM if self.pair.residual else 0.0
        optimizer = torch.optim.SGD(network.parameters(), self.rate, momentum, weight_decay=self.decay(ids))
        inputs, labels = (part[rows].to(self.device) for part in (self.pair.inputs, self.pair.labels))
        kept = self.ends(checkpoints)
        found = []
        for epoch in range(1, self.epochs + 1):
            optimizer.param_groups[0]["lr"] = self.rate_of(epoch)
            for batch in torch.randperm(len(rows), generator=generator).to(self.device).split(BATCH):
                optimizer.zero_grad()
                self.pair.loss(network(inputs[batch]), labels[batch]).backward()
                optimizer.step()
            if epoch in kept:
                found.append(self.pair.network(seed).to(self.device))
                found[-1].load_state_dict(network.state_dict())
        return found

    def onwards(self, ids: tuple[int, ...], seed: int, start: nn.Module) -> nn.Module:
        """Further from ``start``; every row keeps its weight 1/n, and those that are left out have none."""
        network, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(network.parameters(), self.rate, MOMENTUM, weight_decay=self.pair.decay)
        inputs, labels = self.pair.inputs.to(self.device), self.pair.labels.to(self.device)
        weights = torch.zeros(len(labels)).index_fill(0, torch.tensor(ids), 1).to(self.device)
        for epoch in range(1, self.further + 1):
            optimizer.param_groups[0]["lr"] = cosine(self.rate, epoch, self.further)
            for batch in torch.randperm(len(labels), generator=generator).to(self.device).split(BATCH):
                optimizer.zero_grad()
                losses = F.cross_entropy(network(inputs[batch]), labels[batch], reduction="none")
                (losses * weights[batch]).mean().backward()
                optimizer.step()
        return network

    @property
    def damping(self) -> float:
        """Of the estimates: the weight decay, and for a training that goes on for a while only, what that amounts to.

        Gradient flow for a time t moves by (1 - e^(-h t)) / h times the gradient along a direction of curvature h, for
        which 1 / (h + 1 / t) stands; t is the sum of the learning rates, each over 1 - momentum.
        """
        if not self.further:
            return self.pair.decay
        steps = -(-len(self.pair.labels) // BATCH)
        rates = [cosine(self.rate, epoch, self.further) for epoch in range(1, self.further + 1)]
        return self.pair.decay + (1 - MOMENTUM) / (steps * sum(rates))

    def rate_of(self, epoch: int) -> float:
        """Learning rate in an epoch, counted from 1."""
        return cosine(self.rate, epoch, self.epochs) if self.pair.residual else self.rate

    def ends(self, checkpoints: int) -> list[int]:
        """Epochs after which checkpoints are kept; fewer where there are fewer epochs."""
        return sorted({round(self.epochs * (k + 1) / checkpoints) for k in range(checkpoints)} - {0})

    def mean_rates(self, checkpoints: int) -> list[float]:
        """Mean learning rate of the epochs up to each checkpoint of `sgd`, from the one before it."""
        pairs = itertools.pairwise([0, *self.ends(checkpoints)])
        return [statistics.mean(self.rate_of(epoch + 1) for epoch in range(*pair)) for pair in pairs]


def cosine(rate: float, epoch: int, epochs: int) -> float:
    """A rate that falls to 0; epochs are counted from 1."""
    return 0.5 * rate * (1 + math.cos(math.pi * (epoch - 1) / epochs))


class Residual(nn.Module):
    """What two blocks add to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(width, width), block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.blocks(x)
        return added


def block(inputs: int, outputs: int, *, pooled: bool = False) -> nn.Sequential:
    """3 x 3 convolution, norm, ReLU.

    GroupNorm where the ResNet-9 of [IA] has BatchNorm, which has no loss of one example in training: what a batch does
    to its statistics is no sum over examples. (With BatchNorm the package takes gradients at the running statistics.)
    """
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    layers = [conv, nn.GroupNorm(math.gcd(8, outputs), outputs), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pooled else []))


def resnet9(channels: int, outputs: int, width: int) -> nn.Sequential:
    """8 convolutions and a linear layer; images of at least 8 x 8."""
    return nn.Sequential(
        block(channels, width),
        block(width, 2 * width, pooled=True),
        Residual(2 * width),
        block(2 * width, 4 * width, pooled=True),
        block(4 * width, 8 * width, pooled=True),
        Residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, outputs),
    )


def found_pairs(data: Path | None) -> list[str]:
    """Names of the pairs whose data is there; the digits where no folder is given."""
    if data is None:
        return list(FALLBACK)
    return [name for name in PAIRS if _place(data, name).exists()]


def load_pair(name: str, data: Path | None, rows: int, targets: int, pixels: int, seed: int, **settings: Any) -> Pair:
    """A random part of the data, as large as asked for; of small sets two thirds at most are trained on.

    Images are in [0, 1], MNIST's averaged over blocks to ``pixels`` x ``pixels`` where they are larger; columns of
    tables, what is predicted, and channels of CIFAR-10 have mean 0 and variance 1 over the training rows. Images that
    are published as test images are not used.
    Settings are those of `Pair`.
    """
    kind = name.split("-")[0]
    if kind == "digits":
        inputs, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        inputs = (inputs.reshape(-1, 1, 8, 8) if name.endswith("resnet9") else inputs).float() / 16
    elif kind == "concrete":
        table = torch.from_numpy(np.loadtxt(_place(data, name))).float()
        inputs, labels = table[:, :-1], table[:, -1:]
    elif kind == "parkinsons":
        inputs, labels = _parkinsons(_place(data, name))
    elif kind == "cifar10":
        inputs, labels = _cifar10(_place(data, name))
    else:
        inputs, labels = _images(_place(data, name), pixels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = min(rows, 2 * len(labels) // 3)
    train, held_out = order[:rows], order[rows : rows + targets]
    if labels.is_floating_point():
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0).clamp_min(1e-6)
        labels = (labels - labels[train].mean(0)) / labels[train].std(0)
    if kind == "cifar10":
        deviations, means = torch.std_mean(inputs[train], dim=(0, 2, 3), keepdim=True)
        inputs = (inputs - means) / deviations.clamp_min(1e-6)
    outputs = 1 if labels.is_floating_point() else int(labels.max()) + 1
    pair = Pair(name, inputs[train], labels[train], inputs[held_out], labels[held_out], outputs)
    return replace(pair, **settings)


def _place(data: Path | None, name: str) -> Path:
    kind = name.split("-")[0]
    assert data is not None
    tables = {"concrete": "concrete/data.txt", "parkinsons": "parkinsons_updrs.csv"}
    if kind in tables:
        return data / "uci_regression" / tables[kind]
    if kind == "cifar10":
        return data / "cifar-10-batches-bin" / "data_batch_1.bin"
    return data / kind / "train-images-idx3-ubyte.gz"


def _images(path: Path, pixels: int) -> tuple[Tensor, Tensor]:
    images = _bytes(path, 16).reshape(-1, 1, 28, 28).float() / 255
    labels = _bytes(path.with_name("train-labels-idx1-ubyte.gz"), 8).long()
    return F.adaptive_avg_pool2d(images, pixels).flatten(1), labels


def _bytes(path: Path, head: int) -> Tensor:
    with gzip.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=head).copy())


def _cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """The binary version as published (never the pickled one): a label and 3 x 32 x 32 bytes for each image."""
    content = b"".join(part.read_bytes() for part in sorted(path.parent.glob("data_batch_*.bin")))
    size = 1 + 3 * 32 * 32
    if len(content) % size or not content:
        raise SystemExit(
            f"{path.parent}: expected data_batch_*.bin of CIFAR-10's binary version, {size} bytes for each image. Got "
            f"{len(content)} bytes in all: download it again."
        )
    rows = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(-1, size)
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255, rows[:, 0].long()


def _parkinsons(path: Path) -> tuple[Tensor, Tensor]:
    """Everything but the subject's number and the other score, to predict total_UPDRS."""
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    columns = [key for key in lines[0] if key not in ("subject#", "motor_UPDRS", "total_UPDRS")]
    table = torch.tensor([[float(line[key]) for key in [*columns, "total_UPDRS"]] for line in lines])
    return table[:, :-1], table[:, -1:]
