"""What each stage of a long run costs: timed, shown while it runs, and kept over runs that were stopped in between."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

EVERY = 30  # seconds between two lines


@dataclass(frozen=True)
class Cost:
    """Seconds of one stage over so many examples; the number of their tokens where it was counted."""

    stage: str
    seconds: float
    examples: int
    tokens: int | None = None


class Stage:
    """Counts examples and prints a line with the time that remains every now and then."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.started = self.shown = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    def advance(self, count: int) -> None:
        """So many examples more."""
        self.done += count
        now = time.perf_counter()
        if now - self.shown > EVERY:
            self.shown = now
            left = self.seconds * (self.total - self.done) / max(1, self.done)
            print(f"  {self.name}: {self.done} of {self.total} examples, {left:.0f} s left", flush=True)

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        """In place of a progress bar of the package, which knows how many visits there are."""
        self.total = total
        yield self.advance


class Stages:
    """All stages of a run; their costs are in ``costs.json`` of its folder."""

    def __init__(self, out: Path) -> None:
        self.file = out / "costs.json"
        known = json.loads(self.file.read_text()) if self.file.exists() else []
        self.costs = {cost["stage"]: Cost(**cost) for cost in known}

    @contextmanager
    def stage(self, name: str, examples: int, tokens: int | None = None, *, resumed: bool = False) -> Iterator[Stage]:
        """One stage. Of one that goes on where an earlier run stopped the time says nothing: it is not kept."""
        stage = Stage(name, examples)
        yield stage
        print(f"{name}: {stage.seconds:.1f} s{', the rest of an earlier run' if resumed else ''}", flush=True)
        if not resumed:
            self.costs[name] = Cost(name, stage.seconds, examples, tokens)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps([asdict(cost) for cost in self.costs.values()], indent=2) + "\n")
