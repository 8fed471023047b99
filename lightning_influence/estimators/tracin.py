"""TracIn: what the steps of a training did to a query's loss, summed over its checkpoints."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

from lightning_influence.estimators.component_dots import ComponentDots
from lightning_influence.estimators.scores import Scores
from lightning_influence.store import Store

Rates: TypeAlias = float | Mapping[str, float]
RATES = ("next", "last")
RATES_FILE = "learning_rates"


@runtime_checkable
class HasPath(Protocol):
    """A `Store`, or the `Record` of a callback."""

    path: Path


Recorded: TypeAlias = str | Path | HasPath


@dataclass(frozen=True, eq=False)
class TracIn:
    """TracInCP: ``Σ_k η_k δ(i, j)`` over recorded checkpoints k ([SP] section 1, Pruthi et al. 2020).

    To first order, a step of gradient descent on the training example i at checkpoint k lowers the loss of the query j
    by η_k δ(i, j), η_k being the learning rate and δ the inner product of their gradients there. Score > 0: training on
    the example lowered the query's loss. Steps between the checkpoints are taken to be like those at them; multiply by
    the number of times that an example is stepped on between two checkpoints, over the batch size, for an estimate in
    units of the loss. It holds for SGD: momentum and Adam move otherwise.

    Sums are float64. All weighted sums are inner products too, of the gradients at all checkpoints laid end to end and
    scaled by the roots of the rates, so that `dots` has cosines and self-influence (the squares).

    Attributes:
        summed: Σ_k η_kc δ_kc for each component c: `Scores` for all pairs, `ComponentDots` for candidates. `Scores` of
            sums over components have no components.
        rates: η_k of each checkpoint by component.
        checkpoints: Where the parameters came from.
    """

    summed: Scores | ComponentDots
    rates: tuple[Mapping[str, float], ...]
    checkpoints: tuple[str | None, ...]

    @classmethod
    def from_records(
        cls,
        records: Sequence[Recorded],
        rates: Literal["next", "last"] | Sequence[Rates] = "next",
        *,
        name: str | None = None,
    ) -> TracIn:
        """Of the recordings of a `GradientDotRecorder`, or of other stores with `Scores` or `ComponentDots`.

        Args:
            records: ``recorder.records``, or the paths of stores; at least one, each once.
            rates: ``"next"``, the learning rates in force when a checkpoint was recorded, or ``"last"``, those of the
                step before, as the stores have them; or for each recording a rate, or rates by component.
            name: Under which the stores keep the numbers; None: ``"component_dots"`` or ``"scores"``.

        Raises:
            ValueError: If there are no records, rates are missing, negative, no numbers or all 0, or the recordings are
                of different queries, training examples, pairs, components, data or losses (the difference is named).
            StoreError: If a path is none of a store, or a file is damaged.
        """
        stores = _stores(records)
        asked = _asked(rates, len(stores))
        first: dict[str, Any] = {}
        total = _Total()
        for k, store in enumerate(stores):
            found = _read(store, name)
            labels = _labels(found, store)
            first = first or labels
            _check_alike(first, labels, stores[0], store)
            total.add(found, asked[k] if asked is not None else _recorded_rates(store, cast(str, rates)), store)
        return total.result()

    def scores(self, components: Sequence[str] | None = None, per_component: bool = False) -> Scores:
        """Of every query with every training example, [q, n], or [c, q, n] when kept per component.

        Args:
            components: Names of some components; None for all.
            per_component: Whether to keep components apart.

        Raises:
            ValueError: If candidates were recorded and not all pairs (see `dots`), or a component is unknown, or they
                were not recorded apart.
        """
        whole = self.summed if isinstance(self.summed, Scores) else _all_pairs(self.summed)
        if components is None and per_component == (whole.components is not None):
            return whole
        if whole.components is None:
            raise ValueError(
                f"`TracIn.scores(components={components}, per_component={per_component})`: the recordings hold sums "
                "over components. Record with per_component=True."
            )
        names = list(whole.components if components is None else components)
        values = whole.total(names)
        if not per_component:
            return replace(whole, values=values, components=None)
        rows = [whole.components.index(name) for name in names]
        return replace(whole, values=whole.values[rows], components=tuple(names))

    def dots(self) -> ComponentDots:
        """Of the recorded pairs, by component, with the same sums of the self-products.

        Raises:
            ValueError: If the recordings are `Scores` of all pairs, which have no self-products (see `scores`).
        """
        if isinstance(self.summed, Scores):
            raise ValueError(
                "`TracIn.dots()`: the recordings hold scores of all pairs without self-products; expected those of a "
                "GradientDotRecorder with candidates. Take `scores()`."
            )
        return self.summed


class _Total:
    """Running sums in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rates: list[dict[str, float]] = []
        self._checkpoints: list[str | None] = []
        self._last: Scores | ComponentDots | None = None

    def add(self, found: Scores | ComponentDots, rates: Rates, store: Store) -> None:
        names = found.components
        if names is None:
            stored = tuple(component.name for component in store.components)
            by_name = _by_component(rates, stored, store)
            if len(set(by_name.values())) > 1:
                raise ValueError(
                    f"`TracIn.from_records(records)`: {store.path} holds sums over components, whose learning rates "
                    f"differ ({_some(by_name)}). Record with per_component=True, or pass one rate for each recording."
                )
            weights = torch.tensor(next(iter(by_name.values())), dtype=torch.float64)
        else:
            by_name = _by_component(rates, names, store)
            weights = torch.tensor([by_name[name] for name in names], dtype=torch.float64)
        for key, values in _numbers(found).items():
            part = values.double() * weights.reshape(-1, *[1] * (values.dim() - 1))
            part = part.reshape(values.shape)
            self._sums[key] = part if key not in self._sums else self._sums[key].add_(part)
        self._rates.append(by_name)
        self._checkpoints.append(found.checkpoint)
        self._last = found

    def result(self) -> TracIn:
        assert self._last is not None
        if not any(rate > 0 for rates in self._rates for rate in rates.values()):
            raise ValueError(
                "`TracIn.from_records(rates=...)`: every learning rate is 0, so nothing was learned at these "
                "checkpoints. Expected recordings of components that are trained, or rates of your own."
            )
        count = f"{len(self._checkpoints)} checkpoint{'s' * (len(self._checkpoints) > 1)}"
        places = ", ".join(place for place in self._checkpoints if place is not None)
        labels = {"formula": f"sum over checkpoints of learning rate x {self._last.formula}"}
        summed = replace(self._last, **self._sums, **labels, checkpoint=f"{count}: {places}" if places else count)  # type: ignore[arg-type]
        return TracIn(summed, tuple(self._rates), tuple(self._checkpoints))


