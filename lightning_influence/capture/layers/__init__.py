"""One rule per layer family. A new family is a module here and a line in `RULES`."""

from __future__ import annotations

from torch import nn

from lightning_influence.capture.layers.base import LayerCall, LayerRule
from lightning_influence.capture.layers.conv import ConvRule
from lightning_influence.capture.layers.embedding import EmbeddingRule
from lightning_influence.capture.layers.fallback import FallbackRule
from lightning_influence.capture.layers.linear import LinearRule
from lightning_influence.capture.layers.norm import NormRule

FALLBACK = FallbackRule()
# The first that handles a module covers it; the fallback handles everything.
RULES: tuple[LayerRule, ...] = (LinearRule(), EmbeddingRule(), NormRule(), ConvRule(), FALLBACK)


def rule_for(module: nn.Module) -> LayerRule:
    """The rule that covers a module: the first that is exact for it."""
    return next(rule for rule in RULES if rule.handles(module))


__all__ = [
    "FALLBACK",
    "RULES",
    "ConvRule",
    "EmbeddingRule",
    "FallbackRule",
    "LayerCall",
    "LayerRule",
    "LinearRule",
    "NormRule",
    "rule_for",
]
