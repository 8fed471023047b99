"""The model outputs that TRAK linearises: log-odds of what should come out (Park et al. 2023, section 3.3)."""

from __future__ import annotations

import copy
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture import ClassificationLoss, ExampleLoss, LanguageModelLoss
from lightning_influence.capture.losses.base import IGNORED, Batch, at_least_float, predictions, split_batch
from lightning_influence.capture.sampling import Uniforms


@runtime_checkable
class ModelOutput(Protocol):
    """An `ExampleLoss` whose ``losses`` are outputs f that should be large, with what they lack."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """f of each example, [n], attached to the graph."""
        ...

    def shortfall(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the derivative of the loss by f, [n]: the weight of an example in the training."""
        ...


class ClassMargin(ExampleLoss):
    """``log(p / (1 - p))`` of the label's probability p, for the batches of `ClassificationLoss`; 0 without one."""

    reduction = "log-odds"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]."""
        logits, labels = _logits(model, batch)
        return torch.where(labels != IGNORED, log_odds(logits, labels.clamp_min(0)), 0)

    def shortfall(self, model: nn.Module, batch: Batch) -> Tensor:
        """1 - p, [n]."""
        logits, labels = _logits(model, batch)
        return torch.where(labels != IGNORED, torch.sigmoid(-log_odds(logits, labels.clamp_min(0))), 0)

    def supervised(self, batch: Batch) -> Tensor:
        """1, or 0 for an example without a label, [n]."""
        return ClassificationLoss().supervised(batch)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """Always refused.

        Raises:
            ValueError: The output of a label that is not the example's has no use.
        """
        raise ValueError("ClassMargin: log-odds are those of the data's own labels; expected labels='data'.")


class TokenMargin(LanguageModelLoss):
    """The sum over a sequence's targets of ``log(p / (1 - p))``, p the token's probability; arguments as there."""

    _lacking = False

    def shortfall(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean of 1 - p over the targets, [n]; 0 without one."""
        twin = copy.copy(self)
        twin._lacking, twin.reduction = True, "mean"
        return twin.losses(model, batch)

    def _reduced(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        odds = log_odds(logits[mask], labels[mask])
        values = torch.sigmoid(-odds) if self._lacking else odds
        total = values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)
        return total if self.reduction == "sum" else total / mask.sum(1).clamp_min(1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p)) = z_y - log sum over the others of exp(z)``, [n, C] and [n] -> [n], in float32 at least.

    >>> log_odds(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1])).exp()
    tensor([0.5000])
    """
    logits = at_least_float(logits)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own[:, 0] - others.logsumexp(1)


def output_for(loss: ExampleLoss) -> ExampleLoss:
    """The output that belongs to a loss, or what was given if it is one.

    Raises:
        ValueError: If none is known.
    """
    if isinstance(loss, ModelOutput):
        return loss
    if isinstance(loss, ClassificationLoss):
        return ClassMargin()
    if isinstance(loss, LanguageModelLoss):
        reduction: Literal["sum", "mean"] = "mean" if loss.reduction == "mean" else "sum"
        return TokenMargin(reduction, loss.shift, encoder_decoder=loss.encoder_decoder)
    raise ValueError(
        f"`TRAK(loss={type(loss).__name__})`: log-odds are known for classes and tokens. Expected "
        "ClassificationLoss(), LanguageModelLoss(), or an ExampleLoss of outputs that should be large, with "
        "shortfall(model, batch) -> [n]."
    )


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [n, C], of two classes when the model gives one number, and labels int64 [n] within range."""
    inputs, labels = split_batch(batch)
    logits = predictions(model, inputs)
    labels = labels.reshape(-1).to(logits.device).long()
    logits = logits.reshape(len(labels), -1) if logits.dim() <= 2 else logits
    logits = F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits
    if logits.dim() != 2 or bool(((labels < 0) & (labels != IGNORED) | (labels >= logits.shape[-1])).any()):
        raise ValueError(
            f"ClassMargin: got logits {tuple(logits.shape)} for labels {sorted(set(labels.tolist()))[:8]}; expected "
            f"[n, C] and one label from 0 to C - 1 for each example, or {IGNORED} for none."
        )
    return logits, labels
