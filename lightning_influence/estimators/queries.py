"""What is asked of the queries, and how it is told in the labels of the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.sampling import Uniforms
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature.base import Curvature, loss_for

Loss: TypeAlias = ExampleLoss | Callable[[nn.Module, Any], Tensor] | None
Labels: TypeAlias = Literal["data", "sampled"]
Aggregate: TypeAlias = Literal["mean"] | None


def check_asked(call: str, labels: str, aggregate: str | None, *, bilinear: bool) -> None:
    """Refuse what no estimator does, and means where they are not the mean of the rows.

    Raises:
        ValueError: If ``labels`` or ``aggregate`` is none of the known ones, or there is no such mean.
    """
    if labels not in ("data", "sampled"):
        raise ValueError(f"`{call}(labels={labels!r})`: expected 'data' or 'sampled'.")
    if aggregate not in (None, "mean"):
        raise ValueError(f"`{call}(aggregate={aggregate!r})`: expected None or 'mean'.")
    if aggregate is not None and not bilinear:
        raise ValueError(
            f"`{call}(aggregate={aggregate!r})`: scores are not linear in the query's gradient, so that those of a "
            "mean are not the mean of those. Expected None; average the rows of the scores instead."
        )


def asked(queries: ExampleLoader, labels: Labels, aggregate: Aggregate) -> tuple[str, str]:
    """What stands beside the formula in the labels of the scores; empty where nothing was asked for."""
    mean = f"mean loss of {queries.num_examples} queries" if aggregate else ""
    return "sampled query labels" * (labels == "sampled"), mean


def row_ids(queries: ExampleLoader, aggregate: Aggregate) -> tuple[int | str, ...]:
    """Ids of the rows of the scores."""
    return tuple(queries.ids) if aggregate is None else (aggregate,)


def check_supervised(model: nn.Module, loader: ExampleLoader, loss: Loss) -> None:
    """Refuse queries without a target: they have no loss.

    Raises:
        ValueError: Naming their ids.
    """
    found = loss_for(model, loader, loss)
    counts = ((ids, run_batch(found.supervised, batch, ids, loader.what)) for ids, batch in loader)
    silent = [k for ids, count in counts for k in ids[count.cpu() == 0].tolist()]
    if silent:
        raise ValueError(
            f"{len(silent)} of {loader.num_examples} queries have no supervised target (ids {silent[:8]}); expected "
            "at least one label other than -100 in each. Remove them, or check the label mask."
        )


def check_one_loss(call: str, model: nn.Module, pool: ExampleLoader, targets: ExampleLoader, loss: Loss) -> None:
    """Refuse targets whose labels ask for another loss than those of the pool, where none was given.

    Raises:
        ValueError: Naming both.
    """
    if loss is not None:
        return
    own, others = (type(loss_for(model, data, None)).__name__ for data in (pool, targets))
    if own != others:
        raise ValueError(
            f"`{call}(targets)`: by their labels, the pool is to be scored by {own} and the targets by {others}. "
            "Expected labels of one kind, which the model's head can score; or pass loss=, which scores both."
        )


def sampled_losses(loss: ExampleLoss, ids: Tensor, seed: int) -> Callable[[nn.Module, Any], Tensor]:
    """Losses of labels drawn from the model, the same for an id in any batch."""
    return lambda model, batch: loss.sampled_losses(model, batch, Uniforms(ids, seed))


def warn_of_flat(owner: str, query_loss: Loss, gradients: Mapping[str, Tensor]) -> None:
    """Warn of a measurement that autograd differentiates to 0 everywhere, as it does for signs and roundings."""
    if query_loss is not None and not any(bool(rows.any()) for rows in gradients.values()):
        warnings.warn(
            f"{owner}(query_loss=...): the gradient of every query is exactly 0, and so are its scores. Expected a "
            "measurement that changes with the weights; rounding, signs and thresholds have the derivative 0.",
            stacklevel=2,
        )


def warn_of_changed(call: str, curvature: Curvature, model: nn.Module, which: str = "the model") -> None:
    """Warn of a curvature that was fitted on other weights than the gradients are taken at."""
    odd = curvature.changed(model)
    if odd:
        warnings.warn(
            f"{call}: {type(curvature).__name__} was fitted on other weights than {which} has now ({len(odd)} "
            f"parameters differ, such as {odd[:3]}), so that gradients at one place are weighed by the curvature at "
            "another. Fit it again, or load the weights of the fit; go on only if another place is what is meant.",
            stacklevel=3,
        )


def damping_label(curvature: Curvature) -> str | None:
    """Description of a curvature's damping, for the labels of scores."""
    settings = curvature.settings()
    if settings.get("damping") is not None:
        return f"{settings['damping']}"
    return f"{settings['damping_share']} x mean eigenvalue" if "damping_share" in settings else None


def inverse_length(squares: Tensor) -> Tensor:
    """1 / length; 0 for an example without any gradient, whose scores are 0 then."""
    return torch.where(
        squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), torch.zeros_like(squares)
    )
