"""Several target sets in one pass: one data set after another, and which rows belong to which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lightning_influence.capture import ExampleLoader
from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.scores import Scores
from lightning_influence.selection.aggregate import Across, Weights, select_by_scores, target_interactions
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.newton import Newton
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.terms import Terms
from lightning_influence.selection.top_k import TopK


class NamedTargets:
    """Target examples, in sets that have names where there are several.

    Args:
        call: How the caller's code reads, for the error text.
        targets: Map-style dataset or DataLoader, or a mapping of names to such.
        weights: Factors of the sets, 1 for those that are not named (`target_interactions`).
        across: How the scores for the sets become one (`aggregate`), or "round-robin": the sets take turns.
        batch_size: Examples per batch; None takes the loaders', or 32.

    Attributes:
        data: All examples, one set after another; ids count on from set to set.
        sets: Ids of each set; None for targets without names.

    Raises:
        ValueError: If there is no set, their batches are made in different ways, or weights do not fit.
    """

    def __init__(
        self, call: str, targets: Any, weights: Weights = None, across: Across = "mean", batch_size: int | None = None
    ) -> None:
        self._call, self.weights, self.across = call, weights, across
        self.sets: dict[str, range] | None = None
        if across not in get_args(Across):
            raise ValueError(f"`{call}(across={across!r})`: expected one of {list(get_args(Across))}.")
        if not isinstance(targets, Mapping):
            if weights is not None or across != "mean":
                raise ValueError(
                    f"`{call}(targets={type(targets).__name__})`: target_weights and across are for several target "
                    "sets. Expected targets={name: dataset or DataLoader, ...}."
                )
            self.data = ExampleLoader(targets, batch_size, what="targets")
            return
        if not targets:
            raise ValueError(f"`{call}(targets={{}})`: expected at least one target set by name.")
        loaders = {str(name): ExampleLoader(data, batch_size) for name, data in targets.items()}
        self.data, self.sets = self._joined(list(loaders.values())), {}
        for name, loader in loaders.items():
            start = sum(map(len, self.sets.values()))
            self.sets[name] = range(start, start + loader.num_examples)
        if across == "round-robin" and weights is not None:
            raise ValueError(
                f"`{call}(across='round-robin', target_weights=...)`: every target set takes its turn. Expected "
                "target_weights with 'mean', 'max' or 'min'; leave a set out that shall be avoided."
            )
        self._check_weights(dict.fromkeys(self.sets, 1.0) | dict(weights or {}))

    def _check_weights(self, factors: dict[str, float]) -> None:
        assert self.sets is not None
        unknown = sorted(set(factors) - set(self.sets))
        if unknown:
            raise ValueError(
                f"`{self._call}(target_weights)`: {unknown} are no targets; expected names among {list(self.sets)}."
            )
        if not all(map(_is_finite, factors.values())) or not any(factors.values()):
            raise ValueError(
                f"`{self._call}(target_weights)`: expected finite numbers that are not all 0; got {factors}."
            )

    def _joined(self, loaders: list[ExampleLoader]) -> ExampleLoader:
        first = loaders[0]
        if any(loader.collate_fn != first.collate_fn for loader in loaders):
            raise ValueError(
                f"`{self._call}(targets)`: the loaders of the target sets have different collate functions. Expected "
                "the same one, so that the examples can be put into batches together."
            )
        rows: ConcatDataset[Any] = ConcatDataset([Subset(loader.dataset, loader.ids) for loader in loaders])
        return ExampleLoader(rows, min(loader.batch_size for loader in loaders), first.collate_fn, what="targets")

    def check_rule(self, rule: SelectionRule | Newton) -> None:
        """Refuse a rule that cannot look at these targets.

        Raises:
            ValueError: If it is not.
        """
        if self.sets is None or isinstance(rule, TopK):
            return
        if self.across != "mean":
            raise ValueError(
                f"`{self._call}(across={self.across!r}, rule={rule!r})`: the largest, the smallest or one in turn "
                "has no interactions. Expected rule=TopK(), or across='mean' with target_weights."
            )

    @property
    def shares(self) -> Tensor | None:
        """Factor [m] of each example in the weighted mean over the sets of their mean losses; None without names."""
        if self.sets is None:
            return None
        weights = dict(self.weights or {})
        parts = [torch.full((len(ids),), weights.get(name, 1.0) / len(ids)) for name, ids in self.sets.items()]
        return torch.cat(parts).double() / len(self.sets)

    @property
    def counted(self) -> int:
        """Number of examples whose share is not 0."""
        return self.data.num_examples if self.shares is None else int(self.shares.count_nonzero())

    def interactions(self, scores: Scores, fisher: Scores | None, weight: float) -> Interactions:
        """For the mean loss of all examples, or the weighted mean over the sets of their mean losses."""
        if self.sets is None:
            return Interactions.from_scores(scores, weight, fisher)
        return target_interactions(scores, self.sets, self.weights, weight=weight, curvature_scores=fisher)

    def top(self, scores: Scores, terms: Terms) -> Selection:
        """The rows with the largest of the scores for all sets taken together, max or min, or for each in turn."""
        return select_by_scores(
            replace(scores, values=scores.total().double() / terms.rows, components=None),
            budget=terms.budget,
            constraints=terms.constraints,
            across=self.across,
            targets=self.sets,
            weights=self.weights,
        )


def _is_finite(number: object) -> bool:
    return isinstance(number, Real) and math.isfinite(number)
