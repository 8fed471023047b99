"""Small models in float64 in which every kind of curvature block occurs, with data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_influence.capture.sampling import Uniforms
from tests import oracles

VOCABULARY = 7


class Mixed(nn.Module):
    """Tokens [n, t] to logits: blocks of every structure, tied weights among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.norm = nn.LayerNorm(4)
        self.mixer = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.up = nn.Linear(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.tied = nn.Linear(4, VOCABULARY, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        hidden = hidden + self.mixer(hidden.mT).mT.tanh()
        return self.tied(self.head(self.up(hidden).tanh().mean(1)))


class Tokens(nn.Module):
    """A causal language model of two linear layers; padding has inputs of its own, which must not count."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.up = nn.Linear(4, 3, bias=bias)
        self.head = nn.Linear(3, VOCABULARY, bias=bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.embedding(input_ids)
        past = (embedded * attention_mask[..., None]).cumsum(1)
        return self.head(self.up(embedded + 0.5 * past).tanh())


class Images(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1, stride=2)
        self.second = nn.Conv2d(2, 3, 2, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images).tanh()).tanh().mean((2, 3)))


class DeadEnd(torch.autograd.Function):
    """``x -> x²``, with a derivative that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return 2 * x * gradient


def mlp(*layers: nn.Module) -> nn.Module:
    return ready(nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)))))


def ready(model: nn.Module) -> nn.Module:
    """The model in float64 with seeded weights, neither zeros nor ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1)
    return model.double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed + 100))


def points(n: int = 12, seed: int = 0, classes: int = 3) -> list[Any]:
    """(x, y) rows."""
    return list(zip(normal(n, 3, seed=seed), labels(n, classes, seed), strict=True))


def token_rows(n: int = 12, t: int = 5, seed: int = 0) -> list[Any]:
    """(tokens, class) rows."""
    tokens = torch.randint(VOCABULARY, (n, t), generator=torch.Generator().manual_seed(seed))
    return list(zip(tokens, labels(n, VOCABULARY, seed), strict=True))


def texts(n: int = 10, t: int = 6, seed: int = 0) -> list[Any]:
    """Sequences of unequal length, padded on the right (every third on the left); some labels masked."""
    tokens = torch.randint(1, VOCABULARY, (n, t), generator=torch.Generator().manual_seed(seed))
    lengths = t - torch.arange(n)[:, None] % 3
    mask = torch.where(torch.arange(n)[:, None] % 3 == 2, torch.arange(t) >= t - lengths, torch.arange(t) < lengths)
    targets = tokens.masked_fill(~mask, -100)
    targets[::2, 2] = -100
    rows = {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": targets}
    return [{key: value[k] for key, value in rows.items()} for k in range(n)]


def images(n: int = 10, seed: int = 0) -> list[Any]:
    return list(zip(normal(n, 1, 6, 6, seed=seed), labels(n, 3, seed), strict=True))


def batch_of(row: Any) -> Any:
    """A batch of one."""
    if isinstance(row, dict):
        return {key: value[None] for key, value in row.items()}
    return tuple(value[None] for value in row)


def loss_of(model: nn.Module, row: Any, position: int, seed: int | None = None) -> Tensor:
    """Loss of one row alone, written out; with labels drawn from the model when there is a seed."""
    batch = batch_of(row)
    if isinstance(batch, dict):
        logits = model(batch["input_ids"], batch["attention_mask"])[0, :-1]
        targets = batch["labels"][0, 1:]
        logits, targets = logits[targets != -100], targets[targets != -100]
        counters = torch.arange(1, len(targets) + 1)[None]
    else:
        logits, targets = model(batch[0]), batch[1]
        counters = torch.zeros(1, 1, dtype=torch.int64)
    if seed is not None:
        draws = Uniforms(torch.tensor([position]), seed)(counters)[0].tolist()
        chances = torch.softmax(logits.detach(), 1)
        targets = torch.tensor([oracles.first_above(p, u) for p, u in zip(chances, draws, strict=True)])
    return -logits.log_softmax(1)[range(len(targets)), targets].sum()


@dataclass(frozen=True)
class Truth:
    """Everything about one layer of a model, dense, for the rows of a dataset.

    Attributes:
        factors: Inputs [t, i] and output gradients [t, o] of each example, real positions only.
        gradients: [n, o, i].
    """

    factors: list[tuple[Tensor, Tensor]]
    gradients: Tensor


def truth(model: nn.Module, name: str, data: list[Any], seed: int | None = None) -> Truth:
    """From autograd, one example at a time; labels sampled when there is a seed."""
    module = model.get_submodule(name)
    each: Callable[[int], Tensor] = lambda k: loss_of(model, data[k], k, seed)  # noqa: E731
    factors = oracles.layer_factors(module, each, len(data), _inputs_of(module))
    kept = [_real(row, *pair) for row, pair in zip(data, factors, strict=True)]
    own = dict(module.named_parameters())
    found = oracles.example_gradients(own, each, len(data))
    columns = [found["weight"].flatten(2)] + ([found["bias"][..., None]] if "bias" in found else [])
    return Truth(kept, torch.cat(columns, dim=2))


def _inputs_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def rows(inputs: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            inputs = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride).mT
        inputs = inputs.reshape(1, -1, inputs.shape[-1])
        return inputs if module.bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=2)

    return rows


def _real(row: Any, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(row, dict):
        return inputs, gradients
    mask = row["attention_mask"].bool()
    return inputs[mask], gradients[mask]
