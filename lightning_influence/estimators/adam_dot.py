"""Influence of a step of Adam: what LESS computes at one checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, ExampleLoss, LanguageModelLoss
from lightning_influence.capture.component import Select
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.record import DenseRecord
from lightning_influence.curvature.adam import AdamMoments, AdamState, Variant, check_variant
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.base import Loss
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.projected_dot import ProjectedDot
from lightning_influence.estimators.scores import Scores
from lightning_influence.projections.base import Projection
from lightning_influence.projections.dense import TrakProjection
from lightning_influence.store import Store

DIMENSIONS = 8192  # as in LESS
NAME = "adam_moments"


class AdamDot:
    """``cos(R ∇ℓ_q, R Γ_i)``: how a step of Adam on the training example i lowers the loss of the query q.

    Γ_i is the step that Adam would take if the next gradient were that of the example (`AdamMoments.direction`), R a
    random projection. Summed over checkpoints with their learning rates it is LESS (Xia et al. 2024): see `less_scores`
    and `LESSRecorder`. Score > 0: training on the example lowers the query's loss. In the call shape of the
    estimators::

        moments = AdamMoments.from_optimizers(model, find_components(model, "lora"), optimizer)
        AdamDot(model, moments, components="lora").score(queries, train)

    The moments are those of the gradients that were trained on, and Γ depends on the size of an example's gradient next
    to them: the loss of an example must be what a batch of it alone would be trained on. So of language models the mean
    over an example's tokens is taken where no loss is given.

    Training gradients are formed, one component and one batch at a time, because Γ is taken entry by entry. An example
    without any target has score 0.

    Args:
        model: The model at the checkpoint.
        moments: Of its optimizer there.
        projection: R. None for `TrakProjection` to 8192 random signs' dimensions, or as many as there are parameters,
            as LESS has it (package traker; slow on a CPU). `FactoredProjection(8192)` has the same error at a small
            part of the cost; ``FactoredProjection(1.0)`` changes no product.
        loss: Per-example loss; None resolves it, see above.
        components: What `find_components` takes; the moments must have them.
        variant: ``"less"`` or ``"less_repo"``, see `AdamMoments.direction`.
        normalise: Whether scores are cosines, as in LESS, or inner products.
        batch_size: Examples per batch; None takes the loader's, or 32.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Raises:
        ValueError: If the variant is none, the moments lack a component or have another shape, or the projection does
            not suit the components.
    """

    def __init__(
        self,
        model: nn.Module,
        moments: AdamMoments,
        projection: Projection | None = None,
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        variant: Variant = "less",
        normalise: bool = True,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        check_variant("AdamDot", variant)
        self.model = model
        self.moments = moments
        self.loss = loss
        self.variant: Variant = variant
        self.normalise = normalise
        self.batch_size = batch_size
        self.progress = progress
        self.components = GradientDot(model, components=components).components
        _check_moments(moments, self.components)
        self.projection = less_projection(projection, self.components)

    @property
    def formula(self) -> str:
        """What is computed, for the labels of the scores."""
        product = "cos(R g_q, R Adam(g_i))" if self.normalise else "<R g_q, R Adam(g_i)>"
        return f"{product}, {self.variant}, R: {type(self.projection).__name__} to {self.projection.total} dimensions"

    def score(self, queries: Any, train: Any, *, per_component: bool = False) -> Scores:
        """Score every training example for every query.

        Args:
            queries: Map-style dataset or DataLoader of the examples whose loss matters.
            train: Map-style dataset or DataLoader of the examples whose influence is asked.
            per_component: Whether to keep components apart, [c, q, n]; they add up to the total.

        Raises:
            ValueError: If the data is empty, a query has nothing supervised, or a loss is not finite (ids are named).
        """
        left = ExampleLoader(queries, self.batch_size, what="queries")
        right = ExampleLoader(train, self.batch_size, what=TRAIN)
        loss = self.loss if self.loss is not None else as_trained(loss_for(self.model, left, None))
        plain = ProjectedDot(self.model, self.projection, loss, self.components, **self._options())
        asked = self._scaled(plain.project(left, supervised=True))
        parts = list(self.projection.slices.values()) if per_component else [slice(None)]
        columns = [
            torch.stack([asked[:, part] @ moved[:, part].mT for part in parts]) for moved in self._moved(right, loss)
        ]
        values = torch.cat(columns, dim=-1)
        return Scores(
            values=values if per_component else values[0],
            query_ids=tuple(left.ids),
            train_ids=tuple(right.ids),
            formula=self.formula,
            reduction=loss_for(self.model, left, loss).reduction,
            components=tuple(self.projection.slices) if per_component else None,
        )

    def _moved(self, loader: ExampleLoader, loss: Loss) -> Iterator[Tensor]:
        """Projected steps of the training examples, [n, k] of one batch after another."""
        estimator = GradientDot(self.model, loss, self.components, **self._options())
        found = loss_for(self.model, loader, loss)
        with estimator.capture:
            batches = estimator._records(loader, "steps of training examples")
            for (_, batch), records in zip(loader, batches, strict=True):
                parts = [self._projected(component, record) for component, record in records]
                supervised = found.supervised(batch).cpu() > 0
                yield self._scaled(torch.cat(parts, dim=1).cpu() * supervised[:, None])

    def _projected(self, component: Component, record: Any) -> Tensor:
        steps = self.moments.direction(component.name, record.example_gradients(), self.variant)
        return self.projection.project(component, DenseRecord(record.ids, steps))

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Of length 1 where cosines are asked for; 0 stays 0."""
        if not self.normalise:
            return vectors
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return torch.where(norms > 0, vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny), 0)

    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "progress": self.progress}


def as_trained(loss: ExampleLoss) -> ExampleLoss:
    """The loss of one example as a batch of it alone is trained on: of a language model the mean over its tokens."""
    if not isinstance(loss, LanguageModelLoss):
        return loss
    twin = copy.copy(loss)
    twin.reduction = "mean"
    return twin


def less_projection(projection: Projection | None, components: list[Component]) -> Projection:
    """A started projection: the one given, an equal one, or that of LESS."""
    if projection is None:
        projection = TrakProjection(min(DIMENSIONS, sum(c.numel for c in components)), kind="rademacher")
    return projection if projection.sizes else type(projection)(**projection.settings()).start(components)


def save_moments(store: Store, moments: AdamMoments) -> None:
    """Keep the moments in a store, for scores of other data at the same weights later."""
    writer = store.row_writer(NAME, ["first", "second"])
    both = {name: torch.stack([moments.first[name], moments.second[name]]) for name in moments.first}
    writer.write(["first", "second"], both)
    store.write_json(NAME, {name: asdict(state) for name, state in moments.states.items()})


def load_moments(store: Store) -> AdamMoments:
    """Read them back, in a process that never saw the training run.

    Raises:
        StoreError: If the store has none, or a file is damaged.
    """
    [rows] = store.read_rows(NAME)
    states = {name: AdamState(**state) for name, state in store.read_json(NAME).items()}
    first, second = ({name: values[k] for name, values in rows.values.items()} for k in (0, 1))
    return AdamMoments(first, second, states)


def _check_moments(moments: AdamMoments, components: list[Component]) -> None:
    wrong = [c.name for c in components if c.name not in moments.first or moments.first[c.name].shape != c.shape]
    if wrong:
        raise ValueError(
            f"`AdamDot(moments)`: {len(wrong)} of {len(components)} components have no moments of their shape there "
            f"({wrong[:4]}). Expected those of the same components, from AdamMoments.from_optimizers(model, "
            "find_components(model, components), optimizers)."
        )
