"""How many rows a budget stands for."""

from __future__ import annotations

from numbers import Integral, Real


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


def _refusal(budget: object, call: str, hint: str) -> str:
    return f"`{call}(budget={budget!r})`: expected an int >= 1 or a fraction in (0, 1]. {hint}"
