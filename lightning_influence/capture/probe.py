"""Whether the gradient of an example in a batch is the one it has alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.capture.batches import examples
from lightning_influence.capture.gradient_capture import GradientCapture
from lightning_influence.capture.losses import ExampleLoss
from lightning_influence.capture.record import LayerRecord
from lightning_influence.capture.unfit import UnfitExamplesError

Kind = Literal["same", "times n", "over n", "scaled", "coupled", "fails alone", "unknown"]
SAME_DIRECTION = 0.99  # cosine: half precision stays far above, another direction far below
SAME_LENGTH = 0.05  # relative difference: of the order of half precision, of no interest if real
SILENT = 1e-12  # of the largest squared norm: rounding of nothing


@dataclass(frozen=True)
class LossProbe:
    """What was found about a loss by looking at examples alone and in their batch.

    Attributes:
        kind: In the batch an example's gradient is the ``"same"`` as alone, n ``"times"`` or 1 ``"over"`` it, or
            ``"scaled"`` by a factor that depends on the example or on the others; it is ``"coupled"`` when it
            points elsewhere. The loss of one example may also fail where that of a batch does not, or nothing can
            be said.
        ratios: Length of the gradient in the batch over that alone, for each example that was looked at.
        cosines: Between the two.
        reason: What failed, or why nothing can be said.
    """

    kind: Kind
    ratios: tuple[float, ...] = ()
    cosines: tuple[float, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        """What is the matter, as a sentence without an end."""
        ratios, cosines = (", ".join(f"{x:.3g}" for x in found) for found in (self.ratios, self.cosines))
        return {
            "same": "examples have the same gradient alone and in a batch",
            "times n": "the loss of an example is multiplied by the number of examples in its batch",
            "over n": "the loss of an example is divided by the number of examples in its batch",
            "scaled": f"the scale of an example's loss depends on its batch: its gradient is {ratios} times the one it "
            "has alone (a class-weighted mean, or a mean over the tokens of sequences of unequal length)",
            "coupled": f"an example's gradient in a batch is not the one it has alone (cosines {cosines}, ratios "
            f"{ratios}): examples are compared with each other, share statistics, or random numbers are drawn",
            "fails alone": f"the loss of one example alone fails ({self.reason})",
            "unknown": f"examples cannot be compared alone and in a batch ({self.reason})",
        }[self.kind]


def probe_loss(
    capture: GradientCapture, batch: Any, loss: ExampleLoss, ids: Tensor | None = None, what: str = "examples"
) -> LossProbe:
    """Compare the gradients of two examples alone with those in their batch: three passes, once.

    Of a mean over tokens, or one with weights, nothing shows in a batch in which all examples have equal shares; the
    two examples are those with the fewest and the most targets.

    Args:
        capture: An active capture of the components of interest.
        batch: A batch on the model's device, whose tensors have the examples first.
        loss: The loss.
        ids: Of the examples, int64 [n], for errors; None numbers them.
        what: What to call them there.

    Raises:
        ValueError: If the losses of the batch are not one finite number per example, or cannot be computed.
        UnsupportedLayerError: If components have no per-example gradient.
    """
    n = loss.batch_size(batch)
    whole = _started(capture, batch, loss, ids, what)
    if n == 1:
        return LossProbe("unknown", reason="the batch holds one example only")
    rows = _two_rows(loss.supervised(batch).tolist())
    try:
        parts = [examples(batch, slice(row, row + 1)) for row in rows]
    except ValueError as error:
        return LossProbe("unknown", reason=f"the batch cannot be cut into examples: {error}".rstrip("."))
    try:
        alone = [_started(capture, part, loss) for part in parts]
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UnfitExamplesError) and error.__cause__ is not None else error
        return LossProbe("fails alone", reason=f"{type(cause).__name__}: {cause}".rstrip("."))
    return _verdict(_products(whole, alone, rows), n)


def _started(
    capture: GradientCapture, batch: Any, loss: ExampleLoss, ids: Tensor | None = None, what: str = "examples"
) -> Iterator[LayerRecord]:
    """Records of a batch whose passes have been run."""
    records = capture.record(batch, loss.losses, ids, loss.position_mask(batch), loss.batch_size(batch), what)
    return chain([next(records)], records)


def _two_rows(targets: Sequence[int]) -> list[int]:
    """The rows with the fewest and the most targets; the first and the last one when all have the same."""
    usable = [row for row, count in enumerate(targets) if count > 0] or list(range(len(targets)))
    ordered = sorted(usable, key=lambda row: targets[row])
    return list(dict.fromkeys([ordered[0], ordered[-1]]))


def _products(whole: Iterator[LayerRecord], alone: list[Iterator[LayerRecord]], rows: list[int]) -> torch.Tensor:
    """Sums over all components of <alone, alone>, <batch, batch> and <alone, batch> for each row looked at, [rows, 4].

    The last column is the largest <batch, batch> of all rows.
    """
    total = torch.zeros(len(rows), 3, dtype=torch.float64)
    norms: torch.Tensor | float = 0.0
    for record, *singles in zip(whole, *alone, strict=True):
        squares = record.squared_norms().double().cpu()
        norms = norms + squares
        for k, (row, single) in enumerate(zip(rows, singles, strict=True)):
            total[k, 0] += float(single.squared_norms()[0])
            total[k, 1] += float(squares[row])
            total[k, 2] += float(single.dot_products(record)[0, row])
    largest = torch.as_tensor(norms, dtype=torch.float64).max()
    return torch.cat([total, largest.expand(len(rows), 1)], dim=1)


def _verdict(products: torch.Tensor, n: int) -> LossProbe:
    floor = SILENT * products.max()
    seen = products[(products[:, :2] > floor).any(1)]
    if not len(seen):
        return LossProbe("unknown", reason="the examples looked at have no gradient")
    alone, batch, dot = seen[:, 0], seen[:, 1], seen[:, 2]
    ratios = (batch / alone).sqrt()
    cosines = (dot / (alone * batch).sqrt()).nan_to_num(0.0)
    found = tuple(ratios.tolist()), tuple(cosines.tolist())
    if bool((cosines < SAME_DIRECTION).any()):
        return LossProbe("coupled", *found)
    factors: list[tuple[Kind, float]] = [("same", 1.0), ("times n", n), ("over n", 1 / n)]
    for kind, factor in factors:
        if bool(((ratios / factor - 1).abs() < SAME_LENGTH).all()):
            return LossProbe(kind, *found)
    return LossProbe("scaled", *found)
