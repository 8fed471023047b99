"""The influence function: gradients compared in the metric of the inverse curvature ([MS] section 3)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component
from lightning_influence.capture.component import Select
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.base import Estimator, Loss, damping_label
from lightning_influence.store import Store


class InfluenceFunction(Estimator):
    """``I(query, i) = g_query^T (G + damping I)^{-1} g_i`` ([MS] section 3, Koh and Liang 2017).

    n times minus the derivative of the query's loss with respect to the weight of training example i.
    The few queries are preconditioned, not the many training examples.

    Args:
        model: The model at the parameters of interest.
        curvature: The curvature; None for ``EKFAC()``. Fitted by `fit` unless it is already.
        loss: Per-example loss; None resolves it.
        components: What `find_components` takes; None takes those of a fitted curvature, else everything trainable.
        **options: Those of `Estimator`.

    Raises:
        ValueError: If a fitted curvature has other components than those asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature | None = None,
        loss: Loss = None,
        components: Select | list[Component] = None,
        **options: Any,
    ) -> None:
        self.curvature = EKFAC() if curvature is None else curvature
        self.formula = f"g_q^T (G + damping)^-1 g_i, G: {type(self.curvature).__name__}"
        known = self.curvature.components if self.curvature.fitted else ()
        super().__init__(model, loss, list(known) if components is None and known else components, **options)
        odd = {c.name for c in known} ^ {c.name for c in self.components}
        if known and odd:
            raise ValueError(
                f"`InfluenceFunction(components=...)`: {type(self.curvature).__name__} was fitted on {len(known)} "
                f"components, and only one of the two sides has {sorted(odd)[:8]}. Leave components out to take the "
                "curvature's own; Scores.total(names) sums over some of them."
            )

    @classmethod
    def from_store(
        cls, model: nn.Module, store: Store | str | os.PathLike[str], name: str = "curvature", **options: Any
    ) -> Self:
        """With the factors that a `CurvatureRecorder` left behind, after checking that they are of this model.

        Raises:
            StoreError: If the store belongs to other weights, or has no curvature of that name.
        """
        found = store if isinstance(store, Store) else Store.open(Path(store))
        found.verify(model=model)
        return cls(model, found.read_curvature(name, device=str(next(model.parameters()).device)), **options)

    @property
    def damping(self) -> str | None:
        """Damping of the curvature."""
        return damping_label(self.curvature)

    def fit(self, train: Any) -> Self:
        """Fit the curvature on the training data, unless it is fitted already."""
        if not self.curvature.fitted:
            loader = self._loader(train)
            self.curvature.fit(self.model, loader, self.loss, self.components, progress=self.progress)
        return self

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(G + damping I)^{-1} g_q``."""
        if not self.curvature.fitted:
            raise NotFittedError(
                f"`InfluenceFunction.score`: {type(self.curvature).__name__} is not fitted. Call fit(train) first, or "
                "read recorded factors with InfluenceFunction.from_store(model, path)."
            )
        return self.curvature.precondition(gradients)
