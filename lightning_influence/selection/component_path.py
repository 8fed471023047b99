"""What a greedy choice of components returns: every step, and the set that did best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

Direction: TypeAlias = Literal["forward", "backward"]

TIE = 1e-12  # objectives are means of numbers of size 1 in float64: what differs by less is equal up to rounding


@dataclass(frozen=True)
class ComponentSelection:
    """Components that were chosen; iterating gives their names, so that it can be passed as ``components=``.

    Attributes:
        names: In the order in which they were added; in that of the model where others were removed.
        score: The objective with these components.
        share: Share of the parameters that they hold.
        objective: What was maximised.

    >>> list(ComponentSelection(("layers.0.q_proj", "layers.3.up_proj"), 0.98, 0.04, "accuracy"))
    ['layers.0.q_proj', 'layers.3.up_proj']
    """

    names: tuple[str, ...]
    score: float
    share: float
    objective: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python, ready for JSON."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComponentSelection:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        return cls(**_fields(cls, values))


@dataclass(frozen=True)
class ComponentPath:
    """One component after another, added to none or removed from all.

    Attributes:
        components: Names of all components.
        order: Names of those that were added (forward) or removed (backward), step by step.
        scores: The objective after each step.
        shares: Share of the parameters after each step.
        whole: The objective with all components.
        objective: What was maximised.
        direction: ``"forward"`` or ``"backward"``.
    """

    components: tuple[str, ...]
    order: tuple[str, ...]
    scores: tuple[float, ...]
    shares: tuple[float, ...]
    whole: float
    objective: str
    direction: Direction

    def __len__(self) -> int:
        return len(self.order)

    def names(self, steps: int) -> tuple[str, ...]:
        """The components after so many steps."""
        if self.direction == "forward":
            return self.order[:steps]
        gone = set(self.order[:steps])
        return tuple(name for name in self.components if name not in gone)

    def after(self, steps: int) -> ComponentSelection:
        """The choice after so many steps.

        Raises:
            ValueError: If the path has fewer, or there is no component yet.
        """
        first = 1 if self.direction == "forward" else 0
        if isinstance(steps, bool) or not isinstance(steps, int) or not first <= steps <= len(self):
            raise ValueError(f"`ComponentPath.after(steps={steps!r})`: expected an int from {first} to {len(self)}.")
        score, share = (self.scores[steps - 1], self.shares[steps - 1]) if steps else (self.whole, 1.0)
        return ComponentSelection(self.names(steps), score, share, self.objective)

    @property
    def best(self) -> ComponentSelection:
        """The best step, and among equally good ones that with the fewest components.

        It did best on the queries that it was found on: `cross_validate_components` tells what it does on others.
        """
        scores = dict(enumerate(self.scores, start=1))
        if self.direction == "backward":
            scores[0] = self.whole
        tied = [step for step, score in scores.items() if score >= max(scores.values()) - TIE]
        return self.after(min(tied) if self.direction == "forward" else max(tied))

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python, ready for JSON."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComponentPath:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        return cls(**_fields(cls, values))


def _plain(record: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}


def _fields(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(record)}
    if set(values) != known:
        raise ValueError(
            f"`{record.__name__}.from_dict`: expected the fields that `to_dict` writes. Missing or unknown: "
            f"{', '.join(sorted(known ^ set(values)))}."
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
