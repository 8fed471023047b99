"""A datamodule that is, for a Trainer, the one it wraps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sized
from types import MethodType
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.overrides import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.datamodule.pool import check_single

# What a Trainer looks for on a datamodule; whether it is there it decides by comparing code.
_HOOKS = (
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "prepare_data",
    "on_exception",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)
HOOKS = tuple(hook for hook in _HOOKS if hasattr(LightningDataModule, hook))
SETTINGS = ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "_log_hyperparams")


class DataModuleWrapper(LightningDataModule):
    """Passes on everything to another datamodule: hooks, attributes, hyperparameters, state, the Trainer.

    Works in Trainers of ``lightning`` and of ``pytorch_lightning``, whichever of the two the wrapped one is of.

    A LightningCLI lets ``save_hyperparameters()`` of a datamodule inside of another find the arguments of the outer
    one. They are put right here, so that the wrapped one reads its own in every hook; in its constructor it cannot.

    Args:
        inner: The datamodule to wrap.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A Trainer of ``pytorch_lightning`` takes only its own datamodules: be one for it too."""
        legacy = sys.modules.get("pytorch_lightning")
        return object.__new__(cls if legacy is None else _of_both(cls, legacy.LightningDataModule))

    def __init__(self, inner: Any) -> None:
        self._trainer: Any = None
        self._inner = inner
        self._given = _put_right(inner)
        super().__init__()
        self._delegate(LightningDataModule)

    def train_dataloader(self) -> Any:
        """The wrapped datamodule's."""
        return self._inner.train_dataloader()

    def setup(self, stage: str) -> None:
        """Set the data up."""
        self._inner.setup(stage)

    def teardown(self, stage: str) -> None:
        """Tear the data down."""
        self._inner.teardown(stage)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped datamodule's state."""
        return {"inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._inner.load_state_dict(state_dict["inner"])

    @property
    def trainer(self) -> Any:
        """The Trainer this is attached to; the wrapped datamodule is attached with it."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer = self._inner.trainer = trainer
        if trainer is not None:
            self._delegate(_datamodule_class_of(trainer, self))

    @property
    def hparams(self) -> Any:
        """The wrapped datamodule's; under a LightningCLI the whole section of its file."""
        return self._inner.hparams if self._given is None else self._given

    @property
    def hparams_initial(self) -> Any:
        """The wrapped datamodule's; under a LightningCLI the whole section of its file."""
        return self._inner.hparams_initial if self._given is None else copy.deepcopy(self._given)

    def __getattr__(self, name: str) -> Any:
        """Everything else that the wrapped datamodule offers: tokenizer, num_classes, ..."""
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __reduce__(self) -> Any:
        """Pickle by the class that can be imported."""
        return _blank, (type(self).__dict__.get("_importable", type(self)),), self.__dict__

    def _delegate(self, parent: type[Any]) -> None:
        """Hooks of the wrapped datamodule, and the Trainer's own defaults for those it does not define."""
        for hook in HOOKS:
            method = getattr(self._inner, hook) if overrides(self._inner, hook) else None
            setattr(self, hook, method or MethodType(getattr(parent, hook), self))
        for name in SETTINGS:
            setattr(self, name, getattr(self._inner, name))


def _put_right(inner: Any) -> Any:
    """What a LightningCLI gave to the outer datamodule, if the inner one took it for its own; it has its own then."""
    given = inner.hparams
    own = given.get("data") if "_instantiator" in given else None
    if not isinstance(own, Mapping) or str(own.get("class_path")).rpartition(".")[2] != type(inner).__name__:
        return None
    parts = [own.get(key) or {} for key in ("init_args", "dict_kwargs")]
    found = {"_class_path": own["class_path"], **parts[0], **parts[1], "_instantiator": given["_instantiator"]}
    inner._hparams = inner._to_hparams_dict(found)
    inner._hparams_initial = copy.deepcopy(inner._hparams)
    return given


class PlainData(LightningDataModule):
    """Datasets or loaders as a datamodule.

    Args:
        train: DataLoader, or map-style dataset, which is shuffled.
        val: DataLoader or dataset; None for none.
        settings: Of the loaders of plain datasets.
    """

    def __init__(self, train: Any, val: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self._train = _as_loader(train, "data", shuffle=True, settings=settings)
        self._val = None
        if val is not None:
            self._val = _as_loader(val, "val", shuffle=False, settings=settings)
            setattr(self, "val_dataloader", self._validation)  # noqa: B010  # there is a val loop only if it is defined

    def train_dataloader(self) -> Any:
        """The loader of the pool."""
        return self._train

    def _validation(self) -> Any:
        return self._val


def _as_loader(data: Any, argument: str, *, shuffle: bool, settings: dict[str, Any]) -> DataLoader[Any]:
    check_single(argument, data)
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(f"`DataSelector({argument}={type(data).__name__})`: expected at least one example.")
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise ValueError(
            f"`DataSelector({argument}={type(data).__name__})`: expected a LightningDataModule, a DataLoader or a "
            "map-style dataset with __len__ and __getitem__."
        )
    return DataLoader(data, shuffle=shuffle, **settings)


def is_datamodule(data: Any) -> bool:
    """Whether something is a LightningDataModule of either namespace."""
    return _datamodule_class(type(data)) is not None


def _datamodule_class(cls: type[Any]) -> type[Any] | None:
    """The LightningDataModule that a class descends from, in whichever of the two namespaces."""
    return next((c for c in cls.__mro__ if c.__name__ == "LightningDataModule"), None)


def overrides(inner: Any, hook: str) -> bool:
    """Whether a datamodule defines a hook itself."""
    parent = _datamodule_class(type(inner))
    assert parent is not None
    return bool(is_overridden(hook, inner, parent))


def _datamodule_class_of(trainer: Any, wrapper: DataModuleWrapper) -> type[Any]:
    """What a Trainer takes for a datamodule."""
    if not any(cls.__module__.startswith("pytorch_lightning.") for cls in type(trainer).__mro__):
        return LightningDataModule
    legacy = sys.modules["pytorch_lightning"].LightningDataModule
    if not isinstance(wrapper, legacy):
        raise TypeError(
            f"{type(wrapper).__name__}: this Trainer is of `pytorch_lightning`, which was imported after the "
            f"datamodule was made. Expected `import pytorch_lightning` before `{type(wrapper).__name__}(...)`, or a "
            "Trainer of `lightning`."
        )
    return legacy  # type: ignore[no-any-return]


_BOTH: dict[Any, type[Any]] = {}


def _of_both(cls: type[Any], legacy: type[Any]) -> type[Any]:
    """A class with the same name that is a datamodule in both namespaces."""
    if issubclass(cls, legacy):
        return cls
    if cls not in _BOTH:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_importable": cls}
        _BOTH[cls] = type(cls.__name__, (cls, legacy), names)
    return _BOTH[cls]


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)
