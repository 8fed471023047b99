"""LiSSA: the Neumann series of the inverse, on the whole data or on small random batches ([MS] section 5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.capture import Component
from lightning_influence.curvature.base import Fisher
from lightning_influence.curvature.iterative import Convergence, IterativeCurvature
from lightning_influence.curvature.products import CurvatureProduct, ProductKind
from lightning_influence.curvature.spectrum import random_start, spectrum_ends

MARGIN = 1.05  # an eigenvalue found from inside a Krylov space is a little too small


class LiSSA(IterativeCurvature):
    """``x <- v + (I - (G + damping I) / scale) x``; then x / scale -> (G + damping I)^{-1} v (Agarwal et al. 2017).

    The series converges when the scale is more than half of the largest eigenvalue of the damped matrix, of every
    batch's when it runs on batches; the slowest direction gains a factor 1 - damping / scale in each step. The
    residual of every result is measured on the whole data and told.

    Args:
        damping: Absolute damping; None takes a share of the mean eigenvalue of the whole matrix.
        damping_share: That share.
        product: ``"gauss-newton"`` or ``"hessian"``.
        scale: None takes the largest eigenvalue of the damped matrix, found in 20 products when fitted.
        depth: Steps of the recursion, at most.
        repeats: Recursions whose mean is taken; more than one is for random batches only.
        examples_per_step: Examples of a random batch, drawn anew for each step; None takes all of them, and then no
            step is random and the recursion stops at the tolerance.
        tolerance: Of ``|v - (G + damping I) x| / |v|``; above it there is a warning.
        fisher: Labels of the pass for the mean eigenvalue.
        seed: Of those labels and of the random batches.

    Raises:
        ValueError: If an argument is out of range, or, when solving, if the recursion diverges.
    """

    def __init__(
        self,
        damping: float | None = None,
        damping_share: float = 0.1,
        product: ProductKind = "gauss-newton",
        scale: float | None = None,
        depth: int = 1000,
        repeats: int = 1,
        examples_per_step: int | None = None,
        tolerance: float = 1e-2,
        fisher: Fisher = "sampled",
        seed: int = 0,
    ) -> None:
        super().__init__(damping, damping_share, product, fisher, seed)
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"`LiSSA(scale={scale!r})`: expected a number > 0, or None for the largest eigenvalue.")
        for name, value in (("depth", depth), ("repeats", repeats), ("examples_per_step", examples_per_step)):
            if name == "examples_per_step" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"`LiSSA({name}={value!r})`: expected an int >= 1.")
        if repeats > 1 and examples_per_step is None:
            raise ValueError(
                f"`LiSSA(repeats={repeats})`: without examples_per_step every repetition is the same. Expected "
                "repeats=1, or examples_per_step=32, say."
            )
        if not 0 < tolerance < 1:
            raise ValueError(f"`LiSSA(tolerance={tolerance!r})`: expected a number in (0, 1).")
        self.scale, self.depth, self.repeats = scale, depth, repeats
        self.examples_per_step, self.tolerance = examples_per_step, tolerance

    def settings(self) -> dict[str, Any]:
        """Constructor arguments."""
        names = ("scale", "depth", "repeats", "examples_per_step", "tolerance")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}

    def _take(self, product: CurvatureProduct, progress: bool) -> None:
        super()._take(product, progress)
        self.scale_used = self.scale if self.scale is not None else self._ends(product)[1]

    def _apply(self, components: Sequence[Component], vectors: Tensor) -> Tensor:
        product, damping = self._block(components), self._damping
        lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        trails, total = [], torch.zeros_like(vectors)
        for batches in self._batches(product):
            found, trail = self._recursion(batches, vectors, lengths)
            total += found
            trails.append(trail)
        solution = total / (self.repeats * self.scale_used)
        if self.examples_per_step is None:
            [residuals] = trails
        else:
            rest = vectors - product(solution) - damping * solution
            residuals = torch.stack([torch.ones_like(lengths), _lengths(rest) / lengths])
        steps = torch.full((len(vectors),), sum(len(trail) - 1 for trail in trails), dtype=torch.int64)
        report = Convergence(residuals.cpu(), steps, self.tolerance)
        self._report(report, "Raise depth, damping, or the number of examples_per_step and repeats.")
        return solution

    def _recursion(
        self, batches: Iterator[CurvatureProduct], vectors: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, and the relative length of its last change after each step, [steps + 1, q].

        On the whole data that change is the residual of the step before, as (x' - x) = v - (G + damping I) x / scale.
        """
        state = vectors.clone()
        trail: list[Tensor] = []
        bar = tqdm(range(self.depth + 1), desc="LiSSA", delay=3, leave=False, disable=not self._progress)
        for k, product in zip(bar, batches, strict=False):
            change = vectors - (product(state) + self._damping * state) / self.scale_used
            trail.append(_lengths(change) / lengths)
            if self._diverges(state, trail, lengths):
                self._refuse(product)
            if k == self.depth or (self.examples_per_step is None and bool((trail[-1] <= self.tolerance).all())):
                break
            state = state + change
        return state, torch.stack(trail)

    def _batches(self, product: CurvatureProduct) -> Iterator[Iterator[CurvatureProduct]]:
        """For each repetition, the products of its steps."""
        ids = product.loader.ids
        rng = torch.Generator().manual_seed(self.seed)

        def random() -> Iterator[CurvatureProduct]:
            while True:
                drawn = torch.randint(len(ids), (self.examples_per_step or 0,), generator=rng)
                yield product.on([ids[k] for k in drawn.tolist()])

        def whole() -> Iterator[CurvatureProduct]:
            while True:
                yield product

        for _ in range(self.repeats):
            yield whole() if self.examples_per_step is None else random()

    def _diverges(self, state: Tensor, trail: list[Tensor], lengths: Tensor) -> bool:
        """Whether something happened that cannot while every step contracts.

        On the whole data no residual exceeds the vector then. With positive semi-definite batches |x| is at most
        |v| scale / damping; of a Hessian's negative eigenvalues nothing is known, and it is given more room.
        """
        if not bool(trail[-1].isfinite().all()):
            return True
        if self.examples_per_step is None:
            return bool((trail[-1] > 1.001).any())
        room = 1.001 if self.product == "gauss-newton" else 1e3
        return bool((_lengths(state) * self._damping > room * self.scale_used * lengths).any())

    def _refuse(self, product: CurvatureProduct) -> None:
        """Say what would converge.

        Raises:
            ValueError: Always.
        """
        assert self._product is not None
        whole = self._product.restricted(product.components)
        ends = [self._ends(p) for p in ([whole] if self.examples_per_step is None else [whole, product])]
        lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
        if lowest <= 0:
            raise ValueError(
                f"`{self!r}`: the recursion diverges, at any scale: the damped matrix has an eigenvalue of "
                f"{lowest:.3g}. Raise damping by more than {-lowest:.3g}, or take product='gauss-newton'."
            )
        raise ValueError(
            f"`{self!r}`: the recursion diverges. Expected a scale above half of the largest eigenvalue of the damped "
            f"matrix; pass scale={highest:.3g} (it was {self.scale_used:.3g})"
            + ("." if self.examples_per_step is None else ", or more where other batches have larger eigenvalues.")
        )

    def _ends(self, product: CurvatureProduct) -> tuple[float, float]:
        """Bounds of the spectrum of the damped matrix."""
        start = random_start(product.size, self.seed, product.like)
        low, high = spectrum_ends(product, start)
        return low + self._damping, MARGIN * max(high, 0.0) + self._damping


def _lengths(rows: Tensor) -> Tensor:
    """Of each row, float64 [q]."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found
