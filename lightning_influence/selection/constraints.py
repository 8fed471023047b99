"""What a selection must keep to besides its budget, checked against a pool before any row is picked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors, Id, few
from lightning_influence.selection.admission import Admission
from lightning_influence.selection.budget import Budget, TokenBudget, resolve_budget
from lightning_influence.selection.row_data import of_rows

Source: TypeAlias = int | str
Sources: TypeAlias = Sequence[Source] | Mapping[Id, Source] | Callable[[Id], Source]
Quota: TypeAlias = int | Mapping[Source, int]
Costs: TypeAlias = Sequence[float] | Mapping[Id, float] | Callable[[Id], float]
Duplicates: TypeAlias = Literal["allow", "first", "refuse"]

_CALL = "Constraints"
_ROWS = "in a sequence by position, or a mapping or function by id"


@dataclass(frozen=True, eq=False)
class Constraints:
    """What every selection rule can be told to keep to.

    A rule makes its usual choice among the rows that leave every constraint within reach: it picks freely until the
    budget that is left is just what the minimums still ask for. Combinations that no selection can meet are refused
    before the first pick. The first picks of a larger budget are those of a smaller one as long as there is no minimum
    and the budget is in rows; minimums and budgets in tokens look ahead to the end of the budget.

    >>> from lightning_influence.selection import TopK
    >>> rule, values = TopK(), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    >>> mixed = Constraints(sources=["web", "web", "web", "books", "books"], min_per_source=1, exclude=[0])
    >>> rule.select(values, budget=3, constraints=mixed).ids
    (1, 2, 3)

    Attributes:
        must_include: Ids that are picked first, in this order; the rule chooses the others knowing them.
        exclude: Ids that are not picked.
        sources: Source of each row: a sequence by position, or a mapping or function by id.
        min_per_source: Fewest rows of every source, or of each source that a mapping names.
        max_per_source: Most rows of every source, or of each source that a mapping names.
        duplicates: "allow"; "first": of equal rows only that with the smallest id, or the one that must be included;
            "refuse": equal rows are an error that names them. Excluded rows do not count.
        duplicate_keys: Rows with equal keys are equal: a sequence by position, or a mapping or function by id. None:
            rows with equal values and features, to the last bit.
        costs: Cost > 0 of each row, given like the sources: rows are compared by their gain per cost.
        stop_if_negative_gain: Stop before the first row that is predicted to raise the target loss; after it only the
            rows that minimums ask for are taken. Budgets are then upper limits. The gain of submodlib's word is what
            the loss falls by, the negative of `Selection.gains`; rows that change nothing do not stop it.

    Raises:
        ValueError: If a word or number does not fit, or an id is both included and excluded, or a maximum is below
            a minimum; from `SelectionRule.select`, if an id or source is not in the pool, data is missing for a row, or
            no selection of that pool within the budget can meet all of it; the reason is named.
    """

    must_include: Sequence[Id] = ()
    exclude: Sequence[Id] = ()
    sources: Sources | None = field(default=None, repr=False)
    min_per_source: Quota | None = None
    max_per_source: Quota | None = None
    duplicates: Duplicates = "allow"
    duplicate_keys: Any = field(default=None, repr=False)
    costs: Costs | None = field(default=None, repr=False)
    stop_if_negative_gain: bool = False

    def __post_init__(self) -> None:
        for name in ("must_include", "exclude"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        excluded = set(self.exclude)
        both = [name for name in self.must_include if name in excluded]
        if both:
            raise ValueError(
                f"`{_CALL}(must_include, exclude)`: expected an id in one of them only. In both: {few(both)}."
            )
        for name in ("min_per_source", "max_per_source"):
            _check_quota(name, getattr(self, name), self.sources)
        _check_bounds(self.min_per_source, self.max_per_source)
        if self.duplicates not in get_args(Duplicates):
            raise ValueError(
                f"`{_CALL}(duplicates={self.duplicates!r})`: expected one of {list(get_args(Duplicates))}."
            )
        if self.duplicate_keys is not None and self.duplicates == "allow":
            raise ValueError(
                f"`{_CALL}(duplicate_keys=...)`: expected duplicates='first' or 'refuse' to go with the keys."
            )
        for name in ("sources", "duplicate_keys", "costs"):
            given: Any = getattr(self, name)
            if given is not None and (isinstance(given, str) or not (callable(given) or hasattr(given, "__getitem__"))):
                raise ValueError(f"`{_CALL}({name}={given!r})`: expected one for each row, {_ROWS}.")
        if not isinstance(self.stop_if_negative_gain, bool):
            raise ValueError(
                f"`{_CALL}(stop_if_negative_gain={self.stop_if_negative_gain!r})`: expected True or False."
            )

    def admission(self, call: str, pool: Factors, budget: Budget) -> Admission:
        """The constraints on one pool.

        Args:
            call: How the caller's code reads, for the error text.
            pool: The rows.
            budget: In rows, as a share of them, or in tokens.

        Raises:
            ValueError: See above.
        """
        first = _places(call, "must_include", self.must_include, pool)
        allowed = torch.ones_like(pool.values, dtype=torch.bool)
        allowed[_places(call, "exclude", self.exclude, pool)] = False
        self._drop_duplicates(call, pool, allowed, first)
        groups, minimum, maximum = self._quotas(call, pool, allowed, first)
        if not allowed.any():
            raise ValueError(
                f"`{call}(constraints)`: expected rows that may be picked; all {len(pool)} are excluded, or of sources "
                "whose maximum is 0."
            )
        if isinstance(budget, TokenBudget):
            sizes = _sizes(call, pool, budget, allowed)
            room = budget.room(int(sizes.sum()))
        else:
            sizes, room = None, resolve_budget(budget, len(pool), call)
        admission = Admission(
            pool,
            allowed,
            room,
            sizes=None if sizes is None else sizes.clamp(min=1),
            groups=groups,
            minimum=minimum,
            maximum=maximum,
            first=first,
            costs=_costs(call, pool, self.costs, allowed),
            stops=self.stop_if_negative_gain,
        )
        if sizes is None:
            counted = torch.bincount(groups[allowed], minlength=len(maximum)).minimum(maximum)
            self._check_rows(call, room, max(room - admission.slack, 0), int(counted.sum()))
        else:
            _check_tokens(call, room, room - admission.slack, int(sizes[first].sum()), int(sizes[allowed].min()))
        return admission

    def of_part(self, ids: Sequence[Id], closed: Iterable[Id]) -> Constraints:
        """The same for some rows of a pool for which they were settled (`admission`).

        Args:
            ids: Of these rows: all of ``must_include``, and of every source as many as it must have.
            closed: Ids of the rows that may not be picked, for whatever reason; repeated rows are among them.
        """
        change: dict[str, Any] = {}
        present = set() if self.sources is None else set(of_rows(_CALL, ids, self.sources))
        for name in ("min_per_source", "max_per_source"):
            quota = getattr(self, name)
            if isinstance(quota, Mapping):  # a source that is named must be there
                change[name] = {source: number for source, number in quota.items() if source in present}
        first, rows = set(self.must_include), set(ids)
        exclude = [name for name in closed if name in rows and name not in first]
        return replace(self, exclude=exclude, duplicates="allow", duplicate_keys=None, **change)

    def _drop_duplicates(self, call: str, pool: Factors, allowed: Tensor, first: list[int]) -> None:
        """Takes rows that repeat another off the allowed ones."""
        if self.duplicates == "allow":
            return
        keys = (
            _feature_keys(call, pool) if self.duplicate_keys is None else of_rows(call, pool.ids, self.duplicate_keys)
        )
        seen: dict[Any, int] = {}
        required, repeated = set(first), []
        in_order = pool.id_ranks.argsort()
        others = [row for row in in_order[allowed[in_order]].tolist() if row not in required]
        for row in first + others:
            kept = seen.setdefault(keys[row], row)
            if kept == row:
                continue
            if row in required:
                twins = [pool.ids[kept], pool.ids[row]]
                raise ValueError(
                    f"`{call}(constraints)`: must_include names rows that are equal ({few(twins)}), and duplicates="
                    f"{self.duplicates!r}. Expected only one of them to be included."
                )
            repeated.append(row)
        if repeated and self.duplicates == "refuse":
            raise ValueError(
                f"`{call}(constraints)`: {len(repeated)} of {len(pool)} rows repeat another: "
                f"{few([pool.ids[row] for row in repeated])}. Expected none with duplicates='refuse'; exclude them, or "
                "take duplicates='first'."
            )
        allowed[repeated] = False

    def _quotas(self, call: str, pool: Factors, allowed: Tensor, first: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Number of each row's source [n], and the least and most rows of each source; one of none is not allowed."""
        given = [0] * len(pool) if self.sources is None else of_rows(call, pool.ids, self.sources)
        where = {source: k for k, source in enumerate(dict.fromkeys(given))}
        groups = torch.tensor([where[source] for source in given], device=allowed.device)
        bounds = []
        for name, default in (("min_per_source", 0), ("max_per_source", len(pool))):
            quota = getattr(self, name)
            unknown = [source for source in quota if source not in where] if isinstance(quota, Mapping) else []
            if unknown:
                raise ValueError(
                    f"`{call}(constraints)`: {name} names sources that no row of the pool has: {unknown[:5]}. Expected "
                    f"some of {list(where)[:8]}."
                )
            bounds.append([_of_source(quota, source, default) for source in where])
        minimum, maximum = (torch.tensor(bound, device=allowed.device) for bound in bounds)
        counts = torch.bincount(groups[allowed], minlength=len(where)).tolist()
        required = torch.bincount(groups[first], minlength=len(where)).tolist()
        for source, k in where.items():
            low, high = bounds[0][k], bounds[1][k]
            if counts[k] < low:
                raise ValueError(
                    f"`{call}(constraints)`: source {source!r} must have at least {low} rows, but only {counts[k]} of "
                    "its rows may be picked. Lower min_per_source, or exclude fewer."
                )
            if required[k] > high:
                raise ValueError(
                    f"`{call}(constraints)`: must_include names {required[k]} rows of source {source!r}, which may "
                    f"have at most {high}. Raise max_per_source, or include fewer."
                )
        allowed &= maximum[groups] > 0
        return groups, minimum, maximum

    def _check_rows(self, call: str, budget: int, needed: int, possible: int) -> None:
        if needed > budget:
            raise ValueError(
                f"`{call}(constraints)`: must_include and min_per_source ask for {needed} rows, more than the budget "
                f"of {budget}. Raise the budget, or ask for fewer."
            )
        if possible < budget and not self.stop_if_negative_gain:
            raise ValueError(
                f"`{call}(constraints)`: only {possible} rows may be picked, fewer than the budget of {budget}: the "
                "others are excluded, repeat others, or are beyond max_per_source. Expected a budget of at most "
                f"{possible}."
            )


