"""Greedy choice of the components whose gradients find the true source of a query."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.selection.component_objective import OBJECTIVES, Objective
from lightning_influence.selection.component_pairs import ComponentPairs
from lightning_influence.selection.component_path import TIE, ComponentPath, Direction
from lightning_influence.selection.component_search import ComponentSearch


def greedy_components(
    pairs: ComponentPairs,
    objective: Objective = "accuracy",
    *,
    direction: Direction = "forward",
    patience: int | None = None,
    eps: float = 0.0,
    progress: bool = True,
) -> ComponentPath:
    """Adds components one by one, each time the one that helps most ([SP] section 3.3, Algorithm 2).

    Every component that is left is tried at every step, on the recorded products alone. What is maximised is the
    mean over queries of

    - ``"accuracy"``: 1 if cos_S of the true source is strictly above that of every other candidate, else 0;
    - ``"mrr"``: 1 / (1 + number of other candidates whose cos_S is not below that of the true source);
    - ``"similarity"``: the correlation (Pearson) between cos_S and cos_W over the query's candidates, W being all
      components. Where exactly one of the two is the same for all candidates, up to deviations of 1e-12, it counts
      as 0, and where both are as 1. It needs no true sources.

    Sums and objectives are float64. Objectives that differ by no more than 1e-12 are tied, and the component that
    comes first in ``pairs.components`` is taken. A path chosen on some queries flatters itself on these queries:
    see `cross_validate_components`.

    Args:
        pairs: Products of queries and candidates.
        objective: What to maximise.
        direction: ``"forward"`` adds to none until all are in, ``"backward"`` removes from all, each time the one
            whose removal leaves the best set, until one is left.
        patience: Stop after so many steps without a new best score; None: go to the end. For ``"backward"`` an equal
            score is a new best one, since it has fewer components.
        eps: ε of the cosine ([SP] section 3.1).
        progress: Whether to show a bar when it takes more than a few seconds.

    Raises:
        ValueError: If an argument is none of the above.
    """
    _check("greedy_components", objective, eps)
    if direction not in ("forward", "backward"):
        raise ValueError(f"`greedy_components(direction={direction!r})`: expected 'forward' or 'backward'.")
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise ValueError(f"`greedy_components(patience={patience!r})`: expected an int >= 1 or None.")
    search = ComponentSearch(pairs, objective, eps)
    whole = float(search.alone())
    forward = direction == "forward"
    order, scores = [], []
    last = _Last(-float("inf") if forward else whole, forward, patience)
    steps = len(pairs.components) - (not forward)
    for _ in tqdm(range(steps), desc="greedy_components", delay=3, leave=False, disable=not progress):
        tried = search.with_each() if forward else search.without_each()
        place = _best(tried, search.left)
        order.append(search.take(place))
        scores.append(float(tried[place]))
        if last.given_up(scores[-1]):
            break
    return ComponentPath(
        components=tuple(pairs.components),
        order=tuple(pairs.components[row] for row in order),
        scores=tuple(scores),
        shares=_shares(pairs, order, forward),
        whole=whole,
        objective=objective,
        direction=direction,
    )


def single_component_scores(pairs: ComponentPairs, objective: Objective = "accuracy", *, eps: float = 0.0) -> Tensor:
    """The objective of `greedy_components` with each component alone, float64 [c].

    Raises:
        ValueError: If the objective is unknown or ε negative.
    """
    _check("single_component_scores", objective, eps)
    return ComponentSearch(pairs, objective, eps).with_each()


def component_score(
    pairs: ComponentPairs, components: Iterable[str], objective: Objective = "accuracy", *, eps: float = 0.0
) -> float:
    """The objective of `greedy_components` with some components: the mean of `component_values`."""
    return float(component_values(pairs, components, objective, eps=eps).mean())


def component_values(
    pairs: ComponentPairs, components: Iterable[str], objective: Objective = "accuracy", *, eps: float = 0.0
) -> Tensor:
    """What `greedy_components` takes the mean of, query by query, with some components, float64 [q].

    Raises:
        ValueError: If the objective is unknown, ε negative, or a name not a component's (the nearest are given).
    """
    _check("component_values", objective, eps)
    return ComponentSearch(pairs, objective, eps).values(pairs.rows(components))


class _Last:
    """How long ago the best score was seen."""

    def __init__(self, best: float, forward: bool, patience: int | None) -> None:
        self.best = best
        self.margin = TIE if forward else -TIE
        self.patience = patience
        self.steps = 0

    def given_up(self, score: float) -> bool:
        better = score > self.best + self.margin
        self.best = max(self.best, score)
        self.steps = 0 if better else self.steps + 1
        return self.patience is not None and self.steps >= self.patience


def _best(scores: Tensor, rows: list[int]) -> int:
    """Place of the highest score; among tied ones that of the lowest row."""
    tied: list[int] = (scores >= scores.max() - TIE).nonzero().flatten().tolist()
    return min(tied, key=rows.__getitem__)


def _shares(pairs: ComponentPairs, order: list[int], forward: bool) -> tuple[float, ...]:
    """Share of the parameters after each step, from whole numbers."""
    total = sum(pairs.sizes)
    held, shares = 0 if forward else total, []
    for row in order:
        held += pairs.sizes[row] if forward else -pairs.sizes[row]
        shares.append(held / total)
    return tuple(shares)


def _check(call: str, objective: str, eps: float) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"`{call}(objective={objective!r})`: expected one of {', '.join(map(repr, OBJECTIVES))}.")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"`{call}(eps={eps!r})`: expected a number >= 0, such as 1e-8.")
