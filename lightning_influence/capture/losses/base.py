"""The contract of a per-example loss.

Influence is about the loss of one example, not the mean of a batch; the Fisher information needs labels that
the model itself would give ([MS] section 3.3). A loss object answers both, for the batch layout it knows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_influence.capture.batches import batch_size
from lightning_influence.capture.forward import runnable
from lightning_influence.capture.sampling import Uniforms

Batch: TypeAlias = Any
IGNORED = -100  # the label that Hugging Face and torch leave out of the loss


class ExampleLoss(ABC):
    """Per-example losses of one batch layout.

    Attributes:
        reduction: How an example's own loss is formed, stated in everything that is written out.
    """

    reduction: str = "sum"

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

    def where_supervised(self) -> ExampleLoss:
        """The same losses, and the same gradients, without passing outputs that no target looks at.

        For those who take gradients and nothing else: which positions an output layer is run on may then depend on
        the batch, so that moments of its inputs would too.
        """
        return self

    def batch_size(self, batch: Batch) -> int:
        """Number of examples n of a batch."""
        return batch_size(batch)

    def position_mask(self, batch: Batch) -> Tensor | None:
        """Positions that belong to an example, bool [n, t]: the 2-D attention mask; None when all do."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def supervised(self, batch: Batch) -> Tensor:
        """Number of targets of each example, int64 [n]; an example with none has no loss and no gradient."""
        return torch.ones(self.batch_size(batch), dtype=torch.int64)


def labels_of(batch: Batch) -> Any:
    """The labels of ``(x, y)`` or of a mapping with ``labels``, if it is one."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def split_batch(batch: Batch) -> tuple[Any, Tensor]:
    """(inputs, labels) of ``(x, y)`` or of a mapping with ``labels``.

    Raises:
        ValueError: If it is neither.
    """
    labels = labels_of(batch)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"got a batch of type {type(batch).__name__}; expected (x, y) or a mapping with 'labels'. For another "
            "layout define example_losses(batch) -> [n] on the module."
        )
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, labels
    return batch[0], labels


def predictions(model: nn.Module, inputs: Any) -> Tensor:
    """Logits or predictions of a model, or of the one network that a module without a forward wraps."""
    network = runnable(model)
    return logits_of(network(**inputs) if isinstance(inputs, Mapping) else network(inputs))


def logits_of(output: Any) -> Tensor:
    """The logits or predictions in what a model returned: a tensor, ``.logits``, ``["logits"]`` or first item.

    Raises:
        ValueError: If there are none.
    """
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


def at_least_float(logits: Tensor) -> Tensor:
    """Losses are formed in float32 or float64, whatever the model computes in."""
    return logits if logits.dtype == torch.float64 else logits.float()
