"""Scores that look at the training example alone: its loss and its length, the baselines that ask no query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import ExampleLoader, ExampleLoss
from lightning_influence.capture.batches import to_device
from lightning_influence.capture.contexts import evaluating
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.unfit import run_batch
from lightning_influence.curvature.base import loss_for
from lightning_influence.estimators.base import Loss
from lightning_influence.estimators.scores import Scores

Count: TypeAlias = Literal["supervised", "all"]


class RowScore(ABC):
    """One number for each training example, the same for every query, in the call shape of the estimators."""

    formula: str

    def __init__(
        self, model: nn.Module, loss: Loss = None, *, batch_size: int | None = None, progress: bool = True
    ) -> None:
        self.model = model
        self.loss = loss
        self.batch_size = batch_size
        self.progress = progress

    @abstractmethod
    def _values(self, loss: ExampleLoss, batch: Any) -> Tensor:
        """[n] of one batch."""

    def score(self, queries: Any, train: Any) -> Scores:
        """The number of every training example, in one row for each query, [q, n].

        Args:
            queries: Map-style dataset or DataLoader, of which only the ids are taken; None for one row ``"any"``.
            train: Map-style dataset or DataLoader.

        Raises:
            ValueError: If the data is empty, or a number is not finite (ids are named).
        """
        names: tuple[int | str, ...] = ("any",) if queries is None else tuple(ExampleLoader(queries).ids)
        loader = ExampleLoader(train, self.batch_size, what=TRAIN)
        loss, found = loss_for(self.model, loader, self.loss), []
        device = next(self.model.parameters()).device
        with evaluating(self.model), torch.no_grad():
            for ids, batch in tqdm(loader, desc=type(self).__name__, delay=3, leave=False, disable=not self.progress):
                values = run_batch(partial(self._values, loss), to_device(batch, device), ids, loader.what)
                values = values.detach().cpu()
                bad = ids[~values.isfinite()]
                if len(bad):
                    raise ValueError(
                        f"`{type(self).__name__}.score(train)`: the loss of {len(bad)} of {len(ids)} examples is not "
                        f"finite (ids {bad[:8].tolist()}). Remove them, or check their inputs and labels."
                    )
                found.append(values)
        values = torch.cat(found).expand(len(names), -1).clone()
        return Scores(values, names, tuple(loader.ids), self.formula, loss.reduction)


class LossScore(RowScore):
    """Loss of each training example: the hard ones first. The negative of the values puts the easy ones first.

    Args:
        model: The model. It is run in evaluation mode, and left as it was.
        loss: Per-example loss; None resolves it.
        batch_size: Examples per batch; None takes the loader's, or 32.
        progress: Whether to show a progress bar when it takes more than a few seconds.
    """

    formula = "loss of the training example"

    def _values(self, loss: ExampleLoss, batch: Any) -> Tensor:
        return loss.losses(self.model, batch)


class LengthScore(RowScore):
    """Number of positions (tokens) of each training example: the long ones first. The model is not run.

    Args:
        model: Tells the loss where none is given.
        count: ``"supervised"`` positions, that have a label, or ``"all"`` that belong to the example.
        loss: Per-example loss, which knows them; None resolves it.
        batch_size: Examples per batch; None takes the loader's, or 32.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Raises:
        ValueError: If ``count`` is neither; from `score`, if positions of all are asked and the batches have none.
    """

    def __init__(self, model: nn.Module, count: Count = "supervised", loss: Loss = None, **options: Any) -> None:
        super().__init__(model, loss, **options)
        if count not in get_args(Count):
            raise ValueError(f"`LengthScore(count={count!r})`: expected one of {list(get_args(Count))}.")
        self.count = count
        self.formula = f"number of {count} positions of the training example"

    def _values(self, loss: ExampleLoss, batch: Any) -> Tensor:
        if self.count == "supervised":
            return loss.supervised(batch).float()
        mask = loss.position_mask(batch)
        if mask is None:
            raise ValueError(
                "`LengthScore(count='all')`: the batches have no attention mask [n, t] that tells which positions "
                "belong to an example. Expected one, or count='supervised'."
            )
        return mask.sum(1).float()
