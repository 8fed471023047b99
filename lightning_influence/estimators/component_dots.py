"""Inner products of gradients, component by component, for chosen pairs of queries and training examples."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.store import Store

Id = int | str


@dataclass(frozen=True, eq=False)
class ComponentDots:
    """``δ_c(q, i) = <g_q, g_i>`` of each component for p pairs, with the self-products of all examples ([SP] A.2).

    From these numbers alone follow the dot product and the cosine over any subset of the components, and with them
    retrieval accuracy and the greedy choice of components; no gradient has to be taken again. δ > 0: a small
    gradient step on the training example lowers the query's loss.

    Attributes:
        components: Names of the c components.
        sizes: Number of parameters of each.
        query_ids: Ids of the q queries.
        train_ids: Ids of the n training examples that stand in some pair.
        pairs: Row of the query and row of the training example of each pair, int64 [p, 2]; query by query.
        dots: δ_c of each pair, [c, p].
        query_squares: δ_c(q, q), [c, q].
        train_squares: δ_c(i, i), [c, n].
        formula: What was computed.
        reduction: How an example's own loss is formed.
        checkpoint: Where the parameters came from, if known.
    """

    components: tuple[str, ...]
    sizes: tuple[int, ...]
    query_ids: tuple[Id, ...]
    train_ids: tuple[Id, ...]
    pairs: Tensor
    dots: Tensor
    query_squares: Tensor
    train_squares: Tensor
    formula: str
    reduction: str
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values."""
        c, p = len(self.components), len(self.pairs)
        expected = {
            "sizes": (c,),
            "pairs": (p, 2),
            "dots": (c, p),
            "query_squares": (c, len(self.query_ids)),
            "train_squares": (c, len(self.train_ids)),
        }
        found = {name: tuple(torch.as_tensor(getattr(self, name)).shape) for name in expected}
        if found != expected:
            raise ValueError(f"`ComponentDots`: expected shapes {expected} from the labels, got {found}.")

    def __repr__(self) -> str:
        """Sizes and labels, without the numbers and the ids."""
        sizes = f"{len(self.components)} components, {len(self.pairs)} pairs"
        sides = f"{len(self.query_ids)} queries, {len(self.train_ids)} training examples"
        return f"ComponentDots({sizes}, {sides}, formula={self.formula!r}, reduction={self.reduction!r})"

    def total(self, components: Iterable[str] | None = None) -> Tensor:
        """Dot product over some components, or all, of each pair, float64 [p].

        Raises:
            ValueError: If a component is not among those recorded, or named twice.
        """
        return _summed(self.dots, self.rows(components))

    def cosine(self, components: Iterable[str] | None = None, eps: float = 0.0) -> Tensor:
        """Cosine of the gradients of some components, or all, laid end to end, of each pair, float64 [p].

        ``Σ δ(q, i) / (sqrt(Σ δ(q, q)) sqrt(Σ δ(i, i)) + eps)`` ([SP] section 3.1); 0 for an example without a
        gradient.

        Raises:
            ValueError: If a component is not among those recorded, or named twice.
        """
        rows = self.rows(components)
        left, right = (_summed(squares, rows).sqrt() for squares in (self.query_squares, self.train_squares))
        lengths = left[self.pairs[:, 0]] * right[self.pairs[:, 1]] + eps
        return torch.where(
            lengths > 0, _summed(self.dots, rows) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 0
        )

    def rows(self, components: Iterable[str] | None = None) -> list[int]:
        """Rows of the named components, of all when None.

        Raises:
            ValueError: If one is not among those recorded (the nearest names are given), or named twice.
        """
        if components is None:
            return list(range(len(self.components)))
        names = [components] if isinstance(components, str) else list(components)
        place = {name: row for row, name in enumerate(self.components)}
        unknown = [name for name in names if name not in place]
        if unknown or not names or len(set(names)) < len(names):
            near = difflib.get_close_matches(str(unknown[0]), self.components, n=3, cutoff=0.0) if unknown else []
            hint = f"The nearest to {unknown[0]!r} are {near}." if unknown else "Name at least one, each once."
            raise ValueError(f"`ComponentDots(components={(unknown or names)[:8]})`: expected recorded names. {hint}")
        return [place[name] for name in names]

    def candidates(self) -> list[list[Id]]:
        """Ids of the training examples that each query is paired with, in the order of the pairs."""
        found: list[list[Id]] = [[] for _ in self.query_ids]
        for query, row in self.pairs.tolist():
            found[query].append(self.train_ids[row])
        return found

    def only(self, components: Iterable[str]) -> ComponentDots:
        """Those of some components, in the given order."""
        rows = self.rows(components)
        return replace(
            self,
            components=tuple(self.components[k] for k in rows),
            sizes=tuple(self.sizes[k] for k in rows),
            dots=self.dots[rows],
            query_squares=self.query_squares[rows],
            train_squares=self.train_squares[rows],
        )

    def at(self, checkpoint: str) -> ComponentDots:
        """The same numbers, labelled with where the parameters came from."""
        return replace(self, checkpoint=checkpoint)

    def save(self, store: Store, name: str = "component_dots") -> None:
        """Write them to a store."""
        for part, ids, values in (
            ("pairs", range(len(self.pairs)), self.dots),
            ("queries", range(len(self.query_ids)), self.query_squares),
            ("train", range(len(self.train_ids)), self.train_squares),
        ):
            store.row_writer(f"{name}.{part}", ids).write(list(ids), {"dots": values.T})
        self.save_labels(store, name)

    def save_labels(self, store: Store, name: str) -> None:
        """Write everything but the numbers, which are there as rows already; the last thing to be written."""
        labels = {key: getattr(self, key) for key in ("components", "sizes", "query_ids", "train_ids")}
        notes = {key: getattr(self, key) for key in ("formula", "reduction", "checkpoint")}
        store.write_json(name, {**labels, **notes, "pairs": self.pairs.tolist()})

    @classmethod
    def load(cls, store: Store, name: str = "component_dots") -> ComponentDots:
        """Read them back, in a process that never saw the training run.

        Raises:
            StoreError: If there are none of that name, or they are not complete.
        """
        labels = store.read_json(name)
        return cls(
            components=tuple(labels["components"]),
            sizes=tuple(labels["sizes"]),
            query_ids=tuple(labels["query_ids"]),
            train_ids=tuple(labels["train_ids"]),
            pairs=torch.tensor(labels["pairs"], dtype=torch.int64).reshape(-1, 2),
            dots=read_columns(store, f"{name}.pairs"),
            query_squares=read_columns(store, f"{name}.queries"),
            train_squares=read_columns(store, f"{name}.train"),
            formula=labels["formula"],
            reduction=labels["reduction"],
            checkpoint=labels["checkpoint"],
        )


def read_columns(store: Store, name: str) -> Tensor:
    """A table of rows with ids 0 to n - 1 in any order, as [c, n] by id."""
    parts = list(store.read_rows(name))
    order = torch.tensor([int(k) for part in parts for k in part.ids])
    values = torch.cat([part.values["dots"] for part in parts])
    out = torch.empty_like(values)
    out[order] = values
    return out.T.contiguous()


def _summed(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Sum over some components in float64, whatever was recorded."""
    return values[list(rows)].double().sum(0)
