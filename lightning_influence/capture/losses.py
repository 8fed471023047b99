"""The loss of every single example of a batch, and the same loss with labels drawn from the model itself.

Influence is about the loss of one example, not the mean of a batch; the Fisher information needs labels that
the model itself would give ([MS] section 3.3). A loss object answers both, for the batch layout it knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.capture.batches import batch_size
from lightning_influence.capture.sampling import Uniforms, sample_categories

Batch: TypeAlias = Any
IGNORED = -100  # the label that Hugging Face and torch leave out of the loss


@runtime_checkable
class HasExampleLosses(Protocol):
    """A module that defines its own per-example loss."""

    def example_losses(self, batch: Batch) -> Tensor:
        """Loss of each example, [n]."""


class ExampleLoss(ABC):
    """Per-example losses of one batch layout.

    Attributes:
        reduction: How an example's own loss is formed, stated in everything that is written out.
    """

    reduction: str = "sum"
    samples: ClassVar[bool] = True

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each example, [n], attached to the graph."""

    @abstractmethod
    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """Loss of each example with labels sampled from the model's output distribution, [n].

        Args:
            model: The model; one forward pass is run.
            batch: The batch; its own labels are used for their positions only.
            uniforms: Source of randomness, fixed by example id and seed, so that an example gets the same
                labels in whatever batch it stands.
        """

    def batch_size(self, batch: Batch) -> int:
        """Number of examples n of a batch."""
        return batch_size(batch)

    def position_mask(self, batch: Batch) -> Tensor | None:
        """Positions that belong to an example, bool [n, t]; None when all do."""
        return None

    def supervised(self, batch: Batch) -> Tensor:
        """Number of targets of each example, int64 [n]; an example with none has no loss and no gradient."""
        return torch.ones(self.batch_size(batch), dtype=torch.int64)


class LanguageModelLoss(ExampleLoss):
    """Causal (or masked) language model: cross-entropy of each sequence over its labels that are not -100.

    Batches are mappings with ``input_ids`` (or ``inputs_embeds``), ``labels`` [n, t] and what else the model
    takes; the model returns logits [n, t, V], alone, as ``.logits`` or first in a tuple.

    Args:
        reduction: ``"sum"`` over a sequence's tokens ([MS] eq. 13), or ``"mean"``.
        shift: Whether position t predicts label t + 1, as causal models do.
    """

    def __init__(self, reduction: Literal["sum", "mean"] = "sum", shift: bool = True) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"LanguageModelLoss(reduction={reduction!r}): expected 'sum' or 'mean'.")
        self.reduction = reduction
        self.shift = shift

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: minus log-likelihood of the labels."""
        labels = self._targets(batch)
        return self._reduced(self._logits(model, batch), labels, labels != IGNORED)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same at the same positions, tokens drawn from the model's distribution there."""
        labels = self._targets(batch)
        logits = self._logits(model, batch)
        mask = labels != IGNORED
        # Counting supervised positions, not columns, makes the draw independent of padding and its side.
        draws = uniforms(mask.cumsum(1))[mask.to(uniforms.ids.device)].to(logits.device)
        labels = labels.clone()
        labels[mask] = sample_categories(_supervised(logits, mask).detach(), draws)
        return self._reduced(logits, labels, mask)

    def position_mask(self, batch: Batch) -> Tensor | None:
        """The attention mask, where there is a 2-D one."""
        mask = batch.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def supervised(self, batch: Batch) -> Tensor:
        """Number of labels that count, [n]."""
        return (self._targets(batch) != IGNORED).sum(1)

    def _targets(self, batch: Batch) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError(
                f"LanguageModelLoss: got a batch of type {type(batch).__name__}; expected a mapping with "
                "'labels' [n, t] (-100 where nothing is predicted) beside the model's inputs."
            )
        labels = cast(Tensor, batch["labels"])
        if not self.shift:
            return labels
        return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(model(**{key: value for key, value in batch.items() if key != "labels"}))
        if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(batch["labels"].shape):
            raise ValueError(
                f"LanguageModelLoss: the model gave logits of shape {tuple(logits.shape)} for labels "
                f"{tuple(batch['labels'].shape)}; expected [n, t, V]."
            )
        return logits

    def _reduced(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        tokens = _at_least_float(_supervised(logits, mask))
        each = F.cross_entropy(tokens, labels[mask], reduction="none")
        total = each.new_zeros(mask.shape).masked_scatter(mask, each).sum(1)
        return total if self.reduction == "sum" else total / mask.sum(1).clamp_min(1)


class ClassificationLoss(ExampleLoss):
    """Cross-entropy of one label per example.

    Batches are ``(x, y)`` or mappings with ``labels`` [n]; the model returns logits [n, C], or [n] / [n, 1]
    for two classes (then y is 0 or 1 and the loss is the binary one).
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: minus log-likelihood of the label."""
        inputs, labels = split_batch(batch)
        return self._loss(_call(model, inputs), labels)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same with a label drawn from the model's distribution."""
        inputs, labels = split_batch(batch)
        logits = _call(model, inputs)
        draws = uniforms(torch.zeros(len(labels), dtype=torch.int64)).to(logits.device)
        pairs = logits.detach()
        if _binary(logits):
            flat = pairs.reshape(-1)
            pairs = torch.stack([torch.zeros_like(flat), flat], dim=1)
        return self._loss(logits, sample_categories(pairs, draws))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.to(logits.device)
        if labels.dim() != 1 or logits.shape[0] != len(labels) or logits.dim() > 2:
            raise ValueError(
                f"ClassificationLoss: got logits {tuple(logits.shape)} for labels {tuple(labels.shape)}; expected "
                "[n, C] (or [n] for two classes) and [n]. For another layout define example_losses(batch)."
            )
        if _binary(logits):
            flat = _at_least_float(logits.reshape(-1))
            return F.binary_cross_entropy_with_logits(flat, labels.to(flat.dtype), reduction="none")
        return F.cross_entropy(_at_least_float(logits), labels.long(), reduction="none")


class RegressionLoss(ExampleLoss):
    """Half the squared error, summed over outputs: minus log-likelihood of a unit-variance Gaussian.

    Batches are ``(x, y)`` or mappings with ``labels``; predictions and y hold the same number of values for
    each example.
    """

    reduction = "half squared error, sum over outputs"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: 0.5 * sum (prediction - y)^2."""
        inputs, targets = split_batch(batch)
        return self._loss(_call(model, inputs), targets)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same with y drawn from N(prediction, 1)."""
        inputs, targets = split_batch(batch)
        predictions = _call(model, inputs)
        rows = predictions.detach().reshape(len(targets), -1)
        counters = torch.arange(rows.shape[1]).expand(rows.shape[0], -1)
        noise = torch.special.ndtri(uniforms(counters)).to(rows)
        return self._loss(predictions, rows + noise)

    def _loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if predictions.numel() != targets.numel() or predictions.shape[0] != targets.shape[0]:
            raise ValueError(
                f"RegressionLoss: got predictions {tuple(predictions.shape)} for targets {tuple(targets.shape)}; "
                "expected as many values for each example."
            )
        rows = _at_least_float(predictions).reshape(len(targets), -1)
        return 0.5 * (rows - targets.to(rows).reshape(len(targets), -1)).square().sum(1)


class ModuleLoss(ExampleLoss):
    """The module's own ``example_losses(batch) -> [n]``.

    For a sampled Fisher it also defines ``sampled_example_losses(batch, uniforms) -> [n]``, where
    ``uniforms(counters)`` gives one number in (0, 1) for each integer counter [n, ...].
    """

    reduction = "defined by the module"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]."""
        return cast(HasExampleLosses, model).example_losses(batch)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n].

        Raises:
            ValueError: If the module cannot sample.
        """
        sampled = getattr(model, "sampled_example_losses", None)
        if sampled is None:
            raise ValueError(
                f"{type(model).__name__} defines example_losses but not sampled_example_losses(batch, uniforms), "
                "which a sampled-label Fisher needs. Define it, or ask for fisher='empirical'."
            )
        return cast(Tensor, sampled(batch, uniforms))


