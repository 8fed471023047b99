"""The contract of an estimator: queries and training examples in, labelled scores out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_influence.capture import Component, ExampleLoader, GradientCapture
from lightning_influence.capture.budget import check_bytes
from lightning_influence.capture.component import Select
from lightning_influence.capture.examples import TRAIN
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.low_rank import check_rank, rank_note
from lightning_influence.estimators.passes import Passes
from lightning_influence.estimators.queries import Aggregate, asked, check_asked, row_ids
from lightning_influence.estimators.queries import Labels as Labels
from lightning_influence.estimators.queries import Loss as Loss
from lightning_influence.estimators.queries import check_supervised as check_supervised
from lightning_influence.estimators.queries import damping_label as damping_label
from lightning_influence.estimators.queries import inverse_length as inverse_length
from lightning_influence.estimators.scores import Scores
from lightning_influence.estimators.self_influence import SELF
from lightning_influence.estimators.token_scores import Positions, TokenScores, joined
from lightning_influence.estimators.top_scores import RunningTop, TopScores, check_k


class Estimator(Passes):
    """Scores of training examples for queries, at one set of parameters.

    Queries are gradients kept in memory (transformed once, block by block under a memory budget); training
    examples stream by and are contracted with them, so that a training example's gradient is formed at most
    once per block of queries and never kept.

    Args:
        model: The model at the parameters of interest. Left as it was.
        loss: Per-example loss; None resolves it from the model and the first batch.
        components: What `find_components` takes.
        query_loss: What is measured of a query, where it is not its loss: any differentiable ``(model, batch) -> [n]``
            or `ExampleLoss`, such as a margin. A score > 0 then means that adding the example lowers that.
        normalise: Whether every example's gradient is scaled to unit length first, over all components. The
            length of a gradient grows with an example's loss and its number of tokens, and then decides alone.
        batch_size: Examples per batch; None takes the loader's, or 32.
        memory_budget: Bytes for the gradients of queries that are kept at a time.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Attributes:
        formula: What is computed, for the labels of the scores.
        bilinear: Whether a score is ``<T g_q, g_i>`` with T linear.
        one_model: Whether the gradients on both sides are of the same model and loss.

    Raises:
        ValueError: If there is no such component, or the memory is no number of bytes.
    """

    formula: str
    bilinear: ClassVar[bool] = True
    one_model: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = None,
        components: Select | list[Component] = None,
        *,
        query_loss: Loss = None,
        normalise: bool = False,
        batch_size: int | None = None,
        memory_budget: int = 2 * 1024**3,
        progress: bool = True,
    ) -> None:
        check_bytes(type(self).__name__, "memory_budget", memory_budget)
        self.model = model
        self.loss = loss
        self.query_loss = query_loss
        self.asked = loss if query_loss is None else query_loss
        self.capture = GradientCapture(model, components)
        self.normalise = normalise
        self.batch_size = batch_size
        self.memory_budget = memory_budget
        self.progress = progress

    @property
    def damping(self) -> str | None:
        """Description of the damping for the labels of the scores."""
        return None

    def score(
        self,
        queries: Any,
        train: Any,
        *,
        per_component: bool = False,
        aggregate: Aggregate = None,
        rank: int | float | None = None,
        labels: Labels = "data",
        seed: int = 0,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            queries: Map-style dataset or DataLoader of the examples whose loss matters.
            train: Map-style dataset or DataLoader of the examples whose influence is asked.
            per_component: Whether to keep components apart, [c, q, n].
            aggregate: ``"mean"`` scores for the mean loss of the queries, in one row of the id ``"mean"``: their
                gradients are averaged (in their dtype) before anything else is done to them.
            rank: An int truncates what is kept of a query for each linear layer or convolution to that rank; a float
                to the least rank with that share of its squared singular values. More queries fit into memory then,
                and the training data is passed over fewer times. None keeps all.
            labels: ``"sampled"`` replaces the queries' labels by draws from the model, as the Fisher of the
                queries needs.
            seed: Of those draws.

        Returns:
            Scores in the order of the data; ids are positions.

        Raises:
            ValueError: If the data is empty, a query has nothing supervised, a loss is not finite (ids are named), or
                scores of a mean are asked of an estimator that is not linear in the query.
        """
        left, right = self._sides("score", queries, train, labels, aggregate, rank)
        blocks = [
            torch.cat(list(self._columns_of(gradients, right, per_component)), dim=-1)
            for gradients in self._operands(left, aggregate, labels, seed, rank)
        ]
        formula = self._described(*asked(left, labels, aggregate), rank_note(rank))
        reduction = self._reduction(left, right)
        return self._scores(torch.cat(blocks, dim=-2), row_ids(left, aggregate), right, formula, reduction)

    def top(
        self,
        queries: Any,
        train: Any,
        k: int,
        *,
        harmful: bool = False,
        aggregate: Aggregate = None,
        rank: int | float | None = None,
        labels: Labels = "data",
        seed: int = 0,
    ) -> TopScores:
        """The k most helpful training examples of each query, where q x n scores are too many to keep.

        The same as `score` followed by `Scores.top`, ties included; what is kept is k for each query.

        Args:
            queries: As for `score`.
            train: As for `score`.
            k: Training examples to keep for each query; all of them where there are fewer.
            harmful: Whether to keep the most harmful ones.
            aggregate: As for `score`.
            rank: As for `score`.
            labels: As for `score`.
            seed: As for `score`.

        Raises:
            ValueError: As `score`, or if k is out of range.
        """
        check_k(f"{type(self).__name__}.top", k)
        left, right = self._sides("top", queries, train, labels, aggregate, rank)
        found = []
        for gradients in self._operands(left, aggregate, labels, seed, rank):
            best = RunningTop(k, lowest=harmful)
            for columns in self._columns_of(gradients, right):
                best.update(columns)
            found.append(best)
        positions = [row for best in found for row in best.positions.tolist()]
        return TopScores(
            values=torch.cat([best.values for best in found]),
            train_ids=tuple(tuple(right.ids[i] for i in row) for row in positions),
            query_ids=row_ids(left, aggregate),
            num_train=right.num_examples,
            formula=self._described(*asked(left, labels, aggregate), rank_note(rank)),
            reduction=self._reduction(left, right),
            harmful=harmful,
            damping=self.damping,
        )

    def token_scores(
        self, queries: Any, train: Any, *, aggregate: Aggregate = None, labels: Labels = "data", seed: int = 0
    ) -> TokenScores:
        """Score every position (token) of every training example; arguments are those of `score`.

        Raises:
            ValueError: As `score`, or if no component can be taken apart by position.
        """
        left, right = self._sides("token_scores", queries, train, labels, aggregate)
        loss, blocks = loss_for(self.model, right, self.loss), []
        for gradients in self._prepared(left, aggregate, labels, seed):
            block = Positions()
            with self.capture:
                batches = self._records(right, "positions of training examples")
                for (_, batch), records in zip(right, batches, strict=True):
                    block.update(gradients, records, loss.position_mask(batch), self.normalise)
            blocks.append(block)
        return joined(
            blocks,
            f"{type(self).__name__}.token_scores(train)",
            query_ids=row_ids(left, aggregate),
            train_ids=tuple(right.ids),
            formula=self._described(*asked(left, labels, aggregate)),
            reduction=self._reduction(left, right),
            damping=self.damping,
        )

    def self_influence(self, train: Any, *, per_component: bool = False) -> Scores:
        """Score every training example for itself: ``g_i^T (G + damping)^{-1} g_i``, which is >= 0.

        Large for examples that the model knows by themselves alone: rare, hard or mislabelled ones. One pass over the
        data; the gradients of as many examples are formed at a time as fit into ``memory_budget``.

        Args:
            train: Map-style dataset or DataLoader.
            per_component: Whether to keep components apart, [c, 1, n].

        Returns:
            One row of scores, the query of which is ``"itself"``: the diagonal of ``score(train, train)``.

        Raises:
            ValueError: If the estimator has no such product, the data is empty, or a loss is not finite.
        """
        self._check_self("self_influence(train)")
        loader = self._loader(train, TRAIN)
        with self.capture:
            batches = self._records(loader, "self-influence")
            values = torch.cat([self._self_columns({c.name: r for c, r in records}) for records in batches], dim=-1)
        return self._self_scores(values if per_component else values.sum(0), loader)

    def score_with_self(
        self, queries: Any, train: Any, *, also: Any = None, labels: Labels = "data", seed: int = 0
    ) -> tuple[Scores, Scores]:
        """`score` and `self_influence` of the same training examples, which are passed over once for both.

        Where the queries take several blocks, each takes a pass as in `score`, and the first one takes both.

        Args:
            queries: As for `score`.
            train: As for `score`.
            also: More queries, which come in batches of their own; their rows of scores follow. No pass is added where
                all queries fit into memory. Their ids are positions in their own data.
            labels: As for `score`.
            seed: As for `score`.

        Returns:
            Scores [q, n], and one row [1, n] of each example for itself.

        Raises:
            ValueError: As `score` and `self_influence`.
        """
        self._check_self("score_with_self(queries, train)")
        left, right = self._sides("score_with_self", queries, train, labels, None)
        more = None if also is None else self._sides("score_with_self", also, train, labels, None)[0]
        blocks: list[Tensor] = []
        squares: list[Tensor] = []
        for gradients in self._prepared_together([left] if more is None else [left, more], labels, seed):
            columns = []
            with self.capture:
                for records in self._records(right, "training examples"):
                    batch = list(records)
                    columns.append(self._columns(gradients, iter(batch), False))
                    if not blocks:
                        squares.append(self._self_columns({c.name: r for c, r in batch}).sum(0))
            blocks.append(torch.cat(columns, dim=-1))
        formula, reduction = self._described(*asked(left, labels, None)), self._reduction(left, right)
        ids = row_ids(left, None) if more is None else row_ids(left, None) + row_ids(more, None)
        scores = self._scores(torch.cat(blocks), ids, right, formula, reduction)
        return scores, self._self_scores(torch.cat(squares), right)

    def check(self, queries: Any, labels: Labels = "data", seed: int = 0, *, what: str = "queries") -> None:
        """Make sure that queries can be scored, by one forward and backward pass over them.

        Args:
            queries: As for `score`.
            labels: As for `score`.
            seed: As for `score`.
            what: What to call them in an error, unless ``queries`` is an `ExampleLoader` that tells.

        Raises:
            ValueError: If the data is empty, a query has nothing supervised, a loss is not finite, or the model cannot
                be run on a batch (ids are named).
            UnsupportedLayerError: If a component has no per-example gradient.
        """
        loader = self._loader(queries, what)
        self._check_queries(loader)
        with self.capture:
            for records in self._records(loader, "checking queries", labels, seed, self.asked):
                next(records)  # the first record takes the passes, all others follow from them

    def _check_self(self, call: str) -> None:
        if not (self.bilinear and self.one_model and self.query_loss is None):
            raise ValueError(
                f"`{type(self).__name__}.{call}`: an example has no product with itself here. Expected one model and "
                "loss, and a score linear in each gradient: an InfluenceFunction without query_loss, say."
            )

    def _self_scores(self, values: Tensor, train: ExampleLoader) -> Scores:
        """Of [n] or [c, n]."""
        reduction = loss_for(self.model, train, self.loss).reduction
        return self._scores(values[..., None, :], (SELF,), train, self._described("each example on itself"), reduction)

    def _scores(
        self, values: Tensor, query_ids: tuple[int | str, ...], train: ExampleLoader, formula: str, reduction: str
    ) -> Scores:
        """Labelled; of [c, q, n] by component."""
        return Scores(
            values=values,
            query_ids=query_ids,
            train_ids=tuple(train.ids),
            formula=formula,
            reduction=reduction,
            components=tuple(c.name for c in self.components) if values.dim() == 3 else None,
            damping=self.damping,
        )

    def _described(self, *notes: str) -> str:
        """The formula with what was done beside it, for the labels of scores."""
        return ", ".join(filter(None, (self.formula, "unit gradients" * self.normalise, *notes)))

    def _sides(
        self,
        call: str,
        queries: Any,
        train: Any,
        labels: Labels,
        aggregate: Aggregate,
        rank: int | float | None = None,
    ) -> tuple[ExampleLoader, ExampleLoader]:
        """Both loaders, after everything that can be refused before the first gradient."""
        check_asked(f"{type(self).__name__}.{call}", labels, aggregate, bilinear=self.bilinear)
        check_rank(f"{type(self).__name__}.{call}", rank, bilinear=self.bilinear)
        left, right = self._loader(queries, "queries"), self._loader(train, TRAIN)
        self._check_queries(left)
        return left, right

    def _check_queries(self, queries: ExampleLoader) -> None:
        check_supervised(self.model, queries, self.asked)

    def _reduction(self, queries: ExampleLoader, train: ExampleLoader) -> str:
        asked = loss_for(self.model, queries, self.asked).reduction
        own = asked if self.query_loss is None else loss_for(self.model, train, self.loss).reduction
        return own if own == asked else f"query: {asked}, training example: {own}"
