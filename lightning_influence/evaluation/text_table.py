"""Tables of text, as reports are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_influence.metrics.intervals import Interval


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the head first, with columns of equal width and a rule below the head.

    >>> print(aligned([["name", "mean"], ["a", "0.5"]]))
    name | mean
    -----|-----
    a    | 0.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in [padded[0], rule, *padded[1:]])


def number(value: float | None, interval: Interval | None = None) -> str:
    """Three significant digits at least, with the interval where it is known.

    >>> number(0.98765, (0.9, 1.0)), number(0.00123), number(None)
    ('0.988 (0.900 to 1.000)', '0.00123', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    if interval is None or not all(map(math.isfinite, interval)):
        return _short(value)
    return f"{_short(value)} ({_short(interval[0])} to {_short(interval[1])})"


def _short(value: float) -> str:
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
