"""What an estimator does with its model and the data: blocks of query gradients, columns of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import Component, ExampleLoader, GradientCapture, LayerRecord
from lightning_influence.capture.batches import to_device
from lightning_influence.capture.finite import check_gradients
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.low_rank import Operand, contract, gathered, low_rank
from lightning_influence.estimators.queries import Aggregate, Labels, Loss, inverse_length, sampled_losses, warn_of_flat
from lightning_influence.estimators.self_influence import self_products


class Passes(ABC):
    """Forward and backward passes over queries and training examples, and what is made of the records on the way.

    Attributes: those of `Estimator`, which sets them.
    """

    model: nn.Module
    loss: Loss
    query_loss: Loss
    asked: Loss
    capture: GradientCapture
    normalise: bool
    batch_size: int | None
    memory_budget: int
    progress: bool

    @property
    def components(self) -> list[Component]:
        """The components that are scored."""
        return self.capture.components

    @abstractmethod
    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Query gradients by component, each [q, *shape] -> what training gradients are multiplied with."""

    def _query_gradient(self, component: Component, record: LayerRecord) -> Tensor:
        """Gradients of queries, [q, *shape], in the orthonormal basis that `_transform_queries` takes them in."""
        return record.example_gradients()

    def _transform_queries(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.transform(gradients)

    def _loader(self, data: Any, what: str | None = None) -> ExampleLoader:
        return ExampleLoader(data, self.batch_size, what=what)

    @property
    def queries_at_once(self) -> int:
        """Number of queries whose gradients fit into the memory budget: they are scored in one pass over the data."""
        wide = any(parameter.dtype == torch.float64 for parameter in self.model.parameters())
        return max(1, self.memory_budget // (self._query_numel() * (8 if wide else 4)))

    def _query_blocks(self, loader: ExampleLoader) -> Iterator[ExampleLoader]:
        step = self.queries_at_once
        for k in range(0, loader.num_examples, step):
            yield ExampleLoader(loader, indices=loader.ids[k : k + step])

    def _query_numel(self) -> int:
        """Numbers that are kept of one query."""
        return sum(c.numel for c in self.components)

    def _operands(
        self, loader: ExampleLoader, aggregate: Aggregate, labels: Labels, seed: int, rank: int | float | None
    ) -> Iterator[Mapping[str, Operand]]:
        blocks = self._prepared(loader, aggregate, labels, seed)
        if rank is None:
            return blocks
        return gathered((low_rank(block, self.components, rank) for block in blocks), self.memory_budget)

    def _prepared(
        self, loader: ExampleLoader, aggregate: Aggregate, labels: Labels, seed: int
    ) -> Iterator[dict[str, Tensor]]:
        """What training gradients are multiplied with, for a block of queries at a time, or for their mean."""
        total: dict[str, Tensor] = {}
        for block in self._query_blocks(loader):
            if aggregate is None:
                yield self._query_gradients(block, labels, seed)
                continue
            for name, part in self._own_gradients(block, labels, seed).items():
                mean = part.sum(0, keepdim=True) / loader.num_examples
                total[name] = total[name] + mean if name in total else mean
        if total:
            yield self._transform_queries(total)

    def _prepared_together(
        self, loaders: Sequence[ExampleLoader], labels: Labels, seed: int
    ) -> Iterator[dict[str, Tensor]]:
        """The same of several data, one after the other: a block may begin in one and end in the next."""
        kept: list[dict[str, Tensor]] = []
        room = size = self.queries_at_once
        for loader in loaders:
            left = loader.ids
            while left:
                part = ExampleLoader(loader, indices=left[:room])
                kept.append(self._own_gradients(part, labels, seed))
                left, room = left[room:], room - part.num_examples
                if room == 0:
                    yield self._transform_queries(_joined(kept))
                    kept, room = [], size
        if kept:
            yield self._transform_queries(_joined(kept))

    def _query_gradients(self, loader: ExampleLoader, labels: Labels, seed: int) -> dict[str, Tensor]:
        return self._transform_queries(self._own_gradients(loader, labels, seed))

    def _own_gradients(self, loader: ExampleLoader, labels: Labels, seed: int) -> dict[str, Tensor]:
        """Gradients of queries by component, each [q, *shape], scaled to unit length where that is asked."""
        found: dict[str, list[Tensor]] = {c.name: [] for c in self.components}
        with self.capture:
            for records in self._records(loader, "query gradients", labels, seed, self.asked):
                for component, record in records:
                    found[component.name].append(self._query_gradient(component, record))
        gradients = {name: torch.cat(parts) for name, parts in found.items()}
        check_gradients(
            loader.ids, torch.stack([g.flatten(1).sum(1) for g in gradients.values()]).isfinite().all(0), "queries"
        )
        warn_of_flat(type(self).__name__, self.query_loss, gradients)
        if not self.normalise:
            return gradients
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        scale = inverse_length(squares)
        return {k: g * scale.reshape(-1, *[1] * (g.dim() - 1)) for k, g in gradients.items()}

    def _columns_of(
        self, gradients: Mapping[str, Operand], loader: ExampleLoader, per_component: bool = False
    ) -> Iterator[Tensor]:
        """[q, n] or [c, q, n] of one batch of training examples after another."""
        with self.capture:
            for records in self._records(loader, "training examples"):
                yield self._columns(gradients, records, per_component)

    def _columns(
        self, gradients: Mapping[str, Operand], records: Iterator[tuple[Component, LayerRecord]], per_component: bool
    ) -> Tensor:
        """Scores of one batch, [q, n] or [c, q, n]."""
        parts: list[Tensor] = []
        squares: list[Tensor] = []
        for component, record in records:
            part = contract(record, gradients[component.name]).cpu()
            if per_component or not parts:
                parts.append(part)
            else:
                parts[0] += part
            if self.normalise:
                squares.append(record.squared_norms().cpu())
        values = torch.stack(parts) if per_component else parts[0]
        check_gradients(record.ids, values.flatten(0, -2).isfinite().all(0), "training examples")
        return values * inverse_length(torch.stack(squares).sum(0)) if self.normalise else values

    def _self_columns(self, records: Mapping[str, LayerRecord]) -> Tensor:
        """``<T g_i, g_i>`` of one batch, [c, n]."""
        values = self._self_products(records).cpu()
        check_gradients(next(iter(records.values())).ids, values.isfinite().all(0), "training examples")
        if not self.normalise:
            return values
        squares = torch.stack([record.squared_norms().cpu() for record in records.values()]).sum(0)
        return values * inverse_length(squares).square()

    def _self_products(self, records: Mapping[str, LayerRecord]) -> Tensor:
        """As `_self_columns`, of gradients as they are; overridden where they need not be formed."""
        return self_products(records, self.transform, self.memory_budget)

    def _records(
        self, loader: ExampleLoader, what: str, labels: Labels = "data", seed: int = 0, loss: Loss = None
    ) -> Iterator[Iterator[tuple[Component, LayerRecord]]]:
        """For each batch, its (component, record) pairs, to be used up before the next; the capture is active."""
        device = next(self.model.parameters()).device
        loss = loss_for(self.model, loader, self.loss if loss is None else loss).where_supervised()
        label = f"{type(self).__name__}: {what}"
        for ids, batch in tqdm(loader, desc=label, delay=3, leave=False, disable=not self.progress):
            batch = to_device(batch, device)
            losses = sampled_losses(loss, ids, seed) if labels == "sampled" else loss.losses
            layout = loss.position_mask(batch), loss.batch_size(batch)
            records = self.capture.record(batch, losses, ids, *layout, loader.what)
            yield zip(self.components, records, strict=True)


def _joined(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(blocks) == 1:
        return blocks[0]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
