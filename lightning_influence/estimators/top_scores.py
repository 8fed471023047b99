"""The best k of a stream of scores: what is kept of 10^6 training examples for each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopScores:
    """The k most helpful (or harmful) training examples of each query, best first.

    Score > 0: adding (keeping) the example lowers the query's loss.

    Attributes:
        values: [q, k], falling; rising where the most harmful were asked for.
        train_ids: Ids of each query's k training examples, in that order; ties by position in the data.
        query_ids: Ids of the q queries.
        num_train: Number of training examples that were scored.
        formula: What was computed.
        reduction: How an example's own loss is formed.
        harmful: Whether these are the lowest scores.
        damping: Description of the damping, or None where there is none.
    """

    values: Tensor
    train_ids: tuple[tuple[int | str, ...], ...]
    query_ids: tuple[int | str, ...]
    num_train: int
    formula: str
    reduction: str
    harmful: bool = False
    damping: str | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values."""
        sizes = {len(row) for row in self.train_ids}
        q, k = len(self.query_ids), max(sizes, default=0)
        if tuple(self.values.shape) != (q, k) or len(self.train_ids) != q or len(sizes) > 1:
            raise ValueError(
                f"`TopScores(values={tuple(self.values.shape)})`: expected [q, k] = {(q, k)} from the query ids and "
                f"{len(self.train_ids)} lists of {sorted(sizes)} training examples."
            )

    def __repr__(self) -> str:
        """Sizes and labels, without the numbers and the ids."""
        q, k = self.values.shape
        kind = "harmful" if self.harmful else "helpful"
        return f"TopScores({k} most {kind} of {self.num_train} for {q} queries, formula={self.formula!r})"

    def of(self, query: int = 0) -> list[tuple[int | str, float]]:
        """Ids and scores of one query (by its position), as `Scores.top` gives them.

        >>> TopScores(torch.tensor([[3.0, 0.5]]), (("c", "a"),), ("q",), 9, "dot", "sum").of(0)
        [('c', 3.0), ('a', 0.5)]
        """
        return list(zip(self.train_ids[query], self.values[query].tolist(), strict=True))


class RunningTop:
    """The k highest scores of each of q rows, of columns that come in any number of parts.

    The same as a stable sort of all columns at once: of equal scores the one that came first is kept, and goes first.

    Args:
        k: Number that is kept.
        lowest: Whether the lowest are kept instead.

    Attributes:
        values: [q, min(k, columns seen)].
        positions: Columns of these, counted from the first that was seen, int64.

    >>> top = RunningTop(2)
    >>> top.update(torch.tensor([[1.0, 3.0]]))
    >>> top.update(torch.tensor([[3.0, 2.0]]))
    >>> top.positions
    tensor([[1, 2]])
    """

    values: Tensor
    positions: Tensor

    def __init__(self, k: int, *, lowest: bool = False) -> None:
        self.k = k
        self.lowest = lowest
        self._seen = 0

    def update(self, columns: Tensor) -> None:
        """Take in the next columns, [q, b]."""
        q, b = columns.shape
        positions = torch.arange(self._seen, self._seen + b, device=columns.device).expand(q, b)
        if self._seen:  # what is kept stands before what is new, as it does in the data
            columns, positions = torch.cat([self.values, columns], 1), torch.cat([self.positions, positions], 1)
        order = torch.argsort(columns, dim=1, descending=not self.lowest, stable=True)[:, : self.k]
        self.values, self.positions = columns.gather(1, order), positions.gather(1, order)
        self._seen += b


def check_k(call: str, k: int) -> None:
    """Refuse what is not a number of examples.

    Raises:
        ValueError: Unless ``k`` is an int >= 1.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`{call}(k={k!r})`: expected an int >= 1.")