def _check_tokens(call: str, budget: int, needed: int, first: int, smallest: int) -> None:
    if first > budget:
        raise ValueError(
            f"`{call}(constraints)`: the rows of must_include have {first} tokens, more than the budget of {budget}. "
            "Raise the budget, or include fewer."
        )
    if needed > budget:
        raise ValueError(
            f"`{call}(constraints)`: must_include and min_per_source ask for at least {needed} tokens, more than the "
            f"budget of {budget}. Raise the budget, or ask for fewer."
        )
    if smallest > budget and not first:
        raise ValueError(
            f"`{call}(budget)`: the budget of {budget} tokens is smaller than the smallest row, which has {smallest}. "
            f"Expected at least {smallest}."
        )


def _ids(name: str, given: Any) -> tuple[Id, ...]:
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ValueError(f"`{_CALL}({name}={given!r})`: expected a list of ids.")
    ids = tuple(given.tolist() if hasattr(given, "tolist") else given)
    twice = [one for one, times in Counter(ids).items() if times > 1]
    if twice:
        raise ValueError(f"`{_CALL}({name})`: expected each id once. More than once: {few(twice)}.")
    return ids


def _check_quota(name: str, quota: Any, sources: Any) -> None:
    if quota is None:
        return
    if sources is None:
        raise ValueError(f"`{_CALL}({name}=...)`: expected sources, the source of each row, to go with it.")
    for number in quota.values() if isinstance(quota, Mapping) else [quota]:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"`{_CALL}({name}={quota!r})`: expected an int >= 0, or such a number by source.")


