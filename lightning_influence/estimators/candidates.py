"""Search in two stages: a filter without gradients finds candidates, an estimator scores these alone ([MS] 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.gradient_dot import GradientDot
from lightning_influence.estimators.lexical import Search, Text, check_search, pool_for, search_name, texts_of
from lightning_influence.estimators.scores import Scores


class Scorer(Protocol):
    """The one call shape: every `Estimator`, and baselines that take no gradient."""

    def score(self, queries: Any, train: Any) -> Scores:
        """Scores of every training example for every query; ids are positions."""
        ...


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Influence of k candidates on each query. Score > 0: adding (keeping) the example lowers the query's loss.

    Attributes:
        values: [q, k], in the order of the candidates.
        candidates: Ids of each query's candidates, in the order of the filter: most similar first.
        query_ids: Ids of the q queries.
        num_train: Number of training examples that were searched.
        formula: What was computed, and how the candidates were found.
        reduction: How an example's own loss is formed.
        damping: Description of the damping, or None where there is none.
        checkpoint: Where the parameters came from, if known.
    """

    values: Tensor
    candidates: tuple[tuple[int | str, ...], ...]
    query_ids: tuple[int | str, ...]
    num_train: int
    formula: str
    reduction: str
    damping: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values."""
        sizes = {len(row) for row in self.candidates}
        q, k = len(self.query_ids), max(sizes, default=0)
        if tuple(self.values.shape) != (q, k) or len(self.candidates) != q or len(sizes) > 1:
            raise ValueError(
                f"`CandidateScores(values={tuple(self.values.shape)})`: expected [q, k] = {(q, k)} from the query ids "
                f"and {len(self.candidates)} lists of {sorted(sizes)} candidates."
            )

    def __repr__(self) -> str:
        """Sizes and labels, without the numbers and the ids."""
        q, k = self.values.shape
        return f"CandidateScores({q} queries x {k} of {self.num_train} training examples, formula={self.formula!r})"

    def top(self, k: int, query: int = 0, *, harmful: bool = False) -> list[tuple[int | str, float]]:
        """The k most helpful candidates of one query (by its position), or the most harmful ones.

        Ties are broken by the order of the candidates.
        """
        row = self.values[query]
        order = torch.argsort(row, descending=not harmful, stable=True)[:k].tolist()
        return [(self.candidates[query][i], float(row[i])) for i in order]


class TwoStage:
    """The k candidates of a filter for each query, scored exactly.

    Gradients are taken of examples that are somebody's candidate, each once; the others cost nothing. With
    `GradientDot` only the pairs are compared, with any other estimator every query with the union of the candidates,
    of which its own are kept::

        found = TwoStage(BM25Filter, InfluenceFunction(model).fit(train), k=100, text="text").score(queries, train)
        candidate_recall(found.candidates, sources)      # what the filter lost

    Args:
        filter: A filter whose pool is the training data, row by row; or what makes one of a list of texts.
        estimator: Fitted, where it has to be.
        k: Candidates of each query.
        text: The text of an example, or what else the filter takes: a field of the rows, or a function of a row.

    Raises:
        ValueError: If an argument is none of these.
    """

    def __init__(self, filter: Search, estimator: Scorer, k: int, text: Text) -> None:
        check_search("TwoStage", filter, text)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"`TwoStage(k={k!r})`: expected an int >= 1.")
        if not callable(getattr(estimator, "score", None)):
            raise ValueError(f"`TwoStage(estimator={type(estimator).__name__})`: expected an estimator with score().")
        self.filter = filter
        self.estimator = estimator
        self.k = k
        self.text = text

    def score(self, queries: Any, train: Any) -> CandidateScores:
        """Find and score the candidates of every query.

        Args:
            queries: Map-style dataset or DataLoader.
            train: Map-style dataset or DataLoader.

        Raises:
            ValueError: If the data is empty, has fewer than k examples, or a row has no text.
        """
        left, right = ExampleLoader(queries), ExampleLoader(train)
        candidates = self.candidates(left, right)
        exact = self._pairs if isinstance(self.estimator, GradientDot) else self._union
        values, labels = exact(left, right, candidates)
        formula = f"{labels.pop('formula')}, {self.k} candidates by {search_name(self.filter)}"
        rows = tuple(map(tuple, candidates))
        return CandidateScores(values, rows, tuple(left.ids), right.num_examples, formula, **labels)

    def candidates(self, queries: Any, train: Any) -> list[list[int]]:
        """The first stage alone: ids of each query's candidates, most similar first."""
        left, right = ExampleLoader(queries), ExampleLoader(train)
        pool, rows = pool_for("TwoStage", self.filter, self.text, right)
        if len(rows) < pool.num_rows:
            raise ValueError(
                f"`TwoStage(filter={type(pool).__name__})`: its pool has {pool.num_rows} rows, of which {len(rows)} "
                "are to be searched. Hand over the class, to have a filter made of those."
            )
        found = pool.candidates(texts_of(left, self.text, "TwoStage(text=...)"), self.k)
        place = {row: k for k, row in zip(right.ids, rows, strict=True)}
        return [[place[row] for row in line] for line in found.tolist()]

    def _pairs(
        self, queries: ExampleLoader, train: ExampleLoader, candidates: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, Any]]:
        assert isinstance(self.estimator, GradientDot)
        dots = self.estimator.pairs(queries, train, candidates)
        normalise = self.estimator.normalise
        values = dots.cosine() if normalise else dots.total()
        formula = self.estimator.formula + ", unit gradients" * normalise
        return values.reshape(len(candidates), self.k), {"formula": formula, "reduction": dots.reduction}

    def _union(
        self, queries: ExampleLoader, train: ExampleLoader, candidates: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, Any]]:
        wanted = {k for row in candidates for k in row}
        union = [k for k in train.ids if k in wanted]
        scores = self.estimator.score(queries, ExampleLoader(train, indices=union))
        place = {k: column for column, k in enumerate(scores.train_ids)}
        columns = torch.tensor([[place[k] for k in row] for row in candidates])
        values = scores.total()
        labels = {name: getattr(scores, name) for name in ("formula", "reduction", "damping", "checkpoint")}
        return values.gather(1, columns.to(values.device)), labels