def _numbers(found: Scores | ComponentDots) -> dict[str, Tensor]:
    """What is summed; component first where components are apart."""
    keys = ("values",) if isinstance(found, Scores) else ("dots", "query_squares", "train_squares")
    return {key: getattr(found, key) for key in keys}


def _labels(found: Scores | ComponentDots, store: Store) -> dict[str, Any]:
    """Everything that has to be the same in all recordings, in words."""
    labels: dict[str, Any] = {
        "kind": type(found).__name__,
        "components": found.components,
        "queries": found.query_ids,
        "training examples": found.train_ids,
        "formula": found.formula,
        "reduction": found.reduction,
        "the data of `train`": store.settings.get("train"),
        "the data of `queries`": store.settings.get("queries"),
    }
    if isinstance(found, ComponentDots):
        labels |= {"sizes of the components": found.sizes, "pairs": list(map(tuple, found.pairs.tolist()))}
    return labels


def _check_alike(first: dict[str, Any], other: dict[str, Any], origin: Store, store: Store) -> None:
    lines = [_difference(key, first.get(key), other[key]) for key in other if first.get(key) != other[key]]
    if lines:
        raise ValueError(
            f"`TracIn.from_records(records)`: {store.path} differs from {origin.path} in {'; '.join(lines)}. Expected "
            "recordings of one GradientDotRecorder at several checkpoints of one training."
        )


def _difference(key: str, expected: Any, other: Any) -> str:
    if not isinstance(expected, tuple | list) or not isinstance(other, tuple | list):
        return f"{key} ({other!r}, there {expected!r})"
    if len(expected) != len(other):
        return f"the number of {key} ({len(other)}, there {len(expected)})"
    place = next(k for k, (a, b) in enumerate(zip(expected, other, strict=True)) if a != b)
    return f"{key} (number {place} is {other[place]!r}, there {expected[place]!r})"


