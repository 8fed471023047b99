"""Training data of which a part is chosen."""

from __future__ import annotations

from lightning_influence.datamodule.data_selector import DataSelector

__all__ = ["DataSelector"]
