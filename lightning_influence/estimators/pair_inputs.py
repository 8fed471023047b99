"""What is compared with what: the two sides of the pairs, checked before any long pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.batches import leaves


@dataclass(frozen=True)
class Side:
    """Queries or training examples: the data, the rows of it that take part, and their loss."""

    loader: ExampleLoader
    loss: ExampleLoss

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Any]:
        """(ids, batch) of some rows, counted within the loader."""
        ids = [self.loader.ids[k] for k in rows]
        return next(iter(ExampleLoader(self.loader, batch_size=len(ids), indices=ids)))

    def lengths(self) -> list[int]:
        """Positions of each example: those of its mask, or of its tokens; 1 where there is no such thing."""
        found: list[int] = []
        for ids, batch in self.loader:
            mask = self.loss.position_mask(batch)
            found += mask.sum(1).clamp_min(1).tolist() if mask is not None else [positions(batch)] * len(ids)
        return found


def positions(batch: Any) -> int:
    """Positions of a batch without a mask: t of the first tokens [n, t], else 1."""
    tokens = [x for x in leaves(batch) if isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()]
    return tokens[0].shape[1] if tokens else 1


def checked_pairs(
    call: str, candidates: Any, queries: ExampleLoader, train: ExampleLoader
) -> tuple[list[tuple[int, int]], list[int]]:
    """Candidates by id as pairs of (row of the query, place among the ids that occur), and those ids in order.

    Args:
        call: How the caller's code reads, for the error text.
        candidates: For each query ids of training examples: a list of lists, or a tensor [q, k].
        queries: The queries.
        train: The training examples.

    Raises:
        ValueError: If there is not one list for each query, a list is empty, an id is not in the training data, or
            one stands in a list twice.
    """
    rows = [[int(k) for k in row] for row in candidates]
    if len(rows) != queries.num_examples:
        raise ValueError(f"`{call}`: expected one list for each of {queries.num_examples} queries, got {len(rows)}.")
    known = set(train.ids)
    problems = {
        "without a candidate": [name for name, row in zip(queries.ids, rows, strict=True) if not row],
        "with ids that are not in the training data": [
            name for name, row in zip(queries.ids, rows, strict=True) if not known.issuperset(row)
        ],
        "with an id twice": [name for name, row in zip(queries.ids, rows, strict=True) if len(set(row)) < len(row)],
    }
    found = [f"{len(names)} {what} (queries {names[:5]})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"`{call}`: expected for each query at least one id of the {train.num_examples} training examples, each "
            f"once. Got {'; '.join(found)}."
        )
    occurring = {k for row in rows for k in row}
    ids = [k for k in train.ids if k in occurring]
    place = {k: position for position, k in enumerate(ids)}
    return [(query, place[k]) for query, row in enumerate(rows) for k in row], ids
