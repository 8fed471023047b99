"""Gradient similarity from random projections: the baseline of choosing components ([SP] section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, LayerRecord
from lightning_influence.capture.budget import at_once
from lightning_influence.capture.component import Select
from lightning_influence.capture.record import CHUNK, DenseRecord
from lightning_influence.estimators.base import Estimator, Labels, Loss, check_supervised
from lightning_influence.estimators.gradient_matrix import GradientMatrix
from lightning_influence.estimators.written import Writing, write_vectors
from lightning_influence.projections.base import Projection


class ProjectedDot(Estimator):
    """``<p_query, p_train>`` of projected gradients; with ``normalise=True`` the cosine of whole projected vectors.

    An unbiased estimate of `GradientDot` with one forward and backward pass per example and few numbers kept of it:
    `project` gives them, and `pair_products` any list of pairs of them.

    Args:
        model: The model at the parameters of interest.
        projection: Where to. One that was started is used as it is, and must know the components; of any other an
            equal one is started with the components of this estimator.
        loss: Per-example loss; None resolves it.
        components: What `find_components` takes.
        **options: Those of `Estimator`.

    Raises:
        ValueError: If a started projection does not know a component, or the dimensions do not suit the components.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        loss: Loss = None,
        components: Select | list[Component] = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss, components, **options)
        if not projection.sizes:
            projection = type(projection)(**projection.settings()).start(self.components)
        self.projection = projection
        self.sizes = {c.name: projection.size_of(c) for c in self.components}
        self.formula = f"<R g_q, R g_i>, R: {type(projection).__name__} to {sum(self.sizes.values())} dimensions"

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each component in what `project` returns."""
        ends = torch.tensor(list(self.sizes.values())).cumsum(0).tolist()
        return {name: slice(end - size, end) for end, (name, size) in zip(ends, self.sizes.items(), strict=True)}

    def transform(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are: projected already."""
        return dict(gradients)

    def project(self, data: Any, *, supervised: bool = False, labels: Labels = "data", seed: int = 0) -> Tensor:
        """Projected gradients of every example, all components one after another.

        Args:
            data: Map-style dataset or DataLoader.
            supervised: Whether to refuse examples without a target, as `score` does for queries; their vector is 0.
            labels: ``"sampled"`` replaces labels by draws from the model.
            seed: Of those draws.

        Returns:
            [n, k] in the order of the data, on the CPU; float32, for a float64 model what the projection gives.

        Raises:
            ValueError: If the data is empty or a loss is not finite (ids are named).
        """
        loader = self._loader(data)
        if supervised:
            check_supervised(self.model, loader, self.loss)
        with self.capture:
            batches = self._records(loader, "projecting", labels, seed)
            return torch.cat(
                [torch.cat([record.example_gradients().cpu() for _, record in records], dim=1) for records in batches]
            )

    def write(
        self,
        data: Any,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float16,
        batch_positions: int | None = None,
        labels: Labels = "data",
        seed: int = 0,
    ) -> GradientMatrix:
        """`project` of a pool too large for memory: as a file of n x k numbers of a dtype, batch by batch.

        With ``normalise=True`` vectors have length 1, which float16 holds whatever the gradients. A killed run that is
        started again goes on where it was and ends with the same bytes; vectors that are there already are not
        computed again, and those of another model, data or projection are refused.

        Args:
            data: Map-style dataset or DataLoader.
            path: Of the npy file.
            dtype: float16, float32 or float64.
            batch_positions: Positions (tokens) of a batch, padding included, whose examples are then of about the same
                length; the batch size still bounds their number. None takes batches in the order of the data.
            labels: ``"sampled"`` replaces labels by draws from the model.
            seed: Of those draws.

        Returns:
            The file, whose ``values`` [n, k] are in the order of the data.

        Raises:
            ValueError: If the data is empty, a loss is not finite or a number does not fit into the dtype (ids are
                named).
            StoreError: If the file holds other vectors.
        """
        writing = Writing(path, dtype, batch_positions, labels, seed)
        described = {"vectors": self._described(repr(self.projection))}
        return write_vectors(self, self._loader(data), writing, self._query_numel(), described, self._vectors)

    def _vectors(self, records: list[tuple[Component, LayerRecord]]) -> Tensor:
        vectors = torch.cat([record.example_gradients().flatten(1) for _, record in records], dim=1)
        return _unit(vectors) if self.normalise else vectors

    def _records(
        self, loader: ExampleLoader, what: str, labels: Labels = "data", seed: int = 0, loss: Loss = None
    ) -> Iterator[Iterator[tuple[Component, LayerRecord]]]:
        """Records of projected gradients: all that follows is the same as for whole ones."""
        for records in super()._records(loader, what, labels, seed, loss):
            yield ((c, DenseRecord(r.ids, self.projection.project(c, r))) for c, r in records)

    def _query_numel(self) -> int:
        return sum(self.sizes.values())


def pair_products(
    left: Tensor,
    right: Tensor,
    pairs: Tensor,
    *,
    normalise: bool = False,
    slices: Mapping[str, slice] | None = None,
) -> Tensor:
    """Inner products, or cosines, of listed pairs of vectors, accumulated in their dtype.

    Args:
        left: Projected queries, [q, k].
        right: Projected training examples, [n, k].
        pairs: Rows of the two, int64 [p, 2].
        normalise: Whether to divide by both lengths; with a vector of length 0 the cosine is 0.
        slices: `ProjectedDot.slices`, to get the part of each component, [c, p]; parts add up to the whole.

    Returns:
        [p], or [c, p].

    Raises:
        ValueError: If shapes do not fit or a pair points outside.

    >>> left, right = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [6.0, 8.0]])
    >>> pair_products(left, right, torch.tensor([[0, 0], [0, 1]]), normalise=True)
    tensor([0.6000, 1.0000])
    """
    _check_pairs(left, right, pairs)
    if normalise:
        left, right = _unit(left), _unit(right)
    columns = [slice(None)] if slices is None else list(slices.values())
    found = left.new_empty(len(columns), len(pairs))
    step = max(1, at_once(CHUNK, left.device) // max(1, left.shape[1]))
    for start in range(0, len(pairs), step):
        rows, others = pairs[start : start + step].unbind(1)
        products = left[rows] * right[others]
        for k, part in enumerate(columns):
            found[k, start : start + step] = products[:, part].sum(1)
    return found[0] if slices is None else found


def _check_pairs(left: Tensor, right: Tensor, pairs: Tensor) -> None:
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"`pair_products(left={tuple(left.shape)}, right={tuple(right.shape)})`: expected [q, k] and [n, k] from "
            "the same projection."
        )
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"`pair_products(pairs={tuple(pairs.shape)}, {pairs.dtype})`: expected int64 [p, 2], a row of left and "
            "one of right."
        )
    outside = ((pairs < 0) | (pairs >= torch.tensor([len(left), len(right)], device=pairs.device))).any(1)
    if outside.any():
        raise ValueError(
            f"`pair_products(pairs)`: {pairs[outside][:5].tolist()} lie outside {len(left)} x {len(right)} vectors."
        )


def _unit(vectors: Tensor) -> Tensor:
    """Scaled to length 1, first by the largest entry, whose square may not be representable; 0 stays 0."""
    vectors = _divided(vectors, vectors.abs().amax(1, keepdim=True))
    return _divided(vectors, vectors.norm(dim=1, keepdim=True))


def _divided(vectors: Tensor, sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, vectors / sizes, 0)
