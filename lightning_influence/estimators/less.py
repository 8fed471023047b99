"""LESS: the influence of Adam's steps, summed over the checkpoints of a warm-up (Xia et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_influence.estimators.scores import Scores
from lightning_influence.estimators.tracin import HasPath, Recorded, TracIn
from lightning_influence.store import Store

RATE_FILE = "mean_learning_rate"


def less_scores(records: Sequence[Recorded], rates: Sequence[float] | None = None) -> Scores:
    """``Σ_k η̄_k cos(∇ℓ_q, Γ_i)`` over recorded checkpoints k, [q, n]; η̄_k is the mean learning rate before k.

    The choice of LESS then takes the mean over the queries of a subtask and the largest of the subtasks::

        scores = less_scores(recorder.records)
        selection = select_by_scores(scores, budget=0.05, across="max", targets={"algebra": range(5), ...})

    Args:
        records: ``recorder.records`` of a `LESSRecorder`, or paths of stores with `Scores`; at least one, each once.
        rates: A rate for each recording; None takes those that were recorded.

    Raises:
        ValueError: If there are no records, a rate is missing or negative, all are 0, or the recordings are of
            different queries, training examples, data or settings (the difference is named).
        StoreError: If a path is none of a store, or a file is damaged.
    """
    given = [_recorded_rate(record) for record in records] if rates is None else list(rates)
    found = TracIn.from_records(records, given).scores()
    return replace(found, formula=found.formula.replace("learning rate", "mean learning rate"))


def _recorded_rate(record: Recorded) -> float:
    store = Store.open(record.path if isinstance(record, HasPath) else record)
    rate = store.read_json(RATE_FILE)["mean"] if RATE_FILE in store.contents["json"] else None
    if rate is None:
        raise ValueError(
            f"`less_scores(records)`: {store.path} has no mean learning rate: it is no recording of a LESSRecorder, or "
            "no step was seen before it, as with optimizers that are stepped past Lightning. Pass `rates=[...]`, one "
            "for each recording."
        )
    return float(rate)
