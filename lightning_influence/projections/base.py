"""The contract of random projections: a record in, vectors of few numbers out, inner products kept on average."""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.capture.budget import check_bytes
from lightning_influence.capture.component import Component
from lightning_influence.capture.record import LayerRecord
from lightning_influence.errors import NotFittedError

T = TypeVar("T")


class Projection(ABC):
    """A random linear map of each component's gradients, [n, *shape] -> [n, k_c] with E<p_i, p_j> = <g_i, g_j>.

    Every component has its own map, drawn from the seed and the component's name alone: it does not depend on the
    other components (their number only changes k_c), on batches or on the device. Because each map by itself keeps
    inner products on average, the concatenation over components weights no component more than another.

    Args:
        dimensions: How many numbers an example becomes, all components together: an int >= 1, or a float in (0, 1]
            for a share of the parameters ([SP] section 3.3: d_c proportional to the size of the component).
        seed: Of the random map.
        memory_budget: Bytes of random numbers that are kept between calls; what does not fit is drawn again.

    Attributes:
        sizes: k_c by component name; filled by `start`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dimensions: Any, *, seed: int = 0, memory_budget: int = 256 * 1024**2) -> None:
        self._check_dimensions(dimensions)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"`{type(self).__name__}(seed={seed!r})`: expected an int.")
        check_bytes(type(self).__name__, "memory_budget", memory_budget)
        self.dimensions = dimensions
        self.seed = seed
        self.memory_budget = memory_budget
        self.sizes: dict[str, int] = {}
        self._components: dict[str, Component] = {}
        self._kept: dict[tuple[object, ...], Any] = {}
        self._kept_bytes = 0

    def start(self, components: Sequence[Component]) -> Self:
        """Share the dimensions out among components, before the first projection.

        Returns:
            Itself.

        Raises:
            ValueError: If the dimensions are fewer than the components or more than the parameters.
        """
        self.sizes = self._allocate(components)
        self._components = {c.name: c for c in components}
        self._forget()
        return self

    @abstractmethod
    def project(self, component: Component, record: LayerRecord) -> Tensor:
        """Projected gradients of one component, [n, k_c], float32 at least, on the record's device.

        Raises:
            NotFittedError: Before `start`.
            ValueError: If the component is not one that the projection was started with.
        """

    @property
    def total(self) -> int:
        """Number of dimensions of all components together."""
        return sum(self.sizes.values())

    @property
    def slices(self) -> dict[str, slice]:
        """Where each component stands in the concatenation over components, [n, total]."""
        found, start = {}, 0
        for name, size in self.sizes.items():
            found[name] = slice(start, start + size)
            start += size
        return found

    def size_of(self, component: Component) -> int:
        """k_c of a component, after checking that the projection was started with it.

        Raises:
            NotFittedError: Before `start`.
            ValueError: If it is not among those, or has another shape there.
        """
        if not self.sizes:
            raise NotFittedError(
                f"{type(self).__name__} has not been started: call start(components) with all components that are "
                "projected, because they share its dimensions."
            )
        known = self._components.get(component.name)
        if known is None or known.shape != component.shape:
            near = difflib.get_close_matches(component.name, self.sizes, n=3, cutoff=0)
            odd = "is not among" if known is None else f"of shape {component.shape} is not as in"
            raise ValueError(
                f"`{type(self).__name__}.project`: component {component.name!r} {odd} the {len(self.sizes)} components "
                f"of start(components). Expected the same components in both; the nearest names are {near}."
            )
        return self.sizes[component.name]

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, JSON-like: ``type(p)(**p.settings())`` is the same map once it is started."""
        return {"dimensions": self.dimensions, "seed": self.seed, "memory_budget": self.memory_budget}

    def __repr__(self) -> str:
        """How to build it again."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def _check_dimensions(self, dimensions: Any) -> None:
        whole = isinstance(dimensions, int) and not isinstance(dimensions, bool) and dimensions >= 1
        if not whole and not (isinstance(dimensions, float) and 0 < dimensions <= 1):
            raise ValueError(
                f"`{type(self).__name__}(dimensions={dimensions!r})`: expected an int >= 1 (for all components "
                "together) or a float in (0, 1] (a share of the parameters)."
            )

    def _allocate(self, components: Sequence[Component]) -> dict[str, int]:
        sizes = [c.numel for c in components]
        asked: int | float = self.dimensions
        total = asked if isinstance(asked, int) else max(len(sizes), round(asked * sum(sizes)))
        if not len(sizes) <= total <= sum(sizes) or not sizes:
            raise ValueError(
                f"`{type(self).__name__}(dimensions={asked!r})`: expected at least one dimension for each of the "
                f"{len(sizes)} components and at most one for each of their {sum(sizes):,} parameters."
            )
        return dict(zip((c.name for c in components), allocate(total, sizes), strict=True))

    def _seed_of(self, component: Component, *labels: str | int) -> int:
        return stable_seed(self.seed, component.name, *labels)

    def _keep(self, key: tuple[object, ...], num_bytes: int, draw: Callable[[], T]) -> T:
        """What ``draw`` gives, from memory when it was drawn before and fits into the budget."""
        if key in self._kept:
            found: T = self._kept[key]
            return found
        drawn = draw()
        if self._kept_bytes + num_bytes <= self.memory_budget:
            self._kept[key] = drawn
            self._kept_bytes += num_bytes
        return drawn

    def _forget(self) -> None:
        self._kept, self._kept_bytes = {}, 0


def allocate(total: int, sizes: Sequence[int]) -> list[int]:
    """Share ``total`` dimensions out in proportion to sizes, at least 1 each, exactly ``total`` together.

    Components whose share is below 1 get 1; the rest is shared out among the others by largest remainder (ties:
    the earlier component). No component gets more dimensions than it has parameters as long as
    ``len(sizes) <= total <= sum(sizes)``.

    >>> allocate(10, [600, 300, 90, 1])
    [5, 3, 1, 1]
    """
    small: set[int] = set()
    while True:  # taking out the small ones lowers the others' shares, so that others may become small
        rest, left = total - len(small), sum(size for k, size in enumerate(sizes) if k not in small)
        found = {k for k, size in enumerate(sizes) if k not in small and rest * size < left}
        if not found:
            break
        small |= found
    large = [k for k in range(len(sizes)) if k not in small]
    shares = [1] * len(sizes)
    for k in large:
        shares[k] = rest * sizes[k] // left
    by_remainder = sorted(large, key=lambda k: -(rest * sizes[k] % left))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def stable_seed(*parts: str | int) -> int:
    """A seed in [0, 2**62) from names and numbers, the same on every platform and in every process.

    >>> stable_seed(0, "up") == stable_seed(0, "up") != stable_seed(0, "down")
    True
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def generator(seed: int) -> torch.Generator:
    """A generator of the CPU whatever the device of the model: its numbers are the same everywhere."""
    return torch.Generator().manual_seed(seed)


def pieces(record: LayerRecord, elements: int, limit: int) -> list[LayerRecord]:
    """The record in parts of so many examples, at ``elements`` numbers each, that ``limit`` is kept if possible."""
    step = max(1, limit // max(1, elements))
    return [record.narrow(k, min(k + step, len(record))) for k in range(0, len(record), step)]


def matrix_shape(component: Component) -> tuple[int, int]:
    """(o, i) of a component's gradient as a matrix; a vector is one row."""
    if len(component.shape) < 2:
        return 1, component.numel
    return component.shape[0], component.numel // component.shape[0]
