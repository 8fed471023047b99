"""Errors that a caller may want to catch; wrong arguments are plain ``ValueError``."""

from __future__ import annotations


class UnsupportedLayerError(ValueError):
    """A layer, or the way the model uses it, has no per-example gradient here.

    The message lists every such layer at once, with the share of the parameters that would be left out.
    """


class NotFittedError(RuntimeError):
    """Something was asked of a curvature or an estimator before it has seen its data."""


class StoreError(RuntimeError):
    """A store is damaged, incomplete, or belongs to another model, other components or other settings.

    The message names every difference between what is stored and what was asked for.
    """
