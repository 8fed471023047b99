"""Language models: the cross-entropy of a sequence's tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_influence.capture.forward import runnable
from lightning_influence.capture.losses.base import IGNORED, Batch, ExampleLoss, predictions
from lightning_influence.capture.losses.token_cross_entropy import token_cross_entropy
from lightning_influence.capture.sampling import Uniforms, sample_categories


class LanguageModelLoss(ExampleLoss):
    """Causal (or masked) language model: cross-entropy of each sequence over its labels that are not -100.

    Batches are mappings with ``input_ids`` (or ``inputs_embeds``), ``labels`` [n, t] and what else the model
    takes; the model returns logits [n, t, V], alone, as ``.logits`` or first in a tuple.

    Args:
        reduction: ``"sum"`` over a sequence's tokens ([MS] eq. 13), or ``"mean"``.
        shift: Whether position t predicts label t + 1, as causal models do.
        encoder_decoder: Whether the labels are those of a decoder, whose inputs the model makes from the labels
            and whose positions the attention mask is not about. Such labels are not shifted.
    """

    def __init__(
        self, reduction: Literal["sum", "mean"] = "sum", shift: bool = True, *, encoder_decoder: bool = False
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"`LanguageModelLoss(reduction={reduction!r})`: expected 'sum' or 'mean'.")
        self.reduction = reduction
        self.shift = shift and not encoder_decoder
        self.encoder_decoder = encoder_decoder
        self._trim = False

    def where_supervised(self) -> LanguageModelLoss:
        """With the head of a model that takes ``logits_to_keep`` run on columns only in which a row has a label."""
        twin = copy.copy(self)
        twin._trim = not self.encoder_decoder
        return twin

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n]: minus log-likelihood of the labels."""
        labels, kept = self._kept(model, batch)
        return self._reduced(self._logits(model, batch, kept), labels, labels != IGNORED)

    def sampled_losses(self, model: nn.Module, batch: Batch, uniforms: Uniforms) -> Tensor:
        """[n]: the same at the same positions, tokens drawn from the model's distribution there."""
        labels, kept = self._kept(model, batch)
        logits = self._logits(model, batch, kept)
        mask = labels != IGNORED
        # Counting supervised positions, not columns, makes the draw independent of padding and its side.
        draws = uniforms(mask.cumsum(1)).to(logits.device)
        if _mostly(mask):
            drawn = sample_categories(logits.detach().flatten(0, 1), draws.flatten()).reshape(mask.shape)
            return self._reduced(logits, torch.where(mask, drawn, IGNORED), mask)
        labels = labels.clone()
        labels[mask] = sample_categories(logits.detach()[mask], draws[mask])
        return self._reduced(logits, labels, mask)

    def position_mask(self, batch: Batch) -> Tensor | None:
        """The attention mask, where there is a 2-D one; none for a decoder of its own."""
        return None if self.encoder_decoder else super().position_mask(batch)

    def supervised(self, batch: Batch) -> Tensor:
        """Number of labels that count, [n]."""
        return (self._targets(batch) != IGNORED).sum(1)

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise ValueError(
                f"LanguageModelLoss: got a batch of type {type(batch).__name__}; expected a mapping with "
                "'labels' [n, t] (-100 where nothing is predicted) beside the model's inputs."
            )
        odd = labels[(labels < 0) & (labels != IGNORED)]
        if len(odd):  # no class, and a label all the same: its loss would count as 0, and labels be drawn for it
            raise ValueError(
                f"LanguageModelLoss: got labels {sorted(set(odd.tolist()))[:4]}; expected token ids, or -100 where "
                "nothing is predicted. Write labels.masked_fill(labels < 0, -100) where the batch is made."
            )
        if not self.shift:
            return labels
        return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)

    def _kept(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Labels [n, kept], and the columns that are kept; None for all."""
        labels = self._targets(batch)
        if not self._trim or "logits_to_keep" in batch or "logits_to_keep" not in _arguments(runnable(model)):
            return labels, None
        kept = (labels != IGNORED).any(0).nonzero().flatten()
        return (labels, None) if len(kept) in (0, labels.shape[1]) else (labels[:, kept], kept)

    def _logits(self, model: nn.Module, batch: Batch, kept: Tensor | None) -> Tensor:
        labels = cast(Tensor, batch["labels"])
        network = runnable(model)
        _check_tokens(network, batch)
        # Keys and values kept for generation are of no use here, and a recomputed layer would add them twice.
        settings = {"use_cache": False} if "use_cache" in _arguments(network) else {}
        inputs = {**settings, **{key: value for key, value in batch.items() if key != "labels"}}
        if kept is not None:
            inputs["logits_to_keep"] = kept
        if self.encoder_decoder and "decoder_input_ids" not in inputs:
            shifted = network.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
            inputs["decoder_input_ids"] = shifted
        logits = predictions(network, inputs)
        columns = labels.shape[1] if kept is None else len(kept)
        if logits.dim() != 3 or logits.shape[:2] != (len(labels), columns):
            raise ValueError(
                f"LanguageModelLoss: the model gave logits of shape {tuple(logits.shape)} for labels "
                f"{tuple(labels.shape)}; expected [n, t, V]."
            )
        return logits

    def _reduced(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        most, tokens = int(labels.amax()) if labels.numel() else IGNORED, logits.shape[-1]
        if most >= tokens:  # looked up on a GPU, it would end the process
            raise ValueError(
                f"LanguageModelLoss: got label {most}; expected token ids below {tokens}, those that the model scores."
            )
        if _mostly(mask):
            each = token_cross_entropy(logits.flatten(0, 1), labels.flatten()).reshape(mask.shape)
        else:
            each = token_cross_entropy(logits[mask], labels[mask])
            each = each.new_zeros(mask.shape).masked_scatter(mask, each)
        total = each.sum(1)
        return total if self.reduction == "sum" else total / mask.sum(1).clamp_min(1)


def _check_tokens(network: nn.Module, batch: Mapping[str, object]) -> None:
    """Refuse tokens that the model does not have: looked up on a GPU, they would end the process."""
    tokens, find = batch.get("input_ids"), getattr(network, "get_input_embeddings", None)
    if not isinstance(tokens, Tensor) or not tokens.numel() or find is None:
        return
    try:
        rows = getattr(find(), "num_embeddings", None)
    except NotImplementedError:  # as models of transformers do that have none
        return
    least, most = int(tokens.amin()), int(tokens.amax())
    if isinstance(rows, int) and not 0 <= least <= most < rows:
        odd = least if least < 0 else most
        raise ValueError(
            f"LanguageModelLoss: got token {odd}; expected input_ids from 0 to {rows - 1}, those that the model embeds."
        )


def _arguments(network: nn.Module) -> Collection[str]:
    """Names of what the model takes."""
    adapted = getattr(network, "get_base_model", None)  # peft hands unknown arguments on
    base = network if adapted is None else adapted()
    return inspect.signature(base.forward).parameters.keys()


def _mostly(mask: Tensor) -> bool:
    """Whether so many positions are supervised that picking out their logits would cost more than it saves."""
    return 2 * int(mask.sum()) >= mask.numel()
