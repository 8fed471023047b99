"""TRAK: influence in the linear model that random projections of output gradients span (Park et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, ExampleLoader, GradientCapture
from lightning_influence.capture.batches import to_device
from lightning_influence.capture.component import Select
from lightning_influence.capture.contexts import evaluating
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature.base import loss_for
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.base import Loss
from lightning_influence.estimators.margin import output_for
from lightning_influence.estimators.projected_dot import ProjectedDot
from lightning_influence.estimators.scores import Scores
from lightning_influence.projections.base import Projection
from lightning_influence.projections.dense import TrakProjection

DIMENSIONS = 2048  # as in traker


@dataclass(frozen=True, eq=False)
class Features:
    """What one model says of its training data.

    Attributes:
        estimator: That projects.
        values: Φ [n, k].
        shortfall: 1 - p of each example, [n].
        spectrum: Eigenvalues of Φ^T Φ, float64 [k].
        basis: Its eigenvectors, [k, k].
    """

    estimator: ProjectedDot
    values: Tensor
    shortfall: Tensor
    spectrum: Tensor
    basis: Tensor


class TRAK:
    """``φ_q^T (Φ^T Φ)^{-1} φ_i (1 - p_i)`` with φ = P^T ∇f (Park et al. 2023, section 3).

    f is the model output that the method takes to be linear in the features: log-odds of the label, or their sum over
    a sequence's targets; p is the label's probability, or its mean over the targets. P is a random projection, Φ holds
    the features of all training examples. Of several models the two factors φ_q^T (Φ^T Φ)^{-1} φ_i and 1 - p_i are
    averaged apart. Score > 0: training on the example raises the query's log-odds, and lowers its loss. In the call
    shape of the estimators::

        TRAK([model, another], TrakProjection(1024)).fit(train).score(queries, train)

    The inverse is taken in float64; n k numbers are kept for each model, and k². A softmax head has directions that
    change no probability, so that Φ^T Φ in all parameters is singular; in fewer dimensions than there are independent
    directions, and examples, it is not.

    Args:
        models: A model at the end of its training, or several that were trained apart.
        projection: Where to; of one that is not started yet model m takes one with seed + m. None for `TrakProjection`
            (the projectors of the package traker) to 2048 dimensions, or as many as there are parameters;
            `FactoredProjection` is far cheaper.
        loss: What tells classes from tokens: a `ClassificationLoss` or `LanguageModelLoss`; None resolves it. Or an
            `ExampleLoss` of other outputs, with ``shortfall(model, batch) -> [n]``.
        components: What `find_components` takes.
        damping_share: This share of the mean eigenvalue of Φ^T Φ is added before it is inverted; 0 as in the paper.
        batch_size: Examples per batch; None takes the loader's, or 32.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Raises:
        ValueError: If there is no model, models differ in their components, or an argument is out of range.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        projection: Projection | None = None,
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        damping_share: float = 0.0,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        if not 0 <= damping_share < float("inf"):
            raise ValueError(f"`TRAK(damping_share={damping_share!r})`: expected a finite number >= 0.")
        if not self.models or not all(isinstance(model, nn.Module) for model in self.models):
            raise ValueError(f"`TRAK(models={self.models!r})`: expected a model, or at least one in a list.")
        self.projection = projection
        self.loss = loss
        self.select = components
        self.damping_share = damping_share
        self.batch_size = batch_size
        self.progress = progress
        self._train_ids: tuple[int, ...] = ()
        self._features: list[Features] = []
        self.components = self._found(self.models[0])
        odd = [k for k, model in enumerate(self.models) if self._found(model) != self.components]
        if odd:
            raise ValueError(
                f"`TRAK(models=...)`: models {odd} have other components than the first; expected the same."
            )

    @property
    def formula(self) -> str:
        """What is computed, for the labels of the scores."""
        several = f", mean of {len(self.models)} models" if len(self.models) > 1 else ""
        return f"phi_q^T (Phi^T Phi)^-1 phi_i (1 - p_i){several}"

    @property
    def damping(self) -> str | None:
        """Description of the damping for the labels of the scores."""
        return f"{self.damping_share} x mean eigenvalue" if self.damping_share else None

    def fit(self, train: Any) -> Self:
        """Take the features of the training data: a forward and backward pass, and a forward pass, for each model.

        Raises:
            ValueError: If the data is empty, a loss is not finite, or Φ^T Φ is singular and not damped.
        """
        loader = ExampleLoader(train, self.batch_size, what=TRAIN)
        features = [self._fitted(k, model, loader) for k, model in enumerate(self.models)]
        self._features, self._train_ids = features, tuple(loader.ids)
        return self

    def score(self, queries: Any, train: Any = None, *, per_component: bool = False) -> Scores:
        """Score every training example for every query.

        Args:
            queries: Map-style dataset or DataLoader of the examples whose log-odds matter.
            train: Map-style dataset or DataLoader of the examples whose influence is asked; None for all that `fit`
                saw, whose features are at hand.
            per_component: Whether to keep the components of φ_i apart, [c, q, n].

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If the data is empty, a query has nothing supervised, or a loss is not finite (ids are named).
        """
        if not self._features:
            raise NotFittedError("`TRAK.score`: the training data was not seen yet. Call fit(train) first.")
        left = ExampleLoader(queries, self.batch_size, what="queries")
        right = None if train is None else ExampleLoader(train, self.batch_size, what=TRAIN)
        total: Tensor | None = None
        weights = []
        for found in self._features:
            asked = found.estimator.project(left, supervised=True)
            values, lacking = (found.values, found.shortfall) if right is None else _of(found.estimator, right)
            part = self._products(found, asked, values, per_component)
            total = part if total is None else total + part
            weights.append(lacking.to(part))
        assert total is not None
        return Scores(
            values=total / len(self._features) * torch.stack(weights).mean(0),
            query_ids=tuple(left.ids),
            train_ids=self._train_ids if right is None else tuple(right.ids),
            formula=self.formula,
            reduction=str(_output(found.estimator).reduction),
            components=tuple(found.estimator.sizes) if per_component else None,
            damping=self.damping,
        )

    def _found(self, model: nn.Module) -> list[Component]:
        return GradientCapture(model, self.select).components

    def _fitted(self, k: int, model: nn.Module, loader: ExampleLoader) -> Features:
        output = output_for(loss_for(model, loader, self.loss))
        options = {"batch_size": self.batch_size, "progress": self.progress}
        estimator = ProjectedDot(model, self._projection(k), output, self.components, **options)
        dimensions = sum(estimator.sizes.values())
        if not self.damping_share and loader.num_examples < dimensions:
            raise ValueError(
                f"`TRAK.fit(train)`: {loader.num_examples} examples cannot span {dimensions} dimensions, so that "
                "Phi^T Phi has no inverse. Expected a projection to fewer dimensions, or damping_share > 0."
            )
        values, lacking = _of(estimator, loader)
        spectrum, basis = torch.linalg.eigh(_gram(values))
        rank = int((spectrum > spectrum[-1] * dimensions * torch.finfo(values.dtype).eps).sum())
        if rank < dimensions and not self.damping_share:
            raise ValueError(
                f"`TRAK.fit(train)`: the features have rank {rank} in {dimensions} dimensions, so that Phi^T Phi "
                "has no inverse. Expected a projection to fewer dimensions, or damping_share > 0."
            )
        return Features(estimator, values, lacking, spectrum.clamp_min(0), basis)

    def _projection(self, k: int) -> Projection:
        found = self.projection
        if found is None:
            found = TrakProjection(min(DIMENSIONS, sum(c.numel for c in self.components)))
        if found.sizes:
            return found
        settings = found.settings()
        return type(found)(**{**settings, "seed": settings["seed"] + k})

    def _products(self, found: Features, asked: Tensor, values: Tensor, per_component: bool) -> Tensor:
        """φ_q^T (Φ^T Φ)^{-1} φ_i, [q, n] or [c, q, n]."""
        damped = found.spectrum + self.damping_share * found.spectrum.mean()
        solved = ((asked.double() @ found.basis / damped) @ found.basis.mT).to(values.dtype)
        if not per_component:
            return solved @ values.mT
        return torch.stack([solved[:, part] @ values[:, part].mT for part in found.estimator.slices.values()])


def _of(estimator: ProjectedDot, loader: ExampleLoader) -> tuple[Tensor, Tensor]:
    """Features [n, k] and what the outputs lack, [n], on the CPU."""
    values, lacking = estimator.project(loader), []
    device, output = next(estimator.model.parameters()).device, _output(estimator)
    with evaluating(estimator.model), torch.no_grad():
        for ids, batch in loader:
            found = run_batch(partial(output.shortfall, estimator.model), to_device(batch, device), ids, loader.what)
            lacking.append(found.cpu())
    return values, torch.cat(lacking)


def _output(estimator: ProjectedDot) -> Any:
    return estimator.loss


def _gram(values: Tensor) -> Tensor:
    """Φ^T Φ, accumulated in float64 some rows at a time."""
    total = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    for rows in values.split(4096):  # type: ignore[no-untyped-call]
        wide = rows.double()
        total.addmm_(wide.mT, wide)
    return total
