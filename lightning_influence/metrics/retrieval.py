"""How often the true source of a query stands at the top of its candidates; a tie never counts for the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def retrieval_ranks(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Place of the true source among the candidates: 1 + the number of others whose score is not below its own.

    Ties are counted against the source, so that a score which knows nothing (the same for all) is at the bottom and
    not at chance. Nothing is rounded: scores are compared as they are.

    Args:
        scores: [q, k], higher is more similar; infinities are ordered as usual.
        target: Column [q] of the true source.
        valid: Bool [q, k], False where a shorter list of candidates was padded; None: all are candidates.

    Returns:
        Ranks [q], int64, from 1 (alone at the top) to the number of candidates.

    Raises:
        ValueError: If shapes do not fit, a true source is not a candidate, or a candidate's score is NaN (the
            queries are named by their row).

    >>> retrieval_ranks(torch.tensor([[0.9, 0.2, 0.1], [0.5, 0.5, 0.1]]), torch.tensor([0, 0]))
    tensor([1, 2])
    """
    _check(scores, target, valid, "retrieval_ranks")
    others = scores >= scores.gather(1, target.long()[:, None])
    if valid is not None:
        others &= valid
    return others.sum(1)  # the source is not below itself: this is the 1


def retrieval_accuracy(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of queries whose true source scores strictly above every other candidate ([SP] section 3.2).

    Takes and refuses what `retrieval_ranks` does.

    Returns:
        A scalar, float32.

    >>> retrieval_accuracy(torch.tensor([[0.9, 0.2, 0.1], [0.5, 0.5, 0.1]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return _mean(retrieval_ranks(scores, target, valid) == 1)


def mean_reciprocal_rank(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over queries of 1 / `retrieval_ranks`, a scalar, float32.

    >>> mean_reciprocal_rank(torch.tensor([[0.9, 0.2, 0.1], [0.5, 0.5, 0.1]]), torch.tensor([0, 0]))
    tensor(0.7500)
    """
    return _mean(1 / retrieval_ranks(scores, target, valid))


def recall_at_k(scores: Tensor, target: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Share of queries whose `retrieval_ranks` is at most ``k``, a scalar, float32.

    Raises:
        ValueError: If ``k`` is not an int >= 1, and as `retrieval_ranks` does.

    >>> recall_at_k(torch.tensor([[0.9, 0.2, 0.1], [0.5, 0.5, 0.1]]), torch.tensor([0, 0]), k=2)
    tensor(1.)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`recall_at_k(k={k!r})`: expected an int >= 1.")
    return _mean(retrieval_ranks(scores, target, valid) <= k)


def pessimistic_inputs(
    scores: Tensor, target: Tensor, valid: Tensor | None = None, queries: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``update`` of a retrieval metric of torchmetrics takes, with ties counted against the true source.

    torchmetrics sorts by score with the order among equals left open, and takes a source with a score <= 0 for not
    retrieved, which a cosine may well be. Here a candidate that is not below the source gets 3, the source 2, the
    rest 1, so that `RetrievalMRR`, `RetrievalRecall` and the like see the rank of `retrieval_ranks`.

    Args:
        scores: [q, k], higher is more similar.
        target: Column [q] of the true source.
        valid: Bool [q, k], False where a shorter list of candidates was padded.
        queries: Number [q] of each query, different for all queries of all batches and ranks; torchmetrics puts
            candidates with the same number together. Row numbers by default: right for a single update.

    Returns:
        Scores, float32; relevance, bool; numbers of the queries, int64: each flat, [number of candidates].

    Raises:
        ValueError: As `retrieval_ranks`; if ``queries`` does not fit.

    >>> from torchmetrics.retrieval import RetrievalMRR
    >>> mrr = RetrievalMRR()
    >>> mrr.update(*pessimistic_inputs(torch.tensor([[-0.1, -0.2], [0.5, 0.5]]), torch.tensor([0, 0])))
    >>> mrr.compute()
    tensor(0.7500)
    """
    _check(scores, target, valid, "pessimistic_inputs")
    if queries is None:
        queries = torch.arange(len(scores), device=scores.device)
    if queries.shape != target.shape or queries.is_floating_point():
        raise ValueError(
            f"`pessimistic_inputs(queries)`: expected a whole number for each of {len(scores)} queries, "
            f"got {queries.dtype} {list(queries.shape)}."
        )
    column = target.long()[:, None]
    levels = 1.0 + 2.0 * (scores >= scores.gather(1, column))
    levels.scatter_(1, column, 2.0)
    relevant = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, column, True)
    kept = torch.ones_like(relevant) if valid is None else valid
    return levels[kept], relevant[kept], queries.long()[:, None].expand_as(scores)[kept]


class RetrievalAccuracy(Metric):
    """`retrieval_accuracy` over batches and ranks; hits and queries are added.

    >>> accuracy = RetrievalAccuracy()
    >>> accuracy.update(torch.tensor([[0.9, 0.2]]), torch.tensor([0]))
    >>> accuracy.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    >>> accuracy.compute()
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    queries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("queries", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Count the queries of one batch; the arguments are those of `retrieval_ranks`.

        Raises:
            ValueError: As `retrieval_ranks`.
        """
        self.hits += (retrieval_ranks(scores, target, valid) == 1).sum()
        self.queries += len(scores)

    def compute(self) -> Tensor:
        """Share of hits among everything counted, a scalar, float32.

        Raises:
            ValueError: If nothing was counted.
        """
        return _share(self.hits, self.queries)


def _check(scores: Tensor, target: Tensor, valid: Tensor | None, what: str) -> None:
    shapes = (list(scores.shape), list(target.shape), None if valid is None else list(valid.shape))
    fits = scores.dim() == 2 and target.shape == scores.shape[:1] and (valid is None or valid.shape == scores.shape)
    if not fits or target.is_floating_point() or (valid is not None and valid.dtype != torch.bool):
        raise ValueError(
            f"`{what}(scores, target, valid)`: expected scores [q, k], whole numbers [q] and bool [q, k] or None, got "
            f"shapes {', '.join(map(str, shapes))}."
        )
    outside = (target < 0) | (target >= scores.shape[1])
    if valid is not None and not outside.any():
        outside = ~valid.gather(1, target.long()[:, None])[:, 0]
    if outside.any():
        raise ValueError(
            f"`{what}(target)`: expected the column of a candidate for each query; it is none for queries "
            f"{_rows(outside)}."
        )
    unknown = scores.isnan() if valid is None else scores.isnan() & valid
    if unknown.any():
        raise ValueError(f"`{what}(scores)`: expected numbers, found NaN for queries {_rows(unknown.any(1))}.")


def _rows(marked: Tensor) -> str:
    rows = marked.nonzero().flatten().tolist()
    return f"{rows[:8]}" + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _mean(values: Tensor) -> Tensor:
    return _share(values.sum(), torch.tensor(len(values), device=values.device))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    if whole == 0:
        raise ValueError("retrieval of no query: expected at least one query.")
    return (part / whole).float()
