"""Similarity of hidden states: the baseline that takes no gradient."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_influence.capture import ExampleLoader
from lightning_influence.capture.batches import to_device
from lightning_influence.capture.contexts import eager, evaluating, full_precision
from lightning_influence.capture.examples import TRAIN
from lightning_influence.capture.forward import runnable
from lightning_influence.capture.unfit import run_batch
from lightning_influence.estimators.scores import Scores

Pooling: TypeAlias = Literal["mean", "last", "weighted"]


class RepresentationSimilarity:
    """Cosine of the hidden states of query and training example, pooled over positions.

    A baseline of [MS] section 5 in the call shape of an estimator: one forward pass for each example. Higher is more
    similar, between -1 and 1; nothing is known of help or harm. Accumulated in float32, or in float64 for such a
    model.

    With ``pooling="weighted"`` it is RDS+ (Ivison et al. 2025), which chooses rows by a round-robin over the queries,
    or over tasks with the largest score of their queries each: ``select_by_scores(scores, across="round-robin", ...)``.
    Padding has no weight, on whichever side it is.

    Args:
        model: The model. It is run in evaluation mode, and left as it was.
        layer: Name of the module whose output is taken: [n, t, d], or [n, d] without positions; alone, first in a
            tuple, or as ``last_hidden_state``. None for the last hidden states of a model of transformers: what its
            head is given.
        pooling: ``"mean"`` over the positions that belong to the example, the ``"last"`` of them, or ``"weighted"``:
            position s of S counts s / (1 + ... + S).
        forward: ``(model, batch) -> anything``, to run the model on a batch that is no tensor, ``(x, y)``, or mapping
            of its arguments, with or without ``labels``.
        batch_size: Examples per batch; None takes the loader's, or 32.
        progress: Whether to show a progress bar when it takes more than a few seconds.

    Raises:
        ValueError: If there is no such module or pooling.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        pooling: Pooling = "mean",
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        layer = _trunk(model) if layer is None else layer
        names = [name for name, _ in model.named_modules()]
        if layer not in names:
            near = difflib.get_close_matches(layer, names, n=3, cutoff=0.0)
            raise ValueError(
                f"`RepresentationSimilarity(layer={layer!r})`: expected the name of a module; the nearest are {near}."
            )
        if pooling not in get_args(Pooling):
            raise ValueError(
                f"`RepresentationSimilarity(pooling={pooling!r})`: expected one of {list(get_args(Pooling))}."
            )
        self.model = model
        self.layer = layer
        self.pooling = pooling
        self.forward = forward
        self.batch_size = batch_size
        self.progress = progress

    @property
    def formula(self) -> str:
        """What is computed, for the labels of the scores."""
        return f"cosine of hidden states of {self.layer or type(self.model).__name__}, {self.pooling} over positions"

    def score(self, queries: Any, train: Any) -> Scores:
        """Cosine of every training example with every query, [q, n].

        Args:
            queries: Map-style dataset or DataLoader.
            train: Map-style dataset or DataLoader.

        Raises:
            ValueError: If the data is empty, the layer did not run or returned something else, or a hidden state is
                not finite (ids are named).
        """
        left = ExampleLoader(queries, self.batch_size, what="queries")
        right = ExampleLoader(train, self.batch_size, what=TRAIN)
        sides = [self.represent(left), self.represent(right)]
        with full_precision():
            values = _unit(sides[0]) @ _unit(sides[1]).mT
        return Scores(values, tuple(left.ids), tuple(right.ids), self.formula, "no loss")

    def represent(self, data: Any) -> Tensor:
        """Pooled hidden states in the order of the data, [n, d], on the CPU."""
        loader = ExampleLoader(data, self.batch_size)
        device = next(self.model.parameters()).device
        label = "RepresentationSimilarity: hidden states"
        found = []
        with evaluating(self.model), torch.no_grad(), eager():
            for ids, batch in tqdm(loader, desc=label, delay=3, leave=False, disable=not self.progress):
                hidden = run_batch(self._hidden, to_device(batch, device), ids, loader.what)
                pooled = self._pooled(hidden, _mask(batch), len(ids)).cpu()
                bad = ids[~pooled.isfinite().all(1)]
                if len(bad):
                    raise ValueError(
                        f"the hidden states of {len(bad)} of {len(ids)} examples are not finite (ids "
                        f"{bad[:8].tolist()}). Remove these examples, or repair the model."
                    )
                found.append(pooled)
        return torch.cat(found)

    def _hidden(self, batch: Any) -> Tensor:
        seen: list[Any] = []
        module = self.model.get_submodule(self.layer)
        with _listening(module, seen):
            if self.forward is not None:
                self.forward(self.model, batch)
            else:
                _run(self.model, batch)
        if len(seen) != 1:
            raise ValueError(
                f"`RepresentationSimilarity(layer={self.layer!r})`: it ran {len(seen)} times in a forward pass; "
                "expected a module that runs once."
            )
        return _tensor(seen[0], self.layer)

    def _pooled(self, hidden: Tensor, mask: Tensor | None, n: int) -> Tensor:
        """[n, t, d] -> [n, d]; the mask is bool [n, t], None for all."""
        if len(hidden) != n or hidden.dim() not in (2, 3):
            raise ValueError(
                f"`RepresentationSimilarity(layer={self.layer!r})`: it returned {tuple(hidden.shape)} for {n} "
                "examples; expected [n, t, d] or [n, d]. Take a layer after pooling."
            )
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        if hidden.dim() == 2:
            return hidden
        shape = hidden.shape[:2]
        if mask is not None and mask.shape != shape:
            raise ValueError(
                f"`RepresentationSimilarity(layer={self.layer!r})`: it returned {tuple(hidden.shape)} for an attention "
                f"mask {tuple(mask.shape)}; expected a position for each of the mask's."
            )
        kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        weights = _weights(kept, self.pooling).to(hidden)
        hidden = hidden.masked_fill(~kept.to(hidden.device)[..., None], 0)  # padding may be anything
        return torch.einsum("nt,ntd->nd", weights, hidden)


