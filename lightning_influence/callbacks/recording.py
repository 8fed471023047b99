"""What a recorder works with while it records: the batches, the losses and the other ranks of a running Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.callbacks.progress import Advance, progress
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
        """This rank's part of some ids: every ``world_size``-th, none twice.

        Raises:
            ValueError: If there are fewer ids than ranks.
        """
        if len(ids) < self.trainer.world_size:
            raise ValueError(
                f"{self.name}: {len(ids)} examples cannot be shared out over {self.trainer.world_size} ranks. Expected "
                "at least one for each."
            )
        return list(ids[self.trainer.global_rank :: self.trainer.world_size])

    def progress(self, total: int) -> AbstractContextManager[Advance]:
        """A bar of ``total`` batches below the Trainer's own; the context gives the function that advances it."""
        return progress(self.trainer, total, f"{self.name}, step {self.step}")

    def examples(
        self,
        data: Any,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        advance: Advance | None = None,
    ) -> ExampleLoader:
        """Examples in batches as ``training_step`` gets them: in its dtypes, on its device, through its hooks.

        Args:
            data: Map-style dataset or DataLoader; a loader is only read, never iterated.
            batch_size: Examples per batch; None takes the loader's.
            indices: Positions to visit; None for all.
            advance: Told of every batch.
        """
        plain = ExampleLoader(data, batch_size, indices=indices)

        def collate(rows: list[Any]) -> Batch:
            if advance is not None:
                advance(1)
            return self._placed(plain.collate_fn(rows))

        return ExampleLoader(plain, collate_fn=collate)

    def loss(self, examples: ExampleLoader, loss: Any = None) -> ExampleLoss:
        """The per-example loss that fits some examples, computed in the precision of the training.

        Args:
            examples: Their first batch is looked at.
            loss: What `resolve_loss` takes.
        """
        _, batch = next(iter(examples))
        return self.in_precision(resolve_loss(self.model, batch, loss))

    def in_precision(self, loss: ExampleLoss) -> ExampleLoss:
        """The loss, computed in the precision of the training."""
        return PrecisionLoss(loss, self.trainer.precision_plugin.forward_context)

    def sum_over_ranks(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every tensor by its sum over the ranks, in place; the names are the same on all of them."""
        if self.trainer.world_size > 1:
            for tensor in tensors.values():
                there = tensor.to(self.trainer.strategy.root_device)
                tensor.copy_(self.trainer.strategy.reduce(there, reduce_op="sum"))

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

    def where_supervised(self) -> ExampleLoss:
        """The wrapped loss's, in the same precision."""
        return PrecisionLoss(self._loss.where_supervised(), self._precision)

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
    """In float32 or float64; what is no tensor goes on to the capture, which refuses it in words."""
    return losses if getattr(losses, "dtype", torch.float64) == torch.float64 else losses.float()
