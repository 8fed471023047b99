"""Rows of a pool by their positions, tied to that pool and no other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_influence.capture.data_fingerprint import data_fingerprint
from lightning_influence.selection import Selection
from lightning_influence.selection.selected_loader import positions_of


@dataclass(frozen=True, eq=False)
class Chosen:
    """Positions in a dataset, with how they were chosen where that is known.

    Attributes:
        positions: At least one, none twice, in pick order.
        selection: With its gains; None where only positions were given.
        fingerprint: Of the dataset they were chosen in (`data_fingerprint`); None until it has been seen.
        weights: How often each of the positions is served in proportion to the others; None for once each.

    Raises:
        ValueError: If the positions are none.
    """

    positions: tuple[int, ...]
    selection: Selection | None = None
    fingerprint: str | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shown = list(self.positions)
        if not shown or len(set(shown)) != len(shown) or min(shown) < 0:
            raise ValueError(
                f"`DataSelector.select(ids={shown[:8]}...)`: expected at least one position, none twice, all >= 0."
            )

    @classmethod
    def of(cls, selection: Selection, fingerprint: str | None = None) -> Chosen:
        """The rows that a selection names by their positions.

        Raises:
            ValueError: If its ids are names, or it has none.
        """
        if not selection.ids:
            raise ValueError(
                "`DataSelector.select()`: the selection is empty, as no row is predicted to lower the target loss and "
                "the constraints say stop_if_negative_gain=True. Leave that out to have the least harmful rows, or "
                "check that pool and targets fit together."
            )
        return cls(tuple(positions_of(selection)), selection, fingerprint)

    @property
    def ids(self) -> list[int]:
        """The positions in the order of the pool."""
        return sorted(self.positions)

    @property
    def weights_of_ids(self) -> list[float] | None:
        """The weights in the order of the pool."""
        if self.weights is None:
            return None
        return [weight for _, weight in sorted(zip(self.positions, self.weights, strict=True))]

    def weighed(self, weights: Mapping[int, float] | Literal["gains"] | None) -> Chosen:
        """The same with weights, see `DataSelector.weigh`.

        Raises:
            ValueError: If they do not fit.
        """
        if weights is None:
            return replace(self, weights=None)
        call = "DataSelector.weigh"
        if isinstance(weights, str):
            checked_weights(weights, call)
            if self.selection is None:
                raise ValueError(f"`{call}('gains')`: only positions were given. Expected weights by position.")
            found = self.selection.gains.clamp(max=0).abs().tolist()
            if not any(found):
                raise ValueError(
                    f"`{call}('gains')`: none of the {len(found)} picks is predicted to lower the target loss, so no "
                    "row would be drawn. Serve each once, without weights, or check that pool and targets fit together."
                )
        else:
            if set(weights) != set(self.positions):
                odd = sorted(set(weights) ^ set(self.positions))[:8]
                raise ValueError(
                    f"`{call}(weights)`: expected one for each selected position; not on both sides: {odd}."
                )
            found = [float(weights[k]) for k in self.positions]
        if not all(math.isfinite(w) and w >= 0 for w in found) or not any(found):
            raise ValueError(
                f"`{call}({'gains' if isinstance(weights, str) else 'weights'})`: expected finite numbers >= 0, "
                f"not all of them 0; got {found[:4]}{'...' * (len(found) > 4)}."
            )
        return replace(self, weights=tuple(found))

    def found_in(self, dataset: Any) -> Chosen:
        """The same, tied to a dataset.

        Raises:
            ValueError: If it is not the dataset they were chosen in.
        """
        size, fingerprint = len(dataset), data_fingerprint(dataset)
        if self.fingerprint is None and max(self.positions) >= size:
            raise ValueError(
                f"`DataSelector.select(ids=...)`: position {max(self.positions)} lies outside the training data, which "
                f"has {size} examples. Expected positions from 0 to {size - 1}."
            )
        if max(self.positions) >= size or self.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"DataSelector: the training data ({size} examples, {fingerprint}) is not the pool the selection was "
                f"made in ({self.fingerprint}, with position {max(self.positions)}). Expected the same dataset in "
                "the same order: seed `random_split` in setup(), or select again."
            )
        return replace(self, fingerprint=fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        selection = None if self.selection is None else self.selection.to_dict()
        return {
            "version": 1,
            "positions": list(self.positions),
            "fingerprint": self.fingerprint,
            "selection": selection,
            "weights": None if self.weights is None else list(self.weights),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Chosen:
        """What `to_dict` gave."""
        selection = None if found["selection"] is None else Selection.from_dict(found["selection"])
        weights = found.get("weights")
        return cls(
            tuple(found["positions"]), selection, found["fingerprint"], None if weights is None else tuple(weights)
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write a JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(temporary, path)
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str], call: str = "DataSelector.load({!r})") -> Chosen:
        """Read it.

        Args:
            path: Of the file.
            call: How the caller's code reads, for the error text, with a place for the path.

        Raises:
            ValueError: If it is no such file, or there is none.
        """
        shown = f"`{call.format(str(path))}`: expected a file written by `save`"
        try:
            text = Path(path).read_text()
        except FileNotFoundError as error:
            raise ValueError(
                f"{shown}, and there is none at {Path(path).absolute()} now that it is read. Write it before this fit, "
                "with `selector.save(path)` after `select`, or check the path."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{shown}; this one cannot be read as text ({error}). Check the path.") from error
        try:
            return cls.from_dict(json.loads(text))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{shown}; what this one holds is no selection of a DataSelector ({type(error).__name__}: {error}). "
                "Write it with `selector.save(path)`. Of a list of positions, or a Selection, pass the positions "
                "themselves: `DataSelector(selection=[...])`."
            ) from error


def checked_weights(weights: Literal["gains"] | None, call: str = "DataSelector") -> Literal["gains"] | None:
    """The word as it is.

    Raises:
        ValueError: If it is another.
    """
    if weights not in (None, "gains"):
        raise ValueError(
            f"`{call}(weights={weights!r})`: expected 'gains' or None; give weights by position to `weigh`."
        )
    return weights


def plain_positions(ids: Sequence[int]) -> tuple[int, ...]:
    """Positions without numpy's clothes.

    Raises:
        ValueError: If one is no int, as in a mask.
    """
    plain = [k.item() if hasattr(k, "item") else k for k in ids]
    odd = [k for k in plain if type(k) is not int]
    if odd:
        raise ValueError(
            f"`DataSelector.select(ids=[{', '.join(map(repr, plain[:8]))}...])`: expected positions in the training "
            f"data, as ints. Got a {type(odd[0]).__name__}; of a mask pass the positions that are true."
        )
    return tuple(plain)
