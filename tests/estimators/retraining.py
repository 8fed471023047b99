"""A convex model on digits, and what leaving groups out of its training set really does."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tests import oracles


def digits(classes: int = 3, n: int = 300, m: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, target inputs and labels, with a column of ones for the bias."""
    inputs, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = (labels < classes).nonzero().flatten()
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    inputs = torch.cat([inputs[order].double() / 16, torch.ones(len(order), 1).double()], dim=1)
    return inputs[:n], labels[order][:n], inputs[n : n + m], labels[order][n : n + m]


def neighbours(inputs: Tensor, theta: Tensor, size: int, count: int = 40) -> list[list[int]]:
    """Groups of nearest neighbours in softmax space, each around one of the first examples."""
    outputs = oracles.softmax_probabilities(inputs, theta)
    return [torch.cdist(outputs[a : a + 1], outputs)[0].argsort()[:size].tolist() for a in range(count)]


def retrained_changes(
    inputs: Tensor,
    labels: Tensor,
    target: Tensor,
    target_labels: Tensor,
    theta: Tensor,
    groups: list[list[int]],
    decay: float,
) -> Tensor:
    """Change of the mean target loss when each group is left out and the rest is fitted again, float64."""
    n, classes = len(labels), len(theta) // inputs.shape[1]

    def target_loss(parameters: Tensor) -> float:
        return float(oracles.softmax_losses(target, target_labels, parameters).mean())

    changes = []
    for group in groups:
        kept = torch.ones(n, dtype=torch.bool).index_fill(0, torch.tensor(group), False)
        decay_of_the_rest = decay * n / (n - len(group))  # L keeps its 1/n when a group is left out
        found = oracles.fit_softmax(inputs[kept], labels[kept], classes, decay_of_the_rest, start=theta)
        changes.append(target_loss(found) - target_loss(theta))
    return torch.tensor(changes, dtype=torch.float64)


def spearman(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
