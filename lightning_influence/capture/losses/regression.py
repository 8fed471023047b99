"""Regression: the squared error of an example's predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_influence.capture.losses.base import Batch, ExampleLoss, at_least_float, predictions, split_batch
from lightning_influence.capture.sampling import Uniforms


class RegressionLoss(ExampleLoss):
    """Half the squared error, summed over outputs: minus log-likelihood of a unit-variance Gaussian.

    Batches are ``(x, y)`` or mappings with ``labels``; predictions and y have the same shape, except for
    dimensions of size 1 ([n] goes with [n, 1], and is never broadcast to [n, n]).
    """

    reduction = "half squared error, sum over outputs"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: 0.5 * sum (prediction - y)^2."""
        inputs, targets = split_batch(batch)
        rows = _rows(predictions(model, inputs), targets)
        return _half_squares(rows, targets.to(rows).reshape(rows.shape))

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same with y drawn from N(prediction, 1)."""
        inputs, targets = split_batch(batch)
        rows = _rows(predictions(model, inputs), targets)
        counters = torch.arange(rows.shape[1]).expand(rows.shape)
        noise = torch.special.ndtri(uniforms(counters)).to(rows)
        return _half_squares(rows, rows.detach() + noise)


def _rows(values: Tensor, targets: Tensor) -> Tensor:
    """Predictions as [n, number of outputs]."""
    if values.shape[:1] != targets.shape[:1] or _without_ones(values) != _without_ones(targets):
        raise ValueError(
            f"RegressionLoss: got predictions {tuple(values.shape)} for targets {tuple(targets.shape)}; "
            "expected the same shape."
        )
    return at_least_float(values).reshape(len(values), -1)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape[1:] if size != 1]


def _half_squares(rows: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (rows - targets).square().sum(1)
