"""How many rows a budget stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from lightning_influence.estimators.factors import Id

TokenKind: TypeAlias = Literal["supervised", "total"]
Counts: TypeAlias = Sequence[int] | Mapping[Id, int] | Callable[[Id], int]


@dataclass(frozen=True, eq=False)
class TokenBudget:
    """A budget in tokens: rows are picked while one that fits is left, and the budget is never exceeded.

    A row that does not fit any more is passed over for smaller ones, so the first picks of a larger budget need not be
    those of a smaller one.

    Attributes:
        tokens: Number of tokens as an int >= 1, or a share in (0, 1] of those of the pool, rounded down.
        of: Which tokens count: those with a target ("supervised"; of classification and regression one a row), or all
            that are not padding ("total"). Where the counts are given, they are what is counted.
        counts: Tokens of each row: a sequence by position, or a mapping or function by id. `select_training_data` and
            `DataSelector` count by themselves when None.

    Raises:
        ValueError: If a number or word does not fit.
    """

    tokens: int | float
    of: TokenKind = "supervised"
    counts: Counts | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        call, tokens = "TokenBudget", _plain(self.tokens)
        if tokens is None or tokens <= 0 or (isinstance(tokens, float) and not tokens <= 1):
            raise ValueError(
                f"`{call}(tokens={self.tokens!r})`: expected a number of tokens as an int >= 1, or a share in (0, 1] "
                "of those of the pool."
            )
        object.__setattr__(self, "tokens", tokens)
        if self.of not in get_args(TokenKind):
            raise ValueError(f"`{call}(of={self.of!r})`: expected one of {list(get_args(TokenKind))}.")
        counts: Any = self.counts
        if counts is not None and (isinstance(counts, str) or not (callable(counts) or hasattr(counts, "__getitem__"))):
            raise ValueError(
                f"`{call}(counts={type(counts).__name__})`: expected the tokens of each row, in a sequence by "
                "position, or a mapping or function by id."
            )

    def room(self, total: int) -> int:
        """Number of tokens, of a pool that has ``total``."""
        if isinstance(self.tokens, int):
            return self.tokens
        return int(self.tokens * total + 1e-9)  # 0.29 * 100 is a little below 29


Budget: TypeAlias = int | float | TokenBudget


def check_budget(budget: object, call: str = "check_budget") -> int | float:
    """Checks a budget before the size of the pool is known.

    Args:
        budget: A number of rows as an int >= 1, or a share of the pool as a float in (0, 1]. 1 is one row, 1.0 is
            the whole pool. numpy's numbers count as their plain kinds.
        call: How the caller's code reads, for the error text.

    Returns:
        The budget as a plain int or float.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(budget, bool):
        raise ValueError(_refusal(budget, call, "True and False are no numbers of rows."))
    if isinstance(budget, Integral):
        if budget < 1:
            raise ValueError(_refusal(budget, call, "A selection needs at least one row."))
        return int(budget)
    if not isinstance(budget, Real):
        raise ValueError(_refusal(budget, call, f"A {type(budget).__name__} is neither."))
    share = float(budget)
    if not 0 < share <= 1:
        whole = share > 1 and share.is_integer()
        raise ValueError(
            _refusal(
                budget,
                call,
                f"Write {int(share)} for {int(share)} rows." if whole else "As a float it is a share of the pool.",
            )
        )
    return share


def resolve_budget(budget: object, pool_size: int, call: str = "resolve_budget") -> int:
    """Number of rows, 1 to ``pool_size``, that a budget stands for; shares are rounded to the nearest row.

    >>> resolve_budget(0.05, 270)
    14

    Args:
        budget: As in `check_budget`.
        pool_size: Rows to choose from.
        call: How the caller's code reads, for the error text.

    Raises:
        ValueError: If the budget is not one, exceeds the pool, or is a share that rounds to 0 rows.
    """
    checked = check_budget(budget, call)
    if isinstance(checked, int):
        if checked > pool_size:
            raise ValueError(_refusal(budget, call, f"The pool has {pool_size} rows; pass 1.0 to take all of them."))
        return checked
    rows = int(checked * pool_size + 0.5)
    if rows == 0:
        raise ValueError(
            _refusal(budget, call, f"Of a pool of {pool_size} rows this share is 0 rows; pass 1 to take one.")
        )
    return rows


def _plain(number: object) -> int | float | None:
    """A number without numpy's clothes; None for what is no number."""
    if isinstance(number, bool) or not isinstance(number, Real):
        return None
    return int(number) if isinstance(number, Integral) else float(number)


def _refusal(budget: object, call: str, hint: str) -> str:
    return f"`{call}(budget={budget!r})`: expected an int >= 1 or a fraction in (0, 1]. {hint}"
