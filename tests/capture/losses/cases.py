"""Losses with a model and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_influence.capture import (
    ClassificationLoss,
    ExampleLoss,
    FunctionLoss,
    LanguageModelLoss,
    ModuleLoss,
    RegressionLoss,
)
from lightning_influence.capture.sampling import Uniforms, sample_categories
from tests.capture import models
from tests.capture.models import Mlp, class_losses, points, text


class Own(Mlp):
    """Defines its loss itself, on batches that no one else understands."""

    def example_losses(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self(batch["points"]), batch["classes"], reduction="none")

    def sampled_example_losses(self, batch: dict[str, Any], uniforms: Uniforms) -> Tensor:
        logits = self(batch["points"])
        labels = sample_categories(logits.detach(), uniforms(torch.zeros(len(logits))))
        return F.cross_entropy(logits, labels, reduction="none")


def own_batch(n: int) -> dict[str, Any]:
    inputs, labels = points(n)
    return {"points": inputs, "classes": labels, "note": "kept"}


def binary(n: int) -> tuple[Tensor, Tensor]:
    inputs, labels = points(n)
    return inputs, labels % 2


def targets(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (points(n)[0], torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)).double())


def classified_text(n: int) -> dict[str, Tensor]:
    return {**text(n), "labels": torch.arange(n) % 3}


@dataclass(frozen=True)
class LossCase:
    """A loss, a model, a batch of n examples, and the class of what resolves to it without being named."""

    name: str
    loss: ExampleLoss
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    samples: bool = True

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def take(batch: Any, rows: list[int]) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t[rows], batch)


CASES = [
    LossCase("causal", LanguageModelLoss(), models.gpt2, text),
    LossCase("causal-mean", LanguageModelLoss("mean"), models.llama, text),
    LossCase("masked", LanguageModelLoss(shift=False), models.bert, text),
    LossCase("encoder-decoder", LanguageModelLoss(encoder_decoder=True), models.t5, text),
    LossCase("classes", ClassificationLoss(), Mlp, points),
    LossCase("two-classes", ClassificationLoss(), lambda: Mlp(nn.Linear(3, 1)), binary),
    LossCase("two-classes-flat", ClassificationLoss(), lambda: Mlp(nn.Linear(3, 1), nn.Flatten(0)), binary),
    LossCase("classified-text", ClassificationLoss(), models.bert_classifier, classified_text),
    LossCase("regression", RegressionLoss(), lambda: Mlp(nn.Linear(3, 2)), targets(2)),
    LossCase("regression-flat", RegressionLoss(), lambda: Mlp(nn.Linear(3, 1)), targets()),
    LossCase("module", ModuleLoss(), Own, own_batch),
    LossCase("function", FunctionLoss(class_losses), Mlp, points, samples=False),
]
SAMPLING = [case for case in CASES if case.samples]