def _check_bounds(low: Quota | None, high: Quota | None) -> None:
    named = [source for quota in (low, high) if isinstance(quota, Mapping) for source in quota]
    for source in named or ["any"]:
        least, most = _of_source(low, source, 0), _of_source(high, source, None)
        if most is not None and least > most:
            raise ValueError(
                f"`{_CALL}(min_per_source, max_per_source)`: expected a maximum that is not below the minimum. Source "
                f"{source!r} has at least {least} and at most {most}."
            )


def _of_source(quota: Quota | None, source: Source, default: Any) -> Any:
    if isinstance(quota, Mapping):
        return quota.get(source, default)
    return default if quota is None else quota


def _places(call: str, name: str, ids: Sequence[Id], pool: Factors) -> list[int]:
    unknown = [one for one in ids if one not in pool.rows]
    if unknown:
        raise ValueError(f"`{call}(constraints)`: {name} names rows that are not in the pool: {few(unknown)}.")
    return [pool.rows[one] for one in ids]


def _sizes(call: str, pool: Factors, budget: TokenBudget, allowed: Tensor) -> Tensor:
    """Tokens of each row [n], int64; at least 1 for those that may be picked."""
    if budget.counts is None:
        raise ValueError(
            f"`{call}(budget={budget!r})`: expected counts, the tokens of each row, to spend a budget in tokens on. "
            f"Pass TokenBudget(..., counts=...), {_ROWS}."
        )
    sizes = torch.as_tensor(of_rows(call, pool.ids, budget.counts))
    if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool or sizes.dim() != 1:
        raise ValueError(f"`{call}(budget={budget!r})`: expected counts that are ints, one for each row.")
    sizes = sizes.to(allowed.device, torch.long)
    _check_all(call, "budget", "a count of at least one token", sizes >= 1, allowed, pool)
    return sizes.clamp(min=0)


