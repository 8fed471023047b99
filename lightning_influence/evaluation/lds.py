"""The linear datamodeling score: sums of scores against training on random subsets (Park et al. 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.estimators.factors import Id, few
from lightning_influence.estimators.scores import Scores
from lightning_influence.evaluation.agreement import AgreementLine, AgreementReport
from lightning_influence.evaluation.retraining import plain_ids
from lightning_influence.metrics.rank_agreement import MEASURES, Rank, percentile_interval, resampled


def linear_datamodeling_score(
    scores: Scores | Mapping[str, Scores],
    subsets: Sequence[Iterable[Id]],
    losses: Tensor | Sequence[Any],
    *,
    kind: Rank = "spearman",
    seed: int = 0,
    resamples: int = 1000,
) -> AgreementReport:
    """LDS: rank correlation over subsets of the loss of a target with the additive estimate of it, mean over targets.

    The estimate for a subset S is -Σ_{i∈S} score_qi: score > 0 means that the example lowers the loss (Park et al.
    2023, section 2.3). Subsets and losses come from `random_subsets` and ``Retraining(...).losses(subsets, seeds)``,
    whose training gives a loss for every target.

    Args:
        scores: [q, n] of an estimator, or of several by name, with the same queries.
        subsets: Ids of the training examples of each subset.
        losses: [subsets, q], or [subsets, seeds, q], whose mean over seeds is taken; a tensor or nested lists.
        kind: ``"spearman"`` as in the paper, or ``"kendall"``.
        seed: Of the draws for the intervals, which draw targets and subsets again and again.
        resamples: Number of draws.

    Returns:
        A report of the measure ``lds``; each line has the rank correlation of every target.

    Raises:
        ValueError: If shapes or queries do not fit, an example of a subset has no score or stands there twice, or a
            number is NaN.

    >>> scores = Scores(torch.tensor([[3.0, 2.0, 1.0]]), ("q",), (0, 1, 2), "dot", "sum")
    >>> report = linear_datamodeling_score(scores, [[0, 1], [0, 2], [1, 2]], torch.tensor([[0.1], [0.2], [0.9]]))
    >>> report.line("scores").measures
    {'lds': 1.0}
    """
    call = "linear_datamodeling_score"
    named = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    members = [plain_ids(subset) for subset in subsets]
    table = torch.as_tensor(losses).cpu().double()
    measured = table.mean(1) if table.dim() == 3 else table
    if kind not in ("spearman", "kendall"):
        raise ValueError(f"`{call}(kind={kind!r})`: expected 'spearman' or 'kendall'.")
    _check(call, named, members, measured)
    return AgreementReport(
        tuple(_line(name, found, members, measured.mT, kind, seed, resamples) for name, found in named.items()),
        len(members),
    )


def subset_estimates(scores: Scores, subsets: Sequence[Iterable[Id]]) -> Tensor:
    """Additive estimate of each query's loss after training on each subset, up to a constant, float64 [q, subsets]."""
    column = {name: k for k, name in enumerate(scores.train_ids)}
    inside = torch.zeros(len(subsets), len(column), dtype=torch.float64)
    for row, subset in enumerate(subsets):
        inside[row, [column[name] for name in subset]] = 1
    return -scores.total().cpu().double() @ inside.mT


def _line(
    name: str, scores: Scores, subsets: list[tuple[Id, ...]], measured: Tensor, kind: Rank, seed: int, resamples: int
) -> AgreementLine:
    estimates, measure = subset_estimates(scores, subsets), MEASURES[kind]
    per_target = measure(estimates, measured)
    draws = resampled(measure, estimates, measured, seed, resamples)  # [resamples, q], over other subsets
    q = len(per_target)
    targets = torch.randint(q, (resamples, q), generator=torch.Generator().manual_seed(seed + 1))
    spread = draws.gather(1, targets).mean(1)
    return AgreementLine(
        name,
        {"lds": float(per_target.mean())},
        {"lds": percentile_interval(spread)},
        dict(zip(scores.query_ids, per_target.tolist(), strict=True)),
    )


def _check(call: str, named: Mapping[str, Scores], subsets: list[tuple[Id, ...]], measured: Tensor) -> None:
    if not named or len(subsets) < 2:
        raise ValueError(f"`{call}`: expected scores of an estimator and at least two subsets. Got {len(subsets)}.")
    for subset in subsets:
        twice = [name for name, times in Counter(subset).items() if times > 1]
        if twice:
            raise ValueError(f"`{call}(subsets)`: expected each example of a subset once. Repeated: {few(twice)}.")
    for name, scores in named.items():
        expected = (len(subsets), len(scores.query_ids))
        if tuple(measured.shape) != expected:
            raise ValueError(
                f"`{call}(losses)`: expected [subsets, queries] = {list(expected)} for {name!r}, with or without seeds "
                f"between. Got {list(measured.shape)}."
            )
        known = set(scores.train_ids)
        away = sorted({k for subset in subsets for k in subset if k not in known}, key=str)
        if away:
            raise ValueError(f"`{call}(subsets)`: {few(away)} have no score of {name!r}.")
        if scores.total().isnan().any():
            raise ValueError(f"`{call}(scores)`: {name!r} has NaN; expected numbers.")
