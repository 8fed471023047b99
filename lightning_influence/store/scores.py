"""Labelled scores as a parquet table with one row for each number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_influence.store.ids import Id

METADATA_KEY = b"lightning_influence"
ROWS_PER_GROUP = 1 << 20


@dataclass(frozen=True)
class StoredScores:
    """Scores as they were written.

    Attributes:
        values: ``[q, n]``, or ``[c, q, n]`` when kept by component; dtype as written.
        query_ids: The ``q`` ids of the queries.
        train_ids: The ``n`` ids of the training examples.
        components: The ``c`` names of the components, or None.
        meta: What else was handed to `Store.write_scores`: formula, reduction, damping, ...
    """

    values: Tensor
    query_ids: tuple[Id, ...]
    train_ids: tuple[Id, ...]
    components: tuple[str, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def check_scores(scores: StoredScores, what: str) -> None:
    """Refuse values that do not fit their labels.

    Raises:
        ValueError: If the shape is not that of the labels or there is no number at all.
    """
    c = () if scores.components is None else (len(scores.components),)
    expected = (*c, len(scores.query_ids), len(scores.train_ids))
    if tuple(scores.values.shape) != expected or not scores.values.numel():
        raise ValueError(
            f"`{what}`: expected values of shape {'[c, q, n]' if c else '[q, n]'} = {list(expected)}, none of "
            f"them 0, from the ids{' and components' if c else ''}; got {list(scores.values.shape)}."
        )
    if not scores.values.is_floating_point():
        raise ValueError(f"`{what}`: expected floating-point values, got {scores.values.dtype}.")


def write_parquet(path: Path, scores: StoredScores) -> None:
    """Write columns component (null without components), query_id, train_id, score; train ids run fastest."""
    head = {
        "shape": list(scores.values.shape),
        "dtype": str(scores.values.dtype).removeprefix("torch."),
        "meta": scores.meta,
    }
    values = scores.values.detach().cpu()
    values = values.float() if values.dtype in {torch.float16, torch.bfloat16} else values
    blocks = values.reshape(-1, *values.shape[-2:]).numpy()
    schema = pa.schema(
        {
            "component": pa.string(),
            "query_id": _id_type(scores.query_ids),
            "train_id": _id_type(scores.train_ids),
            "score": pa.from_numpy_dtype(blocks.dtype),
        },
        metadata={METADATA_KEY: json.dumps(head, sort_keys=True)},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for component, block in zip(scores.components or (None,), blocks, strict=True):
            for columns in _columns(component, block, scores.query_ids, scores.train_ids):
                writer.write_table(pa.table(columns, schema=schema))


def read_parquet(path: Path) -> StoredScores:
    """Inverse of `write_parquet`."""
    table = pq.read_table(path)
    head: Mapping[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    *c, q, n = head["shape"]
    values = torch.from_numpy(table["score"].to_numpy().copy()).reshape(head["shape"])
    return StoredScores(
        values=values.to(getattr(torch, head["dtype"])),
        query_ids=_every(table["query_id"], n, q),
        train_ids=_every(table["train_id"], 1, n),
        components=_every(table["component"], q * n, c[0]) if c else None,
        meta=head["meta"],
    )


def _every(column: Any, step: int, count: int) -> tuple[Any, ...]:
    """The first ``count`` different labels of a column in which each is repeated ``step`` times."""
    return tuple(column.take(pa.array(range(0, count * step, step))).to_pylist())


def _id_type(ids: tuple[Id, ...]) -> Any:
    return pa.string() if isinstance(ids[0], str) else pa.int64()


def _columns(
    component: str | None, block: np.ndarray[Any, Any], query_ids: tuple[Id, ...], train_ids: tuple[Id, ...]
) -> Iterator[dict[str, Any]]:
    """The table of one component, some queries at a time: the ids are repeated in every row."""
    n = len(train_ids)
    step = max(1, ROWS_PER_GROUP // n)
    for start in range(0, len(query_ids), step):
        queries = query_ids[start : start + step]
        yield {
            "component": [component] * (len(queries) * n),
            "query_id": [query for query in queries for _ in range(n)],
            "train_id": [*train_ids] * len(queries),
            "score": block[start : start + step].reshape(-1),
        }
