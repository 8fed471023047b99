"""Budget and constraints for the rows of a data set, settled before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.unfit import run_batch
from lightning_influence.estimators.factors import Factors, Id
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import Budget, TokenBudget, TokenKind, resolve_budget
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.pool_audit import PoolAudit
from lightning_influence.selection.row_data import by_position, check_positions, of_rows


@dataclass(frozen=True, eq=False)
class Terms:
    """What a selection has to keep to, with all that it needs to know about the rows.

    Attributes:
        budget: In rows as an int, or in tokens with their counts.
        constraints: None when there are none.
        rows: About how many rows will be picked.
    """

    budget: int | TokenBudget
    constraints: Constraints | None
    rows: int


def settle_terms(
    call: str,
    budget: Budget,
    constraints: Constraints | None,
    rule: SelectionRule,
    rows: ExampleLoader,
    loss: ExampleLoss,
    audit: PoolAudit,
) -> Terms:
    """The terms for the rows of a pool that can be used.

    Rows are equal if their data are, unless keys are given; rows to exclude may be among those that cannot be used.

    Args:
        call: How the caller's code reads, for the error text.
        budget: Of the caller.
        constraints: Of the caller.
        rule: That will choose.
        rows: That can be used.
        loss: Which says where the targets are.
        audit: Of the whole pool.

    Raises:
        ValueError: If no selection can meet them (`Constraints`), tokens cannot be counted, or what is given by
            position is of more rows than the data set has.
    """
    for argument, known in _given(budget, constraints, rule).items():
        check_positions(f"{call}({argument})", known, len(rows.dataset))  # type: ignore[arg-type]
    if isinstance(budget, TokenBudget) and budget.counts is None:
        budget = replace(budget, counts=token_counts(call, rows, loss, budget.of))
    if constraints is not None:
        usable = set(rows.ids)
        gone = set(range(len(rows.dataset))) - usable  # type: ignore[arg-type]
        constraints = replace(constraints, exclude=[name for name in constraints.exclude if name not in gone])
        if constraints.duplicates != "allow" and constraints.duplicate_keys is None:
            keys = {row: row for row in rows.ids} | dict(zip(audit.duplicates, audit.originals, strict=True))
            constraints = replace(constraints, duplicate_keys=keys)
    n = rows.num_examples
    settled = budget if isinstance(budget, TokenBudget) else resolve_budget(budget, n, call)
    if constraints is not None or isinstance(settled, TokenBudget):
        pool = Factors(torch.zeros(n, dtype=torch.float64), None, None, tuple(rows.ids))
        rule.admission(call, pool, settled, Constraints() if constraints is None else constraints)
    return Terms(settled, constraints, expected_rows(settled, rows.ids))


def _given(budget: Budget, constraints: Constraints | None, rule: SelectionRule) -> dict[str, int]:
    """For how many rows each argument brings something by position."""
    found = {name: getattr(constraints, name, None) for name in ("sources", "duplicate_keys", "costs")}
    counted = {name: by_position(data) for name, data in found.items()}
    return {f"rule={rule!r}": rule.known_rows, **counted, "budget": by_position(getattr(budget, "counts", None))}


def expected_rows(budget: int | TokenBudget, ids: Sequence[Id]) -> int:
    """About how many rows a budget is good for: with tokens, as many as there would be of mean length."""
    if isinstance(budget, int):
        return budget
    counts = of_rows("TokenBudget", ids, budget.counts)
    total = int(sum(counts))
    return min(max(1, round(budget.room(total) * len(counts) / total)), len(counts))


def in_numbers(budget: int | TokenBudget, ids: Sequence[Id]) -> int | TokenBudget:
    """The same for any part of the pool: a share of its tokens becomes a number of them."""
    if isinstance(budget, int) or isinstance(budget.tokens, int):
        return budget
    total = sum(max(0, count) for count in of_rows("TokenBudget", ids, budget.counts))
    return replace(budget, tokens=budget.room(total))


def token_counts(call: str, rows: ExampleLoader, loss: ExampleLoss, of: TokenKind) -> dict[Id, int]:
    """Tokens of each row by id: those with a target, or all that are not padding.

    Raises:
        ValueError: If the batches do not say which tokens there are.
    """
    counts: dict[Id, int] = {}
    for ids, batch in rows:
        count = loss.supervised if of == "supervised" else partial(_all_tokens, call, loss)
        found = run_batch(count, batch, ids, rows.what)
        counts |= dict(zip(ids.tolist(), found.tolist(), strict=True))
    return counts


def _all_tokens(call: str, loss: ExampleLoss, batch: Any) -> Tensor:
    mask = loss.position_mask(batch)
    if mask is not None:
        return mask.sum(1)
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise ValueError(
            f"`{call}(budget)`: expected batches with an 'attention_mask' or 'input_ids' [n, t] to count all tokens of "
            "a row. Pass TokenBudget(..., counts=...), or count of='supervised' ones."
        )
    return torch.full((len(tokens),), tokens.shape[1])
