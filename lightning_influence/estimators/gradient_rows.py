"""Gradients of single examples under the data's labels, drawn labels, or for each output, as rows of coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.batches import to_device
from lightning_influence.curvature.base import loss_for
from lightning_influence.curvature.output_factors import OutputFactors
from lightning_influence.estimators.gradient_coordinates import Coordinates
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.queries import sampled_losses


class GradientRows:
    """Rows [n, s, r] whose outer products add up to the curvature of an example, or the gradient itself.

    ``"empirical"``: the gradient under the data's own labels, s = 1. ``"sampled"``: under ``draws`` labels from the
    model, divided by the root of their number. ``"gauss-newton"``: one for each output, see `OutputFactors`.

    Args:
        influence: Whose model, loss and components are used.
        draws: Labels drawn for each example.
    """

    def __init__(self, influence: InfluenceFunction, draws: int) -> None:
        self.influence, self.draws = influence, draws

    def of(self, loader: ExampleLoader, coordinates: Coordinates, kind: str, seed: int = 0) -> Tensor:
        """[n, s, r] in the dtype of the gradients.

        Raises:
            ValueError: If a loss is not finite (ids are named), or there is no such kind of rows for it.
        """
        count = self.count(loader, kind)
        columns = [torch.cat(list(self._batches(loader, coordinates, kind, k, seed))) for k in range(count)]
        rows = torch.stack(columns, dim=1)
        return rows / math.sqrt(count) if kind == "sampled" else rows

    def mean(self, loader: ExampleLoader, coordinates: Coordinates) -> Tensor:
        """Mean gradient under the data's own labels, float64 [r]."""
        total = torch.zeros(coordinates.size, dtype=torch.float64)
        for batch in self._batches(loader, coordinates, "empirical"):
            total = total.to(batch.device) + batch.sum(0, dtype=torch.float64)
        return total / loader.num_examples

    def count(self, loader: ExampleLoader, kind: str) -> int:
        """s.

        Raises:
            ValueError: If the model has too many outputs for "gauss-newton".
        """
        if kind != "gauss-newton":
            return self.draws if kind == "sampled" else 1
        model = self.influence.model
        _, batch = next(iter(ExampleLoader(loader, indices=loader.ids[:1])))
        batch = to_device(batch, next(model.parameters()).device)
        return OutputFactors(loss_for(model, loader, self.influence.loss)).count(model, batch)

    def bytes(self, loader: ExampleLoader, coordinates: Coordinates, kind: str) -> int:
        """Of the rows of one example."""
        wide = any(parameter.dtype == torch.float64 for parameter in self.influence.model.parameters())
        return self.count(loader, kind) * coordinates.size * (8 if wide else 4)

    def _batches(
        self, loader: ExampleLoader, coordinates: Coordinates, kind: str, k: int = 0, seed: int = 0
    ) -> Iterator[Tensor]:
        """The k-th row of every example, [n, r] of one batch after another."""
        model, capture = self.influence.model, self.influence.capture
        device, loss = next(model.parameters()).device, loss_for(model, loader, self.influence.loss)
        hidden = not self.influence.progress
        with capture:
            for ids, batch in tqdm(loader, desc=f"{kind} gradients", delay=3, leave=False, disable=hidden):
                batch = to_device(batch, device)
                losses = _losses(loss, kind, ids, k, seed)
                layout = loss.position_mask(batch), loss.batch_size(batch)
                records = capture.record(batch, losses, ids, *layout, loader.what)
                pairs = zip(capture.components, records, strict=True)
                yield torch.cat([coordinates.of(component, record) for component, record in pairs], dim=1)


def _losses(loss: ExampleLoss, kind: str, ids: Tensor, k: int, seed: int) -> Callable[[nn.Module, Any], Tensor]:
    if kind == "gauss-newton":
        return OutputFactors(loss).losses(k)
    loss = loss.where_supervised()
    return sampled_losses(loss, ids, seed + k) if kind == "sampled" else loss.losses
