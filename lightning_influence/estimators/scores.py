"""Labelled influence scores: what every estimator returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.store import Store


@dataclass(frozen=True, eq=False)
class Scores:
    """Influence of training examples on queries. Score > 0: adding (keeping) the example lowers the query's loss.

    Attributes:
        values: [q, n], or [c, q, n] when kept per component; components then add up to the total.
        query_ids: Ids of the q queries.
        train_ids: Ids of the n training examples.
        formula: What was computed.
        reduction: How an example's own loss is formed.
        components: Names of the c components, or None for the total alone.
        damping: Description of the damping, or None where there is none.
        checkpoint: Where the parameters came from, if known.
    """

    values: Tensor
    query_ids: tuple[int | str, ...]
    train_ids: tuple[int | str, ...]
    formula: str
    reduction: str
    components: tuple[str, ...] | None = None
    damping: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values."""
        shape = (len(self.query_ids), len(self.train_ids))
        expected = shape if self.components is None else (len(self.components), *shape)
        if tuple(self.values.shape) != expected:
            raise ValueError(f"`Scores(values={tuple(self.values.shape)})`: expected {expected} from the labels.")

    def __repr__(self) -> str:
        """Sizes and labels, without the numbers and the ids."""
        kept = "" if self.components is None else f" of {len(self.components)} components"
        sizes = f"{len(self.query_ids)} queries x {len(self.train_ids)} training examples{kept}"
        labels = {"damping": self.damping, "checkpoint": self.checkpoint}
        known = [f"{key}={value!r}" for key, value in labels.items() if value is not None]
        return f"Scores({', '.join([sizes, f'formula={self.formula!r}', f'reduction={self.reduction!r}', *known])})"

    def total(self, components: Sequence[str] | None = None) -> Tensor:
        """Sum over components, [q, n]; over some of them when named.

        Raises:
            ValueError: If a component is named that the scores do not hold, or one is named twice.
        """
        if components is None:
            return self.values if self.components is None else self.values.sum(0)
        known = self.components or ()
        unknown = [name for name in components if name not in known]
        if unknown or len(set(components)) < len(components):
            raise ValueError(
                f"`Scores.total(components={unknown or list(components)})`: expected names among {list(known[:8])}, "
                "each once. Scores hold components when they were made with per_component=True."
            )
        return self.values[[known.index(name) for name in components]].sum(0)

    def top(self, k: int, query: int = 0, *, harmful: bool = False) -> list[tuple[int | str, float]]:
        """The k most helpful training examples for one query (by its position), or the most harmful ones.

        Ties are broken by position, so the answer does not depend on the platform.

        >>> scores = Scores(torch.tensor([[0.5, -2.0, 3.0]]), ("q",), ("a", "b", "c"), "dot", "sum")
        >>> scores.top(2), scores.top(1, harmful=True)
        ([('c', 3.0), ('a', 0.5)], [('b', -2.0)])
        """
        row = self.total()[query]
        order = torch.argsort(row, descending=not harmful, stable=True)[:k].tolist()
        return [(self.train_ids[i], float(row[i])) for i in order]

    def at(self, checkpoint: str) -> Scores:
        """The same scores, labelled with where the parameters came from."""
        return replace(self, checkpoint=checkpoint)

    def save(self, store: Store, name: str = "scores") -> None:
        """Write them to a store."""
        store.write_scores(
            name,
            self.values,
            list(self.query_ids),
            list(self.train_ids),
            None if self.components is None else list(self.components),
            formula=self.formula,
            reduction=self.reduction,
            damping=self.damping,
            checkpoint=self.checkpoint,
        )

    @classmethod
    def load(cls, store: Store, name: str = "scores") -> Scores:
        """Read them back, in a process that never saw the training run."""
        found = store.read_scores(name)
        return cls(
            values=found.values,
            query_ids=tuple(found.query_ids),
            train_ids=tuple(found.train_ids),
            components=None if found.components is None else tuple(found.components),
            formula=str(found.meta["formula"]),
            reduction=str(found.meta["reduction"]),
            damping=found.meta["damping"],
            checkpoint=found.meta["checkpoint"],
        )
