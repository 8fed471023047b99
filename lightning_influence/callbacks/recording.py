"""What a recorder works with while it records: the batches, the losses and the other ranks of a running Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.callbacks.progress import progress
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.losses import Batch, ExampleLoss, resolve_loss
from lightning_influence.capture.sampling import Uniforms

Result = TypeVar("Result")
Trigger = Literal["checkpoint", "fit_end"]


@dataclass(frozen=True)
class Recording:
    """One recording under way, on one rank.

    Attributes:
        trainer: The running Trainer.
        model: The LightningModule itself, never a strategy's wrapper: that would run the strategy's collectives.
        step: Number of optimizer steps taken.
        trigger: ``"checkpoint"`` or ``"fit_end"``.
        checkpoint: The checkpoint file with these weights, where it is known.
        folder: Where rank 0 writes; it gets its final name when everything is written.
        name: The recorder's name.
    """

    trainer: Trainer
    model: LightningModule
    step: int
    trigger: Trigger
    checkpoint: str | None
    folder: Path
    name: str

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that writes."""
        return self.trainer.is_global_zero

    def shard(self, ids: Sequence[int]) -> list[int]:
        """This rank's part of some ids: every ``world_size``-th, none twice, possibly none at all."""
        return list(ids[self.trainer.global_rank :: self.trainer.world_size])

    @contextmanager
    def examples(
        self, data: Any, batch_size: int | None = None, indices: Sequence[int] | None = None, passes: int = 1
    ) -> Iterator[ExampleLoader]:
        """Examples in batches as ``training_step`` gets them: in its dtypes, on its device, through its hooks.

        Args:
            data: Map-style dataset or DataLoader; a loader is only read, never iterated.
            batch_size: Examples per batch; None takes the loader's.
            indices: Positions to visit; None for all.
            passes: How often the loader will be iterated, for the progress bar.
        """
        plain = ExampleLoader(data, batch_size, indices=indices)
        with progress(self.trainer, passes * len(plain), f"{self.name}, step {self.step}") as advance:

            def collate(rows: list[Any]) -> Batch:
                advance(1)
                return self._placed(plain.collate_fn(rows))

            yield ExampleLoader(plain, collate_fn=collate)

    def loss(self, examples: ExampleLoader, loss: Any = None) -> ExampleLoss:
        """The per-example loss that fits some examples, computed in the precision of the training.

        Args:
            examples: The first of them is looked at.
            loss: What `resolve_loss` takes.
        """
        _, batch = next(iter(ExampleLoader(examples, indices=examples.ids[:1])))
        return PrecisionLoss(resolve_loss(self.model, batch, loss), self.trainer.precision_plugin.forward_context)

    def on_each_rank(self, work: Callable[[], Result]) -> list[Result]:
        """Run something without collectives on every rank and give every rank all results, in rank order.

        An error on one rank is raised on all of them, before the others wait for that rank for ever.

        Raises:
            RankError: If the work failed on any rank.
        """
        outcome: list[Result] = []
        error = None
        try:
            outcome.append(work())
        except Exception as problem:
            error = problem
        raise_together(self.trainer, error)
        return [result for part in _all_gather(self.trainer, outcome) for result in part]

    def _placed(self, batch: Batch) -> Batch:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.model._on_before_batch_transfer(batch)
        return self.trainer.strategy.batch_to_device(batch, self.trainer.strategy.root_device)


class RankError(RuntimeError):
    """Work failed on some rank, and every rank knows."""


def raise_together(trainer: Trainer, error: Exception | None) -> None:
    """Raise on every rank if any of them has an error; every rank must come here once, with or without one.

    Raises:
        RankError: Naming every rank that failed; its cause is this rank's own error.
    """
    if isinstance(error, RankError):
        raise error  # every rank has come here with it before
    text = None if error is None else f"{type(error).__name__}: {error}"
    texts = _all_gather(trainer, text)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RankError("; ".join(failed) if trainer.world_size > 1 else str(text)) from error


def _all_gather(trainer: Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


class PrecisionLoss(ExampleLoss):
    """A per-example loss whose forward pass runs in the Trainer's precision, and nothing else does.

    With autocast around the influence mathematics too, its sums would silently be taken in half precision.

    Args:
        loss: The loss.
        precision: Makes the context of a forward pass.
    """

    def __init__(self, loss: ExampleLoss, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self._loss = loss
        self._precision = precision
        self.reduction = loss.reduction

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]."""
        with self._precision():
            return _at_least_float(self._loss.losses(model, batch))

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]."""
        with self._precision():
            return _at_least_float(self._loss.sampled_losses(model, batch, uniforms))

    def batch_size(self, batch: Batch) -> int:
        """Number of examples n."""
        return self._loss.batch_size(batch)

    def position_mask(self, batch: Batch) -> Tensor | None:
        """Bool [n, t] or None."""
        return self._loss.position_mask(batch)

    def supervised(self, batch: Batch) -> Tensor:
        """Number of targets of each example, [n]."""
        return self._loss.supervised(batch)


def _at_least_float(losses: Tensor) -> Tensor:
    return losses if losses.dtype == torch.float64 else losses.float()