def _trunk(model: nn.Module) -> str:
    """Name of the part of a model of transformers that returns the last hidden states, without the head."""
    for name, module in model.named_modules():
        prefix = getattr(type(module), "base_model_prefix", "")  # of the class: peft hands on what is of the instance
        if isinstance(prefix, str) and prefix:
            inner = isinstance(getattr(module, prefix, None), nn.Module)
            return ".".join(filter(None, (name, prefix * inner)))
    raise ValueError(
        f"`RepresentationSimilarity(layer=None)`: {type(model).__name__} holds no model of transformers. "
        "Expected the name of the module whose outputs are compared."
    )


def _weights(kept: Tensor, pooling: Pooling) -> Tensor:
    """[n, t], adding up to 1 over the positions of each example, 0 elsewhere; all 0 where there is no position."""
    places = kept.cumsum(1).double() * kept
    if pooling == "last":
        return ((places == places.amax(1, keepdim=True)) & kept).double()
    weights = places if pooling == "weighted" else kept.double()
    return weights / weights.sum(1, keepdim=True).clamp_min(1)


def _mask(batch: Any) -> Tensor | None:
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


@contextmanager
def _listening(module: nn.Module, seen: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()


def _run(model: nn.Module, batch: Any) -> None:
    network = runnable(model)
    if isinstance(batch, Mapping):
        arguments = inspect.signature(network.forward).parameters
        settings = {"use_cache": False} if "use_cache" in arguments else {}
        network(**settings, **{key: value for key, value in batch.items() if key != "labels"})
    else:
        network(batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch)


def _tensor(output: Any, layer: str) -> Tensor:
    if isinstance(getattr(output, "last_hidden_state", None), Tensor):
        found: Tensor = output.last_hidden_state
        return found
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"`RepresentationSimilarity(layer={layer!r})`: it returned {type(output).__name__}; expected a tensor, a "
            "tuple that begins with one, or an object with last_hidden_state."
        )
    return first


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1, first by the largest entry, whose square may not be representable; 0 stays 0."""
    largest = vectors.abs().amax(1, keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1)
