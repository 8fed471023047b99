"""Gradient similarity: dot products and cosines, component by component ([SP] section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader, LayerRecord
from lightning_influence.capture.examples import TRAIN
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.base import Estimator
from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.pair_dots import Bar, PairDots, tqdm_bar
from lightning_influence.estimators.pair_inputs import Side, checked_pairs
from lightning_influence.estimators.pair_plan import Batches
from lightning_influence.store import Store

FORMULA = "<g_q, g_i> by component"


class GradientDot(Estimator):
    """``sum over components of <g_query, g_train>``; with ``normalise=True`` the cosine of the whole gradients.

    The first-order effect of one small gradient step on the training example: score > 0 lowers the query's
    loss. Arguments are those of `Estimator`.
    """

    formula = "<g_q, g_i>"

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return dict(gradients)

    def _self_products(self, records: Mapping[str, LayerRecord]) -> Tensor:
        """Squared lengths, from factors where that is cheaper."""
        return torch.stack([record.squared_norms() for record in records.values()])

    def pairs(
        self,
        queries: Any,
        train: Any,
        candidates: Sequence[Sequence[int]] | Tensor | None = None,
        *,
        batch_positions: int = 1024,
        dtype: torch.dtype | None = None,
        store: Store | None = None,
        name: str = "component_dots",
        bar: Bar | None = None,
    ) -> ComponentDots:
        """Every component's inner products for chosen pairs, at about the cost of passing each example once.

        Whole gradients are not formed where their factors are cheaper to compare. An example's factors are kept
        until its pairs are done, within ``memory_budget`` bytes; the order of the examples is one in which few have to
        be passed again. Self-products come along, so that cosines over any components follow ([SP] A.2).

        Args:
            queries: Map-style dataset or DataLoader of the q queries.
            train: Map-style dataset or DataLoader of the training examples.
            candidates: For each query the ids (positions) of the training examples to compare it with, as from
                `Filter.candidates`; None for all.
            batch_positions: Positions (tokens) of a batch, padding included; ``batch_size``, where given, bounds its
                examples too.
            dtype: What is kept is rounded to it, ``torch.bfloat16`` say, to fit more into the budget; products are
                taken and summed in float32 all the same. None keeps it as it was computed.
            store: Where numbers are kept as they come: a run that is killed and started again goes on from there, and
                ends with the same bytes.
            name: Under which the store keeps them.
            bar: Shows progress, in place of the own bar: given a number of examples, a context whose value is called
                with the examples passed.

        Returns:
            The products, labelled; ids are positions.

        Raises:
            ValueError: If a query has nothing supervised or no candidate, a candidate is not in the data or stands in a
                list twice, the budget does not hold two examples, or a loss is not finite.
            StoreError: If the store holds other pairs under this name.
        """
        left, right = self._loader(queries, "queries"), self._loader(train, TRAIN)
        self._check_queries(left)
        numbers = None
        if candidates is not None:
            numbers, ids = checked_pairs("GradientDot.pairs(candidates=...)", candidates, left, right)
            right = ExampleLoader(right, indices=ids)
        if batch_positions < 1:
            raise ValueError(f"`GradientDot.pairs(batch_positions={batch_positions})`: expected an int >= 1.")
        both = ((left, self.asked), (right, self.loss))
        losses = [loss_for(self.model, loader, loss).where_supervised() for loader, loss in both]
        job = PairDots(
            capture=self.capture,
            sides=(Side(left, losses[0]), Side(right, losses[1])),
            pairs=numbers,
            memory=self.memory_budget,
            batches=Batches(batch_positions, self.batch_size or batch_positions),
            dtype=dtype,
        )
        own = partial(tqdm_bar, label="GradientDot: pairs", progress=self.progress)
        return job.run(FORMULA, store, name, own if bar is None else bar)
