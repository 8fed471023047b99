"""The influence function: gradients compared in the metric of the inverse curvature ([MS] section 3)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_influence.capture import Component, LayerRecord
from lightning_influence.capture.component import Select
from lightning_influence.capture.finite import NanPolicy, check_gradients, check_nan_policy
from lightning_influence.curvature import EKFAC, Curvature
from lightning_influence.errors import NotFittedError
from lightning_influence.estimators.base import Estimator, Labels, Loss, damping_label, inverse_length
from lightning_influence.estimators.gradient_matrix import GradientMatrix
from lightning_influence.estimators.queries import warn_of_changed
from lightning_influence.estimators.written import Writing, write_vectors
from lightning_influence.store import Store
from lightning_influence.store.fingerprint import tensors_fingerprint


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
        self.curvature.to(next(model.parameters()).device)

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

    def fit(
        self,
        train: Any,
        *,
        nan_policy: NanPolicy = "raise",
        memory_budget: int = 0,
        disk_budget: int = 0,
        scratch: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Fit the curvature on the training data, unless it is fitted already.

        Args:
            train: Map-style dataset or DataLoader.
            nan_policy: ``"omit"`` leaves out examples whose loss is not finite, see `Curvature.fit`. `score` refuses
                them all the same: pass it what `omit_nonfinite` leaves.
            memory_budget: As in `Curvature.fit`: what is kept of the first pass for the second.
            disk_budget: The same in temporary files.
            scratch: Folder for these files; None takes the system's.
        """
        check_nan_policy("InfluenceFunction.fit", nan_policy)
        if self.curvature.fitted:
            warn_of_changed("InfluenceFunction", self.curvature, self.model)
        else:
            self.curvature.fit(
                self.model,
                self._loader(train),
                self.loss,
                self.components,
                progress=self.progress,
                nan_policy=nan_policy,
                memory_budget=memory_budget,
                disk_budget=disk_budget,
                scratch=scratch,
            )
        return self

    def features(self, data: Any, *, supervised: bool = False, labels: Labels = "data", seed: int = 0) -> Tensor:
        """Whitened gradients ``phi_i = (G + damping I)^{-1/2} g_i``, the inner products of which are influences.

        In an orthonormal basis of the curvature's own; [n, r] with r the number of parameters, or of projected
        dimensions with `ProjectedGram`. Scaled to unit length before whitening when ``normalise``.

        Args:
            data: Map-style dataset or DataLoader.
            supervised: Whether to refuse examples without a target, as `score` does for queries; their features are 0.
            labels: ``"sampled"`` replaces labels by draws from the model.
            seed: Of those draws.

        Returns:
            [n, r] in the order of the data, on the CPU.

        Raises:
            ValueError: If the curvature has no square root, all features together exceed ``memory_budget``, or as
                `score`.
            NotFittedError: If the curvature is not fitted.
        """
        loader = self._loader(data)
        self._check_fitted("features")
        warn_of_changed("InfluenceFunction", self.curvature, self.model)
        self._check_room(loader.num_examples)
        if supervised:
            self._check_queries(loader)
        with self.capture:
            batches = self._records(loader, "whitened gradients", labels, seed)
            return torch.cat([self._whitened(list(records)) for records in batches])

    def write_features(
        self,
        data: Any,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float16,
        batch_positions: int | None = None,
        labels: Labels = "data",
        seed: int = 0,
    ) -> GradientMatrix:
        """`features` of a pool too large for memory: as a file of n x r numbers of a dtype, batch by batch.

        `NewtonPool`, `Interactions` and the rules read ``values`` of it where they look at them. A killed run that is
        started again goes on where it was; features that are there already are not computed again, and those of
        another model, data or curvature are refused. Keep the curvature in a store for that: one that is fitted again
        may differ in its last digits.

        Args:
            data: Map-style dataset or DataLoader.
            path: Of the npy file.
            dtype: float16, float32 or float64. Rows that float16 cannot hold are refused, those that it rounds by more
                than a per cent are counted in a warning: lengths depend on the damping, which `normalise` leaves.
            batch_positions: As in `ProjectedDot.write`.
            labels: As in `features`.
            seed: As in `features`.

        Returns:
            The file, whose ``values`` [n, r] are in the order of the data.

        Raises:
            ValueError: If the curvature has no square root, the data is empty, a loss is not finite or a number does
                not fit into the dtype (ids are named).
            NotFittedError: If the curvature is not fitted.
            StoreError: If the file holds other vectors.
        """
        loader = self._loader(data)
        self._check_fitted("write_features")
        warn_of_changed("InfluenceFunction", self.curvature, self.model)
        columns = sum(map(self.curvature.whitened_size, self.components))
        known = {"curvature": repr(self.curvature), "components": [c.name for c in self.curvature.components]}
        described = {
            "vectors": self._described("whitened"),
            "curvature": f"{self.curvature!r}, {tensors_fingerprint(self.curvature.state(), known)}",
        }
        writing = Writing(path, dtype, batch_positions, labels, seed)
        return write_vectors(self, loader, writing, columns, described, self._whitened)

    def _whitened(self, records: list[tuple[Component, LayerRecord]]) -> Tensor:
        """Of one batch, [b, r] on the CPU."""
        ids, rows = records[0][1].ids, self.curvature.whitened(records).cpu()
        check_gradients(ids, rows.sum(1).isfinite(), "examples")
        if not self.normalise:
            return rows
        squares = torch.stack([record.squared_norms().cpu() for _, record in records]).sum(0)
        return rows * inverse_length(squares)[:, None]

    def feature_bytes(self, examples: int) -> int:
        """Memory that `features` of so many examples take.

        Raises:
            ValueError: If the curvature has no square root.
        """
        wide = any(parameter.dtype == torch.float64 for parameter in self.model.parameters())
        return examples * sum(map(self.curvature.whitened_size, self.components)) * (8 if wide else 4)

    def _check_room(self, examples: int) -> None:
        size = self.feature_bytes(examples)
        if size > self.memory_budget:
            raise ValueError(
                f"`InfluenceFunction.features`: {examples:,} examples take {size / 1e9:.1f} GB; expected at most "
                f"memory_budget={self.memory_budget:,} bytes. Write them to a file with write_features(data, path), "
                "take projected gradients with InfluenceFunction(model, ProjectedGram((16, 16))), or scores with "
                "score_features."
            )

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(G + damping I)^{-1} g_q``."""
        self._check_fitted("score")
        warn_of_changed("InfluenceFunction", self.curvature, self.model)
        return self.curvature.precondition(gradients)

    def _query_gradient(self, component: Component, record: LayerRecord) -> Tensor:
        if not self._plain:
            return super()._query_gradient(component, record)
        self._check_fitted("score")
        return self.curvature.rotated(component, record)

    def _transform_queries(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._plain:
            return super()._transform_queries(gradients)
        warn_of_changed("InfluenceFunction", self.curvature, self.model)
        return self.curvature.precondition_rotated(gradients)

    @property
    def _plain(self) -> bool:
        """Whether `transform` is the one above; one of a subclass is asked for its own."""
        return type(self).transform is InfluenceFunction.transform

    def _check_fitted(self, method: str) -> None:
        if not self.curvature.fitted:
            raise NotFittedError(
                f"`InfluenceFunction.{method}`: {type(self.curvature).__name__} is not fitted. Call fit(train) first, "
                "or read recorded factors with InfluenceFunction.from_store(model, path)."
            )
