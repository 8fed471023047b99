"""How evenly a set of examples spreads over the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def class_entropy(labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Entropy of the class shares, -Σ p_c log p_c, in nats: 0 for one class, log C for C equal ones.

    Args:
        labels: Class of each example, whole numbers >= 0, any shape.
        num_classes: Refuses labels beyond it; it does not change the value. None takes any label.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: If there is no label, or one is not a class.

    >>> class_entropy(torch.tensor([0, 1, 1, 0]))
    tensor(0.6931)
    """
    return _entropy(_counts(labels, num_classes, "class_entropy"))


class ClassEntropy(Metric):
    """`class_entropy` over batches and ranks; the counts of the classes are added.

    Args:
        num_classes: Number of classes, those that do not occur included.

    Raises:
        ValueError: If ``num_classes`` is not an int >= 1.

    >>> entropy = ClassEntropy(num_classes=3)
    >>> entropy.update(torch.tensor([0, 1]))
    >>> entropy.update(torch.tensor([1, 0]))
    >>> entropy.compute()
    tensor(0.6931)
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"`ClassEntropy(num_classes={num_classes!r})`: expected an int >= 1.")
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Count the labels of one batch, any shape; an empty one counts nothing.

        Raises:
            ValueError: If a label is not a class.
        """
        self.counts += _counts(labels, self.num_classes, "ClassEntropy.update")

    def compute(self) -> Tensor:
        """Entropy in nats of everything counted, a scalar.

        Raises:
            ValueError: If nothing was counted.
        """
        return _entropy(self.counts)


def _counts(labels: Tensor, num_classes: int | None, what: str) -> Tensor:
    """Examples by class, int64 ``[classes]``."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`{what}(labels)`: expected whole numbers, got {labels.dtype}; take argmax of scores.")
    labels = labels.reshape(-1).long()
    outside = labels[(labels < 0) | (labels >= (num_classes or torch.iinfo(torch.long).max))]
    if outside.numel():
        upper = "" if num_classes is None else f" and < {num_classes}"
        raise ValueError(f"`{what}(labels)`: expected classes >= 0{upper}, got {sorted({*outside.tolist()})[:5]}.")
    return torch.bincount(labels, minlength=num_classes or 0)


def _entropy(counts: Tensor) -> Tensor:
    total = counts.sum()
    if total == 0:
        raise ValueError("class entropy of no label: expected at least one example.")
    entropy: Tensor = torch.special.entr(counts / total).sum()
    return entropy
