"""A datamodule that serves a pool of training data whole at first, and the chosen part of it afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, overload

from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.capture.component import find_components
from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.capture.examples import ExampleLoader
from lightning_influence.capture.guard import unchanged
from lightning_influence.capture.losses import Batch, ExampleLoss
from lightning_influence.curvature import Curvature
from lightning_influence.datamodule.wrapper import DataModuleWrapper, PlainData, is_datamodule, overrides
from lightning_influence.selection import Constraints, Selection, TokenBudget, check_budget
from lightning_influence.selection.budget import Budget, resolve_budget
from lightning_influence.selection.pipeline import Leaks, Rule, TargetCurvature, Weight, select_training_data
from lightning_influence.selection.selected_loader import positions_of, selected_loader, subset
from lightning_influence.store import Store


class DataSelector(DataModuleWrapper):
    """Wraps training data, chooses among it once a warm-up model is there, and then serves what was chosen.

    Between two fits the choice is made, explicitly::

        selector = DataSelector(datamodule, targets, budget=0.1)
        Trainer(max_epochs=1).fit(warm_up_model, datamodule=selector)      # the whole pool
        selector.select(warm_up_model)
        Trainer(max_epochs=3).fit(fresh_model, datamodule=selector)        # the selection

    The selection is served with the user's own batch size, collate function, workers and shuffling; everything
    else (validation data, transfer hooks, attributes, hyperparameters, state) is the wrapped datamodule's own.
    The second fit needs a new Trainer, as a Trainer counts epochs across fits, and, unless the warm-up weights are
    to be kept, a new model. An epoch of a selection has fewer steps, which schedules counted in epochs will feel:
    compare selections with ``max_steps``. A selection made during a fit counts from the next epoch on, and only
    with ``reload_dataloaders_every_n_epochs=1``. Under several ranks ``select`` is computed on each of them, and what
    rank 0 chose is served.

    Ids are positions in the training dataset. So its order must not change from one ``setup`` to the next: an
    unseeded ``random_split`` there is noticed and refused. State of the wrapped datamodule in a checkpoint that was
    saved without a DataSelector is not found again (Lightning files it under the name of the class).

    Args:
        data: The pool: a LightningDataModule whose ``train_dataloader`` gives one DataLoader, a DataLoader, or a
            map-style dataset (torch or Hugging Face ``datasets``).
        targets: DataLoader or dataset of the examples whose mean loss shall fall; None takes the validation data.
            A dataset is put into batches as the pool is.
        budget: Rows as an int, a share of the pool in (0, 1] or a `TokenBudget`; needed for ``select(model)``.
        constraints: What the selection must keep to besides.
        leaks: Of the targets, what is done about pool rows that stand there too: "warn", "refuse" or "exclude".
        rule: None for ``InteractionGreedy()``; ``"newton"`` for `NewtonGreedy` with a ridge that suits the pool.
        curvature: None for ``EKFAC()``.
        components: Which parameters, see `find_components`; None for everything trainable.
        loss: Loss of one example, see `resolve_loss`.
        weight: Of one selected row in the training objective, see `select_training_data`.
        target_curvature: Labels of the Fisher of the targets: their own, or sampled from the model.
        normalise: Whether gradients are scaled to unit length first.
        selection: Positions, or the path of a file written by `save`, which is read when a fit begins.
        val: DataLoader or dataset for validation, when ``data`` is not a datamodule.
        batch_size: Of the pool and the validation data, where they are plain datasets.
        collate_fn: The same.
        num_workers: The same.
        loader_fn: Makes a DataLoader of the selected part of the dataset, for loaders that cannot be rebuilt
            (custom samplers, subclasses of DataLoader).

    Raises:
        ValueError: If an argument does not fit the data.
    """

    def __init__(
        self,
        data: Any,
        targets: Any = None,
        budget: Budget | None = None,
        *,
        constraints: Constraints | None = None,
        leaks: Leaks = "warn",
        rule: Rule | None = None,
        curvature: Curvature | None = None,
        components: str | list[str] | Callable[[str, nn.Module], bool] | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        weight: Weight = "saturate",
        target_curvature: TargetCurvature = "empirical",
        normalise: bool = True,
        selection: list[int] | str | None = None,
        val: Any = None,
        batch_size: int = 32,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        loader_fn: Callable[..., Any] | None = None,
    ) -> None:
        settings = {"batch_size": batch_size, "collate_fn": collate_fn, "num_workers": num_workers}
        if val is not None and is_datamodule(data):
            raise ValueError("`DataSelector(val=...)`: the datamodule has its own validation data; leave `val` out.")
        super().__init__(data if is_datamodule(data) else PlainData(data, val, settings))
        self._targets = None if targets is None else _checked_targets(targets)
        self._budget = _checked_budget("DataSelector", budget)
        self._options: dict[str, Any] = {
            "constraints": constraints,
            "leaks": leaks,
            "rule": rule,
            "curvature": curvature,
            "components": components,
            "loss": loss,
            "weight": weight,
            "target_curvature": target_curvature,
            "normalise": normalise,
        }
        self._loader_fn = loader_fn
        self._file: str | None = None
        self._positions: list[int] | None = None
        self._selection: Selection | None = None
        self._fingerprint: str | None = None
        self._is_set_up = self._inner is not data
        if self._is_set_up:
            self._check_size(self._inner.train_dataloader())
        if isinstance(selection, str | os.PathLike):
            self._file = os.fspath(selection)
        elif selection is not None:
            self.select(ids=selection)

    # -- choosing

    @property
    def selection(self) -> Selection | None:
        """The selection with its gains; None before there is one, or when only positions were given."""
        return self._selection

    @property
    def selected_ids(self) -> list[int] | None:
        """Positions that are served, in the order of the pool; None while the whole pool is."""
        return None if self._positions is None else sorted(self._positions)

    @overload
    def select(
        self,
        model: nn.Module,
        ids: None = None,
        *,
        budget: Budget | None = None,
        rule: Rule | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        store: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Selection: ...

    @overload
    def select(self, model: None = None, ids: Sequence[int] = ...) -> None: ...

    def select(
        self,
        model: nn.Module | None = None,
        ids: Sequence[int] | None = None,
        *,
        budget: Budget | None = None,
        rule: Rule | None = None,
        loss: ExampleLoss | Callable[[nn.Module, Batch], Tensor] | None = None,
        store: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Selection | None:
        """Choose what the next fit trains on.

        Args:
            model: The warm-up model, from which the choice is computed. Left as it was; its ``self.log`` does nothing
                meanwhile.
            ids: Positions chosen elsewhere, instead of a model.
            budget: Instead of the selector's own.
            rule: Instead of the selector's own.
            loss: Instead of the selector's own. Where a recorder fell back to ``training_step``, which is not run
                here, pass the loss that it found and tried out: ``recorder.settled_loss``.
            store: Folder of a recording of `CurvatureRecorder`, whose factors are used instead of fitting new
                ones; it must be of the weights the model has now.
            batch_size: Examples per batch of the passes; None takes the loader's.
            seed: Of sampled labels.
            progress: Whether to show progress bars.

        Returns:
            The selection in pick order, or None for given ids.

        Raises:
            ValueError: If neither or both are given, there is no budget or no target, or ids do not fit.
            StoreError: If the store belongs to other weights or components.
        """
        if (model is None) == (ids is None):
            raise ValueError("`DataSelector.select()`: expected a model, or `ids=`, and not both.")
        if ids is not None:
            return self._use([int(k) for k in ids], None, None)
        assert model is not None
        budget = self._budget if budget is None else _checked_budget("DataSelector.select", budget)
        if budget is None:
            raise ValueError("`DataSelector(budget=None)`: expected an int >= 1 or a fraction in (0, 1] to select.")
        given = {"rule": rule, "loss": loss}
        options = self._options | {name: value for name, value in given.items() if value is not None}
        if store is not None:
            options["curvature"] = _recorded_curvature(store, model, options["components"])
        pool = self.pool_dataloader()
        with unchanged(model):
            selection = select_training_data(
                model,
                pool,
                self._target_data(pool),
                budget=budget,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                **options,
            )
        self._use(positions_of(selection), selection, data_fingerprint(pool.dataset))
        return selection

    def use(self, selection: Selection) -> Selection:
        """Serve a selection that was made elsewhere from the same pool; its ids are positions.

        Raises:
            ValueError: If its ids are names.
        """
        self._use(positions_of(selection), selection, None)
        return selection

    def clear(self) -> None:
        """Serve the whole pool again."""
        self._positions, self._selection, self._fingerprint, self._file = None, None, None, None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the selection as JSON, for ``DataSelector(selection=path)`` in another process.

        Raises:
            ValueError: If nothing has been selected.
        """
        if self._positions is None:
            raise ValueError("`DataSelector.save()`: nothing has been selected; call select first.")
        if self._fingerprint is None:
            self._fingerprint = data_fingerprint(self.pool_dataloader().dataset)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self._chosen(), indent=2) + "\n")
        os.replace(temporary, path)
        return path

    def load(self, path: str | os.PathLike[str]) -> Selection | None:
        """Serve a selection written by `save`; that the pool is the same is checked when it is served."""
        try:
            return self._restore(json.loads(Path(path).read_text()))
        except (LookupError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"`DataSelector.load({str(path)!r})`: expected a file written by `save`.") from error

    def pool_dataloader(self) -> DataLoader[Any]:
        """The loader of the whole pool, as the user made it; sets the data up if no fit has done so yet.

        Raises:
            ValueError: If the training data is not one DataLoader over a map-style dataset.
        """
        if not self._is_set_up:
            self._inner.prepare_data()
            self.setup("fit")
        loader = self._inner.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"`DataSelector(data=...)`: train_dataloader gives a {type(loader).__name__}; expected one DataLoader, "
                "so that every example has one position. Select in each dataset before they are combined."
            )
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"`DataSelector(data=...)`: {type(loader.dataset).__name__} is iterable and has no positions; "
                "expected a map-style dataset with __len__ and __getitem__."
            )
        return loader

    def _check_size(self, loader: Any) -> None:
        """A budget that the pool does not have is told before the warm-up, not after it."""
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else None
        counted = isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
        if counted and not isinstance(self._budget, TokenBudget | None):
            resolve_budget(self._budget, len(dataset), "DataSelector")

    def _target_data(self, pool: DataLoader[Any]) -> Any:
        if isinstance(self._targets, DataLoader):
            return self._targets
        if self._targets is not None:
            like = ExampleLoader(pool)
            return ExampleLoader(self._targets, like.batch_size, like.collate_fn)
        loader = self._inner.val_dataloader() if overrides(self._inner, "val_dataloader") else None
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if not isinstance(loader, DataLoader):
            raise ValueError(
                "`DataSelector(targets=None)`: the data has no single validation loader to take the targets from. "
                "Expected a DataLoader or dataset of the examples whose loss shall fall."
            )
        return loader

    def _use(self, positions: list[int], selection: Selection | None, fingerprint: str | None) -> Selection | None:
        if not positions or len(set(positions)) != len(positions) or min(positions) < 0:
            raise ValueError(
                f"`DataSelector.select(ids={positions[:8]}...)`: expected at least one position, none twice, all >= 0."
            )
        self._positions, self._selection, self._fingerprint, self._file = positions, selection, fingerprint, None
        return selection

    # -- serving

    def train_dataloader(self) -> Any:
        """The pool's loader as it is, or one like it over the selected rows."""
        if self._positions is None:
            whole = self._inner.train_dataloader()
            self._check_size(whole)
            return whole
        loader = self.pool_dataloader()
        self._check_pool(loader)
        positions = sorted(self._positions)
        if self._trainer is not None and self._trainer.world_size > 1:
            positions = self._trainer.strategy.broadcast(positions)  # ranks may have computed ties differently
        if self._loader_fn is not None:
            return self._loader_fn(subset(loader.dataset, positions))
        return selected_loader(loader, positions)

    def setup(self, stage: str) -> None:
        """Set the data up, and read the selection file before a fit."""
        super().setup(stage)
        self._is_set_up = True
        if stage == "fit" and self._file is not None:
            self.load(self._file)

    def teardown(self, stage: str) -> None:
        """Tear the data down."""
        super().teardown(stage)
        self._is_set_up = not overrides(self._inner, "teardown")

    def state_dict(self) -> dict[str, Any]:
        """Selection and the wrapped datamodule's state, the former as plain JSON."""
        chosen = None if self._positions is None else self._chosen()
        return {"version": 1, "selection": chosen, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; a selection that was made since wins over the one in the checkpoint."""
        super().load_state_dict(state_dict)
        chosen = state_dict["selection"]
        if chosen is None:
            return
        if self._positions is None:
            self._restore(chosen)
        elif sorted(chosen["positions"]) != sorted(self._positions):
            rank_zero_warn(
                "DataSelector: the checkpoint was trained on another selection than the one made since; the new one "
                "is served. Call `clear()` before the fit to take the one in the checkpoint."
            )

    def _check_pool(self, loader: DataLoader[Any]) -> None:
        assert self._positions is not None
        size = len(loader.dataset)  # type: ignore[arg-type]
        fingerprint = data_fingerprint(loader.dataset)
        if max(self._positions) >= size or self._fingerprint not in (None, fingerprint):
            raise ValueError(
                f"DataSelector: the training data ({size} examples, {fingerprint}) is not the pool the selection was "
                f"made in ({self._fingerprint}, with position {max(self._positions)}). Expected the same dataset in "
                "the same order: seed `random_split` in setup(), or select again."
            )
        self._fingerprint = fingerprint

    def _chosen(self) -> dict[str, Any]:
        selection = None if self._selection is None else self._selection.to_dict()
        return {"version": 1, "positions": self._positions, "fingerprint": self._fingerprint, "selection": selection}

    def _restore(self, chosen: dict[str, Any]) -> Selection | None:
        selection = None if chosen["selection"] is None else Selection.from_dict(chosen["selection"])
        return self._use(list(chosen["positions"]), selection, chosen["fingerprint"])


def _checked_budget(call: str, budget: Budget | None) -> Budget | None:
    return budget if isinstance(budget, TokenBudget | None) else check_budget(budget, call)


def _checked_targets(targets: Any) -> Any:
    try:
        ExampleLoader(targets)
    except ValueError as error:
        raise ValueError(f"`DataSelector(targets={type(targets).__name__})`: {error}") from error
    return targets


def _recorded_curvature(store: str | os.PathLike[str], model: nn.Module, select: Any) -> Curvature:
    found = Store.open(Path(store))
    found.verify(model, None if select is None else find_components(model, select))
    return found.read_curvature("curvature")