def _costs(call: str, pool: Factors, given: Costs | None, allowed: Tensor) -> Tensor | None:
    if given is None:
        return None
    costs = torch.as_tensor(of_rows(call, pool.ids, given), dtype=torch.float64).to(allowed.device)
    _check_all(call, "constraints", "a finite cost above 0", costs.isfinite() & (costs > 0), allowed, pool)
    return torch.where(allowed, costs, costs[allowed].max())


def _check_all(call: str, argument: str, what: str, good: Tensor, allowed: Tensor, pool: Factors) -> None:
    bad = [pool.ids[row] for row in (allowed & ~good).nonzero().flatten().tolist()]
    if bad:
        raise ValueError(
            f"`{call}({argument})`: expected {what} for each row that may be picked. {len(bad)} of {len(pool)} have "
            f"none: {few(bad)}. Exclude them."
        )


def _feature_keys(call: str, pool: Factors) -> list[bytes]:
    """Equal for rows of equal value and features."""
    if pool.features is None:
        raise ValueError(
            f"`{call}(constraints)`: expected features or duplicate_keys to tell which rows are equal; equal values "
            "alone do not make them so."
        )
    keys = []
    for start in range(0, len(pool), 4096):
        rows = slice(start, start + 4096)
        parts = [pool.values[rows, None], pool.features[rows]]
        table = torch.cat([(part + 0).contiguous().view(torch.uint8) for part in parts], dim=1)  # + 0: -0.0 is 0.0
        keys += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in table.cpu().numpy()]
    return keys
