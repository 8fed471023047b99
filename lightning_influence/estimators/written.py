"""Vectors of a whole pool, computed batch by batch into a file: projected gradients, or whitened ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.capture import Component, ExampleLoader, LayerRecord
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.gradient_matrix import GradientMatrix, write_matrix
from lightning_influence.estimators.pair_inputs import Side
from lightning_influence.estimators.passes import Passes
from lightning_influence.estimators.queries import Labels
from lightning_influence.estimators.sorted_batches import SortedLoader
from lightning_influence.store.fingerprint import model_fingerprint

Vectors: TypeAlias = Callable[[list[tuple[Component, LayerRecord]]], Tensor]  # records of a batch -> [b, k]


@dataclass(frozen=True)
class Writing:
    """Where vectors go, and of what they are taken.

    Attributes:
        path: Of the npy file.
        dtype: float16, float32 or float64.
        batch_positions: Positions (tokens) of a batch, padding included; None for batches in the order of the data.
        labels: Those of the data, or drawn from the model.
        seed: Of such draws.
    """

    path: str | Path
    dtype: torch.dtype
    batch_positions: int | None
    labels: Labels
    seed: int


def write_vectors(
    estimator: Passes,
    loader: ExampleLoader,
    writing: Writing,
    columns: int,
    described: Mapping[str, Any],
    vectors: Vectors,
) -> GradientMatrix:
    """The file, with one row for each example in the order of the data; a killed run goes on where it was.

    Args:
        estimator: Whose model, components, loss and scaling they depend on.
        loader: The examples.
        writing: Where to.
        columns: k.
        described: What the numbers depend on besides, in JSON's types.
        vectors: Makes them of the records of a batch.

    Raises:
        ValueError: If the data is empty, a loss is not finite or a number does not fit into the dtype (ids are named).
        StoreError: If the file holds other vectors.
    """
    loss = loss_for(estimator.model, loader, estimator.loss)
    settings = {
        **described,
        "components": [c.name for c in estimator.components],
        "model": model_fingerprint(estimator.model),
        "data": data_fingerprint(loader.dataset),
        "loss": f"{type(loss).__name__}, {loss.reduction}",
        "labels": writing.labels if writing.labels == "data" else f"{writing.labels}, seed {writing.seed}",
        "batches": [loader.batch_size, writing.batch_positions],
        **_among(loader),
    }
    size = writing.batch_positions
    lengths = [1] * loader.num_examples if size is None else Side(loader, loss).lengths()
    ordered = SortedLoader(loader, lengths, size or loader.num_examples)

    def work(done: int) -> Iterator[tuple[Tensor, Tensor]]:
        with estimator.capture:
            batches = estimator._records(ordered.after(done), "writing vectors", writing.labels, writing.seed)
            for records in batches:
                found = list(records)
                yield found[0][1].ids, vectors(found)

    return write_matrix(writing.path, loader.ids, columns, writing.dtype, settings, work)


def _among(loader: ExampleLoader) -> dict[str, str]:
    """Which examples of the data, in which order, where it is not all of them as they stand there."""
    if loader.ids == list(range(len(loader.dataset))):  # type: ignore[arg-type]
        return {}
    return {"ids": f"{loader.num_examples}, {hashlib.sha256(repr(loader.ids).encode()).hexdigest()[:16]}"}
