"""Factors that a recorder left during the warm-up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lightning_influence.capture.component import find_components
from lightning_influence.curvature import Curvature
from lightning_influence.store import Store


def recorded_curvature(store: str | os.PathLike[str], model: nn.Module, select: Any) -> Curvature:
    """What `CurvatureRecorder` wrote into a folder.

    Args:
        store: The folder.
        model: With the weights of then.
        select: Components to use, as in `find_components`; None for those that were recorded.

    Raises:
        StoreError: If the store belongs to other weights or components.
    """
    found = Store.open(Path(store))
    found.verify(model, None if select is None else find_components(model, select))
    return found.read_curvature("curvature", device=str(next(model.parameters()).device))
