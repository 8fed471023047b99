"""Classification: the cross-entropy of one label per example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture.losses.base import (
    IGNORED,
    Batch,
    ExampleLoss,
    at_least_float,
    predictions,
    split_batch,
)
from lightning_influence.capture.sampling import Uniforms, sample_categories


class ClassificationLoss(ExampleLoss):
    """Cross-entropy of one label per example; a label of -100 is none.

    Batches are ``(x, y)`` or mappings with ``labels`` [n]; the model returns logits [n, C], or [n] / [n, 1]
    for two classes (then y is 0 or 1 and the loss is the binary one).
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: minus log-likelihood of the label."""
        inputs, labels = split_batch(batch)
        logits = _two_or_more(predictions(model, inputs), labels)
        return _cross_entropy(logits, _checked(labels, logits))

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same with a label drawn from the model's distribution."""
        inputs, labels = split_batch(batch)
        logits = _two_or_more(predictions(model, inputs), labels)
        labels = _checked(labels, logits)
        draws = uniforms(torch.zeros(len(labels), dtype=torch.int64)).to(logits.device)
        drawn = sample_categories(logits.detach(), draws)
        return _cross_entropy(logits, torch.where(labels == IGNORED, labels, drawn))

    def supervised(self, batch: Batch) -> Tensor:
        """1, or 0 for an example without a label, [n]."""
        _, labels = split_batch(batch)
        return (labels.reshape(len(labels), -1) != IGNORED).any(1).long()


def _two_or_more(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [n, C]; a single logit z stands for the pair (0, z)."""
    n = len(labels)
    if labels.numel() != n or logits.shape[:1] != (n,) or logits.dim() > 2:
        raise ValueError(
            f"ClassificationLoss: got logits {tuple(logits.shape)} for labels {tuple(labels.shape)}; expected "
            "[n, C] (or [n] for two classes) and [n]. For another layout define example_losses(batch) -> [n]."
        )
    logits = logits.reshape(n, -1)
    return F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as int64 [n]."""
    classes = labels.reshape(-1).to(logits.device).long()
    known = (classes == IGNORED) | ((classes >= 0) & (classes < logits.shape[1]))
    if not bool(known.all()) or not torch.equal(classes.to(labels.dtype), labels.reshape(-1).to(logits.device)):
        raise ValueError(
            f"ClassificationLoss: expected labels 0 to {logits.shape[1] - 1}, or -100 for none. "
            f"Got {sorted(set(labels.reshape(-1).tolist()))[:8]}."
        )
    return classes


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float(logits), labels, reduction="none", ignore_index=IGNORED)