def _stores(records: Sequence[Recorded]) -> list[Store]:
    if isinstance(records, str | Path) or not isinstance(records, Sequence) or not records:
        raise ValueError(
            f"`TracIn.from_records(records={records!r})`: expected at least one recording, such as `recorder.records` "
            "or `find_records(folder)`, or paths of stores."
        )
    paths = [Path(record.path if isinstance(record, HasPath) else record) for record in records]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"`TracIn.from_records(records)`: expected every recording once, these come again: {twice}.")
    return [Store.open(path) for path in paths]


def _read(store: Store, name: str | None) -> Scores | ComponentDots:
    contents = store.contents
    if (name or "component_dots") in contents["json"]:
        return ComponentDots.load(store, name or "component_dots")
    if (name or "scores") in contents["scores"]:
        return Scores.load(store, name or "scores")
    what = "neither 'component_dots' nor 'scores'" if name is None else f"neither products nor scores named {name!r}"
    raise ValueError(
        f"`TracIn.from_records(records)`: {store.path} holds {what}; expected a recording of a GradientDotRecorder. It "
        f"holds {contents}."
    )


def _asked(rates: Any, count: int) -> list[Rates] | None:
    """Rates of one's own, one for each recording; None: those of the stores."""
    if isinstance(rates, str):
        if rates not in RATES:
            raise ValueError(f"`TracIn.from_records(rates={rates!r})`: expected one of {RATES}, or rates.")
        return None
    if not isinstance(rates, Sequence) or len(rates) != count:
        got = f"{len(rates)}" if isinstance(rates, Sequence) else f"a {type(rates).__name__}"
        raise ValueError(
            f"`TracIn.from_records(rates=...)`: expected a rate, or a mapping by component, for each of {count} "
            f"recordings; got {got}."
        )
    return list(rates)


def _recorded_rates(store: Store, which: str) -> Mapping[str, float]:
    """As `GradientDotRecorder` writes them."""
    found = store.read_json(RATES_FILE) if RATES_FILE in store.contents["json"] else None
    if found is None or found.get(which) is None:
        reason = "has no learning rates" if found is None else f"does not know the {which} ones (resumed just there?)"
        other = "" if found is None else ", or rates='next'"
        raise ValueError(
            f"`TracIn.from_records(records)`: {store.path} {reason}. Pass `rates=[...]`, one for each recording{other}."
        )
    return cast(Mapping[str, float], found[which])


def _by_component(rates: Rates, names: Sequence[str], store: Store) -> dict[str, float]:
    call = f"TracIn.from_records(rates=...)`, {store.path}"
    found = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(names, rates)
    missing = [name for name in names if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], list(map(str, found)), n=3, cutoff=0.0)
        raise ValueError(
            f"`{call}: expected the rate of every component; {len(missing)} of {len(names)} have none, such as "
            f"{missing[0]!r}. The nearest that have are {near}."
        )
    wrong = {name: found[name] for name in names if not _is_rate(found[name])}
    if wrong:
        raise ValueError(f"`{call}: expected numbers >= 0, got {_some(wrong)}.")
    return {name: float(found[name]) for name in names}


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _some(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(list(values.items())[:3])


def _all_pairs(dots: ComponentDots) -> Scores:
    """[c, q, n], where every query met every training example."""
    q, n = len(dots.query_ids), len(dots.train_ids)
    if len({tuple(pair) for pair in dots.pairs.tolist()}) < q * n:
        raise ValueError(
            f"`TracIn.scores()`: {len(dots.pairs)} pairs of {q} queries and {n} training examples were recorded, not "
            f"all {q * n}. Take `dots()`: its `total()`, `cosine()` and `candidates()` are of the recorded pairs."
        )
    values = torch.empty(len(dots.components), q * n, dtype=dots.dots.dtype)
    values[:, dots.pairs[:, 0] * n + dots.pairs[:, 1]] = dots.dots
    return Scores(
        values=values.reshape(-1, q, n),
        query_ids=dots.query_ids,
        train_ids=dots.train_ids,
        formula=dots.formula,
        reduction=dots.reduction,
        components=dots.components,
        checkpoint=dots.checkpoint,
    )
