"""Numbers that tell a good selection or a good score from a bad one."""

from __future__ import annotations

from lightning_influence.metrics.class_entropy import ClassEntropy, class_entropy

__all__ = ["ClassEntropy", "class_entropy"]
