"""Recorded products for the tests of the benchmark."""

from __future__ import annotations

import torch

from lightning_influence.estimators.component_dots import ComponentDots

NAMES = (
    "model.embed_tokens",
    *(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(2) for kind in "qk"),
    "model.layers.1.mlp.up_proj",
)


def recorded(q: int = 40, b: int = 4, seed: int = 0, noise: float = 3.0, short: bool = False) -> ComponentDots:
    """Query ``q3`` was made from example 3; its candidates are others too, and it comes anywhere among them."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(len(NAMES), 1, 8, generator=generator, dtype=torch.float64)
    train = topic + torch.randn(len(NAMES), q, 8, generator=generator, dtype=torch.float64)
    blur = noise * torch.linspace(0.3, 1, len(NAMES), dtype=torch.float64)[:, None, None]
    queries = train + blur * torch.randn(len(NAMES), q, 8, generator=generator, dtype=torch.float64)
    pairs = []
    for query in range(q):
        others = [row for row in torch.randperm(q, generator=generator).tolist() if row != query][: b - 1]
        others = others[: 1 + query % (b - 1)] if short else others
        others.insert(query % b, query)
        pairs += [(query, row) for row in others]
    left, right = torch.tensor(pairs).T
    return ComponentDots(
        components=NAMES,
        sizes=(500, 10, 20, 30, 40, 400),
        query_ids=tuple(f"q{query}" for query in range(q)),
        train_ids=tuple(range(q)),
        pairs=torch.tensor(pairs),
        dots=(queries[:, left] * train[:, right]).sum(-1),
        query_squares=queries.square().sum(-1),
        train_squares=train.square().sum(-1),
        formula="dot",
        reduction="sum",
    )


def sources(q: int = 40) -> dict[int | str, int | str]:
    return {f"q{query}": query for query in range(q)}
