"""Dot products of queries with their candidates, component by component, in rectangular form."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.estimators.component_dots import ComponentDots, Id


@dataclass(frozen=True, eq=False)
class ComponentPairs:
    """δ_c(q, j) of q queries with up to k candidates each, one of which is the query's true source ([SP] section 3).

    Attributes:
        components: Names of the c components.
        sizes: Number of parameters of each.
        dots: δ_c(q, j), [c, q, k].
        query_squares: δ_c(q, q), [c, q].
        candidate_squares: δ_c(j, j), [c, q, k].
        target: Column of the true source of each query, int64 [q].
        valid: Bool [q, k], False where a shorter list of candidates is padded; None: none is.

    Raises:
        ValueError: If shapes do not fit, names repeat, a true source is no candidate, a size or a square is negative,
            or a number is NaN or infinite (components and rows are named).
    """

    components: tuple[str, ...]
    sizes: tuple[int, ...]
    dots: Tensor
    query_squares: Tensor
    candidate_squares: Tensor
    target: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        """Labels must fit the values, and the values must be such as gradients can have."""
        self._check_shapes()
        valid = self.mask
        outside = (self.target < 0) | (self.target >= self.dots.shape[2])
        if not outside.any():
            outside = ~valid.gather(1, self.target[:, None])[:, 0]
        if outside.any():
            rows = outside.nonzero().flatten().tolist()[:8]
            raise ValueError(f"`ComponentPairs(target)`: expected a candidate's column; it is none for queries {rows}.")
        for name, sign in (("dots", False), ("query_squares", True), ("candidate_squares", True)):
            values = getattr(self, name)
            wrong = ~values.isfinite() | ((values < 0) if sign else torch.zeros((), dtype=torch.bool))
            self._refuse(name, wrong & valid if values.dim() == 3 else wrong, sign)

    @classmethod
    def from_dots(cls, dots: ComponentDots, sources: Mapping[Id, Id] | Sequence[Id]) -> ComponentPairs:
        """Of recorded pairs, once the true source of each query is known; candidates stay in the order of the pairs.

        Args:
            dots: Recorded for each query with its candidates.
            sources: Id of the training example that each query was made from, by query id or in the order of the
                queries.

        Raises:
            ValueError: If a query has no candidates or no source, a pair comes twice, or a source was not recorded or
                is not among the query's candidates (ids are named).
        """
        wanted = _sources(dots, sources)
        columns, counts = _columns(dots)
        device = dots.dots.device
        query, row = dots.pairs.T.to(device)
        rows = torch.zeros(len(dots.query_ids), max(counts), dtype=torch.long, device=device)
        place = torch.zeros_like(rows)
        rows[query, columns.to(device)] = row
        place[query, columns.to(device)] = torch.arange(len(dots.pairs), device=device)
        valid = torch.arange(rows.shape[1], device=device) < torch.tensor(counts, device=device)[:, None]
        return cls(
            components=tuple(dots.components),
            sizes=tuple(dots.sizes),
            dots=dots.dots[:, place].masked_fill(~valid, 0),
            query_squares=dots.query_squares,
            candidate_squares=dots.train_squares[:, rows].masked_fill(~valid, 0),
            target=_target(dots, wanted, rows, valid),
            valid=None if valid.all() else valid,
        )

    @property
    def mask(self) -> Tensor:
        """Which columns are candidates, bool [q, k]."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.dots.shape[1:], dtype=torch.bool, device=self.dots.device)

    @property
    def num_queries(self) -> int:
        """q."""
        return self.dots.shape[1]

    def rows(self, components: Iterable[str]) -> list[int]:
        """Rows of the named components.

        Raises:
            ValueError: If a name is not a component's (the nearest ones are given), none is given, or one twice.
        """
        names = [components] if isinstance(components, str) else list(components)
        return component_rows(self.components, names, "ComponentPairs(components={})")

    def queries(self, rows: Sequence[int]) -> ComponentPairs:
        """Those of some queries, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.dots.device)
        return replace(
            self,
            dots=self.dots[:, index],
            query_squares=self.query_squares[:, index],
            candidate_squares=self.candidate_squares[:, index],
            target=self.target[index],
            valid=None if self.valid is None else self.valid[index],
        )

    def share(self, components: Iterable[str]) -> float:
        """Share of all parameters that the named components hold."""
        return sum(self.sizes[row] for row in self.rows(components)) / sum(self.sizes)

    def cosine(self, components: Iterable[str] | None = None, eps: float = 0.0) -> Tensor:
        """cos_S of each query and candidate ([SP] section 3.1), float64 [q, k]; 0 without a gradient and in padding.

        Args:
            components: Names of S; None: all.
            eps: ε, added to the product of the two lengths.
        """
        rows = list(range(len(self.components))) if components is None else self.rows(components)
        parts = (self.dots, self.query_squares, self.candidate_squares)
        dots, own, other = (part[rows].to(torch.float64).sum(0) for part in parts)
        lengths = own.sqrt()[:, None] * other.sqrt()
        cosines = torch.where(lengths > 0, dots / (lengths + eps), 0)
        return cosines.masked_fill(~self.mask, 0)

    def _check_shapes(self) -> None:
        c, q, k = self.dots.shape if self.dots.dim() == 3 else (0, 0, 0)
        expected = {"sizes": (c,), "query_squares": (c, q), "candidate_squares": (c, q, k), "target": (q,)}
        if self.valid is not None:
            expected["valid"] = (q, k)
        found = {name: tuple(torch.as_tensor(getattr(self, name)).shape) for name in expected}
        if found != expected or len(self.components) != c or 0 in (c, q, k):
            raise ValueError(
                f"`ComponentPairs(dots={list(self.dots.shape)})`: expected dots [c, q, k] of at least one of each, "
                f"{len(self.components)} components, and shapes {expected}; got {found}."
            )
        if self.target.dtype != torch.int64 or (self.valid is not None and self.valid.dtype != torch.bool):
            raise ValueError("`ComponentPairs(target, valid)`: expected int64 and bool.")
        twice = [name for name, times in Counter(self.components).items() if times > 1]
        if twice or any(size < 0 for size in self.sizes) or sum(self.sizes) <= 0:
            raise ValueError(
                f"`ComponentPairs(components, sizes)`: expected every name once and numbers of parameters; names that "
                f"repeat: {twice[:8]}, sizes: {list(self.sizes[:8])}."
            )

    def _refuse(self, name: str, wrong: Tensor, sign: bool) -> None:
        if wrong.any():
            places = [(self.components[at[0]], *at[1:]) for at in wrong.nonzero()[:4].tolist()]
            raise ValueError(
                f"`ComponentPairs({name})`: expected finite numbers{' >= 0' if sign else ''}; "
                f"{int(wrong.sum())} are not, the first at (component, query, ...) {places}."
            )


def component_rows(known: Sequence[str], names: Sequence[str], call: str) -> list[int]:
    """Rows of the named components; ``call`` is how the caller's code reads, with {} for the names.

    Raises:
        ValueError: If a name is not known (the nearest ones are given), none is given, or one twice.
    """
    place = {name: row for row, name in enumerate(known)}
    unknown = [name for name in names if name not in place]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=3, cutoff=0.0)
        raise ValueError(
            f"`{call.format(unknown[:8])}`: expected names of components; the nearest to {unknown[0]!r} are {near}."
        )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`{call.format(list(names)[:8])}`: expected at least one component, each once.")
    return [place[name] for name in names]


def _sources(dots: ComponentDots, sources: Mapping[Id, Id] | Sequence[Id]) -> list[Id]:
    """One source id for each query."""
    call = "ComponentPairs.from_dots(sources)"
    if isinstance(sources, str) or not isinstance(sources, Mapping | Sequence):
        raise ValueError(f"`{call}`: expected a mapping or a sequence of ids, got {type(sources).__name__}.")
    if not isinstance(sources, Mapping):
        if len(sources) != len(dots.query_ids):
            raise ValueError(
                f"`{call}`: expected one id for each of {len(dots.query_ids)} queries, got {len(sources)}."
            )
        return list(sources)
    missing = [query for query in dots.query_ids if query not in sources]
    if missing:
        raise ValueError(
            f"`{call}`: expected the id of the true source of every query; {len(missing)} of {len(dots.query_ids)} "
            f"have none, such as {missing[:8]}."
        )
    return [sources[query] for query in dots.query_ids]


def _columns(dots: ComponentDots) -> tuple[Tensor, list[int]]:
    """Column [p] of each pair among those of its query, and the number of candidates of each query."""
    pairs = [tuple(pair) for pair in dots.pairs.tolist()]
    twice = [pair for pair, times in Counter(pairs).items() if times > 1]
    if twice:
        named = [(dots.query_ids[query], dots.train_ids[row]) for query, row in twice[:8]]
        raise ValueError(
            f"`ComponentPairs.from_dots(dots)`: expected every pair once; {len(twice)} come more than once, such as "
            f"(query, candidate) {named}."
        )
    counts = [0] * len(dots.query_ids)
    columns = []
    for query, _ in pairs:
        columns.append(counts[query])
        counts[query] += 1
    empty = [name for name, count in zip(dots.query_ids, counts, strict=True) if count == 0]
    if empty or not counts:
        raise ValueError(
            f"`ComponentPairs.from_dots(dots)`: expected candidates for every query; {len(empty)} of {len(counts)} "
            f"have none, such as {empty[:8]}."
        )
    return torch.tensor(columns), counts


def _target(dots: ComponentDots, wanted: Sequence[Id], rows: Tensor, valid: Tensor) -> Tensor:
    place = {name: row for row, name in enumerate(dots.train_ids)}
    named = list(zip(dots.query_ids, wanted, strict=True))
    unknown = [pair for pair in named if pair[1] not in place]
    if unknown:
        raise ValueError(
            f"`ComponentPairs.from_dots(sources)`: expected ids of recorded training examples; {len(unknown)} of "
            f"{len(named)} are not in the pool, such as (query, source) {unknown[:8]}. Pass the true sources as "
            "`must_include` to the filter that finds the candidates, and ids of the same type as there."
        )
    hits = (rows == torch.tensor([place[source] for source in wanted], device=rows.device)[:, None]) & valid
    lost = [pair for pair, found in zip(named, hits.any(1).tolist(), strict=True) if not found]
    if lost:
        raise ValueError(
            f"`ComponentPairs.from_dots(sources)`: expected the true source among the candidates of its query; "
            f"{len(lost)} of {len(named)} are not, such as (query, source) {lost[:8]}. Pass the true sources as "
            "`must_include` to the filter that finds the candidates."
        )
    return hits.long().argmax(1)