class FunctionLoss(ExampleLoss):
    """A plain function ``(model, batch) -> [n]``, for the empirical Fisher and all first-order estimators."""

    reduction = "defined by a function"
    samples = False

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]."""
        return self.function(model, batch)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """Always refused.

        Raises:
            ValueError: A function says nothing about the model's output distribution.
        """
        raise ValueError(
            f"loss={getattr(self.function, '__name__', 'function')}: a function of (model, batch) cannot sample labels. "
            "Ask for fisher='empirical', or pass an ExampleLoss that defines sampled_losses."
        )


def resolve_loss(
    model: nn.Module, batch: Batch, loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None
) -> ExampleLoss:
    """The per-example loss to use: the one given, the module's own, else the one that fits the batch.

    Args:
        model: The model, asked for ``example_losses``.
        batch: One batch, on which the choice depends.
        loss: An `ExampleLoss`, a function ``(model, batch) -> [n]``, or None.

    Raises:
        ValueError: If no loss fits the batch.
    """
    if isinstance(loss, ExampleLoss):
        return loss
    if loss is not None:
        return FunctionLoss(loss)
    if isinstance(model, HasExampleLosses):
        return ModuleLoss()
    labels = _labels(batch)
    if isinstance(labels, Tensor):
        if isinstance(batch, Mapping) and labels.dim() == 2 and not labels.is_floating_point():
            return LanguageModelLoss()
        if labels.is_floating_point():
            return RegressionLoss()
        if labels.dim() == 1:
            return ClassificationLoss()
    raise ValueError(
        f"loss=None: no per-example loss is known for a batch of type {type(batch).__name__}. Expected a mapping "
        "with 'labels', or (x, y). Define example_losses(batch) -> [n] on the module, or pass loss=, for example "
        "LanguageModelLoss(), ClassificationLoss(), RegressionLoss() or a function (model, batch) -> [n]."
    )


def split_batch(batch: Batch) -> tuple[Any, Tensor]:
    """(inputs, labels) of ``(x, y)`` or of a mapping with ``labels``."""
    labels = _labels(batch)
    if not isinstance(labels, Tensor):
        raise ValueError(f"got a batch of type {type(batch).__name__}; expected (x, y) or a mapping with 'labels'.")
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, labels
    return batch[0], labels


def logits_of(output: Any) -> Tensor:
    """The logits or predictions in what a model returned: a tensor, ``.logits``, ``["logits"]`` or first item."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return cast(Tensor, output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return cast(Tensor, output["logits"])
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(
        f"the model returned {type(output).__name__}; expected a tensor, an object with .logits, a mapping with "
        "'logits' or a tuple that starts with them. Otherwise define example_losses(batch) on the module."
    )


def _labels(batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) >= 2 else None


def _call(model: nn.Module, inputs: Any) -> Tensor:
    return logits_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def _binary(logits: Tensor) -> bool:
    return logits.dim() == 1 or logits.shape[1] == 1


def _at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _supervised(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the supervised positions, [p, V]: without a copy when that is (nearly) all of them."""
    return logits.flatten(0, 1) if bool(mask.all()) else logits[mask]
