"""Which rows of a pool a fit sees: all of them, the warm-up's part, or those that were chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_influence.datamodule.chosen import Chosen
from lightning_influence.datamodule.pool import check_size, checked_pool
from lightning_influence.datamodule.warm_up import WarmUp
from lightning_influence.datamodule.wrapper import DataModuleWrapper, overrides
from lightning_influence.selection import Constraints, Selection
from lightning_influence.selection.budget import Budget
from lightning_influence.selection.selected_loader import selected_loader, subset


class ServedRows(DataModuleWrapper):
    """Serves rows of the wrapped datamodule's training data, and keeps them in files and checkpoints.

    Args:
        inner: The datamodule to wrap.
        budget: Rows that will be chosen, to refuse at once what the pool does not have; None where that is not known.
        warmup: What is served before there is a selection; None for the whole pool.
        loader_fn: Makes a DataLoader of a part of the dataset; None to build one like the pool's.
        is_set_up: Whether the data is there already, without a fit.
        constraints: What will be asked of the choice, to refuse at once what no choice can meet.
    """

    def __init__(
        self,
        inner: Any,
        budget: Budget | None,
        warmup: WarmUp | None,
        loader_fn: Callable[..., Any] | None,
        *,
        is_set_up: bool,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(inner)
        self._budget, self._warmup, self._loader_fn, self._limits = budget, warmup, loader_fn, constraints
        self._file: str | None = None
        self._chosen: Chosen | None = None
        self._is_set_up = is_set_up
        if is_set_up:
            check_size(inner.train_dataloader(), budget, warmup, constraints)

    @property
    def selection(self) -> Selection | None:
        """The selection with its gains; None before there is one, or when only positions were given."""
        return None if self._chosen is None else self._chosen.selection

    @property
    def selected_ids(self) -> list[int] | None:
        """Positions that are served, in the order of the pool; None while the whole pool is."""
        return None if self._chosen is None else self._chosen.ids

    @property
    def warmup_ids(self) -> list[int] | None:
        """Positions of the random part that is served before there is a selection; None until a fit has seen it."""
        return None if self._warmup is None or self._warmup.rows is None else self._warmup.rows.ids

    def use(self, selection: Selection) -> Selection:
        """Serve a selection that was made elsewhere from the same pool; its ids are positions.

        Raises:
            ValueError: If its ids are names.
        """
        self._serve(Chosen.of(selection))
        return selection

    def weigh(self, weights: Mapping[int, float] | Literal["gains"] | None) -> None:
        """Serve the selected rows in proportion to weights, as many draws with replacement an epoch as there are rows.

        Batches and ``training_step`` stay as they are: a row of twice the weight comes twice as often. Kept by `save`
        and in checkpoints; the next selection has none of it.

        Args:
            weights: Of every selected position; or ``"gains"`` for how much each pick is predicted to lower the target
                loss, so that those predicted to raise it are not drawn; or None to serve each row once again.

        Raises:
            ValueError: If nothing is selected, or weights do not fit.
        """
        if self._chosen is None:
            raise ValueError("`DataSelector.weigh()`: nothing has been selected; call select first.")
        self._chosen = self._chosen.weighed(weights)

    def clear(self) -> None:
        """Serve again what was served before there was a selection: the whole pool, or the warm-up's part of it."""
        self._chosen, self._file = None, None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the selection as JSON, for ``DataSelector(selection=path)`` in another process.

        Raises:
            ValueError: If nothing has been selected.
        """
        if self._chosen is None:
            raise ValueError("`DataSelector.save()`: nothing has been selected; call select first.")
        if self._chosen.fingerprint is None:
            self._chosen = self._chosen.found_in(self.pool_dataloader().dataset)
        return self._chosen.write(path)

    def load(self, path: str | os.PathLike[str]) -> Selection | None:
        """Serve a selection written by `save`; that the pool is the same is checked when it is served."""
        self._serve(Chosen.read(path))
        return self.selection

    def pool_dataloader(self) -> DataLoader[Any]:
        """The loader of the whole pool, as the user made it; sets the data up if no fit has done so yet.

        Raises:
            ValueError: If the training data is not one DataLoader over a map-style dataset.
        """
        if not self._is_set_up:
            self._inner.prepare_data()
            self.setup("fit")
        return checked_pool(self._inner.train_dataloader())

    def _serve(self, chosen: Chosen) -> None:
        self._chosen, self._file = chosen, None

    def train_dataloader(self) -> Any:
        """The pool's loader as it is, or one like it over the rows that the fit shall see now."""
        if self._chosen is None and self._warmup is None:
            whole = self._inner.train_dataloader()
            check_size(whole, self._budget, self._warmup, self._limits)
            return whole
        loader = self.pool_dataloader()
        served = self._served(loader)
        positions, weights = served.ids, served.weights_of_ids
        if self._trainer is not None and self._trainer.world_size > 1:  # ranks may have computed ties differently
            positions, weights = self._trainer.strategy.broadcast((positions, weights))
        if self._loader_fn is None:
            return selected_loader(loader, positions, weights)
        if weights is not None:
            raise ValueError("`DataSelector(loader_fn=...)` makes the loader itself: leave it or the weights out.")
        return self._loader_fn(subset(loader.dataset, positions))

    def _served(self, loader: DataLoader[Any]) -> Chosen:
        """The selection, or before there is one the warm-up's part."""
        if self._chosen is not None:
            self._chosen = self._chosen.found_in(loader.dataset)
            return self._chosen
        assert self._warmup is not None
        check_size(loader, self._budget, self._warmup, self._limits)
        return self._warmup.of(loader.dataset)

    def setup(self, stage: str) -> None:
        """Set the data up, and read the selection file before a fit."""
        super().setup(stage)
        self._is_set_up = True
        if stage == "fit" and self._file is not None:
            self._serve(Chosen.read(self._file, "DataSelector(selection={!r})"))

    def teardown(self, stage: str) -> None:
        """Tear the data down."""
        super().teardown(stage)
        self._is_set_up = not overrides(self._inner, "teardown")

    def state_dict(self) -> dict[str, Any]:
        """Selection, warm-up part and the wrapped datamodule's state, the former two as plain JSON."""
        rows = {"selection": self._chosen, "warmup": None if self._warmup is None else self._warmup.rows}
        plain = {name: None if chosen is None else chosen.to_dict() for name, chosen in rows.items()}
        return {"version": 1, **plain, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; a selection that was made since wins over the one in the checkpoint."""
        super().load_state_dict(state_dict)
        warm_up = state_dict.get("warmup")
        if warm_up is not None and self._warmup is not None:
            self._warmup.rows = Chosen.from_dict(warm_up)
        if state_dict["selection"] is None:
            return
        chosen = Chosen.from_dict(state_dict["selection"])
        if self._chosen is None:
            self._serve(chosen)
        elif chosen.ids != self._chosen.ids:
            rank_zero_warn(
                "DataSelector: the checkpoint was trained on another selection than the one made since; the new one "
                "is served. Call `clear()` before the fit to take the one in the checkpoint."
            )
