"""Which rows of a pool may be picked next."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Factors


class Admission:
    """Says which rows may be picked now, so that at the end every constraint is met; takes note of each pick.

    A budget is an amount of room: each row takes its size, 1 where rows are counted, its tokens where tokens are. With
    c_1 <= c_2 <= ... the sizes of the rows left of a source that still misses m rows, these take at least
    D = c_1 + ... + c_m, and slack is the room that is left less the D of all sources. A row of a source that misses
    none may be picked if its size is at most slack, one of a source that misses m if it is at most slack + c_m, none
    of a source at its maximum. So every minimum stays in reach after every pick. Slack never grows, nor does
    slack + c_m: **a row that may not be picked now may never be picked again**, and a rule may forget it.

    Attributes:
        picks: Row numbers in the order in which they were taken.
        most: No more picks than this will be made.
        closings: How often other rows than the picks were closed.
        shares: Cost of each row as a share of the largest cost [n], float64; None without costs.

    Args:
        pool: The rows.
        allowed: Rows that may be picked at all [n], bool.
        room: In the units of the sizes.
        sizes: Of the rows [n], int64, at least 1; None: 1 for each row, and then all the room is to be filled.
        groups: Number of each row's source [n], int64; None: one source.
        minimum: Rows that each source must have [sources], int64; there must be as many.
        maximum: Rows that each source may have [sources], int64, at least the minimum.
        first: Rows that are picked before all others, in this order.
        costs: Of the rows [n], above 0.
        stops: Whether to stop before the first row that is predicted to raise the target loss. Only the rows that
            minimums ask for are taken after it.
    """

    def __init__(
        self,
        pool: Factors,
        allowed: Tensor,
        room: int,
        *,
        sizes: Tensor | None = None,
        groups: Tensor | None = None,
        minimum: Tensor | None = None,
        maximum: Tensor | None = None,
        first: Sequence[int] = (),
        costs: Tensor | None = None,
        stops: bool = False,
    ) -> None:
        none = torch.zeros(1, dtype=torch.long, device=allowed.device)
        self._pool, self._room, self._left = pool, room, allowed.clone()
        self._allowed, self._whole = allowed, room
        self._by_rows = sizes is None
        self._sizes = (none + 1).expand(len(allowed)) if sizes is None else sizes
        self._groups = none.expand(len(allowed)) if groups is None else groups
        self._missing = none.clone() if minimum is None else minimum.clone()
        self._spare = none + len(allowed) if maximum is None else maximum.clone()
        self._least, self._greatest, self._required = self._missing.clone(), self._spare.clone(), frozenset(first)
        self._demand, self._dearest = torch.zeros_like(self._missing), torch.zeros_like(self._missing)
        self._largest = int(self._sizes.max())
        self.most = min(len(allowed), room // int(self._sizes.min()))
        self.shares = None if costs is None else costs / costs.max()
        self._stops, self._stopped, self._shift = stops, False, pool.shift([]) if stops else None
        self.picks: list[int] = []
        self._first = deque(first)
        for group in self._missing.nonzero().flatten().tolist():
            self._measure(group)
        for row in first:
            self._account(row)
        self._limits, self.closings = self._new_limits(), 0
        self._close()

    @classmethod
    def of_rows(cls, pool: Factors, budget: int) -> Admission:
        """A number of rows and no constraint."""
        return cls(pool, torch.ones_like(pool.values, dtype=torch.bool), budget)

    @property
    def open(self) -> Tensor:
        """Rows that may be picked now [n], bool; not to be changed."""
        if not self._first:
            return self._open
        only = torch.zeros_like(self._open)
        only[self._first[0]] = True
        return only

    @property
    def optional(self) -> Tensor:
        """The same once those that come first are picked."""
        return self._open

    @property
    def more(self) -> bool:
        """Whether there is a row that may be picked now."""
        return bool(self._first) or self._count > 0

    @property
    def sizes(self) -> Tensor:
        """Room that each row takes [n], int64: 1, or its tokens; not to be changed."""
        return self._sizes

    @property
    def slack(self) -> int:
        """Room left beyond what minimums and the rows picked first ask for; negative where they ask too much."""
        return self._room - int(self._demand.sum())

    @property
    def short(self) -> bool:
        """Whether stopping now would break a minimum, or leave a budget of rows unfilled."""
        full = self._stopped or (self._stops and self._count == 0)  # a budget that may stop is an upper limit
        unfilled = self._by_rows and self._room > 0 and not full
        return bool(self._first) or unfilled or bool(self._missing.any())

    def is_open(self, row: int) -> bool:
        """Whether a row may be picked now."""
        return row == self._first[0] if self._first else bool(self._open[row])

    def per_cost(self, gains: Tensor, rows: Tensor | None = None) -> Tensor:
        """Gains [..., n], or of some rows, larger is better, per unit of cost.

        Losses, which come after all gains, stay as they are: otherwise the row that costs most would be preferred
        among those that do harm.
        """
        if self.shares is None:
            return gains
        shares = self.shares if rows is None else self.shares[rows]
        return torch.where(gains > 0, gains / shares, gains)

    def error_per_cost(self, errors: Tensor, rows: Tensor | None = None) -> Tensor:
        """By how much `per_cost` may be off where gains are off by ``errors`` [n], or those of some rows."""
        if self.shares is None:
            return errors
        return errors / (self.shares if rows is None else self.shares[rows])

    def take(self, row: int, gain: float | None = None) -> bool:
        """Picks an open row, unless its gain is the reason to stop.

        Args:
            row: Row number.
            gain: Change of the target loss that the rule predicts, negative where it falls; None: by the interactions
                of the pool ([IA] section 3.2, eq. 12).

        Returns:
            Whether it was picked.
        """
        assert self.is_open(row)
        if self._first:
            self._first.popleft()
        else:
            if self._stops and not self._stopped and (self._gain(row) if gain is None else gain) > 0:
                self._stopped = True
                self._refresh(row)
                if not self._open[row]:
                    return False
            self._account(row)
            self._refresh(row)
        if self._shift is not None:
            self._shift = self._shift + self._pool.shift([row])
        self.picks.append(row)
        return True

    def take_first(self) -> None:
        """Picks the rows that come before all others, for a rule that does not look at them."""
        while self._first:
            self.take(self._first[0])

    def walk(self, order: Iterable[int]) -> None:
        """Picks what may be picked in the order of a ranking of all rows."""
        self.take_first()
        for row in order:
            if not self.more:
                return
            if self.is_open(row):
                self.take(row)

    def spared(self, order: Iterable[int]) -> list[int]:
        """Which optional rows of an order can be left out for good, taken as they come.

        Those without which every minimum and the room can still be met by any choice among the others, and each of
        these stays open. So the first ones of the order go first, and a source keeps the last ones. The room counts as
        met where the smallest rows of every source, as many as it may have, come to it, or to what they had.

        Args:
            order: Numbers of optional rows, each once.
        """
        groups, sizes = self._groups.tolist(), self._sizes.tolist()
        left: dict[int, list[int]] = {}
        for row in self._open.nonzero().flatten().tolist():
            left.setdefault(groups[row], []).append(sizes[row])
        least, most = self._missing.tolist(), self._spare.tolist()
        for own in left.values():
            own.sort()
        demand, supply = int(self._demand.sum()), sum(sum(own[: most[group]]) for group, own in left.items())
        needed, gone = min(self._room, supply), []
        for row in order:
            group = groups[row]
            own = left[group]
            place = bisect_right(own, sizes[row]) - 1  # of equal ones the last, which costs least to delete
            dearer, less = (_without(own, place, count) for count in (least[group], most[group]))
            open_still = dearer == 0 or demand + dearer + self._largest <= self._room
            if len(own) > least[group] and supply + less >= needed and open_still:
                del own[place]
                demand, supply = demand + dearer, supply + less
                gone.append(row)
        return gone

    def exchangeable(self, rows: Sequence[int], place: int) -> Tensor:
        """Rows that may stand in for one of a whole selection, so that it keeps every constraint [n], bool.

        Args:
            rows: The selection, which keeps them all.
            place: Where the row to replace stands in it.
        """
        old = rows[place]
        if old in self._required:
            return torch.zeros_like(self._allowed)
        index, group = torch.tensor(rows, device=self._groups.device), self._groups[old]
        counts = torch.bincount(self._groups[index], minlength=len(self._least))
        joins = (counts < self._greatest) & (counts[group] > self._least[group])
        joins[group] = True
        room = self._whole - int(self._sizes[index].sum()) + self._sizes[old]
        return self._allowed & joins[self._groups] & (self._by_rows | (self._sizes <= room))

    def _gain(self, row: int) -> float:
        value = -float(self._pool.values[row])
        if self._pool.features is None:
            return value
        assert self._shift is not None
        own = self._pool.shift([row])
        return value + float((self._shift + 0.5 * own) @ self._pool.lifted([row])[0])

    def _account(self, row: int) -> None:
        group = int(self._groups[row])
        self._left[row] = False
        self._room -= int(self._sizes[row])
        self._spare[group] -= 1
        if self._missing[group] > 0:
            self._missing[group] -= 1
            self._measure(group)

    def _measure(self, group: int) -> None:
        """The smallest rows that a source's missing ones can be."""
        sizes = self._sizes[self._left & (self._groups == group)]
        smallest = sizes.topk(int(self._missing[group]), largest=False).values
        self._demand[group] = smallest.sum()
        self._dearest[group] = smallest.max() if len(smallest) else 0

    def _new_limits(self) -> Tensor:
        """Largest size that may be picked of each source; 0 for none."""
        others = 0 if self._stopped else self.slack
        limits = torch.where(self._missing > 0, self.slack + self._dearest, others)
        return torch.where(self._spare > 0, limits, 0).clamp(0, self._largest)

    def _refresh(self, row: int) -> None:
        """Brings the open rows up to date; passes over all rows only where a limit has changed."""
        limits = self._new_limits()
        if not torch.equal(limits, self._limits):
            self._limits = limits
            self.closings += 1
            self._close()
        elif not self._left[row]:
            self._open[row] = False
            self._count -= 1

    def _close(self) -> None:
        self._open = self._left & (self._sizes <= self._limits[self._groups])
        self._count = int(self._open.sum())


def _without(sizes: list[int], place: int, count: int) -> int:
    """By how much the sum of the ``count`` smallest of ascending sizes changes without the one at a place."""
    if place >= count:
        return 0
    return (sizes[count] if count < len(sizes) else 0) - sizes[place]
